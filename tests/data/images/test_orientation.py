"""Photos with damaged EXIF data, whose pixels are whole."""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sinkformer_pl.data.images.decoding import check_images, decode_image

ORIENTATION, EXIF, GPS, WIDTH_RESOLUTION, MAKER = 0x112, 0x8769, 0x8825, 0x11A, 0x10F
TEXT, UNSIGNED, SIGNED_BYTE, FLOAT = 2, 3, 6, 11

Entry = tuple[int, int, int, bytes]


def photo() -> bytes:
    buffer = io.BytesIO()
    down, across = np.mgrid[0:16, 0:24] * 10
    Image.fromarray(np.stack([down, across, 255 - down], axis=2).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


PHOTO = photo()


def segment(entries: list[Entry], *, count: int | None = None, start: int = 8, order: str = "<") -> bytes:
    """EXIF data of entries: tag, type, number of values, four bytes."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    body = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    return head + struct.pack(order + "H", len(entries) if count is None else count) + body + b"\0\0\0\0"


def with_exif(data: bytes) -> bytes:
    data = b"Exif\0\0" + data
    return PHOTO[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data + PHOTO[2:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "plain.jpg").write_bytes(PHOTO)
    return folder


UPRIGHT = (ORIENTATION, UNSIGNED, 1, b"\6\0\0\0")
DAMAGED = {
    "a pointer out of the data": [UPRIGHT, (EXIF, SIGNED_BYTE, 1, b"\xff\xff\xff\x7f")],
    "a name that is a number": [UPRIGHT, (MAKER, FLOAT, 1, struct.pack("<f", 0.5))],
    "a resolution that is an empty text": [
        UPRIGHT, (0x128, UNSIGNED, 1, b"\2\0\0\0"), (WIDTH_RESOLUTION, TEXT, 1, b"\0\0\0\0")
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_photo_is_turned_by_the_part_of_its_data_that_is_whole(folder, name):
    path = folder / "damaged.jpg"
    path.write_bytes(with_exif(segment(DAMAGED[name])))
    assert torch.equal(decode_image(path, 3), decode_image(folder / "plain.jpg", 3).rot90(-1, (1, 2)))
    with pytest.warns(UserWarning, match=r"1 of 2 image files have damaged EXIF data: .*damaged\.jpg; they are used"):
        check_images({"train": [folder / "plain.jpg"], "test": [path]})


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_so_is_an_image_of_another_format(folder, suffix):
    path = folder / f"damaged.{suffix}"
    exif = b"Exif\0\0" + segment(DAMAGED["a pointer out of the data"])
    with Image.open(folder / "plain.jpg") as image:
        image.save(path, exif=exif, lossless=True)
    with pytest.warns(UserWarning, match=r"1 of 1 image files have damaged EXIF data"):
        check_images({"train": [path]})
    assert torch.equal(decode_image(path, 3), decode_image(folder / "plain.jpg", 3).rot90(-1, (1, 2)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no TIFF header",
        segment([(ORIENTATION, FLOAT, 1, struct.pack("<f", float("nan")))]),
        segment([(ORIENTATION, UNSIGNED, 1, b"\x09\0\0\0")]),
        segment([UPRIGHT], start=2**32 - 1),
    ],
)
def test_a_photo_without_a_readable_orientation_stays_as_it_is(folder, data):
    path = folder / "damaged.jpg"
    path.write_bytes(with_exif(data))
    assert torch.equal(decode_image(path, 3), decode_image(folder / "plain.jpg", 3))


def test_whole_exif_data_are_no_reason_for_a_warning(folder):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif.get_ifd(EXIF)[0x9003] = "2020:01:01 00:00:00"
    exif.get_ifd(GPS)[1] = "N"
    path = folder / "whole.jpg"
    path.write_bytes(with_exif(exif.tobytes().removeprefix(b"Exif\0\0")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_images({"train": [path, folder / "plain.jpg"]})


TAGS = [ORIENTATION, EXIF, GPS, WIDTH_RESOLUTION, 0x11B, 0x128, MAKER, 0xA005, 0x927C, 0x201, 0x14A, 700]
VALUES = [struct.pack("<I", number) for number in (0, 1, 8, 14, 26, 1000, 2**31 - 1, 2**31, 2**32 - 1)]
ENTRIES = st.tuples(
    st.sampled_from(TAGS),
    st.integers(0, 19),
    st.sampled_from([0, 1, 2, 4, 5, 2**31, 2**32 - 1]),
    st.one_of(st.sampled_from(VALUES), st.binary(min_size=4, max_size=4)),
)


@settings(max_examples=60)
@pytest.mark.filterwarnings("ignore")
@given(
    entries=st.lists(ENTRIES, max_size=5),
    turned=st.booleans(),
    count=st.sampled_from([None, 3, 65535]),
    start=st.sampled_from([8, 8, 0, 7, 1000, 2**32 - 1]),
    order=st.sampled_from("<>"),
    cut=st.integers(0, 80),
    more=st.binary(max_size=30),
)
def test_any_exif_data_leave_the_pixels_usable(folder, entries, turned, count, start, order, cut, more):
    value = struct.pack(order + "HH", 6, 0)
    entries = [(ORIENTATION, UNSIGNED, 1, value)] * turned + entries
    data = segment(entries, count=count, start=start, order=order) + more
    path = folder / "generated.jpg"
    data = data[: len(data) - min(cut, 20)]
    path.write_bytes(with_exif(data))
    shown, plain = decode_image(path, 3), decode_image(folder / "plain.jpg", 3)
    assert torch.equal(shown.flatten().sort().values, plain.flatten().sort().values)
    if turned and start == 8 and len(data) >= 22 and not any(entry[0] == ORIENTATION for entry in entries[1:]):
        assert torch.equal(shown, plain.rot90(-1, (1, 2)))
    check_images({"train": [path]})
