"""Several processes of one run: the rows, losses and checkpoints of one process, whatever number begins, goes on or fails."""
import fcntl
import functools
import json
import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch
from test_run_experiment import command as asked, kit, of_any_batch, ordered, read_rows, run_command  # noqa: F401
from test_train import command, log_rows
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import conditions
import results_files
import run_experiment
import train_minimal
import training_bank
from manifests import UserError, read_manifest, run_script
from parallel import Group, check_sharding
from training_data import Batch, Example
from update_parts import part_of

TOLERANCE = {"rel": 1e-5, "abs": 2e-6}  # of a loss in float32, and of the log's six places


@pytest.fixture
def together(tmp_path):
    """together(processes, main, argv, before=None) -> what each wrote to stderr, or ChildFailedError with it: torchrun's own agent, its processes
    forked from this one, so that nothing is imported again. before(rank): called in each process first."""
    runs = []

    def start(processes, main, argv, before=None):
        def work():
            sys.argv, sys.stderr = list(map(str, argv)), (logs / os.environ["RANK"]).open("w", encoding="utf-8", buffering=1)
            conditions.MAX_NEW_TOKENS = 8
            if before:
                before(int(os.environ["RANK"]))
            run_script(main)

        logs = tmp_path / f"logs-{len(runs)}"
        logs.mkdir()
        runs.append(logs)
        config = LaunchConfig(1, 1, processes, run_id=logs.name, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
                              start_method="fork")
        heard = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
        try:
            elastic_launch(config, work)()
        finally:
            for number, handler in heard.items():
                signal.signal(number, handler)
            start.said = [path.read_text(encoding="utf-8") for path in sorted(logs.iterdir())]
        return start.said

    return start


# ---- training ----

SHARED = {"recall": ("--conversations", 6, "--groups", "1,3", "--probes", 2), "joint": ("--joint", "--conversations", 4, "--groups", "2"),
          "lm": ("--conversations", 4, "--layers", "1,2"), "context": ("--conversations", 4)}


def training(out, name, *more):
    return [*command(out, updates=2, objective="recall" if name == "joint" else name), *map(str, (*SHARED[name], *more))]


@pytest.fixture(scope="module", autouse=True)
def a_shorter_bank():
    """As test_train.py's, and shorter still: an update costs the square of its bytes."""
    passages = training_bank.load_passages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_bank, "FACT_COUNTS", (2, 2))
        patch.setattr(training_bank, "load_passages", lambda lang: [passage[:60] for passage in passages(lang)])
        yield


@pytest.fixture(scope="module")
def curve(tmp_path_factory, a_shorter_bank):
    """curve(name) -> the log of one process."""
    @functools.cache
    def make(name):
        out = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", training(out, name))
            train_minimal.main()
        return log_rows(out / "a")

    return make


def same_log(mine, other):
    assert len(mine) == len(other)
    for one, two in zip(mine, other):
        assert list(one) == list(two)
        for field in set(one) - {"tokens_per_s", "seconds"}:
            assert one[field] == (None if two[field] is None else pytest.approx(two[field], **TOLERANCE)), field


@pytest.mark.slow
@pytest.mark.parametrize("name, processes, more", [("recall", 3, ()), ("recall", 2, ("--shard-base",)), ("joint", 2, ()), ("lm", 2, ("--shard-base",)),
                                                   ("context", 2, ("--shard-base",))])
def test_processes_that_share_an_update_have_the_losses_of_one(name, processes, more, curve, together, tmp_path):
    """Three processes have two memories of six conversations at times, so one has none; blocks of rivals lie on two processes."""
    together(processes, train_minimal.main, training(tmp_path, name, *more))
    same_log(log_rows(tmp_path / "a"), curve(name))
    manifest = read_manifest(tmp_path / "a")
    assert manifest["processes"] == processes and manifest["updates"] == 2
    assert manifest["command"].startswith(f"torchrun --standalone --nproc-per-node {processes} train_minimal.py")


def test_a_base_is_not_spread_over_one_process_nor_under_a_joint_arm(together, run_main, tmp_path):
    code, _, err = run_main(train_minimal.main, training(tmp_path, "recall", "--shard-base"))
    assert code == 2 and len(err.splitlines()) == 1 and "torchrun --standalone --nproc-per-node N" in err
    with pytest.raises(ChildFailedError):
        together(2, train_minimal.main, training(tmp_path, "joint", "--shard-base"))
    said = "".join(together.said)
    assert "leave --joint or --shard-base out" in said and len(said.splitlines()) == 1 and not (tmp_path / "a").exists()  # one of two says it
    with pytest.raises(UserError, match="leave --compile or --shard-base out"):
        check_sharding(Group(0, 2), joint=False, compiled=True)


