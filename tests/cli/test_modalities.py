"""Images and texts on the command line, beside the point clouds of the other tests."""

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from sinkformer_pl.data import Docstrings, TextTable

pytestmark = pytest.mark.usefixtures("documentation_read_once")

CONFIGS = Path(__file__).parents[2] / "configs"
SHORT = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
SMALL = ["--model.backbone.dim", "16", "--model.backbone.num_heads", "2", "--model.backbone.depth", "1"]


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_run_is_tested_and_predicted_from_its_checkpoint_alone(modality, run, tmp_path):
    run("fit", "--config", str(CONFIGS / f"{modality}.yaml"), *SHORT, *SMALL, "--trainer.limit_train_batches", "5")
    run("test", "--ckpt_path", "best", "--name", modality, "--trainer.limit_test_batches", "3")
    run("predict", "--ckpt_path", "best", "--name", modality, "--trainer.limit_predict_batches", "3")
    folder = tmp_path / f"runs/{modality}/version_0"
    assert 0 <= json.loads((folder / "test.json").read_text())["metrics"]["test/accuracy"] <= 1
    assert len((folder / "predictions.csv").read_text().splitlines()) > 60


def test_what_a_loaders_worker_finds_is_one_line_too(run, tmp_path, capfd):
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "photos" / place).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), "red").save(tmp_path / "photos" / place / f"{number}.png")
    broken = tmp_path / "photos/test/b/3.png"
    config, data = str(CONFIGS / "image.yaml"), ["--data", "ImageFolder", "--data.root", str(tmp_path / "photos")]
    arguments = ["--data.image_size", "8", "--data.check_files", "false", "--model.backbone.channels", "3", *SMALL]
    run("fit", "--config", config, *data, *arguments, *SHORT)
    broken.write_text("<html>")
    with pytest.raises(SystemExit):
        run("test", "--ckpt_path", "best", "--name", "image", "--data.num_workers", "1")
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {broken}: can't be decoded")
    assert "Traceback" not in line


def test_figures_do_not_depend_on_the_training_folder_at_hand(run, tmp_path):
    for root, level in (("here", 100), ("there", 10)):
        for part in ("train", "test"):
            for number in range(16):
                path = tmp_path / root / part / "ab"[number % 2] / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                red = level if part == "train" else 100
                Image.new("RGB", (8, 8), (red, number, 3 * number)).save(path)
    data = ["--data", "ImageFolder", "--data.image_size", "8", "--model.backbone.channels", "3"]
    run("fit", "--config", str(CONFIGS / "image.yaml"), *data, "--data.root", "here", *SMALL, *SHORT)
    figures = []
    for root in ("here", "there"):
        for command, result in (("test", "test.json"), ("predict", "predictions.csv")):
            run(command, "--ckpt_path", "best", "--name", "image", "--data.root", root)
            figures.append((tmp_path / "runs/image/version_0" / result).read_text())
    assert figures[:2] == figures[2:]


def image_bytes(size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "flags", "expected"),
    [
        ("3.jpg", image_bytes((64, 64), "JPEG")[:-100], [], "photos/test/b/3.jpg: can't be decoded"),
        ("3.jpg", b"<!DOCTYPE html><html></html>", [], "photos/test/b/3.jpg: can't be decoded"),
        ("3.png", image_bytes((1, 1)), [], "photos/test/b/3.png: an image of 1x1 pixels"),
        (
            "3.png",
            image_bytes(),
            ["--model.backbone.patch_size", "3"],
            "patch_size=3 must divide the image size, 8 x 8",
        ),
    ],
)
def test_a_bad_image_or_patch_is_named_before_anything_is_written(fail, tmp_path, name, content, flags, expected):
    for number, place in enumerate(("train/a", "train/b", "test/a", "test/b")):
        (tmp_path / "photos" / place).mkdir(parents=True)
        for more in range(2):
            path = tmp_path / "photos" / place / f"{more}.png"
            Image.new("RGB", (8, 8), (number, more, 0)).save(path)
    (tmp_path / "photos/test/b" / name).write_bytes(content)
    data = [
        "--data",
        "ImageFolder",
        "--data.root",
        "photos",
        "--data.image_size",
        "8",
        "--model.backbone.channels",
        "3",
    ]
    assert expected in fail("fit", "--config", str(CONFIGS / "image.yaml"), *data, *SMALL, *SHORT, *flags)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"text,label\n,pos\na,neg\n", "test.csv:2 is an empty text"),
        (b"text,label\ncaf\xe9,pos\n", "test.csv: not UTF-8 at byte 14, line 2"),
        (b"text,label\na,so-so\n", "test.csv, line 2: column label has 'so-so', which is no class"),
        (b"words,label\na,pos\n", "test.csv, line 1: no column text"),
    ],
)
def test_a_bad_table_is_named_before_anything_is_written(fail, tmp_path, content, expected):
    (tmp_path / "train.csv").write_text(
        "text,label\n" + "".join(f"{i},{'pos' if i % 2 else 'neg'}\n" for i in range(8))
    )
    (tmp_path / "test.csv").write_bytes(content)
    data = ["--data", "TextTable", "--data.root", "."]
    assert expected in fail("fit", "--config", str(CONFIGS / "text.yaml"), *data, *SMALL, *SHORT)


