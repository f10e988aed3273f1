"""Long-text tasks for fast weights as memory: every item is a document that can be written and dropped, and a question that can be asked alone.

    python long_tasks.py --list                                     the tasks, where they come from and what they need
    python long_tasks.py --task vt --length 1024 --show 1           prints items
    python long_tasks.py --profile dev --out items.jsonl            writes a profile's items; --source TASK=PATH names the files it needs,
                                                                    TASK=hub those that the hub has by name (long_hub.py)
"""
from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Callable, Iterator

from transformers import AutoTokenizer

from gguf_packages import available, converted_folder
from long_files import icl_candidates, locomo_candidates, longmemeval_candidates, rag_candidates
from long_hub import HUB, fetched
from long_items import Candidate, Item, Parts, count_tokens, fit
from long_ruler import (NEEDLES, RECALL_NEW_TOKENS, common_candidates, frequent_candidates, needle_candidates, recall_candidates,
                        tracking_candidates)
from long_scores import METRICS
from manifests import UserError, replacing, run_script
from model_utils import byte_tokenizer, find_row, hub_folder


@dataclass(frozen=True)
class Task:
    name: str
    origin: str
    metric: str
    new_tokens: int                                  # the published limit of generation
    candidates: Callable[..., Iterator[Candidate]]   # (name, tokenizer, length, seed, source)
    needs: str | None = None                         # the file or folder that --source must name
    shortest: int = 1024                             # the first length of the profiles at which the task makes sense


RULER = "RULER (Hsieh et al. 2024)"
HELMET = "HELMET (Yen et al. 2024)"
ESSAYS = "the essays (RULER's PaulGrahamEssays.json, or a .txt)"
NOISE_TASKS = {name: f"{name}_noise" for name, spec in NEEDLES.items()
               if spec.haystack == "essay" and name != "niah_single_2"}  # single_2 in noise is niah_single_1


def needle_tasks() -> Iterator[Task]:
    for name, spec in NEEDLES.items():
        yield Task(name, RULER, "string_match_all", 128, needle_candidates(spec), ESSAYS if spec.haystack == "essay" else None)
        if name in NOISE_TASKS:
            yield Task(NOISE_TASKS[name], f"{RULER}, but in noise: not a published task", "string_match_all", 128,
                       needle_candidates(replace(spec, haystack="noise")))


TASKS = {task.name: task for task in (
    *needle_tasks(),
    Task("vt", RULER, "string_match_all", 30, tracking_candidates),
    Task("cwe", RULER, "string_match_all", 120, common_candidates),
    Task("fwe", RULER, "string_match_all", 50, frequent_candidates),
    Task("mqar", "Zoology (Arora et al. 2023), in words", "first_word", RECALL_NEW_TOKENS, recall_candidates),
    *(Task(f"helmet_icl_{name}", HELMET, "label_match", 20, icl_candidates, f"a folder with train.jsonl and test.jsonl of {data}", 8192)
      for name, data in (("trec_coarse", "CogComp/trec"), ("banking77", "PolyAI/banking77"))),
    *(Task(f"helmet_rag_{name}", HELMET, "substring_exact_match", 20, rag_candidates, "HELMET's folder data/kilt", 8192)
      for name in ("nq", "hotpotqa")),
    Task("locomo", "LoCoMo (Maharana et al. 2024)", "by category", 32, locomo_candidates, "locomo10.json", 4096),
    Task("longmemeval", "LongMemEval (Wu et al. 2024)", "contains_no_judge", 500, longmemeval_candidates,
         "longmemeval_s_cleaned.json or longmemeval_oracle.json", 8192),
)}


@dataclass(frozen=True)
class Profile:
    lengths: tuple[int, ...]
    count: int               # items of each task and length


# dev shows that a run works: in three modes SmolLM2-135M takes about 10 minutes on one core; of one text a task there is no interval
PROFILES = {"dev": Profile((1024,), 1), "full": Profile((1024, 2048, 4096, 8192, 16384, 32768), 100)}


def find_task(name: str) -> Task:
    if name not in TASKS:
        raise UserError(f"--task {name}: unknown; use one of {', '.join(TASKS)}")
    return TASKS[name]


