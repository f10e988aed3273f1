"""The training bank's words: reading data/bank_<lang>.json, composing values and names, keeping train and dev apart.

The format of the file is described at the top of training_bank.py.
"""
import functools
import hashlib
import json
import re
import zlib
from pathlib import Path

DATA = Path(__file__).resolve().parent / "data"
SPLITS = ("train", "dev")
CATEGORIES = ("person", "numeric", "temporal", "relational", "preference", "spatial", "project")
FORM_FIELDS = ("statements", "first_person", "questions", "answers", "ask_owner", "pairs")
LISTS = ("openers", "small_talk", "acknowledgements", "closers", "connectors", "question_connectors",
         "answer_frames", "owner_answer_frames",
         "corrections", "late_corrections", "prose_intros")
INSTEAD = {"owner_answer_frames": "answer_frames"}  # lists that may be missing, and what serves for them
SLOT = re.compile(r"\{([^{}]+)\}")
SENTENCE_START = re.compile(r"(?:^|[.?!] )[a-z]")
HAS_WORDS = re.compile(r"\w")
TRIPLE = re.compile(r"(.)\1\1", re.IGNORECASE)
RANGE = re.compile(r"(\d+)\.\.(\d+)$")
HELD_OUT_FORMS = 0.15
HELD_OUT_WORDS = 10  # one in ten
LEAST_HELD_OUT = 5  # dev words of a list, so that dev conversations find different values
MAX_DRAWS = 2000


class BankError(ValueError):
    """A data file of the bank is missing or wrong; the message is one line."""


