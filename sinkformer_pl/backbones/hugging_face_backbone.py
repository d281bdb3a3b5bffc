"""A model of Hugging Face's transformers as a backbone."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from sinkformer_pl.backbones.hugging_face_preprocessing import preprocessing_of
from sinkformer_pl.conversion import convert
from sinkformer_pl.conversion.layers import Layers
from sinkformer_pl.errors import UserError, first_line
from sinkformer_pl.locations import locate
from sinkformer_pl.models.backbone import Backbone
from sinkformer_pl.models.pooling import pool
from sinkformer_pl.models.tokens import Tokens, describe_patches, describe_tokens
from sinkformer_pl.normalizations.contract import NormalizationFactory

Reading = Literal["cls", "mean", "max", "model"]
"""Ways to read a sample out of its tokens: the first one; mean or maximum over them; "model", by what was pretrained
for it (its `pooler_output`)."""

UNUSED = ("architectures", "id2label", "label2id", "problem_type", "transformers_version", "sinkformer_pl")
"""Entries of a configuration that don't shape the network."""


class HuggingFaceBackbone(Backbone):
    """A pretrained encoder of texts or images under a normalization of its attention.

    The model is made by `AutoModel` in float32; of an encoder with a decoder it is the encoder. Its attention is
    converted as by `sinkformer_pl.convert`. A checkpoint keeps the configuration in the place of the name, and the
    weights are in it, so that it needs no other file.

    Data take over the model's own tokenizer, or mean and standard deviation of its images and the way of resizing. The
    numbers of the tokens at padding are of no account.

    Args:
        normalization: makes the normalization of each attention layer.
        name: folder that `save_pretrained` wrote, or a name on the hub, or "package:NAME/FOLDER" for the folder of an
            installed package. Where it isn't a folder it is downloaded unless HF_HUB_OFFLINE is 1.
        layers: the attention that is converted (`conversion.layers.Layers`); the rest keeps softmax. None is all that
            can be, and a warning names the others.
        pooling: see `Reading`.
        attention_dropout: share of the attention weights dropped in training; "keep" is the model's own. Under 0 they
            needn't be formed, which is faster.
        config: entries of a configuration, with "model_type", of a new network; in the place of a name.

    Raises:
        UserError: both or none of `name` and `config`; transformers isn't installed; no such model, or none that fits.
        NotImplementedError: no layer can have the normalization, or one of `layers` can't.
    """

    def __init__(
        self,
        normalization: NormalizationFactory,
        name: str | Path | None = None,
        layers: Layers = None,
        pooling: Reading = "mean",
        attention_dropout: float | Literal["keep"] = "keep",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (name is None) == (config is None):
            raise UserError("HuggingFaceBackbone: give either name, of a pretrained model, or config, of a new one")
        if pooling not in get_args(Reading):
            raise UserError(f"HuggingFaceBackbone.pooling {pooling!r}: give one of {', '.join(get_args(Reading))}")
        network = _new(config) if name is None else _pretrained(str(name))
        self._preprocessing = None if name is None else preprocessing_of(str(name), network)
        self._config = _plain(network.config)
        if network.config.is_encoder_decoder:
            network = network.get_encoder()
        network.config.use_cache = False
        self.out_dim = _width(network)
        self.pooling: Reading = pooling
        self.images = network.main_input_name == "pixel_values"
        if pooling != "model" and getattr(network, "pooler", None) is not None:
            # It would be trained by nothing.
            network.pooler = None
        self.token_limits = 1, None if self.images else _positions(network)
        # It comes in evaluation mode, which a trainer would keep.
        network.train()
        self.network = convert(network, normalization, layers=layers, attention_dropout=attention_dropout)

    @property
    @override
    def saved_arguments(self) -> Mapping[str, Any]:
        return {"name": None, "config": deepcopy(self._config)}

    @property
    @override
    def preprocessing(self) -> Mapping[str, Any] | None:
        return self._preprocessing

    def no_weight_decay(self) -> set[str]:
        """Return positions and class tokens, which don't decay by default."""
        return {name for name, _ in self.named_parameters() if "position_embedding" in name or "cls_token" in name}

    @override
    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map images (B, C, height, width), or token numbers (B, N) with a mask of the real ones, to (B, out_dim).

        Raises:
            UserError: inputs of another kind; more tokens than positions; in eager mode on the CPU a number outside of
                the vocabulary.
        """
        if not self.images and inputs.ndim == 2 and inputs.shape[1] == 0:
            inputs, mask = inputs.new_zeros(len(inputs), 1), inputs.new_zeros(len(inputs), 1, dtype=torch.bool)
        outputs = self._outputs(inputs, mask)
        if self.pooling == "model":
            if (pooled := getattr(outputs, "pooler_output", None)) is None:
                raise UserError(f"{type(self.network).__name__} has no pooling of its own: set model.backbone.pooling")
            return pooled
        return pool(outputs.last_hidden_state, None if self.images else mask, self.pooling)

    def _outputs(self, inputs: Tensor, mask: Tensor | None) -> Any:
        if self.images:
            if inputs.ndim != 4 or not inputs.is_floating_point():
                raise UserError(self._refusal("images (batch, channels, height, width) of a float dtype", inputs))
            size = getattr(self.network.config, "image_size", None)
            if isinstance(size, int) and inputs.shape[2:] != (size, size):
                raise UserError(
                    f"images are {inputs.shape[2]} x {inputs.shape[3]}, and {type(self.network).__name__} takes "
                    f"{size} x {size}: set data.image_size to {size}"
                )
            return self.network(pixel_values=inputs)
        if inputs.ndim != 2 or inputs.dtype not in (torch.int64, torch.int32):
            raise UserError(self._refusal("token numbers (batch, tokens)", inputs))
        most = self.token_limits[1]
        if most is not None and inputs.shape[1] > most:
            raise UserError(
                f"a text has {inputs.shape[1]} tokens, and {type(self.network).__name__} has positions for {most}: set "
                f"data.max_length to {most} or less"
            )
        if mask is not None:
            # Some count positions from this number.
            inputs = inputs.masked_fill(~mask, self.network.config.pad_token_id or 0)
        self._check_vocabulary(inputs)
        return self.network(input_ids=inputs, attention_mask=None if mask is None else mask.long())

    def _refusal(self, wanted: str, inputs: Tensor) -> str:
        return (
            f"{type(self.network).__name__} takes {wanted}, got shape {tuple(inputs.shape)} of {inputs.dtype}: choose "
            "another data module, or another model.backbone"
        )

    def _check_vocabulary(self, tokens: Tensor) -> None:
        if tokens.device.type != "cpu" or torch.compiler.is_compiling() or not tokens.numel():
            return
        size = self.network.get_input_embeddings().num_embeddings
        if (highest := int(tokens.max())) >= size:
            raise UserError(
                f"token number {highest} is outside of the vocabulary of {type(self.network).__name__}, 0 to "
                f"{size - 1}: give data.tokenizer, its own"
            )

    @override
    def describe_tokens(self, inputs: Tensor, mask: Tensor | None = None) -> list[Tokens]:
        patch = getattr(self.network.config, "patch_size", None)
        if not self.images or not isinstance(patch, int):
            return describe_tokens(inputs, mask)
        grid = inputs.shape[2] // patch, inputs.shape[3] // patch
        with torch.no_grad():
            leading = self._outputs(inputs[:1], None).last_hidden_state.shape[1] - grid[0] * grid[1]
        return describe_tokens(inputs, mask) if leading < 0 else describe_patches(inputs, grid, leading=leading)


def _new(config: Mapping[str, Any] | None) -> Any:
    """Make a network with the initial weights of transformers."""
    transformers = _library()
    known = dict(config or {})
    try:
        return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**known))
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"model.backbone.config: {first_line(error)}; give that of a model, with its model_type"
        ) from None


def _pretrained(name: str) -> Any:
    """Load a network from a folder, or from the hub unless it is offline."""
    transformers = _library()
    path = locate(name)
    try:
        with _quiet(transformers):
            model, found = transformers.AutoModel.from_pretrained(
                path, dtype=torch.float32, local_files_only=Path(path).is_dir(), output_loading_info=True
            )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model.backbone.name {name}: {first_line(error)}; give a folder with config.json and model.safetensors, "
            "or a name on the hub"
        ) from None
    if missing := sorted(key for key in found["missing_keys"] if not key.startswith("pooler.")):
        raise UserError(
            f"model.backbone.name {name}: no weights for {missing[0]} ({len(missing)} are missing); give a whole model"
        )
    # Of a conversion that was saved; here the normalization is the task's.
    vars(model.config).pop("sinkformer_pl", None)
    return model


def _library() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError("HuggingFaceBackbone needs transformers: pip install 'sinkformer_pl[transformers]'") from None
    return transformers


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep bars and tables off the screen; what is missing is looked at."""
    logging = transformers.utils.logging
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _plain(config: Any) -> dict[str, Any]:
    known: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in known.items() if name not in UNUSED and not name.startswith("_")}


def _width(network: Any) -> int:
    width = getattr(network.config, "hidden_size", None)
    if not isinstance(width, int) or network.main_input_name not in ("input_ids", "pixel_values"):
        raise UserError(
            f"{type(network).__name__} is no single network of texts or images: give one of its parts, such as a "
            "CLIPVisionModel, in a folder of its own"
        )
    return width


def _positions(network: nn.Module) -> int | None:
    """Return the number of learned positions; None where there are none."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "wpe"):
            # RoBERTa counts from behind the number of padding.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None
