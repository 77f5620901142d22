"""Reads images as RGB arrays."""

from __future__ import annotations

import functools
import io
import os
import stat
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Final

import numpy as np
from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as PILImage

from vlmenv.compat.pillow import open_file
from vlmenv.core.coordinates import ResizeRule
from vlmenv.core.errors import DataError
from vlmenv.core.spaces import Image, blank_image, is_blank

MOST_PIXELS: Final = 89_478_485
"""Of an image; Pillow warns of more, since a file of some kilobytes may unpack to gigabytes."""
FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF", "ICO", "TGA")
"""Supported formats. Pillow knows some 40, and draws EPS by an external program."""

_LOADING = threading.Lock()
_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    PILImage.DecompressionBombError,
)


Size = tuple[int, int]
"""Width and height in pixels."""


def load_image(ref: str | bytes | PILImage.Image, place: str, bound: ResizeRule | None = None) -> tuple[Image, Size]:
    """Reads an image: EXIF orientation applied, transparency composed on white.

    Args:
        ref: A regular file's path, the bytes of one, or a picture.
        place: Where it is asked for, as file and line, for the error message.
        bound: Rule for images with more than `bound.max_pixels` pixels: they are decoded at `bound.size`. Default: all
            images are decoded as they are.

    Returns:
        The image, and its full width and height.

    Raises:
        DataError: It is missing, is no image that can be read, is of none of `FORMATS`, or has over `MOST_PIXELS`.
            (A JPEG may have more if it is decoded at fewer.)
    """
    with _explained(ref, place):
        if isinstance(ref, PILImage.Image):
            _check_format(ref)
            _check_pixels(ref)
            with _LOADING:  # a picture reads its file when it is first looked at, and rows may share one
                ref.load()
            shown, full = _shown(ref, bound)
            return np.array(shown), full
        with open_image(ref) as picture:
            shown, full = _shown(picture, bound)
            return np.asarray(shown), full


def outline_image(ref: str | bytes | PILImage.Image, place: str, bound: ResizeRule | None = None) -> tuple[Image, Size]:
    """As `load_image`, but with a blank image of the same size, see `blank_image`: only the header is read.

    Raises:
        DataError: As for `load_image`, as far as a header tells.
    """
    with _explained(ref, place):
        if isinstance(ref, PILImage.Image):
            full, target = _sizes(ref, bound)
            _check_pixels(ref)
        else:
            with open_image(ref) as picture:
                full, target = _fitted(picture, bound)
        return blank_image(*target), full


