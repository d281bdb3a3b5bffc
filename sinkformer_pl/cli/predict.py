"""Run the predict command: on files, folders, lines, tables and arrays of one's own, or on a split of the data."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from sinkformer_pl.cli.layers import module_names
from sinkformer_pl.cli.option_parser import OptionParser, at_least
from sinkformer_pl.cli.run import handled_signals, train_or_evaluate
from sinkformer_pl.cli.settings import RunSettings
from sinkformer_pl.data.loading import default_workers
from sinkformer_pl.data.table import TABLE_SUFFIXES, is_table
from sinkformer_pl.data.texts.preprocessing import TextPreprocessing
from sinkformer_pl.errors import UserError
from sinkformer_pl.inference import TrainedModel, load
from sinkformer_pl.inference.devices import devices_from
from sinkformer_pl.inference.exported import READERS
from sinkformer_pl.inference.sources import STANDARD_INPUT, Sources
from sinkformer_pl.inference.stream import Answered, Tally, answers
from sinkformer_pl.inference.writers import arrays_writer, csv_writer, features_writer, require_format, table_writer
from sinkformer_pl.training.run_folder import DEFAULT_NAME, DEFAULT_ROOT, find_checkpoint, local_folder

STANDARD_OUTPUT = "-"
OUTPUT = "predictions.csv"
OF_BOTH = ("ckpt_path", "name", "plugins")
"""Settings that are options of both ways."""


def run(argv: Sequence[str]) -> None:
    """Predict on what is given, or on the test split of the data where nothing is.

    Args:
        argv: the arguments after the command.

    Raises:
        UserError: wrong arguments, a checkpoint that can't be used, an input that can't be read.
    """
    of_split, rest = _split_parser().parse_known_args(argv)
    settings = {field.name for field in fields(RunSettings)} - {*OF_BOTH} | {"config", "print_config"}
    flags = {argument[2:].partition("=")[0].partition(".")[0] for argument in argv if argument.startswith("--")}
    if of_split.split or flags & settings:
        train_or_evaluate("predict", rest)
        return
    options, unknown = _parser().parse_known_args(argv)
    if unknown:
        raise UserError(f"{unknown[0]}: no option of predict on files; predict --help lists them")
    if not options.paths:
        train_or_evaluate("predict", rest)
        return
    with handled_signals(), _until_nobody_reads():
        _predict(options)


def _split_parser() -> OptionParser:
    parser = OptionParser(prog="python -m sinkformer_pl predict", add_help=False, allow_abbrev=False)
    parser.add_argument("--split", choices=("test",))
    return parser


def _parser() -> OptionParser:
    parser = OptionParser(
        prog="python -m sinkformer_pl predict",
        usage="python -m sinkformer_pl predict --ckpt_path PATH FILE... [--OPTION VALUE ...]",
        description="Say what images, texts or point clouds are: a row for each with its likeliest classes. FILE is a "
        "file, a folder (at any depth), for texts also a table, or - for standard input, a text (for other models a "
        "path) in each line. Without FILE, or with --split test, the test samples of the training's data are "
        "predicted; all options of test count then.",
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="*", metavar="FILE", help="what to predict on")
    parser.add_argument(
        "--ckpt_path",
        help="a checkpoint or file of the command export: its path; or 'best' or 'last' of the newest run of --name",
    )
    parser.add_argument("--name", default=DEFAULT_NAME, help="name of a run under runs/")
    parser.add_argument("--plugins", help="modules with your own classes, imported first: a,b")
    parser.add_argument(
        "--output", default=OUTPUT, help=f"a .csv, .jsonl or .parquet file, or - for CSV to standard output ({OUTPUT})"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument(
        "--top", type=at_least(1), help="how many classes of each input at most (1; of multi-label models all)"
    )
    parser.add_argument(
        "--threshold", type=float, help="of multi-label models: the probability above which a class holds (0.5)"
    )
    parser.add_argument("--features", type=Path, help="an .npz file for what the head classifies: features (n, D)")
    parser.add_argument("--attention", type=Path, help="an .npz file: ROW/LAYER (heads, queries, keys)")
    parser.add_argument("--skip_broken", action="store_true", help="a broken input is a row with its error")
    parser.add_argument(
        "--lines", action="store_true", help="each line of a text file is a text, of those in folders too"
    )
    parser.add_argument("--text", help="column of the texts in tables (that of the training data, or text)")
    parser.add_argument("--text_columns", help="the two columns of pairs of texts (those of the training data): a,b")
    parser.add_argument("--label", help="column of labels in tables, for the accuracy")
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="inputs in the network at once (32)")
    parser.add_argument("--workers", type=at_least(0), help="processes that read inputs (0; for GPUs up to 8)")
    parser.add_argument("--device", help="where the network runs: cpu, cuda:1 (all GPUs, else the CPU)")
    parser.add_argument("--split", choices=("test",), help="predict on a split of the training's data")
    return parser


def _predict(options: argparse.Namespace) -> None:
    _require_outputs(options)
    if options.ckpt_path is None:
        raise UserError("predict needs the weights of a trained model: give --ckpt_path PATH")
    checkpoint = find_checkpoint(options.ckpt_path, local_folder(DEFAULT_ROOT), options.name)
    program = checkpoint.suffix in READERS
    try:
        devices = devices_from("cpu" if program and options.device is None else options.device)
    except UserError as error:
        raise UserError(f"--{error}") from None
    model = load(checkpoint, device=devices[0], plugins=module_names(options.plugins))
    models = [model.on(device) for device in devices]
    sources = _sources(options, model)
    workers = options.workers
    if workers is None:
        piped = STANDARD_INPUT in options.paths
        workers = default_workers(1) if devices[0].type == "cuda" and not piped else 0
    threshold = model.threshold(options.threshold)
    top = min(options.top or (len(model.classes) if model.multi_label else 1), len(model.classes))
    tally = Tally()
    with _outputs(options, model, top) as write:
        for answered in _with_progress(
            answers(
                models,
                sources,
                batch_size=options.batch_size,
                workers=workers,
                top=top,
                threshold=threshold,
                skip_broken=options.skip_broken,
            )
        ):
            for row in answered.rows:
                tally.add(row, model.classes)
            write(answered)
        if not tally.inputs:
            raise UserError(f"{', '.join(options.paths)}: nothing to predict on; give inputs")
    _say(tally, options)


@contextlib.contextmanager
def _until_nobody_reads() -> Iterator[None]:
    """End in silence when the reader of a pipe has enough, as head has."""
    try:
        yield
    except BrokenPipeError:
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def _require_outputs(options: argparse.Namespace) -> None:
    """Refuse outputs that can't be, before anything is read."""
    table = None if options.output == STANDARD_OUTPUT else Path(options.output)
    if table is not None:
        require_format(table)
    if options.features is not None and options.features == options.attention:
        raise UserError(f"--features and --attention are both {options.features}; give two names")
    for option, path in (("output", table), ("features", options.features), ("attention", options.attention)):
        if path is None:
            continue
        if option != "output" and path.suffix.lower() != ".npz":
            raise UserError(f"--{option} {path}: arrays are written as .npz; give such a name")
        if path.is_dir():
            raise UserError(f"--{option} {path}: a folder; give a file in it")
        if (parent := next(parent for parent in path.absolute().parents if parent.exists())) and not parent.is_dir():
            raise UserError(f"--{option} {path}: {parent} is a file, no folder; give another name")
        if path.exists() and not options.overwrite:
            raise UserError(f"--{option} {path}: it is there already; give another name, or --overwrite")
    if "" in options.paths:
        raise UserError("an empty name among the inputs, perhaps a variable that isn't set; give . for this folder")
    if options.workers and STANDARD_INPUT in options.paths:
        raise UserError(f"--workers {options.workers}: standard input is read by one process; leave it out")


