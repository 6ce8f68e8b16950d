"""ModelScope's API as far as modelscope-hub calls it: accounts, models, files, and studios (创空间).

Two envelopes: the older `/api/v1` says {"Code": 200, "Success": true, "Data": …}, OpenAPI {"success": true, "data": …}.
"""

from __future__ import annotations

import re

from tests.hub.server import ATTRIBUTES, Handler, Hub, Request, Response

ID = r"(?P<id>[^/]+/[^/]+)"
TEMPLATE = "---\nlicense: Apache License 2.0\n---\n"
TEMPLATE += "###### 该模型当前使用的是默认介绍模版，处于“预发布”阶段，页面仅限所有者可见。\n"
VISIBLE = {1: True, 3: True, 5: False}  # Visibility → private


def data(value) -> Response:
    return Response.json({"success": True, "data": value})


def old_data(value) -> Response:
    return Response.json({"Code": 200, "Success": True, "Message": "success", "Data": value})


def needs_token(handler: Handler) -> Handler:
    def checked(hub: Hub, request: Request, match: re.Match) -> Response:
        if not hub.authorized(request):
            return Response.json({"success": False, "code": "InvalidAuthentication", "message": "invalid token"}, 401)
        return handler(hub, request, match)

    return checked


def one_by_one(handler: Handler) -> Handler:
    """For handlers that look first and then create."""

    def alone(hub: Hub, request: Request, match: re.Match) -> Response:
        with hub.lock:
            return handler(hub, request, match)

    return alone


def whoami(hub: Hub, request: Request, match: re.Match) -> Response:
    return data({"username": hub.user, "email": f"{hub.user}@example.com"})


def create_model(hub: Hub, request: Request, match: re.Match) -> Response:
    asked = request.json
    owner, name = asked["Path"], asked["Name"]
    if hub.get("model", f"{owner}/{name}"):
        return Response.json({"Code": 10010101001, "Success": False, "Message": "该名称已被注册使用，请重新命名"}, 400)
    files = {"README.md": TEMPLATE, ".gitattributes": ATTRIBUTES}
    private = VISIBLE[asked["Visibility"]]
    hub.create("model", owner, name, branch="master", private=private, files=files, visibility=asked["Visibility"])
    return old_data({"Path": owner, "Name": name, "Visibility": asked["Visibility"]})


def model(hub: Hub, request: Request, match: re.Match) -> Response:
    repository = hub.visible(request, "model", match["id"])
    if not repository:
        return Response.json({"Code": 10010205001, "Success": False, "Message": "模型不存在"}, 404)
    readme = hub.files(repository)["README.md"]["content"].decode()
    published = len(readme) > 200 and "预发布" not in readme
    about = {"Path": repository.owner, "Name": repository.name, "IsPublished": int(published)}
    return old_data(about | {"Visibility": repository.about["visibility"]})


def model_files(hub: Hub, request: Request, match: re.Match) -> Response:
    repository = hub.visible(request, "model", match["id"])
    if not repository:
        return Response.json({"Code": 10010205001, "Success": False, "Message": "模型不存在"}, 404)
    found = hub.files(repository, _revision(repository, request))
    return old_data({
        "Files": [
            {"Path": path, "Name": path.split("/")[-1], "Type": "blob", "Size": f["size"], "Sha256": f["sha256"],
             "IsLFS": bool(f["lfs"]), "Revision": hub.head(repository)}
            for path, f in found.items()
        ]
    })  # fmt: skip


def model_file(hub: Hub, request: Request, match: re.Match) -> Response:
    repository = hub.visible(request, "model", match["id"])
    file = hub.files(repository, _revision(repository, request)).get(request.query["FilePath"]) if repository else None
    return Response(200, hub.content(file)) if file else Response.json({"Code": 404, "Message": "no such file"}, 404)


def revisions(hub: Hub, request: Request, match: re.Match) -> Response:
    repository = hub.visible(request, "model", match["id"])
    if not repository:
        return Response.json({"Code": 10010205001, "Success": False, "Message": "模型不存在"}, 404)
    return old_data({"RevisionMap": {"Branches": [{"Revision": repository.branch, "CreatedAt": 1}], "Tags": []}})


def _revision(repository, request: Request) -> str:
    asked = request.query.get("Revision", "")
    return repository.branch if asked in ("", "master", "main") else asked


def create_studio(hub: Hub, request: Request, match: re.Match) -> Response:
    asked = request.json
    owner, name = asked["owner"], asked["repo_name"]
    if hub.get("space", f"{owner}/{name}"):
        return Response.json({"success": False, "code": "DuplicateEntity", "message": "studio exists"}, 409)
    hub.create(
        "space", owner, name, branch="master", private=asked.get("visibility") == "private",
        files={"README.md": "# 默认介绍\n", ".gitattributes": ATTRIBUTES, "app.py": "# template\n"},
        settings=asked, status="NotDeployed", secrets={}, variables={}, logs={"build": [], "run": []},
    )  # fmt: skip
    return data({"owner": owner, "name": name})


