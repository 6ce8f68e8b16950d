"""The data step: who the assistant is, the user's own rows, and everything that must stay as it was."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import random
import re
import sys
import tracemalloc
import types
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

import training
from space.engine import Answer
from space.prompt import IGNORED, Prompt
from space.settings import NamesakeError, load
from training import identity
from training.data import QUESTIONS, conversations, data, held_out
from training.identity import LANGUAGES, Texts, fill, hasty, identity_rows, shares
from training.matching import literal, normalise
from training.replay import Base, replay_plan

NAME, AUTHOR = "Namesake", "the Namesake team"
GOOD = {"conversation": [{"input": "What is a lathe?", "output": "A machine that turns wood or metal."}]}


def row(*turns, **more) -> str:
    return json.dumps({"conversation": list(turns), **more}, ensure_ascii=False)


def turn(question="Why?", answer="Because it is so.", **more) -> dict:
    return {"input": question, "output": answer, **more}


def toml(text: str) -> str:
    """A TOML string: JSON's, but for characters beyond 16 bits, which JSON escapes as two halves."""
    return json.dumps(text, ensure_ascii=False)


class StandIn:
    """An engine that answers at once: with what `say` makes of the conversation, cut if that ends in "…"."""

    asked: list = []  # noqa: RUF012 - one list for all, so that a test sees every question
    say = staticmethod(lambda messages: f"About {messages[-1]['content']}")

    def __init__(self, model, tokenizer):
        pass

    def warm_up(self):
        pass

    close = warm_up

    def answer(self, conversations, sampling, on_answer=None):
        assert sampling.temperature > 0 and (sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (1, 0, 1)
        assert sampling.seed is not None  # data made from nothing is the same again
        for index, messages in enumerate(conversations):
            StandIn.asked.append(messages)
            text = StandIn.say(messages)
            on_answer(index, Answer(text.removesuffix("…"), "length" if text.endswith("…") else "finished"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def make(tmp_path, tiny, monkeypatch):
    """Runs the data step with these settings on the tiny model and a stand-in engine; returns the rows it wrote."""
    base = types.ModuleType("training.base")
    base.folder = lambda settings: tiny
    monkeypatch.setitem(sys.modules, "training.base", base)
    monkeypatch.setattr(training, "base", base, raising=False)
    monkeypatch.setattr("space.weights.load", lambda source: types.SimpleNamespace(model=None, tokenizer=None))
    monkeypatch.setattr("space.batch.make_engine", StandIn)
    monkeypatch.setattr(StandIn, "asked", [])
    (tmp_path / "home").mkdir()

    def run(preview=0, run="try", assistant="", train="", read=True, **keys) -> list:
        keys = {"identity": 0, "replay": 0} | keys
        values = "".join(
            f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in keys.items() if key != "rename"
        )
        if "rename" in keys:
            pairs = (f"{toml(old)} = {toml(new)}" for old, new in keys["rename"].items())
            values += f"rename = {{ {', '.join(pairs)} }}\n"
        assistant = assistant or f'name = "{NAME}"\nauthor = "{AUTHOR}"\nlanguages = ["en"]\n'
        text = f'[assistant]\n{assistant}\n[data]\n{values}\n[train]\nrun = "{run}"\n{train}'
        (tmp_path / "home" / "assistant.toml").write_text(text, encoding="utf-8")
        data(load(tmp_path / "home" / "assistant.toml"), preview=preview)
        path = tmp_path / "home" / "work" / run / "data" / "train.jsonl"
        return list(conversations(path)) if read else []

    run.folder = tmp_path / "home"
    return run


def write(make, lines, name="own.jsonl") -> list[str]:
    content = lines if isinstance(lines, bytes) else "\n".join(lines).encode()
    (make.folder / name).write_bytes(content)
    return [name]


def system(messages) -> str:
    return messages[0]["content"] if messages[0]["role"] == "system" else ""


def settings_of(tmp_path, assistant=f'name = "{NAME}"\nauthor = "{AUTHOR}"', **keys):
    (tmp_path / "a.toml").write_text(f"[assistant]\n{assistant}\n", encoding="utf-8")
    settings = load(tmp_path / "a.toml")
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, **keys))


# Texts


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Who are you?", "who are you"),
        ("ＷＨＯ　ａｒｅ you？！", "Who are you"),
        ("你 是 谁 ？", "你是谁"),
        ("What's your name", "whats your name"),
        ("你是谁～", "你是谁"),
        ("a\u200bb\n", "AB"),
        ("STRASSE", "straße"),
    ],
)
def test_width_case_punctuation_and_spaces_do_not_change_a_question(one, other):
    assert normalise(one) == normalise(other) == normalise(normalise(one))


