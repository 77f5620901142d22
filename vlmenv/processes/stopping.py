"""Signals that end training after the present step."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Final, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from vlmenv.core.errors import TrainingError

SIGNALS: Final = ("SIGINT", "SIGTERM", "SIGHUP")
"""Signals that end training; a closed terminal sends SIGHUP."""
_LAST: Final = 3
"""Number of the signal that ends a process without a launcher at once."""


class StoppedError(TrainingError):
    """Work that a signal ended before it was done."""


class Stopping:
    """Records SIGINT, SIGTERM and SIGHUP within the context.

    The first asks for the end, the second changes nothing, so that a checkpoint under way is completed, and the third
    ends the process at once. Signals that were ignored before, as `nohup` does, stay ignored.

    Ranks do not count signals: their launcher repeats each one, sends one to the last ranks, and ends ranks that take
    too long by SIGKILL. After the first signal they ignore all others until their process has ended.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._launched = accelerator.num_processes > 1
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
        if not self._launched or self._signal is None:
            self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number
        self._count += 1
        if self._count == _LAST and not self._launched:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        while self._former:
            signal.signal(*self._former.popitem())

    def requested(self) -> bool:
        """True if any rank got a signal, which then counts for all. A collective: all ranks must call it.

        A signal to this rank during the call may count in the next one only, as the other ranks know nothing of it yet.
        """
        found = self._signal or 0
        if self._launched:
            own = torch.tensor([found], device=self._accelerator.device)
            found = int(cast(Tensor, self._accelerator.gather(own)).max())
        if found:  # 0 would forget a signal that came meanwhile
            self._signal = found
        return found != 0

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
