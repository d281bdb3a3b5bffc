"""Settings of fit, validate, test and predict: their layers, lowest first, and what a checkpoint brings along.

Defaults < what a checkpoint remembers of its run < YAML files < the checkpoint's hyper-parameters < flags.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl

# Classes are found by their names once they are imported.
import sinkformer_pl.backbones
import sinkformer_pl.callbacks
import sinkformer_pl.data
import sinkformer_pl.models  # noqa: F401
from sinkformer_pl.cli.layers import (
    Layers,
    as_spec,
    lookup,
    module_names,
    read_flags,
    read_yaml,
)
from sinkformer_pl.cli.signatures import FIXED
from sinkformer_pl.cli.validate import Spec, find_class, validate
from sinkformer_pl.errors import UserError
from sinkformer_pl.factories import same_class
from sinkformer_pl.normalizations import load_plugins
from sinkformer_pl.tasks import Classifier
from sinkformer_pl.tasks.protocol import saved_arguments
from sinkformer_pl.training.checkpoint_content import CONFIG_KEY, learnt_from
from sinkformer_pl.training.checkpoint_file import read_checkpoint
from sinkformer_pl.training.checkpoint_match import require_task
from sinkformer_pl.training.run_folder import (
    DEFAULT_NAME,
    DEFAULT_ROOT,
    find_checkpoint,
    local_folder,
    require_name,
    root_of,
)

KEPT_FOR_EVALUATION = ("name", "plugins", "seed_everything", "data", "model")


@dataclass
class RunSettings:
    """All settings of a run.

    Args:
        trainer: arguments of Lightning's Trainer.
        model: the task, a LightningModule; its arguments stand beside it.
        data: a data module and its arguments.
        seed_everything: Seed of weights and dropout; true draws one.
        name: Name of the run, and of its folder.
        plugins: Modules with your own classes, imported first: --plugins a,b
        monitor: What best.ckpt is best in: the highest, or the lowest of a loss or a metric of which lower is better.
        require_finite: Stop at the step whose loss or gradients aren't finite, before they change the weights.
        checkpoint_every: Write last.ckpt within epochs, too: every so many optimizer steps (500), or so often (90s,
            10min).
        init_from: Start the training from the weights in this file: a checkpoint, .safetensors or a state_dict.
        init_only: Names of the parts that are loaded from it, such as backbone.embed or backbone.blocks.0-3.
        init_strict: Whether all else must fit it; false takes what fits by name and shape.
        ckpt_path: A checkpoint: its path, or 'last' or 'best' for that of the newest run of this --name.
        verbose: Print the results of an evaluation.
    """

    trainer: Annotated[pl.Trainer, FIXED]
    model: pl.LightningModule
    data: pl.LightningDataModule
    seed_everything: bool | int = 0
    name: str = DEFAULT_NAME
    plugins: str | list[str] = field(default_factory=list)
    monitor: str | None = None
    require_finite: bool = True
    checkpoint_every: int | str | None = None
    init_from: str | None = None
    init_only: str | list[str] | None = None
    init_strict: bool = True
    ckpt_path: str | None = None
    verbose: bool = True


DEFAULTS = {
    # A line of ours says how large the model is.
    "trainer": {"default_root_dir": DEFAULT_ROOT, "enable_model_summary": False},
    "model": {"class_path": "sinkformer_pl.tasks.Classifier", "init_args": {}},
}


@dataclass
class Given:
    """Arguments of a command line, before a checkpoint is read or a class imported.

    Attributes:
        configs: the YAML files and what they hold, in their order.
        flags: dotted keys and their values, in their order.
        layers: files and flags, merged.
    """

    configs: list[tuple[str, dict[str, Any]]]
    flags: list[tuple[str, str]]
    layers: Layers

    @classmethod
    def read(cls, argv: Sequence[str]) -> "Given":
        """Read the arguments after a command.

        Raises:
            UserError: an argument that is no flag, a file that is missing or broken.
        """
        paths, flags = read_flags(argv)
        configs = [(path, read_yaml(path)) for path in paths]
        layers = Layers()
        for path, content in configs:
            layers.add(content, f"--config {path}")
        layers.add_flags(flags)
        return cls(configs, flags, layers)

    @property
    def root(self) -> Path:
        """Return the folder of all runs."""
        return local_folder(str(self.layers.get("trainer.default_root_dir", DEFAULT_ROOT)))

    @property
    def checkpoint(self) -> Path | None:
        """Return the path of the checkpoint, if one is named.

        Raises:
            UserError: there is none.
        """
        wanted = self.layers.get("ckpt_path")
        name = str(self.layers.get("name", DEFAULT_NAME))
        return None if wanted is None else find_checkpoint(str(wanted), self.root, name)


@dataclass
class Settings:
    """The checked settings of a command.

    Attributes:
        command: "fit", "validate", "test" or "predict".
        run: an argument of `RunSettings` by its name.
        checkpoint: path of the checkpoint, if one is named.
        content: what it holds.
    """

    command: str
    run: Spec
    checkpoint: Path | None
    content: dict[str, Any] | None

    @property
    def starts_from_weights(self) -> bool:
        """Tell whether a training starts from given weights: not one that resumes from a checkpoint."""
        return self.command == "fit" and self.content is None and self.run["init_from"] is not None

    def plain(self) -> dict[str, Any]:
        """Return the resolved settings as plain data; a run from it repeats this one, from any folder."""
        plain = self.run.plain()
        model: Spec = self.run["model"]
        if model.cls is Classifier:
            plain["model"] = plain["model"]["init_args"]
        root = lookup(plain, "data.init_args.root")
        if isinstance(root, str):
            plain["data"]["init_args"]["root"] = str(Path(root).absolute())
        for name in ("pretrained", "name"):
            weights = lookup(plain, f"model.backbone.init_args.{name}")
            if isinstance(weights, str) and Path(weights).exists():
                plain["model"]["backbone"]["init_args"][name] = str(Path(weights).absolute())
        if plain["init_from"] is not None:
            plain["init_from"] = str(Path(plain["init_from"]).absolute())
        for name in ("ckpt_path", "verbose"):
            plain.pop(name)
        return {"seed_everything": plain.pop("seed_everything"), **plain}


def read_settings(command: str, argv: Sequence[str]) -> Settings:
    """Read, merge and check the settings of a command.

    Args:
        command: "fit", "validate", "test" or "predict".
        argv: the arguments after it.

    Raises:
        UserError: a wrong argument, file or checkpoint.
    """
    if command == "fit" and not argv:
        raise UserError("fit needs to know what to train: give --config FILE, such as configs/pointcloud.yaml")
    given = Given.read(argv)
    plugins = module_names(given.layers.get("plugins"))
    checkpoint, content = given.checkpoint, None
    if command != "fit" and checkpoint is None:
        raise UserError(f"{command} needs the weights of a trained model: give --ckpt_path PATH")
    # Plugins come first: a checkpoint or a flag may name their classes.
    load_plugins(plugins)
    layers = Layers()
    layers.add(DEFAULTS, "default")
    if checkpoint is not None:
        content = read_checkpoint(checkpoint)
        remembered = _remembered(content, command, given)
        more = [name for name in module_names(remembered.get("plugins")) if name not in plugins]
        load_plugins(more)
        plugins += more
        root = root_of(checkpoint)
        layers.add(remembered, f"checkpoint {checkpoint}")
        if root is not None:
            layers.add({"trainer": {"default_root_dir": str(root)}}, f"checkpoint {checkpoint}")
    for path, values in given.configs:
        layers.add(values, f"--config {path}")
    if content is not None and checkpoint is not None:
        layers.add({"model": _hyper_parameters(content, checkpoint, layers, given)}, f"checkpoint {checkpoint}")
    layers.add_flags(given.flags)
    layers.values["plugins"] = plugins
    if checkpoint is not None:
        layers.values["ckpt_path"] = str(checkpoint)
    run = validate(layers, RunSettings)
    seed = run["seed_everything"]
    if not isinstance(seed, bool) and not 0 <= seed < 2**32:
        raise UserError(f"seed_everything {seed}: give a whole number from 0 to 2**32 - 1")
    require_name(run["name"])
    settings = Settings(command, run, checkpoint, content)
    _require_one_start(settings, layers)
    return settings


def _require_one_start(settings: Settings, layers: Layers) -> None:
    """Refuse initial weights for a training that resumes from a checkpoint, unless they are those that it once had."""
    run, plain = settings.run, settings.plain()
    if run["init_from"] is None:
        for name in ("init_only", "init_strict"):
            if plain[name] not in (None, True):
                raise UserError(f"{layers.source(name)}{name} {run[name]}: it is of init_from; give --init_from PATH")
    elif settings.command == "fit" and settings.content is not None:
        remembered = settings.content.get(CONFIG_KEY) or {}
        if _is_of(run["init_from"], remembered.get("init_from")):
            # Where it was when the training began; runs may have been moved since.
            settings.run = run.with_argument("init_from", remembered["init_from"])
        plain = settings.plain()
        for name in ("init_from", "init_only", "init_strict"):
            if plain[name] != remembered.get(name):
                raise UserError(
                    f"{layers.source(name)}{name} {run[name]}: --ckpt_path {settings.checkpoint} has the weights "
                    "from which the training resumes; leave one of them out"
                )


def _is_of(given: str, remembered: str | None) -> bool:
    """Tell whether a path, which may be relative to another folder now, is one that a checkpoint remembers."""
    tail = Path(given).parts
    return remembered is not None and Path(remembered).parts[-len(tail) :] == tail


def _remembered(content: dict[str, Any], command: str, given: Given) -> dict[str, Any]:
    """Return what a checkpoint remembers of its run, less the callbacks that the flags append: of the same command."""
    remembered = dict(content.get(CONFIG_KEY) or {})
    preprocessing = learnt_from(content).get("preprocessing")
    named = as_spec(given.layers.get("data", {})).get("class_path")
    if "data" not in remembered and preprocessing and named is not None:
        # A checkpoint that was made in Python: the class of data that is named takes those arguments that it has.
        remembered["data"] = {"class_path": "the data of the checkpoint", "init_args": dict(preprocessing)}
    if command != "fit":
        return {name: remembered[name] for name in KEPT_FOR_EVALUATION if name in remembered}
    appended = [value for key, value in given.flags if key == "trainer.callbacks+"]
    callbacks = lookup(remembered, "trainer.callbacks")
    if isinstance(callbacks, list):
        kept = [c for c in callbacks if not any(same_class(str(lookup(c, "class_path")), name) for name in appended)]
        remembered["trainer"] = {**remembered["trainer"], "callbacks": kept}
    return remembered


def _hyper_parameters(content: dict[str, Any], path: Path, layers: Layers, given: Given) -> dict[str, Any]:
    """Return the arguments of a checkpoint's task, but for those that the data give: other data are compared later."""
    named = as_spec(given.layers.get("model", {})).get("class_path") or layers.get("model.class_path")
    task = find_class(str(named), pl.LightningModule, "model")
    require_task(content, task, path)
    linked = getattr(task, "from_data", {})
    return {name: value for name, value in saved_arguments(content, task).items() if name not in linked}
