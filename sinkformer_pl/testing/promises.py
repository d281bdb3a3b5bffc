"""Check the promises and requirements that a class declares, and that the rest is refused."""

import math
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from sinkformer_pl.testing.comparing import close, require
from sinkformer_pl.testing.subject import Subject


def refusals(s: Subject) -> None:
    """Undeclared input is refused by NotImplementedError or ValueError, not ignored: pairs, causal, rectangles."""
    g = s.promises
    if s.requires_tied:
        case = s.case("padding", bias=False)
        require(s.refuses(replace(case, k=case.k.clone())), "queries and keys that are two tensors were taken")
    if s.requires_square:
        case = s.case(bias=False)
        require(s.refuses(replace(case, q=case.q[..., 1:, :])), "fewer queries than keys were taken")
    if not g.pairs:
        require(s.refuses(s.case("pairs", bias=False)), "a mask with pairs was taken")
    if not g.pairs and not g.causal:
        require(s.refuses(s.case("causal", bias=False)), "a mask with causal pairs was taken")


def row_sums(s: Subject) -> None:
    """The weights of a query sum to one, or at most one, as promises.row_sums says."""
    declared = s.promises.row_sums
    if declared is None:
        return
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        low = 1 - tolerance if declared == "one" else -math.inf
        for case in s.cases(dtype, std=4):
            sums = s.run(s.make(dtype), case)["weights"].sum(-1)[case.allowed().any(-1)]
            wrong = sums[~((sums >= low) & (sums <= 1 + tolerance))].tolist()
            require(not wrong, f"declared {declared!r}, but a row sums to {wrong[:1]}")


def unit_columns(s: Subject) -> None:
    """With unit_columns and iterations enough (argument `converged`), columns sum to Q/K of the real tokens."""
    if not s.promises.unit_columns:
        return
    furthest = 0.0
    for case in s.cases(queries=12, keys=9, std=0.3):
        columns = s.run(s.make(factory=s.converged), case)["weights"].sum(-2)
        real = case.allowed().any(-2).double()
        queries = case.allowed().any(-1).sum(-1, keepdim=True)
        wanted = real * queries / real.sum(-1, keepdim=True).clamp(min=1)
        if s.converged is not None:
            close(columns, wanted, "sums of columns", tolerance=1e-3)
        furthest = max(furthest, float((columns - wanted).abs().max()))
    if furthest > 1e-3:
        s.unchecked.append(
            f"unit_columns is a claim about the limit; with these arguments a column is off by {furthest:.2g}: to "
            f"check it, give converged=functools.partial({s.name}, ...) with iterations enough"
        )


def sparse(s: Subject) -> None:
    """With sparse, some weights of real pairs are exactly 0 where scores have a standard deviation of 10."""
    if s.promises.sparse:
        require((s.run(s.make(), s.case(std=10))["weights"] == 0).any(), "none is")


def equivariant(s: Subject) -> None:
    """With equivariant, permuting queries or keys, or both alike where they are tied, permutes the weights."""
    if not s.promises.equivariant:
        return
    for case in s.cases():
        rows, columns = (torch.arange(x.shape[-2]).flip(0).roll(1) for x in (case.q, case.k))
        wanted = s.run(s.make(), case)["weights"][..., rows, :][..., columns]
        found = s.run(s.make(), case.select(queries=rows, keys=columns))["weights"]
        close(found, wanted, "weights, of permuted queries and keys")


def causal(s: Subject) -> None:
    """With causal, under causal pairs, later queries, keys and values change nothing."""
    if s.promises.causal:
        case, later = s.case("causal", queries=8), torch.arange(8)[:, None] > 4
        changed = case.map(lambda x: x.where(~later, 9.0), "q", "k", "v")
        found, wanted = (s.run(s.make(), x)["attend"][..., :5, :] for x in (changed, case))
        close(found, wanted, "attend, before the changed tokens")


def linear(s: Subject) -> None:
    """With linear, attend takes twice the products for twice the tokens, not four times."""
    if not s.promises.linear:
        return
    counts = []
    for size in (512, 1024):
        case = s.case(queries=size, keys=size, batch=1, bias=False)
        with FlopCounterMode(display=False) as counter:
            case.attend(s.make())
        counts.append(counter.get_total_flops())
    require(counts[1] <= 2.5 * counts[0], f"from {counts} operations at 512 and 1024 tokens")
