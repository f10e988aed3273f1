"""Does a scorer play fair? Rules that anybody's scorer can be held to, from outside.

A scorer is an object with

    vocabulary          how many tokens there are
    events(ids)         an iterator over what happens while a document is scored, in that order: objects with start and end, and where tokens were scored also
                        realised (log-probabilities [n], nats) and full() (the whole distributions [n, V]); without these two the event is an update
    state()             a digest of everything that scores depend on beside the tokens read: parameters, memories, counters

(scoring.py has three). The auditor takes the state itself, at every event, while the scorer is stopped there; a scorer whose state() lies is not found out by
that, but what it learned too early is by the rules that change tokens. The rules:

    causal          change token t and all after it: no distribution before t moves
    distribution    each is whole (sums to 1 over the vocabulary), the score is its entry at the token, and changing token t alone does not move it
    score_first     what is learned from has been scored before, and the state moves by announced updates alone
    single_pass     every token is scored once, from left to right
    restored        afterwards the state is what it was before, and the same document gets the same scores again
"""
from __future__ import annotations

import importlib
import random
from dataclasses import dataclass, field

import torch

from manifests import UserError

TOLERANCE = 1e-5  # nats; changed tokens behind a causal mask leave the arithmetic before them bit for bit as it is


@dataclass
class Trace:
    """One run of a scorer over a document: its log and, by position, its distributions and scores. A position scored again has the last of each."""

    log: list[tuple[str, int, int, str]] = field(default_factory=list)   # (score or update, start, end, state)
    full: dict[int, torch.Tensor] = field(default_factory=dict)
    realised: dict[int, float] = field(default_factory=dict)


@dataclass
class Finding:
    rule: str
    passed: bool
    says: str


def trace(scorer, ids: list[int], states: bool = False) -> Trace:
    """Run the scorer to the document's end."""
    found = Trace()
    for event in scorer.events(list(ids)):
        state = scorer.state() if states else ""
        if not hasattr(event, "realised"):
            found.log.append(("update", event.start, event.end, state))
            continue
        found.log.append(("score", event.start, event.end, state))
        for offset, row_V in enumerate(event.full().detach().cpu().float()):
            found.full[event.start + offset], found.realised[event.start + offset] = row_V, float(event.realised[offset])
    return found


def moved(first: Trace, second: Trace, positions) -> tuple[float, int | None]:
    """(the largest change of a distribution's entry or a score at these positions, where); infinite where one of the two has none."""
    most, where = 0.0, None
    for i in positions:
        if (i in first.full) != (i in second.full):
            return float("inf"), i
        if i in first.full:
            one, two = first.full[i], second.full[i]
            change = float("inf") if not (one.isfinite() == two.isfinite()).all() else (one - two)[one.isfinite()].abs().max().item()
            if change > most:
                most, where = change, i
    return most, where


def change(ids: list[int], t: int, vocabulary: int, draw: random.Random, tail: bool) -> list[int]:
    """The document with another token at t, and others after it too where the tail is to change."""
    other = lambda token: (token + draw.randrange(1, vocabulary)) % vocabulary
    return ids[:t] + [other(token) if tail or i == 0 else token for i, token in enumerate(ids[t:])]


def causal(scorer, ids: list[int], base: Trace, probes: list[int], tolerance: float) -> Finding:
    worst, at, token = 0.0, None, None
    for t in probes:
        other = trace(scorer, change(ids, t, scorer.vocabulary, random.Random(t), tail=True))
        found, where = moved(base, other, range(t))
        worst, at, token = (found, where, t) if found > worst else (worst, at, token)
    if worst <= tolerance:
        return Finding("causal", True, f"{len(probes)} documents changed from a token on: no distribution before it moves by more than {worst:.1e}")
    return Finding("causal", False, f"with token {token} and all after it changed, the distribution at {at} moves by {worst:.2g} nats")


