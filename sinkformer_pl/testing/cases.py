"""Inputs of a normalization: random tensors of every kind of mask, and the words for them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sinkformer_pl.normalizations.contract import AttentionNormalization
from sinkformer_pl.ops.mask import AttentionMask, Mask, causal_pairs

_ALL = slice(None)


@dataclass(frozen=True)
class Case:
    """One input, and the words for it."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Mask
    scale: float | Tensor
    words: str

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in self.tensors().items())
        return f"{shapes}, {self.q.dtype}, scale {self.scale}, mask: {self.words}"

    def attend(self, module: AttentionNormalization) -> Tensor:
        """Call a normalization's attend on it."""
        return module.attend(self.q, self.k, self.v, self.mask, scale=self.scale, bias=self.bias)

    def weights(self, module: AttentionNormalization) -> Tensor:
        """Call a normalization's weights on it."""
        return module.weights(self.q, self.k, self.mask, scale=self.scale, bias=self.bias)

    @property
    def tied(self) -> bool:
        """Tell whether queries and keys are one tensor."""
        return self.k is self.q

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name, without keys that are the queries and a bias that is None."""
        tensors = {"q": self.q, "k": self.k, "v": self.v, "bias": self.bias}
        return {name: x for name, x in tensors.items() if x is not None and not (name == "k" and self.tied)}

    def put(self, tensors: dict[str, Tensor], **others: Any) -> "Case":
        """Replace tensors by name, and other fields; queries and keys that are one tensor stay one."""
        others |= {"k": tensors["q"]} if self.tied and "q" in tensors else {}
        return replace(self, **tensors | others)

    def map(self, change: Callable[[Tensor], Tensor], *names: str) -> "Case":
        """Change the tensors of these names, by default every one."""
        return self.put({name: change(x) for name, x in self.tensors().items() if name in names or not names})

    def leaves(self) -> "Case":
        """Return the same memory, in tensors that ask for gradients."""
        return self.map(lambda x: x.detach().requires_grad_())

    def select(self, samples=_ALL, queries=_ALL, keys=_ALL) -> "Case":
        """Select samples, queries and keys, in some order; `pairs` are those of every sample.

        Where they are tied, `queries` and `keys` must be the same.
        """
        at = {"q": (samples, queries, _ALL), "k": (samples, keys, _ALL), "v": (samples, keys, _ALL)}
        at |= {"bias": (samples, queries, keys), "pairs": (_ALL, queries, keys)}
        at |= {"query": (samples, _ALL, queries), "key": (samples, _ALL, keys)}

        def selected(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
            given = {name: x for name, x in tensors.items() if x is not None}
            return {name: x[at[name][0]][..., at[name][1], :][..., at[name][2]] for name, x in given.items()}

        entries = None if self.mask is None else selected(vars(self.mask))
        mask = None if entries is None else token_mask(self.tied, **entries)
        return self.put(selected({**self.tensors()}), mask=mask)

    def allowed(self) -> Tensor:
        """Return the pairs that count, (B, H, Q, K)."""
        scores = self.q @ self.k.mT
        return (self.mask or AttentionMask()).allowed(scores).expand_as(scores)


def token_mask(
    tied: bool, query: Tensor | None = None, key: Tensor | None = None, pairs: Tensor | None = None
) -> AttentionMask:
    """Make a mask, with one entry for queries and keys where they are tied."""
    return AttentionMask(query, query if tied else key, pairs)


def draw(shape: Sequence[int], dtype: torch.dtype, seed: int = 5) -> Tensor:
    """Draw normal numbers, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_case(
    kind: str,
    dtype: torch.dtype,
    *,
    sizes: tuple[int, int, int, int],
    head_dim: int,
    std: float,
    seed: int,
    bias: bool,
    square: bool,
    tied: bool,
) -> Case:
    """Draw an input with a kind of mask, of sizes (B, H, Q, K), whose scores have the standard deviation `std`."""
    batch, heads, queries, keys = sizes

    def tokens(count: int, width: int, seed: int) -> Tensor:  # heads come transposed from an attention layer
        return draw((batch, count, heads, width), dtype, seed).transpose(1, 2)

    q = tokens(queries, head_dim, seed + 1)
    return Case(
        q=q,
        k=q if tied else tokens(keys, head_dim, seed + 2),
        v=tokens(keys, head_dim - 2, seed + 3),
        bias=draw(sizes, dtype, seed + 4) * std if bias else None,
        mask=_mask(kind, sizes, square, tied),
        scale=std / math.sqrt(head_dim),
        words=kind,
    )


def _mask(kind: str, sizes: tuple[int, int, int, int], square: bool, tied: bool) -> Mask:
    samples, heads, rows, columns = (torch.arange(size) for size in sizes)
    samples = samples[:, None]
    if kind == "none":
        return None
    if kind == "causal":
        return AttentionMask(pairs=causal_pairs(len(rows), len(columns)))
    if kind == "empty sample":
        real = (samples > 0).expand(-1, len(columns))
        return AttentionMask(real if square else None, real)
    padding = token_mask(tied, *((x + samples) % 3 != 2 for x in (rows, columns)))
    if kind == "padding":
        return padding
    pairs = ((rows[:, None] + columns + heads[:, None, None]) % 3 != 0) & (rows[:, None] > 0)  # query 0 meets no key
    return replace(padding, pairs=pairs[None])
