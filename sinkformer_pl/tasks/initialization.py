"""Start a training from given weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from sinkformer_pl.errors import UserError
from sinkformer_pl.factories import same_class
from sinkformer_pl.normalizations.contract import AttentionNormalization
from sinkformer_pl.parts import Patterns, as_list, collapsed, matches, select
from sinkformer_pl.training.checkpoint_match import differing_arguments, mismatches, rename_old_keys, shown
from sinkformer_pl.training.weights_file import Weights, read_weights

CLASSES = "of other classes"
NORMALIZATION = "of another normalization"
ABSENT = "not in the file"
SHAPE = "of another shape in the file"


@dataclass(frozen=True)
class Initialization:
    """Report of `init_from`; as a text, a few lines.

    Attributes:
        path: of the file.
        loaded: names of the parameters and buffers that are now the file's, in the model's order.
        resized: of these the positions that were interpolated or cut, with their sizes.
        new: names of the others, which are as they were, each with the reason; those that `only` leaves out aren't
            among them.
        left_out: names in the file that nothing was made of.
        learnt: what the data took over, such as "tokenizer"; None where the file doesn't know how its inputs were made.
        model_names: names of all parameters and buffers of the model.
        file_names: names of all in the file.
    """

    path: Path
    loaded: Sequence[str]
    resized: Mapping[str, str]
    new: Mapping[str, str]
    left_out: Sequence[str]
    learnt: Sequence[str] | None
    model_names: Sequence[str]
    file_names: Sequence[str]

    def lines(self) -> list[str]:
        """Return what was loaded, made anew and left out, a line each."""
        lines = [f"initialised from {self.path}: {len(self.loaded)} of {len(self.model_names)} tensors"]
        lines += [f"  resized: {name}, {sizes}" for name, sizes in self.resized.items()]
        for reason in dict.fromkeys(self.new.values()):
            names = [name for name, its_reason in self.new.items() if its_reason == reason]
            lines.append(f"  new, {reason}: {shown(collapsed(names, self.model_names), ', ')}")
        if self.left_out:
            lines.append(f"  left out of the file: {shown(collapsed(self.left_out, self.file_names), ', ')}")
        if self.learnt is None:
            lines.append(
                "  the file doesn't say how its inputs were made (tokenizer, mean); it is done as for new data"
            )
        elif self.learnt:
            lines.append(f"  taken over for the data: {', '.join(self.learnt)}")
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


def init_from(
    model: pl.LightningModule,
    path: str | Path,
    *,
    only: Patterns = (),
    strict: bool = True,
    data: pl.LightningDataModule | None = None,
) -> Initialization:
    """Give a model the weights in a file as its initial ones; a training from them is a new one.

    Positions of another size are interpolated: of images bicubically over the grid of patches, the class token's kept
    apart; of texts linearly, or cut where the network has fewer. What belongs to other classes (the head of a
    `Classifier`) or to another normalization stays as it is.

    Args:
        model: a task.
        path: a checkpoint, a safetensors file of `export`, or a state_dict that `torch.save` wrote.
        only: names of the parts that are loaded, such as "backbone.embed" or "backbone.blocks.0-3" (`parts.Patterns`);
            all by default.
        strict: whether everything else must be in the file, and nothing more. False takes what fits by name and shape.
        data: where it is a `ClassificationData`, it takes over what the file's model has learnt of its data beside
            weights, so before `setup`: the tokenizer of texts, mean and standard deviation of images. Its classes stay.

    Raises:
        UserError: a file that can't be read, a name without a match, weights that don't fit or aren't finite, or none
            that fit at all; a backbone with pretrained weights, unless the file's are of a training from them.
    """
    path = Path(path)
    weights = _read(path, model)
    if not _made_of(weights.learnt.get("preprocessing") or {}, _preprocessing_of(model) or {}):
        raise UserError(
            f"init_from {path}: the backbone has pretrained weights already, whose inputs are made in another way; "
            "make it without these"
        )
    resized = _resize_positions(weights, model)
    own = _tensors(model)
    wanted = select(own, only, "init_only") if as_list(only) else list(own)
    given = {name: value for name, value in weights.tensors.items() if not as_list(only) or matches(name, only)}
    other = {**_of_other_classes(weights, model, data), **_of_another_normalization(weights, model)}
    new = {name: reason for name in wanted if (reason := other.get(name) or _misfit(name, own, given))}
    loaded = [name for name in wanted if name not in new]
    if not given.keys() & set(wanted):
        there, here = next(iter(weights.tensors), "nothing"), wanted[0]
        raise UserError(f"init_from {path}: it has none of the network's names: it has {there}, the network {here}")
    if strict:
        _require_fit(path, weights, model, wanted, given, other)
    if not loaded:
        raise UserError(f"init_from {path}: of its weights none fits the network; give that of their training")
    for name in loaded:
        if not bool(given[name].isfinite().all()):
            raise UserError(f"init_from {path}: {name} is not finite; give a file of a training that went well")
    learnt: Sequence[str] | None = ()
    if data is not None and hasattr(data, "take_over"):
        learnt = data.take_over(weights.learnt)
    model.load_state_dict({name: given[name] for name in loaded}, strict=False)
    return Initialization(
        path,
        loaded,
        {name: sizes for name, sizes in resized.items() if name in loaded},
        new,
        [name for name in weights.tensors if name not in loaded],
        learnt,
        list(own),
        list(weights.tensors),
    )


def give_preprocessing(model: pl.LightningModule, data: Any) -> Sequence[str]:
    """Have data take over the preprocessing that pretrained weights of a task's backbone were trained with.

    Args:
        model: a task.
        data: where it is a `ClassificationData`, set up or not, it takes over what `Backbone.preprocessing` says.

    Returns:
        What was taken over.
    """
    known = _preprocessing_of(model)
    return (data.take_over({"preprocessing": known}) or ()) if known and hasattr(data, "take_over") else ()


def _made_of(there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Tell whether a preprocessing is the one that a pretrained network asks for; None is of no account."""
    return all(value is None or there.get(name) == value for name, value in here.items())


