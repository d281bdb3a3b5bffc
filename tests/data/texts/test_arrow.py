"""Texts of Parquet files and of data sets that Hugging Face's `datasets` saved."""

from pathlib import Path
from typing import Any

import pytest

from sinkformer_pl.data import TextTable
from sinkformer_pl.errors import UserError
from tests.optional import pyarrow as pa

pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["world", "sport", "art"]
TEXTS = [f"text number {number}" for number in range(24)]


def ready(root: Path, **kwargs: Any) -> TextTable:
    module = TextTable(root, **{"vocab_size": 300, "max_length": 16} | kwargs)
    module.setup()
    return module


def content(data: TextTable, *splits: str) -> set[tuple[str, str]]:
    return {
        (text, data.classes[target])
        for split in splits
        for text, target in zip(data.datasets[split].texts, data.datasets[split].targets.tolist(), strict=True)
    }


def parquet(folder: Path, labels: Any) -> Path:
    for part in ("train", "test"):
        table = pa.table({"id": range(24), "text": [f"{part} {text}" for text in TEXTS], "label": labels})
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=7)
    return folder


def test_parquet_with_numbers_or_categories_as_labels(tmp_path):
    data = ready(parquet(tmp_path, [number % 3 for number in range(24)]))
    assert data.classes == ("0", "1", "2")
    assert content(data, "train", "val") == {(f"train {text}", str(i % 3)) for i, text in enumerate(TEXTS)}
    assert data.names("test")[7] == "test.parquet:8"
    parquet(tmp_path, pa.array([NAMES[number % 3] for number in range(24)]).dictionary_encode())
    data = ready(tmp_path, text=2, label=3)
    assert data.classes == ("art", "sport", "world")
    assert content(data, "test") == {(f"test {text}", NAMES[i % 3]) for i, text in enumerate(TEXTS)}


def test_what_is_wrong_with_a_parquet_file_is_one_line(tmp_path):
    parquet(tmp_path, [*range(3)] * 7 + [0, None, 2])
    with pytest.raises(UserError, match=r"train\.parquet, row 23: column label has no label"):
        ready(tmp_path)
    with pytest.raises(UserError, match=r"train\.parquet: no column words; it has id, text, label: name"):
        ready(tmp_path, text="words")
    with pytest.raises(UserError, match=r"train\.parquet, row 1: column id has no text"):
        ready(tmp_path, text="id", classes=["0", "1", "2"])
    with pytest.raises(UserError, match=r"train\.parquet: its columns have names; leave out data\.header"):
        ready(tmp_path, header=False)
    whole = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(whole[:-40])
    with pytest.raises(UserError, match=r"train\.parquet: cannot be read \(.*give a complete \.parquet file") as error:
        ready(tmp_path)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set of three parts that the library saved, of two files the first."""
    datasets = pytest.importorskip("datasets", reason="datasets isn't installed: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("datasets") / "news"
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
    parts = {}
    for part, last in (("train", 2), ("validation", 2), ("test", -1)):
        labels = [number % 3 if number % 3 < 2 else last for number in range(24)]
        made = datasets.Dataset.from_dict({"text": [f"{part} {text}" for text in TEXTS], "label": labels}, features)
        # An order of its own, which is that of an index beside the rows until it is saved.
        parts[part] = made.select(range(23, -1, -1))
    datasets.DatasetDict(parts).save_to_disk(folder, num_shards={"train": 2, "validation": 1, "test": 1})
    assert len([*(folder / "train").glob("*.arrow")]) == 2
    datasets.DatasetDict(parts)["train"].to_parquet(folder / "other.parquet")
    return folder


def test_a_saved_data_set_is_read_by_pyarrow_alone_with_its_classes_in_their_order(saved):
    data = ready(saved, test="validation")
    assert data.classes == tuple(NAMES)
    expected = {(f"train {text}", NAMES[i % 3]) for i, text in enumerate(TEXTS)}
    assert content(data, "train", "val") == expected
    assert data.datasets["test"].texts == [f"validation {text}" for text in TEXTS[::-1]]
    assert data.names("test")[0] == "validation:1"
    data = ready(saved, val="validation", test="other.parquet", train="train")
    assert content(data, "train") == expected == content(data, "test")
    assert content(data, "val") == {(f"validation {text}", NAMES[i % 3]) for i, text in enumerate(TEXTS)}


def test_a_part_without_labels_is_said_to_have_none(saved):
    with pytest.raises(UserError, match=r"test, row 1: column label has no label"):
        ready(saved)
    with pytest.raises(UserError, match=r"news/dev: no such table; put dev\.csv there"):
        ready(saved, test="dev")
