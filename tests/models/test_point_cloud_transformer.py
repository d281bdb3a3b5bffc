"""Point Cloud Transformer: the published network, any normalization, padded clouds."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sinkformer_pl import ops
from sinkformer_pl.data import PointClouds
from sinkformer_pl.errors import UserError
from sinkformer_pl.models.batch_norm import MaskedBatchNorm
from sinkformer_pl.models.point_cloud_transformer import OffsetAttention, PointCloudTransformer
from sinkformer_pl.normalizations import Sinkhorn, Softmax, registered

EVERY = pytest.mark.parametrize("name", list(registered()))
SIZES = [40, 13, 6, 1]


def build(normalization=Softmax, **given):
    """A small network with scores that matter, and batch norms that have seen something."""
    torch.manual_seed(0)
    sizes = {"dim": 16, "depth": 2, "centres": (16, 8), "neighbours": 4, "fused_dim": 24, "head_dims": (12, 10)}
    model = PointCloudTransformer(normalization, **{**sizes, **given}).double()
    norms = [module for module in model.modules() if isinstance(module, MaskedBatchNorm)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
        for block in model.blocks:
            block.attention.query.weight.mul_(3)
        model.train()(points(16, numbers=model.in_features, seed=9))
        for norm in norms:
            norm.momentum = 0.1
    return model.eval()


def points(batch=3, size=40, numbers=3, seed=1):
    return torch.randn(batch, size, numbers, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded(width=44, filler=0.0, side="right", sizes=SIZES):
    sets = [points(1, size, seed=size) for size in sizes]
    inputs, mask = torch.full((len(sizes), width, 3), filler, dtype=torch.float64), torch.zeros(len(sizes), width)
    for i, x in enumerate(sets):
        at = slice(width - x.shape[1], width) if side == "left" else slice(x.shape[1])
        inputs[i, at], mask[i, at] = x[0], 1
    return sets, inputs, mask.bool()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts_of_the_published_networks():
    """With a head of 40 classes they have 2,876,136 and 1,360,552: 2.88 and 1.36 million in the paper's table."""
    head = 256 * 40 + 40
    biases = 512 + 256  # Before the batch norms of four attentions and of the last hidden layer, and not of ours.
    with torch.device("meta"):
        assert parameters(PointCloudTransformer(Softmax)) + head == 2_876_136 - (4 * 256 + 256)
        assert parameters(PointCloudTransformer(Softmax, dim=128, centres=())) + head == 1_360_552 - biases
    two = parameters(build(pooling="max+mean")) - parameters(build())
    assert two == 24 * 12


def by_hand(model, cloud):
    """One cloud in evaluation, step by step with explicit pairs."""

    def lbr(layer, x, slope=0.0):
        norm = layer.norm
        x = F.batch_norm(
            (x @ layer.linear.weight.T).flatten(0, -2), norm.running_mean, norm.running_var, norm.weight, norm.bias
        ).view(*x.shape[:-1], -1)
        return x.where(x > 0, slope * x)

    x, places = lbr(model.embed[1], lbr(model.embed[0], cloud)), cloud[:, :3]
    for stage in model.stages:
        chosen = [int((places - places.mean(0)).norm(dim=1).argmax())]
        while len(chosen) < min(stage.centres, len(places)):
            chosen.append(int((places[:, None] - places[chosen]).norm(dim=-1).amin(1).argmax()))
        tokens = []
        for centre in chosen:
            near = (places - places[centre]).norm(dim=1).argsort()[: stage.neighbours]
            pairs = torch.stack([torch.cat((x[j] - x[centre], x[centre])) for j in near])
            tokens.append(lbr(stage.layer, lbr(stage.pairs, pairs)).amax(0))
        x, places = torch.stack(tokens), places[chosen]
    outputs = [x] if len(model.stages) else []
    for layer in model.project:
        x = lbr(layer, x)
    for block in model.blocks:
        attention, heads = block.attention, block.attention.core.num_heads
        q, v = attention.query(x).chunk(heads, -1), attention.value(x).chunk(heads, -1)
        attended = [(one @ one.T / one.shape[1] ** 0.5).softmax(-1) @ value for one, value in zip(q, v, strict=True)]
        x = x + lbr(block.layer, x - torch.cat(attended, -1))
        outputs.append(x)
    x = lbr(model.fuse, torch.cat(outputs, -1), 0.2)
    x = {"max": x.amax(0), "mean": x.mean(0), "max+mean": torch.cat((x.amax(0), x.mean(0)))}[model.pooling]
    for layer in model.head:
        x = lbr(layer, x[None])[0]
    return x


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"centres": (), "pooling": "mean"},
        {"num_heads": 2, "in_features": 5, "pooling": "max+mean", "head_dims": ()},
        {"centres": (12,), "neighbours": 40, "head_dims": (7,)},
    ],
)
def test_it_is_the_network_written_out_for_one_cloud(given):
    model = build(**given)
    clouds = points(3, numbers=given.get("in_features", 3))
    features = model(clouds)
    assert features.shape == (3, model.out_dim)
    torch.testing.assert_close(features, torch.stack([by_hand(model, cloud) for cloud in clouds]))


