"""ModelScope (魔搭): what its own client does, and where git has to: models and studios (创空间).

The client's own upload is not used: it keeps no transaction (a missing private repository becomes a public one, its
resume cache never asks the remote) and can't upload a studio. Its HTTP sessions are kept from following a redirect to
another host, to which they would take the token along.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from publish.contents import File, gradio
from publish.hardware import Hardware
from publish.lfs import Pushed, Remote, Repository
from publish.token import Token
from space.settings import NamesakeError, Settings

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{1,95}"


class ModelScope:
    """One account's access to ModelScope, or to another server at MODELSCOPE_ENDPOINT."""

    name = "modelscope"
    title = "ModelScope"
    variable = "MODELSCOPE_API_TOKEN"
    token_page = "https://modelscope.cn/my/myaccesstoken"
    branch = "master"
    builds_on_push = False  # a push alone does not go live
    shows_progress = False
    file_limit = 50_000_000_000  # bytes
    plain_limit = 500_000_000  # bytes of all files outside LFS together
    hardware = (
        Hardware("cpu", "platform/2v-cpu-16g-mem", 16),
        Hardware("xgpu-16", "xgpu/8v-cpu-32g-mem-16g", 16, gpu=True),
        Hardware("xgpu-48", "xgpu/8v-cpu-64g-mem-48g", 48, gpu=True),
    )

    def __init__(self, token: Token | None):
        """`token` None: only what needs no account."""
        self.token = token
        self.endpoint = _endpoint()

    @property
    def api(self):
        """The hub's client, made at first use."""
        if not hasattr(self, "_api"):
            from modelscope_hub import HubApi, HubConfig

            value = self.token.value if self.token else ""
            self._api = HubApi(HubConfig(endpoint=self.endpoint, token=value))
            for client in (self._api.openapi, self._api.legacy):
                for session in (client._session, client._read_session):
                    session.hooks["response"].append(_stay)
        return self._api

    @contextmanager
    def _asked(self, what: str):
        """Turns the client's errors into one line about `what`, without the token."""
        import requests
        from modelscope_hub.errors import HubError

        try:
            yield
        except (HubError, requests.RequestException, KeyError, TypeError, AttributeError, ValueError) as error:
            status = getattr(error, "status_code", None)
            detail = (self.token or Token("")).redact((str(error).splitlines() or [""])[0])[:300]
            if re.search(r"Connection error|NameResolution|Max retries", detail):
                detail = f"{urlsplit(self.endpoint).netloc} can't be reached"
            elif not isinstance(error, (HubError, requests.RequestException)):
                detail = f"the hub's answer makes no sense ({type(error).__name__})"
            fixes = {
                401: ("The token is wrong, or has run out: make a new one.", "令牌无效或已过期，请换一个新的。"),
                403: ("The token may not do this: use the owner's, with write permission.", "该令牌没有权限。"),
            }
            fix, zh = fixes.get(status, ("Try again.", "请稍后再试。"))
            raise NamesakeError(
                f"{self.title}, {what}: {detail}", fix, zh=f"{self.title}（{what}）：{detail}。{zh}"
            ) from None

    def account(self) -> str:
        """The token's owner. Raises NamesakeError where the hub refuses the token."""
        with self._asked("the token"):
            if owner := self.api.whoami().username:
                return owner
            raise ValueError("nobody's")

    def remote(self, kind: str, id: str) -> Remote:
        """The git repository of a model or a space. ModelScope's LFS server is the hub's sibling host."""
        parts = urlsplit(self.endpoint)
        host = parts.netloc
        if host in ("modelscope.cn", "modelscope.ai"):  # git lives at www
            host = f"www.{host}"
        site = host.removeprefix("www.")
        origins = {f"{parts.scheme}://{name}" for name in (host, site, f"lfs.{site}")}
        prefix = "studios/" if kind == "space" else ""
        url = f"{parts.scheme}://{host}/{prefix}{id}.git"
        return Remote(url, self.branch, self.token or Token(""), tuple(sorted(origins)))

    def address(self, kind: str, id: str) -> str:
        """The repository's page for people."""
        return f"{self.endpoint}/{'studios' if kind == 'space' else 'models'}/{id}"

    def live_page(self, id: str) -> str:
        """Where a studio's page runs: owner and name, in letters, digits and dashes, under ms.show."""
        return f"https://{re.sub(r'[^a-z0-9]+', '-', id.lower())}.ms.show"

    def legal(self, id: str) -> bool:
        """Whether "owner/name" can be a repository's name here."""
        return all(re.fullmatch(NAME, part) for part in id.split("/"))

    # Models

    def visibility(self, kind: str, id: str) -> str | None:
        """ "public", "private" or another word of the hub's; None where there is no such repository, or none to see."""
        from modelscope_hub.errors import NotExistError

        with self._asked(id):
            try:
                if kind == "model":
                    found = self.api.legacy.get_repo_info(id, "model").get("Visibility")
                    return {1: "private", 3: "internal", 5: "public"}.get(found, "public")
                found = self.api.openapi.get_studio(*id.split("/"))
                return found.get("visibility") or ("private" if found.get("private") else "public")
            except NotExistError:
                return None

    def create_model(self, id: str, settings: Settings) -> None:
        """A new model repository with its final visibility, which no API changes later."""
        from modelscope_hub.errors import AlreadyExistsError

        with self._asked(f"creating {id}"), suppress(AlreadyExistsError):  # there, and hidden: the push will tell
            self.api.create_repo(
                id,
                "model",
                visibility=settings.hub.visibility,
                license=settings.hub.license,
                chinese_name=settings.assistant.name.pick("zh"),
            )

    def set_visibility(self, kind: str, id: str, visibility: str) -> bool:
        """Whether an existing repository's visibility was changed; a model's can't be."""
        if kind == "model":
            return False
        with self._asked(id):
            self.api.update_repo_settings(id, "studio", visibility=visibility)
        return True

    def publish(
        self,
        kind: str,
        id: str,
        files: list[File],
        message: str,
        state: Path,
        replaces: Callable[[dict[str, str]], set[str]],
        watch: Callable[[int, int], None] | None,
    ) -> Pushed:
        """Push files in one commit; `state` keeps git's side of it between runs."""
        return Repository(state, self.remote(kind, id)).push(files, message, replaces=replaces, watch=watch)

    def listing(self, id: str) -> dict[str, tuple[int, str]]:
        """Every file of a model as the hub lists it: path → bytes and SHA-256."""
        with self._asked(id):
            found = self.api.legacy.list_repo_files(id, "model", revision=self.branch)
        return {item["Path"]: (item["Size"], item["Sha256"]) for item in found if item["Type"] != "tree"}

    def released(self, id: str) -> str:
        """ "" where a model is open to everybody; else why it may not be (ModelScope's pre-release, 预发布)."""
        with self._asked(id):
            about = self.api.legacy.get_repo_info(id, "model")
        if about.get("IsPublished", 1):
            return ""
        return (
            "it is in pre-release (预发布), seen by its owner only: its card was not accepted yet, most often because "
            "the description is under 200 characters or the platform's template text is still there; a new one can "
            "also be under review for some minutes"
        )

    # Spaces

    def space_files(self, settings: Settings, hardware: Hardware, requirements: str) -> dict[str, str]:
        """Files that only this hub's Spaces have: ms_deploy.json, from which a studio can also be made by hand."""
        version, image = self.runtime(requirements)
        deploy = {
            "$schema": "https://modelscope.cn/api/v1/studios/deploy_schema.json",
            "sdk_type": "gradio",
            "sdk_version": version,
            "base_image": image,
            "resource_configuration": hardware.id,
            "port": 7860,
        }
        return {"ms_deploy.json": json.dumps({k: v for k, v in deploy.items() if v}, indent=2) + "\n"}

    def runtime(self, requirements: str) -> tuple[str, str]:
        """Gradio's version and the image for a studio, from what the hub offers: the newest that fits the requirements.

        Where none fits, the newest of all: the page's own requirements are installed on top of it.
        """
        if hasattr(self, "_runtime"):
            return self._runtime
        with self._asked("what studios can run on"):
            versions = [v["version"] for v in self.api.list_studio_sdk_versions(sdk_type="gradio") if v.get("version")]
            images = [image["name"] for image in self.api.list_studio_base_images() if image.get("name")]
        fitting = list(gradio(requirements).filter(versions))
        version = max(fitting or versions, key=numbers, default="")
        usable = [image for image in images if re.search(r"py31[12]", image)]
        image = max(usable, key=lambda name: numbers((re.findall(r"torch([\d.]+)", name) or ["0"])[0]), default="")
        self._runtime = version, image
        return self._runtime

    def prepare_space(self, id: str, settings: Settings, hardware: Hardware, requirements: str) -> bool:
        """Create the studio, or bring its settings up to date. Returns whether anything changed."""
        version, image = self.runtime(requirements)
        wanted = {
            "sdk_type": "gradio",
            "sdk_version": version,
            "base_image": image,
            "hardware": hardware.id,
            "visibility": settings.hub.visibility,
            "display_name": settings.page.title.pick("zh") or settings.assistant.name.pick("zh"),
        }
        wanted = {key: value for key, value in wanted.items() if value}
        with self._asked(id):
            if self.visibility("space", id) is None:
                self.api.create_repo(
                    id, "studio", **{k: v for k, v in wanted.items() if k != "display_name"},
                    chinese_name=wanted["display_name"], license=settings.hub.license,
                )  # fmt: skip
                return True
            now = self.api.openapi.get_studio(*id.split("/"))
            differs = {key: value for key, value in wanted.items() if key in now and now[key] != value}
            if differs:
                self.api.update_repo_settings(id, "studio", **differs)
            return bool(differs)

    def set_values(self, id: str, variables: dict[str, str], secrets: dict[str, str]) -> bool:
        """Set a studio's variables and secrets. Returns whether a variable changed (a secret's value is not shown)."""
        with self._asked(f"{id}'s variables"):
            now = {item.get("key"): item.get("value") for item in self.api.list_variables(id)}
            for key, value in variables.items():
                if key not in now:
                    self.api.add_variable(id, key, value)
                elif now[key] != value:
                    self.api.update_variable(id, key, value)
            kept = {item.get("key") if isinstance(item, dict) else item for item in self.api.list_secrets(id)}
            for key, value in secrets.items():
                (self.api.update_secret if key in kept else self.api.add_secret)(id, key, value)
        return any(now.get(key) != value for key, value in variables.items()) or bool(secrets)

    def deploy(self, id: str) -> None:
        """上线: build and run what was pushed."""
        with self._asked(f"deploying {id}"):
            self.api.deploy_repo(id)

    def stage(self, id: str, commit: str) -> str:
        """ "running", "failed" or "building", and in brackets the hub's own word for it."""
        with self._asked(id):
            found = self.api.openapi.get_studio(*id.split("/"))
        word = str((found.get("runtime") or {}).get("status") or found.get("status") or "")
        known = word.lower()
        if "running" in known:
            return "running"
        if re.search(r"fail|error|stop|notdeployed|offline|exception", known):
            return f"failed ({word})"
        return f"building ({word})"

    def logs(self, id: str, build: bool) -> list[str]:
        """The build's or the run's log lines."""
        with self._asked(f"{id}'s log"):
            found = self.api.get_repo_logs(id, log_type="build" if build else "run", page_size=500) or {}
        entries = found.get("logs") or []
        return [str(e.get("content") or e.get("message") or "") if isinstance(e, dict) else str(e) for e in entries]


def _endpoint() -> str:
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT", "").rstrip("/") or "https://modelscope.cn"
    parts = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
    if parts.scheme != "https" and parts.hostname != "127.0.0.1":
        raise NamesakeError(
            f"MODELSCOPE_ENDPOINT is {endpoint}: the token would be sent in clear",
            "Use https.",
            zh=f"MODELSCOPE_ENDPOINT 是 {endpoint}，令牌会以明文发送。请改用 https。",
        )
    return f"{parts.scheme}://{parts.netloc}"


def _stay(response, **_):
    """A hook of requests: refuses a redirect to another host, or from https to http, before it is followed."""
    if response.is_redirect:
        target = urlsplit(response.headers["Location"])
        here = urlsplit(response.url)
        if target.netloc and (target.scheme or here.scheme, target.netloc) != (here.scheme, here.netloc):
            raise NamesakeError(
                f"{here.netloc} redirects to {target.scheme}://{target.netloc}, where the token is not sent",
                "Set MODELSCOPE_ENDPOINT to the hub's own address.",
                zh=f"平台要求重定向到 {target.netloc}，令牌不会发往那里。请把 MODELSCOPE_ENDPOINT 设为平台自己的地址。",
            )
    return response


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
