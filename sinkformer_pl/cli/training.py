"""fit, validate, test and predict, on LightningCLI."""

import contextlib
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from jsonargparse import ArgumentError
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from sinkformer_pl.callbacks import RequireFinite
from sinkformer_pl.cli.arguments import Arguments
from sinkformer_pl.cli.beforehand import (
    require_batches,
    require_end,
    require_launched,
    require_metric,
    require_room,
    require_sensible,
    require_sensible_callbacks,
    stopped_early,
    try_samples,
)
from sinkformer_pl.cli.messages import condense, raise_with_remedy, root_cause
from sinkformer_pl.cli.parser import Parser, as_plain
from sinkformer_pl.cli.processes import first_to_fail, require_others
from sinkformer_pl.cli.quiet import quieten
from sinkformer_pl.cli.run_options import add_run_options, described, explain
from sinkformer_pl.cli.screen import say, say_what_came_out, say_what_runs
from sinkformer_pl.data import ClassificationData
from sinkformer_pl.errors import UserError
from sinkformer_pl.factories import with_defaults
from sinkformer_pl.normalizations import load_plugins
from sinkformer_pl.tasks import Classifier
from sinkformer_pl.training import lightning_state
from sinkformer_pl.training.best_checkpoint import BestCheckpoint
from sinkformer_pl.training.checkpoint_io import use_verified
from sinkformer_pl.training.checkpoint_match import require_classes, require_match, require_resumable, require_task
from sinkformer_pl.training.costs_csv import StepCosts
from sinkformer_pl.training.folder_lock import locked
from sinkformer_pl.training.last_checkpoint import LastCheckpoint
from sinkformer_pl.training.metrics_csv import MetricsCSV
from sinkformer_pl.training.predictions_csv import PredictionWriter
from sinkformer_pl.training.resume import ResumeState
from sinkformer_pl.training.run_folder import CHECKPOINTS, DEFAULT_ROOT, folder_for, local_folder, require_name
from sinkformer_pl.training.run_record import RunRecord
from sinkformer_pl.training.signals import Stopped, StopSignals


def run_training(argv: Sequence[str], cli: Callable[[Arguments, StopSignals], object] | None = None) -> None:
    """Run one of the four commands.

    Args:
        argv: the command and its arguments.
        cli: what to run in the place of `TrainingCLI`.

    Raises:
        UserError: the arguments, the data or the checkpoint are at fault.
        Stopped: a signal asked for it; a line has said so.
    """
    signals = StopSignals()
    try:
        with signals.handled():
            _run(argv, signals, cli or TrainingCLI)
    except Stopped as stopped:
        if first_to_fail():
            print(stopped.line, file=sys.stderr, flush=True)
        raise


def _run(argv: Sequence[str], signals: StopSignals, cli: Callable[[Arguments, StopSignals], object]) -> None:
    quieten()
    arguments = Arguments.of(argv)
    if "-h" not in arguments.flags and "--help" not in arguments.flags:
        _require_enough(arguments)
    # Plugins come first: a checkpoint or a flag may name their classes.
    load_plugins(arguments.plugins)
    arguments.load_checkpoint()
    if arguments.content is not None and arguments.checkpoint is not None:
        require_task(arguments.content, Classifier, arguments.checkpoint)
    load_plugins(arguments.plugins)
    cli(arguments, signals)


def _require_enough(arguments: Arguments) -> None:
    if arguments.command == "fit" and not (arguments.configs or arguments.flags):
        raise UserError("fit needs to know what to train: give --config FILE, such as configs/pointcloud.yaml")
    if arguments.command != "fit" and arguments.checkpoint is None:
        raise UserError(f"{arguments.command} needs the weights of a trained model: give --ckpt_path PATH")


