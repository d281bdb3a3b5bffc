"""What a training step costs under Sinkhorn beside Softmax, and how long a training waits for its data."""

import csv
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's own documentation uses)
from torch import Tensor, nn

from sinkformer_pl.benchmark.timing import interleaved
from sinkformer_pl.errors import UserError
from sinkformer_pl.models import SetTransformer
from sinkformer_pl.normalizations import NormalizationFactory, Sinkhorn, Softmax

CLASSES = 40
WIDTH, HEADS, INDUCING = 256, 4, 16


@dataclass(frozen=True)
class Step:
    """One training step: forward, backward, Adam.

    Attributes:
        name: of the network.
        ms: median, in milliseconds.
        ratio: to the same network under Softmax in the same repeat, median.
        quartiles: of the ratio.
    """

    name: str
    ms: float
    ratio: float
    quartiles: tuple[float, float]


def compare_steps(
    *,
    batch: int,
    points: int,
    repeats: int,
    device: str,
    published: str | None = None,
    n_iters: Sequence[int] = (3, 21),
) -> list[Step]:
    """Time steps of the published ModelNet40 network (Set Transformer, width 256, 4 heads, 16 inducing points), fp32.

    Args:
        batch: clouds in a batch.
        points: points of each.
        repeats: interleaved repeats.
        device: "cpu" or "cuda".
        published: folder of a checkout of github.com/michaelsdr/sinkformers, whose own network is timed on the same
            batch then: it has one layer in each row-wise network where ours has two, and pools under Sinkhorn.
        n_iters: half-steps.

    Raises:
        UserError: the folder holds no such checkout.
    """
    torch.manual_seed(0)
    inputs = torch.randn(batch, points, 3, device=device)
    target = torch.randint(CLASSES, (batch,), device=device)

    def ours(normalization: NormalizationFactory) -> nn.Module:
        backbone = SetTransformer(
            normalization,
            dim=WIDTH,
            num_heads=HEADS,
            inducing_points=INDUCING,
            layer_norm="post",
            pool_dropout=0.5,
        )
        return nn.Sequential(backbone, nn.Linear(WIDTH, CLASSES))

    networks = {"Softmax": ours(Softmax)}
    networks |= {f"Sinkhorn(n_iters={n})": ours(partial(Sinkhorn, n_iters=n)) for n in n_iters}
    if published is not None:
        make = _published_network(published)
        networks |= {f"published code, {n} half-steps": make(n) for n in n_iters}
    steps = {name: _step(network.to(device), inputs, target) for name, network in networks.items()}
    times = interleaved(steps, repeats=repeats, device=device)
    found = []
    for name, measured in times.items():
        ratio, low, high = measured.ratio_to(times["Softmax"])
        found.append(Step(name, 1e3 * measured.median, ratio, (low, high)))
    return found


@dataclass(frozen=True)
class Waiting:
    """One epoch of a training, the second.

    Attributes:
        arguments: of `fit`.
        workers: loader processes.
        ms: of a step, median.
        share: of the time of all steps that went by before a batch was there.
    """

    arguments: str
    workers: int
    ms: float
    share: float


def measure_waiting(arguments: Sequence[str], *, workers: int) -> Waiting:
    """Train two epochs in a process of its own, and read what it says of its steps.

    Args:
        arguments: of `fit`.
        workers: loader processes.

    Raises:
        UserError: the training fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        short = ["--trainer.max_epochs", "2", "--trainer.limit_val_batches", "1", "--trainer.logger", "false"]
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false"]
        place = ["--trainer.default_root_dir", folder, "--name", "waiting", "--data.num_workers", str(workers)]
        command = [sys.executable, "-m", "sinkformer_pl", "fit", *arguments, *short, *quiet, *place]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no output"]
            raise UserError(f"fit {' '.join(arguments)}: {lines[-1].removeprefix('error: ')}")
        with (Path(folder) / "waiting/version_0/costs.csv").open(newline="", encoding="utf-8") as file:
            row = list(csv.DictReader(file))[-1]
    return Waiting(" ".join(arguments), workers, 1e3 * float(row["seconds_per_step"]), float(row["waiting"]))


def _step(network: nn.Module, inputs: Tensor, target: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), target).backward()
        optimizer.step()

    return step


def _published_network(folder: str) -> Callable[[int], nn.Module]:
    path = Path(folder) / "set_transformer"
    if not (path / "set_transformer/models.py").is_file():
        raise UserError(
            f"--published {folder}: no set_transformer/set_transformer/models.py in it; clone sinkformers there"
        )
    sys.path.insert(0, str(path))
    try:
        models = importlib.import_module("set_transformer.models")
    finally:
        sys.path.remove(str(path))
    return lambda n: models.ModelNetSink(dim_hidden=WIDTH, num_heads=HEADS, num_inds=INDUCING, n_it=n)
