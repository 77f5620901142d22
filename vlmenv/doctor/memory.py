"""Estimates the memory of a training step from a few completions.

Weights, gradients and Adam's moments follow from the parameters. Activations, and keys and values of sampling, are
measured on a small rollout and scaled to the batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmenv.agents.recomputation import holding_activations
from vlmenv.agents.sampling import PassLimits, prefilled
from vlmenv.agents.saved_activations import recording_saved
from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.rollout import Prompt, Rollout
from vlmenv.options.doctor import DoctorConfig

_LIMIT = Path("/sys/fs/cgroup/memory.max")


def training_memory(
    agent: VLMAgent,
    rollout: Rollout,
    config: DoctorConfig[Any],
    autocast: AbstractContextManager[None],
    engine_memory: float = 0.0,
) -> dict[str, float]:
    """Estimates the bytes by use at a step's peak. Scaled parts are rough.

    Args:
        agent: The agent, with adapters and frozen parts as in training.
        rollout: Completions of the agent on training data, several per prompt.
        config: Options of the step.
        autocast: The precision of forward passes, as a context.
        engine_memory: Bytes of an engine while it is awake. It sleeps during the update.
    """
    trained = _bytes(agent.parameters())
    held = {"weights": _bytes(agent.policy.parameters()), "Adam": 2 * trained}
    if getattr(config.algorithm, "beta", 0) > 0 and agent.lora is None:
        held["reference"] = _reference(agent)
    with autocast:
        moments = [{"gradients": trained} | _activations(agent, rollout, config)]
        if agent.engine is None:
            moments += _sampling(agent, rollout, config)
    if engine_memory:
        sampling = {"engine": engine_memory}
        if agent.lora is not None:  # without adapters the engine gets the weights without a copy
            sampling["merged weights"] = held["weights"]
        moments.append(sampling)
    return held | max(moments, key=lambda parts: sum(parts.values()))


def device_memory(device: torch.device) -> int:
    """Bytes of a device's memory; for a CPU, the limit of this process."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _LIMIT.read_text().strip() if _LIMIT.is_file() else "max"
    return min(installed, int(limit)) if limit.isdigit() else installed


def _bytes(tensors: Iterable[Tensor]) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _reference(agent: VLMAgent) -> float:
    """Bytes of a reference model, which shares a frozen vision tower."""
    family = agent.family
    parts = [] if family.sees_by_trained_weights() else [family.vision_tower(), *family.projectors()]
    shared = {parameter for part in parts for parameter in part.parameters()}
    return _bytes([parameter for parameter in family.model.parameters() if parameter not in shared])


def _activations(agent: VLMAgent, rollout: Rollout, config: DoctorConfig[Any]) -> dict[str, float]:
    """Bytes of saved activations, and of the work space of a block's backward pass.

    The work space holds the gradients of the block's activations, which are as large as these. With gradient
    checkpointing it also holds the recomputed activations.
    """
    kept = _scaled(agent, rollout, config)
    with holding_activations(agent.family):
        every = _scaled(agent, rollout, config)
    return {"activations": kept, "work space": every / _blocks(agent) * (2 if kept < every else 1)}


def _blocks(agent: VLMAgent) -> int:
    return len(list(agent.family.language_model().get_submodule("layers").children()))


def _scaled(agent: VLMAgent, rollout: Rollout, config: DoctorConfig[Any]) -> float:
    """Bytes of saved activations of the largest micro-batch."""
    return float(_per_token(agent, rollout) @ [1.0, *_pass_tokens(rollout, config, agent.family_policy.share_prefixes)])


