"""An engine of vLLM in this process, beside the model in training.

The engine has its own weights, which `sync` overwrites in place. `sync` also empties vLLM's caches of keys, values and
image features, which came from the old weights.

With several ranks, each has an engine, or neighbours share one by tensor parallelism. Then each holds a shard of its
weights, and all run the requests of all.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, distributed

from vlmenv.agents.engines.base import Engine, Request, assign_completions
from vlmenv.agents.engines.checks import check_names, check_prompt, untied
from vlmenv.agents.engines.ranks import num_processes
from vlmenv.agents.engines.settings import (
    IN_PROCESS,
    engine_settings,
    environment,
    prepare_process,
    sampling_settings,
)
from vlmenv.agents.engines.videos import as_frames
from vlmenv.agents.engines.worker import weight_shapes
from vlmenv.agents.families import Family
from vlmenv.agents.sampling import Sampled
from vlmenv.compat import vllm as compat
from vlmenv.core.errors import ConfigError, EngineError
from vlmenv.core.sampling import Sampling

_IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # one process, so that `sync` can pass tensors
_MEMORY = {"weights", "kv_cache"}  # vLLM's names of the memory that `sleep` frees
_MISSING = (
    'the engine vllm needs the extra "vllm": pip install "vlmenv[vllm]" on a machine with a CUDA GPU; '
    "docs/vllm.md tells how to use it without a GPU"
)


class VLLMEngine(Engine):
    """An engine of vLLM in this process.

    Args:
        folder: Folder of the model, in the published layout.
        family: The trainer's model and processor, with the tokens that are never sampled.
        device: Device of the engine.
        dtype: Type of its weights.
        max_length: Length limit of prompt and completion together, in tokens.
        max_images: Maximum number of images of a prompt, or of all turns of an episode.
        max_videos: Maximum number of videos of a prompt, in families whose videos vLLM reads as the trainer does.
        memory_share: Share of the GPU's memory for weights, keys and values, 0 to 1.
        tensor_parallel: Number of neighbouring ranks that share an engine.
        seed: Seed of vLLM's own random numbers. Completions have their own seeds.

    Raises:
        ConfigError: vLLM is not installed, or the number of ranks is not a multiple of `tensor_parallel`.
        EngineError: vLLM does not start.
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
        max_videos: int = 1,
        memory_share: float = 0.4,
        tensor_parallel: int = 1,
        seed: int = 0,
    ) -> None:
        check_sharing(tensor_parallel, num_processes())
        vllm = import_vllm(device)
        self._vllm, self._folder, self._family = vllm, folder, family
        self._device, self.max_length, self.max_images = device, max_length, max_images
        self._sharing, self._asked = tensor_parallel, 0
        self._sleeps, self._asleep = device.type == "cuda", set[str]()
        settings = engine_settings(
            folder,
            family,
            device,
            dtype=dtype,
            max_length=max_length,
            max_images=max_images,
            max_videos=max_videos,
            memory_share=memory_share,
            tensor_parallel=tensor_parallel,
            transfer=IN_PROCESS,
        )
        self.max_videos = settings["additional_config"]["vlmenv_videos"]
        if num_processes() > 1:  # vLLM uses the training processes, and starts none
            settings["distributed_executor_backend"] = "external_launcher"
        try:
            self._llm = vllm.LLM(**settings, seed=seed, enable_sleep_mode=self._sleeps)
        except (RuntimeError, ValueError, OSError, AssertionError) as error:
            raise EngineError(f"vLLM cannot be started with {folder}: {error}") from error
        self._vision: tuple[int, ...] | None = None
        self._names = set(untied(weight_shapes(folder), family))

    def generate(
        self, requests: Sequence[Request], index: NDArray[np.int64], sampling: Sampling, rng: np.random.Generator
    ) -> list[Sampled]:
        counts = np.bincount(index, minlength=len(requests))
        settings = [sampling_settings(self._family, sampling, int(n), int(rng.integers(2**31))) for n in counts]
        outputs = self._generate(list(zip(map(self._as_input, requests), settings, strict=True)))
        for request, output in zip(requests, outputs, strict=True):
            check_prompt(request, output.prompt_token_ids)
        written = [[_sampled(one) for one in sorted(output.outputs, key=lambda one: one.index)] for output in outputs]
        return assign_completions(index, written)

    def _as_input(self, request: Request) -> dict[str, Any]:
        shown = {
            "image": [Image.fromarray(image) for image in request.images],
            "video": [as_frames(self._family, video) for video in request.videos],
        }
        data = {kind: items for kind, items in shown.items() if items}
        return {"prompt_token_ids": request.token_ids} | ({"multi_modal_data": data} if data else {})

    def _generate(self, jobs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[Any]:
        """Runs vLLM on prompts with their sampling parameters."""
        self._take_back(_MEMORY)
        shared, start = self._gathered(jobs)
        with _explained("generate"):
            params = [self._vllm.SamplingParams(**settings) for _, settings in shared]
            with torch.autocast(self._device.type, enabled=False):  # the engine has its own precision
                outputs = self._llm.generate([prompt for prompt, _ in shared], params, use_tqdm=False)
        return list(outputs[start : start + len(jobs)])

    def _gathered(self, jobs: list[Any]) -> tuple[list[Any], int]:
        """The jobs of all ranks that share the engine, and the index of this rank's first job."""
        self._asked += 1
        if self._sharing == 1:
            return jobs, 0
        group, place = compat.tensor_parallel_group()
        each: list[list[Any]] = [[] for _ in range(self._sharing)]
        distributed.all_gather_object(each, jobs, group=group)
        return [job for own in each for job in own], sum(map(len, each[:place]))

    @contextmanager
    def generating(self, times: int) -> Iterator[None]:
        last = self._asked + times
        try:
            yield
        except Exception:
            self._keep_up(last)
            raise
        self._keep_up(last)

    def _keep_up(self, last: int) -> None:
        """Takes part in the remaining calls of the ranks that share the engine."""
        while self._sharing > 1 and self._asked < last:
            self._generate([])

    def sync(self, weights: Mapping[str, Tensor], *, vision: tuple[int, ...] | None = None) -> None:
        check_names(weights, self._names)
        same_vision, self._vision = vision is not None and vision == self._vision, None
        self.wake()
        with _explained("take over the weights"):
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": {"weights": weights.items()}})
            self._llm.finish_weight_update()
            # A third cache stays valid: it holds preprocessed images, which do not depend on weights.
            forgotten = self._llm.reset_prefix_cache()
            if not same_vision:
                compat.forget_features(self._llm)
        if not forgotten:
            raise EngineError("vLLM keeps keys and values of the old weights, because it has unfinished requests")
        self._vision = vision

    def forget_images(self) -> None:
        self._vision = None

    def checksums(self) -> dict[str, dict[str, str]]:
        """SHA-256 of every weight by vLLM's name, under the address "".

        Raises:
            EngineError: vLLM failed.
        """
        with _explained("compute checksums"):
            (told,) = self._llm.collective_rpc("compute_weight_checksums")
        return {"": told}

    def clear(self) -> None:
        """Sets every weight to 0, until the next update.

        Raises:
            EngineError: vLLM failed.
        """
        with _explained("clear its weights"):
            self._llm.collective_rpc("reset_weights")

    def sleep(self) -> None:
        """Moves the weights to the CPU's memory, and drops keys, values and features.

        vLLM's level 2 would drop the weights, which `sync` overwrites anyway. But it would also drop tensors that are
        neither parameters nor buffers, such as the banned tokens and Qwen3-VL's features of deeper layers.
        """
        if self._sleeps and self._asleep != _MEMORY:
            with _explained("sleep"):
                self._llm.sleep(level=1)
            self._asleep = set(_MEMORY)

    def wake(self) -> None:
        """Allocates memory for weights. Memory for keys and values follows at the next `generate`.

        By then the gathered or merged weights of `sync` are freed.
        """
        self._take_back({"weights"})

    def _take_back(self, parts: Set[str]) -> None:
        if asleep := sorted(self._asleep & parts):
            with _explained("wake"):
                self._llm.wake_up(asleep)
            self._asleep -= parts

    def close(self) -> None:
        with suppress(EngineError):  # otherwise vLLM frees unallocated memory, an error that the next engine would meet
            self._take_back(_MEMORY)
        with compat.keeping_processes() if num_processes() > 1 else nullcontext():
            compat.shut_down(self._llm)


def check_sharing(tensor_parallel: int, processes: int) -> None:
    """Raises ConfigError unless the number of ranks is a multiple of `tensor_parallel`."""
    if tensor_parallel < 1 or processes % tensor_parallel:
        raise ConfigError(
            f"tensor_parallel={tensor_parallel} divides an engine over as many ranks, but there "
            f"{'is one' if processes == 1 else f'are {processes}'}: launch a multiple of it with accelerate launch "
            "--num_processes"
        )


def require_vllm() -> None:
    """Raises ConfigError if vLLM is not installed, without importing it."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(_MISSING)


def import_vllm(device: torch.device) -> Any:
    """Sets vLLM's environment variables and imports it.

    Raises:
        ConfigError: vLLM is not installed.
    """
    for name, value in (_IN_PROCESS | environment(device)).items():
        os.environ.setdefault(name, value)
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise ConfigError(f"{_MISSING} ({error})") from error
    prepare_process()
    return vllm


@contextmanager
def _explained(work: str) -> Iterator[None]:
    """Converts vLLM's errors to EngineError."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        full = "; lower --engine-memory" if "out of memory" in str(error) else ""
        raise EngineError(f"vLLM failed to {work}: {error}{full}") from error


def _sampled(output: Any) -> Sampled:
    ids = np.array(output.token_ids, dtype=np.int64)
    logprobs = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
    return Sampled(ids, np.array(logprobs, dtype=np.float32), "length" if output.finish_reason == "length" else "stop")
