from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from vlmenv.agents.engines.background import BackgroundLoop, in_thread


def test_work_in_a_thread_gives_what_it_gives() -> None:
    loop = BackgroundLoop()
    try:
        assert loop.run(in_thread(lambda: 3)) == 3
        with pytest.raises(ZeroDivisionError):
            loop.run(in_thread(lambda: 1 // 0))
    finally:
        loop.close()


def test_work_that_nobody_waits_for_any_more_ends_by_itself() -> None:
    """It holds up neither its caller nor the end of the process, and nobody hears of what it gives."""
    told: list[Any] = []
    running, over = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def work() -> None:
        threads.append(threading.current_thread())
        running.set()
        over.wait(60)

    async def give_up() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        task = asyncio.ensure_future(in_thread(work))
        while not running.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert threads[0].daemon
        over.set()
        while threads[0].is_alive():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)

    asyncio.run(give_up())
    assert not told
