"""The benchmark command: a table, and JSON where asked for."""

import argparse
import json
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sinkformer_pl.benchmark import (
    SUITES,
    Published,
    Result,
    Step,
    busy_cores,
    compare_image_steps,
    compare_plans,
    compare_steps,
    measure,
    measure_waiting,
)
from sinkformer_pl.cli.option_parser import OptionParser, at_least
from sinkformer_pl.cli.settings import read_settings
from sinkformer_pl.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def run(argv: Sequence[str]) -> None:
    """Measure Sinkhorn attention against fused softmax attention and others.

    Args:
        argv: arguments after the command.

    Raises:
        UserError: an unknown suite, or no checkout in the folder given.
    """
    options = _parse(argv)
    published = Published(options.published) if options.published else None
    torch.set_num_threads(options.threads)
    console = Console() if Console().is_terminal else Console(width=160)
    machine = (
        f"{_device(options)}, {options.threads} threads, torch {torch.__version__}, {options.dtype}, "
        f"{options.repeats} repeats" + f", {options.busy} other busy processes" * bool(options.busy)
    )
    console.print(machine)
    record: dict[str, object] = {"machine": machine}
    with busy_cores(options.busy):
        for suite in options.suites:
            if suite == "plans":
                record |= _measure_plans(options, console)
            elif results := _measure_suite(suite, options, published, console):
                console.print(_table(suite, results))
                record[suite] = [result.as_row() for result in results]
        if options.training:
            record["steps"], record["waiting"] = _measure_training(options, published, console)
    if options.json:
        options.json.write_text(json.dumps(record, indent=2), encoding="utf-8")
        console.print(f"results: {options.json}")


def _suites(text: str) -> list[str]:
    suites, known = [name.strip() for name in text.split(",")], [*SUITES, "plans"]
    if unknown := sorted({*suites} - {*known}):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: no such suite; there are {', '.join(known)}")
    return suites


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="python -m sinkformer_pl benchmark",
        description="Forward and backward of Sinkhorn attention, against PyTorch's fused softmax attention.",
    )
    parser.add_argument(
        "--suites",
        type=_suites,
        help="of dense, streaming, long, gpu, plans; commas between; by default the first two, on a GPU gpu, and none "
        "with --training",
    )
    parser.add_argument("--training", action="store_true", help="whole training steps, and the wait for data")
    parser.add_argument("--batch", type=at_least(1), help="clouds in a batch of --training; by default 16, 64 on a GPU")
    parser.add_argument("--points", type=at_least(1), help="points of each cloud; by default 1000, 1024 on a GPU")
    parser.add_argument(
        "--images",
        type=at_least(0),
        help="images in a batch of ViT-S/16, with --training; by default 0 for none, 256 on a GPU",
    )
    parser.add_argument("--image_size", type=at_least(16), default=224, help="their side in pixels, a multiple of 16")
    parser.add_argument(
        "--fit",
        action="append",
        default=[],
        help="arguments of a fit whose wait for data is measured, with --training; may be given several times; by "
        "default those of the three configurations that need no files",
    )
    parser.add_argument("--repeats", type=at_least(1), default=15, help="interleaved repeats of each method")
    parser.add_argument("--threads", type=at_least(1), default=2, help="threads of the CPU")
    parser.add_argument(
        "--busy",
        type=at_least(0),
        default=0,
        help="other processes that each keep a core busy, as on a laptop; 0 for none",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=list(DTYPES), help="by default float32, bfloat16 on a GPU")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--published", help="folder of a checkout of github.com/michaelsdr/sinkformers, to run against")
    options = parser.parse_args(argv)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU; leave it out, or install a PyTorch for this machine's")
    defaults = {"dtype": ("float32", "bfloat16"), "batch": (16, 64), "points": (1000, 1024), "images": (0, 256)}
    defaults["suites"] = ([], []) if options.training else (["dense", "streaming"], ["gpu"])
    for name, (here, there) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, there if on_gpu else here)
    if options.json and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: its folder doesn't exist; make it first")
    if options.training and options.dtype == "float64":
        raise UserError("--dtype float64: no training in this precision is timed; give float32, bfloat16 or float16")
    if options.image_size % 16:
        raise UserError(f"--image_size {options.image_size}: give a multiple of 16")
    if options.training:
        options.fit = options.fit or [f"--config configs/{name}.yaml" for name in ("pointcloud", "image", "text")]
        for arguments in options.fit:
            # What is wrong with them is said before the minutes that the steps take.
            read_settings("fit", shlex.split(arguments))
    return options


