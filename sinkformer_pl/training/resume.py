"""Exact resume: random states and metrics of an epoch under way, kept in every checkpoint and restored from it."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from sinkformer_pl.errors import UserError
from sinkformer_pl.training import lightning_state
from sinkformer_pl.training.checkpoint_content import RESUME_KEY, Checkpoint

ORDER = (
    "data.seed", "data.batch_size", "the number of training samples", "the number of batches", "data.sampling",
)  # fmt: skip
"""Upon which the order of an epoch's samples depends."""


class ResumeState(pl.Callback):
    """Put the random states and the metrics of an epoch under way into every checkpoint, and take them from there.

    Of each process: the generators of PyTorch (CPU and its CUDA device), NumPy and Python, and what the module's
    torchmetrics have counted. What Lightning averages over an epoch by itself (`self.log(..., on_epoch=True)`) isn't
    kept: it starts over in an epoch that is resumed.

    Where a callback, such as GradientAccumulationScheduler, has changed `trainer.accumulate_grad_batches` as an epoch
    started, that is kept for the rest of the epoch, whose start isn't called again. So is which parameters need no
    gradient, where callbacks have frozen or unfrozen some since the start.

    It comes before other callbacks, since it mends the step that they log.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Any] | None = None
        self._loaded: dict[str, Any] | None = None
        self._position: dict[str, Any] = {"batch": 0}
        self._resumed = False
        self._parts = 1
        self._frozen: list[str] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._parts = trainer.accumulate_grad_batches

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._frozen = _frozen(pl_module)

    @override
    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Checkpoint) -> None:
        mine = self._kept or _states(pl_module)
        ranks = [mine] * trainer.world_size
        if dist.is_available() and dist.is_initialized():
            dist.all_gather_object(ranks, mine)
        batch = lightning_state.save_position(checkpoint, trainer)
        changed: dict[str, Any] = {}
        if trainer.accumulate_grad_batches != self._parts:
            changed["parts"] = trainer.accumulate_grad_batches
        if (frozen := _frozen(pl_module)) != self._frozen:
            changed["frozen"] = frozen
        if monitored := _monitored(trainer):
            changed["monitored"] = monitored
        checkpoint[RESUME_KEY] = {"batch": batch, **_order(trainer), **changed, "ranks": ranks}

    @override
    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Checkpoint) -> None:
        """Take over the state of this process, for when the training resumes.

        Raises:
            UserError: the checkpoint is from the middle of an epoch, and other processes shared that; or its weights
                are averages, and no callback averages them.
        """
        saved = checkpoint.get(RESUME_KEY)
        if trainer.state.fn != "fit" or saved is None:
            return
        if "averaging_state" in checkpoint and not any(isinstance(c, WeightAveraging) for c in _callbacks(trainer)):
            raise UserError(
                f"--ckpt_path {trainer.ckpt_path}: its weights are averages, and the callback that made them keeps the "
                "trained ones; resume with it, such as --trainer.callbacks+ EMA"
            )
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.state_key in checkpoint["callbacks"]:
                _follow(checkpoint["callbacks"][callback.state_key], Path(callback.dirpath or ""))
        ranks = saved["ranks"]
        if saved["batch"] and len(ranks) != trainer.world_size:
            raise UserError(
                f"--ckpt_path {trainer.ckpt_path}: it was written in the middle of an epoch by {len(ranks)} "
                f"process(es), and {trainer.world_size} can't resume there; use {len(ranks)}, or a checkpoint from the "
                "end of an epoch"
            )
        self._loaded = ranks[trainer.global_rank] if trainer.global_rank < len(ranks) else None
        self._position = {key: value for key, value in saved.items() if key != "ranks"}
        self._resumed = True

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare what the order of the samples depends on; freeze what was frozen.

        Raises:
            UserError: the checkpoint is from the middle of an epoch in another order, or of another length.
        """
        now, then = _order(trainer), self._position
        names = [name for name in ORDER if then.get(name) != now.get(name)]
        different = [f"{name} was {then.get(name)}, now {now.get(name)}" for name in names]
        if then["batch"] and different:
            raise UserError(
                f"--ckpt_path {trainer.ckpt_path}: it was written after batch {then['batch']} of an epoch in which "
                f"{', '.join(different)}; keep the data as they were, or use a checkpoint from the end of an epoch"
            )

        if "frozen" in then:
            for name, parameter in pl_module.named_parameters():
                parameter.requires_grad_(name not in then["frozen"])

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._kept = None
        if "parts" in self._position:
            # A callback that changes it does so at each start of an epoch.
            trainer.accumulate_grad_batches = self._parts
            self._position = {"batch": 0}

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        if self._resumed:
            self._resume_parts(trainer)
            lightning_state.correct_counts_at_batch(trainer, pl_module)
            self._resumed = False
        self._restore(pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            if self._resumed:
                self._resume_parts(trainer)
                lightning_state.correct_counts_at_validation(trainer, pl_module)
            self._restore(pl_module)
            self._kept = _states(pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._kept = None

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore(pl_module)
        if lightning_state.ends_within_epoch(trainer):
            self._kept = _states(pl_module)

    def _resume_parts(self, trainer: pl.Trainer) -> None:
        if self._position["batch"] and "parts" in self._position:
            trainer.accumulate_grad_batches = self._position["parts"]

    def _restore(self, module: pl.LightningModule) -> None:
        if self._loaded is not None:
            _set_random_state(self._loaded["random"], module.device)
            _set_counts(self._loaded["metrics"], module)
            self._loaded = None


def _monitored(trainer: pl.Trainer) -> dict[str, float]:
    """Return what the callbacks of early stopping look at, as it is now."""
    stoppers = [callback for callback in _callbacks(trainer) if isinstance(callback, EarlyStopping)]
    found = trainer.callback_metrics
    return {stopper.monitor: float(found[stopper.monitor]) for stopper in stoppers if stopper.monitor in found}


def _callbacks(trainer: pl.Trainer) -> Sequence[pl.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _frozen(module: pl.LightningModule) -> list[str]:
    return [name for name, parameter in module.named_parameters() if not parameter.requires_grad]


def _order(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what the order of an epoch's samples depends on."""
    data: Any = getattr(trainer, "datamodule", None)
    samples = len(data.datasets["train"]) if getattr(data, "datasets", None) else None
    arguments = [getattr(data, name, None) for name in ("seed", "batch_size")]
    order = dict(zip(ORDER, [*arguments, samples, trainer.num_training_batches], strict=False))
    # Not the default, which checkpoints don't know.
    return order if getattr(data, "sampling", None) is None else {**order, ORDER[-1]: data.sampling}


def _follow(state: dict[str, Any], folder: Path) -> None:
    """Let the state of a ModelCheckpoint name files where they lie now; else a moved run would forget its best."""

    def moved(path: str) -> str:
        return str(folder / Path(path).name)

    if state["best_model_path"] and Path(moved(state["best_model_path"])).is_file():
        state["dirpath"] = str(folder)
        state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[name] = moved(state[name]) if state[name] else ""


def _states(module: pl.LightningModule) -> dict[str, Any]:
    return {"random": _random_state(module.device), "metrics": _counts(module)}


def _random_state(device: torch.device) -> dict[str, Any]:
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        "torch": torch.get_rng_state(),
        # As plain data and tensors, which can be loaded without running code.
        "numpy": (torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached),
        "python": random.getstate(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _counts(module: pl.LightningModule) -> dict[str, Any]:
    """Return what each metric has counted, if anything."""
    return {
        name: {"updates": metric.update_count, "state": _moved(metric.metric_state, "cpu")}
        for name, metric in _metrics(module)
        if metric.update_count
    }


def _set_counts(counts: dict[str, Any], module: pl.LightningModule) -> None:
    for name, metric in _metrics(module):
        if name in counts:
            state = _moved(counts[name]["state"], metric.device)
            lightning_state.set_metric_state(metric, state, counts[name]["updates"])


def _metrics(module: pl.LightningModule) -> list[tuple[str, Metric]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, Metric)]


def _moved(state: dict[str, Any], device: str | torch.device) -> dict[str, Any]:
    """Copy a state to a device; it is a tensor or a list of them."""

    def copy(value: Tensor) -> Tensor:
        return value.detach().to(device, copy=True)

    return {key: [copy(v) for v in value] if isinstance(value, list) else copy(value) for key, value in state.items()}
