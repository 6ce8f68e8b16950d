"""Weights and messages → a stream of text: sampling limits, stop, errors, and why an answer ended."""

from __future__ import annotations

import collections
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from transformers import GenerationConfig, StoppingCriteria, TextIteratorStreamer
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from space.prompt import Fitted, Message, Prompt
from space.settings import Limits, NamesakeError

log = logging.getLogger("namesake")

INTERVAL = 0.1  # seconds between two states of an answer: a browser draws about ten a second without falling behind


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are those of the page's settings; temperature 0 is greedy."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 50
    repetition_penalty: float = 1.005
    seed: int | None = None  # None: another answer each time

    def check(self, limits: Limits) -> Sampling:
        """These values with their types put right. Raises NamesakeError with the range for one that is out of it."""
        ranges = {
            "max_new_tokens": (int, 1, limits.max_new_tokens),
            "temperature": (float, 0, limits.temperature),
            "top_p": (float, 0, 1),
            "top_k": (int, 0, limits.top_k),
            "repetition_penalty": (float, 1, limits.repetition_penalty),
            "seed": (int, 0, 2**63 - 1),
        }
        checked = {}
        for name, (kind, low, high) in ranges.items():
            value = getattr(self, name)
            if name == "seed" and value in (None, "", -1):
                checked[name] = None
                continue
            try:
                number = kind(value)
                if number != float(value) or not low <= number <= high:  # nan is in no range
                    raise ValueError
            except (TypeError, ValueError, OverflowError):
                raise NamesakeError(
                    f"{name} is {value!r}: it must be {'a whole number' if kind is int else 'a number'} "
                    f"from {low} to {high}",
                    zh=f"{name} 的值 {value!r} 无效：应为 {low} 到 {high} 之间的{'整数' if kind is int else '数'}。",
                ) from None
            checked[name] = number
        return Sampling(**checked)


Made = Generator[tuple[int, list[int]], None, None]  # a prompt's index and its new token ids
GREEDY = Sampling(temperature=0, repetition_penalty=1, top_p=1, top_k=0)


@dataclass(frozen=True)
class Answer:
    """An answer so far. `state`: waiting, reading, writing, and at the end finished, length or stopped."""

    text: str = ""
    state: str = "waiting"
    ahead: int = 0  # while waiting: how many answers begin before this one
    tokens_in: int = 0
    tokens_out: int = 0
    first_token: float = 0.0  # seconds from the request to the first token
    speed: float = 0.0  # tokens per second after the first
    dropped: int = 0  # the oldest turns left out, so that the rest fits
    context: int = 0  # the model's context window, in tokens


class _Stopped(Exception):
    """Raised inside the model's forward pass, to leave the reading of a long prompt."""


class _Sampler(LogitsProcessor):
    """Chooses the token itself, with transformers' own warpers and a generator of its own, and leaves only that one.

    `generate` would draw from the process-wide generator, which other visitors' threads draw from too: the same seed
    would not give the same answer.
    """

    def __init__(self, sampling: Sampling, device: torch.device):
        self._sampling = sampling
        self._warpers = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self._warpers.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if sampling.temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k > 0:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))
            seed = random.getrandbits(63) if sampling.seed is None else sampling.seed
            self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids, scores):
        scores = self._warpers(input_ids, scores.float())
        if self._sampling.temperature > 0:
            chosen = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
            scores = torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0)
        return scores


class _Watch(StoppingCriteria):
    """Tells the run of each new token, and ends the answer once the visitor stops it."""

    def __init__(self, run: Run):
        self._run = run

    def __call__(self, input_ids, scores, **_):
        self._run.count(int(input_ids[0, -1]))
        return torch.full((input_ids.shape[0],), self._run.stop.is_set(), device=input_ids.device)


