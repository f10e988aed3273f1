"""What the rows of faults.py share: a tiny model, adapter and benchmark, the project's scripts as processes, and damage to files.

The model is random, but its answers depend on what it reads and remembers: its weights are large, and its head says printable bytes.
"""
from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import run_experiment
import train_minimal
from manifests import run_script, write_json
from model_utils import MODELS, byte_tokenizer

HERE = Path(__file__).parent
ROWS, ADAPTER, STATE = "predictions.jsonl", "adapter.safetensors", train_minimal.STATE
MAINS = {"train_minimal.py": train_minimal.main, "run_experiment.py": run_experiment.main}
ASKED = "B_memory,B_swapped,A_context,C_nothing"
LIMIT = 600  # seconds after which a script is taken to hang


class Fault(Exception):
    """What must happen under a fault did not; the message says what happened instead."""


class NotHere(Exception):
    """This machine cannot bring the fault about; the message says why."""


def require(held: bool, otherwise: str) -> None:
    if not held:
        raise Fault(otherwise)


@dataclass(frozen=True)
class Ended:
    """A script that ended: its exit code (negative: the signal that ended it), and what it said."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """Its last word."""
        return (self.err.strip() or self.out.strip() or "nothing").splitlines()[-1]


def refused(ended: Ended, *parts) -> str:
    """The one line of a script that must have refused: exit code 2, no traceback, and every part named in it."""
    require(ended.code == 2 and "Traceback" not in ended.err, f"ended with {ended.code}: {ended.line[:300]}")
    for part in parts:
        require(str(part) in ended.line, f"does not name {part}: {ended.line[:300]}")
    return ended.line


def raises(error, function, *named) -> None:
    """The function must raise the error, with a message of one line that names each part."""
    try:
        function()
    except error as raised:
        require(len(str(raised).splitlines()) == 1 and all(str(part) in str(raised) for part in named), f"says {str(raised)[:200]!r}")
    else:
        raise Fault(f"{named[0] if named else 'it'} was taken")


def succeeded(ended: Ended) -> Ended:
    require(ended.code == 0, f"ended with {ended.code}: {ended.line[:300]}")
    return ended


class Kit:
    """A folder of inputs, made when they are first asked for. quick: few cases, for the tests; seed: of every draw."""

    def __init__(self, root: Path, quick: bool, seed: int):
        self.root, self.quick, self.seed = root, quick, seed
        self.env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_MININTERVAL": "0"}

    def cases(self, full: int, few: int = 1) -> int:
        return few if self.quick else full

    def draws(self, name: str) -> random.Random:
        return random.Random(f"{self.seed}/{name}")

    def folder(self, name: str) -> Path:
        """A new folder."""
        path = self.root / name
        path.mkdir(parents=True)
        return path

    # ---- inputs ----

    @functools.cached_property
    def model(self) -> Path:
        settings = copy.deepcopy(MODELS["tiny-llama"].config)
        settings.tie_word_embeddings, settings.initializer_range = False, 0.15
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model, tokenizer = AutoModelForCausalLM.from_config(settings), byte_tokenizer()
            head = torch.zeros_like(model.lm_head.weight)
            printable = torch.tensor([tokenizer.convert_tokens_to_ids(chr(code)) for code in range(33, 127)])
            head[printable] = torch.randn(len(printable), head.shape[1])
        model.lm_head.weight = torch.nn.Parameter(head)
        model.save_pretrained(self.root / "model")
        tokenizer.save_pretrained(self.root / "model")
        return self.root / "model"

    @functools.cached_property
    def benchmark(self) -> Path:
        """The first English conversations of levels 1 and 2."""
        whole = json.loads((HERE / "benchmark_v1.json").read_text(encoding="utf-8"))
        english = [sample for sample in whole["samples"] if sample["lang"] == "en"]
        write_json(self.root / "benchmark.json", whole | {"samples": [s for level in (1, 2) for s in [s for s in english if s["level"] == level][:self.cases(4, 2)]]})
        return self.root / "benchmark.json"

    @functools.cached_property
    def adapter(self) -> Path:
        """A trained arm, uninterrupted."""
        succeeded(self.call(self.train(self.root / "straight", save_every=100)))
        return self.root / "straight" / "arm"

    @functools.cached_property
    def tuned(self) -> Path:
        """A LoRA that reads in context."""
        succeeded(self.call(self.train(self.root / "tuned", "--objective", "context", updates=1)))
        return self.root / "tuned" / "arm"

    @functools.cached_property
    def answers(self) -> Path:
        """A finished run, uninterrupted."""
        succeeded(self.call(self.ask(self.root / "answers")))
        return self.root / "answers"

    # ---- command lines ----

    def train(self, out: Path, *more, updates: int = 6, save_every: int = 1) -> list[str]:
        groups = () if "context" in more else ("--groups", "1")
        return ["train_minimal.py", "--model", str(self.model), "--lang", "en", "--layers", "1,2", "--arm", "arm", "--out", str(out), "--updates", str(updates),
                "--save-every", str(save_every), "--conversations", "1", *groups, "--probes", "2", "--warmup", "1", "--workers", "0", "--device", "cpu",
                "--seed", str(self.seed), *map(str, more)]

    def ask(self, out: Path, *more, conditions: str = ASKED, batch: int = 2) -> list[str]:
        return ["run_experiment.py", "--model", str(self.model), "--adapter", str(self.adapter), "--benchmark", str(self.benchmark), "--lang", "en",
                "--levels", "1,2", "--conditions", conditions, "--batch-size", str(batch), "--device", "cpu", "--out", str(out), *map(str, more)]

    # ---- scripts ----

    def start(self, argv: list[str], **how) -> subprocess.Popen:
        """The script as a process of its own, which hears Ctrl-C even where this one runs in the background."""
        hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen([sys.executable, str(HERE / argv[0]), *argv[1:]], **{"cwd": HERE, "env": self.env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
                                                                                   "text": True, "errors": "replace", "preexec_fn": hear} | how)

    def end(self, process: subprocess.Popen) -> Ended:
        try:
            out, err = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise Fault(f"was still running after {LIMIT} s") from None
        return Ended(process.returncode, out, err)

    def run(self, argv: list[str], **how) -> Ended:
        return self.end(self.start(argv, **how))

    def call(self, argv: list[str], prepare=None) -> Ended:
        """The script in a fork of this process, which has its libraries loaded already. prepare(): what is to go wrong in it."""
        return in_fork(functools.partial(called, argv, prepare))


class Forked:
    """A script in a fork of this process, as subprocess.Popen has one, for kills."""

    def __init__(self, argv: list[str]):
        self.process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(called(argv, None).code))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        return self.process.exitcode


def in_fork(function, limit: int | None = LIMIT):
    """What a function returns in a fork of this process; Fault where that one dies, or takes longer than `limit` seconds."""
    fork = multiprocessing.get_context("fork")  # nothing is pickled on the way in, so a function may be one of this moment
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: sender.send(function()))
    process.start()
    sender.close()
    try:
        require(receiver.poll(limit), f"was still running after {limit} s")
        return receiver.recv()
    except EOFError:
        process.join()
        raise Fault(f"died with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def called(argv: list[str], prepare) -> Ended:
    sys.argv, code, out, err = list(argv), 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if prepare:
            prepare()
        try:
            run_script(MAINS[argv[0]])
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Exception:
            code = 1
            traceback.print_exc()
    return Ended(code, out.getvalue(), err.getvalue())


def wait_for(path: Path, process: subprocess.Popen | Forked, ready=lambda path: path.exists()) -> None:
    """Until the file is there; Fault where the process ends before."""
    deadline = time.monotonic() + LIMIT
    while not ready(path):
        require(process.poll() is None and time.monotonic() < deadline, f"ended before {path.name} was there")
        time.sleep(0.002)


def resident_bytes() -> int:
    """The memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# ---- files ----

