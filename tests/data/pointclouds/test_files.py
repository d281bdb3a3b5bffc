"""Point clouds from meshes and arrays on disk."""

import hashlib
import io
import os
import resource
import shutil
import signal
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from sinkformer_pl.data import LabelledDataset, PointClouds, Sample
from sinkformer_pl.data.pointclouds import modelnet
from sinkformer_pl.data.pointclouds.modelnet import MODELNET_CLASSES
from sinkformer_pl.errors import UserError
from tests.optional import h5py

TETRAHEDRON = "OFF\n4 4 0\n0 0 0\n{0} 0 0\n0 {0} 0\n0 0 {0}\n3 0 2 1\n3 0 1 3\n3 0 3 2\n3 1 2 3\n"


def write_meshes(folder: Path, classes: tuple[str, ...] = ("cube", "ant"), train: int = 4, test: int = 2) -> Path:
    """Write ModelNet's layout, in an order that is not sorted."""
    for name in classes:
        for part, count in (("train", train), ("test", test)):
            (folder / name / part).mkdir(parents=True)
            for index in reversed(range(count)):
                (folder / name / part / f"{name}_{index:04}.off").write_text(TETRAHEDRON.format(index + 1))
    return folder


def samples(dataset: LabelledDataset) -> list[Sample]:
    return [dataset[index] for index in range(len(dataset))]


def clouds(module: PointClouds) -> dict[str, list[torch.Tensor]]:
    return {split: [sample.inputs for sample in samples(dataset)] for split, dataset in module.datasets.items()}


def same(one: PointClouds, other: PointClouds) -> bool:
    assert all(one.names(split) == other.names(split) for split in one.datasets)
    return all(
        len(a) == len(b) and all(map(torch.equal, a, b))
        for a, b in zip(clouds(one).values(), clouds(other).values(), strict=True)
    )


def ready(root: Path, *, run: Path | None = None, **kwargs: Any) -> PointClouds:
    """Return data as a Trainer leaves it, which writes under `run`; without one where that is None."""
    kwargs = {"pool_size": 64} | kwargs
    module = PointClouds(root, **kwargs)
    if run is not None:
        module.trainer = pl.Trainer(default_root_dir=run, accelerator="cpu", logger=False, enable_checkpointing=False)
    module.prepare_data()
    module.setup()
    return module


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Meshes


@pytest.mark.parametrize("place", ["", "raw", "ModelNet10", "ModelNet40"])
def test_meshes_are_found_sorted_and_labelled_by_folder(tmp_path, place):
    write_meshes(tmp_path / place)
    (tmp_path / place / "README.txt").write_text("hello")
    (tmp_path / place / "ant" / "train" / "._ant_0000.off").write_text("not a mesh")
    (tmp_path / place / "__MACOSX").mkdir()
    module = PointClouds(tmp_path, pool_size=64)
    assert module.classes == ("ant", "cube")
    assert module.datasets == {}
    module.setup()
    assert module.names("test") == [f"{name}/test/{name}_000{index}" for name in ("ant", "cube") for index in (0, 1)]
    assert module.datasets["test"].targets.tolist() == [0, 0, 1, 1]
    assert sorted([*module.names("train"), *module.names("val")]) == [
        f"{name}/train/{name}_000{index}" for name in ("ant", "cube") for index in range(4)
    ]


def test_clouds_lie_on_their_mesh(tmp_path):
    module = ready(write_meshes(tmp_path), standardize=False)
    for split, dataset in module.datasets.items():
        for name, sample in zip(module.names(split), samples(dataset), strict=True):
            points, size = sample.inputs, int(name[-4:]) + 1
            assert points.shape == (64, 3)
            on_face = torch.minimum(points.abs().amin(dim=1), (points.sum(dim=1) - size).abs())
            assert on_face.max() < 1e-5


