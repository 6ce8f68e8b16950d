"""The engine: streaming, stop, errors, limits, seeds; on a tiny random model, and once on a real one."""

from __future__ import annotations

import gc
import itertools
import threading
import time

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from space.engine import GREEDY, Answer, BaseEngine, Engine, Sampling
from space.settings import Limits, NamesakeError

ASK = [{"role": "user", "content": "Tell me a story"}]


def engine_of(folder, **options) -> Engine:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Engine(model, AutoTokenizer.from_pretrained(folder), **options)


@pytest.fixture
def engine(tiny) -> Engine:
    return engine_of(tiny)


@pytest.fixture(scope="module")
def real(embedded) -> Engine:
    return engine_of(embedded)


def last(states) -> Answer:
    *_, answer = states
    return answer


def slow(engine: Engine, seconds: float) -> threading.Event:
    """Makes each forward pass take at least that long; the event is set once the first has begun."""
    begun = threading.Event()

    def wait(*_):
        begun.set()
        time.sleep(seconds)

    engine.model.get_input_embeddings().register_forward_pre_hook(wait)
    return begun


def answering() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "answer"]


def gone(threads, seconds: float = 5) -> bool:
    for thread in threads:
        thread.join(seconds)
    return not answering()


def test_a_real_model_answers_and_says_how_it_went(real):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    states = list(real.stream(question, Sampling(temperature=0, max_new_tokens=300)))
    answer = states[-1]
    assert "Paris" in answer.text and "<|im_end|>" not in answer.text
    assert answer.state == "finished"
    assert answer.tokens_in == len(real.prompt.encode(question, answer_next=True).ids)
    assert 5 < answer.tokens_out < 300
    assert answer.first_token > 0 and answer.speed > 0
    assert next(state.state for state in states) == "reading"
    assert all(later.text.startswith(earlier.text) for earlier, later in itertools.pairwise(states))


def test_the_batched_way_gives_the_same_greedy_answers_as_one_by_one(real):
    asks = [[{"role": "user", "content": text}] for text in ("Name a colour.", "What is 2+2? Answer shortly.", "Hi")]
    sampling = Sampling(temperature=0, repetition_penalty=1, max_new_tokens=16)
    seen = {}
    together = real.answer(asks, sampling, on_answer=seen.__setitem__)
    assert [answer.text for answer in together] == [last(real.stream(ask, sampling)).text for ask in asks]
    assert [seen[i] for i in range(3)] == together
    assert [answer.tokens_in for answer in together] == [
        len(real.prompt.encode(ask, answer_next=True).ids) for ask in asks
    ]
    assert all(0 < answer.tokens_out <= 16 for answer in together)


@pytest.mark.parametrize("end", ["generation_config", "template"])
def test_every_end_token_ends_the_answer(engine, end):
    token = 0 if end == "generation_config" else next(iter(engine.prompt.end_ids))
    if end == "generation_config":
        engine.model.generation_config.eos_token_id = [0]
        engine = Engine(engine.model, engine.tokenizer)
    assert token in engine.end_ids
    engine.model.lm_head.register_forward_hook(lambda _m, _i, out: out.index_fill(-1, torch.tensor([token]), 1e4))
    answer = last(engine.stream(ASK, GREEDY))
    assert (answer.state, answer.tokens_out, answer.text) == ("finished", 1, "")


def test_the_limit_ends_an_answer_with_its_reason_and_no_broken_character(engine):
    half = engine.prompt.ids("你")[:1]  # one byte of a character of three
    engine.model.lm_head.register_forward_hook(lambda _m, _i, out: out.index_fill(-1, torch.tensor(half), 1e4))
    answer = last(engine.stream(ASK, Sampling(temperature=0, max_new_tokens=1)))
    assert (answer.state, answer.tokens_out, answer.text) == ("length", 1, "")


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(engine):
    def text(seed):
        return last(engine.stream(ASK, Sampling(max_new_tokens=12, temperature=1.0, top_p=1, seed=seed))).text

    assert text(7) == text(7) != text(8)


