"""Sinkhorn attention as one operator of PyTorch, for the CPU and for GPUs, so that compilers and exports see one node.

Its inputs are (B, H, tokens, features); `api` brings a problem into this form. The forward returns the output and a
state, of which only the backward knows the meaning: scalings of the closed form, or potentials of the kernels.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sinkformer_pl.ops.precision import at_least_float32, no_autocast
from sinkformer_pl.ops.sinkhorn_attention import closed_form, gpu
from sinkformer_pl.ops.sinkhorn_attention.gpu import state as kernel_state
from sinkformer_pl.ops.sinkhorn_attention.inputs import OperatorInputs
from sinkformer_pl.ops.sinkhorn_attention.problem import Problem

_NAME = "sinkformer_pl::sinkhorn_attention"
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? log_row, Tensor? log_column, Tensor? scale, Tensor? lam, "
    "float scale_number, float lam_number, int n_iters, str gradient, str backend"
)
_STATE = 6

_OTHERS = OperatorInputs._fields[3:8]
"""The tensors whose gradients aren't always wanted."""

KEPT_BYTES = 2**28
"""Size of a head's kernel matrix up to which "auto" is the dense backend."""


def attend(x: OperatorInputs) -> Tensor:
    """Call the operator: the output (B, H, Q, Dv)."""
    return _Direct.apply(*x) if _plain(x.q) else torch.ops.sinkformer_pl.sinkhorn_attention(*x)[0]


def _plain(tensor: Tensor) -> bool:
    """Tell a tensor with values, for which the dispatcher is left out: it takes as long as a small kernel.

    Not under a dispatch mode, such as that of selective checkpointing, which is to see one operator.
    """
    watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return not watched and type(tensor) in (Tensor, torch.nn.Parameter)


