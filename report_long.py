"""Score the runs of run_long.py: accuracy, gain over in_context, time and memory by mode and length; a report, figures (long_figures.py), tables.

    python report_long.py                       every results/long/*/run.json; rewrites the block "long-tasks" of RESULTS.md (means over tasks)
    python report_long.py results/long/a --out /elsewhere

A base's in_context rows serve every run of the same weights, dtype and items that lacks them. Intervals are 95% bootstrap over texts
(eight questions of mqar share one); a mean over tasks weighs tasks alike and resamples the texts of each; a gain is taken on the items that both modes answered. What a memory keeps of a text that is dropped is
its score over the better reader's of the same items: the base's in context, or that of a LoRA which learned to read such texts (in_context_tuned).
"""
from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from itertools import combinations, product
from pathlib import Path

import numpy as np

from evaluate import write_text
from intervals import Bootstrap, interval, pooled
from long_figures import ALL, ORDER, RETRIEVAL, draw, named
from long_modes import DROPPED, TUNED
from long_ruler import QUERIES
from long_tasks import PROFILES, beyond, is_retrieval
from manifests import write_json
from report_tables import around_block, with_interval
from results_files import LONG_RUN_FIELDS, ResultsError, check_sums, parse_object, read_lines, read_text

ROW_FIELDS = {"condition": (str,), "sample_id": (str,), "task": (str,), "length": (int,), "prompt_tokens": (int,), "score": (float, int), "seconds": (float, int),
              "peak_gb": (float, int, type(None)), "batch": (int,)}
BLOCK = "long-tasks"
SHORT = 0.75  # of a length: below, the tables say how long the prompts are (mqar has no more pairs at 32,768 tokens)


# ---- what ran ----

def load(folder: Path, incomplete: bool = False) -> dict:
    """run.json with "rows": {mode: {item: row}}. incomplete: take a run that was not finished without the lengths that a mode has not answered whole."""
    mend = f"run run_long.py again into {folder}, or take the folder out"
    run = parse_object(read_text(folder / "run.json", mend), folder / "run.json", LONG_RUN_FIELDS, mend)
    if not run["complete"] and not incomplete:
        raise ResultsError(f"{folder / 'run.json'}: the run was not finished; finish it with run_long.py --resume, or pass --allow-incomplete to score what is whole")
    rows: dict[str, dict] = defaultdict(dict)
    for where, row in read_lines(folder / "predictions.jsonl", ROW_FIELDS, mend, check_sums(folder, run)):
        if row["condition"] not in ORDER:
            raise ResultsError(f"{where}: field 'condition' is {row['condition']!r}, must be one of {', '.join(ORDER)}; {mend}")
        if row["sample_id"] in rows[row["condition"]]:
            raise ResultsError(f"{where}: {row['condition']} answers {row['sample_id']} a second time; {mend}")
        rows[row["condition"]][row["sample_id"]] = row | {"run": folder.name}
    cut = unfinished(run, rows)
    for mode, length in cut:
        rows[mode] = {item: row for item, row in rows[mode].items() if row["length"] != length}
    return {"seed": None, "clip": None} | run | {"name": folder.name, "rows": rows, "left_out": run["left_out"] + [f"{mode} at {length} tokens: not finished" for mode, length in cut]}


def unfinished(run: dict, rows: dict[str, dict]) -> list[tuple[str, int]]:
    """The modes and lengths of which answers are missing that the run was begun with."""
    there = Counter((mode, row["task"], row["length"]) for mode, answers in rows.items() for row in answers.values())
    begun = [(one["count"], mode, text) for one in run.get("unfinished", []) for mode, text in product(one["modes"], texts_of(one))]
    return sorted({(mode, length) for count, mode, (task, length) in begun if there[mode, task, length] < count}, key=lambda cut: (ORDER.index(cut[0]), cut[1]))


def texts_of(request: dict) -> list[tuple[str, int]]:
    """The (task, length) that a request of run_long.py asks about."""
    if "texts" not in request:  # before 2026-11-30 a request had all its tasks at all its lengths
        return list(product(request["tasks"], request["lengths"]))
    return [(task, int(length)) for task, length in (text.split(" ") for text in request["texts"])]


