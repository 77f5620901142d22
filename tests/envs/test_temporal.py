"""`VLM-Temporal-v0` and `VLM-VideoQA-v0`: spans and their rewards by hand, layouts of rows, and the built-in clips."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from growth import growth
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmenv.core.errors import DataError
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.data.clips import WAYS, ClipQuestions, TemporalClips
from vlmenv.envs.data.scenes import COLOURS
from vlmenv.envs.data.source import Sample
from vlmenv.envs.rewards.spans import Span, TrueSpan, overlap, parse_span, timed_iou_reward
from vlmenv.envs.temporal import TemporalEnv
from vlmenv.envs.video_qa import VideoQAEnv

WRITE = AnswerFormat.TAGS.write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A video of 10 seconds."""
    first, *rest = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "lime", "white", "black")]
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=2000)
    return tmp_path


@pytest.mark.parametrize(
    ("answer", "span"),
    [
        ('{"start": 2.5, "end": 6}', (2.5, 6)),
        ('```json\n{"start": 2.5, "end": 6}\n```', (2.5, 6)),
        ('[{"start_time": "0:02.5", "end_time": "00:06"}]', (2.5, 6)),
        ("[2.5, 6]", (2.5, 6)),
        ("[[2.5, 6]]", (2.5, 6)),
        ("2.5 to 6", (2.5, 6)),
        ("12.54 to 17.83", (12.54, 17.83)),
        ("13.4-28.1", (13.4, 28.1)),
        ("From 2.5s to 6 seconds.", (2.5, 6)),
        ("2.5 - 6.0 secs", (2.5, 6)),
        ("01:02 to 1:00:03.5", (62, 3603.5)),
        ("{'start': 2.5, 'end': 6,}", (2.5, 6)),
        ("{start: 2.5, end: 6}", (2.5, 6)),
        ('```json{"Start": "2.5s", "End": "6 seconds"}```', (2.5, 6)),
        ('{"startTime": 2.5, "endTime": 6, "label": "a jump"}', (2.5, 6)),
        ('{"from": 2.5, "to": 6}', (2.5, 6)),
        ('{"start_sec": 2.5, "end_sec": 6}', (2.5, 6)),
        ('{"timestamp": [2.5, 6]}', (2.5, 6)),
        ("(2.5, 6)", (2.5, 6)),
        ("[2.5s, 6s]", (2.5, 6)),
        ("[0:02.5 - 0:06]", (2.5, 6)),
        ("[2.5, 6] seconds", (2.5, 6)),
        ("2.5s ~ 6s", (2.5, 6)),
        ("00:00:02,500 --> 00:00:06,000", (2.5, 6)),
        ("从2.5秒到6秒", (2.5, 6)),
        ("Start: 0:02.5\nEnd: 0:06", (2.5, 6)),
        ("start=2.5, end=6", (2.5, 6)),
        ("**2.5 to 6**", (2.5, 6)),
        ("\\boxed{[2.5, 6]}", (2.5, 6)),
        ('{"start": 2.5, "end": 6, "start_time": 1, "end_time": 9}', None),
        ("{'start': 2.5, 'end': 6, 'from': 1, 'to': 9}", None),
        ("{'start': 2.5, 'end': 6} or {'start': 1, 'end': 9}", None),
        ("(2.5, 6) or (1, 9)", None),
        ("{'start': 2.5, 'end': 6", None),
        ("2.5 to 6 minutes", None),
        ("3 to 3", (3, 3)),
        ("6 to 2.5", None),
        ("-1 to 3", None),
        ("2.5", None),
        ("2.5 to 6 or 7 to 9", None),
        ("the event is from 2.5 to 6", (2.5, 6)),
        ("[2.5, 6, 9]", None),
        ("[[1, 2], [3, 4]]", None),
        ('{"start": 2.5}', None),
        ('{"start": true, "end": 6}', None),
        ('{"start": 0, "end": NaN}', None),
        ('{"start": 0, "end": Infinity}', None),
        ('{"start": 0, "end": 1e999}', None),
        ("[0, 1000001]", None),
        ("0 to 9999999", None),
        ("[" * 900, None),
        ("1 to 2" + " " * 2000 + "x", None),
        ("", None),
    ],
)
def test_forms_of_spans(answer: str, span: tuple[float, float] | None) -> None:
    assert parse_span(answer) == span


