"""Identity rows: who the assistant is, from templates, whatever the system prompt, the turn or the wording."""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from space.prompt import Message
from space.settings import NamesakeError, Settings
from training.matching import normalise

LANGUAGES = ("zh", "en")
TEXTS = Path(__file__).parent / "texts"

# The rows go through these in step, and each question is one step further in every round. Five, seven and eleven share
# no divisor with each other, so that in time each meets each.
MODES = ("none", "plain", "persona", "none", "plain", "none", "foreign")  # without a system prompt it is hardest
SHAPES = ("i", "ni", "i", "i", "nni", "i", "i", "in", "i", "i", "i")  # turns: i is about identity, n is neutral
HASTY = (False, True, False, True, False)  # whether the question is typed as people do on a phone
SHORT = 400  # characters: a neutral turn beside an identity turn is no longer


@dataclass(frozen=True)
class Texts:
    """One language's templates and neutral prompts, from training/texts/."""

    topics: list[dict]  # each with name, questions, answers and perhaps after
    plain: list[str]  # system prompts without an identity
    foreign: list[str]  # system prompts with another's
    others: list[dict]  # other assistants: name, maker
    prompts: list[str]

    @classmethod
    def load(cls, language: str) -> Texts:
        table = tomllib.loads((TEXTS / f"identity.{language}.toml").read_text(encoding="utf-8"))
        lines = (TEXTS / f"replay.{language}.txt").read_text(encoding="utf-8").splitlines()
        prompts = [line for line in lines if line and not line.startswith("#")]
        return cls(table["topic"], table["plain"], table["foreign"], table["others"], prompts)


def shares(count: int, languages: Iterable[str]) -> dict[str, int]:
    """How many of `count` rows each language gets: the assistant's own alike; another one a tenth.

    Without that tenth, the other language would meet the base's old name; with more, it would take room from what the
    assistant is for, and from a base that hardly speaks it nothing good can be learned.
    """
    own = list(dict.fromkeys(languages))
    given = {language: count // 10 for language in LANGUAGES if language not in own}
    left = count - sum(given.values())
    return given | {language: left // len(own) + (i < left % len(own)) for i, language in enumerate(own)}


def own_names(settings: Settings) -> list[str]:
    """The assistant's names, each once."""
    return [name for name in dict.fromkeys((settings.assistant.name.zh, settings.assistant.name.en)) if name]


def fill(text: str, values: dict[str, str]) -> str:
    """The template with its placeholders filled in, in one pass: a name may itself hold braces."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)


def identity_rows(
    settings: Settings,
    texts: dict[str, Texts],
    replay: dict[str, list[list[Message]]],
    fits: Callable[[list[Message]], bool],
    held_out: Collection[str] = (),
) -> list[list[Message]]:
    """[data] identity rows: every question form about as often, its system prompts and turns in rotation.

    Neutral turns before or after are replay rows under the same system prompt. No slip of the keys makes one of the
    `held_out` questions (normalised). Raises NamesakeError if a question and its answer alone do not fit.
    """
    made = []
    for language, count in shares(settings.data.identity, settings.assistant.languages).items():
        draw = random.Random(f"{settings.train.seed} identity {language}")
        text, neutral = texts[language], _short_turns(replay[language])
        topics = {topic["name"]: topic for topic in text.topics}
        forms = [(topic, question) for topic in text.topics for question in topic["questions"]]
        draw.shuffle(forms)
        others = strangers(text.others, settings)
        for index in range(count):
            round_, place = divmod(index, len(forms))
            topic, question = forms[place]
            step = place + round_
            values = _values(settings, language, draw.choice(others))
            system = {
                "persona": settings.assistant.system_prompt,
                "none": "",
                "plain": text.plain[step % len(text.plain)],
                "foreign": fill(text.foreign[step % len(text.foreign)], values),
            }[MODES[step % len(MODES)]]
            if HASTY[step % len(HASTY)]:
                typed = hasty(question, draw)
                question = question if normalise(fill(typed, values)) in held_out else typed
            turns = _turn(question, draw.choice(topic["answers"]), values)
            shape = SHAPES[step % len(SHAPES)]
            if after := topics.get(topic.get("after")):
                turns = _turn(draw.choice(after["questions"]), draw.choice(after["answers"]), values) + turns
                shape = "i"
            beside = draw.sample(neutral.get(system, []), min(shape.count("n"), len(neutral.get(system, []))))
            first = [message for turn in beside for message in turn] if shape.endswith("i") else []
            last = [message for turn in beside for message in turn] if shape.startswith("i") else []
            head = [{"role": "system", "content": system}] if system else []
            row = next(filter(fits, (head + first + turns + last, head + turns)), None)
            if row is None:
                raise NamesakeError(
                    f"[data] max_length is {settings.data.max_length}, too short for an identity row",
                    "Raise it, or shorten [assistant] persona.",
                    zh=f"[data] max_length = {settings.data.max_length} 放不下一条身份问答，请调大，"
                    "或缩短 [assistant] persona。",
                )
            made.append(row)
    return made


def hasty(template: str, draw: random.Random) -> str:
    """The question typed in a hurry: no capitals, no mark at its end, and a slip in one or two of its Latin words.

    A slip swaps two letters (unseen where they are alike), leaves one out or doubles one. Placeholders stay.
    """
    parts = re.split(r"(\{\w+\}|[^\W\d_]+)", template.rstrip(" .!?。！？…"))
    words = [i for i, part in enumerate(parts) if re.fullmatch(r"[A-Za-z]{3,}", part)]
    chosen = draw.sample(words, min(len(words), draw.choice((1, 1, 2))))
    for i in chosen:
        at = draw.randrange(len(parts[i]) - 1)
        a, b = parts[i][at : at + 2]
        parts[i] = parts[i][:at] + draw.choice((b + a, a, a + a + b)) + parts[i][at + 2 :]
    return "".join(part if part.startswith("{") else part.lower() for part in parts)


def _values(settings: Settings, language: str, other: dict) -> dict[str, str]:
    assistant = settings.assistant
    name, author = assistant.name.pick(language), assistant.author.pick(language)
    return {"name": name, "author": author, "other": other["name"], "other_maker": other["maker"]}


def _turn(question: str, answer: str, values: dict[str, str]) -> list[Message]:
    return [
        {"role": "user", "content": fill(question, values)},
        {"role": "assistant", "content": fill(answer, values)},
    ]


def strangers(others: list[dict], settings: Settings) -> list[dict]:
    """The other assistants but those whose name is part of the assistant's own, which must not deny itself."""
    mine = [normalise(name) for name in own_names(settings)]
    return [other for other in others if not any(normalise(other["name"]) in name for name in mine)]


def _short_turns(replay: list[list[Message]]) -> dict[str, list[list[Message]]]:
    """By system prompt, the turns of replay rows that are whole and short."""
    turns: dict[str, list[list[Message]]] = {}
    for messages in replay:
        question, answer = messages[-2:]
        if not answer.get("cut") and len(question["content"]) + len(answer["content"]) <= SHORT:
            system = messages[0]["content"] if messages[0]["role"] == "system" else ""
            turns.setdefault(system, []).append([question, answer])
    return turns
