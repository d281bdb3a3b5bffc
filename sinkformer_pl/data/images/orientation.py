"""Turn a photo upright by EXIF data that may be damaged where the pixels are whole."""

import io
from io import BufferedReader

from PIL import ExifTags, Image

_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_UNREADABLE = "sinkformer_pl_unreadable_exif"
_JPEG = b"\xff\xd8"
_APPLICATION, _COMMENT = range(0xE0, 0xF0), 0xFE


def open_image(stream: BufferedReader) -> Image.Image:
    """Open an image as Pillow does, but a JPEG also where its EXIF data keep Pillow from it."""
    try:
        return Image.open(stream)
    except Image.DecompressionBombError:
        raise
    except Exception:
        stream.seek(0)
        start = stream.read(2)
        rest, exif = _divided(start + stream.read()) if start == _JPEG else (b"", b"")
        if not exif:
            raise
    image = Image.open(io.BytesIO(rest))
    image.info |= {"exif": exif, _UNREADABLE: True}
    return image


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its orientation says; it stays as it is where that can't be read.

    Not by Pillow's `exif_transpose`, which writes the EXIF data anew, for which all of them must be readable.
    """
    image.load()
    method = _METHODS.get(_orientation(image))
    return image if method is None else image.transpose(method)


def has_damaged_exif(image: Image.Image) -> bool:
    """Tell whether EXIF data can't be read as a whole, or have no orientation that there is."""
    if not (content := image.info.get("exif")) or _UNREADABLE in image.info:
        return bool(content)
    try:
        # Anew: an image hides errors of its first reading.
        exif = Image.Exif()
        exif.load(content)
        exif.tobytes()  # follows all pointers
        return exif.get(ExifTags.Base.Orientation, 1) not in (1, *_METHODS)
    except Exception:
        return True


def _orientation(image: Image.Image) -> int:
    # Broken EXIF data make Pillow raise nearly anything; what was read before that counts, the next time.
    for _ in range(2):
        try:
            return image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:
            continue
    return 1


def _divided(content: bytes) -> tuple[bytes, bytes]:
    """Return a JPEG file without its EXIF data, and these."""
    kept, exif, place = [content[:2]], b"", 2
    while len(content) >= place + 4 and content[place] == 0xFF:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4])
        if marker not in _APPLICATION and marker != _COMMENT:
            break
        segment = content[place : place + 2 + length]
        if segment[4:10] == b"Exif\0\0":
            exif = segment[4:]
        else:
            kept.append(segment)
        place += 2 + length
    return b"".join(kept) + content[place:], exif
