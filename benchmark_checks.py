"""Checks of a file of test conversations beyond its shape: spans, one answer a probe, level 2, nothing trained on.

check_benchmark returns a Report. A file from elsewhere may lack the fields "span", "subject", "attribute" and "value";
what cannot be checked without them is counted as skipped, never passed over in silence.
"""
import re
import string
import unicodedata
from collections import Counter

from benchmark_dialogue import ALTERNATIVES, TOKEN, Content
from benchmark_file import CATEGORIES, LANGS, LEVELS
from template_index import TemplateIndex, asks, flatten, tells_apart

ARTICLES = re.compile(r"\b(a|an|the)\b")
SENTENCE_END = re.compile(r"(?<=[.?!])\s+|(?<=[。？！])|\n")
LONGEST_SHARED_RUN = {"en": 3, "zh": 5}   # words, characters: question and statement without names and values
DISTRACTOR_TOKENS = (2000, 4000)
TOKENS_PER = {"en": 1.4, "zh": 0.7}       # tokens a word, a character: measured on the passages
# what a slot of a training template may stand for


class Report:
    """What was checked (lines for a reader), how often, what could not be, and the problems found."""

    def __init__(self):
        self.done, self.skipped, self.problems, self.tables = Counter(), Counter(), [], []

    def expect(self, check, holds, problem):
        """Count one check; keep the problem, one line, where it does not hold."""
        self.done[check] += 1
        if not holds:
            self.problems.append(problem)

    @property
    def checked(self):
        lines = [f"checked {count:6d} x {check}" for check, count in self.done.items()]
        lines += [f"skipped {count:6d} x {check}" for check, count in self.skipped.items()]
        return lines + self.tables


def check_benchmark(bench, bank=None):
    """Report on a loaded benchmark. `bank` defaults to the room training_bank."""
    report, content = Report(), Content()
    for sample in bench["samples"]:
        check_facts(sample, report)
        check_probes(sample, content.attributes, report)
        check_distractor(sample, content.passages, report)
    check_languages(bench["samples"], report)
    check_bank(bench["samples"], content, bank or _training_bank(), report)
    report.tables += category_table(bench["samples"])
    return report


def normalise(text, lang):
    """The text as answers are compared. English: SQuAD. Chinese: full-width folded, no punctuation, no spaces."""
    if lang == "en":
        text = "".join(char for char in text.lower() if char not in string.punctuation)
        return " ".join(ARTICLES.sub(" ", text).split())
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(c for c in text if unicodedata.category(c)[0] not in "PZC" and c not in string.punctuation)


def holds(text, part, lang):
    """Whether the normalised text holds the part, in English as whole words ("Eva's" holds "Eva")."""
    text, part = normalise(re.sub(r"'s\b", " ", text), lang), normalise(part, lang)
    return bool(part) and (part in text if lang == "zh" else f" {part} " in f" {text} ")


def _stated(sample, fact):
    """The stretch of the conversation that states the fact, or None where the file does not say."""
    return sample["conversation"][slice(*fact["span"])] if "span" in fact else None


def _asks_two(probe):
    return len(probe["required_facts"]) > 1


# --- facts ----------------------------------------------------------------------------------------------------

def check_facts(sample, report):
    """Every fact: its value and its owner stand where the span says; one value for each subject and attribute."""
    seen, values = {}, {}
    for fact in sample["facts"]:
        where = f"{sample['sample_id']} {fact['fact_id']}"
        if not {"subject", "attribute", "value"} <= fact.keys():
            report.skipped["one value a subject and attribute (no field subject, attribute or value)"] += 1
            continue
        key = (fact["subject"], fact["attribute"])
        report.expect("one value a subject and attribute", key not in seen,
                      f"{where}: '{key[1]}' of {key[0]} is told by {seen.get(key)} too, so a question has two answers")
        seen.setdefault(key, fact["fact_id"])
        same = (fact["attribute"], normalise(fact["value"], sample["lang"]))
        report.expect("different subjects have different values", same not in values,
                      f"{where}: has the same value as {values.get(same)}, so the owner does not matter")
        values.setdefault(same, fact["fact_id"])
        _check_span(sample, fact, where, report)


