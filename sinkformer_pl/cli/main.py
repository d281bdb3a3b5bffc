"""Which command runs, and how its failure is said."""

import os
import sys
from collections.abc import Sequence

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from sinkformer_pl.errors import UserError

TRAINING_COMMANDS = ("fit", "validate", "test", "predict")

USAGE = """\
usage: python -m sinkformer_pl COMMAND ...

  fit             train: --config configs/pointcloud.yaml [--model.normalization NAME] [--data.root PATH] ...
  validate, test  evaluate a checkpoint: --ckpt_path PATH (the checkpoint knows its configuration; flags override)
  predict         write predictions.csv: --ckpt_path PATH
  compare         train and test under several normalizations and seeds: --config FILE --normalizations Softmax,Sinkhorn
  normalizations  list every registered normalization and what it guarantees
  benchmark       time Sinkhorn attention against fused softmax attention

  COMMAND --help lists the options of a command."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: the arguments; None takes those of the process.

    Raises:
        SystemExit: 2, after one line on stderr, when the user can mend the cause.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path and "" not in sys.path:
        # The installed script, unlike python -m, doesn't find modules here: those of --plugins.
        sys.path.insert(0, os.getcwd())
    try:
        _dispatch(argv)
    except (UserError, MisconfigurationException) as error:
        print(f"error: {_own_words(error)}", file=sys.stderr)
        raise SystemExit(2) from None


def _own_words(error: Exception) -> str:
    """The message without the traceback that a loader's worker process puts around it."""
    text = str(error)
    return text.rpartition("UserError: ")[2].strip() if text.startswith("Caught UserError in DataLoader") else text


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
    elif argv[0] == "normalizations":
        from sinkformer_pl.cli.catalogue import print_normalizations

        print_normalizations(argv[1:])
    elif argv[0] == "benchmark":
        from sinkformer_pl.cli.benchmark import run_benchmark

        run_benchmark(argv[1:])
    elif argv[0] == "compare":
        from sinkformer_pl.cli.compare import run_compare

        run_compare(argv[1:])
    elif argv[0] in TRAINING_COMMANDS:
        from sinkformer_pl.cli.training import run_training

        run_training(argv)
    else:
        commands = ", ".join((*TRAINING_COMMANDS, "compare", "normalizations", "benchmark"))
        raise UserError(f"{argv[0]}: no such command; the commands are {commands}")
