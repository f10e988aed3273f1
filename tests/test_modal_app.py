"""The Modal app by itself: what is uploaded, options, stages and what is finished, costs. What `modal run` does with it is in test_modal_run.py."""
import ast
import contextlib
import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import modal
import pytest
from conftest import FAMILIES

import modal_app
import sanity
import stages
from manifests import UserError

ROOT = Path(modal_app.__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:The .* function is executing locally")
FUNCTIONS = {"build", "weights", "preflight", "train", "sanity", "run_condition", "evaluate", "pipeline"}
ENTRYPOINTS = {"full_pipeline", "smoke", "collect"}


def run_python(code, **env):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env})


# ---- the caller's machine and the upload ---------------------------------------------------------------------------

def test_import_loads_no_torch_and_needs_no_token(tmp_path):
    code = "import sys, modal_app; print(sorted({'torch', 'transformers', 'numpy', 'model_utils'} & set(sys.modules)))"
    shown = run_python(code, HOME=str(tmp_path), MODAL_TOKEN_ID="", MODAL_TOKEN_SECRET="")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() == "[]"


def imported_names(path):
    """Top-level module names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def scripts_run():
    """The scripts that the stages start: string constants that are nothing but a file name."""
    nodes = [node for name in ("modal_app.py", "stages.py") for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))]
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text[:-3] for text in strings if re.fullmatch(r"\w+\.py", text)}


def test_every_module_that_a_script_needs_is_uploaded_and_no_other():
    needed, queue = set(), [*scripts_run(), *imported_names(ROOT / "modal_app.py")]
    assert {"train_minimal", "run_experiment", "evaluate", "sanity", "build_benchmark", "model_utils"} <= set(queue)
    while queue:
        name = queue.pop()
        if name not in needed and (ROOT / f"{name}.py").exists():
            needed.add(name)
            queue += imported_names(ROOT / f"{name}.py")
    assert set(modal_app.MODULES) == needed
    missing = [name for name in scripts_run() if not (ROOT / f"{name}.py").exists()]
    assert not missing


def test_it_imports_in_a_container_that_holds_only_what_is_uploaded(tmp_path):
    for name in ("modal_app", *modal_app.MODULES):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    command = [sys.executable, "-c", "import modal_app; print(modal_app.SHARED['env']['TTT_COMMIT'])"]
    env = {"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path), "TTT_COMMIT": "abc1234-dirty"}  # no git on this PATH
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert shown.stdout.strip() == "abc1234-dirty", shown.stderr


def test_data_and_benchmark_that_the_image_adds_exist():
    assert any((ROOT / "data").glob("*.json"))
    assert (ROOT / modal_app.BENCHMARK).is_file()
    assert (ROOT / "requirements.txt").is_file() and (ROOT / "requirements-models.txt").is_file()


@pytest.mark.parametrize("name", sorted(FUNCTIONS | ENTRYPOINTS))
def test_the_client_resolves_each_runnable(name):
    runnable = getattr(modal_app, name)
    assert isinstance(runnable, modal.app.LocalEntrypoint if name in ENTRYPOINTS else modal.Function)
    if name in FUNCTIONS:
        assert set(runnable._spec_.volumes) == {"/vol/runs", "/vol/weights"}
        on_gpu = {"preflight": modal_app.SMALL_GPUS, "train": modal_app.GPUS, "sanity": modal_app.GPUS, "run_condition": modal_app.GPUS}
        assert runnable._spec_.gpus == on_gpu.get(name)


def test_the_full_pipeline_needs_no_option_and_names_those_it_has(tmp_path):
    command = [sys.executable, "-m", "modal", "run", "modal_app.py::full_pipeline", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)})
    assert shown.returncode == 0, shown.stderr
    for option in ("--model", "--gpu", "--updates", "--limit", "--conditions", "--langs", "--shards", "--secret"):
        assert option in shown.stdout
    assert "required" not in shown.stdout


# ---- options -------------------------------------------------------------------------------------------------------

def test_gpu_is_one_known_type_or_left_open():
    assert modal_app.parse_gpu("") == ""
    assert modal_app.parse_gpu("h100") == "H100"


@pytest.mark.parametrize("text", ["H1000", "A100-40GB,H100", "H100:2", " "])
def test_a_wrong_gpu_is_one_clear_line(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        modal_app.parse_gpu(text)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1
    assert text in message and "A100-40GB" in message


def test_every_gpu_that_may_be_given_has_a_price():
    assert set(modal_app.GPUS + modal_app.SMALL_GPUS) <= set(stages.GPU_PRICES)


def options_of(function):
    return modal._utils.async_utils.synchronizer._translate_in(function)._options


def test_gpu_option_reaches_the_function_and_keeps_its_cores():
    chosen = modal_app.chosen(modal_app.train, "H200")
    assert chosen is not modal_app.train
    assert modal_app.chosen(modal_app.train) is modal_app.train
    resources = options_of(chosen).resources
    assert (resources.gpu_config.gpu_type, resources.gpu_config.count) == ("H200", 1)
    assert (resources.milli_cpu, resources.memory_mb) == (4000, 32768)


def test_names_are_split_and_checked(capsys):
    assert modal_app.parse_names("--langs", "en, zh,en") == ["en", "zh"]
    for text in ("", ",", "B_memory;C_nothing", "../x"):
        with pytest.raises(SystemExit):
            modal_app.parse_names("--conditions", text)
    assert capsys.readouterr().err.count("--conditions") == 4


def test_a_run_name_cannot_leave_the_results_folder():
    assert modal_app.parse_run("qwen2.5-coder-0.5b-recall") == "qwen2.5-coder-0.5b-recall"
    for text in ("../x", "-x", "a/b", "a b"):
        with pytest.raises(SystemExit):
            modal_app.parse_run(text)


@pytest.mark.parametrize("option", ["shards=0", "limit=-1", "updates=-1"])
def test_a_wrong_count_is_one_clear_line(option, capsys):
    name, number = option.split("=")
    with pytest.raises(SystemExit):
        modal_app.full_pipeline(**{name: int(number)})
    assert capsys.readouterr().err.startswith(f"modal_app.py: --{name} {number}: give ")


# ---- stages --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shards, expected", [
    (1, [((1, 2, 3), ("en", "zh"))]), (2, [((1, 2, 3), ("en",)), ((1, 2, 3), ("zh",))]), (3, [((1, 2, 3), ("en",)), ((1, 2, 3), ("zh",))]),
    (4, [((1,), ("en",)), ((2, 3), ("en",)), ((1,), ("zh",)), ((2, 3), ("zh",))]), (100, [((n,), (lang,)) for lang in ("en", "zh") for n in (1, 2, 3)])])
def test_shards_are_all_levels_and_languages_once(shards, expected):
    assert stages.split((1, 2, 3), ("en", "zh"), shards) == expected


def test_every_condition_is_planned_on_its_own_levels():
    plan = stages.plan_shards("tiny-llama", ["B_memory", "D_distractor"], "", 2)
    assert plan == [("B_memory", "1,2,3", "en"), ("B_memory", "1,2,3", "zh"), ("D_distractor", "3", "en"), ("D_distractor", "3", "zh")]
    assert len({stages.shard_folder("run", *shard) for shard in plan}) == 4
    assert stages.plan_shards("tiny-llama", ["C_nothing"], "zh", 1) == [("C_nothing", "1,2,3", "zh")]
    with pytest.raises(UserError, match="--conditions B_nothing: unknown; use some of A_context"):
        stages.plan_shards("tiny-llama", ["B_nothing"], "", 2)


@pytest.fixture
def kept(tmp_path):
    """(stage, folder) of a stage whose record is kept."""
    stage = stages.Stage("x", (("script.py", "--n", 1),), ("read",), ("made",))
    for name in stage.reads + stage.makes:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    stages.keep(stage, tmp_path, "code", record("x"))
    return stage, tmp_path


def test_what_is_finished_is_known_by_its_record(kept):
    stage, folder = kept
    assert stages.finished(stage, folder, "code") == record("x")


@pytest.mark.parametrize("change", ["command", "code", "read", "made", "read gone", "made gone", "made more"])
def test_nothing_is_taken_for_finished_whose_inputs_or_files_are_others(kept, change):
    stage, folder = kept
    if change == "command":
        stage = stages.Stage("x", (("script.py", "--n", 2),), stage.reads, stage.makes)
    elif change.endswith("gone"):
        shutil.rmtree(folder / change.split()[0])
    elif change == "made more":
        (folder / "made" / "other").write_text("other")
    elif change != "code":
        (folder / change / "file").write_text("other")
    assert stages.finished(stage, folder, "other code" if change == "code" else "code") is None


def test_the_code_of_a_stage_is_every_file_that_is_uploaded(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.json").write_text("1")
    before = stages.code_sha256(tmp_path, ("data",))
    stages.code_sha256.cache_clear()
    (tmp_path / "data" / "a.json").write_text("2")
    assert stages.code_sha256(tmp_path, ("data",)) != before


# ---- cost ----------------------------------------------------------------------------------------------------------

def record(stage="x", gpu="none", seconds=100.0, cores=0.0, gib=0.0):
    return {"stage": stage, "gpu": gpu, "seconds": seconds, "cores": cores, "gib": gib, "lines": []}


@pytest.mark.parametrize("driver_name, price", [
    ("NVIDIA A100-SXM4-40GB", 0.000583), ("NVIDIA A100-SXM4-80GB", 0.000694), ("NVIDIA A100 80GB PCIe", 0.000694),
    ("NVIDIA A10", 0.000306), ("NVIDIA A10G", 0.000306), ("NVIDIA L4", 0.000222), ("NVIDIA L40S", 0.000542),
    ("Tesla T4", 0.000164), ("NVIDIA H100 80GB HBM3", 0.001097), ("NVIDIA H200", 0.001261), ("NVIDIA B200", 0.001736),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 0.000842), ("none", 0.0), ("Some GPU 9000", None)])
def test_price_by_the_name_the_driver_reports(driver_name, price):
    assert stages.price_of(driver_name) == price


def test_cost_is_seconds_times_gpu_cores_and_memory():
    assert stages.cost_of(record(gpu="NVIDIA H100 80GB HBM3", seconds=1000, cores=4, gib=32)) == pytest.approx(
        1000 * (0.001097 + 4 * 0.0000131 + 32 * 0.00000222))
    assert stages.cost_of(record(seconds=10, cores=2, gib=4)) == pytest.approx(10 * (2 * 0.0000131 + 4 * 0.00000222))
    assert stages.cost_of(record(gpu="Some GPU 9000")) is None


def test_cost_table_adds_up_and_says_where_a_price_is_missing():
    table = stages.cost_table([record("one", "Tesla T4", 1000), record("two", "NVIDIA L4", 500), record("odd", "Abacus")])
    lines = table.splitlines()
    assert lines[1].split()[-1] == "0.1640" and lines[2].split()[-1] == "0.1110"
    assert lines[3].endswith("no price")
    assert lines[4].split() == ["total", "1600.0", "0.2750"]


# ---- running scripts -----------------------------------------------------------------------------------------------

def script(folder, text):
    path = folder / "script.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_script_is_streamed_and_its_lines_returned(tmp_path, capsys):
    path = script(tmp_path, "import os, sys; print('first'); print(sys.argv[1:], os.getcwd())")
    assert stages.run_script(tmp_path, tmp_path, path, "--n", 3) == ["first", f"['--n', '3'] {tmp_path}"]
    assert "first\n" in capsys.readouterr().out


def test_a_failing_script_raises_with_its_exit_code_and_last_line(tmp_path):
    path = script(tmp_path, "import sys; print('working'); print('layer 99 does not exist', file=sys.stderr); sys.exit(2)")
    with pytest.raises(stages.Refused, match=r"script\.py stopped with exit code 2: layer 99 does not exist$"):
        stages.run_script(tmp_path, tmp_path, path)


def test_a_script_that_fails_in_silence_still_raises(tmp_path):
    with pytest.raises(RuntimeError, match="exit code 1: no output") as raised:
        stages.run_script(tmp_path, tmp_path, script(tmp_path, "raise SystemExit(1)"))
    assert not isinstance(raised.value, stages.Refused)


def test_preemption_lets_the_script_save(tmp_path):
    path = script(tmp_path, "import time\ntry:\n    open('ready', 'w').close()\n    time.sleep(60)\n    open('slept', 'w').close()\n"
                            "except KeyboardInterrupt:\n    open('saved', 'w').close()")

    def preempt():
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    deadline = time.monotonic() + 60
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite runs in the background
    try:
        threading.Thread(target=preempt).start()
        with pytest.raises(KeyboardInterrupt):
            stages.run_script(tmp_path, tmp_path, path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "saved").exists() and not (tmp_path / "slept").exists()


def test_one_failed_job_leaves_the_others_their_records():
    class Pool:
        def starmap(self, jobs, return_exceptions):
            assert return_exceptions
            return iter([{"stage": "B_memory"}, RuntimeError("out of memory"), {"refused": "no such adapter"}])
    outcome = modal_app.call_each(Pool(), [("B_memory", "m"), ("C_nothing", "m"), ("A_tuned", "m")])
    assert outcome == ([{"stage": "B_memory"}], ["C_nothing m: out of memory", "A_tuned m: no such adapter"])


def test_what_is_finished_is_not_called_and_what_fails_is_named_last(kept, monkeypatch):
    stage, folder = kept
    monkeypatch.chdir(folder)
    monkeypatch.setattr(modal_app, "code_sha256", lambda: "code")
    called = []
    monkeypatch.setattr(modal_app, "call_each", lambda function, jobs: called.extend(jobs) or ([record("y")], ["z: out of memory"]))
    stages_of = {"x": stage, "y": stages.Stage("y", ()), "z": stages.Stage("z", ())}
    records = modal_app.once(None, stages_of.get, *((name,) for name in stages_of))
    assert next(records) == record("x") | {"seconds": 0.0, "earlier": True}
    assert next(records) == record("y") and called == [("y",), ("z",)]
    with pytest.raises(RuntimeError, match="z: out of memory"):
        next(records)


# ---- results come back ---------------------------------------------------------------------------------------------

def fake_volume(files):
    kind = modal.volume.FileEntryType
    entries = [SimpleNamespace(path=path, type=kind.FILE) for path in files] + [
        SimpleNamespace(path="results/run", type=kind.DIRECTORY)]
    return SimpleNamespace(iterdir=lambda folder, recursive: entries, read_file=lambda path: iter(files[path]))


def test_pull_writes_whole_files_where_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(modal_app, "runs_volume", fake_volume({"results/run/report.json": [b"{", b"}"]}))
    modal_app.pull("results/run")
    assert [path.name for path in (tmp_path / "results" / "run").iterdir()] == ["report.json"]
    assert (tmp_path / "results/run/report.json").read_bytes() == b"{}"


def test_pull_refuses_a_path_that_leaves_the_folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(modal_app, "runs_volume", fake_volume({"results/../../evil": [b"x"]}))
    with pytest.raises(ValueError, match="outside"):
        modal_app.pull("results/run")
    assert not (tmp_path / "evil").exists()


# ---- bodies, with the scripts themselves ---------------------------------------------------------------------------

def in_this_process(code_folder, folder, script, *arguments, usd_per_second=None):
    """stages.run_script without a process of its own: torch need not be loaded once more for every script."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(code_folder / script), *map(str, arguments)])
        try:
            runpy.run_path(str(code_folder / script), run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(f"{script} stopped with exit code {stop.code}: {shown.getvalue()}") from None
    return shown.getvalue().splitlines()


@pytest.mark.slow
def test_preflight_runs_every_script_and_checks_every_family(tmp_path, monkeypatch):
    """Not with A_tuned: the command that trains it differs in one word."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "run_script", in_this_process)
    monkeypatch.setattr(stages, "LAST_LINES", 10**6)
    shown = modal_app.preflight.local(conditions="B_memory", langs="en")
    assert shown["seconds"] > 0 and shown["stage"] == "preflight"
    assert any("results/tiny/report.json" in line for line in shown["lines"])
    lines = shown["lines"][:shown["lines"].index("all checks pass")]  # sanity.py --tiny: every check, on every family
    assert [line.split()[0] for line in lines if line.startswith("tiny-")] == list(FAMILIES)
    checks = [line.split()[:2] for line in lines if line.startswith(("PASS", "FAIL"))]
    expected = [check.__name__ for check in sanity.CHECKS if check not in sanity.NEEDS_TRAINING]
    assert checks == [["PASS", name] for name in expected] * len(FAMILIES)
    assert [path.name for path in tmp_path.iterdir()] == [stages.KEPT]  # what the scripts wrote is gone


def test_a_refusal_names_the_script_is_not_retried_and_leaves_no_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = modal_app.evaluate.local("no-such-run", ("results/no-such-run",))["refused"]  # it would be retried if it were raised
    assert refused.startswith("evaluate.py stopped with exit code 2: ") and "no-such-run" in refused
    assert not (tmp_path / stages.KEPT).exists()
