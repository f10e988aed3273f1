"""Rows of faults.py about processes: kills, signals, two at a time, no memory, a loss that diverges, the same bytes twice."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

import objectives
import run_experiment
import train_minimal
from fault_kit import ADAPTER, HERE, LIMIT, ROWS, STATE, Forked, Kit, refused, require, rows, same_arm, same_rows, succeeded, wait_for
from manifests import read_manifest
from verify_files import verify

KILLS = 25


def killed(kit: Kit, name: str, argv_of, first_of, straight: Path, compare, left) -> str:
    """Kill a script with SIGKILL at random moments after its first file, resume it, and compare with the uninterrupted one.

    Every fifth one is killed and resumed as it is typed; the others are forks of this process, which need not load their libraries first.
    argv_of(out): its command line; first_of(out): a file it writes early; left(out): how far it was, for the report.
    """
    draw, seen = kit.draws(name), []
    out = kit.root / name / "timed"
    process = Forked(argv_of(out))
    wait_for(first_of(out), process)
    begun = time.monotonic()
    require(process.wait(LIMIT) == 0, "the uninterrupted one failed")
    seconds = time.monotonic() - begun
    compare(out, straight)
    while len(seen) < kit.cases(KILLS):
        out, typed = kit.root / name / f"{len(seen)}", len(seen) % 5 == 4
        process = kit.start(argv_of(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) if typed else Forked(argv_of(out))
        wait_for(first_of(out), process)
        time.sleep(draw.uniform(0, seconds))
        process.kill()
        if process.wait(LIMIT) != -signal.SIGKILL:  # it was done before its moment came
            shutil.rmtree(out)
            continue
        seen.append(left(out))
        succeeded((kit.run if typed else kit.call)([*argv_of(out), "--resume"]))
        compare(out, straight)
        shutil.rmtree(out)
    return f"{len(seen)} kills, each resumed to the same end; they left {', '.join(map(str, sorted(seen)))}"


def kill_train(kit: Kit) -> str:
    compare = lambda out, straight: same_arm(out / "arm", straight)
    done = lambda out: json.loads((out / "arm/manifest.json").read_text())["updates"] if (out / "arm/manifest.json").exists() else 0
    return killed(kit, "kill-train", kit.train, lambda out: out / "arm/train.jsonl", kit.adapter, compare, done) + " of 6 updates saved"


def kill_experiment(kit: Kit) -> str:
    count = lambda out: (out / ROWS).read_bytes().count(b"\n")
    whole = len(rows(kit.answers))
    return killed(kit, "kill-experiment", kit.ask, lambda out: out / ROWS, kit.answers, same_rows, count) + f" of {whole} rows"


def interrupted(kit: Kit, number: signal.Signals, argv: list[str], first: Path) -> list[str]:
    """Send a signal after the first file; returns the command that the script says goes on, as it would be typed."""
    process = kit.start(argv)
    wait_for(first, process, lambda path: path.exists() and path.stat().st_size)
    process.send_signal(number)
    ended = kit.end(process)
    require(ended.code == 130 and "Traceback" not in ended.err, f"{number.name}: ended with {ended.code}: {ended.line[:300]}")
    command = ended.line.split()
    require(command[:2] == ["python", argv[0]] and command[-1] == "--resume", f"{number.name}: the last line is no command that goes on: {ended.line[:300]}")
    return command[1:]


def signals(kit: Kit) -> str:
    for number in (signal.SIGINT, signal.SIGTERM):
        out = kit.root / number.name
        again = interrupted(kit, number, kit.train(out / "train"), out / "train/arm" / STATE)
        succeeded(kit.run(again))
        same_arm(out / "train/arm", kit.adapter)
        again = interrupted(kit, number, kit.ask(out / "ask"), out / "ask" / ROWS)
        succeeded(kit.run(again))
        same_rows(out / "ask", kit.answers)
    return "Ctrl-C and SIGTERM to both scripts: exit 130, and the printed command ends as uninterrupted ones do"


def lost_modal(kit: Kit) -> str:
    """The caller's connection breaks while the pipeline runs: nothing on the service is touched, the command that goes on is printed."""
    code = ("import modal, modal_app\n"
            "class Gone:\n    def spawn(self, *a): return self\n    def get(self): raise modal.exception.ConnectionError('lost')\n"
            "modal_app.chosen = lambda *a: Gone()\nmodal_app.start('tiny-llama', '', 1, 1, 'C_nothing', '', 0, 'mine', 1, '', '')")
    ended = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=kit.env, capture_output=True, text=True)
    require("modal run modal_app.py::collect --run mine" in ended.stderr and "what is finished is kept" in ended.stderr, f"says {ended.stderr[-300:]}")
    return "the command that goes on is printed; on the service itself not shown"


