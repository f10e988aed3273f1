"""Time and memory side by side: the public way, ours, and the base without fast weights, in one process and one run.

    python bench.py --model qwen3-8b --weights random --device cuda
    python bench.py --model smollm2-135m --device cpu

Every case runs each way once a round, in turn, after one warm-up of each, and reports medians over the rounds; a ratio is the median of the
rounds' own ratios. Answers have exactly NEW tokens: nothing stops early by luck. Random weights have the shapes, the memory and the speed of
the real ones, and no meaning. Operations are those that the work needs (operations.py). Floors: operations over the measured rate of matrix
products, bytes over the measured rate of copies, whichever is more. Prints one table; writes OUT/MODEL-DEVICE.json and .png. BENCH.md says what was learned.
"""
from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from bench_kit import Way, every_token, slots_of, written
from bench_report import HEADER, Line, draw, text_of
from bench_train import train
from bench_whole import whole
from decoding import answers_to, call_length, greedy, heard, kv_bytes_per_token, prefill
from fast_weight import code_sizes, solve
from in_place_ttt import InPlaceTTT
from long_modes import asked
from manifests import UserError, provenance, run_script, write_json
from memory import unit
from model_utils import Loaded, find_row, load_adapter, load_model, pick_device
from operations import BaseCost, MemoryCost
from public_way import CHUNK, NEW, PROMPT, TEXT, PublicWay

SLOTS = 1 / 6       # share of a text's tokens that the trained gates of the small arms leave a slot for
TOKENIZER_OF = "smollm2-135m"  # what cuts the texts for random weights: any that cuts like the real one will do


@dataclass(frozen=True)
class Sizes:
    """How much of everything; what a GPU is given and what two CPU cores are."""

    probes: int                            # of one batch
    conversations: int                     # whose memories the batch shares
    writes: tuple[tuple[int, int], ...]    # (rows, tokens)
    public_text: int                       # the longest text that the public way is given
    batches: tuple[int, ...]               # sequences of one training step
    compiled: tuple[int, ...]              # likewise, with the base's layers compiled
    lengths: tuple[int, ...]               # of the conversations behind a memory that is read
    ranks: tuple[int, ...]                 # that a memory is cut to
    solves: tuple[tuple[int, int], ...]    # (texts, slots of each)
    long: tuple[int, ...]                  # tokens of the documents that are asked about in the modes of long_modes.py
    square: int                            # of the matrices that the machine is measured with
    limit: int | None                      # conversations a level and language of the whole experiment
    rounds: int


SIZES = {"cuda": Sizes(256, 32, ((64, TEXT), (1, 4096), (1, 32768)), 4096, (1, 2, 3, 4, 8), (2, 3), (TEXT, 1024, 4096, 32768), (64, 16),
                       ((64, 1024), (32, 2048), (8, 4096), (2, 8192)), (1024, 2048, 4096, 8192, 16384, 32768), 8192, None, 3),
         "cpu": Sizes(16, 4, ((4, TEXT), (1, 1024)), 1024, (1, 2), (), (TEXT, 512, 2048), (64, 16), ((4, 512),), (1024,), 1024, 2, 3)}


