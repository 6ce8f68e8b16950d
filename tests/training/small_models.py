"""Small random models as hub repositories and training leave them, for the tests of base, convert and merge."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece as spm
import torch
import transformers
from safetensors.torch import save_file

from tests import short_tokenizer

ROOT = Path(__file__).parents[2]

TEXTS = [
    "Hello, world!",
    " leading and trailing ",
    "  two  spaces,\n\n\ttabs and\r\nlines",
    "    " * 9 + "x",
    "你好，世界！我是同名，很高兴认识你。",
    "混合 English 和中文 🎉👨‍👩‍👧 ☃ é̃ 𠮷野家 ﷽ ไทย עברית",
    "def f(x):\n    return x ** 2  # 平方\n\tif (a != b) { c[0] += 1; }",
    "aaaaaaa" * 7 + "=" * 31 + "-" * 65,
    "<s> </s> <unk> <|im_end|> <|im_start|>system [UNUSED_TOKEN_145] <0x0A> ▁▁",
    "",
]


def train_sentencepiece(file: Path, **options) -> spm.SentencePieceProcessor:
    """A small SentencePiece model of InternLM2's kind: BPE, byte fallback, no normalisation, no dummy prefix."""
    corpus = [text for text in TEXTS if text and "<" not in text] * 3
    corpus += [line for path in (ROOT / "space").glob("*.py") for line in path.read_text().splitlines()]
    kind = dict(
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        minloglevel=3,
    )
    written = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter(corpus), model_writer=written, **kind | options)
    file.write_bytes(written.getvalue())
    return spm.SentencePieceProcessor(model_proto=written.getvalue())


SHAPE = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2)


def internlm2(folder: Path, *, rope_scaling=None, kv_heads=2, bias=False, form="safetensors", dtype=torch.float32):
    """A small random InternLM2 as a hub repository has it, and the reference code's model of it."""
    from xtuner._lite.modelings.internlm2 import InternLM2Config, InternLM2ForCausalLM

    folder.mkdir()
    train_sentencepiece(folder / "tokenizer.model", user_defined_symbols=["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"])
    config = InternLM2Config(
        **SHAPE | {"num_key_value_heads": kv_heads}, vocab_size=1000, bias=bias, max_position_embeddings=64,
        rope_theta=1e6, rope_scaling=rope_scaling, rms_norm_eps=1e-5, pad_token_id=2, attn_implementation="eager",
        torch_dtype=str(dtype).removeprefix("torch."), architectures=["InternLM2ForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = InternLM2ForCausalLM(config).eval()
    for parameter in model.parameters():  # norms and biases too, and big enough for differences to show
        torch.nn.init.normal_(parameter, std=0.2)
    model = model.to(dtype)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    names = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "<|im_end|>", 4: "<|im_start|>"}
    tokens = {index: {"content": text, "special": True} for index, text in names.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens}))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if form == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        halves = [list(state)[::2], list(state)[1::2]]
        files = [f"pytorch_model-{number:05}-of-00002.bin" for number in (1, 2)]
        for file, half in zip(files, halves, strict=True):
            torch.save({name: state[name] for name in half}, folder / file)
        weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model


def llama(folder: Path, dtype=torch.float32, **options):
    """A small random Llama with a short tokenizer of the embedded model's kind, as a native folder, and the model."""
    config = transformers.LlamaConfig(
        **SHAPE,
        vocab_size=short_tokenizer.SIZE,
        rope_theta=50000.0,
        bos_token_id=1,
        eos_token_id=2,
        torch_dtype=dtype,
        **options,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    model.save_pretrained(folder, max_shard_size="1MB")
    short_tokenizer.write(folder)
    return model
