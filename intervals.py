"""How sure a score is: bootstrap over conversations, ratios of paired scores, McNemar's exact test.

A row is one scored probe: a dict with sample_id, probe_id, seed and em (0.0 or 1.0), and name_or_code where that is known. The probes of one
conversation stand or fall together, so the conversation is what is resampled; training seeds are replicates
of a conversation and never count as further conversations.
"""
import warnings
from dataclasses import dataclass
from typing import Callable

import numpy as np
from scipy import stats

from results_files import MEMORYLESS

CONFIDENCE = 0.95
CEILINGS = ("A_context", "A_tuned")


@dataclass(frozen=True)
class Bootstrap:
    resamples: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Ratio:
    """A number made of several conditions' EM; `em` maps the condition to its EM (a float or an array)."""
    needed: tuple            # every one of these conditions must have run
    any_of: tuple            # and at least one of these, where any are named
    levels: tuple
    numerator: Callable      # em -> array
    denominator: Callable    # em -> array
    only: Callable = lambda row: True  # the rows that count
    least: int = 0           # fewer probes than these say nothing and are left out


def ceiling(em):
    """The better of the two readings of the text in context, as far as they ran."""
    return np.maximum.reduce([em[name] for name in CEILINGS if name in em])


def one(em):
    return np.ones_like(next(iter(em.values())))


RATIOS = {
    "memory_efficiency_ratio": Ratio(("B_memory",), CEILINGS, (1, 2, 3), lambda em: em["B_memory"], ceiling),
    "ratio_vs_A_context": Ratio(("B_memory", "A_context"), (), (1, 2, 3),
                                lambda em: em["B_memory"], lambda em: em["A_context"]),
    "lift_over_no_memory": Ratio(("B_memory", "C_nothing"), (), (1, 2, 3),
                                 lambda em: em["B_memory"] - em["C_nothing"], one),
    "distractor_decay": Ratio(("B_memory", "D_distractor"), (), (3,),
                              lambda em: em["D_distractor"] - em["B_memory"], lambda em: em["B_memory"]),
    "merged_4_ratio": Ratio(("B_memory", "B_merged_4"), (), (1,),
                            lambda em: em["B_merged_4"], lambda em: em["B_memory"]),
    "names_and_codes_ratio": Ratio(("B_memory",), CEILINGS, (1, 3), lambda em: em["B_memory"], ceiling, lambda row: row.get("name_or_code", False),
                                   least=20),
    "swapped_lift": Ratio(("B_swapped", "C_nothing"), (), (1, 2, 3), lambda em: em["B_swapped"] - em["C_nothing"], one),
    "foreign_cost": Ratio(("A_foreign", "A_context"), (), (1, 2, 3), lambda em: em["A_foreign"] - em["A_context"], one),
}
POOLED = ("swapped_lift", "foreign_cost")  # also told over the probes of all levels
PAIRS = (("B_memory", "C_nothing"), ("B_memory", "B_swapped"), ("D_distractor", "B_memory"), ("A_context", "B_memory"), ("A_foreign", "A_context"))


def probe_key(row):
    return row["sample_id"], row["probe_id"]


def sums_per_sample(rows, samples):
    """Correct answers and answers of each sample, over its probes and seeds: two float arrays (S,)."""
    place = {sample: index for index, sample in enumerate(samples)}
    where = np.array([place[row["sample_id"]] for row in rows], dtype=int)
    correct = np.bincount(where, weights=[row["em"] for row in rows], minlength=len(samples))
    return correct, np.bincount(where, minlength=len(samples)).astype(float)


def pooled(correct, count, axis=-1):
    """EM over all answers: a ratio of sums, so that a conversation with more probes weighs more."""
    return correct.sum(axis=axis) / count.sum(axis=axis)


def interval(statistic, columns, settings):
    """95% bootstrap interval [low, high] of statistic(*columns, axis).

    columns: arrays (S,), one value a sample, resampled together. BCa; where it is undefined (all samples score
    alike) the percentile interval. None with fewer than two samples or where a resample has no finite value.
    """
    if len(columns[0]) < 2:
        return None
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # scipy warns of degenerate data; the fallback below is the answer to it
        result = stats.bootstrap(columns, statistic, paired=True, vectorized=True, method="BCa",
                                 confidence_level=CONFIDENCE, n_resamples=settings.resamples,
                                 rng=np.random.default_rng(settings.seed))
    if not np.isfinite(result.bootstrap_distribution).all():
        return None
    ends = [float(result.confidence_interval.low), float(result.confidence_interval.high)]
    if not np.isfinite(ends).all():
        tail = 50 * (1 - CONFIDENCE)
        ends = [float(end) for end in np.percentile(result.bootstrap_distribution, [tail, 100 - tail])]
    return ends


def em_interval(rows, settings):
    """95% interval of the EM of rows, over samples; None with fewer than two samples."""
    samples = sorted({row["sample_id"] for row in rows})
    return interval(pooled, sums_per_sample(rows, samples), settings)


