"""Built-in scenes to segment: the pixels of one shape that an expression means, or of all shapes of a kind."""

from __future__ import annotations

from dataclasses import replace

from vlmenv.envs.data.pointing import PointScenes
from vlmenv.envs.data.source import Sample
from vlmenv.envs.rewards.segments import Segment


class SegmentScenes(PointScenes):
    """The scenes of `PointScenes`, with the same shapes to outline."""

    def get(self, index: int) -> Sample:
        sample = super().get(index)
        asked = sample.question.replace("Point at", "Outline")
        target = tuple(Segment(region) for region in sample.target)
        return replace(sample, id=sample.id.replace("point", "segment"), question=asked, target=target)