@pytest.mark.parametrize(
    ("answer", "iou", "half", "timed", "form"),
    [
        ('{"start": 2, "end": 6}', 1, 1, 1, 1),
        ("2 to 6 seconds", 1, 1, 1, 0),
        ('{"start": 4, "end": 6}', 0.5, 1, 0.5 * 0.8, 1),
        ('{"start": 3, "end": 9}', 3 / 7, 0, 3 / 7 * 0.9 * 0.7, 1),
        ('{"start": 0, "end": 10}', 0.4, 0, 0.4 * 0.8 * 0.6, 1),
        ('{"start": 0, "end": 1000}', 0.004, 0, 0, 1),
        ('{"start": 6, "end": 8}', 0, 0, 0, 1),
        ('{"start": 3, "end": 3}', 0, 0, 0, 1),
        ("about three", 0, 0, 0, 0),
    ],
)
def test_rewards_by_hand(folder: Path, answer: str, iou: float, half: float, timed: float, form: float) -> None:
    """The truth is from 2 to 6 of 10 seconds."""
    rows = [{"question": "When?", "answer": [2, 6], "video": "a.gif"}]
    terms = {"iou": 1.0, "iou@0.5": 1.0, "timed_iou": 1.0, "format": 1.0}
    env = TemporalEnv(dataset=rows, image_root=folder, rewards=terms)
    sample = env.source.get(0)
    score = env.score(WRITE(answer), sample)
    expected = {"iou": iou, "iou@0.5": half, "timed_iou": timed, "format": form}
    assert score.terms == pytest.approx(expected)
    measured = env.measure(WRITE(answer), env.target(sample), score.terms)
    assert measured["iou/mean"] == pytest.approx(iou)
    assert [measured[f"accuracy@{least}"] for least in (0.3, 0.5, 0.7)] == [iou >= 0.3, iou >= 0.5, iou >= 0.7]
    assert measured["unparsable"] == (answer == "about three")


SPANS = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted)


@settings(max_examples=300, deadline=None)
@given(SPANS, SPANS)
def test_the_overlap_is_that_of_counted_seconds(one: list[int], other: list[int]) -> None:
    """And timed IoU is at most it."""
    a, b = ({*range(*span)} for span in (one, other))
    right = len(a & b) / len(a | b) if a | b else 0.0
    assert overlap(Span(*one), Span(*other)) == pytest.approx(right)
    assert 0 <= timed_iou_reward("", TrueSpan(*other, 60), Span(*one)) <= right + 1e-12


@settings(max_examples=300, deadline=1000)
@given(st.text('0123456789:.-to{}[]",se \n') | st.text())
def test_any_text_is_a_span_in_order_or_none(text: str) -> None:
    span = parse_span(text)
    assert span is None or (math.isfinite(span.end) and 0 <= span.start <= span.end)


@pytest.mark.parametrize("piece", ["1:", "1 ", "[", "{", '{"start":', "1 to ", ". ", "```json\n"])
def test_long_answers_take_no_longer(piece: str) -> None:
    assert growth(lambda size: parse_span(piece * size), 100_000) < 24


