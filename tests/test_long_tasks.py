"""Long-text tasks: texts equal to the published generator's, lengths, splits, answers, scorers, loaders of published files."""
import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

import long_files
import long_ruler
import long_tasks
from gguf_packages import available
from long_items import PROPORTIONAL, Candidate, Parts, fit
from long_scores import METRICS
from long_tasks import NOISE_TASKS, PROFILES, TASKS, find_task, load_tokenizer, make, make_all, profile_items, score
from manifests import UserError
from model_utils import MODELS, byte_tokenizer

EXPECTED = json.loads((Path(__file__).parent / "ruler_expected.json").read_text(encoding="utf-8"))
ESSAY = " ".join(f"Sentence {i} of the stand-in is here." for i in range(60))
SYNTHETIC = [name for name, task in TASKS.items() if task.needs is None]
ESSAY_TASKS = [name for name, task in TASKS.items() if task.needs is long_tasks.ESSAYS]


@pytest.fixture(scope="module")
def smollm():
    row = MODELS["smollm2-135m"]
    if not available(row.name, row.gguf):
        pytest.skip(f"needs `{row.gguf.install}`")
    return load_tokenizer(row.name)


@pytest.fixture(scope="module")
def bytes_():
    return byte_tokenizer()


@pytest.fixture
def essays(tmp_path):
    path = tmp_path / "PaulGrahamEssays.json"
    path.write_text(json.dumps({"text": ESSAY}))
    return path


# --- RULER ---------------------------------------------------------------------------------------------------------

def ours(name, units, rng):
    task, _, length = name.partition(" ")
    if task.startswith("niah"):
        spec = long_ruler.NEEDLES[task.removesuffix("_noise")]
        return long_ruler.needles(replace(spec, haystack="noise") if task.endswith("_noise") else spec, ESSAY.split(), units, rng)
    if task == "vt":
        return long_ruler.tracking_text(units, 5, rng)
    if task == "cwe":
        return long_ruler.common_words(int(length), units, rng)
    return long_ruler.frequent_words((int(length) - 50) // 50, units, rng)


@pytest.mark.parametrize("name", EXPECTED["cases"])
def test_a_text_is_the_published_one_for_the_same_random_state(name):
    case = EXPECTED["cases"][name]
    parts = ours(name, case["units"], random.Random(EXPECTED["seed"]))
    text = parts.document + parts.question
    if name in ESSAY_TASKS:
        text = " ".join(text.split())
    assert (text[:160], text[-160:]) == (case["head"], case["tail"])
    assert list(parts.answers) == case["answers"]
    assert hashlib.sha256(text.encode()).hexdigest() == case["sha256"]


def test_published_limits_and_counts():
    limits = {"vt": 30, "cwe": 120, "fwe": 50} | dict.fromkeys(long_ruler.NEEDLES, 128)
    assert {name: TASKS[name].new_tokens for name in limits} == limits
    assert {name: (s.haystack, s.key, s.value, s.keys, s.values, s.asked) for name, s in long_ruler.NEEDLES.items()} == {
        "niah_single_1": ("noise", "words", "numbers", 1, 1, 1), "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
        "niah_single_3": ("essay", "words", "uuids", 1, 1, 1), "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
        "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1), "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
        "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1), "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4)}


def test_keys_are_in_the_order_of_the_sorted_list():
    adjectives, nouns = ["old", "old-fashioned", "a", "zesty", "old"], ["zoo", "eye", "fashioned-hat", "eye", "1"]
    keys = long_ruler.Keys(adjectives, nouns)
    assert list(keys) == sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    assert len(long_ruler.keys()) == 6171620


def make_any(name, tokenizer, length, count, essays, seed=0):
    return make(name, tokenizer, length, count, seed, essays if name in ESSAY_TASKS else None)


# tokens that an item may stay below its room: a unit (a line of noise is 25 tokens), and the spread between draws
MARGIN = {"niah_multikey_3": 140, "niah_multikey_2": 60, "cwe": 40}


