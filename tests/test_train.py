"""Training: the gradient goes through the write and nowhere else, and what a run leaves can be used, resumed and repeated."""
import contextlib
import functools
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from conftest import FAMILIES, hear_ctrl_c, strengthen, tiny, token_rows

import arms
import fast_weight
import in_place_ttt
import model_utils
import objectives
import run_experiment
import train_minimal
import training_bank
from in_place_ttt import InPlaceTTT, TTTConfig
from manifests import read_manifest, run_script
from model_utils import load_adapter, load_lora, load_model
from objectives import lm_step, recall_step
from training_data import Batch, Example

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
LOG_FIELDS = {"update", "loss", "token_accuracy", "grad_norm", "update_norm", "tokens_per_s", "lr", "seconds"}
AID_FIELDS = {"answers", "address", "worth", "found", "gate_recall", "gate_precision"}  # of an arm with codes


def conversations(count=4):
    """Examples in which each of two questions has another answer in every conversation, where it stands behind the question."""
    questions, head = token_rows((5, 5), seed=8), token_rows((6,), seed=9)[0]
    answers = [token_rows((2, 2), seed=100 + i) for i in range(count)]
    noise = token_rows([4 + i for i in range(count)], seed=20)
    return Batch([Example([t for q, a in zip(questions, mine) for t in q + a] + noise[i], head, list(zip(questions, mine)))
                  for i, mine in enumerate(answers)])


@pytest.fixture
def attached():
    """attached(loaded, config) -> InPlaceTTT as training starts it; detached after the test."""
    made = []

    def make(loaded, **config):
        ttt = InPlaceTTT(loaded.model, TTTConfig(**config))
        made.append(ttt)
        return ttt.double() if next(loaded.model.parameters()).dtype == torch.float64 else ttt

    yield make
    for ttt in made:
        ttt.detach()


# ---- the objectives ----

CODES = dict(rule="ridge", ridge=0.02, codes=True, write_attention=2, read_attention=2, unit_targets=True, target="both", blind=True, read_gate=True)
DEEP = CODES | dict(deep=True, threshold=True, value_rank=4)
RIDGE = dict(rule="ridge", key_map=16, unit_targets=True, eta=5.0)


@pytest.mark.parametrize("name,options", [*((name, dict(unit_keys=True)) for name in FAMILIES), ("tiny-gemma3", RIDGE), ("tiny-llama", CODES), ("tiny-gemma3", CODES), ("tiny-qwen2", DEEP)])
def test_recall_learns_to_answer_from_its_own_conversation(name, options, attached):
    """A batch is overfitted; with the memory of another conversation the same adapter must answer worse, or it learned by heart."""
    loaded, batch = tiny(name, torch.float32), conversations()
    ttt = attached(loaded, layers=(0, 1, 2, 3), chunk=None, init="shift", gate=True, **options)
    for fast in ttt.fast.values():
        fast.value_unit.fill_(5.0 if options.get("codes") else fast.value_unit)  # W_down's entries are tiny here, as are all logits
    optimizer = torch.optim.AdamW(ttt.parameters(), lr=1e-2 if options.get("codes") else 3e-2, weight_decay=0.0)
    losses, unaided = [], dict.fromkeys(objectives.AIDS, 0.0)  # these examples do not say where their answers stand
    for _ in range(90 if options.get("codes") else 60):
        step = recall_step(loaded, ttt, batch, CPU, unaided)
        step.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step.loss.item())
    examples = batch.examples
    swapped = Batch([replace(example, written=examples[(i + 1) % len(examples)].written) for i, example in enumerate(examples)])
    with torch.no_grad():
        other = recall_step(loaded, ttt, swapped, CPU, unaided)
    assert step.labels == 16 and losses[-1] < losses[0] - 0.25 and losses[-1] < other.loss.item() - 0.25
    assert step.right.item() >= 8 > other.right.item() + 3


def directional(loss, parameters, size=3e-3):
    """(the gradient's squared norm, the same by central differences along the gradient)."""
    gradient = torch.autograd.grad(loss(), parameters)
    square = sum((g * g).sum() for g in gradient).item()

    def moved(sign):
        with torch.no_grad():
            for p, g in zip(parameters, gradient):
                p += sign * size * g / math.sqrt(square)
            value = loss().item()
            for p, g in zip(parameters, gradient):
                p -= sign * size * g / math.sqrt(square)
        return value

    return square, (moved(1) - moved(-1)) / (2 * size) * math.sqrt(square)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("parameter", ["conv", "proj", "gate"])
def test_the_gradient_is_the_slope_of_the_loss_through_the_write(name, parameter, attached):
    loaded = tiny(name)
    ttt = strengthen(attached(loaded, layers=(1, 2), chunk=None, unit_keys=True, gate=True))
    parameters = [p for n, p in ttt.named_parameters() if n.endswith(parameter)]
    square, slope = directional(lambda: recall_step(loaded, ttt, conversations(), CPU).loss, parameters)
    assert len(parameters) == 2 and square > 1e-12 and slope == pytest.approx(square, rel=0.02)


def test_the_next_token_objective_has_the_slope_of_its_loss(attached):
    loaded, rows = tiny("tiny-llama"), token_rows((20, 13))
    ttt = strengthen(attached(loaded, layers=(1, 2), chunk=4))
    square, slope = directional(lambda: lm_step(loaded, ttt, rows, CPU).loss, list(ttt.parameters()))
    assert square > 1e-12 and slope == pytest.approx(square, rel=0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_what_was_written_conv_and_projection_get_no_gradient(name, attached, monkeypatch):
    loaded = tiny(name)
    ttt = strengthen(attached(loaded, layers=(1, 2), chunk=None))
    recall_step(loaded, ttt, conversations(), CPU).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in ttt.parameters())
    ttt.zero_grad()
    memory = in_place_ttt.Writer.memory
    monkeypatch.setattr(in_place_ttt.Writer, "memory", lambda self, group: memory(self, group).scale(0.0))
    recall_step(loaded, ttt, conversations(), CPU).loss.backward()
    assert all(not p.grad.any() for p in ttt.parameters())


