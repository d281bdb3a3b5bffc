"""Entries of a bias that forbid a pair: the additive masks of other libraries, under one rule.

An entry of -inf, at or below -1e9, or the lowest finite number of its dtype forbids its pair: the weight is 0, and the
gradient of the entry too. A key that is forbidden to all real queries of a sample in all heads is no key of that
sample: it leaves the marginals, as padding does. No finite number would do that, since a column step undoes any offset.
A query all of whose keys are forbidden has a row of 0.
"""

from dataclasses import replace

import torch
from torch import Tensor

from sinkformer_pl.ops.mask import AttentionMask, Mask, is_forbidden


def forbid(bias: Tensor | None, mask: Mask, scores: Tensor) -> tuple[Tensor | None, AttentionMask]:
    """Apply the rule to a bias: -inf at the entries that forbid, and a mask without the keys that nobody may meet.

    Tensor operations alone, so no wait for a device. Applied twice it changes nothing more.

    Args:
        bias: broadcastable to the scores, of any float dtype, or None, which leaves the mask as it is.
        mask: real queries and keys; None is all.
        scores: (..., Q, K), whose first axis is the sample; only shape and device matter.

    Raises:
        TypeError: a bias of no float dtype.
        ValueError: a bias that doesn't broadcast to the scores.
    """
    bias, mask, forbidden = _apply(bias, mask, scores)
    if bias is None or forbidden is None:
        return bias, mask
    return bias.masked_fill(forbidden, -torch.inf), mask


def forbid_pairs(bias: Tensor | None, mask: Mask, scores: Tensor) -> tuple[Tensor | None, AttentionMask]:
    """Apply the rule as `forbid` does, for what honours pairs: a bias of 0 at the entries that forbid, and pairs.

    Arguments and errors as of `forbid`; scores are (B, H, Q, K).
    """
    bias, mask, forbidden = _apply(bias, mask, scores)
    if bias is None or forbidden is None:
        return bias, mask
    permitted = ~_with_axes_of(scores, forbidden)
    pairs = permitted if mask.pairs is None else mask.pairs & permitted
    return bias.masked_fill(forbidden, 0.0), replace(mask, pairs=pairs)


def _apply(bias: Tensor | None, mask: Mask, scores: Tensor) -> tuple[Tensor | None, AttentionMask, Tensor | None]:
    mask = mask or AttentionMask()
    if bias is None:
        return None, mask, None
    forbidden = is_forbidden(bias)
    permitted = ~_with_axes_of(scores, forbidden)
    heads = tuple(range(1, scores.ndim - 2))
    # Heads first: they may be many, and real queries are the same in all of them.
    some_head = permitted.any(heads, keepdim=True) if heads else permitted
    met = (some_head & mask.query_column(scores)).any(-2, keepdim=True) & mask.key_row(scores)
    samples, keys = scores.shape[0] if scores.ndim > 2 else 1, scores.shape[-1]
    met = met.expand(samples, *met.shape[1:-1], keys) if scores.ndim > 2 else met.expand(1, keys)
    return bias, replace(mask, key=met.reshape(samples, keys)), forbidden


def _with_axes_of(scores: Tensor, entries: Tensor) -> Tensor:
    """Add leading axes of size 1, so that entries have all the axes of the scores."""
    shape = (1,) * (scores.ndim - entries.ndim) + tuple(entries.shape)
    if len(shape) > scores.ndim or any(a not in (1, b) for a, b in zip(shape, scores.shape, strict=True)):
        raise ValueError(f"a bias {tuple(entries.shape)} doesn't broadcast to scores {tuple(scores.shape)}")
    return entries.reshape(shape)
