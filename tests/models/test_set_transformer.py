"""Set Transformer and its blocks, the same under every normalization."""

import warnings
from functools import partial

import pytest
import torch

from sinkformer_pl import ops
from sinkformer_pl.errors import UserError
from sinkformer_pl.models import ISAB, PMA, SAB, AttentionBlock, MultiHeadAttention, SetTransformer
from sinkformer_pl.models.blocks import BlockOptions
from sinkformer_pl.normalizations import Promises, ScoreNormalization, Sinkhorn, Softmax

BLOCK = BlockOptions(mlp_dim=16, dropout=0.0, layer_norm="pre")
NORMALIZATIONS = {"Softmax": Softmax, "Sinkhorn": partial(Sinkhorn, n_iters=5)}
every_form = pytest.mark.parametrize(
    ("name", "inducing_points"), [(name, points) for name in NORMALIZATIONS for points in (0, 3)]
)


def build(name, inducing_points=3, **given):
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_heads": 2, "depth": 2, "inducing_points": inducing_points, **given}
    return SetTransformer(NORMALIZATIONS[name], **sizes).double()


def points(batch=2, size=7, seed=1):
    return torch.randn(batch, size, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameter_gradients(model, features):
    upstream = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).reshape(features.shape)
    return torch.autograd.grad(features, list(model.parameters()), upstream)


PADDED = [
    *(
        (norm, side, filler, Softmax)
        for norm in ("pre", "post", "none")
        for side, filler in (("left", 3.0), ("right", 3.0), ("left", 1e30), ("right", 1e30))
    ),
    *(("pre", "left", 3.0, pooling) for pooling in ("cls", "mean", "max", "seed")),
]


@every_form
@pytest.mark.parametrize(("layer_norm", "side", "filler", "pooling"), PADDED)
def test_a_padded_batch_gives_what_the_sets_give_alone(name, inducing_points, layer_norm, side, filler, pooling):
    model = build(name, inducing_points, layer_norm=layer_norm, pooling=pooling)
    sets = [points(1, size, size) for size in (7, 4, 1)]
    inputs, mask = torch.full((3, 9, 3), filler, dtype=torch.float64), torch.zeros(3, 9, dtype=torch.bool)
    for i, x in enumerate(sets):
        at = slice(9 - x.shape[1], 9) if side == "left" else slice(x.shape[1])
        inputs[i, at], mask[i, at] = x[0], True
    inputs.requires_grad_()
    alone = [x.requires_grad_() for x in sets]
    features, wanted = model(inputs, mask), torch.cat([model(x) for x in alone])
    torch.testing.assert_close(features, wanted, rtol=1e-9, atol=1e-11)
    for found, right in zip(parameter_gradients(model, features), parameter_gradients(model, wanted), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-10)
    (gradient,) = torch.autograd.grad(model(inputs, mask).sin().sum(), inputs)
    wanted = torch.cat([torch.autograd.grad(model(x).sin().sum(), x)[0][0] for x in alone])
    torch.testing.assert_close(gradient[mask], wanted, rtol=1e-8, atol=1e-10)
    assert (gradient[~mask] == 0).all()


@every_form
def test_a_set_without_members_is_finite_and_leaves_the_others_alone(name, inducing_points):
    model, inputs = build(name, inducing_points), points(2)
    mask = torch.tensor([[True] * 7, [False] * 7])
    features = model(inputs, mask)
    torch.testing.assert_close(features[:1], model(inputs[:1]))
    assert features.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in parameter_gradients(model, features))


@every_form
def test_the_order_of_the_points_changes_nothing(name, inducing_points):
    model, inputs, order = build(name, inducing_points), points(), torch.tensor([4, 1, 6, 0, 2, 5, 3])
    torch.testing.assert_close(model(inputs[:, order]), model(inputs), rtol=1e-10, atol=1e-12)
    mask = torch.arange(7).expand(2, -1) < torch.tensor([[7], [4]])
    torch.testing.assert_close(model(inputs[:, order], mask[:, order]), model(inputs, mask), rtol=1e-10, atol=1e-12)


