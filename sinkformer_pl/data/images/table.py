"""Images of the user's own: tables with the path of a file and its label in each row."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sinkformer_pl.data.dataset import Split
from sinkformer_pl.data.images.base import ImageData, Images
from sinkformer_pl.data.images.decoding import check_images
from sinkformer_pl.data.labels import labels_from
from sinkformer_pl.data.source import Source
from sinkformer_pl.data.split_tables import Part, SplitTables
from sinkformer_pl.data.validation import warn_if_unused
from sinkformer_pl.errors import UserError

REMEDY = "name the columns by data.path and data.label"


class ImageTable(ImageData):
    """Tables with the path of an image file and its label in each row: one for each split, or a column of splits.

    Tables are `.csv`, `.tsv`, `.jsonl` or `.parquet` files. Paths are relative to the folder of their table; files may
    have any suffix. The classes are the labels of the training table, sorted (as numbers where all are).

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
        path: str | int = "path",
        label: str | int | Sequence[str | int] = "label",
        separator: str | None = None,
        header: bool = True,
        classes: Sequence[str] | None = None,
        check_files: bool = True,
        crop_area: float = 0.08,
        flip: bool = True,
        **kwargs: Any,
    ) -> None:
        """Learn the classes from the training table, unless they are given; no image is read.

        Args:
            root: the folder of the tables; or one table, with a column of splits.
            train: name of the training table, which may lack its suffix where one file alone has that name.
            test: name of the test table.
            val: name of the validation table; None to divide validation from training.
            split: column of train, test or val, where `root` is a table; None is "split".
            path: column of the paths. This and all columns: by name, or by number from 1 on.
            label: column of the labels; or several, one for each class, 1 where it holds, else 0.
            separator: what stands between the labels of a row, such as "|"; None where each row has one.
            header: whether the first row of a .csv or .tsv file names the columns; else they are given by number.
            classes: class names, to give their order or to have more than the training table has.
            check_files: whether to decode every file before training, 0.3 to 1 ms each, and to look for test images
                among the training images. Otherwise a broken file is an error when its turn comes.
            crop_area: smallest share of a training image's area that is cut out at random and resized, in (0, 1];
                1 cuts out the centre as in evaluation.
            flip: whether every other training image is mirrored, left to right.
            **kwargs: what `ImageData` takes.

        Raises:
            UserError: a table that can't be read, a missing column, or an argument out of its range.
        """
        self.root = Path(root)
        self.path, self.labels = str(path), labels_from(label, separator)
        self.check_files = check_files
        if self.path in self.labels.columns:
            raise UserError(f"data.path and data.label are both {self.path}; name two columns")
        self.tables = SplitTables(
            self.root, train, test, val, None if split is None else str(split), self.labels, header, REMEDY
        )
        found = self.tables.classes([self.path]) if classes is None else classes
        super().__init__(found, crop_area=crop_area, flip=flip, **kwargs)
        self.multi_label = self.labels.multi_label
        if val is not None:
            warn_if_unused(self.val_fraction, f"{self.root}/{val}")

    def load(self) -> Source[Images]:
        """Find the files.

        Raises:
            UserError: files that are missing or can't be decoded; the first are named.
        """
        # Labels are names, so that a class that a checkpoint alone knows is one, too.
        self.found_classes = self.classes
        parts = self.tables.read([self.path])
        if "val" in parts and self.tables.single:
            warn_if_unused(self.val_fraction, f"the split val of {self.root}")
        files = {split: self._files(part) for split, part in parts.items()}
        _require_files(parts, files)
        if self.check_files:
            check_images({str(split): paths for split, paths in files.items()})
        return Source(**{split: self._images(part, files[split]) for split, part in parts.items()})

    def _files(self, part: Part) -> list[Path]:
        paths = []
        for row in part.rows:
            cell = row.cells[self.path]
            if not isinstance(cell, str) or not cell.strip():
                raise UserError(f"{row.where}: column {self.path} has no path; give one or remove the line")
            paths.append(part.table.parent / cell.strip())
        return paths

    def _images(self, part: Part, files: Sequence[Path]) -> Images:
        return Images(
            images=files,
            targets=self.labels.targets_of(part.rows, self.classes),
            names=[row.cells[self.path].strip() for row in part.rows],
        )


def _require_files(parts: dict[Split, Part], files: dict[Split, list[Path]]) -> None:
    """Name the first row whose file is missing, and count the others."""
    missing = [
        (row.where, file)
        for split, part in parts.items()
        for row, file in zip(part.rows, files[split], strict=True)
        if not file.is_file()
    ]
    if not missing:
        return
    (where, first), *others = missing
    more = ", ".join(str(file) for _, file in others[:2]) + (", ..." if len(others) > 2 else "")
    raise UserError(
        f"{where}: no file {first}; paths are relative to the table's folder: correct the path, or remove the line"
        + (f"; {len(others)} more are missing: {more}" if others else "")
    )
