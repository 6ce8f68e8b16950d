"""What goes up: the merged model with its card, and the page's tree. Nothing else of this machine."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from space.settings import NamesakeError, Settings
from training import record  # a few lines over the standard library, as the package itself is empty

PAGE = ("app.py", "assistant.toml", "requirements.txt")  # and space/
CLOCK = 20_000_000  # ns; the times of files are no finer than 10 ms on some systems
NOT_PUBLISHED = {"README.md"}  # of the merged folder: the card is made anew
QUANTIZATIONS = ("q4_k_m", "q8_0")  # what training/export.py can make


@dataclass(frozen=True)
class File:
    """A file to publish: its path in the repository, where it lies here, its bytes and its SHA-256."""

    path: str
    source: Path
    size: int
    sha256: str


def file(path: str, source: Path, read: Callable[[int], None] = lambda size: None) -> File:
    """The file at `source`, hashed in constant memory; `read` is told of every block's bytes."""
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            size += len(block)
            read(len(block))
    return File(path, source, size, digest.hexdigest())


class Hashes:
    """The SHA-256 of a folder's files, read again only where they may have changed: the merge hashed what it wrote.

    A hash holds as long as a file's size and times do (ctime is the kernel's own: no program sets it). It also holds
    where SHA256SUMS lists it, and the file is older than the run.json that ended the merge.
    """

    def __init__(self, folder: Path, kept: Path):
        self.folder, self.kept = folder, kept
        self._listed = sums_of(folder)
        ends = [folder / "SHA256SUMS", folder / "run.json"]
        self._ended = min(path.stat().st_mtime_ns if path.exists() else 0 for path in ends)
        try:
            entries = json.loads(kept.read_text()).items()
            self._known = {
                path: (size, modified, changed, sha256) for path, (size, modified, changed, sha256) in entries
            }
        except (FileNotFoundError, ValueError, AttributeError, TypeError):
            self._known = {}

    def file(self, path: str, read: Callable[[int], None]) -> File:
        """The file at a path in the folder; `read` is told of its bytes, read or not."""
        source = self.folder / path
        stat, now = source.stat(), time.time_ns()
        times = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        *before, digest = self._known.get(path, (None, ""))
        if tuple(before) != times:
            untouched = path in self._listed and max(times[1:]) < self._ended
            digest = self._listed[path] if untouched else ""
        found = File(path, source, stat.st_size, digest) if digest else file(path, source, read)
        if digest:
            read(stat.st_size)
        if max(times[1:]) < now - CLOCK:  # else a change in the same moment would leave no trace
            self._known[path] = (*times, found.sha256)
        return found

    def keep(self, files: Iterable[File]) -> None:
        """Keep the hashes for the next command. A link that was made to a file since moves its ctime, not its mtime."""
        entries = {}
        for found in files:
            stat, (size, modified, _, digest) = found.source.stat(), self._known.get(found.path, (None,) * 4)
            if (stat.st_size, stat.st_mtime_ns, found.sha256) == (size, modified, digest):
                entries[found.path] = (size, modified, stat.st_ctime_ns, digest)
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        self.kept.write_text(json.dumps(entries, indent=1) + "\n")


def sums_of(folder: Path) -> dict[str, str]:
    """What a folder's SHA256SUMS lists: path → SHA-256."""
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    fields = (line.partition("  ") for line in lines)
    return {path.removeprefix("*"): digest for digest, _, path in fields}


@dataclass(frozen=True)
class Model:
    """The merged folder: its files as they are, what `assistant.json` says of it, and the evaluation's report.

    `files` ends with `gguf`, the GGUF file made from these weights, where [serve] gguf asks for one.
    """

    folder: Path
    files: tuple[File, ...]
    gguf: File | None
    about: dict
    report: dict
    picture: Path | None
    hashes: tuple[Hashes, ...]

    @property
    def identity(self) -> str:
        """The weights' identity: the SHA-256 of SHA256SUMS, which lists every other file of the merged folder."""
        return next((file.sha256 for file in self.files if file.path == "SHA256SUMS"), "")

    @property
    def bytes(self) -> int:
        """The size of the weights in bytes, in bfloat16 what they take in memory."""
        return sum(file.size for file in self.files if file.path.endswith(".safetensors"))


def model(settings: Settings, read: Callable[[int], None] = lambda size: None) -> Model:
    """The merged model of this run, with every file's hash.

    Raises NamesakeError where there is none, or not the one GGUF file that [serve] gguf asks for.
    """
    folder, report = settings.work / "merged", settings.work / "report"
    if not (folder / "SHA256SUMS").is_file():
        raise NamesakeError(
            f"{folder}: no merged model",
            "Make it with: python -m training merge",
            zh=f"{folder} 里没有合并好的模型，请先运行 python -m training merge。",
        )
    paths = sorted(
        p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in NOT_PUBLISHED
    )
    exported = gguf(settings)
    hashes = [Hashes(folder, settings.work / "publish" / "hashes.json")]
    files = [hashes[0].file(path.relative_to(folder).as_posix(), read) for path in paths]
    if exported:
        hashes.append(Hashes(exported.parent, settings.work / "publish" / f"{exported.parent.name}.json"))
        files.append(hashes[1].file(exported.name, read))
    for kept in hashes:
        kept.keep(files)
    picture = report / "report.png"
    return Model(
        folder,
        tuple(files),
        files[-1] if exported else None,
        _json(folder / "assistant.json"),
        _json(report / "report.json"),
        picture if picture.is_file() else None,
        tuple(hashes),
    )


