"""Run the compare command."""

import argparse
import contextlib
import json
import platform
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from sinkformer_pl.cli.layers import as_spec, split_off
from sinkformer_pl.cli.option_parser import OptionParser, at_least
from sinkformer_pl.cli.preflight import writing_in
from sinkformer_pl.cli.refusals import refusals_of_classes
from sinkformer_pl.cli.run import Run, handled_signals
from sinkformer_pl.cli.settings import Given, read_settings
from sinkformer_pl.cli.validate import Spec
from sinkformer_pl.comparison import Trial, read_arms, read_result, run_all, write_report
from sinkformer_pl.errors import UserError
from sinkformer_pl.tasks.protocol import lowest_is_best, monitors_of
from sinkformer_pl.training.atomic_file import replacing
from sinkformer_pl.training.folder_lock import locked
from sinkformer_pl.training.run_folder import DEFAULT_NAME, local_folder, require_name, versions

RECORD = "comparison.json"

DECIDED = {
    "model.normalization": "--normalizations names them",
    "seed_everything": "--seeds sets it",
    "data.seed": "--seeds sets it",
    "ckpt_path": "a run that was cut off resumes by itself",
    "print_config": "ask fit for it",
}
"""Arguments of `fit` that a comparison decides itself, and how."""

NEEDED = {
    "max_epochs": "nothing would be trained",
    "max_steps": "nothing would be trained",
    "limit_train_batches": "nothing would be trained",
    "limit_test_batches": "nothing would be tested",
    "enable_checkpointing": "no weights would be kept to test",
}
"""Arguments of the Trainer that a comparison can't have at 0 or false, and why."""

METRIC = "test/accuracy"
"""Metric that is compared by default."""


def run(argv: Sequence[str]) -> None:
    """Train and test the same network under several normalizations and seeds, and report.

    Args:
        argv: arguments after the command.

    Raises:
        UserError: wrong arguments, or runs that failed.
    """
    options, rest = _parse(argv)
    names, rest = split_off(rest, ("--name",))
    roots, rest = split_off(rest, ("--trainer.default_root_dir",))
    given = Given.read(rest)
    _require_fair(given)
    request = {"files": [content for _, content in given.configs], "flags": split_off(rest, ("--config", "-c"))[1]}
    name = names[-1] if names else f"{given.layers.get('name', DEFAULT_NAME)}-compare"
    require_name(name)
    folder = (local_folder(roots[-1]) if roots else given.root) / name
    configured = given.layers.get("model.normalization")
    arms = read_arms(options.normalizations, as_spec(configured) if isinstance(configured, str | Mapping) else {})
    shared = ("--trainer.enable_progress_bar", "false", *rest)
    trials = [Trial(arm, seed, folder, shared) for seed in _seeds(options.seeds) for arm in arms]
    _require_same(folder, request)
    left = [trial for trial in trials if not trial.done]
    # What is done is reported under a metric that the task must have, too.
    model = _rehearse(left or (trials[:1] if options.metric != METRIC else []), build=not options.dry_run)
    lowest = None if model is None else _require_tested_metric(options.metric, model)
    if options.dry_run:
        for trial in left:
            print(trial.line())
        if not left:
            print(f"nothing to do: all {len(trials)} runs in {folder} are done", file=sys.stderr)
        return
    failed = _run(trials, folder, request, options.jobs)
    ordered = sorted(trials, key=lambda trial: arms.index(trial.arm))
    results = [read_result(trial, failed=trial.name in failed) for trial in ordered]
    command = shlex.join(["python", "-m", "sinkformer_pl", "compare", *argv])
    text = write_report(
        results, metric=options.metric, root=folder, command=command, machine=_machine(options.jobs), lowest=lowest
    )
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(Markdown(text))
    for file in ("runs.csv", "curves.csv", "summary.md", "comparison.png"):
        print(folder / file)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(trials)} runs failed, the first by: {next(iter(failed.values()))}; mend the cause "
            "and give the same command again, which does only what is missing"
        )


