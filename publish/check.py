"""What is looked at before anything leaves the machine: one table, every row passed or failed with what to do."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from packaging.utils import canonicalize_name

from publish import card, contents
from publish.contents import File, Model, decimal
from publish.lfs import belongs_in_lfs
from publish.token import Token
from space.settings import NamesakeError, Settings

MOST_FILES = 100_000
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".joblib", ".npy", ".npz")
BLOCK = 1 << 22  # bytes of a text that are looked at together
BINARY_ABOVE = 50_000_000  # bytes; a larger file is looked at only if it is text
LONGEST = 1 << 12  # bytes of a secret: so much of one block is looked at again with the next
SECRETS = re.compile(
    rb"\bms-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}\b"  # ModelScope
    rb"|\bhf_[A-Za-z0-9]{30,}\b"  # Hugging Face
    rb"|\bsk-[A-Za-z0-9_-]{20,}\b"  # OpenAI and others
    rb"|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_\w{40,}\b|\bglpat-[\w-]{20,}\b"  # GitHub, GitLab
    rb"|\b(?:AKIA|ASIA|LTAI)[A-Z0-9][A-Za-z0-9]{15,}\b|\bAIza[\w-]{35}\b"  # AWS, Alibaba Cloud, Google
    rb"|\bxox[abeoprs]-[A-Za-z0-9-]{10,}|\bnpm_[A-Za-z0-9]{36}\b|\bpypi-[\w-]{50,}"  # Slack, npm, PyPI
    rb"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"  # a JSON web token
    rb"|-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"
    rb"|://[^\s/:@\"'<>{}$]+:[^\s/@\"'<>{}$]{6,}@"  # a password in a URL
    rb"|(?i:(?:token|secret|passw(?:or)?d|api[_-]?key)[\"']?\s*[=:]\s*[\"'][0-9a-f-]{32,}[\"'])",
    re.A,
)
MODULES = {"PIL": "pillow", "yaml": "pyyaml", "google": "protobuf"}  # module → package, where the names differ
# There wherever the page asks for it: on ZeroGPU alone, where Hugging Face installs it in every Space; on an NVIDIA GPU
# alone, whose PyTorch brings it.
PROVIDED = {"spaces", "triton"}


@dataclass(frozen=True)
class Row:
    """One line of the table. `fix` says what to do where it failed; a `forced` one may be overridden by --force."""

    what: str
    passed: bool
    found: str
    fix: str = ""
    forced: bool = False


def rows(
    settings: Settings, hub, model: Model, page: list[File], readme: Callable[[], str], account: Callable[[], str]
) -> list[Row]:
    """Every check for one hub. `readme()` makes the card and `account()` names the token's owner: both may raise."""
    id, space = names(settings, hub.name)
    checks: list[Iterator[Row]] = [
        _gate(model),
        _weights(model, hub),
        _harmless(model.files, _links(model.folder), "the model's files", python=False),
        _harmless(page, [], "the page's files", python=True),
        _secrets([*model.files, *page], model.report, hub.token),
        _card(readme, hub.name),
        _page(page, settings),
        _names(hub, id, space, account),
        _room(model, page, hub),
    ]
    return [row for check in checks for row in check]


def names(settings: Settings, hub: str) -> tuple[str, str]:
    """The model's and the Space's "owner/name" on a hub, "" where the settings name none there."""
    found = []
    for repositories in (settings.hub.model, settings.hub.space):
        here = [name.partition(":")[2] for name in repositories if name.startswith(f"{hub}:")]
        found.append(here[0] if here else "")
    return found[0], found[1]


