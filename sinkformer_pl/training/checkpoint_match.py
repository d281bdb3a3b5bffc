"""Say in what a checkpoint and what it is to be used with differ."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sinkformer_pl.errors import UserError
from sinkformer_pl.training.checkpoint_content import learnt_from, require_progress

SHOWN = 4

_SHAPING = ("backbone", "normalization", "num_classes")

_UNGROUPED: dict[str, Any] = {"parameter_groups": [], "no_weight_decay": [], "layer_decay": None}
"""Arguments of checkpoints from before an optimizer had groups."""


def require_task(checkpoint: Mapping[str, Any], task: type, path: str | Path) -> None:
    """Check that a checkpoint's hyper-parameters are those of a task.

    Args:
        checkpoint: what `read_checkpoint` gives.
        task: the class of the task.
        path: for the message.

    Raises:
        UserError: some are missing, or unknown.
    """
    parameters = inspect.signature(task).parameters
    saved = checkpoint["hyper_parameters"].keys()
    missing = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    missing = [name for name in missing if name not in saved]
    unknown = [name for name in saved if name not in parameters]
    if missing or unknown:
        difference = "; ".join(
            f"{what} {shown(names, ', ')}" for what, names in (("without", missing), ("with", unknown)) if names
        )
        raise UserError(
            f"checkpoint {path} is of another task than {task.__name__}: its hyper-parameters are {difference}; give a "
            f"checkpoint of a {task.__name__}"
        )


def require_classes(
    checkpoint: Mapping[str, Any], classes: Sequence[str], path: str | Path, *, multi_label: bool = False
) -> None:
    """Check that a checkpoint knows all classes of the data; older ones know their number alone.

    Args:
        checkpoint: what `read_checkpoint` gives.
        classes: the data's class names.
        path: for the message.
        multi_label: whether a sample of the data has any number of them.

    Raises:
        UserError: lists the classes that only one of them has; or only one of them is of multi-label data.
    """
    if (several := bool(learnt_from(checkpoint).get("multi_label"))) != multi_label:
        one, any_number = "one class", "any number of classes"
        trained, given = (any_number, one) if several else (one, any_number)
        raise UserError(
            f"checkpoint {path}: a sample that it was trained on has {trained}, one of the data {given}; use such "
            "data, or train anew"
        )
    saved = learnt_from(checkpoint).get("classes") or []
    number = len(saved) or checkpoint.get("hyper_parameters", {}).get("num_classes", len(classes))
    here = [name for name in classes if name not in saved] if saved else []
    if not here and (saved or number == len(classes)):
        return
    there = [name for name in saved if name not in classes]
    differences = [f"{number} in the checkpoint and {len(classes)} in the data"]
    differences += [f"only in the checkpoint: {shown(there, ', ')}"] * bool(there)
    differences += [f"only in the data: {shown(here, ', ')}"] * bool(here)
    raise UserError(
        f"checkpoint {path} has other classes than the data: {'; '.join(differences)}. Use data of the classes that it "
        "was trained on, or train anew, from its weights with --init_from"
    )


def require_match(checkpoint: Mapping[str, Any], model: nn.Module, path: str | Path) -> None:
    """Check that the weights of a checkpoint fit a model, before anything is loaded.

    Args:
        checkpoint: what `read_checkpoint` gives. Keys of earlier versions are renamed, in place.
        model: the model; its `hparams`, if it has them, help to say what differs. Modules whose keys had other names
            have a method `rename_old_keys(state_dict, prefix)`.
        path: for the message.

    Raises:
        UserError: names the arguments of backbone and normalization that differ, and the parameters that are missing,
            unknown or of another shape.
    """
    saved: dict[str, Tensor] = checkpoint["state_dict"]
    rename_old_keys(saved, model)
    parameters = mismatches(saved, model.state_dict())
    if parameters:
        arguments = differing_arguments(checkpoint["hyper_parameters"], model)
        raise UserError(
            f"checkpoint {path} doesn't fit the model: {shown([*arguments, *parameters], '; ')}. Use the data, "
            "backbone and normalization that it was trained with, or train anew from its weights, with --init_from"
        )


def rename_old_keys(saved: dict[str, Tensor], model: nn.Module) -> None:
    """Rename, in place, keys of earlier versions: modules whose keys had other names have a method for it."""
    for name, module in model.named_modules():
        if callable(rename := getattr(module, "rename_old_keys", None)):
            rename(saved, f"{name}.")


def mismatches(saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Say which weights are missing, unknown or of another shape, in the order of their names."""
    return sorted(
        [
            *(f"{key} is not in the checkpoint" for key in wanted.keys() - saved.keys()),
            *(f"{key} is only in the checkpoint" for key in saved.keys() - wanted.keys()),
            *(
                f"{key} is {tuple(saved[key].shape)} in the checkpoint and {tuple(wanted[key].shape)} in the model"
                for key in wanted.keys() & saved.keys()
                if saved[key].shape != wanted[key].shape
            ),
        ]
    )


