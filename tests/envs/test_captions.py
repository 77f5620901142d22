from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from vlmenv.core.answers import Answer, Caption
from vlmenv.core.formats import SECTIONS, AnswerFormat
from vlmenv.envs.captioning import described_keywords_reward
from vlmenv.envs.data.captions import CaptionScenes, describe, keywords, place, questions
from vlmenv.envs.data.scenes import COLOURS, SHAPES, Scene, Shape, sample_scene

RED = Shape("large", "red", "circle", (2.0, 40.0, 34.0, 72.0))
BLUE = Shape("small", "blue", "star", (70.0, 2.0, 90.0, 22.0))
PAIR = Scene(np.zeros((96, 96, 3), np.uint8), (BLUE, RED))


def test_a_description_tells_every_shape_from_left_to_right() -> None:
    third = Shape("small", "blue", "square", (40.0, 70.0, 60.0, 90.0))
    assert describe(PAIR) == "a large red circle on the left and a small blue star at the top right"
    assert describe(Scene(PAIR.image, (BLUE, third, RED))) == (
        "a large red circle on the left, a small blue square at the bottom and a small blue star at the top right"
    )
    assert describe(Scene(PAIR.image, (BLUE,))) == "a small blue star at the top right"


def test_places_are_ninths() -> None:
    middles = {"left": 10.0, "": 48.0, "right": 90.0}
    for column, x in middles.items():
        for row, y in {"top": 10.0, "": 48.0, "bottom": 90.0}.items():
            words = place(Shape("small", "red", "star", (x - 5, y - 5, x + 5, y + 5))).split()
            assert words[-1] == (column or row or "centre")
            assert (row in words) if row else not {"top", "bottom"} & set(words)


def test_descriptions_can_be_read_back() -> None:
    for index in range(100):
        scene, _ = sample_scene("eval", index)
        told = re.findall(r"a (small|large) (\w+) (\w+) (?:on|at|in) the", describe(scene))
        assert Counter(told) == Counter((shape.size, shape.colour, shape.kind) for shape in scene.shapes)


def test_keywords_are_the_colours_and_kinds() -> None:
    assert keywords(PAIR) == ("red", "blue", "circle", "star")
    for index in range(50):
        sample = CaptionScenes("train").get(index)
        assert len(set(sample.target.keywords)) == len(sample.target.keywords)
        assert set(sample.target.keywords) <= {*COLOURS, *SHAPES}
        assert all(word in sample.rationale for word in sample.target.keywords)


def test_questions_have_the_right_answers() -> None:
    """Checked by counting, independently of how they were made."""
    for index in range(100):
        scene, _ = sample_scene("eval", index)
        for question, answer in questions(scene):
            counted = re.fullmatch(r"how many (\w+)s are there\?", question)
            if counted:
                expected = sum(counted[1] in ("shape", shape.kind) for shape in scene.shapes)
                assert answer == Answer(str(expected), "numeric")
            else:
                assert question.startswith("what colour is the ")
                assert answer.kind == "exact"
                assert answer.text in {shape.colour for shape in scene.shapes}
                assert not set(COLOURS) & set(re.findall(r"\w+", question))


def test_the_colour_asked_for_is_that_of_the_shape_named() -> None:
    asked = dict(questions(PAIR))
    assert asked["what colour is the largest shape?"].text == "red"
    assert asked["what colour is the star?"].text == "blue"
    assert asked["what colour is the top-most shape?"].text == "blue"
    assert asked["how many circles are there?"].text == "1"
    assert asked["how many squares are there?"].text == "0"


@pytest.mark.parametrize("split", ["train", "eval"])
def test_samples_are_scenes_with_varied_questions(split: str) -> None:
    source = CaptionScenes(split)  # type: ignore[arg-type]
    assert source.size is None
    samples = [source.get(index) for index in range(60)]
    for index, sample in enumerate(samples):
        scene, _ = sample_scene(split, index)  # type: ignore[arg-type]
        np.testing.assert_array_equal(sample.images[0], scene.image)
        assert (sample.id, sample.subject) == (f"caption-{split}-{index}", "caption")
        assert sample.rationale == describe(scene)
        said, _, question = sample.question.partition(" Then answer: ")
        assert said == "Describe the image."
        assert dict(questions(scene))[question] == sample.target.answer
    assert len({sample.question for sample in samples}) > 10
    assert {sample.target.answer.kind for sample in samples} == {"numeric", "exact"}
    assert source.get(7).question == samples[7].question


TEN = ("cat", "dog", "car", "bus", "tree", "lamp", "bench", "bird", "boat", "sign")


def test_key_words_count_in_the_description_alone() -> None:
    words, written = " ".join(TEN), AnswerFormat.SECTIONS.write
    cases = {
        written("1", words): 1.0,
        written("1", "a cat and a dog"): 0.2,
        written(words, "."): 0.0,
        written("1", ".").replace(SECTIONS[1], f"{SECTIONS[1]} {words}"): 0.0,
        written("1", ".").replace("### Step 1:", f"### Step 1: {words}"): 0.0,
        f"{SECTIONS[0]} .\n{SECTIONS[3]} {words}": 0.0,  # no heading closes the description but the answer's
        f"{SECTIONS[3]} {words}": 0.0,
        words: 0.0,
    }
    for text, share in cases.items():
        assert described_keywords_reward(text, Caption(TEN), AnswerFormat.SECTIONS) == share, text
    tags = {
        f"<think>{words}</think><answer>1</answer>": 1.0,
        f"<think>.</think><answer>{words}</answer>": 0.0,
        f"<think>.<answer>{words}</answer>": 0.0,
    }
    for text, share in tags.items():
        assert described_keywords_reward(text, Caption(TEN), AnswerFormat.TAGS) == share, text
