"""Subwords: from texts to token numbers, by byte-level byte-pair encoding."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from sinkformer_pl.errors import UserError

PADDING = "[PAD]"
SMALLEST_VOCABULARY = 257
"""Padding and each byte, so that every text has an encoding."""

LARGEST_VOCABULARY = 2**24
"""Beyond any use, and before the library ends the process for lack of memory."""

CHARACTERS_PER_TOKEN = 16
"""How much of a text is looked at for each token wanted; English has 4 to 5."""

_CHUNK = 1024


class Encoded(NamedTuple):
    """Token numbers of many texts.

    Attributes:
        tokens: (total,) int32, one text after the other.
        lengths: (n,) int64, each 1 to `max_length`; they sum to total.
        cut: number of texts whose end is left out.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    cut: int


def head(text: str, max_length: int) -> str:
    """Return the part of a text that is looked at, so that a text without end costs no more than a long one."""
    return text[: CHARACTERS_PER_TOKEN * max_length]


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, lowercase: bool) -> Tokenizer:
    """Learn subwords; equal texts give equal tokenizers.

    Args:
        texts: the training split's.
        vocab_size: most token numbers, padding (0) and the 256 bytes among them; few texts give fewer.
        lowercase: whether case is dropped.

    Returns:
        The tokenizer, of which number 0 stands for padding and never comes out of a text.
    """
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(saved: str) -> Tokenizer:
    """Return the tokenizer that `Tokenizer.to_str` has saved.

    Raises:
        UserError: text that is none, or one without padding at 0.
    """
    try:
        tokenizer = Tokenizer.from_str(saved)
    except Exception as error:  # The library raises nothing more special.
        raise UserError(f"the saved tokenizer cannot be read ({error}); use another checkpoint") from None
    if tokenizer.token_to_id(PADDING) != 0:
        raise UserError(f"the saved tokenizer has no {PADDING} at number 0; use a checkpoint of this package")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, max_length: int) -> Encoded:
    """Encode texts, of which the first `max_length` tokens are kept, and at least one."""
    # A text that has "[PAD]" in it means these letters.
    tokenizer.encode_special_tokens = True
    parts: list[np.ndarray] = []
    cut = 0
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        encodings = tokenizer.encode_batch_fast([head(text, max_length) for text in chunk])
        for text, encoding in zip(chunk, encodings, strict=True):
            cut += len(encoding) > max_length or len(text) > len(head(text, max_length))
            parts.append(np.array(encoding.ids[:max_length], dtype=np.int32))
    return Encoded(
        tokens=np.concatenate(parts) if parts else np.empty(0, dtype=np.int32),
        lengths=np.array([len(part) for part in parts], dtype=np.int64),
        cut=cut,
    )