def joined(runs: list[dict]) -> list[dict]:
    """Runs of one arm, weights and clip (other lengths or modes, say) as one; "runs": what each was. ResultsError where two of them answer the same."""
    groups: dict[tuple, dict] = {}
    for run in runs:
        one = {name: run[name] for name in ("name", "commit", "device", "command")}
        identity = str(sorted((name, value) for name, value in run["identity"].items() if value is not None))  # earlier runs lack names of what they had not
        whole = groups.setdefault((run["arm"], run["model"], identity), run | {"rows": defaultdict(dict), "runs": [], "left_out": []})
        for mode, rows in run["rows"].items():
            if shared := whole["rows"][mode].keys() & rows:
                raise ResultsError(f"{run['name']}: {mode} answers {min(shared)}, as another run of {run['arm']} does; take one of the two folders out")
            whole["rows"][mode] |= rows
        whole["runs"].append(one)
        whole["left_out"] += [line for line in run["left_out"] if line not in whole["left_out"]]
    for one, other in combinations(groups.values(), 2):
        if (named(one), one["model"]) == (named(other), other["model"]):
            raise ResultsError(f"{one['name']} and {other['name']}: both are {named(one)} on {one['model']}, of other weights, dtype or items; "
                               "give the arms different names, or report them apart")
    return list(groups.values())


def lend(runs: list[dict]) -> None:
    """in_context rows of another run of the same base, for the items that a run asked otherwise; in "readers" the rows of each LoRA that reads these in context; and in
    "lent_by" of each of its "runs" the folders whose in_context rows serve the items of that folder."""
    same = lambda a, b: all(a["identity"][name] == b["identity"][name] for name in ("model_sha256", "dtype", "item_seeds"))
    own = [dict(run["rows"].get("in_context", {})) for run in runs]  # a row is lent by the run that it is of
    for run in runs:
        asked = {item for rows in run["rows"].values() for item in rows}
        run["readers"] = [{item: row for item, row in other["rows"].get(TUNED, {}).items() if item in asked} for other in runs if same(run, other)]
        for other, rows in zip(runs, own):
            if other is not run and same(run, other):
                run["rows"]["in_context"] |= {item: row for item, row in rows.items() if item in asked - run["rows"]["in_context"].keys()}
        for one in run["runs"]:
            items = {item for rows in run["rows"].values() for item, row in rows.items() if row["run"] == one["name"]}
            one["lent_by"] = sorted({row["run"] for item, row in run["rows"]["in_context"].items() if item in items} - {one["name"]})


# ---- scores ----

