"""What the package assumes of Lightning's own state: each function, and that Lightning still is so."""

import signal

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torchmetrics import MeanMetric

from sinkformer_pl.training import lightning_state


class Linear(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


DATA = torch.utils.data.DataLoader(torch.ones(4, 1))


def trainer(*callbacks, **arguments):
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    arguments = {"max_epochs": 2, "num_sanity_val_steps": 0, **quiet, **arguments}
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **arguments)


def fitted(*callbacks, path=None, **arguments):
    made = trainer(*callbacks, **arguments)
    made.fit(Linear(), DATA, DATA, ckpt_path=path)
    return made


def saved(made, path):
    made.save_checkpoint(path)
    return torch.load(path, weights_only=True)


class Watch(pl.Callback):
    """Write down, at each batch, what the loops say."""

    def __init__(self, at_batch=None, at_validation=None):
        self.seen, self.at_batch, self.at_validation = [], at_batch, at_validation

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append((trainer.current_epoch, lightning_state.batches_done(trainer), batch_idx))
        if self.at_batch is not None:
            self.at_batch(trainer, module)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        if self.at_validation is not None:
            self.at_validation(trainer, module)


def test_lightning_handles_sigterm_unless_it_is_told_not_to():
    handlers = []

    class See(pl.Callback):
        def on_train_start(self, trainer, module):
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    fitted(See(), max_epochs=1)
    quiet = trainer(See(), max_epochs=1)
    lightning_state.ignore_signals(quiet)
    quiet.fit(Linear(), DATA)
    assert handlers[0] != before
    assert handlers[1] == before
    # What Lightning asks all processes for at each step.
    assert callable(type(quiet.fit_loop.epoch_loop)._broadcast_sigterm_tensor)


def test_a_module_knows_whether_it_is_run():
    module = Linear()
    assert not lightning_state.is_attached(module)
    with pytest.raises(RuntimeError, match="not attached"):
        _ = module.trainer
    trainer(max_epochs=1).fit(module, DATA)
    assert lightning_state.is_attached(module)


def test_a_checkpoint_counts_epochs_and_batches_are_counted_with_the_one_under_way(tmp_path):
    watch = Watch()
    checkpoint = saved(fitted(watch), tmp_path / "a.ckpt")
    assert lightning_state.epochs_of(checkpoint) == 2
    assert watch.seen == [(epoch, batch + 1, batch) for epoch in range(2) for batch in range(4)]
    for broken in ({}, {"loops": 3}, {"loops": {"fit_loop": []}}):
        assert lightning_state.epochs_of(broken) is None


def test_a_training_with_more_epochs_than_it_may_have_ends_at_once(tmp_path):
    fitted().save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(Exception, match="max_epochs"):
        fitted(path=tmp_path / "a.ckpt", max_epochs=1)
    watch = Watch()
    again = trainer(watch, max_epochs=1)
    lightning_state.end_after(again, 2)
    again.fit(Linear(), DATA, ckpt_path=tmp_path / "a.ckpt")
    assert watch.seen == []