@pytest.mark.parametrize("name", SYNTHETIC + ESSAY_TASKS)
def test_items_with_a_real_tokenizer(name, smollm, essays):
    for length in (1024, 2048):
        for item in make_any(name, smollm, length, 2, essays):
            room = length - item.new_tokens
            assert room - MARGIN.get(name, 30) <= item.tokens <= room
            whole = len(smollm(item.document + item.question).input_ids)
            assert abs(whole - item.tokens) <= 1 and whole <= length
            check_answers(item)


@pytest.mark.parametrize("name", sorted(set(SYNTHETIC) - {"cwe"}))
def test_items_in_bytes(name, bytes_):
    for item in make(name, bytes_, 2048, 2, 3):
        assert item.tokens <= 2048 - item.new_tokens and item.tokens == len((item.document + item.question).encode())
        check_answers(item)


def check_answers(item):
    """Every answer stands in the document (or has the highest counts), and the question asks for it and no distractor's key."""
    assert item.question[0] in "\n" and not item.question[-1].isspace()
    if item.task == "cwe":
        listed = item.document.rpartition("Memorize the ones that appear most often.\n")[2]
        counts = Counter(re.split(r" ?\d+\. ", listed)[1:])
        common = {word for word, _ in counts.most_common(10)}
        assert common == set(item.answers) and min(counts[w] for w in common) > max(n for w, n in counts.items() if w not in common)
    elif item.task == "fwe":
        counts = Counter(item.document.partition("coded words. ")[2].split())
        ranked = [word for word, _ in counts.most_common(4)]
        assert ranked == ["...", *item.answers] and counts[ranked[3]] > counts.most_common(5)[4][1]
    elif item.task == "vt":
        text = item.document.rpartition("Memorize and track")[2]
        value = re.search(r"assigned the value (\d+)", item.question)[1]
        found, (first, *others) = {}, item.answers
        assert f"VAR {first} = {value}\n" in text
        for source, name in zip(item.answers, others):
            assert f"VAR {name} = VAR {source} \n" in text and name not in found
        assert len(set(item.answers)) == 5 == text.count("VAR ") - text.count("= VAR ")
        assert [text.index(f"VAR {name} =") for name in item.answers] == sorted(text.index(f"VAR {name} =") for name in item.answers)
    elif item.task == "mqar":
        key = item.question.rstrip(":").rpartition("\n")[2]
        pairs = [line.split(": ") for line in item.document.split("\n")[1:]]
        assert [value for left, value in pairs if left == key] == list(item.answers)
        assert len({word for pair in pairs for word in pair}) == 2 * len(pairs)
    else:
        found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", item.document)
        asked = set(re.split(r",? and |, ", re.search(r" for (.*?) mentioned in the provided text\?", item.question)[1]))
        assert sorted(value for key, value in found if key in asked) == sorted(item.answers)
        counts = Counter(key for key, _ in found)
        assert set(counts.values()) == {4 if "multivalue" in item.task else 1} and len(found) >= len(item.answers)
        if "multikey" in item.task:
            assert len(found) >= 4 and len(asked) == 1


def test_items_depend_on_task_length_seed_and_index_alone(smollm, bytes_):
    few, many = make("niah_multikey_2", smollm, 1024, 1, 5), make("niah_multikey_2", smollm, 1024, 3, 5)
    assert many[:1] == few and len({item.document for item in many}) == 3 and [item.index for item in many] == [0, 1, 2]
    assert make("niah_multikey_2", smollm, 1024, 1, 6)[0].answers != few[0].answers
    assert make("vt", bytes_, 2048, 2, 1) == make("vt", bytes_, 2048, 2, 1)


def test_queries_of_one_document_share_it(bytes_):
    items = make("mqar", bytes_, 1024, long_ruler.QUERIES + 1, 0)
    assert len({item.document for item in items}) == 2 and len({item.question for item in items[:-1]}) == long_ruler.QUERIES


def test_an_essay_begins_again_and_a_text_file_will_do(tmp_path, bytes_):
    path = tmp_path / "essays.txt"
    path.write_text("One sentence. And another one!")
    item = make("niah_multikey_1", bytes_, 2048, 1, 0, path)[0]
    assert item.tokens > 1900 - 128 and item.document.count("One sentence.") > 20
    check_answers(item)


