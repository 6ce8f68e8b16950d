"""Push files to a hub by git and git-lfs: weights first, commit last, no second copy, and no token anywhere.

The weights are hard-linked into git-lfs's own store and uploaded before any commit names them, so the branch never
shows a half-made model and a rerun sends only what is missing. The commit is made with git's plumbing on top of what
the repository holds; nothing is checked out.

Pointer files: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md, and the batch API that says which objects a
hub holds: https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md.
"""

from __future__ import annotations

import collections
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import requests

from publish.contents import File
from publish.token import USER, Token
from space.settings import NamesakeError

LFS_ABOVE = 5_000_000  # bytes; both hubs want larger files in LFS
LFS_KINDS = (".safetensors", ".gguf")  # and these, whatever their size
ATTRIBUTE = "filter=lfs diff=lfs merge=lfs -text"
SMALL = 65_536  # bytes; .gitattributes is smaller, and comes with the trees
ARGUMENTS = 500  # oids in one command line
MEMORY = Path("/dev/shm")  # a file system that lies in memory

# git asks it for a user name and a password. It answers for the hub's own addresses only, whoever redirects where, and
# a few times in one command: refused, git-lfs would ask for ever.
ASKPASS = """#!/bin/sh
address=${1#*[\\'\\"]}
address=${address%%[\\'\\"]*}
host=${address#*://}
host=${host%%/*}
case " $NAMESAKE_ORIGINS " in
*" ${address%%://*}://${host##*@} "*) ;;
*) exit 1 ;;
esac
echo "$1" >>"$NAMESAKE_ASKED"
[ "$(wc -l <"$NAMESAKE_ASKED")" -le 64 ] || exit 1
case $1 in
Username*) echo oauth2 ;;
Password*) printf '%s\\n' "$NAMESAKE_TOKEN" ;;
*) exit 1 ;;
esac
"""


@dataclass(frozen=True)
class Pushed:
    """The branch's head after a push, whether that push made it, and how many bytes of weights went up for it."""

    commit: str
    changed: bool
    sent: int


@dataclass(frozen=True)
class Remote:
    """A hub's repository as git sees it. `origins` are the addresses (https://host) that may be sent the token."""

    url: str
    branch: str
    token: Token
    origins: tuple[str, ...]

    def batch(self, operation: str, objects: Iterable[tuple[str, int]]) -> dict[str, dict]:
        """What the hub's LFS server offers for (oid, bytes) pairs: oid → action → {"href": address, "header": {…}}.

        The token follows no redirect.
        """
        objects = [{"oid": oid, "size": size} for oid, size in objects]
        answers: dict[str, dict] = {}
        for start in range(0, len(objects), 100):
            asked = {"operation": operation, "transfers": ["basic"], "objects": objects[start : start + 100]}
            headers = {"Accept": "application/vnd.git-lfs+json", "Content-Type": "application/vnd.git-lfs+json"}
            try:
                answer = requests.post(
                    f"{self.url}/info/lfs/objects/batch",
                    json=asked | {"hash_algo": "sha256"},
                    headers=headers,
                    auth=(USER, self.token.value),
                    allow_redirects=False,
                    timeout=60,
                )
            except requests.RequestException as error:
                raise explain(f"{self.url}: {type(error).__name__}", self) from None
            if answer.status_code != 200:
                raise explain(f"{self.url}: the LFS server answers HTTP {answer.status_code}", self)
            try:
                answers |= {item["oid"]: _actions(item) for item in answer.json()["objects"]}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise explain(f"{self.url}: the LFS server's answer is none", self) from None
        return answers

    def missing(self, files: Iterable[File]) -> list[File]:
        """The files whose content the hub's LFS server can't deliver."""
        files = list(files)
        answers = self.batch("download", {(file.sha256, file.size) for file in files})
        return [file for file in files if "download" not in answers.get(file.sha256, {})]


