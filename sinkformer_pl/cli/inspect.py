"""Run the inspect command: attention of a trained network as an HTML page."""

import argparse
import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sinkformer_pl.batch import class_names, collate
from sinkformer_pl.callbacks.attention_diagnostics import COLUMN_SUMS, FOLDER, read_column_sums
from sinkformer_pl.cli.help import print_asked_for
from sinkformer_pl.cli.option_parser import OptionParser, at_least
from sinkformer_pl.cli.run import Run, handled_signals
from sinkformer_pl.cli.settings import Given, read_settings
from sinkformer_pl.data import ClassificationData
from sinkformer_pl.diagnostics import attention_of
from sinkformer_pl.diagnostics.capture import evaluating
from sinkformer_pl.diagnostics.page import Page, Sample, plotly_script, write_page
from sinkformer_pl.diagnostics.tokens import speller, tokens_of
from sinkformer_pl.errors import UserError
from sinkformer_pl.factories import readable
from sinkformer_pl.tasks.outputs import probabilities_of
from sinkformer_pl.training.checkpoint_content import METRICS_KEY
from sinkformer_pl.training.curves import read_curves

FILE = "inspect.html"


def run(argv: Sequence[str]) -> None:
    """Write what the attention of a checkpoint does with a few samples to one HTML file.

    Args:
        argv: arguments after the command: its own, and those of `test`.

    Raises:
        UserError: wrong arguments, data or checkpoint; plotly isn't installed.
    """
    options, rest = _parse(argv)
    if Given.read(rest).checkpoint is None:
        raise UserError("inspect needs the weights of a trained model: give --ckpt_path PATH")
    plotly_script()
    with handled_signals() as signals:
        if print_asked_for("test", rest):
            return
        run = Run.build(read_settings("test", rest), signals)
        content = run.settings.content
        assert content is not None
        with contextlib.ExitStack() as held:
            run.begin(f"inspecting {run.settings.checkpoint}", held, keep=options.output is None)
        run.model.load_state_dict(content["state_dict"])
        page = _page(run, content, options)
        path = options.output or run.folder / FILE
        shown = write_page(page, path)
        if shown < len(page.samples):
            print(
                f"{shown} of {len(page.samples)} samples are shown: the weights of more would make the file too large"
            )
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB): open it in a browser", flush=True)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OptionParser(
        prog="python -m sinkformer_pl inspect",
        usage="python -m sinkformer_pl inspect --ckpt_path PATH [--OPTION VALUE ...]",
        description="Write one HTML file that shows the attention of a checkpoint on a few samples: by layer, head and "
        "query, on the points, patches or tokens themselves. It opens without a network. Every other argument is one "
        "of test, --ckpt_path PATH first of all.",
        allow_abbrev=False,
    )
    parser.add_argument("--split", default="test", choices=("train", "val", "test"), help="where the samples are from")
    parser.add_argument("--samples", type=at_least(1), default=6, help="how many, evenly spread over the split")
    parser.add_argument("--output", type=Path, help=f"the file; {FILE} in the run's folder by default")
    options, rest = parser.parse_known_args(argv)
    if options.output is not None and options.output.is_dir():
        raise UserError(f"--output {options.output}: a folder; give a file in it, such as {options.output / FILE}")
    return options, rest


def _page(run: Run, content: Mapping[str, Any], options: argparse.Namespace) -> Page:
    data, model, split = run.data, run.model, options.split
    if not isinstance(data, ClassificationData):
        raise UserError(f"data {type(data).__name__}: inspect shows samples of a ClassificationData; give one")
    loader = getattr(data, f"{split}_dataloader")()
    # The draws of an evaluation, so that random parts of a sample are those that it has there.
    draws = sorted(loader.sampler)
    number = min(options.samples, len(draws))
    chosen = [draws[place * len(draws) // number] for place in range(number)]
    batch = collate([data.datasets[split][draw] for draw in chosen])
    layers = attention_of(model, batch.inputs, batch.mask)
    if not layers:
        raise UserError(
            f"{type(model.backbone).__name__} has no AttentionCore to look at: compose one (docs/extend.md)"
        )
    with evaluating(model):
        probabilities = probabilities_of(model(batch.inputs, batch.mask), multi_label=data.multi_label)
    predicted = probabilities if data.multi_label else probabilities.argmax(-1)
    true, best = (class_names(targets, data.classes, none="none") for targets in (batch.target, predicted))
    names = [str(data.names(split)[index]) for index in batch.index.tolist()]
    tokens = tokens_of(model, batch.inputs, batch.mask, speller(data))
    samples = list(map(Sample, names, true, best, probabilities.amax(-1).tolist(), tokens))
    normalization = readable(model.hparams["normalization"])
    metrics = content.get(METRICS_KEY) or {}
    facts = [
        ("data", type(data).__name__),
        ("network", type(model.backbone).__name__),
        ("normalization", normalization),
        ("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"),
        ("trained epochs", str(content.get("epoch", -1) + 1)),
        *((name, f"{value:.4f}") for name, value in sorted(metrics.items())),
        ("samples from", f"{split} ({len(draws)})"),
    ]
    return Page(
        title=f"{run.record['name']} under {normalization}",
        subtitle=str(run.settings.checkpoint),
        facts=facts,
        samples=samples,
        layers=layers,
        curves=_curves(run.folder / "metrics.csv"),
        history=read_column_sums(run.folder / FOLDER / COLUMN_SUMS),
    )


def _curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the curves that there are, of finite values: JSON has no others."""
    curves = {
        name: [(epoch, value) for epoch, value in values.items() if math.isfinite(value)]
        for name, values in read_curves(path).items()
    }
    return {name: values for name, values in curves.items() if values}
