"""The moving average of weights: its numbers, what evaluates with it, what is kept."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from sinkformer_pl.callbacks import EMA
from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.models import Backbone
from sinkformer_pl.normalizations import Softmax
from sinkformer_pl.tasks import Classifier


class Normed(Backbone):
    """Points through a batch norm of PyTorch, whose buffers are of floats and of whole numbers."""

    def __init__(self, normalization):
        super().__init__()
        self.out_dim = 4
        self.embed, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.register_buffer("places", torch.arange(1, 8))

    def forward(self, inputs, mask=None):
        return self.norm(self.embed(inputs).sum(1))


class Watch(pl.Callback):
    """The state of the network after each step, and at the start of each validation."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(state(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.validated.append((trainer.global_step, state(pl_module)))


def state(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def fitted(ema, **arguments):
    pl.seed_everything(0)
    watch = Watch()
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, val_check_interval=1, num_sanity_val_steps=1, callbacks=[ema, watch], **quiet
    )
    model = Classifier(Normed, Softmax, 12, optimizer=partial(torch.optim.SGD, lr=0.5), **arguments)
    trainer.fit(model, ProceduralShapes(train_size=96, val_size=12, test_size=12, batch_size=16))
    return model, watch


@pytest.mark.parametrize(("decay", "warmup"), [(0.5, False), (0.999, True), (0.3, True)])
def test_it_is_the_average_that_one_computes_by_hand(decay, warmup):
    # A buffer that a training fills before its first step is in no one's way.
    model, watch = fitted(EMA(decay, warmup), class_weights="balanced")
    average, averages = dict(watch.steps[0]), []
    for n, new in enumerate(watch.steps):
        share = 1 - (min(decay, (1 + n) / (10 + n)) if warmup else decay)
        for name, value in new.items():
            moved = average[name] + share * (value - average[name]) if value.is_floating_point() else value
            average[name] = moved if n else value
        averages.append(dict(average))
    assert [step for step, _ in watch.validated] == [0, *range(1, 13)]
    for step, seen in watch.validated[1:]:
        # Validations run with the average, from the first on, and the training goes on without it.
        for name, value in seen.items():
            torch.testing.assert_close(value, averages[step - 1][name], rtol=1e-4, atol=1e-6, msg=f"{step} {name}")
    assert not torch.equal(
        watch.validated[-1][1]["backbone.norm.running_var"], watch.steps[-1]["backbone.norm.running_var"]
    )
    # The end of a training leaves the average.
    torch.testing.assert_close(state(model), averages[-1], rtol=1e-4, atol=1e-6)
    assert model.backbone.places.tolist() == list(range(1, 8))


def test_a_second_training_in_the_same_process_averages_anew():
    ema = EMA(0.5)
    fitted(ema)
    again, fresh = fitted(ema)[0], fitted(EMA(0.5))[0]
    torch.testing.assert_close(state(again), state(fresh), rtol=0, atol=0)


def test_a_decay_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        EMA(1)
