"""The Modal app, as far as it can be seen without an account: what the client resolves, and every body through .local()."""
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

ROOT = Path(modal_app.__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:The .* function is executing locally")
FUNCTIONS = {"build", "smoke", "train", "sanity", "run_condition", "evaluate"}


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
    """The scripts that modal_app starts: string constants that are nothing but a file name."""
    nodes = ast.walk(ast.parse((ROOT / "modal_app.py").read_text(encoding="utf-8")))
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text[:-3] for text in strings if re.fullmatch(r"\w+\.py", text)}


def test_every_module_that_a_script_needs_is_uploaded_and_no_other():
    needed, queue = set(), [*scripts_run(), *imported_names(ROOT / "modal_app.py")]
    assert {"train_minimal", "run_experiment", "evaluate", "sanity", "build_benchmark"} <= set(queue)
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


@pytest.mark.parametrize("name", sorted(FUNCTIONS | {"full_pipeline"}))
def test_the_client_resolves_each_runnable(name):
    runnable = getattr(modal_app, name)
    assert isinstance(runnable, modal.app.LocalEntrypoint if name == "full_pipeline" else modal.Function)
    if name != "full_pipeline":
        spec = runnable._spec_
        assert set(spec.volumes) == {"/vol/runs", "/vol/weights"}
        assert spec.gpus == {"build": None, "evaluate": None, "smoke": modal_app.SMALL_GPUS}.get(name, modal_app.GPUS)


def test_modal_run_without_a_name_means_the_full_pipeline(tmp_path):
    command = [sys.executable, "-m", "modal", "run", "modal_app.py", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)})
    assert shown.returncode == 0, shown.stderr
    for option in ("--model", "--gpu", "--updates", "--limit", "--conditions", "--langs"):
        assert option in shown.stdout


# ---- options -------------------------------------------------------------------------------------------------------

def test_gpu_is_one_known_type_or_left_open():
    assert modal_app.parse_gpu("") is None
    assert modal_app.parse_gpu("h100") == "H100"


@pytest.mark.parametrize("text", ["H1000", "A100-40GB,H100", "H100:2", " "])
def test_a_wrong_gpu_is_one_clear_line(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        modal_app.parse_gpu(text)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1
    assert text in message and "A100-40GB" in message


def test_every_gpu_that_may_be_given_has_a_price():
    assert set(modal_app.GPUS + modal_app.SMALL_GPUS) <= set(modal_app.GPU_PRICES)


def test_gpu_option_reaches_the_function_and_keeps_its_cores():
    chosen = modal_app.on_gpu(modal_app.train, "H200")
    assert chosen is not modal_app.train
    assert modal_app.on_gpu(modal_app.train, None) is modal_app.train
    options = modal._utils.async_utils.synchronizer._translate_in(chosen)._options.resources
    assert (options.gpu_config.gpu_type, options.gpu_config.count) == ("H200", 1)
    assert (options.milli_cpu, options.memory_mb) == (4000, 32768)


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


# ---- cost ----------------------------------------------------------------------------------------------------------

def record(stage="x", gpu="none", seconds=100.0, cores=0.0, gib=0.0):
    return {"stage": stage, "gpu": gpu, "seconds": seconds, "cores": cores, "gib": gib, "lines": []}


@pytest.mark.parametrize("driver_name, price", [
    ("NVIDIA A100-SXM4-40GB", 0.000583), ("NVIDIA A100-SXM4-80GB", 0.000694), ("NVIDIA A100 80GB PCIe", 0.000694),
    ("NVIDIA A10", 0.000306), ("NVIDIA A10G", 0.000306), ("NVIDIA L4", 0.000222), ("NVIDIA L40S", 0.000542),
    ("Tesla T4", 0.000164), ("NVIDIA H100 80GB HBM3", 0.001097), ("NVIDIA H200", 0.001261), ("NVIDIA B200", 0.001736),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 0.000842), ("none", 0.0), ("Some GPU 9000", None)])
def test_price_by_the_name_the_driver_reports(driver_name, price):
    assert modal_app.price_of(driver_name) == price


def test_cost_is_seconds_times_gpu_cores_and_memory():
    assert modal_app.cost_of(record(gpu="NVIDIA H100 80GB HBM3", seconds=1000, cores=4, gib=32)) == pytest.approx(
        1000 * (0.001097 + 4 * 0.0000131 + 32 * 0.00000222))
    assert modal_app.cost_of(record(seconds=10, cores=2, gib=4)) == pytest.approx(10 * (2 * 0.0000131 + 4 * 0.00000222))
    assert modal_app.cost_of(record(gpu="Some GPU 9000")) is None


