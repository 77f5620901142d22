"""vLLM in this process, beside the model that is trained.

The engine holds weights of its own, which `sync` overwrites in place. All that it keeps of earlier requests (keys and
values of prompts, features of images) is forgotten then: it came of the old weights.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from vlmenv.agents.engines.base import Engine, Request
from vlmenv.agents.families import Family
from vlmenv.agents.sampling import Sampled, Sampling
from vlmenv.agents.torchvision import is_mended
from vlmenv.core.errors import ConfigError, EngineError, ReadingError

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # tensors are handed over as they are
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_ON_CPU = {"TORCHDYNAMO_DISABLE": "1"}  # to compile takes longer than most runs there
_CPU_CACHE = 256 << 20
"""Bytes for keys and values on a CPU, or more where a few of the longest completions would not fit."""
_MISSING = (
    'the engine vllm needs the extra "vllm": pip install "vlmenv[vllm]" on a machine with a CUDA GPU; '
    "docs/vllm.md says how to go without one"
)


class VLLMEngine(Engine):
    """An engine in this process.

    Args:
        folder: The model's, in the published layout.
        family: How the trainer takes prompts in, and which tokens are never sampled.
        device: Where it runs.
        dtype: Of its weights.
        max_length: Tokens of prompt and completion together.
        max_images: Of a prompt.
        memory_share: Of a GPU's memory, for weights, keys and values.
        seed: Of what it draws itself; completions have seeds of their own.

    Raises:
        ConfigError: vLLM is not installed.
        EngineError: It cannot be started.
    """

    def __init__(
        self,
        folder: Path,
        family: Family,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_length: int,
        max_images: int = 8,
        memory_share: float = 0.4,
        seed: int = 0,
    ) -> None:
        vllm = import_vllm(device)
        self._vllm, self._folder, self._family = vllm, folder, family
        self._device, self.max_length = device, max_length
        cache = max(_CPU_CACHE, 4 * max_length * _bytes_per_token(family, dtype))
        on_cpu: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": cache, "max_num_seqs": 128}
        try:
            self._llm = vllm.LLM(
                model=str(folder),
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=max_length,
                limit_mm_per_prompt={"image": max_images, "video": 0},
                logprobs_mode="processed_logprobs",
                logits_processors=["vlmenv.agents.engines.banning:BannedTokens"],
                additional_config={"vlmenv_banned": family.banned_tokens.tolist()},
                enable_prefix_caching=True,
                seed=seed,
                use_tqdm_on_load=False,
                **(on_cpu if device.type == "cpu" else {"gpu_memory_utilization": memory_share}),
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise EngineError(f"vLLM cannot be started with {folder}: {error}") from error
        # Some publishers write a head out that is an embedding's.
        self._names = _weight_names(folder) - set(getattr(family.model, "all_tied_weights_keys", {}))

    def generate(
        self, requests: Sequence[Request], index: NDArray[np.int64], sampling: Sampling, rng: np.random.Generator
    ) -> list[Sampled]:
        counts = np.bincount(index, minlength=len(requests))
        prompts = [_as_input(request) for request in requests]
        try:
            params = [self._params(sampling, int(count), int(rng.integers(2**31))) for count in counts]
            with torch.autocast(self._device.type, enabled=False):  # the trainer's precision is none of the engine's
                outputs = self._llm.generate(prompts, params, use_tqdm=False)
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"vLLM failed to generate: {error}") from error
        for request, output in zip(requests, outputs, strict=True):
            check_prompt(request, output.prompt_token_ids)
        written = [[_sampled(one) for one in sorted(output.outputs, key=lambda one: one.index)] for output in outputs]
        taken = np.zeros(len(requests), dtype=np.int64)
        result = []
        for i in index:
            result.append(written[i][taken[i] % len(written[i])])  # greedy ones are written once
            taken[i] += 1
        return result

    def sync(self, weights: Mapping[str, Tensor]) -> None:
        check_names(weights, self._names)
        missing = self._llm.collective_rpc(_overwrite, args=(list(weights.items()),))
        if any(missing):
            raise EngineError(f"vLLM left weights as they were: {missing[0][:5]}")
        self._forget()

    def _forget(self) -> None:
        """Drops keys and values of prompts, and features of images.

        vLLM's third cache stays: it holds images as they go into the model, on which no weight has any bearing.
        """
        self._llm.reset_prefix_cache()
        self._llm.llm_engine.reset_encoder_cache()

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _params(self, sampling: Sampling, count: int, seed: int) -> Any:
        return self._vllm.SamplingParams(
            n=count if sampling.temperature > 0 else 1,
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            top_k=sampling.top_k or 0,
            top_p=sampling.top_p,
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            stop_token_ids=list(self._family.end_tokens),
            seed=seed,
            logprobs=0,
            detokenize=bool(sampling.stop),
        )


def require_vllm() -> None:
    """Raises ConfigError where vLLM is not installed; takes no time."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(_MISSING)


