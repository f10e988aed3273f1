"""diagnose.py and what it is made of on tiny models: what it says of a memory is what the memory does."""
import json
import math

import numpy as np
import pytest
import torch
from conftest import strengthen
from test_run_experiment import kit, save_fast_weights, save_tiny, small_benchmark  # noqa: F401 (kit is a fixture)

import benchmark_file
import diagnose
import diagnose_input
import inside
import inside_figures
from evaluate import exact_match
from in_place_ttt import InPlaceTTT, TTTConfig
from memory import LayerMemory, Memory
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


def letters(sample, **layers):
    """The conversation, a token a letter, with these keys, strengths and so on by layer."""
    words = list(sample["conversation"])
    memory = Memory({1: LayerMemory.factored(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))}, None, None, None)
    return inside.Text(sample, words, [(i, i + 1) for i in range(len(words))], layers.get("keys", {}), layers.get("strength", {}), layers.get("kept", {}), memory)


def test_the_words_are_the_text_and_keys_read_what_was_written(arm, sample):
    loaded, ttt = arm
    text = inside.write(loaded, ttt, sample)
    assert "".join(text.words) == sample["conversation"] and len(text.spans) == len(text.words)
    for i, layer in text.memory.layers.items():
        assert text.keys[i].shape[1] == len(text.words) == len(text.strength[i]) == len(text.kept[i][0])
        slots = int((text.strength[i] > 0).sum())
        assert slots == int((layer.values != 0).any(-1).sum()) == np.isfinite(text.kept[i][0]).sum() > 0


def test_parts_take_a_layer_out_and_leave_it_alone(arm, sample):
    loaded, ttt = arm
    memory = inside.write(loaded, ttt, sample).memory
    parts = inside.parts_of(memory)
    norms = {name: {i: n.item() for i, n in part.update_norms().items()} for name, part in parts.items()}
    whole = norms["all", None]
    assert all(n > 0 for n in whole.values()) and set(norms["none", None].values()) == {0.0}
    for i, other in ((1, 2), (2, 1)):
        assert norms["without", i] == {i: 0.0, other: whole[other]} and norms["only", i] == {i: whole[i], other: 0.0}
    assert norms["from", 1] == whole and norms["from", 2] == {1: 0.0, 2: whole[2]}


def test_rows_read_together_are_those_read_alone(arm, sample):
    loaded, ttt = arm
    parts = inside.parts_of(inside.write(loaded, ttt, sample).memory)
    together, probe = Memory.stack(list(parts.values())), sample["probes"][0]
    past = inside.example(loaded, ttt, together, "en")
    asked, again = (inside.ask(loaded, ttt, together, past, "en", probe) for _ in range(2))
    torch.testing.assert_close(asked.logits, again.logits)  # what was read before is left as it was
    said = inside.answers(loaded, ttt, together, sample)
    for row, part in enumerate(parts.values()):
        alone = inside.ask(loaded, ttt, part, inside.example(loaded, ttt, part, "en"), "en", probe)
        torch.testing.assert_close(asked.logits[row], alone.logits[0], rtol=1e-3, atol=1e-3)
        assert inside.answers(loaded, ttt, part, sample) == [said[row]]
        if row == 0:
            assert all(torch.allclose(asked.queries[i], alone.queries[i], atol=1e-4) for i in asked.queries) and min(asked.share.values()) > 0
    assert asked.logits.shape[1] == len(asked.gold) and not torch.allclose(asked.logits[0], asked.logits[1], atol=1e-3)


def test_what_belongs_to_a_fact_is_its_span_and_the_token_before(sample):
    probe = sample["probes"][0]
    fact = next(f for f in sample["facts"] if f["fact_id"] == probe["required_facts"][-1])
    low, high = fact["span"]
    assert inside.belongs(letters(sample), probe).nonzero()[:, 0].tolist() == list(range(max(low - 1, 0), high))


