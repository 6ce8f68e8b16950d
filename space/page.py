"""The Gradio page: what a visitor sees and touches, in the visitor's language."""

from __future__ import annotations

import errno
import html
import json
import logging
import os
import socket
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

log = logging.getLogger("namesake")

WORDS = {
    "message": Text("输入消息，回车发送", "Write a message, Enter sends it"),
    "send": Text("发送", "Send"),
    "stop": Text("停止", "Stop"),
    "chats": Text("历史对话", "Chats"),
    "continue": Text("继续", "Continue"),
    "export_markdown": Text("导出 Markdown", "Export Markdown"),
    "export_json": Text("导出 JSON", "Export JSON"),
    "settings": Text("系统提示词与采样设置", "System prompt and sampling"),
    "system_prompt": Text("系统提示词", "System prompt"),
    "system_prompt_info": Text("留空则不用系统提示词", "Leave it empty for none"),
    "max_new_tokens": Text("最长回答（token）", "Longest answer (tokens)"),
    "temperature": Text("温度", "Temperature"),
    "temperature_info": Text("0：每次回答相同", "0: the same answer each time"),
    "top_p": Text("Top-p", "Top-p"),
    "top_k": Text("Top-k（0：不限）", "Top-k (0: off)"),
    "repetition_penalty": Text("重复惩罚", "Repetition penalty"),
    "seed": Text("随机种子（-1：每次不同）", "Seed (-1: new each time)"),
    "chat_interface.new_chat": Text("新对话", "New chat"),
    "chat_interface.conversation": Text("对话", "Conversation"),
    "chat_interface.chatbot": Text("对话", "Chat"),
    "chat_interface.message_placeholder": Text("输入消息……", "Write a message …"),
}

NOTES = {
    "waiting": Text("排队中，前面还有 {ahead} 位", "In line, {ahead} ahead of you"),
    "reading": Text("正在阅读 {tokens_in} 个 token……", "Reading {tokens_in} tokens …"),
    "writing": Text("{tokens_out} token · {speed:.1f} token/秒", "{tokens_out} tokens · {speed:.1f} tokens/s"),
    "finished": Text("回答完毕", "finished"),
    "length": Text("达到长度上限，可点「继续」", "cut at the length limit, “Continue” goes on"),
    "stopped": Text("已停止", "stopped"),
    "final": Text(
        "{tokens_in}+{tokens_out} token · 首字 {first_token:.1f} 秒 · {speed:.1f} token/秒 · "
        "上下文 {share:.0%} · {why}",
        "{tokens_in}+{tokens_out} tokens · first after {first_token:.1f} s · {speed:.1f} tokens/s · "
        "context {share:.0%} · {why}",
    ),
    "dropped": Text(" · 太长，最早的 {dropped} 轮未计入", " · too long: the oldest {dropped} turns were left out"),
}

_ZH, _EN = ({key: getattr(text, code) for key, text in WORDS.items()} for code in ("zh", "en"))
I18N = gr.I18n(**{"en": _EN, "zh": _ZH, "zh-CN": _ZH, "zh-TW": _ZH, "zh-HK": _ZH})  # looked up in the browser

