"""From a raw sample to the input of a network, as evaluation does it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

from torch import Tensor


class Preprocessing(ABC):
    """Make the input of a network from a raw sample: a frozen dataclass of plain data, which checkpoints hold.

    Attributes:
        kind: name of the modality.
        from_data: the fields that are learnt from training data, rather than given.
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
