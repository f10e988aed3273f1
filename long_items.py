"""One item of a long-text task: a document that can be written and dropped, and a question that can be asked alone.

A task offers candidates; each builds its text at any size (units of haystack, examples, passages, turns), and `fit` finds the
largest that a budget of tokens holds.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, NamedTuple

from prompts import encode, written_ids


@dataclass(frozen=True)
class Item:
    """document + question is the whole prompt, and the answer follows it. tokens counts the prompt as the project tokenises it: the
    document with the tokenizer's start token, then the question by itself (prompts.py)."""

    task: str
    length: int               # tokens asked for, the answer's included
    document: str             # with the instruction that the published prompt begins with
    question: str             # what follows the document: query and answer prefix
    answers: tuple[str, ...]  # references; the metric says how they count
    metric: str               # a name in long_scores.METRICS
    new_tokens: int           # the published limit of generation
    tokens: int
    seed: int
    index: int


class Parts(NamedTuple):
    document: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """A text that can be had at several sizes: build(units) for least <= units <= most (None: no bound)."""

    build: Callable[[int], Parts]
    least: int
    most: int | None
    metric: str


def count_tokens(tokenizer, parts: Parts) -> int:
    return len(written_ids(tokenizer, parts.document)) + len(encode(tokenizer, parts.question))


class Fitted(NamedTuple):
    parts: Parts
    tokens: int
    units: int


PROPORTIONAL = 8  # sizes tried in proportion; what is not found by then, units of very unlike lengths, is bisected


def fit(candidate: Candidate, tokenizer, room: int) -> Fitted | None:
    """The candidate at the largest size whose prompt has at most `room` tokens; None where not even the least has.

    Sizes are tried in proportion to what the units took so far: to count the tokens of a long text is what an item costs. Texts of different sizes
    are drawn anew, so "largest" holds up to the spread of their lengths; the returned one is always counted.
    """
    def attempt(units):
        parts = candidate.build(units)
        return Fitted(parts, count_tokens(tokenizer, parts), units)

    best = attempt(candidate.least)
    if best.tokens > room:
        return None
    top = math.inf if candidate.most is None else candidate.most  # no larger size fits
    rate, tries = 0.0, 0                                          # tokens of a unit; sizes tried
    while best.units < top:
        if tries < PROPORTIONAL or top == math.inf:
            more = int((room - best.tokens) / rate) if rate > 0 else best.units  # units that took no tokens say nothing: twice as many
        else:
            more = int(top - best.units) // 2
        found = attempt(int(min(best.units + max(1, more), top)))
        rate, tries = (found.tokens - best.tokens) / (found.units - best.units), tries + 1
        if found.tokens <= room:
            best = found
        else:
            top = found.units - 1
    return best