def _per_token(agent: VLMAgent, rollout: Rollout) -> NDArray[np.float64]:
    """Bytes of saved activations: a constant, and a number per token of each kind in `_tokens`."""
    shares = agent.family_policy.share_prefixes
    firsts = np.unique(rollout.prompt_index, return_index=True)[1]
    parts = [rollout[firsts[: (len(firsts) + 1) // 2]], rollout[firsts], rollout]
    counted = np.array([[1.0, *_tokens(part, shares)] for part in parts])
    kept = np.array([float(_kept(agent, part)) for part in parts])
    found: NDArray[np.float64] = np.maximum(np.linalg.lstsq(counted, kept, rcond=None)[0], 0)
    return found


def _tokens(rollout: Rollout, shares: bool) -> list[float]:
    """Tokens of prompts and of completions; if completions repeat their prompts, tokens of padded rows."""
    prompts = [len(prompt.input_ids) for prompt in rollout.prompts]
    completions = [len(completion.token_ids) for completion in rollout.completions]
    if shares:
        return [float(sum(prompts)), float(sum(completions))]
    rows = [prompts[i] + length for i, length in zip(rollout.prompt_index, completions, strict=True)]
    return [float(len(rows) * max(rows))]


def _pass_tokens(rollout: Rollout, config: DoctorConfig[Any], shares: bool) -> list[float]:
    """`_tokens` of the largest micro-batch of a step."""
    total = config.batches.prompts_per_step * config.algorithm.group_size
    completions = min(total, config.trainer.micro_batch_size or total)
    if shares:
        prompts = -(-completions // config.algorithm.group_size)
        tokens = [prompts * _mean_length(rollout.prompts), float(completions * config.sampling.max_new_tokens)]
    else:
        longest = max(len(prompt.input_ids) for prompt in rollout.prompts)
        tokens = [float(completions * (longest + config.sampling.max_new_tokens))]
    share = min(1.0, (config.trainer.micro_batch_tokens or np.inf) / sum(tokens))
    return [share * count for count in tokens]


def _mean_length(prompts: Sequence[Prompt]) -> float:
    return float(np.mean([len(prompt.input_ids) for prompt in prompts]))


def _kept(agent: VLMAgent, rollout: Rollout) -> int:
    """Bytes that a forward pass saves for its backward pass, without parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in agent.policy.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()

    with torch.enable_grad(), recording_saved(note):
        result = agent.logprobs(rollout)
    del result  # until here it kept the saved tensors alive
    return sum(size for place, size in sizes.items() if place not in own)


_PER_LOGIT = 28
"""Bytes per entry of the vocabulary while a token is drawn: logits, their logarithms and probabilities in float32, and
float64 copies and sums of the probabilities."""


def _sampling(agent: VLMAgent, rollout: Rollout, config: DoctorConfig[Any]) -> list[dict[str, float]]:
    """Bytes by use during sampling without an engine: while prompts run, and while tokens are drawn."""
    prompts, completions = _keys_and_values(agent, rollout, config)
    total = config.batches.prompts_per_step * config.algorithm.group_size
    rows = min(total, agent.limits.logits or total)
    head = agent.family.model.get_output_embeddings()
    assert head is not None
    drawing = float(_PER_LOGIT * rows * head.weight.shape[0])
    joined = 0.0 if agent.limits == PassLimits() else prompts / (2 * _blocks(agent))  # a block's keys are held twice
    return [
        {"keys and values": prompts, "prefill": max(joined, _prefill(agent, rollout, config))},
        {"keys and values": prompts + completions, "logits": drawing},
    ]


def _prefill(agent: VLMAgent, rollout: Rollout, config: DoctorConfig[Any]) -> float:
    """Bytes of the activations of a block, for the prompts of the largest pass of sampling."""
    limits, longest = agent.limits, max(len(prompt.input_ids) for prompt in rollout.prompts)
    prompts = min(config.batches.prompts_per_step, limits.rows or config.batches.prompts_per_step)
    tokens = prompts * _mean_length(rollout.prompts)
    if limits.tokens is not None:
        tokens = min(tokens, max(limits.tokens, longest))
    with holding_activations(agent.family):
        each = _per_token(agent, rollout)[1]  # of prompts, or of rows that repeat them
    return float(each * tokens / _blocks(agent))


@torch.no_grad()
def _keys_and_values(agent: VLMAgent, rollout: Rollout, config: DoctorConfig[Any]) -> tuple[float, float]:
    """Bytes of the keys, values and states of a batch's prompts, and of its completions."""
    prefixes, _ = prefilled(agent.family_policy, rollout.prompts, agent.limits)
    rows = len(rollout.prompts)
    found, states = (
        _bytes(one for past in prefixes.past.values() if past.grows == grows for one in past.tensors) / rows
        for grows in (True, False)
    )
    token = found / max(len(prompt.input_ids) for prompt in rollout.prompts)
    prompts, group = config.batches.prompts_per_step, config.algorithm.group_size
    answer = token * config.sampling.max_new_tokens + states
    return prompts * (token * _mean_length(rollout.prompts) + states), prompts * group * answer
