"""Every way in which something should not go up is one row of the table, with what to do."""

from __future__ import annotations

import json
import os
import shutil
import struct

import pytest

from publish import check, contents, hardware, launch
from publish.huggingface import HuggingFace
from publish.job import Job
from publish.modelscope import ModelScope
from space.settings import NamesakeError, load
from tests.publish.conftest import ROOT


def failed(run, hub_class=ModelScope, page=ROOT) -> dict[str, str]:
    """The rows that failed: what → what was found."""
    job = Job(load(run.config), run.config, hub_class)
    files = contents.page(page, run.config)
    rows = check.rows(job.settings, job.hub, job.built, files, job.readme, job.account)
    assert all(row.fix for row in rows if not row.passed)
    return {row.what: row.found for row in rows if not row.passed}


def write(name, content):
    def spoil(run):
        (run.merged / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        run.finish()

    return spoil


def shorten(run):
    shard = run.merged / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    run.finish()


def change_after(run):
    (run.merged / "config.json").write_text("{}")


def remove_after(run):
    (run.merged / "model-00002-of-00003.safetensors").unlink()


def remove(name):
    def spoil(run):
        (run.merged / name).unlink()
        run.finish()

    return spoil


def other_weights(run):
    run.shard(1, seed=7)
    identity_of_old = json.loads((run.work / "report" / "report.json").read_text())
    run.finish()
    (run.work / "report" / "report.json").write_text(json.dumps(identity_of_old))


def link(name, target):
    def spoil(run):
        (run.merged / name).symlink_to(target)

    return spoil


def hide_in_header(run):
    header = json.dumps({"__metadata__": {"note": "hf_" + "a1B2" * 9}}).encode()
    (run.merged / "model-00001-of-00003.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    run.finish()


def hide_in_report(run):
    report = json.loads((run.work / "report" / "report.json").read_text()) | {"card": "AKIAIOSFODNN7EXAMPLE"}
    (run.work / "report" / "report.json").write_text(json.dumps(report))


def quick(run):
    report = json.loads((run.work / "report" / "report.json").read_text()) | {"quick": True}
    (run.work / "report" / "report.json").write_text(json.dumps(report))


def no_report(run):
    shutil.rmtree(run.work / "report")


def in_settings(old, new):
    def spoil(run):
        text = run.config.read_text()
        assert old in text
        run.config.write_text(text.replace(old, new))

    return spoil


PLAIN_PICKLE = b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x8c"
BAD = {
    "no evaluation": (no_report, "evaluation", "no report"),
    "an evaluation of other weights": (other_weights, "evaluation", "other weights"),
    "an evaluation of a few questions": (quick, "evaluation", "--quick"),
    "a failed evaluation": (lambda run: run.finish(passed=False), "evaluation", "name hits zh 0.99"),
    "a file changed after the merge": (change_after, "SHA256SUMS", "config.json"),
    "a shard gone after the merge": (remove_after, "SHA256SUMS", "model-00002"),
    "a file added after the merge": (lambda run: (run.merged / "x").write_text("x"), "SHA256SUMS", "not listed: x"),
    "a shard missing": (remove("model-00002-of-00003.safetensors"), "weights", "missing"),
    "a shard cut short": (shorten, "weights", "bytes long"),
    "a shard of zeros": (write("model-00001-of-00003.safetensors", bytes(99)), "weights", "no readable header"),
    "an index that is none": (write("model.safetensors.index.json", "{}"), "weights", "index"),
    "no tokenizer": (remove("tokenizer.json"), "weights", "tokenizer.json"),
    "a pickle by name": (write("pytorch_model.bin", "x"), "the model's files", "pickle"),
    "a pickle by content": (write("extra.dat", PLAIN_PICKLE), "the model's files", "pickle"),
    "what torch.save writes": (write("extra.dat", b"PK\x03\x04" + bytes(99)), "the model's files", "pickle"),
    "remote code": (write("modeling_internlm2.py", "import os"), "the model's files", "code"),
    "a call for remote code": (
        write("config.json", '{"auto_map": {"AutoModel": "x/y--m.C"}}'), "the model's files", "config.json asks"),
    "a link out of the folder": (link("notes.txt", "/etc/hostname"), "the model's files", "notes.txt is a link out"),
    "a link to another folder": (link("more", "/etc"), "the model's files", "more is a link out"),
    "a broken link": (link("notes.txt", "nowhere"), "the model's files", "notes.txt is a broken link"),
    "a pipe": (lambda run: os.mkfifo(run.merged / "pipe"), "the model's files", "pipe is no file"),
    "a name with a blank": (write("my file.json", "{}"), "the model's files", "no name"),
    "a name in Chinese": (write("说明.txt", "x"), "the model's files", "no name"),
    "a ModelScope token": (write("notes.txt", "ms-01234567-89ab-cdef-0123-456789abcdef"), "secrets", "notes.txt:1"),
    "a Hugging Face token": (write("notes.txt", "a\nhf_" + "a1B2" * 9), "secrets", "notes.txt:2"),
    "a token in an address": (write("notes.txt", "https://oauth2:0123456789@hub/x"), "secrets", "secret"),
    "an OpenAI key": (write("notes.txt", "sk-proj-" + "aB3_" * 12), "secrets", "notes.txt:1"),
    "an AWS key": (write("notes.txt", "id = AKIAIOSFODNN7EXAMPLE"), "secrets", "notes.txt:1"),
    "a JSON web token": (write("notes.txt", "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSMeKKF2Q"), "secrets", "secret"),
    "a PGP key": (write("notes.txt", "-----BEGIN PGP PRIVATE KEY BLOCK-----"), "secrets", "secret"),
    "a token in UTF-16": (write("notes.txt", ("x\nhf_" + "a1B2" * 9).encode("utf-16")), "secrets", "notes.txt:2"),
    "a token across two blocks of a long text": (
        write("notes.txt", "x" * 99 + "\n" + " " * (check.BLOCK - 110) + "hf_" + "a1B2" * 9), "secrets", "notes.txt:2"),
    "a token in the weights' header": (hide_in_header, "secrets", "model-00001-of-00003.safetensors:1"),
    "a key in the report's table": (hide_in_report, "secrets", "the report:1"),
    "a private key": (write("notes.txt", "-----BEGIN OPENSSH PRIVATE KEY-----"), "secrets", "secret"),
    "an old ModelScope token": (
        write("notes.txt", "token='7087a490-63e7-48a5-923d-68645fddc0fc'"), "secrets", "secret"),
    "the very token in use": (write("notes.txt", "see ms-0f1e2d3c-token"), "secrets", "your access token"),
    "the very token in the settings": (
        in_settings("[train]", "# ms-0f1e2d3c-token\n[train]"), "secrets", "assistant.toml"),
    "an owner that no hub takes": (in_settings(":alice/beibei-chat", ":-alice/chat"), "repository names", "-alice"),
    "a name in Chinese letters": (in_settings(':alice/beibei"', ':alice/小北"'), "repository names", "小北"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_should_not_go_up_does_not(name, run, hub):
    spoil, row, says = BAD[name]
    spoil(run)
    found = failed(run)
    assert says in found[row]


def test_a_long_text_is_looked_at_to_its_end_and_long_weights_are_not(run, hub, monkeypatch):
    monkeypatch.setattr(check, "BINARY_ABOVE", 5_000_000)
    text = ("x" * 999 + "\n") * 6_000 + "hf_" + "a1B2" * 9
    write("weights.gguf", "\0" + text)(run)
    assert failed(run) == {}
    write("notes.txt", text)(run)
    assert "notes.txt:6001" in failed(run)["secrets"]


def test_a_failed_row_stops_the_publish_before_anything_is_written(run, hub):
    write("pytorch_model.bin", "x")(run)
    stopped = run.publish("all", "--yes")
    assert stopped.returncode == 1 and "pickle" in stopped.stdout
    assert hub.count("POST|PUT") == 0


def test_a_good_run_passes_on_both_hubs(run, hub):
    assert failed(run) == {}
    run.config.write_text(run.config.read_text().replace("modelscope:", "huggingface:"))
    assert failed(run, HuggingFace) == {}


@pytest.mark.parametrize(("token", "says"), [("", "no access token"), ("ms-wrong", "invalid token")])
def test_a_token_that_is_not_there_or_not_accepted_fails(token, says, run, hub, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", token)
    assert says in failed(run)["token"]


def test_a_token_of_somebody_else_is_said(run, hub):
    hub.user = "bob"
    job = Job(load(run.config), run.config, ModelScope)
    rows = check.rows(job.settings, job.hub, job.built, job.page, job.readme, job.account)
    assert "of bob; alice must let it write" in [row.found for row in rows]


@pytest.fixture
def page(tmp_path):
    """A copy of the page's files to spoil."""
    folder = tmp_path / "page"
    shutil.copytree(ROOT / "space", folder / "space")
    for name in ("app.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.parametrize(
    ("file", "text", "row", "says"),
    [
        ("app.py", "import training", "the page imports", "does not go up"),
        ("app.py", "from publish import card", "the page imports", "does not go up"),
        ("app.py", "def broken(:", "the page imports", "app.py:1 is not Python"),
        ("app.py", "def f():\n    import seaborn", "the page imports", "does not install"),
        ("space/extra.py", "token = 'hf_" + "a1B2" * 9 + "'", "secrets", "space/extra.py:1"),
        ("space/extra.bin", "x", "the page's files", "pickle"),
    ],
)
def test_a_page_that_would_not_start_does_not_go_up(file, text, row, says, run, hub, page):
    known = {"sha256": contents.file("", page / "requirements.txt").sha256, "packages": PACKAGES}
    (run.work / "publish").mkdir()
    (run.work / "publish" / "requirements.json").write_text(json.dumps(known))
    assert failed(run, page=page) == {}
    (page / file).write_text(text)
    assert says in failed(run, page=page)[row]


def test_what_an_editor_or_a_desktop_leaves_beside_the_page_stays_here(run, page):
    for name in ("space/.env", "space/.idea/workspace.xml", "space/__pycache__/page.pyc"):
        (page / name).parent.mkdir(exist_ok=True)
        (page / name).write_text("x")
    assert [file.path for file in contents.page(page, run.config)] == [f.path for f in contents.page(ROOT, run.config)]


PACKAGES = [
    *("accelerate", "anyio", "fastapi", "filelock", "gradio", "huggingface-hub", "jinja2", "modelscope", "peft"),
    *("psutil", "numpy", "tokenizers", "torch", "tqdm", "transformers", "typer", "starlette"),
]


def test_an_import_whose_absence_is_handled_needs_no_package():
    import ast

    tree = ast.parse("try:\n    import spaces\nexcept ImportError:\n    spaces = None\nimport os.path\nfrom . import x")
    assert check._needed(tree) == {"os"}


def test_requirements_that_do_not_resolve_fail(run, hub, page, monkeypatch, tmp_path):
    """pip is asked, with an index of nothing."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"{hub.url}/no-index")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    (page / "requirements.txt").write_text("gradio==999\n")
    assert "No matching distribution" in failed(run, page=page)["requirements resolve"]
    (page / "requirements.txt").write_text("# nothing\n")
    assert "requirements resolve" not in failed(run, page=page)


def test_a_line_of_the_requirements_that_is_none_is_named(run, hub, page):
    (page / "requirements.txt").write_text("gradio\nwhat is this\n")
    with pytest.raises(NamesakeError, match=r"requirements\.txt:2"):
        failed(run, page=page)


def test_force_publishes_what_failed_the_evaluation_and_nothing_else(run, hub):
    run.finish(passed=False)
    assert run.publish("model", "--yes").returncode == 1
    assert run.publish("model", "--yes", "--force").returncode == 0
    write("pytorch_model.bin", "x")(run)
    run.finish(passed=False)
    assert run.publish("model", "--yes", "--force").returncode == 1


def test_nobody_to_ask_and_no_yes_publishes_nothing(run, hub):
    stopped = run.publish("model", stdin=-3)
    assert stopped.returncode == 2 and "Say --yes" in stopped.stderr
    assert hub.repositories == {}


def test_a_dry_run_says_every_file_and_writes_nothing(run, hub):
    said = run.publish("all", "--dry-run")
    assert said.returncode == 0, said.stderr
    for path in run.merged.iterdir():
        assert path.name in said.stdout
    assert "space/page.py" in said.stdout and "ms_deploy.json" in said.stdout
    assert "300,079" in said.stdout and "git-lfs" in said.stdout
    assert {request.method for request in hub.log} == {"GET"}
    assert hub.repositories == {}


def test_a_dry_run_needs_no_token(run, hub, monkeypatch):
    monkeypatch.delenv("MODELSCOPE_API_TOKEN")
    said = run.publish("all", "--dry-run")
    assert said.returncode == 0, said.stderr
    assert "Create, and push to" in said.stdout


@pytest.mark.parametrize(
    ("word", "hub_class", "gigabytes", "how", "says"),
    [
        ("", ModelScope, 0.3, "auto", ""),
        ("xgpu-48", ModelScope, 15.4, "auto", ""),
        ("xgpu-16", ModelScope, 15.4, "4bit", "15.4 GB of bfloat16 weights do not fit in 16 GB"),
        ("zerogpu", HuggingFace, 15.4, "auto", ""),
        ("t4", HuggingFace, 15.4, "4bit", "4-bit"),
        ("xgpu-16", ModelScope, 60, "4bit", "larger"),
        ("paid/ecs.gn7i", ModelScope, 60, "auto", ""),
    ],
)
def test_weights_that_do_not_fit_are_loaded_in_4_bit_and_it_is_said(word, hub_class, gigabytes, how, says):
    machine = hardware.choose(hub_class.hardware, word)
    got, why = hardware.load_in(machine, int(gigabytes * 1e9))
    assert got == how and says in why


def test_a_logs_telling_lines_are_found_among_the_rest():
    log = ["Collecting gradio", "ERROR: No matching distribution found for gradio==9", "", "done"]
    assert launch.telling(log) == ["ERROR: No matching distribution found for gradio==9"]


def test_a_run_that_has_not_merged_yet_is_one_line(run, hub):
    shutil.rmtree(run.merged)
    stopped = run.publish("check")
    assert stopped.returncode == 2 and "python -m training merge" in stopped.stderr
    assert "Traceback" not in stopped.stderr


@pytest.mark.parametrize("arguments", [["check", "--hub", "huggingface"], ["verify", "--hub", "huggingface"]])
def test_a_hub_that_the_settings_do_not_name_is_one_line(arguments, run, hub):
    stopped = run.publish(*arguments)
    assert stopped.returncode == 2 and "names no model on huggingface" in stopped.stderr


def test_help_is_there_at_once_and_needs_nothing_of_the_page(run):
    import subprocess
    import sys
    import time

    program = "import sys; sys.modules.update(dict.fromkeys(['torch', 'gradio', 'transformers', 'modelscope'])); "
    program += "import runpy; sys.argv[1:] = ['--help']; runpy.run_module('publish', run_name='__main__')"
    begun = time.monotonic()
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert said.returncode == 0 and "verify" in said.stdout
    assert time.monotonic() - begun < 5  # under half a second on a machine that does nothing else


def test_publishing_imports_nothing_of_the_page(run, hub):
    """Without torch, gradio, transformers and the rest: a model is published where only publish/requirements.txt is."""
    import subprocess
    import sys

    absent = ["torch", "gradio", "transformers", "modelscope", "peft", "psutil", "accelerate", "tokenizers", "numpy"]
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); import runpy; "
    program += f"sys.argv[1:] = ['model', '--yes', '--config', {str(run.config)!r}]; "
    program += "runpy.run_module('publish', run_name='__main__')"
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert made.returncode == 0, made.stderr


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The files that are read to hash them."""
    seen, file = [], contents.file
    monkeypatch.setattr(contents, "file", lambda path, *rest: seen.append(path) or file(path, *rest))
    return seen


def end_the_merge(run):
    """As the merge does: run.json after the weights, later by the file system's own clock."""
    last, written = run.merged / "run.json", max(path.stat().st_ctime_ns for path in run.merged.iterdir())
    while last.stat().st_mtime_ns <= written + 2 * contents.CLOCK:
        last.write_text("{}")
    run.finish()


def weights_in(read: list[str]) -> list[str]:
    found = [path for path in read if path.endswith(".safetensors")]
    read.clear()
    return found


def test_what_the_merge_hashed_is_not_read_again_until_it_changes(run, hub, read):
    end_the_merge(run)
    first, shard = Job(load(run.config), run.config, ModelScope), run.merged / "model-00002-of-00003.safetensors"
    hashes = {file.path: file.sha256 for file in first.built.files}
    first.model()
    assert Job(load(run.config), run.config, ModelScope).built.identity == first.built.identity
    assert weights_in(read) == []
    assert {path: contents.file(path, run.merged / path).sha256 for path in hashes} == hashes

    read.clear()
    stat, content = shard.stat(), shard.read_bytes()
    shard.write_bytes(content[:-1] + b"x")
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "SHA256SUMS" in failed(run), "changed, and with the old length and date"
    assert weights_in(read) == [shard.name]


def test_a_list_of_hashes_that_is_newer_than_the_weights_makes_nothing_true(run, hub, read):
    end_the_merge(run)
    (run.merged / "config.json").write_text('{"model_type": "other"}')
    (run.merged / "SHA256SUMS").touch()
    assert "config.json" in failed(run)["SHA256SUMS"]
