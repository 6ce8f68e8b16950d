"""What a run will be, decided before it starts: method, precision, batch, checkpointing, steps, memory, and why."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from space.settings import NamesakeError, Settings, load
from training import record

STEPS = 100  # a run should have at least this many steps, where the data allows it: fewer, larger ones learn less
STEP_PACKS = 4  # and a step has at most this many packs, or one for each process: more steps learn more
# What bounds a run on a GPU, with plain layers and with compiled ones: arithmetic (operations a second), or starting a
# layer's kernels, forward and backward (seconds); and what compiling takes. From docs/benchmarks.md, "Training".
PLAIN, COMPILED, COMPILING = (3.5e14, 7.5e-3), (4.9e14, 6.5e-3), 20
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """A run's decisions. `batch` and `accumulate` count packs, `world` processes."""

    method: str
    device: str  # cuda or cpu
    precision: str  # what is computed in: bfloat16, float16 or float32
    checkpointing: bool
    compiled: bool
    batch: int
    accumulate: int
    world: int
    length: int  # the most tokens in a pack, and in a conversation
    packs: int
    steps: int
    warmup: int  # steps
    answers: int  # tokens that carry loss, in the whole data
    tokens: int
    computed: int  # of these at most, where what a batch's conversations share counts once
    conversations: int
    needs: int  # bytes of memory on each device, estimated
    free: int
    disk: int  # bytes of checkpoints
    reasons: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Packs in one optimizer step."""
        return self.batch * self.accumulate * self.world

    def smaller(self) -> Plan | None:
        """The same steps with less memory, for after out-of-memory: a smaller batch, then checkpointing; then None."""
        together = self.batch * self.accumulate
        for batch in range(self.batch - 1, 0, -1):
            if together % batch == 0:
                return dataclasses.replace(self, batch=batch, accumulate=together // batch)
        return None if self.checkpointing else dataclasses.replace(self, checkpointing=True)


@dataclass(frozen=True)
class Shape:
    """The sizes that memory depends on, from config.json and the headers of the weights."""

    hidden: int
    inner: int
    kv: int
    layers: int
    vocab: int
    linear: int  # parameters of the decoder's linear layers
    other: int  # embeddings, lm_head, norms
    adapted: int  # rows and columns of the layers that get an adapter: times the rank, its parameters

    @property
    def parameters(self) -> int:
        return self.linear + self.other


def checkpoints(settings: Settings) -> Path:
    """Where a run's checkpoints, plan, metrics and picture are."""
    return settings.work / "checkpoints"


def inputs(settings: Settings, world: int) -> dict:
    """What the result depends on: a run whose inputs have not changed need not be made again."""
    from training import base, packs

    folder = base.folder(settings)
    weights = sorted((file.name, file.stat().st_size) for file in folder.glob("*.safetensors"))
    train = dataclasses.asdict(settings.train)
    for irrelevant in ("run", "save_steps", "ask_steps"):
        train.pop(irrelevant)
    return {
        "base": {"model": settings.base.model, "revision": settings.base.revision, "weights": weights},
        "data": record.sha256(packs.data_file(settings)),
        "max_length": settings.data.max_length,
        "train": train,
        "world": world,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of what trains, for the record."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "xtuner", "peft")}


def configured() -> tuple[str, Settings, Plan, str]:
    """What XTuner's configuration is made of: the settings' path ($NAMESAKE_CONFIG), settings, plan and base folder.

    The plan is the one that the launcher saved, or a new one where XTuner's own command line started this.
    """
    from training import base

    path = os.path.abspath(os.environ.get("NAMESAKE_CONFIG", "assistant.toml"))
    settings = load(path)
    world = int(os.environ.get("WORLD_SIZE", 1))
    plan = saved(settings, inputs(settings, world)) or make(settings, world)
    return path, settings, plan, str(base.folder(settings))


def save(settings: Settings, made: Plan, made_from: dict) -> None:
    """Keep the plan, so that every process, and a resumed run, follows the same one."""
    folder = checkpoints(settings)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"inputs": made_from, "plan": dataclasses.asdict(made)}, indent=2, ensure_ascii=False)
    (folder / "plan.json").write_text(text + "\n", encoding="utf-8")


def saved(settings: Settings, made_from: dict) -> Plan | None:
    """The saved plan if it was made from these inputs, and by this version of the program."""
    with contextlib.suppress(FileNotFoundError, TypeError):
        found = json.loads((checkpoints(settings) / "plan.json").read_text(encoding="utf-8"))
        if found["inputs"] == json.loads(json.dumps(made_from)):
            return Plan(**found["plan"] | {"reasons": tuple(found["plan"]["reasons"])})
    return None


