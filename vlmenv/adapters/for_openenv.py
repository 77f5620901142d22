"""OpenEnv: a task as one of its environments, and as an app that serves it over HTTP and WebSocket."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from vlmenv.adapters.task import PortableTask, image_url, imported, messages, reply
from vlmenv.core.errors import ConfigError, VLMEnvError, require
from vlmenv.envs.episodes import Episode


@dataclass(frozen=True)
class OpenEnvSpec:
    """The classes of an OpenEnv environment."""

    environment: type
    """an `Environment`; `reset(seed=…)` or `reset(index=…)` shows a sample, `step` scores an answer"""
    action: type
    """with one field, `text`: the completion"""
    observation: type
    """`messages` in OpenAI's form with images as `data:` URLs, `done`, and `reward`; the reward terms so far are in
    `metadata["rewards"]`. After a step `messages` is the environment's next turn; empty at the end"""

    def app(self, sessions: int = 8) -> Any:
        """A FastAPI app that serves the environment.

        Args:
            sessions: Most sessions at a time.
        """
        server = imported("openenv.core.env_server.http_server", "openenv", "openenv")
        app = server.create_fastapi_app(self.environment, self.action, self.observation, max_concurrent_envs=sessions)
        app.add_exception_handler(VLMEnvError, _told)
        return app


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
    task = PortableTask(env, **arguments)
    types = imported("openenv.core.env_server.types", "openenv", "openenv")

    class Answer(types.Action):  # type: ignore[misc, name-defined]
        text: str

    class Shown(types.Observation):  # type: ignore[misc, name-defined]
        messages: list[dict[str, Any]] = []  # noqa: RUF012 (pydantic copies it)

    return OpenEnvSpec(_environment(task, seed, types.State, Shown), Answer, Shown)


def _environment(task: PortableTask, seed: int, make_state: type, make_shown: type) -> type:
    """The class of the environment, whose instances take their samples from one order."""
    base = imported("openenv.core.env_server.interfaces", "openenv", "openenv")
    order, one_at_a_time = task.numbers(seed), threading.Lock()

    class Environment(base.Environment):  # type: ignore[misc, name-defined]
        """An episode of the task."""

        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            super().__init__()
            self._episode: Episode | None = None
            self._state = make_state()

        def reset(
            self, seed: int | None = None, episode_id: str | None = None, index: int | None = None, **others: Any
        ) -> Any:
            require(not others, f"reset knows no {', '.join(others)}; it knows seed, episode_id and index")
            if index is None and seed is not None:
                index = task.next_readable(task.numbers(seed))[0]
            elif index is None:
                with one_at_a_time:
                    index = task.next_readable(order)[0]
            self._episode, self._state = task.begin(index), make_state(episode_id=episode_id, step_count=0)
            return make_shown(messages=messages(self._episode.observation, image_url), metadata={"index": index})

        def step(self, action: Any, timeout_s: float | None = None, **_: Any) -> Any:
            episode = self._episode
            if episode is None or episode.has_ended:
                raise ConfigError("the episode has ended, or none has begun: call reset(), in one session over /ws")
            reward = task.answer(episode, action.text)
            self._state.step_count += 1
            told = [] if episode.has_ended else [reply(episode.observation, image_url)]
            return make_shown(messages=told, done=episode.has_ended, reward=reward, metadata={"rewards": episode.terms})

        @property
        def state(self) -> Any:
            return self._state

    return Environment


async def _told(request: Any, error: Exception) -> Any:
    """The answer to a request that cannot be met. On a WebSocket, OpenEnv's session tells the error by itself."""
    responses = imported("fastapi.responses", "fastapi", "openenv")
    return responses.JSONResponse({"detail": str(error)}, 422)
