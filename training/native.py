"""InternLM2.x → native Llama layout, so that nothing ever runs a repository's own code.

InternLM2 is Llama with one packed projection and other names: `wqkv` holds, for each key-value head, the rows of its
query heads, then its key, then its value. Its tokenizer is SentencePiece BPE with byte fallback; from `tokenizer.model`
comes the tokenizer.json that transformers, vLLM and LMDeploy read.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from space import weights
from space.prompt import chatml
from space.settings import NamesakeError
from training import shards

RENAMED = {
    "model.tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "model.norm": "model.norm",
}
PACKED = "attention.wqkv"


def foreign(folder: Path) -> str:
    """What keeps a model folder from being used as it is, by transformers 4.48 and 5 alike; empty if nothing does."""
    config, tokenizer_config = read_config(folder), _json(folder / "tokenizer_config.json")
    if config.get("architectures") == ["InternLM2ForCausalLM"]:
        return "InternLM2 → native Llama layout"
    if not any(folder.glob("*.safetensors")):
        return ".bin → safetensors"
    if "rope_theta" in (config.get("rope_parameters") or {}) and "rope_theta" not in config:
        return "rope for transformers 4 too"
    if (folder / "chat_template.jinja").is_file() and "chat_template" not in tokenizer_config:
        return "chat template for transformers 4 too"
    return ""


def read_config(folder: Path) -> dict:
    """A model folder's config.json. Raises NamesakeError where there is none."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        raise NamesakeError(
            f"{folder}: no readable config.json",
            "Give the folder that holds the model's files.",
            zh=f"{folder} 里没有可读的 config.json。请指定模型所在文件夹。",
        ) from None


def convert(source: Path, folder: Path, largest: int, advance: Callable[[int], None] = lambda _: None) -> None:
    """Write the `foreign` model of `source` to the existing, empty `folder` in native layout.

    `largest`: bytes of a shard; `advance` is told how many bytes were written. In memory is one tensor at a time (of a
    `.bin`, one shard is mapped). Raises NamesakeError for what is broken, or not as InternLM2 has it.
    """
    config = read_config(source)
    if config.get("architectures") == ["InternLM2ForCausalLM"]:
        _convert_internlm2(source, config, folder, largest, advance)
    else:
        _convert_form(source, config, folder, largest, advance)


