"""Where the files of point clouds lie, and which class and part each belongs to: folders, or a list."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sinkformer_pl.data.labels import Labels
from sinkformer_pl.data.pointclouds.formats import SUFFIXES, is_cloud_file
from sinkformer_pl.data.reading import files_below, is_folder, list_folder, warn_of_left_out
from sinkformer_pl.data.table import table_rows
from sinkformer_pl.errors import UserError

PARTS = ("train", "test", "val")
LAYOUT = (
    "<class>/train/* and <class>/test/*, train/<class>/* and test/<class>/*, or <class>/* alone, in it or in its "
    "folder raw, ModelNet10 or ModelNet40"
)
LIST_SUFFIXES = (".csv", ".tsv")
EVERYTHING = "all"
"""The part of files that no folder or list divides into training and test."""


class Listing(NamedTuple):
    """Files and their classes.

    Attributes:
        root: what the names of the clouds are relative to.
        classes: their sorted names.
        files: of each part ("train" and "test", perhaps "val"; or "all"), by class and name, so that no order depends
            on the file system.
        targets: (n,) int64 class indices of the files of each part; of a multi-label list (n, classes) bool.
    """

    root: Path
    classes: tuple[str, ...]
    files: Mapping[str, Sequence[Path]]
    targets: Mapping[str, Tensor]


class CloudFolder(NamedTuple):
    """Where the files lie.

    Attributes:
        path: the folder of all others.
        folders: of each class in each part.
    """

    path: Path
    folders: Mapping[str, Mapping[str, Path]]

    @property
    def classes(self) -> tuple[str, ...]:
        """Their sorted names."""
        return tuple(sorted({name for classes in self.folders.values() for name in classes}))


def find_folder(root: Path, prefer: str | None) -> CloudFolder | None:
    """Look for a layout in `root` and in the places where ModelNet's archives and loaders put it.

    Args:
        root: an existing folder.
        prefer: the name of the place that wins where there are several.

    Returns:
        The folder, None where there is none.

    Raises:
        UserError: several, and no preference among them.
    """
    places = [root, *(root / name for name in ("raw", "ModelNet10", "ModelNet40"))]
    found = [CloudFolder(place, folders) for place in places if (folders := _divided(place))]
    if not found and (undivided := _undivided(root)):
        found = [CloudFolder(root, {EVERYTHING: undivided})]
    preferred = [folder for folder in found if folder.path.name == prefer]
    if len(found) > 1 and not preferred:
        raise UserError(f"{root}: clouds in {' and '.join(str(f.path) for f in found)}; give one of them as root")
    chosen = preferred or found
    return chosen[0] if chosen else None


def list_files(folder: CloudFolder) -> Listing:
    """Find the files, at any depth of their folders; one warning counts those that are left out.

    Raises:
        UserError: nothing to train on or nothing to test on, or a folder that can't be read.
    """
    files: dict[str, list[Path]] = {}
    targets: dict[str, Tensor] = {}
    below = [place for classes in folder.folders.values() for place in classes.values()]
    for part, classes in folder.folders.items():
        found = [(file, name) for name, place in sorted(classes.items()) for file in files_below(place)]
        chosen = [(file, name) for file, name in found if is_cloud_file(file)]
        if not chosen and part != "val":
            others = f", but {len(found)} other files, such as {found[0][0].name}" if found else ""
            raise UserError(
                f"{folder.path}: no clouds of part {part}{others}; put some there, as files of {', '.join(SUFFIXES)}"
            )
        files[part] = [file for file, _ in chosen]
        targets[part] = torch.tensor([folder.classes.index(name) for _, name in chosen], dtype=torch.int64)
    for part in ("train", "test"):
        if part not in files and EVERYTHING not in files:
            raise UserError(
                f"{folder.path}: no clouds of part {part}; put some there, as files of {', '.join(SUFFIXES)}"
            )
    warn_of_left_out(
        folder.path,
        (file for chosen in files.values() for file in chosen),
        lambda file: is_cloud_file(file) or any(file.is_relative_to(place) for place in below),
        f"clouds lie in {LAYOUT}, and end in {', '.join(SUFFIXES)}",
    )
    return Listing(folder.path, folder.classes, files, targets)


def read_list(path: Path, labels: Labels) -> Listing:
    """Read a table with columns `path` and of labels, and perhaps `split`: train, test or val.

    Args:
        path: a .csv or .tsv file; the paths in it are relative to its folder.
        labels: where the classes are.

    Raises:
        UserError: a file that can't be read, columns or labels that are missing, no file of such a name, a split of
            another name, or one without clouds.
    """
    rows = list(table_rows(path, ["path", *labels.columns], "name them path and label, or the labels by data.label"))
    files, splits = [], []
    for row in rows:
        name, split = (str(row.cells.get(column, EVERYTHING)).strip() for column in ("path", "split"))
        if not name:
            raise UserError(f"{row.where}: no path; give one or remove the line")
        if split not in (*PARTS, EVERYTHING):
            raise UserError(f"{row.where}: split {split[:20]!r}; give one of {', '.join(PARTS)}")
        if not (path.parent / name).is_file():
            raise UserError(f"{row.where}: no file {path.parent / name}; correct the path, or remove the line")
        files.append(path.parent / name)
        splits.append(split)
    # Those of one column are in the order of texts, "10" before "9".
    classes = sorted(labels.classes_of(rows)) if isinstance(labels.column, str) else labels.columns
    targets = labels.targets_of(rows, classes)
    parts = {*splits} or {EVERYTHING}
    for part in {"train", "test"} - parts if parts != {EVERYTHING} else ():
        raise UserError(f"{path}: no clouds of split {part}; give some, or leave the column out")
    places = {part: [place for place, split in enumerate(splits) if split == part] for part in parts}
    return Listing(
        path.parent,
        tuple(classes),
        {part: [files[place] for place in chosen] for part, chosen in places.items()},
        {part: targets[chosen] for part, chosen in places.items()},
    )


def _divided(place: Path) -> dict[str, dict[str, Path]]:
    """Return the folders of each class in each part, none where no folder is called train or test."""
    if not is_folder(place):
        return {}
    children, _ = list_folder(place)
    outer = {child.name: child for child in children if child.name in PARTS}
    if outer.keys() & {"train", "test"}:
        return {part: {folder.name: folder for folder in list_folder(child)[0]} for part, child in outer.items()}
    inner = {part: {child.name: child / part for child in children if is_folder(child / part)} for part in PARTS}
    if not inner["train"] and not inner["test"]:
        return {}
    return {part: folders for part, folders in inner.items() if folders}


def _undivided(place: Path) -> dict[str, Path]:
    if not is_folder(place):
        return {}
    return {
        child.name: child for child in list_folder(place)[0] if any(is_cloud_file(file) for file in files_below(child))
    }
