"""The contract of a normalization as one call, for this package's own classes and for yours."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from sinkformer_pl.normalizations.base import (
    AttentionNormalization,
    Guarantees,
    NormalizationFactory,
    ScoreNormalization,
)
from sinkformer_pl.ops.mask import AttentionMask, causal_pairs

_EXACT = {torch.float64: 1e-10, torch.float32: 2e-6}
_ROUNDED = {  # for scores of standard deviation 1 and 10: relative errors of output and gradients against float64
    torch.float64: {1: (1e-13, 1e-12), 10: (1e-12, 1e-11)},
    torch.float32: {1: (2e-6, 2e-6), 10: (5e-6, 1e-5)},
    torch.bfloat16: {1: (4e-3, 6e-3), 10: (4e-3, 6e-3)},
    torch.float16: {1: (5e-4, 1e-3), 10: (5e-4, 1e-3)},
}


def check_normalization(
    factory: NormalizationFactory,
    *,
    converged: NormalizationFactory | None = None,
    dtypes: Sequence[torch.dtype] = tuple(_ROUNDED),
    num_heads: int = 2,
    head_dim: int = 8,
    seed: int = 0,
    compiled: bool = True,
) -> None:
    """Hold a normalization to the contract and to the guarantees that its class declares.

    `check_normalization(MyNormalization)` is a complete test: small inputs, on the CPU, in a few seconds. It stops at
    the first rule that is broken.

    Args:
        factory: makes a new normalization at each call: a class, or `functools.partial(MyNormalization, k=3)`.
        converged: the same with iterations enough for columns to sum to Q/K; only used if `unit_columns` is declared.
            Default: `factory`.
        dtypes: those of float64, float32, bfloat16, float16 that it must take; the first two are used in any case.
        num_heads: heads that it is built for.
        head_dim: width of queries and keys that it is built for; values are two narrower.
        seed: of the inputs, and of what the normalization draws when it is made.
        compiled: also ask for one graph from `torch.compile`, the slowest of the checks.

    Raises:
        AssertionError: the message names the class, the rule, what came instead and the input.
    """
    subject = _Subject(factory, converged or factory, tuple(dtypes), num_heads, head_dim, seed)
    for check in _CHECKS[: None if compiled else -1]:
        try:
            check(subject)
        except Exception as error:
            expected = isinstance(error, AssertionError)
            found = str(error) if expected else f"{type(error).__name__}: {error}"
            seen = f"\n  input: {subject.seen}" if subject.seen else ""
            name, rule = check.__name__.lstrip("_"), check.__doc__
            message = f"{subject.name} fails the check '{name}'\n  rule: {rule}\n  found: {found}{seen}"
            raise AssertionError(message) from (None if expected else error)


@dataclass(frozen=True)
class _Case:
    """One input, and the words for it."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: AttentionMask | None
    scale: float | Tensor
    words: str

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in self.tensors().items())
        return f"{shapes}, {self.q.dtype}, scale {self.scale}, mask: {self.words}"

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"q": self.q, "k": self.k, "v": self.v}
        return tensors if self.bias is None else {**tensors, "bias": self.bias}

    def map(self, change: Callable[[Tensor], Tensor]) -> "_Case":
        return self.using({name: change(x) for name, x in self.tensors().items()})

    def using(self, tensors: dict[str, Tensor]) -> "_Case":
        return replace(self, q=tensors["q"], k=tensors["k"], v=tensors["v"], bias=tensors.get("bias"))

    def allowed(self) -> Tensor:
        like = self.q.new_empty(()).expand(*self.q.shape[:-1], self.k.shape[-2])
        return (self.mask or AttentionMask()).allowed(like).expand(like.shape)


class _Attend(nn.Module):
    """A normalization whose forward is attend and weights, for functional_call and compile."""

    def __init__(self, module: AttentionNormalization) -> None:
        super().__init__()
        self.module = module

    def forward(self, q, k, v, bias, mask, scale) -> tuple[Tensor, Tensor]:
        named = {"scale": scale, "bias": bias}
        return self.module.attend(q, k, v, mask, **named), self.module.weights(q, k, mask, **named)


