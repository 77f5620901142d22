from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmenv.envs.rewards import workers as module
from vlmenv.envs.rewards.workers import Losses, WorkerLostError, Workers

JOBS = """
import mmap, os, sys, threading, time

def loaded():
    return sorted({"torch", "transformers"} & set(sys.modules))

def noisy(*values):
    print(*values)
    os.write(2, b"noise")
    return "done"

def overflow():
    sys.setrecursionlimit(10**9)
    def deeper(n):
        return deeper(n + 1) + 1
    return deeper(0)

def raising(error):
    raise error

def killing(targets, marker, times):
    # as the system does for want of memory, so many times
    with open(marker, "a+") as file:
        file.write("x")
        file.flush()
        file.seek(0)
        if len(file.read()) <= times:
            for target in targets:
                os.kill(target, 9)
    return "survived"

FUNCTIONS = {
    "kill the fork": lambda *arguments: killing([os.getpid()], *arguments),
    "kill both": lambda *arguments: killing([os.getppid(), os.getpid()], *arguments),
    "double": lambda x: 2 * x,
    "sleep": lambda seconds: time.sleep(seconds) or "slept",
    "power": lambda exponent: 9**exponent % 7,  # one C call that gives way to no other thread
    "memory": lambda size: len(bytearray(size)),
    "address space": lambda size: len(mmap.mmap(-1, size)),
    "pid": os.getpid,
    "pids": lambda: (os.getppid(), os.getpid()),
    "exit": os._exit,
    "raise": raising,
    "overflow": overflow,
    "noisy": noisy,
    "loaded": loaded,
    "unpicklable": lambda: threading.Lock(),
}

def make():
    return lambda name, *arguments: FUNCTIONS[name](*arguments)

def make_slowly():
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    return make()

def make_or_die():
    killing([os.getpid()], os.environ["MARKER"], int(os.environ["TIMES"]))
    return make()

def fail():
    raise ImportError("no such thing")

def leave():
    os._exit(3)
"""

Call = tuple[Any, ...]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the path with what the children run."""
    folder: Path = tmp_path_factory.mktemp("jobs")
    (folder / "worker_jobs.py").write_text(JOBS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture(scope="module")
def workers(jobs: Path) -> Iterator[Workers]:
    workers = Workers("worker_jobs:make", 0.2, patience=3)
    yield workers
    workers.close()


def run(workers: Workers, *calls: Call) -> list[Any]:
    return workers.map(calls)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def is_running(pid: int) -> bool:
    """Also of processes that are not this one's children; not of zombies."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_results_come_in_order(workers: Workers) -> None:
    assert workers.map([("double", i) for i in range(200)]) == [2 * i for i in range(200)]
    assert workers.map([]) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        ("raise", ValueError("bad")),
        ("raise", SystemExit(1)),
        ("exit", 0),
        ("overflow",),
        ("unpicklable",),
        ("memory", 3 * 2**30),
        ("address space", 3 * 2**30),
        ("sleep", 60),
        ("power", 10**9),
    ],
    ids=str,
)
def test_a_call_that_fails_gives_none_and_costs_no_other(workers: Workers, call: Call) -> None:
    first, lost, *others = run(workers, ("double", 1), call, ("double", 2), ("double", 3))
    assert (first, others) == (2, [4, 6])
    assert lost is None or isinstance(lost, TimeoutError)
    assert run(workers, ("double", 4)) == [8]


def test_a_call_that_raises_ends_no_process(workers: Workers) -> None:
    (pid,) = run(workers, ("pid",))
    assert run(workers, ("raise", ValueError("bad"))) == [None]
    assert run(workers, ("pid",)) == [pid]


@pytest.mark.slow
def test_it_is_computing_that_is_limited_first(jobs: Path) -> None:
    workers = Workers("worker_jobs:make", 0.5)
    assert run(workers, ("sleep", 0.7)) == ["slept"]
    workers.close()


def test_memory_below_the_limit_can_be_used(workers: Workers) -> None:
    assert run(workers, ("memory", 2**27)) == [2**27]


