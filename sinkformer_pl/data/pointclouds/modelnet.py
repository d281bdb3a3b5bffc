"""The published ModelNet archives: their classes, and their download."""

import http.client
import os
import shutil
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import Literal

from sinkformer_pl.errors import UserError

ModelNetName = Literal["ModelNet10", "ModelNet40"]

MODELNET_CLASSES: dict[ModelNetName, tuple[str, ...]] = {
    "ModelNet10": (
        "bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet",
    ),
    "ModelNet40": (
        "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone",
        "cup", "curtain", "desk", "door", "dresser", "flower_pot", "glass_box", "guitar", "keyboard", "lamp",
        "laptop", "mantel", "monitor", "night_stand", "person", "piano", "plant", "radio", "range_hood", "sink",
        "sofa", "stairs", "stool", "table", "tent", "toilet", "tv_stand", "vase", "wardrobe", "xbox",
    ),
}  # fmt: skip


def fetch_modelnet(name: ModelNetName, root: Path) -> None:
    """Put the folder `root/name` there, from `root/name.zip` where that lies ready, else from the network.

    The folder appears complete or not at all.

    Raises:
        UserError: no network, a damaged archive, or no permission to write.
    """
    # Imported here, since it takes seconds that no other source of data should cost.
    from torch_geometric.datasets import ModelNet

    url = ModelNet.urls[name.removeprefix("ModelNet")]
    archive = root / f"{name}.zip"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as folder:
            _extract(archive if archive.exists() else _download(url, Path(folder) / archive.name), name, Path(folder))
            os.replace(Path(folder) / name, root / name)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive}: not a complete archive ({error}); put {url} there") from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{root}: cannot fetch {name} ({error}); put {url} there as {archive.name}") from None


def _download(url: str, target: Path) -> Path:
    with urllib.request.urlopen(url, timeout=60) as response, target.open("wb") as file:
        shutil.copyfileobj(response, file)
    return target


def _extract(archive: Path, name: str, folder: Path) -> None:
    """Extract the folder `name`, of which every member has to stay inside."""
    with zipfile.ZipFile(archive) as file:
        members = [member for member in file.namelist() if member.split("/")[0] == name]
        if not members:
            raise zipfile.BadZipFile(f"it has no folder {name}")
        if any(".." in member.replace("\\", "/").split("/") for member in members):
            raise zipfile.BadZipFile("it has members outside its folder")
        file.extractall(folder, members)
