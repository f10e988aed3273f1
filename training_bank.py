"""Training conversations: short talks full of facts with real and composed names, with questions about them.

The language lives in data/bank_<lang>.json, this file only puts it together; a new language needs no code.

Format of data/bank_<lang>.json
-------------------------------
relations       list of objects, one for each kind of fact:
  id, category    unique name; person | numeric | temporal | relational | preference | spatial | project
  subject         kind of the owner {s}: person, project, place ... any key of "kinds"
  value           kind of the value {v}: any key of "kinds"
  statements      >= 7 sentences with {s} and {v}, of truly different structure
  first_person    >= 3 sentences with {v}, spoken by the owner; [] where the owner is not a person
  questions       >= 6 questions with {s}; the bare {v} is the natural answer
  as_subject      (only where the value is a person) phrases with {s} that stand for that person: "{s}'s mentor";
                  they replace {s} in a question of another relation and so make a question about two facts
  answers         (optional, >= 2) replies with {v} to one of the questions, spoken right after it: "In the {v}, I believe."
  ask_owner       (optional, >= 2) the question put to the owner: "{s}, where do you keep your kite?"; the owner answers
  pairs           (optional, >= 2) one sentence with two owners: "{s}'s dog answers to {v}, and {s2}'s to {v2}."
  group           (optional) relations of one group never share an owner, because their questions could be mixed up
kinds           {kind: [entries]}. An entry is a word or a pattern. In a pattern {kind} draws from another kind and {2..40} a whole
                number ({00..59} keeps the leading zero). Entries are drawn evenly: repeat a pattern to weigh it.
                "person" must exist; speakers are drawn from it.
shared_kinds    kinds whose words serve train and dev alike (digits, letters, name endings, number words ...). Of every other
                kind, one word in ten (at least five) is held out for dev, by a hash of the word. A value made of shared words alone
                is itself hashed. Names are held apart by their first syllable: list the later syllables as shared.
name_kinds      the kinds that name persons, projects, places, companies (for the check against the benchmark)
never_names     names that the tests' people, places and projects have; a drawn name with one of these among its words is rejected
openers         first turns without a fact.   {other} is another speaker's name, here and in the next three
small_talk      turns without a fact
acknowledgements  short sentences that react to the turn before
closers         last turns without a fact
connectors      what may precede a statement, of anybody's: "By the way, "; with its own trailing space; "" for nothing, repeated to weigh it
question_connectors  the same before a question
answer_frames   replies to any question: "{v}.", "{v}, as far as I know."
owner_answer_frames  (optional, else answer_frames) replies of the owner to ask_owner: "{v}.", "{v}, of course."
corrections     sentence right after a wrong statement: "Sorry, not {old}: {new}."
late_corrections  the same some turns later, naming the owner: "About {s}: I said {old}, but it is {new}."
prose_intros    what a speaker says before reading a passage aloud; ends with its own space
possessive      "'s" where as_subject phrases not starting with {s} must not be put before it; "" if that never hurts
sentence_joiner what stands between two sentences of a turn: " " in English, "" in Chinese
speaker_colon   ": "
capitalise      true: the first letter of every sentence is raised
article         {"plain": "a", "vowel": "an", "vowel_pattern": regex at the start of the word} for the slot {a v}; null if unused

Write every sentence as it stands after a comma: lower case unless its first word is always capital ("the dog of {s} ...").
Sentences carry their own full stop. Of each list of sentences 15% (at least one), chosen by a hash, are held out for dev.
data/bank_passages.json holds filler prose: {"en": [...], "zh": [...]}.
"""
import argparse
import json
import os
import random
import sys
from pathlib import Path

from bank_talk import FACT_COUNTS, Plan, Talk
from bank_values import DATA, FORM_FIELDS, SPLITS, BankError, hash_files, load_bank, load_passages

BANK_LANGS = ("en", "zh")
TOPICS = 16     # of 137 and more: enough to find 12 facts, few enough for conversations to share most of them
ROOM = Path(__file__).resolve().parent


def sample_conversation(rng, lang="en", split="train", n_facts=None, n_prose=0, topics=None):
    """One conversation with its facts and probes, in the shape of a benchmark sample.

    rng is a random.Random; the same state gives the same sample. split "dev" uses only forms and values held out
    from "train". n_facts is drawn from 3 to 12 if None. n_prose passages of filler stand between the turns.
    topics, from draw_topics, are what the facts are about (the three of a chain aside); conversations of the same topics tell the
    same kinds of fact about other people.
    Raises ValueError for an unknown language or split and BankError (a ValueError) for a faulty data file.
    """
    bank = _bank(lang)
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; use one of {', '.join(SPLITS)}")
    plan = Plan(bank, rng, split, rng.choice(FACT_COUNTS) if n_facts is None else n_facts, topics)
    talk = Talk(plan)
    talk.write(rng.sample(load_passages(lang), n_prose) if n_prose else [])
    text, spans = talk.render()
    facts = sorted(plan.facts, key=lambda fact: spans[id(fact)])
    ids = {id(fact): f"f{number}" for number, fact in enumerate(facts, 1)}
    joined = [(question, gold, [one, two]) for question, gold, (one, two) in plan.joined_questions()
              if needs_both(text, spans[id(one)], spans[id(two)], gold)]
    sample = {"sample_id": f"L{2 if joined else 1}-{rng.randrange(10**6):06d}-{lang}", "level": 2 if joined else 1,
              "lang": lang, "skeleton_id": "bank", "conversation": text}
    sample["facts"] = [{"fact_id": ids[id(f)], "fact_text": bank.state(f), "category": f.relation["category"],
                        "span": spans[id(f)]} for f in facts]
    asked = [(plan.question(f), f.value, [f]) for f in facts] + joined
    sample["probes"] = [
        {"probe_id": f"{sample['sample_id']}-p{number}", "question": question, "gold_answer": gold, "aliases": [],
         "required_facts": [ids[id(f)] for f in needed]}
        for number, (question, gold, needed) in enumerate(asked, 1)]
    sample["distractor"] = None
    return sample


