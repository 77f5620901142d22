"""A contextual bandit with known optima, on which `solve(MyAlgorithm(MyConfig()))` tests an algorithm in seconds."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor, nn

from vlmenv.agents.base import Agent, LogProbs, Reference
from vlmenv.algos.base import Algorithm
from vlmenv.algos.trainer import Trainer, TrainerConfig
from vlmenv.core.rollout import Completion, Observations, Prompt, Rollout, group_neighbours, unbatch

ANSWERS = ("a", "ba", "bb", "caa", "cab")
"""The answers; their letters are tokens. None begins another, so none needs an end token."""
PREFIXES = ("", "b", "c", "ca")
"""What may stand before a token; after "c" there is no choice."""
LETTERS = "abc"
MEANS = torch.tensor([[0.9, 0.5, 0.2, 0.4, 0.0], [0.3, 0.1, 0.5, 0.4, 0.9], [0.5, 0.3, 0.9, 0.0, 0.4]])
"""Expected reward of each answer in each context, [C, A]."""
START = torch.tensor(
    [
        [[-1.0, 0.5, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
        [[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.0, 0.0]],
        [[0.5, -0.5, 0.5], [0.5, -0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.5, 0.0]],
    ]
)
"""Logits of a policy for which each context's best answer is among the rarer ones, [C, S, V]."""

BEST = MEANS.argmax(dim=1)
"""The best answer in each context, [C]."""
MASK = torch.tensor([[t < len(answer) for t in range(3)] for answer in ANSWERS])
PATHS = torch.tensor([[PREFIXES.index(answer[:t]) if t < len(answer) else 0 for t in range(3)] for answer in ANSWERS])
TOKENS = torch.tensor([[LETTERS.index(answer[t]) if t < len(answer) else 0 for t in range(3)] for answer in ANSWERS])
ALLOWED = torch.zeros(len(PREFIXES), len(LETTERS), dtype=torch.bool)
ALLOWED[PATHS[MASK], TOKENS[MASK]] = True
TAUGHT = torch.zeros_like(START)
"""Logits of a teacher that gives each context's best answer with a probability of about 0.98, [C, S, V]."""
for _context, _answer in enumerate(BEST.tolist()):
    TAUGHT[_context, PATHS[_answer][MASK[_answer]], TOKENS[_answer][MASK[_answer]]] = 5.0


class Table(nn.Module):
    """A logit for each context, prefix and token, and with a critic a value for each context and prefix."""

    def __init__(self, logits: Tensor, critic: bool) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self.values = nn.Parameter(torch.zeros(logits.shape[:2])) if critic else None

    def tokens(self) -> Tensor:
        """Log-probabilities of tokens after prefixes, [C, S, V]."""
        return self.logits.masked_fill(~ALLOWED, -1e9).log_softmax(dim=-1)

    def answers(self) -> Tensor:
        """Log-probabilities of the tokens of answers, [C, A, L]."""
        return self.tokens()[:, PATHS, TOKENS].masked_fill(~MASK, 0)

    def forward(self, rollout: Rollout) -> LogProbs:
        context = torch.tensor([rollout.prompts[i].input_ids[0] for i in rollout.prompt_index])
        answer = torch.tensor([ANSWERS.index(completion.text) for completion in rollout.completions])
        mask = MASK[answer]
        width = int(mask.sum(dim=1).max())
        paths, mask = PATHS[answer, :width], mask[:, :width]
        tokens = self.tokens()
        entropy = -(tokens.exp() * tokens).sum(dim=-1)[context[:, None], paths]
        values = None if self.values is None else self.values[context[:, None], paths].masked_fill(~mask, 0)
        return LogProbs(self.answers()[context, answer, :width], entropy.masked_fill(~mask, 0), mask, values)


class Frozen:
    """A copy of a table."""

    def __init__(self, policy: Table) -> None:
        self.policy = copy.deepcopy(policy)

    @torch.no_grad()
    def logprobs(self, rollout: Rollout) -> LogProbs:
        found: LogProbs = self.policy(rollout)
        return found


