"""Texts from tables and files of lines."""

import csv
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from sinkformer_pl.data.texts.files import TextLines, TextTable
from sinkformer_pl.errors import UserError

ROWS = [
    ("good, very good", "pos", "film 1"),
    ('she said "no"', "neg", "film 1"),
    ("two\nlines", "pos", "film 2"),
    ("tab\tinside", "neg", "film 2"),
    ("ein schöner Film", "pos", "film 3"),
    ("bad", "neg", "film 3"),
    ("fine", "pos", "film 4"),
    ("awful", "neg", "film 5"),
]


def write_csv(path: Path, rows: list[tuple[Any, ...]], header: tuple[str, ...] = ("text", "label", "film")) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def tables(folder: Path) -> Path:
    write_csv(folder / "train.csv", ROWS)
    write_csv(folder / "test.csv", [("splendid", "pos", "x"), ("dull", "neg", "x")])
    return folder


def ready(data: Any) -> Any:
    data.setup()
    return data


def content(data: Any, *splits: str) -> set[tuple[str, str]]:
    return {
        (text, data.classes[target])
        for split in splits
        for text, target in zip(data.datasets[split].texts, data.datasets[split].targets.tolist(), strict=True)
    }


def test_csv_with_quotes_commas_and_newlines(tmp_path):
    data = ready(TextTable(tables(tmp_path)))
    assert data.classes == ("neg", "pos")
    assert content(data, "train", "val") == {row[:2] for row in ROWS}
    assert content(data, "test") == {("splendid", "pos"), ("dull", "neg")}
    # The name is the line on which a row begins.
    lines = (tmp_path / "train.csv").read_text().split("\n")
    for split in ("train", "val"):
        for name, text in zip(data.names(split), data.datasets[split].texts, strict=True):
            assert text.split("\n")[0][-4:].replace('"', "") in lines[int(name.split(":")[1]) - 1].replace('"', "")


def test_tsv_and_jsonl(tmp_path):
    (tmp_path / "train.tsv").write_text("label\ttext\n" + "".join(f'{i % 2}\t"word {i}\n' for i in range(8)))
    (tmp_path / "test.jsonl").write_text(
        '{"text": "x\u2028y", "label": 1}\n\n{"label": "0", "text": "z", "more": []}\n'
    )
    data = ready(TextTable(tmp_path, train="train.tsv", test="test.jsonl", val="test.jsonl"))
    with pytest.warns(UserWarning, match=r"data\.val_fraction 0\.3 counts for nothing, validation is .*/test\.jsonl"):
        TextTable(tmp_path, train="train.tsv", test="test.jsonl", val="test.jsonl", val_fraction=0.3)
    assert content(data, "train") == {(f'"word {i}', str(i % 2)) for i in range(8)}
    assert content(data, "test") == content(data, "val") == {("x\u2028y", "1"), ("z", "0")}
    assert data.names("test") == ["test.jsonl:1", "test.jsonl:3"]


def test_numbers_are_sorted_as_numbers_and_classes_can_be_given(tmp_path):
    for name in ("train.csv", "test.csv"):
        write_csv(tmp_path / name, [(f"word {i}", i % 11) for i in range(33)], ("text", "label"))
    assert TextTable(tmp_path).classes == tuple(str(i) for i in range(11))
    classes = [str(i) for i in range(11, -1, -1)]
    data = TextTable(tmp_path, classes=classes)
    with pytest.warns(UserWarning, match=r"1 of 12 classes"):
        data.setup()
    assert ("word 12", "1") in content(data, "train", "val")