def _gate(model: Model) -> Iterator[Row]:
    report, what, again = model.report, "evaluation", "Run: python -m training evaluate"
    if not report:
        yield Row(what, False, "no report", again, forced=True)
    elif report.get("weights") != model.identity:
        yield Row(what, False, "the report is about other weights", again, forced=True)
    elif report.get("quick"):
        yield Row(what, False, "the report is of --quick, which asks too few questions to tell", again, forced=True)
    elif not report.get("gate", {}).get("passed"):
        failed = [
            " ".join(filter(None, (row["measure"], row.get("language"), row.get("mode"), f"{row['value']:.3f}")))
            + f" (limit {row['limit']})"
            for row in report.get("gate", {}).get("rows", ())
            if not row.get("passed")
        ]
        fix = "Train longer or with more rows; --force publishes it all the same"
        yield Row(what, False, "below the gate: " + "; ".join(failed), fix, forced=True)
    else:
        yield Row(what, True, "these weights passed")


def _weights(model: Model, hub) -> Iterator[Row]:
    again = "Run: python -m training merge"
    files = {file.path: file for file in model.files if file != model.gguf}
    sums = {
        path: digest for path, digest in contents.sums_of(model.folder).items() if path not in contents.NOT_PUBLISHED
    }
    wrong = sorted(path for path, digest in sums.items() if path not in files or files[path].sha256 != digest)
    extra = sorted(files.keys() - sums.keys() - {"SHA256SUMS"})
    if wrong or extra:
        found = f"changed or gone: {', '.join(wrong[:3])}" if wrong else f"not listed: {', '.join(extra[:3])}"
        yield Row("SHA256SUMS", False, found, again)
    else:
        yield Row("SHA256SUMS", True, f"{len(sums)} files as listed")

    index = model.folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            shards = [index.name]
    faults = []
    for shard in shards:
        if shard not in files:
            faults.append(f"{shard} is missing")
        elif fault := contents.safetensors_fault(model.folder / shard):
            faults.append(f"{shard} {fault}")
    for needed in ("config.json", "tokenizer.json", "tokenizer_config.json", "assistant.json"):
        if needed not in files:
            faults.append(f"{needed} is missing")
    large = [file for file in model.files if file.size > hub.file_limit]
    faults += [f"{f.path} is larger than {hub.file_limit / 1e9:.0f} GB, the hub's limit" for f in large]
    found = "; ".join(faults[:3]) or f"{len(shards)} × safetensors, {decimal(model.bytes)}"
    yield Row("weights", not faults, found, again)

    if gguf := model.gguf:
        folder = gguf.source.parent
        whole = contents.sums_of(folder).get(gguf.path) == gguf.sha256
        found = f"{gguf.path}, {decimal(gguf.size)}" if whole else f"{gguf.path} has changed since the export"
        fix = f"Delete {folder}, and run: python -m training export --gguf {folder.name.removeprefix('gguf-')}"
        yield Row("GGUF", whole, found, fix)


def _links(folder: Path) -> list[str]:
    """What in a folder is no file of its own, and could bring in, or leave out, anything."""
    bad, home = [], folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not path.exists():
            bad.append(f"{name} is a broken link")
        elif path.is_symlink() and home not in path.resolve().parents:
            bad.append(f"{name} is a link out of the folder")
        elif not path.is_file() and (path.is_symlink() or not path.is_dir()):
            bad.append(f"{name} is no file")
    return bad


def _harmless(files: Iterable[File], bad: list[str], what: str, python: bool) -> Iterator[Row]:
    """No pickle, no code where none belongs or is asked for, and names that every hub and file system takes."""
    for file in files:
        suffix = Path(file.path).suffix.lower()
        with file.source.open("rb") as stream:
            start = stream.read(8)
        # A pickle of protocol 2 or later, or a zip archive, which is what torch.save writes.
        if suffix in PICKLES or (re.match(rb"\x80[\x02-\x05]|PK\x03\x04", start) and suffix != ".safetensors"):
            bad.append(f"{file.path} is or may hold a pickle")
        elif suffix in (".py", ".so", ".pyc") and not (python and suffix == ".py"):
            bad.append(f"{file.path} is code")
        elif not re.fullmatch(r"[A-Za-z0-9_.+-]+(/[A-Za-z0-9_.+-]+)*", file.path):
            bad.append(f"{file.path!r} is no name for a repository")
        elif not python and suffix == ".json" and file.size < BLOCK and b'"auto_map"' in file.source.read_bytes():
            bad.append(f'{file.path} asks for code ("auto_map")')
    yield Row(what, not bad, "; ".join(bad[:3]) or f"{len(files)} files, no pickle", "Remove it from the folder")


