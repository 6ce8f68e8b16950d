"""XTuner's checkpoint → a peft adapter, reading the trained tensors only and nothing of the base."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

from space.settings import NamesakeError, Settings
from training import record, shards


def convert(settings: Settings, checkpoint: Path | None = None, *, half: bool = False) -> Path:
    """Write the newest checkpoint's trained tensors to work/<run>/adapter/ and return that folder.

    LoRA tensors become a peft adapter; a checkpoint of all weights (method "full") becomes weights for `merge`.
    `checkpoint`: another than the one that `train` ended with. `half`: store float16 as XTuner's own converter does by
    default, instead of what was trained. Raises NamesakeError where there is no checkpoint or it cannot be read.
    """
    import typer

    folder, trained = settings.work / "adapter", record.read(settings.work / "checkpoints")
    if checkpoint is None:
        if not trained:
            raise NamesakeError(
                f"{settings.work / 'checkpoints'} holds no finished training",
                "Run: python -m training train",
                zh=f"{settings.work / 'checkpoints'} 里没有完成的训练，请先运行 python -m training train。",
            )
        checkpoint = settings.work / "checkpoints" / trained["checkpoint"]
    file = _file(checkpoint)
    described = assistant(settings, trained)
    inputs = {"checkpoint": [checkpoint.name, file.stat().st_size, file.stat().st_mtime_ns], "half": half}
    inputs["assistant"] = described
    if record.unchanged(folder, inputs):
        typer.echo("convert 转换: nothing has changed 没有变化. Next 下一步: python -m training merge")
        return folder
    tensors = {_peft_name(name): tensor for name, tensor in trained_tensors(file).items()}
    lora = {name: tensor for name, tensor in tensors.items() if ".lora_A." in name or ".lora_B." in name}
    plan = _plan(lora or tensors, half)
    with shards.aside(folder, sum(tensor.size for tensor in plan)) as aside:
        if lora:
            # Without the hub's prefix peft's own loader finds it; the embedded model is on no hub.
            named = (
                None if settings.base.model == "embedded" else described["base"]["model"].split(":")[-1].split("@")[0]
            )
            config = adapter_config(lora, described["settings"]["train"], named)
            _write(aside / "adapter_config.json", config)
            hashes = {"adapter_model.safetensors": shards.write_file(aside / "adapter_model.safetensors", plan)}
        else:
            hashes = shards.write(aside, plan, shards.size_of("2GB"))
        _write(aside / "assistant.json", described)
        record.write(aside, inputs, weights=hashes)
    size = sum(tensor.size for tensor in plan) / 1e6
    kind = "adapter 适配器" if lora else "full weights 全量权重"
    typer.echo(f"convert 转换: {kind}, {size:.1f} MB, in {folder}. Next 下一步: python -m training merge")
    return folder


def assistant(settings: Settings, trained: dict) -> dict:
    """assistant.json: who the assistant is, and what it was made from. `trained`: the training step's run.json."""
    made_from = trained.get("inputs", {})
    data = dataclasses.asdict(settings.data)
    data["files"] = [Path(name).name for name in data["files"]]  # a path of this machine is nobody else's business
    source = settings.base.model
    if source != "embedded" and (settings.folder / source).is_dir():
        source = (settings.folder / source).resolve().name
    return json.loads(
        json.dumps(
            {
                "name": dataclasses.asdict(settings.assistant.name),
                "author": dataclasses.asdict(settings.assistant.author),
                "persona": settings.assistant.system_prompt,
                "languages": settings.assistant.languages,
                "base": {"model": source, "revision": settings.base.revision},
                "data": made_from.get("data", ""),
                "settings": {
                    "data": data,
                    "train": dataclasses.asdict(settings.train)
                    | made_from.get("train", {})
                    | ({"method": trained["method"]} if "method" in trained else {}),
                },
                "versions": made_from.get("versions", {}),
                "seed": trained.get("seed", settings.train.seed),
            }
        )
    )


