"""Transformer encoder over the tokens of a text."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sinkformer_pl.errors import UserError
from sinkformer_pl.models.attention_core import Temperature
from sinkformer_pl.models.backbone import Backbone
from sinkformer_pl.models.blocks import BlockOptions, LayerNormPlace, TransformerEncoder, require_at_least
from sinkformer_pl.models.class_mass import Mass
from sinkformer_pl.models.pooling import ClassToken, Pooling, Readout, require_class_token
from sinkformer_pl.models.positions import (
    LearnedPositions,
    RelativePositionBias,
    SinusoidalPositions,
    token_positions,
)
from sinkformer_pl.models.tokens import Tokens, describe_tokens
from sinkformer_pl.normalizations.contract import NormalizationFactory

Positions = Literal["learned", "sinusoidal", "relative", "none"]
LEARNED_POSITIONS = 256
"""Their number, where none is given."""
REACH = 64
"""Distances that relative positions tell apart, where no other number is given."""


class TextTransformer(Backbone):
    """The encoder of Vaswani et al. 2017 (vaswani2017attention) and a pooling over tokens.

    The same network for every normalization, those included that need square scores. Sequences of unequal length come
    padded with a mask, on whichever side, and give what each gives alone.

    Args:
        normalization: makes the normalization of each attention layer.
        vocab_size: number of different tokens; at least the vocabulary size of the data.
        max_length: number of learned positions, and so of the tokens of a batch, padding included; None is 256. Refused
            under other positions, which have no limit.
        dim: width.
        num_heads: heads of each attention layer; divides `dim`, unless `head_dim` is given.
        depth: number of attention blocks.
        mlp_dim: hidden width of the row-wise networks; None is 4 `dim`, 0 leaves them out.
        dropout: share dropped after the positions are added and inside the blocks.
        layer_norm: where the blocks have their layer norms; "pre" has another one before the pooling.
        temperature: divides the scores of each attention layer: a positive number, or "learned", one for each head.
        head_dim: width of each head; None is dim / num_heads.
        positions: added to the embeddings of the tokens: "learned"; "sinusoidal", the embeddings then multiplied by
            sqrt(dim) as by Vaswani et al.; or "none", which makes a text a bag of tokens. Counted from the first token.
            "relative" adds instead a learned number to the scores for each head and distance, the same in every block;
            distances of 64 and more aren't told apart. Not under a normalization that takes no bias.
        pooling: "mean" or "max" over the real tokens; "cls", the final state of a learned token before them; "seed", a
            learned query that attends to them under Softmax. A mean sees little of a doubly stochastic attention.
        causal: a token meets itself and those before it, under a normalization that can be causal; not with
            pooling="cls", whose token comes first and would meet nothing.
        class_mass: sum of the class token's column in every plan over that of any other token: 1 counts it as they are;
            0 lets nobody read it; another number; "learned", one for each head, from 1 on; "free", what it receives
            under Softmax. Under Sinkhorn and SemiUnbalancedSinkhorn.

    Raises:
        ValueError: a size out of range; heads that don't divide the width; a temperature that isn't positive; an
            unknown kind of positions, pooling or place of the layer norms; `max_length` without learned positions;
            causal with a class token; a mass of one that isn't there.
        NotImplementedError: causal, relative positions, or a class token's own mass, under a normalization that refuses
            it.
    """

    def __init__(
        self,
        normalization: NormalizationFactory,
        vocab_size: int = 8000,
        max_length: int | None = None,
        dim: int = 64,
        num_heads: int = 4,
        depth: int = 2,
        mlp_dim: int | None = None,
        dropout: float = 0.1,
        layer_norm: LayerNormPlace = "pre",
        temperature: Temperature = 1.0,
        head_dim: int | None = None,
        positions: Positions = "learned",
        pooling: Pooling = "mean",
        causal: bool = False,
        class_mass: Mass = 1.0,
    ) -> None:
        super().__init__()
        for name, value, valid in (("positions", positions, Positions), ("pooling", pooling, Pooling)):
            if value not in get_args(valid):
                raise ValueError(f"{name} must be one of {', '.join(get_args(valid))}, got {value!r}")
        if positions != "learned" and max_length is not None:
            raise ValueError(
                f"max_length={max_length} is the number of learned positions; leave it out with "
                f"positions={positions!r}, which have no limit"
            )
        if causal and pooling == "cls":
            raise ValueError(
                'causal=True with pooling="cls": the class token comes first and meets nothing; use "mean"'
            )
        require_class_token(class_mass, pooling)
        if positions == "learned" and max_length is None:
            max_length = LEARNED_POSITIONS
        require_at_least(1, vocab_size=vocab_size, dim=dim, max_length=1 if max_length is None else max_length)
        mlp_dim = 4 * dim if mlp_dim is None else mlp_dim
        self.out_dim = dim
        self.max_length = max_length
        self.token_limits = 1, max_length
        self.pooling: Pooling = pooling
        self.embed = nn.Embedding(vocab_size, dim)
        nn.init.trunc_normal_(self.embed.weight, std=0.02)
        self.embed_scale = math.sqrt(dim) if positions == "sinusoidal" else 1.0
        self.positions: LearnedPositions | SinusoidalPositions | None = None
        if max_length is not None:
            self.positions = LearnedPositions(max_length, dim)
        elif positions == "sinusoidal":
            self.positions = SinusoidalPositions(dim)
        self.relative = RelativePositionBias(num_heads, REACH) if positions == "relative" else None
        self.class_token = ClassToken(dim) if pooling == "cls" else None
        self.dropout = nn.Dropout(dropout)
        block = BlockOptions(
            mlp_dim=mlp_dim,
            head_dim=head_dim,
            dropout=dropout,
            layer_norm=layer_norm,
            temperature=temperature,
            causal=causal,
            class_mass=class_mass,
        )
        self.encoder = TransformerEncoder(dim, num_heads, normalization, depth=depth, **block)
        own = self.encoder.normalization
        self.readout = Readout(pooling, dim, num_heads, follows=own, **block)
        if self.relative is not None and not own.takes_bias:
            raise NotImplementedError(
                f'{type(own).__name__} takes no bias, which positions="relative" is; use "learned" or "sinusoidal"'
            )

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map token numbers (B, N) int64, with the (B, N) bool mask of real tokens, to features (B, dim).

        What stands at padded places changes nothing and gets no gradient. A text without tokens gives finite features.

        Raises:
            UserError: inputs that aren't token numbers; more of them than learned positions; in eager mode on the CPU,
                a number outside of the vocabulary. Elsewhere the look would wait for the device or cut a compiled graph
                in two, so the assertion of PyTorch's own embedding is what stops the run.
        """
        self._check_shapes(inputs, mask)
        if inputs.shape[1] == 0:
            inputs, mask = inputs.new_zeros(len(inputs), 1), inputs.new_zeros(len(inputs), 1, dtype=torch.bool)
        tokens = inputs if mask is None else inputs.where(mask, 0)
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_vocabulary(tokens)
        x = self.embed(tokens) * self.embed_scale
        if self.positions is not None:
            x = x + self.positions(token_positions(tokens, mask)).to(x.dtype)
        leading = int(self.class_token is not None)
        bias = None if self.relative is None else self.relative(x.shape[1], leading=leading)
        if self.class_token is not None:
            x, mask = self.class_token(x, mask)
        return self.readout(self.encoder(self.dropout(x), mask, bias), mask)

    def describe_tokens(self, inputs: Tensor, mask: Tensor | None = None) -> list[Tokens]:
        """Describe the tokens of each text, behind the class token."""
        return describe_tokens(inputs, mask, leading=int(self.class_token is not None))

    def _check_shapes(self, inputs: Tensor, mask: Tensor | None) -> None:
        if inputs.ndim != 2 or inputs.dtype not in (torch.int64, torch.int32):
            raise UserError(
                f"TextTransformer takes token numbers (batch, tokens) of an integer dtype, got shape "
                f"{tuple(inputs.shape)} of {inputs.dtype}: choose another data module, or another model.backbone"
            )
        if mask is not None and (mask.shape != inputs.shape or mask.dtype != torch.bool):
            raise UserError(
                f"the mask must be bool of the shape of the tokens, {tuple(inputs.shape)}, got {mask.dtype} of "
                f"{tuple(mask.shape)}"
            )
        if self.max_length is not None and inputs.shape[1] > self.max_length:
            raise UserError(
                f"a text has {inputs.shape[1]} tokens, but the network learns positions for max_length="
                f"{self.max_length}: set model.backbone.max_length to {inputs.shape[1]} or more, have the data cut its "
                "texts, or set model.backbone.positions to sinusoidal, which has no limit"
            )

    def _check_vocabulary(self, tokens: Tensor) -> None:
        lowest, highest = (int(value) for value in tokens.aminmax()) if tokens.numel() else (0, 0)
        size = self.embed.num_embeddings
        if lowest < 0 or highest >= size:
            raise UserError(
                f"token number {lowest if lowest < 0 else highest} is outside of the network's vocabulary, 0 to "
                f"{size - 1}: model.backbone.vocab_size={size} must be at least the vocabulary size of the data"
            )