def test_a_second_run_reads_one_cache_file_and_gives_the_same_clouds(tmp_path):
    root, run = write_meshes(tmp_path / "meshes"), tmp_path / "run"
    before = listing(root)
    first = ready(root, run=run)
    (cache,) = (run / "cache").iterdir()
    written = cache.stat().st_mtime_ns
    second = ready(root, run=run)
    assert same(first, second)
    assert cache.stat().st_mtime_ns == written
    assert listing(run) == ["cache", f"cache/{cache.name}"]
    assert listing(root) == before
    assert same(first, ready(root))

    # That the cache is what is read shows when its content differs from the meshes.
    with np.load(cache) as file:
        np.savez(cache, **{name: file[name] if "sizes" in name else -file[name] for name in file.files})
    assert not same(first, ready(root, run=run))


def test_changed_meshes_or_pool_size_are_read_anew(tmp_path):
    root, run = write_meshes(tmp_path / "meshes"), tmp_path / "run"
    first = ready(root, run=run)
    mesh = root / "ant" / "test" / "ant_0000.off"
    mesh.write_text(TETRAHEDRON.format(7).replace("\n0 0 0", "\n-7 0 0"))
    changed = ready(root, run=run)
    assert not torch.equal(clouds(first)["test"][0], clouds(changed)["test"][0])
    assert torch.equal(clouds(first)["test"][1], clouds(changed)["test"][1])
    assert ready(root, run=run, pool_size=32).datasets["test"][0].inputs.shape == (32, 3)
    assert len(list((run / "cache").iterdir())) == 3


def test_without_a_trainer_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write_meshes(tmp_path / "meshes")
    before = listing(tmp_path)
    ready(root)
    assert listing(tmp_path) == before


def cached(train: int = 8, width: int = 3, dtype: str = "float32") -> dict[str, np.ndarray]:
    return {
        "train": np.ones((train * 64, width), dtype),
        "train_sizes": np.full(train, 64),
        "test": np.ones((4 * 64, 3), dtype),
        "test_sizes": np.full(4, 64),
    }


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write(b"junk"), "pickled"),
        (lambda file: np.save(file, np.zeros(3)), "context manager"),
        (lambda file: np.savez(file, train=np.zeros((512, 3), np.float32)), "train_sizes is not a file"),
        (lambda file: np.savez(file, **cached(train=7)), r"train is float32 \(448, 3\) for 7 clouds"),
        (lambda file: np.savez(file, **cached(width=4)), r"train is float32 \(512, 4\) for 8 clouds"),
        (lambda file: np.savez(file, **cached(dtype="float64")), r"train is float64 \(512, 3\) for 8 clouds"),
    ],
)
def test_a_damaged_cache_is_made_anew(tmp_path, damage, message):
    root, run = write_meshes(tmp_path / "meshes"), tmp_path / "run"
    first = ready(root, run=run)
    (cache,) = (run / "cache").iterdir()
    content = cache.read_bytes()
    with cache.open("wb") as file:
        damage(file)
    with pytest.warns(UserWarning, match=rf"{cache}: the cache can't be used \(.*({message}).*; the files are"):
        assert same(first, ready(root, run=run))
    assert cache.read_bytes() == content


@pytest.mark.parametrize("obstacle", ["a file", "a full disk"])
def test_without_a_cache_it_goes_on(tmp_path, monkeypatch, obstacle):
    root, run = write_meshes(tmp_path / "meshes"), tmp_path / "run"
    run.mkdir()
    if obstacle == "a file":
        (run / "cache").write_text("")
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.warns(
            UserWarning, match=f"{run}/cache: the cache can't be written .*; each run will read the files anew"
        ):
            module = ready(root, run=run)
    finally:
        if obstacle == "a full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(module, ready(root))
    assert listing(run) == ["cache"]


def test_a_bad_mesh_is_named(tmp_path):
    write_meshes(tmp_path)
    bad = tmp_path / "cube" / "train" / "cube_0002.off"
    bad.write_text("OFF\n1 0 0\n0 0 0\n")
    with pytest.raises(UserError, match=f"{bad}: no faces"):
        ready(tmp_path)


@pytest.mark.parametrize("name", ["ant", "ant/train", "cube/test/cube_0001.off"])
def test_what_cannot_be_read_is_named_rather_than_left_out(here, refused, name):
    write_meshes(here)
    ready(here)
    with refused(here / name), pytest.raises(UserError, match=rf"^{name}.*: can't be read \(Permission denied\)"):
        ready(here)


