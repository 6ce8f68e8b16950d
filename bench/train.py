"""Training and merging beside XTuner's stock way, on one GPU, in one run: InternLM2.5-7B's shape with random weights.

    .venv-training/bin/python bench/train.py WORK TOKENIZER [--iterations N] [--epochs E]

TOKENIZER: a folder with InternLM2's tokenizer.json (tests/fetch_tokenizers.py brings one). Needs 60 GB of disk. The
data is of the tutorial's size: 1,500 rows, each with one system prompt of 528 characters. Stock is XTuner's own
internlm2_5_chat_7b_qlora_alpaca_e3 with model and data put in, as the tutorial does, and without its chat hook, which
would only make it slower; of its 3 epochs some iterations are run, and the rest is reckoned from their median.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "training/stand_ins"))  # installed packages come first

SHAPE = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=92544, max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-5, tie_word_embeddings=False,
    bos_token_id=1, eos_token_id=2, pad_token_id=2,
)  # fmt: skip
SETTINGS = """[assistant]
name = "{name}"
author = "{name}"
[base]
model = "{base}"
[data]
max_length = 1024
[train]
ask_steps = 0
{options}
"""


def make_base(folder: Path, tokenizer: Path) -> None:
    """Random weights in native layout, with the tokenizer beside them."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from space.prompt import chatml
    from space.weights import write_tokenizer_config

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, torch_dtype="bfloat16"))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="2GB")
    del model
    torch.cuda.empty_cache()  # what is measured next needs the memory
    shutil.copy(tokenizer / "tokenizer.json", folder)
    write_tokenizer_config(folder, AutoTokenizer.from_pretrained(tokenizer), chatml(begins=True))


