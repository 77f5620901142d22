"""Locks on output folders, so that no two processes write into one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from vlmenv.core.errors import ConfigError
from vlmenv.core.files import parse_json

LOCK: Final = ".lock"
"""File of a folder that its writer holds locked. It names the writer."""
_HELD: Final[set[Path]] = set()
"""The folders that this process holds: the system tells only locks of other processes."""
_UNSUPPORTED: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds an output folder for the block; the folder is made if it does not exist.

    The system releases the lock when the process ends, however it ends. A folder that is still empty at the end of the
    block is removed if the block made it.

    Args:
        folder: The folder.
        say: Prints a line: of a former owner that ended without releasing the lock, or of a file system without locks.

    Raises:
        ConfigError: Another process, or another run in this one, writes into the folder.
        OSError: The folder cannot be made or written.
    """
    folder = folder.absolute()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = _lock(folder.resolve(), say)
    _HELD.add(folder.resolve())
    try:
        yield
    finally:
        _HELD.discard(folder.resolve())
        _release(folder / LOCK, handle, made)


def _lock(folder: Path, say: Callable[[str], None]) -> int:
    """Opens and locks the folder's lock file, and writes this process's name into it."""
    if folder in _HELD:
        raise ConfigError(f"{folder} is written by another run in this process: choose another --output, or wait")
    while True:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _take(folder, handle, say)
        except BaseException:
            os.close(handle)
            raise
        if _is_file(handle, folder / LOCK):
            break
        os.close(handle)  # its last owner removed it in between
    if former := _owner(handle):
        say(f"{folder}: its lock is of {_named(former)}, which ended without a word; taken over{_elsewhere(former)}")
    os.ftruncate(handle, 0)
    os.pwrite(handle, (json.dumps(_self()) + "\n").encode(), 0)
    return handle


def _take(folder: Path, handle: int, say: Callable[[str], None]) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            say(f"{folder}: its file system has no locks: see to it that no other run writes there")
            return
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        owner = _owner(handle)
        raise ConfigError(
            f"{folder} is written by {_named(owner) if owner else 'another process'}: choose another --output, "
            "or wait until that has ended"
        ) from None


def _is_file(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _self() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}


def _owner(handle: int) -> dict[str, Any] | None:
    """What the lock file says of its owner; None if it says nothing."""
    try:
        owner = parse_json(os.pread(handle, 4096, 0))
    except ValueError:
        return None
    return owner if isinstance(owner, dict) else None


def _named(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"


def _elsewhere(owner: dict[str, Any]) -> str:
    """A word of caution about an owner on another host, where a file system may not carry locks over."""
    if owner.get("host") == socket.gethostname():
        return ""
    return f". If it still runs on {owner.get('host')}, end one of the two"


def _release(file: Path, handle: int, made: list[Path]) -> None:
    with contextlib.suppress(OSError):  # the folder may be gone
        if _is_file(handle, file):
            file.unlink()
    os.close(handle)
    for folder in made:
        try:
            folder.rmdir()
        except OSError:
            break
