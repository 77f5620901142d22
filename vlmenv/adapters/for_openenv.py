"""OpenEnv: a task as one of its environments, and as an app that serves it over HTTP and WebSocket."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from vlmenv.adapters.task import PortableTask, image_url, imported, messages
from vlmenv.core.errors import require


@dataclass(frozen=True)
class OpenEnvSpec:
    """The classes of an OpenEnv environment."""

    environment: type
    """an `Environment`; `reset(seed=…)` or `reset(index=…)` shows a sample, `step` scores and ends the episode"""
    action: type
    """with one field, `text`: the completion"""
    observation: type
    """`messages` in OpenAI's form with images as `data:` URLs, `done`, and `reward`; the reward terms are in
    `metadata["rewards"]`"""

    def app(self, sessions: int = 8) -> Any:
        """A FastAPI app that serves the environment.

        Args:
            sessions: Most sessions at a time.
        """
        server = imported("openenv.core.env_server.http_server", "openenv", "openenv")
        return server.create_fastapi_app(self.environment, self.action, self.observation, max_concurrent_envs=sessions)


def openenv(env: str, *, seed: int = 0, **arguments: Any) -> OpenEnvSpec:
    """Hands a task to OpenEnv.

    Args:
        env: Id of a visual task.
        seed: Seed of the samples that `reset` without `seed` and `index` shows, one after the other.
        arguments: The task's own arguments, as for `gymnasium.make`.

    Raises:
        ConfigError: openenv is not installed, or an argument does not fit.
        DataError: The data set cannot be read.
    """
    base = imported("openenv.core.env_server.interfaces", "openenv", "openenv")
    types = imported("openenv.core.env_server.types", "openenv", "openenv")
    task = PortableTask(env, **arguments)
    order, one_at_a_time = task.numbers(seed), threading.Lock()

    class Answer(types.Action):  # type: ignore[misc, name-defined]
        text: str

    class Shown(types.Observation):  # type: ignore[misc, name-defined]
        messages: list[dict[str, Any]] = []  # noqa: RUF012 (pydantic copies it)

    class Environment(base.Environment):  # type: ignore[misc, name-defined]
        """A sample of the task."""

        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            super().__init__()
            self._index: int | None = None
            self._state = types.State()

        def reset(
            self, seed: int | None = None, episode_id: str | None = None, index: int | None = None, **_: Any
        ) -> Any:
            if index is None:
                with one_at_a_time:
                    index = next(order if seed is None else task.numbers(seed))
            shown = messages(task.observation(index), image_url)
            self._index, self._state = index, types.State(episode_id=episode_id, step_count=0)
            return Shown(messages=shown, metadata={"index": index})

        def step(self, action: Any, timeout_s: float | None = None, **_: Any) -> Any:
            require(self._index is not None, "an episode is one step: call reset() before each step()")
            assert self._index is not None
            score, self._index = task.score([action.text], [self._index])[0], None
            self._state.step_count += 1
            return Shown(done=True, reward=score.reward, metadata={"rewards": dict(score.terms)})

        @property
        def state(self) -> Any:
            return self._state

    return OpenEnvSpec(Environment, Answer, Shown)