def test_the_token_met_best_is_the_one_whose_key_the_query_has_and_has_a_slot(sample):
    probe, words = sample["probes"][0], list(sample["conversation"])
    keys = torch.nn.functional.one_hot(torch.arange(len(words))).float()[None]
    place = inside.belongs(letters(sample), probe).nonzero()[0].item()
    strength = torch.ones(len(words))
    text = letters(sample, keys={1: keys}, strength={1: strength})
    asked = inside.Asked(torch.zeros(1, 2, 3), torch.zeros(2), {1: keys[0, [place, 0]]}, {})
    found = inside.met_best(text, asked, probe)[1]
    assert (found["token"], found["word"], found["met"], found["in_fact"]) == (place, words[place], 1.0, True) and 0 < found["chance"] < 1
    strength[place] = 0.0  # without a slot it cannot be met
    assert inside.met_best(text, asked, probe)[1]["token"] != place


def test_what_is_left_of_a_fact_is_the_inner_loss_of_its_own_slots(sample):
    probe, length = sample["probes"][0], len(sample["conversation"])
    inside_S = inside.belongs(letters(sample), probe).nonzero()[:, 0].numpy()
    loss, mass = np.full(length, np.nan), np.zeros(length)
    loss[inside_S[:2]], mass[inside_S[:2]] = (0.2, 0.6), (3.0, 1.0)
    loss[inside_S[-1] + 3], mass[inside_S[-1] + 3] = 9.0, 1.0
    kept = inside.kept_of(letters(sample, kept={1: (loss, mass), 2: (np.full(length, np.nan), mass)}), probe)
    assert kept == {1: pytest.approx(0.3), 2: None}


def test_recall_is_held_against_what_is_left_of_the_fact():
    row = lambda n, left, right: {"sample_id": f"s{n // 2}", "right": right, "loss": left * 3, "kept": {1: left, 2: None}, "met_best": {1: {"in_fact": right}, 2: {"in_fact": False}}}
    rows = [row(n, 0.1 + 0.05 * n, n < 7) for n in range(16)]
    found = inside.recall_by_inner(rows, [1, 2])
    assert found["with_right"]["rho"] < -0.8 and found["with_loss"]["rho"] == pytest.approx(1) and found["finding_with_right"]["rho"] == pytest.approx(1)
    assert (found["with_right"]["n"], found["with_right"]["groups"]) == (16, 8) and found["inner_where_right"]["mean"] < found["inner_where_wrong"]["mean"]
    assert found["by_layer"][1]["with_right"] == pytest.approx(found["with_right"]["rho"]) and found["by_layer"][2]["with_right"] is None
    told = diagnose.recall_words({"recall_by_inner_loss": found})
    assert "whether the answer is right: -0.8" in told and "(yes)" in told and "16 questions of 8 conversations" in told
    nothing = inside.recall_by_inner([r | {"right": False} for r in rows], [1, 2])
    assert nothing["with_right"]["rho"] is None and "cannot be computed" in diagnose.recall_words({"recall_by_inner_loss": nothing})


def test_a_spectrum_is_that_of_the_dense_update(arm, sample):
    loaded, ttt = arm
    memory = inside.write(loaded, ttt, sample).memory
    for i, layer in memory.layers.items():
        expected = torch.linalg.svdvals(layer.to_dense().update[0])
        found = inside.spectrum(memory, i)
        np.testing.assert_allclose(found["singular_values"], expected[:inside.SINGULAR_VALUES].numpy()[:len(found["singular_values"])], rtol=2e-3, atol=1e-4 * expected[0])
        share = expected[expected > 1e-6 * expected[0]] / expected.sum()
        assert found["effective_rank"] == pytest.approx(torch.exp(-(share * share.log()).sum()).item(), rel=0.01)


