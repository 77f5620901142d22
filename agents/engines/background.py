"""Background threads: an event loop of its own, which also works in notebooks, and blocking calls with a limit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """An event loop in a thread, which runs coroutines one at a time. Their connections stay open for the next."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine and gives its result. It is cancelled if the caller is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Stops the loop, and waits for its thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def in_thread(work: Callable[[], T]) -> T:
    """Runs a blocking function in a daemon thread and gives its result. Cancelling the caller does not stop it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(settle: Callable[[Any], None], what: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(lambda: None if future.cancelled() else settle(what))

    def run() -> None:
        try:
            tell(future.set_result, work())
        except BaseException as error:
            tell(future.set_exception, error)

    threading.Thread(target=run, daemon=True).start()
    return await future


def within(seconds: float, work: Callable[[], T]) -> T:
    """Runs a blocking function with a time limit, for functions without a reliable limit of their own.

    Args:
        seconds: Time limit.
        work: The function.

    Raises:
        TimeoutError: Time is up. The function continues in its thread, and its result is dropped.
    """
    given: Future[T] = Future()

    def run() -> None:
        try:
            given.set_result(work())
        except BaseException as error:
            given.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError
    return given.result()