class Bench:
    """The base, the sizes, what was measured of the machine, and the lines so far."""

    def __init__(self, loaded: Loaded, sizes: Sizes, form: str = "codes", adapter: str | None = None, benchmark: str = "benchmark_v1.json", slots: float = SLOTS):
        self.loaded, self.sizes, self.form, self.adapter, self.benchmark, self.lines, self.facts = loaded, sizes, form, adapter, benchmark, [], {}
        self.model, self.pad, self.device, self.slots = loaded.model, loaded.tokenizer.pad_token_id, loaded.device, slots
        self.generator, self.cost = torch.Generator().manual_seed(0), BaseCost.of(loaded.model)
        self.weights = (self.cost.body + self.cost.head) * self.model.dtype.itemsize  # bytes that every forward call reads

    @contextlib.contextmanager
    def attached(self, config=None, texts=None):
        """An adapter on the base for so long: the one asked for, or a new one with these settings, whose sparse gates are thinned on these texts."""
        if config is None and self.adapter:
            ttt, _ = load_adapter(self.adapter, self.loaded)
        else:
            ttt = InPlaceTTT(self.model, config or getattr(self.loaded.row, self.form))
            if ttt.config.sparse:
                self.thin(ttt, texts or self.rows(8, TEXT))
        try:
            yield ttt
        finally:
            ttt.detach()

    @torch.inference_mode()
    def thin(self, ttt, texts: list[list[int]]) -> None:
        """Gates of random numbers, with biases at which a share `slots` of these texts' tokens leaves a slot. Trained gates leave few; new ones all."""
        for fast in ttt.fast.values():
            fast.gate.copy_(torch.randn(len(fast.gate), generator=self.generator) / len(fast.gate) ** 0.5)
        with ttt.write(dropped=True) as writer:
            prefill(self.model, texts, self.pad, session=writer)
        writer.memory()
        for index, worth_BS in zip(sorted(ttt.config.layers), writer.slots.worth):
            fast, worth_N = ttt.fast[str(index)], worth_BS.flatten()
            fast.gate_bias += math.log(fast.config.shut_below / (1 - fast.config.shut_below)) - worth_N.kthvalue(1 + int((1 - self.slots) * (len(worth_N) - 1))).values

    def memory_cost(self, ttt) -> MemoryCost:
        return MemoryCost(ttt.config, *ttt.down_proj(ttt.config.layers[0]).weight.shape)

    def rows(self, count: int, length: int) -> list[list[int]]:
        return torch.randint(0, 250, (count, length), generator=self.generator).tolist()

    def clock(self, function) -> tuple[float, float | None]:
        """(seconds, GB above what lay on the device before) of one call."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        begun = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        return seconds, (torch.cuda.max_memory_allocated() - before) / 1e9 if cuda else None

    def compare(self, part: str, case: str, ways: dict[str, Way], tokens: int) -> None:
        """Time the ways of a case in turn, round by round, and keep a line of each. tokens: of one unit. The first way is what the others
        are held against; one that the device has no memory for is left out."""
        ways = {name: way for name, way in ways.items() if self.fits(part, case, name, way.call)}
        taken = {name: [] for name in ways}
        for _ in range(self.sizes.rounds):
            for name, way in ways.items():
                seconds, peak = self.clock(way.call)
                taken[name].append((seconds / way.units, peak))
        for name, rounds in taken.items():
            ratio = statistics.median(s / other for (s, _), (other, _) in zip(rounds, next(iter(taken.values()))))
            peak = max((p for _, p in rounds if p is not None), default=None)
            self.keep(part, case, name, statistics.median(s for s, _ in rounds), ratio, tokens, ways[name].work, ways[name].moved, peak)

    def keep(self, part: str, case: str, way: str, seconds: float, ratio: float, tokens: int, work: float, moved: float, peak: float | None) -> None:
        """Keep a line and print it. Rates and floors that need the machine's are None before it was measured."""
        tflops, share, floor = work / seconds / 1e12, None, None
        if self.facts.get("tflops"):
            share, floor = tflops / self.facts["tflops"], max(work / self.facts["tflops"] / 1e12, moved / self.facts["gb_per_s"] / 1e9)
        self.lines.append(Line(part, case, way, seconds, ratio, tokens / seconds, tflops, share, floor, peak))
        print(text_of(self.lines[-1]), flush=True)

    def fits(self, part: str, case: str, way: str, function) -> bool:
        """The warm-up; False, and a line that says so, where the device has no memory for it."""
        try:
            function()
            return True
        except torch.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()
        print(f"{part:8s}{case:46s}{way:30s}out of memory", flush=True)
        return False


# ---- the parts ----