def import_vllm(device: torch.device) -> Any:
    """The module, with the environment that it is to find.

    Raises:
        ConfigError: It is not installed.
    """
    for name, value in (_ENVIRONMENT | (_ON_CPU if device.type == "cpu" else {})).items():
        os.environ.setdefault(name, value)
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise ConfigError(f"{_MISSING} ({error})") from error
    if is_mended():
        # vLLM would look at a model's class in another process, where torchvision is as it was. That spares CUDA from
        # being started here, of which this torch has none.
        registry = importlib.import_module("vllm.model_executor.models.registry")
        registry._run_in_subprocess = lambda look: look()  # type: ignore[attr-defined]
    return vllm


def check_prompt(request: Request, token_ids: Sequence[int]) -> None:
    """Raises ReadingError unless the engine reads a prompt as the trainer does, image tokens included."""
    ours = request.prompt.input_ids.tolist()
    if list(token_ids) == ours:
        return
    place = next((i for i, pair in enumerate(zip(ours, token_ids, strict=False)) if pair[0] != pair[1]), len(ours))
    raise ReadingError(
        f"the engine reads a prompt otherwise than the trainer: {len(token_ids)} tokens against {len(ours)}, and from "
        f"token {place} on {list(token_ids)[place : place + 8]} against {ours[place : place + 8]}. "
        "Their processors or chat templates differ",
        ours,
        token_ids,
    )


def check_names(weights: Mapping[str, Tensor], names: set[str]) -> None:
    """Raises EngineError unless the weights are those that a model folder holds."""
    missing, unknown = sorted(names - weights.keys()), sorted(weights.keys() - names)
    if missing or unknown:
        raise EngineError(
            f"the trainer's weights are not those of the engine's model: {len(missing)} are missing {missing[:3]}, "
            f"{len(unknown)} are unknown {unknown[:3]}"
        )


def _bytes_per_token(family: Family, dtype: torch.dtype) -> int:
    """What the keys and values of a token take."""
    config = family.model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * size * dtype.itemsize)


def _weight_names(folder: Path) -> set[str]:
    """Names of the weights in a folder's safetensors files."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stream:
            names.update(stream.keys())
    return names


def _as_input(request: Request) -> dict[str, Any]:
    images = [Image.fromarray(image) for image in request.observation["images"]]
    return {"prompt": request.chat} | ({"multi_modal_data": {"image": images}} if images else {})


def _sampled(output: Any) -> Sampled:
    ids = np.array(output.token_ids, dtype=np.int64)
    logprobs = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
    return Sampled(ids, np.array(logprobs, dtype=np.float32), "length" if output.finish_reason == "length" else "stop")


def _overwrite(worker: Any, weights: list[tuple[str, Tensor]]) -> list[str]:
    """Run by a worker of the engine: takes over weights, and names those of its own that are still the old ones."""
    model, taken = worker.model_runner.get_model(), set()
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