def _check_span(sample, fact, where, report):
    stated, lang = _stated(sample, fact), sample["lang"]
    if stated is None:
        report.skipped["span holds value and owner (no field span)"] += 1
        return
    report.expect("span holds the value", holds(stated, fact["value"], lang),
                  f"{where}: the span does not hold the value '{fact['value']}'")
    line = sample["conversation"][sample["conversation"].rfind("\n", 0, fact["span"][0]) + 1:]
    speaker = re.split("[:：]", line, maxsplit=1)[0]
    report.expect("span names the owner or the owner speaks",
                  holds(stated, fact["subject"], lang) or speaker == fact["subject"],
                  f"{where}: neither the span nor the speaker ({speaker}) is {fact['subject']}")


# --- probes ---------------------------------------------------------------------------------------------------

def check_probes(sample, attributes, report):
    """Every probe: one answer, in the conversation; wording of its own; level 2 asks for two facts, really."""
    facts = {fact["fact_id"]: fact for fact in sample["facts"]}
    golds, lang = {}, sample["lang"]
    for probe in sample["probes"]:
        where = f"{sample['sample_id']} {probe['probe_id']}"
        answers = [probe["gold_answer"], *probe.get("aliases", [])]
        question = normalise(probe["question"], lang)
        report.expect("one answer a question", golds.setdefault(question, answers[0]) == answers[0],
                      f"{where}: the same question has another answer, '{golds[question]}'")
        report.expect("gold is more than punctuation and articles", all(normalise(a, lang) for a in answers),
                      f"{where}: the gold answer or an alias is empty after normalisation")
        needed = [facts[name] for name in probe["required_facts"]]
        report.expect("level 2 needs two facts, the other levels one",
                      len(needed) == (2 if sample["level"] == 2 else 1),
                      f"{where}: level {sample['level']} with {len(needed)} required fact(s)")
        _check_answer(sample, probe, needed[-1], answers, where, report)
        if len(needed) == 2:
            check_two_facts(sample, probe, needed, attributes, where, report)


def _check_answer(sample, probe, fact, answers, where, report):
    """The last required fact holds the answer, no other fact of its kind does, and the question is no copy of it."""
    lang, stated = sample["lang"], _stated(sample, fact)
    if stated is None:
        report.skipped["gold stands in the span (no field span)"] += 1
    elif probe.get("kind") != "comparison":
        report.expect("gold or alias stands in the span", any(holds(stated, answer, lang) for answer in answers),
                      f"{where}: the span of {fact['fact_id']} holds neither '{answers[0]}' nor an alias")
    if not {"subject", "attribute", "value"} <= fact.keys():
        report.skipped["gold fits no other fact, question names its subject (no field subject ...)"] += 1
        return
    others = [other for other in sample["facts"] if other is not fact and other.get("attribute") == fact["attribute"]]
    forms = {normalise(answer, lang) for answer in answers}
    if probe.get("kind") != "comparison":
        report.expect("gold is the fact's value", normalise(answers[0], lang) == normalise(fact["value"], lang),
                      f"{where}: the gold answer is not the value of {fact['fact_id']}")
        report.expect("gold fits no other fact of the kind",
                      not any(normalise(other["value"], lang) in forms for other in others),
                      f"{where}: '{answers[0]}' or an alias is the value of another fact of the same attribute")
    if len(probe["required_facts"]) == 1:
        report.expect("question names the subject", holds(probe["question"], fact["subject"], lang),
                      f"{where}: the question does not name {fact['subject']}")
    if stated is not None:
        run = shared_run(probe["question"], stated, [fact["subject"], fact["value"]], lang)
        report.expect("question is worded otherwise than the statement", len(run) <= LONGEST_SHARED_RUN[lang],
                      f"{where}: question and statement share '{(' ' if lang == 'en' else '').join(run)}'")


def shared_run(question, statement, left_out, lang):
    """The longest run of words (zh: characters) that both texts have, apart from the texts left out."""
    for index, part in enumerate(left_out):
        question, statement = question.replace(part, f" \0{index} "), statement.replace(part, f" \1{index} ")
    split = (lambda t: re.findall(r"[\w'\0\1]+", t.lower())) if lang == "en" else (lambda t: re.findall(r"[\w\0\1]", t))
    first, second = split(question), split(statement)
    best = []
    for start in range(len(first)):
        while start + len(best) < len(first) and _has_run(second, first[start:start + len(best) + 1]):
            best = first[start:start + len(best) + 1]
    return best


def _has_run(items, run):
    return any(items[i:i + len(run)] == run for i in range(len(items) - len(run) + 1))


