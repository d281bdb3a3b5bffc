"""A model of timm as a backbone."""

import contextlib
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from sinkformer_pl.conversion import convert
from sinkformer_pl.conversion.layers import Layers
from sinkformer_pl.errors import UserError, did_you_mean, first_line
from sinkformer_pl.locations import locate
from sinkformer_pl.models.backbone import Backbone
from sinkformer_pl.models.tokens import Tokens, describe_patches
from sinkformer_pl.normalizations.contract import NormalizationFactory

KEY = "model.backbone"

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of weights in a folder, as timm and the hub have them."""

OWN = ("img_size", "in_chans", "num_classes")
"""Arguments of timm that are ones of the backbone, or none."""

WRAPPED = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which programs save a state_dict, the first that is there."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


class TimmBackbone(Backbone):
    """An image model of timm without its head, under a normalization of its attention.

    Its attention is converted as by `sinkformer_pl.convert`. Features are what timm gives to its head, after its own
    pooling. A checkpoint has the weights, and needs no other file. Data take over mean, standard deviation and the way
    of resizing that pretrained weights were trained with.

    Args:
        normalization: makes the normalization of each attention layer.
        name: of a model of timm, with its tag if weights are pretrained: "vit_tiny_patch16_224.augreg_in21k". Of
            "hf-hub:OWNER/NAME" the architecture is downloaded, too.
        pretrained: True for the weights of that name, in the cache of Hugging Face's hub or downloaded, unless
            HF_HUB_OFFLINE is 1; a .safetensors file or a state_dict that `torch.save` wrote, of which tensors alone are
            read; or a folder with such a file and the `config.json` of timm; "package:NAME/FOLDER" for one of an
            installed package.
        layers: the attention that is converted (`conversion.layers.Layers`); the rest keeps softmax. None is all that
            can be, and a warning names the others.
        image_size: side of the images in pixels, or (height, width); None is the model's own. Positions of pretrained
            weights are interpolated to another.
        channels: of the images.
        attention_dropout: share of the attention weights dropped in training; "keep" is the model's own.
        arguments: further ones of `timm.create_model`, such as {"drop_path_rate": 0.1}.

    Raises:
        UserError: timm isn't installed, or has no such model; arguments that the model refuses; weights that aren't
            there or don't fit.
        NotImplementedError: no layer can have the normalization, or one of `layers` can't.
    """

    def __init__(
        self,
        normalization: NormalizationFactory,
        name: str,
        pretrained: bool | str | Path = False,
        layers: Layers = None,
        image_size: int | Sequence[int] | None = None,
        channels: int = 3,
        attention_dropout: float | Literal["keep"] = "keep",
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        timm = _library()
        pretrained = pretrained if isinstance(pretrained, bool) else locate(pretrained)
        _require_known(timm, name)
        folder = _configuration(pretrained)
        saved = folder.get("model_args", {})
        image_size = saved.get("img_size") if image_size is None else image_size
        self._arguments = {name: value for name, value in saved.items() if name not in OWN} | dict(arguments or {})
        self._image_size, self._name = image_size, name
        given = dict(self._arguments)
        if image_size is not None:
            given["img_size"] = image_size if isinstance(image_size, int) else tuple(image_size)
        overlay = dict(folder.get("pretrained_cfg", {}))
        if not isinstance(pretrained, bool):
            # Tensors alone are read, and timm fits them as it fits its own.
            overlay |= {"state_dict": _read(Path(pretrained)), "source": "", "custom_load": False}
        network = _created(timm, name, pretrained, in_chans=channels, pretrained_cfg_overlay=overlay, **given)
        network.pretrained_cfg.pop("state_dict", None)
        size = network.pretrained_cfg["input_size"][1:] if image_size is None else image_size
        self.image_shape = (channels, *((size, size) if isinstance(size, int) else size))
        self.fixed_size = bool(network.pretrained_cfg.get("fixed_input_size")) or image_size is not None
        self.out_dim = getattr(network, "head_hidden_size", None) or network.num_features
        self._preprocessing = _preprocessing(timm, network, channels) if pretrained is not False else None
        self.network = convert(network, normalization, layers=layers, attention_dropout=attention_dropout)

    @property
    @override
    def saved_arguments(self) -> Mapping[str, Any]:
        size = self._image_size
        return {
            "pretrained": False,
            "image_size": size if size is None or isinstance(size, int) else list(size),
            "arguments": self._arguments,
        }

    @property
    @override
    def preprocessing(self) -> Mapping[str, Any] | None:
        return self._preprocessing

    @override
    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map images (B, channels, height, width) float to features (B, out_dim).

        Raises:
            UserError: images of another number of channels, or of another size where the model has one; no images; a
                mask, since no part of an image is padding.
        """
        name = self._name
        if mask is not None or inputs.ndim != 4 or not inputs.is_floating_point():
            raise UserError(
                f"{name} takes images (batch, channels, height, width) of a float dtype without a mask, got shape "
                f"{tuple(inputs.shape)} of {inputs.dtype}: choose another data module, or another model.backbone"
            )
        wrong = (
            tuple(inputs.shape[1:]) != self.image_shape if self.fixed_size else len(inputs[0]) != self.image_shape[0]
        )
        if wrong:
            channels, height, width = self.image_shape
            here = " x ".join(map(str, inputs.shape[1:]))
            raise UserError(
                f"images are {here} (channels x height x width), but {name} takes {channels} x {height} x {width}: set "
                f"data.channels to {channels} and data.image_size to [{height}, {width}], or {KEY}.channels and "
                f"{KEY}.image_size"
            )
        return self.network(inputs)

    @override
    def describe_tokens(self, inputs: Tensor, mask: Tensor | None = None) -> list[Tokens]:
        network: Any = self.network
        grid = getattr(getattr(network, "patch_embed", None), "grid_size", None)
        # Networks of stages merge their patches, or have windows of them.
        if grid is None or not hasattr(network, "num_prefix_tokens"):
            return super().describe_tokens(inputs, mask)
        return describe_patches(inputs, tuple(grid), leading=network.num_prefix_tokens)

    def resize_positions(self, saved: dict[str, Tensor], prefix: str, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Fit positions, and tables of relative ones, in a state_dict to this size of images, in place, as timm does.

        Args:
            saved: a state_dict.
            prefix: of this module in it.
            arguments: those of the backbone that the state_dict is of; shapes say it all.

        Returns:
            The names of what was changed, each with its old and new shape.
        """
        own = f"{prefix}network."
        state = {name.removeprefix(own): value for name, value in saved.items() if name.startswith(own)}
        fit = getattr(sys.modules[type(self.network).__module__], "checkpoint_filter_fn", None)
        resized: dict[str, str] = {}
        for name, value in (fit(dict(state), self.network) if fit and state else {}).items():
            if name in state and value.shape != state[name].shape:
                shapes = (" x ".join(map(str, each.shape)) for each in (state[name], value))
                resized[own + name], saved[own + name] = " to ".join(shapes), value
        return resized


def _library() -> Any:
    try:
        import timm
        import timm.data
    except ImportError:
        raise UserError("TimmBackbone needs timm: pip install 'sinkformer_pl[timm]'") from None
    return timm


def _require_known(timm: Any, name: str) -> None:
    architecture, _, tag = name.partition(".")
    if name.startswith("hf-hub:"):
        return
    if not timm.is_model(architecture):
        meant = did_you_mean(architecture, timm.list_models()) or "; timm.list_models() has them all"
        raise UserError(f"{KEY}.name {name}: timm {timm.__version__} has no such model{meant}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UserError(f"{KEY}.name {name}: no tag {tag}; {architecture} has {', '.join(tags) or 'none'}")


def _configuration(pretrained: bool | str | Path) -> dict[str, Any]:
    """Read what a folder says of its model: "model_args" and "pretrained_cfg"."""
    if isinstance(pretrained, bool) or not (file := Path(pretrained) / "config.json").is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {key: dict(found.get(key) or {}) for key in ("model_args", "pretrained_cfg")}
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{KEY}.pretrained {file}: no configuration of timm; give the file of the weights") from None


def _read(path: Path) -> dict[str, Tensor]:
    """Read the weights in a file, or in a folder."""
    if path.is_dir():
        found = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{KEY}.pretrained {path}: no {' or '.join(WEIGHTS)} there; give the file of the weights")
        path = found
    if not path.is_file():
        raise UserError(f"{KEY}.pretrained {path}: no such file or folder")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Of two libraries and the system.
        raise UserError(
            f"{KEY}.pretrained {path}: it can't be read as tensors alone ({first_line(error)}); give a .safetensors "
            "file, or a state_dict that torch.save wrote"
        ) from None
    tensors = next((loaded[key] for key in WRAPPED if isinstance(loaded.get(key), Mapping)), loaded)
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{KEY}.pretrained {path}: no state_dict; give a file with the weights of {KEY}.name")
    return {re.sub(r"^(_orig_mod\.|module\.)+", "", name): value for name, value in tensors.items()}


def _created(timm: Any, name: str, pretrained: bool | str | Path, **arguments: Any) -> Any:
    """Make a model without a head; refuse weights that leave some of it as it was."""
    said: list[str] = []
    try:
        with _overheard(said):
            model = timm.create_model(name, pretrained=pretrained is not False, num_classes=0, **arguments)
    except (RuntimeError, OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        if pretrained is True:
            remedy = (
                f"give {KEY}.pretrained as a file or folder, or have the hub's cache filled where there is a network"
            )
        elif pretrained is False:
            remedy = f"see {KEY}.name, image_size and arguments, or the documentation of timm.create_model"
        else:
            remedy = f"give the weights of {KEY}.name and its arguments"
        raise UserError(f"{KEY}: timm can't make {name}: {first_line(error)}; {remedy}") from None
    for line in said:
        if line.startswith("Missing keys"):
            names = line.partition("(")[2].partition(")")[0]
            raise UserError(f"{KEY}.pretrained {pretrained}: no weights for {names}; give those of {name}")
        if line.startswith("Unexpected keys"):
            names = line.partition("(")[2].partition(")")[0]
            warnings.warn(f"{KEY}.pretrained {pretrained}: left out of the file: {names}", UserWarning, stacklevel=4)
    return model


class _Collected(logging.Handler):
    """Append messages to a list."""

    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.said = said

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextlib.contextmanager
def _overheard(said: list[str]) -> Iterator[None]:
    """Collect what timm logs of weights, which it loads without an error where some are missing."""
    logger = logging.getLogger("timm.models._builder")
    handler = _Collected(said)
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


def _preprocessing(timm: Any, network: Any, channels: int) -> dict[str, Any]:
    """Return what timm evaluates a model's weights with, as plain data."""
    known = timm.data.resolve_model_data_config(network)
    if known["interpolation"] not in INTERPOLATIONS or known["crop_mode"] not in ("center", "squash"):
        warnings.warn(
            f"{KEY}.name: its weights were trained with interpolation {known['interpolation']} and crop_mode "
            f"{known['crop_mode']}; images are resized by bicubic interpolation and cut out of the centre",
            UserWarning,
            stacklevel=3,
        )
        known |= {"interpolation": "bicubic", "crop_mode": "center"}
    constants = {name: [float(value) for value in known[name]] for name in ("mean", "std")}
    if len(constants["mean"]) != channels:
        constants = {name: [sum(values) / len(values)] * channels for name, values in constants.items()}
    others = {name: known[name] for name in ("interpolation", "crop_pct", "crop_mode")}
    return {"kind": "images", **constants, **others}
