"""Turn what classes refuse into lines for users."""

from collections.abc import Iterator
from contextlib import contextmanager

from sinkformer_pl.cli.console import raise_with_remedy
from sinkformer_pl.errors import UserError


@contextmanager
def refusals_of_classes(prefix: str = "") -> Iterator[None]:
    """Turn the refusal of a class into a line for the user, who can mend it.

    Raises:
        UserError: the prefix and the cause.
    """
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
        raise UserError(prefix + " ".join(str(root_cause(error)).split("\n"))) from error
    except RuntimeError as error:
        raise_with_remedy(error)
        raise


def root_cause(error: BaseException) -> BaseException:
    """Return the innermost error of a chain that is meant for users, else the innermost one."""
    chain = [error]
    while (inner := _inner(chain[-1])) is not None:
        chain.append(inner)
    meant = [link for link in chain if isinstance(link, UserError)]
    return meant[-1] if meant else chain[-1]


def _inner(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)
