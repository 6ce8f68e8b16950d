"""The page in a real browser: a server with an engine that does what it is told, and visitors."""

from __future__ import annotations

import socket
import threading
from collections import defaultdict
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

from space.settings import Assistant, Limits, NamesakeError, Page, Settings, Text

CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PERSONA = "You are Namesake."


@dataclass
class Call:
    """What the page asked the engine for."""

    messages: list
    sampling: object
    stop: threading.Event
    resume: bool
    over: threading.Event = field(default_factory=threading.Event)  # the page reads no further


class ScriptedEngine:
    """`space.engine.Engine` as the page sees it. The first word of the last question says what happens.

    slow: reads until it is stopped. long: writes until it is stopped. cut: ends at the length limit. crash, refuse: an
    error in mid-answer, and before it. line: waits until `turn` is set. markup: answers with HTML. say: answers with
    `says`. Else: "You said …".
    """

    def __init__(self):
        self.calls: list[Call] = []
        self.turn = threading.Event()
        self.says = ""

    def stream(self, messages, sampling, stop=None, *, resume=False):
        from space.engine import Answer

        call = Call(messages, sampling, stop, resume)
        self.calls.append(call)
        question = [message["content"] for message in messages if message["role"] == "user"][-1]
        order = (question.split() or [""])[0]
        answer = Answer(tokens_in=10, context=1000)
        try:
            if order == "refuse":
                raise NamesakeError(
                    "64 visitors are waiting already", "Try again in a minute.", zh="已有 64 位在排队。"
                )
            while order == "line" and not self.turn.wait(0.02) and not stop.is_set():
                yield replace(answer, ahead=2)
            yield replace(answer, state="reading")
            while order == "slow" and not stop.wait(0.02):
                yield replace(answer, state="reading")
            for count, text in enumerate(self._texts(order, question, resume), 1):
                if stop.wait(0.02):
                    break
                answer = replace(
                    answer, text=text, state="writing", tokens_out=count, first_token=0.1, speed=50.0, dropped=0
                )
                yield answer
                if order == "crash" and count == 3:
                    raise RuntimeError("secret detail")
            cut = order == "cut" and not resume
            yield replace(answer, state="stopped" if stop.is_set() else "length" if cut else "finished")
        finally:
            call.over.set()

    def _texts(self, order, question, resume):
        if order == "slow":
            return []
        if order == "long":
            return (" ".join(f"word{i}" for i in range(count)) for count in range(1, 3000))
        if order == "say":
            return [self.says]
        if order == "markup":
            return ["<b>bold</b> and **strong**"]
        words = ["", "and", "the", "rest"] if resume else f"You said {question}".split(" ")
        return [" ".join(words[: count + 1]) for count in range(len(words))]


class Server:
    """A page with a scripted engine on a port of its own, which can go away and come back."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.settings = Settings(
            Assistant(Text("小名", "Namesake"), Text("某人", "Someone"), PERSONA),
            page=Page(limits=Limits(max_new_tokens=1000)),
        )

    def start(self):
        import space.engine  # noqa: F401  as the loader does before a model is ready: it takes seconds
        from space.page import Chat, launch
        from space.weights import Status

        self.engine = ScriptedEngine()
        self.loader = SimpleNamespace(engine=self.engine, status=Status("ready", "Scripted", Text("gut", "good")))
        self.chat = Chat(self.settings, self.loader)
        launch(self.chat, self.loader, "127.0.0.1", self.port)

    def kill(self):
        """Goes away at once, with every connection."""
        self.chat.server.force_exit = True
        self.chat.close(verbose=False)


@pytest.fixture(scope="module")
def server():
    server = Server()
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=6_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium-headless-shell", args=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def profiles(browser):
    """Browser contexts by language that nobody uses now. Their cache halves the work of opening the page once more."""
    return defaultdict(list)


@pytest.fixture
def visit(browser, profiles, server):
    """Opens the page as a new visitor. No request of theirs may leave this machine."""
    used, outside = [], []

    def visit(url=server.url, locale="en-US", size=(1280, 800), dark=False):
        def look(request):
            if not request.url.startswith((url, "data:", "blob:")):
                outside.append(request)

        context = (
            profiles[locale].pop()
            if profiles[locale]
            else browser.new_context(locale=locale, permissions=["clipboard-read", "clipboard-write"])
        )
        context.on("request", look)
        used.append((locale, context, look))
        page = context.new_page()
        page.set_viewport_size(dict(width=size[0], height=size[1]))
        page.emulate_media(color_scheme="dark" if dark else "light")
        page.goto(url)
        page.locator("#header h1").wait_for()
        page.locator("#chat .placeholder h2").wait_for()
        return page

    yield visit
    for locale, context, look in used:
        origins = {"/".join(page.url.split("/")[:3]) for page in context.pages}
        for page in context.pages:
            page.close()
        blank = context.new_page()
        for origin in origins:
            forget = {"origin": origin, "storageTypes": "cookies,local_storage,indexeddb"}
            context.new_cdp_session(blank).send("Storage.clearDataForOrigin", forget)
        blank.close()
        context.remove_listener("request", look)
        profiles[locale].append(context)
    # What the page's own policy held back never left; Gradio 6.2's page asks for a script, and does without it.
    left = [request.url for request in outside if request.failure != "csp"]
    assert not [url for url in left if not url.endswith("/iframeResizer.contentWindow.min.js")]
