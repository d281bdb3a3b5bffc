"""The flow command."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser
from rich.console import Console
from rich.markdown import Markdown

from sinkformer_pl.cli.settings import Given
from sinkformer_pl.cli.validate import validate
from sinkformer_pl.errors import UserError
from sinkformer_pl.flows import (
    FILES,
    FlowSettings,
    HeatSettings,
    follow_attention,
    reach_heat_limit,
    write_flows,
)


@dataclass
class Settings:
    """All settings of the command.

    Args:
        folder: where tables and pictures go
        seed: of the particles' start
        flow: particles that follow their own attention
        heat: the heat limit
    """

    folder: str = "runs/flow"
    seed: int = 1
    flow: FlowSettings = field(default_factory=FlowSettings)
    heat: HeatSettings = field(default_factory=HeatSettings)


def run(argv: Sequence[str]) -> None:
    """Follow attention as a flow, take the heat limit, and write tables and pictures.

    Args:
        argv: arguments after the command.

    Raises:
        UserError: wrong arguments.
    """
    if {"-h", "--help"} & set(argv):
        _help_parser().parse_args(["--help"])
    try:
        spec = validate(Given.read([argument for argument in argv if argument != "--print_config"]).layers, Settings)
        if "--print_config" in argv:
            print(yaml.safe_dump(spec.plain(), sort_keys=False), end="")
            return
        settings: Settings = spec.build()
        folder = Path(settings.folder)
        if not 0 <= settings.seed < 2**63:
            raise UserError(f"seed {settings.seed}: give a whole number from 0 to 2**63 - 1")
        if any(place.exists() and not place.is_dir() for place in (folder, *folder.parents)):
            raise UserError(f"--folder {folder}: a file is in the way; give another folder")
        flows = follow_attention(settings.flow, settings.seed)
        heat = reach_heat_limit(settings.heat)
    except ValueError as error:
        raise UserError(str(error)) from error
    command = shlex.join(["python", "-m", "sinkformer_pl", "flow", *argv])
    try:
        text = write_flows(flows, heat, settings.heat, folder=folder, command=command)
    except OSError as error:
        raise UserError(f"--folder {folder}: can't write there ({error.strerror}); give another folder") from None
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(Markdown(text))
    for file in FILES:
        print(folder / file)


def _help_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m sinkformer_pl flow",
        description="Attention as a flow of particles: three flows from one start, their functionals, the heat limit.",
        print_config=None,
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings, and exit")
    parser.add_argument("--config", action=ActionConfigFile, help="file with these settings, such as configs/flow.yaml")
    parser.add_class_arguments(Settings)
    return parser
