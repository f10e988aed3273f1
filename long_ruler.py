"""Synthetic long-text tasks, made as they are published: RULER's eleven (Hsieh et al. 2024, arXiv 2404.06654, section 3 and appendix B) and
multi-query associative recall in words (Arora et al. 2023, Zoology, arXiv 2312.04927, section 3).

Templates, haystacks, counts and limits are those of NVIDIA/RULER at commit c3f5e3b4f87f; given the same random state a text is the same,
character for character (tests/ruler_expected.json, written by tests/make_ruler_expected.py from that code). What differs:
- every item has a random state of its own and is sized by itself, where the published generator sizes once for all items;
- a key, variable or word that is already taken is drawn again;
- the solved example of vt is drawn for each item (published: one, its letters exchanged);
- essays are cut into sentences at . ! ? and white space (published: NLTK's punkt, which needs a download);
- the white space after an answer prefix is left out (as lm-eval and HELMET do): a base model's next token brings its own.
"""
from __future__ import annotations

import bisect
import functools
import itertools
import json
import math
import random
import re
import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from long_items import Candidate, Parts, fit
from manifests import UserError
from prompts import encode

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = [round(100 * i / 39) for i in range(40)]  # where an essay may hold a needle, in percent of its sentences
ORDER_SEED = 42                                    # RULER shuffles needles and words with a state of their own, always this one


@functools.cache
def words() -> dict[str, list[str]]:
    """nouns, adjectives, verbs of wonderwords 3.0.1 (MIT), and `listed`, what cwe draws from: all of them, in RULER's order."""
    lists = json.loads((Path(__file__).parent / "data" / "long_words.json").read_text(encoding="utf-8"))
    return lists | {"listed": in_order(sorted({word for kind in ("nouns", "adjectives", "verbs") for word in lists[kind]}))}


class Keys(Sequence):
    """What needles are named after: the sorted list of all adjective-noun, 6.2 million, of which no more than asked for is made."""

    def __init__(self, adjectives, nouns):
        self.nouns = sorted(set(nouns))
        self.groups = []  # adjectives whose names mix in the sorted list (blue-, blue-eyed-) are one group
        for stem in sorted({f"{adjective}-" for adjective in adjectives}):
            if self.groups and stem.startswith(self.groups[-1][0]):
                self.groups[-1].append(stem)
            else:
                self.groups.append([stem])
        self.ends = list(itertools.accumulate(len(self.group(group)) if len(group) > 1 else len(self.nouns) for group in self.groups))

    def group(self, stems) -> list[str]:
        return sorted({stem + noun for stem in stems for noun in self.nouns})

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, place):
        number = bisect.bisect(self.ends, place)
        within = place - (self.ends[number - 1] if number else 0)
        stems = self.groups[number]
        return stems[0] + self.nouns[within] if len(stems) == 1 else self.group(stems)[within]


@functools.cache
def keys() -> Keys:
    return Keys(words()["adjectives"], words()["nouns"])


def fresh(draw, taken: set) -> str:
    """A draw that is not taken yet; it is from now on."""
    while (value := draw()) in taken:
        pass
    taken.add(value)
    return value


def in_order(values: list) -> list:
    """Shuffled as RULER does: the same permutation for every list of one length."""
    random.Random(ORDER_SEED).shuffle(values)
    return values


# --- needles in a haystack -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Needles:
    """Appendix B, table 5: what is hidden, and in what."""

    haystack: str          # noise, needle (the haystack is distractor needles), essay
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1        # of each key
    asked: int = 1         # keys in the question


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key="uuids", value="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, asked=4),
}
DRAWS = {
    "numbers": lambda rng: str(rng.randint(1_000_000, 9_999_999)),
    "words": lambda rng: rng.choice(keys()),
    "uuids": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
}


def needles(spec: Needles, essay: list[str] | None, units: int, rng: random.Random) -> Parts:
    """units: lines of noise, distractor needles, or words of the essay (which begins again where it ends)."""
    taken, values, hidden = set(), {}, []
    draw_key, draw_value = functools.partial(DRAWS[spec.key], rng), functools.partial(DRAWS[spec.value], rng)
    for _ in range(spec.keys):
        key = fresh(draw_key, taken)
        values[key] = [draw_value() for _ in range(spec.values)]
        hidden += [NEEDLE.format(kind=spec.value, key=key, value=value) for value in values[key]]
    hidden = in_order(hidden)
    if spec.haystack == "essay":
        context = in_essay(hidden, essay, units, rng)
    else:
        if spec.haystack == "noise":
            lines = [NOISE] * units
        else:
            lines = [NEEDLE.format(kind=spec.value, key=fresh(draw_key, taken), value=draw_value()) for _ in range(units)]
        for place, line in zip(sorted(rng.sample(range(units), len(hidden)), reverse=True), hidden):
            lines.insert(place, line)
        context = "\n".join(lines)
    asked = rng.sample(list(values), spec.asked)
    head, question = asking(spec.value, asked, spec.asked * spec.values)
    return Parts(head + context, question, tuple(value for key in asked for value in values[key]))