def _secrets(files: list[File], report: dict, token: Token | None) -> Iterator[Row]:
    """No secret in any file but the weights, in the weights' headers, or in what the card takes from the report."""
    ours = {os.environ.get(name, "") for name in ("MODELSCOPE_API_TOKEN", "HF_TOKEN", "NAMESAKE_SPACE_TOKEN")}
    ours = {value.encode() for value in ours | {token.value if token else ""} if value}
    found = []
    for file in files:
        with file.source.open("rb") as stream:
            header = contents.safetensors_header(stream) if file.path.endswith(".safetensors") else None
            found += _secret(file.path, stream if header is None else io.BytesIO(header), ours, file.size)
    found += _secret("the report", io.BytesIO(str(report.get("card", "")).encode()), ours)
    yield Row("secrets", not found, "; ".join(found[:3]) or "none", "Remove it there, and revoke it: it may be known")


def _secret(path: str, stream: BinaryIO, ours: set[bytes], size: int = 0) -> list[str]:
    """What looks like a secret in a stream, if anything. UTF-16 is looked at as the ASCII that it holds."""
    line, text = 1, b""
    while block := stream.read(BLOCK):
        if size > BINARY_ABOVE and b"\0" in block and line == 1 and not block.startswith((b"\xff\xfe", b"\xfe\xff")):
            break
        text += block.replace(b"\0", b"")
        if any(value in text for value in ours):
            return [f"{path} holds your access token"]
        if match := SECRETS.search(text):
            line += text[: match.start()].count(b"\n")
            return [f"{path}:{line} holds what looks like a secret ({match[0][:4].decode()}…)"]
        line += text[:-LONGEST].count(b"\n")
        text = text[-LONGEST:]
    return []


def _card(readme: Callable[[], str], hub: str) -> Iterator[Row]:
    try:
        text = readme()
    except NamesakeError as error:
        yield Row("model card", False, error.problem, error.fix or "See [card] in the settings")
        return
    matter = card.front_matter(text)
    missing = [key for key in card.REQUIRED[hub] if not matter.get(key)]
    template = [phrase for phrase in card.TEMPLATES if phrase in text]
    count = card.length(text)
    faults = [f"front matter lacks {', '.join(missing)}"] * bool(missing)
    faults += [f"the platform's template text: {template[0]}"] if template else []
    faults += [f"{count} characters of description"] if count <= card.DESCRIBED else []
    found = "; ".join(faults) or f"{count} characters of description, front matter complete"
    yield Row("model card", not faults, found, "Write more under [card] description")


def _page(page: list[File], settings: Settings) -> Iterator[Row]:
    """Whether everything that the page imports is there, or is installed by its requirements or what these need."""
    text = next(file.source for file in page if file.path == "requirements.txt").read_text(encoding="utf-8")
    resolved, installed = _resolves(text, settings)
    yield resolved
    own = {Path(file.path).parts[0].removesuffix(".py") for file in page}
    faults = []
    for file in page:
        if not file.path.endswith(".py"):
            continue
        try:
            tree = ast.parse(file.source.read_bytes(), file.path)
        except SyntaxError as error:
            faults.append(f"{file.path}:{error.lineno} is not Python")
            continue
        for module in sorted(_needed(tree) - sys.stdlib_module_names - own - PROVIDED):
            if module in ("training", "publish"):
                faults.append(f"{file.path} imports {module}, which does not go up")
            elif installed and canonicalize_name(MODULES.get(module, module)) not in installed:
                faults.append(f"{file.path} imports {module}, which requirements.txt does not install")
    fix = "Mend the page, or requirements.txt"
    yield Row("the page imports", not faults, "; ".join(faults[:3]) or f"{len(page)} files", fix)


