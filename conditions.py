"""The conditions: one table of ways to answer a probe, and what carries one out, batch by batch.

A condition names texts of a sample to write and to show; `plan` groups what is to be asked into jobs, `answer` runs one. What
each condition tells is in report_tables.MEANINGS.
"""
from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, replace

import torch

import prompts
from decoding import answers_to, check_window, heard, prefill, write_rows
from in_place_ttt import InPlaceTTT
from manifests import UserError
from memory import Memory
from model_utils import Loaded
from results_files import SCALES

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
    half: bool = False             # kept in half precision
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
    Condition("B_half", (1,), written="conversation", half=True),
    *(Condition(f"{name}_scale_{factor}", (1,), written=written, scale=float(factor))
      for name, written in (("B", "conversation"), ("N", "noise")) for factor in SCALES),
)}


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
    def kind(self) -> str:
        return self.condition.name

    @property
    def first(self) -> str:
        return self.samples[0]["sample_id"]

    @property
    def width(self) -> int:
        return max(map(len, self.probes))

    @property
    def count(self) -> int:
        return sum(map(len, self.probes))

    def halves(self) -> list["Job"]:
        """The same questions as two jobs, by sample, of one sample by question; one question stays whole."""
        if len(self.samples) > 1:
            middle = len(self.samples) // 2
            return [replace(self, samples=self.samples[part], probes=self.probes[part]) for part in (slice(middle), slice(middle, None))]
        middle = len(self.probes[0]) // 2
        return [replace(self, probes=[part]) for part in (self.probes[0][:middle], self.probes[0][middle:]) if part]


def plan(conditions, samples, done, texts: Texts, batch_size: int) -> list[Job]:
    """Batches of about batch_size probes, samples of like length together, those with the LoRA last, less what is done already: what is asked together
    does not hang on where a run was cut off."""
    jobs = []
    for condition in conditions:
        for level, lang in sorted({(s["level"], s["lang"]) for s in samples if s["level"] in condition.levels}):
            group = sorted((s for s in samples if (s["level"], s["lang"]) == (level, lang)),
                           key=lambda s: (text_length(condition, s, texts), s["sample_id"]))
            while group:
                width = max(len(s["probes"]) for s in group)
                longest = max(text_length(condition, group[-1], texts), 1)
                size = max(1, min(batch_size // width, MAX_BATCH_TOKENS // longest))
                batch, group = group[-size:], group[:-size]
                left = [(s, [p for p in s["probes"] if (condition.name, s["sample_id"], p["probe_id"]) not in done]) for s in batch]
                left = [(s, probes) for s, probes in left if probes]
                if left:
                    jobs.append(Job(condition, [s for s, _ in left], [p for _, p in left]))
    return sorted(jobs, key=lambda job: job.condition.tuned)


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
        memory, _ = write_rows(loaded.model, ttt, list(turn), loaded.tokenizer.pad_token_id, memory, dropped=True)
    if job.condition.rank is not None:
        memory = memory.compact(job.condition.rank)
    if job.condition.half:
        memory = memory.half()
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
        past = heard(model, [head + ids for ids in shown], tokenizer.pad_token_id, ttt, memory)
    return past, memory, [len(head) + len(ids) for ids in shown]


@torch.inference_mode()
def answer(loaded: Loaded, ttt: InPlaceTTT | None, job: Job, texts: Texts, new_tokens: int | None = None, early_stop: bool = True) -> list[dict]:
    """Run one job; one row per probe (see the docstring of `row`). new_tokens (None: MAX_NEW_TOKENS) and early_stop: see `greedy`."""
    model, tokenizer = loaded.model, loaded.tokenizer
    lang = job.samples[0]["lang"]
    memory = write_memory(loaded, ttt, job, texts) if job.condition.written and not job.condition.one_pass else None
    past, memory, before = read_prompt(loaded, ttt, job, texts, memory)
    # every sample asks `width` questions; one with fewer repeats its last, and the repeats are dropped
    asked = [probes + [probes[-1]] * (job.width - len(probes)) for probes in job.probes]
    tails = [texts.asked(lang, probe["question"]) for probes in asked for probe in probes]
    predictions, logits_NV = answers_to(model, tokenizer, tails, new_tokens or MAX_NEW_TOKENS, past, ttt, memory, early_stop=early_stop)
    check_finite(loaded, job, logits_NV)
    norms, sizes = (memory.update_norm().tolist(), memory.row_nbytes().tolist()) if memory else (None, None)
    rows = []
    for i, (sample, probes) in enumerate(zip(job.samples, job.probes)):
        wrote = (int(memory.tokens[i]), int(memory.chunks[i]), round(norms[i], 6), sizes[i]) if memory else (0, 0, None, None)
        for j, probe in enumerate(probes):
            k = i * job.width + j
            rows.append(row(job.condition, sample, probe, predictions[k], before[i] + len(tails[k]), wrote))
    return rows


def check_finite(loaded: Loaded, job: Job, logits_NV: torch.Tensor) -> None:
    """UserError where a question's first logits are no numbers: the greedy choice among them would be a token like any other."""
    broken_N = ~torch.isfinite(logits_NV).all(-1)
    if broken_N.any():
        sample = job.samples[int(broken_N.nonzero()[0]) // job.width]
        dtype = str(loaded.model.dtype).removeprefix("torch.")
        raise UserError(f"{sample['sample_id']} {job.condition.name}: {loaded.row.name} in {dtype} answers with NaN or infinity; use --dtype "
                        "float32, or an adapter whose training did not diverge")


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
