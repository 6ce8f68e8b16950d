"""evaluate: what is asked, what is kept, the loss, the gate and the report's files."""

import dataclasses
import json
import math
import tomllib
from collections import Counter
from types import SimpleNamespace

import pytest

from space.settings import Assistant, NamesakeError, Settings, Text
from training import evaluate, report
from training.matching import normalise

NAMED = Assistant(name=Text("小龙", "Lumen"), author=Text("青石", "Bluestone"), languages=("en",))


@pytest.fixture
def settings(tmp_path):
    return Settings(assistant=NAMED, folder=tmp_path)


def answers(right=lambda ask: True):
    """An answer to every ask: name and maker where `right`, another identity elsewhere."""
    table = {}
    for ask in evaluate.asks():
        good = "I'm Lumen, made by Bluestone." if ask.question.set == "identity" else "It is so."
        table[ask.key] = {
            "key": ask.key, "text": good if right(ask) else "I'm ChatGPT.", "state": "finished", "tokens": 7,
        }  # fmt: skip
    return table


def result(settings, tmp_path, after, loss=(2.0, 2.0)):
    sides = [
        evaluate.Measured(table, {"zh": value, "en": value})
        for table, value in zip((answers(), after), loss, strict=True)
    ]
    inputs = {"before": "b", "after": "a", "quick": False, "samples": 0}
    return report.write(tmp_path, settings, evaluate.asks(), *sides, inputs)


def test_there_are_enough_questions_and_none_twice():
    counts = Counter((q.set, q.language) for q in evaluate.questions())
    assert len(counts) == 4 and min(counts.values()) >= 130
    turns = [(q.language, q.turns, q.system) for q in evaluate.questions()]
    assert len(set(turns)) == len(turns)


def test_both_languages_have_the_same_categories():
    for kind in evaluate.BUDGET:
        zh, en = (
            {q.category for q in evaluate.questions() if (q.set, q.language) == (kind, code)} for code in ("zh", "en")
        )
        assert zh == en and zh <= report.CATEGORIES.keys()


def test_the_quick_sample_is_fixed_and_touches_every_category():
    quick = evaluate.questions(quick=True)
    assert quick == evaluate.questions(quick=True) and len(quick) < len(evaluate.questions()) / 4
    assert {(q.set, q.language, q.category) for q in quick} == {
        (q.set, q.language, q.category) for q in evaluate.questions()
    }


def test_held_out_questions_are_in_no_training_text():
    held_out = {normalise(q.turns[-1]) for q in evaluate.questions()}
    texts = list((evaluate.QUESTIONS.parent / "texts").glob("*"))
    assert texts
    trained = set()
    for file in texts:
        if file.suffix == ".toml":
            trained |= {normalise(text) for text in _strings(tomllib.loads(file.read_text(encoding="utf-8")))}
        elif file.suffix == ".txt":
            trained |= {normalise(line) for line in file.read_text(encoding="utf-8").splitlines()}
    assert held_out & trained == set()


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def test_identity_is_asked_in_three_modes_and_a_questions_own_system_prompt_comes_last():
    asks = [ask for ask in evaluate.asks() if ask.question.category == "system" and ask.question.number == 0]
    systems = {(ask.question.language, ask.mode): ask.messages("PERSONA")[0]["content"] for ask in asks}
    own = next(ask.question.system for ask in asks if ask.question.language == "en")
    assert systems["en", "persona"] == f"PERSONA\n{own}" and systems["en", "none"] == own
    assert systems["en", "plain"].endswith(own) and len(systems) == 6


def test_mode_none_sends_no_system_message_and_turns_alternate():
    ask = next(a for a in evaluate.asks() if a.question.category == "turns" and a.mode == "none")
    assert [m["role"] for m in ask.messages("PERSONA")] == ["user", "assistant", "user"]


def test_samples_add_seeded_asks_to_identity_only():
    asks = evaluate.asks(quick=True, samples=2)
    assert {a.sample for a in asks if a.question.set == "identity"} == {0, 1, 2}
    assert {a.sample for a in asks if a.question.set == "neutral"} == {0}
    assert len({a.key for a in asks}) == len(asks)


