"""Published long-text data sets, read from files: HELMET's ICL and RAG (Yen et al. 2024, arXiv 2410.02694), LoCoMo (Maharana et al. 2024,
arXiv 2402.17753) and LongMemEval (Wu et al. 2024, arXiv 2410.10813).

Prompts are those of princeton-nlp/HELMET (data.py at 4526dfbdc512), snap-research/locomo (task_eval) and xiaowu0162/LongMemEval
(run_generation.py at 9e0b455f4ef0). Files come from a path, those of some from the hub by name (long_hub.py); none of them is part of this
repository. Licences: HELMET's code and LongMemEval MIT, LoCoMo CC BY-NC (not for commercial use). LongMemEval's published score is the verdict
of a paid model, which is not asked here (contains_no_judge).

Where a text is longer than asked for, it is cut so that the evidence stays; a question whose evidence does not fit is passed over. Each
candidates function is (name, tokenizer, length, seed, source) and yields the file's questions in an order drawn from the seed. Every defect
raises UserError naming file, line or entry, field and mend.
"""
from __future__ import annotations

import hashlib
import json
import math
import random
import re
from pathlib import Path

import numpy as np

from evaluate import contains
from long_items import Candidate, Parts
from long_scores import NOT_MENTIONED
from manifests import UserError

HELMET_SEED = 42


# --- reading ---------------------------------------------------------------------------------------------------------

def read_rows(path) -> list[tuple[str, dict]]:
    """(where, row) for the objects of a .jsonl, of a JSON list, or of the field "data" of a JSON object; "where" names file and place."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the published file with --source") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); download the published file again") from None
    if path.suffix == ".jsonl":
        rows = [(f"{path} line {i}", parsed(line, f"{path} line {i}")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        value = parsed(text, str(path))
        listed = value.get("data") if isinstance(value, dict) else value
        if not isinstance(listed, list):
            raise UserError(f"{path}: neither a list nor an object with a list 'data'; download the published file again")
        rows = [(f"{path} entry {i}", row) for i, row in enumerate(listed)]
    if not rows:
        raise UserError(f"{path}: holds no entries; download the published file again")
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object; download the published file again")
    return rows


def parsed(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); download the published file again") from None


def field(row, name: str, where: str, *types):
    """row[name], of one of the types."""
    if not isinstance(row, dict) or name not in row:
        raise UserError(f"{where}: field '{name}' is missing; add it, or download the published file again")
    if type(row[name]) not in types:
        wanted = " or ".join(kind.__name__ for kind in types)
        raise UserError(f"{where}: field '{name}' is {json.dumps(row[name], ensure_ascii=False)[:60]}, must be {wanted}; correct it")
    return row[name]


def texts(row, name: str, where: str) -> list[str]:
    """row[name], a list of one string or more."""
    values = field(row, name, where, list)
    if not values or not all(isinstance(value, str) for value in values):
        raise UserError(f"{where}: field '{name}' must hold one string or more, and nothing else; correct it")
    return values


def in_drawn_order(rows: list, name: str, seed: int) -> list:
    return random.Random(f"{name} {seed}").sample(rows, len(rows))


def text_hash(text: str) -> int:
    """HELMET's seed for what is drawn for one question."""
    return int(hashlib.sha256(text.encode("utf-8")).hexdigest(), 16)


# --- HELMET: many examples in context ------------------------------------------------------------------------------------

LABELS = {"helmet_icl_trec_coarse": "coarse_label", "helmet_icl_banking77": "label"}
SHOTS = {"helmet_icl_trec_coarse": {8192: 400, 16384: 800, 32768: 1600, 65536: 3300, 131072: 6600},
         "helmet_icl_banking77": {8192: 360, 16384: 720, 32768: 1450, 65536: 2900, 131072: 5900}}


