"""A model hub on loopback: git, git-lfs, and what ModelScope's and Hugging Face's own clients ask for.

Git is real (`git http-backend`), and git-lfs, modelscope-hub and huggingface_hub talk to it as they do to the services.
It keeps a log of every request, checks after every change that no branch shows a half-made model, and breaks on
request: `hub.faults.append(Fault("PUT /lfs/", status=500))`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

ATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"
POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")


@dataclass
class Fault:
    """What goes wrong, once or `times` times, with requests whose "METHOD path" the pattern finds.

    `status` answers so at once, with `body`; `cut` closes the connection after so many bytes of the body (sent or
    received); `hold` stops until `release` is set; `lose` and `corrupt` say that an upload is stored and store nothing
    or other bytes; `mute` does what was asked and closes the connection without an answer; `wrong` serves other bytes;
    `redirect` sends elsewhere. `skip` lets that many requests pass first.
    """

    pattern: str
    status: int = 0
    body: bytes = b""
    cut: int = -1
    hold: bool = False
    lose: bool = False
    corrupt: bool = False
    mute: bool = False
    wrong: bool = False
    redirect: str = ""
    times: int = 1
    skip: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


@dataclass
class Request:
    """One request as it came, and how it was answered."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes | Path = b""
    status: int = 0
    fault: Fault | None = None

    @property
    def json(self):
        return json.loads(self.body or b"null")

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Response:
    status: int = 200
    body: bytes | Path = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value, status: int = 200) -> Response:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


@dataclass
class Repository:
    """A repository: a bare git folder, and what the hub's pages know about it."""

    kind: str  # "model" or "space"
    owner: str
    name: str
    git: Path
    branch: str
    private: bool
    about: dict = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.owner}/{self.name}"


Handler = Callable[["Hub", Request, re.Match], Response]


