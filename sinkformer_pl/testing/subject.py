"""The normalization under test: its instances, its inputs and its results."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from sinkformer_pl.normalizations.contract import AttentionNormalization, NormalizationFactory
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.testing.cases import Case, draw, draw_case
from sinkformer_pl.testing.comparing import require


@dataclass
class Subject:
    """The normalization under test; its name, promises and requirements are set by the first check."""

    factory: NormalizationFactory
    converged: NormalizationFactory | None
    dtypes: tuple[torch.dtype, ...]
    num_heads: int
    head_dim: int
    seed: int
    name: str = "the factory"
    promises: Promises = field(default_factory=Promises)
    requires_square: bool = False
    requires_tied: bool = False
    seen: Case | None = None  # the latest input, for the message
    unchecked: list[str] = field(default_factory=list)  # claims that hold in a limit that wasn't reached

    def make(self, dtype=torch.float64, *, factory: NormalizationFactory | None = None, seed=0):
        """Make an instance for evaluation, built as an attention layer does; parameters in float32 or above."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed + seed)
            module = (factory or self.factory)()
            module.build(self.num_heads, self.head_dim)
        return module.to(torch.promote_types(dtype, torch.float32)).eval()

    def run(self, module: AttentionNormalization, case: Case, upstream: Tensor | None = None, autocast=False):
        """Compute results by name: attend, weights, and the gradients of attend's output times `upstream`."""
        self.seen, case = case, case.leaves()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output, weights = case.attend(module), case.weights(module)
        require(output.requires_grad, "attend gives no gradient: something is detached or under no_grad")
        leaves = case.tensors() | {f"parameter {name}": x for name, x in trained(module).items()}
        upstream = draw(output.shape, output.dtype) if upstream is None else upstream
        gradients = torch.autograd.grad(output, list(leaves.values()), upstream, materialize_grads=True)
        named = {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
        return {"attend": output.detach(), "weights": weights.detach(), **named}

    def refuses(self, case: Case) -> bool:
        """Tell whether an input is refused with ValueError or NotImplementedError, by both attend and weights."""
        self.seen, module, refusals = case, self.make(), 0
        for call in (case.attend, case.weights):
            try:
                call(module)
            except (NotImplementedError, ValueError):
                refusals += 1
        require(refusals != 1, "one of attend and weights refuses this input, the other takes it without a word")
        return refusals == 2

    @cached_property
    def takes_bias(self) -> bool:
        """Tell whether a bias is taken, not refused."""
        return not self.refuses(self.case(bias=True))

    def cases(self, dtype=torch.float64, **sizes) -> Iterator[Case]:
        """Draw one input with every kind of mask that is to be honoured."""
        g = self.promises
        kinds = ["none", "padding", "empty sample", *["pairs"] * g.pairs, *["causal"] * g.causal]
        return (self.case(kind, dtype, **sizes) for kind in kinds)

    def case(self, kind="none", dtype=torch.float64, *, batch=2, queries=5, keys=7, std=1.0, bias: bool | None = None):
        """Draw an input, with a bias if it is taken; as many queries as keys, or the same, where that is needed."""
        square, bias = self.requires_square, self.takes_bias if bias is None else bias
        sizes = (batch, self.num_heads, queries, queries if square or kind == "causal" else keys)
        drawn = {"sizes": sizes, "head_dim": self.head_dim, "std": std, "seed": self.seed}
        self.seen = draw_case(kind, dtype, **drawn, bias=bias, square=square, tied=self.requires_tied)
        return self.seen


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a module that ask for gradients, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
