"""The benchmark runs and its figures are what they say. Times themselves aren't tested."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from sinkformer_pl.benchmark import (
    SUITES,
    Case,
    Published,
    Times,
    busy_cores,
    compare_image_steps,
    compare_plans,
    compare_steps,
    counting,
    interleaved,
    measure,
    timing,
)
from sinkformer_pl.benchmark.memory import peak_bytes
from sinkformer_pl.cli import main
from sinkformer_pl.ops import sinkhorn_attention


@pytest.mark.parametrize("backend", ["auto", "streaming"])
def test_a_case(backend):
    result = measure(Case(2, 40, 30, 3, backend), repeats=3, device="cpu", dtype=torch.float32)
    assert result.quartiles[0] <= result.ratio <= result.quartiles[1]
    assert result.ratio == pytest.approx(result.sinkhorn_ms / result.softmax_ms, rel=1.0)
    assert result.counted > 0
    assert (result.dtype, result.peer, result.cudnn) == ("float32", "fused softmax", None)
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
    assert "dense, streaming, long, gpu, plans" in capsys.readouterr().err


def test_cores_are_kept_busy_for_as_long_as_it_takes(monkeypatch, capsys):
    with busy_cores(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
    assert all(process.poll() is not None for process in processes)
    monkeypatch.setitem(SUITES, "dense", [Case(2, 20, 20, 3)])
    threads, before = torch.get_num_threads(), os.times().children_user
    main(["benchmark", "--suites", "dense", "--repeats", "1", "--busy", "1", "--device", "cpu"])
    torch.set_num_threads(threads)
    assert "1 other busy processes" in capsys.readouterr().out
    assert os.times().children_user > before


def test_a_busy_process_ends_with_the_one_that_started_it():
    code = "import os; from sinkformer_pl.benchmark.busy import busy_cores; (busy := busy_cores(1)).__enter__(); "
    code += "os._exit(0)"  # The process that is left behind holds the pipe for as long as it runs.
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    try:
        parent.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)


def test_a_folder_without_the_published_code_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"models\.py"):
        Published(str(tmp_path))


PUBLISHED = {
    "layers": """
import torch
class SinkhornDistance(torch.nn.Module):
    def __init__(self, eps, max_iter, cost):
        super().__init__()
        self.max_iter, self.cost = max_iter, cost
    def forward(self, x, y):
        plan = (-self.cost(x, y)).exp()
        for step in range(self.max_iter):
            axis = -1 if step % 2 == 0 else -2
            plan = plan / plan.sum(axis, keepdim=True) / plan.shape[-2 if axis == -1 else -1]
        return plan, None, None, None
""",
    "modules": """
import torch
from torch import nn
def dotmat(x, y):
    return -x.bmm(y.transpose(1, 2))
class MABSINK(nn.Module):
    def __init__(self, dim_V, num_heads, sinkhorn):
        super().__init__()
        self.dim_V, self.num_heads, self.sinkhorn = dim_V, num_heads, sinkhorn
        self.fc_q, self.fc_k, self.fc_v, self.fc_o = (nn.Linear(dim_V, dim_V) for _ in range(4))
        self.ln0, self.ln1 = nn.LayerNorm(dim_V), nn.LayerNorm(dim_V)
    def forward(self, x, y):
        q, k, v = (torch.cat(t.chunk(self.num_heads, 2)) for t in (self.fc_q(x), self.fc_k(y), self.fc_v(y)))
        plan = self.sinkhorn(q / self.dim_V**0.25, k / self.dim_V**0.25)[0]
        x = self.ln0(torch.cat((q + plan.bmm(v)).chunk(self.num_heads), 2))
        return self.ln1(x + self.fc_o(x).relu())
""",
    "models": """
from torch import nn
from set_transformer.layers import SinkhornDistance
from set_transformer.modules import MABSINK, dotmat
class ModelNetSink(nn.Module):
    def __init__(self, dim_output, dim_hidden, num_heads, num_inds, n_it):
        super().__init__()
        self.embed, self.head = nn.Linear(3, dim_hidden), nn.Linear(dim_hidden, dim_output)
        self.block = MABSINK(dim_hidden, num_heads, SinkhornDistance(1, n_it, dotmat))
    def forward(self, x):
        x = self.embed(x)
        return self.head(self.block(x, x).mean(1))
