"""The flow command."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ActionConfigFile
from rich.console import Console
from rich.markdown import Markdown

from sinkformer_pl.cli.arguments import Arguments
from sinkformer_pl.cli.messages import closest, root_cause
from sinkformer_pl.cli.parser import Parser
from sinkformer_pl.errors import UserError
from sinkformer_pl.flows import (
    FILES,
    FlowSettings,
    HeatSettings,
    follow_attention,
    reach_heat_limit,
    write_flows,
)

GROUPS = ("flow", "heat")


def run_flow(argv: Sequence[str]) -> None:
    """Follow attention as a flow, take the heat limit, and write tables and pictures.

    Args:
        argv: arguments after the command.

    Raises:
        UserError: wrong arguments.
    """
    parser = _parser()
    _require_keys(parser, argv)
    config = parser.parse_args(list(argv))
    folder = Path(config.folder)
    if not 0 <= config.seed < 2**63:
        raise UserError(f"seed {config.seed}: give a whole number from 0 to 2**63 - 1")
    if any(place.exists() and not place.is_dir() for place in (folder, *folder.parents)):
        raise UserError(f"--folder {folder}: a file is in the way; give another folder")
    try:
        settings = parser.instantiate(config)
        flows = follow_attention(settings.flow, settings.seed)
        heat = reach_heat_limit(settings.heat)
    except ValueError as error:
        raise UserError(str(root_cause(error))) from error
    command = shlex.join(["python", "-m", "sinkformer_pl", "flow", *argv])
    try:
        text = write_flows(flows, heat, settings.heat, folder=folder, command=command)
    except OSError as error:
        raise UserError(f"--folder {folder}: can't write there ({error.strerror}); give another folder") from None
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(Markdown(text))
    for file in FILES:
        print(folder / file)


def _require_keys(parser: Parser, argv: Sequence[str]) -> None:
    """The parser names a wrong key of a file without the file, and not the one that was meant."""
    arguments = Arguments.of(["flow", *argv])
    options = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
    for name, file in zip(arguments.configs, arguments.files, strict=True):
        for key, value in file.items():
            inner = value if key in GROUPS and isinstance(value, dict) else None
            for full in [key] if inner is None else [f"{key}.{part}" for part in inner]:
                if full not in options:
                    raise UserError(f"--config {name}: {full}: no such option{closest(str(full), options)}")


def _parser() -> Parser:
    parser = Parser(
        prog="python -m sinkformer_pl flow",
        description="Attention as a flow of particles: three flows from one start, their functionals, the heat limit.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="file with these settings, such as configs/flow.yaml")
    parser.add_argument("--folder", type=str, default="runs/flow", help="where tables and pictures go")
    parser.add_argument("--seed", type=int, default=1, help="of the particles' start")
    parser.add_class_arguments(FlowSettings, "flow")
    parser.add_class_arguments(HeatSettings, "heat")
    return parser
