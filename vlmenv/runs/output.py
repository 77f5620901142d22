"""Standard output that may go away: a closed terminal, a pipe whose reader has ended, a full disk."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TextIO

_GONE: Final = (errno.EPIPE, errno.EIO, errno.EBADF)


class Lasting:
    """A text stream that drops what cannot be written, and raises nothing.

    Args:
        stream: The stream to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop(error)

    def _drop(self, error: Exception) -> None:
        """Sends all that follows nowhere if the other end is gone for good."""
        if getattr(error, "errno", None) in _GONE:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Keeps the block going when standard output or error can no longer be written."""
    former = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Lasting(stream) for stream in former)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = former
