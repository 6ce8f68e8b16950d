"""Serving on one GPU, measured through the engine's own interface: one visitor, many visitors, long chats, churn.

    python bench/serve.py [--model FOLDER] [--minutes 1] [--layers 32]

Without a model: InternLM2.5-7B's shape with random weights in bfloat16, and a tokenizer of its size whose text becomes
the same tokens again. Prints a table; everything in it comes from this one run. About two minutes and --minutes.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from space.batch import BatchEngine, Request
from space.engine import GREEDY, Engine, Run, Sampling

SHAPE = dict(  # InternLM2.5-7B in Llama layout
    vocab_size=92544,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
)
TINY = {**SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 2000}
PROMPT, NEW = 512, 256  # tokens
PAGE = dict(max_new_tokens=NEW, temperature=0.7, top_p=0.8, top_k=50, repetition_penalty=1.005)  # as the page samples
ROWS: list[tuple[str, str]] = []


def row(what: str, figure: str) -> None:
    ROWS.append((what, figure))
    print(f"{what}: {figure}", flush=True)


def random_model(shape: dict, device: str):
    """A model with random weights, and a tokenizer with one word for each of its ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    marks = ["<unk>", "<|im_start|>", "<|im_end|>"]
    words = [*marks, "system", "user", "assistant", *(f"w{i}" for i in range(shape["vocab_size"] - 6))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=marks[0], eos_token=marks[2])
    tokenizer.add_special_tokens({"additional_special_tokens": marks[1:2]})
    tokenizer.chat_template = "<|im_start|><|im_end|>"  # ChatML: the engine writes it out
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape)).eval()
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        model.lm_head.weight[:6] = 0  # so that no answer ends before its length
    return model, tokenizer


def gpu_memory() -> float:
    """Megabytes that this process has taken from the GPU."""
    return torch.cuda.memory_reserved() / 1e6 if torch.cuda.is_available() else 0.0


def talk(length: int, seed: int = 0) -> list[dict]:
    """A conversation whose prompt has about that many tokens."""
    words = random.Random(seed)
    return [{"role": "user", "content": " ".join(f"w{words.randrange(1900)}" for _ in range(length))}]


def tutorial_loop(model, tokenizer, ids: list[int], new: int):
    """The token loop that the tutorial's page runs: one eager forward pass, processors and a decode for each token."""
    from transformers import DynamicCache
    from transformers.generation import LogitsProcessorList
    from transformers.generation.logits_process import (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(PAGE["repetition_penalty"]),
            TemperatureLogitsWarper(PAGE["temperature"]),
            TopKLogitsWarper(PAGE["top_k"]),
            TopPLogitsWarper(PAGE["top_p"]),
        ]
    )
    every = torch.tensor([ids], device=model.device)
    fresh, cache = every, DynamicCache()
    for _ in range(new):
        with torch.inference_mode():
            output = model(input_ids=fresh, past_key_values=cache, use_cache=True)
            scores = warpers(every, output.logits[:, -1].float())
            fresh = torch.multinomial(scores.softmax(-1), 1)
        every = torch.cat([every, fresh], -1)
        yield tokenizer.decode(every[0, len(ids) :])
        if fresh.item() == tokenizer.eos_token_id:
            return


class Visit(threading.Thread):
    """A visitor with one question: reads the answer, or leaves in the middle of it."""

    def __init__(self, engine, messages, sampling, leave_after: int = 0):
        super().__init__(daemon=True)
        self.engine, self.messages, self.sampling, self.leave_after = engine, messages, sampling, leave_after
        self.stop, self.answer, self.error, self.left_at = threading.Event(), None, None, 0

    def run(self):
        try:
            for answer in self.engine.stream(self.messages, self.sampling, self.stop):
                self.answer = answer
                if self.leave_after and answer.tokens_out >= self.leave_after and not self.stop.is_set():
                    self.left_at = answer.tokens_out
                    self.stop.set()
        except Exception as error:
            self.error = error


