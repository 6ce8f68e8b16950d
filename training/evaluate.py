"""evaluate: does the assistant know its name, does it keep to it, and is everything else as it was?

The same held-out questions go to the base model and to the merged one, through the page's engine, so that what is
measured is what visitors get. Every answer is written to work/<run>/report/ as it is made; `report.py` makes the rest.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from space.settings import NamesakeError, Settings
from training import record

QUESTIONS = Path(__file__).parent / "questions"
LANGUAGES = ("zh", "en")
MODES = ("persona", "none", "plain")
PLAIN = {
    "zh": "你是一个乐于助人的助手，请认真回答用户的问题。",
    "en": "You are a careful assistant. Answer the user's questions.",
}
BUDGET = {"identity": 128, "neutral": 256}  # the most new tokens in an answer
QUICK_BUDGET = {"identity": 40, "neutral": 48}
CHUNK = 512  # tokens of general text that the model reads at once
QUICK_TOKENS = 1024  # general text read by --quick, a language

console = Console()


@dataclass(frozen=True)
class Question:
    """One held-out question. `turns` begins and ends with the user's; `system` is one of its own."""

    set: str  # identity or neutral
    language: str
    category: str
    number: int
    turns: tuple[str, ...]
    system: str = ""
    expects: tuple[str, ...] = ()  # what a good answer gives: name, maker


@dataclass(frozen=True)
class Ask:
    """A question as it is asked: with which system prompt, and which sample (0 is greedy)."""

    question: Question
    mode: str
    sample: int = 0

    @property
    def key(self) -> str:
        q = self.question
        return f"{q.set}/{q.language}/{q.category}/{q.number}/{self.mode}/{self.sample}"

    def messages(self, persona: str) -> list[dict]:
        """The conversation. A question's own system prompt comes after the mode's."""
        q = self.question
        system = {"persona": persona, "none": "", "plain": PLAIN[q.language]}[self.mode]
        system = "\n".join(filter(None, (system, q.system)))
        roles = itertools.cycle(("user", "assistant"))
        return [{"role": "system", "content": system}] * bool(system) + [
            {"role": role, "content": text} for role, text in zip(roles, q.turns, strict=False)
        ]


def questions(quick: bool = False) -> list[Question]:
    """All held-out questions; with `quick` a fixed sample of them, the same share of every category."""
    found = []
    for kind, language in itertools.product(BUDGET, LANGUAGES):
        table = tomllib.loads((QUESTIONS / f"{kind}.{language}.toml").read_text(encoding="utf-8"))
        for category, part in table.items():
            for number, ask in enumerate(part["ask"]):
                if quick and number % 20 != 3:
                    continue
                system = ask["system"] if isinstance(ask, dict) else ""
                turns = ask["user"] if isinstance(ask, dict) else ask
                turns = (turns,) if isinstance(turns, str) else tuple(turns)
                found.append(Question(kind, language, category, number, turns, system, tuple(part.get("expects", ()))))
    return found


def asks(quick: bool = False, samples: int = 0) -> list[Ask]:
    """Everything that is asked: identity questions in each mode and sample, neutral ones greedily with the persona."""
    return [
        Ask(question, mode, sample)
        for question in questions(quick)
        for mode in (MODES if question.set == "identity" else MODES[:1])
        for sample in range(samples + 1 if question.set == "identity" else 1)
    ]


