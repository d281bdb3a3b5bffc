"""Command-line arguments before they are parsed: their precedence, the plugins, what a checkpoint brings along.

The parser takes its arguments in order, the last one wins. So they are put in the order of their precedence first:
what the checkpoint remembers of its run < YAML files < the checkpoint's hyper-parameters < flags.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sinkformer_pl.cli.options import module_names
from sinkformer_pl.errors import UserError
from sinkformer_pl.training.checkpoint_content import CONFIG_KEY
from sinkformer_pl.training.checkpoint_file import read_checkpoint
from sinkformer_pl.training.run_folder import DEFAULT_NAME, DEFAULT_ROOT, find_checkpoint, local_folder, root_of

LISTS = ("--plugins", "--trainer.callbacks", "--trainer.logger", "--trainer.plugins")
"""Options of which a user may want several."""

MOST_VALUES = 10_000
"""Of a YAML file; aliases of aliases make a small one grow without end."""

KEPT_FOR_EVALUATION = ("name", "plugins", "seed_everything", "data", "model")


@dataclass
class Arguments:
    """The arguments of one command, sorted by kind.

    Attributes:
        command: "fit", "validate", "test" or "predict".
        configs: the YAML files, in their order.
        flags: all other arguments, in their order, `--ckpt_path` made a path.
        files: what the YAML files hold.
        plugins: modules to import before parsing.
        checkpoint: path of the checkpoint, if one is named.
        content: what it holds, once `load_checkpoint` was called.
    """

    command: str
    configs: list[str]
    flags: list[str]
    files: list[dict[str, Any]] = field(default_factory=list)
    plugins: list[str] = field(default_factory=list)
    checkpoint: Path | None = None
    content: dict[str, Any] | None = None

    @classmethod
    def of(cls, argv: Sequence[str]) -> "Arguments":
        """Sort what was typed; reads the YAML files, imports nothing.

        Raises:
            UserError: a YAML file that is missing or broken, a checkpoint that can't be found.
        """
        command, *rest = argv
        configs, flags = split_off(rest, ("--config", "-c"))
        for option in LISTS:
            if len(split_off(flags, (option,))[0]) > 1:
                raise UserError(f"{option} stands there twice, of which the last would count; add with {option}+=VALUE")
        arguments = cls(command, configs, flags, files=[_read_yaml(path) for path in configs])
        arguments.plugins = module_names(arguments.given("plugins"))
        wanted = arguments.given("ckpt_path")
        if wanted is not None:
            arguments.checkpoint = find_checkpoint(str(wanted), arguments.root, arguments.given("name") or DEFAULT_NAME)
            _, flags = split_off(flags, ("--ckpt_path",))
            arguments.flags = [*flags, "--ckpt_path", str(arguments.checkpoint)]
        return arguments

    def given(self, *keys: str) -> Any:
        """What was given for a key: the last of the files and flags that have it, None if none does."""
        values = [value for value in (_lookup(file, keys) for file in self.files) if value is not None]
        values += split_off(self.flags, ("--" + ".".join(keys),))[0]
        return values[-1] if values else None

    @property
    def root(self) -> Path:
        """The folder of all runs."""
        return local_folder(self.given("trainer", "default_root_dir") or DEFAULT_ROOT)

    def load_checkpoint(self) -> None:
        """Read the checkpoint, if there is one, and learn its plugins."""
        if self.checkpoint is not None:
            self.content = read_checkpoint(self.checkpoint)
            self.plugins += [
                name for name in module_names(self._remembered().get("plugins")) if name not in self.plugins
            ]

    def ordered(self) -> list[str]:
        """The command line for the parser, lowest precedence first."""
        below: dict[str, Any] = {}
        above: dict[str, Any] = {}
        if self.content is not None and self.checkpoint is not None:
            remembered = self._without_appended(self._remembered())
            below = (
                remembered
                if self.command == "fit"
                else {k: remembered[k] for k in KEPT_FOR_EVALUATION if k in remembered}
            )
            root = root_of(self.checkpoint)
            if root is not None:
                below = {**below, "trainer": {**below.get("trainer", {}), "default_root_dir": str(root)}}
            # The number of classes is the data's to say; `require_match` compares.
            above = {"model": {k: v for k, v in self.content["hyper_parameters"].items() if k != "num_classes"}}
        configs = [json.dumps(below)] * bool(below) + self.configs + [json.dumps(above)] * bool(above)
        return [self.command, *(part for config in configs for part in ("--config", config)), *self.flags]

    def _without_appended(self, remembered: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint remembers, less the callbacks that the flags append: those of the same command, perhaps."""
        appended = {name.rpartition(".")[2] for name in split_off(self.flags, ("--trainer.callbacks+",))[0]}
        trainer = remembered.get("trainer") or {}
        callbacks = trainer.get("callbacks")
        if not appended or not isinstance(callbacks, list):
            return remembered
        kept = [entry for entry in callbacks if str(_lookup(entry, ("class_path",))).rpartition(".")[2] not in appended]
        return {**remembered, "trainer": {**trainer, "callbacks": kept}}

    def _remembered(self) -> dict[str, Any]:
        return (self.content or {}).get(CONFIG_KEY) or {}


def split_off(arguments: Sequence[str], options: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The values of some options (`--x value` or `--x=value`), and the other arguments.

    Raises:
        UserError: the last argument is such an option, without a value.
    """
    values, others = [], []
    rest: Iterator[str] = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option not in options:
            others.append(argument)
        elif equals:
            values.append(value)
        else:
            following = next(rest, None)
            if following is None:
                raise UserError(f"{option} needs a value")
            values.append(following)
    return values, others


class _OneOfEachKey(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the parser would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} stands there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _OneOfEachKey)
    except FileNotFoundError:
        # Here, since it imports every part, which takes seconds.
        from sinkformer_pl.cli.messages import closest

        beside = [str(other) for other in sorted(Path(path).parent.glob("*.yaml"))]
        raise UserError(
            f"--config {path}: no such file{closest(path, beside)}; give a path from the folder in which you are"
        ) from None
    except IsADirectoryError:
        raise UserError(f"--config {path}: a folder; give a .yaml file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"--config {path}: can't be read ({cause}); make it readable, as UTF-8") from None
    except RecursionError:
        raise UserError(f"--config {path}: it is nested too deep; write lines 'key: value'") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        problem = str(getattr(error, "problem", None) or getattr(error, "reason", "no valid YAML"))
        remedy = "write plain values, without tags" if "tag" in problem else "correct the YAML"
        raise UserError(f"--config {path}{line}: {problem}; {remedy}") from None
    if content is None:
        raise UserError(f"--config {path}: it is empty")
    if _is_larger(content, MOST_VALUES):
        raise UserError(
            f"--config {path}: more than {MOST_VALUES:,} values, or aliases that refer to themselves; shorten it"
        )
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected 'key: value' lines, found a {type(content).__name__}")
    return content


def _is_larger(content: Any, most: int) -> bool:
    """Whether it has more values than that, each counted as often as aliases repeat it."""
    waiting, found = [content], 0
    while waiting and found <= most:
        value = waiting.pop()
        found += 1
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return found > most


def _lookup(content: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content
