"""Compares runs that were killed by SIGKILL at random moments and resumed with undisturbed runs.

    python benchmarks/kill_and_resume.py --output benchmarks/kill_and_resume.md

A fifth of the moments are spread over the whole run. The others are, in turn, in a step, in the writing of a
checkpoint, in the evaluation before training, and in the one after it. Half of the runs are killed again after they
were resumed. In the end all files of a run must be the same bit for bit, except times, pictures and TensorBoard
files. Ends with status 1 if anything differs.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file

SETTINGS = {
    "grpo": ["--mu", "2", "--minibatches", "2", "--beta", "0.01"],
    "adapters": ["--lora-rank", "4", "--lora-dropout", "0.1", "--lora-vision", "--beta", "0.01"],
    "ppo": ["--algo", "ppo", "--vision-lr", "1e-4"],
    "dapo": ["--algo", "dapo", "--most-rounds", "3"],
}
SMALL = "--prompts-per-step 2 --group-size 4 --eval-limit 16 --eval-every 4 --checkpoint-every 3 --keep 2 --device cpu"
PHASES = (None, "training", "writing a checkpoint", "measuring before", "measuring after")
"""Where the moments lie in turn; None is anywhere in the run."""
TEXTS = ("rollouts.jsonl", "evaluation.json", "best.json", "before/answers.jsonl", "before/metrics.json")


@dataclass
class Args:
    """Kill runs and go on with them."""

    kills: int = 20
    """Runs to kill, once or twice."""
    steps: int = 16
    """Of each run."""
    seed: int = 0
    """Of the moments."""
    folder: Path | None = None
    """Where the runs are kept; nowhere where left out."""
    output: Path | None = None
    """Markdown file for the table."""


@dataclass
class Moment:
    """When to kill."""

    delay: float
    """seconds after the process, or the phase, began"""
    phase: str | None = None
    after_step: int = 0
    """the phase after this step"""


@dataclass
class Kill:
    """One kill and what came of it."""

    seconds: float
    """after the process began"""
    during: str
    step: int
    """steps that were written down"""
    went_on_from: str = ""
    """what the next process said, if it lived to say it"""


@dataclass
class Process:
    """`vlmenv train` on a run's folder."""

    run: Path
    steps: int
    options: list[str]
    """empty to resume the run"""
    started: float = field(init=False)

    def __enter__(self) -> Process:
        self.run.parent.mkdir(parents=True, exist_ok=True)
        what = ["--output", str(self.run), *self.options] if self.options else ["--resume", str(self.run)]
        self._log = self.run.with_suffix(".log").open("w")
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vlmenv", "train", *what],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # another number of threads rounds otherwise
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.started

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.run.with_suffix(".log").read_text()

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def finish(self) -> int:
        """Waits for its end; its exit status."""
        return self._process.wait()

    def phase(self) -> str:
        """What it is doing, by what is in the folder."""
        if not (self.run / "config.yaml").exists() or not (self.options or self.went_on_from()):
            return "start-up"
        if any((self.run / "checkpoints").glob(".step-*")):
            return "writing a checkpoint"
        if not (self.run / "before" / "metrics.json").exists():
            return "measuring before"
        return "training" if steps_of(self.run) < self.steps else "measuring after"

    def went_on_from(self) -> str:
        """The step that it says it goes on from."""
        found = re.search(r"going on after step (\d+)|(no checkpoint yet)", self.output)
        return "" if found is None else found[1] or "0"

    def kill(self, at: Moment) -> Kill:
        while not (at.phase is None or self.is_over() or self._has_come_to(at.phase, at.after_step)):
            time.sleep(0.001)
        due = (self.started if at.phase is None else time.monotonic()) + at.delay
        while time.monotonic() < due and not self.is_over():
            time.sleep(0.001)
        killed = Kill(self.seconds, "after its end" if self.is_over() else self.phase(), steps_of(self.run))
        self._process.kill()
        self._process.wait()
        return killed

    def _has_come_to(self, phase: str, after_step: int) -> bool:
        return steps_of(self.run) >= after_step and self.phase() == phase


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, rng = args.folder or Path(temporary), random.Random(args.seed)
        names = list(SETTINGS)[: args.kills]
        whole = {name: undisturbed(folder / name / "whole", options_of(name, args.steps), args.steps) for name in names}
        rows, broken = [], 0
        for i in range(args.kills):
            name = names[i % len(names)]
            run, lasting, spread = folder / name / f"killed-{i + 1}", whole[name], (i + rng.random()) / args.kills
            moments = [draw(rng, lasting, args.steps, PHASES[i % len(PHASES)], spread)]
            moments += [draw(rng, lasting, args.steps, rng.choice(PHASES), rng.random())] * rng.choice([0, 1])
            kills = killed(run, options_of(name, args.steps), args.steps, moments)
            unlike = differences(folder / name / "whole", run)
            rows.append(row(i + 1, name, kills, unlike))
            broken += bool(unlike)
            print(rows[-1], flush=True)
    report(args, rows, broken, {name: sum(lasting.values()) for name, lasting in whole.items()})
    sys.exit(1 if broken else 0)


def options_of(name: str, steps: int) -> list[str]:
    return ["--steps", str(steps), *SMALL.split(), *SETTINGS[name]]


