"""Ask long-text tasks in several modes and keep each answer as one row.

    python run_long.py --model smollm2-135m --adapter checkpoints/smollm2-deep --profile dev --out results/long/smollm2-deep

The modes: in_context, ttt_empty, ttt_foreign, ttt_paper, ttt_strict and ttt_sharp (long_modes.py); with --tuned-adapter in_context_tuned, in_context by the base with a LoRA that learned
to read such texts, which is what an untrained reader is to be held against. Document and question are the same tokens in every mode (long_items.py). Items are
made here, the same for the same tokenizer and seed (a profile's in a minute or two), so that no file of them has to travel. Rows go to OUT/predictions.jsonl as
they come, OUT/run.json holds what is needed to repeat the run; --resume goes on. A length that the model's window does not hold is left out, and
said so. Next: report_long.py.
"""
from __future__ import annotations

import argparse
import hashlib
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import long_tasks
from decoding import greedy
from halving import Items, in_halves
from in_place_ttt import InPlaceTTT
from long_items import Item
from long_modes import FOREIGN, MODES, TUNED, USUAL, Words, asked, check_folders, check_mode, default_mode, next_texts
from manifests import UserError, chosen, provenance, run_script, utc
from model_utils import Loaded, find_row, load_arm, load_model, pick_device
from parallel import Group
from prompts import encode, written_ids
from results_files import Rows, ask_into, only_run, open_folder

WORDS = Words("", "--modes ", "--adapter", "--tuned-adapter", "--clip ")


@dataclass(frozen=True)
class Job(Items):
    """Items of one length and one longest answer, of whatever tasks, asked together in one mode."""

    mode: str

    @property
    def kind(self) -> str:
        return f"{self.mode} {self.items[0].length} + {self.items[0].new_tokens}"

    @property
    def first(self) -> str:
        return name_of(self.items[0])


def name_of(item: Item) -> str:
    """Names the item and its text: another file's or generator's item of the same number has another name."""
    return f"{item.task}-{item.length}-s{item.seed}-{item.index}-{sha(item.document, item.question, *item.answers)}"


def sha(*texts: str) -> str:
    """Eight digits that tell texts apart."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:8]


def plan(items: list[Item], modes, done: set, batch_tokens: int) -> list[Job]:
    """What is not done yet, in batches of about batch_tokens tokens of one mode, length and longest answer: an answer's steps cost a small base
    almost as much for one row as for a hundred."""
    jobs = []
    for mode in modes:
        groups: dict[tuple, list[Item]] = {}
        for item in items:
            if (mode, name_of(item), name_of(item)) not in done:
                groups.setdefault((item.length, item.new_tokens), []).append(item)
        for (length, _), group in groups.items():
            size = max(1, batch_tokens // length)
            jobs += [Job(group[i:i + size], mode) for i in range(0, len(group), size)]
    return jobs


def other_texts(items: list[Item]) -> dict[str, str]:
    """{item's name: the document of the next item of its task and length that is about another text}. UserError where all are about one."""
    others = next_texts([(item.task, item.length) for item in items], [item.document for item in items])
    for item, other in zip(items, others):
        if other is None:
            raise UserError(f"--modes {FOREIGN}: {item.task} at {item.length} tokens has one text alone; ask more of it (--count), or leave the mode out")
    return {name_of(item): other for item, other in zip(items, others)}


def check_sources(out: Path, items: list[Item], done: set) -> None:
    """UserError where a folder holds answers about another text of an item's task, length, seed and number: from another --source or --items."""
    place = lambda name: name.rpartition("-")[0]
    held = {place(name): name for _, name, _ in done}
    for name in map(name_of, items):
        if held.get(place(name), name) != name:
            raise UserError(f"{out}: holds answers about another {place(name)} (--source or --items differs); name another --out")


@torch.inference_mode()
def answer(loaded: Loaded, ttt: InPlaceTTT | None, job: Job, others: dict[str, str]) -> list[dict]:
    """Run one job; one row an item. others: other_texts, for ttt_foreign. seconds: of the job, shared evenly; peak_gb: of the job, above what lay on the
    device before."""
    model, tokenizer, cuda = loaded.model, loaded.tokenizer, loaded.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    begun = time.perf_counter()
    documents = [written_ids(tokenizer, item.document) for item in job.items]
    questions = [encode(tokenizer, item.question) for item in job.items]
    foreign = [written_ids(tokenizer, others[name_of(item)]) for item in job.items] if job.mode == FOREIGN else None
    with asked(model, tokenizer, ttt, job.mode, documents, questions, foreign) as (logits, past, session):
        said = greedy(model, tokenizer, logits, past, job.items[0].new_tokens, session, line=False)
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - begun) / len(job.items)
    peak = round((torch.cuda.max_memory_allocated() - before) / 1e9, 3) if cuda else None
    return [{"condition": job.mode, "sample_id": name_of(item), "probe_id": name_of(item), "document": sha(item.document), "task": item.task, "length": item.length,
             "prompt_tokens": item.tokens, "answers": list(item.answers), "metric": item.metric, "prediction": text,
             "score": round(long_tasks.score(item, text), 6), "seconds": round(seconds, 4), "batch": len(job.items), "peak_gb": peak}
            | ({"foreign": sha(others[name_of(item)])} if job.mode == FOREIGN else {}) for item, text in zip(job.items, said)]


