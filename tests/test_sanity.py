"""sanity.py as a user runs it, and proof that each of its checks can fail: one sabotage each, seen by the named check."""
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import strengthen

import benchmark_file
import sanity
import sessions
from decoding import prefill, reading
from in_place_ttt import FastWeight, InPlaceTTT, Reader, TTTConfig, TTTMLP, Writer
from manifests import provenance, run_script
from memory import LayerMemory, Memory
from model_utils import load_model, save_adapter

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def samples():
    """A few short conversations of unlike lengths; the checks need no good ones."""
    people = ("Ada", "Bo", "Chandra", "Dov", "Edith", "Femi")
    return [{"sample_id": f"L1-{i:03d}-en", "lang": "en", "conversation": f"{name}: My desk is number {17 * i + 3}." + " It is fine." * i,
             "probes": [{"probe_id": str(j), "question": f"What is {name}'s desk, asked {j} times?", "gold_answer": f"{17 * i + 3}", "aliases": []}
                        for j in range(3)]} for i, name in enumerate(people)]


@pytest.fixture
def setup(samples, monkeypatch):
    monkeypatch.setattr(sanity, "READ_TOKENS", 8)
    ready = sanity.prepare(load_model("tiny-llama"), samples, None)
    for fast in ready.ttt.fast.values():  # the untrained start is too weak to change an answer about texts this short
        fast.proj.mul_(20)
    return ready


def outcome(setup, check):
    return getattr(sanity, check)(setup)


@pytest.fixture(params=["plain", "codes"])
def either_form(request, setup, samples, monkeypatch):
    """The prepared sanity run of each form; the codes are strengthened, since an untrained gate is nearly shut."""
    if request.param == "plain":
        return setup
    setup.ttt.detach()
    row = setup.loaded.row
    ready = sanity.prepare(replace(setup.loaded, row=replace(row, plain=row.codes)), samples, None)
    for fast in ready.ttt.fast.values():
        fast.value_unit.fill_(5.0)
    return ready


@pytest.mark.parametrize("check", [check.__name__ for check in sanity.CHECKS])
def test_every_check_passes_on_working_code(either_form, check):
    result = outcome(either_form, check)
    assert result.passed, result


# ---- sabotage: (check that must see it, what is broken) ----

def patch(owner, name, wrap):
    """A sabotage that wraps owner.name: wrap(original) -> replacement."""
    return lambda monkeypatch, setup: monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))


def drop_the_flush(original):
    def memory(self, *group):
        for held in self.pending.values():
            held.fresh = torch.zeros_like(held.fresh)
        return original(self, *group)
    return memory


def write_while_reading(original):
    def layer(self, index, x, h):
        next(iter(self.memory.layers[index].tensors().values())).mul_(1.001)
        return original(self, index, x, h)
    return layer


def touch_the_base(original):
    def memory(self):
        self.owner.down_proj(self.owner.config.layers[0]).weight[0, 0] += 1e-3
        return original(self)
    return memory


def leak_the_past(original):
    """write_rows whose text stays in reach: the next prompt is read behind the cache it left."""
    def write_rows(*arguments, **options):
        memory, past = original(*arguments, **options | {"dropped": False})
        def heard(model, rows, pad_id, ttt=None, memory=None):
            with reading(ttt, memory) as session:
                return prefill(model, rows, pad_id, past, session)[1]
        sanity.heard = heard
        return memory, past
    return write_rows


def misread_the_file(original):
    return staticmethod(lambda path, device: original(path, device).scale(0.5))


def keep_the_first_text(original):
    first = []
    def write(setup, rows):
        first.extend(rows[:1])
        return original(setup, first[:1] * len(rows))
    return write