def icl_candidates(name, tokenizer, length, seed, source):
    """source: a folder with train.jsonl and test.jsonl of CogComp/trec or PolyAI/banking77 (rows of a text and an integer label).

    Shots: the published number for the published lengths, or as many as fit. Labels are shown as integers; their order and the shots are drawn
    for each question, as published since February 2025. Questions are drawn from all of test.jsonl (published: 500, balanced over the labels).
    """
    train, test = (labelled(Path(source) / f"{part}.jsonl", LABELS[name]) for part in ("train", "test"))
    classes = 1 + max(label for _, label in train)
    kinds = len({label for _, label in train})
    for text, label in in_drawn_order(test, name, seed):
        if label >= classes:
            raise UserError(f"{source}/test.jsonl: label {label} is not in train.jsonl; take both files from the same data set")
        mapping, own_seed = list(range(classes)), (text_hash(text) + HELMET_SEED) % 2**31
        random.Random(own_seed).shuffle(mapping)

        def build(shots, text=text, label=label, mapping=mapping, own_seed=own_seed):
            shown = "\n\n".join(f"{example}\nlabel: {mapping[of]}" for example, of in balanced(train, shots, own_seed))
            head = ("Use the provided mapping from the text to label to assign a label to the text. "
                    'Only output "label: {label}" and nothing else. \n\n')
            return Parts(head + shown, f"\n\n{text}\nlabel:", (str(mapping[label]),))
        most = SHOTS[name].get(length, len(train))
        yield Candidate(build, min(kinds, most), most, "label_match")


def labelled(path, name: str) -> list[tuple[str, int]]:
    rows = []
    for where, row in read_rows(path):
        rows.append((field(row, "text", where, str), field(row, name, where, int)))
        if rows[-1][1] < 0:
            raise UserError(f"{where}: field '{name}' is negative, so the text has no label; take the labelled split")
    return rows


def balanced(train, shots: int, seed: int) -> list[tuple[str, int]]:
    """HELMET's draw for a question: rounds in which every label stands once."""
    rng = random.Random(seed)
    by_label = {}
    for example in train:
        by_label.setdefault(example[1], []).append(example)
    count = math.ceil(shots / len(by_label))
    rounds = [[] for _ in range(count)]
    for examples in by_label.values():
        places = rng.sample(range(len(examples)), count % len(examples))
        while len(places) < count:
            places += rng.sample(range(len(examples)), min(count - len(places), len(examples)))
        for one, place in zip(rounds, places):
            one.append(examples[place])
    for one in rounds:
        rng.shuffle(one)
    return [example for one in rounds for example in one][:shots]


# --- HELMET: retrieved passages --------------------------------------------------------------------------------------------

DEPTH_TAG = {"nq": "dep6", "hotpotqa": "dep3"}
PASSAGES = {8192: 50, 16384: 105, 32768: 220, 65536: 440, 131072: 1000}
RAG_SHOTS = 2


def rag_candidates(name, tokenizer, length, seed, source):
    """source: HELMET's folder data/kilt. The file is that of the first published length that is not shorter; passages without an answer
    go from the end on where the prompt is too long (a question of hotpotqa may so lose a passage that leads to the answer)."""
    kind = name.removeprefix("helmet_rag_")
    published = [count for asked, count in PASSAGES.items() if asked >= length]
    if not published:
        raise UserError(f"{name}: length {length} is beyond the published {max(PASSAGES)}; take a shorter one")
    rows = rag_rows(Path(source) / f"{kind}-dev-multikilt_1000_k{published[0]}_{DEPTH_TAG[kind]}.jsonl")
    demos = rag_rows(Path(source) / f"{kind}-train-multikilt_1000_k3_{DEPTH_TAG[kind]}.jsonl")
    keyed = "id" if all("id" in row for row in rows) else "question"
    if len({demo.get(keyed) for demo in demos}) < RAG_SHOTS or any(keyed not in demo for demo in demos):
        raise UserError(f"{source}: the train file needs {RAG_SHOTS} different questions with a field '{keyed}'; download it again")
    for row in in_drawn_order(rows, name, seed):
        shown = "\n\n".join(f"{passages(demo['ctxs'])}\n\nQuestion: {demo['question']}\nAnswer: {demo['answers'][0]}"
                            for demo in drawn_demos(demos, keyed, str(row[keyed])))
        held = [contains(passage["text"], row["answers"], "en") for passage in row["ctxs"]]
        spare = [i for i, holds in enumerate(held) if not holds]
        if len(spare) == len(held):
            continue  # retrieval did not find the answer: nothing to remember

        def build(units, row=row, shown=shown, spare=spare):
            kept = [passage for i, passage in enumerate(row["ctxs"]) if i not in spare[units:]]
            head = ("Use the given documents to write a concise and short answer to the question. Write your answer in the following format:\n"
                    f"Answer: [answer]\n\n{shown}\n\n")
            return Parts(head + passages(kept), f"\n\nQuestion: {row['question']}\nAnswer:", tuple(row["answers"]))
        yield Candidate(build, 0, len(spare), "substring_exact_match")


