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
    compare_image_steps,
    compare_plans,
    compare_steps,
    measure,
    measure_waiting,
)
from sinkformer_pl.cli.option_parser import OptionParser
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
    suites = [name.strip() for name in options.suites.split(",")] if options.suites else []
    if unknown := set(suites) - {*SUITES, "plans"}:
        raise UserError(
            f"--suites {', '.join(sorted(unknown))}: no such suite; there are {', '.join((*SUITES, 'plans'))}"
        )
    if options.json and not Path(options.json).absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: its folder doesn't exist; make it first")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU; leave it out, or install a PyTorch for this machine's")
    if options.training and options.dtype == "float64":
        raise UserError("--dtype float64: no training in this precision is timed; give float32, bfloat16 or float16")
    published = Published(options.published) if options.published else None
    torch.set_num_threads(options.threads)
    console = Console() if Console().is_terminal else Console(width=160)
    machine = _machine(options)
    console.print(machine)
    record: dict[str, object] = {"machine": machine}
    for suite in (name for name in suites if name in SUITES):
        results = []
        for case in SUITES[suite]:
            try:
                attend = None if published is None else published.attend
                results.append(
                    measure(
                        case,
                        repeats=options.repeats,
                        device=options.device,
                        dtype=DTYPES[options.dtype],
                        published=attend,
                    )
                )
            except torch.OutOfMemoryError:
                # Of a GPU; the other shapes may fit.
                console.print(f"{case}: the GPU's memory doesn't hold it")
        if not results:
            continue
        console.print(_table(suite, results))
        record[suite] = [result.as_row() for result in results]
    if "plans" in suites:
        for points in (1024, 4096):
            plans = compare_plans(points=points, n_iters=21, repeats=options.repeats)
            table = Table(f"plan of {points} x {points}, 21 half-steps, no gradient", "ms")
            for name, milliseconds in plans.items():
                table.add_row(name, f"{milliseconds:.1f}")
            console.print(table)
            record[f"plans_{points}"] = plans
    if options.training:
        record["steps"], record["waiting"] = _measure_training(options, published, console)
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=2), encoding="utf-8")
        console.print(f"results: {options.json}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="python -m sinkformer_pl benchmark",
        description="Forward and backward of Sinkhorn attention, against PyTorch's fused softmax attention.",
    )
    parser.add_argument(
        "--suites",
        help="of dense, streaming, long, gpu, plans; commas between; by default the first two, on a GPU gpu, and none "
        "with --training",
    )
    parser.add_argument("--training", action="store_true", help="whole training steps, and the wait for data")
    parser.add_argument("--batch", type=int, help="clouds in a batch, with --training; by default 16, 64 on a GPU")
    parser.add_argument("--points", type=int, help="points of each, with --training; by default 1000, 1024 on a GPU")
    parser.add_argument(
        "--images", type=int, help="images in a batch of ViT-S/16, with --training; by default 0 for none, 256 on a GPU"
    )
    parser.add_argument("--image_size", type=int, default=224, help="their side in pixels, a multiple of 16")
    parser.add_argument(
        "--fit",
        action="append",
        default=[],
        help="arguments of a fit whose wait for data is measured, with --training; may be given several times; by "
        "default those of the three configurations that need no files",
    )
    parser.add_argument("--repeats", type=int, default=15, help="interleaved repeats of each method")
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=list(DTYPES), help="by default float32, bfloat16 on a GPU")
    parser.add_argument("--json", help="file to write the results to")
    parser.add_argument("--published", help="folder of a checkout of github.com/michaelsdr/sinkformers, to run against")
    options = parser.parse_args(argv)
    on_gpu = options.device == "cuda"
    if options.suites is None and not options.training:
        options.suites = "gpu" if on_gpu else "dense,streaming"
    for name, here, there in (
        ("dtype", "float32", "bfloat16"),
        ("batch", 16, 64),
        ("points", 1000, 1024),
        ("images", 0, 256),
    ):
        if getattr(options, name) is None:
            setattr(options, name, there if on_gpu else here)
    return options


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
    for arguments in options.fit or [f"--config configs/{name}.yaml" for name in ("pointcloud", "image", "text")]:
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


def _machine(options: argparse.Namespace) -> str:
    threads, repeats = f"{options.threads} threads", f"{options.repeats} repeats"
    return f"{_device(options)}, {threads}, torch {torch.__version__}, {options.dtype}, {repeats}"


def _table(suite: str, results: Sequence[Result]) -> Table:
    first = results[0]
    columns = ("heads", "Q x K", "n_iters", f"{first.peer} ms", "Sinkhorn ms", "ratio", "quartiles", "counted")
    others = (f"{first.peer} counted", f"cuDNN / {first.peer}", "loop / ours", "published / ours", "peak MB", "its MB")
    title = f"{suite}: forward + backward, width 64, {first.dtype}, {first.device}"
    table = Table(*columns, *others, title=title)
    for result in results:
        case = result.case
        ratios = (result.softmax_counted, result.cudnn)
        table.add_row(
            str(case.heads),
            f"{case.queries} x {case.keys}",
            str(case.n_iters),
            f"{result.softmax_ms:.2f}",
            f"{result.sinkhorn_ms:.2f}",
            f"{result.ratio:.2f}",
            "{:.2f}-{:.2f}".format(*result.quartiles),
            f"{result.counted:.2f}",
            *("-" if value is None else f"{value:.2f}" for value in ratios),
            *("-" if value is None else f"{value:.1f}" for value in (result.naive, result.published)),
            *("-" if value is None else f"{value:.0f}" for value in (result.peak_mb, result.softmax_peak_mb)),
        )
    return table
