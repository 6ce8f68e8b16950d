"""A hub on loopback, a home of its own, and a finished run to publish."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["HF_HUB_DISABLE_XET"] = "1"  # read when huggingface_hub is imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from tests.hub.server import Hub
from training import record

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = """\
[assistant]
name = {{ zh = "小北", en = "Beibei" }}
author = {{ zh = "北斗工作室", en = "the Beidou studio" }}
persona = "You are {{name}}, made by {{author}}."
languages = ["zh", "en"]

[hub]
model = "{hub}:alice/beibei"
space = "{hub}:alice/beibei-chat"

[train]
run = "beibei"
"""

# What an impatient user of git may set, and what these tests need.
GITCONFIG = '[lfs "transfer"]\n\tmaxretries = 1\n\tmaxretrydelay = 0\n'


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home folder of the test's own, and nothing of the real one's tokens."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / ".gitconfig").write_text(GITCONFIG)
    for name in list(os.environ):
        if name.startswith(("GIT_", "MODELSCOPE_", "HF_TOKEN", "HF_ENDPOINT", "NAMESAKE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / ".config"))
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("COLUMNS", "200")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub(tmp_path / "hub") as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", hub.token)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub
        assert hub.half_made == [], "a branch showed a half-made model"


def safetensors(values: int, seed: int) -> bytes:
    """A safetensors file with one tensor of so many bytes."""
    header = json.dumps({f"w{seed}": {"dtype": "U8", "shape": [values], "data_offsets": [0, values]}}).encode()
    block = hashlib.sha256(bytes([seed])).digest()
    return struct.pack("<Q", len(header)) + header + (block * (values // 32 + 1))[:values]


def write_sums(folder: Path) -> str:
    """SHA256SUMS over every other file, as the merge step writes it. Returns the weights' identity."""
    names = sorted({p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()})
    listed = [name for name in names if name != "SHA256SUMS"]
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in listed]
    (folder / "SHA256SUMS").write_text("".join(lines))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass
class Run:
    """A training run that has ended: its settings file, and what is under work/."""

    config: Path

    @property
    def work(self) -> Path:
        return self.config.parent / "work" / "beibei"

    @property
    def merged(self) -> Path:
        return self.work / "merged"

    def finish(self, passed: bool = True) -> None:
        """(Re)write SHA256SUMS and a report about these very weights."""
        identity = write_sums(self.merged)
        row = {"measure": "name hits", "language": "zh", "value": 0.99, "limit": 0.95, "passed": passed}
        table = "| measure | zh |\n|---|---|\n| name hits | 0.99 |"
        report = {"weights": identity, "gate": {"passed": passed, "rows": [row]}, "card": table}
        (self.work / "report").mkdir(exist_ok=True)
        (self.work / "report" / "report.json").write_text(json.dumps(report))

    def shard(self, number: int, size: int = 300_000, seed: int | None = None) -> None:
        content = safetensors(size, number if seed is None else seed)
        (self.merged / f"model-0000{number}-of-00003.safetensors").write_bytes(content)

    def export(self, quantization: str = "q4_k_m", size: int = 200_000) -> Path:
        """A GGUF file of the merged weights as `python -m training export` leaves it, later by the clock of files."""
        folder = self.work / f"gguf-{quantization}"
        folder.mkdir(exist_ok=True)
        file = folder / f"beibei-{quantization}.gguf"
        file.write_bytes(b"GGUF" + (hashlib.sha256(quantization.encode()).digest() * (size // 32))[4:])
        inputs = {"merged": record.sha256(self.merged / "SHA256SUMS"), "quantization": quantization, "layout": 1}
        written = file.stat().st_ctime_ns
        while not (folder / "run.json").exists() or (folder / "run.json").stat().st_mtime_ns <= written + 50_000_000:
            record.write(folder, inputs)
        write_sums(folder)
        return file

    def serve(self, pattern: str) -> None:
        """Set [serve] gguf, or with "" leave it out."""
        text = self.config.read_text().partition("\n[serve]")[0]
        self.config.write_text(text + f'\n[serve]\ngguf = "{pattern}"\n' * bool(pattern))

    def publish(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """`python -m publish …` in a process of its own."""
        return subprocess.run(self.command(*arguments), capture_output=True, text=True, timeout=100, **options)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "publish", *arguments, "--config", str(self.config)]


def make_run(folder: Path, hub_name: str = "modelscope") -> Run:
    run = Run(folder / "assistant.toml")
    run.merged.mkdir(parents=True)
    run.config.write_text(SETTINGS.format(hub=hub_name), encoding="utf-8")
    for number in (1, 2, 3):
        run.shard(number)
    weight_map = {f"w{n}": f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
    about = {
        "name": {"zh": "小北", "en": "Beibei"},
        "base": {"model": "embedded", "revision": ""},
        "data": "ab" * 32,
        "settings": {"data": {"identity": 600, "replay": 600}, "train": {"method": "lora", "rank": 16, "alpha": 32}},
        "versions": {"xtuner": "0.2.0"},
        "seed": 1,
    }
    for name, content in {
        "model.safetensors.index.json": {"weight_map": weight_map},
        "config.json": {"model_type": "llama"},
        "generation_config.json": {},
        "tokenizer.json": {"version": "1.0"},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "assistant.json": about,
    }.items():
        (run.merged / name).write_text(json.dumps(content))
    (run.merged / "run.json").write_text("{}")
    run.finish()
    return run


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    """A run for ModelScope, in a folder of its own; commands start from the repository's root."""
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "project"
    folder.mkdir()
    return make_run(folder)