def is_retrieval(task: str) -> bool:
    """Whether a task's answer stands in one place of the document, or a few (RULER's category of retrieval, and associative recall)."""
    return task.startswith("niah_") or task == "mqar"


def beyond(lengths, window: int) -> list[str]:
    """What is said of each length that a model's window does not hold."""
    return [f"length {length}: the model's window is {window} tokens" for length in lengths if length > window]


def make(task: str, tokenizer, length: int, count: int, seed: int, source=None) -> list[Item]:
    """`count` items whose prompt and answer together take at most `length` tokens, and as close to it as their units allow.

    An item depends on (task, length, seed, index), the tokenizer and the file, not on count; the index of a file's question is its
    place in the order drawn from the seed. source: the file or folder that the task needs. Raises UserError where that is missing
    or defective, where the length is too short, and where fewer than `count` of a file's questions fit.
    """
    row = find_task(task)
    room = length - row.new_tokens
    if count < 1:
        raise UserError(f"{task}: count {count}, must be 1 or more")
    if row.needs and source is None:
        variant = f"; in noise it is {NOISE_TASKS[task]}" if task in NOISE_TASKS else ""
        raise UserError(f"{task}: needs {row.needs}; name it with --source {task}=PATH{variant}")
    items = []
    for index, candidate in enumerate(row.candidates(task, tokenizer, length, seed, source)):
        fitted = fit(candidate, tokenizer, room)
        if fitted is not None:
            items.append(Item(task, length, fitted.parts.document, fitted.parts.question, fitted.parts.answers, candidate.metric,
                              row.new_tokens, fitted.tokens, seed, index))
        elif row.needs is None or row.needs is ESSAYS:
            raise UserError(f"{task}: length {length} is too short for it with this tokenizer ({row.new_tokens} tokens are for the answer); "
                            "take a longer one")
        if len(items) == count:
            return items
    raise UserError(f"{task}: {len(items)} of the questions in {source} fit {length} tokens, and {count} are asked for; "
                    "take fewer, or a longer length")


def make_all(asked: list[tuple], workers: int = 1) -> list[Item]:
    """The items of several calls of make, whose arguments `asked` holds, in that order. workers: processes that make them, a call at a time each."""
    if workers == 1:
        return [item for arguments in asked for item in make(*arguments)]
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:  # forked, as by torch's loaders: they inherit the tokenizer
        return [item for items in pool.map(make, *zip(*asked)) for item in items]


def score(item: Item, prediction: str) -> float:
    """The published metric of the item, 0 to 1."""
    return METRICS[item.metric](prediction, item.answers)


def at_hand(sources) -> list[str]:
    """The tasks that need no file, and those whose file `sources` names."""
    return [task.name for task in TASKS.values() if task.needs is None or task.name in sources]


def profile_items(name: str, tokenizer, seed: int, sources: dict[str, object], workers: int = 1) -> list[Item]:
    """The items of a profile, task by task; a task that needs a file takes part where `sources` names one for it."""
    profile = PROFILES[name]
    return make_all([(task, tokenizer, length, profile.count, seed, sources.get(task))
                     for task in at_hand(sources) for length in profile.lengths if length >= TASKS[task].shortest], workers)


def write_items(items: list[Item], path: Path) -> None:
    with replacing(path) as part:
        part.write_text("".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items), encoding="utf-8")


def read_items(path, tokenizer) -> list[Item]:
    """The items that `--profile --out` wrote; UserError for a line that is none, or that another tokenizer has sized."""
    items, taken, mend = [], set(), "write it again with python long_tasks.py --profile NAME --out FILE"
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); {mend}") from None
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):  # not splitlines: a text may hold other separators
        try:
            fields = json.loads(line)
            if type(fields["answers"]) is not list or not fields["answers"]:
                raise ValueError("answers is no list of texts, or empty")
            item = Item(**fields | {"answers": tuple(fields["answers"])})
            if item.metric not in METRICS or not all(type(n) is int and n >= 0 for n in (item.length, item.new_tokens, item.tokens, item.seed, item.index)):
                raise ValueError(f"metric {item.metric!r} or a number is not one")
            if not all(isinstance(part, str) for part in (item.task, item.document, item.question, *item.answers)):
                raise ValueError("task, document, question or an answer is no text")
            if item.task not in TASKS:
                raise ValueError(f"task {item.task!r} is unknown")
            tokens = count_tokens(tokenizer, Parts(item.document, item.question, item.answers))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{path} line {number}: no item ({error}); {mend}") from None
        if (place := (item.task, item.length, item.seed, item.index)) in taken:
            raise UserError(f"{path} line {number}: {item.task} {item.length} {item.index} stands there twice; {mend}")
        if tokens != item.tokens:
            raise UserError(f"{path} line {number}: {item.tokens} tokens, and {tokens} with this model's tokenizer; {mend}, and --model as here")
        if item.new_tokens < 1 or tokens + item.new_tokens > item.length:
            raise UserError(f"{path} line {number}: {tokens} tokens and new_tokens {item.new_tokens} (1 or more) do not fit length {item.length}; {mend}")
        taken.add(place)
        items.append(item)
    return items


