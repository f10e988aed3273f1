"""Rows of faults.py about files made to do harm: adapters, memories and benchmarks that come from somebody else.

Each must be refused by one line before anything in it is executed, and nothing may be overwritten. Their hashes are right: whoever makes such a file
makes those too.
"""
from __future__ import annotations

import copy
import json
import math
import pickle
import resource
import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file

from fault_files import a_memory
from fault_kit import ADAPTER, Fault, Kit, in_fork, raises, refused, require, resident_bytes
from manifests import UserError, write_json, write_manifest
from memory import Memory, MemoryFileError, file_digest
from model_utils import load_adapter, load_model

MOST_MEMORY = 2 ** 29  # bytes that reading a hostile file may take: the machine's memory is not the file's


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def header_of(length: int, text: bytes) -> bytes:
    """The start of a safetensors file: the header's claimed length, and the header."""
    return struct.pack("<Q", length) + text


def claimed(tensors: dict[str, list[int]]) -> bytes:
    """A safetensors header for tensors of bytes of these shapes, without their data."""
    header, end = {}, 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [end, end + math.prod(shape)]}
        end += math.prod(shape)
    text = json.dumps(header).encode()
    return header_of(len(text), text)


def hollow(path: Path, tensors: dict[str, list[int]]) -> None:
    """A whole safetensors file of zeros that takes no room on the disk, however many rows it claims."""
    head = claimed(tensors)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(map(math.prod, tensors.values())))


def bad_files(trap: Path):
    """(name, function that writes the file): what may lie in the place of a safetensors file."""
    hidden = pickle.dumps(Trap(trap))
    yield "a pickle", lambda path: path.write_bytes(hidden)
    yield "a torch checkpoint", lambda path: torch.save({"w": Trap(trap)}, path)
    yield "a header of 2^60 bytes", lambda path: path.write_bytes(header_of(2 ** 60, b"{}"))
    yield "a header beyond the file", lambda path: path.write_bytes(header_of(10 ** 6, b"{}"))
    yield "a header of 100,000 brackets", lambda path: path.write_bytes(header_of(100_000, b"[" * 100_000))
    yield "10^9 rows that are not there", lambda path: path.write_bytes(claimed({"tokens": [10 ** 9], "1.keys": [10 ** 9, 3, 8]}))
    yield "10^9 rows of zeros", lambda path: hollow(path, {"tokens": [10 ** 9]})
    yield "a name with a path in it", lambda path: save_file({"../../1.keys": torch.zeros(2), "tokens": torch.zeros(1)}, str(path))


def hostile_adapter(kit: Kit) -> str:
    trap, count, loaded = kit.root / "sprung", 0, load_model(str(kit.model))

    def check(name: str, change, files=(ADAPTER,)) -> None:
        nonlocal count
        folder = shutil.copytree(kit.adapter, kit.root / f"hostile-adapter-{count}")
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        changed = change(folder, manifest)
        if changed is not None:
            (folder / "manifest.json").write_text(json.dumps(changed), encoding="utf-8")  # infinity and NaN too
        else:
            write_manifest(folder, manifest, list(files))
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 2 ** 20}
        read_safely(name, lambda: load_adapter(folder, loaded), UserError, folder)
        require({path: path.read_bytes() for path in before} == before and not trap.exists(), f"{name}: something was executed or overwritten")
        count += 1

    for name, write in bad_files(trap):
        check(name, lambda folder, manifest, write=write: write(folder / ADAPTER))
    for name in ("../../etc/passwd", "/etc/passwd", f"{ADAPTER}/../../../x", "a\0b"):
        check(f"the file name {name!r}", lambda folder, manifest, name=name: manifest | {"files": {name: "0" * 64}})
    for setting, value in (("value_rank", 10 ** 9), ("kernel", 10 ** 9 + 1), ("write_attention", 10 ** 9), ("layers", [10 ** 9]), ("layers", "0"), ("eta", float("inf")),
                           ("gate", "yes"), ("nothing_of_ours", 1)):
        check(f"{setting} {value}", lambda folder, manifest, setting=setting, value=value: manifest | {"ttt": manifest["ttt"] | {setting: value}})
    check("no hash of the adapter", lambda folder, manifest: manifest | {"files": {}})
    check("a LoRA without a hash", lambda folder, manifest: shutil.copytree(kit.tuned / "lora", folder / "lora") and manifest | {"lora": {"r": 16}})

    def with_lora(write):
        def change(folder, manifest):
            shutil.copytree(kit.tuned / "lora", folder / "lora")
            manifest["lora"] = {"r": 16}
            write(folder / "lora")
        return change
    lora = ("adapter.safetensors", "lora/adapter_model.safetensors", "lora/adapter_config.json")
    settings = lambda **more: lambda folder: write_json(folder / "adapter_config.json", json.loads((folder / "adapter_config.json").read_text()) | more)
    for name, write in bad_files(trap):
        check(f"{name}, as a LoRA", with_lora(lambda folder, write=write: write(folder / "adapter_model.safetensors")), lora)
    check("a LoRA of rank 10^9", with_lora(settings(r=10 ** 9)), lora)
    check("a LoRA of another kind", with_lora(settings(peft_type="PROMPT_TUNING")), lora)
    return f"{count} adapters refused by one line, nothing executed, nothing overwritten"