class Repository:
    """A bare repository in `folder` from which a remote is pushed to; made where there is none, kept between runs."""

    def __init__(self, folder: Path, remote: Remote):
        self.folder, self.remote = folder, remote
        folder.mkdir(parents=True, exist_ok=True)
        self._askpass = folder.resolve() / "askpass.sh"
        self._askpass.write_text(ASKPASS)
        self._askpass.chmod(0o700)
        if not (folder / "HEAD").exists():
            self.git("init", "--quiet", "--bare")
        self.git("config", "remote.origin.url", remote.url)

    # Commands

    def git(self, *arguments: str, stdin: str = "", watch: Callable[[], None] | None = None, **environment) -> str:
        """Run git and return what it printed. Raises NamesakeError that says what went wrong and what to do.

        What is not UTF-8 comes as surrogates (PEP 383): no byte is lost, whatever the hub holds.

        `watch` is called about five times a second meanwhile.
        """
        (self.folder / "asked").unlink(missing_ok=True)
        process = subprocess.Popen(
            ["git", *arguments],
            cwd=self.folder,
            env=self._environment() | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        said: collections.deque[str] = collections.deque(maxlen=200)
        output: list[bytes] = []
        readers = [
            threading.Thread(target=lambda: said.extend(line.decode("utf-8", "replace") for line in process.stderr)),
            threading.Thread(target=lambda: output.append(process.stdout.read())),
        ]
        for reader in readers:
            reader.start()
        try:
            if stdin:
                process.stdin.write(stdin.encode("utf-8", "surrogateescape"))
            process.stdin.close()
            while watch:
                try:
                    process.wait(0.2)
                    break
                except subprocess.TimeoutExpired:
                    watch()
            process.wait()
        except BrokenPipeError:
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            for reader in readers:
                reader.join()
        printed = b"".join(output).decode("utf-8", "surrogateescape")
        if process.returncode:
            raise explain("".join(said) + printed, self.remote)
        return printed

    def _environment(self) -> dict[str, str]:
        """The environment without what would steer git elsewhere or write its traces, token and all, to files."""
        kept = ("GIT_SSL", "GIT_HTTP", "GIT_PROXY", "GIT_CURL_VERBOSE", "GIT_EXEC_PATH")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith(kept)}
        settings = {
            "credential.helper": "",  # none: it would store the token
            "credential.useHttpPath": "false",
            "http.followRedirects": "false",
            "core.hooksPath": os.devnull,
            "lfs.url": f"{self.remote.url}/info/lfs",  # whatever an .lfsconfig in the repository says
            f"lfs.{self.remote.url}/info/lfs.access": "basic",  # no request without the token first
            "lfs.locksverify": "false",
            "gc.auto": "0",
        }
        for number, (key, value) in enumerate(settings.items()):
            environment |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
        who = {f"GIT_{role}_NAME": "Namesake" for role in ("AUTHOR", "COMMITTER")}
        who |= {f"GIT_{role}_EMAIL": "namesake@users.noreply.invalid" for role in ("AUTHOR", "COMMITTER")}
        return environment | who | {
            "GIT_CONFIG_COUNT": str(len(settings)),
            "GIT_DIR": str(self.folder.resolve()),
            "GIT_ASKPASS": str(self._askpass),
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_TRACE_REDACT": "1",
            **dict.fromkeys(("GIT_TRACE2", "GIT_TRACE2_EVENT", "GIT_TRACE2_PERF"), "0"),  # whatever ~/.gitconfig says
            "LC_ALL": "C",
            "NAMESAKE_ASKED": str(self.folder.resolve() / "asked"),
            "NAMESAKE_ORIGINS": " ".join(self.remote.origins),
            "NAMESAKE_TOKEN": self.remote.token.value,
        }  # fmt: skip

    # The remote's state

    def fetch(self, *, blobs: bool = False) -> str:
        """The remote branch's head, "" if it has none. Afterwards trees and small files are here, or all `blobs`."""
        listed = self.git("ls-remote", "origin", f"refs/heads/{self.remote.branch}").split()
        if listed and listed[0] not in self.git("for-each-ref", "--format=%(objectname)").split():
            tracking = f"refs/remotes/origin/{self.remote.branch}"
            refs = f"+refs/heads/{self.remote.branch}:{tracking}"
            without = () if blobs else (f"--filter=blob:limit={SMALL}",)
            self.git("fetch", "--quiet", "--no-tags", "--depth=1", *without, "origin", refs)
            return self.git("rev-parse", tracking).strip()
        return listed[0] if listed else ""

    def paths(self, commit: str) -> dict[str, str]:
        """Every file of a commit: path → the oid of its blob, which for an LFS file is the pointer's."""
        if not commit:
            return {}
        lines = filter(None, self.git("ls-tree", "-r", "-z", commit).split("\0"))
        return {line.partition("\t")[2]: line.split("\t")[0].split()[2] for line in lines}

    def read(self, blob: str) -> str:
        """A small file's text; fetched if it is not here yet."""
        return self.git("cat-file", "blob", blob)

    def sizes(self, commit: str) -> dict[str, tuple[str, str, int]]:
        """Every file of a commit whose blobs are here: path → its mode (100644 for a plain file), blob, and bytes."""
        lines = filter(None, self.git("ls-tree", "-r", "-z", "-l", commit).split("\0"))
        fields = ((line.partition("\t")[2], *line.partition("\t")[0].split()) for line in lines)
        return {path: (mode, blob, int(size)) for path, mode, kind, blob, size in fields if kind == "blob"}

    # Pushing

    def push(
        self,
        files: list[File],
        message: str,
        *,
        replaces: Callable[[dict[str, str]], set[str]],
        watch: Callable[[int, int], None] | None = None,
    ) -> Pushed:
        """Make the remote's branch hold `files` in one commit on top of what it holds.

        `replaces(paths)` says which of the files already there go away; `watch(sent, total)` hears of the bytes of
        weights that go up, which costs a little speed. Raises NamesakeError; running it again goes on where it stopped.
        """
        for _ in range(3):
            parent = self.fetch()
            tree, weights = self._tree(parent, files, replaces)
            sent = self._upload(weights, watch)
            if parent and tree == self.git("rev-parse", f"{parent}^{{tree}}").strip():
                return Pushed(parent, False, sent)
            before = ("-p", parent) if parent else ()
            commit = self.git("commit-tree", tree, *before, "-m", message).strip()
            try:
                self.git("push", "--quiet", "--no-verify", "origin", f"{commit}:refs/heads/{self.remote.branch}")
            except MovedError:
                continue  # somebody else pushed in between: on top of that, then
            self.git("update-ref", f"refs/remotes/origin/{self.remote.branch}", commit)
            return Pushed(commit, True, sent)
        raise NamesakeError(
            f"{self.remote.url}: the branch moves faster than this push",
            "See who else pushes there, and run it again.",
            zh=f"{self.remote.url} 的分支在推送期间不断变化。请确认没有别人同时推送，再运行一次。",
        )

    def _tree(self, parent: str, files: list[File], replaces) -> tuple[str, list[File]]:
        """The new commit's tree, and the files that are in LFS there because .gitattributes says so."""
        there = self.paths(parent)
        ours = {file.path for file in files}
        index = {"GIT_INDEX_FILE": str(self.folder.resolve() / "publish-index")}
        self.git("read-tree", *([parent] if parent else ["--empty"]), **index)

        kept = self.read(there[".gitattributes"]) if ".gitattributes" in there else ""
        text = attributes(kept, files)
        entries = [f"100644 {self._blob(text)}\t.gitattributes"]
        gone = replaces(there) - ours - {".gitattributes"}
        entries += [f"0 {'0' * 40}\t{path}" for path in sorted(gone)]
        self._index(entries, index)

        names = "\0".join(file.path for file in files) + "\0"
        fields = self.git("check-attr", "--cached", "-z", "--stdin", "filter", stdin=names, **index).split("\0")
        in_lfs = {path for path, value in zip(fields[0::3], fields[2::3], strict=False) if value == "lfs"}
        if overruled := sorted({file.path for file in files if belongs_in_lfs(file)} - in_lfs):  # by a line of theirs
            text += "".join(f"{path} {ATTRIBUTE}\n" for path in overruled)
            self._index([f"100644 {self._blob(text)}\t.gitattributes"], index)
            in_lfs |= set(overruled)
        weights = [file for file in files if file.path in in_lfs]

        entries = [f"100644 {self._blob(pointer(file))}\t{file.path}" for file in weights]
        plain = [file for file in files if file.path not in in_lfs]
        sources = "".join(f"{file.source.resolve()}\n" for file in plain)
        blobs = self.git("hash-object", "-w", "--no-filters", "--stdin-paths", stdin=sources).split()
        entries += [f"100644 {blob}\t{file.path}" for blob, file in zip(blobs, plain, strict=True)]
        self._index(entries, index)
        return self.git("write-tree", "--missing-ok", **index).strip(), weights

    def _index(self, entries: list[str], index: dict[str, str]) -> None:
        """Put entries into the index; by NUL, since a path on the hub may hold a line break."""
        self.git("update-index", "--replace", "-z", "--index-info", stdin="\0".join(entries) + "\0", **index)

    def _blob(self, text: str) -> str:
        return self.git("hash-object", "-w", "--stdin", stdin=text).strip()

    def _upload(self, weights: list[File], watch: Callable[[int, int], None] | None) -> int:
        """Send what the hub does not hold yet, and see that it then holds everything. Returns the bytes sent."""
        missing = self.remote.missing(weights)
        store = self.folder / "lfs" / "objects"
        shutil.rmtree(store, ignore_errors=True)  # links of an earlier run would keep replaced weights on the disk
        objects = {file.sha256: file for file in missing}
        total = sum(file.size for file in objects.values())
        if not objects:
            return 0
        for oid, file in objects.items():
            place = store / oid[:2] / oid[2:4] / oid
            place.parent.mkdir(parents=True, exist_ok=True)
            link(file.source.resolve(), place)
        told = watch or (lambda sent, total: None)
        told(0, total)
        oids = list(objects)
        with _Progress(wanted=watch is not None) as progress:
            for start in range(0, len(oids), ARGUMENTS):
                self.git(
                    "lfs", "push", "--object-id", "origin", *oids[start : start + ARGUMENTS],
                    watch=lambda: told(progress.sent(), total), **progress.environment,
                )  # fmt: skip
        told(total, total)
        shutil.rmtree(store)
        if lost := self.remote.missing(objects.values()):
            raise NamesakeError(
                f"{self.remote.url}: the hub took {lost[0].path} and does not have it",
                "Nothing was committed. Run it again; if it stays so, the hub's storage is at fault.",
                zh=f"{self.remote.url} 接收了 {lost[0].path}，却没有保存。没有提交任何内容，请再运行一次。",
            )
        return total


