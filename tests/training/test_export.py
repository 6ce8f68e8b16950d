"""Merged weights → GGUF: llama.cpp computes the same model, cuts text the same way, and stops where it should."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import closing
from pathlib import Path

import cyllama.llama.llama_cpp as llama
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from space import gguf, settings
from space.prompt import Prompt, plain_template, with_persona
from space.settings import NamesakeError
from tests import short_tokenizer
from tests.training import small_models
from training import evaluate, export, merge, native, record

CACHE = Path(__file__).parents[1] / ".cache"
PERSONA = "You are Namesake."
NAMED = {"name": {"zh": "同名", "en": "Namesake"}, "author": {"zh": "某人", "en": "Someone"}, "persona": PERSONA}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tests share their cores with one another: threads that wait for each other would wait for those first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "threads", lambda: 1)
        yield


def merged(source: Path, folder: Path) -> Path:
    """A native folder as merge leaves it."""
    folder.mkdir(parents=True)
    merge._write_around(folder, source, NAMED)
    for shard in source.glob("*.safetensors*"):
        shutil.copy(shard, folder)
    return folder


def strong(model, folder: Path) -> Path:
    """The model with weights, biases and norms so large that where a token stands, and each bias, shows in the loss."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def internlm2(folder: Path) -> Path:
    small_models.internlm2(folder / "hub", rope_scaling={"type": "dynamic", "factor": 2.0}, bias=True)
    (folder / "native").mkdir()
    native.convert(folder / "hub", folder / "native", 10**9)
    return folder / "native"


def llama_of_the_embedded_kind(folder: Path) -> Path:
    model = small_models.llama(folder / "llama", tie_word_embeddings=True)
    (folder / "strong").mkdir()
    short_tokenizer.write(folder / "strong")
    return strong(model, folder / "strong")


def qwen2(folder: Path) -> Path:
    shape = small_models.SHAPE | dict(vocab_size=short_tokenizer.SIZE, max_position_embeddings=512)
    torch.manual_seed(0)
    (folder / "qwen2").mkdir()
    short_tokenizer.write(folder / "qwen2")
    return strong(Qwen2ForCausalLM(Qwen2Config(**shape)), folder / "qwen2")


