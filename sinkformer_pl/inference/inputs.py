"""Inputs of a network from what one has: files, images, texts, arrays, tensors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sinkformer_pl.batch import pad
from sinkformer_pl.data.preprocessing import Preprocessing
from sinkformer_pl.data.texts.base import read_utf8
from sinkformer_pl.data.texts.preprocessing import TextPreprocessing
from sinkformer_pl.errors import UserError


class Item(NamedTuple):
    """A raw input.

    Attributes:
        name: for results and messages.
        raw: a path, text, pair of texts, image or array, as the preprocessing takes it; or what is wrong with it, a
            `UserError`.
        label: its class, where that is known.
        last: whether it is an error that ended the source.
    """

    name: str
    raw: Any
    label: str | None = None
    last: bool = False


class Prepared(NamedTuple):
    """Inputs of a batch.

    Attributes:
        items: with the raw inputs left out.
        errors: of each item, None for a good one.
        fatal: whether the last error ended the source.
        inputs: of the good items, padded; None if there are none.
        mask: real tokens, None where all are.
    """

    items: Sequence[Item]
    errors: Sequence[str | None]
    fatal: bool
    inputs: Tensor | None
    mask: Tensor | None


def prepare(items: Sequence[Item], preprocessing: Preprocessing) -> Prepared:
    """Make the inputs of a batch; what is wrong with an item is kept beside those that are well."""
    inputs: list[Tensor] = []
    errors: list[str | None] = []
    for item in items:
        try:
            if isinstance(item.raw, UserError):
                raise item.raw
            inputs.append(preprocessing(_CHECKS[_form(preprocessing)](item.raw, item.name)))
            errors.append(None)
        except UserError as error:
            # Of an array that is one of a file's, its own message doesn't say which.
            text = str(error)
            errors.append(text if text.startswith(item.name) else f"{item.name}: {text}")
    fatal = bool(items) and items[-1].last
    kept = [item._replace(raw=None) for item in items]
    return Prepared(kept, errors, fatal, *(pad(inputs) if inputs else (None, None)))


def items_from(inputs: Any, preprocessing: Preprocessing) -> Iterator[Item]:
    """Name the inputs of a call from Python; a single one stands for a list of one.

    Args:
        inputs: one, or any iterable of them: paths; images of Pillow, arrays or tensors; strings, which are texts for a
            model of texts and paths for any other; pairs of strings for a model of pairs.
        preprocessing: of the model.
    """
    form = _form(preprocessing)
    single = isinstance(inputs, str | bytes | Path | Image.Image) or (
        inputs.ndim <= _DIMENSIONS.get(form, 0)
        if isinstance(inputs, np.ndarray | Tensor)
        else not _is_iterable(inputs) or (form == PAIRS and _is_pair(inputs))
    )
    listed: Iterable[Any] = [inputs] if single else inputs
    for place, raw in enumerate(listed):
        if isinstance(raw, str) and preprocessing.kind != "texts":
            raw = Path(raw)
        yield Item(str(raw) if isinstance(raw, Path) else f"{place}", raw)


def _is_iterable(inputs: Any) -> bool:
    # Not by its type: what has a __getitem__ alone, as many data sets, is iterable, too.
    try:
        iter(inputs)
    except TypeError:
        return False
    return True


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of `size` items, the last one of what is left."""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


_PIXELS = ("uint8", "float16", "bfloat16", "float32", "float64")
"""Types of the values of images as arrays and tensors."""

_DIMENSIONS = {"images": 3, "point clouds": 2}
"""Of one sample as an array."""


PAIRS = "pairs of texts"


def _form(preprocessing: Preprocessing) -> str:
    """Name the form of the raw inputs: the kind of the preprocessing, or pairs of texts."""
    return PAIRS if isinstance(preprocessing, TextPreprocessing) and preprocessing.pair else preprocessing.kind


def _is_pair(raw: Any) -> bool:
    return isinstance(raw, tuple | list) and len(raw) == 2 and all(isinstance(text, str) for text in raw)


def _pair(raw: Any, name: str) -> tuple[str, str]:
    if not _is_pair(raw):
        found = f"{len(raw)} texts" if isinstance(raw, tuple | list) else f"a {type(raw).__name__}"
        raise UserError(f"{name}: {found}; the model takes two: a table with two columns, or a tab between them")
    return _text(raw[0], name), _text(raw[1], name)


def _text(raw: Any, name: str) -> str:
    text = read_utf8(raw) if isinstance(raw, Path) else raw
    if not isinstance(text, str):
        raise UserError(f"{name}: a {type(text).__name__}; give text")
    if not text.strip():
        raise UserError(f"{name}: an empty text; give one with words")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: half of a surrogate pair at character {error.start}; repair it") from None
    return text


def _image(raw: Any, name: str) -> Any:
    if isinstance(raw, Path | Image.Image):
        return raw
    if not isinstance(raw, np.ndarray | Tensor):
        raise UserError(f"{name}: a {type(raw).__name__}; give a path, an image of Pillow, an array or a tensor")
    if isinstance(raw, np.ndarray):
        raw = raw.astype(raw.dtype.newbyteorder("="))
    if str(raw.dtype).removeprefix("torch.") not in _PIXELS:
        raise UserError(f"{name}: values of {raw.dtype}; give uint8, or floats from 0 to 1")
    pixels = raw.detach().cpu() if isinstance(raw, Tensor) else torch.from_numpy(raw)
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif pixels.ndim == 3 and isinstance(raw, np.ndarray) and pixels.shape[-1] in (1, 3):
        pixels = pixels.permute(2, 0, 1)
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or min(pixels.shape[1:]) < 2:
        raise UserError(f"{name}: {tuple(raw.shape)}; an array is (H, W) or (H, W, 1 or 3), a tensor (1 or 3, H, W)")
    if pixels.dtype == torch.uint8:
        return pixels
    if not (pixels.min() >= 0 and pixels.max() <= 1):
        raise UserError(f"{name}: {pixels.dtype} from {pixels.min():.3g} to {pixels.max():.3g}; give uint8, or 0 to 1")
    return pixels.float()


def _cloud(raw: Any, name: str) -> Any:
    if not isinstance(raw, Path | np.ndarray | Tensor):
        raise UserError(f"{name}: a {type(raw).__name__}; give a path, an array or a tensor")
    return raw


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "texts": _text,
    PAIRS: _pair,
    "images": _image,
    "point clouds": _cloud,
}
