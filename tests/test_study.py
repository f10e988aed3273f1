"""The study's arms: the paper's own form, W_down trained along, and the recall objective on long conversations written chunk by chunk."""
import itertools
import json
import types
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, assert_same_memory, batch_of, run, strengthen, tiny, token_rows, widen, write_once
from safetensors.torch import load_file
from test_run_experiment import save_fast_weights, save_joint, save_tiny
from test_train import CPU, a_short_bank, attached, call, command, conversations, directional, interrupt_at, log_rows  # noqa: F401 (fixtures)
from transformers import AutoModelForCausalLM, Gemma3TextConfig

import hub_model
import objectives
import report_long
import reproduce
import run_experiment
import run_long
import sanity
import train_minimal
import training_bank
from arms import base_digest
from decoding import write_rows
from in_place_ttt import InPlaceTTT, TTTConfig
from manifests import read_manifest
from memory_model import WithMemory
from model_utils import MODELS, find_row, load_adapter, load_model, save_adapter, study_ttt
from objectives import lm_step, recall_step
from report_tables import kind_text
from training_data import BankDataset, Batch

WDOWN = dict(chunk=4, w_down=True)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file of texts that are shorter than a row."""
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n\n".join(f"number {n} went out and came back at {n * 7}" for n in range(20)), encoding="utf-8")
    return path


def study(out, texts, *more, **how):
    """The command of a tiny lm arm of the study's form: rows of 60 tokens, chunks of 16."""
    return command(out, "--form", "study", "--chunk", 16, "--length", 60, "--data", texts, *more, objective="lm", **how)


# ---- the form ----

def test_the_form_is_the_papers_and_stands_where_it_stood():
    """Raw keys, no gate, conv at 0 and P diagonal, chunks of 128; in every sixth layer, or where a base with windows sees everything."""
    for row in MODELS.values():
        assert row.study == study_ttt(row.study.layers, row.study.eta) and row.study.chunk == 128
        if row.config is not None:
            assert max(row.study.layers) < row.config.num_hidden_layers, row.name
    assert MODELS["gemma3-270m"].study.layers == (5, 11, 17) and MODELS["tiny-gemma3"].study.layers == (1, 3)
    assert MODELS["smollm2-135m"].study.layers == (0, 6, 12, 18, 24) and MODELS["qwen2.5-coder-0.5b"].study.layers == (0, 6, 12, 18)
    by_options = replace(MODELS["smollm2-135m"].plain, unit_keys=False, gate=False, unit_targets=False, init="paper", chunk=128, layers=(0, 6, 12, 18, 24))
    assert MODELS["smollm2-135m"].study == by_options


