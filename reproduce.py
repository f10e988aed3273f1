"""Train the reported arms again, and those of the long-context study, and ask them everything that is reported of them, on as many GPUs as there are.

    python reproduce.py --list
    python reproduce.py                                                  everything, on all GPUs, into ./reproduced
    python reproduce.py --only qwen-deep-seed1,qwen-joint-seed1 --out .  these two, beside what the repository holds

A row of ARMS is one arm and seed. Its training is one task and its questions another, each a chain of the scripts' own commands on one GPU;
questions wait for their arm, a joint arm for the one it starts from, and training goes before questions. What is finished is not done twice, and a
command that was cut off goes on where it was, so the same command continues an interrupted run. A command that fails ends what depends on it
and nothing else. Each task's output goes to OUT/logs/TASK.log.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from manifests import UserError, chosen, run_script
from training_state import STATE

HERE = Path(__file__).parent
SMOLLM2, QWEN, GEMMA = ("--model", "smollm2-135m"), ("--model", "qwen2.5-coder-0.5b"), ("--model", "gemma3-270m")
TRAIN = ("--workers", "6", "--save-every", "150")
JOINT = ("--joint", "--lr", "0.001", "--updates", "105")
# The study trains 200 updates of 16,384 tokens (Gemma 8,192: a logit for each of 262,144 words): 45 s for smollm2-study and 94 s for qwen-study, three
# side by side on an H200. The arms that go on at length: 200 or 400 updates of at most 16,384 tokens.
STUDY = ("--workers", "6", "--save-every", "100", "--form", "study", "--updates", "200", "--warmup", "20", "--lr", "0.001")
LM, LONG_ROWS, DOCS = ("--objective", "lm"), ("--length", "2048"), ("--data", "package-docs")
# 80 items of 8,192 tokens in one batch. In float32 four modes side by side answered 23,000 tokens of prompts a second on an H200, too few for all rows;
# in bfloat16 answers may change with the batch, which run.json keeps.
# The untouched bases, the arms of the headline and what is clipped to 0.001 are asked the profile full's items of every task and length, the others the first
# 20 of these: unclipped the study's arms answer next to nothing from 2,048 tokens on.
FULL, FEW = "100", "20"
CLIPS = (("0.001", FULL), ("0.01", FEW))
LONG = ("--workers", "6", "--dtype", "bfloat16", "--batch-tokens", "655360")
SHORT, FAR = "1024,2048,4096,8192", ("16384", "32768")  # each far length is a run of its own, for another GPU to take
ASKED = "B_memory,B_swapped,B_merged_4,D_distractor,A_foreign"
MORE = "N_noise,B_merged_2,B_merged_8,P_paper,D_512,D_1024,D_2048,B_rank_1,B_rank_4,B_rank_16,B_rank_64"
BY_HAND = ("--benchmark", "natural_v1.json")


@dataclass(frozen=True)
class Ask:
    """One run of questions: the folder under results/, with {} for the row's name, the conditions, and what else is said."""

    folder: str
    conditions: str
    more: tuple[str, ...] = ()


SEED = (Ask("{}", ASKED),)
FIRST = (*SEED, Ask("{}-more", MORE), Ask("{}-half", "B_half"), Ask("natural/{}", "B_memory,B_swapped", BY_HAND))
CEILING = (Ask("{}", "A_tuned"), Ask("natural/{}", "A_tuned", BY_HAND))
BASE = (Ask("{}", "A_context,C_nothing,A_distractor"), Ask("natural/{}", "A_context,C_nothing", BY_HAND))


