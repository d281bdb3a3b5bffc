"""check_normalization passes what keeps the contract and names what doesn't."""

import math
import warnings
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import nn

from sinkformer_pl import ops
from sinkformer_pl.normalizations import AttentionNormalization, Promises, ScoreNormalization, registered
from sinkformer_pl.ops import AttentionMask
from sinkformer_pl.testing import check_normalization

ARGUMENTS = {
    "Entmax": [{"learned": True}, {"alpha": 2.0}],
    "GumbelSinkhorn": [{"n_iters": 1}],
    "ScalableSoftmax": [{"learned": False}],
    "SemiUnbalancedSinkhorn": [{"rho": 2.0, "learned": True}, {"rho": 0.0}, {"rho": math.inf}],
    "LowRankSinkhorn": [{"rank": 2}],
    "Sigmoid": [{"bias": -1.0}],
    "Sinkhorn": [{"n_iters": n} for n in (1, 3, 5, 21)],
    "SlicedTransport": [{"sort_temperature": 0.0}, {"slices": 3}],
    "SymmetricSinkhorn": [{"n_iters": 2}],
}
CONVERGED = {
    "Blend": {"target": partial(registered()["Sinkhorn"], n_iters=101)},
    "GumbelSinkhorn": {"n_iters": 101},
    "LowRankSinkhorn": {"n_iters": 101},
    "SemiUnbalancedSinkhorn": {"rho": math.inf, "n_iters": 101},
    "Sinkhorn": {"n_iters": 101},
    "SlicedTransport": {"sort_temperature": 0.0},
    "SymmetricSinkhorn": {"n_iters": 101},
}
ONE_GRAPH = {"Softmax", "Sinkhorn"}
"""Compiled in the fast suite; for the others it takes most of their time."""


@pytest.mark.parametrize(
    ("name", "given", "compiled"),
    [
        *((name, {}, name in ONE_GRAPH) for name in registered()),
        *(pytest.param(name, {}, True, marks=pytest.mark.slow) for name in registered() if name not in ONE_GRAPH),
        *((name, given, False) for name, several in ARGUMENTS.items() for given in several),
    ],
)
def test_registered_normalizations_keep_the_contract(name, given, compiled):
    factory, converged = (partial(registered()[name], **arguments) for arguments in (given, CONVERGED.get(name, given)))
    check_normalization(factory, converged=converged, compiled=compiled)


# Classes that keep the contract and exercise what the package's own don't.


