"""Intervals and paired tests against figures known from elsewhere."""

import pytest

from taskagent_platform.evaluation.statistics import (
    fisher_exact_greater,
    holm,
    mcnemar_exact,
    paired_difference_interval,
    pass_hat_k,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),  # R: prop.test(8, 10, correct = FALSE)
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (196, 200, 0.9497, 0.9922),
    ],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_holds_the_rate() -> None:
    for total in (1, 3, 50):
        for correct in range(total + 1):
            low, high = wilson_interval(correct, total)
            assert 0 <= low <= correct / total <= high <= 1


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_impossible_counts(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="no rate"):
        wilson_interval(correct, total)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (0, 6, 0.03125), (6, 0, 0.03125), (5, 5, 1.0), (10, 2, 0.0385742)],
)
def test_mcnemar_exact(first: int, second: int, p: float) -> None:
    assert mcnemar_exact(first, second) == pytest.approx(p, abs=1e-6)


def test_mcnemar_takes_more_discordant_cases_than_a_float_can_count() -> None:
    assert mcnemar_exact(600, 430) == pytest.approx(1.3e-7, rel=0.1)


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match="negative"):
        mcnemar_exact(-1, 2)


def test_mcnemar_is_the_binomial_test_that_scipy_has() -> None:
    from scipy.stats import binomtest

    for first, second in ((3, 9), (1, 14), (20, 31)):
        assert mcnemar_exact(first, second) == pytest.approx(binomtest(first, first + second).pvalue)


def test_the_interval_of_a_paired_difference() -> None:
    # By hand: (12 - 3) / 102 -+ 1.96 * sqrt(12 + 3 + 1 - 81 / 102) / 102
    assert paired_difference_interval(12, 3, 100) == pytest.approx((0.013308, 0.163163), abs=1e-5)
    low, high = paired_difference_interval(3, 12, 100)
    assert (-high, -low) == pytest.approx(paired_difference_interval(12, 3, 100))
    assert paired_difference_interval(0, 0, 10).low < 0 < paired_difference_interval(0, 0, 10).high


@pytest.mark.parametrize("counts", [(0, 0, 0), (-1, 0, 5), (3, 3, 5)])
def test_the_interval_refuses_impossible_counts(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be parts"):
        paired_difference_interval(*counts)


def test_fishers_test_is_the_one_that_scipy_has() -> None:
    from scipy.stats import fisher_exact

    for inside, size_in, outside, size_out in ((8, 10, 5, 90), (1, 3, 30, 90), (0, 4, 3, 9), (4, 4, 0, 9)):
        table = [[inside, size_in - inside], [outside, size_out - outside]]
        expected = fisher_exact(table, alternative="greater").pvalue
        assert fisher_exact_greater(inside, size_in, outside, size_out) == pytest.approx(expected)
    with pytest.raises(ValueError, match="no shares"):
        fisher_exact_greater(3, 2, 0, 1)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_pass_hat_k() -> None:
    assert [pass_hat_k(3, 4, k) for k in (1, 2, 3, 4)] == pytest.approx([0.75, 0.5, 0.25, 0.0])
    assert pass_hat_k(4, 4, 4) == 1
    with pytest.raises(ValueError, match="drawn"):
        pass_hat_k(1, 2, 3)