def test_the_largest_size_that_fits(bytes_):
    def sized(least, most, room):
        found = fit(Candidate(lambda units: Parts("x" * units, "?", ("a",)), least, most, "first_word"), bytes_, room)
        return found and (found.units, found.tokens)
    assert [sized(1, None, room) for room in (2, 3, 50, 1000)] == [(1, 2), (2, 3), (49, 50), (999, 1000)]
    assert sized(1, 7, 100) == (7, 8) and sized(7, 7, 8) == (7, 8) and sized(5, None, 5) is None


@pytest.mark.parametrize("seed", range(20))
def test_units_of_very_unlike_lengths_are_sized_too_and_in_few_steps(bytes_, seed):
    rng = random.Random(seed)
    ends = [0]
    for _ in range(400):
        ends.append(ends[-1] + rng.choice((0, 1, 1, 2, 300)))
    tried, room = [], rng.randrange(1, ends[-1])

    def build(units):
        tried.append(units)
        return Parts("x" * ends[units], "?", ("a",))
    found = fit(Candidate(build, 0, 400, "first_word"), bytes_, room)
    assert found.units == max(units for units in range(401) if ends[units] + 1 <= room)
    assert len(tried) == len(set(tried)) <= 1 + PROPORTIONAL + 9  # the last halve 400 units


@pytest.mark.parametrize("arguments, words", [
    (("niah_multivalue", 1024, 1, 0), ("essays", "--source niah_multivalue=PATH", "niah_multivalue_noise")),
    (("niah_single_2", 1024, 1, 0), ("essays", "--source")),
    (("nothing", 1024, 1, 0), ("--task nothing", "niah_single_1")),
    (("cwe", 1024, 1, 0), ("cwe", "1024", "too short", "take a longer one")),
    (("fwe", 200, 1, 0), ("fwe", "200", "too short")),
    (("vt", 1024, 0, 0), ("count 0",)),
])
def test_refusals(arguments, words, bytes_):
    name, *rest = arguments
    with pytest.raises(UserError) as error:
        make(name, bytes_, *rest)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("content, words", [(None, "No such file"), ('{"txt": "a"}', "'text'"), ('{"text": ""}', "no words"), ("[1]", "'text'")])
def test_essays_that_cannot_be_read(tmp_path, bytes_, content, words):
    path = tmp_path / "essays.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        make("niah_single_2", bytes_, 1024, 1, 0, path)


# --- scorers ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("metric, prediction, references, wanted", [
    ("string_match_all", " 12 and\x0234", ["12", "34"], 1), ("string_match_all", "ABC", ["abc", "xyz"], 0.5), ("string_match_all", "", ["a"], 0),
    ("string_match_part", "the Xyz", ["abc", "xyz"], 1), ("string_match_part", "none", ["abc", "xyz"], 0),
    ("first_word", " Copper\nfoo", ["copper"], 1), ("first_word", "coppery", ["copper"], 0), ("first_word", "a copper", ["copper"], 0),
    ("first_word", "ad hoc, then", ["ad hoc"], 1), ("first_word", "wide-eyed", ["wide"], 0),
    ("substring_exact_match", " It was the River Tees.", ["river tees"], 1), ("substring_exact_match", "no\nRiver Tees", ["River Tees"], 0),
    ("substring_exact_match", "Tees", ["Tyne", "tees"], 1),
    ("label_match", " 4", ["4"], 1), ("label_match", "label: 4\nfoo", ["4"], 1), ("label_match", "Label: label: 4", ["4"], 1),
    ("label_match", "41", ["4"], 0), ("label_match", "4 label: 5", ["4"], 0), ("label_match", "", ["4"], 0),
    ("locomo_f1_unstemmed", "A blue, and green kite", ["the green kite"], 0.8), ("locomo_f1_unstemmed", "", ["kite"], 0),
    ("locomo_multi_f1_unstemmed", "chess, red kite", ["kite, chess"], (2 / 3 + 1) / 2),
    ("locomo_adversarial", "(A)", ["a"], 1), ("locomo_adversarial", "b", ["a"], 0), ("locomo_adversarial", "It is not mentioned.", ["b"], 1),
    ("locomo_adversarial", "(b) a red kite", ["a"], 0), ("locomo_adversarial", "", ["a"], 0),
    ("contains_no_judge", "She said Leeds.", ["leeds"], 1),
])
def test_scorers(metric, prediction, references, wanted):
    assert METRICS[metric](prediction, references) == pytest.approx(wanted)