class Linear(AttentionNormalization):
    """Kernel attention in linear time, with a learned feature map per head."""

    promises = Promises(row_sums="one", equivariant=True, linear=True)

    def build(self, num_heads, head_dim):
        self.shift = nn.Parameter(torch.zeros(num_heads, 1, head_dim))

    def _features(self, q, k, mask, scale, bias):
        if bias is not None or mask.pairs is not None:
            raise NotImplementedError("Linear never forms scores, so it takes no bias and no pairs")
        if isinstance(scale, torch.Tensor):
            scale = scale[:, None, None]
        wide = torch.promote_types(q.dtype, torch.float32)
        q = nn.functional.softplus(q.to(wide) * scale + self.shift).where(mask.query_column(q), 0.0)
        k = nn.functional.softplus(k.to(wide) + self.shift).where(mask.key_row(k.mT).mT, 0.0)
        total = (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
        return q / total.where(total > 0, 1.0), k

    def attend(self, q, k, v, mask, *, scale, bias=None):
        mask = mask or AttentionMask()
        q, k, v = mask.without_padding(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            queries, keys = self._features(q, k, mask, scale, bias)
            return (queries @ (keys.mT @ v.to(keys.dtype))).to(v.dtype)

    def weights(self, q, k, mask, *, scale, bias=None):
        mask = mask or AttentionMask()
        q, k, _ = mask.without_padding(q, k, k)
        with torch.autocast(q.device.type, enabled=False):
            queries, keys = self._features(q, k, mask, scale, bias)
            return (queries @ keys.mT).to(q.dtype)


class Noisy(ScoreNormalization):
    """Softmax of scores with noise in training."""

    promises = Promises(row_sums="one", equivariant=True, pairs=True, causal=True, stochastic=True)

    def forward(self, scores, mask):
        return ops.softmax(scores + torch.randn_like(scores) * self.training, mask=mask)


class Square(ScoreNormalization):
    """Softmax that refuses rectangular scores."""

    promises = Promises(row_sums="one")
    requires_square = True

    def forward(self, scores, mask):
        if scores.shape[-2] != scores.shape[-1] or mask.pairs is not None:
            raise NotImplementedError("square scores without pairs only")
        return ops.softmax(scores, mask=mask)


class Rectified(ScoreNormalization):
    """Sparse weights that sum to nothing in particular, with a learned slope."""

    promises = Promises(sparse=True, equivariant=True, pairs=True, causal=True)

    def build(self, num_heads, head_dim):
        self.slope = nn.Parameter(torch.ones(num_heads, 1, 1))

    def forward(self, scores, mask):
        keys = mask.key_row(scores).expand(*scores.shape[:1], 1, 1, scores.shape[-1]).sum(-1, keepdim=True)
        weights = (self.slope * scores.where(mask.allowed(scores), 0.0)).relu() / keys.clamp(min=1)
        return weights.where(mask.allowed(scores), 0.0)


class Tied(ScoreNormalization):
    """Softmax for queries that are the keys, whatever the mask."""

    promises = Promises(row_sums="one", equivariant=True, pairs=True, causal=True)
    requires_square = True
    requires_tied = True

    def forward(self, scores, mask):
        return ops.softmax(scores, mask=mask)

    def attend(self, q, k, v, mask, *, scale, bias=None):
        if q is not k:
            raise ValueError("give one tensor as q and k")
        return super().attend(q, k, v, mask, scale=scale, bias=bias)

    def weights(self, q, k, mask, *, scale, bias=None):
        if q is not k:
            raise ValueError("give one tensor as q and k")
        return super().weights(q, k, mask, scale=scale, bias=bias)


@pytest.mark.parametrize("factory", [Linear, Noisy, Square, Rectified, Tied])
def test_other_sound_classes_pass(factory):
    check_normalization(factory, compiled=factory is Linear)


# Classes that break one rule each.


class PaddingInMarginal(ScoreNormalization):
    """The column sums see padded queries and keys."""

    promises = Promises(row_sums="one")

    def forward(self, scores, mask):
        ops.sinkhorn(scores[..., :1, :1], 1, mask=AttentionMask(pairs=mask.pairs))
        plan = ops.sinkhorn(scores, 2)
        allowed = mask.allowed(scores)
        plan = plan.where(allowed, 0.0)
        total = plan.sum(-1, keepdim=True)
        return plan / total.where(total > 0, 1.0)


class MagicNumber(ScoreNormalization):
    """-1e4 on masked scores, which the column step undoes."""

    def forward(self, scores, mask):
        ops.sinkhorn(scores[..., :1, :1], 1, mask=AttentionMask(pairs=mask.pairs))
        return ops.sinkhorn(scores.where(mask.allowed(scores), -1e4), 3)


class NanRow(ScoreNormalization):
    """Softmax over -inf alone."""

    promises = Promises(pairs=True, causal=True)

    def forward(self, scores, mask):
        return scores.masked_fill(~mask.allowed(scores), float("-inf")).softmax(-1)


class NanGradient(ScoreNormalization):
    """The NaN is replaced in the output, and stays in the gradient."""

    promises = Promises(pairs=True, causal=True)

    def forward(self, scores, mask):
        allowed = mask.allowed(scores)
        scores = scores.where(mask.query_column(scores) & mask.key_row(scores), 0.0)
        return (scores + allowed.to(scores.dtype).log()).softmax(-1).where(allowed, 0.0)


class _Softmax(ScoreNormalization):
    promises: ClassVar[Promises] = Promises(row_sums="one", pairs=True, causal=True)

    def forward(self, scores, mask):
        return ops.softmax(scores, mask=mask)


SHARED = _Softmax()


class HalfInside(_Softmax):
    def attend(self, q, k, v, mask, *, scale, bias=None):
        if q.dtype != torch.bfloat16 or mask is not None or bias is not None:
            return super().attend(q, k, v, mask, scale=scale, bias=bias)
        scores = q @ k.mT * (scale[:, None, None].to(q.dtype) if isinstance(scale, torch.Tensor) else scale)
        return scores.softmax(-1) @ v


class FloatOutside(_Softmax):
    def attend(self, q, k, v, mask, *, scale, bias=None):
        bias = None if bias is None else bias.float()
        return super().attend(q.float(), k.float(), v.float(), mask, scale=scale, bias=bias)


class Autocasted(_Softmax):
    def attend(self, q, k, v, mask, *, scale, bias=None):
        mask = mask or AttentionMask()
        v = v.where(mask.key_row(v.mT).mT, 0.0)
        return (self.weights(q, k, mask, scale=scale, bias=bias) @ v).to(v.dtype)


class IgnoresPairs(ScoreNormalization):
    promises = Promises(row_sums="one")

    def forward(self, scores, mask):
        return ops.softmax(scores, mask=AttentionMask(mask.query, mask.key))


class IgnoresBias(_Softmax):
    def attend(self, q, k, v, mask, *, scale, bias=None):
        return super().attend(q, k, v, mask, scale=scale)

    def weights(self, q, k, mask, *, scale, bias=None):
        return super().weights(q, k, mask, scale=scale)


class IgnoresScalePerHead(_Softmax):
    def attend(self, q, k, v, mask, *, scale, bias=None):
        scale = scale.mean() if isinstance(scale, torch.Tensor) else scale
        return super().attend(q, k, v, mask, scale=scale, bias=bias)


class WrongRowSums(_Softmax):
    def forward(self, scores, mask):
        return 0.5 * super().forward(scores, mask)


class NotSparse(_Softmax):
    promises = Promises(sparse=True, pairs=True, causal=True)


class NotLinear(_Softmax):
    promises = Promises(linear=True, pairs=True, causal=True)


class TakesRectangles(_Softmax):
    promises = Promises(pairs=True, causal=True)
    requires_square = True


class TakesTwoTensors(_Softmax):
    """Declared tied, but any keys of the right shape are taken."""

    promises = Promises(pairs=True, causal=True)
    requires_square = True
    requires_tied = True

    def forward(self, scores, mask):
        if scores.shape[-2] != scores.shape[-1]:
            raise ValueError("square scores only")
        return super().forward(scores, mask)


class TiedRectangles(_Softmax):
    promises = Promises(pairs=True, causal=True)
    requires_tied = True


class TiedToTheQueries(Tied):
    """The gradient leaves out what comes through the keys."""

    def attend(self, q, k, v, mask, *, scale, bias=None):
        if q is not k:
            raise ValueError("give one tensor as q and k")
        return ScoreNormalization.attend(self, q, k.detach(), v, mask, scale=scale, bias=bias)


class TiedByPosition(Tied):
    def forward(self, scores, mask):
        return super().forward(scores - 0.1 * torch.ones_like(scores).cumsum(-1), mask)


class NotEquivariant(_Softmax):
    promises = Promises(row_sums="one", equivariant=True, pairs=True, causal=True)

    def forward(self, scores, mask):
        position = mask.key_row(scores).expand(*scores.shape[:1], 1, 1, scores.shape[-1]).cumsum(-1)
        return super().forward(scores - 0.1 * position, mask)


class SeesTheFuture(ScoreNormalization):
    """Masked weights are 0, but the rows are divided by what they were before."""

    promises = Promises(pairs=True, causal=True)

    def forward(self, scores, mask):
        weights = ops.softmax(scores, mask=AttentionMask(mask.query, mask.key))
        return weights.where(mask.allowed(scores), 0.0)


class UnusedParameter(_Softmax):
    def build(self, num_heads, head_dim):
        self.spare = nn.Parameter(torch.ones(num_heads))


class DrawnAside(_Softmax):
    def build(self, num_heads, head_dim):
        self.direction = torch.rand(num_heads, 1, 1)

    def forward(self, scores, mask):
        return super().forward(scores * self.direction.to(scores.dtype), mask)


class Detached(_Softmax):
    promises = Promises(pairs=True, causal=True)

    def forward(self, scores, mask):
        return super().forward(scores, mask) * scores.detach().where(mask.allowed(scores), 0.0).sigmoid()


class RandomInTraining(_Softmax):
    def forward(self, scores, mask):
        return nn.functional.dropout(super().forward(scores, mask), 0.5, self.training)


class OwnNoise(_Softmax):
    """Declared stochastic, but its noise isn't that of the seeded generator."""

    promises = Promises(pairs=True, causal=True, stochastic=True)

    def build(self, num_heads, head_dim):
        self.generator = torch.Generator()

    def forward(self, scores, mask):
        noise = torch.randn(scores.shape, generator=self.generator, dtype=scores.dtype)
        return super().forward(scores + noise if self.training else scores, mask)


class Counts(_Softmax):
    """Its results drift with the number of calls."""

    def attend(self, q, k, v, mask, *, scale, bias=None):
        self.calls = getattr(self, "calls", 0) + 1
        return super().attend(q, k, v, mask, scale=scale, bias=bias) * (1 + self.calls * 1e-12)


class Overflows(_Softmax):
    def forward(self, scores, mask):
        allowed = mask.allowed(scores)
        weights = scores.where(allowed, 0.0).exp().where(allowed, 0.0)
        return weights / weights.sum(-1, keepdim=True).where(allowed.any(-1, keepdim=True), 1.0)


class BatchStatistics(_Softmax):
    """Divides by the largest score of the batch."""

    def forward(self, scores, mask):
        largest = scores.where(mask.allowed(scores), 0.0).abs().amax((0, 2, 3), keepdim=True)
        return super().forward(scores / largest.clamp(min=0.1), mask)


class InPlace(_Softmax):
    def attend(self, q, k, v, mask, *, scale, bias=None):
        with torch.no_grad():
            v.clamp_(max=0.5)
        return super().attend(q, k, v, mask, scale=scale, bias=bias)


class Item(_Softmax):
    def forward(self, scores, mask):
        largest = (
            nn.functional.pad(scores.detach().where(mask.allowed(scores), 0.0), (0, 1, 0, 1)).amax((-2, -1)).max(-1)[0]
        )
        values = scores.detach().where(mask.allowed(scores), 0.0).flatten()
        largest = nn.functional.pad(values, (0, 1)).max().item()
        return super().forward(scores - largest, mask)


class ClampsTheBias(_Softmax):
    """What a bias forbids keeps a small weight."""

    def attend(self, q, k, v, mask=None, *, bias=None, **options):
        return super().attend(q, k, v, mask, bias=None if bias is None else bias.clamp(min=-30.0), **options)

    def weights(self, q, k, mask=None, *, bias=None, **options):
        return super().weights(q, k, mask, bias=None if bias is None else bias.clamp(min=-30.0), **options)


class NoTokens(_Softmax):
    def forward(self, scores, mask):
        scores.where(mask.allowed(scores), 0.0).amax(-1)
        return super().forward(scores, mask)


class TakesABiasUnsaid(_Softmax):
    takes_bias = False


class Crashes(_Softmax):
    def forward(self, scores, mask):
        return scores.no_such_method()


@pytest.mark.parametrize(
    ("factory", "check", "message"),
    [
        (PaddingInMarginal, "padding", "queries, . keys of padding"),
        (MagicNumber, "masks", "masked weights must be exactly 0"),
        (NanRow, "masks", "attend has NaN"),
        (NanGradient, "masks", "gradient of q has NaN"),
        (HalfInside, "precision", r"bfloat16, scale .* mask: none"),
        (FloatOutside, "shapes", "attend is torch.float32"),
        (Autocasted, "autocast", "attend, against no autocast"),
        (IgnoresPairs, "refusals", "a mask with pairs was taken"),
        (IgnoresBias, "bias", "against queries and keys of the same scores"),
        (IgnoresScalePerHead, "scale", "attend of head 0"),
        (WrongRowSums, "row_sums", r"declared 'one', but a row sums to \[0.[45]"),
        (NotSparse, "sparse", "none is"),
        (NotLinear, "linear", "512 and 1024 tokens"),
        (TakesRectangles, "refusals", "fewer queries than keys"),
        (TakesTwoTensors, "refusals", "two tensors were taken"),
        (TiedRectangles, "instances", "requires_square too"),
        (TiedToTheQueries, "gradients", "GradcheckError"),
        (TiedByPosition, "equivariant", "of permuted queries and keys"),
        (NotEquivariant, "equivariant", "of permuted queries and keys"),
        (SeesTheFuture, "bias", "1e30 outside of the mask"),
        (UnusedParameter, "parameters", "no gradient for spare"),
        (DrawnAside, "state", "after load_state_dict"),
        (Detached, "gradients", "GradcheckError"),
        (RandomInTraining, "repeatable", "training mode"),
        (OwnNoise, "repeatable", "same seed"),
        (Counts, "repeatable", "evaluation mode"),
        (Overflows, "extremes", "NaN"),
        (BatchStatistics, "batch", "alone"),
        (InPlace, "shapes", "an input changed"),
        (Item, "compile", r"\.item\(\)"),
        (ClampsTheBias, "forbidden", "the weights that it forbids must be exactly 0"),
        (NoTokens, "no_tokens", "IndexError"),
        (TakesABiasUnsaid, "bias", "takes_bias is False, but a bias was taken"),
        (Crashes, "shapes", "AttributeError: .*no_such_method"),
        (lambda: nn.Softmax(-1), "instances", "Softmax is no subclass"),
        (lambda: SHARED, "instances", "one object"),
    ],
)
def test_a_broken_rule_is_named(factory, check, message):
    expected = rf"fails the check '{check}'\n  rule: .*\n  found: (?s:.*){message}"
    with pytest.raises(AssertionError, match=expected) as error:
        check_normalization(factory, compiled=factory is Item)
    if isinstance(factory, type):
        assert str(error.value).startswith(factory.__name__)


class Iterated(ScoreNormalization):
    promises = Promises(row_sums="one", unit_columns=True, equivariant=True)

    def __init__(self, n_iters=1):
        super().__init__()
        self.n_iters = n_iters

    def forward(self, scores, mask):
        return ops.sinkhorn(scores, self.n_iters, mask=mask)


def test_claims_about_the_limit_that_werent_checked_are_said():
    with pytest.warns(
        UserWarning, match=r"Iterated.* passes.*unit_columns.*off by .*converged=functools.partial\(Iterated"
    ):
        check_normalization(Iterated, compiled=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_normalization(Iterated, converged=partial(Iterated, n_iters=101), compiled=False)
    with pytest.raises(AssertionError, match="argument `converged`"):
        check_normalization(Iterated, converged=partial(Iterated, n_iters=3), compiled=False)


def test_dtypes_can_be_left_out():
    check_normalization(HalfInside, dtypes=(torch.float32, torch.float16), compiled=False)