def asking(kind: str, asked: list[str], values: int) -> tuple[str, str]:
    """(what stands before the text, the question behind it) where so many values of these keys are asked for."""
    query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    first, are, kind = ("A special magic {} is", "is", kind.removesuffix("s")) if values == 1 else ("Some special magic {} are", "are all", kind)
    return (f"{first.format(kind)} hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n",
            f"\nWhat {are} the special magic {kind} for {query} mentioned in the provided text?"
            f" The special magic {kind} for {query} mentioned in the provided text {are.removesuffix(' all')}")


def in_essay(hidden: list[str], essay: list[str], units: int, rng: random.Random) -> str:
    """The essay's first `units` words with each needle between two sentences, at one of 40 depths."""
    text = " ".join(itertools.islice(itertools.cycle(essay), units))
    parts = sentences(text)
    places = sorted(int(len(parts) * depth / 100) for depth in rng.sample(DEPTHS, len(hidden)))
    for place, needle in reversed(list(zip(places, hidden))):
        parts.insert(place, needle)
    return " ".join(parts)


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text)


def read_essays(path) -> list[str]:
    """The words of RULER's PaulGrahamEssays.json ({"text": ...}) or of a text file. UserError names what is wrong."""
    mend = "give PaulGrahamEssays.json as RULER's download_paulgraham_essay.py writes it, or a .txt"
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".json":
            text = json.loads(text)["text"]
        essay = text.split()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {mend}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: no UTF-8 JSON with a field 'text'; {mend}") from None
    if not essay:
        raise UserError(f"{path}: holds no words; {mend}")
    return essay


# --- variable tracking -----------------------------------------------------------------------------------------------

HOPS = 4           # one chain of five variables
EXAMPLE_ROOM, EXAMPLE_LINES = 500, 5  # the solved example: as many lines of noise as 500 tokens hold, and five at least


def tracking_text(noise: int, letters: int, rng: random.Random) -> Parts:
    """A chain VAR A = 12345, VAR B = VAR A, ... between lines of noise."""
    taken = set()
    names = [fresh(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), taken) for _ in range(HOPS + 1)]
    value = rng.randrange(10_000, 99_999)
    chain = [f"VAR {names[0]} = {value}"] + [f"VAR {name} = VAR {source} " for source, name in zip(names, names[1:])]
    lines = [NOISE] * noise
    for offset, place in enumerate(sorted(rng.sample(range(noise), len(chain)))):
        lines.insert(place + offset, chain[offset])
    return Parts("Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n" + "\n".join(lines),
                 f"\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of "
                 f"variable assignment in the text above, {HOPS + 1} variables are assigned the value {value}, they are:", tuple(names))


def tracking(example_lines: int, units: int, rng: random.Random) -> Parts:
    """A solved example (variables of three letters), then the text (five). units: lines of noise."""
    example = tracking_text(example_lines, 3, rng)
    text = tracking_text(units, 5, rng)
    return text._replace(document=f"{example.document}{example.question}  {' '.join(example.answers)}\n\n{text.document}")


# --- common and frequent words ---------------------------------------------------------------------------------------

COMMON = 10


def word_list(count: int, common_times: int, other_times: int, rng: random.Random) -> Parts:
    """A numbered list of `count` words, ten of which stand there more often."""
    chosen = rng.sample(words()["listed"], count)
    listed = in_order(chosen[:COMMON] * common_times + chosen[COMMON:] * other_times)
    return Parts("Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear "
                 f"most often.\n{numbered(listed)}", "\nQuestion: What are the 10 most common words in the above list? Answer: "
                 "The top 10 words that appear most often in the list are:", tuple(chosen[:COMMON]))


def numbered(values) -> str:
    return " ".join(f"{i}. {value}" for i, value in enumerate(values, 1))


def common_words(length: int, units: int, rng: random.Random) -> Parts:
    """A solved example, then the list. Below 4096 tokens words are fewer and repeated less (published so). units: different words."""
    example_sizes, times = ((20, 3, 1), (6, 1)) if length < 4096 else ((40, 10, 3), (30, 3))
    example, text = word_list(*example_sizes, rng), word_list(units, *times, rng)
    return text._replace(document=f"{example.document}{example.question} {numbered(example.answers)}\n{text.document}")


