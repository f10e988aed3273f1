"""Write the test benchmark, or check a file of test conversations.

300 conversations, 100 a level, each in English and Chinese from the same facts. The skeletons (dialogues, wordings,
word lists) are data/skeletons_*.json, the prose of level 3 is data/passages.json; the same seed gives the same bytes.
"""
import argparse
import json
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

from benchmark_checks import check_benchmark
from benchmark_dialogue import Content, Plan, article, pick, render
from benchmark_file import LANGS, LEVELS, VERSION, BenchmarkError, load_benchmark

PER_LEVEL = 100
COMPARISON_SHARE = 0.9  # of the level-2 conversations in which something can be compared
PASSAGES_PER_TEXT = {"en": (8, 10), "zh": (9, 12)}  # 2,000 to 4,000 tokens of either language
STOP = {"en": ".", "zh": "。"}
# "the dog of Eva's mentor", "the mentor of Eva's dog": a wording with the subject in one of these places and a subject
# of that form together leave open whose dog or mentor is meant
POSSESSED = re.compile(r"\{s\}'s| of \{s\}")


# --- facts and probes of one conversation ---------------------------------------------------------------------

def make_facts(plan, lang, spans):
    """The sample's facts in the order of the conversation."""
    facts = []
    for number, (subject, attribute, target) in enumerate(plan.keys, 1):
        spec, value = plan.content.attributes[attribute], plan.values[subject, attribute]
        said = value[lang]["said"]
        text = spec[lang]["fact"].format(s=plan.subject(subject, lang), v=said, av=article(said) + said) + STOP[lang]
        fact = {"fact_id": f"f{number}", "fact_text": text[0].upper() + text[1:], "category": spec["category"],
                "span": spans[subject, attribute], "subject": plan.names[subject][lang]["said"],
                "attribute": attribute, "value": said}
        if value["order"] is not None:
            fact["order"] = value["order"]
        facts.append(fact)
    return facts


# --- probes: what is asked, the same in both languages --------------------------------------------------------

def choose_probes(plan, asked):
    """[(kind, keys of the required facts, number that picks the wording)].

    `asked` counts the categories asked so far: rarer ones are preferred, so that all are well represented.
    """
    rng = plan.rng
    if plan.level == 2:
        chosen = _two_fact_probes(plan, rng, asked)
    else:
        weight = {key: asked[_category(plan, key)] * rng.uniform(0.6, 1.4) for key in plan.keys}
        chosen = [("fact", (key,)) for key in sorted(plan.keys, key=weight.get)]
        chosen = chosen[:rng.randint(4, 5) if plan.level == 1 else 4]
        rng.shuffle(chosen)
    asked.update(_category(plan, keys[-1]) for _, keys in chosen)
    return [(kind, keys, rng.randrange(1000)) for kind, keys in chosen]


def _category(plan, key):
    return plan.content.attributes[key[1]]["category"]


def _two_fact_probes(plan, rng, asked):
    """Up to three probes: bridges (anchor -> intermediate -> value), at most one comparison."""
    same = {key: [k for k in plan.keys if k[1] == key[1] and k != key] for key in plan.keys}
    bridges = [("bridge", (link, fact)) for link in plan.keys for fact in plan.keys
               if link[2] == fact[0] and link[0] != fact[0] and same[fact] and not fact[2]]
    comparisons = []
    for key in plan.keys:
        compare = plan.content.attributes[key[1]].get("compare")
        if compare and len(same[key]) == 1:
            pair = sorted([key, *same[key]], key=lambda k: plan.values[k[:2]]["order"], reverse=compare["pick"] == "low")
            if key == pair[0]:
                comparisons.append(("comparison", tuple(pair)))
    wanted = rng.random() < COMPARISON_SHARE or len(bridges) < 3
    chosen = rng.sample(comparisons, 1) if comparisons and wanted else []
    rng.shuffle(bridges)
    bridges.sort(key=lambda probe: asked[_category(plan, probe[1][1])])  # stable: shuffled within a category
    for fresh in (True, False):  # a fact answers a second question only where there are too few
        for probe in bridges:
            used = {keys[-1] for _, keys in chosen}
            if len(chosen) < 3 and probe not in chosen and (probe[1][1] not in used) == fresh:
                chosen.append(probe)
    rng.shuffle(chosen)
    return chosen


def make_probes(plan, lang, chosen, facts, sample_id):
    """The sample's probes in its language."""
    by_key = dict(zip(plan.keys, facts))
    probes = []
    for number, (kind, keys, draw) in enumerate(chosen, 1):
        last = by_key[keys[-1]]
        spec = plan.content.attributes[keys[-1][1]]
        if kind == "comparison":
            question, gold = pick(spec["compare"][lang], draw), last["subject"]
            aliases = [form for form in [plan.subject(keys[-1][0], lang)] if form != gold]
        else:
            question = _question(plan, lang, keys, draw)
            gold, aliases = last["value"], _aliases(plan.values[keys[-1][:2]][lang], spec[lang]["answers"])
        probes.append({"probe_id": f"{sample_id}-p{number}", "question": question[0].upper() + question[1:],
                       "gold_answer": gold, "aliases": aliases,
                       "required_facts": [by_key[key]["fact_id"] for key in keys], "kind": kind})
    return probes


