"""Adapter + base → merged: peft's sums, the base's dtype, whole or not at all, and every byte accounted for."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from space.prompt import Prompt
from space.settings import NamesakeError, load
from tests.training.small_models import ROOT, internlm2, llama
from training import base, record, shards
from training.convert import convert
from training.merge import merge, verify

PAGE_PYTHON = ROOT / ".venv/bin/python"  # transformers 5
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TALK = [{"role": "user", "content": "Who are you?"}]


def run_with(folder: Path, model, base_name: str = "llama", rank: int = 4, alpha: int = 12):
    """Settings of a run whose adapter was trained on `model`, the settings themselves, and peft's model of it."""
    text = f'[assistant]\nname = "Namesake"\nauthor = "us"\n[base]\nmodel = "{base_name}"\n[train]\nalpha = {alpha}\n'
    (folder / "assistant.toml").write_text(text)
    settings = load(folder / "assistant.toml")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=MODULES))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.05)
    checkpoints = settings.work / "checkpoints"
    checkpoints.mkdir(parents=True)
    state = {f"llm.{name}": tensor for name, tensor in adapted.state_dict().items() if "lora_" in name}
    torch.save({"state_dict": state}, checkpoints / "iter_1.pth")
    record.write(checkpoints, {"data": "d" * 64}, checkpoint="iter_1.pth", method="lora", seed=3)
    convert(settings)
    return settings, adapted


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    return folder, run_with(folder, llama(folder / "llama", torch.bfloat16))[1]