def test_a_folder_of_gemma_has_the_form_in_its_global_layers(tmp_path):
    config = Gemma3TextConfig(vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=7, num_attention_heads=1, num_key_value_heads=1, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    assert find_row(str(tmp_path / "m")).study.layers == (5,) and find_row(str(tmp_path / "m")).plain.layers == (2,)


def test_chunk_and_layers_of_the_form_can_be_said(monkeypatch):
    def config(*more):
        monkeypatch.setattr("sys.argv", ["train_minimal.py", "--model", "gemma3-270m", "--form", "study", *more])
        arguments = train_minimal.parse_arguments()
        return train_minimal.ttt_config(arguments, arguments.row)

    assert config("--objective", "lm") == MODELS["gemma3-270m"].study
    assert config("--objective", "lm", "--chunk", "2048", "--length", "4096", "--layers", "3", "--w-down") == replace(
        MODELS["gemma3-270m"].study, chunk=2048, layers=(3,), w_down=True)
    assert config("--chunk", "whole").chunk is None


# ---- W_down ----

def added(ttt, size=0.05):
    """The same adapter with something in what was added to W_down."""
    for fast in strengthen(ttt).fast.values():
        fast.down_delta.data.mul_(size)
    return ttt


def with_other_w_down(family, ttt):
    """What the w_down arm stands for, as an oracle: a base of the changed weights, and the other trained parts on it."""
    loaded = load_model(family, dtype=torch.float64)
    widen(loaded.model)
    for i in ttt.config.layers:
        loaded.model.get_decoder().layers[i].mlp.down_proj.weight.data += ttt.fast[str(i)].down_delta.data
    other = InPlaceTTT(loaded.model, replace(ttt.config, w_down=False)).double()
    other.load_tensors({name: t for name, t in ttt.tensors().items() if "down_delta" not in name})
    return loaded.model, other


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_an_arm_with_w_down_is_the_plain_arm_on_a_base_of_those_weights(name, attach):
    """Writing in both forms, and reading; switched off and taken off it is the base bit for bit."""
    loaded, (ids, mask) = tiny(name), batch_of(token_rows((13, 9)))
    untouched = run(loaded.model, ids, mask)
    ttt = added(attach(loaded, layers=(1, 3), **WDOWN))
    model, other = with_other_w_down(name, ttt)
    for form in ("parallel", "sequential"):
        said, memory = write_once(loaded.model, ttt, ids, mask, form=form)
        expected, expected_memory = write_once(model, other, ids, mask, form=form)
        torch.testing.assert_close(said, expected, atol=1e-10, rtol=1e-8)
        assert_same_memory(memory, expected_memory, atol=1e-10)
    with ttt.read(memory), other.read(expected_memory):
        torch.testing.assert_close(run(loaded.model, ids, mask), run(model, ids, mask), atol=1e-10, rtol=1e-8)
    assert (said - untouched).abs().max() > 1e-3
    assert torch.equal(run(loaded.model, ids, mask), untouched)
    ttt.detach()
    assert torch.equal(run(loaded.model, ids, mask), untouched)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("parameter", ["conv", "proj", "down_delta"])
def test_the_gradient_of_each_part_is_the_slope_of_the_loss(name, parameter, attach):
    loaded, rows = tiny(name), token_rows((20, 13))
    ttt = added(attach(loaded, layers=(1, 2), **WDOWN))
    parts = [p for n, p in ttt.named_parameters() if n.endswith(parameter)]
    square, slope = directional(lambda: lm_step(loaded, ttt, rows, CPU).loss, parts, size=3e-2)  # the loss is a float32
    assert len(parts) == 2 and square > 1e-12 and slope == pytest.approx(square, rel=0.02)


def test_the_loss_in_pieces_is_the_loss_at_once(monkeypatch):
    """The same loss, right answers and gradient, with no more logits alive than one piece has, each made once; the gradient is what is kept."""
    head = torch.nn.Linear(8, 50, bias=False).double().requires_grad_(False)
    hidden, wanted, seen = torch.randn(23, 8, dtype=torch.float64, requires_grad=True), torch.randint(0, 50, (23,)), []
    logits = head(hidden)
    whole = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
    gradient, = torch.autograd.grad(whole, hidden)
    head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    monkeypatch.setattr(objectives, "LOGITS", 7 * 50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        loss, right = objectives.next_token_loss(head, hidden, wanted)
    assert right == (logits.argmax(-1) == wanted).sum() and kept[-1] == (23, 8) and max(shape.numel() for shape in kept) <= max(7 * 50, head.weight.numel())
    torch.testing.assert_close(loss.double(), whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(2 * loss, hidden)[0], 2 * gradient, rtol=1e-5, atol=1e-7)
    assert seen == [7, 7, 7, 2]
    with torch.no_grad():
        assert objectives.next_token_loss(head, hidden, wanted)[0] == loss


@pytest.mark.parametrize("name", FAMILIES)
def test_an_arm_with_w_down_is_trained_kept_and_loaded(name, tmp_path, call, texts):
    """From the paper's start conv moves first, and P as soon as conv is not 0. Nothing of the base itself changes, W_down neither."""
    code, out, err = call(study(tmp_path, texts, "--w-down", "--layers", "1,3", model=name, updates=3))
    manifest, tensors = read_manifest(tmp_path / "a"), load_file(tmp_path / "a/adapter.safetensors")
    assert code == 0 and "the base is unchanged" in out and "next: python run_long.py --model" in out, err
    assert manifest["frozen"] is False and manifest["lora"] is None and manifest["ttt"]["w_down"] and manifest["optimizer"]["length"] == 60
    assert set(tensors) == {f"{i}.{part}" for i in (1, 3) for part in ("conv", "proj", "down_delta")}
    assert all(tensors[f"{i}.{part}"].any() for i in (1, 3) for part in ("conv", "down_delta"))
    assert all(row["grad_norm"] > 0 for row in log_rows(tmp_path / "a"))
    loaded, plain = load_model(name), load_model(name)
    ttt, _ = load_adapter(tmp_path / "a", loaded)
    assert all(torch.equal(t.half(), tensors[n]) for n, t in ttt.tensors().items()) and base_digest(loaded) == base_digest(plain)
    ttt.detach()
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.state_dict().values(), plain.model.state_dict().values()))


