"""Checks of numbers: half precision, autocast, extremes, gradients."""

from dataclasses import replace

import torch

from sinkformer_pl.normalizations.contract import AttentionNormalization
from sinkformer_pl.testing.cases import Case, draw
from sinkformer_pl.testing.comparing import all_close, close, finite, require
from sinkformer_pl.testing.subject import Subject, trained

ROUNDED = {  # for scores of standard deviation 1 and 10: relative errors of output and gradients against float64
    torch.float64: {1: (1e-13, 1e-12), 10: (1e-12, 1e-11)},
    torch.float32: {1: (2e-6, 2e-6), 10: (5e-6, 1e-5)},
    torch.bfloat16: {1: (4e-3, 6e-3), 10: (4e-3, 6e-3)},
    torch.float16: {1: (5e-4, 1e-3), 10: (5e-4, 1e-3)},
}


def precision(s: Subject) -> None:
    """Half precision is computed in at least float32 inside: no further from float64 than the last cast explains."""
    for dtype in s.dtypes:
        for std, (output, gradient) in ROUNDED[dtype].items():
            module, exact = s.make(dtype), s.make()
            exact.load_state_dict(module.state_dict())
            case = s.case(dtype=dtype, queries=64, keys=64, std=std, bias=False)
            upstream = draw((*case.q.shape[:-1], case.v.shape[-1]), dtype)
            wanted = s.run(exact, case.map(torch.Tensor.double), upstream.double())
            per_head = torch.full((s.num_heads,), float(case.scale), dtype=torch.promote_types(dtype, torch.float32))
            for scale in (case.scale, per_head):
                found = s.run(module, replace(case, scale=scale), upstream)
                tolerances = {"attend": output, **{f"gradient of {x}": gradient for x in case.tensors()}}
                for name, tolerance in tolerances.items():
                    close(found[name], wanted[name], f"{name}, against float64", tolerance, floor=1e-2)


def autocast(s: Subject) -> None:
    """Under autocast to bfloat16, float32 gives the same float32 numbers as without."""
    for case in s.cases(torch.float32):
        module = s.make(torch.float32)
        found, wanted = s.run(module, case, autocast=True), s.run(module, case)
        for name in ("attend", "weights"):
            require(found[name].dtype == torch.float32, f"{name} is {found[name].dtype}")
        all_close(found, wanted, "against no autocast")


def extremes(s: Subject) -> None:
    """Scores of standard deviation 1e4, and one query with one key, give finite results and gradients."""
    for sizes in ({"std": 1e4}, {"queries": 1, "keys": 1}):
        for case in s.cases(torch.float32, **sizes):
            finite(s.run(s.make(torch.float32), case))


def gradients(s: Subject) -> None:
    """Gradients of q, k, v, bias, scale and parameters in float64 are those of finite differences, if exact."""
    if not s.promises.exact_gradient:
        return
    for case in s.cases(queries=3, keys=4):
        _differentiate(s.make(), case.leaves(), torch.linspace(0.3, 0.5, s.num_heads, dtype=torch.float64))


def _differentiate(module: AttentionNormalization, case: Case, scale: torch.Tensor) -> None:
    case = replace(case, scale=scale.requires_grad_())
    leaves = (*case.tensors().values(), scale, *trained(module).values())  # moved in place, so case and module see it
    torch.autograd.gradcheck(lambda *_: case.attend(module), leaves, atol=1e-8, rtol=1e-6, fast_mode=True)