def test_scaled_answers_are_those_of_the_scaled_memory(arm, sample, monkeypatch):
    loaded, ttt = arm
    monkeypatch.setattr(inside, "MAX_NEW_TOKENS", 3)
    memory = inside.write(loaded, ttt, sample).memory
    found = inside.scaled(loaded, ttt, [sample])
    for what, cells in found.items():
        assert [cell["factor"] for cell in cells] == inside.FACTORS and all(cell["n"] == len(sample["probes"]) for cell in cells)
        for cell in cells:  # noise has the memory's norm at every size
            assert cell["update_norm"] == pytest.approx(cell["factor"] * memory.update_norm().item(), rel=1e-3), what
    said = inside.answers(loaded, ttt, memory.scale(3.0), sample)[0]
    cell = next(cell for cell in found["memory"] if cell["factor"] == 3)
    gold = [[p["gold_answer"], *p.get("aliases", [])] for p in sample["probes"]]
    assert cell["em"] == np.mean([exact_match(a, g, "en") for a, g in zip(said, gold)]) and cell["degenerate"] == np.mean([inside.degenerate(a, "en") for a in said])


# ---- what is looked at ----

def test_the_built_in_text_has_its_facts_where_it_says(tmp_path):
    sample = diagnose_input.built_in()
    path = tmp_path / "built-in.json"
    path.write_text(json.dumps({"version": "1", "seed": 0, "samples": [sample]}), encoding="utf-8")
    assert benchmark_file.load_benchmark(path)["samples"] == [sample]
    for fact, probe in zip(sample["facts"], sample["probes"]):
        low, high = fact["span"]
        assert sample["conversation"][low:high] == fact["fact_text"] and probe["gold_answer"] in fact["fact_text"]


def test_texts_and_conversations_are_named_by_id_file_or_number(tmp_path):
    bench = {"samples": small_benchmark(tmp_path / "b.json")}
    (tmp_path / "prose.txt").write_text("It rained.", encoding="utf-8")
    text = lambda asked: diagnose_input.choose_text(bench, asked, "en", "b.json")
    assert text(str(tmp_path / "prose.txt")) == ("It rained.", str(tmp_path / "prose.txt")) and text("L1-002-en")[0] == bench["samples"][2]["conversation"]
    first = next(s for s in bench["samples"] if s["level"] == 3)
    assert text(None) == (first["conversation"] + "\n\n" + first["distractor"], first["sample_id"]) and text("built-in")[1] == "built-in"
    chosen = lambda asked: [s["sample_id"] for s in diagnose_input.choose_samples(bench, asked, "en", "b.json")]
    assert chosen("2") == ["L1-000-en", "L1-001-en"] and chosen("0") == [] and chosen("built-in,L2-001-en") == ["built-in", "L2-001-en"]


# ---- figures ----

def test_words_are_laid_out_as_the_text_has_them():
    tokens = ["A", "ri", ":", " The", " ket", "tle", ".", "\n", "Bo", ":", " Good", "\n\n"]
    words = inside_figures.words_of(tokens)
    assert [w.letters for w in words] == ["Ari:", "The", "kettle.", "Bo:", "Good"] and [(w.start, w.end) for w in words] == [(0, 3), (3, 4), (4, 8), (8, 10), (10, 12)]
    assert inside_figures.lay_out(words) == [(0, 0), (0, 5), (0, 9), (1, 0), (1, 4)]
    met = torch.tensor([0.1, math.nan, 0.3, math.nan, 0.2, 0.5, math.nan, math.nan, math.nan, math.nan, 0.0, math.nan])
    np.testing.assert_allclose(inside_figures.by_word(met, words), [0.3, math.nan, 0.5, math.nan, 0.0])
    long = inside_figures.lay_out(inside_figures.words_of([" word"] * 50))
    assert max(line for line, _ in long) > 1 and all(column + 4 <= inside_figures.LINE for _, column in long)


# ---- the command ----

def run(run_main, *arguments):
    return run_main(diagnose.main, ["diagnose.py", "--device", "cpu", *arguments])