class _Progress:
    """How far git-lfs is, from the file that it writes: "upload 1/4 1234/5678 name" a line, for every 32 KB sent.

    It flushes each line to the disk, which would take five times as long as the upload on a fast network: the file lies
    in memory, and is emptied whenever it is read. Where there is no such place, progress is not known.
    """

    def __init__(self, wanted: bool):
        self._wanted = wanted

    def __enter__(self) -> _Progress:
        there = self._wanted and MEMORY.is_dir()
        self._folder = tempfile.TemporaryDirectory(dir=MEMORY) if there else None
        self._file = Path(self._folder.name) / "progress" if self._folder else None
        self.environment = {"GIT_LFS_PROGRESS": str(self._file)} if self._file else {}
        self._sent: dict[str, int] = {}
        return self

    def __exit__(self, *_) -> None:
        if self._folder:
            self._folder.cleanup()

    def sent(self) -> int:
        """Bytes sent so far."""
        if self._file and self._file.exists():
            lines = self._file.read_text(errors="replace").splitlines()
            os.truncate(self._file, 0)
            for line in lines:
                if found := re.fullmatch(r"upload \d+/\d+ (\d+)/\d+ (.+)", line):
                    self._sent[found[2]] = max(self._sent.get(found[2], 0), int(found[1]))
        return sum(self._sent.values())


