"""The table of normalizations."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from sinkformer_pl.cli.arguments import module_names
from sinkformer_pl.cli.options import OptionParser
from sinkformer_pl.factories import parameters_of
from sinkformer_pl.normalizations import AttentionNormalization, load_plugins, registered

COLUMNS = {
    "rows": lambda promise: {"one": "sum to 1", "at most one": "at most 1", None: "-"}[promise.row_sums],
    "columns": lambda promise: "Q/K in the limit" if promise.unit_columns else "-",
    "sparse": lambda promise: _yes(promise.sparse),
    "equivariant": lambda promise: _yes(promise.equivariant),
    "causal": lambda promise: _yes(promise.causal),
    "forbidden pairs": lambda promise: _yes(promise.pairs),
    "shape": lambda promise: "one set, tied" if promise.tied else "square" if promise.square else "any",
    "cost": lambda promise: "linear" if promise.linear else "Q x K",
    "training": lambda promise: "stochastic" if promise.stochastic else "deterministic",
}


def print_normalizations(argv: Sequence[str]) -> None:
    """Print every registered normalization, its arguments and its guarantees.

    Args:
        argv: arguments after the command: `--plugins MODULE[,MODULE]`.
    """
    parser = OptionParser(
        prog="python -m sinkformer_pl normalizations",
        description="Every registered normalization and what it guarantees.",
    )
    parser.add_argument("--plugins", default="", help="modules to import first, separated by commas")
    load_plugins(module_names(parser.parse_args(argv).plugins))
    table = Table("normalization", *COLUMNS)
    for name, cls in registered().items():
        table.add_row(f"{name}{_arguments(cls)}", *(column(cls.guarantees) for column in COLUMNS.values()))
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def _arguments(cls: type[AttentionNormalization]) -> str:
    parameters = parameters_of(cls).values()
    return f"({', '.join(f'{p.name}={p.default!r}' if p.default is not p.empty else p.name for p in parameters)})"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
