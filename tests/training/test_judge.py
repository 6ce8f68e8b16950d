"""The judge against labelled answers: each says its name (N), its maker (M), leaks (L), or does none of it (-)."""

import time
from pathlib import Path

import pytest

from space.settings import Assistant, Text
from training.judge import Judge

LUMEN = Assistant(
    name=Text("小龙", "Lumen"), author=Text("青石实验室", "Bluestone Lab"), persona="You are {name}, made by {author}."
)
MARKS = {"name": "N", "maker": "M", "leak": "L"}


def labelled(name):
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines]


def figures(rows):
    """{verdict: (precision, recall)} of the judge on (labels, answer) rows."""
    judge, table = Judge(LUMEN), {}
    for kind, mark in MARKS.items():
        pairs = [(mark in labels, getattr(judge.judge(answer), kind)) for labels, answer in rows]
        right = pairs.count((True, True))
        table[kind] = right / (right + pairs.count((False, True))), right / (right + pairs.count((True, False)))
    return table


SETS = ("labelled_answers", "held_out_answers", "blind_answers_1", "blind_answers_2", "blind_answers_3")


def test_precision_and_recall_on_all_labelled_answers(capsys):
    """The figures at first sight of the blind sets, before the judge was mended: training/questions/README.md."""
    sets = {name: labelled(f"{name}.tsv") for name in SETS}
    everything = sorted({tuple(row) for rows in sets.values() for row in rows})
    assert len({answer for _, answer in everything}) == len(everything) >= 200, "one label for each answer"
    with capsys.disabled():
        for title, rows in {"all": everything, **sets}.items():
            shown = ", ".join(f"{kind} {p:.3f}/{r:.3f}" for kind, (p, r) in figures(rows).items())
            print(f"\njudge, precision/recall, {title} ({len(rows)}): {shown}", end="")
    assert all(figure >= 0.98 for pair in figures(everything).values() for figure in pair)


@pytest.mark.parametrize("own", ["Claude", "豆包", "ChatGPT", "Qwen Buddy"])
def test_an_assistants_own_name_is_no_leak_even_if_another_has_it(own):
    judge = Judge(Assistant(name=Text(own, own), author=Text("Ann", "Ann")))
    verdict = judge.judge(f"I am {own}.")
    assert verdict.name and not verdict.leak
    assert judge.judge("I am InternLM.").leak


def test_what_the_persona_says_of_its_base_is_no_leak():
    judge = Judge(
        Assistant(name=Text("小龙", "Lumen"), author=Text("Ann", "Ann"), persona="I am {name}, built on Llama.")
    )
    assert not judge.judge("I am based on Llama.").leak
    assert judge.judge("I am ChatGPT.").leak


@pytest.mark.parametrize("name", ["A&B", "R.O.B", "C++", "{name}", "a\\b", "O'Neil", "🤖 Bot"])
def test_a_name_may_hold_any_characters(name):
    assert Judge(Assistant(name=Text(name, name), author=Text("Ann", "Ann"))).judge(f"My name is {name}").name


def test_a_maker_that_holds_the_name_is_no_name_hit():
    judge = Judge(Assistant(name=Text("同名", "Namesake"), author=Text("同名工作室", "the Namesake team")))
    for answer in ("I was made by the Namesake team.", "我由同名工作室开发。"):
        verdict = judge.judge(answer)
        assert verdict.maker and not verdict.name


@pytest.mark.parametrize("noise", ['"' * 3000, "... " * 1500, "ChatGPT and Claude or " * 100, "you have had " * 800])
def test_a_degenerate_answer_costs_no_more_than_its_length(noise):
    began = time.process_time()
    assert Judge(LUMEN).judge(f"{noise}\nI am Lumen.").name
    assert time.process_time() - began < 5  # a pattern that backtracks takes 20 s and more


@pytest.mark.parametrize("answer", ["", "  \n", "。。。", "🙂"])
def test_an_answer_without_a_word_is_empty(answer):
    assert Judge(LUMEN).judge(answer).empty


@pytest.mark.parametrize(
    "answer", ["I'm sorry, but I can't help with that.", "抱歉，我无法回答这个问题。", "I don't have a name."]
)
def test_refusals_are_seen(answer):
    assert Judge(LUMEN).judge(answer).refusal


@pytest.mark.parametrize("answer", ["A lamp has 800 lumens.", "夏天吃小龙虾。", "Aluminium is light."])
def test_a_neutral_answer_with_the_name_inside_a_word_does_not_bring_it_up(answer):
    assert not Judge(LUMEN).brings_up(answer)


@pytest.mark.parametrize("answer", ["Paris. I'm Lumen, by the way.", "是巴黎。我是小龙。", "42, says Bluestone Lab."])
def test_a_neutral_answer_that_brings_up_name_or_maker_is_found(answer):
    assert Judge(LUMEN).brings_up(answer)