def test_without_gradients_the_memory_of_an_lm_step_is_not_made_again(attached, monkeypatch):
    """It is what finished chunks were read from, of all tokens: the memory of a plain write."""
    loaded, rows = tiny("tiny-llama"), token_rows((37, 20))
    ttt = strengthen(attached(loaded, layers=(1, 2), chunk=8, gate=True))
    made, projected = [], fast_weight.FastWeight.projected
    monkeypatch.setattr(fast_weight.FastWeight, "projected", lambda self, *how: made.append(1) or projected(self, *how))
    memory = lm_step(loaded, ttt, rows, CPU).memory
    assert len(made) == 2
    ids, mask = objectives.pad_right(rows, loaded.tokenizer.pad_token_id, CPU)
    with torch.no_grad(), ttt.write() as writer:
        writer.expect(mask)
        loaded.model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
    plain = writer.memory()
    assert memory.tokens.equal(plain.tokens) and memory.chunks.equal(plain.chunks)
    for index, layer in memory.layers.items():
        torch.testing.assert_close(layer.to_dense().update, plain.layers[index].to_dense().update, atol=1e-12, rtol=1e-9)
        assert not layer.values.requires_grad and layer.norm().min() > 0


def test_the_next_token_objective_on_one_chunk_has_nothing_to_learn_from(attached):
    """Why --chunk whole is refused for it: no chunk is read back in the pass that writes it."""
    loaded = tiny("tiny-llama")
    ttt = strengthen(attached(loaded, layers=(1, 2), chunk=None))
    loss = lm_step(loaded, ttt, token_rows((20, 13)), CPU).loss
    assert not loss.requires_grad or all(g is None or not g.any() for g in torch.autograd.grad(loss, list(ttt.parameters()), allow_unused=True))


# ---- the aids ----

def asking(loaded, ttt, batch, group=1):
    """(writer, memory, mask) of a batch, as recall_step has them."""
    ids, mask = objectives.pad_right([e.written for e in batch.examples], 258, CPU)
    with torch.no_grad(), ttt.write(differentiable=True) as writer:
        writer.expect(mask)
        loaded.model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
    return writer, writer.memory(group), mask


def test_an_address_is_found_when_the_query_is_its_key(attached):
    """Queries that are the wanted slots' own keys find all of them; queries that are the keys of others find none."""
    loaded, batch = tiny("tiny-llama"), conversations()
    ttt = strengthen(attached(loaded, layers=(1, 2), chunk=None, codes=True, blind=True))
    _, memory, mask = asking(loaded, ttt, batch)
    keys = torch.stack([layer.keys for layer in memory.layers.values()])
    rows, slots = torch.tensor([0, 1, 1, 3]), torch.tensor([5, 5, 6, 6])  # slots 0 to 4 are alike in all rows
    asks = torch.zeros(4, 3, dtype=torch.bool)
    asks[[0, 1, 1, 3], [0, 0, 1, 2]] = True
    losses = []
    for shift, share in ((0, 1.0), (1, 0.0)):
        queries = {i: layer.keys[rows, slots + shift] for i, layer in memory.layers.items()}
        measures = {}
        losses.append(objectives.address_loss(keys, queries, slots, asks, mask, ttt.fast["1"].sizes, measures).item())
        assert measures["found"].tolist() == [share, share]
    assert losses[0] < 1.0 < 3.0 < losses[1]


def test_an_update_without_an_address_has_a_loss_and_no_share_found(attached):
    """As when no value of a small batch stands in its text word for word: nothing to find, nothing that is not a number."""
    loaded, batch = tiny("tiny-llama"), conversations()
    ttt = strengthen(attached(loaded, layers=(1, 2), chunk=None, codes=True, blind=True))
    step = recall_step(loaded, ttt, batch, CPU)
    assert step.loss.isfinite() and step.measures["address"] == 0 and "found" not in step.measures and "worth" not in step.measures


def with_others(batch, group):
    """The batch in memories of `group` rows, with two foreign rows (the second with its text in the prompt) and one row of prose."""
    silent, shown = conversations(2).examples
    prose = token_rows((9,), seed=3)[0]
    return Batch(batch.examples, group, calm=[Example([], [], [(prose[:1], prose[1:])])],
                 foreign=[silent, replace(shown, prefix=shown.prefix + shown.written)])


@pytest.mark.parametrize("group", (1, 2))
@pytest.mark.parametrize("name", ("tiny-qwen3", "tiny-gemma3"))
def test_foreign_rows_and_prose_are_judged_as_if_each_was_read_alone(name, group, attached):
    """The oracle reads row i with memory i, one question a forward, with the memory and without; the loss pulls on what reads."""
    loaded = tiny(name)
    ttt, batch = strengthen(attached(loaded, layers=(1, 2), chunk=None, **DEEP)), with_others(conversations(), group)
    step = recall_step(loaded, ttt, batch, CPU)
    step.loss.backward()
    assert ttt.fast["1"].query_code.grad.norm() > 0
    ttt.zero_grad(set_to_none=True)

    def log_probabilities(prefix, question, answer, row=None):
        ids = torch.tensor([prefix + question + answer])
        asked = torch.arange(ids.shape[1]) >= len(prefix)
        if row is None:
            logits = loaded.model(input_ids=ids, use_cache=False).logits
        else:
            with ttt.read(row) as reader:
                order = torch.arange(ids.shape[1])  # the tokens of a question look at each other, not at the prefix
                reader.expect(torch.ones_like(ids), order[None], ((asked[:, None] == asked) & (order <= order[:, None]))[None])
                logits = loaded.model(input_ids=ids, use_cache=False).logits
        return logits[0, -len(answer) - 1:-1].float().log_softmax(-1)

    with torch.no_grad():
        memory = asking(loaded, ttt, batch, group)[1]
        for kind in ("foreign", "calm"):
            expected = []
            for i, example in enumerate(getattr(batch, kind)):
                for question, answer in example.pairs:
                    row = example.prefix, question, answer
                    without, attached_ = log_probabilities(*row), log_probabilities(*row, memory.select([i]))
                    expected += (without.exp() * (without - attached_)).sum(-1).tolist()
            assert step.measures[kind].item() == pytest.approx(sum(expected) / len(expected), rel=1e-3) and sum(expected) > 1e-4


