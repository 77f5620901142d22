"""Gymnasium spaces for any text and for images of any size, which Gymnasium itself lacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from gymnasium.spaces import Space
from numpy.typing import NDArray
from PIL import Image as PILImage

Image = NDArray[np.uint8]
"""An RGB image, uint8, [H, W, 3]."""


def blank_image(width: int, height: int) -> Image:
    """A black image that takes no memory, to stand for one of which only the size counts. It cannot be written to."""
    return np.broadcast_to(np.zeros(3, np.uint8), (height, width, 3))


def is_blank(image: Image) -> bool:
    """True for an image that `blank_image` has made."""
    return image.strides[:2] == (0, 0) and not image.flags.writeable


def image_fault(image: Any) -> str:
    """Why something is no RGB image; empty if it is one."""
    if (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.ndim == 3
        and image.shape[2] == 3
        and image.size
    ):
        return ""
    if isinstance(image, PILImage.Image):
        return "an image is a uint8 array [H, W, 3]; make one of Pillow's by np.array(image.convert('RGB'))"
    told = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
    return f"an image is a uint8 array [H, W, 3], not {told}"


class FreeText(Space[str]):
    """All strings. (`gymnasium.spaces.Text` needs a finite alphabet and a maximum length.)"""

    _PIECES = ("<think>", "</think>", "<answer>", "</answer>", "[", "]", "{", "}", ",", "None")
    _LETTERS = "abc XYZ 0123456789.-+\n\t\"'\\é中😀"

    def __init__(self, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(shape=None, dtype=str, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: None = None, probability: None = None) -> str:
        """Draws a text of up to 64 pieces, with answer tags and brackets."""
        if mask is not None or probability is not None:
            raise ValueError("FreeText samples without mask or probability")
        pieces = (*self._PIECES, *self._LETTERS)
        chosen = self.np_random.integers(len(pieces), size=self.np_random.integers(65))
        return "".join(pieces[i] for i in chosen)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)

    def to_jsonable(self, sample_n: Iterable[str]) -> list[str]:
        return list(sample_n)

    def from_jsonable(self, sample_n: list[Any]) -> list[str]:
        return [str(text) for text in sample_n]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FreeText)

    def __repr__(self) -> str:
        return "FreeText()"


class OneOfTexts(Space[str]):
    """A set of strings. (`gymnasium.spaces.Discrete` has only numbers.)"""

    def __init__(self, texts: Iterable[str], seed: int | np.random.Generator | None = None) -> None:
        self.texts = tuple(texts)
        super().__init__(shape=None, dtype=str, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: None = None, probability: None = None) -> str:
        """One of the strings, with equal probabilities."""
        if mask is not None or probability is not None:
            raise ValueError("OneOfTexts samples without mask or probability")
        return self.texts[self.np_random.integers(len(self.texts))]

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and x in self.texts

    def to_jsonable(self, sample_n: Iterable[str]) -> list[str]:
        return list(sample_n)

    def from_jsonable(self, sample_n: list[Any]) -> list[str]:
        return [str(text) for text in sample_n]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OneOfTexts) and other.texts == self.texts

    def __repr__(self) -> str:
        return f"OneOfTexts({self.texts})"


class RGBImage(Space[Image]):
    """RGB images of any size: uint8 arrays of shape [H, W, 3] with H, W >= 1."""

    def __init__(self, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(shape=None, dtype=np.uint8, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: None = None, probability: None = None) -> Image:
        """Draws noise of a random size, up to 64 x 64 pixels."""
        if mask is not None or probability is not None:
            raise ValueError("RGBImage samples without mask or probability")
        height, width = self.np_random.integers(1, 65, size=2)
        return self.np_random.integers(256, size=(height, width, 3), dtype=np.uint8)

    def contains(self, x: Any) -> bool:
        return not image_fault(x)

    def to_jsonable(self, sample_n: Iterable[Image]) -> list[Any]:
        return [image.tolist() for image in sample_n]

    def from_jsonable(self, sample_n: list[Any]) -> list[Image]:
        return [np.asarray(image, dtype=np.uint8) for image in sample_n]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RGBImage)

    def __repr__(self) -> str:
        return "RGBImage()"
