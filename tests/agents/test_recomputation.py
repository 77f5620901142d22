from __future__ import annotations

from pathlib import Path

import pytest
import torch
from batches import logprobs_of, loss_of, rollout_of, train
from saved import recording_saved

from vlmenv.agents.vlm import Sampling, VLMAgent, find_model
from vlmenv.core.rollout import Rollout


@pytest.fixture(params=["builtin", "qwen2_5_vl"])
def folder(request: pytest.FixtureRequest, qwen2_5_vl_folder: Path) -> Path:
    return qwen2_5_vl_folder if request.param == "qwen2_5_vl" else find_model("builtin")


def gradients(agent: VLMAgent, rollout: Rollout) -> tuple[dict[str, torch.Tensor | None], int]:
    """Gradients by name, and the bytes that the forward pass kept for them beside the weights."""
    storages: dict[int, torch.UntypedStorage] = {}
    weights = {p.untyped_storage().data_ptr() for p in agent.policy.parameters()}

    def note(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage

    agent.policy.zero_grad()
    with recording_saved(note):
        loss = loss_of(agent, rollout)
    loss.backward()
    result = {name: p.grad for name, p in agent.policy.named_parameters()}
    return result, sum(storage.nbytes() for storage in storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full", "frozen", "lora"])
def test_gradients_are_the_same_from_less_memory(folder: Path, case: str) -> None:
    agent = VLMAgent.from_pretrained(folder, sampling=Sampling(0.8))
    agent.add_value_head()
    rollout = rollout_of(agent)
    if case == "frozen":
        agent.freeze(vision=True, projector=True)
    if case == "lora":
        pytest.importorskip("peft")
        agent.add_lora(rank=4, alpha=8, vision=True)
        train(agent, rollout)
    values = logprobs_of(agent, rollout)
    expected, kept = gradients(agent, rollout)
    agent.enable_gradient_checkpointing()
    actual, kept_now = gradients(agent, rollout)
    assert kept_now < 0.6 * kept
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    assert largest > 0
    for name, gradient in expected.items():
        assert (actual[name] is None) == (gradient is None), name
        if gradient is not None:
            assert (actual[name] - gradient).abs().max() <= 1e-6 * largest, name
    assert torch.equal(logprobs_of(agent, rollout), values)
    assert torch.equal(agent.logprobs(rollout).values, values)


def test_some_blocks_alone_may_be_recomputed(folder: Path) -> None:
    """The first ones of the language model, and all of the vision tower: with more of them, less is kept."""
    kept, every = [], len(VLMAgent.from_pretrained(folder).family.language_model().layers)
    for blocks in (None, every, 1, 0):
        agent = VLMAgent.from_pretrained(folder, sampling=Sampling(0.8))
        agent.enable_gradient_checkpointing(blocks)
        grads, held = gradients(agent, rollout_of(agent))
        kept.append(held)
        if blocks is None:
            expected = grads
        for name, gradient in expected.items():
            assert (grads[name] is None) == (gradient is None), name
            if gradient is not None:
                torch.testing.assert_close(grads[name], gradient, atol=1e-6, rtol=1e-5)
    assert kept[0] == kept[1] < kept[2] < kept[3]


def test_sampling_is_the_same(folder: Path) -> None:
    agent = VLMAgent.from_pretrained(folder, sampling=Sampling(0.8))
    expected = rollout_of(agent)
    agent.enable_gradient_checkpointing()
    assert rollout_of(agent).texts == expected.texts


def test_blocks_are_run_again_in_the_backward_pass(builtin: VLMAgent) -> None:
    """Prompts and completions go through a block of the language model together."""
    rollout = rollout_of(builtin)
    runs = []
    layer = builtin.family.language_model().layers[1]
    block = builtin.family.vision_tower().blocks[0]
    for module in (layer.mlp, block.mlp):
        module.register_forward_pre_hook(lambda module, _: runs.append(module))
    builtin.enable_gradient_checkpointing()
    loss = loss_of(builtin, rollout)
    assert [runs.count(layer.mlp), runs.count(block.mlp)] == [1, 1]
    loss.backward()
    assert [runs.count(layer.mlp), runs.count(block.mlp)] == [2, 2]


@pytest.mark.slow
def test_other_passes_between_forward_and_backward_do_no_harm(builtin: VLMAgent) -> None:
    """As when the reference under LoRA is asked before the backward pass: adapters and dropout are as they were."""
    pytest.importorskip("peft")
    rollout = rollout_of(builtin)
    builtin.add_lora(rank=4, alpha=8, dropout=0.5)
    train(builtin, rollout)
    reference = builtin.reference()

    def gradient(between: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        builtin.policy.zero_grad()
        loss = loss_of(builtin, rollout)
        if between:
            reference.logprobs(rollout)
            logprobs_of(builtin, rollout)
        loss.backward()
        return [p.grad.clone() for p in builtin.parameters()]

    plain = gradient(between=False)
    builtin.enable_gradient_checkpointing()
    for between in (False, True):
        for actual, expected in zip(gradient(between), plain, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_a_frozen_reference_keeps_its_own_weights(builtin: VLMAgent) -> None:
    """It was copied with its blocks' recomputation, which must not lead back to the policy."""
    rollout = rollout_of(builtin)
    builtin.enable_gradient_checkpointing()
    own, reference = logprobs_of(builtin, rollout), builtin.reference()
    before = reference.logprobs(rollout).values
    train(builtin, rollout)
    assert not torch.allclose(logprobs_of(builtin, rollout), own, atol=1e-3)
    assert torch.equal(reference.logprobs(rollout).values, before)
    torch.testing.assert_close(before, own, atol=1e-5, rtol=0)
