"""The scorer in both languages, the bootstrap, the ratios and McNemar's test."""
import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

import evaluate
from intervals import RATIOS, Bootstrap, em_interval, mcnemar, ratio_cell

FAST = Bootstrap(resamples=400, seed=0)


# --- scorer ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prediction, answers, lang, em, inside, f1", [
    ("Bruno", ["Bruno"], "en", True, True, 1.0),
    ("the cellar.", ["cellar"], "en", True, True, 1.0),
    ("A  Blue\tkayak!", ["blue kayak"], "en", True, True, 1.0),
    ("half past nine", ["9:30", "half past nine"], "en", True, True, 1.0),          # an alias
    ("It is Bruno", ["Bruno"], "en", False, True, 0.5),                             # contains is not EM
    ("", ["Bruno"], "en", False, False, 0.0),
    ("the", ["Bruno"], "en", False, False, 0.0),
    ("Bruna", ["Bruno"], "en", False, False, 0.0),
    ("theatre", ["atre"], "en", False, True, 0.0),                                  # "the" goes only as a word
    ("1,200 dollars", ["$1200 dollars"], "en", True, True, 1.0),
    ("green tea green", ["green tea"], "en", False, True, 0.8),                     # repeated words count once
    ("４２号", ["42号"], "zh", True, True, 1.0),                                     # full-width digits
    ("周三，下午。", ["周三下午"], "zh", True, True, 1.0),                            # Chinese punctuation
    ("《 蓝 色 》", ["蓝色"], "zh", True, True, 1.0),
    ("ＷｉＦｉ密码是 abc－１２", ["abc-12"], "zh", False, True, 2 * 5 / (12 + 5)),
    ("布鲁诺", ["布鲁诺（狗）", "布鲁诺"], "zh", True, True, 1.0),
    ("叫布鲁诺", ["布鲁诺"], "zh", False, True, 2 * 3 / 7),
    ("", ["布鲁诺"], "zh", False, False, 0.0),
    ("。、！", ["布鲁诺"], "zh", False, False, 0.0),
    ("Anna 和李雷", ["anna和李雷"], "zh", True, True, 1.0),                          # two scripts in one answer
])
def test_scorer_examples(prediction, answers, lang, em, inside, f1):
    assert evaluate.exact_match(prediction, answers, lang) is em
    assert evaluate.contains(prediction, answers, lang) is inside
    assert evaluate.f1(prediction, answers, lang) == pytest.approx(f1)


def test_unknown_language_is_refused():
    with pytest.raises(ValueError, match="'de'"):
        evaluate.normalize("Hund", "de")


WORDS = st.lists(st.sampled_from(["the", "The", "a", "an", "Bruno", "bruno!", "cellar", "the-cellar", "9:30", "$5", "",
                                  "O'Neil", "café", "“x”", "\t"]), max_size=6).map(" ".join)
TEXT = st.one_of(WORDS, st.text(max_size=20))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(TEXT, st.lists(TEXT, min_size=1, max_size=3))
def test_english_scores_equal_torchmetrics(prediction, answers):
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    expected = squad([{"prediction_text": prediction, "id": "1"}],
                     [{"answers": {"text": answers, "answer_start": [0] * len(answers)}, "id": "1"}])
    assert 100.0 * evaluate.exact_match(prediction, answers, "en") == pytest.approx(float(expected["exact_match"]))
    assert 100.0 * evaluate.f1(prediction, answers, "en") == pytest.approx(float(expected["f1"]), abs=1e-3)


@settings(deadline=None, derandomize=True)
@given(st.text("蓝色布鲁诺42aB", max_size=8), st.text("，。、！？《》“”—…　 \t.,'-", max_size=3), st.booleans())
def test_chinese_width_case_spaces_and_punctuation_do_not_count(answer, between, wide):
    said = between.join(answer.upper() if wide else answer)
    if wide:
        said = "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in said)
    assert evaluate.normalize(said, "zh") == answer.lower()


@pytest.mark.parametrize("prediction, lang, expected", [
    ("", "en", True), ("  ", "zh", True), ("the the the the the", "en", True),
    ("去去去去去去去去去", "zh", True), ("Bruno is a dog. Bruno is a dog. Bruno is a dog.", "en", True),
    ("Bruno", "en", False), ("888 888", "en", False), ("1000000", "zh", False), ("布鲁诺和布鲁诺", "zh", False)])
def test_degenerate(prediction, lang, expected):
    assert evaluate.degenerate(prediction, lang) is expected


