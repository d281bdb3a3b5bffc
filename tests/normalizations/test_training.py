"""Every registered normalization in training: the loss falls, on one process and on two, in mixed precision."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sinkformer_pl.batch import Batch
from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.models import SetTransformer
from sinkformer_pl.normalizations import registered
from tests.commands import SERVER

SMALL = {"train_size": 48, "val_size": 24, "test_size": 24, "min_points": 12, "max_points": 32}
LEARNED = {
    "Entmax": {"learned": True},
    "SemiUnbalancedSinkhorn": {"learned": True},
}


def network(name: str, **options) -> nn.Module:
    """A classifier of sets that attend to themselves, which every normalization can do."""
    torch.manual_seed(0)
    arguments = LEARNED.get(name, {})
    backbone = SetTransformer(
        lambda: registered()[name](**arguments), dim=16, num_heads=2, depth=1, inducing_points=0, **options
    )
    return nn.ModuleDict({"backbone": backbone, "head": nn.Linear(16, 12)})


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    parts = model.module if isinstance(model, DistributedDataParallel) else model
    return nn.functional.cross_entropy(parts["head"](parts["backbone"](batch.inputs, batch.mask)), batch.target)


@pytest.fixture(scope="module")
def batch() -> Batch:
    data = ProceduralShapes(**SMALL, batch_size=32)
    data.setup()
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize("name", list(registered()))
def test_the_loss_falls(name, batch):
    model = network(name, temperature="learned")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    start = {key: value.clone() for key, value in model.named_parameters()}
    losses = []
    for step in range(40):
        with torch.autocast("cpu", torch.bfloat16, enabled=step % 2 == 1):
            value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.75 * losses[0], losses
    still = [key for key, value in model.named_parameters() if torch.equal(value, start[key])]
    # One seed pools, so the pooling has parameters that cancel in its softmax.
    assert [key for key in still if "blocks" in key and not key.endswith("key.bias")] == []


class _Both(nn.Module):
    def __init__(self, parts: nn.Module) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.parts["head"](self.parts["backbone"](inputs, mask))


def _train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    data = ProceduralShapes(**SMALL, batch_size=8)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    mine = slice(4 * rank, 4 * rank + 4)
    for name in registered():
        model = DistributedDataParallel(_Both(network(name, temperature="learned")))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):  # a parameter without a gradient would stop the second step
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                output = model(batch.inputs[mine], batch.mask[mine])
                nn.functional.cross_entropy(output, batch.target[mine]).backward()
            optimizer.step()
        state = torch.cat([value.flatten() for value in model.state_dict().values()])
        others = [torch.empty_like(state) for _ in range(2)]
        dist.all_gather(others, state)
        assert state.isfinite().all(), name
        assert torch.equal(*others), name
    Path(folder, f"done{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_in_mixed_precision_stay_the_same(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.start_processes(_train, args=(str(tmp_path),), nprocs=2, start_method=SERVER.get_start_method())
    assert (tmp_path / "done0").exists()
    assert (tmp_path / "done1").exists()