def test_an_item_is_scored_by_its_own_metric(bytes_):
    for name in SYNTHETIC[:1] + ["vt", "mqar"]:
        item = make(name, bytes_, 2048, 1, 0)[0]
        assert score(item, " " + " ".join(item.answers)) == 1 and score(item, "zzz") == 0


# --- files -----------------------------------------------------------------------------------------------------------

def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


def icl_folder(folder, name="coarse_label"):
    rows = [{"text": f"Where is town {i}?" if i % 2 else f"Who is person {i}?", name: i % 2} for i in range(40)]
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "test.jsonl", [{"text": f"Who wrote book {i}?", name: 0} for i in range(5)])
    return folder


def rag_folder(folder, kind="nq"):
    tag = long_files.DEPTH_TAG[kind]
    passage = lambda i, text: {"id": str(i), "title": f"Title {i}", "text": text}
    rows = [{"question": f"Who built bridge {n}?", "answers": [f"Builder {n}x"],
             "ctxs": [passage(i, f"Builder {n}x built bridge {n}." if i == 3 else f"Passage {i} is about something else.") for i in range(12)]}
            for n in range(4)]
    write_rows(folder / f"{kind}-dev-multikilt_1000_k50_{tag}.jsonl", rows)
    write_rows(folder / f"{kind}-train-multikilt_1000_k3_{tag}.jsonl",
               [{"question": f"Demo {i // 2}?", "answers": ["Yes."], "ctxs": [passage(i, "A demo.")]} for i in range(8)])
    return folder


def locomo_file(path):
    turn = lambda session, i: {"speaker": ("Ada", "Bo")[i % 2], "dia_id": f"D{session}:{i + 1}", "text": f"Line {i} of session {session}."}
    conversation = {"speaker_a": "Ada", "speaker_b": "Bo"}
    for session in (1, 2, 10):
        conversation |= {f"session_{session}_date_time": f"1:00 pm on {session} May, 2023", f"session_{session}": [turn(session, i) for i in range(6)]}
    conversation["session_10"][5]["blip_caption"] = "a red kite"
    ask = lambda category, evidence, **more: {"question": f"Question {category}?", "category": category, "evidence": evidence} | more
    return write_rows(path, [{"sample_id": "conv-1", "conversation": conversation, "qa": [
        ask(1, ["D10:5; D10:6"], answer="kite, chess"), ask(2, ["D2:1"], answer=2022), ask(3, ["D10:4"], answer="Yes; she said so"),
        ask(4, ["D1:1"], answer="a kite"), ask(5, ["D10:6"], adversarial_answer="a blue kite")]}])


def longmemeval_file(path):
    session = lambda i: [{"role": "user", "content": f" I moved to town {i}. "}, {"role": "assistant", "content": "Noted.", "has_answer": True}]
    row = {"question_id": "q1", "question_type": "single-session-user", "question": "Where did I move last?", "answer": "town 1", "question_date": "2023/05/30",
           "haystack_dates": ["2023/05/20", "2023/05/25", "2023/05/10"], "haystack_session_ids": ["s0", "s1", "s2"],
           "haystack_sessions": [session(i) for i in range(3)], "answer_session_ids": ["s1"]}
    return write_rows(path, [row, row | {"question_id": "q2_abs"}, row | {"question_id": "q3", "answer": 3}])


