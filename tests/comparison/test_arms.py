"""Normalizations as they are written on the command line."""

from pathlib import Path

import pytest

from sinkformer_pl.cli import main
from sinkformer_pl.comparison import Arm, read_arms
from sinkformer_pl.errors import UserError

CONFIG = Path(__file__).parents[2] / "configs/pointcloud.yaml"
CONFIGURED = {"class_path": "Sinkhorn", "init_args": {"n_iters": 9}}


def test_names_arguments_and_dotted_paths():
    arms = read_arms("Softmax, Sinkhorn(n_iters=21),sinkformer_pl.normalizations.Sparsemax", {})
    assert arms == [Arm("Softmax"), Arm("Sinkhorn", {"n_iters": 21}), Arm("sinkformer_pl.normalizations.Sparsemax")]
    assert [arm.label for arm in arms] == ["Softmax", "Sinkhorn(n_iters=21)", "Sparsemax"]
    assert arms[1].flags() == ["--model.normalization", "Sinkhorn", "--model.normalization.n_iters", "21"]


@pytest.mark.parametrize(
    "configured", [CONFIGURED, {**CONFIGURED, "class_path": "sinkformer_pl.normalizations.Sinkhorn"}]
)
def test_one_without_arguments_has_those_of_the_configuration(configured):
    softmax, sinkhorn = read_arms("Softmax,Sinkhorn", configured)
    assert (softmax.arguments, sinkhorn.arguments) == ({}, {"n_iters": 9})
    _, sinkhorn = read_arms("Softmax,Sinkhorn(n_iters=3)", configured)
    assert sinkhorn.arguments == {"n_iters": 3}


@pytest.mark.parametrize(
    ("text", "trained"),
    [
        ("SemiUnbalancedSinkhorn(rho=inf)", "SemiUnbalancedSinkhorn(rho=inf, "),
        ("SemiUnbalancedSinkhorn(rho=1e-3, learned=true)", "SemiUnbalancedSinkhorn(rho=0.001, learned=True, "),
        ("ScalableSoftmax(learned=False)", "ScalableSoftmax(s=0.43, learned=False)"),
        ("sinkformer_pl.normalizations.Sinkhorn(n_iters=5)", "Sinkhorn(n_iters=5)"),
    ],
)
def test_the_flags_of_an_arm_train_it(text, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, arm = read_arms(f"Softmax,{text}", {})
    small = ["--data.train_size", "12", "--data.val_size", "12", "--data.test_size", "12", "--model.backbone.dim", "8"]
    fast = ["--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"]
    main(["fit", "--config", str(CONFIG), *small, *fast, *arm.flags()])
    assert f"training under {trained}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Softmax", "give two or more"),
        ("Softmax,Softmax", "Softmax stands there twice"),
        ("Softmax,Sinkhorn,Sinkhorn(n_iters=9)", r"Sinkhorn\(n_iters=9\) stands there twice"),
        ("Softmax,Sinkhorn(3)", "expected names with commas"),
        ("Softmax,Sinkhorn(n_iters", "expected names with commas"),
        ("Softmax] + [Sinkhorn", "expected names with commas"),
        ("Softmax,Sinkhorn(**a)", "expected names with commas"),
        ("", "give two or more"),
    ],
)
def test_what_cant_be_compared(text, message):
    with pytest.raises(UserError, match=message):
        read_arms(text, CONFIGURED)
