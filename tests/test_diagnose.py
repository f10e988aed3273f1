"""diagnose.py on tiny models: what it says of a memory is what the memory does."""
import json

import pytest
import torch
from conftest import strengthen
from test_run_experiment import kit, save_fast_weights, save_tiny, small_benchmark  # noqa: F401 (kit is a fixture)

import benchmark_file
import diagnose
from in_place_ttt import InPlaceTTT, TTTConfig
from model_utils import load_model

DEEP = dict(codes=True, write_attention=2, read_attention=1, deep=True, blind=True, target="both", unit_targets=True, gate=True, sparse=True, rule="ridge")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "benchmark.json"
    small_benchmark(path)
    return benchmark_file.select_samples(benchmark_file.load_benchmark(path), (1,), ("en",), 1)[0]


@pytest.fixture(params=[dict(chunk=None, unit_keys=True, gate=True), dict(chunk=None, **DEEP), dict(chunk=16)], ids=["plain", "deep", "chunks"])
def arm(request):
    loaded = load_model("tiny-llama")
    ttt = strengthen(InPlaceTTT(loaded.model, TTTConfig(layers=(1, 2), **request.param)))
    yield loaded, ttt
    ttt.detach()


def test_the_words_are_the_text_and_keys_read_what_was_written(arm, sample):
    loaded, ttt = arm
    text = diagnose.write(loaded, ttt, sample)
    assert "".join(text.words) == sample["conversation"] and len(text.spans) == len(text.words)
    for i, layer in text.memory.layers.items():
        assert text.keys[i].shape[1] == len(text.words) == len(text.strength[i])
        slots = int((text.strength[i] > 0).sum())
        assert slots == int((layer.values != 0).any(-1).sum()) > 0


def test_parts_take_a_layer_out_and_leave_it_alone(arm, sample):
    loaded, ttt = arm
    memory = diagnose.write(loaded, ttt, sample).memory
    parts = diagnose.parts_of(memory)
    norms = {name: {i: n.item() for i, n in part.update_norms().items()} for name, part in parts.items()}
    whole = norms["all", None]
    assert all(n > 0 for n in whole.values()) and set(norms["none", None].values()) == {0.0}
    for i, other in ((1, 2), (2, 1)):
        assert norms["without", i] == {i: 0.0, other: whole[other]} and norms["only", i] == {i: whole[i], other: 0.0}
    assert norms["from", 1] == whole and norms["from", 2] == {1: 0.0, 2: whole[2]}


def test_rows_read_together_are_those_read_alone(arm, sample):
    loaded, ttt = arm
    parts = diagnose.parts_of(diagnose.write(loaded, ttt, sample).memory)
    together, probe = diagnose.Memory.stack(list(parts.values())), sample["probes"][0]
    asked = diagnose.ask(loaded, ttt, together, "en", probe)
    correct = diagnose.right(loaded, ttt, together, sample)
    for row, part in enumerate(parts.values()):
        alone = diagnose.ask(loaded, ttt, part, "en", probe)
        torch.testing.assert_close(asked.logits[row], alone.logits[0], rtol=1e-3, atol=1e-3)
        assert diagnose.right(loaded, ttt, part, sample) == [correct[row]]
        if row == 0:
            assert all(torch.allclose(asked.queries[i], alone.queries[i], atol=1e-4) for i in asked.queries) and min(asked.share.values()) > 0
    assert asked.logits.shape[1] == len(asked.gold) and not torch.allclose(asked.logits[0], asked.logits[1], atol=1e-3)


def test_what_belongs_to_a_fact_is_its_span_and_the_token_before(sample):
    probe, words = sample["probes"][0], list(sample["conversation"])
    text = diagnose.Text(sample, words, [(i, i + 1) for i in range(len(words))], {}, {}, None)
    fact = next(f for f in sample["facts"] if f["fact_id"] == probe["required_facts"][-1])
    low, high = fact["span"]
    assert diagnose.belongs(text, probe).nonzero()[:, 0].tolist() == list(range(max(low - 1, 0), high))


def test_the_token_met_best_is_the_one_whose_key_the_query_has_and_has_a_slot(sample):
    probe, words = sample["probes"][0], list(sample["conversation"])
    keys = torch.nn.functional.one_hot(torch.arange(len(words))).float()[None]
    place = diagnose.belongs(diagnose.Text(sample, words, [(i, i + 1) for i in range(len(words))], {}, {}, None), probe).nonzero()[0].item()
    strength = torch.ones(len(words))
    text = lambda: diagnose.Text(sample, words, [(i, i + 1) for i in range(len(words))], {1: keys}, {1: strength}, None)
    asked = diagnose.Asked(torch.zeros(1, 2, 3), torch.zeros(2), {1: keys[0, [place, 0]]}, {})
    found = diagnose.met_best(text(), asked, probe, None)[1]
    assert (found["token"], found["word"], found["met"], found["in_fact"]) == (place, words[place], 1.0, True) and 0 < found["chance"] < 1
    strength[place] = 0.0  # without a slot it cannot be met
    assert diagnose.met_best(text(), asked, probe, None)[1]["token"] != place


