"""A step is queued without a look at its numbers, for which the host would have to wait for a GPU."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sinkformer_pl.callbacks import RequireFinite
from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.models import SetTransformer
from sinkformer_pl.normalizations import Sinkhorn, Softmax
from sinkformer_pl.tasks import Classifier

WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "_unique2", "item"}
"""Operators whose result, or its size, depends on values."""


FUSED = partial(torch.optim.AdamW, fused=True)
"""What a GPU takes by itself."""


class Looks(TorchDispatchMode):
    """Notes operators that a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Watch(pl.Callback):
    """Looks at the steps of a training and of its validation, but for the first ones."""

    def __init__(self):
        self.looks = Looks()
        self.steps = 0

    def begin(self, batch_idx):
        if batch_idx:
            self.looks.__enter__()

    def end(self, batch_idx):
        if batch_idx:
            self.looks.__exit__(None, None, None)
            self.steps += 1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.begin(batch_idx)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.end(batch_idx)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.begin(batch_idx)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.end(batch_idx)


class Synchronizations(Watch):
    """Has PyTorch refuse what waits for the GPU."""

    def begin(self, batch_idx):
        if batch_idx:
            torch.cuda.set_sync_debug_mode("error")

    def end(self, batch_idx):
        if batch_idx:
            torch.cuda.set_sync_debug_mode("default")
            self.steps += 1


def train(watch, delay, optimizer=torch.optim.AdamW, normalization=Softmax, **options):
    data = ProceduralShapes(train_size=48, val_size=24, test_size=12, batch_size=8)
    network = partial(SetTransformer, dim=8, num_heads=2, inducing_points=4)
    trainer = pl.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0,
        enable_model_summary=False, gradient_clip_val=1.0, callbacks=[RequireFinite(delay), watch], **options,
    )  # fmt: skip
    trainer.fit(Classifier(network, normalization, 12, optimizer=optimizer), data)
    # Five of six training steps and two of three validation steps in each of two epochs.
    assert watch.steps == 14


def test_no_number_is_looked_at_in_a_step():
    watch = Watch()
    train(watch, delay=100, optimizer=FUSED, accelerator="cpu")
    assert watch.looks.found == []


def test_what_waits_is_seen():
    """The control: the same training, judged at once."""
    watch = Watch()
    train(watch, delay=0, optimizer=FUSED, accelerator="cpu")
    # Each of the ten training steps asks for one flag.
    assert watch.looks.found == ["_local_scalar_dense"] * 10


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("normalization", [Softmax, Sinkhorn])
def test_no_step_waits_for_the_gpu(precision, normalization):
    try:
        train(
            Synchronizations(),
            delay=None,
            normalization=normalization,
            accelerator="gpu",
            devices=1,
            precision=precision,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
