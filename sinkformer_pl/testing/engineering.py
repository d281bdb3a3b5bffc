"""Checks of what training needs of a module: repeatable calls, its state, its parameters, one graph."""

from itertools import product

import torch
from torch import Tensor

from sinkformer_pl.normalizations.contract import AttentionNormalization
from sinkformer_pl.testing.cases import Case, draw
from sinkformer_pl.testing.comparing import all_close, finite, require, zero
from sinkformer_pl.testing.subject import Subject, trained


def repeatable(s: Subject) -> None:
    """Two calls give the same, in training mode too; a stochastic one there after the same seed."""
    for case, training in product(s.cases(), (False, True)):
        module, seeded = s.make().train(training), training and s.promises.stochastic
        results = []
        with torch.random.fork_rng(devices=()):
            for seed in (0, 0 if seeded else 1):
                torch.manual_seed(seed)
                results.append(s.run(module, case))
        finite(results[0])
        zero(results[0]["weights"][~case.allowed()], "masked weights")
        mode = f"{'training' if training else 'evaluation'} mode, {'same seed' if seeded else 'no seed'}"
        for name, values in results[0].items():
            require(values.equal(results[1][name]), f"{name} differs between two calls ({mode})")


def state(s: Subject) -> None:
    """The state_dict holds all that another instance needs to give the same: what is drawn is a parameter or buffer."""
    case, module, other = s.case(), s.make(), s.make(seed=1)
    other.load_state_dict({name: x + 0.1 if name in trained(module) else x for name, x in module.state_dict().items()})
    module.load_state_dict(other.state_dict())
    all_close(s.run(other, case), s.run(module, case), "after load_state_dict")


def parameters(s: Subject) -> None:
    """Every parameter gets a gradient in each training step: distributed training stops otherwise."""
    for case in s.cases():
        module = s.make().train()
        case.leaves().attend(module).sum().backward()
        unused = [name for name, parameter in trained(module).items() if parameter.grad is None]
        require(not unused, f"no gradient for {', '.join(unused)}")


def compile(s: Subject) -> None:
    """One graph for torch.compile, without a wait for the device: no .item(), no branch on data, no numpy."""
    calls: set[str] = set()

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]):
        calls.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    for case in s.cases(torch.float32):
        module, leaves = s.make(torch.float32), case.leaves()
        torch.compiler.reset()
        output, _ = torch.compile(_attend_and_weights, fullgraph=True, backend=backend)(module, leaves)
        waits = {"item", "nonzero", "cpu"}.intersection(calls)
        require(not waits, f"the result of .{', .'.join(waits)}() must be waited for")
        gradient = torch.autograd.grad(output, leaves.q, draw(output.shape, output.dtype))[0]
        found = {"attend": output.detach(), "gradient of q": gradient}
        all_close(found, s.run(module, case), "compiled", *found)


def _attend_and_weights(module: AttentionNormalization, case: Case) -> tuple[Tensor, Tensor]:
    return case.attend(module), case.weights(module)
