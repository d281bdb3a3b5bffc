"""Texts from the user's files: tables with a column of labels, and files of lines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from sinkformer_pl.data.dataset import Split
from sinkformer_pl.data.labels import is_number, labels_from
from sinkformer_pl.data.source import Source
from sinkformer_pl.data.split_tables import Part, SplitTables
from sinkformer_pl.data.table import plain
from sinkformer_pl.data.texts.base import Text, TextData, Texts, read_lines
from sinkformer_pl.data.validation import warn_if_unused
from sinkformer_pl.errors import UserError

LINES_LAYOUT = "train_*, val_* and test_* (text.txt and labels.txt each) and mapping.txt"


REMEDY = "name the columns by data.text (or data.text_columns), data.label and data.group"


class TextTable(TextData):
    """Tables with a text, or a pair of texts, and its label in each row: one for each split, or a column of splits.

    `.csv`: the first row names the columns; quoted as spreadsheets do. `.tsv`: the same with tabs, in which quotes
    are letters like any other. `.jsonl`: an object in each line. `.parquet`. Or a folder that `save_to_disk` of Hugging
    Face's `datasets` wrote. Blank lines are skipped. Labels are names, without spaces around them: the classes are the
    training table's, sorted (as numbers where all are), or those of a `ClassLabel`. Words that programs write for a
    missing value, such as nan, are labels only where `classes` has them.

    Multi-label: with `separator` a cell has any number of labels (in .jsonl and .parquet also as a list), with several
    columns as `label` each is a class, 1 in the rows where it holds, else 0.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        train: str = "train",
        test: str = "test",
        val: str | None = None,
        split: str | int | None = None,
        text: str | int = "text",
        text_columns: Sequence[str | int] | None = None,
        label: str | int | Sequence[str | int] = "label",
        separator: str | None = None,
        group: str | int | None = None,
        header: bool = True,
        classes: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Learn the classes from the training table, unless they are given.

        Args:
            root: the folder of the tables; or one table, with a column of splits.
            train: name of the training table, which may lack its suffix where one file alone has that name.
            test: name of the test table.
            val: name of the validation table; None to divide validation from training.
            split: column of train, test or val, where `root` is a table; None is "split".
            text: column of the texts. This and all columns: by name, or by number from 1 on.
            text_columns: the two columns of pairs of texts, in the place of `text`.
            label: column of the labels; or several, one for each class, 1 where it holds, else 0.
            separator: what stands between the labels of a row, such as "|"; None where each row has one.
            group: column of what rows have in common; no such group is divided between training and validation.
            header: whether the first row of a .csv or .tsv file names the columns; else they are given by number.
            classes: class names, to give their order or to have more than the training table has.
            **kwargs: what `TextData` takes.

        Raises:
            UserError: a table that can't be read, a missing column, or an argument out of its range.
        """
        self.text, self.labels = str(text), labels_from(label, separator)
        self.columns = [self.text] if text_columns is None else [str(column) for column in text_columns]
        self.pair = text_columns is not None
        self.group = None if group is None else str(group)
        self._require_columns(text_columns)
        self.root = Path(root)
        self.tables = SplitTables(
            self.root, train, test, val, None if split is None else str(split), self.labels, header, REMEDY
        )
        super().__init__(self.tables.classes(self.columns) if classes is None else classes, **kwargs)
        self.multi_label = self.labels.multi_label
        if val is not None and group is not None:
            raise UserError(f"data.group is {group}, but data.val is given: nothing is left to divide; leave one out")
        if val is not None:
            warn_if_unused(self.val_fraction, f"{self.root}/{val}")

    def load(self) -> Source[Texts]:
        """Read the tables."""
        # Labels are names, so that a class that a checkpoint alone knows is one, too.
        self.found_classes = self.classes
        parts = self.tables.read(self.columns, of_training=[] if self.group is None else [self.group])
        if "val" in parts and self.group is not None:
            raise UserError(f"data.group is {self.group}, but {self.root} has a split val; leave one out")
        if "val" in parts and self.tables.single:
            warn_if_unused(self.val_fraction, f"the split val of {self.root}")
        return Source(**{split: self._texts(part, split) for split, part in parts.items()})

    def _require_columns(self, text_columns: Sequence[str | int] | None) -> None:
        if text_columns is not None and self.text != "text":
            raise UserError(f"data.text is {self.text}, and data.text_columns are given, too; leave one out")
        if self.pair and len(set(self.columns)) != 2:
            raise UserError(f"data.text_columns is {self.columns}: give two columns, such as [premise, hypothesis]")
        if both := [column for column in self.labels.columns if column in self.columns]:
            name = "text_columns" if self.pair else "text"
            raise UserError(f"data.{name} and data.label are both {both[0]}; name two columns")

    def _texts(self, part: Part, split: Split) -> Texts:
        texts: list[Text] = []
        for row in part.rows:
            cells = [row.cells[column] for column in self.columns]
            for column, cell in zip(self.columns, cells, strict=True):
                if not isinstance(cell, str):
                    raise UserError(f"{row.where}: column {column} has no text; give one or remove the line")
            texts.append((cells[0], cells[1]) if self.pair else cells[0])
        group = self.group if split == "train" else None
        return Texts(
            texts=texts,
            targets=self.labels.targets_of(part.rows, self.classes),
            names=part.names,
            groups=None if group is None else [plain(row.cells[group]).strip() for row in part.rows],
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

    def load(self) -> Source[Texts]:
        """Read the files."""
        present = {part for part in ("val", "test") if (self.root / f"{part}_text.txt").exists()}
        if not present:
            raise UserError(f"{self.root}: neither test_text.txt nor val_text.txt; expected {LINES_LAYOUT}")
        train = self._texts("train")
        if "test" not in present:
            rank_zero_warn(f"{self.root}: no test_text.txt; val_text.txt is the test, validation is part of training")
            return Source(train, test=self._texts("val"))
        if "val" in present:
            warn_if_unused(self.val_fraction, f"{self.root}/val_text.txt")
        return Source(train, test=self._texts("test"), val=self._texts("val") if "val" in present else None)

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
            if not (is_number(label) and 0 <= int(label) < len(self.found_classes)):
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
        if not (names and names[0].strip() and is_number(number)):
            raise UserError(f"{path}, line {line}: {content[:40]!r}; give a number, a tab and a class name")
        if int(number) in classes:
            raise UserError(f"{path}, line {line}: number {number} stands there twice; give each class its own")
        classes[int(number)] = names[0].strip()
    if sorted(classes) != list(range(len(classes))):
        raise UserError(f"{path}: the numbers are {sorted(classes)}; number the classes from 0 on without a gap")
    return [classes[number] for number in range(len(classes))]
