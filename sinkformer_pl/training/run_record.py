"""Write what a run leaves beside its weights: the configuration and the metrics."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.utilities import rank_zero_only
from typing_extensions import override

from sinkformer_pl.training.atomic_file import replacing
from sinkformer_pl.training.checkpoint_content import CONFIG_KEY, METRICS_KEY, Checkpoint
from sinkformer_pl.training.checkpoint_file import read_checkpoint
from sinkformer_pl.training.resume import RESUME_KEY
from sinkformer_pl.training.run_folder import CHECKPOINTS

FIT_RECORD = "fit.json"
"""It lies in the folder of a run whose training has come to its end."""


class RunRecord(pl.Callback):
    """Keep the resolved configuration in the run's folder and in every checkpoint, and the metrics of evaluations.

    Writes `config.yaml` when a fit starts; `fit.json` when it has come to its end (epochs, steps, validation metrics
    of the best checkpoint, and the epochs at which it went on from a checkpoint); `validate.json` or `test.json`
    (metrics, confusion matrix, checkpoint, normalization) when an evaluation by that command ends. A checkpoint also
    gets the validation metrics of its moment.

    Args:
        folder: the run's folder.
        config: the resolved configuration, plain data.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = dict(config)
        self.resumed: list[int] = []
        self._trained = False
        self._within = 0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"resumed": self.resumed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.resumed = list(state_dict["resumed"])

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._within = int(bool((checkpoint.get(RESUME_KEY) or {}).get("batch")))

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trained = True
        if trainer.ckpt_path is not None:
            self.resumed = [*self.resumed, trainer.current_epoch]
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            # What an earlier part of the run left would say that it is over.
            (self.folder / FIT_RECORD).unlink(missing_ok=True)
            self._write("config.yaml", yaml.safe_dump(self.config, sort_keys=False))

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fast_dev_run or trainer.interrupted:  # type: ignore[attr-defined]
            return
        if not self._trained and (self.folder / FIT_RECORD).is_file():
            return
        record = {
            "normalization": pl_module.hparams.get("normalization"),
            # Where nothing was left to train, an epoch that was cut short is among them, too.
            "epochs": trainer.current_epoch + (0 if self._trained else self._within),
            "steps": trainer.global_step,
            "resumed": self.resumed,
            "best": self._best(),
        }
        self._write(FIT_RECORD, json.dumps(record, indent=2))

    @override
    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Checkpoint) -> None:
        checkpoint[CONFIG_KEY] = self.config
        checkpoint[METRICS_KEY] = _numbers(trainer, "val/")

    def _best(self) -> dict[str, float]:
        """Return the validation metrics of the best checkpoint."""
        path = self.folder / CHECKPOINTS / "best.ckpt"
        # Strategies that divide the model write folders.
        return read_checkpoint(path)[METRICS_KEY] if path.is_file() else {}

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._write_metrics(trainer, pl_module, "val", "validate.json")

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write_metrics(trainer, pl_module, "test", "test.json")

    def _write_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, name: str) -> None:
        confusion = getattr(pl_module, "confusion", {}).get(stage)
        record = {
            "checkpoint": str(trainer.ckpt_path),
            "normalization": pl_module.hparams.get("normalization"),
            "metrics": _numbers(trainer, f"{stage}/"),
            "classes": _classes(trainer),
            "confusion": None if confusion is None else confusion.tolist(),
        }
        self._write(name, json.dumps(record, indent=2))

    @rank_zero_only
    def _write(self, name: str, text: str) -> None:
        with replacing(self.folder / name) as file:
            file.write(text)


def _numbers(trainer: pl.Trainer, prefix: str) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}


def _classes(trainer: pl.Trainer) -> list[str]:
    return list(getattr(getattr(trainer, "datamodule", None), "classes", ()))
