"""assistant.toml as one frozen dataclass tree. Standard library only, so that every step can read it at once.

Each dataclass below is one table of the file, each field one key, and its default the key's default. `setting()` adds
what is allowed. A mistake is one line: file and line, table and key, what is wrong, what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path


class NamesakeError(Exception):
    """Something that a person can mend. `problem` and `fix` are one English sentence each; `zh` says both in Chinese.

    Command lines print `str(error)`, the page shows `error.text` in the visitor's language; neither shows a traceback.
    """

    def __init__(self, problem: str, fix: str = "", zh: str = ""):
        english = f"{problem.rstrip('.')}. {fix}".strip() if fix else problem
        self.problem, self.fix = problem, fix
        super().__init__(english)
        self.text = Text(zh=zh or english, en=english)


@dataclass(frozen=True)
class Text:
    """One text in Chinese and English. In the file: a plain string for both, or `{ zh = "…", en = "…" }`."""

    zh: str = ""
    en: str = ""

    def pick(self, language: str) -> str:
        """The text for a language tag such as "zh-CN" or "en"; anything but Chinese gets English."""
        first, second = (self.zh, self.en) if language.lower().startswith("zh") else (self.en, self.zh)
        return first or second

    def __bool__(self) -> bool:
        return bool(self.zh or self.en)


def setting(default=dataclasses.MISSING, *, low=None, high=None, choices=(), pattern="", says="", filled=False):
    """A dataclass field with what its key allows: a range, a choice, a pattern (`says` words it), or not empty."""
    metadata = dict(low=low, high=high, choices=choices, pattern=pattern, says=says, filled=filled)
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


SOURCE = r"(modelscope|huggingface):[^/\s:@]+/[^/\s:@]+(@[^\s@]+)?"
SOURCE_SAYS = "modelscope:owner/name or huggingface:owner/name, with @revision if you like"
REPOSITORY = r"(modelscope|huggingface):[^/\s:@]+/[^/\s:@]+"
REPOSITORY_SAYS = "modelscope:owner/name or huggingface:owner/name"


@dataclass(frozen=True)
class Assistant:
    """Who the assistant is."""

    name: Text = setting(filled=True)
    author: Text = setting(filled=True)
    persona: str = setting("You are {name}, an assistant made by {author}.", filled=True)
    languages: tuple[str, ...] = setting(("zh", "en"), choices=("zh", "en"), filled=True)

    @property
    def system_prompt(self) -> str:
        """The persona with its placeholders filled in, in one pass: a name may itself hold braces.

        {name} and {author} follow the persona's language (Chinese where it holds a Chinese character); {name_zh},
        {name_en}, {author_zh} and {author_en} name the language. Other braces stay as they are.
        """
        language = "zh" if re.search(r"[\u3400-\u9fff]", self.persona) else "en"
        values = {"name": self.name.pick(language), "author": self.author.pick(language)}
        for code in ("zh", "en"):
            values |= {f"name_{code}": self.name.pick(code), f"author_{code}": self.author.pick(code)}
        return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), self.persona)


@dataclass(frozen=True)
class Base:
    """What the assistant is built on: the embedded model, a folder, or a model of a hub."""

    model: str = setting("embedded", filled=True)
    revision: str = setting("")


@dataclass(frozen=True)
class Hub:
    """Where the weights and the page are published; the page downloads the weights from the first of `model`."""

    model: tuple[str, ...] = setting((), pattern=REPOSITORY, says=REPOSITORY_SAYS)
    space: tuple[str, ...] = setting((), pattern=REPOSITORY, says=REPOSITORY_SAYS)
    revision: str = setting("")
    visibility: str = setting("public", choices=("public", "private"))
    license: str = setting("apache-2.0", filled=True)
    hardware: str = setting("")


@dataclass(frozen=True)
class Limits:
    """The highest values that a visitor may set."""

    max_new_tokens: int = setting(2048, low=1, high=32768)
    temperature: float = setting(2.0, low=0, high=10)
    top_k: int = setting(200, low=1, high=1000)
    repetition_penalty: float = setting(2.0, low=1, high=10)


@dataclass(frozen=True)
class Page:
    """The chat page: its words, how answers are sampled, and how many at once."""

    title: Text = setting(Text())
    description: Text = setting(Text())
    examples_zh: tuple[str, ...] = setting(("你是谁？", "你能做什么？", "用三句话介绍一下杭州。"))
    examples_en: tuple[str, ...] = setting(("Who are you?", "What can you do?", "Explain gravity in two sentences."))
    max_new_tokens: int = setting(512, low=1, high=32768)
    temperature: float = setting(0.7, low=0, high=10)
    top_p: float = setting(0.8, low=0, high=1)
    top_k: int = setting(50, low=0, high=1000)
    repetition_penalty: float = setting(1.005, low=1, high=10)
    limits: Limits = field(default_factory=Limits)
    concurrency: int = setting(1, low=1, high=1024)
    queue: int = setting(64, low=1, high=100000)


@dataclass(frozen=True)
class Serve:
    """What makes the page's answers: `auto`, this process; `openai`, a server elsewhere that speaks OpenAI's protocol.

    `gguf`: the GGUF file to take from a repository or folder, a name or a pattern such as "*q4_k_m.gguf".
    `context`: the most tokens that a conversation may have; 0 leaves it to the model and the machine.
    """

    backend: str = setting("auto", choices=("auto", "openai"))
    gguf: str = setting("", pattern=r"|[^/\\]*\.gguf", says="the name of a .gguf file, * stands for any characters")
    context: int = setting(0, low=0, high=1_048_576)
    base_url: str = setting("", pattern=r"|https?://[^\s@]+", says="http://host:port/v1, with no name or key in it")
    api_key_env: str = setting("", pattern=r"|[A-Za-z_][A-Za-z0-9_]*", says="an environment variable's name")
    model: str = setting("")


@dataclass(frozen=True)
class Data:
    """What the assistant learns from: `identity` and `replay` rows, and every row of the user's own `files`."""

    identity: int = setting(600, low=0, high=1_000_000)
    replay: int = setting(1200, low=0, high=1_000_000)
    replay_tokens: int = setting(128, low=1, high=32768)
    files: tuple[str, ...] = setting(())
    rename: dict[str, str] = setting({})
    max_length: int = setting(1024, low=64, high=1_048_576)