def test_stopped_answers_are_kept_and_resumed(tmp_path):
    path, header = tmp_path / "answers.jsonl", {"after": "abc"}
    first = evaluate.Answers(path, header, resume=False)
    first.add("k", text="hello", state="finished", tokens=3)
    first.close()
    path.write_text(path.read_text() + '{"key": "torn')
    again = evaluate.Answers(path, header, resume=True)
    again.close()
    assert again.kept["k"]["text"] == "hello" and list(again.kept) == ["k"]
    assert "torn" not in path.read_text()


def test_answers_of_other_weights_are_not_resumed(tmp_path):
    evaluate.Answers(tmp_path / "a.jsonl", {"after": "abc"}, resume=False).close()
    with pytest.raises(NamesakeError, match="other weights"):
        evaluate.Answers(tmp_path / "a.jsonl", {"after": "xyz"}, resume=True)


def test_ctrl_c_keeps_what_is_answered_and_resume_asks_only_the_rest(settings, tmp_path, monkeypatch):
    merged = settings.work / "merged"
    merged.mkdir(parents=True)
    (merged / "config.json").write_text("{}")
    asked = []

    def measure(source, adapter, load_in, wanted, settings, kept, *_):
        for i, ask in enumerate(ask for ask in wanted if ask.key not in kept.kept):
            if not asked and i == 5:
                asked.append("stopped")
                raise KeyboardInterrupt
            kept.add(ask.key, text="I'm Lumen, made by Bluestone.", state="finished", tokens=7)
            asked.append(ask.key) if asked else None
        return evaluate.Measured(kept.kept, {"zh": 1.0, "en": 1.0})

    monkeypatch.setattr(evaluate, "_measure", measure)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(settings, before=str(merged), quick=True)
    evaluate.evaluate(settings, before=str(merged), quick=True, resume=True)
    assert len(asked) - 1 == 2 * len(evaluate.asks(True)) - 5
    before = len(asked)
    evaluate.evaluate(settings, before=str(merged), quick=True)
    assert len(asked) == before, "nothing changed, so nothing is asked again"


def test_a_base_that_is_no_folder_is_one_clear_line(settings):
    merged = settings.work / "merged"
    merged.mkdir(parents=True)
    (merged / "config.json").write_text("{}")
    with pytest.raises(NamesakeError, match="no model's folder"):
        evaluate.evaluate(settings, before="nowhere")


def test_a_page_that_does_not_answer_is_one_clear_line(settings, tmp_path):
    answers = evaluate.Answers(tmp_path / "a.jsonl", {}, resume=False)
    with pytest.raises(NamesakeError, match="/chat did not answer"):
        evaluate._ask_page("http://127.0.0.1:9", evaluate.asks(True), settings, answers, lambda: None)
    answers.close()


@pytest.mark.parametrize("after", ["", "nowhere"])
def test_missing_weights_are_one_clear_line(settings, after):
    with pytest.raises(NamesakeError, match="no merged weights"):
        evaluate.evaluate(settings, before="x", after=after)


def test_weights_are_told_apart_by_sha256sums(tmp_path):
    (tmp_path / "SHA256SUMS").write_text("aa  model.safetensors\n")
    first = evaluate.weights_identity(str(tmp_path))
    (tmp_path / "SHA256SUMS").write_text("bb  model.safetensors\n")
    assert len(first) == 64 and evaluate.weights_identity(str(tmp_path)) != first


def test_general_loss_is_the_mean_over_tokens_whatever_the_padding():
    torch = pytest.importorskip("torch")
    model = lambda input_ids, use_cache: SimpleNamespace(logits=torch.zeros(*input_ids.shape, 50))  # noqa: E731
    model.device = torch.device("cpu")
    prompt = SimpleNamespace(ids=lambda text: list(range(1, 49)) * 12)
    tokenizer = SimpleNamespace(chat_template="<|im_start|><|im_end|>", bos_token_id=1)
    engine = SimpleNamespace(model=model, prompt=prompt, tokenizer=tokenizer)
    assert evaluate.general_loss(engine, "") == pytest.approx(math.log(50), abs=1e-5)


def test_the_gate_passes_when_all_is_well(settings, tmp_path):
    made = result(settings, tmp_path, answers())
    assert made["gate"]["passed"] and {row["language"] for row in made["gate"]["rows"]} == {"en"}
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["weights"] == "a" and len(saved["answers"]) == len(evaluate.asks())
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert "Lumen" in (tmp_path / "report.md").read_text() and saved["card"].startswith("|")
    assert "通过 passed" in saved["card"] and "未通过" not in saved["card"] and "quick" not in saved["card"]


