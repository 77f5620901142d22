"""The time of a training step now beside that of an earlier commit, in pairs.

    python benchmarks/step_pairs.py --before 25178d8~1 --output benchmarks/step_pairs.md

Each version runs in a process of its own, with one thread. They take steps by turns, the first one alternating, from
the same seed, at a learning rate that changes nothing: both do the same work. The seconds of the processor are
compared, on which other work of the machine has less influence than on those of the clock.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks/findings"))
WARMUP = 5
"""Steps of each before the pairs."""
CHILD = "take-steps"
"""The first argument of a process that takes the steps of a version."""


@dataclass
class Args:
    """Compare steps of GRPO of two versions."""

    before: str
    """Commit of the earlier version."""
    env: str = "VLM-REC-v0"
    """Task, of one turn."""
    prompts: tuple[int, ...] = (4, 16)
    """In a step, a row of the table each; eight answers to each."""
    pairs: int = 60
    """Steps of each version."""
    output: Path | None = None
    """Markdown file for the table."""


def main(args: Args) -> None:
    from runs import hardware, tell_rows  # not for processes with an earlier version

    lines = [
        "# Steps, now and before",
        "",
        f"    python benchmarks/step_pairs.py --before {args.before} --env {args.env} --pairs {args.pairs}",
        "",
        f"GRPO with the built-in model on `{args.env}`, whole steps by turns with those of commit "
        f"`{revision(args.before)}`, {args.pairs} pairs; {hardware()}, 1 thread. Seconds of the processor are medians. "
        "The ratio is that of the two steps of a pair: its median and quartiles.",
        "",
        "| prompts, of 8 answers | before (s) | now (s) | ratio | quartiles | pairs with the same answers |",
        "|---" * 6 + "|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        unpack(args.before, Path(folder))
        tell_rows(lines, (row(Path(folder), prompts, args) for prompts in args.prompts), args.output)


def revision(commit: str) -> str:
    return subprocess.check_output(["git", "rev-parse", "--short", commit], cwd=ROOT, text=True).strip()


def unpack(commit: str, folder: Path) -> None:
    """Writes the files of a commit into a folder."""
    content = subprocess.check_output(["git", "archive", commit], cwd=ROOT)
    with tarfile.open(fileobj=BytesIO(content)) as archive:
        archive.extractall(folder, filter="tar")


def row(old: Path, prompts: int, args: Args) -> str:
    processes = [begin(tree, prompts, args.env) for tree in (old, ROOT)]
    for process in processes * WARMUP:
        step(process)
    found = np.empty((args.pairs, 2, 2))  # seconds and mean length
    for i in range(args.pairs):
        for k in (0, 1) if i % 2 else (1, 0):
            found[i, k] = step(processes[k])
    for process in processes:
        process.communicate()
    before, now = np.median(found[:, :, 0], axis=0)
    low, middle, high = np.quantile(found[:, 1, 0] / found[:, 0, 0], (0.25, 0.5, 0.75))
    same = int((found[:, 0, 1] == found[:, 1, 1]).sum())
    return f"| {prompts} | {before:.3f} | {now:.3f} | {middle:.3f} | {low:.3f} to {high:.3f} | {same} |"


def begin(tree: Path, prompts: int, env: str) -> subprocess.Popen[str]:
    """A process that takes steps with the version in a folder."""
    command = [sys.executable, __file__, CHILD, str(prompts), env]
    environ = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=tree,
        env=environ,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def step(process: subprocess.Popen[str]) -> tuple[float, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("step\n")
    process.stdin.flush()
    seconds, length = process.stdout.readline().split()
    return float(seconds), float(length)


def take_steps(prompts: int, env: str) -> None:
    """Takes a step for each line of input, and prints its seconds and the mean length of its answers."""
    import gymnasium
    from accelerate import Accelerator

    from vlmenv.agents.vlm import Sampling, VLMAgent
    from vlmenv.algos import GRPO, GRPOConfig, Trainer, TrainerConfig

    torch.set_num_threads(1)
    agent = VLMAgent.from_pretrained("builtin", sampling=Sampling(max_new_tokens=48))
    envs = gymnasium.make_vec(f"vlmenv.envs:{env}", num_envs=8 * prompts, group_size=8)
    config = TrainerConfig(steps=10**6, lr=1e-9)
    steps = Trainer(agent, envs, GRPO(GRPOConfig(group_size=8)), config, Accelerator(cpu=True)).train(seed=0)
    for _ in sys.stdin:
        started = time.process_time()
        result = next(steps)
        print(time.process_time() - started, result.metrics["completion/length"], flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        take_steps(int(sys.argv[2]), sys.argv[3])
    else:
        main(tyro.cli(Args))
