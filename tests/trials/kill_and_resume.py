"""Kill a training several times at random moments, go on from `last.ckpt` each time, and compare with one left alone.

    python tests/trials/kill_and_resume.py --config configs/pointcloud.yaml --kills 5
    python tests/trials/kill_and_resume.py --config configs/text.yaml --signals KILL,TERM --trainer.max_epochs 4

Weights, optimizer, schedule, random states, best.ckpt and metrics.csv must be equal to the last bit. What isn't known
here goes to `fit`. Both trainings write last.ckpt within epochs (`--every`) and read data in `--workers` processes.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/pointcloud.yaml")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--signals", default="KILL", help="drawn from at each kill: KILL,TERM,INT,USR1")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", default="5", help="checkpoint_every, 0 for the ends of epochs alone")
    options, more = parser.parse_known_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        arguments = ["--config", str(Path(options.config).resolve()), "--data.num_workers", str(options.workers)]
        arguments += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", *more]
        if options.every != "0":
            arguments += ["--checkpoint_every", options.every]
        alone = root / "alone"
        fit(alone, arguments)
        [reference] = alone.glob("*/version_0")
        seconds = (reference / "fit.json").stat().st_mtime - (reference / "config.yaml").stat().st_mtime
        print(f"left alone: {seconds:.1f} s of training", flush=True)

        for number in range(options.kills):
            name = draw.choice(options.signals.split(","))
            delay = draw.uniform(0.1, 1.6) * seconds / (options.kills + 1)
            killed = kill(root / "killed", arguments, getattr(signal, f"SIG{name}"), delay)
            print(f"kill {number + 1} by SIG{name}: {killed}", flush=True)
        fit(root / "killed", arguments)
        [run] = (root / "killed").glob("*/version_*")
        print("resumed at epochs", yaml.safe_load((run / "fit.json").read_text())["resumed"])
        found = differences(reference, run)
    print("\n".join(found) or "equal to the last bit")
    sys.exit(bool(found))


def kill(root: Path, arguments: Sequence[str], number: int, delay: float) -> str:
    """Train on until `delay` seconds after the training has begun; kill the process group, workers and all."""
    process = start(root, arguments)
    began = time.time()
    while process.poll() is None and not any(f.stat().st_mtime > began for f in root.glob("*/*/config.yaml")):
        time.sleep(0.01)
    time.sleep(delay)
    if process.poll() is None:
        os.killpg(process.pid, number)
    status = process.wait(timeout=300)
    with (root / "log").open() as log:
        last = log.read().splitlines()[-1]
    return f"{delay:.2f} s after the start, status {status}: {last}"


def fit(root: Path, arguments: Sequence[str]) -> None:
    process = start(root, arguments)
    if process.wait():
        sys.exit((root / "log").read_text())


def start(root: Path, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a fit, from last.ckpt if there is one."""
    root.mkdir(exist_ok=True)
    last = list(root.glob("*/*/checkpoints/last.ckpt"))
    goes_on = ["--ckpt_path", str(last[0])] if last else []
    if not last:
        for begun in root.glob("*/version_*"):
            begun.rename(root / f"{begun.parent.name}-{time.time_ns()}")
    command = [sys.executable, "-m", "sinkformer_pl", "fit", *arguments, *goes_on]
    with (root / "log").open("a") as log:
        return subprocess.Popen(
            [*command, "--trainer.default_root_dir", str(root)], stdout=log, stderr=log, start_new_session=True
        )


def differences(one: Path, other: Path) -> list[str]:
    """What two runs' folders differ in: checkpoints, bit for bit, and metrics.csv."""
    found = []
    for name in ("last.ckpt", "best.ckpt"):
        first, second = (
            torch.load(folder / "checkpoints" / name, map_location="cpu", weights_only=True) for folder in (one, other)
        )
        for content in (first, second):
            # Where the run lies, what it was told, how often it was begun; and a score that Lightning only shows.
            content.pop("sinkformer_pl_config")
            content["loops"] = content["loops"]["fit_loop"]["epoch_progress"]
            content["callbacks"] = {
                key: {
                    name: value
                    for name, value in state.items()
                    if "path" not in name and name not in ("resumed", "dirpath", "best_k_models", "current_score")
                }
                for key, state in content["callbacks"].items()
            }
        found += [f"{name}: {place}" for place in unequal(first, second)]
    if (one / "metrics.csv").read_text() != (other / "metrics.csv").read_text():
        found.append("metrics.csv")
    return found


def unequal(one: Any, other: Any, place: str = "") -> list[str]:
    """The places where two nested values differ."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [place]
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [*one, *(key for key in other if key not in one)]
        return [
            p for key in keys for p in unequal(one.get(key, "nothing"), other.get(key, "nothing"), f"{place}/{key}")
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [p for i, pair in enumerate(zip(one, other, strict=True)) for p in unequal(*pair, f"{place}/{i}")]
    return [] if one == other else [f"{place}: {str(one)[:60]} and {str(other)[:60]}"]


if __name__ == "__main__":
    main()
