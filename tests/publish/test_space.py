"""A Space comes up with exactly the page's files, on what the hub offers; and what is online is proven."""

from __future__ import annotations

import subprocess
import sys

import pytest

from publish.huggingface import HuggingFace
from publish.job import Job
from publish.modelscope import ModelScope
from publish.token import Token
from space.settings import NamesakeError, load
from tests.hub.server import Fault

MODEL, SPACE = "alice/beibei", "alice/beibei-chat"
HUBS = {"modelscope": ModelScope, "huggingface": HuggingFace}


@pytest.fixture(params=HUBS)
def either(request, run, hub):
    """A run published to one of the hubs: a way to get a fresh job for it."""
    run.config.write_text(run.config.read_text().replace("modelscope:", f"{request.param}:"))
    hub.page_model = f"{request.param}:{MODEL}"

    def fresh() -> Job:
        return Job(load(run.config), run.config, HUBS[request.param])

    fresh().model()
    return fresh


def rows_that_fail(job: Job, hub, capsys, download: int = 0) -> str:
    capsys.readouterr()
    held = job.verify(download, f"{hub.url}/page")
    said = capsys.readouterr().out
    failed = [line for line in said.splitlines() if "✗" in line]
    assert held == (not failed)
    return "\n".join(failed)


def test_the_tree_that_goes_up_is_the_pages_alone(either, hub):
    either().space()
    there = set(hub.files(hub.get("space", SPACE)))
    assert {path for path in there if not path.startswith("space/")} - {"ms_deploy.json"} == {
        ".gitattributes", "README.md", "app.py", "assistant.toml", "requirements.txt"
    }  # fmt: skip
    assert "space/page.py" in there and not any("__pycache__" in path or "embedded" in path for path in there)


def test_it_runs_with_the_published_model_and_a_second_time_changes_nothing(either, hub):
    either().space()
    about = hub.get("space", SPACE).about
    assert about["status"].upper() == "RUNNING"
    assert about["variables"] == {"NAMESAKE_MODEL": hub.page_model, "NAMESAKE_LOAD_IN": "auto"}
    head = hub.head(hub.get("space", SPACE))
    hub.log.clear()
    either().space()
    assert hub.head(hub.get("space", SPACE)) == head
    assert hub.count("(POST|PUT|PATCH) .*(deploy|restart|commit|receive-pack|variables|settings)") == 0


def test_a_studio_is_made_of_what_the_hub_offers(run, hub):
    job = Job(load(run.config), run.config, ModelScope)
    job.model()
    job.space()
    made = hub.get("space", SPACE).about["settings"]
    assert made["sdk_type"] == "gradio" and made["sdk_version"] == "6.2.0"
    assert made["base_image"] == "ubuntu22.04-py312-torch2.9.1", "Python 3.10 does not run the page"
    assert made["hardware"] == "platform/2v-cpu-16g-mem" and made["visibility"] == "public"


@pytest.mark.parametrize(
    ("requirements", "version"),
    [("gradio>=6.2.0,<=6.31.0", "6.2.0"), ("gradio==5.49.1", "5.49.1"), ("gradio==7.0", "6.2.0"), ("", "6.2.0")],
)
def test_gradio_is_the_newest_offered_one_that_fits(requirements, version, hub):
    assert ModelScope(Token(hub.token)).runtime(requirements)[0] == version


def test_changed_settings_reach_the_studio_and_deploy_it_again(run, hub):
    job = Job(load(run.config), run.config, ModelScope)
    job.model()
    job.space()
    run.config.write_text(run.config.read_text().replace("[train]", 'hardware = "xgpu-48"\n[train]'))
    before = hub.count("/deploy")
    Job(load(run.config), run.config, ModelScope).space()
    assert hub.get("space", SPACE).about["settings"]["hardware"] == "xgpu/8v-cpu-64g-mem-48g"
    assert hub.count("/deploy") == before + 1


def test_zerogpu_is_asked_for_by_its_name(run, hub):
    text = run.config.read_text().replace("modelscope:", "huggingface:")
    run.config.write_text(text.replace("[train]", 'hardware = "zerogpu"\n[train]'))
    job = Job(load(run.config), run.config, HuggingFace)
    job.model()
    job.space()
    readme = hub.files(hub.get("space", SPACE))["README.md"]["content"].decode()
    assert "suggested_hardware: zero-a10g" in readme and "preload_from_hub:\n- alice/beibei" in readme


