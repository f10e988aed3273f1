"""evaluate.py as a user runs it on folders of results: report, tables, figures, and every kind of bad input."""
import copy
import json
import os
import random
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

import benchmark_file
import evaluate
from intervals import RATIOS

CONDITIONS = {"A_context": 0.9, "A_tuned": 0.95, "B_memory": 0.5, "C_nothing": 0.0, "B_swapped": 0.0,
              "D_distractor": 0.3, "B_merged_4": 0.2}
ONLY = {"D_distractor": 3, "B_merged_4": 1}
COARSE = 80    # dots an inch
GOLD = {"en": "Bruno", "zh": "布鲁诺"}


def make_rows(seed, langs=("en", "zh"), conditions=CONDITIONS, samples=4):
    rng, rows = random.Random(seed), []
    for lang in langs:
        for level in (1, 2, 3):
            for number in range(samples):
                sample = f"L{level}-{number:03d}-{lang}"
                rows += [{"sample_id": sample, "level": level, "lang": lang, "probe_id": f"{sample}-p{probe}",
                          "condition": name, "question": "?", "gold": GOLD[lang], "aliases": [], "prompt_tokens": 9,
                          "prediction": GOLD[lang] if rng.random() < chance else "?\u2028", "tokens_written": 9,
                          "chunks_written": 1, "update_norm": 0.25 if name[0] in "BD" else None,
                          "category": ("person", "numeric")[probe % 2], "position": ("front", "middle", "back")[probe]}
                         for probe in range(3) for name, chance in conditions.items()
                         if ONLY.get(name, level) == level]
    return rows


