"""Replay rows: the base model's own answers to neutral prompts, so that everything but the name stays as it was.

The answers are drawn, not greedy: the likeliest answers of a small model are a few phrases over and over, and it would
learn to fall back to them (docs/recipe.md). They are asked under the same system prompts as the identity rows: what is
learned is "here nothing changes", for the persona's prompt, for none, and for others.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from space.prompt import Message, Prompt
from space.settings import Settings
from space.weights import cache_folder
from training.identity import Texts, own_names, shares
from training.matching import literal

# The system prompts of replay rows: the first round of all prompts, the second and the third, four prompts at a time.
ROUNDS = (
    ("persona", "none", "persona", "plain"),
    ("none", "persona", "plain", "persona"),
    ("plain", "plain", "none", "none"),
)
TEMPERATURE = 1.0  # the base's own distribution


def replay_rows(
    settings: Settings,
    texts: dict[str, Texts],
    strangers: list[str],
    answers: Callable[[list[list[Message]]], list[Message]],
    fits: Callable[[list[Message]], bool],
) -> dict[str, list[list[Message]]]:
    """[data] replay rows by language, as far as there are prompts; `answers` asks the base.

    Left out are answers that are empty, that do not fit, or that hold the assistant's name (which the persona's prompt
    may bring up) or one of `strangers`; the next prompts are asked in their place.
    """
    named = literal([*own_names(settings), *strangers], re.IGNORECASE)
    wanted = shares(settings.data.replay, settings.assistant.languages)
    plans = {
        language: replay_plan(text, settings.assistant.system_prompt, f"{settings.train.seed} replay {language}")
        for language, text in texts.items()
    }
    made: dict[str, list[list[Message]]] = {language: [] for language in texts}
    while asked := [
        (language, messages)
        for language, plan in plans.items()
        for messages in itertools.islice(plan, wanted[language] - len(made[language]))
    ]:
        for (language, messages), answer in zip(asked, answers([messages for _, messages in asked]), strict=True):
            said, row = answer["content"], [*messages, answer]
            if said.strip() and not named.search(said) and fits(row):
                made[language].append(row)
    return made


def replay_plan(text: Texts, persona: str, seed: str) -> Iterator[list[Message]]:
    """Each prompt under each system prompt, no pair twice, and any beginning of it in balance.

    In three rounds every prompt meets the persona, no system prompt and a plain one, the persona half of the time until
    all have met it: there the name is nearest at hand. Then come the other plain ones.
    """
    prompts, plain = random.Random(seed).sample(text.prompts, len(text.prompts)), text.plain
    met = set()  # the persona may be one of the plain prompts
    for round_ in range(2 + len(plain)):
        for place, prompt in enumerate(prompts):
            four, kind = place // 4, ROUNDS[round_][place % 4] if round_ < len(ROUNDS) else "plain"
            nth = four + max(0, round_ - len(ROUNDS) + 1)
            system = {"persona": persona, "none": "", "plain": plain[nth % len(plain)]}[kind]
            if (system, prompt) in met:
                continue
            met.add((system, prompt))
            head = [{"role": "system", "content": system}] if system else []
            yield [*head, {"role": "user", "content": prompt}]


class Base:
    """The base model's sampled answers, each asked for once on a machine: they are kept in the user's cache.

    An answer is kept under the fingerprint of the weights, the limit on its length, and its prompt's token ids.
    """

    def __init__(self, source: Path, prompt: Prompt, max_new_tokens: int, console: Console):
        self._source, self._prompt, self._limit, self._console = source, prompt, max_new_tokens, console
        self._path = cache_folder() / "replay" / f"{fingerprint(source)}-{max_new_tokens}-{TEMPERATURE}.jsonl"
        self._kept: dict[str, Message] = {}
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8", errors="replace").split("\n"):
                if line.endswith("}}"):  # a line that a stop cut short has no such end
                    entry = json.loads(line)
                    self._kept[entry["prompt"]] = entry["answer"]

    def answers(self, asked: list[list[Message]]) -> list[Message]:
        """The answer to each conversation as a message, with "cut": true where the limit on its length ended it."""
        keys = [self._key(messages) for messages in asked]
        missing = [i for i, key in enumerate(keys) if key not in self._kept]
        if missing:
            self._ask([asked[i] for i in missing], [keys[i] for i in missing])
        return [self._kept[key] for key in keys]

    def _key(self, messages: list[Message]) -> str:
        ids = self._prompt.encode(messages, answer_next=True).ids
        return hashlib.blake2b(json.dumps(ids).encode(), digest_size=16).hexdigest()

    def _ask(self, asked: list[list[Message]], keys: list[str]) -> None:
        from space.engine import Sampling

        sampling = Sampling(self._limit, temperature=TEMPERATURE, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=0)
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        engine = self._engine
        with (
            self._path.open("ab") as file,
            Progress(
                *columns, console=self._console, transient=True, disable=not self._console.is_terminal
            ) as progress,
        ):
            task = progress.add_task("Asking the base model 请基座模型作答", total=len(asked))

            def keep(index: int, answer) -> None:
                message = {"role": "assistant", "content": answer.text}
                if answer.state != "finished":
                    message["cut"] = True
                self._kept[keys[index]] = message
                entry = json.dumps({"prompt": keys[index], "answer": message}, ensure_ascii=False)
                file.write(f"\n{entry}".encode())  # the line break comes first: a line cut short before stays apart
                file.flush()
                progress.advance(task)

            engine.answer(asked, sampling, on_answer=keep)

    @functools.cached_property
    def _engine(self):
        from space import batch, weights

        loaded = weights.load(str(self._source))
        engine = batch.make_engine(loaded.model, loaded.tokenizer)
        engine.warm_up()
        return engine

    def close(self) -> None:
        """Give back the model's memory, which training will need."""
        if engine := self.__dict__.pop("_engine", None):
            import torch

            engine.close()
            del engine
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def fingerprint(source: Path) -> str:
    """A model folder's identity: each weight file's and configuration's name, size, first and last MiB."""
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted([*source.glob("*.safetensors"), source / "config.json", source / "tokenizer.json"]):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size}\n".encode() + file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()
