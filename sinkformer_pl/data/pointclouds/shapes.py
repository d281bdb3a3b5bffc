"""Parametric families of surfaces in 3-D, and point clouds drawn from them."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_OVERSAMPLING = 4


def _stack(*columns: Array) -> Array:
    return np.stack(columns, axis=1)


def _angles(rng: np.random.Generator, count: int) -> Array:
    return rng.uniform(0, 2 * math.pi, count)


def _part_of(rng: np.random.Generator, areas: list[float], count: int) -> NDArray[np.int64]:
    """Choose for each of `count` points the part of a surface that it lies on, in proportion to area."""
    return np.searchsorted(np.cumsum(areas), rng.uniform(0, sum(areas), count))


def _by_area(rng: np.random.Generator, points: Array, density: Array, count: int) -> Array:
    """Choose `count` points with chances in proportion to the area that each stands for, without repetition."""
    return points[np.argsort(rng.exponential(size=len(points)) / density)[:count]]


def _disc(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    radius, angle = np.sqrt(rng.uniform(0, 1, count)), _angles(rng, count)
    return radius * np.cos(angle), radius * np.sin(angle)


def _directions(rng: np.random.Generator, count: int) -> Array:
    normal = rng.standard_normal((count, 3))
    return normal / np.linalg.norm(normal, axis=1, keepdims=True)


def ellipsoid(rng: np.random.Generator, count: int) -> Array:
    """Closed surface with three different half-axes."""
    axes = rng.uniform(0.45, 1.0, 3)
    sphere = _directions(rng, _OVERSAMPLING * count)
    return _by_area(rng, sphere * axes, np.linalg.norm(sphere / axes, axis=1), count)


def box(rng: np.random.Generator, count: int) -> Array:
    """All six faces of a cuboid."""
    sides = rng.uniform(0.4, 1.0, 3)
    points = rng.uniform(-1, 1, (count, 3))
    axis = _part_of(rng, [sides[1] * sides[2], sides[0] * sides[2], sides[0] * sides[1]], count)
    points[np.arange(count), axis] = rng.choice([-1.0, 1.0], count)
    return points * sides


def cylinder(rng: np.random.Generator, count: int) -> Array:
    """Side and both ends."""
    radius, half = rng.uniform(0.3, 0.9), rng.uniform(0.4, 1.0)
    part = _part_of(rng, [4 * radius * half, radius**2, radius**2], count)
    angle = _angles(rng, count)
    distance = np.where(part == 0, 1.0, np.sqrt(rng.uniform(0, 1, count)))
    height = np.select([part == 1, part == 2], [-1.0, 1.0], rng.uniform(-1, 1, count))
    return _stack(radius * distance * np.cos(angle), radius * distance * np.sin(angle), half * height)


def cone(rng: np.random.Generator, count: int) -> Array:
    """Side and base."""
    radius, height = rng.uniform(0.4, 1.0), rng.uniform(0.8, 2.0)
    part = _part_of(rng, [math.hypot(radius, height), radius], count)
    x, y = _disc(rng, count)
    z = np.where(part == 0, 1 - np.hypot(x, y), 0.0)
    return _stack(radius * x, radius * y, height * z)


def torus(rng: np.random.Generator, count: int) -> Array:
    """Ring with a round profile."""
    thickness = rng.uniform(0.15, 0.5)
    around, across = _angles(rng, _OVERSAMPLING * count), _angles(rng, _OVERSAMPLING * count)
    distance = 1 + thickness * np.cos(across)
    points = _stack(distance * np.cos(around), distance * np.sin(around), thickness * np.sin(across))
    return _by_area(rng, points, distance, count)


def helix(rng: np.random.Generator, count: int) -> Array:
    """Thin tube along a screw line."""
    turns, half, thickness = rng.uniform(1.5, 3.0), rng.uniform(0.6, 1.4), rng.uniform(0.03, 0.1)
    along, across = rng.uniform(-1, 1, count), _angles(rng, count)
    angle = along * turns * math.pi
    distance = 1 + thickness * np.cos(across)
    return _stack(distance * np.cos(angle), distance * np.sin(angle), half * along + thickness * np.sin(across))


def hourglass(rng: np.random.Generator, count: int) -> Array:
    """Two cones without bases, tip to tip."""
    radius, half = rng.uniform(0.4, 0.9), rng.uniform(0.5, 1.0)
    x, y = _disc(rng, count)
    return _stack(radius * x, radius * y, half * np.hypot(x, y) * rng.choice([-1.0, 1.0], count))


def moebius(rng: np.random.Generator, count: int) -> Array:
    """Band with half a twist."""
    width = rng.uniform(0.25, 0.55)
    angle, across = _angles(rng, count), rng.uniform(-width, width, count)
    distance = 1 + across * np.cos(angle / 2)
    return _stack(distance * np.cos(angle), distance * np.sin(angle), across * np.sin(angle / 2))


def saddle(rng: np.random.Generator, count: int) -> Array:
    """Patch of a hyperbolic paraboloid over a rectangle."""
    (length, width), bend = rng.uniform(0.7, 1.0, 2), rng.uniform(0.5, 1.0)
    x, y = rng.uniform(-length, length, _OVERSAMPLING * count), rng.uniform(-width, width, _OVERSAMPLING * count)
    density = np.sqrt(1 + 4 * bend**2 * (x**2 + y**2))
    return _by_area(rng, _stack(x, y, bend * (x**2 - y**2)), density, count)


def capsule(rng: np.random.Generator, count: int) -> Array:
    """Cylinder with a half sphere at each end."""
    radius, half = rng.uniform(0.3, 0.6), rng.uniform(0.6, 1.2)
    part = _part_of(rng, [half, radius], count)
    sphere = radius * _directions(rng, count)
    angle = _angles(rng, count)
    caps = sphere + half * _stack(np.zeros(count), np.zeros(count), np.sign(sphere[:, 2]))
    side = _stack(radius * np.cos(angle), radius * np.sin(angle), rng.uniform(-half, half, count))
    return np.where((part == 0)[:, None], side, caps)


def bowl(rng: np.random.Generator, count: int) -> Array:
    """Half sphere without a lid, flattened or deepened."""
    axes = np.array([1.0, rng.uniform(0.7, 1.0), rng.uniform(0.6, 1.2)])
    sphere = _directions(rng, _OVERSAMPLING * count)
    sphere[:, 2] = np.abs(sphere[:, 2])
    return _by_area(rng, sphere * axes, np.linalg.norm(sphere / axes, axis=1), count)


def tube(rng: np.random.Generator, count: int) -> Array:
    """Cylinder without ends, inside a wider one."""
    inner, half = rng.uniform(0.4, 0.75), rng.uniform(0.3, 1.0)
    radius = np.where(_part_of(rng, [inner, 1.0], count) == 0, inner, 1.0)
    angle = _angles(rng, count)
    return _stack(radius * np.cos(angle), radius * np.sin(angle), rng.uniform(-half, half, count))


FAMILIES: dict[str, Callable[[np.random.Generator, int], Array]] = {
    family.__name__: family
    for family in (bowl, box, capsule, cone, cylinder, ellipsoid, helix, hourglass, moebius, saddle, torus, tube)
}
"""Each takes a generator and a count and returns (count, 3) points, about uniform on a surface of random proportions
that is about 1 in half-size and upright along z."""


def _rotation(rng: np.random.Generator, tilt: float) -> Array:
    """Return a turn by any angle about z, then by at most `tilt` about a random horizontal axis."""
    about_z, heading, lean = rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi), rng.uniform(0, tilt)

    def turn(angle: float, i: int, j: int) -> Array:
        matrix = np.eye(3)
        matrix[[i, i, j, j], [i, j, i, j]] = math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
        return matrix

    return turn(heading, 0, 1) @ turn(lean, 1, 2) @ turn(about_z - heading, 0, 1)


def sample_shape(
    family: str, rng: np.random.Generator, *, count: int, tilt: float, noise: float, occlusion: float
) -> NDArray[np.float32]:
    """Draw one cloud: a shape of random proportions, turned, partly cut away and noisy.

    Args:
        family: a key of `FAMILIES`.
        rng: the source of all randomness; equal states give equal clouds.
        count: points of the cloud.
        tilt: largest angle between the shape's axis and z, in radians; the angle about z is always free.
        noise: standard deviation of each coordinate's Gaussian error, in half-sizes of the shape.
        occlusion: largest share of the surface that a random plane cuts away, in [0, 1); the share is drawn uniformly
            from [0, occlusion].

    Returns:
        (count, 3) float32.
    """
    share = rng.uniform(0, occlusion)
    points = FAMILIES[family](rng, math.ceil(count / (1 - share)))
    depth = points @ _directions(rng, 1)[0]
    points = points[np.argpartition(depth, count - 1)[:count]] @ _rotation(rng, tilt).T
    return (points + noise * rng.standard_normal(points.shape)).astype(np.float32)
