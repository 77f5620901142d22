"""Prompts of several turns: system prompts, few-shot examples, and images in their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest

from vlmenv.core.errors import ConfigError
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.rollout import Turn, unbatch
from vlmenv.core.spaces import Image
from vlmenv.envs.data.rows import Row, placed
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.rec import RECEnv
from vlmenv.envs.rewards.terms import BatchTerm
from vlmenv.envs.vector import VisualTaskVectorEnv

SYSTEM: Turn = {"role": "system", "text": "Look twice."}
EXAMPLE: tuple[Turn, ...] = (
    {"role": "user", "text": "<image>Where is it?"},
    {"role": "assistant", "text": "[1, 2, 3, 4], and no <image>"},
)


def image(height: int, width: int) -> Image:
    return np.full((height, width, 3), 7, np.uint8)


class Fixed(Source):
    """Given samples."""

    def __init__(self, *samples: Sample) -> None:
        self.samples, self.size = samples, len(samples)

    def get(self, index: int) -> Sample:
        return self.samples[index]


class FixedTask(RECEnv):
    """Boxes in samples that a test gives."""

    prompt_template = "Find: {question}"
    samples: Sequence[Sample] = ()

    def builtin_source(self, split: str) -> Source:
        return Fixed(*self.samples)


def task(*samples: Sample, **arguments: Any) -> FixedTask:
    kind = type("Task", (FixedTask,), {"samples": samples})
    made = kind(**arguments)
    assert isinstance(made, FixedTask)
    return made


def sample(question: str, images: int = 1, turns: tuple[Turn, ...] = ()) -> Sample:
    return Sample("a", tuple(image(10 + i, 20) for i in range(images)), question, (1.0, 2.0, 5.0, 6.0), turns=turns)


@pytest.mark.parametrize(
    ("question", "images", "turns", "prompt"),
    [
        ("Where?", 1, (), "Find: Where?"),
        ("As <image>?", 1, (), "Find: As <image>?"),
        ("<image>Where?", 2, EXAMPLE, "<image>Find: Where?"),
        ("<image>Where, as <image>?", 3, EXAMPLE, "Find: <image>Where, as <image>?"),
        ("<image> means?", 0, (), "Find: <image> means?"),
        (" Where? ", 1, (), "Find:  Where? "),
    ],
)
def test_the_places_of_images_in_a_prompt(question: str, images: int, turns: tuple[Turn, ...], prompt: str) -> None:
    """Marks at a question's beginning precede the template, as images without marks do."""
    env = task(sample(question, images, turns))
    observation, _ = env.reset(seed=0)
    assert (observation["prompt"], observation["turns"]) == (prompt, turns)
    assert env.observation_space.contains(observation)


def test_a_system_prompt_opens_each_conversation_unless_the_row_does() -> None:
    env = task(sample("Where?", 1), system_prompt="Answer as {answer}, or {none}, in {coordinates}; {x}.")
    observation, _ = env.reset(seed=0)
    answer = AnswerFormat.TAGS.example(env.geometry.example)
    text = f"Answer as {answer}, or {AnswerFormat.TAGS.answer_only('None')}, in {env.coordinates.description}; {{x}}."
    assert observation["turns"] == ({"role": "system", "text": text},)
    few = sample("<image>Where?", 2, EXAMPLE)
    assert env.observe(few)["turns"] == ({"role": "system", "text": text}, *EXAMPLE)
    own = sample("<image>Where?", 2, (SYSTEM, *EXAMPLE))
    assert env.observe(own)["turns"] == (SYSTEM, *EXAMPLE)
    assert task(sample("Where?"), system_prompt="").reset()[0]["turns"] == ({"role": "system", "text": ""},)


@pytest.mark.parametrize(("text", "fault"), [("As <image>", "<image>"), ("{question}", "{question}")])
def test_a_system_prompt_holds_neither_image_nor_question(text: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=f"system_prompt must not contain {fault}"):
        RECEnv(system_prompt=text)


