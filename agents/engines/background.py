"""Work in threads of its own: an event loop, for callers that may have one running as notebooks do; what blocks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines one after another; what they leave open, such as connections, stays for the next."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What a coroutine gives; it is cancelled where the caller is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def in_thread(work: Callable[[], T]) -> T:
    """What some work gives that blocks; nobody waits for it once the caller is cancelled, or the process ends."""
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
    """What some work gives that blocks, and has no limit of its own or one that does not always hold.

    Raises:
        TimeoutError: Time was up first. The work goes on in its thread; what it comes to is dropped.
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
