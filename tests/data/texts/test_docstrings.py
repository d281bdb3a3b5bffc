"""The embedded texts."""

import asyncio
import importlib
import inspect
import sys
from collections import Counter

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from sinkformer_pl.data.texts.docstrings import AREAS, Docstrings
from sinkformer_pl.errors import UserError

pytestmark = pytest.mark.usefixtures("documentation_read_once")


@pytest.fixture(scope="module")
def data() -> Docstrings:
    data = Docstrings()
    data.setup()
    return data


def modules(data: Docstrings, split: str) -> set[str]:
    return {name.split(":")[0] for name in data.names(split)}


def test_strings_are_what_python_says_they_are(data):
    texts = {}
    for split, dataset in data.datasets.items():
        texts |= dict(zip(data.names(split), dataset.texts, strict=True))
    for name in ("json", "asyncio.locks", "statistics", "zipfile", "http.client"):
        if f"{name}:" in texts:
            assert texts[f"{name}:"] == inspect.getdoc(importlib.import_module(name))
    assert texts["asyncio.locks:Semaphore"] == inspect.getdoc(asyncio.Semaphore)
    assert all(len(text.split()) >= 12 for text in texts.values())


def test_classes_are_areas_and_every_split_has_each(data):
    assert data.classes == tuple(AREAS)
    for split, least in (("train", 1500), ("val", 150), ("test", 400)):
        counts = Counter(data.datasets[split].targets.tolist())
        assert sum(counts.values()) >= least
        assert len(counts) == 7
        assert max(counts.values()) < 0.3 * sum(counts.values())
    for name, target in zip(data.names("train"), data.datasets["train"].targets.tolist(), strict=True):
        assert name.split(":")[0].split(".")[0] in AREAS[data.classes[target]].split()
    listed = [name for area in AREAS.values() for name in area.split()]
    assert len(set(listed)) == len(listed)


def test_no_module_and_no_text_is_in_two_splits_and_the_test_does_not_depend_on_the_seed(data):
    other = Docstrings(seed=1)
    other.setup()
    assert other.names("test") == data.names("test")
    assert other.names("val") != data.names("val")
    for each in (data, other):
        parts = [modules(each, split) for split in ("train", "val", "test")]
        assert len(set.union(*parts)) == sum(map(len, parts))
        texts = [text for dataset in each.datasets.values() for text in dataset.texts]
        assert len(set(texts)) == len(texts)


def test_nothing_is_imported(data):
    assert "antigravity" not in sys.modules
    assert "imaplib" not in sys.modules


def test_a_linear_model_tells_the_areas_better_than_chance(data):
    train, test = data.datasets["train"], data.datasets["test"]
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LinearSVC())
    model.fit(train.texts, train.targets.numpy())
    largest = max(Counter(test.targets.tolist()).values()) / len(test)
    assert model.score(test.texts, test.targets.numpy()) > largest + 0.2


def test_a_python_without_its_sources_is_told(tmp_path):
    data = Docstrings()
    data.root = tmp_path
    with pytest.raises(UserError, match=r"0 documentation strings of 12 words or more, because Python's source files"):
        data.setup()
    with pytest.raises(UserError, match=r"data.min_words is 0"):
        Docstrings(min_words=0)
