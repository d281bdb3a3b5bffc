"""One run of a comparison: an ordinary `fit` and an ordinary `test`."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sinkformer_pl.comparison.arms import Arm
from sinkformer_pl.runs.folders import CHECKPOINTS, versions
from sinkformer_pl.runs.record import FIT_RECORD


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
        """For messages."""
        return f"{self.arm.label}, seed {self.seed}"

    @property
    def name(self) -> str:
        """The run's name, and so that of its folder."""
        return re.sub(r"[^\w.=-]+", "_", self.arm.label).strip("_") + f"-seed{self.seed}"

    @property
    def log(self) -> Path:
        """The file of what its commands print."""
        return self.root / "logs" / f"{self.name}.log"

    @property
    def folder(self) -> Path | None:
        """The folder of the newest version that has come to its end, else the newest with a checkpoint, if any."""
        found = [path for _, path in sorted(versions(self.root / self.name))]
        for mark in (FIT_RECORD, f"{CHECKPOINTS}/last.ckpt"):
            having = [path for path in found if (path / mark).is_file()]
            if having:
                return having[-1]
        return None

    @property
    def trained(self) -> bool:
        """Whether its training has come to its end."""
        return self.folder is not None and (self.folder / FIT_RECORD).is_file()

    @property
    def done(self) -> bool:
        """Whether it has been trained and tested."""
        folder = self.folder
        return folder is not None and all((folder / name).is_file() for name in (FIT_RECORD, "test.json"))

    def commands(self) -> list[list[str]]:
        """What is left to do, as arguments of the command line; nothing for a run that is done.

        A training that was cut off goes on from its last complete epoch.
        """
        todo = []
        if not self.trained:
            todo.append(["fit", *self._arguments(), *(() if self.folder is None else ("--ckpt_path", "last"))])
        if not self.done:
            todo.append(["test", *self._arguments(), "--ckpt_path", "best"])
        return todo

    def line(self) -> str:
        """The same as one line for a shell."""
        return " && ".join(shlex.join(["python", "-m", "sinkformer_pl", *command]) for command in self.commands())

    def _arguments(self) -> Sequence[str]:
        return (
            *self.shared,
            *self.arm.flags(),
            *("--seed_everything", str(self.seed), "--data.seed", str(self.seed)),
            *("--name", self.name, "--trainer.default_root_dir", str(self.root)),
        )
