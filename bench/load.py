"""The page under load: 64 clients who each read 30 tokens a second, and a browser that reads as fast as it can.

    .venv/bin/python bench/load.py [--clients 64] [--rate 30] [--seconds 20]

A stand-in engine writes tokens of a real text at a given pace, so that all that is measured is the page: its line, its
threads, the decoding of tokens, Gradio's queue and what goes over the wire. Page, clients and browser share this
machine's cores. Clients speak the protocol of Gradio's own browser client, for the event behind the send button.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import multiprocessing
import re
import statistics
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TEXT = (
    "The sea covers most of the planet, and most of the sea has never been seen by anyone. Light fades in the first "
    "few hundred metres; below that, what lives makes its own. Rivers carry salt from the land, winds carry water "
    "back, and between the two the weather is made. People have crossed it for trade, for war and out of curiosity. "
)


def serve(port: int, ready) -> None:
    """The page with the stand-in engine, in a process of its own; sends the send event's number once it is up."""
    logging.disable(logging.CRITICAL)
    from transformers import AutoTokenizer

    from space import weights
    from space.engine import BaseEngine
    from space.page import Chat, launch
    from space.settings import Assistant, Page, Settings, Text

    class StandIn(BaseEngine):
        """Writes "COUNT RATE", the last question, as that many tokens at that many a second."""

        def generate(self, run, ids, sampling):
            count, rate = map(float, run.messages[-1]["content"].split()[:2])
            begin = time.perf_counter()
            for i in range(int(count)):
                if run.stop.wait(max(0.0, begin + i / rate - time.perf_counter())):
                    break
                run.count(text[i % len(text)])
                run.write([text[i % len(text)]])
            return [*text[:1], self.end_ids[0]]

    tokenizer = AutoTokenizer.from_pretrained(weights.embedded_folder())
    text = tokenizer(TEXT).input_ids
    page = Page(concurrency=256, queue=256)
    settings = Settings(Assistant(Text("同名", "Namesake"), Text("某人", "Someone")), page=page)
    loader = SimpleNamespace(
        engine=StandIn(tokenizer, 8192, [], page.concurrency, page.queue),
        status=weights.Status("ready", "stand-in", Text("", "")),
    )
    chat = Chat(settings, loader)
    launch(chat, loader, "127.0.0.1", port)
    answer = next(fn for fn in chat.fns.values() if getattr(fn.fn, "__name__", "") == "_answer")
    ready.send(answer._id)
    chat.block_thread()


async def client(http, url: str, event: int, question: str) -> tuple[float, float]:
    """Tokens a second as they arrive after the first, and the longest gap between two arrivals in seconds."""
    session = uuid.uuid4().hex
    history = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    data = [history, "You are Namesake.", 2048, 0.7, 0.8, 50, 1.005, -1]
    body = {"data": data, "fn_index": event, "session_hash": session, "event_data": None, "trigger_id": None}
    joined = await http.post(f"{url}gradio_api/queue/join", json=body)
    joined.raise_for_status()
    arrived: list[tuple[float, int]] = []
    async with http.stream("GET", f"{url}gradio_api/queue/data", params={"session_hash": session}) as stream:
        async for line in stream.aiter_lines():
            if not line.startswith("data:"):
                continue
            message = json.loads(line[5:])
            if found := re.findall(r"(\d+) tokens ·", line):
                arrived.append((time.perf_counter(), int(found[-1])))
            if message["msg"] == "process_completed":
                break
    (first, begun), (last, ended) = arrived[0], arrived[-1]
    gaps = [b - a for (a, _), (b, _) in itertools.pairwise(arrived)]
    return (ended - begun) / (last - first), max(gaps)


async def clients(url: str, event: int, count: int, rate: float, seconds: float) -> list[tuple[float, float]]:
    """All at once, their beginnings spread over a second, as visitors' are."""
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"accept-language": "en"}
    async with httpx.AsyncClient(timeout=None, limits=limits, headers=headers) as http:

        async def later(i: int):
            await asyncio.sleep(i / count)
            return await client(http, url, event, f"{int(rate * seconds)} {rate}")

        return await asyncio.gather(*(later(i) for i in range(count)))


def browser(url: str, tokens: int) -> float:
    """Tokens a second that a browser shows of one long answer, from the click to the whole answer on the screen."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium-headless-shell", args=flags)
        page = chromium.new_context(locale="en-US").new_page()
        page.goto(url)
        page.locator("#chat .placeholder h2").wait_for()
        rates = []
        for _ in range(3):
            before = page.locator(".note", has_text="finished").count()
            page.locator("textarea[data-testid=textbox]").fill(f"{tokens} 1000000")
            begin = time.perf_counter()
            page.keyboard.press("Enter")
            page.locator(".note", has_text="finished").nth(before).wait_for(timeout=60_000)
            rates.append(tokens / (time.perf_counter() - begin))
        chromium.close()
    return statistics.median(rates)


def measure(count: int, rate: float, seconds: float, with_browser: bool = True) -> dict:
    """All figures of one run; prints them as a table in Markdown."""
    import socket

    import psutil

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(port, there), daemon=True)
    process.start()
    if not here.poll(180):
        raise SystemExit("the page did not come up in 180 s")
    event, url, page = here.recv(), f"http://127.0.0.1:{port}/", psutil.Process(process.pid)
    try:
        asyncio.run(clients(url, event, 2, rate, 2))  # the first answers load what is loaded late
        before = sum(page.cpu_times()[:2])
        figures = asyncio.run(clients(url, event, count, rate, seconds))
        cost = (sum(page.cpu_times()[:2]) - before) / (count * int(rate * seconds))
        shown = browser(url, 1000) if with_browser else None
    finally:
        process.kill()
        process.join()
    rates, gaps = zip(*figures, strict=True)
    found = {
        "clients": count,
        "slowest": min(rates),
        "median": statistics.median(rates),
        "longest_gap": max(gaps),
        "page_ms_per_token": cost * 1000,
        "browser": shown,
    }
    print(f"| {count} clients at {rate:.0f} tokens/s, {seconds:.0f} s, {psutil.cpu_count()} cores | goal | figure |")
    print("|---|---|---|")
    print(f"| slowest client, tokens/s | 25 | {min(rates):.1f} |")
    print(f"| median client, tokens/s | | {found['median']:.1f} |")
    print(f"| longest wait for the next piece, s | | {max(gaps):.2f} |")
    print(f"| the page's own cost, ms of a core a token | | {cost * 1000:.2f} |")
    if shown:
        print(f"| a browser shows 1,000-token answers, tokens/s | 300 | {shown:.0f} |")
    return found


if __name__ == "__main__":
    import typer

    def main(clients: int = 64, rate: float = 30, seconds: float = 20, browser: bool = True) -> None:
        """The page's own figures under load, on loopback."""
        measure(clients, rate, seconds, browser)

    typer.run(main)
