"""Means, slopes and rank correlations with their intervals, of the short series that diagnose.py looks at.

An interval is a list [low, high] at 95%, or None where the series is too short or does not vary.
"""
from __future__ import annotations

import warnings

import numpy as np
from scipy import stats

from intervals import CONFIDENCE, Bootstrap, interval

LEAST = 3         # points of a slope or a correlation
LEAST_GROUPS = 6  # for an interval of a correlation


def mean_of(values) -> dict:
    """{"mean", "ci"} of values, NaN left out: bootstrap over the values (intervals.interval). mean is None of none."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if not len(values):
        return {"mean": None, "ci": None}
    return {"mean": float(values.mean()), "ci": interval(lambda v, axis=-1: v.mean(axis=axis), [values], Bootstrap()) if np.ptp(values) > 0 else None}


def slope_of(places, values) -> dict:
    """{"slope", "ci", "n"}: Theil and Sen's slope with Sen's interval (scipy.stats.theilslopes), NaN left out; slope None of fewer than LEAST points."""
    places, values = np.asarray(places, dtype=float), np.asarray(values, dtype=float)
    known = np.isfinite(values)
    if known.sum() < LEAST:
        return {"slope": None, "ci": None, "n": int(known.sum())}
    found = stats.theilslopes(values[known], places[known], alpha=CONFIDENCE)
    return {"slope": float(found.slope), "ci": [float(found.low_slope), float(found.high_slope)], "n": int(known.sum())}


def spearman(first, second) -> float | None:
    """Spearman's rank correlation of the pairs that are both finite; None of fewer than LEAST, or where one of the two does not vary."""
    pairs = np.column_stack([first, second]).astype(float)
    pairs = pairs[np.isfinite(pairs).all(1)]
    if len(pairs) < LEAST or (np.ptp(pairs, axis=0) == 0).any():
        return None
    return float(np.corrcoef(stats.rankdata(pairs, axis=0).T)[0, 1])  # stats.spearmanr also finds a p, which a bootstrap does not want


def rank_correlation(first, second, groups=None) -> dict:
    """{"rho", "ci", "n", "groups"}: Spearman's correlation of the pairs that are both finite, bootstrap over the groups (None: each pair its own).

    A resample in which one of the two does not vary shows no relation and counts as 0.
    """
    first, second = (np.asarray(values, dtype=float) for values in (first, second))
    groups = np.arange(len(first)) if groups is None else np.asarray(groups)
    known = np.isfinite(first) & np.isfinite(second)
    first, second, groups = first[known], second[known], groups[known]
    rows = [np.flatnonzero(groups == group) for group in dict.fromkeys(groups.tolist())]
    rho, ci = spearman(first, second), None
    if rho is not None and len(rows) >= LEAST_GROUPS:
        def of_one(picked):
            chosen = np.concatenate([rows[int(group)] for group in picked])
            return spearman(first[chosen], second[chosen]) or 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # all resamples alike: interval() answers that
            ci = interval(lambda picked, axis=-1: np.apply_along_axis(of_one, axis, picked), [np.arange(len(rows))], Bootstrap())
    return {"rho": rho, "ci": ci, "n": len(first), "groups": len(rows)}


def told(ci: list[float] | None, digits: int = 3) -> str:
    """An interval in words."""
    return "(no interval)" if ci is None else f"[{ci[0]:.{digits}f}, {ci[1]:.{digits}f}]"


def predicts(found: dict, sign: int) -> str:
    """Whether one predicts the other, by the side of 0 on which the whole interval of a rank correlation lies: yes on that of the sign."""
    if found["ci"] is None:
        return "cannot be said"
    low, high = sorted(sign * end for end in found["ci"])
    return "yes" if low > 0 else "the other way round" if high < 0 else "no"
