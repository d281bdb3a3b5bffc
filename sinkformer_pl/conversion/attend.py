"""Attention with the masks and options of other libraries."""

from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from sinkformer_pl.conversion.core import ConvertedCore
from sinkformer_pl.conversion.site import those_that
from sinkformer_pl.ops.mask import AttentionMask, can_look, causal_pairs, is_forbidden


class CoreInputs(NamedTuple):
    """Hold the arguments of a core, in its order; `weights` takes them without `v`."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: AttentionMask
    bias: Tensor | None


class Masks(TypedDict, total=False):
    """Describe who may meet, as a library does.

    Attributes:
        mask: broadcastable to (B, H, Q, K): bool, True where a pair may meet, or float, added to the scaled scores; its
            entries of -inf, at or below -1e9, or the least number of the dtype forbid.
        bias: float, added to the scaled scores, too; may forbid likewise.
        keys: (B, K) bool, True at real keys.
        queries: (B, Q) bool, True at real queries; by default `keys` in self-attention.
        self_attention: queries and keys are the same tokens; the default.
        extra_keys: number of last keys that are no tokens, 0 by default.
        causal: a query meets the keys up to its own position.
    """

    mask: Tensor | None
    bias: Tensor | None
    keys: Tensor | None
    queries: Tensor | None
    self_attention: bool
    extra_keys: int
    causal: bool


def attend(
    core: ConvertedCore, q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0, **masks: Unpack[Masks]
) -> Tensor:
    """Attend by a core, with what the attention of a library is given.

    Under a normalization by rows, one that honours pairs, padded queries attend as they do in the library. Under any
    other they would take mass from real ones: the padded queries of self-attention are its padded keys, and a mask may
    forbid nothing but whole queries and keys.

    Args:
        core: of the layer.
        q: (B, H, Q, D).
        k: (B, Hk, K, D); Hk divides H, and each head of keys and values meets H / Hk neighbouring ones of queries.
        v: (B, Hk, K, Dv).
        dropout: share that the library drops of the weights; evaluation mode of the core drops none.
        **masks: see `Masks`.

    Returns:
        (B, H, Q, Dv).

    Raises:
        NotImplementedError: pairs that are forbidden singly under a normalization that can't honour it; dropout where
            it has no meaning.
    """
    return core(*core_inputs(core, q, k, v, **masks), dropout=core.dropout_of(dropout))


def core_inputs(
    core: ConvertedCore,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    keys: Tensor | None = None,
    queries: Tensor | None = None,
    self_attention: bool = True,
    extra_keys: int = 0,
    causal: bool = False,
) -> CoreInputs:
    """Turn what the attention of a library is given into what its core takes; arguments and errors as of `attend`."""
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    samples, num_queries, num_keys = q.shape[0], q.shape[2], k.shape[2]
    promises = core.normalization.promises
    if causal and not promises.causal:
        raise NotImplementedError(_refusal(core, "a causal mask", "causal"))
    pairs = causal_pairs(num_queries, num_keys, device=q.device) if causal else None
    for given in (mask, bias):
        if given is None:
            continue
        permitted = given if given.dtype == torch.bool else ~is_forbidden(given)
        permitted = permitted[(None,) * (4 - permitted.ndim)]
        if permitted.shape[1] == permitted.shape[2] == 1:
            key = permitted[:, 0, 0].expand(samples, num_keys)
            keys = key if keys is None else keys & key
        else:
            pairs = permitted if pairs is None else pairs & permitted
    added = _sum_of_finite(core, mask, bias)
    if promises.pairs:
        return CoreInputs(q, k, v, AttentionMask(None, keys, pairs), added)
    if pairs is not None:
        pairs = pairs.expand(samples, -1, num_queries, num_keys)
        met = pairs.any((1, 2))
        keys = met if keys is None else keys & met
    if queries is None and keys is not None and self_attention and num_queries == num_keys - extra_keys:
        queries = keys[:, :num_queries]
    if pairs is not None and keys is not None:
        meets = pairs.any((1, 3))
        queries = meets if queries is None else queries & meets
        _require_whole(core, pairs, queries[:, None, :, None] & keys[:, None, None])
    return CoreInputs(q, k, v, AttentionMask(queries, keys), added)


def _sum_of_finite(core: ConvertedCore, *given: Tensor | None) -> Tensor | None:
    """Add float masks with 0 at the entries that forbid; None if nothing is left to add, as far as one may look."""
    finite = [tensor for tensor in given if tensor is not None and tensor.dtype != torch.bool]
    finite = [tensor.masked_fill(is_forbidden(tensor), 0.0) for tensor in finite]
    # Padding alone comes as a float mask often: a bias of zeros takes time, and some normalizations take none.
    must_look = not core.normalization.takes_bias and not torch.compiler.is_compiling()
    finite = [x for x in finite if x.requires_grad or not (must_look or can_look(x)) or x.any()]
    return sum(finite[1:], finite[0]) if finite else None


def require_independent_queries(core: ConvertedCore, mask: Tensor | None, *, causal: bool) -> None:
    """Refuse a mask among the queries of attention to another sequence, under a normalization that sums over queries.

    Args:
        core: of the attention to the other sequence.
        mask: of the queries' attention to themselves, bool, True at pairs that may not meet, or float.
        causal: it is known to be causal.

    Raises:
        NotImplementedError: it forbids pairs, and the normalization isn't one by rows.
    """
    if mask is None or core.normalization.promises.pairs:
        return
    forbidden = mask if mask.dtype == torch.bool else is_forbidden(mask)
    said = _refusal(core, "queries that may not meet one another, as in a causal decoder", "causal")
    if causal:
        raise NotImplementedError(said)
    _require(~forbidden.any(), said)


def _require_whole(core: ConvertedCore, pairs: Tensor, real: Tensor) -> None:
    """Refuse permitted pairs (B, 1 or H, Q, K) that aren't all the real ones (B, 1, Q, K), padding aside."""
    _require((pairs | ~real).all(), _refusal(core, "a mask that forbids single pairs", "pairs"))


def _require(holds: Tensor, said: str) -> None:
    if torch.compiler.is_compiling():
        torch._assert_async(holds, said)
    elif not holds:
        raise NotImplementedError(said)


def _refusal(core: ConvertedCore, given: str, promise: str) -> str:
    name = type(core.normalization).__name__
    return (
        f"{core.layer or 'attention'}: {name} can't honour {given}; leave this layer out by convert(layers=...), or "
        f"use one of {those_that(promise)}"
    )
