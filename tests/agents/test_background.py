from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from vlmenv.agents.engines.background import BackgroundLoop, in_thread, within


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


def test_work_within_a_limit_gives_what_it_gives() -> None:
    assert within(60, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0)


@pytest.mark.parametrize("comes_to", [None, ValueError("too late")])
def test_work_that_takes_longer_is_given_up_and_what_it_comes_to_dropped(
    comes_to: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    over = threading.Event()
    threads: list[threading.Thread] = []

    def work() -> None:
        threads.append(threading.current_thread())
        over.wait(60)
        if comes_to is not None:
            raise comes_to

    with pytest.raises(TimeoutError):
        within(0.05, work)
    assert threads[0].daemon
    assert threads[0].is_alive()
    over.set()
    threads[0].join(60)
    assert not threads[0].is_alive()
    assert not told