def model_bytes(settings: Settings) -> int:
    """How many bytes `model()` looks at."""
    paths = [*(settings.work / "merged").rglob("*"), *_exports(settings).values()]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _exports(settings: Settings) -> dict[str, Path]:
    """Where the export puts the files that are like [serve] gguf: quantization → file, there or not."""
    run = settings.train.run
    files = {how: settings.work / f"gguf-{how}" / f"{run}-{how}.gguf" for how in QUANTIZATIONS}
    return {how: file for how, file in files.items() if fnmatchcase(file.name, settings.serve.gguf)}


def gguf(settings: Settings) -> Path | None:
    """The GGUF file that goes up beside the merged weights, None where [serve] gguf is not set.

    Raises NamesakeError where none was exported, several are like the setting, or the one is of other weights.
    """
    pattern, files = settings.serve.gguf, _exports(settings)
    if not pattern:
        return None
    if not files:
        names = " or ".join(f"{settings.train.run}-{how}.gguf" for how in QUANTIZATIONS)
        raise NamesakeError(
            f'[serve] gguf = "{pattern}" is like no file that the export makes',
            f"It makes {names}: name one of them.",
            zh=f'[serve] gguf = "{pattern}" 与导出的文件名都不符，导出的是 {names}，请写其中一个。',
        )
    there = {how: file for how, file in files.items() if file.is_file()}
    how = next(iter(there or files))
    export = f"python -m training export --gguf {how}"
    if not there:
        raise NamesakeError(
            f'[serve] gguf = "{pattern}": no such file was exported',
            f"Run: {export}",
            zh=f'[serve] gguf = "{pattern}"：还没有导出这样的文件，请先运行 {export}。',
        )
    if len(there) > 1:
        names = ", ".join(file.name for file in there.values())
        raise NamesakeError(
            f'[serve] gguf = "{pattern}" is like several files: {names}',
            f'Name one: gguf = "{there[how].name}".',
            zh=f'[serve] gguf = "{pattern}" 对应多个文件：{names}。请写明一个，例如 gguf = "{there[how].name}"。',
        )
    merged = file("SHA256SUMS", settings.work / "merged" / "SHA256SUMS").sha256
    if record.read(there[how].parent).get("inputs", {}).get("merged") != merged:
        raise NamesakeError(
            f"{there[how]} was made from other weights than those in merged",
            f"Run again: {export}",
            zh=f"{there[how]} 不是由现在的合并权重导出的，请重新运行 {export}。",
        )
    return there[how]


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise NamesakeError(f"{path}: not JSON", "Make it again.", zh=f"{path} 不是有效的 JSON，请重新生成。") from None


def page(folder: Path, config: Path) -> list[File]:
    """The page's files under `folder` (the repository's root), with `config` as its assistant.toml.

    Raises NamesakeError where one is missing.
    """
    sources = {name: folder / name for name in PAGE} | {"assistant.toml": config}
    for path in (folder / "space").rglob("*"):
        inside = path.relative_to(folder)
        if path.is_file() and not any(part in ("__pycache__", "embedded") or part[0] == "." for part in inside.parts):
            sources[inside.as_posix()] = path
    for name, source in sources.items():
        if not source.is_file():
            raise NamesakeError(f"{source}: the page's {name} is missing", zh=f"缺少聊天页的 {name}：{source}")
    return [file(name, source) for name, source in sorted(sources.items())]


def requirements(text: str) -> dict[str, SpecifierSet]:
    """A requirements.txt as package → versions. Raises NamesakeError at a line that is none."""
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition(" #")[0].strip()
        if not line or line.startswith(("#", "-")):
            continue
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            raise NamesakeError(f"requirements.txt:{number}: {line!r} names no package", "Mend the line.") from None
        found[canonicalize_name(requirement.name)] = requirement.specifier
    return found


def gradio(text: str) -> SpecifierSet:
    """Which versions of Gradio a requirements.txt takes."""
    return requirements(text).get("gradio", SpecifierSet())


def newest_gradio(text: str) -> str:
    """The newest version of Gradio that a requirements.txt names, "" where it names none."""
    named = [found.version for found in gradio(text) if found.operator in ("==", "<=", "~=", ">=")]
    return max(named, key=lambda version: [int(n) for n in re.findall(r"\d+", version)], default="")


def safetensors_header(stream: BinaryIO) -> bytes:
    """The JSON at the head of a safetensors file, empty where there is none: its length in 8 bytes, then itself."""
    start = stream.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    header = stream.read(length) if length <= 100_000_000 else b""
    return header if len(header) == length else b""


def safetensors_fault(path: Path) -> str:
    """What is wrong with a safetensors file, "" if nothing: its header is read, and its length must be the header's.

    Format: https://github.com/huggingface/safetensors#format
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = safetensors_header(stream)
        try:
            length, header = len(header), json.loads(header)
            end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "has no readable header"
    return "" if 8 + length + end == size else f"is {size} bytes long, and its header says {8 + length + end}"


def decimal(size: int) -> str:
    """A number of bytes as people read it."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
