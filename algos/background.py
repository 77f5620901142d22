"""Work beside the main thread's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Runs a function in a thread of its own, which does not keep the program from ending.

    Args:
        work: What is run, from now on.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._result: list[T | Exception] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self) -> T | Exception:
        """What the function returned, or the error that it raised, once it is done."""
        self._thread.join()
        return self._result[0]

    def _run(self) -> None:
        try:
            self._result.append(self._work())
        except Exception as error:
            self._result.append(error)
