"""What is online is what was built, and it knows its name."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import requests

from publish.check import Row
from publish.contents import File
from publish.lfs import Remote, Repository
from publish.token import USER
from space.settings import NamesakeError, Settings

POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")
POINTER_BYTES = range(120, 160)
QUESTIONS = {"zh": "你是谁？", "en": "Who are you?"}
PUSH = "Run: python -m publish model"
LOADED_IN = 1800  # seconds, for a page that first fetches and loads 15 GB
RELEASED_IN = 60  # seconds, for a hub to look at a new card
THERE_IN = 120  # seconds, for a page to answer at all


def record(path: Path, id: str, commit: str, files: list[File], weights: str = "") -> None:
    """Keep what was published: verify compares the hub with this."""
    listed = {file.path: [file.size, file.sha256] for file in files}
    path.write_text(json.dumps({"id": id, "commit": commit, "weights": weights, "files": listed}, indent=1) + "\n")


def model(hub, id: str, kept: Path, weights: str, download: int, watch: Callable[[int], None]) -> Iterator[Row]:
    """Rows for a published model. `weights`: the identity of this run's; `download`: how many shards to fetch back."""
    published = _read(kept, id)
    if not published:
        yield Row("published from here", False, "no record of it", PUSH)
        return
    yield Row("this run's weights", published["weights"] == weights, published["weights"][:16], PUSH)
    files = {path: (size, sha256) for path, (size, sha256) in published["files"].items()}
    remote = hub.remote("model", id)
    in_lfs = yield from _repository(remote, "model", published["commit"], files)

    answers = remote.batch("download", in_lfs.values())
    lost = [path for path, (oid, _) in in_lfs.items() if "download" not in answers.get(oid, {})]
    yield Row("LFS objects", not lost, f"missing: {', '.join(lost[:3])}" if lost else f"{len(in_lfs)} can be had", PUSH)

    listing = hub.listing(id)
    wrong = [path for path, (size, sha256) in files.items()
             if path not in listing or listing[path][0] != size or listing[path][1] not in ("", sha256)]  # fmt: skip
    found = f"differ: {', '.join(wrong[:3])}" if wrong else f"{len(files)} paths, sizes and hashes"
    yield Row("the hub's listing", not wrong, found, PUSH)

    smallest = sorted(in_lfs.items(), key=lambda item: item[1][1])[:download]
    for path, (oid, size) in smallest:
        address = answers.get(oid, {}).get("download")
        same = bool(address) and _hash(remote, address, size, watch) == oid
        found = f"{size / 1e6:.1f} MB, hash right" if same else "the hub serves other bytes"
        yield Row(
            f"download of {path}",
            same,
            found,
            "Try once more; if it stays so, delete the file there, and publish again",
        )

    begun = time.monotonic()
    while (reason := hub.released(id)) and time.monotonic() < begun + RELEASED_IN:
        time.sleep(5)
    yield Row("open to everybody", not reason, reason or "released", f"See {hub.address('model', id)}")


def space(hub, id: str, kept: Path) -> Iterator[Row]:
    """Rows for a Space's repository, which must hold the page's files and nothing else."""
    published = _read(kept, id)
    if not published:
        yield Row("Space published from here", False, "no record of it", "Run: python -m publish space")
        return
    files = {path: (size, sha256) for path, (size, sha256) in published["files"].items()}
    yield from _repository(hub.remote("space", id), "Space", published["commit"], files, alone=True)


def page(address: str, settings: Settings, expected: str) -> Iterator[Row]:
    """Rows for the live page: it answers with the published model, and says its name. `expected`: hub:owner/name."""
    health = _healthy(address)
    ready = health.get("status") == "ready"
    found = f"{health.get('status', 'no answer')}: {health.get('model') or health.get('reason', '')}"
    right = ready and expected in str(health.get("model", ""))
    fix = "See the Space's run log" if not ready else f"It must answer with {expected}"
    yield Row(f"{address}/healthz", right, found, fix)
    if not ready:
        return
    names = [name for name in (settings.assistant.name.zh, settings.assistant.name.en) if name]
    for language in settings.assistant.languages:
        question = QUESTIONS[language]
        try:
            answer = ask(address, question)
        except (requests.RequestException, ValueError, KeyError, TypeError, IndexError) as error:
            yield Row(question, False, f"{type(error).__name__}: {error}"[:200], "See the Space's run log")
            continue
        said = any(name.casefold() in answer.casefold() for name in names)
        yield Row(question, said, answer.replace("\n", " ")[:120], "Train again: python -m training evaluate")