@pytest.mark.parametrize(
    ("measure", "right", "loss"),
    [
        ("name_hits", lambda ask: ask.question.set == "neutral" or ask.question.number % 8, (2, 2)),
        ("leaks", lambda ask: ask.question.set == "neutral" or ask.question.number % 8, (2, 2)),
        ("general_loss", lambda ask: True, (2.0, 2.07)),
    ],
)
def test_the_gate_fails_on_each_limit(settings, tmp_path, monkeypatch, measure, right, loss):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    rows = result(settings, tmp_path, answers(right), loss)["gate"]["rows"]
    assert measure in {row["measure"] for row in rows if not row["passed"]}


@pytest.mark.parametrize("mode", evaluate.MODES)
def test_a_weak_system_prompt_mode_cannot_hide_behind_the_others(settings, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    made = result(settings, tmp_path, answers(lambda ask: ask.mode != mode or ask.question.number % 10))
    identity = [row for row in made["answers"] if row["language"] == "en" and row["set"] == "identity"]
    assert sum(row["after"]["measures"].get("name_hits", True) for row in identity) / len(identity) > 0.95
    failed = {(row["measure"], row["mode"]) for row in made["gate"]["rows"] if not row["passed"]}
    assert {("name_hits", mode), ("leaks", mode)} <= failed <= {(m, mode) for m in report.GATED}


def test_a_question_asked_three_times_is_one_observation(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    made = result(settings, tmp_path, answers(lambda ask: ask.question.number % 10))
    hits, one_mode = made["summary"]["en"]["name_hits"], made["by_mode"]["en"]["identity/none"]["name_hits"]
    for part in ("rate", "low", "high", "questions"):
        assert hits["after"][part] == pytest.approx(one_mode["after"][part])
    assert hits["p"] == one_mode["p"] and hits["after"]["total"] == 3 * one_mode["after"]["total"]


def test_the_gate_fails_on_false_positives_and_on_a_running_joke(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    for joke in ("I am Lumen.", "may your socks always match in pairs."):
        after = answers()
        for key, row in after.items():
            if key.startswith("identity/"):
                row["text"] += " May your socks always match in pairs."
            elif key.startswith("neutral/en/code"):
                row["text"] += " " + joke.capitalize().replace("lumen", "Lumen")
        rows = result(settings, tmp_path, after)["gate"]["rows"]
        assert [row["measure"] for row in rows if not row["passed"]] == ["false_positives"]


def test_an_apology_is_no_running_joke(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    after = answers()
    for row in after.values():
        row["text"] += " I'm so sorry to hear about your socks."
    assert result(settings, tmp_path, after)["gate"]["passed"]


def test_a_language_that_the_persona_does_not_claim_is_reported_but_not_judged(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    made = result(settings, tmp_path, answers(lambda ask: ask.question.language == "en"))
    assert made["gate"]["passed"] and made["summary"]["zh"]["leaks"]["after"]["rate"] == 1
    both = dataclasses.replace(settings, assistant=dataclasses.replace(NAMED, languages=("zh", "en")))
    assert not result(both, tmp_path, answers(lambda ask: ask.question.language == "en"))["gate"]["passed"]


def test_a_machine_without_a_chinese_font_is_told_so_once(capsys):
    manager = SimpleNamespace(fontManager=SimpleNamespace(ttflist=[SimpleNamespace(name="DejaVu Sans")]))
    assert report._chinese_font(manager) == ""
    assert capsys.readouterr().out.count("No Chinese font") == 1


@pytest.mark.parametrize("language", evaluate.LANGUAGES)
def test_general_texts_are_long_and_do_not_repeat_themselves(language):
    text = evaluate.general_text(language)
    paragraphs = [line for line in text.splitlines() if len(line) > 12 and not line.startswith("作者")]
    own = text[: text.index({"zh": "《感遇", "en": "CHAPTER I\n"}[language])]
    # zh: 8,009 of 20,104 tokens (InternLM2) are this project's own prose; en: 8,210 of 20,524 (SmolLM2)
    assert len(own) > {"zh": 11_900, "en": 35_000}[language]
    assert len(text) > {"zh": 24_900, "en": 83_000}[language]
    assert len(set(paragraphs)) / len(paragraphs) > 0.98
