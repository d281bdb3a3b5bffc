"""One run of a comparison: an ordinary `fit` and an ordinary `test`."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkformer_pl.comparison.arms import Arm
from sinkformer_pl.training.run_folder import CHECKPOINTS, versions
from sinkformer_pl.training.run_record import FIT_RECORD


@dataclass(frozen=True)
class Trial:
    """A normalization and a seed.

    Attributes:
        arm: the normalization.
        seed: of the weights, and of the data: their division, order and augmentation.
        root: the folder of the comparison, in which every run has its own.
        shared: the arguments that all runs of the comparison have in common.
    """

    arm: Arm
    seed: int
    root: Path
    shared: tuple[str, ...]

    @property
    def label(self) -> str:
        """Return the name for messages."""
        return f"{self.arm.label}, seed {self.seed}"

    @property
    def name(self) -> str:
        """Return the name of the run, and of its folder."""
        return re.sub(r"[^\w.=-]+", "_", self.arm.label).strip("_") + f"-seed{self.seed}"

    @property
    def log(self) -> Path:
        """Return the file of what its commands print."""
        return self.root / "logs" / f"{self.name}.log"

    @property
    def folder(self) -> Path | None:
        """Return the folder of the newest version that is trained, else of the newest that can be resumed, if any."""
        found = [path for _, path in sorted(versions(self.root / self.name), reverse=True)]
        return next((path for fits in (_trained, _cut_off) for path in found if fits(path)), None)

    @property
    def trained(self) -> bool:
        """Tell whether its training has come to its end, and left weights to test unless they were tested already."""
        folder = self.folder
        return folder is not None and _trained(folder)

    @property
    def done(self) -> bool:
        """Tell whether it has been trained and tested."""
        folder = self.folder
        return folder is not None and read_fit(folder) is not None and read_test(folder) is not None

    @property
    def arguments(self) -> Sequence[str]:
        """Return the arguments of `fit`."""
        return (
            *self.shared,
            *self.arm.flags(),
            *("--seed_everything", str(self.seed), "--data.seed", str(self.seed)),
            *("--name", self.name, "--trainer.default_root_dir", str(self.root)),
        )

    def commands(self) -> list[list[str]]:
        """Return what is left to do, as arguments of the command line; nothing for a run that is done.

        A training that was cut off resumes from its last complete epoch.
        """
        todo = []
        if not self.trained:
            todo.append(["fit", *self.arguments, *(() if self.folder is None else ("--ckpt_path", "last"))])
        if not self.done:
            todo.append(["test", *self.arguments, "--ckpt_path", "best"])
        return todo

    def line(self) -> str:
        """Return the same as one line for a shell."""
        return " && ".join(shlex.join(["python", "-m", "sinkformer_pl", *command]) for command in self.commands())


def read_fit(folder: Path) -> dict[str, Any] | None:
    """Read what `fit` left at its end; None if there is nothing, or nothing that can be read."""
    return _read(folder / FIT_RECORD, "resumed", "best")


def read_test(folder: Path) -> dict[str, Any] | None:
    """Read what `test` left, likewise."""
    return _read(folder / "test.json", "metrics")


def _read(path: Path, *keys: str) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.keys() >= set(keys) else None


def _trained(folder: Path) -> bool:
    weights = (folder / CHECKPOINTS / "best.ckpt").is_file()
    return read_fit(folder) is not None and (weights or read_test(folder) is not None)


def _cut_off(folder: Path) -> bool:
    # A training that is over has nothing to resume, and wouldn't write its best.ckpt again.
    return read_fit(folder) is None and (folder / CHECKPOINTS / "last.ckpt").is_file()
