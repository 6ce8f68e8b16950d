"""mmengine hooks: reproducible randomness, checkpoints that can always be resumed, progress and metrics, samples."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from pathlib import Path

import torch
from mmengine.dist import all_reduce, get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, Hook
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from space.settings import NamesakeError, Settings, load
from training import evaluate


class Seeds(Hook):
    """Seeds each iteration by its number and rank: a resumed run draws what an unbroken one would have drawn."""

    def __init__(self, seed: int):
        self.seed = seed

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        torch.manual_seed((self.seed << 32) + runner.iter * get_world_size() + get_rank())


class Checkpoint(CheckpointHook):
    """mmengine's checkpoints, saved at whole steps only, and also when the run is asked to stop (Ctrl-C, SIGTERM)."""

    def __init__(self, accumulate: int, **options):
        super().__init__(**options)
        self.accumulate = accumulate
        self.asked = 0
        self.handlers = {}

    def before_train(self, runner):
        super().before_train(runner)
        if threading.current_thread() is threading.main_thread():
            self.handlers = {one: signal.signal(one, self.ask) for one in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, frame):
        """The handler of both signals; a second Ctrl-C does not wait for the step's end."""
        if number == signal.SIGINT and self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if (runner.iter + 1) % self.accumulate:
            return  # gradients that are not applied yet would be lost
        asked = torch.tensor(self.asked, device=next(runner.model.parameters()).device)
        all_reduce(asked, "max")
        if asked:
            self._save_checkpoint(runner)
            runner.train_loop.stop_training = True
        else:
            super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def before_save_checkpoint(self, runner, checkpoint):
        # Their pickled classes would keep torch.load(weights_only=True) from reading the file; nothing here needs them.
        checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}

    def after_train(self, runner):
        super().after_train(runner)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Progress(Hook):
    """The progress bar, metrics.jsonl (a line a step) and loss.png; stops a run that can't come to anything.

    Raises NamesakeError when the loss is not finite, and when the rate has not risen to `rate` after `warmup` steps.
    """

    def __init__(self, steps: int, accumulate: int, warmup: int, rate: float):
        self.steps, self.accumulate, self.warmup, self.rate = steps, accumulate, warmup, rate

    def before_train(self, runner):
        self._same_plan_everywhere()
        self.path = Path(runner.work_dir) / "metrics.jsonl"
        done = runner.iter // self.accumulate
        kept = [line for line in read_metrics(self.path) if line["step"] <= done] if done else []
        self.console = Console(stderr=True)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (is_main_process() and self.console.is_terminal),
        )
        if is_main_process():
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.task = self.bar.add_task("training 训练", total=self.steps, completed=done, now="")
        self.bar.start()
        runner.console = self.bar.console if is_main_process() else None
        self._begin(runner)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter % self.accumulate == 0:
            self._begin(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.counts += torch.stack([outputs["sum"].double(), outputs["answers"].double(), outputs["tokens"].double()])
        if (runner.iter + 1) % self.accumulate:
            return
        all_reduce(self.counts, "sum")
        total, answers, tokens = self.counts.tolist()
        step = (runner.iter + 1) // self.accumulate
        rate = runner.optim_wrapper.get_lr()["lr"][0]
        loss = total / max(1.0, answers)
        self._check(step, loss, rate)
        seconds = time.perf_counter() - self.started
        metrics = {"step": step, "loss": loss, "rate": rate, "tokens": int(tokens), "seconds": round(seconds, 4)}
        if torch.cuda.is_available():
            metrics["memory"] = torch.cuda.max_memory_allocated()
        if not is_main_process():
            return
        with self.path.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        now = f"loss {loss:.3f} · rate {rate:.1e} · {tokens / seconds:,.0f} tokens/s"
        self.bar.update(self.task, completed=step, now=now)
        if not self.console.is_terminal and (step * 10 // self.steps > (step - 1) * 10 // self.steps or step == 1):
            self.console.print(f"training 训练 {step}/{self.steps} · {now}", highlight=False)

    def after_train(self, runner):
        self.bar.stop()
        if is_main_process():
            draw(read_metrics(self.path), self.path.with_name("loss.png"))

    def _begin(self, runner):
        self.started = time.perf_counter()
        self.counts = torch.zeros(3, dtype=torch.float64, device=next(runner.model.parameters()).device)

    def _check(self, step: int, loss: float, rate: float) -> None:
        if not math.isfinite(loss):
            self.bar.stop()
            raise NamesakeError(
                f"The loss is {loss} at step {step}",
                f"Lower [train] rate, now {self.rate:g}; if it goes on, look at the data with: "
                "python -m training data --preview 20",
            )
        if step == self.warmup + 1 and rate < 0.99 * self.rate:
            self.bar.stop()
            raise NamesakeError(
                f"The learning rate never rises: {rate:.2g} after {self.warmup} warm-up steps, not {self.rate:g}",
                "Compare param_scheduler in training/xtuner_config.py with [train] rate and warmup.",
            )

    def _same_plan_everywhere(self) -> None:
        if get_world_size() > 1:
            mine = (self.steps, self.accumulate, self.warmup)
            plans = [None] * get_world_size()
            torch.distributed.all_gather_object(plans, mine)
            if set(plans) != {mine}:
                raise NamesakeError(
                    "The nodes made different plans: their data, settings or free memory differ",
                    "Copy work/ and the settings file to every node, and set [train] method, batch and checkpointing.",
                )


class Samples(Hook):
    """Asks a few held-out questions with the persona's own prompt every so many iterations, 0 for never."""

    def __init__(self, config: str, folder: str, every: int):
        self.settings, self.folder, self.every = load(config), folder, every

    def before_train(self, runner):
        self.path = Path(runner.work_dir) / "samples.jsonl"
        self.engine = None
        if is_main_process() and not runner.iter:
            self.path.unlink(missing_ok=True)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if is_main_process() and (self.every_n_train_iters(runner, self.every) or self._last(runner)):
            self.ask(runner)

    def ask(self, runner) -> None:
        """Answer greedily with the model as it is now, show the answers and note them in samples.jsonl."""
        from transformers import AutoTokenizer

        from space.engine import Engine, Sampling

        model = runner.model.module if hasattr(runner.model, "module") else runner.model
        lm = model.causal_lm
        if self.engine is None:
            self.engine = Engine(lm, AutoTokenizer.from_pretrained(self.folder))
        system = {"role": "system", "content": self.settings.assistant.system_prompt}
        asked = questions(self.settings)
        model.eval()
        # Packs have no cache of keys and values; the sampling has.
        lm.config._attn_implementation, lm.config.use_cache = "sdpa", True
        try:
            with model.computing(), torch.compiler.set_stance("force_eager"):
                answers = self.engine.answer(
                    [[system, {"role": "user", "content": question}] for question in asked],
                    Sampling(temperature=0, max_new_tokens=48, repetition_penalty=1),
                )
        finally:
            lm.config._attn_implementation, lm.config.use_cache = "packed", False
            model.train()
        with self.path.open("a", encoding="utf-8") as file:
            for question, answer in zip(asked, answers, strict=True):
                line = {"iteration": runner.iter + 1, "question": question, "answer": answer.text}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                said = " ".join(answer.text.split())
                runner.console.print(
                    f"  {question} → {said}", style="dim", markup=False, highlight=False, soft_wrap=True
                )

    def _last(self, runner) -> bool:
        return bool(self.every) and self.is_last_train_iter(runner)


def questions(settings: Settings, count: int = 2) -> list[str]:
    """A few of the evaluation's held-out questions in each of the assistant's languages."""
    plain = [q for q in evaluate.questions() if q.category == "direct" and q.set == "identity" and len(q.turns) == 1]
    return [
        question.turns[0]
        for language in settings.assistant.languages
        for question in [q for q in plain if q.language == language and not q.system][:count]
    ]


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl: step, loss, rate, tokens and seconds of each step."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def draw(metrics: list[dict], path: Path) -> None:
    """The loss curve, with a running mean, and the rate below it, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, losses = [line["step"] for line in metrics], [line["loss"] for line in metrics]
    window = max(1, len(losses) // 20)
    means = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
    figure, (top, bottom) = pyplot.subplots(2, sharex=True, height_ratios=(3, 1), figsize=(8, 5), layout="constrained")
    top.plot(steps, losses, alpha=0.35)
    top.plot(steps, means, color="C0")
    top.set_ylabel("loss per answer token")
    bottom.plot(steps, [line["rate"] for line in metrics], color="C1")
    bottom.set_ylabel("rate")
    bottom.set_xlabel("step")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