def test_w_down_learns_at_its_own_rate():
    """Both directions of a side stream's block have names of their own: only what is added to W_down is slow."""
    shares = {name: train_minimal.rate_share(name, joint=False) for name in ("fast.1.conv", "fast.1.down_delta", "streams.read.blocks.1.down")}
    assert shares == {"fast.1.conv": 1.0, "fast.1.down_delta": train_minimal.W_DOWN_SHARE, "streams.read.blocks.1.down": 1.0}


def test_a_change_of_the_bases_own_w_down_is_noticed(tmp_path, call, texts, monkeypatch):
    step = objectives.OBJECTIVES["lm"]

    def disturb(loaded, ttt, batch, device, part):
        ttt.down_proj(1).weight.data.view(-1)[0] += 1e-3
        return step(loaded, ttt, batch, device)

    monkeypatch.setitem(train_minimal.OBJECTIVES, "lm", disturb)
    with pytest.raises(RuntimeError, match="the base changed"):
        call(study(tmp_path, texts, "--w-down", "--layers", "1", updates=1))
    assert not (tmp_path / "a/manifest.json").exists()


@pytest.mark.parametrize("more", [("--w-down",), ()])
def test_a_resumed_arm_is_the_uninterrupted_one_byte_for_byte(more, tmp_path, call, texts, monkeypatch):
    straight, broken = (study(tmp_path / name, texts, "--save-every", 2, *more, updates=5) for name in ("straight", "broken"))
    assert call(straight)[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, "lm", 4)
        assert call(broken)[0] == 130
    assert read_manifest(tmp_path / "broken/a")["updates"] == 2 and call([*broken, "--resume"])[0] == 0
    one, two = ((tmp_path / name / "a/adapter.safetensors").read_bytes() for name in ("straight", "broken"))
    assert one == two
    code, _, err = call([*straight, "--length", 61, "--resume"])
    assert code == 2 and "another optimizer" in err


def test_an_arm_with_w_down_goes_on_from_one(tmp_path, call, texts):
    assert call(study(tmp_path / "first", texts, "--w-down", updates=2))[0] == 0
    assert call(study(tmp_path / "second", texts, "--w-down", "--start", tmp_path / "first/a", "--lr", 1e-9, updates=1))[0] == 0
    one, two = (load_file(tmp_path / name / "a/adapter.safetensors") for name in ("first", "second"))
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=1e-6) for name in one)
    code, _, err = call(study(tmp_path / "third", texts, "--start", tmp_path / "first/a", updates=1))
    assert code == 2 and "other settings (w_down)" in err and not (tmp_path / "third").exists()


