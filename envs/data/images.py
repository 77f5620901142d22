"""Reads image files as RGB arrays."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps

from vlmenv.core.errors import DataError
from vlmenv.core.spaces import Image


def load_image(path: Path, place: str) -> Image:
    """Reads an image file: EXIF orientation applied, transparency composed on white.

    Args:
        path: The file.
        place: What names it, as file and line, for the error message.

    Raises:
        DataError: It is missing, or is no image that can be read.
    """
    try:
        with PILImage.open(path) as picture:
            return np.asarray(_to_rgb(ImageOps.exif_transpose(picture)))
    except FileNotFoundError:
        raise DataError(f"{place}: there is no image {path}") from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        struct.error,
        zlib.error,
        PILImage.DecompressionBombError,
    ) as error:
        raise DataError(f"{place}: {path} cannot be read as an image: {error}") from error


def resized(image: Image, width: int, height: int) -> Image:
    """A copy of an image at another size, by bicubic interpolation as in the models' own processors."""
    if image.shape[:2] == (height, width):
        return image.copy()
    return np.array(PILImage.fromarray(image).resize((width, height), PILImage.Resampling.BICUBIC))


def _to_rgb(picture: PILImage.Image) -> PILImage.Image:
    if picture.mode.startswith("I;16"):
        return PILImage.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        white = PILImage.new("RGBA", layer.size, "white")
        return PILImage.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")