def read_safely(name: str, read, error, path) -> None:
    """In a fork: the read raises the error, of one line that names the file, and has not taken MOST_MEMORY by then."""
    def attempt() -> str:
        before = resident_bytes()
        try:
            raises(error, read, path)
        except Fault as fault:
            return str(fault)
        except Exception as other:
            return f"{type(other).__name__}: {str(other)[:200]}"
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        return f"took {taken / 1e6:.0f} MB before it was refused" if taken > MOST_MEMORY else ""
    said = in_fork(attempt)
    require(not said, f"{name}: {said}")


def hostile_memory(kit: Kit) -> str:
    trap, folder, count = kit.root / "sprung-memory", kit.folder("hostile-memory"), 0
    path = folder / "m.safetensors"

    def check(name: str) -> None:
        nonlocal count
        read_safely(name, lambda: Memory.load(path), MemoryFileError, path)
        require(not trap.exists() and [p.name for p in folder.iterdir()] == [path.name], f"{name}: something was executed or written")
        count += 1

    for name, write in bad_files(trap):
        write(path)
        check(name)
    good = a_memory().named_tensors()
    norms, sizes = '{"1": 1.0, "2": 2.0}', '{"1": null, "2": null}'
    forged = {  # content under a right digest that is no memory
        "no counts": ({k: v for k, v in good.items() if k != "tokens"}, norms, sizes), "no layer": ({k: good[k] for k in ("tokens", "chunks")}, norms, sizes),
        "a layer without values": ({k: v for k, v in good.items() if k != "1.values"}, norms, sizes),
        "a layer with a path": (good | {"../1.keys": torch.zeros(2, 3, 8)}, norms, sizes), "a layer of another name": (good | {"x.keys": torch.zeros(2, 3, 8)}, norms, sizes),
        "other rows": (good | {"1.keys": torch.zeros(9, 3, 8)}, norms, sizes), "a flat tensor": (good | {"1.keys": torch.zeros(6)}, norms, sizes),
        "more keys than values": (good | {"1.keys": torch.zeros(2, 4, 8)}, norms, sizes), "counts that are no numbers of tokens": (good | {"tokens": torch.zeros(2)}, norms, sizes),
        "no norms": (good, "{}", sizes), "an infinite norm": (good, '{"1": 1e999, "2": 2.0}', sizes), "norms that are no JSON": (good, "[" * 99_999, sizes),
        "norms that are a list": (good, "[1]", sizes), "sizes that are no pair": (good, norms, '{"1": [1, 2, 3], "2": null}'),
        "sizes of 10^9": (good, norms, '{"1": [-1, 8], "2": null}'), "sizes that are missing": (good, norms, "{}")}
    for name, (tensors, norms_, sizes_) in forged.items():
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, str(path), {"digest": file_digest(tensors, norms_, sizes_), "weight_norms": norms_, "sizes": sizes_})
        check(name)
    return f"{count} memory files refused by one line, nothing executed"


def hostile_benchmark(kit: Kit) -> str:
    whole, count = json.loads(kit.benchmark.read_text(encoding="utf-8")), 0
    path, out = kit.folder("hostile-benchmark") / "b.json", kit.root / "hostile-benchmark-out"
    argv = [*kit.ask(out), "--benchmark", str(path)]

    def change(place, value):
        bench = copy.deepcopy(whole)
        place(bench["samples"])(value)
        return json.dumps(bench).encode()

    def setting(*keys):
        def place(samples):
            target = samples[0]
            for key in keys[:-1]:
                target = target[key]
            return lambda value: target.__setitem__(keys[-1], value)
        return place
    texts = {"conversation": ("conversation",), "question": ("probes", 0, "question"), "gold_answer": ("probes", 0, "gold_answer"), "distractor": ("distractor",),
             "fact_text": ("facts", 0, "fact_text"), "sample_id": ("sample_id",), "probe_id": ("probes", 0, "probe_id")}
    values = {"a NUL": "a\0b", "an escape sequence": "a\x1b[2Jb", "a carriage return": "a\rb", "half a surrogate": "a\ud800b", "C1 control": "a\x9bb", "a megabyte": "x" * 2 ** 20}
    files = {f"{name} in {field}": change(setting(*keys), value) for field, keys in texts.items() for name, value in values.items()}
    files |= {"a sample twice": json.dumps(whole | {"samples": whole["samples"] * 2}).encode(), "not UTF-8": b'{"version": "1\xff"}', "UTF-16": kit.benchmark.read_text().encode("utf-16"),
              "a probe twice": change(setting("probes"), whole["samples"][0]["probes"] * 2), "a fact twice": change(setting("facts"), whole["samples"][0]["facts"] * 2),
              "100,000 brackets": b"[" * 100_000, "a number of 10,000 digits": b'{"version": "1", "seed": ' + b"9" * 10_000 + b', "samples": []}',
              "infinity": change(setting("facts", 0, "order"), "HUGE").replace(b'"HUGE"', b"Infinity"), "nothing": b""}
    for number, (name, data) in enumerate(files.items()):
        path.write_bytes(data)
        before = sorted(kit.root.iterdir())
        line = refused(kit.call(argv), path)
        require(all(char.isprintable() for char in line) and len(line) < 600, f"{name}: the message itself has control characters, or is long")
        require(sorted(kit.root.iterdir()) == before and not out.exists(), f"{name}: something was written")
        count += 1
    return f"{count} benchmarks refused by one line, nothing written"