def test_the_report_is_whole_and_its_words_follow_its_numbers(kit, run_main, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(inside, "MAX_NEW_TOKENS", 4)
    model, adapter = kit("tiny-llama")
    code, out, _ = run(run_main, "--model", model, "--adapter", adapter, "--benchmark", kit.benchmark, "--samples", "2", "--ablate", "1", "--scale", "1", "--streamed", "40",
                       "--out", tmp_path / "d")
    report, text = json.loads((tmp_path / "d/report.json").read_text(encoding="utf-8")), (tmp_path / "d/report.md").read_text(encoding="utf-8")
    memory = report["memory"]
    assert code == 0 and memory["conversations"] == 2 and memory["questions"] == len(memory["questions_and_what_they_met"]) > memory["ablated"]["questions"] == report["scaled"]["memory"][0]["n"]
    for cell in memory["layers"].values():
        assert 0 <= cell["em_without"] <= 1 and 0 <= cell["in_fact"] <= 1 and cell["kl_without"] >= 0 and cell["kl_only"] >= 0 and cell["effective_rank"] >= 1 and cell["update_norm"] > 0
    figures = {"found.png", "found_layers.png", "layers.png", "along.png", "streamed.png", "scale.png"}
    assert {p.name for p in (tmp_path / "d").iterdir()} == {"report.json", "report.md", "along.npz"} | figures and all(f"]({name})" in text for name in figures)
    assert out.startswith(text) and f"{memory['em']:.3f} right with the memory" in text and report["verdict"] in text and f"**Verdict: {report['along']['disconnect']}.**" in text
    assert text.count("| PASS |") == len(report["checks"]) == 8 and "FAIL" not in text and "8 of 8 checks pass" in text
    arrays = np.load(tmp_path / "d/along.npz")
    assert arrays["after_NL"].shape == (2, report["along"]["tokens"]) and np.nanmean(arrays["off_L"]) == pytest.approx(report["along"]["loss_off"], rel=1e-2)


def test_an_untrained_start_on_any_row_without_conversations(run_main, tmp_path):
    (tmp_path / "prose.txt").write_text("The river rose in the night and the mill stood in it. " * 3, encoding="utf-8")
    code, out, err = run(run_main, "--model", "tiny-gemma3", "--text", tmp_path / "prose.txt", "--samples", "0", "--streamed", "40", "--piece", "32", "--out", tmp_path / "d")
    assert code == 0, err
    assert {p.name for p in (tmp_path / "d").iterdir()} == {"report.json", "report.md", "along.npz", "along.png", "streamed.png"}
    assert "Conversations with known facts" not in out and "FAIL" not in out and "7 of 7 checks pass" in out


@pytest.mark.parametrize("form, chunk, config", [("plain", "16", dict(chunk=16, codes=False)), ("plain", "whole", dict(chunk=None, codes=False)), ("codes", None, dict(chunk=None, codes=True))])
def test_an_untrained_start_has_the_form_it_was_asked_for(form, chunk, config):
    ttt, name = diagnose_input.attach(load_model("tiny-qwen2"), None, form, chunk)
    assert name == f"untrained {form}" and {field: getattr(ttt.config, field) for field in config} == config and not any(p.requires_grad for p in ttt.parameters())
    ttt.detach()


def test_words_say_whether_one_layer_carries_the_memory():
    cell = lambda without, only, found, deeper=0.8: {"em_without": without, "em_only": only, "em_from": deeper, "kl_without": 0.5, "in_fact": found, "chance": 0.1, "update_norm": 2.0, "effective_rank": 9.0,
                                                     "share_of_output": 0.5}
    base = {"conversations": 3, "questions": 14, "em": 0.9, "em_without_memory": 0.0, "loss": 0.5, "loss_without_memory": 4.0, "ablated": {"conversations": 1, "questions": 4, "em": 0.8}}
    shared = diagnose.memory_words(base | {"layers": {3: cell(0.8, 0.1, 0.2), 6: cell(0.5, 0.3, 0.6, 0.7)}})
    assert "best in 60% of the questions in layer 6" in shared and "Layer 6 is missed most: without its memory 0.500 are right, 0.300 fewer, and the predictions move by 0.50" in shared and "work together" in shared
    assert "Layers 3 and deeper are enough for 95% of what all of them answer (0.800)" in shared
    alone = diagnose.memory_words(base | {"layers": {3: cell(0.8, 0.7, 0.2), 6: cell(0.8, 0.3, 0.6)}})
    nothing = diagnose.memory_words(base | {"em": 0.0, "ablated": base["ablated"] | {"em": 0.0}, "layers": {3: cell(0.0, 0.1, 0.2, 0.0), 6: cell(0.0, 0.0, 0.6, 0.0)}})
    assert "answers nothing that is not answered without it" in nothing and "is missed most" not in nothing and "Alone" not in nothing and "The update is 2.00" in nothing
    assert "no single layer is needed" in alone and "carries most of the memory by itself" in alone


def test_words_say_at_which_size_the_memory_answers():
    cells = lambda *em: [{"factor": factor, "em": value, "em_ci": None, "degenerate": 0.0, "update_norm": factor} for factor, value in zip(inside.FACTORS, em)]
    told = diagnose.scale_words({"memory": cells(0, 0, 0.1, 0.7, 0.5, 0), "noise": cells(0, 0, 0, 0, 0, 0)})
    assert "Best at ×1 (0.700 right" in told and "| memory: right | 0.000 (no interval) |" in told
    assert "At no size does the memory answer more than noise" in diagnose.scale_words({"memory": cells(0, 0, 0.1, 0, 0, 0), "noise": cells(0, 0.1, 0, 0, 0, 0)})


@pytest.mark.parametrize("more, message", [(("--samples", "-1"), "--samples -1: use 0 or more"), (("--lang", "zh", "--samples", "1", "--text", "built-in"), ": no zh sample of level 1"),
                                           (("--samples", "L9"), "has no sample 'L9'; name its samples, built-in, or a number"), (("--chunk", "16"), "--chunk 16: a trained arm has its own"),
                                           (("--tokens", "4"), "a text of 4 tokens is one piece of 16; give a longer text"), (("--piece", "0"), "--piece 0: use 1 or more"),
                                           (("--streamed", "9"), "a text of 9 tokens is one piece of 16"),
                                           (("--text", "nowhere.txt"), "cannot be read as UTF-8 text (FileNotFoundError); name a sample, a file, or built-in")])
def test_bad_arguments_are_one_line(kit, run_main, tmp_path, more, message):  # noqa: F811
    model, adapter = kit("tiny-llama")
    bench = json.loads(kit.benchmark.read_text(encoding="utf-8"))
    english = tmp_path / "english.json"
    english.write_text(json.dumps(bench | {"samples": [s for s in bench["samples"] if s["lang"] == "en"]}), encoding="utf-8")
    code, _, err = run(run_main, "--model", model, "--adapter", adapter, "--benchmark", english, "--out", tmp_path / "d", *more)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "d").exists()