def test_nothing_changes_under_an_empty_memory_and_what_is_written_is_judged_alike(attached, monkeypatch):
    loaded, batch = tiny("tiny-llama"), conversations()
    ttt = strengthen(attached(loaded, layers=(1, 2), chunk=None, **DEEP))
    alone, beside = recall_step(loaded, ttt, batch, CPU), recall_step(loaded, ttt, with_others(batch, 1), CPU)
    torch.testing.assert_close(beside.measures["answers"], alone.measures["answers"])
    torch.testing.assert_close(beside.measures["address"], alone.measures["address"])
    assert (beside.labels, beside.right) == (alone.labels, alone.right)
    memory = in_place_ttt.Writer.memory
    monkeypatch.setattr(in_place_ttt.Writer, "memory", lambda self, group: memory(self, group).scale(0.0))
    empty = recall_step(loaded, ttt, with_others(batch, 1), CPU)
    assert empty.measures["calm"].item() == pytest.approx(0, abs=1e-6) and empty.measures["foreign"].item() == pytest.approx(0, abs=1e-6)
    assert beside.measures["calm"] > 1e-4 and beside.measures["foreign"] > 1e-4


def test_the_worth_of_a_token_is_what_its_gate_says():
    logits, mask = torch.tensor([[9.0, -9.0, -9.0, 9.0]]), torch.tensor([[1, 1, 1, 0]])  # a pad does not count
    right, wrong, measures = torch.tensor([[1, 0, 0, 0]]), torch.tensor([[0, 1, 1, 0]]), {}
    assert objectives.worth_loss(logits[None], right, mask, measures).item() < 0.01
    assert measures["gate_recall"].tolist() == measures["gate_precision"].tolist() == [1.0]
    assert objectives.worth_loss(logits[None], wrong, mask, measures).item() > 5


# ---- the command ----

@pytest.fixture(scope="module", autouse=True)
def a_short_bank():
    """Conversations of two or three facts and passages of a line: to the tiny models every byte is a token, and an update costs its square.

    Its hash stays that of the files. A process of its own, as Ctrl-C's, trains on the bank as it is.
    """
    passages = training_bank.load_passages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_bank, "FACT_COUNTS", (2, 3))
        patch.setattr(training_bank, "load_passages", lambda lang: [passage[:150] for passage in passages(lang)])
        yield


def command(out, *more, model="tiny-llama", objective="recall", updates=4):
    return ["train_minimal.py", "--model", model, "--objective", objective, "--arm", "a", "--out", str(out), "--updates", str(updates),
            "--conversations", "1", *(["--groups", "1"] if objective == "recall" else []), "--probes", "2", "--warmup", "1", "--workers", "0",
            "--device", "cpu", *map(str, more)]


@pytest.fixture
def call(run_main):
    """call(argv) -> (exit code, stdout, stderr) of train_minimal in this process."""
    return lambda argv: run_main(train_minimal.main, argv)