def differing_arguments(hyper_parameters: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Say in which arguments that shape the network a checkpoint and a model differ."""
    return [
        f"{key} is {before} in the checkpoint and {now} here"
        for key, (before, now) in differing(hyper_parameters, getattr(model, "hparams", {})).items()
        if key.partition(".")[0] in _SHAPING
    ]


def require_resumable(checkpoint: Mapping[str, Any], model: nn.Module, path: str | Path) -> None:
    """Check that a training can resume from a checkpoint.

    Args:
        checkpoint: what `read_checkpoint` gives.
        model: the task; its `hparams` name the optimizer.
        path: for the message.

    Raises:
        UserError: it has weights alone, weights that aren't finite, other frozen parts, or the state of another
            optimizer or scheduler of PyTorch, or of one with other arguments, which that state would bring back.
    """
    require_progress(checkpoint, path)
    for name, _ in model.named_parameters():
        if not bool(checkpoint["state_dict"][name].isfinite().all()):
            raise UserError(f"checkpoint {path}: {name} is not finite, so no training can resume from it; give another")
    hyper_parameters: Any = model.hparams
    was, now = (values.get("freeze") or [] for values in (checkpoint["hyper_parameters"], hyper_parameters))
    if was != now:
        raise UserError(
            f"--ckpt_path {path}: model.freeze is {was} in the checkpoint, whose optimizer has all others, and {now} "
            "here; leave it out, or train anew from its weights, with --init_from"
        )
    saved, wanted = (values.get("optimizer") for values in (checkpoint["hyper_parameters"], hyper_parameters))
    if not isinstance(saved, Mapping) or not isinstance(wanted, Mapping):
        return  # A task that makes its optimizer in another way.
    if saved.get("class_path") != wanted["class_path"]:
        raise UserError(
            f"--ckpt_path {path}: it was trained by {saved.get('class_path')}, from whose state {wanted['class_path']} "
            "can't resume; keep the optimizer"
        )
    kept = ["optimizer", *_UNGROUPED]
    if any("scheduler" in state for state in checkpoint["lr_schedulers"]):
        kept += ["schedule", "warmup", "schedule_interval", "schedule_monitor"]
    before = _UNGROUPED | checkpoint["hyper_parameters"]
    now_and_then = ({name: values[name] for name in kept if name in values} for values in (before, hyper_parameters))
    for key, (was, now) in differing(*now_and_then).items():
        raise UserError(
            f"--ckpt_path {path}: {key} is {was} in the checkpoint, whose optimizer resumes with that, and {now} here; "
            "leave it out, or train anew from its weights, with --init_from"
        )


def differing(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the hyper-parameters that are in both and differ, by their dotted keys: {"backbone.dim": (8, 16)}.

    Args:
        saved: those of a checkpoint; classes as {"class_path", "init_args"}.
        wanted: others.
    """
    before, now = dict(_leaves(saved)), dict(_leaves(wanted))
    return {key: (before[key], now[key]) for key in before if key in now and before[key] != now[key]}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and "class_path" in value:
            yield prefix + name, value["class_path"]
            yield from _leaves(value.get("init_args") or {}, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def shown(parts: Sequence[str], separator: str) -> str:
    """Join the first few of some parts, and say how many more there are."""
    more = f"{separator}and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return separator.join(parts[:SHOWN]) + more
