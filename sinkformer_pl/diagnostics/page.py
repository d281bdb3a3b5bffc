"""Attention of a trained network as one HTML file that needs nothing but a browser."""

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sinkformer_pl.diagnostics.capture import LayerAttention, learned_parameters
from sinkformer_pl.diagnostics.measures import summary
from sinkformer_pl.errors import UserError
from sinkformer_pl.models.tokens import Tokens

MOST_NUMBERS = 3_500_000
"""Weights in a page; at float16 in base64 they take 9.3 MB."""
PIXELS = 256

MEANINGS = {
    "row_sum_min": ("row sums, least", "how much a query attends in all"),
    "row_sum_max": ("row sums, greatest", "how much a query attends in all"),
    "column_sum_min": ("column sums, least", "attention that a key receives, times K/Q; 1 is even"),
    "column_sum_median": ("column sums, median", "attention that a key receives, times K/Q; 1 is even"),
    "column_sum_max": ("column sums, greatest", "attention that a key receives, times K/Q; 1 is even"),
    "marginal_error": ("marginal error", "largest distance of a row or column sum from 1"),
    "entropy": ("entropy (nats)", "of the weights of a query, mean"),
    "relative_entropy": ("entropy / log K", "1 is even attention, 0 a single key"),
    "effective_rank": ("effective rank", "exponential of the entropy of the singular values"),
    "sink_share": ("heaviest key", "share of all attention on the key that receives most"),
    "zero_share": ("zeros", "share of weights that are exactly zero"),
}


@dataclass(frozen=True)
class Sample:
    """One sample of a page.

    Attributes:
        name: as in prediction files.
        target: its class, or classes.
        predicted: what the network gives it.
        probability: of the likeliest class.
        tokens: what its tokens are.
    """

    name: str
    target: str
    predicted: str
    probability: float
    tokens: Tokens


@dataclass(frozen=True)
class Page:
    """The content of a page.

    Attributes:
        title: above all.
        subtitle: below it.
        facts: names and values, in a line.
        samples: as many as the batch that the layers have seen.
        layers: their attention on the batch.
        curves: by the name of a metric, epochs and values.
        history: by layer and epoch, quantiles of the column sums.
    """

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    samples: Sequence[Sample]
    layers: Sequence[LayerAttention]
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    history: Mapping[str, Mapping[int, Sequence[float]]] = field(default_factory=dict)


def plotly_script() -> str:
    """Return the script of plotly.

    Raises:
        UserError: it isn't installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("inspect draws with plotly, which isn't installed: pip install plotly") from None
    return get_plotlyjs()


def write_page(page: Page, path: Path) -> int:
    """Write the file.

    Returns:
        How many of the samples are in it: as many as make a file of 15 MB at most.

    Raises:
        UserError: plotly isn't installed; the weights of a single sample are too many; the file can't be written.
    """
    plotly = plotly_script()
    shown = _fitting(page)
    content = {
        "title": page.title,
        "subtitle": page.subtitle,
        "facts": page.facts,
        "layers": [
            {
                "name": layer.name,
                "short": layer.name.removeprefix("backbone.").removesuffix(".attention"),
                "heads": layer.weights.shape[1],
                "queries": layer.core.sides[0],
                "keys": layer.core.sides[1],
            }
            for layer in page.layers
        ],
        "samples": [
            {
                **vars(sample),
                "tokens": _plain_tokens(sample.tokens),
                "layers": [_plain_weights(layer.of_sample(number)) for layer in page.layers],
            }
            for number, sample in enumerate(page.samples[:shown])
        ],
        "table": _table(page),
        "curves": page.curves,
        "history": page.history,
    }
    # What would end the script element, or be a number that JSON doesn't know.
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")
    assets = resources.files("sinkformer_pl.diagnostics") / "assets"
    page_html = Template((assets / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(page.title),
        style=(assets / "page.css").read_text(encoding="utf-8"),
        script=(assets / "page.js").read_text(encoding="utf-8"),
        plotly=plotly,
        data=text,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page_html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path}: can't be written ({error.strerror}); give another file") from None
    return shown


def _fitting(page: Page) -> int:
    total = 0
    for number in range(len(page.samples)):
        total += sum(layer.of_sample(number).numel() for layer in page.layers)
        if total > MOST_NUMBERS:
            if number:
                return number
            raise UserError(
                f"the attention of a single sample has {total:,} weights, and a page takes {MOST_NUMBERS:,}: give it "
                "shorter samples (--data.max_length for texts), or look with sinkformer_pl.diagnostics from Python"
            )
    return len(page.samples)


def _plain_weights(weights: Tensor) -> dict[str, Any]:
    halves = weights.float().cpu().numpy().astype("<f2")
    _, queries, keys = halves.shape
    return {"queries": queries, "keys": keys, "weights": base64.b64encode(halves.tobytes()).decode("ascii")}


def _plain_tokens(tokens: Tokens) -> dict[str, Any]:
    plain = {name: getattr(tokens, name) for name in ("kind", "size", "leading", "grid", "words")}
    plain["points"] = None if tokens.points is None else tokens.points.double().round(decimals=4).tolist()
    plain["image"] = None if tokens.image is None else _png(tokens.image)
    return plain


def _png(image: Tensor) -> str:
    picture = Image.fromarray((image.numpy() * 255).round().astype(np.uint8))
    # A browser would blur pixels that it has to enlarge.
    times = max(1, PIXELS // max(picture.size))
    picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _table(page: Page) -> dict[str, Any]:
    measured = [summary(layer.weights, layer.mask) for layer in page.layers]
    learned = [learned_parameters(layer.core) for layer in page.layers]
    names = list(dict.fromkeys(name for found in learned for name in found))
    rows, count = [], len(page.samples)
    for number, (measures, parameters) in enumerate(zip(measured, learned, strict=True)):
        numbers = {**measures, **parameters}
        for head in range(page.layers[number].weights.shape[1]):
            values = [numbers[name][head].item() if name in numbers else math.nan for name in (*MEANINGS, *names)]
            rows.append([number, head, *(value if math.isfinite(value) else None for value in values)])
    return {
        "columns": [*MEANINGS.values(), *((name, "learned, for each head") for name in names)],
        "rows": rows,
        "note": f"Over {count} sample{'' if count == 1 else 's'}. Point at a column for what it means; click a row to "
        "see it above.",
    }
