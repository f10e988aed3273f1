"""Nothing lost: rows and manifests that were changed or cut are named and never used, one run to a folder, hostile files refused."""
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_run_experiment import RESUMED, ROOT, SHORT, call, command, kit, ordered, read_rows, straight  # noqa: F401

import benchmark_file
import conditions
import evaluate
import results_files
from manifests import UserError, read_manifest
from memory import Memory, MemoryFileError
from parallel import Group


@pytest.fixture(scope="module")
def finished(kit, straight):  # noqa: F811
    """The folder of a run that ended."""
    return kit.root / "straight"


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def argv_of(kit, out, *more):  # noqa: F811
    model, adapter = kit("tiny-llama")
    return command(out, "--model", model, "--adapter", adapter, "--benchmark", kit.benchmark, *RESUMED, *more)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def unfinish(folder, blocks):
    """Make a finished run one that was killed after so many blocks of rows, with its sums; returns the bytes kept."""
    lines = (folder / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "predictions.jsonl").unlink()
    rows = results_files.Rows(folder)
    with rows:
        for line in lines[:blocks]:
            rows.add([json.loads(line)])
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    run.pop("rows_sha256")
    (folder / "run.json").write_text(json.dumps(run | {"complete": False}), encoding="utf-8")
    return (folder / "predictions.jsonl").read_bytes()


def test_a_finished_run_passes_and_says_of_its_making(finished, capsys):
    assert evaluate.main(["--verify", str(finished)]) == 0
    out = capsys.readouterr().out
    assert "FAIL  " not in out and f"pass  {finished / 'predictions.jsonl'}" in out and "note" in out.splitlines()[-1]
    run = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    assert run["ended"] >= run["started"] and run["hardware"]["threads"] == torch.get_num_threads() and run["hardware"]["deterministic"] is False
    assert not (finished / results_files.SUMS).exists()


