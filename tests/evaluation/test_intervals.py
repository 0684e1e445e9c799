"""Bootstrap intervals against what is known in closed form, and paired differences."""

from __future__ import annotations

import numpy as np
import pytest

from vlm.evaluation.intervals import differences, intervals


def mean(sums):
    return {"mean": np.divide(sums["score"], sums["n"])}


def groups(scores: np.ndarray, *, size: int) -> list[dict[str, float]]:
    return [{"score": float(each.sum()), "n": float(size)} for each in scores.reshape(-1, size)]


def test_the_interval_of_a_mean_has_the_width_of_the_normal_approximation() -> None:
    scores = np.random.default_rng(1).random(400)
    found = intervals(groups(scores, size=1), mean)["mean"]
    half = 1.96 * scores.std() / 20
    assert found.value == pytest.approx(scores.mean())
    assert found.low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(scores.mean() + half, abs=0.1 * half)


def test_four_equal_answers_about_one_image_count_as_one() -> None:
    """Four copies of each score: without groups the interval would be half as wide."""
    scores = np.random.default_rng(1).random(100)
    clustered = intervals(groups(scores.repeat(4), size=4), mean)["mean"]
    apart = intervals(groups(scores, size=1), mean)["mean"]
    copied = intervals(groups(scores.repeat(4), size=1), mean)["mean"]
    assert clustered.high - clustered.low == pytest.approx(apart.high - apart.low, rel=1e-9)
    assert copied.high - copied.low == pytest.approx((apart.high - apart.low) / 2, rel=0.1)


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    """Each score is raised by 0.01: the intervals overlap almost wholly, the difference excludes 0."""
    scores = np.random.default_rng(1).random(100)
    mine, theirs = groups(scores + 0.01, size=1), groups(scores, size=1)
    apart = intervals(theirs, mean)["mean"]
    found = differences(mine, theirs, mean)["mean"]
    assert apart.low < intervals(mine, mean)["mean"].value < apart.high
    assert (found.low, found.high) == pytest.approx((0.01, 0.01))
    assert found.p == pytest.approx(2 / 2001)


def test_a_difference_of_noise_has_no_small_p() -> None:
    first, second = np.random.default_rng(2).random((2, 100))
    found = differences(groups(first, size=1), groups(second, size=1), mean)["mean"]
    assert found.low < 0 < found.high
    assert found.p > 0.05
    same = differences(groups(first, size=1), groups(first, size=1), mean)["mean"]
    assert (same.value, same.p) == (0, 1)


def test_a_metric_that_some_resamples_do_not_define_has_the_interval_of_the_others() -> None:
    """Precision of one positive in three groups: a resample without it divides by 0."""

    def precision(sums):
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"precision": np.divide(sums.get("right", 0.0), sums.get("positive", 0.0))}

    found = intervals([{"right": 1.0, "positive": 1.0}, {"positive": 0.0}, {"positive": 0.0}], precision)["precision"]
    assert found == (1, 1, 1)
