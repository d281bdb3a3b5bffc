"""The classifier: what it logs, what it saves, how it trains."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BackboneFinetuning, GradientAccumulationScheduler
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, log_loss
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from sinkformer_pl.batch import Batch
from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.models import Backbone, SetTransformer
from sinkformer_pl.normalizations import Sinkhorn, Softmax
from sinkformer_pl.tasks import Classifier, Constant, StepDecay, WarmupCosine

SMALL = partial(SetTransformer, dim=8, num_heads=2, inducing_points=4)


def shapes(**kwargs) -> ProceduralShapes:
    return ProceduralShapes(train_size=96, val_size=24, test_size=50, **kwargs)


def trainer(**kwargs) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{"accelerator": "cpu", "num_sanity_val_steps": 0, **quiet, **kwargs})


def test_test_metrics_are_those_of_scikit_learn_whatever_the_batches():
    pl.seed_everything(0)
    model = Classifier(SMALL, Softmax, num_classes=12, label_smoothing=0.3)
    data = shapes(batch_size=7)
    engine = trainer()
    (metrics,) = engine.test(model, data, verbose=False)
    predictions = engine.predict(model, data)
    probabilities = torch.cat([batch.probabilities for batch in predictions]).numpy()
    order = torch.cat([batch.index for batch in predictions])
    assert order.tolist() == list(range(50))
    truth = data.datasets["test"].targets.numpy()
    predicted = probabilities.argmax(-1)
    assert metrics["test/accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert metrics["test/accuracy_macro"] == pytest.approx(balanced_accuracy_score(truth, predicted))
    # Without label smoothing, which belongs to the training.
    assert metrics["test/loss"] == pytest.approx(
        log_loss(truth, probabilities.astype(np.float64), labels=range(12)), rel=1e-5
    )
    expected = confusion_matrix(truth, predicted, labels=range(12))
    assert model.confusion["test"].tolist() == expected.tolist()
    for label, name in enumerate(data.classes):
        assert metrics[f"test/accuracy_class/{name}"] == pytest.approx(expected[label, label] / expected[label].sum())


def test_a_class_without_samples_in_the_split_has_no_figure():
    model = Classifier(SMALL, Softmax, num_classes=12)
    (metrics,) = trainer().test(model, ProceduralShapes(train_size=96, val_size=24, test_size=9), verbose=False)
    each = [value for name, value in metrics.items() if name.startswith("test/accuracy_class/")]
    assert len(each) == 9
    assert metrics["test/accuracy_macro"] == pytest.approx(sum(each) / 9)


@pytest.mark.parametrize("normalization", [Softmax, Sinkhorn])
def test_it_learns(normalization):
    pl.seed_everything(0)
    optimizer = partial(torch.optim.AdamW, lr=5e-3)
    model = Classifier(partial(SetTransformer, dim=16, num_heads=2), normalization, 12, optimizer=optimizer)
    data = ProceduralShapes(train_size=240, val_size=24, test_size=24)
    engine = trainer(max_epochs=6)
    before = trainer().validate(model, data, verbose=False)[0]["val/loss"]
    engine.fit(model, data)
    assert float(engine.callback_metrics["val/loss"]) < before - 0.4


def test_label_smoothing_is_in_the_training_loss():
    torch.manual_seed(0)
    plain = Classifier(SMALL, Softmax, num_classes=3)
    smooth = Classifier(SMALL, Softmax, num_classes=3, label_smoothing=0.2)
    smooth.load_state_dict(plain.state_dict())
    batch = Batch(torch.randn(4, 9, 3), None, torch.tensor([0, 1, 2, 0]), torch.arange(4))
    log_p = plain(batch.inputs, batch.mask).log_softmax(-1)
    target = torch.nn.functional.one_hot(batch.target, 3) * 0.8 + 0.2 / 3
    assert smooth.training_step(batch, 0).item() == pytest.approx(-(target * log_p).sum(-1).mean().item(), rel=1e-5)


def test_class_weights_are_in_the_training_loss_alone():
    torch.manual_seed(0)
    weights = torch.tensor([1.0, 5.0, 0.5])
    model = Classifier(SMALL, Softmax, num_classes=3, label_smoothing=0.1, class_weights=weights.tolist())
    batch = Batch(torch.randn(4, 9, 3), None, torch.tensor([0, 1, 2, 0]), torch.arange(4))
    logits = model(batch.inputs, batch.mask)
    expected = nn.functional.cross_entropy(logits, batch.target, weight=weights, label_smoothing=0.1)
    assert model.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-6)
    model.validation_step(batch, 0)
    plain = nn.functional.cross_entropy(logits, batch.target)
    assert model.val_metrics.figures("abc")["loss"].item() == pytest.approx(plain.item(), rel=1e-6)
    assert not any("class_weights" in name for name in model.state_dict())


def test_balanced_class_weights_are_of_the_training_samples():
    data = shapes()
    model = Classifier(SMALL, Softmax, 12, class_weights="balanced")
    trainer(fast_dev_run=True).fit(model, data)
    targets = data.datasets["train"].targets.numpy()
    expected = compute_class_weight("balanced", classes=np.arange(12), y=targets)
    assert model.class_weights.tolist() == pytest.approx(expected.tolist())
    by_name = Classifier(SMALL, Softmax, 12, class_weights={data.classes[3]: 4.0})
    trainer(fast_dev_run=True).fit(by_name, data)
    assert by_name.class_weights.tolist() == [1.0, 1.0, 1.0, 4.0, *[1.0] * 8]
    with pytest.raises(ValueError, match="don't say how often each class occurs; give a list"):
        trainer(fast_dev_run=True).fit(model, data.train_dataloader())


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (partial(StepDecay, milestones=[0.5], factor=0.1), {0: 1, 5: 1, 6: 0.1, 11: 0.1}),
        (partial(WarmupCosine, warmup=0.5), {3: 0.5, 6: 1.0, 9: 0.5}),
    ],
)
def test_schedule_follows_the_steps_of_the_whole_training(schedule, rates):
    seen = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    optimizer = partial(torch.optim.SGD, lr=2.0)
    model = Classifier(SMALL, Softmax, 12, optimizer=optimizer, schedule=schedule)
    # 96 samples in batches of 16, accumulated two by two: three steps an epoch, twelve in all.
    engine = trainer(max_epochs=4, accumulate_grad_batches=2, callbacks=[Rates()], limit_val_batches=0)
    engine.fit(model, shapes(batch_size=16))
    assert len(seen) == 24
    for step, factor in rates.items():
        assert seen[2 * step] == pytest.approx(2.0 * factor, rel=1e-6), step


class Changing(pl.Callback):
    """A callback of a user that changes, as the second epoch starts, how many steps there will be."""

    def __init__(self, parts=1, epochs=3):
        self.parts, self.epochs = parts, epochs

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.accumulate_grad_batches, trainer.fit_loop.max_epochs = self.parts, self.epochs


class Stream(torch.utils.data.IterableDataset):
    """Six batches, whose number nobody knows."""

    def __iter__(self):
        return (Batch(torch.randn(4, 9, 3), None, torch.arange(4), torch.arange(4)) for _ in range(6))


class Rates(pl.Callback):
    """The rate of each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


