"""From scored documents to tables: bits per byte, gains with intervals, epochs, compiled against not, and the size of what would be handed in.

A way is (rule, mode, epochs, compiled), its rows one a document and seed. Bits per byte are bits of all scored tokens over the UTF-8 bytes that these stand for.
"""
from __future__ import annotations

import hashlib
import json
import lzma
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import wilcoxon

import report_tables
from intervals import Bootstrap, interval, pooled
from manifests import UserError
from results_files import ResultsError

BLOCK = "score"                 # the name in the marks of RESULTS.md
FEWEST = 8                      # documents to pair; with fewer, stretches of them are paired
WAY = ("rule", "mode", "epochs", "compiled")
PASS = ("rule", "mode", "epochs", "seed", "compiled")  # of which each has one row a document
SAME = ("model", "model_sha256", "arm", "adapter_files", "text", "plan", "learns", "device", "commit", "versions")  # of runs whose passes belong together
MODES = {"off": "TTT off", "legal": "score, then learn", "forbidden": "**forbidden**: learn, then score"}


# ---- numbers ----

def ways_of(rows: list[dict]) -> dict[tuple, dict]:
    """{way: {seed: its rows}}, in the order of the rows."""
    ways = defaultdict(lambda: defaultdict(list))
    for row in rows:
        ways[tuple(row[name] for name in WAY)][row["seed"]].append(row)
    return {way: dict(seeds) for way, seeds in ways.items()}


def per_byte(rows: list[dict]) -> float:
    return sum(row["bits"] for row in rows) / sum(row["bytes"] for row in rows)


def units(seeds: dict, by_block: bool) -> dict[tuple, tuple[float, int]]:
    """{unit: (bits, mean over the seeds; bytes)}; a unit is a document, or a stretch of one."""
    found = defaultdict(list)
    for row in (row for rows in seeds.values() for row in rows):
        parts = row["blocks"] if by_block else [[row["tokens"], row["bytes"], row["bits"]]]
        for number, (_, nbytes, bits) in enumerate(parts):
            found[row["document"], number].append((bits, nbytes))
    return {unit: (statistics.fmean(bits for bits, _ in pairs), pairs[0][1]) for unit, pairs in found.items()}


def compare(first: dict, second: dict) -> dict:
    """By how many bits a byte the second way is better than the first, paired: {"gain", "ci" (95% bootstrap), "p" (Wilcoxon's signed-rank test), "n", "unit"}."""
    by_block = len({row["document"] for rows in first.values() for row in rows}) < FEWEST
    one, two = units(first, by_block), units(second, by_block)
    shared = sorted(one.keys() & two.keys())
    saved, nbytes = (np.array(column, dtype=float) for column in zip(*((one[u][0] - two[u][0], one[u][1]) for u in shared)))
    return {"gain": float(pooled(saved, nbytes)), "ci": interval(pooled, (saved, nbytes), Bootstrap()) if len(shared) > 1 and np.ptp(saved / nbytes) else None,
            "p": float(wilcoxon(saved / nbytes).pvalue) if saved.any() else 1.0, "n": len(shared), "unit": "stretches" if by_block else "documents"}


def summary(rows: list[dict]) -> list[dict]:
    """A dict a way: its name, bits per byte of each seed, mean and standard deviation over them, the gain over TTT off, and of a forbidden way that over the legal one."""
    ways, told = ways_of(rows), []
    for way, seeds in ways.items():
        rule, mode, epochs, compiled = way
        by_seed = {seed: per_byte(of_seed) for seed, of_seed in seeds.items()}
        off, legal = ways.get(("off", "off", None, compiled)), ways.get((rule, "legal", epochs, compiled))
        told.append(dict(zip(WAY, way)) | {
            "bits_per_byte": statistics.fmean(by_seed.values()), "sd": statistics.stdev(by_seed.values()) if len(by_seed) > 1 else None, "by_seed": by_seed,
            "seconds": statistics.fmean(sum(row["seconds"] for row in of_seed) for of_seed in seeds.values()),
            "against_off": compare(off, seeds) if off and mode != "off" else None,
            "against_legal": compare(legal, seeds) if legal and mode == "forbidden" else None})
    return told


def compile_cells(rows: list[dict]) -> list[dict]:
    """Of each way that ran both ways: seconds not compiled and compiled, and the largest difference of a document's bits per token."""
    ways, cells = ways_of(rows), []
    for way, compiled in ways.items():
        plain = ways.get((*way[:3], False))
        if not way[3] or not plain:
            continue
        bits = {(row["document"], seed): row["bits"] for seed, of_seed in plain.items() for row in of_seed}
        total = lambda seeds: sum(row["seconds"] for of_seed in seeds.values() for row in of_seed)
        cells.append(dict(zip(WAY, way)) | {"seconds_plain": total(plain), "seconds_compiled": total(compiled),
                                            "difference": max(abs(row["bits"] - bits[row["document"], seed]) / row["tokens"] for seed, of_seed in compiled.items() for row in of_seed)})
    return cells


