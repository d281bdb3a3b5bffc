"""Find the folders of runs, `<default_root_dir>/<name>/version_<k>`, and `checkpoints/best.ckpt` and `last.ckpt`."""

import contextlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_warn

from sinkformer_pl.errors import UserError

DEFAULT_ROOT = "runs"
DEFAULT_NAME = "run"
CHECKPOINTS = "checkpoints"

_VERSION = re.compile(r"version_(\d+)")


def folder_for(root: Path, name: str, checkpoint: Path | None) -> Path:
    """Return the folder of a run that starts, or resumes from a checkpoint.

    A checkpoint of a run of this name under `root` continues that run's folder; everything else gets a new version.
    """
    if checkpoint is not None:
        run = _run_of(checkpoint)
        if run is not None and run.resolve().parent == (root / name).resolve():
            return run
    # A file of such a name counts, too.
    taken = [version for version, _ in _numbered(root / name)]
    return root / name / f"version_{max(taken, default=-1) + 1}"


def remove_unless_begun(folder: Path, new: Sequence[Path]) -> None:
    """Remove the folder of a run whose training hasn't begun, where all in it is of a fit that failed before.

    Args:
        folder: of the run.
        new: it and the folders around it that were made for it; these go where nothing else is in them.
    """
    if folder not in new or (folder / "config.yaml").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    for path in new:
        with contextlib.suppress(OSError):
            path.rmdir()


def local_folder(path: str | Path) -> Path:
    """Return the folder of all runs.

    Raises:
        UserError: a remote one.
    """
    if "://" in str(path):
        raise UserError(f"trainer.default_root_dir {path}: runs are kept on local file systems; give a folder")
    return Path(path).expanduser()


def require_name(name: str) -> None:
    """Raise a UserError unless a name can be that of a folder under the root."""
    if not name or name in (".", "..") or any(sign in name for sign in "/\\\0"):
        raise UserError(f"name {name!r}: give the name of one folder, without slashes")
    if len(name.encode()) > 200:
        raise UserError(f"name {name[:20]!r}...: it is longer than a folder's may be; give one of at most 200 letters")


def find_checkpoint(wanted: str, root: Path, name: str) -> Path:
    """Turn `--ckpt_path` into a path: `last` and `best` mean those of the newest run of this name that has one.

    Raises:
        UserError: there is none.
    """
    if wanted not in ("last", "best"):
        if Path(wanted).is_dir():
            raise UserError(f"--ckpt_path {wanted}: a folder; give a .ckpt file in it")
        if not Path(wanted).is_file():
            raise UserError(
                f"--ckpt_path {wanted}: no such file; give a .ckpt file, or 'last' or 'best' of a run's name"
            )
        return Path(wanted)
    newer: list[str] = []
    for _, folder in sorted(versions(root / name), reverse=True):
        path = folder / CHECKPOINTS / f"{wanted}.ckpt"
        if path.is_file():
            if newer:
                rank_zero_warn(f"--ckpt_path {wanted} is {path}; newer, and without one: {', '.join(newer)}")
            return path
        newer.append(folder.name)
    others = {path.parents[2].name for path in root.glob(f"*/version_*/{CHECKPOINTS}/{wanted}.ckpt")}
    remedy = (
        f"give --name, one of {', '.join(sorted(others))}"
        if others
        else "train first, with fit and without --ckpt_path, or say with --trainer.default_root_dir where the runs are"
    )
    raise UserError(f"--ckpt_path {wanted}: no {wanted}.ckpt under {root / name}; {remedy}")


def root_of(checkpoint: Path) -> Path | None:
    """Return the `default_root_dir` of the run that a checkpoint lies in, None if it lies in none."""
    run = _run_of(checkpoint)
    return None if run is None else run.parent.parent


def _run_of(checkpoint: Path) -> Path | None:
    """Return the folder of the run that a checkpoint lies in, at any depth: a name with a slash makes folders."""
    inner = checkpoint
    for folder in checkpoint.parents:
        if (inner.name == CHECKPOINTS or _VERSION.fullmatch(folder.name)) and (folder / "config.yaml").is_file():
            return folder
        inner = folder
    return None


def versions(folder: Path) -> list[tuple[int, Path]]:
    """Return the versions of a run in the folder of its name, each with its number, in no order."""
    return [(number, path) for number, path in _numbered(folder) if path.is_dir()]


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    found = ((_VERSION.fullmatch(path.name), path) for path in folder.glob("version_*"))
    return [(int(number[1]), path) for number, path in found if number]
