"""Start the kernels of a problem, and for a problem alike start them again at other addresses."""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sinkformer_pl.ops.sinkhorn_attention.gpu.state import aligned

REMEMBERED = 1024
"""Problems whose launches are remembered at the most."""

_remembered: dict[Hashable, "Launches"] = {}


class Place(NamedTuple):
    """Locate a tensor: the number of its memory, and the bytes before it there."""

    memory: int
    offset: int


class Kernel(NamedTuple):
    """A launch: the start of a compiled kernel, its tensors or None, and the numbers behind them."""

    start: Callable[..., Any]
    places: tuple[Place | None, ...]
    numbers: tuple[Any, ...]


class Call(NamedTuple):
    """A function of tensors, given by their places and shapes."""

    function: Callable[..., Any]
    tensors: tuple[tuple[Place, torch.Size], ...]


class Launches:
    """Record what runs on the device for one problem, with the places of all tensors.

    Triton looks at every argument of every launch, for its type, its alignment and whether it is 1 or a multiple of 16,
    to find what it compiled for such arguments. With 70 arguments this takes longer than a small kernel runs, and so do
    the sizes, strides and allocations of a problem. All of them are the same for problems alike, whose tensors differ
    by their addresses alone.

    Args:
        given: tensors that are read, or None; the first is a tensor. They may share memory, today or the next time.
            Parts may be taken of those with one axis.

    Attributes:
        again_is_possible: kernels were compiled, not interpreted.
    """

    def __init__(self, given: Sequence[Any]) -> None:
        # Twice the same object would be one place.
        self.given: list[Any] = [None if tensor is None else tensor.detach() for tensor in given]
        self._new: list[Tensor] = []
        self._scratch: list[tuple[Tensor, int]] = []
        self._shapes: list[tuple[torch.Size, tuple[int, ...], torch.dtype]] = []
        self._scratch_size = 0
        self._steps: list[Kernel | Call] = []
        self._results: list[tuple[Place, torch.Size] | None] = []
        self.again_is_possible = True

    def new(self, tensor: Tensor) -> Tensor:
        """Return an uninitialized tensor, after another one is made like it each time."""
        self._new.append(tensor)
        self._shapes.append((tensor.shape, tensor.stride(), tensor.dtype))
        return tensor

    def scratch(self, *shape: int) -> Tensor:
        """Return a float32 tensor, uninitialized; all of them are in one memory the next time."""
        tensor = self.given[0].new_empty(shape, dtype=torch.float32)
        self._scratch.append((tensor, 4 * self._scratch_size))
        self._scratch_size += aligned(tensor.numel())
        return tensor

    def start(
        self,
        kernel: Any,
        programs: int,
        tensors: Sequence[Tensor | None],
        numbers: Sequence[float],
        *,
        warps: int,
        stages: int,
        **constants: Any,
    ) -> None:
        """Start programs of a kernel.

        Args:
            kernel: a function under `triton.jit` of tensors, then numbers, then constants.
            programs: their number, one axis.
            tensors: given ones, new ones, scratch, parts of these, and None.
            numbers: int or float.
            warps: of a program.
            stages: of the pipeline of a loop.
            **constants: the other parameters of the kernel.
        """
        compiled = kernel[programs,](*tensors, *numbers, **constants, num_warps=warps, num_stages=stages)
        if compiled is None:  # as it is where kernels are interpreted
            self.again_is_possible = False
            return
        named = [constants[name] for name in kernel.arg_names[len(tensors) + len(numbers) :]]
        places = tuple(None if tensor is None else self._place(tensor) for tensor in tensors)
        self._steps.append(Kernel(compiled[programs, 1, 1], places, (*numbers, *named)))

    def call(self, function: Callable[..., Any], *tensors: Tensor) -> None:
        """Call a function of PyTorch's operations that changes tensors in place; they are as those of `start`."""
        function(*tensors)
        self._steps.append(Call(function, tuple((self._place(tensor), tensor.shape) for tensor in tensors)))

    def first(self, function: Callable[..., Sequence[Tensor | None]], *arguments: Any) -> list[Any]:
        """Call function(self, *arguments), which computes by the above alone."""
        with _on(self.given[0]):
            results = list(function(self, *arguments))
        self._results = [None if x is None else (self._place(x), x.shape) for x in results]
        self.given, self._new, self._scratch = [], [], []  # or what is remembered would hold them
        return results

    def again(self, given: Sequence[Any]) -> list[Any]:
        """Do the same to other tensors."""
        like = given[0]
        tensors = [*given, *[like.new_empty_strided(size, steps, dtype=kind) for size, steps, kind in self._shapes]]
        tensors.append(like.new_empty(self._scratch_size, dtype=torch.float32) if self._scratch_size else None)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        with _on(like):
            stream = _current_stream(like)
            for step in self._steps:
                if isinstance(step, Kernel):
                    at = [None if place is None else addresses[place[0]] + place[1] for place in step.places]
                    step.start(*at, *step.numbers, stream=stream)
                else:
                    step.function(*[_part(tensors, *wanted) for wanted in step.tensors])
        return [None if wanted is None else _part(tensors, *wanted) for wanted in self._results]

    def _place(self, tensor: Tensor) -> Place:
        for number, whole in enumerate((*self.given, *self._new)):
            if whole is tensor:
                return Place(number, 0)
        wholes = [(whole, number, 0) for number, whole in enumerate((*self.given, *self._new))]
        wholes = [entry for entry in wholes if entry[0] is not None and entry[0].ndim == 1]
        wholes += [(whole, -1, offset) for whole, offset in self._scratch]
        for whole, number, offset in wholes:
            if whole.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                return Place(number, offset + 4 * (tensor.storage_offset() - whole.storage_offset()))
        raise ValueError("a launch has a tensor that is neither given nor made here")


def run(
    name: str,
    given: Sequence[Any],
    options: tuple[Hashable, ...],
    function: Callable[..., Sequence[Tensor | None]],
    *arguments: Any,
) -> list[Any]:
    """Run function(launches, *arguments), or what it did for a problem alike.

    Args:
        name: of what the function does.
        given: see `Launches`.
        options: what else launches depend on, all of it. Beside it they depend on dtypes, shapes, strides, devices and
            alignments of what is given, and on nothing else.
        function: starts kernels by the methods of the `Launches` that it gets, and returns tensors that it made there.
        *arguments: of the function, after the `Launches`.
    """
    alike = name, options, *[
        x if x is None else (x.dtype, x.shape, x.stride(), x.device, x.data_ptr() % 16) for x in given
    ]  # fmt: skip
    known = _remembered.get(alike)
    if known is not None:
        return known.again(given)
    launches = Launches(given)
    results = launches.first(function, *arguments)
    if launches.again_is_possible:
        if len(_remembered) >= REMEMBERED:
            _remembered.pop(next(iter(_remembered)), None)
        _remembered[alike] = launches
    return results


def _part(tensors: Sequence[Tensor | None], place: Place, shape: torch.Size) -> Tensor:
    whole: Any = tensors[place.memory]
    if whole.shape == shape:
        return whole
    first = place.offset // 4
    return whole[first : first + shape.numel()].view(shape)


def _on(tensor: Any) -> AbstractContextManager[Any]:
    """Triton starts kernels on the current device."""
    here = not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()
    return _NOTHING if here else torch.cuda.device(tensor.device)


def _current_stream(tensor: Any) -> Any:
    """Return the stream of a GPU, as Triton would ask for it at every launch; None on the CPU."""
    return triton.runtime.driver.active.get_current_stream(tensor.get_device()) if tensor.is_cuda else None


_NOTHING = nullcontext()
