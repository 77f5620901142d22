"""A run's folder that is made without a model: real scenes, and answers that get closer to the truth."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

from vlmenv.algos.trainer import StepResult
from vlmenv.core.files import jsonable
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.rec import RECEnv
from vlmenv.evaluation import Evaluation, summarise, write_evaluation
from vlmenv.runs.album import Album, groups_shown, is_right
from vlmenv.runs.run_folder import RunFolder

OPTIONS = "env: VLM-REC-v0\nmodel: builtin\nalgo: grpo\nsteps: {steps}\nseed: {seed}\nlr: {lr}\ngrpo:\n  epsilon: 0.2\n"
RECORD = "record:\n  run: abc\n  device: cpu\n  versions: {vlmenv: 0.1.0, torch: '2.9'}\n"


def make_run(
    folder: Path,
    steps: int = 6,
    prompts: int = 2,
    group_size: int = 4,
    measured: int = 8,
    seed: int = 0,
    lr: float = 3e-4,
    on_the_way: int | None = None,
    hostile: str | None = None,
) -> Path:
    """Makes the folder of a run.

    Args:
        folder: The folder.
        steps: Its steps.
        prompts: Samples of a step.
        group_size: Completions of each.
        measured: Samples before and after training.
        seed: Seed of the answers, and the option.
        lr: The option.
        on_the_way: Step of an evaluation on the way.
        hostile: A completion in place of the first one of training.
    """
    rng = np.random.default_rng(seed)
    run = RunFolder(folder)
    run.create("", OPTIONS.format(steps=steps, seed=seed, lr=lr) + RECORD)
    train, held_out = RECEnv(split="train"), RECEnv(split="eval")
    album = Album(folder / "samples", train, "train")
    for step in range(1, steps + 1):
        rows, skill = [], step / steps
        for index in rng.integers(2**40, size=prompts).tolist():
            rows += [answered(train, index, skill, rng) for _ in range(group_size)]
        if hostile is not None and step == 1:
            rows[0]["completion"] = hostile
        shown = rows[: group_size * groups_shown(step, steps, group_size)]
        samples = album.keep(row["index"] for row in shown)
        for row in shown:
            row["right"] = is_right(train, samples[row["index"]], row["completion"], row["rewards"])
        write_step(run, step, rows, metrics(rows, skill))
    moments = {0: "before", steps: "after"} | ({} if on_the_way is None else {on_the_way: None})
    eval_album = Album(folder / "samples", held_out, "eval")
    for step, name in moments.items():
        measure(run.path / name if name else run.evaluation(step), held_out, measured, step / steps, rng)
    eval_album.keep(range(measured))
    return folder


def write_step(run: RunFolder, step: int, rows: list[dict[str, Any]], values: dict[str, float]) -> None:
    class Rollouts:
        records = rows

    run.write_step(StepResult(step, values, Rollouts()))  # type: ignore[arg-type]


def completion(task: VisualTaskEnv, index: int, skill: float, rng: np.random.Generator) -> str:
    """An answer that is off by less, the higher the skill."""
    sample = task.source.get(index)
    if sample.target == "None":
        return "<think>nothing fits</think><answer>None</answer>"
    if rng.random() > 0.9 + skill / 10:
        return "I do not know."
    edges = np.asarray(sample.target) + rng.normal(0, 1 + 12 * (1 - skill), 4)
    return f"<think>the {sample.question[7:-1]}</think><answer>{[round(edge) for edge in edges.tolist()]}</answer>"


def answered(task: VisualTaskEnv, index: int, skill: float, rng: np.random.Generator) -> dict[str, Any]:
    """A record of rollouts.jsonl."""
    sample, text = task.source.get(index), completion(task, index, skill, rng)
    score = task.score(text, sample)
    return {
        "id": sample.id,
        "index": index,
        "prompt": task.observe(sample)["prompt"],
        "completion": text,
        "finish_reason": "stop",
        "reward": score.reward,
        "rewards": score.terms,
        "traits": {},
        "prediction": jsonable(score.prediction),
        "target": jsonable(task.target(sample)),
        "advantage": float(rng.normal()),
    }


def metrics(rows: list[dict[str, Any]], skill: float) -> dict[str, float]:
    rewards = [row["reward"] for row in rows]
    return {
        "loss": 1 - skill,
        "policy/entropy": 1 - skill / 2,
        "policy/approx_kl": skill / 100,
        "policy/grad_norm": 0.2,
        "lr": 3e-4,
        "reward/mean": float(np.mean(rewards)),
        "reward/std": float(np.std(rewards)),
        "reward/iou": float(np.mean([row["rewards"]["iou"] for row in rows])),
        "reward/format": float(np.mean([row["rewards"]["format"] for row in rows])),
        "reward/zero_std_groups": 0.25,
        "completion/length": 18.0,
        "completion/min_length": 12.0,
        "completion/max_length": 40.0,
        "completion/truncated": 0.0,
        "completion/repetition": 0.0,
        "time/rollout": 0.5,
        "time/update": 0.25,
        "tokens_per_second": 300.0,
        "memory/peak": 0.7,
    }


def measure(folder: Path, task: VisualTaskEnv, count: int, skill: float, rng: np.random.Generator) -> None:
    """Writes an evaluation."""
    answers = []
    for index in range(count):
        row = answered(task, index, skill, rng)
        target = task.target(task.source.get(index))
        kept = {name: row[name] for name in ("id", "index", "prompt", "completion", "rewards")}
        measures = task.measure(row["completion"], target, row["rewards"])
        answers.append(kept | {"prediction": task.parse(row["completion"]), "target": target, "measures": measures})
    write_evaluation(Evaluation(summarise(task, answers), answers), folder)


def embedded(html: str) -> dict[str, Any]:
    """The data of a report."""
    packed = html.partition('id="data">')[2].partition("</script>")[0]
    data: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed, validate=True)))
    return data
