"""The Gradio page: what a visitor sees and touches, in the visitor's language."""

from __future__ import annotations

import errno
import html
import importlib.util
import itertools
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from inspect import signature
from pathlib import Path

import anyio
import gradio as gr
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from space.settings import NamesakeError, Settings, Text
from space.weights import Loader, Source
from space.words import BROKEN, EMPTY, STILL, WORDS, describe, language

log = logging.getLogger("namesake")

THEME = gr.themes.Soft(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="slate",
    # No web fonts: the page shows at once where their hosts cannot be reached.
    font=["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
)

BUSY, IDLE = dict(submit_btn=False, stop_btn=True), dict(submit_btn=True, stop_btn=False)  # the text box
NOTHING = (gr.skip(), gr.skip())  # an answer's outputs left as they are; no output at all empties them

# What a model writes can load nothing from elsewhere: a picture's address could carry the chat to a stranger.
POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "frame-src 'none'; object-src 'none'; form-action 'self'\">"
)

JOINER = "\u2060"  # zero width, set behind each "<" that a visitor writes: the browser shows it and makes no HTML of it


def whole(text: str) -> str:
    """The text with "?" for half a character, which JSON can carry into the server, and nothing out of it."""
    return text.encode("utf-8", "replace").decode("utf-8")


def shown(text: str) -> str:
    """A visitor's text so that the page shows it as it was written."""
    return whole(text).replace("<", "<" + JOINER)


def written(text: str) -> str:
    """The text that `shown` was made from."""
    return text.replace("<" + JOINER, "<")


def conversation(history: list[dict]) -> list[dict]:
    """The page's or the API's history as plain messages: without the notes under the answers.

    A browser may send anything: what is no question and no answer is left out.
    """
    messages = []
    for message in history if isinstance(history, list) else []:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else ("", "")
        if isinstance(content, list):
            content = content[0] if content else ""
        if isinstance(content, dict):
            content = content.get("text")
        if isinstance(content, str) and (role == "assistant" or (role == "user" and content)):
            messages.append({"role": role, "content": whole(written(content) if role == "user" else content)})
    return messages


