"""Define the network that a task expects."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sinkformer_pl.errors import UserError
from sinkformer_pl.models.tokens import Tokens, describe_tokens
from sinkformer_pl.normalizations.contract import NormalizationFactory


class Backbone(nn.Module, ABC):
    """A network from a batch of samples to one feature vector each.

    A subclass takes a `NormalizationFactory` as its first argument, calls it once for every attention layer, and sets
    `out_dim`.

    Attributes:
        out_dim: width of the features.
        token_limits: least and most tokens that an exported program takes, padding included; None is no limit.
    """

    out_dim: int
    token_limits: tuple[int, int | None] = (1, None)

    @property
    def saved_arguments(self) -> Mapping[str, Any]:
        """Arguments, as plain data, that a checkpoint keeps in place of those given; none by default.

        A network that was made from files of pretrained weights returns those by which it is made again without them.
        """
        return {}

    @property
    def preprocessing(self) -> Mapping[str, Any] | None:
        """Preprocessing that pretrained weights were trained with, as plain data; None leaves it to the data.

        Its "kind" is the modality, such as "images"; the rest is what such a `Preprocessing` has in
        `from_data`. The data of a training take it over, and keep it in checkpoints.
        """
        return None

    @abstractmethod
    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map inputs, in sets (B, N, C) with a bool mask (B, N) of the real tokens, to features (B, out_dim)."""

    def describe_tokens(self, inputs: Tensor, mask: Tensor | None = None) -> list[Tokens]:
        """Describe the tokens of each sample that attend to one another in the last layers, for pictures.

        By default each point or token number is one. A network that makes other tokens of its inputs overrides it.
        """
        return describe_tokens(inputs, mask)


BackboneFactory = Callable[[NormalizationFactory], Backbone]
"""Makes a backbone: a class, or `functools.partial(SetTransformer, dim=64)`."""


def require_width(backbone: nn.Module) -> None:
    """Raise a UserError unless a backbone says how wide its features are."""
    if not isinstance(getattr(backbone, "out_dim", None), int):
        name = type(backbone).__name__
        raise UserError(f"{name}: no out_dim; set self.out_dim, the width of its features, in {name}.__init__")


def features_of(backbone: nn.Module, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return the features of a batch.

    Raises:
        UserError: they aren't (B, out_dim).
    """
    features: Tensor = backbone(inputs, mask)
    wanted = (inputs.shape[0], backbone.out_dim)
    if features.shape != wanted:
        raise UserError(
            f"{type(backbone).__name__}.forward: features of shape {tuple(features.shape)}; give {wanted}, a row of "
            "out_dim numbers for each sample"
        )
    return features


def require_points(inputs: Tensor, in_features: int, network: str) -> None:
    """Raise a UserError unless the inputs are sets (B, N, in_features) of a float dtype; it calls the network so."""
    if inputs.ndim != 3 or not inputs.is_floating_point():
        raise UserError(
            f"{network} takes point clouds (batch, points, numbers) of a float dtype, got shape {tuple(inputs.shape)} "
            f"of {inputs.dtype}: choose another data module, or another model.backbone"
        )
    if inputs.shape[-1] != in_features:
        raise UserError(
            f"a point has {inputs.shape[-1]} numbers, but the network takes in_features={in_features}: set "
            f"model.backbone.in_features to {inputs.shape[-1]}, or choose other data"
        )
