"""Meshes of every format, strictly read, and points from surfaces."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinkformer_pl.data.pointclouds.formats import read_shape
from sinkformer_pl.data.pointclouds.mesh import sample_surface
from sinkformer_pl.data.pointclouds.shape import Shape
from sinkformer_pl.errors import UserError

SQUARE = "OFF\n4 2 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n3 0 1 2\n3 0 2 3\n"


def read(folder: Path, content: str | bytes) -> Shape:
    path = folder / "mesh.off"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_shape(path)


@pytest.mark.parametrize(
    "content",
    [
        SQUARE,
        SQUARE.replace("OFF\n", "OFF"),
        SQUARE.replace("OFF\n", "OFF "),
        SQUARE.replace("4 2 0", "4 2"),
        SQUARE.replace("\n", "\r\n"),
        SQUARE.rstrip("\n"),
        "# first\n" + SQUARE.replace("OFF\n", "OFF # glued?\n# second: 3 é\n\n").replace("3 0 1 2", "3 0 1 2 # x"),
        SQUARE.replace("3 0 1 2", "3 0 1 2 255 0 0").replace("3 0 2 3", "3  0\t2 3 0.1 0.2 0.3 1"),
        SQUARE.replace("\n1 0 0", "\n  1e0 0.0 -0  "),
        "\ufeff" + SQUARE,
        "OFF\n4 1 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 0 1 2 3\n",
    ],
    ids=[
        "plain", "glued", "same line", "no edges", "crlf", "no last line end", "comments", "colours", "spacing",
        "byte order mark", "polygon",
    ],
)  # fmt: skip
def test_every_spelling_of_a_square_is_read(tmp_path, content):
    mesh = read(tmp_path, content)
    assert mesh.points.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert mesh.faces is not None
    assert mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3]]
    assert mesh.points.dtype == np.float64
    assert mesh.faces.dtype == np.int64


def test_polygons_become_fans_in_the_order_of_the_file(tmp_path):
    vertices = "".join(f"{np.cos(a)} {np.sin(a)} 0\n" for a in range(6))
    mesh = read(tmp_path, f"OFF\n6 3 0\n{vertices}5 0 1 2 3 4\n3 1 2 3\n4 5 4 3 2\n")
    assert mesh.faces.tolist() == [[0, 1, 2], [0, 2, 3], [0, 3, 4], [1, 2, 3], [5, 4, 3], [5, 3, 2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SQUARE.replace("1 1 0", "1 nan 0"), "point 2 is not finite"),
        (SQUARE.replace("1 1 0", "1 -2e15 0"), "point 2 is further than 1e+15 from the origin"),
        (SQUARE.replace("1 1 0", "1 -inf 0"), "point 2 is not finite"),
        (SQUARE.replace("1 1 0", "1 1e999 0"), "point 2 is not finite"),
        (SQUARE.replace("1 1 0", "1 x 0"), "not three numbers"),
        (SQUARE.replace("1 1 0", "1 1"), "not three numbers"),
        (
            SQUARE.replace("1 1 0", "1 1 0 0"),
            "columns changed from 3 to 4 at row 3); repair",
        ),
        ("OFF\n2 1 0\n0 0\n1 1\n3 0 1 1\n", "2 numbers in place of 3"),
        ("OFF\n4 0 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n", "no faces"),
        ("OFF\n0 1 0\n3 0 1 2\n", "no vertices"),
        ("OFF\n0 0 0\n", "no faces"),
        (SQUARE.replace("3 0 2 3", "3 0 2 4"), "face 1 has an index outside 0 to 3"),
        (SQUARE.replace("3 0 2 3", "3 0 -2 3"), "face 1 has an index outside 0 to 3"),
        (SQUARE.replace("3 0 2 3", "3 0 2 99999999999999999999"), "not a whole number"),
        (SQUARE.replace("3 0 2 3", "3 0 2 1.5"), "not a whole number"),
        (SQUARE.replace("3 0 2 3", "3 0 2"), "face 1 is '3 0 2'"),
        (SQUARE.replace("3 0 2 3", "2 0 2"), "face 1 is '2 0 2'"),
        (SQUARE.replace("3 0 2 3", "-3 0 2 3"), "face 1 is '-3 0 2 3'"),
        (SQUARE.replace("3 0 2 3", "x"), "face 1 is 'x'"),
        (SQUARE.replace("3 0 2 3", "99999999999 0 2 3"), "face 1 is"),
        (SQUARE.replace("3 0 2 3", "9" * 5000 + " 0 2 3"), "face 1 is"),
        (SQUARE.replace("3 0 2 3", "3 0 2 " + "9" * 5000), "not a whole number"),
        (SQUARE.replace("4 2 0", "5 2 0"), "5 vertices and 2 faces declared, but 6 lines follow"),
        (SQUARE.replace("4 2 0", "4 3 0"), "4 vertices and 3 faces declared, but 6 lines follow"),
        (SQUARE.replace("4 2 0", "4 1 0"), "4 vertices and 1 faces declared, but 6 lines follow"),
        (SQUARE.replace("4 2 0", "4000000000 2 0"), "4000000000 vertices"),
        (SQUARE.replace("4 2 0", "4 4000000000 0"), "4000000000 faces"),
        (SQUARE.replace("4 2 0", "4000000000 4000000000 4000000000"), "4000000000 vertices and 4000000000 faces"),
        (SQUARE.replace("4 2 0", "9" * 5000 + " 2 0"), "counts"),
        (SQUARE.replace("4 2 0", "-4 2 0"), "counts"),
        (SQUARE.replace("4 2 0", "4 x 0"), "counts"),
        (SQUARE.replace("4 2 0", "4"), "counts"),
        ("OFF", "counts"),
        ("", "empty"),
        (" \n# nothing\n\r\n", "empty"),
        ("solid cube\nfacet normal 0 0 1\n", "not an OFF file"),
        ("COFF\n4 2 0\n", "not an OFF file"),
        (SQUARE.replace("OFF\n", ""), "not an OFF file"),
        ("OFF BINARY\n", "counts"),
        (bytes(range(256)) * 20, "not a text file"),
        (b"OFF\n" + bytes(range(256)), "not a text file"),
        (b"OFF\n4 2 0\n" + b"\0" * 200, "4 vertices and 2 faces declared"),
        (gzip.compress(SQUARE.encode(), mtime=0), "not a text file"),
        (SQUARE.replace("1 1 0\n0 1 0", "2 0 0\n3 0 0"), "no area"),
        ("OFF\n3 1 0\n0 0 0\n0 0 0\n0 0 0\n3 0 1 2\n", "no area"),
        ("OFF\n3 1 0\n1 1 1\n1 1 1\n1 1 1\n3 0 1 2\n", "no area"),
        ("OFF\n3 1 0\n0 0 0\n0 1 0\n1 0 0\n3 0 1 1\n", "no area"),
    ],
)
def test_a_bad_file_is_refused_by_name_in_one_line(tmp_path, content, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    assert str(error.value).startswith(f"{tmp_path / 'mesh.off'}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_path_that_is_no_file_is_refused(tmp_path):
    for path in (tmp_path / "absent.off", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            read_shape(path)


@given(
    st.binary(max_size=200) | st.text(st.sampled_from("OF0123 .-#\nxe"), max_size=80).map(lambda s: b"OFF" + s.encode())
)
def test_no_content_gives_anything_but_a_sound_mesh_or_a_user_error(tmp_path_factory, content):
    try:
        mesh = read(tmp_path_factory.getbasetemp(), content)
    except UserError:
        return
    assert np.isfinite(mesh.points).all()
    assert mesh.faces.min() >= 0
    assert mesh.faces.max() < len(mesh.points)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e14])
def test_size_does_not_decide_whether_there_is_a_surface(tmp_path, scale):
    assert len(read(tmp_path, f"OFF\n3 1 0\n0 0 0\n{scale} 0 0\n0 {scale} 0\n3 0 1 2\n").faces) == 1


@pytest.mark.slow
def test_real_files_have_the_numbers_that_they_are_written_with(tmp_path, real_data):
    files = sorted((real_data / "modelnet_original_off").glob("*.off.gz"))
    assert len(files) > 10
    for file in files:
        path = tmp_path / file.stem
        with gzip.open(file) as packed, path.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
        words = path.read_text().removeprefix("OFF").split()
        vertices, faces = int(words[0]), int(words[1])
        numbers = np.array(words[3:], dtype=np.float64)
        mesh = read_shape(path)
        assert np.array_equal(mesh.points.ravel(), numbers[: 3 * vertices]), file.name
        assert np.array_equal(mesh.faces, numbers[3 * vertices :].reshape(faces, 4)[:, 1:]), file.name


def test_real_polygons_are_read(tmp_path, real_data):
    shutil.unpack_archive(real_data / "geometric_shapes_raw.zip", tmp_path)
    files = sorted(tmp_path.glob("raw/*/train/*.off"))
    assert len(files) == 40
    for path in files:
        rows = [line.split() for line in path.read_text().splitlines()]
        vertices = int(rows[1][0])
        triangles = sum(int(row[0]) - 2 for row in rows[2 + vertices :] if row)
        assert len(read_shape(path).faces) == triangles, path.name


def uneven() -> Shape:
    """Return three triangles in planes z = 0, 1, 2 with areas in proportion 1 : 4 : 9, and one without area."""
    corners = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    vertices = np.concatenate([corners * (size + 1) + [0, 0, size] for size in range(3)])
    return Shape(vertices, np.array([*np.arange(9).reshape(3, 3), [0, 0, 8]]), {"size": vertices[:, 2]})


def test_points_are_drawn_in_proportion_to_area_and_evenly_within_a_face():
    points = sample_surface(uneven(), 28_000).points
    size = points[:, 2].round().astype(int)
    assert np.allclose(points[:, 2], size, atol=1e-6)
    assert np.allclose(np.bincount(size) / 2000, [1, 4, 9], rtol=0.06)
    largest = points[size == 2][:, :2] / 3
    assert (largest >= -1e-6).all()
    assert (largest.sum(axis=1) <= 1 + 1e-6).all()
    # Each of the four triangles between the corners and the middles of the sides has a quarter of the points.
    part = np.select([largest[:, 0] > 0.5, largest[:, 1] > 0.5, largest.sum(axis=1) < 0.5], [0, 1, 2], 3)
    assert np.allclose(np.bincount(part) / len(part), 0.25, atol=0.015)


def test_points_depend_on_the_mesh_alone_and_leave_the_global_state():
    torch.manual_seed(1)
    np.random.seed(1)
    before, state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = sample_surface(uneven(), 50)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], state)
    torch.manual_seed(2)
    assert np.array_equal(sample_surface(uneven(), 50).points, first.points)
    other = uneven()
    other.points[0] += 0.01
    assert not np.allclose(sample_surface(other, 50).points, first.points, atol=0.02)
    assert first.points.shape == (50, 3)
    assert first.faces is None


def test_columns_of_drawn_points_lie_between_those_of_the_corners_and_normals_are_those_of_the_faces():
    drawn = sample_surface(uneven(), 500)
    assert np.allclose(drawn.columns["size"], drawn.points[:, 2])
    normals = np.stack([drawn.columns[name] for name in ("nx", "ny", "nz")], axis=1)
    assert np.allclose(normals, [0, 0, 1])