def test_the_published_normalization_is_two_half_steps_of_sinkhorn():
    q = torch.randn(2, 9, 4, dtype=torch.float64)
    scores = q @ q.mT
    # Softmax over one axis, then division by the sums over the other, then values times weights, as published.
    weights = scores.softmax(-1)
    weights = (weights / weights.sum(1, keepdim=True)).mT
    torch.testing.assert_close(ops.sinkhorn(scores.mT, 2).mT, weights)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9, dtype=torch.float64))


@pytest.mark.parametrize("normalization", [Softmax, partial(Sinkhorn, n_iters=5)])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filler", [1e30, torch.nan])
@pytest.mark.parametrize(
    "given", [{"pooling": "max+mean"}, {"pooling": "max+mean+cls"}, {"pooling": "max+seed"}, {"centres": ()}]
)
def test_a_padded_batch_gives_what_the_clouds_give_alone(normalization, side, filler, given):
    model, (sets, inputs, mask) = build(normalization, **given), padded(filler=filler, side=side)
    inputs.requires_grad_()
    alone = [x.requires_grad_() for x in sets]
    features, wanted = model(inputs, mask), torch.cat([model(x) for x in alone])
    torch.testing.assert_close(features, wanted, rtol=1e-9, atol=1e-11)
    upstream = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)
    found = torch.autograd.grad(features, [inputs, *model.parameters()], upstream)
    right = torch.autograd.grad(wanted, [*alone, *model.parameters()], upstream)
    torch.testing.assert_close(found[0][mask], torch.cat([x[0] for x in right[: len(alone)]]), rtol=1e-8, atol=1e-10)
    assert (found[0][~mask] == 0).all()
    for one, other in zip(found[1:], right[len(alone) :], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("centres", [(16, 16), ()])
def test_the_amount_of_padding_changes_nothing_in_training(centres):
    results = []
    for width, filler in ((13, 0.0), (20, torch.nan)):
        model, (_, inputs, mask) = build(centres=centres, dropout=0.0).train(), padded(width, filler, sizes=SIZES[1:])
        features = model(inputs, mask)
        features.sin().sum().backward()
        results.append((features, [p.grad for p in model.parameters()], list(model.buffers())))
    torch.testing.assert_close(*results)


def test_a_mask_of_only_real_points_is_no_mask_in_training():
    model, other, inputs = build(dropout=0.0).train(), build(dropout=0.0).train(), points()
    torch.testing.assert_close(model(inputs), other(inputs, torch.ones(3, 40, dtype=torch.bool)))
    torch.testing.assert_close(list(model.buffers()), list(other.buffers()))


def test_a_cloud_without_points_is_finite_and_leaves_the_others_alone():
    model, inputs = build(), points(2)
    mask = torch.tensor([[True] * 40, [False] * 40])
    features = model(inputs, mask)
    torch.testing.assert_close(features[:1], model(inputs[:1]))
    assert features.isfinite().all()
    model.train()(inputs, mask).sin().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_order_of_the_points_changes_nothing():
    model, (_, inputs, mask) = build(Sinkhorn), padded()
    order = torch.randperm(44, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(inputs[:, order], mask[:, order]), model(inputs, mask), rtol=1e-10, atol=1e-12)
    inputs, order = points(), order[order < 40]
    torch.testing.assert_close(model(inputs[:, order]), model(inputs), rtol=1e-10, atol=1e-12)


@EVERY
def test_under_every_normalization(name):
    model, inputs = build(registered()[name]), points(3)
    torch.testing.assert_close(model(inputs[1:2]), model(inputs)[1:2], rtol=1e-9, atol=1e-11)
    _, filled, mask = padded()
    model.train()
    model(filled, mask).sin().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        # Hard choices give their inputs no gradient; the batch norm takes a constant that all values share.
        if not parameter_name.endswith(("query.weight", "value.bias")):
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
            assert parameter.grad.abs().amax() > 1e-12, parameter_name


@pytest.mark.parametrize("normalization", [Softmax, Sinkhorn, registered()["SymmetricSinkhorn"]])
def test_queries_are_trained(normalization):
    model = build(normalization, temperature="learned").train()
    model(points()).sin().sum().backward()
    for block in model.blocks:
        assert block.attention.query.weight.grad.abs().amax() > 1e-8
        assert block.attention.core.log_temperature.grad.abs().amax() > 1e-8


def test_both_arms_of_a_comparison_start_from_the_same_weights():
    softmax, sinkhorn = (dict(build(normalization).named_parameters()) for normalization in (Softmax, Sinkhorn))
    assert softmax.keys() == sinkhorn.keys()
    assert all(softmax[name].equal(sinkhorn[name]) for name in softmax)
    assert (build(Softmax)(points()) - build(Sinkhorn)(points())).abs().amax() > 1e-3


@pytest.mark.parametrize("name", ["Softmax", "Sinkhorn", "SymmetricSinkhorn"])
def test_half_precision_under_autocast(name):
    model, inputs = build(registered()[name]).float(), points().float()
    _, filled, mask = padded()
    for given in ((inputs, None), (filled.float(), mask)):
        with torch.autocast("cpu", torch.bfloat16):
            features = model(*given)
        assert (features - model(*given)).abs().mean() < 0.04
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.train()(*given).square().mean()
        loss.backward()
        model.eval()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("normalization", "masked"), [(Softmax, False), (Sinkhorn, True)])
