"""Signals that end training after the present step."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator


class Stopping:
    """Records SIGINT and SIGTERM within the context. A second signal ends the process at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._signal: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._restore()

    def _restore(self) -> None:
        while self._former:
            signal.signal(*self._former.popitem())

    def requested(self) -> bool:
        """True if any rank got a signal. A collective: all ranks must call it."""
        if self._accelerator.num_processes == 1:
            return self._signal is not None
        asked = torch.tensor([float(self._signal is not None)], device=self._accelerator.device)
        return bool(self._accelerator.reduce(asked).item() > 0)

    def end_process(self) -> None:
        """Ends the process with the signal's exit status, if there was a signal."""
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signal is not None:
            sys.exit(128 + self._signal)
