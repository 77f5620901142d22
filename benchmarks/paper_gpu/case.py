"""Cases on paper: a model's configuration, how it is trained, and the lengths of its sequences.

Of a case there is a micro-batch of an update, and the step of sampling that gives each completion its next token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from paper_gpu.card import HOST_CALL, Card, Kernel, Kind, utilization
from paper_gpu.recording import Recorder
from vlmenv.agents import fusing, kernels, sampling, step_graphs, wide_gradients
from vlmenv.agents.quantization import quantize
from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos.optimizers import state_bytes
from vlmenv.building import DTYPES, adapt
from vlmenv.core.rollout import Completion, Rollout
from vlmenv.core.sampling import Sampling
from vlmenv.doctor.counting import counting, weightless_agent
from vlmenv.options.fields import replaced
from vlmenv.options.train import TrainConfig, default_config

Mode = Literal["full", "lora", "nf4"]
_LARGEST: Final = 2048
"""pixels of an image's sides"""
_STEPS: Final = (8, 24)
"""Tokens of completions between which steps of sampling are counted: none of them begins or enlarges a cache."""
_ROOM: Final = 1_000_000
"""tokens whose keys and values may be held at once"""
_MODES: Final[dict[Mode, dict[str, Any]]] = {
    "full": {},
    "lora": {"lora_rank": 64},
    "nf4": {"lora_rank": 64, "quantize": "nf4"},
}


@dataclass(frozen=True)
class Case:
    """A micro-batch.

    Attributes:
        folder: Folder with the model's configuration and processor.
        mode: What is trained: all weights, adapters of rank 64, or these on a base in nf4.
        prompt: Tokens of a prompt, at least; its image makes most of them.
        completion: The most tokens of a completion.
        group: Completions of the prompt.
        uneven: If true, completions have from a quarter of `completion` to all of it, evenly drawn. Else all have
            the most.
        precision: As the option of training.
        checkpointing: If true, blocks are recomputed in the backward pass.
        blocks: Number of blocks of the language model, and of the vision tower. None: all.
    """

    folder: Path
    mode: Mode
    prompt: int
    completion: int
    group: int
    uneven: bool = True
    precision: Literal["bf16", "fp32"] = "bf16"
    checkpointing: bool = True
    blocks: int | None = None

    @property
    def config(self) -> TrainConfig[Any]:
        """The options of such a run."""
        own = {"model": str(self.folder), "gradient_checkpointing": self.checkpointing, "precision": self.precision}
        return replaced(default_config(), own | _MODES[self.mode])


@dataclass(frozen=True)
class Pass:
    """A pass on the card: kernels, and the host's waits by kind and place."""

    kernels: list[Kernel]
    waits: dict[tuple[str, str], int]
    replays: int = 0
    """number of graphs that the host starts"""

    @property
    def launches(self) -> int:
        """Number of kernels."""
        return sum(one.launches for one in self.kernels)


@dataclass(frozen=True)
class Paper:
    """What a micro-batch takes."""

    prompt: int
    """tokens"""
    completions: int
    """tokens of all completions"""
    memory: dict[str, float]
    """bytes by what they are for; that of passes is at their peak, beyond what is above it"""
    forward: Pass
    backward: Pass
    times: int = 3
    """how many times the forward pass's operations both passes take, without recomputation"""

    @property
    def launches(self) -> int:
        """Number of kernels."""
        return self.forward.launches + self.backward.launches

    @property
    def waits(self) -> int:
        """Number of times that the host waits for the card."""
        return sum(self.forward.waits.values()) + sum(self.backward.waits.values())

    def seconds(self, card: Card) -> dict[Kind, float]:
        """The modelled time by kind."""
        times = dict.fromkeys(Kind, 0.0)
        for one in (*self.forward.kernels, *self.backward.kernels):
            times[one.kind] += one.seconds(card)
        return {kind: time for kind, time in times.items() if time}

    def utilization(self, card: Card) -> float:
        """Modelled model FLOPs utilisation."""
        operations = sum(one.operations for one in self.forward.kernels)
        return utilization(operations, self.times, sum(self.seconds(card).values()), card)


