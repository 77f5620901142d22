"""Pictures of answers: true places in green, answered ones in red."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from vlmenv.core.spaces import Image

TRUE, ANSWERED = (20, 150, 40), (220, 20, 30)
_LEAST_SIDE = 320
_GAP = 8
_DOT = 7
_LINE, _LINES = 90, 12
"""Characters of a line in a window, and lines above its picture."""
_MOMENT = 0.01
"""Seconds in which a window draws itself."""


class Window:
    """A window for pictures, with a text above each. Without a display it warns, and nothing is shown."""

    def __init__(self) -> None:
        from matplotlib import pyplot
        from matplotlib.backends.registry import BackendFilter, backend_registry

        backend = pyplot.get_backend()
        known = backend_registry.list_builtin(BackendFilter.NON_INTERACTIVE)  # type: ignore[no-untyped-call]
        if backend.lower() in known:
            warnings.warn(
                f"render_mode 'human' shows nothing here: matplotlib's backend {backend} opens no windows. Take "
                "'rgb_array' or 'ansi', or set MPLBACKEND to one that does",
                RuntimeWarning,
                stacklevel=4,
            )
        self._pyplot = pyplot
        self._figure, self._axes = pyplot.subplots(layout="constrained")

    def show(self, picture: Image, text: str) -> None:
        """Shows a picture in place of the one before."""
        self._axes.clear()
        self._axes.imshow(picture)
        self._axes.set_axis_off()
        lines = [line for one in text.split("\n") for line in textwrap.wrap(one, _LINE) or [""]]
        self._axes.set_title("\n".join(lines[-_LINES:]), loc="left", fontsize="small", parse_math=False)
        self._figure.canvas.draw_idle()
        self._pyplot.pause(_MOMENT)

    def close(self) -> None:
        """Closes the window."""
        self._pyplot.close(self._figure)


def draw_places(
    image: Image,
    found: Sequence[tuple[tuple[float, ...], tuple[int, int, int]]],
    size: tuple[int, int] | None = None,
) -> Image:
    """Draws points, boxes and polygons on an enlarged copy of an image.

    Args:
        image: uint8 [H, W, 3].
        found: Places of 2 numbers (a point), 4 (a box) or more (corners of a polygon), each with its colour.
        size: Width and height of the image whose pixels the places are in. Default: those of `image`.

    Returns:
        uint8 [S·H, S·W, 3], with the least whole S that makes the shorter side at least 320.
    """
    picture, scale = _enlarged(image)
    width, height = picture.size
    shrunk = np.array(image.shape[1::-1]) / (size or image.shape[1::-1])
    draw = ImageDraw.Draw(picture)
    for place, colour in found:
        corners = np.clip(np.array(place).reshape(-1, 2) * shrunk * scale, -1, (width, height))
        (x1, y1), (x2, y2) = corners.min(0).tolist(), corners.max(0).tolist()
        if len(corners) == 1:
            draw.ellipse((x1 - _DOT, y1 - _DOT, x1 + _DOT, y1 + _DOT), outline=colour, width=3)
        elif len(corners) == 2:
            draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=3)
        else:
            draw.polygon([(x, y) for x, y in corners.tolist()], outline=colour, width=3)
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
