"""Conversations of the test benchmark: from the skeletons in data/ to text with the span of every fact.

Content is what is written by hand, a Plan is what one conversation tells (the same in both languages), render puts
it into words.

A skeleton is a list of blocks, a block a few turns in both languages. In a turn "B: <C.start_time>[{C} is in from {v}|
{C} comes at {v}]</>." the speaker is the role B; <subject role.attribute>...</> is the stretch that states a fact,
<E.mentor=C> one whose value is the person in role C; {C} is a name, {v} the value ({a v} with its article); of
[x|y] one is said (in an opening, closing or chat block the same one of each). The free roles of topic blocks, which
serve many skeletons: K asks, L answers, X and Y are spoken of.

data/skeletons_attributes.json tells for each attribute its category, the kind of its value (a word list of
data/skeletons_words.json, or one that benchmark_values composes), and per language: "fact" (the plain sentence),
"questions", "answers" (forms of the answer that are accepted too) and, where the value is somebody whose attributes can
be asked for, "as_subject"; "compare" asks for the lowest or highest of two. {s} is the subject.
"""
import functools
import json
import re
from pathlib import Path

from benchmark_file import LANGS, BenchmarkError
from benchmark_values import draw_value, listed

DATA = Path(__file__).resolve().parent / "data"
PEOPLE, PROJECTS = "ABCDEFGS", "PQ"  # roles: A and B speak, S is a third speaker, the other people are spoken of
FACT_COUNT = (5, 10)
TOKEN = re.compile(r"<(?P<subject>[A-Z])\.(?P<attribute>\w+)(?:=(?P<target>[A-Z]))?>|(?P<end></>)"
                   r"|\{(?P<article>a )?(?P<slot>[A-Zv])\}")
ALTERNATIVES = re.compile(r"\[([^\]]*)\]")
ROLE = re.compile(r"(?<=[<={])[KLXY](?=[.}>])|^[KLXY](?=: )")  # the free roles of a topic block
STARTS_LIKE_A_CONSONANT = re.compile(r"(ukul|util|uni|eu|one)", re.IGNORECASE)
COLON = {"en": ": ", "zh": "："}
JOINER = {"en": " ", "zh": ""}  # between two turns of one speaker


class Content:
    """Everything that is written by hand: skeletons, topic blocks, attributes, word lists, passages."""

    def __init__(self, folder=DATA):
        self.words = _read(folder / "skeletons_words.json")
        self.attributes = _read(folder / "skeletons_attributes.json")
        self.topics = _read(folder / "skeletons_topics.json")
        self.scenes = [scene for path in sorted(folder.glob("skeletons_scenes_*.json")) for scene in _read(path)]
        self.passages = {lang: [p["text"] for p in texts] for lang, texts in _read(folder / "passages.json").items()}


def _read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BenchmarkError(f"{path}: no such file; it belongs to the repository, restore it") from None
    except ValueError as error:
        raise BenchmarkError(f"{path}: not JSON ({error}); restore it from the repository") from None


@functools.cache
def person_names():
    """The names that people may have in the benchmark, in both languages."""
    return frozenset(name for pair in _read(DATA / "skeletons_words.json")["person"] for name in pair.split("|"))


# --- plan: what a conversation tells, the same in both languages ----------------------------------------------

