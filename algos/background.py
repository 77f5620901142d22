"""Work in a background thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """A function that runs in a daemon thread, which does not keep the program alive.

    Args:
        work: The function. It starts at once.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._result: list[T | Exception] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self) -> T | Exception:
        """Waits for the function, and gives its result or the exception that it raised."""
        self._thread.join()
        return self._result[0]

    def _run(self) -> None:
        try:
            self._result.append(self._work())
        except Exception as error:
            self._result.append(error)