class _Line:
    """First come, first served: at most `places` hold a place at once, and at most `length` wait for one."""

    def __init__(self, places: int, length: int):
        self._free, self._length = places, length
        self._waiting: collections.deque[object] = collections.deque()
        self._changed = threading.Condition()

    def join(self) -> object:
        """A ticket at the end of the line. Raises NamesakeError when the line is full."""
        with self._changed:
            if not self._free and len(self._waiting) >= self._length:
                raise NamesakeError(
                    f"{self._length} visitors are waiting already",
                    "Try again in a minute.",
                    zh=f"已有 {self._length} 位访客在排队，请一分钟后再试。",
                )
            ticket = object()
            self._waiting.append(ticket)
            return ticket

    def wait(self, ticket: object, timeout: float) -> int:
        """How many are ahead of the ticket after at most `timeout` seconds; 0: it holds a place now."""
        with self._changed:
            self._changed.wait_for(lambda: self._free and self._waiting[0] is ticket, timeout)
            if self._free and self._waiting[0] is ticket:
                self._waiting.popleft()
                self._free -= 1
                self._changed.notify_all()
                return 0
            return self._waiting.index(ticket) + 1

    def leave(self, ticket: object) -> None:
        """Give up waiting."""
        with self._changed:
            self._waiting.remove(ticket)
            self._changed.notify_all()

    def free(self) -> None:
        """Give back a place."""
        with self._changed:
            self._free += 1
            self._changed.notify_all()


class Run:
    """One answer being made: what the thread that makes it and the one that reads it share."""

    def __init__(self, tokenizer, prompt: list[int], stop: threading.Event, messages: list[Message] = ()):
        self.prompt, self.stop, self.messages = prompt, stop, messages
        self.streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=INTERVAL, skip_special_tokens=True)
        self.tokens, self.first_id = 0, -1
        self.first = self.last = 0.0  # when the first and the latest token came, on time.perf_counter's clock
        self.thread: threading.Thread | None = None
        self.ids: list[int] = []  # the whole answer's, once it is over
        self.error: BaseException | None = None

    def count(self, token: int, count: int = 1, now: float = 0.0) -> None:
        """Notes that `count` more tokens are there, of which `token` is the first, now or at the time given."""
        self.last = now or time.perf_counter()
        if not self.tokens:
            self.first, self.first_id = self.last, token
        self.tokens += count

    def write(self, tokens: list[int]) -> None:
        """Hands tokens to the reader, as `generate` does by itself: the prompt comes first, and is not shown."""
        if self.streamer.next_tokens_are_prompt:
            self.streamer.put(torch.tensor(self.prompt))
        self.streamer.put(torch.tensor(tokens))


