"""Compare results, and word a failure."""

import math

import torch
from torch import Tensor

EXACT = {torch.float64: 1e-10, torch.float32: 1e-6}  # relative error that the order of a sum explains


def require(holds: bool | Tensor, message: str) -> None:
    """Fail with the message unless it holds, under `python -O` too."""
    if not holds:
        raise AssertionError(message)


def finite(results: dict[str, Tensor]) -> None:
    """Require that there is no NaN, no infinity."""
    for name, values in results.items():
        require(values.isfinite().all(), f"{name} has NaN or infinity")


def zero(values: Tensor, what: str) -> None:
    """Require exactly 0."""
    wrong = values[values != 0].tolist()  # NaN is wrong too
    require(not wrong, f"{what} must be exactly 0, found {', '.join(f'{x:.3g}' for x in wrong[:3])}")


def close(got: Tensor, want: Tensor, what: str, tolerance: float | None = None, floor: float = 1.0) -> None:
    """Compare in the relative Frobenius norm, to EXACT unless told; NaN is never close."""
    require(got.shape == want.shape, f"{what} has shape {tuple(got.shape)} instead of {tuple(want.shape)}")
    tolerance = EXACT[want.dtype] if tolerance is None else tolerance
    difference = got.double() - want.double()
    error = float(difference.norm() / want.double().norm().clamp(min=floor))
    if not error <= tolerance:
        worst = torch.unravel_index(difference.abs().nan_to_num(math.inf).argmax(), difference.shape)
        at = tuple(int(i) for i in worst)
        values = f"{float(got[at]):.6g} instead of {float(want[at]):.6g} at {at}"
        raise AssertionError(f"{what}: {values}; relative error {error:.1e}, allowed {tolerance:.1e}")


def all_close(got: dict[str, Tensor], want: dict[str, Tensor], what: str, *names: str) -> None:
    """Compare results by name: those given, or all that are wanted."""
    for name in names or want:
        close(got[name], want[name], f"{name}, {what}")
