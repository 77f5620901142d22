"""Code of vLLM's workers that updates their weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmenv.agents.engines.access import server_token
from vlmenv.agents.engines.channel import Bucket, Channel, ChannelFault, Meeting, gpu_of
from vlmenv.agents.engines.files import weights_digest
from vlmenv.compat.vllm import features_of, model_of, pack_tied_heads, tied_heads
from vlmenv.core.errors import ConfigError

_MAX_MESSAGE = 500  # characters of vLLM's error message, which may name all of a model's weights


class WeightReceiver:
    """Methods of a server's workers beside vLLM's own. Their results can be written as JSON."""

    vllm_config: Any
    rank: int
    device: torch.device
    vlmenv_line: Channel | None = None
    """channel to the trainer, if it has opened one"""

    def vlmenv_model(self) -> dict[str, Any]:
        """Describes the served model, for the trainer to compare with its own."""
        config = self.vllm_config.model_config
        return {
            "weights": weight_shapes(Path(config.model)),
            "banned": self.vllm_config.additional_config["vlmenv_banned"],
            "dtype": str(config.dtype).removeprefix("torch."),
            "logprobs": config.logprobs_mode,
        }

    def vlmenv_overwrite(self, path: str, digest: str) -> dict[str, Any]:
        """Loads the weights of a safetensors file. `fault` is the reason of a failure, or None.

        The file must be one of `vlmenv.agents.engines.files`.
        """
        try:
            if weights_digest(Path(path)) != digest:
                return {"fault": f"{path} is not the file that the trainer wrote: its SHA-256 differs"}
            left = overwrite(self, _tensors(Path(path)))
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            return {"fault": f"{type(error).__name__}: {error}"}
        return {"fault": _unchanged(left)}

    def vlmenv_channel(self) -> dict[str, Any]:
        """The name of this worker's channel, and the id of its GPU."""
        line = self.vlmenv_line
        return {"fault": None, "name": None if line is None else line.name, "gpu": gpu_of(self.device)}

    def vlmenv_join(self, seconds: float, **meeting: Any) -> dict[str, Any]:
        """Joins a channel and leaves any former one. `fault` is the reason of a failure, or None."""
        self.vlmenv_line = None
        try:
            self.vlmenv_line = Channel(Meeting(**meeting), 1 + self.rank, self.device, seconds, server_token())
        except (ChannelFault, ConfigError) as error:
            return {"fault": f"{error}, at {meeting['address']}, port {meeting['port']}"}
        return {"fault": None}

    def vlmenv_receive(self, name: str, plan: list[Bucket], dtype: str, seconds: float) -> dict[str, Any]:
        """Loads weights from a channel. `fault` is the reason of a failure, or None."""
        if self.vlmenv_line is None or self.vlmenv_line.name != name:
            return {"fault": "it has left the trainer's channel: another trainer uses it"}
        incoming, fault = self.vlmenv_line.receive(plan, getattr(torch, dtype), seconds), None
        try:
            fault = _unchanged(overwrite(self, incoming))
        except Exception as error:  # any: the trainer still sends, so `finish` must receive
            fault = f"{type(error).__name__}: {error}"[:_MAX_MESSAGE]
        try:
            incoming.finish()
        except ChannelFault as error:
            self.vlmenv_line, fault = None, fault or str(error)
        return {"fault": fault}


def _unchanged(left: list[str]) -> str | None:
    """The fault if weights were not updated."""
    return f"weights were not updated: {left[:5]}" if left else None


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of the weights in a folder's safetensors files, by name."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            shapes |= {name: list(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
    return shapes


def overwrite(worker: Any, weights: Iterable[tuple[str, Tensor]], same_vision: bool = False) -> list[str]:
    """Loads weights into a worker.

    Args:
        worker: The worker.
        weights: Published names and tensors.
        same_vision: If true, features of images are unchanged, and the worker keeps its cached ones.

    Returns:
        Names of the worker's parameters that were not updated.
    """
    model, taken, cache = model_of(worker), set(), features_of(worker)
    features = dict(cache) if same_vision else {}
    load, tied = model.load_weights, tied_heads(model)

    def noting(given: Any) -> set[str]:
        loaded: set[str] = load(given)
        taken.update(loaded)
        return loaded

    model.load_weights = noting
    try:
        worker.reload_weights(weights_iterator=iter(weights))
    finally:
        del model.load_weights
    cache.update(features)
    pack_tied_heads(tied)
    return sorted({name for name, _ in model.named_parameters()} - taken)


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, "pt") as stream:
        for name in stream.keys():  # noqa: SIM118
            yield name, stream.get_tensor(name)