def pointer(file: File) -> str:
    """The pointer file that stands in git for an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{file.sha256}\nsize {file.size}\n"


def belongs_in_lfs(file: File) -> bool:
    return file.size > LFS_ABOVE or file.path.endswith(LFS_KINDS)


def _actions(item: dict) -> dict[str, dict]:
    """The actions of one object of a batch answer. Raises TypeError, KeyError or AttributeError where they are none."""
    actions = {}
    for name, action in (item.get("actions") or {}).items():
        header = {str(key): str(value) for key, value in (action.get("header") or {}).items()}
        actions[name] = {"href": str(action["href"]), "header": header}
    return actions


def attributes(kept: str, files: list[File]) -> str:
    """.gitattributes with every line that is there kept, and one more for each kind of file that belongs in LFS."""
    weights = [file.path for file in files if belongs_in_lfs(file)]
    names = {next((f"*{kind}" for kind in LFS_KINDS if path.endswith(kind)), path) for path in weights}
    wanted = {f"{name} {ATTRIBUTE}" for name in names}
    new = sorted(wanted - set(kept.splitlines()))
    if kept and not kept.endswith("\n"):
        kept += "\n"
    return kept + "".join(f"{line}\n" for line in new)


def link(source: Path, place: Path) -> None:
    """A hard link, or a symbolic one where the file system has none to give."""
    try:
        os.link(source, place)
    except OSError:
        place.symlink_to(source)


class MovedError(NamesakeError):
    """The remote's branch is no longer where it was fetched."""


