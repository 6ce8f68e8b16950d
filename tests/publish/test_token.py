"""The token is in no file, no argument, no address and no output, and no other host ever gets it."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import requests

from publish.huggingface import HuggingFace
from publish.job import Job
from publish.modelscope import ModelScope, _stay
from publish.token import Token, find
from space.settings import NamesakeError, load
from tests.hub.server import Fault, Hub


def forms(token: str) -> list[bytes]:
    basic = base64.b64encode(f"oauth2:{token}".encode())
    return [token.encode(), basic.rstrip(b"="), base64.b64encode(token.encode()).rstrip(b"=")]


def files_with(token: str, *folders: Path) -> list[str]:
    found = []
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes()
                found += [str(path) for form in forms(token) if form in content]
    return found


def arguments_with(token: str) -> list[bytes]:
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = process.read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        found += [line for form in forms(token) if form in line]
    return found


@pytest.fixture
def foreign(tmp_path):
    with Hub(tmp_path / "foreign", token="ms-another-token") as hub:
        yield hub


def assert_never_saw(foreign: Hub, token: str) -> None:
    for request in foreign.log:
        seen = " ".join([request.path, *request.headers.values()]).encode()
        assert not any(form in seen for form in forms(token)), request.line


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_it_is_nowhere_even_with_git_told_to_say_everything(ends, run, hub, home, monkeypatch):
    """Looked at in the middle of a push and after it: processes, files, output."""
    monkeypatch.setenv("GIT_CURL_VERBOSE", "1")
    monkeypatch.setenv("GIT_TRACE", str(home / "trace"))
    monkeypatch.setenv("GIT_TRACE_CURL", str(home / "trace-curl"))
    monkeypatch.setenv("GIT_TRACE_REDACT", "0")
    hub.uploads_need_token = True
    fault = Fault("PUT", hold=True)
    hub.faults.append(fault)
    process = subprocess.Popen(
        run.command("model", "--yes"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert fault.reached.wait(60)
    assert arguments_with(hub.token) == []
    assert files_with(hub.token, run.config.parent, home) == []
    if ends == "badly":
        hub.faults.append(Fault("POST .*receive-pack", 500, times=9))
    fault.release.set()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (0 if ends == "well" else 2), said
    assert not any(form.decode() in said for form in forms(hub.token))
    assert files_with(hub.token, run.config.parent, home) == []
    assert hub.count(hub.token) == 0, "the token was part of an address"


def test_git_credential_helpers_do_not_get_it(run, hub, home):
    (home / ".gitconfig").write_text((home / ".gitconfig").read_text() + "[credential]\n\thelper = store\n")
    Job(load(run.config), run.config, ModelScope).model()
    assert not (home / ".git-credentials").exists()


@pytest.mark.parametrize(
    "request_line", ["GET .*info/refs", "objects/batch", "POST .*git-receive-pack", "PUT", "POST /lfs"]
)
def test_a_redirect_of_git_takes_it_nowhere(request_line, run, hub, foreign):
    hub.uploads_need_token = foreign.uploads_need_token = True
    hub.faults.append(Fault(request_line, redirect=foreign.url, times=50))
    with pytest.raises(NamesakeError):
        Job(load(run.config), run.config, ModelScope).model()
    assert_never_saw(foreign, hub.token)


def test_an_upload_address_on_another_host_does_not_get_it(run, hub, foreign, monkeypatch):
    """The batch answer names an address in clear on another host, which asks for a password."""
    hub.uploads_need_token = foreign.uploads_need_token = True
    monkeypatch.setattr(hub, "uploads_at", foreign.url)
    with pytest.raises(NamesakeError):
        Job(load(run.config), run.config, ModelScope).model()
    assert foreign.count("PUT") > 0
    assert_never_saw(foreign, hub.token)


def test_a_repository_that_brings_an_lfsconfig_does_not_get_it_sent_there(run, hub, foreign):
    job = Job(load(run.config), run.config, ModelScope)
    job.model()
    repository = hub.get("model", "alice/beibei")
    config = f"[lfs]\n\turl = {foreign.url}/alice/beibei.git/info/lfs\n".encode()
    hub.commit(repository, {".lfsconfig": config}, "a trap", hub.head(repository))
    run.shard(1, seed=9)
    run.finish()
    Job(load(run.config), run.config, ModelScope).model()
    assert foreign.log == []


def test_git_told_to_trace_its_environment_does_not(run, hub, home):
    trace = home / "trace2"
    traced = f"[trace2]\n\teventTarget = {trace}\n\tnormalTarget = {trace}-n\n\tenvVars = NAMESAKE_TOKEN\n"
    (home / ".gitconfig").write_text((home / ".gitconfig").read_text() + traced)
    Job(load(run.config), run.config, ModelScope).model()
    assert files_with(hub.token, home, run.config.parent) == []


NONSENSE = {
    "a web page": b"<html>Please log in</html>",
    "a list": b"[]",
    "no objects": b"{}",
    "objects that are none": b'{"objects": ["x"]}',
    "actions that are none": b'{"objects": [{"oid": "x", "actions": [1]}]}',
    "an action without an address": b'{"objects": [{"oid": "x", "actions": {"download": {}}}]}',
}


@pytest.mark.parametrize("answer", NONSENSE)
def test_a_batch_answer_that_is_none_is_one_line(answer, run, hub):
    hub.faults.append(Fault("objects/batch", 200, NONSENSE[answer]))
    with pytest.raises(NamesakeError, match="the LFS server's answer is none"):
        Job(load(run.config), run.config, ModelScope).model()


@pytest.mark.parametrize("hub_class", [ModelScope, HuggingFace])
@pytest.mark.parametrize("answer", [b"<html>Please log in</html>", b"[]", b'{"Data": 1, "data": 1, "Success": true}'])
def test_an_answer_of_the_hubs_api_that_makes_no_sense_is_one_line(answer, hub_class, hub):
    hub.faults.append(Fault("GET /(openapi|api)/", 200, answer, times=9))
    with pytest.raises(NamesakeError, match=r"Run it again|Try again|make a new one"):
        hub_class(Token(hub.token)).account()


def test_a_download_address_on_another_host_does_not_get_it(run, hub, foreign):
    """As a hub's own storage may ask for the token, verify gives it: to no other host, whoever names it."""
    run.config.write_text(run.config.read_text().replace('space = "modelscope:alice/beibei-chat"\n', ""))
    job = Job(load(run.config), run.config, ModelScope)
    job.model()
    shutil.copytree(hub.folder / "lfs", foreign.folder / "lfs", dirs_exist_ok=True)
    hub.downloads_at = foreign.url
    assert job.verify(1, "") and foreign.count("GET /lfs/") == 1
    hub.downloads_at = ""
    hub.faults.append(Fault("GET /lfs/", redirect=foreign.url))
    assert job.verify(1, "") and foreign.count("GET /lfs/") == 2
    assert_never_saw(foreign, hub.token)


