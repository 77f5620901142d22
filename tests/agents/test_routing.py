"""The load-balancing loss of routers, against transformers' own on one row."""

from __future__ import annotations

import importlib
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from small_models import invent

from vlmenv.agents.routing import balancing_loss
from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.algos import GRPO, GRPOConfig, Trainer, TrainerConfig
from vlmenv.core.errors import ConfigError

TYPES = {"qwen3_vl_moe": "num_experts", "qwen3_5_moe": "num_experts", "glm4v_moe": "n_routed_experts"}


def test_by_hand() -> None:
    """Two tokens and two experts: all go to the first, whose mean probability is that of e against 1."""
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(balancing_loss([logits], 1), 2 * torch.sigmoid(torch.tensor(1.0)))
    even = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(balancing_loss([even], 1), torch.tensor(1.0))
    torch.testing.assert_close(balancing_loss([even, even], 2), torch.tensor(2.0))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("recomputes", [False, True])
def test_it_is_that_of_transformers(model_type: str, recomputes: bool, tmp_path: Path) -> None:
    """In value and in the gradient of the routers."""
    invent(model_type, tmp_path)
    agent = VLMAgent.from_pretrained(tmp_path, sampling=Sampling(max_new_tokens=6))
    agent.seed(0)
    assert agent.routes
    if recomputes:
        agent.enable_gradient_checkpointing()
    rollout = agent.rollout([{"images": (), "prompt": "How many is 2 and 3?"}])
    found = agent.logprobs(rollout).router_loss
    assert found is not None
    routers, model = agent.family_policy.routers, agent.family.model
    ours = torch.autograd.grad(found, [router.weight for router in routers])
    ids = np.concatenate([rollout.prompts[0].input_ids, rollout.completions[0].token_ids[:-1]])
    logits = model(input_ids=torch.from_numpy(ids)[None], output_router_logits=True, use_cache=False).router_logits
    module, text = importlib.import_module(type(model).__module__), model.config.text_config
    right = module.load_balancing_loss_func(logits, getattr(text, TYPES[model_type]), text.num_experts_per_tok)
    torch.testing.assert_close(found, right)
    theirs = torch.autograd.grad(right, [router.weight for router in routers])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_routers_that_give_probabilities_are_heard_before(adapted: bool, tmp_path: Path) -> None:
    """Gemma 4's, of which transformers records probabilities; its load-balancing loss is by hand here."""
    invent("gemma4 experts", tmp_path)
    agent = VLMAgent.from_pretrained(tmp_path, sampling=Sampling(max_new_tokens=6))
    agent.seed(0)
    if adapted:
        pytest.importorskip("peft")
        agent.add_lora(rank=4, alpha=8)
        for name, weight in agent.policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
    rollout = agent.rollout([{"images": (), "prompt": "How many is 2 and 3?"}])
    found = agent.logprobs(rollout).router_loss
    assert found is not None
    assert found.requires_grad
    ids = np.concatenate([rollout.prompts[0].input_ids, rollout.completions[0].token_ids[:-1]])
    model = agent.family.model
    probs = model(input_ids=torch.from_numpy(ids)[None], output_router_logits=True, use_cache=False).router_logits
    assert len(probs) == len(agent.family_policy.routers) == 2
    both = torch.cat(probs)
    torch.testing.assert_close(both.sum(dim=-1), torch.ones(len(both)))
    chosen = torch.stack([(row >= row.topk(2).values[-1]).float() for row in both])
    torch.testing.assert_close(found, 4 * (chosen.mean(0) * both.mean(0)).sum())


def test_without_experts_there_is_none(builtin: VLMAgent) -> None:
    assert not builtin.routes
    rollout = builtin.rollout([{"images": (), "prompt": "How many?"}])
    assert builtin.logprobs(rollout).router_loss is None


def trainer(agent: VLMAgent, weight: float) -> Trainer:
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=2, group_size=2)
    config = TrainerConfig(steps=1, micro_batch_size=1, router_loss=weight)
    return Trainer(agent, envs, GRPO(GRPOConfig(group_size=2)), config, Accelerator(cpu=True))


@pytest.mark.slow
def test_it_is_logged_and_enters_the_loss_by_its_weight(tmp_path: Path) -> None:
    """Rewards of nonsense are equal, so that nothing else is learnt."""
    invent("qwen3_vl_moe", tmp_path)
    moved = []
    for weight in (0.0, 0.5):
        agent = VLMAgent.from_pretrained(tmp_path, sampling=Sampling(max_new_tokens=4))
        (result,) = trainer(agent, weight).train(seed=0)
        moved.append(result.metrics)
    assert moved[0]["policy/router_loss"] == pytest.approx(moved[1]["policy/router_loss"])
    assert moved[0]["policy/router_loss"] > 1
    assert moved[0]["policy/grad_norm"] == 0 < moved[1]["policy/grad_norm"]
    assert moved[1]["loss"] - moved[0]["loss"] == pytest.approx(0.5 * moved[0]["policy/router_loss"])


def test_a_weight_without_experts_is_refused(builtin: VLMAgent) -> None:
    with pytest.raises(ConfigError, match="router_loss is for mixtures of experts"):
        trainer(builtin, 0.1)
