"""The command under `accelerate launch`, where something ends it early."""

from __future__ import annotations

import json
import re
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
from conftest import launch, start
from PIL import Image
from servers import free_port
from torch.distributed import TCPStore

from vlmenv.cli import main

LONG = ["--steps", "100000"]
"""of a run that a signal ends, however fast the machine is"""
TINY = ["--prompts-per-step", "4", "--group-size", "2", "--eval-limit", "0", "--device", "cpu", "--output", "run"]


def rows_with_a_broken_image(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>Where is it?"}, {"from": "gpt", "value": "[1, 2, 30, 40]"}]
    rows = [{"id": i, "image": f"{i}.png", "conversations": turns} for i in range(16)]
    for row in rows:
        Image.new("RGB", (64, 64), "red").save(folder / row["image"])
    (folder / "11.png").write_bytes((folder / "11.png").read_bytes()[:-60])
    (folder / "rec.jsonl").write_text("\n".join(map(json.dumps, rows)))


def wait_for_a_step(run: Path) -> None:
    """Waits until the first step of a run is done, 5 minutes at most."""
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_an_error_in_one_process_is_told_and_ends_the_other(kind: str, tmp_path: Path) -> None:
    rows_with_a_broken_image(tmp_path)
    options = ["--steps", "8", "--checkpoint-every", "1", "--dataset", "rec.jsonl", "--image-root", "."]
    done = launch(kind, "-m", "vlmenv", "train", *options, *TINY, cwd=tmp_path)
    assert done.returncode == 1
    assert "rec.jsonl:12 (id 11): ./11.png cannot be read as an image" in done.stderr
    messages = [line for line in done.stderr.splitlines() if line.startswith("error in process ")]
    assert sorted(line[17] for line in messages) == ["0", "1"]
    assert all("11.png cannot be read" in line for line in messages)
    assert sum(": rank " in line for line in messages) == 1
    (newest,) = [line for line in done.stdout.splitlines() if line.startswith("ended early; run/checkpoints/step-")]
    assert (tmp_path / newest.split()[2] / "process-1.pt").is_file()
    assert "launched as this run was" in newest


def test_a_signal_to_the_launcher_ends_the_run_after_its_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with start("ddp", "-m", "vlmenv", "train", *LONG, *TINY, cwd=tmp_path) as process:
        wait_for_a_step(run)
        process.terminate()
        out, _ = process.communicate(timeout=300)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [f"step-{steps[-1]}"]
    assert f"holds the state after step {steps[-1]}" in out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_the_ranks_of_a_launcher_that_is_killed_save_and_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with start("ddp", "-m", "vlmenv", "train", *LONG, *TINY, cwd=tmp_path) as process:
        wait_for_a_step(run)
        ranks = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=120)
        for rank in alive:
            rank.kill()
        process.communicate()
    assert not alive
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert last < 100000
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [f"step-{last}"]


def test_all_ranks_are_told_at_once_and_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler signals ranks and launcher, which signals the ranks too, and then all again; the state is saved."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    with start("ddp", "-m", "vlmenv", "train", *LONG, *TINY, cwd=tmp_path) as process:
        wait_for_a_step(run)
        second = launch("ddp", "-m", "vlmenv", "train", "--resume", "run", cwd=tmp_path)
        assert second.returncode == 1
        assert second.stderr.count("run is written by process ") >= 1
        launcher = psutil.Process(process.pid)
        for one in [*launcher.children(recursive=True), launcher] * 2:
            with suppress(psutil.NoSuchProcess):
                one.terminate()
        out, _ = process.communicate(timeout=300)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [f"step-{last}"]
    assert f"holds the state after step {last}" in out
    assert not (run / ".lock").exists()
    main(["train", "--resume", "run", "--steps", str(last + 1)])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, last + 2))
    changes = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
    assert [change["ranks"] for change in changes] == [[2, 1]]


def test_another_number_of_ranks_with_shards_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From two to one, which has whole weights, and back to two."""
    monkeypatch.chdir(tmp_path)
    done = launch("fsdp2", "-m", "vlmenv", "train", "--steps", "1", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    main(["train", "--resume", "run", "--steps", "2"])
    done = launch("fsdp2", "-m", "vlmenv", "train", "--resume", "run", "--steps", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert "was saved with whole copies, and FSDP2 goes on" in told
    assert "saved by 1 ranks, and 2 go on: the run is not the same bit for bit" in told
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    changes = [json.loads(line) for line in (tmp_path / "run" / "changes.jsonl").read_text().splitlines()]
    assert [change["ranks"] for change in changes] == [[2, 1], [1, 2]]


def test_a_signal_to_one_rank_ends_all(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with start("ddp", "-m", "vlmenv", "train", *LONG, *TINY, cwd=tmp_path) as process:
        wait_for_a_step(run)
        psutil.Process(process.pid).children()[-1].terminate()
        out, err = process.communicate(timeout=300)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [f"step-{last}"]
    assert f"holds the state after step {last}" in out
    assert "error in process" not in err
    assert not (run / ".lock").exists()


def test_a_signal_while_ranks_agree_ends_them_all_at_the_next_step() -> None:
    """The signalled rank has told the others that it goes on: it neither forgets the signal nor ends alone."""
    done = launch("ddp", str(Path(__file__).parent / "signalled_processes.py"))
    assert done.returncode == 0, done.stderr
    told = "[False, True, True]"
    assert sorted(done.stdout.splitlines()) == [f"rank {rank}: {told}" for rank in range(2)]


def test_a_signal_to_one_rank_after_the_last_step_ends_all(tmp_path: Path) -> None:
    """It comes while the main rank draws the curve: no rank goes on to a measurement that another never enters."""
    (tmp_path / "drawing.py").write_text(
        "import signal, sys\nfrom vlmenv.cli import main\nfrom vlmenv.runs import loop\n\n"
        "loop.draw_curve = lambda *_: signal.raise_signal(signal.SIGTERM)\nmain(sys.argv[1:])\n"
    )
    done = launch("ddp", "drawing.py", "train", "--steps", "1", *TINY, "--eval-limit", "4", cwd=tmp_path)
    assert done.returncode == 1
    assert "error in process" not in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-1" / "trainer.pt").is_file()


def test_a_rank_waits_for_the_others_no_longer_than_allowed(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(
        "import os, time\n\ndef late(text, truth):\n    time.sleep(9 * int(os.environ['RANK']))\n    return 1.0\n"
    )
    options = ["--steps", "1", "--rewards", "late:late", "1", "--rank-timeout", "0.05"]
    done = launch("ddp", "-m", "vlmenv", "train", *options, *TINY, "--prompts-per-step", "2", cwd=tmp_path)
    assert done.returncode != 0
    assert "another process has not answered for 3 seconds" in done.stderr


@pytest.mark.parametrize("store", ["of the launcher", "of the main rank"])
def test_a_rank_that_nobody_comes_to_says_so(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    with ExitStack() as opened:
        if store == "of the launcher":
            monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
            opened.callback(TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False).set, "over", "")
        with pytest.raises(SystemExit):
            main(["train", *TINY[:-1], str(tmp_path / "run"), "--rank-timeout", "0.02"])
    assert re.search(r"another process has not answered for \d seconds", capsys.readouterr().err)
