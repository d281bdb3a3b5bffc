"""predict on files, folders, lines, tables and arrays, as a user calls it."""

import csv
import io
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sinkformer_pl.inference import load
from sinkformer_pl.inference.sources import Sources
from sinkformer_pl.inference.stream import answers
from tests.commands import start
from tests.inference.conftest import cloud, photo, words
from tests.optional import h5py


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_images_of_a_nested_folder_and_single_files_of_any_name(checkpoints, run, tmp_path):
    for i in range(5):
        photo(tmp_path / f"photos/deep/{'dark' if i % 2 else 'light'}/{i}.JPG", bool(i % 2), i)
    (tmp_path / "photos/notes.txt").write_text("x")
    photo(tmp_path / "one.png", True, 9).rename(tmp_path / "no suffix")
    with pytest.warns(UserWarning, match=r"photos: 1 file is left out, the first is notes\.txt; images end in \.jpg"):
        out, _ = run("--ckpt_path", checkpoints["image"], "photos", "no suffix", "--top", "2", "--batch_size", "2")
    assert out.splitlines() == ["6 predictions: predictions.csv", "accuracy 1.0000: 5 of 5 with a label"]
    rows = table((tmp_path / "predictions.csv").read_text())
    assert [*rows[0]] == ["name", "class", "probability", "class_2", "probability_2"]
    assert [row["class"] for row in rows] == ["dark", "dark", "light", "light", "light", "dark"]
    assert [row["name"] for row in rows[:2]] == ["photos/deep/dark/1.JPG", "photos/deep/dark/3.JPG"]
    assert all(float(row["probability"]) + float(row["probability_2"]) == pytest.approx(1, abs=1e-4) for row in rows)


def test_clouds_of_every_format_together(checkpoints, run, tmp_path):
    points = np.random.default_rng(0).normal(size=(40, 3)) * [1, 1, 0.05]
    faces = "".join(f"f {i} {i + 1} {i + 2}\n" for i in range(1, 39))
    (tmp_path / "a.obj").write_text("".join("v {} {} {}\n".format(*point) for point in points) + faces)
    np.savetxt(tmp_path / "c.CSV", points, delimiter=";", header="x;y;z", comments="")
    np.savez(tmp_path / "d.npz", points=points, colors=np.zeros((40, 3)))
    with h5py.File(tmp_path / "e.h5", "w") as file:
        file["xyz"] = points
    np.save(tmp_path / "f.npy", points)
    np.save(tmp_path / "g.npy", np.stack([points, points * [1, 1, 20]]))
    header = (
        "VERSION .7\nFIELDS x y z\nSIZE 8 8 8\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 40\nHEIGHT 1\nPOINTS 40\nDATA binary\n"
    )
    (tmp_path / "h.pcd").write_bytes(header.encode() + points.tobytes())
    files = [f"{name}" for name in ("a.obj", "c.CSV", "d.npz", "e.h5", "f.npy", "g.npy", "h.pcd")]
    run("--ckpt_path", checkpoints["cloud"], *files)
    rows = table((tmp_path / "predictions.csv").read_text())
    assert [row["name"] for row in rows] == ["a.obj", "c.CSV", "d.npz", "e.h5", "f.npy", "g.npy:0", "g.npy:1", "h.pcd"]
    assert [row["class"] for row in rows[1:]] == ["flat"] * 5 + ["round", "flat"]
    assert len({row["probability"] for row in rows[1:6]}) == 1


