"""Merged weights → one GGUF file that llama.cpp, and the page on a machine without a GPU, serve.

GGUF is metadata and tensors in one file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The tensors are
written as they are by the `gguf` package, one at a time, and quantized by llama.cpp itself: its k-quants have no other
implementation. The file carries all that a client needs: the chat template with the persona, every end token, the
tokenizer both in llama.cpp's form and as the tokenizer.json it came from, and who the assistant is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from space.gguf import ASSISTANT, TOKENIZER, TOKENIZER_CONFIG, binding, threads
from space.settings import NamesakeError, Settings
from training import merge, native, record, shards

QUANTIZATIONS = {"q4_k_m": 15, "q8_0": 7}  # llama_ftype in llama.h

# transformers' model_type → llama.cpp's architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # llama_token_type in llama.h


def export(settings: Settings, quantization: str) -> Path:
    """Write work/<run>/gguf-<quantization>/<run>-<quantization>.gguf from work/<run>/merged, and return the file.

    Beside it lie assistant.json and SHA256SUMS. Needs disk for the weights once more while it runs.
    Raises NamesakeError where there are no merged weights, or llama.cpp has no graph for their kind.
    """
    import typer

    merged = settings.work / "merged"
    if not record.read(merged):
        raise NamesakeError(
            f"{merged} is not there",
            "Run: python -m training merge",
            zh=f"{merged} 不存在，请先运行 python -m training merge。",
        )
    folder = settings.work / f"gguf-{quantization}"
    file = folder / f"{settings.train.run}-{quantization}.gguf"
    inputs = {"merged": record.sha256(merged / merge.SUMS), "quantization": quantization, "layout": 1}
    if record.unchanged(folder, inputs) and file.is_file():
        typer.echo(f"export 导出: nothing has changed 没有变化, {file}")
        return file
    size = sum(tensor.size for tensor in shards.find(merged))
    with shards.aside(folder, int(size * 1.6)) as aside:
        whole = aside / "whole.gguf"
        with shards.progress("export 导出", size) as advance:
            write(merged, whole, advance)
        quantize(whole, aside / file.name, quantization)
        whole.unlink()
        (aside / "assistant.json").write_bytes((merged / "assistant.json").read_bytes())
        record.write(aside, inputs)
        merge._write_sums(aside, {})
    typer.echo(
        f"export 导出: {file.stat().st_size / 1e9:.2f} GB, {file}. "
        f"Next 下一步: python -m training evaluate --after {file}, then 然后 python app.py --model {file}"
    )
    return file


def quantize(source: Path, target: Path, quantization: str) -> None:
    """Quantize a GGUF file with llama.cpp, on all cores. Raises NamesakeError where it refuses."""
    llama = binding()
    options = llama.LlamaModelQuantizeParams()
    options.ftype, options.nthread = QUANTIZATIONS[quantization], threads()
    try:
        llama.model_quantize(str(source), str(target), options)
    except RuntimeError as error:
        raise NamesakeError(
            f"llama.cpp could not quantize {source.name}: {error}",
            "See that the disk has room, or choose --gguf q8_0.",
            zh=f"llama.cpp 无法量化 {source.name}：{error}。请检查磁盘空间，或改用 --gguf q8_0。",
        ) from error


def write(folder: Path, file: Path, advance=lambda _: None) -> None:
    """Write a model folder's weights as they are, with its tokenizer, template and provenance, to a GGUF file.

    Matrices keep their type, vectors become float32, as llama.cpp wants them; one tensor is in memory at a time.
    """
    import gguf
    import numpy
    import torch

    config = native.read_config(folder)
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise NamesakeError(
            f"{folder}: a {kind} model cannot be exported to GGUF",
            f"Known here: {', '.join(ARCHITECTURES)}.",
            zh=f"{folder} 是 {kind} 模型，不能导出为 GGUF；支持 {', '.join(ARCHITECTURES)}。",
        )
    writer = gguf.GGUFWriter(file, ARCHITECTURES[kind])
    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[ARCHITECTURES[kind]]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    _describe(writer, folder, config)
    _tokenizer(writer, folder, config)

    stored = []
    tied = config.get("tie_word_embeddings")
    for tensor in shards.find(folder):
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise NamesakeError(
                f"{tensor.file}: llama.cpp's {kind} has no {tensor.name}",
                "Serve this model with transformers instead.",
                zh=f"llama.cpp 的 {kind} 没有 {tensor.name}（{tensor.file}）。请用 transformers 部署这个模型。",
            )
        if tied and name == "output.weight":
            continue
        vector = len(tensor.shape) == 1
        exact = {"BF16": gguf.GGMLQuantizationType.BF16, "F16": gguf.GGMLQuantizationType.F16}.get(tensor.dtype)
        raw = gguf.GGMLQuantizationType.F32 if vector or exact is None else exact
        width = 4 if raw == gguf.GGMLQuantizationType.F32 else 2
        count = tensor.size // shards.WIDTHS[tensor.dtype]
        writer.add_tensor_info(name, tensor.shape, numpy.dtype(numpy.float16), count * width, raw_dtype=raw)
        stored.append((tensor, raw))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, raw in stored:
        values = _permuted(tensor.name, tensor.load(), config)
        if raw == gguf.GGMLQuantizationType.F32:
            values = values.float()
        writer.write_tensor_data(values.contiguous().view(torch.uint8).numpy())
        advance(tensor.size)
    writer.close()


def _permuted(name: str, values, config: dict):
    """The rows of Llama's query and key projections in llama.cpp's order.

    transformers rotates a head's first half against its second; llama.cpp's Llama rotates neighbours, as Meta's own
    code does: each head's rows (2, width / 2, …) become (width / 2, 2, …). Qwen keeps transformers' order.
    """
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if ARCHITECTURES[config["model_type"]] != "llama" or not heads:
        return values
    count = config.get(heads) or config["num_attention_heads"]
    return values.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)


def _describe(writer, folder: Path, config: dict) -> None:
    """The shape of the model, and who the assistant is."""
    described = json.loads((folder / "assistant.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    names, author = described["name"], described["author"]
    writer.add_name(names["en"] or names["zh"])
    writer.add_author(author["en"] or author["zh"])
    writer.add_string(ASSISTANT, json.dumps(described, ensure_ascii=False))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0))
    scaling = config.get("rope_scaling") or {}
    way = scaling.get("rope_type", scaling.get("type", "default"))
    if way == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    elif way not in ("default", "dynamic"):  # dynamic scaling begins behind max_position_embeddings, where chats end
        raise NamesakeError(
            f"{folder / 'config.json'}: rope scaling {way!r} cannot be exported to GGUF yet",
            "Serve this model with transformers instead.",
            zh=f"{folder / 'config.json'} 的 rope 缩放方式 {way!r} 暂不支持导出为 GGUF。请用 transformers 部署。",
        )


def _tokenizer(writer, folder: Path, config: dict) -> None:
    """The tokenizer in llama.cpp's form, and as it came; the chat template; all end tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    made = json.loads(text)
    model = made["model"]
    added = {token["id"]: token for token in made["added_tokens"]}
    vocab = {index: name for name, index in model["vocab"].items()}
    vocab |= {index: token["content"] for index, token in added.items()}
    sentencepiece = bool(model.get("byte_fallback")) and "<0x00>" in model["vocab"]
    unknown = vocab and model.get("unk_token")

    def kind(index: int, name: str) -> int:
        if sentencepiece and name == unknown:
            return UNKNOWN
        if index in added:
            return CONTROL if added[index]["special"] else USER_DEFINED
        byte = sentencepiece and len(name) == 6 and name.startswith("<0x") and name.endswith(">")
        return BYTE if byte else NORMAL

    size = config["vocab_size"]
    tokens = [vocab.get(index, f"[PAD{index}]") for index in range(size)]
    kinds = [kind(index, name) if index in vocab else 5 for index, name in enumerate(tokens)]  # 5: unused
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else _split(made, folder))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if sentencepiece:
        # llama.cpp merges what has the highest score first; the order of the merges is all that scores say.
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault(pair.replace(" ", "", 1), rank)
        writer.add_token_scores([float(-ranks.get(name, 0)) for name in tokens])
        writer.add_add_space_prefix('"Prepend"' in json.dumps(made.get("normalizer")))
    else:
        writer.add_token_merges(merges)
        writer.add_add_space_prefix(False)
    begins = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(bool(begins))
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None:
            add(index)
    others = [index for index in ends(folder) if index != tokenizer.eos_token_id]
    for add, index in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(index)
    writer.add_chat_template(tokenizer.chat_template)
    # The key is GGUF's own for this; readers that want exactly these token ids need nothing else.
    writer.add_string(TOKENIZER, text)
    writer.add_string(TOKENIZER_CONFIG, (folder / "tokenizer_config.json").read_text(encoding="utf-8"))


