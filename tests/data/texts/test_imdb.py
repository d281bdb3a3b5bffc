"""Film reviews: the official layout, films, the download."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from sinkformer_pl.data.texts import imdb
from sinkformer_pl.data.texts.imdb import IMDb
from sinkformer_pl.errors import UserError


@pytest.fixture(scope="module")
def reviews(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every eighth of the real reviews."""
    root = tmp_path_factory.mktemp("imdb")
    with tarfile.open(real_data / "aclImdb.tar.gz") as file:
        members = [member for member in file.getmembers() if member.isfile()]
        file.extractall(root, members[::8], filter="data")
    return root


def write(root: Path, *, films: bool = False, reviews: int = 12) -> Path:
    for part in ("train", "test"):
        for name in ("pos", "neg"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(reviews):
                (folder / f"{number}_{9 if name == 'pos' else 2}.txt").write_text(f"{part} {name} review {number}")
            if films:
                # Film k has reviews k and k + 4 and so on, good ones and bad ones.
                urls = "".join(f"http://www.imdb.com/title/tt{number % 4}/usercomments\n" for number in range(reviews))
                (root / part / f"urls_{name}.txt").write_text(urls)
    return root


def archive(path: Path, source: Path, extra: str | None = None) -> None:
    with tarfile.open(path, "w:gz") as file:
        file.add(source, "aclImdb")
        if extra is not None:
            member = tarfile.TarInfo(extra)
            member.size = 3
            file.addfile(member, io.BytesIO(b"bad"))


def test_real_reviews(reviews):
    data = IMDb(reviews, max_length=64, vocab_size=2000)
    assert data.classes == ("neg", "pos")
    data.setup()
    counts = {split: dataset.targets.bincount().tolist() for split, dataset in data.datasets.items()}
    assert sum(map(sum, counts.values())) == 750
    assert all(abs(bad - good) <= 3 for bad, good in counts.values())
    dataset = data.datasets["test"]
    for index in (0, len(dataset) - 1):
        path = reviews / "aclImdb" / f"{data.names('test')[index]}.txt"
        assert path.parent.name == data.classes[dataset.targets[index]]
        text = path.read_text(encoding="utf-8")
        assert dataset[index].inputs.tolist() == data.tokenizer.encode(text).ids[:64]
    assert data.tokenizer.get_vocab_size() == 2000


def test_reviews_of_other_names_are_counted(tmp_path):
    write(tmp_path)
    (tmp_path / "train" / "pos" / "5_9.txt").rename(tmp_path / "train" / "pos" / "5_9.TXT")
    (tmp_path / "train" / "pos" / "6_9.txt").rename(tmp_path / "train" / "pos" / "6_9.md")
    (tmp_path / "test" / "neg" / "deeper").mkdir()
    (tmp_path / "test" / "neg" / "7_2.txt").rename(tmp_path / "test" / "neg" / "deeper" / "7_2.txt")
    (tmp_path / "train" / "unsup").mkdir()
    (tmp_path / "train" / "unsup" / "0_0.txt").write_text("official, and without a label")
    data = IMDb(tmp_path)
    with pytest.warns(UserWarning, match=r"2 files are left out, the first is test/neg/deeper/7_2\.txt; reviews are"):
        data.setup()
    assert sum(map(len, data.datasets.values())) == 46


@pytest.mark.parametrize("place", ["", "aclImdb"])
def test_a_film_is_in_one_of_training_and_validation(tmp_path, place):
    write(tmp_path / place, films=True)
    data = IMDb(tmp_path, val_fraction=0.25)
    data.setup()
    films = {
        split: {int(name.split("/")[2].split("_")[0]) % 4 for name in data.names(split)} for split in ("train", "val")
    }
    assert films["train"] | films["val"] == {0, 1, 2, 3}
    assert not films["train"] & films["val"]
    assert len(data.datasets["val"]) == 6


def test_a_review_without_its_film_is_named(tmp_path):
    write(tmp_path, films=True)
    (tmp_path / "train" / "pos" / "99_9.txt").write_text("good")
    with pytest.raises(UserError, match=r"99_9.txt: no line of .*urls_pos.txt names its film"):
        IMDb(tmp_path).setup()


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no reviews; expected train/pos, .* data.download=true"):
        IMDb(tmp_path)
    with pytest.raises(UserError, match=r"absent: no such folder"):
        IMDb(tmp_path / "absent")
    write(tmp_path)
    (tmp_path / "test" / "neg" / "3_2.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"3_2.txt: not UTF-8 at byte 3"):
        IMDb(tmp_path).setup()
    (tmp_path / "test" / "neg" / "3_2.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"test/neg/3_2 is an empty text"):
        IMDb(tmp_path).setup()


@pytest.mark.parametrize("name", ["test", "test/neg", "test/neg/3_2.txt"])
def test_what_cannot_be_read_is_named_rather_than_left_out(here, refused, name):
    write(here)
    IMDb(here).setup()
    with refused(here / name), pytest.raises(UserError, match=rf"^{name}.*: can't be read \(Permission denied\)"):
        IMDb(here).setup()


def test_odd_files_and_empty_folders_are_named(tmp_path):
    write(tmp_path)
    odd = tmp_path / "test" / "neg" / "x.txt"
    os.mkfifo(odd)
    with pytest.raises(UserError, match=f"{odd}: not a regular file"):
        IMDb(tmp_path).setup()
    odd.rename(odd.with_name(os.fsdecode(b"\xff.txt")))
    with pytest.raises(UserError, match=r"test/neg/\\xff\.txt: a name that isn't UTF-8"):
        IMDb(tmp_path).setup()
    for review in (tmp_path / "test").rglob("*.txt"):
        review.unlink()
    with pytest.raises(UserError, match=f"{tmp_path}/test: no reviews in pos and neg"):
        IMDb(tmp_path).setup()


def test_an_archive_as_root_is_to_be_unpacked(tmp_path):
    archive(tmp_path / "aclImdb_v1.tar.gz", write(tmp_path / "source"))
    with pytest.raises(UserError, match=r"aclImdb_v1\.tar\.gz: a file; unpack the archive and give the folder"):
        IMDb(tmp_path / "aclImdb_v1.tar.gz")


def test_reviews_of_one_film_cannot_be_divided(tmp_path):
    write(tmp_path)
    for name in ("pos", "neg"):
        (tmp_path / "train" / f"urls_{name}.txt").write_text("film\n" * 12)
    with pytest.raises(UserError, match=f"{tmp_path}: no class has two groups, one to train and one to validate on"):
        IMDb(tmp_path).setup()


def with_checksum(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr(imdb, "CHECKSUM", f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}")


def listing(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("ready", [True, False], ids=["archive there", "download"])
def test_the_archive_is_fetched_and_unpacked_once(tmp_path, monkeypatch, ready):
    root = tmp_path / "root"
    root.mkdir()
    path = (root if ready else tmp_path) / "aclImdb_v1.tar.gz"
    archive(path, write(tmp_path / "source"))
    with_checksum(monkeypatch, path)
    monkeypatch.setattr(imdb, "URL", path.as_uri())
    data = IMDb(root, download=True)
    data.prepare_data()
    data.setup()
    assert len(data.datasets["test"]) == 24
    assert listing(root) == ["aclImdb", *["aclImdb_v1.tar.gz"] * ready]
    path.unlink()
    IMDb(root, download=True).prepare_data()


def test_without_a_network_the_file_to_put_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(imdb, "URL", (tmp_path / "absent" / "aclImdb_v1.tar.gz").as_uri())
    with pytest.raises(UserError, match=r"cannot fetch the reviews .*put file:.* there as aclImdb_v1.tar.gz"):
        IMDb(tmp_path / "root", download=True).prepare_data()
    assert listing(tmp_path / "root") == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("checksum", r"aclImdb_v1.tar.gz: its MD5 is .*damaged or incomplete; put https://ai.stanford"),
        ("escape", "cannot be unpacked .*outside"),
        ("truncated", "put https://ai.stanford"),
        ("no archive", "cannot be unpacked"),
        ("other content", "put https://ai.stanford"),
    ],
)
def test_a_bad_archive_is_refused_and_leaves_nothing(tmp_path, monkeypatch, damage, message):
    root = tmp_path / "root"
    root.mkdir()
    path = root / "aclImdb_v1.tar.gz"
    archive(path, write(tmp_path / "source"), "../outside.txt" if damage == "escape" else None)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "no archive":
        path.write_text("<html>404</html>")
    elif damage == "other content":
        with tarfile.open(path, "w:gz") as file:
            file.add(tmp_path / "source", "something")
    if damage != "checksum":
        with_checksum(monkeypatch, path)
    with pytest.raises(UserError, match=message):
        IMDb(root, download=True).prepare_data()
    assert listing(root) == ["aclImdb_v1.tar.gz"]
    assert listing(tmp_path) == ["root", "source"]
