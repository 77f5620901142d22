"""`VLM-Chart-v0`: the built-in charts show what is true of them, and rows of ChartQA are read."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.charts import ChartEnv
from vlmenv.envs.data import charts
from vlmenv.envs.data.charts import Chart, ChartQuestions

WRITE = AnswerFormat.TAGS.write
DRAW = dict(charts._DRAW)
SAMPLES = [ChartQuestions("train").get(index) for index in range(150)]


def drawn(monkeypatch: pytest.MonkeyPatch, kind: str, count: int) -> list[tuple[Chart, Any]]:
    """Charts as they were decided, with their pictures."""
    seen: list[Chart] = []

    def noting(pen: Any, chart: Chart, rng: np.random.Generator) -> None:
        seen.append(chart)
        DRAW[kind](pen, chart, rng)

    monkeypatch.setattr(charts, "_DRAW", {kind: noting})
    images = [ChartQuestions("train").get(index).images[0] for index in range(count)]
    return list(zip(seen, images, strict=True))


def test_bars_are_as_high_as_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    for chart, image in drawn(monkeypatch, "bar", 20):
        step = (charts.WIDTH - 8 - 32) / len(chart.names)
        for number, value in enumerate(chart.values):
            column = image[: charts.HEIGHT - 24, round(32 + step * (number + 0.3))]
            ink = column[-4]
            rows = np.flatnonzero((column == ink).all(-1))
            shown = (charts.HEIGHT - 24 - rows.min()) / (charts.HEIGHT - 36) * 100
            assert shown == pytest.approx(value, abs=1)


def test_sectors_are_as_large_as_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    for chart, image in drawn(monkeypatch, "pie", 20):
        assert sum(chart.values) == 100
        side = charts.HEIGHT - 24
        key = [image[24 + 22 * number, side + 29] for number in range(len(chart.names))]
        pie = image[12 : 13 + side, 12 : 13 + side].reshape(-1, 3)
        areas = np.array([(pie == tint).all(-1).sum() for tint in key])
        np.testing.assert_allclose(areas / areas.sum() * 100, chart.values, atol=2)


def test_points_of_a_line_are_at_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    for chart, image in drawn(monkeypatch, "line", 20):
        step = (charts.WIDTH - 8 - 32) / len(chart.names)
        for number, value in enumerate(chart.values):
            x, y = 32 + step * (number + 0.5), charts.height_of(value)
            assert (image[round(y), round(x)] == image[round(y) + 1, round(x)]).all()  # within the dot
            assert value == pytest.approx((charts.HEIGHT - 24 - y) / (charts.HEIGHT - 36) * 100)


def test_answers_follow_from_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an own computation from the names in the question."""
    checked = set()
    for kind in ("bar", "line", "pie"):
        for index, (chart, _) in enumerate(drawn(monkeypatch, kind, 60)):
            sample = ChartQuestions("train").get(index)
            assert answer_to(sample.question, dict(zip(chart.names, chart.values, strict=True))) == sample.target.text
            checked.add(sample.question.partition(" ")[0] + sample.question.partition("is")[2][:5])
    assert len(checked) >= 6


def answer_to(question: str, values: dict[str, int]) -> str:
    named = [values[word] for word in re.findall(r"\w+", question) if word in values]
    if question.startswith("What is the value"):
        return str(named[0])
    if question.startswith("Which"):
        choose = max if "highest" in question else min
        return choose(values, key=values.__getitem__)
    if question.startswith("What is the sum"):
        return str(sum(named))
    if question.startswith("By how much"):
        return str(named[0] - named[1])
    if question.startswith("Is the value"):
        return "yes" if named[0] > named[1] else "no"
    least = int(re.findall(r"\d+", question)[-1])
    return str(sum(value > least for value in values.values()))


def test_streams_are_apart_and_the_same_each_time() -> None:
    held = {(one.question, one.images[0].tobytes()) for one in map(ChartQuestions("eval").get, range(150))}
    assert not held & {(one.question, one.images[0].tobytes()) for one in SAMPLES}
    again = ChartQuestions("train").get(9)
    assert np.array_equal(again.images[0], SAMPLES[9].images[0])
    assert {one.subject for one in SAMPLES} == {"bar", "line", "pie"}


@pytest.mark.parametrize(
    ("answer", "reward"),
    [("40", 1), ("41.9", 1), ("42.1", 0), ("38", 1), ("37.9", 0), ("40 %", 1), ("forty", 0), ("40 or 60", 0)],
)
def test_numbers_within_5_percent_are_right(answer: str, reward: float) -> None:
    rows = [{"image": Image.new("RGB", (20, 20)), "query": "How much is Tea?", "label": ["40"], "human_or_machine": 0}]
    env = ChartEnv(dataset=rows)
    score = env.score(WRITE(answer), env.source.get(0))
    assert score.terms["relaxed"] == reward
    measured = env.measure(WRITE(answer), env.target(env.source.get(0)), score.terms)
    assert (measured["relaxed"], measured["accuracy"]) == (reward, float(answer in ("40", "40 %")))
    assert math.isclose(score.reward, reward + 0.1)