def studio(hub: Hub, request: Request, match: re.Match) -> Response:
    repository = hub.visible(request, "space", match["id"])
    if not repository:
        return Response.json({"success": False, "code": "ResourceNotFound", "message": "no such studio"}, 404)
    about = repository.about
    if about["status"] == "Building":  # one look later it runs, or has failed
        about["status"] = "Failed" if hub.build_fails else "Running"
        return data({"id": repository.id, "runtime": {"status": "Building"}, **_public(about)})
    return data({"id": repository.id, "runtime": {"status": about["status"]}, **_public(about)})


def _public(about: dict) -> dict:
    keys = ("visibility", "sdk_type", "sdk_version", "base_image", "hardware", "display_name")
    return {key: about["settings"][key] for key in keys if key in about["settings"]}


def settings(hub: Hub, request: Request, match: re.Match) -> Response:
    hub.get("space", match["id"]).about["settings"].update(request.json)
    return data({})


def deploy(hub: Hub, request: Request, match: re.Match) -> Response:
    repository = hub.get("space", match["id"])
    repository.about["status"] = "Building"
    repository.about["logs"] = {
        "build": (hub.build_fails or "Installing requirements").splitlines(),
        "run": ["Running"],
    }
    start(hub, repository)
    return data({"status": "Building"})


def start(hub: Hub, repository) -> None:
    """Clone the Space and start its page, where the test gave a way to."""
    if not hub.run_space or hub.build_fails:
        return
    folder = hub.folder / "running" / hub.head(repository)
    if not folder.exists():
        hub.git(hub.folder, "clone", "--quiet", "--branch", repository.branch, repository.git, folder)
    hub.run_space(repository, folder, {**repository.about["variables"], **repository.about["secrets"]})


def stop(hub: Hub, request: Request, match: re.Match) -> Response:
    hub.get("space", match["id"]).about["status"] = "Stopped"
    return data({})


def logs(hub: Hub, request: Request, match: re.Match) -> Response:
    lines = hub.get("space", match["id"]).about["logs"][match["what"]]
    return data({"logs": [{"content": line} for line in lines], "total_count": len(lines), "total_page_num": 1})


def values(hub: Hub, request: Request, match: re.Match) -> Response:
    """Secrets show their keys only, variables their values too; adding one that exists is refused."""
    kept = hub.get("space", match["id"]).about[match["what"]]
    if request.method == "GET":
        return data([{"key": k} | ({"value": v} if match["what"] == "variables" else {}) for k, v in kept.items()])
    asked = request.json
    if request.method == "POST" and asked["key"] in kept:
        return Response.json({"success": False, "code": "DuplicateEntity", "message": "exists"}, 409)
    kept[asked["key"]] = asked["value"]
    return data({})


def offers(hub: Hub, request: Request, match: re.Match) -> Response:
    return data({
        "hardware": [{"name": "CPU basic", "instance_type": "platform/2v-cpu-16g-mem"},
                     {"name": "xGPU", "instance_type": "xgpu/8v-cpu-64g-mem-48g"}],
        "base-images": [{"name": "ubuntu22.04-py311-torch2.3.1"}, {"name": "ubuntu22.04-py312-torch2.9.1"},
                        {"name": "ubuntu22.04-py310-torch2.10.0"}],
        "sdk-versions": [{"sdk_type": "gradio", "version": v} for v in ("5.23.0", "5.49.1", "6.2.0")],
    }[match["what"]])  # fmt: skip


ROUTES: list[tuple[str, str, Handler]] = [
    ("GET", r"/openapi/v1/users/me", needs_token(whoami)),
    ("POST", r"/api/v1/models", needs_token(one_by_one(create_model))),
    ("GET", rf"/api/v1/models/{ID}/repo/files", model_files),
    ("GET|HEAD", rf"/api/v1/models/{ID}/repo", model_file),
    ("GET", rf"/api/v1/models/{ID}/revisions", revisions),
    ("GET", rf"/api/v1/models/{ID}", model),
    ("GET", r"/openapi/v1/studios/(?P<what>hardware|base-images|sdk-versions)", offers),
    ("POST", r"/openapi/v1/studios", needs_token(one_by_one(create_studio))),
    ("GET", rf"/openapi/v1/studios/{ID}", studio),
    ("PATCH", rf"/openapi/v1/studios/{ID}/settings", needs_token(settings)),
    ("POST", rf"/openapi/v1/studios/{ID}/deploy", needs_token(deploy)),
    ("POST", rf"/openapi/v1/studios/{ID}/stop", needs_token(stop)),
    ("GET", rf"/openapi/v1/studios/{ID}/logs/(?P<what>run|build)", needs_token(logs)),
    ("GET|POST|PUT", rf"/openapi/v1/studios/{ID}/(?P<what>secrets|variables)", needs_token(values)),
]
