"""Shared parts of the benchmarks of training: models and prompts of given sizes, measurement of time and memory.

Every contestant learns from the same prompts, with completions of the same number of tokens. Contestants take steps in
turn in one process, so that other work of the machine affects all of them alike.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from vlmenv.agents.families import Family, Processor, family_of
from vlmenv.agents.policy import Policy
from vlmenv.agents.vlm import Sampling, VLMAgent, find_model
from vlmenv.algos import GRPO, GRPOConfig, Trainer, TrainerConfig
from vlmenv.core.rollout import Observation, Observations, Prompt, unbatch

LR = 1e-6
"""So small that the model stays what it is, and with it the work of a step."""
NEVER = 10**9
LETTERS = (
    "T: tokens of a prompt (of its image); G: completions of each; P: prompts in a step; L: tokens of a completion."
)

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "text_config": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1},
        "vision_config": {"hidden_size": 64, "intermediate_size": 96, "depth": 1, "out_hidden_size": 64},
    },
    "1.6M": {"text_config": {}, "vision_config": {}},
    "10M": {
        "text_config": {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
        "vision_config": {"hidden_size": 256, "intermediate_size": 768, "depth": 3, "out_hidden_size": 256},
    },
}
"""What differs from the built-in model's configuration, by parameters."""
QWEN35 = "10M, Qwen3.5"
"""A Qwen3.5 of the same width: six blocks with states, two with attention."""
GEMMA3 = "10M, Gemma 3"
"""A Gemma 3 of the same width: seven blocks with windows of 128 tokens, one without; images of 121 features."""
GEMMA3_FEATURES = 121


@dataclass(frozen=True)
class Case:
    """What is learnt from in a step."""

    size: str
    """of the model, one of `SIZES`"""
    tokens: int
    """T, of a prompt"""
    group_size: int
    """G"""
    prompts: int
    """P"""
    new_tokens: int
    """L, of every completion"""
    image_share: float = 0.45
    """of the prompt's tokens, at most; images are square"""

    @property
    def image_tokens(self) -> int:
        return math.isqrt(int(self.image_share * self.tokens)) ** 2

    @property
    def cells(self) -> list[str]:
        """The first columns of a table: model, T with the image's, G, P, L."""
        numbers = (self.group_size, self.prompts, self.new_tokens)
        return [self.size, f"{self.tokens:,} ({self.image_tokens})", *map(str, numbers)]

    @property
    def count(self) -> int:
        """N, the completions"""
        return self.prompts * self.group_size


def new_model(size: str) -> PreTrainedModel:
    """A Qwen3-VL, Qwen3.5 or Gemma 3 with random weights, the same whenever it is made."""
    if size == GEMMA3:
        return model_from(_gemma3())
    config = AutoConfig.from_pretrained(find_model("builtin"))
    if size == QWEN35:
        config = _qwen35(config)
    for part, changes in SIZES["10M" if size == QWEN35 else size].items():
        for name, value in changes.items():
            setattr(getattr(config, part), name, value)
    return model_from(config)


def _qwen35(builtin: Any) -> Any:
    """A configuration of Qwen3.5 with the built-in model's tokens and patches."""
    config = AutoConfig.for_model("qwen3_5")
    text, vision = config.text_config, config.vision_config
    text.vocab_size, text.eos_token_id = builtin.text_config.vocab_size, builtin.text_config.eos_token_id
    text.head_dim, text.max_position_embeddings = 32, builtin.text_config.max_position_embeddings
    text.layer_types = (["linear_attention"] * 3 + ["full_attention"]) * 2
    text.linear_key_head_dim = text.linear_value_head_dim = 32
    text.linear_num_key_heads, text.linear_num_value_heads = 4, 8
    text.rope_parameters |= {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
    for name in ("patch_size", "num_heads", "num_position_embeddings"):
        setattr(vision, name, getattr(builtin.vision_config, name))
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(builtin, name))
    return config


def _gemma3() -> Any:
    """A configuration of Gemma 3 with the built-in model's tokens, and those around images behind them."""
    config = AutoConfig.for_model("gemma3")
    text, vision = config.text_config, config.vision_config
    builtin = AutoConfig.from_pretrained(find_model("builtin"))
    for name, value in SIZES["10M"]["text_config"].items():
        setattr(text, name, value)
    text.vocab_size, text.eos_token_id = builtin.text_config.vocab_size, builtin.text_config.eos_token_id
    text.head_dim, text.query_pre_attn_scalar, text.sliding_window = 32, 32, 128
    text.layer_types = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2
    text.pad_token_id, text.bos_token_id = builtin.text_config.pad_token_id, None
    vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, vision.num_attention_heads = 256, 768, 3, 8
    vision.image_size, vision.patch_size, vision.vision_use_head = 32 * math.isqrt(GEMMA3_FEATURES), 16, False
    config.mm_tokens_per_image, config.image_token_id = GEMMA3_FEATURES, builtin.image_token_id
    config.boi_token_id, config.eoi_token_id = builtin.vision_start_token_id, builtin.vision_end_token_id
    return config


