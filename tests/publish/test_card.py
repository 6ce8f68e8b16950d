"""The cards: complete, honest, and never too short."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from publish import card, contents
from publish.job import Job
from publish.modelscope import ModelScope
from space.settings import NamesakeError, load
from tests.publish.conftest import write_sums

COUNTED = {
    "": 0,
    "---\nlicense: mit\ntags:\n- a\n---\n": 0,
    "# A heading\n\n## Another": 0,
    "描述 一下\n这个  模型": 8,
    "```python\nprint('not counted')\n```\n后": 1,
    "~~~\ncode\n~~~\n后": 1,
    "run `pip install x` now": 6,
    '<div align="center">\n<img src="x.png" width="300"/>\n字\n</div>': 1,
    "<!-- a comment\nof lines -->字": 1,
    "https://www.modelscope.cn/models/a/b 字": 1,
    "[字](https://www.modelscope.cn)": 1,
    "![a picture](report.png)": 0,
    "| a | b |\n|---|---|\n| 1 | 2 |": 0,
    "- 一\n* 二\n1. 三\n> 四": 4,
    "---\n***\n===": 0,
    "**粗** _斜_ ~删~": 3,
}


@pytest.mark.parametrize("text", COUNTED)
def test_a_description_is_counted_the_strictest_way(text):
    assert card.length(text) == COUNTED[text]


@pytest.fixture
def made(run):
    def make(hub="modelscope", id="alice/beibei"):
        settings = load(run.config)
        return card.model(settings, contents.model(settings), hub, id)

    return make


@pytest.mark.parametrize("hub", ["modelscope", "huggingface"])
def test_the_front_matter_is_what_the_hub_asks_for(hub, made):
    matter = card.front_matter(made(hub))
    assert all(matter[key] for key in card.REQUIRED[hub])
    assert matter["license"] == {"modelscope": "Apache License 2.0", "huggingface": "apache-2.0"}[hub]
    assert matter["language"] == ["zh", "en"]
    assert matter["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("hub", ["modelscope", "huggingface"])
def test_each_languages_text_alone_is_long_enough(hub, made):
    parts = made(hub).split("\n\n---\n\n")
    assert len(parts) == 2
    assert all(card.length(part) > 200 for part in parts)
    assert ("小北" in parts[0].split("# ")[1][:4]) == (hub == "modelscope"), "the hub's own language comes first"


def test_a_description_that_is_too_short_is_an_error_and_is_not_filled_up(made, run, monkeypatch, tmp_path):
    for code in ("zh", "en"):
        (tmp_path / f"model.{code}.md").write_text("# $name_zh\n\n" + "字" * 190 + f"$description_{code}")
    monkeypatch.setattr(card, "CARDS", tmp_path)
    with pytest.raises(NamesakeError, match="190 characters, and more than 200") as raised:
        made()
    assert "[card] description" in str(raised.value)
    run.config.write_text(run.config.read_text() + '[card]\ndescription = "它来自北方，说话直接，爱讲星星的故事。"\n')
    assert "爱讲星星的故事" in made()


def test_the_users_own_words_stand_in_it(made, run):
    text = '[card]\ndescription = { zh = "它爱讲星星的故事。", en = "It tells of stars." }\n'
    run.config.write_text(run.config.read_text() + text)
    assert "它爱讲星星的故事。" in made() and "It tells of stars." in made()


def test_training_and_evaluation_are_told_as_they_were_recorded(made, run):
    (run.work / "report" / "report.png").write_bytes(b"\x89PNG\r\n")
    text = made()
    assert "| LoRA rank / α | 16 / 32 |" in text and "| Versions | xtuner 0.2.0 |" in text
    assert "| name hits | 0.99 |" in text and "![evaluation](report.png)" in text


def test_a_brand_with_marks_in_it_is_shown_as_it_is(run):
    name = '小*北*<b>_&|`"$name{x}'
    text = run.config.read_text().replace('zh = "小北"', f"zh = '{name}'").replace('en = "Beibei"', f"en = '{name}'")
    run.config.write_text(text)
    settings = load(run.config)
    readme = card.model(settings, contents.model(settings), "modelscope", "alice/beibei")
    title = re.search(r"^# (.*)$", readme, flags=re.M)[1]
    assert title == r"小\*北\*&lt;b&gt;\_&amp;\|\`" + '"$name{x}'
    assert yaml.safe_load(readme.split("---\n")[1])


BASES = {
    ("embedded", "modelscope"): "HuggingFaceTB/SmolLM2-135M-Instruct",
    (
        "modelscope:Shanghai_AI_Laboratory/internlm2_5-7b-chat",
        "modelscope",
    ): "Shanghai_AI_Laboratory/internlm2_5-7b-chat",
    ("modelscope:Shanghai_AI_Laboratory/internlm2_5-7b-chat", "huggingface"): "internlm/internlm2_5-7b-chat",
    ("huggingface:internlm/internlm2_5-7b-chat@main", "modelscope"): "Shanghai_AI_Laboratory/internlm2_5-7b-chat",
    ("modelscope:Qwen/Qwen2.5-7B-Instruct", "huggingface"): "Qwen/Qwen2.5-7B-Instruct",
}


@pytest.mark.parametrize(("base", "hub"), BASES)
def test_the_base_model_has_the_name_it_has_on_that_hub(base, hub, run):
    about = json.loads((run.merged / "assistant.json").read_text()) | {"base": {"model": base}}
    (run.merged / "assistant.json").write_text(json.dumps(about))
    settings = load(run.config)
    assert card.base_id(settings, contents.model(settings), hub) == BASES[base, hub]


def test_a_base_model_from_a_folder_has_to_be_named(run):
    about = json.loads((run.merged / "assistant.json").read_text()) | {"base": {"model": "/data/internlm"}}
    (run.merged / "assistant.json").write_text(json.dumps(about))
    settings = load(run.config)
    with pytest.raises(NamesakeError, match="base_model"):
        card.base_id(settings, contents.model(settings), "modelscope")


def test_the_python_in_the_card_is_python_and_the_curl_is_json(made):
    text = made()
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        compile(code, "card", "exec")
    asked = [json.loads(body)["messages"][0]["content"] for body in re.findall(r"-d '(.*?)'", text)]
    assert asked == ["你是谁？", "Who are you?"], "each language's text asks in its language"


def test_an_assistant_of_one_language_is_asked_in_that_one(run, made):
    run.config.write_text(run.config.read_text().replace('["zh", "en"]', '["en"]'))
    assert "你是谁？" not in "".join(re.findall(r"```(?:python|bash)\n(.*?)```", made(), flags=re.S))


def test_the_evaluations_table_stands_in_both_languages(made):
    assert made().count("| name hits | 0.99 |") == 2


def test_a_card_claims_no_evaluation_of_other_weights(run, made):
    run.shard(1, seed=7)
    write_sums(run.merged)
    text = made()
    assert "name hits" not in text and "have not been evaluated" in text and "没有经过评测" in text


def test_a_failed_evaluation_is_not_kept_quiet(run, made):
    run.finish(passed=False)
    assert "did not reach the mark" in made() and "| name hits | 0.99 |" in made()


def test_the_spaces_card_names_the_model_that_its_page_loads(run, hub):
    job = Job(load(run.config), run.config, ModelScope)
    matter = card.front_matter(next(f for f in job.space_files() if f.path == "README.md").source.read_text())
    assert matter["models"] == ["alice/beibei"] and matter["deployspec"] == {"entry_file": "app.py"}
    variables, secrets = job.values()
    assert variables["NAMESAKE_MODEL"] == "modelscope:alice/beibei" and secrets == {}