def two_runs(kit: Kit) -> str:
    out = kit.root / "two"
    process = kit.start(kit.ask(out))
    wait_for(out / ROWS, process)
    refused(kit.call(kit.ask(out, "--resume")), out, "another run is writing into it now")
    succeeded(kit.end(process))
    same_rows(out, kit.answers)
    return "the second one is refused while the first one writes, which ends undisturbed"


def other_results(kit: Kit) -> str:
    """Results of another benchmark, adapter, commit or setting."""
    out, asked = shutil.copytree(kit.answers, kit.root / "other"), []
    before = {path: path.read_bytes() for path in out.iterdir()}
    benchmark = kit.root / "other.json"
    benchmark.write_bytes(kit.benchmark.read_bytes() + b"\n")
    succeeded(kit.call(kit.train(kit.root / "other-arm", "--seed", kit.seed + 1, updates=1)))
    commit = lambda: os.environ.update(TTT_COMMIT="0" * 12)
    for name, more, prepare in (("results", (), None), ("benchmark", ("--benchmark", benchmark, "--resume"), None),
                                ("adapter", ("--adapter", kit.root / "other-arm/arm", "--resume"), None), ("commit", ("--resume",), commit),
                                ("dtype", ("--dtype", "bfloat16", "--resume"), None)):
        refused(kit.call(kit.ask(out, *more), prepare), out, name, "--out")
        asked.append(name)
    for name, more in (("seed", ("--seed", kit.seed + 1)), ("optimizer", ("--lr", "0.1")), ("ttt", ("--layers", "2"))):
        refused(kit.call(kit.train(kit.adapter.parent, *more, "--resume", save_every=100)), kit.adapter, name)
        asked.append(f"training's {name}")
    require({path: path.read_bytes() for path in out.iterdir()} == before, "a refused run changed the folder")
    return f"refused, nothing changed: {', '.join(asked)}"


def diverging(kit: Kit) -> str:
    out = kit.root / "diverging"
    line = refused(kit.call(kit.train(out, "--lr", "30000", updates=40)), "the last good checkpoint is kept", out / "arm", "lower --lr")
    for name in read_manifest(out / "arm")["files"]:
        require(all(tensor.isfinite().all() for tensor in load_file(out / "arm" / name).values()), f"{name} of the kept checkpoint holds NaN or infinity")
    state = load_file(out / "arm" / STATE)
    require(all(tensor.isfinite().all() for name, tensor in state.items() if name.endswith("/value")), "the kept state holds NaN or infinity")

    def no_number():
        step = objectives.OBJECTIVES["recall"]
        objectives.OBJECTIVES["recall"] = lambda *a, **k: spoiled(step(*a, **k))
    spoiled = lambda result: replace(result, loss=result.loss * float("nan"))
    refused(kit.call(kit.train(kit.root / "nan"), no_number), "the loss is nan", "lower --lr")
    return line.partition("; ")[0].partition(": ")[2]


def no_memory(kit: Kit) -> str:
    """A device, or the host, that has no room for more than one question at a time; then for none, and for no update."""
    answer = run_experiment.answer

    def room_for(most: int, error: RuntimeError):
        def small(loaded, ttt, job, texts):
            if job.count > most:
                raise error
            return answer(loaded, ttt, job, texts)
        run_experiment.answer = small

    def none(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    for number, error in enumerate((torch.OutOfMemoryError("no room"), RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))):
        out = kit.root / f"halved-{number}"
        ended = succeeded(kit.call(kit.ask(out, batch=4), partial(room_for, 1, error)))
        require("out of memory at 4 questions" in ended.err and "at most 1 at once" in ended.err, "the halving is not said")
        answers = lambda folder: [{k: v for k, v in row.items() if k != "update_norm"} for row in rows(folder)]
        require(answers(out) == answers(kit.answers), "other answers in smaller batches")
    refused(kit.call(kit.ask(kit.root / "none"), partial(room_for, 0, error)), "no memory for one question")
    refused(kit.call(kit.train(kit.root / "none"), lambda: train_minimal.OBJECTIVES.update(recall=none)), "no memory for an update", "--conversations")
    return "a GPU's and the host's: halved with the same answers; one question or one update too much: one line"


def deterministic(kit: Kit) -> str:
    made = []
    for number in range(2):
        arm, run = kit.root / f"same-arm-{number}", kit.root / f"same-run-{number}"
        succeeded(kit.run(kit.train(arm, "--deterministic")))
        succeeded(kit.run(kit.ask(run, "--deterministic")))
        require(json.loads((arm / "arm/manifest.json").read_text())["hardware"]["deterministic"], "the manifest does not say so")
        made.append(((arm / "arm" / ADAPTER).read_bytes(), (run / ROWS).read_bytes()))
    require(made[0][0] == made[1][0], "two trainings, other weights")
    require(made[0][1] == made[1][1], "two runs, other bytes of predictions")
    lines, well = verify([run])
    require(well, lines[-1])
    return "two trainings the same adapter, two runs the same predictions, byte for byte; evaluate.py --verify passes"