def model_from(config: Any, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of random weights, the same whenever it is made."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    assert isinstance(model, PreTrainedModel)
    return model


def processor_of(folder: Path) -> Processor:
    """A folder's processor, which leaves images of any size as large as they are."""
    processor = Processor.from_pretrained(folder)
    processor.image_processor.size = {"shortest_edge": 1, "longest_edge": 2**24}
    return processor


def processor_for(size: str) -> Processor:
    """The processor for a model of `new_model`: the built-in model's, for Gemma 3 with its own images."""
    built_in = processor_of(find_model("builtin"))
    if size != GEMMA3:
        return built_in
    side = 32 * math.isqrt(GEMMA3_FEATURES)
    images = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    template = built_in.chat_template.replace("<|image_pad|><|vision_end|>", "")
    return Processor(built_in.tokenizer, images, template)


def family_without_end(model: PreTrainedModel, processor: Processor) -> Family:
    """A model's family that bans the end tokens too, so that all completions are as long as they may be."""
    known = family_of(model.config.model_type)

    class Endless(known):  # type: ignore[misc, valid-type]
        @cached_property
        def banned_tokens(self) -> NDArray[np.int64]:
            return np.union1d(super().banned_tokens, self.end_tokens)

    return Endless(model, processor)


def observations(family: Family, case: Case) -> list[Observation]:
    """Prompts of exactly so many tokens, with an image of noise, each once."""
    rng = np.random.default_rng(0)
    images = family.processor.image_processor
    unit = images.patch_size * images.merge_size if hasattr(images, "merge_size") else 32  # Gemma's, of two patches
    side = unit * math.isqrt(case.image_tokens)
    return [
        of_length(family, case.tokens, rng.integers(256, size=(side, side, 3), dtype=np.uint8))
        for _ in range(case.prompts)
    ]


def of_length(family: Family, tokens: int, image: NDArray[np.uint8]) -> Observation:
    shortest = len(family.encode({"images": (image,), "prompt": "circle"}).input_ids)
    found: Observation = {"images": (image,), "prompt": "circle" + " circle" * (tokens - shortest)}
    assert len(family.encode(found).input_ids) == tokens, "a word of the filling is not one token"
    return found


def rewards(case: Case) -> NDArray[np.float64]:
    """[N], different for each completion of a group, and the same in every step."""
    return np.random.default_rng(1).random(case.count)


class Shown(VectorEnv[Any, Any, Any]):
    """Environments that show the same prompts in every step, each to a group, and pay the same rewards."""

    def __init__(self, prompts: Sequence[Observation], case: Case) -> None:
        rows = [one for one in prompts for _ in range(case.group_size)]
        self.num_envs, self.group_size = case.count, case.group_size
        self.shown = {key: tuple(row.get(key, ()) for row in rows) for key in ("images", "videos", "prompt")}
        self.rewards = rewards(case)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.shown, {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        ends = np.ones(self.num_envs, dtype=bool)
        return self.shown, self.rewards, ends, ~ends, {}


class LooksOnce(Policy):
    """Looks at each image once, however often its prompt is repeated."""

    def _look(self, prompts: Sequence[Prompt]) -> Any:
        first = {id(one.images): one for one in prompts}
        once = {key: super(LooksOnce, self)._look([one]) for key, one in first.items()}
        return self.family.join_features([once[id(one.images)] for one in prompts])


Way = Literal["shared", "image once", "plain"]
"""What a group computes once: its prompt with the image, the image alone, or nothing."""


class Repeating(VLMAgent):
    """Gives every completion a prompt of its own, as if there were no groups.

    Args:
        encodes_each: Whether to preprocess the image for every completion too.
    """

    def __init__(self, *args: Any, encodes_each: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.encodes_each = encodes_each

    def encode(self, observations: Observations) -> tuple[list[Prompt], np.ndarray]:
        if self.encodes_each:
            listed = unbatch(observations)
            return [self.family.encode(one) for one in listed], np.arange(len(listed))
        prompts, index = super().encode(observations)
        return [prompts[i] for i in index], np.arange(len(index))


def new_agent(family: Family, way: Way, new_tokens: int, policy: Callable[[Family], Policy] | None = None) -> VLMAgent:
    """An agent that computes a group's prompt in one of the ways."""
    sampling, folder = Sampling(max_new_tokens=new_tokens), find_model("builtin")
    if way == "shared":
        agent = VLMAgent(family, folder, sampling=sampling)
    else:
        agent = Repeating(family, folder, sampling=sampling, share_prefixes=False, encodes_each=way == "plain")
    if way == "image once" or policy is not None:
        agent.policy = (policy or LooksOnce)(family)
        agent.family_policy.share_prefixes = way == "shared"
    return agent


class Contestant(Protocol):
    """Something that takes optimiser steps."""

    def step(self) -> dict[str, float]:
        """Rolls out and learns; seconds by phase, `step` the whole."""

    def logprobs(self) -> None:
        """Computes the log-probabilities of the last step's completions, without gradient."""

    def update(self) -> None:
        """Learns from the last step's completions once more: forward and backward pass and optimiser step."""


class Ours:
    """vlmenv's own trainer.

    Args:
        agent: To be trained.
        prompts: That it is asked.
        case: How.
        accelerator: On its device.
        algorithm: That trains it. Default: GRPO.
        config: Of the trainer. Default: AdamW at a rate that changes nothing.
    """

    def __init__(
        self,
        agent: VLMAgent,
        prompts: Sequence[Observation],
        case: Case,
        accelerator: Accelerator,
        algorithm: GRPO | None = None,
        config: TrainerConfig | None = None,
    ) -> None:
        self.agent = agent
        self.encoding = 0.0
        self._wrap_encode()
        config = config or TrainerConfig(steps=NEVER, lr=LR, warmup_steps=0, lr_schedule="constant")
        algorithm = algorithm or GRPO(GRPOConfig(group_size=case.group_size))
        self.trainer = Trainer(agent, Shown(prompts, case), algorithm, config, accelerator)
        self._steps = self.trainer.train(seed=0)
        self.last: Any = None

    def step(self) -> dict[str, float]:
        self.encoding = 0.0
        started = time.perf_counter()
        self.last = next(self._steps)
        whole = time.perf_counter() - started
        metrics = self.last.metrics
        rollout = metrics["time/rollout"] + metrics["time/score"]
        generate = metrics["time/rollout"] - self.encoding
        return {"step": whole, "rollout": rollout, "generate": generate, "update": metrics["time/update"]}

    @torch.no_grad()
    def logprobs(self) -> None:
        with self.trainer.accelerator.autocast():
            self.agent.logprobs(self.last.rollouts.rollout)

    def update(self) -> None:
        self.trainer._learn(self.last.rollouts)

    def _wrap_encode(self) -> None:
        """Notes how long preprocessing takes, which `time/rollout` holds too."""
        encode = self.agent.encode

        def timed(observations: Observations) -> Any:
            started = time.perf_counter()
            result = encode(observations)
            self.encoding += time.perf_counter() - started
            return result

        self.agent.encode = timed  # type: ignore[method-assign]


@dataclass(frozen=True)
class Spread:
    """Times of the same work."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def __str__(self) -> str:
        """Milliseconds, with the least and the most."""
        return f"{self.median * 1e3:,.0f} ({min(self.seconds) * 1e3:,.0f}–{max(self.seconds) * 1e3:,.0f})"


def alternate(contestants: dict[str, Contestant], rounds: int) -> dict[str, dict[str, Spread]]:
    """Times of each contestant by phase, taken in turn; a first round is not counted.

    Among them are `logprobs`, and `cpu`: the processor's time of the whole step, which other processes change little.
    """
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        gc.collect()
        for name, contestant in contestants.items():
            started = time.process_time()
            times = contestant.step() | {"cpu": time.process_time() - started}
            taken[name].append(times | {"logprobs": seconds_of(contestant.logprobs)})
    return {
        name: {phase: Spread(tuple(one[phase] for one in found[1:])) for phase in found[0]}
        for name, found in taken.items()
    }


def seconds_of(call: Callable[[], Any]) -> float:
    _await_gpu()
    started = time.perf_counter()
    call()
    _await_gpu()
    return time.perf_counter() - started


def _await_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(call: Callable[[], Any], device: str = "cpu") -> int:
    """Measures the peak of a call's tensors in bytes, above the memory before it.

    On the CPU it sums the allocations and frees that PyTorch's allocator reports to its profiler. These include kernels
    and the backward pass, to the byte, and nothing else of the process. (The process's resident memory would include
    memory that the C library keeps; a dispatch mode would miss memory within kernels.) On a GPU it is the allocator's
    own count.
    """
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    found = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    found.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((int(event.nbytes()) for event in found), initial=0))


def ratio(theirs: dict[str, Spread], ours: dict[str, Spread], phase: str) -> str:
    """How many times as fast ours is."""
    return f"{theirs[phase].median / ours[phase].median:.1f}×"


def gradient_of(model: PreTrainedModel) -> Tensor:
    """Of all parameters, in the order of their names."""
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])


def largest_difference(found: Tensor, right: Tensor) -> float:
    """As a share of the largest number."""
    return float((found - right).abs().max() / right.abs().max())


@contextmanager
def none_banned(policy: Policy) -> Iterator[None]:
    """Lets log-probabilities be of the whole vocabulary, as trainers have them that ban no tokens."""
    banned = policy.banned
    policy.banned = banned[:0]
    yield
    policy.banned = banned


def hardware(what: str = "") -> str:
    """The machine, and `what` more there is to say, before the versions."""
    return f"{cores()} cores of {processor_name()}, {what}torch {torch.__version__}"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """The CPU's model, or what kind it is where that is not told."""
    if Path("/proc/cpuinfo").is_file():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        if models:
            return models[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def report(lines: list[str], output: Path | None) -> None:
    """Prints a table, and writes it where asked."""
    text = "\n".join(lines) + "\n"
    print(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")
