"""Rates for each layer: seen in the groups of an optimizer, and in a step whose update is the rate."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BackboneFinetuning
from torch import nn

from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.models import PointCloudTransformer, SetTransformer, TextTransformer, VisionTransformer
from sinkformer_pl.models.backbone import Backbone
from sinkformer_pl.normalizations import Softmax
from sinkformer_pl.tasks import Classifier
from sinkformer_pl.tasks.layer_decay import layers_of

SMALL = partial(SetTransformer, dim=8, num_heads=2, inducing_points=4, depth=2)
RATE = 0.5


def trained(*callbacks, **arguments):
    """Return by how much each parameter changed in a step of SGD whose gradients are 1, and the groups."""
    model = Ones(SMALL, Softmax, 12, optimizer=partial(torch.optim.SGD, lr=RATE), **arguments)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    quiet = dict.fromkeys(
        ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger", "limit_val_batches"), False
    )
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, callbacks=list(callbacks), **quiet)
    trainer.fit(model, ProceduralShapes(train_size=24, val_size=12, test_size=12))
    changes = {name: (before[name] - value).detach().flatten() for name, value in model.named_parameters()}
    assert all(torch.allclose(change, change[:1], atol=1e-6) for change in changes.values())
    return {name: round(float(change[0]), 5) for name, change in changes.items()}, trainer.optimizers[0].param_groups


class Ones(Classifier):
    """A classifier with a loss that is the sum of all its parameters."""

    def training_step(self, batch, batch_idx):
        return 0 * super().training_step(batch, batch_idx) + sum(p.sum() for p in self.parameters() if p.requires_grad)


def test_rates_are_geometric_from_the_head_down():
    changes, groups = trained(layer_decay=0.5)
    for name, change in changes.items():
        depth = next((d for d, p in enumerate(("embed.", "blocks.0.", "blocks.1.")) if f"backbone.{p}" in name), 3)
        assert change == pytest.approx(RATE * 0.5 ** (3 - depth)), name
    assert [(group["name"], group["lr_scale"]) for group in groups] == [
        (f"layer_{depth}", 0.5 ** (3 - depth)) for depth in range(4)
    ]


def test_factors_of_groups_multiply_those_of_layers():
    embed = {"parameters": ["backbone.embed", "head"], "lr_scale": 3.0, "weight_decay": 0.0}
    changes, groups = trained(layer_decay=0.5, parameter_groups=[embed], freeze="backbone.blocks.0")
    assert changes["head.weight"] == RATE * 3.0
    assert changes["backbone.embed.weight"] == RATE * 3.0 * 0.5**3
    assert changes["backbone.blocks.1.inducing"] == RATE * 0.5
    assert changes["backbone.blocks.0.inducing"] == 0
    assert [group["name"] for group in groups] == [
        *("backbone.embed,head-layer_0", "backbone.embed,head-layer_3"),
        *("rest-layer_2", "rest-layer_3"),
    ]


def test_a_single_layer_keeps_its_factor():
    changes, _ = trained(layer_decay=0.5, freeze=["head", "backbone.pool", "backbone.norm", "backbone.blocks"])
    assert changes["backbone.embed.weight"] == RATE * 0.5**3


def block():
    return nn.ModuleDict({"layer": nn.ModuleList([nn.ModuleDict({"attn": nn.Linear(2, 2)}), nn.Linear(2, 2)])})


class Stages(Backbone):
    """Stages of blocks, in a list of lists, with what is no layer around them."""

    def __init__(self, normalization):
        super().__init__()
        self.out_dim = 2
        self.stem = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        self.stages = nn.ModuleList(
            nn.ModuleDict({"merge": nn.Linear(2, 2), "blocks": nn.Sequential(block(), block())}) for _ in range(2)
        )

    def forward(self, inputs, mask=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [
        (partial(VisionTransformer, image_size=8, patch_size=4, dim=8, num_heads=2, depth=2), "encoder.blocks.{}"),
        (
            partial(TextTransformer, vocab_size=9, max_length=4, dim=8, num_heads=2, depth=2),
            "encoder.blocks.{}",
        ),
        (partial(PointCloudTransformer, dim=16, depth=2, head_dims=[8], fused_dim=8), "blocks.{}"),
        (lambda _: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2), "layers.{}"),
    ],
)
def test_layers_of_networks(backbone, layers):
    assert layers_of(backbone(Softmax)) == [layers.format(number) for number in range(2)]


def test_layers_of_stages_are_numbered_through():
    model = Classifier(Stages, Softmax, 2, layer_decay=0.5)
    names = {name.removesuffix(".weight"): model._layers.depth(name) for name, _ in model.named_parameters()}
    depths = {name: depth for name, depth in names.items() if not name.endswith(".bias")}
    assert depths == {
        **{"backbone.stem.0": 0, "backbone.stem.2": 0, "backbone.stages.0.merge": 0, "head": 5},
        **{
            f"backbone.stages.{n // 2}.blocks.{n % 2}.layer.{part}": n + 1 for n in range(4) for part in ("0.attn", "1")
        },
        "backbone.stages.1.merge": 2,
    }


class Mean(Backbone):
    """No layers."""

    def __init__(self, normalization):
        super().__init__()
        self.out_dim, self.embed = 3, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def forward(self, inputs, mask=None):
        return self.embed(inputs).mean(1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"layer_decay": 0.0}, "layer_decay must be in (0, 1], got 0.0"),
        ({"layer_decay": 1.5}, "layer_decay must be in (0, 1], got 1.5"),
        ({"layer_decay": 0.5, "backbone": Mean}, "Mean has no numbered layers"),
        ({"layer_decay": 0.5, "backbone": Mean}, "give model.parameter_groups"),
        ({"layer_decay": 0.5, "freeze": "backbone.embed,backbone.blocks,backbone.norm,backbone.pool"}, "frozen"),
    ],
)
def test_what_has_no_meaning_is_refused_when_the_task_is_made(arguments, said):
    with pytest.raises(ValueError, match=r"model\.layer_decay") as refused:
        Classifier(**{"backbone": SMALL, "normalization": Softmax, "num_classes": 12, **arguments})
    assert said in str(refused.value)


def test_a_backbone_that_is_unfrozen_as_one_group_is_refused():
    with pytest.raises(ValueError, match=r"model\.layer_decay.*frozen"):
        trained(BackboneFinetuning(unfreeze_backbone_at_epoch=1), layer_decay=0.5)