def ask(engine, messages, sampling):
    visit = Visit(engine, messages, sampling)
    visit.run()
    if visit.error:
        raise visit.error
    return visit.answer


def limits(model) -> float:
    """The bytes a token needs, and how fast this GPU copies and reads; returns tokens per second at the best of it."""
    needed = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embed_tokens" not in n)
    size = min(4_000_000_000, needed)
    data = torch.randint(0, 100, (size // 8,), device=model.device)
    into = torch.empty_like(data)
    speeds = {}
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    for name, work, moved in (("copy", lambda: into.copy_(data), 2 * size), ("read", lambda: data.sum(), size)):
        times = []
        for _ in range(6):
            wait()
            start = time.perf_counter()
            work()
            wait()
            times.append(time.perf_counter() - start)
        speeds[name] = moved / statistics.median(times)
    row("weights read for a token", f"{needed / 1e9:.2f} GB")
    row("memory", " · ".join(f"{name} {speed / 1e12:.2f} TB/s" for name, speed in speeds.items()))
    limit = max(speeds.values()) / needed
    row("memory's limit for one visitor", f"{limit:.0f} tokens/s")
    return limit


def exact_logits(model, ids: list[int]) -> torch.Tensor:
    """Float32 logits after each of the last 64 tokens: layer by layer, so that it fits beside the model."""
    with torch.inference_mode():
        inner = model.model
        x = inner.embed_tokens(torch.tensor([ids], device=model.device)).float()
        places = torch.arange(len(ids), device=model.device)[None]
        turns = inner.rotary_emb(x, places)
        mask = torch.full((len(ids), len(ids)), -torch.inf, device=model.device).triu(1)[None, None]
        for layer in inner.layers:
            weights = {name: value.float() for name, value in layer.state_dict().items()}
            given = dict(attention_mask=mask, position_embeddings=turns, position_ids=places)
            x = torch.func.functional_call(layer, weights, (x,), given)
            x = x[0] if isinstance(x, tuple) else x
        x = torch.nn.functional.rms_norm(
            x[0, -64:], x.shape[-1:], inner.norm.weight.float(), inner.norm.variance_epsilon
        )
        return x @ model.lm_head.weight.float().t()


def fast_error(engine, ids: list[int], exact: torch.Tensor) -> float:
    """The relative error of the fast path's logits after beginnings of the prompt, of several lengths."""
    error = total = 0.0
    for back in range(0, 64, 9):
        tokens_of(engine, ids[: len(ids) - back], 1, plain=False)
        error += (engine.batch._first[0].float() - exact[63 - back]).square().sum().item()
        total += exact[63 - back].square().sum().item()
    return (error / total) ** 0.5


def tokens_of(engine, ids: list[int], count: int, plain: bool) -> list[int]:
    """Greedy tokens after these ids, by the plain path or the fast one."""
    sampling = Sampling(**{**vars(GREEDY), "max_new_tokens": count})
    run = Run(engine.tokenizer, ids, threading.Event())
    return Engine.generate(engine, run, ids, sampling) if plain else engine.generate(run, ids, sampling)


def compare(engine, ids: list[int], noise: float) -> None:
    """Greedy tokens of both paths; where they part, how far apart the plain path's own logits are there.

    `noise`: the root mean square of that path's own rounding error, against float32.
    """
    plain = tokens_of(engine, ids, NEW // 2, plain=True)
    done, gaps = 0, [0.0]
    while done < len(plain):
        fast = tokens_of(engine, ids + plain[:done], len(plain) - done, plain=False)
        same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(plain[done:], fast, strict=False))))
        done += same
        if done < len(plain):
            with torch.inference_mode():
                before = torch.tensor([ids + plain[:done]], device=engine.model.device)
                logits = engine.model(before).logits[0, -1].float()
            gaps.append(abs(logits[plain[done]] - logits[fast[same]]).item())
            done += 1
    row(
        f"greedy, {len(plain)} tokens: the fast path's is the plain path's",
        f"{len(plain) - len(gaps) + 1} times; the logits of the others are at most {max(gaps):.3f} apart, median "
        f"{statistics.median(gaps):.3f}, where the plain path's rounding error is {noise:.3f}",
    )


