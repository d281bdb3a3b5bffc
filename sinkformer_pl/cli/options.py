"""The parser of the commands that aren't trainings."""

import argparse
from typing import Any, NoReturn

from sinkformer_pl.errors import UserError


class OptionParser(argparse.ArgumentParser):
    """argparse's, with one line for a wrong argument."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError."""
        raise UserError(f"{message}; {self.prog} --help lists the options")


def module_names(value: Any) -> list[str]:
    """Split module names from "a,b", "[a, b]" or a list."""
    parts = value.strip("[]").split(",") if isinstance(value, str) else value or []
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise UserError(f"plugins {value}: expected names of modules")
    return [part.strip(" '\"") for part in parts if part.strip()]