""",
}
"""The layout and the names of the published code, in a few lines."""


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Make what stands for a checkout, with a word of one of its files in the place of another."""

    def make(old: str = "", new: str = "") -> Published:
        folder = tmp_path / "set_transformer/set_transformer"
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in PUBLISHED.items():
            (folder / f"{name}.py").write_text(text.replace(old, new) if old else text)
        for name in [name for name in sys.modules if name.partition(".")[0] == "set_transformer"]:
            monkeypatch.delitem(sys.modules, name)
        return Published(str(tmp_path))

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == "set_transformer"]:
        del sys.modules[name]


def test_the_published_network_is_timed_with_its_attention_and_with_ours(published):
    peer = published()
    q, k, v = (torch.randn(2, 9, 4, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(peer.attend(q, k, v, 3), sinkhorn_attention(q, k, v, n_iters=3))
    steps = compare_steps(batch=2, points=20, repeats=1, device="cpu", published=peer, n_iters=[3])
    assert [step.name for step in steps] == [
        "Softmax",
        "Sinkhorn(n_iters=3)",
        "published network, Softmax",
        "published network, its own attention, 3 half-steps",
        "published network, Sinkhorn(n_iters=3)",
    ]
    assert [step.ratio == 1.0 for step in steps] == [True, False, True, False, False]


def test_a_published_network_with_other_numbers_is_no_peer(published):
    with pytest.raises(RuntimeError, match="its numbers differ"):
        compare_steps(
            batch=2, points=20, repeats=1, device="cpu", published=published("fc_o(x).relu()", "fc_o(x)"), n_iters=[3]
        )


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_training_that_fails_is_named(capsys):
    argv = ["benchmark", "--training", "--device", "cpu", "--repeats", "1", "--batch", "2", "--points", "20"]
    config = Path(__file__).parents[2] / "configs/pointcloud.yaml"
    for fit, expected in (
        ("--config nowhere.yaml", "nowhere.yaml: no such file"),
        (f"--config {config} --trainer.limit_train_batches 0", "limit_train_batches 0: "),
    ):
        with pytest.raises(SystemExit):
            main([*argv, "--fit", fit])
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert expected in line


def test_a_gpu_that_is_not_there_is_one_line(no_cuda, capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", "--device", "cuda"])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --device cuda: ")


def test_short_calls_are_timed_in_a_row(monkeypatch):
    """As on a GPU, by another timer: a call of 6 ms is made four times a repeat."""
    rows = []

    def by_events(function, calls):
        rows.append(calls)
        function()
        return 0.006

    monkeypatch.setattr(timing, "_by_events", by_events)
    made = []
    times = interleaved({"a": lambda: made.append(1)}, repeats=2, device="cuda")
    assert rows == [1, 4, 4]
    assert times["a"].seconds == [0.006, 0.006]


@pytest.mark.parametrize(
    ("shape", "products", "exponentials"),
    [((256, 256, 3), 9, 5), ((16, 1000, 3), 9, 4), ((4096, 4096, 3), 13, 7), ((4096, 4096, 1), 7, 2)],
)
def test_operations_are_counted_by_the_form_that_a_shape_takes(shape, products, exponentials):
    assert counting.sinkhorn(*shape) == (products, exponentials)
    # Each further pair of half-steps costs both passes as much again.
    queries, keys, n_iters = shape
    more = counting.sinkhorn(queries, keys, n_iters + 2) if n_iters > 1 else None
    pair = 2 if min(queries, keys) <= 256 else 4
    assert more is None or more == (products + pair, exponentials + pair)


def test_steps_of_images_and_half_precision():
    shared = {"repeats": 1, "device": "cpu", "dtype": torch.bfloat16, "n_iters": [3]}
    steps = compare_image_steps(batch=1, size=32, **shared)
    assert [step.name for step in steps] == ["Softmax", "Sinkhorn(n_iters=3)"]
    assert steps[0].ratio == 1.0 != steps[1].ratio


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_case_on_a_gpu(cuda, dtype):
    result = measure(Case(16, 65, 65, 3), repeats=2, device="cuda", dtype=dtype)
    assert result.peer == ("flash" if dtype == torch.bfloat16 else "fused softmax")
    assert result.device == torch.cuda.get_device_name()
    assert 0 < result.softmax_counted < result.counted
