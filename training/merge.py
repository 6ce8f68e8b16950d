"""Adapter + base → merged weights, tensor by tensor: what a visitor's chat page or any other client loads."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from space import weights
from space.prompt import Prompt, plain_template, with_persona
from space.settings import NamesakeError, Settings
from training import base, native, record, shards
from training.convert import assistant

SUMS = "SHA256SUMS"


def merge(settings: Settings, *, max_shard_size: str = "2GB", folder: Path | None = None) -> Path:
    """Merge work/<run>/adapter/ into the base; returns the merged folder, work/<run>/merged/ unless `folder` is given.

    Sums are float32, stored in the base's own dtype, as peft's merge of a float32 model would be; a few rows of one
    tensor are in memory at a time. The folder appears whole or not at all; only a folder that a merge made is replaced.
    Raises NamesakeError where adapter and base do not belong together, the base is quantized, or the target is in use.
    """
    import typer

    folder, largest = folder or settings.work / "merged", shards.size_of(max_shard_size)
    adapter, source = settings.work / "adapter", base.folder(settings)
    converted = record.read(adapter)
    if not converted:
        raise NamesakeError(
            f"{adapter} is not there",
            "Run: python -m training convert",
            zh=f"{adapter} 不存在，请先运行 python -m training convert。",
        )
    stored = shards.find(source)
    described = assistant(settings, record.read(settings.work / "checkpoints"))
    inputs = {
        "assistant": described,
        "adapter": converted["weights"],
        "base": shards.fingerprint(stored),
        "max_shard_size": largest,
    }
    if record.unchanged(folder, inputs):
        typer.echo(f"merge 合并: nothing has changed 没有变化, {folder}. Next 下一步: python -m training evaluate")
        return folder
    if folder.exists() and not record.read(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise NamesakeError(
            f"{folder} is not empty, and no merge made it",
            "Move it away.",
            zh=f"{folder} 不是空文件夹，也不是合并得到的。请移走它。",
        )
    tensors = plan(stored, adapter, native.read_config(source))
    size = sum(tensor.size for tensor in tensors)
    with shards.aside(folder, size) as aside, shards.progress("merge 合并", size) as advance:
        _write_around(aside, source, described)
        # A `.bin` is mapped whole: one at a time. What a power cut leaves SHA256SUMS tells, and waiting for the disk
        # would take longer than all else.
        together = 4 if all(tensor.start is not None for tensor in stored) else 1
        hashes = shards.write(aside, tensors, largest, advance, together=together, flush=False)
        record.write(aside, inputs)
        _write_sums(aside, hashes)
    typer.echo(f"merge 合并: {size / 1e9:.2f} GB in {folder}. Next 下一步: python -m training evaluate")
    return folder


def plan(stored: list[shards.Stored], adapter: Path, config: dict) -> list[shards.Planned]:
    """The merged tensors: the base's, each with what the adapter adds, or replaced where all weights were trained.

    Raises NamesakeError where the adapter is of another base or another kind, or the base is quantized.
    """
    if "quantization_config" in config:
        raise NamesakeError(
            "The base is quantized, and an adapter is never merged into rounded weights",
            "Set [base] model to the original weights.",
            zh="底座是量化后的模型，不能把适配器合并进去。请把 [base] model 设为原始权重。",
        )
    if (adapter / "adapter_config.json").is_file():
        added = _lora(adapter)
        planned = [_adapted(tensor, added.pop(tensor.name, None)) for tensor in stored]
        strange = added.keys()
    else:
        trained = {tensor.name: tensor for tensor in shards.find(adapter)}
        if config.get("tie_word_embeddings"):
            trained.pop("lm_head.weight", None)  # the embeddings under their other name
        planned = [_trained(tensor, trained.pop(tensor.name, None)) for tensor in stored]
        strange = trained.keys()
    if strange:
        raise _mismatch(f"the base has no {min(strange)}")
    return planned


Added = tuple[
    shards.Stored, shards.Stored, float
]  # LoRA's A (rank, in) and B (out, rank), and the scale of their product


def _lora(adapter: Path) -> dict[str, Added]:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    other = (
        "use_dora",
        "use_rslora",
        "fan_in_fan_out",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "lora_bias",
    )
    used = [key for key in other if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or used:
        raise _mismatch(f"it is not plain LoRA ({', '.join(used) or config.get('peft_type')})")
    tensors = {tensor.name: tensor for tensor in shards.read(adapter / "adapter_model.safetensors")}
    added = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        pair = tensors.pop(name), tensors.pop(f"{module}.lora_B.weight", None)
        if not pair[1]:
            raise _mismatch(f"{module} has no lora_B")
        added[f"{module.removeprefix('base_model.model.')}.weight"] = (*pair, config["lora_alpha"] / config["r"])
    if tensors:
        raise _mismatch(f"it holds {min(tensors)}")
    return added


def _adapted(tensor: shards.Stored, added: Added | None) -> shards.Planned:
    if not added:
        return shards.Planned(tensor.name, tensor.dtype, tensor.shape, tensor.copy)
    a, b, scale = added
    if (b.shape[0], a.shape[1]) != tensor.shape or a.shape[0] != b.shape[1]:
        raise _mismatch(f"{tensor.name} is {tensor.shape}, and the adapter's {b.shape} × {a.shape}")

    def merged() -> Iterator[memoryview]:
        right, left = a.load().float(), b.load().float()
        for rows in tensor.blocks():
            total = left[rows] @ right
            total *= scale
            total += tensor.load(rows)  # in float32, as `total` is
            yield from _checked(total, tensor)

    return _planned(tensor, merged)


def _trained(tensor: shards.Stored, trained: shards.Stored | None) -> shards.Planned:
    if not trained or trained.shape != tensor.shape:
        raise _mismatch(f"it has no {tensor.name} of {tensor.shape}")

    def replaced() -> Iterator[memoryview]:
        for rows in tensor.blocks():
            yield from _checked(trained.load(rows), tensor)

    return _planned(tensor, replaced)


def _planned(tensor: shards.Stored, make: Callable) -> shards.Planned:
    if tensor.dtype not in shards.dtypes():
        raise NamesakeError(
            f"{tensor.file}: {tensor.name} is {tensor.dtype}, which is quantized",
            "Set [base] model to the original weights.",
            zh=f"{tensor.file} 里的 {tensor.name} 是量化类型 {tensor.dtype}。请把 [base] model 设为原始权重。",
        )
    return shards.Planned(tensor.name, tensor.dtype, tensor.shape, make)


def _checked(values, tensor: shards.Stored) -> Iterator[memoryview]:
    import torch

    stored = values.to(shards.dtypes()[tensor.dtype])
    if not math.isfinite(stored.sum(dtype=torch.float32)):  # much faster than a look at each
        raise NamesakeError(
            f"{tensor.name} would hold values that are no numbers in {tensor.dtype}",
            "Train again with a lower [train] rate.",
            zh=f"{tensor.name} 合并后有无法用 {tensor.dtype} 表示的数值。请调低 [train] rate 后重新训练。",
        )
    return shards.data(stored)


def _mismatch(what: str) -> NamesakeError:
    return NamesakeError(
        f"The adapter does not belong to this base: {what}",
        "Run: python -m training train",
        zh=f"适配器与底座不匹配（{what}），请重新运行 python -m training train。",
    )


def _write_around(folder: Path, source: Path, described: dict) -> None:
    """All of the merged folder but the weights."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    config = native.both_forms(native.read_config(source))
    for private in ("_name_or_path", "auto_map"):
        config.pop(private, None)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key)}
    if (source / "generation_config.json").is_file():
        generation |= json.loads((source / "generation_config.json").read_text(encoding="utf-8"))
    ends = generation.get("eos_token_id", [])
    generation["eos_token_id"] = sorted({*(ends if isinstance(ends, list) else [ends]), *Prompt(tokenizer).end_ids})
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    weights.write_tokenizer_config(folder, tokenizer, with_persona(plain_template(tokenizer), described["persona"]))
    for name, values in (("config", config), ("generation_config", generation), ("assistant", described)):
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def _write_sums(folder: Path, hashes: dict[str, str]) -> None:
    names = sorted(path.name for path in folder.iterdir())
    lines = [f"{hashes.get(name) or record.sha256(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def verify(folder: Path) -> str:
    """Check every file of a merged folder against its SHA256SUMS; returns the identity of its weights.

    The identity is the SHA-256 of SHA256SUMS. Raises NamesakeError that names what is changed, missing or not listed.
    """
    if not (folder / SUMS).is_file():
        raise NamesakeError(
            f"{folder} holds no {SUMS}", "Run: python -m training merge", zh=f"{folder} 里没有 {SUMS}，请运行 merge。"
        )
    text = (folder / SUMS).read_text(encoding="utf-8")
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
    there = {path.name for path in folder.iterdir()} - {SUMS}
    size = sum((folder / name).stat().st_size for name in there)
    wrong = [f"{name} is not listed" for name in sorted(there - listed.keys())]
    with shards.progress("verify 校验", size) as advance:
        for name, digest in listed.items():
            if name not in there:
                wrong.append(f"{name} is missing")
            elif record.sha256(folder / name) != digest:
                wrong.append(f"{name} has changed")
            else:
                advance((folder / name).stat().st_size)
    if wrong:
        raise NamesakeError(
            f"{folder}: {'; '.join(wrong)}",
            "Move it away, and run: python -m training merge",
            zh=f"{folder} 与 {SUMS} 不符：{'；'.join(wrong)}。请移走它，再运行 python -m training merge。",
        )
    return hashlib.sha256(text.encode()).hexdigest()
