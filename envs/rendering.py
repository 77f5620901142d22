"""Pictures of answers: true places in blue, answered ones in orange, which colour-blind eyes tell apart."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from vlmenv.core.spaces import Image
from vlmenv.core.text import visible
from vlmenv.core.video import Video, spread

Colour = tuple[int, int, int]
Mark = tuple[str, tuple[float, ...], Colour]
"""A label, a place and a colour."""

TRUE: Final[Colour] = (0, 114, 178)
ANSWERED: Final[Colour] = (213, 94, 0)
RIM: Final[Colour] = (255, 255, 255)
_LEAST_SIDE = 320
_STROKE = 4  # pixels, of a picture whose shorter side has 320
_LONGEST_LABEL = 40
_GAP = 8
_FRAMES, _FRAME_HEIGHT = 8, 160
"""Frames of a video that are drawn, and their height in pixels."""
_BAR = 24
"""Pixels of a bar on the line of time."""
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
    found: Sequence[Mark],
    size: tuple[int, int] | None = None,
) -> Image:
    """Draws points, boxes and polygons on an enlarged copy of an image, with a white rim, and their labels.

    Lines and labels are as wide as the picture demands, so that they are seen on a photo that is shown small too.

    Args:
        image: uint8 [H, W, 3].
        found: Labels, places of 2 numbers (a point), 4 (a box) or more (corners of a polygon), and colours. Labels of
            true places stand above them, others below.
        size: Width and height of the image whose pixels the places are in. Default: those of `image`.

    Returns:
        uint8 [S·H, S·W, 3], with the least whole S that makes the shorter side at least 320.
    """
    picture, scale = _enlarged(image)
    shrunk = np.array(image.shape[1::-1]) / (size or image.shape[1::-1])
    draw = ImageDraw.Draw(picture)
    line = max(_STROKE, min(picture.size) // 80)
    for label, place, colour in found:
        corners = np.clip(np.array(place).reshape(-1, 2) * shrunk * scale, -1, picture.size)
        _draw_shape(draw, corners, colour, line)
        if label:
            _draw_label(draw, corners, label, colour, line)
    return np.asarray(picture)


def _draw_shape(draw: ImageDraw.ImageDraw, corners: NDArray[Any], colour: Colour, line: int) -> None:
    (x1, y1), (x2, y2) = corners.min(0).tolist(), corners.max(0).tolist()
    rim = max(1, line // 3)
    for out, width, ink in ((rim, line + 2 * rim, RIM), (0, line, colour)):
        if len(corners) == 1:
            radius = 2.4 * line + out
            draw.ellipse((x1 - radius, y1 - radius, x1 + radius, y1 + radius), outline=ink, width=width)
        elif len(corners) == 2:
            right, bottom = max(x1, x2 - 1), max(y1, y2 - 1)
            draw.rectangle((x1 - out, y1 - out, right + out, bottom + out), outline=ink, width=width)
        else:
            draw.polygon([(x, y) for x, y in corners.tolist()], outline=ink, width=width)


def _draw_label(draw: ImageDraw.ImageDraw, corners: NDArray[Any], label: str, colour: Colour, line: int) -> None:
    """Writes a label above a true place, or below another one, within the picture."""
    font = ImageFont.load_default(5 * line)
    text = visible(label)[:_LONGEST_LABEL]
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font, stroke_width=line // 2)
    width, height = right - left, bottom - top
    x, y = corners.min(0)[0], (corners.min(0)[1] - height - line if colour == TRUE else corners.max(0)[1] + line)
    widest, highest = draw.im.size
    place = (min(max(0, x), max(0, widest - width)) - left, min(max(0, y), max(0, highest - height)) - top)
    draw.text(place, text, fill=colour, font=font, stroke_width=line // 2, stroke_fill=RIM)


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


def strip_of(video: Video, spans: Sequence[tuple[float, float, Colour]] = ()) -> Image:
    """Frames of a video side by side, with their seconds, above a line of time.

    Args:
        video: The video.
        spans: Starts and ends in seconds, and colours, drawn as bars one below the other. Times outside the video are
            cut off.

    Returns:
        uint8 [H, W, 3].
    """
    shown = spread(video, _FRAMES)
    pictures = [_labelled(frame, f"{second:.1f} s") for second, frame in shown]
    width, height = pictures[0].size
    whole = PILImage.new("RGB", (len(pictures) * (width + _GAP) - _GAP, height + _BAR * len(spans)), "white")
    for number, picture in enumerate(pictures):
        whole.paste(picture, (number * (width + _GAP), 0))
    draw = ImageDraw.Draw(whole)
    for number, (start, end, colour) in enumerate(spans):
        left, right = (min(max(at / video.duration, 0.0), 1.0) * (whole.width - 1) for at in (start, end))
        top = height + _BAR * number + _BAR // 4
        draw.rectangle((left, top, max(right, left + 2), top + _BAR // 2), fill=colour)
    return np.asarray(whole)


def _labelled(frame: Image, text: str) -> PILImage.Image:
    """A frame at a common height, with a text in its corner."""
    height = _FRAME_HEIGHT
    width = max(1, round(frame.shape[1] * height / frame.shape[0]))
    picture = PILImage.fromarray(frame).resize((min(width, 4 * height), height), PILImage.Resampling.BILINEAR)
    font = ImageFont.load_default(14)
    ImageDraw.Draw(picture).text((4, 2), text, fill=(0, 0, 0), font=font, stroke_width=2, stroke_fill=RIM)
    return picture


def _enlarged(image: Image) -> tuple[PILImage.Image, int]:
    """A copy whose shorter side has at least 320 pixels, and the whole number by which it is enlarged."""
    scale = max(1, -(-_LEAST_SIDE // min(image.shape[:2])))
    size = (image.shape[1] * scale, image.shape[0] * scale)
    return PILImage.fromarray(image).resize(size, PILImage.Resampling.NEAREST), scale
