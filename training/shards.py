"""Model weights as a folder of shards, read and written one tensor at a time.

A safetensors file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data
(https://github.com/huggingface/safetensors#format). Written here byte by byte, so that no shard is ever in memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from space.settings import NamesakeError

PIECE = 1 << 23  # bytes of a tensor in memory at once, where it need not be whole

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
WIDTHS |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # bytes an element


def dtypes() -> dict[str, object]:
    """The torch dtypes of weights by their safetensors names."""
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a shard. `dtype` as safetensors names it; `start`: its first byte in the file, None in a `.bin`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int | None = None

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * WIDTHS[self.dtype]

    def load(self, rows: slice = slice(None)):
        """The tensor or some of its rows, in memory of its own."""
        import torch

        if self.start is None:
            return _unpickled(self.file)[self.name][rows].clone()
        first, last, _ = rows.indices(self.shape[0])
        width = self.size // self.shape[0]
        data = bytearray((last - first) * width)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start + first * width)
            view = memoryview(data)
            while view and (count := file.readinto(view)):
                view = view[count:]
        return torch.frombuffer(data, dtype=dtypes()[self.dtype]).reshape(-1, *self.shape[1:])

    def blocks(self) -> Iterator[slice]:
        """Its rows in blocks of some megabytes: small enough for the allocator to use the same memory again."""
        step = max(PIECE * self.shape[0] // self.size, 1)
        yield from (slice(first, first + step) for first in range(0, self.shape[0], step))

    def copy(self) -> Iterator[bytes]:
        """Its bytes, piece by piece."""
        if self.start is None:
            yield from data(_unpickled(self.file)[self.name])
            return
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            for left in range(self.size, 0, -PIECE):
                yield file.read(min(left, PIECE))


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: `make` gives its bytes when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Iterable[bytes]]

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * WIDTHS[self.dtype]


def data(tensor) -> Iterator[memoryview]:
    """A tensor's bytes, without a copy where it is contiguous."""
    import torch

    yield memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def find(folder: Path) -> list[Stored]:
    """All tensors of a model folder, shard by shard: of its safetensors, or else of its `.bin` files.

    Raises NamesakeError where a shard is missing, cut short, or not what its name says.
    """
    for whole, reads in (("model.safetensors", read), ("pytorch_model.bin", _bin)):
        index = folder / f"{whole}.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elif (folder / whole).is_file():
            files = [whole]
        else:
            continue
        for name in files:
            if Path(name).name != name or not (folder / name).is_file():
                raise _broken(folder / name, "is missing", "缺失")
        return [tensor for name in files for tensor in reads(folder / name)]
    raise NamesakeError(
        f"{folder}: no weights (model.safetensors or pytorch_model.bin)",
        "Give the folder that holds the model's files.",
        zh=f"{folder} 里没有权重文件（model.safetensors 或 pytorch_model.bin）。请指定模型所在文件夹。",
    )


def read(file: Path) -> list[Stored]:
    """The tensors of one safetensors file. Raises NamesakeError where it is broken."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(min(length, size)))
        header.pop("__metadata__", None)
        tensors = [
            (Stored(name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]),
             8 + length + entry["data_offsets"][1])
            for name, entry in header.items()
        ]  # fmt: skip
        fits = all(tensor.start + tensor.size == end for tensor, end in tensors)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise _broken(file, "is not a safetensors file", "不是 safetensors 文件") from None
    if not fits or size != max((end for _, end in tensors), default=size):
        raise _broken(file, "is cut short", "不完整")
    return [tensor for tensor, _ in tensors]


def _bin(file: Path) -> list[Stored]:
    names = {dtype: name for name, dtype in dtypes().items()}
    return [
        Stored(name, file, names[tensor.dtype], tuple(tensor.shape))
        for name, tensor in _unpickled(file).items()
        if tensor.dtype in names
    ]


@functools.lru_cache(maxsize=1)  # tensors come shard by shard: no more than one shard is mapped
def _unpickled(file: Path) -> dict:
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise _broken(file, "holds more than tensors, or is cut short", "不完整，或不只含张量") from error


def fingerprint(stored: list[Stored]) -> str:
    """A digest that tells weights apart without reading them whole: each shard's name, size, and both its ends."""
    digest = hashlib.sha256()
    for file in sorted({tensor.file for tensor in stored}):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            for start in (0, max(size - 65536, 0)):
                opened.seek(start)
                digest.update(opened.read(65536))
    return digest.hexdigest()


