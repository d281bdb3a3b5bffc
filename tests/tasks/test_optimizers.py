"""A fused optimizer where the network is on a GPU and nothing is against it; clipping with one."""

from functools import partial
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision, Precision
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy

from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.factories import describe
from sinkformer_pl.models import SetTransformer
from sinkformer_pl.normalizations import Softmax
from sinkformer_pl.tasks import Classifier
from sinkformer_pl.tasks.optimizers import implementation

ADAMW = partial(torch.optim.AdamW, lr=1e-3)


def engine(kind=SingleDeviceStrategy, device="cuda", precision=None, clip=None):
    """What is looked at of a Trainer, with a GPU that isn't there."""
    on_device = type(kind.__name__, (kind,), {"root_device": torch.device(device)})
    return SimpleNamespace(
        strategy=on_device.__new__(on_device), precision_plugin=precision or Precision(), gradient_clip_val=clip
    )


BF16, FP16 = MixedPrecision("bf16-mixed", "cuda"), MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize(
    ("optimizer", "trainer", "fused"),
    [
        (ADAMW, {}, True),
        (torch.optim.Adam, {"kind": DDPStrategy}, True),
        (torch.optim.SGD, {"clip": 1.0}, True),
        (ADAMW, {"clip": 1.0, "precision": BF16}, True),
        (ADAMW, {"precision": FP16}, True),
        # The scale is taken out behind the clipping.
        (ADAMW, {"clip": 1.0, "precision": FP16}, False),
        (ADAMW, {"device": "cpu"}, False),
        (ADAMW, {"kind": FSDPStrategy}, False),
        (torch.optim.RMSprop, {}, False),
        (partial(ADAMW, fused=False), {}, False),
        (partial(ADAMW, foreach=True), {}, False),
        (partial(ADAMW, differentiable=True), {}, False),
        (partial(ADAMW, fused=None, foreach=None), {}, True),
    ],
)
def test_where_it_is_fused(optimizer, trainer, fused):
    given = implementation(describe(optimizer), engine(**trainer))
    assert given == ({"fused": True} if fused else {})


class Seen(pl.Callback):
    """The optimizer's arguments, and the norm of its gradients before each step."""

    norms: list

    def __init__(self):
        self.norms = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_of_a_fused_optimizer_are_clipped(precision):
    def trained(algorithm, clip, **choice):
        pl.seed_everything(0)
        network = partial(SetTransformer, dim=8, num_heads=2, inducing_points=4)
        model = Classifier(network, Softmax, 12, optimizer=partial(torch.optim.SGD, lr=0.1, **choice))
        seen = Seen()
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", precision=precision, gradient_clip_val=clip, logger=False,
            gradient_clip_algorithm=algorithm, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, callbacks=[seen],
        )  # fmt: skip
        trainer.fit(model, ProceduralShapes(train_size=48, val_size=12, test_size=12, batch_size=16))
        return seen.norms, list(model.parameters())

    assert max(trained("norm", None)[0]) > 0.1
    for algorithm, clip in (("norm", 0.05), (None, 0.05), ("value", 1e-4)):
        fused, plain = (trained(algorithm, clip, **choice) for choice in ({"fused": True}, {"foreach": False}))
        assert max(fused[0]) < 0.0501
        for one, other in zip(fused[1], plain[1], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