def test_texts_of_tables_lines_and_standard_input_with_labels(checkpoints, run, tmp_path, monkeypatch):
    goods = [i % 3 == 0 for i in range(9)]
    texts = [words(good, i) for i, good in enumerate(goods)]
    labels = ["pos" if good else "neg" for good in goods]
    expected = list(labels)
    labels[1], labels[2] = "pos", "unheard of"
    rows = list(zip(texts, labels, strict=True))
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("review", "true"), *rows])
    (tmp_path / "t.TSV").write_text("".join(f"{text}\t{label}\n" for text, label in [("review", "true"), *rows]))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"review": t, "true": y}) + "\n" for t, y in rows))
    for name in ("t.csv", "t.TSV", "t.jsonl"):
        out, _ = run("--ckpt_path", checkpoints["text"], name, "--text", "review", "--label", "true", "--overwrite")
        assert "accuracy 0.8750: 7 of 8 with a label" in out
        assert "doesn't know are left out of the accuracy: unheard of" in out
        found = table((tmp_path / "predictions.csv").read_text())
        assert [row["class"] for row in found] == expected
        assert [row["label"] for row in found] == labels
        assert found[3]["name"] == f"{name}:{4 if name == 't.jsonl' else 5}"
    (tmp_path / "lines.log").write_text("\n".join(texts))
    out, _ = run("--ckpt_path", checkpoints["text"], "lines.log", "--lines", "--output", "-")
    assert [row["class"] for row in table(out)] == expected
    (tmp_path / "one.txt").write_text("\n".join(texts[:1]))
    out, _ = run("--ckpt_path", checkpoints["text"], "one.txt", "--output", "-")
    assert [(row["name"], row["class"]) for row in table(out)] == [("one.txt", "pos")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\r\n".join(texts).encode())))
    out, err = run("--ckpt_path", checkpoints["text"], "-", "--output", "-")
    assert [row["class"] for row in table(out)] == expected
    assert "9 predictions: standard output" in err


def test_lines_of_the_files_in_folders(checkpoints, run, tmp_path):
    for name, good in (("pos", True), ("neg", False)):
        (tmp_path / "x" / name).mkdir(parents=True)
        (tmp_path / "x" / name / "a.md").write_text("\n".join(words(good, i) for i in range(3)))
    out, err = run("--ckpt_path", checkpoints["text"], "x", "--lines", "--output", "-")
    rows = table(out)
    assert [row["name"] for row in rows] == [f"x/{name}/a.md:{line}" for name in ("neg", "pos") for line in (1, 2, 3)]
    assert [row["class"] for row in rows] == ["neg"] * 3 + ["pos"] * 3
    assert "accuracy 1.0000: 6 of 6" in err


def test_paths_of_standard_input_are_taken_as_arguments_are(checkpoints, run, tmp_path, monkeypatch):
    for i in range(3):
        cloud(tmp_path / f"x/{'flat' if i else 'round'}/{i}.xyz", bool(i), i)
    points = np.random.default_rng(0).normal(size=(2, 30, 3))
    np.save(tmp_path / "several.npy", points)
    (tmp_path / "broken.npy").write_text("1")
    listed = ["x", "several.npy", "", "broken.npy", "x/flat/1.xyz", "nowhere.ply"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(listed).encode())))
    out, err = run("--ckpt_path", checkpoints["cloud"], "-", "--output", "-", "--skip_broken", "--batch_size", "2")
    rows = table(out)
    names = ["x/flat/1.xyz", "x/flat/2.xyz", "x/round/0.xyz", "several.npy:0", "several.npy:1"]
    assert [row["name"] for row in rows] == [*names, "-:3", "broken.npy", "x/flat/1.xyz", "nowhere.ply"]
    assert [bool(row["error"]) for row in rows] == [False] * 5 + [True, True, False, True]
    assert "give a path in each line" in rows[5]["error"]
    assert "accuracy 1.0000: 3 of 3" in err


