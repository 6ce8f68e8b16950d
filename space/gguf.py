"""GGUF files → answers through llama.cpp: what serves a model where there is no GPU.

llama.cpp comes as `cyllama`, whose wheels hold it ready-made. It gets token ids from space/prompt.py and gives token
ids back; its own tokenizer and chat template are not used, so a visitor's text makes no control tokens here either.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from space.engine import BaseEngine, Made, Run, Sampling
from space.settings import NamesakeError

log = logging.getLogger("namesake")

BINDING = "cyllama==0.2.18"
TOKENIZER = "tokenizer.huggingface.json"  # the key that the format's description gives a whole tokenizer.json
TOKENIZER_CONFIG = "namesake.tokenizer_config"
ASSISTANT = "namesake.assistant"  # the text of assistant.json

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # a container's quota: microseconds of a core, and in how many
# A container's limit of memory and its use, in the files of cgroup's second and first version.
CGROUP = Path("/sys/fs/cgroup")
MEMORY = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))

SLOTS = 4  # conversations whose keys and values are kept, so that their next turn reads only what is new
CHUNK = 512  # prompt tokens read at once when nobody else is being answered …
SHARED = 64  # … and when others are, who wait for it


@dataclass
class _Slot:
    """One conversation's place in llama.cpp's cache: the tokens whose keys and values are there."""

    index: int
    tokens: list[int] = field(default_factory=list)
    job: _Job | None = None
    used: int = 0  # when it was last given to a job, as a count of jobs


@dataclass
class _Job:
    """An answer in the making. `pending`: tokens that the model has still to read."""

    run: Run
    ids: list[int]
    budget: int
    sampler: object
    pending: list[int]
    fresh: bool  # read the prompt anew, whatever is in the cache
    out: list[int] = field(default_factory=list)
    error: BaseException | None = None
    over: threading.Event = field(default_factory=threading.Event)


class GgufEngine(BaseEngine):
    """Answers conversations with a GGUF file. One thread computes; in each step every answer moves on by a token."""

    def __init__(self, model, tokenizer, context: int, end_ids: list[int], concurrency: int = 1, queue: int = 64):
        super().__init__(tokenizer, context, end_ids, concurrency, queue)
        llama = binding()
        self.model, self._llama = model, llama
        slots = max(concurrency, SLOTS)
        options = llama.LlamaContextParams()
        options.n_ctx, options.n_seq_max = context * slots, slots
        options.n_batch, options.n_ubatch = 2 * CHUNK, CHUNK
        options.n_threads = options.n_threads_batch = threads()
        self._context = llama.LlamaContext(model, options, verbose=False)
        self._context.install_cancel_callback()
        self._batch = llama.LlamaBatch(n_tokens=2 * CHUNK, embd=0, n_seq_max=1)
        self._slots = [_Slot(index) for index in range(slots)]
        self._jobs: list[_Job] = []  # not yet in a slot
        self._given = 0
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._compute, name="llama.cpp", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._context.cancel = True  # leaves the step in the making
        self._thread.join()

    def generate(self, run: Run, ids: list[int], sampling: Sampling) -> list[int]:
        # The same seed gives the same answer: sums in another order, as after a cached beginning, could tip a choice.
        fresh = sampling.seed is not None and sampling.temperature > 0
        job = _Job(run, ids, self.budget(sampling, len(ids)), self._sampler(sampling, ids), [], fresh)
        with self._changed:
            if self._closed:
                raise _gone()
            self._jobs.append(job)
            self._changed.notify()
        while not job.over.wait(0.02):
            if run.stop.is_set():
                self._context.cancel = True  # leaves the step in the making, also in mid-prompt
                job.over.wait()
        if job.error:
            raise job.error
        return job.out

    def generate_all(self, prompts: list[list[int]], sampling: Sampling) -> Made:
        """As many at once as there are slots: a step for several costs little more than a step for one."""

        stop = threading.Event()

        def one(ids: list[int]) -> list[int]:
            return self.generate(Run(self.tokenizer, ids, stop), ids, sampling)

        pool = ThreadPoolExecutor(len(self._slots))
        try:
            asked = {pool.submit(one, ids): i for i, ids in enumerate(prompts)}
            for answer in as_completed(asked):
                yield asked[answer], answer.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def losses(self, ids: list[int]) -> list[float]:
        """The loss in nats of each token after the first, given those before it; at most 2 × CHUNK tokens.

        Only while nothing is being answered.
        """
        import numpy

        slot = self._slots[0]
        self._forget(slot, 0)
        self._batch.reset()
        for position, token in enumerate(ids):
            self._batch.add(token, position, [slot.index], True)
        self._context.decode(self._batch)
        found = []
        for position, token in enumerate(ids[1:]):
            logits = numpy.fromiter(self._context.get_logits_ith(position), numpy.float32)
            highest = logits.max()
            found.append(float(highest + numpy.log(numpy.exp(logits - highest).sum()) - logits[token]))
        self._context.memory_seq_rm(slot.index, -1, -1)
        return found

    def _sampler(self, sampling: Sampling, ids: list[int]):
        """llama.cpp's samplers in transformers' order; the penalty counts the prompt's tokens too."""
        sampler = self._llama.LlamaSampler(self._llama.LlamaSamplerChainParams())
        if sampling.repetition_penalty != 1:
            sampler.add_penalties(self.context, sampling.repetition_penalty, 0.0, 0.0)
        if sampling.temperature > 0:
            sampler.add_temp(sampling.temperature)
            if sampling.top_k > 0:
                sampler.add_top_k(sampling.top_k)
            if sampling.top_p < 1:
                sampler.add_top_p(sampling.top_p, 1)
            seed = random.getrandbits(32) if sampling.seed is None else sampling.seed
            sampler.add_dist(seed % 0xFFFFFFFF)  # llama.cpp takes the highest number for "any seed"
        else:
            sampler.add_greedy()
        if sampling.repetition_penalty != 1:
            for token in ids:
                sampler.accept(token)
        return sampler

    def _compute(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._jobs or any(slot.job for slot in self._slots))
                if self._closed:
                    break
            try:
                self._give_slots()
                self._step()
            except BaseException as error:  # it is raised again where the answer was asked for
                for slot in self._slots:
                    slot.tokens = []
                    self._context.memory_seq_rm(slot.index, -1, -1)
                    if slot.job:
                        slot.job.error = error
                        self._end(slot)
        for job in [*self._jobs, *(slot.job for slot in self._slots if slot.job)]:
            job.error = _gone()
            job.over.set()

    def _give_slots(self) -> None:
        """Ends what was stopped, and gives free slots to waiting jobs.

        A job gets the slot with most of its prompt, if it uses more than half of what the slot holds: it goes on there.
        Else it gets the slot that was used longest ago. A system prompt that all share is no reason to take another
        visitor's conversation from memory.
        """

        def worth(slot: _Slot, ids: list[int]) -> int:
            common = _common(slot.tokens, ids)
            return common if 2 * common > len(slot.tokens) else 0

        for slot in self._slots:
            if slot.job and slot.job.run.stop.is_set():
                self._end(slot)
        while free := [slot for slot in self._slots if not slot.job]:
            with self._changed:
                if not self._jobs:
                    return
                job = self._jobs.pop(0)
            if job.run.stop.is_set():
                job.over.set()
                continue
            best = max(free, key=lambda slot: (worth(slot, job.ids), -slot.used))
            kept = 0 if job.fresh else min(_common(best.tokens, job.ids), len(job.ids) - 1)
            self._forget(best, kept)
            job.pending = job.ids[kept:]
            self._given += 1
            best.job, best.used = job, self._given

    def _step(self) -> None:
        """One pass of the model: the next token of each answer, and a piece of the prompts still to be read."""
        active = [slot for slot in self._slots if slot.job]
        if not active:
            return
        writing = [slot for slot in active if len(slot.job.pending) == 1]
        reading = [slot for slot in active if len(slot.job.pending) > 1]
        room = (SHARED if writing else CHUNK - len(writing)) if reading else 0
        self._batch.reset()
        parts: list[tuple[_Slot, int, int]] = []  # slot, tokens of it, the last one's place in the batch
        for slot in [*writing, *reading]:
            count = min(len(slot.job.pending), room) if slot in reading else 1
            if not count:
                continue
            room -= count if slot in reading else 0
            whole = count == len(slot.job.pending)
            for i, token in enumerate(slot.job.pending[:count]):
                self._batch.add(token, len(slot.tokens) + i, [slot.index], whole and i == count - 1)
            parts.append((slot, count, self._batch.n_tokens - 1))
        try:
            self._context.decode(self._batch)
        except InterruptedError:  # somebody stopped; the others' step is taken again
            self._context.cancel = False
            for slot, _, _ in parts:
                self._context.memory_seq_rm(slot.index, len(slot.tokens), -1)
            return
        for slot, count, place in parts:
            job = slot.job
            slot.tokens += job.pending[:count]
            job.pending = job.pending[count:]
            if job.pending:
                continue
            token = job.sampler.sample(self._context, place)
            job.out.append(token)
            job.pending = [token]
            job.run.count(token)
            job.run.write([token])
            if token in self.end_ids or len(job.out) >= job.budget or job.run.stop.is_set():
                self._end(slot)

    def _end(self, slot: _Slot) -> None:
        job, slot.job = slot.job, None
        job.over.set()

    def _forget(self, slot: _Slot, kept: int) -> None:
        slot.tokens = slot.tokens[:kept]
        self._context.memory_seq_rm(slot.index, kept, -1)


