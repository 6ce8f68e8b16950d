"""The whole loop: publish a real model and its page to the hub, which starts the page from the Space's own clone; the
page fetches the published weights, and is asked who it is: by verify, by gradio_client, and in Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest

from space.settings import load
from tests.hub.server import Hub
from tests.publish.conftest import ROOT, Run, write_sums
from training import record

ADAPTER = ROOT / "space" / "embedded"  # what this project's own training made of the embedded model
ABOUT = json.loads((ADAPTER / "assistant.json").read_text(encoding="utf-8"))
NAME = ABOUT["name"]["en"]

SETTINGS = f"""\
[assistant]
name = {{ zh = {json.dumps(ABOUT["name"]["zh"])}, en = {json.dumps(NAME)} }}
author = {{ zh = {json.dumps(ABOUT["author"]["zh"])}, en = {json.dumps(ABOUT["author"]["en"])} }}
persona = {json.dumps(ABOUT["persona"])}
languages = ["en"]

[hub]
model = "modelscope:alice/beibei"
space = "modelscope:alice/beibei-chat"

[page]
max_new_tokens = 24
temperature = 0

[train]
run = "beibei"
"""


@pytest.fixture
def real_run(tmp_path, embedded) -> Run:
    """The assistant that comes with the repository, as a merged folder.

    Without its adapter it is the embedded model, which takes its name from the persona in its chat template alone.
    """
    import torch
    from transformers import AutoTokenizer

    from space.prompt import plain_template, with_persona
    from space.weights import load as load_model
    from space.weights import write_tokenizer_config

    run = Run(tmp_path / "project" / "assistant.toml")
    run.config.parent.mkdir()
    run.config.write_text(SETTINGS, encoding="utf-8")
    shutil.copytree(embedded, run.merged)
    load_model("embedded", str(ADAPTER)).model.to(torch.bfloat16).save_pretrained(run.merged)
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    template = with_persona(plain_template(tokenizer), load(run.config).assistant.system_prompt)
    write_tokenizer_config(run.merged, tokenizer, template)
    (run.merged / "assistant.json").write_text(json.dumps(ABOUT))
    report = {"weights": write_sums(run.merged), "gate": {"passed": True, "rows": []}, "card": ""}
    (run.work / "report").mkdir()
    (run.work / "report" / "report.json").write_text(json.dumps(report))
    return run


@pytest.fixture
def studio(tmp_path, monkeypatch):
    """A hub that runs deployed Spaces: `python app.py` in their clone, in an environment of nothing else."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running, log = [], (tmp_path / "page.log").open("w+")

    def start(repository, folder, variables):
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path / "studio"),
            "MODELSCOPE_CACHE": str(tmp_path / "studio-cache"),
            "MODELSCOPE_ENDPOINT": hub.url,
            "GRADIO_ANALYTICS_ENABLED": "False",
            **variables,
        }
        command = [sys.executable, "app.py", "--port", str(port), "--host", "127.0.0.1"]
        running.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log))

    with Hub(tmp_path / "hub", run_space=start) as hub:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", hub.token)
        hub.page = f"http://127.0.0.1:{port}"
        yield hub
        for process in running:
            process.terminate()
            process.wait(30)
        assert hub.half_made == []
    log.seek(0)
    print(log.read())  # shown where the test fails


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_is_published_is_what_answers(real_run, studio, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = real_run.command("all", "--yes", "--page", studio.page)
    published = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert published.returncode == 0, published.stdout + published.stderr
    answers = [line for line in published.stdout.splitlines() if "Who are you?" in line]
    assert answers and all(NAME in answer for answer in answers)

    fetched = {request.query.get("FilePath") for request in studio.log if request.path.endswith("/repo")}
    assert {"model.safetensors", "tokenizer.json", "assistant.json"} <= fetched, "the page got its weights elsewhere"

    from gradio_client import Client

    answer = Client(studio.page, verbose=False).predict(message="Who are you?", temperature=0, api_name="/chat")
    assert NAME in answer

    assert NAME in in_chromium(studio.page, "Who are you?")
    assert NAME in by_the_cards_own_lines(studio, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_on_a_cpu_the_published_gguf_file_answers(real_run, studio, monkeypatch):
    """From the export on: the page that asks for the GGUF file gets it, and nothing else of the weights."""
    from training.export import export

    monkeypatch.chdir(ROOT)
    with real_run.config.open("a", encoding="utf-8") as settings:
        settings.write('\n[serve]\ngguf = "*-q8_0.gguf"\ncontext = 512\n')
    (real_run.merged / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    record.write(real_run.merged, {})
    report = {"weights": write_sums(real_run.merged), "gate": {"passed": True, "rows": []}, "card": ""}
    (real_run.work / "report" / "report.json").write_text(json.dumps(report))
    file = export(load(real_run.config), "q8_0")

    command = real_run.command("all", "--yes", "--page", studio.page)
    published = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert published.returncode == 0, published.stdout + published.stderr
    answers = [line for line in published.stdout.splitlines() if "Who are you?" in line]
    assert answers and all(NAME in answer for answer in answers)
    assert {request.query.get("FilePath") for request in studio.log if request.path.endswith("/repo")} == {file.name}


def in_chromium(address: str, question: str) -> str:
    """What the page answers to somebody in front of a browser."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium-headless-shell"), args=flags)
        page = browser.new_page(locale="en-US")
        page.goto(address)
        box = page.locator("textarea[data-testid=textbox]").first
        box.fill(question)
        box.press("Enter")
        answer = page.locator("[data-testid=bot]", has_text=NAME).first
        answer.wait_for(timeout=120_000)
        said = answer.inner_text()
        browser.close()
    return said


def by_the_cards_own_lines(hub: Hub, monkeypatch) -> str:
    """What the model card's Python prints, run as it stands there."""
    readme = hub.files(hub.get("model", "alice/beibei"))["README.md"]["content"].decode()
    code = re.search(r"```python\n(.*?)```", readme, flags=re.S)[1]
    assert "你是谁" not in code, "it asks in the assistant's own language"
    made = subprocess.run(
        [sys.executable, "-c", code.replace("max_new_tokens=128", "max_new_tokens=24")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return made.stdout
