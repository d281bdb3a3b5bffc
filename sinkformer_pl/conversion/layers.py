"""The attention that the argument `layers` means."""

import re
from collections.abc import Sequence

from sinkformer_pl.conversion.site import Site
from sinkformer_pl.errors import UserError
from sinkformer_pl.parts import as_list, select

Layers = int | str | Sequence[int | str] | None
"""Numbers of attention layers in the order of the model, from 0 on, or from the last, -1; patterns of their names
(`sinkformer_pl.parts.Patterns`), such as "encoder.layers.0-3"; "last half"; None is all.
"""

LAST_HALF = "last half"


def choose(sites: Sequence[Site], layers: Layers) -> list[Site]:
    """Return the sites that are meant, in their order.

    A text of digits, or a range such as "0-3", is of numbers, as from a command line.

    Raises:
        UserError: a number or pattern without a match; a text that is both a number and a name.
    """
    if layers is None:
        return list(sites)
    if layers == LAST_HALF:
        return list(sites[len(sites) // 2 :])
    wanted: set[str] = set()
    for layer in [layers] if isinstance(layers, int) else as_list(layers) if isinstance(layers, str) else layers:
        if isinstance(layer, bool) or not isinstance(layer, int | str):
            raise UserError(f"layers {layer!r}: give a number, a pattern of names, a list of them, or {LAST_HALF!r}")
        wanted |= _numbered(sites, layer) if isinstance(layer, int) else _named(sites, layer)
    if not wanted:
        raise UserError(f"layers {layers!r}: no layer; give one, or leave it out for all {len(sites)}")
    return [site for site in sites if site.name in wanted]


def _numbered(sites: Sequence[Site], layer: int) -> set[str]:
    if not -len(sites) <= layer < len(sites):
        raise UserError(f"layers {layer}: the model has {len(sites)} attention layers, from 0 to {len(sites) - 1}")
    return {sites[layer].name}


def _named(sites: Sequence[Site], pattern: str) -> set[str]:
    names = [site.name for site in sites]
    if not (numbers := re.fullmatch(r"(\d+)(?:-(\d+))?", pattern.strip())):
        return set(select(names, pattern, "layers"))
    first, last = int(numbers[1]), int(numbers[2] or numbers[1])
    if any(name.partition(".")[0].isdigit() for name in names):
        raise UserError(
            f"layers {pattern!r}: a number of a layer or the name of a module? Give a number without quotes, or a "
            f"pattern such as '{names[0]}*'"
        )
    if first > last:
        raise UserError(f"layers {pattern!r}: a range is FIRST-LAST, both included")
    return set().union(*(_numbered(sites, layer) for layer in range(first, last + 1)))
