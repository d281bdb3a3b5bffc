"""What docs/theory.md says, where no other test has it, and that what it names exists."""

import re
from pathlib import Path

import pytest
import torch

from sinkformer_pl.flows import FlowSettings, ParticleAttention, follow_attention
from sinkformer_pl.ops import marginal_error, sinkhorn, sinkhorn_attention

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/theory.md").read_text(encoding="utf-8")


def test_marginal_error_of_large_scores_lasts():
    scores = 4 * torch.randn(64, 1, 65, 65, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert marginal_error(sinkhorn(scores, 41)).mean().item() == pytest.approx(1e-2, rel=0.6)


def test_limits_under_dot_products_and_distances_are_one_but_softmax_is_not():
    x = torch.randn(20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dot, l2 = (ParticleAttention.smoothing(16, 16**0.5, cost=cost) for cost in ("dot", "l2"))
    torch.testing.assert_close(dot.weights(x), l2.weights(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(dot.scores(x), x @ x.mT / 16**0.5)
    # The cost |q - k|² at the temperature 2 sqrt(d).
    torch.testing.assert_close(l2.scores(x), -torch.cdist(x, x).square() / (2 * 16**0.5))
    assert (dot.under("softmax").weights(x) - l2.under("softmax").weights(x)).abs().max() > 0.1


def test_causal_sinkhorn_tends_to_the_identity():
    scores = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = scores.exp().tril()
    for _ in range(20_000):
        weights = weights / weights.sum(1, keepdim=True)
        weights = weights / weights.sum(0, keepdim=True)
    assert (weights - torch.eye(6)).abs().max() < 1e-2


def test_with_one_query_the_plan_is_uniform():
    scores = torch.randn(1, 1, 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sinkhorn(scores, 3), torch.full_like(scores, 1 / 7))


def test_a_mean_over_queries_doesnt_see_a_converged_plan():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8, generator=generator, dtype=torch.float64).requires_grad_() for n in (9, 7, 7))
    upstream = torch.randn(1, 2, 8, generator=generator, dtype=torch.float64)
    sizes = {}
    for n_iters in (1, 3, 301):
        output = sinkhorn_attention(q, k, v, n_iters=n_iters)
        gradients = torch.autograd.grad(output.mean(2), (q, k), upstream)
        sizes[n_iters] = max(float(gradient.abs().max()) for gradient in gradients)
    assert sizes[1] > 1e-2
    assert sizes[3] < sizes[1] / 3
    assert sizes[301] < 1e-14
    torch.testing.assert_close(output.mean(2), v.mean(2), rtol=0, atol=1e-14)


def test_a_maximum_over_queries_stays_between_mean_and_maximum_of_the_values():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(40, 1, 9, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    q = q[:, :, :1] + 0.2 * q  # Queries that attend nearly alike.
    sorted_values, mean = v.sort(2, descending=True).values.cumsum(2), v.mean(2)
    spreads, below = {}, {}
    for n_iters in (1, 2001):
        output = sinkhorn_attention(q, k, v, n_iters=n_iters)
        sums = output.sort(2, descending=True).values.cumsum(2)
        spreads[n_iters] = float((sums - sorted_values).max())
        below[n_iters] = float((mean - output.amax(2)).max())
    # Majorized: the sum of the m largest is at most that of the values.
    assert spreads[2001] < 1e-3 < 1 < spreads[1]
    assert below[2001] < 1e-3 < 1 < below[1]


def test_of_plans_whose_queries_attend_alike_only_the_uniform_one_is_doubly_stochastic():
    scores = torch.randn(1, 1, 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(1, 1, 7, 7)
    assert scores.softmax(-1).std() > 0.05
    torch.testing.assert_close(sinkhorn(scores, 3), torch.full_like(scores, 1 / 7))


def test_figures_of_the_table():
    """Those of the page, with the settings of configs/flow.yaml."""
    flows = {flow.kernel: flow for flow in follow_attention(FlowSettings(time=0.1, steps=1), seed=1)}
    rows = {"K⁰": "exponential", "softmax": "softmax", "Sinkhorn": "sinkhorn"}
    for label, kernel in rows.items():
        (line,) = re.findall(rf"^\| {label} \| ([\d.e-]+) \| ([\d.e-]+) \| ([\d.e-]+) \|$", PAGE, re.MULTILINE)
        flow = flows[kernel]
        for said, found in zip(line, (flow.asymmetry, *flow.distances.values()), strict=True):
            assert found == pytest.approx(float(said), rel=0.05, abs=1e-12)


def test_what_the_page_names_exists():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", PAGE):
        assert f"def {name}(" in tests, name
    for path in re.findall(r"`(tests/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
    bibliography = (ROOT / "docs/references.bib").read_text(encoding="utf-8")
    keys = {
        key for group in re.findall(r"\[([a-z]+\d{4}[\w, ;]*)", PAGE) for key in re.findall(r"[a-z]+\d{4}\w+", group)
    }
    assert len(keys) > 5
    for key in keys:
        assert f"{{{key}," in bibliography, key
    for figure in re.findall(r"\]\((theory/\w+\.png)\)", PAGE):
        assert (ROOT / "docs" / figure).is_file(), figure
        assert (ROOT / "docs" / figure).stat().st_size < 200_000