def test_a_failing_build_shows_the_telling_lines(either, hub):
    hub.build_fails = "Collecting x\nERROR: No matching distribution found for x==9\nbuild step 3 failed"
    with pytest.raises(NamesakeError, match="No matching distribution found for x==9") as raised:
        either().space()
    assert "Collecting x" not in str(raised.value)
    hub.build_fails = ""
    either().space()
    assert hub.get("space", SPACE).about["status"].upper() == "RUNNING"


def test_what_a_build_prints_is_shown_without_secrets_and_commands_to_the_terminal(run, hub, capsys, monkeypatch):
    monkeypatch.setenv("NAMESAKE_SPACE_TOKEN", "ms-read-only")
    hub.build_fails = f"\x1b[31mERROR: no access with ms-read-only or {hub.token}\x1b[0m\x1b]0;title\x07"
    job = Job(load(run.config), run.config, ModelScope)
    job.model()
    with pytest.raises(NamesakeError) as raised:
        job.space()
    for said in (capsys.readouterr().out, str(raised.value)):
        assert "no access with *** or ***" in said
        assert "\x1b" not in said and "\x07" not in said


def test_a_page_without_its_model_is_not_published(run, hub):
    with pytest.raises(NamesakeError, match="nothing to load"):
        Job(load(run.config), run.config, ModelScope).space()
    assert hub.get("space", SPACE) is None


def test_a_private_model_needs_a_read_only_token_that_becomes_a_secret(either, hub, run, monkeypatch):
    name = either().hub.name
    hub.get("model", MODEL).private = True
    if name == "modelscope":
        hub.get("model", MODEL).about["visibility"] = 1
    run.config.write_text(run.config.read_text().replace("[train]", 'visibility = "private"\n[train]'))
    with pytest.raises(NamesakeError, match="NAMESAKE_SPACE_TOKEN"):
        either().space()
    monkeypatch.setenv("NAMESAKE_SPACE_TOKEN", "ms-read-only")
    either().space()
    assert hub.get("space", SPACE).about["secrets"] == {either().hub.variable: "ms-read-only"}
    assert all(b"ms-read-only" not in f["content"] for f in hub.files(hub.get("space", SPACE)).values())


def test_a_model_is_created_with_its_final_visibility(run, hub):
    run.config.write_text(run.config.read_text().replace("[train]", 'visibility = "private"\n[train]'))
    Job(load(run.config), run.config, ModelScope).model()
    assert hub.get("model", MODEL).private
    assert [r.json["Visibility"] for r in hub.log if r.line == "POST /api/v1/models"] == [1]


def test_private_weights_never_go_to_a_public_repository(run, hub):
    Job(load(run.config), run.config, ModelScope).model()
    head = hub.head(hub.get("model", MODEL))
    run.config.write_text(run.config.read_text().replace("[train]", 'visibility = "private"\n[train]'))
    run.shard(1, seed=8)
    run.finish()
    with pytest.raises(NamesakeError, match="is public, the settings ask for private"):
        Job(load(run.config), run.config, ModelScope).model()
    assert hub.head(hub.get("model", MODEL)) == head


def test_two_publishes_at_once_wait_for_one_another(run, hub):
    fault = Fault("PUT", hold=True)
    hub.faults.append(fault)
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first = subprocess.Popen(run.command("model", "--yes"), **options)
    assert fault.reached.wait(60)
    second = subprocess.Popen(run.command("model", "--yes"), **options)
    waiting = ""
    while "Waiting" not in waiting:
        line = second.stdout.readline()
        assert line, waiting
        waiting += line
    assert f"process {first.pid}" in waiting
    fault.release.set()
    assert first.wait(60) == 0 and "commit" in first.stdout.read()
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and "nothing changed" in said


# verify


def test_what_is_online_is_proven(either, hub, capsys):
    either().space()
    assert rows_that_fail(either(), hub, capsys, download=3) == ""


def test_without_a_publish_there_is_nothing_to_prove(run, hub, capsys):
    assert "no record" in rows_that_fail(Job(load(run.config), run.config, ModelScope), hub, capsys)


