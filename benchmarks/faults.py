"""Does faults to short runs of training, and tells what becomes of them.

    python benchmarks/faults.py --kills 40 --output benchmarks/faults.md

Each line of the table is a kind of fault: what was done, how often, what must happen, and how often it did. "Goes on
bit for bit" means that the resumed run has the metrics (but times), completions and weights of an undisturbed one. Ends
with status 1 if anything else happens.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import platform
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Final

import psutil
import torch
import tyro
from PIL import Image
from safetensors.torch import load_file

from vlmenv.agents.engines.fingerprints import fingerprint
from vlmenv.agents.vlm import find_model
from vlmenv.cli import main as vlmenv
from vlmenv.core.errors import ModelError
from vlmenv.envs.data.images import FORMATS
from vlmenv.runs.checkpoints import find_checkpoint
from vlmenv.runs.run_folder import RunFolder

STEPS, EVERY, ROWS = 6, 2, 12
BIT_FOR_BIT = "goes on bit for bit"


@dataclass
class Args:
    """Do faults to runs."""

    kills: int = 40
    """Runs to kill at random moments."""
    signals: int = 2
    """Runs to stop by each signal, singly and doubled."""
    seed: int = 0
    """Of the moments and places."""
    only: tuple[str, ...] = ()
    """Kinds of faults to do. Default: all."""
    output: Path | None = None
    """Markdown file for the table, which is written after each line."""


@dataclass
class Line:
    """A kind of fault, and how often what must happen did."""

    fault: str
    must: str
    done: int = 0
    right: int = 0
    others: list[str] = field(default_factory=list)
    """what happened instead"""

    def count(self, right: bool, what: str) -> None:
        """Counts a case."""
        self.done += 1
        self.right += right
        if not right:
            self.others.append(what[-300:])


class Laboratory:
    """A folder with a small data set, an undisturbed run on it, and copies of that run.

    Args:
        folder: An empty folder.
        args: The options.
    """

    def __init__(self, folder: Path, args: Args) -> None:
        self.folder, self.args, self.random = folder, args, random.Random(args.seed)
        self.data = folder / "rows.jsonl"
        self.lines = [json.dumps(_row(i)) for i in range(ROWS)]
        self.paint()
        self.data.write_text("\n".join(self.lines) + "\n")
        self.seconds, self._number = 0.0, 0

    @functools.cached_property
    def whole(self) -> Path:
        """The undisturbed run, which is made when it is first asked for."""
        run, started = self.folder / "whole", time.monotonic()
        process = self.begin(run)
        printed, _ = process.communicate()
        if process.returncode:
            sys.exit(f"the undisturbed run ended with status {process.returncode}: {printed}")
        self.seconds = time.monotonic() - started
        return run

    def paint(self, colour: str | None = None) -> None:
        """Writes the rows' images. Default: each of its own shade."""
        for i in range(ROWS):
            Image.new("RGB", (64, 64), colour or (20 * i, 0, 0)).save(self.folder / f"{i}.png")

    def command(self, run: Path) -> list[str]:
        """The arguments of a run, but for its steps."""
        sizes = ["--prompts-per-step", "2", "--group-size", "4", "--eval-limit", "4", "--device", "cpu"]
        options = ["--dataset", str(self.data), "--checkpoint-every", str(EVERY), *sizes]
        return ["train", "--output", str(run), *options]

    def begin(
        self, run: Path, before: tuple[str, ...] = (), settings: Mapping[str, str] = MappingProxyType({})
    ) -> subprocess.Popen[str]:
        """Starts a run in a process of its own."""
        command = [*before, sys.executable, "-m", "vlmenv", *self.command(run), "--steps", str(STEPS)]
        environment = os.environ | settings
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    def await_first_step(self, process: subprocess.Popen[str], run: Path) -> None:
        """Waits until a run has finished a step, or has ended."""
        while process.poll() is None and not (run / "metrics.jsonl").exists():
            time.sleep(0.01)

    def go_on(self, run: Path) -> str:
        """Resumes a run, or begins it if it had not begun, and returns what is printed."""
        return self.resume(run) if (run / "config.yaml").exists() else self.begin(run).communicate()[0]

    def new(self) -> Path:
        """A folder for another run."""
        self._number += 1
        return self.folder / f"run-{self._number}"

    def copy(self, newest: int = 4) -> Path:
        """A copy of the undisturbed run as it was after a step."""
        run = Path(shutil.copytree(self.whole, self.new()))
        for folder in RunFolder(run).checkpoints():
            if RunFolder.step_of(folder) > newest:
                shutil.rmtree(folder)
        return run

    def resume(self, run: Path, *options: str) -> str:
        """Goes on with a run in this process, and returns what is printed."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), contextlib.suppress(SystemExit):
            vlmenv(["train", "--resume", str(run), *options])
        return " ".join(printed.getvalue().split())

    def is_whole(self, run: Path) -> bool:
        """True if a run has become what the undisturbed one is; else the difference is printed."""
        try:
            different = self._difference(run)
        except (OSError, ValueError) as error:
            different = str(error)
        if different:
            print(f"    {run.name} is not the undisturbed run: {different}", flush=True)
        return not different

    def _difference(self, run: Path) -> str:
        weights = f"checkpoints/step-{STEPS}/model.safetensors"
        ours, theirs = load_file(run / weights), load_file(self.whole / weights)
        rows = zip(_metrics(run), _metrics(self.whole), strict=True)
        others = [name for row, same in rows for name in row if row[name] != same.get(name)]
        others += [name for name in theirs if not torch.equal(ours[name], theirs[name])]
        if len({(one / "rollouts.jsonl").read_bytes() for one in (run, self.whole)}) > 1:
            others.append("rollouts.jsonl")
        return ", ".join(others)


def _row(i: int) -> dict[str, object]:
    turns = [{"from": "human", "value": f"Where is {i}?"}, {"from": "gpt", "value": f"[1, 2, 30, {30 + i}]"}]
    return {"id": i, "image": f"{i}.png", "conversations": turns}


def _metrics(run: Path) -> list[dict[str, float]]:
    timed = ("time/", "memory/", "tokens_per_second")
    return [{n: v for n, v in row.items() if not n.startswith(timed)} for row in RunFolder(run).history()]


def killed(lab: Laboratory) -> Iterator[Line]:
    """SIGKILL at random moments, a quarter of them in the writing of a checkpoint."""
    anywhere = Line("SIGKILL at a random moment", BIT_FOR_BIT)
    saving = Line("SIGKILL in the writing of a checkpoint", BIT_FOR_BIT)
    assert lab.whole.exists()  # which tells how long a run takes
    for number in range(lab.args.kills):
        run = lab.new()
        process = lab.begin(run)
        if number % 4:
            time.sleep(lab.random.uniform(0.1, lab.seconds))
        else:
            partial = run / "checkpoints" / f".step-{lab.random.randrange(EVERY, STEPS + 1, EVERY)}"
            while process.poll() is None and not (partial.exists() or partial.with_name(partial.name[1:]).exists()):
                time.sleep(0.001)
            time.sleep(lab.random.uniform(0, 0.05))
        process.kill()
        process.communicate()
        printed = lab.go_on(run)
        (anywhere if number % 4 else saving).count(lab.is_whole(run), printed)
    yield from (line for line in (saving, anywhere) if line.done)


def signalled(lab: Laboratory) -> Iterator[Line]:
    """Signals that ask for the end, once and twice."""
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for times in (1, 2):
            word = "once" if times == 1 else "twice at once"
            line = Line(f"{kind.name} {word}", f"saves the last step, exit status {128 + kind}; {BIT_FOR_BIT}")
            for _ in range(lab.args.signals):
                run = lab.new()
                process = lab.begin(run)
                lab.await_first_step(process, run)
                for _ in range(times):
                    process.send_signal(kind)
                printed, _ = process.communicate()
                steps, saved = len(RunFolder(run).history()), RunFolder(run).checkpoints()
                kept = process.returncode == 128 + kind and RunFolder.step_of(saved[-1]) == steps
                printed += lab.resume(run)
                line.count(kept and lab.is_whole(run), printed)
            yield line


def damaged(lab: Laboratory) -> Iterator[Line]:
    """Each file of the newest checkpoint cut, flipped and removed, with the one before it whole."""
    must = "is found by name; the checkpoint before it is taken"
    for what, do in (("cut in half", _cut), ("with a flipped bit", _flip), ("removed", Path.unlink)):
        line = Line(f"a file of the newest checkpoint {what}, each in turn", must)
        newest = lab.whole / "checkpoints" / "step-4"
        for file in sorted(file.relative_to(newest) for file in newest.rglob("*") if file.is_file()):
            run = lab.copy()
            do(run / "checkpoints" / "step-4" / file)
            found = find_checkpoint(RunFolder(run))
            told = " ".join(found.notes)
            # Without trainer.pt a folder is no checkpoint, and there is nothing to tell.
            named = str(file) in told or (file.name == "trainer.pt" and what == "removed")
            line.count(found.step == 2 and named, told)
            shutil.rmtree(run)
        yield line
    line = Line("a flipped bit in the weights, then training", f"the checkpoint before it {BIT_FOR_BIT}")
    run = lab.copy()
    _flip(run / "checkpoints" / "step-4" / "model.safetensors")
    printed = lab.resume(run)
    line.count(lab.is_whole(run) and "is passed over" in printed, printed)
    yield line
    line = Line("all checkpoints damaged", "is an error that names them; nothing is trained")
    run = lab.copy()
    for folder in RunFolder(run).checkpoints():
        _flip(folder / "trainer.pt")
    try:
        line.count(False, str(find_checkpoint(RunFolder(run)).folder))
    except ModelError as error:
        line.count("step-4 is passed over" in str(error) and "step-2 is passed over" in str(error), str(error))
    yield line


def strange(lab: Laboratory) -> Iterator[Line]:
    """Folders beside the checkpoints that are none of this run's."""
    line = Line("step-5-good, `step-9 (copy)` and a file step-8 beside the checkpoints", BIT_FOR_BIT)
    run = lab.copy()
    for name in ("step-5-good", "step-9 (copy)"):
        shutil.copytree(run / "checkpoints" / "step-2", run / "checkpoints" / name)
    (run / "checkpoints" / "step-8").touch()
    printed = lab.resume(run)
    line.count(lab.is_whole(run), printed)
    yield line
    line = Line("a checkpoint of another run", "is passed over by its run's id")
    run, other = lab.copy(), lab.new()
    lab.begin(other).communicate()
    shutil.copytree(other / "checkpoints" / "step-6", run / "checkpoints" / "step-6")
    found = find_checkpoint(RunFolder(run))
    line.count(found.step == 4 and "of another run" in " ".join(found.notes), " ".join(found.notes))
    yield line


