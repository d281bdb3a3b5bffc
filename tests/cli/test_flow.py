"""The flow command: what it writes, and what it refuses."""

import csv
from pathlib import Path

import pytest

CONFIG = str(Path(__file__).parents[2] / "configs/flow.yaml")
FAST = [
    *("--flow.particles", "10", "--flow.steps", "20", "--flow.time", "0.1"),
    *("--heat.particles", "[20, 40]", "--heat.epsilons", "[0.2, 0.4]", "--heat.drift_epsilons", "[0.2, 0.4]"),
    *("--heat.time", "0.2"),
]


def test_it_writes_tables_and_pictures(run, tmp_path):
    printed = run("flow", "--config", CONFIG, *FAST)
    folder = tmp_path / "runs/flow"
    assert {path.name for path in folder.iterdir()} == {
        *("trajectories.png", "energies.png", "heat.png", "flow.csv", "heat.csv", "flow.md")
    }
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    rows = {row["kernel"]: row for row in csv.DictReader((folder / "flow.csv").open())}
    assert float(rows["softmax"]["jacobian asymmetry"]) > 1e-2
    assert max(float(rows[kernel]["jacobian asymmetry"]) for kernel in ("exponential", "sinkhorn")) < 1e-6
    assert float(rows["sinkhorn"]["column error"]) < 1e-10
    heat = list(csv.DictReader((folder / "heat.csv").open()))
    assert {(row["what"], row["particles"]) for row in heat} >= {
        ("drift", ""),
        ("particles", "20"),
        ("particles", "40"),
    }
    assert "python -m sinkformer_pl flow --config" in (folder / "flow.md").read_text()
    assert "Jacobian asymmetry" in printed
    assert str(Path("runs/flow/heat.png")) in printed


def test_the_resolved_settings_are_those_of_a_run(run, tmp_path):
    printed = run("flow", "--config", CONFIG, *FAST, "--print_config")
    (tmp_path / "again.yaml").write_text(printed)
    assert "particles: 10" in printed
    assert run("flow", "--config", "again.yaml", "--print_config") == printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--flow.partcles", "3"], "no such option; did you mean flow.particles?"),
        (["--flow.particles", "many"], "expected a whole number"),
        (["--flow.particles", "0"], "flow.particles must be at least"),
        (["--flow.epsilon", "0"], "epsilon must be positive"),
        (["--flow.cost", "l1"], "one of dot, l2"),
        (["--flow.key", "[[1, 2, 3]]"], "flow.key must be a list of rows of 2 numbers"),
        (["--flow.key", "[[0, 1], [0, 0]]"], "must be symmetric"),
        (["--heat.epsilons", "[0]"], "positive"),
        (["--heat.epsilons", "0.1"], "heat.epsilons 0.1: expected a list, such as [1, 2]"),
        (["--heat.particles", "50"], "heat.particles 50: expected a list, such as [1, 2]"),
        (["--flow.value", "abc"], "flow.value abc: expected a list, such as [1, 2] or null"),
        (["--flow", "3"], "flow 3: expected settings, such as flow.particles"),
        (["--heat", "[1]"], "heat [1]: expected settings, such as heat.std"),
        (["--seed", "-1"], "give a whole number from 0"),
        (["--config", "nowhere.yaml"], "no such file"),
    ],
)
def test_wrong_arguments(argv, message, fail):
    assert message in fail("flow", *argv)


def test_a_wrong_key_in_a_file_is_named_with_the_file(fail, tmp_path):
    (tmp_path / "wrong.yaml").write_text("flow:\n  epsilom: 1\n")
    message = fail("flow", "--config", "wrong.yaml")
    assert "wrong.yaml" in message
    assert "did you mean flow.epsilon?" in message