def draw_topics(rng, lang):
    """Ids of a few relations, for conversations that are to be easily confused."""
    return frozenset(relation["id"] for relation in rng.sample(_bank(lang).relations, TOPICS))


def needs_both(text, first, second, gold):
    """Whether the answer stands nowhere in the stretch that states the first fact (facts told in one breath aside)."""
    return first == second or gold.casefold() not in text[slice(*first)].casefold()


def templates(lang):
    """All statement and question templates of a language, with {s} and {v} slots (and {s2}, {v2} in pairs)."""
    return [form.replace("{a v", "a {v") for relation in _bank(lang).relations
            for name in FORM_FIELDS for form in relation.get(name, [])]


def can_draw_name(lang, name):
    """Whether the bank could draw exactly this person, project, place or company name (letter case aside)."""
    return _bank(lang).can_draw_name(name)


def bank_names(lang):
    """The names that can be drawn, as a predicate: bank_names("en")("Marta") is False."""
    return _bank(lang).can_draw_name


def passages(lang):
    """Filler prose of a language, list of str."""
    _bank(lang)
    return list(load_passages(lang))


def bank_sha256():
    """SHA-256 over the bank's data files and its code, for the manifests."""
    data = [DATA / f"bank_{name}.json" for name in (*BANK_LANGS, "passages")]
    return hash_files(data + [ROOM / name for name in ("training_bank.py", "bank_talk.py", "bank_values.py")])


def _bank(lang):
    if lang not in BANK_LANGS:
        raise ValueError(f"unknown language {lang!r}; use one of {', '.join(BANK_LANGS)}")
    return load_bank(lang)


def export(lang, split, n, seed, n_facts, n_prose):
    """A dict of the benchmark's shape with n samples; those of level 2 keep only their questions about two facts."""
    rng, samples = random.Random(seed), []
    for number in range(n):
        sample = sample_conversation(rng, lang, split, n_facts, n_prose)
        sample["sample_id"] = f"L{sample['level']}-{number:03d}-{lang}"
        if sample["level"] == 2:
            sample["probes"] = [p for p in sample["probes"] if len(p["required_facts"]) == 2]
        for index, probe in enumerate(sample["probes"], 1):
            probe["probe_id"] = f"{sample['sample_id']}-p{index}"
        samples.append(sample)
    return {"version": "1", "seed": seed, "samples": samples}


def write_json(path, content):
    """Write through a temporary name in the same folder, so that no half file is ever seen."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def show(samples):
    """Print conversations with their questions and answers, to be read by a person."""
    for sample in samples:
        print(f"--- {sample['sample_id']}\n{sample['conversation']}\n")
        for probe in sample["probes"]:
            print(f"  {'+'.join(probe['required_facts'])}  {probe['question']}  ->  {probe['gold_answer']}")
        print()


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="Draw conversations from the training bank: into a file that "
                                     "run_experiment.py takes with --benchmark, or onto the terminal.")
    what = parser.add_argument_group("what to draw")
    what.add_argument("--lang", choices=BANK_LANGS, default="en", help="language (default: en)")
    what.add_argument("--split", choices=SPLITS, default="dev",
                      help="dev: phrasings and words that training never shows; train: all the others (default: dev)")
    what.add_argument("--n", type=int, default=100, help="number of conversations (default: 100)")
    what.add_argument("--seed", type=int, default=1, help="same seed, same conversations (default: 1)")
    what.add_argument("--facts", type=int, help="facts in each conversation (default: drawn from 3 to 12)")
    what.add_argument("--prose", type=int, default=0, help="filler passages in each conversation (default: 0)")
    where = parser.add_argument_group("where it goes")
    where.add_argument("--out", type=Path, help="file to write; without it the conversations are printed")
    arguments = parser.parse_args(argv)
    for name, least in (("n", 1), ("facts", 1), ("prose", 0)):
        given = getattr(arguments, name)
        if given is not None and given < least:
            parser.error(f"--{name} is {given}; give {least} or more")
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)
    try:
        content = export(arguments.lang, arguments.split, arguments.n, arguments.seed, arguments.facts, arguments.prose)
        if arguments.out is None:
            show(content["samples"])
            return 0
        write_json(arguments.out, content)
    except (ValueError, OSError) as error:
        print(f"training_bank.py: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {len(content['samples'])} conversations, "
          f"{sum(len(s['probes']) for s in content['samples'])} questions ({arguments.lang}, {arguments.split})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
