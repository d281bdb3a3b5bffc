"""A checkpoint is a model in one line of Python."""

import base64

import numpy as np
import pytest
import torch
from PIL import Image

import sinkformer_pl
from sinkformer_pl.data import ImageFolder, PointClouds, TextTable
from sinkformer_pl.errors import UserError
from sinkformer_pl.inference import load
from sinkformer_pl.tasks import Classifier
from sinkformer_pl.training.checkpoint_file import load_file
from tests.inference.conftest import cloud, photo, words


def inputs_of(kind, folder):
    """Return new inputs with the classes that they show."""
    firsts = [seed % 3 == 0 for seed in range(7)]
    if kind == "image":
        return [photo(folder / f"{i}.jpg", first, i) for i, first in enumerate(firsts)], ["light", "dark"], firsts
    if kind == "cloud":
        return [cloud(folder / f"{i}.npy", first, i) for i, first in enumerate(firsts)], ["round", "flat"], firsts
    return [words(first, i) for i, first in enumerate(firsts)], ["neg", "pos"], firsts


@pytest.mark.parametrize("kind", ["image", "text", "cloud"])
def test_new_inputs_are_named_and_scored_whatever_the_batches(checkpoints, tmp_path, kind):
    model = sinkformer_pl.load(checkpoints[kind], device="cpu")
    inputs, names, firsts = inputs_of(kind, tmp_path)
    predictions = model.predict(inputs)
    assert predictions.labels == [names[first] for first in firsts]
    for prediction in predictions:
        scores = dict(prediction.scores)
        assert set(scores) == set(model.classes)
        assert sum(scores.values()) == pytest.approx(1, abs=1e-6)
        assert prediction.probability == max(scores.values())
        assert prediction.label == prediction.scores[0][0]
    alone = [model.predict(each)[0] for each in inputs]
    for one, other in zip(alone, model.predict(iter(inputs), batch_size=3, top=1), strict=True):
        assert other.scores == (pytest.approx(one.scores[0], abs=1e-5),) or (
            other.label == one.label and other.probability == pytest.approx(one.probability, abs=1e-5)
        )
    features = model.features(inputs, batch_size=3)
    assert features.shape == (7, 16)
    logits = model.network.head(features)
    assert [model.classes[place] for place in logits.argmax(-1)] == predictions.labels


@pytest.mark.parametrize("kind", ["image", "text", "cloud"])
def test_predictions_are_those_of_the_test_command(checkpoints, kind):
    root = checkpoints[kind].with_suffix("")
    data = {
        "image": lambda: ImageFolder(root, image_size=16),
        "text": lambda: TextTable(root, text="review", vocab_size=300, max_length=32),
        "cloud": lambda: PointClouds(root),
    }[kind]()
    data.setup()
    model = load(checkpoints[kind], device="cpu")
    network = Classifier.load_from_checkpoint(checkpoints[kind], map_location="cpu").eval()
    names = data.names("test")
    given = {
        "image": lambda: [root / name for name in names],
        "text": lambda: data.datasets["test"].texts,
        "cloud": lambda: [root / f"{name}.xyz" for name in names],
    }[kind]()
    with torch.no_grad():
        for batch in data.test_dataloader():
            expected = network(batch.inputs, batch.mask).softmax(-1)
    for prediction, row in zip(model.predict(given), expected, strict=True):
        scores = dict(prediction.scores)
        assert [scores[name] for name in model.classes] == pytest.approx(row.tolist(), abs=1e-5)


def test_an_input_of_any_form_is_the_same(checkpoints, tmp_path):
    model = load(checkpoints["image"], device="cpu")
    path = photo(tmp_path / "x.png", True, 0)
    image = Image.open(path)
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    given = [path, str(path), image, array, tensor, tensor.float() / 255]
    scores = [prediction.probability for prediction in model.predict(given)]
    assert scores == pytest.approx([scores[0]] * 6, abs=1e-4)
    assert len(model.predict(array)) == len(model.predict(path)) == 1
    assert len(model.predict(torch.stack([tensor, tensor]))) == 2

    model = load(checkpoints["cloud"], device="cpu")
    path = cloud(tmp_path / "x.npy", True, 0)
    points = np.load(path)
    scores = [
        p.probability for p in model.predict([path, str(path), points, torch.from_numpy(points), points.astype("f4")])
    ]
    assert scores == pytest.approx([scores[0]] * 5, abs=1e-4)


