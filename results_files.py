"""Folders of results: opening one for more rows, reading run.json, predictions.jsonl and train.jsonl, grouping runs into arms.

Every defect raises an error of one line that names the file, the line or field, and the mend.
"""
import fcntl
import hashlib
import json
import os
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import benchmark_file
from manifests import UserError, cost_usd, current_commit, naming, put_back, replacing, utc, write_json

RUN_FIELDS = {"arm": (str,), "model": (str,), "frozen": (bool,), "objective": (str,), "seed": (int, type(None)),
              "adapter": (str, type(None)), "benchmark": (dict,), "conditions": (list,), "levels": (list,),
              "langs": (list,), "commit": (str,), "command": (str,), "versions": (dict,), "device": (str,),
              "dtype": (str,), "complete": (bool,), "rows": (int,)}
LONG_RUN_FIELDS = {"arm": (str,), "model": (str,), "modes": (list,), "tasks": (list,), "lengths": (list,), "left_out": (list,), "window": (int,), "commit": (str,),
                   "command": (str,), "device": (str,), "identity": (dict,), "complete": (bool,), "adapter": (str, type(None)), "rows": (int,)}  # of run_long.py
ROW_FIELDS = {"sample_id": (str,), "level": (int,), "lang": (str,), "probe_id": (str,), "condition": (str,),
              "gold": (str,), "aliases": (list,), "prediction": (str,), "update_norm": (float, int, type(None)),
              "category": (str,), "position": (str, type(None))}
ROW_KEY = {"condition": (str,), "sample_id": (str,), "probe_id": (str,)}  # what tells one row of a folder from the others
CURVE_FIELDS = {"update": (int,), "loss": (float, int), "token_accuracy": (float, int)}
POSITIONS = ("front", "middle", "back")

SCALES = ("0.01", "0.1", "0.3", "3", "10")  # what the update, or noise of its norm, is multiplied by
# the lines of em_by_scale.png: what is scaled, and its conditions
SCALED = (("memory", ("B_memory", *(f"B_scale_{factor}" for factor in SCALES))),
          ("random update of its norm", ("N_noise", *(f"N_scale_{factor}" for factor in SCALES))))
ON_CURVES = ("D_512", "D_1024", "D_2048", "B_rank_1", "B_rank_4", "B_rank_16", "B_rank_64", "B_half",  # in no figure but memory_curves.png and em_by_scale.png
             *(name for _, (_, *names) in SCALED for name in names))
CONDITIONS = ("A_context", "A_distractor", "A_tuned", "B_memory", "C_nothing", "B_swapped", "D_distractor",
              "B_merged_2", "B_merged_4", "B_merged_8", "P_paper", "N_noise", "A_foreign", *ON_CURVES)  # the order in tables and figures
# what stands along each curve of memory_curves.png: (what is varied, level, ((label, condition), ...))
CURVES = (("conversations in one memory", 1, (("1", "B_memory"), ("2", "B_merged_2"), ("4", "B_merged_4"), ("8", "B_merged_8"))),
          ("tokens of unrelated text written after", 3, (("0", "B_memory"), ("512", "D_512"), ("1,024", "D_1024"), ("2,048", "D_2048"),
                                                         ("all", "D_distractor"))),
          ("rank kept of each layer's update\n(half: all of it in half precision)", 1, (("1", "B_rank_1"), ("4", "B_rank_4"), ("16", "B_rank_16"), ("64", "B_rank_64"),
                                                                                       ("half", "B_half"), ("all", "B_memory"))))

MEMORYLESS = ("A_context", "A_distractor", "A_tuned", "C_nothing")  # answers that do not depend on the fast weights


class ResultsError(UserError):
    """Results that cannot be scored or gone on with; the message is one line."""


# ---- what keeps a folder's rows ----

SUMS = "predictions.sums"  # of a run under way: a line for each block of rows, "bytes of the file up to its end, their SHA-256"


@contextmanager
def only_run(out, group):
    """Hold a results folder for the processes of a parallel.Group; UserError while another run holds it. The lock is the kernel's and ends
    with the last of them, killed or not."""
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)

    def hold():
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if group.size > 1:  # nobody else had it; from here on each of the group has a share
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another run is writing into it now; wait until it ends, or name another --out") from None

    try:
        group.once(hold)
        if not group.leads:
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)