def evaluate(
    settings: Settings,
    *,
    before: str = "",
    after: str = "",
    quick: bool = False,
    samples: int = 0,
    resume: bool = False,
    load_in: str = "auto",
) -> bool:
    """Measure before and after, write the report, and say whether the gate is passed.

    `before`: the base, by default the settings'. `after`: a merged folder (by default this run's), a peft adapter's
    folder, a GGUF file (llama.cpp answers, as on the page), or the URL of a live page. `samples`: sampled answers for
    each identity question beside the greedy one. `resume`: keep the answers of an evaluation that was stopped.
    Raises NamesakeError when something is missing.
    """
    from training import report

    after = after or str(settings.work / "merged")
    live = after.startswith(("http://", "https://"))
    known = any(Path(after, name).is_file() for name in ("config.json", "adapter_config.json"))
    if not live and not known and not (after.endswith(".gguf") and Path(after).is_file()):
        raise NamesakeError(
            f"{after}: no merged weights and no adapter",
            "Run: python -m training merge, or give a folder with --after.",
            zh=f"{after} 里没有合并后的权重，也没有适配器。请先运行 python -m training merge，或用 --after 指定。",
        )
    before = before or str(_base(settings))
    if not Path(before, "config.json").is_file():
        raise NamesakeError(
            f"{before}: no model's folder (no config.json)",
            "Leave --before out, or run: python -m training base.",
            zh=f"{before} 不是模型文件夹（没有 config.json）。请去掉 --before，或先运行 python -m training base。",
        )
    folder = settings.work / "report"
    folder.mkdir(parents=True, exist_ok=True)
    asked = conditions(settings, quick, load_in)
    inputs = {
        "before": weights_identity(before),
        "after": weights_identity(after) if not live else after,
        "assistant": asdict(settings.assistant),
        "gate": asdict(settings.gate),
        "samples": samples,
    } | asked
    if not live and record.unchanged(folder, inputs) and (folder / "report.json").is_file():
        passed = json.loads((folder / "report.json").read_text(encoding="utf-8"))["gate"]["passed"]
        console.print(f"Evaluated already: {folder / 'report.md'}; gate {'passed' if passed else 'FAILED'}.")
        return passed
    (folder / "run.json").unlink(missing_ok=True)

    adapter = after if not live and Path(after, "adapter_config.json").is_file() else ""
    wanted = asks(quick, samples)
    sides = {}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console,
    ) as progress:  # fmt: skip
        for side in ("before", "after"):
            answers = Answers(folder / f"answers.{side}.jsonl", {side: inputs[side]} | asked, resume)
            texts = {
                language: progress.add_task(f"{side:6} text, {language}", total=None, visible=False)
                for language in LANGUAGES
            }
            task = progress.add_task(f"{side:6} answers", total=len(wanted), completed=0)
            try:
                if side == "after" and live:
                    missing = [ask for ask in wanted if ask.key not in answers.kept and not ask.sample]
                    progress.advance(task, len(wanted) - len(missing))
                    _ask_page(after, missing, settings, answers, lambda task=task: progress.advance(task))
                    sides[side] = Measured(answers.kept, {})
                    continue
                source = after if side == "after" and not adapter else before
                on_top = adapter if side == "after" else ""
                sides[side] = _measure(
                    source, on_top, load_in, wanted, settings, answers, quick,
                    lambda done=1, task=task: progress.advance(task, done),
                    lambda language, done, total, texts=texts: progress.update(
                        texts[language], completed=done, total=total, visible=True
                    ),
                )  # fmt: skip
            except KeyboardInterrupt:
                progress.stop()
                kept = sum(ask.key in answers.kept for ask in wanted)
                console.print(f"Stopped: {kept} of {len(wanted)} answers are kept in {answers.path}. "
                              "Go on with --resume.")  # fmt: skip
                raise
            finally:
                answers.close()
    result = report.write(folder, settings, wanted, sides["before"], sides["after"], inputs)
    record.write(folder, inputs, passed=result["gate"]["passed"])
    following = "python -m training evaluate, with all questions" if quick else "python -m publish all"
    what = f"passed. Next: {following}" if result["gate"]["passed"] else "FAILED: see the report"
    console.print(f"{folder / 'report.md'}: gate {what}")
    return result["gate"]["passed"]


@dataclass(frozen=True)
class Measured:
    """One side's answers by key, and its general loss in nats a token by language."""

    answers: dict[str, dict]
    loss: dict[str, float]