def trained_tensors(file: Path) -> dict:
    """The tensors of an mmengine checkpoint's model, mapped from the file and read when they are used.

    Beside them a checkpoint holds optimizer, schedules and logs, pickled with classes of other packages. Each of these
    classes is replaced by an inert stand-in, so that none of their code is imported or runs. Raises NamesakeError.
    """
    import torch
    from torch import serialization

    try:
        names = serialization.get_unsafe_globals_in_checkpoint(file)
        with serialization.safe_globals([(_inert(name), name) for name in names]):
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, KeyError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise NamesakeError(
            f"{file} is not a whole checkpoint of XTuner: {reason}",
            "Run: python -m training train",
            zh=f"{file} 不是完整的 XTuner 检查点。请重新训练：python -m training train。",
        ) from error
    state = saved.get("state_dict", saved.get("module")) if isinstance(saved, dict) else None
    tensors = {name: tensor for name, tensor in (state or {}).items() if isinstance(tensor, torch.Tensor)}
    if not tensors:
        raise NamesakeError(
            f"{file} holds no trained tensors",
            "Give a checkpoint that XTuner saved (iter_….pth).",
            zh=f"{file} 里没有训练得到的张量。请指定 XTuner 保存的检查点（iter_….pth）。",
        )
    return tensors


def _inert(name: str) -> type:
    """A class that can be made and filled like any other, and does nothing."""
    body = {"__new__": lambda cls, *_, **__: object.__new__(cls), "__init__": lambda self, *_, **__: None}
    return type(name, (), body | {"__setstate__": lambda self, state: None})


def _file(checkpoint: Path) -> Path:
    """The file that holds the model's state: the checkpoint itself, or a file in the folder that DeepSpeed makes."""
    file = checkpoint / "mp_rank_00_model_states.pt" if checkpoint.is_dir() else checkpoint
    if checkpoint.is_dir() and not file.is_file():
        raise NamesakeError(
            f"{checkpoint} is spread over several files (ZeRO-3)",
            "Let XTuner read it: python -m xtuner.tools.model_converters.pth_to_hf CONFIG CHECKPOINT ADAPTER",
            zh=f"{checkpoint} 分散在多个文件里（ZeRO-3）。请用 XTuner 自己的 pth_to_hf 转换。",
        )
    if not file.is_file():
        raise NamesakeError(
            f"{file} is not there",
            "Run: python -m training train",
            zh=f"{file} 不存在，请先运行 python -m training train。",
        )
    return file


def _peft_name(name: str) -> str:
    """A tensor's name in XTuner's checkpoint → in peft's adapter or the base's weights."""
    return name.removeprefix("llm.").replace(".default.", ".")


def _plan(tensors: dict, half: bool) -> list[shards.Planned]:
    names = {dtype: name for name, dtype in shards.dtypes().items()}

    def planned(name, tensor):
        dtype = "F16" if half else names[tensor.dtype]

        def make():
            return shards.data(tensor.to(shards.dtypes()[dtype]))

        return shards.Planned(name, dtype, tuple(tensor.shape), make)

    return [planned(name, tensor) for name, tensor in sorted(tensors.items())]


def adapter_config(lora: dict, train: dict, base: str | None) -> dict:
    """peft's adapter_config.json for LoRA tensors; rank and adapted modules are read off the tensors themselves.

    The keys are those of peft.LoraConfig.
    """
    ranks = {tensor.shape[0] for name, tensor in lora.items() if ".lora_A." in name}
    if len(ranks) != 1:
        raise NamesakeError(
            "The checkpoint's LoRA tensors have different ranks", "Train with one rank for all modules."
        )
    modules = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in lora}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": ranks.pop(),
        "lora_alpha": train["alpha"],
        "lora_dropout": train["dropout"],
        "target_modules": sorted(train["targets"] or modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