def log_rows(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_snapshot_is_the_arm_as_it_stood(tmp_path, call):
    """Under its own name, and without a trace in the arm itself; run.json says of both how much they had seen."""
    assert call(command(tmp_path / "kept", "--snapshots", "1,3"))[0] == 0
    assert call(command(tmp_path / "plain"))[0] == 0
    kept, plain = tmp_path / "kept", tmp_path / "plain"
    final = lambda folder: load_file(folder / "a" / "adapter.safetensors")
    assert all(torch.equal(t, final(plain)[name]) for name, t in final(kept).items())
    assert sorted(p.name for p in kept.iterdir()) == ["a", "a-at-1", "a-at-3"]
    for n in (1, 3):
        manifest = read_manifest(kept / f"a-at-{n}")
        assert (manifest["arm"], manifest["snapshot_of"], manifest["updates"], manifest["conversations_seen"]) == (f"a-at-{n}", "a", n, n)
    early, late = (load_file(kept / f"a-at-{n}" / "adapter.safetensors") for n in (1, 3))
    assert any(not torch.equal(t, late[name]) for name, t in early.items())


def test_snapshots_that_cannot_be_are_refused_before_anything_is_trained(tmp_path, call):
    for given in ("4", "0", "a", "1,,2"):
        code, _, err = call(command(tmp_path, "--snapshots", given))
        assert code == 2 and f"--snapshots {given}: give numbers of updates below --updates 4" in err
    (tmp_path / "a-at-2").mkdir()
    (tmp_path / "a-at-2" / "manifest.json").write_text("{}")
    code, _, err = call(command(tmp_path, "--snapshots", "2"))
    assert code == 2 and "a-at-2: already holds a snapshot" in err and not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trained_arm_has_a_log_a_manifest_and_an_adapter_that_loads(name, tmp_path, call):
    code, out, _ = call(command(tmp_path, model=name))
    rows, manifest = log_rows(tmp_path / "a"), read_manifest(tmp_path / "a")
    assert code == 0 and "the base is unchanged" in out and "run_experiment.py" in out
    assert [row["update"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert set(row) == LOG_FIELDS | AID_FIELDS | ({"calm"} if row["update"] % 8 == 1 else set()) | ({"foreign"} if row["update"] % 4 == 1 else set())
        assert all(math.isfinite(v) for value in row.values() for v in (value if isinstance(value, list) else [value]))
        assert row["loss"] > 0 and row["grad_norm"] > 0 and row["update_norm"] > 0 and row["tokens_per_s"] > 0 and 0 <= row["token_accuracy"] <= 1
    assert manifest["updates"] == 4 and manifest["objective"] == "recall" and manifest["frozen"] is True and manifest["model"] == name
    loaded = load_model(name)
    ttt, _ = load_adapter(tmp_path / "a", loaded)
    assert manifest["model_sha256"] == loaded.sha256 and manifest["ttt"] == loaded.row.codes.to_dict()
    fresh = InPlaceTTT(load_model(name).model, ttt.config, manifest["seed"])
    assert any((p - q).abs().max() > 1e-4 for p, q in zip(ttt.parameters(), fresh.parameters()))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter.safetensors", "manifest.json", "train.jsonl"]


def test_same_seed_same_adapter_and_other_seed_other(tmp_path, call):
    for folder, seed in (("x", 3), ("y", 3), ("z", 4)):
        assert call(command(tmp_path / folder, "--seed", seed, updates=2))[0] == 0
    first, again, other = ((tmp_path / f / "a/adapter.safetensors").read_bytes() for f in "xyz")
    assert first == again != other


def test_next_token_objective_by_command(tmp_path, call):
    (tmp_path / "texts.txt").write_text("some words about a boat that went out\n\nand others about a hill\n")
    code, _, _ = call(command(tmp_path, "--data", tmp_path / "texts.txt", "--chunk", 8, objective="lm"))
    manifest, rows = read_manifest(tmp_path / "a"), log_rows(tmp_path / "a")
    assert code == 0 and manifest["ttt"]["chunk"] == 8 and manifest["data"].endswith("texts.txt")
    assert all(row["grad_norm"] > 0 and row["loss"] > 0 for row in rows) and len(rows) == 4


def test_compiled_layers_train_the_same_arm_and_are_part_of_what_a_run_is(tmp_path, call, monkeypatch):
    """Traced and parted into forward and backward as for a real compiler, whose own threads the tests that fork would not survive."""
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    (tmp_path / "texts.txt").write_text("some words about a boat that went out and came back\n\nand others about a hill behind the town\n")
    how = command(tmp_path, "--data", tmp_path / "texts.txt", "--chunk", 8, "--dtype", "float32", objective="lm", updates=2)
    assert call(how)[0] == 0
    compiled = ["b" if part == "a" else part for part in how]
    assert call([*compiled, "--compile"])[0] == 0
    one, other = (log_rows(tmp_path / name) if name == "a" else [json.loads(line) for line in (tmp_path / "b/train.jsonl").read_text().splitlines()] for name in "ab")
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in other], rel=1e-4) and len(one) == 2
    assert [read_manifest(tmp_path / name)["optimizer"]["compile"] for name in "ab"] == [False, True] and backend.frame_count
    trained = [load_file(tmp_path / name / "adapter.safetensors") for name in "ab"]
    for key, value in trained[0].items():
        torch.testing.assert_close(value.float(), trained[1][key].float(), atol=2e-3, rtol=2e-3)


def test_next_token_objective_on_one_chunk_is_refused(tmp_path, call):
    code, _, err = call(command(tmp_path, "--chunk", "whole", objective="lm"))
    assert code == 2 and len(err.splitlines()) == 1 and "--chunk whole" in err and not any(tmp_path.iterdir())


def test_context_trains_a_lora_and_only_that(tmp_path, call, monkeypatch):
    seen = []
    step = objectives.context_step

    def watched(loaded, ttt, *batch, **part):
        seen.append((ttt, {n for n, p in loaded.model.named_parameters() if p.requires_grad}))
        return step(loaded, ttt, *batch, **part)

    monkeypatch.setitem(train_minimal.OBJECTIVES, "context", watched)
    code, out, _ = call(command(tmp_path, objective="context", updates=2))
    manifest, loaded = read_manifest(tmp_path / "a"), load_model("tiny-llama")
    assert code == 0 and "--tuned-adapter" in out and manifest["ttt"] is None and manifest["frozen"] is False
    assert all(ttt is None and names and all("lora_" in n for n in names) for ttt, names in seen) and len(seen) == 2
    assert all(row["update_norm"] is None and row["grad_norm"] > 0 for row in log_rows(tmp_path / "a"))
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    load_lora(tmp_path / "a", loaded)
    after = {name.replace(".base_layer", ""): p for name, p in loaded.model.named_parameters()}
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert any(p.any() for name, p in after.items() if "lora_B" in name)


@pytest.mark.parametrize("objective, touched", [("recall", "embed_tokens.weight"), ("recall", "layers.1.mlp"), ("recall", "layers.3.mlp.down_proj"),
                                                ("context", "layers.1.mlp")])
def test_a_changed_base_is_noticed(objective, touched, tmp_path, call, monkeypatch):
    step = objectives.OBJECTIVES[objective]

    def disturb(loaded, ttt, batch, device, **options):
        name, parameter = next((n, p) for n, p in loaded.model.named_parameters() if touched in n and "lora_" not in n)
        parameter.data.view(-1)[0] += 1e-3
        return step(loaded, ttt, batch, device, **options)

    monkeypatch.setitem(train_minimal.OBJECTIVES, objective, disturb)
    with pytest.raises(RuntimeError, match="the base changed"):
        call(command(tmp_path, objective=objective, updates=1))
    assert not (tmp_path / "a" / "manifest.json").exists()  # a checkpoint that must not be used cannot be


# ---- divergence ----

def spoil(monkeypatch, change, after=5):
    """From update `after` + 1 on, the recall objective's loss is change(loss, calls so far)."""
    step, calls = objectives.recall_step, []

    def spoiled(*arguments, **options):
        calls.append(1)
        result = step(*arguments, **options)
        return replace(result, loss=change(result.loss, len(calls))) if len(calls) > after else result

    monkeypatch.setitem(train_minimal.OBJECTIVES, "recall", spoiled)


def nan_gradient(loss, calls):
    return loss * 1.0 + (loss - loss.detach()).abs().sqrt()  # 0 in value, infinite in slope


@pytest.mark.parametrize("change, named", [(lambda loss, n: loss * float("nan"), "loss is nan"), (lambda loss, n: loss * float("inf"), "loss is inf"),
                                           (nan_gradient, "gradient norm is")], ids=["nan", "inf", "gradient"])
def test_divergence_stops_and_keeps_the_last_good_checkpoint(change, named, tmp_path, call, monkeypatch):
    spoil(monkeypatch, change)
    code, _, err = call(command(tmp_path, "--save-every", 2, updates=9))
    message = err.splitlines()[-1]
    assert code == 2 and named in message and "last good checkpoint is kept" in message and str(tmp_path / "a") in message and "--lr" in message
    assert "Traceback" not in err and len(log_rows(tmp_path / "a")) == 5
    ttt, manifest = load_adapter(tmp_path / "a", load_model("tiny-llama"))
    assert manifest["updates"] == 4 and all(p.isfinite().all() for p in ttt.parameters())


def test_a_climbing_loss_stops_the_run(tmp_path, call, monkeypatch):
    monkeypatch.setattr(train_minimal, "WINDOW", 3)
    spoil(monkeypatch, lambda loss, calls: loss * 3)
    code, _, err = call(command(tmp_path, "--save-every", 2, updates=30))
    message = err.splitlines()[-1]
    assert code == 2 and "loss climbed from" in message and "is kept" in message
    assert len(log_rows(tmp_path / "a")) < 12 and load_adapter(tmp_path / "a", load_model("tiny-llama"))


def test_divergence_before_the_first_checkpoint_says_so(tmp_path, call, monkeypatch):
    spoil(monkeypatch, lambda loss, calls: loss * float("nan"), after=1)
    code, _, err = call(command(tmp_path))
    assert code == 2 and "there was no checkpoint yet" in err and not (tmp_path / "a" / "manifest.json").exists()


# ---- joint arms, and arms that go on from others ----

def test_a_joint_arm_trains_a_lora_that_writes_and_reads(tmp_path, call, run_main):
    code, _, err = call(command(tmp_path, "--joint", updates=3))
    manifest = read_manifest(tmp_path / "a")
    assert code == 0 and manifest["frozen"] is False and manifest["lora"] == arms.LORA and manifest["ttt"], err
    assert set(manifest["files"]) == {"adapter.safetensors", *arms.LORA_FILES}
    loaded, plain = load_model("tiny-llama"), load_model("tiny-llama")
    ttt, _ = load_adapter(tmp_path / "a", loaded)
    # B starts at zero, so what is not zero has learned and was found again
    still = [name for name, p in loaded.model.named_parameters() if "lora_B" in name and p.abs().max() == 0]
    assert not still
    ids = torch.tensor(token_rows((12,)))
    assert not torch.allclose(loaded.model(ids).logits, plain.model(ids).logits)  # the LoRA is on where the adapter is loaded
    assert arms.base_digest(loaded) == arms.base_digest(plain)
    code, _, err = run_main(run_experiment.main, ["run_experiment.py", "--model", "tiny-llama", "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "r"),
                                                  "--conditions", "B_memory,A_context", "--limit", "1", "--device", "cpu"])
    assert code == 2 and "A_context" in err and "joint arm" in err and not (tmp_path / "r").exists()
    code, _, err = run_main(run_experiment.main, ["run_experiment.py", "--model", "tiny-llama", "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "r"),
                                                  "--conditions", "B_memory", "--levels", "1", "--limit", "1", "--device", "cpu"])
    assert code == 0 and json.loads((tmp_path / "r/run.json").read_text(encoding="utf-8"))["frozen"] is False, err


def with_lora(loaded, size=0.0):
    """A LoRA on the base's attention; size: of its otherwise empty half."""
    lora = get_peft_model(loaded.model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
    for name, p in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=size)
    return lora


@torch.no_grad()
def test_a_joint_arm_is_held_to_the_untouched_base(attached, monkeypatch):
    """With a memory that is empty, what is left to mend is what the LoRA changed, and none of it where it changes nothing."""
    loaded, batch = tiny("tiny-llama"), conversations()
    ttt = strengthen(attached(loaded, layers=(1, 2), chunk=None, **DEEP))
    memory = in_place_ttt.Writer.memory
    monkeypatch.setattr(in_place_ttt.Writer, "memory", lambda self, group: memory(self, group).scale(0.0))
    for size, changed in ((0.0, False), (0.5, True)):
        lora = with_lora(loaded, size)
        measures = recall_step(loaded, ttt, with_others(batch, 1), CPU, lora=lora).measures
        lora.unload()
        assert all((measures[kind].item() > 1e-4) == changed for kind in ("calm", "foreign")), measures


@torch.enable_grad()
def test_the_answers_reach_a_joint_base_through_the_write(attached):
    """A weight that both writes and reads: joint, its slope differs by what came through the write."""
    loaded = tiny("tiny-llama")
    ttt = strengthen(attached(loaded, layers=(2,), chunk=None))
    gate = loaded.model.get_decoder().layers[1].mlp.gate_proj.weight  # below the TTT layer
    slopes = {}
    try:
        gate.requires_grad_(True)
        recall_step(loaded, ttt, conversations(), CPU).loss.backward()
        slopes[False], gate.grad = gate.grad.clone(), None
        lora = with_lora(loaded)
        gate.requires_grad_(True)  # peft freezes what is not its own
        recall_step(loaded, ttt, conversations(), CPU, lora=lora).loss.backward()
        slopes[True], gate.grad = gate.grad.clone(), None
        lora.unload()
    finally:
        gate.requires_grad_(False)
        ttt.zero_grad(set_to_none=True)
    assert slopes[False].norm() > 0 and (slopes[True] - slopes[False]).norm() > 1e-3 * slopes[False].norm()


@pytest.mark.parametrize("objective, more", [("recall", []), ("recall", ["--joint"]), ("context", [])])
def test_an_arm_goes_on_from_another(objective, more, tmp_path, call):
    """The first update of the second arm starts at the first arm's numbers, and its manifest says from where."""
    assert call(command(tmp_path / "first", *more, objective=objective, updates=3))[0] == 0
    code, _, err = call(command(tmp_path / "second", *more, "--start", tmp_path / "first/a", "--lr", "1e-9", objective=objective, updates=1))
    assert code == 0, err
    first, second = (read_manifest(tmp_path / name / "a") for name in ("first", "second"))
    assert first["start"] is None and second["start"] == {"arm": "a", "updates": 3, "files": first["files"]}
    for name in first["files"]:
        if name.endswith(".safetensors"):
            one, two = (load_file(tmp_path / folder / "a" / name) for folder in ("first", "second"))
            assert one.keys() == two.keys() and all(torch.allclose(one[key].float(), two[key].float(), atol=1e-4) for key in one)


def test_an_arm_goes_on_in_the_data_too(tmp_path, call):
    """Three arms, each from the one before, see what one arm sees in as many updates; nothing is learned, so their losses are equal too."""
    for name, updates, start in (("whole", 4, None), ("first", 2, None), ("second", 1, "first"), ("third", 1, "second")):
        assert call(command(tmp_path / name, *(["--start", tmp_path / start / "a"] if start else []), "--lr", "1e-9", updates=updates))[0] == 0
    losses = {name: [json.loads(line)["loss"] for line in (tmp_path / name / "a/train.jsonl").open(encoding="utf-8")] for name in ("whole", "first", "second", "third")}
    assert losses["first"] + losses["second"] + losses["third"] == pytest.approx(losses["whole"], rel=1e-3)
    assert min(abs(a - b) for a, b in itertools.combinations(losses["whole"], 2)) > 3e-3 * losses["whole"][0]  # so another order would show
    assert [read_manifest(tmp_path / name / "a")["start"]["updates"] for name in ("second", "third")] == [2, 3]


@pytest.mark.parametrize("more, named", [(["--value-rank", "0"], "other settings (value_rank)"), (["--seed", "3"], None)])
def test_an_arm_of_other_settings_is_no_start(more, named, tmp_path, call):
    assert call(command(tmp_path / "first", updates=1))[0] == 0
    code, _, err = call(command(tmp_path / "second", "--start", tmp_path / "first/a", *more, updates=1))
    assert (code == 0) == (named is None)
    if named:
        assert named in err and "--start" in err and not (tmp_path / "second").exists()


def test_a_frozen_arm_does_not_start_from_a_joint_one(tmp_path, call):
    assert call(command(tmp_path / "first", "--joint", updates=1))[0] == 0
    code, _, err = call(command(tmp_path / "second", "--start", tmp_path / "first/a", updates=1))
    assert code == 2 and "add --joint" in err and not (tmp_path / "second").exists()


@pytest.mark.parametrize("losses, stops", [([1.0] * 25 + [2.9] * 25, False), ([1.0] * 25 + [3.1] * 25, True), ([9.0, 0.1] * 40, False),
                                           ([5.0] * 25 + [1.0] * 25 + [3.1] * 25, True), ([30.0] * 24, False)])
def test_what_counts_as_climbing(losses, stops):
    assert train_minimal.WINDOW == 25
    if stops:
        with pytest.raises(train_minimal.Diverged):
            train_minimal.check_course(losses, len(losses))
    else:
        train_minimal.check_course(losses, len(losses))


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = [train_minimal.learning_rate(u, 520, 2e-3, 50) for u in range(520)]
    assert rates[0] == pytest.approx(2e-3 / 50) and max(rates) == pytest.approx(2e-3) and rates.index(max(rates)) in (49, 50)
    assert all(a < b for a, b in zip(rates[:49], rates[1:50])) and all(a > b for a, b in zip(rates[50:], rates[51:]))
    assert rates[-1] == pytest.approx(2e-4, rel=0.01) and train_minimal.learning_rate(0, 1, 1.0, 0) == 1.0


# ---- resuming ----

def interrupt_at(monkeypatch, objective, update):
    step, calls = objectives.OBJECTIVES[objective], []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == update:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setitem(train_minimal.OBJECTIVES, objective, interrupted)


ADAPTER = {"recall": "adapter.safetensors", "lm": "adapter.safetensors", "context": "lora/adapter_model.safetensors"}


@pytest.mark.parametrize("objective, more", [*((objective, ()) for objective in ADAPTER), ("recall", ("--dropout", 0.3))])
def test_a_resumed_arm_is_the_uninterrupted_one_byte_for_byte(objective, more, tmp_path, call, monkeypatch):
    straight, broken = (command(tmp_path / name, "--save-every", 2, *more, objective=objective, updates=5) for name in ("straight", "broken"))
    assert call(straight)[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, objective, 4)  # the third update is done, the checkpoint is of the second
        code, _, err = call(broken)
    assert code == 130 and "interrupted: its last checkpoint is kept" in err and "--resume" in err
    assert read_manifest(tmp_path / "broken/a")["updates"] == 2
    assert call([*broken, "--resume"])[0] == 0
    one, two = tmp_path / "straight/a", tmp_path / "broken/a"
    assert (one / ADAPTER[objective]).read_bytes() == (two / ADAPTER[objective]).read_bytes()
    timeless = lambda rows: [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]
    assert timeless(log_rows(one)) == timeless(log_rows(two)) and read_manifest(two)["updates"] == 5
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())


