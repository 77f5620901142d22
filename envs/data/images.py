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
from PIL import ExifTags, ImageOps, UnidentifiedImageError
from PIL import Image as PILImage

from vlmenv.core.errors import DataError
from vlmenv.core.spaces import Image

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


def load_image(ref: str | bytes | PILImage.Image, place: str) -> Image:
    """Reads an image: EXIF orientation applied, transparency composed on white.

    Args:
        ref: A regular file's path, the bytes of one, or a picture.
        place: Where it is asked for, as file and line, for the error message.

    Raises:
        DataError: It is missing, is no image that can be read, is of none of `FORMATS`, or has over `MOST_PIXELS`.
    """
    try:
        if isinstance(ref, PILImage.Image):
            _check(ref)
            with _LOADING:  # a picture reads its file when it is first looked at, and rows may share one
                ref.load()
            return np.array(_to_rgb(ImageOps.exif_transpose(ref)))
        with _opened(ref) as picture:
            return np.asarray(_to_rgb(ImageOps.exif_transpose(picture)))
    except FileNotFoundError:
        raise DataError(f"{place}: there is no image {str(ref)[:200]}") from None
    except _BROKEN as error:
        name = str(ref)[:200] if isinstance(ref, str) else f"an image within the row ({type(ref).__name__})"
        raise DataError(f"{place}: {name} cannot be read as an image: {error}") from error


def image_size(ref: str | bytes | PILImage.Image) -> tuple[int, int]:
    """Width and height of an image; reads no more of it than that takes.

    Raises:
        ValueError: It cannot be read.
    """
    if isinstance(ref, PILImage.Image):
        return ref.size
    try:
        with _opened(ref) as picture:
            return picture.size
    except _BROKEN as error:
        raise ValueError(f"an image cannot be read: {error}") from error


def shown_size(ref: str | bytes) -> tuple[int, int]:
    """Width and height of an image as `load_image` turns it, by its EXIF orientation.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        with _opened(ref) as picture:
            turned = _orientation(picture) >= 5
            return (picture.height, picture.width) if turned else picture.size
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
        with _opened(ref) as picture:
            return _orientation(picture)
    except _BROKEN as error:
        raise ValueError(f"an image cannot be read: {error}") from error


def _orientation(picture: PILImage.Image) -> int:
    found = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


@contextmanager
def _opened(ref: str | bytes) -> Iterator[PILImage.Image]:
    """An image whose format and size are known, but no pixel."""
    with io.BytesIO(ref) if isinstance(ref, bytes) else _regular_file(ref) as stream:
        try:
            picture = PILImage.open(stream, formats=_known_formats())
        except UnidentifiedImageError:
            raise ValueError(f"it is none of {', '.join(FORMATS)}") from None
        with picture:
            _check(picture)
            yield picture


def _regular_file(path: str) -> BinaryIO:
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


def _check(picture: PILImage.Image) -> None:
    """Raises ValueError for a picture of another format, or with too many pixels."""
    if picture.format not in (None, *FORMATS):
        raise ValueError(f"it is {picture.format}, and none of {', '.join(FORMATS)}")
    width, height = picture.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, more than {MOST_PIXELS:,}: scale it down")


def resized(image: Image, width: int, height: int) -> Image:
    """A copy of an image at another size, by bicubic interpolation as in the models' own processors."""
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
    return picture.convert("RGB")
