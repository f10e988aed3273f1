"""`modal run` as a user types it: the real client and its container entrypoint, against the servicer of modal_servicer.py."""
import contextlib
import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from modal_servicer import modal_run, modal_start, serve

import modal_app
import run_experiment

ROOT = Path(modal_app.__file__).parent
APP = ROOT / "modal_app.py"
SMOKE = ("--conditions", "B_memory", "--shards", "2")
SHARD = "results/smoke-B_memory-123-en"


def rows_of(folder):
    path = folder / "predictions.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] if path.exists() else []  # whole lines


@contextlib.contextmanager
def run_smoke(root, home):
    """`modal run modal_app.py::smoke`, with the container of one shard killed once it has some of its rows."""
    kept = []

    def in_the_middle(container):
        rows = rows_of(container.root / "vol/runs" / SHARD)
        if container.function == "run_condition" and container.arguments[2] == "en" and container.kills == 0 and rows:
            kept.append(rows)
            return True

    with serve(root) as servicer:
        servicer.kill_when = in_the_middle
        code, printed = modal_run(servicer, home, f"{APP}::smoke", *SMOKE)
        servicer.kill_when = None
        yield SimpleNamespace(servicer=servicer, home=home, code=code, printed=printed, kept=kept[0] if kept else [],
                              volume=servicer.committed(servicer.names["ttt-conv-memory-runs"]),
                              started=[(container.function, container.kills) for container in servicer.containers])


@pytest.mark.slow
def test_modal_run_from_the_first_command_to_the_second(run_main, tmp_path):
    """One test, so that several test processes do not each run the pipeline: results come, a killed shard goes on, nothing is done twice."""
    for name in ("servicer", "home", "second"):
        (tmp_path / name).mkdir()
    with run_smoke(tmp_path / "servicer", tmp_path / "home") as smoke:
        results_figures_and_costs_come_to_the_callers_folder(smoke)
        a_killed_shard_goes_on_from_its_rows_and_ends_with_the_same(smoke, run_main, tmp_path)
        a_second_run_does_nothing_twice_and_a_detached_one_is_collected_later(smoke, tmp_path / "second")


def results_figures_and_costs_come_to_the_callers_folder(smoke):
    assert smoke.code == 0, smoke.printed
    assert {path.name for path in (smoke.home / "results").iterdir()} == {"smoke", "smoke-B_memory-123-en", "smoke-B_memory-123-zh"}
    report = json.loads((smoke.home / "results/smoke/report.json").read_text(encoding="utf-8"))
    assert report["arms"][0]["arm"] == "smoke" and set(report["arms"][0]["conditions"]["B_memory"]) == {"1", "2", "3"}
    assert list((smoke.home / "results/smoke/figures").glob("*.png"))
    table = smoke.printed.split("stage  ")[-1]
    for name in ("build", "train smoke", "sanity", "B_memory 1,2,3 en", "B_memory 1,2,3 zh", "evaluate", "pipeline", "total"):
        assert name in table
    commit = json.loads((smoke.home / SHARD / "run.json").read_text(encoding="utf-8"))["commit"]
    assert commit == modal_app.SHARED["env"]["TTT_COMMIT"]


def a_killed_shard_goes_on_from_its_rows_and_ends_with_the_same(smoke, run_main, tmp_path):
    starts = [kills for name, kills in smoke.started if name == "run_condition"]
    assert sorted(starts) == [0, 0, 1]  # two shards, and the killed one again
    rows = rows_of(smoke.home / SHARD)
    assert 0 < len(smoke.kept) < len(rows) and rows[:len(smoke.kept)] == smoke.kept
    argv = ["run_experiment.py", "--model", "tiny-llama", "--adapter", smoke.volume / "checkpoints/smoke", "--benchmark", ROOT / modal_app.BENCHMARK,
            "--conditions", "B_memory", "--levels", "1,2,3", "--lang", "en", "--limit", 1, "--device", "cpu", "--out", tmp_path / "whole"]
    code, _, error = run_main(run_experiment.main, argv)
    assert code == 0, error
    assert rows == rows_of(tmp_path / "whole")