class TabularAgent(Agent):
    """Answers "context 0", "context 1" and so on by a table.

    Args:
        logits: To start from, [C, S, V].
        critic: Whether it has values too.
    """

    def __init__(self, logits: Tensor, critic: bool = False) -> None:
        self.policy: nn.Module = Table(logits, critic)
        self.max_new_tokens = 8
        self._generator = torch.Generator()

    @property
    def table(self) -> Table:
        """The policy."""
        assert isinstance(self.policy, Table)
        return self.policy

    @torch.no_grad()
    def probabilities(self) -> Tensor:
        """Of each answer in each context, [C, A]."""
        return self.table.answers().sum(dim=-1).exp()

    def act(self, observations: Observations) -> list[str]:
        prompts, index = self._prompts(observations)
        best = self.probabilities().argmax(dim=1)
        return [ANSWERS[best[prompts[i].input_ids[0]]] for i in index]

    def rollout(self, observations: Observations, *, greedy: bool = False) -> Rollout:
        prompts, index = self._prompts(observations)
        rows = self.probabilities()[[int(prompts[i].input_ids[0]) for i in index]]
        drawn = torch.multinomial(rows, 1, generator=self._generator)[:, 0]
        return self._rollout(prompts, index, [ANSWERS[i] for i in drawn])

    def imitate(self, observations: Observations, texts: Sequence[str]) -> Rollout:
        return self._rollout(*self._prompts(observations), texts)

    def reprompted(self, rollout: Rollout, observations: Observations) -> Rollout:
        prompts, index = self._prompts(observations)
        return replace(rollout, prompts=prompts, prompt_index=index)

    @torch.no_grad()
    def _rollout(self, prompts: list[Prompt], index: NDArray[np.int64], texts: Sequence[str]) -> Rollout:
        logprobs = self.table.answers().numpy()
        completions = []
        for i, text in zip(index, texts, strict=True):
            answer = ANSWERS.index(text)
            own = logprobs[prompts[i].input_ids[0], answer, : len(text)]
            completions.append(Completion(text, TOKENS[answer, : len(text)].numpy(), own.copy(), "stop"))
        return Rollout(prompts, index, completions, temperature=1.0)

    def _prompts(self, observations: Observations) -> tuple[list[Prompt], NDArray[np.int64]]:
        listed = unbatch(observations)
        firsts, index = group_neighbours(listed)
        ids = [np.array([int(listed[i]["prompt"].removeprefix("context "))]) for i in firsts]
        return [Prompt(one, np.zeros((3, 1), np.int64), {}) for one in ids], index

    def reference(self) -> Reference:
        return Frozen(self.table)

    def seed(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    def rng_state(self) -> Tensor:
        return self._generator.get_state()

    def set_rng_state(self, state: Tensor) -> None:
        self._generator.set_state(state)

    def save(self, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        folder.mkdir(parents=True)
        torch.save(self.policy.state_dict() if state_dict is None else dict(state_dict), folder / "table.pt")

    def load(self, folder: Path) -> None:
        self.policy.load_state_dict(torch.load(folder / "table.pt", weights_only=True))


class Bandit(VectorEnv[dict[str, Any], Sequence[str], Any]):
    """Shows the contexts in turn, a group each; an answer earns 1 with its probability, or else 0.

    Args:
        num_groups: A multiple of the number of contexts.
        group_size: G.
        noisy: False gives the expected rewards themselves.
    """

    def __init__(self, num_groups: int, group_size: int, noisy: bool = True) -> None:
        assert num_groups % len(MEANS) == 0
        self.num_envs, self.group_size, self.noisy = num_groups * group_size, group_size, noisy
        self._contexts = np.repeat(np.arange(num_groups) % len(MEANS), group_size)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        prompts = tuple(f"context {context}" for context in self._contexts)
        best = [ANSWERS[i] for i in MEANS.argmax(dim=1)]
        answers = np.array([best[context] for context in self._contexts], dtype=object)
        return {"images": ((),) * self.num_envs, "prompt": prompts}, {"id": prompts, "answer": answers}

    def step(self, actions: Sequence[str]) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        means = MEANS.numpy()[self._contexts, [ANSWERS.index(action) for action in actions]]
        rewards = (self.np_random.random(self.num_envs) < means).astype(np.float64) if self.noisy else means
        ended = np.ones(self.num_envs, dtype=np.bool_)
        return {}, rewards, ended, ~ended, {}


def solve(algorithm: Algorithm, *, completions: int = 48, noisy: bool = True, seed: int = 0, **options: Any) -> Tensor:
    """Trains a tabular policy on the bandit with the real trainer.

    Args:
        algorithm: The algorithm to test.
        completions: Batch size N, a multiple of 3 times the algorithm's `group_size`.
        noisy: True for rewards of 0 or 1, False for their expected values.
        seed: Seed of sampling and rewards.
        options: Options of `TrainerConfig`. Default: 100 steps at a constant learning rate of 0.1 over the optimiser
            steps of a batch.

    Returns:
        The probability of the best answer in each context, [C]. At the start each is below 0.25; above 0.95 the bandit
        is solved.
    """
    return learn(algorithm, completions=completions, noisy=noisy, seed=seed, **options)[range(len(MEANS)), BEST]


def learn(algorithm: Algorithm, *, completions: int = 48, noisy: bool = True, seed: int = 0, **options: Any) -> Tensor:
    """As `solve`, but returns the probabilities of all answers, float64 [C, A]."""
    config, size = algorithm.config, algorithm.config.group_size
    agent = TabularAgent(START, critic=algorithm.wants_values)
    rate = 0.1 / (config.mu * config.minibatches)
    settings: dict[str, Any] = {"steps": 100, "lr": rate, "lr_schedule": "constant", "warmup_steps": 0} | options
    envs = Bandit(completions // size, size, noisy)
    teacher = TabularAgent(TAUGHT) if algorithm.wants_teacher else None
    trainer = Trainer(agent, envs, algorithm, TrainerConfig(**settings), Accelerator(cpu=True), teacher)
    for _ in trainer.train(seed=seed):
        pass
    return agent.probabilities().double()
