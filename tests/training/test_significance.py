"""Intervals and paired tests against published values, and against SciPy's."""

import random

import pytest
from scipy.stats import binomtest

from training.significance import mcnemar, wilson


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [  # Newcombe, R. G. (1998), Statistics in Medicine 17, 857–872, table I, method 3 (score, no continuity correction)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0000),
    ],
)
def test_wilson_gives_newcombes_intervals(count, total, low, high):
    assert wilson(count / total, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("share", [0, 1 / 390, 0.01, 0.5, 0.97, 1])
def test_wilson_covers_the_true_share_of_questions_whose_answers_resemble_each_other(share):
    # Three answers a question: all alike in half the questions, independent in the others. 95 % asked, seeds fixed.
    chance, covered = random.Random(7), 0
    for _ in range(400):
        hits = 0
        for question in range(130):
            drawn = [chance.random() < share for _ in range(3)]
            hits += 3 * drawn[0] if question % 2 else sum(drawn)
        low, high = wilson(hits / 390, 130)
        covered += low <= share <= high
    assert covered >= 0.94 * 400


def test_mcnemar_gives_fagerlands_exact_value():
    # Fagerland, Lydersen and Laake (2013), BMC Medical Research Methodology 13:91, table 1 (Bentur et al. 2009): airway
    # hyper-responsiveness before and after a transplantation, 7 children gained it and 1 lost it; 2 x 9 / 2^8 = 0.0703.
    assert mcnemar([1] * 7 + [-1] + [0] * 13) == pytest.approx(0.0703, abs=5e-5)


@pytest.mark.parametrize(("up", "down"), [(0, 1), (6, 16), (86, 150), (0, 130), (5, 5), (3, 40)])
def test_mcnemar_is_scipys_exact_sign_test_and_symmetric(up, down):
    p = mcnemar([1] * up + [-1] * down)
    assert p == pytest.approx(binomtest(up, up + down).pvalue) == mcnemar([1] * down + [-1] * up)


def test_a_question_counts_once_however_many_of_its_answers_changed():
    assert mcnemar([3, 3, 2, 1]) == mcnemar([1, 1, 1, 1]) == 0.125
    assert mcnemar([]) == mcnemar([0, 0]) == 1
