"""Layouts of published data sets of clouds in HDF5 files: ModelNet40 and ScanObjectNN."""

from pathlib import Path

from sinkformer_pl.data.pointclouds.array_file import ArrayFiles, ArrayPart, Piece
from sinkformer_pl.data.reading import decoded_lines, is_folder, open_file
from sinkformer_pl.errors import UserError

POINTS, LABELS = ("data",), ("label",)

SHAPE_NAMES = "shape_names.txt"
"""File of class names, one in each line."""

LISTS: dict[ArrayPart, str] = {"train": "train_files.txt", "test": "test_files.txt"}
"""Names of the lists of files of each part, in the layout of modelnet40_ply_hdf5_2048."""

TRAINING, TEST = "training_", "test_"
"""Beginnings of the names of files in the layout of ScanObjectNN, which are the same after that."""

FOLDERS = ("modelnet40_ply_hdf5_2048", "main_split", "h5_files/main_split")
"""In which the archives have them."""

SCAN_OBJECTS = f"{TRAINING}objectdataset.h5"

SCAN_OBJECT_CLASSES = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow", "sink",
    "sofa", "toilet",
)  # fmt: skip


def find_published(root: Path) -> ArrayFiles | None:
    """Look for HDF5 files in one of the layouts.

    Args:
        root: a folder with `train_files.txt` and `test_files.txt`, or with `training_objectdataset.h5`; or a file
            `training_*.h5`, beside which `test_*.h5` lies.

    Returns:
        The files; None where there are none.

    Raises:
        UserError: a file that a list or another file calls for is missing.
    """
    if not is_folder(root):
        named = root.name.startswith(TRAINING) and root.suffix.lower() in (".h5", ".hdf5")
        return _scan_objects(root) if named and _test_file(root).is_file() else None
    for folder in (root, *(root / name for name in FOLDERS)):
        if all((folder / name).is_file() for name in LISTS.values()):
            parts = {part: _listed(folder / name) for part, name in LISTS.items()}
            return ArrayFiles(folder, parts, _class_names(folder))
        if (training := folder / SCAN_OBJECTS).is_file():
            if not (test := _test_file(training)).is_file():
                raise UserError(f"{training}: no file {test.name} beside it with the test clouds; put it there")
            return _scan_objects(training)
    return None


def _test_file(training: Path) -> Path:
    """Return where the test clouds of a file `training_*.h5` are."""
    return training.with_name(TEST + training.name.removeprefix(TRAINING))


def _scan_objects(training: Path) -> ArrayFiles:
    files: dict[ArrayPart, Path] = {"train": training, "test": _test_file(training)}
    parts = {part: [Piece(file, POINTS, LABELS, alone=True)] for part, file in files.items()}
    return ArrayFiles(training, parts, _class_names(training.parent) or SCAN_OBJECT_CLASSES)


def _listed(path: Path) -> list[Piece]:
    """Return the files of a list, whose paths are those of its authors' folders, or of its own."""
    pieces = []
    for line in _lines(path):
        file = next((file for file in (path.parent / line, path.parent / Path(line).name) if file.is_file()), None)
        if file is None:
            raise UserError(f"{path}: no file {path.parent / Path(line).name}; put it there, or correct the list")
        pieces.append(Piece(file, POINTS, LABELS, alone=True))
    return pieces


def _class_names(folder: Path) -> tuple[str, ...] | None:
    path = folder / SHAPE_NAMES
    return tuple(_lines(path)) if path.is_file() else None


def _lines(path: Path) -> list[str]:
    with open_file(path) as file:
        lines = [line.strip() for line in decoded_lines(file, str(path))]
    if not any(lines):
        raise UserError(f"{path}: an empty file; give a name in each line")
    return [line for line in lines if line]
