"""lmms-eval: the functions of a task that `vlmenv data export --to lmms-eval` writes, by the keys of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image as PILImage

from vlmenv.adapters.task import completion_text, flat, judged, messages, observed, picture

Doc = Mapping[str, Any]
"""A row: the `key` of its sample."""


def doc_to_messages(doc: Doc) -> list[dict[str, Any]]:
    """A row's turns as lmms-eval's chat models take them, each image in its place."""
    return messages(observed(doc["key"]), lambda image: {"type": "image", "url": picture(image)})


def doc_to_visual(doc: Doc) -> list[PILImage.Image]:
    """A row's images, for models without chat."""
    return [picture(image) for image in observed(doc["key"])["images"]]


def doc_to_text(doc: Doc) -> str:
    """A row's prompt, for models without chat, which put images before it."""
    return observed(doc["key"])["prompt"]


def process_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """The weighted reward of an answer as `reward`, and each term by its name.

    Raises:
        ConfigError: The key names no sample.
        RewardError: A term failed, or its value is not finite.
    """
    return flat(judged([completion_text(results[0])], [doc["key"]])[0], "reward")
