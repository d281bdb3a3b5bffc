"""The embedded images: handwritten digits, without files or network."""

from typing import Any

import torch

from sinkformer_pl.data.images.base import ImageData, Images
from sinkformer_pl.data.images.preprocessing import ImageSize
from sinkformer_pl.data.source import Source
from sinkformer_pl.data.splitting import stratified_split

TEST_FRACTION = 0.2


class Digits(ImageData):
    """The 1797 handwritten digits, 8x8 in 17 grey values, that come with scikit-learn (`load_digits`).

    The fifth of them that is the test set, the same share of each class, is the same whatever the arguments.
    """

    def __init__(self, *, image_size: ImageSize = 8, channels: int = 1, **kwargs: Any) -> None:
        """Check the arguments.

        Args:
            image_size: side of the inputs in pixels, or [height, width].
            channels: 1 for grey, 3 for RGB.
            **kwargs: what `ImageData` takes.

        Raises:
            UserError: an argument out of its range.
        """
        super().__init__([str(digit) for digit in range(10)], image_size=image_size, channels=channels, **kwargs)

    def load(self) -> Source[Images]:
        """Read the digits from the installed package."""
        # Imported here, since it takes a second that no other source of data should cost.
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images / 16 * 255).round().to(torch.uint8)[:, None]
        targets = torch.from_numpy(digits.target)
        return Source(
            *(
                Images(images[chosen], targets[chosen], [f"digits/{index}" for index in chosen.tolist()])
                for chosen in stratified_split(targets, val_fraction=TEST_FRACTION, seed=0)
            )
        )
