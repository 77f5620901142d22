"""Built-in scenes to point at: one shape that an expression means, or all shapes of a kind."""

from __future__ import annotations

from vlmenv.envs.data.scenes import Scene, Scenes, Shape, choose_group, choose_reference, list_shapes, sample_scene
from vlmenv.envs.data.source import Sample
from vlmenv.envs.regions import Region, outlines_of_mask


class PointScenes(Scenes):
    """Built-in scenes with something to point at; the truth has the pixels of each shape."""

    def get(self, index: int) -> Sample:
        scene, rng = sample_scene(self.split, index, (2, 6))
        if rng.random() < 0.5:
            reference = choose_reference(scene, rng)
            asked, shapes = reference.expression, [reference.target]
        else:
            noun, shapes = choose_group(scene.shapes, rng)
            asked = f"all {noun}"
        target = tuple(region_of(scene, shape) for shape in shapes)
        return Sample(f"point-{self.split}-{index}", (scene.image,), f"Point at {asked}.", target, list_shapes(shapes))


def region_of(scene: Scene, shape: Shape) -> Region:
    """The outline of a shape's pixels."""
    return outlines_of_mask(scene.mask(scene.shapes.index(shape)))
