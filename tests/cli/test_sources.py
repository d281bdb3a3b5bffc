"""Sources of data from the command line to predictions and exported files: pairs of texts, tables of images."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sinkformer_pl

CONFIGS = Path(__file__).parents[2] / "configs"
SHORT = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
SMALL = ["--model.backbone.dim", "16", "--model.backbone.num_heads", "2", "--model.backbone.depth", "1"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_pairs_of_texts_are_predicted_as_they_were_trained_on(run, fail, tmp_path):
    words = ["a red house", "two dogs run", "the sea is calm", "nobody knows"]
    pairs = [(f"{words[i % 4]} {i}", f"{words[i % 3]} {i}") for i in range(24)]
    for part in ("train", "test"):
        rows = [(*pair, "same" if pair[0] == pair[1] else "other") for pair in pairs]
        with (tmp_path / f"{part}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("premise", "hypothesis", "answer"), *rows])
    config = ["--config", str(CONFIGS / "text.yaml"), "--data", "TextTable", "--data.root", ".", "--name", "pairs"]
    columns = ["--data.text_columns", "[premise, hypothesis]", "--data.label", "answer"]
    with pytest.warns(UserWarning, match=r"\d+ of 24 test texts are also among"):
        run("fit", *config, *columns, *SHORT, *SMALL)
    checkpoint = "runs/pairs/version_0/checkpoints/best.ckpt"
    model = sinkformer_pl.load(checkpoint, device="cpu")
    expected = [prediction.probability for prediction in model.predict(pairs)]
    assert [p.probability for p in model.predict([pair[::-1] for pair in pairs])] != pytest.approx(expected, abs=1e-5)
    assert len(model.predict(pairs[0])) == 1
    (tmp_path / "lines.txt").write_text("".join(f"{one}\t{other}\n" for one, other in pairs))
    (tmp_path / "other.tsv").write_text("a\tb\n" + (tmp_path / "lines.txt").read_text())
    for inputs in (["test.csv"], ["lines.txt", "--lines"], ["other.tsv", "--text_columns", "a,b"]):
        run("predict", "--ckpt_path", checkpoint, *inputs, "--overwrite")
        found = [float(row["probability"]) for row in read(tmp_path / "predictions.csv")]
        assert found == pytest.approx(expected, abs=1e-5)
    run("export", "--ckpt_path", checkpoint, "--format", "safetensors", "test.csv")
    exported = sinkformer_pl.load(tmp_path / "model.safetensors", device="cpu")
    assert [p.probability for p in exported.predict(pairs)] == expected
    for inputs, message in (
        (["test.csv", "--text", "premise"], "--text premise: the model takes pairs of texts; give --text_columns"),
        (["other.tsv"], "other.tsv, line 1: no column premise; it has a, b: name the columns by --text_columns"),
        (["train.csv", "--text_columns", "premise"], "the model takes pairs of texts; give the two columns"),
    ):
        assert message in fail("predict", "--ckpt_path", checkpoint, *inputs, "--output", "none.csv")
    (tmp_path / "one.txt").write_text("no tab\n")
    run("predict", "--ckpt_path", checkpoint, "one.txt", "--lines", "--skip_broken", "--overwrite")
    assert "the model takes two" in read(tmp_path / "predictions.csv")[0]["error"]


def test_images_of_a_table_with_unequal_sides_resume_and_are_predicted_and_exported(run, fail, tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for place in range(24):
        pixels = rng.normal(60 if place % 2 else 190, 20, (20, 30 + place % 3, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{place}.png")
        rows.append((f"../{place}.png", "dark" if place % 2 else "light", "test" if place < 6 else "train"))
    (tmp_path / "lists").mkdir()
    with (tmp_path / "lists/all.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    sides = ["--data.image_size", "[12, 18]", "--model.backbone.image_size", "[12, 18]"]
    config = [
        *("--config", str(CONFIGS / "cats_and_dogs.yaml"), "--data", "ImageTable", "--data.root", "lists/all.csv"),
        *(*sides, "--model.backbone.patch_size", "6", "--data.batch_size", "4", *SHORT, *SMALL),
    ]
    message = fail("fit", *config, "--model.backbone.image_size", "[18, 12]")
    assert "set model.backbone.channels to 3 and model.backbone.image_size to [12, 18]" in message
    assert "data.image_size is [12, 18, 3]: give" in fail("fit", *config, "--data.image_size", "[12, 18, 3]")
    config += ["--model.schedule", "Constant", "--trainer.max_epochs", "2"]
    run("fit", *config, "--name", "whole")
    run("fit", *config, "--name", "cut", "--trainer.max_steps", "6")
    run("fit", *config, "--name", "cut", "--trainer.max_steps", "-1", "--ckpt_path", "last")
    whole, cut = (
        torch.load(tmp_path / f"runs/{name}/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "cut")
    )
    assert whole["positions" if "positions" in whole else "backbone.positions"].shape == (7, 16)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    checkpoint = "runs/whole/version_0/checkpoints/last.ckpt"
    files = [f"{place}.png" for place in range(6)]
    model = sinkformer_pl.load(tmp_path / checkpoint, device="cpu")
    assert model.preprocessing(tmp_path / files[0]).shape == (3, 12, 18)
    expected = [prediction.scores for prediction in model.predict([tmp_path / file for file in files])]
    run("export", "--ckpt_path", checkpoint, "--format", "torch")
    exported = sinkformer_pl.load(tmp_path / "model.pt2")
    for one, other in zip(expected, exported.predict([tmp_path / file for file in files]), strict=True):
        assert dict(other.scores) == pytest.approx(dict(one), abs=1e-4)
    run("predict", "--ckpt_path", checkpoint, *files)
    found = [float(row["probability"]) for row in read(tmp_path / "predictions.csv")]
    assert found == pytest.approx([scores[0][1] for scores in expected], abs=1e-4)
