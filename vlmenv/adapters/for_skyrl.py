"""SkyRL-gym: a task as one of its environments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmenv.adapters.task import PortableTask, image_url, imported, messages
from vlmenv.core.errors import ConfigError


def skyrl(env: str, **arguments: Any) -> type:
    """A class for `skyrl_gym.register(id, entry_point=…)`.

    `init` gives the sample of `extras["extra_info"]["index"]` as OpenAI's messages with the images as `data:` URLs.
    `step` scores the answer and ends the episode; its metadata has each reward term.

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
        """A sample of the task."""

        def __init__(self, env_config: Any = None, extras: Mapping[str, Any] | None = None) -> None:
            super().__init__()
            index = ((extras or {}).get("extra_info") or {}).get("index")
            if index is None:
                raise ConfigError('the row names no sample: its extra_info needs an "index", a number of the task')
            self._index = index
            self._metrics: dict[str, float] = {}

        def init(self, prompt: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
            return messages(task.observation(self._index), image_url), {"index": self._index}

        def step(self, action: str) -> Any:
            score = task.score([action], [self._index])[0]
            self._metrics = {"reward": score.reward, **score.terms}
            return base.BaseTextEnvStepOutput(
                observations=[], reward=score.reward, done=True, metadata={"rewards": dict(score.terms)}
            )

        def get_metrics(self) -> dict[str, float]:
            return self._metrics

    return Environment
