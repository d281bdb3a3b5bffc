"""Identify the samples that a model is trained and validated on: a training resumes on the same."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn

from sinkformer_pl.batch import class_names
from sinkformer_pl.data.dataset import LabelledDataset, Split
from sinkformer_pl.errors import UserError

SPLITS: dict[Split, str] = {"train": "training", "val": "validation"}
ARGUMENTS = ("seed", "val_fraction")


def identity_of(
    datasets: Mapping[Split, LabelledDataset], classes: Sequence[str], *, seed: int, val_fraction: float
) -> dict[str, Any]:
    """Return what tells these samples and their division from others, as plain data.

    Args:
        datasets: the splits.
        classes: names of the targets.
        seed: of the division.
        val_fraction: the share that was asked for.

    Returns:
        The two arguments, and for "train" and "val" the number of samples and a digest of their names, classes and
        `LabelledDataset.content`, in their order.
    """
    identity: dict[str, Any] = {"seed": seed, "val_fraction": val_fraction}
    for split in SPLITS:
        identity[split] = {"number": len(datasets[split]), "digest": _digest(datasets[split], classes)}
    return identity


def require_same(saved: Mapping[str, Any], now: Mapping[str, Any], path: str | Path) -> None:
    """Check that samples and their division are those of a checkpoint.

    Args:
        saved: `identity_of` them; of a checkpoint of an older version, which has no digests, what it knows.
        now: `identity_of` the samples at hand.
        path: for the message.

    Raises:
        UserError: names what differs.
    """
    known = all("digest" in saved.get(split, {}) for split in SPLITS)
    differing = [f"data.{name} was {saved[name]}, now {now[name]}" for name in ARGUMENTS if _differ(saved, now, name)]
    of_splits = {split: _difference(saved.get(split, {}), now[split], word) for split, word in SPLITS.items()}
    differing += [text for text in of_splits.values() if text]
    if differing and (not known or any(of_splits.values())):
        raise UserError(
            f"--ckpt_path {path}: it was trained on other samples: {'; '.join(differing)}. Keep the data and their "
            "division as they were, or train anew, without --ckpt_path"
        )
    if not known:
        rank_zero_warn(
            f"--ckpt_path {path}: an older version, or another program, wrote it, without the names of its samples; "
            "it resumes on those of now, and whether they were divided in this way can't be checked"
        )


def _digest(dataset: LabelledDataset, classes: Sequence[str]) -> str:
    names = "\n".join(class_names(dataset.targets, classes))
    return hashlib.sha256(dataset.fingerprint + names.encode()).hexdigest()


def _differ(saved: Mapping[str, Any], now: Mapping[str, Any], name: str) -> bool:
    return name in saved and saved[name] != now[name]


def _difference(saved: Mapping[str, Any], now: Mapping[str, Any], word: str) -> str:
    if _differ(saved, now, "number"):
        return f"{saved['number']} {word} samples, now {now['number']}"
    if _differ(saved, now, "digest"):
        return f"the names, classes, order or content of the {now['number']} {word} samples differ"
    return ""
