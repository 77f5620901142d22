"""GEM: a task as one of its environments."""

from __future__ import annotations

from typing import Any

from vlmenv.adapters.task import PortableTask, imported, picture, reply_images
from vlmenv.core.errors import ConfigError
from vlmenv.core.rollout import Observation, split_marks


def gem(env: str, **arguments: Any) -> type:
    """A class for `gem.register(id, entry_point)`, with the observations of GEM's own visual environments.

    An observation is `{"problem": str, "images": list of PIL images}`. In a task of several turns that of a step is the
    environment's next turn, without those before.

    Args:
        env: Id of a visual task.
        arguments: The task's own arguments, as for `gymnasium.make`.

    Raises:
        ConfigError: gem-llm is not installed, or an argument does not fit.
        DataError: The data set cannot be read.
    """
    core = imported("gem.core", "gem-llm", "gem")
    PortableTask(env, **arguments)  # raises what it has to before an environment is registered

    class Environment(core.Env):  # type: ignore[misc, name-defined]
        """The task."""

        def __init__(self, **given: Any) -> None:
            self._given = {**arguments, **given}
            self._env = PortableTask(env, **self._given).task
            self._index: int | None = None

        def reset(self, seed: int | None = None, idx: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
            super().reset(seed)
            observation, info = self._env.reset(seed=seed, options=None if idx is None else {"index": idx})
            self._index = info["index"]
            if observation.get("turns"):
                raise ConfigError(
                    "GEM takes a prompt without earlier turns: give no system_prompt, and rows of one turn"
                )
            images = [picture(image) for image in observation["images"]]
            return {"problem": observation["prompt"], "images": images}, info

        def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
            observation, reward, terminated, truncated, info = self._env.step(action)
            shown = {"problem": "", "images": []} if terminated or truncated else _next_turn(observation)
            return shown, float(reward), terminated, truncated, info

        def spawn(self, same_state: bool = False, **kwargs: Any) -> Any:
            made = type(self)(**{**self._given, **kwargs})
            if same_state and self._index is not None:
                made.reset(idx=self._index)
            return made

    return Environment


def _next_turn(observation: Observation) -> dict[str, Any]:
    """The environment's turn after an answer, as GEM shows it."""
    images = [picture(image) for image in reply_images(observation)]
    marks, rest = split_marks(observation["prompt"])
    in_front = marks == len(images)  # as GEM shows images
    return {"problem": rest if in_front else observation["prompt"], "images": images}