def test_the_same_seed_gives_the_same_answer_beside_another_visitor(tiny):
    engine = engine_of(tiny, concurrency=2)
    sampling = Sampling(max_new_tokens=12, temperature=1.0, top_p=1, seed=7)
    alone = last(engine.stream(ASK, sampling)).text
    other = engine.stream(ASK, Sampling(max_new_tokens=400, temperature=1.0, seed=1))
    next(other)
    assert last(engine.stream(ASK, sampling)).text == alone
    other.close()
    assert gone(answering())


def test_a_stop_takes_effect_within_a_token_and_frees_the_engine(engine):
    stop = threading.Event()
    slow(engine, 0.02)
    states = engine.stream(ASK, Sampling(max_new_tokens=400, seed=1), stop)
    while next(states).tokens_out < 3:
        pass
    stop.set()
    counted = engine_tokens = next(states).tokens_out
    answer = last(states)
    assert answer.state == "stopped" and answer.text
    assert answer.tokens_out <= counted + 2, engine_tokens
    assert last(engine.stream(ASK, Sampling(max_new_tokens=2, seed=1))).tokens_out == 2


def test_a_stop_while_the_prompt_is_read_leaves_the_forward_pass(engine):
    begun, layers = slow(engine, 0.3), []
    engine.model.model.layers[0].register_forward_hook(lambda *_: layers.append(1))
    stop = threading.Event()
    states = engine.stream(ASK, Sampling(seed=1), stop)
    next(states)
    begun.wait(5)
    stop.set()
    answer = last(states)
    assert (answer.state, answer.tokens_out, layers) == ("stopped", 0, [])


def test_closing_the_stream_ends_the_answer(engine):
    states = engine.stream(ASK, Sampling(max_new_tokens=400, seed=1))
    next(states)
    threads = answering()
    states.close()
    assert gone(threads)


def test_visitors_are_answered_in_the_order_they_came_and_see_their_place(engine):
    slow(engine, 0.05)
    first = engine.stream(ASK, Sampling(max_new_tokens=400, seed=1))
    next(first)
    second, third = engine.stream(ASK, Sampling(max_new_tokens=1)), engine.stream(ASK, Sampling(max_new_tokens=1))
    assert (next(second).ahead, next(third).ahead) == (1, 2)
    second.close()  # leaves the line
    assert next(third).ahead == 1
    first.close()
    assert last(third).state in ("length", "finished")


def test_a_stop_in_line_leaves_the_line(engine):
    slow(engine, 0.05)
    first = engine.stream(ASK, Sampling(max_new_tokens=400, seed=1))
    next(first)
    stop = threading.Event()
    second = engine.stream(ASK, Sampling(), stop)
    next(second)
    stop.set()
    assert last(second).state == "stopped"
    first.close()
    assert last(engine.stream(ASK, Sampling(max_new_tokens=1))).tokens_out == 1


def test_a_full_line_turns_away_in_both_languages(tiny):
    engine = engine_of(tiny, queue=1)
    slow(engine, 0.05)
    first, second = (engine.stream(ASK, Sampling(max_new_tokens=400, seed=1)) for _ in range(2))
    next(first), next(second)
    with pytest.raises(NamesakeError) as raised:
        next(engine.stream(ASK, Sampling()))
    assert "waiting already" in raised.value.text.en and "排队" in raised.value.text.zh
    first.close(), second.close()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("boom"), "The model failed: RuntimeError"),
        (torch.OutOfMemoryError("CUDA out of memory"), "The model ran out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "The model ran out of memory"),
        (KeyboardInterrupt(), "The model failed: KeyboardInterrupt"),
    ],
)
def test_an_error_in_the_worker_reaches_the_caller_with_its_cause_and_the_next_answer_works(engine, error, words):
    def fail(*_):
        raise error

    hook = engine.model.get_input_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(NamesakeError, match=words) as raised:
        list(engine.stream(ASK, Sampling()))
    assert raised.value.__cause__ is error
    assert raised.value.text.zh != raised.value.text.en
    hook.remove()
    assert last(engine.stream(ASK, Sampling(max_new_tokens=2, seed=1))).tokens_out == 2


class Parrot(BaseEngine):
    """An engine of few words: what another engine has to bring along."""

    def generate(self, run, ids, sampling):
        words = [*self.prompt.ids("Polly wants a cracker"), self.end_ids[0]]
        for word in words:
            if run.stop.is_set():
                raise NamesakeError("Polly flew away", zh="飞走了")
            run.count(word)
            run.write([word])
        return words


