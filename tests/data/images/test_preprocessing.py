"""Framing of images of any shape."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from sinkformer_pl.data.images.preprocessing import framed
from tests import commands

# Prints by how many megabytes the largest memory grows.
MEASURE = """
import resource
from pathlib import Path
from PIL import Image
from sinkformer_pl.data.images.preprocessing import ImagePreprocessing

Image.new("{mode}", {size}).save("long.png")
preprocessing = ImagePreprocessing(224, {channels}, [0.5] * {channels}, [1.0] * {channels})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert preprocessing(Path("long.png")).shape == ({channels}, 224, 224)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize(
    ("mode", "size", "channels"), [("L", (65000, 2), 3), ("RGB", (2, 65000), 3), ("I;16", (30000, 3), 1)]
)
def test_memory_is_bounded_by_the_size_asked_for(tmp_path, mode, size, channels):
    done = commands.run("-c", MEASURE.format(mode=mode, size=size, channels=channels), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (20, 80), (80, 20), (33, 33), (16, 16)])
def test_images_of_ordinary_shapes_are_resized_as_a_whole(height, width):
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = v2.functional.center_crop(v2.functional.resize(image, [16]), [16])
    assert torch.equal(framed(image, 16), whole)


@pytest.mark.parametrize("transposed", [False, True])
def test_of_a_long_image_the_centre_is_seen(transposed):
    across, down = np.meshgrid(np.arange(400), np.arange(20))
    wave = 127 + 120 * np.sin(across / 9 + down / 5)
    image = torch.from_numpy(wave.T.copy() if transposed else wave)[None].float() / 255
    whole = v2.functional.center_crop(v2.functional.resize(image, [16]), [16])
    assert framed(image, 16).shape == (1, 16, 16)
    torch.testing.assert_close(framed(image, 16), whole, atol=2e-3, rtol=0)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (31, 90), (300, 20)])
def test_an_image_covers_inputs_of_unequal_sides_in_its_own_proportions(shape):
    """A ramp keeps its slopes: neither side is stretched more than the other, and the centre stays the centre."""
    height, width = shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centre = (height - 1) / 2, (width - 1) / 2
    image = torch.stack([rows - centre[0], columns - centre[1]]).float()
    framed_image = framed(image, (14, 10))
    assert framed_image.shape == (2, 14, 10)
    scale = max(14 / height, 10 / width)
    inner = framed_image[:, 2:-2, 2:-2]
    torch.testing.assert_close(inner[0].diff(dim=0).mean(), torch.tensor(1 / scale), rtol=0.08, atol=0)
    torch.testing.assert_close(inner[1].diff(dim=1).mean(), torch.tensor(1 / scale), rtol=0.08, atol=0)
    assert inner.mean(dim=(1, 2)).abs().max() <= 1 / scale


def test_equal_sides_are_framed_as_torchvision_does():
    image = torch.randint(0, 256, (3, 37, 53), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = v2.functional.center_crop(v2.functional.resize(image, [16]), [16])
    assert torch.equal(framed(image, 16), expected)
    assert torch.equal(framed(image, (16, 16)), expected)
