"""Print the table of normalizations."""

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from sinkformer_pl.cli.layers import module_names
from sinkformer_pl.cli.option_parser import OptionParser
from sinkformer_pl.factories import parameters_of
from sinkformer_pl.normalizations import AttentionNormalization, load_plugins, registered

COLUMNS = {
    "rows": lambda cls: {"one": "sum to 1", "at most one": "at most 1", None: "-"}[cls.promises.row_sums],
    "columns": lambda cls: "Q/K in the limit" if cls.promises.unit_columns else "-",
    "further": lambda cls: ", ".join(_further(cls)),
}


def run(argv: Sequence[str]) -> None:
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
    # Names are longer than a narrow terminal has room for.
    table = Table(Column("normalization", overflow="fold"), *COLUMNS, box=SIMPLE, padding=(0, 1, 0, 0))
    for name, cls in registered().items():
        table.add_row(f"{name}{_arguments(cls)}", *(column(cls) for column in COLUMNS.values()))
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)


def _further(cls: type[AttentionNormalization]) -> Iterator[str]:
    promise = cls.promises
    for word, holds in (
        ("sparse", promise.sparse),
        ("any mask" if promise.pairs else "causal masks", promise.pairs or promise.causal),
        ("order matters", not promise.equivariant),
        ("one set, tied" if cls.requires_tied else "as many queries as keys", cls.requires_tied or cls.requires_square),
        ("linear cost", promise.linear),
        ("random in training", promise.stochastic),
    ):
        if holds:
            yield word


def _arguments(cls: type[AttentionNormalization]) -> str:
    parameters = parameters_of(cls).values()
    return f"({', '.join(f'{p.name}={_word(p.default)}' if p.default is not p.empty else p.name for p in parameters)})"


def _word(value: object) -> str:
    return value.__name__ if isinstance(value, type) else repr(value)
