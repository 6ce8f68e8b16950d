"""What goes up: the merged model with its card, and the page's tree."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class File:
    """A file to publish: its path in the repository, where it lies here, its bytes and its SHA-256."""

    path: str
    source: Path
    size: int
    sha256: str


def file(path: str, source: Path) -> File:
    with source.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return File(path, source, source.stat().st_size, digest)