def test_training_goes_on_with_another_number_of_processes_after_one_has_failed(curve, together, run_main, tmp_path):
    """The second process fails at the second update; what it says is all that is said, and the checkpoint of the first one is gone on from."""
    def fails(rank):
        def step(loaded, ttt, batch, device, **how):
            calls.append(1)
            if rank == 1 and len(calls) == 2:
                while not (tmp_path / "a/manifest.json").exists():  # the first process saves while this one goes on, and is ended with it
                    time.sleep(0.01)
                raise UserError("the second process cannot go on")
            return whole(loaded, ttt, batch, device, **how)
        calls, whole = [], train_minimal.OBJECTIVES["recall"]
        train_minimal.OBJECTIVES["recall"] = step

    with pytest.raises(ChildFailedError):
        together(2, train_minimal.main, training(tmp_path, "recall", "--save-every", 1), fails)
    said = [line for err in together.said for line in err.split("\n") if line and "update/s" not in line and "s/update" not in line]
    assert said == ["train_minimal.py: the second process cannot go on"]
    assert read_manifest(tmp_path / "a")["updates"] == len(log_rows(tmp_path / "a")) == 1
    code, *_ = run_main(train_minimal.main, training(tmp_path, "recall", "--save-every", 1, "--resume"))
    assert code == 0 and read_manifest(tmp_path / "a")["processes"] == 1
    same_log(log_rows(tmp_path / "a"), curve("recall"))


# ---- an update's parts ----

def test_an_update_is_parted_by_memories_and_every_row_goes_to_one_process():
    """Groups stay whole, what is read with a memory goes with it, and who has nothing of a kind has a row that is asked nothing."""
    example = lambda n: Example([n] * (3 + n), [50], [([n], [n])])
    batch = Batch([example(n) for n in range(10)], 2, calm=[Example([], [], [([90], [91])])], foreign=[example(n) for n in (20, 21, 22)])
    parts = [part_of(batch, Group(rank, 3)) for rank in range(3)]
    assert [[e.written[0] for e in part.own.examples] for part in parts] == [[0, 1], [2, 3, 4, 5], [6, 7, 8, 9]]
    assert [part.first for part in parts] == [0, 2, 6] and {part.width for part in parts} == {12} and {part.rows for part in parts} == {10}
    assert [[e.pairs for e in part.own.foreign] for part in parts] == [[batch.foreign[0].pairs], [e.pairs for e in batch.foreign[1:]], [[]]]
    assert [[(e.prefix, e.pairs) for e in part.own.calm] for part in parts] == [[([], [([90], [91])])], [([90], [])], [([90], [])]]
    idle = [part_of([[1], [2]], Group(rank, 3)) for rank in range(3)]
    assert [(part.own, part.counts) for part in idle] == [([[1]], False), ([[1]], True), ([[2]], True)]


# ---- questions ----

EVERY = ("--conditions", "A_context,A_tuned,B_memory,N_noise", "--lang", "en,zh", "--batch-size", "4", "--limit", "5")


@pytest.fixture(scope="module")
def whole(kit):  # noqa: F811
    """argv(out) of a run, and its predictions.jsonl as one process writes it."""
    argv = lambda out, *more: asked(out, "--model", kit("tiny-llama")[0], "--adapter", kit("tiny-llama")[1], "--tuned-adapter", kit.tuned(),
                                    "--benchmark", kit.benchmark, *EVERY, *more)
    with pytest.MonkeyPatch.context() as patch:
        assert run_command(argv(kit.root / "one"), patch) == 0
    return argv, (kit.root / "one/predictions.jsonl").read_bytes()


def run_of(out):
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


def slow(rank):
    """The leader is the slower one, so that blocks come out of order."""
    answer = run_experiment.answer
    run_experiment.answer = lambda *job: time.sleep(0.02 * (rank == 0)) or answer(*job)


def test_processes_write_the_file_of_one(whole, together, tmp_path):
    argv, rows = whole
    together(2, run_experiment.main, argv(tmp_path / "out"), slow)
    run = run_of(tmp_path / "out")
    assert (tmp_path / "out/predictions.jsonl").read_bytes() == rows
    assert run["complete"] and run["rows"] == rows.count(b"\n") and run["processes"] == 2
    assert not (tmp_path / "out" / results_files.SUMS).exists() and not list((tmp_path / "out").glob("*.part"))


def test_a_run_whose_process_was_killed_goes_on_with_another_number(whole, together, tmp_path):
    def dies(rank):
        def add(self, rows):
            known.append(rows)
            if rank == 1 and len(known) == 4:
                self.add = None
                os.kill(os.getpid(), signal.SIGKILL)
            whole_add(self, rows)
        known, whole_add, results_files.Rows.add = [], results_files.Rows.add, add
        slow(rank)

    argv, rows = whole
    with pytest.raises(ChildFailedError):
        together(2, run_experiment.main, argv(tmp_path / "out"), dies)
    kept = (tmp_path / "out/predictions.jsonl").read_bytes()
    assert run_of(tmp_path / "out")["complete"] is False and 0 < kept.count(b"\n") < rows.count(b"\n")
    said = "".join(together.said)
    assert said.count("interrupted: the answers so far are in") == 1 and "Traceback" not in said
    assert f"torchrun --standalone --nproc-per-node 2 run_experiment.py {' '.join(argv(tmp_path / 'out')[1:])} --resume" in said
    together(3, run_experiment.main, argv(tmp_path / "out", "--resume"))
    assert (tmp_path / "out/predictions.jsonl").read_bytes() == rows and run_of(tmp_path / "out")["processes"] == 3


