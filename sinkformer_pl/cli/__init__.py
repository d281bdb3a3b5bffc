"""The command line: `python -m sinkformer_pl COMMAND ...`."""

from sinkformer_pl.cli.main import main

__all__ = ["main"]
