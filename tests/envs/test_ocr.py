"""`VLM-OCR-v0`: edit distances, what texts earn, and the built-in pictures."""

from __future__ import annotations

from typing import Any

import pytest
from distances import table_distance
from growth import growth
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmenv.core.errors import DataError
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.ocr import OCREnv
from vlmenv.envs.rewards.answers import edit_distance
from vlmenv.envs.rewards.transcripts import plain_text, similarity_reward

PICTURE = Image.new("RGB", (40, 30))


@settings(max_examples=150, deadline=None)
@given(st.text("abc d", max_size=80), st.text("abc d", max_size=80))
def test_the_distance_is_that_of_the_table(a: str, b: str) -> None:
    assert edit_distance(a, b) == table_distance(a, b)
    assert edit_distance(a.split(), b.split()) == table_distance(a.split(), b.split())


@pytest.mark.parametrize(
    ("answer", "true", "similarity", "cer", "wer", "exact"),
    [
        ("the red cat", "the red cat", 1, 1, 1, 1),
        (" the\n red  cat ", "the red\ncat", 1, 1, 1, 1),
        ("the red car", "the red cat", 10 / 11, 10 / 11, 2 / 3, 0),
        ("The red cat", "the red cat", 10 / 11, 10 / 11, 2 / 3, 0),
        ("the cat", "the red cat", 7 / 11, 7 / 11, 2 / 3, 0),
        ("the red cat the red cat", "the red cat", 11 / 23, 0, 0, 0),  # 12 insertions for 11 characters
        ("```text\nthe red\ncat\n```", "the red cat", 1, 1, 1, 1),
        ("```\nthe red\ncat\n```", "the ```red``` cat", 11 / 17, 11 / 17, 2 / 3, 0),
        ("abcde", "ab", 2 / 5, 0, 0, 0),
        ("kitten", "sitting", 4 / 7, 4 / 7, 0, 0),
        ("e\u0301", "\u00e9", 1, 1, 1, 1),  # composed
        ("x" * 20_001, "x", 0, 0, 0, 0),
    ],
)
def test_rewards_by_hand(answer: str, true: str, similarity: float, cer: float, wer: float, exact: float) -> None:
    rewards = {"similarity": 1.0, "cer": 1.0, "wer": 1.0, "exact": 1.0}
    env = OCREnv(dataset=[{"image": PICTURE, "question": "?", "answer": true}], rewards=rewards)
    score = env.score(AnswerFormat.TAGS.write(answer), env.source.get(0))
    assert score.terms == pytest.approx({"similarity": similarity, "cer": cer, "wer": wer, "exact": exact})


@pytest.mark.parametrize(
    ("answer", "edits", "words"),
    [("the red car", 1, 1), ("the red cat the red cat", 12, 3), (None, 11, 3), ("x" * 30_000, 11, 3)],
)
def test_metrics_by_hand(answer: str | None, edits: float, words: float) -> None:
    env = OCREnv(dataset=[{"image": PICTURE, "question": "?", "answer": "the red cat"}])
    text = "" if answer is None else AnswerFormat.TAGS.write(answer)
    measured = env.measure(text, env.target(env.source.get(0)), {})
    names = ("characters/edits", "characters/true", "words/edits", "words/true")
    assert [measured[name] for name in names] == [edits, 11, words, 3]
    assert env.ratios == {"CER": names[:2], "WER": names[2:]}


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"text": "A red\ncat"}, "Read the text in the image."),  # Teklia/IAM-line and others of `image` and `text`
        ({"problem": "Read it.", "solution": "A red cat"}, "Read it."),
        ({"query": "<image>Read it.", "response": "A red cat"}, "Read it."),
    ],
)
def test_own_truths_score_1_in_each_layout(row: dict[str, Any], question: str) -> None:
    env = OCREnv(dataset=[{"image": PICTURE, **row}])
    sample = env.source.get(0)
    assert (sample.question, sample.target) == (question, "A red cat")
    assert env.score(env.write_answer(sample), sample).terms == {"similarity": 1, "format": 1}


def test_a_fence_around_a_truth_is_no_text_either() -> None:
    env = OCREnv(dataset=[{"image": PICTURE, "question": "?", "answer": "```\nx = 1\n```"}])
    sample = env.source.get(0)
    assert sample.target == "x = 1"
    assert [
        env.score(AnswerFormat.TAGS.write(text), sample).terms["similarity"] for text in ("x = 1", "```\nx = 1\n```")
    ] == [1, 1]


def test_truths_without_text_or_with_too_much_are_refused() -> None:
    for text in ("  ", "x" * 20_001):
        with pytest.raises(DataError, match="row 0: "):
            OCREnv(dataset=[{"image": PICTURE, "question": "?", "answer": text}])


@pytest.mark.parametrize("answer", [["Tea 2"], ["Tea 2", "Tea  2"], "Tea 2"])
def test_a_list_of_one_text_is_this_text(answer: Any) -> None:
    env = OCREnv(dataset=[{"image": PICTURE, "question": "?", "answer": answer}])
    assert env.source.get(0).target == "Tea 2"


@pytest.mark.parametrize("answer", [["3.5g", "3.5 g"], {"text": "Tea"}, [["Tea"]], [{"text": "Tea"}]])
def test_answers_that_are_no_single_text_are_refused(answer: Any) -> None:
    with pytest.raises(DataError, match=r"is no single text\. Questions with several right answers are for VLM-VQA-v0"):
        OCREnv(dataset=[{"image": PICTURE, "question": "?", "answer": answer}])


def test_the_built_in_texts_fit_their_pictures() -> None:
    """Ink reaches no border before the noise, sizes and fonts vary, and the streams have no text in common."""
    texts = []
    for split in ("train", "eval"):
        env = OCREnv(split=split)
        samples = [env.source.get(index) for index in range(40)]
        assert len({sample.subject for sample in samples}) == 5
        for sample in samples:
            edge, pixels = sample.images[0][:2].astype(int), sample.images[0].astype(int)
            assert abs(edge.mean() - pixels.mean()) > 2  # there is ink, and not in the first rows
            assert sample.target == plain_text(sample.target)
        texts.append({sample.target for sample in samples})
        assert (env.source.get(3).images[0] == samples[3].images[0]).all()
    assert not texts[0] & texts[1]


@pytest.mark.slow
def test_long_texts_take_time_in_proportion_or_are_refused() -> None:
    true = "the red cat " * 1000

    def score(size: int) -> float:
        return similarity_reward("", true, plain_text("a\u0315\u0300 cat " * size)[:20_000])

    assert growth(score, 200) < 24
