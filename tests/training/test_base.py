"""The base model: fetched, used where it is when it is native, and made native when it is not."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from space import weights
from space.prompt import Prompt
from space.settings import NamesakeError, load
from tests.short_tokenizer import embedded_folder
from tests.training.small_models import internlm2, llama
from training import base, shards

# The embedded model's tokenizer.json, its keys sorted, whichever transformers converted it.
TOKENIZER = "d7d7ce2838cefeee48438fcfbea5758710bcea2175584fd754b79b117143171e"


def settings_for(folder: Path, model: str, **base_keys):
    lines = [f'{key} = "{value}"' for key, value in {"model": model, **base_keys}.items()]
    text = '[assistant]\nname = "Namesake"\nauthor = "us"\n[base]\n' + "\n".join(lines)
    (folder / "assistant.toml").write_text(text)
    return load(folder / "assistant.toml")


def test_the_embedded_model_is_used_from_its_cache(tmp_path, capsys):
    settings = settings_for(tmp_path, "embedded")
    assert base.base(settings) == base.folder(settings) == weights.embedded_folder()
    assert "Next 下一步: python -m training data" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()


def test_the_embedded_tokenizer_is_the_same_whichever_transformers_converted_it(tmp_path):
    weights.convert_gguf_tokenizer(weights.embedded_gguf(), tmp_path)
    for folder in (tmp_path, weights.embedded_folder()):  # `make test` has converted that one with transformers 5
        made = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        assert hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest() == TOKENIZER


def test_a_native_folder_is_used_where_it_is(tmp_path):
    llama(tmp_path / "models/llama")
    settings = settings_for(tmp_path, "models/llama")  # relative to the settings file
    assert base.base(settings) == base.folder(settings) == tmp_path / "models/llama"
    assert not (tmp_path / "work").exists()


def test_internlm2_becomes_a_copy_in_native_layout_once(tmp_path, capsys):
    internlm2(tmp_path / "internlm2-tiny")
    settings = settings_for(tmp_path, "internlm2-tiny")
    with pytest.raises(NamesakeError, match="python -m training base"):
        base.folder(settings)
    folder = base.base(settings)
    assert folder == base.folder(settings) == tmp_path / "work/base/internlm2-tiny"
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    Prompt(transformers.AutoTokenizer.from_pretrained(folder))
    made = (folder / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert base.base(settings) == folder
    assert "nothing has changed" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert not list(folder.parent.glob("*.partial"))


def test_a_changed_source_is_converted_again(tmp_path):
    internlm2(tmp_path / "internlm2-tiny")
    settings = settings_for(tmp_path, "internlm2-tiny")
    base.base(settings)
    config = json.loads((tmp_path / "internlm2-tiny/config.json").read_text())
    (tmp_path / "internlm2-tiny/config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    with pytest.raises(NamesakeError, match="python -m training base"):
        base.folder(settings)
    assert json.loads((base.base(settings) / "config.json").read_text())["rope_theta"] == 5.0


def test_a_folder_with_pickled_weights_only_gets_safetensors(tmp_path):
    model = llama(tmp_path / "llama")
    for file in (tmp_path / "llama").glob("*.safetensors*"):
        file.unlink()
    torch.save(model.state_dict(), tmp_path / "llama/pytorch_model.bin")
    folder = base.base(settings_for(tmp_path, "llama"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_folder_that_transformers_5_wrote_is_made_readable_for_both_with_its_weights_linked(tmp_path):
    model = llama(tmp_path / "llama")
    expected = Prompt(transformers.AutoTokenizer.from_pretrained(tmp_path / "llama"))
    config = json.loads((tmp_path / "llama/config.json").read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    config["dtype"] = config.pop("torch_dtype")
    del config["rope_scaling"]
    (tmp_path / "llama/config.json").write_text(json.dumps(config))
    told = json.loads((tmp_path / "llama/tokenizer_config.json").read_text())
    (tmp_path / "llama/chat_template.jinja").write_text(told.pop("chat_template"))
    told["tokenizer_class"] = "TokenizersBackend"
    (tmp_path / "llama/tokenizer_config.json").write_text(json.dumps(told))
    folder = base.base(settings_for(tmp_path, "llama"))
    assert all(file.is_symlink() for file in folder.glob("*.safetensors"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.rope_theta == 50000.0
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    talk = [{"role": "user", "content": "Hello"}]
    assert Prompt(transformers.AutoTokenizer.from_pretrained(folder)).encode(talk) == expected.encode(talk)


class Hub:
    """Stands in for the hub's client: a repository on this disk that is fetched into a cache, as asked."""

    def __init__(self, repository: Path, cache: Path):
        self.repository, self.cache, self.fetched = repository, cache, []

    def snapshot_download(self, name, revision=None, ignore_patterns=(), local_files_only=False, **_):
        if local_files_only and not self.cache.is_dir():
            raise FileNotFoundError(name)
        if not local_files_only:
            self.fetched.append((name, revision))
            ignored = shutil.ignore_patterns(*ignore_patterns)
            shutil.copytree(self.repository, self.cache, ignore=ignored, dirs_exist_ok=True)
        return str(self.cache)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    embedded_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hub = Hub(tmp_path / "repository", tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_hubs_internlm2_is_fetched_once_and_converted(tmp_path, hub, form):
    internlm2(hub.repository, form=form)
    (hub.repository / "modeling_internlm2.py").write_text("raise SystemExit('remote code ran')")
    settings = settings_for(tmp_path, "huggingface:internlm/internlm2_5-tiny", revision="v1")
    folder = base.base(settings)
    assert folder == base.folder(settings) == tmp_path / "work/base/internlm2_5-tiny"
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert set(hub.fetched) == {("internlm/internlm2_5-tiny", "v1")}
    assert not (hub.cache / "modeling_internlm2.py").exists()
    fetched = len(hub.fetched)
    shutil.rmtree(hub.cache)
    assert base.base(settings) == folder  # nothing is fetched again for a copy that is there
    assert len(hub.fetched) == fetched
    with pytest.raises(NamesakeError, match="python -m training base"):
        base.folder(settings_for(tmp_path, "huggingface:internlm/internlm2_5-tiny", revision="v2"))


def test_a_hubs_native_model_is_used_from_the_hubs_cache(tmp_path, hub):
    llama(hub.repository)
    settings = settings_for(tmp_path, "huggingface:someone/llama")
    assert base.base(settings) == base.folder(settings) == hub.cache
    assert len(hub.fetched) == 1


def test_an_interrupted_download_is_finished(tmp_path, hub):
    llama(hub.repository)
    shutil.copytree(hub.repository, hub.cache)
    sorted(hub.cache.glob("*.safetensors"))[0].unlink()
    base.base(settings_for(tmp_path, "huggingface:someone/llama"))
    assert len(hub.fetched) == 1


def rewrite_config(folder: Path, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda folder: shutil.rmtree(folder), "no such folder, and not a repository"),
        (lambda folder: (folder / "config.json").unlink(), "no readable config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "no readable config.json"),
        (lambda folder: rewrite_config(folder, model_type="foreign"), "remote code"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: next(folder.glob("*-00001-*.safetensors")).unlink(), "weight files missing"),
        (lambda folder: next(folder.glob("*-00001-*.safetensors")).write_bytes(b"cut"), "readable header"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_be_used_is_named(tmp_path, break_it, says):
    llama(tmp_path / "llama")
    break_it(tmp_path / "llama")
    with pytest.raises(NamesakeError, match=says):
        base.base(settings_for(tmp_path, "llama"))


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    internlm2(tmp_path / "internlm2-tiny")
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(NamesakeError, match=r"GB of disk, and 0\.0 GB are free"):
        base.base(settings_for(tmp_path, "internlm2-tiny"))
    assert not (tmp_path / "work/base/internlm2-tiny").exists()


def test_a_broken_conversion_leaves_nothing_and_the_next_one_starts_clean(tmp_path, monkeypatch):
    internlm2(tmp_path / "internlm2-tiny")
    settings = settings_for(tmp_path, "internlm2-tiny")
    target = tmp_path / "work/base/internlm2-tiny"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(shards, "write_file", stop)
        base.base(settings)
    assert [path.name for path in target.parent.iterdir()] == ["internlm2-tiny.partial.lock"]
    (target.parent / "internlm2-tiny.partial").mkdir()
    (target.parent / "internlm2-tiny.partial/rest of a killed one").touch()
    assert sorted(path.name for path in base.base(settings).iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "run.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip


def test_two_at_once_do_not_meet(tmp_path):
    with shards.aside(tmp_path / "folder", 0) as first:
        with pytest.raises(NamesakeError, match="another process"), shards.aside(tmp_path / "folder", 0):
            pass
        assert first.is_dir()
    assert (tmp_path / "folder").is_dir()
