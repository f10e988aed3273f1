"""The training bank: one answer a question, train and dev apart, natural text, enough variety."""
import copy
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import benchmark_file
import training_bank
from bank_talk import Plan, Talk
from bank_values import CATEGORIES, FORM_FIELDS, LISTS, Bank, BankError, load_bank, split_forms

ROOT = Path(__file__).resolve().parent.parent
LANGS = training_bank.BANK_LANGS
SPLITS = ("train", "dev")


def draw(lang, split, n, seed=0, **options):
    rng = random.Random(seed)
    return [training_bank.sample_conversation(rng, lang, split, **options) for _ in range(n)]


@pytest.fixture(scope="module", params=[(lang, split) for lang in LANGS for split in SPLITS], ids="-".join)
def drawn(request):
    """(lang, split, 250 samples)"""
    lang, split = request.param
    return lang, split, draw(lang, split, 250)


def spans_of(sample):
    return {f["fact_id"]: sample["conversation"][slice(*f["span"])] for f in sample["facts"]}


# --- topics

@pytest.mark.parametrize("lang", LANGS)
def test_topics_are_what_single_facts_are_about(lang):
    """The ids of a few relations; every relation of a conversation is among them, the three facts of a chain aside."""
    bank, rng = load_bank(lang), random.Random(2)
    for _ in range(30):
        topics = training_bank.draw_topics(rng, lang)
        plan = Plan(bank, rng, "train", 10, topics)
        assert len(topics) == training_bank.TOPICS and topics <= {r["id"] for r in bank.relations}
        assert sum(fact.relation["id"] not in topics for fact in plan.facts) <= 3
        assert len({fact.relation["id"] for fact in plan.facts}) > 1


# --- determinism

def test_same_state_same_conversation_and_other_seed_other():
    assert draw("en", "train", 5, seed=4) == draw("en", "train", 5, seed=4)
    assert draw("en", "train", 5, seed=4) != draw("en", "train", 5, seed=5)


