from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from vlmenv.envs.metrics.intervals import (
    _hypotenuse,
    bootstrap_draws,
    metric_interval,
    number_clusters,
    paired_interval,
    percentile_interval,
    ratio_interval,
    wilson_interval,
)


def test_equals_a_plain_loop() -> None:
    """Clusters are drawn whole, sums taken of their rows, and the percentiles found by interpolation in a list."""
    rng = np.random.default_rng(0)
    clusters = [f"question {i}" for i in rng.integers(7, size=25)]
    numerators, denominators = rng.random(25).tolist(), rng.random(25).tolist()
    names = list(dict.fromkeys(clusters))
    values = []
    for drawn in bootstrap_draws(len(names), resamples=41, seed=3):
        rows = [row for number in drawn for row in range(25) if clusters[row] == names[number]]
        values.append(sum(numerators[row] for row in rows) / sum(denominators[row] for row in rows))
    values.sort()
    found = ratio_interval(numerators, denominators, clusters=clusters, resamples=41, seed=3)
    assert found == pytest.approx((sum(numerators) / sum(denominators), values[1], values[39]), abs=1e-12)


def test_draws_are_as_many_as_there_are_questions() -> None:
    draws = list(bootstrap_draws(50, resamples=2000))
    assert len(draws) == 2000
    assert all(len(drawn) == 50 for drawn in draws)
    counts = np.bincount(np.concatenate(draws), minlength=50)
    assert len(counts) == 50
    np.testing.assert_allclose(counts, 2000, atol=5 * 2000**0.5)
    assert np.mean([len(set(drawn.tolist())) for drawn in draws]) == pytest.approx(50 * (1 - 0.98**50), rel=0.01)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_of_many_rows_it_is_the_normal_interval(share: float) -> None:
    rows = np.arange(2000) < 2000 * share
    half = 1.96 * math.sqrt(share * (1 - share) / 2000)
    found = ratio_interval(rows, resamples=4000)
    assert found == pytest.approx((share, share - half, share + half), abs=0.1 * half)


@pytest.mark.slow
def test_holds_the_true_share_of_most_data_sets() -> None:
    """300 data sets of 100 rows: 95 % of the intervals, within three standard errors of such a count."""
    rng = np.random.default_rng(0)
    found = [ratio_interval(rng.random(100) < 0.3, resamples=200, seed=i) for i in range(300)]
    assert np.mean([interval.low <= 0.3 <= interval.high for interval in found]) == pytest.approx(0.94, abs=0.038)


def test_answers_to_one_question_are_no_new_evidence() -> None:
    rows = np.random.default_rng(0).random(200)
    copies, questions = np.repeat(rows, 8), np.repeat(np.arange(200), 8)
    once, clustered, apart = ratio_interval(rows), ratio_interval(copies, clusters=questions), ratio_interval(copies)
    assert clustered == pytest.approx(once, abs=1e-12)
    assert (once.high - once.low) / (apart.high - apart.low) == pytest.approx(8**0.5, rel=0.1)


def test_resamples_without_denominators_are_left_out() -> None:
    assert ratio_interval([1, 0, 0], [1, 0, 0]) == (1, 1, 1)
    assert np.isnan(ratio_interval([0, 0], [0, 0])).all()


def test_a_single_question_has_no_interval() -> None:
    assert ratio_interval([0.25]) == pytest.approx((0.25, math.nan, math.nan), nan_ok=True)
    assert ratio_interval([0, 1], clusters=["q", "q"]) == pytest.approx((0.5, math.nan, math.nan), nan_ok=True)
    assert np.isnan(ratio_interval([])).all()


def test_rows_that_are_not_numbers_are_not_passed_over() -> None:
    assert np.isnan(ratio_interval([1, math.nan, 0])).all()


def test_clusters_must_be_as_many_as_rows() -> None:
    with pytest.raises(ValueError, match="length"):
        ratio_interval([1, 2, 3], clusters=[0, 1])


def test_the_seed_decides() -> None:
    rows = np.random.default_rng(0).random(30)
    assert ratio_interval(rows) == ratio_interval(rows)
    assert ratio_interval(rows, seed=1).low != ratio_interval(rows).low


def test_centred_values_are_moved_to_the_metric() -> None:
    values = [*range(101), math.nan]
    assert percentile_interval(60, values) == (60, 2.5, 97.5)
    assert percentile_interval(60, values, centred=True) == (60, 12.5, 107.5)


def test_clusters_are_numbered_as_they_come() -> None:
    assert number_clusters(["b", "a", "b", ("c", 1)]).tolist() == [0, 1, 0, 2]


def test_memory_is_bounded() -> None:
    rows = np.ones(100_000)
    tracemalloc.start()
    ratio_interval(rows, resamples=50)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (8, 10, 0.4902, 0.9433),
        (1, 1, 0.2065, 1.0),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_by_hand(hits: int, count: int, low: float, high: float) -> None:
    """At 0: z² / (n + z²) = 3.8415 / 13.8415. The last four are Newcombe's (1998, page 861, method 3)."""
    assert wilson_interval(hits, count) == pytest.approx((hits / count, low, high), abs=5e-5)


