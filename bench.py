"""Time and memory side by side: the public way, ours, and the base without fast weights, in one process and one run.

    python bench.py --model qwen3-8b --weights random --device cuda
    python bench.py --model smollm2-135m --device cpu

Every case runs each way once a round, in turn, after one warm-up of each, and reports medians over the rounds; a ratio is the median of the
rounds' own ratios. Answers have exactly NEW tokens: nothing stops early by luck. Random weights have the shapes, the memory and the speed of
the real ones, and no meaning. Floors: operations over the measured rate of matrix products, bytes over the measured rate of copies, whichever
is more. Prints one table; writes OUT/MODEL-DEVICE.json and .png. BENCH.md says what was learned.
"""
from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

import benchmark_file
from conditions import CONDITIONS, Texts, answer, plan, text_length
from decoding import SEGMENT, answers_to, heard, kv_bytes_per_token, prefill, write_rows
from in_place_ttt import InPlaceTTT
from manifests import UserError, provenance, run_script, write_json
from memory import Memory
from model_utils import Loaded, find_row, load_adapter, load_model, pick_device
from objectives import lm_step, recall_step
from public_way import CHUNK, PublicWay
from training_data import Batch, Example

matplotlib.use("Agg")

NEW = 32            # new tokens of every answer, as the public attempt's
PROMPT = 50         # tokens of a question's prompt
TEXT = 140          # tokens of a conversation
TRAINED = 512       # tokens of a training sequence
TOKENIZER_OF = "smollm2-135m"  # what cuts the texts for random weights: any that cuts like the real one will do
WAY_COLORS = {"public": "#D55E00", "base": "#999999"}


@dataclass(frozen=True)
class Sizes:
    """How much of everything; what a GPU is given and what two CPU cores are."""

    probes: int                            # of one batch
    conversations: int                     # whose memories the batch shares
    writes: tuple[tuple[int, int], ...]    # (rows, tokens)
    public_text: int                       # the longest text that the public way is given
    batches: tuple[int, ...]               # sequences of one training step
    lengths: tuple[int, ...]               # of the conversations behind a memory that is read
    ranks: tuple[int, ...]                 # that a memory is cut to
    square: int                            # of the matrices that the machine is measured with
    limit: int | None                      # conversations a level and language of the whole experiment
    rounds: int


SIZES = {"cuda": Sizes(256, 32, ((64, TEXT), (1, 4096), (1, 32768)), 4096, (1, 4, 16, 32), (TEXT, 1024, 4096, 32768), (64, 16), 8192, None, 5),
         "cpu": Sizes(16, 4, ((4, TEXT), (1, 1024)), 1024, (1, 2), (TEXT, 512, 2048), (64, 16), 1024, 2, 3)}


@dataclass
class Line:
    """One way through one case. seconds: median, of a unit; ratio: to the case's first way; floor: seconds that the machine cannot beat;
    peak_gb: above what lay on the device before (None on a CPU)."""

    part: str
    case: str
    way: str
    seconds: float
    ratio: float
    tokens_per_s: float
    floor: float | None
    peak_gb: float | None