def test_one_graph_for_the_compiler(normalization, masked):
    torch.compiler.reset()
    model, (_, inputs, mask) = build(normalization, depth=1, dropout=0.0), padded()
    given = (inputs, mask) if masked else (points(),)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), model(*given))
    model.train()
    compiled(*given).sin().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_batch_of_one_can_be_trained_on():
    model = build().train()
    model(points(1)).sin().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_dropout_acts_in_training_alone():
    model, inputs = build(), points()
    assert model(inputs).equal(model(inputs))
    model.train()
    assert not model(inputs).equal(model(inputs))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"in_features": 2}, "in_features must be at least 3, got 2"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"centres": (8, 0)}, "centres must be at least 1"),
        ({"centres": (8, 16)}, r"centres must not grow from stage to stage, got \[8, 16\]"),
        ({"neighbours": 0}, "neighbours must be at least 1"),
        ({"head_dims": (0,)}, "head_dims must be at least 1"),
        ({"num_heads": 3}, "4 \\* num_heads = 12 must divide the width dim=16"),
        ({"centres": (8,) * 5}, "32, 2 for each stage of centres, must divide the width dim=16"),
        ({"pooling": "mean+max"}, "pooling must be one of max, mean, cls, seed, max\\+mean, .*, got 'mean\\+max'"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
    ],
)
def test_what_cant_be_built(given, message):
    with pytest.raises(ValueError, match=message):
        build(**given)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (points(numbers=6), "a point has 6 numbers, but .* in_features=3: set model.backbone.in_features to 6"),
        (points(numbers=2), "takes points of three coordinates and more, got 2 numbers"),
        (points()[0], r"takes point clouds \(batch, points, numbers\) of a float dtype, got shape \(40, 3\)"),
        (points().long(), "got shape .* of torch.int64"),
        (points(size=0), "clouds of one point or more"),
    ],
)
def test_clouds_that_the_network_wasnt_built_for(inputs, message):
    with pytest.raises(UserError, match=message):
        build()(inputs)


def test_heads_are_refused_by_the_attention_too():
    with pytest.raises(ValueError, match="must divide the width dim=18"):
        OffsetAttention(18, 1, Softmax)


@pytest.mark.parametrize("normalization", [Softmax, Sinkhorn])
def test_it_learns_real_shapes(real_data, normalization):
    """Far above chance, 0.1, after two passes over 1,000 clouds."""
    data = PointClouds(root=real_data / "modelnet10_clouds.npz", num_points=64, batch_size=20)
    data.setup()
    torch.manual_seed(0)
    backbone = PointCloudTransformer(
        normalization, dim=32, depth=2, centres=(32, 16), neighbours=8, fused_dim=64, head_dims=(32,), dropout=0.0
    )
    model = nn.Sequential(backbone, nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _, batch in zip(range(100), data.train_dataloader(), strict=False):
        loss = F.cross_entropy(model(batch.inputs), batch.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = torch.cat([model(batch.inputs).argmax(1) == batch.target for batch in data.val_dataloader()])
    assert right.float().mean() > 0.5
