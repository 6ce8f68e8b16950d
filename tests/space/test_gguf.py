"""GGUF files through llama.cpp: the same answers as transformers gives, and the same manners as any engine."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from space import gguf, weights
from space.engine import Answer, Engine, Sampling
from space.settings import NamesakeError, Serve
from training import export

GREEDY = Sampling(24, 0, 1, 0, 1)
QUESTIONS = ["Tell me a story", "What is the sea?", "Name three colours.", "Who are you?", "<|im_end|>\n<|im_start|>"]
LONG = [{"role": "user", "content": "word " * 350}]


THREADS = gguf.threads


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tests share their cores with one another: threads that wait for each other would wait for those first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "threads", lambda: 1)
        yield


def ask(text: str) -> list[dict]:
    return [{"role": "system", "content": "You are Namesake."}, {"role": "user", "content": text}]


def last(states) -> Answer:
    *_, answer = states
    return answer


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """The tiny model as merge leaves it: with end tokens and a name."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("gguf") / "merged"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    named = {"name": {"zh": "小名", "en": "Namesake"}, "author": {"zh": "某人", "en": "Someone"}}
    (folder / "assistant.json").write_text(json.dumps(named))
    return folder


@pytest.fixture(scope="module")
def file(folder) -> Path:
    export.write(folder, folder.parent / "tiny.gguf")
    return folder.parent / "tiny.gguf"


@pytest.fixture(scope="module")
def engine(file) -> Iterator[gguf.GgufEngine]:
    with closing(gguf.start(file)[0]) as engine:
        yield engine


def test_greedy_answers_are_those_of_transformers(engine, folder):
    plain = Engine(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    )
    for question in QUESTIONS:
        expected, got = (last(each.stream(ask(question), GREEDY)) for each in (plain, engine))
        assert (got.text, got.state, got.tokens_in) == (expected.text, expected.state, expected.tokens_in)


def test_a_file_says_whose_it_is_and_brings_its_own_tokenizer(file, folder):
    engine, who, how = gguf.start(file, context=256)
    assert who == "小名 / Namesake"
    assert engine.context == 256 and "256 tokens" in how
    plain = AutoTokenizer.from_pretrained(folder)
    for text in QUESTIONS:
        assert engine.tokenizer(text).input_ids == plain(text).input_ids
    assert {0, 2} <= set(engine.end_ids)


def test_many_at_once_get_the_answers_that_they_get_alone(engine):
    alone = [last(engine.stream(ask(question), GREEDY)).text for question in QUESTIONS]
    together = engine.answer([ask(question) for question in QUESTIONS], GREEDY)
    assert [answer.text for answer in together] == alone


def test_the_same_seed_gives_the_same_answer_whatever_came_before(engine):
    def answer(seed: int) -> str:
        return last(engine.stream(ask("Tell me a story"), Sampling(24, 1.0, 1, 0, 1.3, seed=seed))).text

    first = answer(5)
    assert first == answer(5)
    last(engine.stream(ask("Something else"), GREEDY))
    assert first == answer(5) and first != answer(2**63 - 1)


def test_a_repetition_penalty_changes_the_answer_as_in_transformers(engine, folder):
    plain = Engine(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    )
    penalty = Sampling(24, 0, 1, 0, 1.5)
    expected, got = (last(each.stream(ask("Tell me a story"), penalty)).text for each in (plain, engine))
    assert got == expected != last(engine.stream(ask("Tell me a story"), GREEDY)).text


@pytest.mark.parametrize("before", [0, 8])
def test_the_next_turn_reads_only_what_is_new(file, monkeypatch, before):
    engine, _, _ = gguf.start(file)
    for number in range(before):  # slots that are empty, and slots that others have used
        last(engine.stream(ask(f"Number {number}"), GREEDY))
    kept = []
    forget = engine._forget
    monkeypatch.setattr(engine, "_forget", lambda slot, count: (kept.append(count), forget(slot, count)))
    first = last(engine.stream(ask("Tell me a long story about a dog"), GREEDY))
    for words in ("One", "Two", "Three"):  # other visitors in between
        last(engine.stream(ask(words), GREEDY))
    turns = [
        *ask("Tell me a long story about a dog"),
        {"role": "assistant", "content": first.text},
        *ask("And then?")[1:],
    ]
    last(engine.stream(turns, GREEDY))
    engine.close()
    assert kept[-1] >= first.tokens_in


def test_a_stop_in_a_long_prompt_ends_at_once_and_disturbs_nobody(file, monkeypatch):
    engine, _, _ = gguf.start(file)
    expected = last(engine.stream(ask("Tell me a story"), GREEDY)).text
    stop, entered = threading.Event(), threading.Event()
    step = engine._step
    monkeypatch.setattr(engine, "_step", lambda: (entered.set(), step()))
    states = engine.stream(LONG, Sampling(64, seed=1), stop)
    other = []
    assert next(states).state in ("waiting", "reading")
    beside = threading.Thread(target=lambda: other.append(last(engine.stream(ask("Tell me a story"), GREEDY)).text))
    beside.start()
    assert entered.wait(10)
    stop.set()
    started = time.perf_counter()
    assert last(states).state == "stopped"
    assert time.perf_counter() - started < 2
    beside.join(20)
    assert other == [expected]
    assert not any(slot.job for slot in engine._slots)


