"""The workers' side of updates of a server's weights. What loads them into vLLM's model is in `transfer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from vlmenv.agents.engines.access import server_token
from vlmenv.agents.engines.channel import Bucket, Channel, ChannelFault, Incoming, Meeting
from vlmenv.agents.engines.files import weights_digest

REFUSED: Final = "cannot take over weights: "
"""Beginning of a worker's fault in vLLM's messages."""
LEFT: Final = "it has left the trainer's channel"
"""Fault of a worker without the channel that an update should come by."""
_MAX_MESSAGE: Final = 500  # characters of vLLM's error message, which may name all of a model's weights

Load = Callable[[Iterable[tuple[str, Tensor]]], None]


class Receiver:
    """A worker's end of a server's updates.

    Args:
        rank: Number of the worker, from 0.
        device: Device of its model.
        load: Loads weights into its model.
    """

    def __init__(self, rank: int, device: torch.device, load: Load) -> None:
        self._rank, self._device, self._load = rank, device, load
        self._line: Channel | None = None

    def join(self, seconds: float, **meeting: Any) -> None:
        """Joins a channel, and leaves any former one.

        Raises:
            ChannelFault: The rendezvous failed.
            ConfigError: There is no token.
        """
        self._line = None
        try:
            self._line = Channel(Meeting(**meeting), 1 + self._rank, self._device, seconds, server_token())
        except ChannelFault as error:
            raise ChannelFault(f"at {meeting['address']}, port {meeting['port']}: {error}") from error

    def read(self, path: str, digest: str) -> None:
        """Loads the weights of a safetensors file, which must be one of `vlmenv.agents.engines.files`.

        Raises:
            PermissionError: It is not such a file.
            FileNotFoundError: It is on the trainer's machine alone.
            OSError: It cannot be read.
            ValueError: Its SHA-256 differs, or its weights cannot be loaded.
        """
        try:
            found = weights_digest(Path(path))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path} is not on the server's machine: give a shared --weights-folder, or --weight-transfer direct"
            ) from error
        if found != digest:
            raise ValueError(f"{path} is not the file that the trainer wrote: its SHA-256 differs")
        self._load(_tensors(Path(path)))

    def receive(self, name: str, plan: list[Bucket], dtype: str, seconds: float) -> None:
        """Loads weights from the channel. After a fault it receives the others nevertheless, because the trainer sends.

        Raises:
            ChannelFault: This worker is not in that channel, or weights did not arrive.
            ValueError: The weights cannot be loaded.
        """
        if self._line is None or self._line.name != name:
            raise ChannelFault(LEFT)
        incoming = self._line.receive(plan, getattr(torch, dtype), seconds)
        try:
            self._load(incoming)
        except Exception:
            with suppress(ChannelFault):  # the first fault is told
                self._finish(incoming)
            raise
        self._finish(incoming)

    def _finish(self, incoming: Incoming) -> None:
        try:
            incoming.finish()
        except ChannelFault:
            self._line = None
            raise

    def leave(self) -> None:
        """Leaves the channel."""
        self._line = None


def fault_of(error: Exception) -> str:
    """The text of a fault, for the trainer."""
    kind = "" if isinstance(error, ChannelFault) else f"{type(error).__name__}: "
    return f"{kind}{error}"[:_MAX_MESSAGE]


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of the weights in a folder's safetensors files, by name."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            shapes |= {name: list(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
    return shapes


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, "pt") as stream:
        for name in stream.keys():  # noqa: SIM118
            yield name, stream.get_tensor(name)
