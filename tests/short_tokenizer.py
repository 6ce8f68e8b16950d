"""The embedded model's tokenizer with its first tokens only: real merges, and loaded in a tenth of the time."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

from space import weights

SIZE = 8192  # tokens: 17 control tokens, the 256 bytes, and the most frequent merges

embedded_folder = functools.cache(weights.embedded_folder)  # also where a test has moved the cache


def write(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. BPE's ids are in the order of its merges, so the rest goes."""
    made = json.loads((embedded_folder() / "tokenizer.json").read_text(encoding="utf-8"))
    model = made["model"]
    model["vocab"] = {token: index for token, index in model["vocab"].items() if index < SIZE}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
    shutil.copy(embedded_folder() / "tokenizer_config.json", folder)
