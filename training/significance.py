"""How far a counted share can be trusted, and whether two of them differ."""

from __future__ import annotations

import math

Z = 1.959964  # the two-sided 95 % quantile of the normal distribution


def wilson(count: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of the share count / total; (0, 1) when there is nothing to count.

    Wilson, E. B. (1927), Journal of the American Statistical Association 22, 209–212: unlike the textbook interval it
    stays within 0 and 1 and is right for shares near them, which is where names and leaks are.
    """
    if not total:
        return 0.0, 1.0
    share, z2 = count / total, Z * Z
    middle = share + z2 / (2 * total)
    reach = Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    scale = 1 + z2 / total
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def mcnemar(only_before: int, only_after: int) -> float:
    """The exact two-sided p value for paired yes/no outcomes, from the pairs that changed either way.

    McNemar, Q. (1947), Psychometrika 12, 153–157, in the exact conditional form: under "no change" each of the changed
    pairs went either way with probability 1/2. No changed pair gives 1.
    """
    changed = only_before + only_after
    tail = sum(math.comb(changed, k) for k in range(min(only_before, only_after) + 1))
    return min(1.0, 2 * tail / 2**changed)
