"""A trained model with everything between a raw input and a named class."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkformer_pl.data.learnt import Learnt, learnt_of
from sinkformer_pl.diagnostics.capture import LayerAttention, attention_of
from sinkformer_pl.diagnostics.tokens import tokens_of
from sinkformer_pl.errors import UserError
from sinkformer_pl.factories import readable
from sinkformer_pl.inference.attention import Attention, speller
from sinkformer_pl.inference.devices import device_from
from sinkformer_pl.inference.exported import READERS, ExportedNetwork, open_exported, read_weights
from sinkformer_pl.inference.inputs import Prepared, in_batches, items_from, prepare
from sinkformer_pl.inference.results import Predictions, ranked
from sinkformer_pl.normalizations import load_plugins
from sinkformer_pl.tasks import Classifier
from sinkformer_pl.tasks.outputs import probabilities_of
from sinkformer_pl.training.checkpoint_content import CONFIG_KEY, learnt_from
from sinkformer_pl.training.checkpoint_file import read_checkpoint
from sinkformer_pl.training.checkpoint_match import require_match, require_task


class Outputs(NamedTuple):
    """Outputs of a network for a batch, on its device.

    Attributes:
        features: (B, D) of the backbone.
        probabilities: (B, C) float32; rows sum to 1, but of a multi-label model.
    """

    features: Tensor
    probabilities: Tensor


class TrainedModel:
    """A classifier with its preprocessing and class names; `load` makes it.

    Attributes:
        network: the classifier, in evaluation mode; or an exported one.
        out_dim: width of the features.
        classes: class names in the order of its outputs.
        multi_label: whether an input has any number of them.
        preprocessing: makes the network's input of a raw one.
        device: of the network.
        plugins: modules that its classes need.
        text_columns: of the texts in the tables that it was trained on: one, or two of pairs.
        header: whether the first row of these names the columns.
    """

    def __init__(
        self,
        network: Classifier | ExportedNetwork,
        learnt: Learnt,
        device: torch.device | str | None = None,
        *,
        plugins: Sequence[str] = (),
        text_columns: Sequence[str] = ("text",),
        header: bool = True,
    ) -> None:
        """Move the network to a device; None is the GPU if there is one, else the CPU."""
        self.network = network
        if isinstance(network, ExportedNetwork):
            self.device, self.out_dim = torch.device("cpu"), network.out_dim
        else:
            self.device = device_from(device)
            self.out_dim = network.backbone.out_dim
            network.eval().to(self.device)
        self.classes, self.preprocessing = learnt.classes, learnt.preprocessing
        self.plugins, self.text_columns, self.header = tuple(plugins), tuple(text_columns), header
        self.multi_label: bool = network.hparams.get("multi_label", False)

    def predict(
        self, inputs: Any, *, top: int | None = None, threshold: float | None = None, batch_size: int = 32
    ) -> Predictions:
        """Return the classes of inputs with their probabilities.

        Args:
            inputs: one, or any iterable of them. Paths of files; images of Pillow; arrays (H, W, 3) or tensors
                (3, H, W) of images, uint8 or float in [0, 1]; arrays or tensors (N, 3 or more) of clouds; strings,
                which are texts for a model of texts and paths for any other; pairs of strings for a model of pairs.
            top: how many classes of each are kept; None for all.
            threshold: of a multi-label model the probability above which a class holds; None is one half.
            batch_size: how many go through the network at once; ragged ones are padded.

        Raises:
            UserError: an input that can't be read, or that is none for this model; a number that isn't 1 or more; a
                threshold of a model of one class an input.
        """
        _require_count("top", top)
        threshold = self.threshold(threshold)
        batches = [
            ranked(names, self.classes, outputs.probabilities, top, threshold)
            for names, outputs in self._outputs(inputs, batch_size)
        ]
        return Predictions([prediction for batch in batches for prediction in batch])

    def threshold(self, given: float | None) -> float | None:
        """Return the probability above which a class holds; None for a model of one class an input.

        Args:
            given: by the user; None for the default, one half.

        Raises:
            UserError: one of a model without, or beyond 0 and 1.
        """
        if given is None:
            return 0.5 if self.multi_label else None
        if not self.multi_label:
            raise UserError(f"threshold {given}: the model gives an input one class; leave it out")
        if not 0 <= given <= 1:
            raise UserError(f"threshold {given}: give a probability, 0 to 1")
        return given

    def features(self, inputs: Any, *, batch_size: int = 32) -> Tensor:
        """Return what the head classifies, (n, D) float32 on the CPU; arguments are those of `predict`."""
        batches = [outputs.features.float().cpu() for _, outputs in self._outputs(inputs, batch_size)]
        return torch.cat(batches) if batches else torch.empty(0, self.out_dim)

    def attention(self, input: Any) -> Attention:
        """Return the attention of every layer and head on one input, of the kinds that `predict` takes.

        Raises:
            UserError: an input that can't be read, or a network without an `AttentionCore`.
        """
        items = list(items_from(input, self.preprocessing))
        if len(items) != 1:
            raise UserError(f"attention is shown of one input, not of {len(items)}; give one")
        prepared = _sound(prepare(items, self.preprocessing))
        layers = self.attention_of(prepared)
        tokens = tokens_of(self._shown(), *self._moved(prepared), speller(self.preprocessing))
        probabilities = self.run(prepared).probabilities
        [prediction] = ranked([items[0].name], self.classes, probabilities, threshold=self.threshold(None))
        return Attention(prediction, layers, tokens[0])

    @torch.inference_mode()
    def run(self, prepared: Prepared) -> Outputs:
        """Run the network on a batch whose inputs aren't None."""
        inputs, mask = self._moved(prepared)
        features, logits = self.network.outputs(inputs, mask)
        return Outputs(features, probabilities_of(logits, multi_label=self.multi_label))

    def attention_of(self, prepared: Prepared) -> list[LayerAttention]:
        """Return the attention of every layer on a batch whose inputs aren't None.

        Raises:
            UserError: an exported network, or one without an `AttentionCore`.
        """
        network = self._shown()
        layers = attention_of(network, *self._moved(prepared))
        if not layers:
            name = type(network.backbone).__name__
            raise UserError(f"{name} has no AttentionCore to look at: compose one (docs/extend.md)")
        return layers

    def on(self, device: torch.device) -> "TrainedModel":
        """Return a copy on another device, or the model itself on its own."""
        if device == self.device or isinstance(self.network, ExportedNetwork):
            return self
        learnt = Learnt(self.classes, self.preprocessing)
        network = copy.deepcopy(self.network)
        return TrainedModel(
            network, learnt, device, plugins=self.plugins, text_columns=self.text_columns, header=self.header
        )

    def _outputs(self, inputs: Any, batch_size: int) -> Iterator[tuple[list[str], Outputs]]:
        _require_count("batch_size", batch_size)
        for items in in_batches(items_from(inputs, self.preprocessing), batch_size):
            prepared = _sound(prepare(items, self.preprocessing))
            yield [item.name for item in items], self.run(prepared)

    def _shown(self) -> Classifier:
        if isinstance(self.network, ExportedNetwork):
            raise UserError("an exported program doesn't show its attention; load the checkpoint or .safetensors file")
        return self.network

    def _moved(self, prepared: Prepared) -> tuple[Tensor, Tensor | None]:
        assert prepared.inputs is not None
        inputs = prepared.inputs.to(self.device, non_blocking=True)
        return inputs, None if prepared.mask is None else prepared.mask.to(self.device, non_blocking=True)

    def __repr__(self) -> str:
        backbone, normalization = (readable(self.network.hparams[name]) for name in ("backbone", "normalization"))
        return (
            f"{backbone.partition('(')[0]} under {normalization}, for {self.preprocessing.kind}, on "
            f"{self.device}: {', '.join(self.classes[:10])}{', ...' if len(self.classes) > 10 else ''}"
        )

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>"


