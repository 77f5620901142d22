"""Several tasks in one vector environment: each gets its share of a step's groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Final

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from vlmenv.core.errors import ConfigError, SampleError
from vlmenv.core.spaces import Image
from vlmenv.envs.vector import BatchedObservations, VisualTaskVectorEnv

_Ends = tuple[NDArray[Any], NDArray[Any]]
"""terminated and truncated"""


class MixedVectorEnv(VectorEnv[BatchedObservations, Sequence[str], NDArray[Any]]):
    """N environments of several tasks, in groups of G neighbours that show the same sample.

    Each reset deals P groups out to the tasks, whose groups are neighbours, in the order of the tasks. A group goes to
    the task whose number of groups so far is the furthest below its weight's share. So numbers of groups follow the
    weights over the resets, also if a task's share of P is below one. Numbers depend on the weights alone, not on
    seeds.

    `info["mix_task"]` names the task of each environment. A reward term that a task does not have is absent from the
    infos of its environments, by the masks of Gymnasium's vector environments. Samples are in the order of their task,
    which `revisit` and samples that are left out concern alone. `info["index"]` counts within the task.

    Attributes:
        tasks: The environments of each task by its name, to look at or to measure a task alone.
        weights: The weight of each task.

    Args:
        tasks: The environments of each task by its name, with P groups of G. The mix sets their numbers of groups.
        weights: The weight of each task, finite and above 0.

    Raises:
        ConfigError: There is no task, a weight is not finite and above 0, or tasks have other groups.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (Gymnasium's own type)
        "render_modes": ["rgb_array"],
        "render_fps": 1,
        "autoreset_mode": AutoresetMode.DISABLED,
    }

    def __init__(self, tasks: Mapping[str, VisualTaskVectorEnv], weights: Mapping[str, float]) -> None:
        self.tasks, self.weights = dict(tasks), {name: float(weights[name]) for name in tasks}
        if not tasks or any(not 0 < weight < math.inf for weight in self.weights.values()):
            raise ConfigError(f"a mix has tasks with weights that are finite and above 0, not {self.weights}")
        if len({(one.num_envs, one.group_size) for one in self.tasks.values()}) > 1:
            raise ConfigError("the tasks of a mix must have equal num_envs and group_size")
        first = next(iter(self.tasks.values()))
        self.num_envs, self.group_size, self.render_mode = first.num_envs, first.group_size, first.render_mode
        widest = next((one for one in self.tasks.values() if one.task.takes_videos), first)
        self.single_observation_space = widest.single_observation_space
        self.single_action_space = first.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._given = dict.fromkeys(self.tasks, 0)
        """groups of each task so far"""
        self._seen: dict[str, tuple[BatchedObservations, dict[str, Any]]] = {}
        """what each task of the last reset shows"""
        self._ends: dict[str, _Ends] = {}

    @property
    def num_groups(self) -> int:
        """P, the number of groups of all tasks together."""
        return self.num_envs // self.group_size

    @property
    def skips_broken(self) -> bool:
        """Whether any task leaves samples out that cannot be shown."""
        return any(one.skips_broken for one in self.tasks.values())

    @property
    def max_turns(self) -> int:
        """Maximum number of answers per episode."""
        return max(one.max_turns for one in self.tasks.values())

    @property
    def max_images(self) -> int:
        """Maximum number of images per episode of several turns; 0 without such a task."""
        return max((one.max_images for one in self.tasks.values() if one.max_turns > 1), default=0)

    @property
    def takes_videos(self) -> bool:
        """Whether samples of any task may have videos."""
        return any(one.takes_videos for one in self.tasks.values())

    @property
    def skipped(self) -> dict[str, str]:
        """Place and fault of each sample that has been left out, by TASK/INDEX."""
        return {f"{name}/{i}": why for name, envs in self.tasks.items() for i, why in envs.skipped.items()}

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[BatchedObservations, dict[str, Any]]:
        """Shows the next samples of each task.

        With a seed, `options={"skip": k}` continues after k resets of its order, and `options={"state": s}` from a
        `state_dict`. `options={"replace": {i: reason}}` replaces the sample of environment i by the next of its task.

        Raises:
            ConfigError: An option is unknown, or seeds are several.
            SampleError: As for `VisualTaskVectorEnv`.
            DataError: A task has no sample left.
        """
        options = dict(options or {})
        if unknown := set(options) - _OPTIONS:
            raise ConfigError(
                f"a mix knows no option {', '.join(sorted(unknown))}; it knows {', '.join(sorted(_OPTIONS))}. Its "
                "`tasks` are environments that show given samples"
            )
        if isinstance(seed, Sequence | np.ndarray):
            raise ConfigError("a mix takes a single seed")
        if "replace" in options:
            self._replace(options["replace"])
            return self._joined()
        super().reset(seed=seed)
        if seed is not None:
            self._begin(seed, options)
        self._seen, self._ends = {}, {}
        for name, count in self._deal().items():
            self.tasks[name].show_groups(count)
            if count:
                self._seen[name] = self.tasks[name].reset()
        return self._joined()

    def _begin(self, seed: int, options: Mapping[str, Any]) -> None:
        """Sets the order of each task, and where it goes on."""
        state = options.get("state", {})
        self._given = dict.fromkeys(self.tasks, 0)
        if state.get("weights") == self.weights:  # others begin to count anew
            self._given = dict(state["given"])
        for _ in range(int(options.get("skip", 0))):
            self._deal()
        for place, (name, envs) in enumerate(self.tasks.items()):
            shown = {"taken": self._given[name], "settled": [], "skipped": envs.skipped}
            own = int(np.random.SeedSequence([seed, place]).generate_state(1)[0])
            envs.show_groups(0)
            envs.reset(seed=own, options={"state": state.get("tasks", {}).get(name, shown)})

    def _deal(self) -> dict[str, int]:
        """The numbers of groups that the tasks get now, P in all."""
        exact = {name: Fraction(weight) for name, weight in self.weights.items()}
        whole, counts = sum(exact.values()), dict.fromkeys(self.tasks, 0)
        dealt = sum(self._given.values())
        for group in range(dealt + 1, dealt + self.num_groups + 1):
            owed = {name: group * exact[name] / whole - self._given[name] for name in self.tasks}
            furthest = max(owed, key=owed.__getitem__)
            self._given[furthest] += 1
            counts[furthest] += 1
        return counts

    def _replace(self, faults: Mapping[int, str]) -> None:
        """Replaces the samples of some environments, each by the next of its task."""
        for name, own in self._by_task(faults).items():
            self._seen[name] = self.tasks[name].reset(options={"replace": own})

    def _by_task(self, faults: Mapping[int, str]) -> dict[str, dict[int, str]]:
        found: dict[str, dict[int, str]] = {}
        for env, reason in faults.items():
            name, place = self._task_of(env)
            found.setdefault(name, {})[place] = reason
        return found

    def _task_of(self, env: int) -> tuple[str, int]:
        """The task of an environment, and the number that the environment has there."""
        for name in self._seen:
            if env < self.tasks[name].num_envs:
                return name, env
            env -= self.tasks[name].num_envs
        raise ConfigError(f"there is no environment {env}")

    def _joined(self) -> tuple[BatchedObservations, dict[str, Any]]:
        """The observations and infos of all environments."""
        each = [observations for observations, _ in self._seen.values()]
        keys = dict.fromkeys(key for one in each for key in one)  # tasks without videos have no entry for them
        none = {id(one): ((),) * len(one["prompt"]) for one in each}
        joined = {key: tuple(row for one in each for row in one.get(key, none[id(one)])) for key in keys}
        return joined, self._infos({name: infos for name, (_, infos) in self._seen.items()})

    def _infos(self, infos: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        names = np.array([name for name in infos for _ in range(self.tasks[name].num_envs)], dtype=object)
        merged = merged_infos([(one, self.tasks[name].num_envs) for name, one in infos.items()])
        return merged | {"mix_task": names, "_mix_task": np.ones(self.num_envs, dtype=np.bool_)}

    def step(
        self, actions: Sequence[str]
    ) -> tuple[BatchedObservations, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Scores N texts, each by its task, or those of the episodes that have not ended.

        See `VisualTaskVectorEnv.step`. A task whose episodes have all ended waits for the others: its environments keep
        what they show, and their rewards are 0.

        Raises:
            RuntimeError: All episodes have ended, or none has begun.
            ValueError: The number of texts is not N.
        """
        if self._ended.keys() == self._seen.keys():
            raise RuntimeError("all episodes have ended, or none has begun: call reset() first")
        if isinstance(actions, str) or len(actions) != self.num_envs:
            raise ValueError(f"step wants {self.num_envs} texts, one per environment")
        left, rewards, ended = list(actions), list[NDArray[Any]](), list[_Ends]()
        for name in self._seen:
            own, left = left[: self.tasks[name].num_envs], left[self.tasks[name].num_envs :]
            rewards.append(self._step_of(name, own))
            ended.append(self._ends[name])
        observations, infos = self._joined()
        terminated, truncated = (np.concatenate([one[part] for one in ended]) for part in (0, 1))
        return observations, np.concatenate(rewards), terminated, truncated, infos

    def _step_of(self, name: str, actions: Sequence[str]) -> NDArray[Any]:
        """Steps a task's environments, and returns their rewards."""
        if name in self._ended:
            return np.zeros(len(actions), dtype=np.float64)
        observations, rewards, terminated, truncated, infos = self.tasks[name].step(actions)
        self._seen[name], self._ends[name] = (observations, infos), (terminated, truncated)
        return rewards

    @property
    def _ended(self) -> dict[str, _Ends]:
        """The tasks whose episodes have all ended."""
        return {name: ends for name, ends in self._ends.items() if (ends[0] | ends[1]).all()}

    def render(self) -> tuple[Image, ...] | None:
        """In `rgb_array` mode a picture for each environment."""
        if self.render_mode is None or not self._seen:
            return None
        return tuple(picture for name in self._seen for picture in self.tasks[name].render() or ())

    def close_extras(self, **kwargs: Any) -> None:
        for envs in self.tasks.values():
            envs.close()

    def state_dict(self) -> dict[str, Any]:
        """The groups of each task so far, and the position and samples of each task's order."""
        tasks = {name: envs.state_dict() for name, envs in self.tasks.items()}
        return {"weights": dict(self.weights), "given": dict(self._given), "tasks": tasks}

    def fault(self, env: int, reason: str) -> SampleError:
        """The error for the sample of an environment, with its place and fault."""
        name, place = self._task_of(env)
        return self.tasks[name].fault(place, reason)


def by_task(envs: VisualTaskVectorEnv | MixedVectorEnv | None) -> dict[str, VisualTaskVectorEnv]:
    """The environments of each task by its name; those of a single task under the empty name, and none for None."""
    if envs is None:
        return {}
    return envs.tasks if isinstance(envs, MixedVectorEnv) else {"": envs}


def merged_infos(parts: Sequence[tuple[Mapping[str, Any], int]]) -> dict[str, Any]:
    """Infos of vector environments side by side. A key that a part lacks is absent there by its mask.

    Args:
        parts: The infos of each part, and its number of environments.
    """
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for infos, _ in parts for name in infos if not name.startswith("_")):
        own = [(infos.get(name), count) for infos, count in parts]
        given = [value for value, _ in own if value is not None]
        if isinstance(given[0], Mapping):
            merged[name] = merged_infos([(value or {}, count) for value, count in own])
        else:
            kind = given[0].dtype if len({value.dtype for value in given}) == 1 else np.dtype(object)
            arrays = [np.zeros(count, dtype=kind) if value is None else value.astype(kind) for value, count in own]
            merged[name] = np.concatenate(arrays)
        masks = [infos.get(f"_{name}", np.zeros(count, dtype=np.bool_)) for infos, count in parts]
        merged[f"_{name}"] = np.concatenate(masks)
    return merged


_OPTIONS: Final = {"skip", "state", "replace"}
