"""Training: data and base → a checkpoint. XTuner trains; this plans the run, starts it, and says what became of it.

`python -m training.train …` is XTuner's own `train` command, with what it needs on a machine without OpenCV and
torchvision or without a GPU; torchrun starts that on each device.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from space.settings import NamesakeError, Settings
from training import record

HERE = Path(__file__).resolve().parent
DEEPSPEED = ("zero2", "zero3", "zero3_offload")


def train(
    settings: Settings,
    config: Path,
    *,
    resume: bool = False,
    restart: bool = False,
    auto_batch: bool = False,
    gpus: int = 1,
    nodes: int = 1,
    node_rank: int = 0,
    master: str = "",
    deepspeed: str = "",
    dry_run: bool = False,
) -> None:
    """Train on work/<run>/data and write work/<run>/checkpoints; `config` is the settings' file.

    A finished run whose inputs have not changed is left alone. Raises NamesakeError for what a person can mend: no
    data, too little memory or disk, a loss that is not finite, a stopped run (which `resume` continues).
    """
    from training import plan

    console = Console(stderr=True)
    folder, world = plan.checkpoints(settings), gpus * nodes
    last = last_checkpoint(folder)
    resuming = last if resume else None
    arguments = _arguments(settings, resuming, deepspeed)
    commands = [_torchrun(arguments, gpus, nodes, rank, master) for rank in range(nodes)]
    if not 0 <= node_rank < nodes:
        raise NamesakeError(f"--node-rank is {node_rank}: with --nodes {nodes} it goes from 0 to {nodes - 1}")
    if dry_run:
        for rank, command in enumerate(commands):
            typer.echo(f"# node {rank} 节点 {rank}\nNAMESAKE_CONFIG={shlex.quote(str(config))} {shlex.join(command)}")
        return

    if auto_batch and (world > 1 or deepspeed):
        raise NamesakeError("--auto-batch is for one GPU", "With several, set [train] batch and checkpointing.")
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise NamesakeError("--deepspeed: DeepSpeed is not installed", "Run: pip install deepspeed")
    made_from = plan.inputs(settings, world)
    if record.unchanged(folder, made_from) and not restart:
        typer.echo("train 训练: nothing has changed 没有变化. Next 下一步: python -m training convert")
        return
    found = plan.saved(settings, made_from)
    if resume and not last:
        raise NamesakeError(f"{folder} holds no checkpoint to resume", "Start without --resume.")
    if resume and not found:
        raise NamesakeError(
            "The settings, data or versions have changed since the run was stopped", "Start anew with --restart."
        )
    if last and found and not resume and not restart:
        raise NamesakeError(
            f"A stopped run lies in {folder}", "Continue it with --resume, or give it up with --restart."
        )
    chosen = found if resume else plan.make(settings, world)
    _preflight(console, settings, chosen)
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
        plan.save(settings, chosen, made_from)

    if world > 1 or deepspeed:
        _run_torchrun(commands[node_rank], config)
    else:
        while True:
            try:
                _run_here(config, _arguments(settings, resuming, ""))
                break
            except MemoryError as error:
                smaller = chosen.smaller()
                if resume or not (auto_batch and smaller):
                    raise _out_of_memory(chosen, smaller is not None) from error
                chosen = smaller
                checkpointing = ", with activation checkpointing" if chosen.checkpointing else ""
                console.print(f"out of memory 内存不足: --auto-batch goes on with batch {chosen.batch}{checkpointing}")
                shutil.rmtree(folder, ignore_errors=True)
                plan.save(settings, chosen, made_from)
    if node_rank:
        return
    last = last_checkpoint(folder)
    done = int(re.search(r"\d+", last.stem)[0]) // chosen.accumulate
    if done < chosen.steps:
        raise NamesakeError(
            f"Stopped at step {done} of {chosen.steps}; the checkpoint is kept",
            "Continue with: python -m training train --resume",
            zh=f"已在第 {done}/{chosen.steps} 步停下，检查点已保存。继续：python -m training train --resume",
        )
    record.write(
        folder, made_from, checkpoint=last.name, method=chosen.method, steps=chosen.steps, seed=settings.train.seed
    )
    typer.echo(f"train 训练: {chosen.steps} steps 步, in {last}. Next 下一步: python -m training convert")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end: mmengine names it in last_checkpoint only then."""
    with contextlib.suppress(FileNotFoundError):
        path = folder / Path((folder / "last_checkpoint").read_text().strip()).name
        return path if path.exists() else None
    return None


def xtuner_train(arguments: list[str]) -> None:
    """Run XTuner's `train` command in this process.

    Appends stand-ins for OpenCV and torchvision to the path: installed ones come first. mmengine can't start gloo
    without CUDA, so that on a CPU the process group is made here. Raises MemoryError when the memory is too small.
    """
    if str(HERE / "stand_ins") not in sys.path:
        sys.path.append(str(HERE / "stand_ins"))
    # With accumulation the schedule moves on before the optimizer's first step, as it is meant to.
    warnings.filterwarnings("ignore", "Detected call of `scheduler.step")
    import torch
    from xtuner.tools import train as xtuner

    if "RANK" in os.environ and not torch.cuda.is_available() and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    command, sys.argv = sys.argv, [xtuner.__file__, str(HERE / "xtuner_config.py"), *arguments]
    try:
        xtuner.main()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise MemoryError(str(error).splitlines()[0]) from None  # the error's own frames hold on to the memory
    finally:
        sys.argv = command


