"""Which kernels for which sizes, and their tiles: one table."""

from functools import cache, lru_cache
from typing import Literal, NamedTuple

import torch
import triton

LONG = 7
"""Half-steps from which the whole kernel matrix on chip pays."""

SEGMENT = 22
"""Half-steps that the scalings of `on_chip` stay in range for."""


Kind = Literal["keys on chip", "queries on chip", "on chip", "streaming"]


class Tile(NamedTuple):
    """Of a kernel: queries, keys (or tokens of the sides A and B), warps, stages of the pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


class Choice(NamedTuple):
    """Kernels for one problem.

    Attributes:
        kind: of the half-steps and their gradient.
        forward: tile of the forward.
        backward: tile of the backward; streaming kernels have tiles of their own, `streaming_tiles`.
    """

    kind: Kind
    forward: Tile
    backward: Tile


class StreamingTiles(NamedTuple):
    """Of each streaming kernel."""

    half_step: Tile
    forward: Tile
    values: Tile
    keys: Tile
    queries: Tile


def power_of_2(n: int) -> int:
    """The next power of two, at least 16, the least side of a product."""
    return max(16, 1 << (n - 1).bit_length())


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have; those of an H100 where kernels are interpreted."""
    if device.type != "cuda":
        return 232_448
    return _limits(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _limits(index: int) -> int:
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


@lru_cache(4096)
def choose(
    queries: int, keys: int, width: int, value_width: int, dtype: torch.dtype, n_iters: int, gradient: str, limit: int
) -> Choice:
    """Kernels and tiles for a head of these sizes on a device with this limit of shared memory."""
    rows, columns = power_of_2(queries), power_of_2(keys)
    wide = max(power_of_2(width), power_of_2(value_width))
    full = dtype == torch.float32
    none = Tile(0, 0, 0, 0)
    small = 128 if full else 256
    # Numbers of one side of a head that fit, with all that is made of them.
    most = (128 if full or limit <= 120_000 else 256) * 64
    room = wide <= (64 if full else 128) and columns * wide <= most
    fits = max(rows, columns) <= (64 if full else 128) and wide <= 64
    if room and fits and LONG <= n_iters <= SEGMENT and gradient != "implicit":
        few = not full and rows * columns <= 64 * 64
        return Choice("on chip", Tile(rows, columns, 8 if full else 4, 1), Tile(rows, columns, 4 if few else 8, 1))
    if room and columns <= small:
        forward, backward = _keys_on_chip(queries, columns, full, wide, n_iters)
        return Choice(
            "keys on chip", Tile(forward[0], columns, *forward[1:]), Tile(backward[0], columns, *backward[1:])
        )
    room = wide <= (64 if full else 128) and rows * wide <= most
    if room and rows <= small and n_iters > 1:
        forward, backward = _queries_on_chip(rows, full, wide)
        return Choice("queries on chip", Tile(rows, *forward), Tile(rows, *backward))
    return Choice("streaming", none, none)


def _keys_on_chip(
    queries: int, columns: int, full: bool, wide: int, n_iters: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Queries of a tile, warps and stages, of the forward and the backward."""
    if full:
        return (16, 4, 1), (16, 8, 1)
    if columns <= 64:
        return (128, 4, 3) if columns <= 16 else (64, 4, 2), (64, 4, 1)
    if columns <= 128:
        # Of 65 queries a tile of 64 more would be nearly empty.
        filled = -(-queries // 64) * 64 <= 1.25 * queries
        forward = ((64, 4, 2) if n_iters <= LONG else (32, 4, 2)) if filled else (16, 2 if wide <= 64 else 4, 2)
        return forward, (32, 4 if wide <= 64 else 8, 1)
    return (32, 4, 2), (32, 8, 1) if wide <= 64 else (16, 8, 1)


def _queries_on_chip(rows: int, full: bool, wide: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    if full:
        return (32, 4 if rows <= 32 else 8, 1), (16, 8, 1)
    if rows <= 32:
        return (128, 4, 3), (128, 4, 1)
    if rows <= 128:
        return (64, 4, 2), (64, 8, 1)
    return (32, 8, 2), (32, 8, 1)


@cache
def streaming_tiles(width: int, value_width: int, dtype: torch.dtype) -> StreamingTiles:
    """Tiles of the streaming kernels for features of these widths."""
    wide = max(power_of_2(width), power_of_2(value_width))
    if dtype == torch.float32:
        tile = Tile(32, 32, 4, 1) if wide <= 64 else Tile(16, 16, 4, 1)
        return StreamingTiles(Tile(64, 32, 4, 1) if wide <= 64 else tile, tile, tile, tile, tile)
    if wide <= 64:
        return StreamingTiles(
            Tile(128, 64, 4, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3), Tile(64, 64, 4, 3)
        )
    if wide <= 128:
        return StreamingTiles(
            Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)
        )
    return StreamingTiles(*[Tile(64, 32, 8, 1)] * 2, *[Tile(32, 32, 8, 1)] * 3)
