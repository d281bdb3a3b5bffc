"""Measures against NumPy on the real block of each sample."""

import math

import numpy as np
import pytest
import torch

from sinkformer_pl.diagnostics import (
    column_sums,
    effective_rank,
    entropy,
    relative_entropy,
    row_sums,
    sink_share,
    summary,
    zero_share,
)
from sinkformer_pl.diagnostics.measures import MEASURES
from sinkformer_pl.ops import AttentionMask, causal_pairs, sinkhorn

QUERIES, KEYS = (5, 3, 4), (7, 7, 2)


def padded():
    """Weights of three samples of unequal sizes, some of them exact zeros, and garbage at the padding."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(3, 2, 5, 7, generator=generator, dtype=torch.float64)
    weights = weights.where(weights > 0.3, 0.0)
    query = torch.arange(5) < torch.tensor(QUERIES)[:, None]
    key = torch.arange(7) < torch.tensor(KEYS)[:, None]
    return weights, AttentionMask(query, key)


def blocks(weights):
    return [
        (sample, head, weights[sample, head, :queries, :keys].numpy())
        for sample, (queries, keys) in enumerate(zip(QUERIES, KEYS, strict=True))
        for head in range(2)
    ]


def h(masses):
    if not masses.any():
        return math.nan
    shares = np.abs(masses) / np.abs(masses).sum()
    return -sum(share * math.log(share) for share in shares if share > 0)


def test_every_measure_of_a_padded_batch_is_that_of_the_real_block():
    weights, mask = padded()
    rows, columns, entropies = row_sums(weights, mask), column_sums(weights, mask), entropy(weights, mask)
    relative, ranks = relative_entropy(weights, mask), effective_rank(weights, mask)
    sinks, zeros = sink_share(weights, mask), zero_share(weights, mask)
    for sample, head, block in blocks(weights):
        queries, keys = block.shape
        at = sample, head
        np.testing.assert_allclose(rows[at][:queries], block.sum(1))
        np.testing.assert_allclose(columns[at][:keys], block.sum(0) * keys / queries)
        np.testing.assert_allclose(entropies[at][:queries], [h(row) for row in block])
        np.testing.assert_allclose(relative[at][:queries], [h(row) / math.log(keys) for row in block])
        np.testing.assert_allclose(ranks[at], math.exp(h(np.linalg.svd(block, compute_uv=False))))
        np.testing.assert_allclose(sinks[at], block.sum(0).max() / block.sum())
        np.testing.assert_allclose(zeros[at], (block == 0).mean())
        assert rows[at][queries:].isnan().all()
        assert columns[at][keys:].isnan().all()


def test_summary_pools_queries_and_keys_of_all_samples():
    weights, mask = padded()
    found = summary(weights, mask)
    assert tuple(found) == MEASURES
    for head in range(2):
        own = [block for _, of, block in blocks(weights) if of == head]
        rows = np.concatenate([block.sum(1) for block in own])
        columns = np.concatenate([block.sum(0) * block.shape[1] / block.shape[0] for block in own])
        for name, share in (("min", 0), ("p10", 0.1), ("median", 0.5), ("p90", 0.9), ("max", 1)):
            np.testing.assert_allclose(found[f"row_sum_{name}"][head], np.quantile(rows, share))
            np.testing.assert_allclose(found[f"column_sum_{name}"][head], np.quantile(columns, share))
        np.testing.assert_allclose(found["marginal_error"][head], max(abs(rows - 1).max(), abs(columns - 1).max()))
        np.testing.assert_allclose(found["entropy"][head], np.nanmean([h(row) for block in own for row in block]))
        np.testing.assert_allclose(found["zero_share"][head], np.mean([(block == 0).mean() for block in own]))


def test_even_attention_and_a_permutation():
    even, permutation = torch.full((1, 1, 4, 4), 0.25), torch.eye(4)[None, None]
    assert effective_rank(even).item() == pytest.approx(1, abs=1e-4)
    assert effective_rank(permutation).item() == pytest.approx(4)
    assert relative_entropy(even).mean().item() == pytest.approx(1)
    assert relative_entropy(permutation).abs().max().item() == 0
    assert sink_share(even).item() == pytest.approx(0.25)
    assert zero_share(permutation).item() == pytest.approx(0.75)
    torch.testing.assert_close(column_sums(even), torch.ones(1, 1, 4))


def test_many_half_steps_have_columns_of_one_at_any_size():
    weights = sinkhorn(torch.randn(2, 3, 6, 11), 201)
    torch.testing.assert_close(column_sums(weights), torch.ones(2, 3, 11))
    assert summary(weights)["marginal_error"].max() < 1e-4


def test_causal_pairs_count_the_keys_that_a_query_may_meet():
    pairs = causal_pairs(4, 4)
    weights = (pairs / pairs.sum(-1, keepdim=True)).float()
    found = summary(weights, AttentionMask(pairs=pairs))
    assert found["relative_entropy"].item() == pytest.approx(1)
    assert found["zero_share"].item() == 0
    assert found["marginal_error"].isnan().all()


def test_a_query_without_mass_has_no_entropy_and_half_precision_is_measured_in_single():
    weights = torch.zeros(1, 1, 2, 3, dtype=torch.bfloat16)
    weights[0, 0, 0] = 1 / 3
    assert entropy(weights).dtype == torch.float32
    assert entropy(weights)[0, 0, 0].item() == pytest.approx(math.log(3))
    assert entropy(weights)[0, 0, 1].isnan()
    assert summary(weights)["entropy"].item() == pytest.approx(math.log(3))
    assert zero_share(weights).item() == 0.5