class Plan:
    """One conversation before it is put into words: its blocks in order, names and values."""

    def __init__(self, content, scene, level, rng):
        self.content, self.scene, self.level, self.rng = content, scene, level, rng
        people = rng.sample(content.words["person"], len(PEOPLE))
        projects = rng.sample(content.words["project"], len(PROJECTS))
        self.names = {role: listed(entry) for role, entry in zip(PEOPLE + PROJECTS, people + projects)}
        self.blocks = self._choose_blocks()
        self.keys = [key for block in self.blocks for key in facts_of(block)]
        self.values = self._draw_values()

    def _choose_blocks(self):
        rng, scene = self.rng, self.scene
        bridges = rng.sample(scene["bridge"], 2 if self.level == 2 else rng.randint(1, 2))
        pairs = rng.sample(scene["pair"], rng.randint(1, 2))
        topics = [self._bind(block) for block in self._choose_topics(2 if self.level == 2 and len(pairs) < 2 else
                                                                     rng.choice((0, 1, 1)))]
        solos = rng.sample(scene["solo"], rng.randint(0, 1))
        chat = [self._link(block) for block in rng.sample(scene["chat"], rng.randint(0, 1))]
        body = bridges + pairs + topics + solos + chat
        rng.shuffle(body)
        return [self._link(rng.choice(scene["open"])), *body, self._link(rng.choice(scene["close"]))]

    def _link(self, block):
        """The block with one number that picks all its alternatives: small talk whose answer fits the question."""
        return {**block, "draw": self.rng.randrange(6)}

    def _choose_topics(self, count):
        names = self.rng.sample(self.scene["topics"], count)
        blocks = [[block for block in self.content.topics if block["topic"] == name] for name in names]
        return [self.rng.choices(forms, [1 + 2 * ("<L." in block["en"][1]) for block in forms])[0] for forms in blocks]

    def _bind(self, block):
        """The topic block with its free roles replaced: K asks, L answers, X and Y are spoken of."""
        speakers, spoken_of = self.rng.sample("AB", 2), self.rng.sample("CD", 2)
        roles = dict(zip("KLXY", speakers + spoken_of))
        return {lang: [ROLE.sub(lambda m: roles[m.group()], turn) for turn in block[lang]] for lang in LANGS}

    def _draw_values(self):
        """{(subject role, attribute): value}, no two values of a conversation alike in either language."""
        values, taken = {}, set()
        for key in self.keys:
            subject, attribute, target = key
            value = self.names[target] if target else None
            while value is None or (not target and taken & _forms(value)):
                value = draw_value(self.rng, self.content.attributes[attribute], self.content.words)
            taken |= _forms(value)
            values[subject, attribute] = value
        return values

    def is_sound(self):
        """The number of facts fits and no two facts tell the same attribute of the same subject."""
        return FACT_COUNT[0] <= len(self.keys) <= FACT_COUNT[1] and len(self.values) == len(self.keys)

    def subject(self, role, lang):
        """The subject as a noun phrase for questions: a name, or "the Heron project"."""
        name = self.names[role][lang]["said"]
        if role not in PROJECTS:
            return name
        return f"the {name} project" if lang == "en" else f"“{name}”项目"


def _forms(value):
    return {(lang, value[lang]["said"].lower()) for lang in LANGS}


def facts_of(block):
    """[(subject role, attribute, role of the value or None)] in the order of the English text."""
    tags = [match for turn in block["en"] for match in TOKEN.finditer(turn) if match["subject"]]
    return [(tag["subject"], tag["attribute"], tag["target"]) for tag in tags]


# --- words: a plan in one language ----------------------------------------------------------------------------

def render(plan, lang, rng):
    """(conversation, {(subject role, attribute): [start, end]}); alternatives [x|y] are drawn from rng.

    Turns of one speaker that follow each other become one line.
    """
    text, spans, speaker = "", {}, None
    for block in plan.blocks:
        for turn in block[lang]:
            if turn[0] == speaker:
                text += JOINER[lang]
            else:
                text += ("\n" if text else "") + plan.names[turn[0]][lang]["said"] + COLON[lang]
            speaker = turn[0]
            said, found = _fill(plan, lang, _choose(turn[3:], block.get("draw"), rng))
            spans.update({key: [len(text) + start, len(text) + end] for key, (start, end) in found.items()})
            text += said
    return text, spans


def _choose(template, draw, rng):
    """The template with one of each group of alternatives: the draw's, or any where there is no draw."""
    return ALTERNATIVES.sub(lambda m: pick(m[1].split("|"), rng.randrange(1000) if draw is None else draw), template)


def _fill(plan, lang, template):
    """One turn with names and values in place of the slots; returns it and the spans of its facts."""
    text, spans, place, open_fact = "", {}, 0, None
    for match in TOKEN.finditer(template):
        text += template[place:match.start()]
        place = match.end()
        if match["subject"]:
            open_fact = (match["subject"], match["attribute"])
            begin = len(text)
        elif match["end"]:
            spans[open_fact] = (begin, len(text))
        else:
            value = plan.values[open_fact] if match["slot"] == "v" else plan.names[match["slot"]]
            text += (article(value["en"]["said"]) if match["article"] else "") + value[lang]["said"]
    text += template[place:]
    if lang == "en":  # the same length, so the spans stay
        text = re.sub(r"(?:^|(?<=[.?!] ))[a-z]", lambda m: m.group().upper(), text)
    return text, spans


def article(noun):
    """"a " or "an ", as the English noun wants it."""
    return "an " if noun[0].lower() in "aeiou" and not STARTS_LIKE_A_CONSONANT.match(noun) else "a "


def pick(options, draw):
    """The option that a drawn number stands for."""
    return options[draw % len(options)]