def _sources(options: argparse.Namespace, model: TrainedModel) -> Sources:
    kind = model.preprocessing.kind
    tables = sum(is_table(Path(path)) for path in options.paths)
    for option in ("lines", "text", "text_columns", "label"):
        if not getattr(options, option):
            continue
        if kind != "texts":
            raise UserError(f"--{option}: of texts, and the model is of {kind}; leave it out")
        if option != "lines" and not tables:
            raise UserError(
                f"--{option} {getattr(options, option)}: a column, and no input is a table "
                f"({', '.join(TABLE_SUFFIXES)}); leave it out"
            )
        if option == "lines" and tables == len(options.paths):
            raise UserError("--lines: of other files than tables, and all inputs are tables; leave it out")
    if model.multi_label and options.label:
        raise UserError(f"--label {options.label}: of models of one class an input; leave it out, and use test")
    return Sources(
        options.paths,
        kind,
        # Folders have names of one class.
        () if model.multi_label else model.classes,
        lines=options.lines,
        columns=_text_columns(options, model),
        label=options.label,
        header=model.header,
    )


def _text_columns(options: argparse.Namespace, model: TrainedModel) -> Sequence[str]:
    """Return the columns of the options, else those of the training: two for a model of pairs, else one."""
    pair = isinstance(model.preprocessing, TextPreprocessing) and model.preprocessing.pair
    taken, wrong = ("text_columns", "text") if pair else ("text", "text_columns")
    if given := getattr(options, wrong):
        takes = "pairs of texts" if pair else "single texts"
        raise UserError(f"--{wrong} {given}: the model takes {takes}; give --{taken}")
    if options.text_columns:
        columns = [column.strip() for column in options.text_columns.strip("[] ").split(",")]
    else:
        columns = [options.text] if options.text else list(model.text_columns)
    if pair and len(columns) != 2:
        raise UserError(
            "--text_columns: the model takes pairs of texts; give the two columns, such as premise,hypothesis"
        )
    return columns