def test_icl(tmp_path, bytes_, monkeypatch):
    folder = icl_folder(tmp_path)
    for item in make("helmet_icl_trec_coarse", bytes_, 600, 5, 0, folder):
        assert (item.document + item.question).startswith("Use the provided mapping from the text to label to assign a label to the text. "
                                      'Only output "label: {label}" and nothing else. \n\nWh')
        assert re.fullmatch(r"\n\nWho wrote book \d\?\nlabel:", item.question)
        shown = re.findall(r"(Who|Where) is \w+ \d+\?\nlabel: (\d)", item.document)
        assert len(shown) >= 10 and {label for kind, label in shown if kind == "Who"} == set(item.answers)
        assert 600 - 20 - 40 <= item.tokens <= 580
    monkeypatch.setitem(long_files.SHOTS["helmet_icl_trec_coarse"], 8192, 100)  # in bytes the published 400 do not fit
    whole = make("helmet_icl_trec_coarse", bytes_, 8192, 1, 0, folder)[0]
    assert whole.document.count("label: ") == 101  # the published number, and the instruction's


def test_icl_labels_are_drawn_as_published():
    train = [(f"text {i}", i % 3) for i in range(9)]
    for shots in (3, 7, 9):
        shown = long_files.balanced(train, shots, seed=5)
        assert len(shown) == shots and all({label for _, label in shown[i:i + 3]} == {0, 1, 2} for i in range(0, shots - 2, 3))


@pytest.mark.parametrize("kind", ["nq", "hotpotqa"])
def test_rag(tmp_path, bytes_, kind):
    folder = rag_folder(tmp_path, kind)
    whole, short = (make(f"helmet_rag_{kind}", bytes_, length, 2, 0, folder) for length in (4000, 800))
    for item, cut in zip(whole, short):
        number = re.search(r"bridge (\d)\?", item.question)[1]
        assert item.question == f"\n\nQuestion: Who built bridge {number}?\nAnswer:" == cut.question
        assert item.document.count("Document (Title: ") == 14 > cut.document.count("Document (Title: ") and item.document.count("Demo ") == 2
        assert item.answers == (f"Builder {number}x",) and item.answers[0] in item.document and item.answers[0] in cut.document
        assert cut.tokens <= 780


def test_demonstrations_are_those_of_datasets_shuffle():
    demos = [{"question": f"q{i // 2}", "n": i} for i in range(10)]
    shuffled = datasets.Dataset.from_list(demos).shuffle(seed=long_files.text_hash("key") % 2**31)
    first = {row["question"]: row for row in reversed(list(shuffled))}
    wanted = sorted(first.values(), key=lambda row: list(shuffled).index(row))[:2]
    assert long_files.drawn_demos(demos, "question", "key") == wanted


def test_locomo(tmp_path, bytes_):
    path = locomo_file(tmp_path / "locomo10.json")
    items = make("locomo", bytes_, 4000, 5, 0, path)
    assert sorted(item.metric for item in items) == ["locomo_adversarial"] + 3 * ["locomo_f1_unstemmed"] + ["locomo_multi_f1_unstemmed"]
    by_question = {item.question.partition("Question: ")[2][:10]: item for item in items}
    assert by_question["Question 2"].answers == ("2022",) and "approximate date." in by_question["Question 2"].question
    assert by_question["Question 3"].answers == ("Yes",)
    options = re.search(r"\(a\) (.*) \(b\) (.*)\. ", by_question["Question 5"].question)
    assert options["ab".index(by_question["Question 5"].answers[0]) + 1] == "Not mentioned in the conversation"
    document = items[0].document
    assert document.index("DATE: 1:00 pm on 1 May") < document.index("DATE: 1:00 pm on 2 May") < document.index("DATE: 1:00 pm on 10 May")
    assert document.endswith('Bo said, "Line 5 of session 10."\n and shared a red kite.\n')
    short = make("locomo", bytes_, 900, 3, 0, path)  # questions about the first sessions do not fit
    assert {item.question.partition("Question: ")[2][:10] for item in short} == {"Question 1", "Question 3", "Question 5"}
    assert all("DATE: 1:00 pm on 1 May" not in item.document and item.tokens <= 868 for item in short)
    with pytest.raises(UserError, match="3 of the questions in .* fit 900"):
        make("locomo", bytes_, 900, 4, 0, path)


