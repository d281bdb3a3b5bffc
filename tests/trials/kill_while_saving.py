"""Kill -9 a process that writes a checkpoint over and over, and look what is left: does a good one load?

    python tests/trials/kill_while_saving.py --kills 100
    python tests/trials/kill_while_saving.py --kills 20 --stock    # Lightning's own way of writing

Each round a process saves by `Trainer.save_checkpoint` to the same path and is killed at a random moment. The file must
then hold the newest checkpoint that was complete or the one that was being written, every weight of it. TMPDIR is on
another file system than the checkpoint, which is where Lightning stages what it writes.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from sinkformer_pl.training.checkpoint_io import VerifiedCheckpointIO


class Weights(pl.LightningModule):
    """As many bytes as asked for, all of one number; parts of 4 MiB, as of a network's layers."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.parts = torch.nn.ParameterList(torch.zeros(2**20) for _ in range(max(megabytes // 4, 1)))

    def fill(self, number: int) -> None:
        """Be checkpoint `number`."""
        with torch.no_grad():
            for part in self.parts:
                part.fill_(number)


def found(plugin: TorchCheckpointIO, path: Path) -> int | None:
    """The number of the checkpoint at a path, None if it isn't whole."""
    try:
        parts = plugin.load_checkpoint(path, weights_only=True)["state_dict"].values()
    except Exception as error:
        print(f"  {type(error).__name__}: {str(error)[:200]}", flush=True)
        return None
    numbers = {float(value) for part in parts for value in (part.min(), part.max())}
    return int(numbers.pop()) if len(numbers) == 1 else None


def save_until_killed(trainer: pl.Trainer, model: Weights, path: Path, number: int, report: int) -> None:
    """What the killed process does."""
    while True:
        number += 1
        model.fill(number)
        os.write(report, f"begin {number}\n".encode())
        trainer.save_checkpoint(path)
        os.write(report, f"done {number}\n".encode())


def main() -> None:
    """Run the trial; exits with 1 if a good checkpoint was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--megabytes", type=int, default=104, help="size of the checkpoint")
    parser.add_argument("--stock", action="store_true", help="write by Lightning's own plugin")
    parser.add_argument("--folder", help="where the checkpoint goes; a new temporary folder by default")
    parser.add_argument("--tmpdir", default="/dev/shm", help="TMPDIR is made in this folder")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between the rounds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    os.nice(10)
    torch.set_num_threads(1)
    moments = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-", dir=options.folder))
    staging = Path(tempfile.mkdtemp(prefix="kill-", dir=options.tmpdir))
    os.environ["TMPDIR"], tempfile.tempdir = str(staging), None
    path = folder / "last.ckpt"

    plugin = TorchCheckpointIO() if options.stock else VerifiedCheckpointIO()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False, plugins=[plugin]
    )
    model = Weights(options.megabytes)
    trainer.strategy.connect(model)

    trainer.save_checkpoint(path)
    started = time.perf_counter()
    trainer.save_checkpoint(path)
    seconds = time.perf_counter() - started
    result = {
        "way": "stock Lightning" if options.stock else "sinkformer_pl",
        "MB": round(path.stat().st_size / 1e6),
        "other file system": folder.stat().st_dev != staging.stat().st_dev,
        "kills": 0,
        "killed while saving": 0,
        "lost": 0,
        "leftovers": 0,
    }
    newest = 0
    try:
        for _ in range(options.kills):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(reading)
                with contextlib.suppress(BaseException):
                    save_until_killed(trainer, model, path, newest, writing)
                os._exit(1)
            os.close(writing)
            report = os.read(reading, 100)
            time.sleep(moments.uniform(0, 2.5 * seconds))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            while more := os.read(reading, 10000):
                report += more
            os.close(reading)
            lines = report.decode().split("\n")[:-1]
            newest = max([newest, *(int(line.removeprefix("done ")) for line in lines if line.startswith("done"))])
            result["kills"] += 1
            result["killed while saving"] += lines[-1].startswith("begin")
            number = found(plugin, path)
            if number not in (newest, newest + 1):
                result["lost"] += 1
                print(f"kill {result['kills']}: found {number}, newest complete {newest}", flush=True)
                model.fill(newest)
                trainer.save_checkpoint(path)
            else:
                newest = number
            for leftover in [*folder.glob(".*"), *staging.iterdir()]:
                result["leftovers"] += 1
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            time.sleep(options.pause)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(staging)
    print(json.dumps(result))
    sys.exit(1 if result["lost"] else 0)


if __name__ == "__main__":
    main()
