"""What the page says, in Chinese and English."""

from __future__ import annotations

import gradio as gr

from space.settings import Text

WORDS = {
    "message": Text("输入消息，回车发送", "Write a message, Enter sends it"),
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
    "chat": Text("对话", "Chat"),
    "chats": Text("历史对话", "Chats"),
    "new_chat": Text("新对话", "New chat"),
    "greeting": Text("你好，我是{name}", "Hello, I am {name}"),
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

STILL = Text("上一个回答还没有结束。", "The answer before is still being written.")
EMPTY = Text("消息是空的，请写点什么。", "The message is empty: write something.")
BROKEN = Text("出错了，请重试。", "Something went wrong, please try again.")


def language(request: gr.Request | None) -> str:
    """The visitor's language, as the browser sends it: the first one in Accept-Language."""
    return (request.headers.get("accept-language", "") if request else "") or "en"


def describe(answer, tongue: str) -> str:
    """The line under an answer: how far it is, or its figures and why it ended."""
    values = {**vars(answer), "share": (answer.tokens_in + answer.tokens_out) / max(answer.context, 1)}
    if answer.state in ("waiting", "reading", "writing"):
        return NOTES[answer.state].pick(tongue).format(**values)
    values["why"] = NOTES[answer.state].pick(tongue)
    if not answer.tokens_out:
        return values["why"]
    line = NOTES["final"].pick(tongue).format(**values)
    return line + (NOTES["dropped"].pick(tongue).format(**values) if answer.dropped else "")
