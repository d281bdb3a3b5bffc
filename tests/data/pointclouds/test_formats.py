"""A reader for each suffix: what comes out, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import trimesh

from sinkformer_pl.data.pointclouds.formats import SUFFIXES, read_cloud, read_shape
from sinkformer_pl.errors import UserError
from tests.optional import h5py

POINTS = np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [-1, 0.5, 2]])
FACES = [[0, 1, 2], [0, 2, 3]]

PLY = """ply
format ascii 1.0
element vertex 4
property float x
property float y
property float z
property float normal_x
property float normal_y
property float normal_z
property uchar red
property uchar green
property uchar blue
property float intensity
element face 2
property list uchar int vertex_indices
end_header
0 0 0 0 0 1 255 0 0 .5
1 0 0 0 0 1 0 51 0 .5
1 1 0 0 0 1 255 0 0 .5
0 1 0 0 0 1 255 0 0 .7
3 0 1 2
3 0 2 3
"""
OBJ = "mtllib x.mtl\no a\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvn 0 0 1\nusemtl y\nf 1/1/1 2/1 3//1\nf -4 3 4\n"
PCD = """# .PCD v.7
VERSION .7
FIELDS x y z rgb _ spin
SIZE 4 4 4 4 1 4
TYPE F F F U U F
COUNT 1 1 1 1 1 2
WIDTH 3
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS 3
DATA ascii
0 0 0 16744448 0 1 2
nan nan nan 0 0 0 0
1 0 2 255 0 3 4
"""


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("suffix", [".off", ".ply", ".OBJ", ".Stl"])
def test_meshes_of_every_format_have_their_surface(tmp_path, suffix):
    mesh = trimesh.Trimesh(POINTS, FACES, process=False)
    path = put(tmp_path, f"mesh{suffix}", mesh.export(file_type=suffix[1:].lower()))
    shape = read_shape(path)
    assert shape.faces is not None
    corners = POINTS[FACES]
    assert np.allclose(shape.points[shape.faces], corners)
    if suffix != ".Stl":  # which repeats the corners of each face
        assert np.allclose(shape.points, POINTS)
    cloud = read_cloud(path, pool_size=50, features=["normals"], centred=False)
    assert cloud.shape == (50, 6)
    assert np.allclose(cloud[:, 2:], [0, 0, 0, 1])


def test_properties_of_a_ply_are_columns_and_colours_are_shares(tmp_path):
    shape = read_shape(put(tmp_path, "x.ply", PLY))
    assert {name: column[1] for name, column in shape.columns.items()} == {
        "nx": 0, "ny": 0, "nz": 1, "red": 0, "green": pytest.approx(0.2), "blue": 0, "intensity": 0.5
    }  # fmt: skip
    assert shape.faces is not None
    assert shape.faces.tolist() == FACES
    cloud = "\n".join(
        line for line in PLY.splitlines() if "face" not in line and "list" not in line and line[:2] != "3 "
    )
    shape = read_shape(put(tmp_path, "y.ply", cloud))
    assert shape.faces is None
    assert read_cloud(tmp_path / "y.ply", pool_size=9, features=["colours", "intensity"], centred=False).shape == (4, 7)


def test_an_obj_keeps_its_vertices_whatever_its_textures(tmp_path):
    shape = read_shape(put(tmp_path, "x.obj", OBJ))
    assert shape.points.tolist() == POINTS[:4].tolist()
    assert shape.faces is not None
    assert sorted(shape.faces.tolist()) == FACES
    coloured = "v 0 0 0 1 0 0\nv 1 0 0 0 1 0\nv 1 1 0 0 0 1\nf 1 2 3\n"
    assert read_shape(put(tmp_path, "y.obj", coloured)).columns["green"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("kind", ["ascii", "binary"])
def test_a_pcd_has_its_fields_without_points_that_were_not_seen(tmp_path, kind):
    content: str | bytes = PCD
    if kind == "binary":
        rows = np.zeros(3, np.dtype([("p", "<f4", 3), ("rgb", "<u4"), ("_", "u1"), ("spin", "<f4", 2)]))
        rows["p"] = [[0, 0, 0], [np.nan] * 3, [1, 0, 2]]
        rows["rgb"], rows["spin"] = [16744448, 0, 255], [[1, 2], [0, 0], [3, 4]]
        content = PCD.partition("DATA")[0].encode() + b"DATA binary\n" + rows.tobytes()
    shape = read_shape(put(tmp_path, "x.pcd", content))
    assert shape.points.tolist() == [[0, 0, 0], [1, 0, 2]]
    assert shape.columns["red"].tolist() == [1, 0]
    assert shape.columns["green"] == pytest.approx([128 / 255, 0])
    assert shape.columns["blue"].tolist() == [0, 1]
    assert (shape.columns["spin_0"].tolist(), shape.columns["spin_1"].tolist()) == ([1, 3], [2, 4])


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("x.xyz", "1 2 3\n4 5 6\n", {}),
        ("x.xyz", "# scanned\n2\n1 2 3\n4 5 6\n", {}),
        ("x.txt", "1,2,3,.1\n4,5,6,.2\n", {"4": [0.1, 0.2]}),
        ("x.TXT", "//X Y Z R\n1 2 3 .1\n4 5 6 .2\n", {"red": [0.1, 0.2]}),
        ("x.csv", "\ufeffIntensity;Z;Y;X\r\n.1;3;2;1\r\n.2;6;5;4\r\n", {"intensity": [0.1, 0.2]}),
        ("x.csv", "x,y,z,Normal_X\n1,2,3,.1\n4,5,6,.2", {"nx": [0.1, 0.2]}),
    ],
)
def test_tables_of_numbers(tmp_path, name, content, columns):
    shape = read_shape(put(tmp_path, name, content))
    assert shape.points.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert {name: column.tolist() for name, column in shape.columns.items()} == columns


def test_names_can_be_given_to_columns_that_have_none(tmp_path):
    path = put(tmp_path, "x.xyz", "7 1 2 3\n8 4 5 6\n")
    shape = read_shape(path, ["id", "x", "y", "z"])
    assert shape.points.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert shape.columns["id"].tolist() == [7, 8]
    with pytest.raises(UserError, match=r"4 columns without names, but data\.columns names 3"):
        read_shape(path, ["x", "y", "z"])


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".h5"])
def test_arrays_of_one_cloud(tmp_path, suffix):
    path, points = tmp_path / f"x{suffix}", np.concatenate([POINTS, POINTS[:, :1]], axis=1)
    content = {"points": points.astype("f4"), "colors": np.full((5, 3), 255, np.uint8), "label": np.array(3)}
    if suffix == ".npy":
        np.save(path, content["points"])
    elif suffix == ".npz":
        np.savez(path, **content)
    else:
        with h5py.File(path, "w") as file:
            for name, array in content.items():
                file[name] = array
    shape = read_shape(path)
    assert np.allclose(shape.points, POINTS)
    assert np.allclose(shape.columns["4"], POINTS[:, 0])
    if suffix != ".npy":
        assert shape.columns["green"].tolist() == [1] * 5


TRUNCATED_STL = trimesh.creation.box().export(file_type="stl")[:-10]
BINARY_PLY = trimesh.creation.box().export(file_type="ply")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *((f"x{suffix}", b"", "x") for suffix in SUFFIXES),
        *((f"x{suffix}", b"\xff\xfe garbage" * 9, "x") for suffix in SUFFIXES),
        *((f"x{suffix}", "<html>", "x") for suffix in SUFFIXES),
        ("x.ply", PLY[:-8], "4 and 2 rows declared, but 5 follow"),
        ("x.ply", PLY.replace("3 0 2 3", "3 0 -2 3"), "triangle 1 has an index outside 0 to 3"),
        ("x.ply", PLY.replace("3 0 2 3", "3 0 2 4"), "triangle 1 has an index outside 0 to 3"),
        ("x.ply", PLY.replace("1 1 0 0", "1 nan 0 0"), "point 2 is not finite"),
        ("x.ply", PLY.replace("vertex 4", "vertex 4000000000"), "4000000000 and 2 rows declared"),
        ("x.ply", BINARY_PLY[:-10], "unexpected length"),
        ("x.stl", TRUNCATED_STL, "may be cut off"),
        ("x.obj", OBJ.replace("f -4 3 4", "f 0 3 4"), "a face has an index 0: 'f 0'"),
        ("x.obj", OBJ.replace("f -4 3 4", "f 1 3 9"), "out of bounds"),
        ("x.obj", OBJ.replace("f -4 3 4", "f 1 3"), "fewer than three corners: 'f 1 3'"),
        ("x.obj", OBJ.replace("v 1 1 0", "v 1 inf 0"), "point 2 is not finite"),
        ("x.pcd", PCD.replace("POINTS 3", "POINTS 4000000000"), "4000000000 points declared, but 3 lines follow"),
        ("x.pcd", PCD.replace("DATA ascii", "DATA binary"), "3 points declared, but the data are"),
        ("x.pcd", PCD.replace("DATA ascii", "DATA binary_compressed"), "save it as binary"),
        ("x.pcd", PCD.replace("SIZE 4", "SIZE 5"), "header can't be read"),
        ("x.pcd", PCD.replace("\n1 0 2 255", "\n1 inf 2 255"), "point 1 is not finite"),
        ("x.xyz", "1 2\n3 4\n", "no column z; it has x, y"),
        ("x.xyz", "3\n1 2 3\n", "3 points declared, but 1 lines follow"),
        ("x.csv", "1,2,3\n4,5\n", "number of columns changed"),
        ("x.csv", "x,y\n1,2,3\n", "2 names (x, y) for 3 columns"),
        ("x.csv", "x,y,z,X\n1,2,3,4\n", "two columns of one name"),
        ("x.fbx", "", "no point cloud by its name; give one of .off, .ply"),
    ],
)
def test_what_is_unsound_is_refused_by_name_in_one_line(tmp_path, name, content, message):
    path = put(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        read_shape(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_pickled_objects_are_not_run(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"x\.npy: cannot be read"):
        read_shape(tmp_path / "x.npy")
