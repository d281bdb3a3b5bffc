"""Decoding of image files, good and bad."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sinkformer_pl.data.images.decoding import check_images, decode_image
from sinkformer_pl.errors import UserError


def colours(height: int = 6, width: int = 9, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int = 40, width: int = 60) -> np.ndarray:
    down, across = np.mgrid[0:height, 0:width]
    return np.stack([down * 255 / height, across * 255 / width, 128 + 0 * down], axis=2).astype(np.uint8)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(2, 0, 1)


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tiff", "webp"])
def test_every_lossless_format_comes_back(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(colours()).save(path, lossless=True)
    assert torch.equal(decode_image(path, 3), tensor(colours()))


def test_grey_and_colour_become_each_other(tmp_path):
    grey, path = colours(channels=1), tmp_path / "image.png"
    Image.fromarray(grey[..., 0]).save(path)
    assert torch.equal(decode_image(path, 1), tensor(grey))
    assert torch.equal(decode_image(path, 3), tensor(grey).expand(3, -1, -1))
    Image.fromarray(colours()).save(path)
    luma = colours() @ np.array([0.299, 0.587, 0.114])
    assert np.abs(decode_image(path, 1)[0].numpy() - luma).max() <= 0.51


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled(tmp_path, suffix, channels):
    values = np.linspace(0, 65535, 54).astype(np.uint16).reshape(6, 9)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(values).save(path)
    image = decode_image(path, channels)
    assert image.dtype == torch.float32
    assert image.shape == (channels, 6, 9)
    torch.testing.assert_close(image, torch.from_numpy(values / np.float32(65535)).expand(channels, -1, -1))
    assert image.max() == 1


def test_grey_values_of_unknown_scale_are_refused(tmp_path):
    path = tmp_path / "image.tiff"
    Image.fromarray(np.full((4, 4), 0.25, dtype=np.float32)).save(path)
    assert torch.equal(decode_image(path, 1), torch.full((1, 4, 4), 0.25))
    for values in (np.full((4, 4), 255.0, dtype=np.float32), np.full((4, 4), 70000, dtype=np.int32)):
        Image.fromarray(values).save(path)
        with pytest.raises(UserError, match=r"image.tiff: can't be decoded \(grey values outside of 0 to"):
            decode_image(path, 1)


def test_cmyk_becomes_rgb(tmp_path):
    path = tmp_path / "image.jpg"
    Image.fromarray(smooth()).convert("CMYK").save(path, quality=95)
    difference = decode_image(path, 3).int() - tensor(smooth()).int()
    assert difference.abs().float().mean() < 3


def test_palettes_keep_their_colours_and_transparency_is_white(tmp_path):
    path = tmp_path / "image.png"
    image = Image.new("P", (4, 3))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((2, 1), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image.save(path)
        assert decode_image(path, 3)[:, 1, 2].tolist() == [0, 0, 255]
        assert decode_image(path, 3)[:, 0, 0].tolist() == [255, 0, 0]
        image.save(path, transparency=bytes([255, 0]))
        assert decode_image(path, 3)[:, 1, 2].tolist() == [255, 255, 255]
        assert decode_image(path, 3)[:, 0, 0].tolist() == [255, 0, 0]


def test_transparency_is_blended(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGBA", (3, 3), (0, 0, 0, 51)).save(path)
    assert set(decode_image(path, 3).flatten().tolist()) == {204}
    Image.new("LA", (3, 3), (0, 0)).save(path)
    assert set(decode_image(path, 1).flatten().tolist()) == {255}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(tmp_path, orientation):
    # What a viewer has to do to the stored picture, from the EXIF standard.
    upright = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: np.transpose(a, (1, 0, 2)),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(np.transpose(a, (1, 0, 2)), 2),
        8: np.rot90,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image.png"
    Image.fromarray(colours()).save(path, exif=exif)
    expected = upright[orientation](colours())
    assert torch.equal(decode_image(path, 3), tensor(expected.copy()))


def jpeg(**options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(colours(64, 64)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(colours(64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


BROKEN = {
    "truncated.jpg": (jpeg()[:-300], "truncated"),
    "progressive.jpg": (jpeg(progressive=True)[:-300], "truncated"),
    "truncated.png": (png()[:-300], "can't be decoded"),
    "damaged.png": (png().replace(b"IDAT", b"IDAX"), "can't be decoded"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "no image"),
    "empty.jpg": (b"", "no image"),
    "pixel.gif": (b"GIF89a\x01\0\x01\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;", "1x1 pixels"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_before_training_and_when_decoded(tmp_path, name):
    content, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    for look in (lambda: decode_image(path, 3), lambda: check_images({"train": [path]})):
        with pytest.raises(UserError, match=message) as error:
            look()
        assert str(error.value).startswith(f"{path}: ")
        assert str(error.value).endswith("replace or remove it") or "replace or remove the file" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_missing_file_and_a_huge_one_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"image.png: no such file"):
        decode_image(tmp_path / "image.png", 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    Image.fromarray(colours()).save(tmp_path / "image.png")
    with pytest.raises(UserError, match=r"image.png: can't be decoded \(.*pixels"):
        decode_image(tmp_path / "image.png", 3)


def test_all_broken_files_are_counted(tmp_path):
    files = []
    for name, (content, _) in BROKEN.items():
        files.append(tmp_path / name)
        files[-1].write_bytes(content)
    with pytest.raises(
        UserError, match=rf"{files[0]}: .*; 6 more can't be used: {files[1]}, {files[2]}, {files[3]}, ..."
    ):
        check_images({"train": files[:3], "test": files[3:]})


def test_copies_across_parts_are_counted(tmp_path):
    def write(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    same_size = bytearray(png())
    other = write("other.png", png())
    train = [write("a.png", png()), write("b.jpg", jpeg())]
    test = [write("c.jpg", jpeg()), write("d.jpg", jpeg(quality=30))]
    with pytest.warns(UserWarning, match=rf"1 of 2 test files have the same .*: {test[0]} = {train[1]}; remove"):
        check_images({"train": train, "test": test})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_images({"train": train, "test": test[1:]})
        Image.fromarray(255 - colours(64, 64)).save(other)
        content = other.read_bytes()
        # Same size, other bytes: a comment behind the end of the image.
        longest = max(len(content), len(same_size))
        train[0].write_bytes(bytes(same_size).ljust(longest, b"\0"))
        other.write_bytes(content.ljust(longest, b"\0"))
        check_images({"train": train, "test": [other]})