@contextmanager
def _explained(ref: str | bytes | PILImage.Image, place: str) -> Iterator[None]:
    """Turns what reading an image raises into a DataError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{place}: there is no image {str(ref)[:200]}") from None
    except _BROKEN as error:
        name = str(ref)[:200] if isinstance(ref, str) else f"an image within the row ({type(ref).__name__})"
        raise DataError(f"{place}: {name} cannot be read as an image: {error}") from error


def bounded_size(width: int, height: int, bound: ResizeRule | None) -> Size:
    """The width and height at which `load_image` gives an image of `width` x `height`."""
    return (width, height) if bound is None or width * height <= bound.max_pixels else bound.size(width, height)


def _shown(picture: PILImage.Image, bound: ResizeRule | None) -> tuple[PILImage.Image, Size]:
    """A picture as it is shown: turned, of three colours, and within the bound; and its full size."""
    turn = _turn(picture)
    full, target = _fitted(picture, bound)
    picture.load()
    if target != full:
        picture = _scaled(picture, target[::-1] if turn in _SIDEWAYS else target)
    return _to_rgb(picture.transpose(_TURNS[turn]) if turn in _TURNS else picture), full


def _fitted(picture: PILImage.Image, bound: ResizeRule | None) -> tuple[Size, Size]:
    """As `_sizes`; a JPEG will be decoded at a half, a quarter or an eighth, as far as the target allows.

    Raises:
        ValueError: There are too many pixels to decode.
    """
    full, target = _sizes(picture, bound)
    if target != full:
        picture.draft(None, target[::-1] if _turn(picture) in _SIDEWAYS else target)
    _check_pixels(picture)
    return full, target


def _sizes(picture: PILImage.Image, bound: ResizeRule | None) -> tuple[Size, Size]:
    """The full size of a picture as it is shown, and its size within the bound."""
    full = picture.size[::-1] if _turn(picture) in _SIDEWAYS else picture.size
    return full, bounded_size(*full, bound)


def _check_pixels(picture: PILImage.Image) -> None:
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, more than {MOST_PIXELS:,}: scale it down")


def _scaled(picture: PILImage.Image, size: tuple[int, int]) -> PILImage.Image:
    direct = picture.mode in ("RGBA", "LA") or (picture.mode in ("RGB", "L") and not picture.has_transparency_data)
    return (picture if direct else _to_rgb(picture)).resize(size, PILImage.Resampling.BICUBIC)


def image_size(ref: str | bytes | PILImage.Image) -> tuple[int, int]:
    """Width and height of an image; reads no more of it than that takes.

    Raises:
        ValueError: It cannot be read.
    """
    if isinstance(ref, PILImage.Image):
        return ref.size
    try:
        with open_image(ref) as picture:
            return picture.size
    except _BROKEN as error:
        raise ValueError(f"an image cannot be read: {error}") from error


def shown_size(ref: str | bytes | PILImage.Image) -> tuple[int, int]:
    """Width and height of an image as `load_image` turns it, by its EXIF orientation.

    Raises:
        ValueError: It cannot be read.
    """
    if isinstance(ref, PILImage.Image):
        return _sizes(ref, None)[0]
    try:
        with open_image(ref) as picture:
            return _sizes(picture, None)[0]
    except _BROKEN as error:
        raise ValueError(f"an image cannot be read: {error}") from error


def exif_orientation(ref: str | bytes | PILImage.Image | None) -> int:
    """The EXIF orientation of an image, from 1 to 8; 1 if there is none.

    Raises:
        ValueError: The image cannot be read.
    """
    if ref is None:
        return 1
    if isinstance(ref, PILImage.Image):
        return _orientation(ref)
    try:
        with open_image(ref) as picture:
            return _orientation(picture)
    except _BROKEN as error:
        raise ValueError(f"an image cannot be read: {error}") from error


_SIDEWAYS: Final = (5, 6, 7, 8)
_TURNS: Final = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}
"""What turns an image as its EXIF orientation says."""


def _orientation(picture: PILImage.Image) -> int:
    exif = PILImage.Image.getexif(picture) if _tells_early(picture) else picture.getexif()
    found = exif.get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def _turn(picture: PILImage.Image) -> int:
    """The EXIF orientation that is still to be obeyed: Pillow turns a TIFF itself, and tells its size as turned."""
    return 1 if picture.format == "TIFF" else _orientation(picture)


def _tells_early(picture: PILImage.Image) -> bool:
    """True for a PNG without a word after its pixels; for others Pillow would decode these to look for one."""
    stream = open_file(picture)
    if picture.format != "PNG" or stream is None:
        return False
    start = stream.tell()
    try:
        stream.seek(8)
        begun = False
        while len(head := stream.read(8)) == 8 and head[4:] != b"IEND":
            begun = begun or head[4:] == b"IDAT"
            if begun and head[4:] in _WORDS:
                return False
            stream.seek(int.from_bytes(head[:4]) + 4, os.SEEK_CUR)
        return True
    finally:
        stream.seek(start)


_WORDS: Final = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""Chunks of a PNG that may hold its orientation."""


@contextmanager
def open_image(ref: str | bytes) -> Iterator[PILImage.Image]:
    """Opens a file's path or bytes as an image whose format and size are known, but no pixel.

    Raises:
        OSError: There is no such file.
        ValueError: It is no regular file, or of none of `FORMATS`.
    """
    with io.BytesIO(ref) if isinstance(ref, bytes) else regular_file(ref) as stream:
        try:
            picture = PILImage.open(stream, formats=_known_formats())
        except UnidentifiedImageError:
            raise ValueError(f"it is none of {', '.join(FORMATS)}") from None
        with picture:
            _check_format(picture)
            yield picture


def regular_file(path: str) -> BinaryIO:
    """Opens a regular file; a pipe, device or folder might block for ever."""
    stream = open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")  # noqa: PTH123, SIM115
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise ValueError("it is no regular file")
    return stream


@functools.cache
def _known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    PILImage.init()
    return tuple(name for name in FORMATS if name in PILImage.OPEN)


def _check_format(picture: PILImage.Image) -> None:
    if picture.format not in (None, *FORMATS):
        raise ValueError(f"it is {picture.format}, and none of {', '.join(FORMATS)}")


def resized(image: Image, width: int, height: int) -> Image:
    """A copy of an image at another size, by bicubic interpolation as in the models' own processors."""
    if is_blank(image):
        return blank_image(width, height)
    if image.shape[:2] == (height, width):
        return image.copy()
    return np.array(PILImage.fromarray(image).resize((width, height), PILImage.Resampling.BICUBIC))


def _to_rgb(picture: PILImage.Image) -> PILImage.Image:
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        values = values >> 8 if picture.mode != "I" or values.max() > 255 else values
        return PILImage.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        white = PILImage.new("RGBA", layer.size, "white")
        return PILImage.alpha_composite(white, layer).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")