def _question(plan, lang, keys, draw):
    """The question for one fact, or for a bridge, where what its first fact says about the anchor is the subject."""
    name = plan.subject(keys[0][0], lang)
    wordings = plan.content.attributes[keys[-1][1]][lang]["questions"]
    if len(keys) == 1:
        return pick(wordings, draw).format(s=name)
    wordings = [wording for wording in wordings if not POSSESSED.search(wording)] or wordings
    wording = pick(wordings, draw)
    forms = plan.content.attributes[keys[0][1]][lang]["as_subject"]
    return wording.format(s=(forms[0] if POSSESSED.search(wording) else pick(forms, draw // 7)).format(s=name))


def _aliases(value, patterns):
    """Other forms of the answer, each once, without the gold answer itself."""
    forms = [value["said"], *value["aliases"]]
    forms += [pattern.format(v=form) for pattern in patterns for form in forms]
    return list(dict.fromkeys(forms))[1:]


# --- the file -------------------------------------------------------------------------------------------------

def build(seed, content=None):
    """The whole benchmark for a seed: a dict of the shape in benchmark_file.SCHEMA."""
    content = content or Content()
    samples = []
    for level in LEVELS:
        asked = Counter()
        order = _scene_order(content, random.Random(f"{seed}/{level}/scenes"))
        for number in range(1, PER_LEVEL + 1):
            rng = random.Random(f"{seed}/{level}/{number}")
            samples += _conversation(content, order[number - 1], level, number, rng, asked, seed)
    return {"version": VERSION, "seed": seed, "samples": samples}


def _scene_order(content, rng):
    """PER_LEVEL scenes: every scene equally often (but for the rest), in shuffled rounds."""
    order = []
    while len(order) < PER_LEVEL:
        order += rng.sample(content.scenes, len(content.scenes))
    return order[:PER_LEVEL]


def _conversation(content, scene, level, number, rng, asked, seed):
    """The two samples of one conversation; plans are drawn until one has enough facts and probes."""
    while True:
        plan = Plan(content, scene, level, rng)
        if plan.is_sound() and (level != 2 or len(_two_fact_probes(plan, random.Random(0), asked)) == 3):
            break
    chosen = choose_probes(plan, asked)
    samples = []
    for lang in LANGS:
        wording = random.Random(f"{seed}/{level}/{number}/{lang}")
        sample_id = f"L{level}-{number:03d}-{lang}"
        conversation, spans = render(plan, lang, wording)
        facts = make_facts(plan, lang, spans)
        samples.append({"sample_id": sample_id, "level": level, "lang": lang, "skeleton_id": scene["id"],
                        "conversation": conversation, "facts": facts,
                        "probes": make_probes(plan, lang, chosen, facts, sample_id),
                        "distractor": _distractor(content, lang, wording) if level == 3 else None})
    return samples


def _distractor(content, lang, rng):
    """Whole passages in random order, joined by blank lines."""
    passages = content.passages[lang]
    count = min(rng.randint(*PASSAGES_PER_TEXT[lang]), len(passages))
    return "\n\n".join(rng.sample(passages, count))


def write(bench, path):
    """Write the file whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(bench, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def check(path):
    """Print what was checked in the file and what is wrong with it; returns the exit code."""
    report = check_benchmark(load_benchmark(path))
    for line in report.checked:
        print(line)
    for problem in report.problems:
        print(f"{path}: {problem}")
    print(f"{path}: {len(report.problems)} problem{'s' * (len(report.problems) != 1)}")
    return 1 if report.problems else 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    writing = parser.add_argument_group("writing (the default)")
    writing.add_argument("--seed", type=int, default=0, help="another seed gives other conversations (default 0)")
    writing.add_argument("--out", default="benchmark_v1.json", help="file to write (default benchmark_v1.json)")
    checking = parser.add_argument_group("checking")
    checking.add_argument("--check", nargs="?", const="benchmark_v1.json", metavar="FILE",
                          help="check FILE (default benchmark_v1.json) instead of writing: shape, spans, one answer a "
                               "probe, two facts in level 2, nothing shared with the training bank; exit code 1 if not")
    args = parser.parse_args(argv)
    try:
        if args.check is not None:
            return check(args.check)
        bench = build(args.seed)
        write(bench, args.out)
    except (BenchmarkError, OSError) as error:
        print(f"build_benchmark: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(bench['samples'])} samples; python build_benchmark.py --check {args.out} checks them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