def make(settings: Settings, world: int = 1) -> Plan:
    """Decide what the settings leave open. Raises NamesakeError when nothing fits, or the data gives no steps."""
    from training import base
    from training.packs import packed, rows, shared_heads

    train, data = settings.train, settings.data
    reasons: list[str] = []
    shape = read_shape(base.folder(settings), train.targets)
    device, precision, free = _device(reasons)
    if train.method == "qlora" and device != "cuda":
        raise NamesakeError(
            "[train] method is qlora, and there is no CUDA GPU here",
            'Set method = "lora", or "auto" to choose by memory.',
        )

    all_rows = rows(settings)
    lengths = [len(row.ids) for row in all_rows]
    length = data.max_length
    if not train.batch:  # of little data, shorter packs still make STEPS steps
        length = min(length, max(*lengths, 0, int(train.epochs * sum(lengths) / STEPS / world)))

    def needs(method: str, checkpointing: bool, batch: int) -> int:
        return memory(shape, method, precision, train.rank, batch * length, checkpointing, bool(train.dropout))

    methods = [train.method] if train.method != "auto" else ["lora", "qlora"] if device == "cuda" else ["lora"]
    checkpointings = [train.checkpointing == "on"] if train.checkpointing != "auto" else [False, True]
    choices = [(method, checkpointing) for method in methods for checkpointing in checkpointings]
    batch = train.batch or 1
    fitting = [choice for choice in choices if needs(*choice, batch) <= 0.9 * free]
    if not fitting and "auto" in (train.method, train.checkpointing) and not train.batch:
        least = needs(*choices[-1], 1)
        raise NamesakeError(
            f"Training needs about {least / GIB:.1f} GiB of memory, and {free / GIB:.1f} GiB of {device} are free",
            "Take a smaller base model, lower [data] max_length, or use a larger machine.",
        )
    method, checkpointing = (fitting or choices[-1:])[0]
    gib = f"{needs(method, checkpointing, batch) / GIB:.1f} of {free / GIB:.1f} GiB free"
    reasons.append(f"method {method}{'' if train.method == 'auto' else ' (set)'}: {gib}")
    reasons.append(
        f"activation checkpointing {'on' if checkpointing else 'off'}"
        f"{': it would not fit without' if checkpointing and train.checkpointing == 'auto' else ''}"
    )

    least_packs = max(1, -(-sum(lengths) // length))
    together = max(1, min(STEP_PACKS, int(train.epochs * least_packs / STEPS)) // world)
    if not train.batch:
        while 2 * batch * (train.accumulate or 1) <= together and needs(method, checkpointing, 2 * batch) <= 0.9 * free:
            batch *= 2
    accumulate = train.accumulate or max(1, together // batch)
    step = batch * accumulate * world
    reasons.append(f"{step} packs a step: batch {batch} × accumulate {accumulate} × {world} process(es)")

    made = packed(all_rows, length, step, batch, train.seed)
    packs = len(made)
    computed = sum(row.own for one in made for row in one) + packs // batch * sum(shared_heads(made).values())
    steps = round(train.epochs * packs / step)
    if steps < 2:
        raise NamesakeError(
            f"{len(lengths)} conversations make {steps} step(s), and warm-up alone takes one",
            "Add data, raise [train] epochs, or lower batch and accumulate.",
        )
    trainable = shape.parameters if method == "full" else train.rank * shape.adapted
    flop = arithmetic(shape, method, checkpointing, computed * train.epochs / world)
    compiled = _compiled(train.compile, device, flop, shape.layers * steps * accumulate, reasons)
    return Plan(
        method=method,
        device=device,
        precision=precision,
        checkpointing=checkpointing,
        compiled=compiled,
        batch=batch,
        accumulate=accumulate,
        world=world,
        length=length,
        packs=packs,
        steps=steps,
        warmup=min(steps - 1, max(1, round(train.warmup * steps))),
        answers=sum(row.answers for row in all_rows),
        tokens=sum(lengths),
        computed=computed,
        conversations=len(lengths),
        needs=needs(method, checkpointing, batch),
        free=free,
        disk=3 * 12 * trainable,  # weights and two moments in float32; two checkpoints, and a third being written
        reasons=tuple(reasons),
    )


def memory(
    shape: Shape, method: str, precision: str, rank: int, tokens: int, checkpointing: bool, dropout: bool = False
) -> int:
    """Bytes that a device needs to train on `tokens` at once, estimated; not yet held against a GPU.

    The bytes a layer keeps for a token's backward pass were counted with autograd's saved-tensor hooks on Llama layers
    with adapters on every linear layer: 4.2 × the MLP's width, 10 × the hidden width and 2 × that of keys and values,
    times the bytes of a number. A CPU's plain attention keeps some more (training/model.py, SHORT), and where a batch
    shares system prompts it is less: neither is counted here.
    """
    size = 4 if precision == "float32" else 2
    weights = {
        "qlora": 0.53 * shape.linear + 2 * shape.other,  # NF4 and its doubly quantized scales
        "lora": size * shape.parameters,
        "full": (4 if size == 4 else 6) * shape.parameters,  # float32, and autocast's copy
    }[method]
    trained = shape.parameters if method == "full" else rank * shape.adapted
    optimizer = (12 if method == "full" else 16) * trained
    layer = size * (4.2 * shape.inner + 10 * shape.hidden + 2 * shape.kv)
    layer += dropout * size * (shape.inner + 9 * shape.hidden)
    kept = layer + shape.layers * size * shape.hidden if checkpointing else shape.layers * layer
    loss = min(tokens, 1024) * shape.vocab * (size + 8)
    return int(1.1 * (weights + optimizer + kept * tokens + loss) + 0.8 * GIB)


@functools.lru_cache(1)
def read_shape(folder: Path, targets: tuple[str, ...] = ()) -> Shape:
    """A base model's sizes, without loading its weights."""
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    linear = other = adapted = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (safe_open is no dict)
                size = weights.get_slice(name).get_shape()
                if len(size) == 2 and not any(part in name for part in ("embed", "lm_head")):
                    linear += math.prod(size)
                    layer = name.removesuffix(".weight").rsplit(".", 1)[-1]
                    adapted += sum(size) if not targets or layer in targets else 0
                else:
                    other += math.prod(size)
    if not adapted:
        raise NamesakeError(
            f"[train] targets: {folder.name} has no linear layer named {' or '.join(targets)}",
            "Leave targets out to adapt all linear layers.",
        )
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return Shape(
        hidden=config["hidden_size"],
        inner=config["intermediate_size"],
        kv=width * (config.get("num_key_value_heads") or heads),
        layers=config["num_hidden_layers"],
        vocab=config["vocab_size"],
        linear=linear,
        other=other,
        adapted=adapted,
    )


def _device(reasons: list[str]) -> tuple[str, str, int]:
    """The device, the precision to compute in, and its free memory in bytes."""
    import psutil
    import torch

    if torch.cuda.is_available():
        precision = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
        free = torch.cuda.mem_get_info()[0]
        reasons.append(f"{precision} on {torch.cuda.get_device_name()}")
        return "cuda", precision, free
    # Where a CPU does not multiply bfloat16 itself it is emulated: 30 times slower than float32 where it was measured.
    able = torch.cpu.get_capabilities()
    precision = "bfloat16" if able.get("amx_bf16") or able.get("avx512_bf16") else "float32"
    reasons.append(f"{precision} on {torch.get_num_threads()} CPU threads")
    return "cpu", precision, psutil.virtual_memory().available


def _compiled(wish: str, device: str, flop: float, passes: int, reasons: list[str]) -> bool:
    """Whether the layers are compiled: on a GPU, where that makes the run shorter and a C compiler, which Triton calls,
    is there. `passes`: how often a batch goes through a layer."""
    if wish != "auto":
        reasons.append(f"compiled layers {wish} (set)")
        return wish == "on"
    if device != "cuda":
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    plain, compiled = (max(flop / speed, passes * each) for speed, each in (PLAIN, COMPILED))
    why = "no C compiler" if not compiler else "the run is short" if plain < compiled + COMPILING else ""
    reasons.append(
        f"compiled layers off: {why}" if why else "compiled layers on: the first step takes some twenty seconds longer"
    )
    return not why


def free_disk(settings: Settings) -> int:
    """Bytes free where the checkpoints go."""
    settings.work.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(settings.work).free


def seconds(made: Plan, shape: Shape, epochs: float) -> float:
    """A rough estimate of the run's time: its arithmetic at 0.4 (CPU: 0.7) of the speed of a matrix product here, or
    on a GPU, where that takes longer, starting its kernels."""
    import torch

    cuda = made.device == "cuda"
    size = 4096 if cuda else 1024
    a = torch.ones(size, size, dtype=getattr(torch, made.precision), device=made.device)
    for _ in range(3):  # the first warms up; reading an element waits for a GPU to end
        started = time.perf_counter()
        float((a @ a)[0, 0])
        took = time.perf_counter() - started
    speed = 2 * size**3 / took * (0.4 if cuda else 0.7)
    took = arithmetic(shape, made.method, made.checkpointing, made.computed * epochs / made.world) / speed
    each = (COMPILED if made.compiled else PLAIN)[1] if cuda else 0
    return max(took, shape.layers * made.steps * made.accumulate * each) + COMPILING * made.compiled


def arithmetic(shape: Shape, method: str, checkpointing: bool, tokens: float) -> float:
    """The floating-point operations of training on so many tokens.

    Adapters cost 2 a parameter and token forward and 2 backward, full training 2 more, checkpointing 2 more.
    """
    return (4 + 2 * (method == "full") + 2 * checkpointing) * shape.parameters * tokens
