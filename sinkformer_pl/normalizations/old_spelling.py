"""Accept the spelling of version 0.1 with a warning until 0.3: `guarantees = Guarantees(..., square=..., tied=...)`."""

import warnings
from dataclasses import asdict, dataclass, fields
from typing import Any

from sinkformer_pl.normalizations.promises import Promises


@dataclass(frozen=True, kw_only=True)
class Guarantees(Promises):
    """Promises and requirements in one; write `promises = Promises(...)` and `requires_square = True` instead."""

    square: bool = False
    tied: bool = False


def adopt(owner: Any, old: Guarantees) -> None:
    """Set the promises and requirements of a class, or of an instance, from the old spelling.

    Raises:
        TypeError: no `Guarantees`.
    """
    if not isinstance(old, Guarantees):
        name = owner.__name__ if isinstance(owner, type) else type(owner).__name__
        raise TypeError(f"{name}.guarantees must be Guarantees(...); write promises = Promises(...) instead")
    owner.promises = Promises(**{field.name: getattr(old, field.name) for field in fields(Promises)})
    owner.requires_square, owner.requires_tied = old.square or old.tied, old.tied


def adopt_class(cls: type) -> None:
    """Translate the `guarantees` in the body of a class, with a warning that says what to write."""
    adopt(cls, vars(cls)["guarantees"])
    # The property of the base class answers from here on.
    del cls.guarantees  # type: ignore[attr-defined]
    wanted = [
        "promises = Promises(...)",
        *(f"{name} = True" for name in ("requires_square", "requires_tied") if getattr(cls, name)),
    ]
    warnings.warn(
        f"{cls.__name__}: guarantees = Guarantees(...) is an old spelling that goes in version 0.3; write "
        f"{' and '.join(wanted)}",
        FutureWarning,
        stacklevel=4,
    )


def old_view(owner: Any) -> Guarantees:
    """Return promises and requirements of an instance in the old spelling."""
    return Guarantees(**asdict(owner.promises), square=owner.requires_square, tied=owner.requires_tied)
