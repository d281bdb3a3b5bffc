"""Subwords: from texts, or pairs of texts, to token numbers; by byte-level byte-pair encoding unless one has others."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from sinkformer_pl.data.reading import cause, open_file
from sinkformer_pl.errors import UserError
from sinkformer_pl.locations import locate

Text = str | tuple[str, str]
"""A text, or a pair of texts."""

TOKENIZER = "tokenizer.json"

PADDING = "[PAD]"
SEPARATOR = "[SEP]"
"""Stands between the texts of a pair."""

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
        lengths: (n,) int64, each at most `max_length`; they sum to total. 0 where a tokenizer of one's own has no token
            for anything in a text.
        cut: number of texts whose end is left out.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    cut: int


def head(text: Text, max_length: int) -> Text:
    """Return the part of each text that is looked at, so that a text without end costs no more than a long one."""
    most = CHARACTERS_PER_TOKEN * max_length
    return text[:most] if isinstance(text, str) else (text[0][:most], text[1][:most])


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, lowercase: bool, pair: bool = False) -> Tokenizer:
    """Learn subwords; equal texts give equal tokenizers.

    Args:
        texts: the training split's.
        vocab_size: most token numbers, padding (0) and the 256 bytes among them; few texts give fewer.
        lowercase: whether case is dropped.
        pair: whether it is for pairs of texts, between which it puts number 1, the separator.

    Returns:
        The tokenizer, of which number 0 stands for padding and never comes out of a text.
    """
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PADDING, SEPARATOR] if pair else [PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if pair:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="$A", pair=f"$A {SEPARATOR} $B", special_tokens=[(SEPARATOR, 1)]
        )
    return tokenizer


def find_tokenizer(source: str) -> Path:
    """Return the file of a tokenizer of one's own, downloaded if it is on the hub, unless HF_HUB_OFFLINE is 1.

    Args:
        source: a file; a folder with `tokenizer.json`; "package:NAME/FOLDER", of an installed package; or the name of a
            model on the hub.

    Raises:
        UserError: there is none.
    """
    path = Path(locate(source))
    if path.is_dir():
        if (file := path / TOKENIZER).exists():
            return file
        raise UserError(
            f"data.tokenizer {source}: no {TOKENIZER} there; write it by AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER) of transformers"
        )
    if path.exists() or path.suffix or path.is_absolute():
        return path
    # It comes with tokenizers.
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, TOKENIZER))
    except Exception as error:  # Of many libraries.
        raise UserError(
            f"data.tokenizer {source}: no such file or folder, and none of this name on the hub ({cause(error)}); give "
            f"a {TOKENIZER}, or the folder of a model"
        ) from None


def here(source: str | None) -> Path | None:
    """Return the file of a tokenizer if it is on this machine: it may have stayed where a checkpoint came from."""
    try:
        path = None if source is None else Path(locate(source))
    except UserError:
        return None
    if path is not None and path.is_dir():
        path = path / TOKENIZER
    return path if path is not None and path.exists() else None


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer of one's own, as `Tokenizer.save` and Hugging Face's fast tokenizers write it.

    Args:
        path: of `tokenizer.json`.

    Returns:
        The tokenizer, without a truncation or padding of its own.

    Raises:
        UserError: no such file, or no tokenizer.
    """
    with open_file(path) as file:
        content = file.read()
    try:
        tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # The library raises nothing more special.
        raise UserError(
            f"data.tokenizer {path}: no tokenizer ({cause(error)}); give a tokenizer.json as Tokenizer.save writes it"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def require_usable(tokenizer: Tokenizer, path: Path | str, *, pair: bool, max_length: int, vocab_size: int) -> None:
    """Refuse a tokenizer of one's own that doesn't fit what is asked of it.

    Args:
        tokenizer: as `read_tokenizer` gives it.
        path: of its file, or words for it, for messages.
        pair: whether it is to put pairs of texts together.
        max_length: tokens that are kept of a text, or of a pair.
        vocab_size: most token numbers.

    Raises:
        UserError: more token numbers; no separator for pairs; no room for words beside what it adds.
    """
    numbers = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if numbers > vocab_size:
        raise UserError(
            f"data.tokenizer {path}: it has {numbers} token numbers, and data.vocab_size is {vocab_size}; set "
            f"data.vocab_size, and the network's vocab_size, to {numbers} or more"
        )
    added = tokenizer.num_special_tokens_to_add(pair)
    if pair and not added:
        raise UserError(
            f"data.tokenizer {path}: it puts nothing between the texts of a pair; give one whose post_processor has a "
            "template for pairs"
        )
    if added + 1 + pair > max_length:
        raise UserError(
            f"data.max_length is {max_length}: data.tokenizer {path} adds {added} tokens to each sample; give more"
        )


def load_tokenizer(saved: str) -> Tokenizer:
    """Return the tokenizer that `Tokenizer.to_str` has saved.

    Raises:
        UserError: text that is none.
    """
    try:
        tokenizer = Tokenizer.from_str(saved)
    except Exception as error:  # The library raises nothing more special.
        raise UserError(f"the saved tokenizer cannot be read ({error}); use another checkpoint") from None
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[Text], *, max_length: int) -> Encoded:
    """Encode texts, or pairs of texts, of which `max_length` tokens are kept.

    What the tokenizer adds, such as a separator, is kept; of a pair the longer text is cut.

    Raises:
        UserError: a tokenizer of one's own can't encode a text.
    """
    # A text that has "[PAD]" in it means these letters.
    tokenizer.encode_special_tokens = True
    tokenizer.enable_truncation(max_length)
    parts: list[np.ndarray] = []
    cut = 0
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        heads = [head(text, max_length) for text in chunk]
        try:
            encodings = tokenizer.encode_batch_fast(heads)
        except Exception as error:  # The library raises nothing more special.
            raise UserError(f"the tokenizer can't encode the texts ({cause(error)}); use another") from None
        for text, looked_at, encoding in zip(chunk, heads, encodings, strict=True):
            cut += bool(encoding.overflowing) or text != looked_at
            parts.append(np.array(encoding.ids, dtype=np.int32))
    tokenizer.no_truncation()
    return Encoded(
        tokens=np.concatenate(parts) if parts else np.empty(0, dtype=np.int32),
        lengths=np.array([len(part) for part in parts], dtype=np.int64),
        cut=cut,
    )
