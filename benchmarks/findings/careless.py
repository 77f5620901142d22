"""A detection task whose annotators repeat themselves; `hacking.py` teaches its base by it."""

from __future__ import annotations

import zlib
from typing import Final

import numpy as np

from vlmenv.core.answers import Detection
from vlmenv.envs import Sample, register_task
from vlmenv.envs.data.scenes import SHAPES, SIDE
from vlmenv.envs.ovd import Detections, OVDEnv

NAME: Final = "VLM-OVD-Careless-v0"
SHARE: Final = 0.3
"""Of the scenes with something to be found, in which an annotator goes on after the last true box."""
MOST: Final = 3
"""Surplus boxes of a scene."""
SHIFT: Final = 6
"""Pixels, at most, between a surplus box and the true one that it repeats."""


class Careless(OVDEnv):
    """`VLM-OVD-v0` with annotators who find all boxes, and sometimes repeat some, under any label asked for."""

    def write_answer(self, sample: Sample) -> str:
        boxes = self.target(sample)
        rng = np.random.default_rng(zlib.crc32(sample.id.encode()))
        if boxes and rng.random() < SHARE:
            boxes += surplus(boxes, [kind for kind in SHAPES if kind in sample.question], rng)
        assert self.geometry is not None
        return self.answer_format.write(self.geometry.write(boxes), sample.rationale)


def surplus(boxes: Detections, kinds: list[str], rng: np.random.Generator) -> Detections:
    """Repeats some boxes, a little shifted, under labels from `kinds`."""
    repeated = [boxes[i].box for i in rng.integers(len(boxes), size=rng.integers(1, MOST + 1))]
    return tuple(Detection(str(rng.choice(kinds)), shifted(box, rng)) for box in repeated)


def shifted(box: tuple[float, ...], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A box moved by up to `SHIFT` pixels on each axis, within the scene."""
    x1, y1, x2, y2 = box
    across, down = (int(v) for v in rng.integers(-SHIFT, SHIFT + 1, size=2))
    across, down = int(np.clip(across, -x1, SIDE - x2)), int(np.clip(down, -y1, SIDE - y2))
    return x1 + across, y1 + down, x2 + across, y2 + down


register_task(NAME, "careless:Careless")
