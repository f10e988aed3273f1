"""The experiment on tiny models: what each condition writes and shows, what a row says, and that no answer depends on the company.

The models here have a random head of printable bytes of their own, so that different hidden states give different answers.
"""
import copy
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, hear_ctrl_c, strengthen
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import arms
import benchmark_file
import conditions
import evaluate
import prompts
import results_files
import run_experiment
from conditions import CONDITIONS, Condition
from in_place_ttt import InPlaceTTT, TTTConfig
from manifests import run_script, write_manifest
from model_utils import MODELS, byte_tokenizer, load_model, save_adapter
from train_minimal import LORA

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = byte_tokenizer()
FIELDS = {"sample_id", "level", "lang", "probe_id", "condition", "question", "gold", "aliases", "prediction", "prompt_tokens",
          "tokens_written", "chunks_written", "update_norm", "memory_bytes", "category", "position"}
THINGS = ("kettle", "ladder", "violin", "parcel", "old red bicycle", "map", "tent", "wheelbarrow", "lamp")
PLACES = ("attic", "cellar", "greenhouse", "boot room", "shed", "hall", "loft", "tower", "barn behind the mill")
CHUNK = 16


def sample(level, number, lang="en"):
    """Three facts, one a line, of different categories; 1 to 3 questions; conversations of a level have different lengths."""
    thing, place = THINGS[number % 9], PLACES[(number * 2 + level) % 9]
    lines = ([f"阿莉：{number}号箱子在{place}里。", f"包罗：好。它重{number + 3}公斤。", "阿莉：它归陈姨。"] if lang == "zh" else
             [f"Ari: The {thing} is in the {place}.", f"Bo: Good. It weighs {number + 30} kilos.", f"Ari: It belongs to Cleo{'o' * number}."])
    text, sample_id = "\n".join(lines), f"L{level}-{number:03d}-{lang}"
    starts = [sum(len(line) + 1 for line in lines[:i]) for i in range(3)]
    facts = [{"fact_id": f"f{i}", "fact_text": line, "category": category, "span": [starts[i], starts[i] + len(line)]}
             for i, (line, category) in enumerate(zip(lines, ("spatial", "numeric", "relational")))]
    if number == 1:
        del facts[1]["span"]
    required = [["f0", "f2"], ["f2", "f1"], ["f1", "f0"]] if level == 2 else [["f0"], ["f1"], ["f2"]]
    probes = [{"probe_id": f"{sample_id}-p{i}", "question": f"What of {thing}, {i}?", "gold_answer": f"{place}{i}",
               "required_facts": required[i]} | ({"aliases": [f"the {place}{i}"]} if i else {}) for i in range(1 + number % 3)]
    return {"sample_id": sample_id, "level": level, "lang": lang, "skeleton_id": "s", "conversation": text, "facts": facts,
            "probes": probes, "distractor": f"Rain fell for {number + 2} days. The river rose." if level == 3 else None}


def small_benchmark(path):
    """8 conversations of level 1, 3 of level 2 and 4 of level 3 in English, 2 of level 1 in Chinese."""
    samples = [sample(1, n) for n in range(8)] + [sample(2, n) for n in range(3)] + [sample(3, n) for n in range(4)] + [sample(1, n, "zh") for n in range(2)]
    path.write_text(json.dumps({"version": "1", "seed": 0, "samples": samples}, ensure_ascii=False), encoding="utf-8")
    return benchmark_file.load_benchmark(path)["samples"]


def save_tiny(folder, name, **config):
    """A tiny model as a folder, with weights large enough to listen to its context and a head that says printable bytes."""
    settings = copy.deepcopy(MODELS[name].config)
    for field, value in {"tie_word_embeddings": False, "initializer_range": 0.15, **config}.items():
        setattr(settings, field, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings)
    printable = torch.tensor([TOKENIZER.convert_tokens_to_ids(chr(c)) for c in range(33, 127)])
    head = torch.zeros_like(model.lm_head.weight.data)
    head[printable] = torch.randn(len(printable), head.shape[1], generator=torch.Generator().manual_seed(1))
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def manifest(loaded, config, **more):
    return {"arm": "test", "model": loaded.row.name, "model_sha256": loaded.sha256, "objective": "recall", "frozen": True, "seed": 3,
            "ttt": config and config.to_dict(), "lora": None, "data_sha256": "0", "updates": 3, "conversations_seen": 12} | more


