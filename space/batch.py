"""Many answers at once from one model: the fast path of the page on a GPU.

A thread takes turns: it reads a part of one waiting prompt, then advances every answer by a token (continuous
batching), both as CUDA graphs of a few fixed sizes. Each conversation has a slot and pages of the cache; pages whose
tokens are known stay behind and are found again by the next prompt that begins with them.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import logging
import os
import random
import threading
import time
from array import array
from dataclasses import dataclass, field, replace

import torch

from space.engine import INTERVAL, Engine, Made, Run, Sampling
from space.llama import FEW, PAGE, Llama, unsupported

log = logging.getLogger("namesake")

PLACES = 64  # answers at once, if the page's concurrency asks for no more
CHUNKS = (64, 128, 256, 512)  # tokens of a prompt read in one turn: the next larger one, filled up


class Pages:
    """Which pages of the cache are free, in use, or free and still known by what they hold.

    A page is known by the digest of all tokens from the prompt's beginning to its own end. The one used longest ago is
    given out first, page 0 never.
    """

    def __init__(self, count: int):
        self._free = dict.fromkeys(range(1, count))  # in the order in which they will be given out
        self._uses = [0] * count
        self._digest: dict[int, bytes] = {}
        self._page: dict[bytes, int] = {}

    def free(self) -> int:
        return len(self._free)

    def take(self, digests: list[bytes], count: int) -> tuple[list[int], int] | None:
        """`count` pages, and how many of them hold what the first digests name. None: there aren't as many."""
        known = list(itertools.takewhile(lambda page: page is not None, map(self._page.get, digests)))
        if count - sum(self._uses[page] > 0 for page in known) > len(self._free):
            return None
        for page in known:
            self._free.pop(page, None)
        new = list(itertools.islice(self._free, count - len(known)))
        for page in new:
            del self._free[page]
            if digest := self._digest.pop(page, None):
                del self._page[digest]
        for page in (*known, *new):
            self._uses[page] += 1
        return known + new, len(known)

    def know(self, pages: list[int], digests: list[bytes]) -> None:
        """Notes what the first pages hold."""
        for page, digest in zip(pages, digests, strict=False):
            if digest not in self._page and page not in self._digest:
                self._page[digest], self._digest[page] = page, digest

    def give_back(self, pages: list[int]) -> None:
        for page in reversed(pages):  # of a conversation, the end is forgotten first
            self._uses[page] -= 1
            if not self._uses[page]:
                self._free[page] = None


def digests(ids: list[int]) -> list[bytes]:
    """A digest for each full page of these tokens, of all tokens up to its end."""
    digest, found = b"", []
    for start in range(0, len(ids) - PAGE + 1, PAGE):
        digest = hashlib.sha256(digest + array("q", ids[start : start + PAGE]).tobytes()).digest()
        found.append(digest)
    return found


@dataclass(eq=False)
class Request:
    """One answer on its way through the batch. `tokens` grows until `over`; `error` is why, if it failed."""

    run: Run
    ids: list[int]
    sampling: Sampling
    budget: int
    tokens: list[int] = field(default_factory=list)
    changed: threading.Event = field(default_factory=threading.Event)  # the first token is there, or it is over
    over: bool = False
    error: BaseException | None = None
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    read: int = 0  # how much of the prompt is in the cache
    asked: int = 0  # tokens that the device was asked for: one more than there are, while a step runs