@contextlib.contextmanager
def _outputs(options: argparse.Namespace, model: TrainedModel, top: int) -> Iterator[Callable[[Answered], None]]:
    """Open all outputs; they get their names when the block ends well."""
    extra = [name for name, wanted in (("label", options.label), ("error", options.skip_broken)) if wanted]
    with contextlib.ExitStack() as stack:
        if options.output == STANDARD_OUTPUT:
            table = csv_writer(sys.stdout, top, extra)
        else:
            table = stack.enter_context(table_writer(Path(options.output), top=top, extra=extra))
        attention = stack.enter_context(arrays_writer(options.attention)) if options.attention else None
        # The last that is opened is the first that is closed, which is where most of these are written.
        features = stack.enter_context(features_writer(options.features)) if options.features else None
        written = 0

        def write(answered: Answered) -> None:
            nonlocal written
            table(answered.rows)
            if options.output == STANDARD_OUTPUT:
                sys.stdout.flush()
            if features is not None:
                features(_features(answered, model.out_dim))
            if attention is not None and answered.outputs is not None:
                layers = model.attention_of(answered.prepared)
                for number, row in enumerate(answered.rows, written):
                    if row.place is not None:
                        for layer in layers:
                            attention(f"{number}/{layer.name}", layer.of_sample(row.place).float().cpu().numpy())
            written += len(answered.rows)

        yield write


def _features(answered: Answered, width: int) -> np.ndarray:
    """Return a row for each input; NaN for broken ones."""
    features = np.full((len(answered.rows), width), np.nan, dtype=np.float32)
    if answered.outputs is not None:
        found = answered.outputs.features.float().cpu().numpy()
        for number, row in enumerate(answered.rows):
            if row.place is not None:
                features[number] = found[row.place]
    return features


def _with_progress(batches: Iterator[Answered]) -> Iterator[Answered]:
    """Count the inputs on a terminal."""
    columns: list[Any] = [SpinnerColumn(), TextColumn("predicting"), MofNCompleteColumn(), TimeElapsedColumn()]
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("predicting", total=None)
        for answered in batches:
            yield answered
            progress.advance(task, len(answered.rows))


def _say(tally: Tally, options: argparse.Namespace) -> None:
    piped = options.output == STANDARD_OUTPUT
    stream = sys.stderr if piped else sys.stdout
    places = ["standard output" if piped else options.output, options.features, options.attention]
    print(f"{tally.inputs} predictions: {', '.join(str(place) for place in places if place)}", file=stream)
    if tally.labelled:
        share = tally.correct / tally.labelled
        print(f"accuracy {share:.4f}: {tally.correct} of {tally.labelled} with a label", file=stream)
    if tally.unknown:
        listed = ", ".join(sorted(tally.unknown)[:5])
        print(f"labels that the model doesn't know are left out of the accuracy: {listed}", file=stream)
    if tally.broken:
        print(f"{tally.broken} of {tally.inputs} are broken, the first: {tally.first_broken}", file=stream)
