"""python -m training: help is instant, mistakes are one line, and `all` is every step in order."""

from __future__ import annotations

import resource
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from space.settings import NamesakeError
from training.__main__ import app

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["base", "data", "train", "convert", "merge", "evaluate"]
SETTINGS = '[assistant]\nname = "Pudding"\nauthor = "us"\n'


@pytest.fixture
def steps(monkeypatch):
    """Every step replaced by one that notes that it was called, and with what."""
    called = []

    def stand_in(name: str):
        def step(settings, *arguments, **options):
            called.append((name, arguments, options))
            return True

        module = types.ModuleType(f"training.{name}")
        setattr(module, name, step)
        module.verify = lambda folder: f"verified {folder.name}"
        return module

    import training

    for name in STEPS:
        module = stand_in(name)
        monkeypatch.setitem(sys.modules, f"training.{name}", module)
        monkeypatch.setattr(training, name, module, raising=False)
    return called


@pytest.fixture
def config(tmp_path) -> str:
    (tmp_path / "assistant.toml").write_text(SETTINGS, encoding="utf-8")
    return str(tmp_path / "assistant.toml")


@pytest.mark.parametrize("command", ["", *STEPS, "all"])
def test_help_teaches_and_answers_within_half_a_second(command):
    def used() -> float:  # seconds of processor time: on a busy machine the clock says nothing
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    arguments = [sys.executable, "-m", "training", *command.split(), "--help"]
    said = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert used() - before < 0.5
    assert all(step in said for step in STEPS) if not command else "--config" in said


@pytest.mark.parametrize("step", STEPS)
def test_each_command_calls_its_step(steps, config, step):
    result = CliRunner().invoke(app, [step, "--config", config])
    assert result.exit_code == 0, result.output
    assert [name for name, *_ in steps] == [step]


def test_all_is_every_step_in_order_and_ends_with_the_gate(steps, config, monkeypatch):
    assert CliRunner().invoke(app, ["all", "--config", config]).exit_code == 0
    assert [name for name, *_ in steps] == STEPS
    monkeypatch.setattr(sys.modules["training.evaluate"], "evaluate", lambda *_, **__: False)
    assert CliRunner().invoke(app, ["all", "--config", config]).exit_code == 1


def test_all_stops_at_the_first_step_that_fails(steps, config, monkeypatch):
    def fail(*_, **__):
        raise NamesakeError("No memory", "Buy some.")

    monkeypatch.setattr(sys.modules["training.train"], "train", fail)
    result = CliRunner().invoke(app, ["all", "--config", config])
    assert result.exit_code == 2
    assert result.stderr == "error: No memory. Buy some.\n"
    assert [name for name, *_ in steps] == ["base", "data"]


def test_options_reach_the_step(steps, config):
    line = ["train", "--config", config, "--resume", "--auto-batch", "--gpus", "8", "--nodes", "2", "--node-rank", "1"]
    CliRunner().invoke(app, [*line, "--master", "host:1", "--deepspeed", "zero3_offload", "--dry-run"])
    CliRunner().invoke(app, ["data", "--config", config, "--preview", "3"])
    CliRunner().invoke(app, ["merge", "--config", config, "--max-shard-size", "5GB"])
    (_, _, train), (_, data, _), (_, _, merge) = steps
    assert train == dict(
        resume=True, restart=False, auto_batch=True, gpus=8, nodes=2, node_rank=1,
        master="host:1", deepspeed="zero3_offload", dry_run=True,
    )  # fmt: skip
    assert data == (3,)
    assert merge == {"max_shard_size": "5GB"}


def test_merge_verify_only_checks(steps, config):
    assert "verified merged" in CliRunner().invoke(app, ["merge", "--config", config, "--verify"]).output
    assert not steps


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["train", "--config", "missing.toml"], "missing.toml"),
        (["train", "--gpus", "0"], "--gpus"),
        (["train", "--gpus", "two"], "--gpus"),
        (["train", "--deepspeed", "zero9"], "zero2"),
        (["data", "--preview", "-1"], "--preview"),
        (["evaluate", "--samples", "-1"], "--samples"),
        (["fly"], "fly"),
    ],
)
def test_a_mistake_is_told_with_status_2_and_no_traceback(steps, config, line, says):
    line = line if "--config" in line or line == ["fly"] else [*line, "--config", config]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert not steps
