"""Rows of faults.py with many cases: hypothesis against every parser and loader, and thousands of conversations through one process.

A loader may raise its own error, of one line that names the file, or return what a right file holds. Anything else is a fault.
"""
from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import statistics
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import benchmark_file
import long_files
import long_ruler
import long_tasks
import prompts
import scoring_texts
import training_bank
import training_data
from decoding import answers_to, heard, write_rows
from fault_files import a_memory
from fault_kit import ADAPTER, ROWS, Fault, Kit, in_fork, require, resident_bytes
from manifests import UserError, read_manifest, write_manifest
from memory import Memory, MemoryFileError
from model_utils import byte_tokenizer, load_adapter, load_model
from results_files import ResultsError, load_run, open_folder

CASES = 12_000        # over all loaders
CONVERSATIONS = 5_000
EVERY = 5             # conversations between two measurements
MOST_GROWTH = 8e6     # bytes: mean resident memory of the last fifth of the conversations above that of the second fifth (the first one warms up)

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=6), inner, max_size=3), max_leaves=6)


@st.composite
def mutated(draw, whole: bytes):
    """A right file with some of it changed, cut, doubled or put in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(("bit", "byte", "cut", "out", "in")))
        if kind == "bit" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and data:
            data[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[place:]
        elif kind == "out":
            del data[place:place + draw(st.integers(1, 30))]
        else:
            data[place:place] = draw(st.binary(min_size=1, max_size=12) | st.sampled_from((b"[" * 2_000, b"\xff\xfe", b'"\\ud800"', b"NaN", b"1e999", b"9" * 5_000)))
    return bytes(data)


@st.composite
def refilled(draw, whole: bytes):
    """A JSON file, or its first line, with the value at a random place replaced by any other."""
    head, _, rest = whole.partition(b"\n")
    try:
        value, rest = json.loads(whole), b""
    except ValueError:
        value, rest = json.loads(head), b"\n" + rest
    target = value
    while True:
        places = list(target) if isinstance(target, dict) else list(range(len(target)))
        if not places:
            break
        place = draw(st.sampled_from(places))
        if isinstance(target[place], (dict, list)) and draw(st.booleans()):
            target = target[place]
            continue
        target[place] = draw(JSON)
        break
    return json.dumps(value).encode("utf-8", errors="surrogatepass") + rest


def targets(kit: Kit) -> dict[str, tuple]:
    """{name: (file, its right bytes, read(), the loader's error, is it JSON)}."""
    folder, tokenizer = kit.folder("fuzz"), byte_tokenizer()
    loaded = load_model(str(kit.model))
    run, arm, header = (shutil.copytree(source, folder / name) for source, name in ((kit.answers, "run"), (kit.adapter, "arm"), (kit.adapter, "header")))
    a_memory(rows=1).save(folder / "memory.safetensors")
    items = [long_tasks.Item("niah_single_1", 64, "Some text. " * 3, "What?", ("x",), "label_match", 8, 0, 0, 0)]
    items = [long_tasks.replace(item, tokens=long_tasks.count_tokens(tokenizer, long_tasks.Parts(item.document, item.question, item.answers))) for item in items]
    long_tasks.write_items(items, folder / "items.jsonl")
    texts = {"text.txt": "One text.\n\nAnother one.", "text.jsonl": '{"text": "One text."}\n{"text": "Another."}\n', "essay.json": '{"text": "some words of an essay"}',
             "rows.jsonl": '{"text": "What is it?", "coarse_label": 1}\n', "rows.json": '{"data": [{"text": "What is it?", "coarse_label": 1}]}'}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    identity = json.loads((run / "run.json").read_text(encoding="utf-8"))["identity"]
    shutil.copy(kit.benchmark, folder / "benchmark.json")
    head = (header / ADAPTER).read_bytes()

    def adapter():
        manifest = json.loads((arm / "manifest.json").read_text(encoding="utf-8"))
        write_manifest(header, manifest, [ADAPTER])  # its hash is right
        load_adapter(header, loaded)[0].detach()

    loads = {
        "benchmark": (folder / "benchmark.json", benchmark_file.load_benchmark, UserError, True),
        "run.json": (run / "run.json", lambda path: load_run(path.parent, True), ResultsError, True),
        "results rows": (run / ROWS, lambda path: load_run(path.parent, True), ResultsError, True),
        "rows to go on from": (run / ROWS, lambda path: open_folder(path.parent, True, identity), UserError, True),
        "manifest": (arm / "manifest.json", lambda path: read_manifest(path.parent), UserError, True),
        "settings": (arm / "manifest.json", lambda path: load_adapter(path.parent, loaded)[0].detach(), UserError, True),
        "adapter header": (header / ADAPTER, lambda path: adapter(), UserError, False),
        "memory": (folder / "memory.safetensors", Memory.load, MemoryFileError, False),
        "long items": (folder / "items.jsonl", lambda path: long_tasks.read_items(path, tokenizer), UserError, True),
        "published rows": (folder / "rows.jsonl", lambda path: long_files.labelled(path, "coarse_label"), UserError, True),
        "published object": (folder / "rows.json", long_files.read_rows, UserError, True),
        "essays": (folder / "essay.json", long_ruler.read_essays, UserError, True),
        "training texts": (folder / "text.txt", lambda path: training_data.load_texts(str(path), ("en",)), UserError, False),
        "training lines": (folder / "text.jsonl", lambda path: training_data.load_texts(str(path), ("en",)), UserError, True),
        "scored lines": (folder / "text.jsonl", lambda path: scoring_texts.read_documents(str(path)), UserError, True)}
    return {name: (path, path.read_bytes() if path != header / ADAPTER else head, functools.partial(read, path), error, is_json)
            for name, (path, read, error, is_json) in loads.items()}


def fuzz(kit: Kit) -> str:
    loaders, counts = targets(kit), {}
    each = kit.cases(-(-CASES // len(loaders)), 4)
    for name, (path, whole, read, error, is_json) in loaders.items():
        strategies = [st.binary(max_size=200), mutated(whole)] + ([refilled(whole)] if is_json else [])
        counts[name] = fuzzed(name, path, read, error, st.one_of(strategies), each, kit.seed)
        path.write_bytes(whole)
    return f"{sum(n for n, _ in counts.values())} cases, " + ", ".join(f"{name} {n} ({refused} refused)" for name, (n, refused) in counts.items())


def fuzzed(name: str, path: Path, read, error, data, cases: int, number: int) -> tuple[int, int]:
    """(cases run, how many of them the loader refused)."""
    run = refused = 0

    @seed(number)
    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False)
    @given(data)
    def one(content: bytes) -> None:
        nonlocal run, refused
        run += 1
        path.write_bytes(content)
        try:
            read()
        except error as raised:
            refused += 1
            if len(str(raised).splitlines()) != 1 or str(path.parent) not in str(raised):
                raise Fault(f"{name}: says {str(raised)[:200]!r} of {content[:80]!r}") from None
        except Exception as other:
            raise Fault(f"{name}: {type(other).__name__} ({str(other)[:120]}) of {content[:120]!r}") from other
    one()
    return run, refused


# ---- a soak ----

def conversations(kit: Kit, number: int) -> tuple[list[float], list[str]]:
    """Write, answer and drop so many conversations, one after the other; (resident bytes after every EVERY-th, the answers).

    What is measured is what a conversation leaves behind. So torch's store of the last 1,024 kernels that it compiled, one for each length of text, is
    switched off, and the C library hands back what was freed before its holes are counted as memory in use.
    """
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "0"  # read at the first product
    torch.set_num_threads(1)
    loaded = load_model(str(kit.model))
    ttt, _ = load_adapter(kit.adapter, loaded)
    tokenizer, draw, sizes, answers = loaded.tokenizer, kit.draws("soak"), [], []
    head = prompts.head_ids(tokenizer, "en", with_text=False)
    give_back = ctypes.CDLL("libc.so.6").malloc_trim
    for done in range(1, number + 1):
        sample = training_bank.sample_conversation(draw, "en", "train", 2)
        with torch.inference_mode():
            memory, _ = write_rows(loaded.model, ttt, [prompts.written_ids(tokenizer, sample["conversation"])], tokenizer.pad_token_id, dropped=True)
            past = heard(loaded.model, [head], tokenizer.pad_token_id, ttt, memory)
            said, _ = answers_to(loaded.model, tokenizer, [prompts.tail_ids(tokenizer, "en", sample["probes"][0]["question"])], 4, past, ttt, memory)
        answers += said
        del memory, past
        if done % EVERY == 0:
            give_back(0)
            sizes.append(resident_bytes())
    return sizes, answers


def soak(kit: Kit) -> str:
    number = kit.cases(CONVERSATIONS, 10 * EVERY)
    sizes, answers = in_fork(functools.partial(conversations, kit, number), limit=None)
    fifth, tenth = len(sizes) // 5, len(sizes) // 10
    early, late = statistics.mean(sizes[fifth:2 * fifth]), statistics.mean(sizes[-fifth:])
    tenths = ", ".join(f"{statistics.mean(sizes[tenth * i:tenth * (i + 1)]) / 1e6:.0f}" for i in range(10))
    require(late - early <= MOST_GROWTH, f"{(late - early) / 1e6:.1f} MB more in the last fifth of {number} conversations than in the second (MB by tenths: {tenths})")
    require(len(set(answers)) > 1, "every conversation got the same answer")
    return (f"{number} conversations, {len(set(answers))} different answers; {early / 1e6:.1f} MB resident in the second fifth, {late / 1e6:.1f} in the last "
            f"(bound: {MOST_GROWTH / 1e6:g} MB more); by tenths {tenths}")
