"""A server elsewhere → answers: vLLM, LMDeploy, SGLang, `transformers serve`, through OpenAI's protocol.

Line, pace, limits, trimming and texts are the page's own; the server makes the tokens. It puts the conversation into
the model's chat template itself, so names of control tokens in what anybody wrote are broken up before they go there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from urllib.parse import urlsplit

from space.engine import BaseEngine, Run, Sampling
from space.prompt import Message
from space.settings import NamesakeError, Serve
from space.weights import HUBS, Source, download, embedded_folder

log = logging.getLogger("namesake")

CLIENT = "openai>=2,<4"
BREAK = "\u2060"  # zero width: between the first character of a control token's name and the rest
NO_KEY = "none"  # the client wants a key even where the server wants none
PATIENCE = 60.0  # seconds that the server may take for the next piece of an answer

CONTINUE = {
    "zh": "请接着上一条回答，从中断处继续写，不要重复。",
    "en": "Go on with your last answer exactly where it stopped. Repeat nothing.",
}


class RemoteEngine(BaseEngine):
    """Answers conversations with a model behind `base_url`. `api_key` is sent there and written nowhere."""

    def __init__(
        self, tokenizer, context: int, base_url: str, model: str, api_key: str, concurrency: int = 1, queue: int = 64
    ):
        super().__init__(tokenizer, context, [], concurrency, queue)
        try:
            import openai
        except ImportError:
            raise NamesakeError(
                'backend = "openai" needs the openai client, which is not installed',
                f"Run: pip install '{CLIENT}'",
                zh=f"backend = \"openai\" 需要 openai 客户端，请运行 pip install '{CLIENT}'。",
            ) from None
        self._openai, self.base_url, self._model = openai, base_url, model
        names = sorted(self.prompt.control_names, key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._dialect = 0  # which of `_dialects` the server understands
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="openai", daemon=True).start()
        self._client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key or NO_KEY, timeout=PATIENCE, max_retries=0)

    def check(self) -> None:
        """Takes the server's model where the settings name none. Raises NamesakeError where the server can't be had."""
        try:
            future = asyncio.run_coroutine_threadsafe(self._models(), self._loop)
            offered = future.result()
        except self._openai.OpenAIError as error:
            raise self._explained(error) from None
        if not self._model and len(offered) != 1:
            names = ", ".join(offered[:10]) or "none"
            raise NamesakeError(
                f"{self.base_url} offers several models: {names}",
                "Choose one with [serve] model.",
                zh=f"{self.base_url} 有多个模型：{names}。请用 [serve] model 选一个。",
            )
        self._model = self._model or offered[0]

    @property
    def model(self) -> str:
        """The model's name on the server."""
        return self._model

    def generate(self, run: Run, ids: list[int], sampling: Sampling) -> list[int]:
        """Asks the server, and hangs up on it when the visitor stops, which ends the work there too.

        The ids are the server's business: the list holds an end token if the answer came to its end, and else nothing.
        """
        future = asyncio.run_coroutine_threadsafe(self._ask(run, self.budget(sampling, len(ids)), sampling), self._loop)
        while True:
            try:
                finished = future.result(0.05)
                return self.end_ids[:1] if finished else []
            except CancelledError:
                return []
            except TimeoutError:
                if future.done():  # the answer's own error
                    raise
                if run.stop.is_set():
                    future.cancel()
            except self._openai.OpenAIError as error:
                raise self._explained(error) from None

    async def _models(self) -> list[str]:
        return [model.id async for model in await self._client.models.list()]

    async def _ask(self, run: Run, budget: int, sampling: Sampling) -> bool:
        """Streams one answer into `run`; says whether it came to its end."""
        while True:
            try:
                stream = await self._client.chat.completions.create(**self._request(run.messages, budget, sampling))
                break
            except (self._openai.BadRequestError, self._openai.UnprocessableEntityError) as error:
                strange = re.search(r"unexpected|unknown|extra|not permitted|unrecognized", f"{error}", re.I)
                if self._dialect == len(_DIALECTS) - 1 or (error.status_code == 400 and not strange):
                    raise
                self._dialect += 1
                log.info("%s does not take all sampling values as they are; trying another way", self.base_url)
        ended, usage = "", None
        async with stream:
            async for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    if choice.delta.content:
                        run.count(-1)
                        run.streamer.on_finalized_text(choice.delta.content)
                    ended = choice.finish_reason or ended
        if usage and run.tokens:
            run.tokens = usage.completion_tokens  # a piece may hold several tokens
        return ended == "stop"

    def _request(self, messages: list[Message], budget: int, sampling: Sampling) -> dict:
        resume, dialect = messages[-1]["role"] == "assistant", _DIALECTS[self._dialect]
        if resume and dialect is not _extra_fields:  # such a server can't write on in a message
            language = "zh" if re.search(r"[\u3400-\u9fff]", messages[-1]["content"]) else "en"
            messages = [*messages, {"role": "user", "content": CONTINUE[language]}]
        return dict(
            model=self._model,
            messages=[{**message, "content": self._text(message["content"])} for message in messages],
            stream=True,
            max_tokens=budget,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=None if sampling.seed is None else sampling.seed % 2**31,
            **dialect(sampling, budget, resume, self.end_ids),
        )

    def _text(self, text: str) -> str:
        """A content in which no control token's name is left whole."""
        return self._marks.sub(lambda mark: mark[0][0] + BREAK + mark[0][1:], text)

    def _space_between(self, last: int, first: int) -> str:
        return ""  # the pieces are text already

    def _explained(self, error) -> NamesakeError:
        """The server's failure in words for a visitor. What the server said goes to the log, without the key."""
        log.error("%s: %s", self.base_url, _without_key(f"{type(error).__name__}: {error}", self._client.api_key))
        openai = self._openai
        if isinstance(error, openai.APITimeoutError):
            return NamesakeError("The model's server is too slow", "Try again.", zh="模型服务响应超时，请重试。")
        if isinstance(error, openai.APIConnectionError):
            return NamesakeError(
                "The model's server cannot be reached",
                "Try again in a minute.",
                zh="连接不上模型服务，请一分钟后再试。",
            )
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            return NamesakeError(
                "The model's server does not accept this page's key",
                "The page's owner sets it in the environment variable that [serve] api_key_env names.",
                zh="模型服务不接受本页面的密钥，请页面的维护者检查 [serve] api_key_env 所指的环境变量。",
            )
        if isinstance(error, openai.RateLimitError):
            return NamesakeError(
                "The model's server has too many visitors",
                "Try again in a minute.",
                zh="模型服务繁忙，请一分钟后再试。",
            )
        if isinstance(error, openai.BadRequestError) and re.search(r"context|too long|maximum.*length", str(error)):
            return NamesakeError(
                "The conversation is too long for the model's server",
                "Clear the chat, or set [serve] context to the server's own.",
                zh="对话超出了模型服务的上下文长度，请清空对话，或把 [serve] context 设成服务端的数值。",
            )
        name = type(error).__name__
        return NamesakeError(f"The model failed: {name}", "Try again.", zh=f"模型出错（{name}），请重试。")


