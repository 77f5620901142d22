"""`python -m vlmenv.agents.engines.serving ARGUMENTS`: vLLM's own server, as a process that ends with its parent.

The processes that vLLM starts import this module again, and with it the package, which mends torchvision for them too.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading
import time

from vlmenv.agents.engines.settings import look_in_process

GRACE = 20.0
"""Seconds that the server has to end by itself."""

look_in_process()


def _end_with_parent() -> None:
    """Waits until nobody holds the other end of the standard input, then ends the process and those it started."""
    os.read(0, 1)  # sys.stdin would be locked when this process ends first
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