def _preprocessing_of(model: pl.LightningModule) -> Mapping[str, Any] | None:
    return getattr(getattr(model, "backbone", None), "preprocessing", None)


def _read(path: Path, model: nn.Module) -> Weights:
    """Read a file, whose names of earlier versions become those of now."""
    try:
        weights = read_weights(path)
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    rename_old_keys(weights.tensors, model)
    return weights


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what a module keeps in checkpoints, without what is no tensor."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _misfit(name: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """Say why a tensor can't be loaded, if it can't."""
    if name not in given:
        return ABSENT
    return None if given[name].shape == own[name].shape else SHAPE


def _resize_positions(weights: Weights, model: nn.Module) -> dict[str, str]:
    """Let the modules that have positions fit the saved ones to their number, in place; say from what to what."""
    backbone = weights.hyper_parameters.get("backbone")
    arguments = (backbone.get("init_args") if isinstance(backbone, Mapping) else None) or {}
    resized: dict[str, str] = {}
    for name, module in model.named_modules():
        if callable(resize := getattr(module, "resize_positions", None)):
            resized |= resize(weights.tensors, f"{name}." if name else "", arguments)
    return resized


def _of_other_classes(weights: Weights, model: Any, data: Any) -> dict[str, str]:
    """Return the names of a classifier's head if it is of other classes than the file's, or as many unnamed ones."""
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Linear) or "num_classes" not in getattr(model, "hparams", {}):
        return {}
    there, here = weights.learnt.get("classes"), getattr(data, "classes", None)
    saved = weights.tensors.get("head.weight")
    unnamed = saved is None or len(saved) == head.out_features
    same = list(there) == list(here) if there and here else unnamed
    return {} if same else dict.fromkeys(("head.weight", "head.bias"), CLASSES)


def _of_another_normalization(weights: Weights, model: pl.LightningModule) -> dict[str, str]:
    """Return the names of what normalizations learn, there and here, where they aren't the same ones."""
    there, here = (values.get("normalization") for values in (weights.hyper_parameters, model.hparams))
    paths = [str(spec["class_path"]) for spec in (there, here) if isinstance(spec, Mapping)]
    replaced = paths[1].rpartition(".")[2] if len(paths) == 2 and not same_class(*paths) else None
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, AttentionNormalization):
            continue
        own = {f"{name}.{key}": value for key, value in _tensors(module).items()}
        saved = {key: value for key, value in weights.tensors.items() if key.startswith(f"{name}.")}
        if mismatches(saved, own) or type(module).__name__ == replaced:
            found |= dict.fromkeys([*own, *saved], NORMALIZATION)
    return found


def _require_fit(
    path: Path,
    weights: Weights,
    model: nn.Module,
    wanted: Iterable[str],
    given: Mapping[str, Tensor],
    other: Mapping[str, str],
) -> None:
    """Refuse weights that are missing, unknown or of another shape, but for those whose difference is asked for."""
    own = _tensors(model)
    problems = mismatches(
        {name: value for name, value in given.items() if name not in other},
        {name: own[name] for name in wanted if name not in other},
    )
    if problems:
        arguments = [a for a in differing_arguments(weights.hyper_parameters, model) if a.startswith("backbone")]
        raise UserError(
            f"init_from {path}: it doesn't fit the network: {shown([*arguments, *problems], '; ')}. Give the network "
            "that it was trained with, names of the parts that are to be loaded (init_only), or init_strict false for "
            "all that fits"
        )