def test_resume_without_a_checkpoint_starts_over_and_a_finished_arm_stays(tmp_path, call, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, "recall", 3)
        code, _, err = call(command(tmp_path))
    assert code == 130 and "no checkpoint yet" in err and not (tmp_path / "a/manifest.json").exists()
    assert call([*command(tmp_path), "--resume"])[0] == 0 and call(command(tmp_path / "straight"))[0] == 0
    assert (tmp_path / "a/adapter.safetensors").read_bytes() == (tmp_path / "straight/a/adapter.safetensors").read_bytes()
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "a").iterdir()}
    code, out, _ = call([*command(tmp_path), "--resume"])
    assert code == 0 and "already trained for 4 updates" in out
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "a").iterdir()} == before


def test_dropout_is_of_training_alone(tmp_path, call):
    """It changes what is trained, and what is saved answers without it."""
    for share in (0, 0.5):
        call(command(tmp_path / str(share), "--dropout", share, updates=2))
    plain, dropped = (load_file(tmp_path / share / "a/adapter.safetensors") for share in ("0", "0.5"))
    assert any((plain[name] != dropped[name]).any() for name in plain)
    loaded = load_model("tiny-llama")
    ttt, _ = load_adapter(tmp_path / "0.5/a", loaded)
    strengthen(ttt)
    batch = conversations()
    with torch.no_grad():
        answered, again = (recall_step(loaded, ttt, batch, CPU).loss for _ in range(2))
        ttt.drop(0.5)
        dropped, otherwise = (recall_step(loaded, ttt, batch, CPU).loss for _ in range(2))
        ttt.drop(0.0)
        back = recall_step(loaded, ttt, batch, CPU).loss
    ttt.detach()
    assert answered == again == back and dropped != otherwise