def _measure_suite(
    suite: str, options: argparse.Namespace, published: Published | None, console: Console
) -> list[Result]:
    shared = {"repeats": options.repeats, "device": options.device, "dtype": DTYPES[options.dtype]}
    theirs = None if published is None else published.attend
    results = []
    for case in SUITES[suite]:
        try:
            results.append(measure(case, published=theirs, **shared))
        except torch.OutOfMemoryError:
            # Of a GPU; the other shapes may fit.
            console.print(f"{case}: the GPU's memory doesn't hold it")
    return results


def _measure_plans(options: argparse.Namespace, console: Console) -> dict[str, object]:
    found: dict[str, object] = {}
    for points in (1024, 4096):
        plans = compare_plans(points=points, n_iters=21, repeats=options.repeats)
        table = Table(f"plan of {points} x {points}, 21 half-steps, no gradient", "ms")
        for name, milliseconds in plans.items():
            table.add_row(name, f"{milliseconds:.1f}")
        console.print(table)
        found[f"plans_{points}"] = plans
    return found


def _measure_training(
    options: argparse.Namespace, published: Published | None, console: Console
) -> tuple[list[object], list[object]]:
    shared = {"repeats": options.repeats, "device": options.device, "dtype": DTYPES[options.dtype]}
    steps = compare_steps(batch=options.batch, points=options.points, published=published, **shared)
    title = f"Set Transformer of width 256, {options.batch} clouds of {options.points} points"
    console.print(_steps_table(title, options, steps))
    if options.images:
        images = compare_image_steps(batch=options.images, size=options.image_size, **shared)
        title = f"ViT-S/16, {options.images} images of {options.image_size} x {options.image_size}"
        console.print(_steps_table(title, options, images))
        steps += [replace(step, name=f"ViT-S/16, {step.name}") for step in images]
    table = Table("fit", "workers", "ms a step", "waiting for data")
    found = []
    for arguments in options.fit:
        for workers in (0, 2):
            waiting = measure_waiting(shlex.split(arguments), workers=workers)
            table.add_row(waiting.arguments, str(workers), f"{waiting.ms:.1f}", f"{waiting.share:.1%}")
            found.append(waiting)
    console.print(table)
    return [asdict(step) for step in steps], [asdict(waiting) for waiting in found]


def _steps_table(title: str, options: argparse.Namespace, steps: Sequence[Step]) -> Table:
    precision = options.dtype if options.dtype == "float32" else f"{options.dtype} autocast"
    columns = ("ms a step", "ratio to its Softmax", "quartiles")
    table = Table("attention", *columns, title=f"{title}: {_device(options)}, {precision}")
    for step in steps:
        table.add_row(step.name, f"{step.ms:.1f}", f"{step.ratio:.2f}", "{:.2f}-{:.2f}".format(*step.quartiles))
    return table


def _device(options: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()


def _table(suite: str, results: Sequence[Result]) -> Table:
    first = results[0]
    columns = ("heads", "Q x K", "n_iters", f"{first.peer} ms", "Sinkhorn ms", "ratio", "quartiles", "counted")
    others = (f"{first.peer} counted", f"cuDNN / {first.peer}", "loop / ours", "published / ours", "peak MB", "its MB")
    title = f"{suite}: forward + backward, width 64, {first.dtype}, {first.device}"
    table = Table(*columns, *others, title=title)
    for result in results:
        case = result.case
        table.add_row(
            str(case.heads),
            f"{case.queries} x {case.keys}",
            str(case.n_iters),
            *_figures(2, result.softmax_ms, result.sinkhorn_ms, result.ratio),
            "{:.2f}-{:.2f}".format(*result.quartiles),
            *_figures(2, result.counted, result.softmax_counted, result.cudnn),
            *_figures(1, result.naive, result.published),
            *_figures(0, result.peak_mb, result.softmax_peak_mb),
        )
    return table


def _figures(digits: int, *values: float | None) -> list[str]:
    return ["-" if value is None else f"{value:.{digits}f}" for value in values]