def logged(lab: Laboratory) -> Iterator[Line]:
    """Logs with a broken end and a broken middle."""
    ends = {"half a line": b'{"step": 5, "rew', "NULs": b"\0" * 4096, "bytes that are no text": b"\xff\xfe\x80"}
    for what, end in ends.items():
        line = Line(f"{what} at the end of each log", BIT_FOR_BIT)
        run = lab.copy()
        for name in ("metrics.jsonl", "rollouts.jsonl", "warnings.jsonl"):
            with (run / name).open("ab") as stream:
                stream.write(end)
        printed = lab.resume(run)
        line.count(lab.is_whole(run), printed)
        yield line
    line = Line("NULs in the middle of each log", "goes on; tells file and line")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        run = lab.copy()
        rows = (run / name).read_bytes().split(b"\n")
        rows[1] = b"\0" * len(rows[1])
        (run / name).write_bytes(b"\n".join(rows))
        printed = lab.resume(run)
        line.count(f"{name}:2: the line cannot be read" in printed and len(_metrics(run)) == STEPS, printed)
    yield line


def changed(lab: Laboratory) -> Iterator[Line]:
    """Data sets and options that change between."""
    ways: dict[str, Callable[[list[str]], list[str]]] = {
        "reordered": lambda lines: lines[::-1],
        "shortened": lambda lines: lines[:8],
        "doubled": lambda lines: lines * 2,
        "given another answer": lambda lines: [*lines[:-1], lines[-1].replace("30", "29")],
        "given another question": lambda lines: [lines[0].replace("Where", "Show"), *lines[1:]],
        "given a row more": lambda lines: [*lines, lines[0]],
    }
    for what, change in ways.items():
        line = Line(f"the data set {what}", "is refused with what changed; goes on with --data-changed")
        run = lab.copy()
        lab.data.write_text("\n".join(change(lab.lines)) + "\n")
        printed, after = lab.resume(run), lab.resume(run, "--data-changed")
        lab.data.write_text("\n".join(lab.lines) + "\n")
        refused = "the data set has changed since" in printed
        line.count(refused and len(_metrics(run)) == STEPS and (run / "changes.jsonl").exists(), printed + after)
        yield line
    line = Line("config.yaml emptied", BIT_FOR_BIT)
    run = lab.copy()
    (run / "config.yaml").write_text("")
    printed = lab.resume(run)
    line.count(lab.is_whole(run), printed)
    yield line
    line = Line("lr edited in config.yaml", "is told, and recorded with the step")
    run = lab.copy()
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "lr: 1.0e-05\n")
    printed = lab.resume(run)
    line.count("option lr: 1e-05, was 0.0003" in printed and '"lr"' in (run / "changes.jsonl").read_text(), printed)
    yield line