@pytest.mark.parametrize("kind", ["image", "text", "cloud"])
def test_attention_of_every_layer_and_head(checkpoints, tmp_path, kind):
    model = load(checkpoints[kind], device="cpu")
    [one, *_], _, _ = inputs_of(kind, tmp_path)
    attention = model.attention(one)
    assert attention.names
    for place, name in enumerate(attention.names):
        weights = attention[name]
        assert torch.equal(weights, attention[place])
        assert weights.shape[0] == 2
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-4)
    page = attention._repr_html_()
    picture = base64.b64decode(page.partition("base64,")[2].partition('"')[0])
    assert picture.startswith(b"\x89PNG")
    assert attention.prediction.label in page


def test_a_notebook_shows_tables_with_names_that_are_no_markup(checkpoints, tmp_path):
    model = load(checkpoints["image"], device="cpu")
    photo(tmp_path / "<b>.png", True, 0)
    predictions = model.predict([tmp_path / "<b>.png"] * 25)
    page = predictions._repr_html_()
    assert "&lt;b&gt;.png" in page
    assert "<b>" not in page
    assert "and 5 more" in page
    assert "dark" in predictions[0]._repr_html_()
    assert "VisionTransformer under Sinkhorn(n_iters=3)" in model._repr_html_()
    assert "dark" in repr(predictions)
    assert len(predictions[2:4]) == 2


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("image", "nowhere.png", "nowhere.png: no such file"),
        ("image", [3], "0: a int; give a path, an image"),
        ("image", np.zeros((4, 4, 5), np.uint8), r"0: \(4, 4, 5\); an array is"),
        ("image", np.full((4, 4, 3), 200.0), "0: torch.float64 from 200 to 200; give uint8, or 0 to 1"),
        ("image", np.zeros((4, 4), np.uint16), "0: values of uint16; give uint8, or floats from 0 to 1"),
        ("image", torch.zeros(3, 4, 4, dtype=torch.uint16), "0: values of torch.uint16"),
        ("image", np.zeros((4, 4), complex), "0: values of complex128"),
        ("image", np.full((4, 4), "a"), "0: values of <U1"),
        ("text", ["fine", "  "], "1: an empty text"),
        ("text", [b"bytes"], "0: a bytes; give text"),
        ("text", ["\ud800"], "0: half of a surrogate pair"),
        ("cloud", np.zeros((1, 3)), "0: a cloud in memory: a single point"),
        ("cloud", [np.eye(3), np.zeros((1, 3))], "1: a cloud in memory: a single point"),
        ("cloud", np.zeros((5, 3)), "all points in one place"),
        ("cloud", np.zeros((5, 2)), "no column z"),
        ("cloud", np.full((5, 3), np.nan), "point 0 is not finite"),
        ("cloud", "x.fbx", "x.fbx: no point cloud by its name"),
    ],
)
def test_what_is_no_input_is_refused_in_one_line(checkpoints, kind, given, message):
    with pytest.raises(UserError, match=message) as error:
        load(checkpoints[kind], device="cpu").predict(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        ("text", lambda model: model.predict(None), "0: a NoneType; give text"),
        ("text", lambda model: model.predict(b"bytes"), "0: a bytes; give text"),
        ("image", lambda model: model.predict(3), "0: a int; give a path, an image"),
        ("cloud", lambda model: model.features(None), "0: a NoneType; give a path, an array"),
        ("text", lambda model: model.predict("fine", top=-1), "top is -1: give a whole number, 1 or more"),
        ("text", lambda model: model.predict("fine", top=0), "top is 0: give"),
        ("text", lambda model: model.predict("fine", batch_size=0), "batch_size is 0: give"),
        ("text", lambda model: model.features("fine", batch_size="3"), "batch_size is '3': give"),
    ],
)
def test_arguments_that_make_no_sense_are_one_line(checkpoints, kind, call, message):
    with pytest.raises(UserError, match=message) as error:
        call(load(checkpoints[kind], device="cpu"))
    assert "\n" not in str(error.value)


def test_a_device_that_is_not_there_is_one_line(checkpoints):
    for device in ("foo", "cuda:77", "meta", 1.5):
        with pytest.raises(UserError, match=f"device {device}: .*; give cpu, or a GPU"):
            load(checkpoints["text"], device=device)


def test_checkpoints_that_are_no_such_model_are_named(checkpoints, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.ckpt: no such file"):
        load("nowhere.ckpt")
    content = load_file(checkpoints["text"])
    content.pop("TextTable")
    torch.save(content, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match=r"old\.ckpt: the checkpoint doesn't say how its inputs are made"):
        load(tmp_path / "old.ckpt")
    torch.save({**content, "hyper_parameters": {"width": 3}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"other\.ckpt.*another task"):
        load(tmp_path / "other.ckpt")
