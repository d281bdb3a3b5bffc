"""What a network under softmax teaches: losses by hand, their end, resume, what is refused."""

import copy
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from sinkformer_pl.callbacks import Distillation
from sinkformer_pl.callbacks.distillation import difference, divergence, listening
from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.errors import UserError
from sinkformer_pl.models import SetTransformer
from sinkformer_pl.normalizations import SemiUnbalancedSinkhorn, Sinkhorn, Softmax
from sinkformer_pl.tasks import Classifier


class Watch(pl.Callback):
    """The loss of each step."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.losses.append(float(outputs["loss"]))


def built(normalization=Sinkhorn, depth=2, seed=0, **options):
    pl.seed_everything(seed)
    backbone = partial(SetTransformer, **{"dim": 8, "num_heads": 2, "depth": depth, "inducing_points": 0, **options})
    return Classifier(backbone, normalization, 12, optimizer=partial(torch.optim.SGD, lr=0.2))


def fitted(callback, model=None, ckpt_path=None, max_epochs=2, **arguments):
    watch = Watch()
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    callbacks = [watch] if callback is None else [callback, watch]
    trainer = pl.Trainer(accelerator="cpu", max_epochs=max_epochs, limit_val_batches=0, callbacks=callbacks, **quiet)
    model = model or built(**arguments)
    pl.seed_everything(1)
    data = ProceduralShapes(train_size=36, val_size=4, test_size=4, batch_size=8, num_points=12)
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, model, watch


def test_a_network_under_softmax_has_nothing_to_learn_from_itself():
    for more in ({}, {"features": 1.0}, {"attention": 1.0}):
        model = built(Softmax)
        before = copy.deepcopy(model.state_dict())
        _, _, watch = fitted(Distillation(**more), model, max_epochs=1)
        assert max(watch.losses) < 1e-6
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, before[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("more", [{}, {"logits": 0.0, "features": 1.0}, {"logits": 0.0, "attention": 1.0}])
def test_the_network_comes_close_to_the_teacher_and_then_learns_the_task(more):
    model = built(partial(SemiUnbalancedSinkhorn, rho=5.0, learned=True, n_iters=5))
    _, _, watch = fitted(Distillation(over="8 epochs", **more), model, max_epochs=9)
    taught, after = watch.losses[:32], watch.losses[32:]
    assert sum(taught[-4:]) < 0.7 * sum(taught[:4])
    assert min(after) > 1.0  # cross-entropy of twelve classes
    assert not model.adjust_loss
    assert not any(module._forward_hooks for module in model.modules())


def test_the_loss_is_a_sum_of_weighted_terms():
    def first(**weights):
        return fitted(Distillation(**weights), max_epochs=1)[2].losses[0]

    alone = {name: first(**{"logits": 0.0, name: 1.0}) for name in ("logits", "features", "attention")}
    task = fitted(None, max_epochs=1)[2].losses[0]
    weights = {"logits": 0.5, "features": 2.0, "attention": 3.0}
    wanted = sum(weight * alone[name] for name, weight in weights.items()) + 0.1 * task
    assert first(**weights, task=0.1) == pytest.approx(wanted, rel=1e-5)


def test_the_teacher_is_the_checkpoint_that_is_named(tmp_path):
    trainer, teacher, _ = fitted(None, model=built(Softmax, depth=1, dropout=0.5), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")
    model = built(depth=2)
    callback = Distillation(str(tmp_path / "teacher.ckpt"), temperature=2.0)
    seen = []
    callback.on_train_batch_start = lambda trainer, pl_module, batch, _: seen.append((copy.deepcopy(model), batch))
    _, _, watch = fitted(callback, model, max_epochs=1)
    student, batch = seen[0]
    logits, wanted = (network(batch.inputs, batch.mask) for network in (student, teacher.eval()))
    assert watch.losses[0] == pytest.approx(divergence(logits, wanted, 2.0, False).item(), rel=1e-5)
    with pytest.raises(UserError, match=r"Distillation\.attention.*3 layers.*has 2"):
        fitted(Distillation(str(tmp_path / "teacher.ckpt"), attention=1.0), built(depth=2))
    with pytest.raises(UserError, match=r"Distillation\.features.*8.*16"):
        fitted(Distillation(str(tmp_path / "teacher.ckpt"), features=1.0), built(dim=16))
    with pytest.raises(UserError, match=r"nowhere\.ckpt"):
        fitted(Distillation(str(tmp_path / "nowhere.ckpt")), built())


def test_the_losses_are_those_of_their_formulas():
    ours, teacher = torch.randn(4, 3), torch.randn(4, 3)
    by_hand = sum(
        (p * (p.log() - q.log())).sum() for p, q in zip((teacher / 2).softmax(-1), (ours / 2).softmax(-1), strict=True)
    )
    torch.testing.assert_close(divergence(ours, teacher, 2.0, False), by_hand / 4 * 4)
    p, q = (teacher / 2).sigmoid(), (ours / 2).sigmoid()
    apart = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(divergence(ours, teacher, 2.0, True), apart.mean() * 4)
    one, other = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    real = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    rows = real[:, None].expand(2, 3, 4)
    wanted = (one[rows] - other[rows]).square().mean() / other[rows].square().mean()
    torch.testing.assert_close(difference(one, other, real), wanted)


def test_attention_is_captured_with_its_real_queries():
    model, mask = built(), torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    with listening(model, {"features": 1.0, "attention": 1.0}) as captured:
        model(torch.randn(2, 4, 3), mask)
    assert captured.features.shape == (2, 8)
    outputs = list(captured.attention.values())
    assert [output.shape[2] for output, _ in outputs] == [4, 4, 1]
    assert all(torch.equal(queries, mask) for _, queries in outputs[:2])


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_training_resumes_with_the_teacher_that_it_had(tmp_path, epochs):
    callback = partial(Distillation, over="2 epochs", attention=1.0)
    trainer, _, first = fitted(callback(), max_epochs=epochs)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    # Other weights than the teacher's, as those of a network that is made anew.
    _, resumed, rest = fitted(callback(), built(seed=5), tmp_path / "cut.ckpt", max_epochs=3)
    _, whole, losses = fitted(callback(), max_epochs=3)
    assert first.losses + rest.losses == losses.losses
    for one, other in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    if epochs == 1:
        plain, _, _ = fitted(None, max_epochs=1)
        plain.save_checkpoint(tmp_path / "plain.ckpt")
        with pytest.raises(UserError, match=r"plain\.ckpt has no teacher.*teacher PATH"):
            fitted(callback(), ckpt_path=tmp_path / "plain.ckpt", max_epochs=3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"logits": -1.0}, ["Distillation.logits -1.0", "at least 0"]),
        ({"logits": 0.0, "task": 1.0}, ["nothing of the teacher"]),
        ({"temperature": 0.0}, ["Distillation.temperature 0.0"]),
        ({"over": "long"}, ["Distillation.over long", "epochs"]),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, words):
    with pytest.raises(UserError) as error:
        Distillation(**arguments)
    assert all(word in str(error.value) for word in words)


def test_a_task_without_the_list_is_refused():
    class Own(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

    with pytest.raises(UserError, match=r"Own has no list adjust_loss"):
        Distillation().setup(pl.Trainer(logger=False), Own(), "fit")
