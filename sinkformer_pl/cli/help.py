"""Print what `--help`, `--KEY.help NAME` and `--print_config` ask for."""

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from sinkformer_pl.cli.layers import split_off
from sinkformer_pl.cli.settings import RunSettings, read_settings
from sinkformer_pl.errors import UserError
from sinkformer_pl.tasks import Classifier
from sinkformer_pl.training.run_folder import DEFAULT_ROOT

DESCRIPTIONS = {
    "fit": "Train a task, a classifier by default, whose attention is normalized as the configuration says.",
    "validate": "Evaluate a checkpoint on the validation samples of its data, or of others.",
    "test": "Evaluate a checkpoint on the test samples of its data, or of others.",
    "predict": "Write predictions.csv: the class of each test sample, and the probabilities of all.",
}


def print_asked_for(command: str, argv: Sequence[str]) -> bool:
    """Print help or the resolved configuration if one of them is asked for.

    Args:
        command: "fit", "validate", "test" or "predict".
        argv: the arguments after it.

    Returns:
        Whether the resolved configuration was printed.

    Raises:
        SystemExit: help was printed.
    """
    flags = {argument.partition("=")[0] for argument in argv}
    if flags & {"-h", "--help"}:
        text = help_parser(command).format_help()
        # A checkpoint has what a training needs.
        print(text if command == "fit" else text.replace("(required, ", "("), end="")
        raise SystemExit(0)
    for flag in flags:
        if flag.startswith("--") and flag.endswith(".help"):
            names, _ = split_off([*argv, ""] if argv[-1] == flag else argv, (flag,))
            help_parser(command).parse_args([flag, *filter(None, names)])
    if "--print_config" not in flags:
        return False
    if wrong := [argument for argument in argv if argument.startswith("--print_config=")]:
        raise UserError(f"{wrong[0]}: it takes no flags here, and prints every value; give --print_config alone")
    settings = read_settings(command, [argument for argument in argv if argument != "--print_config"])
    print(yaml.safe_dump(settings.plain(), sort_keys=False), end="")
    return True


def help_parser(command: str) -> ArgumentParser:
    """Return a parser of all options of a command, for its help alone."""
    needed = "--config FILE" if command == "fit" else "--ckpt_path PATH"
    parser = ArgumentParser(
        usage=f"python -m sinkformer_pl {command} {needed} [--OPTION VALUE ...]",
        description=DESCRIPTIONS[command],
        print_config=None,
    )
    parser.add_argument("--print_config", action="store_true", help="Print the resolved settings, and exit.")
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="Path to a YAML file of these options.")
    parser.add_class_arguments(RunSettings, skip={"trainer", "model", "data"})
    untyped: dict[str, Any] = {"fail_untyped": False, "instantiate": False}
    parser.add_class_arguments(pl.Trainer, "trainer", **untyped)
    parser.set_defaults({"trainer.default_root_dir": DEFAULT_ROOT, "trainer.enable_model_summary": False})
    parser.add_class_arguments(Classifier, "model", skip=set(Classifier.from_data), **untyped)
    parser.add_subclass_arguments(pl.LightningDataModule, "data", required=False, **untyped)
    return parser
