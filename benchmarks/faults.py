"""Does faults to short runs of training, and tells what becomes of them.

    python benchmarks/faults.py --kills 40 --output benchmarks/faults.md

Each line of the table is a kind of fault: what was done, how often, what must happen, and how often it did. "Goes on
bit for bit" means that the resumed run has the metrics (but times), completions and weights of an undisturbed one. Ends
with status 1 if anything else happens.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
import tyro
from PIL import Image
from safetensors.torch import load_file

from vlmenv.cli import main as vlmenv
from vlmenv.core.errors import ModelError
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
        started = time.monotonic()
        self.whole = folder / "whole"
        self.begin(self.whole).communicate()
        self.seconds = time.monotonic() - started
        self._number = 0

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
        """True if a run has become what the undisturbed one is."""
        with contextlib.suppress(OSError, ValueError):
            weights = f"checkpoints/step-{STEPS}/model.safetensors"
            ours, theirs = load_file(run / weights), load_file(self.whole / weights)
            equal = all(torch.equal(ours[name], theirs[name]) for name in theirs)
            completions = [(one / "rollouts.jsonl").read_bytes() for one in (run, self.whole)]
            return equal and _metrics(run) == _metrics(self.whole) and completions[0] == completions[1]
        return False


def _row(i: int) -> dict[str, object]:
    turns = [{"from": "human", "value": f"Where is {i}?"}, {"from": "gpt", "value": f"[1, 2, 30, {30 + i}]"}]
    return {"id": i, "image": f"{i}.png", "conversations": turns}


def _metrics(run: Path) -> list[dict[str, float]]:
    timed = ("time/", "tokens_per_second")
    return [{n: v for n, v in row.items() if not n.startswith(timed)} for row in RunFolder(run).history()]


def killed(lab: Laboratory) -> Iterator[Line]:
    """SIGKILL at random moments, a quarter of them in the writing of a checkpoint."""
    anywhere = Line("SIGKILL at a random moment", BIT_FOR_BIT)
    saving = Line("SIGKILL in the writing of a checkpoint", BIT_FOR_BIT)
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
    settings = Path(__file__).resolve().parents[1] / "examples" / "accelerate" / "ddp.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(settings), "--main_process_port", "0"]
    two = [sys.executable, *launcher, "--num_processes", "2"]
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
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


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
}
"""By the names that `--only` takes."""


def main(args: Args) -> None:
    """Does the faults, and writes the table."""
    if unknown := set(args.only) - KINDS.keys():
        sys.exit(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # or runs inherit from nohup that it is ignored, which they obey
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
