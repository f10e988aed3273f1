"""Long texts for the recall objective: keys and values hidden in noise, in other needles, in prose, or a list of pairs, in the words of RULER's needles and
of associative recall (long_ruler.py), drawn anew for every row and none of the tasks' own items.

An arm that is trained on them knows the form of those tasks (`--data needles`; manifests say so), of which counting words (cwe, fwe) and tracking variables (vt)
are not a part.
"""
from __future__ import annotations

import functools
import hashlib
import random
from pathlib import Path

import prompts
import training_bank
from long_items import Candidate, Parts, fit
from long_ruler import DRAWS, NEEDLE, NOISE, PAIR_QUESTION, PAIRS, asking, fresh, sentences, words
from manifests import file_sha256
from training_data import BankDataset, Example

LANG = "en"            # of all these texts; the dataset's languages are those of the prose
HAYSTACKS = ("noise", "needle", "prose", "pairs")
NEEDLES = 8            # in noise and prose, at most
NEEDLE_TOKENS = 50     # that a needle and the text around it take, at least
LENGTH = 1024          # tokens of the longest text; the shortest has a quarter


def needles_sha256() -> str:
    """SHA-256 of what these texts are drawn from."""
    return hashlib.sha256((training_bank.bank_sha256() + file_sha256(Path(__file__).parent / "data" / "long_words.json")).encode()).hexdigest()


def needle_text(haystack: str, key_kind: str, value_kind: str, count: int, units: int, rng: random.Random) -> dict:
    """A text with its facts and questions, in the form of training_bank.sample_conversation.

    haystack: see HAYSTACKS; the kinds: of long_ruler.DRAWS; count: needles in noise or prose; units: lines of noise, sentences of prose, or (needle, pairs)
    all that can be asked.
    """
    if haystack == "pairs":
        chosen = rng.sample(words()["listed"], 2 * units)
        entries, head, line, question = list(zip(chosen[::2], chosen[1::2])), PAIRS, "{key}: {value}", lambda key: PAIR_QUESTION.format(key=key)
    else:
        taken: set[str] = set()
        draw_key, draw_value = functools.partial(DRAWS[key_kind], rng), functools.partial(DRAWS[value_kind], rng)
        entries = [(fresh(draw_key, taken), draw_value()) for _ in range(units if haystack == "needle" else count)]
        head, line, question = asking(value_kind, [""], 1)[0], NEEDLE.replace("{kind}", value_kind), lambda key: asking(value_kind, [key], 1)[1]
    between = " " if haystack == "prose" else "\n"
    if haystack == "prose":
        text = " ".join(rng.sample(training_bank.passages(LANG), min(len(training_bank.passages(LANG)), 1 + units // 4)))
        pieces = sentences(text)[:units]
    else:
        pieces = [NOISE] * units if haystack == "noise" else []
    pieces = [(piece, None) for piece in pieces]
    for number, (key, value) in enumerate(entries):
        pieces.insert(rng.randint(0, len(pieces)), (line.format(key=key, value=value), number))
    begun, spans = len(head), {}
    for piece, number in pieces:
        spans[number] = [begun, begun + len(piece)]
        begun += len(piece) + len(between)
    return {"conversation": head + between.join(piece for piece, _ in pieces), "facts": [{"fact_id": number, "span": spans[number]} for number in range(len(entries))],
            "probes": [{"question": question(key), "gold_answer": value, "required_facts": [number]} for number, (key, value) in enumerate(entries)]}


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
        key, count, state = "uuids" if value == "uuids" and rng.random() < 0.5 else "words", rng.randint(1, max(1, min(NEEDLES, tokens // NEEDLE_TOKENS))), rng.getrandbits(64)
        make = lambda units: needle_text(haystack, key, value, count, units, random.Random(state))
        fitted = fit(Candidate(lambda units: Parts(make(units)["conversation"], "", ()), 1, len(words()["listed"]) // 2, ""), self.tokenizer, tokens)
        return make(fitted.units if fitted else 1)