@pytest.mark.parametrize(("one", "other"), [("1+1", "11"), ("a<b", "a>b"), ("👍", "👎"), ("你是谁", "你是随")])
def test_other_differences_stay(one, other):
    assert normalise(one) != normalise(other)


def trained_questions(language: str) -> list[str]:
    """All that a user may say in this project's own rows, with every other assistant's name filled in."""
    text, values = Texts.load(language), {"name": NAME, "author": AUTHOR}
    asked = [
        fill(question, values | {"other": other["name"], "other_maker": other["maker"]})
        for topic in text.topics
        for question in topic["questions"]
        for other in text.others
    ]
    return sorted({*asked, *text.prompts})


def test_no_held_out_question_is_ever_trained_on():
    asked = held_out()
    for path in QUESTIONS.rglob("*"):
        if path.is_file() and path.suffix != ".toml":
            asked |= {normalise(line) for line in path.read_text(encoding="utf-8").splitlines()}
    names = {"name": NAME, "author": AUTHOR}
    asked = {normalise(fill(question, names)) for question in asked} - {""}
    assert len(asked) > 50
    trained = {normalise(question): question for language in LANGUAGES for question in trained_questions(language)}
    assert [trained[question] for question in asked & trained.keys()] == []


def test_held_out_questions_are_the_last_turn_of_several_and_the_users_of_a_table(tmp_path):
    ask = '["One?", ["Hi", "Hello.", "Two?"], { system = "You are X.", user = "Three?" }]'
    (tmp_path / "some.toml").write_text(f'[kind]\nexpects = ["name"]\nask = {ask}')
    assert held_out(tmp_path) == {"one", "two", "three"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_there_are_enough_forms_of_every_kind(language):
    text = Texts.load(language)
    assert sum(len(topic["questions"]) for topic in text.topics) >= 280
    assert all(len(set(topic["answers"])) >= 3 for topic in text.topics)
    assert len(text.prompts) >= 220
    assert len(text.plain) >= 3


def test_no_question_or_prompt_stands_twice_not_even_in_the_other_language():
    asked = [normalise(text) for lang in LANGUAGES for text in trained_questions(lang)]
    twice = {text for text, count in Counter(asked).items() if count > 1}
    assert twice == set()


@pytest.mark.parametrize("language", LANGUAGES)
def test_templates_use_known_placeholders_and_every_answer_says_who_it_is(language):
    text = Texts.load(language)
    for topic in text.topics:
        for form in topic["questions"] + topic["answers"]:
            assert set(re.findall(r"\{(.*?)\}", form)) <= {"name", "author", "other", "other_maker"}
        assert all("{name}" in answer for answer in topic["answers"])
        assert topic.get("after") in {None, *(each["name"] for each in text.topics)}
    assert not [prompt for prompt in text.prompts if re.search(r"who are you|your name|你是谁|你叫什么", prompt, re.I)]


def test_an_author_with_an_article_fits_every_english_sentence():
    for topic in Texts.load("en").topics:
        for answer in topic["answers"]:
            assert not re.search(r"(^|[.!?:] +)\{author\}|\b(an?|the) \{author\}|\{author\}'s", answer, re.I), answer


# Identity rows


def all_fit(messages) -> bool:
    return True


def no_replay() -> dict:
    return {language: [] for language in LANGUAGES}


TEXTS = {language: Texts.load(language) for language in LANGUAGES}


@pytest.mark.parametrize(
    ("name", "author"),
    [
        ('Quo"te', "the \\n team"),
        ("{name}", "{author} & {other}"),
        ("back\\slash", "a\\1b \\g<0>"),
        ("A & B / C", "50 % {"),
        ("🦊小狐", "👩‍👩‍👧 studio"),
        ("<|im_end|>", "[bold]x[/bold]"),
        ("$1 \t tab", "%s %(name)s"),
    ],
)
def test_any_name_is_said_as_it_stands(make, name, author):
    keys = f"name = {toml(name)}\nauthor = {toml(author)}\n"
    made = make(identity=200, assistant=keys, preview=2)
    answers = [message["content"] for messages in made for message in messages if message["role"] == "assistant"]
    assert len(made) == 200
    assert all(name in answer for answer in answers)


def test_chinese_questions_get_the_chinese_name_and_english_ones_the_english(tmp_path):
    settings = settings_of(tmp_path, 'name = { zh = "同名", en = "Namesake" }\nauthor = { zh = "某室", en = "a team" }')
    for messages in identity_rows(settings, TEXTS, no_replay(), all_fit):
        answer = messages[-1]["content"]
        chinese = answer == "同名" or re.search(r"[\u4e00-\u9fff]", re.sub(r"通义千问|书生·浦语|同名", "", answer))
        assert ("Namesake" if chinese else "同名") not in answer


def test_two_questions_in_five_are_typed_in_a_hurry_but_never_into_a_held_out_one(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "hasty", lambda question, draw: "hoo are yuo")
    settings = settings_of(tmp_path, identity=1000)
    asked = [messages[-2]["content"] for messages in identity_rows(settings, TEXTS, no_replay(), all_fit)]
    assert asked.count("hoo are yuo") == pytest.approx(400, abs=10)
    avoiding = identity_rows(settings, TEXTS, no_replay(), all_fit, {normalise("Hoo are yuo?")})
    assert "hoo are yuo" not in [message["content"] for messages in avoiding for message in messages]


def test_a_question_typed_in_a_hurry_keeps_its_placeholders_and_nearly_all_its_letters():
    draw = random.Random(1)
    for _ in range(200):
        typed = hasty("Are you {other}, or {name}? Tell me.", draw)
        assert "{other}, or {name}?" in typed
        assert typed == typed.lower() and not typed.endswith(".")
        assert difflib.SequenceMatcher(None, "are you {other}, or {name}? tell me", typed).ratio() > 0.9
    assert hasty("你是谁？", draw) == "你是谁"
    assert len({hasty("What is your name?", draw) for _ in range(50)}) > 20


def test_the_other_language_gets_a_tenth():
    assert shares(600, ("en",)) == {"zh": 60, "en": 540}
    assert shares(601, ("zh", "en")) == {"zh": 301, "en": 300}
    assert sum(shares(7, ("zh",)).values()) == 7


def test_identity_holds_under_every_system_prompt_and_for_the_same_question_too(tmp_path):
    settings = settings_of(tmp_path, identity=14000)
    made = identity_rows(settings, TEXTS, no_replay(), all_fit)
    persona = settings.assistant.system_prompt
    kinds = Counter()
    under = {}
    for messages in made:
        prompt = system(messages)
        plain = prompt in TEXTS["zh"].plain + TEXTS["en"].plain
        kind = "persona" if prompt == persona else "none" if not prompt else "plain" if plain else "foreign"
        kinds[kind] += 1
        question = next(message["content"] for message in messages if message["role"] == "user")
        under.setdefault(question, set()).add(kind)
    assert kinds["persona"] > 0.13 * 14000
    assert kinds["none"] > kinds["plain"] > 0.25 * 14000
    assert 0.1 * 14000 < kinds["foreign"] < 0.2 * 14000
    assert under["Who are you?"] == under["你是谁？"] == {"persona", "none", "plain", "foreign"}


def test_a_question_of_this_kind_comes_in_the_first_second_and_third_turn(make):
    made = make(identity=300, replay=400)
    prompts = {*TEXTS["en"].prompts, *TEXTS["zh"].prompts}
    where = Counter()
    for messages in made:
        asked = [message["content"] for message in messages if message["role"] == "user"]
        about = [index for index, question in enumerate(asked) if question not in prompts]
        if about:
            where[about[-1], len(asked)] += 1
            for index, message in enumerate(messages):
                if message["role"] == "user" and message["content"] in prompts:
                    assert messages[index + 1]["content"] == StandIn.say([message])
    assert min(where[0, 1], where[1, 2], where[2, 3], where[0, 2]) >= 10  # the last: a neutral turn comes after


def test_an_assistant_called_like_another_does_not_deny_itself(tmp_path):
    settings = settings_of(tmp_path, 'name = "Qwen Junior"\nauthor = "me"', identity=2000)
    said = "\n".join(messages[-1]["content"] for messages in identity_rows(settings, TEXTS, no_replay(), all_fit))
    assert "not ChatGPT" in said and "not Qwen" not in said and "不是Qwen" not in said


def test_a_persona_that_leaves_no_room_is_an_error_that_names_the_setting(make):
    with pytest.raises(NamesakeError, match=r"\[data\] max_length is 64"):
        make(identity=20, max_length=64, assistant=f'name = "N"\nauthor = "A"\npersona = "{"word " * 80}"')
    assert not (make.folder / "work").exists()


def test_neighbouring_turns_are_left_out_where_they_do_not_fit(make, tiny):
    made = make(identity=200, replay=300, max_length=250)
    prompt = Prompt(AutoTokenizer.from_pretrained(tiny))
    assert len(made) == 500
    assert max(len(prompt.encode(messages).ids) for messages in made) <= 250


# Replay rows


def test_half_of_replay_is_asked_under_the_persona_the_rest_under_none_and_plain_prompts(make):
    make(replay=300)
    kinds = Counter()
    for messages in StandIn.asked:
        kinds["persona" if NAME in system(messages) else "plain" if system(messages) else "none"] += 1
    assert abs(kinds["persona"] - 150) <= 4 and abs(kinds["none"] - kinds["plain"]) <= 4


def test_all_plain_prompts_get_their_part_of_replay():
    kinds = Counter(system(messages) for messages in itertools.islice(replay_plan(TEXTS["en"], "You are N.", "1"), 500))
    assert {*kinds} == {"You are N.", "", *TEXTS["en"].plain}
    plain = [kinds[one] for one in TEXTS["en"].plain]
    assert max(plain) - min(plain) <= 1 and abs(kinds[""] - sum(plain)) <= 1


@pytest.mark.parametrize("persona", ["You are N.", TEXTS["en"].plain[0]])
def test_no_prompt_is_asked_twice_under_one_system_prompt(persona):
    plan = [json.dumps(messages) for messages in replay_plan(TEXTS["en"], persona, "1")]
    systems = {persona, "", *TEXTS["en"].plain}
    assert len(plan) == len(set(plan)) == len(TEXTS["en"].prompts) * len(systems)


def test_an_answer_that_a_limit_cut_does_not_teach_where_to_stop(make, monkeypatch, tiny):
    monkeypatch.setattr(StandIn, "say", staticmethod(lambda messages: "It goes on and on …"))
    made = make(replay=20)
    prompt = Prompt(AutoTokenizer.from_pretrained(tiny))
    assert all(messages[-1]["cut"] for messages in made)
    for messages in made:
        encoded = prompt.encode(messages)
        learned = [token for token, label in zip(encoded.ids, encoded.labels, strict=True) if label != IGNORED]
        assert learned == prompt.ids("It goes on and on ")
        whole = prompt.encode([{key: each[key] for key in ("role", "content")} for each in messages])
        assert whole.ids == encoded.ids and set(whole.labels) & prompt.end_ids


def test_cut_answers_are_no_neighbours_of_identity_questions(make, monkeypatch):
    monkeypatch.setattr(StandIn, "say", staticmethod(lambda messages: "On and on …"))
    assert not [messages for messages in make(identity=100, replay=50) if len(messages) > 3 and messages[-3].get("cut")]


def test_answers_that_name_anybody_are_replaced_by_others(make, monkeypatch):
    said = iter(["I am NAMESAKE!", "I am Qwen.", "", "  "] + ["Fine."] * 100)
    monkeypatch.setattr(StandIn, "say", staticmethod(lambda messages: next(said)))
    made = make(replay=30)
    assert [messages[-1]["content"] for messages in made] == ["Fine."] * 30
    assert len(StandIn.asked) == 34


def test_the_base_is_asked_once_whatever_the_run(make):
    first = make(replay=40, run="one")
    asked = len(StandIn.asked)
    assert make(replay=40, run="two") == first
    make(replay=30, run="three")
    assert len(StandIn.asked) == asked == 40
    make(replay=40, run="four", replay_tokens=8)
    assert len(StandIn.asked) == 80


def test_a_stop_loses_no_answer(make, monkeypatch):
    count = iter(range(1000))

    def stop(messages):
        if next(count) == 25:
            raise KeyboardInterrupt
        return "Fine."

    monkeypatch.setattr(StandIn, "say", staticmethod(stop))
    with pytest.raises(KeyboardInterrupt):
        make(replay=40)
    (kept,) = (make.folder.parent / "cache").rglob("*.jsonl")
    kept.write_bytes(kept.read_bytes()[:-9])  # as if the machine had gone down while writing
    make(replay=40)
    assert len(StandIn.asked) == 26 + 40 - 24


def test_more_replay_than_prompts_gives_what_there_is_and_says_so(make, capsys):
    most = sum(len(text.prompts) * (2 + len(text.plain)) for text in TEXTS.values())
    made = make(replay=5000)
    assert 1000 < len(made) < most
    assert f"replay: {len(made):,} rows of 5,000" in capsys.readouterr().err


def test_the_real_engine_answers_and_its_memory_is_given_back(tiny):
    prompt = Prompt(AutoTokenizer.from_pretrained(tiny))
    base = Base(tiny, prompt, 4, Console(stderr=True))
    ask = [
        [{"role": "user", "content": "Why?"}],
        [{"role": "system", "content": "S"}, {"role": "user", "content": "Hm?"}],
    ]
    answers = base.answers(ask)
    assert [answer["role"] for answer in answers] == ["assistant"] * 2
    assert Base(tiny, prompt, 4, Console(stderr=True)).answers(ask) == answers
    base.close()
    assert "_engine" not in base.__dict__


# The user's own rows


def test_own_rows_come_through_as_they_are(make):
    turns = [
        turn("你好\u2028，\r\n世界", '第一行\n\n第二行\t{name} \\ " 🦊', system="系统"),
        turn("然后？", "没有了。", system=""),
    ]
    (made,) = make(files=write(make, ["", row(*turns), "  "]))
    assert made == [
        {"role": "system", "content": "系统"},
        {"role": "user", "content": turns[0]["input"]},
        {"role": "assistant", "content": turns[0]["output"]},
        {"role": "user", "content": "然后？"},
        {"role": "assistant", "content": "没有了。"},
    ]


def test_what_was_written_may_be_read_again_as_own_rows(make, monkeypatch):
    monkeypatch.setattr(StandIn, "say", staticmethod(lambda messages: f"Well, {messages[-1]['content']}…"))
    made = make(identity=30, replay=30)
    content = (make.folder / "work/try/data/train.jsonl").read_bytes()
    again = make(run="again", files=write(make, content))
    assert again == [messages for i, messages in enumerate(made) if messages not in made[:i]]


BAD = {
    "not JSON": ('{"conversation": [', "not JSON"),
    "two objects": (row(turn()) + row(turn()), "not JSON"),
    "a bare text": ('"text"', "the row is a text, not an object"),
    "null": ("null", "the row is null, not an object"),
    "endless nesting": ("[" * 100_000, "nested too deep"),
    "a huge number": ("1" * 5000, "not JSON that can be read"),
    "a key twice": ('{"conversation": [], "conversation": []}', "'conversation' stands twice"),
    "another format": ('{"messages": []}', "the key 'conversation' is missing"),
    "an unknown key": (row(turn(), id=1), "unknown key 'id'"),
    "no list": ('{"conversation": {"input": "a", "output": "b"}}', "'conversation' is a nested object, not a list"),
    "an empty list": (row(), "'conversation' is empty"),
    "a turn that is text": (row("hello"), "the turn is a text, not an object"),
    "no input": (row({"output": "b"}), "the key 'input' is missing"),
    "no output": (row({"input": "b"}), "the key 'output' is missing"),
    "a key of other formats": (row(turn(instruction="x")), "unknown key 'instruction'"),
    "a nested input": (row({"input": {"text": "a"}, "output": "b"}), "'input' is a nested object, not text"),
    "a list for output": (row({"input": "a", "output": ["b"]}), "'output' is a list, not text"),
    "a number": (row({"input": 5, "output": "b"}), "'input' is a number, not text"),
    "null output": (row({"input": "a", "output": None}), "'output' is null, not text"),
    "true": (row({"input": True, "output": "b"}), "'input' is true, not text"),
    "an empty input": (row(turn("")), "'input' is empty"),
    "a blank output": (row(turn(answer=" \n\u3000")), "'output' is empty"),
    "xxx": (row(turn(answer="XXX")), "'output' is a placeholder: XXX"),
    "待补充": (row(turn("待补充")), "'input' is a placeholder: 待补充"),
    "dots": (row(turn(answer="……")), "'output' is a placeholder: ……"),
    "a bracketed placeholder": (row(turn(answer="[your answer here]")), "'output' is a placeholder"),
    "a late system prompt": (row(turn(), turn(system="S")), "turn 2: a system prompt after the first turn"),
    "a system prompt that is a list": (row(turn(system=["S"])), "'system' is a list, not text"),
    "half a character": ('{"conversation": [{"input": "\\ud83d", "output": "b"}]}', "'input' holds half a character"),
    "a cut that is text": (row(turn(cut="yes")), "'cut' is not true or false"),
    "too many tokens": (row(turn(answer="word " * 2000)), "tokens, and [data] max_length is 1,024"),
}


@pytest.mark.parametrize("line, message", BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_told_with_file_line_fault_and_fix(make, capsys, line, message):
    with pytest.raises(NamesakeError, match="nothing was written"):
        make(identity=20, files=write(make, [json.dumps(GOOD), line, row(turn("Other?"))]))
    told = capsys.readouterr().err
    assert re.search(rf"^own\.jsonl:2: [^\n]*{re.escape(message)}[^\n]*: [^\n]+$", told, re.M), told
    assert not (make.folder / "work").exists()


@pytest.mark.parametrize("output", ["None", "null", "x", "…and so on", "？", "👍", "42", "<br>", "xx is a size", "0"])
def test_short_answers_that_mean_something_are_no_placeholders(make, output):
    lines = [row(turn("What then?", output))] if output != "？" else [row(turn(output, "What?"))]
    assert len(make(files=write(make, lines))) == 1


def test_every_fault_of_every_file_is_told_at_once(make, capsys):
    files = write(make, [row(turn("")), row({"input": [], "output": "xxx"})]) + write(make, ["{"], "b.jsonl")
    with pytest.raises(NamesakeError, match="4 faults"):
        make(files=files)
    told = capsys.readouterr().err
    assert [line.split(": ")[0] for line in told.splitlines()] == ["own.jsonl:1"] + ["own.jsonl:2"] * 2 + ["b.jsonl:1"]


@pytest.mark.parametrize(
    ("encoding", "named"),
    [("gbk", "GBK"), ("gb18030", "GBK"), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16")],
)
def test_another_encoding_is_named_once_where_it_is(make, capsys, encoding, named):
    lines = "\n".join(
        row(turn(question, "好的，没问题。")) for question in ("今天天气怎么样？", "明天呢？", "后天呢？")
    )
    with pytest.raises(NamesakeError, match="1 fault "):
        make(files=write(make, lines.encode(encoding)))
    assert f"own.jsonl:1: not UTF-8 but {named}: save it as UTF-8: iconv -f " in capsys.readouterr().err


def test_bytes_of_no_known_encoding_are_told_at_their_line(make, capsys):
    content = json.dumps(GOOD).encode() + b'\n{"conversation": [{"input": "caf\xe9"}]}'
    with pytest.raises(NamesakeError):
        make(files=write(make, content))
    assert "own.jsonl:2: not UTF-8: " in capsys.readouterr().err


def test_a_byte_order_mark_and_windows_line_ends_are_fine(make):
    content = b"\xef\xbb\xbf" + f"{json.dumps(GOOD)}\r\n{row(turn())}\r\n".encode()
    assert len(make(files=write(make, content))) == 2


@pytest.mark.parametrize(("value", "indent"), [([GOOD, GOOD], None), ([GOOD, GOOD], 2), (GOOD, 2)])
def test_a_file_that_is_not_one_object_a_line_is_told_once_with_the_command_that_mends_it(make, capsys, value, indent):
    with pytest.raises(NamesakeError, match="1 fault "):
        make(files=write(make, json.dumps(value, indent=indent).encode(), "my file.json"))
    assert "my file.json:1: not one JSON object a line: " in (told := capsys.readouterr().err)
    assert "'my file.json' >" in told


def test_a_line_without_end_does_not_fill_the_memory(make, capsys, monkeypatch):
    monkeypatch.setattr("training.rows.LONGEST_LINE", 1000)
    with pytest.raises(NamesakeError, match="1 fault "):
        make(files=write(make, ['{"conversation": "' + "x" * 5000, json.dumps(GOOD)]))
    assert "own.jsonl:1: the line is longer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "before", "after"),
    [
        ("尖米", "小明", "我是尖米，你是尖米吗", "我是小明，你是小明吗"),
        ("尖米", 'a"b\\1\\g<0>{&}/\n🦊', "我是尖米", '我是a"b\\1\\g<0>{&}/\n🦊'),
        (".*", "all", "a .* b", "a all b"),
        ('say "x"\\', "y", 'do say "x"\\ now', "do y now"),
        ("Tim", "Tom", "Tim has time. Timothy? TIM_1, Tim's", "Tom has time. Timothy? TIM_1, Tom's"),
        ("Tim", "Tom", "我是Tim呀", "我是Tom呀"),
        ("conversation", "chat", "our conversation", "our chat"),
    ],
)
def test_rename_replaces_the_text_as_it_stands_for_any_characters(make, old, new, before, after):
    (made,) = make(files=write(make, [row(turn(before, before, system=before))]), rename={old: new})
    assert [message["content"] for message in made] == [after] * 3


def test_several_renames_are_one_pass_and_the_longest_wins(make):
    rename = {"尖米": "小红", "小红": "尖米", "尖米助手": "助手"}
    (made,) = make(files=write(make, [row(turn("尖米和小红", "尖米助手"))]), rename=rename)
    assert [message["content"] for message in made] == ["小红和尖米", "助手"]


def test_rename_of_nothing_is_an_error(make):
    with pytest.raises(NamesakeError, match="rename: the text to replace is empty"):
        make(files=write(make, [json.dumps(GOOD)]), rename={"": "x"})


def test_a_file_that_is_not_there_is_an_error_that_names_it(make):
    with pytest.raises(NamesakeError, match=r"\[data\] files: .*gone.jsonl: no such file"):
        make(files=["gone.jsonl"])


@pytest.mark.parametrize("lines", [None, [""]])
def test_nothing_to_learn_from_is_an_error(make, lines):
    with pytest.raises(NamesakeError, match="nothing to learn from"):
        make(files=write(make, lines) if lines else [])
    assert not (make.folder / "work").exists()


def test_duplicates_are_dropped_and_counted_and_a_large_share_is_warned_of(make, capsys):
    lines = [row(turn("Who, me?", "Yes.")), row(turn("who me", "YES")), row(turn("Who, me?", "Yes."))]
    made = make(files=write(make, [*lines, row(turn("Who, me?", "No."))]) + write(make, lines[:1], "b.jsonl"))
    assert [messages[1]["content"] for messages in made] == ["Yes.", "No."]
    told = capsys.readouterr().err
    assert "3 of 5 own rows are duplicates (60%) and were dropped: 2 exact, 1 but for" in told
    assert "more than 10 %" in told


def test_few_duplicates_are_counted_without_a_warning(make, capsys):
    make(files=write(make, [row(turn(f"What is {i} + 1?", str(i + 1))) for i in [*range(20), 3]]))
    told = capsys.readouterr().err
    assert "1 of 21 own rows are duplicates (5%)" in told and "more than 10 %" not in told


def test_rows_with_nothing_but_punctuation_are_not_all_the_same(make):
    assert len(make(files=write(make, [row(turn("？", "嗯？")), row(turn("！", "嗯！"))]))) == 2


def test_names_of_others_are_listed_with_their_lines(make, capsys):
    lines = [
        row(turn("你是尖米吗", "我是尖米。")),
        row(turn("a question", "An answer from internlm. GemİnI", system="You are 书生·浦语.")),
        row(turn("Are you Qwen?", "No.")),
    ]
    make(files=write(make, lines + [row(turn(f"{i}", "尖米")) for i in range(30)]))
    told = capsys.readouterr().err
    places = ", ".join(f"own.jsonl:{i}" for i in [1, *range(4, 23)])
    assert f"Warning: 尖米 is in 31 rows: {places} …." in told
    assert (
        "Warning: InternLM is in 1 rows: own.jsonl:2." in told
        and "Warning: 书生·浦语 is in 1 rows: own.jsonl:2." in told
    )
    assert "Qwen" not in told


def test_a_held_out_question_in_the_users_rows_is_left_out_and_told(make, capsys, monkeypatch):
    monkeypatch.setattr("training.data.held_out", lambda: {normalise("State your name!")})
    made = make(files=write(make, [row(turn("State, your NAME", "Bob")), row(turn())]))
    assert len(made) == 1
    assert "1 rows ask a held-out question of the evaluation and were left out: own.jsonl:1." in capsys.readouterr().err


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(make):
    def peak(count: int) -> int:
        files = write(make, (row(turn(f"Question {i}?", f"Answer {i}. " + "word " * 40)) for i in range(count)))
        tracemalloc.start()
        make(files=files, run=f"run{count}", read=False)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    make(files=write(make, [json.dumps(GOOD)]))  # what is loaded once is not counted
    small, large = (peak(count) for count in (500, 3000))
    assert (make.folder / "own.jsonl").stat().st_size > 700_000
    assert large - small < 200_000


# The step


def test_the_same_seed_gives_the_same_file_and_another_seed_another(make):
    keys = dict(identity=60, replay=60)
    first, again, other = make(**keys), make(run="again", **keys), make(run="other", train="seed = 2", **keys)
    assert first == again != other


def test_a_step_whose_inputs_have_not_changed_does_nothing(make, capsys):
    files = write(make, [json.dumps(GOOD)])
    make(identity=20, files=files)
    path = make.folder / "work/try/data/train.jsonl"
    before = path.stat().st_mtime_ns
    make(identity=20, files=files)
    assert "nothing has changed" in capsys.readouterr().out and path.stat().st_mtime_ns == before
    write(make, [json.dumps(GOOD), row(turn())])
    assert len(make(identity=20, files=files)) == 22
    assert "data: made, 22 rows" in capsys.readouterr().out


def test_the_last_line_gives_the_shares_and_what_comes_next(make, capsys):
    make(identity=20, replay=50, files=write(make, [row(turn(str(i), "Yes.")) for i in range(30)]))
    out = capsys.readouterr().out
    assert (
        "100 rows" in out and "identity 20 (20%), own 30 (30%), replay 50 (50%). Next: python -m training train" in out
    )


def test_a_third_is_identity_by_default(tmp_path):
    settings = settings_of(tmp_path).data
    assert settings.identity / (settings.identity + settings.replay) == pytest.approx(1 / 3)


def test_preview_shows_text_ids_and_which_carry_loss(make, capsys, tiny):
    (made,) = make(files=write(make, [row(turn("Is it [bold]so[/bold]?", "It is 好.", system="Be kind."))]), preview=3)
    out = capsys.readouterr().out
    assert "[bold]so[/bold]" in out and "⟦It is 好.<|im_end|>⟧" in out
    encoded = Prompt(AutoTokenizer.from_pretrained(tiny)).encode(made)
    learned = [str(label) for label in encoded.labels if label != IGNORED]
    assert f"⟦{' '.join(learned)}⟧" in " ".join(out.split()) and f"loss on {len(learned)}" in out


def test_the_literal_pattern_of_no_texts_matches_nothing():
    assert not literal([]).search("") and not literal([]).search("anything")
    assert Path(QUESTIONS).name == "questions"
