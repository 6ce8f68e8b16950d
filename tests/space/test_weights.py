"""Weights: where they come from, that they are whole, and what is said when they are not."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import pytest

from space import settings, weights
from space.settings import NamesakeError

TOML = "[assistant]\nname = 'x'\nauthor = 'y'\n"


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def configured(tmp_path, text: str = "", **arguments):
    (tmp_path / "assistant.toml").write_text(TOML + text)
    return weights.configured(settings.load(tmp_path / "assistant.toml"), **arguments)


def test_the_order_is_model_then_environment_then_hub_then_embedded(tmp_path, monkeypatch):
    hub = "[hub]\nmodel = 'modelscope:me/mine'\nrevision = 'v2'\n"
    assert str(configured(tmp_path, hub)[0]) == "modelscope:me/mine@v2"
    assert configured(tmp_path)[0].kind == "embedded"
    monkeypatch.setenv("NAMESAKE_MODEL", "huggingface:a/b@abc")
    assert configured(tmp_path, hub)[0] == weights.Source("huggingface", "a/b", "abc")
    assert configured(tmp_path, hub, model=str(tmp_path))[0] == weights.Source("folder", str(tmp_path))


def test_the_embedded_adapter_goes_only_on_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "EMBEDDED_ADAPTER", tmp_path)
    assert configured(tmp_path)[1] == str(tmp_path)
    assert configured(tmp_path, model=str(tmp_path))[1] == ""
    assert configured(tmp_path, adapter="mine")[1] == "mine"


@pytest.mark.parametrize(
    "value", ["nowhere", "github:a/b", "modelscope:a", "modelscope:a/b/c", "modelscope:a/b@", " ", "a/b"]
)
def test_a_value_that_is_no_source_is_refused(value):
    with pytest.raises(NamesakeError, match="no such folder, and not a repository"):
        weights.source(value)


def test_a_whole_folder_gives_its_number_of_parameters(folder):
    model = weights.load(str(folder)).model
    counted = {id(p): p.numel() for p in model.parameters()}
    assert weights.check(folder) == sum(counted.values())


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def shard(folder: Path, shards: list[str]) -> None:
    """Name the model's weights as an index of shards; the first one is the real file."""
    (folder / "model.safetensors").rename(folder / shards[0])
    index = {"weight_map": {f"w{i}": name for i, name in enumerate(shards)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = {
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "config is GBK": (
        lambda f: (f / "config.json").write_bytes('{"a": "名"}'.encode("gbk")),
        "config.json is not JSON",
    ),
    "remote code": (
        lambda f: (f / "config.json").write_text('{"model_type": "internlm2"}'),
        "'internlm2' models need remote code, which is never run here. Make it native with: python -m training base",
    ),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), "need remote code"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "1 of 1 weight files missing: model.safetensors"),
    "pickles only": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "are pickles"),
    "a shard missing": (lambda f: shard(f, ["a.safetensors", "b.safetensors"]), "1 of 2 weight files missing: b.safe"),
    "index is not JSON": (lambda f: (f / "model.safetensors.index.json").write_text("x"), "is not a shard index"),
    "index without a map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "is not a shard index"),
    "empty file": (lambda f: truncate(f / "model.safetensors", 0), "model.safetensors has no readable header"),
    "cut in the header": (lambda f: truncate(f / "model.safetensors", 100), "has no readable header"),
    "cut in the data": (
        lambda f: truncate(f / "model.safetensors", 50_000),
        "is 50000 bytes long, and its header says",
    ),
    "huge header": (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**60)), "no readable header"),
    "header of nonsense": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"[1]3"),
        "no readable",
    ),
    "git-lfs pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is a git-lfs pointer, not the file itself",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_wrong_with_a_folder_is_named_in_both_languages(folder, fault):
    spoil, words = BROKEN[fault]
    spoil(folder)
    with pytest.raises(NamesakeError) as raised:
        weights.check(folder)
    text = raised.value.text
    assert words in text.en and str(folder) in text.en and "\n" not in text.en
    assert text.zh != text.en and str(folder) in text.zh


