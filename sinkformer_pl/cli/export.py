"""Run the export command: a trained model in a file that other programs read."""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch

from sinkformer_pl.batch import collate
from sinkformer_pl.cli.layers import module_names
from sinkformer_pl.cli.option_parser import OptionParser
from sinkformer_pl.cli.run import Run, handled_signals
from sinkformer_pl.cli.settings import read_settings
from sinkformer_pl.data import ClassificationData
from sinkformer_pl.data.texts.preprocessing import TextPreprocessing
from sinkformer_pl.errors import UserError
from sinkformer_pl.inference import TrainedModel, load
from sinkformer_pl.inference.export import TOKENIZER, Example, export
from sinkformer_pl.inference.inputs import prepare
from sinkformer_pl.inference.sources import Sources
from sinkformer_pl.training.run_folder import DEFAULT_NAME, DEFAULT_ROOT, find_checkpoint, local_folder
from sinkformer_pl.training.signals import StopSignals

SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt2", "onnx": ".onnx"}
"""By the name of the format."""

SAMPLES = 7
"""Most samples that a file is compared with the model on."""

T = TypeVar("T")


def run(argv: Sequence[str]) -> None:
    """Write a checkpoint's model to a file and compare the file with the model.

    Args:
        argv: the arguments after the command.

    Raises:
        UserError: wrong arguments, a checkpoint that can't be used, a network that the format can't hold.
    """
    options = _parse(argv)
    path = options.output or Path(f"model{SUFFIXES[options.format]}")
    _require_output(path, options)
    checkpoint = find_checkpoint(options.ckpt_path, local_folder(DEFAULT_ROOT), options.name)
    with handled_signals() as signals:
        model = load(checkpoint, device="cpu", plugins=module_names(options.plugins))
        _require_room_beside(path, model, options)
        source = ", ".join(options.paths) or "the test part of its data"
        batches = list(_own(options.paths, model) if options.paths else _of_data(checkpoint, options, signals))
        if not batches or len(batches[0].inputs) < 2:
            raise UserError(f"{source}: fewer than two samples to compare the file with the model on; give more")
        difference = export(model, path, [_with_mask(batch, model.preprocessing.kind) for batch in batches])
    size = path.stat().st_size / 1e6
    print(
        f"{path} ({size:.1f} MB): on samples of {source} its outputs differ by at most {difference:.1e} of the largest"
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="python -m sinkformer_pl export",
        usage="python -m sinkformer_pl export --ckpt_path PATH --format FORMAT [FILE...] [--OPTION VALUE ...]",
        description="Write a trained model to a file for other programs, with class names and preprocessing in its "
        "metadata, run it on samples, and compare the outputs with the model's: on FILEs, as predict takes them, or on "
        "the test samples of the training's data.",
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="*", metavar="FILE", help="samples to compare on: two or more")
    parser.add_argument("--ckpt_path", required=True, help="a checkpoint: its path, or 'best' or 'last' of --name")
    parser.add_argument(
        "--format",
        choices=SUFFIXES,
        required=True,
        help="safetensors: weights and configuration; torch: a program of torch.export (.pt2); onnx",
    )
    parser.add_argument("--output", type=Path, help="the file; model with the format's suffix by default")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument("--name", default=DEFAULT_NAME, help="name of a run under runs/")
    parser.add_argument("--plugins", help="modules with your own classes, imported first: a,b")
    return parser.parse_args(argv)


def _require_output(path: Path, options: argparse.Namespace) -> None:
    suffix = SUFFIXES[options.format]
    if path.is_dir() or path.suffix != suffix:
        raise UserError(f"--output {path}: --format {options.format} is a file; give a name with the suffix {suffix}")
    if path.exists() and not options.overwrite:
        raise UserError(f"--output {path}: it is there already; give another name, or --overwrite")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--output {path}: no folder {path.parent}; make it, or give another name")


def _require_room_beside(path: Path, model: TrainedModel, options: argparse.Namespace) -> None:
    """Refuse to replace another file by the tokenizer of a model of texts."""
    beside = path.with_name(TOKENIZER)
    if not isinstance(model.preprocessing, TextPreprocessing) or not beside.exists() or options.overwrite:
        return
    if beside.is_dir() or beside.read_bytes() != model.preprocessing.tokenizer.encode():
        raise UserError(f"{beside}: another one is there already; give an --output in another folder, or --overwrite")


def _own(paths: Sequence[str], model: TrainedModel) -> Iterator[Example]:
    """Make batches of files."""
    items = Sources(
        paths, model.preprocessing.kind, model.classes, columns=model.text_columns, header=model.header
    ).items()
    for batch in _batches(list(islice(items, SAMPLES))):
        prepared = prepare(batch, model.preprocessing)
        if error := next(filter(None, prepared.errors), None):
            raise UserError(error)
        assert prepared.inputs is not None
        yield Example(prepared.inputs, prepared.mask)


def _of_data(checkpoint: Path, options: argparse.Namespace, signals: StopSignals) -> Iterator[Example]:
    """Make batches of the test samples that the checkpoint's configuration names."""
    flags = ["--ckpt_path", str(checkpoint)] + (["--plugins", options.plugins] if options.plugins else [])
    with contextlib.ExitStack() as held:
        run = Run.build(read_settings("test", flags), signals)
        run.begin(f"exporting {checkpoint}", held, keep=False)
        data = run.data
        if not isinstance(data, ClassificationData):
            raise UserError(f"data {type(data).__name__}: no ClassificationData to draw samples from; give FILEs")
        draws = sorted(data.test_dataloader().sampler)[:SAMPLES]
        for chosen in _batches(draws):
            batch = collate([data.datasets["test"][draw] for draw in chosen])
            yield Example(batch.inputs, batch.mask)


def _batches(samples: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield the batch that a program is traced with, a sample alone, and a batch of another size."""
    if samples:
        yield samples[:4]
        yield samples[:1]
        yield samples[4:] or samples[1:4] or samples


def _with_mask(batch: Example, kind: str) -> Example:
    if batch.mask is None and kind != "images":
        return batch._replace(mask=torch.ones(batch.inputs.shape[:2], dtype=torch.bool))
    return batch
