"""A task of one's own: how many shapes are there? Train it with `vlmenv train --env new_task:VLM-Count-v0`."""

from __future__ import annotations

from vlmenv import register_task
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import Scenes, Split, sample_scene
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.rewards.text import format_reward


class CountScenes(Scenes):
    """Where samples come from when no data set is given: scenes that are drawn, without end."""

    def get(self, index: int) -> Sample:
        scene, _ = sample_scene(self.split, index)
        return Sample(f"count-{index}", (scene.image,), "How many shapes are there?", len(scene.shapes))


def closeness(text: str, target: int, answer_format: AnswerFormat = AnswerFormat.TAGS) -> float:
    """A reward takes any text: 1 for the right number, less the further off it is, 0 for what is no number."""
    answer = (answer_format.extract(text) or "").strip()
    if not answer.isascii() or not answer.isdigit() or len(answer) > 9:
        return 0.0
    return max(0.0, 1 - abs(int(answer) - target) / max(1, target))


class CountEnv(VisualTaskEnv):
    """Count the shapes in a scene."""

    terms = {"closeness": closeness, "format": format_reward}
    default_rewards = {"closeness": 1.0, "format": 0.1}
    prompt_template = "{question} Answer as {answer}"
    answer_example = "number"

    def builtin_source(self, split: Split) -> Source:
        return CountScenes(split)

    def read_target(self, row: Row) -> int:  # of a data set's row
        return int(row.answer)


register_task("VLM-Count-v0", "new_task:CountEnv")