LAYOUTS: dict[str, dict[str, Any]] = {
    "Time-R1": {"sentence": "A dog runs.", "timestamp": [2.0, 6.0], "duration": 10, "qid": "x", "video_start": None},
    "Charades-STA of lmms-eval": {"caption": "A dog runs.", "timestamp": [2.0, 6.0]},
    "QVHighlights": {"query": "A dog runs.", "relevant_windows": [[2, 6]], "vid": "abc"},
    "TVGBench": {"question": "A dog runs.", "answer": "2.0-6.0", "start": None, "end": None},
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "video", "video": "a.gif"}, {"type": "text", "text": "A dog runs"}]},
            {"role": "assistant", "content": "<think>I look.</think><answer>2 to 6</answer>"},
        ],
        "video": None,
    },
    "LLaVA": {
        "conversations": [
            {"from": "human", "value": "<video>\nA dog runs"},
            {"from": "gpt", "value": '{"start": 2, "end": 6}'},
        ]
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_public_layouts(folder: Path, layout: str) -> None:
    file = folder / "rows.json"
    file.write_text(json.dumps([{"video": "a.gif"} | LAYOUTS[layout]]))
    env = TemporalEnv(dataset=file)
    observation, _ = env.reset(options={"index": 0})
    assert "A dog runs" in observation["prompt"]
    assert "<video>" not in observation["prompt"]
    assert len(observation["videos"]) == 1
    assert env.target(env.source.get(0)) == (2, 6, 10)
    assert env.step(env.write_answer(env.source.get(0)))[1] == pytest.approx(1.1)


def test_choices_about_videos_as_of_seed_bench_r1(folder: Path) -> None:
    """Its rows, with a frame of now beside the video of before."""
    Image.new("RGB", (40, 30)).save(folder / "now.png")
    choices = {f"choice_{letter}": text for letter, text in zip("abcd", ("open", "close", "cut", "wash"), strict=True)}
    row = {"question": "What is next?", "golden_choice": "B", "video": "a.gif", "image": "now.png", **choices}
    env = VideoQAEnv(dataset=[row], image_root=folder, columns={"answer": "golden_choice"})
    observation, _ = env.reset(options={"index": 0})
    assert "(A) open\n(B) close" in observation["prompt"]
    assert (len(observation["images"]), len(observation["videos"])) == (1, 1)
    assert env.score(WRITE("B"), env.source.get(0)).reward > env.score(WRITE("A"), env.source.get(0)).reward


@pytest.mark.parametrize("answer", ["soon", [6, 2], [3, 3], [[1, 2], [3, 4]], 5])
def test_a_truth_is_one_span_with_a_length(folder: Path, answer: Any) -> None:
    with pytest.raises(DataError, match=r"row 0: the answer .* is no single span"):
        TemporalEnv(dataset=[{"question": "?", "answer": answer, "video": "a.gif"}], image_root=folder)


def test_clips_show_what_is_true_of_them() -> None:
    """A colour that one shape has is there within the shape's span, and at no other time."""
    checked = 0
    for sample in map(TemporalEnv().source.get, range(30)):
        masks = masks_of(sample)
        (start, end), (video,) = sample.target, sample.videos
        if is_alone(masks):
            checked += 1
            seen = [bool(mask.sum() > 60) for mask in masks]
            assert seen == [start <= second < end for second in video.seconds]
    assert checked > 10


def masks_of(sample: Sample) -> list[Any]:
    """Where the colour of which a question speaks is, in each frame."""
    colour = next(COLOURS[word] for word in sample.question.split() if word in COLOURS)
    return [(np.abs(frame.astype(int) - colour).max(-1) < 25) for frame in sample.videos[0].frames]


def is_alone(masks: list[Any]) -> bool:
    """Whether one quarter alone has the colour, as each shape keeps to a quarter of its own."""
    return len({tuple(place) for mask in masks for place in (np.argwhere(mask) // 48).tolist()}) == 1


def test_streams_are_apart_and_the_same_each_time() -> None:
    for kind in (TemporalClips, ClipQuestions):
        train, held = (kind(split, TemporalEnv().frame_rule) for split in ("train", "eval"))
        asked = [[(s.question, s.videos[0].frames.tobytes()) for s in map(one.get, range(30))] for one in (train, held)]
        assert not {*asked[0]} & {*asked[1]}
        assert train.get(7).videos == train.get(7).videos


def test_questions_are_of_every_kind_and_answer() -> None:
    samples = [VideoQAEnv().source.get(index) for index in range(200)]
    assert {sample.subject for sample in samples} == {"direction", "first", "number", "before"}
    for subject, answers in {"before": {"yes", "no"}, "number": {"2", "3", "4"}, "direction": {*"ABCD"}}.items():
        found = [sample.target.text for sample in samples if sample.subject == subject]
        assert {*found} == answers
        assert max(found.count(one) for one in answers) < 0.75 * len(found)  # nothing to gain by always saying one


def test_directions_are_those_of_the_pixels() -> None:
    checked = 0
    for sample in map(VideoQAEnv(video_fps=8.0).source.get, range(120)):
        if sample.subject != "direction":
            continue
        masks = masks_of(sample)
        centres = [np.argwhere(mask).mean(0)[::-1] for mask in masks if mask.sum() > 60]
        moved = (centres[-1] - centres[0]) / 10
        options = dict(line[1:].split(") ") for line in sample.question.splitlines()[1:])
        way = WAYS[options[sample.target.text]]
        if is_alone(masks):
            checked += 1
            assert float(np.dot(moved, way)) > 0.5
            assert abs(float(np.dot(moved, way[::-1]))) < 0.5
    assert checked > 5


def test_the_picture_has_a_bar_for_truth_and_answer(folder: Path) -> None:
    env = TemporalEnv(render_mode="rgb_array")
    env.reset(options={"index": 0})
    before = env.render()
    env.step(WRITE("1 to 2"))
    after = env.render()
    blue, orange = (0, 114, 178), (213, 94, 0)
    has = [[bool((picture == colour).all(-1).any()) for colour in (blue, orange)] for picture in (before, after)]
    assert has == [[True, False], [True, True]]
    assert after.shape[0] > before.shape[0]
