"""compare, as a user calls it: real runs in processes of their own."""

import csv
import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from sinkformer_pl.cli import main
from tests import commands
from tests.cli.conftest import TINY

# Writes down what a training sees: the samples of each step, their values, and the weights at the start.
WITNESS = """
import hashlib, json, os, time
import pytorch_lightning as pl


class Witness(pl.Callback):
    def on_fit_start(self, trainer, pl_module):
        self.seen = []
        self.weights = {name: digest(value) for name, value in pl_module.state_dict().items()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append([batch.index.tolist(), digest(batch.inputs), batch.target.tolist()])

    def on_fit_end(self, trainer, pl_module):
        with open(trainer.default_root_dir + "/" + str(os.getpid()) + ".json", "w") as file:
            name = type(pl_module.backbone.blocks[0].gather.attention.core.normalization).__name__
            json.dump({"name": name, "seen": self.seen, "weights": self.weights}, file)


class Slow(pl.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        time.sleep(float(os.environ.get("PAUSE", "0")))


def digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
"""


def config(folder: Path, callback: str, epochs: int) -> None:
    trainer = {**TINY["trainer"], "max_epochs": epochs, "callbacks": [f"witness.{callback}"]}
    content = {**TINY, "plugins": ["witness"], "trainer": trainer}
    content["model"] = {**TINY["model"], "normalization": {"class_path": "Sinkhorn", "init_args": {"n_iters": 5}}}
    content["model"]["backbone"]["init_args"]["dropout"] = 0.1
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    (folder / "witness.py").write_text(WITNESS)


