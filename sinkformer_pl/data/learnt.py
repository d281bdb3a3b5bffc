"""Read from a checkpoint what its model has learnt of data, without any data at hand."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from sinkformer_pl.data.images.preprocessing import ImagePreprocessing
from sinkformer_pl.data.pointclouds.preprocessing import CloudPreprocessing
from sinkformer_pl.data.preprocessing import Preprocessing
from sinkformer_pl.data.texts.preprocessing import TextPreprocessing
from sinkformer_pl.errors import UserError
from sinkformer_pl.training.checkpoint_content import learnt_from

KINDS: dict[str, type[Preprocessing]] = {
    cls.kind: cls for cls in (ImagePreprocessing, TextPreprocessing, CloudPreprocessing)
}


class Learnt(NamedTuple):
    """Everything between a raw sample and a named class, but for the network.

    Attributes:
        classes: class names in the order of the network's outputs.
        preprocessing: makes the input of a raw sample: an image, a text, points.
    """

    classes: tuple[str, ...]
    preprocessing: Preprocessing


def read_learnt(checkpoint: Mapping[str, Any]) -> Learnt:
    """Return class names and preprocessing of a checkpoint's model.

    Args:
        checkpoint: Lightning's dictionary, as `read_checkpoint` gives it.

    Raises:
        UserError: it doesn't hold them: an older version wrote it, or its data have a preprocessing of their own.
    """
    return learnt_of(learnt_from(checkpoint))


def learnt_of(learnt: Mapping[str, Any]) -> Learnt:
    """Make them of plain data: "classes", and "preprocessing" as `Preprocessing.plain` gives it.

    Raises:
        UserError: as of `read_learnt`.
    """
    saved = dict(learnt.get("preprocessing") or {})
    cls = KINDS.get(saved.pop("kind", None))
    known = [] if cls is None else fields(cls)  # type: ignore[arg-type]
    # What came later has a default, under which a checkpoint of before says what it said.
    needed = {field.name for field in known if field.default is MISSING}
    if cls is None or not needed <= saved.keys() <= {field.name for field in known}:
        raise UserError(
            "the checkpoint doesn't say how its inputs are made of images, texts or point clouds: an older version "
            "wrote it, or data of another kind; train anew, or go on for an epoch with fit --ckpt_path"
        )
    return Learnt(tuple(learnt["classes"]), cls(**saved))
