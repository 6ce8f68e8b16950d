"""One row of training data in XTuner's conversation format: written, read, and what may be wrong with it.

{"conversation": [{"system": "…", "input": "…", "output": "…"}, {"input": "…", "output": "…"}]}, one object a line.
The system prompt is the first turn's; absent or "" means none. Two keys are this project's own: an output with
"cut": true was cut by a limit on its length, so nothing is learned from where it ends; a last output with
"replay": true is the base's own, and the conversation is there to keep the base as it was.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from space.prompt import Message

LONGEST_LINE = 16 * 2**20  # bytes; no such row would fit max_length, and a file of one line must not fill the memory

KEYS = ("system", "input", "output")
MARKS = ("cut", "replay")
SHAPE = '{"conversation": [{"input": "…", "output": "…"}]}'

# What people leave where a text was to be written: all of it, in any case. Dots and dashes alone are no answer either.
PLACEHOLDER = re.compile(
    r"x{2,}|todo|tbd|fixme|n/a|placeholder|lorem ipsum.*|<(your |the )?(question|answer|prompt)( here)?>"
    r"|[\[{(]{1,2}(your |the )?(system|input|output|question|answer|prompt|text)( here)?[\]})]{1,2}"
    r"|待填写?|待补充?|待定|占位符?|同上|此处填写.*|请在此.*|[【（《](系统|问题|回答|输入|输出|内容)[】）》]",
    re.IGNORECASE | re.DOTALL,
)
NO_ANSWER = re.compile(r"[\s.…。?？_*-]+")


class Fault(NamedTuple):
    """What is wrong with a row, and how to mend it."""

    what: str
    fix: str


class Read(NamedTuple):
    """A row of a file, numbered from 1: a conversation, or faults."""

    line: int
    messages: list[Message]
    faults: list[Fault]


def line(messages: list[Message]) -> str:
    """A conversation (an optional system message, then user and assistant in turn) as one line of the format."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    turns = [
        {"input": user["content"], "output": answer["content"]} | {mark: True for mark in MARKS if answer.get(mark)}
        for user, answer in zip(rest[::2], rest[1::2], strict=True)
    ]
    if system:
        turns[0] = {"system": system} | turns[0]
    return json.dumps({"conversation": turns}, ensure_ascii=False) + "\n"


def messages(row: dict) -> list[Message]:
    """A row without faults as a conversation, a list of {"role", "content"}."""
    turns = row["conversation"]
    conversation = [{"role": "system", "content": turns[0]["system"]}] if turns[0].get("system") else []
    for turn in turns:
        marks = {mark: True for mark in MARKS if turn.get(mark)}
        conversation += [
            {"role": "user", "content": turn["input"]},
            {"role": "assistant", "content": turn["output"]} | marks,
        ]
    return conversation


def read(path: Path, change: Callable[[str], str], advance: Callable[[int], None]) -> Iterator[Read]:
    """Each row of a user's file: its line number, and the conversation or what is wrong with it.

    `change` is applied to every text of the row before it is judged; `advance` is told the bytes of each line. Memory
    is that of one line. Empty lines are passed over; encoding faults are told once, at the first line that has one.
    """
    encoding_told = False
    for number, raw in _lines(path):
        advance(len(raw))
        if number == 1:
            if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                yield Read(1, [], [_encoding_fault(raw, path)])
                return
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if not raw.strip():
            continue
        if len(raw) > LONGEST_LINE:
            yield Read(number, [], [Fault("the line is longer than 16 MiB", _one_a_line(path))])
            continue
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = None
        if text is None or "\0" in text:
            if not encoding_told:
                yield Read(number, [], [_encoding_fault(raw, path)])
            encoding_told = True
            continue
        if number == 1 and (text.lstrip().startswith("[") or text.strip() == "{"):
            yield Read(1, [], [Fault("not one JSON object a line", _one_a_line(path))])
            return
        row = _parsed(text)
        if isinstance(row, Fault):
            yield Read(number, [], [row])
            continue
        _change(row, change)
        faults = list(_faults(row))
        yield Read(number, [] if faults else messages(row), faults)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines; one that is too long comes as its first LONGEST_LINE + 1 bytes."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            yield number, raw
            rest = raw
            while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
                rest = file.readline(LONGEST_LINE + 1)