def conditions(settings: Settings, quick: bool = False, load_in: str = "auto") -> dict:
    """What answers hang on beside the weights: under any other they are asked anew."""
    page = settings.page
    return {
        "persona": settings.assistant.system_prompt,
        "quick": quick,
        "questions": _sources(),
        "load_in": load_in,
        "sampling": [page.temperature, page.top_p, page.top_k, page.repetition_penalty],
    }


class Answers:
    """Answers on disk, one JSON object a line, the first line saying whose they are."""

    def __init__(self, path: Path, header: dict, resume: bool):
        self.path, self.kept = path, {}
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if resume and path.is_file() else []
        rows = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # the last line, when the machine went down while writing
                rows.append(json.loads(line))
        if rows and rows[0] != json.loads(json.dumps(header)):
            raise NamesakeError(
                f"{path}: these answers are of other weights, settings or questions",
                "Run without --resume.",
                zh=f"{path} 里的回答属于别的权重、设置或题目。请去掉 --resume 再运行。",
            )
        self.kept = {row["key"]: row for row in rows[1:]}
        self._file = path.open("w", encoding="utf-8")
        for row in [header, *self.kept.values()]:
            self._write(row)

    def add(self, key: str, **found) -> None:
        """Keep an answer's text, state and tokens, or the loss of a text."""
        self.kept[key] = {"key": key, **found}
        self._write(self.kept[key])

    def close(self) -> None:
        self._file.close()

    def _write(self, row: dict) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()


def weights_identity(folder: str) -> str:
    """What tells weights apart: the SHA-256 of SHA256SUMS where there is one, else of the safetensors files."""
    path = Path(folder)
    if path.is_file():
        return record.sha256(path)
    if (path / "SHA256SUMS").is_file():
        return record.sha256(path / "SHA256SUMS")
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        digest.update(f"{record.sha256(file)}  {file.name}\n".encode())
    return digest.hexdigest()


def general_loss(engine, text: str, limit: int = 0, batch: int = 4, told=lambda done, total: None) -> float:
    """The mean loss per token of a text in nats, read in chunks of CHUNK tokens, the first `limit` tokens of it.

    Each chunk begins with the begin token where the model's chats do, and its first token carries no loss otherwise.
    `told` hears how many chunks are read, of how many.
    """
    import torch
    import torch.nn.functional as functional

    from space.gguf import GgufEngine
    from space.prompt import plain_template

    ids = engine.prompt.ids(text)
    ids = ids[:limit] if limit else ids
    begin = [engine.tokenizer.bos_token_id] if "bos_token" in plain_template(engine.tokenizer) else []
    chunks = [begin + ids[i : i + CHUNK] for i in range(0, len(ids), CHUNK)]
    chunks = [chunk for chunk in chunks if len(chunk) > 1]
    total, count = 0.0, 0
    for i in range(0, len(chunks), batch):
        group = chunks[i : i + batch]
        told(i, len(chunks))
        if isinstance(engine, GgufEngine):
            losses = [loss for chunk in group for loss in engine.losses(chunk)]
            total, count = total + sum(losses), count + len(losses)
            continue
        longest = max(map(len, group))
        inputs = torch.tensor([chunk + [0] * (longest - len(chunk)) for chunk in group])
        labels = torch.tensor([chunk[1:] + [-100] * (longest - len(chunk)) for chunk in group])
        with torch.inference_mode():
            logits = engine.model(input_ids=inputs.to(engine.model.device), use_cache=False).logits[:, :-1].float()
            loss = functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten().to(logits.device), ignore_index=-100, reduction="sum"
            )
        total += loss.item()
        count += int((labels != -100).sum())
    told(len(chunks), len(chunks))
    return total / count


def general_text(language: str) -> str:
    """The held-out text for the loss: written for this project, or in the public domain (questions/README.md)."""
    return (QUESTIONS / f"general.{language}.txt").read_text(encoding="utf-8")