def attend_with_info(x: OperatorInputs) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Also return potentials (B, H, Q) and (B, H, K), arbitrary without mass, and the sums of rows and columns."""
    output, *state = torch.ops.sinkformer_pl.sinkhorn_attention(*x)
    return output, torch.ops.sinkformer_pl.sinkhorn_attention_info(*x, state)


def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    x = OperatorInputs(*inputs)
    output, *state = _run(x)
    return output, *state, *(x.q.new_empty(0) for _ in range(_STATE - len(state)))


def _run(x: OperatorInputs) -> tuple[Tensor, ...]:
    """The output, and of the state as many tensors as the backend needs."""
    if x.empty:
        return tuple(tensor.zero_() for tensor in _like(x))
    if x.backend == "triton":
        from sinkformer_pl.ops.sinkhorn_attention.gpu import attention

        return attention.forward(x)
    with torch.no_grad(), no_autocast(x.q):
        output, run = closed_form.forward(_problem(x))
        output = output.view(*x.q.shape[:3], -1)
        rounded = output.to(x.q.dtype)
        # The backward wants the output before it was rounded.
        return rounded, *run, output if rounded is not output else output.new_empty(0)


def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    return _like(OperatorInputs(*inputs))


def _like(x: OperatorInputs) -> tuple[Tensor, ...]:
    """Uninitialized results of the forward."""
    (b, heads, queries), keys, width = x.q.shape[:3], x.k.shape[2], x.v.shape[3]
    n, row_steps, pairs = b * heads, (x.n_iters + 1) // 2, x.n_iters // 2
    if x.backend == "triton":
        memory = x.q.new_empty(kernel_state.numbers(x), dtype=torch.float32)
        return gpu.laid_out_like(x.q, width), memory, *(x.q.new_empty(0) for _ in range(_STATE - 1))
    exact = torch.promote_types(x.q.dtype, torch.float32)
    segments = closed_form.segments(x.n_iters)
    output = x.q.new_empty(b, heads, queries, width)
    sides = (row_steps, queries), (1 + pairs, keys), (pairs, keys), (segments, queries), (segments, keys)
    state = [x.q.new_empty(number, n, 1, size, dtype=exact) for number, size in sides]
    return output, *state, x.q.new_empty(output.shape if exact != x.q.dtype else 0, dtype=exact)


def _backward_by_names(*arguments: Any) -> list[Tensor]:
    *inputs, output, state, grad, wanted = arguments
    return _backward(OperatorInputs(*inputs), output, state, grad, wanted.split())


def _backward(
    x: OperatorInputs, output: Tensor, state: Sequence[Tensor], grad: Tensor, wanted: Sequence[str]
) -> list[Tensor]:
    """Gradients of q, k, v and of the tensors that are wanted by name."""
    if x.empty:
        return [tensor.zero_() for tensor in _gradients_like(x, wanted)]
    if x.backend == "triton":
        from sinkformer_pl.ops.sinkhorn_attention.gpu import attention

        return attention.backward(x, output, state[0], grad, wanted)
    with torch.no_grad(), no_autocast(x.q):
        return _closed_form_backward(x, output, state, grad, wanted)


def _closed_form_backward(
    x: OperatorInputs, output: Tensor, state: Sequence[Tensor], grad: Tensor, wanted: Sequence[str]
) -> list[Tensor]:
    p, rows = _problem(x), _places(x.log_row)
    exact = state[5] if state[5].numel() else output
    grad = _only(at_least_float32(grad), rows)
    run = closed_form.Run(*state[:5])
    found = closed_form.backward(
        p, exact.reshape(*p.q.shape[:2], -1), run, grad.reshape(*p.q.shape[:2], -1),
        marginals="log_row" in wanted or "log_column" in wanted,
    )  # fmt: skip
    dq, dk, dv = found.q.view(x.q.shape), found.k.view(x.k.shape), found.v.view(x.v.shape)
    others: dict[str, Any] = found._asdict()
    if x.scale is not None:
        others["scale"] = (dq * _only(at_least_float32(x.q), rows)).sum((-2, -1))
        dq = dq * x.scale[..., None, None]
    like = _gradients_like(x, wanted)[3:]
    return [
        *(tensor.to(x.q.dtype) for tensor in (dq, dk, dv)),
        *(others[name].view(wish.shape) for name, wish in zip(wanted, like, strict=True)),
    ]


def _fake_backward(*arguments: Any) -> list[Tensor]:
    return _gradients_like(OperatorInputs(*arguments[:-4]), arguments[-1].split())


def _gradients_like(x: OperatorInputs, wanted: Sequence[str]) -> list[Tensor]:
    """Uninitialized results of the backward."""
    found = []
    for tensor in x[:3]:
        like = gpu.laid_out_like(tensor, tensor.shape[3]) if x.backend == "triton" else tensor.new_empty(tensor.shape)
        found.append(like)
    exact = torch.promote_types(x.q.dtype, torch.float32)
    sizes = {"bias": (*x.q.shape[:3], x.k.shape[2]), "log_row": x.q.shape[:3], "log_column": x.k.shape[:3]}
    found += [x.q.new_empty(sizes.get(name, x.q.shape[:2]), dtype=exact) for name in wanted]
    return found


def _info(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, state = arguments
    x = OperatorInputs(*inputs)
    with torch.no_grad(), no_autocast(x.q):
        if x.empty:
            return tuple(tensor.zero_() for tensor in _fake_info(*arguments))
        if x.backend == "triton":
            from sinkformer_pl.ops.sinkhorn_attention.gpu import attention

            f, g, row_sums, column_sums = attention.info(x, state[0])
        else:
            p, run = _problem(x), closed_form.Run(*state[:5])
            f, g = closed_form.potentials(p, run)
            row_sums, column_sums = closed_form.sums(p, run)
        queries, keys = x.q.shape[:3], x.k.shape[:3]
        return f.view(queries), g.view(keys), row_sums.view(queries), column_sums.view(keys)


def _fake_info(*arguments: Any) -> tuple[Tensor, ...]:
    x = OperatorInputs(*arguments[:-1])
    exact = torch.promote_types(x.q.dtype, torch.float32)
    return tuple(x.q.new_empty(tensor.shape[:3], dtype=exact) for tensor in (x.q, x.k, x.q, x.k))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x = OperatorInputs(*inputs)
    ctx.save_for_backward(*x.tensors, *output)
    ctx.numbers = x.options
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(OperatorInputs._fields)
    saved = ctx.saved_tensors
    (*tensors, output), state = saved[:9], saved[9:]
    wanted = [name for name, needed in zip(_OTHERS, ctx.needs_input_grad[3:8], strict=True) if needed]
    inputs = *tensors, *ctx.numbers
    if _plain(grad) and not torch.is_grad_enabled():  # as it is for a second derivative
        found = _backward(OperatorInputs(*inputs), output, state, grad, wanted)
    else:
        operator = torch.ops.sinkformer_pl.sinkhorn_attention_backward
        found = operator(*inputs, output, state, grad, " ".join(wanted))
    by_name = dict(zip(wanted, found[3:], strict=True)) if wanted else {}
    return *found[:3], *[by_name.get(name) for name in _OTHERS], *(None,) * len(ctx.numbers)


class _Direct(torch.autograd.Function):
    """The operator with its backward, without the dispatcher, and without the state as an output."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x = OperatorInputs(*inputs)
        output, *state = _run(x)
        ctx.save_for_backward(*x.tensors, output, *state)
        ctx.numbers = x.options
        ctx.set_materialize_grads(False)
        return output

    backward = staticmethod(_autograd)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError("sinkhorn_attention has no second derivative; use backend='reference' for one")


