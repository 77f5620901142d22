"""Runs a function in child processes, with a hard time limit for each call.

For work on untrusted text of unpredictable duration, such as computer algebra. Works from any thread. It does not use
multiprocessing's own start methods: `spawn` runs the user's script again, and `fork` copies locks that other threads
hold.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

START_LIMIT: Final = 120.0
"""Seconds in which a process must be ready to work."""
MEMORY_LIMIT: Final = 2 * 2**30
"""Bytes of address space that a process may take up."""
MOST_PROCESSES: Final = 8
"""There may be several training processes on a machine, each with workers of its own."""

PATIENCE: Final = 60.0
"""Wall-clock limit of a call, in seconds, beside its limit of processor time. A busy machine needs some time, and
results must not depend on how busy it is."""
TRIES: Final = 3
"""How often a call is made in all whose process others end, such as the system for want of memory."""
_MAIN: Final = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "  # Ctrl-C is the parent's to answer
    "import sys; from vlmenv.envs.rewards.workers import _serve; _serve(sys.argv[1], float(sys.argv[2]))"
)
_ONE_THREAD: Final = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class WorkerLostError(RuntimeError):
    """A process was ended by somebody else, each time that a call was made."""


@dataclass
class Losses:
    """What this process's scoring has lost to others that end its child processes, or that leave them no time."""

    processes: int = 0
    """child processes that others have ended, at work or while they started"""
    answers: int = 0
    """answers that score 0 without having been compared"""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, *, processes: int = 0, answers: int = 0) -> None:
        """Counts, and warns once of each kind."""
        with self._lock:
            first = (processes and not self.processes, answers and not self.answers)
            self.processes, self.answers = self.processes + processes, self.answers + answers
        for is_first, message in zip(first, (_ENDED, _UNSCORED), strict=True):
            if is_first:
                warnings.warn(message, RuntimeWarning, stacklevel=2)

    def since(self, former: Losses) -> Losses:
        """What has been lost since a `snapshot`."""
        return Losses(self.processes - former.processes, self.answers - former.answers)

    def told(self) -> str:
        """The answers without a verdict, in words; empty if there are none."""
        what = f"{self.answers} answers score 0 without having been compared: others ended the processes that compare"
        return f"{what}. Score them again" if self.answers else ""

    def snapshot(self) -> Losses:
        """A copy."""
        return Losses(self.processes, self.answers)


LOSSES: Final = Losses()
"""Those of this process."""
_ENDED: Final = (
    "a process that scores answers was ended from outside, perhaps by the system for want of memory. Its answers are "
    "scored again. Metrics count such processes as score/lost_processes; free memory if there are many."
)
_UNSCORED: Final = (
    "some answers score 0 without having been compared: their processes were ended from outside each time, perhaps by "
    "the system for want of memory, or got no computing time. They are compared anew when they come again. Metrics "
    "count them as score/unscored, an evaluation as unscored; free memory or CPUs if there are many."
)


