"""Training that ends at the first number that isn't finite, and says where it came from."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from sinkformer_pl.batch import Batch
from sinkformer_pl.errors import RunError

SHOWN = 3

SMALLEST_LOSS_SCALE = 1e-4
"""Of 16-mixed; below it (fairseq's limit, too) gradients overflow for another reason than their scale."""


class _Seen(NamedTuple):
    """What is kept of a batch until it is judged; tensors stay on their device."""

    number: int
    loss: Tensor
    samples: Tensor | None
    finite_inputs: Tensor | None
    finite_outputs: Tensor | None


class _Finding(NamedTuple):
    """What a process found; of several, the one that is nearest to the cause speaks."""

    distance: int
    text: str


class RequireFinite(pl.Callback):
    """Stop a training at the step whose loss or gradients aren't finite, before they change the weights.

    The `RunError` names epoch, step and batch, the parameters or samples at fault where they can be told from the
    others, and the last checkpoint, which stays as it is: one with weights that aren't finite is never written. All
    processes of a training stop at the same step, with the same message.

    Each optimizer step costs a pass over its gradients and one wait for the device, after the backward pass was
    queued; with several processes also the reduction of one number. Gradients under 16-mixed precision overflow as a
    matter of course, and the scaler leaves these steps out; they are an error once the scale has come down to
    `SMALLEST_LOSS_SCALE`.

    Validation, test and prediction go on, with a warning that names the samples whose outputs aren't finite. For names
    the batches have to be of type `Batch` and the data a `ClassificationData`; forward has to return (B, ...).
    """

    def __init__(self) -> None:
        self._batch: Any = None
        self._number = 0
        self._outputs: Tensor | None = None
        self._window: list[_Seen] = []
        self._evaluated: list[tuple[Tensor, Tensor]] = []
        self._hook: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watch what the module returns."""
        self._remove_hook()
        self._outputs, self._window, self._evaluated = None, [], []
        self._hook = pl_module.register_forward_hook(lambda module, inputs, output: self._look_at(output))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watch no longer."""
        self._remove_hook()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A batch begins."""
        self._batch, self._number, self._outputs = batch, batch_idx, None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep what is needed to judge the batch, without waiting for the device."""
        named = isinstance(self._batch, Batch)
        self._window.append(
            _Seen(
                self._number,
                loss.detach(),
                self._batch.index if named else None,
                _finite_rows(self._batch.inputs) if named else None,
                self._outputs,
            )
        )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Judge the batches since the last step, and their gradients.

        Raises:
            RunError: something isn't finite.
        """
        window, self._window = self._window, []
        gradients = self._gradients(trainer, optimizer)
        values = [seen.loss.float().reshape(()) for seen in window]
        if gradients:
            norm = get_total_norm(gradients)
            values.append((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float())
        if not values:
            return
        bad = torch.stack(values).isfinite().logical_not().any().int()
        several = dist.is_available() and dist.is_initialized()
        if several:
            # Not the strategy's own reduction, which also makes the processes wait for each other.
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if not bool(bad):
            return
        found = _find(trainer, pl_module, optimizer, window)
        if several:
            findings = [found] * trainer.world_size
            dist.all_gather_object(findings, found)
            found = min(filter(None, findings), key=lambda finding: finding.distance, default=None)
        if found is not None:
            raise RunError(
                f"epoch {trainer.current_epoch}, step {trainer.global_step}: {found.text}; training stopped before "
                f"this changed the weights. {_kept(trainer)}"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Let go of the batch."""
        self._batch = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let no checkpoint with broken weights come into being.

        Raises:
            RunError: a parameter that isn't finite, or a buffer with a NaN.
        """
        parameters = {name for name, _ in pl_module.named_parameters()}
        broken = [
            name
            for name, value in checkpoint["state_dict"].items()
            if isinstance(value, Tensor)
            and value.is_floating_point()
            # A buffer may hold an infinity on purpose, as additive masks do.
            and bool(value.isfinite().logical_not().any() if name in parameters else value.isnan().any())
        ]
        if broken:
            raise RunError(
                f"epoch {trainer.current_epoch}, step {trainer.global_step}: {_listed(broken)} not finite, so no "
                f"checkpoint is written; lower model.optimizer.lr. {_kept(trainer)}"
            )

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Keep which samples' outputs are finite."""
        self._keep(batch)

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Keep which samples' outputs are finite."""
        self._keep(batch)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Keep which samples' outputs are finite."""
        self._keep(batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of samples whose outputs aren't finite."""
        self._warn(trainer, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of samples whose outputs aren't finite."""
        self._warn(trainer, "test")

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of samples whose outputs aren't finite."""
        self._warn(trainer, "test")

    def _look_at(self, output: Any) -> None:
        # Under DDP the same hook also sees what the training step returns, a loss.
        if isinstance(output, Tensor) and output.ndim:
            self._outputs = _finite_rows(output.detach())

    def _keep(self, batch: Any) -> None:
        outputs, self._outputs = self._outputs, None
        if isinstance(batch, Batch) and outputs is not None:
            self._evaluated.append((batch.index, outputs))

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _gradients(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() > SMALLEST_LOSS_SCALE:
            return []
        return [parameter.grad for parameter in _parameters(optimizer) if parameter.grad is not None]

    def _warn(self, trainer: pl.Trainer, split: str) -> None:
        evaluated, self._evaluated = self._evaluated, []
        if not evaluated:
            return
        rows = torch.cat([finite for _, finite in evaluated])
        guilty = _not_finite(torch.cat([index for index, _ in evaluated]), rows)
        if guilty:
            warnings.warn(
                f"the outputs of {len(guilty)} of {len(rows)} {split} samples are not finite: "
                f"{_names(getattr(trainer, 'datamodule', None), split, guilty)}; don't trust the {split} metrics; "
                "repair or remove these samples",
                stacklevel=2,
            )


def _find(
    trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer, window: Sequence[_Seen]
) -> _Finding | None:
    """What this process has that isn't finite; None where only another has, or where a norm overflowed."""
    data = getattr(trainer, "datamodule", None)
    for seen in window:
        if not bool(seen.loss.isfinite()):
            return _of_loss(data, seen)
    names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
    broken = [
        names.get(id(parameter), "a parameter")
        for parameter in _parameters(optimizer)
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
    ]
    if not broken:
        return None
    batches = f"batch {window[-1].number}" if len(window) == 1 else f"the {len(window)} batches of this step"
    return _Finding(
        3,
        f"the gradients of {_listed(broken)} not finite, after finite losses of {batches}{_among(data, window)} "
        "(lower model.optimizer.lr, set trainer.gradient_clip_val, or find the operation by "
        "trainer.detect_anomaly=true)",
    )


def _of_loss(data: Any, seen: _Seen) -> _Finding:
    batch = f"batch {seen.number} has a loss of {float(seen.loss)}"
    guilty = _not_finite(seen.samples, seen.finite_inputs)
    if guilty:
        return _Finding(
            0, f"{batch}: the inputs of {_names(data, 'train', guilty)} are not finite (repair or remove them)"
        )
    guilty = _not_finite(seen.samples, seen.finite_outputs)
    # Statistics over the batch carry what is wrong with one sample to all.
    if guilty and seen.samples is not None and len(guilty) < len(seen.samples):
        remedy = "look at them, or lower model.optimizer.lr"
        return _Finding(1, f"{batch}: the outputs for {_names(data, 'train', guilty)} are not finite ({remedy})")
    return _Finding(2, f"{batch}{_among(data, [seen])} (lower model.optimizer.lr, or look at these samples)")


def _finite_rows(values: Tensor) -> Tensor:
    """(B,) bool: whether all that belongs to a sample is finite."""
    return values.isfinite().flatten(1).all(1) if values.ndim > 1 else values.isfinite()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _not_finite(samples: Tensor | None, finite: Tensor | None) -> list[int]:
    """The samples that aren't finite."""
    if samples is None or finite is None or len(samples) != len(finite):
        return []
    return samples[~finite].tolist()


def _among(data: Any, window: Sequence[_Seen]) -> str:
    indices = [index for seen in window if seen.samples is not None for index in seen.samples.tolist()]
    return f", of {len(indices)} samples ({_names(data, 'train', indices)})" if indices else ""


def _names(data: Any, split: str, indices: Sequence[int]) -> str:
    try:
        names = data.names(split)
    except (AttributeError, KeyError):  # No data module, or none of this package.
        names = None
    shown = ", ".join(str(names[index]) if names else f"sample {index}" for index in indices[:SHOWN])
    return shown + (f" and {len(indices) - SHOWN} more" if len(indices) > SHOWN else "")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more} {'are' if len(names) > 1 else 'is'}"


def _kept(trainer: pl.Trainer) -> str:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    paths = [path for callback in callbacks if (path := getattr(callback, "last_model_path", ""))]
    return f"The last good weights are in {paths[0]}" if paths else "No checkpoint was written before"