def a_second_run_does_nothing_twice_and_a_detached_one_is_collected_later(smoke, tmp_path):
    """The caller of the second run leaves as soon as it has begun."""
    state = lambda: {path: path.read_bytes() for path in smoke.volume.rglob("*") if path.is_file() and path.name != "pipeline.json"}
    before, first = state(), len(smoke.servicer.containers)
    with modal_start(smoke.servicer, tmp_path, f"{APP}::smoke", "--detach", *SMOKE) as caller:
        printed = next(line for line in caller.stdout if line.startswith("Started."))
        caller.send_signal(signal.SIGINT)
        printed += caller.stdout.read()
    assert printed.count("modal run modal_app.py::collect --run smoke") == 2
    pipeline, = smoke.servicer.containers[first:]  # no other function was called
    assert pipeline.function == "pipeline" and pipeline.process.wait(60) == 0
    assert state() == before
    code, printed = modal_run(smoke.servicer, tmp_path, f"{APP}::collect", "--run", "smoke")
    assert code == 0, printed
    assert printed.count("already\n") == 6
    assert (tmp_path / "results/smoke/report.json").read_bytes() == (smoke.home / "results/smoke/report.json").read_bytes()
    assert rows_of(tmp_path / SHARD) == rows_of(smoke.home / SHARD)


@pytest.mark.slow
def test_a_failed_run_says_why_and_what_it_cost_and_a_missing_commit_is_seen(tmp_path):
    """The servicer of its own has an app that forgets to commit: what the pipeline wrote stays in its container."""
    (tmp_path / "servicer").mkdir()
    with serve(tmp_path / "servicer", {"        runs_volume.commit()\n": ""}) as servicer:
        servicer.stored_secrets["my-hub"] = {"HF_TOKEN": "hf_secret"}
        code, printed = modal_run(servicer, tmp_path, f"{APP}::full_pipeline", "--model", "tiny-llama", "--conditions", "B_nothing", "--secret", "my-hub")
        assert code == 1
        assert "modal_app.py: --conditions B_nothing: unknown; use some of A_context" in printed and "pipeline " in printed
        container, = servicer.containers
        assert container.environment["HF_TOKEN"] == "hf_secret" and container.environment["TTT_COMMIT"]
        assert (container.root / "vol/runs/results/tiny-llama-recall/pipeline.json").is_file()
        assert not list(servicer.committed(servicer.names["ttt-conv-memory-runs"]).rglob("pipeline.json"))


def test_a_module_that_is_not_uploaded_fails_as_in_the_service(tmp_path):
    for path in (*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt")):
        shutil.copy(path, tmp_path)
    for name in ("data", modal_app.BENCHMARK):
        (tmp_path / name).symlink_to(ROOT / name)
    text = APP.read_text(encoding="utf-8")
    assert '"benchmark_values", ' in text
    (tmp_path / "modal_app.py").write_text(text.replace('"benchmark_values", ', ""), encoding="utf-8")
    (tmp_path / "servicer").mkdir()
    with serve(tmp_path / "servicer") as servicer:
        code, printed = modal_run(servicer, tmp_path, "modal_app.py::build")
    assert code == 1
    assert "No module named 'benchmark_values'" in printed


@pytest.mark.slow
def test_an_error_is_retried_twice_and_then_told(tmp_path):
    (tmp_path / "servicer").mkdir()
    with serve(tmp_path / "servicer", {"record = stages.run(": "record = 1 / 0 or stages.run("}) as servicer:
        code, printed = modal_run(servicer, tmp_path, f"{APP}::weights", "--model", "tiny-llama")
        assert code == 1 and "ZeroDivisionError" in printed
        assert [(container.function, container.retries) for container in servicer.containers] == [("weights", 0), ("weights", 1), ("weights", 2)]