class Workers:
    """Child processes that all run one function: as many as there is work for, at most one per usable CPU and eight.

    Each process stands by loaded while a fork of its works, and forks anew when a call ends the fork: nothing is loaded
    twice. May be used from several threads at once, and after a fork. A copy starts processes of its own.

    Args:
        factory: `"module:name"` of a function without parameters that returns the function to run. It is called
            once in each process, and may take its time over imports.
        time_limit: Seconds of computing that a call may take, start-up not counted.
        patience: Seconds by the clock that a call may take, whatever it waits for. Default: 60.
    """

    def __init__(self, factory: str, time_limit: float, patience: float = PATIENCE) -> None:
        self._factory = factory
        self._time_limit = time_limit
        self._patience = patience
        self.lost = 0
        """how many processes others have ended so far, at work or while they started"""
        self._renew()
        _OPEN.add(self)

    def __reduce__(self) -> tuple[type[Workers], tuple[str, float, float]]:
        return Workers, (self._factory, self._time_limit, self._patience)

    def _renew(self) -> None:
        self._all: set[_Worker] = set()
        self._idle: deque[_Worker] = deque()
        self._threads = ThreadPoolExecutor(min(_usable_cpus(), MOST_PROCESSES), thread_name_prefix="worker")

    def start(self) -> None:
        """Starts a process if there is none yet, without waiting until it is ready."""
        if not self._all:
            self._idle.append(self._new())

    def map(self, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Calls the function with each of the argument tuples.

        A call whose process is ended by somebody else is made again, three times in all.

        Returns:
            The results in order. None: the call raised, exceeded its computing time or memory, or ended its process. A
            TimeoutError: it exceeded the wall-clock limit. A WorkerLostError: others have ended its process three
            times.

        Raises:
            RuntimeError: A process could not be started.
        """
        return list(self._threads.map(self._call, arguments))

    def _call(self, arguments: tuple[Any, ...]) -> Any:
        for _ in range(TRIES):
            worker = self._take()
            try:
                result = worker.call(arguments, self._patience)
            except _EndedByOthersError as error:
                self._end(worker)
                self.lost += 1
                LOSSES.add(processes=1)
                lost = error
                continue
            except BaseException:
                self._end(worker)
                raise
            self._idle.append(worker)
            return result
        if not lost.has_started:
            raise RuntimeError(f"a worker process for {self._factory} could not start: {lost}, {TRIES} times")
        return WorkerLostError(f"{lost}, {TRIES} times")

    def _take(self) -> _Worker:
        """The idle process that worked last, or a new one."""
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return self._new()
            if worker.process.poll() is None:
                return worker
            self._end(worker)  # somebody else has ended it

    def _new(self) -> _Worker:
        worker = _Worker(self._factory, self._time_limit)
        self._all.add(worker)
        return worker

    def _end(self, worker: _Worker) -> None:
        self._all.discard(worker)
        worker.end()

    def close(self) -> None:
        """Ends the idle processes; the next call starts new ones."""
        while self._idle:
            self._end(self._idle.pop())

    def __del__(self) -> None:
        self.close()


class _EndedByOthersError(Exception):
    """A process has ended, and not by what it was asked to do."""

    def __init__(self, what: str, has_started: bool = True) -> None:
        super().__init__(what)
        self.has_started = has_started


class _Worker:
    """The parent's end of one process."""

    def __init__(self, factory: str, time_limit: float) -> None:
        self._connection, theirs = Pipe()
        self._factory = factory
        self._ready = False
        self._calls = 0
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)  # the child finds what the parent finds
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _MAIN, factory, str(time_limit)],
                env=os.environ | _ONE_THREAD | {"PYTHONPATH": paths},
                stdin=theirs.fileno(),  # a socket, which carries both directions
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that it can be ended with what it has forked
            )

    def call(self, arguments: tuple[Any, ...], patience: float) -> Any:
        """The function's result, or its replacement; see `Workers.map`."""
        if not self._ready:
            self._await_start()
        self._calls += 1
        request = pickle.dumps((self._calls, arguments))
        try:
            self._connection.send_bytes(request)
            return self._reply(time.monotonic() + patience)
        except (OSError, EOFError):
            raise _EndedByOthersError(f"ended with exit status {self._status()}") from None

    def _reply(self, until: float) -> Any:
        is_given_up = False
        while True:
            if not self._connection.poll(max(0.0, until - time.monotonic())):
                if is_given_up:
                    raise EOFError  # it does not even hear that it shall stop
                self._interrupt()
                is_given_up, until = True, time.monotonic() + _GRACE
                continue
            call, ending, value = self._connection.recv()
            if call != self._calls:
                continue  # of a fork that had nothing to do when somebody ended it
            if is_given_up and ending != _DONE:
                return TimeoutError("given up by the clock")
            if ending == _BY_OTHERS:
                raise _EndedByOthersError(f"ended by signal {value}")
            return value

    def _interrupt(self) -> None:
        """Has the process end its fork, and go on with a new one."""
        if hasattr(signal, "SIGUSR1"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGUSR1)

    def _await_start(self) -> None:
        try:
            fault = self._connection.recv() if self._connection.poll(START_LIMIT) else f"took over {START_LIMIT:g} s"
        except (OSError, EOFError):
            status = self._status()
            if isinstance(status, int) and status < 0:
                raise _EndedByOthersError(f"ended with exit status {status}", has_started=False) from None
            fault = f"ended with exit status {status}"
        if fault is not None:
            raise RuntimeError(f"a worker process for {self._factory} could not start: {fault}")
        self._ready = True

    def _status(self) -> int | str:
        try:
            return self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            return "unknown"

    def end(self) -> None:
        self._connection.close()
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()

    def forget(self) -> None:
        """Leaves the process to the parent that this process was forked from."""
        self._connection.close()
        self.process.returncode = 0  # not ours to wait for


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_OPEN: Final[weakref.WeakSet[Workers]] = weakref.WeakSet()


