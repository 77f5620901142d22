"""Files of weights for servers, each in a private folder that exists during an update."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from vlmenv.agents.engines.access import open_own, require_private
from vlmenv.agents.lazy_weights import outlines

NAME: Final = "vlmenv.safetensors"
"""Name of the file in its folder."""
_PREFIX: Final = "vlmenv-weights-"
_TYPES: Final = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of data types in safetensors, of those that a server's weights may have."""
_IN_MEMORY: Final = Path("/dev/shm")
_YOUNG: Final = 60.0
"""Seconds in which a folder without a lock may be one whose owner is about to lock it."""


@contextmanager
def private_folder(place: Path) -> Iterator[Path]:
    """A folder with an unpredictable name, which only this account may enter, and which exists within the context.

    It is locked, so that `remove_stale` knows it from the folder of a trainer that was killed.

    Args:
        place: The folder to make it in.
    """
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=place) as folder, ExitStack() as stack:
        with suppress(OSError):  # network disks may have no locks; there nothing is removed either
            stack.enter_context(_locked(Path(folder)))
        yield Path(folder)


def roomy(size: int) -> Path:
    """A folder in memory if it has room for twice `size` bytes, else the folder for temporary files."""
    in_memory = _IN_MEMORY.is_dir() and shutil.disk_usage(_IN_MEMORY).free > 2 * size
    return _IN_MEMORY if in_memory else Path(tempfile.gettempdir())


def remove_stale(place: Path | None = None) -> None:
    """Removes this account's folders of weights whose trainers were killed.

    Args:
        place: A folder to look in beside the one in memory and the one for temporary files.
    """
    for parent in {_IN_MEMORY, Path(tempfile.gettempdir()), *([] if place is None else [place])}:
        for folder in parent.glob(f"{_PREFIX}*"):
            with suppress(OSError):  # another account's, another trainer's, or gone
                require_private(folder)
                if time.time() - folder.stat().st_mtime > _YOUNG:
                    with _locked(folder):
                        shutil.rmtree(folder)


def write_file(file: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """Writes weights in the format of safetensors, one at a time: the library's own function needs all at once.

    The format: the header's length in 8 bytes, the header in JSON, and the weights' bytes in the order of the header.

    Args:
        file: File to write.
        weights: Weights by name.
        dtype: Data type of the file.

    Returns:
        SHA-256 of the file, in hexadecimal.

    Raises:
        OSError: It cannot be written.
    """
    digest = hashlib.sha256()
    with file.open("wb") as stream:
        for part in _parts(weights, dtype):
            digest.update(part)
            stream.write(part)
    return digest.hexdigest()


def _parts(weights: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[bytes | memoryview]:
    """The contents of a safetensors file, in parts."""
    header, end = {}, 0
    for name, tensor in outlines(weights).items():
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": _TYPES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the weights are aligned
    yield len(text).to_bytes(8, "little") + text
    for name in header:
        whole = weights[name].detach().to("cpu", dtype, copy=True)  # an array pins the storage, which FSDP2 frees
        yield whole.contiguous().view(-1).view(torch.uint8).numpy().data


def weights_digest(file: Path) -> str:
    """SHA-256 of a file of weights, in hexadecimal.

    Raises:
        PermissionError: It is not a regular file of this account, of the name `NAME`, in a `private_folder`.
        OSError: It cannot be read.
    """
    if file.name != NAME or not file.parent.name.startswith(_PREFIX):
        raise PermissionError(f"{file} is not a trainer's file of weights")
    require_private(file.parent)
    with open_own(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks a folder within the context; the system unlocks it when the process ends.

    Raises:
        BlockingIOError: Another process has locked it.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