def distribution(scorer, ids: list[int], base: Trace, probes: list[int], tolerance: float) -> Finding:
    whole = {i: (row_V.double().logsumexp(-1).abs().item(), abs(row_V[ids[i]].item() - base.realised[i])) for i, row_V in base.full.items()}
    for number, what in enumerate(("sums to a number that is not 1", "has another entry at the token than its score")):
        i = max(whole, key=lambda i: whole[i][number])
        if not whole[i][number] <= 1e-3:  # float32 over a large vocabulary; NaN fails
            return Finding("distribution", False, f"the distribution at {i} {what} (off by {whole[i][number]:.2g} nats)")
    wrong = next((i for i, row_V in base.full.items() if row_V.shape != (scorer.vocabulary,)), None)
    if wrong is not None:
        return Finding("distribution", False, f"the distribution at {wrong} has shape {tuple(base.full[wrong].shape)}, not {scorer.vocabulary} entries")
    found = {t: moved(base, trace(scorer, change(ids, t, scorer.vocabulary, random.Random(t), tail=False)), [t])[0] for t in probes}
    t = max(found, key=found.get)
    if found[t] > tolerance:
        return Finding("distribution", False, f"the distribution at {t} moves by {found[t]:.2g} nats when token {t} is another")
    return Finding("distribution", True, f"{len(whole)} distributions over {scorer.vocabulary} tokens sum to 1 and hold the scores; {len(probes)} tokens changed one by one: "
                                         f"their own distributions move by at most {found[t]:.1e}")


def score_first(base: Trace, before: str) -> Finding:
    """The log's order, and the states between its entries."""
    reached, state, updates, moves = 0, before, 0, 0
    for kind, start, end, now in base.log:
        if kind == "score":
            if now != state:
                return Finding("score_first", False, f"the state at the score of tokens {start} to {end - 1} is not that after the last update: something was learned in silence")
            reached = max(reached, end)
            continue
        if end > reached:
            return Finding("score_first", False, f"tokens {start} to {end - 1} were learned from when only those before {reached} had been scored")
        updates, moves, state = updates + 1, moves + (now != state), now
    return Finding("score_first", True, f"{updates} updates, each from scored tokens; {moves} of them moved the state, and nothing else did")


def single_pass(base: Trace, length: int) -> Finding:
    reached = 0
    for start, end in ((start, end) for kind, start, end, _ in base.log if kind == "score"):
        if start != reached:
            what = f"tokens from {start} on are scored again" if start < reached else f"tokens {reached} to {start - 1} are left out"
            return Finding("single_pass", False, what)
        reached = end
    if reached != length:
        return Finding("single_pass", False, f"{reached} of {length} tokens are scored")
    return Finding("single_pass", True, f"{length} tokens, each once, from left to right")


def restored(scorer, ids: list[int], base: Trace, before: str, after: str, tolerance: float) -> Finding:
    if before != after:
        return Finding("restored", False, "after the document the state is another than before it")
    found, where = moved(base, trace(scorer, ids), range(len(ids)))
    if found > tolerance:
        return Finding("restored", False, f"the same document again: the distribution at {where} is another by {found:.2g} nats")
    return Finding("restored", True, f"the state is as before, and the same document gets the same distributions again (to {found:.1e})")


def audit(scorer, ids: list[int], probes: list[int] | None = None, tolerance: float = TOLERANCE) -> list[Finding]:
    """Hold a scorer to the rules on a document; probes: the tokens that are changed (None: all). Runs it twice a probe, and twice more."""
    probes = list(range(len(ids))) if probes is None else probes
    before = scorer.state()
    base = trace(scorer, ids, states=True)
    after = scorer.state()
    once = single_pass(base, len(ids))
    if not base.full:
        return [once]
    return [causal(scorer, ids, base, probes, tolerance), distribution(scorer, ids, base, probes, tolerance), score_first(base, before), once,
            restored(scorer, ids, base, before, after, tolerance)]


def some_probes(length: int, most: int, step: int) -> list[int]:
    """At most so many tokens to change: the last, those at every step-th token and beside it (a scorer's own `step`, where it has one: so many tokens lie between two
    places where it may learn), and others in between; drawn where they are too many."""
    draw = random.Random(0)
    near = {i for border in range(0, length, step) for i in (border - 1, border, border + 1) if 0 <= i < length} | {length - 1}
    chosen = sorted(near) if len(near) <= most else draw.sample(sorted(near), most)
    rest = sorted(set(range(length)) - near)
    return sorted(chosen + draw.sample(rest, min(most - len(chosen), len(rest))))


def load_scorer(path: str):
    """The scorer that module:Class makes when it is called without arguments."""
    module, _, name = path.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--audit {path}: cannot be imported ({error}); write module:Class, the module on PYTHONPATH") from error
    scorer = made()
    missing = [part for part in ("vocabulary", "events", "state") if not hasattr(scorer, part)]
    if missing:
        raise UserError(f"--audit {path}: has no {', '.join(missing)}; scoring_audit.py says what a scorer is")
    return scorer


def verdict(findings: list[Finding]) -> str:
    return "\n".join(f"{'pass' if f.passed else 'FAIL'}  {f.rule:13s} {f.says}" for f in findings)
