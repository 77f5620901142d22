"""Settings of vLLM, the same in this process and as a server."""

from __future__ import annotations

import hashlib
import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from vlmenv.agents.engines.videos import AS_GIVEN, LOADER, FrameLoader
from vlmenv.agents.families import Family
from vlmenv.agents.families.layers import STATE, layer_kinds
from vlmenv.compat import vllm as compat
from vlmenv.compat.torchvision import is_mended
from vlmenv.compat.transformers import keys_of_blocks
from vlmenv.core.sampling import Sampling

IN_PROCESS: Final = "vlmenv"
TO_SERVER: Final = "vlmenv_server"
"""vLLM's names of the classes in `vlmenv.agents.engines.transfer`"""
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
_ON_CPU = {"TORCHDYNAMO_DISABLE": "1"}  # compiling takes longer there than most runs
_CPU_CACHE = 256 << 20
"""Bytes of the cache of keys and values on a CPU. It is larger if four of the longest completions need more."""


def engine_settings(
    folder: Path,
    family: Family,
    device: torch.device,
    *,
    dtype: torch.dtype,
    max_length: int,
    max_images: int,
    max_videos: int,
    memory_share: float,
    tensor_parallel: int,
    transfer: str,
) -> dict[str, Any]:
    """Arguments to start vLLM with, in this process or as a server; see `VLLMEngine`.

    `transfer` is the way of weights: `IN_PROCESS` or `TO_SERVER`. Families whose videos vLLM reads otherwise get none.
    """
    videos = max_videos if family.takes_videos and family.vllm_video_fault is None else 0
    cache = max(_CPU_CACHE, 4 * max_length * _bytes_per_token(family, dtype))
    on_cpu: dict[str, Any] = {
        "enforce_eager": True,
        "kv_cache_memory_bytes": cache,
        "max_num_seqs": 128,
        # For chunked prompts vLLM would rewind a seeded generator, which torch's CPU generators do not support.
        "enable_chunked_prefill": False,
    }
    return {
        "model": str(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_length,
        "limit_mm_per_prompt": {"image": max_images, "video": videos},
        **({"mm_processor_kwargs": AS_GIVEN} if videos else {}),
        "logprobs_mode": "processed_logprobs",
        "logits_processors": ["vlmenv.agents.engines.banning:BannedTokens"],
        "additional_config": {
            "vlmenv_banned": family.banned_tokens.tolist(),
            "vlmenv_vocabulary": vocabulary_digest(family),
            "vlmenv_images": max_images,
            "vlmenv_videos": videos,
        },
        # Prefixes with states are cached only where prompts are cut.
        "enable_prefix_caching": device.type != "cpu" or STATE not in layer_kinds(family.model.config),
        "use_tqdm_on_load": False,
        "tensor_parallel_size": tensor_parallel,
        "weight_transfer_config": {"backend": transfer},
        **(on_cpu if device.type == "cpu" else {"gpu_memory_utilization": memory_share}),
    }


def vocabulary_digest(family: Family) -> str:
    """The SHA-256 of a tokenizer's tokens with their ids."""
    tokens = sorted(family.processor.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def sampling_settings(family: Family, sampling: Sampling, count: int, seed: int) -> dict[str, Any]:
    """vLLM's parameters of one request for `count` completions, or for one if greedy, because all would be equal."""
    return {
        "n": count if sampling.temperature > 0 else 1,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens,
        "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p,
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "stop_token_ids": list(family.end_tokens),
        "seed": seed,
        "logprobs": 0,
        "detokenize": bool(sampling.stop),
    }


def environment(device: torch.device) -> dict[str, str]:
    """Defaults of environment variables to set before vLLM is imported."""
    return _ENVIRONMENT | (_ON_CPU if device.type == "cpu" else {})


@cache
def prepare_process() -> None:
    """Prepares a process of vLLM's: registers the ways of weights and of videos, and calls `inspect_in_process`."""
    factory = importlib.import_module("vllm.distributed.weight_transfer").WeightTransferEngineFactory
    for name, kind in ((IN_PROCESS, "InProcessTransfer"), (TO_SERVER, "ServerTransfer")):
        factory.register_engine(name, "vlmenv.agents.engines.transfer", kind)
    compat.register_video_loader(LOADER, FrameLoader)
    inspect_in_process()


def inspect_in_process() -> None:
    """Makes vLLM inspect a model's class in this process if torchvision had to be mended.

    By default vLLM inspects it in another process, so as not to start CUDA here. Such a torch has no CUDA.
    """
    if is_mended():
        compat.inspect_in_process()


def _bytes_per_token(family: Family, dtype: torch.dtype) -> int:
    """The most bytes that a token's keys and values take: vLLM gives all blocks as much as the largest."""
    config = family.model.config.get_text_config()
    largest = max(heads * size for heads, size in keys_of_blocks(config))
    return int(2 * config.num_hidden_layers * largest * dtype.itemsize)
