"""The protocol of a task: what the command line asks of a LightningModule beside Lightning's own methods."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from sinkformer_pl.factories import parameters_of, with_defaults


@runtime_checkable
class Task(Protocol):
    """A LightningModule that `--model NAME` can run; its attributes may be left out.

    Its `__init__` takes plain data, as a YAML file holds it: an argument whose annotation names a class, such as
    `Callable[[], AttentionNormalization]`, is given as {"class_path", "init_args"}, for `factories.as_factory`. It
    calls `self.save_hyperparameters()`, so that its checkpoints know their arguments. Batches of a
    `ClassificationData` are of type `Batch`, and `forward(inputs, mask)` is tried on a few samples before a run begins.

    Attributes:
        monitors: metrics that are logged each epoch, such as "val/loss"; the first one chooses the best checkpoint.
            Without, `monitor` may be any name, and the newest checkpoint is the best by default.
        minimized: those of them that are best when lowest, beside those with "loss" in their names.
        undirected: those of them that have no best.
        from_data: arguments that follow from the data, each with the data module's attribute: {"num_classes":
            "num_classes"}. One that has a default may be absent from the data.
    """

    monitors: ClassVar[Sequence[str]]
    minimized: ClassVar[Sequence[str]]
    undirected: ClassVar[Sequence[str]]
    from_data: ClassVar[Mapping[str, str]]


def monitors_of(task: Any) -> Sequence[str]:
    """Return the metrics that a task, or its class, says it logs each epoch; none if it doesn't say."""
    return getattr(task, "monitors", ())


def lowest_is_best(task: Any, monitor: str) -> bool:
    """Tell whether a metric of a task is best when lowest."""
    return "loss" in monitor or monitor in getattr(task, "minimized", ())


def arguments_from(data: Any, task: type) -> dict[str, Any]:
    """Return the arguments of a task that follow from its data.

    Raises:
        AttributeError: the data lacks one that has no default.
    """
    parameters = parameters_of(task)
    return {
        name: getattr(data, attribute)
        for name, attribute in getattr(task, "from_data", {}).items()
        if hasattr(type(data), attribute) or hasattr(data, attribute) or _required(parameters.get(name))
    }


def _required(parameter: inspect.Parameter | None) -> bool:
    return parameter is None or parameter.default is parameter.empty


def saved_arguments(checkpoint: Mapping[str, Any], task: type) -> dict[str, Any]:
    """Return the arguments that a checkpoint's task was made with.

    Args:
        checkpoint: its "hyper_parameters".
        task: its class, which says by an attribute `before` what checkpoints without an argument did, if that isn't
            the default.
    """
    return {**getattr(task, "before", {}), **checkpoint["hyper_parameters"]}


def made_with(checkpoint: Mapping[str, Any], task: Any) -> bool:
    """Tell whether a task has the arguments of a checkpoint, which lacks those that its version didn't know.

    Args:
        checkpoint: its "hyper_parameters".
        task: a LightningModule; arguments that the checkpoint lacks have their defaults.
    """
    now, hyper_parameters = dict(task.hparams), saved_arguments(checkpoint, type(task))
    return with_defaults(hyper_parameters, type(task) if now.keys() - hyper_parameters.keys() else None) == now