def test_export_is_the_same_bytes_in_any_process(tmp_path):
    written = []
    for hash_seed in ("1", "2"):
        out = tmp_path / f"{hash_seed}.json"
        subprocess.run([sys.executable, "training_bank.py", "--n", "12", "--seed", "3", "--out", str(out)], cwd=ROOT,
                       check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
        written.append(out.read_bytes())
    assert written[0] == written[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.json", "2.json"]


def test_global_generator_is_left_alone():
    random.seed(1)
    before = random.getstate()
    draw("en", "train", 3)
    assert random.getstate() == before


# --- shape and truth of the samples

@pytest.mark.parametrize("lang", LANGS)
@pytest.mark.parametrize("split", SPLITS)
def test_exported_file_is_a_benchmark_file(tmp_path, lang, split):
    out = tmp_path / "bank.json"
    arguments = ["--lang", lang, "--split", split, "--n", "60", "--out", str(out), "--prose", "1"]
    assert training_bank.main(arguments) == 0
    bench = benchmark_file.load_benchmark(out)
    assert len(bench["samples"]) == 60
    for sample in bench["samples"]:
        assert {len(p["required_facts"]) for p in sample["probes"]} == {sample["level"]}


def test_every_span_holds_the_answer_of_its_question(drawn):
    _, _, samples = drawn
    for sample in samples:
        said = spans_of(sample)
        for probe in sample["probes"]:
            assert probe["gold_answer"].casefold() in said[probe["required_facts"][-1]].casefold()


def test_facts_are_numbered_as_told_and_every_fact_has_one_question(drawn):
    _, _, samples = drawn
    for sample in samples:
        starts = [fact["span"][0] for fact in sample["facts"]]
        assert starts == sorted(starts)
        single = [p["required_facts"][0] for p in sample["probes"] if len(p["required_facts"]) == 1]
        assert single == [fact["fact_id"] for fact in sample["facts"]]
        assert 3 <= len(single) <= 12


@pytest.mark.parametrize("n_facts", [1, 2, 3, 12, 20])
def test_asked_number_of_facts_is_given(n_facts):
    for split in SPLITS:
        assert all(len(sample["facts"]) == n_facts for sample in draw("en", split, 20, n_facts=n_facts))


def test_no_question_has_two_answers(drawn):
    _, _, samples = drawn
    for sample in samples:
        questions = Counter(p["question"].casefold() for p in sample["probes"])
        assert questions.most_common(1)[0][1] == 1
        golds = [p["gold_answer"].casefold() for p in sample["probes"] if len(p["required_facts"]) == 1]
        assert len(set(golds)) == len(golds)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("lang", LANGS)
def test_no_owner_has_a_relation_or_its_group_twice(lang, split):
    rng, bank = random.Random(2), load_bank(lang)
    for _ in range(300):
        plan = Plan(bank, rng, split, 12)
        owners, values = ([word.casefold() for word in words] for words in ({f.subject for f in plan.facts}, [f.value for f in plan.facts]))
        people = {f.value.casefold() for f in plan.facts if f.relation["value"] in bank.content["name_kinds"]}
        assert len(values) == len(set(values)) and not set(owners) & (set(values) - people)  # a word is one thing in a conversation
        owned = Counter((f.subject, f.relation.get("group", f.relation["id"])) for f in plan.facts)
        assert owned.most_common(1)[0][1] == 1
        assert all(f.subject != f.value for f in plan.facts)


@pytest.mark.parametrize("lang", LANGS)
def test_questions_about_two_facts_need_both(lang):
    rng, bank, seen = random.Random(7), load_bank(lang), 0
    for _ in range(300):
        plan = Plan(bank, rng, "train", 8)
        talk = Talk(plan)
        talk.write([])
        text, spans = talk.render()
        for question, gold, (first, second) in plan.joined_questions():
            if not training_bank.needs_both(text, spans[id(first)], spans[id(second)], gold):
                continue  # sample_conversation leaves it out
            seen += 1
            assert first.value == second.subject and gold == second.value
            assert first.subject.casefold() in question.casefold() and second.subject.casefold() not in question.casefold()
            rivals = [f for f in plan.facts if f.relation["id"] == second.relation["id"] and f.value != gold]
            assert rivals, "the second fact alone would answer it"
            assert gold.casefold() not in plan.question(first).casefold()
    assert seen > 60


def test_a_good_part_of_conversations_joins_two_facts(drawn):
    share = sum(sample["level"] == 2 for sample in drawn[2]) / len(drawn[2])
    assert 0.15 < share < 0.6


@pytest.mark.parametrize("lang", LANGS)
def test_most_conversations_hold_the_same_relation_of_two_owners(lang):
    rng, bank = random.Random(3), load_bank(lang)
    plans = [Plan(bank, rng, "train", 8) for _ in range(300)]
    binding = sum(Counter(f.relation["id"] for f in p.facts).most_common(1)[0][1] > 1 for p in plans)
    several = sum(Counter(f.subject for f in p.facts).most_common(1)[0][1] > 1 for p in plans)
    assert binding > 250 and several > 200


@pytest.mark.parametrize("lang", LANGS)
def test_correction_asks_for_the_right_value_only(lang):
    rng, bank, corrected = random.Random(5), load_bank(lang), 0
    for _ in range(400):
        plan = Plan(bank, rng, "train", 6)
        talk, values = Talk(plan), {f.value for f in plan.facts}
        drawn_before = set(plan.values | plan.names)
        talk.write([])
        wrong = (plan.values | plan.names) - drawn_before
        if not wrong:
            continue
        corrected += 1
        text, spans = talk.render()
        assert talk.late == []
        assert not wrong & {value.casefold() for value in values}
        right_from, right_to = spans[id(talk.corrected)]
        assert talk.corrected.value.casefold() in text[right_from:right_to].casefold()
        assert text.casefold().index(wrong.pop()) < right_to
    assert 25 < corrected < 120


@pytest.mark.parametrize("lang", LANGS)
def test_passages_never_swallow_a_fact(lang):
    for sample in draw(lang, "dev", 400, seed=1, n_prose=1):
        assert len(spans_of(sample)) == len(sample["facts"])


def test_passages_stand_in_the_conversation():
    plain, filled = draw("en", "train", 1, seed=9)[0], draw("en", "train", 1, seed=9, n_prose=2)[0]
    held = [p for p in training_bank.passages("en") if " ".join(p.split()) in filled["conversation"]]
    assert len(held) == 2
    assert len(filled["conversation"]) > len(plain["conversation"])


# --- train and dev apart

@pytest.mark.parametrize("lang", LANGS)
def test_sentences_of_train_and_dev_are_apart(lang):
    bank = load_bank(lang)
    used = {split: {form for relation in bank.forms(split) for field in FORM_FIELDS for form in relation[field]}
            for split in SPLITS}
    assert not used["train"] & used["dev"]
    assert len({form.split()[0] for form in used["dev"]}) > 20 or lang == "zh", "dev forms should differ in structure"
    assert len(used["train"] | used["dev"]) == len(set(training_bank.templates(lang)))
    for train, dev in zip(bank.forms("train"), bank.forms("dev")):
        assert train["statements"] and dev["statements"] and train["questions"] and dev["questions"]
    for name in LISTS:
        repeated = {text for text in bank.phrases(name, "train") if text not in ("", "{v}.", "{v}。")}
        assert not repeated & set(bank.phrases(name, "dev")), name


@pytest.mark.parametrize("lang", LANGS)
def test_values_and_names_of_train_and_dev_are_apart(lang):
    rng, bank = random.Random(6), load_bank(lang)
    plans = {split: [Plan(bank, rng, split, 9) for _ in range(400)] for split in SPLITS}
    values = {split: {(f.relation["value"], f.value.casefold()) for p in plans[split] for f in p.facts} for split in SPLITS}
    assert not values["train"] & values["dev"]
    people = {split: {name for p in plans[split] for name in (*p.speakers, *p.owners["person"])} for split in SPLITS}
    assert not people["train"] & people["dev"]
    assert len(people["dev"]) > 400


@pytest.mark.parametrize("lang", LANGS)
def test_held_out_words_of_every_list(lang):
    bank = load_bank(lang)
    train, dev = bank.entries["train"], bank.entries["dev"]
    for kind, entries in bank.content["kinds"].items():
        words = {e for e in entries if "{" not in e}
        if kind in bank.content["shared_kinds"] or not words:
            continue
        held = words & set(dev[kind])
        assert held and not held & set(train[kind])
        assert held | set(train[kind]) >= words
        assert len(held) >= min(5, len(words) // 2), kind


def test_split_of_forms():
    for count, held in ((2, 1), (8, 1), (10, 2), (20, 3)):
        forms = [f"{{s}} form {number}" for number in range(count)]
        train, dev = split_forms(forms, "train"), split_forms(forms, "dev")
        assert len(dev) == held and sorted(train + dev) == sorted(forms)
        assert split_forms(forms[::-1], "dev") == dev[::-1]
    assert "" in split_forms(["", "a", "b"], "train") and "" in split_forms(["", "a", "b"], "dev")
    assert split_forms([], "dev") == []


# --- content

@pytest.mark.parametrize("lang", LANGS)
def test_bank_is_large_and_covers_the_categories(lang):
    relations = load_bank(lang).relations
    assert len(relations) >= (70 if lang == "en" else 60)
    assert len({r["id"] for r in relations}) == len(relations)
    assert all(count >= 6 for count in (Counter(r["category"] for r in relations)[c] for c in CATEGORIES))
    for relation in relations:
        assert len(set(relation["statements"])) >= 7, relation["id"]
        assert len(set(relation["questions"])) >= 6, relation["id"]
        assert all("{s}" in form for form in relation["statements"] + relation["questions"]), relation["id"]
        valued = relation["statements"] + relation["first_person"] + relation.get("answers", [])
        assert all(re.search(r"\{(a )?v\}", form) for form in valued), relation["id"]
        assert not any("{v}" in form or "{a v}" in form for form in relation["questions"]), relation["id"]
        assert all({"s", "v", "s2", "v2"} == set(re.findall(r"\{(?:a )?(\w+)\}", form)) for form in relation.get("pairs", []))
        assert relation["first_person"] == [] or relation["subject"] == "person"
        assert "as_subject" not in relation or relation["value"] == "person"


def test_no_sentence_stands_twice():
    for lang in LANGS:
        counts = Counter(training_bank.templates(lang))
        twice = [form for form, count in counts.items() if count > 1 and len(form) > 30]
        assert not twice


@pytest.mark.parametrize("lang", LANGS)
def test_the_tests_names_cannot_be_drawn(lang):
    bank = load_bank(lang)
    for name in bank.content["never_names"]:
        assert not training_bank.can_draw_name(lang, name)
    rng = random.Random(0)
    for kind in bank.content["name_kinds"]:
        for split in SPLITS:
            for _ in range(30):
                assert training_bank.bank_names(lang)(bank.draw(kind, split, rng))


def test_benchmark_names_of_the_design_are_out_of_reach():
    assert not any(training_bank.can_draw_name("en", name)
                   for name in ("Marta", "Jonas", "Amara", "Kenji", "Heron", "Lantern", "Marta Heron", ""))
    assert len(load_bank("en").content["never_names"]) >= 300


# --- text

def test_text_is_clean(drawn):
    lang, _, samples = drawn
    colon = load_bank(lang).content["speaker_colon"]
    for sample in samples:
        texts = [sample["conversation"]] + [p["question"] for p in sample["probes"]] + [f["fact_text"] for f in sample["facts"]]
        for text in texts:
            assert not re.search(r"[{}]|  | [.,;:?!]|,,|\.\.(?!\.)(?<!\.\.\.)", text), text
            assert text == text.strip()
        assert all(colon in line for line in sample["conversation"].split("\n"))


def test_english_articles_and_capitals():
    vowel = re.compile(r"(?<![-\w])[Aa] (?!uni|use|uku|eur|one\b|once)[aeiou]")
    consonant = re.compile(r"\b[Aa]n (?!hour|heir|honest|[aeiou8]|11|18)")
    for split in SPLITS:
        for sample in draw("en", split, 300, seed=8):
            assert not vowel.search(sample["conversation"]), vowel.search(sample["conversation"])
            assert not consonant.search(sample["conversation"])
            for probe in sample["probes"]:
                assert not probe["question"][0].islower() and not vowel.search(probe["question"])
            assert not re.search(r"[.?!] [a-z]", sample["conversation"])


def test_english_templates_are_written_to_be_filled():
    forms = [form for relation in load_bank("en").relations for field in FORM_FIELDS for form in relation.get(field, [])]
    assert not [form for form in forms if re.search(r"\ban? \{v", form)]
    assert not [form for form in forms if re.search(r"\b(he|she|his|her|him|hers)\b", form, re.IGNORECASE)]
    assert not [form for form in forms if form[-1] not in ".?!"]


def test_speakers_never_speak_of_themselves_by_name():
    """Two speakers or more: whoever states a fact of a third person is neither owner nor value where that can be helped."""
    for sample in draw("en", "train", 200, seed=12):
        turns = [line.split(": ", 1) for line in sample["conversation"].split("\n")]
        assert not [text for speaker, text in turns if f"{speaker}'s" in text]


# --- variety and speed

@pytest.mark.parametrize("lang", LANGS)
def test_variety(lang):
    samples = draw(lang, "train", 500, seed=1)
    grams, total = set(), 0
    for sample in samples:
        units = sample["conversation"].split() if lang == "en" else list(sample["conversation"])
        rows = [tuple(units[i:i + 4]) for i in range(len(units) - 3)]
        grams.update(rows)
        total += len(rows)
    golds = [p["gold_answer"] for s in samples for p in s["probes"]]
    assert len(grams) / total > 0.55
    assert len(set(golds)) / len(golds) > 0.6
    speakers = {line.split(load_bank(lang).content["speaker_colon"])[0] for s in samples for line in s["conversation"].split("\n")}
    assert len(speakers) > 800


# --- bad input

def test_unknown_language_and_split_say_what_is_possible():
    with pytest.raises(ValueError, match="unknown language 'fr'; use one of en, zh"):
        training_bank.sample_conversation(random.Random(0), "fr")
    with pytest.raises(ValueError, match="unknown split 'test'"):
        training_bank.sample_conversation(random.Random(0), "en", "test")


@pytest.mark.parametrize("spoil, message", [
    (lambda c: c.pop("openers"), "field 'openers' is missing"),
    (lambda c: c["relations"][0].pop("questions"), "lacks the field 'questions'"),
    (lambda c: c["relations"][0].update(category="colour"), "unknown category 'colour'"),
    (lambda c: c["relations"][0].update(value="nothing"), "value 'nothing' is no kind"),
    (lambda c: c["relations"][0].update(statements=["{s} {v}."]), "statements needs at least two forms"),
    (lambda c: next(r for r in c["relations"] if "as_subject" in r).update(as_subject=["the mentor of {s}"]), "no as_subject phrase starts with {s}"),
    (lambda c: c["kinds"].update(person=["{nobody}"]), "kinds.person uses {nobody}"),
    (lambda c: c["kinds"].update(colour=["red"]), "kinds.colour has no dev words"),
])
def test_faulty_bank_is_named_in_one_line(tmp_path, spoil, message):
    content = copy.deepcopy(load_bank("en").content)
    spoil(content)
    path = tmp_path / "bank_en.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BankError) as caught:
        Bank(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(BankError, match="no such file"):
        Bank(tmp_path / "bank_en.json")
    (tmp_path / "bank_en.json").write_text("{", encoding="utf-8")
    with pytest.raises(BankError, match="not UTF-8 JSON"):
        Bank(tmp_path / "bank_en.json")


def test_command_line_refuses_bad_numbers_and_keeps_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        training_bank.main(["--n", "0"])
    assert caught.value.code == 2
    assert "--n is 0; give 1 or more" in capsys.readouterr().err
    assert training_bank.main(["--n", "2", "--facts", "100000", "--out", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert training_bank.main(["--n", "1", "--out", str(tmp_path / "no" / "x.json")]) == 2
    assert list(tmp_path.iterdir()) == []


def test_hash_covers_data_and_code(tmp_path, monkeypatch):
    before = training_bank.bank_sha256()
    assert re.fullmatch("[0-9a-f]{64}", before)
    for name in ("bank_en.json", "bank_zh.json", "bank_passages.json"):
        (tmp_path / name).write_bytes((training_bank.DATA / name).read_bytes())
    monkeypatch.setattr(training_bank, "DATA", tmp_path)
    assert training_bank.bank_sha256() == before
    (tmp_path / "bank_zh.json").write_text("{}", encoding="utf-8")
    assert training_bank.bank_sha256() != before
