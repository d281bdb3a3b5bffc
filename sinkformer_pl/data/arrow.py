"""Tables in Arrow's formats: Parquet files, and folders that `save_to_disk` of Hugging Face's `datasets` wrote."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sinkformer_pl.data.columns import find_columns
from sinkformer_pl.data.reading import cause, is_folder, open_file
from sinkformer_pl.errors import UserError

PARQUET = ".parquet"
STATE = "state.json"
"""File of a saved data set that lists its files of samples."""

_AT_ONCE = 1000


class _Table(NamedTuple):
    """An open table: its schema, and a function from places of columns to batches of rows."""

    schema: Any
    batches: Any


def is_saved_dataset(path: Path) -> bool:
    """Tell whether a folder is a data set that `datasets.Dataset.save_to_disk` wrote; one of several parts isn't."""
    return is_folder(path) and os.path.isfile(path / STATE)


def arrow_rows(path: Path, columns: Sequence[str], remedy: str) -> Iterator[dict[str, Any]]:
    """Yield some columns of a table, a row at a time; numbers of a `ClassLabel` as their names, -1 as None.

    Args:
        path: a Parquet file or the folder of a saved data set.
        columns: names of the columns, or their numbers from 1 on.
        remedy: how to name columns, for messages.

    Raises:
        UserError: a table that can't be read, a missing column, or no pyarrow.
    """
    with _opened(path) as table:
        present = table.schema.names
        places = find_columns(columns, present, str(path), remedy)
        names = {column: _names(table.schema, present[place]) for column, place in places.items()}
        for batch in table.batches(sorted({present[place] for place in places.values()})):
            cells = {
                column: _labelled(batch.column(present[place]).to_pylist(), names[column])
                for column, place in places.items()
            }
            for row in range(batch.num_rows):
                yield {column: values[row] for column, values in cells.items()}


def class_names(path: Path, column: str) -> list[str] | None:
    """Return the names of a column of type `ClassLabel`, in their order; None for any other column, or other tables.

    Raises:
        UserError: as `arrow_rows`.
    """
    if path.suffix.lower() != PARQUET and not is_saved_dataset(path):
        return None
    with _opened(path) as table:
        place = find_columns([column], table.schema.names, str(path), "name it by data.label")[column]
        return _names(table.schema, table.schema.names[place])


@contextmanager
def _opened(path: Path) -> Iterator[_Table]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path}: needs pyarrow: pip install 'sinkformer_pl[parquet]'") from None
    # Broken bytes make the library raise nearly anything, also when rows are asked for.
    try:
        if not path.is_dir():
            with open_file(path) as stream, pq.ParquetFile(stream) as file:
                yield _Table(
                    file.schema_arrow, lambda names: file.iter_batches(batch_size=_AT_ONCE, columns=list(names))
                )
            return
        files = _files(path)
        with pa.memory_map(str(files[0])) as stream, pa.ipc.open_stream(stream) as reader:
            schema = reader.schema

        def batches(names: Sequence[str]) -> Iterator[Any]:
            for file in files:
                with pa.memory_map(str(file)) as stream, pa.ipc.open_stream(stream) as reader:
                    for batch in reader:
                        yield batch.select(names)

        yield _Table(schema, batches)
    except UserError:
        raise
    except Exception as error:
        what = "data set" if path.is_dir() else f"{PARQUET} file"
        raise UserError(f"{path}: cannot be read ({cause(error)}); give a complete {what}") from None


def _files(folder: Path) -> list[Path]:
    with open_file(folder / STATE) as file:
        state = json.load(file)
    if state.get("_indices_data_files"):
        raise UserError(f"{folder}: an old version of datasets wrote it, in an order of its own; save it anew")
    files = [folder / entry["filename"] for entry in state["_data_files"]]
    if not files:
        raise UserError(f"{folder}: no rows; give a table with some")
    for file in files:
        open_file(file).close()
    return files


def _names(schema: Any, column: str) -> list[str] | None:
    """Read from the metadata that `datasets` writes which classes the numbers of a column stand for."""
    content = (schema.metadata or {}).get(b"huggingface")
    info: Mapping[str, Any] = json.loads(content) if content else {}
    feature = ((info.get("info") or {}).get("features") or {}).get(column)
    if not isinstance(feature, Mapping) or feature.get("_type") != "ClassLabel":
        return None
    return [str(name) for name in feature["names"]]


def _labelled(cells: list[Any], names: Sequence[str] | None) -> list[Any]:
    if names is None:
        return cells
    return [names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else None for cell in cells]
