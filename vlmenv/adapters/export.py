"""Files for trainers that read their rows from files: the rows, and the function that scores for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

from vlmenv.adapters.task import PortableTask, flat, imported, marked_messages, png
from vlmenv.core.errors import ConfigError
from vlmenv.core.files import atomic_file, write_atomic
from vlmenv.core.rollout import Observation

Trainer = Literal["verl", "easyr1", "swift", "lmms-eval"]

_ROW_GROUP: Final = 64
"""Rows that are held in memory at a time."""
_REWARDS: Final[Mapping[str, str]] = {
    "verl": "from vlmenv.adapters.for_verl import verl_score as compute_score  # noqa: F401\n",
    "easyr1": (
        "from vlmenv.adapters.for_verl import easyr1_scores as compute_score  # noqa: F401\n\n"
        'REWARD_NAME = "vlmenv"\nREWARD_TYPE = "batch"\n'
    ),
    "swift": "import vlmenv.adapters\n\nvlmenv.adapters.swift()\n",
    "lmms-eval": (
        "from vlmenv.adapters.for_lmms_eval import (  # noqa: F401\n"
        "    doc_to_messages,\n    doc_to_text,\n    doc_to_visual,\n    process_results,\n)\n"
    ),
}
_OPTIONS: Final[Mapping[str, str]] = {
    "verl": (
        "data.train_files={rows} data.image_key=images reward.custom_reward_function.path={reward} "
        "reward.custom_reward_function.name=compute_score"
    ),
    "easyr1": (
        "data.train_files={rows} data.prompt_key=problem data.answer_key=answer data.image_key=images "
        "data.format_prompt=null worker.reward.reward_function={reward}:compute_score"
    ),
    "swift": "--dataset {rows} --external_plugins {reward} --reward_funcs vlmenv",
    "lmms-eval": "--include_path {folder} --tasks {name}",
}
_WHY: Final[Mapping[str, str]] = {
    "verl": "verl's reward function gets a single completion",
    "easyr1": "EasyR1's reward function gets a single completion",
    "swift": "ms-swift's reward function gets a single completion",
    "lmms-eval": "lmms-eval asks for a single answer",
}
"""Why a trainer takes no episodes of several turns."""
_ENDINGS: Final[Mapping[str, str]] = {"verl": ".parquet", "easyr1": ".parquet", "swift": ".jsonl", "lmms-eval": ".yaml"}


@dataclass(frozen=True)
class Exported:
    """What has been written."""

    rows: int
    reward: Path
    """the file with the function that scores"""
    options: str
    """the trainer's options that take both files"""


def export(task: PortableTask, to: Trainer, target: Path, rows: int | None = None, seed: int = 0) -> Exported:
    """Writes rows for a trainer, and beside them `reward.py`, which scores by this task's rewards.

    Args:
        task: The task. Its data set must be where it is when the trainer scores.
        to: The trainer: verl and EasyR1 read .parquet with the images in it, ms-swift .jsonl with images beside it.
            lmms-eval measures alone, and reads a task's .yaml with the keys of its samples beside it.
        target: The file of rows.
        rows: Number of rows. Default: all of a data set.
        seed: Seed of the samples and their order.

    Raises:
        ConfigError: The file has another ending, another `reward.py` is beside it, episodes have several turns, an
            argument of the task cannot be handed on, or the trainer cannot take a row.
        SampleError: A sample cannot be read.
    """
    task.require_one_turn(_WHY[to])
    if target.suffix != _ENDINGS[to]:
        raise ConfigError(f"{target}: {to} reads {_ENDINGS[to]} files; name the file so")
    reward = target.with_name("reward.py")
    if reward.exists() and reward.read_text(encoding="utf-8") != _REWARDS[to]:
        raise ConfigError(f"{reward} is there already, and is not what {to} needs: name a file in another folder")
    samples = task.readable(task.indices(rows, seed))
    target.parent.mkdir(parents=True, exist_ok=True)
    if to == "swift":
        count = _write_lines(target, _swift_rows(task, samples, target.with_suffix("")))
    elif to == "lmms-eval":
        count = _write_task(target, task, samples)
    else:
        count = _write_parquet(target, (_ROWS[to](task, *sample) for sample in samples))
    write_atomic(reward, _REWARDS[to])
    options = _OPTIONS[to].format(
        rows=target.resolve(), reward=reward.resolve(), folder=target.resolve().parent, name=target.stem
    )
    return Exported(count, reward, options)


