"""Rehearse a normalization before a run: a padded batch against its samples, with the mistakes that are made most."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sinkformer_pl.errors import UserError
from sinkformer_pl.normalizations.contract import AttentionNormalization, ScoreNormalization
from sinkformer_pl.ops.mask import AttentionMask, Mask

TOKENS = 6
"""Length of the longer sample; the shorter one has two tokens of padding behind it."""


def rehearse(normalization: AttentionNormalization, num_heads: int, head_dim: int) -> None:
    """Refuse a normalization that would train wrongly, or fail in its first step, in milliseconds.

    A copy of it, in evaluation mode, attends on two samples of unequal length, in one padded batch and each alone. It
    looks at what changes results; `check_normalization` holds a class to all of its contract.

    Args:
        normalization: built by the layer that owns it.
        num_heads: of that layer.
        head_dim: of that layer.

    Raises:
        UserError: names the class, the rule of the contract that it breaks, and what it did.
    """
    name, module = type(normalization).__name__, copy.deepcopy(normalization).eval()
    known = dict(module.named_parameters())
    with torch.random.fork_rng(devices=()), torch.no_grad():
        q, k, v, mask = _draw(module, num_heads, head_dim)
        if isinstance(module, ScoreNormalization):
            _check_forward(module, q @ k.mT / math.sqrt(head_dim), mask)
        output = _attend(module, q, k, v, mask)
        made = [key for key in dict(module.named_parameters()) if key not in known]
        if made:
            raise UserError(
                f"{name} makes the parameter {made[0]} when it is called, too late for optimizer and checkpoints: make "
                "it in __init__, or in build(num_heads, head_dim) if it depends on the heads"
            )
        for sample, length in enumerate((TOKENS, TOKENS - 2)):
            one = slice(sample, sample + 1)
            single = q[one, :, :length]
            alone = _attend(module, single, single if k is q else k[one, :, :length], v[one, :, :length], None)
            error = float((output[one, :, :length] - alone).abs().max())
            if not error <= 1e-3:
                raise UserError(
                    f"{name} breaks the rule that a padded batch gives what its samples give alone: one of {length} "
                    f"tokens, padded to {TOKENS}, is off by {error:.2g}; count real tokens, by mask.key_row(scores) "
                    "and mask.query_column(scores) (docs/extend.md)"
                )


def _draw(
    module: AttentionNormalization, num_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor, AttentionMask]:
    parameter = next(module.parameters(), torch.empty(()))
    place: dict[str, Any] = {"device": parameter.device}
    if parameter.is_floating_point():
        place["dtype"] = torch.promote_types(parameter.dtype, torch.float32)
    torch.manual_seed(0)
    q, k = (torch.randn(2, num_heads, TOKENS, head_dim, **place) for _ in range(2))
    v = torch.randn(2, num_heads, TOKENS, head_dim + 1, **place)
    real = torch.arange(TOKENS, device=q.device) < torch.tensor([[TOKENS], [TOKENS - 2]], device=q.device)
    return q, q if module.requires_tied else k, v, AttentionMask(real, real)


def _check_forward(module: ScoreNormalization, scores: Tensor, mask: AttentionMask) -> None:
    where = f"{type(module).__name__}.forward"
    weights = _call(where, module, scores.clone(), mask)
    _require_like(where, "weights", weights, scores, "(B, H, Q, K), each head its own")
    real = mask.query_column(scores)
    wrong = weights.where(real & ~mask.key_row(scores), 0.0).abs().max()
    if not wrong == 0:
        raise UserError(
            f"{where} breaks the rule that masked weights are exactly 0: a padded key has weight {float(wrong):.2g}; "
            "scores must not count where mask.allowed(scores) is False (docs/extend.md)"
        )


def _attend(module: AttentionNormalization, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    where = f"{type(module).__name__}.attend"
    output = _call(where, module.attend, q, k, v, mask, scale=1 / math.sqrt(q.shape[-1]))
    _require_like(where, "weights times values", output, v, "(B, H, Q, Dv)")
    return output


def _call(where: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    try:
        return function(*arguments, **named)
    except UserError:
        raise
    except Exception as error:  # A user's module can raise anything.
        raise UserError(f"{where} fails on a padded batch: {type(error).__name__}: {error}") from error


def _require_like(where: str, what: str, found: Any, wanted: Tensor, axes: str) -> None:
    if not isinstance(found, Tensor):
        returned = "None" if found is None else f"a {type(found).__name__}"
        raise UserError(f"{where} returned {returned}: return the {what}, a tensor {axes}")
    if found.shape != wanted.shape:
        raise UserError(
            f"{where} returned shape {tuple(found.shape)} where {tuple(wanted.shape)} is due: {what} are {axes}"
        )
    if found.dtype != wanted.dtype:
        raise UserError(
            f"{where} returned {found.dtype} for inputs of {wanted.dtype}: {what} have the dtype of the inputs"
        )
