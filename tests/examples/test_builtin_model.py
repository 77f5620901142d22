from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT

from vlmenv.agents.vlm import VLMAgent, find_model
from vlmenv.core.coordinates import iou
from vlmenv.core.formats import AnswerFormat
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


MEASURES = {
    "VLM-OVD-v0": "image_ap/mean",
    "VLM-Caption-v0": "keyword_recall",
    "VLM-Point-v0": "f1/mean",
    "VLM-Count-v0": "accuracy",
    "VLM-GUI-v0": "accuracy",
    "VLM-Seg-v0": "iou/mean",
    "VLM-OCR-v0": "accuracy",
    "VLM-Chart-v0": "accuracy",
    "VLM-Temporal-v0": "iou/mean",
}
"""By task, a measure that exact answers bring to 1."""


@pytest.mark.parametrize("name", MEASURES)
def test_loose_annotators_leave_something_to_gain(script: ModuleType, name: str) -> None:
    """Their answers are readable, and some but not all of what the task measures."""
    assert MEASURES.keys() == script.LOOSE.keys()
    task, rng = script.task_of(name), np.random.default_rng(0)
    samples = [task.source.get(index) for index in range(30)]
    means = []
    for labels in (samples, [script.LOOSE[name](sample, rng) for sample in samples]):
        pairs = zip(labels, samples, strict=True)
        told = [task.measure(task.write_answer(label), task.target(sample), {}) for label, sample in pairs]
        assert all(one["format"] == 1 for one in told)
        means.append(np.mean([one[MEASURES[name]] for one in told]))
    assert means[0] == pytest.approx(1, abs=0.03)  # outlines are written in whole numbers
    assert 0.1 < means[1] < 0.9


@pytest.mark.parametrize("name", ["VLM-Point-v0", "VLM-GUI-v0", "VLM-Count-v0", "VLM-Temporal-v0"])
def test_a_lesson_of_any_task_weighs_coordinates_fully(script: ModuleType, builtin: VLMAgent, name: str) -> None:
    rng, decode = np.random.default_rng(0), builtin.family.processor.tokenizer.decode
    for _ in range(8):
        lesson = script.other_lesson(builtin, name, "loose", rng)
        ((tail,), (weights,), (edges,)) = lesson.tails, lesson.weights, lesson.edges
        assert decode(tail).endswith("</answer><|im_end|>")
        answer = decode(tail).partition("<answer>")[2]
        numbers = re.findall(r"\d+", answer) if name in script.PLACED_TASKS else []
        assert [edges[place] for place in sorted(edges)] == [float(one) for one in numbers if len(one) < 3]
        assert sum(weight == 1 for weight in weights) == sum(1 + (len(one) > 2) for one in numbers)
        assert {*weights} <= {1.0, script.TEXT_WEIGHT}


def test_two_of_a_key_is_no_coordinate(script: ModuleType, builtin: VLMAgent) -> None:
    text = AnswerFormat.TAGS.write('[{"bbox_2d": [1, 22, 133, 44], "label": "star"}]', "2 of them")
    digits, alone = script.coordinates_in(script.encoded_answer(text, builtin), builtin)
    assert sorted(alone.values()) == [1, 22, 44]
    assert len(digits) == 5  # 133 takes two tokens


def test_every_word_and_number_of_the_task_is_one_token(builtin: VLMAgent) -> None:
    tokenizer = builtin.family.processor.tokenizer
    for number in range(100):
        assert len(tokenizer.encode(str(number))) == 1
    for index in range(50):
        expression = choose_reference(*sample_scene("train", index)).expression
        assert len(tokenizer.encode(f"Locate {expression}.")) == len(expression.split()) + 2