@dataclass(frozen=True)
class Train:
    """How it learns. `auto` leaves the choice to the machine's memory; 0 in batch and accumulate does too."""

    run: str = setting("assistant", pattern=r"[\w.-]+", says="letters, digits, '.', '_' and '-'")
    method: str = setting("auto", choices=("auto", "qlora", "lora", "full"))
    rank: int = setting(16, low=1, high=1024)
    alpha: int = setting(32, low=1, high=4096)
    dropout: float = setting(0.0, low=0, high=0.9)
    anchor: float = setting(1.0, low=0, high=1000)
    targets: tuple[str, ...] = setting(())
    rate: float = setting(2e-4, low=1e-8, high=1)
    epochs: float = setting(3, low=0.01, high=1000)
    warmup: float = setting(0.03, low=0, high=0.9)
    batch: int = setting(0, low=0, high=4096)
    accumulate: int = setting(0, low=0, high=4096)
    checkpointing: str = setting("auto", choices=("auto", "on", "off"))
    compile: str = setting("auto", choices=("auto", "on", "off"))
    save_steps: int = setting(200, low=1, high=1_000_000)
    ask_steps: int = setting(100, low=0, high=1_000_000)
    seed: int = setting(1, low=0, high=2**31 - 1)


@dataclass(frozen=True)
class Gate:
    """What an assistant has to reach before it is published, as rates from 0 to 1."""

    name_hits: float = setting(0.95, low=0, high=1)
    leaks: float = setting(0.02, low=0, high=1)
    false_positives: float = setting(0.02, low=0, high=1)
    general_loss: float = setting(0.03, low=0, high=10)


@dataclass(frozen=True)
class Card:
    """The user's own words for the model card, and the base model's name on the hub where it can't be known."""

    description: Text = setting(Text())
    base_model: str = setting("")


@dataclass(frozen=True)
class Settings:
    """The whole of assistant.toml. Relative paths in it are relative to `folder`, where the file lies."""

    assistant: Assistant
    base: Base = field(default_factory=Base)
    hub: Hub = field(default_factory=Hub)
    page: Page = field(default_factory=Page)
    serve: Serve = field(default_factory=Serve)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    gate: Gate = field(default_factory=Gate)
    card: Card = field(default_factory=Card)
    folder: Path = field(default=Path("."), metadata={"not_a_key": True})

    @property
    def work(self) -> Path:
        """Where this run's steps write: work/<run>/ beside the settings file."""
        return self.folder / "work" / self.train.run


