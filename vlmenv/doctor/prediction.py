"""Predicts the memory of training from a model's configuration, without its weights and without the card.

A model of few blocks without numbers runs through the product's own passes, and what one more block adds is counted
(`vlmenv.doctor.counting`). What ranks share follows from the strategy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from vlmenv.agents.checkpoints import find_adapter
from vlmenv.agents.families import Family, weightless_family
from vlmenv.agents.lora import LoRA
from vlmenv.agents.pixels import prepared_folder
from vlmenv.agents.quantization import quantize, quantized_layers
from vlmenv.agents.sampling import state_tokens, token_bytes
from vlmenv.agents.untrainable import read_config
from vlmenv.agents.vlm import VLMAgent
from vlmenv.agents.weights import narrow_copies
from vlmenv.algos import find_algorithm
from vlmenv.algos.optimizers import state_bytes
from vlmenv.building import DTYPES, adapt, is_adapted, limits_of, loading_dtype
from vlmenv.compat.peft import is_adapter
from vlmenv.core.errors import ConfigError
from vlmenv.core.rollout import Completion, Observation, Prompt, Rollout
from vlmenv.core.urls import is_server
from vlmenv.doctor.counting import Counter, block_lists, counting, taps_of, weightless_agent
from vlmenv.options.train import TrainConfig
from vlmenv.runs.models import checkpoint_name

Layout = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]

CARDS: Final = {
    "t4": 16, "v100": 32, "rtx-3090": 24, "rtx-4080": 16, "rtx-4090": 24, "rtx-5090": 32, "l4": 24, "a10": 24,
    "l40s": 48, "rtx-6000-ada": 48, "a100-40": 40, "a100-80": 80, "h100-80": 80, "h200": 141, "b200": 180,
}  # fmt: skip
"""Nominal memory of cards in GB of 10^9 bytes, as their makers state it; `nvidia-smi` shows some of them larger."""
_CONTEXT: Final = 0.7e9
"""Bytes of a process on a card beside tensors: CUDA's context and the kernels of its libraries; an assumption."""
_SCATTERED: Final = 0.04
"""Share of a card that PyTorch's allocator cannot use, because it is scattered; an assumption."""
_PER_LOGIT: Final = 28
"""Bytes per entry of the vocabulary while a token is drawn: logits, their logarithms and probabilities in float32, and
float64 copies and sums of the probabilities."""
_LIMIT: Final = Path("/sys/fs/cgroup/memory.max")
_BUCKET: Final = 2e9
"""Bytes of DeepSpeed's bucket of 5e8 float32 gradients, its default; it holds two."""


def card_bytes(name: str) -> float:
    """Bytes of a card by its name or its size, as `rtx-4090` or `24GB`.

    Raises:
        ConfigError: It is neither.
    """
    if (size := CARDS.get(name.lower())) is not None:
        return size * 1e9
    if (found := re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB)", name, re.IGNORECASE)) is None:
        raise ConfigError(f"card '{name}' is neither a size, such as 24GB, nor one of: {', '.join(CARDS)}")
    return float(found[1]) * (2**30 if found[2].lower() == "gib" else 1e9)