@pytest.mark.parametrize("more, message", [(("--chunk", "many"), "--chunk many: use a number of tokens, or whole"), (("--chunk", "0", "--form", "plain"), "chunk is 0; use 1 or more"),
                                           (("--chunk", "16"), "ridge solves for a whole text")])
def test_bad_settings_of_an_untrained_start_are_one_line(run_main, tmp_path, more, message):
    code, _, err = run(run_main, "--model", "tiny-llama", "--text", "built-in", "--samples", "0", "--out", tmp_path / "d", *more)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_without_layers_taken_out_the_rest_is_said(arm, sample, monkeypatch):
    loaded, ttt = arm
    monkeypatch.setattr(inside, "MAX_NEW_TOKENS", 3)
    found, drawn = inside.measure(loaded, ttt, [sample], 0)
    whole, _ = inside.measure(loaded, ttt, [sample], 1)
    assert found["ablated"] is None and whole["ablated"]["questions"] == whole["questions"] == found["questions"] == len(drawn)
    assert {name: found["layers"][1][name] for name in found["layers"][1]} == {name: pytest.approx(whole["layers"][1][name], rel=1e-3) for name in found["layers"][1]}
    assert {"em_without", "em_only", "em_from", "kl_without", "kl_only"} == set(whole["layers"][1]) - set(found["layers"][1])
    assert "is missed most" not in diagnose.memory_words(found) and "taken out" not in diagnose.memory_words(found)
    assert len(inside_figures.layers_panels(found).axes) == 5  # four panels and a colour bar