class Batch:
    """Runs requests on one model, in a thread named "batch", until `close()`.

    Making one warms it up: kernels are compiled and graphs are captured, some ten seconds on a GPU.
    """

    def __init__(self, model, end_ids: list[int], slots: int = PLACES, pages: int = 0):
        self._cuda = model.device.type == "cuda"
        if not pages:
            pages = self._room(model, slots)
        self.llama, self.pages, self._end_ids = Llama(model, slots, pages), Pages(pages), set(end_ids)
        self._sizes = [size for size in (1, 2, 4, 8, 16, 24, 32, 48, *range(64, slots + 64, 64)) if size < slots]
        self._sizes.append(slots)
        self._slots = list(range(slots))
        self._waiting: collections.deque[Request] = collections.deque()
        self._reading: collections.deque[Request] = collections.deque()
        self._writing: list[Request] = []
        self._running: collections.deque = collections.deque()  # steps on the device: (its tokens, whose, when done)
        self._changed, self._closed = threading.Condition(), False
        self._stream = torch.cuda.Stream(model.device) if self._cuda else None
        self._first = torch.zeros(1, len(self.llama.head), dtype=model.dtype, device=model.device)
        self._graphs = {}
        self._on_stream(self._prepare)
        self._thread = threading.Thread(target=self._on_stream, args=(self._serve,), name="batch", daemon=True)
        self._thread.start()

    def add(self, request: Request) -> None:
        """Takes up a request that `fits`; its answer begins as soon as a slot and pages are free."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the batch is closed")
            self._waiting.append(request)
            self._changed.notify()

    def fits(self, length: int) -> bool:
        """Whether a prompt and its answer of that length together can ever be held."""
        return length <= min(self.llama.context, (self.llama.pages - 1) * PAGE)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    # The turns

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._reading or self._writing)
                if self._closed:
                    break
            try:
                self._turn()
            except BaseException as error:  # whatever it is, every answer is told, and the next ones may do better
                self._running.clear()
                for request in (*self._reading, *self._writing):
                    self._end(request, error)
        for request in (*self._waiting, *self._reading, *self._writing):
            self._end(request, RuntimeError("the batch is closed"))

    def _turn(self) -> None:
        for request in (*self._waiting, *self._reading, *self._writing):
            if request.run.stop.is_set():
                self._end(request)
        while self._waiting and self._slots and self._admit(self._waiting[0]):
            pass
        if self._reading:
            self._read(self._reading[0])
        asked = [request for request in self._writing if request.asked < request.budget]
        if asked:
            self._write(asked)
        while len(self._running) > bool(asked):  # one step behind: the device never waits for this thread
            self._deliver(*self._running.popleft())

    def _admit(self, request: Request) -> bool:
        """Gives the first request in line its slot and pages; False: there are not enough pages yet."""
        ids = request.ids
        count = -(-(len(ids) + request.budget) // PAGE)
        taken = self.pages.take(digests(ids[:-1]), count)  # the last token is always read: its logits are needed
        if not taken:
            return False
        request.pages, known = taken
        request.read, request.slot = known * PAGE, self._slots.pop()
        self._reading.append(self._waiting.popleft())
        try:
            self._set(request)
        except BaseException as error:
            self._end(request, error)
        return True

    def _set(self, request: Request) -> None:
        """Tells the device of a request's pages and sampling."""
        llama, slot, sampling = self.llama, request.slot, request.sampling
        seed = random.getrandbits(63) if sampling.seed is None else sampling.seed
        table = request.pages + [0] * (llama.table.shape[1] - len(request.pages))
        knobs = (sampling.temperature, sampling.top_p, sampling.repetition_penalty)
        llama.table[slot].copy_(self._host(table, torch.int32), non_blocking=True)
        llama.knobs[slot].copy_(self._host(knobs, torch.float32), non_blocking=True)
        llama.numbers[slot].copy_(self._host((sampling.top_k, seed)), non_blocking=True)
        llama.position[slot : slot + 1].copy_(self._host([len(request.ids) - 1]), non_blocking=True)
        llama.seen[slot].zero_()
        llama.seen[slot].index_fill_(0, self._host(request.ids).to(llama.device, non_blocking=True), True)

    def _read(self, request: Request) -> None:
        """Reads the next part of a prompt; after its end the first token is chosen."""
        try:
            part = request.ids[request.read : request.read + CHUNKS[-1]]
            size = next(size for size in CHUNKS if size >= len(part))
            fill = size - len(part)
            rows = [
                *part, *[0] * fill,
                *[request.slot] * size,
                *range(request.read, request.read + len(part)), *[-1] * fill,
                *[len(part) - 1] * size,
            ]  # fmt: skip
            self._run(("read", size), rows)
            request.read += len(part)
            self.pages.know(request.pages, digests(request.ids[: request.read]))
            if request.read < len(request.ids):
                self._reading.rotate(-1)  # a long prompt does not hold up the others
                return
            self._launch(("first", self._every([request])), [request])
            self._reading.remove(request)
            self._writing.append(request)
        except BaseException as error:
            self._end(request, error)

    def _write(self, requests: list[Request]) -> None:
        size = next(size for size in self._sizes if size >= len(requests))
        self._launch(("write", size, self._every(requests)), requests)

    def _launch(self, name: tuple, requests: list[Request]) -> None:
        """Has the device choose a token for each request, and sends for it."""
        size = name[1] if name[0] == "write" else 1
        slots = [request.slot for request in requests]
        tokens = self._run(name, slots + [self.llama.slots] * (size - len(slots)))
        done = None
        if self._cuda:
            tokens = torch.empty(size, dtype=torch.long, pin_memory=True).copy_(tokens, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        for request in requests:
            request.asked += 1
        self._running.append((tokens, requests, done))

    def _deliver(self, tokens: torch.Tensor, requests: list[Request], done) -> None:
        if done:
            done.synchronize()
        now = time.perf_counter()
        for request, token in zip(requests, tokens.tolist(), strict=False):
            if request.over:  # it ended while this step was on its way
                continue
            request.tokens.append(token)
            request.run.count(token, now=now)
            if token in self._end_ids or len(request.tokens) == request.budget:
                self._end(request)
            elif len(request.tokens) == 1:
                request.changed.set()

    def _end(self, request: Request, error: BaseException | None = None) -> None:
        with self._changed:
            for line in (self._waiting, self._reading, self._writing):
                if request in line:
                    line.remove(request)
        if request.slot >= 0:
            kept = request.read if not request.tokens else len(request.ids) + len(request.tokens) - 1
            if not error:
                self.pages.know(request.pages, digests((request.ids + request.tokens)[:kept]))
            self.pages.give_back(request.pages)
            self._slots.append(request.slot)
        request.error, request.over = error, True
        request.changed.set()

    # The device

    def _room(self, model, slots: int) -> int:
        """How many pages fit: 0.8 of the free memory, at most every slot's whole context."""
        config = model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        page = 2 * config.num_hidden_layers * config.num_key_value_heads * size * PAGE * model.dtype.itemsize
        most = slots * (-(-config.max_position_embeddings // PAGE)) + 1
        return min(most, int(torch.cuda.mem_get_info(model.device)[0] * 0.8) // page) if self._cuda else min(most, 1024)

    def _every(self, requests: list[Request]) -> bool:
        """Whether one of them may choose from more than the FEW best tokens."""
        return any(r.sampling.temperature > 0 and not 0 < r.sampling.top_k <= FEW for r in requests)

    def _steps(self):
        """Each step that the device can be asked for: its name, how many numbers it takes, and what it does."""
        llama = self.llama
        for size in CHUNKS:
            yield ("read", size), 4 * size, lambda rows: self._first.copy_(llama.read(*rows.view(4, -1)[:3], rows[-1:]))
        for every in (False, True):
            yield ("first", every), 1, lambda slots, every=every: llama.choose(self._first, slots, every)
            for size in self._sizes:
                yield (
                    ("write", size, every),
                    size,
                    lambda slots, every=every: llama.choose(llama.write(slots), slots, every),
                )

    def _prepare(self) -> None:
        """Captures each step as a CUDA graph with its input; on a CPU, a step is called as it is."""
        pool = torch.cuda.graph_pool_handle() if self._cuda else None
        for name, count, step in self._steps():
            rows = torch.full((count,), self.llama.slots, device=self.llama.device)
            if name[0] == "read":
                rows.view(4, -1).copy_(torch.tensor([0, self.llama.slots, -1, 0], device=rows.device)[:, None])
            if not self._cuda:
                self._graphs[name] = (rows, step, None)
                continue
            step(rows)  # compiles
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                output = step(rows)
            self._graphs[name] = (rows, graph.replay, output)

    def _run(self, name: tuple, numbers: list[int]) -> torch.Tensor:
        rows, run, output = self._graphs[name]
        rows.copy_(self._host(numbers), non_blocking=True)
        if self._cuda:
            run()
            return output
        return run(rows)

    def _host(self, numbers, dtype=torch.long) -> torch.Tensor:
        """Numbers in memory from which the device can copy while this thread goes on."""
        return torch.tensor(numbers, dtype=dtype, pin_memory=self._cuda)

    def _on_stream(self, work) -> None:
        with torch.inference_mode():
            if not self._cuda:
                return work()
            torch.cuda.set_device(self._stream.device)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                work()
            self._stream.synchronize()


def make_engine(model, tokenizer, concurrency: int = 1, queue: int = 64) -> Engine:
    """The fast engine where the model and its device allow it, else transformers' own way."""
    why = "it is not on an NVIDIA GPU" if model.device.type != "cuda" else unsupported(model)
    if os.environ.get("SPACES_ZERO_GPU"):
        why = "on ZeroGPU each answer has a process of its own"
    if why:
        log.info("Answers come one by one, by transformers' generate: %s", why)
        return Engine(model, tokenizer, concurrency, queue)
    return BatchEngine(model, tokenizer, concurrency, queue)


class BatchEngine(Engine):
    """An engine whose answers are made together, once `warm_up` is through; until then, one by one as before.

    Afterwards it has at least PLACES places, whatever its concurrency: they cost nothing while they are empty.
    """

    def __init__(self, model, tokenizer, concurrency: int = 1, queue: int = 64, pages: int = 0):
        super().__init__(model, tokenizer, concurrency, queue)
        self._concurrency, self._pages = concurrency, pages
        self.batch: Batch | None = None

    def warm_up(self) -> None:
        """Makes the fast path ready, while answers are given already. Where that fails, the plain path stays."""
        places = max(self._concurrency, PLACES)
        try:
            self.batch = Batch(self.model, self.end_ids, places, self._pages)
        except Exception:
            log.exception("The fast path could not be made ready; answers come one by one")
            return
        for _ in range(places - self._concurrency):
            self._line.free()

    def generate(self, run: Run, ids: list[int], sampling: Sampling) -> list[int]:
        request, written = self._request(run, ids, sampling), 0
        if request is None:
            return super().generate(run, ids, sampling)
        request.changed.wait()
        while True:
            over = request.over  # before the tokens are looked at
            if len(request.tokens) > written:
                fresh = request.tokens[written:]
                written += len(fresh)
                run.write(fresh)
            if over:
                break
            request.changed.clear()
            if not request.over:
                request.changed.wait(INTERVAL)
        if request.error:
            raise request.error
        return request.tokens

    def generate_all(self, prompts: list[list[int]], sampling: Sampling) -> Made:
        """All at once, in the batch's places; as before where it is not warm, or for prompts it can't hold.

        With a seed each prompt has one of its own, counted up from it: the same one would draw alike for all.
        """
        requests = []
        for i, ids in enumerate(prompts):
            seed = None if sampling.seed is None else sampling.seed + i
            requests.append(
                self._request(Run(self.tokenizer, ids, threading.Event()), ids, replace(sampling, seed=seed))
            )
        left = [i for i, request in enumerate(requests) if request is None]
        try:
            for i, ids in super().generate_all([prompts[i] for i in left], sampling):
                yield left[i], ids
            for i, request in enumerate(requests):
                if request is None:
                    continue
                while not request.over:
                    request.changed.wait(INTERVAL)
                    request.changed.clear()
                if request.error:
                    raise request.error
                yield i, request.tokens
        finally:
            for request in filter(None, requests):
                request.run.stop.set()

    def _request(self, run: Run, ids: list[int], sampling: Sampling) -> Request | None:
        """An answer that the batch has taken up; None where it is not warm, or could never hold it."""
        budget = self.budget(sampling, len(ids))
        if self.batch is None or not self.batch.fits(len(ids) + budget):
            return None
        request = Request(run, ids, sampling, budget)
        self.batch.add(request)
        return request

    def close(self) -> None:
        if self.batch:
            self.batch.close()
