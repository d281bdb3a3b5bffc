"""Metrics of torchmetrics, or of the user's own, by name.

A name without `Multiclass` or `Multilabel` is the class of the task, with its defaults: `F1Score` is the mean of the
classes' F1. All samples of an epoch are given at once, in their order, on every process: the same figures for any
batches and any number of processes.
"""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torchmetrics.classification
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryPrecisionRecallCurve,
    MulticlassPrecisionRecallCurve,
    MultilabelPrecisionRecallCurve,
)

from sinkformer_pl.errors import UserError, did_you_mean
from sinkformer_pl.factories import Spec, import_class, parameters_of, plain, public_path, read_calls

SUPPLIED = ("task", "num_classes", "num_labels")
"""Arguments that follow from the data."""

CURVES = (BinaryPrecisionRecallCurve, MulticlassPrecisionRecallCurve, MultilabelPrecisionRecallCurve)
"""Metrics whose figure of a class needs samples of it and others; torchmetrics takes 0 for those without."""

_PREFIXES = ("Multiclass", "Multilabel", "Binary")


class NamedMetric:
    """A metric of probabilities and targets.

    Attributes:
        name: what it is logged as, behind the stage.
        higher_is_better: whether it is, as its class says; None if neither is.
    """

    def __init__(self, name: str, spec: Mapping[str, Any], num_classes: int, *, multi_label: bool) -> None:
        """Find the class, and try it.

        Args:
            name: what it is logged as.
            spec: class and arguments, as of `as_specs`.
            num_classes: C.
            multi_label: whether targets are (n, C).

        Raises:
            UserError: no such metric for this task, a wrong argument, or figures that are neither one number nor one a
                class.
        """
        self.name, self._multi_label, self._num_classes = name, multi_label, num_classes
        self._cls, arguments = _class_of(spec["class_path"], multi_label=multi_label), dict(spec["init_args"])
        parameters = parameters_of(self._cls)
        if wrong := [key for key in arguments if key not in parameters]:
            valid = [key for key in parameters if key not in SUPPLIED]
            raise UserError(
                f"model.metrics {name}: {self._cls.__name__} has no argument {wrong[0]}"
                f"{did_you_mean(wrong[0], valid)}; it takes {', '.join(valid) or 'none'}"
            )
        if given := [key for key in arguments if key in SUPPLIED]:
            raise UserError(f"model.metrics {name}.{given[0]} can't be set: it follows from the data; leave it out")
        self._arguments = arguments | {key: num_classes for key in SUPPLIED[1:] if key in parameters}
        self._binary = self._cls.__module__.startswith("torchmetrics.") and self._cls.__name__.startswith("Binary")
        if self._binary and (multi_label or num_classes != 2):
            bare = self._cls.__name__.removeprefix("Binary")
            raise UserError(f"model.metrics {name}: it is of two classes, one a sample; give {bare}")
        # Of its classes, since torchmetrics takes those without samples into the mean.
        average = arguments.get("average", parameters["average"].default) if "average" in parameters else None
        self._average = average if issubclass(self._cls, CURVES) and average in ("macro", "weighted") else None
        if self._average:
            self._arguments["average"] = "none"
        self.higher_is_better = self._cls.higher_is_better
        self._try()

    def __call__(self, probabilities: Tensor, target: Tensor) -> Tensor:
        """Return the figure of some samples, a float32 scalar, or (C,) for each class; NaN for what has no figure.

        Args:
            probabilities: (n, C) float32.
            target: (n,) int64, or of multi-label data (n, C) of 0 and 1.
        """
        metric: Metric = self._cls(**self._arguments).to(probabilities.device)
        if self._multi_label:
            target = (target > 0.5).long()
        with warnings.catch_warnings(action="ignore"):  # of classes without samples
            # A forward pass is of this process alone.
            value = metric(probabilities[:, 1] if self._binary else probabilities, target)
        if not isinstance(value, Tensor) or value.shape not in ((), (self._num_classes,)):
            what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"model.metrics {self.name}: its figure is {what}; give a metric of one number")
        return self._with_samples(value.float(), target) if issubclass(self._cls, CURVES) else value.float()

    def _with_samples(self, value: Tensor, target: Tensor) -> Tensor:
        """Return the figure of a curve, from the classes that some samples are of and some aren't."""
        counts = target.sum(0) if self._multi_label else target.bincount(minlength=self._num_classes)
        known = (counts > 0) & (counts < len(target))
        if self._binary:
            return value.where(known[1], torch.nan)
        if value.ndim:
            value = value.where(known, torch.nan)
            if self._average == "macro":
                return value.nanmean()
            if self._average == "weighted":
                weights = counts.where(known, 0)
                return (value.nan_to_num() * weights).sum() / weights.sum()
        return value

    def _try(self) -> None:
        count = self._num_classes
        probabilities = (0.5 * torch.eye(count) + 0.5 / count).repeat(2, 1)
        target = torch.eye(count).repeat(2, 1) if self._multi_label else torch.arange(count).repeat(2)
        try:
            self(probabilities, target)
        except UserError:
            raise
        except Exception as error:  # A class of the user's own can raise anything.
            reason = " ".join(str(error).split())
            raise UserError(f"model.metrics {self.name}: {reason or type(error).__name__}") from error


