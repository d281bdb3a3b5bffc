"""Checks of what a normalization is, and of what `attend` and `weights` take and give."""

from dataclasses import replace

import torch

from sinkformer_pl.normalizations.contract import AttentionNormalization, ScoreNormalization
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.testing.comparing import all_close, close, require
from sinkformer_pl.testing.subject import Subject


def instances(s: Subject) -> None:
    """The factory makes a new AttentionNormalization at each call, since every layer owns its instance."""
    first, second = s.factory(), s.factory()
    s.name = type(first).__name__
    require(isinstance(first, AttentionNormalization), f"{s.name} is no subclass of it; start from ScoreNormalization")
    require(first is not second, "two calls gave one object")
    require(isinstance(first.promises, Promises), "the attribute `promises` must be a Promises(...)")
    s.promises, s.requires_square, s.requires_tied = first.promises, first.requires_square, first.requires_tied
    require(s.requires_square or not s.requires_tied, "tied queries and keys are as many: requires_square too")


def shapes(s: Subject) -> None:
    """The output is (B, H, Q, Dv), weights are (B, H, Q, K), both in the dtype of q; inputs aren't changed in place."""
    for dtype in s.dtypes:
        for case in s.cases(dtype):
            before, results = case.map(torch.clone).tensors(), s.run(s.make(dtype), case)
            for name, width in (("attend", case.v.shape[-1]), ("weights", case.k.shape[-2])):
                got, wanted = results[name], (*case.q.shape[:-1], width)
                require(got.shape == wanted, f"{name} has shape {tuple(got.shape)} instead of {wanted}")
                require(got.dtype == dtype, f"{name} is {got.dtype}")
            require(all(x.equal(before[name]) for name, x in case.tensors().items()), "an input changed")


def attend(s: Subject) -> None:
    """The output of attend equals weights @ v."""
    for case in s.cases():
        results = s.run(s.make(), case)
        close(results["attend"], results["weights"] @ case.v, "attend, against weights @ v")


def scale(s: Subject) -> None:
    """The scale of q @ k.mT is a number, or a tensor (H,) with one for each head."""
    scales = torch.arange(1, s.num_heads + 1, dtype=torch.float64) / 3
    for case in s.cases():
        module = s.make()
        found = s.run(module, replace(case, scale=scales))
        for head, number in enumerate(scales.tolist()):
            wanted = s.run(module, replace(case, scale=number))
            for name in ("attend", "weights"):
                close(found[name][:, head], wanted[name][:, head], f"{name} of head {head}")
        if isinstance(module, ScoreNormalization):
            scaled = case.map(lambda x: x * scales.sqrt()[:, None, None], "q", "k")
            wanted = s.run(module, replace(scaled, scale=1.0))
            all_close(found, wanted, "against scaled queries and keys", "attend", "weights")


def bias(s: Subject) -> None:
    """A bias is added to scale * q @ k.mT, in attend and in weights; or takes_bias is False and both refuse it."""
    require(s.make().takes_bias or not s.takes_bias, "takes_bias is False, but a bias was taken")
    if not s.takes_bias:
        return
    for case in s.cases():
        module, other = s.make(), replace(case.map(lambda x: x.roll(1, 0), "q", "k"), bias=None)
        added = case.scale * (other.q @ other.k.mT - case.q @ case.k.mT)
        found, wanted = s.run(module, replace(case, bias=added)), s.run(module, other)
        all_close(found, wanted, "against queries and keys of the same scores", "attend", "weights")
        hidden = replace(case, bias=added.where(case.allowed(), 1e30))
        all_close(s.run(module, hidden), found, "with a bias of 1e30 outside of the mask")