def one_visitor(engine, limit: float) -> float:
    answers = [ask(engine, talk(PROMPT, seed), Sampling(**PAGE, seed=seed)) for seed in range(100, 107)]
    speed = statistics.median(answer.speed for answer in answers)
    row("one visitor, fast path", f"{speed:.1f} tokens/s, {speed / limit:.2f} of the limit")
    row("its slowest and fastest answer", " – ".join(f"{f(a.speed for a in answers):.1f}" for f in (min, max)))
    first = sorted(answer.first_token for answer in answers)
    row(f"its first token after a prompt of {PROMPT}", f"{first[3] * 1e3:.0f} ms (worst {first[-1] * 1e3:.0f})")
    for length in (30, 2000, 8000):
        answer = ask(engine, talk(length, length), Sampling(**PAGE, seed=1))
        row(f"a prompt of {length}", f"{answer.first_token * 1e3:.0f} ms, then {answer.speed:.1f} tokens/s")
    answer = ask(engine, talk(PROMPT, 5), Sampling(**{**PAGE, "top_k": 0}, seed=1))
    row("without top-k (the whole vocabulary sorted)", f"{answer.speed:.1f} tokens/s")
    return speed


def many_visitors(engine, count: int, length: int) -> None:
    memory = gpu_memory()
    visits = [
        Visit(
            engine,
            talk(length, 1000 + i),
            Sampling(**{**PAGE, "temperature": 0.5 + i % 6 / 10, "top_p": 0.7 + i % 3 / 10}, seed=i),
        )
        for i in range(count)
    ]
    start = time.perf_counter()
    for visit in visits:
        visit.start()
    for visit in visits:
        visit.join()
    seconds = time.perf_counter() - start
    errors = [visit.error for visit in visits if visit.error]
    speeds = [visit.answer.speed for visit in visits if not visit.error]
    total = sum(visit.answer.tokens_out for visit in visits if not visit.error)
    first = sorted(visit.answer.first_token for visit in visits if not visit.error)
    row(
        f"{count} visitors at once, {length} + {NEW} tokens",
        f"{total / seconds:.0f} tokens/s in all ({total} in {seconds:.2f} s, prompts included), each "
        f"{min(speeds):.0f} – {max(speeds):.0f}, first token {first[len(first) // 2]:.2f} s (last {first[-1]:.2f}), "
        f"{len(errors)} errors, {gpu_memory() - memory:+.0f} MB",
    )


