"""Attention whose normalization is a plug-in: softmax, Sinkhorn and your own, trained and compared with Lightning."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkformer_pl.conversion import convert, revert
    from sinkformer_pl.inference import load
    from sinkformer_pl.normalizations import Sinkhorn, register
    from sinkformer_pl.ops import AttentionMask, sinkhorn_attention
    from sinkformer_pl.tasks import Classifier, init_from

__version__ = version("sinkformer_pl")

_HOMES = {
    "AttentionMask": "sinkformer_pl.ops",
    "Classifier": "sinkformer_pl.tasks",
    "Sinkhorn": "sinkformer_pl.normalizations",
    "convert": "sinkformer_pl.conversion",
    "init_from": "sinkformer_pl.tasks",
    "load": "sinkformer_pl.inference",
    "register": "sinkformer_pl.normalizations",
    "revert": "sinkformer_pl.conversion",
    "sinkhorn_attention": "sinkformer_pl.ops",
}
"""Modules of the public names, imported when a name is first asked for: torch and Lightning take seconds."""

__all__ = [
    "AttentionMask",
    "Classifier",
    "Sinkhorn",
    "__version__",
    "convert",
    "init_from",
    "load",
    "register",
    "revert",
    "sinkhorn_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
