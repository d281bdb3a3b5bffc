"""Check the content of a checkpoint whose bytes are intact: one that was put together by hand may lack entries."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinkformer_pl.errors import UserError

Checkpoint = dict[str, Any]
"""Content of a checkpoint, as Lightning makes it."""

CONFIG_KEY = "sinkformer_pl_config"
METRICS_KEY = "sinkformer_pl_metrics"
RESUME_KEY = "sinkformer_pl_resume"
CLASSES_KEY = "sinkformer_pl_classes"
"""Of version 0.1; `learnt_from` reads it."""

LEARNT_KEY = "sinkformer_pl_learnt"
"""In the state of a data module, which is kept under the name of its class: see `learnt_from`."""


def require_form(checkpoint: Any, path: str | Path) -> None:
    """Check that something is a checkpoint of a task.

    Args:
        checkpoint: what was loaded.
        path: for the message.

    Raises:
        UserError: names the first entry that is missing or of another kind than it must be.
    """
    entries: dict[str, Callable[[Any], bool]] = {
        "state_dict": is_weights,
        "hyper_parameters": lambda value: isinstance(value, Mapping) and _is_plain(value),
        "pytorch-lightning_version": lambda value: isinstance(value, str) and value[:1].isdecimal(),
        "callbacks": lambda value: isinstance(value, Mapping | None),
        CONFIG_KEY: _is_plain_or_none,
        METRICS_KEY: lambda value: value is None or isinstance(value, Mapping),
    }
    _require(checkpoint if isinstance(checkpoint, Mapping) else {}, entries, path)
    learnt: dict[str, Callable[[Any], bool]] = {"classes": _are_names_or_none, "preprocessing": _is_plain_or_none}
    learnt["samples"] = _is_plain_or_none
    _require(learnt_from(checkpoint), learnt, path)


def learnt_from(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the data of a checkpoint's training had learnt, `ClassificationData.learnt`; empty if nothing.

    Returns:
        "classes", the class names in the order of their indices, "preprocessing", `Preprocessing.plain()`, and
        "samples", see `samples_from`. In checkpoints of version 0.1 each may be missing, and the second has of texts
        the tokenizer alone.
    """
    states = [state for state in checkpoint.values() if isinstance(state, Mapping)]
    for state in states:
        if isinstance(learnt := state.get(LEARNT_KEY), Mapping):
            return dict(learnt)
    tokenizer = next((dict(state) for state in states if isinstance(state.get("tokenizer"), str)), None)
    found = {"classes": checkpoint.get(CLASSES_KEY), "preprocessing": tokenizer}
    return {name: value for name, value in found.items() if value}


def samples_from(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return which samples a checkpoint's training had, as far as it knows.

    Returns:
        `data.identity.identity_of` them: "seed" and "val_fraction" of the division, and for "train" and "val" their
        "number" and "digest". In checkpoints of version 0.1 there are no digests.
    """
    if samples := learnt_from(checkpoint).get("samples"):
        return dict(samples)
    resume = checkpoint.get(RESUME_KEY) or {}
    data = (checkpoint.get(CONFIG_KEY) or {}).get("data")
    arguments = (data.get("init_args") if isinstance(data, Mapping) else None) or {}
    number = resume.get("the number of training samples")
    found = {
        "seed": resume.get("data.seed", arguments.get("seed")),
        "val_fraction": arguments.get("val_fraction"),
        "train": None if number is None else {"number": number},
    }
    return {name: value for name, value in found.items() if value is not None}


def require_progress(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Check that a checkpoint holds the state of a training to resume.

    Args:
        checkpoint: what `read_checkpoint` gives.
        path: for the message.

    Raises:
        UserError: it has weights alone; or names the first entry that isn't what it must be.
    """
    if not {"loops", "optimizer_states", "lr_schedulers"} <= checkpoint.keys():
        raise UserError(
            f"--ckpt_path {path}: it has weights alone, not the state of a training to resume; give one that fit wrote"
        )
    # Here, since this is also read where Lightning, which takes seconds, isn't imported.
    from sinkformer_pl.training.lightning_state import EPOCHS, epochs_of

    epochs = ".".join(EPOCHS)
    entries: dict[str, Callable[[Any], bool]] = {
        epochs: _is_count,
        "global_step": _is_count,
        "epoch": _is_count,
        "optimizer_states": lambda value: (
            _is_listed(value) and value != [] and all({"state", "param_groups"} <= state.keys() for state in value)
        ),
        "lr_schedulers": _is_listed,
        "callbacks": lambda value: isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values()),
    }
    _require({**checkpoint, epochs: epochs_of(checkpoint)}, entries, path)


def _require(checkpoint: Mapping[str, Any], entries: Mapping[str, Callable[[Any], bool]], path: str | Path) -> None:
    for key, fits in entries.items():
        if not fits(checkpoint.get(key)):
            what = "is not what it must be" if checkpoint.get(key) is not None else "is missing"
            raise UserError(
                f"checkpoint {path}: its '{key}' {what}, so it isn't one of a task here; give one that fit wrote"
            )


def is_weights(value: Any) -> bool:
    """Tell whether something is a state_dict: tensors by name."""
    return isinstance(value, Mapping) and all(
        (isinstance(v, Tensor) and v.layout == torch.strided and v.device.type != "meta")
        # What a module adds to its weights.
        or str(name).endswith("_extra_state")
        for name, v in value.items()
    )


def _is_plain(value: Mapping[str, Any]) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_plain_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, Mapping) and _is_plain(value))


def _are_names_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_listed(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(state, Mapping) for state in value)
