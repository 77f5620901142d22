"""Episodes of several turns in the learner: against transformers' own pass over the whole conversation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversations import TURNS, after, episodes, first, later_images
from small_models import invent
from torch import Tensor

from vlmenv.agents import vlm
from vlmenv.agents.engines.base import Request
from vlmenv.agents.policy import joined
from vlmenv.agents.sampling import Sampled, sample
from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.algos.batch import Batch, Rollouts, micro_batches
from vlmenv.core.errors import PromptError
from vlmenv.core.rollout import Completion, Rollout

pytestmark = pytest.mark.slow


def plain_logprobs(agent: VLMAgent, rollout: Rollout) -> list[Tensor]:
    """Of all tokens of each row but those of its prompt, by transformers alone, with its own positions."""
    family, model, found = agent.family, agent.family.model, []
    for index, completion in zip(rollout.prompt_index, rollout.completions, strict=True):
        prompt = rollout.prompts[index]
        ids = torch.from_numpy(np.concatenate([prompt.input_ids, completion.token_ids]))[None]
        inputs = family.join_images([prompt, completion]) | family.unpacked_arguments(ids)
        if hasattr(model.model, "get_rope_index"):
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        logits = model(input_ids=ids, **inputs).logits[0, len(prompt.input_ids) - 1 : -1]
        logits[:, family.banned_tokens] = -torch.inf
        logprobs = torch.log_softmax(logits / rollout.temperature, dim=-1)
        found.append(logprobs.gather(-1, torch.from_numpy(completion.token_ids)[:, None])[:, 0])
    return found


def gradients(agent: VLMAgent, loss: Tensor) -> dict[str, Tensor]:
    agent.policy.zero_grad()
    loss.backward()
    return {name: one.grad for name, one in agent.policy.named_parameters() if one.grad is not None}


@pytest.fixture(scope="module", params=["builtin", "qwen2_5_vl", "qwen3_5", "gemma3", "glm4v", "mistral3"])
def agent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VLMAgent:
    sampling = Sampling(max_new_tokens=6, temperature=0.9)
    if request.param == "builtin":
        return VLMAgent.from_pretrained("builtin", sampling=sampling)
    folder: Path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    invent(request.param, folder)
    return VLMAgent.from_pretrained(folder, sampling=sampling)


def loss_of(values: Sequence[Tensor], written: Sequence[np.ndarray]) -> Tensor:
    """Each written token pushed by a weight of its own."""
    rows = [value[: len(one)][torch.from_numpy(one)] for value, one in zip(values, written, strict=True)]
    tokens = torch.cat(rows)
    return (tokens * torch.linspace(-1, 1, len(tokens))).sum()


def test_values_and_gradients_are_those_of_a_plain_pass_over_the_whole_conversation(agent: VLMAgent) -> None:
    rollout, _ = episodes(agent)
    written = [np.ones(len(c.token_ids), bool) if c.written is None else c.written for c in rollout.completions]
    assert [c.written is None for c in rollout.completions] == [turns == 1 for turns in TURNS]
    result, plain = agent.logprobs(rollout), plain_logprobs(agent, rollout)
    for row, (completion, own) in enumerate(zip(rollout.completions, written, strict=True)):
        wanted = plain[row].detach()[torch.from_numpy(own)].numpy()
        np.testing.assert_allclose(completion.logprobs[own], wanted, atol=1e-5)
        np.testing.assert_allclose(result.values[row, : len(own)][own].detach().numpy(), wanted, atol=1e-5)
        assert result.mask[row, : len(own)].tolist() == own.tolist()
        assert not result.mask[row, len(own) :].any()
    assert not result.values[~result.mask].any()
    assert not result.entropy[~result.mask].any()
    assert torch.equal(result.mask, Batch.of(rollout, agent.device).mask)
    packed, expected = (gradients(agent, loss_of(values, written)) for values in (result.values, plain))
    largest = max(float(one.abs().max()) for one in expected.values())
    for name, wanted in expected.items():
        assert (packed[name] - wanted).abs().max() <= 1e-5 * largest, name
    assert packed.keys() == expected.keys()


def test_repeated_prompts_parts_and_a_stored_copy_give_the_same_values(agent: VLMAgent) -> None:
    rollout, _ = episodes(agent)
    rollouts = Rollouts(rollout, torch.zeros(len(rollout)), [{} for _ in TURNS])
    again = Rollouts.from_state(rollouts.state_dict()).rollout
    with torch.no_grad():
        wanted = agent.logprobs(rollout).values
        torch.testing.assert_close(agent.logprobs(again).values, wanted, atol=0, rtol=0)
        for rows in micro_batches(rollout, 2, None):
            found = agent.logprobs(rollout[rows]).values
            torch.testing.assert_close(found, wanted[rows, : found.shape[1]], atol=1e-5, rtol=0)
        agent.family_policy.share_prefixes = False
        torch.testing.assert_close(agent.logprobs(rollout).values, wanted, atol=1e-5, rtol=0)
    agent.family_policy.share_prefixes = True


def test_earlier_tokens_stay_as_sampled_and_turns_are_the_chat_templates(agent: VLMAgent) -> None:
    rollout, history = episodes(agent)
    tokenizer = agent.family.processor.tokenizer
    for row, turns in enumerate(TURNS):
        parts = [one.completions[row] for one in history[:turns]]
        for before, later in itertools.pairwise(parts):
            count = len(before.token_ids)
            assert np.array_equal(later.token_ids[:count], before.token_ids)
            assert np.array_equal(later.logprobs[:count], before.logprobs)
        last = rollout.completions[row]
        if turns == 1:
            continue
        assert last.written is not None
        given = tokenizer.decode(last.token_ids[~last.written])
        assert [given.count(f"Turn {turn}.") for turn in (2, 3)] == [1, int(turns == 3)]
        ended = [part.token_ids[-1] in agent.family.end_tokens for part in parts[:-1]]
        ends = int(np.isin(last.token_ids[: -len(parts[-1].written_ids[-1:])], agent.family.end_tokens).sum())
        assert ends >= len(ended)  # each answer is ended, by the policy or by the environment


def test_engines_are_told_one_mark_for_each_image(agent: VLMAgent) -> None:
    """Tokens of whole conversations, whose text with each image in its mark's place is that of the trainer's tokens."""
    rollout, _ = episodes(agent)
    decode = agent.family.processor.tokenizer.decode
    for row, (index, completion) in enumerate(zip(rollout.prompt_index, rollout.completions, strict=True)):
        later = [one for turn in (2, 3) if TURNS[row] >= turn for one in later_images(row, turn)]
        images = (*first()[row]["images"], *later)
        whole = joined(agent.family, rollout.prompts[index], completion)
        request = Request(whole, images)
        start, *rest = decode(request.token_ids).split(agent.family.image_mark)
        expanded = agent.family.process_images(images)[1] if images else []
        told = start + "".join(mark + text for mark, text in zip(expanded, rest, strict=True))
        assert told == decode(whole.input_ids)
        assert len(request.token_ids) < len(whole.input_ids) or not images


def test_a_token_of_the_environment_gets_no_gradient(agent: VLMAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a loss makes of its place. The policy's tokens are those that the sampler gave."""
    sampled: list[list[int]] = []

    def noted(*given: Any) -> list[Sampled]:
        found = sample(*given)
        sampled.append([len(one.token_ids) for one in found])
        return found

    monkeypatch.setattr(vlm, "sample", noted)
    rollout, history = episodes(agent)
    longest = max(len(one.token_ids) for one in rollout.completions)
    policys = torch.zeros(len(TURNS), longest, dtype=torch.bool)
    for turn, (lengths, after_it) in enumerate(zip(sampled, history, strict=True), 1):
        going = [row for row, turns in enumerate(TURNS) if turns >= turn]
        for row, length in zip(going, lengths, strict=True):
            end = len(after_it.completions[row].token_ids)
            policys[row, end - length : end] = True
    result = agent.logprobs(rollout)
    assert torch.equal(result.mask, policys)
    assert torch.equal(Batch.of(rollout, agent.device).mask, policys)
    at_environments = gradients(agent, result.values[~policys].sum())
    assert not any(one.any() for one in at_environments.values())


