"""The benchmarks of learning run, at a tiny size, and measure what they say."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT

CELLS = "| tiny | 34 (9) | 2 | 2 | 6 |"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # the tests' own number stays


@pytest.fixture
def common() -> ModuleType:
    return importlib.import_module("common")


def trl_script(name: str) -> ModuleType:
    pytest.importorskip("trl", "1.16.0", reason="TRL is what is compared with")
    return importlib.import_module(name)


def differences(table: str) -> list[float]:
    """What the last line tells of log-probabilities, gradients, and losses where these are compared."""
    return [float(number) for number in re.findall(r"at most (\d\.\de[-+]\d\d)", table.splitlines()[-1])]


@pytest.mark.slow
def test_against_trl(common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same completions both have the same log-probabilities, gradients and loss."""
    script, case = trl_script("vs_trl"), common.Case("tiny", 34, 2, 2, 6)
    monkeypatch.setattr(script, "KINDEST", (case,))
    script.main(script.Args(rounds=1, threads=1, cases=(case,), ways_cases=(case,), output=tmp_path / "table.md"))
    table = (tmp_path / "table.md").read_text()
    assert table.count(CELLS) == 5
    assert all(title in table for title in ("## Time", "## Memory of an update", "## What is computed once"))
    assert len(differences(table)) == 3
    assert max(differences(table)) < 1e-5


def test_the_comparison_with_trl_tells_other_numbers(common: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    script, case = trl_script("vs_trl"), common.Case("tiny", 34, 2, 1, 6)
    new_ours = script.new_ours

    def changed(*args: object) -> object:
        ours = new_ours(*args)
        weight = ours.agent.family.model.get_submodule("model.visual.merger.linear_fc2").weight
        weight.data = weight.data.roll(1, 0)
        return ours

    monkeypatch.setattr(script, "new_ours", changed)
    logprobs, gradients, _ = script.compare(case)
    assert logprobs > 1e-3
    assert gradients > 1e-3


@pytest.mark.slow
def test_against_the_reference(common: ModuleType, tmp_path: Path) -> None:
    script, case = importlib.import_module("vs_reference"), common.Case("tiny", 34, 2, 2, 6)
    script.main(script.Args(rounds=1, threads=1, sizes=("tiny",), cases=(case,), output=tmp_path / "table.md"))
    table = (tmp_path / "table.md").read_text()
    (row,) = [line for line in table.splitlines() if line.startswith(CELLS)]
    reference, ours = (float(cell) for cell in row.split("|")[12:14])
    assert 0 < ours < reference
    assert len(differences(table)) == 2
    assert max(differences(table)) < 1e-5


@pytest.mark.slow
def test_the_phases_of_a_step(tmp_path: Path) -> None:
    script = importlib.import_module("profile_step")
    args = script.Args(sizes=("tiny",), prompts=2, group_size=2, new_tokens=4, steps=1, output=tmp_path / "table.md")
    script.main(args)
    assert all(phase in (tmp_path / "table.md").read_text() for phase in script.PHASES)
    (step,) = script.measure("tiny", args).steps
    assert all(step[phase] > 0 for phase in script.PHASES)
    assert step["backward"] > step["texts"]


def test_an_inner_phase_is_no_part_of_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    script = importlib.import_module("profile_step")
    now = [0.0]
    monkeypatch.setattr(script.time, "perf_counter", lambda: now[0])
    clock = script.Clock(torch.device("cpu"))

    class Work:
        def outer(self) -> None:
            now[0] += 1
            self.inner()
            now[0] += 2

        def inner(self) -> None:
            now[0] += 10

    work = Work()
    clock.wrap(work, "outer", "decode")
    clock.wrap(work, "inner", "prefill")
    work.outer()
    assert (clock.seconds["decode"], clock.seconds["prefill"]) == (3, 10)
    clock.wrap(work, "inner", "score", unless="decode")
    work.outer()
    assert clock.seconds["score"] == 0


def test_peak_memory(common: ModuleType) -> None:
    kept = [torch.zeros(1000)]

    def work() -> None:
        first = torch.zeros(1000)  # 4,000 bytes
        second = first + 1  # 8,000
        del first
        third = second.repeat(3)  # 16,000
        del second, third
        kept.clear()  # what was there before does not count
        torch.zeros(3000)

    assert 16_000 <= common.peak_memory(work) <= 16_500


def test_prompts_and_completions_are_as_long_as_asked(common: ModuleType) -> None:
    case = common.Case("tiny", 50, 2, 3, 7)
    family = common.family_without_end(common.new_model("tiny"), common.processor_of(common.find_model("builtin")))
    agent = common.new_agent(family, "shared", case.new_tokens)
    rollout = agent.rollout([one for one in common.observations(family, case) for _ in range(2)])
    image = family.model.config.image_token_id
    assert [len(one.input_ids) for one in rollout.prompts] == [50] * 3
    assert [(one.input_ids == image).sum() for one in rollout.prompts] == [case.image_tokens] * 3
    assert [len(one.token_ids) for one in rollout.completions] == [7] * 6
    assert set(family.end_tokens) < set(family.banned_tokens.tolist())


def test_the_three_ways_have_the_same_numbers(common: ModuleType) -> None:
    case = common.Case("tiny", 34, 2, 2, 5)
    found = []
    for way in ("shared", "image once", "plain"):
        family = common.family_without_end(common.new_model("tiny"), common.processor_of(common.find_model("builtin")))
        agent = common.new_agent(family, way, case.new_tokens)
        shown = [one for one in common.observations(family, case) for _ in range(2)]
        if way == "shared":
            rollout = agent.rollout(shown)
        else:
            prompts, index = agent.encode(shown)
            assert len(prompts) == 4
            rollout.prompts, rollout.prompt_index = prompts, index
        looked = []
        look = family.model.model.get_image_features
        family.model.model.get_image_features = lambda *a, _look=look, _seen=looked, **k: (
            _seen.append(len(k["image_grid_thw"])) or _look(*a, **k)
        )
        values = agent.logprobs(rollout).values
        values.sum().backward()
        found.append((values.detach(), common.gradient_of(family.model), sum(looked)))
    assert [images for _, _, images in found] == [2, 2, 4]
    for values, gradient, _ in found[1:]:
        torch.testing.assert_close(values, found[0][0], atol=1e-5, rtol=1e-5)
        assert common.largest_difference(gradient, found[0][1]) < 1e-5
