"""Pictures of answers: true boxes in green, answered ones in red."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from vlmenv.core.coordinates import Box
from vlmenv.core.spaces import Image

TRUE, ANSWERED = (20, 150, 40), (220, 20, 30)
_LEAST_SIDE = 320
_GAP = 8


def draw_boxes(image: Image, boxes: Sequence[tuple[Box, tuple[int, int, int]]]) -> Image:
    """Draws boxes, in pixels of the image, on an enlarged copy of it.

    Args:
        image: uint8 [H, W, 3].
        boxes: Each with its colour.

    Returns:
        uint8 [S·H, S·W, 3], with the least whole S that makes the shorter side at least 320.
    """
    picture, scale = _enlarged(image)
    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    for box, colour in boxes:
        x1, y1, x2, y2 = np.clip(np.array(box) * scale, -1, (width, height, width, height)).tolist()
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=3)
    return np.asarray(picture)


def picture_of(images: Sequence[Image]) -> Image:
    """Enlarged copies of a sample's images side by side; a white square where there are none."""
    pictures = [_enlarged(image)[0] for image in images] or [PILImage.new("RGB", (_LEAST_SIDE, _LEAST_SIDE), "white")]
    width = sum(picture.width for picture in pictures) + _GAP * (len(pictures) - 1)
    whole = PILImage.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    x = 0
    for picture in pictures:
        whole.paste(picture, (x, 0))
        x += picture.width + _GAP
    return np.asarray(whole)


def _enlarged(image: Image) -> tuple[PILImage.Image, int]:
    """A copy whose shorter side has at least 320 pixels, and the whole number by which it is enlarged."""
    scale = max(1, -(-_LEAST_SIDE // min(image.shape[:2])))
    size = (image.shape[1] * scale, image.shape[0] * scale)
    return PILImage.fromarray(image).resize(size, PILImage.Resampling.NEAREST), scale