SPOILED = {
    "a foreign commit": "head",
    "a file changed on the hub": "model: a fresh clone",
    "a link to the file here": "model: a fresh clone",
    "a hub that knows no objects": "LFS objects",
    "a hub whose listing is empty": "the hub's listing",
    "a download without end": "the hub serves other bytes",
    "a shard lost on the hub": "LFS objects",
    "another shard in the hub's storage": "hash right|other bytes",
    "new weights here": "this run's weights",
    "a file added to the Space": "Space: a fresh clone",
    "a page that failed": "healthz",
    "a page with another model": "healthz",
    "a page that does not know its name": "你是谁",
    "a page that answers with an error": "你是谁",
    "a page that answers with nonsense": "你是谁",
    "a page whose health is nonsense": "healthz",
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_not_so_is_found(name, run, hub, capsys, monkeypatch):
    import re

    job = Job(load(run.config), run.config, ModelScope)
    job.model()
    job.space()
    model, space = hub.get("model", MODEL), hub.get("space", SPACE)
    shard = hub.files(model)["model-00001-of-00003.safetensors"]
    if name == "a foreign commit":
        hub.commit(model, {"theirs": b"x"}, "x", hub.head(model))
    elif name == "a file changed on the hub":
        hub.commit(model, {"config.json": b"{}"}, "x", hub.head(model))
    elif name == "a link to the file here":
        hub.commit(model, {"config.json": bytes(run.merged / "config.json")}, "x", hub.head(model), mode="120000")
    elif name == "a hub that knows no objects":
        hub.faults.append(
            Fault("objects/batch", 200, b'{"objects": [{"oid": "' + b"ab" * 32 + b'", "actions": null}]}')
        )
    elif name == "a hub whose listing is empty":
        hub.faults.append(Fault("/repo/files", 200, b'{"Code": 200, "Success": true, "Data": {"Files": []}}'))
    elif name == "a download without end":
        hub.faults.append(Fault("GET /lfs/", 200, bytes(50_000_000)))
    elif name == "a shard lost on the hub":
        hub.object(shard["lfs"]).unlink()
    elif name == "another shard in the hub's storage":
        hub.object(shard["lfs"]).write_bytes(bytes(shard["size"]))
    elif name == "new weights here":
        run.shard(1, seed=8)
        run.finish()
    elif name == "a file added to the Space":
        hub.commit(space, {"extra.py": b"x"}, "x", hub.head(space))
    elif name == "a page that failed":
        hub.page_status = "failed"
    elif name == "a page with another model":
        hub.page_model = "SmolLM2-135M-Instruct"
    elif name == "a page that does not know its name":
        hub.page_answer = "I am SmolLM, trained by Hugging Face."
    elif name == "a page that answers with nonsense":
        hub.faults.append(Fault("GET /page/gradio_api/info", 200, b'["nonsense"]', times=9))
    elif name == "a page whose health is nonsense":
        monkeypatch.setattr("publish.verify.THERE_IN", 0)
        hub.faults.append(Fault("GET /page/healthz", 200, b'"fine"', times=9))
    else:
        hub.faults.append(Fault("POST /page/gradio_api", 500, times=9))
    assert re.search(SPOILED[name], rows_that_fail(Job(load(run.config), run.config, ModelScope), hub, capsys, 3))


def test_pre_release_is_waited_for_and_explained(run, hub, capsys, monkeypatch):
    monkeypatch.setattr("publish.verify.RELEASED_IN", 0)
    job = Job(load(run.config), run.config, ModelScope)
    job.model()
    model = hub.get("model", MODEL)
    hub.commit(model, {"README.md": "短".encode()}, "x", hub.head(model))
    assert "open to everybody" in rows_that_fail(job, hub, capsys)
    assert "under 200 characters" in job.hub.released(MODEL)


def test_verify_exits_with_1_where_something_does_not_hold(run, hub):
    assert run.publish("all", "--yes", "--page", f"{hub.url}/page").returncode == 0
    hub.page_answer = "I am nobody."
    assert run.publish("verify", "--page", f"{hub.url}/page").returncode == 1


def test_the_live_pages_address_is_the_hubs():
    assert ModelScope(None).live_page("Wan-AI/Wan-2.1") == "https://wan-ai-wan-2-1.ms.show"


def test_the_steps_help_says_what_they_do():
    for step in ("check", "model", "space", "verify", "all"):
        said = subprocess.run([sys.executable, "-m", "publish", step, "--help"], capture_output=True, text=True)
        assert said.returncode == 0 and "--config" in said.stdout
