"""The commands validate, test and predict."""

from collections.abc import Sequence

from sinkformer_pl.cli.console import say
from sinkformer_pl.cli.help import print_asked_for
from sinkformer_pl.cli.run import Run, handled_signals
from sinkformer_pl.cli.settings import read_settings

DOING = {"validate": "validating", "test": "testing", "predict": "predicting"}

WRITTEN = {
    "validate": ("metrics", "validate.json"),
    "test": ("metrics and confusion matrix", "test.json"),
    "predict": ("predictions", "predictions.csv"),
}


def run_evaluation(command: str, argv: Sequence[str]) -> None:
    """Evaluate a checkpoint, or predict with it, and say where the results are.

    Args:
        command: "validate", "test" or "predict".
        argv: the arguments after it.

    Raises:
        UserError: the arguments, the data or the checkpoint are at fault.
        Stopped: a signal asked for it; a line has said so.
    """
    with handled_signals() as signals:
        if print_asked_for(command, argv):
            return
        run = Run.build(read_settings(command, argv), signals)
        run.execute(DOING[command])
        what, name = WRITTEN[command]
        say(f"{what}: {run.folder / name}")
