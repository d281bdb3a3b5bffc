"""Training that ends at the first number that isn't finite, and says where it came from."""

import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sinkformer_pl.batch import Batch
from sinkformer_pl.callbacks.finite_report import Seen, Step, find, kept, listed, names_of, not_finite
from sinkformer_pl.errors import RunError, UserError
from sinkformer_pl.training.checkpoint_content import Checkpoint
from sinkformer_pl.training.delayed import DELAY, Delayed

SMALLEST_LOSS_SCALE = 1e-4
"""Of 16-mixed; below it (fairseq's limit, too) gradients overflow for another reason than their scale."""


class RequireFinite(pl.Callback):
    """Stop a training at the step whose loss or gradients aren't finite, before they change the weights.

    The `RunError` names epoch, step and batch, the parameters or samples at fault where they can be told from the
    others, and the last checkpoint, which stays as it is: one with weights that aren't finite is never written. All
    processes of a training stop at the same step, with the same message.

    Each optimizer step costs a pass over its gradients and, with several processes, the reduction of one number. On a
    GPU under a fused optimizer the device itself leaves out the step, and all that follow it; the message comes at most
    `delay` steps later, and before a checkpoint is written, before a validation and at the end of an epoch. Elsewhere
    the host waits for the device at each step, after the backward pass was queued, and the message comes at once.
    Gradients under 16-mixed precision overflow as a matter of course, and the scaler leaves these steps out; they are
    an error once the scale has come down to `SMALLEST_LOSS_SCALE`.

    Validation, test and prediction go on, with a warning that names the samples whose outputs aren't finite. For names
    the batches have to be of type `Batch` and the data a `ClassificationData`; forward has to return (B, ...).

    Args:
        delay: steps that the message may come late under an optimizer that can leave out a step on the device, that is
            a fused one; 0 waits at each step. None is `DELAY` on a GPU and 0 elsewhere.
    """

    def __init__(self, delay: int | None = None) -> None:
        if delay is not None and delay < 0:
            raise UserError(f"RequireFinite.delay is {delay}: give 0 or more steps, or null")
        self.delay = delay
        self._batch: Any = None
        self._number = 0
        self._outputs: Tensor | None = None
        self._window: list[Seen] = []
        self._pending: Delayed[Step] = Delayed()
        self._broken: Tensor | None = None
        self._evaluated: list[tuple[Tensor, Tensor]] = []
        self._hook: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Watch what the module returns."""
        self._remove_hook()
        self._outputs, self._window, self._evaluated = None, [], []
        self._hook = pl_module.register_forward_hook(lambda module, inputs, output: self._look_at(output))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching."""
        self._remove_hook()
        self._let_steps_through(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take up a batch."""
        self._batch, self._number, self._outputs = batch, batch_idx, None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep what is needed to judge the batch, without waiting for the device."""
        named = isinstance(self._batch, Batch)
        self._window.append(
            Seen(
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
            RunError: something isn't finite, of this step or of one `delay` steps before.
        """
        window, self._window = self._window, []
        parameters = self._judged(trainer, optimizer)
        step = Step(trainer.current_epoch, trainer.global_step, window, parameters, _largest(parameters))
        values = [seen.loss.reshape(1) for seen in window]
        if step.largest is not None:
            values.append(step.largest)
        if not values:
            return
        broken = torch.stack([value.isfinite().all() for value in values]).all().logical_not().float()
        if _several():
            # Not the strategy's own reduction, which also makes the processes wait for each other.
            dist.all_reduce(broken, op=dist.ReduceOp.MAX)
        if (delay := self._delay(trainer, optimizer)) == 0:
            self._settle(trainer, pl_module)
            if bool(broken):
                _stop(trainer, pl_module, step)
            return
        # Later steps would go on from the weights before this one, which no checkpoint must hold as theirs.
        self._broken = broken if self._broken is None else torch.maximum(self._broken, broken)
        optimizer.found_inf = self._broken  # type: ignore[attr-defined]
        self._pending.put(broken, step)
        self._settle(trainer, pl_module, delay)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read what is pending.

        Raises:
            RunError: a step's numbers aren't finite.
        """
        self._settle(trainer, pl_module)

    on_train_epoch_end = on_validation_start

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Let go of the batch."""
        self._batch = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Checkpoint) -> None:
        """Let no checkpoint with broken weights come into being, nor one after a step that was left out.

        Raises:
            RunError: a parameter that isn't finite, or a buffer with a NaN; a step's numbers that aren't.
        """
        self._settle(trainer, pl_module)
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
                f"epoch {trainer.current_epoch}, step {trainer.global_step}: {listed(broken)} not finite, so no "
                f"checkpoint is written; lower model.optimizer.lr. {kept(trainer)}"
            )

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        """Keep which samples' outputs are finite."""
        finite, self._outputs = self._outputs, None
        if isinstance(batch, Batch) and finite is not None:
            self._evaluated.append((batch.index, finite))

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of samples whose outputs aren't finite."""
        evaluated, self._evaluated = self._evaluated, []
        if not evaluated:
            return
        split = "test" if trainer.testing or trainer.predicting else "val"
        rows = torch.cat([finite for _, finite in evaluated])
        guilty = not_finite(torch.cat([index for index, _ in evaluated]), rows)
        if guilty:
            warnings.warn(
                f"the outputs of {len(guilty)} of {len(rows)} {split} samples are not finite: "
                f"{names_of(getattr(trainer, 'datamodule', None), split, guilty)}; don't trust the {split} metrics; "
                "repair or remove these samples",
                stacklevel=2,
            )

    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def _look_at(self, output: Any) -> None:
        # Under DDP the same hook also sees what the training step returns, a loss.
        if isinstance(output, Tensor) and output.ndim:
            self._outputs = _finite_rows(output.detach())

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _judged(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        """Return the parameters whose gradients are to be finite."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() > SMALLEST_LOSS_SCALE:
            return []
        return [p for p in _parameters(optimizer) if p.grad is not None and p.grad.numel()]

    def _delay(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> int:
        """Return how many steps late the judgement of a step may be read."""
        if getattr(trainer.precision_plugin, "scaler", None) is not None or not _leaves_out_steps(optimizer):
            return 0
        if self.delay is None:
            return DELAY if trainer.strategy.root_device.type == "cuda" else 0
        return self.delay

    def _settle(self, trainer: pl.Trainer, pl_module: pl.LightningModule, delay: int = 0) -> None:
        """Read the judgement of all steps but the last `delay`."""
        for broken, step in self._pending.take(delay):
            if bool(broken):
                self._pending.clear()
                _stop(trainer, pl_module, step)

    def _let_steps_through(self, trainer: pl.Trainer) -> None:
        if self._broken is not None:
            for optimizer in trainer.optimizers:
                vars(optimizer).pop("found_inf", None)
        self._broken = None
        self._pending.clear()


def _stop(trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> NoReturn:
    """End the training, on every process, for what any of them found in a step."""
    found = find(trainer, pl_module, step)
    if _several():
        findings = [found] * trainer.world_size
        dist.all_gather_object(findings, found)
        found = min(filter(None, findings), key=lambda finding: finding.distance)
    assert found is not None
    raise RunError(
        f"epoch {step.epoch}, step {step.number}: {found.text}; training stopped before this changed the weights. "
        f"{kept(trainer)}"
    )


def _finite_rows(values: Tensor) -> Tensor:
    """Tell of each sample, (B,) bool, whether all that belongs to it is finite."""
    return values.isfinite().flatten(1).all(1) if values.ndim > 1 else values.isfinite()


def _largest(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """Compute the largest magnitude in each gradient, (parameters,), finite if all of it is; None without any."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return None
    norms = torch._foreach_norm(gradients, float("inf"))
    largest = torch.stack([norm.to(norms[0].device) for norm in norms])
    # Of gradients that are divided over processes.
    return largest.full_tensor() if hasattr(largest, "full_tensor") else largest


def _leaves_out_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether an optimizer heeds `found_inf`, by which PyTorch's loss scaling skips steps on the device."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    divided = any(hasattr(parameter, "full_tensor") for parameter in _parameters(optimizer))
    return fused and getattr(optimizer, "_step_supports_amp_scaling", False) and not divided


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
