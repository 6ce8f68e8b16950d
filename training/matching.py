"""When two texts count as the same, and where a name stands in a text."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable

IGNORED = ("P", "Z", "Cc", "Cf")  # Unicode categories: punctuation, separators, control and format characters


def normalise(text: str) -> str:
    """The text without what does not change a question: width (by NFKC), case, punctuation and spaces.

    Symbols such as + and emoji stay. Two texts are the same question if this is the same for both.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded.translate(_ignored())


@functools.cache
def _ignored() -> dict[int, None]:
    codes = (code for code in range(0x20000) if unicodedata.category(chr(code)).startswith(IGNORED))
    return dict.fromkeys([*codes, ord("~")])


def literal(texts: Iterable[str], flags: int = 0) -> re.Pattern[str]:
    """Matches any of the texts just as it stands, the longest first.

    Where a text begins or ends with a Latin letter or a digit, so does the word: "Tim" is not found in "Time".
    """

    def whole(text: str) -> str:
        before = r"(?<![A-Za-z0-9_])" if re.match(r"[A-Za-z0-9_]", text) else ""
        after = r"(?![A-Za-z0-9_])" if re.search(r"[A-Za-z0-9_]\Z", text) else ""
        return before + re.escape(text) + after

    return re.compile("|".join(map(whole, sorted(texts, key=len, reverse=True))) or r"(?!)", flags)
