"""Measure a training step under Sinkhorn beside Softmax, and how long a training waits for its data."""

import csv
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

from sinkformer_pl.benchmark.published import Published, softmax_attention
from sinkformer_pl.benchmark.timing import interleaved
from sinkformer_pl.errors import UserError
from sinkformer_pl.models import Backbone, SetTransformer, VisionTransformer
from sinkformer_pl.normalizations import NormalizationFactory, Sinkhorn, Softmax
from sinkformer_pl.ops import sinkhorn_attention

CLASSES = 40
WIDTH, HEADS, INDUCING = 256, 4, 16


@dataclass(frozen=True)
class Step:
    """One training step: forward, backward, Adam.

    Attributes:
        name: of the network, and of what its attention is.
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
    dtype: torch.dtype = torch.float32,
    published: Published | None = None,
    n_iters: Sequence[int] = (3, 21),
) -> list[Step]:
    """Time steps of a network for ModelNet40 (Set Transformer, width 256, 4 heads, 16 inducing points).

    Args:
        batch: clouds in a batch.
        points: points of each.
        repeats: interleaved repeats.
        device: "cpu" or "cuda".
        dtype: float32, or that of autocast.
        published: the published code. Its network of these sizes, which also pools under Sinkhorn, is then timed on
            the same batch with fused softmax attention, with its own attention and with ours.
        n_iters: half-steps.
    """
    backbone = partial(
        SetTransformer, dim=WIDTH, num_heads=HEADS, inducing_points=INDUCING, layer_norm="post", pool_dropout=0.5
    )
    groups = [_ours(backbone, n_iters)]
    if published is not None:
        groups.append(_theirs(published, n_iters))
    return _compare(groups, (batch, points, 3), repeats=repeats, device=device, dtype=dtype)


def compare_image_steps(
    *,
    batch: int,
    size: int = 224,
    repeats: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    n_iters: Sequence[int] = (3, 21),
) -> list[Step]:
    """Time steps of ViT-S/16: 384 wide, 12 blocks, 6 heads, patches of 16 x 16.

    Args:
        batch: images in a batch.
        size: their side in pixels, a multiple of 16; at 224 they are 197 tokens.
        repeats: interleaved repeats.
        device: "cpu" or "cuda".
        dtype: float32, or that of autocast.
        n_iters: half-steps.
    """
    backbone = partial(VisionTransformer, image_size=size, patch_size=16, dim=384, num_heads=6, depth=12)
    groups = [_ours(backbone, n_iters)]
    return _compare(groups, (batch, 3, size, size), repeats=repeats, device=device, dtype=dtype)


def _compare(
    groups: Sequence[dict[str, nn.Module]], shape: tuple[int, ...], *, repeats: int, device: str, dtype: torch.dtype
) -> list[Step]:
    """Time networks on inputs of a shape; the first of each group is its base."""
    torch.manual_seed(0)
    inputs = torch.randn(shape, device=device)
    target = torch.randint(CLASSES, shape[:1], device=device)
    found = []
    for networks in groups:
        steps = {name: _step(network.to(device), inputs, target, dtype) for name, network in networks.items()}
        times = interleaved(steps, repeats=repeats, device=device)
        base = next(iter(times.values()))
        for name, measured in times.items():
            ratio, low, high = measured.ratio_to(base)
            found.append(Step(name, 1e3 * measured.median, ratio, (low, high)))
    return found


def _ours(backbone: Callable[[NormalizationFactory], Backbone], n_iters: Sequence[int]) -> dict[str, nn.Module]:
    """Make our network, Softmax first."""

    def network(normalization: NormalizationFactory) -> nn.Module:
        made = backbone(normalization)
        return nn.Sequential(made, nn.Linear(made.out_dim, CLASSES))

    return {"Softmax": network(Softmax)} | {
        f"Sinkhorn(n_iters={n})": network(partial(Sinkhorn, n_iters=n)) for n in n_iters
    }


def _theirs(published: Published, n_iters: Sequence[int]) -> dict[str, nn.Module]:
    """Make the published network, fused softmax attention first."""
    network = partial(published.network, width=WIDTH, heads=HEADS, inducing=INDUCING, classes=CLASSES)
    networks = {"published network, Softmax": network(attend=softmax_attention)}
    for n in n_iters:

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, n_iters: int = n) -> Tensor:
            return sinkhorn_attention(q, k, v, n_iters=n_iters, scale=scale)

        networks[f"published network, its own attention, {n} half-steps"] = network(n_iters=n)
        networks[f"published network, Sinkhorn(n_iters={n})"] = network(attend=attend)
    return networks


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


def _step(network: nn.Module, inputs: Tensor, target: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=inputs.is_cuda or None)
    autocast = torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def step() -> None:
        optimizer.zero_grad()
        with autocast:
            loss = F.cross_entropy(network(inputs), target)
        loss.backward()
        optimizer.step()

    return step
