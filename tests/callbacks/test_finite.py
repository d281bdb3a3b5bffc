"""A training ends at the first number that isn't finite, with unharmed weights and the cause as its message."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch.amp import GradScaler

from sinkformer_pl.callbacks import RequireFinite
from sinkformer_pl.callbacks.finite import SMALLEST_LOSS_SCALE
from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.errors import UserError
from sinkformer_pl.models import SetTransformer
from sinkformer_pl.normalizations import Softmax
from sinkformer_pl.tasks import Classifier


class Shapes(ProceduralShapes):
    """Shapes, one of which has an infinite point in the given split."""

    def __init__(self, split=None, index=5, **sizes):
        super().__init__(**{"train_size": 48, "val_size": 24, "test_size": 24, "batch_size": 8, **sizes})
        self.split, self.index = split, index

    def make_datasets(self):
        datasets = super().make_datasets()
        if self.split:
            dataset, index = datasets[self.split], self.index
            dataset.standardized = False
            dataset.points[dataset.starts[index], 0] = float("inf")
        return datasets


class Broken(Classifier):
    """A classifier whose loss or gradients break at a given batch of the second epoch."""

    def __init__(self, loss=None, gradient=None, at=2, **options):
        network = partial(SetTransformer, dim=8, num_heads=2, inducing_points=4)
        super().__init__(network, Softmax, num_classes=12, **options)
        self.added, self.gradient, self.at = loss, gradient, at

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.current_epoch == 1 and batch_idx == self.at:
            if self.added is not None:
                loss = loss + self.added
            if self.gradient is not None:
                for parameter in self.head.parameters():
                    parameter.register_hook(lambda grad: torch.full_like(grad, self.gradient))
        return loss


class Watch(pl.Callback):
    """Weights before each optimizer step, from outside."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = {name: value.clone() for name, value in pl_module.named_parameters()}


def trainer(folder, *callbacks, delay=None, **options):
    options = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0} | options
    return pl.Trainer(
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RequireFinite(delay), Watch(), *callbacks],
        **options,
    )


def checkpointing(folder):
    return pl.callbacks.ModelCheckpoint(folder, filename="best", save_last=True)


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1.0}, {"precision": "bf16-mixed"}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_stops_at_its_step_and_leaves_weights_and_checkpoint(tmp_path, value, options):
    model, run = Broken(loss=value), trainer(tmp_path, checkpointing(tmp_path), **options)
    with pytest.raises(UserError) as error:
        run.fit(model, Shapes())
    message = str(error.value)
    assert message.startswith(f"epoch 1, step 8: batch 2 has a loss of {value}, of 8 samples (")
    assert " and 5 more)" in message
    assert f"last good weights are in {tmp_path / 'last.ckpt'}" in message
    assert "\n" not in message
    assert sum(name in message for name in run.datamodule.names("train")) >= 3
    assert run.global_step == 8
    before = run.callbacks[1].before
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    assert all(value.isfinite().all() for value in last["state_dict"].values())


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1.0}, {"precision": "bf16-mixed"}])
def test_gradients_stop_at_their_step_and_are_named(tmp_path, options):
    model = Broken(gradient=float("inf"))
    run = trainer(tmp_path, **options)
    with pytest.raises(UserError, match=r"epoch 1, step 8: the gradients of head\.weight, head\.bias are not finite"):
        run.fit(model, Shapes())
    before = run.callbacks[1].before
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


class States(pl.Callback):
    """Weights and optimizer state before each step."""

    def __init__(self):
        self.before = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        [optimizer] = trainer.optimizers
        states = [value for state in optimizer.state.values() for value in state.values() if value is not None]
        self.before[trainer.global_step] = [t.detach().clone() for t in (*pl_module.parameters(), *states)]


FUSED = {
    "AdamW": partial(torch.optim.AdamW, fused=True),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
}


