"""Writing checkpoints so that the last good one survives, and reading them safely."""

import contextlib
import errno
import os
import pickle
import uuid
from pathlib import Path
from typing import Any

import torch

from sinkformer_pl.errors import UserError
from sinkformer_pl.training.checkpoint_checksum import DamagedError, verify, write
from sinkformer_pl.training.checkpoint_content import require_form

LEFTOVER_SECONDS = 600
CAUSE_LENGTH = 150
EXPORTED = (".onnx", ".pt2", ".safetensors")
"""Suffixes of files that the command export writes."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save_file(content: Any, path: str | Path) -> None:
    """Write a checkpoint with a checksum; at every moment the path has the complete old file or the complete new one.

    The bytes go to a file beside it first, `.NAME.*.tmp`, and to the disk, before they get the name. What killed
    processes left of such files is removed once it is ten minutes old.

    Args:
        content: tensors and plain data.
        path: where to; its folder is made.

    Raises:
        UserError: it can't be written (a full disk, say), or it holds what `load_file` would refuse. The old file, if
            there was one, is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("x+b") as file:
                write(content, file)
                file.flush()
                os.fsync(file.fileno())
            _require_plain(temporary, path)
            _remove_leftovers(path, temporary.stat().st_mtime)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        remedy = "free some space" if error.errno in _FULL else "make its folder writable"
        kept = "; the one written before is unchanged" if path.is_file() else ""
        raise UserError(
            f"checkpoint {path} can't be written ({error.strerror or error}): {remedy}, or give another "
            f"trainer.default_root_dir{kept}"
        ) from error
    _sync_folder(path.parent)


def load_file(path: str | Path, map_location: Any = "cpu") -> Any:
    """Read what `save_file` or `torch.save` wrote, having checked its bytes; tensors and plain data alone.

    Args:
        path: the file.
        map_location: as for `torch.load`.

    Raises:
        UserError: no such file, a damaged one, or one with objects in it, which could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: {'a folder; give a file in it' if path.is_dir() else 'no such file'}")
    checked = False
    try:
        with path.open("rb") as file:
            checked = verify(file)
            file.seek(0)
            return torch.load(file, map_location=map_location, weights_only=True)
    except DamagedError as damage:
        raise UserError(f"checkpoint {path} is damaged: {damage}; {_remedy(path)}") from None
    except OSError as error:
        raise UserError(f"checkpoint {path} can't be read ({error.strerror or error}): give a file that can") from None
    except pickle.UnpicklingError:
        if checked:
            raise UserError(
                f"checkpoint {path}: it holds more than tensors and plain data, and could run code: refused; save it "
                "anew without"
            ) from None
        raise UserError(f"checkpoint {path} is damaged or no checkpoint; {_remedy(path)}") from None
    except Exception as error:  # Bytes that are no checkpoint make unpickling raise anything.
        cause = " ".join(f"{type(error).__name__} {error}".partition(". ")[0].split())[:CAUSE_LENGTH]
        raise UserError(f"checkpoint {path} is damaged, or can't be loaded here ({cause}); {_remedy(path)}") from None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of a task onto the CPU, having checked its bytes; nothing in it could run code.

    Returns:
        Lightning's dictionary ("state_dict", "hyper_parameters", ...); checkpoints of the command line also hold the
        resolved configuration under `CONFIG_KEY` and the validation metrics of that moment under `METRICS_KEY`; those
        of a `ClassificationData` hold what `learnt_from` gives.

    Raises:
        UserError: no such file, a damaged one, an exported one, one with objects in it, or no Lightning checkpoint of
            a task.
    """
    path = Path(path)
    if path.suffix in EXPORTED and path.is_file():
        raise UserError(
            f"checkpoint {path}: a file of the command export, which doesn't know its training's data; predict and "
            "export take it with FILEs; give the checkpoint here"
        )
    checkpoint = load_file(path)
    require_form(checkpoint, path)
    return checkpoint


def _require_plain(temporary: Path, path: Path) -> None:
    """Refuse at the first save, rather than at the resume after the last."""
    refused = torch.serialization.get_unsafe_globals_in_checkpoint(str(temporary))
    if refused:
        raise UserError(
            f"checkpoint {path}: {', '.join(sorted(refused))} in it could not be read again; let hyper-parameters and "
            "the state_dict of callbacks be tensors and plain data"
        )


def _remove_leftovers(path: Path, now: float) -> None:
    # By the clock of the file system. A younger file may be another process's, at work.
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if now - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                leftover.unlink()


def _sync_folder(folder: Path) -> None:
    """Make a new name in it outlast a power cut, where that can be asked for."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remedy(path: Path) -> str:
    """Name the newest intact checkpoint beside it."""
    others = [other for other in path.parent.glob("*.ckpt") if other.is_file() and other != path]
    for other in sorted(others, key=lambda other: other.stat().st_mtime, reverse=True):
        # What can't be looked into, for whatever reason, is no remedy.
        with contextlib.suppress(Exception), other.open("rb") as file:
            if verify(file) and not torch.serialization.get_unsafe_globals_in_checkpoint(str(other)):
                return f"use {other.name} beside it, which is intact"
    return "use another copy"