def epochs_verdict(told: list[dict], mode: str) -> str | None:
    """What more epochs bring, by a stated rule; None with fewer than three numbers of epochs."""
    gains = {cell["epochs"]: cell["against_off"]["gain"] for cell in told if cell["rule"] == "adamw" and cell["mode"] == mode and not cell["compiled"] and cell["against_off"]}
    if len(gains) < 3:
        return None
    order = sorted(gains)
    best, last, before = max(gains, key=gains.get), gains[order[-1]], gains[order[-2]]
    if best != order[-1]:
        return f"the gain is largest at {best} epochs and falls after"
    first = gains[order[0]]
    return "the gain still grows with epochs" if first <= 0 or (last - before) > 0.1 * last else "the gain saturates: the last doubling brings less than a tenth of it"


# ---- size ----

def artefact(adapter: Path | None, base_bytes: int, budget: int | None) -> dict:
    """Bytes of what would be handed in: the project's modules that this process runs, and the adapter's weights, each compressed by LZMA (xz, preset 9). The base is
    told beside it and not counted."""
    home = Path(__file__).parent
    files = sorted({Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None) and Path(module.__file__).parent == home})
    code = b"".join(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes() for path in files)
    weights = b"" if adapter is None else (adapter / "adapter.safetensors").read_bytes()
    packed = [len(lzma.compress(part, preset=9)) if part else 0 for part in (code, weights)]
    return {"code": {"files": len(files), "bytes": len(code), "compressed": packed[0]}, "adapter": {"bytes": len(weights), "compressed": packed[1]},
            "compressed": sum(packed), "base_bytes": base_bytes, "budget": budget, "fits": None if budget is None else sum(packed) <= budget}


def artefact_line(found: dict) -> str:
    text = (f"Handed in (xz, preset 9): code {found['code']['compressed']:,} bytes ({found['code']['files']} modules), adapter {found['adapter']['compressed']:,}, together {found['compressed']:,}")
    if found["budget"] is not None:
        text += f"; {'within' if found['fits'] else 'over'} the budget of {found['budget']:,}"
    return text + f". The base, {found['base_bytes']:,} bytes of parameters as they ran, is not counted."


# ---- tables ----

def way_text(cell: dict) -> str:
    name = {"off": "", "inplace": "in-place, ", "adamw": f"AdamW, {cell['epochs']} epoch{'s' * (cell['epochs'] != 1)}, "}[cell["rule"]]
    return name + MODES[cell["mode"]] + (", compiled" if cell["compiled"] else "")


def against_text(found: dict | None) -> str:
    if found is None:
        return ""
    p = "p < 0.0001" if found["p"] < 0.0001 else f"p = {found['p']:.4f}"
    return f"{report_tables.with_interval(found['gain'], found['ci'])}, {p}"


def table(run: dict) -> list[str]:
    rows = [["", "bits per byte", "seeds", "gain over TTT off", "gain of forbidden over legal", "seconds"], ["---"] * 6]
    for cell in run["summary"]:
        sd = f" ± {cell['sd']:.4f}" if cell["sd"] is not None else ""
        seeds = ", ".join(map(str, cell["by_seed"])) if cell["sd"] is not None or cell["rule"] == "adamw" else "deterministic"
        rows.append([way_text(cell), f"{cell['bits_per_byte']:.4f}{sd}", seeds, against_text(cell["against_off"]), against_text(cell["against_legal"]), f"{cell['seconds']:.0f}"])
    return report_tables.table_lines(rows)