@every_form
def test_the_points_matter(name, inducing_points):
    model, inputs = build(name, inducing_points), points()
    changed = inputs.clone()
    changed[:, 2] += 1
    assert (model(changed) - model(inputs)).abs().amax() > 1e-3


@every_form
def test_a_sample_is_the_same_alone_and_in_a_batch(name, inducing_points):
    model, inputs = build(name, inducing_points), points(8)
    features = model(inputs)
    assert features.shape == (8, model.out_dim)
    assert model(inputs[3:4]).shape == (1, model.out_dim)
    torch.testing.assert_close(model(inputs[3:4]), features[3:4], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inducing_points", [0, 3])
def test_both_arms_of_a_comparison_start_from_the_same_weights(inducing_points):
    softmax, sinkhorn = build("Softmax", inducing_points).state_dict(), build("Sinkhorn", inducing_points).state_dict()
    assert softmax.keys() == sinkhorn.keys()
    assert all(softmax[name].equal(sinkhorn[name]) for name in softmax)


def test_both_arms_differ_in_what_they_compute_and_not_in_their_pooling():
    inputs = points()
    assert (build("Softmax")(inputs) - build("Sinkhorn")(inputs)).abs().amax() > 1e-4
    model = build("Sinkhorn")
    kinds = {
        name: type(m.core.normalization).__name__
        for name, m in model.named_modules()
        if isinstance(m, MultiHeadAttention)
    }
    assert kinds.pop("pool.block.attention") == "Softmax"
    assert set(kinds.values()) == {"Sinkhorn"}
    assert len(kinds) == 4


@every_form
@pytest.mark.parametrize("layer_norm", ["pre", "post", "none"])
def test_every_parameter_is_trained(name, inducing_points, layer_norm):
    model = build(name, inducing_points, layer_norm=layer_norm).train()
    model(points(), torch.arange(7).expand(2, -1) < 6).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        # A constant added to all keys shifts every score of a row alike.
        if not parameter_name.endswith("key.bias"):
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.abs().amax() > 1e-12, parameter_name


def test_one_seed_under_sinkhorn_is_mean_pooling_and_says_so():
    with pytest.warns(UserWarning, match="one seed, a mean under Sinkhorn: .* use pooling=Softmax") as warned:
        model = build("Sinkhorn", pooling=NORMALIZATIONS["Sinkhorn"])
    assert len(warned) == 1
    attention = model.pool.block.attention
    inputs, mask = points(), torch.arange(7).expand(2, -1) < 5
    model(inputs, mask).square().sum().backward()
    for part in (attention.query, attention.key):
        assert part.weight.grad is not None
        assert part.weight.grad.abs().amax() < 1e-14
    assert attention.value.weight.grad is not None
    assert attention.value.weight.grad.abs().amax() > 1e-6
    x = torch.randn(2, 7, 16).double()
    weights = attention.weights(torch.randn(2, 1, 16).double(), x, ops.AttentionMask(key=mask))
    torch.testing.assert_close(weights, (mask / 5.0).double()[:, None, None].expand(2, 2, 1, 7))


@pytest.mark.parametrize(
    "pooling", [Softmax, partial(Sinkhorn, n_iters=1)], ids=["Softmax", "Sinkhorn of one half-step"]
)
def test_pooling_that_trains_doesnt_warn(pooling):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("Sinkhorn", pooling=pooling)


def test_several_seeds_under_sinkhorn_dont_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool = PMA(16, 2, Sinkhorn, seeds=4, **BLOCK).double()
    x = torch.randn(2, 7, 16).double()
    pooled = pool(x)
    assert pooled.shape == (2, 4, 16)
    pooled.square().sum().backward()
    grad = pool.block.attention.query.weight.grad
    assert grad is not None
    assert grad.abs().amax() > 1e-8


class Square(ScoreNormalization):
    promises = Promises(row_sums="one")
    requires_square = True

    def forward(self, scores, mask):
        if scores.shape[-1] != scores.shape[-2]:
            raise ValueError("square scores only")
        return ops.softmax(scores, mask=mask)


def test_square_scores_alone_go_with_sab_and_not_with_inducing_points():
    with pytest.raises(NotImplementedError, match="Square needs as many queries as keys; use inducing_points=0"):
        SetTransformer(Square, dim=16, num_heads=2)
    with pytest.raises(NotImplementedError, match="a pooling that takes rectangular scores"):
        SetTransformer(Softmax, dim=16, num_heads=2, pooling=Square)
    model = SetTransformer(Square, dim=16, num_heads=2, inducing_points=0)
    assert model(points().float(), torch.arange(7).expand(2, -1) < 5).isfinite().all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"depth": 0}, "depth must be at least 1"),
        ({"inducing_points": -1}, "inducing_points must be at least 0"),
        ({"num_heads": 3}, "num_heads=3 must divide the width dim=16"),
        ({"pooling": "sum"}, "pooling must be a normalization or one of cls, mean, max, seed, got 'sum'"),
    ],
)
def test_sizes_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        SetTransformer(Softmax, **{"dim": 16, "num_heads": 2, **given})