def test_the_report_is_whole_and_its_words_follow_its_numbers(kit, run_main, tmp_path, sample):  # noqa: F811
    model, adapter = kit("tiny-llama")
    code, out, _ = run_main(diagnose.main, ["diagnose.py", "--model", model, "--adapter", adapter, "--benchmark", kit.benchmark, "--samples", "2", "--device", "cpu",
                                            "--out", tmp_path / "d"])
    report = json.loads((tmp_path / "d/report.json").read_text(encoding="utf-8"))
    assert code == 0 and report["conversations"] == 2 and report["questions"] == len(report["questions_and_what_they_met"])
    for cell in report["layers"].values():
        assert 0 <= cell["em_without"] <= 1 and 0 <= cell["in_fact"] <= 1 and cell["kl_without"] >= 0 and cell["effective_rank"] >= 1 and cell["update_norm"] > 0
    assert out.startswith((tmp_path / "d/report.md").read_text(encoding="utf-8")) and f"{report['em']:.3f} right with the memory" in out
    assert {p.name for p in (tmp_path / "d").iterdir()} == {"report.json", "report.md", "found.png", "layers.png", "along.png"}
    assert report["along"]["pieces"] > 1 and report["along"]["state"] in out and f"Verdict: {report['along']['disconnect']}" in out


def test_words_say_whether_one_layer_carries_the_memory():
    cell = lambda without, only, found, deeper=0.8: {"em_without": without, "em_only": only, "em_from": deeper, "in_fact": found, "chance": 0.1, "update_norm": 2.0, "effective_rank": 9.0, "share_of_output": 0.5}
    base = {"conversations": 1, "questions": 4, "em": 0.8, "em_without_memory": 0.0, "loss": 0.5, "loss_without_memory": 4.0}
    shared = diagnose.words(base | {"layers": {3: cell(0.8, 0.1, 0.2), 6: cell(0.5, 0.3, 0.6, 0.7)}}, "arm", "base")
    assert "best in 60% of the questions in layer 6" in shared and "Layer 6 is missed most: without its memory 0.500 are right, 0.300 fewer" in shared and "work together" in shared
    assert "Layers 3 and deeper are enough for 95% of what all of them answer (0.800)" in shared
    alone = diagnose.words(base | {"layers": {3: cell(0.8, 0.7, 0.2), 6: cell(0.8, 0.3, 0.6)}}, "arm", "base")
    nothing = diagnose.words(base | {"em": 0.0, "layers": {3: cell(0.0, 0.1, 0.2, 0.0), 6: cell(0.0, 0.0, 0.6, 0.0)}}, "arm", "base")
    assert "answers nothing that is not answered without it" in nothing and "is missed most" not in nothing and "Alone" not in nothing and "The update is 2.00" in nothing
    assert "no single layer is needed" in alone and "carries most of the memory by itself" in alone


@pytest.mark.parametrize("more, message", [(("--samples", "0"), "--samples 0: use 1 or more"), (("--lang", "zh", "--samples", "1"), None),
                                           (("--tokens", "4"), "--tokens 4: a text of 4 tokens is one piece of 16; give a longer text"), (("--piece", "0"), "--piece 0: use 1 or more"),
                                           (("--text", "nowhere.txt"), "--text nowhere.txt: cannot be read as UTF-8 text (FileNotFoundError); name another file")])
def test_bad_arguments_are_one_line(kit, run_main, tmp_path, more, message):  # noqa: F811
    model, adapter = kit("tiny-llama")
    bench = json.loads(kit.benchmark.read_text(encoding="utf-8"))
    english = tmp_path / "english.json"
    english.write_text(json.dumps(bench | {"samples": [s for s in bench["samples"] if s["lang"] == "en"]}), encoding="utf-8")
    code, _, err = run_main(diagnose.main, ["diagnose.py", "--model", model, "--adapter", adapter, "--benchmark", english, "--device", "cpu", "--out", tmp_path / "d", *more])
    assert code == 2 and (message or f"--benchmark {english}: no zh sample of level 1") in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "d").exists()
