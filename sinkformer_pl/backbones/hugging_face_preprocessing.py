"""Preprocessing of a pretrained model of transformers, read off the files beside its weights."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sinkformer_pl.errors import UserError
from sinkformer_pl.locations import locate

RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Numbers of Pillow."""


def preprocessing_of(name: str, network: Any) -> dict[str, Any] | None:
    """Return what the inputs of a model are made with, as `Backbone.preprocessing`; None, and a warning, if unknown.

    Args:
        name: of the model, as of `HuggingFaceBackbone`.
        network: the model.

    Raises:
        UserError: a file that can't be read.
    """
    if network.main_input_name == "pixel_values":
        file, read, how = "preprocessor_config.json", _of_images, "mean and scale are those of the training images"
    else:
        file, read, how = "tokenizer.json", _of_texts, "give data.tokenizer, or one is learnt from the training texts"
    path = _beside(locate(name), file)
    if path is None:
        warnings.warn(
            f"model.backbone.name {name}: no {file} there, so how its inputs were made isn't known: {how}",
            UserWarning,
            stacklevel=3,
        )
        return None
    try:
        return read(path)
    except UserError:
        raise
    except Exception as error:  # Of two libraries and the system.
        raise UserError(f"{path}: it can't be read ({error}); give a model with a sound {file}") from None


def _beside(name: str, file: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(
        name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)


def _of_texts(path: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Of texts and pairs alike.
    return {"kind": "texts", "tokenizer": tokenizer.to_str(), "lowercase": False, "pair": None}


def _of_images(path: Path) -> dict[str, Any]:
    known = json.loads(path.read_text(encoding="utf-8"))
    normalized = known.get("do_normalize", True)
    mean, std = (known.get(key) if normalized else None for key in ("image_mean", "image_std"))
    return {
        "kind": "images",
        "mean": [0.0] * 3 if mean is None else [float(value) for value in mean],
        "std": [1.0] * 3 if std is None else [float(value) for value in std],
        "interpolation": RESAMPLING.get(known.get("resample", 2), "bilinear"),
        **_framing(known),
    }


def _framing(known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the share of a resized image that is cut out, and whether it keeps its proportions."""
    size, crop = (_sides(known.get(key)) for key in ("size", "crop_size"))
    if known.get("do_center_crop") and crop:
        shortest = size.get("shortest_edge") or size.get("height") or crop["height"]
        return {"crop_pct": min(crop["height"] / shortest, 1.0), "crop_mode": "center"}
    return {"crop_pct": 1.0, "crop_mode": "squash" if "height" in size else "center"}


def _sides(size: Any) -> dict[str, int]:
    """Return a size, which older files have as one number."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    return dict(size) if isinstance(size, Mapping) else {}
