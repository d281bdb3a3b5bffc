"""Triangle meshes: reading by trimesh with the checks that it lacks, and points drawn from their surface."""

import hashlib
import io
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sinkformer_pl.data.pointclouds.shape import COLOURS, COORDINATES, NORMALS, Columns, FormatError, Shape
from sinkformer_pl.data.reading import open_file

MeshColumns = tuple[Columns, NDArray[np.int64] | None]


def read_mesh(path: Path) -> MeshColumns:
    """Read a file of the formats .ply, .obj and .stl.

    Faces of more than three corners are cut into triangles, vertices stay in their order and none are merged. Columns
    are those of the vertices: all properties of a .ply, colours of an .obj.

    Args:
        path: the file; its suffix, in any case, names the format.

    Returns:
        The columns, and the triangles (F, 3); None where the file has points alone.

    Raises:
        FormatError: no such file by its content, or one that is cut off where the format can tell.
        UserError: a file that can't be read.
    """
    # Imported here, since sources of other data do without.
    import trimesh

    kind = path.suffix.lower().removeprefix(".")
    with open_file(path) as file:
        content = file.read()
    if not content.strip():
        raise FormatError("the file is empty")
    _CHECKS.get(kind, lambda _: None)(content)
    if kind == "obj":
        content = _without_texture(content)
    try:
        loaded = trimesh.load_scene(io.BytesIO(content), file_type=kind, process=False, maintain_order=True)
    except ModuleNotFoundError as error:
        # trimesh would guess the encoding of a text by a library that needn't be there.
        raise FormatError("it is no UTF-8 text, and no binary file of that size; it may be cut off") from error
    parts = list(loaded.geometry.values())
    if not parts:
        raise FormatError(f"nothing in it can be read as .{kind}; it may be cut off")
    columns = [_columns(part) for part in parts]
    sizes = [len(part.vertices) for part in parts]
    joined = {
        name: np.concatenate([c[name] for c in columns]) for name in columns[0] if all(name in c for c in columns)
    }
    starts = np.cumsum([0, *sizes[:-1]])
    faces = [
        np.asarray(part.faces, dtype=np.int64) + start
        for part, start in zip(parts, starts, strict=True)
        if _has_faces(part)
    ]
    return joined, np.concatenate(faces) if faces else None


def sample_surface(shape: Shape, count: int) -> Shape:
    """Draw points from the surface, in proportion to the area of the faces; columns are those between the corners.

    Args:
        shape: a mesh. It seeds the draw, so that equal meshes give equal points, whatever their names.
        count: number of points.

    Returns:
        A cloud, with columns of normals in any case: where the mesh has none, those of the faces.
    """
    import trimesh

    assert shape.faces is not None
    # Scaled, so that areas neither overflow nor vanish.
    scale = np.abs(shape.points).max() or 1.0
    mesh = trimesh.Trimesh(shape.points / scale, shape.faces, process=False)
    digest = hashlib.sha256(shape.points.tobytes() + shape.faces.tobytes()).digest()
    points, chosen, weights = trimesh.sample.sample_surface(
        mesh, count, return_barycentric=True, seed=int.from_bytes(digest[:4], "big")
    )
    corners = shape.faces[chosen]
    columns = {name: (column[corners] * weights).sum(axis=1) for name, column in shape.columns.items()}
    if not columns.keys() >= set(NORMALS):
        vectors = mesh.triangles[chosen]
        normals = np.cross(vectors[:, 1] - vectors[:, 0], vectors[:, 2] - vectors[:, 0])
        normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(np.finfo(np.float64).tiny)
        columns |= dict(zip(NORMALS, normals.T, strict=True))
    return Shape(np.asarray(points) * scale, None, columns)


def _has_faces(part: object) -> bool:
    return len(getattr(part, "faces", ())) > 0


def _columns(part: object) -> dict[str, NDArray[np.float64]]:
    vertices = np.asarray(part.vertices, dtype=np.float64)  # type: ignore[attr-defined]
    columns = dict(zip(COORDINATES, vertices.reshape(-1, 3).T, strict=True))
    properties = part.metadata.get("_ply_raw", {}).get("vertex", {}).get("data")  # type: ignore[attr-defined]
    if properties is not None:
        names = properties.dtype.names if isinstance(properties, np.ndarray) else properties.keys()
        for name in names:
            values = np.asarray(properties[name])
            if name in COORDINATES or values.size != len(vertices):
                continue
            # Colours of a byte are the only integers with a scale.
            scale = 255.0 if values.dtype == np.uint8 and name.rpartition("_")[2] in (*COLOURS, "alpha") else 1.0
            columns[name] = values.reshape(-1) / scale
    elif getattr(getattr(part, "visual", None), "kind", None) == "vertex":
        colours = np.asarray(part.visual.vertex_colors)  # type: ignore[attr-defined]
        if colours.shape == (len(vertices), 4):
            columns |= dict(zip(COLOURS, colours[:, :3].T / 255, strict=True))
    return columns


def _check_ply(content: bytes) -> None:
    """Count the rows of a text file, of which trimesh reads those that are there."""
    header, _, body = content.partition(b"end_header")
    if not header.startswith(b"ply"):
        raise FormatError(f"not a PLY file: it starts with {content[:20]!r} in place of 'ply'")
    if b"format ascii" in header:
        words = [line.split() for line in header.decode("latin-1").splitlines()]
        counts = [word[2] for word in words if word[:1] == ["element"] and len(word) == 3]
        rows = sum(1 for line in body.splitlines() if line.strip())
        if not all(map(_is_count, counts)) or rows != sum(map(int, counts)):
            raise FormatError(f"{' and '.join(counts) or 'no'} rows declared, but {rows} follow")


def _check_obj(content: bytes) -> None:
    """Refuse faces that trimesh leaves out or misreads: of one or two corners, and with an index 0."""
    for pattern, what in (
        (rb"^f(?:[ \t]+[^\s#]+){0,2}[ \t]*(?:#.*)?\r?$", "has fewer than three corners"),
        (rb"^f\b[^\n]*?[ \t]0(?:[/\s]|$)", "has an index 0"),
    ):
        if found := re.search(pattern, content, re.MULTILINE):
            raise FormatError(f"a face {what}: {found[0].decode('latin-1').strip()[:40]!r}")


def _without_texture(content: bytes) -> bytes:
    """Leave out materials and texture coordinates, for which trimesh would double vertices and open other files."""
    content = re.sub(rb"^(?:vt|vn|usemtl|mtllib|o|g|s)\b[^\n]*", b"", content, flags=re.MULTILINE)
    return re.sub(rb"(?<=\d)/[\d/-]*", b"", content)


_CHECKS = {"ply": _check_ply, "obj": _check_obj}


def _is_count(token: str) -> bool:
    # Python refuses to read a number of thousands of digits.
    return token.isascii() and token.isdigit() and len(token) < 19
