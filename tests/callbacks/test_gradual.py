"""From softmax to another normalization in the course of a training."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping

from sinkformer_pl.callbacks import EMA, Gradual
from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.errors import UserError
from sinkformer_pl.models import SetTransformer
from sinkformer_pl.normalizations import Blend, Sinkhorn, Softmax
from sinkformer_pl.tasks import Classifier
from sinkformer_pl.training.best_checkpoint import BestCheckpoint


class Watch(pl.Callback):
    """The share that each step and each validation ran with."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.steps.append(shares(pl_module))

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validated.append(shares(pl_module))


def shares(model):
    found = {float(module.reached) / 1e6 for module in model.modules() if isinstance(module, Blend)}
    (share,) = found or {None}
    return share


def fitted(callback, normalization=Blend, more=(), ckpt_path=None, **arguments):
    pl.seed_everything(0)
    watch = Watch()
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger"), False)
    quiet["enable_checkpointing"] = arguments.pop("enable_checkpointing", False)
    trainer = pl.Trainer(
        accelerator="cpu",
        num_sanity_val_steps=0,
        callbacks=[callback, *more, watch],
        **{"max_epochs": 3, **arguments, **quiet},
    )
    backbone = partial(SetTransformer, dim=8, num_heads=2, depth=1, inducing_points=0)
    model = Classifier(backbone, normalization, 12, optimizer=partial(torch.optim.SGD, lr=0.1))
    data = ProceduralShapes(train_size=36, val_size=4, test_size=4, batch_size=8, num_points=12)
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, model, watch


@pytest.mark.parametrize(
    ("over", "steps"), [("2 epochs", 8), ("1.5 epochs", 6), (5, 5), ("0.25 epochs", 1), (100, 100)]
)
def test_the_share_rises_evenly_to_the_one_of_the_blend_and_stays(over, steps):
    trainer, _, watch = fitted(Gradual(over), partial(Blend, share=0.8))
    wanted = [0.8 * min(step / steps, 1) for step in range(13)]
    assert watch.steps == pytest.approx(wanted[:12], abs=1e-6)
    assert watch.validated == pytest.approx([wanted[4], wanted[8], wanted[12]], abs=1e-6)
    assert float(trainer.callback_metrics["train/share"]) == pytest.approx(wanted[12], abs=1e-6)


def test_it_begins_as_softmax_and_ends_as_the_other():
    _, model, _ = fitted(Gradual(8), max_epochs=2)
    x, mask = torch.randn(3, 12, 3), None
    state = {name: value for name, value in model.state_dict().items() if "normalization" not in name}
    for done, normalization in [(1.0, Sinkhorn), (0.0, Softmax)]:
        for module in model.modules():
            if isinstance(module, Blend):
                module.move(done)
        other = Classifier(partial(SetTransformer, dim=8, num_heads=2, depth=1, inducing_points=0), normalization, 12)
        other.load_state_dict(state)
        assert torch.equal(model.eval()(x, mask), other.eval()(x, mask))


def test_a_training_resumes_with_the_share_of_its_step(tmp_path):
    trainer, _, _ = fitted(Gradual("2 epochs"), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    saved = Classifier.load_from_checkpoint(tmp_path / "one.ckpt")
    assert shares(saved) == 0.5
    _, resumed, watch = fitted(Gradual("2 epochs"), ckpt_path=tmp_path / "one.ckpt")
    _, whole, _ = fitted(Gradual("2 epochs"))
    assert watch.steps == pytest.approx([0.5, 0.625, 0.75, 0.875, 1, 1, 1, 1])
    for one, other in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_an_average_of_the_weights_has_the_share_of_the_moment():
    _, model, watch = fitted(Gradual(8), more=[EMA(0.9)])
    assert watch.validated == [0.5, 1.0, 1.0]
    assert shares(model) == 1.0


def test_what_it_cannot_move_is_said():
    with pytest.warns(UserWarning, match=r"Gradual: .*no Blend.*--model\.normalization"):
        fitted(Gradual(), Softmax, max_epochs=1)
    with pytest.raises(UserError, match=r"Blend\.learned"):
        fitted(Gradual(), partial(Blend, share=0.1, learned=True), max_epochs=1)
    for over in ("soon", 0, -3, "0 epochs", 1.5):
        with pytest.raises(UserError, match=rf"Gradual\.over {over}"):
            Gradual(over)


def test_the_best_checkpoint_is_one_with_the_final_share(tmp_path):
    best = BestCheckpoint(tmp_path, "val/loss", "min")
    *_, watch = fitted(Gradual("2 epochs"), more=[best], enable_checkpointing=True)
    assert watch.validated == pytest.approx([0.5, 1, 1])
    kept = torch.load(best.best_model_path, weights_only=True)
    assert kept["global_step"] in (8, 12)
    with pytest.warns(UserWarning, match=r"step 12 of 100.*no best.ckpt.*Gradual.over"):
        fitted(
            Gradual(100),
            more=[unmet := BestCheckpoint(tmp_path / "unmet", "val/loss", "min")],
            enable_checkpointing=True,
        )
    assert not unmet.best_model_path


def test_early_stopping_counts_from_the_final_share_on():
    class Worse(pl.Callback):
        """Each validation is worse than the one before."""

        def on_validation_end(self, trainer, pl_module):
            trainer.callback_metrics["worse"] = torch.tensor(-float(trainer.current_epoch))

    def stop():
        return EarlyStopping("worse", patience=2, mode="max", check_on_train_epoch_end=True)

    # The share is final from the validation of the third epoch on: it is the best one, and two more end the training.
    trainer, _, watch = fitted(Gradual("3 epochs"), more=[Worse(), stop()], max_epochs=20)
    assert watch.validated == pytest.approx([1 / 3, 2 / 3, 1, 1, 1], abs=1e-6)
    trainer, *_ = fitted(Gradual("3 epochs"), Sinkhorn, more=[Worse(), stop()], max_epochs=20)
    assert trainer.current_epoch == 3, "there is nothing to wait for"
