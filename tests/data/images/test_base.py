"""What every source of images shares, on the embedded digits and on images of known values."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import transforms as v1

from sinkformer_pl.data.images.base import ImageData, Images
from sinkformer_pl.data.images.digits import Digits
from sinkformer_pl.data.sampling import Draw
from sinkformer_pl.data.source import Source
from sinkformer_pl.errors import UserError


class Given(ImageData):
    """Images that a test hands over."""

    def __init__(self, images: torch.Tensor | list[Path], *, targets: list[int] | None = None, **kwargs: Any) -> None:
        super().__init__(["a", "b"], **kwargs)
        targets = targets or [index % 2 for index in range(len(images))]
        self.part = Images(images, torch.tensor(targets), [str(index) for index in range(len(targets))])

    def load(self) -> Source:
        return Source(train=self.part, test=self.part)


def ready(module: ImageData) -> ImageData:
    module.setup()
    return module


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def raw(module: ImageData, inputs: torch.Tensor) -> torch.Tensor:
    """Undo the normalising: values in [0, 1]."""
    return inputs * module.std[:, None, None] + module.mean[:, None, None]


def epoch(module: ImageData, number: int = 0) -> list[torch.Tensor]:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(number)
    return [batch.inputs for batch in loader]


def test_digits_are_scikit_learns():
    module = Digits()
    assert module.classes == tuple("0123456789")
    assert module.datasets == {}
    ready(module)
    assert {split: len(dataset) for split, dataset in module.datasets.items()} == {
        "train": 1294,
        "val": 144,
        "test": 359,
    }
    digits = load_digits()
    seen = []
    for split, dataset in module.datasets.items():
        for index, name in enumerate(module.names(split)):
            sample, number = dataset[index], int(name.removeprefix("digits/"))
            seen.append(number)
            assert sample.target == digits.target[number]
            assert sample.inputs.shape == (1, 8, 8)
            expected = torch.from_numpy(digits.images[number] / 16).float()
            torch.testing.assert_close(raw(module, sample.inputs)[0], expected, atol=0.003, rtol=0)
    assert sorted(seen) == list(range(1797))


def test_the_test_set_of_the_digits_is_fixed_and_holds_each_class_in_proportion():
    one, other = ready(Digits()), ready(Digits(seed=7, val_fraction=0.3, train_size=50))
    assert one.names("test") == other.names("test")
    assert one.names("val") != other.names("val")
    counts = torch.bincount(one.datasets["test"].targets)
    assert counts.min() >= 34
    assert counts.max() <= 37


def test_batches_are_images_without_a_mask():
    batch = next(iter(ready(Digits(batch_size=5)).train_dataloader()))
    assert batch.inputs.shape == (5, 1, 8, 8)
    assert batch.inputs.dtype == torch.float32
    assert batch.mask is None


def test_training_inputs_have_mean_zero_and_deviation_one_in_each_channel():
    images = (noise(400, 3, 12, 12) * torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1)).byte() + 30
    module = ready(Given(images, image_size=12, channels=3))
    inputs = torch.stack([module.datasets["train"][index].inputs for index in range(360)])
    torch.testing.assert_close(inputs.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(inputs.square().mean(dim=(0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    # From training images alone, and whole ones at that.
    chosen = [int(name) for name in module.names("train")]
    torch.testing.assert_close(module.mean, (images[chosen] / 255).mean(dim=(0, 2, 3)))


def test_statistics_depend_on_the_arguments_alone():
    one = ready(Given(noise(1500, 1, 4, 4), image_size=4, channels=1))
    torch.manual_seed(5)
    other = ready(Given(noise(1500, 1, 4, 4), image_size=4, channels=1, crop_area=0.3, flip=True, crop_padding=2))
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.std, other.std)
    assert not torch.equal(one.mean, ready(Given(noise(1500, 1, 4, 4), image_size=4, channels=1, seed=1)).mean)


def test_images_of_one_colour_stay_finite():
    module = ready(Given(torch.full((20, 3, 4, 4), 7, dtype=torch.uint8), image_size=4))
    assert torch.equal(module.std, torch.ones(3))
    torch.testing.assert_close(module.datasets["train"][0].inputs, torch.zeros(3, 4, 4))


def test_evaluation_resizes_the_shorter_side_and_cuts_out_the_centre(tmp_path):
    # The oracle resizes with Pillow, not with torch.
    down, across = np.mgrid[0:60, 0:100]
    files = []
    for index in range(4):
        picture = 127 + 120 * np.sin((down + 2 * across)[..., None] / (6 + index) + np.arange(3))
        files.append(tmp_path / f"{index}.png")
        Image.fromarray(picture.astype(np.uint8)).save(files[-1])
    module = ready(Given(files, image_size=24))
    oracle = v1.Compose([v1.Resize(24), v1.CenterCrop(24), v1.ToTensor()])
    for index, file in enumerate(files):
        inputs = module.datasets["test"][index].inputs
        assert inputs.shape == (3, 24, 24)
        torch.testing.assert_close(raw(module, inputs), oracle(Image.open(file)), atol=1.5 / 255, rtol=0)


def test_colour_is_converted_in_memory():
    grey = ready(Given(noise(20, 1, 4, 4), image_size=4, channels=3))
    assert torch.equal(grey.datasets["test"][3].inputs[0], grey.datasets["test"][3].inputs[2])
    colour = noise(20, 3, 4, 4)
    module = ready(Given(colour, image_size=4, channels=1))
    luma = (colour[3] / 255 * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(dim=0, keepdim=True)
    torch.testing.assert_close(raw(module, module.datasets["test"][3].inputs), luma, atol=1.1 / 255, rtol=0)


def test_nothing_is_random_unless_asked_for():
    module = ready(Given(noise(20, 3, 4, 4), image_size=4, num_workers=0))
    shown = draws(module, 3)
    assert torch.equal(shown[0], shown[1])
    assert torch.equal(shown[0], shown[2])


def draws(module: ImageData, count: int = 60) -> list[torch.Tensor]:
    """One training image, as different draws show it; values in [0, 1]."""
    return [raw(module, module.datasets["train"].inputs(Draw(0, seed))) for seed in range(count)]


def first(module: ImageData) -> torch.Tensor:
    return raw(module, module.datasets["test"][int(module.names("train")[0])].inputs)


def test_flip_mirrors_half_of_the_training_images():
    module = ready(Given(noise(20, 3, 6, 6), image_size=6, flip=True))
    original = first(module)
    mirrored = [torch.equal(image, original.flip(2)) for image in draws(module)]
    kept = [torch.equal(image, original) for image in draws(module)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 15 < sum(mirrored) < 45


def test_padding_shifts_within_its_range_and_black_moves_in():
    module = ready(Given(noise(20, 1, 6, 6), image_size=6, channels=1, crop_padding=2))
    padded = torch.nn.functional.pad(first(module), (2, 2, 2, 2))
    shifts = {(i, j): padded[:, i : i + 6, j : j + 6] for i in range(5) for j in range(5)}
    found = [
        [place for place, image in shifts.items() if torch.allclose(image, shown, atol=1e-5)] for shown in draws(module)
    ]
    assert all(found)
    assert len({places[0] for places in found}) > 15


def test_crop_area_shows_parts_of_the_asked_size():
    # A ramp shows by its range how much of the width was cut out.
    ramp = torch.arange(0, 240, 5, dtype=torch.uint8).expand(20, 1, 48, 48)
    module = ready(Given(ramp, image_size=48, channels=1, crop_area=0.25))
    widths = torch.stack([(image.max() - image.min()) * 255 / 235 for image in draws(module)])
    assert widths.min() < 0.65
    assert widths.max() > 0.85
    assert widths.min() > 0.25**0.5 * 0.75**0.5 - 0.06


@pytest.mark.parametrize("image_size", [8, 160])  # Small batches come as messages, large ones through shared memory.
def test_training_is_the_same_for_any_number_of_workers(image_size):
    arguments = dict(
        image_size=image_size, flip=True, crop_padding=1, crop_area=0.5, train_size=60, val_fraction=0.5, batch_size=16
    )
    alone, helped = ready(Digits(**arguments)), ready(Digits(**arguments, num_workers=2))
    for number in (0, 1):
        assert all(map(torch.equal, epoch(alone, number), epoch(helped, number)))
    assert not torch.equal(epoch(alone, 0)[0], epoch(alone, 1)[0])


def test_the_generators_of_the_run_are_left_alone():
    module = ready(Digits(flip=True, crop_padding=1))
    before = torch.get_rng_state()
    shown = module.datasets["train"][3].inputs
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    assert torch.equal(module.datasets["train"][3].inputs, shown)


def test_datasets_can_be_sent_to_a_process():
    dataset = ready(Digits(flip=True)).datasets["train"]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[3].inputs, dataset[3].inputs)


def test_train_size_keeps_a_seeded_part_of_each_class():
    all_of_them, some = ready(Digits()), ready(Digits(train_size=100))
    assert some.names("val") == all_of_them.names("val")
    assert len(some.datasets["train"]) == 100
    assert torch.bincount(some.datasets["train"].targets).min() >= 9
    assert set(some.names("train")) < set(all_of_them.names("train"))
    assert some.names("train") == ready(Digits(train_size=100)).names("train")
    assert some.names("train") != ready(Digits(train_size=100, seed=1)).names("train")
    assert len(ready(Digits(train_size=1290)).datasets["train"]) == 1290
    assert ready(Digits(train_size=1294)).names("train") == all_of_them.names("train")
    with pytest.raises(UserError, match=r"data\.train_size is 1295: there are 1294"):
        ready(Digits(train_size=1295))


def test_train_size_keeps_rare_classes():
    module = ready(Given(noise(200, 3, 4, 4), targets=[0] * 197 + [1] * 3, image_size=4, train_size=5))
    assert torch.bincount(module.datasets["train"].targets).tolist() == [4, 1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_size", 0),
        ("channels", 2),
        ("crop_area", 0.0),
        ("crop_area", 1.5),
        ("crop_area", float("nan")),
        ("crop_padding", -1),
        ("train_size", 9),
    ],
)
def test_arguments_out_of_range_are_refused_at_construction(key, value):
    with pytest.raises(UserError, match=rf"data\.{key} is {value}"):
        Digits(**{key: value})
