"""A table of the attention in a model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from sinkformer_pl.conversion.libraries import find
from sinkformer_pl.conversion.site import Site
from sinkformer_pl.tables import markdown_table

COLUMNS = ("layer", "name", "family", "heads x width", "attention", "normalization")


@dataclass(frozen=True)
class Report:
    """The attention in a model; `print` shows it as a table.

    Attributes:
        sites: in the order of the model.
    """

    sites: tuple[Site, ...]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of `COLUMNS` for each site."""
        return [(str(number), *_cells(site)) for number, site in enumerate(self.sites)]

    def __str__(self) -> str:
        if not self.sites:
            return "no attention that can be converted"
        rows = self.rows
        widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (COLUMNS, *rows)
        )

    def _repr_markdown_(self) -> str:
        return "\n".join(markdown_table(COLUMNS, self.rows))


def report(model: nn.Module) -> Report:
    """List the attention in a model: names, shapes, and the normalization of each, or why it can't have another."""
    return Report(tuple(find(model)))


def _cells(site: Site) -> tuple[str, ...]:
    shape = f"{site.num_heads} x {site.head_dim}"
    return site.name or "(the model)", site.family, shape, _kind(site), _state(site)


def _kind(site: Site) -> str:
    words = {"self": "to itself", "cross": "to another sequence", "any": "to any sequence"}[site.kind]
    more = [word for word in ("causal" if site.causal else None, site.pairs, "bias" if site.bias else None) if word]
    return ", ".join([words, *more])


def _state(site: Site) -> str:
    if site.core is not None:
        normalization: Any = site.core.normalization
        return str(normalization).replace("\n", " ")
    return "the library's" if site.reason is None else f"can't be converted: {site.reason}"