def check_two_facts(sample, probe, needed, attributes, where, report):
    """Neither of two facts alone gives the answer. needed: [bridge or first of two, fact with the answer]."""
    lang, gold = sample["lang"], probe["gold_answer"]
    first, second = needed
    report.expect("gold is not in the first fact", not any(
        holds(text, gold, lang) for text in (first["fact_text"], _stated(sample, first) or "")),
        f"{where}: the first fact alone holds the answer '{gold}'")
    if not {"subject", "attribute", "value"} <= first.keys() & second.keys():
        report.skipped["two facts hang together (no field subject, attribute or value)"] += 1
        return
    if probe.get("kind") == "comparison":
        _check_comparison(sample, probe, first, second, attributes, where, report)
        return
    report.expect("bridge leads to the second fact", first["value"] == second["subject"],
                  f"{where}: the first fact leads to {first['value']}, the second is about {second['subject']}")
    report.expect("question names the anchor, not the intermediate",
                  holds(probe["question"], first["subject"], lang)
                  and not holds(probe["question"], second["subject"], lang),
                  f"{where}: the question must name {first['subject']} and must not name {second['subject']}")
    report.expect("second fact does not name the anchor", not any(
        holds(text, first["subject"], lang) for text in (second["fact_text"], _stated(sample, second) or "")),
        f"{where}: the second fact names {first['subject']}")
    report.expect("somebody else has another value", any(
        fact.get("attribute") == second["attribute"] and fact["subject"] != second["subject"]
        for fact in sample["facts"]), f"{where}: nobody else has '{second['attribute']}', so the bridge is not needed")


def _check_comparison(sample, probe, first, second, attributes, where, report):
    rule = attributes.get(second["attribute"], {}).get("compare")
    same = [fact for fact in sample["facts"] if fact.get("attribute") == second["attribute"]]
    if rule is None or "order" not in first or "order" not in second:
        report.skipped["comparison comes out as the gold says (no field order or unknown attribute)"] += 1
        return
    ahead = first["order"] > second["order"] if rule["pick"] == "low" else first["order"] < second["order"]
    report.expect("comparison of exactly two facts comes out as the gold says",
                  ahead and len(same) == 2 and probe["gold_answer"] == second["subject"],
                  f"{where}: '{probe['gold_answer']}' does not follow from exactly two facts of '{second['attribute']}'")


# --- distractors, languages, categories -----------------------------------------------------------------------

def check_distractor(sample, passages, report):
    """Level 3: whole passages, 2,000 to 4,000 tokens (estimated), nothing about the people of the conversation."""
    text, lang, where = sample["distractor"], sample["lang"], sample["sample_id"]
    if text is None:
        return
    unknown = [part for part in text.split("\n\n") if part not in passages[lang]]
    if len(unknown) == len(text.split("\n\n")):
        report.skipped["distractor of whole passages (none is in data/passages.json)"] += 1
    else:
        report.expect("distractor of whole passages", not unknown,
                      f"{where}: the distractor has a part that is no whole passage: '{' '.join(unknown)[:40]}'")
    tokens = int(TOKENS_PER[lang] * (len(text.split()) if lang == "en" else len(text)))
    report.expect("distractor of 2,000 to 4,000 tokens", DISTRACTOR_TOKENS[0] <= tokens <= DISTRACTOR_TOKENS[1],
                  f"{where}: the distractor has about {tokens} tokens")
    named = [fact["subject"] for fact in sample["facts"] if "subject" in fact and re.search(
        rf"\b{re.escape(fact['subject'])}\b" if lang == "en" else f"“?{re.escape(fact['subject'])}”项目", text)]
    report.expect("distractor names nobody of the conversation", not named,
                  f"{where}: the distractor names {', '.join(named)}")


def check_languages(samples, report):
    """The two languages of one conversation tell and ask the same."""
    pairs = {}
    for sample in samples:
        name, _, lang = sample["sample_id"].rpartition("-")
        pairs.setdefault(name, {})[lang] = sample
    for name, found in sorted(pairs.items()):
        if set(found) != set(LANGS):
            report.skipped["both languages tell the same (only one is in the file)"] += 1
            continue
        told = [([(f["fact_id"], f["category"], f.get("attribute")) for f in s["facts"]],
                 [(p["required_facts"], p.get("kind")) for p in s["probes"]]) for s in found.values()]
        report.expect("both languages tell the same", told[0] == told[1],
                      f"{name}: the facts or probes of the two languages differ")


