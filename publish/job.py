"""One hub's share of publishing: check, model, space and verify, for the repositories that the settings name there."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from publish import card, contents, hardware, launch, token, verify
from publish import check as checks
from publish.contents import File
from publish.huggingface import HuggingFace
from publish.lfs import Pushed, belongs_in_lfs
from publish.modelscope import ModelScope
from space.settings import NamesakeError, load

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".gguf")


def jobs(config: Path, only: str | None) -> Iterator[Job]:
    """A job for each hub that the settings name a model on, or for one of them. Raises NamesakeError where none."""
    settings = load(config)
    hubs = [hub for hub in (ModelScope, HuggingFace) if only in (None, hub.name)]
    named = [hub for hub in hubs if checks.names(settings, hub.name)[0]]
    if not named:
        where = f" on {only}" if only else ""
        raise NamesakeError(
            f"{config}: [hub] names no model{where} to publish",
            f'Say where: model = "{only or "modelscope"}:your-name/your-assistant".',
            zh=f'{config} 的 [hub] 没有写要发布到哪里，例如 model = "{only or "modelscope"}:用户名/模型名"。',
        )
    for hub in named:
        yield Job(settings, config, hub)


class Job:
    """What is published of one run to one hub. What it writes here lies in work/<run>/publish/<hub>/."""

    def __init__(self, settings, config: Path, hub):
        self.settings, self.config = settings, config
        self.console = Console()
        self._no_token: NamesakeError | None = None
        try:
            found = token.find(hub.variable, hub.token_page)
        except NamesakeError as error:
            self._no_token, found = error, None
        self.hub = hub(found)
        self.id, self.space_id = checks.names(settings, hub.name)
        self.folder = settings.work / "publish" / hub.name
        self.folder.mkdir(parents=True, exist_ok=True)

    # What there is

    @cached_property
    def built(self) -> contents.Model:
        with self._progress() as progress:
            task = progress.add_task("Hashing the model", total=contents.model_bytes(self.settings))
            return contents.model(self.settings, lambda size: progress.advance(task, size))

    @cached_property
    def page(self) -> list[File]:
        return contents.page(ROOT, self.config)

    @cached_property
    def machine(self) -> hardware.Hardware:
        return hardware.choose(self.hub.hardware, self.settings.hub.hardware)

    @cached_property
    def load_in(self) -> tuple[str, str]:
        """The page's --load-in on that machine, and what there is to say about it."""
        gguf = self.built.gguf
        return hardware.load_in(self.machine, self.built.bytes, gguf.size if gguf else 0)

    @cached_property
    def requirements(self) -> str:
        return next(file.source for file in self.page if file.path == "requirements.txt").read_text(encoding="utf-8")

    def readme(self) -> str:
        """The model's card."""
        return card.model(self.settings, self.built, self.hub.name, self.id)

    def account(self) -> str:
        """Whose token it is. Raises NamesakeError where there is none, or the hub refuses it."""
        if self._no_token:
            raise self._no_token
        return self.hub.account()

    def model_files(self) -> list[File]:
        """The merged folder, the GGUF file if one is asked for, the card, and what the card shows."""
        made = {"README.md": self.readme()}
        if self.hub.name == "modelscope":
            made["configuration.json"] = json.dumps({"framework": "pytorch", "task": "text-generation"}) + "\n"
        files = [*self.built.files, *self._generated("model", made)]
        if self.built.picture:
            files.append(contents.file("report.png", self.built.picture))
        return files

    def space_files(self) -> list[File]:
        """The page's tree, its README, and what only this hub has."""
        version = contents.newest_gradio(self.requirements)
        model_page = self.hub.address("model", self.id)
        gguf = self.built.gguf.path if self.built.gguf else ""
        readme = card.space(self.settings, self.hub.name, self.id, model_page, version, self.machine.id, gguf)
        made = {"README.md": readme, **self.hub.space_files(self.settings, self.machine, self.requirements)}
        return [*self.page, *self._generated("space", made)]

    def _generated(self, kind: str, made: dict[str, str]) -> list[File]:
        folder = self.folder / kind
        folder.mkdir(exist_ok=True)
        for name, text in made.items():
            (folder / name).write_text(text, encoding="utf-8")
        return [contents.file(name, folder / name) for name in made]

    def values(self) -> tuple[dict[str, str], dict[str, str]]:
        """The Space's variables and secrets. A private model needs a token there: a read-only one, given on purpose."""
        revision = f"@{self.settings.hub.revision}" if self.settings.hub.revision else ""
        variables = {"NAMESAKE_MODEL": f"{self.hub.name}:{self.id}{revision}", "NAMESAKE_LOAD_IN": self.load_in[0]}
        given = os.environ.get("NAMESAKE_SPACE_TOKEN", "")
        return variables, {self.hub.variable: given} if given else {}

    # Steps

    def check(self, force: bool = False) -> bool:
        """Print the table of checks; whether all passed, or failed only where `force` overrides."""
        rows = checks.rows(self.settings, self.hub, self.built, self.page, self.readme, self.account)
        self._table(f"{self.hub.title}: {self.id}", rows)
        failed = [row for row in rows if not row.passed]
        if force and failed and all(row.forced for row in failed):
            self.console.print("[yellow]Published all the same, as --force asks.")
            return True
        return not failed

    def confirm(self, steps: list[str], yes: bool) -> None:
        """Ask before anything goes online. Raises NamesakeError where nobody can answer, or the answer is no."""
        where = " and ".join(
            self.hub.address(step, {"model": self.id, "space": self.space_id}[step])
            for step in steps
            if step == "model" or self.space_id
        )
        if yes:
            return
        if not sys.stdin.isatty():
            raise NamesakeError(
                f"This would publish to {where}, and nobody is here to be asked",
                "Say --yes.",
                zh=f"即将发布到 {where}，但这里无人可以确认。请加上 --yes。",
            )
        answer = self.console.input(f"Publish to {escape(where)}, {self.settings.hub.visibility}? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            raise NamesakeError("Nothing was published", zh="没有发布任何内容。")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the lock for this run and hub; a second publish says who holds it, and waits."""
        lock, holder = FileLock(self.folder / "lock"), self.folder / "holder"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            who = holder.read_text().strip() if holder.exists() else "another process"
            self.console.print(f"Waiting: {who} is publishing this run.")
            lock.acquire()
        try:
            holder.write_text(f"process {os.getpid()}, since {time.strftime('%H:%M:%S')},\n")
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def model(self) -> None:
        """Create the model repository where there is none, and push to it."""
        if not self._visible("model", self.id):
            self.hub.create_model(self.id, self.settings)
        files = self.model_files()
        ours = {file.path for file in files}

        def replaced(there: dict[str, str]) -> set[str]:
            return {path for path in there if path.endswith(WEIGHTS) and path not in ours}

        message = f"{self.settings.assistant.name.pick('en')}: weights {self.built.identity[:12]}"
        pushed = self._push("model", self.id, files, message, replaced)
        for hashes in self.built.hashes:
            hashes.keep(self.built.files)
        verify.record(self.folder / "model.json", self.id, pushed.commit, files, self.built.identity)
        self._said("model", self.id, pushed, "python -m publish space" if self.space_id else "python -m publish verify")

    def space(self) -> None:
        """Create the Space where there is none, set it up, push the page, deploy, and wait until it runs."""
        if not self.space_id:
            self.console.print(f"{self.hub.title}: [hub] names no Space there; nothing to do.")
            return
        seen = self.hub.visibility("model", self.id)
        variables, secrets = self.values()
        if seen is None:
            raise NamesakeError(
                f"{self.hub.title}: {self.id} is not there, and the page would have nothing to load",
                "First: python -m publish model",
                zh=f"{self.hub.title} 上还没有模型 {self.id}，聊天页无从加载。请先运行 python -m publish model。",
            )
        if seen == "private" and not secrets:
            raise NamesakeError(
                f"{self.hub.title}: {self.id} is private, and the page needs a token to load it",
                "Make a read-only one and set NAMESAKE_SPACE_TOKEN; it becomes the Space's secret.",
                zh=f"{self.id} 是私有模型，聊天页需要令牌才能加载。请创建只读令牌并设置 NAMESAKE_SPACE_TOKEN。",
            )
        gguf = self.built.gguf
        if gguf and gguf.path not in self.hub.listing(self.id):
            raise NamesakeError(
                f"{self.hub.title}: {self.id} does not hold {gguf.path}, which the page would load",
                "First: python -m publish model",
                zh=f"{self.hub.title} 上的 {self.id} 里没有聊天页要的 {gguf.path}。请先运行 python -m publish model。",
            )
        if gguf and self.machine.word == "zerogpu":
            raise NamesakeError(
                "ZeroGPU answers in a process of its own, to which llama.cpp can't follow",
                "Leave [hub] hardware out: a GGUF file needs no GPU.",
                zh="ZeroGPU 在单独的进程里作答，无法使用 llama.cpp。GGUF 不需要显卡，请去掉 [hub] hardware。",
            )
        if why := self.load_in[1]:
            self.console.print(escape(f"{why}."))
        self._visible("space", self.space_id)
        changed = self.hub.prepare_space(self.space_id, self.settings, self.machine, self.requirements)
        changed |= self.hub.set_values(self.space_id, variables, secrets)
        files = self.space_files()
        message = f"{self.settings.assistant.name.pick('en')}: the page"
        pushed = self._push("space", self.space_id, files, message, lambda there: set(there))
        verify.record(self.folder / "space.json", self.space_id, pushed.commit, files)
        stage = self.hub.stage(self.space_id, pushed.commit)
        built = pushed.changed and self.hub.builds_on_push
        if (changed or pushed.changed or stage.startswith("failed")) and not built:
            self.hub.deploy(self.space_id)
            stage = ""
        if stage != "running":
            say = lambda line: self.console.print(f"[dim]{escape(line)}")  # noqa: E731
            launch.wait(self.hub, self.space_id, pushed.commit, say, self._redact)
        self._said("space", self.space_id, pushed, "python -m publish verify")

    def verify(self, download: int, page: str) -> bool:
        """Print the table of what is online; whether all of it holds."""
        if self._no_token:
            raise self._no_token
        with self._progress() as progress:
            task = progress.add_task("Fetching back", total=None, visible=bool(download))
            weights = self._weights()
            watch: Callable[[int], None] = lambda size: progress.advance(task, size)  # noqa: E731
            kept = self.folder / "model.json"
            rows = list(verify.model(self.hub, self.id, kept, weights, download, watch))
        if self.space_id:
            rows += verify.space(self.hub, self.space_id, self.folder / "space.json")
            if rows[-1].passed:
                address = page.rstrip("/") or self.hub.live_page(self.space_id)
                rows += verify.page(address, self.settings, f"{self.hub.name}:{self.id}")
        self._table(f"{self.hub.title}: online", rows)
        return all(row.passed for row in rows)

    def plan(self, steps: list[str]) -> None:
        """Print what the steps would do, file by file. Asks the hub, and writes nothing there."""
        for step in steps:
            id = self.id if step == "model" else self.space_id
            if not id:
                continue
            there = None if self._no_token else self.hub.visibility(step, id)
            self.console.print(f"\n{'Push to' if there else 'Create, and push to'} {self.hub.address(step, id)}:")
            table = Table("file", "bytes", "through", box=None)
            for file in self.model_files() if step == "model" else self.space_files():
                table.add_row(escape(file.path), f"{file.size:,}", "git-lfs" if belongs_in_lfs(file) else "git")
            self.console.print(table)
            if step == "space":
                variables, secrets = self.values()
                self.console.print(
                    f"Run on {self.machine.id}, with the variables {variables}, secrets {list(secrets)};"
                )
                self.console.print("then deploy it, and wait until it runs.")

    # Parts of the steps

    def _visible(self, kind: str, id: str) -> bool:
        """Whether the repository is there, with the visibility that the settings ask for or can be given it."""
        wanted, there = self.settings.hub.visibility, self.hub.visibility(kind, id)
        if there in (None, wanted):
            return bool(there)
        if self.hub.set_visibility(kind, id, wanted):
            self.console.print(f"{self.hub.title}: {id} was {there}, and is {wanted} now.")
        elif wanted == "private":
            raise NamesakeError(
                f"{self.hub.title}: {id} is {there}, the settings ask for private, and the hub's API can't change it",
                f"Change it at {self.hub.address(kind, id)}/settings, or choose another name.",
                zh=f"{id} 目前是 {there}，设置要求 private，而平台接口无法修改。请到网页上修改，或换一个名字。",
            )
        else:
            self.console.print(
                f"[yellow]{self.hub.title}: {id} is {there} and stays so: the hub's API can't change it. "
                f"Open it at {self.hub.address(kind, id)}/settings."
            )
        return True

    def _push(self, kind: str, id: str, files: list[File], message: str, replaces) -> Pushed:
        with self._progress() as progress:
            task = progress.add_task(f"{len(files)} files", total=None, visible=not self.hub.shows_progress)
            state = self.folder / f"{kind}.git"
            seen = self.console.is_terminal
            watch = lambda sent, total: progress.update(task, completed=sent, total=total)  # noqa: E731
            return self.hub.publish(kind, id, files, message, state, replaces, watch if seen else None)

    def _redact(self, text: str) -> str:
        """A line of the Space's log, without the tokens that it knows."""
        for kept in (self.hub.token.value, os.environ.get("NAMESAKE_SPACE_TOKEN", "")):
            text = token.Token(kept).redact(text)
        return text

    def _weights(self) -> str:
        sums = self.settings.work / "merged" / "SHA256SUMS"
        return contents.file("SHA256SUMS", sums).sha256 if sums.is_file() else ""

    def _said(self, kind: str, id: str, pushed: Pushed, following: str) -> None:
        where = self.hub.address(kind, id)
        made = f"commit {pushed.commit[:12]}" if pushed.changed else f"nothing changed since {pushed.commit[:12]}"
        self.console.print(f"[green]{where}: {made}.[/] Next: {following}")

    def _table(self, title: str, rows: list[checks.Row]) -> None:
        table = Table("", "what", "found", "what to do", title=escape(title), title_justify="left")
        for row in rows:
            mark = "[green]✓" if row.passed else "[red]✗"
            cells = (row.what, row.found, "" if row.passed else row.fix)
            table.add_row(mark, *(escape(token.printable(cell)) for cell in cells))
        self.console.print(table)

    def _progress(self) -> Progress:
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        return Progress(TextColumn("{task.description}"), *columns, console=self.console, transient=True)