def test_environments_in_one_call_show_turns_too() -> None:
    few = sample("<image>Where?", 2, EXAMPLE)
    envs = VisualTaskVectorEnv(lambda **arguments: task(few, sample("Where?"), **arguments), 4, group_size=2)
    batch, _ = envs.reset(options={"index": [0, 1]})
    assert envs.observation_space.contains(batch)
    assert [one.get("turns") for one in unbatch(batch)] == [EXAMPLE] * 2 + [()] * 2


def test_the_built_in_tasks_show_prompts_of_one_turn() -> None:
    for name in ("VLM-REC-v0", "VLM-OVD-v0", "VLM-Math-v0", "VLM-Caption-v0", "VLM-VQA-v0", "VLM-Count-v0"):
        observation, _ = gymnasium.make(name).reset(seed=0)
        assert observation["turns"] == ()
        assert "<image>" not in observation["prompt"]


@pytest.mark.parametrize(
    ("question", "images", "turns", "heights"),
    [
        ("Where?", 2, (), [10, 11]),
        ("<image>Where?", 2, EXAMPLE, [11]),
        ("As <image> or <image>?", 3, EXAMPLE, [11, 12]),
        ("And now?", 1, EXAMPLE, [10]),
        ("And now?", 2, (*EXAMPLE, EXAMPLE[0], {"role": "assistant", "text": "<image><image>"}), [11]),
        ("Where?", 0, (), []),
    ],
)
def test_which_images_a_question_is_about(
    question: str, images: int, turns: tuple[Turn, ...], heights: list[int]
) -> None:
    assert [len(one) for one in sample(question, images, turns).asked_images] == heights


def test_boxes_belong_to_the_image_of_the_question() -> None:
    """Its size is what coordinates are fractions of, and its picture is what boxes are drawn on."""
    large, small = image(1000, 2000), image(100, 200)
    few = Sample("a", (large, small), "<image>Where?", (20.0, 10.0, 40.0, 30.0), turns=EXAMPLE)
    env = task(few, coordinates="norm1000", render_mode="rgb_array")
    env.reset(seed=0)
    _, _, _, _, info = env.step("<think>a</think>\n<answer>[100, 100, 200, 300]</answer>")
    assert info["rewards"]["iou"] == 1
    picture = env.render()
    assert picture is not None
    assert picture.shape == (400, 800, 3)


class Seen(BatchTerm):
    """Notes what it is given."""

    name = "seen"

    def __init__(self) -> None:
        self.given: list[tuple[str, int]] = []

    def batch(
        self,
        texts: Sequence[str],
        targets: Sequence[Any],
        images: Sequence[tuple[Image, ...]],
        answer_format: AnswerFormat,
        questions: Sequence[str] = (),
    ) -> list[float]:
        self.given += [(question, len(own)) for question, own in zip(questions, images, strict=True)]
        return [0.0] * len(texts)


def test_reward_terms_read_words_in_the_places_of_images() -> None:
    seen = Seen()
    samples = [sample("<image>As <image>?", 3, EXAMPLE), sample("Where?", 2)]
    env = task(*samples, rewards={"seen": 1.0}, extra_terms={"seen": seen})
    env.score_batch([""] * 2, samples)
    assert seen.given == [("As image 2?", 2), ("Where?", 2)]


@pytest.mark.parametrize(
    ("question", "images", "turns", "kept"),
    [
        ("<image>Where?", 2, EXAMPLE, "<image>Where?"),
        ("And now?", 1, EXAMPLE, "And now?"),
        (" <image>\n<image>Where? ", 2, (SYSTEM,), "Where?"),
        ("Where?", 2, EXAMPLE[1:], "Where?"),
    ],
)
def test_marks_of_question_and_turns_are_counted_together(
    question: str, images: int, turns: tuple[Turn, ...], kept: str
) -> None:
    assert placed(question, images, turns) == kept


def test_more_or_fewer_marks_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match="the question and the turns before it have 1 <image> marks for 2 images"):
        placed("Where?", 2, EXAMPLE)


def test_a_rows_turns_are_those_of_its_sample() -> None:
    row = Row("a", (), "Where?", "[1, 2, 3, 4]", turns=(SYSTEM, *EXAMPLE))
    assert RECEnv().reading().understand(row).turns == (SYSTEM, *EXAMPLE)
