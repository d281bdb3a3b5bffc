"""What is read off the folder of a run, whole or damaged."""

import json

import pytest

from sinkformer_pl.comparison import Arm, Trial, read_result
from sinkformer_pl.errors import UserError

FIT = {"epochs": 2, "resumed": [], "best": {"val/accuracy": 0.5}}
TEST = {"metrics": {"test/accuracy": 0.75}}
COSTS = "epoch,steps,seconds_per_step,waiting,peak_mb\n0,3,0.25,0.1,800\n1,3,0.75,0.3,900\n"
CURVES = "epoch,step,train/loss,val/accuracy\n0,2,,0.5\n0,2,2.5,\n"
DAMAGED = (b"", b'{"metrics": {"te', b"[]", b"{}", b"\xff\xfe")


@pytest.fixture
def trial(tmp_path):
    return Trial(Arm("Softmax"), 0, tmp_path, ())


@pytest.fixture
def folder(trial):
    """Of a run that is done."""
    folder = trial.root / trial.name / "version_0"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("best", "last"):
        (folder / f"checkpoints/{name}.ckpt").touch()
    (folder / "fit.json").write_text(json.dumps(FIT))
    (folder / "test.json").write_text(json.dumps(TEST))
    (folder / "costs.csv").write_text(COSTS)
    (folder / "metrics.csv").write_text(CURVES)
    return folder


def left(trial):
    """The commands that are left, and whether each starts from a checkpoint."""
    return [(command[0], command[-1] if "--ckpt_path" in command else None) for command in trial.commands()]


def test_a_run_that_is_done(trial, folder):
    result = read_result(trial)
    assert (result.status, result.metrics, result.best) == ("done", TEST["metrics"], FIT["best"])
    assert (result.seconds_per_step, result.waiting, result.peak_mb) == (0.5, pytest.approx(0.2), 900)
    assert (result.curves["train/loss"], result.curves["val/accuracy"]) == ({0: 2.5}, {0: 0.5})
    assert left(trial) == []


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_record_of_the_test_is_made_again(damaged, trial, folder):
    (folder / "test.json").write_bytes(damaged)
    assert read_result(trial).status == "unfinished"
    assert left(trial) == [("test", "best")]


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_record_of_the_training_is_made_again(damaged, trial, folder):
    (folder / "fit.json").write_bytes(damaged)
    assert read_result(trial).status == "unfinished"
    assert left(trial) == [("fit", "last"), ("test", "best")]


def test_weights_that_are_gone_are_trained_again_where_a_test_needs_them(trial, folder):
    (folder / "checkpoints/best.ckpt").unlink()
    assert left(trial) == []
    (folder / "test.json").unlink()
    # Its last.ckpt is at the end of the training, from where nothing would be written.
    assert left(trial) == [("fit", None), ("test", "best")]
    again = folder.with_name("version_1") / "checkpoints"
    again.mkdir(parents=True)
    (again / "last.ckpt").touch()
    assert left(trial) == [("fit", "last"), ("test", "best")]


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("costs.csv", b"\xff\xfe"),
        ("costs.csv", COSTS.encode()[:-8]),
        ("costs.csv", b"epoch,steps\n0,3\n"),
        ("costs.csv", COSTS.encode().replace(b"0.75", b"fast")),
        ("metrics.csv", b"\xff\xfe"),
        ("metrics.csv", CURVES.encode().replace(b"2.5", b"low")),
    ],
)
def test_a_damaged_table_is_named(name, damaged, trial, folder):
    (folder / name).write_bytes(damaged)
    with pytest.raises(UserError, match=rf"{folder / name}: it is damaged \(.*\); delete it") as error:
        read_result(trial)
    assert "\n" not in str(error.value)
    (folder / name).unlink()
    assert read_result(trial).metrics == TEST["metrics"]