def save_fast_weights(folder, model, chunk=CHUNK, change=strengthen, files=(), **more):
    """A checkpoint as train_minimal.py leaves one, with strong random fast weights (or, with change=None, untrained ones)."""
    loaded, config = load_model(model), TTTConfig((1, 2), chunk, unit_keys=True, gate=True)
    ttt = InPlaceTTT(loaded.model, config)
    save_adapter(folder, change(ttt) if change else ttt, manifest(loaded, config, **more), list(files))
    return str(folder)


def save_joint(folder, model):
    """A joint arm's checkpoint: fast weights, and a LoRA on the base."""
    folder.mkdir(parents=True)
    arms.save_lora(folder, get_peft_model(load_model(model).model, LoraConfig(task_type="CAUSAL_LM", **LORA)))
    return save_fast_weights(folder, model, files=arms.LORA_FILES, frozen=False, lora=LORA)


def save_lora(folder, model, strength=0.3):
    loaded = load_model(model)
    lora = get_peft_model(loaded.model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * strength
    lora.save_pretrained(folder / "lora")
    write_manifest(folder, manifest(loaded, None, objective="context", frozen=False, lora=LORA), arms.LORA_FILES)
    return str(folder)


def command(out, *more):
    return ["run_experiment.py", "--out", str(out), "--device", "cpu", *map(str, more)]


def run_command(argv, patch):
    """run_experiment.py in this process; answers are cut short, because a tiny model never ends one."""
    patch.setattr(sys, "argv", argv)
    patch.setattr(conditions, "MAX_NEW_TOKENS", 8)
    try:
        run_script(run_experiment.main)
    except SystemExit as stop:
        return stop.code
    return 0


def read_rows(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").split("\n") if line]


def by_probe(rows):
    return {(r["condition"], r["probe_id"]): r for r in rows}


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """kit(name) -> (model folder, adapter) of a family; kit.benchmark, kit.samples."""
    root = tmp_path_factory.mktemp("kit")

    @functools.cache
    def make(name):
        model = save_tiny(root / name, name)
        return model, save_fast_weights(root / f"{name}-adapter", model)

    make.root, make.benchmark = root, root / "benchmark.json"
    make.samples = small_benchmark(make.benchmark)
    make.tuned = functools.cache(lambda: save_lora(root / "tuned", make("tiny-llama")[0]))
    return make


@pytest.fixture
def call(monkeypatch, capsys):
    """call(argv) -> (exit code, stdout, stderr)"""
    def run(argv):
        code = run_command(argv, monkeypatch)
        return code, *capsys.readouterr()

    return run


class Whole:
    """One run of every condition on tiny-llama, and every text that went into the model on the way."""

    def __init__(self, kit):
        self.samples = {s["sample_id"]: s for s in kit.samples if s["lang"] == "en"}
        self.out, self.calls, self.job = kit.root / "whole", [], None
        model, adapter = kit("tiny-llama")
        with pytest.MonkeyPatch.context() as patch:
            answer = run_experiment.answer
            patch.setattr(run_experiment, "answer", lambda loaded, ttt, job, texts: self.begin(job) or answer(loaded, ttt, job, texts))
            for name, at, kind in (("write_rows", 2, "written"), ("prefill", 1, "read"), ("heard", 1, "read"), ("answers_to", 2, "read")):
                patch.setattr(conditions, name, self.watched(kind, getattr(conditions, name), at))
            self.code = run_command(command(self.out, "--model", model, "--adapter", adapter, "--tuned-adapter", kit.tuned(), "--lang", "en",
                                            "--benchmark", kit.benchmark, "--conditions", ",".join(CONDITIONS), "--batch-size", 16), patch)
        self.rows, self.run = read_rows(self.out), json.loads((self.out / "run.json").read_text(encoding="utf-8"))
        self.by_probe = by_probe(self.rows)

    def begin(self, job):
        self.job = {"job": job, "written": [], "read": []}
        self.calls.append(self.job)

    def watched(self, kind, function, at):
        def watch(*arguments, **named):
            self.job[kind].append([TOKENIZER.decode(row) for row in arguments[at]])
            return function(*arguments, **named)
        return watch

    def texts(self, condition):
        """{sample_id: (texts written, the prompt before the questions, the questions)} of a condition."""
        found = {}
        for call in (c for c in self.calls if c["job"].condition.name == condition):
            (heads, tails), width = call["read"], call["job"].width
            for i, s in enumerate(call["job"].samples):
                found[s["sample_id"]] = [rows[i] for rows in call["written"]], heads[i], tails[i * width:(i + 1) * width]
        return found

    def level(self, *levels):
        return {k: s for k, s in self.samples.items() if s["level"] in levels}


@pytest.fixture(scope="module")
def whole(kit):
    return Whole(kit)


# ---- the table ----

def test_the_table_of_conditions_is_the_designs():
    conversation, both = "conversation", "distractor"
    expected = [Condition("A_context", (1, 2, 3), None, conversation), Condition("A_distractor", (3,), None, both),
                Condition("A_tuned", (1, 2, 3), None, conversation, tuned=True), Condition("B_memory", (1, 2, 3), conversation),
                Condition("C_nothing", (1, 2, 3)), Condition("D_distractor", (3,), both), Condition("B_swapped", (1, 2, 3), "swapped"),
                *(Condition(f"B_merged_{k}", (1,), "merged", merge=k) for k in (2, 4, 8)),
                Condition("P_paper", (1, 2, 3), conversation, conversation, one_pass=True), Condition("N_noise", (1, 2), "noise"),
                Condition("A_foreign", (1, 2, 3), "swapped", conversation), *(Condition(f"D_{n}", (3,), both, distractor_tokens=n) for n in (512, 1024, 2048)),
                *(Condition(f"B_rank_{k}", (1,), conversation, rank=k) for k in (1, 4, 16, 64)), Condition("B_half", (1,), conversation, half=True),
                *(Condition(f"B_scale_{x:g}", (1,), conversation, scale=x) for x in (0.01, 0.1, 0.3, 3, 10)),
                *(Condition(f"N_scale_{x:g}", (1,), "noise", scale=x) for x in (0.01, 0.1, 0.3, 3, 10))]
    assert list(CONDITIONS.values()) == expected and list(CONDITIONS) == [c.name for c in expected]
    assert set(CONDITIONS) == set(results_files.CONDITIONS)


PLAIN = [name for name in CONDITIONS if CONDITIONS[name].merge == 1 and CONDITIONS[name].written != "swapped"]


@pytest.mark.parametrize("name", PLAIN)
def test_what_a_condition_writes_and_shows(whole, name):
    """Seen from the model: every text that goes in, decoded, against the design's table."""
    condition, found = CONDITIONS[name], whole.texts(name)
    form = prompts.FORMS["en"]
    assert set(found) == set(whole.level(*condition.levels))
    for sample_id, (written, head, tails) in found.items():
        s = whole.samples[sample_id]
        content = {None: [], "conversation": [s["conversation"]], "noise": [s["conversation"]],
                   "distractor": [f"{s['conversation']}\n\n{s['distractor']}"]}
        if condition.distractor_tokens is None:
            assert written == content[condition.written]
        else:  # a byte is a token here
            kept = len(f"{s['conversation']}\n\n".encode()) + condition.distractor_tokens
            assert [text.encode() for text in written] == [text.encode()[:kept] for text in content["distractor"]]
        shown = "".join(content[condition.shown]) if not condition.one_pass else ""
        assert head == form.example + (form.header if condition.shown else "") + shown
        assert list(dict.fromkeys(tails)) == [form.question.format(question=p["question"]) for p in s["probes"]]


def test_a_swapped_memory_is_another_samples_and_never_its_own(whole):
    found = whole.texts("B_swapped")
    assert set(found) == set(whole.samples)
    for level in (1, 2, 3):
        own = {k: s["conversation"] for k, s in whole.level(level).items()}
        written = {k: found[k][0] for k in own}
        assert all(len(texts) == 1 and texts[0] != own[k] and texts[0] in own.values() for k, texts in written.items())
        assert len({texts[0] for texts in written.values()}) == len(own)  # everybody's memory is somebody's


def test_a_foreign_memory_stands_beside_the_own_text(whole):
    found, swapped = whole.texts("A_foreign"), whole.texts("B_swapped")
    assert set(found) == set(whole.samples)
    for sample_id, (written, head, _) in found.items():
        assert written == swapped[sample_id][0] and head.endswith(prompts.FORMS["en"].header + whole.samples[sample_id]["conversation"])


@pytest.mark.parametrize("k", [2, 4, 8])
def test_a_merged_memory_holds_k_conversations_its_own_among_them(whole, k):
    found, own = whole.texts(f"B_merged_{k}"), {i: s["conversation"] for i, s in whole.level(1).items()}
    assert set(found) == set(own)
    for sample_id, (written, _, _) in found.items():
        assert len(written) == len(set(written)) == k and own[sample_id] in written and set(written) <= set(own.values())
        for row in (r for r in whole.rows if r["condition"] == f"B_merged_{k}" and r["sample_id"] == sample_id):
            assert row["tokens_written"] == sum(len(text.encode()) for text in written)


# ---- the rows ----

def test_rows_have_exactly_the_documented_fields(whole):
    assert whole.code == 0
    kinds = {"level": int, "aliases": list, "prompt_tokens": int, "tokens_written": int, "chunks_written": int}
    for row in whole.rows:
        assert set(row) == FIELDS
        assert all(type(row[name]) is kinds.get(name, str) for name in FIELDS - {"update_norm", "memory_bytes", "position"})
        assert row["prediction"] == row["prediction"].strip() and "\n" not in row["prediction"]


def test_every_probe_is_asked_once_under_every_condition_of_its_level(whole):
    wanted = sorted((c.name, s["sample_id"], p["probe_id"]) for c in CONDITIONS.values() for s in whole.level(*c.levels).values() for p in s["probes"])
    assert sorted((r["condition"], r["sample_id"], r["probe_id"]) for r in whole.rows) == wanted


def test_rows_say_what_the_benchmark_says(whole):
    for row in whole.rows:
        s = whole.samples[row["sample_id"]]
        probe = next(p for p in s["probes"] if p["probe_id"] == row["probe_id"])
        assert (row["level"], row["lang"], row["question"], row["gold"], row["aliases"]) == \
            (s["level"], "en", probe["question"], probe["gold_answer"], probe.get("aliases", []))


def test_prompt_tokens_show_whether_the_conversation_is_in_the_prompt(whole):
    header = len(prompts.FORMS["en"].header)
    for (condition, probe_id), row in whole.by_probe.items():
        nothing, s = whole.by_probe["C_nothing", probe_id], whole.samples[row["sample_id"]]
        text = {None: 0, "conversation": len(s["conversation"]), "distractor": len(s["conversation"]) + 2 + len(s["distractor"] or "")}
        shown = CONDITIONS[condition].shown
        assert row["prompt_tokens"] == nothing["prompt_tokens"] + text[shown] + (header if shown else 0)
    row = whole.by_probe["C_nothing", "L1-000-en-p0"]
    form = prompts.FORMS["en"]
    assert row["prompt_tokens"] == len(form.example + form.question.format(question=row["question"]))


def test_tokens_and_chunks_written_are_the_texts(whole):
    for (condition, _), row in whole.by_probe.items():
        s, what = whole.samples[row["sample_id"]], CONDITIONS[condition].written
        tokens = {None: 0, "conversation": len(s["conversation"]), "distractor": len(s["conversation"]) + 2 + len(s["distractor"] or "")}
        if what is None:
            assert (row["tokens_written"], row["chunks_written"], row["update_norm"], row["memory_bytes"]) == (0, 0, None, None)
        elif what in tokens:
            assert (row["tokens_written"], row["chunks_written"]) == (tokens[what], -(-tokens[what] // CHUNK)) and row["update_norm"] > 0 < row["memory_bytes"]


def test_noise_has_the_norm_of_the_memory_and_not_its_answers(whole):
    rows = [r for r in whole.rows if r["condition"] == "N_noise"]
    pairs = [(r, whole.by_probe["B_memory", r["probe_id"]]) for r in rows]
    assert all(r["update_norm"] == pytest.approx(b["update_norm"], rel=1e-4) for r, b in pairs)
    assert sum(r["prediction"] != b["prediction"] for r, b in pairs) > len(pairs) / 2


def test_a_scaled_memory_or_noise_has_so_many_times_the_norm(whole):
    for name, scaled in (("B_memory", "B_scale"), ("N_noise", "N_scale")):
        rows = [r for r in whole.rows if r["condition"].startswith(scaled)]
        assert {r["condition"] for r in rows} == {f"{scaled}_{factor}" for factor in results_files.SCALES} and {r["level"] for r in rows} == {1}
        for r in rows:
            factor = float(r["condition"].rsplit("_", 1)[1])
            assert r["update_norm"] == pytest.approx(factor * whole.by_probe[name, r["probe_id"]]["update_norm"], rel=1e-3, abs=2e-6)
    weak = [(r["prediction"], whole.by_probe["C_nothing", r["probe_id"]]["prediction"]) for r in whole.rows if r["condition"] == "N_scale_0.01"]
    assert sum(one == other for one, other in weak) > len(weak) / 2  # a hundredth of the norm is hardly felt


def test_conditions_answer_differently(whole):
    """The models of these tests are sensitive to what they are given; else equal answers below would mean nothing."""
    answers = lambda name: [r["prediction"] for r in sorted(whole.rows, key=lambda r: r["probe_id"]) if r["condition"] == name and r["level"] == 3]
    # a distractor is short here, so D of every length is D; and a swapped memory as strong as the test's drowns the text beside it
    names = [c.name for c in CONDITIONS.values() if 3 in c.levels and c.name not in (*results_files.ON_CURVES, "A_foreign")]
    assert len({tuple(answers(name)) for name in names}) == len(names) and len(set(answers("B_memory"))) > 2


def test_category_and_position_are_those_of_the_last_required_fact(whole):
    got = {r["probe_id"]: (r["category"], r["position"]) for r in whole.rows}
    assert [got[f"L1-002-en-p{i}"] for i in range(3)] == [("spatial", "front"), ("numeric", "middle"), ("relational", "back")]
    assert [got[f"L2-002-en-p{i}"] for i in range(3)] == [("relational", "back"), ("numeric", "middle"), ("spatial", "front")]
    assert got["L1-001-en-p1"] == ("numeric", None)  # a file without spans


@pytest.mark.parametrize("span, third", [((0, 2), "front"), ((0, 33), "front"), ((31, 34), "front"), ((33, 34), "middle"), ((64, 67), "middle"),
                                         ((66, 67), "back"), ((98, 99), "back"), ((0, 99), "middle")])
def test_thirds_go_by_the_middle_of_the_span(span, third):
    assert conditions.position({"span": list(span)}, {"conversation": "x" * 99}) == third


def test_run_json_has_what_is_needed_to_repeat_the_run(whole, kit):
    run = whole.run
    model, adapter = kit("tiny-llama")
    assert run["complete"] is True and run["rows"] == len(whole.rows) and run["conditions"] == sorted(CONDITIONS)
    assert (run["arm"], run["model"], run["adapter"], run["objective"], run["seed"], run["frozen"]) == ("test", model, adapter, "recall", 3, True)
    assert run["model_sha256"] == load_model(model).sha256 and run["ttt"]["chunk"] == CHUNK and run["tuned_adapter"] == kit.tuned()
    assert run["benchmark"] == {"file": str(kit.benchmark), "sha256": benchmark_file.sha256_of(kit.benchmark)}
    assert run["levels"] == [1, 2, 3] and run["langs"] == ["en"] and run["limit"] is None and run["dtype"] == "float32" and run["device"] == "cpu"
    assert run["command"].startswith("python run_experiment.py --out") and run["batch_size"] == 16 and "torch" in run["versions"] and run["commit"]
    assert run["base_parameters"] == load_model(model).parameters and run["snapshot_of"] is None
    assert run["conversations_seen"] == 12
    config = load_model(model).model.config
    assert run["kv_bytes_per_token"] == 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4


# ---- what may not make a difference ----

def test_a_memory_that_is_empty_answers_as_no_memory_and_no_text(kit, call, tmp_path):
    """An untrained adapter writes zeros: if anything else of the text reached the answers, B could not be C."""
    model, _ = kit("tiny-llama")
    loaded, config = load_model(model), TTTConfig((1, 2), CHUNK)
    save_adapter(tmp_path / "untrained", InPlaceTTT(loaded.model, config), manifest(loaded, config))
    names = [n for n in CONDITIONS if n not in ("A_tuned", "A_distractor")]
    code, *_ = call(command(tmp_path / "out", "--model", model, "--adapter", tmp_path / "untrained", "--lang", "en", "--benchmark", kit.benchmark,
                            "--conditions", ",".join(names), "--limit", 3))
    assert code == 0
    found = by_probe(read_rows(tmp_path / "out"))
    for (condition, probe_id), row in found.items():
        same = "A_context" if CONDITIONS[condition].shown else "C_nothing"
        assert row["prediction"] == found[same, probe_id]["prediction"], (condition, probe_id)
        assert row["update_norm"] in (None, 0.0)


MIXED = ("A_context", "B_memory", "D_distractor", "B_merged_2", "P_paper", "N_noise")


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_do_not_depend_on_the_batch_size(kit, call, name, tmp_path):
    model, adapter = kit(name)
    common = ("--model", model, "--adapter", adapter, "--lang", "en", "--benchmark", kit.benchmark, "--levels", "1,3", "--limit", 3,
              "--conditions", ",".join(MIXED), "--dtype", "float32")
    assert call(command(tmp_path / "one", *common, "--batch-size", 1))[0] == call(command(tmp_path / "many", *common, "--batch-size", 16))[0] == 0
    one, many = (by_probe(read_rows(tmp_path / folder)) for folder in ("one", "many"))
    assert set(one) == set(many) and len({r["prediction"] for r in one.values()}) > 8
    for key, row in one.items():
        close = {"update_norm": pytest.approx(row["update_norm"], rel=1e-3) if row["update_norm"] is not None else None}
        assert many[key] == row | close, key


def test_partners_come_from_the_whole_file_whatever_the_limit(whole, kit, call, tmp_path):
    model, adapter = kit("tiny-llama")
    call(command(tmp_path, "--model", model, "--adapter", adapter, "--lang", "en", "--benchmark", kit.benchmark, "--limit", 1,
                 "--conditions", "B_swapped,B_merged_4,N_noise"))
    found = by_probe(read_rows(tmp_path))
    assert {r["sample_id"] for r in found.values()} == {"L1-000-en", "L2-000-en", "L3-000-en"}
    for key, row in found.items():
        assert row["prediction"] == whole.by_probe[key]["prediction"] and row["tokens_written"] == whole.by_probe[key]["tokens_written"]


def test_a_small_batch_of_tokens_gives_the_same_answers(whole, kit, call, tmp_path, monkeypatch):
    monkeypatch.setattr(conditions, "MAX_BATCH_TOKENS", 150)
    model, adapter = kit("tiny-llama")
    call(command(tmp_path, "--model", model, "--adapter", adapter, "--lang", "en", "--benchmark", kit.benchmark, "--levels", "3",
                 "--conditions", "D_distractor,A_distractor"))
    found = by_probe(read_rows(tmp_path))
    assert len(found) == 14 and all(row["prediction"] == whole.by_probe[key]["prediction"] for key, row in found.items())


# ---- every family, and the step after ----

@pytest.mark.parametrize("name", FAMILIES)
def test_the_rows_of_the_model_table_run_through_the_same_command(kit, call, name, tmp_path):
    """Both languages, the row's own settings (one chunk), and the scorer reads what comes out."""
    adapter = save_fast_weights(tmp_path / "adapter", name, chunk=None)
    code, out, _ = call(command(tmp_path / "run", "--model", name, "--adapter", adapter, "--benchmark", kit.benchmark, "--limit", 2))
    rows = read_rows(tmp_path / "run")
    assert code == 0 and "evaluate.py" in out and {r["lang"] for r in rows} == {"en", "zh"}
    assert {r["condition"] for r in rows} == set(run_experiment.DEFAULT_CONDITIONS.split(","))
    assert all(r["chunks_written"] == (1 if CONDITIONS[r["condition"]].written else 0) for r in rows)
    assert json.loads((tmp_path / "run/run.json").read_text(encoding="utf-8"))["langs"] == ["en", "zh"]


def test_evaluate_scores_what_comes_out(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.plots, "draw_all", lambda report, curves, folder: [])
    assert evaluate.main([str(whole.out), "--out", str(tmp_path), "--resamples", "100", "--quiet"]) == 0
    arm, = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["arms"]
    counts = {c: {level: arm["conditions"][c][str(level)]["en"]["n"] for level in CONDITIONS[c].levels} for c in CONDITIONS}
    probes = {level: sum(len(s["probes"]) for s in whole.level(level).values()) for level in (1, 2, 3)}
    assert counts == {c: {level: probes[level] for level in CONDITIONS[c].levels} for c in CONDITIONS}


# ---- interruption ----

RESUMED = ("--conditions", "C_nothing,B_memory,B_swapped,A_context", "--lang", "en", "--levels", "1,2", "--limit", "3", "--batch-size", "1")


@pytest.fixture(scope="module")
def straight(kit):
    """The uninterrupted run that resumed ones must equal."""
    model, adapter = kit("tiny-llama")
    with pytest.MonkeyPatch.context() as patch:
        assert run_command(command(kit.root / "straight", "--model", model, "--adapter", adapter, "--benchmark", kit.benchmark, *RESUMED), patch) == 0
    return read_rows(kit.root / "straight")


def ordered(rows):
    return sorted(rows, key=lambda r: (r["condition"], r["probe_id"]))


def of_any_batch(rows):
    """The rows in order, to compare with those of other batches: what is said is the same, the norm of the update to a rounding."""
    return [row | {"update_norm": row["update_norm"] and pytest.approx(row["update_norm"], rel=1e-4)} for row in ordered(rows)]


def assert_resumed(out, argv, call, straight):
    """The run is unfinished; resumed, it has the rows of the uninterrupted one, each once, those it had untouched."""
    before = (out / "predictions.jsonl").read_bytes()
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["complete"] is False and 0 < before.count(b"\n") < len(straight)
    with (out / "predictions.jsonl").open("ab") as file:
        file.write('{"sample_id": "\u00e4'.encode()[:-1])  # a row cut in the middle of a letter
    assert call([*argv, "--resume"])[0] == 0
    assert (out / "predictions.jsonl").read_bytes().startswith(before) and ordered(read_rows(out)) == ordered(straight)
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert run["complete"] is True and run["rows"] == len(straight)


@pytest.mark.parametrize("room", [16, 5, 1])
def test_out_of_memory_halves_the_batch_says_so_and_changes_no_answer(kit, call, straight, tmp_path, monkeypatch, room):
    model, adapter = kit("tiny-llama")
    answer, tried = run_experiment.answer, []

    def small(loaded, ttt, job, texts):
        tried.append((job.condition.name, job.count))
        if job.count > room:
            raise torch.OutOfMemoryError("no room")
        return answer(loaded, ttt, job, texts)

    monkeypatch.setattr(run_experiment, "answer", small)
    code, _, err = call(command(tmp_path, "--model", model, "--adapter", adapter, "--benchmark", kit.benchmark, *RESUMED, "--batch-size", "16"))
    assert code == 0 and ordered(read_rows(tmp_path)) == of_any_batch(straight)
    failed = [(name, count) for name, count in tried if count > room]
    assert err.count("out of memory at") == len(failed) and all(f"out of memory at {count} questions of {name}" in err for name, count in failed)
    for name in {name for name, _ in failed}:  # each size is tried once, not by every batch that has it
        sizes = [count for other, count in failed if other == name]
        assert sizes == sorted(set(sizes), reverse=True)
    assert bool(failed) == (room < 16)


def test_no_memory_for_one_question_is_one_clear_error(kit, call, tmp_path, monkeypatch):
    def none(*arguments):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(run_experiment, "answer", none)
    model, adapter = kit("tiny-llama")
    code, _, err = call(command(tmp_path, "--model", model, "--adapter", adapter, "--benchmark", kit.benchmark, *RESUMED))
    assert code == 2 and "no memory for one question; use dtype bfloat16" in err.splitlines()[-1] and "Traceback" not in err
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["complete"] is False


def test_an_interrupted_run_goes_on_where_it_stopped(kit, call, straight, tmp_path, monkeypatch):
    model, adapter = kit("tiny-llama")
    argv = command(tmp_path, "--model", model, "--adapter", adapter, "--benchmark", kit.benchmark, *RESUMED)
    answer, calls = run_experiment.answer, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return answer(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_experiment, "answer", interrupted)
        code, _, err = call(argv)
    assert code == 130 and f"the answers so far are in {tmp_path}" in err
    assert err.rstrip().splitlines()[-1].strip() == f"python {' '.join(argv)} --resume"
    assert_resumed(tmp_path, argv, call, straight)
    code, *_ = call([*argv, "--resume"])  # nothing is left to do, and nothing is done
    assert code == 0 and ordered(read_rows(tmp_path)) == ordered(straight)


ANSWER = run_experiment.answer


def interrupt_main():
    raise KeyboardInterrupt


SHORT = "import conditions, run_experiment, manifests; conditions.MAX_NEW_TOKENS = 8; manifests.run_script(run_experiment.main)"


def test_ctrl_c_keeps_the_rows_and_says_how_to_go_on(kit, call, straight, tmp_path):
    """A real signal to a real process, and the run goes on from whatever it left."""
    model, adapter = kit("tiny-llama")
    argv = command(tmp_path / "out", "--model", model, "--adapter", adapter, "--benchmark", kit.benchmark, *RESUMED)
    process = subprocess.Popen([sys.executable, "-c", SHORT, *argv[1:]], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               preexec_fn=hear_ctrl_c)
    rows, deadline = tmp_path / "out/predictions.jsonl", time.time() + 90
    while not (rows.exists() and rows.stat().st_size) and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted: the answers so far are in" in err and "--resume" in err.splitlines()[-1] and "Traceback" not in err
    assert_resumed(tmp_path / "out", argv, call, straight)


def test_a_resumed_run_may_ask_for_more(kit, call, straight, tmp_path):
    model, adapter = kit("tiny-llama")
    argv = command(tmp_path, "--model", model, "--adapter", adapter, "--benchmark", kit.benchmark, "--lang", "en")
    assert call([*argv, "--limit", "2", "--levels", "1", "--conditions", "B_memory"])[0] == 0
    assert call([*argv, *RESUMED, "--resume"])[0] == 0
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert ordered(read_rows(tmp_path)) == of_any_batch(straight) and run["levels"] == [1, 2] and run["rows"] == len(straight)
    assert call([*argv, "--limit", "1", "--levels", "1", "--conditions", "B_memory", "--resume"])[0] == 0
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["limit"] == 3  # what the rows cover, not what was asked last


def test_a_run_is_complete_only_when_nothing_that_was_begun_is_missing(kit, call, tmp_path, monkeypatch):
    """Something else asked in between, and ended, does not make it so; the same or a wider call does."""
    model, adapter = kit("tiny-llama")
    argv = command(tmp_path, "--model", model, "--adapter", adapter, "--benchmark", kit.benchmark, "--lang", "en", "--levels", "1", "--limit", "2")
    state = lambda: (lambda run: (run["complete"], [one["conditions"] for one in run["unfinished"]]))(json.loads((tmp_path / "run.json").read_text(encoding="utf-8")))
    begun = [*argv, "--conditions", "C_nothing,B_memory"]
    with monkeypatch.context() as patch:
        patch.setattr(run_experiment, "answer", lambda loaded, ttt, job, texts: interrupt_main() if job.condition.name == "B_memory" else ANSWER(loaded, ttt, job, texts))
        assert call(begun)[0] == 130
    assert state() == (False, [["C_nothing", "B_memory"]])
    code, out, _ = call([*argv, "--conditions", "A_context", "--resume"])
    assert code == 0 and state() == (False, [["C_nothing", "B_memory"]]) and out.rstrip().splitlines()[-2].strip() == f"python {' '.join(begun)} --resume"
    assert {row["condition"] for row in read_rows(tmp_path)} == {"C_nothing", "A_context"}
    with pytest.raises(results_files.ResultsError, match="'complete' is false.*'unfinished'"):
        results_files.load_run(tmp_path, False)
    assert call([*argv, "--conditions", "B_memory", "--resume"])[0] == 0 and state()[0] is False  # a part of it is not all of it
    assert call([*argv[:-1], "3", "--conditions", "B_memory,C_nothing", "--resume"])[0] == 0 and state() == (True, [])
    assert len(results_files.load_run(tmp_path, False)["predictions"]) == len(read_rows(tmp_path))


def test_a_condition_named_twice_is_asked_once(kit, call, tmp_path):
    model, _ = kit("tiny-llama")
    code, *_ = call(command(tmp_path, "--model", model, "--benchmark", kit.benchmark, "--levels", "2", "--lang", "en", "--conditions", "C_nothing,C_nothing"))
    assert code == 2 or len(read_rows(tmp_path)) == 6


def refused(call, argv, out, *parts):
    """Exit code 2, one line that names each part, and the folder as it was."""
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    code, _, err = call(argv)
    assert code == 2 and len(err.splitlines()) == 1 and all(part in err for part in map(str, parts)), err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_results_of_something_else_are_not_mixed(kit, call, tmp_path):
    model, adapter = kit("tiny-llama")
    common = ("--lang", "en", "--levels", "2", "--limit", "1", "--conditions", "C_nothing")
    argv = lambda *more: command(tmp_path / "out", "--model", model, "--adapter", adapter, "--benchmark", kit.benchmark, *common, *more)
    assert call(argv())[0] == 0
    refused(call, argv(), tmp_path / "out", tmp_path / "out", "already holds results", "--resume")
    other = tmp_path / "other.json"
    other.write_bytes(kit.benchmark.read_bytes() + b"\n")
    refused(call, argv("--resume", "--benchmark", other), tmp_path / "out", tmp_path / "out", "another benchmark", "--out")
    weaker = save_fast_weights(tmp_path / "weaker", model, change=lambda ttt: strengthen(ttt, seed=2))
    refused(call, argv("--resume", "--adapter", weaker), tmp_path / "out", "another adapter")
    refused(call, argv("--resume", "--dtype", "bfloat16"), tmp_path / "out", "another dtype")
    assert call(argv("--resume"))[0] == 0
