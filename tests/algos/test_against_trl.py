"""The advantages, losses and gradients of TRL's own trainers on the same numbers.

The trainers are built as any user's, over a tiny model. What they are spared is the model itself: completions and
log-probabilities are handed to them, everything they do with these is theirs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from vlmenv.algos.advantages import (
    Scale,
    group_relative,
    leave_one_out,
    overlong_penalty,
    term_relative,
    token_rewards,
)
from vlmenv.algos.losses import (
    Aggregation,
    cispo,
    clipped_surrogate,
    divergence,
    geometric_mean_ratio,
    sapo,
    sequence_ratio,
    token_weights,
)

GROUP_SIZE, MAX_TOKENS = 4, 9
LENGTHS = (6, 2, 5, 1, 3, 6, 4, 6)
MASK = torch.arange(6) < torch.tensor(LENGTHS)[:, None]


@dataclass(frozen=True)
class Step:
    """What a trainer made of the batch."""

    advantages: Tensor
    loss: Tensor
    gradient: Tensor
    """of the loss, with respect to the log-probabilities now"""


@dataclass(frozen=True)
class Batch:
    rewards: Tensor
    logprobs: Tensor
    old: Tensor
    ref: Tensor

    def step(self, advantages: Tensor, loss: Callable[[Tensor], Tensor]) -> Step:
        logprobs = self.logprobs.clone().requires_grad_()
        value = loss(logprobs)
        return Step(advantages, value.detach(), *torch.autograd.grad(value, logprobs))


@pytest.fixture(params=range(3))
def batch(request: pytest.FixtureRequest) -> Batch:
    """Two groups of four; ratios from about 0.2 to 5, so that all bounds come into play."""
    generator = torch.Generator().manual_seed(request.param)
    old, drift, distance = (torch.randn(8, 6, dtype=torch.float64, generator=generator) for _ in range(3))
    old = -old.exp()
    rewards = torch.rand(8, generator=generator)
    return Batch(rewards, *((x * MASK) for x in (old + 0.6 * drift, old, old + 0.5 * distance)))


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Makes TRL's trainers, by name and options."""
    module = pytest.importorskip("trl", "1.16.0", reason="TRL is what is compared with")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("trl")
    size = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=3, **size)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "word": 2}, unk_token="word"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")

    def make(name: str, rewards: Any = lambda reward, **_: reward, **options: Any) -> Any:
        home = importlib.import_module("trl.experimental.gmpo") if name == "GMPO" else module
        config = getattr(home, f"{name}Config")(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=len(LENGTHS),
            num_generations=GROUP_SIZE,
            max_completion_length=MAX_TOKENS,
            num_iterations=2,  # or else the old log-probs are taken to be those of now
            **options,
        )
        return getattr(home, f"{name}Trainer")(
            model=str(folder),
            args=config,
            reward_funcs=rewards,
            train_dataset=Dataset.from_dict({"prompt": ["word"]}),
            processing_class=tokenizer,
        )

    with patch.dict(os.environ):
        yield make


def trl_step(trainer: Any, batch: Batch) -> Step:
    """Lets a trainer of TRL score the batch and compute its loss."""
    completions = [[2] * length for length in LENGTHS]
    prompts, texts = [[2]] * len(LENGTHS), ["word"] * len(LENGTHS)
    if type(trainer).__name__ == "RLOOTrainer":
        trainer._generate = lambda _: (prompts, completions, texts)
    else:
        trainer._generate = lambda _: (prompts, completions, None, texts, None, {}, None, None)
    scored = [batch.old, batch.ref] if trainer.beta else [batch.old]
    logprobs = batch.logprobs.clone().requires_grad_()
    asked = iter([*scored, logprobs])
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (next(asked), torch.zeros(MASK.shape), None)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    rows = [{"prompt": "word", "reward": reward, "row": i} for i, reward in enumerate(batch.rewards.tolist())]
    inputs = trainer._generate_and_score_completions(rows)
    loss = trainer.compute_loss(trainer.model, inputs)
    return Step(inputs["advantages"], loss.detach(), *torch.autograd.grad(loss, logprobs))