def check_sums(folder, run):
    """The bytes of predictions.jsonl that are vouched for, None where the folder keeps no hash of them.

    The run.json of a run that ended has the file's SHA-256. One under way has SUMS, in which a block's line stands before its rows do: a kill leaves
    rows that are cut, which are not counted. ResultsError for bytes that are not those that were written.
    """
    path, sums = folder / "predictions.jsonl", folder / SUMS
    mend = f"restore {path}, or remove {folder} and run again"
    try:
        rows = path.read_bytes()
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}; {mend}") from None
    if "rows_sha256" in run:
        if hashlib.sha256(rows).hexdigest() != run["rows_sha256"]:
            raise ResultsError(f"{path}: cut short or changed (its SHA-256 is not that in run.json); {mend}")
        return len(rows)
    if not sums.is_file():
        return None
    lines = sums.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    if f"{len(rows)} {hashlib.sha256(rows).hexdigest()}" in lines:  # also of rows that were put in order, where earlier lines are of another one
        return len(rows)
    seen, end = hashlib.sha256(), 0
    for line in lines:
        size, _, sha = line.partition(" ")
        if not size.isdecimal() or int(size) < end:
            raise ResultsError(f"{sums}: changed ({line[:80]!r} is no line of it); {mend}")
        if int(size) > len(rows):
            break
        seen.update(rows[end:int(size)])
        if seen.hexdigest() != sha:
            first = rows[:end].count(b"\n") + 1
            raise ResultsError(f"{path}: changed in the rows from line {first} on (their SHA-256 is not that in {SUMS}); {mend}")
        end = int(size)
    return end


class Rows:
    """predictions.jsonl of a run under way, appended to block by block as a context, and its sums, which are there from the beginning.

    Several processes of a run append to one file, a block at a time each. begin: whether this is the one that opened the folder.
    """

    def __init__(self, out, begin=True):
        self.paths = path, sums = out / "predictions.jsonl", out / SUMS
        self.hash, self.size = hashlib.sha256(), 0
        if begin:
            self._take(path.read_bytes() if path.exists() else b"")
            with replacing(sums) as part:
                part.write_bytes(self._line())

    def _take(self, block):
        self.hash.update(block)
        self.size += len(block)

    def _line(self):
        return f"{self.size} {self.hash.hexdigest()}\n".encode()

    def add(self, rows):
        """Append rows as one block; its sum goes to the disk first. UserError where one of the files is no longer there: what it held is put back."""
        for file, path in zip((self.sums, self.file), reversed(self.paths)):
            put_back(file, path)
        block = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode("utf-8")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        try:
            self._catch_up()
            self._take(block)
            for file, path, written in zip((self.sums, self.file), reversed(self.paths), (self._line(), block)):
                with naming(path):
                    file.write(written)
                    file.flush()
        finally:
            fcntl.flock(self.file, fcntl.LOCK_UN)

    def _catch_up(self):
        """Take in what other processes of the run have added."""
        path, sums = self.paths
        lines = sums.read_bytes()
        if not lines.endswith(self._line()):
            with path.open("rb") as file:
                file.seek(self.size)
                self._take(file.read())
            if not lines.endswith(self._line()):
                raise ResultsError(f"{path}: a process of this run ended while it wrote its rows; go on with --resume")

    def put_in_order(self, place):
        """Sort the rows by place(row), those alike as they stand, after all processes have added theirs; returns (how many, SHA-256 of the file).
        A kill on the way leaves the one order or the other, and a sum for both."""
        path, sums = self.paths
        self._catch_up()
        rows = path.read_bytes()
        ordered = b"".join(sorted(rows.splitlines(keepends=True), key=lambda line: place(json.loads(line))))
        if ordered != rows:
            self.hash = hashlib.sha256(ordered)
            with naming(sums), sums.open("ab") as file:
                file.write(self._line())
            with replacing(path) as part:
                part.write_bytes(ordered)
        return ordered.count(b"\n"), self.hash.hexdigest()

    def __enter__(self):
        self.file, self.sums = (path.open("a+b") for path in self.paths)
        return self

    def __exit__(self, *error):
        with naming(self.paths[0]):  # closing tries once more to write what a full disk refused
            self.file.close()
        with naming(self.paths[1]):
            self.sums.close()


def covers(request, other):
    """Whether a request asks at least what the other does: of each list all that the other has, and no smaller number (None: no limit)."""
    wide = lambda one, two: one is None or two is not None and (set(two) <= set(one) if isinstance(one, list) else two <= one)
    return request.keys() == other.keys() and all(wide(request[name], other[name]) for name in request if name != "command")


