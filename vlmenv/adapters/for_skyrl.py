"""SkyRL-gym: a task as one of its environments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmenv.adapters.task import PortableTask, image_url, imported, messages, reply
from vlmenv.core.errors import ConfigError
from vlmenv.envs.episodes import Episode


def skyrl(env: str, **arguments: Any) -> type:
    """A class for `skyrl_gym.register(id, entry_point=…)`.

    `init` gives the sample of `extras["extra_info"]["index"]` as OpenAI's messages with the images as `data:` URLs.
    `step` scores the answer; its metadata has each reward term so far. In a task of several turns its observations are
    the environment's next turn, as one more message, until the episode ends.

    Args:
        env: Id of a visual task.
        arguments: The task's own arguments, as for `gymnasium.make`.

    Raises:
        ConfigError: skyrl-gym is not installed, or an argument does not fit.
        DataError: The data set cannot be read.
    """
    base = imported("skyrl_gym.envs.base_text_env", "skyrl-gym", "skyrl")
    task = PortableTask(env, **arguments)

    class Environment(base.BaseTextEnv):  # type: ignore[misc, name-defined]
        """An episode of the task."""

        def __init__(self, env_config: Any = None, extras: Mapping[str, Any] | None = None) -> None:
            super().__init__()
            index = ((extras or {}).get("extra_info") or {}).get("index")
            if index is None:
                raise ConfigError('the row names no sample: its extra_info needs an "index", a number of the task')
            self._index = index
            self.max_turns = task.task.max_turns
            self._episode: Episode | None = None

        def init(self, prompt: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
            self._episode = task.begin(self._index)
            return messages(self._episode.observation, image_url), {"index": self._index}

        def step(self, action: str) -> Any:
            episode = self._episode
            reward = task.answer(episode, action)
            assert episode is not None
            shown = [] if episode.has_ended else [reply(episode.observation, image_url)]
            told = {"rewards": episode.terms}
            return base.BaseTextEnvStepOutput(observations=shown, reward=reward, done=episode.has_ended, metadata=told)

        def get_metrics(self) -> dict[str, float]:
            score = None if self._episode is None else self._episode.score
            return {} if score is None else {"reward": score.reward, **score.terms}

    return Environment
