"""Sets of images that torchvision reads."""

import gzip
import hashlib
import os
import pickle
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from sinkformer_pl.data.images.torchvision_sets import (
    CIFAR10,
    CIFAR100,
    MNIST,
    FashionMNIST,
    OxfordPets,
    TorchvisionImages,
)
from sinkformer_pl.errors import UserError

SOURCES = (MNIST, FashionMNIST, CIFAR10, CIFAR100, OxfordPets)


def ready(module: TorchvisionImages) -> TorchvisionImages:
    module.prepare_data()
    module.setup()
    return module


@pytest.mark.parametrize(("source", "classes"), list(zip(SOURCES, (10, 10, 10, 100, 37), strict=True)))
def test_classes_are_known_without_files(tmp_path, source, classes):
    module = source(tmp_path)
    assert module.num_classes == classes
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", SOURCES)
def test_without_files_the_message_says_what_to_put_where(tmp_path, source):
    with pytest.raises(UserError, match=f"{tmp_path}: {source.__name__} can't be read") as error:
        ready(source(tmp_path))
    assert "\n" not in str(error.value)
    assert f"into {tmp_path}" in str(error.value)
    assert str(error.value).endswith(", or set data.download=true")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", SOURCES)
def test_without_network_the_message_says_what_to_put_where(tmp_path, source, monkeypatch):
    # The address is the one thing that is not real here.
    nowhere = (tmp_path / "server").as_uri()
    for published in (datasets.MNIST, datasets.FashionMNIST):
        monkeypatch.setattr(published, "mirrors", [f"{nowhere}/"])
    for published in (datasets.CIFAR10, datasets.CIFAR100):
        monkeypatch.setattr(published, "url", f"{nowhere}/{published.filename}")
    pets = tuple((f"{nowhere}/{url.rpartition('/')[2]}", md5) for url, md5 in datasets.OxfordIIITPet._RESOURCES)
    monkeypatch.setattr(datasets.OxfordIIITPet, "_RESOURCES", pets)
    with pytest.raises(UserError, match=f"{source.__name__} can't be fetched .*; put .* into {tmp_path}/root") as error:
        source(tmp_path / "root", download=True).prepare_data()
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "root").iterdir())


def test_real_mnist_is_what_torchvision_reads(real_data):
    root = real_data / "torchvision"
    module = ready(MNIST(root, batch_size=1000))
    assert {split: len(dataset) for split, dataset in module.datasets.items()} == {
        "train": 4500,
        "val": 500,
        "test": 5000,
    }
    oracle = datasets.MNIST(root, train=False)
    batches = list(module.test_dataloader())
    assert torch.equal(torch.cat([batch.target for batch in batches]), oracle.targets)
    inputs = torch.cat([batch.inputs for batch in batches])
    assert inputs.shape == (5000, 1, 28, 28)
    torch.testing.assert_close(inputs * module.std + module.mean, oracle.data[:, None] / 255, atol=1e-6, rtol=0)
    train = datasets.MNIST(root, train=True)
    torch.testing.assert_close(module.mean[0], (train.data / 255).mean(), atol=0.01, rtol=0)
    torch.testing.assert_close(module.std[0], (train.data / 255).std(), atol=0.01, rtol=0)
    for split in ("train", "val"):
        numbers = [int(name.removeprefix("train/")) for name in module.names(split)]
        assert torch.equal(module.datasets[split].targets, train.targets[numbers])


def test_a_subclass_reads_the_same_files(real_data):
    class Ours(MNIST):
        pass

    assert ready(Ours(real_data / "torchvision", train_size=100)).names("test")[0].startswith("test")


def test_real_mnist_gives_the_same_epoch_for_any_number_of_workers(real_data):
    epochs = []
    for workers in (0, 2):
        module = ready(MNIST(real_data / "torchvision", train_size=500, crop_padding=2, num_workers=workers))
        epochs.append([batch.inputs for batch in module.train_dataloader()])
    assert all(map(torch.equal, *epochs))


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda content: content[:3000], r"has \d+ bytes of \w+, but its header says \d+"),
        (lambda content: content + b"x", r"has \d+ bytes of \w+, but its header says \d+"),
        (lambda content: content[:4] + bytes(12), "has no"),
        (lambda content: content[:6], "is no idx file of"),
        (lambda content: b"\0\0\x0d" + content[3:], "is no idx file of"),
        (lambda content: b"<html>" * 100, "is no idx file of"),
        (lambda content: b"", "is no idx file of"),
        (gzip.compress, "is a gzip archive, not unpacked"),
    ],
)
@pytest.mark.parametrize("name", ["train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
def test_a_damaged_file_is_named_with_its_damage(tmp_path, real_data, name, damage, cause):
    shutil.copytree(real_data / "torchvision", tmp_path / "root", copy_function=shutil.copyfile)
    path = tmp_path / "root" / "MNIST" / "raw" / name
    path.parent.chmod(0o755)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        UserError, match=rf"{tmp_path}/root: MNIST can't be read \({name} {cause}.*put .* into {tmp_path}"
    ):
        ready(MNIST(tmp_path / "root"))


def test_a_missing_file_and_a_pipe_are_named(tmp_path, real_data):
    shutil.copytree(real_data / "torchvision", tmp_path / "root", copy_function=shutil.copyfile)
    path = tmp_path / "root" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.parent.chmod(0o755)
    path.unlink()
    for _ in range(2):
        with pytest.raises(UserError, match=r"MNIST can't be read \(no file t10k-labels-idx1-ubyte\); put"):
            ready(MNIST(tmp_path / "root"))
        if not path.exists():
            os.mkfifo(path)


@pytest.mark.parametrize("place", ["MNIST", "MNIST/raw"])
def test_a_root_too_deep_is_told_the_right_one(real_data, place):
    root = real_data / "torchvision"
    with pytest.raises(UserError, match=rf"{root}/{place}: MNIST can't be read .*; it is in {root}: give that"):
        ready(MNIST(root / place))


@pytest.fixture
def server(tmp_path, real_data, monkeypatch):
    """MNIST's server, on this machine; gives the folder of its files."""
    folder = tmp_path / "server"
    folder.mkdir()
    for path in (real_data / "torchvision" / "MNIST" / "raw").iterdir():
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sums = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in sorted(folder.iterdir())]
    monkeypatch.setattr(datasets.MNIST, "resources", sums)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    yield folder
    server.shutdown()
    server.server_close()


