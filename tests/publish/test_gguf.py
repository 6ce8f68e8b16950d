"""The exported GGUF file goes up beside the weights that it was made from, and no other does."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from publish import card, contents, hardware
from publish.huggingface import HuggingFace
from publish.job import Job
from publish.modelscope import ModelScope
from space.settings import NamesakeError, load
from tests.hub.server import Fault
from tests.publish.conftest import ROOT
from tests.publish.test_check import failed, read  # noqa: F401
from tests.publish.test_space import MODEL, SPACE, rows_that_fail

HUBS = {"modelscope": ModelScope, "huggingface": HuggingFace}
FILE = "beibei-q4_k_m.gguf"


@pytest.fixture
def file(run):
    """The exported file, which the settings ask for by a pattern."""
    run.serve("*-q4_k_m.gguf")
    return run.export()


@pytest.fixture(params=HUBS)
def fresh(request, run, hub, file):
    """A way to get a fresh job for each of the hubs."""
    run.config.write_text(run.config.read_text().replace("modelscope:", f"{request.param}:"))
    hub.page_model = f"{request.param}:{MODEL}"
    return lambda: Job(load(run.config), run.config, HUBS[request.param])


def modelscope(run) -> Job:
    return Job(load(run.config), run.config, ModelScope)


def online(hub) -> dict[str, dict]:
    return hub.files(hub.get("model", MODEL))


def test_it_goes_up_beside_the_weights_and_is_proven_like_them(fresh, run, hub, capsys):
    file = run.export(size=11_000_000)  # Hugging Face takes what is below 10 MB into git itself
    assert failed(run, type(fresh().hub)) == {}, "the report is about these weights, whatever is made from them"
    fresh().model()
    assert hub.content(online(hub)[FILE]).read_bytes() == file.read_bytes()
    kept = json.loads((fresh().folder / "model.json").read_text())
    assert kept["weights"] == contents.file("", run.merged / "SHA256SUMS").sha256
    assert kept["files"][FILE] == [file.stat().st_size, contents.file("", file).sha256]
    fresh().space()
    assert rows_that_fail(fresh(), hub, capsys, download=9) == ""

    hub.object(online(hub)[FILE]["lfs"]).write_bytes(bytes(file.stat().st_size))
    assert f"download of {FILE}" in rows_that_fail(fresh(), hub, capsys, download=9)
    hub.object(online(hub)[FILE]["lfs"]).unlink()
    assert f"missing: {FILE}" in rows_that_fail(fresh(), hub, capsys)


def merge_again(run):
    run.export()
    run.shard(1, seed=7)
    run.finish()


def stop_the_export(run):
    run.export().parent.rename(run.work / "gguf-q4_k_m.partial")


def export_both(run):
    run.export(), run.export("q8_0")


BAD = {
    "nothing exported": ("*-q4_k_m.gguf", lambda run: None, "Run: python -m training export --gguf q4_k_m"),
    "nothing exported of the other kind": ("*q8_0*.gguf", lambda run: None, "python -m training export --gguf q8_0"),
    "only the other kind exported": ("*q8_0.gguf", lambda run: run.export(), "training export --gguf q8_0"),
    "nothing exported, any would do": ("*.gguf", lambda run: None, "Run: python -m training export --gguf q4_k_m"),
    "an export that was stopped": ("*.gguf", stop_the_export, "no such file was exported"),
    "a name that no export has": ("other.gguf", lambda run: run.export(), "beibei-q4_k_m.gguf or beibei-q8_0.gguf"),
    "two that are meant": ("*.gguf", export_both, 'several files: beibei-q4_k_m.gguf, beibei-q8_0.gguf. Name one'),
    "made from other weights": (FILE, merge_again, "from other weights than those in merged. Run again"),
    "made from nobody knows what": (
        FILE, lambda run: (run.export().parent / "run.json").unlink(), "training export --gguf q4_k_m"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_without_the_right_file_nothing_goes_up_and_one_line_says_what_to_do(name, run, hub):
    pattern, spoil, says = BAD[name]
    run.serve(pattern)
    spoil(run)
    stopped = run.publish("model", "--yes")
    assert stopped.returncode == 2 and says in stopped.stderr, stopped.stdout + stopped.stderr
    assert len(stopped.stderr.splitlines()) == 1
    with pytest.raises(NamesakeError) as raised:
        contents.gguf(load(run.config))
    assert re.search(r"[\u4e00-\u9fff]", raised.value.text.zh)
    assert hub.count("POST|PUT") == 0


def test_a_file_that_changed_after_its_export_does_not_go_up(run, hub, file):
    file.write_bytes(file.read_bytes()[:-1])
    assert "changed since the export" in failed(run)["GGUF"]


def test_the_quantizations_are_those_of_the_export():
    from training.export import QUANTIZATIONS

    assert set(contents.QUANTIZATIONS) == QUANTIZATIONS.keys()


def test_what_the_export_hashed_is_not_read_again_until_it_changes(run, hub, file, read):  # noqa: F811
    modelscope(run).model()
    size = modelscope(run).built.gguf.size
    assert file.name not in read
    assert contents.model_bytes(load(run.config)) == size + sum(p.stat().st_size for p in run.merged.iterdir())
    file.write_bytes(bytes(size))
    changed = file.stat().st_ctime_ns
    while time.time_ns() <= changed + 2 * contents.CLOCK:
        pass
    assert modelscope(run).built.gguf.sha256 == contents.file("", file).sha256
    assert modelscope(run).built.gguf.size == size and read.count(file.name) == 1


def test_a_dry_run_and_the_room_that_is_needed_know_of_it(run, hub, file):
    room = re.compile(r"room needed\W+([\d.]+) MB")
    said = run.publish("model", "--dry-run").stdout
    assert re.search(rf"{FILE}\s+200,000\s+git-lfs", said)
    run.serve("")
    without = run.publish("model", "--dry-run").stdout
    assert FILE not in without
    assert float(room.search(said)[1]) == pytest.approx(float(room.search(without)[1]) + 0.2, abs=0.11)


def test_broken_off_in_mid_upload_a_rerun_sends_what_is_missing(run, hub, file):
    upload = f"PUT /lfs/{contents.file('', file).sha256}"
    hub.faults.append(Fault(upload, 401, times=99))
    with pytest.raises(NamesakeError, match="refuses the token"):
        modelscope(run).model()
    assert FILE not in online(hub)
    hub.faults.clear()
    hub.log.clear()
    modelscope(run).model()
    assert online(hub)[FILE]["size"] == file.stat().st_size
    modelscope(run).model()
    assert hub.count("POST .*git-receive-pack") == 1 and hub.count(upload) == 1


def test_one_that_no_longer_belongs_goes_with_the_next_publish(fresh, run, hub):
    fresh().model()
    run.export("q8_0")
    run.serve("*-q8_0.gguf")
    fresh().model()
    assert [path for path in online(hub) if path.endswith(".gguf")] == ["beibei-q8_0.gguf"]
    run.serve("")
    fresh().model()
    assert not [path for path in online(hub) if path.endswith(".gguf")]


# The card


@pytest.mark.parametrize("name", HUBS)
def test_the_card_says_how_it_runs_on_a_laptop_only_where_there_is_one(name, run, file):
    def made() -> str:
        settings = load(run.config)
        return card.model(settings, contents.model(settings), name, MODEL)

    text = made()
    for part in text.split("\n\n---\n\n"):
        assert (
            f"`{FILE}` (0.2 MB)" in part.replace("（", " (").replace("）", ")")
            and contents.file("", file).sha256 in part
        )
        assert f"llama-server -m {FILE} --jinja" in part and f"{MODEL} {FILE}" in part
        lines = re.search(r"```toml\n(.*?)```", part, flags=re.S)[1]
        assert tomllib.loads(lines) == {"hub": {"model": f"{name}:{MODEL}"}, "serve": {"gguf": FILE}}
        assert 'ignore_patterns=["*.gguf"]' in part, "transformers needs the other weights only"
    run.serve("")
    assert "gguf" not in made().lower() and "$" not in made()


def test_the_cards_own_line_fetches_the_file(fresh, file, tmp_path):
    fresh().model()
    command = shlex.split(re.search(r"^.* download .*$", fresh().readme(), flags=re.M)[0])
    made = subprocess.run(
        [Path(sys.executable).with_name(command[0]), *command[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    assert (tmp_path / FILE).read_bytes() == file.read_bytes()


# The Space


def test_the_space_fetches_this_one_file_and_rounds_nothing_again(fresh, run, hub, file, monkeypatch):
    monkeypatch.setattr(contents.Model, "bytes", 15_400_000_000)
    fresh().model()
    fresh().space()
    space = hub.get("space", SPACE)
    assert space.about["variables"]["NAMESAKE_LOAD_IN"] == "auto", "15 GB of bfloat16 would not fit"
    there = {path: found["content"].decode() for path, found in hub.files(space).items() if path[-3:] != ".py"}
    assert tomllib.loads(there["assistant.toml"])["serve"] == {"gguf": "*-q4_k_m.gguf"}
    if fresh().hub.name == "huggingface":
        assert card.front_matter(there["README.md"])["preload_from_hub"] == [f"{MODEL} {FILE}"]


def test_a_space_installs_the_binding_that_the_page_asks_for():
    from space.gguf import BINDING

    name, _, version = BINDING.partition("==")
    assert str(contents.requirements((ROOT / "requirements.txt").read_text())[name]) == f"=={version}"


def test_a_page_whose_file_is_not_online_is_not_published(run, hub, file):
    run.serve("")
    modelscope(run).model()
    run.serve("*-q4_k_m.gguf")
    with pytest.raises(NamesakeError, match=f"does not hold {FILE}.*publish model"):
        modelscope(run).space()
    assert hub.get("space", SPACE) is None


def test_zerogpu_is_refused_for_a_file_that_needs_no_gpu(run, hub, file):
    text = run.config.read_text().replace("modelscope:", "huggingface:")
    run.config.write_text(text.replace("[train]", 'hardware = "zerogpu"\n[train]'))
    job = Job(load(run.config), run.config, HuggingFace)
    job.model()
    with pytest.raises(NamesakeError, match="Leave \\[hub\\] hardware out"):
        job.space()


@pytest.mark.parametrize(
    ("word", "gigabytes", "says"), [("cpu", 4.7, ""), ("cpu", 15.0, "15.0 GB of GGUF do not fit"), ("t4", 4.7, "CPU")]
)
def test_it_is_said_where_the_file_does_not_fit_or_a_gpu_would_idle(word, gigabytes, says):
    how, why = hardware.load_in(hardware.choose(HuggingFace.hardware, word), 0, int(gigabytes * 1e9))
    assert how == "auto" and says in why and bool(says) == bool(why)