def rates_of(*callbacks, data=None, **arguments):
    rates = Rates()
    optimizer = partial(torch.optim.SGD, lr=2.0)
    model = Classifier(SMALL, Softmax, 12, optimizer=optimizer, schedule=WarmupCosine)
    arguments = {"max_epochs": 3, "limit_val_batches": 0, **arguments}
    trainer(callbacks=[*callbacks, rates], **arguments).fit(model, shapes(batch_size=16) if data is None else data)
    return rates.seen


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        # Six batches an epoch.
        ({}, 18),
        ({"accumulate_grad_batches": 4}, 6),
        ({"accumulate_grad_batches": 4, "max_steps": 5}, 5),
        ({"scheduling": {0: 2, 1: 1}}, 15),
        ({"scheduling": {0: 4}}, 6),
        ({"scheduling": {1: 4, 2: 3}}, 10),
        ({"scheduling": {1: 4}, "max_steps": 7}, 7),
        ({"limit_train_batches": 0.5, "scheduling": {1: 2}}, 7),
        ({"max_steps": 5, "max_epochs": -1, "data": torch.utils.data.DataLoader(Stream(), batch_size=None)}, 5),
    ],
)
def test_the_schedule_spans_the_steps_that_are_taken(arguments, steps):
    scheduling = arguments.get("scheduling")
    more = [] if scheduling is None else [GradientAccumulationScheduler(dict(scheduling))]
    found = rates_of(*more, **{name: value for name, value in arguments.items() if name != "scheduling"})
    assert found == pytest.approx([2.0 * WarmupCosine()(step / steps) for step in range(steps)])


