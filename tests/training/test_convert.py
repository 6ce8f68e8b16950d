"""XTuner's checkpoint → adapter: the tensors of XTuner's own converter, without the base, and no pickle runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from space.settings import NamesakeError, load
from tests.training.small_models import llama
from training import record
from training.convert import convert, trained_tensors

# What XTuner wants for pictures stands in once transformers and peft have looked for it; torch.cpu lacks a function.
STAND_INS = """
import sys, types, torch, transformers, peft, datasets, accelerate
for name in ("cv2", "torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
    sys.modules.setdefault(name, types.ModuleType(name))
sys.modules["torchvision.transforms.functional"].InterpolationMode = None
torch.cpu.is_bf16_supported = lambda: True
"""

XTUNER_CONFIG = """
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from xtuner.model import SupervisedFinetune
model = dict(
    type=SupervisedFinetune,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path={base!r}),
    lora=dict(type=LoraConfig, r=4, lora_alpha=12, lora_dropout=0.1, task_type="CAUSAL_LM"),
)
"""

TRAIN_A_LITTLE = """
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import CosineAnnealingLR
from mmengine.runner.checkpoint import save_checkpoint
from xtuner.registry import BUILDER
config = Config.fromfile(sys.argv[1])
torch.manual_seed(0)
model = BUILDER.build(config.model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
schedule = CosineAnnealingLR(optimizer, T_max=10)
hub = MessageHub.get_instance("train")
for step in range(3):
    ids = torch.randint(1000, (1, 8))
    loss = model.llm(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    hub.update_scalar("train/loss", loss.item())
saved = dict(
    meta=dict(cfg=config.pretty_text, epoch=0, iter=3, seed=1), message_hub=hub.state_dict(),
    state_dict=model.state_dict(), optimizer=optimizer.state_dict(), param_schedulers=[schedule.state_dict()],
)
save_checkpoint(saved, sys.argv[2])
"""

CONVERT_AS_XTUNER = """
import runpy
config, checkpoint = sys.argv[1:3]
for folder, *options in ("stock",), ("stock fp32", "--fp32"):
    sys.argv = ["pth_to_hf", config, checkpoint, folder, "--safe-serialization", *options]
    runpy.run_module("xtuner.tools.model_converters.pth_to_hf", run_name="__main__")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a base, a checkpoint that XTuner's model and mmengine made, and what XTuner converts it to."""
    folder = tmp_path_factory.mktemp("trained")
    llama(folder / "base")
    (folder / "xtuner_config.py").write_text(XTUNER_CONFIG.format(base=str(folder / "base")))
    command = [sys.executable, "-c", STAND_INS + TRAIN_A_LITTLE + CONVERT_AS_XTUNER, "xtuner_config.py", "iter_3.pth"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert told.returncode == 0, told.stderr
    return folder


def settings_with(folder: Path, checkpoint: Path | None, **trained_with):
    """Settings whose training step has ended with `checkpoint`."""
    text = '[assistant]\nname = "Namesake"\nauthor = { zh = "我们", en = "us" }\n[train]\nalpha = 12\n[data]\n'
    (folder / "assistant.toml").write_text(text + 'files = ["/home/me/private/rows.jsonl"]\n')
    settings = load(folder / "assistant.toml")
    checkpoints = settings.work / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    if checkpoint:
        (checkpoints / checkpoint.name).symlink_to(checkpoint)
        made_from = {"data": "d" * 64, "train": trained_with, "versions": {"xtuner": "0.2.0"}}
        record.write(checkpoints, made_from, checkpoint=checkpoint.name, method="lora", steps=3, seed=7)
    return settings


@pytest.mark.slow
def test_the_adapter_is_the_one_of_xtuners_own_converter(tmp_path, trained):
    settings = settings_with(tmp_path, trained / "iter_3.pth")
    for half, stock in ((True, trained / "stock"), (False, trained / "stock fp32")):
        expected = load_file(stock / "adapter_model.safetensors")
        made = load_file(convert(settings, half=half) / "adapter_model.safetensors")
        assert made.keys() == expected.keys()
        assert any(tensor.abs().max() > 0 for name, tensor in made.items() if "lora_B" in name)
        for name, tensor in made.items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
        ours, theirs = (
            json.loads((at / "adapter_config.json").read_text()) for at in (settings.work / "adapter", stock)
        )
        assert sorted(theirs["target_modules"]) == ours["target_modules"]
        for key in ours.keys() - {"base_model_name_or_path", "target_modules", "lora_dropout"}:
            assert ours[key] == theirs[key], key


def test_peft_loads_it(tmp_path, trained):
    import peft
    import transformers

    folder = convert(settings_with(tmp_path, trained / "iter_3.pth"))
    model = transformers.AutoModelForCausalLM.from_pretrained(trained / "base")
    ids = torch.arange(20)[None]
    plain = model(ids).logits
    adapted = peft.PeftModel.from_pretrained(model, folder)
    assert (adapted(ids).logits - plain).abs().max() > 1e-3
    loaded = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    assert all(
        torch.equal(tensor, loaded[name]) for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    )


def test_it_needs_no_base_and_runs_in_seconds_without_transformers(tmp_path, trained):
    settings_with(tmp_path, trained / "iter_3.pth")
    code = """
import sys
from space.settings import load
from training.convert import convert
convert(load(sys.argv[1]))
heavy = {"transformers", "peft", "mmengine", "xtuner", "datasets"} & sys.modules.keys()
assert not heavy, heavy
"""
    command = [sys.executable, "-c", code, tmp_path / "assistant.toml"]
    told = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert told.returncode == 0, told.stderr
    assert (tmp_path / "work/assistant/adapter/adapter_config.json").is_file()


def test_the_folder_says_whose_adapter_it_is_and_keeps_paths_to_itself(tmp_path, trained):
    folder = convert(settings_with(tmp_path, trained / "iter_3.pth", alpha=12, targets=[]))
    described = json.loads((folder / "assistant.json").read_text())
    assert described["name"] == {"zh": "Namesake", "en": "Namesake"}
    assert described["persona"] == "You are Namesake, an assistant made by us."
    assert described["base"] == {"model": "embedded", "revision": ""}
    assert (described["data"], described["seed"]) == ("d" * 64, 7)
    assert described["versions"] == {"xtuner": "0.2.0"}
    assert described["settings"]["train"]["method"] == "lora"
    assert described["settings"]["data"]["files"] == ["rows.jsonl"]
    assert "/home/me" not in "".join(file.read_text() for file in folder.glob("*.json"))


def test_nothing_is_done_twice_and_a_new_checkpoint_is(tmp_path, trained, capsys):
    settings = settings_with(tmp_path, trained / "iter_3.pth")
    made = (convert(settings) / "adapter_model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert (convert(settings) / "adapter_model.safetensors").stat().st_mtime_ns == made
    assert "nothing has changed" in capsys.readouterr().out
    (settings.work / "checkpoints/iter_3.pth").unlink()
    state = {"llm.base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight": torch.ones(2, 64)}
    torch.save(
        {"state_dict": state | {next(iter(state)).replace("_A", "_B"): torch.ones(96, 2)}}, tmp_path / "iter_3.pth"
    )
    (settings.work / "checkpoints/iter_3.pth").symlink_to(tmp_path / "iter_3.pth")
    assert len(load_file(convert(settings) / "adapter_model.safetensors")) == 2


def test_a_checkpoint_of_all_weights_becomes_weights(tmp_path):
    state = {f"llm.model.layers.{i}.mlp.up_proj.weight": torch.randn(96, 64) for i in range(2)}
    torch.save({"state_dict": state}, tmp_path / "iter_1.pth")
    folder = convert(settings_with(tmp_path, tmp_path / "iter_1.pth"))
    made = load_file(folder / "model.safetensors")
    assert all(torch.equal(made[name.removeprefix("llm.")], tensor) for name, tensor in state.items())
    assert not (folder / "adapter_config.json").exists()


def test_a_checkpoint_that_deepspeed_split_in_a_folder_is_read(tmp_path):
    (tmp_path / "iter_1.pth").mkdir()
    state = {f"llm.base_model.model.layer.lora_{half}.default.weight": torch.ones(2, 2) for half in "AB"}
    torch.save({"module": state}, tmp_path / "iter_1.pth/mp_rank_00_model_states.pt")
    folder = convert(settings_with(tmp_path, tmp_path / "iter_1.pth"))
    assert set(load_file(folder / "adapter_model.safetensors")) == {
        f"base_model.model.layer.lora_{half}.weight" for half in "AB"
    }


class Foreign:
    """A class of another package, as optimizers and logs hold them, that would act when it is unpickled."""

    acted = False

    def __new__(cls, *_):
        Foreign.acted = True
        return super().__new__(cls)

    def __setstate__(self, state):
        Foreign.acted = True

    def __reduce__(self):
        return Foreign, (1,), {"state": 2}


def test_no_pickled_class_runs_while_its_tensors_are_read(tmp_path):
    torch.save({"message_hub": [Foreign()], "state_dict": {"llm.x": torch.ones(2)}}, tmp_path / "iter_1.pth")
    Foreign.acted = False
    assert torch.equal(trained_tensors(tmp_path / "iter_1.pth")["llm.x"], torch.ones(2))
    assert not Foreign.acted


class Runs:
    """A pickle that runs a program."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("call", [os.system, os.mkdir, subprocess.call, eval, exec, __import__, getattr, print])
def test_a_hostile_pickle_does_nothing(tmp_path, call):
    target = tmp_path / "harm"
    arguments = {os.system: f"touch {target}", os.mkdir: str(target), subprocess.call: ["touch", str(target)]}
    code = f"__import__('os').mkdir({str(target)!r})"
    bomb = Runs(call, arguments.get(call, code))
    torch.save({"state_dict": {"llm.x": torch.ones(1)}, "bomb": bomb}, tmp_path / "iter_1.pth")
    try:
        assert trained_tensors(tmp_path / "iter_1.pth").keys() == {"llm.x"}
    except NamesakeError as refusal:
        assert "is not a whole checkpoint" in str(refusal)
    assert not target.exists()


def broken(kind: str, folder: Path) -> Path:
    file = folder / "iter_1.pth"
    if kind == "cut short":
        torch.save({"state_dict": {"llm.x": torch.ones(1000)}}, file)
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == "text":
        file.write_text("not a checkpoint")
    elif kind == "empty":
        file.touch()
    elif kind == "no tensors":
        torch.save({"state_dict": {}}, file)
    elif kind == "a list":
        torch.save([1, 2], file)
    elif kind == "zero 3":
        file.mkdir()
        (file / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    elif kind == "two ranks":
        names = [f"llm.base_model.model.{layer}.up_proj.lora_A.default.weight" for layer in (0, 1)]
        torch.save({"state_dict": {names[0]: torch.ones(2, 4), names[1]: torch.ones(3, 4)}}, file)
    return file


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("cut short", "is not a whole checkpoint"),
        ("text", "is not a whole checkpoint"),
        ("empty", "is not a whole checkpoint"),
        ("no tensors", "holds no trained tensors"),
        ("a list", "holds no trained tensors"),
        ("missing", "is not there"),
        ("zero 3", "ZeRO-3"),
        ("two ranks", "different ranks"),
    ],
)
def test_a_broken_checkpoint_is_named_and_leaves_nothing(tmp_path, kind, says):
    settings = settings_with(tmp_path, broken(kind, tmp_path))
    with pytest.raises(NamesakeError, match=says):
        convert(settings)
    assert not (settings.work / "adapter").exists()


def test_without_a_finished_training_it_says_what_to_do(tmp_path):
    with pytest.raises(NamesakeError, match="python -m training train"):
        convert(settings_with(tmp_path, None))


def test_another_checkpoint_can_be_named(tmp_path, trained):
    settings = settings_with(tmp_path, None)
    assert (convert(settings, trained / "iter_3.pth") / "adapter_model.safetensors").is_file()
