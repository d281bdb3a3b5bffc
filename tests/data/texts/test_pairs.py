"""Pairs of texts, and tokenizers of one's own."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sinkformer_pl.data import TextTable, read_learnt
from sinkformer_pl.errors import UserError

COLUMNS = ["premise", "hypothesis"]


def rows(count: int) -> list[tuple[str, str, str]]:
    """Return pairs whose texts are equal or not."""
    words = ["a red house", "two dogs run", "the sea is calm", "nobody knows"]
    return [
        (f"{words[i % 4]} {i}", f"{words[(i if i % 2 else i + 1) % 4]} {i}", "same" if i % 2 else "other")
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, count in (("train", 40), ("test", 8)):
        with (tmp_path / f"{part}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([(*COLUMNS, "label"), *rows(count)])
    return tmp_path


def ready(root: Path, **kwargs: Any) -> TextTable:
    given = {"vocab_size": 300, "max_length": 24, "text_columns": COLUMNS}
    module = TextTable(root, **given | kwargs)
    module.setup()
    return module


def test_a_pair_is_its_texts_with_a_separator_between_them(folder):
    data = ready(folder, max_length=100)
    separator = data.tokenizer.token_to_id("[SEP]")
    assert separator == 1
    for split, dataset in data.datasets.items():
        for place, pair in enumerate(dataset.texts):
            tokens = dataset[place].inputs.tolist()
            assert tokens.count(separator) == 1
            middle = tokens.index(separator)
            for text, part in zip(pair, (tokens[:middle], tokens[middle + 1 :]), strict=True):
                assert part == data.tokenizer.encode(text).ids, split
    swapped = ready(folder, max_length=100, text_columns=COLUMNS[::-1])
    assert swapped.datasets["test"].texts == [pair[::-1] for pair in data.datasets["test"].texts]


def test_of_a_pair_that_is_too_long_the_longer_text_is_cut(folder):
    data = ready(folder, max_length=12)
    tokens = data.preprocessing(("dogs", "the sea is calm " * 50)).tolist()
    short = data.tokenizer.encode("dogs").ids
    assert len(tokens) == 12
    assert tokens[: len(short) + 1] == [*short, 1]
    tokens = data.preprocessing(("the sea is calm " * 50, "nobody knows " * 50)).tolist()
    assert len(tokens) == 12
    assert 5 <= tokens.index(1) <= 6


def test_no_pair_is_in_two_parts_of_the_training_and_equal_texts_are_other_pairs(folder):
    with (folder / "train.csv").open("a", newline="") as file:
        csv.writer(file).writerows(rows(40))
    with pytest.warns(UserWarning, match=r"\d of 8 test texts are also among the training texts"):
        data = ready(folder)
    assert not set(data.datasets["train"].texts) & set(data.datasets["val"].texts)
    assert len(data.datasets["train"]) + len(data.datasets["val"]) == 80


def test_a_checkpoint_knows_that_it_is_of_pairs(folder):
    data = ready(folder)
    checkpoint = {"TextTable": data.state_dict()}
    learnt = read_learnt(checkpoint).preprocessing
    pair = data.datasets["test"].texts[0]
    assert torch.equal(learnt(pair), data.datasets["test"][0].inputs)
    single = TextTable(folder, text="premise", vocab_size=300)
    with pytest.raises(UserError, match=r"data\.text_columns: the checkpoint's model takes pairs of texts; give two"):
        single.restore(checkpoint)
    single.setup()
    with pytest.raises(UserError, match=r"data\.text_columns: the checkpoint's model takes single texts; leave it out"):
        ready(folder).restore({"TextTable": single.state_dict()})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_columns": ["premise"]}, r"data\.text_columns is \['premise'\]: give two columns"),
        ({"text_columns": ["premise", "premise"]}, "give two columns"),
        ({"text_columns": ["premise", "label"]}, r"data\.text_columns and data\.label are both label"),
        ({"text_columns": ["premise", "answer"]}, r"train\.csv, line 1: no column answer; it has premise, hypothesis"),
        ({"text": "premise"}, r"data\.text is premise, and data\.text_columns are given, too"),
        ({"max_length": 2}, r"data\.max_length is 2: give 3 or more"),
        ({"vocab_size": 257}, r"data\.vocab_size is 257: give 258 to"),
    ],
)
def test_arguments_of_pairs_that_make_no_sense_are_refused(folder, arguments, message):
    with pytest.raises(UserError, match=message):
        ready(folder, **arguments)


def test_a_pair_with_an_empty_text_is_named(folder):
    with (folder / "train.csv").open("a") as file:
        file.write('words,"  ",same\n')
    with pytest.raises(UserError, match=r"train\.csv:42 has an empty text; fill or remove it"):
        ready(folder)


# Tokenizers of one's own


def own(path: Path, **changes: Any) -> Path:
    """Write a tokenizer of words, as BERT's: [CLS] a [SEP] b [SEP]; with a truncation and padding of its own."""
    known = ("a", "red", "house", "two", "dogs", "run", "the", "sea", "is", "calm", "nobody", "knows")
    words = ["[UNK]", "[CLS]", "[SEP]", *known]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, **changes))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_of_ones_own_is_used_as_it_is_but_for_its_cut_and_padding(folder):
    path = own(folder / "tokenizer.json", unk_token="[UNK]")
    data = ready(folder, tokenizer=path)
    reference = Tokenizer.from_file(str(path))
    reference.no_truncation()
    reference.no_padding()
    for place, pair in enumerate(data.datasets["test"].texts):
        assert data.datasets["test"][place].inputs.tolist() == reference.encode(*pair).ids
    cut = ready(folder, tokenizer=path, max_length=6, text_columns=None, text="premise")
    tokens = cut.preprocessing("the sea is calm and nobody knows").tolist()
    assert tokens == [1, *reference.encode("the sea is calm", add_special_tokens=False).ids, 2]
    assert cut.preprocessing("[SEP]").tolist().count(2) == 1
    # The file may be gone where the checkpoint is used.
    path.rename(folder / "gone.json")
    moved = TextTable(folder, tokenizer=path, text_columns=COLUMNS, vocab_size=300, max_length=24)
    moved.restore({"TextTable": data.state_dict()})
    moved.setup()
    assert torch.equal(moved.datasets["test"][0].inputs, data.datasets["test"][0].inputs)