def test_nothing_reaches_the_terminal(jobs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    workers = Workers("worker_jobs:make", 1)
    assert run(workers, ("noisy", "a"), ("raise", ValueError()), ("exit", 1)) == ["done", None, None]
    workers.close()
    assert capfd.readouterr() == ("", "")


def test_children_load_no_model_library(workers: Workers) -> None:
    assert run(workers, ("loaded",)) == [[]]


def test_what_cannot_be_sent_is_an_error_and_blocks_nothing(workers: Workers) -> None:
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        run(workers, ("double", threading.Lock()))
    assert run(workers, ("double", 1)) == [2]


@pytest.mark.slow
def test_processes_are_started_as_needed(jobs: Path) -> None:
    workers = Workers("worker_jobs:make", 1)
    assert not workers._all
    workers.start()
    workers.start()
    (started,) = workers._all
    ((first, fork),) = run(workers, ("pids",))
    assert first == started.process.pid
    assert run(workers, ("pids",)) == [(first, fork)]
    run(workers, *[("double", 1)] * 100)
    assert len(workers._all) <= min(len(os.sched_getaffinity(0)), module.MOST_PROCESSES)
    processes = [worker.process for worker in workers._all]
    workers.close()
    assert all(process.returncode is not None for process in processes)  # waited for: no zombies


@pytest.mark.slow
def test_starting_up_is_not_timed(jobs: Path) -> None:
    workers = Workers("worker_jobs:make_slowly", 0.05)
    assert run(workers, ("double", 1)) == [2]
    workers.close()


@pytest.mark.parametrize(
    ("factory", "message"),
    [("fail", "ImportError: no such thing"), ("leave", "exit status 3"), ("nothing", "AttributeError")],
)
def test_a_process_that_cannot_start_is_an_error_and_no_result(jobs: Path, factory: str, message: str) -> None:
    workers = Workers(f"worker_jobs:{factory}", 1)
    with pytest.raises(RuntimeError, match=message):
        run(workers, ("double", 1))
    assert not workers._all


@pytest.mark.slow
def test_a_call_that_computes_too_long_costs_no_new_start(jobs: Path) -> None:
    workers = Workers("worker_jobs:make", 0.2)
    ((first, fork),) = run(workers, ("pids",))
    assert run(workers, ("power", 10**9)) == [None]
    ((same, other),) = run(workers, ("pids",))
    assert (same, workers.lost) == (first, 0)
    assert other != fork
    workers.close()


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_others_end_is_replaced(workers: Workers, which: int) -> None:
    (pids,) = run(workers, ("pids",))
    os.kill(pids[which], signal.SIGKILL)
    assert wait_until(lambda: not is_running(pids[which]))
    time.sleep(0.05)
    assert workers.map([("double", i) for i in range(4)]) == [0, 2, 4, 6]
    assert run(workers, ("pids",)) != [pids]
    assert wait_until(lambda: not is_running(pids[1]))


@pytest.mark.slow
@pytest.mark.parametrize("job", ["kill the fork", "kill both"])
def test_a_call_whose_process_others_end_is_made_again(
    jobs: Path, tmp_path: Path, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers("worker_jobs:make", 1)
    losses = Losses()
    monkeypatch.setattr(module, "LOSSES", losses)
    with pytest.warns(RuntimeWarning, match="was ended from outside"):
        assert run(workers, (job, str(tmp_path / "once"), 1)) == ["survived"]
    assert workers.lost == 1
    with warnings.catch_warnings(action="error"):  # it is told once
        assert run(workers, (job, str(tmp_path / "again"), 1)) == ["survived"]
    assert losses == Losses(processes=2)
    workers.lost = 1
    (lost,) = run(workers, (job, str(tmp_path / "always"), 99))
    assert isinstance(lost, WorkerLostError)
    assert workers.lost == 4
    assert (tmp_path / "always").read_text() == "xxx"
    assert run(workers, ("double", 1)) == [2]
    workers.close()


@pytest.mark.slow
def test_a_process_that_others_end_while_it_starts_is_started_again(
    jobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARKER", str(tmp_path / "once"))
    monkeypatch.setenv("TIMES", "1")
    workers = Workers("worker_jobs:make_or_die", 1)
    assert run(workers, ("double", 1)) == [2]
    assert workers.lost == 1
    workers.close()
    monkeypatch.setenv("TIMES", "99")
    with pytest.raises(RuntimeError, match="could not start: ended with exit status -9, 3 times"):
        run(workers, ("double", 1))
    assert not workers._all


@pytest.mark.slow
def test_an_order_to_end_a_call_that_comes_late_costs_the_next_one_nothing(jobs: Path) -> None:
    workers = Workers("worker_jobs:make", 5)
    ((first, fork),) = run(workers, ("pids",))
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(run(workers, ("sleep", 0.3))))
    thread.start()
    time.sleep(0.1)
    os.kill(first, signal.SIGUSR1)
    thread.join(20)
    assert results == ["slept"]
    assert not is_running(fork)
    workers.close()


def test_an_interrupt_from_the_keyboard_is_the_parents(workers: Workers) -> None:
    (pids,) = run(workers, ("pids",))
    for pid in pids:
        assert os.getpgid(pid) == pids[0] != os.getpgid(0)  # not in the group that the terminal interrupts
        os.kill(pid, signal.SIGINT)
    time.sleep(0.05)
    assert run(workers, ("pids",)) == [pids]


@pytest.mark.slow
def test_a_call_that_waits_too_long_is_ended(workers: Workers) -> None:
    (pids,) = run(workers, ("pids",))
    (lost,) = run(workers, ("sleep", 60))
    assert isinstance(lost, TimeoutError)
    assert wait_until(lambda: not is_running(pids[1]))
    assert run(workers, ("pids",))[0][0] == pids[0]  # what has been loaded stays


def test_several_threads_at_once(workers: Workers) -> None:
    results: dict[int, list[Any]] = {}

    def work(base: int) -> None:
        results[base] = workers.map([("double", base + i) for i in range(50)])

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == {1000 * t: [2 * (1000 * t + i) for i in range(50)] for t in range(4)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_starts_its_own(workers: Workers) -> None:
    (mine,) = run(workers, ("pid",))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            (theirs,) = run(workers, ("pid",))
            os.write(write, str(theirs).encode())
        finally:
            os._exit(0)
    os.close(write)
    theirs = os.read(read, 100)
    os.close(read)
    os.waitpid(child, 0)
    assert int(theirs) != mine
    assert run(workers, ("pid",)) == [mine]
    assert wait_until(lambda: not is_running(int(theirs)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_does_not_keep_its_parents_processes_alive(jobs: Path) -> None:
    """A script is killed while a process of its works, and a fork of it lives on."""
    script = """
        import os, threading, time
        from vlmenv.envs.rewards.workers import Workers
        workers = Workers("worker_jobs:make", 10)
        (pids,) = workers.map([("pids",)])
        threading.Thread(target=workers.map, args=([("sleep", 0.5)],), daemon=True).start()
        time.sleep(0.1)
        fork = os.fork()
        if fork == 0:
            time.sleep(60)
        print(*pids, fork, flush=True)
        time.sleep(60)
    """
    with script_running(script, jobs) as process:
        assert process.stdout is not None
        *pids, fork = map(int, process.stdout.readline().split())
        try:
            process.kill()
            assert wait_until(lambda: not any(map(is_running, pids)))
            assert is_running(fork)
        finally:
            os.kill(fork, signal.SIGKILL)


def script_running(script: str, jobs: Path) -> subprocess.Popen[str]:
    path = jobs / "script.py"  # beside the jobs, which it can thus import
    path.write_text(textwrap.dedent(script))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, env=environment, text=True)


@pytest.mark.parametrize("ending", ["", "os.kill(os.getpid(), 9)"])
def test_children_end_with_the_parent_whose_script_is_not_run_again(jobs: Path, ending: str) -> None:
    script = f"""
        import os, threading, time
        from vlmenv.envs.rewards.workers import Workers
        print("script")
        workers = Workers("worker_jobs:make", 1)
        threading.Thread(target=lambda held=workers: time.sleep(60), daemon=True).start()
        workers.start()
        print(*workers.map([("pids",)])[0], flush=True)
        {ending}
    """
    with script_running(script, jobs) as process:
        output, _ = process.communicate(timeout=20)
    first, *pids = output.split()
    assert first == "script"
    assert ending or not Path(f"/proc/{pids[0]}").exists()  # waited for, where the parent could
    assert wait_until(lambda: not any(is_running(int(pid)) for pid in pids))


def test_a_child_at_work_does_not_outlive_its_parent_for_long(jobs: Path) -> None:
    script = """
        import threading, time
        from vlmenv.envs.rewards.workers import Workers
        workers = Workers("worker_jobs:make", 0.2, patience=1)
        print(*workers.map([("pids",)])[0], flush=True)
        workers.map([("power", 10**9)])
    """
    with script_running(script, jobs) as process:
        assert process.stdout is not None
        pids = list(map(int, process.stdout.readline().split()))
        time.sleep(0.1)
        process.kill()
        assert wait_until(lambda: not any(map(is_running, pids)), 5)


def test_a_copy_starts_its_own(workers: Workers) -> None:
    (mine,) = run(workers, ("pid",))
    for other in (copy.deepcopy(workers), pickle.loads(pickle.dumps(workers))):
        assert not other._all
    (theirs,) = run(other, ("pid",))
    other.close()
    assert theirs != mine


def test_what_is_no_longer_used_is_ended(jobs: Path) -> None:
    workers = Workers("worker_jobs:make", 1)
    ((first, fork),) = run(workers, ("pids",))
    del workers
    assert wait_until(lambda: not Path(f"/proc/{first}").exists())  # no zombie either
    assert wait_until(lambda: not is_running(fork))