def _measure(
    source, adapter, load_in, wanted, settings, answers: Answers, quick,
    advance=lambda done=1: None, told=lambda language, done, total: None,
) -> Measured:  # fmt: skip
    from space import batch, gguf, weights

    if source.endswith(".gguf"):
        engine, _, _ = gguf.start(Path(source), concurrency=8)
    else:
        loaded = weights.load(source, adapter, load_in)
        engine = batch.make_engine(loaded.model, loaded.tokenizer)
    with contextlib.closing(engine):
        for language in LANGUAGES:
            if f"general/{language}" not in answers.kept:
                limit = QUICK_TOKENS if quick else 0
                loss = general_loss(engine, general_text(language), limit, told=functools.partial(told, language))
                answers.add(f"general/{language}", loss=loss)
        engine.warm_up()  # only now: it takes most of a GPU's memory
        _answer(engine, wanted, settings, answers, quick, advance)
    return Measured(answers.kept, {language: answers.kept[f"general/{language}"]["loss"] for language in LANGUAGES})


def _answer(engine, wanted: list[Ask], settings: Settings, answers: Answers, quick: bool, advance) -> None:
    from space.engine import GREEDY, Sampling

    missing = [ask for ask in wanted if ask.key not in answers.kept]
    advance(len(wanted) - len(missing))
    for (kind, sample), group in _grouped(missing):
        budget = (QUICK_BUDGET if quick else BUDGET)[kind]
        page = settings.page
        sampling = (
            Sampling(budget, page.temperature, page.top_p, page.top_k, page.repetition_penalty, seed=sample)
            if sample
            else Sampling(budget, GREEDY.temperature, GREEDY.top_p, GREEDY.top_k, GREEDY.repetition_penalty)
        )

        def keep(index, answer, group=group):
            answers.add(group[index].key, text=answer.text, state=answer.state, tokens=answer.tokens_out)
            advance()

        engine.answer([ask.messages(settings.assistant.system_prompt) for ask in group], sampling, keep)


def _grouped(wanted: list[Ask]) -> Iterator[tuple[tuple[str, int], list[Ask]]]:
    def key(ask):
        return ask.question.set, ask.sample

    for group, found in itertools.groupby(sorted(wanted, key=key), key):
        yield group, list(found)


def _ask_page(url: str, wanted: list[Ask], settings: Settings, answers: Answers, advance) -> None:
    """Ask a live page through its /chat API, greedily. A visitor's own turns are sent one after the other.

    Earlier answers in a conversation are the page's own.
    """
    import httpx
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    greedy = {"temperature": 0, "repetition_penalty": 1}
    try:
        client = Client(url, verbose=False)
        chat = client.view_api(return_format="dict", print_info=False)["named_endpoints"]["/chat"]
        names = {parameter["parameter_name"] for parameter in chat["parameters"]}
        for ask in wanted:
            messages = ask.messages(settings.assistant.system_prompt)
            system = messages[0]["content"] if messages[0]["role"] == "system" else ""
            options = {name: value for name, value in (greedy | {"system_prompt": system}).items() if name in names}
            client.reset_session()
            for message in messages:
                if message["role"] == "user":
                    text = client.predict(message=message["content"], api_name="/chat", **options)
            answers.add(ask.key, text=str(text), state="finished", tokens=0)
            advance()
    except (httpx.HTTPError, AppError, ValueError, KeyError, OSError) as error:
        raise NamesakeError(
            f"{url}: the page's /chat did not answer ({type(error).__name__}: {error})",
            "Give the page's own URL, see that it is running, and go on with --resume.",
            zh=f"{url} 的 /chat 没有回答（{type(error).__name__}）。请检查网址、确认页面在线，再用 --resume 继续。",
        ) from error


def _base(settings: Settings) -> Path:
    from training import base

    return base.folder(settings)


def _sources() -> dict[str, str]:
    return {file.name: record.sha256(file) for file in sorted(QUESTIONS.iterdir()) if file.suffix in (".toml", ".txt")}
