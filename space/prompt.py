"""Messages → token ids: the only place that knows roles, the system prompt and how a long history is trimmed.

Training, evaluation and the page all come through here, so what was learned is what is asked. Only the chat template's
own marks become control tokens; what anybody wrote stays text, whatever it looks like.
"""

from __future__ import annotations

import bisect
import itertools
import json
import re
from dataclasses import dataclass, field

from jinja2 import TemplateError
from tokenizers import Tokenizer

from space.settings import NamesakeError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

ROLES = {"system", "user", "assistant"}

IGNORED = -100  # the label of a token that carries no loss, as PyTorch's cross_entropy has it


def chatml(begins: bool) -> str:
    """The ChatML template with no system prompt of its own; an empty system message leaves its block out.

    `begins`: whether the prompt starts with the begin token (InternLM2's "<s>"; SmolLM2 and Qwen2.5 have none).
    """
    return (
        "{{ bos_token }}"
        * begins
        + "{% for message in messages %}{% if message['role'] != 'system' or message['content'] %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def plain_template(tokenizer) -> str:
    """The tokenizer's chat template without the foreign identity that it may hold.

    ChatML templates (InternLM2, Qwen2.5, SmolLM2) name their own model when no system prompt is given; `chatml()` takes
    their place. Any other template is kept: there the page always sends a system prompt.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise NamesakeError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template",
            "Choose a chat model: its name often ends in -chat or -Instruct.",
            zh=f"{tokenizer.name_or_path} 的分词器没有对话模板。请选用对话模型，名字通常以 -chat 或 -Instruct 结尾。",
        )
    if "<|im_start|>" in template and "<|im_end|>" in template:
        return chatml("bos_token" in template)
    return template


def with_persona(template: str, persona: str) -> str:
    """The template with `persona` as its default system prompt, for the merged model that any client may load.

    A conversation that begins with a system message is left as it is: an empty one switches the persona off.
    """
    system = json.dumps({"role": "system", "content": persona}, ensure_ascii=False)
    return (
        "{% if not messages or messages[0]['role'] != 'system' %}"
        f"{{% set messages = [{system}] + messages %}}{{% endif %}}{template}"
    )


def clean(messages: list[dict]) -> list[Message]:
    """Messages with plain text contents, no empty ones but the system's, and no two of one role in a row.

    The page sends contents as lists of parts, the API as strings; a stop before the first token leaves two user
    messages in a row, which are joined. Half a character, as JSON can carry it, becomes "?".
    """
    cleaned: list[Message] = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part if isinstance(part, str) else part.get("text") or "" for part in content or ())
        content = content.encode("utf-8", "replace").decode("utf-8")
        role = message["role"]
        if not content and role != "system":
            continue
        if cleaned and cleaned[-1]["role"] == role:
            cleaned[-1]["content"] += "\n\n" + content
        else:
            cleaned.append({"role": role, "content": content})
    return cleaned


@dataclass
class Encoded:
    """Token ids and, for each, its label: the id itself where it carries loss, IGNORED elsewhere."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    answered: int = 0  # the length of ids up to the end of the last answer's text, before its end token

    def add(self, ids: list[int], loss: bool) -> None:
        self.ids += ids
        self.labels += ids if loss else [IGNORED] * len(ids)


@dataclass(frozen=True)
class Fitted:
    """A prompt that fits: its token ids, how many of the oldest turns were left out for it, and what was kept."""

    ids: list[int]
    dropped: int
    messages: list[Message]


class Prompt:
    """Turns conversations into token ids for one tokenizer.

    The template is rendered with a slot in place of each content, cut at its control tokens, and the text between two
    of them is encoded as text alone. Ordinary conversations get the very ids that `apply_chat_template` gives them, and
    no content can add a control token.
    """

    def __init__(self, tokenizer):
        if not tokenizer.is_fast:
            raise NamesakeError(
                f"{tokenizer.name_or_path}: no tokenizer.json",
                "Make one with: python -m training base",
                zh=f"{tokenizer.name_or_path} 没有 tokenizer.json，请先运行 python -m training base 生成。",
            )
        self._tokenizer = tokenizer
        self._template = plain_template(tokenizer)
        self._text = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._text.encode_special_tokens = True  # a control token's name in a text is encoded as text
        self._text.no_truncation()
        self._text.no_padding()
        added = tokenizer.added_tokens_decoder.items()
        self._longest = max(map(len, tokenizer.get_vocab()))  # no token stands for more characters than its name has
        self._control = {token.content: index for index, token in added if token.special}
        self._control_ids = set(self._control.values())
        names = sorted(self._control, key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        sample = self.encode([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
        self.end_ids = {sample.labels[i] for i in range(sample.answered, len(sample.ids))} - {IGNORED}

    @property
    def control_names(self) -> list[str]:
        """The control tokens as a template writes them, such as "<|im_end|>"."""
        return list(self._control)

    def encode(self, messages: list[Message], *, answer_next: bool = False) -> Encoded:
        """The whole conversation, `clean()`ed; with `answer_next`, ending where the assistant's next answer begins.

        Loss falls on each assistant content and the control token that ends it, but not on the end of a message with
        "cut": true, which a limit on its length ended. The ids before an answer are the same whether the answer is
        there already (training) or about to be written (serving).
        """
        encoded = Encoded()
        run, loss = "", False  # the text since the last control token, and whether it belongs to an answer
        for message, text in self._render(messages, answer_next):
            if message and message["role"] == "assistant":
                head = self.ids(run)
                whole = self.ids(run + text)
                if whole[: len(head)] != head:  # the tokenizer would merge across the answer's beginning
                    whole = head + self.ids(text)
                encoded.add(head, False)
                encoded.add(whole[len(head) :], True)
                encoded.answered = len(encoded.ids)
                run, loss = "", not message.get("cut")
            elif message:
                run += text
            else:
                end = 0
                for mark in self._marks.finditer(text):
                    encoded.add(self.ids(run + text[end : mark.start()]), loss)
                    encoded.add([self._control[mark[0]]], loss)
                    run, loss, end = "", False, mark.end()
                run += text[end:]
        encoded.add(self.ids(run), False)
        return encoded

    def ids(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is a control token."""
        ids = self._text.encode(text, add_special_tokens=False).ids if text else []
        if self._control_ids.isdisjoint(ids):
            return ids
        # InternLM2's shipped merges make the begin token of "<" and "s>": such a name is encoded in two halves.
        cuts = [0, *(mark.start() + 1 for mark in self._marks.finditer(text)), len(text)]
        halves = [self._text.encode(text[a:b], add_special_tokens=False).ids for a, b in itertools.pairwise(cuts)]
        return [index for half in halves for index in half]

    def fit(self, messages: list[dict], room: int, *, resume: bool = False) -> Fitted:
        """The prompt for the next answer in at most `room` tokens; with `resume`, for the rest of the last answer.

        The oldest turns go first, whole; the system prompt and the last user turn stay. Raises NamesakeError with the
        count of tokens when these alone are too long.
        """
        messages = clean(messages)
        resume = resume and bool(messages) and messages[-1]["role"] == "assistant"  # else it was stopped before a token
        system = messages[:1] if messages and messages[0]["role"] == "system" else []
        starts = [i for i in range(len(system), len(messages)) if messages[i]["role"] == "user"]
        if not starts:
            raise NamesakeError("There is no question to answer", zh="没有可以回答的问题。")
        starts[0] = len(system)  # an assistant's greeting before the first question belongs to that turn

        def kept(dropped: int) -> list[Message]:
            return system + messages[starts[dropped] :]

        def encode(dropped: int) -> list[int]:
            if resume:
                whole = self.encode(kept(dropped))
                return whole.ids[: whole.answered]
            return self.encode(kept(dropped), answer_next=True).ids

        def least(dropped: int) -> int:
            """Tokens at the very least, without encoding: megabytes would take seconds."""
            return sum(len(message["content"]) for message in kept(dropped)) // self._longest

        first = bisect.bisect_left(range(len(starts)), True, key=lambda count: least(count) <= room)
        if first < len(starts) and len(ids := encode(first)) <= room:
            return Fitted(ids, first, kept(first))
        # The fewer turns, the shorter: the first count of dropped turns that fits is found by bisection.
        dropped = bisect.bisect_left(
            range(len(starts)), True, lo=min(first + 1, len(starts)), key=lambda count: len(encode(count)) <= room
        )
        if dropped == len(starts):
            last = dropped - 1
            count = len(encode(last)) if first < dropped else least(last)
            en, zh = (f"{count}", f"{count}") if first < dropped else (f"at least {count}", f"至少 {count}")
            raise NamesakeError(
                f"The message is too long: {en} tokens with the system prompt, and {room} fit",
                "Shorten it.",
                zh=f"消息太长：连同系统提示词共 {zh} 个 token，最多 {room} 个。请缩短后再发。",
            )
        return Fitted(encode(dropped), dropped, kept(dropped))

    def _render(self, messages: list[Message], answer_next: bool):
        """Yields the rendered template in pieces: (the message whose content it is, or None; text)."""
        if unknown := {str(message["role"]) for message in messages} - ROLES:  # a role is part of the template's text
            raise NamesakeError(
                f"Unknown role {min(unknown)!r}",
                "Use system, user or assistant.",
                zh=f"未知的角色 {min(unknown)!r}，只能是 system、user 或 assistant。",
            )
        slots = [{**message, "content": f"\ue000{i}\ue001"} if message["content"] else message
                 for i, message in enumerate(messages)]  # fmt: skip
        try:
            rendered = self._tokenizer.apply_chat_template(
                slots, chat_template=self._template, tokenize=False, add_generation_prompt=answer_next
            )
        except TemplateError as error:
            raise NamesakeError(
                f"The model's chat template refuses this conversation: {error}",
                zh=f"模型的对话模板不接受这段对话：{error}",
            ) from error
        # The slots are private use characters around a number; no content is in the rendered text, so none is mistaken.
        for i, piece in enumerate(re.split("\ue000(\\d+)\ue001", rendered)):
            if i % 2:
                message = messages[int(piece)]
                yield message, message["content"]
            elif piece:
                yield None, piece