def test_a_pipe_and_a_name_that_predictions_could_not_hold_are_refused(tmp_path):
    write_meshes(tmp_path)
    pipe = tmp_path / "ant" / "test" / "x.off"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=f"{pipe}: not a regular file"):
        ready(tmp_path)
    pipe.rename(pipe.with_name(os.fsdecode(b"\xff.off")))
    with pytest.raises(UserError, match=r"ant/test/\\xff\.off: a name that isn't UTF-8"):
        ready(tmp_path)
    os.mkfifo(tmp_path / "clouds.npz")
    with pytest.raises(UserError, match=r"clouds\.npz: neither a regular file nor a folder"):
        PointClouds(tmp_path / "clouds.npz")


def test_suffixes_in_any_case_and_sub_folders_are_read_and_the_rest_is_counted(tmp_path):
    write_meshes(tmp_path)
    train = tmp_path / "ant" / "train"
    for mesh in tmp_path.glob("*/*/*_0001.off"):
        mesh.rename(mesh.with_suffix(".OFF"))
    (train / "deeper").mkdir()
    (train / "ant_0002.off").rename(train / "deeper" / "ant_0002.Off")
    (train / "ant_0003.off").rename(train / "ant_0003.blend")
    for place in ("stray.off", "lamp/x.ply", "ant/test/deeper/notes.md"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    with pytest.warns(
        UserWarning, match=r"4 files are left out, the first is stray\.off; clouds lie in <class>"
    ) as said:
        module = ready(tmp_path)
    assert sum("left out" in str(warning.message) for warning in said) == 1
    assert {split: len(dataset) for split, dataset in module.datasets.items()} == {"train": 5, "val": 2, "test": 4}
    assert "ant/train/deeper/ant_0002" in {*module.names("train"), *module.names("val")}
    np.savez(tmp_path / "x.npz", **arrays())
    (tmp_path / "x.npz").rename(tmp_path / "CLOUDS.NPZ")
    assert PointClouds(tmp_path / "CLOUDS.NPZ").classes == ("ant", "bee", "cow")


@pytest.mark.parametrize("kind", ["meshes", "arrays"])
def test_training_clouds_in_the_test_part_are_said(tmp_path, kind):
    root = tmp_path / "data"
    if kind == "meshes":
        write_meshes(root, ("cube",))
        shutil.copytree(write_meshes(tmp_path / "other", ("ant",)) / "ant", root / "ant")
        for size, mesh in enumerate(sorted(root.rglob("*.off")), 2):
            mesh.write_text(TETRAHEDRON.format(1).replace("1 0 0\n0 1", f"{size} 0 0\n0 1", 1))
        shutil.copy(root / "ant/train/ant_0001.off", root / "ant/test/copy.OFF")
        expected = r"1 of 5 test clouds are also among the training clouds: ant/test/copy = ant/train/ant_0001;"
    else:
        root.mkdir()
        content = arrays()
        content["test_points"][4] = content["train_points"][7]
        root = write(root / "clouds.npz", content)
        expected = r"1 of 6 test clouds are also among the training clouds: test/4 = train/7;"
    with pytest.warns(UserWarning, match=expected):
        ready(root)


def write_clouds(folder: Path, places: list[str]) -> Path:
    """Write clouds of 6 to 8 points with normals and intensity, in text files of ten each of the places."""
    rng = np.random.default_rng(0)
    for place in places:
        for index in range(10):
            path = folder / f"{place}_{index}.CSV"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = rng.normal(size=(6 + index % 3, 7)) + 5e6 * (np.arange(7) == 0)
            np.savetxt(path, rows, delimiter=",", header="X,Y,Z,nx,ny,nz,Intensity", comments="")
    return folder


@pytest.mark.parametrize(
    ("places", "sizes"),
    [
        (["train/ant/a", "train/bee/a", "test/ant/a", "test/bee/a"], (18, 2, 20)),
        (["train/ant/a", "train/bee/a", "test/ant/a", "test/bee/a", "val/ant/a", "val/bee/a"], (20, 20, 20)),
        (["ant/a", "bee/a"], (14, 2, 4)),
        (["ant/train/a", "ant/test/a", "bee/train/a", "bee/test/a"], (18, 2, 20)),
    ],
)
def test_clouds_in_every_layout(tmp_path, places, sizes):
    module = ready(write_clouds(tmp_path, places), features=["normals", "intensity"], num_points=None)
    assert module.classes == ("ant", "bee")
    assert tuple(len(module.datasets[split]) for split in ("train", "val", "test")) == sizes
    for split, dataset in module.datasets.items():
        for name, sample in zip(module.names(split), samples(dataset), strict=True):
            assert (sample.inputs.shape[1], module.classes[sample.target] in name) == (7, True)
            rows = np.loadtxt(tmp_path / f"{name}.CSV", delimiter=",", skiprows=1)
            assert torch.allclose(sample.inputs[:, 3:], torch.from_numpy(rows[:, 3:]).float())
            # Far from the origin, where single precision has steps of a half.
            expected = rows[:, :3] - rows[:, :3].mean(0)
            assert np.allclose(sample.inputs[:, :3].numpy(), expected / expected.std(), atol=1e-4)


def test_a_list_names_files_labels_and_splits(tmp_path):
    write_clouds(tmp_path / "files", ["a"])
    rows = [
        f"files/a_{index}.CSV,{'ant' if index % 2 else 'bee'},{'test' if index > 5 else 'train'}" for index in range(10)
    ]
    path = tmp_path / "list.csv"
    path.write_text("\n".join(["path,label,split", *rows]))
    module = ready(path)
    assert module.classes == ("ant", "bee")
    assert module.names("test") == [f"files/a_{index}" for index in range(6, 10)]
    assert module.datasets["test"].targets.tolist() == [1, 0, 1, 0]
    path.write_text("\n".join(["path,label", *(row.rpartition(",")[0] for row in rows)]))
    assert len(ready(path, test_fraction=0.4).datasets["test"]) == 4
    assert ready(path, test_fraction=0.4).names("test") == ready(path, test_fraction=0.4, seed=7).names("test")
    for content, message in (
        ("file,label\nx,y", "no column path; it has file, label"),
        ("path,label\nnowhere.off,y", r"line 2: no file .*nowhere\.off"),
        ("path,label\nfiles/a_0.CSV,", "line 2: column label has no label"),
        ("path,label,split\nfiles/a_0.CSV,a,training", "line 2: split 'training'; give one of train, test, val"),
        ("path,label,split\nfiles/a_0.CSV,a,train", "no clouds of split test"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            PointClouds(path)


def test_features_that_are_missing_are_named(tmp_path):
    write_clouds(tmp_path, ["ant/a", "bee/a"])
    with pytest.raises(UserError, match=r"a_0\.CSV: no column red; beside x, y, z it has nx, ny, nz, intensity"):
        ready(tmp_path, features=["colours"])
    for features in (["x"], ["nx", "normals"], ["Intensity"]):
        with pytest.raises(UserError, match=r"data\.features is .*: give each once, in small letters"):
            PointClouds(tmp_path, features=features)
    with pytest.raises(UserError, match=r"data\.test_fraction is 1: give a share"):
        PointClouds(tmp_path, test_fraction=1)
    assert PointClouds(tmp_path, num_points=4096).num_points == 4096


def test_columns_of_arrays_are_features_by_name_or_number(tmp_path):
    content = arrays()
    for part in ("train", "test"):
        points = content[f"{part}_points"]
        content[f"{part}_points"] = np.concatenate([points, points[:, :, :1] ** 2], axis=2)
    path = write(tmp_path / "clouds.npz", content)
    for arguments in ({"features": ["4"]}, {"features": ["intensity"], "columns": ["x", "y", "z", "intensity"]}):
        inputs = ready(path, standardize=False, **arguments).datasets["test"][0].inputs
        assert inputs.shape == (20, 4)
        assert torch.allclose(inputs[:, 3], inputs[:, 0] ** 2)
    assert ready(path).datasets["test"][0].inputs.shape == (20, 3)
    with pytest.raises(UserError, match=r"no column normal; it has x, y, z, 4: name them by data\.columns"):
        ready(path, features=["normal"])


def test_a_root_without_data_is_refused_with_the_layout(tmp_path):
    with pytest.raises(UserError, match="no clouds; expected <class>/train"):
        PointClouds(tmp_path)
    (tmp_path / "ant").mkdir()
    with pytest.raises(UserError, match="no clouds; expected <class>/train"):
        PointClouds(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        PointClouds(tmp_path / "absent")
    (tmp_path / "clouds.rar").write_text("")
    with pytest.raises(UserError, match=r"not one of \.npz"):
        PointClouds(tmp_path / "clouds.rar")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_part_without_meshes_is_named_before_points_are_drawn(tmp_path, part):
    root = write_meshes(tmp_path / "meshes", **{part: 0})
    with pytest.raises(UserError, match=f"{root}: no clouds of part {part}; put some there"):
        ready(root, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_places_are_ambiguous_unless_one_is_asked_for(tmp_path):
    write_meshes(tmp_path / "ModelNet10")
    write_meshes(tmp_path / "ModelNet40", ("x", "y", "z"))
    with pytest.raises(UserError, match="give one of them as root"):
        PointClouds(tmp_path)
    assert PointClouds(tmp_path, download="ModelNet40").classes == ("x", "y", "z")


def test_the_pool_has_to_hold_the_points_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"data\.num_points is 65: give at most data\.pool_size, 64"):
        PointClouds(write_meshes(tmp_path), num_points=65, pool_size=64)
    with pytest.raises(UserError, match=r"data\.pool_size is 1"):
        PointClouds(tmp_path, pool_size=1)


@pytest.mark.slow
def test_real_meshes_from_the_official_archive(tmp_path, real_data):
    shutil.copy(real_data / "ModelNet10.zip", tmp_path)
    root, run = tmp_path / "root", tmp_path / "run"
    shutil.unpack_archive(tmp_path / "ModelNet10.zip", root)
    first = ready(root, run=run, pool_size=256, num_points=128)
    assert first.classes == MODELNET_CLASSES["ModelNet10"]
    assert len(first.datasets["train"]) + len(first.datasets["val"]) == 160
    assert len(first.datasets["test"]) == 40
    assert first.names("test") == sorted(first.names("test"))
    (root / "ModelNet10").rename(root / "raw")
    second = ready(root, run=run, pool_size=256, num_points=128)
    assert same(first, second)
    assert len(list((run / "cache").iterdir())) == 1


# Download


def archive(classes: tuple[str, ...] = MODELNET_CLASSES["ModelNet10"], extra: str | None = None) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name in classes:
            for part in ("train", "test"):
                for index in range(3):
                    member = f"ModelNet10/{name}/{part}/{name}_{index}.off"
                    # A plain name would have the time of now, and the archive another checksum when the clock ticks.
                    file.writestr(zipfile.ZipInfo(member), TETRAHEDRON.format(1))
        for member in ["__MACOSX/ModelNet10/._x"] + [extra] * bool(extra):
            file.writestr(zipfile.ZipInfo(member), "")
    return packed.getvalue()


@pytest.fixture
def local_network(tmp_path, monkeypatch):
    """Serve ModelNet's address from a folder: address and checksum are all that is not real here."""
    (tmp_path / "server").mkdir()
    path = tmp_path / "server" / "ModelNet10.zip"
    monkeypatch.setitem(modelnet.URLS, "ModelNet10", path.as_uri())
    expect(monkeypatch, archive())
    return path


def expect(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setitem(modelnet.CHECKSUMS, "ModelNet10", f"sha256:{hashlib.sha256(content).hexdigest()}")


def test_download_fetches_once_into_an_empty_root(tmp_path, local_network):
    local_network.write_bytes(archive())
    root = tmp_path / "root"
    module = PointClouds(root, download="ModelNet10", pool_size=16)
    assert module.classes == MODELNET_CLASSES["ModelNet10"]
    assert not root.exists()
    module.prepare_data()
    module.setup()
    assert len(module.datasets["test"]) == 30
    assert [path.name for path in root.iterdir()] == ["ModelNet10"]
    local_network.unlink()
    again = ready(root, download="ModelNet10", pool_size=16)
    assert same(module, again)


def test_an_archive_that_lies_ready_needs_no_network(tmp_path, local_network):
    root = tmp_path / "root"
    root.mkdir()
    (root / "ModelNet10.zip").write_bytes(archive())
    assert len(ready(root, download="ModelNet10", pool_size=16).datasets["test"]) == 30


def test_without_network_the_message_says_what_to_put_where(tmp_path, local_network):
    root = tmp_path / "root"
    with pytest.raises(UserError) as error:
        PointClouds(root, download="ModelNet10").prepare_data()
    assert f"{root}: cannot fetch" in str(error.value)
    assert "\n" not in str(error.value)
    assert f"put {local_network.as_uri()} there as ModelNet10.zip" in str(error.value)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "known", "message"),
    [
        (b"<html>not found</html>", False, r"ModelNet10.zip: its SHA256 is .*; put .* there, or unpack it"),
        (archive()[:-300], False, r"ModelNet10.zip: its SHA256 is .*: damaged or incomplete"),
        (b"<html>not found</html>", True, "not a complete archive"),
        (archive()[:-300], True, "not a complete archive"),
        (archive(extra="ModelNet10/../../escaped"), True, "members outside its folder"),
        (archive(classes=()), True, "no folder ModelNet10"),
    ],
)
def test_a_bad_archive_leaves_no_folder(tmp_path, local_network, monkeypatch, content, known, message):
    root = tmp_path / "root"
    root.mkdir()
    if known:
        expect(monkeypatch, content)
    (root / "ModelNet10.zip").write_bytes(content)
    with pytest.raises(UserError, match=message):
        PointClouds(root, download="ModelNet10").prepare_data()
    assert [path.name for path in root.iterdir()] == ["ModelNet10.zip"]
    assert not (tmp_path / "escaped").exists()


def test_an_encrypted_archive_is_refused(tmp_path, local_network, monkeypatch):
    content = bytearray(archive())
    content[6] |= 1
    content[content.find(b"PK\x01\x02") + 8] |= 1
    local_network.write_bytes(content)
    expect(monkeypatch, bytes(content))
    with pytest.raises(UserError, match=r"ModelNet10.zip: not a complete archive \(.*encrypted"):
        PointClouds(tmp_path / "root", download="ModelNet10").prepare_data()
    assert list((tmp_path / "root").iterdir()) == []


def test_a_root_that_cannot_be_written_is_said_to_be_so(here, refused):
    module = PointClouds(here / "root", download="ModelNet10")
    module.root.mkdir()
    with refused(module.root), pytest.raises(UserError, match=r"^root: can't be .* \(Permission denied\)"):
        module.prepare_data()
    module.root = Path("/proc/nowhere")
    with pytest.raises(UserError, match=r"^/proc/nowhere: can't be written \(.*\); give another data.root"):
        module.prepare_data()


def test_a_download_cut_off_leaves_nothing(tmp_path, local_network):
    local_network.write_bytes(archive()[:-300])
    with pytest.raises(UserError, match=r"ModelNet10.zip: its SHA256 is .*; try again, or put it there as .*root"):
        PointClouds(tmp_path / "root", download="ModelNet10").prepare_data()
    assert list((tmp_path / "root").iterdir()) == []


def test_an_archive_of_other_classes_is_refused(tmp_path, local_network, monkeypatch):
    root = tmp_path / "root"
    expect(monkeypatch, archive(classes=("ant", "cube")))
    local_network.write_bytes(archive(classes=("ant", "cube")))
    with pytest.raises(UserError, match="expected clouds of bathtub"):
        ready(root, download="ModelNet10")


def test_classes_of_modelnet():
    assert {name: len(classes) for name, classes in MODELNET_CLASSES.items()} == {"ModelNet10": 10, "ModelNet40": 40}
    for classes in MODELNET_CLASSES.values():
        assert list(classes) == sorted(set(classes))


# Arrays


def arrays(count: int = 12, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    result: dict[str, np.ndarray] = {"classes": np.array(["ant", "bee", "cow"])}
    for part, number in (("train", count), ("test", 6)):
        points = rng.uniform(-1, 1, (number, 20, 3))
        if np.dtype(dtype).kind in "iu":
            points = points * np.iinfo(dtype).max
        result[f"{part}_points"] = points.astype(dtype)
        result[f"{part}_label"] = (np.arange(number) % 3).astype(np.int8)
    return result


PUBLISHED = {
    "train_points": "tr_cloud", "train_label": "tr_label", "test_points": "test_cloud", "test_label": "test_label"
}  # fmt: skip


def write(path: Path, content: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, allow_pickle=True, **content)
    else:
        with h5py.File(path, "w") as file:
            for name, array in content.items():
                file[name] = array.astype("S") if array.dtype.kind == "U" else array
    return path


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".hdf5"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int16", "int8", "int32"])
def test_arrays_come_back(tmp_path, suffix, dtype):
    content = arrays(dtype=dtype)
    module = ready(write(tmp_path / f"clouds{suffix}", content), standardize=False)
    assert module.classes == ("ant", "bee", "cow")
    scale = np.iinfo(dtype).max if dtype.startswith("int") else 1
    for split, dataset in module.datasets.items():
        for name, sample in zip(module.names(split), samples(dataset), strict=True):
            part, index = name.split("/")
            expected = torch.from_numpy(content[f"{part}_points"][int(index)].astype(np.float32) / np.float32(scale))
            assert sample.inputs.dtype == torch.float32
            torch.testing.assert_close(sample.inputs, expected)
            assert sample.target == content[f"{part}_label"][int(index)]
    assert module.names("test") == [f"test/{index}" for index in range(6)]
    assert len(module.datasets["train"]) + len(module.datasets["val"]) == 12


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize("plural", [False, True])
def test_published_names_are_read_and_classes_are_numbered(tmp_path, suffix, plural):
    content = {PUBLISHED[name]: array for name, array in arrays().items() if name != "classes"}
    if plural:
        content = {name.replace("label", "labels"): array for name, array in content.items()}
    content = {name: array[:, None] if "label" in name else array for name, array in content.items()}
    module = ready(write(tmp_path / f"clouds{suffix}", content))
    assert module.classes == ("0", "1", "2")
    assert module.datasets["test"].targets.tolist() == [0, 1, 2, 0, 1, 2]


def change(**changes: Any) -> dict[str, np.ndarray]:
    return {name: array for name, array in (arrays() | changes).items() if array is not None}


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (change(train_points=None), "no array train_points or tr_cloud; it has classes"),
        (change(test_label=None), "no array test_label"),
        (change(test_points=np.zeros((6, 20, 2), np.float32)), r"test points are float32 \(6, 20, 2\)"),
        (change(test_points=np.zeros((6, 60), np.float32)), r"test points are float32 \(6, 60\)"),
        (change(test_points=np.zeros((6, 20, 3), bool)), "test points are bool"),
        (change(test_points=np.zeros((5, 20, 3), np.float32)), "5 test clouds but 6 labels"),
        (change(test_label=np.zeros(6)), "test labels are float64"),
        (change(test_label=np.zeros((6, 2), int)), r"test labels are int64 \(6, 2\)"),
        (change(test_label=np.full(6, -1)), "test label -1"),
        (change(test_label=np.full(6, 3)), "label 3 for 3 classes"),
        (change(test_label=np.full(6, 2**64 - 1, np.uint64)), "test label 18446744073709551615; labels start at 0"),
        (change(classes=np.array([b"ant", b"\xff", b"cow"])), r"class name b'\\xff' isn't UTF-8"),
        (change(classes=np.array([f"class {number}" for number in range(13)])), "13 classes for 12 training clouds"),
        (change(test_label=np.full(6, 10**12), classes=None), "there is a label 1000000000000, but no label"),
        (
            change(classes=np.array(["ant"]), train_label=np.zeros(12, int), test_label=np.zeros(6, int)),
            "one class, ant",
        ),
        (
            change(test_points=np.zeros((0, 20, 3)), test_label=np.zeros(0, int)),
            r"clouds\..*: it has no test clouds; give",
        ),
        (change(test_points=np.full((6, 20, 3), np.nan, np.float32)), r"clouds\..*: cloud test/0 has coordinates"),
        (change(test_points=np.zeros((6, 20, 3), np.int16)), "cloud test/0 has all its points in one place"),
    ],
)
def test_unsound_arrays_are_refused(tmp_path, suffix, content, message):
    path = write(tmp_path / f"clouds{suffix}", content)
    with pytest.raises(UserError, match=message) as error:
        ready(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_files_that_are_none_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"clouds{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: cannot be read"):
        PointClouds(path)


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_a_file_cut_off_is_refused(tmp_path, suffix):
    path = write(tmp_path / f"clouds{suffix}", arrays(200))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=f"{path}: cannot be read"):
        ready(path)


def header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text


@pytest.mark.parametrize(
    ("points", "flag", "compression"),
    [
        (header("(1000000000, 3000, 3)"), 0, 0),
        (b"\x93NUMPY\x02\x00" + (9000).to_bytes(4, "little") + b"(" * 8999 + b"\n", 0, 0),
        (header("(12, 20, 3)") + bytes(12 * 20 * 3 * 4), 1, 0),
        (header("(12, 20, 3)") + bytes(12 * 20 * 3 * 4), 0, 99),
    ],
    ids=["terabytes", "nested", "encrypted", "compressed otherwise"],
)
def test_an_npz_that_numpy_cannot_read_is_named(tmp_path, points, flag, compression):
    path = write(tmp_path / "clouds.npz", change(train_points=None))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("train_points.npy", points)
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.rfind(signature)
        content[place + flags] |= flag
        content[place + flags + 2] = compression
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: (array train_points )?cannot be read") as error:
        ready(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", [h5py.SoftLink("/nowhere"), h5py.ExternalLink("nowhere.h5", "/x"), h5py.Empty("f4")])
def test_an_hdf5_file_without_its_points_is_named(tmp_path, target):
    path = write(tmp_path / "clouds.h5", change(train_points=None))
    with h5py.File(path, "a") as file:
        file["train_points"] = target
    with pytest.raises(UserError, match=f"^{path}: cannot be read"):
        ready(path)


def test_an_hdf5_file_that_declares_terabytes_is_named(tmp_path):
    path = write(tmp_path / "clouds.h5", change(train_points=None))
    with h5py.File(path, "a") as file:
        file.create_dataset("train_points", (10**9, 3000, 3), dtype="f4", chunks=(1, 3000, 3))
    with pytest.raises(UserError, match=f"^{path}: cannot be read"):
        ready(path)


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_a_file_that_may_not_be_read_is_not_called_broken(here, refused, suffix):
    path = write(here / f"clouds{suffix}", arrays())
    ready(path)
    with refused(path), pytest.raises(UserError, match=rf"^{path}: can't be read \(Permission denied\)"):
        ready(path)


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_a_file_of_clouds_with_fewer_points_than_asked_for_is_refused(tmp_path, suffix):
    path = write(tmp_path / f"clouds{suffix}", arrays())
    with pytest.raises(
        UserError, match=r"cloud train/0 has 20 points; remove it or set data\.num_points to 20 or less"
    ):
        ready(path, num_points=21)
    assert len(ready(path, num_points=20).datasets["train"][0].inputs) == 20


def test_pickled_objects_are_refused_and_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    for name in ("test_label", "classes"):
        content = change(**{name: np.array([Payload()], dtype=object)})
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            PointClouds(write(tmp_path / "clouds.npz", content))
    assert not (tmp_path / "ran").exists()


def test_without_h5py_the_message_names_the_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "clouds.h5", arrays())
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"HDF5 files need h5py: pip install 'sinkformer_pl\[hdf5\]'"):
        PointClouds(path)


def test_real_clouds(real_data):
    module = ready(real_data / "modelnet10_clouds.npz", num_points=128, batch_size=32)
    assert module.classes == MODELNET_CLASSES["ModelNet10"]
    sizes = {split: len(dataset) for split, dataset in module.datasets.items()}
    assert sizes["test"] == 726
    assert sizes["train"] + sizes["val"] == 3200
    assert sizes["val"] == 320
    batch = next(iter(module.train_dataloader()))
    assert batch.inputs.shape == (32, 128, 3)
    assert batch.mask is None
