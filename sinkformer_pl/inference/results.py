"""Predictions: for each input a list of classes with scores."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, overload

from torch import Tensor

SHOWN_ROWS = 20
SHOWN_CLASSES = 3


@dataclass(frozen=True)
class Prediction:
    """What a model says of one input.

    Attributes:
        name: a path, or the place of the input among those that were given.
        scores: classes with their probabilities, the likeliest first.
        threshold: of a multi-label model, the probability above which a class holds; None for one class an input.
    """

    name: str
    scores: tuple[tuple[str, float], ...]
    threshold: float | None = None

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.scores[0][0]

    @property
    def probability(self) -> float:
        """That of the likeliest class."""
        return self.scores[0][1]

    @property
    def chosen(self) -> tuple[tuple[str, float], ...]:
        """The scores of a multi-label model above the threshold, perhaps none; else all."""
        return tuple(pair for pair in self.scores if self.threshold is None or pair[1] > self.threshold)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of `chosen`; of a model of one class an input the likeliest alone."""
        return (self.label,) if self.threshold is None else tuple(name for name, _ in self.chosen)

    def _repr_html_(self) -> str:
        return Predictions([self])._repr_html_()


class Predictions(Sequence[Prediction]):
    """Predictions in the order of the inputs; a notebook shows a table of them."""

    def __init__(self, predictions: Sequence[Prediction]) -> None:
        """Keep them."""
        self._predictions = list(predictions)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> "Predictions": ...
    def __getitem__(self, index: int | slice) -> "Prediction | Predictions":
        """Return one, or those of a slice."""
        return Predictions(self._predictions[index]) if isinstance(index, slice) else self._predictions[index]

    def __len__(self) -> int:
        """Return their number."""
        return len(self._predictions)

    def __iter__(self) -> Iterator[Prediction]:
        """Yield them in order."""
        return iter(self._predictions)

    @property
    def labels(self) -> list[Any]:
        """The likeliest class of each, or of a multi-label model the classes of each, a tuple."""
        return [p.label if p.threshold is None else p.labels for p in self]

    def __repr__(self) -> str:
        lines = [
            f"{p.name}: " + ", ".join(f"{name} {score:.3f}" for name, score in p.chosen[:SHOWN_CLASSES])
            for p in self[:SHOWN_ROWS]
        ]
        return "\n".join([*lines, *_rest(len(self))])

    def _repr_html_(self) -> str:
        rows = [
            f"<tr><td>{escape(p.name)}</td>"
            + "".join(f"<td>{escape(name)} {score:.3f}</td>" for name, score in p.chosen[:SHOWN_CLASSES])
            + "</tr>"
            for p in self[:SHOWN_ROWS]
        ]
        rest = "".join(f"<p>{line}</p>" for line in _rest(len(self)))
        return f"<table><tr><th>input</th><th>class and probability</th></tr>{''.join(rows)}</table>{rest}"


def ranked(
    names: Sequence[str],
    classes: Sequence[str],
    probabilities: Tensor,
    top: int | None = None,
    threshold: float | None = None,
) -> list[Prediction]:
    """Make predictions of a batch.

    Args:
        names: of the B inputs.
        classes: names of the C classes.
        probabilities: (B, C).
        top: how many classes of each are kept; None for all.
        threshold: of `Prediction`.
    """
    scores, places = probabilities.cpu().topk(min(top or len(classes), len(classes)), dim=-1)
    return [
        Prediction(name, tuple((classes[place], score) for place, score in zip(row, values, strict=True)), threshold)
        for name, row, values in zip(names, places.tolist(), scores.tolist(), strict=True)
    ]


def _rest(number: int) -> list[str]:
    return [f"... and {number - SHOWN_ROWS} more"] if number > SHOWN_ROWS else []
