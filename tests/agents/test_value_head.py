from __future__ import annotations

from pathlib import Path

import pytest
import torch
from batches import rollout_of, train

from vlmenv.agents.vlm import Sampling, VLMAgent, find_model
from vlmenv.core.errors import ConfigError


@pytest.fixture(params=["builtin", "qwen2_5_vl"])
def agent(request: pytest.FixtureRequest, qwen2_5_vl_folder: Path) -> VLMAgent:
    folder = qwen2_5_vl_folder if request.param == "qwen2_5_vl" else find_model("builtin")
    return VLMAgent.from_pretrained(folder, sampling=Sampling(0.8))


def test_values_start_at_zero_and_change_nothing_else(agent: VLMAgent) -> None:
    rollout = rollout_of(agent)
    before = agent.logprobs(rollout)
    assert before.state_values is None
    agent.add_value_head()
    after = agent.logprobs(rollout)
    assert torch.equal(after.values, before.values)
    assert torch.equal(after.state_values, torch.zeros_like(after.values))


@pytest.mark.slow
def test_values_equal_a_direct_computation(agent: VLMAgent) -> None:
    """A value before each token, from the hidden state that the token is chosen by: not the one after it."""
    rollout = rollout_of(agent)
    agent.add_value_head()
    train(agent, rollout)
    result, head = agent.logprobs(rollout), agent.family_policy.value_head
    assert result.state_values.dtype == torch.float32
    for row, completion in enumerate(rollout.completions):
        prompt, length = rollout.prompts[rollout.prompt_index[row]], len(completion.token_ids)
        ids = torch.from_numpy(prompt.input_ids)[None]
        for token in range(length):
            inputs = torch.cat([ids, torch.from_numpy(completion.token_ids[:token])[None]], dim=1)
            types = (inputs == agent.family.model.config.image_token_id).int()
            with torch.no_grad():
                hidden = agent.family.model.model(
                    input_ids=inputs, attention_mask=torch.ones_like(inputs), mm_token_type_ids=types, **prompt.images
                ).last_hidden_state[0, -1]
            expected = (hidden * head.weight[0]).sum() + head.bias[0]
            torch.testing.assert_close(result.state_values[row, token], expected, atol=1e-5, rtol=1e-5)
        assert not result.state_values[row, length:].any()
    assert result.state_values.abs().max() > 1e-3


@pytest.mark.parametrize("detach", [False, True])
def test_the_values_loss_trains_the_model_unless_detached(builtin: VLMAgent, detach: bool) -> None:
    rollout = rollout_of(builtin)
    builtin.add_value_head(detach=detach)
    head = builtin.family_policy.value_head
    torch.nn.init.normal_(head.weight)
    builtin.logprobs(rollout).state_values.sum().backward()
    assert head.weight.grad.abs().sum() > 0
    gradients = [p.grad for p in builtin.family.model.model.parameters() if p.grad is not None]
    assert bool(gradients) != detach


def test_values_are_float32_in_any_precision() -> None:
    agent = VLMAgent.from_pretrained("builtin", dtype=torch.bfloat16)
    rollout = rollout_of(agent)
    agent.add_value_head()
    head = agent.family_policy.value_head
    torch.nn.init.normal_(head.weight)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        values = agent.logprobs(rollout).state_values
        hidden, packing = agent.family_policy.hidden_states(rollout)
    assert values.dtype == head.weight.dtype == torch.float32
    torch.testing.assert_close(packing.unpad(values), (hidden.float() @ head.weight[0] + head.bias).detach())


def test_the_reference_has_no_values(builtin: VLMAgent) -> None:
    rollout = rollout_of(builtin)
    builtin.add_value_head()
    assert builtin.reference().logprobs(rollout).state_values is None
    assert builtin.logprobs(rollout).state_values is not None


def test_a_second_head_is_refused(builtin: VLMAgent) -> None:
    builtin.add_value_head()
    with pytest.raises(ConfigError, match="has a value head already"):
        builtin.add_value_head()
