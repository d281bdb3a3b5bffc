"""Patterns of names: which parts of a network an argument means."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from sinkformer_pl.errors import UserError

Patterns = str | Sequence[str]
"""Patterns of names, or one text of them with commas between.

A pattern is the dotted name of a parameter or module, and means everything below it, too: "backbone.embed". In it `*`,
`?` and `[...]` are those of `fnmatch`, `*` taking dots as well: "*.bias". Numbers with a dash between are a range, both
included: "backbone.blocks.0-3".
"""

MOST = 10_000
"""Most names that the ranges of one pattern stand for."""

_RANGE = re.compile(r"(\d+)-(\d+)")


def matches(name: str, patterns: Patterns) -> bool:
    """Tell whether any of the patterns means a name."""
    return any(_matches(name, pattern) for text in as_list(patterns) for pattern in _without_ranges(text))


def select(names: Iterable[str], patterns: Patterns, key: str) -> list[str]:
    """Return the names that patterns mean, in the order of `names`.

    Args:
        names: dotted names of parameters or modules.
        patterns: see `Patterns`.
        key: of the argument that has them, for messages.

    Raises:
        UserError: a pattern, or a number of its range, without a match; names the closest names.
    """
    names = list(names)
    chosen = [(text, pattern) for text in as_list(patterns) for pattern in _without_ranges(text, key)]
    found = {pattern: {name for name in names if _matches(name, pattern)} for _, pattern in chosen}
    for text, pattern in chosen:
        if not found[pattern]:
            of = "" if pattern == text else f", of {text}"
            raise UserError(f"{key} {pattern}{of}: the network has no part of this name; {_closest(pattern, names)}")
    wanted = set().union(*found.values())
    return [name for name in names if name in wanted]


def as_list(patterns: Patterns) -> list[str]:
    """Return patterns one by one."""
    parts = patterns.split(",") if isinstance(patterns, str) else patterns
    return [part.strip() for part in parts if part.strip()]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _without_ranges(text: str, key: str = "") -> list[str]:
    """Write out a pattern for each number of its ranges."""
    choices: list[Sequence[str] | range] = []
    total = 1
    for part in text.split("."):
        found = _RANGE.fullmatch(part)
        choice = range(int(found[1]), int(found[2]) + 1) if found else [part]
        total *= len(choice)
        if not 0 < total <= MOST:
            raise UserError(
                f"{key} {text}".lstrip() + f": a range is FIRST-LAST, both included, of at most {MOST} numbers"
            )
        choices.append(choice)
    return [".".join(map(str, parts)) for parts in itertools.product(*choices)]


def _closest(pattern: str, names: Sequence[str]) -> str:
    """Name the parts that are most like a pattern, or those that there are."""
    parts = dict.fromkeys(part for name in names for part in _parts_of(name))
    close = get_close_matches(pattern, parts, n=3, cutoff=0.7)
    return f"did you mean {' or '.join(close)}?" if close else f"its parts are {', '.join(_top(parts))}"


def _top(parts: Iterable[str]) -> list[str]:
    """Return the parts of a network to the second level, below which there are too many."""
    parts = list(parts)
    upper = [part for part in parts if part.count(".") <= 1]
    return [part for part in upper if not any(other.startswith(f"{part}.") for other in upper)]


def collapsed(names: Iterable[str], everything: Iterable[str]) -> list[str]:
    """Write names in few: where all names below a part are among them, that part alone.

    Args:
        names: some names.
        everything: all names.
    """
    names = list(names)
    there, chosen = (Counter(part for name in listed for part in _parts_of(name)) for listed in (everything, names))
    return list(dict.fromkeys(next(p for p in _parts_of(name) if there[p] <= chosen[p]) for name in names))


def _parts_of(name: str) -> list[str]:
    """Return "a", "a.b", "a.b.c" of "a.b.c"."""
    return list(itertools.accumulate(name.split("."), "{}.{}".format))
