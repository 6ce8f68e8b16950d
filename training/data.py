"""What the assistant learns from: identity rows, the user's own rows, and replay rows, in one file."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import random
import re
import shutil
import sqlite3
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from space.prompt import IGNORED, Message, Prompt
from space.settings import NamesakeError, Settings
from training import record, rows
from training.identity import LANGUAGES, TEXTS, Texts, identity_rows, strangers
from training.matching import literal, normalise
from training.replay import Base, fingerprint, replay_rows

QUESTIONS = Path(__file__).parent / "questions"  # the evaluation's held-out questions, which never enter training

# Names that may be left over from others' rows, besides the templates' `others`: the tutorial's, and makers.
LEFTOVER = ("尖米", "书生", "浦语", "上海人工智能实验室", "Shanghai AI Laboratory", "OpenAI", "Anthropic")
LINES_TOLD = 20  # of all the lines of one kind of finding


def conversations(path: Path) -> Iterator[list[Message]]:
    """The rows of a file that `data` wrote, each as a list of {"role", "content"}, read one at a time.

    An answer with "cut": true has no loss on its end: `space.prompt.Prompt.encode` sees to it.
    """
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield rows.messages(json.loads(line))


def held_out(folder: Path = QUESTIONS) -> set[str]:
    """The evaluation's held-out questions, normalised: of several turns the last, of a table its `user`."""

    def question(asked) -> str:
        return asked if isinstance(asked, str) else asked["user"] if isinstance(asked, dict) else asked[-1]

    tables = (tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.toml")))
    return {normalise(question(asked)) for table in tables for kind in table.values() for asked in kind["ask"]}


def data(settings: Settings, preview: int = 0) -> None:
    """Write work/<run>/data/train.jsonl; with `preview`, show that many of its rows as the model will see them.

    Every row of the user's files is judged before anything is written. Raises NamesakeError when anything is wrong with
    one, after all faults were printed as file:line: what: how to fix.
    """
    from transformers import AutoTokenizer

    from training import base

    files = _files(settings)
    source = base.folder(settings)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    prompt = Prompt(tokenizer)
    folder = settings.work / "data"
    inputs = {
        "assistant": dataclasses.asdict(settings.assistant),
        "data": dataclasses.asdict(settings.data),
        "seed": settings.train.seed,
        "base": fingerprint(source),
        "files": [record.sha256(path) for path in files],
        "texts": {path.name: record.sha256(path) for path in sorted([*TEXTS.iterdir(), *QUESTIONS.glob("*.toml")])},
    }
    path, done = folder / "train.jsonl", "nothing has changed"
    if not (path.is_file() and record.unchanged(folder, inputs)):
        _make(settings, files, source, prompt, inputs)
        done = "made"
    made = record.read(folder)["rows"]
    total = sum(made.values())
    parts = ", ".join(f"{kind} {count:,} ({count / total:.0%})" for kind, count in made.items())
    _console().print(f"data: {done}, {total:,} rows in {path}: {parts}. Next: python -m training train", markup=False)
    if preview:
        _preview(path, tokenizer, prompt, preview, total)


def _console(stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def _files(settings: Settings) -> list[Path]:
    """The user's files. Raises NamesakeError where [data] can't be followed."""
    files = [settings.folder / name for name in settings.data.files]
    for path in files:
        if not path.is_file():
            raise NamesakeError(
                f"[data] files: {path}: no such file",
                "Paths are relative to the settings file.",
                zh=f"[data] files：找不到文件 {path}。路径以设置文件所在的文件夹为准。",
            )
    if "" in settings.data.rename:
        raise NamesakeError(
            "[data] rename: the text to replace is empty",
            "Write it, or remove the entry.",
            zh="[data] rename：要替换的文字是空的，请写上，或删去这一项。",
        )
    return files


def _make(settings: Settings, files: list[Path], source: Path, prompt: Prompt, inputs: dict) -> None:
    """Judge the user's files, ask the base, fill the templates, and only then write."""
    console = _console(stderr=True)
    texts = {language: Texts.load(language) for language in LANGUAGES}

    def fits(messages: list[Message]) -> bool:
        return len(prompt.encode(messages).ids) <= settings.data.max_length

    # Nameless, on the disk that train.jsonl will lie on: /tmp may be memory.
    with tempfile.TemporaryFile(dir=settings.folder) as own:
        own_count = _own_rows(settings, files, texts, prompt, own, console)
        with closing(Base(source, prompt, settings.data.replay_tokens, console)) as base:
            replay = replay_rows(settings, texts, _strange_names(settings, texts), base.answers, fits)
        identity = identity_rows(settings, texts, replay, fits, held_out())
        replayed = [[*asked, answer | {"replay": True}] for answered in replay.values() for *asked, answer in answered]
        if len(replayed) < settings.data.replay:
            console.print(
                f"replay: {len(replayed):,} rows of {settings.data.replay:,}, for want of prompts. 提问已用完。",
                markup=False,
            )
        made = {"identity": len(identity), "own": own_count, "replay": len(replayed)}
        if not any(made.values()):
            raise NamesakeError(
                "[data]: there is nothing to learn from",
                "Set identity, replay or files.",
                zh="[data]：没有任何训练数据，请设置 identity、replay 或 files。",
            )
        generated = identity + replayed
        random.Random(f"{settings.train.seed} order").shuffle(generated)

        folder = settings.work / "data"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").unlink(missing_ok=True)
        (folder / "replay.jsonl").write_text("".join(map(rows.line, replayed)), encoding="utf-8")
        with (folder / "train.jsonl").open("wb") as file:
            file.writelines(rows.line(messages).encode() for messages in generated)
            own.seek(0)
            shutil.copyfileobj(own, file, 2**20)
    record.write(folder, inputs, rows=made, sha256=record.sha256(folder / "train.jsonl"))


def _own_rows(settings, files, texts, prompt, own, console) -> int:
    """Judge every row of the user's files and copy the good ones to the file `own`; how many. Memory stays constant."""
    rename, findings, problems, kept = settings.data.rename, Findings(), 0, 0
    old, questions = literal(rename), held_out()
    names = _strange_names(settings, texts)
    foreign, spelling = literal(names, re.IGNORECASE), {name.casefold(): name for name in names}
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    progress = Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    )
    with closing(Seen()) as seen, progress:
        for path, name in zip(files, settings.data.files, strict=True):
            task = progress.add_task(name, total=path.stat().st_size)
            reader = rows.read(
                path,
                change=lambda text: old.sub(lambda found: rename[found[0]], text),
                advance=lambda size, task=task: progress.advance(task, size),
            )
            for row in reader:
                faults = row.faults or _too_long(prompt, row.messages, settings.data.max_length)
                problems += len(faults)
                for what, fix in faults:
                    console.print(f"{name}:{row.line}: {what}: {fix}", style="red", markup=False)
                if faults:
                    continue
                findings.rows += 1
                if earlier := seen.add(row.messages):
                    findings.dropped[earlier] += 1
                    continue
                asked = (message["content"] for message in row.messages if message["role"] == "user")
                if any(normalise(question) in questions for question in asked):
                    findings.note(HELD_OUT, f"{name}:{row.line}")
                    continue
                said = "\n".join(message["content"] for message in row.messages if message["role"] != "user")
                for stranger in sorted({spelling.get(match.casefold(), match) for match in foreign.findall(said)}):
                    findings.note(stranger, f"{name}:{row.line}")
                own.write(rows.line(row.messages).encode())
                kept += 1
    if problems:
        raise NamesakeError(
            f"{problems:,} fault{'s' * (problems > 1)} in the data files; nothing was written",
            "Mend the lines above and run it again.",
            zh=f"数据文件有 {problems:,} 处错误，未写入任何文件。请按上面逐行列出的提示修改后重新运行。",
        )
    findings.tell(console)
    return kept


def _strange_names(settings: Settings, texts: dict[str, Texts]) -> list[str]:
    """Every other assistant's and maker's name that is no part of the assistant's own."""
    others = [{"name": name} for name in LEFTOVER] + [other for text in texts.values() for other in text.others]
    return sorted({other["name"] for other in strangers(others, settings)})


def _too_long(prompt: Prompt, messages: list[Message], most: int) -> list[rows.Fault]:
    count = len(prompt.encode(messages).ids)
    fault = rows.Fault(
        f"{count:,} tokens, and [data] max_length is {most:,}", "shorten or split it, or raise max_length"
    )
    return [fault] if count > most else []


HELD_OUT = "a held-out question of the evaluation"


@dataclass
class Findings:
    """What the user should know about rows that have no fault."""

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # "exact" and "near" duplicates
    counts: Counter[str] = field(default_factory=Counter)  # rows with a stranger's name, or HELD_OUT
    places: dict[str, list[str]] = field(default_factory=dict)  # where, the first LINES_TOLD of each

    def note(self, what: str, where: str) -> None:
        """Count a finding, and remember where it is if not many came before."""
        self.counts[what] += 1
        if self.counts[what] <= LINES_TOLD:
            self.places.setdefault(what, []).append(where)

    def tell(self, console: Console) -> None:
        """Print what was found, in English and Chinese."""
        share = self.dropped.total() / max(self.rows, 1)
        lines = []
        if share:
            lines.append(
                f"{self.dropped.total():,} of {self.rows:,} own rows are duplicates ({share:.0%}) and were dropped: "
                f"{self.dropped['exact']:,} exact, {self.dropped['near']:,} but for width, case, punctuation and "
                "spaces. 重复的行已去掉。"
            )
        if share > 0.1:
            lines.append(
                "Warning: more than 10 % are duplicates; different rows teach more than the same ones repeated. "
                "警告：重复超过 10%，与其重复，不如多写不同的内容。"
            )
        for what, places in self.places.items():
            where = ", ".join(places) + (" …" if self.counts[what] > len(places) else "")
            if what == HELD_OUT:
                lines.append(
                    f"{self.counts[what]:,} rows ask {what} and were left out: {where}. 与评测题相同，已略去。"
                )
            else:
                lines.append(f"Warning: {what} is in {self.counts[what]:,} rows: {where}. 警告：仍有“{what}”。")
        if self.counts.keys() - {HELD_OUT}:
            lines.append('Replace other assistants\' names with [data] rename = { "old" = "new" }. 可用 rename 替换。')
        for line in lines:
            console.print(line, style="yellow", markup=False)


class Seen:
    """Which rows came before, by hash, in a temporary file of SQLite's, so that memory is constant for any number."""

    def __init__(self):
        self._rows = sqlite3.connect("")
        self._rows.execute("PRAGMA journal_mode = OFF")
        self._rows.execute("CREATE TABLE seen (near BLOB PRIMARY KEY, exact BLOB) WITHOUT ROWID")

    def add(self, messages: list[Message]) -> str:
        """Remember a row. "exact" if the same came before, "near" if one that is equal when normalised did, else ""."""
        texts = [(message["role"], message["content"]) for message in messages]
        exact, near = _hash(texts), _hash([(role, normalise(text) or text) for role, text in texts])
        if self._rows.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (near, exact)).rowcount:
            return ""
        (first,) = self._rows.execute("SELECT exact FROM seen WHERE near = ?", (near,)).fetchone()
        return "exact" if first == exact else "near"

    def close(self) -> None:
        """Remove the temporary file."""
        self._rows.close()