# --- intervals ------------------------------------------------------------------------------------------------

def probes(table, seed=0):
    """Rows of {sample: [1, 0, ...]}."""
    return [{"sample_id": sample, "probe_id": f"{sample}-p{number}", "seed": seed, "em": float(hit)}
            for sample, hits in table.items() for number, hit in enumerate(hits)]


def test_interval_covers_the_truth_when_probes_of_a_conversation_stand_or_fall_together():
    rng, covered, naive_covered, widths = random.Random(1), 0, 0, []
    for _ in range(100):
        hits = [rng.random() < 0.4 for _ in range(40)]
        rows = probes({f"s{number}": [hit] * 8 for number, hit in enumerate(hits)})
        low, high = em_interval(rows, FAST)
        naive = bootstrap(([row["em"] for row in rows],), np.mean, n_resamples=400, method="percentile",
                          rng=np.random.default_rng(0)).confidence_interval
        covered, naive_covered = covered + (low <= 0.4 <= high), naive_covered + (naive.low <= 0.4 <= naive.high)
        widths.append((high - low) / (naive.high - naive.low))
    assert covered >= 88 and naive_covered <= 70
    assert np.median(widths) == pytest.approx(8 ** 0.5, rel=0.15)  # 8 answers that are one


def test_interval_is_deterministic_and_undefined_bca_falls_back():
    rows = probes({f"s{number}": [number % 3 == 0, 1] for number in range(30)})
    assert em_interval(rows, FAST) == em_interval(rows, FAST)
    assert em_interval(rows, FAST) == em_interval(rows[::-1], FAST)
    assert em_interval(probes({"a": [1, 1], "b": [1, 1]}), FAST) == [1.0, 1.0]
    assert em_interval(probes({"a": [1, 0]}), FAST) is None


def test_seeds_are_replicates_not_more_conversations():
    table = {f"s{number}": [number % 2, number % 2] for number in range(40)}
    one, three = probes(table), [row for seed in range(3) for row in probes(table, seed)]
    assert em_interval(three, FAST) == em_interval(one, FAST)


def by_hand():
    """EM on samples a, b, c with two probes each: A 5/6, tuned 6/6, B 3/6, C 1/6, D 2/6, merged 1/6."""
    return {"A_context": probes({"a": [1, 1], "b": [1, 1], "c": [1, 0]}),
            "A_tuned": probes({"a": [1, 1], "b": [1, 1], "c": [1, 1]}),
            "B_memory": probes({"a": [1, 1], "b": [1, 0], "c": [0, 0]}),
            "C_nothing": probes({"a": [0, 0], "b": [1, 0], "c": [0, 0]}),
            "D_distractor": probes({"a": [1, 1], "b": [0, 0], "c": [0, 0]}),
            "B_merged_4": probes({"a": [1, 0], "b": [0, 0], "c": [0, 0]})}


@pytest.mark.parametrize("name, value", [
    ("memory_efficiency_ratio", 0.5), ("ratio_vs_A_context", 0.6), ("lift_over_no_memory", 2 / 6),
    ("distractor_decay", -1 / 3), ("merged_4_ratio", 1 / 3)])
def test_ratios_by_hand(name, value):
    assert ratio_cell(RATIOS[name], by_hand(), FAST)["value"] == pytest.approx(value)


def test_seeds_that_answered_less_are_left_out_of_what_they_lack():
    """A seed with B_memory alone says nothing of what four conversations in one memory keep; the base's rows are of no seed."""
    rows = {"B_memory": probes({"a": [1, 1], "b": [1, 1]}, seed=0) + probes({"a": [1, 0], "b": [0, 1]}, seed=1),
            "B_merged_4": probes({"a": [1, 0], "b": [0, 0]}, seed=1), "A_tuned": probes({"a": [1, 1], "b": [1, 1]}, seed=None)}
    cell = ratio_cell(RATIOS["merged_4_ratio"], rows, FAST)
    assert cell["value"] == pytest.approx(0.5) and "of seeds 1" in cell["note"]
    kept = ratio_cell(RATIOS["memory_efficiency_ratio"], rows, FAST)
    assert kept["value"] == pytest.approx(6 / 8) and "note" not in kept


