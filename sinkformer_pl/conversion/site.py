"""An attention that was found in a model, and whether it can be converted."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from sinkformer_pl.conversion.core import ConvertedCore
from sinkformer_pl.normalizations.contract import AttentionNormalization
from sinkformer_pl.normalizations.registry import registered

Kind = Literal["self", "cross", "any"]


@dataclass(eq=False, kw_only=True)
class Site:
    """An attention in a model. A library's file makes these; a subclass may attach in its own way.

    Attributes:
        name: of the module in the model, as in `named_modules`.
        module: the attention; gets the child `core`.
        family: library and kind, such as "torch.nn.MultiheadAttention".
        num_heads: heads of the queries.
        head_dim: width of the queries and keys of a head.
        scale: multiplies q·k; None is 1 / sqrt(head_dim).
        kind: whether a sequence attends to itself ("self"), to another ("cross"), or the caller decides ("any").
        causal: a query meets the keys up to its own position.
        pairs: words for what else forbids pairs of real queries and keys, such as "a sliding window of 128 tokens".
        bias: something is added to the scores, such as relative positions.
        dropout: share of the weights that the library drops in training.
        reason: why it can't be converted under any normalization; None if it can.
        converted: class to which the module's is exchanged while it has a core; its attribute `original` is the class
            of before. None leaves the class as it is.
    """

    name: str
    module: nn.Module
    family: str
    num_heads: int
    head_dim: int
    scale: float | None = None
    kind: Kind = "self"
    causal: bool = False
    pairs: str | None = None
    bias: bool = False
    dropout: float = 0.0
    reason: str | None = None
    converted: type[nn.Module] | None = None

    @property
    def core(self) -> ConvertedCore | None:
        """Return what was attached, if it was."""
        core = getattr(self.module, "core", None)
        return core if isinstance(core, ConvertedCore) else None

    def attach(self, core: ConvertedCore) -> None:
        """Make the attention call a core, in place of one that it has."""
        self.module.core = core
        if self.converted is not None:
            self.module.__class__ = self.converted

    def detach(self) -> None:
        """Take the core away; the attention is the library's again."""
        del self.module.core
        if self.converted is not None:
            self.module.__class__ = self.converted.original  # type: ignore[attr-defined]

    def refusal(self, normalization: AttentionNormalization) -> str | None:
        """Say why it can't be converted to a normalization, and what is possible; None if it can."""
        name, promises = type(normalization).__name__, normalization.promises
        if self.reason is not None:
            return self.reason
        if self.causal and not promises.causal:
            only = " (the only doubly stochastic causal matrix is the identity)" if promises.unit_columns else ""
            return f"it is causal, which {name} can't be{only}; normalizations that can: {those_that('causal')}"
        if self.pairs is not None and not promises.pairs:
            return f"{self.pairs} forbids pairs, which {name} can't honour; ones that can: {those_that('pairs')}"
        if normalization.requires_tied:
            return f"{name} needs queries and keys from one projection, and these have one each"
        if normalization.requires_square and self.kind == "cross":
            return f"{name} needs as many queries as keys, and this attends from one sequence to another"
        if self.bias and not normalization.takes_bias:
            return f"it adds a bias to its scores, and {name} takes none; use Softmax or Sinkhorn"
        return None


def those_that(promise: str) -> str:
    """List the registered normalizations with a promise."""
    return ", ".join(name for name, cls in registered().items() if getattr(cls.promises, promise))
