"""Share between sources of texts checks, the split, the tokenizer, truncation, batches of similar length."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from sinkformer_pl.batch import Sample
from sinkformer_pl.data.classification import ClassificationData
from sinkformer_pl.data.columns import require_line_ends
from sinkformer_pl.data.dataset import LabelledDataset, Split
from sinkformer_pl.data.preprocessing import Preprocessing
from sinkformer_pl.data.reading import open_file
from sinkformer_pl.data.sampling import Draw
from sinkformer_pl.data.source import Source
from sinkformer_pl.data.texts.preprocessing import TextPreprocessing
from sinkformer_pl.data.texts.tokenizer import (
    LARGEST_VOCABULARY,
    SMALLEST_VOCABULARY,
    Encoded,
    Text,
    find_tokenizer,
    head,
    here,
    load_tokenizer,
    read_tokenizer,
    require_usable,
    train_tokenizer,
)
from sinkformer_pl.errors import UserError


class Texts(NamedTuple):
    """Labelled texts.

    Attributes:
        texts: n texts, or n pairs of texts.
        targets: (n,) int64 class indices.
        names: n names, for prediction files and messages: a file, or a file and a line.
        groups: n names of what texts have in common beside their class; a group is never divided between training
            and validation. None for no groups; equal texts stay together then.
    """

    texts: Sequence[Text]
    targets: Tensor
    names: Sequence[str]
    groups: Sequence[str] | None = None

    def subset(self, chosen: Tensor) -> "Texts":
        """Return some of the texts, by their indices."""
        indices: list[int] = chosen.tolist()
        groups = None if self.groups is None else [self.groups[index] for index in indices]
        return Texts(
            [self.texts[index] for index in indices],
            self.targets[chosen],
            [self.names[index] for index in indices],
            groups,
        )


class TextDataset(LabelledDataset):
    """One split of texts; the inputs are (N,) int64 token numbers, 1 <= N <= max_length.

    Attributes:
        texts: the texts, or pairs of texts.
    """

    preprocessing: TextPreprocessing

    def __init__(self, texts: Texts, split: Split, preprocessing: TextPreprocessing, *, similar: bool) -> None:
        """Keep the texts; they are encoded when the first of them is asked for.

        Args:
            texts: the split's.
            split: its name, for messages.
            preprocessing: encodes them.
            similar: whether training batches are of texts of similar length.
        """
        super().__init__(texts.targets, texts.names)
        self.texts = texts.texts
        self.split = split
        self.preprocessing = preprocessing
        self.similar = similar

    @cached_property
    def encoded(self) -> Encoded:
        """All texts' tokens; says how many texts were cut.

        Raises:
            UserError: a text that has none.
        """
        encoded = self.preprocessing.encode(self.texts)
        if len(encoded.lengths) and not encoded.lengths.min():
            name = self.names[int(encoded.lengths.argmin())]
            raise UserError(
                f"{name}: the tokenizer has no token for anything in it; remove it, or give another tokenizer"
            )
        if encoded.cut:
            rank_zero_info(
                f"{encoded.cut} of {len(self.texts)} {self.split} texts were cut at {self.preprocessing.max_length} "
                "tokens (data.max_length)"
            )
        return encoded

    @cached_property
    def _starts(self) -> Any:
        return self.encoded.lengths.cumsum() - self.encoded.lengths

    @property
    def lengths(self) -> Sequence[int] | None:
        """Numbers of tokens, where training batches are to be of similar length."""
        return self.encoded.lengths.tolist() if self.similar else None

    @override
    def content(self) -> Iterator[bytes]:
        for text in self.texts:
            yield f"{len(text)} {text}".encode()

    @property
    def extremes(self) -> Sequence[int]:
        """The longest text, and the one with the highest token number."""
        highest = np.searchsorted(self._starts, self.encoded.tokens.argmax(), side="right") - 1
        return int(self.encoded.lengths.argmax()), int(highest)

    def inputs(self, draw: Draw) -> Tensor:
        """Return one text's tokens."""
        start = self._starts[draw.index]
        tokens = self.encoded.tokens[start : start + self.encoded.lengths[draw.index]]
        return torch.from_numpy(tokens.astype("int64"))

    @override
    def use(self, preprocessing: Preprocessing) -> None:
        super().use(preprocessing)
        self.__dict__.pop("encoded", None)
        self.__dict__.pop("_starts", None)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a loader process needs: tokens, neither the texts nor the tokenizer."""
        return {"encoded": self.encoded, **self.__dict__, "texts": (), "preprocessing": None}


class TextData(ClassificationData, ABC):
    """Base of all texts: a subclass passes its class names to `__init__` and writes `load`.

    Texts become numbers by byte-level byte-pair encoding, learnt from the training split alone; 0 is padding. The
    tokenizer is kept in checkpoints, as text, and the one of a checkpoint is used when its model is evaluated or
    trained on (`restore`). Of each text the first `max_length` tokens are kept, and at most 16 characters for each of
    them are looked at; how many were cut is said once for each split. A pair of texts becomes one sequence, the first
    text, a separator, the second; of the longer one less is kept.

    Attributes:
        pair: whether the samples are pairs of texts; a subclass sets it before `__init__`.
        vocab_size: most token numbers, hence the rows of an embedding; known right after construction.
        preprocessing: of evaluation and training alike, with the tokenizer; after `setup`.
    """

    preprocessing_class = TextPreprocessing
    preprocessing: TextPreprocessing | None
    pair: bool = False

    def __init__(
        self,
        classes: Sequence[str],
        *,
        max_length: int = 256,
        vocab_size: int = 8000,
        tokenizer: str | Path | None = None,
        lowercase: bool = False,
        similar_lengths: bool = True,
        **kwargs: Any,
    ) -> None:
        """Check the arguments.

        Args:
            classes: class names in the order of their indices.
            max_length: tokens that are kept of a text or a pair, 1 or more; 3 of a pair.
            vocab_size: most token numbers, padding and the 256 bytes among them, 257 to 2**24.
            tokenizer: a tokenizer of one's own, `tokenizer.json` of Hugging Face's `tokenizers`, which is used as it
                is, with all that it adds to a text: the file or its folder, "package:NAME/FOLDER" of an installed
                package, or a model on the hub; None to learn one from the training split.
            lowercase: whether case is dropped; without a tokenizer of one's own, which decides itself.
            similar_lengths: whether a training batch holds texts of similar length, so that less is padded.
            **kwargs: what `ClassificationData` takes.

        Raises:
            UserError: an argument out of its range.
        """
        super().__init__(classes, **kwargs)
        if max_length < (shortest := 3 if self.pair else 1):
            raise UserError(f"data.max_length is {max_length}: give {shortest} or more")
        smallest = 1 if tokenizer is not None else SMALLEST_VOCABULARY + self.pair
        if not smallest <= vocab_size <= LARGEST_VOCABULARY:
            raise UserError(f"data.vocab_size is {vocab_size}: give {smallest} to {LARGEST_VOCABULARY}")
        if tokenizer is not None and lowercase:
            raise UserError("data.lowercase is true, but data.tokenizer decides on case itself; leave one out")
        self.max_length = max_length
        self.vocab_size = vocab_size
        self.tokenizer_source = None if tokenizer is None else str(tokenizer)
        self.lowercase = lowercase
        self.similar_lengths = similar_lengths

    @abstractmethod
    def load(self) -> Source[Texts]:
        """Read all texts."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of a checkpoint, else of a file, else learnt from the training split; after `setup`."""
        assert self.preprocessing is not None
        return self.preprocessing.loaded

    def preprocessing_of(self, saved: Mapping[str, Any]) -> TextPreprocessing:
        """Take the tokenizer, and say which arguments are another's.

        That of a pretrained network, whose `pair` is None, is for texts and pairs alike.

        Raises:
            UserError: there is none, or one that can't be read; or it is of pairs of texts where these aren't, or not
                where they are.
        """
        if not isinstance(tokenizer := saved.get("tokenizer"), str):
            raise UserError("the checkpoint has no tokenizer: give one of a model that was trained on texts")
        load_tokenizer(tokenizer)
        owner = "network" if (pretrained := saved.get("pair", False) is None) else "checkpoint"
        if pretrained:
            made = load_tokenizer(tokenizer)
            at_most, most = self.max_length, LARGEST_VOCABULARY
            require_usable(made, "of the network", pair=self.pair, max_length=at_most, vocab_size=most)
        elif bool(saved.get("pair")) != self.pair:
            taken, remedy = ("single texts", "leave it out") if self.pair else ("pairs of texts", "give two columns")
            raise UserError(f"data.text_columns: the checkpoint's model takes {taken}; {remedy}")
        own = here(self.tokenizer_source)
        if own is not None and read_tokenizer(own).to_str() != tokenizer:
            rank_zero_warn(f"data.tokenizer {own} is another than the {owner}'s, which is used")
        for name in ("vocab_size", "lowercase"):
            if name in saved and saved[name] != getattr(self, name):
                rank_zero_warn(
                    f"data.{name} is {getattr(self, name)}, but the {owner}'s tokenizer, made with {saved[name]}, "
                    "is used"
                )
                setattr(self, name, saved[name])
        return self._preprocessing(tokenizer)

    def _preprocessing(self, tokenizer: str) -> TextPreprocessing:
        return TextPreprocessing(tokenizer, self.vocab_size, self.lowercase, self.max_length, self.pair)

    def _new_tokenizer(self, texts: Sequence[Text]) -> Tokenizer:
        if self.tokenizer_source is not None:
            path = find_tokenizer(self.tokenizer_source)
            tokenizer = read_tokenizer(path)
            require_usable(tokenizer, path, pair=self.pair, max_length=self.max_length, vocab_size=self.vocab_size)
            return tokenizer
        heads = (head(text, self.max_length) for text in texts)
        each = (part for text in heads for part in ([text] if isinstance(text, str) else text))
        return train_tokenizer(each, vocab_size=self.vocab_size, lowercase=self.lowercase, pair=self.pair)

    def make_datasets(self) -> dict[Split, LabelledDataset]:
        """Read, check and divide the texts.

        Raises:
            UserError: an empty text, or one with characters that no text has.
        """
        train, test, val = self.load()
        for part in (train, test, val):
            if part is not None:
                self._check(part)
        if val is None:
            if train.groups is None:
                chosen = self._divide(train.targets, train.texts, unit="different texts")
            else:
                chosen = self._divide(train.targets, train.groups, unit="groups")
            train, val = (train.subset(part) for part in chosen)
        known = set(train.texts)
        for name, part in (("val", val), ("test", test)):
            if repeated := sum(text in known for text in part.texts):
                rank_zero_warn(
                    f"{self.origin}: {repeated} of {len(part.texts)} {name} texts are also among the training texts"
                )
        if self.preprocessing is None:
            self.preprocessing = self._preprocessing(self._new_tokenizer(train.texts).to_str())
        parts: dict[Split, Texts] = {"train": train, "val": val, "test": test}
        return {
            split: TextDataset(texts, split, self.preprocessing, similar=self.similar_lengths)
            for split, texts in parts.items()
        }

    def _loader(self, split: Split) -> DataLoader[Sample]:
        dataset = self.datasets[split]
        assert isinstance(dataset, TextDataset)
        # Here, rather than in each of the loader's processes.
        dataset.encoded  # noqa: B018
        return super()._loader(split)

    def _check(self, texts: Texts) -> None:
        for given, name in zip(texts.texts, texts.names, strict=True):
            for text in [given] if isinstance(given, str) else given:
                if not text.strip():
                    what = "is" if isinstance(given, str) else "has"
                    raise UserError(f"{self.origin}: {name} {what} an empty text; fill or remove it")
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise UserError(
                        f"{self.origin}: {name} has half of a surrogate pair at character {error.start}; repair it"
                    ) from None


def read_utf8(path: Path) -> str:
    r"""Read a text file; a byte order mark is dropped, "\r\n" stays.

    Raises:
        UserError: no such file, one that can't be read, or bytes that aren't UTF-8.
    """
    with open_file(path) as file:
        content = file.read()
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: not UTF-8 at byte {error.start}, line {line} (0x{content[error.start]:02x}); save it as UTF-8"
        ) from None


def read_lines(path: Path) -> list[str]:
    r"""Read the lines of a text file; "\n" and "\r\n" end a line, and no other character does.

    Raises:
        UserError: as `read_utf8`, or lines that end as on old systems.
    """
    lines = read_utf8(path).split("\n")
    if len(lines) == 1:
        require_line_ends(lines[0], str(path))
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
