"""python -m training data|base|train|convert|merge|export|evaluate|all: from a name to merged weights that know it.

Each step lives in the module of its name, which is imported only when it runs: help is instant.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from space.settings import NamesakeError, load

app = typer.Typer(
    help="""From a name to merged weights that know it. 从一个名字，到认得这个名字的模型权重。

    The steps, in order, are base, data, train, convert, merge and evaluate; `all` runs them all. Each reads the
    settings file and what the step before made in work/<run>/, skips itself when nothing has changed, and says what it
    made and what comes next. 依次为 base、data、train、convert、merge、evaluate，all 一次做完；没有变化的自动跳过。""",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Quantization = StrEnum("Quantization", ["q4_k_m", "q8_0"])
DeepSpeed = StrEnum("DeepSpeed", ["zero2", "zero3", "zero3_offload"])
Config = Annotated[Path, typer.Option(help="The settings file. 设置文件。")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a stopped run from its last checkpoint. 接着训练。")]
Restart = Annotated[
    bool, typer.Option("--restart", help="Give a stopped run up, and begin anew. 放弃旧进度，重新训练。")
]
AutoBatch = Annotated[
    bool, typer.Option("--auto-batch", help="After out-of-memory, retry with a smaller batch. 内存不足时自动减小批量。")
]
Quick = Annotated[bool, typer.Option("--quick", help="Evaluate on a fixed sample of the questions. 只评测一部分题目。")]
SETTINGS = Path("assistant.toml")


@app.command()
def base(config: Config = SETTINGS) -> None:
    """Fetch the base model; InternLM2.x becomes native Llama layout, so that no remote code ever runs. 准备基座模型。

    [base] model names it: "embedded", a folder, or a repository such as
    modelscope:Shanghai_AI_Laboratory/internlm2_5-7b-chat.
    """
    with _told():
        from training.base import base

        base(load(config))


@app.command()
def data(
    config: Config = SETTINGS,
    preview: Annotated[int, typer.Option(min=0, help="Show so many rows as the model will see them. 预览若干条。")] = 0,
) -> None:
    """Write work/<run>/data/train.jsonl: identity rows, your own files, and replay rows. 生成训练数据。

    [data] sets how many of each. Every row of your files is checked first; when anything is wrong, all problems are
    listed as file:line: what: how to fix, and nothing is written. --preview shows text, token ids, and which tokens
    carry loss.
    """
    with _told():
        from training.data import data

        data(load(config), preview)


@app.command()
def train(
    config: Config = SETTINGS,
    resume: Resume = False,
    restart: Restart = False,
    auto_batch: AutoBatch = False,
    gpus: Annotated[int, typer.Option(min=1, help="Processes on this machine, one for each GPU. 本机显卡数。")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Machines. 机器数。")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="Which of the machines this is, from 0. 本机序号。")] = 0,
    master: Annotated[str, typer.Option(metavar="HOST:PORT", help="The first machine's address. 首台机器地址。")] = "",
    deepspeed: Annotated[DeepSpeed | None, typer.Option(help="Share the memory among GPUs. 显存分摊方式。")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command of each machine, and run nothing. 只打印命令。")
    ] = False,
) -> None:
    """Train with XTuner: QLoRA, LoRA or all weights, as [train] says or memory allows. 训练。

    Prints first what it chose and why: steps, memory, disk, time. Ctrl-C leaves a checkpoint that --resume continues.
    Beside the checkpoints lie metrics.jsonl, loss.png, and samples.jsonl, answers to held-out questions on the way.

    Several GPUs: --gpus 8. Several machines: the same on each, with its own --node-rank, for example

    python -m training train --gpus 8 --nodes 2 --node-rank 0 --master 10.0.0.1:29500 --deepspeed zero2
    """
    with _told():
        from training.train import train

        train(
            load(config),
            config,
            resume=resume,
            restart=restart,
            auto_batch=auto_batch,
            gpus=gpus,
            nodes=nodes,
            node_rank=node_rank,
            master=master,
            deepspeed=deepspeed or "",
            dry_run=dry_run,
        )


@app.command()
def convert(config: Config = SETTINGS) -> None:
    """Write the trained adapter from the checkpoint, in seconds and without loading the base. 导出 LoRA 适配器。"""
    with _told():
        from training.convert import convert

        convert(load(config))


@app.command()
def merge(
    config: Config = SETTINGS,
    max_shard_size: Annotated[str, typer.Option(help="The largest weights file. 单个权重文件的上限。")] = "2GB",
    verify: Annotated[
        bool, typer.Option("--verify", help="Only check the merged folder against its SHA256SUMS. 只校验。")
    ] = False,
) -> None:
    """Merge the adapter into the base, shard by shard: work/<run>/merged loads anywhere. 合并权重。

    The persona becomes the chat template's default system prompt, so that any client meets the same assistant.
    """
    with _told():
        from training import merge

        settings = load(config)
        if verify:
            typer.echo(f"merge 合并: verified 校验通过, {merge.verify(settings.work / 'merged')}")
        else:
            merge.merge(settings, max_shard_size=max_shard_size)


@app.command()
def export(
    config: Config = SETTINGS,
    gguf: Annotated[Quantization, typer.Option(help="How much to round. 量化方式。")] = "q4_k_m",
) -> None:
    """Write a GGUF file from the merged weights, for machines without a GPU. 导出 GGUF，供没有显卡的机器使用。

    q4_k_m: a third of the size, the fastest. q8_0: half the size, hardly any loss. Then measure what rounding cost:

    python -m training evaluate --after work/RUN/gguf-q4_k_m/RUN-q4_k_m.gguf
    """
    with _told():
        from training.export import export

        export(load(config), gguf)


@app.command()
def evaluate(
    config: Config = SETTINGS,
    samples: Annotated[int, typer.Option(min=0, help="Sampled answers beside the greedy one. 额外采样次数。")] = 0,
    before: Annotated[str, typer.Option(help="What to compare with, by default the base. 对照模型。")] = "",
    after: Annotated[str, typer.Option(help="Merged folder, adapter, GGUF file or page's URL. 被评测的模型。")] = "",
    quick: Quick = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the answers of a stopped evaluation. 接着评测。")
    ] = False,
) -> None:
    """Does it know its name, keep to it, and is all else as it was? Ends with the gate that publishing asks for. 评测。

    Held-out questions, with the persona's prompt, none and another, before and after. [gate] sets what is enough; exit
    status 1 when it is not reached.
    """
    with _told():
        from training.evaluate import evaluate

        passed = evaluate(load(config), samples=samples, before=before, after=after, quick=quick, resume=resume)
    raise typer.Exit(0 if passed else 1)


@app.command(name="all")
def every(
    config: Config = SETTINGS,
    resume: Resume = False,
    restart: Restart = False,
    auto_batch: AutoBatch = False,
    quick: Quick = False,
) -> None:
    """All steps, one after the other, ending with the evaluation's gate. 从头做到尾，以评测把关。

    Steps that are done already are skipped: after any stop the same command goes on, with --resume where training was
    stopped.
    """
    with _told():
        settings = load(config)
        from training import base, convert, data, evaluate, merge, train

        base.base(settings)
        data.data(settings)
        train.train(settings, config, resume=resume, restart=restart, auto_batch=auto_batch)
        convert.convert(settings)
        merge.merge(settings)
        passed = evaluate.evaluate(settings, quick=quick)
    raise typer.Exit(0 if passed else 1)


@contextmanager
def _told() -> Iterator[None]:
    """What a person can mend is told in one line, with exit status 2."""
    try:
        yield
    except NamesakeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("Stopped 已停下", err=True)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    sys.exit(app(prog_name="python -m training"))
