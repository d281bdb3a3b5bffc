"""The benchmark runs and its figures are what they say. Times themselves aren't tested."""

import json
from pathlib import Path

import pytest
import torch

from sinkformer_pl.benchmark import SUITES, Case, Times, compare_plans, interleaved, measure, published_step
from sinkformer_pl.benchmark.memory import peak_bytes
from sinkformer_pl.cli import main


@pytest.mark.parametrize("backend", ["auto", "streaming"])
def test_a_case(backend):
    result = measure(Case(2, 40, 30, 3, backend), repeats=3, device="cpu", dtype=torch.float32)
    assert result.quartiles[0] <= result.ratio <= result.quartiles[1]
    assert result.ratio == pytest.approx(result.sinkhorn_ms / result.softmax_ms, rel=1.0)
    assert result.counted > 0
    assert json.loads(json.dumps(result.as_row()))["case"]["queries"] == 40


def test_ratios_are_taken_repeat_by_repeat():
    assert Times([1.0, 4.0, 9.0]).ratio_to(Times([1.0, 2.0, 3.0]))[0] == 2.0


def test_runs_are_interleaved_after_a_warm_up():
    order = []
    times = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, repeats=2, device="cpu")
    assert order == ["a", "b"] * 3
    assert [len(times[name].seconds) for name in "ab"] == [2, 2]


def test_peak_memory_sees_what_is_gone_again():
    peak = peak_bytes(lambda: torch.ones(50_000_000).sum(), device="cpu")
    assert peak is None or 150e6 < peak < 400e6


def test_streaming_takes_no_quadratic_memory():
    case = Case(1, 4096, 4096, 3, "streaming")
    result = measure(case, repeats=1, device="cpu", dtype=torch.float32)
    assert result.peak_mb is None or result.peak_mb < 40 < 4096**2 * 4 / 1e6


def test_plans_of_other_libraries():
    plans = compare_plans(points=50, n_iters=3, repeats=1)
    assert {"sinkformer_pl", "POT (sinkhorn_log)"} <= plans.keys()


def test_the_command_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SUITES, "dense", [Case(2, 20, 20, 3)])
    before = torch.get_num_threads()
    main(["benchmark", "--suites", "dense", "--repeats", "2", "--threads", "1", "--json", str(tmp_path / "out.json")])
    torch.set_num_threads(before)
    assert "20 x 20" in capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["dense"][0]["case"]["n_iters"] == 3
    with pytest.raises(SystemExit):
        main(["benchmark", "--suites", "nothing"])
    assert "dense, streaming, long, plans" in capsys.readouterr().err


def test_a_folder_without_the_published_code_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"layers\.py"):
        published_step(str(tmp_path))


def test_training_steps_and_the_wait_for_data(tmp_path, capsys, monkeypatch):
    config = Path(__file__).parents[2] / "configs/pointcloud.yaml"
    small = (
        "--data.train_size 32 --data.val_size 12 --data.batch_size 8 --model.backbone.dim 8 --trainer.accelerator cpu"
    )
    argv = ["benchmark", "--training", "--device", "cpu", "--repeats", "2", "--threads", "1", "--batch", "2"]
    record = tmp_path / "record.json"
    main([*argv, "--points", "20", "--fit", f"--config {config} {small}", "--json", str(record)])
    content = json.loads(record.read_text())
    assert [step["name"] for step in content["steps"]] == ["Softmax", "Sinkhorn(n_iters=3)", "Sinkhorn(n_iters=21)"]
    assert content["steps"][0]["ratio"] == 1.0
    assert [waiting["workers"] for waiting in content["waiting"]] == [0, 2]
    assert all(0 < waiting["share"] < 1 and waiting["ms"] > 0 for waiting in content["waiting"])
    assert "dense" not in content
    assert "waiting for data" in capsys.readouterr().out


def test_a_training_that_fails_is_named(capsys):
    argv = ["benchmark", "--training", "--device", "cpu", "--repeats", "1", "--batch", "2", "--points", "20"]
    with pytest.raises(SystemExit):
        main([*argv, "--fit", "--config nowhere.yaml"])
    assert "fit --config nowhere.yaml: --config nowhere.yaml: no such file" in capsys.readouterr().err