@dataclass(frozen=True)
class Arm:
    """One row: what is trained (nothing where `train` is None: a base), from which row's adapter it starts, and what it is asked."""

    arm: str
    asks: tuple[Ask, ...]
    train: tuple[str, ...] | None = None
    model: tuple[str, ...] = ()
    seed: int = 0
    start: str | None = None
    prose: tuple[str, ...] = ()   # languages in which harm.py measures unrelated prose
    long: str = ""                # modes in which run_long.py asks long texts
    far: tuple[str, ...] = ()     # lengths of these texts beyond SHORT
    clips: tuple[tuple[str, str], ...] = ()  # (limit of a chunk, SHORT items): texts are asked again under it, with their own memory and SHORT ones with another's
    count: str = FEW              # items of each task and SHORT length; of a far one FEW
    controls: bool = False        # whether SHORT texts are asked once more, FEW items of each, with the memory read slot by slot and with another text's
    tuned: bool = False           # a LoRA that reads in context

    @property
    def name(self) -> str:
        return self.arm + (f"-seed{self.seed}" if self.seed else "")

    @property
    def checkpoint(self) -> str:
        return f"checkpoints/seed{self.seed}/{self.arm}" if self.seed else f"checkpoints/{self.arm}"


def study(base: str, rows: int, model=(), far: tuple[str, ...] = (), again: tuple[int, ...] = ()) -> list[Arm]:
    """The arms of the long-context study, of so many rows an update: the paper's objective on its own mechanism, on the bank's conversations joined and on
    documentation, W_down trained along, our objective on the same mechanism, and documentation with other chunks, in rows of twice the length. far: lengths beyond
    SHORT that they are asked; again: further seeds of the arm of conversations, asked clipped and no far lengths. What is written is clipped, too, in other runs."""
    arms = {"study": (*LM, *LONG_ROWS), "study-docs": (*LM, *LONG_ROWS, *DOCS), "study-docs-wdown": (*LM, *LONG_ROWS, *DOCS, "--w-down"), "study-recall": (*LONG_ROWS, "--groups", "1")}
    sized = {name: (*how, "--conversations", str(rows)) for name, how in arms.items()}
    sized |= {f"study-docs-{chunk}": (*LM, *DOCS, "--chunk", str(chunk), "--length", "4096", "--conversations", str(rows // 2)) for chunk in (512, 2048)}
    clips = {"study": CLIPS[:1], "study-docs": CLIPS, "study-docs-wdown": (("0.001", FEW),)}
    return [Arm(f"{base}-{name}", (), (*STUDY, *how), model, long="ttt_empty," * ("--w-down" in how) + "ttt_paper,ttt_strict", far=far,
                clips=clips.get(name, ())) for name, how in sized.items()] + [Arm(f"{base}-study", (), (*STUDY, *sized["study"]), model, seed, clips=clips["study"]) for seed in again]


def longer(of: str, tuned: str, model=(), far: tuple[str, ...] = (), again: tuple[tuple[int, str], ...] = ()) -> list[Arm]:
    """A recall arm that goes on on conversations of the study's length, and one that goes on on texts with needles, then on texts of twice the length; and the
    LoRA that reads in context, on the same needles. far: lengths beyond SHORT that those of the needles are asked; again: further seeds of the needles, each
    with the row it starts from."""
    every, needles = ("--workers", "6", "--save-every", "100", "--warmup", "20"), ("--updates", "400", "--data", "needles")
    how, recall = (*every, "--conversations", "8", *LONG_ROWS), ("--lr", "0.0005", "--groups", "1")
    return [Arm(f"{of}-long", (), (*how, *recall, "--updates", "200"), model, start=of, long="ttt_paper,ttt_strict"),
            *(Arm(f"{of}-needles", (), (*how, *recall, *needles), model, seed, start=start, long="ttt_paper,ttt_strict", far=far, count=FULL, controls=True)
              for seed, start in ((0, of), *again)),
            Arm(f"{of}-needles-4096", (), (*every, "--conversations", "4", "--length", "4096", *recall, *needles), model, start=f"{of}-needles",
                long="ttt_paper,ttt_strict", far=far, controls=True),
            Arm(f"{tuned}-needles", (), (*how, "--objective", "context", "--lr", "0.000125", *needles), model, start=tuned, long="in_context_tuned", far=far, count=FULL, tuned=True)]


def seeds(arm: str, numbers, train, model=(), **first) -> list[Arm]:
    """An arm's seeds; the first one is asked `first`, every other SEED."""
    return [Arm(arm, **({"asks": SEED} | (first if seed == numbers[0] else {})), train=train, model=model, seed=seed) for seed in numbers]


def joint(arm: str, starts: dict[int, str], model=()) -> list[Arm]:
    """Joint arms by seed, each with the row it starts from."""
    return [Arm(arm, SEED, (*TRAIN, *JOINT), model, seed, start=start) for seed, start in starts.items()]


ARMS = {row.name: row for row in (
    *seeds("qwen-deep", (0, 1, 2), (*TRAIN, "--updates", "3300"), QWEN, asks=FIRST, prose=("en", "zh")),
    *seeds("smollm2-deep", (0, 1, 2), TRAIN, asks=FIRST, prose=("en",)),
    Arm("gemma3-deep", FIRST, (*TRAIN, "--updates", "2400"), GEMMA, prose=("en", "zh")),
    Arm("smollm2-tuned", CEILING, (*TRAIN, "--objective", "context"), tuned=True),
    Arm("qwen-tuned", CEILING, (*TRAIN, "--objective", "context", "--updates", "1100"), QWEN, tuned=True),
    Arm("gemma3-tuned", CEILING, (*TRAIN, "--objective", "context", "--updates", "1100"), GEMMA, tuned=True),
    *joint("smollm2-joint", {0: "smollm2-deep", 1: "smollm2-deep", 2: "smollm2-deep-seed2"}),  # seed 1's adapter is not kept
    *joint("qwen-joint", {0: "qwen-deep", 1: "qwen-deep-seed1", 2: "qwen-deep-seed2"}, QWEN),
    Arm("smollm2-lm", (Ask("{}", "B_memory,B_swapped,N_noise,D_distractor"),), (*TRAIN, "--objective", "lm")),
    *study("smollm2", 8, again=(1, 2)), *study("qwen", 8, QWEN, far=FAR), *study("gemma3", 4, GEMMA, far=FAR, again=(1, 2)),
    *longer("smollm2-deep", "smollm2-tuned", again=((2, "smollm2-deep-seed2"),)), *longer("qwen-deep", "qwen-tuned", QWEN, far=FAR),
    *longer("gemma3-deep", "gemma3-tuned", GEMMA, far=FAR),
    *(Arm(f"{model[1]}-base", BASE, model=model, long="in_context", far=far, count=FULL) for model, far in ((SMOLLM2, ()), (QWEN, FAR), (GEMMA, FAR))))}


# ---- an arm as commands ----

@dataclass
class Task:
    """Commands one after the other on one GPU, and the tasks that must have gone well before."""

    name: str
    commands: list[list[str]]
    needs: list[str] = field(default_factory=list)


def training(row: Arm, out: Path) -> list[list[str]]:
    """The training command; none for a base, and none for an arm that is finished."""
    folder = out / row.checkpoint
    if row.train is None or (folder / "manifest.json").exists() and not (folder / STATE).exists():
        return []
    start = ("--start", str(out / ARMS[row.start].checkpoint)) if row.start else ()
    return [["train_minimal.py", *row.model, *row.train, *start, "--arm", row.arm, "--seed", str(row.seed), "--out", str(folder.parent), "--resume"]]


def questions(row: Arm, out: Path) -> list[list[str]]:
    """The commands that ask what is not answered yet."""
    adapter = () if row.train is None else ("--tuned-adapter" if row.tuned else "--adapter", str(out / row.checkpoint))
    commands = []
    for ask in row.asks:
        folder = out / "results" / ask.folder.format(row.name)
        if not answered(folder, ask.conditions):
            commands.append(["run_experiment.py", *row.model, *adapter, *ask.more, "--conditions", ask.conditions, "--batch-size", "256",
                             "--out", str(folder), "--resume"])
    for lang in row.prose:
        path = out / "results" / "harm" / f"{row.name}-{lang}.json"
        if not path.exists():
            commands.append(["harm.py", *row.model, *adapter, "--lang", lang, "--out", str(path)])
    for folder, modes, how in long_runs(row, out):
        if not long_answered(folder, modes, how):
            commands.append(["run_long.py", *row.model, *adapter, *how, "--modes", modes, *LONG, "--out", str(folder), "--resume"])
    return commands


def long_runs(row: Arm, out: Path) -> list[tuple[Path, str, tuple[str, ...]]]:
    """(folder, modes, what else is said) of each run of a row's long texts."""
    of = lambda more: out / "results" / "long" / f"{row.name}{more}"
    asked = lambda count, length=SHORT: ("--lengths", length, "--count", count)
    return [*[(of(""), row.long, asked(row.count))] * bool(row.long),
            *((of(f"-at-{length}"), row.long, asked(FEW, length)) for length in row.far),
            *((of(f"-{mode}"), f"ttt_{mode}", asked(FEW)) for mode in ("sharp", "foreign") * row.controls),
            *((of(f"-clip-{clip}{name}"), mode, ("--clip", clip, *asked(count)))
              for clip, count in row.clips for name, mode in (("", "ttt_paper"), ("-foreign", "ttt_foreign"))),
            *((of(f"-clip-{clip}-at-{length}"), "ttt_paper", ("--clip", clip, *asked(FEW, length))) for clip, _ in row.clips for length in row.far)]


def finished(folder: Path) -> dict:
    """The run.json of a finished run, empty where there is none."""
    path = folder / "run.json"
    run = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return run if run.get("complete") else {}


def answered(folder: Path, conditions: str) -> bool:
    """Whether a finished run has all these conditions."""
    return set(conditions.split(",")) <= set(finished(folder).get("conditions", []))


def long_answered(folder: Path, modes: str, how: tuple[str, ...]) -> bool:
    """Whether a finished run of all tasks at hand has these modes and lengths, and so many items of each. how: what long_runs says of it."""
    run, asked = finished(folder), dict(zip(how[::2], how[1::2]))
    if not run or not {"--tasks", "--items"}.isdisjoint(run["command"].split()):
        return False
    lengths = {int(length) for length in asked["--lengths"].split(",")}
    cells = len(run["modes"]) * len(run["tasks"]) * len(run["lengths"])
    return set(modes.split(",")) <= set(run["modes"]) and lengths <= set(run["lengths"]) and run["rows"] >= cells * int(asked["--count"])


def tasks_of(names, out: Path) -> list[Task]:
    """What is to be done for these rows, training before questions. UserError where a row starts from one that is neither named nor there."""
    trainings, asked = [], []
    for row in (ARMS[name] for name in names):
        before = [f"train {row.start}"] if row.start in names else []
        if row.start and not before and training(ARMS[row.start], out):
            raise UserError(f"--only {row.name}: starts from {row.start}, which is not in {out}; name it too")
        trainings.append(Task(f"train {row.name}", training(row, out), before))
        asked.append(Task(f"ask {row.name}", questions(row, out), [f"train {row.name}"]))
    return trainings + asked


# ---- running them ----

class Runner:
    """Runs tasks on slots (one GPU each) until none is left; `running` are the processes of the moment, each in a session of its own, so
    that Ctrl-C reaches them once, through `stop`."""

    def __init__(self, slots: list[str], out: Path):
        self.slots, self.out, self.running, self.stopped = slots, out, set(), False

    def run(self, tasks: list[Task]) -> dict[str, str]:
        """{task: "done", or what went wrong}."""
        ended, waiting, busy, free = {}, list(tasks), {}, list(self.slots)
        with ThreadPoolExecutor(len(self.slots)) as pool:
            while waiting or busy:
                for task in [task for task in waiting if all(need in ended for need in task.needs)]:
                    lost = [need for need in task.needs if ended[need] != "done"]
                    if lost or not task.commands:
                        ended[task.name] = f"not begun: {lost[0]} failed" if lost else "done"
                    elif free:
                        slot = free.pop(0)
                        busy[pool.submit(self.chain, task, slot)] = (task, slot)
                    else:
                        continue
                    waiting.remove(task)
                for future in self.next_ended(busy):
                    task, slot = busy.pop(future)
                    ended[task.name] = future.result()
                    free.append(slot)
                    print(f"{time.strftime('%H:%M:%S')}  {task.name}: {ended[task.name]}", flush=True)
        return ended

    @staticmethod
    def next_ended(busy: dict[Future, tuple]) -> set[Future]:
        return wait(busy, return_when=FIRST_COMPLETED).done if busy else set()

    def chain(self, task: Task, slot: str) -> str:
        """Run a task's commands; "done", or the command that failed and its last line."""
        log = self.out / "logs" / f"{task.name.replace(' ', '-')}.log"
        print(f"{time.strftime('%H:%M:%S')}  {task.name} on GPU {slot}: {log}", flush=True)
        for command in task.commands:
            if self.stopped:
                return "stopped before it ended"
            with log.open("a", encoding="utf-8") as file:
                file.write(f"$ python {' '.join(command)}\n")
                file.flush()
                process = subprocess.Popen([sys.executable, HERE / command[0], *command[1:]], stdout=file, stderr=subprocess.STDOUT,
                                           start_new_session=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": slot})
                self.running.add(process)
                if self.stopped:  # it was begun while all others were being stopped
                    process.terminate()
                code = process.wait()
                self.running.discard(process)
            if code:
                last = (log.read_text(encoding="utf-8").splitlines() or [""])[-1]
                return f"{command[0]} ended with {code}: {last}"
        return "done"

    def stop(self, *_) -> None:
        """Ask every command to keep what it has and end; the tasks after them then end as failed. SIGTERM: what a shell puts in the background
        ignores SIGINT, and so does all that it starts."""
        self.stopped = True
        for process in list(self.running):
            process.terminate()


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, else the numbers of nvidia-smi's GPUs; none without a driver."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:  # empty: all are hidden
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ARMS), help="rows, comma-separated (default: all of --list)")
    parser.add_argument("--gpus", help="GPUs to use, e.g. 0,1; a number twice runs two tasks on it (default: all that are visible)")
    parser.add_argument("--out", default="reproduced", type=Path, help="where checkpoints/, results/ and logs/ lie (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print what there is to do, command by command, and end")
    arguments = parser.parse_args()
    arguments.only = chosen("--only", arguments.only, ARMS)
    arguments.slots = arguments.gpus.split(",") if arguments.gpus else visible_gpus()
    return arguments


def what_next(arguments) -> str:
    """The commands that score these rows' answers, on the benchmark and on long texts; where they lie among the repository's own they are found there."""
    rows, results = [ARMS[name] for name in arguments.only], arguments.out / "results"
    folders = {"evaluate.py": [results / ask.folder.format(row.name) for row in rows for ask in row.asks if ask.more != BY_HAND],
               "report_long.py": [folder for row in rows for folder, *_ in long_runs(row, arguments.out)]}
    places = {"evaluate.py": results, "report_long.py": results / "long"}
    said = lambda script: [] if arguments.out.resolve() == HERE else [*map(str, folders[script]), "--out", str(places[script])]
    return "; ".join(" ".join(["python", script, *said(script)]) for script in folders if folders[script])


def main() -> None:
    arguments = parse_arguments()
    tasks = tasks_of(arguments.only, arguments.out)
    if arguments.list:
        for task in tasks:
            print(f"{task.name}{f' (after {task.needs[0]})' if task.needs else ''}{'' if task.commands else ': nothing to do'}")
            print("".join(f"    python {' '.join(command)}\n" for command in task.commands), end="")
        return
    if not arguments.slots:
        raise UserError("no GPU is visible; the reported arms take GPU minutes each and CPU days: run this on a GPU host, or name devices with --gpus")
    (arguments.out / "logs").mkdir(parents=True, exist_ok=True)
    runner = Runner(arguments.slots, arguments.out)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, runner.stop)
    ended = runner.run(tasks)
    failed = {name: how for name, how in ended.items() if how != "done"}
    print("\n".join(f"{name}: {how}" for name, how in failed.items()) or f"all done; next: {what_next(arguments)}")
    if runner.stopped:
        print("stopped; what is there is kept, and the same command goes on from it", file=sys.stderr)
        sys.exit(130)
    sys.exit(bool(failed))


if __name__ == "__main__":
    run_script(main)
