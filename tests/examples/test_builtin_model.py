from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT

from vlmenv.agents.vlm import VLMAgent, find_model
from vlmenv.core.coordinates import iou
from vlmenv.envs.data.scenes import choose_reference, sample_scene


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("builtin_model", ROOT / "examples" / "builtin_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["builtin_model"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_makes_a_model_that_can_be_taught_and_loaded(script: ModuleType, tmp_path: Path) -> None:
    script.main(script.Args(output=tmp_path / "new", steps=2, scenes=2))
    shipped, made = find_model("builtin"), tmp_path / "new"
    assert {file.name for file in made.iterdir()} == {file.name for file in shipped.iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vlmenv.json"):
        assert (made / name).read_text() == (shipped / name).read_text(), name
    script.main(script.Args(output=tmp_path / "more", init=str(made), labels="exact", steps=1, scenes=1))
    assert VLMAgent.from_pretrained(tmp_path / "more").family.model_type == "qwen3_vl"


@pytest.mark.slow
def test_teaching_lowers_the_loss(script: ModuleType, tmp_path: Path) -> None:
    """On the same lessons, from random weights."""
    script.new_model(tmp_path)
    agent = VLMAgent.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    lessons = [script.lesson(agent, "exact", rng, single=True) for _ in range(4)]
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = script.imitation_loss(agent.family_policy, agent, lessons)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_a_lesson_asks_and_answers_in_the_environments_own_words(script: ModuleType, builtin: VLMAgent) -> None:
    lesson = script.lesson(builtin, "exact", np.random.default_rng(0), single=False)
    decode = builtin.family.processor.tokenizer.decode
    for tail, start in zip(lesson.tails, lesson.taught_from, strict=True):
        whole = decode(np.concatenate([lesson.prompt.input_ids, tail[:start]]))
        assert whole.startswith("<|im_start|>user\n<|vision_start|>")
        assert "<answer>None</answer>.\nLocate the " in whole
        assert whole.endswith(".<|im_end|>\n<|im_start|>assistant\n")
        answer = decode(tail[start:])
        assert answer.startswith("<think>the ")
        assert answer.endswith("]</answer><|im_end|>")


def test_loose_annotators_draw_every_side_too_far_out(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    overlaps = []
    for index in range(300):
        box = choose_reference(*sample_scene("train", index)).target.box
        loose = script.loosen(box, rng)
        width, height = box[2] - box[0], box[3] - box[1]
        for side, (inner, outer, size) in enumerate(zip(box, loose, (width, height) * 2, strict=True)):
            out = (inner - outer if side < 2 else outer - inner) / size
            at_border = outer in (0, 96)
            assert 0.05 - 1e-9 <= out <= 0.3 + 1e-9 or (at_border and out <= 0.3)
        overlaps.append(iou(box, loose))
    assert 0.5 < np.mean(overlaps) < 0.65


def test_every_word_and_number_of_the_task_is_one_token(builtin: VLMAgent) -> None:
    tokenizer = builtin.family.processor.tokenizer
    for number in range(100):
        assert len(tokenizer.encode(str(number))) == 1
    for index in range(50):
        expression = choose_reference(*sample_scene("train", index)).expression
        assert len(tokenizer.encode(f"Locate {expression}.")) == len(expression.split()) + 2