class TrainingCLI(LightningCLI):
    """LightningCLI with a run folder, the arguments in the order of their precedence, and short messages."""

    def __init__(self, arguments: Arguments, signals: StopSignals) -> None:
        self.arguments = arguments
        self.signals = signals
        self.held = contextlib.ExitStack()
        super().__init__(
            Classifier,
            ClassificationData,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            # A line of ours says how large the model is.
            trainer_defaults={"default_root_dir": DEFAULT_ROOT, "enable_model_summary": False},
            parser_class=Parser,
            parser_kwargs={
                "allow_abbrev": False,
                arguments.command: {"allow_abbrev": False, **described(arguments.command)},
            },
            args=arguments.ordered(),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is ours beside trainer, model and data."""
        add_run_options(parser)
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Nothing: `Arguments` has put the checkpoint's hyper-parameters below the flags."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the ordered arguments."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise UserError(condense(str(error), ())) from None
        seed = self.config[self.arguments.command]["seed_everything"]
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything {seed}: give a whole number from 0 to 2**32 - 1")
        require_name(self.config[self.arguments.command]["name"])

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the command at hand: to build a parser for each would take seconds."""
        skipped = super().subcommands()[self.arguments.command]
        return {self.arguments.command: skipped | {"weights_only", "return_predictions"}}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        explain(parser, subcommand)
        return parser

    def before_instantiate_classes(self) -> None:
        """Let the task build its parts from plain data: one way, from here, from a checkpoint and from Python."""
        parts = self.config[self.arguments.command].model.as_dict()
        if "num_classes" in parts:
            raise UserError("model.num_classes can't be set: it follows from data.num_classes; leave it out")
        self.parser.add_instantiator(lambda cls, **kwargs: cls(**{**kwargs, **parts}), Classifier, prepend=True)

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; what a class refuses is the user's to mend."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
            raise UserError(" ".join(str(root_cause(error)).split("\n"))) from error
        if self.arguments.content is not None and self.arguments.checkpoint is not None:
            require_classes(self.arguments.content, self.datamodule.classes, self.arguments.checkpoint)
            require_match(self.arguments.content, self.model, self.arguments.checkpoint)
            # Lightning does so too, but not for data of another class than the run's.
            self.datamodule.restore(self.arguments.content)
            if self.arguments.command == "fit":
                require_resumable(self.arguments.content, self.model, self.arguments.checkpoint)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Add the run's folder, loggers and callbacks to what the user configured."""
        config = self._get(self.config_init, "trainer")
        chosen = _listed(config["callbacks"])
        require_sensible(config, self.arguments.command)
        require_sensible_callbacks(chosen)
        fitting = self.arguments.command == "fit"
        root = local_folder(config["default_root_dir"] or DEFAULT_ROOT)
        self.folder = folder_for(root, self._get(self.config, "name"), self._continued())
        self.goes_on = self.folder.is_dir()
        callbacks: list[pl.Callback] = [RunRecord(self.folder, self._record())]
        if self._get(self.config, "require_finite"):
            callbacks.append(RequireFinite())
        logger = config["logger"]
        if logger in (None, True):
            logger = self._loggers() if fitting else False
        if fitting and not config["fast_dev_run"]:
            callbacks.append(StepCosts(self.folder))
        if fitting and logger:
            callbacks.append(LearningRateMonitor())
        first: list[pl.Callback] = [ResumeState()]
        if fitting and config["enable_checkpointing"] is not False and not config["fast_dev_run"]:
            first.append(self._last_checkpoint())
            callbacks.append(self._best_checkpoint(validating=config["limit_val_batches"] != 0))
        if self.arguments.command == "predict":
            callbacks.append(PredictionWriter(self.folder))
        trainer = super().instantiate_trainer(logger=logger, callbacks=[*first, *chosen, *callbacks], **kwargs)
        require_launched(trainer)
        use_verified(trainer.strategy)
        lightning_state.ignore_signals(trainer)
        return trainer

    def before_fit(self) -> None:
        """Look at the data, and say what runs."""
        self._begin("training")
        self._see_what_is_left()

    def before_validate(self) -> None:
        """Look at the data, and say what runs."""
        self._begin("validating")

    def before_test(self) -> None:
        """Look at the data, and say what runs."""
        self._begin("testing")

    def before_predict(self) -> None:
        """Look at the data, and say what runs."""
        self._begin("predicting")

    def after_fit(self) -> None:
        """Say what came out, and where it is."""
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            say_what_came_out(self.folder)

    def after_validate(self) -> None:
        """Say where it is."""
        say(f"metrics: {self.folder / 'validate.json'}")

    def after_test(self) -> None:
        """Say where it is."""
        say(f"metrics and confusion matrix: {self.folder / 'test.json'}")

    def after_predict(self) -> None:
        """Say where it is."""
        say(f"predictions: {self.folder / 'predictions.csv'}")

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Stopped:
            if self.trainer.strategy.launcher is not None:
                self.trainer.strategy.launcher.kill(signal.SIGTERM)
            raise
        except RuntimeError as error:
            require_others(self.trainer)
            raise_with_remedy(error)
            raise
        finally:
            self.held.close()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["weights_only"] = True
        if subcommand == "predict":
            # The writer keeps them; a second copy in memory would serve nobody.
            kwargs["return_predictions"] = False
        return kwargs

    def _record(self) -> dict[str, Any]:
        """The resolved configuration as plain data; a run from it repeats this one, from any folder."""
        command = self.arguments.command
        resolved = as_plain(self.config[command].clone())
        config = yaml.safe_load(self._parser(command).dump(resolved, skip_none=False))
        config.pop("ckpt_path", None)
        arguments = config["data"].get("init_args", {})
        if "root" in arguments:
            arguments["root"] = str(Path(arguments["root"]).absolute())
        return config

    def _continued(self) -> Path | None:
        """The checkpoint whose folder this command goes on in: none when another network is trained from it."""
        content = self.arguments.content
        if (
            self.arguments.command == "fit"
            and content
            and with_defaults(content["hyper_parameters"]) != dict(self.model.hparams)
        ):
            return None
        return self.arguments.checkpoint

    def _loggers(self) -> list[Any]:
        # What was logged after the checkpoint is logged again.
        purge_step = self.arguments.content["global_step"] if self.goes_on and self.arguments.content else None
        tensorboard = TensorBoardLogger(
            self.folder, name="", version="", default_hp_metric=False, purge_step=purge_step
        )
        return [MetricsCSV(self.folder), tensorboard]

    def _best_checkpoint(self, *, validating: bool) -> BestCheckpoint:
        monitor = self._get(self.config, "monitor") if validating else None
        if monitor is not None:
            require_metric("monitor", monitor)
        return BestCheckpoint(self.folder / CHECKPOINTS, monitor)

    def _last_checkpoint(self) -> LastCheckpoint:
        path = self.folder / CHECKPOINTS / "last.ckpt"
        return LastCheckpoint(path, self.signals, every=self._get(self.config, "checkpoint_every"))

    def _see_what_is_left(self) -> None:
        """Say so if the checkpoint is already at the end."""
        if self.arguments.content is None:
            return
        epochs, steps = lightning_state.epochs_of(self.arguments.content), self.arguments.content["global_step"]
        most, most_steps = self.trainer.max_epochs, self.trainer.max_steps
        if most not in (None, -1) and epochs >= most:
            say(f"nothing to do: the checkpoint has {epochs} epochs; raise trainer.max_epochs, {most}, to train on")
        elif most_steps != -1 and steps >= most_steps:
            say(f"nothing to do: the checkpoint has {steps} steps; raise trainer.max_steps, {most_steps}, to train on")
        elif stopped_early(self.trainer, self.arguments.content):
            say("nothing to do: EarlyStopping has ended this training; leave it out to train on")
        else:
            return
        lightning_state.end_after(self.trainer, epochs)

    def _make_folder(self) -> None:
        """Make the run's folder; if another run was quicker, take the next."""
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=self.goes_on)
                return
            except FileExistsError:
                if not self.folder.is_dir():
                    raise
                self.trainer = self.instantiate_trainer()

    @rank_zero_only
    def _begin(self, doing: str) -> None:
        """Read the data before anything is written: what is wrong with them is then said first, and leaves no trace."""
        self.datamodule.trainer = self.trainer
        self.datamodule.prepare_data()
        self.datamodule.setup(self.arguments.command)
        require_batches(self.trainer, self.datamodule, self.arguments.command)
        if self.arguments.command == "fit":
            require_end(self.trainer, self.model)
        try_samples(self.model, self.datamodule, self.arguments.command)
        try:
            if self._keeps():
                require_room(self.folder)
                self._make_folder()
                if self.arguments.command == "fit":
                    refusal = f"{self.folder}: another process trains there; wait for its end, or end it"
                    self.held.enter_context(locked(self.folder / ".lock", refusal))
        except OSError as error:
            raise UserError(
                f"trainer.default_root_dir: can't write in the folder {self.folder} ({error.strerror}); give "
                "another, or make this one writable"
            ) from None
        kept = self.folder if self._keeps() else None
        say_what_runs(doing, self.model, self.datamodule, self.arguments.content, kept)

    def _keeps(self) -> bool:
        """Whether anything is written to the run's folder."""
        return not self.trainer.fast_dev_run  # type: ignore[attr-defined]


def _listed(callbacks: Any) -> list[pl.Callback]:
    return list(callbacks) if isinstance(callbacks, Sequence) else [] if callbacks is None else [callbacks]
