"""Ask every probe of a benchmark under a table of conditions and keep each answer as one row.

    python run_experiment.py --model smollm2-135m --adapter checkpoints/smollm2-deep --out results/smollm2-deep

What each condition does is in the table of conditions.py, what it tells in report_tables.MEANINGS. Rows go to OUT/predictions.jsonl as they come; OUT/run.json holds
everything needed to repeat the run, and what was begun and has not ended (unfinished). An interrupted run goes on with --resume. On several GPUs: torchrun --standalone --nproc-per-node N run_experiment.py ...
"""
from __future__ import annotations

import argparse
import time
from pathlib import Path

from tqdm import tqdm

import benchmark_file
from conditions import CONDITIONS, Condition, Texts, answer, check_lengths, plan, text_length
from decoding import kv_bytes_per_token
from halving import in_halves
from hardware import be_deterministic, hardware
from manifests import UserError, file_sha256, provenance, run_script, utc
from model_utils import Loaded, find_row, load_adapter, load_lora, load_model, pick_device, tuned_manifest
from parallel import Group, process_group
from results_files import MEMORYLESS, Rows, ask_into, only_run, open_folder

DEFAULT_CONDITIONS = "A_context,B_memory,C_nothing,D_distractor,A_distractor,B_swapped"


# ---- the run folder ----

def identity(arguments, loaded: Loaded, bench_sha: str, adapter_sha, tuned_sha) -> dict:
    """What must be equal for two runs to share one folder."""
    return {"model_sha256": loaded.sha256, "adapter_sha256": adapter_sha, "tuned_adapter_sha256": tuned_sha,
            "benchmark_sha256": bench_sha, "dtype": arguments.dtype}


def widest(earlier: dict, limit: int | None) -> int | None:
    """The limit that covers a folder's rows; None is everything, and a resumed run may ask for less than the first."""
    return None if limit is None or earlier and earlier["limit"] is None else max(limit, earlier.get("limit", 0))


def choose_conditions(names: str, with_adapter: bool, with_tuned: bool, levels) -> list[Condition]:
    chosen = []
    for name in dict.fromkeys(names.split(",")):
        if name not in CONDITIONS:
            raise UserError(f"--conditions {name}: unknown; use some of {','.join(CONDITIONS)}")
        condition = CONDITIONS[name]
        if condition.written and not with_adapter:
            raise UserError(f"--conditions {name}: needs --adapter; without one use A_context,C_nothing,A_distractor")
        if condition.tuned and not with_tuned:
            raise UserError(f"--conditions {name}: needs --tuned-adapter, a LoRA trained with --objective context")
        if set(condition.levels) & set(levels):
            chosen.append(condition)
    if not chosen:
        raise UserError(f"--conditions {names}: none of them has a level among {list(levels)}; see CONDITIONS in conditions.py")
    return chosen


def parse_list(text: str, allowed, name: str) -> tuple:
    values = tuple(type(allowed[0])(part) if part.isdecimal() or isinstance(allowed[0], str) else part for part in text.split(","))
    for value in values:
        if value not in allowed:
            raise UserError(f"{name} {text}: {value!r} is not one of {', '.join(map(str, allowed))}")
    return values


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is asked of whom")
    what.add_argument("--model", default="smollm2-135m", help="a row of `python model_utils.py`, a folder, or a hub id")
    what.add_argument("--adapter", help="checkpoint folder with fast weights, for everything that writes")
    what.add_argument("--tuned-adapter", help="checkpoint folder with the in-context LoRA, for A_tuned")
    what.add_argument("--benchmark", default="benchmark_v1.json", help="a file of the benchmark's shape")
    what.add_argument("--conditions", default=DEFAULT_CONDITIONS, help=f"comma-separated, of {','.join(CONDITIONS)} (default: %(default)s)")
    what.add_argument("--levels", default="1,2,3", help="comma-separated (default: %(default)s)")
    what.add_argument("--lang", help="comma-separated, en and zh (default: the languages of the model's row)")
    what.add_argument("--limit", type=int, help="only the first N samples of each level and language")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--out", help="results folder (default: results/<arm>)")
    how.add_argument("--resume", action="store_true", help="go on with the rows that OUT already holds")
    how.add_argument("--batch-size", type=int, default=64, help="probes per batch (default: %(default)s)")
    how.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    how.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    how.add_argument("--deterministic", action="store_true", help="only kernels that give the same bytes every time (default: the fastest ones)")
    return parser.parse_args()


def main() -> None:
    with process_group() as group:
        ask_benchmark(group)


def ask_benchmark(group: Group) -> None:
    arguments = parse_arguments()
    if arguments.deterministic:
        be_deterministic()
    started = time.time()
    row_ = find_row(arguments.model)
    levels = parse_list(arguments.levels, benchmark_file.LEVELS, "--levels")
    langs = parse_list(arguments.lang or ",".join(row_.langs), benchmark_file.LANGS, "--lang")
    conditions = choose_conditions(arguments.conditions, bool(arguments.adapter), bool(arguments.tuned_adapter), levels)
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: use 1 or more")
    bench = benchmark_file.load_benchmark(arguments.benchmark)
    samples = benchmark_file.select_samples(bench, levels, langs, arguments.limit)
    if not samples:
        raise UserError(f"{arguments.benchmark}: no sample of levels {arguments.levels} in {','.join(langs)}; choose others")
    group.take_gpu(arguments.device)
    device, dtype, reason = pick_device(arguments.device, arguments.dtype, row_)
    arguments.dtype = str(dtype).removeprefix("torch.")
    group.say(f"{row_.name} on {reason}")
    run(arguments, load_model(arguments.model, device, dtype), conditions, samples, bench, levels, langs, reason, started, group)