def test_blocks_form_the_published_plans():
    """SAB: set to set; ISAB: inducing points to set, set to what they found; PMA: seeds to set."""
    seen = []

    class Spy(ScoreNormalization):
        def forward(self, scores, mask):
            seen.append((tuple(scores.shape), mask.query is not None, mask.key is not None))
            return ops.softmax(scores, mask=mask)

    x, mask = torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool)
    SAB(16, 2, Spy, **BLOCK)(x, mask)
    ISAB(16, 2, Spy, inducing_points=3, **BLOCK)(x, mask)
    PMA(16, 2, Spy, seeds=4, **BLOCK)(x, mask)
    wanted = [
        ((2, 2, 7, 7), True, True),
        ((2, 2, 3, 7), False, True),
        ((2, 2, 7, 3), True, False),
        ((2, 2, 4, 7), False, True),
    ]
    assert seen == wanted


@pytest.mark.parametrize("mlp_dim", [0, 24])
@pytest.mark.parametrize("layer_norm", ["pre", "post", "none"])
def test_a_block_by_hand(layer_norm, mlp_dim):
    torch.manual_seed(0)
    block = AttentionBlock(16, 2, Softmax, mlp_dim=mlp_dim, layer_norm=layer_norm).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, context = torch.randn(2, 4, 16).double(), torch.randn(2, 5, 16).double()
    attend, mlp = block.attention, block.mlp or torch.zeros_like
    if layer_norm == "pre":
        y = x + attend(block.attention_norm(x), context)
        wanted = y + mlp(block.mlp_norm(y))
        normed = block.attention_norm(x)
        own = x + attend(normed, normed)
        own = own + mlp(block.mlp_norm(own))
    else:
        y = block.attention_norm(x + attend(x, context))
        wanted = block.mlp_norm(y + mlp(y))
        own = block.attention_norm(x + attend(x, x))
        own = block.mlp_norm(own + mlp(own))
    torch.testing.assert_close(block(x, context), wanted)
    torch.testing.assert_close(block(x), own)
    assert any("norm" in name for name, _ in block.named_parameters()) == (layer_norm != "none")


def test_an_unknown_place_for_layer_norms_is_refused():
    with pytest.raises(ValueError, match="layer_norm"):
        SetTransformer(Softmax, dim=16, num_heads=2, layer_norm="after")  # pyright: ignore[reportArgumentType]


def test_dropout_acts_in_training_alone():
    model, inputs = build("Sinkhorn", dropout=0.5, pool_dropout=0.5), points()
    model.train()
    assert not model(inputs).equal(model(inputs))
    model.eval()
    assert model(inputs).equal(model(inputs))
    torch.testing.assert_close(model(inputs), build("Sinkhorn").eval()(inputs))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, 5, 6), "a point has 6 numbers, .* set model.backbone.in_features to 6, or choose other data"),
        (torch.zeros(2, 1, 8, 8), r"SetTransformer takes point clouds .*, got shape \(2, 1, 8, 8\)"),
        (torch.zeros(2, 5, 3, dtype=torch.int64), "got shape .* of torch.int64"),
    ],
)
def test_inputs_that_the_network_wasnt_built_for(inputs, message):
    with pytest.raises(UserError, match=message):
        SetTransformer(Softmax, dim=8, num_heads=2)(inputs)
