"""reproduce.py: what it would run, in which order, on which GPU, and what a failure or a stop leaves behind."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import reproduce
from manifests import UserError
from reproduce import ARMS, Arm, Ask, Runner, Task, questions, tasks_of, training

WRITE = "import os, sys, time; print(os.environ['CUDA_VISIBLE_DEVICES'], *sys.argv[1:]); sys.exit(int(sys.argv[1]))"
HANG = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(120)"


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder with two scripts that stand for the project's own: one ends with the code it is given, one never ends."""
    (tmp_path / "end.py").write_text(WRITE)
    (tmp_path / "hang.py").write_text(HANG)
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    return tmp_path


def log(root, name):
    return (root / "logs" / f"{name}.log").read_text()


def test_a_failure_ends_what_depends_on_it_and_nothing_else(scripts):
    tasks = [Task("one", [["end.py", "0", "first"], ["end.py", "3", "second"], ["end.py", "0", "third"]]), Task("two", [["end.py", "0"]], ["one"]),
             Task("three", [["end.py", "0"]]), Task("four", [["end.py", "0"]], ["three"]), Task("five", [])]
    ended = Runner(["0", "1"], scripts).run(tasks)
    assert ended == {"one": "end.py ended with 3: 0 3 second", "two": "not begun: one failed", "three": "done", "four": "done", "five": "done"}
    assert "first" in log(scripts, "one") and "third" not in log(scripts, "one") and not (scripts / "logs" / "two.log").exists()


def test_each_gpu_runs_one_task_at_a_time_and_all_are_used(scripts):
    tasks = [Task(f"t{n}", [["end.py", "0"]]) for n in range(6)]
    assert set(Runner(["4", "7"], scripts).run(tasks).values()) == {"done"}
    used = [log(scripts, f"t{n}").splitlines()[-1].split()[0] for n in range(6)]
    assert set(used) == {"4", "7"}


def test_a_stop_ends_what_runs_and_begins_nothing_more_also_in_the_background(scripts):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for `reproduce.py &`
    runner, begun = Runner(["0"], scripts), scripts / "begun"
    tasks = [Task("one", [["hang.py", str(begun)], ["end.py", "0"]]), Task("two", [["end.py", "0"]])]
    ended = {}
    thread = threading.Thread(target=lambda: ended.update(runner.run(tasks)))
    thread.start()
    while not begun.exists():
        time.sleep(0.02)
    runner.stop()
    thread.join(60)
    signal.signal(signal.SIGINT, before)
    assert ended["one"].startswith("hang.py ended with") and ended["two"] == "stopped before it ended"


def test_what_is_finished_is_not_done_again(tmp_path):
    row = replace(ARMS["qwen-deep"], prose=("en",))
    folder = tmp_path / row.checkpoint
    assert len(training(row, tmp_path)) == 1
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "state.safetensors").touch()  # cut off between two checkpoints
    assert len(training(row, tmp_path)) == 1
    (folder / "state.safetensors").unlink()
    assert training(row, tmp_path) == []
    before = questions(row, tmp_path)
    run = tmp_path / "results" / "qwen-deep" / "run.json"
    run.parent.mkdir(parents=True)
    run.write_text(json.dumps({"complete": True, "conditions": reproduce.ASKED.split(",")}))
    (tmp_path / "results" / "harm").mkdir()
    (tmp_path / "results" / "harm" / "qwen-deep-en.json").touch()
    after = questions(row, tmp_path)
    assert len(before) == 5 and after == before[1:4]
    run.write_text(json.dumps({"complete": False, "conditions": reproduce.ASKED.split(",")}))
    assert questions(row, tmp_path) == before[:4]


def test_a_joint_arm_waits_for_its_start_or_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="starts from qwen-deep-seed1, which is not in .*; name it too"):
        tasks_of(["qwen-joint-seed1"], tmp_path)
    tasks = {task.name: task for task in tasks_of(["qwen-deep-seed1", "qwen-joint-seed1"], tmp_path)}
    assert tasks["train qwen-joint-seed1"].needs == ["train qwen-deep-seed1"]
    start = str(tmp_path / "checkpoints" / "seed1" / "qwen-deep")
    assert start in tasks["train qwen-joint-seed1"].commands[0] and start in tasks["ask qwen-deep-seed1"].commands[0]
    assert "--out" in tasks["train qwen-deep-seed1"].commands[0]


