"""Run fit, validate, test or predict: build data, task and trainer, check them before anything is written, start."""

import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from sinkformer_pl.callbacks import RequireFinite
from sinkformer_pl.cli import callback_checks, preflight
from sinkformer_pl.cli.console import raise_with_remedy, say, say_what_came_out, say_what_runs
from sinkformer_pl.cli.help import print_asked_for
from sinkformer_pl.cli.processes import first_to_fail, require_others
from sinkformer_pl.cli.refusals import refusals_of_classes
from sinkformer_pl.cli.settings import Settings, read_settings
from sinkformer_pl.cli.validate import Spec, as_plain, built
from sinkformer_pl.cli.warning_filters import filter_warnings
from sinkformer_pl.data import ClassificationData
from sinkformer_pl.errors import UserError
from sinkformer_pl.tasks.initialization import Initialization, give_preprocessing, init_from
from sinkformer_pl.tasks.protocol import arguments_from, lowest_is_best, made_with, monitors_of
from sinkformer_pl.training import lightning_state
from sinkformer_pl.training.best_checkpoint import BestCheckpoint
from sinkformer_pl.training.checkpoint_io import use_verified
from sinkformer_pl.training.checkpoint_match import require_match, require_resumable
from sinkformer_pl.training.costs_csv import StepCosts
from sinkformer_pl.training.folder_lock import locked
from sinkformer_pl.training.last_checkpoint import LastCheckpoint
from sinkformer_pl.training.metrics_csv import MetricsCSV
from sinkformer_pl.training.predictions_csv import PredictionWriter
from sinkformer_pl.training.resume import ResumeState
from sinkformer_pl.training.run_folder import CHECKPOINTS, DEFAULT_ROOT, folder_for, local_folder, remove_unless_begun
from sinkformer_pl.training.run_record import RunRecord
from sinkformer_pl.training.signals import Stopped, StopSignals

DOING = {"fit": "training", "validate": "validating", "test": "testing", "predict": "predicting"}

WRITTEN = {
    "validate": "metrics: {}/validate.json",
    "test": "metrics and confusion matrix: {}/test.json",
    "predict": "predictions: {}/predictions.csv",
}
"""Results of each evaluation in the folder of its run."""


def train_or_evaluate(command: str, argv: Sequence[str]) -> None:
    """Train, evaluate or predict, and say where the results are.

    Args:
        command: "fit", "validate", "test" or "predict".
        argv: the arguments after it.

    Raises:
        UserError: the arguments, the data or the checkpoint are at fault.
        Stopped: a signal asked for it; a line has said so.
    """
    with handled_signals() as signals:
        if print_asked_for(command, argv):
            return
        run = Run.build(read_settings(command, argv), signals)
        run.execute()
        if command != "fit":
            say(WRITTEN[command].format(run.folder))
        elif run.keeps_files:
            say_what_came_out(run.folder, run.trainer, run.data)


@contextmanager
def handled_signals() -> Iterator[StopSignals]:
    """Handle signals during a command; say in a line that one has ended it.

    Raises:
        Stopped: a signal asked for it.
    """
    signals = StopSignals()
    try:
        with signals.handled():
            filter_warnings()
            yield signals
    except Stopped as stopped:
        if first_to_fail():
            print(stopped.line, file=sys.stderr, flush=True)
        raise


