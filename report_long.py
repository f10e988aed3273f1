"""Score the runs of run_long.py: accuracy, gain over in_context, time and memory by mode and length; a report, two figures a model, a table.

    python report_long.py                       every results/long/*/run.json; rewrites the block "long-tasks" of RESULTS.md
    python report_long.py results/long/a --out /elsewhere

A base's in_context rows serve every run of the same weights, dtype and items that lacks them. Intervals are 95% bootstrap over items; a mean over
tasks weighs tasks alike and resamples the items of each; a gain is taken on the items that both modes answered. What a memory keeps of a text that is dropped is
its score over the better reader's of the same items: the base's in context, or that of a LoRA which learned to read such texts (in_context_tuned).
"""
from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator

import plots
from evaluate import write_text
from intervals import Bootstrap, interval
from long_modes import DROPPED
from long_tasks import is_retrieval
from manifests import write_json
from report_tables import around_block, with_interval
from results_files import LONG_RUN_FIELDS, ResultsError, check_sums, parse_object, read_lines, read_text
from run_long import MODES, TUNED

ROW_FIELDS = {"condition": (str,), "sample_id": (str,), "task": (str,), "length": (int,), "score": (float, int), "seconds": (float, int),
              "peak_gb": (float, int, type(None)), "batch": (int,)}
BLOCK = "long-tasks"
ALL, RETRIEVAL = "mean over tasks", "mean over retrieval"
ORDER = (MODES[0], TUNED, *MODES[1:])
STROKES = {TUNED: {"linestyle": "-."}, "ttt_empty": {"linestyle": ":"}, "ttt_paper": {"linestyle": "-"}, "ttt_strict": {"linestyle": "--", "markerfacecolor": "white"},
           "ttt_sharp": {"linestyle": ":", "markerfacecolor": "white"}}


# ---- what ran ----

def load(folder: Path, incomplete: bool = False) -> dict:
    """run.json with "rows": {mode: {item: row}}. incomplete: take a run that was not finished without the lengths that a mode has not answered whole."""
    mend = f"run run_long.py again into {folder}, or take the folder out"
    run = parse_object(read_text(folder / "run.json", mend), folder / "run.json", LONG_RUN_FIELDS, mend)
    if not run["complete"] and not incomplete:
        raise ResultsError(f"{folder / 'run.json'}: the run was not finished; finish it with run_long.py --resume, or pass --allow-incomplete to score what is whole")
    check_sums(folder, run)
    rows: dict[str, dict] = defaultdict(dict)
    for where, row in read_lines(folder / "predictions.jsonl", ROW_FIELDS, mend):
        if row["condition"] not in ORDER:
            raise ResultsError(f"{where}: field 'condition' is {row['condition']!r}, must be one of {', '.join(ORDER)}; {mend}")
        if row["sample_id"] in rows[row["condition"]]:
            raise ResultsError(f"{where}: {row['condition']} answers {row['sample_id']} a second time; {mend}")
        rows[row["condition"]][row["sample_id"]] = row
    cut = unfinished(run, rows)
    for mode, length in cut:
        rows[mode] = {item: row for item, row in rows[mode].items() if row["length"] != length}
    return run | {"name": folder.name, "rows": rows, "left_out": run["left_out"] + [f"{mode} at {length} tokens: not finished" for mode, length in cut]}


def unfinished(run: dict, rows: dict[str, dict]) -> list[tuple[str, int]]:
    """The modes and lengths of which answers are missing that the run was begun with."""
    there = Counter((mode, row["task"], row["length"]) for mode, answers in rows.items() for row in answers.values())
    begun = [(one["count"], pair, task) for one in run.get("unfinished", []) for pair in product(one["modes"], one["lengths"]) for task in one["tasks"]]
    return list(dict.fromkeys((mode, length) for count, (mode, length), task in begun if there[mode, task, length] < count))


def joined(runs: list[dict]) -> list[dict]:
    """Runs of one arm, weights and clip (other lengths or modes, say) as one; "runs": what each was. ResultsError where two of them answer the same."""
    groups: dict[tuple, dict] = {}
    for run in runs:
        one = {name: run[name] for name in ("name", "commit", "device", "command")}
        whole = groups.setdefault((run["arm"], run["model"], *map(str, run["identity"].values())), run | {"rows": defaultdict(dict), "runs": [], "left_out": []})
        for mode, rows in run["rows"].items():
            if shared := whole["rows"][mode].keys() & rows:
                raise ResultsError(f"{run['name']}: {mode} answers {min(shared)}, as another run of {run['arm']} does; take one of the two folders out")
            whole["rows"][mode] |= rows
        whole["runs"].append(one)
        whole["left_out"] += [line for line in run["left_out"] if line not in whole["left_out"]]
    return list(groups.values())