def _gone() -> NamesakeError:
    return NamesakeError("The model is no longer loaded", "Start it again.", zh="模型已关闭，请重新启动。")


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two lists share from their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def start(file: Path, context: int = 0, concurrency: int = 1, queue: int = 64) -> tuple[GgufEngine, str, str]:
    """An engine on a GGUF file, whose assistant it is ("" where the file does not say), and how it runs.

    `context`: tokens that a conversation may have; 0: what the model knows, as far as a quarter of the free memory
    holds the keys and values. Raises NamesakeError where the file or the binding is missing or broken.
    """
    llama = binding()
    try:
        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise ValueError
        model = _model_class()(str(file), llama.LlamaModelParams(), verbose=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise NamesakeError(
            f"{file}: not a whole GGUF file that llama.cpp can load",
            "Download or export it again: python -m training export",
            zh=f"{file} 不是 llama.cpp 能加载的完整 GGUF 文件。请重新下载，或用 python -m training export 重新导出。",
        ) from error
    told = model.metadata()
    tokenizer = _tokenizer(file, told)
    slots = max(concurrency, SLOTS)
    kind = told["general.architecture"]
    heads = int(told.get(f"{kind}.attention.head_count_kv") or model.n_head_kv)
    width = int(told.get(f"{kind}.attention.key_length") or model.n_embd // model.n_head)
    each = 2 * 2 * model.n_layer * heads * width  # bytes a token: keys and values in float16
    fits = free_memory() // 4 // (each * slots)
    context = min(context or model.n_ctx_train, model.n_ctx_train, max(fits, 512)) // 256 * 256
    vocabulary = model.get_vocab()
    ends = [token for token in range(vocabulary.n_vocab) if vocabulary.is_eog(token)]
    engine = GgufEngine(model, tokenizer, context, ends, concurrency, queue)
    names = json.loads(told.get(ASSISTANT, "{}")).get("name", {})
    who = " / ".join(dict.fromkeys(filter(None, (names.get("zh"), names.get("en")))))
    how = f"{model.desc} in llama.cpp, {threads()} threads, {context} tokens of context"
    log.info("%s: %s", file.name, how)
    return engine, who, how


def _tokenizer(file: Path, told: dict[str, str]):
    """The tokenizer that the file carries; of a foreign file, the one that transformers makes of llama.cpp's form."""
    import transformers

    if TOKENIZER not in told:
        return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    from tokenizers import Tokenizer

    config = json.loads(told.get(TOKENIZER_CONFIG, "{}"))
    config.pop("tokenizer_class", None)
    config["chat_template"] = told.get("tokenizer.chat_template")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(told[TOKENIZER]), **config)


def threads() -> int:
    """The cores that this process may use: those it is bound to, or fewer where its container has a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_MAX.read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or "max": no quota
        pass
    return cores


def free_memory() -> int:
    """The bytes that this process may still take: those free in the machine, or fewer where its container has a limit.

    Files that the kernel keeps in memory and would give up first count as free, as Kubernetes counts them.
    """
    import psutil

    free = psutil.virtual_memory().available
    for limit, used in MEMORY:
        try:
            most, now = (int((CGROUP / name).read_text()) for name in (limit, used))
            stat = dict(line.split() for line in (CGROUP / used).with_name("memory.stat").read_text().splitlines())
            free = min(free, most - now + int(stat.get("total_inactive_file") or stat["inactive_file"]))
        except (OSError, ValueError, KeyError):  # no such cgroup, or "max": no limit
            pass
    return max(free, 0)


@functools.cache
def _model_class():
    """cyllama's model with the attribute that its own get_logits_ith looks for, and 0.2.18's model lacks."""

    class Model(binding().LlamaModel):
        @property
        def n_vocab(self) -> int:
            return self.get_vocab().n_vocab

    return Model


def binding():
    """cyllama's module over llama.cpp's interface. Raises NamesakeError where it is not installed."""
    # OpenMP's threads wait for one another hundreds of times a token. By default they spin for about a millisecond
    # each time: on a busy machine that takes the core from the very thread that is waited for.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        import cyllama.llama.llama_cpp as llama
    except ImportError:
        raise NamesakeError(
            "GGUF files need llama.cpp's binding, which is not installed",
            f"Run: pip install {BINDING}",
            zh=f"运行 GGUF 文件需要 llama.cpp 的 Python 绑定，请运行 pip install {BINDING}。",
        ) from None
    llama.disable_logging()
    return llama