def test_another_engine_brings_only_its_tokens(tiny):
    parrot = Parrot(AutoTokenizer.from_pretrained(tiny), 512, [])
    answer = last(parrot.stream(ASK, Sampling()))
    assert (answer.text, answer.state) == ("Polly wants a cracker", "finished")
    assert answer.tokens_out == len(parrot.prompt.ids(answer.text)) + 1
    assert [a.text for a in parrot.answer([ASK, ASK])] == [answer.text] * 2
    stop = threading.Event()
    stop.set()
    with pytest.raises(NamesakeError, match="Polly flew away"):
        last(parrot.stream(ASK, Sampling(), stop))


def test_after_two_hundred_chats_no_thread_and_no_memory_is_left_over(engine):
    def chat(number):
        stop = threading.Event()
        states = engine.stream(ASK, Sampling(max_new_tokens=6 + number % 5, seed=number), stop)
        match number % 4:
            case 0:
                last(states)
            case 1:
                next(states)
                stop.set()
                last(states)
            case 2:
                next(states)
                states.close()
            case 3:
                hook = engine.model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
                with pytest.raises(NamesakeError):
                    last(states)
                hook.remove()

    for number in range(40):
        chat(number)
    assert gone(answering())
    gc.collect()
    process = psutil.Process()
    memory, threads = process.memory_info().rss, threading.active_count()
    for number in range(200):
        chat(number)
    assert gone(answering())
    gc.collect()
    assert threading.active_count() <= threads
    assert process.memory_info().rss - memory < 20e6


def test_a_long_history_is_trimmed_and_the_answer_says_by_how_many_turns(engine):
    history = []
    for turn in range(30):
        history += [{"role": "user", "content": f"Question {turn} " * 8}, {"role": "assistant", "content": "Yes. " * 8}]
    answer = last(engine.stream([*history, *ASK], Sampling(max_new_tokens=4, seed=1)))
    assert 0 < answer.dropped < 30
    assert answer.tokens_in <= 512 - 4 and answer.context == 512


def test_a_message_that_does_not_fit_alone_is_refused_with_its_length(engine):
    with pytest.raises(NamesakeError, match=r"too long: \d+ tokens"):
        next(engine.stream([{"role": "user", "content": "word " * 600}], Sampling(max_new_tokens=4)))


def test_a_cut_answer_goes_on_where_it_stopped(real):
    question = [{"role": "user", "content": "Count from one to ten in words."}]
    whole = last(real.stream(question, Sampling(temperature=0, repetition_penalty=1, max_new_tokens=40))).text
    begun = last(real.stream(question, Sampling(temperature=0, repetition_penalty=1, max_new_tokens=12)))
    assert begun.state == "length"
    so_far = [*question, {"role": "assistant", "content": begun.text}]
    rest = last(real.stream(so_far, Sampling(temperature=0, repetition_penalty=1, max_new_tokens=28), resume=True))
    assert begun.text + rest.text == whole


BAD_SAMPLING = {
    "max_new_tokens": [0, -1, 2049, 1.5, "many", float("nan"), float("inf"), None],
    "temperature": [-0.1, 2.1, "hot", float("nan"), None],
    "top_p": [-0.1, 1.1, "x"],
    "top_k": [-1, 201, 2.5],
    "repetition_penalty": [0.9, 2.1, 0],
    "seed": [-2, 1.5, "seed", 2**64],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_SAMPLING.items() for value in values]
)
def test_a_value_out_of_range_is_refused_with_the_range(name, value):
    with pytest.raises(NamesakeError) as raised:
        Sampling(**{name: value}).check(Limits())
    assert name in raised.value.text.en and " to " in raised.value.text.en
    assert name in raised.value.text.zh and "到" in raised.value.text.zh


def test_values_from_sliders_become_numbers_of_their_kind():
    checked = Sampling("64", 0, 1, 5.0, 1, -1).check(Limits())
    assert checked == Sampling(64, 0.0, 1.0, 5, 1.0, None)
    assert isinstance(checked.top_k, int) and isinstance(checked.temperature, float)
