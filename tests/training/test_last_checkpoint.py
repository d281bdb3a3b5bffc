"""When `last.ckpt` is written; that a training resumes from it exactly is tested in test_resume.py."""

import pytorch_lightning as pl
import torch

from sinkformer_pl.training.last_checkpoint import LastCheckpoint
from sinkformer_pl.training.lightning_state import batches_done
from sinkformer_pl.training.resume import ResumeState
from sinkformer_pl.training.signals import StopSignals


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


class Left(pl.Callback):
    """Note, at the end of each batch, the step that a killed training would resume at."""

    def __init__(self, path):
        self.path, self.steps = path, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        left = torch.load(self.path, weights_only=True)["global_step"] if self.path.is_file() else 0
        self.steps.append(left)


def test_it_is_written_after_each_validation_within_an_epoch_and_after_each_epoch(tmp_path):
    path, signals, data = tmp_path / "last.ckpt", StopSignals(), torch.utils.data.DataLoader(torch.ones(5, 1))
    left = Left(path)
    trainer = pl.Trainer(
        max_epochs=2, val_check_interval=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ResumeState(), LastCheckpoint(path, signals), left],
    )  # fmt: skip
    with signals.handled():
        trainer.fit(Linear(), data, data)
    # Steps 3 and 8 are validated, 5 and 10 end epochs. It is written at the start of the next batch.
    assert left.steps == [0, 0, 0, 3, 3, 5, 5, 5, 8, 8]
    assert torch.load(path, weights_only=True)["global_step"] == 10


class Begun(pl.Callback):
    """Note the epoch and the place in it of each batch, by the counts that `last.ckpt` goes by."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batches_done(trainer) - 1))


def test_a_training_that_its_steps_end_with_an_epoch_resumes_at_the_next_one(tmp_path):
    path, signals, data = tmp_path / "last.ckpt", StopSignals(), torch.utils.data.DataLoader(torch.ones(5, 1))
    begun = Begun()
    for steps, resumed in ((5, None), (10, path)):
        trainer = pl.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[ResumeState(), LastCheckpoint(path, signals), begun],
        )  # fmt: skip
        with signals.handled():
            trainer.fit(Linear(), data, ckpt_path=resumed)
    assert begun.batches == [(epoch, batch) for epoch in (0, 1) for batch in range(5)]