def lend(runs: list[dict]) -> None:
    """in_context rows of another run of the same base, for the items that a run asked otherwise; and in "reader" the rows of a LoRA that reads these in context."""
    same = lambda a, b: all(a["identity"][name] == b["identity"][name] for name in ("model_sha256", "dtype", "item_seeds"))
    own = [dict(run["rows"].get("in_context", {})) for run in runs]  # a row is lent by the run that it is of
    for run in runs:
        asked = {item for rows in run["rows"].values() for item in rows}
        run["reader"] = {item: row for other in runs if same(run, other) for item, row in other["rows"].get(TUNED, {}).items() if item in asked}
        for other, rows in zip(runs, own):
            if other is not run and same(run, other):
                missing = {item: row for item, row in rows.items() if item in asked - run["rows"]["in_context"].keys()}
                run["rows"]["in_context"] |= missing
                if missing:
                    run["lent_by"] = other["name"]


# ---- scores ----

def mean_of_tasks(by_task: dict[str, list[float]], settings: Bootstrap) -> tuple[float, list[float] | None]:
    """(mean of the tasks' means, its interval, items resampled within their task)."""
    value = float(np.mean([np.mean(scores) for scores in by_task.values()]))
    if len(by_task) == 1:
        return value, interval(lambda scores, axis=-1: scores.mean(axis), [np.array(next(iter(by_task.values())))], settings)
    random = np.random.default_rng(settings.seed)
    drawn = [random.choice(scores, (settings.resamples, len(scores))).mean(1) for scores in by_task.values()]
    low, high = np.percentile(np.mean(drawn, 0), [2.5, 97.5])
    return value, [float(low), float(high)]


def share_kept(by_task: dict[str, list[tuple]], settings: Bootstrap) -> tuple[float, list[float] | None] | None:
    """(score over the best reader's, of the tasks' means; its interval, items resampled within their task); None where no reader answers anything. by_task:
    (score, each reader's score) of each item. The best reader is found anew in each resample, as evaluate.py's ceiling is."""
    random, share = np.random.default_rng(settings.seed), lambda means: means[..., 0] / means[..., 1:].max(-1)
    pairs = [np.array(scores) for scores in by_task.values()]
    means = np.mean([task.mean(0) for task in pairs], 0)
    drawn = np.mean([task[random.integers(0, len(task), (settings.resamples, len(task)))].mean(1) for task in pairs], 0)
    if not means[1:].any():
        return None
    return float(share(means)), [float(end) for end in np.percentile(share(drawn), [2.5, 97.5])] if drawn[:, 1:].any(1).all() else None


def cells_of(run: dict, settings: Bootstrap) -> list[dict]:
    """One cell a task (and over all tasks), length and mode, with its gain over in_context."""
    cells = []
    for length in sorted({row["length"] for rows in run["rows"].values() for row in rows.values()}):
        for mode in (mode for mode in ORDER if run["rows"].get(mode)):
            mine = {item: row for item, row in run["rows"][mode].items() if row["length"] == length}
            base = {item: row for item, row in run["rows"]["in_context"].items() if item in mine}
            tasks = sorted({row["task"] for row in mine.values()})
            retrieval = [task for task in tasks if is_retrieval(task)]
            means = {RETRIEVAL: retrieval if 1 < len(retrieval) < len(tasks) else [], ALL: tasks if len(tasks) > 1 else []}
            for task, of in ({task: [task] for task in tasks} | {name: of for name, of in means.items() if of}).items():
                chosen = [item for item, row in mine.items() if row["task"] in of]
                value, ends = mean_of_tasks(by_task(chosen, mine, lambda item: mine[item]["score"]), settings)
                cell = {"task": task, "length": length, "mode": mode, "n": len(chosen), "score": value, "ci": ends,
                        "seconds": float(np.median([mine[item]["seconds"] for item in chosen])),
                        "peak_gb": max((mine[item]["peak_gb"] for item in chosen if mine[item]["peak_gb"] is not None), default=None)}
                shared = [item for item in chosen if item in base]
                if mode != "in_context" and shared:
                    gain, gain_ci = mean_of_tasks(by_task(shared, mine, lambda item: mine[item]["score"] - base[item]["score"]), settings)
                    cell |= {"gain": gain, "gain_ci": gain_ci, "shared": len(shared)}
                readers = [rows for rows in (base, run["reader"]) if chosen and all(item in rows for item in chosen)]
                if mode in DROPPED and readers:
                    kept = share_kept(by_task(chosen, mine, lambda item: (mine[item]["score"], *(rows[item]["score"] for rows in readers))), settings)
                    cell |= {"kept": kept[0], "kept_ci": kept[1]} if kept else {}
                cells.append(cell)
    return cells


