"""Run within vLLM, where its model is: what one of its workers does with new weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmenv.agents.engines.channel import Bucket, Channel, ChannelFault, Meeting, gpu_of
from vlmenv.agents.engines.fingerprints import file_digest

_SHOWN = 500  # characters of what vLLM says, which may name all of a model's weights


class WeightReceiver:
    """What the workers of a server can be asked beside vLLM's own methods; answers are such as JSON can hold."""

    vllm_config: Any
    rank: int
    device: torch.device
    vlmenv_line: Channel | None = None
    """to the trainer, where it has asked for one"""

    def vlmenv_model(self) -> dict[str, Any]:
        """What is served, for a trainer to compare with its own model."""
        config = self.vllm_config.model_config
        return {
            "weights": weight_shapes(Path(config.model)),
            "banned": self.vllm_config.additional_config["vlmenv_banned"],
            "dtype": str(config.dtype).removeprefix("torch."),
            "logprobs": config.logprobs_mode,
        }

    def vlmenv_overwrite(self, path: str, digest: str) -> dict[str, Any]:
        """Takes over the weights of a safetensors file; `fault` says why not all of them, and is None otherwise."""
        try:
            if (found := file_digest(Path(path))) != digest:
                return {"fault": f"{path} has the SHA-256 {found} here, but {digest} where it was written"}
            left = overwrite(self, _tensors(Path(path)))
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            return {"fault": f"{type(error).__name__}: {error}"}
        return {"fault": _unchanged(left)}

    def vlmenv_channel(self) -> dict[str, Any]:
        """Which channel this worker is at, and on which GPU it works."""
        line = self.vlmenv_line
        return {"fault": None, "name": None if line is None else line.name, "gpu": gpu_of(self.device)}

    def vlmenv_join(self, seconds: float, **meeting: Any) -> dict[str, Any]:
        """Comes to a channel, from any other that it was at; `fault` says why not."""
        self.vlmenv_line = None
        try:
            self.vlmenv_line = Channel(Meeting(**meeting), 1 + self.rank, self.device, seconds)
        except ChannelFault as error:
            return {"fault": f"{error}, at {meeting['address']}, port {meeting['port']}"}
        return {"fault": None}

    def vlmenv_receive(self, name: str, plan: list[Bucket], dtype: str, seconds: float) -> dict[str, Any]:
        """Takes over weights that come by a channel; `fault` says why not all of them."""
        if self.vlmenv_line is None or self.vlmenv_line.name != name:
            return {"fault": "it is no longer at the trainer's channel: another trainer uses it"}
        incoming, fault = self.vlmenv_line.receive(plan, getattr(torch, dtype), seconds), None
        try:
            fault = _unchanged(overwrite(self, incoming))
        except Exception as error:  # whatever it is, the trainer goes on sending
            fault = f"{type(error).__name__}: {error}"[:_SHOWN]
        try:
            incoming.finish()
        except ChannelFault as error:
            self.vlmenv_line, fault = None, fault or str(error)
        return {"fault": fault}


def _unchanged(left: list[str]) -> str | None:
    """What is wrong where weights have stayed the old ones."""
    return f"weights were left as they were: {left[:5]}" if left else None


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """The weights in a folder's safetensors files."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stream:
            shapes |= {name: list(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
    return shapes


def overwrite(worker: Any, weights: Iterable[tuple[str, Tensor]], sees_alike: bool = False) -> list[str]:
    """Lets a worker take over weights, by their published names, and names those of its own that are still the old.

    Where images turn into the same features as before, it keeps those that it has, which vLLM would have it forget.
    """
    model, taken = worker.model_runner.get_model(), set()
    cache = worker.model_runner.encoder_cache
    cache = getattr(cache, "encoder_outputs", cache)  # as vLLM's second kind of runner has them
    features = dict(cache) if sees_alike else {}
    load, tied = model.load_weights, _tied_heads(model)

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
    for head, embedding in tied:
        # On CPUs the head multiplies by a copy of its own layout, which vLLM makes anew for untied heads alone.
        head.weight = embedding.weight
        head.quant_method.process_weights_after_loading(head)
    return sorted({name for name, _ in model.named_parameters()} - taken)


def _tied_heads(model: Any) -> list[tuple[Any, Any]]:
    """Output heads whose weights are those of an embedding, with it."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    found = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    heads = [module for module in found if isinstance(module, ParallelLMHead)]
    return [(head, one) for head in heads for one in found if one is not head and one.weight is head.weight]


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, "pt") as stream:
        for name in stream.keys():  # noqa: SIM118
            yield name, stream.get_tensor(name)