def measure(case: Case) -> Paper:
    """Runs a micro-batch forward and backward on paper."""
    config = case.config
    agent = _agent(config, case.blocks)
    rollout = _rollout(agent, case)
    dtype = DTYPES[case.precision] if case.precision != "fp32" else torch.float32
    with counting(), Recorder(_mode_of(agent)) as recorder, _as_on_cards(recorder):
        _onto_card(agent, recorder)
        memory = {"weights": float(recorder.restart())}
        trained = agent.parameters()
        gradients = float(sum(one.numel() * one.element_size() for one in trained))
        with torch.autocast("cuda", dtype, enabled=case.precision != "fp32"):
            out = agent.logprobs(rollout)
            values = out.values
        del out
        kept, peak = recorder.live(), recorder.peak
        memory["kept for the backward pass"] = kept - memory["weights"]
        memory["forward pass at its peak"] = float(peak - kept)
        forward = Pass(recorder.kernels, dict(recorder.waits))
        recorder.clear()
        recorder.restart()
        values.sum().backward()
        del values
        memory["backward pass at its peak, gradients included"] = float(recorder.peak - kept)
        backward = Pass(recorder.kernels, dict(recorder.waits))
    memory["gradients"] = gradients
    memory["optimizer"] = float(sum(one.numel() * state_bytes(config.trainer.optimizer, one.dtype) for one in trained))
    lengths = [len(one.token_ids) for one in rollout.completions]
    prompt, times = len(rollout.prompts[0].input_ids), 3 if case.mode == "full" else 2
    return Paper(prompt, sum(lengths), memory, forward, backward, times)


@dataclass(frozen=True)
class Decoding:
    """What a step of sampling takes, in which all completions get their next token: a mean over several."""

    prompt: int
    """tokens"""
    steps: int
    """number of steps"""
    whole: Pass
    """all steps"""

    @property
    def calls(self) -> float:
        """Operators and graphs that the host starts."""
        return (self.whole.replays + sum(not one.replayed for one in self.whole.kernels)) / self.steps

    @property
    def launches(self) -> float:
        """Kernels."""
        return self.whole.launches / self.steps

    @property
    def waits(self) -> float:
        """Number of times that the host waits for the card."""
        return sum(self.whole.waits.values()) / self.steps

    @property
    def host_seconds(self) -> float:
        """The host's modelled time."""
        return self.calls * HOST_CALL

    def seconds(self, card: Card) -> float:
        """The card's modelled time."""
        return sum(one.seconds(card) for one in self.whole.kernels) / self.steps


def decode(case: Case) -> Decoding:
    """Samples completions of a prompt on paper, none of which ends."""
    agent = _agent(case.config, case.blocks)
    prompt, index = agent.family.encode(_observation(agent, case.prompt)), np.arange(case.group)
    first, last = _STEPS
    options, limits = Sampling(temperature=0.9, max_new_tokens=last), sampling.PassLimits(cache=_ROOM)
    with counting(), Recorder(_mode_of(agent)) as recorder, _as_on_cards(recorder), _never_ending(recorder):
        _onto_card(agent, recorder)
        with torch.autocast("cuda", DTYPES[case.precision], enabled=case.precision != "fp32"), torch.no_grad():
            places = sampling._Places(case.group, options, torch.Generator(), ahead=True)
            sampling._wave(agent.family_policy, [prompt], 0 * index, index, options, places, limits)
        whole = Pass(recorder.kernels, dict(recorder.waits), recorder.replays)
    return Decoding(len(prompt.input_ids), last - first, whole)


@contextmanager
def _never_ending(recorder: Recorder) -> Iterator[None]:
    """Lets no completion end, as tokens have no numbers, and begins to count at the first of `_STEPS`."""
    add = sampling._Growing.add

    def counted(own: Any, token: Tensor, logprob: Tensor) -> None:
        add(own, token, logprob)
        recorder.give(own._lengths, torch.zeros(own._lengths.shape, dtype=torch.int64))
        if own.step == _STEPS[0]:
            recorder.clear()

    def drawn(own: Any, *shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, device="cuda")

    with (
        patch.object(sampling._Growing, "add", counted),
        patch.object(sampling._Growing, "sampled", lambda own: {}),
        patch.object(sampling._Places, "_drawn", drawn),
    ):
        yield


