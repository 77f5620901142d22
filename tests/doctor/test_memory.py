"""Estimates against what the same step takes when it is done."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import gymnasium
import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from vlmenv.agents.sampling import PassLimits, prefilled
from vlmenv.agents.saved_activations import keeping_activations, recording_saved
from vlmenv.agents.vlm import Sampling, VLMAgent, find_model
from vlmenv.core.rollout import Rollout
from vlmenv.doctor import DoctorConfig
from vlmenv.doctor.memory import _sampling, training_memory
from vlmenv.options.fields import replaced

PARAMETERS = sum(tensor.numel() for tensor in load_file(find_model("builtin") / "model.safetensors").values())


def agent_and_rollout(prompts: int, group: int, new_tokens: int) -> tuple[VLMAgent, Rollout]:
    """Answers that are all as long as they may be, as estimates take them to be."""
    agent = VLMAgent.from_pretrained("builtin", sampling=Sampling(max_new_tokens=new_tokens))
    agent.seed(0)
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=prompts * group, group_size=group)
    return agent, agent.rollout(envs.reset(seed=0)[0])


def estimate(agent: VLMAgent, rollout: Rollout, **options: Any) -> dict[str, float]:
    return training_memory(agent, rollout, replaced(DoctorConfig(), options), nullcontext())


def kept(agent: VLMAgent, rollout: Rollout) -> int:
    """Bytes of all different tensors that a pass keeps, without the parameters."""
    own = {parameter.data_ptr() for parameter in agent.policy.parameters()}
    saved: dict[int, torch.Tensor] = {}
    with recording_saved(lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t)):
        agent.logprobs(rollout)
    return sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in own)


@pytest.mark.slow
def test_what_follows_from_the_parameters() -> None:
    agent, rollout = agent_and_rollout(4, 2, 6)
    found = estimate(agent, rollout, beta=0.1)
    expected = {"weights": 4 * PARAMETERS, "Adam": 8 * PARAMETERS, "reference": 4 * PARAMETERS}
    assert {name: found[name] for name in expected} == expected
    assert found["gradients"] == 4 * PARAMETERS
    agent.freeze(vision=True, projector=True)
    vision = sum(parameter.numel() for parameter in agent.family.vision_tower().parameters())
    found = estimate(agent, rollout, beta=0.1)
    assert found["Adam"] == 8 * (PARAMETERS - vision)
    assert found["reference"] == 4 * (PARAMETERS - vision)  # which shares the frozen tower


@pytest.mark.slow
def test_an_engine_sleeps_while_the_model_learns() -> None:
    """Of what it takes and what learning takes, the larger counts."""
    pytest.importorskip("peft")
    agent, rollout = agent_and_rollout(4, 2, 6)
    learning = estimate(agent, rollout)
    peak = learning["gradients"] + learning["activations"] + learning["work space"]
    assert training_memory(agent, rollout, DoctorConfig(), nullcontext(), peak - 1) == learning
    held = {"weights": learning["weights"], "Adam": learning["Adam"]}
    awake = training_memory(agent, rollout, DoctorConfig(), nullcontext(), peak + 1)
    assert awake == held | {"engine": peak + 1}
    agent.add_lora(rank=4, alpha=8)
    weights = sum(parameter.numel() for parameter in agent.policy.parameters()) * 4
    awake = training_memory(agent, rollout, DoctorConfig(), nullcontext(), 100 * peak)
    assert (awake["engine"], awake["merged weights"]) == (100 * peak, weights)


@pytest.mark.slow
def test_adapters_need_no_reference_and_little_else() -> None:
    pytest.importorskip("peft")
    agent, rollout = agent_and_rollout(4, 2, 6)
    agent.add_lora(rank=4, alpha=8)
    trained = sum(parameter.numel() for parameter in agent.parameters())
    found = estimate(agent, rollout, beta=0.1)
    assert "reference" not in found
    assert found["Adam"] == 8 * trained < 4 * PARAMETERS


@pytest.mark.slow
@pytest.mark.parametrize("how", ["shared prefixes", "repeated prompts", "recomputed"])
def test_activations_of_a_larger_batch_are_foreseen(how: str) -> None:
    """Of 12 prompts with 6 answers of 40 tokens each, from 8 with 2 of up to 24."""
    small_agent, small = agent_and_rollout(8, 2, 24)
    agent, large = agent_and_rollout(12, 6, 40)
    for completion in large.completions:  # those that ended are filled up
        completion.token_ids = torch.tensor(completion.token_ids).repeat(40)[:40].numpy()
    for one in (small_agent, agent):
        one.family_policy.share_prefixes = how != "repeated prompts"
        if how == "recomputed":
            one.enable_gradient_checkpointing()
    found = estimate(small_agent, small, prompts_per_step=12, group_size=6, max_new_tokens=40)
    assert found["activations"] == pytest.approx(kept(agent, large), rel=0.1)
    if how == "recomputed":
        holding, _ = agent_and_rollout(8, 2, 24)
        with keeping_activations():  # as a block that is computed anew does
            held = estimate(holding, small, prompts_per_step=12, group_size=6, max_new_tokens=40)
        assert found["work space"] == pytest.approx(2 * held["work space"], rel=0.01)
        assert found["activations"] < held["activations"] / 5
    else:
        assert found["work space"] == found["activations"] / 3  # the model has three blocks


@pytest.mark.slow
def test_micro_batches_need_less() -> None:
    agent, rollout = agent_and_rollout(8, 2, 24)
    options: dict[str, Any] = {"prompts_per_step": 8, "group_size": 8, "max_new_tokens": 40}
    whole, half, single, tokens = (
        estimate(agent, rollout, **options, **more)["activations"]
        for more in ({}, {"micro_batch_size": 32}, {"micro_batch_size": 1}, {"micro_batch_tokens": 1500})
    )
    assert half == pytest.approx(whole / 2, rel=0.01)
    assert single < whole / 20
    prompts = sum(len(prompt.input_ids) for prompt in rollout.prompts)
    assert tokens == pytest.approx(whole * 1500 / (prompts + 64 * 40), rel=0.01)


@pytest.mark.slow
def test_keys_and_values_are_those_of_the_configuration() -> None:
    """Where sampling takes more than learning does: with many answers, each of which goes through the model alone."""
    agent, rollout = agent_and_rollout(8, 2, 24)
    found = estimate(agent, rollout, prompts_per_step=100, group_size=100, max_new_tokens=50, micro_batch_size=1)
    assert "gradients" not in found
    text = agent.family.model.config.get_text_config()
    each = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    length = sum(len(prompt.input_ids) for prompt in rollout.prompts) / len(rollout.prompts)
    assert found["keys and values"] == pytest.approx(each * (100 * length + 100 * 100 * 50))
    assert found["logits"] == 28 * 100 * 100 * agent.family.model.get_output_embeddings().weight.shape[0]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, 32])
def test_prefill_is_foreseen(rows: int | None) -> None:
    """Against the allocator's own count of 256 prompts. The estimate is rough, but never too low by a fifth."""
    agent, rollout = agent_and_rollout(8, 2, 24)
    agent.limits = PassLimits(rows)
    config = replaced(DoctorConfig(), {"prompts_per_step": 256, "group_size": 2, "max_new_tokens": 1})
    estimated = sum(_sampling(agent, rollout, config)[0].values())
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=256, group_size=1)
    prompts, _ = agent.encode(envs.reset(seed=0)[0])
    taken = peak(lambda: prefilled(agent.family_policy, prompts, agent.limits))
    assert 0.8 * taken < estimated < 2 * taken


def peak(work: Callable[[], object]) -> int:
    """Bytes that work holds at most, as PyTorch counts them."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        held = work()
    del held
    sizes = [event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes))


@pytest.mark.slow
def test_the_prefill_of_many_prompts_may_be_the_peak() -> None:
    agent, rollout = agent_and_rollout(8, 2, 24)
    options: dict[str, Any] = {"prompts_per_step": 4000, "group_size": 2, "max_new_tokens": 1, "micro_batch_size": 2}
    whole = estimate(agent, rollout, **options)
    agent.limits = PassLimits(2)
    assert estimate(agent, rollout, **options)["prefill"] < whole["prefill"] / 10
