"""faults.py in its quick form, where no other test covers a row; and what its rows led to: hub faults, costs, files that go while they are written."""
import json
import os
import shutil

import huggingface_hub
import pytest
from test_run_experiment import call, command, kit  # noqa: F401

import fault_files
import fault_fuzz
import fault_hub
import faults
import gguf_packages
import hub_files
import manifests
import results_files
import stages
from fault_kit import Fault, Kit, in_fork
from manifests import UserError, put_back
from model_utils import load_lora, load_model, weights_sha256


@pytest.fixture
def small(kit, tmp_path):  # noqa: F811
    """A kit of few cases with an adapter that nobody need train."""
    made = Kit(tmp_path, quick=True, seed=0)
    made.model, made.adapter = kit("tiny-llama")
    return made


def test_the_table_is_printed_and_kept_with_where_it_was_made(run_main, tmp_path):
    code, out, err = run_main(faults.main, ["faults.py", "--quick", "--only", "hostile-memory", "--out", tmp_path / "new/f.json"])
    assert code == 0 and out.startswith("pass    hostile-memory") and "memory files refused" in out and out.splitlines()[-1] == "1 pass, 0 FAIL, 0 not run", err
    kept = json.loads((tmp_path / "new/f.json").read_text(encoding="utf-8"))
    assert kept["count"] == {"pass": 1, "fail": 0, "not run": 0} and kept["quick"] and kept["commit"] and kept["versions"]["torch"] and kept["hardware"]["cpus"]


def test_a_row_that_fails_or_cannot_be_run_is_no_pass(run_main, monkeypatch):
    def fails(kit):
        raise Fault("it went on")

    def breaks(kit):
        raise KeyError("x")

    def cannot(kit):
        raise faults.NotHere("no namespaces")

    rows = {name: faults.Row(name, "a fault", "an error", check) for name, check in (("fails", fails), ("breaks", breaks), ("cannot", cannot))}
    monkeypatch.setattr(faults, "ROWS", rows)
    code, out, _ = run_main(faults.main, ["faults.py", "--only", "fails,breaks,cannot"])
    assert code == 1 and out.splitlines()[-1] == "0 pass, 2 FAIL, 1 not run"
    assert "it went on" in out and "KeyError" in out and "(breaks)" in out and "not run cannot" in out
    assert run_main(faults.main, ["faults.py", "--only", "cannot"])[0] == 0
    code, _, err = run_main(faults.main, ["faults.py", "--only", "nothing"])
    assert code == 2 and "--only nothing: unknown" in err


def test_ctrl_c_keeps_the_rows_and_says_which_are_left(run_main, monkeypatch, tmp_path):
    def interrupted(kit):
        raise KeyboardInterrupt

    rows = {name: faults.Row(name, "a fault", "an error", check) for name, check in (("done", lambda kit: "seen"), ("stopped", interrupted), ("never", interrupted))}
    monkeypatch.setattr(faults, "ROWS", rows)
    code, out, err = run_main(faults.main, ["faults.py", "--out", tmp_path / "f.json", "--only", "done,stopped,never"])
    assert code == 130 and err.rstrip().endswith("python faults.py --only stopped,never") and out.startswith("pass    done")
    assert [row["name"] for row in json.loads((tmp_path / "f.json").read_text(encoding="utf-8"))["rows"]] == ["done"]


def test_a_process_that_dies_or_hangs_is_a_fault():
    assert in_fork(lambda: 3) == 3
    with pytest.raises(Fault, match="exit code 7"):
        in_fork(lambda: os._exit(7))
    with pytest.raises(Fault, match="still running"):
        in_fork(lambda: __import__("time").sleep(60), limit=0)


def test_every_parser_and_loader_a_few_times(small):
    assert "cases" in fault_fuzz.fuzz(small)


def test_a_few_conversations_through_one_process(small):
    assert "50 conversations" in fault_fuzz.soak(small)


def test_a_changed_conversion_is_named(small, monkeypatch):
    monkeypatch.setenv("TTT_CACHE", "unset by the row")
    assert fault_files.damaged_cache(small, 4) == 4


def test_a_conversion_without_hashes_is_made_again(small, monkeypatch):
    monkeypatch.setenv("TTT_CACHE", str(small.folder("cache")))
    gguf = gguf_packages.GGUF((), "0" * 64, "", ())
    folder = gguf_packages.converted_path("some", gguf)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"an earlier version's")

    def convert(name, gguf, work):
        (work / "model").mkdir()
        (work / "model/model.safetensors").write_bytes(b"new")
    monkeypatch.setattr(gguf_packages, "convert_gguf", convert)
    assert gguf_packages.converted_folder("some", gguf) == folder and (folder / "model.safetensors").read_bytes() == b"new"
    assert json.loads((folder / "manifest.json").read_text())["gguf_sha256"] == gguf.sha256 and list(folder.parent.iterdir()) == [folder]


# ---- the Hub ----

