"""Where the files of point clouds lie, and which class and part each belongs to: folders, or a list."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sinkformer_pl.data.labels import label_of
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
        targets: the class index of each file.
    """

    root: Path
    classes: tuple[str, ...]
    files: Mapping[str, Sequence[Path]]
    targets: Mapping[str, Sequence[int]]


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
    targets: dict[str, list[int]] = {}
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
        targets[part] = [folder.classes.index(name) for _, name in chosen]
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


def read_list(path: Path) -> Listing:
    """Read a table with columns `path` and `label`, and perhaps `split`: train, test or val.

    Args:
        path: a .csv or .tsv file; the paths in it are relative to its folder.

    Raises:
        UserError: a file that can't be read, columns or labels that are missing, no file of such a name, a split of
            another name, or one without clouds.
    """
    rows: list[tuple[Path, str, str]] = []
    for row in table_rows(path, ["path", "label"], "name them path and label"):
        name, split = (str(row.cells.get(column, EVERYTHING)).strip() for column in ("path", "split"))
        if not name:
            raise UserError(f"{row.where}: no path; give one or remove the line")
        label = label_of(row, "label", None)
        if split not in (*PARTS, EVERYTHING):
            raise UserError(f"{row.where}: split {split[:20]!r}; give one of {', '.join(PARTS)}")
        if not (path.parent / name).is_file():
            raise UserError(f"{row.where}: no file {path.parent / name}; correct the path, or remove the line")
        rows.append((path.parent / name, label, split))
    classes = tuple(sorted({label for _, label, _ in rows}))
    parts = {split for _, _, split in rows} or {EVERYTHING}
    for part in {"train", "test"} - parts if parts != {EVERYTHING} else ():
        raise UserError(f"{path}: no clouds of split {part}; give some, or leave the column out")
    return Listing(
        path.parent,
        classes,
        {part: [file for file, _, split in rows if split == part] for part in parts},
        {part: [classes.index(label) for _, label, split in rows if split == part] for part in parts},
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
