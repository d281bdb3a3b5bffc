"""Networks in the files that `export` writes."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's own documentation uses)
from torch import Tensor

from sinkformer_pl.errors import UserError
from sinkformer_pl.tasks.outputs import NetworkOutputs
from sinkformer_pl.training.weights_file import KEY, needs, read_safetensors

NAMES = ("inputs", "mask")
"""Of a program's arguments; the second is only there where samples vary in size."""


class ExportedNetwork:
    """A network in a file that `export` wrote: `outputs` of a batch, on the CPU.

    Attributes:
        about: metadata of the file.
        hparams: of the classifier.
        out_dim: width of the features.

    Args:
        run: maps inputs (B, ...) and the bool mask (B, N), None for images, to features and logits, float32.
        about: metadata of the file.
    """

    def __init__(self, run: Callable[[Tensor, Tensor | None], Sequence[Tensor]], about: Mapping[str, Any]) -> None:
        self._run = run
        self.about = about
        self.hparams = about["hyper_parameters"]
        self.out_dim = about["out_dim"]

    def outputs(self, inputs: Tensor, mask: Tensor | None = None) -> NetworkOutputs:
        """Return features (B, D) and logits (B, C); without a mask every token of a text or cloud is real."""
        if self.about["preprocessing"]["kind"] != "images":
            mask = torch.ones(inputs.shape[:2], dtype=torch.bool) if mask is None else mask
            missing = max(self.about["tokens"][0] - inputs.shape[1], 0)
            inputs = F.pad(inputs, (0, 0) * (inputs.ndim - 2) + (0, missing))
            mask = F.pad(mask, (0, missing))
        return NetworkOutputs(*self._run(inputs, mask))


def open_exported(path: Path) -> ExportedNetwork:
    """Open a program that `export` wrote, of either format.

    Raises:
        UserError: no such file, a damaged one, or one that another program wrote.
    """
    run, metadata = _opened(path, READERS[path.suffix])
    return ExportedNetwork(run, metadata)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights in a safetensors file that `export` wrote, by name, and its metadata.

    Raises:
        UserError: as of `open_exported`.
    """
    return _opened(path, read_safetensors)


def _opened(path: Path, read: Callable[[Path], tuple[Any, Mapping[str, str]]]) -> tuple[Any, dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        content, metadata = read(path)
        return content, json.loads(metadata[KEY])
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{path}: damaged, or not a file of the export command ({reason}); export it again") from error


def _read_program(path: Path) -> tuple[Any, Mapping[str, str]]:
    metadata = {KEY: ""}
    module = torch.export.load(path, extra_files=metadata).module()

    @torch.inference_mode()
    def run(inputs: Tensor, mask: Tensor | None) -> Sequence[Tensor]:
        return module(inputs) if mask is None else module(inputs, mask)

    return run, metadata


def _read_onnx(path: Path) -> tuple[Any, Mapping[str, str]]:
    needs("onnxruntime", path)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor | None) -> Sequence[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=False) if tensor is not None}
        return [torch.from_numpy(output) for output in session.run(None, given)]

    return run, session.get_modelmeta().custom_metadata_map


READERS = {".pt2": _read_program, ".onnx": _read_onnx}
"""By suffix."""
