"""Whatever breaks, at whatever moment: the branch never shows a half-made model, and running it again finishes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess

import pytest

from publish.huggingface import HuggingFace
from publish.job import Job
from publish.modelscope import ModelScope
from space.settings import NamesakeError, load
from tests.hub.server import Fault

MODEL = "alice/beibei"


def job(run, hub=ModelScope) -> Job:
    return Job(load(run.config), run.config, hub)


def assert_online(hub, run) -> None:
    """The model on the hub is the merged folder, file by file, and its weights are stored."""
    there = hub.files(hub.get("model", MODEL))
    for path in run.merged.iterdir():
        content = hub.content(there[path.name])
        assert (content if isinstance(content, bytes) else content.read_bytes()) == path.read_bytes(), path.name


EVER = 99
MODELSCOPE_FAULTS = {
    "creating: the token has run out": (Fault("POST /api/v1/models", 401), "token"),
    "creating: the hub is down": (Fault("POST /api/v1/models", 500), "Try again"),
    "creating: connection cut": (Fault("POST /api/v1/models", cut=10), "Try again"),
    "creating: answer lost": (Fault("POST /api/v1/models", mute=True), "Try again"),
    "fetching: the token has run out": (Fault("GET .*info/refs", 401, times=EVER), "refuses the token"),
    "fetching: the hub is down": (Fault("GET .*info/refs", 500, times=EVER), "Run it again"),
    "fetching: connection cut": (Fault("POST .*git-upload-pack", cut=10, times=EVER), "Run it again"),
    "fetching: redirected elsewhere": (Fault("GET .*info/refs", redirect="http://127.0.0.1:9", times=EVER), "redirect"),
    "asking what is there: the token has run out": (Fault("objects/batch", 401, times=EVER), "refuses the token"),
    "asking what is there: the hub is down": (Fault("objects/batch", 500, times=EVER), "Run it again"),
    "asking what is there: connection cut": (Fault("objects/batch", cut=10, times=EVER), "Run it again"),
    "asking what is there: redirected": (Fault("objects/batch", redirect="http://127.0.0.1:9"), "redirects elsewhere"),
    "before uploading: the token has run out": (Fault("objects/batch", 401, times=EVER, skip=1), "refuses the token"),
    "before uploading: no right to write": (
        Fault("objects/batch", 403, times=EVER, skip=1),
        "may not write|refuses the token",
    ),
    "before uploading: the hub is down": (Fault("objects/batch", 500, times=EVER, skip=1), "Run it again"),
    "uploading: connection cut for good": (Fault("PUT", cut=50_000, times=EVER, skip=1), "Run it again"),
    "uploading: the token runs out": (Fault("PUT", 401, times=EVER, skip=1), "refuses the token"),
    "uploading: no right to write": (Fault("PUT", 403, times=EVER, skip=1), "may not write|refuses the token"),
    "uploading: a file too large": (Fault("PUT", 413, times=EVER, skip=1), "too large"),
    "uploading: the hub is down": (Fault("PUT", 500, times=EVER, skip=1), "Run it again"),
    "uploading: the hub's disk is full": (Fault("PUT", 507, times=EVER, skip=1), "Run it again|no space"),
    "uploading: the hub hangs": (Fault("PUT", hold=True, times=EVER, skip=1), "Run it again"),
    "uploading: a file is lost": (Fault("PUT", lose=True, times=EVER, skip=1), "Run it again|does not have"),
    "uploading: other bytes are stored": (Fault("PUT", corrupt=True, times=EVER, skip=1), "Run it again"),
    "uploading: the hub can't verify": (Fault("POST /lfs/", 500, times=EVER, skip=1), "Run it again"),
    "committing: the token has run out": (Fault("info/refs.*", 401, times=EVER, skip=2), "refuses the token"),
    "committing: no right to write": (Fault("POST .*git-receive-pack", 403, times=EVER), "may not write"),
    "committing: too large": (Fault("POST .*git-receive-pack", 413, times=EVER), "too large"),
    "committing: the hub is down": (Fault("POST .*git-receive-pack", 500, times=EVER), "Run it again"),
    "committing: connection cut": (Fault("POST .*git-receive-pack", cut=10, times=EVER), "Run it again"),
    "committing: answers lost": (Fault("POST .*git-receive-pack", mute=True, times=EVER), "Run it again"),
}


@pytest.mark.parametrize("name", MODELSCOPE_FAULTS)
def test_after_any_fault_on_modelscope_a_rerun_finishes(name, run, hub, home):
    fault, says = MODELSCOPE_FAULTS[name]
    fault = Fault(**{k: v for k, v in vars(fault).items() if k not in ("reached", "release")})
    hub.uploads_need_token = "token" in name
    if fault.hold:
        (home / ".gitconfig").write_text((home / ".gitconfig").read_text() + "[lfs]\n\tactivitytimeout = 2\n")
    hub.faults.append(fault)
    with pytest.raises(NamesakeError, match=says) as raised:
        job(run).model()
    assert hub.token not in str(raised.value)
    fault.release.set()
    hub.faults.clear()

    before, stored = len(hub.log), {path.name for path in (hub.folder / "lfs").iterdir()}
    job(run).model()
    assert_online(hub, run)
    sent_again = {request.path[5:] for request in hub.log[before:] if request.method == "PUT"}
    assert not sent_again & stored, "what was up already was sent again"


def test_a_fault_that_passes_is_not_even_noticed(run, hub):
    hub.faults += [Fault("PUT", 500), Fault("PUT", cut=1000), Fault("POST .*git-receive-pack", mute=True)]
    job(run).model()
    assert_online(hub, run)


HUGGINGFACE_FAULTS = {
    "creating: refused": (Fault("POST /api/repos/create", 403, times=EVER), "may not"),
    "looking: the token has run out": (Fault("GET /api/models/.*/tree", 401, times=EVER), "token"),
    "asking what is there: refused": (Fault("preupload", 403, times=EVER), "may not"),
    "asking what is there: cut": (Fault("POST /api/validate-yaml", cut=5, times=EVER), "Run it again"),
    "before uploading: the token has run out": (Fault("objects/batch", 401, times=EVER), "token"),
    "uploading: a file too large": (Fault("PUT", 413, times=EVER, skip=1), "smaller shards"),
    "uploading: no right to write": (Fault("PUT", 403, times=EVER, skip=1), "may not"),
    "committing: the hub is down": (Fault("POST .*/commit/", 500, times=EVER), "Run it again"),
    "committing: connection cut": (Fault("POST .*/commit/", cut=100, times=EVER), "Run it again"),
    "committing: answer lost": (Fault("POST .*/commit/", mute=True), "Run it again"),
}


@pytest.mark.parametrize("name", HUGGINGFACE_FAULTS)
def test_after_any_fault_on_hugging_face_a_rerun_finishes(name, run, hub):
    run.config.write_text(run.config.read_text().replace("modelscope:", "huggingface:"))
    fault, says = HUGGINGFACE_FAULTS[name]
    fault = Fault(**{k: v for k, v in vars(fault).items() if k not in ("reached", "release")})
    hub.faults.append(fault)
    with pytest.raises(NamesakeError, match=says) as raised:
        job(run, HuggingFace).model()
    assert hub.token not in str(raised.value)
    hub.faults.clear()
    job(run, HuggingFace).model()
    assert_online(hub, run)


KILLED_AT = ("POST /api/v1/models", "GET .*info/refs", "objects/batch", "PUT", "POST /lfs", "POST .*git-receive-pack")


@pytest.mark.parametrize("moment", KILLED_AT)
def test_killed_at_any_moment_a_rerun_finishes(moment, run, hub):
    fault = Fault(moment, hold=True, skip=1 if moment == "PUT" else 0)
    hub.faults.append(fault)
    process = subprocess.Popen(run.command("model", "--yes"), stdout=subprocess.DEVNULL, start_new_session=True)
    assert fault.reached.wait(60)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    fault.release.set()
    hub.faults.clear()
    job(run).model()
    assert_online(hub, run)


@pytest.mark.parametrize("room", [1_000, 5_000])
def test_a_full_disk_here_is_one_line_and_a_rerun_finishes(room, run, hub):
    """A limit on the size of files stands in for a disk that fills up while the cards, or git's own files, are made."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))  # noqa: E731
    stopped = run.publish("model", "--yes", preexec_fn=limit)
    assert stopped.returncode == 2, stopped.stdout + stopped.stderr
    assert "run it again" in stopped.stderr.lower()
    assert "Traceback" not in stopped.stderr
    job(run).model()
    assert_online(hub, run)


