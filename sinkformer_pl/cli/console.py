"""Print the beginning and the end of a command, from the first process; raise known errors with their remedy."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from sinkformer_pl.data import ClassificationData
from sinkformer_pl.errors import RunError, UserError
from sinkformer_pl.factories import readable
from sinkformer_pl.training.checkpoint_content import METRICS_KEY
from sinkformer_pl.training.checkpoint_file import read_checkpoint
from sinkformer_pl.training.checkpoint_match import differing
from sinkformer_pl.training.curves import read_curves
from sinkformer_pl.training.run_folder import CHECKPOINTS
from sinkformer_pl.training.warning_signs import NEEDED, Progress, warning_sign

REMEDIES = {
    "Early stopping conditioned on metric": "give another monitor",
    "DataLoader worker (pid": "it may have lacked memory: lower data.num_workers or data.batch_size",
    "SparseAdam does not support dense gradients": "give another optimizer",
    "You set `--ntasks=": "in an interactive allocation, set SLURM_JOB_NAME=interactive",
    "The server socket has failed to listen": "another process has this port: set MASTER_PORT to another",
    "loaded state dict": "resume with the callbacks and the frozen parameters that the training had",
    "CUDA out of memory": "lower data.batch_size, with trainer.accumulate_grad_batches for the same steps",
}
"""Remedies of errors of Lightning and PyTorch, by the beginnings of their messages."""


def raise_with_remedy(error: RuntimeError | ValueError) -> None:
    """Raise a RunError in place of an error of Lightning or PyTorch for which there is a remedy."""
    text = " ".join(str(error).split())
    for start, remedy in REMEDIES.items():
        if text.startswith(start):
            raise RunError(f"{text.rstrip('.')}; {remedy}") from error


@rank_zero_only
def say(line: str) -> None:
    """Print a line, at once."""
    print(line, flush=True)


def say_what_runs(
    doing: str,
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    checkpoint: Mapping[str, Any] | None,
    folder: Path | None,
) -> None:
    """Say which normalization, data and network a command works with.

    Args:
        doing: what the command does, such as "training".
        model: the task.
        data: set up.
        checkpoint: what `read_checkpoint` gives, to say in what arguments the model differs from it.
        folder: of the run; None if nothing is kept.
    """
    saved = (checkpoint or {}).get("hyper_parameters", {})
    now, trained = (values.get("normalization") for values in (model.hparams, saved))
    under = f"under {readable(now)}" if now else type(model).__name__
    before = f", trained under {readable(trained)}" if now and trained and readable(trained) != readable(now) else ""
    changed = "".join(
        f"; {key} {wanted}, {was} in the checkpoint"
        for key, (was, wanted) in differing(saved, model.hparams).items()
        if key.partition(".")[0] != "normalization"
    )
    say(f"{doing} {under}{before}{changed}; {'nothing is kept' if folder is None else f'folder {folder}'}")
    if isinstance(data, ClassificationData):
        sizes = ", ".join(f"{len(dataset)} {split}" for split, dataset in data.datasets.items())
        say(f"{type(data).__name__}: {data.num_classes} classes; {sizes}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    network = f"{type(model.backbone).__name__} with its head" if hasattr(model, "backbone") else type(model).__name__
    say(f"{network}: {parameters:,} parameters" + f", {frozen:,} of them frozen" * bool(frozen))


@rank_zero_only
def say_what_came_out(folder: Path, trainer: pl.Trainer, data: pl.LightningDataModule) -> None:
    """Print the validation metrics of a training's best checkpoint, where its files are, and signs of a vain one.

    Args:
        folder: of the run.
        trainer: that has trained.
        data: that it trained on.
    """
    best = folder / CHECKPOINTS / "best.ckpt"
    epoch: int | None = None
    if best.is_file():
        checkpoint = read_checkpoint(best)
        epoch = checkpoint["epoch"]
        table = Table("best checkpoint", f"epoch {checkpoint['epoch']}")
        for name, value in sorted(checkpoint[METRICS_KEY].items()):
            table.add_row(name, f"{value:.4f}")
        Console().print(table)
    elif not best.exists():
        last = (folder / CHECKPOINTS / "last.ckpt").exists()
        say("no best.ckpt: nothing was validated" if last else "no checkpoint was written: checkpoints are off")
    for what, path in (
        ("best", best),
        ("last", folder / CHECKPOINTS / "last.ckpt"),
        ("logs", folder / "metrics.csv"),
        ("config", folder / "config.yaml"),
    ):
        if path.exists():
            say(f"{what:7s} {path}")
    if isinstance(data, ClassificationData) and (sign := warning_sign(_progress(folder, trainer, data, epoch))):
        say(f"warning: {sign}")


def _progress(folder: Path, trainer: pl.Trainer, data: ClassificationData, best: int | None) -> Progress:
    curves: dict[str, dict[int, float]] = {name: {} for name in NEEDED}
    with contextlib.suppress(UserError):  # the file is somebody else's
        curves = read_curves(folder / "metrics.csv", NEEDED)
    for name in NEEDED:
        if not curves[name] and name in trainer.callback_metrics:  # other loggers than metrics.csv
            curves[name] = {trainer.current_epoch: float(trainer.callback_metrics[name])}
    targets = data.datasets["train"].targets
    majority = float(targets.bincount().max() / len(targets)) if targets.ndim == 1 else None
    steps, epochs = trainer.global_step, trainer.current_epoch
    ended_by = "max_steps" if steps == trainer.max_steps else "max_epochs" if epochs == trainer.max_epochs else None
    return Progress(steps, epochs, curves, majority, data.num_classes, best, ended_by)