def _extra_fields(sampling: Sampling, budget: int, resume: bool, end_ids: list[int]) -> dict:
    """vLLM, LMDeploy and SGLang take their own fields beside OpenAI's."""
    extra = {"top_k": sampling.top_k or -1, "repetition_penalty": sampling.repetition_penalty}
    if resume:
        extra |= {"continue_final_message": True, "add_generation_prompt": False}
    return {"extra_body": extra, "stream_options": {"include_usage": True}}


def _generation_config(sampling: Sampling, budget: int, resume: bool, end_ids: list[int]) -> dict:
    """`transformers serve` takes a whole generation_config; what that leaves open is transformers' default."""
    config = dict(
        max_new_tokens=budget,
        do_sample=sampling.temperature > 0,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=end_ids,
        pad_token_id=end_ids[0],
    )
    if sampling.temperature > 0:
        config |= dict(top_k=sampling.top_k, top_p=sampling.top_p, temperature=sampling.temperature)
    return {"extra_body": {"generation_config": json.dumps(config)}}


def _openai_only(sampling: Sampling, budget: int, resume: bool, end_ids: list[int]) -> dict:
    """What every server takes: no top-k, no repetition penalty."""
    return {}


_DIALECTS = (_extra_fields, _generation_config, _openai_only)


def _without_key(text: str, key: str) -> str:
    return text.replace(key, "…") if key and key != NO_KEY else text


def start(serve: Serve, source: Source, concurrency: int = 1, queue: int = 64) -> tuple[RemoteEngine, str, str]:
    """An engine on the server that the settings name, what the page calls it, and where it runs.

    `source` is the model that the server holds: its tokenizer counts the tokens here. Raises NamesakeError where the
    server, its key or the tokenizer can't be had.
    """
    import transformers

    if not serve.base_url:
        raise NamesakeError(
            '[serve] backend is "openai", and base_url is empty',
            "Set it, such as http://127.0.0.1:8000/v1.",
            zh='[serve] backend 是 "openai"，但没有 base_url。请填写，例如 http://127.0.0.1:8000/v1。',
        )
    key = os.environ.get(serve.api_key_env, "") if serve.api_key_env else ""
    if serve.api_key_env and not key:
        raise NamesakeError(
            f"The environment variable {serve.api_key_env}, which [serve] api_key_env names, is empty",
            "Set it where the page runs; on a Space, as a secret.",
            zh=f"[serve] api_key_env 所指的环境变量 {serve.api_key_env} 为空，请在运行页面的机器上设置。",
        )
    if source.gguf:
        raise NamesakeError(
            f"{source}: the tokenizer of a server's model is not read from a GGUF file",
            "Leave [serve] gguf empty, and give a folder or a repository with a tokenizer.json.",
            zh=f"{source}：远程模型的分词器不从 GGUF 读取。请清空 [serve] gguf，指定含 tokenizer.json 的文件夹或仓库。",
        )
    if source.kind in HUBS:
        files = ["*.json", "*.jinja"]
        folder = download(source, not_fetched=["*.index.json"], only=files, whole=_has_tokenizer)
    else:
        folder = embedded_folder() if source.kind == "embedded" else Path(source.name)
    _has_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    context = min(serve.context or config["max_position_embeddings"], config["max_position_embeddings"])
    engine = RemoteEngine(tokenizer, context, serve.base_url, serve.model, key, concurrency, queue)
    engine.check()
    return engine, engine.model, f"{engine.model} on {urlsplit(serve.base_url).netloc}, {context} tokens of context"


def _has_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        if not (folder / name).is_file():
            raise NamesakeError(
                f"{folder}: no {name}, with which the page counts tokens",
                "Give the folder or repository of the server's model with --model or [hub] model.",
                zh=f"{folder} 里没有 {name}，页面无法计算 token 数。请用 --model 或 [hub] model 指定服务端所用的模型。",
            )
