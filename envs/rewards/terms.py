"""Types of reward terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from vlmenv.core.formats import AnswerFormat
from vlmenv.core.spaces import Image


class BatchTerm(ABC):
    """A reward term that scores many answers in one call, and may look at the images.

    For terms that run a model, or divide their work over processes. Like every term it takes any text and never raises
    on it. If `batch` has a parameter `questions`, it gets them too, with "image 2" in the place of a second image.
    """

    name: str
    """the term's name in `info["rewards"]`"""

    def load(self) -> None:  # noqa: B027 (few terms have anything to load)
        """Checks that the term can be used. Making an environment calls it.

        Raises:
            ConfigError: An extra is not installed.
            ModelError: Its model cannot be found.
        """

    @abstractmethod
    def batch(
        self,
        texts: Sequence[str],
        targets: Sequence[Any],
        images: Sequence[tuple[Image, ...]],
        answer_format: AnswerFormat,
    ) -> Sequence[float]:
        """Scores N completions.

        Args:
            texts: N completions.
            targets: The truth for each.
            images: The images of each sample; equal samples may come as one and the same tuple.
            answer_format: The format that the prompts ask for.

        Returns:
            N finite numbers.
        """


RewardTerm = Callable[..., float] | BatchTerm
"""`term(text, target) -> float`; the target is what `info["target"]` shows. A term that has a parameter
`answer_format` or `count_tokens` is given the environment's, one with `prediction` the parsed answer, one with
`earlier` the answers before in an episode of several turns, and one with `progress` the part of the training steps that
are done, in [0, 1] (1 outside training)."""