@pytest.mark.parametrize("more, named", [
    (("--objective", "lm", "--form", "study", "--chunk", 512), "--chunk 512: an lm row has 512 tokens"),
    (("--objective", "lm", "--form", "study", "--length", 100), "--chunk 128: an lm row has 100 tokens"),
    (("--objective", "lm", "--form", "plain", "--chunk", 600, "--length", 600), "give a --length above 600"),
    (("--objective", "lm", "--form", "study", "--chunk", "whole"), "--chunk whole"),
    (("--objective", "lm", "--form", "study", "--length", 40000), "--length 40000: needs 40000 tokens, the model's window is 32768"),
    (("--length", 1), "--length 1: use 2 or more"),
    (("--form", "study"), "use --groups 1"),
    (("--form", "study", "--groups", 1, "--rule", "ridge"), "the chunk must be 'whole'"),
    (("--w-down",), "switch blind off"),
    (("--form", "study", "--groups", 1, "--w-down", "--joint"), "--w-down: --joint trains a LoRA on W_down"),
    (("--objective", "context", "--w-down"), "--w-down: the context objective has a LoRA on W_down"),
    (("--objective", "lm", "--data", "tinystories"), "--data tinystories: roneneldan/TinyStories cannot be had"),
    (("--objective", "lm", "--data", "longalpaca"), "--data longalpaca: Yukang/LongAlpaca-12k cannot be had"),
    (("--objective", "lm", "--data", "no_robots"), "--data no_robots: HuggingFaceH4/no_robots cannot be had (ConnectionError: Couldn't reach")])
def test_what_cannot_be_trained_is_one_clear_line(more, named, tmp_path, call):
    """The corpora as `datasets` refuses them without a network (conftest.py sets HF_HUB_OFFLINE)."""
    code, _, err = call(["train_minimal.py", "--model", "tiny-llama", "--out", tmp_path, "--workers", 0, "--device", "cpu", *more])
    assert code == 2 and named in err and len(err.splitlines()) == 1 and not any(tmp_path.iterdir())


# ---- what others make of such an arm ----

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "tiny-qwen2")


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """An arm whose fast weights write nothing and whose W_down is another: what it changes, W_down changes."""
    loaded, config = load_model(model), TTTConfig((1, 2), 64, w_down=True)
    ttt = added(InPlaceTTT(loaded.model, config), size=0.3)
    for fast in ttt.fast.values():
        fast.conv.data.zero_()
    folder = tmp_path_factory.mktemp("arms") / "a"
    save_fast_weights(folder, model, change=None)  # its manifest, but for what is said here
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    save_adapter(folder, ttt, manifest | {"frozen": False, "ttt": config.to_dict(), "data": "bank", "langs": ["en"], "commit": "c"})
    return str(folder)


def test_long_texts_ask_the_untouched_base_in_context_and_the_arm_elsewhere(model, adapter, run_main, tmp_path):
    asked = ["run_long.py", "--model", model, "--tasks", "mqar", "--lengths", 256, "--count", 3, "--device", "cpu", "--out"]
    assert run_main(run_long.main, [*asked, tmp_path / "r", "--adapter", adapter])[0] == run_main(run_long.main, [*asked, tmp_path / "base"])[0] == 0
    rows = [json.loads(line) for name in ("r", "base") for line in (tmp_path / name / "predictions.jsonl").open(encoding="utf-8")]
    said = [row["prediction"] for row in rows if row["condition"] == "in_context"]
    assert len(said) == 6 and said[:3] == said[3:] != [row["prediction"] for row in rows if row["condition"] == "ttt_paper"]
    assert json.loads((tmp_path / "r/run.json").read_text(encoding="utf-8"))["frozen"] is False