def rag_rows(path) -> list[dict]:
    rows = []
    for where, row in read_rows(path):
        field(row, "question", where, str)
        texts(row, "answers", where)
        for i, passage in enumerate(field(row, "ctxs", where, list)):
            for name in ("title", "text"):
                field(passage, name, f"{where}: ctxs[{i}]", str)
        rows.append(row)
    return rows


def passages(ctxs) -> str:
    return "\n\n".join(f"Document (Title: {passage['title']}): {passage['text']}" for passage in ctxs)


def drawn_demos(demos, keyed: str, key: str) -> list[dict]:
    """HELMET's two demonstrations for a question: the first different ones in the order of datasets' shuffle(seed=hash of the question)."""
    chosen = {}
    for place in np.random.default_rng(text_hash(key) % 2**31).permutation(len(demos)):
        chosen.setdefault(demos[place][keyed], demos[place])
        if len(chosen) == RAG_SHOTS:
            return list(chosen.values())


# --- LoCoMo ------------------------------------------------------------------------------------------------------------------

LOCOMO_METRIC = {1: "locomo_multi_f1_unstemmed", 2: "locomo_f1_unstemmed", 3: "locomo_f1_unstemmed", 4: "locomo_f1_unstemmed",
                 5: "locomo_adversarial"}
ASK = ("\n\n\nBased on the above context, write an answer in the form of a short phrase for the following question. "
       "Answer with exact words from the context whenever possible.")
ASK_5 = "\n\n\nBased on the above context, answer the following question."


def locomo_candidates(name, tokenizer, length, seed, source):
    """source: locomo10.json (data/ of snap-research/locomo; CC BY-NC). units: turns kept, the latest; the earliest evidence of the question is
    among them. Evidence that names no turn (a few do: "D", "D:11:26") is passed over.

    Sessions stand in the order of time. A question of category 5 has two options, one of them that it was not mentioned.
    """
    questions = []
    for where, row in read_rows(source):
        conversation = field(row, "conversation", where, dict)
        turns = locomo_turns(conversation, where)
        speakers = [field(conversation, key, where, str) for key in ("speaker_a", "speaker_b")]
        for i, asked in enumerate(field(row, "qa", where, list)):
            questions.append((turns, speakers, f"{where}: qa[{i}]", asked))
    for turns, speakers, where, asked in in_drawn_order(questions, name, seed):
        category = field(asked, "category", where, int)
        if category not in LOCOMO_METRIC:
            raise UserError(f"{where}: field 'category' is {category}, must be 1 to 5; correct it")
        question, answer = locomo_question(asked, category, where, f"{name} {seed}")
        evidence = set(re.findall(r"D\d+:\d+", " ".join(map(str, field(asked, "evidence", where, list)))))
        first = min((i for i, (_, _, dialogue_id, _) in enumerate(turns) if dialogue_id in evidence), default=0)

        def build(units, turns=turns, speakers=speakers, question=question, answer=answer):
            head = (f"Below is a conversation between two people: {speakers[0]} and {speakers[1]}. The conversation takes place over "
                    "multiple days and the date of each conversation is wriiten at the beginning of the conversation.\n\n")
            return Parts(head + locomo_text(turns[len(turns) - units:]), question, (answer,))
        yield Candidate(build, len(turns) - first, len(turns), LOCOMO_METRIC[category])


def locomo_turns(conversation, where) -> list[tuple[int, str, str, str]]:
    """(session, date, dialogue id, text) of every turn, in the order of time."""
    numbers = sorted(int(match[1]) for key in conversation if (match := re.fullmatch(r"session_(\d+)", key)))
    turns = []
    for number in numbers:
        date = field(conversation, f"session_{number}_date_time", where, str)
        for i, turn in enumerate(field(conversation, f"session_{number}", where, list)):
            here = f"{where}: session_{number}[{i}]"
            speaker, dialogue_id, said = (field(turn, key, here, str) for key in ("speaker", "dia_id", "text"))
            picture = f" and shared {field(turn, 'blip_caption', here, str)}." if "blip_caption" in turn else ""
            turns.append((number, date, dialogue_id, f'{speaker} said, "{said}"\n{picture}\n'))
    if not turns:
        raise UserError(f"{where}: the conversation holds no session_1, session_2, ...; download locomo10.json again")
    return turns


