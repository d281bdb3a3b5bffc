"""Batches of loaders and data modules of one's own."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sinkformer_pl.batch import Batch
from sinkformer_pl.errors import UserError
from sinkformer_pl.models import SetTransformer
from sinkformer_pl.normalizations import Softmax
from sinkformer_pl.tasks import Classifier

SMALL = partial(SetTransformer, dim=8, num_heads=2, inducing_points=4)
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(SMALL, Softmax, 2, optimizer=partial(torch.optim.SGD, lr=0.1))


def trainer(**kwargs: Any) -> pl.Trainer:
    return pl.Trainer(**{"max_epochs": 2, "accelerator": "cpu", "num_sanity_val_steps": 0, **QUIET, **kwargs})


def samples(count: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return sets, their classes and their masks."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 7, 3, generator=generator)
    mask = torch.arange(7) < torch.randint(3, 8, (count, 1), generator=generator)
    return inputs, torch.arange(count) % 2, mask


class Own(pl.LightningDataModule):
    def __init__(self, *parts: torch.Tensor) -> None:
        super().__init__()
        self.parts = parts

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*self.parts), batch_size=4)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore:.*workers", "ignore:.*shuffling", "ignore:.*log_every")
@pytest.mark.parametrize("masked", [False, True])
def test_plain_batches_train_as_those_of_the_package_do(masked):
    inputs, target, mask = samples()
    plain = (inputs, target, mask) if masked else (inputs, target)
    batches = [
        Batch(inputs[i : i + 4], mask[i : i + 4] if masked else None, target[i : i + 4], torch.arange(i, i + 4))
        for i in (0, 4, 8)
    ]
    own, ours = classifier(), classifier()
    trainer().fit(own, Own(*plain))
    trainer().fit(ours, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    for (name, one), other in zip(own.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert not torch.equal(own.head.weight, classifier().head.weight)
    [found] = trainer().test(own, Own(*plain), verbose=False)
    [expected] = trainer().test(own, DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    assert found == expected
    assert trainer().validate(own, Own(*plain), verbose=False)[0]["val/loss"] == found["test/loss"]


@pytest.mark.filterwarnings("ignore:.*workers")
def test_predictions_have_the_places_of_the_loader_and_need_no_targets():
    inputs, target, mask = samples(10)
    model = classifier()
    expected = model.eval()(inputs).softmax(-1)
    for parts in ((inputs,), (inputs, target)):
        predicted = trainer().predict(model, DataLoader(TensorDataset(*parts), batch_size=4))
        assert torch.cat([batch.index for batch in predicted]).tolist() == list(range(10))
        torch.testing.assert_close(torch.cat([batch.probabilities for batch in predicted]), expected)
    [alone] = trainer().predict(model, DataLoader(TensorDataset(inputs, target, mask), batch_size=10))
    torch.testing.assert_close(alone.probabilities, model.eval()(inputs, mask).softmax(-1))
    assert not torch.allclose(alone.probabilities, expected)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        inputs, target, _ = samples(8)
        yield from zip(inputs, target, strict=True)


@pytest.mark.filterwarnings("ignore:.*workers", "ignore:.*log_every", "ignore:.*schedul")
def test_a_stream_of_unknown_length_trains_over_several_batches_a_step():
    model = classifier()
    trainer(max_steps=2, max_epochs=-1, accumulate_grad_batches=2).fit(model, DataLoader(Stream(), batch_size=2))
    assert not torch.equal(model.head.weight, classifier().head.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x, y, m: (x, y.float()),
            r"target of a batch is float32 of shape \(12,\); give .* int64 of shape \(12,\)",
        ),
        (lambda x, y, m: (x, y[:, None]), r"target of a batch is int64 of shape \(12, 1\)"),
        (lambda x, y, m: (x, y[:5]), r"target of a batch is int64 of shape \(5,\)"),
        (lambda x, y, m: (x, y.tolist()), "target of a batch is a list of int"),
        (lambda x, y, m: (x, y + 1), "a target is 2; give the numbers of the classes, 0 to 1"),
        (lambda x, y, m: (x, y - 1), "a target is -1"),
        (
            lambda x, y, m: (x, y, m.long()),
            r"mask of a batch is int64 of shape \(12, 7\); give bool of shape \(12, 7\)",
        ),
        (lambda x, y, m: (x, y, m[:, :3]), r"mask of a batch is bool of shape \(12, 3\)"),
        (lambda x, y, m: {"x": x, "y": y}, r"a batch is a dict; give \(inputs, target\) or \(inputs, target, mask\)"),
        (lambda x, y, m: x, r"a batch is float32 of shape \(12, 7, 3\); give \(inputs, target\)"),
        (lambda x, y, m: (x, y, m, y), "a batch is a tuple of Tensor, Tensor, Tensor, Tensor"),
        (lambda x, y, m: ("a", y), "a batch is a tuple of str, Tensor"),
    ],
)
def test_anything_else_is_one_line(change, message):
    batch = change(*samples())
    for step in (classifier().training_step, classifier().validation_step, classifier().test_step):
        with pytest.raises(UserError, match=message):
            step(batch, 0)


@pytest.mark.filterwarnings("ignore:.*workers", "ignore:.*shuffling")
def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/extend.md").read_text(encoding="utf-8")
    [code] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "DataLoader(" in block]
    names: dict[str, Any] = {}
    exec(compile(code, "docs/extend.md", "exec"), names)
    monkeypatch.chdir(tmp_path)
    inputs, target, _ = samples(20)
    assert names["probabilities"](inputs, target).sum(-1).tolist() == pytest.approx([1.0] * 20)


@pytest.mark.filterwarnings("ignore:.*workers", "ignore:.*shuffling", "ignore:.*log_every")
def test_plain_batches_of_multi_label_targets_train():
    inputs, target, _ = samples()
    both = torch.nn.functional.one_hot(target, 2).float()
    torch.manual_seed(0)
    model = Classifier(SMALL, Softmax, 2, multi_label=True)
    trainer().fit(model, Own(inputs, both.bool()))
    assert trainer().test(model, Own(inputs, both), verbose=False)[0]["test/loss"] > 0
    assert len(trainer().predict(model, Own(inputs, both))) == 3
    for wrong in (target, both[:, :1], both.long()):
        with pytest.raises(UserError, match=r"of multi-label data give 1 .* float or bool of shape \(12, 2\)"):
            model.training_step((inputs, wrong), 0)
