"""What a run says of itself on the screen, from the first process: at its beginning, and at its end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from sinkformer_pl.data import ClassificationData
from sinkformer_pl.factories import readable
from sinkformer_pl.tasks import Classifier
from sinkformer_pl.training.checkpoint_content import METRICS_KEY
from sinkformer_pl.training.checkpoint_file import read_checkpoint
from sinkformer_pl.training.checkpoint_match import differing
from sinkformer_pl.training.run_folder import CHECKPOINTS


@rank_zero_only
def say(line: str) -> None:
    """Print a line, at once."""
    print(line, flush=True)


def say_what_runs(
    doing: str, model: Classifier, data: ClassificationData, checkpoint: Mapping[str, Any] | None, folder: Path | None
) -> None:
    """Say which normalization, data and network a command works with.

    Args:
        doing: what the command does, such as "training".
        model: the task.
        data: set up.
        checkpoint: what `read_checkpoint` gives, to say in what arguments the model differs from it.
        folder: of the run; None if nothing is kept.
    """
    now = readable(model.hparams["normalization"])
    saved = (checkpoint or {}).get("hyper_parameters", {})
    trained = saved.get("normalization")
    before = f", trained under {readable(trained)}" if trained and readable(trained) != now else ""
    changed = "".join(
        f"; {key} {wanted}, {was} in the checkpoint"
        for key, (was, wanted) in differing(saved, model.hparams).items()
        if key.partition(".")[0] != "normalization"
    )
    say(f"{doing} under {now}{before}{changed}; {'nothing is kept' if folder is None else f'folder {folder}'}")
    sizes = ", ".join(f"{len(dataset)} {split}" for split, dataset in data.datasets.items())
    say(f"{type(data).__name__}: {data.num_classes} classes; {sizes}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"{type(model.backbone).__name__} with its head: {parameters:,} parameters")


@rank_zero_only
def say_what_came_out(folder: Path) -> None:
    """Print the validation metrics of a training's best checkpoint, and where its files are.

    Args:
        folder: of the run.
    """
    best = folder / CHECKPOINTS / "best.ckpt"
    if best.is_file():
        checkpoint = read_checkpoint(best)
        table = Table("best checkpoint", f"epoch {checkpoint['epoch']}")
        for name, value in sorted(checkpoint[METRICS_KEY].items()):
            table.add_row(name, f"{value:.4f}")
        Console().print(table)
    elif not best.exists():
        say("no checkpoint was written: nothing was validated, or checkpoints are off")
    for what, path in (
        ("best", best),
        ("last", folder / CHECKPOINTS / "last.ckpt"),
        ("logs", folder / "metrics.csv"),
        ("config", folder / "config.yaml"),
    ):
        if path.exists():
            say(f"{what:7s} {path}")
