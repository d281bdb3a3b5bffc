"""Files of predictions: CSV, JSON lines or Parquet, and arrays beside them, all written as the stream goes."""

import csv
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

import numpy as np
from numpy.typing import NDArray

from sinkformer_pl.errors import UserError
from sinkformer_pl.inference.stream import Row
from sinkformer_pl.training.atomic_file import replacing

Write = Callable[[Sequence[Row]], None]


@contextmanager
def table_writer(path: Path, *, top: int, extra: Sequence[str]) -> Iterator[Write]:
    """Open a file of the format that its suffix names; it gets its name when the block ends well.

    Args:
        path: ends in .csv, .jsonl or .parquet.
        top: classes in a row.
        extra: further columns, of "label" and "error".

    Raises:
        UserError: another suffix, or Parquet without pyarrow.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        with replacing(path, "wb") as binary, _parquet(binary, top, extra) as write:
            yield write
    else:
        with replacing(path) as text:
            yield FORMATS[suffix](text, top, extra)


def csv_writer(file: TextIO, top: int, extra: Sequence[str]) -> Write:
    """Return what writes rows as CSV: name, class, probability, class_2, probability_2 and so on.

    Of a multi-label model a row has the classes that hold, and its other cells are empty.
    """
    writer = csv.writer(file)
    writer.writerow(_columns(top, extra))

    def write(rows: Sequence[Row]) -> None:
        for row in rows:
            scores = [cell for name, score in _scores(row) for cell in (name, f"{score:.6g}")]
            cells = scores + [""] * (2 * top - len(scores))
            writer.writerow([row.name, *cells, *(getattr(row, name) or "" for name in extra)])

    return write


def jsonl_writer(file: TextIO, top: int, extra: Sequence[str]) -> Write:
    """Return what writes an object in each line: name, and predictions as a list of classes with scores."""

    def write(rows: Sequence[Row]) -> None:
        for row in rows:
            scores = [{"class": name, "score": round(score, 6)} for name, score in _scores(row)]
            entry = {"name": row.name, "predictions": scores} | {name: getattr(row, name) for name in extra}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    return write


FORMATS: dict[str, Callable[[TextIO, int, Sequence[str]], Write]] = {".csv": csv_writer, ".jsonl": jsonl_writer}
SUFFIXES = (*FORMATS, ".parquet")


def require_format(path: Path) -> None:
    """Refuse an output of another format, or one that needs what isn't installed.

    Raises:
        UserError: names the formats, or what to install.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"--output {path}: not one of {', '.join(SUFFIXES)}, or - for standard output; give such a name"
        )
    if path.suffix.lower() == ".parquet":
        _pyarrow()


@contextmanager
def _parquet(file: IO[bytes], top: int, extra: Sequence[str]) -> Iterator[Write]:
    pyarrow = _pyarrow()
    columns = _columns(top, extra)
    kinds = [pyarrow.float32() if name.startswith("probability") else pyarrow.string() for name in columns]
    schema = pyarrow.schema(list(zip(columns, kinds, strict=True)))
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:

        def write(rows: Sequence[Row]) -> None:
            cells: list[list[Any]] = []
            for row in rows:
                scores: list[Any] = [cell for pair in _scores(row) for cell in pair]
                scores += [None] * (2 * top - len(scores))
                cells.append([row.name, *scores, *(getattr(row, name) for name in extra)])
            arrays = [pyarrow.array(column, kind) for column, kind in zip(zip(*cells, strict=True), kinds, strict=True)]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))

        yield write


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "Parquet needs pyarrow: pip install 'sinkformer_pl[parquet]', or give a .csv or .jsonl"
        ) from None
    return pyarrow


def _columns(top: int, extra: Sequence[str]) -> list[str]:
    ranks = [f"{name}_{rank}" for rank in range(2, top + 1) for name in ("class", "probability")]
    return ["name", "class", "probability", *ranks, *extra]


def _scores(row: Row) -> Sequence[tuple[str, float]]:
    return () if row.prediction is None else row.prediction.chosen


@contextmanager
def features_writer(path: Path) -> Iterator[Callable[[NDArray[np.float32]], None]]:
    """Open an .npz file of one array, `features` (n, D), whose rows come batch by batch; they wait in a file beside it.

    The file gets its name when the block ends well.
    """
    with replacing(path, "wb") as file, tempfile.TemporaryFile(dir=path.parent) as waiting:
        rows, width = 0, 0

        def write(array: NDArray[np.float32]) -> None:
            nonlocal rows, width
            rows, width = rows + len(array), array.shape[1]
            waiting.write(np.ascontiguousarray(array, dtype="<f4").tobytes())

        yield write
        waiting.seek(0)
        with zipfile.ZipFile(file, "w") as archive, archive.open("features.npy", "w", force_zip64=True) as entry:
            shape = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
            np.lib.format.write_array_header_2_0(entry, shape)
            shutil.copyfileobj(waiting, entry)


@contextmanager
def arrays_writer(path: Path) -> Iterator[Callable[[str, NDArray[Any]], None]]:
    """Open an .npz file that takes arrays one by one, by their names; it gets its own name when the block ends well."""
    with replacing(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:

        def write(name: str, array: NDArray[Any]) -> None:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.ascontiguousarray(array), allow_pickle=False)

        yield write
