"""Questions about one of several images: an answer may open one at full size before it answers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from vlmenv.core.answers import Answer
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.rollout import IMAGE_MARK, Observation, named_images
from vlmenv.core.spaces import Image, blank_image, is_blank
from vlmenv.envs.asking import AskingEnv, read_number, read_request
from vlmenv.envs.data.albums import Albums
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.episodes import Reply, added
from vlmenv.envs.rendering import picture_of
from vlmenv.envs.rewards.terms import RewardTerm
from vlmenv.envs.scoring import Score

_KEY: Final = "open"
_LEAST_CELL: Final = 16
_LEAST_NUMBER: Final = 9
"""Least pixels of the side of a sheet's cell, and of the height of its number."""
_DRAWN: Final = 640
"""Pixels of the longer side of a sheet that is drawn for people."""


def read_page(text: str, answer_format: AnswerFormat = AnswerFormat.TAGS) -> int | None:
    """The number of the image that a completion asks for, as `{"open": 3}`; None if its answer is no request."""
    content = read_request(text, _KEY, answer_format)
    return None if content is None else read_number(content, _KEY)


def opened_term(text: str, target: Any, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """1 for an answer that asks for an image, else 0. It has a negative weight: an image costs something."""
    return float(read_page(text, answer_format) is not None)


def found_term(
    text: str, target: Answer, earlier: Sequence[str] = (), answer_format: AnswerFormat = AnswerFormat.TAGS
) -> float:
    """1 if one of the answers before has opened an image that shows the truth, else 0; 0 if no such image is known."""
    return float(any(read_page(one, answer_format) in target.pages for one in earlier))


class SearchEnv(AskingEnv):
    """`VLM-Search-v0`: as `VLM-VQA-v0`, about an album. An answer may be a request for one of its images.

    The first observation has a sheet with small copies of all images, which is as large as one of them. A request is
    `{"open": 3}`, and the next turn shows that image as large as the model sees it. With `max_turns=1` nothing can be
    opened, as a control.
    """

    terms: ClassVar[Mapping[str, RewardTerm]] = {**AskingEnv.terms, "opened": opened_term, "found": found_term}
    default_rewards: ClassVar[Mapping[str, float]] = {"accuracy": 1.0, "format": 0.1, "opened": -0.05, "found": 0.0}
    turn_terms: ClassVar[Collection[str]] = ("opened",)
    ratios: ClassVar[Mapping[str, tuple[str, str]]] = {"found": ("pages/found", "pages/known")}
    unread: ClassVar[Collection[str]] = ("keywords",)
    max_turns: int = 4
    prompt_template: ClassVar[str] = (
        "Answer as {answer}\nThe sheet shows images with their numbers. To see one at full size, answer {request}.\n"
        "{question}"
    )
    request: ClassVar[str] = f'{{"{_KEY}": 1}}'
    again: ClassVar[str] = "open another"

    def builtin_source(self, split: Split) -> Source:
        return Albums(split)

    def read_target(self, row: Row) -> Answer:
        if any(IMAGE_MARK in turn["text"] for turn in row.turns if turn["role"] != "assistant"):
            raise ValueError("a turn before the question has images, and an album has those of its question alone")
        if beyond := [page for page in row.pages if page > len(row.images)]:
            raise ValueError(f"the answer is to be found in image {beyond[0]}, but the row has {len(row.images)}")
        return super().read_target(row)._replace(pages=row.pages)

    def observe(self, sample: Sample) -> Observation:
        """The question with the sheet; marks within the question become the images' numbers."""
        sheet = contact_sheet(sample.images, max(max(self._shown_size(size)) for size in sample.full_sizes))
        return super().observe(replace(sample, images=(sheet,), sizes=(), question=named_images(sample.question)))

    def bring(self, sample: Sample, text: str) -> Reply | None:
        page = read_page(text, self.answer_format)
        if page is None or not 1 <= page <= len(sample.images):
            return None
        return Reply(f"Image {page}.", (self._shown(sample.images[page - 1], sample.full_sizes[page - 1]),))

    def write_request(self, sample: Sample, texts: Sequence[str]) -> str | None:
        """The images that show the truth, one after the other, if they are known."""
        pages = sample.target.pages[: self.max_images - 1]
        return f'{{"{_KEY}": {pages[len(texts)]}}}' if len(texts) < len(pages) else None

    def score_batch(
        self,
        texts: Sequence[str],
        samples: Sequence[Sample],
        *,
        final: bool = True,
        earlier: Sequence[Sequence[str]] | None = None,
    ) -> list[Score]:
        """As for other tasks. A request in the place of the last answer is no answer, whatever number it has."""
        if not final:
            return super().score_batch(texts, samples, final=False, earlier=earlier)
        scores = super().score_batch([self._answered(text) for text in texts], samples, earlier=earlier)
        costs = super().score_batch(texts, samples, final=False)
        return [
            score if self._answered(text) == text else added(score, cost)
            for text, score, cost in zip(texts, scores, costs, strict=True)
        ]

    def measure(self, text: str, target: Answer, terms: Mapping[str, float]) -> dict[str, float]:
        known = bool(target.pages) and "found" in terms
        return super().measure(self._answered(text), target, terms) | {
            "pages/found": terms["found"] if known else 0.0,
            "pages/known": float(known),
        }

    def draw(self, sample: Sample, prediction: Any) -> Image:
        return picture_of((contact_sheet(sample.images, _DRAWN),))

    def _answered(self, text: str) -> str:
        """A last answer, which a request is not."""
        return text if not isinstance(text, str) or read_page(text, self.answer_format) is None else ""


def contact_sheet(images: Sequence[Image], side: int) -> Image:
    """Small copies of images in rows, each below its number.

    Args:
        images: uint8 [H, W, 3] of any sizes, at least one.
        side: Greatest width and height of the sheet in pixels; each cell has 16 at least.

    Returns:
        uint8 [H, W, 3]; a blank image if one of `images` is, see `blank_image`.
    """
    columns = math.ceil(math.sqrt(len(images)))
    cell = max(_LEAST_CELL, side // columns)
    width, height = columns * cell, -(-len(images) // columns) * cell
    if any(map(is_blank, images)):
        return blank_image(width, height)
    sheet, number = PILImage.new("RGB", (width, height), "white"), max(_LEAST_NUMBER, cell // 8)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(number)
    for place, image in enumerate(images):
        left, top = place % columns * cell, place // columns * cell
        small = PILImage.fromarray(image)
        small.thumbnail((cell - 2, cell - number - 1), PILImage.Resampling.LANCZOS)
        sheet.paste(small, (left + (cell - small.width) // 2, top + number))
        draw.text((left + cell // 2, top + number // 2), str(place + 1), fill="black", font=font, anchor="mm")
    return np.asarray(sheet)