@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize("broken", [{"loss": float("nan")}, {"gradient": float("inf")}], ids=["loss", "gradient"])
def test_a_late_message_comes_some_steps_later_and_nothing_was_changed_meanwhile(tmp_path, optimizer, broken):
    model, states = Broken(**broken, optimizer=FUSED[optimizer]), States()
    run = trainer(tmp_path, states, checkpointing(tmp_path), delay=2, gradient_clip_val=1.0)
    with pytest.raises(UserError, match=r"^epoch 1, step 8: ") as error:
        run.fit(model, Shapes())
    # The second batch after the bad one.
    assert run.global_step == 10
    assert ("batch 2 has a loss of nan" if "loss" in broken else "head.weight, head.bias") in str(error.value)
    assert sum(name in str(error.value) for name in run.datamodule.names("train")) >= 3
    assert not torch.equal(states.before[7][0], states.before[8][0])
    for step in (9, 10):
        assert all(torch.equal(a, b) for a, b in zip(states.before[8], states.before[step], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(states.before[8], model.parameters(), strict=False))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6
    assert not hasattr(run.optimizers[0], "found_inf")


@pytest.mark.parametrize(
    ("options", "every", "stopped", "last"),
    [
        ({}, None, 12, 6),
        ({"val_check_interval": 4}, None, 10, 4),
        ({"limit_val_batches": 0}, 1, 9, 8),
        ({"max_steps": 10}, None, 10, 6),
    ],
    ids=["epoch", "validation", "checkpoint", "last step"],
)
def test_a_late_message_comes_before_a_checkpoint_and_before_a_validation(tmp_path, options, every, stopped, last):
    model = Broken(loss=float("nan"), optimizer=FUSED["AdamW"])
    often = [] if every is None else [pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=every)]
    run = trainer(tmp_path, *(often or [checkpointing(tmp_path)]), delay=100, **options)
    with pytest.raises(UserError, match=r"^epoch 1, step 8: batch 2 has a loss of nan"):
        run.fit(model, Shapes())
    assert run.global_step == stopped
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == last


def test_a_late_message_of_accumulated_batches_names_the_one_at_fault(tmp_path):
    run = trainer(tmp_path, delay=1, accumulate_grad_batches=2)
    with pytest.raises(UserError, match=r"epoch 1, step 3: batch 1 has a loss of nan, of 8 samples"):
        run.fit(Broken(loss=float("nan"), at=1, optimizer=FUSED["AdamW"]), Shapes())
    assert run.global_step == 4


def test_a_late_judgement_changes_no_number_of_a_sound_training(tmp_path):
    def weights(delay):
        pl.seed_everything(0)
        model = Broken(optimizer=FUSED["AdamW"])
        trainer(tmp_path, delay=delay).fit(model, Shapes())
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(3), weights(0), strict=True))


def test_an_optimizer_that_cannot_leave_out_a_step_is_waited_for(tmp_path):
    run = trainer(tmp_path, delay=4)
    with pytest.raises(UserError, match="epoch 1, step 8: batch 2 has a loss of nan"):
        run.fit(Broken(loss=float("nan"), optimizer=torch.optim.RMSprop), Shapes())
    assert run.global_step == 8


def test_a_norm_that_overflows_is_no_gradient_that_is_not_finite(tmp_path):
    run = trainer(tmp_path)
    run.fit(Broken(gradient=1e30), Shapes())
    assert run.global_step == 12


def test_accumulated_batches_are_judged_one_by_one_before_their_step(tmp_path):
    run = trainer(tmp_path, accumulate_grad_batches=3)
    with pytest.raises(UserError, match=r"epoch 1, step 2: batch 1 has a loss of nan, of 8 samples"):
        run.fit(Broken(loss=float("nan"), at=1), Shapes())
    assert run.global_step == 2
    run = trainer(tmp_path, accumulate_grad_batches=3)
    with pytest.raises(UserError, match=r"the gradients of .* after finite losses of the 3 batches .* of 24 samples"):
        run.fit(Broken(gradient=float("nan"), at=1), Shapes())


