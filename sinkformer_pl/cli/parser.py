"""The parser, whose errors are lines for users."""

import argparse
from typing import NoReturn

from pytorch_lightning.cli import LightningArgumentParser

from sinkformer_pl.cli.messages import condense
from sinkformer_pl.errors import UserError


class Parser(LightningArgumentParser):
    """Lightning's, with one line for a wrong argument."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a UserError."""
        if not self.exit_on_error:
            # A parser within the parser, for the arguments of one class: the outer one adds its key to the message.
            super().error(message, ex)
        parsers = [self, *(sub for action in self._actions for sub in _subparsers(action))]
        options = [
            option.lstrip("-") for parser in parsers for action in parser._actions for option in action.option_strings
        ]
        raise UserError(condense(message, options))


def _subparsers(action: argparse.Action) -> list[argparse.ArgumentParser]:
    return list(action.choices.values()) if isinstance(action, argparse._SubParsersAction) else []