def test_every_row_starts_from_a_trained_row_of_its_own_base():
    for row in ARMS.values():
        if row.start:
            start = ARMS[row.start]
            assert start.model == row.model and start.train and start.tuned == row.tuned


def test_the_committed_arms_are_found_where_the_rows_say():
    root = Path(reproduce.__file__).parent
    for name in ("qwen-deep", "qwen-deep-seed1", "qwen-deep-seed2", "smollm2-deep", "smollm2-tuned", "qwen-tuned", "smollm2-lm", "smollm2-study", "qwen-study", "smollm2-study-docs", "qwen-study-docs",
                 "smollm2-deep-needles"):
        assert training(ARMS[name], root) == [], name


def test_long_texts_that_are_asked_are_not_asked_again_and_another_texts_memory_is_a_run_of_its_own():
    root = Path(reproduce.__file__).parent
    for name in ("smollm2-study", "qwen-study", "gemma3-study", "gemma3-study-seed1"):
        assert reproduce.questions(ARMS[name], root) == [], name  # all of its long texts are committed, clipped ones, their control and far ones, too
    runs = {folder.name: modes for row in ARMS.values() for folder, modes, _ in reproduce.long_runs(row, root)}
    assert len(runs) == sum(len(reproduce.long_runs(row, root)) for row in ARMS.values())  # no two of one folder
    assert runs["smollm2-study-clip-0.001"] == "ttt_paper" and runs["smollm2-study-clip-0.001-foreign"] == "ttt_foreign"
    assert all(name + "-foreign" in runs for name in runs if "-clip-" in name and "-at-" not in name and not name.endswith("-foreign"))
    assert runs["qwen-study-clip-0.001-at-32768"] == "ttt_paper" and not any(name.startswith("smollm2") and "-at-" in name for name in runs)  # its window is 8,192 tokens
    assert runs["gemma3-deep-needles-sharp"] == "ttt_sharp" and runs["gemma3-deep-needles-foreign"] == "ttt_foreign"


@pytest.mark.slow
def test_a_tiny_arm_is_trained_asked_and_then_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "ARMS", {"tiny": Arm("tiny", (Ask("{}", "B_memory", ("--limit", "1", "--levels", "1", "--lang", "en")),),
                                                        ("--updates", "2", "--warmup", "1", "--conversations", "2", "--groups", "1", "--workers", "0", "--lang", "en"), ("--model", "tiny-llama"))})
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--only", "tiny", "--gpus", "0", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        reproduce.main()
    printed = capsys.readouterr().out
    assert end.value.code == 0 and printed.splitlines()[-1].endswith(f"python evaluate.py {tmp_path / 'results' / 'tiny'} --out {tmp_path / 'results'}"), printed
    run = json.loads((tmp_path / "results" / "tiny" / "run.json").read_text())
    assert run["complete"] and run["arm"] == "tiny" and (tmp_path / "checkpoints" / "tiny" / "adapter.safetensors").exists()
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--list", "--only", "tiny", "--out", str(tmp_path)])
    capsys.readouterr()
    reproduce.main()
    assert capsys.readouterr().out.splitlines() == ["train tiny: nothing to do", "ask tiny (after train tiny): nothing to do"]


def test_hidden_gpus_are_not_used(monkeypatch):
    for named, seen in (("", []), ("1", ["1"]), ("0,2", ["0", "2"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert reproduce.visible_gpus() == seen


@pytest.mark.parametrize("arguments, said", [(["--only", "smollm3"], "--only smollm3: unknown; use some of qwen-deep,"),
                                             (["--only", "qwen-deep"], "no GPU is visible")])
def test_what_cannot_be_run_is_said_in_one_line(arguments, said, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | {"PATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, reproduce.HERE / "reproduce.py", *arguments, "--out", str(tmp_path / "out")], capture_output=True, text=True, env=environment)
    assert ended.returncode == 2 and said in ended.stderr and len(ended.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