ALPHA, CODED_LETTERS = 2, 6
ZETA = math.pi ** 2 / 6  # Riemann's zeta at ALPHA
FEWEST_CODED = 80        # from here on the third of the asked words stands more often than the next


def frequent_words(vocabulary: int, units: int, rng: random.Random) -> Parts:
    """Coded words whose counts follow a Zeta law; the most frequent are dots, the next three are asked for. units: words before rounding."""
    taken = set()
    coded = sorted(fresh(lambda: "".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS)), taken) for _ in range(vocabulary))
    coded = ["..."] + in_order(coded)[1:]
    text = in_order([word for rank, word in enumerate(coded, 1) for _ in range(int(units * float(rank) ** -ALPHA / ZETA))])
    return Parts("Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
                 f"coded words. {' '.join(text)}", "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
                 "frequently appeared words in the above coded text? Answer: According to the coded text above, the three most frequently appeared words are:",
                 tuple(coded[1:4]))


# --- multi-query associative recall ------------------------------------------------------------------------------------

PAIRS, PAIR_QUESTION = "Each line holds a word and the word that belongs to it.\n", "\n\nWhich word belongs to {key}?\n{key}:"
QUERIES = 8           # questions about one document
RECALL_NEW_TOKENS = 8  # a value is one token in Zoology, a word here


def recall_pairs(query: int, units: int, rng: random.Random) -> Parts:
    """Pairs of a key and a value, no word twice, and the query-th of the asked keys. units: pairs.

    As in Zoology keys and values are disjoint and every query is scored by itself; here the pairs fill the text, and the queries are
    asked one by one after it, so that no query sees another's answer.
    """
    chosen = rng.sample(words()["listed"], 2 * units)
    pairs = list(zip(chosen[::2], chosen[1::2]))
    key, value = rng.sample(pairs, QUERIES)[query]
    lines = "\n".join(f"{left}: {right}" for left, right in pairs)
    return Parts(PAIRS + lines, PAIR_QUESTION.format(key=key), (value,))


# --- candidates --------------------------------------------------------------------------------------------------------

def states(name: str, length: int, seed: int):
    """For every index the function that makes its random state, anew at each size."""
    return (functools.partial(random.Random, f"{name} {length} {seed} {index}") for index in itertools.count())


def drawn(make, least: int, most: int | None, metric: str = "string_match_all"):
    """candidates(name, tokenizer, length, seed, source) of a task whose text is make(units, rng)."""
    def candidates(name, tokenizer, length, seed, source):
        for state in states(name, length, seed):
            yield Candidate(lambda units, state=state: make(units, state()), least, most, metric)
    return candidates


def needle_candidates(spec: Needles):
    def candidates(name, tokenizer, length, seed, source):
        essay = read_essays(source) if spec.haystack == "essay" else None
        least = 1 if spec.haystack == "essay" else spec.keys * spec.values
        return drawn(functools.partial(needles, spec, essay), least, None)(name, tokenizer, length, seed, source)
    return candidates


def tracking_candidates(name, tokenizer, length, seed, source):
    example = fit(Candidate(lambda lines: tracking_text(lines, 3, random.Random(ORDER_SEED)), EXAMPLE_LINES, None, ""), tokenizer, EXAMPLE_ROOM)
    lines = EXAMPLE_LINES if example is None else example.units
    return drawn(functools.partial(tracking, lines), HOPS + 1, None)(name, tokenizer, length, seed, source)


def common_candidates(name, tokenizer, length, seed, source):
    return drawn(functools.partial(common_words, length), COMMON + 1, len(words()["listed"]))(name, tokenizer, length, seed, source)


def frequent_candidates(name, tokenizer, length, seed, source):
    vocabulary = (length - 50) // 50  # 50 tokens are for the answer, and a word of the vocabulary comes with every 50 others
    if vocabulary < 5:
        raise UserError(f"{name}: length {length} is too short; take 300 or more")
    return drawn(functools.partial(frequent_words, vocabulary), FEWEST_CODED, None)(name, tokenizer, length, seed, source)


def recall_candidates(name, tokenizer, length, seed, source):
    """QUERIES candidates in a row share a document, which is sized with the longest of their questions."""
    most = len(words()["listed"]) // 2
    for state in states(name, length, seed):
        def longest(units, state=state):
            return max((recall_pairs(query, units, state()) for query in range(QUERIES)), key=lambda parts: len(encode(tokenizer, parts.question)))
        fitted = fit(Candidate(longest, QUERIES, most, ""), tokenizer, length - RECALL_NEW_TOKENS)
        pairs = QUERIES if fitted is None else fitted.units
        for query in range(QUERIES):
            yield Candidate(lambda units, state=state, query=query: recall_pairs(query, units, state()), pairs, pairs, "first_word")
