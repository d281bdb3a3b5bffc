"""What the tokens of an attention layer stand for: points in space, patches of an image, pieces of a text."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from tokenizers.decoders import ByteLevel
from torch import Tensor, nn

from sinkformer_pl.diagnostics.capture import LayerAttention, evaluating
from sinkformer_pl.models.point_cloud_transformer import NeighbourEmbedding
from sinkformer_pl.models.set_transformer import ISAB, PMA
from sinkformer_pl.models.vision_transformer import VisionTransformer


@dataclass(frozen=True)
class Tokens:
    """The tokens of one sample that attend to one another, without its padding.

    Attributes:
        kind: what they are; "tokens" where nothing is known.
        size: their number.
        leading: class tokens before them, counted in `size`.
        points: (size, 2 or 3) float, of points.
        image: (H, W) or (H, W, 3) float in [0, 1], of patches.
        grid: rows and columns of patches.
        words: of a text, one for each token that isn't leading.
    """

    kind: Literal["points", "patches", "words", "tokens"]
    size: int
    leading: int = 0
    points: Tensor | None = None
    image: Tensor | None = None
    grid: tuple[int, int] = (0, 0)
    words: list[str] = field(default_factory=list)


def tokens_of(
    model: nn.Module, inputs: Tensor, mask: Tensor | None, spell: Callable[[int], str] | None = None
) -> list[Tokens]:
    """The tokens of each sample of a batch.

    Args:
        model: the network, which decides what becomes a token.
        inputs: of a batch, as the model takes them.
        mask: (B, N) bool of real tokens, or None.
        spell: makes the string of a token number; None shows the numbers.
    """
    if inputs.ndim == 4:
        return _patches(model, inputs)
    if inputs.ndim == 2 and not inputs.is_floating_point():
        return _words(model, inputs, mask, spell or str)
    if inputs.ndim == 3 and inputs.shape[-1] >= 2:
        points, mask = _centres(model, inputs, mask)
        real = [cloud if mask is None else cloud[row] for cloud, row in zip(points, _rows(mask, points), strict=True)]
        return [Tokens("points", len(cloud), points=cloud[:, :3].float().cpu()) for cloud in real]
    return [Tokens("tokens", inputs.shape[1]) for _ in inputs]


def sides(model: nn.Module, layers: list[LayerAttention]) -> dict[str, tuple[str, str]]:
    """What attends and what is attended to in each layer: "token", or a learned "inducing point" or "seed"."""
    found = {layer.name: ("token", "token") for layer in layers}
    for name, module in model.named_modules():
        if isinstance(module, ISAB):
            found[f"{name}.gather.attention"] = ("inducing point", "token")
            found[f"{name}.scatter.attention"] = ("token", "inducing point")
        elif isinstance(module, PMA):
            found[f"{name}.block.attention"] = ("seed", "token")
    return found


def speller(data: Any) -> Callable[[int], str] | None:
    """Makes strings of the token numbers of a data module that has a tokenizer."""
    tokenizer = getattr(data, "tokenizer", None)
    if tokenizer is None:
        return None
    bytes_of = ByteLevel()
    return lambda token: bytes_of.decode([tokenizer.id_to_token(token) or f"#{token}"])


def _centres(model: nn.Module, inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The points, or those that a network gathers them into."""
    stages = [module for module in model.modules() if isinstance(module, NeighbourEmbedding)]
    if not stages:
        return inputs, mask
    caught: list[Any] = []
    handle = stages[-1].register_forward_hook(lambda *call: caught.append(call[-1]))
    try:
        with evaluating(model):
            model(inputs, mask)
    finally:
        handle.remove()
    points, _, mask = caught[0]
    return points, mask


def _patches(model: nn.Module, inputs: Tensor) -> list[Tokens]:
    network = next((module for module in model.modules() if isinstance(module, VisionTransformer)), None)
    images = inputs.float().cpu()
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    images = ((images - low) / (high - low).clamp(min=1e-6)).movedim(1, -1)
    if images.shape[-1] != 3:
        images = images[..., 0]
    if network is None:
        return [Tokens("tokens", 0, image=image) for image in images]
    side = network.embed.stride
    grid = inputs.shape[2] // int(side[0]), inputs.shape[3] // int(side[1])
    leading = int(network.class_token is not None)
    return [Tokens("patches", leading + grid[0] * grid[1], leading, image=image, grid=grid) for image in images]


def _words(model: nn.Module, inputs: Tensor, mask: Tensor | None, spell: Callable[[int], str]) -> list[Tokens]:
    leading = int(any(getattr(module, "class_token", None) is not None for module in model.modules()))
    return [
        Tokens("words", leading + len(words), leading, words=words)
        for words in (
            [spell(number) for number in numbers[row].tolist()]
            for numbers, row in zip(inputs, _rows(mask, inputs), strict=True)
        )
    ]


def _rows(mask: Tensor | None, inputs: Tensor) -> Tensor:
    return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device) if mask is None else mask