def run(arguments, loaded, conditions, samples, bench, levels, langs, reason, started, group: Group) -> None:
    base_parameters = loaded.parameters  # before a joint arm's LoRA is on it
    ttt, manifest = load_adapter(arguments.adapter, loaded) if arguments.adapter else (None, {})
    if manifest.get("lora"):
        alone = [c.name for c in conditions if c.name in MEMORYLESS]
        if alone:
            raise UserError(f"--conditions {alone[0]}: asks the base alone, and {arguments.adapter} has a LoRA on it (a joint arm); run "
                            "it without --adapter, and this arm with --conditions B_memory,B_swapped,B_merged_4,D_distractor,A_foreign")
    tuned = tuned_manifest(arguments.tuned_adapter, loaded) if arguments.tuned_adapter else None
    texts = Texts(bench, loaded.tokenizer)
    check_lengths(loaded.model, conditions, samples, texts)
    arm = manifest.get("arm", f"{loaded.row.name}-base")
    out = Path(arguments.out or f"results/{arm}")
    sha = lambda m: m and next(iter(m["files"].values()), None)
    mine = identity(arguments, loaded, file_sha256(arguments.benchmark), sha(manifest) or None, sha(tuned))
    with only_run(out, group):
        done, earlier = group.once(lambda: open_folder(out, arguments.resume, mine))
        together = lambda name, now: sorted({*earlier.get(name, []), *now})  # a resumed run may ask for more than the first
        report = {"arm": arm, "model": loaded.row.name, "model_sha256": loaded.sha256, "model_source": loaded.source,
                  "frozen": manifest.get("frozen", True), "objective": manifest.get("objective", "none"), "seed": manifest.get("seed"),
                  "snapshot_of": manifest.get("snapshot_of"), "conversations_seen": manifest.get("conversations_seen"),
                  "base_parameters": base_parameters, "kv_bytes_per_token": kv_bytes_per_token(loaded.model),
                  "adapter": arguments.adapter, "adapter_sha256": mine["adapter_sha256"],
                  "tuned_adapter": arguments.tuned_adapter, "tuned_adapter_sha256": mine["tuned_adapter_sha256"],
                  "benchmark": {"file": arguments.benchmark, "sha256": mine["benchmark_sha256"]},
                  "conditions": together("conditions", [c.name for c in conditions]),
                  "levels": together("levels", levels), "langs": together("langs", langs), "limit": widest(earlier, arguments.limit),
                  **provenance(), "hardware": hardware(loaded.device.type), "device": reason.split(",")[0], "processes": group.size,
                  "dtype": arguments.dtype, "batch_size": arguments.batch_size,
                  "ttt": manifest.get("ttt"), "identity": mine, "started": utc(started)}
        everything = plan(conditions, samples, set(), texts, arguments.batch_size)
        probes = [(job.condition.name, s["sample_id"], p["probe_id"]) for job in everything for s, asked in zip(job.samples, job.probes) for p in asked]
        place = {probe: number for number, probe in enumerate(probes)}  # of an earlier run that asked for more: before these
        request = {"conditions": [c.name for c in conditions], "levels": list(levels), "langs": list(langs), "limit": arguments.limit}
        rows = ask_into(out, report, request, earlier, len(done), started,
                        lambda rows_file: ask_everything(arguments, loaded, ttt, conditions, samples, texts, done, rows_file, group),
                        group, lambda r: place.get((r["condition"], r["sample_id"], r["probe_id"]), -1))
        group.say(f"{rows} rows in {out}; next: python evaluate.py {out}")


def ask_everything(arguments, loaded, ttt, conditions, samples, texts: Texts, done, rows_file: Rows, group: Group) -> None:
    """All jobs that are not done, the base's first and the LoRA's last; each process takes the next one that no other has."""
    jobs = plan(conditions, samples, done, texts, arguments.batch_size)
    # the bar counts tokens to run, not probes: a long text costs more than a short one
    cost = lambda job: sum(text_length(job.condition, s, texts) for s in job.samples) + 60 * sum(map(len, job.probes))
    with rows_file, tqdm(total=sum(map(cost, jobs)), unit="tok", unit_scale=True, smoothing=0.1, desc="answering", disable=not group.leads) as bar:
        for tuned in (False, True):
            mine = [job for job in jobs if job.condition.tuned == tuned]
            if tuned and mine:
                if ttt is not None:
                    ttt.detach()
                load_lora(arguments.tuned_adapter, loaded)
            for job, rows in in_halves(taken(mine, "tuned" if tuned else "base", group, cost, bar), lambda job: answer(loaded, ttt, job, texts), bar):
                rows_file.add(rows)


def taken(jobs, name: str, group: Group, cost, bar):
    """The jobs that fall to this process, of a list of that name. The bar stands at what somebody has taken before the one to come."""
    begun = 0
    for number in group.turns(name, len(jobs)):
        bar.update(sum(map(cost, jobs[begun:number])))
        begun = number
        yield jobs[number]
    bar.update(sum(map(cost, jobs[begun:])))


if __name__ == "__main__":
    run_script(main)
