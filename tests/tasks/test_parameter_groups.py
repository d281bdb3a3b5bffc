"""Groups of parameters: what an optimizer did with each, seen in steps without a gradient."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.models import SetTransformer, TextTransformer, VisionTransformer
from sinkformer_pl.normalizations import LowRankSinkhorn, SlicedTransport, Softmax
from sinkformer_pl.tasks import Classifier
from sinkformer_pl.tasks.parameter_groups import undecayed

SMALL = partial(SetTransformer, dim=8, num_heads=2, inducing_points=4)
RATE, DECAY = 0.1, 0.5


class Still(Classifier):
    """A classifier whose gradients are 0, so that an optimizer with decoupled decay does nothing but decay."""

    def training_step(self, batch, batch_idx):
        return 0 * super().training_step(batch, batch_idx)


def shrunk(backbone=SMALL, normalization=Softmax, **arguments):
    """Return by what factor one step shrank each parameter."""
    pl.seed_everything(0)
    optimizer = partial(torch.optim.AdamW, lr=RATE, weight_decay=DECAY)
    model = Still(backbone, normalization, 12, optimizer=optimizer, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    quiet = dict.fromkeys(
        ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger", "limit_val_batches"), False
    )
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, **quiet)
    trainer.fit(model, ProceduralShapes(train_size=24, val_size=12, test_size=12))
    factors = {name: (value / before[name]).detach().flatten() for name, value in model.named_parameters()}
    assert all(torch.allclose(each, each[:1], atol=1e-5) for each in factors.values())
    return {name: round(float(each[0]), 4) for name, each in factors.items()}, trainer.optimizers[0].param_groups


def test_weights_alone_decay():
    factors, groups = shrunk()
    kept = {name for name, factor in factors.items() if factor == 1}
    assert set(factors.values()) == {1, 1 - RATE * DECAY}
    assert kept == {
        name
        for name in factors
        if name.endswith((".bias", ".inducing", ".seeds")) or ".norm" in name or "_norm" in name
    }
    assert [group["name"] for group in groups] == ["decay", "no_decay"]


def test_all_decay_where_none_is_named():
    factors, groups = shrunk(no_weight_decay=[])
    assert set(factors.values()) == {1 - RATE * DECAY}
    assert len(groups) == 1
    assert "name" not in groups[0]


def test_patterns_say_what_does_not_decay():
    factors, _ = shrunk(no_weight_decay=["head", "*.inducing"])
    assert {name for name, factor in factors.items() if factor == 1} == {
        name for name in factors if name.startswith("head.") or name.endswith(".inducing")
    }


def test_each_group_has_its_rate_and_its_decay():
    groups = [
        {"parameters": "head.weight", "lr_scale": 0.5, "weight_decay": 1.0},
        {"parameters": ["head", "backbone.embed"], "lr_scale": 0.2},
    ]
    factors, made = shrunk(parameter_groups=groups)
    assert factors["head.weight"] == round(1 - 0.5 * RATE * 1.0, 4)
    assert factors["backbone.embed.weight"] == round(1 - 0.2 * RATE * DECAY, 4)
    assert factors["head.bias"] == factors["backbone.embed.bias"] == 1
    assert {factor for name, factor in factors.items() if "head" not in name and "embed" not in name} == {
        1 - RATE * DECAY,
        1,
    }
    rates = [(group["name"], group["lr"]) for group in made]
    assert rates == [
        ("head.weight", pytest.approx(0.5 * RATE)),
        ("head,backbone.embed", pytest.approx(0.2 * RATE)),
        ("head,backbone.embed-no_decay", pytest.approx(0.2 * RATE)),
        ("rest", RATE),
        ("rest-no_decay", RATE),
    ]


def test_what_is_frozen_is_in_no_group():
    model = Classifier(SMALL, Softmax, 12)
    model.backbone.requires_grad_(False)
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(model, ProceduralShapes(train_size=24, val_size=12, test_size=12))
    groups = trainer.optimizers[0].param_groups
    assert [group["params"] for group in groups] == [[model.head.weight], [model.head.bias]]


@pytest.mark.parametrize(
    ("backbone", "normalization", "names"),
    [
        (SMALL, partial(LowRankSinkhorn, rank=2), ["inducing", "seeds", "pivots", "mass_logits"]),
        (
            partial(VisionTransformer, image_size=8, patch_size=4, dim=8, num_heads=2, depth=1),
            partial(SlicedTransport, slices=2),
            ["positions", "directions"],
        ),
        (partial(TextTransformer, vocab_size=9, max_length=4, dim=8, num_heads=2, depth=1), Softmax, ["table"]),
    ],
)
def test_what_is_learned_beside_maps_does_not_decay(backbone, normalization, names):
    network = backbone(normalization)
    spared = set(undecayed(network))
    for name, parameter in network.named_parameters():
        assert (name in spared) == (parameter.ndim <= 1 or name.rpartition(".")[2] in names), name
    assert {name.rpartition(".")[2] for name in spared} >= set(names)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"parameter_groups": [{"parameters": "bakbone.embed", "lr_scale": 1}]}, "did you mean backbone.embed"),
        ({"parameter_groups": [{"parameters": "head", "lr": 1}]}, "no key lr; valid: parameters, lr_scale"),
        ({"parameter_groups": [{"parameters": "head", "lr_scale": -1}]}, "lr_scale must be a number of at least 0"),
        ({"parameter_groups": [{"parameters": "head"}]}, "give lr_scale or weight_decay"),
        ({"parameter_groups": [{"lr_scale": 1}]}, "parameters must be patterns"),
        (
            {"parameter_groups": [{"parameters": part, "lr_scale": 1} for part in ("*", "head")]},
            "parameter_groups head: all of these are in groups before it",
        ),
        (
            {"optimizer": torch.optim.LBFGS, "parameter_groups": [{"parameters": "head", "weight_decay": 1}]},
            "the optimizer has no weight_decay",
        ),
        ({"no_weight_decay": ["hed"]}, "model.no_weight_decay hed"),
    ],
)
def test_groups_that_can_not_be_are_refused_when_the_task_is_made(arguments, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        Classifier(SMALL, Softmax, 12, **arguments)