def rows(folder: Path) -> list[dict]:
    """A run's rows in an order of their own: which batch came first does not matter."""
    lines = (folder / ROWS).read_text(encoding="utf-8").split("\n")
    return sorted((json.loads(line) for line in lines if line), key=lambda row: (row["condition"], row["probe_id"]))


def same_rows(folder: Path, straight: Path) -> None:
    one, two = rows(folder), rows(straight)
    different = sum(left != right for left, right in zip(one, two))
    require(one == two, f"{len(one)} rows, uninterrupted {len(two)}; {different} of them differ")


def same_arm(folder: Path, straight: Path) -> None:
    """The same weights, byte for byte, and the same log but for the clock."""
    require((folder / ADAPTER).read_bytes() == (straight / ADAPTER).read_bytes(), "other weights than the uninterrupted training")
    timeless = lambda path: [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_s")}
                             for line in (path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    require(timeless(folder) == timeless(straight), "another log than the uninterrupted training")


def flip(path: Path, draw: random.Random) -> str:
    """One bit of a file changed; says where."""
    data = bytearray(path.read_bytes())
    place, bit = draw.randrange(len(data)), draw.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place} of {path.name}"


def cut(path: Path, draw: random.Random) -> str:
    """A file cut short; says to what."""
    length = draw.randrange(path.stat().st_size)
    os.truncate(path, length)
    return f"{path.name} cut to {length} bytes"
