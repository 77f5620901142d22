from __future__ import annotations

import numpy as np
import pytest

from vlmenv.core.rollout import (
    Completion,
    Observation,
    Prompt,
    Rollout,
    Turn,
    count_marks,
    group_neighbours,
    named_images,
    split_marks,
    unbatch,
)

TURNS: tuple[Turn, ...] = (
    {"role": "system", "text": "As in <image>."},
    {"role": "user", "text": "Is <image> like <image>?"},
    {"role": "assistant", "text": "No, <image> is none."},
)


def observation(prompt: str, shade: int) -> Observation:
    return {"images": (np.full((2, 2, 3), shade, dtype=np.uint8),), "prompt": prompt}


def test_neighbouring_copies_form_a_group() -> None:
    rows = [observation("a", 0), observation("a", 0), observation("a", 1), observation("b", 1), observation("a", 0)]
    firsts, index = group_neighbours(rows)
    assert firsts == [0, 2, 3, 4]
    assert index.tolist() == [0, 0, 1, 2, 3]


def test_a_slice_keeps_only_the_prompts_that_it_needs() -> None:
    prompts = [Prompt(np.array([i]), np.zeros((3, 1), np.int64), {}) for i in range(3)]
    completions = [Completion(str(i), np.array([i]), np.zeros(1, np.float32), "stop") for i in range(6)]
    rollout = Rollout(prompts, np.array([0, 0, 1, 1, 2, 2]), completions, 1.0)
    part = rollout[3:6]
    assert part.texts == ["3", "4", "5"]
    assert [prompt.input_ids[0] for prompt in part.prompts] == [1, 2]
    assert part.prompt_index.tolist() == [0, 1, 1]


def test_a_batched_observation_is_taken_apart() -> None:
    a, b = observation("a", 0), observation("b", 1)
    batched = {"images": (a["images"], b["images"]), "prompt": ("a", "b")}
    assert [row["prompt"] for row in unbatch(batched)] == ["a", "b"]
    assert [row["prompt"] for row in unbatch([a, b])] == ["a", "b"]
    with pytest.raises(TypeError, match=r"pass \[observation\]"):
        unbatch(a)


def test_turns_tell_observations_apart_and_are_kept_in_a_batch() -> None:
    a: Observation = {**observation("a", 0), "turns": TURNS}
    assert group_neighbours([a, {**a, "turns": TURNS[:1]}, observation("a", 0), {**a, "turns": ()}])[0] == [0, 1, 2]
    batched = {"images": (a["images"], ()), "prompt": ("a", "b"), "turns": (TURNS, ())}
    assert [row.get("turns") for row in unbatch(batched)] == [TURNS, ()]


def test_a_mark_in_an_assistant_turn_is_no_place() -> None:
    assert count_marks("And <image>?", TURNS) == 4
    assert count_marks("None.", TURNS[2:]) == 0


@pytest.mark.parametrize(
    ("text", "leading", "rest", "named"),
    [
        (" <image>\n<image> What? ", 2, "What?", "What?"),
        ("<image> Compare it with <image>", 1, "Compare it with <image>", "Compare it with image 2"),
        ("Compare <image> with <image>", 0, "Compare <image> with <image>", "Compare image 1 with image 2"),
        ("No < image >.", 0, "No < image >.", "No < image >."),
        ("<image>", 1, "", ""),
    ],
)
def test_marks_of_a_text(text: str, leading: int, rest: str, named: str) -> None:
    assert split_marks(text) == (leading, rest)
    assert named_images(text) == named


def test_a_batch_whose_parts_differ_in_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"differ in length: {'images': 1, 'prompt': 2}"):
        unbatch({"images": [()], "prompt": ["a", "b"]})