def category_table(samples):
    """Lines: probes by category (of the last required fact, which holds the answer) and level."""
    counts = Counter()
    for sample in samples:
        facts = {fact["fact_id"]: fact["category"] for fact in sample["facts"]}
        counts.update((sample["level"], facts[probe["required_facts"][-1]]) for probe in sample["probes"])
    lines = ["probes    " + "".join(f"{name:>12}" for name in CATEGORIES)]
    for level in LEVELS:
        lines.append(f"level {level}   " + "".join(f"{counts[level, name]:12d}" for name in CATEGORIES))
    return lines


# --- nothing shared with the training bank --------------------------------------------------------------------

def _training_bank():
    import training_bank  # only a check needs it: a benchmark is written without the training data
    return training_bank


def check_bank(samples, content, bank, report):
    """No wording, name or passage of the benchmark comes out of the training bank."""
    for lang in LANGS:
        templates = [(asks(template), flatten(template, lang)) for template in bank.templates(lang)]
        usable = {template for template in templates if tells_apart(template[1], lang)}
        report.skipped[f"{lang} training templates too short to tell apart"] += len(templates) - len(usable)
        _check_own_templates(content, lang, {flat for _, flat in usable}, report)
        own = [sample for sample in samples if sample["lang"] == lang]
        _check_texts(own, lang, usable, report)
        _check_names(own, content, lang, bank, report)
        known = {normalise(sentence, lang) for text in bank.passages(lang) for sentence in SENTENCE_END.split(text)}
        for sample in own:
            shared = [s for s in SENTENCE_END.split(sample["distractor"] or "") if normalise(s, lang) in known - {""}]
            report.expect("no distractor sentence in the training passages", not shared,
                          f"{sample['sample_id']}: the training passages hold '{(shared or [''])[0][:50]}'")


def _check_own_templates(content, lang, bank_templates, report):
    """Statement and question templates of the benchmark, as such."""
    own = [wording for spec in content.attributes.values() for wording in
           spec[lang]["questions"] + spec.get("compare", {}).get(lang, [])]
    blocks = content.topics + [b for s in content.scenes for kind in s.values() for b in kind if isinstance(b, dict)]
    for turn in (turn[3:] for block in blocks for turn in block[lang]):
        for inside in re.findall(r"<[A-Z]\.[^>]*>(.*?)</>", turn):
            groups = ALTERNATIVES.search(inside)
            own += [inside.replace(groups[0], part) for part in groups[1].split("|")] if groups else [inside]
    for template in sorted({flatten(TOKEN.sub("{x}", wording), lang) for wording in own}):
        report.expect(f"{lang} template is none of the training bank's", template not in bank_templates,
                      f"data/skeletons ({lang}): the training bank has the template '{template}' too")


def _check_texts(samples, lang, templates, report):
    """Questions, stated facts and the sentences of the conversations, as rendered; questions are held against questions."""
    index = {asked: TemplateIndex([flat for kind, flat in templates if kind == asked], lang) for asked in (True, False)}
    texts = {}
    for sample in samples:
        turns = [re.split("[:：]", line, maxsplit=1)[-1] for line in sample["conversation"].split("\n")]
        sentences = [s for turn in turns for s in SENTENCE_END.split(turn)] + [p["question"] for p in sample["probes"]]
        sentences += [_stated(sample, fact) for fact in sample["facts"] if "span" in fact]
        for sentence in sentences:
            texts.setdefault((asks(sentence), flatten(sentence, lang)), sample["sample_id"])
    for (asked, text), sample_id in texts.items():
        report.expect(f"{lang} sentence or question fits no training template", not index[asked].fits(text),
                      f"{sample_id}: the training bank can say '{text}'")


def _check_names(samples, content, lang, bank, report):
    names = {fact[field] for sample in samples for fact in sample["facts"] for field in ("subject",) if field in fact}
    names |= {re.split("[:：]", line)[0] for sample in samples for line in sample["conversation"].split("\n")}
    names |= {entry.split("|")[LANGS.index(lang)] for kind in ("person", "project", "town", "street")
              for entry in content.words[kind]}
    for name in sorted(names):
        report.expect(f"{lang} name cannot come out of the training bank", not bank.can_draw_name(lang, name),
                      f"the training bank can draw the name '{name}' ({lang})")