THEME = gr.themes.Soft(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="slate",
    # No web fonts: the page shows at once where their hosts cannot be reached.
    font=["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
)

# The text box while an answer is made, and after it. In the browser alone, so that they work with the connection lost.
BUSY = "() => [{__type__: 'update', submit_btn: false, stop_btn: true}]"
IDLE = "() => [{__type__: 'update', submit_btn: true, stop_btn: false}]"

KEPT_CHATS = 50

GREETING = Text("### 你好，我是{name}", "### Hello, I am {name}")
BROKEN = Text("出错了，请重试。", "Something went wrong, please try again.")

JOINER = "\u2060"  # zero width, set behind each "<" that a visitor writes: the browser shows it and makes no HTML of it


def shown(text: str) -> str:
    """A visitor's text so that the page shows it as it was written."""
    return text.replace("<", "<" + JOINER)


def written(text: str) -> str:
    """The text that `shown` was made from."""
    return text.replace("<" + JOINER, "<")


def conversation(history: list[dict]) -> list[dict]:
    """The page's or the API's history as plain messages: without the notes under the answers."""
    messages = []
    for message in history:
        content = message["content"]
        if not isinstance(content, str):
            parts = [part if isinstance(part, str) else part.get("text") or "" for part in content or ()]
            content = parts[0] if parts else ""
        if message["role"] == "user":
            content = written(content)
        messages.append({"role": message["role"], "content": content})
    return messages


def language(request: gr.Request | None) -> str:
    """The visitor's language, as the browser sends it: the first one in Accept-Language."""
    return (request.headers.get("accept-language", "") if request else "") or "en"


def describe(answer, tongue: str) -> str:
    """The line under an answer: how far it is, or its figures and why it ended."""
    values = {**vars(answer), "share": (answer.tokens_in + answer.tokens_out) / max(answer.context, 1)}
    if answer.state in ("waiting", "reading", "writing"):
        return NOTES[answer.state].pick(tongue).format(**values)
    values["why"] = NOTES[answer.state].pick(tongue)
    line = NOTES["final"].pick(tongue).format(**values)
    return line + (NOTES["dropped"].pick(tongue).format(**values) if answer.dropped else "")


class Chat(gr.ChatInterface):
    """Gradio's chat, with events of its own: one way of answering behind send, examples, retry, edit and continue.

    The transcript in the browser is the only history. A stop ends an answer as its natural end does, so the page never
    waits for an event that was cancelled; what goes wrong becomes a line in the chat.
    """

    def __init__(self, settings: Settings, loader: Loader):
        self._settings, self._loader = settings, loader
        self._stops: dict[str, threading.Event] = {}  # the answer being made for a browser tab, by its session
        page, word = settings.page, I18N
        # Each answer in the making, or in line, holds a thread for its next state; some are left for those turned away.
        self._threads = anyio.CapacityLimiter(page.concurrency + page.queue + 8)
        self._stream = _on_zero_gpu(lambda *arguments, **options: loader.engine.stream(*arguments, **options))
        self._title = page.title or settings.assistant.name
        super().__init__(
            self._chat,
            title=" · ".join(dict.fromkeys(filter(None, (self._title.zh, self._title.en)))),
            chatbot=gr.Chatbot(
                elem_id="chat",
                height="calc(100dvh - 190px)",
                min_height=120,
                show_label=False,
                label=word("chat_interface.chatbot"),
                buttons=["copy", "copy_all"],
                editable="user",
                layout="bubble",
            ),
            textbox=gr.Textbox(
                placeholder=word("message"),
                label=word("message"),
                submit_btn=True,
                stop_btn=True,
                autofocus=True,
                container=False,
                max_lines=8,
                elem_id="message",
            ),
            additional_inputs=[
                gr.Textbox(
                    settings.assistant.system_prompt,
                    label=word("system_prompt"),
                    info=word("system_prompt_info"),
                    lines=3,
                ),
                gr.Slider(1, page.limits.max_new_tokens, page.max_new_tokens, step=1, label=word("max_new_tokens")),
                gr.Slider(0, page.limits.temperature, page.temperature, step=0.05, label=word("temperature")),
                gr.Slider(0, 1, page.top_p, step=0.01, label=word("top_p")),
                gr.Slider(0, page.limits.top_k, page.top_k, step=1, label=word("top_k")),
                gr.Slider(
                    1,
                    page.limits.repetition_penalty,
                    page.repetition_penalty,
                    step=0.005,
                    label=word("repetition_penalty"),
                ),
                gr.Number(-1, label=word("seed"), precision=0, minimum=-1),
            ],
            additional_inputs_accordion=gr.Accordion(word("settings"), open=False, elem_id="settings"),
            save_history=True,
            analytics_enabled=False,
            fill_height=False,
        )

    # What is drawn

    def _render_header(self):
        # Set before anything is bound to it: saved chats outlive the server, whose own key is new in each process.
        self.saved_conversations.storage_key = "namesake-chats"
        self.saved_conversations.secret = "namesake"
        with gr.Row(elem_id="header"):
            self._headline = gr.HTML(elem_id="headline")
            self._status = gr.HTML(elem_id="status")

    def _render_history_area(self):
        with gr.Sidebar(label=I18N("chats"), open=False, elem_id="chats"):
            super()._render_history_area()

    def _render_footer(self):
        with gr.Row(elem_id="actions"):
            self._continue = gr.Button(I18N("continue"), size="sm", visible=False, elem_id="continue")
            self._exports = {
                kind: gr.Button(I18N(f"export_{kind}"), size="sm", elem_id=f"export-{kind}")
                for kind in ("markdown", "json")
            }
        super()._render_footer()

    # What happens

    def _setup_events(self):
        now = dict(queue=False, show_progress="hidden", api_visibility="private")
        answer = dict(
            outputs=[self.chatbot, self._continue],
            concurrency_limit=None,  # the engine keeps the line, in which each visitor sees a place
            show_progress="hidden",
            api_visibility="private",
        )
        save = dict(
            fn=self._save_conversation,
            inputs=[self.conversation_id, self.chatbot, self.saved_conversations],
            outputs=[self.conversation_id, self.saved_conversations],
            **now,
        )
        busy = dict(fn=None, js=BUSY, outputs=[self.textbox], **now)
        idle = dict(fn=None, js=IDLE, outputs=[self.textbox], **now)

        asked = [
            self.textbox.submit(self._send, [self.textbox, self.chatbot], [self.textbox, self.chatbot], **now),
            self.chatbot.example_select(self._send_example, None, [self.chatbot], **now),
            self.chatbot.retry(self._again, [self.chatbot], [self.chatbot], **now),
            self.chatbot.edit(self._edited, [self.chatbot], [self.chatbot], **now),
        ]
        answers = [
            event.then(**busy).then(**save).then(self._answer, [self.chatbot, *self.additional_inputs], **answer)
            for event in asked
        ]
        resumed = self._continue.click(**busy)
        answers.append(resumed.then(self._resume, [self.chatbot, *self.additional_inputs], **answer))
        for event in answers:
            event.then(**idle).then(**save)
            event.failure(**idle)
        self.textbox.stop(self._stop, **now)
        self.chatbot.undo(self._stop, **now).then(
            self._undo, [self.chatbot], [self.chatbot, self.textbox, self._continue], **now
        ).then(**idle).then(**save)
        self.chatbot.clear(self._stop, **now).then(
            self._delete_conversation,
            [self.conversation_id, self.saved_conversations],
            [self.conversation_id, self.saved_conversations],
            **now,
        ).then(lambda: gr.Button(visible=False), None, [self._continue], **now).then(**idle)

        self.fake_api_btn.click(
            self._chat,
            [self.textbox, self.chatbot_state, *self.additional_inputs],
            [self.api_response, self.chatbot_state],
            api_name="chat",
            concurrency_limit=None,
            postprocess=False,
        )

        self.new_chat_button.click(self._stop, **now).then(
            lambda: (None, [], gr.Button(visible=False)),
            None,
            [self.conversation_id, self.chatbot, self._continue],
            **now,
        ).then(**idle)
        self.chat_history_dataset.click(self._stop, **now).then(
            self._open,
            [self.chat_history_dataset, self.saved_conversations],
            [self.conversation_id, self.chatbot, self._continue],
            **now,
        ).then(**idle)
        gr.on(
            [self.load, self.saved_conversations.change],
            self._load_chat_history,
            [self.saved_conversations],
            [self.chat_history_dataset],
            **now,
        )

        for kind, button in self._exports.items():
            button.click(None, [self.chatbot], None, js=f"(messages) => namesakeSave(messages, '{kind}')", **now)
        self.load(self._greet, None, [self._headline, self.chatbot], **now)
        clock = gr.Timer(1)
        gr.on([self.load, clock.tick], self._tell_status, None, [self._status, clock], **now)

    def _send(self, message: str, history: list[dict], request: gr.Request):
        if not message.strip() or request.session_hash in self._stops:
            return gr.skip(), gr.skip()
        return "", [*history, _user(message)]

    def _send_example(self, event: gr.SelectData):
        return [_user(event.value["text"])]

    def _again(self, history: list[dict]):
        return history[: _last_question(history) + 1]

    def _edited(self, history: list[dict], event: gr.EditData):
        index = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        return [*history[:index], _user(written(event.value))]

    def _undo(self, history: list[dict]):
        index = _last_question(history)
        question = conversation(history[index : index + 1])
        return history[: max(index, 0)], question[0]["content"] if question else "", gr.Button(visible=False)

    def _open(self, index: int, saved: list[list[dict]]):
        return index, saved[index], gr.Button(visible=_was_cut(saved[index]))

    def _save_conversation(self, index, conversation, saved_conversations):
        """Puts the chat first among at most KEPT_CHATS: a browser keeps 5 MB for a page."""
        if not conversation:
            return index, saved_conversations
        index, saved = super()._save_conversation(index, conversation, saved_conversations)
        return index, saved[:KEPT_CHATS]

    def _stop(self, request: gr.Request):
        if stop := self._stops.get(request.session_hash):
            stop.set()

    async def _answer(self, request: gr.Request, history: list[dict], *controls):
        """Answers the last question of the transcript, which it yields with the answer so far."""
        if not history or history[-1]["role"] != "user" or request.session_hash in self._stops:
            yield gr.skip(), gr.skip()
            return
        async with aclosing(self._lines(conversation(history), controls, request)) as lines:
            async for text, note, cut in lines:
                yield [*history, _assistant(text, note)], gr.Button(visible=cut)

    async def _resume(self, request: gr.Request, history: list[dict], *controls):
        """Goes on with the last answer of the transcript."""
        if not history or history[-1]["role"] != "assistant" or request.session_hash in self._stops:
            yield gr.skip(), gr.skip()
            return
        messages = conversation(history)
        begun = messages[-1]["content"]
        resume = bool(begun)
        async with aclosing(self._lines(messages, controls, request, resume=resume)) as lines:
            async for text, note, cut in lines:
                yield [*history[:-1], _assistant(begun + text, note)], gr.Button(visible=cut)

    async def _lines(self, messages, controls, request, *, resume=False) -> AsyncIterator[tuple[str, str, bool]]:
        """An answer as the page shows it: text, the note under it, whether it was cut. Errors become notes."""
        text = ""
        tongue = language(request)
        try:
            async with aclosing(self._states(messages, controls, request, resume=resume)) as states:
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
        history = [*(history or []), {"role": "user", "content": message}]
        controls = (system_prompt, max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed)
        try:
            async with aclosing(self._states(history, controls, request)) as states:
                async for state in states:
                    if isinstance(state, Text):
                        continue
                    yield state.text, [*history, {"role": "assistant", "content": state.text}]
        except NamesakeError as error:
            raise gr.Error(error.text.pick(language(request)), print_exception=False) from error

    async def _states(self, messages, controls, request, *, resume=False):
        """The engine's states of an answer, and before them, while the model loads, its status as Text."""
        session = request.session_hash if request else ""
        stop = threading.Event()
        self._stops[session] = stop
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
            try:
                while state := await anyio.to_thread.run_sync(next, states, None, limiter=self._threads):
                    yield state
            finally:
                stop.set()
                states.close()
        finally:
            stop.set()
            if self._stops.get(session) is stop:
                del self._stops[session]

    def _greet(self, request: gr.Request):
        """The title, the empty chat's greeting and the examples, in the visitor's language."""
        tongue, page = language(request), self._settings.page
        examples = page.examples_zh if tongue.lower().startswith("zh") else page.examples_en
        headline = f"<h1>{html.escape(self._title.pick(tongue))}</h1>"
        if page.description:
            headline += f"<p>{html.escape(page.description.pick(tongue))}</p>"
        greeting = GREETING.pick(tongue).format(name=html.escape(self._settings.assistant.name.pick(tongue)))
        return headline, gr.Chatbot(placeholder=greeting, examples=[{"text": text} for text in examples])

    def _tell_status(self, request: gr.Request):
        """Which model answers and how far it is; the clock stops once that no longer changes."""
        status = self._loader.status
        words = "" if status.state == "ready" else html.escape(status.reason.pick(language(request)))
        bar = "" if status.share is None else f"<progress value='{status.share:.3f}'></progress>"
        model = html.escape(status.model)
        line = f"<span class='{status.state}' title='{html.escape(status.reason.en)}'>{model}</span> {words} {bar}"
        return line, gr.Timer(active=status.state == "loading")


def _user(text: str) -> dict:
    return {"role": "user", "content": shown(text)}


def _assistant(text: str, note: str) -> dict:
    """An answer with its note: two parts of one message, of which only the first is ever sent back to the model."""
    return {"role": "assistant", "content": [text, f"<small class='note'>{html.escape(note)}</small>"]}


def _last_question(history: list[dict]) -> int:
    return max((i for i, message in enumerate(history) if message["role"] == "user"), default=-1)


def _was_cut(history: list[dict]) -> bool:
    """Whether the last answer of a saved chat can be continued: its note says so in one of the languages."""
    note = json.dumps(history[-1]["content"], ensure_ascii=False) if history else ""
    return any(words in note for state in ("length", "stopped") for words in (NOTES[state].zh, NOTES[state].en))


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
    """Raises NamesakeError when the page could not listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        fix = "Choose another with --port." if getattr(error, "errno", None) == errno.EADDRINUSE else "Check --host."
        raise NamesakeError(f"Cannot listen on {host}:{port}: {reason}", fix) from None


def serve(settings: Settings, model: Source, adapter: str, load_in: str, host: str, port: int, share: bool) -> None:
    """Start the page at once and load the model meanwhile; returns when the server is stopped.

    `port` 0: 7860, or the next free one. `GET /healthz` answers 200 once the model is ready, 503 before and on failure.
    """
    if port:
        free_address(host, port)
    loader = Loader(model, adapter, load_in, settings.page.concurrency, settings.page.queue)
    chat = Chat(settings, loader)
    chat.queue(default_concurrency_limit=None)
    assets = Path(__file__).parent
    options = dict(run_history=False) if "run_history" in signature(chat.launch).parameters else {}

    def healthz() -> JSONResponse:
        status = loader.status
        body = {"status": status.state, "model": status.model, "reason": status.reason.en}
        return JSONResponse(body, 200 if status.state == "ready" else 503)

    chat.launch(
        app_kwargs={"routes": [APIRoute("/healthz", healthz)]},
        server_name=host,
        server_port=port or None,
        share=share,
        prevent_thread_lock=True,
        show_error=False,
        ssr_mode=False,
        footer_links=["api", "settings"],
        i18n=I18N,
        theme=THEME,
        css=(assets / "page.css").read_text(encoding="utf-8"),
        head=f"<script>{(assets / 'page.js').read_text(encoding='utf-8')}</script>",
        **options,
    )

    loader.start()
    chat.block_thread()