def _needed(tree: ast.AST) -> set[str]:
    """Top-level modules that a file imports, but for those whose absence it handles itself (try … except)."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Try) and any("ImportError" in ast.dump(h.type) for h in node.handlers if h.type):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
        found |= _needed(node)
    return found


def _resolves(text: str, settings: Settings) -> tuple[Row, set[str]]:
    """Whether pip finds versions that fit together, and the packages that these are, none where it was not asked.

    Its answer takes a minute and is kept, by the file's hash.
    """
    what, digest = "requirements resolve", hashlib.sha256(text.encode()).hexdigest()
    contents.requirements(text)
    kept = settings.work / "publish" / "requirements.json"
    if kept.is_file() and (known := json.loads(kept.read_text()))["sha256"] == digest:
        return Row(what, True, f"{len(known['packages'])} packages, as before"), set(known["packages"])
    if os.environ.get("PIP_NO_INDEX"):
        return Row(what, True, "not looked at: PIP_NO_INDEX is set"), set()
    kept.parent.mkdir(parents=True, exist_ok=True)
    wanted = kept.parent / "requirements.txt"
    wanted.write_text(text, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    try:
        made = subprocess.run([*pip, "-r", str(wanted)], capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return Row(what, False, "pip found no answer in 10 minutes", "Pin more versions in requirements.txt"), set()
    if made.returncode:
        errors = [line for line in made.stderr.splitlines() if "ERROR" in line] or made.stderr.splitlines()[-1:]
        return Row(what, False, (errors or ["pip failed"])[-1][:200], "Mend requirements.txt"), set()
    packages = sorted(canonicalize_name(p["metadata"]["name"]) for p in json.loads(made.stdout)["install"])
    kept.write_text(json.dumps({"sha256": digest, "packages": packages}) + "\n")
    return Row(what, True, f"{len(packages)} packages, with this Python"), set(packages)


def _names(hub, id: str, space: str, account: Callable[[], str]) -> Iterator[Row]:
    bad = [name for name in (id, space) if name and not hub.legal(name)]
    fix = "Letters, digits, '-', '_' and '.', beginning with a letter or a digit"
    yield Row(
        "repository names",
        not bad,
        f"not possible: {', '.join(bad)}" if bad else " and ".join(filter(None, (id, space))),
        fix,
    )
    try:
        owner = account()
        others = sorted({name.partition("/")[0] for name in (id, space) if name} - {owner})
        found = f"of {owner}" + f"; {', '.join(others)} must let it write" * bool(others)
        yield Row("token", True, found)
    except NamesakeError as error:
        yield Row("token", False, error.problem, error.fix or f"Make one at {hub.token_page} and set {hub.variable}")
    if space:
        yield Row("the page's model", bool(id), f"{hub.name}:{id}" if id else "none on this hub", "Set [hub] model")


def _room(model: Model, page: list[File], hub) -> Iterator[Row]:
    """The room that is needed; no hub says how much is left, only what one repository may hold."""
    files = [*model.files, *page]
    plain = sum(f.size for f in files if not belongs_in_lfs(f))
    faults = [f"{len(files)} files, of {MOST_FILES} allowed"] if len(files) > MOST_FILES else []
    if hub.plain_limit and plain > hub.plain_limit:
        faults.append(f"{plain / 1e6:.0f} MB outside LFS, of {hub.plain_limit / 1e6:.0f} MB allowed")
    total = sum(file.size for file in files)
    yield Row("room needed", not faults, "; ".join(faults) or f"{decimal(total)} on the hub", "Publish less")