@pytest.mark.parametrize(
    ("change", "steps"), [(Changing(parts=3), 10), (Changing(epochs=2), 12), (Changing(epochs=5), 30)]
)
def test_a_change_of_the_number_of_steps_in_the_course_of_a_training_is_followed_and_said(change, steps, caplog):
    with caplog.at_level("INFO"):
        found = rates_of(change)
    assert found[:6] == pytest.approx([2.0 * WarmupCosine()(step / 18) for step in range(6)])
    assert found[7:] == pytest.approx([2.0 * WarmupCosine()(step / steps) for step in range(7, steps)])
    assert caplog.text.count(f"continues as in a training of {steps} steps; up to now it was that of one of 18") == 1


def test_a_schedule_over_data_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="WarmupCosine: it spans all steps of the training, whose number isn't known"):
        rates_of(data=torch.utils.data.DataLoader(Stream(), batch_size=None))


@pytest.mark.parametrize("schedule", [Constant, partial(StepDecay, milestones=[0.8], factor=0.5)])
def test_a_backbone_that_is_unfrozen_has_a_rate_of_its_own(schedule):
    groups = []

    class See(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            groups.extend((len(group["params"]), group["lr"]) for group in trainer.optimizers[0].param_groups)

    model = Classifier(SMALL, Softmax, 12, optimizer=partial(torch.optim.SGD, lr=2.0), schedule=schedule)
    unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=2)
    trainer(max_epochs=4, callbacks=[unfreeze, See()], limit_val_batches=0).fit(model, shapes(batch_size=16))
    many, last = len(list(model.backbone.parameters())), schedule()(1.0)
    # The backbone's rate is a tenth at first, twice as much in the next epoch; the schedule is for both.
    rates = [(2, 2.0), (2, 2.0), (2, 2.0), (many, 0.2), (2, 2.0 * last), (many, 0.4 * last)]
    assert groups == [(number, pytest.approx(rate)) for number, rate in rates]


def test_a_training_of_nothing_is_refused():
    model = Classifier(SMALL, Softmax, 12)
    with pytest.raises(ValueError, match="no parameter needs a gradient"):
        trainer(max_epochs=1).fit(model.requires_grad_(False), shapes())


class Mean(Backbone):
    """A backbone of a user."""

    def __init__(self, normalization, width: int = 5) -> None:
        super().__init__()
        self.out_dim = width
        self.project = nn.Linear(3, width)

    def forward(self, inputs, mask=None):
        return self.project(inputs).mean(1)


class FromFile(Mean):
    """A backbone whose width stands in a file that may be gone later."""

    def __init__(self, normalization, file: str | None = None, width: int = 0) -> None:
        width = width or int(Path(file).read_text())
        super().__init__(normalization, width)

    @property
    def saved_arguments(self):
        return {"file": None, "width": self.out_dim}


def test_a_checkpoint_keeps_what_a_backbone_was_made_of_in_place_of_its_file(tmp_path):
    (file := tmp_path / "width").write_text("7")
    model = Classifier(partial(FromFile, file=str(file)), Softmax, num_classes=12)
    engine = trainer(max_steps=1)
    engine.fit(model, shapes())
    engine.save_checkpoint(tmp_path / "model.ckpt")
    file.unlink()
    loaded = Classifier.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.backbone.project.weight.equal(model.backbone.project.weight)
    assert dict(loaded.hparams) == dict(model.hparams)


def test_any_backbone(tmp_path):
    model = Classifier(partial(Mean, width=4), Softmax, num_classes=12)
    engine = trainer(max_epochs=1)
    engine.fit(model, shapes())
    engine.save_checkpoint(tmp_path / "mean.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "mean.ckpt")
    assert isinstance(again.backbone, Mean)
    assert again.backbone.out_dim == 4


def test_same_seed_twice_gives_the_same_weights():
    def weights() -> list[torch.Tensor]:
        pl.seed_everything(3)
        model = Classifier(partial(SMALL, dropout=0.2), Sinkhorn, 12)
        trainer(max_epochs=1).fit(model, shapes())
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_classes": 1}, ValueError, "num_classes"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing"),
        ({"normalization": lambda: Softmax()}, TypeError, "functools.partial"),
        ({"normalization": {"class_path": "torch.nn.Linear", "init_args": {}}}, TypeError, "AttentionNormalization"),
        ({"normalization": {"class_path": "nowhere.Thing", "init_args": {}}}, ValueError, "nowhere"),
        ({"backbone": partial(SetTransformer, dim=9)}, ValueError, "num_heads=4 must divide"),
        ({"optimizer": partial(torch.optim.SGD, lr=-1.0)}, ValueError, "learning rate"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        Classifier(**{"backbone": SMALL, "normalization": Softmax, "num_classes": 3, **arguments})
