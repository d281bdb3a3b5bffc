"""Measure what attention does, epoch by epoch."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from sinkformer_pl.batch import Batch, as_batch, class_names
from sinkformer_pl.diagnostics import LayerAttention, attention_of, column_sums, learned_parameters, summary
from sinkformer_pl.diagnostics.measures import MEASURES
from sinkformer_pl.errors import UserError
from sinkformer_pl.training.csv_file import CSVFile, before_epoch
from sinkformer_pl.training.run_record import RunRecord

FILE = "attention.csv"
FOLDER = "attention"
COLUMN_SUMS = "column_sums.csv"
STEPS = 40
"""Number of steps between the quantiles in `column_sums.csv`, from 0 to 1."""
LOGGED = (
    "column_sum_min",
    "column_sum_max",
    "marginal_error",
    "relative_entropy",
    "effective_rank",
    "sink_share",
    "zero_share",
)


class AttentionDiagnostics(pl.Callback):
    """Measure the attention of every layer and head at the end of each training epoch, on the same few samples.

    They are the first of the validation split. The training is the same, to the last bit, as without: no random number
    is drawn, no mode is left changed. Under several processes the first one does all of it.

    In the run's folder it writes `attention.csv`, a row for each epoch, layer and head (`epoch`, `layer`, `head`, the
    measures of `sinkformer_pl.diagnostics.summary`, and what the normalization has learned: temperature, alpha, lam, s,
    and so on); `attention/column_sums.csv`, quantiles of the column sums of each layer; and when training ends,
    pictures in `attention/`, also shown by a TensorBoard logger. Loggers get means over the heads as
    `attention/MEASURE/LAYER`.

    Args:
        samples: how many samples.
        draw_every: epochs between pictures; None draws at the end of the training alone.

    Raises:
        UserError: a number out of range; at the start of a fit, a strategy that divides the model among processes, or
            data without a validation split.
    """

    def __init__(self, samples: int = 4, draw_every: int | None = None) -> None:
        for name, value in (("samples", samples), ("draw_every", 1 if draw_every is None else draw_every)):
            if value < 1:
                raise UserError(f"AttentionDiagnostics: {name} must be 1 or more, got {value}")
        self.samples = samples
        self.draw_every = draw_every
        self.folder: Path | None = None
        self._probe: Batch | None = None
        self._last: tuple[int, list[LayerAttention]] | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
            raise UserError(
                f"AttentionDiagnostics: under {type(strategy).__name__} no process has the whole model; use "
                "trainer.strategy ddp or one device, or leave the callback out"
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._probe = self._last = None
        if not trainer.is_global_zero:
            return
        with isolate_rng():
            self._probe = _first(trainer, self.samples)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            records = (callback.folder for callback in trainer.callbacks if isinstance(callback, RunRecord))  # type: ignore[attr-defined]
            self.folder = next(records, None) or Path(trainer.log_dir or trainer.default_root_dir)
            for path in (self.folder / FILE, self.folder / FOLDER / COLUMN_SUMS):
                CSVFile(path).keep(before_epoch(trainer.current_epoch))

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._probe is None:
            return
        with isolate_rng():
            layers = _attend(trainer, pl_module, self._probe)
            measured = {layer.name: summary(layer.weights, layer.mask) for layer in layers}
        # Not by the model's log, which takes longer for so many numbers than to measure them.
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": trainer.current_epoch, **_means(measured)}, step=trainer.global_step - 1)
        if self.folder is None or not layers:
            return
        epoch = trainer.current_epoch
        self._last = epoch, layers
        parameters = {layer.name: learned_parameters(layer.core) for layer in layers}
        rows = [
            {"epoch": epoch, "layer": layer, "head": head, **{n: _cell(values[head]) for n, values in numbers.items()}}
            for layer, measures in measured.items()
            if (numbers := {n: values.tolist() for n, values in {**measures, **parameters[layer]}.items()})
            for head in range(len(numbers[MEASURES[0]]))
        ]
        CSVFile(self.folder / FILE).append(rows)
        shares = torch.linspace(0, 1, STEPS + 1)
        quantiles = {layer.name: column_sums(layer.weights, layer.mask).float().nanquantile(shares) for layer in layers}
        names = [f"{share:g}" for share in shares.tolist()]
        CSVFile(self.folder / FOLDER / COLUMN_SUMS).append(
            [
                {"epoch": epoch, "layer": layer, **dict(zip(names, map(_cell, values.tolist()), strict=True))}
                for layer, values in quantiles.items()
            ]
        )
        if self.draw_every is not None and (epoch + 1) % self.draw_every == 0:
            self._draw(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, pl_module)
        self._probe = None

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._last is None or self.folder is None or self._probe is None:
            return
        # Matplotlib takes a second to import.
        from sinkformer_pl.diagnostics import pictures
        from sinkformer_pl.diagnostics.tokens import speller, tokens_of

        (epoch, layers), self._last = self._last, None
        when = f"after epoch {epoch}"
        with isolate_rng():
            inputs, mask = (None if part is None else part.to(pl_module.device) for part in self._probe[:2])
            assert inputs is not None
            data = getattr(trainer, "datamodule", None)
            names = getattr(data, "classes", None)
            targets = self._probe.target
            classes = list(map(str, targets.tolist())) if names is None else class_names(targets, names, none="none")
            tokens = tokens_of(pl_module, inputs, mask, speller(data))
            history = read_column_sums(self.folder / FOLDER / COLUMN_SUMS)
            maps_title = f"attention weights of a sample of class {classes[0]}\n{when}"
            figures = {
                f"maps_epoch_{epoch}": pictures.draw_maps(layers, 0, maps_title),
                f"inputs_epoch_{epoch}": pictures.draw_inputs(
                    layers, tokens, classes, f"attention that tokens receive, {when}"
                ),
                "column_sums": pictures.draw_column_sums(history, "column sums, epoch by epoch"),
            }
            for name, figure in figures.items():
                if figure is None:
                    continue
                picture = pictures.save(figure, self.folder / FOLDER / f"{name}.png")
                for logger in trainer.loggers:
                    if isinstance(logger, TensorBoardLogger):
                        tag = f"attention/{name.partition('_epoch')[0]}"
                        logger.experiment.add_image(tag, picture, trainer.global_step, dataformats="HWC")


def read_column_sums(path: Path) -> dict[str, dict[int, list[float]]]:
    """Read `column_sums.csv`: by layer and epoch, the quantiles of the column sums at even steps from 0 to 1."""
    history: dict[str, dict[int, list[float]]] = {}
    for epoch, layer, *values in map(dict.values, CSVFile(path).read()[1]):
        history.setdefault(layer, {})[int(epoch)] = [float(value) for value in values]
    return history


def _first(trainer: pl.Trainer, samples: int) -> Batch:
    """Take the first samples, the same for any number of processes; no process's loader is disturbed."""
    data = getattr(trainer, "datamodule", None)
    loader = data.val_dataloader() if data is not None else trainer.val_dataloaders
    dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if dataset is None or collate is None or not len(dataset):
        raise UserError("AttentionDiagnostics: the data has no validation split to look at; give one, or leave it out")
    several = getattr(trainer.lightning_module, "multi_label", False)
    return as_batch(collate([dataset[index] for index in range(min(samples, len(dataset)))]), multi_label=several)


def _attend(trainer: pl.Trainer, model: pl.LightningModule, probe: Batch) -> list[LayerAttention]:
    inputs, mask = (None if part is None else part.to(model.device) for part in probe[:2])
    # Under mixed precision the weights are float32, and so are the numbers here.
    with trainer.precision_plugin.forward_context(), torch.autocast(model.device.type, enabled=False):
        layers = attention_of(model, trainer.precision_plugin.convert_input(inputs), mask)
    return [
        layer._replace(
            weights=layer.weights.float().cpu(),
            mask=type(layer.mask)(*(None if part is None else part.cpu() for part in vars(layer.mask).values())),
        )
        for layer in layers
    ]


def _means(measured: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    means = {
        f"attention/{name}/{layer}": measures[name].nanmean().item()
        for layer, measures in measured.items()
        for name in LOGGED
    }
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


def _cell(value: float) -> str:
    return "" if value != value else f"{value:.6g}"