def ends(folder: Path) -> list[int]:
    """The ids that end an answer, as merge wrote them to generation_config.json."""
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    ids = generation.get("eos_token_id", [])
    return ids if isinstance(ids, list) else [ids]


def _split(made: dict, folder: Path) -> str:
    """llama.cpp's name for the way that a byte-level tokenizer cuts text before merging.

    Only clients with llama.cpp's own tokenizer read it; the page uses the tokenizer.json.
    """
    steps = list(_steps(made.get("pre_tokenizer") or {}))
    kinds = [step["type"] for step in steps]
    patterns = [str(step.get("pattern", {}).get("Regex", "")) for step in steps]
    if "Digits" in kinds and any(step.get("individual_digits") for step in steps):
        return "smollm"
    if any(r"\p{N}{1,3}" in pattern for pattern in patterns):
        return "llama-bpe"
    if any(r"\p{N}" in pattern for pattern in patterns):
        return "qwen2"
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    raise NamesakeError(
        f"{folder / 'tokenizer.json'}: llama.cpp has no name for this pre-tokenizer ({', '.join(kinds)})",
        "Serve this model with transformers instead.",
        zh=f"llama.cpp 不认识 {folder / 'tokenizer.json'} 的预分词方式（{', '.join(kinds)}）。请用 transformers 部署。",
    )


def _steps(pre_tokenizer: dict) -> Iterator[dict]:
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer] if pre_tokenizer else []):
        yield from _steps(step) if "pretokenizers" in step else [step]