def churn(engine, count: int, minutes: float) -> None:
    """`count` visitors at any time: as one is through, or leaves, the next arrives with another question."""
    import psutil

    dice, visits, over, late, number, errors = random.Random(1), [], [], [], 0, 0  # over: tokens, speed, first token
    samples, start = [], time.perf_counter()
    mark = start + 0.2 * 60 * minutes

    def leave(visit: Visit) -> None:
        nonlocal errors
        errors += bool(visit.error)
        if visit.answer and visit.answer.tokens_out:
            over.append((visit.answer.tokens_out, visit.answer.speed, visit.answer.first_token))
        if visit.left_at:
            late.append(visit.answer.tokens_out - visit.left_at)

    while time.perf_counter() - start < minutes * 60:
        for visit in [visit for visit in visits if not visit.is_alive()]:
            leave(visit)
            visits.remove(visit)
        while len(visits) < count:
            sampling = Sampling(
                max_new_tokens=dice.randrange(16, 400),
                temperature=dice.choice([0, 0.7, 1.0]),
                top_p=dice.choice([0.8, 1.0]),
                top_k=dice.choice([50, 50, 50, 0]),
                repetition_penalty=1.005,
            )
            after = dice.randrange(1, 100) if dice.random() < 0.2 else 0
            visits.append(Visit(engine, talk(dice.randrange(20, 1000), number), sampling, after))
            visits[-1].start()
            number += 1
        if time.perf_counter() > mark:
            mark += max(1, 3 * minutes)
            samples.append((gpu_memory(), psutil.Process().memory_info().rss / 1e6, threading.active_count()))
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    for visit in visits:
        visit.stop.set()
    for visit in visits:
        visit.join()
        leave(visit)
    speeds = [speed for tokens, speed, _ in over if tokens > 20]
    first = sorted(first for *_, first in over)
    row(
        f"{count} visitors coming and going for {seconds:.0f} s",
        f"{sum(tokens for tokens, *_ in over) / seconds:.0f} tokens/s, {number} visitors, {errors} errors, the slowest "
        f"{min(speeds):.0f} tokens/s (1 in 100 below {statistics.quantiles(speeds, n=100)[0]:.0f}), "
        f"first token {first[len(first) // 2]:.2f} s (99 in 100 within {first[int(len(first) * 0.99)]:.2f})",
    )
    row("tokens an answer had beyond what was shown when its visitor left", f"{max(late)} at most, of {len(late)}")
    gpu, process, threads = zip(*samples, strict=True)
    middle = len(samples) // 2
    row(
        "memory after a fifth, half and all of that time",
        f"GPU {gpu[0]:.0f}, {gpu[middle]:.0f}, {gpu[-1]:.0f} MB; process {process[0]:.0f}, {process[middle]:.0f}, "
        f"{process[-1]:.0f} MB; threads {threads[0]}, {threads[middle]}, {threads[-1]}",
    )
    batch = engine.batch
    slots, pages = f"{len(batch._slots)} of {batch.llama.slots}", f"{batch.pages.free()} of {batch.llama.pages - 1}"
    row("after all have gone", f"{slots} slots and {pages} pages are free")


def stop_step(engine) -> None:
    """From a stop to the slot's being free, in steps of the model."""
    late = []
    for seed in range(10):
        request = Request(Run(engine.tokenizer, [], threading.Event()), list(range(10, 100)), Sampling(seed=seed), 400)
        engine.batch.add(request)
        while len(request.tokens) < 20:
            time.sleep(0.001)
        had = len(request.tokens)
        request.run.stop.set()
        while not request.over:
            time.sleep(0.0002)
        late.append(len(request.tokens) - had)
    row("tokens between a stop and the freed slot", f"{max(late)} at most, of {len(late)} stops")