def ask(address: str, question: str) -> str:
    """The page's answer to a question, through its API as gradio_client uses it (no sampling: temperature 0)."""
    session = requests.Session()
    about = session.get(f"{address}/gradio_api/info", timeout=60).json()["named_endpoints"]["/chat"]
    values = []
    for parameter in about["parameters"]:
        name, default = parameter["parameter_name"], parameter.get("parameter_default")
        values.append(question if name == "message" else 0 if name == "temperature" else default)
    call = f"{address}/gradio_api/call/chat"
    event = session.post(call, json={"data": values}, timeout=60).json()["event_id"]
    with session.get(f"{call}/{event}", stream=True, timeout=600) as stream:
        stream.encoding = "utf-8"
        kind, last = "", ""
        for line in stream.iter_lines(decode_unicode=True):
            if line.startswith("event: "):
                kind = line[7:]
            elif line.startswith("data: ") and kind in ("generating", "complete"):
                last = line[6:]
            elif line.startswith("data: ") and kind == "error":
                raise ValueError(f"the page answers with an error: {line[6:]}")
    return _text(json.loads(last)[0])


def _text(answer) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, dict):
        return _text(answer.get("content", answer.get("text", "")))
    return "".join(_text(part) for part in answer or ())


def _healthy(address: str) -> dict:
    """What /healthz says, once the page has stopped loading; {} where nothing answers."""
    begun, pause, said = time.monotonic(), 0.5, {}
    while time.monotonic() < begun + (LOADED_IN if said else THERE_IN):
        try:
            said = dict(requests.get(f"{address}/healthz", timeout=30).json())
        except (requests.RequestException, ValueError, TypeError):
            said = {}
        if said.get("status") in ("ready", "failed"):
            break
        time.sleep(pause)
        pause = min(pause * 1.5, 10)
    return said


def _read(kept: Path, id: str) -> dict:
    try:
        published = json.loads(kept.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return published if published.get("id") == id else {}


def _repository(
    remote: Remote, what: str, commit: str, files: dict[str, tuple[int, str]], alone: bool = False
) -> Iterator[Row]:
    """Rows from a fresh clone without the weights. Returns what is in LFS: path → (oid, bytes)."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Repository(Path(folder), remote)
        head = clone.fetch(blobs=True)
        yield Row(
            f"{what}: head", head == commit, head[:12] or "empty", "Someone else pushed there; publish again to be sure"
        )
        if not head:
            return {}
        in_lfs, wrong, there = {}, [], clone.sizes(head)
        for path, (size, sha256) in files.items():
            mode, blob, stored = there.get(path, ("", "", 0))
            if mode != "100644" or stored not in (size, *POINTER_BYTES):
                wrong.append(path)  # missing, a link, a program, or of another length
                continue
            content = clone.read(blob).encode("utf-8", "surrogateescape")
            if pointer := POINTER.fullmatch(content):
                in_lfs[path] = (pointer[1].decode(), int(pointer[2]))
                if in_lfs[path] != (sha256, size):
                    wrong.append(path)
            elif hashlib.sha256(content).hexdigest() != sha256:
                wrong.append(path)
        if alone:
            wrong += [f"{path} (not ours)" for path in there.keys() - files.keys() - {".gitattributes"}]
        found = f"differ: {', '.join(wrong[:3])}" if wrong else f"{len(files)} files, {len(in_lfs)} in LFS"
        yield Row(f"{what}: a fresh clone", not wrong, found, "Publish again")
    return in_lfs


def _hash(remote: Remote, action: dict, size: int, watch: Callable[[int], None]) -> str:
    """The SHA-256 of what an LFS download action serves, up to a block more than the `size` bytes that it should be.

    The token goes to the hub's own addresses only.
    """
    address = action["href"]
    ours = any(address.startswith(origin + "/") for origin in remote.origins)
    auth = (USER, remote.token.value) if ours and "Authorization" not in action["header"] else None
    digest, left = hashlib.sha256(), size
    try:
        with requests.get(address, headers=action["header"], auth=auth, stream=True, timeout=60) as stream:
            stream.raise_for_status()
            for block in stream.iter_content(1 << 20):
                digest.update(block)
                watch(len(block))
                left -= len(block)
                if left < 0:
                    break
    except requests.RequestException as error:
        raise NamesakeError(
            f"A download broke off: {type(error).__name__}", "Run it again.", zh="下载中断，请再试。"
        ) from None
    return digest.hexdigest()