def _hash(texts: list[tuple[str, str]]) -> bytes:
    return hashlib.blake2b(json.dumps(texts).encode(), digest_size=16).digest()


def _preview(path: Path, tokenizer, prompt: Prompt, count: int, total: int) -> None:
    """Print `count` rows, spread over the file: text and token ids; those that carry loss are green and in ⟦ ⟧."""
    console = _console()
    chosen = {index * total // count for index in range(count)}
    for index, messages in enumerate(conversations(path)):
        if index not in chosen:
            continue
        encoded = prompt.encode(messages)
        text, numbers = Text(), Text()
        labelled = zip(encoded.ids, encoded.labels, strict=True)
        for loss, run in itertools.groupby(labelled, key=lambda pair: pair[1] != IGNORED):
            ids = [token for token, _ in run]
            style, left, right = ("bold green", "⟦", "⟧") if loss else ("dim", "", "")
            text.append(f"{left}{tokenizer.decode(ids)}{right}", style)
            numbers.append(f"{left}{' '.join(map(str, ids))}{right} ", style)
        learned = sum(label != IGNORED for label in encoded.labels)
        console.rule(f"row {index + 1:,}: {len(encoded.ids):,} tokens, loss on {learned:,} ⟦ ⟧")
        console.print(text, numbers, sep="\n")