@pytest.fixture
def asked(small, monkeypatch):
    """asked(fault, revision) -> (hub, what hub_snapshot returned or said, stderr is left to the caller), without pauses and with little patience."""
    monkeypatch.setattr(hub_files, "PATIENCE", 0.3)
    monkeypatch.setattr(hub_files, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(small.root / "hub"))

    def ask(fault=None, revision=None):
        with fault_hub.hub_of(fault_hub.Path(small.model), fault) as hub:
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
            monkeypatch.setattr(huggingface_hub.file_download.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
            try:
                return hub, hub_files.hub_snapshot("--model m", "some/model", revision, ["*.json", "*.safetensors"], "mend it")
            except UserError as error:
                return hub, str(error)
    return ask


@pytest.mark.parametrize("fault, tries, named", [("revision", 1, "no revision nope"), ("no token", 1, "HF_TOKEN"), ("gated", 1, "accepted its terms"),
                                                 ("busy", 3, "cannot be reached"), ("silent", 3, "ReadTimeout")])
def test_a_hub_that_refuses_or_does_not_answer(fault, tries, named, asked, capsys):
    hub, said = asked(fault, "nope" if fault == "revision" else None)
    assert said.startswith("--model m: some/model") and named in said and said.endswith("; mend it") and len(said.splitlines()) == 1
    assert len(hub.asked) == tries and capsys.readouterr().err.count("trying again") == tries - 1


def test_a_download_is_checked_and_offline_asks_nobody(asked, monkeypatch, small):
    hub, folder = asked()
    assert hub.asked and (folder / "model.safetensors").read_bytes() == (fault_hub.Path(small.model) / "model.safetensors").read_bytes()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub, again = asked()
    assert again == folder and not hub.asked
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(UserError, match="cut short or changed.*remove .*, and it is downloaded again"):
        weights_sha256(asked()[1])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(small.root / "empty"))
    hub, said = asked()
    assert "HF_HUB_OFFLINE" in said and not hub.asked


# ---- files that go, and what a machine costs ----

def test_rows_removed_under_a_run_are_put_back(tmp_path):
    rows = results_files.Rows(tmp_path)
    with pytest.raises(UserError, match="predictions.jsonl: was removed while it was written"), rows:
        rows.add([{"a": 1}])
        (tmp_path / "predictions.jsonl").unlink()
        rows.add([{"a": 2}])
    assert (tmp_path / "predictions.jsonl").read_text() == '{"a": 1}\n' and results_files.check_sums(tmp_path, {}) == 9
    with (tmp_path / "other").open("a+b") as file:
        (tmp_path / "other").unlink()
        (tmp_path / "other").write_text("somebody else's")
        with pytest.raises(UserError, match="other: was replaced"):
            put_back(file, tmp_path / "other")
    assert (tmp_path / "other").read_text() == "somebody else's"


def test_a_lora_that_went_while_a_run_was_on(kit, tmp_path):  # noqa: F811
    folder = shutil.copytree(kit.tuned(), tmp_path / "tuned")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / "lora" / name).unlink()
        with pytest.raises(UserError, match="no LoRA"):
            load_lora(folder, load_model(kit("tiny-llama")[0]))


def test_results_of_another_commit_are_kept_apart(kit, call, tmp_path, monkeypatch):  # noqa: F811
    argv = command(tmp_path / "out", "--model", kit("tiny-llama")[0], "--benchmark", kit.benchmark, "--lang", "en", "--levels", "2", "--limit", "1", "--conditions", "C_nothing")
    monkeypatch.setenv("TTT_COMMIT", "1" * 12)
    monkeypatch.setenv("TTT_USD_PER_SECOND", "0.5")
    assert call(argv)[0] == 0
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["cost_usd"] == pytest.approx(run["seconds"] * 0.5)
    monkeypatch.setenv("TTT_COMMIT", "2" * 12)
    code, _, err = call([*argv, "--resume"])
    assert code == 2 and "another commit (111111111111, now 222222222222)" in err and len(err.splitlines()) == 1
    monkeypatch.setenv("TTT_USD_PER_SECOND", "cheap")
    with pytest.raises(UserError, match="TTT_USD_PER_SECOND=cheap: no number"):
        manifests.cost_usd(1)


def test_a_script_on_modal_is_told_what_its_seconds_cost(tmp_path, monkeypatch):
    (tmp_path / "rate.py").write_text("import os; print(os.environ.get('TTT_USD_PER_SECOND'))")
    stage, reserved = stages.Stage("s", (("rate.py",),)), {"cpu": 2, "memory": 1024}
    for gpu, rate in (("NVIDIA L4", stages.GPU_PRICES["L4"] + 2 * stages.CORE_PRICE + stages.GIB_PRICE), ("a GPU of tomorrow", None)):
        monkeypatch.setattr(stages, "gpu_name", lambda gpu=gpu: gpu)
        said = stages.run(stage, tmp_path, tmp_path, reserved)["lines"][0]
        assert said == "None" if rate is None else float(said) == pytest.approx(rate)