@dataclass
class Run:
    """Data, task and trainer of a command.

    Attributes:
        settings: the checked settings.
        signals: tell a training when to end.
        initialization: what was done by `init_from`, if anything.
        folder: of the run.
        resumes: whether the folder is there already.
    """

    settings: Settings
    signals: StopSignals
    data: pl.LightningDataModule
    model: Any  # a LightningModule, with attributes of its task
    record: dict[str, Any]
    initialization: Initialization | None = None
    trainer: pl.Trainer = field(init=False)
    folder: Path = field(init=False)
    resumes: bool = field(init=False)

    @classmethod
    def build(cls, settings: Settings, signals: StopSignals) -> "Run":
        """Make data, task and trainer; compare them with the checkpoint.

        Raises:
            UserError: a class refuses its arguments, or the checkpoint doesn't fit.
        """
        _seed(settings)
        with refusals_of_classes():
            data = settings.run["data"].build()
        if settings.content is not None and settings.checkpoint is not None and isinstance(data, ClassificationData):
            # Lightning does so too, but late, and not for data of another class than the run's.
            data.restore(settings.content, settings.checkpoint)
        with refusals_of_classes():
            model = _make_task(settings.run["model"], data)
        if settings.content is not None and settings.checkpoint is not None:
            require_match(settings.content, model, settings.checkpoint)
            if settings.command == "fit":
                require_resumable(settings.content, model, settings.checkpoint)
        elif given := give_preprocessing(model, data):
            say(f"taken over from {type(model.backbone).__name__} for the data: {', '.join(given)}")
        initialization = _initialize(settings.run, model, data) if settings.starts_from_weights else None
        record = settings.plain()
        if record["monitor"] is None:
            record["monitor"] = next(iter(monitors_of(model)), None)
        run = cls(settings, signals, data, model, record, initialization)
        with refusals_of_classes():
            run.make_trainer()
        return run

    @property
    def fitting(self) -> bool:
        """Tell whether it trains."""
        return self.settings.command == "fit"

    @property
    def keeps_files(self) -> bool:
        """Tell whether anything is written to the run's folder."""
        return not self.trainer.fast_dev_run  # type: ignore[attr-defined]

    def make_trainer(self) -> None:
        """Make the trainer, with the run's folder, loggers and callbacks beside what the user configured."""
        spec: Spec = self.settings.run["trainer"]
        given = {name: built(spec[name]) for name in spec.plain()}
        callbacks = given["callbacks"] or []
        chosen: list[pl.Callback] = callbacks if isinstance(callbacks, list) else [callbacks]
        preflight.require_sensible(given, self.settings.command)
        callback_checks.require_sensible_callbacks(chosen, self.model)
        root = local_folder(given["default_root_dir"] or DEFAULT_ROOT)
        self.folder = folder_for(root, self.record["name"], self._continued())
        self.resumes = self.folder.is_dir()
        if given["logger"] in (None, True):
            given["logger"] = self._loggers() if self.fitting else False
        first: list[pl.Callback] = [ResumeState()]
        last: list[pl.Callback] = [RunRecord(self.folder, self.record)]
        if self.settings.run["require_finite"]:
            last.append(RequireFinite())
        if self.fitting and not given["fast_dev_run"]:
            last.append(StepCosts(self.folder))
        if self.fitting and given["logger"] and not any(isinstance(c, LearningRateMonitor) for c in chosen):
            last.append(LearningRateMonitor())
        if self.fitting and given["enable_checkpointing"] is not False and not given["fast_dev_run"]:
            path = self.folder / CHECKPOINTS / "last.ckpt"
            first.append(LastCheckpoint(path, self.signals, every=self.settings.run["checkpoint_every"]))
            last.append(self._best_checkpoint(validating=given["limit_val_batches"] != 0))
        if self.settings.command == "predict":
            last.append(PredictionWriter(self.folder))
        given["callbacks"] = [*first, *chosen, *last]
        self.trainer = pl.Trainer(**given)
        preflight.require_launched(self.trainer)
        if self.fitting:
            callback_checks.require_place(self.trainer, chosen, self.model)
        use_verified(self.trainer.strategy)
        lightning_state.ignore_signals(self.trainer)

    @rank_zero_only
    def begin(self, doing: str, held: contextlib.ExitStack, *, keep: bool = True) -> None:
        """Read the data before anything is written: what is wrong with them is said first, and leaves no trace.

        Args:
            doing: what the command does, such as "training".
            held: keeps the lock of the folder.
            keep: whether the command writes to the run's folder.

        Raises:
            UserError: data that the task refuses, limits of nothing, no room to write.
        """
        keep = keep and self.keeps_files
        self.data.trainer = self.trainer
        self.data.prepare_data()
        self.data.setup(self.settings.command)
        if self.fitting and self.settings.content is not None and isinstance(self.data, ClassificationData):
            self.data.require_same_samples(self.settings.content, self.settings.checkpoint or "")
        preflight.require_batches(self.trainer, self.data, self.settings.command)
        if self.fitting:
            preflight.require_end(self.trainer, self.model)
        preflight.rehearse_normalizations(self.model)
        if isinstance(self.data, ClassificationData):
            preflight.try_samples(self.model, self.data, self.settings.command)
        if keep:
            with preflight.writing_in(self.folder):
                preflight.require_room(self.folder)
                new = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
                self._make_folder()
                if self.fitting:
                    held.callback(remove_unless_begun, self.folder, new)
                    refusal = f"{self.folder}: another process trains there; wait for its end, or end it"
                    held.enter_context(locked(self.folder / ".lock", refusal))
        say_what_runs(doing, self.model, self.data, self.settings.content, self.folder if keep else None)
        if self.initialization is not None:
            say(str(self.initialization))

    def execute(self) -> None:
        """Run the command to its end.

        Raises:
            Stopped: a signal asked for it.
            RunError: a known cause came up in its course.
        """
        command = self.settings.command
        with contextlib.ExitStack() as held:
            self.begin(DOING[command], held)
            more: dict[str, Any] = {}
            if command in ("validate", "test"):
                more["verbose"] = self.settings.run["verbose"]
            elif command == "predict":
                # The writer keeps them; a second copy in memory would serve nobody.
                more["return_predictions"] = False
            else:
                self._see_what_is_left()
            path = None if self.settings.checkpoint is None else str(self.settings.checkpoint)
            try:
                getattr(self.trainer, command)(
                    self.model, datamodule=self.data, ckpt_path=path, weights_only=True, **more
                )
            except Stopped:
                if self.trainer.strategy.launcher is not None:
                    self.trainer.strategy.launcher.kill(signal.SIGTERM)
                raise
            except (RuntimeError, ValueError) as error:
                if isinstance(error, RuntimeError):
                    require_others(self.trainer)
                raise_with_remedy(error)
                raise

    def _continued(self) -> Path | None:
        """Return the checkpoint whose folder the command continues: none when another network is trained from it."""
        content = self.settings.content
        if self.fitting and content and not made_with(content, self.model):
            return None
        return self.settings.checkpoint

    def _loggers(self) -> list[Logger]:
        # What was logged after the checkpoint is logged again.
        purge_step = self.settings.content["global_step"] if self.resumes and self.settings.content else None
        tensorboard = TensorBoardLogger(
            self.folder, name="", version="", default_hp_metric=False, purge_step=purge_step
        )
        return [MetricsCSV(self.folder), tensorboard]

    def _best_checkpoint(self, *, validating: bool) -> BestCheckpoint:
        monitor = self.record["monitor"] if validating else None
        if monitor is not None:
            callback_checks.require_metric("monitor", monitor, self.model)
        lowest = monitor is not None and lowest_is_best(self.model, monitor)
        return BestCheckpoint(self.folder / CHECKPOINTS, monitor, "min" if lowest else "max")

    def _see_what_is_left(self) -> None:
        """Say so if the checkpoint is already at the end."""
        if self.settings.content is None:
            return
        epochs, steps = lightning_state.epochs_of(self.settings.content), self.settings.content["global_step"]
        most, most_steps = self.trainer.max_epochs, self.trainer.max_steps
        if most not in (None, -1) and epochs >= most:
            say(f"nothing to do: the checkpoint has {epochs} epochs; raise trainer.max_epochs, {most}, to train on")
        elif most_steps != -1 and steps >= most_steps:
            say(f"nothing to do: the checkpoint has {steps} steps; raise trainer.max_steps, {most_steps}, to train on")
        elif preflight.stopped_early(self.trainer, self.settings.content):
            say("nothing to do: EarlyStopping has ended this training; leave it out to train on")
        else:
            return
        lightning_state.end_after(self.trainer, epochs)

    def _make_folder(self) -> None:
        """Make the run's folder; if another run was quicker, take the next."""
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=self.resumes)
                return
            except FileExistsError:
                if not self.folder.is_dir():
                    raise
                self.make_trainer()


def _seed(settings: Settings) -> None:
    seed = settings.run["seed_everything"]
    if seed is True:
        # A process that Lightning launched has the seed of the first.
        launched = "LOCAL_RANK" in os.environ and os.environ.get("PL_GLOBAL_SEED")
        seed = int(launched or secrets.randbelow(2**32))
    if seed is not False:
        settings.run = settings.run.with_argument("seed_everything", pl.seed_everything(seed, workers=True))


def _make_task(spec: Spec, data: pl.LightningDataModule) -> pl.LightningModule:
    """Let the task build its parts from plain data: one way, from here, from a checkpoint and from Python."""
    try:
        linked = arguments_from(data, spec.cls)
    except AttributeError as error:
        raise UserError(f"data {type(data).__name__}: {spec.cls.__name__} needs what it lacks: {error}") from None
    arguments = {name: as_plain(v) if isinstance(v, Spec) else v for name, v in spec.arguments.items()}
    return spec.cls(**{**arguments, **linked})


def _initialize(run: Spec, model: pl.LightningModule, data: pl.LightningDataModule) -> Initialization:
    return init_from(model, run["init_from"], only=run["init_only"] or (), strict=run["init_strict"], data=data)