def test_the_sample_at_fault_is_named_alone(tmp_path):
    data = Shapes("train")
    with pytest.raises(UserError) as error:
        trainer(tmp_path).fit(Broken(), data)
    name = data.names("train")[5]
    assert f"the inputs of {name} are not finite (repair or remove" in str(error.value)
    assert [other for other in data.names("train") if other in str(error.value)] == [name]


def test_a_sample_whose_outputs_alone_break_is_named(tmp_path):
    class Overflowing(Broken):
        def forward(self, inputs, mask=None):
            outputs = super().forward(inputs, mask)
            return torch.cat([outputs[:1] * float("inf"), outputs[1:]])

    data = Shapes()
    with pytest.raises(UserError, match=r"the outputs for .* are not finite") as error:
        trainer(tmp_path).fit(Overflowing(), data)
    assert len([name for name in data.names("train") if name in str(error.value)]) == 1


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_warns_of_the_samples_and_goes_on(tmp_path, stage):
    split = "val" if stage == "validate" else "test"
    data = Shapes(split)
    with pytest.warns(UserWarning, match=f"of 1 of 24 {split} samples are not finite: ") as caught:
        getattr(trainer(tmp_path), stage)(Broken(), data)
    [text] = [str(one.message) for one in caught if "not finite" in str(one.message)]
    assert f": {data.names(split)[5]};" in text


def test_validation_within_a_training_warns_and_no_such_epoch_is_preferred(tmp_path):
    class Late(Broken):
        def validation_step(self, batch, batch_idx):
            if self.current_epoch == 1:
                batch = batch._replace(inputs=batch.inputs * float("nan"))
            super().validation_step(batch, batch_idx)

    best = pl.callbacks.ModelCheckpoint(tmp_path, filename="best", monitor="val/loss", enable_version_counter=False)
    with pytest.warns(UserWarning, match="of 24 of 24 val samples are not finite"):
        trainer(tmp_path, best).fit(Late(), Shapes())
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == 0


def test_weights_that_broke_in_a_step_are_not_written(tmp_path):
    # Finite gradients at a rate beyond all bounds, in the last step of an epoch, which no other step follows.
    class Leap(Broken):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.current_epoch == 1 and batch_idx == 5:
                self.head.weight.data[0, 0] = float("inf")

    with pytest.raises(UserError, match=r"step 12: head\.weight is not finite, so no checkpoint is written") as error:
        trainer(tmp_path, checkpointing(tmp_path), limit_val_batches=0).fit(Leap(), Shapes())
    assert str(tmp_path / "last.ckpt") in str(error.value)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_overflow_under_a_loss_scale_is_the_scalers_until_the_scale_has_collapsed(tmp_path):
    class Precision(pl.plugins.MixedPrecision):
        """16-mixed as on a GPU, whose autocast the CPU does without."""

        def __init__(self, scale):
            super().__init__("16-mixed", "cpu", GradScaler("cpu", init_scale=scale))
            self.precision = "32-true"

        def autocast_context_manager(self):
            return torch.autocast("cpu", enabled=False)

    model = Broken(gradient=float("inf"))
    run = trainer(tmp_path, plugins=[Precision(2.0**16)])
    run.fit(model, Shapes())
    assert all(value.isfinite().all() for value in model.parameters())
    assert run.precision_plugin.scaler.get_scale() < 2.0**16
    with pytest.raises(UserError, match="the gradients of"):
        trainer(tmp_path, plugins=[Precision(SMALLEST_LOSS_SCALE)]).fit(Broken(gradient=float("inf")), Shapes())
    with pytest.raises(UserError, match="batch 2 has a loss of nan"):
        trainer(tmp_path, plugins=[Precision(2.0**16)]).fit(Broken(loss=float("nan")), Shapes())


def test_it_can_be_used_again_and_without_names(tmp_path):
    class Loose(Broken):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

    guard = RequireFinite()
    for _ in range(2):
        loaders = Shapes()
        loaders.setup()
        run = pl.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=[guard],
        )  # fmt: skip
        with pytest.raises(UserError, match=r"of 8 samples \(sample \d+, .* No checkpoint was written"):
            run.fit(Loose(loss=float("nan")), loaders.train_dataloader())