def long_chat(engine, reuse: bool) -> None:
    """Five turns of about PROMPT tokens at first, then 200, and answers of 128; the time to the first token of each."""
    firsts = []
    for repeat in range(3):
        messages, times = talk(PROMPT, 7000 + repeat), []
        for turn in range(5):
            asked = messages if reuse else [{"role": "system", "content": f"w{turn} w{repeat}"}, *messages]
            answer = ask(engine, asked, Sampling(**{**PAGE, "max_new_tokens": NEW // 2}, seed=turn))
            times.append(answer.first_token)
            messages += [{"role": "assistant", "content": answer.text}, *talk(200, 8000 + turn)]
        firsts.append((times, answer.tokens_in))
    times = [statistics.median(each) * 1e3 for each in zip(*(times for times, _ in firsts), strict=True)]
    row(
        f"first token by turn, {'as it is' if reuse else 'with nothing found again'}",
        f"{', '.join(f'{t:.0f}' for t in times)} ms; the fifth, after {firsts[0][1]} tokens, "
        f"{times[4] / times[0]:.2f} × the first",
    )


def one_by_one(engine, limit: float) -> None:
    """The plain path and its limits, the warm-up, and one visitor on the fast path."""
    model, tokenizer = engine.model, engine.tokenizer
    ids = engine.fit(talk(PROMPT), Sampling(**PAGE)).ids
    row("prompt", f"{len(ids)} tokens")
    exact = exact_logits(model, ids)
    with torch.inference_mode():
        logits = model(torch.tensor([ids], device=model.device)).logits[0, -64:]
    noise = (logits.float() - exact).square().mean().sqrt().item()
    row("plain path's logits against float32", f"{noise / exact.square().mean().sqrt().item():.4f} relative")

    for _ in tutorial_loop(model, tokenizer, ids, 8):
        pass
    start = time.perf_counter()
    made = [time.perf_counter() for _ in tutorial_loop(model, tokenizer, ids, NEW // 4)]
    loop = (len(made) - 1) / (made[-1] - made[0])
    row("one visitor, the tutorial's loop", f"{loop:.1f} tokens/s, first token {1e3 * (made[0] - start):.0f} ms")
    plain = ask(engine, talk(PROMPT), Sampling(**{**PAGE, "max_new_tokens": NEW // 4}, seed=1))
    row("one visitor, generate (before the warm-up)", f"{plain.speed:.1f} tokens/s")

    meanwhile = Visit(engine, talk(PROMPT), Sampling(**{**PAGE, "max_new_tokens": NEW // 2}, seed=1))
    meanwhile.start()
    start = time.perf_counter()
    engine.warm_up()
    row("warm-up, while an answer is given", f"{time.perf_counter() - start:.1f} s")
    meanwhile.join()
    row("that answer", f"{meanwhile.error or meanwhile.answer.state}, {meanwhile.answer.speed:.1f} tokens/s")
    row("fast path's logits against float32", f"{fast_error(engine, ids, exact):.4f} relative")
    speed = one_visitor(engine, limit)
    row("against the tutorial's loop", f"{speed / loop:.2f} ×")
    compare(engine, ids, noise)
    long_chat(engine, reuse=True)
    long_chat(engine, reuse=False)


def main(
    model: Annotated[str, typer.Option(help="A model's folder; without it, random weights.")] = "",
    minutes: Annotated[float, typer.Option(help="How long visitors come and go.")] = 1,
    layers: Annotated[int, typer.Option(help="Layers of the random model.")] = 32,
    visitors: Annotated[int, typer.Option(help="How many at once.")] = 64,
    only_many: Annotated[bool, typer.Option(help="Leave out the plain path and the single visitor.")] = False,
) -> None:
    """Measure serving on one GPU; without a GPU, try the script with a tiny model."""
    import transformers

    began, gpu = time.perf_counter(), torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else "no GPU: a tiny model on the CPU, to try this script"
    row("machine", f"{name}; torch {torch.__version__}, transformers {transformers.__version__}")
    if model:
        from space.weights import load

        loaded = load(model, load_in="bf16")
        model, tokenizer = loaded.model, loaded.tokenizer
    else:
        shape = {**SHAPE, "num_hidden_layers": layers} if gpu else TINY
        model, tokenizer = random_model(shape, "cuda" if gpu else "cpu")
    limit = limits(model)
    engine = BatchEngine(model, tokenizer, concurrency=1, queue=2 * visitors)
    if only_many:
        engine.warm_up()
    else:
        one_by_one(engine, limit)
    row("cache", f"{engine.batch.llama.pages * 64} tokens")
    stop_step(engine)
    for length in (PROMPT // 2, PROMPT):
        many_visitors(engine, visitors, length)
    churn(engine, visitors, minutes)
    engine.close()
    print(f"\n{time.perf_counter() - began:.0f} s\n\n| what | figure |\n|---|---|")
    for what, figure in ROWS:
        print(f"| {what} | {figure} |")


if __name__ == "__main__":
    typer.run(main)