def text_of(row: dict) -> str:
    """Names the text that a row's question is about: questions about one text stand or fall together."""
    if "document" not in row and row["task"] == "mqar":  # rows before 2026-11-30 do not say it; so many questions in a row are about one text
        return str(int(row["sample_id"].split("-")[-2]) // QUERIES)
    return row.get("document", row["sample_id"])


def columns_of(texts: dict[str, list]) -> tuple[np.ndarray, np.ndarray]:
    """(sums [T, k], counts [T, 1]) of the k numbers of each text's items."""
    return np.array([np.sum(numbers, 0) for numbers in texts.values()]), np.array([[len(numbers)] for numbers in texts.values()])


def over_tasks(columns: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Means over tasks of the k numbers of each item, [k]. columns: columns_of each task."""
    return np.mean([pooled(*both, 0) for both in columns], 0)


def resampled(columns: list[tuple[np.ndarray, np.ndarray]], settings: Bootstrap) -> np.ndarray:
    """over_tasks of resamples, [resamples, k]; texts are drawn within their task."""
    random, means = np.random.default_rng(settings.seed), []
    for sums, counts in columns:
        drawn = random.integers(0, len(sums), (settings.resamples, len(sums)))
        means.append(pooled(sums[drawn], counts[drawn], 1))
    return np.mean(means, 0)


def middle(values: np.ndarray, columns: list[tuple[np.ndarray, np.ndarray]]) -> list[float] | None:
    """The 95% of the values of resamples; None where no task has a second text to draw."""
    return [float(end) for end in np.percentile(values, [2.5, 97.5])] if any(len(sums) > 1 for sums, _ in columns) else None


def mean_of_tasks(by_task: dict[str, dict[str, list]], settings: Bootstrap) -> tuple[float, list[float] | None]:
    """(mean of the tasks' means, its interval, texts resampled within their task, None for one text of each; of one task BCa)."""
    columns = [columns_of(texts) for texts in by_task.values()]
    if len(columns) == 1:
        ends = interval(pooled, [column[:, 0] for column in columns[0]], settings)
    else:
        ends = middle(resampled(columns, settings)[:, 0], columns)
    return float(over_tasks(columns)[0]), ends


def share_kept(by_task: dict[str, dict[str, list]], settings: Bootstrap) -> tuple[float, list[float] | None] | None:
    """(score over the best reader's, of the tasks' means; its interval, texts resampled within their task); None where no reader answers anything. Of each
    item (score, each reader's score). The best reader is found anew in each resample, as evaluate.py's ceiling is."""
    columns, share = [columns_of(texts) for texts in by_task.values()], lambda means: means[..., 0] / means[..., 1:].max(-1)
    means, drawn = over_tasks(columns), resampled(columns, settings)
    if not means[1:].any():
        return None
    return float(share(means)), middle(share(drawn), columns) if drawn[:, 1:].any(1).all() else None


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
                value, ends = mean_of_tasks(by_task(chosen, mine, lambda item: (mine[item]["score"],)), settings)
                measured = [mine[item] for item in chosen if mine[item]["peak_gb"] is not None]
                cell = {"task": task, "length": length, "mode": mode, "n": len(chosen), "score": value, "ci": ends,
                        "prompt_tokens": float(np.median([mine[item]["prompt_tokens"] for item in chosen])),
                        "seconds": float(np.median([mine[item]["seconds"] for item in chosen])),
                        "peak_gb": max((row["peak_gb"] for row in measured), default=None),
                        "item_gb": float(np.median([row["peak_gb"] / row["batch"] for row in measured])) if measured else None}
                shared = [item for item in chosen if item in base]
                if mode != "in_context" and {base[item]["task"] for item in shared} == set(of):
                    gain, gain_ci = mean_of_tasks(by_task(shared, mine, lambda item: (mine[item]["score"] - base[item]["score"],)), settings)
                    cell |= {"gain": gain, "gain_ci": gain_ci, "shared": len(shared)}
                readers = [rows for rows in (base, *run["readers"]) if any(item in rows for item in chosen)]
                read = [item for item in chosen if all(item in rows for rows in readers)]
                if mode in DROPPED and readers and {mine[item]["task"] for item in read} == set(of):
                    kept = share_kept(by_task(read, mine, lambda item: (mine[item]["score"], *(rows[item]["score"] for rows in readers))), settings)
                    cell |= {"kept": kept[0], "kept_ci": kept[1], "kept_n": len(read)} if kept else {}
                cells.append(cell)
    return cells


def by_task(items: list[str], rows: dict, numbers) -> dict[str, dict[str, list]]:
    """{task: {text: numbers of each of its items, a tuple}}."""
    groups: dict[str, dict] = defaultdict(lambda: defaultdict(list))
    for item in items:
        groups[rows[item]["task"]][text_of(rows[item])].append(numbers(item))
    return groups


# ---- tables ----

def tables(report: dict, means: bool = False) -> str:
    """A table an arm (scores by mode and length, gains over in_context), then the runs. means: of an arm that was asked several tasks their means alone."""
    lines = ["Scores are the tasks' published metrics (python long_tasks.py --list); [low, high]: 95% bootstrap over texts, of which mqar has one for eight questions. tokens: of prompt and answer (in brackets the prompts' median, where a task's texts end below three quarters of that). gain: over in_context, same items. "
             "kept: over the higher of in_context and in_context_tuned, of those that were asked. n: of the items that all of them answered, where these are fewer." + " Of all tasks one by one: results/long/tables.md." * means]
    lines += [""] * bool(report["left_out"]) + [f"- left out of all arms of {line}" for line in report["left_out"]]
    for arm in report["arms"]:
        modes = list(dict.fromkeys(cell["mode"] for cell in arm["cells"]))
        gains, kept = [mode for mode in modes if mode != "in_context"], [mode for mode in DROPPED if any("kept" in cell for cell in arm["cells"] if cell["mode"] == mode)]
        chunk = f", chunk {arm['chunk'] or 'the whole text'}" if arm["objective"] in ("recall", "lm") else ""
        lines += ["", f"**{named(arm)} on {arm['model']}** (objective {arm['objective']}{chunk}"
                  f"{', base not frozen' if arm['frozen'] is False else ''})", "",
                  "| task | tokens | n | " + " | ".join([*modes, *(f"gain of {mode}" for mode in gains), *(f"kept by {mode}" for mode in kept)]) + " |",
                  "| --- | --- | --- |" + " --- |" * (len(modes) + len(gains) + len(kept))]
        shown = [cell for cell in arm["cells"] if cell["task"] in (ALL, RETRIEVAL)] if means and any(cell["task"] == ALL for cell in arm["cells"]) else arm["cells"]
        for task, length in dict.fromkeys((cell["task"], cell["length"]) for cell in sorted(shown, key=lambda c: (c["task"] == ALL, c["task"] == RETRIEVAL, c["task"], c["length"]))):
            found = {cell["mode"]: cell for cell in arm["cells"] if (cell["task"], cell["length"]) == (task, length)}
            most = max(cell["n"] for cell in found.values())
            fewer = ", ".join(f"{mode} {cell['n']}" for mode, cell in found.items() if cell["n"] < most)
            prompt = min(cell["prompt_tokens"] for cell in found.values())
            short = f" ({prompt:,.0f})" if prompt < SHORT * length else ""
            lines.append(f"| {task} | {length:,}{short} | {most}{f' ({fewer})' if fewer else ''} | " + " | ".join(
                [with_interval(found[m]["score"], found[m]["ci"]) if m in found else "–" for m in modes]
                + [of_fewer(found.get(m, {}), "gain", "shared") for m in gains]
                + [of_fewer(found.get(m, {}), "kept", "kept_n") for m in kept]) + " |")
        lines += [""] * bool(arm["left_out"]) + [f"- left out: {line}" for line in arm["left_out"]]
    lines += ["", "Runs:", ""]
    lines += [f"- {run['name']}: commit {run['commit']}, {run['device']}, `{run['command']}`" + (f"; in_context of {', '.join(run['lent_by'])}" if run["lent_by"] else "")
              for arm in report["arms"] for run in arm["runs"]]
    lines += [f"- {name}: begun, no length of it is whole yet" for name in report["begun"]]
    return "\n".join(lines) + "\n"


def of_fewer(cell: dict, name: str, n: str) -> str:
    """A number of a cell with its interval, and of how many items (cell[n]) where these are not all of the cell's."""
    if name not in cell:
        return "–"
    return with_interval(cell[name], cell[f"{name}_ci"]) + (f" (n {cell[n]})" if cell[n] < cell["n"] else "")


# ---- the script ----

def build(folders: list[Path], settings: Bootstrap, incomplete: bool = False) -> dict:
    whole, begun = [], []
    for run in (load(folder, incomplete) for folder in folders):
        (whole if any(run["rows"].values()) else begun).append(run)
    if not whole:
        raise ResultsError(f"{folders[0]}: no length of it is whole yet; finish it with run_long.py --resume")
    runs = joined(whole)
    lend(runs)
    unheld = dict.fromkeys((run["model"], line) for run in runs for line in beyond(PROFILES["full"].lengths, run["window"]))  # asked or not; said once a model
    keep = ("name", "arm", "model", "objective", "frozen", "seed", "chunk", "clip", "runs", "window")
    own = lambda run: [line for line in run["left_out"] if (run["model"], line) not in unheld]
    return {"bootstrap": {"resamples": settings.resamples, "seed": settings.seed}, "begun": [run["name"] for run in begun], "left_out": [f"{model}: {line}" for model, line in unheld],
            "arms": [{name: run.get(name) for name in keep} | {"left_out": own(run), "cells": cells_of(run, settings)} for run in runs]}


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders (default: results/long/*)")
    parser.add_argument("--out", type=Path, help="folder of report.json and figures/, needed with run folders (default: results/long; with --out RESULTS.md is left alone)")
    parser.add_argument("--allow-incomplete", action="store_true", help="take runs that were not finished too, without the lengths that are not whole")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    args = parser.parse_args(arguments)
    out, results_md = args.out or Path("results/long"), None if args.out else Path("RESULTS.md")
    try:
        if args.runs and not args.out:
            raise ResultsError("run folders without --out: results/long holds the report of all runs; name another folder with --out")
        folders = args.runs or sorted(path.parent for path in Path("results/long").glob("*/run.json"))
        if not folders:
            raise ResultsError("results/long/: holds no run; make one with python run_long.py, or name run folders")
        around = around_block(results_md, BLOCK) if results_md else None
        report = build(folders, Bootstrap(seed=args.seed), args.allow_incomplete)
        (out / "figures").mkdir(parents=True, exist_ok=True)
        draw(report["arms"], out / "figures")
        write_json(out / "report.json", report)
        write_text(out / "tables.md", "# Long texts, task by task\nWritten by report_long.py.\n\n" + tables(report))
        if around:
            write_text(results_md, around[0] + tables(report, means=True) + around[1])
        print(tables(report))
        print(f"Report: {out / 'report.json'}; tables: {out / 'tables.md'}; figures: {out / 'figures'}" + (f"; means: {results_md}" if results_md else ""))
    except ResultsError as error:
        print(f"report_long.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"report_long.py: error: {error}; choose another --out or free the path", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
