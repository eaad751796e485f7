"""Intervals against closed forms and simulations with known answers; verdicts at their edges."""

import numpy as np
import pytest

from trainers.recipes.statistics import bootstrap, by_seed, claim, mean_interval, paired_interval, verdict


def test_the_interval_of_three_values_is_students():
    mean, (low, high) = mean_interval([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.302653, standard error 1 / sqrt(3)
    assert mean == 2
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)


def test_one_run_gives_no_interval():
    assert mean_interval([0.5]) == (0.5, [None, None])


def test_pairing_removes_what_the_arms_of_a_seed_share():
    shared = np.random.default_rng(0).normal(0, 100, 5)
    mean, (low, high) = paired_interval(list(shared - 1), list(shared))
    assert (mean, low, high) == pytest.approx((-1, -1, -1), abs=1e-9)  # rounding of 100 +- 1


def test_the_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(100):
        data = rng.exponential(1.0, 80)
        _, (low, high) = bootstrap(list(data), resamples=400, seed=seed)
        hits += low <= 1.0 <= high
    # 95 of 100 expected, a little fewer for skewed data; 4 standard deviations are 9
    assert 84 <= hits <= 100


def test_the_paired_bootstrap_is_that_of_the_differences():
    rng = np.random.default_rng(2)
    ours, theirs = rng.normal(size=40), rng.normal(size=40)
    assert bootstrap(list(ours), list(theirs), seed=3) == bootstrap(list(ours - theirs), seed=3)


@pytest.mark.parametrize(
    ("interval", "side", "said"),
    [
        ([0.1, 0.2], "above", "holds"),
        ([-0.2, -0.1], "above", "fails"),
        ([-0.1, 0.1], "above", "inconclusive"),
        ([0.0, 0.1], "above", "inconclusive"),
        ([-0.2, -0.1], "below", "holds"),
        ([0.1, 0.2], "below", "fails"),
        ([None, None], "below", "inconclusive"),
    ],
)
def test_a_verdict_asks_for_the_whole_interval(interval, side, said):
    assert verdict(interval, 0.0, side) == said


def test_a_claim_without_cells_is_inconclusive_and_says_nothing():
    found = claim("x", paper="1", statement="", statistic="", found=None, threshold=0, side="above")
    assert (found["estimate"], found["ci95"], found["verdict"]) == (None, [None, None], "inconclusive")


def test_seeds_pair_up_and_failed_cells_are_left_out():
    def cell(arm, seed, value, status="done"):
        return {"arm": arm, "seed": seed, "status": status, "metrics": {"nll": value} if status == "done" else {}}

    cells = [cell("a", 1, 10.0), cell("a", 0, 20.0), cell("a", 2, 0, "failed"), cell("b", 0, 2.0), cell("b", 2, 3.0)]
    assert by_seed(cells, "nll", "a", "b") == [[20.0], [2.0]]


@pytest.mark.parametrize("values", [[], [float("nan"), 1.0], [float("inf")]])
def test_what_is_no_number_is_refused(values):
    with pytest.raises(ValueError, match="`values` must be finite numbers"):
        mean_interval(values)


def test_pairs_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="must pair up, got 1 and 2"):
        paired_interval([1.0], [1.0, 2.0])