def _rehearse(left: Sequence[Trial], *, build: bool) -> Any:
    """Do what `fit` does with its arguments before it reads data: what is wrong with them is wrong with all runs.

    Args:
        left: the runs that aren't done; one of each normalization is looked at.
        build: whether to build data, task and trainer of one; the runs of --dry-run may be for a machine with a GPU
            that this one lacks.

    Returns:
        The task, where it was built.
    """
    chosen = None
    with handled_signals() as signals:
        for trial in {trial.arm.label: trial for trial in left}.values():
            settings = read_settings("fit", trial.arguments)
            _require_tested(settings.run["trainer"])
            with refusals_of_classes(f"--normalizations {trial.arm.label}: "):
                normalization = settings.run["model"]["normalization"].build()()
            # A network under a doubly stochastic one may have something to warn of.
            if chosen is None or normalization.promises.unit_columns:
                chosen = settings
        return Run.build(chosen, signals).model if chosen is not None and build else None


def _require_tested_metric(metric: str, model: Any) -> bool:
    """Refuse a metric that the test of a task doesn't log.

    Returns:
        Whether the lowest is best.

    Raises:
        UserError: names those that it logs.
    """
    validated = [name for name in monitors_of(model) if name.startswith("val/")]
    tested = {name.replace("val/", "test/", 1): name for name in validated}
    if tested and metric not in tested:
        raise UserError(f"--metric {metric}: the test logs none of this name; give one of {', '.join(tested)}")
    return lowest_is_best(model, tested.get(metric, metric))


def _run(trials: Sequence[Trial], folder: Path, request: Mapping[str, Any], jobs: int) -> dict[str, str]:
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with contextlib.ExitStack() as held:
        with writing_in(folder):
            folder.mkdir(parents=True, exist_ok=True)
            refusal = f"{folder}: another process works in it, such as a run of a killed comparison; wait, or stop it"
            lock = held.enter_context(locked(folder / "lock", refusal))
            with replacing(folder / RECORD) as file:
                json.dump(request, file, indent=2)
        done = sum(trial.done for trial in trials)
        print(f"{len(trials)} runs in {folder}, {done} of them done, {jobs} at once", flush=True)
        return run_all(trials, jobs=jobs, lock=lock, said=lambda line: print(line, flush=True))


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OptionParser(
        prog="python -m sinkformer_pl compare",
        usage="python -m sinkformer_pl compare --config FILE --normalizations NAMES [--OPTION VALUE ...]",
        description="Train and test the same network under several normalizations and seeds; every other argument is "
        "one of fit, --config FILE first of all. What is done already isn't done again.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--normalizations",
        required=True,
        help="such as 'Softmax,Sinkhorn(n_iters=21)'; the first is what the others are compared with; one without "
        "arguments has those of the configuration",
    )
    parser.add_argument("--seeds", default="0,1,2", help="of weights and data, each for every normalization")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="runs at once; they share the processor's threads")
    parser.add_argument(
        "--metric", default=METRIC, help=f"what the tables and the picture show: a metric of the test ({METRIC})"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what is left to do, a run a line, for any scheduler"
    )
    return parser.parse_known_args(argv)


def _require_fair(given: Given) -> None:
    if not given.configs:
        raise UserError("compare needs to know what to train: give --config FILE, such as configs/pointcloud.yaml")
    for key, _ in given.flags:
        for taken, reason in DECIDED.items():
            if f"{key}.".startswith(f"{taken}."):
                raise UserError(f"--{key} can't be given to compare: {reason}; leave it out")


def _require_tested(trainer: Spec) -> None:
    for name, reason in NEEDED.items():
        if trainer[name] == 0:
            value = str(trainer[name]).lower()
            raise UserError(f"trainer.{name} {value}: {reason}; give another value, or leave it out")
    if trainer["fast_dev_run"]:
        raise UserError(
            "trainer.fast_dev_run: it keeps no weights to test; leave it out, or try the configuration with fit"
        )


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < 2**32 for part in parts):
        raise UserError(f"--seeds {text}: give whole numbers from 0 to 2**32 - 1, with commas between")
    seeds = [int(part) for part in parts]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: a seed stands there twice; name each once")
    return seeds


def _require_same(folder: Path, request: Mapping[str, Any]) -> None:
    """Refuse other arguments beside runs that are there; normalizations and seeds may be added at any time."""
    path = folder / RECORD
    if not path.is_file() or not any(versions(run) for run in folder.iterdir()):
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path}: it is damaged ({error}), and nothing else says which arguments the runs beside it had; delete "
            "it if they were these, or give this comparison another --name"
        ) from None
    if record != json.loads(json.dumps(request)):
        raise UserError(
            f"{folder}: it holds runs with other arguments ({path.name} has them); give this comparison another --name"
        )


def _machine(jobs: int) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return f"{device}, {jobs} at once, torch {torch.__version__}, Python {platform.python_version()}"