def make_run(root, folder="first", rows=None, train=False, **changed):
    rows = make_rows(changed.get("seed", 0)) if rows is None else rows
    run = {"arm": "recall", "model": "tiny", "model_sha256": "m", "frozen": True, "objective": "recall", "seed": 0,
           "adapter": None, "adapter_sha256": None, "tuned_adapter": None, "tuned_adapter_sha256": None,
           "benchmark": {"file": "benchmark_v1.json", "sha256": "0" * 64}, "conditions": list(CONDITIONS),
           "levels": [1, 2, 3], "langs": ["en", "zh"], "limit": None, "commit": "abc123", "command": "python run.py",
           "versions": {"torch": "2"}, "device": "cpu", "dtype": "float32", "batch_size": 8, "ttt": None,
           "started": "2026-01-01T00:00:00", "seconds": 1.0, "complete": True, "rows": len(rows)} | changed
    path = root / "results" / folder
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (path / "predictions.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                                            encoding="utf-8")
    if train:
        (root / run["adapter"]).mkdir(parents=True)
        (root / run["adapter"] / "train.jsonl").write_text("".join(
            json.dumps({"update": update, "loss": 3 / update, "token_accuracy": 1 - 1 / update}) + "\n"
            for update in range(1, 201)))
    return path


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """An empty project folder to run in, with a RESULTS.md; figures are of fewer dots, which are drawn and looked at sooner."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.plots, "DPI", COARSE)
    (tmp_path / "RESULTS.md").write_text("# Results\r\n<!-- report:begin -->\nold\n<!-- report:end -->\ntail",
                                         encoding="utf-8", newline="")
    return tmp_path


@pytest.fixture
def root(drawn, monkeypatch):
    """The same without figures, which take a second each time."""
    monkeypatch.setattr(evaluate.plots, "draw_all", lambda report, curves, folder: [])
    return drawn


def score(*arguments):
    return evaluate.main([*arguments, "--resamples", "100"])


def report_of(root, folder="results"):
    return json.loads((root / folder / "report.json").read_text(encoding="utf-8"))


def refused(capsys, *parts, arguments=("--quiet",)):
    """evaluate.py ends with 2 and one line that holds all the parts."""
    assert score(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in parts:
        assert part in error
    return True


def test_report_has_the_agreed_shape(root):
    make_run(root)
    assert score("--quiet") == 0
    report = report_of(root)
    assert set(report) >= {"benchmark", "commit", "arms"} and set(report["benchmark"]) >= {"file", "sha256"}
    (arm,) = report["arms"]
    assert set(arm) >= {"arm", "model", "frozen", "objective", "seeds", "conditions", "ratios"}
    assert set(arm["conditions"]) == set(CONDITIONS) and set(arm["ratios"]) == set(RATIOS) - {"names_and_codes_ratio", "foreign_cost"}  # no such answers, no such run
    for name, by_level in arm["conditions"].items():
        assert set(by_level) == ({str(ONLY[name])} if name in ONLY else {"1", "2", "3"})
        for by_lang in by_level.values():
            assert set(by_lang) == {"en", "zh"}
            for cell in by_lang.values():
                assert set(cell) >= {"n", "em", "em_ci", "contains", "f1"}
                assert cell["n"] == 12 and cell["em_ci"][0] <= cell["em"] <= cell["em_ci"][1]
                assert sum(part["n"] for part in cell["by_category"].values()) == 12
                assert sum(part["n"] for part in cell["by_position"].values()) == 12
    assert set(arm["ratios"]["distractor_decay"]) == {"3"} and set(arm["ratios"]["merged_4_ratio"]) == {"1"}
    assert all({"value", "ci"} <= set(cell) for table in arm["ratios"].values() for part in table.values()
               for cell in part.values())


def test_scores_reach_the_report(root):
    rows = make_rows(0, langs=["en"], conditions={"B_memory": 1.0, "C_nothing": 0.0})
    for row in rows:
        row["prediction"] = {"B_memory": "It is Bruno", "C_nothing": ""}[row["condition"]]
    rows[0]["prediction"] = "the bruno."
    make_run(root, rows=rows[::-1])
    assert score("--quiet") == 0
    cells = report_of(root)["arms"][0]["conditions"]
    b, c = cells["B_memory"]["1"]["en"], cells["C_nothing"]["1"]["en"]
    assert (b["em"], b["contains"]) == (round(1 / 12, 6), 1.0)
    assert b["f1"] == pytest.approx((1 + 11 * 0.5) / 12, abs=1e-5)
    assert (b["degenerate"], b["update_norm"], c["degenerate"], c["update_norm"]) == (0.0, 0.25, 1.0, None)
    assert report_of(root)["arms"][0]["ratios"]["lift_over_no_memory"]["1"]["en"]["value"] == round(1 / 12, 6)


def test_same_report_whatever_the_order_of_rows(root):
    rows = make_rows(0)
    make_run(root, rows=rows)
    assert score("--quiet", "--out", "one") == 0
    random.Random(5).shuffle(rows)
    (root / "results/first/predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert score("--quiet", "--out", "two") == 0
    assert (root / "one/report.json").read_bytes() == (root / "two/report.json").read_bytes()


def test_seeds_of_an_arm_are_pooled(root):
    for seed in (0, 1, 2):
        make_run(root, f"s{seed}", seed=seed, adapter_sha256=str(seed))
    make_run(root, "other", arm="lm", objective="lm")
    assert score("--quiet") == 0
    other, arm = report_of(root)["arms"]
    cell = arm["conditions"]["B_memory"]["1"]["en"]
    assert (other["arm"], arm["seeds"], cell["n"], cell["samples"]) == ("lm", [0, 1, 2], 36, 4)
    assert sum(cell["em_by_seed"].values()) / 3 == pytest.approx(cell["em"], abs=1e-5)
    assert len(cell["em_by_seed"]) == 3 and len(arm["tests"]["B_memory_vs_C_nothing"]["1"]["en"]["by_seed"]) == 3


def test_conditions_of_one_seed_may_stand_in_several_folders(root):
    rows = make_rows(0)
    make_run(root, "a", rows=[row for row in rows if row["condition"][0] == "A"])
    make_run(root, "b", rows=[row for row in rows if row["condition"][0] != "A"])
    assert score("--quiet") == 0
    assert "memory_efficiency_ratio" in report_of(root)["arms"][0]["ratios"]


def test_memoryless_conditions_are_lent_to_the_other_arms_of_a_base_and_told(root):
    rows = make_rows(0)
    make_run(root, "full", rows=rows)
    make_run(root, "bare", rows=[row for row in rows if row["condition"] == "B_memory"], arm="other", adapter="checkpoints/other")
    assert score("--quiet") == 0
    full, other = sorted(report_of(root)["arms"], key=lambda arm: arm["arm"] != "recall")
    lent = other["borrowed"]
    assert lent and set(map(tuple, lent.values())) == {("recall",)} and full["borrowed"] == {}
    for condition in lent:
        assert other["conditions"][condition] == full["conditions"][condition]
    assert other["ratios"]["memory_efficiency_ratio"]["1"]["en"]["A_tuned_run"] is True
    assert "are the rows of recall" in (root / "RESULTS.md").read_text(encoding="utf-8")


def test_the_fair_ceiling_that_is_lent_is_the_lora_that_reads_best(root):
    rows, tuned = make_rows(0), [row for row in make_rows(0) if row["condition"] == "A_tuned"]
    for name, prediction in (("poor", "no idea"), ("good", None)):
        make_run(root, name, arm=name, objective="context", tuned_adapter_sha256=name[0] * 64, adapter=None,
                 rows=[row | {"prediction": prediction or row["gold"]} for row in tuned])
    make_run(root, "bare", rows=[row for row in rows if row["condition"] == "B_memory"], arm="other", adapter="checkpoints/other")
    assert score("--quiet") == 0
    other = next(arm for arm in report_of(root)["arms"] if arm["arm"] == "other")
    assert other["borrowed"]["A_tuned"] == ["good"] and other["conditions"]["A_tuned"]["1"]["en"]["em"] == 1.0


def test_each_language_has_its_own_best_ceiling(root):
    rows, tuned = make_rows(0), [row for row in make_rows(0) if row["condition"] == "A_tuned"]
    for lang, name in (("en", "reads-english"), ("zh", "reads-chinese")):
        make_run(root, name, arm=name, objective="context", tuned_adapter_sha256=lang * 32, adapter=None,
                 rows=[row | {"prediction": row["gold"] if row["lang"] == lang else "?"} for row in tuned])
    make_run(root, "bare", rows=[row for row in rows if row["condition"] == "B_memory"], arm="other", adapter="checkpoints/other")
    assert score("--quiet") == 0
    other = next(arm for arm in report_of(root)["arms"] if arm["arm"] == "other")
    assert other["borrowed"]["A_tuned"] == ["reads-chinese", "reads-english"]
    assert [other["conditions"]["A_tuned"]["1"][lang]["em"] for lang in ("en", "zh")] == [1.0, 1.0]


def test_another_base_lends_nothing(root):
    rows = make_rows(0)
    make_run(root, "full", rows=rows)
    make_run(root, "bare", rows=[row for row in rows if row["condition"] == "B_memory"], arm="other", adapter="checkpoints/other",
             model_sha256="f" * 64)
    assert score("--quiet") == 0
    other = next(arm for arm in report_of(root)["arms"] if arm["arm"] == "other")
    assert other["borrowed"] == {} and set(other["conditions"]) == {"B_memory"}


def test_block_in_results_md_is_replaced_and_nothing_else(root, capsys):
    make_run(root)
    assert score() == 0
    out = capsys.readouterr().out
    assert "memory_efficiency_ratio" in out and "What the rows mean" in out
    first = (root / "RESULTS.md").read_bytes().decode()
    assert first.startswith("# Results\r\n<!-- report:begin -->\n") and first.endswith("<!-- report:end -->\ntail")
    block = first.split("report:begin")[1]
    assert "old\n" not in block and first.count("**recall on tiny, ") == 2 and first.count("| level 1 | level 2 | level 3 |") == 2
    for part in ("recall on tiny, English**", "recall on tiny, Chinese**", "abc123", "`python run.py`", "float32", "torch 2", "12 (4)"):
        assert part in first
    assert "P_paper" not in first and "not run" not in first
    assert score("--quiet") == 0
    assert (root / "RESULTS.md").read_bytes().decode() == first


def test_a_base_run_is_not_shown_twice(root):
    """What another arm shows as lent rows has no table of its own; its run stays listed, and its numbers in report.json."""
    rows = make_rows(0)
    make_run(root, "base", arm="tiny-base", objective="none", rows=[row for row in rows if row["condition"] == "C_nothing"])
    make_run(root, "memory", adapter="checkpoints/recall", rows=[row for row in rows if row["condition"] == "B_memory"])
    assert score("--quiet") == 0
    block = (root / "RESULTS.md").read_text(encoding="utf-8")
    assert "**tiny-base on" not in block and "- base: tiny-base on tiny" in block and "| C_nothing |" in block
    assert block.index("| arm, base, language |") < block.index("**recall on tiny, English**")
    assert {arm["arm"] for arm in report_of(root)["arms"]} == {"tiny-base", "recall"}


def test_table_says_when_the_fair_ceiling_did_not_run(root, capsys):
    make_run(root, rows=[row for row in make_rows(0) if row["condition"] != "A_tuned"])
    assert score() == 0
    assert "fair ceiling not run" in capsys.readouterr().out
    assert "fair ceiling not run" in (root / "RESULTS.md").read_text(encoding="utf-8")


def test_an_interval_without_width_is_explained(root, capsys):
    make_run(root, rows=make_rows(0, conditions={"B_memory": 0.5}))
    assert score() == 0
    assert "3/N" not in capsys.readouterr().out
    make_run(root, "second", rows=make_rows(0, conditions={"C_nothing": 0.0}))
    assert score() == 0
    assert "0.000 [0.000, 0.000]" in (out := capsys.readouterr().out) and "3/N" in out


def test_out_leaves_results_md_alone_unless_named(root):
    make_run(root)
    before = (root / "RESULTS.md").read_bytes()
    assert score("--quiet", "results/first", "--out", "elsewhere") == 0
    assert (root / "RESULTS.md").read_bytes() == before and not (root / "results/report.json").exists()
    assert score("--quiet", "--out", "elsewhere", "--results-md", "RESULTS.md") == 0
    assert (root / "RESULTS.md").read_bytes() != before


def test_a_changed_benchmark_file_is_told(root, capsys):
    make_run(root)
    (root / "benchmark_v1.json").write_text("{}")
    assert score() == 0
    assert "has changed since these runs" in capsys.readouterr().out
    assert report_of(root)["benchmark"]["unchanged"] is False


def assert_drawn(path):
    """A picture of a figure's size with data in it and a free border."""
    pixels = matplotlib.image.imread(path)[..., :3]
    assert pixels.shape[0] > 2.5 * COARSE and pixels.shape[1] > 4.5 * COARSE
    assert (pixels.min(axis=2) < 0.9).mean() > 0.01          # ink
    assert (np.ptp(pixels, axis=2) > 0.2).mean() > 0.0005     # in colour: the data, not only the axes
    edge = np.concatenate([pixels[:, :2].ravel(), pixels[:, -2:].ravel(), pixels[:2].ravel(), pixels[-2:].ravel()])
    assert edge.min() > 0.9                                   # nothing runs over the border


@pytest.mark.parametrize("langs, arms", [(["en", "zh"], 1), (["en"], 6)])
def test_figures_are_written_and_not_blank(drawn, langs, arms):
    for number in range(arms):
        make_run(drawn, f"r{number}", make_rows(number, langs), train=True, arm=f"arm{number}",
                 adapter=f"adapters/{number}")
    assert score("--quiet") == 0
    figures = sorted(path.name for path in (drawn / "results/figures").iterdir())
    assert figures == ["b_vs_d.png", "category_heatmap.png", "em_by_condition.png", "em_by_position.png",
                       "memory_curves.png", "training_curve.png"]
    for name in figures:
        assert_drawn(drawn / "results/figures" / name)


def test_b_vs_d_counts_only_the_seeds_that_were_asked_both(root):
    make_run(root, "both", make_rows(0, ["en"], {"B_memory": 0.6, "D_distractor": 0.4}), conditions=["B_memory", "D_distractor"])
    assert score("--quiet") == 0
    alone = report_of(root)["arms"][0]["b_vs_d"]
    make_run(root, "only-b", make_rows(1, ["en"], {"B_memory": 0.0}), conditions=["B_memory"], seed=1)
    assert score("--quiet") == 0
    (arm,) = report_of(root)["arms"]
    assert arm["seeds"] == [0, 1] and arm["b_vs_d"] == alone and sum(count for *_, count in alone["en"]) == 4


def test_a_cut_memory_is_drawn_by_its_bytes_beside_the_kv_cache(root):
    rows = make_rows(0, ["en"], {"B_memory": 0.9, "B_rank_16": 0.6, "B_rank_4": 0.1})
    sizes = {"B_memory": 5000, "B_rank_16": 3000, "B_rank_4": 800}
    make_run(root, rows=[row | {"memory_bytes": sizes[row["condition"]], "tokens_written": 10} for row in rows], conditions=list(sizes), kv_bytes_per_token=700)
    assert score("--quiet") == 0
    report = report_of(root)
    assert report["arms"][0]["kv_bytes"] == {"en": 7000}
    *_, axes = evaluate.plots.memory_curves(report).axes
    (line,) = axes.containers
    assert sorted(line[0].get_xdata()) == [800, 3000, 5000] and axes.get_xscale() == "log" and "KV cache" in axes.get_xlabel()
    assert [list(mark.get_xdata()) for mark in axes.lines if mark.get_linestyle() == ":"] == [[7000, 7000]]


def test_scaled_memories_and_noise_are_drawn_by_their_size(drawn):
    chances = {"B_memory": 0.9, "B_scale_0.1": 0.2, "B_scale_10": 0.0, "N_noise": 0.0, "N_scale_10": 0.0}
    norms = {"B_memory": 2.0, "B_scale_0.1": 0.2, "B_scale_10": 20.0, "N_noise": 2.0, "N_scale_10": 20.0}
    stuck = lambda row: {"prediction": ""} if row["condition"] == "N_scale_10" else {}
    rows = [row | {"update_norm": norms[row["condition"]]} | stuck(row) for row in make_rows(0, ["en"], chances) if row["level"] == 1]
    make_run(drawn, rows=rows, conditions=list(chances), levels=[1], langs=["en"])
    assert score("--quiet") == 0
    report = report_of(drawn)
    (axes,) = evaluate.plots.em_by_scale(report).axes
    memory, noise = axes.containers
    cells = {name: report["arms"][0]["conditions"][name]["1"]["en"] for name in chances}
    assert list(memory[0].get_xdata()) == [0.2, 2.0, 20.0] and list(noise[0].get_xdata()) == [2.0, 20.0] and axes.get_xscale() == "log"
    assert list(memory[0].get_ydata()) == [cells[name]["em"] for name in ("B_scale_0.1", "B_memory", "B_scale_10")]
    assert [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == ":"][1] == [0.0, 1.0]
    assert_drawn(drawn / "results/figures/em_by_scale.png")


def test_figures_and_tables_do_not_depend_on_the_run(drawn):
    """Two processes whose sets have other orders, on arms whose conditions ran on different levels."""
    make_run(drawn, "a", make_rows(0, ["en"]), arm="a")
    make_run(drawn, "b", [row for row in make_rows(1, ["en"]) if row["level"] < 3], arm="b")
    outputs = []
    for seed in ("1", "7"):
        subprocess.run([sys.executable, evaluate.__file__, "--quiet", "--resamples", "100"], check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        files = [drawn / "RESULTS.md", drawn / "results/report.json", *sorted((drawn / "results/figures").iterdir())]
        outputs.append({path.name: path.read_bytes() for path in files})
    assert outputs[0] == outputs[1] and len(outputs[0]) > 6


def test_merged_memories_are_drawn_by_the_facts_they_hold(root):
    bench = benchmark_file.load_benchmark(evaluate.__file__.replace("evaluate.py", "benchmark_v1.json"))
    bench["samples"] = [sample for sample in bench["samples"] if sample["level"] == 1][:3]
    (root / "benchmark_v1.json").write_text(json.dumps(bench), encoding="utf-8")
    make_run(root, benchmark={"file": "benchmark_v1.json", "sha256": benchmark_file.sha256_of(root / "benchmark_v1.json")})
    assert score("--quiet") == 0
    facts = sum(len(sample["facts"]) for sample in bench["samples"]) / 3
    axes = evaluate.plots.memory_curves(report_of(root)).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [f"{n}\n({n * facts:.0f})" for n in (1, 2, 4, 8)]


def test_the_seeds_of_an_arm_have_a_training_curve_each(drawn, capsys):
    for seed in (0, 1, 2):
        make_run(drawn, f"r{seed}", make_rows(seed, ["en"]), train=seed < 2, seed=seed, adapter=f"adapters/seed{seed}/a", adapter_sha256=str(seed))
    curves, notes = evaluate.load_curves([evaluate.load_run(drawn / f"results/r{seed}", False) for seed in (0, 1, 2)])
    assert list(curves) == ["a on tiny", "a (seed 1) on tiny"] and all(len(rows) == 200 for rows in curves.values())
    assert len(notes) == 1 and "no training curve of a (seed 2)" in notes[0]


def test_training_and_size_have_their_figures(drawn):
    """An arm and its snapshot are one line; a base's size counts for all runs of its weights; a base with random weights has a place alone."""
    small, large = {"model": "small", "model_sha256": "s"}, {"model": "large", "model_sha256": "l"}
    make_run(drawn, "a", make_rows(0, ["en"]), arm="a", conversations_seen=800, base_parameters=10 ** 8, **small)
    make_run(drawn, "a-at-100", make_rows(1, ["en"]), arm="a-at-100", snapshot_of="a", conversations_seen=100, base_parameters=10 ** 8, **small)
    make_run(drawn, "b", make_rows(2, ["en"], {"B_memory": 0.5, "A_context": 0.9}), arm="b", **large)  # of before the size was kept
    make_run(drawn, "c", make_rows(3, ["en"], {"C_nothing": 0.1}), arm="c", base_parameters=5 * 10 ** 8, **large)
    (drawn / "results/bench").mkdir()
    for name, parameters, weights in (("huge", 8 * 10 ** 9, "random"), ("large", 9 * 10 ** 9, "random"), ("timed", 10 ** 9, "real")):  # large has scores by now
        (drawn / f"results/bench/{name}.json").write_text(json.dumps({"model": name, "parameters": parameters, "weights": weights}))
    assert score("--quiet") == 0
    for name in ("em_by_training", "kept_by_size"):
        assert_drawn(drawn / f"results/figures/{name}.png")
    report = report_of(drawn)
    em = {arm["arm"]: arm["conditions"].get("B_memory", {}).get("1", {}).get("en", {}).get("em") for arm in report["arms"]}
    (line,) = evaluate.plots.em_by_training(report).axes[0].containers
    assert [*zip(*line[0].get_data())] == [(100, em["a-at-100"]), (800, em["a"])]
    axes = evaluate.plots.kept_by_size(report).axes[0]
    places = {line.get_label().split(",")[1].strip(): (line[0].get_xdata()[0], line[0].get_markerfacecolor()) for line in axes.containers}
    assert set(places) == {"a", "a-at-100", "b"} and places["b"] == (5 * 10 ** 8, "none") != places["a"][1]  # hollow: no fair ceiling
    assert all(x == pytest.approx(10 ** 8, rel=0.1) for x, _ in (places["a"], places["a-at-100"]))
    assert [text.get_text() for text in axes.texts] == ["huge: not scored"]


def test_a_figure_without_data_is_not_made_and_an_old_one_goes(drawn, capsys):
    make_run(drawn, rows=make_rows(0, conditions={"A_context": 0.5, "C_nothing": 0.0}), adapter="checkpoints/gone")
    old = drawn / "results/figures/training_curve.png"
    old.parent.mkdir()
    old.write_bytes(b"old")
    assert score() == 0
    out = capsys.readouterr().out
    assert "training_curve.png is not made" in out and "b_vs_d.png is not made" in out
    assert "checkpoints/gone/train.jsonl" in out and not old.exists()


# --- bad input ------------------------------------------------------------------------------------------------

def test_no_runs_and_missing_files(root, capsys):
    assert refused(capsys, "results/", "run_experiment.py")
    path = make_run(root)
    assert refused(capsys, "results/nowhere/run.json", arguments=("results/nowhere",))
    (path / "predictions.jsonl").unlink()
    assert refused(capsys, "results/first/predictions.jsonl")
    make_run(root, "second")
    (root / "results/second/run.json").unlink()
    assert refused(capsys, "results/second/run.json", arguments=("results/second",))


@pytest.mark.parametrize("line, parts", [
    ('{"sample_id": "L1', ["line 4", "not JSON"]), ("", ["line 4", "not JSON"]), ("[1]", ["line 4", "JSON object"]),
    ({"gold": None}, ["line 4", "'gold'"]), ({"level": "1"}, ["line 4", "'level'"]),
    ({"level": 4}, ["line 4", "'level'"]),
    ({"lang": "de"}, ["line 4", "'lang'", "'de'"]), ({"category": "pets"}, ["line 4", "'category'"]),
    ({"condition": "B_memroy"}, ["line 4", "'condition'"]), ({"position": "end"}, ["line 4", "'position'"]),
    ({"update_norm": float("nan")}, ["line 4", "NaN"]), ({"gold": "The"}, ["line 4", "'The'", "empty"]),
    ({"aliases": [3]}, ["line 4", "3"]), ({"aliases": ["…"], "lang": "zh"}, ["line 4", "empty"])])
def test_bad_row_is_named_by_file_and_line(root, capsys, line, parts):
    path = make_run(root) / "predictions.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[3] = line if isinstance(line, str) else json.dumps(json.loads(lines[3]) | line)
    path.write_text("\n".join(lines), encoding="utf-8")
    before = (root / "RESULTS.md").read_bytes()
    assert refused(capsys, "predictions.jsonl", *parts)
    assert not (root / "results/report.json").exists() and (root / "RESULTS.md").read_bytes() == before


def test_a_field_left_out_of_a_row(root, capsys):
    rows = make_rows(0)
    del rows[6]["aliases"]
    make_run(root, rows=rows)
    assert refused(capsys, "predictions.jsonl line 7", "'aliases' is missing")


def test_rows_missing_or_doubled(root, capsys):
    rows = make_rows(0)
    path = make_run(root, rows=rows + [copy.deepcopy(rows[5])])
    assert refused(capsys, f"predictions.jsonl line {len(rows) + 1}", "second time", "line 6")
    path.joinpath("predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    assert refused(capsys, "predictions.jsonl", f"has {len(rows) - 1} rows", str(len(rows) + 1))
    path.joinpath("predictions.jsonl").write_text("")
    assert refused(capsys, "predictions.jsonl", "no row")


@pytest.mark.parametrize("changed, parts", [
    ({"complete": False}, ["results/second/run.json", "'complete'", "--allow-incomplete"]),
    ({"benchmark": {"file": "natural_v1.json", "sha256": "1" * 64}}, ["results/second", "natural_v1.json", "--out"]),
    ({"benchmark": {"file": "b.json"}}, ["results/second/run.json", "benchmark.sha256"]),
    ({"seed": "0"}, ["results/second/run.json", "'seed'"]),
    ({}, ["results/second/run.json", "results/first/run.json", "A_context", "remove one"]),
    ({"seed": 1, "frozen": False}, ["results/second/run.json", "'frozen'", "results/first/run.json"]),
    ({"seed": 1, "objective": "lm"}, ["results/second/run.json", "'objective'"]),
    ({"adapter_sha256": "other"}, ["results/second/run.json", "'adapter_sha256'"])])
def test_runs_that_cannot_stand_together(root, capsys, changed, parts):
    make_run(root)
    make_run(root, "second", **changed)
    assert refused(capsys, *parts)


def test_unfinished_runs_are_marked_partial_when_allowed(root, capsys):
    make_run(root, rows=make_rows(0)[:-10], complete=False)
    assert score("--allow-incomplete") == 0
    assert "recall (partial)" in capsys.readouterr().out
    assert "recall (partial)" in (root / "RESULTS.md").read_text(encoding="utf-8")
    assert report_of(root)["arms"][0]["complete"] is False


def test_results_md_missing_or_without_marks(root, capsys):
    make_run(root)
    path = root / "RESULTS.md"
    for text in ("no marks", "<!-- report:end -->\n<!-- report:begin -->\n", "<!-- report:begin -->\n" * 2 +
                 "<!-- report:end -->\n"):
        path.write_text(text)
        assert refused(capsys, "RESULTS.md", "<!-- report:begin -->", "<!-- report:end -->")
        assert path.read_text() == text and not (root / "results/report.json").exists()
    path.unlink()
    assert refused(capsys, "RESULTS.md", "No such file", "<!-- report:begin -->")


def test_bad_training_log_and_blocked_output(root, capsys):
    make_run(root, train=True, adapter="adapters/a")
    (root / "blocked").write_text("a file")
    assert refused(capsys, "blocked", "--out", arguments=("--quiet", "--out", "blocked"))
    log = root / "adapters/a/train.jsonl"
    log.write_text(log.read_text() + '{"update": 201, "loss": NaN, "token_accuracy": 1}\n')
    assert refused(capsys, "adapters/a/train.jsonl line 201", "NaN")


def test_a_swapped_memory_is_also_judged_over_all_levels(root):
    rows = make_rows(0)
    for row in rows:
        if row["condition"] in ("B_swapped", "C_nothing"):  # right only on level 1, and only with the wrong memory
            row["prediction"] = row["gold"] if (row["condition"], row["level"]) == ("B_swapped", 1) else "?"
    make_run(root, rows=rows)
    assert evaluate.main(["--quiet"]) == 0
    arm = json.loads((root / "results" / "report.json").read_text(encoding="utf-8"))["arms"][0]
    assert [arm["ratios"]["swapped_lift"][level]["en"]["value"] for level in "123"] == [1.0, 0.0, 0.0]
    cell = arm["pooled_ratios"]["swapped_lift"]["en"]
    assert (cell["value"], cell["n"], cell["samples"]) == (pytest.approx(1 / 3, abs=1e-6), 36, 12) and cell["ci"][0] > 0
    line = next(line for line in (root / "RESULTS.md").read_text(encoding="utf-8").splitlines() if line.startswith("| swapped_lift"))
    assert [text.split()[0] for text in line.split("|")[2:6]] == ["1.000", "0.000", "0.000", "0.333"]
