"""The fit command."""

from collections.abc import Sequence

from sinkformer_pl.cli.console import say_what_came_out
from sinkformer_pl.cli.help import print_asked_for
from sinkformer_pl.cli.run import Run, handled_signals
from sinkformer_pl.cli.settings import read_settings


def run_fit(argv: Sequence[str]) -> None:
    """Train, and say what came out.

    Args:
        argv: arguments after the command.

    Raises:
        UserError: the arguments, the data or the checkpoint are at fault.
        Stopped: a signal asked for it; a line has said so.
    """
    with handled_signals() as signals:
        if print_asked_for("fit", argv):
            return
        run = Run.build(read_settings("fit", argv), signals)
        run.execute("training")
        if run.keeps_files:
            say_what_came_out(run.folder)