def test_longmemeval(tmp_path, bytes_):
    path = longmemeval_file(tmp_path / "longmemeval_s.json")
    items = make("longmemeval", bytes_, 2000, 2, 0, path)
    assert sorted(item.answers[0] for item in items) == ["3", "town 1"] and {item.metric for item in items} == {"contains_no_judge"}
    document = items[0].document
    assert document.index("Session 1:\nSession Date: 2023/05/10") < document.index("Session 2:\nSession Date: 2023/05/20") < document.index("town 1")
    assert "\n\nuser: I moved to town 2.\n\nassistant: Noted.\n" in document
    assert items[0].question == "\n\nCurrent Date: 2023/05/30\nQuestion: Where did I move last?\nAnswer:"
    cut = make("longmemeval", bytes_, 900, 1, 0, path)[0]
    assert "town 1" in cut.document and cut.document.count("### Session") == 1


def spoil(path, change):
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.suffix == ".jsonl" else json.loads(path.read_text())
    change(rows)
    write_rows(path, rows)


@pytest.mark.parametrize("task, file, change, words", [
    ("helmet_icl_banking77", "test.jsonl", lambda rows: rows[1].pop("text"), ("test.jsonl line 2", "'text'", "missing")),
    ("helmet_icl_banking77", "train.jsonl", lambda rows: rows[0].update(label="card"), ("train.jsonl line 1", "'label'", "must be int")),
    ("helmet_icl_banking77", "test.jsonl", lambda rows: [row.update(label=9) for row in rows], ("label 9", "train.jsonl")),
    ("helmet_icl_banking77", "test.jsonl", lambda rows: rows[0].update(label=-1), ("line 1", "'label'", "negative")),
    ("helmet_rag_nq", "nq-dev-multikilt_1000_k50_dep6.jsonl", lambda rows: rows[2]["ctxs"][1].pop("title"), ("line 3: ctxs[1]", "'title'")),
    ("helmet_rag_nq", "nq-dev-multikilt_1000_k50_dep6.jsonl", lambda rows: rows[0].update(answers=[]), ("line 1", "'answers'")),
    ("helmet_rag_nq", "nq-train-multikilt_1000_k3_dep6.jsonl", lambda rows: rows.__delitem__(slice(1, None)), ("train file", "2 different")),
    ("locomo", "locomo10.json", lambda rows: rows[0]["qa"][0].update(category=7), ("entry 0: qa[0]", "'category'", "1 to 5")),
    ("locomo", "locomo10.json", lambda rows: rows[0]["conversation"]["session_2"][1].pop("dia_id"), ("entry 0: session_2[1]", "'dia_id'")),
    ("longmemeval", "longmemeval_s.json", lambda rows: [row.update(answer_session_ids=["s9"]) for row in rows], ("'s9'", "no haystack session")),
    ("longmemeval", "longmemeval_s.json", lambda rows: [row["haystack_dates"].pop() for row in rows[:1]], ("entry 0", "one for each session")),
])
def test_defects_of_files(tmp_path, bytes_, task, file, change, words):
    icl_folder(tmp_path, "label")
    rag_folder(tmp_path)
    locomo_file(tmp_path / "locomo10.json")
    longmemeval_file(tmp_path / "longmemeval_s.json")
    spoil(tmp_path / file, change)
    source = tmp_path / file if file.endswith(".json") else tmp_path
    with pytest.raises(UserError) as error:
        make(task, bytes_, 4000, 5 if "icl" in task or task == "locomo" else 2, 0, source)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name, content, words", [
    ("absent.json", None, "No such file"), ("a.json", "[{", "not JSON"), ("a.jsonl", '{"a": 1}\n{', "line 2: not JSON"), ("a.json", '{"rows": []}', "'data'"),
    ("a.json", "[]", "no entries"), ("a.json", "[3]", "entry 0: not a JSON object"), ("a.json", b"\xff", "not UTF-8")])
def test_files_that_cannot_be_read(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words) as error:
        long_files.read_rows(path)
    assert str(path) in str(error.value)


