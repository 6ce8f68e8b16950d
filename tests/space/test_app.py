"""`python app.py`: its command line, and that a bad one is told in one line."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import app

ROOT = Path(__file__).parents[2]

BAD = {
    "port in use": (["--port", "BUSY"], "Address already in use. Choose another with --port."),
    "port too high": (["--port", "70000"], "--port is 70000. Choose one from 0 to 65535."),
    "port below zero": (["--port", "-5"], "--port is -5. Choose one from 0 to 65535."),
    "port in words": (["--port", "http"], "--port"),
    "unknown host": (["--host", "no.such.host.invalid", "--port", "7999"], "Check --host."),
    "unknown host, any port": (["--host", "no.such.host.invalid"], "Check --host."),
    "another machine's address": (["--host", "203.0.113.7", "--port", "7999"], "Check --host."),
    "host that is a URL": (["--host", "http://127.0.0.1"], "Check --host."),
    "no settings file": (["--config", "nowhere.toml"], "nowhere.toml: no such settings file. Give one with --config"),
    "a folder for settings": (["--config", "FOLDER"], "Is a directory. Give a readable file with --config"),
    "broken settings": (["--config", "BROKEN"], "broken.toml:2: not valid TOML"),
    "no model folder": (["--model", "/no/such/folder"], "/no/such/folder: no such folder, and not a repository"),
    "model without an owner": (["--model", "modelscope:name"], "modelscope:name: no such folder, and not a repo"),
    "model of an unknown hub": (["--model", "github:me/you"], "github:me/you: no such folder, and not a repository"),
    "model by its URL": (["--model", "https://modelscope.cn/models/a/b"], "no such folder, and not a repository"),
    "unknown precision": (["--load-in", "3bit"], "--load-in"),
    "unknown option": (["--prot", "1"], "--prot"),
    "an argument too many": (["folder"], "unexpected extra argument"),
    "option without a value": (["--model"], "--model"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_bad_command_line_is_one_clear_line(tmp_path, monkeypatch, mistake):
    arguments, says = BAD[mistake]
    monkeypatch.delenv("NAMESAKE_MODEL", raising=False)
    (tmp_path / "broken.toml").write_text('[assistant]\nname = "x\n', encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        values = {"BUSY": str(taken.getsockname()[1]), "BROKEN": f"{tmp_path}/broken.toml", "FOLDER": str(tmp_path)}
        done = CliRunner().invoke(app.command, [values.get(argument, argument) for argument in arguments])
    assert done.exit_code in (1, 2)
    assert isinstance(done.exception, SystemExit)  # told, not raised
    if done.exit_code == 1:
        assert done.output.count("\n") == 1
    assert says in done.output


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"NAMESAKE_MODEL": "/no/such/folder"}, "/no/such/folder: no such folder"),
        ({"NAMESAKE_LOAD_IN": "3bit"}, "NAMESAKE_LOAD_IN"),
    ],
)
def test_a_bad_environment_is_told_likewise(monkeypatch, environment, says):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app.command, [])
    assert done.exit_code in (1, 2) and says in done.output


def test_in_a_process_of_its_own_the_line_is_on_stderr_and_there_is_no_traceback():
    done = subprocess.run(
        [sys.executable, "app.py", "--config", "nowhere.toml"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "nowhere.toml: no such settings file. Give one with --config\n"


def test_help_is_there_at_once():
    def seconds():
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "app.py", "--help"], cwd=ROOT, capture_output=True, text=True)
        assert "huggingface:owner/name[@revision]" in done.stdout
        return time.perf_counter() - begun

    assert min(seconds() for _ in range(3)) < 1
