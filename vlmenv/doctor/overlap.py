"""The overlap of answered and true boxes under several conventions of coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmenv.core.answers import Detection, fold_label
from vlmenv.core.coordinates import Box, Coordinates, iou, is_box
from vlmenv.envs.data.source import Sample

_LEAST, _ERRORS, _SAMPLES = 0.1, 2.0, 3
"""Minimum difference of two overlaps, also in standard errors, and minimum number of samples."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """The answers' boxes under a convention."""

    samples: tuple[float, ...]
    """per sample with true boxes, their mean overlap with the answers' nearest boxes of the same label"""
    inside: float
    """share of the answered boxes within their image"""
    boxes: int
    """number of answered boxes"""

    @property
    def mean(self) -> float:
        """Of all samples; 0 without any."""
        return float(np.mean(self.samples)) if self.samples else 0.0


def overlap(coordinates: Coordinates, answers: Sequence[tuple[Sample, Sequence[Any]]]) -> Overlap:
    """Measures answers under a convention.

    Args:
        coordinates: The convention.
        answers: Samples with their parsed answers, in the numbers that the model wrote.
    """
    samples, inside = [], []
    for sample, predictions in answers:
        if len(sample.images) != 1:
            continue  # it is unknown which image a box is in
        width, height = sample.full_sizes[0]
        read = [_in_pixels(_boxes(one), coordinates, width, height) for one in predictions]
        inside += [_lies_within(box, width, height) for boxes in read for _, box in boxes]
        if truth := _boxes(sample.target):
            samples.append(float(np.mean([_nearest(one, boxes) for one in truth for boxes in read])))
    return Overlap(tuple(samples), float(np.mean(inside)) if inside else 0.0, len(inside))


def clearly_better(one: Overlap, other: Overlap) -> bool:
    """True if one convention's overlap is larger than another's, beyond the noise of few samples."""
    gains = np.array(one.samples) - np.array(other.samples)
    if len(gains) < _SAMPLES:
        return False
    error = float(gains.std(ddof=1)) / math.sqrt(len(gains))
    return bool(gains.mean() >= _LEAST and gains.mean() > _ERRORS * error)


def _boxes(value: Any) -> list[tuple[str, Box]]:
    """Labels and boxes of an answer or truth; empty if it has no boxes."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return []
    if len(value) == 4 and all(isinstance(edge, int | float) for edge in value):
        return [("", (value[0], value[1], value[2], value[3]))] if is_box(tuple(value)) else []
    return [(fold_label(one.label), one.box) for one in value if isinstance(one, Detection) and not one.crowd]


def _in_pixels(
    boxes: list[tuple[str, Box]], coordinates: Coordinates, width: int, height: int
) -> list[tuple[str, Box]]:
    return [(label, coordinates.to_pixels(box, width, height)) for label, box in boxes]


def _lies_within(box: Box, width: int, height: int) -> bool:
    """True if a box in pixels is within the image, up to rounding."""
    return box[0] >= -1 and box[1] >= -1 and box[2] <= width + 1 and box[3] <= height + 1


def _nearest(true: tuple[str, Box], boxes: list[tuple[str, Box]]) -> float:
    return max((iou(true[1], box) for label, box in boxes if label == true[0]), default=0.0)
