"""Devices that a network runs on, by what a user names."""

import torch

from sinkformer_pl.errors import UserError, first_line


def device_from(wanted: torch.device | str | None) -> torch.device:
    """Return a device; None is the GPU if there is one, else the CPU.

    Raises:
        UserError: no such device, or one without memory.
    """
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError, TypeError) as error:
        why = first_line(error)
        raise UserError(f"device {wanted}: {why}; give cpu, or a GPU that PyTorch sees") from None
    return device


def devices_from(wanted: str | None) -> list[torch.device]:
    """Return the devices of an option: all GPUs by default, or the CPU where there is none; errors as above."""
    number = torch.cuda.device_count() if wanted is None and torch.cuda.is_available() else 0
    return [torch.device("cuda", place) for place in range(number)] or [device_from(wanted)]
