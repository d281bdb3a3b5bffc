"""Checks of masks and padding: nothing but what is real counts."""

import math
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from sinkformer_pl.ops.mask import AttentionMask
from sinkformer_pl.testing.cases import draw, token_mask
from sinkformer_pl.testing.comparing import EXACT, all_close, close, finite, zero
from sinkformer_pl.testing.subject import Subject


def masks(s: Subject) -> None:
    """Masked weights are exactly 0; a query without a key gives a row of 0 and a gradient of 0, never NaN."""
    for std in (1, 30):
        for case in s.cases(std=std):
            results, allowed = s.run(s.make(), case), case.allowed()
            finite(results)
            zero(results["weights"][~allowed], "masked weights")
            idle = ~allowed.any(-1)
            zero(results["attend"][idle], "attend of a padded query or one without a key")
            idle = idle & ~allowed.any(-2) if case.tied else idle  # the same tensor counts as a key
            zero(results["gradient of q"][idle], "gradient of q of a padded query or one without a key")


def padding(s: Subject) -> None:
    """A padded batch gives what it gives unpadded, gradients too, whatever finite numbers the padding holds."""
    amounts = ((1, 1), (7, 7), (64, 64)) if s.requires_square else ((1, 7), (7, 1), (0, 64), (64, 0))
    for dtype in EXACT:
        module, case = s.make(dtype), s.case(dtype=dtype)
        plain = s.run(module, case)
        for (queries, keys), left, filler in product(amounts, (True, False), (-3.0, 1e30)):
            rows, columns = _real(case.q.shape[-2], queries, left), _real(case.k.shape[-2], keys, left)
            real = {"q": rows[:, None], "attend": rows[:, None], "k": columns[:, None], "v": columns[:, None]}
            real |= {"bias": rows[:, None] & columns, "weights": rows[:, None] & columns}
            tensors = {name: _pad(x, real[name], filler) for name, x in case.tensors().items()}
            mask = token_mask(case.tied, *(x.expand(len(case.q), -1) for x in (rows, columns)))
            words = f"{queries} queries, {keys} keys of padding {'left' if left else 'right'}, filled with {filler:g}"
            upstream = _pad(draw(plain["attend"].shape, dtype), real["attend"], 1.0)
            found = s.run(module, case.put(tensors, mask=mask, words=words), upstream)
            for name, wanted in plain.items():
                block = real.get(name.removeprefix("gradient of "), torch.tensor(True)).expand_as(found[name])
                zero(found[name][~block], f"{name} at the padding")
                close(found[name][block].reshape(wanted.shape), wanted, f"{name}, against unpadded")


def forbidden(s: Subject) -> None:
    """A bias of -inf, or at or below -1e9, forbids: weight 0, and a key that nobody may meet is as a padded one."""
    if not s.takes_bias:
        return
    for case, value in product((s.case("none"), s.case("padding")), (-math.inf, -1e9, torch.finfo(torch.float32).min)):
        assert case.bias is not None
        module, mask = s.make(), case.mask or AttentionMask()
        at = {"entry": (0, slice(None), 0, 1), "row": (0, slice(None), 0), "head": (0, 0, slice(None), 1)}
        for words, place in {**at, "key": (0, slice(None), slice(None), 1)}.items():
            bias = case.bias.clone()
            bias[place] = value
            found = s.run(module, replace(case, bias=bias, words=f"{case.words}, a bias of {value:g}, one {words}"))
            finite(found)
            zero(found["weights"][place], "the weights that it forbids")
            zero(found["gradient of bias"][place], "the gradient where it forbids")
            if words == "key" and not case.tied:
                key = torch.ones(case.k.shape[0], case.k.shape[-2], dtype=torch.bool) if mask.key is None else mask.key
                key = key.index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(False))
                wanted = s.run(module, replace(case, mask=replace(mask, key=key)))
                all_close(found, wanted, "against that key padded")


def no_tokens(s: Subject) -> None:
    """No query, no key and no sample are no error: zeros, or nothing."""
    sizes: list[dict[str, Any]] = [{"batch": 0}, {"queries": 0, "keys": 0}]
    for given in sizes if s.requires_square else [*sizes, {"queries": 0}, {"keys": 0}]:
        results = s.run(s.make(), s.case(**given))
        for name in ("attend", "weights"):
            zero(results[name], name)
        finite({name: x for name, x in results.items() if "gradient" in name})


def _real(count: int, more: int, left: bool) -> Tensor:
    """Mark the real ones of count + more tokens, with padding on one side."""
    at = torch.arange(count + more)
    return at >= more if left else at < count


def _pad(x: Tensor, real: Tensor, filler: float) -> Tensor:
    """Put the rows and columns of x where `real` is True, and the filler around them."""
    rows, columns = (max(sizes) for sizes in zip(x.shape[-2:], real.shape, strict=True))
    return x.new_full((*x.shape[:-2], rows, columns), filler).masked_scatter(real, x)


def batch(s: Subject) -> None:
    """A sample gives the same alone and in a batch of 8."""
    for case, i in product(s.cases(batch=8), (0, 7)):
        module, one = s.make(), slice(i, i + 1)
        together = s.run(module, case)
        alone = s.run(module, case.select(samples=one), draw(together["attend"].shape, torch.float64)[one])
        wanted = {name: x[one] for name, x in together.items() if "parameter" not in name}
        all_close(alone, wanted, f"sample {i} alone")


def all_real(s: Subject) -> None:
    """No mask, an empty AttentionMask and one that is True everywhere mean the same."""
    case, module = s.case(), s.make()
    wanted = s.run(module, case)
    full = token_mask(case.tied, *(torch.ones(len(x), x.shape[-2], dtype=torch.bool) for x in (case.q, case.k)))
    for mask, words in ((AttentionMask(), "AttentionMask()"), (full, "True everywhere")):
        all_close(s.run(module, replace(case, mask=mask, words=words)), wanted, "against mask=None")
