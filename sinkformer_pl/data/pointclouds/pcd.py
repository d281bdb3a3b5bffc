"""Point clouds in the format of the Point Cloud Library, .pcd."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sinkformer_pl.data.pointclouds.shape import COLOURS, COORDINATES, Columns, FormatError, one_line
from sinkformer_pl.data.reading import open_file

_KINDS = {"F": "f", "I": "i", "U": "u"}
_PACKED = ("rgb", "rgba")


def read_pcd(path: Path) -> Columns:
    """Read a file with its data as text or binary.

    A field of several numbers is a column for each, `NAME_0` and so on; a packed colour is red, green and blue in
    [0, 1]. Points without coordinates, which the format writes as NaN where a sensor saw nothing, are left out.

    Args:
        path: the file, of version 0.7 or older.

    Raises:
        FormatError: no such file by its content, one that is cut off, or compressed.
        UserError: a file that can't be read.
    """
    with open_file(path) as file:
        content = file.read()
    header, body = _header(content)
    dtype, count = _layout(header)
    kind = header.get("DATA", [""])[0]
    if kind == "ascii":
        rows = _from_text(body, dtype, count)
    elif kind == "binary":
        if len(body) < count * dtype.itemsize:
            raise FormatError(
                f"{count} points declared, but the data are {len(body)} of {count * dtype.itemsize} bytes"
            )
        rows = np.frombuffer(body, dtype=dtype, count=count)
    elif kind == "binary_compressed":
        raise FormatError("compressed, which isn't read: save it as binary (pcl_convert_pcd_ascii_binary IN OUT 1)")
    else:
        raise FormatError(f"DATA is {kind[:20]!r} in place of ascii or binary")
    columns = _columns(rows)
    if not columns.keys() >= set(COORDINATES):
        return columns
    seen = ~np.isnan(np.stack([columns[name] for name in COORDINATES])).all(axis=0)
    return {name: column[seen] for name, column in columns.items()}


def _header(content: bytes) -> tuple[dict[str, list[str]], bytes]:
    entries: dict[str, list[str]] = {}
    place = 0
    while "DATA" not in entries:
        end = content.find(b"\n", place)
        if end < 0 or len(entries) > 20 or end - place > 10_000:
            raise FormatError("not a PCD file: no header that ends in DATA")
        words = content[place:end].decode("latin-1").partition("#")[0].split()
        place = end + 1
        if words:
            entries[words[0].upper()] = words[1:]
    return entries, content[place:]


def _layout(header: dict[str, list[str]]) -> tuple[np.dtype, int]:
    fields = header.get("FIELDS") or header.get("COLUMNS") or []
    counts = header.get("COUNT") or ["1"] * len(fields)
    try:
        sizes, kinds = [int(size) for size in header["SIZE"]], [_KINDS[kind] for kind in header["TYPE"]]
        number = int((header.get("POINTS") or [""])[0] or int(header["WIDTH"][0]) * int(header["HEIGHT"][0]))
        parts = [
            (f"{name}@{place}", f"<{kind}{size}", (int(count),))
            for place, (name, kind, size, count) in enumerate(zip(fields, kinds, sizes, counts, strict=True))
        ]
        if number < 0 or not parts:
            raise ValueError("no points declared")
        return np.dtype(parts), number
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise FormatError(f"its header can't be read ({type(error).__name__}: {one_line(error)})") from None


def _from_text(body: bytes, dtype: np.dtype, count: int) -> NDArray[np.void]:
    lines = [line.split() for line in body.decode("latin-1").splitlines() if line.strip()]
    if len(lines) != count:
        raise FormatError(f"{count} points declared, but {len(lines)} lines follow")
    rows = np.zeros(count, dtype=dtype)
    width, place = sum(dtype[name].shape[0] for name in dtype.names or ()), 0
    if any(len(line) != width for line in lines):
        raise FormatError(f"a line hasn't {width} numbers")
    for name in dtype.names or ():
        size = dtype[name].shape[0]
        try:
            rows[name] = (
                np.array([line[place : place + size] for line in lines]).reshape(count, size).astype(dtype[name].base)
            )
        except (ValueError, OverflowError) as error:
            raise FormatError(f"field {name.partition('@')[0]}: {one_line(error)}") from None
        place += size
    return rows


def _columns(rows: NDArray[np.void]) -> dict[str, NDArray[np.float64]]:
    columns: dict[str, NDArray[np.float64]] = {}
    for key in rows.dtype.names or ():
        name, values = key.partition("@")[0], rows[key]
        if name == "_":
            continue
        if name in _PACKED and values.shape[1] == 1 and values.dtype.itemsize == 4:
            packed = np.ascontiguousarray(values[:, 0]).view(np.uint32)
            for colour, shift in zip(COLOURS, (16, 8, 0), strict=True):
                columns[colour] = ((packed >> shift) & 255) / 255
            continue
        for place in range(values.shape[1]):
            columns[name if values.shape[1] == 1 else f"{name}_{place}"] = values[:, place].astype(np.float64)
    return columns