def test_cost_table_adds_up_and_says_where_a_price_is_missing():
    table = modal_app.cost_table([record("one", "Tesla T4", 1000), record("two", "NVIDIA L4", 500), record("odd", "Abacus")])
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
    assert modal_app.run_script(tmp_path, path, "--n", 3) == ["first", f"['--n', '3'] {tmp_path}"]
    assert "first\n" in capsys.readouterr().out


def test_a_failing_script_raises_with_its_exit_code_and_last_line(tmp_path):
    path = script(tmp_path, "import sys; print('working'); print('layer 99 does not exist', file=sys.stderr); sys.exit(2)")
    with pytest.raises(RuntimeError, match=r"script\.py stopped with exit code 2: layer 99 does not exist$"):
        modal_app.run_script(tmp_path, path)


def test_a_script_that_fails_in_silence_still_raises(tmp_path):
    with pytest.raises(RuntimeError, match="exit code 1: no output"):
        modal_app.run_script(tmp_path, script(tmp_path, "raise SystemExit(1)"))


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
            modal_app.run_script(tmp_path, path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "saved").exists() and not (tmp_path / "slept").exists()


def test_one_failed_job_leaves_the_others_their_records():
    class Pool:
        def starmap(self, jobs, return_exceptions):
            assert return_exceptions
            return iter([{"stage": "B_memory"}, RuntimeError("out of memory")])
    outcome = modal_app.call_each(Pool(), [("B_memory", "m"), ("C_nothing", "m")])
    assert outcome == ([{"stage": "B_memory"}], ["C_nothing m: out of memory"])
    kept = []
    with pytest.raises(RuntimeError, match="C_nothing m: out of memory"):
        kept.extend(modal_app.every(outcome))


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


# ---- every body, with the scripts themselves -----------------------------------------------------------------------

def in_this_process(folder, script, *arguments):
    """modal_app.run_script without a process of its own: torch need not be loaded once more for every stage."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(ROOT / script), *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(f"{script} stopped with exit code {stop.code}: {shown.getvalue()}") from None
    return shown.getvalue().splitlines()


@pytest.fixture
def on_this_machine(tmp_path, monkeypatch):
    """The pipeline with `.local()` in the place of `.remote()`, its scripts in this process, in an empty folder and without a volume to pull from."""
    def call_each(function, jobs):
        return [function.local(*job) for job in jobs], []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(modal_app, "call", lambda function, *arguments: function.local(*arguments))
    monkeypatch.setattr(modal_app, "call_each", call_each)
    monkeypatch.setattr(modal_app, "pull", lambda folder: None)
    monkeypatch.setattr(modal_app, "run_script", in_this_process)
    return tmp_path


def test_full_pipeline_through_local(on_this_machine, monkeypatch, capsys):
    real = modal_app.train_command  # with fewer conversations an update than the script's own 32, which the pipeline leaves alone
    monkeypatch.setattr(modal_app, "train_command", lambda *arguments: [*real(*arguments), "--conversations", 2, "--groups", "1,2", "--form", "plain"])
    monkeypatch.setattr(modal_app, "smoke", SimpleNamespace(local=lambda *arguments: record("smoke")))
    modal_app.full_pipeline(model="tiny-llama", updates=1, limit=1, conditions="B_memory,C_nothing", langs="en")
    results = on_this_machine / "results"
    assert {path.name for path in results.iterdir()} == {
        "tiny-llama-recall", "tiny-llama-recall-B_memory", "tiny-llama-recall-C_nothing"}
    assert (results / "tiny-llama-recall" / "report.json").is_file()
    stages = capsys.readouterr().out.split("stage  ")[-1]
    for name in ("build", "smoke", "train tiny-llama-recall", "sanity", "B_memory", "C_nothing", "evaluate", "total"):
        assert name in stages


def test_smoke_through_local(on_this_machine):
    shown = modal_app.smoke.local(conditions="B_memory", langs="en")
    assert shown["seconds"] > 0 and shown["stage"] == "smoke"
    lines = shown["lines"][:shown["lines"].index("all checks pass")]  # sanity.py --tiny: every check, on every family
    assert [line.split()[0] for line in lines if line.startswith("tiny-")] == list(FAMILIES)
    checks = [line.split()[:2] for line in lines if line.startswith(("PASS", "FAIL"))]
    expected = [check.__name__ for check in sanity.CHECKS if check not in sanity.NEEDS_TRAINING]
    assert checks == [["PASS", name] for name in expected] * len(FAMILIES)
    assert not any(on_this_machine.iterdir())  # it leaves nothing behind


def test_a_refused_option_names_the_script(tmp_path, monkeypatch):
    """A stage's script as the process that it is on Modal."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match=r"evaluate\.py stopped with exit code 2: .*no-such-run"):
        modal_app.evaluate.local("no-such-run", "B_memory")
