"""Describe the tokens that the attention layers of a network attend with, and spell those of a text."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tokenizers.decoders import ByteLevel
from torch import Tensor, nn

from sinkformer_pl.diagnostics.capture import evaluating
from sinkformer_pl.models.backbone import Backbone
from sinkformer_pl.models.tokens import Tokens, describe_tokens


def tokens_of(
    model: nn.Module, inputs: Tensor, mask: Tensor | None, spell: Callable[[int], str] | None = None
) -> list[Tokens]:
    """Describe the tokens of each sample of a batch, as the network's backbone says.

    Args:
        model: a `Backbone`, or a module with one in it; else each point or token number is a token.
        inputs: of a batch, as the model takes them.
        mask: (B, N) bool of real tokens, or None.
        spell: makes the string of a token number; None shows the numbers.
    """
    backbone = next((module for module in model.modules() if isinstance(module, Backbone)), None)
    with evaluating(model):
        tokens = (backbone.describe_tokens if backbone is not None else describe_tokens)(inputs, mask)
    return [
        sample if sample.numbers is None else replace(sample, words=[*map(spell or str, sample.numbers.tolist())])
        for sample in tokens
    ]


def speller(data: Any) -> Callable[[int], str] | None:
    """Make strings of the token numbers of a data module that has a tokenizer."""
    tokenizer = getattr(data, "tokenizer", None)
    if tokenizer is None:
        return None
    bytes_of = ByteLevel()
    return lambda token: bytes_of.decode([tokenizer.id_to_token(token) or f"#{token}"])