def test_groups_are_not_divided(tmp_path):
    for seed in range(5):
        data = ready(TextTable(tables(tmp_path), group="film", val_fraction=0.4, seed=seed))
        films = dict((row[0], row[2]) for row in ROWS)
        train, val = ({films[text] for text in data.datasets[split].texts} for split in ("train", "val"))
        assert not train & val
    for name in ("train.csv", "test.csv"):
        write_csv(tmp_path / name, [(*row[:2], "the same") for row in ROWS])
    with pytest.raises(UserError, match=f"{tmp_path}: no class has two groups, one to train and one to validate on"):
        ready(TextTable(tmp_path, group="film"))
    with pytest.raises(UserError, match=r"data.group is film, but data.val is given"):
        TextTable(tmp_path, group="film", val="test.csv")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train.csv", "words,label\na,b\n", "train.csv, line 1: no column text; it has words, label: name the"),
        ("train.csv", "text,text,label\na,b,c\n", "line 1: more than one column text"),
        ("train.csv", "text,label\na,x\nb, c,y\n", "train.csv, line 3: 3 columns, but line 1 names 2"),
        ("train.csv", 'text,label\na,x\n"b,y\n', "train.csv, line 3: unexpected end of data; repair the row's quotes"),
        ("train.csv", "text,label\na,x\nb,\n", "train.csv, line 3: column label has no label"),
        ("train.csv", "text,label\n", "train.csv: no rows"),
        ("train.csv", "", "train.csv, line 1: no column text"),
        ("train.csv", "text,label\na,pos\nb,neg\n,neg\n", "train.csv:4 is an empty text"),
        ("test.csv", "text,label\na,pos\n\nb,so-so\n", "test.csv, line 4: column label has 'so-so', which is no class"),
        ("test.csv", "text\na\n", "test.csv, line 1: no column label"),
        ("train.txt", "text,label\na,x\n", "train.txt: not one of .csv"),
        ("train.csv", "text,label\na,x\nb, \t\n", "train.csv, line 3: column label has no label"),
        ("train.csv", "text;label\na;x\n", "line 1: no column text; it has text;label: .* separated by semicolons"),
        ("train.csv", '"text";"label"\n"a";"x"\n', "line 1: its columns are separated by semicolons; save it with"),
        ("train.csv", "text|label\na|x\n", "separated by vertical bars"),
        ("train.csv", "text\tlabel\na\tx\n", "separated by tabs; save it with commas as .csv, or with tabs as .tsv"),
        ("train.tsv", "text,label\na,x\n", "separated by commas"),
        ("train.csv", "text,label\ra,x\rb,y\r", r"train.csv: its lines end in \\r alone, as on old systems; save it"),
        ("train.tsv", "text\tlabel\ra\tx\n", r"train.tsv: its lines end in \\r alone"),
        ("train.jsonl", '{"text": "a", "label": 0}\r{"text": "b", "label": 1}', r"its lines end in \\r alone"),
        ("train.csv", "text,label\na,x\n", "one class, x; give data of two or more"),
        (
            "train.csv",
            "text,label\npos,she\nneg,told\npos,us\n",
            r"train.csv: column label has another label in each row, .* name the column of labels by data.label",
        ),
        ("train.csv", "text,label\na,pos\na,neg\na,pos\n", "no class has two different texts, one to train and one to"),
        ("train.jsonl", '{"text": "a", "label": NaN}\n', "line 1: column label has no label"),
        ("train.jsonl", '{"text": "a", "text": "b", "label": 0}\n', "line 1: no JSON .text stands 2 times in one"),
        (
            "train.jsonl",
            '{"text": "a", "label": 0}\n{"text": }\n',
            r"line 2: no JSON \(Expecting value at character 10",
        ),
        ("train.jsonl", "[1]\n", "line 1: a list; give one object a line"),
        ("train.jsonl", "[" * 100_000, "line 1: no JSON"),
        ("train.jsonl", '{"text": "a"}\n', "line 1: no column label"),
        (
            "train.jsonl",
            '{"text": 3, "label": 0}\n' + '{"text": "b", "label": 1}\n' * 2,
            "line 1: column text has no text",
        ),
        ("train.jsonl", '{"text": "a", "label": null}\n', "line 1: column label has no label"),
    ],
)
def test_a_broken_table_is_named_with_its_line(tmp_path, name, text, message):
    tables(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        ready(TextTable(tmp_path, **({"test": name} if name.startswith("test") else {"train": name})))


@pytest.mark.parametrize("label", ["nan", "NaN", "<NA>", "#N/A", "n/a", "NaT", "NULL", " nan "])
@pytest.mark.parametrize("name", ["train.csv", "test.csv", "train.jsonl"])
def test_a_word_for_no_label_is_one_only_where_it_is_said_to_be(tmp_path, name, label):
    rows = [*(row[:2] for row in ROWS), ("one more", label)]
    tables(tmp_path)
    if name == "train.jsonl":
        (tmp_path / name).write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    else:
        write_csv(tmp_path / name, rows, ("text", "label"))
    arguments = {"train": name} if name == "train.jsonl" else {}
    line = 9 if name == "train.jsonl" else 11  # a text has two lines, and there is a header
    with pytest.raises(
        UserError, match=rf"{name}, line {line}: column label has '{label.strip()}', which stands for no"
    ):
        ready(TextTable(tmp_path, **arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = ready(TextTable(tmp_path, classes=["neg", "pos", label.strip()], **arguments))
    assert ("one more", label.strip()) in content(data, "train", "val", "test")


def test_spaces_around_names_are_left_out_and_counted(tmp_path):
    tables(tmp_path)
    rows = [
        (text, f" {label}\u00a0" if place < 2 else label, f"{film} " * (place % 2) or film)
        for place, (text, label, film) in enumerate(ROWS)
    ]
    write_csv(tmp_path / "train.csv", rows, ("text ", " label", "film"))
    data = TextTable(tmp_path, group="film")
    assert data.classes == ("neg", "pos")
    with pytest.warns(
        UserWarning, match=r"train\.csv: 2 of 8 labels have spaces around them, the first is ' pos\\xa0' in"
    ):
        data.setup()
    assert content(data, "train", "val") == {row[:2] for row in ROWS}
    films = dict((row[0], row[2]) for row in ROWS)
    train, val = ({films[text] for text in data.datasets[split].texts} for split in ("train", "val"))
    assert not train & val
    (tmp_path / "train.csv").rename(tmp_path / "TRAIN.CSV")
    assert TextTable(tmp_path, train="TRAIN.CSV").classes == ("neg", "pos")


def test_one_column_cannot_be_both(tmp_path):
    with pytest.raises(UserError, match=r"data.text and data.label are both label; name two columns"):
        TextTable(tables(tmp_path), text="label")


@pytest.mark.parametrize("train", ["train.csv", "train.jsonl"])
def test_a_pipe_is_not_waited_for(tmp_path, train):
    os.mkfifo(tmp_path / train)
    with pytest.raises(UserError, match=f"{train}: not a regular file"):
        TextTable(tmp_path, train=train)


def test_a_missing_table_and_other_bytes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"train: no such table; put train\.csv there"):
        TextTable(tmp_path)
    with pytest.raises(UserError, match=r"train\.tsv: no such file"):
        TextTable(tmp_path, train="train.tsv")
    tables(tmp_path)
    (tmp_path / "test.csv").write_bytes(b"text,label\ncaf\xe9,pos\n")
    with pytest.raises(UserError, match=r"test.csv: not UTF-8 at byte 14, line 2"):
        ready(TextTable(tmp_path))


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl"])
def test_a_line_of_ten_megabytes_is_read(tmp_path, name):
    tables(tmp_path)
    text = "word " * 2_000_000
    if name == "train.jsonl":
        rows = [
            json.dumps({"text": text, "label": "pos"}),
            *(json.dumps({"text": str(i), "label": "neg"}) for i in "ab"),
        ]
    else:
        separator = "," if name == "train.csv" else "\t"
        rows = [separator.join(row) for row in (("text", "label"), (text, "pos"), ("fine", "pos"), ("a", "neg"))]
        rows.append(f"b{separator}neg")
    (tmp_path / name).write_text("\n".join(rows))
    limit = csv.field_size_limit()
    data = TextTable(tmp_path, train=name)
    assert max(map(len, data.load().train.texts)) == 10_000_000
    assert csv.field_size_limit() == limit


# Lines


def lines(folder: Path, **parts: list[tuple[str, int]]) -> Path:
    (folder / "mapping.txt").write_text("0\tneg\n1\t pos\textra\n")
    for part, rows in parts.items():
        (folder / f"{part}_text.txt").write_text("".join(f"{text}\n" for text, _ in rows), encoding="utf-8")
        (folder / f"{part}_labels.txt").write_text("".join(f"{label}\n" for _, label in rows))
    return folder


TRAIN = [(f"a tweet {number}\x85\u2028 here", number % 2) for number in range(20)]
TEST = [("good", 1), ("bad", 0)]


def test_real_tweets(real_data):
    data = TextLines(real_data / "tweeteval_emotion")
    assert data.classes == ("anger", "joy", "optimism", "sadness")
    with pytest.warns(UserWarning, match=r"no test_text.txt; val_text.txt is the test, validation is part of training"):
        data.setup()
    assert [len(data.datasets[split]) for split in ("train", "val", "test")] == [3257 - 325, 325, 374]
    folder = real_data / "tweeteval_emotion"
    labels = [int(line) for line in (folder / "val_labels.txt").read_text().split()]
    assert data.datasets["test"].targets.tolist() == labels
    last = (folder / "val_text.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")[-1]
    assert (data.names("test")[-1], data.datasets["test"].texts[-1]) == ("val_text.txt:374", last)
    shares = [torch.bincount(data.datasets[split].targets) / len(data.datasets[split]) for split in ("train", "val")]
    assert (shares[0] - shares[1]).abs().max() < 0.005


@pytest.mark.filterwarnings("error")
def test_parts_are_taken_as_they_are(tmp_path):
    data = ready(TextLines(lines(tmp_path, train=TRAIN, val=[("fine", 1), ("dull", 0)], test=TEST)))
    with pytest.warns(UserWarning, match=r"data\.val_fraction 0\.3 counts for nothing, validation is .*/val_text\.txt"):
        ready(TextLines(tmp_path, val_fraction=0.3))
    assert data.classes == ("neg", "pos")
    assert content(data, "train") == {(text, data.classes[label]) for text, label in TRAIN}
    assert content(data, "val") == {("fine", "pos"), ("dull", "neg")}
    assert content(data, "test") == {("good", "pos"), ("bad", "neg")}


def test_validation_is_divided_where_it_is_missing(tmp_path):
    data = ready(TextLines(lines(tmp_path, train=TRAIN, test=TEST)))
    assert [len(data.datasets[split]) for split in ("train", "val", "test")] == [18, 2, 2]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("test_labels.txt", "1\n2\n", "test_labels.txt, line 2: label '2'; give a number of mapping.txt, 0 to 1"),
        ("test_labels.txt", "-1\n0\n", "line 1: label '-1'"),
        ("test_labels.txt", "1\npos\n", "line 2: label 'pos'"),
        ("test_labels.txt", "1\n\n0\n", "test_labels.txt 3: line 3 of test_labels.txt has no counterpart"),
        ("test_labels.txt", "1\n", "test_text.txt has 2 lines and test_labels.txt 1: line 2 of test_text.txt has no"),
        ("test_text.txt", "good\n\n", "test_text.txt:2 is an empty text"),
        ("test_labels.txt", "1\n" + "1" * 5000 + "\n", "line 2: label '1111"),
        ("mapping.txt", "0\tneg\n" + "1" * 5000 + "\tpos\n", "mapping.txt, line 2: '1111"),
        ("mapping.txt", "0\tneg\n2\tpos\n", r"mapping.txt: the numbers are \[0, 2\]"),
        ("mapping.txt", "0\tneg\n0\tpos\n", "line 2: number 0 stands there twice"),
        ("mapping.txt", "neg\n", "mapping.txt, line 1: 'neg'; give a number, a tab and a class name"),
        ("mapping.txt", "0\tneg\r1\tpos\r", r"mapping.txt: its lines end in \\r alone, as on old systems; save it"),
    ],
)
def test_broken_lines_are_named(tmp_path, name, text, message):
    lines(tmp_path, train=TRAIN, test=TEST)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        ready(TextLines(tmp_path))


def test_a_part_without_texts_is_named(tmp_path):
    with pytest.raises(UserError, match=r"train_text\.txt: no texts; give one a line"):
        ready(TextLines(lines(tmp_path, train=[], test=TEST)))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"mapping.txt: no such file"):
        TextLines(tmp_path)
    with pytest.raises(UserError, match=r"neither test_text.txt nor val_text.txt; expected train_"):
        ready(TextLines(lines(tmp_path, train=TRAIN)))
