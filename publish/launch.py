"""Bring a Space up: follow its build until the page runs, and show the log's telling lines where it does not."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from space.settings import NamesakeError

TELLING = re.compile(
    r"error|exception|traceback|no matching distribution|not found|cannot|could not|failed|killed|out of memory|denied",
    re.I,
)
LONGEST = 45 * 60  # seconds; a first build installs torch


def wait(hub, id: str, commit: str, say: Callable[[str], None], redact: Callable[[str], str]) -> None:
    """Until the Space runs `commit`. Its log goes to `say`, line by line, each redacted first. Raises NamesakeError."""
    shown = {True: 0, False: 0}
    pause, until = 0.2, time.monotonic() + LONGEST
    while True:
        stage = hub.stage(id, commit)
        logs = {}
        for build in (True, False):
            logs[build] = [redact(line) for line in hub.logs(id, build)]
            for line in logs[build][shown[build] :]:
                say(line)
            shown[build] = len(logs[build])
        if stage == "running":
            return
        if stage.startswith("failed"):
            reason = " | ".join(telling(logs[True]) or telling(logs[False])) or "the log says nothing"
            raise NamesakeError(
                f"{hub.title}: {id} did not come up, {stage}: {reason}",
                f"Mend what the log says and run it again; the page for it: {hub.address('space', id)}",
                zh=f"{hub.title}：{id} 未能启动（{stage}）：{reason}。请按日志修改后再运行。",
            )
        if time.monotonic() > until:
            raise NamesakeError(
                f"{hub.title}: {id} is still {stage} after {LONGEST // 60} minutes",
                f"Look at {hub.address('space', id)}, then run: python -m publish verify",
                zh=f"{hub.title}：{id} 等待 {LONGEST // 60} 分钟后仍未启动（{stage}），请到页面查看。",
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 10)


def telling(log: list[str]) -> list[str]:
    """The last few lines of a log that say what went wrong."""
    return [line.strip()[:200] for line in log if TELLING.search(line)][-5:]
