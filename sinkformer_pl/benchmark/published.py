"""A checkout of the published Sinkformer code, to be run beside ours."""

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's own documentation uses)
from torch import Tensor, nn

from sinkformer_pl.errors import UserError

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""Attention of q, k, v (B, H, ., D) whose scores are multiplied by a scale; rows of the weights sum to 1."""


class Published:
    """Its attention, and its network for ModelNet40 with its own attention or another in it.

    Args:
        folder: a checkout of github.com/michaelsdr/sinkformers.

    Raises:
        UserError: the folder holds no such checkout.
    """

    def __init__(self, folder: str) -> None:
        path = Path(folder) / "set_transformer"
        if not (path / "set_transformer/models.py").is_file():
            raise UserError(
                f"--published {folder}: no set_transformer/set_transformer/models.py in it; clone sinkformers there"
            )
        sys.path.insert(0, str(path))
        try:
            self._layers, self._modules, self._models = (
                importlib.import_module(f"set_transformer.{name}") for name in ("layers", "modules", "models")
            )
        finally:
            sys.path.remove(str(path))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, n_iters: int) -> Tensor:
        """Compute its attention of q (B, Q, D), k and v (B, K, D), with the factor Q that it lacks."""
        root = q.shape[-1] ** 0.25
        plan = self._layers.SinkhornDistance(eps=1, max_iter=n_iters, cost=self._modules.dotmat)(q / root, k / root)[0]
        return q.shape[-2] * plan.bmm(v)

    def network(
        self, *, width: int, heads: int, inducing: int, classes: int, n_iters: int = 1, attend: Attend | None = None
    ) -> nn.Module:
        """Make its network of points (B, N, 3), logits (B, classes).

        Args:
            width: of the tokens.
            heads: of each attention.
            inducing: inducing points of each of the two blocks.
            classes: number of classes.
            n_iters: half-steps of its own attention.
            attend: what to attend with instead, in the same layers.

        Raises:
            RuntimeError: under softmax, which it computes at `n_iters=1`, the network gives other numbers with our
                attention in it than with its own, so that times of the two would be no comparison.
        """
        sizes = {"dim_output": classes, "dim_hidden": width, "num_heads": heads, "num_inds": inducing}
        network = self._models.ModelNetSink(**sizes, n_it=n_iters)
        if attend is not None:
            self._require_same(self._models.ModelNetSink(**sizes, n_it=1).eval())
            self._exchange(network, attend)
        return network

    def _exchange(self, network: nn.Module, attend: Attend) -> None:
        for parent in list(network.modules()):
            for name, block in parent.named_children():
                if isinstance(block, self._modules.MABSINK):
                    setattr(parent, name, _Block(block, attend))

    def _require_same(self, network: nn.Module) -> None:
        inputs = torch.randn(2, 20, 3)
        with torch.no_grad():
            wanted = network(inputs)
            self._exchange(network, softmax_attention)
            found = network(inputs)
        if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-5):
            raise RuntimeError("the published network isn't the one that the benchmark knows: its numbers differ")


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Compute PyTorch's fused attention of q (B, H, Q, D), k and v (B, H, K, D)."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


class _Block(nn.Module):
    """Its block: the layers and their order are its own, the attention is not."""

    def __init__(self, block: nn.Module, attend: Attend) -> None:
        super().__init__()
        self.block = block
        self.attend = attend

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        layers: Any = self.block
        q = self._heads(layers.fc_q(tokens))
        k, v = self._heads(layers.fc_k(context)), self._heads(layers.fc_v(context))
        # Its scores are divided by the root of the whole width, its weights by the number of queries.
        attended = self.attend(q, k, v, 1 / math.sqrt(layers.dim_V)) / q.shape[-2]
        x = layers.ln0((q + attended).transpose(1, 2).flatten(2))
        return layers.ln1(x + layers.fc_o(x).relu())

    def _heads(self, projected: Tensor) -> Tensor:
        heads: Any = self.block.num_heads
        return projected.unflatten(-1, (heads, -1)).transpose(1, 2)