def test_an_empty_memory_shows_what_w_down_does_by_itself(model, adapter, run_main, tmp_path):
    """This arm writes nothing, so with its memory or an empty one it says the same; an arm of the base's own W_down is not asked that."""
    asked = ["run_long.py", "--model", model, "--tasks", "mqar", "--lengths", 256, "--count", 3, "--device", "cpu",
             "--modes", "in_context,ttt_empty,ttt_paper", "--out", tmp_path / "r"]
    code, _, err = run_main(run_long.main, [*asked, "--adapter", save_fast_weights(tmp_path / "frozen", model)])
    assert code == 2 and "--modes ttt_empty" in err and len(err.splitlines()) == 1 and not (tmp_path / "r").exists()
    assert run_main(run_long.main, [*asked, "--adapter", adapter])[0] == 0
    said = {mode: [] for mode in ("in_context", "ttt_empty", "ttt_paper")}
    for line in (tmp_path / "r/predictions.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        said[row["condition"]].append(row["prediction"])
    assert said["in_context"] != said["ttt_empty"] == said["ttt_paper"]
    assert report_long.main([str(tmp_path / "r"), "--out", str(tmp_path / "report")]) == 0
    assert "chunk 64, base not frozen" in report_long.tables(json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8")))


def test_the_benchmark_asks_such_an_arm_and_its_untouched_base(model, adapter, run_main, tmp_path):
    asked = ["run_experiment.py", "--model", model, "--adapter", adapter, "--conditions", "A_context,B_memory", "--levels", "1", "--lang", "en", "--limit", 1,
             "--device", "cpu", "--out", tmp_path / "r"]
    code, _, err = run_main(run_experiment.main, asked)
    made = json.loads((tmp_path / "r/run.json").read_text(encoding="utf-8"))
    assert code == 0 and made["frozen"] is False and made["ttt"]["w_down"], err
    assert run_main(run_experiment.main, ["run_experiment.py", "--model", model, "--conditions", "A_context", "--levels", "1", "--lang", "en", "--limit", 1, "--device", "cpu",
                                          "--out", tmp_path / "b"])[0] == 0
    said = lambda folder: {row["probe_id"]: row["prediction"] for row in map(json.loads, (tmp_path / folder / "predictions.jsonl").open(encoding="utf-8")) if row["condition"] == "A_context"}
    assert said("r") == said("b") and said("b")


@pytest.mark.parametrize("arm, said", [({"frozen": True}, "frozen base"), ({"frozen": False, "w_down": True}, "W_down of its TTT layers trained too"),
                                       ({"frozen": False}, "joint (base trained too)")])
def test_tables_say_what_of_the_base_was_trained(arm, said):
    assert kind_text(arm | {"objective": "lm", "seeds": [0]}) == f"{said}, objective lm, seed 0"


def test_the_checks_of_sanity_refuse_it_in_one_line(model, adapter, run_main):
    code, _, err = run_main(sanity.main, ["sanity.py", "--model", model, "--adapter", adapter, "--device", "cpu"])
    assert code == 2 and len(err.splitlines()) == 1 and "W_down was trained too" in err and "--w-down" in err


def test_a_joint_arm_is_not_asked_as_the_untouched_base(model, run_main, tmp_path):
    save_joint(tmp_path / "a", model)
    code, _, err = run_main(run_long.main, ["run_long.py", "--model", model, "--adapter", tmp_path / "a", "--device", "cpu", "--out", tmp_path / "r"])
    assert code == 2 and "test is a joint arm with a LoRA on its base" in err and not (tmp_path / "r").exists()


@torch.no_grad()
def test_an_exported_model_writes_and_reads_with_it_and_is_its_base_without(model, adapter, tmp_path):
    folder = hub_model.export(model, adapter, tmp_path / "merged", merged=True)
    assert "not frozen: W_down of the TTT layers was trained along" in (folder / "README.md").read_text(encoding="utf-8")
    base = load_model(model)
    opened = type("Opened", (WithMemory, type(base.model)), {}).from_pretrained(folder, dtype=torch.float32)
    ids, mask = batch_of(token_rows((80, 70)))
    assert torch.equal(run(opened, ids, mask), run(base.model, ids, mask))
    memory = opened.write(ids, mask)
    ttt, _ = load_adapter(adapter, base)
    expected, _ = write_rows(base.model, ttt, token_rows((80, 70)), base.tokenizer.pad_token_id, dropped=True)
    assert_same_memory(memory, expected, atol=1e-6)
    asked, asked_mask = batch_of(token_rows((9, 9), seed=4))
    with opened.ttt.read(memory), ttt.read(expected):
        one, other = run(opened, asked, asked_mask), run(base.model, asked, asked_mask)
    torch.testing.assert_close(one, other)
    assert (one - run(base.model, asked, asked_mask)).abs().max() > 1e-3


# ---- recall at long length ----

@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_no_longer_than_a_chunk_is_written_as_one(name, attach):
    loaded, (ids, mask) = tiny(name), batch_of(token_rows((12, 7)))
    memories = []
    for chunk in (12, None):
        ttt = attach(loaded, layers=(1, 2), chunk=chunk)
        memories.append(write_once(loaded.model, ttt, ids, mask, differentiable=True)[1])
        ttt.detach()
    assert_same_memory(*memories)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_add_up_to_the_whole_text_but_for_the_conv_at_their_borders(name, attach):
    """The first TTT layer sees nothing of its own chunks. A conv that looks at its token alone then writes the same sum; one that looks one ahead misses
    a target at each border, here the 4th, 8th and 12th token of 13."""
    loaded, (ids, mask) = tiny(name), batch_of(token_rows((13,)))
    updates = {}
    for taps, chunk in itertools.product((2, 3), (4, None)):  # of 5: itself, and the next token
        ttt = attach(loaded, layers=(2,), chunk=chunk)
        conv = ttt.fast["2"].conv.data
        conv.copy_(torch.zeros_like(conv).index_fill_(1, torch.tensor([taps]), 1.0))
        updates[taps, chunk] = write_once(loaded.model, ttt, ids, mask)[1].layers[2].to_dense().update
        if (taps, chunk) == (3, None):
            inputs = []
            hook = ttt.down_proj(2).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
            hear = loaded.model.get_decoder().layers[2].mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
            run(loaded.model, ids, mask)
            hook.remove(), hear.remove()
            x, h = inputs
            missed = torch.einsum("sd,sf->df", x[0, [4, 8, 12]] @ ttt.fast["2"].proj, h[0, [3, 7, 11]])
        ttt.detach()
    torch.testing.assert_close(updates[2, 4], updates[2, None], atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(updates[3, 4], updates[3, None] - missed[None], atol=1e-12, rtol=1e-9)
    assert missed.norm() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("options", [dict(), dict(w_down=True)])
def test_the_gradient_of_recall_goes_through_what_earlier_chunks_changed(name, options, attach):
    """Finished chunks are read back while the rest is written, so the first layer's parts also change what the second one writes."""
    loaded = tiny(name)
    ttt = attach(loaded, layers=(1, 2), chunk=4, **options)
    square, slope = directional(lambda: recall_step(loaded, ttt, conversations(), CPU).loss, [p for n, p in ttt.named_parameters() if n.startswith("fast.1.")], size=1e-3)
    assert square > 1e-12 and slope == pytest.approx(square, rel=0.02)


@pytest.mark.parametrize("options", [dict(unit_keys=True, gate=True), dict(unit_keys=True, w_down=True)])
def test_recall_learns_chunk_by_chunk(options, attached):
    loaded, batch = tiny("tiny-qwen3", torch.float32), conversations()
    ttt = attached(loaded, layers=(0, 1, 2, 3), chunk=8, init="shift", **options)
    optimizer = torch.optim.AdamW([{"params": [p], "lr": 3e-4 if "down_delta" in name else 3e-2} for name, p in ttt.named_parameters()], weight_decay=0.0)
    losses = []
    for _ in range(60):
        step = recall_step(loaded, ttt, batch, CPU)
        step.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step.loss.item())
    swapped = Batch([replace(e, written=batch.examples[i - 1].written) for i, e in enumerate(batch.examples)])
    with torch.no_grad():
        other = recall_step(loaded, ttt, swapped, CPU)
    assert losses[-1] < losses[0] - 0.25 and losses[-1] < other.loss.item() - 0.25


def test_conversations_are_filled_with_whole_passages_up_to_the_length(a_short_bank):
    tokenizer = tiny("tiny-llama").tokenizer
    dataset = BankDataset(tokenizer, ("en", "zh"), 5, 4, 4, 0, shown=False, foreign=True, length=1500)
    lengths = [len(example.written) for update in range(5) for example in dataset[update].examples]
    assert len(lengths) == dataset.seen(0, 5) == 20 and max(lengths) <= 1500 and sum(lengths) / 20 > 1100
    text = tokenizer.decode(dataset[0].examples[0].written)
    inside = [passage for passage in training_bank.passages("en") if " ".join(passage.split()) in text]
    assert len(inside) >= 3
    foreign = [example for update in range(5) for example in dataset[update].foreign]
    assert foreign and all(example.prompt_tokens < 1500 for example in foreign)


@pytest.mark.parametrize("more", [(), ("--objective", "context"), ("--data", "needles")], ids=["recall", "context", "needles"])
def test_a_length_below_a_conversations_own_is_one_clear_line_before_anything_is_written(more, tmp_path, call):
    code, _, err = call(["train_minimal.py", "--model", "tiny-llama", "--out", tmp_path, "--updates", 2, "--conversations", 2, "--workers", 0, "--device", "cpu", "--length", 40,
                         *(more if "context" in more else ("--form", "study", "--groups", 1, "--chunk", 16, *more))])
    assert code == 2 and "--length 40: a conversation has " in err and "give a longer one, or leave --length out" in err and len(err.splitlines()) == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_later_conversation_longer_than_the_length_ends_the_training_in_one_line_and_keeps_its_checkpoint(workers, tmp_path, call, monkeypatch):
    drawn = BankDataset.__getitem__
    monkeypatch.setattr(BankDataset, "__getitem__", lambda self, update: drawn(self, update) if update < 2 else self.held([0] * 1501))
    code, _, err = call(command(tmp_path, "--form", "study", "--chunk", 128, "--length", 1500, "--layers", "1,2", "--save-every", 1, "--workers", workers))
    last = err.splitlines()[-1]
    assert code == 2 and last == ("train_minimal.py: --length 1500: a conversation has 1501 tokens by itself, and others may have more; give a longer one, "
                                  "or leave --length out") and "Traceback" not in err
    assert read_manifest(tmp_path / "a")["updates"] == 2 and len(log_rows(tmp_path / "a")) == 2


def test_recall_at_length_by_command(tmp_path, call):
    code, _, err = call(command(tmp_path, "--form", "study", "--chunk", 128, "--length", 900, "--layers", "1,2", updates=3))
    manifest = read_manifest(tmp_path / "a")
    assert code == 0 and manifest["frozen"] is True and manifest["ttt"]["chunk"] == 128 and manifest["optimizer"]["length"] == 900, err
    assert all(row["grad_norm"] > 0 for row in log_rows(tmp_path / "a"))


# ---- the rows of reproduce.py ----

def test_the_studys_rows_are_commands_that_the_scripts_take(tmp_path, monkeypatch):
    rows = [row for row in reproduce.ARMS.values() if "-study" in row.name]
    assert {f"{base}-{arm}" for base in ("smollm2", "qwen", "gemma3") for arm in ("study", "study-docs", "study-docs-wdown", "study-recall")} <= {row.name for row in rows}
    for row in rows:
        (training,), commands = reproduce.training(row, tmp_path), reproduce.questions(row, tmp_path)
        near, far, clipped = commands[:bool(row.long)], commands[bool(row.long):][:len(row.far)], commands[bool(row.long) + len(row.far):]
        assert len(near) == (not row.seed)  # further seeds are asked clipped alone
        monkeypatch.setattr("sys.argv", training)
        arguments = train_minimal.parse_arguments()
        config = train_minimal.ttt_config(arguments, arguments.row)
        assert config.w_down == row.name.endswith("wdown") and config.layers == arguments.row.study.layers and config.chunk < arguments.length
        assert arguments.objective == ("recall" if row.name.endswith("recall") else "lm") and train_minimal.parse_groups(arguments) if arguments.groups else True
        modes = ["ttt_empty"] * config.w_down + ["ttt_paper", "ttt_strict"]
        for asking in near:
            monkeypatch.setattr("sys.argv", asking)
            assert run_long.parse_arguments().modes == modes
        assert arguments.data == ("package-docs" if "-docs" in row.name else "bank")
        assert row.far == (() if row.seed or row.name.startswith("smollm2") else ("16384", "32768"))
        for length, again in zip(row.far, far):
            monkeypatch.setattr("sys.argv", again)
            asked = run_long.parse_arguments()
            assert asked.lengths == length and asked.clip is None and asked.modes == modes and asked.out.endswith(f"{row.name}-at-{length}")
        wanted = [(clip, count, *which, reproduce.SHORT) for clip, count in row.clips for which in (("ttt_paper", ""), ("ttt_foreign", "-foreign"))]
        wanted += [(clip, reproduce.FEW, "ttt_paper", f"-at-{length}", length) for clip, _ in row.clips for length in row.far]
        for (clip, count, mode, name, lengths), again in zip(wanted, clipped, strict=True):
            monkeypatch.setattr("sys.argv", again)
            asked = run_long.parse_arguments()
            assert asked.clip == float(clip) and asked.count == int(count) and asked.lengths == lengths and asked.modes == [mode] and asked.out.endswith(f"{row.name}-clip-{clip}{name}")
    arguments = types.SimpleNamespace(only=["smollm2-study"], out=tmp_path)
    folder = tmp_path / "results/long"
    folders = " ".join(str(folder / f"smollm2-study{more}") for more in ("", "-clip-0.001", "-clip-0.001-foreign"))
    assert reproduce.what_next(arguments) == f"python report_long.py {folders} --out {folder}"


@pytest.mark.parametrize("name", ["smollm2-deep", "qwen-deep", "gemma3-deep"])
def test_an_arm_goes_on_at_length_with_its_own_settings(name, tmp_path, monkeypatch):
    short, long = reproduce.ARMS[name], reproduce.ARMS[f"{name}-long"]
    configs = []
    for row in (short, long):
        monkeypatch.setattr("sys.argv", reproduce.training(row, tmp_path)[0])
        arguments = train_minimal.parse_arguments()
        configs.append(train_minimal.ttt_config(arguments, arguments.row))
    assert configs[0] == configs[1] and arguments.length == 2048 and arguments.start == str(tmp_path / short.checkpoint)


@pytest.mark.parametrize("name", ["smollm2-tuned", "qwen-tuned"])
def test_a_reader_goes_on_on_the_needles_of_the_memory_that_it_is_held_against(name, tmp_path, monkeypatch):
    row, memory = reproduce.ARMS[f"{name}-needles"], reproduce.ARMS[f"{name.replace('tuned', 'deep')}-needles"]
    parsed = []
    for one in (row, memory):
        monkeypatch.setattr("sys.argv", reproduce.training(one, tmp_path)[0])
        parsed.append(train_minimal.parse_arguments())
    reader, writer = parsed
    assert reader.objective == "context" and reader.start == str(tmp_path / f"checkpoints/{name}")
    assert all(getattr(reader, field) == getattr(writer, field) for field in ("data", "length", "updates", "conversations", "probes", "seed", "model"))
    asking, *further = reproduce.questions(row, tmp_path)
    assert len(further) == len(row.far)
    monkeypatch.setattr("sys.argv", asking)
    asked = run_long.parse_arguments()
    assert asked.modes == ["in_context_tuned"] and asked.tuned_adapter == str(tmp_path / row.checkpoint) and asked.lengths == reproduce.SHORT


def test_long_texts_that_are_answered_are_not_asked_again(tmp_path):
    row = reproduce.ARMS["smollm2-study-recall"]
    ((folder, *_),) = reproduce.long_runs(row, tmp_path)
    run_file = folder / "run.json"
    run_file.parent.mkdir(parents=True)
    whole = {"complete": True, "modes": ["in_context", "ttt_paper", "ttt_strict"], "tasks": ["mqar", "vt"], "lengths": [1024, 2048, 4096, 8192], "rows": 3 * 2 * 4 * 20,
             "command": "python run_long.py --count 20"}
    for change, left in (({"complete": False}, 1), ({"modes": ["ttt_paper"], "rows": 160}, 1), ({"lengths": [1024], "rows": 120}, 1), ({"rows": 96}, 1),
                         ({"command": "python run_long.py --tasks mqar,vt"}, 1), ({}, 0)):
        run_file.write_text(json.dumps(whole | change), encoding="utf-8")
        assert len(reproduce.questions(row, tmp_path)) == left