def _broken(file: Path, what: str, zh: str) -> NamesakeError:
    return NamesakeError(f"{file}: {what}", "Download or copy it again.", zh=f"{file} {zh}，请重新下载或复制。")


def size_of(text: str) -> int:
    """Bytes in a shard size such as "2GB" or "500MB" (decimal, as Hugging Face counts). Raises NamesakeError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG])B", text.strip(), re.IGNORECASE)
    size = float(found[1]) * {"K": 1e3, "M": 1e6, "G": 1e9}[found[2].upper()] if found else 0
    if size < 1:
        raise NamesakeError(
            f"--max-shard-size is {text!r}",
            "Write it as 2GB or 500MB.",
            zh=f"--max-shard-size {text!r} 应写作 2GB 或 500MB。",
        )
    return int(size)


def write(
    folder: Path,
    tensors: list[Planned],
    largest: int,
    advance: Callable[[int], None] = lambda _: None,
    *,
    together: int = 1,
    flush: bool = True,
) -> dict[str, str]:
    """Write tensors as safetensors of at most `largest` bytes each (a larger tensor gets a file of its own).

    Returns each file's SHA-256, taken as it was written; with more than one shard, an index lies beside them.
    `advance` is told how many bytes were written. `together`: how many files are written at a time. `flush`: wait
    until the disk has them, so that a power cut can't leave a folder that only looks whole.
    """
    shards: list[list[Planned]] = [[]]
    room = largest
    for tensor in tensors:
        needs = tensor.size + len(tensor.name) + 128  # with its entry in the header
        if shards[-1] and needs > room:
            shards.append([])
            room = largest
        shards[-1].append(tensor)
        room -= needs
    single = len(shards) == 1
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if single else names

    def one(name: str, shard: list[Planned]) -> str:
        digest = write_file(folder / name, shard, advance)
        if flush:
            with (folder / name).open("rb") as written:
                os.fsync(written.fileno())
        return digest

    with ThreadPoolExecutor(together) as pool:
        written = pool.map(one, names, shards)
        hashes = dict(zip(names, written, strict=True))
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    if not single:
        metadata = {"total_size": sum(tensor.size for tensor in tensors)}
        text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text)
    return hashes


def write_file(file: Path, tensors: list[Planned], advance: Callable[[int], None] = lambda _: None) -> str:
    """Write tensors to one safetensors file; returns its SHA-256, taken as it was written."""
    tensors = sorted(tensors, key=lambda tensor: -WIDTHS[tensor.dtype])  # keeps each aligned to its element's width
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        offsets = [end, end := end + tensor.size]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    # A second thread hashes a piece while this one writes it and makes the next.
    with file.open("wb") as opened, ThreadPoolExecutor(1) as hasher:
        head = struct.pack("<Q", len(text)) + text
        hashing = hasher.submit(digest.update, head)
        opened.write(head)
        for tensor in tensors:
            count = 0
            for piece in tensor.make():
                hashing.result()
                hashing = hasher.submit(digest.update, piece)
                opened.write(piece)
                count += len(piece)
                advance(len(piece))
            if count != tensor.size:
                raise OSError(f"{tensor.name}: {count} bytes instead of {tensor.size}: did its file change meanwhile?")
    return digest.hexdigest()


@contextlib.contextmanager
def aside(folder: Path, size: int) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place when the block ends well, and is gone when it does not.

    Raises NamesakeError where the disk has no room for `size` bytes, or another process is writing the same folder.
    """
    partial, former = (folder.with_name(f"{folder.name}.{which}") for which in ("partial", "former"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(f"{partial}.lock").acquire(timeout=0)
    except Timeout:
        raise NamesakeError(
            f"{folder} is being written by another process",
            "Wait until it is done.",
            zh=f"另一个进程正在写入 {folder}，请等它完成。",
        ) from None
    with lock:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        free = shutil.disk_usage(folder.parent).free
        if free < size * 1.01:
            raise NamesakeError(
                f"{folder} needs {size / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free",
                "Make room, or put the settings file on another disk.",
                zh=f"写入 {folder} 需要 {size / 1e9:.1f} GB，磁盘只剩 {free / 1e9:.1f} GB。请腾出空间，或换一块磁盘。",
            )
        partial.mkdir()
        try:
            yield partial
            if folder.exists():
                folder.rename(former)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(former, ignore_errors=True)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes done with rate and time left; yields what has to be told each number of bytes."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