def assert_equal(ours: Step, theirs: Step) -> None:
    torch.testing.assert_close(ours.advantages, theirs.advantages, rtol=0, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(ours.gradient, theirs.gradient, rtol=0, atol=1e-6)
    assert theirs.gradient.abs().max() > 1e-3


def averaged(per_token: Tensor, how: Aggregation) -> Tensor:
    weights = token_weights(MASK, how, num_tokens=sum(LENGTHS), num_sequences=len(LENGTHS), max_tokens=MAX_TOKENS)
    return (weights * per_token).sum()


PerToken = Callable[[Tensor, Tensor, Tensor], Tensor]


def surrogate(epsilon_high: float = 0.2, dual_clip: float | None = None) -> PerToken:
    def per_token(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        return clipped_surrogate((logprobs - old).exp(), advantages, 0.2, epsilon_high, dual_clip)

    return per_token


def gspo(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    return clipped_surrogate(sequence_ratio(logprobs - old, MASK), advantages, 0.2, 0.28)


def minimax(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """TRL's `epsilon_high` is the bound itself, not what is added to 1 as in the paper."""
    return cispo(logprobs, (logprobs - old).exp(), advantages, epsilon_low=1.0, epsilon_high=0.5)


def gated(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    return sapo((logprobs - old).exp(), advantages, 1.0, 1.05)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(
    ("options", "scale", "how", "per_token"),
    [
        ({"loss_type": "grpo"}, "group", "sequence", surrogate()),
        ({"loss_type": "grpo", "scale_rewards": "batch"}, "batch", "sequence", surrogate()),
        ({"loss_type": "grpo", "epsilon_high": 0.28}, "group", "sequence", surrogate(0.28)),
        ({"loss_type": "grpo", "delta": 1.5}, "group", "sequence", surrogate(dual_clip=1.5)),
        ({"loss_type": "dr_grpo", "scale_rewards": "none"}, "none", "constant", surrogate()),
        ({"loss_type": "dapo", "epsilon_high": 0.28}, "group", "token", surrogate(0.28)),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_high": 0.28},
            "group",
            "sequence",
            gspo,
        ),
        ({"loss_type": "cispo", "epsilon_high": 1.5}, "group", "token", minimax),
        ({"loss_type": "sapo"}, "group", "sequence", gated),
    ],
    ids=["grpo", "batch", "clip_higher", "dual_clip", "dr_grpo", "dapo", "gspo", "cispo", "sapo"],
)
def test_grpo_and_its_variants(
    trl: Callable[..., Any],
    batch: Batch,
    options: dict[str, Any],
    scale: Scale,
    how: Aggregation,
    per_token: PerToken,
    beta: float,
) -> None:
    advantages = group_relative(batch.rewards, GROUP_SIZE, scale)

    def loss(logprobs: Tensor) -> Tensor:
        penalty = beta * divergence(logprobs, batch.ref, "k3")
        return averaged(per_token(logprobs, batch.old, advantages[:, None]) + penalty, how)

    assert_equal(
        batch.step(advantages, loss), trl_step(trl("GRPO", beta=beta, use_bias_correction_kl=False, **options), batch)
    )


def test_gmpo(trl: Callable[..., Any], batch: Batch) -> None:
    advantages = group_relative(batch.rewards, GROUP_SIZE)

    def loss(logprobs: Tensor) -> Tensor:
        ratio = geometric_mean_ratio(logprobs - batch.old, advantages[:, None], MASK, 0.4, 0.5)
        return averaged(-ratio * advantages[:, None], "sequence")

    assert_equal(batch.step(advantages, loss), trl_step(trl("GMPO", epsilon_high=0.5), batch))


def test_gdpo(trl: Callable[..., Any], batch: Batch) -> None:
    """Two terms, one of which some completions do not have, and the batch's own reward as a third."""
    seen = batch.ref[:, :2].float()
    seen[[0, 2, 4], 1] = torch.nan
    rewards = [lambda row, k=k, **_: [None if v != v else v for v in seen[row, k].tolist()] for k in (0, 1)]
    terms = torch.cat([seen, batch.rewards[:, None]], dim=1)
    advantages = term_relative(terms, torch.tensor([0.5, 2.0, 1.0]).expand(8, 3), GROUP_SIZE)

    def loss(logprobs: Tensor) -> Tensor:
        return averaged(clipped_surrogate((logprobs - batch.old).exp(), advantages[:, None], 0.2, 0.2), "token")

    options = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [0.5, 2.0, 1.0]}
    trainer = trl("GRPO", [*rewards, lambda reward, **_: reward], loss_type="dapo", **options)
    assert_equal(batch.step(advantages, loss), trl_step(trainer, batch))


def test_the_unbiased_penalty(trl: Callable[..., Any], batch: Batch) -> None:
    """TRL's default: k3 times the ratio."""
    advantages = group_relative(batch.rewards, GROUP_SIZE)

    def loss(logprobs: Tensor) -> Tensor:
        ratio = (logprobs - batch.old).exp()
        penalty = 0.1 * ratio * divergence(logprobs, batch.ref, "k3")
        return averaged(clipped_surrogate(ratio, advantages[:, None], 0.2, 0.2) + penalty, "token")

    trainer = trl("GRPO", loss_type="dapo", beta=0.1)
    assert_equal(batch.step(advantages, loss), trl_step(trainer, batch))


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rloo(trl: Callable[..., Any], batch: Batch, beta: float) -> None:
    """k1 in the reward; completions are single actions."""
    kl = divergence(batch.old, batch.ref, "k1")
    rewards = token_rewards(batch.rewards, MASK, kl, beta).sum(dim=1)
    advantages = leave_one_out(rewards, GROUP_SIZE)

    def loss(logprobs: Tensor) -> Tensor:
        ratio = sequence_ratio(logprobs - batch.old, MASK, length_normalised=False)
        return averaged(clipped_surrogate(ratio, advantages[:, None], 0.2, 0.28), "sequence")

    assert_equal(batch.step(advantages, loss), trl_step(trl("RLOO", beta=beta, epsilon_high=0.28), batch))


def test_the_overlong_penalty() -> None:
    rewards = pytest.importorskip("trl.rewards", reason="TRL is what is compared with")
    lengths = range(60)
    theirs = rewards.get_soft_overlong_punishment(max_completion_len=50, soft_punish_cache=20)
    expected = theirs(completion_ids=[[0] * length for length in lengths])
    torch.testing.assert_close(overlong_penalty(torch.tensor(lengths), 50, 20), torch.tensor(expected))
