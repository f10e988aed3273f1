"""Questions and training by one process and by several, side by side: what a second GPU is worth.

    python bench_processes.py --model qwen3-8b --weights random --processes 2 --device cuda

Both do the same work: all questions of B_memory and B_swapped in English, whose batches the processes share out, and the same updates of a recall arm with
codes, whose memories they share out. It runs itself under torchrun for the several; loading, and a warm-up of each (of training every update), are not timed, nor
is the making of the data. Random weights have the shapes and the speed of the real ones, and no meaning. Prints one table, and whether one and several said the
same: answers that differ, and the largest difference of an update's loss. Writes OUT/MODEL-DEVICE-processes.json.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import benchmark_file
from bench import SIZES, TOKENIZER_OF, Bench
from conditions import CONDITIONS, Texts, answer, plan
from manifests import UserError, provenance, run_script, write_json
from model_utils import find_row, load_model, pick_device
from objectives import recall_step
from parallel import Group, process_group
from public_way import NEW
from training_data import ALONE, BankDataset
from update_parts import part_of

PROBES = 8               # questions of a conversation, as in training
ASKED = ("B_memory", "B_swapped")
GROUPS = (1, 1, 2, 4)    # rows of a memory to draw from, likewise


def seconds_of(group: Group, device: torch.device, work) -> float:
    """From when all processes begin until all have ended."""
    group.wait()
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    group.wait()
    return time.perf_counter() - begun


def time_questions(bench: Bench, group: Group) -> dict:
    benchmark = benchmark_file.load_benchmark(bench.benchmark)
    texts = Texts(benchmark, bench.loaded.tokenizer)
    samples = benchmark_file.select_samples(benchmark, benchmark_file.LEVELS, ("en",), bench.sizes.limit)
    jobs = plan([CONDITIONS[name] for name in ASKED], samples, set(), texts, bench.sizes.probes // 2)  # the last batch is waited for
    rows = []
    with bench.attached() as ttt:
        ask = lambda number: answer(bench.loaded, ttt, jobs[number], texts, NEW, early_stop=False)
        ask(0)
        seconds = seconds_of(group, bench.device, lambda: [rows.extend(ask(number)) for number in group.turns("questions", len(jobs))])
    return {"part": "evaluate", "work": f"{sum(job.count for job in jobs):,} questions in {len(jobs)} batches", "seconds": seconds,
            "answers": {f"{row['condition']} {row['probe_id']}": row["prediction"] for row in rows}}


def time_training(bench: Bench, group: Group, conversations: int, updates: int) -> dict:
    drawn = ALONE + updates
    dataset = BankDataset(bench.loaded.tokenizer, ("en",), drawn, conversations, PROBES, 0, False, GROUPS, calm=True, foreign=True)
    batches = [dataset[update] for update in range(ALONE, drawn)]  # from where memories are of several sizes on
    losses = []
    with bench.attached() as ttt:
        parameters = list(ttt.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-6)

        def train(batch):
            part = part_of(batch, group)
            loss = recall_step(bench.loaded, ttt, part.own, bench.device, part=part).loss
            loss.backward()
            group.sum_gradients(parameters)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())

        for batch in batches:  # each once: of other shapes a GPU's memory is asked for anew, which a long training does not see again
            train(batch)
        seconds = seconds_of(group, bench.device, lambda: [train(batch) for batch in batches])
    return {"part": "train", "work": f"{updates} updates of {conversations} conversations", "seconds": seconds, "losses": torch.stack(losses).tolist()}


def measure(arguments, group: Group) -> None:
    """What one of the processes does; each leaves its lines in the folder --times."""
    group.take_gpu(arguments.device)
    row = find_row(arguments.model)
    device, dtype, reason = pick_device(arguments.device, arguments.dtype, row, training=True)
    loaded = load_model(arguments.model, device, dtype, random_weights=arguments.weights == "random")
    if arguments.weights == "random" and row.hub is not None:
        loaded = replace(loaded, tokenizer=load_model(TOKENIZER_OF).tokenizer)
    sizes = replace(SIZES[device.type], limit=arguments.limit or SIZES[device.type].limit)
    bench = Bench(loaded, sizes, benchmark=arguments.benchmark)
    lines = [time_questions(bench, group), time_training(bench, group, arguments.conversations, arguments.updates)]
    write_json(Path(arguments.times) / f"{group.rank}.json", {"device": reason, "lines": lines})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a row of `python model_utils.py` (default: %(default)s)")
    parser.add_argument("--weights", default="real", choices=("real", "random"), help="random: the row's shapes alone; its texts are cut by smollm2-135m's tokenizer")
    parser.add_argument("--processes", type=int, default=2, help="how many are held against one (default: %(default)s)")
    parser.add_argument("--benchmark", default="benchmark_v1.json", help="whose questions are asked (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="conversations a level (default: all, on a CPU 2)")
    parser.add_argument("--conversations", type=int, default=16, help="of an update, over all processes (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=8, help="a multiple of 8 has prose, calm and foreign rows in their shares (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--out", default="results/bench/processes", help="folder of the result (default: %(default)s)")
    parser.add_argument("--times", help=argparse.SUPPRESS)  # the folder of what the measuring processes of this script write
    arguments = parser.parse_args()
    for name, least in {"processes": 2, "conversations": max(GROUPS), "updates": 1}.items():
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} {getattr(arguments, name)}: use {least} or more")
    return arguments


def timed(processes: int) -> dict:
    """What this script measures with so many processes: the leader's lines, with everybody's answers, and losses summed over all."""
    with tempfile.TemporaryDirectory() as folder:
        start = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        if subprocess.run([sys.executable, *start, __file__, *sys.argv[1:], "--times", folder]).returncode:
            raise UserError(f"--processes {processes}: the measuring ended with the error above; mend that and run again")
        told = [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]
    (questions, training), others = told[0]["lines"], [one["lines"] for one in told[1:]]
    for asked, trained in others:
        questions["answers"] |= asked["answers"]
        training["losses"] = [a + b for a, b in zip(training["losses"], trained["losses"])]
    return told[0]


def compared(one: dict, several: dict, processes: int) -> dict:
    """A line of the report: the times of both, and how far what they said is the same."""
    line = {name: one[name] for name in ("part", "work", "seconds")}
    line |= {"processes": processes, "seconds_of_all": several["seconds"], "times_as_fast": one["seconds"] / several["seconds"]}
    if "answers" in one:
        return line | {"answers": len(one["answers"]), "answers_that_differ": sum(several["answers"].get(name) != said for name, said in one["answers"].items())}
    return line | {"losses": one["losses"], "losses_of_all": several["losses"]}


def main() -> None:
    arguments = parse_arguments()
    if arguments.times:
        with process_group() as group:
            measure(arguments, group)
        return
    one, several = timed(1), timed(arguments.processes)
    print(f"{arguments.model}, {arguments.weights} weights, {one['device']}")
    print(f"{'part':10s}{'work':44s}{'1 process':>12s}{f'{arguments.processes} processes':>14s}{'times as fast':>15s}")
    lines = [compared(*pair, arguments.processes) for pair in zip(one["lines"], several["lines"])]
    for line in lines:
        print(f"{line['part']:10s}{line['work']:44s}{line['seconds']:10.2f} s{line['seconds_of_all']:12.2f} s{line['times_as_fast']:15.2f}")
    questions, training = lines
    apart = max(abs(a - b) / abs(a) for a, b in zip(training["losses"], training["losses_of_all"]))
    print(f"answers that differ: {questions['answers_that_differ']} of {questions['answers']:,}; losses differ by at most {apart:.1e} of themselves")
    out = Path(arguments.out) / f"{arguments.model.replace('/', '-')}-{one['device'].split(':')[0].split(',')[0]}-processes.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"model": arguments.model, "weights": arguments.weights, "scored": False, "device": one["device"], "lines": lines} | provenance())
    print(f"Report: {out}")


if __name__ == "__main__":
    run_script(main)