def tokenizer_folder(model: str) -> Path | None:
    """Where the tokenizer of a model of the table, a folder or a hub id lies; None where it reads bytes."""
    row = find_row(model)
    if row.hub is None:
        return None
    packaged = row.gguf and available(row.name, row.gguf)
    return converted_folder(row.name, row.gguf) if packaged else hub_folder(row)


def load_tokenizer(model: str):
    """The model's tokenizer, without its weights."""
    folder = tokenizer_folder(model)
    return byte_tokenizer() if folder is None else AutoTokenizer.from_pretrained(folder)


def parse_sources(pairs: list[str]) -> dict[str, str]:
    """{task: path}; what is to come from the hub is there then. UserError for a task that is none, or needs no file."""
    for pair in pairs:
        if not all(pair.partition("=")):
            raise UserError(f"--source {pair}: write TASK=PATH")
    sources = dict(pair.split("=", 1) for pair in pairs)
    for task in sources:
        if task not in TASKS or TASKS[task].needs is None:
            raise UserError(f"--source {task}=...: {'the task needs no file; leave it out' if task in TASKS else 'no such task; see python long_tasks.py --list'}")
    return {task: str(fetched(task)) if path == HUB else path for task, path in sources.items()}


def print_tasks(sources: dict[str, str]) -> None:
    for task in TASKS.values():
        if task.needs is None:
            hand = "at hand"
        elif task.name in sources and Path(sources[task.name]).exists():
            hand = f"at hand ({sources[task.name]})"
        else:
            hand = f"needs {task.needs}"
        print(f"{task.name:24s} {task.origin:58s} {task.metric:22s} {task.new_tokens:4d} new tokens   {hand}")


def show(item: Item) -> None:
    print(f"--- {item.task} {item.index}: {item.tokens} of {item.length} tokens, {item.new_tokens} for the answer, seed {item.seed}, {item.metric}")
    print(f"{item.document}\n--- question\n{item.question}\n--- answers\n{' | '.join(item.answers)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_true", help="list the tasks")
    what.add_argument("--task", help="make and print items of this task")
    what.add_argument("--profile", choices=PROFILES, help="write a profile's items to --out")
    parser.add_argument("--length", type=int, default=1024, help="tokens of prompt and answer (default 1024)")
    parser.add_argument("--show", type=int, default=1, metavar="K", help="how many items (default 1)")
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer counts (default smollm2-135m)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", action="append", default=[], metavar="TASK=PATH", help="the file or folder that a task needs, or hub; may be repeated")
    parser.add_argument("--workers", type=int, default=1, help="processes that make the items of --profile (default 1)")
    parser.add_argument("--out", type=Path, help="a .jsonl for the items of --profile")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: use 1 or more")
    sources = parse_sources(arguments.source)
    if arguments.list:
        print_tasks(sources)
    elif arguments.task:
        tokenizer = load_tokenizer(arguments.model)
        for item in make(arguments.task, tokenizer, arguments.length, arguments.show, arguments.seed, sources.get(arguments.task)):
            show(item)
    elif arguments.out is None:
        parser.error("--profile needs --out FILE")
    else:
        items = profile_items(arguments.profile, load_tokenizer(arguments.model), arguments.seed, sources, arguments.workers)
        write_items(items, arguments.out)
        print(f"{arguments.out}: {len(items)} items")


if __name__ == "__main__":
    run_script(main)
