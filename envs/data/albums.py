"""Built-in albums of scenes, each with a question about a detail that one of them shows.

The training and the evaluation stream are endless and disjoint, as those of the scenes are.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from vlmenv.core.answers import Answer
from vlmenv.envs.data.details import dotted
from vlmenv.envs.data.scenes import Scenes, sample_scene
from vlmenv.envs.data.source import Sample

SIZES: Final = (4, 9)
"""Least and greatest number of images in an album."""
SIDES: Final = (5, 8)
"""Least and greatest side of a dot in pixels, of an image of 192 x 192."""

_COUNTS = (1, 3)  # shapes of a scene


class Albums(Scenes):
    """Albums of 4 to 9 scenes, whose shapes have a dot of another colour in their middle.

    The question is what colour the dot is in a shape whose colour and kind only one shape of the album has.
    """

    stream = 9

    def get(self, index: int) -> Sample:
        rng = self.rng(index)
        lone = None
        while not lone:
            count = int(rng.integers(SIZES[0], SIZES[1] + 1))
            scenes = [sample_scene(self.split, int(rng.integers(2**62)), _COUNTS)[0] for _ in range(count)]
            looks = Counter((shape.colour, shape.kind) for scene in scenes for shape in scene.shapes)
            shapes = [(page, shape) for page, scene in enumerate(scenes, 1) for shape in scene.shapes]
            lone = [(page, shape) for page, shape in shapes if looks[shape.colour, shape.kind] == 1]
        page, shape = lone[int(rng.integers(len(lone)))]
        images, dots = zip(*(dotted(scene, rng, SIDES) for scene in scenes), strict=True)
        described = f"{shape.colour} {shape.kind}"
        return Sample(
            f"album-{self.split}-{index}",
            images,
            f"What colour is the dot in the {described}?",
            Answer(dots[page - 1][shape].colour, "exact", pages=(page,)),
            f"The {described} is in image {page}.",
        )
