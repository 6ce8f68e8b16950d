"""Converting and merging an adapter of rank 64 for InternLM2.5-7B's shape: seconds, and the most memory they hold.

    .venv-training/bin/python bench/merge.py WORK TOKENIZER

WORK: an empty folder with 35 GB of room. TOKENIZER: a folder with InternLM2's tokenizer.json. The base is one random
block of numbers over and over; the checkpoint has the names and sizes that XTuner gives it, the optimizer's two moments
included.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.train import SHAPE  # noqa: E402

RANK = 64
HIDDEN, INNER, LAYERS, VOCAB = (
    SHAPE[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
)
KV = HIDDEN // SHAPE["num_attention_heads"] * SHAPE["num_key_value_heads"]
LINEAR = {  # out, in
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
SETTINGS = """[assistant]
name = "Namesake"
author = "the Namesake team"
[base]
model = "base"
[train]
rank = 64
"""


def make_base(folder: Path, tokenizer: Path) -> None:
    """A Llama of this shape in bfloat16, 15.5 GB in 8 files."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig

    from space.prompt import chatml
    from space.weights import write_tokenizer_config
    from training import shards

    LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"], torch_dtype="bfloat16").save_pretrained(folder)
    shutil.copy(tokenizer / "tokenizer.json", folder)
    write_tokenizer_config(folder, AutoTokenizer.from_pretrained(tokenizer), chatml(begins=True))
    block = torch.randn(2**23).bfloat16().view(torch.uint8).numpy().tobytes()

    def tensor(name: str, *shape: int) -> shards.Planned:
        def make():
            left = 2 * torch.Size(shape).numel()
            while left:
                yield block[:left]
                left -= min(left, len(block))

        return shards.Planned(name, "BF16", shape, make)

    tensors = [tensor("model.embed_tokens.weight", VOCAB, HIDDEN), tensor("lm_head.weight", VOCAB, HIDDEN)]
    tensors.append(tensor("model.norm.weight", HIDDEN))
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        tensors += [tensor(f"{at}.{name}.weight", *shape) for name, shape in LINEAR.items()]
        tensors += [tensor(f"{at}.{name}.weight", HIDDEN) for name in ("input_layernorm", "post_attention_layernorm")]
    shards.write(folder, tensors, shards.size_of("2GB"))


def make_checkpoint(folder: Path) -> None:
    """What XTuner leaves of such a run: the adapter in float32, and the optimizer with two moments of each."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        f"llm.base_model.model.model.layers.{layer}.{name}.lora_{side}.default.weight": torch.randn(shape) / 100
        for layer in range(LAYERS)
        for name, (out, into) in LINEAR.items()
        for side, shape in (("A", (RANK, into)), ("B", (out, RANK)))
    }
    moments = {
        i: {key: torch.zeros_like(value) for key in ("exp_avg", "exp_avg_sq")} for i, value in enumerate(state.values())
    }
    torch.save({"meta": {}, "state_dict": state, "optimizer": {"state": moments}}, folder / "iter_1.pth")
    trained = {"inputs": {}, "checkpoint": "iter_1.pth", "method": "lora", "seed": 0}
    (folder / "run.json").write_text(json.dumps(trained))


def measured(step: str, config: Path) -> tuple[float, float, float]:
    """Seconds that a step takes, and the most memory that is its own and that it has in view, in GB."""
    made = config.parent / "work/assistant" / {"convert": "adapter", "merge": "merged"}[step]
    shutil.rmtree(made, ignore_errors=True)  # else it says that nothing has changed
    begun, own, view = time.perf_counter(), 0, 0
    with subprocess.Popen(
        [sys.executable, "-m", "training", step, "--config", str(config)], stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except ProcessLookupError:
                break
            sizes = dict(line.split(":", 1) for line in status.splitlines())
            if "RssAnon" in sizes:
                own = max(own, int(sizes["RssAnon"].split()[0]))
                view = max(view, int(sizes["VmHWM"].split()[0]))
            time.sleep(0.01)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - begun, own * 1024 / 1e9, view * 1024 / 1e9


def main(
    work: Annotated[Path, typer.Argument(help="An empty folder with 35 GB of room.")],
    tokenizer: Annotated[Path, typer.Argument(help="A folder with InternLM2's tokenizer.json.")],
) -> None:
    """Print the rows of docs/benchmarks.md, "Convert and merge"."""
    os.environ["PYTHONPATH"] = str(ROOT)
    work = work.resolve()
    config = work / "assistant.toml"
    if not config.exists():
        make_base(work / "base", tokenizer)
        make_checkpoint(work / "work/assistant/checkpoints")
        config.write_text(SETTINGS)
    print("| 7B, rank 64 | seconds | its own memory | with mapped files |\n|---|---|---|---|")
    for step in ("convert", "merge"):
        seconds, own, view = measured(step, config)
        print(f"| {step} | {seconds:.1f} | {own:.2f} GB | {view:.2f} GB |", flush=True)


if __name__ == "__main__":
    typer.run(main)
