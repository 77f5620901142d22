"""`python -m vlmenv.agents.engines.serving ARGUMENTS`: vLLM's own server, in a process that ends with its parent.

The processes that vLLM starts import this module, and so the package, which mends torchvision for them too.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading
import time

from vlmenv.agents.engines.settings import prepare_process

GRACE = 20.0
"""Seconds for the server to end after SIGTERM."""

prepare_process()


def _end_with_parent() -> None:
    """Waits until the parent closes the standard input, then ends this process and those that it started."""
    os.read(0, 1)  # not sys.stdin, which would be locked at the end of this process
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
