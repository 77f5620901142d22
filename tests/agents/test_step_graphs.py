"""Steps of sampling that GPUs replay as graphs, with a tape in the place of a graph: they compute the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from batches import observations, ragged
from tapes import capture, on_tapes
from torch import Tensor

from vlmenv.agents import step_graphs
from vlmenv.agents.passes import Steps
from vlmenv.agents.sampling import PassLimits, Sampling
from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.rollout import Observation, Rollout

ROUNDING = 5e-6
"""of float32 logits of about 20"""


def rolled(agent: VLMAgent, batch: list[Observation], sampling: Sampling) -> Rollout:
    agent.seed(3)
    agent.sampling = sampling
    return agent.rollout(batch)


def assert_alike(found: Rollout, right: Rollout, within: float) -> None:
    for one, other in zip(found.completions, right.completions, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.finish_reason == other.finish_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=within, rtol=0)


@pytest.fixture
def adapted(builtin: VLMAgent) -> VLMAgent:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    builtin.add_lora(rank=4, alpha=8)
    for parameter in builtin.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return builtin


@pytest.mark.slow
@pytest.mark.parametrize("limits", [PassLimits(), PassLimits(cache=1000)])
def test_answers_of_unlike_lengths(limits: PassLimits, adapted: VLMAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches grow, completions leave, and some begin anew where room is short: each makes another graph.

    Log-probabilities are those of a fresh pass.
    """
    monkeypatch.setattr(Steps, "GROWTH", 16)
    adapted.limits = limits
    with on_tapes() as replays:
        found = rolled(adapted, observations(12, 4), Sampling(temperature=3.0, max_new_tokens=60))
    assert adapted.family_policy.graph_fault == ""
    again = adapted.logprobs(found).values.detach().numpy()
    for row, one in enumerate(found.completions):
        np.testing.assert_allclose(one.logprobs, again[row, : len(one.token_ids)], atol=2e-5)
    lengths = [len(one.token_ids) for one in found.completions]
    assert len(set(lengths)) > 3
    assert len(replays) > 4
    assert sum(replays) > 0.6 * max(lengths)


@pytest.mark.slow
def test_half_precision(builtin: VLMAgent) -> None:
    asked = ragged(), Sampling(temperature=0.0, max_new_tokens=24)
    with torch.autocast("cpu", torch.bfloat16):
        right = rolled(builtin, *asked)
        with on_tapes() as replays:
            found = rolled(builtin, *asked)
    assert sum(replays) > 16
    assert_alike(found, right, 0.05)


def test_the_step_of_fixed_shapes_reads_filled_places_alone(builtin: VLMAgent) -> None:
    """What is in the caches behind them does not matter, and a step may be run again."""
    policy = builtin.family_policy
    prompts, index = builtin.encode(observations(4, 2))
    with torch.no_grad():
        prefixes, _ = policy.prefill(prompts)
        steps = Steps(prefixes, torch.from_numpy(index), 24)
        stepper = step_graphs.Stepper(policy, steps, torch.arange(4), replays=False)
        stepper.begin(torch.arange(4))
        right = stepper.run()
        for own in steps.own.values():
            own.keys[:, :, 1:], own.values[:, :, 1:] = 1e4, 1e4
        assert torch.equal(stepper.run(), right)
        assert torch.allclose(stepper.extend(torch.arange(4)), right, atol=1e-5)


class TestWhatIsNotReplayed:
    """Each is told once, and completions are the same."""

    ASKED = ragged(), Sampling(temperature=0.0, max_new_tokens=20)

    @pytest.fixture
    def right(self, builtin: VLMAgent) -> Rollout:
        return rolled(builtin, *self.ASKED)

    def fault(self, agent: VLMAgent, right: Rollout, log: pytest.LogCaptureFixture) -> str:
        for _ in range(2):
            assert_alike(rolled(agent, *self.ASKED), right, ROUNDING)
        told = agent.family_policy.graph_fault
        assert told
        assert log.text.count("are not replayed as CUDA graphs") == log.text.count(told) == 1
        return told

    def test_cpus_replay_nothing(self, builtin: VLMAgent, right: Rollout) -> None:
        assert builtin.family_policy.graph_fault is None
        assert not step_graphs.replays(builtin.family_policy)

    def test_what_cannot_be_captured(
        self, builtin: VLMAgent, right: Rollout, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        extend = type(builtin.family_policy).extend

        def waiting(self: object, tokens: Tensor, *more: object) -> Tensor:
            return extend(self, tokens + int(tokens.max()) * 0, *more)

        with on_tapes():
            monkeypatch.setattr(type(builtin.family_policy), "extend", waiting)
            assert self.fault(builtin, right, caplog) == "RuntimeError: _local_scalar_dense within a graph"

    @pytest.mark.parametrize("late", [False, True])
    def test_a_graph_that_computes_something_else(
        self,
        late: bool,
        builtin: VLMAgent,
        right: Rollout,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """At the trial, or in a later graph alone."""

        def wrong(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
            replay, rows = capture(run), len(run())
            return (lambda: replay().mul_(1.1)) if not late or rows > 2 else replay

        with on_tapes():
            monkeypatch.setattr(step_graphs, "capture", wrong)
            assert "a replayed step differs by 0.1 of" in self.fault(builtin, right, caplog)

    def test_a_graph_that_holds_numbers_of_the_host(
        self, builtin: VLMAgent, right: Rollout, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its first replay is right, and the trial's second is not."""
        run = step_graphs.Stepper.run

        def fixed(self: step_graphs.Stepper) -> Tensor:
            self._place = torch.full((1,), self._attention.length)
            return run(self)

        with on_tapes():
            monkeypatch.setattr(step_graphs.Stepper, "run", fixed)
            assert "a replayed step differs" in self.fault(builtin, right, caplog)

    def test_divided_weights(self, builtin: VLMAgent, right: Rollout, caplog: pytest.LogCaptureFixture) -> None:
        builtin.family_policy.sharded = True
        with on_tapes():
            assert self.fault(builtin, right, caplog) == "the weights are divided among ranks"
