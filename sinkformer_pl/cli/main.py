"""Dispatch a command, and report its failure in one line."""

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from importlib.metadata import version

from sinkformer_pl.cli.layers import from_home
from sinkformer_pl.cli.processes import first_to_fail, together
from sinkformer_pl.errors import RunError, UserError
from sinkformer_pl.training.cores import share_cores

TRAINING_COMMANDS = ("fit", "validate", "test", "predict")

OTHER_COMMANDS = ("export", "compare", "inspect", "normalizations", "flow", "benchmark")
"""Each in a module of its name, with a function `run`; imported when it is asked for, since torch takes seconds."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

FILES = {
    **dict.fromkeys(FULL, "free some space, or give another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or give another place"),
}
"""Remedies of errors in reading and writing files, by their number."""

USAGE = """\
usage: python -m sinkformer_pl COMMAND ...

  fit             train: --config configs/pointcloud.yaml [--model.normalization NAME] [--data.root PATH] ...
  validate, test  evaluate a checkpoint: --ckpt_path PATH (the checkpoint knows its configuration; flags override)
  predict         say what files, folders, lines or tables are: --ckpt_path PATH FILE... [--output NAME.csv]
  export          a model for other programs: --ckpt_path PATH --format safetensors|torch|onnx [FILE...]
  compare         train and test under several normalizations and seeds: --config FILE --normalizations Softmax,Sinkhorn
  inspect         write attention to an HTML page: --ckpt_path PATH [--split test] (needs plotly)
  normalizations  list every registered normalization and what it guarantees
  flow            attention as a gradient flow, and its heat limit: --config configs/flow.yaml
  benchmark       time Sinkhorn attention against fused softmax attention

  COMMAND --help lists the options of a command, --version says which version this is."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: the arguments; None takes those of the process.

    Raises:
        SystemExit: after one line on stderr: 2 when the arguments or files are at fault, 1 when a run was cut off.
    """
    argv = [_from_home(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names of classes have letters that not every terminal shows.
            stream.reconfigure(errors="backslashreplace")
    if os.getcwd() not in sys.path and "" not in sys.path:
        # The installed script, unlike python -m, doesn't find modules here: those of --plugins.
        sys.path.insert(0, os.getcwd())
    with share_cores(), together() if argv[:1] and argv[0] in TRAINING_COMMANDS else nullcontext():
        try:
            _dispatch(argv)
        except KeyboardInterrupt:
            print("stopped by SIGINT", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
        except Exception as error:
            line = _for_users(error)
            if first_to_fail():
                if line is None:
                    raise
                print(f"error: {line}", file=sys.stderr)
            raise SystemExit(1 if line is None or isinstance(error, RunError) else 2) from None


def _from_home(argument: str) -> str:
    """Write out the ~ of a path, which a shell does, but not behind `=`."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return flag + equals + from_home(value)


def _for_users(error: Exception) -> str | None:
    """Return what an error says that the user can mend, None for any other."""
    text = str(error)
    if "No supported gpu backend" in text:
        return "trainer.accelerator gpu: PyTorch sees no GPU here; give --trainer.accelerator cpu, or leave it out"
    if found := re.search(r"strategy `(\w+)` requires a GPU", text):
        return f"trainer.strategy {found[1]}: it needs GPUs, and PyTorch sees none here; give --trainer.strategy ddp"
    # A loader's worker and a spawned process put a traceback around it.
    found = re.search(r"^sinkformer_pl\.errors\.\w+: (.*)", text, re.MULTILINE | re.DOTALL)
    if found:
        return found[1].strip()
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.errno in FILES and (error.filename or error.errno in FULL):
        return f"{error.filename or 'the output'}: {error.strerror}; {FILES[error.errno]}"
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "Cannot allocate memory" in text:
        return f"{' '.join(text.split()) or 'out of memory'}; make the network, the data or data.batch_size smaller"
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    return text if isinstance(error, MisconfigurationException) else None


def _dispatch(argv: list[str]) -> None:
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
    elif command == "--version":
        print(f"sinkformer_pl {version('sinkformer_pl')}, torch {version('torch')}")
    elif command == "predict":
        from sinkformer_pl.cli.predict import run

        run(rest)
    elif command in TRAINING_COMMANDS:
        from sinkformer_pl.cli.run import train_or_evaluate

        train_or_evaluate(command, rest)
    elif command in OTHER_COMMANDS:
        import_module(f"sinkformer_pl.cli.{command}").run(rest)
    else:
        commands = ", ".join((*TRAINING_COMMANDS, *OTHER_COMMANDS))
        raise UserError(f"{command}: no such command; the commands are {commands}")
