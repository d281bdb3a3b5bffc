"""Texts from the user's files: tables with a column of labels, and files of lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from sinkformer_pl.data.table import Row, label_of, plain, read_table
from sinkformer_pl.data.texts.base import TextData, Texts, TextSource, read_lines
from sinkformer_pl.data.validation import warn_if_unused
from sinkformer_pl.errors import UserError

LINES_LAYOUT = "train_*, val_* and test_* (text.txt and labels.txt each) and mapping.txt"


class TextTable(TextData):
    """Tables with a text and its label in each row, one file for each split.

    `.csv`: the first row names the columns; quoted as spreadsheets do. `.tsv`: the same with tabs, in which quotes
    are letters like any other. `.jsonl`: an object in each line. Blank lines are skipped. Labels are names, without
    spaces around them: the classes are the training table's, sorted (as numbers where all are). Words that programs
    write for a missing value, such as nan, are labels only where `classes` has them.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train: str = "train.csv",
        test: str = "test.csv",
        val: str | None = None,
        text: str = "text",
        label: str = "label",
        group: str | None = None,
        classes: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Learn the classes from the training table, unless they are given.

        Args:
            root: the folder of the tables.
            train: name of the training table.
            test: name of the test table.
            val: name of the validation table; None to divide validation from training.
            text: column of the texts.
            label: column of the labels.
            group: column of what rows have in common; no such group is divided between training and validation.
            classes: class names, to give their order or to have more than the training table has.
            **kwargs: what `TextData` takes.

        Raises:
            UserError: a table that can't be read, a missing column, or an argument out of its range.
        """
        if text == label:
            raise UserError(f"data.text and data.label are both {text}; name two columns")
        self.root = Path(root)
        self.train, self.test, self.val = train, test, val
        self.text, self.label, self.group = text, label, group
        super().__init__(self._find_classes() if classes is None else classes, **kwargs)
        if val is not None and group is not None:
            raise UserError(f"data.group is {group}, but data.val is given: nothing is left to divide; leave one out")
        if val is not None:
            warn_if_unused(self.val_fraction, f"{self.root}/{val}")

    def load(self) -> TextSource:
        """Read the tables."""
        # Labels are names, so that a class that a checkpoint alone knows is one, too.
        self.found_classes = self.classes
        return TextSource(
            train=self._texts(self.train),
            test=self._texts(self.test),
            val=None if self.val is None else self._texts(self.val),
        )

    def _find_classes(self) -> list[str]:
        path = self.root / self.train
        rows = read_table(path, [self.text, self.label])
        labels = {label_of(row, self.label, path, None) for row in rows}
        if self.val is None and len(labels) == len(rows) > 1:
            raise UserError(
                f"{path}: column {self.label} has another label in each row, so that nothing is left for validation; "
                "give more texts, or name the column of labels by data.label"
            )
        return sorted(labels, key=int) if all(map(_is_number, labels)) else sorted(labels)

    def _texts(self, name: str) -> Texts:
        path = self.root / name
        group = self.group if name == self.train else None
        rows = read_table(path, [self.text, self.label, *([] if group is None else [group])])
        numbers = {label: number for number, label in enumerate(self.classes)}
        texts, targets = [], []
        for row in rows:
            text, label = row.cells[self.text], label_of(row, self.label, path, self.classes)
            if not isinstance(text, str):
                raise UserError(f"{path}, line {row.line}: column {self.text} has no text; give one or remove the line")
            if label not in numbers:
                raise UserError(
                    f"{path}, line {row.line}: column {self.label} has {label!r}, which is no class; the classes are "
                    f"{', '.join(self.classes[:10])}{', ...' if self.num_classes > 10 else ''}: correct it, or give "
                    "data.classes"
                )
            texts.append(text)
            targets.append(numbers[label])
        self._warn_of_spaces(rows, path)
        return Texts(
            texts=texts,
            targets=torch.tensor(targets, dtype=torch.int64),
            names=[f"{name}:{row.line}" for row in rows],
            groups=None if group is None else [plain(row.cells[group]).strip() for row in rows],
        )

    def _warn_of_spaces(self, rows: Sequence[Row], path: Path) -> None:
        cells = [(row.line, row.cells[self.label]) for row in rows if isinstance(row.cells[self.label], str)]
        spaced = [(line, cell) for line, cell in cells if cell != cell.strip()]
        if spaced:
            line, cell = spaced[0]
            rank_zero_warn(
                f"{path}: {len(spaced)} of {len(rows)} labels have spaces around them, the first is {cell!r} in line "
                f"{line}; they are left out"
            )


class TextLines(TextData):
    """Files of lines in the layout of TweetEval.

    `mapping.txt` has a number, a tab and a class name in each line; `train_text.txt` a text in each line, and
    `train_labels.txt` its class's number; `val_*` and `test_*` the same. Without `val_*`, validation is divided from
    training; without `test_*`, `val_*` is the test, and validation is divided from training.
    """

    def __init__(self, root: str | Path, **kwargs: Any) -> None:
        """Read the class names.

        Args:
            root: the folder.
            **kwargs: what `TextData` takes.

        Raises:
            UserError: files that are missing or broken, or an argument out of its range.
        """
        self.root = Path(root)
        super().__init__(_read_mapping(self.root / "mapping.txt"), **kwargs)

    def load(self) -> TextSource:
        """Read the files."""
        present = {part for part in ("val", "test") if (self.root / f"{part}_text.txt").exists()}
        if not present:
            raise UserError(f"{self.root}: neither test_text.txt nor val_text.txt; expected {LINES_LAYOUT}")
        train = self._texts("train")
        if "test" not in present:
            rank_zero_warn(f"{self.root}: no test_text.txt; val_text.txt is the test, validation is part of training")
            return TextSource(train, test=self._texts("val"))
        if "val" in present:
            warn_if_unused(self.val_fraction, f"{self.root}/val_text.txt")
        return TextSource(train, test=self._texts("test"), val=self._texts("val") if "val" in present else None)

    def _texts(self, part: str) -> Texts:
        text_path, label_path = self.root / f"{part}_text.txt", self.root / f"{part}_labels.txt"
        texts, labels = read_lines(text_path), read_lines(label_path)
        if not texts and not labels:
            raise UserError(f"{text_path}: no texts; give one a line")
        if len(texts) != len(labels):
            longer = text_path if len(texts) > len(labels) else label_path
            raise UserError(
                f"{text_path} has {len(texts)} lines and {label_path.name} {len(labels)}: line "
                f"{min(len(texts), len(labels)) + 1} of {longer.name} has no counterpart; give each text one label"
            )
        targets = []
        for line, label in enumerate(labels, 1):
            if not (_is_number(label) and 0 <= int(label) < len(self.found_classes)):
                raise UserError(
                    f"{label_path}, line {line}: label {label[:40]!r}; give a number of mapping.txt, "
                    f"0 to {len(self.found_classes) - 1}"
                )
            targets.append(int(label))
        names = [f"{text_path.name}:{line}" for line in range(1, len(texts) + 1)]
        return Texts(texts, torch.tensor(targets, dtype=torch.int64), names)


def _read_mapping(path: Path) -> list[str]:
    classes: dict[int, str] = {}
    for line, content in enumerate(read_lines(path), 1):
        number, *names = content.split("\t")
        if not (names and names[0].strip() and _is_number(number)):
            raise UserError(f"{path}, line {line}: {content[:40]!r}; give a number, a tab and a class name")
        if int(number) in classes:
            raise UserError(f"{path}, line {line}: number {number} stands there twice; give each class its own")
        classes[int(number)] = names[0].strip()
    if sorted(classes) != list(range(len(classes))):
        raise UserError(f"{path}: the numbers are {sorted(classes)}; number the classes from 0 on without a gap")
    return [classes[number] for number in range(len(classes))]


def _is_number(label: str) -> bool:
    # Python refuses to read a number of thousands of digits.
    return label.strip().removeprefix("-").isdecimal() and label.isascii() and len(label) < 19
