"""The stages of the pipeline: scripts run one after the other, a record of what they made, and what they cost. Nothing here knows of Modal.

A record is kept under the hash of everything that decides the result: the command lines, the code, and what the stage reads. While what it made is
there unchanged, the stage is finished and need not run again.
"""
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from manifests import UserError, file_sha256, write_json

BENCHMARK = "benchmark_v1.json"
SMALL = "--conversations 4 --form plain"  # training that shows whether the scripts run, and no more
KEPT = "stages"    # folder of the records, one file each: two writers never share one
LAST_LINES = 200   # of a stage's output that its record keeps

# USD a second, as listed on https://modal.com/pricing between July and October 2026. Prices move: look before a long run.
GPU_PRICES = {"T4": 0.000164, "L4": 0.000222, "A10": 0.000306, "A10G": 0.000306, "L40S": 0.000542, "A100-40GB": 0.000583,
              "A100-80GB": 0.000694, "RTX-PRO-6000": 0.000842, "H100": 0.001097, "H200": 0.001261, "B200": 0.001736}
CORE_PRICE, GIB_PRICE = 0.0000131, 0.00000222  # per physical core and per GiB of memory


@dataclass(frozen=True)
class Stage:
    """commands: (script, argument, ...) each, run in one folder. reads, makes: files and folders in it, by name."""

    name: str
    commands: tuple
    reads: tuple = ()
    makes: tuple = ()


