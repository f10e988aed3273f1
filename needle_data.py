"""Long texts for the recall objective: keys and values hidden in noise, in other needles, in prose, or a list of pairs, in the words of RULER's needles and
of associative recall (long_ruler.py), drawn anew for every row and none of the tasks' own items.

An arm that is trained on them knows the form of those tasks (`--data needles`; manifests say so), of which counting words (cwe, fwe) and tracking variables (vt)
are not a part.
"""
from __future__ import annotations

import functools
import hashlib
import random
from dataclasses import replace
from pathlib import Path

import prompts
import training_bank
from long_items import Candidate, Parts, fit
from long_ruler import DRAWS, NEEDLE, NOISE, PAIR_QUESTION, PAIRS, Needles, asking, fresh, sentences, words
from manifests import file_sha256
from training_data import COMMA, BankDataset, Example

LANG = "en"            # of all these texts; the dataset's languages are those of the prose
HAYSTACKS = ("noise", "needle", "prose", "pairs")
MOST_KEYS = 8          # in noise and prose
MOST = 4               # values of a key, or keys in a question
NEEDLE_TOKENS = 50     # that a needle and the text around it take, at least
LENGTH = 1024          # tokens of the longest text; the shortest has a quarter


def needles_sha256() -> str:
    """SHA-256 of what these texts are drawn from, and how."""
    drawn = file_sha256(Path(__file__).parent / "data" / "long_words.json") + file_sha256(__file__)
    return hashlib.sha256((training_bank.bank_sha256() + drawn).encode()).hexdigest()


def needle_text(spec: Needles, units: int, rng: random.Random) -> dict:
    """A text with its facts and questions, in the form of training_bank.sample_conversation.

    spec: as of the tasks, with a haystack of HAYSTACKS and in (needle, pairs) all that can be asked in place of keys. Questions ask one key; where spec.asked
    is more, as many again ask for so many. units: lines of noise, sentences of prose, or needles or pairs.
    """
    if spec.haystack == "pairs":
        chosen = rng.sample(words()["listed"], 2 * units)
        entries, head, line = list(zip(chosen[::2], chosen[1::2])), PAIRS, "{key}: {value}"
    else:
        taken: set[str] = set()
        draw_key, draw_value = functools.partial(DRAWS[spec.key], rng), functools.partial(DRAWS[spec.value], rng)
        named = [fresh(draw_key, taken) for _ in range(units if spec.haystack == "needle" else spec.keys)]
        entries = [(key, draw_value()) for key in named for _ in range(spec.values)]
        head, line = asking(spec.value, [""], spec.asked * spec.values)[0], NEEDLE.replace("{kind}", spec.value)
    between = " " if spec.haystack == "prose" else "\n"
    if spec.haystack == "prose":
        text = " ".join(rng.sample(training_bank.passages(LANG), min(len(training_bank.passages(LANG)), 1 + units // 4)))
        pieces = sentences(text)[:units]
    else:
        pieces = [NOISE] * units if spec.haystack == "noise" else []
    pieces = [(piece, None) for piece in pieces]
    for number, (key, value) in enumerate(entries):
        pieces.insert(rng.randint(0, len(pieces)), (line.format(key=key, value=value), number))
    begun, spans = len(head), {}
    for piece, number in pieces:
        spans[number] = [begun, begun + len(piece)]
        begun += len(piece) + len(between)
    by_key: dict[str, list[int]] = {}  # a key's values in the order of the text
    for number in sorted(range(len(entries)), key=spans.get):
        by_key.setdefault(entries[number][0], []).append(number)
    asked = [[key] for key in by_key] + [rng.sample(list(by_key), spec.asked) for _ in by_key if spec.asked > 1]
    return {"conversation": head + between.join(piece for piece, _ in pieces), "facts": [{"fact_id": number, "span": spans[number]} for number in range(len(entries))],
            "probes": [probe(spec, keys, [(number, entries[number][1]) for key in keys for number in by_key[key]]) for keys in asked]}


def probe(spec: Needles, keys: list[str], told: list[tuple[int, str]]) -> dict:
    """A question about these keys, which these facts answer."""
    facts, values = zip(*told)
    question = PAIR_QUESTION.format(key=keys[0]) if spec.haystack == "pairs" else asking(spec.value, keys, len(values))[1]
    return {"question": question, "gold_answer": COMMA.join(values), "values": list(values), "required_facts": list(facts)}


class NeedleDataset(BankDataset):
    """Item u: a Batch like BankDataset's, whose written texts are needle_text's of a quarter to all of `length` tokens. Prose that is read with a memory
    attached is the bank's; questions about texts that nobody wrote are about other such texts."""

    def example(self, rng: random.Random, lang: str, *how) -> Example:
        return super().example(rng, LANG, *how)

    def draw(self, rng: random.Random, lang: str, prose, topics, facts: int | None) -> dict:
        return self.sized(rng, rng.randint(self.length // 4, self.length) if facts is None else self.length // 4)

    def prompt(self, lang: str, shown: bool):
        return prompts.start_ids(self.tokenizer), lambda question: prompts.encode(self.tokenizer, question)

    def sized(self, rng: random.Random, tokens: int) -> dict:
        """A text of a drawn kind, as long as fits into so many tokens."""
        haystack, value = rng.choice(HAYSTACKS), rng.choice(list(DRAWS))
        spec = Needles(haystack, "uuids" if value == "uuids" and rng.random() < 0.5 else "words", value)
        if haystack in ("noise", "prose"):
            keys, form = rng.randint(1, max(1, min(MOST_KEYS, tokens // NEEDLE_TOKENS))), rng.choice(("single", "values", "asked"))
            if form == "values":
                keys, spec = max(1, keys // MOST), replace(spec, values=rng.randint(2, MOST))
            elif form == "asked" and keys > 1:
                spec = replace(spec, asked=rng.randint(2, min(MOST, keys)))
            spec = replace(spec, keys=keys)
        state = rng.getrandbits(64)
        make = lambda units: needle_text(spec, units, random.Random(state))
        text = Candidate(lambda units: Parts(make(units)["conversation"], "", ()), 1, len(words()["listed"]) // 2, "")
        while (fitted := fit(text, self.tokenizer, tokens)) is None and spec.keys * spec.values > 1:  # too many for so short a text
            spec = replace(spec, keys=1, asked=1, values=1 if spec.keys == 1 else spec.values)
        return make(fitted.units if fitted else 1)