def _run_here(config: Path, arguments: list[str]) -> None:
    """Train on one device, in this process. Raises MemoryError when its memory is too small."""
    import torch

    os.environ["NAMESAKE_CONFIG"] = str(config.resolve())
    try:
        xtuner_train(arguments)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _run_torchrun(command: list[str], config: Path) -> None:
    """Train on several devices. Ctrl-C reaches the workers by itself, SIGTERM is handed on; both let them save."""
    process = subprocess.Popen(command, env=os.environ | {"NAMESAKE_CONFIG": str(config.resolve())}, cwd=HERE.parent)
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status:
        raise NamesakeError(f"torchrun ended with status {status}", "Its first error is above.")


def _arguments(settings: Settings, resume: Path | None, deepspeed: str) -> list[str]:
    """The options of XTuner's `train` command."""
    if deepspeed and deepspeed not in DEEPSPEED:
        raise NamesakeError(f"--deepspeed is {deepspeed!r}", f"One of {', '.join(DEEPSPEED)}.")
    options = {"--work-dir": settings.work / "checkpoints", "--resume": resume}
    options["--deepspeed"] = f"deepspeed_{deepspeed}" if deepspeed else None
    return [str(part) for option in options.items() if option[1] for part in option]


def _torchrun(arguments: list[str], gpus: int, nodes: int, rank: int, master: str) -> list[str]:
    """The command that starts one node's processes. Raises NamesakeError for options that don't go together."""
    if gpus < 1 or nodes < 1:
        raise NamesakeError("--gpus and --nodes must be at least 1")
    if nodes > 1 and not re.fullmatch(r"[^\s:]+:\d+", master):
        raise NamesakeError(f"--nodes {nodes} needs --master HOST:PORT", "Give the first node's address to every node.")
    host, _, port = master.rpartition(":")
    meeting = ["--master-addr", host, "--master-port", port] if master else ["--standalone"]
    return [
        sys.executable, "-m", "torch.distributed.run",
        "--nnodes", str(nodes), "--node-rank", str(rank), "--nproc-per-node", str(gpus), *meeting,
        "-m", "training.train", *arguments, "--launcher", "pytorch",
    ]  # fmt: skip


def _preflight(console: Console, settings: Settings, chosen) -> None:
    """Print what is about to happen. Raises NamesakeError when the disk is too small for the checkpoints."""
    from training import base, plan

    gib = plan.GIB
    disk = plan.free_disk(settings)
    took = plan.seconds(chosen, plan.read_shape(base.folder(settings), settings.train.targets), settings.train.epochs)
    table = Table(title="train 训练", show_header=False, title_justify="left")
    full = chosen.tokens / chosen.packs / chosen.length
    shared = f"; shared system prompts leave {chosen.computed:,} to compute" * (chosen.computed < chosen.tokens)
    for name, value in {
        "data 数据": f"{chosen.conversations:,} conversations, {chosen.tokens:,} tokens, {chosen.answers:,} of answers",
        "packs 打包": f"{chosen.packs} of {chosen.length} tokens, {full:.0%} full" + shared,
        "steps 步数": f"{chosen.steps} of {chosen.step} pack(s), {settings.train.epochs:g} epochs, "
        f"warm-up {chosen.warmup}, rate {settings.train.rate:g}",
        "choices 选择": "\n".join(chosen.reasons),
        "memory 内存": f"{chosen.needs / gib:.1f} GiB needed, {chosen.free / gib:.1f} GiB free",
        "disk 磁盘": f"{chosen.disk / gib:.2f} GiB needed, {disk / gib:.1f} GiB free",
        "versions 版本": ", ".join(f"{name} {version}" for name, version in plan.versions().items()),
        "time 预计时间": f"about {max(1, round(took / 60))} min",
    }.items():
        table.add_row(name, value)
    console.print(table)
    if chosen.needs > chosen.free:
        console.print("[yellow]memory may not be enough 内存可能不够: --auto-batch retries with less")
    if chosen.disk > disk:
        raise NamesakeError(
            f"{settings.work}: checkpoints take {chosen.disk / gib:.1f} GiB, and {disk / gib:.1f} GiB are free",
            "Make room, or lower [train] rank.",
        )


def _out_of_memory(chosen, can_shrink: bool) -> NamesakeError:
    advice = ["run again with --auto-batch"] if can_shrink else []
    advice += [f"set [train] batch below {chosen.batch}"] if chosen.batch > 1 else []
    advice += [] if chosen.checkpointing else ['[train] checkpointing = "on"']
    advice += ['[train] method = "qlora"'] if chosen.method != "qlora" else []
    advice += ["a smaller [data] max_length"]
    return NamesakeError(
        f"Out of memory with method {chosen.method}, batch {chosen.batch}, checkpointing "
        f"{'on' if chosen.checkpointing else 'off'} ({chosen.free / 2**30:.1f} GiB were free)",
        "Try one of: " + ", ".join(advice),
    )


if __name__ == "__main__":
    try:
        xtuner_train(sys.argv[1:])
    except NamesakeError as error:
        sys.exit(f"error: {error}")
    except MemoryError as error:
        sys.exit(f'error: {error}. Lower [train] batch or [data] max_length, or set checkpointing = "on"')