def test_proportions_have_wilson_intervals() -> None:
    assert metric_interval([1.0] * 12) == wilson_interval(12, 12)
    assert metric_interval([1, 0, 0, 1], [1, 1, 0, 1]) == wilson_interval(2, 3)  # of three that count
    assert metric_interval([0.2, 1, 0]) == ratio_interval([0.2, 1, 0])
    assert metric_interval([1, 2], [1, 3]) == ratio_interval([1, 2], [1, 3])
    assert np.isnan(metric_interval([0, 0], [0, 0])).all()


def test_several_answers_to_a_few_questions_count_as_questions() -> None:
    """All right: the bootstrap would have no width. Of many questions it has one, and is taken."""
    questions = np.repeat(np.arange(6), 4)
    assert metric_interval(np.ones(24), clusters=questions) == wilson_interval(6, 6)
    many, rows = np.repeat(np.arange(100), 4), np.random.default_rng(0).random(400) < 0.5
    assert metric_interval(rows, clusters=many) == ratio_interval(rows, clusters=many)


def paired(both: int, lost: int, won: int, neither: int) -> tuple[list[int], list[int]]:
    """Verdicts before and after."""
    return [1] * (both + lost) + [0] * (won + neither), [1] * both + [0] * lost + [1] * won + [0] * neither


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ((36, 2, 12, 0), (0.2, 0.0569, 0.3404)),
        ((20, 2, 12, 16), (0.2, 0.0562, 0.3292)),
        ((36, 0, 14, 0), (0.28, 0.1528, 0.4167)),
        ((18, 0, 14, 18), (0.28, 0.1441, 0.3963)),
    ],
)
def test_paired_proportions_are_newcombes(table: tuple[int, int, int, int], expected: tuple[float, ...]) -> None:
    """His own examples (Statistics in Medicine 17, 1998, table IV, method 10)."""
    before, after = paired(*table)
    assert paired_interval((before, 1.0), (after, 1.0)) == pytest.approx(expected, abs=5e-5)
    value, low, high = paired_interval((after, 1.0), (before, 1.0))
    assert (-value, -high, -low) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_wilson_intervals_are_joined_as_newcombe_does(
    first: tuple[int, int], second: tuple[int, int], low: float, high: float
) -> None:
    """Without correlation it is his tenth interval of independent proportions (Statistics in Medicine 17, 1998)."""
    one, other = wilson_interval(*first), wilson_interval(*second)
    difference = one.value - other.value
    assert difference - _hypotenuse(one.value - one.low, other.high - other.value, 0) == pytest.approx(low, abs=5e-5)
    assert difference + _hypotenuse(one.high - one.value, other.value - other.low, 0) == pytest.approx(high, abs=5e-5)


def test_nothing_that_changes_is_no_proof_of_no_change() -> None:
    value, low, high = paired_interval(([1, 1, 0], 1.0), ([1, 1, 0], 1.0))
    assert value == 0
    assert low < -0.1 < 0.1 < high


@pytest.mark.slow
def test_paired_intervals_hold_the_true_change() -> None:
    """Of 40 questions, of which the same are right twice as often as by chance; 95 % or a little more hold it."""
    rng, held = np.random.default_rng(0), []
    for _ in range(2000):
        before, other = rng.random(40) < 0.5, rng.random(40) < 0.7
        after = np.where(rng.random(40) < 0.5, before, other)  # right with 0.5 * 0.5 + 0.5 * 0.7
        interval = paired_interval((before, 1.0), (after, 1.0))
        held.append(interval.low <= 0.1 <= interval.high)
    assert 0.94 < np.mean(held) < 0.985


def test_the_paired_change_of_a_mean_is_that_of_the_differences() -> None:
    """The same resamples of differences, and narrower than two intervals apart where questions differ much."""
    rng = np.random.default_rng(0)
    before = rng.random(60)
    after = before + rng.normal(0.05, 0.02, 60)
    found = paired_interval((before, 1.0), (after, 1.0))
    assert found == pytest.approx(ratio_interval(after - before), abs=1e-12)
    normal = 1.96 * (after - before).std(ddof=1) / 60**0.5
    assert (found.high - found.low) / 2 == pytest.approx(normal, rel=0.15)
    apart = ratio_interval(before)
    assert found.high - found.low < (apart.high - apart.low) / 5


def test_the_paired_change_of_a_ratio_by_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    over, under, later, below = rng.random((4, 12))
    clusters = [i // 3 for i in range(12)]
    values = []
    for drawn in bootstrap_draws(4):
        rows = [3 * number + i for number in drawn for i in range(3)]
        values.append(later[rows].sum() / below[rows].sum() - over[rows].sum() / under[rows].sum())
    found = paired_interval((over, under), (later, below), clusters=clusters)
    value = later.sum() / below.sum() - over.sum() / under.sum()
    assert found == pytest.approx((value, *np.quantile(values, (0.025, 0.975))), abs=1e-12)