def test_a_process_without_memory_halves_its_batches_alone(whole, together, tmp_path):
    def small(rank):
        def answer(loaded, ttt, job, texts):
            if rank == 1 and job.count > 2:
                raise torch.OutOfMemoryError("no room")
            return ask(loaded, ttt, job, texts)
        ask, run_experiment.answer = run_experiment.answer, answer

    argv, rows = whole
    together(2, run_experiment.main, argv(tmp_path / "out"), small)
    assert "out of memory at" in together.said[1] and "out of memory" not in together.said[0]
    mine = read_rows(tmp_path / "out")
    assert ordered(mine) == of_any_batch([json.loads(line) for line in rows.decode("utf-8").splitlines()])
    assert [row["probe_id"] for row in mine] == [json.loads(line)["probe_id"] for line in rows.decode("utf-8").splitlines()]


def test_a_signal_to_torchrun_is_told_once_and_one_process_goes_on(whole, together, tmp_path, run_main, monkeypatch):
    argv, rows = whole
    out = tmp_path / "out"
    agent = multiprocessing.get_context("fork").Process(target=together, args=(2, run_experiment.main, argv(out), slow))
    agent.start()
    deadline = time.time() + 90
    while not ((out / "predictions.jsonl").exists() and (out / "predictions.jsonl").stat().st_size) and agent.is_alive() and time.time() < deadline:
        time.sleep(0.002)
    agent.terminate()
    agent.join(60)
    said = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "logs-0").iterdir())
    assert agent.exitcode and said.count("interrupted: the answers so far are in") == 1 and "Traceback" not in said
    assert f"torchrun --standalone --nproc-per-node 2 run_experiment.py {' '.join(argv(out)[1:])} --resume" in said
    assert 0 < (out / "predictions.jsonl").read_bytes().count(b"\n") < rows.count(b"\n")
    monkeypatch.setattr(conditions, "MAX_NEW_TOKENS", 8)
    assert run_main(run_experiment.main, argv(out, "--resume"))[0] == 0
    assert (out / "predictions.jsonl").read_bytes() == rows and run_of(out)["processes"] == 1


# ---- the folder ----

def test_a_folder_is_held_until_the_last_process_of_its_run_has_ended(tmp_path):
    """The leader is gone, another process of its group still writes."""
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    with pytest.raises(UserError, match="another run is writing into it now"):
        with results_files.only_run(tmp_path, Group()):
            raise AssertionError
    os.close(held)
    with results_files.only_run(tmp_path, Group()):
        pass


def test_rows_of_two_processes_stand_in_one_file_with_one_chain_of_sums(tmp_path):
    first, second = results_files.Rows(tmp_path), results_files.Rows(tmp_path, begin=False)
    with first, second:
        for n, rows in enumerate((first, second, second, first, second)):
            rows.add([{"n": n}, {"n": n}])
    assert results_files.check_sums(tmp_path, {}) == (tmp_path / "predictions.jsonl").stat().st_size
    rows, sha = second.put_in_order(lambda row: -row["n"])
    assert [row["n"] for row in read_rows(tmp_path)] == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0] and rows == 10
    assert results_files.check_sums(tmp_path, {}) == (tmp_path / "predictions.jsonl").stat().st_size  # killed here, the run goes on
    assert results_files.check_sums(tmp_path, {"complete": True, "rows_sha256": sha})
    changed = (tmp_path / "predictions.jsonl").read_bytes().replace(b"3", b"5", 1)
    (tmp_path / "predictions.jsonl").write_bytes(changed)
    with pytest.raises(results_files.ResultsError, match="changed in the rows"):
        results_files.check_sums(tmp_path, {})


def test_a_process_that_ended_in_the_middle_of_its_block_ends_the_others(tmp_path):
    """Its sum is there and its rows are not: what came next would stand under a wrong sum."""
    first, second = results_files.Rows(tmp_path), results_files.Rows(tmp_path, begin=False)
    with first, second:
        first.add([{"n": 1}])
        first.sums.write(b"999 " + b"0" * 64 + b"\n")
        first.sums.flush()
        with pytest.raises(UserError, match="ended while it wrote its rows; go on with --resume"):
            second.add([{"n": 2}])
    assert read_rows(tmp_path) == [{"n": 1}]
