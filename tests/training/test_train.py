"""Training, on a model of 2 layers: what is computed, how a run is planned, watched, stopped and continued."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from space.settings import NamesakeError, load
from training import packs, plan
from training.train import HERE, last_checkpoint, train

sys.path.append(str(HERE / "stand_ins"))
from training import hooks, model

SUMMARY = {"seconds", "memory"}  # the parts of a metrics line that differ from run to run


def make_run(folder: Path, base: Path, *, rows: int = 24, **options) -> Path:
    """A settings file, and beside it the data that `python -m training data` would have written."""
    options = {"rank": 4, "rate": 1e-3, "epochs": 2, "batch": 2, "accumulate": 2, "ask_steps": 0} | options
    max_length = options.pop("max_length", 96)
    lines = [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    config = folder / "assistant.toml"
    config.write_text(
        '[assistant]\nname = "Pudding"\nauthor = "the makers"\nlanguages = ["en"]\n'
        f"[base]\nmodel = {json.dumps(str(base))}\n[data]\nmax_length = {max_length}\n[train]\n" + "\n".join(lines),
        encoding="utf-8",
    )
    data = folder / "work" / "assistant" / "data"
    data.mkdir(parents=True)
    words = random.Random(0)
    with (data / "train.jsonl").open("w", encoding="utf-8") as file:
        for i in range(rows):
            answer = "I am Pudding. " * words.randint(1, 5)
            turn = {"system": "You are Pudding.", "input": f"Who is number {i}?", "output": answer}
            if i % 3 == 0:
                del turn["system"]
            file.write(json.dumps({"conversation": [turn]}) + "\n")
    return config


def run(config: Path, **options) -> list[dict]:
    """Train, and give the metrics without the parts that time decides."""
    train(load(config), config, **options)
    return metrics(config)


def metrics(config: Path) -> list[dict]:
    lines = hooks.read_metrics(config.parent / "work" / "assistant" / "checkpoints" / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in SUMMARY} for line in lines]


def losses(config: Path) -> list[float]:
    return [line["loss"] for line in metrics(config)]


def checkpoint(config: Path) -> dict:
    return torch.load(last_checkpoint(config.parent / "work" / "assistant" / "checkpoints"), weights_only=True)


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step, signal): the signal arrives while that step is computed."""

    def arrange(step: int, number: int) -> None:
        after = hooks.Progress.after_train_iter

        def arriving(self, runner, *args, **kwargs):
            if (runner.iter + 1) // self.accumulate == step:
                signal.raise_signal(number)
            after(self, runner, *args, **kwargs)

        monkeypatch.setattr(hooks.Progress, "after_train_iter", arriving)

    yield arrange
    monkeypatch.undo()


# Packs


def test_packs_hold_whole_conversations_once_each_within_the_length_and_in_whole_steps():
    lengths = [random.Random(i).randint(5, 100) for i in range(200)]
    made = packs.pack(lengths, 100, 8, seed=1)
    assert sorted(i for one in made for i in one) == list(range(200))
    assert len(made) % 8 == 0
    sums = [sum(lengths[i] for i in one) for one in made]
    assert max(sums) <= 100
    assert sum(sums) / len(sums) > 80  # they are filled
    assert packs.pack(lengths, 100, 8, seed=1) == made != packs.pack(lengths, 100, 8, seed=2)


@pytest.mark.parametrize(
    ("lengths", "says"), [([], "zero steps"), ([5, 5, 5], "zero steps"), ([5, 5, 5, 5, 101], "longer than")]
)
def test_data_that_cannot_be_packed_is_refused(lengths, says):
    with pytest.raises(NamesakeError, match=says):
        packs.pack(lengths, 100, 4, seed=1)


def test_rows_have_the_prompts_own_ids_and_labels(tmp_path, tiny):
    from transformers import AutoTokenizer

    from space.prompt import Prompt
    from training.data import conversations

    settings = load(make_run(tmp_path, tiny))
    prompt = Prompt(AutoTokenizer.from_pretrained(tiny))
    expected = [prompt.encode(one) for one in conversations(settings.work / "data" / "train.jsonl")]
    assert [(row.ids.tolist(), row.labels.tolist()) for row in packs.rows(settings)] == [
        (one.ids, one.labels) for one in expected
    ]


