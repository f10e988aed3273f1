"""What the manifests of results and checkpoints vouch for, checked: python evaluate.py --verify [RUN ...]."""
from __future__ import annotations

import json
from pathlib import Path

import benchmark_file
from manifests import UserError, read_manifest
from results_files import LONG_RUN_FIELDS, RUN_FIELDS, ResultsError, check_sums, parse_object, read_text

MEND = "restore the file, or run again"


def verify(folders: list[Path]) -> tuple[list[str], bool]:
    """(lines, one for each file checked; is all well) of these run folders, without any of every run and checkpoint under results/ and checkpoints/.

    A line begins with pass, note (nothing is wrong with the file, but this could not be checked) or FAIL; the last one counts them.
    """
    runs = folders or sorted({path.parent for path in Path("results").glob("**/run.json") if is_run(path)})
    checkpoints = [] if folders else sorted(path.parent for path in Path("checkpoints").glob("**/manifest.json"))
    lines = []
    for check, group in ((check_run, runs), (check_checkpoint, checkpoints)):
        for folder in group:
            try:
                for line in check(folder):  # one by one: what passed before a failure is said too
                    lines.append(line)
            except UserError as error:
                lines.append(f"FAIL  {error}")
            except OSError as error:
                lines.append(f"FAIL  {error.filename or folder}: {error.strerror}; {MEND}")
    lines = lines or ["FAIL  results/: holds no run; make one with python run_experiment.py, or name run folders"]
    count = {verdict: sum(line.startswith(verdict) for line in lines) for verdict in ("pass", "note", "FAIL")}
    return [*lines, ", ".join(f"{n} {verdict}" for verdict, n in count.items())], not count["FAIL"]


def is_run(path: Path) -> bool:
    """Is this the run.json of a run of conditions, or of long texts in modes? Other instruments have folders under results/ too, of other rows."""
    try:
        return not {"conditions", "modes"}.isdisjoint(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError):
        return True  # it is to be named as broken


def check_run(folder: Path):
    """A run's rows, benchmark and adapters against its run.json; yields what passed, raises at the first that does not."""
    path, rows_file = folder / "run.json", folder / "predictions.jsonl"
    text = read_text(path, MEND)
    run = parse_object(text, path, LONG_RUN_FIELDS if "modes" in parse_object(text, path, {}, MEND) else RUN_FIELDS, MEND)
    vouched = check_sums(folder, run)
    count = len(read_text(rows_file, MEND).split("\n")) - 1
    if run["complete"] and count != run["rows"]:
        raise ResultsError(f"{rows_file}: has {count} rows, but run.json says {run['rows']}; {MEND}")
    state = "" if run["complete"] else ", not finished"
    if vouched is None:
        yield f"note  {rows_file}: {count} rows{state}, no hash (made before one was kept)"
    else:
        yield f"pass  {rows_file}: {count} rows{state}, {vouched} bytes as they were written"
    yield from check_inputs(path, run)


def check_inputs(path: Path, run: dict):
    """The files a run was made from, those that are here; a benchmark or checkpoint that is not is named as such."""
    if "benchmark" in run:  # long texts are made anew
        yield check_benchmark(path, run["benchmark"])
    for field in ("adapter", "tuned_adapter"):
        if not run.get(field):
            continue
        if not (Path(run[field]) / "manifest.json").is_file():
            yield f"note  {path}: {run[field]} is not here to compare"
        elif (sha := (run | run.get("identity", {})).get(f"{field}_sha256")) not in read_manifest(run[field])["files"].values():
            yield f"note  {path}: {run[field]} now holds another adapter than the one that ran ({str(sha)[:12]})"
        else:
            yield f"pass  {path}: ran with {run[field]}"


def check_benchmark(path: Path, ran: dict) -> str:
    bench = Path(ran["file"])
    if not bench.is_file():
        return f"note  {path}: {bench} is not here to compare"
    if benchmark_file.sha256_of(bench) != ran["sha256"]:
        raise ResultsError(f"{path}: {bench} is not the benchmark that ran; {MEND}")
    return f"pass  {path}: ran on {bench}"


def check_checkpoint(folder: Path):
    """Every file that a checkpoint's manifest lists."""
    for name in read_manifest(folder)["files"]:
        yield f"pass  {folder / name}: as it was written"