def load(path: str | Path, *, device: torch.device | str | None = None, plugins: Sequence[str] = ()) -> TrainedModel:
    """Load a trained classifier with everything that it needs for new inputs.

        model = sinkformer_pl.load("best.ckpt")
        model.predict(["cat.jpg", "dog.jpg"])

    Classes that the checkpoint names are imported, those of its plugins first.

    Args:
        path: a checkpoint that `fit` wrote, or one made in Python by a Trainer with a `ClassificationData`; or a file
            of the command `export`.
        device: where the network runs; None is the GPU if there is one, else the CPU. Programs (.pt2, .onnx) run on
            the CPU.
        plugins: modules with classes of your own, imported before those that the checkpoint names.

    Raises:
        UserError: no such file, a damaged one, a checkpoint of another task, or an older one without the preprocessing;
            no such device, or a program on another one than the CPU.
    """
    path = Path(path)
    if path.suffix in READERS:
        if device is not None and device_from(device).type != "cpu":
            raise UserError(f"{path}: runs on the CPU, not on {device}; load the checkpoint or .safetensors file there")
        program = open_exported(path)
        return TrainedModel(program, learnt_of(program.about), **_of_tables(program.about))
    if path.suffix == ".safetensors":
        weights, known = read_weights(path)
        content = {"state_dict": weights, "hyper_parameters": known["hyper_parameters"]}
        needed, of_tables = known.get("plugins", []), _of_tables(known)
    else:
        content = read_checkpoint(path)
        known = learnt_from(content)
        needed, of_tables = _remembered(content.get(CONFIG_KEY) or {})
    needed = list(dict.fromkeys([*plugins, *needed]))
    load_plugins(needed)
    require_task(content, Classifier, path)
    try:
        learnt = learnt_of(known)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    network = Classifier(**content["hyper_parameters"])
    require_match(content, network, path)
    network.load_state_dict(content["state_dict"])
    return TrainedModel(network, learnt, device, plugins=needed, **of_tables)


def _of_tables(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an exported file knows of the tables of its training, as arguments of the model."""
    return {name: about[name] for name in ("text_columns", "header") if name in about}


def _remembered(config: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the plugins in a training's configuration, and what it says of tables of texts."""
    plugins, data = config.get("plugins") or [], config.get("data")
    arguments = (data.get("init_args") if isinstance(data, Mapping) else None) or {}
    column, columns = arguments.get("text"), arguments.get("text_columns")
    if not isinstance(columns, list):
        columns = [column if isinstance(column, str | int) else "text"]
    tables = {"text_columns": [str(name) for name in columns], "header": arguments.get("header") is not False}
    return [plugins] if isinstance(plugins, str) else plugins, tables


def _require_count(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, Integral) and int(value) >= 1):
        raise UserError(f"{name} is {value!r}: give a whole number, 1 or more")


def _sound(prepared: Prepared) -> Prepared:
    for error in prepared.errors:
        if error is not None:
            raise UserError(error)
    return prepared