def test_files_from_the_hub(tmp_path, bytes_, monkeypatch):
    asked = []

    def load(*arguments, **settings):
        asked.append((arguments, settings))
        rows = lambda path: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        folder = icl_folder(tmp_path / "published")
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows(folder / f"{split}.jsonl")) for split in ("train", "test")})
    monkeypatch.setenv("TTT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", load)
    for _ in range(2):
        sources = long_tasks.parse_sources(["helmet_icl_trec_coarse=hub", "locomo=./hub"])
        items = make("helmet_icl_trec_coarse", bytes_, 600, 2, 0, sources["helmet_icl_trec_coarse"])
    assert items == make("helmet_icl_trec_coarse", bytes_, 600, 2, 0, tmp_path / "published") and sources["locomo"] == "./hub"
    assert asked == [(("CogComp/trec",), {"revision": "refs/convert/parquet"})]


@pytest.mark.parametrize("task, words", [("helmet_icl_banking77", "PolyAI/banking77"), ("longmemeval", "xiaowu0162/longmemeval-cleaned"), ("locomo", "by name")])
def test_without_the_hub_one_line_says_what_it_needs(tmp_path, run_main, monkeypatch, task, words):
    monkeypatch.setenv("TTT_CACHE", str(tmp_path / "cache"))  # and conftest.py keeps the hub out of reach
    code, _, error = run_main(long_tasks.main, ["long_tasks.py", "--task", task, "--source", f"{task}=hub", "--model", "tiny-llama"])
    assert code == 2 and words in error and f"--source {task}=PATH" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- profiles and the script -----------------------------------------------------------------------------------------

def test_the_dev_profile_is_one_short_text_of_each_task_at_hand(smollm):
    items = profile_items("dev", smollm, 0, {})
    assert [(item.task, item.length) for item in items] == [(name, 1024) for name in SYNTHETIC] and sum(item.tokens for item in items) < 12_000


def test_the_dev_profile_needs_no_file(bytes_, monkeypatch):
    monkeypatch.setitem(PROFILES, "dev", long_tasks.Profile((4096,), 1))
    monkeypatch.delitem(TASKS, "cwe")  # its example alone has more bytes
    assert [item.task for item in profile_items("dev", bytes_, 0, {})] == [name for name in SYNTHETIC if name != "cwe"]
    for source, said in (("vt=x", "needs no file"), ("typo=x", "no such task")):
        with pytest.raises(UserError, match=said):
            long_tasks.parse_sources([source])


def test_several_processes_make_the_same_items(bytes_, tmp_path):
    asked = [(name, bytes_, length, 2, 3) for name in ("vt", "mqar") for length in (2048, 3000)]
    assert make_all(asked, workers=2) == make_all(asked) and make_all([], workers=2) == []
    with pytest.raises(UserError, match="too short"):
        make_all([*asked, ("cwe", bytes_, 1024, 1, 0)], workers=2)


def test_script(run_main, tmp_path):
    code, out, _ = run_main(long_tasks.main, ["long_tasks.py", "--list"])
    assert code == 0 and len(out.splitlines()) == len(TASKS) and all(name in out for name in NOISE_TASKS.values())
    code, out, _ = run_main(long_tasks.main, ["long_tasks.py", "--task", "niah_single_1", "--model", "tiny-llama", "--show", "2"])
    assert code == 0 and out.count("--- question\n\nWhat is the special magic number") == 2
    code, out, error = run_main(long_tasks.main, ["long_tasks.py", "--task", "locomo", "--model", "tiny-llama"])
    assert code == 2 and "locomo10.json" in error and error.count("\n") == 1
    code, _, error = run_main(long_tasks.main, ["long_tasks.py", "--task", "vt", "--source", "vt"])
    assert code == 2 and "TASK=PATH" in error
    path = write_rows(tmp_path / "x" / "items.jsonl", [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROFILES, "dev", long_tasks.Profile((4096,), 1))
        patch.delitem(TASKS, "cwe")
        code, out, _ = run_main(long_tasks.main, ["long_tasks.py", "--profile", "dev", "--model", "tiny-llama", "--out", path])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert code == 0 and f"{len(rows)} items" in out and {row["task"] for row in rows} == set(SYNTHETIC) - {"cwe"}
    assert find_task("vt").new_tokens == 30
