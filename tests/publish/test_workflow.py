"""The workflow that publishes from CI gives the tokens to the step that needs them, and to nothing that may change."""

from __future__ import annotations

import re
import shlex

import yaml
from typer.testing import CliRunner

from publish.__main__ import app
from tests.publish.conftest import ROOT

FILE = ROOT / ".github" / "workflows" / "publish.yml"
JOB = yaml.safe_load(FILE.read_text(encoding="utf-8"))["jobs"]["publish"]
*BEFORE, LAST = JOB["steps"]


def test_only_the_step_that_publishes_has_the_tokens():
    assert "secrets." not in str([{**JOB, "steps": BEFORE}])
    assert LAST["env"].keys() == {"MODELSCOPE_API_TOKEN", "HF_TOKEN", "NAMESAKE_SPACE_TOKEN"}


def test_every_action_is_named_by_its_commit_and_no_input_becomes_part_of_a_command():
    actions = [step["uses"] for step in BEFORE if "uses" in step]
    assert actions and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in actions)
    assert not [step["run"] for step in JOB["steps"] if "${{" in step.get("run", "")]


def test_its_command_is_one_that_there_is():
    python, option, package, *arguments = shlex.split(LAST["run"])
    assert (python, option, package) == ("python", "-m", "publish")
    made = CliRunner().invoke(app, [*arguments, "--config", "nowhere.toml"])
    assert made.exit_code == 2 and "nowhere.toml" in made.output