def test_the_column_of_the_training_is_the_default(checkpoints, run, tmp_path):
    (tmp_path / "t.csv").write_text("text\na good and fine thing\n")
    out, _ = run("--ckpt_path", checkpoints["text"], "t.csv", "--output", "-")
    assert table(out)[0]["class"] == "pos"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_other_formats_have_the_same_rows(checkpoints, run, tmp_path, suffix):
    path = photo(tmp_path / "a.png", True, 0)
    (tmp_path / "b.png").write_text("<html>")
    output = tmp_path / f"out/x{suffix}"
    run("--ckpt_path", checkpoints["image"], "a.png", "b.png", "--output", output, "--top", "9", "--skip_broken")
    expected = load(checkpoints["image"], device="cpu").predict(path)[0].scores
    if suffix == ".jsonl":
        good, bad = (json.loads(line) for line in output.read_text().splitlines())
        assert [(each["class"], each["score"]) for each in good["predictions"]] == [
            (name, pytest.approx(score, abs=1e-5)) for name, score in expected
        ]
        assert (bad["name"], bad["predictions"]) == ("b.png", [])
    else:
        from pyarrow import parquet

        good, bad = parquet.read_table(output).to_pylist()
        assert [good["class"], good["class_2"]] == [name for name, _ in expected]
        assert good["probability_2"] == pytest.approx(expected[1][1], abs=1e-5)
        assert (bad["name"], bad["class"], good["error"]) == ("b.png", None, None)
    assert bad["error"].startswith("b.png: can't be decoded")


def test_features_and_attention_stand_beside_the_rows(checkpoints, run, tmp_path):
    for i in range(5):
        cloud(tmp_path / f"x/{i}.xyz", i % 2 == 0, i)
    (tmp_path / "x/2.xyz").write_text("1 2\n")
    arguments = ["--skip_broken", "--features", "f.npz", "--attention", "a.npz", "--batch_size", "2"]
    run("--ckpt_path", checkpoints["cloud"], "x", *arguments)
    model = load(checkpoints["cloud"], device="cpu")
    features = np.load(tmp_path / "f.npz")["features"]
    assert features.shape == (5, 16)
    assert np.isnan(features[2]).all()
    good = [tmp_path / f"x/{i}.xyz" for i in (0, 1, 3, 4)]
    assert np.allclose(features[[0, 1, 3, 4]], model.features(good).numpy(), atol=1e-5)
    attention = np.load(tmp_path / "a.npz")
    seen = model.attention(good[2])
    assert {name for name in attention.files if name.startswith("3/")} == {f"3/{name}" for name in seen.names}
    for name in seen.names:
        assert np.allclose(attention[f"3/{name}"], seen[name].numpy(), atol=1e-5)
    assert not any(name.startswith("2/") for name in attention.files)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("devices", [1, 2])
def test_rows_are_in_order_for_any_number_of_processes_and_devices(checkpoints, tmp_path, workers, devices):
    files = [str(cloud(tmp_path / f"{i}.npy", i % 3 == 0, i)) for i in range(23)]
    model = load(checkpoints["cloud"], device="cpu")
    copies = [load(checkpoints["cloud"], device="cpu") for _ in range(devices)]
    found = list(answers(copies, Sources(files, "point clouds"), batch_size=4, workers=workers))
    rows = [row for answered in found for row in answered.rows]
    assert [row.name for row in rows] == files
    expected = model.predict(files, batch_size=4)
    assert [row.prediction for row in rows] == list(expected)


