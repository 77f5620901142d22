"""What a run goes on from, and what has changed since then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vlmenv.core.errors import ConfigError, DataError
from vlmenv.core.urls import is_server
from vlmenv.envs.mixed import by_task
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.options.fields import flatten
from vlmenv.options.mixing import parts_of
from vlmenv.options.resolve import NAMING
from vlmenv.options.train import TrainConfig
from vlmenv.runs.by_task import Envs
from vlmenv.runs.checkpoints import Found
from vlmenv.runs.data import difference, fingerprint
from vlmenv.runs.record import model_digests, of_section, used
from vlmenv.runs.run_folder import RunFolder

_PLACES: Final = (*NAMING, "output", "model", "server", "judge_url", "mix_file")
"""Options that are not compared: folders and addresses. The model's weights are those of the checkpoint."""


@dataclass(frozen=True)
class DataSets:
    """The samples of a run by their use: `training`, and `evaluation` where that is measured; by task in a mix."""

    envs: Mapping[str, VisualTaskVectorEnv]

    @classmethod
    def of(cls, envs: Envs, held_out: Envs | None) -> DataSets:
        """The samples of the environments of a run."""
        uses = {"training": by_task(envs), "evaluation": by_task(held_out)}
        named = {use: {f"{name} {use}" if name else use: one for name, one in own.items()} for use, own in uses.items()}
        return cls(named["training"] | named["evaluation"])

    def fingerprints(self) -> dict[str, Any]:
        """The fingerprint of each set."""
        return {use: fingerprint(envs.task.source) for use, envs in self.envs.items()}

    def changes(self, old: Mapping[str, Any]) -> dict[str, str]:
        """What differs from earlier fingerprints, by the set's use. Sets that one side does not have are left out."""
        found = {use: difference(old[use], envs.task.source) for use, envs in self.envs.items() if use in old}
        return {use: what for use, what in found.items() if what is not None}


def facts(config: TrainConfig[Any], data: DataSets, run: RunFolder, ranks: int) -> dict[str, Any]:
    """What the checkpoints of a run keep, so that resuming can compare it."""
    return {
        "run": run.identity(),
        "ranks": ranks,
        "options": _options(config, data),
        "data": data.fingerprints(),
        **_teacher(config),
    }


def _teacher(config: TrainConfig[Any]) -> dict[str, Any]:
    """The checksums of the files of a teacher in memory."""
    name = getattr(config.algorithm, "teacher", None)
    return {} if name is None or is_server(name) else {"teacher": model_digests(name)}


def _options(config: TrainConfig[Any], data: DataSets) -> dict[str, Any]:
    if not (parts := parts_of(config)):
        used_now = flatten(used(config, data.envs["training"]))
        return {name: value for name, value in used_now.items() if name not in _PLACES}
    told = {name: value for name, value in flatten(config.located()).items() if name not in _PLACES}
    for task, part in parts.items():
        own = of_section(used(part.config, data.envs[f"{task} training"]))
        told |= {f"{task} {name}": value for name, value in own.items()}
    return told


def changes(config: TrainConfig[Any], found: Found, data: DataSets, ranks: int) -> tuple[dict[str, Any], list[str]]:
    """What has changed since a checkpoint: as changes.jsonl records it, and a line each for the reader.

    Raises:
        DataError: A data set has changed, and `data_changed` is not given.
    """
    old, recorded, told = found.facts, dict[str, Any](), list[str]()
    if differing := data.changes(old.get("data", {})):
        if not config.data_changed:
            listed = "; ".join(f"the {use} data: {what}" for use, what in differing.items())
            raise DataError(
                f"{found.folder}: the data set has changed since. {listed}. Put it back, or go on with --data-changed"
            )
        recorded["data"] = differing
        told += [f"the {use} data: {what}" for use, what in differing.items()]
    now = _options(config, data)
    before = old.get("options", now)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        recorded["options"] = {name: [before.get(name), now.get(name)] for name in names}
        told += [f"option {name}: {now.get(name)}, was {before.get(name)}" for name in names]
    if (taught := _teacher(config)) and "teacher" in old and old["teacher"] != taught["teacher"]:
        recorded["teacher"] = [old["teacher"], taught["teacher"]]
        told.append(f"the teacher {config.algorithm.teacher} has other weights than then")
    if old.get("ranks", ranks) != ranks:
        recorded["ranks"] = [old["ranks"], ranks]
    return recorded, told


def check_data_changed(config: TrainConfig[Any]) -> None:
    """Raises ConfigError if `data_changed` is given without a run to resume."""
    if config.data_changed and config.resume is None:
        raise ConfigError("data_changed goes with resume: a new run takes its data as they are")