def compare(folder: Path, *argv: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Compare in a process whose trials are processes of their own, all of them forked."""
    done = commands.run(*COMPARE, *argv, cwd=folder, first=commands.fork_trials)
    assert done.returncode == status, done.stdout + done.stderr
    return done


COMPARE = ["compare", "--config", "tiny.yaml"]
ARMS = [*COMPARE, "--normalizations", "Softmax,Sinkhorn,LowRankSinkhorn(rank=4)", "--data.batch_size", "16"]
ARMS += ["--seeds", "3,4"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A folder with a comparison of three normalizations, and what the command printed."""
    folder = tmp_path_factory.mktemp("compared")
    config(folder, "Witness", 2)
    return folder, compare(folder, *ARMS[3:], "--jobs", "2").stdout


def test_everything_is_reported(compared):
    folder, printed = compared
    root = folder / "runs/tiny-compare"
    rows = list(csv.DictReader((root / "runs.csv").open()))
    labels = ["Softmax", "Sinkhorn(n_iters=5)", "LowRankSinkhorn(rank=4)"]
    assert [(row["normalization"], row["seed"]) for row in rows] == [(label, s) for label in labels for s in "34"]
    for row in rows:
        assert row["status"] == "done"
        test = json.loads((folder / row["folder"] / "test.json").read_text())
        assert float(row["test/accuracy"]) == test["metrics"]["test/accuracy"]
        assert row["normalization"].startswith(test["normalization"]["class_path"].rpartition(".")[2])
        assert 0 < float(row["seconds_per_step"]) < 60
        assert 50 < float(row["peak_mb"]) < 20000
    assert (root / "summary.md").read_text().count("| done |") == 6
    for label in labels:
        assert label in printed
    assert (root / "comparison.png").is_file()


def test_arms_see_the_same_batches_and_begin_with_the_same_weights(compared):
    folder, _ = compared
    witnesses = [json.loads(path.read_text()) for path in (folder / "runs/tiny-compare").glob("*.json")]
    witnesses = [witness for witness in witnesses if "seen" in witness]
    assert len(witnesses) == 6
    for mine in witnesses:
        twins = [other for other in witnesses if other["seen"] == mine["seen"]]
        assert {twin["name"] for twin in twins} == {"Softmax", "Sinkhorn", "LowRankSinkhorn"}
        assert len(twins) == 3
        for twin in twins:
            shared = mine["weights"].keys() & twin["weights"].keys()
            assert len(shared) > 20
            assert {key for key in shared if mine["weights"][key] != twin["weights"][key]} == set()
        others = [other for other in witnesses if other not in twins]
        assert all(
            other["weights"]["backbone.embed.weight"] != mine["weights"]["backbone.embed.weight"] for other in others
        )


def test_what_is_done_isnt_done_again_and_seeds_can_be_added(compared, monkeypatch, capsys):
    folder, _ = compared
    monkeypatch.chdir(folder)
    root = folder / "runs/tiny-compare"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.ckpt")}
    argv = list(ARMS)
    main(argv)
    assert "6 of them done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.ckpt")} == before
    main([*argv, "--dry-run"])
    done = capsys.readouterr()
    assert not done.out
    assert "nothing to do: all 6 runs" in done.err
    argv[argv.index("3,4")] = "3,4,5"
    main([*argv, "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    fit, test = lines[1].split(" && ")
    assert fit.startswith("python -m sinkformer_pl fit ")
    assert "--model.normalization Sinkhorn --model.normalization.n_iters 5" in fit
    assert "--seed_everything 5 --data.seed 5" in fit
    assert test.endswith("--ckpt_path best")
    # Another scheduler runs a line; compare finds its result.
    for line in lines[0].split(" && "):
        *python, _ = words = shlex.split(line)[:4]
        assert python == ["python", "-m", "sinkformer_pl"], words
        commands.run(*shlex.split(line)[3:], cwd=folder).check_returncode()
    main([*argv, "--dry-run"])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_other_arguments_need_another_name(compared, monkeypatch, capsys):
    folder, _ = compared
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit):
        main([*ARMS, "--model.backbone.dim", "16"])
    assert "it holds runs with other arguments" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_comparison_goes_on_where_it_was(tmp_path):
    config(tmp_path, "Slow", 4)
    argv = ["--normalizations", "Softmax,Sinkhorn", "--seeds", "0"]
    command = commands.interpreter(*COMPARE, *argv)
    first = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PAUSE": "30"}, stdout=subprocess.DEVNULL, start_new_session=True
    )
    root = tmp_path / "runs/tiny-compare"
    deadline = time.monotonic() + 180
    while not list(root.glob("Softmax-seed0/version_0/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    # Its run still lives: nobody else may work there.
    assert "another process works in it" in compare(tmp_path, *argv, status=2).stderr
    os.killpg(first.pid, signal.SIGKILL)
    while True:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        if "another process" not in done.stderr:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Softmax, seed 0: resumes" in done.stdout
    rows = list(csv.DictReader((root / "runs.csv").open()))
    assert [row["status"] for row in rows] == ["resumed", "done"]
    assert "1 of them resumed" in (root / "summary.md").read_text()
    for row in rows:
        assert json.loads((tmp_path / row["folder"] / "fit.json").read_text())["epochs"] == 4
        assert row["folder"].endswith("version_0")
    epochs = [row["epoch"] for row in csv.DictReader((root / "curves.csv").open()) if row["normalization"] == "Softmax"]
    assert epochs == ["0", "1", "2", "3"]


def test_runs_that_fail_are_reported_and_tried_again(tmp_path):
    config(tmp_path, "Witness", 1)
    source = (tmp_path / "witness.py").read_text()
    raising = """
        if "Sinkhorn" in str(pl_module.hparams["normalization"]):
            raise OSError("the disk is full")"""
    (tmp_path / "witness.py").write_text(source.replace("self.seen = []", "self.seen = []" + raising))
    argv = ["--normalizations", "Sinkhorn,Softmax", "--seeds", "0"]
    done = compare(tmp_path, *argv, status=2)
    assert "Sinkhorn(n_iters=5), seed 0: fit failed, status 1: OSError: the disk is full" in done.stdout
    summary = (tmp_path / "runs/tiny-compare/summary.md").read_text()
    assert "| Softmax | 0 | done |" in summary
    assert "| Sinkhorn(n_iters=5) | 0 | failed | - |" in summary
    assert "error: 1 of 2 runs failed, the first by: status 1: OSError: the disk is full" in done.stderr
    (tmp_path / "witness.py").write_text(source)
    assert "1 of them done" in compare(tmp_path, *argv).stdout


def test_what_is_refused_stops_all_and_leaves_the_name_to_the_next(tmp_path, monkeypatch, capsys):
    """The runs of the first are new processes, as they are for a user."""
    monkeypatch.chdir(tmp_path)
    config(tmp_path, "Witness", 1)

    def check(interval, out, err):
        assert f"error: trainer.val_check_interval {interval}: an epoch has" in err
        assert out.count("begins") == 1
        assert json.loads(Path("runs/tiny-compare/comparison.json").read_text())["flags"][-1] == interval

    argv = ["--normalizations", "Softmax,Sinkhorn", "--trainer.val_check_interval"]
    with pytest.raises(SystemExit):
        main([*COMPARE, *argv, "1000"])
    check("1000", *capsys.readouterr())
    done = compare(tmp_path, *argv, "2000", status=2)
    check("2000", done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data.batch_size", "x"], "data.batch_size x: expected a whole number"),
        (["--data.batch_size", "0"], "batch_size"),
        (["--foo", "3"], "foo: no such option"),
        (["--model.backbone.dim", "9"], "num_heads=2 must divide the width dim=9"),
        (["--trainer.max_epochs", "-5"], "max_epochs"),
        (["--trainer.max_epochs", "0"], "trainer.max_epochs 0: nothing would be trained"),
        (["--trainer.max_steps", "0"], "trainer.max_steps 0: nothing would be trained"),
        (["--trainer.limit_train_batches=0.0"], "trainer.limit_train_batches 0.0: nothing would be trained"),
        (["--trainer.limit_test_batches", "0.0"], "trainer.limit_test_batches 0.0: nothing would be tested"),
        (["--trainer.enable_checkpointing", "false"], "trainer.enable_checkpointing false: no weights would be kept"),
        (["--trainer.fast_dev_run", "true"], "trainer.fast_dev_run: it keeps no weights to test"),
    ],
)
def test_what_every_run_would_refuse_is_refused_first(argv, message, tiny, fail):
    assert message in fail("compare", "--config", tiny, "--normalizations", "Softmax,Sinkhorn", *argv)


def test_a_file_that_leaves_nothing_to_test_is_refused(tmp_path, fail):
    (tmp_path / "fast.yaml").write_text(yaml.safe_dump({**TINY, "trainer": {**TINY["trainer"], "fast_dev_run": 2}}))
    argv = ["compare", "--config", "fast.yaml", "--normalizations", "Softmax,Sinkhorn"]
    for more in ([], ["--dry-run"]):
        assert "trainer.fast_dev_run: it keeps no weights to test" in fail(*argv, *more)


def test_lines_for_another_machine_are_printed(tiny, run):
    printed = run(
        *("compare", "--config", tiny, "--normalizations", "Softmax,Sinkhorn", "--seeds", "0", "--dry-run"),
        *("--trainer.accelerator", "gpu", "--trainer.devices", "64"),
    )
    assert printed.count("python -m sinkformer_pl fit") == 2


@pytest.mark.parametrize("content", [b"", b'{"files": [', b"\xff\xfe"])
def test_a_damaged_record_beside_runs_is_named(content, tiny, tmp_path, fail, run):
    root = tmp_path / "runs/tiny-compare"
    root.mkdir(parents=True)
    (root / "comparison.json").write_bytes(content)
    argv = ["compare", "--config", tiny, "--normalizations", "Softmax,Sinkhorn", "--seeds", "0", "--dry-run"]
    assert len(run(*argv).splitlines()) == 2
    (root / "Softmax-seed0/version_0").mkdir(parents=True)
    assert "runs/tiny-compare/comparison.json: it is damaged" in fail(*argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--normalizations", "Softmax,Sinkhorn", "--seeds", "1,1"], "--seeds 1,1: a seed stands there twice"),
        (["--normalizations", "Softmax,Sinkhorn", "--seeds", "a"], "--seeds a: give whole numbers"),
        (["--normalizations", "Softmax,Sinkhorn", "--jobs", "0"], "--jobs 0: give 1 or more"),
        (
            ["--normalizations", "Softmax,Sinkhorn", "--data.seed", "1"],
            "--data.seed can't be given to compare: --seeds",
        ),
        (["--normalizations", "Softmax,Sinkhorn", "--model.normalization=Softmax"], "--normalizations names them"),
        (["--normalizations", "Softmax,Sinkhorn", "--name", "a/b"], "give the name of one folder"),
        (
            ["--normalizations", "Softmax,Sinkhorn", "--trainer.default_root_dir", "s3://a"],
            "kept on local file systems",
        ),
    ],
)
def test_wrong_arguments(argv, message, tiny, fail):
    assert message in fail("compare", "--config", tiny, *argv)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("Sinkhron", "Sinkhron: no class of this name; did you mean Sinkhorn?"),
        ("Sinkhorn(n_iters=2)", "--normalizations Sinkhorn(n_iters=2): Sinkhorn: n_iters counts half-steps"),
        ("Sinkhorn(iters=3)", "Sinkhorn has no argument iters; did you mean model.normalization.n_iters?"),
        ("Sparsemax(a=1)", "it takes none"),
        ("torch.nn.Linear", "torch.nn.Linear: this class is no AttentionNormalization"),
        ("nowhere.Norm", "nowhere.Norm: no class of this name: Python finds no module nowhere"),
    ],
)
def test_a_normalization_that_no_run_could_have(wrong, message, tiny, fail):
    for more in ([], ["--dry-run"]):
        assert message in fail("compare", "--config", tiny, "--normalizations", f"Softmax,{wrong}", *more)


def test_a_readout_that_doesnt_see_the_attention_is_warned_of_once(tiny, fail):
    argv = ["--normalizations", "Softmax,Sinkhorn,ReLU", "--model.backbone.pooling", "mean", "--metric", "test/nothing"]
    with pytest.warns(UserWarning, match="pooling=mean under Sinkhorn") as warned:
        assert "--metric test/nothing" in fail("compare", "--config", tiny, *argv)
    assert len(warned) == 1


def test_without_a_configuration(fail):
    assert "give --config FILE" in fail("compare", "--normalizations", "Softmax,Sinkhorn")