def device_memory(device: torch.device) -> int:
    """Bytes of a device's memory; for a CPU, the limit of this process."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _LIMIT.read_text().strip() if _LIMIT.is_file() else "max"
    return min(installed, int(limit)) if limit.isdigit() else installed


def gigabytes(size: float) -> str:
    """A number of bytes in MB or GB, of 10^6 or 10^9 bytes as cards are named."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model in training on a single rank."""

    loaded: float
    """weights as they are loaded, before training's data types"""
    weights: float
    gradients: float
    optimizer: float
    reference: float
    own_tower: float
    """what the reference has besides under sharded weights, where it cannot share a frozen vision tower"""
    teacher: float
    published: float
    """weights of a copy in an engine"""
    activations: float
    """what a micro-batch's forward pass keeps, with casts of weights"""
    casts: float
    """the parts of `activations` and `forward_space` that are casts of the blocks' weights"""
    forward_space: float
    """what the forward pass needs at its peak beyond what it keeps"""
    backward_space: float
    """what the backward pass needs at its peak beyond that"""
    prefill: float
    """what a pass of prompts without gradient needs, beside keys and values"""
    block: float
    """the largest block's weights"""
    sent: float
    """weights of all blocks as FSDP2 gathers them"""
    outside: float
    """weights outside of blocks, with the head"""
    outside_gradients: float

    def until(self, other: Sizes) -> Sizes:
        """What the block adds that `other` has beyond these; peaks within blocks stay."""
        kept = {one.name for one in fields(Sizes)} - set(_CONSTANT)
        return Sizes(
            **{
                one.name: getattr(other, one.name) - getattr(self, one.name) if one.name in kept else 0.0
                for one in fields(Sizes)
            }
        )

    def plus(self, more: Sizes, times: float) -> Sizes:
        """The sizes with what some blocks add."""
        return Sizes(**{one.name: getattr(self, one.name) + times * getattr(more, one.name) for one in fields(Sizes)})

    def beyond(self, less: Sizes, times: float) -> Sizes:
        """The sizes of a larger micro-batch, with so many times what these have beyond those of a smaller one."""
        return self.plus(self.plus(less, -1), times)


