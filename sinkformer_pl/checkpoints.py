"""Reading checkpoints safely, and saying what is wrong with one that doesn't fit."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sinkformer_pl.errors import UserError

CONFIG_KEY = "sinkformer_pl_config"
METRICS_KEY = "sinkformer_pl_metrics"

SHOWN_KEYS = 4


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU: tensors and plain data, nothing that could run code.

    Returns:
        Lightning's dictionary ("state_dict", "hyper_parameters", ...); checkpoints of the command line also hold the
        resolved configuration under `CONFIG_KEY` and the validation metrics of that moment under `METRICS_KEY`.

    Raises:
        UserError: no such file, a damaged one, one with objects in it, or no Lightning checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: {'a folder; give a file in it' if path.is_dir() else 'no such file'}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if zipfile.is_zipfile(path):
            raise UserError(
                f"checkpoint {path}: it holds more than tensors and plain data, and could run code: refused"
            ) from None
        raise UserError(f"checkpoint {path}: it is damaged or no checkpoint; use another copy") from None
    except Exception:  # Bytes that are no checkpoint make unpickling raise anything.
        raise UserError(f"checkpoint {path}: it is damaged or truncated; use another copy") from None
    if not (isinstance(checkpoint, dict) and "state_dict" in checkpoint and "hyper_parameters" in checkpoint):
        raise UserError(
            f"checkpoint {path}: it has no 'state_dict' and 'hyper_parameters', so it isn't one of a task here"
        )
    return checkpoint


def require_match(checkpoint: Mapping[str, Any], model: nn.Module, path: str | Path) -> None:
    """Check that the weights of a checkpoint fit a model, before anything is loaded.

    Raises:
        UserError: names the parameters that are missing, unknown or of another shape.
    """
    saved: Mapping[str, Tensor] = checkpoint["state_dict"]
    wanted = model.state_dict()
    differences = [
        *(f"{key} is not in the checkpoint" for key in wanted.keys() - saved.keys()),
        *(f"{key} is only in the checkpoint" for key in saved.keys() - wanted.keys()),
        *(
            f"{key} is {tuple(saved[key].shape)} in the checkpoint and {tuple(wanted[key].shape)} in the model"
            for key in wanted.keys() & saved.keys()
            if saved[key].shape != wanted[key].shape
        ),
    ]
    if differences:
        shown = "; ".join(sorted(differences)[:SHOWN_KEYS])
        more = f"; and {len(differences) - SHOWN_KEYS} more" if len(differences) > SHOWN_KEYS else ""
        raise UserError(
            f"checkpoint {path} doesn't fit the model: {shown}{more}. Use the data, backbone and normalization "
            "that it was trained with"
        )
