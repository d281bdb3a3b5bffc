"""Texts as a network sees them: token numbers, cut to a length."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sinkformer_pl.data.preprocessing import Preprocessing
from sinkformer_pl.data.texts.tokenizer import Encoded, Text, encode, load_tokenizer
from sinkformer_pl.errors import UserError


@dataclass(frozen=True)
class TextPreprocessing(Preprocessing):
    """Encode a text, or a pair of texts, by subwords, and keep its head.

    Attributes:
        tokenizer: as `Tokenizer.to_str` writes it.
        vocab_size: most token numbers; the tokenizer was learnt with it.
        lowercase: whether it drops case.
        max_length: tokens that are kept of a text, or of a pair.
        pair: whether samples are pairs of texts.
    """

    kind = "texts"
    from_data = ("tokenizer",)

    tokenizer: str
    vocab_size: int
    lowercase: bool
    max_length: int
    pair: bool = False

    def __call__(self, raw: Text, seed: int = 0) -> Tensor:
        """Return (N,) int64 token numbers of a text or a pair, 1 <= N <= max_length; nothing is random.

        Raises:
            UserError: the tokenizer has no token for anything in it.
        """
        tokens = torch.from_numpy(self.encode([raw]).tokens.astype("int64"))
        if not len(tokens):
            raise UserError("the tokenizer has no token for anything in this text; give another")
        return tokens

    def encode(self, texts: Sequence[Text]) -> Encoded:
        """Return the token numbers of many texts or pairs."""
        return encode(self.loaded, texts, max_length=self.max_length)

    @cached_property
    def loaded(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            UserError: it can't be read.
        """
        return load_tokenizer(self.tokenizer)
