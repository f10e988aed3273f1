"""Score the runs: metrics, intervals, report.json, figures, the tables in RESULTS.md and on the terminal.

    python evaluate.py                          scores every results/*/run.json with its predictions.jsonl
    python evaluate.py results/a --out /elsewhere   scores the runs named and leaves RESULTS.md alone
    python evaluate.py --verify [RUN ...]       checks every run and checkpoint against its manifest; exit code 1 where one fails

Needs no torch. The scorer (normalize, exact_match, contains, f1) may be imported.
"""
import argparse
import json
import math
import os
import random
import re
import string
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import benchmark_file
import plots
import report_tables
from benchmark_dialogue import person_names
from intervals import PAIRS, POOLED, RATIOS, Bootstrap, em_interval, mcnemar, of_shared_seeds, probe_key, ratio_cell
from results_files import (POSITIONS, ResultsError, condition_order, find_runs, group_arms, lend_rows, load_curves,
                           load_run, parse_object, read_text)
from verify_files import verify

EXAMPLES_RIGHT, EXAMPLES_WRONG = 3, 5   # answers shown of every arm and language
CODE = re.compile(r"[A-Z]+-?\d+|\d+[A-Z]+")
ARTICLES = re.compile(r"\b(a|an|the)\b")
LOOP = re.compile(r"(.{1,16}?)\1{2,}")  # a block of up to 16 characters, three or more times in a row
LOOP_LENGTH = {"en": 13, "zh": 9}       # shorter repetitions are numbers and names, not a stuck decoder


# --- scorer ---------------------------------------------------------------------------------------------------

def normalize(text, lang):
    """The text as it is compared. English: SQuAD (lower case; no punctuation, no articles, single spaces).
    Chinese: full-width folded (NFKC), lower case, no punctuation, no spaces."""
    if lang == "en":
        text = "".join(char for char in text.lower() if char not in string.punctuation)
        return " ".join(ARTICLES.sub(" ", text).split())
    if lang != "zh":
        raise ValueError(f"language {lang!r}: must be en or zh")
    text = unicodedata.normalize("NFKC", text).lower()
    return "".join(char for char in text if unicodedata.category(char)[0] not in "PZC"
                   and char not in string.punctuation)


def exact_match(prediction, answers, lang):
    """True where the prediction equals one of the answers (gold and aliases) after normalisation."""
    return normalize(prediction, lang) in {normalize(answer, lang) for answer in answers}


def contains(prediction, answers, lang):
    """True where one of the answers stands inside the prediction; looser than EM, for comparison only."""
    text = normalize(prediction, lang)
    return any(answer and answer in text for answer in (normalize(answer, lang) for answer in answers))


def f1(prediction, answers, lang):
    """Overlap of words (English) or characters (Chinese) with the best of the answers, 0 to 1."""
    return max(_f1_one(normalize(prediction, lang), normalize(answer, lang), lang) for answer in answers)


def _f1_one(prediction, answer, lang):
    left, right = (text.split() if lang == "en" else list(text) for text in (prediction, answer))
    if not left or not right:
        return float(left == right)
    same = sum((Counter(left) & Counter(right)).values())
    return 2 * same / (len(left) + len(right))


def degenerate(prediction, lang):
    """True for an empty prediction and for one that is stuck repeating itself."""
    text = prediction.strip() + (" " if lang == "en" else "")  # so that the last word ends like the others
    return not text.strip() or any(len(loop.group()) >= LOOP_LENGTH[lang] for loop in LOOP.finditer(text))


def is_name_or_code(gold):
    """Whether an answer is a name of the benchmark's people or a code of letters and digits, such as BY-795 or 11G."""
    return gold in person_names() or CODE.fullmatch(gold) is not None


def score(row):
    """Add em, contains, f1, degenerate and name_or_code to a prediction row."""
    answers, lang = [row["gold"], *row["aliases"]], row["lang"]
    for answer in answers:
        if type(answer) is not str or not normalize(answer, lang):
            raise ResultsError(f"{row['where']}: answer {answer!r} is no text or empty after normalisation, so that "
                               "an empty prediction would be right; correct the benchmark and run again")
    row["em"] = float(exact_match(row["prediction"], answers, lang))
    row["contains"] = float(contains(row["prediction"], answers, lang))
    row["f1"] = f1(row["prediction"], answers, lang)
    row["degenerate"] = float(degenerate(row["prediction"], lang))
    row["name_or_code"] = is_name_or_code(row["gold"])
    row.setdefault("memory_bytes", None)  # rows of before it was kept


