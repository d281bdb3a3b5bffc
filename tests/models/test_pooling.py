"""Ways to read a sample out of its tokens, and the warning where one doesn't see the attention."""

import warnings
from functools import partial

import pytest
import torch

from sinkformer_pl.models import PointCloudTransformer, SetTransformer, TextTransformer, VisionTransformer
from sinkformer_pl.models.pooling import Readout
from sinkformer_pl.normalizations import SemiUnbalancedSinkhorn, Sinkhorn, Softmax

SEED = {"head_dim": None, "dropout": 0.0, "layer_norm": "pre", "mlp_dim": 32, "temperature": 1.0}


def test_a_seed_is_a_learned_query_under_softmax_without_padding():
    torch.manual_seed(0)
    readout = Readout("seed", 8, 2, follows=Sinkhorn(), **SEED)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [True, False, True, False, False]])
    attention = readout.seed.block.attention
    q = attention.query(readout.seed.block.attention_norm(readout.seed.seeds))
    for found, tokens in zip(readout(x, mask), (x[0], x[1, [0, 2]]), strict=True):
        scores = attention.key(tokens).view(-1, 2, 4).transpose(0, 1) @ q.view(2, 4, 1) / 2
        mixed = scores.softmax(1).mT @ attention.value(tokens).view(-1, 2, 4).transpose(0, 1)
        torch.testing.assert_close(found, (readout.seed.seeds + attention.out(mixed.reshape(1, 8)))[0])


NETWORKS = {
    "texts": partial(TextTransformer, vocab_size=9, dim=8, num_heads=2, depth=1),
    "images": partial(VisionTransformer, image_size=8, dim=8, num_heads=2, depth=1),
    "sets": partial(SetTransformer, dim=8, num_heads=2, depth=1),
}
CLOUDS = partial(PointCloudTransformer, dim=8, centres=(4,), neighbours=2, fused_dim=8, head_dims=())


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("normalization", [Sinkhorn, partial(SemiUnbalancedSinkhorn, float("inf"))])
def test_a_mean_behind_a_doubly_stochastic_attention_warns_in_a_line(network, normalization):
    with pytest.warns(UserWarning, match="pooling=mean") as warned:
        network(normalization, pooling="mean")
    (message,) = [str(warning.message) for warning in warned]
    for fact in ("pooling=mean under S", "Sinkhorn", "docs/theory.md", "use pooling=cls or pooling=seed"):
        assert fact in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("network", "normalization", "pooling"),
    [
        *((network, Sinkhorn, pooling) for network in NETWORKS.values() for pooling in ("cls", "max", "seed")),
        *((network, partial(Sinkhorn, n_iters=1), "mean") for network in NETWORKS.values()),
        (NETWORKS["texts"], Softmax, "mean"),
        (NETWORKS["texts"], SemiUnbalancedSinkhorn, "mean"),
        (CLOUDS, Sinkhorn, "max+mean"),
    ],
)
def test_a_readout_that_sees_the_attention_doesnt_warn(network, normalization, pooling):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(normalization, pooling=pooling)


@pytest.mark.parametrize(
    ("kinds", "widths"), [("cls", 1), ("seed", 1), ("max+cls", 2), ("max+mean+cls", 3), ("max+mean+seed", 3)]
)
def test_a_token_or_a_seed_beside_maximum_and_mean_of_points(kinds, widths):
    torch.manual_seed(0)
    model = CLOUDS(Sinkhorn, pooling=kinds).eval()
    seen = []
    model.fuse.register_forward_hook(lambda _module, _given, tokens: seen.append(tokens))
    features = model(torch.randn(2, 9, 3))
    assert features.shape == (2, 8 * widths) == (2, model.out_dim)
    (tokens,) = seen
    leading = int("cls" in kinds)
    assert tokens.shape == (2, 4 + leading, 8)
    if "max" in kinds:
        assert features[:, :8].equal(tokens[:, leading:].amax(1))
    if "mean" in kinds:
        torch.testing.assert_close(features[:, 8:16], tokens[:, leading:].mean(1))
    if "cls" in kinds:
        assert features[:, -8:].equal(tokens[:, 0])
    assert model.describe_tokens(torch.randn(2, 9, 3))[0].leading == leading