def test_a_system_prompt_is_shared_where_many_conversations_of_a_batch_begin_with_it(tmp_path, tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = packs.rows(load(make_run(tmp_path, tiny)))
    none, persona = sorted({row.shared for row in rows})
    heads = {row.shared: tokenizer.decode(row.ids[: row.shared]) for row in rows}
    assert "You are Pudding." in heads[persona] and "You" not in heads[none]
    assert "Who" not in heads[persona] + heads[none]

    def shared(length: int, batch: int) -> set[int]:
        made = [row for one in packs.packed(rows, length, 1, batch, seed=1) for row in one]
        assert sorted(row.ids.tobytes() for row in made) == sorted(row.ids.tobytes() for row in rows)
        return {row.shared for row in made}

    longest = max(len(row.ids) for row in rows)
    assert shared(4 * longest, 1) == shared(longest, 4) == {0, persona}
    assert shared(longest, 1) == {0}  # here most batches are one conversation


def test_what_a_plan_says_is_computed_is_what_batches_hold(tmp_path, tiny):
    config = make_run(tmp_path, tiny, batch=4, accumulate=1, epochs=2)
    made = plan.make(load(config))
    data = packs.dataset(str(config), made.length, made.step, made.batch)
    batches = [packs.collate(data[i : i + made.batch])["data"] for i in range(0, len(data), made.batch)]
    assert sum(batch["input_ids"].numel() for batch in batches) == made.computed < made.tokens
    assert sum(batch["tokens"] for batch in batches) == made.tokens


# The model


def sample_rows(count: int = 5) -> list[packs.Row]:
    """Conversations of 9 to 30 tokens; all but the first begin with one of two system prompts."""
    draw = np.random.default_rng(0)
    rows = []
    for i in range(count):
        ids = draw.integers(0, 90, draw.integers(9, 30)).astype(np.int32)
        head = (0, 4, 4, 3, 3)[i % 5]
        ids[:head] = head
        labels = np.where(np.arange(len(ids)) < max(5, len(ids) // 2), -100, ids).astype(np.int32)
        rows.append(packs.Row(ids, labels, shared=head))
    return rows


def small(architecture: str, **options):
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=90)
    config = transformers.AutoConfig.for_model(architecture, num_key_value_heads=2, pad_token_id=0, **sizes, **options)
    return transformers.AutoModelForCausalLM.from_config(config)


def finetune(llm, checkpointing: bool = False, **options):
    llm.config._attn_implementation, llm.config.longest_conversation = "packed", 30
    return model.Finetune(llm=dict(type=lambda: llm), use_activation_checkpointing=checkpointing, **options).train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", model.ARCHITECTURES)
def test_a_pack_has_the_loss_and_gradients_of_its_conversations_one_by_one(architecture, checkpointing, monkeypatch):
    monkeypatch.setattr(model, "LOSS_TOKENS", 7)
    rows = sample_rows()
    plain = small(architecture)
    alone = sum(
        plain(input_ids=torch.tensor(row.ids[None]).long(), labels=torch.tensor(row.labels[None]).long()).loss
        * row.answers
        for row in rows
    )
    alone.backward()
    packed = finetune(small(architecture), checkpointing)
    got = packed.compute_loss(packs.collate([rows[:2], rows[2:]])["data"])
    got["loss"].backward()
    assert got["answers"] == sum(row.answers for row in rows)
    assert got["sum"].item() == pytest.approx(alone.item(), rel=1e-5)
    for (name, mine), (_, theirs) in zip(packed.llm.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("parts", [1000, 7])
def test_replay_is_held_to_the_bases_own_predictions_and_answers_are_learned(monkeypatch, parts):
    from peft import LoraConfig

    monkeypatch.setattr(model, "LOSS_TOKENS", parts)
    learned, kept = sample_rows()[:2], [dataclasses.replace(row, replay=True) for row in sample_rows()[2:]]
    lora = dict(type=LoraConfig, r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = finetune(small("llama"), lora=lora, anchor=0.5)

    def loss(rows):
        return tuned.compute_loss(packs.collate([rows])["data"])["sum"].item()

    assert loss(kept) == pytest.approx(0, abs=1e-4)  # an adapter begins as nothing
    assert loss([*kept, *learned]) == pytest.approx(loss(learned), rel=1e-5)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    moved = 0.0
    for row in kept:
        ids = torch.tensor(row.ids[None]).long()
        alone = packs.collate([[dataclasses.replace(row, shared=0)]])["data"]["sequences"]
        now = tuned.causal_lm(input_ids=ids, attention_mask=alone, use_cache=False).logits.log_softmax(-1)
        base = small("llama")(input_ids=ids).logits.log_softmax(-1)
        moved += 0.5 * (now.exp() * (now - base)).sum().item()
    assert moved > 0.1
    assert loss([*kept, *learned]) == pytest.approx(loss(learned) + moved, rel=1e-4)
    assert all(parameter.requires_grad for name, parameter in tuned.named_parameters() if "lora_" in name)


def test_an_architecture_that_is_not_known_to_be_right_is_refused(tmp_path):
    small("granite").save_pretrained(tmp_path)
    with pytest.raises(NamesakeError, match="granite"):
        model.base_model(str(tmp_path), "float32", 64)


def test_an_attention_window_shorter_than_a_conversation_is_refused(tmp_path):
    small("mistral", sliding_window=16).save_pretrained(tmp_path)
    with pytest.raises(NamesakeError, match="max_length to 16"):
        model.base_model(str(tmp_path), "float32", 64)


def test_bfloat16_computes_nearly_the_same_without_widening_the_base():
    from peft import LoraConfig

    def loss(precision: str, autocast: str) -> torch.Tensor:
        lora = dict(type=LoraConfig, r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        tuned = finetune(small("llama").to(getattr(torch, precision)), lora=lora, autocast=autocast)
        kinds = {parameter.dtype for parameter in tuned.parameters() if not parameter.requires_grad}
        assert kinds == {getattr(torch, precision)}
        assert {parameter.dtype for parameter in tuned.parameters() if parameter.requires_grad} == {torch.float32}
        rows = [dataclasses.replace(row, replay=i > 2) for i, row in enumerate(sample_rows())]
        got = tuned.compute_loss(packs.collate([rows])["data"])["loss"]
        assert got.dtype == torch.float32
        got.backward()
        return got.item()

    assert loss("bfloat16", "bfloat16") == pytest.approx(loss("float32", ""), rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_have_the_loss_and_gradients_of_plain_ones_and_are_compiled_once(checkpointing, monkeypatch):
    from peft import LoraConfig
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # no C compiler runs
    rows = [dataclasses.replace(row, replay=i == 2) for i, row in enumerate(sample_rows())]
    lora = dict(type=LoraConfig, r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    plain = finetune(small("llama"), checkpointing, lora=lora)
    torch.manual_seed(0)
    compiled = finetune(small("llama"), checkpointing, lora=lora, compiled=True)
    parts, graphs = [rows[:2], rows[2:], rows, rows[:1]], []
    monkeypatch.setattr(packs, "dataset", lambda *_: [[*part] for part in parts])
    shape = packs.shape("", 30, 1, 1)
    for part in parts:
        whole = [dataclasses.replace(row, shared=0) for row in part]
        expected, got = (
            plain.compute_loss(packs.collate([whole])["data"]),
            compiled.compute_loss(packs.collate([part], shape)["data"]),
        )
        assert got["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)
        assert got["tokens"] == expected["tokens"] == sum(len(row.ids) for row in part)
        assert got["answers"] == expected["answers"]
        expected["loss"].backward()
        got["loss"].backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1
    for mine, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        if theirs.requires_grad:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)


# The plan

SEVEN = plan.Shape(4096, 14336, 1024, 32, 92544, linear=6_979_321_856, other=758_390_784, adapted=2_490_368)


@pytest.mark.parametrize(
    ("free", "method", "checkpointing"),
    [(78, "lora", False), (24, "lora", True), (17, "qlora", False), (10, "qlora", True)],
)
def test_auto_takes_what_fits_into_free_memory(tmp_path, tiny, monkeypatch, free, method, checkpointing):
    settings = load(make_run(tmp_path, tiny, batch=1, max_length=1024, rows=200))
    monkeypatch.setattr(plan, "read_shape", lambda *_: SEVEN)
    monkeypatch.setattr(plan, "_device", lambda reasons: ("cuda", "bfloat16", free * plan.GIB))
    made = plan.make(settings)
    assert (made.method, made.checkpointing) == (method, checkpointing)
    assert made.needs <= 0.9 * free * plan.GIB
    assert any(method in reason for reason in made.reasons)


@pytest.mark.parametrize(
    ("wish", "device", "epochs", "compiler", "compiled"),
    [
        ("auto", "cuda", 1000, "/usr/bin/gcc", True),
        ("auto", "cuda", 1000, None, False),
        ("auto", "cuda", 3, "/usr/bin/gcc", False),
        ("auto", "cpu", 1000, "/usr/bin/gcc", False),
        ("on", "cuda", 3, None, True),
        ("off", "cuda", 1000, "/usr/bin/gcc", False),
    ],
)
def test_layers_are_compiled_where_the_run_is_long_enough(
    tmp_path, tiny, monkeypatch, wish, device, epochs, compiler, compiled
):
    settings = load(make_run(tmp_path, tiny, rows=200, compile=wish, epochs=epochs))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: compiler)
    monkeypatch.setattr(plan, "read_shape", lambda *_: SEVEN)
    monkeypatch.setattr(plan, "_device", lambda reasons: (device, "bfloat16", 78 * plan.GIB))
    assert plan.make(settings).compiled is compiled


def test_auto_says_how_much_is_missing_when_nothing_fits(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(plan, "read_shape", lambda *_: SEVEN)
    monkeypatch.setattr(plan, "_device", lambda reasons: ("cuda", "bfloat16", 4 * plan.GIB))
    with pytest.raises(NamesakeError, match=r"needs about \d\.\d GiB"):
        plan.make(load(make_run(tmp_path, tiny, batch=0)))


def test_auto_makes_a_hundred_steps_of_little_data_and_fills_steps_of_much(tmp_path, tiny):
    (tmp_path / "little").mkdir()
    (tmp_path / "much").mkdir()
    little = plan.make(load(make_run(tmp_path / "little", tiny, rows=60, batch=0, accumulate=0, epochs=1)))
    much = plan.make(load(make_run(tmp_path / "much", tiny, rows=900, batch=0, accumulate=0, epochs=4)))
    assert little.step == 1
    assert little.steps > plan.STEPS / 2  # shorter packs, down to the longest conversation
    assert much.step == plan.STEP_PACKS
    assert much.steps >= plan.STEPS


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows": 0}, "zero steps"),
        ({"rows": 3}, "zero steps"),
        ({"rows": 8, "epochs": 0.1}, "warm-up"),
        ({"method": "qlora"}, "no CUDA GPU"),
        ({"targets": ["q_prog"]}, "q_prog"),
    ],
)
def test_a_run_that_cannot_come_to_anything_is_refused_before_it_starts(tmp_path, tiny, options, says):
    with pytest.raises(NamesakeError, match=says):
        run(make_run(tmp_path, tiny, **options))


def test_training_without_data_says_which_step_to_run(tmp_path, tiny):
    config = make_run(tmp_path, tiny)
    (tmp_path / "work" / "assistant" / "data" / "train.jsonl").unlink()
    with pytest.raises(NamesakeError, match="python -m training data"):
        run(config)


# A run


def test_a_run_learns_warms_up_to_the_full_rate_and_leaves_what_the_next_step_reads(tmp_path, tiny, capsys):
    config = make_run(tmp_path, tiny, warmup=0.0, ask_steps=3)
    lines = run(config)
    rates = [line["rate"] for line in lines]
    assert rates[0] == pytest.approx(0.5e-3)  # one real step of warm-up, even where none is asked for
    assert rates[1] == pytest.approx(1e-3)
    assert rates == [rates[0], *sorted(rates[1:], reverse=True)]
    assert lines[-1]["loss"] < lines[0]["loss"]

    folder = tmp_path / "work" / "assistant" / "checkpoints"
    weights = checkpoint(config)["state_dict"]
    assert len(weights) == 2 * 7 * 2  # layers × linear layers × A and B
    assert all(name.startswith("llm.base_model.model.model.layers.") and ".lora_" in name for name in weights)
    assert json.loads((folder / "run.json").read_text())["checkpoint"] == last_checkpoint(folder).name
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    asked = [json.loads(line)["question"] for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert set(asked) == set(hooks.questions(load(config)))
    said = capsys.readouterr()
    assert said.out.endswith("Next 下一步: python -m training convert\n")
    assert "method lora" in said.err


def test_the_same_seed_gives_the_same_losses_and_another_does_not(tmp_path, tiny):
    got = []
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        got.append(run(make_run(tmp_path / name, tiny, seed=seed, dropout=0.1)))
    assert got[0] == got[1] != got[2]


def test_samples_are_asked_with_the_personas_prompt_and_leave_the_losses_alone(tmp_path, tiny, monkeypatch):
    from space.engine import Engine

    asked = []
    answer = Engine.answer
    monkeypatch.setattr(Engine, "answer", lambda self, talks, *rest: asked.extend(talks) or answer(self, talks, *rest))
    quiet, asking = tmp_path / "quiet", tmp_path / "asking"
    for folder in (quiet, asking):
        folder.mkdir()
    without = run(make_run(quiet, tiny, dropout=0.1))
    config = make_run(asking, tiny, dropout=0.1, ask_steps=1)
    assert run(config) == without
    assert {talk[0]["content"] for talk in asked} == {load(config).assistant.system_prompt}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_continues_with_the_losses_of_an_unbroken_one(tmp_path, tiny, stop_at, monkeypatch, number):
    (tmp_path / "unbroken").mkdir()
    (tmp_path / "stopped").mkdir()
    unbroken = run(make_run(tmp_path / "unbroken", tiny, dropout=0.1))
    config = make_run(tmp_path / "stopped", tiny, dropout=0.1)
    handler = signal.getsignal(number)
    stop_at(3, number)
    with pytest.raises(NamesakeError, match=f"Stopped at step 3 of {len(unbroken)}.*--resume"):
        run(config)
    assert signal.getsignal(number) is handler
    assert len(losses(config)) == 3
    monkeypatch.undo()

    with pytest.raises(NamesakeError, match="stopped run"):
        run(config)
    assert run(config, resume=True) == unbroken


def test_a_finished_run_is_left_alone_until_something_changes(tmp_path, tiny, capsys):
    config = make_run(tmp_path, tiny, epochs=1)
    run(config)
    made = last_checkpoint(tmp_path / "work" / "assistant" / "checkpoints").stat().st_mtime_ns
    run(config)
    assert "nothing has changed" in capsys.readouterr().out
    assert last_checkpoint(tmp_path / "work" / "assistant" / "checkpoints").stat().st_mtime_ns == made
    config.write_text(config.read_text().replace("rank = 4", "rank = 2"))
    run(config)
    assert checkpoint(config)["state_dict"].popitem()[1].shape[1] == 2


def test_nothing_is_resumed_where_there_is_nothing_or_something_else(tmp_path, tiny, stop_at):
    config = make_run(tmp_path, tiny)
    with pytest.raises(NamesakeError, match="no checkpoint"):
        run(config, resume=True)
    stop_at(2, signal.SIGTERM)
    with pytest.raises(NamesakeError, match="Stopped"):
        run(config)
    config.write_text(config.read_text().replace("rank = 4", "rank = 2"))
    with pytest.raises(NamesakeError, match="changed"):
        run(config, resume=True)


def test_method_full_trains_and_saves_every_weight(tmp_path, tiny):
    config = make_run(tmp_path, tiny, method="full", rate=1e-4)
    run(config)
    names = set(checkpoint(config)["state_dict"])
    assert "llm.model.embed_tokens.weight" in names
    assert not any("lora" in name for name in names)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path, tiny, monkeypatch):
    compute = model.Finetune.compute_loss

    def broken(self, data, data_samples=None):
        got = compute(self, data)
        return got | {"sum": got["sum"] * float("nan")}

    monkeypatch.setattr(model.Finetune, "compute_loss", broken)
    config = make_run(tmp_path, tiny, save_steps=1)
    with pytest.raises(NamesakeError, match="loss is nan at step 1"):
        run(config)
    assert last_checkpoint(tmp_path / "work" / "assistant" / "checkpoints") is None


def test_a_rate_that_never_rises_stops_the_run(tmp_path, tiny, monkeypatch):
    from mmengine.optim import LinearLR

    # XTuner's own trap: a warm-up that ends before it has begun leaves the rate where it starts.
    monkeypatch.setattr(
        LinearLR, "_get_value", lambda self: [group["lr"] * 1e-5 for group in self.optimizer.param_groups]
    )
    with pytest.raises(NamesakeError, match="rate never rises"):
        run(make_run(tmp_path, tiny))


def test_out_of_memory_says_what_to_change_and_auto_batch_changes_it(tmp_path, tiny, monkeypatch):
    compute = model.Finetune.compute_loss

    def little_memory(self, data, data_samples=None):
        if data["input_ids"].shape[1] > 110:
            raise torch.OutOfMemoryError("not enough")
        return compute(self, data)

    (tmp_path / "roomy").mkdir()
    (tmp_path / "small").mkdir()
    roomy = run(make_run(tmp_path / "roomy", tiny))
    monkeypatch.setattr(model.Finetune, "compute_loss", little_memory)
    config = make_run(tmp_path / "small", tiny)
    with pytest.raises(NamesakeError, match=r"Out of memory.*--auto-batch.*batch below 2.*checkpointing"):
        run(config)
    run(config, auto_batch=True)
    assert losses(config) == pytest.approx([line["loss"] for line in roomy], rel=1e-4)  # the very same steps


def test_a_plan_gets_smaller_until_nothing_is_left_to_give():
    made = plan.Plan("lora", "cpu", "float32", False, False, 4, 2, 1, 64, 8, 3, 1, 1, 1, 1, 1, 0, 0, 0)
    tried = []
    while made:
        tried.append((made.batch, made.accumulate, made.checkpointing))
        made = made.smaller()
    assert tried == [(4, 2, False), (2, 4, False), (1, 8, False), (1, 8, True)]


# Several processes, and XTuner's own command


def test_dry_run_prints_the_command_of_every_node_and_starts_nothing(tmp_path, tiny, capsys):
    config = make_run(tmp_path, tiny)
    options = dict(gpus=8, nodes=2, master="10.0.0.1:29500", deepspeed="zero3", dry_run=True)
    train(load(config), config, **options)
    said = capsys.readouterr().out
    for rank in (0, 1):
        assert f"--nnodes 2 --node-rank {rank} --nproc-per-node 8 --master-addr 10.0.0.1 --master-port 29500" in said
    assert said.count("--deepspeed deepspeed_zero3 --launcher pytorch") == 2
    assert not (tmp_path / "work" / "assistant" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nodes": 2}, "--master HOST:PORT"),
        ({"nodes": 2, "master": "host"}, "--master HOST:PORT"),
        ({"nodes": 2, "master": "host:1", "node_rank": 2}, "from 0 to 1"),
        ({"node_rank": -1}, "from 0 to 0"),
        ({"gpus": 0}, "at least 1"),
        ({"deepspeed": "zero9"}, "zero2"),
        ({"deepspeed": "zero2"}, "not installed"),
        ({"gpus": 2, "auto_batch": True}, "one GPU"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, tiny, options, says):
    config = make_run(tmp_path, tiny)
    with pytest.raises(NamesakeError, match=says):
        train(load(config), config, **options)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_with_the_same_global_batch(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = run(make_run(tmp_path / "one", tiny, batch=2, accumulate=2))
    two = run(make_run(tmp_path / "two", tiny, batch=1, accumulate=2), gpus=2)
    assert [line["tokens"] for line in two] == [line["tokens"] for line in one]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)


@pytest.mark.slow
def test_the_configuration_runs_with_xtuners_own_command(tmp_path, tiny):
    config = make_run(tmp_path, tiny, epochs=1)
    paths = os.pathsep.join((str(HERE.parent), str(HERE / "stand_ins")))
    environment = os.environ | {"NAMESAKE_CONFIG": str(config), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "xtuner.tools.train", str(HERE / "xtuner_config.py"), "--work-dir"]
    subprocess.run([*command, str(tmp_path / "out")], env=environment, cwd=tmp_path, check=True, timeout=120)
    weights = torch.load(last_checkpoint(tmp_path / "out"), weights_only=True)["state_dict"]
    assert len(weights) == 28
