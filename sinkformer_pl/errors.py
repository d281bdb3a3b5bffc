"""The exceptions that the command line shows without a traceback, and what their messages are made of."""

from collections.abc import Iterable
from difflib import SequenceMatcher


class UserError(ValueError):
    """A cause that the user can remove: a file, a folder, an argument.

    The message is one line that names the file or key, the cause and the remedy.
    """


class RunError(UserError):
    """A cause that came up in the course of a run: one with another seed or normalization may be spared."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or the name of its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return "; did you mean X?" for the valid name that is most like this one, or nothing."""
    found = closest(name, valid)
    return f"; did you mean {found}?" if found is not None else ""


def closest(name: str, valid: Iterable[str], least: float = 0.6) -> str | None:
    """Return the name that is most like this one, the first of equals; None if its likeness, up to 1, isn't enough."""
    likeness = {option: SequenceMatcher(None, option.lower(), name.lower()).ratio() for option in valid}
    best = max(likeness, key=likeness.__getitem__, default=None)
    return best if best is not None and likeness[best] >= least else None
