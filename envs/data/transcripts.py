"""Built-in texts to read: words, numbers and dates in several fonts and sizes, with noise.

The training and the evaluation stream are endless and disjoint, by a hash of the text.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFilter, ImageFont

from vlmenv.core.spaces import Image
from vlmenv.envs.data.scenes import Drawn, falls_to_eval
from vlmenv.envs.data.source import Sample

_VOCABULARY: Final = (
    "river stone cloud paper window garden market bridge silver letter winter summer orange yellow purple green "
    "black white north south east west apple bread coffee sugar water light night house street number table chair "
    "clock music ticket total price change open closed exit entry platform train station hotel room floor door"
)
WORDS: Final = tuple(_VOCABULARY.split())
QUESTIONS: Final = ("Read the text in the image.", "What does the image say?", "Transcribe the text.")
SIZES: Final = (10, 12, 14, 18, 22)
"""Heights of letters in pixels."""
FONTS: Final = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold")
"""Fonts of matplotlib, which comes with the package."""

_MARGIN = 6


class Transcripts(Drawn):
    """Texts of a stream, of one line to three; endless."""

    stream = 5

    def get(self, index: int) -> Sample:
        rng = self.rng(index)
        while True:
            lines = [_line(rng) for _ in range(rng.integers(1, 4))]
            if falls_to_eval(lines) == (self.split == "eval"):
                break
        question = QUESTIONS[rng.integers(len(QUESTIONS))]
        size, font = (names[rng.integers(len(names))] for names in (SIZES, FONTS))
        image = _noisy(_draw(lines, font_of(str(font), int(size)), rng), rng)
        return Sample(f"text-{self.split}-{index}", (image,), question, " ".join(lines), subject=f"size {size}")


def _line(rng: np.random.Generator) -> str:
    return " ".join(_piece(rng) for _ in range(rng.integers(1, 4)))


def _piece(rng: np.random.Generator) -> str:
    """A word, in small letters, with a capital or in capitals; a number, a price, a time or a date."""
    kind = rng.integers(10)
    a, b, c = (int(value) for value in rng.integers((1, 0, 1), (13, 60, 29)))
    if kind < 6:
        word = WORDS[rng.integers(len(WORDS))]
        return (word, word, word, word.capitalize(), word.capitalize(), word.upper())[kind]
    return (str(a * 100 + b), f"${a}.{b:02d}", f"{a}:{b:02d}", f"20{10 + c}-{a:02d}-{c:02d}")[kind - 6]


@lru_cache(maxsize=32)
def font_of(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """One of matplotlib's fonts, such as `DejaVuSans`, whose size is in pixels."""
    found = importlib.util.find_spec("matplotlib")
    assert found is not None
    return ImageFont.truetype(Path(str(found.origin)).parent / "mpl-data" / "fonts" / "ttf" / f"{name}.ttf", size)


def _draw(
    lines: list[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, rng: np.random.Generator
) -> PILImage.Image:
    """Dark text on a light ground, or the reverse, in a picture that just holds it."""
    boxes = [font.getbbox(line) for line in lines]
    height = int(max(box[3] for box in boxes)) + 3
    size = (int(max(box[2] for box in boxes)) + 2 * _MARGIN, height * len(lines) + 2 * _MARGIN)
    colours = [tuple(int(value) for value in rng.integers(*span, size=3)) for span in ((200, 256), (0, 90))]
    ground, ink = colours if rng.random() < 0.7 else colours[::-1]
    picture = PILImage.new("RGB", size, ground)
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + number * height), line, fill=ink, font=font)
    return picture


def _noisy(picture: PILImage.Image, rng: np.random.Generator) -> Image:
    """Grain on every picture, a slight turn on a third, a slight blur on a third."""
    if rng.random() < 1 / 3:
        turn = float(rng.uniform(-2, 2))
        ground = picture.getpixel((0, 0))
        assert isinstance(ground, tuple)
        picture = picture.rotate(turn, PILImage.Resampling.BICUBIC, expand=True, fillcolor=ground)
    if rng.random() < 1 / 3:
        picture = picture.filter(ImageFilter.GaussianBlur(0.5))
    pixels = np.asarray(picture).astype(np.int16) + rng.normal(0, rng.uniform(0, 14), (*picture.size[::-1], 1))
    return np.clip(pixels, 0, 255).astype(np.uint8)
