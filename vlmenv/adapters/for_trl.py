"""TRL: a data set and a reward function for `GRPOTrainer`, `RLOOTrainer` and their kin; and for tasks of several turns
the environment of `GRPOTrainer`, which such a task's model calls as a tool."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlmenv.adapters.task import PortableTask, completion_text, imported, messages, picture, reply
from vlmenv.core.errors import ConfigError
from vlmenv.envs.episodes import Episode
from vlmenv.envs.scoring import Score

RewardFunction = Callable[..., list[float]]


@dataclass(frozen=True)
class TRLSpec:
    """What a TRL trainer takes, by the names of its arguments."""

    train_dataset: Any
    """a `datasets.Dataset` with `prompt` (messages), `images` and `index`; images are loaded when a row is read"""
    reward_funcs: list[RewardFunction]
    """one function: the weighted reward of each completion or episode; it logs each term as a metric"""
    environment_factory: type | None = None
    """the class of an episode, with one tool; None for a task of one turn"""


def trl(env: str, *, rows: int | None = None, seed: int = 0, **arguments: Any) -> TRLSpec:
    """Hands a task to TRL.

    Example::

        spec = vlmenv.adapters.trl("VLM-REC-v0", rows=2048, coordinates="norm1000")
        GRPOTrainer(model, args=args, train_dataset=spec.train_dataset, reward_funcs=spec.reward_funcs)

    In a task of several turns `environment_factory=spec.environment_factory` follows. The model calls the tool
    `respond` for each answer but the last, and gets the environment's next turn with its images. Its text without a
    call is the last answer.

    Args:
        env: Id of a visual task.
        rows: Number of rows. Default: all of a data set.
        seed: Seed of the samples and their order.
        arguments: The task's own arguments, as for `gymnasium.make`. `coordinates` is the model's convention.

    Raises:
        ConfigError: `datasets` is not installed, or an argument does not fit.
        DataError: The data set cannot be read.
    """
    datasets = imported("datasets", "datasets", "trl")
    task = PortableTask(env, **arguments)
    indices = task.indices(rows, seed)
    if task.task.skip_broken:
        indices = [index for index, _ in task.readable(indices)]
    rows_by_index = datasets.Dataset.from_dict({"index": indices})
    shown = rows_by_index.with_transform(_Rows(task))
    return TRLSpec(shown, [_reward(task)], None if task.task.max_turns == 1 else _environment(task))


class _Rows:
    """Makes rows of sample numbers when they are read."""

    def __init__(self, task: PortableTask) -> None:
        self._task = task

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        seen = [self._task.observation(index) for index in batch["index"]]
        return {
            "prompt": [messages(one, lambda _: {"type": "image"}) for one in seen],
            "images": [[picture(image) for image in one["images"]] for one in seen],
            "index": batch["index"],
        }


def _reward(task: PortableTask) -> RewardFunction:
    def reward(
        completions: Sequence[Any],
        index: Sequence[int],
        environments: Sequence[Any] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float]:
        if task.task.max_turns == 1:
            scores = task.score([completion_text(one) for one in completions], index)
        elif environments is None:
            raise ConfigError(f"{task.env} has episodes of several turns: give the trainer its environment_factory")
        else:
            scores = [_ended(task, *one) for one in zip(environments, completions, strict=True)]
        if log_metric is not None:
            for name in scores[0].terms if scores else ():
                values = [score.terms[name] for score in scores if name in score.terms]
                log_metric(f"rewards/{name}", sum(values) / len(values))
        return [score.reward for score in scores]

    reward.__name__ = task.env.rpartition(":")[2]
    return reward


def _ended(task: PortableTask, environment: Any, completion: Sequence[dict[str, Any]]) -> Score:
    """The score of an episode that TRL has ended, with its last answer unless a call of the tool was that."""
    episode: Episode = environment._episode
    if not episode.has_ended:
        task.answer(episode, _last_answer(completion), last=True)
    assert episode.score is not None
    return episode.score


def _last_answer(completion: Sequence[dict[str, Any]]) -> str:
    """The last answer of an episode, with its reasoning, which TRL takes out of answers that may call tools.

    Empty, if there was no room for another answer.
    """
    if not completion or completion[-1]["role"] != "assistant":
        return ""
    reasoning = completion[-1].get("reasoning_content") or completion[-1].get("thinking")
    return (f"<think>{reasoning}</think>" if reasoning else "") + completion_text(completion)


def _environment(task: PortableTask) -> type:
    """The class of the environment, whose public methods besides `reset` are the model's tools."""

    class Environment:
        """An episode of the task."""

        def reset(self, index: int, **_: Any) -> None:
            self._episode = task.begin(index)

        def respond(self, answer: str) -> Any:
            """Gives an answer that is not the last one, and returns what is shown next.

            Args:
                answer: The answer, in the form that the question asks for.
            """
            episode = self._episode
            if not episode.has_ended:
                task.answer(episode, answer if isinstance(answer, str) else json.dumps(answer))
            if episode.has_ended:
                return "No further answer is possible."
            return reply(episode.observation, lambda image: {"type": "image", "image": picture(image)})["content"]

    return Environment