def make_rows(path: Path) -> None:
    """1,500 rows of the tutorial's kind: one long system prompt, a short question, an answer of some sentences."""
    draw = random.Random(0)
    texts = (ROOT / "training/questions/general.zh.txt").read_text(encoding="utf-8")
    letters = re.sub(r"\s+", "", texts)
    lines = []
    for _ in range(1500):
        at, length = draw.randrange(len(letters) - 200), draw.randint(40, 140)
        turn = {"system": letters[:528], "input": letters[at : at + 12], "output": letters[at + 12 : at + 12 + length]}
        lines.append(json.dumps({"conversation": [turn]}, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True)
    path.write_text("".join(lines), encoding="utf-8")


def stock_config(path: Path, base: Path, rows: Path) -> None:
    """XTuner's own configuration, edited as the tutorial edits it."""
    import xtuner

    source = Path(xtuner.__file__).parent / "configs/internlm/internlm2_5_chat_7b"
    text = (source / "internlm2_5_chat_7b_qlora_alpaca_e3.py").read_text()
    for old, new in (
        ('"internlm/internlm2_5-7b-chat"', repr(str(base))),
        ("dataset=dict(type=load_dataset, path=alpaca_en_path)",
         f'dataset=dict(type=load_dataset, path="json", data_files=dict(train={str(rows)!r}))'),
        ("dataset_map_fn=alpaca_map_fn", "dataset_map_fn=None"),
        ("save_steps = 500", "save_steps = 30"),
        ("interval=10", "interval=1"),
    ):  # fmt: skip
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(re.sub(r"    dict\(\n        type=EvaluateChatHook,.*?\n    \),\n", "", text, flags=re.S))


def stock(work: Path, base: Path, rows: Path, iterations: int) -> dict:
    """Stock's start-up, seconds an iteration of 2,048 tokens, memory, conversion and merge."""
    config, folder = work / "stock.py", work / "stock"
    stock_config(config, base, rows)
    begun, took, losses, memory, started = time.perf_counter(), [], [], 0, 0.0
    command = [sys.executable, "-m", "xtuner.tools.train", str(config), "--work-dir", str(folder)]
    with (
        (work / "stock.log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        for line in process.stdout:
            log.write(line)
            if found := re.search(r"Iter\(train\).*/(\d+)\].* time: ([\d.]+).* memory: (\d+).* loss: ([\d.]+)", line):
                steps = int(found[1])
                started = started or time.perf_counter() - begun - float(found[2])
                took.append(float(found[2]))
                memory = max(memory, int(found[3]))
                losses.append(float(found[4]))
            if len(took) > iterations:
                process.terminate()
    checkpoint = max(folder.glob("iter_*.pth"), key=lambda path: path.stat().st_mtime)
    tool = [sys.executable, "-m"]
    convert = timed([*tool, "xtuner.tools.model_converters.pth_to_hf", config, checkpoint, work / "stock-adapter"])
    merge = timed([*tool, "xtuner.tools.model_converters.merge", base, work / "stock-adapter", work / "stock-merged",
                   "--safe-serialization"])  # fmt: skip
    median = statistics.median(took[5:])
    return dict(
        start=started,
        first=took[0],
        step=median,
        steps=steps - 1,
        speed=2048 / median,
        memory=memory / 1000,
        convert=convert,
        merge=merge,
        seen=2048 * len(losses),
        loss=statistics.mean(losses[-5:]),
    )


def timed(command: list) -> float:
    """Seconds that a command takes."""
    begun = time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        subprocess.run(list(map(str, command)), check=True, stdout=nowhere, stderr=nowhere)
    return time.perf_counter() - begun


def ours(work: Path, base: Path, rows: Path, epochs: float, options: str, name: str) -> dict:
    """The same of `python -m training train`, `convert` and `merge`."""
    from training.hooks import read_metrics

    folder = work / name
    shutil.copytree(rows.parent, folder / "work/assistant/data")
    config = folder / "assistant.toml"
    config.write_text(SETTINGS.format(name=name, base=base, options=f"epochs = {epochs}\n{options}"), encoding="utf-8")
    step = [sys.executable, "-m", "training"]
    train, convert, merge = (
        timed([*step, kind, "--config", config, *more]) for kind, *more in (("train",), ("convert",), ("merge",))
    )
    metrics = read_metrics(folder / "work/assistant/checkpoints/metrics.jsonl")
    plan = json.loads((folder / "work/assistant/checkpoints/plan.json").read_text())["plan"]
    speed = statistics.median(line["tokens"] / line["seconds"] for line in metrics[3:])
    stepping = sum(line["seconds"] for line in metrics)
    return dict(
        start=train - stepping,
        step=statistics.median(line["seconds"] for line in metrics[3:]),
        steps=3 / epochs * len(metrics) - 1,
        speed=speed,
        memory=max(line.get("memory", 0) for line in metrics) / 1e9,
        convert=convert,
        merge=merge,
        first=metrics[0]["seconds"],
        losses=[
            (seen, line["loss"])
            for seen, line in zip(itertools.accumulate(line["tokens"] for line in metrics), metrics, strict=True)
        ],
        tokens=plan["tokens"],
        computed=plan["computed"],
        reasons=plan["reasons"],
    )


def main(
    work: Annotated[Path, typer.Argument(help="An empty folder with 60 GB of room.")],
    tokenizer: Annotated[Path, typer.Argument(help="A folder with InternLM2's tokenizer.json.")],
    iterations: Annotated[int, typer.Option(help="Iterations of stock that are run.")] = 35,
    epochs: Annotated[float, typer.Option(help="Epochs of ours that are run.")] = 3,
    compiled: Annotated[str, typer.Option("--compile", help="[train] compile of ours: auto, on or off.")] = "auto",
) -> None:
    """Print the table of docs/benchmarks.md, "Training"."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    work = work.resolve()
    base, rows = work / "base", work / "data/train.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    if not base.is_dir():
        make_base(base, tokenizer)
        make_rows(rows)
    results = {"auto": ours(work, base, rows, epochs, f'compile = "{compiled}"', "auto")}
    print(json.dumps(results["auto"], ensure_ascii=False), flush=True)
    results["stock"] = stock(work, base, rows, iterations)
    print("| | start-up | first step | 2,048 tokens | tokens/s | memory | convert | merge | data to merged, 3 epochs |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, r in results.items():
        whole = r["start"] + r["first"] + r["steps"] * r["step"] + r["convert"] + r["merge"]
        cells = [f"{r['start']:.0f} s", f"{r['first']:.1f} s", f"{2048 / r['speed']:.3f} s", f"{r['speed']:,.0f}",
                 f"{r['memory']:.1f} GB", f"{r['convert']:.1f} s", f"{r['merge']:.1f} s", f"{whole:.0f} s"]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |")
    seen, loss, losses = results["stock"]["seen"], results["stock"]["loss"], results["auto"]["losses"]
    same = next((loss for tokens, loss in losses if tokens >= seen), losses[-1][1])
    print(f"loss after {seen:,} tokens: stock {loss:.3f} (mean of its last 5 iterations), auto {same:.3f}")


if __name__ == "__main__":
    typer.run(main)
