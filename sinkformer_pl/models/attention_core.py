"""The core of attention: queries, keys and values of all heads, under any normalization."""

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from sinkformer_pl.models.class_mass import Mass
from sinkformer_pl.models.class_mass import class_mass as make_class_mass
from sinkformer_pl.normalizations.contract import AttentionNormalization, NormalizationFactory
from sinkformer_pl.normalizations.per_head import PerHead, numbers_per_head
from sinkformer_pl.ops.forbidden import forbid, forbid_pairs
from sinkformer_pl.ops.mask import AttentionMask, Mask, causal_pairs

Made = TypeVar("Made")

Temperature = float | Literal["learned"]
"""Divides the scores: a number, or one learned for each head, from 1 on."""


class AttentionCore(nn.Module):
    """Attend from queries to keys in every head: scores, their normalization, weights times values.

    An attention of your own projects its inputs, composes a core, and is then seen by diagnostics and `inspect`, which
    hook it. The core has no projection; what it learns is the temperature and what the normalization learns.

    Args:
        num_heads: number of heads.
        head_dim: width of the queries and keys of a head.
        normalization: makes this core's own normalization.
        temperature: divides the scores, which are q·k / sqrt(head_dim): a positive number, or "learned".
        causal: a query meets the keys up to its own position.
        class_mass: sum of the column of the first key, a class token, over that of any other: a number from 0 on;
            "learned", one for each head; "free", what it receives under Softmax (`ClassMass`).

    Attributes:
        normalization: made and built for these heads.
        scale: multiplies q·k: a number, or a tensor (H,) under a learned temperature.
        sides: names of what attends and of what is attended to, for pictures; "token" unless another is set.

    Raises:
        ValueError: a number of heads or a width below 1; a temperature that isn't positive.
        TypeError: the normalization isn't a usable module.
        NotImplementedError: `causal`, or a class token's own mass, under a normalization that can't have it.
    """

    log_temperature: nn.Parameter | None
    scale = PerHead(
        "log_temperature",
        to_raw=lambda _: 0.0,
        from_raw=lambda log_temperature, initial: initial * (-log_temperature).exp(),
    )

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        normalization: NormalizationFactory,
        *,
        temperature: Temperature = 1.0,
        causal: bool = False,
        class_mass: Mass = 1.0,
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        if head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {head_dim}")
        self.learned = temperature == "learned"
        if not self.learned and (isinstance(temperature, str) or not 0 < temperature < math.inf):
            raise ValueError(f"temperature must be a positive number or 'learned', got {temperature!r}")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.causal = causal
        self.sides = ("token", "token")
        self.scale = 1 / math.sqrt(head_dim) / (1.0 if isinstance(temperature, str) else temperature)
        for number in numbers_per_head(type(self)):
            number.build(self, num_heads)
        self.normalization = _made(normalization)
        promises = self.normalization.promises
        if causal and not promises.causal:
            name = type(self.normalization).__name__
            reason = " (the only doubly stochastic causal matrix is the identity)" if promises.unit_columns else ""
            raise NotImplementedError(f"{name} can't be causal{reason}; use a normalization that can, such as Softmax")
        _without_a_trace(lambda: self.normalization.build(num_heads, head_dim))
        self.class_mass = make_class_mass(class_mass, num_heads, self.normalization)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, bias: Tensor | None = None, dropout: float = 0.0
    ) -> Tensor:
        """Multiply attention weights and values.

        Args:
            q: (B, H, Q, head_dim), of any float dtype.
            k: (B, H, K, head_dim); the tensor q itself under a normalization that requires it (`requires_tied`).
            v: (B, H, K, Dv).
            mask: real queries and keys, permitted pairs.
            bias: added to the scaled scores, broadcastable to (B, H, Q, K); an entry of -inf, or at or below -1e9,
                forbids its pair.
            dropout: share of the weights that are set to 0, the others being divided by 1 - dropout; forms all Q x K.

        Returns:
            (B, H, Q, Dv).

        Raises:
            NotImplementedError: dropout under a normalization for which it has no meaning, see `why_no_dropout`.
        """
        if not dropout:
            more = self._marginal(q, k, mask, bias)
            mask = self._with_causality(q, k, mask)
            return self.normalization.attend(q, k, v, mask, scale=self.scale, bias=bias, **more)
        if (reason := why_no_dropout(self.normalization)) is not None:
            raise NotImplementedError(reason)
        weights = nn.functional.dropout(self.weights(q, k, mask, bias), dropout)
        return weights @ self.effective_mask(q, k, mask, bias).without_padding(q, k, v)[2]

    def weights(self, q: Tensor, k: Tensor, mask: Mask = None, bias: Tensor | None = None) -> Tensor:
        """Compute the weights (B, H, Q, K) that `forward` would use."""
        more = self._marginal(q, k, mask, bias)
        return self.normalization.weights(q, k, self._with_causality(q, k, mask), scale=self.scale, bias=bias, **more)

    def effective_mask(self, q: Tensor, k: Tensor, mask: Mask = None, bias: Tensor | None = None) -> AttentionMask:
        """Add to a mask what causality and a bias forbid."""
        rule = forbid_pairs if self.normalization.promises.pairs else forbid
        like_scores = q.new_empty(()).expand(*q.shape[:-1], k.shape[-2])
        return rule(bias, self._with_causality(q, k, mask), like_scores)[1]

    def rename_old_keys(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Rename, in place, the keys of version 0.1, in which an attention itself held what its core holds now.

        The order of the parameters, by which optimizers keep their state, is as it was.

        Args:
            state_dict: of a network.
            prefix: of this core in it, such as "blocks.0.attention.core."; under another name there is nothing to do.
        """
        if not f".{prefix}".endswith(".core."):
            return
        owner = prefix.removesuffix("core.")
        for key in list(state_dict):
            if key == f"{owner}log_temperature" or key.startswith(f"{owner}normalization."):
                state_dict[f"{prefix}{key.removeprefix(owner)}"] = state_dict.pop(key)

    def _marginal(self, q: Tensor, k: Tensor, mask: Mask, bias: Tensor | None) -> dict[str, Any]:
        """Return the keyword by which a normalization is given the sums of its columns, if they aren't all alike."""
        if self.class_mass is None:
            return {}
        mask = self.effective_mask(q, k, mask, bias)
        return {"column_marginal": self.class_mass(q, k, mask, scale=self.scale, bias=bias)}

    def _with_causality(self, q: Tensor, k: Tensor, mask: Mask) -> Mask:
        if not self.causal:
            return mask
        mask = mask or AttentionMask()
        pairs = causal_pairs(q.shape[-2], k.shape[-2], device=q.device)
        return AttentionMask(mask.query, mask.key, pairs if mask.pairs is None else pairs & mask.pairs)

    def extra_repr(self) -> str:
        """Show the arguments in `print(model)`."""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, causal={self.causal}"


def why_no_dropout(normalization: AttentionNormalization) -> str | None:
    """Say why dropout of the weights has no meaning under a normalization; None where it has."""
    name, promises = type(normalization).__name__, normalization.promises
    if promises.linear:
        return f"{name} never forms the attention weights, of which some would be dropped: set attention_dropout=0"
    if not promises.exact_gradient:
        return f"{name} has a gradient of its own, which weights that are dropped would lack: set attention_dropout=0"
    return None


def rename_old_keys(owner: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the keys of version 0.1 when a state is loaded: a hook for modules whose attribute `core` is new."""
    core = owner.core
    assert isinstance(core, AttentionCore)
    core.rename_old_keys(state_dict, f"{prefix}core.")


def _made(normalization: NormalizationFactory) -> AttentionNormalization:
    made = _without_a_trace(normalization)
    if not isinstance(made, nn.Module) or "_modules" not in vars(made):
        raise TypeError(f"{type(made).__name__} is no usable module: its __init__ must call super().__init__() first")
    return made


def _without_a_trace(make: Callable[[], Made]) -> Made:
    """Leave the random state as it was: whatever a normalization draws, all other weights start the same."""
    with torch.random.fork_rng(devices=()):
        return make()