def _close_all() -> None:
    for workers in list(_OPEN):
        workers.close()


def _forget_all() -> None:
    for workers in list(_OPEN):
        for worker in workers._all:
            worker.forget()
        workers._renew()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


_DONE, _FAILED, _BY_OTHERS = "done", "failed", "by others"
_GRACE: Final = 10.0


def _serve(factory: str, time_limit: float) -> None:
    """The child's whole life: says that it is ready, or why not, and then has calls answered until the parent is gone.

    Here a fork does no harm, as there is but one thread, and spares loading everything anew when a call ends badly.
    """
    with contextlib.suppress(OSError, EOFError), Connection(os.dup(0)) as connection:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        try:
            function = _made(factory)
        except BaseException as error:
            connection.send(f"{type(error).__name__}: {error}")
            return
        _limit_memory()
        current = mmap.mmap(-1, 8)  # the number of the call that is at work, 0 for none; shared with the fork
        connection.send(None)
        if not hasattr(os, "fork"):
            _answer(connection, function, time_limit, current)
        while True:
            status = _in_a_fork(functools.partial(_answer, connection, function, time_limit, current))
            call = int.from_bytes(current[:], "little")
            is_by_others = os.WIFSIGNALED(status) and os.WTERMSIG(status) in _SIGNALS_OF_OTHERS
            ending, value = (_BY_OTHERS, os.WTERMSIG(status)) if is_by_others else (_FAILED, None)
            connection.send((call, ending, value))  # raises if the parent is gone


_SIGNALS_OF_OTHERS: Final = {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGKILL", signal.SIGTERM)}
"""A time-out ends a fork by SIGPROF, and its own faults by SIGSEGV or the like. By SIGKILL the system ends it for want
of memory, and this process at its parent's word, which may come too late and meet the next call."""


def _in_a_fork(work: Callable[[], None]) -> int:
    """Does work in a fork, which SIGUSR1 ends; returns how it ended."""
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    fork = os.fork()
    if fork == 0:
        try:
            work()
        finally:
            os._exit(1)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, lambda *_: _abort(fork))
    return os.waitpid(fork, 0)[1]


def _abort(fork: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended just now
        os.kill(fork, signal.SIGKILL)


def _answer(connection: Connection, function: Callable[..., Any], time_limit: float, current: mmap.mmap) -> None:
    while True:
        call, arguments = connection.recv()
        current[:] = call.to_bytes(8, "little")
        _limit_computing(time_limit)
        reply = (call, *_result(function, arguments))
        _limit_computing(0)
        current[:] = bytes(8)
        _send(connection, reply)


def _send(connection: Connection, reply: tuple[int, str, Any]) -> None:
    try:
        connection.send(reply)
    except (TypeError, AttributeError, pickle.PicklingError):  # no result that can be sent
        connection.send((reply[0], _FAILED, None))


def _made(factory: str) -> Callable[..., Any]:
    module, _, name = factory.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)()
    return function


def _result(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return _DONE, function(*arguments)
    except MemoryError:
        os._exit(1)  # what is left of the memory may not do for the next call
    except Exception:
        return _FAILED, None


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no file behind


def _limit_computing(seconds: float) -> None:
    """Has the system end this process after so much more computing, whatever it is at; 0 for no limit."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
