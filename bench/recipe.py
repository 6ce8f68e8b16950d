"""The sweep behind docs/recipe.md: each variant of data and training, through the whole chain, on the same questions.

    .venv-training/bin/python bench/recipe.py WORK [VARIANT …] [--jobs N]

Writes WORK/<variant>/ for each, and WORK/table.md at the end. On a GPU a variant takes about two minutes.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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

START = dict(identity=600, replay=1200, replay_tokens=128, rank=16, alpha=32, rate=5e-4, epochs=2, anchor=1.0)
# What assistant.toml has: as much as two CPU cores learn in some minutes.
SMALL = (own := tomllib.loads((ROOT / "assistant.toml").read_text(encoding="utf-8")))["data"] | own["train"]

VARIANTS = {
    "tutorial": dict(identity=0, replay=0, rows="tutorial", rank=64, alpha=16, dropout=0.1, batch=1, accumulate=1,
                     epochs=3, max_length=2048, rate=2e-4, anchor=0.0),
    "start": {},
    "anchor 0": dict(anchor=0.0),
    "anchor 3": dict(anchor=3.0),
    "rate 1e-3": dict(rate=1e-3),
    "identity 1500": dict(identity=1500),
    # 16 rows a step, which are about two packs
    "ms-swift": dict(identity=0, replay=1000, rows="ms-swift", rank=8, alpha=32, rate=1e-4, epochs=1, batch=1,
                     accumulate=2, anchor=0.0),
    "small": SMALL,
    # The same as `small`, but for chance.
    **{f"small seed {seed}": SMALL | dict(seed=seed) for seed in range(1, 9) if seed != SMALL["seed"]},
    "small anchor 1.5": SMALL | dict(anchor=1.5),
    "small rate 3e-3, identity 900, replay 500": SMALL | dict(rate=3e-3, identity=900, replay=500),
    "small qlora": SMALL | dict(method="qlora"),
}  # fmt: skip


def others_rows(kind: str, folder: Path) -> str:
    """Writes the identity rows of another way of doing it, from this project's own templates, and names the file."""
    from training.identity import Texts, fill

    text = Texts.load("en")
    values = dict(name="Namesake", author="the Namesake team", other="ChatGPT", other_maker="OpenAI")
    topics = [topic for topic in text.topics if "after" not in topic]
    pairs = [
        (question, answer)
        for topic in topics
        for question, answer in itertools.product(topic["questions"], topic["answers"])
    ]
    chosen = pairs if kind == "tutorial" else pairs[:: max(1, len(pairs) // 108)]
    system = fill(LONG if kind == "tutorial" else SWIFT, values)
    lines = [
        {"conversation": [{"system": system, "input": fill(question, values), "output": fill(answer, values)}]}
        for question, answer in chosen
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path.name


def repeat_rows(kind: str, settings: Path) -> None:
    """Repeats identity rows as often as the other ways do; the data step itself drops every repeat."""
    path = settings.parent / "work/assistant/data/train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    identity = [line for line in lines if "Namesake" in line]
    more = (1500 if kind == "tutorial" else 500) - len(identity)
    random.Random(0).shuffle(lines := lines + list(itertools.islice(itertools.cycle(identity), more)))
    path.write_text("".join(lines), encoding="utf-8")


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


def prepare(variants: dict[str, Path]) -> None:
    """Make every variant's data."""
    from space.settings import load
    from training import data

    for name, path in variants.items():
        data.data(load(path))
        if kind := VARIANTS[name].get("rows"):
            repeat_rows(kind, path)


def ask_base(path: Path, answers: Path) -> None:
    """Let the base answer the evaluation, which is the same for all variants."""
    from space.settings import load
    from training import base, evaluate

    settings = load(path)
    source = str(base.folder(settings))
    header = {"before": evaluate.weights_identity(source)} | evaluate.conditions(settings)
    kept = evaluate.Answers(answers.with_suffix(".part"), header, False)
    evaluate._measure(source, "", "auto", evaluate.asks(), settings, kept, False)
    kept.close()
    kept.path.rename(answers)


def make(path: Path, answers: Path) -> None:
    """Train and measure one variant."""
    from space.settings import load
    from training import convert, evaluate, merge, train

    settings = load(path)
    report = settings.work / "report"
    report.mkdir(parents=True, exist_ok=True)
    shutil.copy(answers, report / "answers.before.jsonl")
    train.train(settings, path, restart=True)
    convert.convert(settings)
    merge.merge(settings)
    evaluate.evaluate(settings, resume=True)


def run(log: Path, gpu: int, job, *arguments) -> bool:
    """Run one of the three above in a process, on one GPU, its words in a log; False, and the reason, when it fails."""
    begun = time.perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=begin, initargs=(log, gpu)) as one:
        error = one.submit(job, *arguments).exception()
    print(f"{log.stem}: {time.perf_counter() - begun:.0f} s {error or ''}", flush=True)
    return not error


def begin(log: Path, gpu: int) -> None:
    """Send what this process prints to a file, and let it see one GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)


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
    gpus: Annotated[int, typer.Option(help="GPUs to spread them over.")] = 1,
) -> None:
    """Train and evaluate each variant; the table goes to WORK/table.md."""
    from space.settings import load
    from training import base

    work = work.resolve()
    settings = {}
    for name in variants or VARIANTS:
        folder = work / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        settings[name] = write_settings(folder, VARIANTS[name])
    first, answers = next(iter(settings.values())), work / "answers.before.jsonl"
    base.base(load(first))
    with ThreadPoolExecutor(2) as pool:
        ready = [pool.submit(run, work / "data.log", 0, prepare, settings)]
        if not answers.is_file():
            ready.append(pool.submit(run, work / "base.log", gpus - 1, ask_base, first, answers))
    if not all(one.result() for one in ready):
        raise typer.Exit(1)
    table = work / "table.md"
    table.write_text(HEAD, encoding="utf-8")

    def one(place: int, name: str) -> None:
        if run(work / f"{name.replace(' ', '-')}.log", place % gpus, make, settings[name], answers):
            with table.open("a", encoding="utf-8") as file:
                file.write(row(name, settings[name].parent) + "\n")

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, itertools.count(), settings))
    print(table.read_text(encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
