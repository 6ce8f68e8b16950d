"""The access token: where it comes from, and how it stays out of everything that is printed."""

from __future__ import annotations

import base64
import getpass
import os
import re
import sys
from dataclasses import dataclass, field
from urllib.parse import quote

from space.settings import NamesakeError

USER = "oauth2"  # the user name that both hubs' git servers take together with a token


@dataclass(frozen=True)
class Token:
    """A token whose repr does not show it, so that no traceback or log does."""

    value: str = field(repr=False)

    def redact(self, text: str) -> str:
        """The text, fit to print: the token, and each form in which git and curl write it, replaced by ***."""
        text = printable(text)
        if not self.value:
            return text
        basic = base64.b64encode(f"{USER}:{self.value}".encode()).decode()
        plain = base64.b64encode(self.value.encode()).decode()
        for form in (basic, basic.rstrip("="), plain, plain.rstrip("="), quote(self.value, safe=""), self.value):
            text = text.replace(form, "***")
        return text


def printable(text: str) -> str:
    """What another machine says, without the control characters that a terminal would obey."""
    text = text.encode("utf-8", "replace").decode()
    text = re.sub(r"\x1b\[[0-9;:?]*[ -/]*[@-~]", "", text)  # colours and the like
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "", text)


def find(variable: str, page: str, *, ask: bool = True) -> Token:
    """The token from the environment, else from a prompt without echo. Raises NamesakeError where neither gives one.

    `variable` is the environment variable's name, `page` where a token is made.
    """
    value = os.environ.get(variable, "").strip()
    if not value and ask and sys.stdin.isatty():
        value = getpass.getpass(f"{variable} ({page}): ").strip()
    if not value:
        raise NamesakeError(
            "There is no access token",
            f"Make one at {page} and set {variable}.",
            zh=f"没有访问令牌。请在 {page} 创建，并设置环境变量 {variable}。",
        )
    if not value.isascii() or not value.isprintable() or " " in value:
        raise NamesakeError(
            f"{variable} holds characters that no token has",
            f"Copy it again from {page}.",
            zh=f"{variable} 里有令牌不会有的字符，请从 {page} 重新复制。",
        )
    return Token(value)
