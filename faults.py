"""Nothing lost: bring every fault of the table about, and say of each whether what must happen then happened.

    python faults.py                              everything, on a CPU: about an hour on a core of its own
    python faults.py --quick                      a few kills and cases of each
    python faults.py --only kill-train,hub --out results/faults/some.json
    python faults.py --list

The scripts run as they would be typed, on a tiny random model; what a fault spoils is a copy. Exit code 1 where a row fails. A row that this
machine cannot bring about (a disk of its own needs the kernel's namespaces) is said to be not run, and is no pass.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fault_files
import fault_fuzz
import fault_hostile
import fault_hub
import fault_processes
from fault_kit import Fault, Kit, NotHere
from hardware import hardware
from manifests import chosen, provenance, run_script, utc, write_json


@dataclass(frozen=True)
class Row:
    """One fault: what it is, what must happen, and check(kit), which returns what was seen or raises Fault or NotHere."""

    name: str
    fault: str
    must: str
    check: Callable[[Kit], str]


SAME = "resume ends as an uninterrupted run"
NAMED = "one clear error, earlier rows intact"
REFUSED = "refused, nothing executed, nothing overwritten"
HUB = "clear error, or retry with a limit"
ROWS = {row.name: row for row in (
    Row("kill-train", "kill -9 at random moments of train_minimal.py", f"{SAME}: the same weights, bit for bit", fault_processes.kill_train),
    Row("kill-experiment", "kill -9 at random moments of run_experiment.py", f"{SAME}: the same predictions, row for row", fault_processes.kill_experiment),
    Row("full-disk", "the disk is full", NAMED, fault_files.full_disk),
    Row("size-limit", "a file may not grow", NAMED, fault_files.size_limit),
    Row("read-only", "a folder that cannot be written", NAMED, fault_files.read_only),
    Row("removed", "a file removed while running", NAMED, fault_files.removed),
    Row("damage", "a row, checkpoint, benchmark, cache, adapter or memory cut short or with one bit changed", "detected by checksum, named, never used", fault_files.damage),
    Row("two-runs", "two runs in one results folder", "refused or kept apart", fault_processes.two_runs),
    Row("other-results", "results of another benchmark, adapter, commit or config", "refused or kept apart", fault_processes.other_results),
    Row("diverging", "NaN or diverging loss", "last good checkpoint kept, message with the mend", fault_processes.diverging),
    Row("no-memory", "out of memory", "batch halved where it can be, message with the mend", fault_processes.no_memory),
    Row("hostile-adapter", "hostile adapter: pickle, path tricks, oversized header, 10^9 rows", REFUSED, fault_hostile.hostile_adapter),
    Row("hostile-memory", "hostile memory file: the same, and forged content", REFUSED, fault_hostile.hostile_memory),
    Row("hostile-benchmark", "hostile benchmark: control characters, 1 MB strings, duplicate ids, bad unicode", REFUSED, fault_hostile.hostile_benchmark),
    Row("signals", "Ctrl-C, SIGTERM", "state saved, resume command printed", fault_processes.signals),
    Row("lost-modal", "lost connection to Modal", "resume command printed", fault_processes.lost_modal),
    Row("hub", "hub unreachable, slow, wrong revision, no token", HUB, fault_hub.hub),
    Row("hub-stalled", "a download that stops in the middle", HUB, fault_hub.hub_stalled),
    Row("offline", "offline runs", "never try the hub", fault_hub.offline),
    Row("deterministic", "same seed, same machine, same thread count", "the same bytes with --deterministic", fault_processes.deterministic),
    Row("fuzz", "any bytes to the parsers and loaders", "an error of one line, or what was written", fault_fuzz.fuzz),
    Row("soak", "thousands of conversations through one process", "flat memory", fault_fuzz.soak))}
LABEL = {"pass": "pass", "fail": "FAIL", "not run": "not run"}


def run_row(row: Row, kit: Kit) -> dict:
    """The row's result; what is unexpected in it is a failure of its own, with the place it came from."""
    begun = time.monotonic()
    try:
        verdict, seen = "pass", row.check(kit)
    except NotHere as why:
        verdict, seen = "not run", str(why)
    except Fault as fault:
        verdict, seen = "fail", str(fault)
    except Exception as error:
        verdict, seen = "fail", f"{type(error).__name__}: {error} ({traceback.extract_tb(error.__traceback__)[-1].name})"
    return {"name": row.name, "fault": row.fault, "must": row.must, "verdict": verdict, "seen": seen, "seconds": round(time.monotonic() - begun, 1)}


def show(result: dict) -> None:
    print(f"{LABEL[result['verdict']]:8s}{result['name']:18s}{result['fault']}: {result['must']}  ({result['seconds']:.0f} s)")
    print(textwrap.indent(textwrap.fill(result["seen"], 140), " " * 26), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ROWS), help="rows, comma-separated (default: all of --list)")
    parser.add_argument("--quick", action="store_true", help="a few kills and cases of each row")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of kills, of what is damaged, of the cases (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the table and where it was made (default: it is only printed)")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    arguments = parser.parse_args()
    arguments.only = chosen("--only", arguments.only, ROWS)
    return arguments


def main() -> None:
    arguments, started = parse_arguments(), time.time()
    if arguments.list:
        print("\n".join(f"{name:18s}{ROWS[name].fault}: {ROWS[name].must}" for name in arguments.only))
        return
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    made, results = provenance(), []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        kit = Kit(Path(folder), arguments.quick, arguments.seed)
        try:
            for name in arguments.only:
                results.append(run_row(ROWS[name], kit))
                show(results[-1])
                count = {verdict: sum(result["verdict"] == verdict for result in results) for verdict in LABEL}
                if arguments.out:  # after each row, because they take minutes
                    write_json(arguments.out, {"quick": arguments.quick, "seed": arguments.seed, **made, "hardware": hardware("cpu"), "started": utc(started),
                                               "ended": utc(time.time()), "count": count, "rows": results})
        except KeyboardInterrupt:
            print(f"\ninterrupted; the rest: python faults.py --only {','.join(arguments.only[len(results):])}", file=sys.stderr)
            sys.exit(130)
    print(", ".join(f"{number} {LABEL[verdict]}" for verdict, number in count.items()))
    sys.exit(1 if count["fail"] else 0)


if __name__ == "__main__":
    run_script(main)
