from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from batches import observations, ragged

from vlmenv.agents import sampling as module
from vlmenv.agents.passes import Steps
from vlmenv.agents.policy import Policy
from vlmenv.agents.sampling import PassLimits, Sampling
from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.errors import ConfigError

PROBS = [0.4, 0.3, 0.2, 0.06, 0.04]


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), [0.4, 0.3, 0.2, 0.06, 0.04]),
        (Sampling(top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        (Sampling(top_k=9), [0.4, 0.3, 0.2, 0.06, 0.04]),
        (Sampling(top_p=0.69), [4 / 7, 3 / 7, 0, 0, 0]),
        (Sampling(top_p=0.71), [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        (Sampling(top_p=0.1), [1, 0, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.5), [4 / 7, 3 / 7, 0, 0, 0]),
        (Sampling(temperature=0.5, top_k=2), [16 / 25, 9 / 25, 0, 0, 0]),
    ],
)
def test_the_distribution_that_is_sampled_from(sampling: Sampling, kept: list[float]) -> None:
    """By hand: the fewest likeliest tokens, of the k likeliest, whose share reaches p; their log-probs sum to 1."""
    shuffled = torch.tensor([2, 0, 4, 1, 3])
    logits = torch.tensor(PROBS).log()[shuffled].repeat(4000, 1)
    places = module._Places(4000, sampling, torch.Generator().manual_seed(0), ahead=False)
    token, logprob = module._draw(logits, sampling, places.next(torch.arange(4000), 0))
    wanted = torch.tensor(kept, dtype=torch.float32)[shuffled]
    torch.testing.assert_close(logprob.exp(), wanted[token])
    found = torch.bincount(token, minlength=5) / 4000
    assert (found[wanted == 0] == 0).all()
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)


def test_rollouts_with_a_cut_tail_say_so_and_stay_within_it(builtin: VLMAgent) -> None:
    builtin.sampling = Sampling(temperature=3.0, top_k=3, max_new_tokens=12)
    rollout = builtin.rollout(observations(16, 4))
    assert not rollout.full_distribution
    assert not rollout[:2].full_distribution
    policy = builtin.family_policy
    hidden, packing = policy.hidden_states(rollout)
    logits = policy.logits(hidden).detach() / 3.0
    chosen = torch.from_numpy(np.concatenate([one.token_ids for one in rollout.completions]))
    best = logits.topk(3, dim=-1)
    assert (best.indices == chosen[:, None]).any(-1).all()
    expected = (torch.log_softmax(best.values, -1) * (best.indices == chosen[:, None])).sum(-1)
    found = torch.from_numpy(np.concatenate([one.logprobs for one in rollout.completions]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert packing.total == len(chosen)


def test_a_stop_text_ends_a_completion_and_is_part_of_it(builtin: VLMAgent) -> None:
    batch = observations(8, 4)
    builtin.sampling = Sampling(temperature=0.0, max_new_tokens=40)
    whole = builtin.rollout(batch)
    builtin.sampling = replace(builtin.sampling, stop=("</think>", "not there"))
    cut = builtin.rollout(batch)
    for before, after in zip(whole.completions, cut.completions, strict=True):
        assert after.text == before.text[: before.text.index("</think>") + len("</think>")]
        assert after.finish_reason == "stop"
        assert after.token_ids.tolist() == before.token_ids[: len(after.token_ids)].tolist()
        assert builtin.family.decode(after.token_ids[:-1]) != after.text


def test_a_stop_text_may_end_within_a_token(builtin: VLMAgent) -> None:
    builtin.sampling = Sampling(temperature=0.0, max_new_tokens=40, stop=("</thi",))
    for completion in builtin.rollout(observations(4, 4)).completions:
        assert completion.text.endswith("</thi")
        assert builtin.family.decode(completion.token_ids).endswith("</think>")


@pytest.mark.slow
def test_what_has_ended_leaves_the_batch(builtin: VLMAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The widths of the passes fall, and the log-probabilities stay those of a fresh forward pass."""
    policy, widths = builtin.family_policy, []
    extend = type(policy).extend

    def noting(self: object, tokens: torch.Tensor, *args: object) -> torch.Tensor:
        widths.append(len(tokens))
        return extend(self, tokens, *args)

    monkeypatch.setattr(type(policy), "extend", noting)
    builtin.sampling = Sampling(temperature=6.0, max_new_tokens=400)
    builtin.seed(3)
    rollout = builtin.rollout(observations(32, 4))
    lengths = sorted(len(one.token_ids) for one in rollout.completions)
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) > 2
    assert widths[-1] <= sum(length >= lengths[-1] - 1 for length in lengths) / 0.75
    again = builtin.logprobs(rollout)
    for row, completion in enumerate(rollout.completions):
        expected = again.values[row, : len(completion.token_ids)].detach().numpy()
        np.testing.assert_allclose(completion.logprobs, expected, atol=2e-5)


def test_looking_seldom_gives_the_same_answers(builtin: VLMAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on devices where each look at what has ended would cost a wait."""
    builtin.sampling = Sampling(temperature=0.0, max_new_tokens=30)
    often = builtin.rollout(ragged())
    growing = module._Growing

    class Seldom(growing):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self._look_every = 8

    monkeypatch.setattr(module, "_Growing", Seldom)
    seldom = builtin.rollout(ragged())
    for a, b in zip(often.completions, seldom.completions, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.finish_reason == b.finish_reason


@pytest.mark.parametrize(
    ("limits", "lengths", "passes"),
    [
        (PassLimits(), [5, 7, 9], [(0, 3)]),
        (PassLimits(rows=2), [5, 7, 9], [(0, 2), (2, 3)]),
        (PassLimits(tokens=12), [5, 7, 9], [(0, 2), (2, 3)]),
        (PassLimits(tokens=11), [5, 7, 4, 20, 1], [(0, 1), (1, 3), (3, 4), (4, 5)]),
        (PassLimits(rows=1, tokens=100), [5, 7], [(0, 1), (1, 2)]),
    ],
)
def test_passes_of_prompts_are_within_limits(
    limits: PassLimits, lengths: list[int], passes: list[tuple[int, int]]
) -> None:
    """A prompt that is too long has a pass of its own."""
    assert [(own.start, own.stop) for own in limits.passes(lengths)] == passes


@pytest.mark.parametrize("rows", [None, 3])
def test_logits_are_computed_for_a_few_completions_at_a_time(
    builtin: VLMAgent, monkeypatch: pytest.MonkeyPatch, rows: int | None
) -> None:
    policy, widths = type(builtin.family_policy), []
    logits = policy.logits

    def noting(self: Policy, hidden: torch.Tensor) -> torch.Tensor:
        widths.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(policy, "logits", noting)
    builtin.limits, builtin.sampling = PassLimits(rows), Sampling(max_new_tokens=2)
    builtin.rollout(observations(8, 4))
    assert widths[: 3 if rows else 1] == ([3, 3, 2] if rows else [8])


@pytest.mark.slow
@pytest.mark.parametrize("cache", [1, 900, 2500])
def test_a_limited_cache_stays_within_its_limit_and_gives_the_same_answers(
    builtin: VLMAgent, monkeypatch: pytest.MonkeyPatch, cache: int
) -> None:
    """Long answers outgrow the limit, so that some begin anew; the caches of each pass are counted."""
    policy, held, widths = type(builtin.family_policy), [], []
    extend = policy.extend
    builtin.sampling = Sampling(temperature=6.0, max_new_tokens=300)

    def noting(self: Policy, tokens: torch.Tensor, positions: torch.Tensor, attention: Steps) -> torch.Tensor:
        hidden = extend(self, tokens, positions, attention)
        pasts = attention.prefixes.past[0], attention.own[0]
        held.append(sum(one.keys.shape[0] * one.capacity for one in pasts))
        widths.append(len(tokens))
        return hidden

    found, states = {}, []
    for limit in (10**9, cache):
        builtin.limits = PassLimits(cache=limit)
        builtin.seed(3)
        monkeypatch.setattr(policy, "extend", noting if limit == cache else extend)
        found[limit] = builtin.rollout(observations(12, 4))
        states.append(builtin.rng_state())
    assert states[0].equal(states[1])
    for free, bound in zip(found[10**9].completions, found[cache].completions, strict=True):
        assert free.token_ids.tolist() == bound.token_ids.tolist()
        assert free.finish_reason == bound.finish_reason
        np.testing.assert_allclose(free.logprobs, bound.logprobs, atol=2e-5)
    assert max(count for count, width in zip(held, widths, strict=True) if width > 1 or cache == 1) <= max(cache, 450)
    assert len(held) > 300  # more than one wave
    assert max(widths) > 1 or cache == 1


def test_completions_that_have_room_at_their_full_length_run_once(builtin: VLMAgent) -> None:
    """By hand: 2 prompts of 10 and 20 tokens padded to 20 each, and 3 completions of 100."""
    limits, lengths = PassLimits(cache=340), np.array([10, 20])
    assert limits.fitting(np.array([0, 0, 1]), lengths, 100) == 3
    assert PassLimits(cache=339).fitting(np.array([0, 0, 1]), lengths, 100) == 2
    assert PassLimits(cache=209).fitting(np.array([0, 0, 1]), lengths, 100) == 1
    assert PassLimits(cache=1).fitting(np.array([0, 0, 1]), lengths, 100) == 1
    assert PassLimits().fitting(np.array([0, 0, 1]), lengths, 10**9) == 3


def test_caches_grow_and_shrink_one_block_at_a_time(builtin: VLMAgent) -> None:
    """While rows leave, no more than one block of the model is held twice."""
    policy = builtin.family_policy
    builtin.sampling = Sampling(max_new_tokens=2)
    prompts, index = builtin.encode(observations(16, 4))
    prefixes, _ = policy.prefill(prompts)
    attention = Steps(prefixes, torch.from_numpy(index), 300)
    rows = torch.from_numpy(index)
    with torch.no_grad():
        policy.extend(torch.zeros(16, dtype=torch.int64), rows, attention)
    before = attention.own[0].keys
    assert before.shape[2] == Steps.GROWTH
    assert attention.next_capacity == Steps.GROWTH
    attention.length = Steps.GROWTH
    with torch.no_grad():
        policy.extend(torch.zeros(16, dtype=torch.int64), rows, attention)
    assert attention.own[0].keys.shape[2] == 2 * Steps.GROWTH
    assert attention.own[0].keys[:, :, 0].equal(before[:, :, 0])
    sizes = []

    class Watched(dict):
        def __setitem__(self, block: int, cache: torch.Tensor) -> None:
            super().__setitem__(block, cache)
            sizes.append(sum(len(one.keys) for one in self.values()))

    attention.own = Watched(attention.own)
    attention.select(torch.arange(4))
    blocks = len(attention.own)
    assert sizes == [16 * (blocks - i) + 4 * i for i in range(1, blocks + 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be a number from 0 up"),
        ({"temperature": float("nan")}, "temperature must be a number from 0 up"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"stop": ("",)}, "must not be empty"),
    ],
)
def test_what_cannot_be_sampled_with_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)