def _convert_internlm2(source: Path, config: dict, folder: Path, largest: int, advance) -> None:
    from transformers import PreTrainedTokenizerFast

    native = llama_config(config)
    made = tokenizer(
        source / "tokenizer.model", _json(source / "tokenizer_config.json").get("added_tokens_decoder", {})
    )
    end = made.token_to_id("<|im_end|>")
    if end is None or made.get_vocab_size() != config["vocab_size"]:
        raise NamesakeError(
            f"{source}: tokenizer_config.json names no <|im_end|>, or not as many tokens as config.json",
            "Take the current revision of a chat model.",
            zh=f"{source} 的 tokenizer_config.json 没有 <|im_end|>，或词表大小不符。请换用对话模型的最新版本。",
        )
    shards.write(folder, plan(shards.find(source), config), largest, advance)
    _write(folder / "config.json", native)
    ids = {f"{kind}_token_id": native[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")}
    _write(folder / "generation_config.json", {**ids, "eos_token_id": [ids["eos_token_id"], end]})
    made.save(str(folder / "tokenizer.json"))
    names = {name.removesuffix("_id"): made.id_to_token(index) for name, index in ids.items()}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token=made.model.unk_token, **names)
    weights.write_tokenizer_config(folder, fast, chatml(begins=True))


def _convert_form(source: Path, config: dict, folder: Path, largest: int, advance) -> None:
    """The same model with its files in the form that transformers 4.48 and 5 read; safetensors are linked to."""
    from transformers import PreTrainedTokenizerFast

    if any(source.glob("*.safetensors")):
        for file in source.glob("*.safetensors*"):
            (folder / file.name).symlink_to(file.resolve())
    else:
        copies = [
            shards.Planned(stored.name, stored.dtype, stored.shape, stored.copy) for stored in shards.find(source)
        ]
        shards.write(folder, copies, largest, advance)
    _write(folder / "config.json", both_forms(config))
    for name in ("generation_config.json", "tokenizer.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    told, jinja = _json(source / "tokenizer_config.json"), source / "chat_template.jinja"
    tokens = {key: told[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token") if told.get(key)}
    names = {key: token["content"] if isinstance(token, dict) else token for key, token in tokens.items()}
    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)
    fast.chat_template = told.get("chat_template") or (jinja.read_text(encoding="utf-8") if jinja.is_file() else None)
    weights.write_tokenizer_config(folder, fast)


def llama_config(internlm2: dict) -> dict:
    """config.json of the same model as native Llama, rope scaling included."""
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "max_position_embeddings", "initializer_range", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id",
        "tie_word_embeddings", "rope_theta", "rope_scaling", "torch_dtype",
    )  # fmt: skip
    config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "rope_theta": 10000.0}
    config |= {key: internlm2[key] for key in kept if key in internlm2}
    config["architectures"], config["model_type"] = ["LlamaForCausalLM"], "llama"
    config["num_key_value_heads"] = internlm2.get("num_key_value_heads") or internlm2["num_attention_heads"]
    config["attention_bias"], config["mlp_bias"] = internlm2.get("bias", True), False  # InternLM2's defaults
    config["use_cache"] = True
    return both_forms(config)


def both_forms(config: dict) -> dict:
    """A config.json with rope and dtype as transformers 4.48 reads them and as 5 does; other clients read either."""
    config = dict(config)
    if dtype := config.get("dtype") or config.get("torch_dtype"):
        config["dtype"] = config["torch_dtype"] = dtype
    rope = config.get("rope_parameters")
    if rope and "rope_theta" in rope:  # as 5 saves it
        config["rope_theta"] = rope["rope_theta"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    elif not rope and "rope_theta" in config:  # as 4.48 saves it
        scaling = dict(config.get("rope_scaling") or {})
        scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type", "default"))
        config["rope_parameters"] = {"rope_theta": config["rope_theta"], **scaling}
        config["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    return config


def plan(stored: list[shards.Stored], config: dict) -> list[shards.Planned]:
    """The tensors of native layout, each made from InternLM2's when its turn comes."""
    return [planned for tensor in stored for planned in _plan(tensor, config)]


def _plan(tensor: shards.Stored, config: dict) -> Iterator[shards.Planned]:
    module, kind = tensor.name.rsplit(".", 1)
    if module.endswith("rotary_emb"):  # a constant that early checkpoints carry
        return
    layer, short = module.split(".")[:3], ".".join(module.split(".")[3:])
    if short == PACKED:
        heads = config["num_attention_heads"]
        groups = config.get("num_key_value_heads") or heads
        width, each = config["hidden_size"] // heads, heads // groups

        def part(rows: slice) -> Iterator[memoryview]:
            packed = tensor.load().unflatten(0, (groups, each + 2, width))
            return shards.data(packed[:, rows].flatten(0, 2))

        for name, rows, count in (
            ("q_proj", slice(each), heads),
            ("k_proj", slice(each, each + 1), groups),
            ("v_proj", slice(each + 1, each + 2), groups),
        ):
            shape = (count * width, *tensor.shape[1:])
            name = ".".join([*layer, "self_attn", name, kind])
            yield shards.Planned(name, tensor.dtype, shape, lambda rows=rows: part(rows))
    elif module in RENAMED:
        yield shards.Planned(f"{RENAMED[module]}.{kind}", tensor.dtype, tensor.shape, tensor.copy)
    elif short in RENAMED:
        name = ".".join([*layer, RENAMED[short], kind])
        yield shards.Planned(name, tensor.dtype, tensor.shape, tensor.copy)
    else:
        raise NamesakeError(
            f"{tensor.file}: {tensor.name} is no part of InternLM2",
            "Choose an InternLM2 or InternLM2.5 chat model.",
            zh=f"{tensor.file} 里的 {tensor.name} 不属于 InternLM2。请选用 InternLM2 或 InternLM2.5 对话模型。",
        )


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # a piece's type in sentencepiece_model.proto


@dataclass(frozen=True)
class Piece:
    """An entry of a SentencePiece vocabulary."""

    text: str
    score: float
    kind: int


def tokenizer(model: Path, added: dict):
    """A `tokenizers.Tokenizer` that encodes and decodes as SentencePiece does with `model`.

    `added`: tokenizer_config.json's added_tokens_decoder, id → {"content"}; these ids get that name, as InternLM2 names
    its control tokens. Raises NamesakeError where the model is of a kind that InternLM2's is not.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces, prefix = _read_sentencepiece(model)
    names = [piece.text for piece in pieces]
    kinds = [piece.kind for piece in pieces]
    if max(map(int, added), default=0) >= len(names):
        raise NamesakeError(
            f"{model}: tokenizer_config.json names token {max(map(int, added))}, and it has {len(names)}",
            "Choose an InternLM2 or InternLM2.5 chat model.",
            zh=f"{model} 只有 {len(names)} 个 token，tokenizer_config.json 却不止。请选用 InternLM2 对话模型。",
        )
    for index, token in added.items():
        names[int(index)] = token["content"]
        kinds[int(index)] = UNKNOWN if kinds[int(index)] == UNKNOWN else CONTROL
    vocab = {name: index for index, name in enumerate(names)}
    # Only normal pieces come out of merges: written as text, "<s>" must not become the begin token.
    normal = {piece.text: index for index, piece in enumerate(pieces) if kinds[index] == NORMAL}
    merges = []
    for text, index in normal.items():
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        pairs = sorted((normal[a], normal[b], a, b) for a, b in halves if a in normal and b in normal)
        merges += [(-pieces[index].score, a, b) for _, _, a, b in pairs]
    merges.sort(key=lambda merge: merge[0])
    bpe = models.BPE(
        vocab, [(a, b) for _, a, b in merges], unk_token=names[kinds.index(UNKNOWN)], fuse_unk=True, byte_fallback=True
    )
    made = Tokenizer(bpe)
    begin = [normalizers.Prepend("▁")] if prefix else []
    made.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    whole = [(name, kind) for name, kind in zip(names, kinds, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    made.add_tokens([AddedToken(name, normalized=False, special=kind != USER_DEFINED) for name, kind in whole])
    first = next(name for name, kind in whole if kind == CONTROL)
    made.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, vocab[first])]
    )
    return made


def _read_sentencepiece(model: Path) -> tuple[list[Piece], bool]:
    """The pieces of a SentencePiece model, and whether it puts a space before every text.

    The field numbers are those of https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    try:
        fields = list(_fields(model.read_bytes()))
        pieces = []
        for entry in (dict(_fields(value)) for number, value in fields if number == 1):
            (score,) = struct.unpack("<f", entry.get(2, bytes(4)))
            pieces.append(Piece(entry[1].decode(), score, entry.get(3, NORMAL)))
        trainer, normalizer = (dict(_fields(b"".join(v for n, v in fields if n == number))) for number in (2, 3))
    except FileNotFoundError:
        raise NamesakeError(
            f"{model}: no such file", "Download the model again.", zh=f"缺少 {model}，请重新下载模型。"
        ) from None
    except (ValueError, KeyError, IndexError, TypeError, struct.error):
        raise NamesakeError(
            f"{model}: not a SentencePiece model",
            "Download it again.",
            zh=f"{model} 不是 SentencePiece 模型，请重新下载。",
        ) from None
    is_bpe, has_bytes = trainer.get(3, 1) == 2, bool(trainer.get(35, 0))
    plain = not normalizer.get(2) and not normalizer.get(4, 1) and normalizer.get(5, 1) and not trainer.get(24, 0)
    if not (is_bpe and has_bytes and plain) or UNUSED in {piece.kind for piece in pieces}:
        raise NamesakeError(
            f"{model}: not BPE with byte fallback and without normalisation, as InternLM2's is",
            "Choose an InternLM2 or InternLM2.5 chat model.",
            zh=f"{model} 与 InternLM2 的分词器类型不同。请选用 InternLM2 或 InternLM2.5 对话模型。",
        )
    return pieces, bool(normalizer.get(3, 1))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protocol buffers message (https://protobuf.dev/programming-guides/encoding/)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 2: None, 5: 4}[wire] or varint()
        if at + size > len(message):
            raise ValueError("cut short")
        yield number, message[at : at + size]
        at += size


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        raise NamesakeError(
            f"{path}: not there or not JSON",
            "Download the model again.",
            zh=f"{path} 不存在或不是 JSON，请重新下载模型。",
        ) from None


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