def _problem(x: OperatorInputs) -> Problem:
    """The canonical form of the closed form: one leading axis, at least float32, zeros at padding."""
    rows, columns = _places(x.log_row), _places(x.log_column)
    q, k, v = (at_least_float32(tensor) for tensor in (x.q, x.k, x.v))
    q, k, v = _only(q, rows), _only(k, columns), _only(v, columns)
    scale = x.scale_number
    if x.scale is not None:
        q, scale = q * x.scale[..., None, None], 1.0
    row = log_column = None
    if x.log_row is not None and x.log_column is not None and columns is not None:
        row, log_column = x.log_row.exp()[:, :, None], _only(x.log_column[..., None], columns).mT
    lam = x.lam if x.lam is not None else None if x.lam_number == 1 else x.lam_number
    bias, columns = x.bias, None if columns is None else columns.expand(*x.k.shape[:3], 1).mT
    return Problem(
        q=q.flatten(0, 1),
        k=k.flatten(0, 1),
        v=v.flatten(0, 1),
        scale=scale,
        bias=bias if bias is None else bias.flatten(0, 1),
        row=row if row is None else row.flatten(0, 1),
        columns=columns if columns is None else columns.flatten(0, 1),
        log_column=math.log(q.shape[2] / k.shape[2]) if log_column is None else log_column.flatten(0, 1),
        lam=lam.reshape(-1, 1, 1) if isinstance(lam, Tensor) else lam,
        n_iters=x.n_iters,
        gradient=x.gradient,
        kept=_kept(x),
    )


def _kept(x: OperatorInputs) -> bool:
    """Tell whether the backend is the dense one."""
    size = x.q.shape[2] * x.k.shape[2] * max(x.q.element_size(), 4)
    return x.backend == "dense" or (x.backend == "auto" and (x.bias is not None or size <= KEPT_BYTES))


def _places(log_marginal: Tensor | None) -> Tensor | None:
    """Where there is mass, (B, H, tokens, 1) bool; None is everywhere."""
    return None if log_marginal is None else (log_marginal > -torch.inf)[..., None]


def _only(tensor: Tensor, places: Tensor | None) -> Tensor:
    return tensor if places is None else tensor.where(places, 0.0)


torch.library.define(_NAME, f"({_INPUTS}) -> ({', '.join(['Tensor'] * (1 + _STATE))})")
torch.library.define(
    f"{_NAME}_backward", f"({_INPUTS}, Tensor output, Tensor[] state, Tensor grad, str wanted) -> Tensor[]"
)
torch.library.define(f"{_NAME}_info", f"({_INPUTS}, Tensor[] state) -> (Tensor, Tensor, Tensor, Tensor)")
for _name, _function, _shapes in (
    (_NAME, _forward, _fake),
    (f"{_NAME}_backward", _backward_by_names, _fake_backward),
    (f"{_NAME}_info", _info, _fake_info),
):
    torch.library.impl(_name, "default", _function)
    torch.library.register_fake(_name, _shapes)
torch.library.register_autograd(_NAME, _autograd, setup_context=_setup_context)
torch.library.register_autograd(f"{_NAME}_backward", _no_second_derivative)
