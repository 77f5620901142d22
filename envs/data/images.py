"""Reads images as RGB arrays."""

from __future__ import annotations

import io
import struct
import threading
import zlib

import numpy as np
from PIL import ExifTags, ImageOps
from PIL import Image as PILImage

from vlmenv.core.errors import DataError
from vlmenv.core.spaces import Image

_LOADING = threading.Lock()


def load_image(ref: str | bytes | PILImage.Image, place: str) -> Image:
    """Reads an image: EXIF orientation applied, transparency composed on white.

    Args:
        ref: A file's path, the bytes of one, or a picture.
        place: Where it is asked for, as file and line, for the error message.

    Raises:
        DataError: It is missing, or is no image that can be read.
    """
    try:
        if isinstance(ref, PILImage.Image):
            with _LOADING:  # a picture reads its file when it is first looked at, and rows may share one
                ref.load()
            return np.array(_to_rgb(ImageOps.exif_transpose(ref)))
        with PILImage.open(io.BytesIO(ref) if isinstance(ref, bytes) else ref) as picture:
            return np.asarray(_to_rgb(ImageOps.exif_transpose(picture)))
    except FileNotFoundError:
        raise DataError(f"{place}: there is no image {str(ref)[:200]}") from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        struct.error,
        zlib.error,
        PILImage.DecompressionBombError,
    ) as error:
        name = str(ref)[:200] if isinstance(ref, str) else f"an image within the row ({type(ref).__name__})"
        raise DataError(f"{place}: {name} cannot be read as an image: {error}") from error


def image_size(ref: str | bytes | PILImage.Image) -> tuple[int, int]:
    """Width and height of an image, of which no more is read than that takes.

    Raises:
        ValueError: It cannot be read.
    """
    if isinstance(ref, PILImage.Image):
        return ref.size
    try:
        with PILImage.open(io.BytesIO(ref) if isinstance(ref, bytes) else ref) as picture:
            return picture.size
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, PILImage.DecompressionBombError) as error:
        raise ValueError(f"an image cannot be read: {error}") from error


def exif_orientation(ref: str | bytes | PILImage.Image | None) -> int:
    """How an image is to be turned before it is shown, as EXIF has it, from 1 to 8; 1 where that is not told.

    Raises:
        ValueError: The image cannot be read.
    """
    if ref is None:
        return 1
    if isinstance(ref, PILImage.Image):
        return _orientation(ref)
    try:
        with PILImage.open(io.BytesIO(ref) if isinstance(ref, bytes) else ref) as picture:
            return _orientation(picture)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, PILImage.DecompressionBombError) as error:
        raise ValueError(f"an image cannot be read: {error}") from error


def _orientation(picture: PILImage.Image) -> int:
    found = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


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
