from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from vlmenv.envs.metrics.intervals import bootstrap_draws, number_clusters, percentile_interval, ratio_interval


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