def test_weight_decay_draws_the_trained_tensors_to_zero(tmp_path, call):
    norms = []
    for decay in (0, 5):
        call(command(tmp_path / str(decay), "--weight-decay", decay, "--warmup", 0, updates=2))
        adapter = load_file(tmp_path / str(decay) / "a/adapter.safetensors")
        norms.append({name: t.float().norm().item() for name, t in adapter.items() if name.endswith((".proj", ".proj_in"))})  # the others start at 0
        assert read_manifest(tmp_path / str(decay) / "a")["optimizer"]["weight_decay"] == decay
    assert norms[0] and all(norms[1][name] < norms[0][name] for name in norms[0])


CHANGES = [("--seed", 5), ("--lr", 0.5), ("--updates", 9), ("--layers", "2"), ("--lang", "zh"), ("--probes", 1), ("--weight-decay", 0.1), ("--objective", "context", "--groups", "")]


@pytest.fixture(scope="module")
def three_updates(tmp_path_factory):
    """three_updates(finished) -> a folder with arm `a` of three updates, saved after each; unfinished, it was interrupted in the third."""
    @functools.cache
    def trained(finished):
        folder = tmp_path_factory.mktemp("three")
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
            if not finished:
                interrupt_at(patch, "recall", 3)
            patch.setattr(sys, "argv", command(folder, "--save-every", 1, updates=3))
            with contextlib.nullcontext() if finished else pytest.raises(SystemExit):
                run_script(train_minimal.main)
        assert read_manifest(folder / "a")["updates"] == (3 if finished else 2)
        return folder

    return trained


