"""Pool the tokens of a sample to one vector, without its padding."""

from typing import Literal

import torch
from torch import Tensor, nn

Pooling = Literal["cls", "mean", "max"]


def pool(x: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """Pool to one vector for each sample.

    Args:
        x: (B, N, dim), N at least 1.
        mask: (B, N) bool of real tokens; None when every token is real.
        pooling: "cls", the first token; "mean" or "max" over the real tokens, entry by entry.

    Returns:
        (B, dim); 0 for the mean or maximum of no token.
    """
    if pooling == "cls":
        return x[:, 0]
    if mask is None:
        return x.mean(1) if pooling == "mean" else x.amax(1)
    real = mask[..., None]
    if pooling == "mean":
        return x.where(real, 0.0).sum(1) / real.sum(1).clamp(min=1)
    return x.where(real, -torch.inf).amax(1).where(real.any(1), 0.0)


class ClassToken(nn.Module):
    """A learned token before all others, whose final state stands for the sample (Devlin et al. 2019).

    It starts from a normal distribution of standard deviation `std`.
    """

    def __init__(self, dim: int, *, std: float = 0.02) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.token, std=std)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Prepend the token to x (B, N, dim), and True to the (B, N) bool mask of its real tokens."""
        x = torch.cat((self.token.expand(x.shape[0], 1, -1), x), 1)
        return x, None if mask is None else nn.functional.pad(mask, (1, 0), value=True)
