"""Predict on a stream of inputs in bounded memory: processes prepare batches, which devices take in turn."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sinkformer_pl.data.loading import heed_the_training_alone, packed, unpacked
from sinkformer_pl.data.preprocessing import Preprocessing
from sinkformer_pl.errors import UserError
from sinkformer_pl.inference.inputs import Prepared, in_batches, prepare
from sinkformer_pl.inference.model import Outputs, TrainedModel
from sinkformer_pl.inference.results import Prediction, ranked
from sinkformer_pl.inference.sources import Sources


class Row(NamedTuple):
    """The result of one input.

    Attributes:
        name: of the input.
        prediction: None for a broken input.
        label: of the input, None where it is unknown.
        error: what is wrong with a broken input.
        place: of the input in its batch's outputs.
    """

    name: str
    prediction: Prediction | None
    label: str | None
    error: str | None
    place: int | None


class Answered(NamedTuple):
    """A batch with what the network says of it; outputs are None where all inputs are broken."""

    prepared: Prepared
    outputs: Outputs | None
    rows: list[Row]


@dataclass
class Tally:
    """What a stream has come to so far.

    Attributes:
        inputs: number of inputs, the broken ones too.
        broken: number of broken inputs.
        first_broken: what is wrong with the first of them.
        labelled: good inputs whose label is a class of the model.
        correct: those of them whose likeliest class is their label.
        unknown: labels that are no classes of the model, at most ten of them.
    """

    inputs: int = 0
    broken: int = 0
    first_broken: str = ""
    labelled: int = 0
    correct: int = 0
    unknown: set[str] = field(default_factory=set)

    def add(self, row: Row, classes: Sequence[str]) -> None:
        """Count a row."""
        self.inputs += 1
        if row.prediction is None:
            self.broken += 1
            self.first_broken = self.first_broken or str(row.error)
        elif row.label in classes:
            self.labelled += 1
            self.correct += row.label == row.prediction.label
        elif row.label is not None and len(self.unknown) < 10:
            self.unknown.add(row.label)


def answers(
    models: Sequence[TrainedModel],
    sources: Sources,
    *,
    batch_size: int,
    workers: int = 0,
    top: int | None = None,
    threshold: float | None = None,
    skip_broken: bool = False,
) -> Iterator[Answered]:
    """Yield batches in order, each with its predictions.

    Args:
        models: the model on each device; batches go to them in turn, and the next is started before the last is read.
        sources: the inputs.
        batch_size: inputs of a batch.
        workers: processes that read and prepare inputs; 0 does so in this one.
        top: how many classes of each input are kept; None for all.
        threshold: as of `TrainedModel.threshold`.
        skip_broken: whether a broken input is a row with its error.

    Raises:
        UserError: an input is broken and isn't to be skipped, or the source itself ends in an error; in either case
            after what came before it.
    """
    loader = DataLoader(
        _Batches(sources, models[0].preprocessing, batch_size),
        batch_size=None,
        collate_fn=packed,
        num_workers=workers,
        worker_init_fn=heed_the_training_alone,
        pin_memory=models[0].device.type == "cuda",
    )
    pending: deque[tuple[Prepared, Outputs | None]] = deque()
    for number, prepared in enumerate(map(unpacked, loader)):
        model = models[number % len(models)]
        pending.append((prepared, None if prepared.inputs is None else model.run(prepared)))
        if len(pending) >= len(models):
            yield from _finished(*pending.popleft(), models[0].classes, (top, threshold), skip_broken)
    while pending:
        yield from _finished(*pending.popleft(), models[0].classes, (top, threshold), skip_broken)


class _Batches(IterableDataset[Prepared]):
    """Every process goes through the names, which costs little, and prepares its share of the batches."""

    def __init__(self, sources: Sources, preprocessing: Preprocessing, size: int) -> None:
        self.sources, self.preprocessing, self.size = sources, preprocessing, size

    def __iter__(self) -> Iterator[Prepared]:
        worker = get_worker_info()
        place, number = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch, items in enumerate(in_batches(self.sources.items(warn=place == 0), self.size)):
            if batch % number == place:
                yield prepare(items, self.preprocessing)


def _finished(
    prepared: Prepared,
    outputs: Outputs | None,
    classes: Sequence[str],
    kept: tuple[int | None, float | None],
    skip_broken: bool,
) -> Iterator[Answered]:
    names = [item.name for item, error in zip(prepared.items, prepared.errors, strict=True) if error is None]
    predictions = iter([] if outputs is None else ranked(names, classes, outputs.probabilities, *kept))
    rows: list[Row] = []
    stop: str | None = None
    good = 0
    for place, (item, error) in enumerate(zip(prepared.items, prepared.errors, strict=True)):
        fatal = prepared.fatal and place == len(prepared.items) - 1
        if error is not None and (fatal or not skip_broken):
            stop = error
            break
        if error is None:
            rows.append(Row(item.name, next(predictions), item.label, None, good))
            good += 1
        else:
            rows.append(Row(item.name, None, item.label, error, None))
    yield Answered(prepared, outputs, rows)
    if stop is not None:
        raise UserError(stop)