def test_the_hubs_api_is_not_followed_from_https_to_http():
    response = requests.Response()
    response.status_code, response.url = 302, "https://modelscope.cn/api/v1/x"
    response.headers["Location"] = "http://modelscope.cn/api/v1/x"
    with pytest.raises(NamesakeError, match=r"redirects to http://modelscope\.cn"):
        _stay(response)


@pytest.mark.parametrize("hub_class", [ModelScope, HuggingFace])
def test_a_redirect_of_the_hubs_api_takes_it_nowhere(hub_class, hub, foreign):
    hub.faults.append(Fault("GET /(openapi|api)/", redirect=foreign.url, times=9))
    with pytest.raises(NamesakeError):
        hub_class(Token(hub.token)).account()
    assert_never_saw(foreign, hub.token)


@pytest.mark.parametrize(("variable", "hub_class"), [("MODELSCOPE_ENDPOINT", ModelScope), ("HF_ENDPOINT", HuggingFace)])
def test_an_address_in_clear_is_refused(variable, hub_class, monkeypatch):
    monkeypatch.setenv(variable, "http://www.modelscope.cn")
    with pytest.raises(NamesakeError, match="in clear"):
        hub_class(Token("ms-token"))


def test_modelscopes_git_and_its_lfs_host_are_the_only_ones_that_may_ask(monkeypatch):
    monkeypatch.delenv("MODELSCOPE_ENDPOINT", raising=False)
    remote = ModelScope(Token("ms-token")).remote("space", "alice/chat")
    assert remote.url == "https://www.modelscope.cn/studios/alice/chat.git"
    assert remote.origins == ("https://lfs.modelscope.cn", "https://modelscope.cn", "https://www.modelscope.cn")


ASKED = {
    "Username for 'https://hub.example': ": "oauth2",
    "Password for 'https://oauth2@hub.example': ": "ms-token",
    'Password for "https://oauth2@hub.example"': "ms-token",
    "Password for 'https://oauth2@hub.example.evil.example': ": "",
    "Password for 'https://oauth2@evil.example': ": "",
    "Password for 'https://evil.example/@hub.example': ": "",
    "Password for 'http://oauth2@hub.example': ": "",
    "Passphrase for key '/home/me/.ssh/id_rsa': ": "",
    "": "",
}


@pytest.mark.parametrize("prompt", ASKED)
def test_the_password_program_answers_for_the_hub_alone(prompt, tmp_path):
    from publish.lfs import ASKPASS

    script = tmp_path / "askpass.sh"
    script.write_text(ASKPASS)
    script.chmod(0o700)
    environment = {**os.environ, "NAMESAKE_ORIGINS": "https://hub.example", "NAMESAKE_TOKEN": "ms-token"}
    environment["NAMESAKE_ASKED"] = str(tmp_path / "asked")
    made = subprocess.run([script, prompt], capture_output=True, text=True, env=environment)
    assert made.stdout.strip() == ASKED[prompt]
    assert (made.returncode == 0) == bool(ASKED[prompt])


def test_its_repr_and_every_written_form_are_hidden():
    token = Token("ms-0123456789")
    assert "0123" not in repr(token)
    said = b" and ".join(forms(token.value)).decode()
    assert token.redact(said) == "*** and *** and ***"


@pytest.mark.parametrize(
    ("value", "says"), [("", "no access token"), ("ms token", "no token has"), ("令牌", "no token has")]
)
def test_a_token_that_is_none_is_one_line(value, says, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", value)
    with pytest.raises(NamesakeError, match=says):
        find("MODELSCOPE_API_TOKEN", "https://example", ask=False)
