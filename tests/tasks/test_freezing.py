"""Parts of a network that are frozen by name."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BackboneFinetuning
from pytorch_lightning.strategies import DDPStrategy
from torch import nn

from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.errors import UserError
from sinkformer_pl.models import Backbone, PointCloudTransformer, SetTransformer
from sinkformer_pl.normalizations import Softmax
from sinkformer_pl.tasks import Classifier

CLOUDS = partial(PointCloudTransformer, dim=8, depth=2, centres=(), fused_dim=8, head_dims=(8, 8), dropout=0.5)
SETS = partial(SetTransformer, dim=8, num_heads=2, inducing_points=4, dropout=0.5)
DECAY = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5)


class Modes(pl.Callback):
    """Write down the modules that are in evaluation mode in each training step."""

    def __init__(self):
        self.evaluating = []

    def on_train_batch_end(self, trainer, model, *args):
        self.evaluating.append({name for name, module in model.named_modules() if not module.training})


def fit(model: Classifier, *callbacks: pl.Callback, epochs: int = 2, **trainer) -> tuple[set[str], set[str]]:
    """Train; return the names of parameters and buffers that have changed, and of those that haven't."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = ProceduralShapes(train_size=32, val_size=16, test_size=12, batch_size=16, max_points=48, min_points=32)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    arguments = {"accelerator": "cpu", "max_epochs": epochs, "callbacks": list(callbacks), **quiet, **trainer}
    pl.Trainer(**arguments).fit(model, data)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    return changed, before.keys() - changed


def test_frozen_weights_and_statistics_stay_and_all_others_train():
    model = Classifier(CLOUDS, Softmax, 12, optimizer=DECAY, freeze=["backbone.embed", "backbone.blocks.0-0"])
    modes = Modes()
    changed, same = fit(model, modes)
    frozen = ("backbone.embed.", "backbone.blocks.0.")
    assert {name for name in model.state_dict() if name.startswith(frozen)} == same
    assert {"backbone.embed.0.norm.running_mean", "backbone.blocks.0.layer.norm.running_var"} <= same
    assert "backbone.blocks.1.layer.norm.running_mean" in changed
    optimized = [p for group in model.trainer.optimizers[0].param_groups for p in group["params"]]
    assert len(optimized) == sum(not name.startswith(frozen) for name, _ in model.named_parameters())
    # In the second epoch, behind a validation, as in the first; all of them in evaluation.
    inside = {name for name, _ in model.named_modules() if f"{name}.".startswith(frozen)}
    assert modes.evaluating == [inside] * 4
    assert not any(module.training for module in model.eval().modules())


def test_a_head_alone_is_trained_on_features_without_dropout():
    torch.manual_seed(0)
    model = Classifier(SETS, Softmax, 12, optimizer=DECAY, freeze="backbone")
    inputs = torch.randn(3, 9, 3)
    features = model.backbone(inputs)
    assert model.training
    changed, _ = fit(model)
    assert changed == {"head.weight", "head.bias"}
    assert torch.equal(model.train().backbone(inputs), features)


def test_single_parameters_freeze_their_module_where_they_are_all_that_it_has():
    model = Classifier(CLOUDS, Softmax, 12, freeze=["*.norm.weight", "*.norm.bias", "*.value.bias"])
    assert not model.backbone.fuse.norm.training
    assert model.backbone.fuse.training
    assert model.backbone.blocks[0].attention.value.training
    assert not model.backbone.blocks[0].attention.value.bias.requires_grad
    changed, same = fit(model, epochs=1)
    assert "backbone.fuse.norm.running_mean" in same
    assert "backbone.fuse.linear.weight" in changed


def test_frozen_parts_are_unused_in_no_process():
    """DDP refuses the second step if a parameter that it waits for has had no gradient."""
    model = Classifier(SETS, Softmax, 12, freeze=["backbone.blocks.0", "backbone.pool"])
    try:
        changed, _ = fit(model, strategy=DDPStrategy(process_group_backend="gloo"), devices=1, epochs=1)
    finally:
        torch.distributed.destroy_process_group()
    assert "backbone.blocks.1.inducing" in changed


@pytest.mark.parametrize("epochs", [1, 3])
def test_what_is_frozen_by_name_stays_so_when_the_backbone_is_unfrozen(epochs):
    model = Classifier(SETS, Softmax, 12, optimizer=DECAY, freeze=["backbone.embed", "backbone.blocks.0"])
    modes = Modes()
    changed, _ = fit(model, BackboneFinetuning(unfreeze_backbone_at_epoch=1), modes, epochs=epochs)
    head = {"head.weight", "head.bias"}
    frozen = {name for name in model.state_dict() if name.startswith(("backbone.embed.", "backbone.blocks.0."))}
    assert changed == (head if epochs == 1 else model.state_dict().keys() - frozen)
    assert all("backbone.blocks.0.gather.dropout" in names for names in modes.evaluating)
    assert not any("backbone.blocks.1.gather.dropout" in names for names in modes.evaluating)


class Normed(Backbone):
    """A backbone of a user, with a batch norm of PyTorch's, which Lightning's callback leaves trainable."""

    def __init__(self, normalization) -> None:
        super().__init__()
        self.out_dim = 4
        self.project, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, inputs, mask=None):
        return self.norm(self.project(inputs).mean(1))


def test_a_batch_norm_that_is_frozen_by_name_isn_t_left_trainable():
    for epochs, trained in ((1, ["head"]), (2, ["head", "backbone.project"])):
        model = Classifier(Normed, Softmax, 12, optimizer=DECAY, freeze="backbone.norm")
        changed, _ = fit(model, BackboneFinetuning(unfreeze_backbone_at_epoch=1), epochs=epochs)
        assert changed == {f"{part}.{name}" for part in trained for name in ("weight", "bias")}
        if epochs == 1:
            optimized = [id(p) for group in model.trainer.optimizers[0].param_groups for p in group["params"]]
            assert sorted(optimized) == sorted(map(id, model.head.parameters()))


@pytest.mark.parametrize(
    ("freeze", "match"),
    [
        ("backbone.blocks.0-3", r"model\.freeze backbone\.blocks\.2, of backbone\.blocks\.0-3: .*backbone\.blocks\.1"),
        (["backbone.embed", "bakcbone"], r"model\.freeze bakcbone: .*did you mean backbone"),
        ("*", r"model\.freeze: .*nothing would be trained"),
    ],
)
def test_names_without_a_match_and_all_names_are_refused(freeze, match):
    with pytest.raises(UserError, match=match):
        Classifier(SETS, Softmax, 12, freeze=freeze)


def test_what_is_frozen_is_in_the_hyper_parameters():
    model = Classifier(SETS, Softmax, 12, freeze="backbone.embed,backbone.pool")
    assert model.hparams["freeze"] == ["backbone.embed", "backbone.pool"]
    again = Classifier(**model.hparams)
    assert [name for name, p in again.named_parameters() if not p.requires_grad] == [
        name for name in again.state_dict() if name.startswith(("backbone.embed.", "backbone.pool."))
    ]
