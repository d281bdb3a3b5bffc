"""A run of version 0.1.0 (commit 88b9103) is tested, evaluated and resumed as by that version.

`run_of_0.1.0.tar.gz` has `run.yaml`; `before`, the folder of its run, stopped by SIGTERM in the second of three
epochs; `after`, what that version made of it by `fit --ckpt_path last`, and by evaluating best.ckpt.
Its network has a learned temperature under a learned SemiUnbalancedSinkhorn, so that the order of parameters, by which
an optimizer's state is kept, counts. Numbers are compared to rounding, which is another on other machines;
`OLDER_RUNS_EXACT=1` compares every bit.
"""

import csv
import json
import os
import re
import tarfile
from pathlib import Path

import pytest
import torch

from sinkformer_pl.cli import main
from sinkformer_pl.factories import with_defaults
from sinkformer_pl.tasks import Classifier
from sinkformer_pl.tasks.protocol import saved_arguments
from sinkformer_pl.training.checkpoint_content import learnt_from

EXACT = bool(os.environ.get("OLDER_RUNS_EXACT"))
CLOSE = {"rtol": 0, "atol": 0} if EXACT else {"rtol": 1e-4, "atol": 1e-5}


def close(one: object, other: object, place: str = "") -> None:
    """Compare nested plain data and tensors."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key, value in one.items():
            close(value, other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            close(a, b, f"{place}.{number}")
    elif isinstance(one, torch.Tensor):
        # Under rows that sum to 1 the gradient of a key's bias is 0: AdamW steps by what rounding leaves of it.
        bound = CLOSE | {"atol": 1e-3} if place.endswith("attention.key.bias") and not EXACT else CLOSE
        torch.testing.assert_close(one, other, **bound, msg=lambda text: f"{place}: {text}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=CLOSE["rtol"], abs=CLOSE["atol"]), place
    else:
        assert one == other, place


def numbers(path: Path) -> list[dict[str, object]]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) if re.fullmatch(r"[\d.]+(e-\d+)?", v) else v for k, v in row.items()} for row in rows]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The run's folder, resumed and evaluated by the present version, and what version 0.1.0 made of it."""
    root = tmp_path_factory.mktemp("older")
    with tarfile.open(Path(__file__).parent / "run_of_0.1.0.tar.gz") as archive:
        archive.extractall(root, filter="data")
    folder = root / "runs/older/version_0"
    folder.parent.mkdir(parents=True)
    (root / "before").rename(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        main(["fit", "--config", "run.yaml", "--ckpt_path", "last"])
        for command in ("validate", "test", "predict"):
            main([command, "--ckpt_path", "best", "--name", "older"])
    return folder, root / "after"


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_it_is_resumed_to_the_same_weights_and_state(resumed, name):
    now, then = (torch.load(folder / "checkpoints" / name, weights_only=True) for folder in resumed)
    for content in (now, then):
        content.pop("sinkformer_pl_config")  # may have new keys
        content.pop("callbacks")  # has paths
        # In the state of the data now, which may be that of the old best.ckpt still.
        classes = learnt_from(content)["classes"]
        for key in ("sinkformer_pl_classes", "ProceduralShapes"):
            content.pop(key, None)
        content["classes"] = classes
        # The position alone: random states are those of the generators, which Lightning's own draws enter.
        content["loops"] = content["loops"]["fit_loop"]["epoch_progress"]
        # The core of attention holds these now; best.ckpt may still be the old file.
        content["state_dict"] = {
            re.sub(r"\.attention\.(log_temperature|normalization)\b", r".attention.core.\1", key): value
            for key, value in content["state_dict"].items()
        }
        content["hyper_parameters"] = with_defaults(saved_arguments(content, Classifier), Classifier)
        # Of the schedule's state the rates and the steps behind them.
        content.pop("sinkformer_pl_steps", None)
        [schedule] = content["lr_schedulers"]
        content["lr_schedulers"] = [{key: schedule[key] for key in ("last_epoch", "_step_count", "_last_lr")}]
    close(then, now)


def test_its_log_is_continued(resumed):
    now, then = (folder / "metrics.csv" for folder in resumed)
    close(numbers(then), numbers(now))
    if EXACT:
        assert now.read_text() == then.read_text()


@pytest.mark.parametrize("name", ["validate.json", "test.json"])
def test_its_metrics_are_the_same(resumed, name):
    now, then = (json.loads((folder / name).read_text()) for folder in resumed)
    close(then, now)


def test_its_predictions_are_the_same(resumed):
    now, then = (numbers(folder / "predictions.csv") for folder in resumed)
    close(then, now)


def test_old_names_are_there_with_a_word():
    with pytest.warns(FutureWarning, match=r"sinkformer_pl\.checkpoints will go"):
        from sinkformer_pl.checkpoints import read_checkpoint
    from sinkformer_pl.checkpoints.plugin import VerifiedCheckpointIO
    from sinkformer_pl.training import checkpoint_file, checkpoint_io

    assert read_checkpoint is checkpoint_file.read_checkpoint
    assert VerifiedCheckpointIO is checkpoint_io.VerifiedCheckpointIO
    with pytest.warns(FutureWarning, match=r"sinkformer_pl\.runs will go"):
        from sinkformer_pl.runs import StepCosts
    assert StepCosts.__module__ == "sinkformer_pl.training.costs_csv"
