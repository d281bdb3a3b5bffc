"""From a raw sample to the input of a network, as evaluation does it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor


class Preprocessing(ABC):
    """Make the input of a network from a raw sample: a frozen dataclass of plain data, which checkpoints hold.

    Attributes:
        kind: name of the modality.
        from_data: the fields that come from training data, or with pretrained weights, rather than from arguments.
    """

    kind: ClassVar[str]
    from_data: ClassVar[Sequence[str]] = ()

    @abstractmethod
    def __call__(self, raw: Any, seed: int = 0) -> Tensor:
        """Return the input, without the dimension of a batch.

        Args:
            raw: the sample.
            seed: of what evaluation draws at random.
        """

    def plain(self) -> dict[str, Any]:
        """Return the fields and `kind`, from which `preprocessing_from` makes it again."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]


def warn_of_differences(preprocessing: Preprocessing, saved: Mapping[str, Any]) -> None:
    """Warn where a preprocessing isn't that with which a checkpoint's model was trained."""
    for name, value in preprocessing.plain().items():
        if name in saved and _listed(saved[name]) != _listed(value):
            rank_zero_warn(f"data.{name} is {value}; it was {saved[name]} where the checkpoint's model was trained")


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