def _encoding_fault(raw: bytes, path: Path) -> Fault:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw:
        found = "UTF-16"
    else:
        try:
            raw.decode("gb18030")
            found = "GBK"
        except UnicodeDecodeError:
            return Fault("not UTF-8", "save the file as UTF-8")
    source = "GB18030" if found == "GBK" else found
    return Fault(
        f"not UTF-8 but {found}", f"save it as UTF-8: iconv -f {source} -t UTF-8 {quote(path.name)} > utf8.jsonl"
    )


def _one_a_line(path: Path) -> str:
    return f"write one object a line: jq -c 'if type == \"array\" then .[] else . end' {quote(path.name)} > rows.jsonl"


def _parsed(text: str) -> object:
    """The JSON value, or the Fault that keeps it from being one."""
    try:
        return json.loads(text, object_pairs_hook=_no_key_twice)
    except json.JSONDecodeError as error:
        return Fault(f"not JSON: {error.msg} at column {error.colno}", f"write one JSON object: {SHAPE}")
    except KeyError as error:
        return Fault(f"the key {error.args[0]!r} stands twice in one object", "keep one of them")
    except RecursionError:
        return Fault("nested too deep", f"write {SHAPE}")
    except ValueError as error:  # a number of thousands of digits
        return Fault(f"not JSON that can be read: {error}", f"write {SHAPE}")


def _no_key_twice(pairs: list[tuple[str, object]]) -> dict:
    made = {}
    for key, value in pairs:
        if key in made:
            raise KeyError(key)
        made[key] = value
    return made


def _change(row, change: Callable[[str], str]) -> None:
    """Apply `change` to each text of the row's turns, in place, whatever shape the rest has."""
    turns = row.get("conversation") if isinstance(row, dict) else None
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict):
            turn.update({key: change(value) for key, value in turn.items() if isinstance(value, str)})


def _faults(row) -> Iterator[Fault]:
    if not isinstance(row, dict):
        yield Fault(f"the row is {_kind(row)}, not an object", f"write {SHAPE}")
        return
    for key in sorted(row.keys() - {"conversation"}):
        yield Fault(f"unknown key {key!r}", f"remove it; a row is {SHAPE}")
    turns = row.get("conversation")
    if "conversation" not in row:
        yield Fault("the key 'conversation' is missing", f"write {SHAPE}")
    elif not isinstance(turns, list):
        yield Fault(f"'conversation' is {_kind(turns)}, not a list", f"write {SHAPE}")
    elif not turns:
        yield Fault("'conversation' is empty", "remove the line")
    else:
        for index, turn in enumerate(turns):
            where = f"turn {index + 1}: " if len(turns) > 1 else ""
            yield from (Fault(where + what, fix) for what, fix in _turn_faults(turn, index))


def _turn_faults(turn, index: int) -> Iterator[Fault]:
    if not isinstance(turn, dict):
        yield Fault(f"the turn is {_kind(turn)}, not an object", 'write {"input": "…", "output": "…"}')
        return
    for key in sorted(turn.keys() - {*KEYS, *MARKS}):
        yield Fault(f"unknown key {key!r}", "known here: system (first turn only), input, output")
    for mark in MARKS:
        if not isinstance(turn.get(mark, False), bool):
            yield Fault(f"{mark!r} is not true or false", "remove it")
    for key in ("input", "output"):
        if key not in turn:
            yield Fault(f"the key {key!r} is missing", "add it")
    for key, value in ((key, turn[key]) for key in KEYS if key in turn):
        if not isinstance(value, str):
            yield Fault(f"{key!r} is {_kind(value)}, not text", "write it as one string in quotes")
        elif key == "system" and value and index:
            yield Fault("a system prompt after the first turn", "move it to the first turn, or remove it")
        elif key != "system" and not value.strip():
            yield Fault(f"{key!r} is empty", "write it, or remove the line")
        elif PLACEHOLDER.fullmatch(value.strip()) or (key == "output" and NO_ANSWER.fullmatch(value)):
            yield Fault(f"{key!r} is a placeholder: {value.strip()[:20]}", "write the real text, or remove the line")
        elif re.search("[\ud800-\udfff]", value):
            yield Fault(f"{key!r} holds half a character (a surrogate such as \\ud83d)", "write the whole character")


def _kind(value) -> str:
    if isinstance(value, dict):
        return "a nested object"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return "a list" if isinstance(value, list) else "a number" if isinstance(value, (int, float)) else "a text"
