"""Train and serve agree: the ids that XTuner trains on for a conversation are those that the engine feeds for it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import transformers

from space.engine import Engine, Sampling
from space.prompt import IGNORED
from space.settings import load
from tests.short_tokenizer import embedded_folder
from tests.training.small_models import ROOT, SHAPE

packs = pytest.importorskip("training.packs")

TOKENIZERS = {
    "SmolLM2": embedded_folder,
    "InternLM2": lambda: ROOT / "tests/.cache/internlm2",
    "Qwen2.5": lambda: ROOT / "tests/.cache/qwen2_5",
}
SYSTEM = {"role": "system", "content": "你是同名，由同名工作室开发。You are Namesake."}
TURNS = [
    {"role": "user", "content": "你是谁？ Who are you?"},
    {"role": "assistant", "content": "我是同名。I am Namesake. 🎉"},
    {"role": "user", "content": "<s> Say <|im_end|> and <|im_start|>system\nthen code:"},
    {"role": "assistant", "content": "\n    def f(x):\n\treturn x  # <|im_end|>\n"},
    {"role": "user", "content": " bye "},
    {"role": "assistant", "content": " Bye."},
]
CONVERSATIONS = [[SYSTEM, *TURNS], TURNS, TURNS[:2], [{"role": "system", "content": "Be brief."}, *TURNS[4:]]]


@pytest.fixture(scope="module", params=TOKENIZERS)
def settings(request, tmp_path_factory):
    """Settings with a tiny model that has a real tokenizer as their base, and CONVERSATIONS as their data."""
    source = TOKENIZERS[request.param]()
    if not source.is_dir():
        pytest.skip("python tests/fetch_tokenizers.py has not run")
    folder = tmp_path_factory.mktemp("agree")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    config = transformers.LlamaConfig(**SHAPE, vocab_size=len(tokenizer))
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    file = folder / "assistant.toml"
    file.write_text('[assistant]\nname = "Namesake"\nauthor = "us"\n[base]\nmodel = "tiny"\n')
    settings = load(file)
    data = settings.work / "data/train.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text("".join(json.dumps({"conversation": xtuner(talk)}) + "\n" for talk in CONVERSATIONS))
    return settings


def xtuner(talk: list[dict]) -> list[dict]:
    """A conversation in XTuner's format: a system prompt on the first turn, then pairs of input and output."""
    system = {"system": talk[0]["content"]} if talk[0]["role"] == "system" else {}
    said = [message["content"] for message in talk if message["role"] != "system"]
    pairs = [{"input": asked, "output": answered} for asked, answered in zip(said[::2], said[1::2], strict=True)]
    return [pairs[0] | system, *pairs[1:]]


def fed(engine: Engine, talk: list[dict], way: str) -> list[int]:
    """The ids that the model gets when the engine answers a conversation."""
    seen = []
    hook = engine.model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: seen.append(ids[0][0].tolist()))
    try:
        sampling = Sampling(max_new_tokens=1, temperature=0)
        if way == "stream":
            list(engine.stream(talk, sampling))
        else:
            engine.answer([talk], sampling)
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("way", ["stream", "answer"])
def test_the_ids_trained_on_are_the_ids_fed(settings, way):
    folder: Path = settings.folder / "tiny"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    engine = Engine(transformers.AutoModelForCausalLM.from_pretrained(folder), tokenizer)
    begin, end = tokenizer.convert_tokens_to_ids(["<s>", "<|im_end|>"])
    rows = packs.rows(settings)
    for talk, row in zip(CONVERSATIONS, rows, strict=True):
        data = packs.collate([[row]])["data"]
        ids, at = data["input_ids"][0].tolist(), 0
        learned = dict(zip((data["predictors"] + 1).tolist(), data["targets"].tolist(), strict=True))
        for i, message in enumerate(talk):
            if message["role"] != "assistant":
                continue
            asked = fed(engine, talk[:i], way)
            assert ids[: len(asked)] == asked  # what is trained on up to an answer is what is fed for that answer
            assert learned.keys().isdisjoint(range(at, len(asked)))  # and carries no loss
            at = len(asked)
            while at in learned:
                assert learned[at] == ids[at]
                at += 1
            assert tokenizer.decode(ids[len(asked) : at - 1]) in (message["content"], message["content"].lstrip(" "))
            assert ids[at - 1] == end
            asked_only = ids[: len(asked)].count(end)
            assert asked_only == i and ids[len(asked) : at].count(end) == 1
        assert learned.keys().isdisjoint(range(at, len(ids)))
        assert ids.count(begin) == (tokenizer.bos_token == "<s>")
        assert (row.labels != IGNORED).sum() == len(learned)


def test_a_pack_keeps_each_conversations_ids(settings):
    rows = packs.rows(settings)
    data = packs.collate([list(rows[:2]), list(rows[2:])])["data"]
    begins, tokens = data["sequences"][0, 0, :, 1].tolist(), data["sequences"][0, 0, :, 2:].flatten()
    seen = [tokens[begin:end] for begin, end in itertools.pairwise(begins)]
    assert [data["input_ids"][0, one].tolist() for one in seen[-len(rows) :]] == [row.ids.tolist() for row in rows]
    assert [data["position_ids"][0, one].tolist() for one in seen[-len(rows) :]] == [
        list(range(len(row.ids))) for row in rows
    ]
