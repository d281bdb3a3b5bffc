"""The record of a conversion in the configuration of a model of transformers, which is saved with the model."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from sinkformer_pl.conversion.core import ConvertedCore
from sinkformer_pl.errors import UserError

KEY = "sinkformer_pl"
"""Attribute of the configuration: {"layers": {name: {"normalization", "attention_dropout"}}, "before": the attention
implementation of before the conversion}.
"""


def record(model: PreTrainedModel, module: nn.Module, core: ConvertedCore) -> None:
    """Write down that an attention has a core.

    Args:
        model: has the configuration.
        module: the attention.
        core: of it.
    """
    config: Any = model.config
    known = getattr(config, KEY, None) or {"layers": {}, "before": config._attn_implementation}
    converted = {"normalization": core.spec, "attention_dropout": core.attention_dropout}
    setattr(config, KEY, {**known, "layers": {**known["layers"], _name(model, module): converted}})


def forget(model: PreTrainedModel, module: nn.Module) -> str | None:
    """Take an attention out of the record.

    Returns:
        The attention implementation of before, if it was the last one.
    """
    config: Any = model.config
    known = getattr(config, KEY)
    layers = {name: converted for name, converted in known["layers"].items() if name != _name(model, module)}
    if layers:
        setattr(config, KEY, {**known, "layers": layers})
        return None
    delattr(config, KEY)
    return str(known["before"])


def _name(model: PreTrainedModel, module: nn.Module) -> str:
    return next(name for name, part in model.named_modules() if part is module)


def recorded(model: PreTrainedModel) -> dict[str, Mapping[str, Any]]:
    """Return what `save_pretrained` wrote of the conversion, by name of the layer; taken out of the configuration.

    Raises:
        UserError: there is nothing, or a layer whose normalization was made by what can't be saved.
    """
    layers = (getattr(model.config, KEY, None) or {}).get("layers")
    if not layers:
        raise UserError(f"{type(model).__name__}: its config.json tells of no conversion; use convert")
    for name, converted in layers.items():
        if converted["normalization"] is None:
            raise UserError(
                f"{name} was converted by a function, which can't be saved; convert it again: convert(model, ..., "
                f"layers={name!r})"
            )
    delattr(model.config, KEY)
    return dict(layers)


def load_learned(model: PreTrainedModel, wanted: Mapping[str, Tensor], folder: str | Path | None) -> None:
    """Load what normalizations have learned, which `from_pretrained` leaves out.

    Args:
        model: knows where it was loaded from.
        wanted: tensors of the model by name, which get the values.
        folder: where the weights are; None is where the model was loaded from.

    Raises:
        UserError: a tensor isn't there, or not of this shape.
    """
    if not wanted:
        return
    folder = str(folder or model.name_or_path)
    saved = dict(_tensors(folder))
    for name, source in _matched(list(wanted), list(saved), folder).items():
        if saved[source].shape != wanted[name].shape:
            raise UserError(f"{folder}: {source} is {tuple(saved[source].shape)}, not {tuple(wanted[name].shape)}")
        wanted[name].detach().copy_(saved[source])


def _tensors(folder: str) -> Iterator[tuple[str, Tensor]]:
    index = cached_file(folder, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    parts = {SAFE_WEIGHTS_NAME} if index is None else set(json.loads(Path(index).read_text())["weight_map"].values())
    for part in sorted(parts):
        with safe_open(str(cached_file(folder, part)), "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                if ".core." in name:
                    yield name, file.get_tensor(name)


def _matched(wanted: list[str], saved: list[str], folder: str) -> dict[str, str]:
    """Find the saved name of each tensor; transformers may rename, add or take away what stands in front."""
    found = {name: [other for other in saved if _same(name, other)] for name in wanted}
    if all(len(others) == 1 for others in found.values()):
        return {name: others[0] for name, others in found.items()}
    wanted, saved = sorted(wanted, key=_place), sorted(saved, key=_place)
    if [_place(name)[1] for name in wanted] != [_place(name)[1] for name in saved]:
        missing = next(name for name, others in found.items() if len(others) != 1)
        raise UserError(f"{folder}: no {missing} among the weights; convert the model anew")
    return dict(zip(wanted, saved, strict=True))


def _same(one: str, other: str) -> bool:
    """Tell whether two names are the same but for what stands in front of one of them, such as a prefix "bert."."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")


def _place(name: str) -> tuple[list[int], str]:
    """Return the numbers in the name of a layer, and what its core calls the tensor."""
    layer, _, tail = name.partition(".core.")
    return [int(number) for number in re.findall(r"\d+", layer)], tail