# What git, git-lfs and the hubs' servers say → (problem, fix, zh). The first that matches is it.
EXPLAINED = (
    (
        r"non-fast-forward|fetch first|\[rejected\]|cannot lock ref|remote rejected.*(?:stale|failed to update ref)",
        "the branch has moved",
        "Run it again.",
        "远端分支已变化，请再运行一次。",
    ),
    (
        r"\b401\b|[Uu]nauthorized|Authentication|Authorization error|could not read (?:U|P)|[Cc]redentials|askpass",
        "the hub refuses the token: it is wrong, has run out, or may not write there",
        "Set one that may, and run it again: what is up already is not sent twice.",
        "令牌无效、已过期或没有写入权限。请换一个令牌后再运行，已上传的部分不会重传。",
    ),
    (
        r"\b403\b|[Ff]orbidden|denied|not allowed",
        "the token may not write there",
        "Use a token with write permission, of an account that owns the repository.",
        "该令牌没有写入权限，请使用仓库所有者的可写令牌。",
    ),
    (
        r"\b413\b|[Tt]oo [Ll]arge|exceeds.*limit",
        "the hub refuses a file as too large",
        "Merge with smaller shards, and run it again.",
        "平台认为文件过大。请用更小的分片重新合并后再运行。",
    ),
    (
        r"No space left|[Dd]isk quota|\b507\b|Insufficient Storage|unable to write|write error|fsync error|signal 25",
        "there is no space left to write",
        "Free some space and run it again: it goes on where it stopped.",
        "磁盘空间不足。请清理后再运行，会从中断处继续。",
    ),
    (
        r"\b404\b|[Nn]ot [Ff]ound|does not exist",
        "the hub does not have this repository, or hides it from this token",
        "Check [hub] in the settings, and whose token it is.",
        "平台上没有这个仓库，或该令牌无权查看。请检查设置里的 [hub] 和令牌归属。",
    ),
    (
        r"redirect|\b30[1278]\b",
        "the hub redirects elsewhere, where the token is not sent",
        "Use the hub's own address as its endpoint.",
        "平台要求重定向到其他地址，令牌不会发往那里。请把平台自己的地址设为 endpoint。",
    ),
    (
        r"\b422\b|Unprocessable|hash|checksum",
        "the hub stored other bytes than were sent",
        "Nothing was committed. Run it again.",
        "平台收到的内容与发送的不一致。没有提交任何内容，请再运行一次。",
    ),
    (
        "",
        "the transfer was interrupted",
        "Run it again: only what is missing is sent.",
        "传输中断。再运行一次即可，只会补传缺少的部分。",
    ),
)


def explain(said: str, remote: Remote) -> NamesakeError:
    """The error for what git or a hub said: one line of it, without the token, and what to do."""
    said = remote.token.redact(said)
    telling = [
        line.strip() for line in said.splitlines() if re.match(r"\s*(!|fatal|error|remote|LFS|batch|http)", line)
    ]
    telling += [line.strip() for line in said.splitlines() if line.strip()][-1:]
    detail = telling[0][:300] if telling else "git said nothing"
    for pattern, problem, fix, zh in EXPLAINED:
        if re.search(pattern, "\n".join(telling) or said):
            kind = MovedError if problem == EXPLAINED[0][1] else NamesakeError
            host = urlsplit(remote.url).netloc
            return kind(f"{host}: {problem} ({detail})", fix, zh=f"{host}：{zh}（{detail}）")
    raise AssertionError("the last pattern matches everything")