def test_an_adapter_is_put_on_top_and_changes_the_answers(folder, tmp_path):
    import peft
    import torch

    base = weights.load(str(folder)).model
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "assistant.json").write_text('{"name": {"zh": "小满", "en": "Manny"}}')
    plain, tuned = (weights.load(str(folder), adapter) for adapter in ("", str(tmp_path / "adapter")))
    ids = torch.tensor([[1, 2, 3]])
    assert not torch.allclose(plain.model(ids).logits, tuned.model(ids).logits)
    assert tuned.name.startswith("小满 / Manny · ")


def test_a_folder_without_an_adapter_in_it_is_named(folder, tmp_path):
    with pytest.raises(NamesakeError, match=r"no adapter_config\.json"):
        weights.load(str(folder), str(tmp_path))


@pytest.mark.parametrize("load_in", ["auto", "bf16", "8bit", "4bit"])
def test_every_precision_loads_and_says_why(folder, load_in):
    import torch

    loaded = weights.load(str(folder), load_in=load_in)
    assert torch.isfinite(loaded.model(torch.tensor([[1, 2, 3]])).logits).all()
    assert {"auto": "CPU", "bf16": "bfloat16", "8bit": "8-bit", "4bit": "4-bit"}[load_in] in loaded.how


@pytest.mark.parametrize(
    ("able", "free", "dtype"),
    [
        ({"avx2": True}, 80e9, "float32"),
        ({"avx512_f": True, "avx512_bf16": True}, 80e9, "bfloat16"),
        ({"amx_bf16": True}, 80e9, "bfloat16"),
        ({"neon": True, "bf16": True}, 80e9, "bfloat16"),
        ({"avx2": True}, 20e9, "bfloat16"),
    ],
)
def test_a_cpu_gets_what_it_computes_in_the_same_each_time(monkeypatch, able, free, dtype):
    import psutil
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert weights._precision("auto", 7_700_000_000)[:3] == ("cpu", dtype, 0)


@pytest.mark.parametrize(
    ("free", "bf16", "load_in", "chosen"),
    [
        (20e9, True, "auto", ("bfloat16", 0)),
        (16e9, True, "auto", ("bfloat16", 4)),
        (16e9, False, "auto", ("float16", 4)),
        (40e9, False, "auto", ("float16", 0)),
        (16e9, True, "bf16", ("bfloat16", 0)),
        (40e9, True, "8bit", ("bfloat16", 8)),
    ],
)
def test_a_gpu_gets_what_fits_in_its_free_memory(monkeypatch, free, bf16, load_in, chosen):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free), int(80e9)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    device, dtype, bits, why = weights._precision(load_in, 7_700_000_000)
    assert (device, dtype, bits) == ("cuda:0", *chosen)
    assert "Some GPU" in why


def test_the_embedded_model_is_converted_once_and_loads_whole(embedded):
    begun = time.perf_counter()
    assert weights.embedded_folder() == embedded
    assert time.perf_counter() - begun < 1
    assert weights.check(embedded) == 134_515_008