class BaseEngine:
    """What every engine shares: prompts that fit, the line, states at an even pace, stop, errors.

    An engine adds `generate`, and `generate_all` where it can make many answers at once; both may be called from
    several threads. `concurrency`: how many answers are made at once; `queue`: how many more may wait for their turn.
    `context`: the tokens that a prompt and its answer may have together; `end_ids`: the tokens that end an answer.
    """

    def __init__(self, tokenizer, context: int, end_ids: list[int], concurrency: int = 1, queue: int = 64):
        self.tokenizer, self.context = tokenizer, context
        self.prompt = Prompt(tokenizer)
        self.end_ids = sorted({*end_ids, *self.prompt.end_ids, tokenizer.eos_token_id} - {None})
        self._line = _Line(concurrency, queue)

    def generate(self, run: Run, ids: list[int], sampling: Sampling) -> list[int]:
        """The answer's token ids after the prompt's, its end token too. Runs in a thread of its own.

        Tells `run` of each token as it comes (`count`, `write`), and returns early once `run.stop` is set.
        """
        raise NotImplementedError

    def generate_all(self, prompts: list[list[int]], sampling: Sampling) -> Made:
        """Each prompt's index and new token ids, its end token too, in any order."""
        for i, ids in enumerate(prompts):
            yield i, self.generate(Run(self.tokenizer, ids, threading.Event()), ids, sampling)

    def warm_up(self) -> None:
        """Gets up to speed, while answers are given already; returns once that is done."""

    def close(self) -> None:
        """Ends what runs in the background. Answers being made fail."""

    def fit(self, messages: list[Message], sampling: Sampling, *, resume: bool = False) -> Fitted:
        """The prompt: the context less the answer's budget is its room, at least half of the context."""
        return self.prompt.fit(messages, self.context - min(sampling.max_new_tokens, self.context // 2), resume=resume)

    def budget(self, sampling: Sampling, prompt: int) -> int:
        """How many tokens an answer to a prompt of that length may have."""
        return min(sampling.max_new_tokens, self.context - prompt)

    def stream(
        self, messages: list[Message], sampling: Sampling, stop: threading.Event | None = None, *, resume: bool = False
    ) -> Iterator[Answer]:
        """The next answer as it grows, about ten states a second; with `resume`, the rest of the last answer.

        Setting `stop`, or closing the iterator, ends the answer within a token (within a layer while the prompt is
        read). Raises NamesakeError for what the visitor can mend; any other error of the model as NamesakeError too,
        with its cause.
        """
        stop = stop or threading.Event()
        started = time.perf_counter()
        fitted = self.fit(messages, sampling, resume=resume)
        answer = Answer(tokens_in=len(fitted.ids), dropped=fitted.dropped, context=self.context)
        ticket = self._line.join()
        try:
            while ahead := self._line.wait(ticket, INTERVAL):
                if stop.is_set():
                    yield replace(answer, state="stopped")
                    return
                yield replace(answer, ahead=ahead)
            ticket = None
        finally:
            if ticket:
                self._line.leave(ticket)
        run = Run(self.tokenizer, fitted.ids, stop, fitted.messages)
        run.thread = threading.Thread(target=self._work, args=(run, sampling), name="answer", daemon=True)
        run.thread.start()
        try:
            answer = replace(answer, state="reading")
            yield answer
            for text in self._pieces(run):
                lead = self._space_between(fitted.ids[-1], run.first_id) if resume and text else ""
                answer = self._state(answer, run, lead + text, started)
                yield answer
            run.thread.join()  # the text's end comes a moment before the ids and the error
            if isinstance(run.error, NamesakeError):
                raise run.error
            if run.error:
                raise _explained(run.error) from run.error
            ended = "finished" if run.ids and run.ids[-1] in self.end_ids else "length"
            yield replace(
                self._state(answer, run, answer.text.rstrip("\ufffd"), started),
                state="stopped" if stop.is_set() and ended != "finished" else ended,
            )
        finally:
            stop.set()

    def answer(
        self,
        conversations: list[list[Message]],
        sampling: Sampling = GREEDY,
        on_answer: Callable[[int, Answer], None] | None = None,
    ) -> list[Answer]:
        """Answers to many conversations, in their order; `on_answer(index, answer)` as each is made."""
        prompts = [self.fit(messages, sampling).ids for messages in conversations]
        answers: list[Answer] = [Answer()] * len(prompts)
        with closing(self.generate_all(prompts, sampling)) as made:  # what is no longer wanted ends, also with an error
            for i, ids in made:
                text = self.tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")
                state = "finished" if ids and ids[-1] in self.end_ids else "length"
                answers[i] = Answer(text, state, tokens_in=len(prompts[i]), tokens_out=len(ids), context=self.context)
                if on_answer:
                    on_answer(i, answers[i])
        return answers

    def _work(self, run: Run, sampling: Sampling) -> None:
        """The worker thread of one answer: whatever happens, its place is freed and the reader is told."""
        try:
            run.ids = self.generate(run, run.prompt, sampling)
        except BaseException as error:  # it is raised again in the reader's thread
            run.error = error
        finally:
            self._line.free()
            run.streamer.end()

    def _pieces(self, run: Run) -> Iterator[str]:
        """The text so far, once an INTERVAL, also while nothing is written yet; the whole of it at the end."""
        text, shown = "", 0.0
        while True:
            try:
                text += next(run.streamer)
            except (queue.Empty, StopIteration) as over:
                if isinstance(over, StopIteration) or not run.thread.is_alive():
                    yield text
                    return
            if time.perf_counter() - shown >= INTERVAL:
                shown = time.perf_counter()
                yield text

    def _state(self, answer: Answer, run: Run, text: str, started: float) -> Answer:
        if not run.tokens:
            return answer
        seconds = run.last - run.first
        return replace(
            answer,
            text=text,
            state="writing",
            tokens_out=run.tokens,
            first_token=run.first - started,
            speed=(run.tokens - 1) / seconds if seconds > 0 else 0.0,
        )

    def _space_between(self, last: int, first: int) -> str:
        """The space that a tokenizer such as SentencePiece's drops when an answer's rest is decoded by itself."""
        apart = self.tokenizer.decode([last]) + " " + self.tokenizer.decode([first])
        return " " if self.tokenizer.decode([last, first]) == apart else ""


class Engine(BaseEngine):
    """Answers conversations with one of transformers' models: each by `generate`, in a thread of its own."""

    def __init__(self, model, tokenizer, concurrency: int = 1, queue: int = 64):
        own = model.generation_config.eos_token_id
        own = own if isinstance(own, list) else [own]
        super().__init__(tokenizer, model.config.max_position_embeddings, own, concurrency, queue)
        self.model = model.eval()
        # A model's own sampling defaults would creep into every call that leaves a value open.
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        model.generation_config = GenerationConfig(eos_token_id=self.end_ids, pad_token_id=pad)
        self._thread = threading.local()  # .stop: the event of the answer that this thread makes
        for layer in getattr(model.get_decoder(), "layers", ()):
            layer.register_forward_pre_hook(self._leave_if_stopped)

    def generate(self, run: Run, ids: list[int], sampling: Sampling) -> list[int]:
        self._thread.stop = run.stop
        try:
            with torch.inference_mode():
                prompt = torch.tensor([ids], device=self.model.device)
                output = self.model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    streamer=run.streamer,
                    stopping_criteria=[_Watch(run)],
                    **self._config(sampling, len(ids)),
                )
            return output[0, len(ids) :].tolist()
        except _Stopped:
            return []

    def generate_all(self, prompts: list[list[int]], sampling: Sampling) -> Made:
        """In batches of about one length."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        while order:
            longest = len(prompts[order[0]]) + sampling.max_new_tokens
            size = max(1, self._batch_tokens() // longest)
            batch, order = order[:size], order[size:]
            yield from zip(batch, self._generate_batch([prompts[i] for i in batch], sampling), strict=True)

    def _batch_tokens(self) -> int:
        """The most tokens, prompts and answers with their padding, in one batch: few on a CPU, elsewhere as many as
        keep the cache of keys and values within 8 GB."""
        if self.model.device.type == "cpu":
            return 8192
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(8e9 / (2 * 2 * config.num_hidden_layers * heads * width))

    def _config(self, sampling: Sampling, longest: int) -> dict:
        return dict(
            generation_config=GenerationConfig(
                max_new_tokens=self.budget(sampling, longest),
                do_sample=False,
                eos_token_id=self.end_ids,
                pad_token_id=self.model.generation_config.pad_token_id,
            ),
            logits_processor=LogitsProcessorList([_Sampler(sampling, self.model.device)]),
        )

    def _generate_batch(self, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        """New token ids for each prompt, up to and including its end token."""
        longest = max(map(len, prompts))
        pad = self.model.generation_config.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            output = self.model.generate(
                ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                **self._config(sampling, longest),
            )
        rows = output[:, longest:].tolist()
        ends = [next((i + 1 for i, token in enumerate(row) if token in self.end_ids), len(row)) for row in rows]
        return [row[:end] for row, end in zip(rows, ends, strict=True)]

    def _leave_if_stopped(self, *_) -> None:
        stop = getattr(self._thread, "stop", None)
        if stop is not None and stop.is_set():
            raise _Stopped


def _explained(error: BaseException) -> NamesakeError:
    """An error of the model in words for a visitor; the traceback goes to the log."""
    log.error("The model failed", exc_info=error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return NamesakeError(
            "The model ran out of memory",
            "Shorten the message or clear the chat.",
            zh="模型的内存（显存）不够了，请缩短消息或清空对话后再试。",
        )
    return NamesakeError(
        f"The model failed: {type(error).__name__}", "Try again.", zh=f"模型出错（{type(error).__name__}），请重试。"
    )
