"""Built-in screens: buttons, icons and fields drawn with Pillow, each with one action to take.

The training and the evaluation stream are endless and disjoint. A hash of a screen's elements and of the question
decides which of the two a sample belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from vlmenv.core.coordinates import Box
from vlmenv.core.spaces import Image
from vlmenv.envs.data.scenes import Drawn, falls_to_eval
from vlmenv.envs.data.source import Sample
from vlmenv.envs.rewards.actions import Action

WIDTH: Final = 128
HEIGHT: Final = 160
"""Size of a screen in pixels."""
LABELS: Final = ("Save", "Open", "Send", "Help", "Delete", "Cancel", "Login", "Next", "Share", "Edit", "Print", "Stop")
FIELDS: Final = ("Name", "City", "Email", "Phone", "Code", "Title")
ICONS: Final = ("close", "menu", "search", "add", "play")
WORDS: Final = ("tea", "Oslo", "blue", "seven", "Anna", "garden", "train", "42", "north", "paper")
DIRECTIONS: Final = ("up", "down")

_BAR, _ROW = 22, 34  # pixels of the bar at the top, and of each row under it
_FONT = ImageFont.load_default(size=11)
_INK, _EDGE = (25, 25, 25), (120, 120, 120)


class Element(NamedTuple):
    """Something on a screen that can be clicked."""

    kind: str
    """`button`, `field` or `icon`"""
    name: str
    box: Box


class Screens(Drawn):
    """Screens of a stream, each with one instruction; endless."""

    stream = 4

    def get(self, index: int) -> Sample:
        rng = self.rng(index)
        while True:
            elements = _arrange(rng)
            question, action, rationale = _instruct(elements, rng)
            if falls_to_eval((elements, question)) == (self.split == "eval"):
                break
        return Sample(f"screen-{self.split}-{index}", (_draw(elements, rng),), question, action, rationale, action.kind)


def _arrange(rng: np.random.Generator) -> tuple[Element, ...]:
    """Up to two icons in the bar, and a button or field in each of the rows, or two buttons."""
    icons = [str(name) for name in rng.permutation(ICONS)[: rng.integers(1, 3)]]
    found = [Element("icon", name, (x, 3.0, x + 16, 19.0)) for name, x in zip(icons, (4.0, 108.0), strict=False)]
    labels, fields = (iter([str(name) for name in rng.permutation(names)]) for names in (LABELS, FIELDS))
    for row in range(4):
        top = float(_BAR + row * _ROW + rng.integers(4, 11))
        kind = rng.integers(4)
        if kind == 0:
            found.append(Element("field", next(fields), (52.0, top, 122.0, top + 20)))
        elif kind == 1:
            left = float(rng.integers(4, 60))
            found.append(Element("button", next(labels), (left, top, left + 60, top + 20)))
        elif kind == 2:
            found += [Element("button", next(labels), (left, top, left + 54, top + 20)) for left in (6.0, 68.0)]
    return tuple(found)


def _instruct(elements: tuple[Element, ...], rng: np.random.Generator) -> tuple[str, Action, str]:
    """An instruction, the action that follows it, and why."""
    kind = rng.random()
    if kind < 0.1:
        direction = DIRECTIONS[rng.integers(2)]
        return f"Scroll {direction}.", Action("scroll", text=direction), "The page has to move."
    fields = [one for one in elements if one.kind == "field"]
    if kind < 0.25 and fields:
        word, field = WORDS[rng.integers(len(WORDS))], fields[rng.integers(len(fields))]
        said = f'The field {field.name} has the cursor. Enter "{word}".'
        return said, Action("type", text=word), f"{word} goes into {field.name}."
    element = elements[rng.integers(len(elements))]
    asked = f"Click on the {element.kind} {element.name}."
    return asked, Action("click", element.box), f"There is the {element.kind} {element.name}."


def _draw(elements: tuple[Element, ...], rng: np.random.Generator) -> Image:
    shade = int(rng.integers(228, 256))
    picture = PILImage.new("RGB", (WIDTH, HEIGHT), (shade, shade, shade))
    draw = ImageDraw.Draw(picture)
    tint = tuple(int(value) for value in rng.integers(170, 225, size=3))
    draw.rectangle((0, 0, WIDTH, _BAR - 1), fill=tint)
    for element in elements:
        x1, y1, x2, y2 = element.box
        if element.kind == "icon":
            _DRAWN[element.name](draw, x1, y1)
            continue
        fill = tint if element.kind == "button" else (255, 255, 255)
        draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=fill, outline=_EDGE)
        middle = (y1 + y2) / 2
        if element.kind == "button":
            draw.text(((x1 + x2) / 2, middle), element.name, fill=_INK, font=_FONT, anchor="mm")
        else:
            draw.text((x1 - 4, middle), element.name, fill=_INK, font=_FONT, anchor="rm")
    return np.asarray(picture)


def _draw_close(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    draw.line((x + 3, y + 3, x + 12, y + 12), _INK, 2)
    draw.line((x + 12, y + 3, x + 3, y + 12), _INK, 2)


def _draw_menu(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    for down in (3, 7, 11):
        draw.line((x + 2, y + down, x + 13, y + down), _INK, 2)


def _draw_search(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    draw.ellipse((x + 2, y + 2, x + 10, y + 10), outline=_INK, width=2)
    draw.line((x + 9, y + 9, x + 13, y + 13), _INK, 2)


def _draw_add(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    draw.line((x + 2, y + 7, x + 13, y + 7), _INK, 2)
    draw.line((x + 7, y + 2, x + 7, y + 13), _INK, 2)


def _draw_play(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    draw.polygon([(x + 4, y + 2), (x + 13, y + 7.5), (x + 4, y + 13)], fill=_INK)


_DRAWN: Final[dict[str, Callable[[ImageDraw.ImageDraw, float, float], None]]] = {
    "close": _draw_close,
    "menu": _draw_menu,
    "search": _draw_search,
    "add": _draw_add,
    "play": _draw_play,
}
