"""How fast the page is, as a visitor in a browser sees it: `python bench/page.py`, on a machine that does nothing else.

Starts `python app.py` a few times (what follows on the command line goes to it, such as --model FOLDER), and prints
medians as a table. The first start is not counted: it may convert the embedded model.
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
STARTS, ANSWERS = 3, 5
TOKENS = 100  # of each measured answer
QUESTION = "Tell me a long story about the sea."
LONG = "The sea was calm that night, and nobody on the shore slept. " * 110 + "What is this about?"  # some 1,500 tokens
SEND, STOP, NOTE = "#message .submit-button", "#message .stop-button", "#chat .note"

figures: dict[str, list[float]] = defaultdict(list)


def answers(url: str) -> int:
    """The HTTP status of a page, 0 while nothing listens there."""
    try:
        with urllib.request.urlopen(url) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@contextmanager
def app():
    """A started page: its address, and when it was started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, begun = f"http://127.0.0.1:{port}/", time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "app.py", "--port", str(port), *sys.argv[1:]],
        cwd=ROOT,
        env={**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while answers(url) != 200:
            if process.poll() is not None:
                sys.exit("The page did not start")
            time.sleep(0.02)
        yield url, begun
    finally:
        process.terminate()
        process.wait()


def write(page: Page, text: str) -> float:
    """Sends a message; when Enter was pressed."""
    page.locator("#message textarea").fill(text)
    begun = time.perf_counter()
    page.keyboard.press("Enter")
    return begun


def settings(page: Page) -> None:
    """Greedy answers of a fixed length."""
    page.locator("#settings > button").click()
    for box, value in zip(page.locator("#settings input[type=number]").all(), (TOKENS, 0), strict=False):
        box.fill(str(value))
    page.locator("#settings > button").click()


def writing(page: Page) -> None:
    """Waits until the last answer has its first token on the page."""
    page.wait_for_function(f"/tokens?.s/.test([...document.querySelectorAll('{NOTE}')].at(-1)?.textContent)")


def measure(page: Page) -> None:
    for _ in range(ANSWERS):
        begun = write(page, QUESTION)
        writing(page)
        figures["first token on the page, after Enter, s"].append(time.perf_counter() - begun)
        page.locator(SEND).wait_for(timeout=120_000)
        note = re.search(r"first after ([\d.]+) s · ([\d.]+) tokens/s", page.locator(NOTE).last.inner_text())
        figures["first token in the engine, s"].append(float(note[1]))
        figures["tokens/s"].append(float(note[2]))
        page.locator("#chat [aria-label=Clear]").click()
        page.locator("#chat .placeholder h2").wait_for()
    for _ in range(ANSWERS):
        write(page, QUESTION)
        writing(page)
        figures["stop in mid-answer, s"].append(stop(page))
        write(page, LONG)
        page.wait_for_function(f"/Reading/.test([...document.querySelectorAll('{NOTE}')].at(-1)?.textContent)")
        figures["stop while a prompt of 1,500 tokens is read, s"].append(stop(page))
        page.locator("#chat [aria-label=Clear]").click()
        page.locator("#chat .placeholder h2").wait_for()


def stop(page: Page) -> float:
    """Stops the answer; the seconds until the page takes the next message."""
    begun = time.perf_counter()
    page.locator(STOP).click()
    page.locator(SEND).wait_for()
    return time.perf_counter() - begun


def main() -> None:
    subprocess.run(["make", "--silent", ".venv/ready"], cwd=ROOT, check=True)
    for _ in range(ANSWERS):
        begun = time.perf_counter()
        subprocess.run(["make", "--silent", ".venv/ready"], cwd=ROOT, check=True)
        figures["what a second `make run` adds, s"].append(time.perf_counter() - begun)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium-headless-shell", args=["--no-sandbox"])
        for start in range(STARTS + 1):
            with app() as (url, begun):
                up = time.perf_counter() - begun
                page = browser.new_context(locale="en-US").new_page()
                page.goto(url)
                page.locator("#chat .placeholder h2").wait_for()
                shown = time.perf_counter() - begun
                write(page, QUESTION)
                writing(page)
                first = time.perf_counter() - begun
                page.locator(STOP).click()
                if start:
                    figures["page answers, after `python app.py`, s"].append(up)
                    figures["page drawn in the browser, s"].append(shown)
                    figures["first token of an answer, s"].append(first)
                if start == STARTS:
                    page.locator(SEND).wait_for()
                    with urllib.request.urlopen(f"{url}healthz") as reply:
                        told = json.load(reply)
                    settings(page)
                    page.locator("#chat [aria-label=Clear]").click()
                    measure(page)
                page.context.close()
        browser.close()
    print(f"{told['model']}, {told['reason']}; {os.cpu_count()} cores, {platform.machine()}\n")
    print("| what | median | lowest | highest | times |\n| --- | --- | --- | --- | --- |")
    for what, values in figures.items():
        digits = 1 if "tokens/s" in what else 2
        print(
            f"| {what} | {median(values):.{digits}f} | {min(values):.{digits}f} | {max(values):.{digits}f} |",
            len(values),
            "|",
        )


if __name__ == "__main__":
    main()
