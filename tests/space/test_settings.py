"""assistant.toml: what it may hold, and that every mistake in it is one helpful line."""

from __future__ import annotations

import dataclasses

import pytest

from space import settings

GOOD = """
[assistant]
name = { zh = "小满", en = "Manny" }
author = "Lin & Sons"
"""


def read(tmp_path, text: str | bytes) -> settings.Settings:
    path = tmp_path / "assistant.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return settings.load(path)


def test_the_shortest_file_has_a_name_and_an_author_and_defaults_for_the_rest(tmp_path):
    found = read(tmp_path, GOOD)
    assert found.assistant.name == settings.Text("小满", "Manny")
    assert found.assistant.author == settings.Text("Lin & Sons", "Lin & Sons")
    assert found.assistant.system_prompt == "You are Manny, an assistant made by Lin & Sons."
    assert (found.page.top_p, found.page.temperature, found.page.repetition_penalty) == (0.8, 0.7, 1.005)
    assert found.base.model == "embedded"
    assert found.work == tmp_path / "work" / "assistant"


def test_the_file_that_comes_with_the_repository_is_good():
    assert settings.load("assistant.toml").assistant.name.en == "Namesake"


@pytest.mark.parametrize(
    "name", ['O"Brien', "A & B", "back\\slash", "a/b", "{name}", "{", "🍮 布丁", "two  spaces", "%s", "'"]
)
def test_a_name_may_hold_anything(tmp_path, name):
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    found = read(
        tmp_path, f'[assistant]\nname = "{quoted}"\nauthor = "{quoted}"\npersona = "I am {{name}} by {{author}}"'
    )
    assert found.assistant.name.en == name
    assert found.assistant.system_prompt == f"I am {name} by {name}"


@pytest.mark.parametrize(
    ("persona", "prompt"),
    [
        ("你是{name}，由{author}开发。", "你是小满，由林记开发。"),
        ("You are {name}.", "You are Manny."),
        ("{name_zh} / {name_en} / {author_zh} / {author_en}", "小满 / Manny / 林记 / Lin"),
        ("{unknown} {} { name } {{name}}", "{unknown} {} { name } {Manny}"),
    ],
)
def test_the_persona_takes_the_names_of_its_language(tmp_path, persona, prompt):
    text = f"""[assistant]
name = {{ zh = "小满", en = "Manny" }}
author = {{ zh = "林记", en = "Lin" }}
persona = '{persona}'"""
    assert read(tmp_path, text).assistant.system_prompt == prompt


def test_a_missing_language_falls_back_to_the_other(tmp_path):
    found = read(tmp_path, '[assistant]\nname = { zh = "小满" }\nauthor = "x"')
    assert found.assistant.name.pick("en") == found.assistant.name.pick("zh-CN") == "小满"


def test_the_tree_is_frozen(tmp_path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        read(tmp_path, GOOD).page.top_p = 0.5


MISTAKES = {
    "no table": ("", "[assistant] name", "assistant is missing"),
    "no name": ("[assistant]\nauthor = 'x'", "", "[assistant] name is missing: add it"),
    "empty name": ("[assistant]\nname = ' '\nauthor = 'x'", ":2:", "name is empty: write something"),
    "name in no language": ("[assistant]\nname = {}\nauthor = 'x'", ":2:", "name is empty"),
    "name is a number": ("[assistant]\nname = 3\nauthor = 'x'", ":2:", "name is not text"),
    "name in French": ("[assistant]\nname = { fr = 'x' }\nauthor = 'x'", "", "fr is not a known key: zh or en"),
    "unknown table": (GOOD + "[pages]\ntop_p = 1", ":5:", "pages is not a known key: did you mean page?"),
    "unknown key": (GOOD + "[page]\ntop-p = 1", ":6:", "[page] top-p is not a known key: did you mean top_p?"),
    "key like nothing": (GOOD + "[page]\nzzz = 1", ":6:", "[page] zzz is not a known key: known here: title"),
    "top_p too high": (GOOD + "[page]\ntop_p = 1.5", ":6:", "[page] top_p is 1.5: must be from 0 to 1"),
    "top_p not a number": (GOOD + "[page]\ntop_p = nan", ":6:", "must be from 0 to 1"),
    "temperature below 0": (GOOD + "[page]\ntemperature = -0.1", ":6:", "must be from 0 to 10"),
    "text for a number": (GOOD + "[page]\ntop_p = 'high'", ":6:", "a number is needed"),
    "fraction for a count": (GOOD + "[page]\nconcurrency = 1.5", ":6:", "a whole number is needed"),
    "yes for a count": (GOOD + "[page]\nconcurrency = true", ":6:", "a whole number is needed"),
    "nobody at once": (GOOD + "[page]\nconcurrency = 0", ":6:", "must be from 1 to 1024"),
    "examples of numbers": (GOOD + "[page]\nexamples_en = [1]", ":6:", "is not text or a list of texts"),
    "default above its limit": (
        GOOD + "[page]\nmax_new_tokens = 4096",
        ":6:",
        "max_new_tokens is 4096: must be at most 2048, its limit in [page.limits]",
    ),
    "limit in a table": (GOOD + "[page.limits]\ntop_k = 0", ":6:", "[page.limits] top_k is 0: must be from 1"),
    "hub without a name": (GOOD + "[hub]\nmodel = 'modelscope:me'", ":6:", "modelscope:owner/name"),
    "hub unknown": (GOOD + "[hub]\nmodel = 'github:me/you'", ":6:", "modelscope:owner/name or huggingface"),
    "hub with spaces": (GOOD + "[hub]\nmodel = 'modelscope:me/my model'", ":6:", "modelscope:owner/name"),
    "table as a value": (GOOD + "page = 3", "", "page is not a known key"),
    "value as a table": ("page = 3\n" + GOOD, ":1:", "page is not a table: write it as [page]"),
    "rename to a number": (GOOD + "[data.rename]\na = 3", ":5:", "is not a table of texts"),
    "language unknown": (GOOD + "languages = ['fr']", ":5:", "is 'fr': one of zh, en"),
    "no languages": (GOOD + "languages = []", ":5:", "languages is empty"),
    "unclosed string": (GOOD + 'x = "abc', ":5:", "not valid TOML"),
    "backslash": (GOOD + 'x = "a\\qb"', ":5:", "not valid TOML"),
    "twice": (GOOD + "author = 'y'", ":5:", "not valid TOML"),
    "not UTF-8": (GOOD.encode() + "# 名".encode("gbk"), ":5:", "not UTF-8 text. Save the file as UTF-8"),
    "UTF-16": (GOOD.encode("utf-16"), ":1:", "not UTF-8 text"),
    "run with a slash": (GOOD + "[train]\nrun = '../x'", ":6:", "letters, digits"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_where_what_and_what_is_allowed(tmp_path, mistake):
    text, place, words = MISTAKES[mistake]
    with pytest.raises(settings.NamesakeError) as raised:
        read(tmp_path, text)
    line = str(raised.value)
    assert "\n" not in line
    assert str(tmp_path / "assistant.toml") in line
    if place.startswith(":"):
        assert f"assistant.toml{place}" in line
    assert words in line


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(settings.NamesakeError, match=r"nowhere\.toml: no such settings file"):
        settings.load(tmp_path / "nowhere.toml")
    with pytest.raises(settings.NamesakeError, match="directory"):
        settings.load(tmp_path)


def test_a_byte_order_mark_as_windows_editors_write_it_is_no_mistake(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbf" + GOOD.encode()).assistant.name.zh == "小满"
