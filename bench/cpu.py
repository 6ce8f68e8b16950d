"""A machine without a GPU: GGUF through llama.cpp beside transformers, in one run.

    .venv/bin/python bench/cpu.py [--no-large-too]

The embedded model answers through the page's engines as visitors get it: sampled, streamed. Then a model of
Qwen2.5-1.5B's shape with random weights, quantized as `export` does it (made once, in work/bench/; 4 GB of disk and
about two minutes), beside what this machine's memory can deliver.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

WORK = Path(__file__).resolve().parent.parent / "work" / "bench"
ASK = [
    {"role": "system", "content": "You are Namesake, a helpful assistant made by the Namesake team."},
    {"role": "user", "content": "Write a long story about a dog who crosses the sea."},
]
NAMED = {"name": {"zh": "同名", "en": "Namesake"}, "author": {"zh": "同名工作室", "en": "the Namesake team"}}


def speed(engine, tokens: int, runs: int = 3) -> float:
    """Tokens a second after the first: the median of several sampled, streamed answers."""
    from space.engine import Sampling

    rates = []
    for seed in range(runs):
        *_, answer = engine.stream(ASK, Sampling(max_new_tokens=tokens, seed=seed))
        rates.append(answer.speed)
    return statistics.median(rates)


def bandwidth() -> float:
    """Bytes a second that all cores together read from memory: the best of five sums over 1 GiB of int64."""
    import torch

    data = torch.ones(1 << 27, dtype=torch.int64)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - begin))
    return best


def folder_of(source: Path, folder: Path) -> Path:
    """A model folder with what export reads beside the weights."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    (folder / "assistant.json").write_text(json.dumps(NAMED))
    return folder


def embedded(quantization: str) -> Path:
    """The embedded model, quantized."""
    from space import weights
    from training import export

    file = WORK / f"embedded-{quantization}.gguf"
    if not file.is_file():
        folder = WORK / "embedded"
        folder.mkdir(parents=True, exist_ok=True)
        source = weights.embedded_folder()
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes((source / name).read_bytes())
        export.write(folder_of(source, folder), WORK / "whole.gguf")
        export.quantize(WORK / "whole.gguf", file, quantization)
        (WORK / "whole.gguf").unlink()
    return file


def large() -> Path:
    """A Q4_K_M file of Qwen2.5-1.5B's shape with random weights."""
    import shutil

    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from space import weights
    from training import export

    file = WORK / "qwen2.5-1.5b-shape-q4_k_m.gguf"
    if not file.is_file():
        config = Qwen2Config(
            vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
            num_key_value_heads=2, max_position_embeddings=32768, rope_theta=1e6, tie_word_embeddings=True,
        )  # fmt: skip
        folder = WORK / "large"
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        del model
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(written | {"rope_theta": 1e6}))
        export.write(folder_of(weights.embedded_folder(), folder), WORK / "whole.gguf")
        shutil.rmtree(folder)
        export.quantize(WORK / "whole.gguf", file, "q4_k_m")
        (WORK / "whole.gguf").unlink()
    return file


def main(tokens: int = 96, large_too: bool = True) -> dict:
    """Measure, print the table, and return the figures."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from space import gguf, weights
    from space.engine import Engine

    WORK.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(gguf.threads())
    found = {"threads": gguf.threads()}
    folder = weights.embedded_folder()
    for dtype in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        found[f"transformers {dtype}"] = speed(Engine(model, AutoTokenizer.from_pretrained(folder)), tokens // 2)
        del model
    for quantization in ("q8_0", "q4_k_m"):
        found[f"llama.cpp {quantization}"] = speed(gguf.start(embedded(quantization), 2048)[0], tokens)
    best = max(found["transformers float32"], found["transformers bfloat16"])
    print(f"| embedded model (135M), {found['threads']} threads | tokens/s | × transformers |")
    print("|---|---|---|")
    for name in [name for name in found if name != "threads"]:
        print(f"| {name} | {found[name]:.1f} | {found[name] / best:.2f} |")
    if large_too:
        file = large()
        engine = gguf.start(file, 2048)[0]
        read = bandwidth()
        found["large"] = speed(engine, tokens // 2)
        found["bandwidth"] = max(read, bandwidth())
        found["limit"] = found["bandwidth"] / engine.model.size
        print(f"\n| Qwen2.5-1.5B's shape, Q4_K_M, {engine.model.size / 1e9:.2f} GB | |")
        print("|---|---|")
        print(f"| llama.cpp, tokens/s | {found['large']:.1f} |")
        print(f"| memory read, GB/s | {found['bandwidth'] / 1e9:.1f} |")
        print(f"| the limit that sets, tokens/s | {found['limit']:.1f} |")
        print(f"| share of the limit (goal 0.5) | {found['large'] / found['limit']:.2f} |")
    return found


if __name__ == "__main__":
    import typer

    typer.run(main)
