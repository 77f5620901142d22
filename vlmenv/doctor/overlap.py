"""How well boxes in answers lie under several conventions of coordinates: what a model meant by its numbers."""

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
"""By how much one convention's overlap must exceed another's, by how many standard errors, on how many samples."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Answers as a convention reads them."""

    samples: tuple[float, ...]
    """of each sample with true boxes, their mean overlap with the answers' nearest boxes of the same label"""
    inside: float
    """share of the answered boxes that lie within their image"""
    boxes: int
    """how many were answered"""

    @property
    def mean(self) -> float:
        return float(np.mean(self.samples)) if self.samples else 0.0


def overlap(coordinates: Coordinates, answers: Sequence[tuple[Sample, Sequence[Any]]]) -> Overlap:
    """Reads answers by a convention.

    Args:
        coordinates: The convention.
        answers: Samples, each with the parsed answers to it, whose numbers are as the model wrote them.
    """
    samples, inside = [], []
    for sample, predictions in answers:
        if len(sample.images) != 1:
            continue  # there is no telling which image a box is in
        height, width = sample.images[0].shape[:2]
        read = [_in_pixels(_boxes(one), coordinates, width, height) for one in predictions]
        inside += [_lies_within(box, width, height) for boxes in read for _, box in boxes]
        if truth := _boxes(sample.target):
            samples.append(float(np.mean([_nearest(one, boxes) for one in truth for boxes in read])))
    return Overlap(tuple(samples), float(np.mean(inside)) if inside else 0.0, len(inside))


def clearly_better(one: Overlap, other: Overlap) -> bool:
    """Whether one reading of the same answers is better than another beyond what few samples leave open."""
    gains = np.array(one.samples) - np.array(other.samples)
    if len(gains) < _SAMPLES:
        return False
    error = float(gains.std(ddof=1)) / math.sqrt(len(gains))
    return bool(gains.mean() >= _LEAST and gains.mean() > _ERRORS * error)


def _boxes(value: Any) -> list[tuple[str, Box]]:
    """Boxes with their labels, of a task's answer or truth, whatever its form; none where it holds none."""
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
    """Whether a box in pixels is in the image, give or take what rounding does."""
    return box[0] >= -1 and box[1] >= -1 and box[2] <= width + 1 and box[3] <= height + 1


def _nearest(true: tuple[str, Box], boxes: list[tuple[str, Box]]) -> float:
    return max((iou(true[1], box) for label, box in boxes if label == true[0]), default=0.0)