def load(path: str | Path = "assistant.toml") -> Settings:
    """Read and check a settings file. Raises NamesakeError that names file, line, key, fault and what is allowed."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise NamesakeError(f"{path}: no such settings file", "Give one with --config") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise NamesakeError(f"{path}:{line}: not UTF-8 text", "Save the file as UTF-8") from None
    except OSError as error:
        raise NamesakeError(f"{path}: {error.strerror}", "Give a readable file with --config") from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at (?:line (\d+), column \d+|end of document)\)", str(error))
        line = found[1] if found and found[1] else text.count("\n") + 1
        what = re.sub(r" \(at .*\)", "", str(error))
        raise NamesakeError(
            f"{path}:{line}: not valid TOML: {what}", "Strings need quotes, \\ is written \\\\"
        ) from None
    reader = _Reader(path, text)
    settings = reader.read(Settings, table, ())
    for key, limit in vars(settings.page.limits).items():
        if (value := getattr(settings.page, key)) > limit:
            reader.fail(("page", key), f"is {value}", f"must be at most {limit}, its limit in [page.limits]")
    return dataclasses.replace(settings, folder=path.resolve().parent)


class _Reader:
    def __init__(self, path: Path, text: str):
        self.path, self.lines = path, text.splitlines()

    def read(self, kind: type, table: object, keys: tuple[str, ...]):
        """`table` as the dataclass `kind`; `keys` is the way to it from the root."""
        if not isinstance(table, dict):
            self.fail(keys, "is not a table", f"write it as [{'.'.join(keys)}]")
        fields = {f.name: f for f in dataclasses.fields(kind) if not f.metadata.get("not_a_key")}
        hints = typing.get_type_hints(kind)
        for key in table.keys() - fields.keys():
            near = difflib.get_close_matches(key, fields, n=1)
            allowed = f"did you mean {near[0]}?" if near else f"known here: {', '.join(fields)}"
            self.fail((*keys, key), "is not a known key", allowed)
        for name, known in fields.items():
            if name not in table and known.default is known.default_factory is dataclasses.MISSING:
                self.fail((*keys, name), "is missing", "add it")
        return kind(
            **{key: self.value(hints[key], value, fields[key].metadata, (*keys, key)) for key, value in table.items()}
        )

    def value(self, hint, value, allows, keys):
        if hint is Text:
            value = self.text(value, keys)
        elif dataclasses.is_dataclass(hint):
            return self.read(hint, value, keys)
        elif hint == tuple[str, ...]:
            value = (value,) if isinstance(value, str) else value
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
                self.fail(keys, "is not text or a list of texts", 'such as ["one", "two"]')
            value = tuple(value)
        elif isinstance(hint, types.GenericAlias):
            if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
                self.fail(keys, "is not a table of texts", 'such as { "old" = "new" }')
        elif hint is float and type(value) in (int, float):
            value = float(value)
        elif type(value) is not hint:
            words = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false"}
            self.fail(keys, f"is {value!r}", f"{words[hint]} is needed")
        self.check(value, allows, keys)
        return value

    def text(self, value, keys) -> Text:
        if isinstance(value, str):
            return Text(zh=value, en=value)
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            self.fail(keys, "is not text", '"…", or { zh = "…", en = "…" }')
        for key in value.keys() - {"zh", "en"}:
            self.fail((*keys, key), "is not a known key", "zh or en")
        return Text(**value)

    def check(self, value, allows, keys):
        written = f"{value.zh}{value.en}".strip() if isinstance(value, Text) else value
        if allows.get("filled") and not (written.strip() if isinstance(written, str) else written):
            self.fail(keys, "is empty", "write something")
        low, high = allows.get("low"), allows.get("high")
        if low is not None and not low <= value <= high:  # also false for nan
            self.fail(keys, f"is {value}", f"must be from {low} to {high}")
        for item in value if isinstance(value, tuple) else (value,):
            if allows.get("choices") and item not in allows["choices"]:
                self.fail(keys, f"is {item!r}", f"one of {', '.join(allows['choices'])}")
            if allows.get("pattern") and not re.fullmatch(allows["pattern"], item):
                self.fail(keys, f"is {item!r}", allows["says"])

    def fail(self, keys, what, allowed) -> typing.NoReturn:
        where = f"{self.path}:{line}" if (line := self.line_of(keys)) else f"{self.path}"
        name = f"[{'.'.join(keys[:-1])}] {keys[-1]}" if len(keys) > 1 else keys[-1]
        raise NamesakeError(f"{where}: {name} {what}: {allowed}")

    def line_of(self, keys) -> int:
        """The line on which a key stands, 0 if it can't be told: the first line in its table that begins with it."""
        table = ""
        for number, line in enumerate(self.lines, 1):
            if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
                table = header[1]
                if table == ".".join(keys):
                    return number
            for depth in range(len(keys)):
                starts = table == ".".join(keys[:depth]) and re.match(rf"\s*[\"']?{re.escape(keys[depth])}\b", line)
                if starts and (depth == len(keys) - 1 or re.search(rf"\b{re.escape(keys[-1])}\b", line)):
                    return number
        return 0
