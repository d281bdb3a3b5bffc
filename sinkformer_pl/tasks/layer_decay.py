"""A learning rate for each layer of a backbone, lower towards the input."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from torch import nn

from sinkformer_pl.errors import UserError

KEY = "model.layer_decay"

_ATTENTION = ("attention", "attn")
"""Parts of names of modules and classes that attend, in this package, PyTorch, timm and transformers."""


@dataclass(frozen=True)
class LayerDecay:
    """Scale the rate of each layer of a backbone by `decay` to the power of how far it is from the head.

    As in BEiT (Bao et al. 2022) and timm: the head, and what lies behind the last layer, have the whole rate, the last
    layer `decay` times as much, the one before it `decay` squared, what lies before the first layer the least.

    Attributes:
        decay: the rate of a layer as a share of that of the next, in (0, 1].
        layers: names of the layers, as of `layers_of`, in order.
        depths: for each parameter 0 before the first layer, then 1 to `len(layers)`, one more behind the last.
    """

    decay: float
    layers: list[str]
    depths: dict[str, int] = field(repr=False)

    @classmethod
    def of(cls, model: nn.Module, decay: float) -> "LayerDecay":
        """Find the layers of `model.backbone`.

        Raises:
            UserError: a rate out of range, no layers, or all of them frozen.
        """
        if isinstance(decay, bool) or not 0 < decay <= 1:
            raise UserError(f"{KEY} must be in (0, 1], got {decay}")
        names = [name for name, _ in model.named_parameters()]
        layers = [f"backbone.{name}" for name in layers_of(model.get_submodule("backbone"))]
        if not layers:
            raise UserError(
                f"{KEY}: {type(model.get_submodule('backbone')).__name__} has no numbered layers, a ModuleList or "
                "Sequential whose members all have attention; give model.parameter_groups instead"
            )
        made = cls(float(decay), layers, dict(_depths(names, layers)))
        made.require_trained([name for name, parameter in model.named_parameters() if parameter.requires_grad])
        return made

    def require_trained(self, names: Collection[str]) -> None:
        """Check that some parameter below the head is trained.

        Args:
            names: of the parameters that are.

        Raises:
            UserError: none is, as under a `freeze` of all the backbone or under BackboneFinetuning.
        """
        if not any(self.depth(name) <= len(self.layers) for name in names):
            raise UserError(f"{KEY} {self.decay:g}: all layers are frozen, so it would change nothing; leave it out")

    def depth(self, name: str) -> int:
        """Return the depth of a parameter; one that the model got later has the head's."""
        return self.depths.get(name, len(self.layers) + 1)

    def scale(self, depth: int) -> float:
        """Return the factor on the rate at a depth."""
        return self.decay ** (len(self.layers) + 1 - depth)


def layers_of(network: nn.Module) -> list[str]:
    """Return the names of a network's layers, in the order that they are registered in.

    These are the members of each ModuleList or Sequential all of whose members have attention, by the names of modules
    or classes in them; of such lists within one another (the blocks of stages) those of the innermost.
    """
    found: list[str] = []
    for prefix, module in network.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            members = {name: each for name, each in module.named_children() if any(True for _ in each.parameters())}
            if all(_attends(member) for member in members.values()):
                found += [f"{prefix}.{name}" if prefix else name for name in members]
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


def _attends(module: nn.Module) -> bool:
    return any(
        part in f"{name} {type(inner).__name__}".lower()
        for name, inner in module.named_modules()
        for part in _ATTENTION
    )


def _depths(names: list[str], layers: list[str]) -> Iterator[tuple[str, int]]:
    """Give each parameter the layer it is in, else the one that begins before it; behind the last layer one more."""
    owners = [next((place for place, layer in enumerate(layers, 1) if n.startswith(f"{layer}.")), 0) for n in names]
    last = max(place for place, owner in enumerate(owners) if owner)
    depth = 0
    for place, (name, owner) in enumerate(zip(names, owners, strict=True)):
        depth = owner or (depth if place < last else len(layers) + 1)
        yield name, depth