def test_a_tokenizer_that_a_checkpoint_overrules_is_named(folder):
    learnt = ready(folder).state_dict()
    other = TextTable(folder, tokenizer=own(folder / "x.json", unk_token="[UNK]"), text_columns=COLUMNS, vocab_size=300)
    with pytest.warns(UserWarning, match=r"data\.tokenizer .*x\.json is another than the checkpoint's, which is used"):
        other.restore({"TextTable": learnt})


def test_a_tokenizer_that_cannot_be_used_is_one_line(folder):
    path = own(folder / "tokenizer.json", unk_token="[UNK]")
    for arguments, message in (
        (
            {"vocab_size": 5},
            r"tokenizer\.json: it has 15 token numbers, and data\.vocab_size is 5; set .* to 15",
        ),
        ({"max_length": 4}, r"data\.max_length is 4: data\.tokenizer .* adds 3 tokens to each sample; give more"),
        ({"lowercase": True}, r"data\.lowercase is true, but data\.tokenizer decides"),
        ({"tokenizer": folder / "none.json"}, r"none\.json: no such file"),
        ({"tokenizer": folder / "train.csv"}, r"train\.csv: no tokenizer \("),
    ):
        with pytest.raises(UserError, match=message) as error:
            ready(folder, **{"tokenizer": path} | arguments)
        assert "\n" not in str(error.value)
    plain = Tokenizer.from_file(str(path))
    plain.post_processor = processors.ByteLevel()
    plain.save(str(path))
    with pytest.raises(UserError, match=r"tokenizer\.json: it puts nothing between the texts of a pair"):
        ready(folder, tokenizer=path)
    single = {"text_columns": None, "text": "premise", "tokenizer": path}
    assert (ready(folder, **single).datasets["train"][0].inputs != 1).all()
    for model, message in (
        (models.WordLevel({"sea": 0}), r"the tokenizer can't encode the texts \(.*UNK"),
        (models.BPE({"q": 0}, []), r"train\.csv:\d+: the tokenizer has no token for anything in it"),
    ):
        Tokenizer(model).save(str(path))
        data = ready(folder, **single)
        with pytest.raises(UserError, match=message):
            data.train_dataloader()
