"""Parse the options of the commands that aren't trainings."""

import argparse
import re
from collections.abc import Callable
from typing import NoReturn

from sinkformer_pl.errors import UserError


class OptionParser(argparse.ArgumentParser):
    """argparse's, with one line for a wrong argument."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError."""
        message = re.sub(r"^argument (\S+): (?!invalid)", r"\1 ", message)
        raise UserError(f"{message}; {self.prog} --help lists the options")


def at_least(least: int) -> Callable[[str], int]:
    """Make the type of an option that is a whole number of `least` or more."""

    def read(text: str) -> int:
        """Read the number."""
        if not re.fullmatch(r"[+-]?\d+", text):
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, {least} or more")
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: give {least} or more")
        return int(text)

    return read