SABOTAGE = {
    "nothing is written": ("writing_changes_the_weights", patch(FastWeight, "contents", lambda f: lambda *a: 0 * f(*a))),
    "not a number is written": ("writing_changes_the_weights", patch(FastWeight, "contents", lambda f: lambda *a: f(*a) / 0)),
    "the memory is not read": ("memory_changes_answers", patch(Reader, "layer", lambda f: lambda *a: None)),
    "an offset while reading": ("empty_memory_is_no_memory", patch(LayerMemory, "read", lambda f: lambda *a: f(*a) + 1e-3)),
    "the text stays in the cache": ("empty_memory_is_no_memory", patch(sanity, "write_rows", leak_the_past)),
    "the file is misread": ("saved_memory_answers_the_same", patch(Memory, "load", misread_the_file)),
    "the last chunk is lost": ("sequential_equals_parallel", patch(Writer, "memory", drop_the_flush)),
    "a chunk reads itself": ("sequential_equals_parallel", patch(sessions, "chunk_of", lambda f: lambda p, c: f(p, c and c + 1))),
    "the conv looks one token off": ("sequential_equals_parallel", patch(FastWeight, "contents", lambda f: lambda s, held: f(s, replace(held, x=held.x.roll(1, 1))))),
    "reading writes": ("reading_does_not_write", patch(Reader, "layer", write_while_reading)),
    "every text leaves the same memory": ("digests_tell_texts_apart", patch(sanity, "write", keep_the_first_text)),
    "writing is random": ("digests_tell_texts_apart", patch(FastWeight, "contents", lambda f: lambda *a: f(*a) * (1 + 1e-3 * random.random()))),
    "pads are written": ("rows_do_not_leak", patch(Writer, "expect", lambda f: lambda self, mask: f(self, torch.ones_like(mask)))),
    "rows leak while writing": ("rows_do_not_leak", patch(FastWeight, "contents", lambda f: lambda *a: (v := f(*a)) + 0.1 * v.mean(0, keepdim=True))),
    "rows leak while reading": ("rows_do_not_leak", patch(LayerMemory, "read", lambda f: lambda *a: (o := f(*a)) + 0.1 * o.mean(0, keepdim=True))),
    "off is not off": ("off_equals_the_fresh_base", patch(TTTMLP, "forward", lambda f: lambda *a: f(*a) * (1 + 1e-6))),
    "the base is written to": ("base_is_unchanged", patch(Writer, "memory", touch_the_base)),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_each_check_sees_its_sabotage(setup, name, monkeypatch):
    check, sabotage = SABOTAGE[name]
    monkeypatch.setattr(sanity, "heard", sanity.heard)  # restored whatever a sabotage puts there
    sabotage(monkeypatch, setup)
    if check == "base_is_unchanged":
        sanity.write(setup, setup.texts[:1])
    assert not outcome(setup, check).passed


def test_every_check_has_a_sabotage():
    assert {check for check, _ in SABOTAGE.values()} | {"swapped_memory_is_no_better_than_none"} == {c.__name__ for c in sanity.CHECKS}


@pytest.mark.parametrize("leaked,passes", [(0, True), (sanity.SWAPPED_EXTRA, True), (sanity.SWAPPED_EXTRA + 1, False)])
def test_a_swapped_memory_that_answers_fails(setup, monkeypatch, leaked, passes):
    """Right answers that come from somewhere else than the own conversation, up to and beyond the stated luck."""
    gold = [probe["gold_answer"] for sample in setup.samples for probe in sample["probes"]]

    def ask(setup, memory, samples):
        right = leaked if memory else 0
        return gold[:right] + ["?"] * (len(gold) - right), None

    monkeypatch.setattr(sanity, "ask", ask)
    result = sanity.swapped_memory_is_no_better_than_none(setup)
    assert result.passed == passes and f"swapped {leaked}, none 0" in result.measured


def test_the_swapped_check_gives_no_row_its_own_memory(setup, monkeypatch):
    asked = []

    def ask(setup, memory, samples):
        asked.append(memory)
        return ["?"] * sanity.QUESTIONS * len(samples), None

    monkeypatch.setattr(sanity, "ask", ask)
    sanity.swapped_memory_is_no_better_than_none(setup)
    own, swapped, none = asked
    assert none is None and sorted(swapped.tokens.tolist()) == sorted(own.tokens.tolist())
    assert all(own.select([i]).digest() != swapped.select([i]).digest() for i in range(own.batch))


def test_the_chunk_length_is_put_back(setup):
    before = setup.ttt.config
    with pytest.raises(KeyError), sanity.chunk_length(setup.ttt, 3):
        assert setup.ttt.config.chunk == setup.ttt.fast["1"].config.chunk == 3
        raise KeyError
    assert setup.ttt.config == setup.ttt.fast["1"].config == before


# ---- the script ----

def call(monkeypatch, capsys, *arguments):
    """(exit code, stdout, stderr) of sanity.py, in this process."""
    monkeypatch.setattr(sys, "argv", ["sanity.py", *map(str, arguments)])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        run_script(sanity.main)
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory, samples):
    """The samples as a file of the benchmark's shape."""
    fact = {"fact_id": "f1", "fact_text": "A desk has a number.", "category": "numeric"}
    full = [s | {"level": 1, "facts": [fact], "distractor": None,
                 "probes": [p | {"probe_id": f"{s['sample_id']}-p{p['probe_id']}", "required_facts": ["f1"]} for p in s["probes"]]} for s in samples]
    path = tmp_path_factory.mktemp("benchmark") / "few.json"
    path.write_text(json.dumps({"version": "1", "seed": 0, "samples": full}), encoding="utf-8")
    benchmark_file.load_benchmark(path)
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A checkpoint on tiny-llama, as train_minimal.py leaves one."""
    folder, loaded, config = tmp_path_factory.mktemp("adapter"), load_model("tiny-llama"), TTTConfig((1, 3), 32, unit_keys=True)
    manifest = {"arm": "test", "model": "tiny-llama", "model_sha256": loaded.sha256, "objective": "recall", "frozen": True, "seed": 0,
                "ttt": config.to_dict(), "lora": None, "data_sha256": "0", "updates": 0, **provenance(), "device": "cpu"}
    with torch.inference_mode(False), torch.no_grad():
        save_adapter(folder, strengthen(InPlaceTTT(loaded.model, config)), manifest)
    return folder


# sanity.py --tiny as a user runs it is the first command of the preflight stage: test_preflight_runs_every_script_and_checks_every_family in test_modal_app.py.


def test_a_model_with_its_adapter(monkeypatch, capsys, benchmark, adapter):
    monkeypatch.setattr(sanity, "READ_TOKENS", 8)
    code, out, _ = call(monkeypatch, capsys, "--model", "tiny-llama", "--adapter", adapter, "--benchmark", benchmark, "--device", "cpu")
    checks = [line.split()[:2] for line in out.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert code == 0 and checks == [["PASS", check.__name__] for check in sanity.CHECKS]
    assert "right of 18 by memory: own 0, swapped 0, none 0" in out


def test_bfloat16_passes_within_its_tolerance(monkeypatch, capsys, benchmark, adapter):
    monkeypatch.setattr(sanity, "READ_TOKENS", 8)
    code, out, _ = call(monkeypatch, capsys, "--model", "tiny-llama", "--adapter", adapter, "--benchmark", benchmark, "--dtype", "bfloat16", "--device", "cpu")
    assert code == 0 and "bfloat16" in out


def test_a_failing_check_is_exit_code_1(monkeypatch, capsys, benchmark):
    monkeypatch.setattr(sanity, "READ_TOKENS", 8)
    monkeypatch.setattr(sanity, "MODELS", {"tiny-llama": None})
    monkeypatch.setattr(Reader, "layer", write_while_reading(Reader.layer))
    code, out, _ = call(monkeypatch, capsys, "--tiny", "--benchmark", benchmark)
    assert code == 1 and "FAIL  reading_does_not_write" in out
    assert out.splitlines()[-1].startswith("1 checks fail") or "tiny-llama reading_does_not_write" in out.splitlines()[-1]


@pytest.mark.parametrize("arguments,named", [
    ([], "either --tiny, or --adapter"), (["--tiny", "--adapter", "x"], "either --tiny, or --adapter"),
    (["--model", "tiny-llamas", "--adapter", "x"], "--model tiny-llamas: unknown"),
    (["--model", "tiny-llama", "--adapter", "no/such"], "no/such: no trained adapter"),
    (["--tiny", "--benchmark", "no.json"], "no.json: no such file"),
    (["--tiny", "--device", "tpu"], "--device"), (["--fast"], "--fast")], ids=str)
def test_bad_arguments_are_one_line_and_exit_code_2(monkeypatch, capsys, arguments, named):
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 2 and named in err.splitlines()[-1] and "Traceback" not in err


def test_an_adapter_of_another_base_is_exit_code_2(monkeypatch, capsys, benchmark, adapter):
    code, _, err = call(monkeypatch, capsys, "--model", "tiny-qwen2", "--adapter", adapter, "--benchmark", benchmark)
    assert code == 2 and "trained on tiny-llama" in err


def test_a_benchmark_with_too_few_texts_is_exit_code_2(monkeypatch, capsys, benchmark, tmp_path):
    bench = json.loads(benchmark.read_text(encoding="utf-8"))
    few = tmp_path / "three.json"
    few.write_text(json.dumps(bench | {"samples": bench["samples"][:3]}), encoding="utf-8")
    code, _, err = call(monkeypatch, capsys, "--tiny", "--benchmark", few)
    assert code == 2 and "three.json" in err and "4 or more" in err