@dataclass
class _Subject:
    """The normalization under test: its instances, its inputs and its results."""

    factory: NormalizationFactory
    converged: NormalizationFactory
    dtypes: tuple[torch.dtype, ...]
    num_heads: int
    head_dim: int
    seed: int
    name: str = "the factory"
    guarantees: Guarantees = Guarantees()  # noqa: RUF009 (frozen)
    seen: _Case | None = None

    def make(self, dtype=torch.float64, *, factory: NormalizationFactory | None = None, seed=0):
        """A new instance for evaluation, built as an attention layer does; parameters in float32 or above."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed + seed)
            module = (factory or self.factory)()
            module.build(self.num_heads, self.head_dim)
        return module.to(torch.promote_types(dtype, torch.float32)).eval()

    def run(self, module: AttentionNormalization, case: _Case, upstream: Tensor | None = None, autocast=False):
        """Results by name: attend, weights, and the gradients of the product of attend's output with `upstream`."""
        self.seen, case = case, case.map(lambda x: x.detach().requires_grad_())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output, weights = _Attend(module)(case.q, case.k, case.v, case.bias, case.mask, case.scale)
        _require(output.requires_grad, "attend gives no gradient: something is detached or under no_grad")
        leaves = case.tensors() | {f"parameter {name}": x for name, x in _trained(module).items()}
        upstream = _draw(output.shape, output.dtype) if upstream is None else upstream
        gradients = torch.autograd.grad(output, list(leaves.values()), upstream, materialize_grads=True)
        named = {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
        return {"attend": output.detach(), "weights": weights.detach(), **named}

    def refuses(self, case: _Case) -> bool:
        """Whether an input is refused with ValueError or NotImplementedError: by attend and weights, or by neither."""
        self.seen, module, refusals = case, self.make(), 0
        attend, weights = partial(module.attend, case.q, case.k, case.v), partial(module.weights, case.q, case.k)
        for call in (attend, weights):
            try:
                call(case.mask, scale=case.scale, bias=case.bias)
            except (NotImplementedError, ValueError):
                refusals += 1
        _require(refusals != 1, "one of attend and weights refuses this input, the other takes it without a word")
        return refusals == 2

    @cached_property
    def takes_bias(self) -> bool:
        return not self.refuses(self.case(bias=True))

    def cases(self, dtype=torch.float64, **sizes) -> Iterator[_Case]:
        """One input with every kind of mask that is to be honoured."""
        g = self.guarantees
        kinds = ["none", "padding", "empty sample", *["pairs"] * g.pairs, *["causal"] * g.causal]
        return (self.case(kind, dtype, **sizes) for kind in kinds)

    def case(self, kind="none", dtype=torch.float64, *, batch=2, queries=5, keys=7, std=1.0, bias: bool | None = None):
        """An input with scores of the given standard deviation; as many queries as keys where that is needed."""
        keys = queries if self.guarantees.square or kind == "causal" else keys

        def tokens(count: int, width: int, seed: int) -> Tensor:  # heads come transposed from an attention layer
            return _draw((batch, count, self.num_heads, width), dtype, self.seed + seed).transpose(1, 2)

        q, k, v = tokens(queries, self.head_dim, 1), tokens(keys, self.head_dim, 2), tokens(keys, self.head_dim - 2, 3)
        some_bias = _draw((batch, self.num_heads, queries, keys), dtype, self.seed + 4) * std
        some_bias = some_bias if (self.takes_bias if bias is None else bias) else None
        return _Case(q, k, v, some_bias, self._mask(kind, batch, queries, keys), std / math.sqrt(self.head_dim), kind)

    def _mask(self, kind: str, batch: int, queries: int, keys: int) -> AttentionMask | None:
        samples, rows, columns = torch.arange(batch)[:, None], torch.arange(queries), torch.arange(keys)
        if kind == "none":
            return None
        if kind == "causal":
            return AttentionMask(pairs=causal_pairs(queries, keys))
        if kind == "empty sample":
            real = (samples > 0).expand(batch, keys)
            return AttentionMask(real if self.guarantees.square else None, real)
        mask = AttentionMask(*((x + samples) % 3 != 2 for x in (rows, columns)))
        heads = torch.arange(self.num_heads)[:, None, None]
        pairs = ((rows[:, None] + columns + heads) % 3 != 0) & (rows[:, None] > 0)  # query 0 meets no key
        return replace(mask, pairs=pairs[None]) if kind == "pairs" else mask


def _draw(shape: Sequence[int], dtype: torch.dtype, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _require(holds: bool | Tensor, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _close(got: Tensor, want: Tensor, tolerance: float, what: str, floor: float = 1.0) -> None:
    """Compare in the relative Frobenius norm; NaN is never close."""
    _require(got.shape == want.shape, f"{what} has shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    difference = got.double() - want.double()
    error = float(difference.norm() / want.double().norm().clamp(min=floor))
    if not error <= tolerance:
        worst = torch.unravel_index(difference.abs().nan_to_num(math.inf).argmax(), difference.shape)
        at = tuple(int(i) for i in worst)
        values = f"{float(got[at]):.6g} instead of {float(want[at]):.6g} at {at}"
        raise AssertionError(f"{what}: {values}; relative error {error:.1e}, allowed {tolerance:.1e}")


def _all_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, what: str) -> None:
    for name, values in want.items():
        _close(got[name], values, tolerance, f"{name}, {what}")


def _zero(values: Tensor, what: str) -> None:
    wrong = values[values != 0].tolist()  # NaN is wrong too
    _require(not wrong, f"{what} must be exactly 0, found {', '.join(f'{x:.3g}' for x in wrong[:3])}")


def _finite(results: dict[str, Tensor]) -> None:
    for name, values in results.items():
        _require(values.isfinite().all(), f"{name} has NaN or infinity")


def _instances(s: _Subject) -> None:
    """The factory makes a new AttentionNormalization at each call, since every layer owns its instance."""
    first, second = s.factory(), s.factory()
    s.name = type(first).__name__
    _require(isinstance(first, AttentionNormalization), f"{s.name} is no subclass of it; start from ScoreNormalization")
    _require(first is not second, "two calls gave one object")
    _require(isinstance(first.guarantees, Guarantees), "the attribute `guarantees` must be a Guarantees(...)")
    s.guarantees = first.guarantees


def _shapes(s: _Subject) -> None:
    """The output is (B, H, Q, Dv), weights are (B, H, Q, K), both in the dtype of q; inputs aren't changed in place."""
    for dtype in s.dtypes:
        for case in s.cases(dtype):
            before, results = case.map(torch.clone), s.run(s.make(dtype), case)
            for name, width in (("attend", case.v.shape[-1]), ("weights", case.k.shape[-2])):
                got, wanted = results[name], (*case.q.shape[:-1], width)
                _require(got.shape == wanted, f"{name} has shape {tuple(got.shape)} instead of {wanted}")
                _require(got.dtype == dtype, f"{name} is {got.dtype}")
            _require(all(x.equal(before.tensors()[name]) for name, x in case.tensors().items()), "an input changed")


def _refusals(s: _Subject) -> None:
    """What isn't declared is refused by NotImplementedError or ValueError, not ignored: pairs, causal, rectangles."""
    case, g = s.case("pairs", bias=False), s.guarantees
    if g.square:
        _require(s.refuses(replace(s.case(bias=False), q=case.q[..., 1:, :])), "fewer queries than keys were taken")
    if not g.pairs:
        _require(s.refuses(case), "a mask with pairs was taken")
    if not g.pairs and not g.causal:
        _require(s.refuses(s.case("causal", bias=False)), "a mask with causal pairs was taken")


def _attend(s: _Subject) -> None:
    """The output of attend equals weights @ v."""
    for case in s.cases():
        results = s.run(s.make(), case)
        _close(results["attend"], results["weights"] @ case.v, _EXACT[torch.float64], "attend, against weights @ v")


def _masks(s: _Subject) -> None:
    """Masked weights are exactly 0; a query without a key gives a row of 0 and a gradient of 0, never NaN."""
    for std in (1, 30):
        for case in s.cases(std=std):
            results, allowed = s.run(s.make(), case), case.allowed()
            _finite(results)
            _zero(results["weights"][~allowed], "masked weights")
            for name in ("attend", "gradient of q"):
                _zero(results[name][~allowed.any(-1)], f"{name} of a padded query or one without a key")


def _padding(s: _Subject) -> None:
    """A padded batch gives what it gives unpadded, gradients too, whatever finite numbers the padding holds."""
    amounts = ((1, 1), (7, 7)) if s.guarantees.square else ((1, 7), (7, 1), (0, 7), (7, 0))
    for dtype, tolerance in _EXACT.items():
        module, case = s.make(dtype), s.case(dtype=dtype)
        plain = s.run(module, case)
        for (queries, keys), left, filler in product(amounts, (True, False), (-3.0, 1e30)):
            both, extra = (queries, keys), {"q": (queries, 0), "attend": (queries, 0), "k": (keys, 0), "v": (keys, 0)}
            extra |= {"bias": both, "weights": both}
            tensors = {name: _grow(x, extra[name], left, filler) for name, x in case.tensors().items()}
            real = (torch.ones(len(x), x.shape[-2]) for x in (case.q, case.k))
            mask = AttentionMask(*(_grow(x, (0, n), left) > 0 for x, n in zip(real, (queries, keys), strict=True)))
            words = f"{queries} queries, {keys} keys of padding {'left' if left else 'right'}, filled with {filler:g}"
            upstream = _grow(_draw(plain["attend"].shape, dtype), (queries, 0), left, 1.0)
            found = s.run(module, replace(case.using(tensors), mask=mask, words=words), upstream)
            for name, wanted in plain.items():
                block = _grow(torch.ones_like(wanted), extra.get(name.removeprefix("gradient of "), (0, 0)), left) > 0
                _zero(found[name][~block], f"{name} at the padding")
                _close(found[name][block].reshape(wanted.shape), wanted, tolerance, f"{name}, against unpadded")


def _grow(x: Tensor, more: tuple[int, int], left: bool, filler: float = 0.0) -> Tensor:
    """Pad the last two axes on one side."""
    rows, columns = more
    sides = (columns, 0, rows, 0) if left else (0, columns, 0, rows)
    return nn.functional.pad(x, sides if rows else sides[:2], value=filler)


def _batch(s: _Subject) -> None:
    """A sample gives the same alone and in a batch of 8."""
    for case, i in product(s.cases(batch=8), (0, 7)):
        module, masks = s.make(), case.mask or AttentionMask()
        together = s.run(module, case)
        query, key = (None if x is None else x[i : i + 1] for x in (masks.query, masks.key))
        tensors = {name: x[i : i + 1] for name, x in case.tensors().items()}
        alone = replace(case.using(tensors), mask=AttentionMask(query, key, masks.pairs))
        upstream = _draw(together["attend"].shape, torch.float64)[i : i + 1]
        for name, values in s.run(module, alone, upstream).items():
            if "parameter" not in name:
                _close(values, together[name][i : i + 1], _EXACT[torch.float64], f"{name}, sample {i} alone")


def _all_real(s: _Subject) -> None:
    """No mask, an empty AttentionMask and one that is True everywhere mean the same."""
    case, module = s.case(), s.make()
    wanted = s.run(module, case)
    full = AttentionMask(*(torch.ones(len(x), x.shape[-2], dtype=torch.bool) for x in (case.q, case.k)))
    for mask, words in ((AttentionMask(), "AttentionMask()"), (full, "True everywhere")):
        found = s.run(module, replace(case, mask=mask, words=words))
        _all_close(found, wanted, _EXACT[torch.float64], "against mask=None")


def _scale(s: _Subject) -> None:
    """The scale of q @ k.mT is a number, or a tensor (H,) with one for each head."""
    scales = torch.arange(1, s.num_heads + 1, dtype=torch.float64) / 3
    for case in s.cases():
        module, names = s.make(), ("attend", "weights")
        found = s.run(module, replace(case, scale=scales))
        for head, scale in enumerate(scales.tolist()):
            wanted = s.run(module, replace(case, scale=scale))
            for name in names:
                _close(found[name][:, head], wanted[name][:, head], _EXACT[torch.float64], f"{name} of head {head}")
        if isinstance(module, ScoreNormalization):
            wanted = s.run(module, replace(case, q=case.q * scales[:, None, None], scale=1.0))
            for name in names:
                _close(found[name], wanted[name], _EXACT[torch.float64], f"{name}, against scaled queries")


def _bias(s: _Subject) -> None:
    """A bias is added to scale * q @ k.mT, in attend and in weights; or both refuse it."""
    for case in s.cases() if s.takes_bias else ():
        module, other = s.make(), case.k.flip(-1)
        bias = case.scale * case.q @ (other - case.k).mT
        found, wanted = s.run(module, replace(case, bias=bias)), s.run(module, replace(case, k=other, bias=None))
        for name in ("attend", "weights"):
            _close(found[name], wanted[name], _EXACT[torch.float64], f"{name}, against keys changed to the same scores")
        hidden = replace(case, bias=bias.where(case.allowed(), 1e30))
        _all_close(s.run(module, hidden), found, _EXACT[torch.float64], "with a bias of 1e30 outside of the mask")


def _row_sums(s: _Subject) -> None:
    """The weights of a query sum to one, or at most one, as guarantees.row_sums says."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        for case in s.cases(dtype, std=4) if s.guarantees.row_sums else ():
            sums = s.run(s.make(dtype), case)["weights"].sum(-1)[case.allowed().any(-1)]
            low = 1 - tolerance if s.guarantees.row_sums == "one" else -math.inf
            wrong = sums[~((sums >= low) & (sums <= 1 + tolerance))].tolist()
            _require(not wrong, f"declared {s.guarantees.row_sums!r}, but a row sums to {wrong[:1]}")


def _unit_columns(s: _Subject) -> None:
    """With unit_columns and iterations enough (argument `converged`), columns sum to Q/K of the real tokens."""
    for case in s.cases(queries=12, keys=9, std=0.3) if s.guarantees.unit_columns else ():
        columns = s.run(s.make(factory=s.converged), case)["weights"].sum(-2)
        real = case.allowed().any(-2).double()
        queries = case.allowed().any(-1).sum(-1, keepdim=True)
        _close(columns, real * queries / real.sum(-1, keepdim=True).clamp(min=1), 1e-3, "sums of columns")


def _sparse(s: _Subject) -> None:
    """With sparse, some weights of real pairs are exactly 0 where scores have a standard deviation of 10."""
    weights = s.run(s.make(), s.case(std=10))["weights"]
    _require(not s.guarantees.sparse or (weights == 0).any(), "none is")


def _equivariant(s: _Subject) -> None:
    """With equivariant, permuting queries or keys permutes the weights."""
    for case in s.cases() if s.guarantees.equivariant else ():
        rows, columns = (torch.arange(x.shape[-2]).flip(0).roll(1) for x in (case.q, case.k))
        mask, tensors = case.mask or AttentionMask(), case.tensors()
        query, key = (m if m is None else m[:, at] for m, at in ((mask.query, rows), (mask.key, columns)))
        pairs = mask.pairs if mask.pairs is None else mask.pairs[..., rows, :][..., columns]
        tensors |= {name: x[..., rows if name == "q" else columns, :] for name, x in tensors.items() if name != "bias"}
        tensors |= {name: x[..., rows, :][..., columns] for name, x in tensors.items() if name == "bias"}
        found = s.run(s.make(), replace(case.using(tensors), mask=AttentionMask(query, key, pairs)))["weights"]
        wanted = s.run(s.make(), case)["weights"][..., rows, :][..., columns]
        _close(found, wanted, _EXACT[torch.float64], "weights, of permuted queries and keys")


def _causal(s: _Subject) -> None:
    """With causal, under causal pairs, later keys and values change nothing."""
    if s.guarantees.causal:
        case, later = s.case("causal", queries=8), torch.arange(8)[:, None] > 4
        changed = replace(case, k=case.k.where(~later, 9.0), v=case.v.where(~later, 9.0))
        found, wanted = (s.run(s.make(), x)["attend"][..., :5, :] for x in (changed, case))
        _close(found, wanted, _EXACT[torch.float64], "attend, before the changed keys")


def _linear(s: _Subject) -> None:
    """With linear, attend takes twice the products for twice the tokens, not four times."""
    counts = []
    for size in (512, 1024) if s.guarantees.linear else ():
        case = s.case(queries=size, keys=size, batch=1, bias=False)
        with FlopCounterMode(display=False) as counter:
            s.make().attend(case.q, case.k, case.v, None, scale=case.scale)
        counts.append(counter.get_total_flops())
    _require(not counts or counts[1] <= 2.5 * counts[0], f"from {counts} operations at 512 and 1024 tokens")


def _repeatable(s: _Subject) -> None:
    """Two calls give the same, in training mode too; a stochastic one there after the same seed."""
    for case, training in product(s.cases(), (False, True)):
        module, seeded = s.make().train(training), training and s.guarantees.stochastic
        results = []
        with torch.random.fork_rng(devices=()):
            for seed in (0, 0 if seeded else 1):
                torch.manual_seed(seed)
                results.append(s.run(module, case))
        _finite(results[0])
        _zero(results[0]["weights"][~case.allowed()], "masked weights")
        mode = f"{'training' if training else 'evaluation'} mode, {'same seed' if seeded else 'no seed'}"
        for name, values in results[0].items():
            _require(values.equal(results[1][name]), f"{name} differs between two calls ({mode})")


def _precision(s: _Subject) -> None:
    """Half precision is computed in at least float32 inside: no further from float64 than the last cast explains."""
    for dtype in s.dtypes:
        for std, (output, gradient) in _ROUNDED[dtype].items():
            module, exact = s.make(dtype), s.make()
            exact.load_state_dict(module.state_dict())
            case = s.case(dtype=dtype, queries=64, keys=64, std=std, bias=False)
            upstream = _draw((*case.q.shape[:-1], case.v.shape[-1]), dtype)
            wanted = s.run(exact, case.map(torch.Tensor.double), upstream.double())
            per_head = torch.full((s.num_heads,), float(case.scale), dtype=torch.promote_types(dtype, torch.float32))
            for scale in (case.scale, per_head):
                found = s.run(module, replace(case, scale=scale), upstream)
                for name, tolerance in {"attend": output, **{f"gradient of {x}": gradient for x in "qkv"}}.items():
                    _close(found[name], wanted[name], tolerance, f"{name}, against float64", floor=1e-2)


def _autocast(s: _Subject) -> None:
    """Under autocast to bfloat16, float32 gives the same float32 numbers as without."""
    for case in s.cases(torch.float32):
        module = s.make(torch.float32)
        found, wanted = s.run(module, case, autocast=True), s.run(module, case)
        for name in ("attend", "weights"):
            _require(found[name].dtype == torch.float32, f"{name} is {found[name].dtype}")
        _all_close(found, wanted, _EXACT[torch.float32], "against no autocast")


def _extremes(s: _Subject) -> None:
    """Scores of standard deviation 1e4, and one query with one key, give finite results and gradients."""
    for sizes in ({"std": 1e4}, {"queries": 1, "keys": 1}):
        for case in s.cases(torch.float32, **sizes):
            _finite(s.run(s.make(torch.float32), case))


def _state(s: _Subject) -> None:
    """The state_dict holds all that another instance needs to give the same: what is drawn is a parameter or buffer."""
    case, module, other = s.case(), s.make(), s.make(seed=1)
    other.load_state_dict({name: x + 0.1 if name in _trained(module) else x for name, x in module.state_dict().items()})
    module.load_state_dict(other.state_dict())
    _all_close(s.run(other, case), s.run(module, case), _EXACT[torch.float64], "after load_state_dict")


def _parameters(s: _Subject) -> None:
    """Every parameter gets a gradient in each training step: distributed training stops otherwise."""
    for case in s.cases():
        module, s.seen = s.make().train(), case
        q, k, v = (x.detach().requires_grad_() for x in (case.q, case.k, case.v))
        module.attend(q, k, v, case.mask, scale=case.scale, bias=case.bias).sum().backward()
        unused = [name for name, parameter in _trained(module).items() if parameter.grad is None]
        _require(not unused, f"no gradient for {', '.join(unused)}")


def _gradients(s: _Subject) -> None:
    """Gradients of q, k, v, bias, scale and parameters in float64 are those of finite differences."""
    for case in s.cases(queries=3, keys=4):
        wrapped, s.seen = _Attend(s.make()), case
        scale = torch.linspace(0.3, 0.5, s.num_heads, dtype=torch.float64)
        inputs = {**case.tensors(), "scale": scale, **_trained(wrapped)}

        def attend(*leaves: Tensor, mask=case.mask, wrapped=wrapped, names=tuple(inputs)) -> Tensor:
            named = dict(zip(names, leaves, strict=True))
            q, k, v, bias, scale = (named.pop(name, None) for name in ("q", "k", "v", "bias", "scale"))
            return functional_call(wrapped, named, (q, k, v, bias, mask, scale))[0]

        leaves = [x.detach().clone().requires_grad_() for x in inputs.values()]
        torch.autograd.gradcheck(attend, leaves, atol=1e-8, rtol=1e-6, fast_mode=True)


def _compile(s: _Subject) -> None:
    """One graph for torch.compile, without a wait for the device: no .item(), no branch on data, no numpy."""
    for case in s.cases(torch.float32):
        module, leaves, s.seen = s.make(torch.float32), case.map(lambda x: x.detach().requires_grad_()), case
        calls: list[str] = []

        def backend(graph: torch.fx.GraphModule, _: list[Tensor], calls=calls):
            calls += [str(node.target) for node in graph.graph.nodes]
            return graph.forward

        torch.compiler.reset()
        compiled = torch.compile(_Attend(module), fullgraph=True, backend=backend)
        output, _ = compiled(leaves.q, leaves.k, leaves.v, leaves.bias, case.mask, case.scale)
        waits = {"item", "nonzero", "cpu"}.intersection(calls)
        _require(not waits, f"the result of .{', .'.join(waits)}() must be waited for")
        gradient = torch.autograd.grad(output, leaves.q, _draw(output.shape, output.dtype))[0]
        found, wanted = {"attend": output.detach(), "gradient of q": gradient}, s.run(module, case)
        for name, values in found.items():
            _close(values, wanted[name], _EXACT[torch.float32], f"{name}, compiled")


_CHECKS = (
    *(_instances, _shapes, _refusals, _masks, _attend, _padding, _batch, _all_real, _scale, _bias),
    *(_row_sums, _unit_columns, _sparse, _equivariant, _causal, _linear),
    *(_repeatable, _precision, _autocast, _extremes, _state, _parameters, _gradients, _compile),
)
