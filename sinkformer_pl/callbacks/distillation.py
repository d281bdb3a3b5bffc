"""Teach a network what a network under softmax does, before it learns the task."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the name that PyTorch's own documentation uses)
from typing_extensions import override

from sinkformer_pl.batch import Batch
from sinkformer_pl.errors import UserError
from sinkformer_pl.models.attention_core import AttentionCore
from sinkformer_pl.normalizations.softmax import Softmax
from sinkformer_pl.training.step_count import read_length, steps_of

ORIGINAL = "original"


class Distillation(pl.Callback):
    """Match a teacher over the first steps of a training, then train on the task alone.

    The loss in that time is a sum, each term times its weight: of the logits the Kullback-Leibler divergence from the
    teacher's at a temperature, times its square (of multi-label data that of each class); of features and of attention
    outputs the mean squared difference over the teacher's mean square, that of attention for real queries and as a mean
    over the layers; of the task its own loss. The teacher is in evaluation mode and isn't trained.

    A checkpoint of that time holds the teacher "original", from which a training resumes.

    Args:
        teacher: "original", the network as it is when the training starts, under softmax in all its attention; or the
            path of a checkpoint of the same task, whose attention stays as it is.
        over: optimizer steps, or a text such as "2 epochs", after which the task's loss alone is left.
        logits: weight of the logits. Those of a new head say nothing.
        features: weight of what the backbone gives the head.
        attention: weight of the outputs of each `AttentionCore`; the teacher has the same layers then.
        task: weight of the task's loss in that time.
        temperature: divides the logits of both.

    Raises:
        UserError: an argument out of range; at the start of a fit, a task without `adjust_loss`, a teacher that doesn't
            fit, or a training that is resumed without its teacher.
    """

    def __init__(
        self,
        teacher: str = ORIGINAL,
        over: int | str = "1 epoch",
        logits: float = 1.0,
        features: float = 0.0,
        attention: float = 0.0,
        task: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        self.teacher = teacher
        self.weights = {"logits": logits, "features": features, "attention": attention, "task": task}
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise UserError(f"Distillation.{name} {weight}: a weight is a number of at least 0")
        if not any(weight for name, weight in self.weights.items() if name != "task"):
            raise UserError("Distillation: nothing of the teacher is matched; set logits, features or attention")
        if not 0 < temperature < math.inf:
            raise UserError(f"Distillation.temperature {temperature}: give a positive number")
        self.temperature = temperature
        self._length = read_length(over, "Distillation.over")
        self._steps = 0
        self._network: pl.LightningModule | None = None
        self._restored: dict[str, Any] | None = None
        self._hooks: list[Any] = []
        self._student = Captured()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(getattr(pl_module, "adjust_loss", None), list):
            raise UserError(
                f"Distillation: {type(pl_module).__name__} has no list adjust_loss, by which a callback changes its "
                "loss; use Classifier, or leave the callback out"
            )
        # Before the weights of a training that is resumed are loaded, and before a strategy wraps the network.
        with isolate_rng():
            if self.teacher == ORIGINAL:
                self._network = under_softmax(pl_module)
            else:
                self._network = type(pl_module).load_from_checkpoint(self.teacher, map_location="cpu")
        self._network.eval().requires_grad_(False)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps = steps_of(trainer, self._length, "Distillation.over")
        if trainer.global_step >= self._steps:
            self._network = None
            return
        network = self._network
        assert network is not None
        if self.teacher == ORIGINAL and trainer.global_step:
            if self._restored is None:
                raise UserError(
                    f"Distillation: the checkpoint {trainer.ckpt_path} has no teacher, since the callback is new; give "
                    "the path of one, --trainer.callbacks.teacher PATH"
                )
            network.load_state_dict(self._restored)
        self._restored = None
        like = next(pl_module.parameters())
        network.to(like.device, like.dtype)
        if self.weights["attention"]:
            _require_same_layers(pl_module, network)
        self._hooks = self._student.listen(pl_module, self.weights)
        adjust: Any = pl_module.adjust_loss
        adjust.append(self._loss)

    def _loss(self, loss: Tensor, batch: Batch, logits: Tensor) -> Tensor:
        """Return the loss of a training step that is given that of the task."""
        network = self._network
        if network is None:
            return loss
        with torch.no_grad(), listening(network, self.weights) as teacher:
            wanted = network(batch.inputs, batch.mask)
        total = self.weights["task"] * loss
        if self.weights["logits"]:
            _require_shape(wanted, logits, "logits")
            multi_label = batch.target.ndim == 2
            total = total + self.weights["logits"] * divergence(logits, wanted, self.temperature, multi_label)
        if self.weights["features"]:
            _require_shape(teacher.features, self._student.features, "features")
            total = total + self.weights["features"] * difference(self._student.features, teacher.features)
        if self.weights["attention"]:
            pairs = [(self._student.attention[name], teacher.attention[name][0]) for name in teacher.attention]
            terms = [difference(output, other, queries) for (output, queries), other in pairs]
            total = total + self.weights["attention"] * torch.stack(terms).mean()
        self._student.forget()
        return total

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if self._network is not None and trainer.global_step >= self._steps:
            self._end(pl_module)
            self._network = None

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end(pl_module)

    def _end(self, pl_module: pl.LightningModule) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        adjust: Any = getattr(pl_module, "adjust_loss", [])
        if self._loss in adjust:
            adjust.remove(self._loss)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._network is None or self.teacher != ORIGINAL:
            return {}
        return {"teacher": self._network.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict.get("teacher")


class Captured:
    """Keep the features and attention outputs of the last forward pass of a network.

    Attributes:
        features: what its backbone returned.
        attention: by name of each `AttentionCore` its output (B, H, Q, Dv), and its real queries (B, Q) or None.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Drop the tensors, which hold a graph."""
        self.features = torch.empty(0)
        self.attention: dict[str, tuple[Tensor, Tensor | None]] = {}

    def listen(self, network: pl.LightningModule, weights: dict[str, float]) -> list[Any]:
        """Register the hooks for what has a weight, and return them."""
        hooks = []
        if weights["features"]:
            backbone: Any = network.backbone
            hooks.append(backbone.register_forward_hook(self._keep_features))
        if weights["attention"]:
            for name, core in _cores(network).items():
                hooks.append(core.register_forward_hook(self._keeper(name), with_kwargs=True))
        return hooks

    def _keep_features(self, _: nn.Module, inputs: Any, output: Tensor) -> None:
        self.features = output

    def _keeper(self, name: str) -> Any:
        def keep(core: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
            mask = inputs[3] if len(inputs) > 3 else named.get("mask")
            self.attention[name] = output, None if mask is None else mask.query

        return keep


@contextmanager
def listening(network: pl.LightningModule, weights: dict[str, float]) -> Iterator[Captured]:
    """Capture what a network computes within."""
    captured = Captured()
    hooks = captured.listen(network, weights)
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


def under_softmax(network: pl.LightningModule) -> pl.LightningModule:
    """Copy a network, and give all its attention softmax."""
    network = copy.deepcopy(network)
    for core in _cores(network).values():
        core.normalization, core.class_mass = Softmax(), None
    return network


def divergence(logits: Tensor, teacher: Tensor, temperature: float, multi_label: bool) -> Tensor:
    """Compute the mean Kullback-Leibler divergence from the teacher, times the squared temperature.

    Args:
        logits: (B, C).
        teacher: (B, C).
        temperature: divides both.
        multi_label: whether each class stands alone; then the mean is over the classes, too.
    """
    ours, wanted = logits.float() / temperature, teacher.float() / temperature
    if multi_label:
        shares = wanted.sigmoid()
        apart = F.binary_cross_entropy_with_logits(ours, shares) - F.binary_cross_entropy_with_logits(wanted, shares)
    else:
        apart = F.kl_div(ours.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
    return apart * temperature**2


def difference(output: Tensor, teacher: Tensor, queries: Tensor | None = None) -> Tensor:
    """Compute the mean squared difference over the teacher's mean square; of (B, H, Q, D) at real queries (B, Q)."""
    output, teacher = output.float(), teacher.float()
    if queries is not None:
        real = queries[:, None, :, None]
        output, teacher = output.where(real, 0.0), teacher.where(real, 0.0)
    return (output - teacher).square().sum() / teacher.square().sum().clamp(min=torch.finfo(teacher.dtype).tiny)


def _cores(network: nn.Module) -> dict[str, AttentionCore]:
    return {name: module for name, module in network.named_modules() if isinstance(module, AttentionCore)}


def _require_same_layers(network: nn.Module, teacher: nn.Module) -> None:
    ours, theirs = ({name: core.num_heads for name, core in _cores(n).items()} for n in (network, teacher))
    if ours != theirs or not ours:
        raise UserError(
            f"Distillation.attention: {len(ours)} layers of attention, and the teacher has {len(theirs)}, which must "
            "be the same by name and heads, and one or more; set it to 0, or give another teacher"
        )


def _require_shape(teacher: Tensor, ours: Tensor, name: str) -> None:
    if teacher.shape != ours.shape:
        raise UserError(
            f"Distillation.{name}: of shape {tuple(ours.shape)}, and the teacher's are {tuple(teacher.shape)}; set it "
            "to 0, or give another teacher"
        )
