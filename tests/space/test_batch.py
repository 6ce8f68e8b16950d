"""Many answers at once: the same as one by one, each with its own sampling and stop; and nothing is left over."""

from __future__ import annotations

import gc
import threading

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config
from transformers.generation import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from space import batch as batch_module
from space.batch import PAGE, BatchEngine, Pages, digests, make_engine
from space.engine import GREEDY, Answer, Engine, Sampling
from space.llama import FEW, Llama, unsupported
from space.settings import NamesakeError
from space.weights import Loader, source

ASK = [{"role": "user", "content": "Tell me a story"}]
SHAPE = dict(
    vocab_size=384,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)


@pytest.fixture(scope="module")
def model(tiny):
    """The tiny model with larger weights, so that what it says depends on what it was asked."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.dim() == 2:
                weight *= 12
    return model


@pytest.fixture
def made(tiny, model):
    """Makes engines that are warm, and closes them."""
    engines = []

    def make(**options) -> BatchEngine:
        engines.append(BatchEngine(model, AutoTokenizer.from_pretrained(tiny), **options))
        engines[-1].warm_up()
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(made) -> BatchEngine:
    return made()


def last(states) -> Answer:
    *_, answer = states
    return answer


def asks(count: int) -> list:
    return [[{"role": "user", "content": f"Question {i}. " * (1 + 7 * i % 40)}] for i in range(count)]


def together(engine, conversations, samplings) -> list[Answer | Exception]:
    """The answers to conversations that are asked at the same time."""
    answers: list = [None] * len(conversations)

    def visit(i):
        try:
            answers[i] = last(engine.stream(conversations[i], samplings[i]))
        except Exception as error:
            answers[i] = error

    visitors = [threading.Thread(target=visit, args=(i,)) for i in range(len(conversations))]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(60)
    return answers


def idle(engine) -> bool:
    """Whether all slots and pages are free again."""
    batch = engine.batch
    return len(batch._slots) == batch.llama.slots and batch.pages.free() == batch.llama.pages - 1


class Reads:
    """Counts the tokens of prompts that the model really reads."""

    def __init__(self, engine, monkeypatch):
        self.tokens = 0
        read = engine.batch.llama.read

        def counted(tokens, slots, positions, final):
            self.tokens += int((positions >= 0).sum())
            return read(tokens, slots, positions, final)

        monkeypatch.setattr(engine.batch.llama, "read", counted)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE),
        LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
        Qwen2Config(**SHAPE),
        MistralConfig(**SHAPE, sliding_window=None),
    ],
    ids=["llama", "llama with biases", "llama 3 positions", "qwen2", "mistral"],
)
def test_logits_are_those_of_transformers_model(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for bias in (module.bias for module in model.modules() if getattr(module, "bias", None) is not None):
        torch.nn.init.normal_(bias)
    ids = torch.randint(0, 384, (1, 150))
    with torch.inference_mode():
        expected = model(ids).logits[0]
        assert not unsupported(model)
        llama = Llama(model, slots=2, pages=8)
        llama.table[1, :3] = torch.tensor([7, 2, 5])
        for start in range(0, 150, 50):  # in three parts, the last token by a step of writing
            end = min(start + 50, 149)
            rows = torch.arange(start, end)
            logits = llama.read(ids[0, start:end], torch.full_like(rows, 1), rows, torch.tensor([end - start - 1]))
            torch.testing.assert_close(logits[0], expected[end - 1], atol=1e-4, rtol=1e-4)
        llama.token[1], llama.position[1] = ids[0, 149], 149
        logits = llama.write(torch.tensor([2, 1]))  # beside a row that fills up
        torch.testing.assert_close(logits[1], expected[149], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(ids).logits[0], expected)  # its weights are the same as before


def test_answers_made_together_are_those_made_one_by_one(model, tiny, engine):
    plain = Engine(model, AutoTokenizer.from_pretrained(tiny))
    sampling = Sampling(temperature=0, repetition_penalty=1.3, max_new_tokens=20)
    expected = [last(plain.stream(ask, sampling)) for ask in asks(9)]
    assert len({answer.text for answer in expected}) > 5
    for answer, alone in zip(together(engine, asks(9), [sampling] * 9), expected, strict=True):
        assert (answer.text, answer.state, answer.tokens_out) == (alone.text, alone.state, alone.tokens_out)
    assert idle(engine)


def test_many_conversations_are_answered_as_by_the_plain_path(model, tiny, engine, made):
    sampling, many = Sampling(temperature=0, repetition_penalty=1.3, max_new_tokens=20), asks(70)
    expected = Engine(model, AutoTokenizer.from_pretrained(tiny)).answer(many, sampling)
    told = {}
    assert engine.answer(many, sampling, told.setdefault) == expected == [told[i] for i in range(70)]
    assert idle(engine)
    assert made(pages=4).answer(many[:9], sampling) == expected[:9]  # some of which its cache can never hold


def test_a_seed_draws_differently_for_each_of_many_and_alike_the_next_time(engine):
    sampling, same = Sampling(temperature=1.0, top_k=0, max_new_tokens=8, seed=3), asks(1) * 5
    texts = [answer.text for answer in engine.answer(same, sampling)]
    assert len(set(texts)) > 2
    assert [answer.text for answer in engine.answer(same, sampling)] == texts


def test_an_error_while_many_are_answered_is_raised_and_stops_the_others(engine, monkeypatch):
    monkeypatch.setattr(engine.batch.llama, "read", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.answer(asks(9), Sampling(temperature=0))
    monkeypatch.undo()
    engine.answer(asks(2), Sampling(temperature=0, max_new_tokens=2))
    assert idle(engine)


def test_each_has_its_own_sampling_whoever_is_beside(engine):
    samplings = [
        Sampling(max_new_tokens=10 + i, temperature=i % 4 / 2, top_p=1 - i % 3 / 4, top_k=i % 2 * 50, seed=i)
        for i in range(8)
    ]
    alone = [last(engine.stream(ask, sampling)).text for ask, sampling in zip(asks(8), samplings, strict=True)]
    assert [answer.text for answer in together(engine, asks(8), samplings)] == alone
    same = Sampling(max_new_tokens=12, temperature=1.0, top_p=1, top_k=0)
    texts = [last(engine.stream(ASK, Sampling(**{**vars(same), "seed": seed}))).text for seed in (1, 1, 2, None, None)]
    assert texts[0] == texts[1] and len(set(texts)) == 4


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "penalty"),
    [(0.7, 0.8, 50, 1.005), (1.3, 1.0, 0, 1.0), (1.0, 0.5, 0, 1.5), (0.5, 0.9, 300, 1.2), (1.0, 0.0, 5, 1.0)],
)
def test_tokens_are_drawn_as_transformers_warpers_have_it(temperature, top_p, top_k, penalty):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval()
    count, prompt = 4000, torch.randint(0, 384, (1, 40))
    scores = torch.randn(1, 384) * 3
    warpers = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(penalty),
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(top_k or 384),
            TopPLogitsWarper(top_p),
        ]
    )
    expected = warpers(prompt, scores.clone()).softmax(-1)[0]
    with torch.inference_mode():
        llama = Llama(model, slots=count, pages=2)
        llama.knobs[:] = torch.tensor([temperature, top_p, penalty])
        llama.numbers[:, 0], llama.numbers[:, 1] = top_k, torch.arange(count + 1)
        llama.seen[:, prompt[0]] = True
        llama.position[:] = 17
        slots = torch.arange(count)
        drawn = llama.choose(scores.expand(count, -1), slots, True)
        assert llama.seen[slots, drawn].all() and (llama.position[:count] == 18).all()
        if 0 < top_k <= FEW:
            llama.position[:] = 17
            llama.seen[:] = False
            llama.seen[:, prompt[0]] = True
            assert torch.equal(llama.choose(scores.expand(count, -1), slots, False), drawn)
    assert (expected[drawn] > 0).all()
    found = torch.bincount(drawn, minlength=384) / count
    assert (found - expected).abs().sum() < 2.2 * (expected * (1 - expected) / count).sqrt().sum() + 1e-3


def test_a_stop_takes_effect_within_a_token_and_frees_its_slot(engine, monkeypatch):
    stop, steps = threading.Event(), []
    write = engine.batch.llama.write

    def stopping(slots):
        steps.append(slots)
        if len(steps) == 20:
            stop.set()
        return write(slots)

    monkeypatch.setattr(engine.batch.llama, "write", stopping)
    answer = last(engine.stream(ASK, Sampling(max_new_tokens=400, temperature=1.5, top_k=0, seed=1), stop))
    assert answer.state == "stopped" and 19 <= answer.tokens_out <= 21 and len(steps) <= 21
    assert idle(engine)


def test_an_end_token_ends_the_answer_there(engine, monkeypatch):
    write, steps = engine.batch.llama.write, []

    def ending(slots):
        steps.append(slots)
        logits = write(slots)
        return logits if len(steps) < 5 else logits.index_fill(-1, torch.tensor(engine.end_ids[:1]), 1e4)

    monkeypatch.setattr(engine.batch.llama, "write", ending)
    answer = last(engine.stream(ASK, Sampling(temperature=0, max_new_tokens=50)))
    assert (answer.state, answer.tokens_out) == ("finished", 6)
    assert idle(engine)
    steps.clear()  # the step that was on its way at the end concerns nobody any more
    again = last(engine.stream(ASK, Sampling(temperature=0, max_new_tokens=50)))
    assert (again.text, again.tokens_out) == (answer.text, 6)
    assert idle(engine)


def test_the_others_go_on_when_one_stops_or_leaves(engine):
    sampling = Sampling(max_new_tokens=60, temperature=0)
    alone = last(engine.stream(ASK, sampling)).text
    leaving, stop = engine.stream(asks(2)[1], Sampling(max_new_tokens=400, seed=2)), threading.Event()
    stopping = engine.stream(asks(3)[2], Sampling(max_new_tokens=400, seed=3), stop)
    next(leaving), next(stopping)
    staying = engine.stream(ASK, sampling)
    next(staying)
    leaving.close()
    stop.set()
    assert last(staying).text == alone
    assert last(stopping).state == "stopped"


def test_the_next_turn_reads_only_what_is_new(engine, monkeypatch):
    reads = Reads(engine, monkeypatch)
    talk = [{"role": "system", "content": "Be kind. " * 20}, {"role": "user", "content": "Hello " * 40}]
    sampling = Sampling(temperature=0, max_new_tokens=30)
    first = last(engine.stream(talk, sampling))
    assert reads.tokens == first.tokens_in
    talk += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And then?"}]
    reads.tokens = 0
    second = last(engine.stream(talk, sampling))
    assert second.tokens_in > first.tokens_in + 20
    assert reads.tokens <= second.tokens_in - first.tokens_in + PAGE
    reads.tokens = 0
    again = last(engine.stream(talk, sampling))
    assert again.text == second.text and 0 < reads.tokens <= PAGE  # what was found again gives the same answer
    reads.tokens = 0
    last(engine.stream([talk[0], {"role": "user", "content": "Somebody else's question"}], sampling))
    assert reads.tokens < second.tokens_in - PAGE + 1  # the system prompt is shared


def test_more_visitors_than_the_cache_holds_wait_for_pages(made):
    engine = made(pages=9)
    answers = together(engine, asks(12), [Sampling(max_new_tokens=60, seed=i) for i in range(12)])
    assert all(answer.tokens_out for answer in answers)
    assert idle(engine)


def test_an_answer_that_the_cache_can_never_hold_takes_the_plain_path(made):
    engine = made(pages=3)
    assert not engine.batch.fits(4 * PAGE)
    assert last(engine.stream(ASK, Sampling(max_new_tokens=4 * PAGE, seed=1))).tokens_out > 0
    assert engine.batch._graphs and idle(engine)


def test_until_it_is_warm_answers_come_one_by_one(tiny, model):
    engine = BatchEngine(model, AutoTokenizer.from_pretrained(tiny))
    sampling = Sampling(temperature=0, max_new_tokens=8)
    before = last(engine.stream(ASK, sampling))
    first, second = (engine.stream(ASK, Sampling(max_new_tokens=400, seed=1)) for _ in range(2))
    next(first)
    assert next(second).state == "waiting"
    engine.warm_up()
    assert next(state for state in second if state.state != "waiting").state == "reading"  # there is a place at once
    assert last(engine.stream(ASK, sampling)).text == before.text
    first.close(), second.close()
    engine.close()


def test_the_page_says_that_it_warms_up_and_answers_meanwhile(tiny, monkeypatch):
    seen = []

    def make(*arguments):
        engine = BatchEngine(*arguments)
        warm_up = engine.warm_up

        def watched():
            seen.append((loader.status.state, last(loader.engine.stream(ASK, Sampling(max_new_tokens=2))).tokens_out))
            warm_up()

        engine.warm_up = watched
        return engine

    monkeypatch.setattr(batch_module, "make_engine", make)
    loader = Loader(source(str(tiny)), "", "auto")
    loader.start()
    loader.join(60)
    assert seen == [("warming", 2)]
    assert loader.status.state == "ready" and loader.engine.batch
    loader.engine.close()


def test_without_a_gpu_the_plain_engine_is_made(tiny, model):
    assert type(make_engine(model, AutoTokenizer.from_pretrained(tiny))) is Engine


def test_a_warm_up_that_fails_leaves_the_plain_path(tiny, model, monkeypatch):
    monkeypatch.setattr(batch_module, "Batch", lambda *_: 1 / 0)
    engine = BatchEngine(model, AutoTokenizer.from_pretrained(tiny))
    engine.warm_up()
    assert last(engine.stream(ASK, Sampling(max_new_tokens=3, seed=1))).tokens_out == 3


@pytest.mark.parametrize("step", ["read", "write"])
def test_an_error_reaches_those_it_concerns_and_the_next_answers_work(engine, step, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory")
    with monkeypatch.context() as broken:

        def fail(*_):
            raise error

        broken.setattr(engine.batch.llama, step, fail)
        answers = together(engine, asks(4), [Sampling(max_new_tokens=30, seed=1)] * 4)
    assert all(isinstance(answer, NamesakeError) and answer.__cause__ is error for answer in answers)
    assert idle(engine)
    sampling = Sampling(temperature=0, max_new_tokens=10)
    assert last(engine.stream(asks(4)[3], sampling)).tokens_out == 10


def test_an_error_while_one_prompt_is_read_leaves_the_others_alone(engine, monkeypatch):
    sampling = Sampling(max_new_tokens=60, temperature=0)
    alone = last(engine.stream(ASK, sampling)).text
    states = engine.stream(ASK, sampling)
    next(states)
    read = engine.batch.llama.read
    monkeypatch.setattr(engine.batch.llama, "read", lambda *rows: 1 / 0 if (rows[2] >= 0).sum() > 100 else read(*rows))
    with pytest.raises(NamesakeError, match="ZeroDivisionError"):
        last(engine.stream([{"role": "user", "content": "word " * 200}], sampling))
    assert last(states).text == alone


def test_after_two_hundred_chats_nothing_is_left_over(engine):
    def chat(number):
        stop = threading.Event()
        states = engine.stream(asks(9)[number % 9], Sampling(max_new_tokens=6 + number % 5, seed=number), stop)
        match number % 3:
            case 0:
                last(states)
            case 1:
                next(states)
                stop.set()
                last(states)
            case 2:
                next(states)
                states.close()

    def chats(count):
        for number in range(count):
            chat(number)
        last(engine.stream(ASK, GREEDY))
        for thread in [thread for thread in threading.enumerate() if thread.name == "answer"]:
            thread.join(5)
        gc.collect()
        assert idle(engine)
        return psutil.Process().memory_info().rss, threading.active_count()

    memory, threads = chats(60)
    later, still = chats(200)
    assert still <= threads
    assert later - memory < 20e6


def test_closing_ends_every_answer_and_the_thread(engine):
    states = engine.stream(ASK, Sampling(max_new_tokens=400, seed=1))
    next(states)
    engine.close()
    with pytest.raises(NamesakeError):
        last(states)
    assert not [thread for thread in threading.enumerate() if thread is engine.batch._thread]


def test_pages_are_found_by_all_that_comes_before_them_and_the_oldest_go_first():
    pages, ids = Pages(5), list(range(3 * PAGE))
    mine, known = pages.take(digests(ids), 3)
    assert (known, pages.free()) == (0, 1) and 0 not in mine
    assert pages.take([], 2) is None
    pages.know(mine, digests(ids))
    assert pages.take(digests(ids[: 2 * PAGE]), 2) == (mine[:2], 2)  # shared with one who holds them
    assert digests([7, *ids[1:]])[1] != digests(ids)[1]
    assert digests([*ids[:PAGE], 0, *ids[PAGE + 1 :]])[0] == digests(ids)[0]
    assert pages.take(digests([*ids[:PAGE], 0, *ids[PAGE + 1 :]]), 3) is None  # one is known, one free: too few
    pages.give_back(mine)
    assert pages.free() == 2
    pages.give_back(mine[:2])
    assert pages.free() == 4
    assert pages.take([], 2)[0][1] == mine[2]  # the never used one, then the conversation's end
    assert pages.take(digests(ids), 2) == (mine[:2], 2)
    with pytest.raises(IndexError):
        pages.give_back([99])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model: setattr(model.config, "hidden_act", "gelu"), "activation"),
        (lambda model: setattr(model.config, "rope_parameters", {"rope_type": "longrope"}), "positions"),
        (lambda model: setattr(model.config, "sliding_window", 64), "sliding window"),
        (lambda model: setattr(model.model.layers[0].mlp, "up_proj", torch.nn.Identity()), "quantized"),
    ],
)
def test_what_it_cannot_run_is_told_apart(change, why):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    assert unsupported(model) == ""
    change(model)
    assert why in unsupported(model)