def test_closing_the_stream_frees_the_place(engine):
    states = engine.stream(ask("Tell me a story"), Sampling(400, seed=1))
    while next(states).state != "writing":
        pass
    states.close()
    assert last(engine.stream(ask("What is the sea?"), GREEDY)).tokens_out


def test_an_answer_ends_at_its_budget_and_is_continued(engine):
    begun = last(engine.stream(ask("Tell me a story"), Sampling(8, 0, 1, 0, 1)))
    assert (begun.state, begun.tokens_out) == ("length", 8)
    turns = [*ask("Tell me a story"), {"role": "assistant", "content": begun.text}]
    rest = last(engine.stream(turns, Sampling(16, 0, 1, 0, 1), resume=True))
    assert rest.tokens_out and rest.tokens_in >= begun.tokens_in


def test_a_failure_of_the_model_is_told_and_the_next_answer_comes(engine, monkeypatch):
    step = engine._step

    def broken():
        if any(slot.job for slot in engine._slots):
            monkeypatch.setattr(engine, "_step", step)
            raise RuntimeError("llama_decode failed")

    monkeypatch.setattr(engine, "_step", broken)
    with pytest.raises(NamesakeError, match="The model failed: RuntimeError"):
        last(engine.stream(ask("Tell me a story"), GREEDY))
    assert last(engine.stream(ask("Tell me a story"), GREEDY)).tokens_out == 24


def test_closing_the_engine_ends_its_thread_and_fails_what_is_being_made(file):
    engine, _, _ = gguf.start(file)
    states = engine.stream(ask("Tell me a story"), Sampling(400, seed=1))
    while next(states).state != "writing":
        pass
    engine.close()
    assert not engine._thread.is_alive()
    with pytest.raises(NamesakeError, match="no longer loaded"):
        last(states)
    with pytest.raises(NamesakeError, match="no longer loaded"):
        last(engine.stream(ask("Tell me a story"), GREEDY))


def test_nobody_waits_for_the_answers_that_are_no_longer_wanted(engine):
    conversations = [ask(f"Tell me story {i}") for i in range(40)]

    def enough(index, answer):
        raise KeyboardInterrupt

    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        engine.answer(conversations, Sampling(2000, seed=1), enough)
    assert time.perf_counter() - started < 10
    assert last(engine.stream(ask("Tell me a story"), GREEDY)).tokens_out == 24


@pytest.mark.parametrize("fault", ["text", "cut short", "missing"])
def test_a_broken_file_is_named(file, tmp_path, fault):
    broken = tmp_path / "broken.gguf"
    if fault != "missing":
        broken.write_bytes(b"hello" if fault == "text" else file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(NamesakeError, match=r"broken.gguf: not a whole GGUF file"):
        gguf.start(broken)


def test_a_missing_binding_is_told_with_the_command_that_installs_it(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "cyllama.llama.llama_cpp", None)
    with pytest.raises(NamesakeError, match=r"Run: pip install cyllama=="):
        gguf.start(file)


def test_the_page_loads_a_file_a_folder_or_the_file_that_a_pattern_names(file, tmp_path):
    for name in ("a-q8_0.gguf", "a-q4_k_m.gguf"):
        shutil.copy(file, tmp_path / name)
    for source in (
        weights.source(str(file)),
        weights.source(str(file.parent)),
        weights.source(str(tmp_path), gguf="*q8_0.gguf"),
    ):
        loader = weights.Loader(source, "", "auto", serve=Serve(context=256))
        loader.run()
        assert loader.status.state == "ready" and loader.status.model.startswith("小名 / Namesake")
    assert "a-q8_0.gguf" in loader.status.model
    loader = weights.Loader(weights.source(str(tmp_path)), "", "auto")
    loader.run()
    assert loader.status.state == "failed" and "a-q4_k_m.gguf, a-q8_0.gguf" in loader.status.reason.en


def test_a_quota_of_the_container_limits_the_threads(monkeypatch, tmp_path):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(gguf, "CPU_MAX", quota)
    monkeypatch.setattr(gguf.os, "sched_getaffinity", lambda _: set(range(16)))
    assert THREADS() == 16
    quota.write_text("200000 100000\n")
    assert THREADS() == 2
    quota.write_text("max 100000\n")
    assert THREADS() == 16


def test_a_memory_limit_of_the_container_bounds_the_context(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(gguf, "CGROUP", tmp_path)
    machine = gguf.free_memory()
    assert machine > 10**8
    (tmp_path / "memory").mkdir()
    for (limit, used), cached in zip(gguf.MEMORY, ("inactive_file 300", "total_inactive_file 300"), strict=True):
        (tmp_path / limit).write_text("1000000\n")
        (tmp_path / used).write_text("400000\n")
        (tmp_path / limit).with_name("memory.stat").write_text(f"anon 5\n{cached}\n")
        assert gguf.free_memory() == 600_300
        (tmp_path / limit).write_text("max\n")
        assert gguf.free_memory() > 10**8
    (tmp_path / "memory.max").write_text("500000\n")

    long = Path(shutil.copytree(folder, tmp_path / "long"))
    config = json.loads((long / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (long / "config.json").write_text(json.dumps(config))
    export.write(long, tmp_path / "long.gguf")
    assert gguf.start(tmp_path / "long.gguf")[0].context == 512
    monkeypatch.setattr(gguf, "CGROUP", tmp_path / "none")
    assert gguf.start(tmp_path / "long.gguf")[0].context == 2048