def run_lines(name: str, run: dict) -> list[str]:
    """The part of RESULTS.md about one run."""
    text, plan = run["text"], run["plan"]
    units_of = next((cell["against_off"] for cell in run["summary"] if cell["against_off"]), None)
    lines = [f"**{name}**: {run['model']}" + (f" with {run['arm']}" if run["arm"] else "") + ("" if run["complete"] else " (partial)")
             + f". {text['name']} (SHA-256 {text['sha256'][:12]}), {text['documents']} document{'s' * (text['documents'] != 1)}, {text['tokens']:,} tokens, {text['bytes']:,} bytes"
             + (f" ({text['prefix']})" if text["prefix"] else "") + f". Windows of {plan['window']} tokens, stride {plan['stride']}: attention sees {plan['window'] - plan['stride'] + 1} "
             f"to {plan['window']} tokens before a token, fewer at a document's beginning. " + run["learns"], "", *table(run), ""]
    if units_of:
        lines.append(f"- Paired over {units_of['n']} {units_of['unit']}: 95% bootstrap interval, Wilcoxon's signed-rank test"
                     + (" (neighbouring stretches are not independent)" if units_of["unit"] == "stretches" else "")
                     + (f"; so few cannot give a p below {2 ** (1 - units_of['n']):g}, and their intervals say little" if units_of["n"] < 6 else "") + ". ± is the standard deviation over seeds.")
    for mode in ("legal", "forbidden"):
        verdict = epochs_verdict(run["summary"], mode)
        lines += [f"- Epochs, {MODES[mode]}: {verdict}."] if verdict else []
    lines += [f"- Compiled, {way_text(cell | {'compiled': False})}: {cell['seconds_plain']:.1f} s not compiled, {cell['seconds_compiled']:.1f} s compiled (x{cell['seconds_plain'] / cell['seconds_compiled']:.2f}, "
              f"without the {run['compile_seconds']:.0f} s of compiling); a document's bits per token differ by at most {cell['difference']:.1e} (bits are kept to 0.001 a document)." for cell in run["compile"]]
    lines += [f"- {artefact_line(run['artefact'])}", f"- The base's parameters before and after: SHA-256 {run['base']['before'][:12]}, {run['base']['after'][:12]}.",
              f"- Commit {run['commit']}, {run['device']}, " + ", ".join(f"{n} {v}" for n, v in sorted(run["versions"].items())) + ": " + "; ".join(f"`{command}`" for command in run["commands"])]
    return lines


def read_run(path: Path) -> dict:
    """A score.json with its summary and "commands"; UserError where it cannot be read."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if run.get("rows_sha256", found := rows_digest(run["rows"])) != found:  # runs before 2026-11-29 have none
            raise UserError(f"{path}: field 'rows' is not what was written (SHA-256 {found[:12]}, written {str(run['rows_sha256'])[:12]}); restore the file or score again")
        return summed_up(run | {"commands": [run["command"]]})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not what score_lm.py writes ({type(error).__name__}: {error}); restore the file or score again") from error


def rows_digest(rows: list[dict]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def summed_up(run: dict) -> dict:
    return run | {"summary": summary(run["rows"]), "compile": compile_cells(run["rows"])}


def passes_of(run: dict) -> set[tuple]:
    return {tuple(row[name] for name in PASS) for row in run["rows"]}


def differing(one: dict, other: dict) -> str | None:
    """The first field in which two runs are not the same; None where their passes belong together. A commit is the same dirty: results in a tracked folder make
    the checkout so by themselves."""
    of = lambda run: run | {"commit": run["commit"].removesuffix("-dirty")}
    return next((name for name in SAME if of(one)[name] != of(other)[name]), None)


def joined(runs: dict[str, dict]) -> dict[str, dict]:
    """Runs that differ in nothing but their passes (each seed on a GPU of its own, say) as one, under the first one's name; those that share a pass stay apart."""
    whole: dict[str, dict] = {}
    for name, run in runs.items():
        home = next((one for one, held in whole.items() if not differing(held, run) and not passes_of(held) & passes_of(run)), name)
        held = whole.get(home, {"commands": [], "rows": [], "complete": True, "compile_seconds": 0.0})
        whole[home] = run | held | {"commands": held["commands"] + run["commands"], "rows": held["rows"] + run["rows"], "complete": held["complete"] and run["complete"],
                                    "compile_seconds": held["compile_seconds"] + run["compile_seconds"]}
    return {name: summed_up(run) for name, run in whole.items()}


def read_runs(folder: Path) -> dict[str, dict]:
    """{name: run} of all runs in a folder, joined; UserError where there is none."""
    runs = {path.parent.name: read_run(path) for path in sorted(folder.glob("*/score.json"))}
    if not runs:
        raise UserError(f"{folder}: holds no run (NAME/score.json); make one with score_lm.py --out {folder}/NAME")
    return joined(runs)


def markdown(runs: dict[str, dict]) -> str:
    """The block's content."""
    return "\n\n".join("\n".join(run_lines(name, run)) for name, run in runs.items()) + "\n"


def around(path: Path) -> tuple[str, str]:
    """RESULTS.md before and after the block; UserError without its marks."""
    try:
        return report_tables.around_block(path, BLOCK)
    except ResultsError as error:
        raise UserError(str(error)) from error
