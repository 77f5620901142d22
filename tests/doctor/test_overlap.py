from __future__ import annotations

import numpy as np
import pytest

from vlmenv.core.answers import NONE, Detection
from vlmenv.core.coordinates import Coordinates, CoordinateSpace, ResizeRule
from vlmenv.doctor.overlap import Overlap, clearly_better, overlap
from vlmenv.envs.data.source import Sample

ORIGINAL = Coordinates()
THOUSANDTHS = Coordinates(CoordinateSpace.NORM1000)


def sample(target: object, images: int = 1) -> Sample:
    return Sample("a", (np.zeros((100, 200, 3), np.uint8),) * images, "Where?", target)


def test_an_answer_is_read_by_each_convention() -> None:
    """The whole image, 200 x 100, in thousandths; in pixels it lies far outside, and overlaps by its share."""
    answers = [(sample((0, 0, 200, 100)), [(0, 0, 1000, 1000)])]
    assert overlap(THOUSANDTHS, answers) == Overlap((1.0,), 1.0, 1)
    assert overlap(ORIGINAL, answers) == Overlap((200 * 100 / 1000**2,), 0.0, 1)
    doubled = Coordinates(CoordinateSpace.RESIZED, ResizeRule(factor=200, min_pixels=400 * 200, max_pixels=400 * 200))
    assert overlap(doubled, [(sample((0, 0, 100, 50)), [(0, 0, 200, 100)])]).samples == (1.0,)


def test_answers_without_boxes_overlap_nothing() -> None:
    found = overlap(ORIGINAL, [(sample((0, 0, 10, 10)), [None, NONE, (0, 0, 10, 10), "text"])])
    assert found == Overlap((0.25,), 1.0, 1)
    assert overlap(ORIGINAL, [(sample(NONE), [(0, 0, 10, 10)])]) == Overlap((), 1.0, 1)
    assert overlap(ORIGINAL, [(sample("a cat"), ["a cat"])]) == Overlap((), 0.0, 0)
    assert overlap(ORIGINAL, [(sample((0, 0, 10, 10), images=2), [(0, 0, 10, 10)])]) == Overlap((), 0.0, 0)


def test_detections_are_met_by_the_nearest_of_their_label() -> None:
    true = (Detection("cat", (0, 0, 10, 10)), Detection("dog", (20, 20, 30, 30)), Detection("cat", (0, 0, 9, 9), True))
    answered = (Detection("cat", (0, 0, 10, 5)), Detection("cat", (0, 0, 10, 9)), Detection("cat", (20, 20, 30, 30)))
    assert overlap(ORIGINAL, [(sample(true), [answered])]) == Overlap((0.45,), 1.0, 3)


@pytest.mark.parametrize(
    ("one", "other", "better"),
    [
        ((0.5, 0.6, 0.4, 0.5), (0.0, 0.1, 0.0, 0.0), True),
        ((0.5, 0.6, 0.4, 0.5), (0.5, 0.6, 0.4, 0.5), False),
        ((0.5, 0.55, 0.5, 0.55), (0.45, 0.5, 0.45, 0.5), False),  # surely, but by little
        ((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0), False),  # one lucky sample
        ((0.9, 0.9), (0.0, 0.0), False),  # too few to tell
    ],
)
def test_few_samples_prove_little(one: tuple[float, ...], other: tuple[float, ...], better: bool) -> None:
    assert clearly_better(Overlap(one, 1.0, 1), Overlap(other, 1.0, 1)) is better