def test_the_ratio_on_names_and_codes_looks_at_nothing_else():
    golds = {"a": "玛尔塔", "b": "BY-795", "c": "attic", "d": "11G", "e": "24 euros"}
    right = {"A_context": "abcd", "B_memory": "ace"}  # of a, b and d: three in context, one from memory
    rows = {name: [row | {"name_or_code": evaluate.is_name_or_code(golds[row["sample_id"]])}
                   for row in probes({sample: [int(sample in good)] for sample in golds})] for name, good in right.items()}
    cell = ratio_cell(dataclasses.replace(RATIOS["names_and_codes_ratio"], least=3), rows, FAST)
    assert (cell["value"], cell["n"]) == (pytest.approx(1 / 3), 3)
    assert ratio_cell(RATIOS["names_and_codes_ratio"], rows, FAST) is None  # of three probes nothing is said
    assert evaluate.is_name_or_code("Marta") and not evaluate.is_name_or_code("ring") and not evaluate.is_name_or_code("8201")


def test_the_ceiling_is_the_better_reading_and_says_which():
    rows = by_hand()
    cell = ratio_cell(RATIOS["memory_efficiency_ratio"], rows, FAST)
    assert (cell["denominator"], cell["A_tuned_run"]) == ("A_tuned", True)
    rows["A_tuned"] = probes({"a": [0, 0], "b": [0, 0], "c": [1, 1]})
    assert ratio_cell(RATIOS["memory_efficiency_ratio"], rows, FAST)["denominator"] == "A_context"
    del rows["A_tuned"]
    cell = ratio_cell(RATIOS["memory_efficiency_ratio"], rows, FAST)
    assert (cell["denominator"], cell["A_tuned_run"]) == ("A_context", False)
    assert cell["value"] == pytest.approx(0.6)
    del rows["A_context"]
    assert ratio_cell(RATIOS["memory_efficiency_ratio"], rows, FAST) is None


def test_ratio_interval_is_paired():
    """B is A with every second probe lost, conversation by conversation: the ratio is certain, neither EM is."""
    hits = [1, 0] * 20
    rows = {"A_context": probes({f"s{number}": [hit, hit] for number, hit in enumerate(hits)}),
            "B_memory": probes({f"s{number}": [hit, 0] for number, hit in enumerate(hits)})}
    assert ratio_cell(RATIOS["ratio_vs_A_context"], rows, FAST)["ci"] == pytest.approx([0.5, 0.5])
    low, high = em_interval(rows["A_context"], FAST)
    assert high - low > 0.2


def test_ratio_uses_the_probes_in_common_and_says_so():
    rows = by_hand()
    rows["A_context"] = [row for row in rows["A_context"] if row["sample_id"] != "c"]
    cell = ratio_cell(RATIOS["ratio_vs_A_context"], rows, FAST)
    assert (cell["value"], cell["n"], cell["samples"]) == (0.75, 4, 2)
    assert "4 probes" in cell["note"]


def test_ratio_with_denominator_zero():
    rows = by_hand() | {"A_context": probes({"a": [0, 0], "b": [0, 0], "c": [0, 0]})}
    cell = ratio_cell(RATIOS["ratio_vs_A_context"], rows, FAST)
    assert cell["value"] is None and cell["ci"] is None and cell["note"] == "the denominator is 0"
    rows["A_context"] = probes({"a": [1, 0], "b": [0, 0], "c": [0, 0]})  # some resamples miss "a"
    cell = ratio_cell(RATIOS["ratio_vs_A_context"], rows, FAST)
    assert cell["value"] == pytest.approx(3.0) and cell["ci"] is None and "resamples" in cell["note"]


def test_mcnemar_by_hand():
    first = probes({"a": [1, 1, 1, 1, 1, 0, 1, 0]})
    second = probes({"a": [0, 0, 0, 0, 0, 1, 1, 0]})
    test = mcnemar(first, second)  # 5 against 1: p = 2 (C(6,0) + C(6,1)) / 2^6
    assert test["by_seed"]["0"] | {"p": None} == {"n": 8, "first_only": 5, "second_only": 1, "p": None}
    assert test["p"] == pytest.approx(2 * (1 + 6) / 64)
    assert mcnemar(first, first)["p"] == 1.0
    assert mcnemar(first, probes({"a": [0] * 8}, seed=1)) is None


def test_mcnemar_over_seeds_is_the_most_cautious():
    first = probes({"a": [1] * 6}) + probes({"a": [1] * 6}, seed=1)
    second = probes({"a": [0] * 6}) + probes({"a": [1] * 5 + [0]}, seed=1)
    assert mcnemar(first, second)["p"] == 1.0
    assert mcnemar(first, second)["by_seed"]["0"]["p"] == pytest.approx(2 / 64)