def ask_into(out, report, request, earlier, done, started, ask, group, place=lambda row: 0):
    """Keep in a folder the rows that ask(rows_file) adds, each process of a parallel.Group its own; returns how many there then are, with the
    `done` before.

    request: what of the folder's rows this call asks, by name: lists, and numbers that are limits; earlier: the folder's run.json before it. What
    was begun and has not ended stands in `unfinished`, so that a run is complete only when nothing of it is missing.
    run.json (`report`) is written before and after; started: seconds since the epoch. place(row): by what the rows are sorted at the end (as they
    came). Ctrl-C, and what is taken for it, ends the process with the command that goes on.
    """
    request = {"command": report["command"].replace(" --resume", "") + " --resume"} | request
    others = [other for other in earlier.get("unfinished", []) if not covers(request, other)]
    report = report | {"unfinished": [*others, request]}
    rows_file = Rows(out, begin=group.leads)
    # the sums were written before run.json loses the hash of a finished run
    group.once(lambda: write_json(out / "run.json", report | {"seconds": 0.0, "cost_usd": cost_usd(0.0), "complete": False, "rows": done}))
    try:
        ask(rows_file)
        group.wait()
    except KeyboardInterrupt:
        if group.speaks():
            print(f"\ninterrupted: the answers so far are in {out}; go on with\n  {request['command']}", file=sys.stderr)
        sys.exit(130)

    def end():
        count, sha = rows_file.put_in_order(place)
        ended = time.time()
        seconds = round(ended - started, 1)  # of this process, and so is its cost
        write_json(out / "run.json", report | {"seconds": seconds, "cost_usd": cost_usd(seconds), "ended": utc(ended), "complete": not others, "rows": count,
                                               "rows_sha256": sha, "unfinished": others})
        (out / SUMS).unlink()
        for other in others:
            print(f"{out} was begun with more, which is not finished; go on with\n  {other['command']}")
        return count

    return group.once(end)


def open_folder(out, resume, mine):
    """Check the results folder; returns the (condition, sample, probe) it already answers, and its run.json."""
    rows_file, run_file = out / "predictions.jsonl", out / "run.json"
    if not rows_file.exists():
        out.mkdir(parents=True, exist_ok=True)
        return set(), {}
    if not resume:
        raise UserError(f"{out}: already holds results; add --resume to go on with them, or name another --out")
    mend = f"restore the file, or remove {out} and run again"
    earlier = parse_object(read_text(run_file, mend), run_file, {}, mend) if run_file.is_file() else {}
    for name, value in mine.items():
        if earlier.get("identity", {}).get(name) != value:
            raise UserError(f"{out}: its results come from another {name.removesuffix('_sha256')} "
                            f"({str(earlier.get('identity', {}).get(name))[:12]}, now {str(value)[:12]}); name another --out")
    now = current_commit()
    if str(earlier.get("commit", now)).removesuffix("-dirty") != now.removesuffix("-dirty"):  # rows of a tracked folder make the checkout dirty by themselves
        raise UserError(f"{out}: its results come from another commit ({earlier['commit']}, now {now}); check that one out, or name another --out")
    vouched, text = check_sums(out, earlier), rows_file.read_bytes()
    if vouched is None:
        print(f"{rows_file}: no hash of its rows was kept, so they are gone on with unchecked", file=sys.stderr)
    if vouched not in (None, len(text)) or not text.endswith(b"\n"):  # rows cut short by a kill: never whole, so they are asked again
        text = text[:text.rfind(b"\n") + 1 if vouched is None else vouched]
        os.truncate(rows_file, len(text))
    rows = [row for _, row in read_lines(rows_file, ROW_KEY, mend)]
    return {tuple(row[name] for name in ROW_KEY) for row in rows}, earlier


def find_runs(folders):
    """Run folders: those named, or all under results/ that hold a run.json or predictions.jsonl."""
    if folders:
        return [Path(folder) for folder in folders]
    found = {path.parent for name in ("run.json", "predictions.jsonl") for path in Path("results").glob(f"*/{name}")}
    if not found:
        raise ResultsError("results/: holds no run; make one with python run_experiment.py, or name run folders")
    return sorted(found)


def condition_order(name):
    """Sort key: the known conditions in their order, then others by name."""
    return CONDITIONS.index(name) if name in CONDITIONS else len(CONDITIONS), name