@pytest.mark.parametrize(("most", "within"), [(-1, False), (6, True), (8, False)])
def test_a_training_ends_within_an_epoch_or_at_its_end(most, within):
    ends = []

    class End(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            ends.append(lightning_state.ends_within_epoch(trainer))

    fitted(End(), max_steps=most)
    assert ends == [False, within]


@pytest.mark.parametrize("step", [4, 6])
def test_the_saved_position_is_where_a_training_goes_on(tmp_path, step):
    path = tmp_path / "a.ckpt"

    class Save(pl.Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            checkpoint["position"] = lightning_state.save_position(checkpoint, trainer)

    first = fitted(Save(), max_steps=step)
    assert saved(first, path)["position"] == step % 4
    steps = []

    class Correct(Watch):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if not self.seen:
                lightning_state.correct_counts_at_batch(trainer, module)
            super().on_train_batch_start(trainer, module, batch, batch_idx)
            steps.append((trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped))

    watch = Correct()
    resumed = fitted(watch, path=path)
    assert watch.seen == [(1, batch + 1, batch) for batch in range(step % 4, 4)]
    assert steps == [(n, n) for n in range(step, 8)]
    assert lightning_state.epochs_of(saved(resumed, path)) == 2


def test_a_validation_that_was_begun_is_done_anew_before_the_next_batch(tmp_path):
    path = tmp_path / "a.ckpt"
    validated = []

    class Save(Watch):
        writing = False

        def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 2 and not path.exists():
                self.writing = True
                trainer.save_checkpoint(path)
                self.writing = False

        def on_save_checkpoint(self, trainer, module, checkpoint):
            if self.writing:
                lightning_state.save_position(checkpoint, trainer)
                lightning_state.save_validation_as_begun(checkpoint)

    fitted(Save(), val_check_interval=2, max_epochs=1)

    def correct(trainer, module):
        if not validated:
            trainer.fit_loop.epoch_loop._batches_that_stepped = 99  # whatever Lightning makes of it in a restart
            lightning_state.correct_counts_at_validation(trainer, module)
        counted = trainer.fit_loop.epoch_loop._batches_that_stepped
        validated.append((trainer.global_step, counted))

    watch = Watch(at_validation=correct)
    fitted(watch, path=path, val_check_interval=2, max_epochs=1)
    assert validated[:4] == [(2, 1)] * 4
    assert watch.seen == [(0, 3, 2), (0, 4, 3)]


@pytest.mark.parametrize("chosen", [None, True, False])
@pytest.mark.parametrize("arguments", [{}, {"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}])
def test_callbacks_look_at_their_metrics_as_an_epoch_ends_or_as_a_validation_does(chosen, arguments):
    stopper = EarlyStopping("a", check_on_train_epoch_end=chosen)
    keeper = ModelCheckpoint(monitor="a", save_on_train_epoch_end=chosen)
    made = fitted(**arguments)
    found = [lightning_state.looks_at_epoch_end(callback, made) for callback in (stopper, keeper)]
    stopper.setup(made, Linear(), "fit")
    assert found == [stopper._check_on_train_epoch_end, keeper._should_save_on_train_epoch_end(made)]


@pytest.mark.parametrize(("strategy", "method"), [("auto", None), ("ddp", None), ("ddp_spawn", "spawn")])
def test_processes_that_are_copies_of_this_one(strategy, method):
    assert lightning_state.copies_by(trainer(strategy=strategy)) == method


def test_a_metric_counts_its_updates():
    metric, other = MeanMetric(), MeanMetric()
    metric.update(torch.tensor([1.0, 3.0]))
    lightning_state.set_metric_state(other, metric.metric_state, metric.update_count)
    assert other.update_count == 1
    assert other.compute() == 2


@pytest.mark.parametrize(("arguments", "last"), [({}, 4), ({"limit_train_batches": 3}, 3)])
def test_a_batch_is_the_last_of_its_epoch(arguments, last):
    seen = []

    class See(Linear):
        def on_train_batch_end(self, *_):
            seen.append(lightning_state.ends_epoch(self.trainer))

    trainer(**arguments).fit(See(), DATA, DATA)
    assert seen == [*[False] * (last - 1), True] * 2


def test_an_average_of_weights_begins_anew_on_the_device_of_the_training():
    average = EMAWeightAveraging()
    fitted(average)
    assert int(lightning_state.average_of(average).n_averaged) == 8
    made = trainer(average)
    lightning_state.begin_average(average, made)
    average.setup(made, Linear(), "fit")
    assert int(lightning_state.average_of(average).n_averaged) == 0
    assert lightning_state.average_of(average).n_averaged.device == made.strategy.root_device
    assert average.state_dict() == {"latest_update_step": 0}