def by_task(items: list[str], rows: dict, number) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for item in items:
        groups[rows[item]["task"]].append(number(item))
    return groups


# ---- figures ----

def draw_accuracy(arms: list[dict], path: Path) -> None:
    """Score of one model's arms against length, a panel a task, a line an arm and mode; in_context once."""
    tasks = list(dict.fromkeys(cell["task"] for arm in arms for cell in arm["cells"]))
    columns = min(5 if len(tasks) > 12 else 4, len(tasks))
    rows = -(-len(tasks) // columns)
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(3.1 * columns + 0.4, 2.5 * rows + 1.6))
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for spare in axes[len(tasks):]:
            spare.set_visible(False)
        figure.suptitle(f"{arms[0]['model']}: score by tokens of prompt and answer (bars: 95% bootstrap over items)")
        lines = lines_of(arms)
        for ax, task in zip(axes, tasks):
            for number, (label, (look, cells)) in enumerate(lines.items()):
                mine = [cell for cell in cells if cell["task"] == task]
                if mine:
                    ends = np.array([cell["ci"] or [cell["score"]] * 2 for cell in mine]).T
                    score = np.array([cell["score"] for cell in mine])
                    ax.errorbar([cell["length"] * 1.3 ** ((number + 0.5) / len(lines) - 0.5) for cell in mine], score, yerr=np.abs(ends - score),
                                label=label, markersize=3.5, linewidth=1, capsize=1.5, **look)
            ax.set_title(task)
            dress(ax, arms)
            ax.set_ylim(-0.05, 1.05)
        for ax in axes[len(tasks) - columns:len(tasks)]:  # the lowest of each column, also above a spare one
            ax.tick_params(labelbottom=True)
        handles, labels = max((ax.get_legend_handles_labels() for ax in axes), key=lambda found: len(found[1]))
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))
        figure.savefig(path, dpi=plots.DPI)


def draw_cost(arms: list[dict], path: Path) -> None:
    """Seconds an item and peak memory of one model's arms against length, over all tasks."""
    with matplotlib.rc_context(plots.STYLE):
        lines = lines_of(arms)
        figure = Figure(figsize=(8.5, 3.4 + 0.16 * len(lines)))
        figure.suptitle(arms[0]["model"])
        for ax, name, text in zip(figure.subplots(1, 2), ("seconds", "peak_gb"), ("seconds an item (median)", "peak GB of a batch, above the weights")):
            for label, (look, cells) in lines.items():
                mine = [cell for cell in cells if cell["task"] == (ALL if any(c["task"] == ALL for c in cells) else cells[0]["task"]) and cell[name] is not None]
                if mine:
                    ax.plot([cell["length"] for cell in mine], [cell[name] for cell in mine], label=label, markersize=4, **look)
            ax.set_title(text if ax.lines else "peak GB: not measured on a CPU")
            if ax.lines:
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
            dress(ax, arms)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figure.savefig(path, dpi=plots.DPI)


def dress(ax, arms: list[dict]) -> None:
    lengths = sorted({cell["length"] for arm in arms for cell in arm["cells"]})
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [f"{length // 1024}K" if length % 1024 == 0 else str(length) for length in lengths])
    ax.minorticks_off()
    ax.set_xlim(lengths[0] / 1.5, lengths[-1] * 1.5)


def named(arm: dict) -> str:
    return arm["arm"] + (f" (seed {arm['seed']})" if arm["seed"] else "") + (f" clipped to {arm['clip']:g}" if arm["clip"] else "")


def lines_of(arms: list[dict]) -> dict[str, tuple[dict, list[dict]]]:
    """The lines of a figure: {label: (how it is drawn, cells in order of length)}: an arm's colour, a mode's stroke; in_context is one line, however many arms share it."""
    lines: dict[str, tuple[dict, dict]] = {}
    number = -1
    for arm in arms:
        number += any(cell["mode"] != "in_context" for cell in arm["cells"])
        for cell in sorted(arm["cells"], key=lambda cell: ORDER.index(cell["mode"])):
            base = cell["mode"] == "in_context"
            look = {"color": "black", "marker": "."} if base else {"color": plots.COLORS[number % 6], "marker": plots.MARKERS[number % 7]} | STROKES[cell["mode"]]
            lines.setdefault("in_context" if base else f"{named(arm)}, {cell['mode']}", (look, {}))[1].setdefault((cell["task"], cell["length"]), cell)
    return {label: (look, sorted(cells.values(), key=lambda cell: cell["length"])) for label, (look, cells) in lines.items()}


# ---- tables ----