def as_specs(given: str | Sequence[Any]) -> list[Spec]:
    """Write metrics as plain data: class and arguments of each.

    Args:
        given: names and calls, "F1Score, AUROC(average=weighted)"; or a list of these, of specs, of classes and of
            `functools.partial`s of classes.

    Raises:
        UserError: it can't be read.
        TypeError: something else, or an argument that isn't plain data.
    """
    if isinstance(given, str) or all(isinstance(one, str) for one in given):
        # YAML has divided a list of calls at the commas within them, too.
        return _read(given if isinstance(given, str) else ", ".join(given))
    return [spec for one in given for spec in (_read(one) if isinstance(one, str) else [_as_spec(one)])]


def named_metrics(specs: Sequence[Spec], num_classes: int, *, multi_label: bool) -> list[NamedMetric]:
    """Make metrics of their specs; those of one class but the first have their arguments in their names.

    Raises:
        UserError: what `NamedMetric` refuses, or one that stands there twice.
    """
    metrics: dict[str, NamedMetric] = {}
    for place, spec in enumerate(specs):
        name = spec["class_path"].rpartition(".")[2]
        if spec in specs[:place]:
            raise UserError(f"model.metrics: {name} stands there twice; name each once")
        if name in metrics:
            name += f"({', '.join(f'{key}={value}' for key, value in spec['init_args'].items())})"
        metrics[name] = NamedMetric(name, spec, num_classes, multi_label=multi_label)
    return list(metrics.values())


def _read(text: str) -> list[Spec]:
    try:
        return read_calls(text)
    except ValueError:
        raise UserError(
            f"model.metrics {text}: expected names with commas between, such as 'F1Score, AUROC(average=weighted)'"
        ) from None


def _as_spec(one: Any) -> Spec:
    if isinstance(one, Mapping):
        if one.keys() - {"class_path", "init_args"} or not isinstance(one.get("class_path"), str):
            raise UserError(f"model.metrics {dict(one)}: write class_path: NAME and init_args: below it")
        return {"class_path": one["class_path"], "init_args": dict(one.get("init_args") or {})}
    cls, arguments = (one.func, one.keywords) if isinstance(one, partial) and not one.args else (one, {})
    if not (inspect.isclass(cls) and issubclass(cls, Metric)):
        raise TypeError(f"metrics: expected names or classes of metrics, got {one!r}")
    return {"class_path": public_path(cls), "init_args": plain(arguments, cls.__name__)}


def _class_of(path: str, *, multi_label: bool) -> type[Metric]:
    head, _, name = path.rpartition(".")
    bare = next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
    known = torchmetrics.classification.__all__
    of_library = head.partition(".")[0] in ("", "torchmetrics") and (name in known or f"Multilabel{name}" in known)
    if of_library:
        wanted = ("Multilabel" if multi_label else "Multiclass") + bare
        chosen = name if name.startswith("Binary") else wanted
        if chosen not in known or (name != bare and name != chosen):
            what = "any number of classes" if multi_label else "one class"
            others = _names(multi_label)
            raise UserError(f"model.metrics {name}: torchmetrics has none for samples of {what}; it has {others}")
        return getattr(torchmetrics.classification, chosen)
    if head:
        cls = import_class(path)
    else:
        own = {cls.__name__: cls for cls in _subclasses(Metric) if not cls.__module__.startswith("torchmetrics.")}
        if name not in own:
            names = [*_names(multi_label).split(", "), *own]
            raise UserError(
                f"model.metrics {name}: no metric of this name{did_you_mean(name, names)}; give one of "
                f"{_names(multi_label)}, or the dotted path of a class"
            )
        cls = own[name]
    if not issubclass(cls, Metric):
        raise UserError(f"model.metrics {path}: no torchmetrics.Metric; give one")
    return cls


def _names(multi_label: bool) -> str:
    prefix = "Multilabel" if multi_label else "Multiclass"
    return ", ".join(
        name.removeprefix(prefix) for name in torchmetrics.classification.__all__ if name.startswith(prefix)
    )


def _subclasses(base: type) -> Iterator[type]:
    children: list[type] = type.__subclasses__(base)
    for cls in children:
        yield cls
        yield from _subclasses(cls)