def _agent(config: TrainConfig[Any], blocks: int | None) -> VLMAgent:
    """The agent as it is prepared for training, without numbers."""

    def prepare(agent: VLMAgent) -> None:
        if config.adaptation.quantize is not None:
            quantize(
                agent.family, config.adaptation.quantize, torch.device("cpu"), vision=config.adaptation.lora_vision
            )
        adapt(agent, config.adaptation, config.batches.precision)

    return weightless_agent(Path(config.model), prepare, torch.float32, blocks=blocks, vision_blocks=blocks)


def _mode_of(agent: VLMAgent) -> FakeTensorMode:
    return cast(FakeTensor, next(agent.family_policy.parameters())).fake_mode


def _onto_card(agent: VLMAgent, recorder: Recorder) -> None:
    """Moves weights and buffers to the card. Tied weights stay tied."""
    moved: dict[int, Any] = {}
    for module in agent.family_policy.modules():
        for held in (module._parameters, module._buffers):
            for name, one in held.items():
                if one is None:
                    continue
                if id(one) not in moved:
                    empty = torch.empty(one.shape, dtype=one.dtype, device="cuda")
                    recorder.forget(empty)  # or what happens to lie in memory would be its numbers
                    moved[id(one)] = (
                        one,
                        nn.Parameter(empty, one.requires_grad) if held is module._parameters else empty,
                    )
                held[name] = moved[id(one)][1]


def _rollout(agent: VLMAgent, case: Case) -> Rollout:
    """A prompt with an image, and its completions."""
    draw = np.random.default_rng(0)
    prompt = agent.family.encode(_observation(agent, case.prompt))
    shortest = case.completion // 4 if case.uneven else case.completion
    lengths = draw.integers(shortest, case.completion + 1, size=case.group)
    completions = [Completion("", np.zeros(n, np.int64), np.zeros(n, np.float32), "stop") for n in lengths]
    return Rollout([prompt], np.zeros(case.group, np.int64), completions, 0.9)


def _observation(agent: VLMAgent, tokens: int) -> dict[str, Any]:
    """An observation whose square image and text take about as many tokens."""
    text = "Please provide the bounding box of the red cup on the left of the table. "
    most = 0
    for side in range(28, _LARGEST, 28):
        image = np.zeros((side, side, 3), np.uint8)
        observation = {"images": (image,), "prompt": text}
        most = max(most, len(agent.family.encode(observation).input_ids))
        if most >= tokens:
            return observation
    raise ValueError(
        f"a prompt of one image has at most {most} tokens here, not {tokens}: the processor shrinks images"
    )


@contextmanager
def _as_on_cards(recorder: Recorder) -> Iterator[None]:
    """Lets what is tried on a card by numbers be as it is there if the trial succeeds."""
    choose = kernels._kernel_for

    def chosen(device: str, dtype: torch.dtype, size: int, masked: bool) -> kernels.Kernel:
        if device == "cpu":
            return choose(device, dtype, size, masked)
        return kernels.FlashKernel() if dtype.itemsize == 2 and not masked else kernels.EfficientKernel()

    with (
        patch.object(kernels, "_kernel_for", functools.cache(chosen)),
        patch.object(kernels, "segments_fault", lambda *kind: ""),
        patch.object(fusing, "fault_of", lambda device: ""),
        patch.object(wide_gradients, "fault_of", lambda *kind: ""),
        patch.object(step_graphs, "fault_of", lambda policy: ""),
        patch.object(step_graphs, "difference_of", lambda found, right: ""),
        patch.object(step_graphs, "capture", recorder.capture),
        patch.object(fusing.Fused, "__call__", lambda own, *arguments: recorder.compute(own, arguments)),
    ):
        yield
