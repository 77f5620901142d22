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


def draw_boxes(image: Image, boxes: Sequence[tuple[Box, tuple[int, int, int]]]) -> Image:
    """Draws boxes, in pixels of the image, on an enlarged copy of it.

    Args:
        image: uint8 [H, W, 3].
        boxes: Each with its colour.

    Returns:
        uint8 [S·H, S·W, 3], with the least whole S that makes the shorter side at least 320.
    """
    scale = max(1, -(-_LEAST_SIDE // min(image.shape[:2])))
    height, width = image.shape[0] * scale, image.shape[1] * scale
    picture = PILImage.fromarray(image).resize((width, height), PILImage.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for box, colour in boxes:
        x1, y1, x2, y2 = np.clip(np.array(box) * scale, -1, (width, height, width, height)).tolist()
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=3)
    return np.asarray(picture)
