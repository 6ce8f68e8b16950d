"""How far a counted share can be trusted, and whether two of them differ.

The unit is the question. One question is asked with several system prompts (and sampled several times), and its answers
resemble each other, so they are no independent observations. Its share of hits is one value between 0 and 1, whose
variance is at most mean x (1 - mean) whatever the resemblance (Bhatia and Davis 2000, American Mathematical Monthly
107, 353–357): the binomial variance of one yes or no. So an interval for as many trials as there are *questions* is
never too narrow; it is the effective sample size of Rao and Scott (1992, Biometrics 48, 577–585) at its lowest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

Z = 1.959964  # the two-sided 95 % quantile of the normal distribution


def wilson(share: float, questions: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `questions` trials; (0, 1) when there is none.

    Wilson, E. B. (1927), Journal of the American Statistical Association 22, 209–212: unlike the textbook interval it
    stays within 0 and 1 and is right for shares near them, which is where names and leaks are.
    """
    if not questions:
        return 0.0, 1.0
    z2 = Z * Z
    middle = share + z2 / (2 * questions)
    reach = Z * math.sqrt(share * (1 - share) / questions + z2 / (4 * questions * questions))
    scale = 1 + z2 / questions
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def mcnemar(changes: Iterable[int]) -> float:
    """The exact two-sided p value for "nothing changed", from each question's hits after less its hits before.

    McNemar, Q. (1947), Psychometrika 12, 153–157, in the exact conditional form, which is the sign test (Dixon and Mood
    1946, Journal of the American Statistical Association 41, 557–566): under "no change" each question that changed
    went up or down with probability 1/2, by however many of its answers. No changed question gives 1.
    """
    changes = list(changes)
    up, down = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    tail = sum(math.comb(up + down, k) for k in range(min(up, down) + 1))
    return min(1.0, 2 * tail / 2 ** (up + down))
