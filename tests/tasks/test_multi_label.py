"""Samples with any number of classes: a training, its figures, its checkpoint, predictions, an exported file."""

import csv
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from sklearn.metrics import f1_score

import sinkformer_pl
from sinkformer_pl.batch import UNCOUNTED, Batch, collate
from sinkformer_pl.data import Clouds, Draw, PointCloudData, Source, stratified_split
from sinkformer_pl.errors import UserError
from sinkformer_pl.inference.export import Example, export
from sinkformer_pl.models import SetTransformer
from sinkformer_pl.normalizations import Softmax
from sinkformer_pl.tasks import Classifier
from sinkformer_pl.training.predictions_csv import PredictionWriter


class Boxes(PointCloudData):
    """Clouds that are long, wide, both or neither."""

    def __init__(self, several=True, **kwargs):
        super().__init__(["long", "wide"], standardize=False, **kwargs)
        self.multi_label = several

    def load(self):
        generator = torch.Generator().manual_seed(0)
        holds = torch.rand(240, 2, generator=generator) < torch.tensor([0.5, 0.3])
        points = torch.randn(240, 16, 3, generator=generator)
        points[:, :, :2] *= 1 + 2 * holds[:, None]
        clouds = [
            Clouds(part.flatten(0, 1), torch.full((len(part),), 16), targets, [f"{name}/{i}" for i in range(len(part))])
            for name, part, targets in zip(("a", "b"), points.split([200, 40]), holds.split([200, 40]), strict=True)
        ]
        return Source(*clouds)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained model, its data, the trainer and the folder of its checkpoint and predictions."""
    folder = tmp_path_factory.mktemp("boxes")
    pl.seed_everything(0)
    data = Boxes(batch_size=16)
    network = partial(SetTransformer, dim=16, num_heads=2, inducing_points=4)
    optimizer = partial(torch.optim.AdamW, lr=0.01)
    model = Classifier(
        network, Softmax, 2, optimizer=optimizer, multi_label=True, metrics="AUROC", class_weights="balanced"
    )
    trainer = pl.Trainer(
        max_epochs=5, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[PredictionWriter(folder)], num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, data)
    trainer.save_checkpoint(folder / "boxes.ckpt")
    return model, data, trainer, folder


def test_it_is_learnt_and_measured(trained):
    model, data, trainer, folder = trained
    counts = data.class_counts
    assert model.class_weights.tolist() == pytest.approx(((180 - counts) / counts).tolist())
    assert model.monitors[0] == "val/f1_macro"
    assert set(model.monitors) <= trainer.callback_metrics.keys()
    (figures,) = trainer.test(model, data, verbose=False)
    outputs = trainer.predict(model, data)
    probabilities = torch.cat([batch.probabilities for batch in outputs])
    truth = data.datasets["test"].targets
    assert figures["test/f1_macro"] == pytest.approx(f1_score(truth, probabilities > 0.5, average="macro"))
    assert figures["test/f1_macro"] > 0.9
    losses = torch.nn.functional.binary_cross_entropy(probabilities, truth.float())
    assert figures["test/loss"] == pytest.approx(losses.item(), rel=1e-4)
    assert model.confusion == {}
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["classes"] for row in rows] == [
        "|".join(name for name, p in zip(data.classes, row, strict=True) if p > 0.5) for row in probabilities.tolist()
    ]
    assert {"", "long", "long|wide"} <= {row["classes"] for row in rows}


def test_its_checkpoint_says_so(trained, tmp_path):
    model, data, _, folder = trained
    clouds = data.datasets["test"]
    inputs = [clouds[place].inputs for place in range(12)]
    loaded = sinkformer_pl.load(folder / "boxes.ckpt", device="cpu")
    with torch.no_grad():
        expected = model.eval()(torch.stack(inputs)).sigmoid()
    found = loaded.predict(inputs)
    for prediction, row in zip(found, expected.tolist(), strict=True):
        assert dict(prediction.scores) == pytest.approx(dict(zip(data.classes, row, strict=True)), abs=1e-5)
        assert set(prediction.labels) == {name for name, p in zip(data.classes, row, strict=True) if p > 0.5}
    assert found.labels == [prediction.labels for prediction in found]
    assert all(len(labels) == 2 for labels in loaded.predict(inputs, threshold=0.0).labels)
    assert set(loaded.predict(inputs, threshold=1.0).labels) == {()}
    # The same from a file without the package's checkpoint.
    path = tmp_path / "boxes.safetensors"
    export(loaded, path, [Example(torch.stack(inputs), torch.ones(12, 16, dtype=torch.bool))])
    assert sinkformer_pl.load(path, device="cpu").predict(inputs).labels == found.labels


def test_data_of_one_class_a_sample_are_told_from_it(trained):
    _, _, _, folder = trained
    checkpoint = torch.load(folder / "boxes.ckpt", weights_only=True)
    Boxes().restore(checkpoint)
    with pytest.raises(UserError, match="any number of classes, one of the data one class"):
        Boxes(several=False).restore(checkpoint)
    with pytest.raises(UserError, match=r"bool \(180, 2\); .*set self.multi_label = True in Boxes"):
        Boxes(several=False).setup()


def test_classes_keep_their_names_in_another_order(trained):
    _, data, _, _ = trained
    before = data.datasets["val"].targets
    turned = Boxes()
    turned.restore({"Boxes": {"sinkformer_pl_learnt": {**data.learnt, "classes": ["wide", "long"]}}})
    turned.setup()
    assert torch.equal(turned.datasets["val"].targets, before[:, [1, 0]])
    assert turned.datasets["val"].names == data.datasets["val"].names


def test_padding_of_several_processes_is_not_counted(trained):
    model, data, _, _ = trained
    dataset = data.datasets["val"]
    batch = collate([dataset[0], dataset[Draw(1, 1, counted=False)]])
    assert batch.target.dtype == torch.float32
    assert batch.target[1].tolist() == [UNCOUNTED] * 2
    assert batch.counted.tolist() == [True, False]
    assert len(model.predict_step(batch, 0).probabilities) == 1
    model.validation_step(Batch(*batch), 0)
    figures = model.val_metrics.figures(data.classes)
    target = dataset.targets[0].float()
    alone = torch.nn.functional.binary_cross_entropy_with_logits(model(batch.inputs[:1])[0], target)
    assert figures["loss"].item() == pytest.approx(alone.item(), rel=1e-5)


def test_a_division_has_its_share_of_each_class_and_of_samples_without():
    targets = torch.rand(1000, 4, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.02, 0.1, 0.3, 0.5])
    train, val = stratified_split(targets, val_fraction=0.2, seed=0)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(1000))
    assert abs(len(val) - 200) <= 2
    assert (targets[val].sum(0) - 0.2 * targets.sum(0)).abs().max() <= 2
    assert not torch.equal(val, stratified_split(targets, val_fraction=0.2, seed=1)[1])


def test_samples_are_drawn_by_the_highest_weight_of_their_classes():
    data = Boxes(sampling={"wide": 4.0, "long": 0.0})
    data.setup()
    sampler = data.train_dataloader().sampler
    drawn = torch.tensor([draw.index for epoch in range(4) for draw in (sampler.set_epoch(epoch), *sampler)[1:]])
    # Without "wide" there is no weight, also where no class holds: the least that there is.
    assert data.datasets["train"].targets[drawn][:, 1].all()
