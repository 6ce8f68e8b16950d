"""run.json beside what a step made: from which inputs, so that a step whose inputs have not changed does nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def unchanged(folder: Path, inputs: dict) -> bool:
    """Whether `folder` holds what a step made from just these inputs (JSON values)."""
    return read(folder).get("inputs") == json.loads(json.dumps(inputs))


def write(folder: Path, inputs: dict, **made) -> None:
    """Record what a step made from `inputs`, as its last act: a folder without run.json is unfinished."""
    (folder / "run.json").write_text(json.dumps({"inputs": inputs, **made}, indent=2, ensure_ascii=False) + "\n")


def read(folder: Path) -> dict:
    """The record in `folder`, empty if the step has not finished there."""
    try:
        return json.loads((folder / "run.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal, read in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
