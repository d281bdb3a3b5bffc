"""Write a trained model for use without this package, and compare what was written with it."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sinkformer_pl.data.texts.preprocessing import TextPreprocessing
from sinkformer_pl.errors import UserError
from sinkformer_pl.factories import readable
from sinkformer_pl.inference.exported import NAMES
from sinkformer_pl.inference.model import TrainedModel, load
from sinkformer_pl.models.neighbours import plain_distances, plain_farthest_points
from sinkformer_pl.ops.sinkhorn_attention.plain import plain_sinkhorn_attention
from sinkformer_pl.tasks import Classifier
from sinkformer_pl.training.atomic_file import replacing
from sinkformer_pl.training.weights_file import KEY, needs

OPSET = 20
"""Version of ONNX's operators."""

TOLERANCE = 1e-5
"""Largest error of outputs in float32, relative to the largest output."""

TOKENIZER = "tokenizer.json"


class _Network(nn.Module):
    """Map a batch to features and logits: the part of a classifier that is exported."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.backbone, self.head = classifier.backbone, classifier.head

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        features = self.backbone(inputs, mask)
        return features, self.head(features)


class Example(NamedTuple):
    """A batch of samples.

    Attributes:
        inputs: (B, ...).
        mask: (B, N) bool of the real tokens; None for images.
    """

    inputs: Tensor
    mask: Tensor | None


def export(model: TrainedModel, path: Path, batches: Sequence[Example]) -> float:
    """Write a model to a file, and compare its outputs with the model's.

    Args:
        model: on the CPU, in float32.
        path: `.safetensors`, weights and configuration; `.pt2`, a program of `torch.export`; `.onnx`. The tokenizer of
            a model of texts is written beside it.
        batches: samples; the first one, of at least two, is what programs are traced with.

    Returns:
        The largest error of the outputs on the batches, relative to the largest output.

    Raises:
        UserError: an unknown suffix, a missing library, a network that the format can't hold, or an error of more than
            `TOLERANCE`; nothing is left at `path`.
    """
    if path.suffix not in WRITERS:
        raise UserError(f"{path}: the formats are {', '.join(WRITERS)}; give a file with one of these suffixes")
    network, temporary = model.network, path.with_name(f".{path.stem}-unchecked{path.suffix}")
    if not isinstance(network, Classifier):
        raise UserError("an exported program can't be exported again; give the checkpoint or .safetensors file")
    try:
        try:
            with _quiet():
                WRITERS[path.suffix](network, temporary, _metadata(model, network), batches[0])
        except (UserError, OSError):
            raise
        except Exception as error:
            raise _refusal(network, path, error) from error
        difference = _difference(model, load(temporary), batches)
        if not difference <= TOLERANCE:
            raise UserError(
                f"{path}: its outputs differ from the model's by {difference:.1e}, more than {TOLERANCE:.0e}, so it "
                "isn't kept; choose another format"
            )
        with contextlib.ExitStack() as beside:
            if isinstance(model.preprocessing, TextPreprocessing):
                file = beside.enter_context(replacing(path.with_name(TOKENIZER)))
                file.write(model.preprocessing.tokenizer)
                file.flush()
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return difference


def _metadata(model: TrainedModel, network: Classifier) -> dict[str, str]:
    """Return what a program's user needs beside it, as one JSON text."""
    described = {
        "classes": list(model.classes),
        "multi_label": model.multi_label,
        "preprocessing": model.preprocessing.plain(),
        "tokens": network.backbone.token_limits,
        "out_dim": network.backbone.out_dim,
        "hyper_parameters": dict(network.hparams),
        "plugins": list(model.plugins),
        "text_columns": list(model.text_columns),
        "header": model.header,
        "versions": {name: version(name) for name in ("sinkformer_pl", "torch")},
    }
    return {KEY: json.dumps(described, ensure_ascii=False)}


def _write_safetensors(network: Classifier, path: Path, metadata: dict[str, str], _: Example) -> None:
    needs("safetensors", path)
    from safetensors.torch import save

    # Its save_file would let no other user read the file.
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, metadata))


def _write_program(network: Classifier, path: Path, metadata: dict[str, str], example: Example) -> None:
    # Given a path it hides why a file can't be written, such as a full disk.
    written = io.BytesIO()
    torch.export.save(_program(network, example), written, extra_files=metadata)
    path.write_bytes(written.getbuffer())


def _write_onnx(network: Classifier, path: Path, metadata: dict[str, str], example: Example) -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        needs(library, path)
    given = list(NAMES if example.mask is not None else NAMES[:1])
    written = torch.onnx.export(
        _program(network, example), input_names=given, output_names=["features", "logits"], opset_version=OPSET,
        dynamo=True, verbose=False,
    )  # fmt: skip
    assert written is not None
    written.model.metadata_props.update(metadata)
    written.save(path)


def _program(network: Classifier, example: Example) -> ExportedProgram:
    """Trace the network, with this package's operators in plain operations; sizes of batches and samples may vary."""
    batch = Dim("batch")
    arguments: tuple[Tensor, ...] = (example.inputs,)
    sizes: tuple[dict[int, Any], ...] = ({0: batch},)
    if example.mask is not None:
        least, most = network.backbone.token_limits
        arguments, sizes = (example.inputs, example.mask), ({0: batch, 1: Dim("tokens", min=least, max=most)},) * 2
    with torch.no_grad():
        program = torch.export.export(_Network(network).eval(), arguments, dynamic_shapes=sizes)
        return program.run_decompositions(PLAIN)


PLAIN: dict[Any, Callable[..., Any]] = {
    torch.ops.sinkformer_pl.sinkhorn_attention.default: plain_sinkhorn_attention,
    torch.ops.sinkformer_pl.farthest_points.default: plain_farthest_points,
    torch.ops.aten.cdist.default: plain_distances,
}
"""Functions in the place of operators that a program has to do without."""

WRITERS: dict[str, Callable[[Classifier, Path, dict[str, str], Example], None]] = {
    ".safetensors": _write_safetensors,
    ".pt2": _write_program,
    ".onnx": _write_onnx,
}


def _refusal(network: Classifier, path: Path, error: Exception) -> UserError:
    while error.__cause__ is not None:  # the exporters tell of their steps first
        error = error.__cause__  # type: ignore[assignment]
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    name = f"{type(network.backbone).__name__} under {readable(network.hparams['normalization'])}"
    return UserError(f"{name} can't be a {path.suffix} file: {reason}; .safetensors holds every model")


@torch.inference_mode()
def _difference(wanted: TrainedModel, found: TrainedModel, batches: Sequence[Example]) -> float:
    errors = []
    for batch in batches:
        outputs = wanted.network.outputs(*batch), found.network.outputs(*batch)
        for a, b in zip(*outputs, strict=True):
            errors.append((a - b).abs().max() / a.abs().max().clamp(min=torch.finfo(a.dtype).tiny))
    return float(torch.stack(errors).max())  # NaN if one is, as Python's max isn't


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes from the screen."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