def draw(rng: random.Random, lasting: dict[str, float], steps: int, phase: str | None, share: float) -> Moment:
    """A random moment of a phase, or after this share of the whole run."""
    if phase is None:
        return Moment(share * sum(lasting.values()))
    if phase == "training":
        return Moment(rng.random() * lasting[phase] / steps, phase, after_step=rng.randrange(steps))
    if phase == "writing a checkpoint":
        return Moment(rng.random() * lasting[phase], phase, after_step=rng.choice([*range(3, steps, 3), steps]))
    return Moment(rng.random() * lasting[phase], phase)


def undisturbed(run: Path, options: list[str], steps: int) -> dict[str, float]:
    """Trains, and tells how many seconds each phase lasted."""
    lasting: dict[str, float] = {}
    with Process(run, steps, options) as process:
        before = process.started
        while not process.is_over():
            time.sleep(0.001)
            now = time.monotonic()
            phase = process.phase()
            lasting[phase] = lasting.get(phase, 0.0) + now - before
            before = now
        if process.finish():
            raise SystemExit(f"{run}: the undisturbed run failed: {process.output}")
    lasting["writing a checkpoint"] /= len(range(3, steps, 3)) + 1  # each
    return lasting


def killed(run: Path, options: list[str], steps: int, moments: list[Moment]) -> list[Kill]:
    """A run whose processes are killed at these moments, but for the last."""
    kills: list[Kill] = []
    for moment in [*moments, None]:
        begun = (run / "config.yaml").exists()
        if kills and not begun:
            check_nothing_to_resume(run)
        with Process(run, steps, [] if begun else options) as process:
            status = process.finish() if moment is None else None
            new = None if moment is None else process.kill(moment)
            if kills:
                kills[-1].went_on_from = process.went_on_from() if begun else "command again"
        kills += [] if new is None else [new]
        if status:
            print(f"{run}: exit status {status}\n{process.output}", file=sys.stderr)
    return kills


def check_nothing_to_resume(run: Path) -> None:
    """Going on with a run that was killed before its options were written must say that its command is needed."""
    with Process(run, 0, []) as process:
        if process.finish() != 1 or "give its command again" not in " ".join(process.output.split()):
            raise SystemExit(f"{run}: no such message: {process.output}")


def steps_of(run: Path) -> int:
    """Steps that a run has written down."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def differences(whole: Path, run: Path) -> list[str]:
    """The files in which a run is unlike another."""
    found = [name for name in TEXTS if text(whole / name) != text(run / name)]
    if timeless(whole) != timeless(run):
        found.append("metrics.jsonl")
    folders = ("checkpoints", "best")
    names = [
        {str(file.relative_to(one)) for part in folders for file in (one / part).rglob("*")} for one in (whole, run)
    ]
    found += sorted(names[0] ^ names[1])
    stored = [name for name in sorted(names[0] & names[1]) if name.endswith((".safetensors", ".pt"))]
    return found + [name for name in stored if not equal(stored_in(whole / name), stored_in(run / name))]


def text(file: Path) -> str | None:
    return file.read_text() if file.exists() else None


def timeless(run: Path) -> list[dict[str, Any]] | None:
    """The metrics of all steps but for what the clock tells."""
    if (lines := text(run / "metrics.jsonl")) is None:
        return None
    rows = [json.loads(line) for line in lines.splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/", "tokens_per_second"))} for row in rows
    ]


def stored_in(file: Path) -> Any:
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def equal(a: Any, b: Any) -> bool:
    """Whether two values are the same, tensors in them bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def row(number: int, name: str, kills: list[Kill], unlike: list[str]) -> str:
    cells = [
        ", ".join(f"{kill.seconds:.2f} s" for kill in kills),
        ", ".join(kill.during for kill in kills),
        ", ".join(str(kill.step) for kill in kills),
        ", ".join(kill.went_on_from or "killed before" for kill in kills),
        f"NO: {', '.join(unlike)}" if unlike else "yes",
    ]
    return f"| {number} | {name} | {' | '.join(cells)} |"


def report(args: Args, rows: list[str], broken: int, seconds: dict[str, float]) -> None:
    times = ", ".join(f"{name} {total:.0f}" for name, total in seconds.items())
    lines = [
        "# Runs killed and resumed",
        "",
        f"    python benchmarks/kill_and_resume.py --kills {args.kills} --steps {args.steps} --seed {args.seed}",
        "",
        f"`vlmenv train --steps {args.steps} {SMALL}` on the built-in model, with",
        "",
        *(f"- {name}: `{' '.join(options)}`" for name, options in SETTINGS.items()),
        "",
        "killed by SIGKILL at random moments, some twice, and gone on with by `--resume`. The same bit for bit as an "
        "undisturbed run are, or are not: metrics but for times, completions, evaluations before and after, the best "
        "model, and in all checkpoints weights, optimiser and random states, with no file more or less.",
        "",
        f"{os.cpu_count()} cores of {processor()}, one thread, float32, torch {torch.__version__}; seconds of the "
        f"undisturbed runs: {times}. **{len(rows) - broken} of {len(rows)} the same.**",
        "",
        "| | settings | killed after | during | steps written | went on after step | the same |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    print("\n".join(lines))
    if args.output is not None:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def processor() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0].partition(":")[2].strip() if models else platform.machine()


if __name__ == "__main__":
    main(tyro.cli(Args))