class Chat(gr.ChatInterface):
    """Gradio's chat, with events of its own: one way of answering behind send, examples, retry, edit and continue.

    The transcript in the browser is the only history. A stop ends an answer as its natural end does, so the page never
    waits for an event that was cancelled; what goes wrong becomes a line in the chat.
    """

    def __init__(self, settings: Settings, loader: Loader):
        self._settings, self._loader = settings, loader
        self._stops: dict[str, threading.Event] = {}  # the answer being made for a browser tab, by its session
        page, highest = settings.page, settings.page.limits
        # Each answer in the making, or in line, holds a thread for its next state; some are left for those turned away.
        # On a GPU there are 64 places at least.
        self._threads = anyio.CapacityLimiter(max(page.concurrency, 64) + page.queue + 8)
        self._stream = _on_zero_gpu(lambda *arguments, **options: loader.engine.stream(*arguments, **options))
        self._numbers = itertools.count(1)
        self._title = page.title or settings.assistant.name
        self._controls = {
            "system_prompt": gr.Textbox(settings.assistant.system_prompt, lines=3),
            "max_new_tokens": gr.Slider(1, highest.max_new_tokens, page.max_new_tokens, step=1),
            "temperature": gr.Slider(0, highest.temperature, page.temperature, step=0.05),
            "top_p": gr.Slider(0, 1, page.top_p, step=0.01),
            "top_k": gr.Slider(0, highest.top_k, page.top_k, step=1),
            "repetition_penalty": gr.Slider(1, highest.repetition_penalty, page.repetition_penalty, step=0.005),
            "seed": gr.Number(-1, precision=0, minimum=-1),
        }
        for name, control in self._controls.items():
            control.unrender()
            control.label = WORDS[name].en  # for the API's description; the page sets the visitor's language
        super().__init__(
            self._chat,
            title=" · ".join(dict.fromkeys(filter(None, (self._title.zh, self._title.en)))),
            chatbot=gr.Chatbot(
                elem_id="chat", height=None, show_label=False, buttons=["copy", "copy_all"], editable="user"
            ),
            textbox=gr.Textbox(
                submit_btn=True, stop_btn=True, autofocus=True, container=False, max_lines=8, elem_id="message"
            ),
            additional_inputs=[*self._controls.values()],
            analytics_enabled=False,
            fill_height=False,
        )

    # What is drawn

    def _render_header(self):
        with gr.Sidebar(open=False, elem_id="chats"):
            self._new = gr.Button(variant="primary", elem_id="new")
            self._kept = gr.Radio([], container=False, elem_id="kept")
        self._header = gr.HTML(elem_id="header")

    def _render_chatbot_area(self, *arguments):
        with gr.Column(elem_id="talk"):
            super()._render_chatbot_area(*arguments)
            with gr.Row(elem_id="actions"):
                self._continue = gr.Button(size="sm", elem_id="continue")  # page.js shows it under a cut answer
                self._exports = {kind: gr.Button(size="sm", elem_id=f"export-{kind}") for kind in ("markdown", "json")}

    def _render_footer(self):
        with gr.Accordion(open=False, elem_id="settings") as self._accordion:
            for control in self._controls.values():
                control.render()

    # What happens

    def _setup_events(self):
        now = dict(queue=False, show_progress="hidden", api_visibility="private")
        # The number of the answer in the making, 0 for none. The text box follows it: as an output of the answer itself
        # Gradio would make it anew for every piece, which takes longer than all else.
        writing = gr.State(0)
        followed = writing.change(
            lambda number: gr.update(**(BUSY if number else IDLE)), [writing], [self.textbox], **now
        )
        answer = dict(
            inputs=[self.chatbot, *self._controls.values()],
            outputs=[self.chatbot, writing],
            preprocess=False,  # the engine checks the controls, in the visitor's language
            concurrency_limit=None,  # the engine keeps the line, in which each visitor sees a place
            show_progress="hidden",
            api_visibility="private",
            trigger_mode="always_last",  # Gradio would drop a question whose answer is asked for while this still ends
        )

        def script(code: str, outputs=None, inputs=None) -> dict:
            """An event in the browser alone. Gradio 6.2 runs nothing after one: it has no followers."""
            return dict(fn=None, js=code, inputs=inputs, outputs=outputs, **now)

        # In the browser alone, so that it works with the connection lost.
        idle = script(f"() => [{json.dumps({'__type__': 'update', **IDLE})}]", [self.textbox])
        keep = script("namesake.keep", [self._kept], [self.chatbot])

        ask = dict(inputs=[self.chatbot], outputs=[self.chatbot], show_progress="hidden", api_visibility="private")
        asked = [
            self.textbox.submit(
                self._send,
                **{
                    **ask,
                    "inputs": [self.chatbot, self.textbox],
                    "outputs": [self.chatbot, self.textbox],
                    # By default Gradio drops an Enter that comes before the server has seen the one before.
                    "trigger_mode": "always_last",
                },
            ),
            self.chatbot.example_select(self._send_example, **ask),
            self.chatbot.retry(self._again, **ask),
            self.chatbot.edit(self._edited, **ask),
        ]
        answers = [event.success(self._answer, **answer) for event in asked]
        answers.append(self._continue.click(self._resume, **answer))
        self.textbox.stop(self._stop, **now)
        undone = self.chatbot.undo(self._undo, [self.chatbot], [self.chatbot, self.textbox], **now)
        # Before the answer in the making is left: at its end the list is drawn anew, with its chat as the chosen one.
        self._kept.input(**script("namesake.choose", None, [self._kept]))
        left = {
            "namesake.forget": self.chatbot.clear(self._leave, **now),
            "namesake.begin": self._new.click(self._leave, **now),
            "namesake.open": self._kept.input(self._leave, **now),
        }
        for event in (*asked, *answers, undone):
            event.success(**keep)
        for code, event in left.items():
            event.then(**script(code, [self.chatbot, self._kept]))
        followed.failure(**idle)
        for event in answers:  # a lost connection ends an event without its `then`
            for code in (idle, keep, script("namesake.reconnect")):
                event.failure(**code)

        self.fake_api_btn.click(
            self._chat,
            [self.textbox, self.chatbot_state, *self._controls.values()],
            [self.api_response, self.chatbot_state],
            api_name="chat",
            concurrency_limit=None,
            postprocess=False,
        )

        for kind, button in self._exports.items():
            button.click(**script(f"(messages) => namesake.save(messages, '{kind}')", None, [self.chatbot]))
        self._clock = gr.Timer(1, active=False)
        self._clock.tick(self._tell_status, None, [self._header, self._clock], **now)
        texts = [self.textbox, self._new, self._kept, self._continue, *self._exports.values(), self._accordion]
        greeted = [self._header, self.chatbot, self._clock, *texts, *self._controls.values()]
        greeting = self.load(self._greet, None, greeted, **now)
        greeting.then(**script("namesake.restore", [self.chatbot, self._kept]))
        greeting.then(**script("namesake.draft", [self.textbox]))

    def _send(self, history: list[dict], message: str, request: gr.Request):
        if not (message or "").strip() or self._busy(request):
            return gr.skip(), gr.skip()
        return [*history, _user(message)], ""

    def _send_example(self, history: list[dict], event: gr.SelectData, request: gr.Request):
        return gr.skip() if self._busy(request) else [*history, _user(event.value["text"])]

    def _again(self, history: list[dict], request: gr.Request):
        return gr.skip() if self._busy(request) else history[: _last_question(history) + 1]

    def _edited(self, history: list[dict], event: gr.EditData, request: gr.Request):
        if self._busy(request):
            return gr.skip()
        index = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        text = written(event.value)
        if not text.strip():  # the page shows again what was there
            return [*history[:index], _user(written(event.previous_value)), *history[index + 1 :]]
        return [*history[:index], _user(text)]

    async def _undo(self, history: list[dict], request: gr.Request):
        await self._leave(request)
        index = _last_question(history)
        question = conversation(history[index : index + 1])
        return history[: max(index, 0)], question[0]["content"] if question else ""

    def _busy(self, request: gr.Request) -> bool:
        """Whether this browser tab has an answer in the making already; then says so."""
        if request.session_hash in self._stops:
            gr.Warning(STILL.pick(language(request)), title="", duration=5)
        return request.session_hash in self._stops

    def _stop(self, request: gr.Request):
        if stop := self._stops.get(request.session_hash):
            stop.set()

    async def _leave(self, request: gr.Request):
        """Stops the answer in the making and waits for its end, so that it is not written over what comes next."""
        if stop := self._stops.get(request.session_hash):
            stop.set()
            while self._stops.get(request.session_hash) is stop:
                await anyio.sleep(0.05)
            await anyio.sleep(0.2)  # its last words are on their way

    async def _answer(self, request: gr.Request, history: list[dict], *controls):
        """Answers the last question of the transcript, which it yields with the answer so far."""
        messages = conversation(history)
        if messages and messages[-1]["role"] == "user":
            async for shown in self._transcripts(request, history, "", messages, controls):
                yield shown
        else:
            yield NOTHING

    async def _resume(self, request: gr.Request, history: list[dict], *controls):
        """Goes on with the last answer of the transcript."""
        messages = conversation(history)
        if messages and messages[-1]["role"] == "assistant":
            async for shown in self._transcripts(request, history[:-1], messages[-1]["content"], messages, controls):
                yield shown
        else:
            yield NOTHING

    async def _transcripts(self, request, before: list[dict], begun: str, messages: list[dict], controls):
        """The transcript, `before` and then the answer `begun` as it grows, and the answer's number while it does."""
        if request.session_hash in self._stops:
            yield NOTHING
            return
        stop = self._stops[request.session_hash] = threading.Event()
        try:
            yield gr.skip(), next(self._numbers)
            async with aclosing(self._lines(messages, controls, stop, language(request), resume=bool(begun))) as lines:
                async for text, note, cut in lines:
                    yield [*before, _assistant(begun + text, note, cut)], gr.skip()
        finally:
            del self._stops[request.session_hash]
        yield gr.skip(), 0  # from here on the next message is welcome

    async def _lines(self, messages, controls, stop, tongue, *, resume) -> AsyncIterator[tuple[str, str, bool]]:
        """An answer as the page shows it: text, the note under it, whether it was cut. Errors become notes."""
        text = ""
        try:
            async with aclosing(self._states(messages, controls, stop, resume=resume)) as states:
                async for state in states:
                    if isinstance(state, Text):
                        yield text, state.pick(tongue), False
                        continue
                    text = state.text
                    yield text, describe(state, tongue), state.state in ("length", "stopped")
        except NamesakeError as error:
            yield text, f"⚠ {error.text.pick(tongue)}", bool(text)
        except Exception:
            log.exception("An answer failed")
            yield text, f"⚠ {BROKEN.pick(tongue)}", bool(text)

    async def _chat(
        self,
        message: str,
        history: list[dict] | None = None,
        system_prompt: str = "",
        max_new_tokens: int = 512,
        temperature: float = 0.7,
        top_p: float = 0.8,
        top_k: int = 50,
        repetition_penalty: float = 1.005,
        seed: int = -1,
        request: gr.Request = None,
    ):
        """Answer a message. Streams the text so far; the last value is the whole answer. The session is remembered."""
        if not isinstance(message, str) or not message.strip():
            raise gr.Error(EMPTY.pick(language(request)), print_exception=False)
        history = [*(history or []), {"role": "user", "content": whole(message)}]
        controls = (system_prompt, max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
        try:
            async with aclosing(self._states(history, controls, threading.Event())) as states:
                async for state in states:
                    if isinstance(state, Text):
                        continue
                    yield state.text, [*history, {"role": "assistant", "content": state.text}]
        except NamesakeError as error:
            raise gr.Error(error.text.pick(language(request)), print_exception=False) from error
        except Exception as error:
            log.exception("An answer failed")
            raise gr.Error(BROKEN.pick(language(request)), print_exception=False) from error

    async def _states(self, messages, controls, stop: threading.Event, *, resume=False):
        """The engine's states of an answer, and before them, while the model loads, its status as Text."""
        try:
            while (status := self._loader.status).state == "loading" and not stop.is_set():
                yield status.reason
                await anyio.sleep(0.5)
            if status.state == "failed":
                raise NamesakeError(status.reason.en, zh=status.reason.zh)
            if stop.is_set():
                return
            from space.engine import Sampling

            system_prompt, *values = controls
            sampling = Sampling(*values).check(self._settings.page.limits)
            asked = [{"role": "system", "content": system_prompt or ""}, *messages]
            states = self._stream(asked, sampling, stop, resume=resume)
            while state := await anyio.to_thread.run_sync(next, states, None, limiter=self._threads):
                yield state
        finally:
            stop.set()  # `states` is not closed here: a thread may still be in it, and is the last to hold it

    def _greet(self, request: gr.Request) -> dict:
        """All that the page says, in the visitor's language."""
        tongue, page = language(request), self._settings.page
        say = {key: text.pick(tongue) for key, text in WORDS.items()}
        examples = page.examples_zh if tongue.lower().startswith("zh") else page.examples_en
        greeting = html.escape(say["greeting"].format(name=self._settings.assistant.name.pick(tongue)))
        description = html.escape(page.description.pick(tongue))
        controls = {
            control: gr.update(label=say[name], info=say.get(f"{name}_info"))
            for name, control in self._controls.items()
        }
        return {
            self._header: self._headline(tongue),
            self._clock: self._ticking(),
            self.chatbot: gr.update(
                label=say["chat"],
                placeholder=f"<h2>{greeting}</h2><p>{description}</p>",
                examples=[{"text": text} for text in examples],
            ),
            self.textbox: gr.update(label=say["message"], placeholder=say["message"]),
            self._new: gr.update(value=say["new_chat"]),
            self._kept: gr.update(label=say["chats"]),
            self._continue: gr.update(value=say["continue"]),
            **{button: gr.update(value=say[f"export_{kind}"]) for kind, button in self._exports.items()},
            self._accordion: gr.update(label=say["settings"]),
            **controls,
        }

    def _tell_status(self, request: gr.Request):
        """How far the model is; the clock stops once that no longer changes."""
        return self._headline(language(request)), self._ticking()

    def _ticking(self):
        return gr.Timer(active=self._loader.status.state in ("loading", "warming"))

    def _headline(self, tongue: str) -> str:
        """The title, which model answers, and how far it is."""
        status = self._loader.status
        model, reason = html.escape(status.model), html.escape(status.reason.pick(tongue))
        line = f"<span class='{status.state}' title='{reason}'>{model}</span>"
        if status.state != "ready":
            line += f" <span>{reason}</span>"
        if status.share is not None:
            line += f" <progress value='{status.share:.3f}' aria-label='{reason}'></progress>"
        return f"<h1>{html.escape(self._title.pick(tongue))}</h1><p role='status'>{line}</p>"


def _user(text: str) -> dict:
    return {"role": "user", "content": shown(text)}


def _assistant(text: str, note: str, cut: bool) -> dict:
    """An answer with its note: two parts of one message, of which only the first is ever sent back to the model."""
    return {
        "role": "assistant",
        "content": [text, f"<small class='note{' cut' * cut}'>{html.escape(note)}</small>"],
    }


def _last_question(history: list[dict]) -> int:
    return max((i for i, message in enumerate(history) if message["role"] == "user"), default=-1)


def _on_zero_gpu(stream):
    """The stream as it is, or, on a Hugging Face ZeroGPU Space, run where the GPU is."""
    if not os.environ.get("SPACES_ZERO_GPU"):
        return stream
    import spaces

    @spaces.GPU(duration=120)
    def on_gpu(messages, sampling, *, resume=False):
        yield from stream(messages, sampling, resume=resume)

    # The GPU's process is another one: a stop cannot reach it, and closing the iterator ends it.
    return lambda messages, sampling, stop, *, resume=False: on_gpu(messages, sampling, resume=resume)


def free_address(host: str, port: int) -> None:
    """Raises NamesakeError when the page could not listen there; port 0 is any."""
    if not 0 <= port <= 65535:
        raise NamesakeError(f"--port is {port}", "Choose one from 0 to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        fix = "Choose another with --port." if getattr(error, "errno", None) == errno.EADDRINUSE else "Check --host."
        raise NamesakeError(f"Cannot listen on {host}:{port}: {reason}", fix) from None


def launch(chat: Chat, loader: Loader, host: str, port: int, share: bool = False) -> None:
    """Open the page and return. `GET /healthz` answers 200 once the model answers, 503 before and on failure."""

    def healthz() -> JSONResponse:
        status = loader.status
        body = {"status": status.state, "model": status.model, "reason": status.reason.en}
        return JSONResponse(body, 200 if status.state in ("warming", "ready") else 503)

    if not importlib.util.find_spec("matplotlib"):
        # Gradio tries to import it twice for each message. Known to be missing, it is not looked for in all folders.
        sys.modules["matplotlib"] = None
    assets = Path(__file__).parent
    options = dict(run_history=False) if "run_history" in signature(chat.launch).parameters else {}
    chat.queue(default_concurrency_limit=None).launch(
        app_kwargs={"routes": [APIRoute("/healthz", healthz)]},
        server_name=host,
        server_port=port or None,
        share=share,
        prevent_thread_lock=True,
        show_error=False,
        ssr_mode=False,
        footer_links=["api", "settings"],
        theme=THEME,
        css=(assets / "page.css").read_text(encoding="utf-8"),
        head=f"{POLICY}<script>{(assets / 'page.js').read_text(encoding='utf-8')}</script>",
        max_file_size=1,  # byte: nothing is uploaded here
        **options,
    )


def serve(settings: Settings, model: Source, adapter: str, load_in: str, host: str, port: int, share: bool) -> None:
    """Open the page at once and load the model meanwhile; returns when the server is stopped.

    `port` 0: 7860, or the next free one. Raises NamesakeError where the page cannot listen.
    """
    free_address(host, port)
    loader = Loader(model, adapter, load_in, settings.page.concurrency, settings.page.queue, settings.serve)
    chat = Chat(settings, loader)
    launch(chat, loader, host, port, share)
    loader.start()
    chat.block_thread()
