"""Every registered normalization by its name on the command line."""

import json

import pytest

from sinkformer_pl.normalizations import registered

SQUARE = [name for name, cls in registered().items() if cls.requires_square]


@pytest.mark.parametrize("name", list(registered()))
def test_each_is_trained_and_tested_by_its_name(name, tiny, run, tmp_path):
    inducing = "0" if name in SQUARE else "4"
    arguments = ["--model.normalization", name, "--model.backbone.inducing_points", inducing]
    printed = run("fit", "--config", tiny, *arguments)
    assert f"training under {name}" in printed
    run("test", "--ckpt_path", "best", "--name", "tiny")
    assert json.loads((tmp_path / "runs/tiny/version_0/test.json").read_text())["metrics"]["test/loss"] < 4


@pytest.mark.parametrize("name", SQUARE)
def test_those_that_need_square_scores_are_refused_under_inducing_points(name, tiny, fail):
    message = fail("fit", "--config", tiny, "--model.normalization", name)
    assert f"{name} needs as many queries as keys; use inducing_points=0" in message


def test_some_need_square_scores():
    assert {"SlicedTransport", "SymmetricSinkhorn"} <= set(SQUARE)


def test_a_learned_temperature_from_the_command_line(tiny, run):
    printed = run("fit", "--config", tiny, "--model.backbone.temperature", "learned")
    assert "training under Sinkhorn" in printed