# --- report ---------------------------------------------------------------------------------------------------

def rounded(value):
    """To 6 decimals, without a negative zero; None stays None, a list is rounded item by item."""
    if value is None:
        return None
    return [rounded(item) for item in value] if isinstance(value, list) else round(float(value), 6) + 0.0


def mean(rows, field):
    """Mean over the rows that have the field; fsum, so that the order of the rows does not matter."""
    values = [row[field] for row in rows if row[field] is not None]
    return rounded(math.fsum(values) / len(values)) if values else None


def em_cell(rows, settings):
    """n (probes of all seeds), EM and its 95% interval over conversations."""
    return {"n": len(rows), "em": mean(rows, "em"), "em_ci": rounded(em_interval(rows, settings))}


def score_cell(rows, settings):
    """Everything the report says about one condition, level and language."""
    seeds = sorted({row["seed"] for row in rows}, key=str)
    return em_cell(rows, settings) | {
        "contains": mean(rows, "contains"), "f1": mean(rows, "f1"),
        "samples": len({row["sample_id"] for row in rows}),
        "em_by_seed": {str(seed): mean([row for row in rows if row["seed"] == seed], "em") for seed in seeds},
        "degenerate": mean(rows, "degenerate"), "update_norm": mean(rows, "update_norm"),
        "memory_bytes": mean(rows, "memory_bytes"),
        **breakdowns(rows, settings)}


def breakdowns(rows, settings):
    """EM by category and by position, for the categories and positions that occur."""
    tables = {}
    for field, order in (("category", benchmark_file.CATEGORIES), ("position", POSITIONS)):
        groups = {name: [row for row in rows if row[field] == name] for name in order}
        tables[f"by_{field}"] = {name: em_cell(group, settings) for name, group in groups.items() if group}
    return tables


def part_tables(by_condition, level, settings):
    """The report's cells of one level and language: {table: {name: cell}}."""
    tests = {f"{first}_vs_{second}": mcnemar(by_condition.get(first, []), by_condition.get(second, []))
             for first, second in PAIRS}
    return {"conditions": {name: score_cell(by_condition[name], settings)
                           for name in sorted(by_condition, key=condition_order)},
            "ratios": ratio_cells([name for name, ratio in RATIOS.items() if level in ratio.levels], by_condition, settings),
            "tests": {name: cell for name, cell in tests.items() if cell}}


def ratio_cells(names, by_condition, settings):
    """The ratios of these names that the conditions allow, {name: cell}, to 6 decimals."""
    cells = {name: ratio_cell(RATIOS[name], by_condition, settings) for name in names}
    return {name: cell | {"value": rounded(cell["value"]), "ci": rounded(cell["ci"])} for name, cell in cells.items() if cell}


def pooled_ratios(rows, settings):
    """{name: {language: cell}} of what is asked of an arm as a whole, over the probes of all levels: of several levels' intervals one leaves
    out 0 by chance more often than once in twenty times."""
    table = defaultdict(dict)
    for lang in sorted({row["lang"] for row in rows}):
        by_condition = defaultdict(list)
        for row in rows:
            if row["lang"] == lang:
                by_condition[row["condition"]].append(row)
        for name, cell in ratio_cells(POOLED, by_condition, settings).items():
            table[name][lang] = cell
    return dict(table)


