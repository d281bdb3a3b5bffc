"""Batch normalization over the real tokens of a batch."""

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's own documentation uses)
from torch import Tensor, nn

from sinkformer_pl.ops.precision import at_least_float32, no_autocast


class MaskedBatchNorm(nn.Module):
    """`torch.nn.BatchNorm1d` over the last axis, whose statistics in training are of the real tokens alone.

    It is what `BatchNorm1d` gives for the list of the real tokens, with two exceptions. A batch of a single token has
    no spread: it is normalized by the running statistics and leaves them as they are, where `BatchNorm1d` refuses it.
    And `sync_batchnorm` of a trainer doesn't apply: each process takes the statistics of its own part of the batch.

    Args:
        dim: width.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics.

    References:
        Ioffe and Szegedy 2015 (ioffe2015batchnorm).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize x (..., dim), with the bool mask of its real tokens, broadcastable to (...); None is all.

        What stands at padding reaches neither the statistics nor a gradient.
        """
        tokens = x.flatten(0, -2)
        if self.training and mask is not None:
            return self._masked(x, mask.expand(x.shape[:-1])[..., None])
        fresh = self.training and len(tokens) > 1
        normalized = F.batch_norm(
            tokens, self.running_mean, self.running_var, self.weight, self.bias, fresh, self.momentum, self.eps
        )
        return normalized.view(x.shape)

    def _masked(self, x: Tensor, real: Tensor) -> Tensor:
        with no_autocast(x):
            wide = at_least_float32(x)
            axes = tuple(range(x.ndim - 1))
            count = real.sum(dtype=wide.dtype)
            enough = count > 1
            mean = (wide.where(real, 0.0).sum(axes) / count.clamp(min=1)).where(enough, self.running_mean)
            centred = (wide - mean).where(real, 0.0)
            var = (centred.square().sum(axes) / count.clamp(min=1)).where(enough, self.running_var)
            with torch.no_grad():
                weight = (self.momentum * enough).to(self.running_mean.dtype)
                unbiased = var * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)
            return (centred * ((var + self.eps).rsqrt() * self.weight) + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        """Show the arguments in `print(model)`."""
        return f"{len(self.weight)}, eps={self.eps}, momentum={self.momentum}"