@dataclass(frozen=True)
class Batch:
    """The tokens of a rank's step."""

    prompts: int
    completions: int
    longest: int
    """tokens of the longest prompt"""
    answer: int
    """max_new_tokens"""
    micro: int
    """completions in a micro-batch"""
    micro_prompts: int

    @classmethod
    def of(cls, config: TrainConfig[Any], longest: int, ranks: int = 1) -> Batch:
        """The largest of a rank's batches: all completions have the full length."""
        group, answer = config.algorithm.group_size, config.sampling.max_new_tokens
        prompts = -(-config.batches.prompts_per_step // ranks)
        twice = getattr(find_algorithm(config.algo).make, "learns_masked", False)  # with the images, and masked
        most = prompts * group * (2 if twice else 1)
        micro = min(most, config.trainer.micro_batch_size or most)
        if (tokens := config.trainer.micro_batch_tokens) is not None:
            micro = min(micro, max(1, int(tokens // (longest / group + answer))))
        return cls(prompts, prompts * group, longest, answer, micro, -(-micro // group))

    def cut(self, prompts: int) -> Batch:
        """The batch with so many prompts in a micro-batch."""
        return replace(self, micro=min(self.micro, prompts * self.group), micro_prompts=prompts)

    @property
    def group(self) -> int:
        """Completions of a prompt."""
        return self.completions // self.prompts

    @property
    def cached(self) -> int:
        """Tokens whose keys and values sampling holds without a limit."""
        return self.prompts * self.longest + self.completions * self.answer

    def with_states(self, tokens: int, *, is_card: bool) -> Batch:
        """The batch as sampling holds it, where each prompt and answer has states that take as much as some tokens.

        Steps that a GPU replays as graphs hold those of an answer twice.
        """
        return replace(self, longest=self.longest + tokens, answer=self.answer + tokens * (2 if is_card else 1))


_FEW: Final = 2
_CONSTANT: Final = ("backward_space", "prefill", "block")
_MOST: Final = 16
"""Prompts of a micro-batch that are counted; more add what the second half of these adds."""


def measure(config: TrainConfig[Any], observation: Observation, ranks: int = 1) -> tuple[Sizes, Batch]:
    """Counts the bytes of a training step at the model's full size.

    Args:
        config: The options. The model's weights are not read.
        observation: A sample, whose prompt counts as the longest.
        ranks: Number of ranks, among which the prompts of a step are divided.

    Raises:
        ConfigError: This release of PyTorch does not let bytes be counted, or adapters do not go with the options.
        ModelError: The model's configuration cannot be read.
    """
    full = weightless_family(prepared_folder(config.model, config.pixels))
    batch = Batch.of(config, len(full.encode(observation).input_ids), ranks)
    if batch.micro_prompts <= _MOST:
        return _at_full_depth(config, observation, batch, full), batch
    half, most = (_at_full_depth(config, observation, batch.cut(prompts), full) for prompts in (_MOST // 2, _MOST))
    return most.beyond(half, (batch.micro - batch.cut(_MOST).micro) / (_MOST // 2 * batch.group)), batch


def _at_full_depth(config: TrainConfig[Any], observation: Observation, batch: Batch, full: Family) -> Sizes:
    """Counts a model of few blocks, and adds what its other blocks add."""
    depth, vision_depth = (len(blocks) for blocks in block_lists(full))
    least = max(_FEW, taps_of(full))
    few, few_vision = min(depth, least), min(vision_depth, least)
    recomputed, kept = _by_blocks(config, few)
    base = _sizes(recomputed, observation, batch, (few, few_vision))
    recomputes = config.adaptation.checkpointed_blocks if config.adaptation.gradient_checkpointing else 0
    recomputes = depth if recomputes is None else min(depth, recomputes)
    if not config.adaptation.gradient_checkpointing:
        recomputes, kept = depth, recomputed
    more = [
        (recomputed, (few + 1, few_vision), recomputes - few),
        (kept, (few + 1, few_vision), depth - max(few, recomputes)),
        (recomputed, (few, few_vision + 1), vision_depth - few_vision),
    ]
    total = base
    for options, blocks, times in more:
        if times > 0:
            other = _sizes(options, observation, batch, blocks, backward=False)
            total = total.plus(base.until(other), times)
    return total


def _by_blocks(config: TrainConfig[Any], few: int) -> tuple[TrainConfig[Any], TrainConfig[Any]]:
    """The options with all blocks recomputed, if any are; and with only the first few."""
    every = replace(config, adaptation=replace(config.adaptation, checkpointed_blocks=None))
    if not config.adaptation.gradient_checkpointing:
        return every, every
    return every, replace(config, adaptation=replace(config.adaptation, checkpointed_blocks=few))


def _sizes(
    config: TrainConfig[Any],
    observation: Observation,
    batch: Batch,
    blocks: tuple[int, int],
    *,
    backward: bool = True,
) -> Sizes:
    """Counts the bytes of a model of few blocks."""
    algorithm = find_algorithm(config.algo).make(config.algorithm)
    folder = prepared_folder(config.model, config.pixels)
    options = config.adaptation
    model = read_config(folder)
    is_wide = (model.dtype or model.get_text_config().dtype) != torch.bfloat16
    narrow = config.batches.precision == "bf16" and options.weights != "fp32"
    if options.weights == "auto" and is_wide:
        options = replace(options, weights="fp32")  # bfloat16 would round what the model's files hold
    loaded: list[float] = []

    def prepare(agent: VLMAgent) -> None:
        adapter = find_adapter(config.model)
        if options.quantize is not None:  # first, or adapters would be quantised too
            quantize(agent.family, options.quantize, torch.device("cpu"), vision=options.lora_vision)
        if adapter is not None:
            agent.adapter, agent.lora = adapter, LoRA.from_folder(agent.family.model, adapter)
        loaded.append(_bytes(agent.policy.parameters()))
        adapt(agent, options, config.batches.precision)
        if algorithm.wants_values:
            agent.add_value_head()

    dtype = loading_dtype(options, config.batches.precision, adapted=is_adapted(config))
    agent = weightless_agent(folder, prepare, dtype, blocks=blocks[0], vision_blocks=blocks[1])
    prompts = [agent.family.encode(observation) for _ in range(batch.micro_prompts)]
    held = {"loaded": loaded[0], "teacher": _teacher(config), "reference": 0.0, "own_tower": 0.0}
    if algorithm.wants_reference and agent.lora is None:
        wide = {id(agent.family.model.get_input_embeddings().weight)} if is_wide else set()
        held["reference"] = _reference(agent, wide, narrow=narrow)
        held["own_tower"] = _reference(agent, wide, narrow=narrow, shares=False) - held["reference"]
    return _counted(agent, prompts, batch, config, held, backward=backward)


def _teacher(config: TrainConfig[Any]) -> float:
    """Bytes of a teacher in memory."""
    name = getattr(config.algorithm, "teacher", None)
    if name is None or is_server(name):
        return 0.0
    taught = VLMAgent.weightless(checkpoint_name(name)).family_policy
    return float(sum(one.numel() for one in taught.parameters()) * DTYPES[config.batches.precision].itemsize)


def _counted(
    agent: VLMAgent,
    prompts: Sequence[Prompt],
    batch: Batch,
    config: TrainConfig[Any],
    held: Mapping[str, float],
    *,
    backward: bool,
) -> Sizes:
    """Counts a micro-batch's passes; the rest follows from the parameters. `held` has sizes that are known."""
    trained, policy, precision = agent.parameters(), agent.family_policy, config.batches.precision
    in_blocks = {one for block in agent.blocks() for one in block.parameters()}
    outside = [one for one in policy.parameters() if one not in in_blocks]
    return Sizes(
        **held,
        **_passes(agent, prompts, batch, precision, backward=backward),
        weights=_bytes(policy.parameters()),
        gradients=_bytes(trained),
        optimizer=sum(one.numel() * state_bytes(config.trainer.optimizer, one.dtype) for one in trained),
        published=_published(agent) * DTYPES[precision].itemsize,
        casts=_casts(agent, in_blocks, precision),
        block=max(_bytes(block.parameters()) for block in agent.blocks()),
        sent=float(sum(one.numel() * _sent(one, precision) for one in in_blocks)),
        outside=_bytes(outside),
        outside_gradients=_bytes(one for one in outside if one.requires_grad),
    )


def _passes(
    agent: VLMAgent, prompts: Sequence[Prompt], batch: Batch, precision: str, *, backward: bool
) -> dict[str, float]:
    """Runs a micro-batch forward and backward, and a prompt without gradient. Gives sizes by their names."""
    trained, policy, rollout = agent.parameters(), agent.family_policy, _rollout(prompts, batch)
    autocast = torch.autocast("cpu", DTYPES[precision], enabled=precision != "fp32")
    with counting() as counter:
        for tensor in (*policy.parameters(), *policy.buffers()):
            counter.add(tensor)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        held = counter.restart()
        with autocast:
            logprobs = agent.logprobs(rollout).values
        kept, forward = counter.live(), counter.peak
        counter.restart()
        if backward:
            logprobs.sum().backward()  # type: ignore[no-untyped-call]
        del logprobs
        spaces = {"forward_space": forward - kept, "backward_space": counter.peak - kept}
        for parameter in trained:
            parameter.grad = None
        before = counter.restart()
        with torch.no_grad(), autocast:
            prefixes, _ = policy.prefill(prompts[:1])
        past = [tensor for one in prefixes.past.values() for tensor in one.tensors]
        prefill = counter.peak - before - _bytes(past)
    if agent.family.sees_by_trained_weights():  # images are real, and so were not counted
        kept += int(_bytes(one for prompt in prompts for one in prompt.images.values()))
        prefill += _bytes(prompts[0].images.values())
    return spaces | {"activations": kept - held, "prefill": prefill}


def _rollout(prompts: Sequence[Prompt], batch: Batch) -> Rollout:
    """A micro-batch whose completions have the full length."""
    tokens = np.zeros(batch.answer, np.int64)  # no image's
    completions = [Completion("", tokens, np.zeros(batch.answer, np.float32), "length") for _ in range(batch.micro)]
    index = np.minimum(np.arange(batch.micro) * len(prompts) // batch.micro, len(prompts) - 1)
    return Rollout(list(prompts), index, completions, 1.0)


def _reference(agent: VLMAgent, wide: Collection[int], *, narrow: bool, shares: bool = True) -> float:
    """Bytes of a frozen copy, which shares a frozen vision tower, or has its own.

    Args:
        agent: The agent.
        wide: Ids of weights that stay as they are where the others are narrow.
        narrow: If true, it holds in bfloat16 what autocast casts to it.
        shares: If true, it shares a frozen tower.
    """
    family = agent.family
    parts = [] if not shares or family.sees_by_trained_weights() else [family.vision_tower(), *family.projectors()]
    shared = {parameter for part in parts for parameter in part.parameters()}
    copies: Mapping[int, nn.Module | nn.Parameter] = {}
    if narrow:
        with Counter(), torch.no_grad():
            copies = narrow_copies(family.model)
    own = [parameter for parameter in family.model.parameters() if parameter not in shared]
    return _bytes(cast(Tensor, copies.get(id(one), one) if id(one) not in wide else one) for one in own)


def _published(agent: VLMAgent) -> int:
    """Number of weights that an engine has: adapters are merged, and quantised layers are dense."""
    layers = quantized_layers(agent.family.model)
    packed = {one for layer in layers.values() for one in (layer.weight, layer.scales)}
    plain = [one for name, one in agent.family.model.named_parameters() if one not in packed and not is_adapter(name)]
    dense = sum(layer.in_features * layer.out_features for layer in layers.values())
    return dense + sum(one.numel() for one in plain)


def _sent(weight: nn.Parameter, precision: str) -> int:
    """Bytes of each number of a block's weight when FSDP2 gathers it."""
    return min(weight.itemsize, 2) if precision == "bf16" and weight.is_floating_point() else weight.itemsize


def _casts(agent: VLMAgent, in_blocks: set[nn.Parameter], precision: str) -> float:
    """Bytes of the casts that autocast makes of the blocks' trained weights."""
    if precision == "fp32":
        return 0.0
    linear = (module.weight for module in agent.policy.modules() if isinstance(module, nn.Linear))
    return float(sum(2 * one.numel() for one in linear if one.requires_grad and one in in_blocks and one.itemsize == 4))


def _bytes(tensors: Iterable[Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


@dataclass(frozen=True)
class Place:
    """Where a rank's training runs.

    Attributes:
        memory: Bytes of its card, or of the machine's memory that it may take.
        layout: How ranks share the model.
        ranks: Number of ranks.
        is_card: True for a GPU.
    """

    memory: float
    layout: Layout = "ddp"
    ranks: int = 1
    is_card: bool = True

    @classmethod
    def here(cls, device: torch.device, layout: Layout = "ddp", ranks: int = 1) -> Place:
        """A rank's share of this machine."""
        is_card = device.type == "cuda"
        return cls(device_memory(device) / (1 if is_card else ranks), layout, ranks, is_card)

    @property
    def usable(self) -> float:
        """Bytes that tensors can take."""
        return self.memory * (1 - _SCATTERED) - _CONTEXT if self.is_card else self.memory


def moments(
    sizes: Sizes,
    batch: Batch,
    config: TrainConfig[Any],
    place: Place,
    token: float,
    vocabulary: int,
    states: int = 0,
) -> dict[str, dict[str, float]]:
    """Bytes of the main rank by use at each moment of training, in the order in which they come.

    They are those of `vlmenv train`: "load" (the model is loaded, then an engine starts beside it and goes to sleep),
    "preparation" (`_preparing`), and of each step the "hand-over" of weights to an engine, "sampling" and "update".

    Args:
        sizes: Of the model.
        batch: Of the rank.
        config: The options.
        place: Card, ranks and strategy.
        token: Bytes of a token's keys and values.
        vocabulary: Number of entries of the head.
        states: Number of tokens that take as much as the states of a prompt or completion. Default: none.
    """
    place = replace(place, ranks=config.trainer.shard_within or place.ranks)
    generation, held = config.generation, _shares(sizes, place)
    gathered = _gathered(sizes, place)
    awake, engine = 0.0, 0.0
    if generation.engine == "vllm" and place.is_card:
        awake, engine = sizes.published / generation.tensor_parallel, generation.engine_memory * place.memory
    told = {"load": {"weights": sizes.loaded, "engine": engine}, "preparation": _preparing(sizes, place)}
    if generation.engine == "hf":
        rolling = _sampling(sizes, batch, config, place, token, vocabulary, states) | gathered
    else:
        told["hand-over"] = held | {"engine": awake} | gathered
        rolling = {"engine": engine}
    return told | {"sampling": held | rolling, "update": held | _updating(sizes, place)}


def _preparing(sizes: Sizes, place: Place) -> dict[str, float]:
    """What a rank holds at most while reference, shards and optimizer are made; an engine sleeps."""
    whole = {"weights": sizes.weights, "teacher": sizes.teacher}
    if place.layout == "fsdp2":  # the reference is made of shards once the whole weights are gone
        return whole | {"shards": sizes.weights / place.ranks}
    if place.layout == "zero3":  # which divides the weights one by one
        return whole | {"reference": sizes.reference + sizes.own_tower}
    held = _shares(sizes, place)
    if place.layout == "ddp":
        del held["optimizer"]  # its state is made in the first step
    return held


def _gathered(sizes: Sizes, place: Place) -> dict[str, float]:
    """The weights of all shards, where a rank holds shards."""
    if place.layout not in ("fsdp2", "zero3"):
        return {}
    blocks = sizes.sent if place.layout == "fsdp2" else sizes.weights - sizes.outside
    return {"gathered weights": sizes.outside + blocks}


def _shares(sizes: Sizes, place: Place) -> dict[str, float]:
    """What a rank holds between steps. A teacher is whole on each."""
    ranks, layout = place.ranks, place.layout
    reference = sizes.reference + (sizes.own_tower if layout in ("fsdp2", "zero3") else 0.0)
    by = {"weights": sizes.weights, "optimizer": sizes.optimizer, "reference": reference}
    if layout == "fsdp2":
        by = {name: size / ranks for name, size in by.items()}
    elif layout == "ddp":
        by["gradients"] = sizes.gradients if ranks > 1 else 0.0  # in DDP's buckets, which stay
    else:
        by["optimizer"] = (sizes.optimizer + sizes.gradients) / ranks  # with a float32 copy of the shard
        by["weights"] /= ranks if layout == "zero3" else 1
    return by | {"teacher": sizes.teacher}


def _updating(sizes: Sizes, place: Place) -> dict[str, float]:
    """What a rank needs in the passes of an update beyond `_shares`."""
    whole = max(sizes.forward_space, sizes.backward_space)
    if place.layout in ("ddp", "zero1", "zero2"):
        gradients = sizes.gradients / (place.ranks if place.layout == "zero2" else 1)
        buckets = 0.0 if place.layout == "ddp" else 2 * min(_BUCKET, sizes.gradients)
        return {"gradients": gradients + buckets, "activations": sizes.activations, "work space": whole}
    gathered = sizes.outside + sizes.outside_gradients + 4 * sizes.block
    kept = max(0.0, sizes.activations - (sizes.casts if sizes.activations > sizes.casts else 0.0))
    return {
        "gradients": sizes.gradients / place.ranks,
        "gathered weights": gathered,
        "activations": kept,
        "work space": max(sizes.forward_space - sizes.casts, sizes.backward_space),
    }


def _sampling(
    sizes: Sizes,
    batch: Batch,
    config: TrainConfig[Any],
    place: Place,
    token: float,
    vocabulary: int,
    states: int,
) -> dict[str, float]:
    """What a rank needs beyond `_shares` where the model itself samples."""
    limits = limits_of(config)
    bounded = limits.cache is not None or place.is_card
    if place.is_card and limits.cache is None:
        limits = replace(limits, cache=0)
    rows = min(batch.completions, limits.logits or batch.completions)
    held = batch.with_states(states, is_card=place.is_card)
    one = held.longest + held.answer
    cached = max(one, min(held.cached, limits.cache or held.longest + 8 * held.answer)) if bounded else held.cached
    longest = limits.passes([batch.longest] * batch.prompts)
    prompts = max(own.stop - own.start for own in longest)
    return {
        "keys and values": cached * token,
        "prefill or logits": max(sizes.prefill * prompts, float(_PER_LOGIT * rows * vocabulary)),
    }


@dataclass(frozen=True)
class Prediction:
    """The memory of a rank.

    Attributes:
        moments: Bytes by use at each moment.
        place: Card, ranks and strategy.
    """

    moments: Mapping[str, Mapping[str, float]]
    place: Place

    @property
    def moment(self) -> str:
        """The moment that takes the most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> float:
        """Bytes of tensors at that moment."""
        return sum(self.moments[self.moment].values())

    @property
    def fits(self) -> bool:
        """True if they have room."""
        return self.peak <= self.place.usable


def predict(config: TrainConfig[Any], observation: Observation, place: Place) -> Prediction:
    """Predicts the memory of training, for a sample whose prompt counts as the longest.

    Raises:
        ConfigError: As `measure`.
        ModelError: As `measure`.
    """
    sizes, batch = measure(config, observation, place.ranks)
    model = read_config(prepared_folder(config.model, config.pixels))
    dtype = DTYPES[config.batches.precision]
    vocabulary, token = int(model.get_text_config().vocab_size), token_bytes(model, dtype)
    told = moments(sizes, batch, config, place, token, vocabulary, state_tokens(model, dtype))
    return Prediction(told, place)


def what_helps(config: TrainConfig[Any], observation: Observation, place: Place) -> Iterator[tuple[str, Prediction]]:
    """Predicts with one of `remedies` after the other, each beside those before it, up to the first that fits."""
    for name, changed in remedies(config):
        found = predict(changed, observation, place)
        yield name, found
        if found.fits:
            return


def remedies(config: TrainConfig[Any]) -> list[tuple[str, TrainConfig[Any]]]:
    """Options that lower memory, each with what it makes of the options; those that cost the least come first."""
    options, trainer = config.adaptation, config.trainer
    found: list[tuple[str, TrainConfig[Any]]] = []
    if config.batches.precision == "fp32":
        config = replace(config, batches=replace(config.batches, precision="bf16"))
        found.append(("--precision bf16", config))
    if trainer.micro_batch_size != config.algorithm.group_size:
        size = config.algorithm.group_size
        config = replace(config, trainer=replace(trainer, micro_batch_size=size, micro_batch_tokens=None))
        found.append((f"--micro-batch-size {size}", config))
    if not options.gradient_checkpointing:
        options = replace(options, gradient_checkpointing=True)
        config = replace(config, adaptation=options)
        found.append(("--gradient-checkpointing", config))
    if trainer.optimizer == "adamw":
        config = replace(config, trainer=replace(config.trainer, optimizer="adamw_8bit"))
        found.append(("--optimizer adamw_8bit", config))
    if options.lora_rank is None:
        options = replace(options, lora_rank=64, freeze_vision=False, freeze_projector=False)
        config = replace(config, adaptation=options)
        found.append(("--lora-rank 64", config))
    if options.quantize is None:
        config = replace(config, adaptation=replace(options, quantize="nf4"))
        found.append(("--quantize nf4", config))
    return found
