"""Many environments of one task, in groups that show the same sample, stepped in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from vlmenv.core.errors import ConfigError, DataError, SampleError, require
from vlmenv.core.spaces import Image
from vlmenv.envs.base import VisualTaskEnv, check_index
from vlmenv.envs.data.source import Sample, SampleOrder, order_of
from vlmenv.envs.episodes import Episode, advance
from vlmenv.envs.prefetching import SampleLoader, Shown

BatchedObservations = dict[str, tuple[Any, ...]]
"""`{"images": N tuples of arrays, "prompt": N strings, "turns": N tuples of turns}`, and `"videos"` in some tasks"""


class VisualTaskVectorEnv(VectorEnv[BatchedObservations, Sequence[str], NDArray[Any]]):
    """N environments in groups of G neighbours that show the same sample.

    The images of a group are one array, shared by its G observations: do not write to it. Nothing resets by itself. A
    step ends all episodes of a task of one step. Of several turns, step again until all have ended, by `terminated` or
    `truncated`. An episode that has ended takes any action, with reward 0, and keeps its observation and
    its infos. Then call `reset`, which resets all environments together. `reset(options={"index": [...]})` shows given
    samples, one per group. Infos have the layout of Gymnasium's own vector environments.

    Each `step` starts to load the next samples in their order, if the task's source reads files. It is for speed alone:
    what is shown, and when an error is raised, stays the same. `close` ends it.

    With the task's `skip_broken`, the next sample replaces a sample that cannot be shown, for its whole group. The
    order is then as if that sample had never been in the data set. `reset(options={"replace": {i: reason}})` replaces
    the sample of environment i, if an agent cannot take it. The other samples stay.

    Attributes:
        skipped: Place and fault of each sample that has been left out, by index.

    Args:
        task: Builds the task's environment from `kwargs`.
        num_envs: N.
        group_size: G, which divides N.
        shard: The part of the sample order, of `num_shards` equal parts, that these environments show. Ranks have
            different shards.
        num_shards: The number of shards.
        answers: If true, `info["answer"]` of a reset has the true answer as a completion in the requested format.
        revisit: Probability of showing a sample again whose answers all got the same reward last time. Such a sample is
            too easy or too hard to learn from by comparison.
        kwargs: The task's own arguments.

    Raises:
        ConfigError: `group_size` does not divide `num_envs`, or is above 1 for a task that cannot show a sample again;
            `revisit` is not a probability, or samples are never seen twice.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (Gymnasium's own type)
        "render_modes": ["rgb_array"],
        "render_fps": 1,
        "autoreset_mode": AutoresetMode.DISABLED,
    }

    def __init__(
        self,
        task: Callable[..., VisualTaskEnv],
        num_envs: int,
        *,
        group_size: int = 1,
        shard: int = 0,
        num_shards: int = 1,
        answers: bool = False,
        revisit: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if num_envs < 1 or group_size < 1 or num_envs % group_size:
            raise ConfigError(f"group_size={group_size} does not divide num_envs={num_envs}")
        if not 0 <= shard < num_shards:
            raise ConfigError(f"shard={shard} is not one of num_shards={num_shards}, counted from 0")
        self.task = task(**kwargs)
        if self.task.render_mode not in (None, *self.metadata["render_modes"]):
            raise ConfigError(f"render_mode {self.task.render_mode} is for a single environment: take rgb_array")
        if group_size > 1 and self.task.unrepeatable:
            raise ConfigError(
                f"{self.task.unrepeatable}, so no group of answers can be compared: take ppo or reinforce++, with "
                "group_size 1"
            )
        self.num_envs = num_envs
        self.group_size = group_size
        self.render_mode = self.task.render_mode
        self.single_observation_space = self.task.observation_space
        self.single_action_space = self.task.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._shard, self._num_shards = shard, num_shards
        self._stretch = self.num_groups  # of neighbouring places in the order; `show_groups` leaves it
        self._answers = answers
        if not 0 <= revisit <= 1:
            raise ConfigError(f"revisit is a chance from 0 to 1, not {revisit}")
        if revisit < 1 and self.task.source.size is None:
            raise ConfigError("revisit is for a data set: of the built-in samples none is seen twice")
        self._revisit = revisit
        self._order: SampleOrder | None = None
        self._in_order = False  # whether the shown samples are the order's
        self._taken = 0  # places in this shard's part of the order
        self._settled: set[int] = set()
        """Samples whose answers all got the same reward last time."""
        self.skipped: dict[int, str] = {}
        self._shown: list[Shown] = []
        self._observations: BatchedObservations = {}
        self._episodes: list[Episode] = []
        self._totals = np.zeros(num_envs, dtype=np.float64)
        self._loader = SampleLoader(self.task)

    @property
    def skips_broken(self) -> bool:
        """Whether samples that cannot be shown are left out instead of refused."""
        return self.task.skip_broken

    @property
    def progress(self) -> float:
        """Part of the training that is done, in [0, 1]; see the task."""
        return self.task.progress

    @progress.setter
    def progress(self, done: float) -> None:
        self.task.progress = done

    @property
    def max_turns(self) -> int:
        """Maximum number of answers per episode."""
        return self.task.max_turns

    @property
    def max_images(self) -> int:
        """Maximum number of images per episode of several turns."""
        return self.task.max_images

    @property
    def takes_videos(self) -> bool:
        """Whether samples may have videos."""
        return self.task.takes_videos

    @property
    def num_groups(self) -> int:
        """P, the number of distinct samples in a batch."""
        return self.num_envs // self.group_size

    def show_groups(self, count: int) -> None:
        """Sets the number of groups that the next reset shows, 0 or more; a mix of tasks gives each its share."""
        self.num_envs = count * self.group_size
        self._totals = np.zeros(self.num_envs, dtype=np.float64)

    @property
    def shown(self) -> dict[int, Sample]:
        """The samples that the environments show now, by index."""
        return {one.index: one.sample for one in self._shown}

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[BatchedObservations, dict[str, Any]]:
        """Shows P new samples, or those of `options={"index": [P indices]}`, G times each.

        With P seeds, each group shows what a single environment shows after a reset with its seed. Later resets go on
        in the order from before.

        With a seed, `options={"skip": k}` continues after k batches of its order, as after k resets that left nothing
        out. `options={"state": s}` continues from a `state_dict`. For `replace` see the class.

        Raises:
            ConfigError: An option is unknown, indices do not fit, or the environments are closed.
            SampleError: A sample or one of its images cannot be read, or a sample is to be replaced without
                `skip_broken`.
            DataError: No sample is left.
        """
        self._require_open()
        options = self._checked(options or {})
        if isinstance(seed, Sequence | np.ndarray):
            options["index"] = self._seeded(seed, options)
            seed = None
        super().reset(seed=seed)
        if seed is not None or self._order is None:
            self._order = order_of(self.np_random, self.task.source.size)
            self._taken, self._settled = 0, set()
        if "skip" in options:
            skipped = options["skip"]
            whole = isinstance(skipped, Integral) and int(skipped) >= 0
            require(whole, f"skip is a number of batches, not {skipped!r}")
            self._taken += int(skipped) * self.num_groups
        if "state" in options:
            self._go_on(options["state"])
        self._in_order = "index" not in options
        if not self._in_order:
            self._shown = self._given(options["index"])
        else:
            self._shown = self._kept(options["replace"]) if "replace" in options else []
            self._fill(self._order)
        self._episodes = [Episode(one.sample, one.observation) for one in self._shown for _ in range(self.group_size)]
        self._totals = np.zeros_like(self._totals)
        self._observations = self._batched()
        return self._observations, self._infos() | (self._true_answers() if self._answers else {})

    def step(
        self, actions: Sequence[str]
    ) -> tuple[BatchedObservations, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Scores N texts, or those of the episodes that have not ended.

        Returns:
            Observations; rewards of this step, float64 [N]; `terminated` and `truncated`, bool [N]; and infos. In a
            task of one step `terminated` is all True.

        Raises:
            ConfigError: The environments are closed.
            RuntimeError: All episodes have ended, or none has begun.
            ValueError: The number of texts is not N.
        """
        self._require_open()
        going = [i for i, episode in enumerate(self._episodes) if not episode.has_ended]
        if not going:
            raise RuntimeError("all episodes have ended, or none has begun: call reset() first")
        if isinstance(actions, str) or len(actions) != self.num_envs:
            raise ValueError(f"step wants {self.num_envs} texts, one per environment")
        rewards = np.zeros(self.num_envs, dtype=np.float64)
        rewards[going] = advance(self.task, [self._episodes[i] for i in going], [actions[i] for i in going])
        self._totals += rewards
        ended = np.array([episode.has_ended for episode in self._episodes])
        truncated = np.array([episode.truncated for episode in self._episodes])
        if ended.all():
            self._settle(self._totals)
            self._load_next()
        infos = self._infos([self.task.report(episode) for episode in self._episodes])
        if self.task.max_turns > 1:
            self._observations = self._batched()
            infos |= self._true_answers() if self._answers else {}
        return self._observations, rewards, ended & ~truncated, truncated, infos

    def _batched(self) -> BatchedObservations:
        rows = [episode.observation for episode in self._episodes]
        batched: BatchedObservations = {
            "images": tuple(row["images"] for row in rows),
            "prompt": tuple(row["prompt"] for row in rows),
            "turns": tuple(row.get("turns", ()) for row in rows),
        }
        if self.task.takes_videos:
            batched["videos"] = tuple(row.get("videos", ()) for row in rows)
        return batched

    def render(self) -> tuple[Image, ...] | None:
        """In `rgb_array` mode a picture for each environment."""
        if self.render_mode is None or not self._shown:
            return None
        return tuple(
            self.task.draw(episode.sample, None if episode.score is None else episode.score.prediction)
            for episode in self._episodes
        )

    def __getstate__(self) -> dict[str, Any]:
        """The state without the threads that load samples: a copy has its own."""
        return {name: value for name, value in vars(self).items() if name != "_loader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._loader = SampleLoader(self.task)

    def close_extras(self, **kwargs: Any) -> None:
        self._loader.close()
        self.task.close()

    def _require_open(self) -> None:
        if self.closed:
            raise ConfigError("the environments are closed: make new ones by gymnasium.make_vec")

    def _true_answers(self) -> dict[str, Any]:
        going = np.array([not episode.has_ended for episode in self._episodes])
        each = ["" if one.has_ended else self.task.write_turn(one.sample, one.texts) for one in self._episodes]
        return {"answer": np.array(each, dtype=object), "_answer": going}

    def state_dict(self) -> dict[str, Any]:
        """The position in the order of samples, and the state of the samples."""
        return {"taken": self._taken, "settled": sorted(self._settled), "skipped": dict(self.skipped)}

    def _go_on(self, state: dict[str, Any]) -> None:
        self._taken, self._settled = state["taken"], set(state["settled"])
        self.skipped = dict(state.get("skipped", {}))  # older checkpoints do not have it

    def fault(self, env: int, reason: str) -> SampleError:
        """The error for the sample of an environment, with its place and fault."""
        one = self._shown[env // self.group_size]
        return SampleError(one.index, f"{self.task.source.place(one.index, one.sample.id)}: {reason}")

    def skip(self, error: SampleError) -> None:
        """Leaves a sample out from now on.

        Raises:
            SampleError: Broken rows are not left out here.
            DataError: No sample is left.
        """
        if not self.skips_broken:
            raise error
        self.skipped[error.index] = str(error)
        if len(self.skipped) == self.task.source.size:
            raise DataError(f"none of the data set's {len(self.skipped)} samples can be shown; the last: {error}")

    def _settle(self, rewards: NDArray[Any]) -> None:
        if self._revisit == 1:
            return
        for one, group in zip(self._shown, rewards.reshape(-1, self.group_size), strict=True):
            (self._settled.add if np.ptp(group) == 0 else self._settled.discard)(one.index)

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a reset without the mask, which must select all environments.

        Raises:
            ConfigError: An option is unknown, or the mask leaves environments out.
        """
        options = dict(options)
        mask = np.asarray(options.pop("reset_mask", np.ones(self.num_envs, dtype=np.bool_)))
        if mask.shape != (self.num_envs,) or not mask.all():
            raise ConfigError(
                f"all episodes are reset together: reset_mask must be True for all {self.num_envs} environments"
            )
        if unknown := set(options) - _OPTIONS:
            raise ConfigError(
                f"reset knows no option {', '.join(sorted(unknown))}; it knows {', '.join(sorted(_OPTIONS))}"
            )
        return options

    def _seeded(self, seeds: Sequence[int] | NDArray[Any], options: dict[str, Any]) -> list[int]:
        """The samples that single environments show for these seeds."""
        if len(seeds) != self.num_groups or options:
            raise ConfigError(
                f"reset wants {self.num_groups} seeds, one per group, and no other option; it got {len(seeds)} seeds"
                + f" and {', '.join(options)}" * bool(options)
            )
        for seed in seeds:
            require(isinstance(seed, Integral), f"a seed is a whole number, not {seed!r}")
        return [order_of(np_random(int(seed))[0], self.task.source.size)[0] for seed in seeds]

    def _given(self, wanted: Any) -> list[Shown]:
        """The samples at these indices."""
        require(isinstance(wanted, Iterable), f"reset wants {self.num_groups} indices, one per group, not {wanted!r}")
        indices = [check_index(index, self.task.source.size) for index in wanted]
        if len(indices) != self.num_groups:
            raise ConfigError(f"reset wants {self.num_groups} indices, one per group, not {len(indices)}")
        loaded = list(self._loader.load(indices))
        for one in loaded:
            if isinstance(one, SampleError):
                raise one
        return [one for one in loaded if not isinstance(one, SampleError)]

    def _kept(self, replace: dict[int, str]) -> list[Shown]:
        """The shown samples without those of some environments, which are left out for the given reasons."""
        for error in [self.fault(env, reason) for env, reason in replace.items()]:
            self.skip(error)
        return [one for one in self._shown if one.index not in self.skipped]

    def _fill(self, order: SampleOrder) -> None:
        """Adds the next samples until there are P."""
        while (missing := self.num_groups - len(self._shown)) > 0:
            for one in self._loader.load(self._take(order, missing)):
                if isinstance(one, SampleError):
                    self.skip(one)
                else:
                    self._shown.append(one)

    def _load_next(self) -> None:
        """Starts to load the samples that come next, unless a later reset says otherwise."""
        if self._order is None or not self._in_order or not self.task.source.reads_files:
            return
        taken = self._taken
        self._loader.begin(self._take(self._order, self.num_groups))
        self._taken = taken

    def _take(self, order: SampleOrder, count: int) -> list[int]:
        """The next samples of this shard's part of the order.

        Skipped samples are left out, and settled ones with probability 1 - `revisit`.
        """
        indices: list[int] = []
        most = (
            0 if self._revisit == 1 else self.task.source.size or 0
        )  # limits how many are passed over: all of them may be settled
        while len(indices) < count:
            stretch, place = divmod(self._taken, self._stretch)
            position = (stretch * self._num_shards + self._shard) * self._stretch + place
            self._taken += 1
            index = order[position]
            if index in self.skipped:
                continue
            if most and index in self._settled and order.chance(position) >= self._revisit:
                most -= 1
            else:
                indices.append(index)
        return indices

    def _infos(self, details: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """The sample of each environment and, after a step, the result of its answer."""
        infos: dict[str, Any] = {}
        for i in range(self.num_envs):
            one = self._shown[i // self.group_size]
            infos = self._add_info(infos, self.task.identify(one.sample, one.index), i)
        for i, detail in enumerate(details):
            infos = self._add_info(infos, {k: v for k, v in detail.items() if k not in _ANY_TYPE}, i)
        for name in _ANY_TYPE if details else ():
            infos[name] = np.full(self.num_envs, None, dtype=object)
            infos[f"_{name}"] = np.ones(self.num_envs, dtype=np.bool_)
            for i, detail in enumerate(details):
                infos[name][i] = detail[name]
        return infos


_OPTIONS = {"index", "skip", "state", "replace"}
_ANY_TYPE = ("prediction", "target")
"""Infos whose type the task decides, and which may differ from row to row."""
