"""The published ModelNet archives: their classes, and their download."""

import http.client
import os
import zipfile
import zlib
from pathlib import Path
from typing import Literal

from sinkformer_pl.data.archives import folder_within, obtain
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

URLS: dict[ModelNetName, str] = {
    "ModelNet10": "https://3dvision.princeton.edu/projects/2014/3DShapeNets/ModelNet10.zip",
    "ModelNet40": "https://modelnet.cs.princeton.edu/ModelNet40.zip",
}

# Princeton publishes none; these are what others have independently recorded of its archives.
CHECKSUMS: dict[ModelNetName, str] = {
    "ModelNet10": "sha256:9d8679435fc07d1d26f13009878db164a7aa8ea5e7ea3c8880e42794b7307d51",
    "ModelNet40": "sha256:42dc3e656932e387f554e25a4eb2cc0e1a1bd3ab54606e2a9eae444c60e536ac",
}


def fetch_modelnet(name: ModelNetName, root: Path) -> None:
    """Put the folder `root/name` there, from `root/name.zip` where that lies ready, else from the network.

    The folder appears complete or not at all.

    Raises:
        UserError: no network, an archive with another checksum, or no permission to write.
    """
    url = URLS[name]
    archive = root / f"{name}.zip"
    try:
        with folder_within(root) as folder:
            _extract(obtain(url, CHECKSUMS[name], archive, folder), name, folder)
            os.replace(folder / name, root / name)
    # A RuntimeError is for what is encrypted or compressed in another way.
    except (zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise UserError(f"{archive}: not a complete archive ({error}); put {url} there") from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{root}: cannot fetch {name} ({error}); put {url} there as {archive.name}") from None


def _extract(archive: Path, name: str, folder: Path) -> None:
    """Extract the folder `name`, of which every member has to stay inside."""
    with zipfile.ZipFile(archive) as file:
        members = [member for member in file.namelist() if member.split("/")[0] == name]
        if not members:
            raise zipfile.BadZipFile(f"it has no folder {name}")
        if any(".." in member.replace("\\", "/").split("/") for member in members):
            raise zipfile.BadZipFile("it has members outside its folder")
        file.extractall(folder, members)