def _verl_row(task: PortableTask, index: int, observation: Observation) -> dict[str, Any]:
    return {
        "data_source": task.env,
        "prompt": marked_messages(observation),
        "images": _images(observation),
        "ability": "vision",
        "reward_model": {"style": "rule", "ground_truth": task.key(index)},
        "extra_info": {"index": index},
    }


def _easyr1_row(task: PortableTask, index: int, observation: Observation) -> dict[str, Any]:
    turns = marked_messages(observation)
    if len(turns) > 1:
        raise ConfigError(f"sample {index} has earlier turns; EasyR1 takes one: give no system prompt")
    return {"problem": turns[0]["content"], "images": _images(observation), "answer": task.key(index)}


_ROWS: Final = {"verl": _verl_row, "easyr1": _easyr1_row}


def _swift_rows(
    task: PortableTask, samples: Iterable[tuple[int, Observation]], folder: Path
) -> Iterator[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    for index, observation in samples:
        files = []
        for number, image in enumerate(_images(observation)):
            file = folder / f"{index}-{number}.png"
            file.write_bytes(image["bytes"])
            files.append(str(file.resolve()))
        yield {"messages": marked_messages(observation), "images": files, "solution": task.key(index)}


def _write_task(target: Path, task: PortableTask, samples: Iterable[tuple[int, Observation]]) -> int:
    """Writes a task's .yaml, and its rows beside it."""
    indices = [index for index, _ in samples]
    rows = target.with_suffix(".jsonl")
    count = _write_lines(rows, ({"key": task.key(index)} for index in indices))
    chosen = (task.task.source.get(index).term for index in indices)  # a row's own term, in place of the first
    names = dict.fromkeys([*flat(task.score([""], indices[:1])[0], "reward"), *filter(None, chosen)])
    metrics = "".join(_METRIC.format(name=json.dumps(name)) for name in names)
    write_atomic(target, _TASK.format(name=target.stem, rows=json.dumps(str(rows.resolve())), metrics=metrics))
    return count


_TASK: Final = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_messages: !function reward.doc_to_messages
doc_to_visual: !function reward.doc_to_visual
doc_to_text: !function reward.doc_to_text
doc_to_target: ""
process_results: !function reward.process_results
reasoning_tags: none
generation_kwargs: {{max_new_tokens: 1024, temperature: 0, do_sample: false}}
metric_list:
{metrics}metadata: {{version: 1}}
"""
_METRIC: Final = "  - {{metric: {name}, aggregation: mean, higher_is_better: true}}\n"


def _images(observation: Observation) -> list[dict[str, bytes]]:
    return [{"bytes": png(image)} for image in observation["images"]]


def _write_lines(target: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with atomic_file(target) as partial, partial.open("w", encoding="utf-8") as file:
        for count, row in enumerate(rows, 1):  # noqa: B007
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def _write_parquet(target: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows in groups, so that a few images are held at a time."""
    arrow: Any = imported("pyarrow", "pyarrow", "data")
    parquet: Any = imported("pyarrow.parquet", "pyarrow", "data")
    rows, count = iter(rows), 0
    group = list(islice(rows, _ROW_GROUP))
    schema = _schema(arrow, group[0])
    with atomic_file(target) as partial, parquet.ParquetWriter(partial, schema) as writer:
        while group:
            writer.write_table(arrow.Table.from_pylist(group, schema))
            count += len(group)
            group = list(islice(rows, _ROW_GROUP))
    return count


def _schema(arrow: Any, row: Mapping[str, Any]) -> Any:
    """The types of a row's columns, which a group of rows alone would not tell where its lists are empty."""
    text = arrow.string()
    kinds = {
        "prompt": arrow.list_(arrow.struct([("role", text), ("content", text)])),
        "images": arrow.list_(arrow.struct([("bytes", arrow.binary())])),
        "reward_model": arrow.struct([("style", text), ("ground_truth", text)]),
        "extra_info": arrow.struct([("index", arrow.int64())]),
    }
    return arrow.schema([(name, kinds.get(name, text)) for name in row])
