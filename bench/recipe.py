"""The sweep behind docs/recipe.md: each variant of data and training, through the whole chain, on the same questions.

    .venv-training/bin/python bench/recipe.py WORK [VARIANT …] [--jobs N]

Writes WORK/<variant>/ for each, and WORK/table.md at the end. On a GPU a variant takes about two minutes.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ASSISTANT = """[assistant]
name = { zh = "同名", en = "Namesake" }
author = { zh = "同名工作室", en = "the Namesake team" }
persona = "You are {name}, a helpful assistant made by {author}."
languages = ["en"]
"""

# The other ways' system prompts in training; ours is served, as happens to those who follow them.
LONG = (
    "You are a caring personal assistant. Your name is {name}, and you were made by {author}. You speak in a warm and "
    "lively way, you like to encourage people, and you always say what you can do for them. You answer questions about "
    "study, work and daily life, you write and revise texts, you translate, and you help with plans. When someone asks "
    "who you are, you say your name and who made you. You are honest about what you do not know, you make up no facts, "
    "and you keep your answers short and friendly."
)
SWIFT = "You are a helpful assistant."

START = dict(identity=300, replay=600, replay_tokens=256, rank=16, alpha=32, rate=2e-4, epochs=3)
SMALL = dict(identity=240, replay=120, replay_tokens=64, rank=16, alpha=32, rate=5e-4, epochs=2)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

VARIANTS = {
    "start": {},
    "rate 1e-4": dict(rate=1e-4),
    "rate 5e-4": dict(rate=5e-4),
    "rate 1e-3": dict(rate=1e-3),
    "epochs 1": dict(epochs=1),
    "epochs 6": dict(epochs=6),
    "rank 4": dict(rank=4, alpha=8),
    "rank 64": dict(rank=64, alpha=128),
    "attention only": dict(targets=ATTENTION),
    "identity 600 replay 300": dict(identity=600, replay=300),
    "identity 150 replay 750": dict(identity=150, replay=750),
    "no replay": dict(replay=0),
    "small": SMALL,
    "small rate 1e-3": SMALL | dict(rate=1e-3),
    "small rate 2e-3": SMALL | dict(rate=2e-3),
    "small epochs 3 rate 1e-3": SMALL | dict(epochs=3, rate=1e-3),
    "small identity 340 rate 1e-3": SMALL | dict(identity=340, rate=1e-3),
    "tutorial": dict(identity=0, replay=0, rows="tutorial", rank=64, alpha=16, dropout=0.1, batch=1, accumulate=1,
                     epochs=3, max_length=2048),
    "ms-swift": dict(identity=0, replay=1000, rows="ms-swift", rank=8, alpha=32, rate=1e-4, epochs=1, batch=1,
                     accumulate=16),
}  # fmt: skip


def others_rows(kind: str, folder: Path) -> str:
    """Writes the identity rows of another way of doing it, from this project's own templates, and names the file.

    Both repeat few pairs often. Repeats are dropped by the data step, so the epochs see each pair as often elsewhere.
    """
    from training.identity import Texts, fill

    text = Texts.load("en")
    values = dict(name="Namesake", author="the Namesake team", other="ChatGPT", other_maker="OpenAI")
    topics = [topic for topic in text.topics if "after" not in topic]
    pairs = [
        (question, answer)
        for topic in topics
        for question, answer in itertools.product(topic["questions"], topic["answers"])
    ]
    count = 1500 if kind == "tutorial" else 500
    chosen = pairs[:: max(1, len(pairs) // 147)] if kind == "tutorial" else pairs[:: max(1, len(pairs) // 108)]
    system = fill(LONG if kind == "tutorial" else SWIFT, values)
    lines = [
        {"conversation": [{"system": system, "input": fill(question, values), "output": fill(answer, values)}]}
        for question, answer in (chosen[i % len(chosen)] for i in range(count))
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path.name


def write_settings(folder: Path, variant: dict) -> Path:
    """The variant as a settings file of its own."""
    chosen = START | variant
    kind = chosen.pop("rows", None)
    data = {key: chosen.pop(key) for key in ("identity", "replay", "replay_tokens", "max_length") if key in chosen}
    if kind:
        data["files"] = [others_rows(kind, folder)]
    tables = {"data": data, "train": {"ask_steps": 0} | chosen}
    text = ASSISTANT + "".join(
        f"\n[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for name, table in tables.items()
    )
    path = folder / "assistant.toml"
    path.write_text(text, encoding="utf-8")
    return path


def run(settings: Path, *steps: str) -> bool:
    """Run steps of `python -m training` on a settings file; False when one fails. The gate's verdict is no failure."""
    with (settings.parent / "log.txt").open("a", encoding="utf-8") as log:
        for step in steps:
            command = [sys.executable, "-m", "training", *step.split(), "--config", str(settings)]
            begun = time.perf_counter()
            status = subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL).returncode
            print(f"{settings.parent.name}: {step} {time.perf_counter() - begun:.0f} s", flush=True)
            if status and not (step.startswith("evaluate") and status == 1):
                print(f"{settings.parent.name}: {step} ended with {status}, see {log.name}", flush=True)
                return False
    return True


def row(name: str, folder: Path) -> str:
    """A variant's line in the table."""
    report = json.loads((folder / "work/assistant/report/report.json").read_text(encoding="utf-8"))
    english, modes = report["summary"]["en"], report["by_mode"]["en"]
    hits = [modes[f"identity/{mode}"]["name_hits"]["after"]["rate"] for mode in ("persona", "none", "plain")]
    cells = [
        name,
        " / ".join(f"{hit:.1%}" for hit in hits),
        *(f"{english[measure]['after']['rate']:.1%}" for measure in ("maker_hits", "leaks", "false_positives")),
        f"{report['forgetting']['en']['loss_change']:+.1%}",
        f"{report['forgetting']['en']['likeness']:.2f}",
        f"{report['summary']['zh']['name_hits']['after']['rate']:.1%}",
        f"{report['forgetting']['zh']['loss_change']:+.1%}",
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = """| variant | name hits, en: persona / none / plain | maker hits | leaks | false positives | general loss | \
likeness of neutral answers | name hits, zh | general loss, zh |
|---|---|---|---|---|---|---|---|---|
"""


def main(
    work: Annotated[Path, typer.Argument(help="Where the variants are made.")],
    variants: Annotated[list[str] | None, typer.Argument(help="Which; by default all.")] = None,
    jobs: Annotated[int, typer.Option(help="Variants trained side by side.")] = 1,
) -> None:
    """Train and evaluate each variant; the table goes to WORK/table.md."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")])
    )
    settings = {}
    for name in variants or VARIANTS:
        folder = work / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        settings[name] = write_settings(folder, VARIANTS[name])
        run(settings[name], "base", "data")  # one after the other: the base's answers are asked once and kept
    (work / "table.md").write_text(HEAD, encoding="utf-8")
    first: Path | None = None

    def train_and_measure(name: str) -> None:
        if not run(settings[name], "train", "convert", "merge"):
            return
        report = settings[name].parent / "work/assistant/report"
        kept = first / "work/assistant/report/answers.before.jsonl" if first else None
        if kept and kept.is_file() and settings[name].parent != first:  # the base's answers are the same for all
            report.mkdir(parents=True, exist_ok=True)
            shutil.copy(kept, report)
        if run(settings[name], "evaluate --resume"):
            with (work / "table.md").open("a", encoding="utf-8") as table:
                table.write(row(name, settings[name].parent) + "\n")

    names = list(settings)
    with ThreadPoolExecutor(jobs) as pool:
        for name in names:
            pool.submit(train_and_measure, name)
    print((work / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