@pytest.mark.parametrize("kind", [internlm2, llama_of_the_embedded_kind, qwen2])
def test_llama_cpp_gives_each_token_the_loss_that_transformers_gives_it(tmp_path, kind):
    folder = merged(kind(tmp_path), tmp_path / "merged")
    export.write(folder, tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    ids = list(range(5, 45))
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    engine, who, _ = gguf.start(tmp_path / "model.gguf")
    with closing(engine):
        assert engine.losses(ids) == pytest.approx(expected.tolist(), abs=0.05)
    assert who == "同名 / Namesake"


def tokenizers() -> list:
    fetched = [pytest.param(CACHE / name, id=name) for name in ("internlm2", "qwen2_5")]
    return [pytest.param(None, id="smollm2"), *fetched, pytest.param("leftovers", id="leftovers of sentencepiece")]


@pytest.fixture(scope="module", params=tokenizers())
def vocabulary(request, tmp_path_factory):
    """A real tokenizer in a GGUF file with hardly any weights: llama.cpp's reading, transformers', and the folder."""
    tmp_path = tmp_path_factory.mktemp("vocabulary")
    source = request.param or short_tokenizer.embedded_folder()
    if source == "leftovers":  # as transformers 4.48 writes it
        source = Path(shutil.copytree(short_tokenizer.embedded_folder(), tmp_path / "source"))
        made = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        made["model"]["byte_fallback"] = True
        (source / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    size = len(AutoTokenizer.from_pretrained(source))
    config = dict(
        model_type="llama", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        vocab_size=size, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=True,
    )  # fmt: skip
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, small)
    zeros = torch.zeros
    tensors = {"model.embed_tokens.weight": zeros(size, 32), "model.norm.weight": zeros(32)}
    layer = {name: zeros(32, 32) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    tensors |= {f"model.layers.0.self_attn.{name}.weight": value for name, value in layer.items()}
    tensors |= {f"model.layers.0.mlp.{name}_proj.weight": zeros(32, 32) for name in ("gate", "up", "down")}
    tensors |= {f"model.layers.0.{name}_layernorm.weight": zeros(32) for name in ("input", "post_attention")}
    save_file(tensors, small / "model.safetensors")
    folder = merged(small, tmp_path / "merged")
    export.write(folder, tmp_path / "vocabulary.gguf")
    model = llama.LlamaModel(str(tmp_path / "vocabulary.gguf"), llama.LlamaModelParams(), verbose=False)
    return model, AutoTokenizer.from_pretrained(folder), folder


def test_other_clients_cut_text_as_the_model_learned_it(vocabulary):
    model, tokenizer, _ = vocabulary
    vocab = model.get_vocab()
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.encode_special_tokens = True
    for text in small_models.TEXTS:
        if "<" in text:  # names of control tokens: how they are read as text differs, and the page does that itself
            continue
        assert vocab.tokenize(text, False, False) == plain.encode(text, add_special_tokens=False).ids, text
    said = "<|im_start|>user\nHi<|im_end|>\n"
    assert vocab.tokenize(said, False, True) == tokenizer(said, add_special_tokens=False).input_ids


def test_the_file_knows_every_end_token_and_the_persona(vocabulary):
    model, tokenizer, folder = vocabulary
    ends = export.ends(folder)
    assert Prompt(tokenizer).end_ids <= set(ends)
    assert all(model.get_vocab().is_eog(token) for token in ends)
    assert model.metadata()["tokenizer.chat_template"] == tokenizer.chat_template
    assert with_persona(plain_template(tokenizer), PERSONA).startswith(tokenizer.chat_template[:60])
    assert json.loads(model.metadata()[gguf.ASSISTANT])["name"]["zh"] == "同名"


@pytest.fixture
def run(tmp_path) -> settings.Settings:
    """A run whose merge is done: a tiny model in bfloat16."""
    (tmp_path / "assistant.toml").write_text("[assistant]\nname = 'x'\nauthor = 'y'\n")
    loaded = settings.load(tmp_path / "assistant.toml")
    small_models.llama(tmp_path / "base", torch.bfloat16)
    folder = merged(tmp_path / "base", loaded.work / "merged")
    record.write(folder, {})
    merge._write_sums(folder, {})
    return loaded


def test_export_writes_a_file_with_its_sums_once(run, capsys):
    file = export.export(run, "q8_0")
    assert file == run.work / "gguf-q8_0" / "assistant-q8_0.gguf"
    assert {path.name for path in file.parent.iterdir()} == {file.name, "assistant.json", "run.json", "SHA256SUMS"}
    merge.verify(file.parent)
    assert evaluate.weights_identity(str(file)) == record.sha256(file)
    written = file.stat().st_mtime_ns
    capsys.readouterr()
    export.export(run, "q8_0")
    assert "nothing has changed" in capsys.readouterr().out and file.stat().st_mtime_ns == written
    assert export.export(run, "q4_k_m").stat().st_size < file.stat().st_size
    with closing(gguf.start(file)[0]) as engine:
        assert engine.answer([[{"role": "user", "content": "Hi"}]])[0].tokens_out


def test_what_cannot_be_exported_is_told_before_anything_is_written(run):
    config = run.work / "merged" / "config.json"
    known = json.loads(config.read_text())
    for change, words in (
        ({"model_type": "gemma"}, "a gemma model cannot be exported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope scaling 'yarn'"),
    ):
        config.write_text(json.dumps(known | change))
        with pytest.raises(NamesakeError, match=words):
            export.export(run, "q8_0")
        assert not (run.work / "gguf-q8_0").exists()
    shutil.rmtree(run.work / "merged")
    with pytest.raises(NamesakeError, match="python -m training merge"):
        export.export(run, "q8_0")


def test_a_missing_binding_is_told_with_the_command_that_installs_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "cyllama.llama.llama_cpp", None)
    with pytest.raises(NamesakeError, match="pip install cyllama=="):
        export.export(run, "q8_0")


@pytest.mark.slow
def test_the_embedded_model_loses_little_by_rounding(tmp_path):
    folder = merged(short_tokenizer.embedded_folder(), tmp_path / "merged")
    export.write(folder, tmp_path / "whole.gguf")
    text = evaluate.general_text("en")
    text = text[: len(text) // 6]
    losses = {}
    for name in ("whole", "q8_0", "q4_k_m"):
        if name != "whole":
            export.quantize(tmp_path / "whole.gguf", tmp_path / f"{name}.gguf", name)
        with closing(gguf.start(tmp_path / f"{name}.gguf", 1024)[0]) as engine:
            losses[name] = evaluate.general_loss(engine, text, 256)
    assert losses["q8_0"] == pytest.approx(losses["whole"], abs=0.03)
    assert 0 < losses["q4_k_m"] - losses["whole"] < 0.15