def test_ctrl_c_ends_with_one_line_and_a_rerun_finishes(run, hub):
    fault = Fault("PUT", hold=True)
    hub.faults.append(fault)
    process = subprocess.Popen(
        run.command("model", "--yes"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background job ignores it, and so would what the tests start from there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert fault.reached.wait(60)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert said.strip() == "Stopped. Run it again: it goes on where it stopped."
    fault.release.set()
    job(run).model()
    assert_online(hub, run)


def test_the_token_running_out_halfway_is_said_and_a_new_one_goes_on(run, hub, monkeypatch):
    hub.uploads_need_token = True
    fault = Fault("PUT", hold=True, skip=1)
    hub.faults.append(fault)
    old = hub.token
    process = subprocess.Popen(
        run.command("model", "--yes"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert fault.reached.wait(60)
    hub.token = "ms-a-new-token"
    fault.release.set()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "run out" in said and old not in said
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", hub.token)
    job(run).model()
    assert_online(hub, run)


def test_a_wrong_file_served_is_noticed_and_passes_when_it_is_right_again(run, hub):
    job(run).model()
    run.config.write_text(run.config.read_text().replace('space = "modelscope:alice/beibei-chat"\n', ""))
    hub.faults.append(Fault("GET /lfs/", wrong=True))
    assert not job(run).verify(1, "")
    assert job(run).verify(1, "")


def test_a_download_that_is_cut_is_noticed(run, hub):
    job(run).model()
    hub.faults.append(Fault("GET /lfs/", cut=100))
    with pytest.raises(NamesakeError, match="broke off"):
        job(run).verify(1, "")


SPACE_FAULTS = {
    "creating: refused": (Fault("POST /openapi/v1/studios$", 403, times=EVER), "may not"),
    "variables: refused": (Fault("POST .*/variables", 403, times=EVER), "may not"),
    "pushing: the hub is down": (Fault("POST .*git-receive-pack", 500, times=EVER), "Run it again"),
    "pushing: killed connection": (Fault("POST .*git-receive-pack", cut=10, times=EVER), "Run it again"),
    "deploying: refused": (Fault("POST .*/deploy", 403, times=EVER), "may not"),
    "following: the token has run out": (Fault("GET .*/logs/", 401, times=EVER), "token"),
}


@pytest.mark.parametrize("name", SPACE_FAULTS)
def test_after_any_fault_of_a_space_a_rerun_brings_it_up(name, run, hub):
    job(run).model()
    fault, says = SPACE_FAULTS[name]
    hub.faults.append(Fault(**{k: v for k, v in vars(fault).items() if k not in ("reached", "release")}))
    with pytest.raises(NamesakeError, match=says):
        job(run).space()
    hub.faults.clear()
    job(run).space()
    assert hub.get("space", "alice/beibei-chat").about["status"] == "Running"