def test_a_text_model_reads_other_data_through_its_own_tokenizer(run, tmp_path):
    run("fit", "--config", str(CONFIGS / "text.yaml"), *SHORT, *SMALL, "--trainer.limit_train_batches", "3")
    run("test", "--ckpt_path", "best", "--name", "text")
    result = tmp_path / "runs/text/version_0/test.json"
    wanted = json.loads(result.read_text())["metrics"]["test/loss"]

    data = Docstrings()
    data.setup()
    for name, split in (("train", "val"), ("test", "test")):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            dataset = data.datasets[split]
            rows = zip(dataset.texts, (data.classes[target] for target in dataset.targets), strict=True)
            csv.writer(file).writerows([("text", "label"), *rows])
    table = [
        "--data",
        "TextTable",
        "--data.root",
        str(tmp_path),
        "--data.train",
        "train.csv",
        "--data.test",
        "test.csv",
    ]
    assert TextTable(root=str(tmp_path), train="train.csv", test="test.csv").classes == data.classes
    run(
        "test", "--ckpt_path", "best", "--name", "text", *table, "--data.max_length", "128", "--data.vocab_size", "4000"
    )
    assert json.loads(result.read_text())["metrics"]["test/loss"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("config", "flags", "expected"),
    [
        ("pointcloud", ["--data", "Digits"], "SetTransformer takes point clouds"),
        ("image", ["--data.image_size", "12"], "images are 1 x 12 x 12 (channels x height x width), but the network"),
        ("text", ["--data.max_length", "256"], "a text has 256 tokens, but the network learns positions for"),
        ("text", ["--data.vocab_size", "4010"], "is outside of the network's vocabulary, 0 to 3999"),
    ],
)
def test_data_that_the_network_wasnt_built_for_leave_no_trace(fail, config, flags, expected):
    assert expected in fail("fit", "--config", str(CONFIGS / f"{config}.yaml"), *SMALL, *SHORT, *flags)


def test_a_long_text_is_noticed_before_anything_is_written_in_every_split_that_a_command_uses(run, fail, tmp_path):
    for name, last in (("train", 5), ("val", 5), ("long", 400)):
        words = [5] * 7 + [last]
        rows = [f"{'one two three ' * count},{'pos' if place % 2 else 'neg'}\n" for place, count in enumerate(words)]
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(rows))
    data = ["--data", "TextTable", "--data.root", ".", "--data.max_length", "300", "--data.vocab_size", "257"]
    fit = ["fit", "--config", str(CONFIGS / "text.yaml"), *data, *SMALL, *SHORT]
    expected = "a text has 300 tokens, but the network learns positions for max_length=128"
    assert expected in fail(*fit, "--data.test", "val.csv", "--data.val", "long.csv")
    run(*fit, "--data.test", "long.csv", "--data.val", "val.csv", "--data.max_length", "100")
    again = ["--ckpt_path", "best", "--name", "text", "--data.max_length", "300"]
    assert expected in fail("test", *again)
    assert expected in fail("validate", *again, "--data.val", "long.csv", "--data.test", "val.csv")
    run("validate", *again)