def locomo_text(turns) -> str:
    text, last = "", None
    for number, date, _, said in turns:
        text += said if number == last else f"DATE: {date}\nCONVERSATION:\n{said}"
        last = number
    return text


def locomo_question(asked, category: int, where: str, state: str) -> tuple[str, str]:
    """What follows the conversation, and the reference (for category 5 the letter of the right option)."""
    question = field(asked, "question", where, str)
    if category == 5:
        wrong = str(field(asked, "adversarial_answer" if "adversarial_answer" in asked else "answer", where, str, int))
        options = [NOT_MENTIONED, wrong] if random.Random(f"{state} {question}").random() < 0.5 else [wrong, NOT_MENTIONED]
        question = f"{question} Select the correct answer: (a) {options[0]} (b) {options[1]}. "
        return f"{ASK_5}\n\nQuestion: {question} Short answer:", "ab"[options.index(NOT_MENTIONED)]
    answer = str(field(asked, "answer", where, str, int))
    if category == 2:
        question += " Use DATE of CONVERSATION to answer with an approximate date."
    if category == 3:
        answer = answer.split(";")[0].strip()
    return f"{ASK}\n\nQuestion: {question} Short answer:", answer


# --- LongMemEval ---------------------------------------------------------------------------------------------------------------

def longmemeval_candidates(name, tokenizer, length, seed, source):
    """source: longmemeval_s_cleaned.json or longmemeval_oracle.json of xiaowu0162/longmemeval-cleaned, or the release of 2024 (longmemeval_s.json).
    units: sessions without evidence, the earliest in the file.

    The history is in natural language and complete turns. Questions that have no answer (ids ending in _abs) are left out: only the
    judge can score them.
    """
    for where, row in in_drawn_order(read_rows(source), name, seed):
        if field(row, "question_id", where, str).endswith("_abs"):
            continue
        sessions = longmemeval_sessions(row, where)
        question = f"\n\nCurrent Date: {field(row, 'question_date', where, str)}\nQuestion: {field(row, 'question', where, str)}\nAnswer:"
        answer = str(field(row, "answer", where, str, int))
        needed = set(texts(row, "answer_session_ids", where))
        if missing := needed - {session_id for session_id, _, _ in sessions}:
            raise UserError(f"{where}: answer_session_ids names {sorted(missing)[0]!r}, which is no haystack session; correct it")
        spare = [i for i, session in enumerate(sessions) if session[0] not in needed]

        def build(units, sessions=sessions, question=question, answer=answer, spare=spare):
            kept = sorted((session for i, session in enumerate(sessions) if i not in spare[units:]), key=lambda session: session[1])
            history = "".join(f"\n### Session {i}:\nSession Date: {date}\nSession Content:\n{text}\n" for i, (_, date, text) in enumerate(kept, 1))
            head = ("I will give you several history chats between you and a user. Please answer the question based on the relevant "
                    "chat history.\n\n\nHistory Chats:\n\n")
            return Parts(head + history, question, (answer,))
        yield Candidate(build, 0, len(spare), "contains_no_judge")


def longmemeval_sessions(row, where) -> list[tuple[str, str, str]]:
    """(id, date, text) of every session."""
    ids, dates = (texts(row, name, where) for name in ("haystack_session_ids", "haystack_dates"))
    sessions = field(row, "haystack_sessions", where, list)
    if not len(ids) == len(dates) == len(sessions):
        raise UserError(f"{where}: haystack_sessions, _session_ids and _dates have {len(sessions)}, {len(ids)} and {len(dates)} entries; "
                        "they must have one for each session")
    contents = []
    for i, session in enumerate(sessions):
        if not isinstance(session, list):
            raise UserError(f"{where}: haystack_sessions[{i}] must be a list of turns; correct it")
        contents.append("".join(f"\n\n{field(turn, 'role', f'{where}: haystack_sessions[{i}]', str)}: "
                              f"{field(turn, 'content', f'{where}: haystack_sessions[{i}]', str).strip()}" for turn in session))
    return list(zip(ids, dates, contents))