class Hub(http.server.BaseHTTPRequestHandler):
    """ModelScope's listing and download of one repository, as its client asks for them; counts what is asked."""

    folder: Path
    asked: list[str]
    hold = threading.Event()

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        self.asked.append(f"{url.path}?{query.get('FilePath', '')}")
        files = {p.name: p for p in self.folder.iterdir()}
        if url.path.endswith("/repo/files"):
            listing = [
                {
                    "Path": name,
                    "Name": name,
                    "Type": "blob",
                    "Size": path.stat().st_size,
                    "Sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                }
                for name, path in files.items()
            ]
            return self.reply(json.dumps({"Code": 200, "Success": True, "Data": {"Files": listing}}).encode())
        if url.path == "/api/v1/models/me/mine/repo" and query.get("FilePath") in files:
            self.hold.wait(10)
            return self.reply(files[query["FilePath"]].read_bytes(), "application/octet-stream")
        self.send_error(404)

    do_HEAD = do_GET

    def reply(self, body: bytes, kind: str = "application/json"):
        begin = 0
        if asked := self.headers.get("Range"):
            begin = int(asked.removeprefix("bytes=").split("-")[0])
            last = asked.split("-")[1]
            end = min(int(last) + 1 if last else len(body), len(body))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(body)}")
            body = body[begin:end]
        else:
            self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub on loopback that holds the tiny model, with a duplicate pickle and a script beside it."""
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling.py").write_text("raise SystemExit")
    handler = type("Handler", (Hub,), {"folder": folder, "asked": [], "hold": threading.Event()})
    handler.hold.set()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # ModelScope's client reads these once a process: each test downloads in a process of its own.
    environment = {
        **os.environ,
        "MODELSCOPE_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "MODELSCOPE_CACHE": str(tmp_path / "cache"),
        "XDG_CACHE_HOME": str(tmp_path / "xdg"),
        "PYTHONPATH": ".",
    }
    handler.environment = environment
    yield handler
    server.shutdown()


DOWNLOAD = """
import sys, logging
logging.basicConfig(level=logging.INFO)
from space import weights
seen = []
folder = weights.download(weights.source(sys.argv[1], gguf=sys.argv[2]), lambda done, total: seen.append((done, total)))
print("FOLDER", folder, *(seen[-1] if seen else (0, 0)))
"""


def download(hub, name="modelscope:me/mine", gguf="", **popen) -> subprocess.Popen:
    command = [sys.executable, "-c", DOWNLOAD, name, gguf]
    return subprocess.Popen(command, env=hub.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen) -> tuple[Path, int, int]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    _, folder, done, total = out.strip().splitlines()[-1].split()
    return Path(folder), int(done), int(total)


def test_modelscope_is_downloaded_with_progress_then_used_without_the_network(hub):
    folder, done, total = outcome(download(hub))
    weights.check(folder)
    assert done == total > 1_000_000
    assert not (folder / "pytorch_model.bin").exists() and not (folder / "modeling.py").exists()
    assert not any("pytorch_model.bin" in path or ".py" in path for path in hub.asked)
    hub.asked.clear()
    assert outcome(download(hub)) == (folder, 0, 0)
    assert hub.asked == []


def test_of_a_repository_with_gguf_files_the_one_that_the_settings_name_is_downloaded(hub):
    for name in ("mine-q4_k_m.gguf", "mine-q8_0.gguf"):
        (hub.folder / name).write_bytes(b"GGUF" + name.encode())
    folder, *_ = outcome(download(hub, gguf="*q4_k_m.gguf"))
    assert [file.name for file in folder.glob("*") if file.suffix in (".gguf", ".safetensors")] == ["mine-q4_k_m.gguf"]
    hub.asked.clear()
    assert outcome(download(hub, gguf="*q4_k_m.gguf"))[0] == folder
    assert hub.asked == []
    assert not list(outcome(download(hub))[0].glob("*q8_0.gguf"))


def test_an_interrupted_download_is_finished_by_the_next_start(hub):
    folder, *_ = outcome(download(hub))
    (folder / "model.safetensors").unlink()
    assert outcome(download(hub))[0] == folder
    weights.check(folder)


def test_a_second_process_waits_instead_of_downloading_twice(hub):
    hub.hold.clear()
    first = download(hub)
    while not any("model.safetensors" in path for path in hub.asked):
        assert first.poll() is None
        threading.Event().wait(0.05)
    second = download(hub)
    waiting = ""
    while "waiting for it" not in waiting:
        line = second.stderr.readline()
        assert line, waiting
        waiting += line
    hub.hold.set()
    assert outcome(first)[0] == outcome(second)[0]
    fetched = [path for path in hub.asked if path.endswith("?model.safetensors")]
    assert len(fetched) == 1, hub.asked


def test_a_repository_that_cannot_be_had_is_one_line(hub):
    process = download(hub, "modelscope:me/other")
    _, err = process.communicate(timeout=60)
    line = err.strip().splitlines()[-1]
    assert process.returncode == 1
    assert "modelscope:me/other could not be downloaded" in line and "--model" in line