def parts(items, number):
    """The items in order as `number` runs of like length, of one item or more."""
    number = min(number, len(items))
    return [tuple(items[len(items) * i // number:len(items) * (i + 1) // number]) for i in range(number)]


def split(levels, langs, shards):
    """At most `shards` pairs (levels, langs) that together are all of them: languages first, then levels."""
    by_lang = parts(langs, shards)
    return [(part, own) for own in by_lang for part in parts(levels, max(1, shards // len(by_lang)))]


# ---- finished or not ----

@functools.cache
def code_sha256(folder, names):
    """One hash over files and folders of the project that decide results."""
    return hashlib.sha256(json.dumps(hashes(folder, names)).encode()).hexdigest()


def hashes(folder, names):
    """{path: SHA-256} of these files and of all files in these folders; what is not there is left out."""
    found = [path for name in names for path in (sorted((folder / name).rglob("*")) if (folder / name).is_dir() else [folder / name])]
    return {str(path.relative_to(folder)): file_sha256(path) for path in found if path.is_file()}


def record_path(stage, folder, code):
    decides = json.dumps([stage.name, [list(map(str, command)) for command in stage.commands], code, hashes(folder, stage.reads)])
    return folder / KEPT / f"{hashlib.sha256(decides.encode()).hexdigest()[:24]}.json"


def finished(stage, folder, code):
    """The record of a stage that was run with the same inputs and whose files are as it left them; else None."""
    path = record_path(stage, folder, code)
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    return kept["record"] if kept["made"] == hashes(folder, stage.makes) else None


def keep(stage, folder, code, record):
    (folder / KEPT).mkdir(exist_ok=True)
    write_json(record_path(stage, folder, code), {"made": hashes(folder, stage.makes), "record": record})


# ---- the stages ----

def experiment_command(model, arm, tuned_arm, conditions, levels, langs, limit, out):
    """The command line of run_experiment.py; limit 0 is the whole benchmark, no langs are the model's own."""
    command = ["run_experiment.py", "--model", model, "--adapter", f"checkpoints/{arm}", "--benchmark", BENCHMARK,
               "--out", out, "--conditions", conditions, "--resume"]
    command += ["--levels", levels] if levels else []
    command += ["--lang", langs] if langs else []
    command += ["--tuned-adapter", f"checkpoints/{tuned_arm}"] if "A_tuned" in conditions.split(",") else []
    return command + (["--limit", limit] if limit else [])


def train_command(model, objective, arm, updates, seed, training):
    """The command line of train_minimal.py; 0 updates leave the number to the script's own default. training: more of its options, as one text."""
    command = ["train_minimal.py", "--model", model, "--objective", objective, "--arm", arm, "--seed", seed, "--resume"]
    return command + (["--updates", updates] if updates else []) + shlex.split(training)


def build_stage():
    return Stage("build", (("build_benchmark.py", "--out", BENCHMARK), ("build_benchmark.py", "--check", BENCHMARK)), makes=(BENCHMARK,))


def weights_stage(model):
    return Stage(f"weights {model}", (("model_utils.py", model),))


def preflight_stage(conditions, langs):
    tuned = [train_command("tiny-llama", "context", "tiny-tuned", 2, 0, SMALL)] if "A_tuned" in conditions.split(",") else []
    return Stage("preflight", (("sanity.py", "--tiny"), train_command("tiny-llama", "recall", "tiny-recall", 2, 0, SMALL), *tuned,
                               experiment_command("tiny-llama", "tiny-recall", "tiny-tuned", conditions, "", langs, 1, "results/tiny"),
                               ("evaluate.py", "results/tiny", "--out", "results/tiny")))


def train_stage(model, objective, arm, updates, seed, training):
    return Stage(f"train {arm}", (train_command(model, objective, arm, updates, seed, training),), makes=(f"checkpoints/{arm}",))


def sanity_stage(model, arm):
    return Stage("sanity", (("sanity.py", "--model", model, "--adapter", f"checkpoints/{arm}"),), reads=(f"checkpoints/{arm}",))


def shard_folder(run, condition, levels, langs):
    """Of one shard: two containers never write the same file."""
    return f"results/{run}-{condition}-{levels.replace(',', '')}-{langs.replace(',', '-')}"


def condition_stage(condition, levels, langs, model, arm, tuned_arm, run, limit):
    out = shard_folder(run, condition, levels, langs)
    command = experiment_command(model, arm, tuned_arm, condition, levels, langs, limit, out)
    return Stage(f"{condition} {levels} {langs}", (command,), (f"checkpoints/{arm}", f"checkpoints/{tuned_arm}"), (out,))


def evaluate_stage(run, folders):
    out = f"results/{run}"
    return Stage("evaluate", (("evaluate.py", *folders, "--out", out),), folders, (f"{out}/report.json", f"{out}/figures"))


def plan_shards(model, conditions, langs, shards):
    """[(condition, levels, langs)], the two as comma-separated text; UserError for a name that is not there."""
    from conditions import CONDITIONS as table  # here, because it imports torch, which the caller's machine need not have
    from model_utils import find_row
    unknown = [name for name in conditions if name not in table]
    if unknown:
        raise UserError(f"--conditions {unknown[0]}: unknown; use some of {','.join(table)}")
    chosen = tuple(langs.split(",")) if langs else find_row(model).langs
    return [(name, ",".join(map(str, levels)), ",".join(own)) for name in conditions for levels, own in split(table[name].levels, chosen, shards)]


# ---- running ----

class Refused(RuntimeError):
    """A script that ended with 2: what it was asked cannot be done, so that asking again is of no use."""


def run_script(code_folder, folder, script, *arguments, usd_per_second=None):
    """Run one script of code_folder in `folder`, its output passed on line by line. Returns the lines. usd_per_second: for its manifest's cost.

    Raises RuntimeError with the script's last line when it fails, Refused where the command line or a file is to blame.
    """
    command = [sys.executable, str(code_folder / script), *map(str, arguments)]
    rate = {} if usd_per_second is None else {"TTT_USD_PER_SECOND": str(usd_per_second)}
    print("$ python", script, *arguments, flush=True)
    lines = []
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          encoding="utf-8", errors="replace", env=os.environ | rate) as process:
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line.rstrip())
        except BaseException:  # preemption and Ctrl-C arrive here: let the script save what it has
            process.send_signal(signal.SIGINT)
            process.wait(timeout=25)
            raise
    if process.returncode:
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        error = Refused if process.returncode == 2 else RuntimeError
        raise error(f"{script} stopped with exit code {process.returncode}: {last}")
    return lines


def gpu_name():
    """What the driver calls the GPU of this container, "none" without one."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


def run(stage, code_folder, folder, reserved):
    """Run the stage's commands; its record, for the cost table and the caller. reserved: {"cpu": cores, "memory": MiB}."""
    start = time.perf_counter()
    machine = {"gpu": gpu_name(), "cores": reserved["cpu"], "gib": reserved["memory"] / 1024}
    rate = cost_of(machine | {"seconds": 1})
    lines = [line for command in stage.commands for line in run_script(code_folder, folder, *command, usd_per_second=rate)]
    return {"stage": stage.name, **machine, "seconds": round(time.perf_counter() - start, 1), "lines": lines[-LAST_LINES:]}


# ---- cost ----

def price_of(gpu):
    """USD a second of the GPU that the driver calls `gpu`: 0 for "none", None when it is not in the table."""
    if gpu == "none":
        return 0.0
    words = set(re.split(r"[ -]", gpu.upper()))
    return next((price for name, price in GPU_PRICES.items() if set(name.split("-")) <= words), None)


def cost_of(record):
    """USD of one stage: seconds × (GPU + reserved cores + reserved memory); None when the GPU's price is not known."""
    gpu = price_of(record["gpu"])
    if gpu is None:
        return None
    return record["seconds"] * (gpu + record["cores"] * CORE_PRICE + record["gib"] * GIB_PRICE)


def cost_table(records):
    """The table printed at the end, as text."""
    costs = [cost_of(record) for record in records]
    rows = [f"{'stage':<36} {'GPU':<28} {'seconds':>9} {'USD':>9}"]
    for record, cost in zip(records, costs):
        shown = "already" if record.get("earlier") else "no price" if cost is None else f"{cost:.4f}"
        rows.append(f"{record['stage']:<36} {record['gpu']:<28} {record['seconds']:>9.1f} {shown:>9}")
    total = sum(cost for cost in costs if cost is not None)
    rows.append(f"{'total':<65} {sum(record['seconds'] for record in records):>9.1f} {total:>9.4f}")
    rows.append("Seconds inside the functions, at list prices; container starts, retries and storage come on top.")
    return "\n".join(rows)