def of_shared_seeds(by_condition):
    """({condition: its rows of the seeds that every condition ran on}, those seeds, whether a condition ran on others too): seeds differ, so only
    whole ones compare."""
    seeds = {name: {row["seed"] for row in rows} for name, rows in by_condition.items()}
    shared = set.intersection(*seeds.values()) if seeds else set()
    kept = {name: [row for row in rows if row["seed"] in shared] for name, rows in by_condition.items()}
    return kept, shared, any(found - shared for found in seeds.values())


def ratio_cell(ratio, by_condition, settings):
    """One ratio on the probes that all its conditions answered; by_condition maps a condition to its rows.

    Returns {"value", "ci", "n", "samples"}, a "note" where something is undefined or left out, and for the ratio to the
    ceiling which reading was the "denominator" and "A_tuned_run"; None where a condition it needs did not run
    or too few probes count.
    """
    by_condition = {name: [row for row in rows if ratio.only(row)] for name, rows in by_condition.items()}
    used = [name for name in ratio.needed + ratio.any_of if by_condition.get(name)]
    used = list(dict.fromkeys(used))
    if not set(ratio.needed) <= set(used) or (ratio.any_of and not set(ratio.any_of) & set(used)):
        return None
    asked = [name for name in used if name not in MEMORYLESS]  # what a seed's own memory answered
    own, shared_seeds, dropped = of_shared_seeds({name: by_condition[name] for name in asked})
    by_condition |= own
    keys = {name: {probe_key(row) for row in by_condition[name]} for name in used}
    common = set.intersection(*keys.values())
    if len(common) < ratio.least:
        return None
    cell = {"value": None, "ci": None, "n": len(common), "samples": len({sample for sample, _ in common})}
    if ratio.any_of:
        cell |= {"denominator": None, "A_tuned_run": "A_tuned" in used}
    notes = [f"of seeds {', '.join(map(str, sorted(shared_seeds, key=str)))}, the only ones with {' and '.join(asked)}"] if dropped and common else []
    if any(len(found) > len(common) for found in keys.values()):
        notes.append(f"on the {len(common)} probes that {', '.join(used)} share")
    if common:
        shared = {name: [row for row in by_condition[name] if probe_key(row) in common] for name in used}
        notes += fill_ratio(cell, ratio, shared, settings)
    return cell | ({"note": "; ".join(notes)} if notes else {})


def fill_ratio(cell, ratio, shared, settings):
    """Put value and interval into the cell; returns notes on what is undefined."""
    samples = sorted({row["sample_id"] for rows in shared.values() for row in rows})
    columns = [column for rows in shared.values() for column in sums_per_sample(rows, samples)]

    def em_of(sums, axis=-1):
        return {name: pooled(sums[2 * i], sums[2 * i + 1], axis) for i, name in enumerate(shared)}

    def statistic(*sums, axis=-1):
        em = em_of(sums, axis)
        bottom = np.asarray(ratio.denominator(em), dtype=float)
        return np.where(bottom == 0, np.nan, ratio.numerator(em) / np.where(bottom == 0, 1.0, bottom))

    if ratio.any_of:
        cell["denominator"] = max((name for name in ratio.any_of if name in shared), key=em_of(columns).get)
    value = float(statistic(*columns))
    if np.isnan(value):
        return ["the denominator is 0"]
    cell["value"], cell["ci"] = value, interval(statistic, columns, settings)
    if cell["ci"] is None:
        return ["no interval: fewer than two samples" if len(samples) < 2
                else "no interval: the denominator is 0 in some resamples"]
    return []


def mcnemar(first, second):
    """McNemar's exact test on the probes both rows answered, seed by seed; None where they share no seed.

    Returns {"p", "n", "by_seed": {SEED: {"n", "first_only", "second_only", "p"}}}; p is the largest over the seeds,
    because seeds repeat the same probes and pooling them would count each probe several times.
    """
    by_seed = {}
    for seed in sorted({row["seed"] for row in first} & {row["seed"] for row in second}, key=str):
        left = {probe_key(row): row["em"] for row in first if row["seed"] == seed}
        right = {probe_key(row): row["em"] for row in second if row["seed"] == seed}
        both = sorted(left.keys() & right.keys())
        if not both:
            continue
        first_only = sum(left[key] > right[key] for key in both)
        second_only = sum(left[key] < right[key] for key in both)
        p = stats.binomtest(first_only, first_only + second_only).pvalue if first_only + second_only else 1.0
        by_seed[str(seed)] = {"n": len(both), "first_only": first_only, "second_only": second_only, "p": float(p)}
    if not by_seed:
        return None
    return {"p": max(cell["p"] for cell in by_seed.values()), "n": sum(cell["n"] for cell in by_seed.values()),
            "by_seed": by_seed}
