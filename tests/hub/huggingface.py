"""Hugging Face's API as far as huggingface_hub calls it: accounts, repositories, commits, and Spaces."""

from __future__ import annotations

import base64
import json
import re

from tests.hub.modelscope import one_by_one, start
from tests.hub.server import ATTRIBUTES, Handler, Hub, Repository, Request, Response

REPO = r"/api/(?P<kind>model|space)s/(?P<id>[^/]+/[^/]+)"


def needs_token(handler: Handler) -> Handler:
    def checked(hub: Hub, request: Request, match: re.Match) -> Response:
        if not hub.authorized(request):
            return Response(401, b'{"error": "Invalid username or password."}')
        return handler(hub, request, match)

    return checked


def known(handler) -> Handler:
    def found(hub: Hub, request: Request, match: re.Match) -> Response:
        repository = hub.visible(request, match.groupdict().get("kind") or "model", match["id"])
        if not repository:
            return Response(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        return handler(hub, request, match, repository)

    return found


def whoami(hub: Hub, request: Request, match: re.Match) -> Response:
    return Response.json({"type": "user", "name": hub.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})


def create(hub: Hub, request: Request, match: re.Match) -> Response:
    asked = request.json
    owner, name, kind = asked["organization"] or hub.user, asked["name"], asked.get("type") or "model"
    url = f"{hub.url}/{'spaces/' if kind == 'space' else ''}{owner}/{name}"
    if hub.get(kind, f"{owner}/{name}"):
        return Response.json({"error": "You already created this repo", "url": url}, 409)
    hub.create(
        kind, owner, name, branch="main", private=asked.get("visibility") == "private",
        files={".gitattributes": ATTRIBUTES}, settings=asked, status="NO_APP_FILE",
        secrets={}, variables={}, logs={"build": [], "run": []}, hardware="cpu-basic",
    )  # fmt: skip
    return Response.json({"url": url, "id": f"{owner}/{name}"})


def info(hub: Hub, request: Request, match: re.Match, repository: Repository) -> Response:
    about = {"id": repository.id, "modelId": repository.id, "sha": hub.head(repository), "private": repository.private}
    about["siblings"] = [{"rfilename": path} for path in hub.files(repository)]
    if repository.kind == "space":
        about |= {"host": f"https://{repository.owner}-{repository.name}.hf.space", "sdk": "gradio"}
    return Response.json(about)


def change(hub: Hub, request: Request, match: re.Match, repository: Repository) -> Response:
    repository.private = request.json.get("visibility") == "private" or bool(request.json.get("private"))
    return Response.json({"private": repository.private})


def tree(hub: Hub, request: Request, match: re.Match, repository: Repository) -> Response:
    found = []
    for path, file in hub.files(repository, _revision(match, repository)).items():
        entry = {"type": "file", "oid": file["oid"], "size": file["size"], "path": path}
        if file["lfs"]:
            entry["lfs"] = {"oid": file["lfs"], "size": file["size"], "pointerSize": len(file["content"])}
        found.append(entry)
    return Response.json(found)


def preupload(hub: Hub, request: Request, match: re.Match, repository: Repository) -> Response:
    """Says which files go through LFS: those above 10 MB here, and those that .gitattributes names."""
    there = hub.files(repository)
    patterns = there[".gitattributes"]["content"].decode()
    answers = []
    for file in request.json["files"]:
        lfs = file["size"] > 10e6 or f"*.{file['path'].rsplit('.')[-1]} filter=lfs" in patterns
        answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if known := there.get(file["path"]):
            answer["oid"] = known["lfs"] or known["oid"]
        answers.append(answer)
    return Response.json({"files": answers})


def commit(hub: Hub, request: Request, match: re.Match, repository: Repository) -> Response:
    """One JSON object a line: a header, then files (base64), LFS files (by hash) and deletions."""
    changes: dict[str, bytes | None] = {}
    message = ""
    for line in filter(None, request.body.decode().splitlines()):
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            message = value["summary"]
        elif item["key"] == "file":
            changes[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {value['size']}\n"
            changes[value["path"]] = pointer.encode()
        elif item["key"] == "deletedFile":
            changes[value["path"]] = None
    with hub.lock:
        made = hub.commit(repository, changes, message, hub.head(repository))
    if repository.kind == "space":
        _build(hub, repository)
    return Response.json({"commitUrl": f"{hub.url}/{repository.id}/commit/{made}", "commitOid": made})


def resolve(hub: Hub, request: Request, match: re.Match, repository: Repository) -> Response:
    file = hub.files(repository, _revision(match, repository)).get(match["path"])
    if not file:
        return Response(404, b"{}", {"X-Error-Code": "EntryNotFound"})
    headers = {"X-Repo-Commit": hub.head(repository), "ETag": f'"{file["lfs"] or file["oid"]}"'}
    return Response(200, hub.content(file), headers)


def _revision(match: re.Match, repository: Repository) -> str:
    return repository.branch if match["revision"] in ("main", "HEAD") else match["revision"]


def _build(hub: Hub, repository: Repository) -> None:
    about = repository.about
    about["status"] = "BUILDING"
    about["logs"] = {"build": (hub.build_fails or "Installing requirements").splitlines(), "run": ["Running"]}
    start(hub, repository)


def runtime(hub: Hub, request: Request, match: re.Match, repository: Repository) -> Response:
    about = repository.about
    shown = about["status"]
    if shown == "BUILDING":
        about["status"] = "BUILD_ERROR" if hub.build_fails else "RUNNING"
    hardware = {"current": about["hardware"], "requested": about["hardware"]}
    return Response.json({"stage": shown, "hardware": hardware, "sha": hub.head(repository)})


def hardware(hub: Hub, request: Request, match: re.Match, repository: Repository) -> Response:
    repository.about["hardware"] = request.json["flavor"]
    return runtime(hub, request, match, repository)


def restart(hub: Hub, request: Request, match: re.Match, repository: Repository) -> Response:
    _build(hub, repository)
    return runtime(hub, request, match, repository)


def values(hub: Hub, request: Request, match: re.Match, repository: Repository) -> Response:
    kept = repository.about[match["what"]]
    if request.method == "POST":
        kept[request.json["key"]] = request.json["value"]
    return Response.json({key: {"value": value} for key, value in kept.items()})


def logs(hub: Hub, request: Request, match: re.Match, repository: Repository) -> Response:
    events = [
        json.dumps({"data": line + "\n", "timestamp": "2026-01-01T00:00:00.000Z"})
        for line in repository.about["logs"][match["what"]]
    ]
    body = "".join(f"data: {event}\n\n" for event in events).encode()
    return Response(200, body, {"Content-Type": "text/event-stream"})


ROUTES: list[tuple[str, str, Handler]] = [
    ("GET", r"/api/whoami-v2", needs_token(whoami)),
    ("POST", r"/api/repos/create", needs_token(one_by_one(create))),
    ("POST", r"/api/validate-yaml", lambda *_: Response.json({"errors": [], "warnings": []})),
    ("POST", REPO + r"/preupload/(?P<revision>[^/]+)", needs_token(known(preupload))),
    ("POST", REPO + r"/commit/(?P<revision>[^/]+)", needs_token(known(commit))),
    ("PUT", REPO + r"/settings", needs_token(known(change))),
    ("GET", REPO + r"/tree/(?P<revision>[^/]+)", known(tree)),
    ("GET", REPO + r"/runtime", known(runtime)),
    ("POST", REPO + r"/hardware", needs_token(known(hardware))),
    ("POST", REPO + r"/restart", needs_token(known(restart))),
    ("GET|POST", REPO + r"/(?P<what>secrets|variables)", needs_token(known(values))),
    ("GET", REPO + r"/logs/(?P<what>run|build)", needs_token(known(logs))),
    ("GET", REPO + r"(?:/revision/[^/]+)?", known(info)),
    ("GET|HEAD", r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", known(resolve)),
]
