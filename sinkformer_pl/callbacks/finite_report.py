"""Describe what of a training step isn't finite: the samples, the batch or the parameters."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
from torch import Tensor, nn

SHOWN = 3


class Seen(NamedTuple):
    """Parts of a batch that are kept until it is judged; tensors stay on their device."""

    number: int
    loss: Tensor
    samples: Tensor | None
    finite_inputs: Tensor | None
    finite_outputs: Tensor | None


class Step(NamedTuple):
    """An optimizer step, kept until it is judged; tensors stay on their device."""

    epoch: int
    number: int
    window: list[Seen]
    parameters: list[nn.Parameter]
    largest: Tensor | None
    """(parameters,): the largest magnitude in each gradient."""


class Finding(NamedTuple):
    """Finding of a process; of several, the one that is nearest to the cause speaks."""

    distance: int
    text: str


def find(trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> Finding | None:
    """Find what this process has that isn't finite; None where only another has."""
    data = getattr(trainer, "datamodule", None)
    for seen in step.window:
        if not bool(seen.loss.isfinite()):
            return _of_loss(data, seen)
    if step.largest is None or bool(step.largest.isfinite().all()):
        return None
    names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
    finite = step.largest.isfinite().tolist()
    broken = [
        names.get(id(parameter), "a parameter")
        for parameter, whole in zip(step.parameters, finite, strict=True)
        if not whole
    ]
    window = step.window
    batches = f"batch {window[-1].number}" if len(window) == 1 else f"the {len(window)} batches of this step"
    return Finding(
        3,
        f"the gradients of {listed(broken)} not finite, after finite losses of {batches}{_among(data, window)} "
        "(lower model.optimizer.lr, set trainer.gradient_clip_val, or find the operation by "
        "trainer.detect_anomaly=true)",
    )


def _of_loss(data: Any, seen: Seen) -> Finding:
    batch = f"batch {seen.number} has a loss of {float(seen.loss)}"
    guilty = not_finite(seen.samples, seen.finite_inputs)
    if guilty:
        return Finding(
            0, f"{batch}: the inputs of {names_of(data, 'train', guilty)} are not finite (repair or remove them)"
        )
    guilty = not_finite(seen.samples, seen.finite_outputs)
    # Statistics over the batch carry what is wrong with one sample to all.
    if guilty and seen.samples is not None and len(guilty) < len(seen.samples):
        remedy = "look at them, or lower model.optimizer.lr"
        return Finding(1, f"{batch}: the outputs for {names_of(data, 'train', guilty)} are not finite ({remedy})")
    return Finding(2, f"{batch}{_among(data, [seen])} (lower model.optimizer.lr, or look at these samples)")


def not_finite(samples: Tensor | None, finite: Tensor | None) -> list[int]:
    """Find the samples that aren't finite."""
    if samples is None or finite is None or len(samples) != len(finite):
        return []
    return samples[~finite].tolist()


def _among(data: Any, window: Sequence[Seen]) -> str:
    indices = [index for seen in window if seen.samples is not None for index in seen.samples.tolist()]
    return f", of {len(indices)} samples ({names_of(data, 'train', indices)})" if indices else ""


def names_of(data: Any, split: str, indices: Sequence[int]) -> str:
    """Return the names of some samples of a split; of more than `SHOWN` the first, and how many more."""
    try:
        names = data.names(split)
    except (AttributeError, KeyError):  # No data module, or none of this package.
        names = None
    shown = ", ".join(str(names[index]) if names else f"sample {index}" for index in indices[:SHOWN])
    return shown + (f" and {len(indices) - SHOWN} more" if len(indices) > SHOWN else "")


def listed(names: Sequence[str]) -> str:
    """Join names and the verb that fits their number."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more} {'are' if len(names) > 1 else 'is'}"


def kept(trainer: pl.Trainer) -> str:
    """Say where the last checkpoint is."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    paths = [path for callback in callbacks if (path := getattr(callback, "last_model_path", ""))]
    return f"The last good weights are in {paths[0]}" if paths else "No checkpoint was written before"