def test_a_cut_off_answer_gets_an_end_token_that_is_not_learnt(agent: VLMAgent) -> None:
    agent.seed(0)
    observation = first()[5]
    rollout = agent.rollout([observation])
    shown = [after(observation, "x", "Go on.")]
    ids = rollout.completions[0].token_ids[:2]
    cut = Completion("x", ids, np.zeros(2, np.float32), "length")
    assert not np.isin(ids, agent.family.end_tokens).any()
    (later,) = agent.proceed(replace(rollout, completions=[cut]), shown).completions
    assert later.written is not None
    assert not later.written[2]
    end = later.token_ids[2:3]
    assert end[0] in agent.family.end_tokens
    ended = Completion("x", np.append(ids, end), np.zeros(3, np.float32), "stop")
    (other,) = agent.proceed(replace(rollout, completions=[ended]), shown).completions
    assert other.written is not None
    assert other.written[2]
    of_environment = [
        one.token_ids[2:][~one.written[2:] | (np.arange(len(one.written) - 2) == 0)] for one in (later, other)
    ]
    assert np.array_equal(*of_environment)  # one end token, whoever wrote it


def test_without_room_an_episode_ends_with_an_empty_answer(agent: VLMAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    agent.seed(0)
    observation = first()[0]
    rollout = agent.rollout([observation])
    (before,) = rollout.completions
    shown = [after(observation, "x", "Go on.")]
    monkeypatch.setattr(agent, "max_length", len(rollout.prompts[0].input_ids) + len(before.token_ids) + 8)
    (one,) = agent.proceed(rollout, shown).completions
    assert (one.text, one.finish_reason) == ("", "length")
    assert np.array_equal(one.token_ids, before.token_ids)
    monkeypatch.undo()
    image_token = agent.family.image_token
    with pytest.raises(PromptError, match="control tokens"):
        agent.proceed(rollout, [after(observation, "x", f"Look: {image_token}")])
