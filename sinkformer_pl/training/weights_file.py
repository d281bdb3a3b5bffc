"""Read weights, whatever file they are in: a checkpoint, safetensors, a state_dict."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sinkformer_pl.errors import UserError
from sinkformer_pl.training.checkpoint_content import is_weights, learnt_from, require_form
from sinkformer_pl.training.checkpoint_file import load_file

KEY = "sinkformer_pl"
"""Entry of an exported file's metadata: classes, preprocessing, hyper-parameters and versions as a JSON text."""

PROGRAMS = (".onnx", ".pt2")
"""Suffixes of exported files whose weights have no names."""


class Weights(NamedTuple):
    """Weights by name, and what their file says of them.

    Attributes:
        tensors: by name, on the CPU.
        hyper_parameters: of the task, plain data; empty where the file doesn't know them.
        learnt: what the data of their training had learnt, as `learnt_from` gives it; likewise.
    """

    tensors: dict[str, Tensor]
    hyper_parameters: Mapping[str, Any]
    learnt: Mapping[str, Any]


def read_weights(path: str | Path) -> Weights:
    """Read the weights of a checkpoint, of a safetensors file, or of a state_dict that `torch.save` wrote.

    Raises:
        UserError: no such file, a damaged one, one without weights by name, or one with objects that could run code.
    """
    path = Path(path)
    if path.suffix in PROGRAMS:
        raise UserError(f"{path}: a program, whose weights have no names; give a checkpoint or a .safetensors file")
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        about = json.loads(metadata.get(KEY) or "{}")
        return Weights(tensors, about.get("hyper_parameters", {}), about)
    content = load_file(path)
    if isinstance(content, Mapping) and "hyper_parameters" in content:
        require_form(content, path)
        return Weights(_tensors(content["state_dict"]), content["hyper_parameters"], learnt_from(content))
    state_dict = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not state_dict or not is_weights(state_dict):
        raise UserError(
            f"{path}: it holds no weights by name; give a checkpoint, a .safetensors file, or a state_dict that "
            "torch.save wrote"
        )
    return Weights(_tensors(state_dict), {}, {})


def _tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state_dict.items() if isinstance(value, Tensor)}


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, and its metadata.

    Raises:
        UserError: no such file, a damaged one, or no library to read it with.
    """
    needs("safetensors", path)
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged, or no safetensors file ({error}); use another copy") from None


def needs(library: str, path: Path) -> None:
    """Raise a UserError if a library isn't installed."""
    if find_spec(library) is None:
        raise UserError(f"{path}: {path.suffix} needs {library}: pip install 'sinkformer_pl[export]'")
