"""Classification of whatever a backbone turns into features."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import Precision
from pytorch_lightning.utilities import GradClipAlgorithmType
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from sinkformer_pl.batch import Batch
from sinkformer_pl.class_weights import ClassWeights, from_data
from sinkformer_pl.errors import UserError
from sinkformer_pl.factories import as_factory, describe, plain
from sinkformer_pl.models.backbone import Backbone, BackboneFactory, features_of, require_width
from sinkformer_pl.normalizations.contract import AttentionNormalization, NormalizationFactory
from sinkformer_pl.parts import Patterns, as_list, matches
from sinkformer_pl.tasks.freezing import Frozen
from sinkformer_pl.tasks.initialization import give_preprocessing
from sinkformer_pl.tasks.layer_decay import LayerDecay
from sinkformer_pl.tasks.losses import CrossEntropy, Loss, LossFactory
from sinkformer_pl.tasks.named_metrics import as_specs, named_metrics
from sinkformer_pl.tasks.optimizers import OptimizerFactory, clips_by_itself, implementation, options_of
from sinkformer_pl.tasks.outputs import NetworkOutputs, Prediction, probabilities_of
from sinkformer_pl.tasks.parameter_groups import as_groups, grouped, require_members, trained_parameters, undecayed
from sinkformer_pl.tasks.plain_batches import labelled, unlabelled
from sinkformer_pl.tasks.protocol import saved_arguments
from sinkformer_pl.tasks.rate_plan import RatePlan
from sinkformer_pl.tasks.rates import ScheduledLR, show_metrics
from sinkformer_pl.tasks.schedules import Constant, ScheduleFactory
from sinkformer_pl.tasks.stage_metrics import StageMetrics
from sinkformer_pl.training.checkpoint_file import read_checkpoint
from sinkformer_pl.training.lightning_state import is_attached
from sinkformer_pl.training.step_count import share_of_step

PROGRESS_BAR = ("train/loss", "train/accuracy", "val/loss", "val/accuracy")


class Classifier(pl.LightningModule):
    """A backbone under a normalization, a linear head, a loss.

    Logs, over each epoch, `loss` and `accuracy` (top-1) as `train/...`, `val/...`, `test/...`; for val and test also
    `accuracy_macro`, the mean over the classes that have samples there; for test also `accuracy_class/NAME` for each
    of these. Label smoothing and class weights are in the loss of the training alone. `confusion["val"]` and
    `confusion["test"]` hold the confusion matrix (num_classes, num_classes) of the last evaluation, a row for each true
    class.

    Of multi-label data `accuracy` is the share of right decisions over samples and classes, each at a probability of
    one half; for val and test beside it `exact_match`, the share of samples all of whose decisions are right, and
    `f1_macro`, the mean over the classes that hold somewhere; for test `f1_class/NAME`. There is no confusion matrix.

    The arguments are kept as plain data in `hparams`: `Classifier.load_from_checkpoint(path)` needs nothing else and
    works with `weights_only=True`. It imports the classes that the checkpoint names.

    Args:
        backbone: makes the network; called with the normalization factory.
        normalization: makes the normalization of each attention layer.
        num_classes: number of classes; the command line takes it from the data.
        label_smoothing: share of the target spread over all classes, in [0, 1).
        optimizer: makes the optimizer from the parameters that need a gradient when the training starts.
        schedule: makes the learning-rate schedule, or one of PyTorch's schedulers for an optimizer.
        warmup: optimizer steps, or a text such as "2 epochs", over which the rate rises before the schedule begins.
        schedule_interval: whether PyTorch's scheduler steps after each optimizer step (the default) or each epoch.
        schedule_monitor: the metric that `ReduceLROnPlateau` looks at; "val/loss" by default.
        parameter_groups: parts with a rate or weight decay of their own, each {"parameters": `parts.Patterns`,
            "lr_scale": a factor on the rate, "weight_decay": a number}; see `parameter_groups.grouped`.
        no_weight_decay: patterns of the parameters that don't decay; by default `parameter_groups.undecayed`.
        layer_decay: the rate of a layer of the backbone as a share of that of the next, in (0, 1]; see `LayerDecay`.
        loss: makes the loss, one of `tasks.losses` or a `Loss` of the user's own.
        freeze: names of parts that aren't trained, such as "backbone.embed" or "backbone.blocks.0-3"
            (`parts.Patterns`); see `Frozen`.
        class_weights: weights of the classes in the training's loss, see `Loss.mean`: a list in the order of the
            classes, weights by class name (1 for the others), or "balanced", from the counts of the training samples:
            as scikit-learn's; of multi-label data negatives / positives.
        metrics: further metrics of validation and test, logged as `val/NAME` and `test/NAME`, see `named_metrics`:
            "F1Score, AUROC(average=weighted)", or a list.
        multi_label: whether a sample has any number of classes, so that targets are (B, num_classes) of 0 and 1; the
            command line takes it from the data.

    Raises:
        ValueError: a number out of range, here or in the network; a backbone without `out_dim`; a name in `freeze`
            without a match.
        TypeError: a factory that isn't a class, a `functools.partial` of one, or their saved form.
    """

    monitors: Sequence[str] = ("val/accuracy", "val/accuracy_macro", "val/loss", "train/accuracy", "train/loss")
    """Metrics that are logged each epoch and can choose a checkpoint; the first one does by default."""

    minimized: Sequence[str] = ()
    """Metrics that are best when lowest, beside losses."""

    undirected: Sequence[str] = ()
    """Metrics of which neither the lowest nor the highest is best."""

    from_data: ClassVar[Mapping[str, str]] = {"num_classes": "num_classes", "multi_label": "multi_label"}
    """Arguments that follow from the data."""

    before: ClassVar[Mapping[str, Any]] = {"no_weight_decay": []}
    """Arguments of checkpoints from before there were any, where that isn't the default."""

    def __init__(
        self,
        backbone: BackboneFactory,
        normalization: NormalizationFactory,
        num_classes: int,
        label_smoothing: float = 0.0,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        schedule: ScheduleFactory = Constant,
        warmup: int | str = 0,
        schedule_interval: Literal["step", "epoch"] | None = None,
        schedule_monitor: str | None = None,
        parameter_groups: Sequence[Mapping[str, Any]] = (),
        no_weight_decay: Sequence[str] | None = None,
        loss: LossFactory = CrossEntropy,
        freeze: Patterns = (),
        class_weights: ClassWeights | None = None,
        metrics: str | Sequence[Any] = (),
        multi_label: bool = False,
        layer_decay: float | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise UserError(f"num_classes must be at least 2, got {num_classes}")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        make_backbone = as_factory(backbone, Backbone)
        make_normalization = as_factory(normalization, AttentionNormalization)
        self._optimizer = as_factory(optimizer, Optimizer)
        make_loss = as_factory(loss, Loss)
        defaults = options_of(self._optimizer)
        self.rates = RatePlan(schedule, warmup, schedule_interval, schedule_monitor, defaults)
        groups = as_groups(parameter_groups)
        self.save_hyperparameters(
            {
                "backbone": describe(make_backbone),
                "normalization": describe(make_normalization),
                "num_classes": num_classes,
                "label_smoothing": label_smoothing,
                "optimizer": describe(self._optimizer),
                **self.rates.arguments,
                "parameter_groups": groups,
                "no_weight_decay": None if no_weight_decay is None else list(no_weight_decay),
                "loss": describe(make_loss),
                "freeze": as_list(freeze),
                "class_weights": plain(class_weights, "class_weights"),
                "metrics": as_specs(metrics),
                "multi_label": multi_label,
                "layer_decay": layer_decay,
            }
        )
        self.label_smoothing, self.multi_label = label_smoothing, multi_label
        self.backbone = make_backbone(make_normalization)
        require_width(self.backbone)
        for name, value in getattr(self.backbone, "saved_arguments", {}).items():
            self.hparams["backbone"]["init_args"][name] = plain(value, f"backbone.{name}")
        self.head = nn.Linear(self.backbone.out_dim, num_classes)
        # Behind the network, whose parameters come first in an optimizer's state.
        self.loss: Loss = make_loss()
        if label_smoothing and not self.loss.takes_label_smoothing:
            raise UserError(
                f"model.label_smoothing {label_smoothing}: {type(self.loss).__name__} has none; leave it out"
            )
        self._frozen = Frozen(self, freeze, "model.freeze")
        self._add_metrics()
        # What "balanced" and names stand for is known when a training starts.
        unknown = None if class_weights is None else torch.ones(num_classes)
        self.register_buffer("class_weights", unknown, persistent=False)
        if class_weights is not None and not isinstance(class_weights, str | Mapping):
            self.weigh_classes(None)
        self.confusion: dict[str, Tensor] = {}
        # Callbacks add to it: of the loss in training, the batch and its logits each returns the loss.
        self.adjust_loss: list[Callable[[Tensor, Batch, Tensor], Tensor]] = []
        self._undecayed = undecayed(self)
        require_members(self, groups, no_weight_decay or (), defaults)
        self._layers = None if layer_decay is None else LayerDecay.of(self, layer_decay)

    def _add_metrics(self) -> None:
        num_classes, multi_label = self.hparams["num_classes"], self.multi_label
        named = named_metrics(self.hparams["metrics"], num_classes, multi_label=multi_label)
        self.train_metrics = StageMetrics("train", num_classes, multi_label=multi_label)
        self.val_metrics = StageMetrics("val", num_classes, multi_label=multi_label, named=named)
        self.test_metrics = StageMetrics("test", num_classes, multi_label=multi_label, named=named)
        own = type(self).monitors
        if multi_label:
            own = ("val/f1_macro", "val/exact_match", *(name for name in own if name != "val/accuracy_macro"))
        self.monitors = (*own, *(f"val/{metric.name}" for metric in named))
        self.minimized = tuple(f"val/{metric.name}" for metric in named if metric.higher_is_better is False)
        self.undirected = tuple(f"val/{metric.name}" for metric in named if metric.higher_is_better is None)

    @override
    def train(self, mode: bool = True) -> "Classifier":
        """Set training mode, in which what is frozen stays in evaluation mode."""
        super().train(mode)
        self._frozen.evaluate()
        return self

    @classmethod
    @override
    def load_from_checkpoint(  # type: ignore[override]  # (Lightning's is a descriptor of its own.)
        cls, checkpoint_path: str | Path, map_location: Any = None, *, weights_only: bool | None = True, **kwargs: Any
    ) -> "Classifier":
        """Make the model of a checkpoint, whose bytes are checked first; its tensors and plain data alone are read.

        Args:
            checkpoint_path: a local file.
            map_location: as for `torch.load`.
            weights_only: False is refused.
            **kwargs: what else Lightning's method of this name takes: `strict`, or arguments of the class in place of
                those in the checkpoint.

        Raises:
            UserError: no such file, a damaged one, one with objects in it, or `weights_only=False`.
        """
        if weights_only is False:
            raise UserError(f"checkpoint {checkpoint_path}: weights_only=False could run code in it; leave it out")
        read_checkpoint(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, map_location, weights_only=True, **kwargs)

    @override
    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of inputs and the bool mask (B, N) of their real tokens; errors as of `outputs`."""
        return self.outputs(inputs, mask).logits

    def outputs(self, inputs: Tensor, mask: Tensor | None = None) -> NetworkOutputs:
        """Return the features that the head classifies beside the logits.

        Raises:
            UserError: features that aren't (B, out_dim).
        """
        features = features_of(self.backbone, inputs, mask)
        return NetworkOutputs(features, self.head(features))

    @override
    def setup(self, stage: str) -> None:
        # Before a strategy wraps the network, and flattens its parameters maybe.
        self._undecayed = undecayed(self)
        data = getattr(self.trainer, "datamodule", None)
        give_preprocessing(self, data if self.trainer.ckpt_path is None else None)
        if stage == "fit":
            self.weigh_classes(data)

    def weigh_classes(self, data: Any) -> None:
        """Look up what class weights by name, or "balanced", stand for.

        Args:
            data: a data module that is set up; its `classes` and `class_counts` are asked for.

        Raises:
            UserError: weights that don't fit the classes, or data that don't know theirs.
        """
        if (given := self.hparams["class_weights"]) is not None:
            weights = from_data(given, data, self.hparams["num_classes"], multi_label=self.multi_label)
            self.class_weights = weights.float().to(self.device)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = labelled(self, batch)
        logits = self(batch.inputs, batch.mask)
        loss = self.loss.mean(
            logits, batch.target, class_weights=self.class_weights, label_smoothing=self.label_smoothing
        )
        for adjust in self.adjust_loss:
            loss = adjust(loss, batch, logits)
        self.train_metrics.count(loss.detach(), logits.detach(), batch)
        return loss * (share_of_step(self.trainer, len(batch.target), batch_idx) if is_attached(self) else 1.0)

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(self.val_metrics, labelled(self, batch))

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(self.test_metrics, labelled(self, batch))

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Prediction:
        inputs, mask, _, index = batch = unlabelled(self, batch, batch_idx)
        logits = self(inputs, mask)[batch.counted]
        return Prediction(index[batch.counted], probabilities_of(logits, multi_label=self.multi_label))

    @override
    def on_train_epoch_start(self) -> None:
        self._frozen.hold()  # BackboneFinetuning has unfrozen all of the backbone.

    @override
    def on_train_epoch_end(self) -> None:
        self._log_epoch(self.train_metrics)
        show_metrics(self, "train")

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_epoch(self.val_metrics)
        show_metrics(self, "val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_epoch(self.test_metrics)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        self._frozen.hold()  # Finetuning callbacks leave batch norms unfrozen.
        parameters, patterns = trained_parameters(self), self.hparams["no_weight_decay"]
        exempt = self._undecayed if patterns is None else [name for name in parameters if matches(name, patterns)]
        groups = grouped(parameters, self.rates.defaults, self.hparams["parameter_groups"], exempt, self._layers)
        optimizer = self._optimizer(groups, **implementation(self.hparams["optimizer"], self.trainer))
        # The data of the training are set up by this.
        if not 0 <= self.trainer.estimated_stepping_batches < math.inf:
            self.rates.require_endless()
        scheduler = ScheduledLR(optimizer, self.rates, self.trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, which refuses fused optimizers under bf16-mixed precision without need."""
        if gradient_clip_val and clips_by_itself(self.trainer):
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(self.trainer.precision_plugin, optimizer, gradient_clip_val, algorithm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "hyper_parameters" in checkpoint:
            saved = saved_arguments(checkpoint, type(self))
            self.hparams.update({name: saved[name] for name in self.before})

    def _evaluate(self, metrics: StageMetrics, batch: Batch) -> None:
        logits = self(batch.inputs, batch.mask)
        # Any class will do for samples that aren't counted.
        metrics.count(self.loss(logits, batch.target.clamp_min(0)), logits, batch)

    def _log_epoch(self, metrics: StageMetrics) -> None:
        names = getattr(getattr(self.trainer, "datamodule", None), "classes", ())
        names = names or [str(label) for label in range(self.head.out_features)]
        for key, value in metrics.figures(names).items():
            name = f"{metrics.stage}/{key}"
            self.log(name, value, prog_bar=name in PROGRESS_BAR)
        if metrics.confusion_matrix is not None:
            self.confusion[metrics.stage] = metrics.confusion_matrix