def pooled_levels(rows, settings):
    """Per condition and language over all levels it was run on: EM by category and by position."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["condition"], row["lang"]].append(row)
    table = {}
    for (name, lang), group in sorted(groups.items(), key=lambda item: (condition_order(item[0][0]), item[0][1])):
        levels = sorted({row["level"] for row in group})
        table.setdefault(name, {})[lang] = {"levels": levels, **breakdowns(group, settings)}
    return table


def b_vs_d(by_condition):
    """[EM in B, EM in D, number of conversations] over the level-3 conversations that both answered, of the seeds that have both."""
    em = []
    for rows in of_shared_seeds({name: by_condition.get(name, []) for name in ("B_memory", "D_distractor")})[0].values():
        answers = defaultdict(list)
        for row in rows:
            answers[row["sample_id"]].append(row)
        em.append({sample: mean(rows, "em") for sample, rows in answers.items()})
    counts = Counter((em[0][sample], em[1][sample]) for sample in em[0].keys() & em[1].keys())
    return [[*pair, count] for pair, count in sorted(counts.items())]


def examples_of(rows, settings):
    """A few right and a few wrong answers of B_memory on level 1, drawn by the bootstrap's seed from the lowest seed's rows."""
    asked = [row for row in rows if row["condition"] == "B_memory" and row["level"] == 1]
    lowest = min((row["seed"] for row in asked), key=str, default=None)
    drawn = {}
    for lang in sorted({row["lang"] for row in asked}):
        rng = random.Random(settings.seed)
        for right, wanted in ((True, EXAMPLES_RIGHT), (False, EXAMPLES_WRONG)):
            found = sorted((row for row in asked if row["lang"] == lang and row["seed"] == lowest and bool(row["em"]) == right), key=probe_key)
            drawn.setdefault(lang, []).extend({"right": right, **{name: row[name] for name in ("question", "gold", "prediction")}}
                                              for row in rng.sample(found, min(wanted, len(found))))
    return drawn


def kv_bytes(runs):
    """{language: bytes of the base's KV cache for what B_memory wrote on level 1, mean over the probes}, of the runs that say what a token takes."""
    sizes = defaultdict(list)
    for run in runs:
        for row in run["predictions"]:
            if row["condition"] == "B_memory" and row["level"] == 1 and run.get("kv_bytes_per_token"):
                sizes[row["lang"]].append({"kv_bytes": row["tokens_written"] * run["kv_bytes_per_token"]})
    return {lang: mean(rows, "kv_bytes") for lang, rows in sizes.items()}


def arm_report(model, arm, runs, settings):
    """The report's entry of one arm; its tables are keyed by name, then level, then language."""
    rows, parts = [row for run in runs for row in run["predictions"]], {}
    for row in rows:
        parts.setdefault((row["level"], row["lang"]), defaultdict(list))[row["condition"]].append(row)
    shown = ("name", "commit", "command", "seed", "device", "dtype", "versions", "complete")
    entry = {"arm": arm, "model": model, "frozen": runs[0]["frozen"], "w_down": bool((runs[0].get("ttt") or {}).get("w_down")), "objective": runs[0]["objective"],
             "seeds": sorted({run["seed"] for run in runs}, key=str), "complete": all(run["complete"] for run in runs),
             "kv_bytes": kv_bytes(runs), "snapshot_of": runs[0].get("snapshot_of"), "conversations_seen": runs[0].get("conversations_seen"),  # runs from before have neither
             "conditions": {}, "ratios": {}, "tests": {}, "pooled_levels": pooled_levels(rows, settings),
             "pooled_ratios": pooled_ratios(rows, settings), "b_vs_d": {},
             "examples": examples_of(rows, settings),
             "runs": [{name: run[name] for name in shown} for run in runs]}
    for (level, lang), by_condition in sorted(parts.items()):
        for table, cells in part_tables(by_condition, level, settings).items():
            for name, cell in cells.items():
                entry[table].setdefault(name, {}).setdefault(str(level), {})[lang] = cell
        if level == 3 and (counted := b_vs_d(by_condition)):
            entry["b_vs_d"][lang] = counted
    return entry


def facts_of(path):
    """Facts that a level-1 conversation tells, in the mean; None where there is none."""
    counts = [len(sample["facts"]) for sample in benchmark_file.load_benchmark(path)["samples"] if sample["level"] == 1]
    return rounded(sum(counts) / len(counts)) if counts else None


def unscored(scored):
    """{model: parameters} of the bases that were run at full size with random weights alone (bench.py), smallest first."""
    mend = "run bench.py again, or remove the file"
    fields = {"model": (str,), "parameters": (int,), "weights": (str,)}
    runs = [parse_object(read_text(path, mend), path, fields, mend) for path in sorted(Path("results/bench").glob("*.json"))]
    return {run["model"]: run["parameters"] for run in sorted(runs, key=lambda run: run["parameters"]) if run["weights"] == "random" and run["model"] not in scored}


def build_report(runs, settings):
    """report.json as a dict. bench["unchanged"]: is the benchmark file still the one that ran (None: not here)?"""
    for run in runs:
        for row in run["predictions"]:
            score(row)
    groups = group_arms(runs)
    borrowed = lend_rows(groups)
    sizes = {run.get("model_sha256"): run["base_parameters"] for run in runs if run.get("base_parameters")}
    arms = [arm_report(model, arm, group, settings) | {"borrowed": borrowed[model, arm], "base_parameters": sizes.get(group[0].get("model_sha256"))}
            for (model, arm), group in groups.items()]
    path, sha256 = Path(runs[0]["benchmark"]["file"]), runs[0]["benchmark"]["sha256"]
    unchanged = benchmark_file.sha256_of(path) == sha256 if path.is_file() else None
    return {"benchmark": {"file": path.name, "sha256": sha256, "unchanged": unchanged, "facts": facts_of(path) if unchanged else None},
            "commit": ", ".join(sorted({run["commit"] for run in runs})),
            "bootstrap": {"resamples": settings.resamples, "seed": settings.seed}, "arms": arms, "unscored": unscored({arm["model"] for arm in arms})}


# --- command line ---------------------------------------------------------------------------------------------

def write_text(path, text):
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description="Score runs: report.json, figures, the tables in RESULTS.md and here.",
                                     epilog="With no arguments: every run under results/, and then each folder of runs on another test, "
                                            "such as results/natural, whose name marks a block of RESULTS.md.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders (run.json and predictions.jsonl inside); "
                        "default: all under results/")
    group = parser.add_argument_group("where it goes")
    group.add_argument("--out", type=Path, metavar="DIR", help="folder of report.json and figures/ (default: results; "
                       "with --out, RESULTS.md is left alone unless --results-md names it)")
    group.add_argument("--results-md", type=Path, metavar="FILE", help="file whose marked block is rewritten "
                       "(default: RESULTS.md)")
    group.add_argument("--block", default="report", help="name in that block's marks (default: %(default)s)")
    group.add_argument("--quiet", action="store_true", help="do not print the tables; errors are printed all the same")
    parser.add_argument("--verify", action="store_true", help="check hashes and rows of the runs and of checkpoints/ instead, and print each file")
    group = parser.add_argument_group("how it is scored")
    group.add_argument("--allow-incomplete", action="store_true", help="score unfinished runs too, marked as partial")
    group.add_argument("--resamples", type=int, default=2000, help="bootstrap resamples (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.resamples < 100:
        parser.error("--resamples: a 95% interval needs 100 or more")
    if args.seed < 0:
        parser.error("--seed: must be 0 or more")
    return args


def evaluate(args):
    """Everything is read, checked and computed before the first file is written."""
    out, results_md = args.out or Path("results"), args.results_md
    if results_md is None and args.out is None:
        results_md = Path("RESULTS.md")
    around = report_tables.around_block(results_md, args.block) if results_md else None
    runs = [load_run(folder, args.allow_incomplete) for folder in find_runs(args.runs)]
    report = build_report(runs, Bootstrap(args.resamples, args.seed))
    curves, notes = load_curves(runs)
    notes += plots.draw_all(report, curves, out / "figures")
    write_text(out / "report.json", json.dumps(report, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    if around:
        write_text(results_md, around[0] + report_tables.markdown(report) + around[1])
    if not args.quiet:
        print(report_tables.terminal(report))
        print("\n".join([*notes, f"Report: {out / 'report.json'}; figures: {out / 'figures'}"
                         + (f"; tables: {results_md}" if results_md else "")]))


def shelves():
    """Folders results/NAME of runs on a test of their own, those whose NAME marks a block of RESULTS.md."""
    text = Path("RESULTS.md").read_text(encoding="utf-8")
    folders = sorted({path.parent.parent for path in Path("results").glob("*/*/run.json")})
    return [folder for folder in folders if report_tables.marks_of(folder.name)[0] in text]


def everything(args):
    """What the arguments name; without any, the benchmark's runs and those of every shelf."""
    evaluate(args)
    if not args.runs and args.out is None and args.results_md is None:
        for shelf in shelves():
            runs = sorted(str(path.parent) for path in shelf.glob("*/run.json"))
            evaluate(argparse.Namespace(**vars(args) | {"runs": runs, "out": shelf, "results_md": Path("RESULTS.md"), "block": shelf.name}))


def main(arguments=None):
    args = parse_arguments(arguments)
    if args.verify:
        lines, well = verify([Path(run) for run in args.runs])
        print("\n".join(lines))
        return 0 if well else 1
    try:
        everything(args)
    except ResultsError as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"evaluate.py: error: {error}; choose another --out or free the path", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