def test_a_broken_file_stops_it_after_what_came_before(checkpoints, run, fail, tmp_path, capfd):
    for i in range(5):
        photo(tmp_path / f"x/{i}.png", True, i)
    (tmp_path / "x/3.png").write_bytes((tmp_path / "x/3.png").read_bytes()[:60])
    assert "x/3.png: can't be decoded" in fail("--ckpt_path", checkpoints["image"], "x", "--batch_size", "2")
    assert "x/3.png: can't be decoded" in fail("--ckpt_path", checkpoints["image"], "x", "--workers", "2")
    with pytest.raises(SystemExit):
        run("--ckpt_path", checkpoints["image"], "x", "--batch_size", "2", "--output", "-")
    assert [row["name"] for row in table(capfd.readouterr().out)] == [f"x/{i}.png" for i in range(3)]
    out, _ = run("--ckpt_path", checkpoints["image"], "x", "--skip_broken", "--workers", "2", "--batch_size", "2")
    assert "1 of 5 are broken, the first: x/3.png: can't be decoded" in out
    rows = table((tmp_path / "predictions.csv").read_text())
    assert [bool(row["error"]) for row in rows] == [False, False, False, True, False]


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(checkpoints, fail, tmp_path):
    for i in range(40):
        cloud(tmp_path / f"x/{i}.npy", i % 2 == 0, i)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        for output in ("new/x.csv", "x.jsonl", "x.parquet"):
            message = fail("--ckpt_path", checkpoints["cloud"], "x", "--output", output, "--batch_size", "8")
            assert "File too large; free some space" in message
        # The rows have room; what else is written at the end hasn't.
        for option in ("--features", "--attention"):
            arguments = [option, "new/x.npz", "--batch_size", "8"]
            assert "File too large" in fail(
                "--ckpt_path", checkpoints["cloud"], *(f"x/{i}.npy" for i in range(20)), *arguments
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_who_reads_a_pipe_may_have_enough(checkpoints, run, tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

    photo(tmp_path / "a.png", True, 0)
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(SystemExit) as exit_:
        run("--ckpt_path", checkpoints["image"], "a.png", "--output", "-")
    assert exit_.value.code == 128 + signal.SIGPIPE


def test_an_output_that_is_there_is_kept_unless_asked(checkpoints, run, fail, tmp_path):
    photo(tmp_path / "a.png", True, 0)
    (tmp_path / "predictions.csv").write_text("mine")
    message = fail("--ckpt_path", checkpoints["image"], "a.png")
    assert "--output predictions.csv: it is there already; give another name, or --overwrite" in message
    photo(tmp_path / "b.png", True, 0).write_text("<html>")
    fail("--ckpt_path", checkpoints["image"], "a.png", "b.png", "--overwrite")
    assert (tmp_path / "predictions.csv").read_text() == "mine"
    run("--ckpt_path", checkpoints["image"], "a.png", "--overwrite")
    assert (tmp_path / "predictions.csv").read_text().startswith("name,class")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line(checkpoints, tmp_path):
    photo(tmp_path / "a.png", True, 0)
    argv = ["predict", "--ckpt_path", str(checkpoints["image"]), "a.png", "--output", "-"]
    child = start(*argv, cwd=tmp_path, out=Path("/dev/full"), err=tmp_path / "err")
    child.join(120)
    said = (tmp_path / "err").read_text()
    assert child.exitcode == 2, said
    assert "No space left on device; free some space" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("kind", "make", "arguments", "message"),
    [
        ("image", lambda p: p.touch(), ["x"], "x: can't be decoded"),
        ("image", lambda p: p.mkdir(), ["x"], "x: no images: the folder is empty; give files that end in .jpg"),
        ("image", lambda p: cloud(p / "a.off", True, 0), ["x"], "x: no images among 1 files, such as a.off"),
        ("image", lambda p: p.write_bytes(b"P5\n20000 20000\n255\n"), ["x"], "x: can't be decoded (Image size"),
        ("image", None, ["nowhere"], "nowhere: no such file"),
        ("image", None, ["x", "--label", "y"], "--label: of texts, and the model is of images; leave it out"),
        ("image", None, ["x", "--output", "y.xls"], "--output y.xls: not one of .csv, .jsonl, .parquet"),
        ("image", None, ["x", "--features", "y.csv"], "--features y.csv: arrays are written as .npz"),
        ("image", None, ["x", "--features", "y.npz", "--attention", "y.npz"], "are both y.npz; give two names"),
        ("image", lambda p: p.touch(), ["x", "--output", "x/y.csv"], "x is a file, no folder; give another name"),
        ("image", None, ["x", ""], "an empty name among the inputs"),
        ("image", None, ["--split", "vall"], "python -m sinkformer_pl predict --help"),
        ("image", None, ["x", "--ouput", "y.csv"], "--ouput: no option of predict on files"),
        ("image", None, ["x", "--top", "0"], "--top 0: give 1 or more"),
        ("image", None, ["x", "--device", "gpu7"], "--device gpu7"),
        ("image", None, ["-", "--workers", "2"], "--workers 2: standard input is read by one process"),
        ("text", lambda p: p.write_text("fine"), ["x", "--text", "y"], "--text y: a column, and no input is a table"),
        ("text", lambda p: p.write_text("fine"), ["x", "--label", "y"], "--label y: a column, and no input is a table"),
        ("text", None, ["x.csv", "--lines"], "--lines: of other files than tables"),
        ("image", lambda p: p.write_text("<html>"), ["x", "--output", "new/deeper/x.csv"], "x: can't be decoded"),
        ("text", lambda p: p.write_bytes(b"caf\xe9"), ["x"], "x: not UTF-8 at byte 3, line 1"),
        ("text", lambda p: p.write_text("\n"), ["x"], "x: an empty text"),
        ("text", lambda p: p.with_suffix(".csv").write_text("a;b\n1;2\n"), ["x.csv"], "no column text; it has a;b"),
        ("text", lambda p: p.with_suffix(".csv").write_text('text\n"a\n'), ["x.csv"], "x.csv, line 2: "),
        ("text", lambda p: p.with_suffix(".jsonl").write_text('{"text": '), ["x.jsonl"], "x.jsonl, line 1: no JSON"),
        ("text", lambda p: p.write_text("fine\n\nfine"), ["x", "--lines"], "x:2: an empty text"),
        ("cloud", lambda p: p.with_suffix(".xyz").write_text("1 2 3\n"), ["x.xyz"], "x.xyz: a single point"),
        ("cloud", lambda p: p.with_suffix(".npy").write_text("1"), ["x.npy"], "x.npy: cannot be read"),
        ("cloud", lambda p: np.save(p, np.zeros((2, 5, 3))), ["x.npy"], "x.npy:0: a cloud in memory: all points in"),
        ("cloud", lambda p: photo(p / "a.png", True, 0), ["x"], "x: no point clouds among 1 files, such as a.png"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(checkpoints, fail, tmp_path, kind, make, arguments, message):
    if make is not None:
        make(tmp_path / "x")
    assert message in fail("--ckpt_path", checkpoints[kind], *arguments)


def test_checkpoints_that_cannot_predict_are_one_line(checkpoints, fail, tmp_path):
    photo(tmp_path / "a.png", True, 0)
    assert "give --ckpt_path PATH" in fail("a.png")
    assert "--ckpt_path nowhere.ckpt: no such file" in fail("--ckpt_path", "nowhere.ckpt", "a.png")
    for suffix in (".onnx", ".pt2", ".safetensors"):
        (tmp_path / "model").with_suffix(suffix).write_bytes(b"PK")
        assert "a file of the command export" in fail("--ckpt_path", f"model{suffix}", "--split", "test")
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    assert "checkpoint x.ckpt: its 'hyper_parameters' is missing" in fail("--ckpt_path", "x.ckpt", "a.png")
    shutil.copy(checkpoints["image"], tmp_path / "y.ckpt")
    (tmp_path / "y.ckpt").write_bytes((tmp_path / "y.ckpt").read_bytes()[:2000])
    assert "checkpoint y.ckpt is damaged" in fail("--ckpt_path", "y.ckpt", "a.png")


def test_a_stream_is_read_as_it_goes(checkpoints):
    """A source without an end gives its first rows."""
    model = load(checkpoints["text"], device="cpu")

    class Endless(Sources):
        def items(self, *, warn=True):
            from itertools import count

            from sinkformer_pl.inference.inputs import Item

            return (Item(str(number), words(True, number)) for number in count())

    first = next(answers([model], Endless([], "texts"), batch_size=4))
    assert [row.name for row in first.rows] == ["0", "1", "2", "3"]