def test_what_a_killed_download_left_is_fetched_anew(tmp_path, server, monkeypatch):
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in server.iterdir():
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes())[:2000])
    module = ready(MNIST(tmp_path / "root", download=True))
    assert len(module.datasets["test"]) == 5000
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["MNIST"]
    # All is there now, so that no network is needed.
    monkeypatch.setattr(datasets.MNIST, "mirrors", [])
    MNIST(tmp_path / "root", download=True).prepare_data()


def test_a_damaged_download_is_refused_and_leaves_nothing(tmp_path, server):
    path = max(server.iterdir())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"MNIST can't be fetched .*corrupted.*; put train-images"):
        MNIST(tmp_path / "root", download=True).prepare_data()
    assert not list((tmp_path / "root").iterdir())


def test_labels_out_of_range_are_an_error(tmp_path, real_data):
    shutil.copytree(real_data / "torchvision", tmp_path / "root", copy_function=shutil.copyfile)
    path = tmp_path / "root" / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")
    with pytest.raises(UserError, match="5000 training images, 5000 labels from 0 to 11, but 10 classes"):
        ready(MNIST(tmp_path / "root"))


@pytest.mark.parametrize(
    ("source", "published", "labels"),
    [(CIFAR10, datasets.CIFAR10, "labels"), (CIFAR100, datasets.CIFAR100, "fine_labels")],
)
def test_cifar_in_its_own_format(tmp_path, monkeypatch, source, published, labels):
    rng = np.random.default_rng(0)
    folder = tmp_path / published.base_folder
    folder.mkdir()

    def write(name: str, content: dict[str, object]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def part(name: str) -> list[str]:
        count = 2 * len(source.class_names)
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return write(name, {"data": pixels, labels: [index // 2 for index in range(count)]})

    monkeypatch.setattr(published, "train_list", [part("train")])
    monkeypatch.setattr(published, "test_list", [part("test")])
    name, md5 = write("meta", {published.meta["key"]: list(source.class_names)})
    monkeypatch.setattr(published, "meta", {"filename": name, "key": published.meta["key"], "md5": md5})
    module = ready(source(tmp_path))
    oracle = published(tmp_path, train=False)
    for index in (0, 3, len(oracle) - 1):
        sample, (image, target) = module.datasets["test"][index], oracle[index]
        assert sample.target == target
        expected = torch.from_numpy(np.array(image) / np.float32(255)).permute(2, 0, 1)
        shown = sample.inputs * module.std[:, None, None] + module.mean[:, None, None]
        torch.testing.assert_close(shown, expected, atol=1e-5, rtol=0)
    (folder / "test").write_bytes(b"")
    with pytest.raises(UserError, match=f"{source.__name__} can't be read .*put the folder {published.base_folder}"):
        ready(source(tmp_path))


def write_pets(root: Path) -> Path:
    """Write the layout of the archives: two images a class in each part."""
    folder = root / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    rng = np.random.default_rng(0)
    for part in ("trainval", "test"):
        lines = []
        for index, name in enumerate(OxfordPets.class_names):
            for number in (1, 2):
                image = f"{name.replace(' ', '_')}_{part}_{number}"
                Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(
                    folder / "images" / f"{image}.jpg"
                )
                lines.append(f"{image} {index + 1} 1 1")
        (folder / "annotations" / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_pets_in_their_own_layout(tmp_path):
    module = ready(OxfordPets(write_pets(tmp_path), image_size=8, val_fraction=0.5))
    oracle = datasets.OxfordIIITPet(tmp_path, split="test")
    assert [module.datasets["test"][index].target for index in range(74)] == [oracle[index][1] for index in range(74)]
    assert module.names("test")[:2] == ["Abyssinian_test_1", "Abyssinian_test_2"]
    assert module.datasets["train"][0].inputs.shape == (3, 8, 8)
    (tmp_path / "oxford-iiit-pet" / "images" / "Pug_test_1.jpg").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"Pug_test_1\.jpg: can't be decoded"):
        ready(OxfordPets(tmp_path))
    numbered_from_zero = tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt"
    numbered_from_zero.write_text(numbered_from_zero.read_text().replace("Pug_test_1 26", "Pug_test_1 0"))
    with pytest.raises(UserError, match=r"74 test images, 74 labels from -1 to 36, but 37 classes"):
        ready(OxfordPets(tmp_path, check_files=False))
    (tmp_path / "oxford-iiit-pet" / "images" / "Pug_test_1.jpg").unlink()
    with pytest.raises(UserError, match=r"1 images are missing, such as Pug_test_1\.jpg\); put the folders"):
        ready(OxfordPets(tmp_path))