def together(lab: Laboratory) -> Iterator[Line]:
    """Two runs in one folder."""
    line = Line("two runs begun in one folder", "one is refused, with the other's process named; the other is whole")
    run = lab.new()
    processes = [lab.begin(run) for _ in range(2)]
    printed = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    refused = [text for text, code in zip(printed, codes, strict=True) if code]
    named = len(refused) == 1 and "written by process" in " ".join(refused[0].split())
    line.count(named and lab.is_whole(run), str(printed))
    yield line
    line = Line("--resume beside the living run", "is refused, with its process named; the run is whole")
    run = lab.new()
    process = lab.begin(run)
    lab.await_first_step(process, run)
    text = lab.resume(run)
    process.communicate()
    line.count(f"written by process {process.pid}" in text and lab.is_whole(run), text)
    yield line


def unheard(lab: Laboratory) -> Iterator[Line]:
    """Standard output that goes away."""
    line = Line("the reader of the output ends, as `| head` does", "the run goes on to its end, status 0")
    run = lab.new()
    process = lab.begin(run)
    assert process.stdout is not None
    process.stdout.close()
    line.count(process.wait() == 0 and lab.is_whole(run), str(process.returncode))
    yield line


def full(lab: Laboratory) -> Iterator[Line]:
    """A disk that is full before each file that a run writes, and at places within them."""
    files = sorted((file for file in lab.whole.rglob("*") if file.is_file()), key=lambda file: file.stat().st_mtime_ns)
    sizes = [file.stat().st_size for file in files]
    ends = list(itertools.accumulate(sizes))
    line = Line(
        "the disk full in the writing of each file, each in turn",
        f"status 1, tells so; with room again it {BIT_FOR_BIT}",
    )
    if not _can_mount(lab):
        yield _left_out(line, "needs root, to mount a small disk")
        return
    measured = next(file for file in files if file.parent.name == "before").stat().st_mtime_ns
    for file, end, size in zip(files, ends, sizes, strict=True):
        with _disk(lab, 2 * ends[-1] + 2**22) as disk:
            run, ballast, free = disk / "run", disk / "ballast", max(0, end - size // 2)
            late = file.stat().st_mtime_ns > measured  # a run that sees the full disk at its start is refused
            if not late:
                _fill(ballast, free)
            process = lab.begin(run)
            while late and process.poll() is None and not (run / "before").exists():
                time.sleep(0.001)
            if late:
                _fill(ballast, max(0, free - _bytes(run)))
            printed, _ = process.communicate()
            ballast.unlink()
            told = process.returncode == 0 or "No space left on device" in printed or "too little room" in printed
            whole = process.returncode == 0 and lab.is_whole(run)
            printed += "" if whole else lab.go_on(run)
            line.count(told and lab.is_whole(run), f"{free} bytes free, status {process.returncode}: {printed}")
    yield line


def gone(lab: Laboratory) -> Iterator[Line]:
    """A folder that is removed, or that may no longer be written."""
    line = Line("the run's folder removed while it runs", "ends with status 1, names the folder; does not hang")
    run = lab.new()
    process = lab.begin(run)
    lab.await_first_step(process, run)
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(run, ignore_errors=True)  # what was being written meanwhile
    printed, _ = process.communicate()
    line.count(process.returncode == 1 and run.name in printed and "Traceback" not in printed, printed)
    yield line
    line = Line("the run's disk made read-only while it runs", f"status 1, tells so; writable again it {BIT_FOR_BIT}")
    if not _can_mount(lab):
        yield _left_out(line, "needs root, to mount a disk")
        return
    with _disk(lab, 2**28) as disk:
        run = disk / "run"
        process = lab.begin(run)
        lab.await_first_step(process, run)
        for options in (
            ("--bind", str(disk)),
            ("-o", "remount,bind,ro"),
        ):  # over the disk, as the run holds a file open
            subprocess.run(["mount", *options, str(disk)], check=True)
        printed, _ = process.communicate()
        subprocess.run(["umount", str(disk)], check=True)
        told = process.returncode == 1 and "Read-only file system" in printed
        printed += lab.go_on(run)
        line.count(told and lab.is_whole(run), f"status {process.returncode}: {printed}")
    yield line


def clock(lab: Laboratory) -> Iterator[Line]:
    """A clock that is set back: between runs, so that all files are of the future."""
    line = Line("the clock set back by a day between: all files are a day ahead", BIT_FOR_BIT)
    run = lab.copy()
    for file in (run, *run.rglob("*")):
        os.utime(file, (time.time() + 86_400,) * 2)
    printed = lab.resume(run)
    line.count(lab.is_whole(run), printed)
    yield line
    line = Line("the clock set back by a day within a run", BIT_FOR_BIT)
    if shutil.which("faketime") is None:
        yield _left_out(line, "needs the program faketime")
        return
    run, stamp = lab.new(), lab.folder / "clock"
    stamp.write_text("+0")
    settings = {"FAKETIME_TIMESTAMP_FILE": str(stamp), "FAKETIME_NO_CACHE": "1", "DONT_FAKE_MONOTONIC": "1"}
    process = lab.begin(run, before=("faketime", "-f", "+0"), settings=settings)
    lab.await_first_step(process, run)
    stamp.write_text("-1d")
    printed, _ = process.communicate()
    line.count(process.returncode == 0 and lab.is_whole(run), printed)
    yield line


def ranked(lab: Laboratory) -> Iterator[Line]:
    """Another number of ranks on each side of a checkpoint."""
    line = Line(
        "ranks 2 → 1 → 2, two steps each", "goes on, with a warning that it is not bit for bit; all steps are there"
    )
    run = lab.new()
    two = _two_ranks()
    printed = [_run([*two, "-m", "vlmenv", *lab.command(run), "--steps", "2"])]
    printed.append(lab.resume(run, "--steps", "4"))
    printed.append(_run([*two, "-m", "vlmenv", "train", "--resume", str(run), "--steps", "6"]))
    warned = [
        f"saved by {was} ranks, and {now} go on" in text for was, now, text in ((2, 1, printed[1]), (1, 2, printed[2]))
    ]
    line.count(all([*warned, *_metrics(run)]) and len(_metrics(run)) == STEPS, str(printed))
    yield line


def repainted(lab: Laboratory) -> Iterator[Line]:
    """Images that change during training."""
    line = Line("each image replaced by another during training", "goes on with what is there; status 0, all steps")
    run = lab.new()
    process = lab.begin(run)
    lab.await_first_step(process, run)
    lab.paint("blue")
    printed, _ = process.communicate()
    lab.paint()
    line.count(process.returncode == 0 and len(_metrics(run)) == STEPS, printed)
    yield line
    line = Line(
        "each image replaced by a broken one during training", f"status 1, names row and image; mended it {BIT_FOR_BIT}"
    )
    run = lab.new()
    process = lab.begin(run)
    lab.await_first_step(process, run)
    for i in range(ROWS):
        (lab.folder / f"{i}.png").write_bytes(b"no image")
    printed, _ = process.communicate()
    lab.paint()
    named = process.returncode == 1 and "rows.jsonl:" in printed and ".png" in printed
    printed += lab.resume(run)
    line.count(named and lab.is_whole(run), printed)
    yield line


def scored(lab: Laboratory) -> Iterator[Line]:
    """Scoring workers that others end, as the system does when memory is short."""
    line = Line("scoring workers killed while they score", "no right answer is wrong; what has no verdict is counted")
    answers, data, out = (lab.folder / name for name in ("answers.jsonl", "math.jsonl", "scores.jsonl"))
    rows = [{"image": "0.png", "problem": "?", "answer": f"\\frac{{{i}}}{{7}}"} for i in range(1, 400)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = [f"<think>x</think> <answer>\\frac{{{2 * i}}}{{14}}</answer>" for i in range(1, 400)]
    answers.write_text("".join(json.dumps({"completion": text}) + "\n" for text in told))
    command = ["score", str(answers), "--dataset", str(data), "--env", "VLM-Math-v0", "--output", str(out)]
    process = _started(command)
    while process.poll() is None:
        for child in _children(process.pid):
            child.kill()
        time.sleep(lab.random.uniform(0.5, 3))
    printed = process.communicate()[0]
    verdicts = (
        [json.loads(row)["rewards"].get("accuracy") for row in out.read_text().splitlines()] if out.exists() else []
    )
    lost = verdicts.count(None)
    right = len(verdicts) == len(rows) and set(verdicts) <= {1.0, None} and (not lost or str(lost) in printed)
    line.count(right, f"status {process.returncode}: {printed}")
    yield line


def launched(lab: Laboratory) -> Iterator[Line]:
    """Several ranks that are told to end, or lose their launcher."""
    ways = {
        "SIGTERM to all ranks and their launcher at once": lambda process, ranks: [
            one.terminate() for one in [*ranks, process]
        ],
        "the launcher of two ranks killed": lambda process, ranks: process.kill(),
    }
    for what, do in ways.items():
        line = Line(what, "the last step is saved, all processes end, and one rank goes on")
        run = lab.new()
        process = subprocess.Popen(
            [*_two_ranks(), "-m", "vlmenv", *lab.command(run), "--steps", "400"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        lab.await_first_step(process, run)
        ranks = _children(process.pid)
        do(process, ranks)
        printed = process.communicate()[0]
        _, living = psutil.wait_procs(ranks, timeout=120)
        last = len(_metrics(run))
        saved = [RunFolder.step_of(folder) for folder in RunFolder(run).checkpoints()]
        printed += lab.resume(run, "--steps", str(last + 1))
        line.count(not living and saved[-1:] == [last] and len(_metrics(run)) == last + 1, printed)
        yield line


def decoded(lab: Laboratory) -> Iterator[Line]:
    """Images that are none, are too much, or are elsewhere."""
    folder = lab.new()
    folder.mkdir()
    Image.init()
    line = Line(
        "an image in each format that Pillow writes, each in turn", "listed ones are read, all others refused by name"
    )
    for name in sorted(Image.SAVE):
        file = folder / f"image-{name}"
        with contextlib.suppress(Exception):  # which cannot write this picture
            Image.new("RGB", (64, 64)).save(file, name)
        if file.exists():
            status, told = _checked(folder, file.name)
            line.count(status == int(name not in FORMATS) and (not status or file.name in told), f"{name}: {told}")
    yield line
    line = Line("a PNG of 400 million pixels in 50 kB", "is refused by name, or read in less than 1 GB")
    _write_bomb(folder / "bomb.png", 20_000)
    status, told = _checked(folder, "bomb.png")
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    line.count(("bomb.png" in told if status else True) and most < 1, f"{most:.1f} GB: {told}")
    yield line
    line = Line(
        "a FIFO, a device, a folder, a link to itself, a cut file as an image", "is refused by name; does not hang"
    )
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "cut.png").write_bytes((lab.folder / "0.png").read_bytes()[:60])
    for name in ("pipe.png", "/dev/zero", "folder.png", "loop.png", "cut.png"):
        status, told = _checked(folder, name)
        line.count(status == 1 and name in told, told)
    yield line
    line = Line("a path that leaves the image root, with --confine-images", "is refused by name")
    (folder / "link.png").symlink_to(lab.folder / "0.png")
    for name in ("../0.png", str(lab.folder / "0.png"), "link.png"):
        status, told = _checked(folder, name, "--confine-images")
        line.count(status == 1 and "lies outside" in told, told)
    yield line


def misread(lab: Laboratory) -> Iterator[Line]:
    """Files of data and options that are not as they should be."""
    row = json.dumps(_row(3))
    contents = {
        "nested too deeply": row[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "with a key twice": row[:-1] + ', "id": 7}',
        "with a number of 5,000 digits": row[:-1] + ', "x": ' + "9" * 5000 + "}",
        "with NaN in a box": row.replace("[1, 2", "[NaN, 2"),
        "with infinity in a box": row.replace("[1, 2", "[1e999, 2"),
        "cut in half": row[: len(row) // 2],
        "of NULs": "\0" * 100,
        "in UTF-16": row.encode("utf-16"),
        "in Latin-1": row.encode().replace(b"Where", b"Wh\xe8re"),
    }
    line = Line(f"a row {', '.join(contents)}", "is refused with file and line; --skip-broken goes on without it")
    file = lab.folder / "misread.jsonl"
    for what, content in contents.items():
        last = content if isinstance(content, bytes) else content.encode()
        file.write_bytes("\n".join(lab.lines).encode() + b"\n" + last + b"\n")
        status, told = _said("train", "--dataset", str(file), "--dry-run", "--device", "cpu")
        skipped, after = _said("train", "--dataset", str(file), "--dry-run", "--device", "cpu", "--skip-broken")
        named = f"misread.jsonl:{ROWS + 1}" in told
        line.count(status == 1 and named and skipped == 0, f"{what}: {told} {after}")
    yield line
    line = Line(
        "a row whose prompt is too long for the model", "is refused before step 1; goes on with --max-prompt-tokens"
    )
    long = _row(3)
    long["conversations"] = [{"from": "human", "value": "word " * 5000}, {"from": "gpt", "value": "[1, 2, 3, 4]"}]
    file.write_text("\n".join([*lab.lines, json.dumps(long)]) + "\n")
    options = [*lab.command(lab.new()), "--dataset", str(file), "--steps", "1"]
    status, told = _said(*options)
    skipped, after = _said(*options, "--max-prompt-tokens", "300")
    line.count(status == 1 and f"misread.jsonl:{ROWS + 1}" in told and skipped == 0 and "1 of" in after, told + after)
    yield line


def untrainable(lab: Laboratory) -> Iterator[Line]:
    """Models that cannot be trained as they are."""
    line = Line("weights quantised by bitsandbytes, AWQ, GPTQ, FP8, mxfp4", "are refused by name; nothing is loaded")
    for kind in ("bitsandbytes", "awq", "gptq", "fp8", "mxfp4"):
        folder = _model_with(lab, quantization_config={"quant_method": kind})
        (folder / "model.safetensors").unlink()
        status, told = _said(*lab.command(lab.new()), "--model", str(folder), "--steps", "1")
        line.count(status == 1 and kind in told.lower() and "quantised" in told, told)
    yield line
    line = Line("flash_attention_2 in config.json", "is replaced with a line, and training goes on")
    folder = _model_with(lab, _attn_implementation="flash_attention_2", attn_implementation="flash_attention_2")
    status, told = _said(*lab.command(lab.new()), "--model", str(folder), "--steps", "1")
    line.count(status == 0 and "flash_attention_2" in told, told)
    yield line


def surrounded(lab: Laboratory) -> Iterator[Line]:
    """Processes that lack what others have."""
    ways = {
        "standard input closed": "exec 0<&-",
        "standard output closed": "exec 1>&-",
        "all standard streams closed": "exec 0<&- 1>&- 2>&-",
        "no home folder": "unset HOME",
        "a home folder that cannot be written": "export HOME=/proc",
        "a TMPDIR that does not exist": "export TMPDIR=/nonexistent",
        "the locale C, without UTF-8": "export LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONIOENCODING=ascii",
        "64 open files": "ulimit -n 64",
        "another time zone": "export TZ=Pacific/Kiritimati",
    }
    line = Line(f"a run with {', '.join(ways)}", "goes to its end, and is bit for bit the undisturbed one")
    for what, way in ways.items():
        run = lab.new()
        process = lab.begin(run, before=("bash", "-c", f'{way}; exec "$@"', "bash"))
        printed = process.communicate()[0]
        line.count(process.returncode == 0 and lab.is_whole(run), f"{what}: status {process.returncode}: {printed}")
    yield line
    line = Line("a run whose files may have 1 MB", f"status 1, tells so; without the limit it {BIT_FOR_BIT}")
    run = lab.new()
    process = lab.begin(run, before=("bash", "-c", 'ulimit -f 1000; exec "$@"', "bash"))
    printed = process.communicate()[0]
    told = process.returncode == 1 and "File too large" in printed
    printed += lab.go_on(run)
    line.count(told and lab.is_whole(run), f"status {process.returncode}: {printed}")
    yield line


def disguised(lab: Laboratory) -> Iterator[Line]:
    """Text that would change a terminal, and passwords."""
    line = Line("markup, escape sequences and control characters in names and data", "change nothing on the terminal")
    folder = lab.folder / "a [b]\x1b[31m\r :smile: \u202e[red]"
    folder.mkdir()
    Image.new("RGB", (48, 48)).save(folder / "a.png")
    texts = ("[/b]", "\x1b[31m", "\x1b]0;x\x07", "a\rb", "[link=x]", ":smile:", "\u202ex", "$\\frac{1$")
    rows = [{"id": t, "image": "a.png", "problem": f"Which {t}?", "answer": t, "subject": t} for t in texts]
    file = folder / "rows [red].jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--env", "VLM-VQA-v0", "--dataset", str(file), "--device", "cpu", "--max-new-tokens", "4"]
    run = folder / "run"
    commands = (
        ["train", *data, "--steps", "1", "--prompts-per-step", "1", "--group-size", "2", "--output", str(run)],
        ["eval", *data, "--model", str(run)],
        ["sample", *data, "--n", "2", "--output", str(folder / "sampled")],
        ["data", "check", str(file), "--env", "VLM-VQA-v0"],
        ["export", str(run), str(folder / "exported")],
    )
    for command in commands:
        status, told = _said(*command)
        line.count(status == 0 and all(one.isprintable() for one in told), told)
    yield line
    line = Line("a password in --judge-url", "is in no output and in no file")
    judge = ["--judge-url", "http://me:geheim@127.0.0.1:9/v1", "--judge-model", "x", "--rewards", "judge", "1"]
    run = folder / "judged"
    _, told = _said(*[part for part in commands[0] if part != str(run)], *judge, "--output", str(run))
    kept = b"".join(one.read_bytes() for one in run.rglob("*") if one.is_file())
    line.count("geheim" not in told and b"geheim" not in kept and "judge" in told, told)
    yield line


def flipped(lab: Laboratory) -> Iterator[Line]:
    """Checksums of weights."""
    line = Line("one bit flipped in each of 32 numbers, in 5,000 vectors", "the checksum is another")
    draw = torch.Generator().manual_seed(lab.args.seed)
    for number in range(5_000):
        bits = torch.randint(-(2**31), 2**31, (32,), generator=draw).int()
        other = bits ^ (1 << number % 31)
        line.count(fingerprint([bits]) != fingerprint([other]), f"bit {number % 31} of {bits.tolist()}")
    yield line


def served(lab: Laboratory) -> Iterator[Line]:
    """Strangers at a server, by the tests that attack a real one."""
    line = Line(
        "a stranger, a web page and a trainer beyond its rights at `vlmenv serve`", "get nothing and change nothing"
    )
    if find_spec("vllm") is None:
        yield _left_out(line, "needs vLLM")
        return
    tests = Path(__file__).resolve().parents[1] / "tests" / "agents" / "test_vllm_servers.py"
    chosen = ["-k", "stranger or beyond or fetched or command_line or another_token", "-m", "vllm"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", *chosen, str(tests)],
        capture_output=True,
        text=True,
        check=False,
    )
    line.count(done.returncode == 0, done.stdout)
    yield line


def _said(*args: str) -> tuple[int, str]:
    """The exit status of a command in this process, and what it prints."""
    printed, status = io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            vlmenv(list(args))
        except SystemExit as end:
            status = int(end.code or 0)
    return status, " ".join(printed.getvalue().split(None))


def _started(command: list[str]) -> subprocess.Popen[str]:
    full = [sys.executable, "-m", "vlmenv", *command]
    return subprocess.Popen(full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _children(process: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process).children(recursive=True)
    return []


def _checked(folder: Path, image: str, *options: str) -> tuple[int, str]:
    """What `vlmenv data check` says of an image, in a process of its own."""
    file = folder / "checked.jsonl"
    file.write_text(json.dumps(_row(0) | {"image": image}) + "\n")
    process = _started(["data", "check", str(file), "--decode", *options])
    try:
        printed, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        return -1, "hangs"
    return process.returncode, " ".join(printed.split())


def _write_bomb(file: Path, side: int) -> None:
    """Writes a black PNG of one bit a pixel."""

    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", rows) + part(b"IEND", b""))


def _model_with(lab: Laboratory, **changes: object) -> Path:
    """A copy of the built-in model with other keys in its config.json."""
    folder = Path(shutil.copytree(find_model("builtin"), lab.new()))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def _two_ranks() -> list[str]:
    settings = Path(__file__).resolve().parents[1] / "examples" / "accelerate" / "ddp.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(settings), "--main_process_port", "0"]
    return [sys.executable, *launcher, "--num_processes", "2"]


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return " ".join((done.stdout + done.stderr).split())


def _can_mount(lab: Laboratory) -> bool:
    with contextlib.suppress(OSError, subprocess.CalledProcessError), _disk(lab, 2**20):
        return True
    return False


@contextlib.contextmanager
def _disk(lab: Laboratory, size: int) -> Iterator[Path]:
    """A disk in memory of some bytes, for the block."""
    folder = lab.new()
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True, capture_output=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _fill(ballast: Path, free: int) -> None:
    """Fills the disk of a file until some bytes are free."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass
    os.truncate(ballast, max(0, ballast.stat().st_size - free))


def _bytes(folder: Path) -> int:
    """The bytes of a folder's files; those that a run renames meanwhile may count for nothing."""
    sizes = []
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(file.stat().st_size * file.is_file())
    return sum(sizes)


def _left_out(line: Line, why: str) -> Line:
    line.must += f" (not done here: {why})"
    return line


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def table(lines: list[Line], seconds: float) -> str:
    """The lines as Markdown."""
    rows = [f"| {one.fault} | {one.must} | {f'{one.right} of {one.done}' if one.done else '-'} |" for one in lines]
    others = [f"- {one.fault}: {' '.join(what.split())}" for one in lines for what in one.others]
    threads = torch.get_num_threads()
    return "\n".join(
        [
            "# Faults that are done to runs\n",
            f"`python {' '.join(sys.argv)}`: runs of {STEPS} steps of the built-in model on {ROWS} rows, a checkpoint "
            f"every {EVERY} steps.",
            f"{platform.machine()}, {os.cpu_count()} CPU cores, {threads} threads, torch {torch.__version__}; "
            f"{seconds / 60:.0f} minutes.\n",
            "| fault | must happen | happened |",
            "|---|---|---|",
            *rows,
            *(["\nWhat happened instead:\n", *others] if others else []),
            "",
        ]
    )


KINDS: Final[dict[str, Callable[[Laboratory], Iterator[Line]]]] = {
    "damaged": damaged,
    "strange": strange,
    "logged": logged,
    "changed": changed,
    "together": together,
    "unheard": unheard,
    "full": full,
    "gone": gone,
    "clock": clock,
    "ranked": ranked,
    "repainted": repainted,
    "signalled": signalled,
    "killed": killed,
    "launched": launched,
    "scored": scored,
    "decoded": decoded,
    "misread": misread,
    "untrainable": untrainable,
    "surrounded": surrounded,
    "disguised": disguised,
    "flipped": flipped,
    "served": served,
}
"""By the names that `--only` takes."""


def main(args: Args) -> None:
    """Does the faults, and writes the table."""
    if unknown := set(args.only) - KINDS.keys():
        sys.exit(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    for ignored in (signal.SIGHUP, signal.SIGINT):  # under nohup, and in the background: runs would obey that
        signal.signal(ignored, signal.SIG_DFL)
    started, lines = time.monotonic(), list[Line]()
    with tempfile.TemporaryDirectory() as folder:
        lab = Laboratory(Path(folder), args)
        for kind in args.only or KINDS:
            for line in KINDS[kind](lab):
                print(f"{line.right} of {line.done}  {line.fault}", *line.others, sep="\n    ", flush=True)
                lines.append(line)
                if args.output is not None:
                    args.output.write_text(table(lines, time.monotonic() - started), encoding="utf-8")
    sys.exit(any(line.others for line in lines))


if __name__ == "__main__":
    main(tyro.cli(Args))
