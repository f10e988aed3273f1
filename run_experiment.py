"""Ask every probe of a benchmark under a table of conditions and keep each answer as one row.

    python run_experiment.py --model smollm2-135m --adapter checkpoints/smollm2-deep --out results/smollm2-deep

What each condition does is in the CONDITIONS table below, what it tells in report_tables.MEANINGS. Rows go to OUT/predictions.jsonl as they come; OUT/run.json holds
everything needed to repeat the run. An interrupted run goes on with --resume.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
import zlib
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

import benchmark_file
import prompts
from decoding import check_window, greedy, prefill, write_rows
from in_place_ttt import InPlaceTTT
from manifests import UserError, file_sha256, provenance, read_manifest, run_script, write_json
from memory import Memory
from model_utils import Loaded, check_base, find_row, load_adapter, load_lora, load_model, pick_device
from results_files import MEMORYLESS, SCALES, open_folder

MAX_NEW_TOKENS = 24       # the longest gold answer is about half of this in every tokenizer of the table
MAX_BATCH_TOKENS = 16384  # padded tokens of one batch of long texts; bounds the memory a batch takes


@dataclass(frozen=True)
class Condition:
    """One way to answer a probe. `written` and `shown` name texts of a sample; None means nothing."""

    name: str
    levels: tuple[int, ...]
    written: str | None = None     # conversation, distractor (conversation + distractor), swapped, merged, noise
    shown: str | None = None       # conversation, distractor: the text in the prompt
    one_pass: bool = False         # the shown text is itself written, chunk by chunk, and stays in context
    merge: int = 1                 # conversations written one after the other into one memory
    tuned: bool = False            # answered by the base with the LoRA that was trained to read in context
    distractor_tokens: int | None = None  # of the distractor only so many tokens; None: all
    rank: int | None = None        # each layer's update is cut to its best approximation of this rank; None: not cut
    scale: float = 1.0             # the update, or the noise of its norm, times this


CONDITIONS = {c.name: c for c in (
    Condition("A_context", (1, 2, 3), shown="conversation"),
    Condition("A_distractor", (3,), shown="distractor"),
    Condition("A_tuned", (1, 2, 3), shown="conversation", tuned=True),
    Condition("B_memory", (1, 2, 3), written="conversation"),
    Condition("C_nothing", (1, 2, 3)),
    Condition("D_distractor", (3,), written="distractor"),
    Condition("B_swapped", (1, 2, 3), written="swapped"),
    Condition("B_merged_2", (1,), written="merged", merge=2),
    Condition("B_merged_4", (1,), written="merged", merge=4),
    Condition("B_merged_8", (1,), written="merged", merge=8),
    Condition("P_paper", (1, 2, 3), written="conversation", shown="conversation", one_pass=True),
    Condition("N_noise", (1, 2), written="noise"),
    Condition("A_foreign", (1, 2, 3), written="swapped", shown="conversation"),
    *(Condition(f"D_{n}", (3,), written="distractor", distractor_tokens=n) for n in (512, 1024, 2048)),
    *(Condition(f"B_rank_{k}", (1,), written="conversation", rank=k) for k in (1, 4, 16, 64)),
    *(Condition(f"{name}_scale_{factor}", (1,), written=written, scale=float(factor))
      for name, written in (("B", "conversation"), ("N", "noise")) for factor in SCALES),
)}
DEFAULT_CONDITIONS = "A_context,B_memory,C_nothing,D_distractor,A_distractor,B_swapped"


class Texts:
    """The texts of a benchmark's samples as tokens; partners come from the whole file, so --limit does not change them."""

    def __init__(self, bench: dict, tokenizer):
        self.tokenizer = tokenizer
        self.groups: dict[tuple, list[dict]] = {}
        for sample in bench["samples"]:
            self.groups.setdefault((sample["level"], sample["lang"]), []).append(sample)
        self.place = {s["sample_id"]: i for group in self.groups.values() for i, s in enumerate(group)}
        self.encoded = functools.cache(functools.partial(prompts.encode, tokenizer))
        self.head = functools.cache(functools.partial(prompts.head_ids, tokenizer))
        self.asked = functools.cache(functools.partial(prompts.tail_ids, tokenizer))

    def written(self, condition: Condition, sample: dict) -> list[list[int]]:
        """The texts a condition writes for a sample, one after the other, as token lists."""
        group, place = self.groups[sample["level"], sample["lang"]], self.place[sample["sample_id"]]
        needed = 2 if condition.written == "swapped" else condition.merge
        if len(group) < needed:
            raise UserError(f"{condition.name}: level {sample['level']} {sample['lang']} of the benchmark has {len(group)} of the {needed} "
                            "samples it needs; leave the condition out or add samples")
        if condition.written == "swapped":
            chosen = [group[(place + len(group) // 2) % len(group)]]
        else:
            first = place // condition.merge * condition.merge
            chosen = [group[(first + j) % len(group)] for j in range(condition.merge)]
        if condition.written != "distractor":
            return [prompts.start_ids(self.tokenizer) + self.encoded(s["conversation"]) for s in chosen]
        whole = prompts.start_ids(self.tokenizer) + self.encoded(prompts.with_distractor(sample))
        if condition.distractor_tokens is None:
            return [whole]
        before = len(prompts.start_ids(self.tokenizer) + self.encoded(prompts.with_distractor(sample | {"distractor": ""})))
        return [whole[:before + condition.distractor_tokens]]

    def shown(self, condition: Condition, sample: dict) -> list[int]:
        text = prompts.with_distractor(sample) if condition.shown == "distractor" else sample["conversation"]
        return self.encoded(text)


@dataclass(frozen=True)
class Job:
    """A batch: samples of one level and language under one condition, with what remains to be asked of each."""

    condition: Condition
    samples: list[dict]
    probes: list[list[dict]]

    @property
    def width(self) -> int:
        return max(map(len, self.probes))


def plan(conditions, samples, done, texts: Texts, batch_size: int) -> list[Job]:
    """Group what is not done yet into batches of about batch_size probes, samples of like length together."""
    jobs = []
    for condition in conditions:
        for level, lang in sorted({(s["level"], s["lang"]) for s in samples if s["level"] in condition.levels}):
            group = [(s, [p for p in s["probes"] if (condition.name, s["sample_id"], p["probe_id"]) not in done])
                     for s in samples if (s["level"], s["lang"]) == (level, lang)]
            group = sorted((pair for pair in group if pair[1]), key=lambda pair: (text_length(condition, pair[0], texts), pair[0]["sample_id"]))
            while group:
                width = max(len(probes) for _, probes in group)
                longest = max(text_length(condition, group[-1][0], texts), 1)
                size = max(1, min(batch_size // width, MAX_BATCH_TOKENS // longest))
                batch, group = group[-size:], group[:-size]
                jobs.append(Job(condition, [s for s, _ in batch], [p for _, p in batch]))
    return jobs


def text_length(condition: Condition, sample: dict, texts: Texts) -> int:
    """Tokens of text a condition runs for one sample, written and shown."""
    written = sum(map(len, texts.written(condition, sample))) if condition.written and not condition.one_pass else 0
    return written + (len(texts.shown(condition, sample)) if condition.shown else 0)


def check_lengths(model, conditions, samples, texts: Texts) -> None:
    """UserError, before anything is asked, for a text to write or a prompt with its answer that exceeds the model's window."""
    for condition in conditions:
        for sample in (s for s in samples if s["level"] in condition.levels):
            what, lang = f"{sample['sample_id']} {condition.name}", sample["lang"]
            written = texts.written(condition, sample) if condition.written and not condition.one_pass else []
            check_window(model, max(map(len, written), default=0), f"{what}, the text to write")
            prompt = len(texts.head(lang, with_text=condition.shown is not None)) + (len(texts.shown(condition, sample)) if condition.shown else 0)
            longest = max(len(texts.asked(lang, probe["question"])) for probe in sample["probes"])
            check_window(model, prompt + longest + MAX_NEW_TOKENS, what)


def write_memory(loaded: Loaded, ttt: InPlaceTTT, job: Job, texts: Texts) -> Memory:
    """One memory row per sample of the job; several texts of a sample are written one on top of the other."""
    rows = [texts.written(job.condition, sample) for sample in job.samples]
    memory = None
    for turn in zip(*rows):
        memory, _ = write_rows(loaded.model, ttt, list(turn), loaded.tokenizer.pad_token_id, memory)
    if job.condition.rank is not None:
        memory = memory.compact(job.condition.rank)
    if job.condition.written == "noise":
        seeds = [zlib.crc32(sample["sample_id"].encode()) for sample in job.samples]  # a sample's noise is its own in any batch
        memory = Memory.stack([memory.select([i]).noise_like(torch.Generator().manual_seed(seed)) for i, seed in enumerate(seeds)])
    return memory if job.condition.scale == 1 else memory.scale(job.condition.scale)


def read_prompt(loaded: Loaded, ttt: InPlaceTTT | None, job: Job, texts: Texts, memory: Memory | None):
    """Everything before the questions: (Past of one row a sample, memory, tokens of the longest prompt so far)."""
    model, tokenizer, condition = loaded.model, loaded.tokenizer, job.condition
    lang = job.samples[0]["lang"]
    head = texts.head(lang, with_text=condition.shown is not None)
    shown = [texts.shown(condition, s) if condition.shown else [] for s in job.samples]
    if condition.one_pass:
        _, past = prefill(model, [head] * len(shown), tokenizer.pad_token_id)
        memory, past = write_rows(model, ttt, shown, tokenizer.pad_token_id, past=past)
    else:
        with reading(ttt, memory) as session:
            _, past = prefill(model, [head + ids for ids in shown], tokenizer.pad_token_id, session=session)
    return past, memory, [len(head) + len(ids) for ids in shown]


def reading(ttt: InPlaceTTT | None, memory: Memory | None):
    """The read context of a memory, or nothing at all where a condition has none."""
    return contextlib.nullcontext() if memory is None else ttt.read(memory)


@torch.inference_mode()
def answer(loaded: Loaded, ttt: InPlaceTTT | None, job: Job, texts: Texts) -> list[dict]:
    """Run one job; one row per probe (see the docstring of `row`)."""
    model, tokenizer = loaded.model, loaded.tokenizer
    lang = job.samples[0]["lang"]
    memory = write_memory(loaded, ttt, job, texts) if job.condition.written and not job.condition.one_pass else None
    past, memory, before = read_prompt(loaded, ttt, job, texts, memory)
    # every sample asks `width` questions; one with fewer repeats its last, and the repeats are dropped
    asked = [probes + [probes[-1]] * (job.width - len(probes)) for probes in job.probes]
    tails = [texts.asked(lang, probe["question"]) for probes in asked for probe in probes]
    with reading(ttt, memory) as session:
        logits, past = prefill(model, tails, tokenizer.pad_token_id, past.repeat(job.width), session)
        predictions = greedy(model, tokenizer, logits, past, MAX_NEW_TOKENS, session)
    norms, sizes = (memory.update_norm().tolist(), memory.row_nbytes().tolist()) if memory else (None, None)
    rows = []
    for i, (sample, probes) in enumerate(zip(job.samples, job.probes)):
        wrote = (int(memory.tokens[i]), int(memory.chunks[i]), round(norms[i], 6), sizes[i]) if memory else (0, 0, None, None)
        for j, probe in enumerate(probes):
            k = i * job.width + j
            rows.append(row(job.condition, sample, probe, predictions[k], before[i] + len(tails[k]), wrote))
    return rows


def row(condition: Condition, sample: dict, probe: dict, prediction: str, prompt_tokens: int, wrote) -> dict:
    """One line of predictions.jsonl; evaluate.py reads nothing else of a run but run.json."""
    # of several facts the last one holds the answer; the ones before lead to it
    fact = next(f for f in sample["facts"] if f["fact_id"] == probe["required_facts"][-1])
    return {"sample_id": sample["sample_id"], "level": sample["level"], "lang": sample["lang"], "probe_id": probe["probe_id"],
            "condition": condition.name, "question": probe["question"], "gold": probe["gold_answer"],
            "aliases": probe.get("aliases", []), "prediction": prediction, "prompt_tokens": prompt_tokens,
            "tokens_written": wrote[0], "chunks_written": wrote[1], "update_norm": wrote[2], "memory_bytes": wrote[3],
            "category": fact["category"], "position": position(fact, sample)}


def position(fact: dict, sample: dict) -> str | None:
    """The third of the conversation in which the middle of the fact's span stands; None without a span."""
    if "span" not in fact:
        return None
    middle = sum(fact["span"]) / 2 / len(sample["conversation"])
    return ("front", "middle", "back")[min(int(middle * 3), 2)]


def kv_bytes_per_token(model) -> int:
    """Bytes that a token takes in the base's KV cache, in the base's dtype: what a memory saves is measured against it."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize


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
        raise UserError(f"--conditions {names}: none of them has a level among {list(levels)}; see CONDITIONS in run_experiment.py")
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
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
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
    device, dtype, reason = pick_device(arguments.device, arguments.dtype, row_)
    arguments.dtype = str(dtype).removeprefix("torch.")
    print(f"{row_.name} on {reason}")
    run(arguments, load_model(arguments.model, device, dtype), conditions, samples, bench, levels, langs, reason, started)


def run(arguments, loaded, conditions, samples, bench, levels, langs, reason, started) -> None:
    base_parameters = loaded.parameters  # before a joint arm's LoRA is on it
    ttt, manifest = load_adapter(arguments.adapter, loaded) if arguments.adapter else (None, {})
    if not manifest.get("frozen", True):
        alone = [c.name for c in conditions if c.name in MEMORYLESS]
        if alone:
            raise UserError(f"--conditions {alone[0]}: asks the base alone, and {arguments.adapter} has a LoRA on it (a joint arm); run "
                            "it without --adapter, and this arm with --conditions B_memory,B_swapped,D_distractor")
    tuned = read_manifest(arguments.tuned_adapter) if arguments.tuned_adapter else None
    if tuned:
        check_base(tuned, arguments.tuned_adapter, loaded)
        if not tuned.get("lora"):
            raise UserError(f"{arguments.tuned_adapter}: holds no LoRA (objective {tuned.get('objective')}); pass it as --adapter")
    texts = Texts(bench, loaded.tokenizer)
    check_lengths(loaded.model, conditions, samples, texts)
    arm = manifest.get("arm", f"{loaded.row.name}-base")
    out = Path(arguments.out or f"results/{arm}")
    sha = lambda m: m and next(iter(m["files"].values()), None)
    mine = identity(arguments, loaded, file_sha256(arguments.benchmark), sha(manifest) or None, sha(tuned))
    done, earlier = open_folder(out, arguments.resume, mine)
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
              **provenance(), "device": reason.split(",")[0], "dtype": arguments.dtype, "batch_size": arguments.batch_size,
              "ttt": manifest.get("ttt"), "identity": mine, "started": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds")}
    write_json(out / "run.json", report | {"seconds": 0.0, "complete": False, "rows": len(done)})
    try:
        rows = ask_everything(arguments, loaded, ttt, conditions, samples, texts, done, out)
    except KeyboardInterrupt:
        print(f"\ninterrupted: the answers so far are in {out}; go on with\n  {report['command']}"
              f"{'' if arguments.resume else ' --resume'}", file=sys.stderr)
        sys.exit(130)
    write_json(out / "run.json", report | {"seconds": round(time.time() - started, 1), "complete": True, "rows": rows})
    print(f"{rows} rows in {out}; next: python evaluate.py {out}")


def ask_everything(arguments, loaded, ttt, conditions, samples, texts: Texts, done, out: Path) -> int:
    """All jobs, the base's first and the LoRA's last; returns the number of rows in the file."""
    jobs = plan(conditions, samples, done, texts, arguments.batch_size)
    count = len(done)
    # the bar counts tokens to run, not probes: a long text costs more than a short one
    cost = lambda job: sum(text_length(job.condition, s, texts) for s in job.samples) + 60 * sum(map(len, job.probes))
    with (out / "predictions.jsonl").open("a", encoding="utf-8") as file, \
            tqdm(total=sum(map(cost, jobs)), unit="tok", unit_scale=True, smoothing=0.1, desc="answering") as bar:
        for tuned in (False, True):
            mine = [job for job in jobs if job.condition.tuned == tuned]
            if tuned and mine:
                if ttt is not None:
                    ttt.detach()
                load_lora(arguments.tuned_adapter, loaded)
            for job in mine:
                bar.set_postfix_str(job.condition.name)
                rows = answer(loaded, ttt, job, texts)
                file.write("".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in rows))
                file.flush()
                count += len(rows)
                bar.update(cost(job))
    return count


if __name__ == "__main__":
    run_script(main)