def choose_items(arguments, loaded: Loaded) -> tuple[list[Item], list[str]]:
    """(the items to ask, what was left out and why)."""
    window = loaded.model.config.get_text_config().max_position_embeddings
    if arguments.items:
        items, left_out = long_tasks.read_items(arguments.items, loaded.tokenizer), []
        lengths = sorted({item.length for item in items})
    else:
        profile, sources = long_tasks.PROFILES[arguments.profile], long_tasks.parse_sources(arguments.source)
        lengths = list(dict.fromkeys(int(part) if part.isdecimal() else 0 for part in arguments.lengths.split(","))) if arguments.lengths else profile.lengths
        if min(lengths) < 1:
            raise UserError(f"--lengths {arguments.lengths}: give numbers of tokens such as 1024,2048")
        wanted = chosen("--tasks", arguments.tasks, long_tasks.TASKS) if arguments.tasks else long_tasks.at_hand(sources)
        for name in sources.keys() - set(wanted):
            raise UserError(f"--source {name}=...: {name} is not among --tasks {arguments.tasks}; leave it out, or name the task too")
        late = [(name, length) for name in wanted for length in lengths if not arguments.tasks and length < long_tasks.TASKS[name].shortest]
        left_out = [f"{name} at {length} tokens: it begins at {long_tasks.TASKS[name].shortest}" for name, length in late]
        items = long_tasks.make_all([(name, loaded.tokenizer, length, arguments.count or profile.count, arguments.seed, sources.get(name))
                                     for length in lengths if length <= window for name in wanted if (name, length) not in late], arguments.workers)
    left_out += long_tasks.beyond(lengths, window)
    items = [item for item in items if item.length <= window]
    if not items:
        raise UserError(f"nothing to ask: {'; '.join(left_out)}")
    return items, left_out


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is asked of whom")
    what.add_argument("--model", default="smollm2-135m", help="a row of `python model_utils.py`, a folder, or a hub id")
    what.add_argument("--adapter", help="checkpoint folder of an arm, for the modes that write")
    what.add_argument("--tuned-adapter", help=f"checkpoint folder of a LoRA that was trained with --objective context, for {TUNED}")
    what.add_argument("--clip", type=float, help="the most that a chunk may change a layer's W_down while it is written, as a share of |W_down| (default: no limit)")
    what.add_argument("--modes", help=f"comma-separated, of {','.join(MODES)} (default: {','.join(USUAL)}, without --adapter in_context, with --tuned-adapter {TUNED} and no other)")
    what.add_argument("--profile", default="dev", choices=long_tasks.PROFILES, help="lengths and items of each (default: %(default)s, one item of each task at 1,024 tokens: "
                      "in the usual modes about 10 minutes on one core for smollm2-135m, and no intervals)")
    what.add_argument("--tasks", help="comma-separated, see `python long_tasks.py --list` (default: all that need no file)")
    what.add_argument("--lengths", help="tokens of prompt and answer, comma-separated (default: the profile's)")
    what.add_argument("--count", type=int, help="items of each task and length (default: the profile's)")
    what.add_argument("--seed", type=int, default=0, help="of the items (default: %(default)s)")
    what.add_argument("--items", help="file of items that `python long_tasks.py --profile NAME --out FILE` wrote, in place of all of the above")
    what.add_argument("--source", action="append", default=[], metavar="TASK=PATH", help="the file or folder that a task needs, or hub (long_hub.py); may be repeated")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--out", help="results folder (default: results/long/<arm>)")
    how.add_argument("--resume", action="store_true", help="go on with the rows that OUT already holds")
    how.add_argument("--batch-tokens", type=int, default=16384, help="tokens of documents in a batch (default: %(default)s)")
    how.add_argument("--workers", type=int, default=1, help="processes that make the items (default: %(default)s)")
    how.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    how.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    arguments = parser.parse_args()
    usual = default_mode(arguments.adapter, arguments.tuned_adapter) or ",".join(USUAL)
    arguments.modes = chosen("--modes", arguments.modes or usual, (*MODES, TUNED))
    check_folders(arguments.modes, arguments.adapter, arguments.tuned_adapter, arguments.clip, WORDS)
    if arguments.items and (arguments.tasks or arguments.lengths or arguments.count or arguments.source):
        raise UserError(f"--items {arguments.items}: the file says what is asked; leave --tasks, --lengths, --count and --source out")
    for name in ("count", "batch_tokens", "workers"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: use 1 or more")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    started, row = time.time(), find_row(arguments.model)
    device, dtype, reason = pick_device(arguments.device, arguments.dtype, row)
    print(f"{row.name} on {reason}")
    loaded = load_model(arguments.model, device, dtype)
    ttt, manifest = load_arm(arguments.adapter, arguments.tuned_adapter, loaded, arguments.clip, WORDS.clip)
    for mode in arguments.modes:
        check_mode(mode, manifest, f"--modes {mode}")
    items, left_out = choose_items(arguments, loaded)
    others = other_texts(items) if FOREIGN in arguments.modes else {}
    for line in left_out:
        print(f"left out: {line}")
    arm = manifest.get("arm", f"{row.name}-base")
    out = Path(arguments.out or f"results/long/{arm}")
    sha = next(iter(manifest["files"].values())) if manifest else None
    mine = {"model_sha256": loaded.sha256, "adapter_sha256": sha if ttt else None, "tuned_adapter_sha256": None if ttt else sha,
            "clip": arguments.clip, "dtype": str(dtype).removeprefix("torch."), "item_seeds": sorted({item.seed for item in items})}
    with only_run(out, Group()):
        done, earlier = open_folder(out, arguments.resume, mine)
        check_sources(out, items, done)
        together = lambda name, now: sorted({*earlier.get(name, []), *now})  # a resumed run may ask for more than the first
        report = {"arm": arm, "model": row.name, "objective": manifest.get("objective", "none"),
                  "frozen": manifest.get("frozen", True), "seed": manifest.get("seed"), "adapter": arguments.adapter,
                  "tuned_adapter": arguments.tuned_adapter, "chunk": manifest["ttt"]["chunk"] if ttt else None, "clip": arguments.clip, "modes": together("modes", arguments.modes),
                  "tasks": together("tasks", {item.task for item in items}), "lengths": together("lengths", {item.length for item in items}),
                  "left_out": together("left_out", left_out), "window": loaded.model.config.get_text_config().max_position_embeddings, **provenance(),
                  "device": reason.split(",")[0], "batch_tokens": arguments.batch_tokens, "identity": mine,
                  "started": utc(started)}
        jobs = plan(items, arguments.modes, done, arguments.batch_tokens)
        kinds = Counter((item.task, item.length) for item in items)
        request = {"modes": arguments.modes, "texts": sorted(f"{task} {length}" for task, length in kinds), "count": max(kinds.values())}
        rows = ask_into(out, report, request, earlier, len(done), started, lambda rows_file: ask(loaded, ttt, jobs, others, rows_file), Group())
    print(f"{rows} rows in {out}; next: python report_long.py {out} --out {out}/report")


def ask(loaded: Loaded, ttt: InPlaceTTT | None, jobs: list[Job], others: dict[str, str], rows_file: Rows) -> None:
    """All jobs."""
    with rows_file, tqdm(total=sum(item.length for job in jobs for item in job.items), unit="tok", unit_scale=True, desc="asking") as bar:
        for job, rows in in_halves(jobs, lambda job: answer(loaded, ttt, job, others), bar):
            rows_file.add(rows)
            bar.update(sum(item.length for item in job.items))


if __name__ == "__main__":
    run_script(main)