def tables(report: dict) -> str:
    """The block's content: a table a run (scores by mode and length, gains over in_context), then the runs."""
    lines = ["Scores are the tasks' published metrics (python long_tasks.py --list); [low, high]: 95% bootstrap over items. gain: over in_context, same items. kept: over the higher of in_context and in_context_tuned, same items."]
    for arm in report["arms"]:
        modes = list(dict.fromkeys(cell["mode"] for cell in arm["cells"]))
        gains, kept = [mode for mode in modes if mode != "in_context"], [mode for mode in DROPPED if any("kept" in cell for cell in arm["cells"] if cell["mode"] == mode)]
        chunk = f", chunk {arm['chunk'] or 'the whole text'}" if arm["objective"] in ("recall", "lm") else ""
        lines += ["", f"**{named(arm)} on {arm['model']}** (objective {arm['objective']}{chunk}"
                  f"{', base not frozen' if arm['frozen'] is False else ''})", "",
                  "| task | tokens | n | " + " | ".join([*modes, *(f"gain of {mode}" for mode in gains), *(f"kept by {mode}" for mode in kept)]) + " |",
                  "| --- | --- | --- |" + " --- |" * (len(modes) + len(gains) + len(kept))]
        for task, length in dict.fromkeys((cell["task"], cell["length"]) for cell in sorted(arm["cells"], key=lambda c: (c["task"] == ALL, c["task"] == RETRIEVAL, c["task"], c["length"]))):
            found = {cell["mode"]: cell for cell in arm["cells"] if (cell["task"], cell["length"]) == (task, length)}
            most = max(cell["n"] for cell in found.values())
            fewer = ", ".join(f"{mode} {cell['n']}" for mode, cell in found.items() if cell["n"] < most)
            lines.append(f"| {task} | {length:,} | {most}{f' ({fewer})' if fewer else ''} | " + " | ".join(
                [with_interval(found[m]["score"], found[m]["ci"]) if m in found else "–" for m in modes]
                + [with_interval(found[m]["gain"], found[m]["gain_ci"]) if "gain" in found.get(m, {}) else "–" for m in gains]
                + [with_interval(found[m]["kept"], found[m]["kept_ci"]) if "kept" in found.get(m, {}) else "–" for m in kept]) + " |")
        lines += [""] * bool(arm["left_out"]) + [f"- left out: {line}" for line in arm["left_out"]]
    lines += ["", "Runs:", ""]
    lines += [f"- {run['name']}: commit {run['commit']}, {run['device']}, `{run['command']}`" + (f"; in_context of {arm['lent_by']}" if arm["lent_by"] else "")
              for arm in report["arms"] for run in arm["runs"]]
    return "\n".join(lines) + "\n"


# ---- the script ----

def build(folders: list[Path], settings: Bootstrap, incomplete: bool = False) -> dict:
    runs = joined([load(folder, incomplete) for folder in folders])
    lend(runs)
    keep = ("name", "arm", "model", "objective", "frozen", "seed", "chunk", "clip", "runs", "left_out", "window")
    return {"bootstrap": {"resamples": settings.resamples, "seed": settings.seed},
            "arms": [{name: run.get(name) for name in keep} | {"lent_by": run.get("lent_by"), "cells": cells_of(run, settings)} for run in runs]}


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders (default: results/long/*)")
    parser.add_argument("--out", type=Path, help="folder of report.json and figures/ (default: results/long; with --out RESULTS.md is left alone)")
    parser.add_argument("--allow-incomplete", action="store_true", help="take runs that were not finished too, without the lengths that are not whole")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    args = parser.parse_args(arguments)
    out, results_md = args.out or Path("results/long"), None if args.out or args.runs else Path("RESULTS.md")
    try:
        folders = args.runs or sorted(path.parent for path in Path("results/long").glob("*/run.json"))
        if not folders:
            raise ResultsError("results/long/: holds no run; make one with python run_long.py, or name run folders")
        around = around_block(results_md, BLOCK) if results_md else None
        report = build(folders, Bootstrap(seed=args.seed), args.allow_incomplete)
        (out / "figures").mkdir(parents=True, exist_ok=True)
        for model in dict.fromkeys(arm["model"] for arm in report["arms"]):
            arms = [arm for arm in report["arms"] if arm["model"] == model]
            draw_accuracy(arms, out / f"figures/accuracy-{model.replace('/', '-')}.png")
            draw_cost(arms, out / f"figures/cost-{model.replace('/', '-')}.png")
        write_json(out / "report.json", report)
        if around:
            write_text(results_md, around[0] + tables(report) + around[1])
        print(tables(report))
        print(f"Report: {out / 'report.json'}; figures: {out / 'figures'}" + (f"; table: {results_md}" if results_md else ""))
    except ResultsError as error:
        print(f"report_long.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