def read_json(path):
    """The parsed file; BankError if it is missing, not UTF-8 or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BankError(f"{path}: no such file; restore it from the repository") from None
    except ValueError as error:
        raise BankError(f"{path}: not UTF-8 JSON ({error}); mend or restore it") from None


def word_hash(word):
    """A number that is the same on every machine."""
    return zlib.crc32(word.encode("utf-8"))


def is_held_out(value):
    """Whether a value made of shared words alone belongs to dev."""
    return word_hash(value) % HELD_OUT_WORDS == 0


def held_out_words(kinds, shared):
    """The dev words of all kinds that are not shared: of each kind the ones with the least hashes.

    A word that stands in several kinds is settled by the first of them.
    """
    held, settled = set(), set()
    for kind, entries in kinds.items():
        words = [entry for entry in entries if "{" not in entry]
        if kind in shared:
            continue
        wanted = min(len(words) // 2, max(LEAST_HELD_OUT, round(len(words) / HELD_OUT_WORDS)))
        wanted -= sum(word in held for word in words)
        open_words = sorted((word for word in words if word not in settled), key=lambda word: (word_hash(word), word))
        held.update(open_words[:max(0, wanted)])
        settled.update(words)
    return held


def split_forms(forms, split):
    """The forms of one list that a split may use: 15% (at least one) are dev's.

    Chosen by hash, not by place, because the forms of different relations are alike in order. Forms without any
    word of their own ("", "{v}.") serve both splits.
    """
    worded = {form for form in forms if HAS_WORDS.search(SLOT.sub("", form))}
    worded = sorted(worded, key=lambda form: (word_hash(form), form))
    held = set(worded[:max(1, round(HELD_OUT_FORMS * len(worded)))])
    return [form for form in forms if form not in worded or (form in held) == (split == "dev")]


class Bank:
    """One language's bank. `draw` composes values; `forms` gives a relation's sentences for a split."""

    def __init__(self, path):
        self.path = path
        self.content = read_json(path)
        self._require(("relations", "kinds", "shared_kinds", "name_kinds", "never_names", "possessive",
                       "sentence_joiner", "speaker_colon", "capitalise", "article",
                       *(name for name in LISTS if name not in INSTEAD)))
        self.relations = self.content["relations"]
        self.never_names = frozenset(name.casefold() for name in self.content["never_names"])
        self._held_out = held_out_words(self.content["kinds"], set(self.content["shared_kinds"]))
        self.entries = {split: self._split_kinds(split) for split in SPLITS}
        self._check_references()
        self._trained = {form for r in self.relations for field in FORM_FIELDS
                         for form in split_forms(r.get(field, []), "train")}
        self._forms = {split: [self._split_relation(r, split) for r in self.relations] for split in SPLITS}
        self._lists = {split: {name: split_forms(self.content[name], split) for name in LISTS if name in self.content}
                       for split in SPLITS}
        article = self.content["article"]
        self._vowel = re.compile(article["vowel_pattern"], re.IGNORECASE) if article else None
        self._capital = self.content["capitalise"]
        self._name_pattern = None

    def _require(self, fields):
        missing = [field for field in fields if field not in self.content]
        if missing:
            raise BankError(f"{self.path}: field {missing[0]!r} is missing; see the format in training_bank.py")

    def _split_kinds(self, split):
        shared, dev = set(self.content["shared_kinds"]), split == "dev"
        return {kind: [e for e in entries if "{" in e or kind in shared or (e in self._held_out) == dev]
                for kind, entries in self.content["kinds"].items()}

    def _split_relation(self, relation, split):
        """The relation with the forms of one split; what another relation trains on ("it's {v}.") is not dev."""
        fields = {field: split_forms(relation.get(field, []), split) for field in FORM_FIELDS}
        if split == "dev":
            fields = {field: [form for form in forms if form not in self._trained] for field, forms in fields.items()}
            if not (fields["statements"] and fields["questions"]):
                raise BankError(f"{self.path}: relation {relation['id']!r}: its dev statement or question stands in "
                                "another relation too; reword it")
        return {**relation, **fields}

    def _check_references(self):
        for kind, entries in self.content["kinds"].items():
            for inner in (name for entry in entries for name in SLOT.findall(entry)):
                if not RANGE.match(inner) and inner not in self.content["kinds"]:
                    raise BankError(f"{self.path}: kinds.{kind} uses {{{inner}}}, which is no kind; "
                                    "add it or correct the name")
            for split in SPLITS:
                if not self.entries[split][kind]:
                    raise BankError(f"{self.path}: kinds.{kind} has no {split} words; add words or list it in shared_kinds")
        for relation in self.relations:
            self._check_relation(relation)

    def _check_relation(self, relation):
        where = f"{self.path}: relation {relation.get('id')!r}"
        for field in ("id", "category", "subject", "value", "statements", "first_person", "questions"):
            if field not in relation:
                raise BankError(f"{where} lacks the field {field!r}; add it")
        if relation["category"] not in CATEGORIES:
            raise BankError(f"{where}: unknown category {relation['category']!r}; use one of {', '.join(CATEGORIES)}")
        for field in ("subject", "value"):
            if relation[field] not in self.content["kinds"]:
                raise BankError(f"{where}: {field} {relation[field]!r} is no kind; add it to kinds")
        phrases = relation.get("as_subject", [])
        if phrases and self.content["possessive"] and not any(phrase.startswith("{s}") for phrase in phrases):
            raise BankError(f"{where}: no as_subject phrase starts with {{s}}, and some questions take no other; add one")
        for field in FORM_FIELDS:
            forms = relation.get(field, [])
            if len(forms) == 1 or (not forms and field in ("statements", "questions")):
                raise BankError(f"{where}: {field} needs at least two forms, one for train and one for dev")

    def forms(self, split):
        """All relations, each with only the forms that `split` may use."""
        return self._forms[split]

    def phrases(self, name, split):
        """One of the lists of turns and connectors, the part that `split` may use."""
        if name not in self.content:
            name = INSTEAD[name]
        return self._lists[split][name]

    def draw(self, kind, split, rng):
        """A value of this kind that belongs to `split`; BankError where the kind has none."""
        for _ in range(MAX_DRAWS):
            text, decided = self._expand(kind, split, rng)
            if (decided or is_held_out(text) == (split == "dev")) and not self._is_bad_name(kind, text):
                return text
        raise BankError(f"{self.path}: kinds.{kind} gives no {split} value; add entries")

    def _is_bad_name(self, kind, text):
        if kind not in self.content["name_kinds"]:
            return False
        return TRIPLE.search(text) is not None or any(w.casefold() in self.never_names for w in text.split())

    def _expand(self, kind, split, rng):
        """(text, decided): decided says that a word of a split kind is in it, which settles the split."""
        bounds = RANGE.match(kind)
        if bounds:
            return str(rng.randint(int(bounds[1]), int(bounds[2]))).zfill(len(bounds[1])), False
        entry = rng.choice(self.entries[split][kind])
        if "{" not in entry:
            return entry, kind not in self.content["shared_kinds"]
        decided = []

        def fill(match):
            text, settles = self._expand(match[1], split, rng)
            decided.append(settles)
            return text
        return SLOT.sub(fill, entry), any(decided)

    def fill(self, template, **slots):
        """The template with its slots filled; `{a v}` gives the value its indefinite article."""
        def one(match):
            name = match[1]
            if name.startswith("a "):
                return self._with_article(slots[name[2:]])
            return slots[name]
        return SLOT.sub(one, template)

    def state(self, fact):
        """The fact in one plain sentence: its relation's first form, with the owner named."""
        return self.sentence(self.fill(fact.relation["statements"][0], s=fact.subject, v=fact.value))

    def _with_article(self, value):
        article = self.content["article"]
        return f"{article['vowel' if self._vowel.match(value) else 'plain']} {value}"

    def sentence(self, text):
        """The text with the first letter of each sentence raised, where the language does so."""
        return SENTENCE_START.sub(lambda match: match[0].upper(), text) if self._capital else text

    def can_draw_name(self, name):
        """Whether some draw of a name kind could be exactly this name, letter case aside."""
        if any(word.casefold() in self.never_names for word in name.split()):
            return False
        if self._name_pattern is None:
            kinds = "|".join(self._as_pattern(kind) for kind in self.content["name_kinds"])
            self._name_pattern = re.compile(kinds, re.IGNORECASE)
        return self._name_pattern.fullmatch(name) is not None

    def _as_pattern(self, kind):
        if RANGE.match(kind):
            return r"\d+"
        return "(?:" + "|".join(self._entry_pattern(e) for e in dict.fromkeys(self.content["kinds"][kind])) + ")"

    def _entry_pattern(self, entry):
        parts = SLOT.split(entry)  # literal, kind, literal, kind, ...
        return "".join(self._as_pattern(p) if i % 2 else re.escape(p) for i, p in enumerate(parts))


@functools.lru_cache(maxsize=None)
def load_bank(lang):
    """The Bank of a language, read once."""
    return Bank(DATA / f"bank_{lang}.json")


@functools.lru_cache(maxsize=None)
def load_passages(lang):
    """Filler prose of a language, list of str; BankError if there is none."""
    path = DATA / "bank_passages.json"
    texts = read_json(path).get(lang)
    if not texts:
        raise BankError(f"{path}: no passages for {lang!r}; add a list under that key")
    return texts


def hash_files(paths):
    """SHA-256 over the bytes of the files, in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
