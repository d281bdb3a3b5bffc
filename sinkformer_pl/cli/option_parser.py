"""The parser of the commands that aren't trainings."""

import argparse
from typing import NoReturn

from sinkformer_pl.errors import UserError


class OptionParser(argparse.ArgumentParser):
    """argparse's, with one line for a wrong argument."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError."""
        raise UserError(f"{message}; {self.prog} --help lists the options")