class Bench:
    """The base, the sizes, what was measured of the machine, and the lines so far."""

    def __init__(self, loaded: Loaded, sizes: Sizes, form: str = "codes", adapter: str | None = None, benchmark: str = "benchmark_v1.json"):
        self.loaded, self.sizes, self.form, self.adapter, self.benchmark, self.lines, self.facts = loaded, sizes, form, adapter, benchmark, [], {}
        self.model, self.pad, self.device = loaded.model, loaded.tokenizer.pad_token_id, loaded.device
        self.generator = torch.Generator().manual_seed(0)
        table, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        self.multiplied = loaded.parameters - (0 if head is table else table.numel())  # numbers that a token is multiplied with

    @contextlib.contextmanager
    def attached(self, config=None):
        """An adapter on the base for so long: the one asked for, or a new one with these settings."""
        if config is None and self.adapter:
            ttt, _ = load_adapter(self.adapter, self.loaded)
        else:
            ttt = InPlaceTTT(self.model, config or getattr(self.loaded.row, self.form))
        try:
            yield ttt
        finally:
            ttt.detach()

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

    def floor(self, tokens: int, calls: int = 1, moved: int = 0, passes: int = 1) -> float | None:
        """Seconds below which no way gets: the products of so many tokens with the weights, or reading the weights in every forward call
        and `moved` more bytes; None before the machine was measured. passes: 3 where there is a backward pass through everything."""
        if not self.facts:
            return None
        weights = self.multiplied * self.model.dtype.itemsize
        return max(passes * 2 * self.multiplied * tokens / self.facts["tflops"] / 1e12, (passes * calls * weights + moved) / self.facts["gb_per_s"] / 1e9)

    def compare(self, part: str, case: str, ways: dict, tokens: int, floor: float | None = None) -> None:
        """Time the ways of a case in turn, round by round, and keep a line of each. ways: {name: (function, how many units one call does)};
        tokens and floor: of one unit. The first way is what the others are held against; one that the device has no memory for is left out."""
        ways = {way: call for way, call in ways.items() if self.fits(part, case, way, call[0])}
        taken = {way: [] for way in ways}
        for _ in range(self.sizes.rounds):
            for way, (function, units) in ways.items():
                seconds, peak = self.clock(function)
                taken[way].append((seconds / units, peak))
        for way, rounds in taken.items():
            seconds = statistics.median(s for s, _ in rounds)
            ratio = statistics.median(s / other for (s, _), (other, _) in zip(rounds, next(iter(taken.values()))))
            self.lines.append(Line(part, case, way, seconds, ratio, tokens / seconds, floor, max((p for _, p in rounds if p is not None), default=None)))
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
    """The rate of large matrix products and of large copies (bytes read plus bytes written): what floors are made of."""
    n = bench.sizes.square
    a, b = (torch.randn(n, n, generator=bench.generator).to(bench.device, bench.model.dtype) for _ in range(2))
    out, large = torch.empty_like(a), torch.ones(32 * n * n, dtype=torch.bfloat16, device=bench.device)
    target = large.clone()
    median = lambda function: statistics.median(bench.clock(function)[0] for _ in range(10))
    times = min(100, max(1, 10 ** 11 // n ** 3))  # long enough to be timed
    bench.facts["tflops"] = times * 2 * n ** 3 / median(lambda: [torch.mm(a, b, out=out) for _ in range(times)]) / 1e12
    bench.facts["gb_per_s"] = 2 * large.nbytes / median(lambda: target.copy_(large)) / 1e9
    print(f"machine: products {bench.facts['tflops']:.4g} TFLOP/s in {bench.loaded.model.dtype}, copies {bench.facts['gb_per_s']:.4g} GB/s")


@torch.inference_mode()
def ask(bench: Bench, prompts, ttt=None, memory=None, head=()) -> None:
    """Answers of NEW tokens to every prompt. head: what all begin with, read once for each memory (or conversation) and shared."""
    rows = bench.sizes.conversations if memory is None else memory.batch
    past = heard(bench.model, [head] * rows, bench.pad, ttt, memory) if head else None
    answers_to(bench.model, bench.loaded.tokenizer, prompts, NEW, past, ttt, memory, early_stop=False)


@torch.inference_mode()
def written(bench: Bench, ttt, texts) -> Memory:
    return write_rows(bench.model, ttt, texts, bench.pad)[0]


def probe(bench: Bench) -> None:
    """A question of PROMPT tokens and an answer of NEW, asked of the memories of some conversations in one batch."""
    count, conversations = bench.sizes.probes, bench.sizes.conversations
    prompts, cut = bench.rows(count, PROMPT), PROMPT - PROMPT // 2
    head, tails = prompts[0][:cut], [row[cut:] for row in prompts]
    one = torch.tensor(prompts[:1], device=bench.device)
    moved = NEW * count * (PROMPT + NEW // 2) * kv_bytes_per_token(bench.model)
    floor = bench.floor(count * (PROMPT + NEW), NEW, moved)
    with bench.attached() as ttt:
        memory = written(bench, ttt, bench.rows(conversations, TEXT))
        public = PublicWay(bench.model, ttt.config.layers)
        public.ingest(torch.tensor(bench.rows(1, TEXT), device=bench.device))
        ways = {"base": (lambda: ask(bench, prompts), count), "memory": (lambda: ask(bench, prompts, ttt, memory), count),
                "base, shared beginning": (lambda: ask(bench, tails, head=head), count),
                "memory, shared beginning": (lambda: ask(bench, tails, ttt, memory, head), count),
                "public, one at a time": (lambda: public.answer(one, NEW), 1)}
        bench.compare("probe", f"{count} at once, {PROMPT} + {NEW} tokens", ways, PROMPT + NEW, floor and floor / count)


def write(bench: Bench) -> None:
    """Reading a text with the base alone, and writing it."""
    for count, length in bench.sizes.writes:
        texts = bench.rows(count, length)
        first = torch.tensor(texts[:1], device=bench.device)
        base = torch.inference_mode()(lambda: prefill(bench.model, texts, bench.pad))
        floor = bench.floor(count * length, -(-length // SEGMENT))
        for form, config in (("codes", None if bench.form == "codes" else bench.loaded.row.codes), ("plain", replace(bench.loaded.row.plain, chunk=CHUNK))):
            with bench.attached(config) as ttt:
                ways = {"base": (base, count), "memory": (lambda: written(bench, ttt, texts), count)}
                if form == "plain" and length <= bench.sizes.public_text:
                    public = PublicWay(bench.model, ttt.config.layers)
                    ways["public, one at a time"] = (lambda: public.ingest(first), 1)
                bench.compare("write", f"{count} x {length:,} tokens, {form}", ways, length, floor and floor / count)


def train(bench: Bench) -> None:
    """Forward and backward of one update: the next-token loss of TRAINED tokens in chunks, and the answers' loss of a memory."""
    config, device = replace(bench.loaded.row.plain, chunk=CHUNK), bench.device
    with bench.attached(config) as ttt:
        rows, public = bench.rows(1, TRAINED), PublicWay(bench.model, config.layers)
        step = lambda rows: lambda: (lm_step(bench.loaded, ttt, rows, device).loss.backward(), ttt.zero_grad(set_to_none=True))
        ways = {"base, forward alone": (torch.inference_mode()(lambda: prefill(bench.model, rows, bench.pad)), 1),
                "public, 1 at once": (lambda: public.train_step(torch.tensor(rows, device=device)), 1)}
        ways |= {f"memory, {n} at once": (step(bench.rows(n, TRAINED)), n) for n in bench.sizes.batches}
        bench.compare("train", f"next token, {TRAINED} tokens", ways, TRAINED, bench.floor(TRAINED, passes=2))
    with bench.attached(bench.loaded.row.codes) as ttt:
        asked = 2
        example = lambda: Example(bench.rows(1, TEXT)[0], bench.rows(1, 60)[0], [(bench.rows(1, 20)[0], bench.rows(1, 6)[0]) for _ in range(asked)])
        step = lambda rows: lambda: (recall_step(bench.loaded, ttt, Batch(rows), device).loss.backward(), ttt.zero_grad(set_to_none=True))
        ways = {f"memory, {n} at once": (step([example() for _ in range(n)]), n) for n in bench.sizes.batches}
        bench.compare("train", f"answers, {TEXT} tokens and {asked} questions", ways, TEXT + 60 + asked * 26)


def read(bench: Bench) -> None:
    """The same questions of one memory of a longer and longer text, as slots and as a dense update."""
    count = bench.sizes.probes
    prompts = bench.rows(count, PROMPT)
    with bench.attached() as ttt:
        for length in bench.sizes.lengths:
            slots = written(bench, ttt, bench.rows(1, length))
            ways = {"base": (lambda: ask(bench, prompts), count), "slots": (lambda: ask(bench, prompts, ttt, slots), count),
                    "dense": (lambda: ask(bench, prompts, ttt, slots.dense()), count)}
            bench.compare("read", f"{count} at once of {length:,} tokens", ways, PROMPT + NEW)


def sizes_of_memory(bench: Bench) -> None:
    """Bytes of one conversation's memory, whole and cut to a rank, beside its KV cache and the public way's dense matrices."""
    with bench.attached() as ttt:
        memory = written(bench, ttt, bench.rows(1, TEXT))
        layer = bench.model.get_decoder().layers[ttt.config.layers[0]].mlp.base.down_proj.weight
        found = {"memory": memory.nbytes()} | {f"memory, rank {rank}": memory.compact(rank).nbytes() for rank in bench.sizes.ranks}
        found |= {"KV cache": TEXT * kv_bytes_per_token(bench.model), "public, dense": len(ttt.config.layers) * layer.nbytes}
    bench.facts["bytes"] = found
    for what, size in found.items():
        print(f"bytes   {TEXT} tokens {what:30s}{size / 1e6:10.3f} MB")


def whole(bench: Bench) -> None:
    """The experiment itself, English: A_context, B_memory and C_nothing on every level and D_distractor, in the batches of run_experiment.py,
    without early stops."""
    benchmark = benchmark_file.load_benchmark(bench.benchmark)
    texts = Texts(benchmark, bench.loaded.tokenizer)
    samples = benchmark_file.select_samples(benchmark, benchmark_file.LEVELS, ("en",), bench.sizes.limit)
    with bench.attached() as ttt:
        for name in ("A_context", "B_memory", "C_nothing", "D_distractor"):
            jobs = plan([CONDITIONS[name]], samples, set(), texts, bench.sizes.probes)
            count = sum(job.count for job in jobs)
            answer(bench.loaded, ttt, jobs[0], texts, NEW, early_stop=False)  # warm-up
            seconds, peak = bench.clock(lambda: [answer(bench.loaded, ttt, job, texts, NEW, early_stop=False) for job in jobs])
            tokens = sum(text_length(job.condition, sample, texts) for job in jobs for sample in job.samples) + count * (PROMPT + NEW)
            bench.lines.append(Line("whole", f"{name}, {count} questions", "memory" if CONDITIONS[name].written else "base", seconds, 1.0, tokens / seconds, None, peak))
            print(text_of(bench.lines[-1]), flush=True)
    bench.facts["whole_seconds"] = sum(line.seconds for line in bench.lines if line.part == "whole")
    print(f"whole   {bench.facts['whole_seconds']:.1f} s for {sum(len(s['probes']) for s in samples)} questions a condition")


PARTS = {"machine": machine, "probe": probe, "write": write, "train": train, "read": read, "bytes": sizes_of_memory, "whole": whole}


# ---- the report ----

def text_of(line: Line) -> str:
    """A row of the table."""
    more = [f"{line.tokens_per_s:12,.0f} tok/s"] + ([f"floor x{line.seconds / line.floor:.2f}"] if line.floor else []) + ([f"{line.peak_gb:.2f} GB"] if line.peak_gb is not None else [])
    return f"{line.part:8s}{line.case:46s}{line.way:30s}{line.seconds:10.4f} s  x{line.ratio:<7.3f}{'  '.join(more)}"


def draw(bench: Bench, path: Path) -> None:
    """Seconds of every line beside its floor, a panel a part; no file where nothing was timed."""
    path.unlink(missing_ok=True)
    parts = [(part, lines) for part in PARTS if (lines := [line for line in bench.lines if line.part == part])]
    if not parts:
        return
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(bench.lines) + 0.7 * len(parts)), layout="constrained")
    panels = figure.subplots(len(parts), 1, squeeze=False, height_ratios=[len(lines) + 1 for _, lines in parts])[:, 0]
    figure.suptitle(f"Seconds a unit, {bench.loaded.row.name} (line: floor)")
    for ax, (part, lines) in zip(panels, parts):
        places = range(len(lines))
        ax.barh(places, [line.seconds for line in lines], color=[WAY_COLORS.get(line.way.split(",")[0], "#009E73") for line in lines])
        for place, line in zip(places, lines):
            if line.floor:
                ax.plot([line.floor] * 2, [place - 0.4, place + 0.4], color="black")
        ax.set_yticks(places, [f"{line.case}: {line.way}" for line in lines], fontsize=7)
        ax.invert_yaxis()
        ax.set_xscale("log")
        ax.set_title(part, fontsize=9)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a row of `python model_utils.py` (default: %(default)s)")
    parser.add_argument("--weights", default="real", choices=("real", "random"), help="random: the row's shapes alone; its texts are cut by smollm2-135m's tokenizer")
    parser.add_argument("--adapter", help="checkpoint folder; without one an untrained adapter, which leaves a slot at every token")
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
    if arguments.adapter and arguments.weights == "random":
        raise UserError("--adapter: fits a base's own weights; leave it out with --weights random")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    row = find_row(arguments.model)
    device, dtype, reason = pick_device(arguments.device, arguments.dtype, row)
    loaded = load_model(arguments.model, device, dtype, random_weights=arguments.weights == "random")
    if arguments.weights == "random" and row.hub is not None:
        loaded = replace(loaded, tokenizer=load_model(TOKENIZER_OF).tokenizer)
    bench = Bench(loaded, SIZES[device.type], arguments.form, arguments.adapter, arguments.benchmark)
    print(f"{row.name}: {loaded.parameters / 1e9:.2f}B parameters, {loaded.source}, {reason}, {torch.get_num_threads()} threads")
    for part in arguments.parts.split(","):
        PARTS[part](bench)
    out = Path(arguments.out) / f"{row.name}-{device.type}"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_name(out.name + ".json"), {
        "model": row.name, "weights": arguments.weights, "scored": False, "parameters": loaded.parameters, "adapter": arguments.adapter, "device": reason,
        "threads": torch.get_num_threads(), "sizes": asdict(bench.sizes), "machine_and_bytes": bench.facts, "lines": [asdict(line) for line in bench.lines], **provenance()})
    draw(bench, out.with_name(out.name + ".png"))
    print(f"Report: {out}.json; figure: {out}.png")


if __name__ == "__main__":
    run_script(main)