@pytest.mark.parametrize("place", [5, -9])
def test_a_changed_bit_in_a_finished_run_is_named_and_not_scored(copy, capsys, tmp_path, place, kit, call):  # noqa: F811
    flip(copy / "predictions.jsonl", place)
    assert evaluate.main(["--verify", str(copy)]) == 1
    assert f"FAIL  {copy / 'predictions.jsonl'}: cut short or changed" in capsys.readouterr().out
    assert evaluate.main([str(copy), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "cut short or changed" in err and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()
    code, _, err = call(argv_of(kit, copy, "--resume"))
    assert code == 2 and "cut short or changed" in err and len(err.splitlines()) == 1


def test_a_changed_bit_in_a_run_under_way_is_named_with_its_line(copy, kit, call):  # noqa: F811
    kept = unfinish(copy, 7)
    flip(copy / "predictions.jsonl", kept.index(b"\n") + 30)  # in the second row
    before = (copy / "predictions.jsonl").read_bytes()
    code, _, err = call(argv_of(kit, copy, "--resume"))
    assert code == 2 and "rows from line 2 on" in err and len(err.splitlines()) == 1 and (copy / "predictions.jsonl").read_bytes() == before


@pytest.mark.parametrize("cut", [1, 200])
def test_rows_cut_short_are_asked_again(copy, kit, call, straight, cut):  # noqa: F811
    kept = unfinish(copy, 7)
    os.truncate(copy / "predictions.jsonl", len(kept) - cut)
    assert call(argv_of(kit, copy, "--resume"))[0] == 0
    assert ordered(read_rows(copy)) == ordered(straight) and evaluate.main(["--verify", str(copy)]) == 0


def test_a_run_from_before_the_hash_is_a_note(copy, capsys):
    run = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    del run["rows_sha256"]
    (copy / "run.json").write_text(json.dumps(run), encoding="utf-8")
    assert evaluate.main(["--verify", str(copy)]) == 0 and "no hash (made before" in capsys.readouterr().out
    (copy / "run.json").write_text(json.dumps(run | {"rows": run["rows"] + 1}), encoding="utf-8")
    assert evaluate.main(["--verify", str(copy)]) == 1


def test_another_benchmark_and_a_changed_adapter_are_named(copy, capsys, kit, tmp_path):  # noqa: F811
    run = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    adapter = shutil.copytree(run["adapter"], tmp_path / "adapter")
    flip(adapter / "adapter.safetensors", -3)
    (copy / "run.json").write_text(json.dumps(run | {"adapter": str(adapter)}), encoding="utf-8")
    assert evaluate.main(["--verify", str(copy)]) == 1 and "adapter.safetensors: cut short or changed" in capsys.readouterr().out
    (copy / "run.json").write_text(json.dumps(run | {"benchmark": run["benchmark"] | {"sha256": "0" * 64}}), encoding="utf-8")
    assert evaluate.main(["--verify", str(copy)]) == 1 and "is not the benchmark that ran" in capsys.readouterr().out


def test_two_runs_in_one_folder(copy, kit, call):  # noqa: F811
    with results_files.only_run(copy, Group()):
        code, _, err = call(argv_of(kit, copy, "--resume"))
    assert code == 2 and "another run is writing into it now" in err and len(err.splitlines()) == 1
    assert call(argv_of(kit, copy, "--resume"))[0] == 0


def test_a_killed_run_leaves_no_lock_and_loses_no_row(kit, call, straight, tmp_path):  # noqa: F811
    """The child kills itself with SIGKILL in the middle of its fourth block of rows."""
    code = ("import os, signal, results_files\nadd, n = results_files.Rows.add, [0]\n"
            "def dying(self, rows):\n    n[0] += 1\n    add(self, rows)\n"
            "    if n[0] == 4:\n        self.file.write(b'{\"half'); self.file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
            "results_files.Rows.add = dying\n" + SHORT)
    argv = argv_of(kit, tmp_path / "out", "--batch-size", "4")
    assert subprocess.run([sys.executable, "-c", code, *argv[1:]], cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    before = (tmp_path / "out/predictions.jsonl").read_bytes()
    assert before.endswith(b'{"half')
    assert call([*argv, "--resume"])[0] == 0
    assert (tmp_path / "out/predictions.jsonl").read_bytes().startswith(before[:-6]) and ordered(read_rows(tmp_path / "out")) == ordered(straight)


def test_sigterm_is_a_ctrl_c(kit, call, straight, tmp_path):  # noqa: F811
    code = "import os, signal, run_experiment\nask = run_experiment.answer\n" \
           "def stopped(*a):\n    rows = ask(*a); os.kill(os.getpid(), signal.SIGTERM); return rows\nrun_experiment.answer = stopped\n" + SHORT
    argv = argv_of(kit, tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", code, *argv[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and "--resume" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_deterministic_runs_have_the_same_bytes(kit, call, tmp_path):  # noqa: F811
    try:
        for name in ("one", "two"):
            assert call(argv_of(kit, tmp_path / name, "--deterministic"))[0] == 0
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    one, two = ((tmp_path / name / "predictions.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two and json.loads((tmp_path / "one/run.json").read_text(encoding="utf-8"))["hardware"]["deterministic"] is True


def test_logits_that_are_no_numbers_are_no_answer(kit, call, tmp_path, monkeypatch):  # noqa: F811
    honest = conditions.answers_to

    def broken(*arguments, **how):
        predictions, logits = honest(*arguments, **how)
        logits[-1, 0] = float("nan")
        return predictions, logits

    monkeypatch.setattr(conditions, "answers_to", broken)
    code, _, err = call(argv_of(kit, tmp_path / "out"))
    line = err.splitlines()[-1]
    assert code == 2 and "answers with NaN or infinity" in line and "float32" in line and "tiny-llama" in line and "Traceback" not in err
    assert not (tmp_path / "out/predictions.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["../adapter.safetensors", "/etc/hostname", "sub/../../x", "link", "a\0b"])
def test_a_manifest_that_names_files_outside_its_folder(tmp_path, name):
    folder = tmp_path / "arm"
    folder.mkdir()
    (tmp_path / "adapter.safetensors").write_bytes(b"x")
    (folder / "link").symlink_to(tmp_path / "adapter.safetensors")
    (folder / "manifest.json").write_text(json.dumps({"files": {name: "0" * 64}}), encoding="utf-8")
    with pytest.raises(UserError, match="not in its folder"):
        read_manifest(folder)


# ---- any bytes: an error of one line, or what was written ----

DEEP = b"[" * 100_000
FILES = st.one_of(st.binary(max_size=400), st.sampled_from([DEEP, b'{"files": ' + DEEP, b'{"files": {"a": NaN}}', b'{"files": [1]}', b'{"files": {"a": 1}}']))
FUZZ = settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(FILES)
def test_any_bytes_as_benchmark_or_manifest_or_memory_or_run(tmp_path, data):
    for name, read, error in (("bench.json", benchmark_file.load_benchmark, UserError), ("manifest.json", lambda path: read_manifest(path.parent), UserError),
                              ("memory.safetensors", Memory.load, MemoryFileError),
                              ("run.json", lambda path: results_files.load_run(path.parent, True), results_files.ResultsError)):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(error) as caught:
            read(path)
        assert len(str(caught.value).splitlines()) == 1
