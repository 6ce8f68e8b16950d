"""Intervals and paired tests against published values."""

import pytest

from training.significance import mcnemar, wilson


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [  # Newcombe, R. G. (1998), Statistics in Medicine 17, 857–872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_newcombes_intervals(count, total, low, high):
    assert wilson(count, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing_says_nothing():
    assert wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_gives_fagerlands_exact_value():
    # Fagerland, Lydersen and Laake (2013), BMC Medical Research Methodology 13:91: airway hyper-responsiveness, 1 and 7
    assert mcnemar(1, 7) == pytest.approx(0.0703, abs=5e-5)


def test_mcnemar_is_the_sign_test_and_symmetric():
    assert mcnemar(6, 16) == mcnemar(16, 6) == pytest.approx(0.0525, abs=5e-5)
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1