def read_text(path, mend, size=None):
    """The file's first `size` bytes (None: all) as text; ResultsError where it is none."""
    try:
        return path.read_bytes()[:size].decode("utf-8")  # bytes, so that line ends stay as they are
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}; {mend}") from None
    except UnicodeDecodeError as error:
        raise ResultsError(f"{path}: not UTF-8 (byte {error.start}); {mend}") from None


def parse_object(text, where, fields, mend):
    """A JSON object that has all the fields with the right types."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{where}: not JSON ({error}); {mend}") from None
    if type(value) is not dict:
        raise ResultsError(f"{where}: not a JSON object; {mend}")
    for name, types in fields.items():
        if name not in value:
            raise ResultsError(f"{where}: field '{name}' is missing; {mend}")
        if type(value[name]) not in types:
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise ResultsError(f"{where}: field '{name}' is {value[name]!r}, must be {wanted}; {mend}")
    return value


def _no_constant(name):
    raise ValueError(f"{name} is not a JSON number")


def read_lines(path, fields, mend, size=None):
    """The objects of a JSONL file with where each stands ("FILE line N"). size: of its first bytes (check_sums says how many a kill left whole)."""
    lines = read_text(path, mend, size).split("\n")  # not splitlines: an answer may hold another kind of line separator
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, 1):
        where = f"{path} line {number}"
        yield where, parse_object(line, where, fields, mend)


def load_run(folder, allow_incomplete):
    """run.json as a dict, with "name" (the folder's), "path" and "predictions" (the rows of predictions.jsonl).

    Each row also gets "seed" (the run's) and "where" (file and line, for messages).
    """
    path, predictions = folder / "run.json", folder / "predictions.jsonl"
    mend = f"run run_experiment.py again into {folder}, or take the folder out of the report"
    run = parse_object(read_text(path, mend), path, RUN_FIELDS, mend)
    for name in ("file", "sha256"):
        if type(run["benchmark"].get(name)) is not str:
            raise ResultsError(f"{path}: field 'benchmark.{name}' is missing or no text; {mend}")
    if not run["complete"] and not allow_incomplete:
        raise ResultsError(f"{path}: field 'complete' is false, the run was not finished; finish it with "
                           "run_experiment.py --resume (field 'unfinished' has the commands), or pass --allow-incomplete to score it as partial")
    rows = [row | {"seed": run["seed"], "where": where} for where, row in read_lines(predictions, ROW_FIELDS, mend, check_sums(folder, run))]
    check_rows(rows, run, predictions, mend)
    return run | {"name": folder.resolve().name, "path": path, "predictions": rows}


def check_rows(rows, run, path, mend):
    """What the types do not show: allowed values, no row twice, none missing."""
    allowed = {"level": (1, 2, 3), "lang": benchmark_file.LANGS, "category": benchmark_file.CATEGORIES,
               "position": (*POSITIONS, None), "condition": run["conditions"]}
    seen = {}
    for row in rows:
        for name, values in allowed.items():
            if row[name] not in values:
                raise ResultsError(f"{row['where']}: field '{name}' is {row[name]!r}, must be one of "
                                   f"{', '.join(map(str, values))}; {mend}")
        other = seen.setdefault((row["condition"], row["sample_id"], row["probe_id"]), row)
        if other is not row:
            raise ResultsError(f"{row['where']}: condition {row['condition']}, probe {row['probe_id']} is there "
                               f"a second time (first: {other['where']}); {mend}")
    if not rows:
        raise ResultsError(f"{path}: holds no row; {mend}")
    if run["complete"] and len(rows) != run["rows"]:
        raise ResultsError(f"{path}: has {len(rows)} rows, but run.json says {run['rows']}; {mend}")


def load_curves(runs):
    """Training logs of the runs' adapters: {label: rows of train.jsonl}, and a note for each log not found."""
    mend, curves, notes = "train the arm again, or remove the file", {}, []
    folders = {run.get(field): run for run in runs for field in ("tuned_adapter", "adapter") if run.get(field)}
    for folder, run in sorted(folders.items()):
        path = Path(folder) / "train.jsonl"
        name = path.parent.name + (f" (seed {run['seed']})" if run["seed"] else "")  # an arm's seeds lie in folders of one name
        if path.is_file():
            curves[f"{name} on {run['model']}"] = [row for _, row in read_lines(path, CURVE_FIELDS, mend)]
        else:
            notes.append(f"{path}: no such file, so no training curve of {name}")
    return {label: rows for label, rows in curves.items() if rows}, notes


def group_arms(runs):
    """Runs by (model, arm), in that order; refuses runs that cannot stand in one report."""
    first, arms, owner = runs[0], defaultdict(list), {}
    for run in runs:
        if run["benchmark"]["sha256"] != first["benchmark"]["sha256"]:
            raise ResultsError(f"{run['path']}: ran on another benchmark ({run['benchmark']['file']}) than "
                                  f"{first['path']} ({first['benchmark']['file']}); score them apart, "
                                  "naming the run folders and --out")
        for other in arms[run["model"], run["arm"]]:
            refuse_mixture(run, other)
        arms[run["model"], run["arm"]].append(run)
        for part in sorted({(row["condition"], row["level"], row["lang"]) for row in run["predictions"]}):
            key = (run["arm"], run["model"], run["seed"], *part)
            if owner.setdefault(key, run) is not run:
                raise ResultsError(f"{run['path']}: {part[0]} level {part[1]} {part[2]} of arm {run['arm']}, seed "
                                      f"{run['seed']} is also in {owner[key]['path']}; remove one of the folders")
    return dict(sorted(arms.items()))


def refuse_mixture(run, other):
    """The runs of one arm must be the same thing but for the seed; those of one seed the same adapter."""
    names = ["frozen", "objective", "model_sha256"] + ["adapter_sha256"] * (run["seed"] == other["seed"])
    for name in names:
        if run.get(name) != other.get(name):
            raise ResultsError(f"{run['path']}: field '{name}' is {run.get(name)!r}, but {other.get(name)!r} in "
                                  f"{other['path']} of the same arm {run['arm']}; give the arms different names")


def lend_rows(arms):
    """Give each memory arm the memoryless conditions it did not run, language by language, from another arm on the same base.

    The base's own answers are the same whatever fast weights stand beside it, so they need not be asked again for every
    arm. Adds the lender's rows under the borrower's seed; returns {(model, arm): {condition: lenders' arms, sorted}}. Of several
    lenders the one that covers most of the arm's levels, then the one with the highest EM: a fair ceiling is that of the LoRA that reads best.
    """
    own = [(run, list(run["predictions"])) for runs in arms.values() for run in runs]
    borrowed = defaultdict(dict)
    for key, runs in arms.items():
        for seed in sorted({run["seed"] for run in runs if run["adapter"]}, key=str):
            mine = [run for run in runs if run["seed"] == seed]
            have = [row for run, rows in own if any(run is other for other in mine) for row in rows]
            for condition in sorted(set(MEMORYLESS) - {row["condition"] for row in have}):
                for lang in sorted({row["lang"] for row in have}):
                    lenders = lenders_of(condition, {(row["level"], lang) for row in have}, mine[0], own)
                    if lenders:
                        run, rows = max(lenders, key=worth_lending)
                        mine[0]["predictions"] += [row | {"seed": seed} for row in rows]
                        borrowed[key][condition] = sorted({*borrowed[key].get(condition, []), run["arm"]})
    return borrowed


def lenders_of(condition, parts, borrower, own):
    """(run, its rows of a condition in these levels of a language) of every run on the borrower's base, in its dtype and for as many
    samples, that has any."""
    alike = [(run, rows) for run, rows in own if all(run.get(name) == borrower.get(name) for name in ("model_sha256", "dtype", "limit"))]
    found = [(run, [row for row in rows if row["condition"] == condition and (row["level"], row["lang"]) in parts]) for run, rows in alike]
    return [(run, rows) for run, rows in found if rows]


def worth_lending(lender):
    """By what a (run, rows) is chosen: how many levels it covers, then its EM."""
    _, rows = lender
    return len({row["level"] for row in rows}), sum(row["em"] for row in rows) / len(rows)


def shown_arms(arms):
    """The arms that tables and figures show, those with a memory first.

    A base's own run is left out where another arm of that base shows all of its conditions as lent rows.
    """
    repeated = {(arm["model"], lender["arm"]) for arm in arms for lender in arms
                if lender["model"] == arm["model"] and set(lender["conditions"]) <= {
                    condition for condition, names in arm["borrowed"].items() if lender["arm"] in names}}
    return sorted((arm for arm in arms if (arm["model"], arm["arm"]) not in repeated), key=lambda arm: "B_memory" not in arm["conditions"])