class Hub:
    """The server. `with Hub(folder) as hub:` serves at `hub.url` until the block ends.

    `run_space(repository, folder, variables) -> None`, where given, starts a deployed Space from a clone of it.
    """

    def __init__(self, folder: Path, token: str = "ms-0f1e2d3c-token", user: str = "alice", run_space=None):
        from tests.hub import huggingface, modelscope

        self.folder, self.token, self.user, self.run_space = folder, token, user, run_space
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.half_made: list[str] = []  # branches that pointed at objects which were not there, ever
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.uploads_need_token = False
        self.uploads_at = ""  # another host's address, to which the batch answers send uploads
        self.downloads_at = ""  # the same for downloads
        self.page_status, self.page_model = "ready", "modelscope:alice/beibei"  # a page that only pretends, at /page
        self.page_answer = "我是小北，由北斗工作室打造。 I am Beibei."
        self.build_fails = ""  # the log of a build that fails
        self.lock = threading.RLock()
        self.routes: list[tuple[str, str, Handler]] = [*ROUTES, *modelscope.ROUTES, *huggingface.ROUTES]
        (folder / "lfs").mkdir(parents=True, exist_ok=True)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for fault in self.faults:
            fault.release.set()
        self.server.shutdown()
        self.server.server_close()

    def count(self, pattern: str) -> int:
        """How many logged requests' "METHOD path" the pattern finds."""
        return sum(bool(re.search(pattern, request.line)) for request in self.log)

    def authorized(self, request: Request) -> bool:
        """Whether the request carries the token: git's basic auth, a bearer, or ModelScope's session cookie."""
        kind, _, value = request.headers.get("authorization", "").partition(" ")
        if kind == "Basic":
            with contextlib.suppress(ValueError):
                return base64.b64decode(value).decode() == f"oauth2:{self.token}"
        return value == self.token or f"m_session_id={self.token}" in request.headers.get("cookie", "")

    # Repositories

    def create(self, kind: str, owner: str, name: str, *, branch: str, private: bool, files: dict, **about):
        """A new repository that already holds a commit, as the services make them."""
        path = self.folder / "git" / f"{kind}s" / owner / f"{name}.git"
        subprocess.run(["git", "init", "--quiet", "--bare", "-b", branch, path], check=True)
        for key in ("http.receivepack", "uploadpack.allowFilter", "uploadpack.allowAnySHA1InWant"):
            self.git(path, "config", key, "true")
        self.git(path, "config", "receive.denyNonFastForwards", "true")
        repository = Repository(kind, owner, name, path, branch, private, about)
        self.repositories[kind, repository.id] = repository
        self.commit(repository, {path: text.encode() for path, text in files.items()}, "Initial commit")
        return repository

    def get(self, kind: str, id: str) -> Repository | None:
        return self.repositories.get((kind, id))

    def visible(self, request: Request, kind: str, id: str) -> Repository | None:
        repository = self.get(kind, id)
        return repository if repository and (not repository.private or self.authorized(request)) else None

    @staticmethod
    def git(path: Path, *arguments, stdin: bytes = b"", **environment) -> bytes:
        environment = {**os.environ, **environment}
        return subprocess.run(
            ["git", "-C", path, *arguments], input=stdin, env=environment, check=True, capture_output=True
        ).stdout

    def head(self, repository: Repository) -> str:
        return self.git(repository.git, "rev-parse", repository.branch).decode().strip()

    def commit(
        self, repository: Repository, files: dict[str, bytes | None], message: str, parent: str = "", mode="100644"
    ) -> str:
        """Commit changes to files (None deletes) on the server's side, as a hub's API does."""
        index = {"GIT_INDEX_FILE": str(repository.git / "hub-index")}
        who = {f"GIT_{role}_{what}": "hub" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        git = repository.git
        parents = ["-p", parent] if parent else []
        self.git(git, "read-tree", *([parent] if parent else ["--empty"]), **index)
        for path, content in files.items():
            if content is None:
                self.git(git, "update-index", "--index-info", stdin=f"0 {'0' * 40}\t{path}\n".encode(), **index)
                continue
            oid = self.git(git, "hash-object", "-w", "--stdin", stdin=content).decode().strip()
            self.git(git, "update-index", "--add", "--cacheinfo", f"{mode},{oid},{path}", **index)
        tree = self.git(git, "write-tree", **index).decode().strip()
        commit = self.git(git, "commit-tree", tree, *parents, stdin=message.encode(), **who).decode().strip()
        self.git(git, "update-ref", f"refs/heads/{repository.branch}", commit)
        self.check_whole(repository)
        return commit

    def files(self, repository: Repository, revision: str = "") -> dict[str, dict]:
        """Every file of a revision: path → oid, content (of git), and for LFS its sha256; size as a client sees it."""
        tree = self.git(repository.git, "ls-tree", "-r", "-z", revision or repository.branch)
        tree = tree.decode("utf-8", "surrogateescape")
        blobs = {line.split("\t")[1]: line.split("\t")[0].split()[2] for line in tree.split("\0") if line}
        batch = self.git(repository.git, "cat-file", "--batch", stdin="\n".join(blobs.values()).encode())
        found, place = {}, 0
        for path, oid in blobs.items():  # each: "oid type size", a line break, the content, a line break
            start = batch.index(b"\n", place) + 1
            size = int(batch[place:start].split()[2])
            content, place = batch[start : start + size], start + size + 1
            pointer = POINTER.fullmatch(content)
            found[path] = {
                "oid": oid,
                "content": content,
                "lfs": pointer[1].decode() if pointer else "",
                "size": int(pointer[2]) if pointer else size,
                "sha256": pointer[1].decode() if pointer else hashlib.sha256(content).hexdigest(),
            }
        return found

    def check_whole(self, repository: Repository) -> None:
        for path, file in self.files(repository).items():
            stored = self.object(file["lfs"])
            if file["lfs"] and not (stored.exists() and stored.stat().st_size == file["size"]):
                self.half_made.append(f"{repository.id}:{path}")

    def object(self, oid: str) -> Path:
        return self.folder / "lfs" / oid

    def content(self, file: dict) -> bytes | Path:
        return self.object(file["lfs"]) if file["lfs"] else file["content"]

    # Answers

    def answer(self, request: Request) -> Response:
        for method, pattern, handler in self.routes:
            if request.method in method.split("|") and (match := re.fullmatch(pattern, request.path)):
                return handler(self, request, match)
        return Response(404, b"no such page")


def _handler(hub: Hub):
    class HTTP(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def read(self) -> bytes | Path:
            """The body; an upload's goes to a file."""
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                body = b""
                while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body
            left = int(self.headers.get("Content-Length") or 0)
            if self.command != "PUT" or left < 1 << 20:
                return self.rfile.read(left) if left else b""
            incoming = hub.folder / f"incoming.{threading.get_ident()}"
            with incoming.open("wb") as file:
                while left and (block := self.rfile.read(min(left, 1 << 20))):
                    left -= file.write(block)
            return incoming

        def serve(self):
            parts = urlsplit(self.path)
            query = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
            headers = {key.lower(): value for key, value in self.headers.items()}
            request = Request(self.command, unquote(parts.path), query, headers)
            with hub.lock:
                hub.log.append(request)
                request.fault = fault = next((f for f in hub.faults if re.search(f.pattern, request.line)), None)
                if fault and fault.skip:
                    fault.skip -= 1
                    request.fault = fault = None
                elif fault:
                    fault.times -= 1
                    if not fault.times:
                        hub.faults.remove(fault)
            if fault:
                fault.reached.set()
            if fault and fault.hold:
                fault.release.wait(120)
            if fault and fault.cut >= 0 and self.command in ("PUT", "POST"):
                self.rfile.read(min(fault.cut, int(self.headers.get("Content-Length") or 0)))
                self.close_connection = True
                return self.connection.close()
            request.body = self.read()
            if fault and fault.status:
                response = Response(fault.status, fault.body or HTTPStatus(fault.status).phrase.encode())
                if fault.status == 401:
                    response.headers["WWW-Authenticate"] = 'Basic realm="hub"'
            elif fault and fault.redirect:
                response = Response(307, headers={"Location": fault.redirect + self.path})
            else:
                response = hub.answer(request)
            request.status = response.status
            if fault and fault.mute:
                self.close_connection = True
                return self.connection.close()
            return self.send(request, response, fault)

        def send(self, request: Request, response: Response, fault: Fault | None):
            file = response.body if isinstance(response.body, Path) else None
            size = file.stat().st_size if file else len(response.body)
            start, end = 0, size
            if (
                asked := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
            ) and response.status == 200:
                start, end = int(asked[1]), min(size, int(asked[2] or size - 1) + 1)
                response.status = request.status = 206
                response.headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
            self.send_response(response.status)
            for key, value in response.headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            if request.method == "HEAD":
                return
            if file:
                with file.open("rb") as stream:
                    stream.seek(start)
                    left = end - start
                    while left and (block := stream.read(min(left, 1 << 20))):
                        left -= len(block)
                        if fault and fault.cut >= 0:
                            self.wfile.write(block[: fault.cut])
                            self.close_connection = True
                            return
                        self.wfile.write(bytes(len(block)) if fault and fault.wrong else block)
            else:
                body = response.body[start:end]
                self.wfile.write(body[: fault.cut] if fault and fault.cut >= 0 else body)
                if fault and fault.cut >= 0:
                    self.close_connection = True

        def handle_one_request(self):
            with contextlib.suppress(ConnectionError):
                super().handle_one_request()

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = serve

    return HTTP


# Git and git-lfs. Paths: /owner/name.git, /studios/owner/name.git (ModelScope), /spaces/owner/name.git (Hugging Face).

GIT = r"(?P<space>/studios|/spaces|)/(?P<id>[^/]+/[^/]+?)(?:\.git)?"


def _repository(hub: Hub, request: Request, match: re.Match, writes: bool) -> Repository | Response:
    kind = "space" if match["space"] else "model"
    repository = hub.get(kind, match["id"])
    if not hub.authorized(request) and (writes or (repository and repository.private)):
        return Response(401, b'{"message": "token needed"}', {"WWW-Authenticate": 'Basic realm="hub"'})
    return repository or Response(404, b'{"message": "repository not found"}')


def git(hub: Hub, request: Request, match: re.Match) -> Response:
    """Smart HTTP through git's own CGI program."""
    writes = "git-receive-pack" in (match["service"], request.query.get("service"))
    repository = _repository(hub, request, match, writes)
    if isinstance(repository, Response):
        return repository
    environment = {
        "PATH": os.environ["PATH"],
        "GIT_PROJECT_ROOT": str(repository.git),
        "GIT_HTTP_EXPORT_ALL": "1",
        "PATH_INFO": "/" + match["service"],
        "REQUEST_METHOD": request.method,
        "QUERY_STRING": "&".join(f"{key}={value}" for key, value in request.query.items()),
        "CONTENT_TYPE": request.headers.get("content-type", ""),
        "CONTENT_LENGTH": str(len(request.body)),
        "HTTP_CONTENT_ENCODING": request.headers.get("content-encoding", ""),
        "GIT_PROTOCOL": request.headers.get("git-protocol", ""),
        "REMOTE_USER": hub.user,
    }
    with hub.lock if writes else contextlib.nullcontext():
        made = subprocess.run(["git", "http-backend"], input=request.body, env=environment, capture_output=True)
        if match["service"] == "git-receive-pack":
            hub.check_whole(repository)
    head, _, body = made.stdout.partition(b"\r\n\r\n")
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if ": " in line)
    return Response(int(headers.pop("Status", "200").split()[0]), body, headers)


def lfs_batch(hub: Hub, request: Request, match: re.Match) -> Response:
    """https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md, the basic transfer."""
    asked = request.json
    uploads = asked["operation"] == "upload"
    repository = _repository(hub, request, match, uploads)
    if isinstance(repository, Response):
        return repository
    objects = []
    for item in asked["objects"]:
        stored, answer = hub.object(item["oid"]).exists(), {"oid": item["oid"], "size": item["size"]}
        href = f"{(uploads and hub.uploads_at) or hub.url}/lfs/{item['oid']}"
        if uploads and not stored:
            answer["actions"] = {"upload": {"href": f"{href}?size={item['size']}"}, "verify": {"href": href}}
            if not hub.uploads_need_token:
                answer["actions"]["upload"]["href"] += "&signed=1"
        elif not uploads and stored:
            href = f"{hub.downloads_at or hub.url}/lfs/{item['oid']}?signed=1"
            answer["actions"] = {"download": {"href": href}}
        elif not uploads:
            answer["error"] = {"code": 404, "message": "object does not exist"}
        objects.append(answer)
    response = Response.json({"transfer": "basic", "objects": objects, "hash_algo": "sha256"})
    response.headers["Content-Type"] = "application/vnd.git-lfs+json"
    return response


def lfs_upload(hub: Hub, request: Request, match: re.Match) -> Response:
    """Stores an object whose bytes have its hash, and nothing else, unless a fault says otherwise."""
    if "signed" not in request.query and not hub.authorized(request):
        return Response(401, b"{}", {"WWW-Authenticate": 'Basic realm="hub"'})
    fault, oid = request.fault, match["oid"]
    aside = request.body
    if isinstance(aside, bytes):
        aside = hub.object(f"{oid}.{threading.get_ident()}")
        aside.write_bytes(request.body)
    request.body = b""  # not kept in the log
    size = aside.stat().st_size
    with aside.open("rb") as file:
        right = hashlib.file_digest(file, "sha256").hexdigest() == oid
    if not right or size != int(request.query.get("size", size)):
        return Response.json({"message": "the bytes do not have this hash"}, 422)
    if fault and fault.corrupt:
        aside.write_bytes(bytes(size))
    if not (fault and fault.lose):
        aside.replace(hub.object(oid))
    return Response()


def lfs_verify(hub: Hub, request: Request, match: re.Match) -> Response:
    """The action that a client calls after an upload: a stored object that is not what it should be goes away."""
    stored = hub.object(match["oid"])
    if not stored.exists():
        return Response.json({"message": "nothing stored"}, 404)
    with stored.open("rb") as file:
        right = hashlib.file_digest(file, "sha256").hexdigest() == match["oid"]
    if not right:
        stored.unlink()
        return Response.json({"message": "what was stored has another hash"}, 422)
    return Response()


def lfs_download(hub: Hub, request: Request, match: re.Match) -> Response:
    stored = hub.object(match["oid"])
    return Response(200, stored) if stored.exists() else Response(404)


def page_health(hub: Hub, request: Request, match: re.Match) -> Response:
    status = 200 if hub.page_status == "ready" else 503
    return Response.json({"status": hub.page_status, "model": hub.page_model, "reason": "out of memory"}, status)


def page_info(hub: Hub, request: Request, match: re.Match) -> Response:
    names = {"message": None, "system": "You are …", "temperature": 0.7}
    parameters = [{"parameter_name": name, "parameter_default": value} for name, value in names.items()]
    return Response.json({"named_endpoints": {"/chat": {"parameters": parameters}}})


def page_call(hub: Hub, request: Request, match: re.Match) -> Response:
    if request.method == "POST":
        return Response.json({"event_id": "1"})
    answer = json.dumps([hub.page_answer])
    body = f'event: generating\ndata: ["…"]\n\nevent: complete\ndata: {answer}\n\n'
    return Response(200, body.encode(), {"Content-Type": "text/event-stream"})


ROUTES: list[tuple[str, str, Handler]] = [
    ("GET", r"/page/healthz", page_health),
    ("GET", r"/page/gradio_api/info", page_info),
    ("GET|POST", r"/page/gradio_api/call/chat(?:/1)?", page_call),
    ("POST", GIT + r"/info/lfs/objects/batch", lfs_batch),
    ("GET|POST", GIT + r"/(?P<service>info/refs|git-upload-pack|git-receive-pack)", git),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", lfs_upload),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})", lfs_verify),
    ("GET|HEAD", r"/lfs/(?P<oid>[0-9a-f]{64})", lfs_download),
]
