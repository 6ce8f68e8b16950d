"""The base model as a folder in native layout: fetched, and made native where it is not."""

from __future__ import annotations

import functools
from pathlib import Path

from space import weights
from space.settings import NamesakeError, Settings
from training import native, record, shards


def base(settings: Settings) -> Path:
    """Fetch the base model and, where it needs it, write it in native layout to work/base/<name>/; returns its folder.

    A native folder is used where it is. Raises NamesakeError where the model cannot be had or used.
    """
    import typer

    source = _source(settings)
    copy = _copy(settings, source)
    inputs = _inputs(source)
    if record.unchanged(copy, inputs):
        typer.echo(f"base 底座: nothing has changed 没有变化, {copy}. Next 下一步: python -m training data")
        return copy
    folder = _fetched(source)
    why = native.foreign(folder)
    if why:
        stored = shards.find(folder)
        size = sum(tensor.size for tensor in stored)
        with shards.aside(copy, size) as aside, shards.progress(why, size) as advance:
            native.convert(folder, aside, shards.size_of("2GB"), advance)
            record.write(aside, inputs, why=why)
        folder = copy
    size = f"{weights.check(folder) / 1e9:.2f}B parameters 参数"
    typer.echo(f"base 底座: {source}, {size}, in {folder}. Next 下一步: python -m training data")
    return folder


def folder(settings: Settings) -> Path:
    """Where the base model lies, in native layout. Raises NamesakeError where `base` has still to convert it."""
    source = _source(settings)
    copy = _copy(settings, source)
    if record.unchanged(copy, _inputs(source)):
        return copy
    folder = _fetched(source)
    if native.foreign(folder):
        raise NamesakeError(
            f"{source} is not in native layout yet",
            "Run: python -m training base",
            zh=f"{source} 还没有转成原生格式，请运行 python -m training base。",
        )
    weights.check(folder)
    return folder


def _source(settings: Settings) -> weights.Source:
    value = settings.base.model
    if (settings.folder / value).is_dir() and value != "embedded":
        return weights.Source("folder", str(settings.folder / value))
    return weights.source(value, settings.base.revision)


def _copy(settings: Settings, source: weights.Source) -> Path:
    return settings.folder / "work" / "base" / Path(source.name).name


def _inputs(source: weights.Source) -> dict:
    """What a copy was made from: a hub's repository is named, a folder's files are told by size and time."""
    inputs = {"base": str(source)}
    if source.kind == "folder":
        files = sorted(path for path in Path(source.name).iterdir() if path.is_file())
        inputs["files"] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return inputs


def _fetched(source: weights.Source) -> Path:
    if source.kind == "embedded":
        return weights.embedded_folder()
    if source.kind == "folder":
        return Path(source.name)
    fetch = functools.partial(weights.download, source, whole=shards.find)
    folder = fetch()
    if not any(folder.glob("*.safetensors")):  # an older repository: its pickles are read as tensors only
        folder = fetch(not_fetched=[pattern for pattern in weights.NOT_FETCHED if pattern != "*.bin"])
    return folder
