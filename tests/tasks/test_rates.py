"""The rate of each step: PyTorch's schedulers beside ours, warm-up, groups."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch.optim import lr_scheduler

from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.normalizations import Softmax
from sinkformer_pl.tasks import Classifier, Constant, WarmupCosine
from tests.tasks.test_classification import SMALL, Rates, Stream, trainer

SGD = partial(torch.optim.SGD, lr=2.0, momentum=0.5)
STEPS = 12  # in four epochs of three


def fitted(*callbacks, optimizer=SGD, max_epochs=4, limit_val_batches=0, data=None, **arguments):
    """Return the rate of each step."""
    rates = Rates()
    model = Classifier(SMALL, Softmax, 12, optimizer=optimizer, **arguments)
    engine = trainer(callbacks=[*callbacks, rates], max_epochs=max_epochs, limit_val_batches=limit_val_batches)
    engine.fit(
        model, ProceduralShapes(train_size=24, val_size=12, test_size=12, batch_size=8) if data is None else data
    )
    return rates.seen


def of_torch(make, every=1, steps=STEPS):
    """Return the rates of a scheduler of PyTorch on an optimizer of its own, and its momentum at each step."""
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))])
    scheduler = make(optimizer)
    rates, momenta = [], []
    for step in range(1, steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        if step % every == 0:
            scheduler.step()
    return rates, momenta


@pytest.mark.parametrize(
    ("schedule", "filled"),
    [
        (partial(lr_scheduler.OneCycleLR, max_lr=3.0), {"total_steps": STEPS}),
        (partial(lr_scheduler.OneCycleLR, max_lr=3.0, epochs=5, steps_per_epoch=4), {}),
        (lr_scheduler.CosineAnnealingLR, {"T_max": STEPS}),
        (partial(lr_scheduler.CosineAnnealingLR, T_max=5, eta_min=0.1), {}),
        (partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=2, T_mult=2), {}),
        (partial(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=1.0, step_size_up=3), {}),
        (partial(lr_scheduler.LinearLR, total_iters=7), {}),
        (partial(lr_scheduler.MultiStepLR, milestones=[2, 7]), {}),
    ],
)
def test_rates_and_momenta_are_those_of_pytorch(schedule, filled):
    momenta = []

    class Momenta(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            momenta.extend({group["momentum"] for group in optimizer.param_groups})

    rates = fitted(Momenta(), schedule=schedule)
    assert (rates, momenta) == of_torch(partial(schedule, **filled))


def test_a_scheduler_may_count_epochs():
    schedule = partial(lr_scheduler.CosineAnnealingLR)
    rates = fitted(schedule=schedule, schedule_interval="epoch")
    assert rates == of_torch(partial(schedule, T_max=4), every=3)[0]


def test_a_warm_up_stands_before_any_schedule():
    ours = fitted(schedule=partial(WarmupCosine, warmup=0), warmup=3)
    assert ours == pytest.approx(fitted(schedule=partial(WarmupCosine, warmup=0.25)))
    torchs = fitted(schedule=lr_scheduler.CosineAnnealingLR, warmup="1 epoch")
    assert torchs == pytest.approx(ours)
    steps = fitted(schedule=partial(lr_scheduler.StepLR, step_size=1, gamma=0.5), warmup=4)
    assert steps == pytest.approx([2e-3, 0.5, 1.0, 1.5, *(2 * 0.5**k for k in range(8))])
    whole = fitted(
        schedule=partial(lr_scheduler.StepLR, step_size=1, gamma=0.5), warmup="1 epoch", schedule_interval="epoch"
    )
    assert whole[3:] == pytest.approx([*(2.0,) * 3, *(1.0,) * 3, *(0.5,) * 3])
    # The first whole epoch behind it is the scheduler's first.
    epochs = fitted(
        schedule=partial(lr_scheduler.StepLR, step_size=1, gamma=0.5), warmup="0.67 epochs", schedule_interval="epoch"
    )
    assert epochs == pytest.approx([2e-3, 1.0, 2.0, *(1.0,) * 3, *(0.5,) * 3, *(0.25,) * 3])


@pytest.mark.parametrize("schedule", [Constant, partial(lr_scheduler.OneCycleLR, max_lr=3.0)])
def test_a_group_has_its_share_of_the_rate(schedule):
    seen = []

    class Groups(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            head, rest = optimizer.param_groups
            seen.append(head["lr"] / rest["lr"])

    groups = [{"parameters": "head", "lr_scale": 0.25}]
    fitted(Groups(), schedule=schedule, parameter_groups=groups, warmup=2)
    assert seen == [pytest.approx(0.25)] * STEPS


def test_a_group_that_is_added_at_a_rate_of_0_has_one_when_that_returns():
    seen = []

    class Unfreeze(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.backbone.requires_grad_(False)

        def on_train_epoch_start(self, trainer, pl_module):
            [optimizer] = trainer.optimizers
            if trainer.current_epoch == 1:
                assert optimizer.param_groups[0]["lr"] < 1e-12
                pl_module.backbone.requires_grad_(True)
                optimizer.add_param_group({"params": list(pl_module.backbone.parameters()), "lr": 0.5})

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append([group["lr"] for group in optimizer.param_groups])

    fitted(Unfreeze(), schedule=partial(lr_scheduler.CosineAnnealingLR, T_max=3, eta_min=0))
    # A quarter of the optimizer's rate was given, so a quarter of the schedule's follows.
    assert [one[1] for one in seen[4:]] == pytest.approx([one[0] / 4 for one in seen[4:]])
    assert seen[5][1] > 0.1


def test_a_plateau_is_of_the_validations_that_were_made_behind_the_warm_up():
    schedule = partial(lr_scheduler.ReduceLROnPlateau, mode="min", patience=0, factor=0.5, eps=0)
    # A rate of 0 leaves the loss as it is: each validation but the first is no better.
    still = partial(torch.optim.SGD, lr=1e-12)
    rates = fitted(optimizer=still, schedule=schedule, warmup=4, limit_val_batches=1.0, max_epochs=5)
    # Validations behind steps 3 (not looked at), 6 (the best), 9, 12.
    expected = [1e-3, 0.25, 0.5, 0.75, *(1.0,) * 5, *(0.5,) * 3, *(0.25,) * 3]
    assert [rate / 1e-12 for rate in rates] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"schedule": partial(lr_scheduler.OneCycleLR, max_lr=1.0, pct_start=7.0)},
            "OneCycleLR: Expected float between",
        ),
        ({"schedule": partial(lr_scheduler.ReduceLROnPlateau), "schedule_monitor": "val/accuracy"}, "give max"),
        ({"schedule": lr_scheduler.ReduceLROnPlateau, "schedule_interval": "step"}, "each time its metric is logged"),
        ({"schedule": WarmupCosine, "schedule_interval": "epoch"}, "WarmupCosine changes the rate at each step"),
        ({"schedule_monitor": "val/loss"}, "Constant looks at no metric"),
        ({"schedule": lr_scheduler.ReduceLROnPlateau, "schedule_monitor": "lr"}, "val/... or train/..."),
        ({"schedule": WarmupCosine, "warmup": 3}, "WarmupCosine has its own"),
        ({"warmup": "3 days"}, "warmup 3 days: give a number of optimizer steps"),
        ({"schedule": lr_scheduler.SequentialLR}, "SequentialLR: it takes functions or other schedulers"),
    ],
)
def test_schedules_that_can_not_be_are_refused_when_the_task_is_made(arguments, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        Classifier(SMALL, Softmax, 12, **arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"warmup": 12}, "it takes 12 steps, and the training has 12"),
        (
            {"schedule": partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=11)},
            "total_steps 11: the training has 12 steps",
        ),
    ],
)
def test_a_length_that_does_not_fit_the_training_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        fitted(**arguments)


def test_what_needs_a_length_is_refused_without_one():
    stream = torch.utils.data.DataLoader(Stream(), batch_size=None)
    with pytest.raises(ValueError, match="OneCycleLR: it spans all steps"):
        fitted(schedule=partial(lr_scheduler.OneCycleLR, max_lr=1.0), data=stream, max_epochs=1)
    with pytest.raises(ValueError, match="warmup 1 epochs: the number of batches isn't known"):
        fitted(warmup="1 epoch", data=stream, max_epochs=1)
    rates = fitted(schedule=partial(lr_scheduler.ExponentialLR, gamma=0.5), data=stream, max_epochs=1)
    assert rates == [2 * 0.5**step for step in range(6)]


def test_a_part_of_an_epoch_is_none_for_a_plateau():
    # Nothing is ever better, so that each epoch halves the rate.
    schedule = partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5, threshold=1.0)
    model = Classifier(SMALL, Softmax, 12, optimizer=SGD, schedule=schedule, schedule_monitor="train/loss")
    engine = trainer(max_steps=7, max_epochs=3, limit_val_batches=0)
    engine.fit(model, ProceduralShapes(train_size=24, val_size=12, test_size=12, batch_size=8))
    assert engine.optimizers[0].param_groups[0]["lr"] == 0.5
