"""Runs a function in child processes, with a hard time limit for each call.

For work on untrusted text whose duration nobody can foretell, such as computer algebra. Works from any
thread, and does without multiprocessing's own ways to start a process: `spawn` runs the user's script
again, and `fork` copies locks that other threads hold.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import os
import signal
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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

_PATIENCE: Final = 4  # by the clock; results must not hang on how busy the machine is
_MAIN: Final = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); "  # Ctrl-C is the parent's to answer
    "import sys; from vlmenv.envs.rewards.workers import _serve; _serve(sys.argv[1], float(sys.argv[2]))"
)
_ONE_THREAD: Final = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Workers:
    """Child processes that all run one function: as many as there is work for, at most one per usable CPU and eight.

    May be used from several threads at once, and after a fork. A copy starts processes of its own.

    Args:
        factory: `"module:name"` of a function without parameters that returns the function to run. It is called
            once in each process, and may take its time over imports.
        time_limit: Seconds of computing that a call may take, start-up not counted. One that lasts four times as
            long by the clock, because it waits or the machine is busy, is ended too.
    """

    def __init__(self, factory: str, time_limit: float) -> None:
        self._factory = factory
        self._time_limit = time_limit
        self._renew()
        _OPEN.add(self)

    def __reduce__(self) -> tuple[type[Workers], tuple[str, float]]:
        return Workers, (self._factory, self._time_limit)

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

        Returns:
            The results in order; None for a call that raised, ran out of computing time or memory, or ended its
            process, and a TimeoutError for one that was given up by the clock.

        Raises:
            RuntimeError: A process could not be started.
        """
        return list(self._threads.map(self._call, arguments))

    def _call(self, arguments: tuple[Any, ...]) -> Any:
        worker = self._take()
        try:
            result = worker.call(arguments, _PATIENCE * self._time_limit)
        except (OSError, EOFError) as error:  # time is up, or the process has ended
            self._end(worker)
            return error if isinstance(error, TimeoutError) else None
        except BaseException:
            self._end(worker)
            raise
        self._idle.append(worker)
        return result

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


class _Worker:
    """The parent's end of one process."""

    def __init__(self, factory: str, time_limit: float) -> None:
        self._connection, theirs = Pipe()
        self._factory = factory
        self._ready = False
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

    def call(self, arguments: tuple[Any, ...], time_limit: float) -> Any:
        if not self._ready:
            self._await_start()
        while self._connection.poll(0):
            self._connection.recv()  # what is said when somebody ends a process that has nothing to do
        self._connection.send(arguments)
        if not self._connection.poll(time_limit):
            raise TimeoutError
        return self._connection.recv()

    def _await_start(self) -> None:
        try:
            fault = self._connection.recv() if self._connection.poll(START_LIMIT) else f"took over {START_LIMIT:g} s"
        except (OSError, EOFError):
            fault = f"ended with exit status {self.process.wait()}"
        if fault is not None:
            raise RuntimeError(f"a worker process for {self._factory} could not start: {fault}")
        self._ready = True

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
        connection.send(None)
        if not hasattr(os, "fork"):
            _answer(connection, function, time_limit)
        while True:
            _in_a_fork(functools.partial(_answer, connection, function, time_limit))
            connection.send(None)  # a call has ended badly; raises if the parent is gone


def _in_a_fork(work: Callable[[], None]) -> None:
    fork = os.fork()
    if fork == 0:
        try:
            work()
        finally:
            os._exit(1)
    os.waitpid(fork, 0)


def _answer(connection: Connection, function: Callable[..., Any], time_limit: float) -> None:
    while True:
        arguments = connection.recv()
        _limit_computing(time_limit)
        result = _result(function, arguments)
        _limit_computing(0)
        connection.send(result)


def _made(factory: str) -> Callable[..., Any]:
    module, _, name = factory.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)()
    return function


def _result(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    except MemoryError:
        os._exit(1)  # what is left of the memory may not do for the next call
    except Exception:
        return None


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