def machine(bench: Bench) -> None:
    """The best rate of large matrix products and of large copies (bytes read plus bytes written): what floors are made of, so the best of ten."""
    n = bench.sizes.square
    a, b = (torch.randn(n, n, generator=bench.generator).to(bench.device, bench.model.dtype) for _ in range(2))
    out, large = torch.empty_like(a), torch.ones(32 * n * n, dtype=torch.bfloat16, device=bench.device)
    target = large.clone()
    best = lambda function: min(bench.clock(function)[0] for _ in range(10))
    times = min(100, max(1, 10 ** 11 // n ** 3))  # long enough to be timed
    bench.facts["tflops"] = times * 2 * n ** 3 / best(lambda: [torch.mm(a, b, out=out) for _ in range(times)]) / 1e12
    bench.facts["gb_per_s"] = 2 * large.nbytes / best(lambda: target.copy_(large)) / 1e9
    print(f"machine: products {bench.facts['tflops']:.4g} TFLOP/s in {bench.loaded.model.dtype}, copies {bench.facts['gb_per_s']:.4g} GB/s")


@torch.inference_mode()
def ask(bench: Bench, prompts, ttt=None, memory=None, head=()) -> None:
    """Answers of NEW tokens to every prompt. head: what all begin with, read once for each memory (or conversation) and shared."""
    rows = bench.sizes.conversations if memory is None else memory.batch
    past = heard(bench.model, [head] * rows, bench.pad, ttt, memory) if head else None
    answers_to(bench.model, bench.loaded.tokenizer, prompts, NEW, past, ttt, memory, early_stop=False)


def probe(bench: Bench) -> None:
    """A question of PROMPT tokens and an answer of NEW, asked of the memories of some conversations in one batch."""
    count, conversations, cost = bench.sizes.probes, bench.sizes.conversations, bench.cost
    prompts, cut = bench.rows(count, PROMPT), PROMPT - PROMPT // 2
    head, tails = prompts[0][:cut], [row[cut:] for row in prompts]
    one = torch.tensor(prompts[:1], device=bench.device)
    with bench.attached() as ttt:
        memory = written(bench, ttt, bench.rows(conversations, TEXT))
        public = PublicWay(bench.model, ttt.config.layers)
        public.ingest(torch.tensor(bench.rows(1, TEXT), device=bench.device))
        whole, shared = cost.answer(PROMPT, NEW), cost.answer(PROMPT - cut, NEW, cut) + cost.forward(cut, predicted=0) * conversations / count
        added = 0.0 if bench.form == "plain" and not bench.adapter else bench.memory_cost(ttt).read(PROMPT + NEW - 1, slots_of(memory))
        calls = NEW * (bench.weights + count * (PROMPT + NEW // 2) * kv_bytes_per_token(bench.model)) / count
        with_memory = calls + NEW * memory.nbytes() / count
        ways = {"base": Way(lambda: ask(bench, prompts), count, whole, calls),
                "memory": Way(lambda: ask(bench, prompts, ttt, memory), count, whole + added, with_memory),
                "base, shared beginning": Way(lambda: ask(bench, tails, head=head), count, shared, calls),
                "memory, shared beginning": Way(lambda: ask(bench, tails, ttt, memory, head), count, shared + added, with_memory),
                "public, one at a time": Way(lambda: public.answer(one, NEW), 1, whole, NEW * bench.weights)}
        bench.compare("probe", f"{count} at once, {PROMPT} + {NEW} tokens", ways, PROMPT + NEW)


def write(bench: Bench) -> None:
    """Reading a text with the base alone, and writing it, after which the text is dropped."""
    for count, length in bench.sizes.writes:
        texts, cost = bench.rows(count, length), bench.cost
        base = Way(torch.inference_mode()(lambda: prefill(bench.model, texts, bench.pad)), count, cost.forward(length), -(-length // call_length(count)) * bench.weights / count)
        with bench.attached(None if bench.form == "codes" else bench.loaded.row.codes, texts) as ttt:
            write_codes(bench, ttt, texts, base)
        with bench.attached(replace(bench.loaded.row.plain, chunk=CHUNK)) as ttt:
            work = cost.forward(length, predicted=0, layers=max(ttt.config.layers) + 1) + bench.memory_cost(ttt).write_chunks(length)
            ways = {"base": base, "memory": Way(lambda: written(bench, ttt, texts), count, work)}
            if length <= bench.sizes.public_text:
                public, first = PublicWay(bench.model, ttt.config.layers), torch.tensor(texts[:1], device=bench.device)
                ways["public, one at a time"] = Way(lambda: public.ingest(first), 1, cost.forward(length))
            bench.compare("write", f"{count} x {length:,} tokens, plain", ways, length)


def write_codes(bench: Bench, ttt, texts: list[list[int]], base: Way) -> None:
    """The form codes, with the slots that its gates leave and, where they are sparse, with one a token."""
    length, count = len(texts[0]), len(texts)
    work = lambda slots: bench.cost.forward(length, predicted=0, layers=max(ttt.config.layers) + 1) + bench.memory_cost(ttt).write(length, slots)

    def worst():
        with every_token(ttt):
            written(bench, ttt, texts)

    ways = {"base": base, "memory": Way(lambda: written(bench, ttt, texts), count, work(slots_of(written(bench, ttt, texts))))}
    if ttt.config.sparse:
        ways["memory, a slot a token"] = Way(worst, count, work(length))
    bench.compare("write", f"{count} x {length:,} tokens, codes", ways, length)


def read(bench: Bench) -> None:
    """The same questions of one memory of a longer and longer text, as slots and as a dense update."""
    count, base = bench.sizes.probes, bench.cost.answer(PROMPT, NEW)
    prompts = bench.rows(count, PROMPT)
    with bench.attached() as ttt:
        added = lambda *how: base if bench.form == "plain" and not bench.adapter else base + bench.memory_cost(ttt).read(PROMPT + NEW - 1, *how)
        asking = lambda memory: lambda: ask(bench, prompts, ttt, memory)
        ways = {"base": Way(lambda: ask(bench, prompts), count, base)}
        for length in bench.sizes.lengths:
            slots = written(bench, ttt, bench.rows(1, length))
            ways[f"slots of {length:,} tokens"] = Way(asking(slots), count, added(slots_of(slots)))
            ways[f"dense, of {length:,} tokens"] = Way(asking(slots.dense()), count, added(0, True))
        bench.compare("read", f"{count} at once, one memory", ways, PROMPT + NEW)


@torch.inference_mode()
def ask_about(bench: Bench, ttt, mode: str, documents, questions) -> None:
    """Answers of NEW tokens about long documents, in a mode of long_modes.py."""
    with asked(bench.model, bench.loaded.tokenizer, ttt, mode, documents, questions) as (logits, past, session):
        greedy(bench.model, bench.loaded.tokenizer, logits, past, NEW, session, early_stop=False)


def solves(bench: Bench) -> None:
    """Ridge's values of several texts of as many slots, in one batch and text by text: what fast_weight.WIDE chooses between."""
    down = bench.model.get_decoder().layers[0].mlp.down_proj
    sizes, hidden = code_sizes(down.in_features), down.out_features
    for texts, slots in bench.sizes.solves:
        draw = lambda width: unit(torch.randn(texts, slots, width, generator=bench.generator)).to(bench.device)
        asked = (torch.cat([draw(size) for size in sizes], -1), draw(hidden), torch.full((texts, slots), 10.0, device=bench.device))
        work = texts * (slots ** 3 / 3 + 2 * slots ** 2 * (sum(sizes) + hidden))
        with torch.no_grad():
            bench.compare("solve", f"{texts} x {slots:,} slots", {
                "in one batch": Way(lambda: solve(*asked, sizes), texts, work / texts),
                "text by text": Way(lambda: [solve(*one, sizes) for one in zip(*(t.split(1) for t in asked))], texts, work / texts)}, slots)


def long(bench: Bench) -> None:
    """A question of PROMPT tokens about one document of a longer and longer length, to the end of the base's window, in each mode, with the study's form and with codes."""
    cost, question, window = bench.cost, bench.rows(1, PROMPT), bench.model.config.get_text_config().max_position_embeddings
    for length in bench.sizes.long:
        if length > window:
            print(f"long    {length:,} tokens: the model's window is {window:,}", flush=True)
            continue
        document = bench.rows(1, length - PROMPT - NEW)
        tokens = len(document[0])
        for form in ("study", "codes"):
            with bench.attached(getattr(bench.loaded.row, form), document) as ttt:
                memory, top = bench.memory_cost(ttt), max(ttt.config.layers) + 1
                wrote = memory.write(tokens, bench.slots * tokens) if ttt.config.codes else memory.write_chunks(tokens)
                whole = cost.answer(tokens + PROMPT, NEW)
                work = {"in_context": whole, "ttt_paper": whole + wrote, "ttt_strict": cost.forward(tokens, predicted=0, layers=top) + wrote + cost.answer(PROMPT, NEW)}
                ways = {mode: Way(lambda mode=mode: ask_about(bench, ttt, mode, document, question), 1, needed) for mode, needed in work.items()}
                bench.compare("long", f"{length:,} tokens, {form}", ways, length)


def sizes_of_memory(bench: Bench) -> None:
    """Bytes of one conversation's memory, whole, in half precision and cut to a rank, beside its KV cache and the public way's dense matrices. Of shapes alone: what
    of the answers is kept are the conditions B_half and B_rank of run_experiment.py."""
    with bench.attached() as ttt:
        memory = written(bench, ttt, bench.rows(1, TEXT))
        layer = bench.model.get_decoder().layers[ttt.config.layers[0]].mlp.base.down_proj.weight
        found = {"memory": int(memory.row_nbytes()[0]), "memory, half": int(memory.half().row_nbytes()[0])} | {f"memory, rank {rank}": memory.compact(rank).nbytes() for rank in bench.sizes.ranks}
        found |= {"KV cache": TEXT * kv_bytes_per_token(bench.model), "public, dense": len(ttt.config.layers) * layer.nbytes}
    bench.facts["bytes"] = found
    for what, size in found.items():
        print(f"bytes   {TEXT} tokens {what:30s}{size / 1e6:10.3f} MB")


PARTS = {"machine": machine, "probe": probe, "write": write, "train": train, "read": read, "solve": solves, "long": long, "bytes": sizes_of_memory, "whole": whole}


# ---- the command ----

def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a row of `python model_utils.py` (default: %(default)s)")
    parser.add_argument("--weights", default="real", choices=("real", "random"), help="random: the row's shapes alone; its texts are cut by smollm2-135m's tokenizer")
    parser.add_argument("--adapter", help="checkpoint folder; without one an untrained adapter")
    parser.add_argument("--slots", type=float, default=SLOTS, help="share of the tokens for which an untrained adapter's gates are made to leave a slot (default: %(default).3f)")
    parser.add_argument("--form", default="codes", choices=("codes", "plain"), help="which of the row's settings an untrained adapter has (default: %(default)s)")
    parser.add_argument("--benchmark", default="benchmark_v1.json", help="whose questions the part whole asks (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s); floors need machine")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--out", default="results/bench", help="folder of the result (default: %(default)s)")
    arguments = parser.parse_args()
    for part in arguments.parts.split(","):
        if part not in PARTS:
            raise UserError(f"--parts {part}: unknown; use some of {','.join(PARTS)}")
    if not 0 < arguments.slots <= 1:
        raise UserError(f"--slots {arguments.slots:g}: use a share above 0, up to 1")
    if arguments.adapter and arguments.weights == "random":
        raise UserError("--adapter: fits a base's own weights; leave it out with --weights random")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    row = find_row(arguments.model)
    device, dtype, reason = pick_device(arguments.device, arguments.dtype, row)
    loaded = load_model(arguments.model, device, dtype, random_weights=arguments.weights == "random")
    if arguments.weights == "random" and row.hub is not None and "whole" in arguments.parts.split(","):
        loaded = replace(loaded, tokenizer=load_model(TOKENIZER_OF).tokenizer)
    bench = Bench(loaded, SIZES[device.type], arguments.form, arguments.adapter, arguments.benchmark, arguments.slots)
    print(f"{row.name}: {loaded.parameters / 1e9:.2f}B parameters, {loaded.source}, {reason}, {torch.get_num_threads()} threads")
    print(f"memories: {arguments.adapter}" if arguments.adapter else
          f"memories: an untrained adapter; sparse gates are set at random so that about {arguments.slots:.3f} of the tokens leave a slot, as trained ones do")
    print(HEADER)
    out = Path(arguments.out) / f"{row.name}-{device.type}"
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"model": row.name, "weights": arguments.weights, "scored": False, "parameters": loaded.parameters, "adapter": arguments.adapter,
             "slots": None if arguments.adapter else arguments.slots, "device": reason, "threads": torch.get_num_threads(), "sizes": asdict(bench.sizes)}
    asked = arguments.parts.split(",")
    for done, part in enumerate(asked, 1):
        PARTS[part](bench)
        # after each part: a run that is cut off keeps what it measured
        write_json(out.with_name(out.name + ".json"), about | {"parts": asked[:done], "machine_and_bytes": bench.facts, "lines": [asdict(line) for line in bench.lines]} | provenance())
    draw(bench.lines, row.name, out.with_name(out.name + ".png"))
    print(f"Report: {out}.json; figure: {out}.png")


if __name__ == "__main__":
    run_script(main)