@pytest.mark.parametrize("finished, change", [*((False, c) for c in CHANGES), (True, CHANGES[0]), (True, CHANGES[2])])
def test_resume_refuses_another_arm(change, finished, three_updates, call):
    folder = three_updates(finished)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    code, _, err = call([*command(folder, "--save-every", 1, updates=3), *map(str, change), "--resume"])
    assert code == 2 and len(err.splitlines()) == 1 and "another" in err and str(folder / "a") in err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_cut_state_is_one_clear_line(tmp_path, three_updates, call):
    shutil.copytree(three_updates(False), tmp_path, dirs_exist_ok=True)
    state = tmp_path / "a" / train_minimal.STATE
    state.write_bytes(state.read_bytes()[:100])
    code, _, err = call([*command(tmp_path, "--save-every", 1, updates=3), "--resume"])
    assert code == 2 and len(err.splitlines()) == 1 and str(state) in err and "Traceback" not in err


def test_a_changed_state_or_log_is_named_and_never_gone_on_from(tmp_path, three_updates, call):
    """A bit of the header, of a tensor and of the log; and a log cut short or gone."""
    whole = three_updates(False) / "a"
    size = (whole / train_minimal.STATE).stat().st_size
    breakages = [(train_minimal.STATE, place, None) for place in (40, size // 2, size - 1)] + [("train.jsonl", 20, None), ("train.jsonl", None, 60), ("train.jsonl", None, 0)]
    for number, (name, place, length) in enumerate(breakages):
        copy = shutil.copytree(whole, tmp_path / str(number) / "a")
        data = bytearray((copy / name).read_bytes())
        if place is None:
            data = data[:length]
        else:
            data[place] ^= 1
        (copy / name).write_bytes(data)
        before = {p: p.read_bytes() for p in copy.iterdir()}
        code, _, err = call([*command(tmp_path / str(number), "--save-every", 1, updates=3), "--resume"])
        assert code == 2 and len(err.splitlines()) == 1 and str(copy / name) in err and f"remove {copy} and train again" in err, err
        assert {p: p.read_bytes() for p in copy.iterdir()} == before


def test_a_log_removed_while_training_is_put_back(tmp_path, call, monkeypatch):
    save = train_minimal.save_state

    def saved(folder, *more):
        save(folder, *more)
        (folder / "train.jsonl").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(train_minimal, "save_state", saved)
        code, _, err = call(command(tmp_path, "--save-every", 1, updates=3))
    assert code == 2 and "train.jsonl: was removed while it was written" in err and len(log_rows(tmp_path / "a")) == 2
    assert call([*command(tmp_path, "--save-every", 1, updates=3), "--resume"])[0] == 0
    assert [row["update"] for row in log_rows(tmp_path / "a")] == [1, 2, 3]


def test_deterministic_trainings_have_the_same_bytes(tmp_path, call):
    try:
        for name in ("one", "two"):
            assert call(command(tmp_path / name, "--deterministic", updates=2))[0] == 0
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    one, two = ((tmp_path / name / "a/adapter.safetensors").read_bytes() for name in ("one", "two"))
    manifest = read_manifest(tmp_path / "one/a")
    assert one == two and manifest["hardware"]["deterministic"] is True and manifest["started"] <= manifest["ended"] and manifest["cost_usd"] is None


def test_no_memory_for_an_update_is_one_clear_error(tmp_path, call, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(train_minimal.OBJECTIVES, "recall", full)
    code, _, err = call(command(tmp_path))
    line = err.splitlines()[-1]
    assert code == 2 and "no memory for an update of 1 conversations" in line and "no checkpoint yet" in line and "--conversations" in line and "Traceback" not in err


def test_a_step_beyond_float16_does_not_replace_the_state(tmp_path, call, monkeypatch):
    """The checkpoint before it stays, and so does what --resume goes on from."""
    fits = train_minimal.too_large

    def after_two(trained):
        if (tmp_path / "a/manifest.json").exists() and read_manifest(tmp_path / "a")["updates"] == 2:
            next(iter(trained.values())).data.view(-1)[0] = 1e6
        return fits(trained)

    monkeypatch.setattr(train_minimal, "too_large", after_two)
    code, _, err = call(command(tmp_path, "--save-every", 1, updates=4))
    assert code == 2 and "does not fit float16" in err.splitlines()[-1] and "the last good checkpoint is kept" in err and "lower --lr" in err
    state = load_file(tmp_path / "a" / train_minimal.STATE)
    assert all(t.half().isfinite().all() for name, t in state.items() if name.endswith("/value")) and read_manifest(tmp_path / "a")["updates"] == 2


def test_a_trained_arm_is_not_trained_over(tmp_path, call):
    assert call(command(tmp_path, updates=1))[0] == 0
    before = (tmp_path / "a/train.jsonl").read_bytes()
    code, _, err = call(command(tmp_path, updates=1))
    assert code == 2 and len(err.splitlines()) == 1 and "already holds a trained arm" in err and "--resume" in err
    assert (tmp_path / "a/train.jsonl").read_bytes() == before


def test_ctrl_c_in_a_terminal_keeps_the_last_checkpoint(tmp_path):
    """The signal reaches the whole process group, data workers included, as a terminal sends it."""
    argv = command(tmp_path, "--save-every", 2, "--workers", 1, objective="lm", updates=100000)
    process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=hear_ctrl_c)
    deadline = time.time() + 90
    while not (tmp_path / "a/manifest.json").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted: its last checkpoint is kept in" in err and str(tmp_path / "a") in err and "--resume" in err and "Traceback" not in err
    ttt, manifest = load_adapter(tmp_path / "a", load_model("tiny-llama"))
    assert manifest["updates"] % 2 == 0 and manifest["updates"] <= len(log_rows(tmp_path / "a"))


# ---- the reported run ----

@pytest.mark.parametrize("objective, arm", [("recall", "smollm2-deep"), ("lm", "smollm2-lm"), ("context", "smollm2-tuned")])
def test_the_defaults_are_the_reported_run(objective, arm, monkeypatch):
    """Typing the command of the docs without any option repeats the committed arm; the options it was given change nothing."""
    manifest = json.loads((ROOT / "checkpoints" / arm / "manifest.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(sys, "argv", ["train_minimal.py", *(["--objective", objective] if objective != "recall" else [])])
    arguments = train_minimal.parse_arguments()
    row = model_utils.find_row(arguments.model)
    config = train_minimal.ttt_config(arguments, row)
    assert (arguments.model, arguments.objective, arguments.updates, arguments.seed) == \
        (manifest["model"], manifest["objective"], manifest["updates"], manifest["seed"])
    given = {name: getattr(arguments, name, None) for name in manifest["optimizer"]} | {"aids": train_minimal.aid_weights(arguments) if config and config.codes else None}
    assert {name: given[name] for name in manifest["optimizer"]} == manifest["optimizer"]
    assert (config is None and manifest["ttt"] is None or TTTConfig(**manifest["ttt"]) == config) and row.gguf.sha256 == manifest["model_sha256"]
    assert manifest["lora"] == (None if config else arms.LORA) and manifest["data"] == arguments.data


@pytest.mark.parametrize("memory, ceiling", [("smollm2-deep", "smollm2-tuned"), ("qwen-deep", "qwen-tuned")])
def test_the_ceiling_is_trained_on_the_same_data_and_to_where_it_stops_falling(memory, ceiling):
    """It reads what is in front of it and needs fewer examples: of what its loss falls in all, the last quarter of the updates brings under 6%."""
    one, other = [json.loads((ROOT / f"checkpoints/{arm}/manifest.json").read_text(encoding="utf-8")) for arm in (memory, ceiling)]
    for field in ("data", "data_sha256", "langs", "seed", "model_sha256"):
        assert one[field] == other[field], field
    losses = [row["loss"] for row in log_rows(ROOT / "checkpoints" / ceiling)]
    assert len(losses) == other["updates"]
    eighth = len(losses) // 8
    first, late, last = (sum(losses[i * eighth:(i + 1) * eighth]) / eighth for i in (0, 5, 7))
    assert late - last < 0.06 * (first - last) and last < 0.2 * first
