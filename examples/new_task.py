"""Your own task: how many shapes are there? Train it with `vlmenv train --env new_task:My-Count-v0`."""

from vlmenv.envs import Row, Sample, Scenes, Source, Split, VisualTaskEnv, format_reward, register_task, sample_scene


class CountScenes(Scenes):
    """Built-in samples: an endless stream of drawn scenes."""

    def get(self, index: int) -> Sample:
        scene, _ = sample_scene(self.split, index)
        return Sample(f"count-{index}", (scene.image,), "How many shapes are there?", len(scene.shapes))


def closeness(text: str, target: int, prediction: int | None) -> float:
    """1 for the right number, less for a number further off, 0 for other text."""
    return 0.0 if prediction is None else max(0.0, 1 - abs(prediction - target) / max(1, target))


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

    def parse(self, text: str) -> int | None:  # takes any text
        answer = (super().parse(text) or "").strip()
        return int(answer) if answer.isascii() and answer.isdigit() and len(answer) < 10 else None


register_task("My-Count-v0", "new_task:CountEnv")
