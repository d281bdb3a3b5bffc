"""Freeze parts of a network by name."""

from torch import nn

from sinkformer_pl.errors import UserError
from sinkformer_pl.parts import Patterns, select


class Frozen:
    """Parts of a model that aren't trained.

    Their parameters need no gradient, so that no optimizer has them and no decay changes them. Modules all of whose
    parameters are frozen stay in evaluation mode: no dropout, batch norms by their running statistics, which stay.

    Args:
        model: has the parts.
        names: of parameters and modules; `parts.Patterns`.
        key: of the argument that names them, for messages.

    Raises:
        UserError: a name without a match, or nothing left to train.
    """

    def __init__(self, model: nn.Module, names: Patterns, key: str) -> None:
        parameters = dict(model.named_parameters())
        self.names = select(parameters, names, key)
        if len(self.names) == len(parameters):
            raise UserError(f"{key}: it freezes all parameters, so nothing would be trained; leave some unfrozen")
        self.parameters = [parameters[name] for name in self.names]
        frozen = {id(parameter) for parameter in self.parameters}
        self.modules = [
            module
            for module in model.modules()
            if (inner := [id(parameter) for parameter in module.parameters()]) and frozen.issuperset(inner)
        ]
        self.hold()
        self.evaluate()

    def hold(self) -> None:
        """Freeze them anew, where a callback has unfrozen them with others."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def evaluate(self) -> None:
        """Set their modules to evaluation mode."""
        for module in self.modules:
            module.eval()
