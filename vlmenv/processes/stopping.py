"""Signals that end training after the present step."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Final

import torch
from accelerate import Accelerator

from vlmenv.core.errors import TrainingError

SIGNALS: Final = ("SIGINT", "SIGTERM", "SIGHUP")
"""Signals that end training; a closed terminal sends SIGHUP."""
_LAST: Final = 3
"""Number of the signal that ends the process at once. Launchers repeat the first one to all ranks."""


class StoppedError(TrainingError):
    """Work that a signal ended before it was done."""


class Stopping:
    """Records SIGINT, SIGTERM and SIGHUP within the context.

    The first asks for the end, the second changes nothing, so that a checkpoint under way is completed, and the third
    ends the process at once. Signals that were ignored before, as `nohup` does, stay ignored.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._signal: int | None = None
        self._count = 0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number
        self._count += 1
        if self._count == _LAST:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        while self._former:
            signal.signal(*self._former.popitem())

    def requested(self) -> bool:
        """True if any rank got a signal. A collective: all ranks must call it."""
        if self._accelerator.num_processes == 1:
            return self._signal is not None
        asked = torch.tensor([float(self._signal is not None)], device=self._accelerator.device)
        return bool(self._accelerator.reduce(asked).item() > 0)

    def check(self) -> None:
        """Raises StoppedError if this rank got a signal. For work that can be dropped, such as an evaluation."""
        if self._signal is not None:
            raise StoppedError(f"stopped by {signal.Signals(self._signal).name}")

    def end_process(self) -> None:
        """Ends the process with the signal's exit status, if there was a signal."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is not None:
            sys.exit(128 + self._signal)
