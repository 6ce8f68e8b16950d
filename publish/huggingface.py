"""Hugging Face, through huggingface_hub: models and Spaces, each published in one commit.

`create_commit` uploads the weights first and commits last; `upload_folder` would commit a long upload in parts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from publish.contents import File
from publish.hardware import Hardware
from publish.lfs import Pushed, Remote
from publish.token import Token
from space.settings import NamesakeError, Settings


class HuggingFace:
    """One account's access to Hugging Face, or to another server at HF_ENDPOINT."""

    name = "huggingface"
    title = "Hugging Face"
    variable = "HF_TOKEN"
    token_page = "https://huggingface.co/settings/tokens"
    branch = "main"
    builds_on_push = True
    shows_progress = True  # its client has bars of its own
    file_limit = 50_000_000_000
    plain_limit = 0  # every file of 10 MB or more goes to LFS by itself
    hardware = (
        Hardware("cpu", "cpu-basic", 16),
        Hardware("zerogpu", "zero-a10g", 48, gpu=True),
        Hardware("t4", "t4-small", 16, gpu=True),
        Hardware("l4", "l4x1", 24, gpu=True),
        Hardware("a10g", "a10g-small", 24, gpu=True),
        Hardware("a100", "a100-large", 80, gpu=True),
    )

    def __init__(self, token: Token | None):
        self.token = token
        self.endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
        if urlsplit(self.endpoint).scheme != "https" and urlsplit(self.endpoint).hostname != "127.0.0.1":
            raise NamesakeError(
                f"HF_ENDPOINT is {self.endpoint}: the token would be sent in clear",
                "Use https.",
                zh=f"HF_ENDPOINT 是 {self.endpoint}，令牌会以明文发送。请改用 https。",
            )

    @property
    def api(self):
        """The hub's client, made at first use."""
        if not hasattr(self, "_api"):
            from huggingface_hub import HfApi

            self._api = HfApi(endpoint=self.endpoint, token=self.token.value if self.token else False)
        return self._api

    @contextmanager
    def _asked(self, what: str):
        """Turns the client's errors into one line about `what`, without the token."""
        from huggingface_hub.errors import HTTPError  # its HTTP library's, whichever that is

        try:
            yield
        except (HTTPError, RuntimeError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            status = getattr(getattr(cause, "response", None), "status_code", None)
            detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
            detail = (self.token or Token("")).redact(detail)[:300]
            if isinstance(error, (KeyError, TypeError, AttributeError)):
                detail = f"the hub's answer makes no sense ({type(error).__name__})"
            fixes = {
                401: ("The token is wrong, or has run out: make a new one.", "令牌无效或已过期，请换一个新的。"),
                402: ("This hardware has to be paid for on this account.", "该账号需要付费才能使用这种硬件。"),
                403: ("The token may not do this: use the owner's, with write permission.", "该令牌没有权限。"),
                413: ("The hub refuses a file as too large: merge with smaller shards.", "文件过大，请用更小的分片。"),
            }
            fix, zh = fixes.get(
                status, ("Run it again: what is up already is not sent twice.", "请再运行一次，已上传的不会重传。")
            )
            raise NamesakeError(
                f"{self.title}, {what}: {detail}", fix, zh=f"{self.title}（{what}）：{detail}。{zh}"
            ) from None

    def account(self) -> str:
        """The token's owner. Raises NamesakeError where the hub refuses the token."""
        with self._asked("the token"):
            return self.api.whoami()["name"]

    def remote(self, kind: str, id: str) -> Remote:
        """The repository as git sees it: published by the client, verified by git."""
        url = f"{self.endpoint}/{'spaces/' if kind == 'space' else ''}{id}.git"
        return Remote(url, self.branch, self.token or Token(""), (self.endpoint,))

    def address(self, kind: str, id: str) -> str:
        """The repository's page for people."""
        return f"{self.endpoint}/{'spaces/' if kind == 'space' else ''}{id}"

    def live_page(self, id: str) -> str:
        """Where a Space's page runs, as the hub says it."""
        with self._asked(id):
            return self.api.space_info(id).host

    def legal(self, id: str) -> bool:
        """Whether "owner/name" can be a repository's name here."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(id)
        except HFValidationError:
            return False
        return True

    # Models

    def visibility(self, kind: str, id: str) -> str | None:
        """ "public" or "private"; None where there is no such repository, or none to see."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._asked(id):
            try:
                return "private" if self.api.repo_info(id, repo_type=kind).private else "public"
            except RepositoryNotFoundError:
                return None

    def create_model(self, id: str, settings: Settings) -> None:
        """A new model repository with its visibility."""
        with self._asked(f"creating {id}"):
            self.api.create_repo(id, repo_type="model", visibility=settings.hub.visibility, exist_ok=True)

    def set_visibility(self, kind: str, id: str, visibility: str) -> bool:
        """Whether an existing repository's visibility was changed."""
        with self._asked(id):
            self.api.update_repo_settings(id, repo_type=kind, visibility=visibility)
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
        """Publish files in one commit on top of what is there; the client shows its own progress bars."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with self._asked(id):
            parent = self.api.repo_info(id, repo_type=kind).sha
            tree = self.api.list_repo_tree(id, repo_type=kind, recursive=True, revision=parent)
            there = {item.path: item.blob_id for item in tree if hasattr(item, "blob_id")}
            gone = replaces(there) - {file.path for file in files} - {".gitattributes"}
            operations = [CommitOperationDelete(path) for path in sorted(gone & there.keys())]
            operations += [CommitOperationAdd(file.path, str(file.source)) for file in files]
            made = self.api.create_commit(
                id, operations, commit_message=message, repo_type=kind, parent_commit=parent, num_threads=8
            )
        return Pushed(made.oid, made.oid != parent, 0)

    def listing(self, id: str) -> dict[str, tuple[int, str]]:
        """Every file of a model as the hub lists it: path → bytes and SHA-256, "" where it lists none."""
        with self._asked(id):
            tree = list(self.api.list_repo_tree(id, recursive=True))
        files = (item for item in tree if hasattr(item, "blob_id"))
        return {item.path: (item.size, item.lfs.sha256 if item.lfs else "") for item in files}

    def released(self, id: str) -> str:
        """Hugging Face has no pre-release."""
        return ""

    # Spaces

    def space_files(self, settings: Settings, hardware: Hardware, requirements: str) -> dict[str, str]:
        """Nothing beside the README, whose front matter says it all."""
        return {}

    def prepare_space(self, id: str, settings: Settings, hardware: Hardware, requirements: str) -> bool:
        """Create the Space, or bring its hardware up to date. Returns whether anything changed."""
        with self._asked(id):
            if self.visibility("space", id) is None:
                self.api.create_repo(
                    id,
                    repo_type="space",
                    space_sdk="gradio",
                    visibility=settings.hub.visibility,
                    space_hardware=None if hardware.word == "cpu" else hardware.id,
                )
                return True
            runtime = self.api.get_space_runtime(id)
            if (runtime.requested_hardware or runtime.hardware) == hardware.id:
                return False
            self.api.request_space_hardware(id, hardware.id)
            return True

    def set_values(self, id: str, variables: dict[str, str], secrets: dict[str, str]) -> bool:
        """Set a Space's variables and secrets. Returns whether a variable changed (a secret's value is not shown)."""
        with self._asked(f"{id}'s variables"):
            now = {key: found.value for key, found in self.api.get_space_variables(id).items()}
            for key, value in variables.items():
                if now.get(key) != value:
                    self.api.add_space_variable(id, key, value)
            for key, value in secrets.items():
                self.api.add_space_secret(id, key, value)
        return any(now.get(key) != value for key, value in variables.items()) or bool(secrets)

    def deploy(self, id: str) -> None:
        """Build and run what is there, as a commit does by itself."""
        with self._asked(f"restarting {id}"):
            self.api.restart_space(id)

    def stage(self, id: str, commit: str) -> str:
        """ "running" (of that commit), "failed" or "building", and in brackets the hub's own word for it."""
        with self._asked(id):
            runtime = self.api.get_space_runtime(id)
        word = getattr(runtime.stage, "value", runtime.stage)
        if word == "RUNNING" and runtime.raw.get("sha", commit) == commit:
            return "running"
        if re.search(r"ERROR|STOPPED|PAUSED|DELETING|NO_APP_FILE", word):
            return f"failed ({word})"
        return f"building ({word})"

    def logs(self, id: str, build: bool) -> list[str]:
        """The build's or the run's log lines so far."""
        with self._asked(f"{id}'s log"):
            return "".join(self.api.fetch_space_logs(id, build=build)).splitlines()