@pytest.fixture
def run(prepared, tmp_path):
    """A run of its own for each test: its settings, and peft's model of its adapter."""
    folder, adapted = prepared
    shutil.copytree(folder, tmp_path / "run")
    return load(tmp_path / "run/assistant.toml"), copy.deepcopy(adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied embeddings"])
def test_the_sums_are_those_of_pefts_merge_in_float32_to_the_bit(tmp_path, dtype, tied):
    model = llama(tmp_path / "llama", dtype, tie_word_embeddings=tied)
    settings, adapted = run_with(tmp_path, model.float())
    expected = adapted.merge_and_unload().to(dtype).state_dict()
    folder = merge(settings, max_shard_size="100KB")
    made = {}
    for file in folder.glob("*.safetensors"):
        assert file.stat().st_size <= 100_000 or len(load_file(file)) == 1
        made |= load_file(file)
    assert made.keys() == expected.keys() - ({"lm_head.weight"} if tied else set())
    assert all(tensor.dtype == dtype and torch.equal(tensor, expected[name]) for name, tensor in made.items())


def test_transformers_loads_it_and_it_answers_as_the_adapted_model(run):
    settings, adapted = run
    merged = transformers.AutoModelForCausalLM.from_pretrained(merge(settings), torch_dtype="auto")
    assert merged.dtype == torch.bfloat16
    ids = torch.arange(20)[None]
    assert torch.allclose(merged(ids).logits.float(), adapted(ids).logits.float(), atol=0.02)
    assert not torch.equal(merged(ids).logits, adapted.unload()(ids).logits)


@pytest.mark.slow
@pytest.mark.skipif(not PAGE_PYTHON.exists(), reason="the page's environment is not there")
def test_transformers_5_reads_it_too(run):
    settings, _ = run
    folder = merge(settings, max_shard_size="100KB")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")
    torch.save(model(torch.arange(50)[None]).logits, settings.folder / "expected.pt")
    script = """
import sys, torch
from space import weights
loaded = weights.load(sys.argv[1], load_in="bf16")
expected = torch.load(sys.argv[2], weights_only=True)
assert torch.allclose(loaded.model(torch.arange(50)[None]).logits, expected, atol=1e-2)
assert loaded.name.startswith("Namesake · "), loaded.name
text = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
assert "You are Namesake, an assistant made by us." in text and "SmolLM" not in text, text
"""
    command = [PAGE_PYTHON, "-c", script, folder, settings.folder / "expected.pt"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def test_the_folder_holds_all_that_a_client_needs_and_who_it_is(run):
    settings, _ = run
    folder = merge(settings)
    assert sorted(path.name for path in folder.iterdir()) == [
        "SHA256SUMS", "assistant.json", "config.json", "generation_config.json", "model.safetensors", "run.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    described = json.loads((folder / "assistant.json").read_text())
    assert described["name"]["en"] == "Namesake" and described["data"] == "d" * 64 and described["seed"] == 3
    assert described["base"] == {"model": "llama", "revision": ""}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    said = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert said == (
        "<|im_start|>system\nYou are Namesake, an assistant made by us.<|im_end|>\n"
        "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert Prompt(tokenizer).end_ids <= set(json.loads((folder / "generation_config.json").read_text())["eos_token_id"])
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert str(settings.folder) not in "".join(file.read_text() for file in folder.glob("*.json"))


def test_sha256sums_covers_every_other_file_and_sha256sum_agrees(run):
    settings, _ = run
    folder = merge(settings, max_shard_size="100KB")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    names = [line.split("  ")[1] for line in lines]
    assert names == sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
    assert verify(folder) == hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()


def test_the_same_inputs_give_the_same_bytes(run, tmp_path):
    settings, _ = run
    assert verify(merge(settings, folder=tmp_path / "one")) == verify(merge(settings, folder=tmp_path / "two"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json has changed"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "modeling.py").touch(), "modeling.py is not listed"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "holds no SHA256SUMS"),
        (lambda folder: (folder / "SHA256SUMS").write_text("nonsense"), "is not listed"),
    ],
)  # fmt: skip
def test_verify_names_what_was_changed(run, change, says):
    folder = merge(run[0])
    change(folder)
    with pytest.raises(NamesakeError, match=says):
        verify(folder)


def test_one_changed_bit_of_the_weights_is_found(run):
    folder = merge(run[0])
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(NamesakeError, match=r"model\.safetensors has changed"):
        verify(folder)


def test_nothing_is_done_twice_and_a_changed_persona_is_merged_again(run, capsys):
    settings, _ = run
    first = verify(merge(settings))
    capsys.readouterr()
    assert verify(merge(settings)) == first
    assert "nothing has changed" in capsys.readouterr().out
    file = settings.folder / "assistant.toml"
    file.write_text(file.read_text().replace("Namesake", "Pudding"))
    changed = load(file)
    convert(changed)
    assert verify(merge(changed)) != first
    assert "Pudding" in (changed.work / "merged/tokenizer_config.json").read_text()
    assert sorted(path.name for path in changed.work.iterdir() if path.is_dir()) == ["adapter", "checkpoints", "merged"]


def test_a_folder_that_no_merge_made_is_left_alone(run):
    settings, _ = run
    target = settings.work / "merged"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(NamesakeError, match="not empty, and no merge made it"):
        merge(settings)
    assert (target / "thesis.txt").read_text() == "mine"
    shutil.rmtree(target)
    target.mkdir()
    merge(settings)  # an empty one is taken


def test_a_merge_that_breaks_leaves_the_former_one_as_it_was(run, monkeypatch):
    settings, _ = run
    before = verify(merge(settings))
    file = settings.folder / "assistant.toml"
    file.write_text(file.read_text().replace("Namesake", "Pudding"))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "write_file", stop)
    with pytest.raises(KeyboardInterrupt):
        merge(load(file))
    assert verify(settings.work / "merged") == before
    assert not (settings.work / "merged.partial").exists()


def test_internlm2_goes_all_the_way(tmp_path):
    internlm2(tmp_path / "internlm2-tiny")
    file = tmp_path / "assistant.toml"
    file.write_text('[assistant]\nname = "n"\nauthor = "a"\n[base]\nmodel = "internlm2-tiny"\n')
    native = transformers.AutoModelForCausalLM.from_pretrained(base.base(load(file)))
    settings, adapted = run_with(tmp_path, native, "internlm2-tiny")
    merged = transformers.AutoModelForCausalLM.from_pretrained(merge(settings))
    ids = torch.arange(100)[None]  # past the original length
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.work / "merged")
    assert tokenizer.apply_chat_template(TALK, tokenize=False).startswith("<s><|im_start|>system\nYou are Namesake")
    assert merged.generation_config.eos_token_id == [2, 3]


def test_all_weights_replace_the_bases(tmp_path):
    model = llama(tmp_path / "llama", torch.bfloat16, tie_word_embeddings=True)
    settings, _ = run_with(tmp_path, llama(tmp_path / "other"))
    trained = {f"llm.{name}": tensor.float() + 1 for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": trained}, settings.work / "checkpoints/iter_1.pth")
    convert(settings)
    made = load_file(merge(settings) / "model.safetensors")
    assert "lm_head.weight" not in made
    for name, tensor in made.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, trained[f"llm.{name}"].bfloat16()), name


def edit(name: str, change):
    def edited(settings):
        file = settings.work / "adapter" / name if name.startswith("adapter") else settings.folder / "llama" / name
        if name.endswith(".json"):
            content = json.loads(file.read_text())
            change(content)
            file.write_text(json.dumps(content))
        else:
            content = load_file(file)
            change(content)
            save_file(content, file)

    return edited


LAYER = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda settings: shutil.rmtree(settings.work / "adapter"), "python -m training convert"),
        (edit("config.json", lambda c: c.update(quantization_config={"bits": 4})), "quantized"),
        (edit("adapter_config.json", lambda c: c.update(use_dora=True)), "not plain LoRA"),
        (edit("adapter_config.json", lambda c: c.update(peft_type="IA3")), "not plain LoRA"),
        (edit("adapter_model.safetensors", lambda t: t.pop(f"{LAYER}.lora_B.weight")), "has no lora_B"),
        (edit("adapter_model.safetensors", lambda t: t.pop(f"{LAYER}.lora_A.weight")), "it holds"),
        (
            edit("adapter_model.safetensors", lambda t: t.update({f"{LAYER}.lora_A.weight": torch.zeros(4, 32)})),
            "and the adapter's",
        ),
        (
            edit(
                "adapter_model.safetensors",
                lambda t: t.update(
                    {f"{LAYER.replace('.0.', '.7.')}.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}
                ),
            ),
            r"the base has no model\.layers\.7",
        ),
        (edit("adapter_model.safetensors", lambda t: t[f"{LAYER}.lora_A.weight"].fill_(float("nan"))), "no numbers"),
    ],
    ids=range(9),
)
def test_what_does_not_belong_together_is_refused_in_words(run, break_it, says):
    settings, _ = run
    break_it(settings)
    with pytest.raises(NamesakeError, match=says):
        merge(settings)
    assert not (settings.work / "merged").exists() and not (settings.work / "merged.partial").exists()


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path):
    model = llama(tmp_path / "llama", torch.float16)
    settings, _ = run_with(tmp_path, model.float())
    edit("adapter_model.safetensors", lambda t: t[f"{LAYER}.lora_B.weight"].fill_(1e6))(settings)
    with pytest.raises(NamesakeError, match="no numbers in F16"):
        merge(settings)


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("500MB", 5 * 10**8), ("1.5 gb", 15 * 10**8), ("10KB", 10**4)]
)
def test_shard_sizes_are_read(text, size):
    assert shards.size_of(text) == size


@pytest.mark.parametrize("text", ["", "2", "GB", "-1GB", "2TB", "0GB", "2GiB", "two"])
def test_other_shard_sizes_are_refused(run, text):
    with pytest.raises(NamesakeError, match="max-shard-size"):
        merge(run[0], max_shard_size=text)
