"""Rows of faults.py about files: disks that refuse, files that go, are cut or changed, and files made to do harm."""
from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from fault_kit import ADAPTER, HERE, ROWS, STATE, Ended, Fault, Kit, NotHere, cut, flip, raises, refused, require, same_arm, same_rows, succeeded, wait_for
from gguf_packages import GGUF, converted_folder, converted_path
from manifests import UserError, write_json, write_manifest
from memory import LayerMemory, Memory, MemoryFileError
from model_utils import load_adapter, load_model
from results_files import SUMS, ResultsError, load_run
from verify_files import verify


# ---- disks ----

def on_small_disk(kit: Kit, name: str, size: int, argv_of, already: Path | None = None, read_only: bool = False) -> tuple[Ended, Path]:
    """Run a script with its --out on a disk of `size` bytes, in a mount of its own; returns how it ended, and a copy of the disk."""
    disk, kept = kit.folder(f"{name}-disk"), kit.root / f"{name}-kept"
    script = ('set -e; mount -t tmpfs -o size="$1" none "$2"; if [ -n "$4" ]; then cp -r "$4/." "$2"; fi; if [ -n "$5" ]; then mount -o remount,ro "$2"; fi; '
              'kept="$3"; shift 5; set +e; "$@"; code=$?; cp -r "$DISK/." "$kept"; exit $code')
    if subprocess.run(["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", disk], capture_output=True).returncode:
        raise NotHere("no mount of its own: the kernel gives this user no namespaces")
    kept.mkdir()
    argv = argv_of(disk)
    done = subprocess.run(["unshare", "--map-root-user", "--mount", "bash", "-c", script, "bash", str(size), disk, kept, already or "", "ro" if read_only else "",
                           sys.executable, HERE / argv[0], *argv[1:]], cwd=HERE, env=kit.env | {"DISK": str(disk)}, capture_output=True, text=True)
    return Ended(done.returncode, done.stdout, done.stderr), kept


def full_disk(kit: Kit) -> str:
    """The disk fills while answers come, and while a checkpoint is written; on a disk with room the same command ends as if nothing had been."""
    page = os.sysconf("SC_PAGE_SIZE")
    ended, kept = on_small_disk(kit, "full-run", 4 * page, kit.ask)
    refused(ended, ROWS, "No space left on device", "free space")
    whole, had = (kit.answers / ROWS).read_bytes(), (kept / ROWS).read_bytes().count(b"\n")
    require(0 < had < whole.count(b"\n"), f"{had} rows were written before the disk was full")
    succeeded(kit.call(kit.ask(kept, "--resume")))
    same_rows(kept, kit.answers)
    adapter = (kit.adapter / ADAPTER).stat().st_size
    ended, kept = on_small_disk(kit, "full-arm", 10 * adapter, kit.train)  # room for one state (three times two bytes for one) and a half
    refused(ended, STATE, "No space left on device")
    updates = json.loads((kept / "arm/manifest.json").read_text())["updates"]
    succeeded(kit.call(kit.train(kept, "--resume")))
    same_arm(kept / "arm", kit.adapter)
    return f"one line each; {had} rows and the checkpoint of update {updates} were intact, and both went on to the same end"


def size_limit(kit: Kit) -> str:
    """The system refuses to let a file grow, as a quota does."""
    out = kit.root / "limited"
    most = (kit.answers / ROWS).stat().st_size // 2
    refused(kit.run(kit.ask(out), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))), ROWS, "File too large")
    succeeded(kit.call(kit.ask(out, "--resume")))
    same_rows(out, kit.answers)
    return "one line, and the run went on to the same end"


def read_only(kit: Kit) -> str:
    room = 100 * (kit.adapter / ADAPTER).stat().st_size
    begun = kit.folder("read-only-begun")
    shutil.copytree(kit.answers, begun / "run")
    for name, argv_of in (("ask", kit.ask), ("train", kit.train), ("again", lambda disk: kit.ask(disk / "run", "--resume", conditions="C_nothing"))):
        ended, kept = on_small_disk(kit, f"read-only-{name}", room, argv_of, begun, read_only=True)
        refused(ended, f"read-only-{name}-disk", "Read-only file system", "permissions")
        require((kept / "run" / ROWS).read_bytes() == (begun / "run" / ROWS).read_bytes(), "rows were changed")
    return "one line each for a new run, a training and a resumed run; what was there is unchanged"


def removed(kit: Kit) -> str:
    """A file goes while a script runs."""
    def removing(argv, path: Path, first: Path):
        process = kit.start(argv)
        wait_for(first, process, lambda path: path.exists() and path.stat().st_size)
        path.unlink()
        return kit.end(process)
    for path in (ROWS, SUMS):
        out = kit.root / f"removed-{path}"
        refused(removing(kit.ask(out), out / path, out / ROWS), out / path, "was removed while it was written", "--resume")
        succeeded(kit.call(kit.ask(out, "--resume")))
        same_rows(out, kit.answers)
    out = kit.root / "removed-log"
    refused(removing(kit.train(out), out / "arm/train.jsonl", out / "arm" / STATE), out / "arm/train.jsonl", "was removed while it was written")
    succeeded(kit.call(kit.train(out, "--resume")))
    same_arm(out / "arm", kit.adapter)
    out, tuned = kit.root / "removed-tuned", shutil.copytree(kit.tuned, kit.root / "going")
    asked = partial(kit.ask, out, "--tuned-adapter", tuned, conditions="A_context,C_nothing,A_tuned")
    refused(removing(asked(), tuned / "lora/adapter_model.safetensors", out / ROWS), tuned)
    shutil.copytree(kit.tuned, tuned, dirs_exist_ok=True)
    succeeded(kit.call(asked("--resume")))
    return "rows, their sums, a log and an adapter: named; what was removed under a writer is put back, and all went on to the same end"


# ---- cut short, or one bit changed ----

def damaged(kit: Kit, name: str, folder: Path, file: str, check, cases: int) -> int:
    """Copies of a folder with one file damaged, half of them by a bit and half cut; check(copy) must refuse or show the file as it was."""
    draw = kit.draws(f"damaged/{name}")
    for number in range(cases):
        copy = shutil.copytree(folder, kit.root / f"damaged-{name}-{number}")
        how = (flip, cut)[number % 2](copy / file, draw)
        try:
            check(copy)
        except Fault as fault:
            raise Fault(f"{how}: {fault}") from None
        shutil.rmtree(copy)
    return cases


def a_memory(seed: int = 0, rows: int = 2) -> Memory:
    draw = torch.Generator().manual_seed(seed)
    layers = {i: LayerMemory.factored(torch.randn(rows, 3, 8, generator=draw), torch.randn(rows, 3, 4, generator=draw)) for i in (1, 2)}
    return Memory(layers, torch.full((rows,), 3), torch.ones(rows, dtype=torch.int64), {1: 1.0, 2: 2.0})


def unfinished(kit: Kit) -> Path:
    """A run under way: two thirds of its rows, and their sums."""
    out = kit.root / "unfinished"
    process = kit.start(kit.ask(out))
    wait_for(out / ROWS, process, lambda path: path.exists() and path.read_bytes().count(b"\n") > 5)
    process.kill()
    kit.end(process)
    return out


def damage(kit: Kit) -> str:
    counts, cases = {}, partial(kit.cases, few=2)
    counts["finished rows"] = damaged(kit, "rows", kit.answers, ROWS, lambda copy: raises(ResultsError, lambda: load_run(copy, False), copy / ROWS), cases(200))
    loaded = load_model(str(kit.model))
    counts["adapters"] = damaged(kit, "adapter", kit.adapter, ADAPTER, lambda copy: raises(UserError, lambda: load_adapter(copy, loaded), copy / ADAPTER), cases(200))
    counts["LoRAs"] = damaged(kit, "lora", kit.tuned, "lora/adapter_model.safetensors",
                              lambda copy: refused(kit.call(kit.ask(copy / "out", "--tuned-adapter", copy, conditions="A_tuned")), copy), cases(4))
    straight = a_memory()
    folder = kit.folder("memory")
    straight.save(folder / "m.safetensors")

    def same_memory(copy):
        try:
            loaded = Memory.load(copy / "m.safetensors")
        except MemoryFileError as error:
            require(str(copy) in str(error) and len(str(error).splitlines()) == 1, f"says {error}")
        else:  # a bit of the file's own padding, or of a name that nothing reads
            require(loaded.digest() == straight.digest() and loaded.weight_norms == straight.weight_norms, "another memory is taken")
    counts["memories"] = damaged(kit, "memory", folder, "m.safetensors", same_memory, cases(400))
    half = unfinished(kit)
    counts["rows under way"] = damaged(kit, "sums", half, ROWS, partial(named_or_whole, kit), cases(6))
    out = kit.root / "killed-arm"
    process = kit.start(kit.train(out))
    wait_for(out / "arm" / STATE, process)
    process.kill()
    kit.end(process)
    for name, file in (("states", f"arm/{STATE}"), ("logs", "arm/train.jsonl")):
        counts[name] = damaged(kit, name, out, file, partial(named_or_same, kit, file), cases(6))
    counts["benchmarks"] = damaged(kit, "benchmark", beside_benchmark(kit), "benchmark.json", partial(other_benchmark, kit), cases(6))
    counts["caches"] = damaged_cache(kit, cases(40))
    return f"{sum(counts.values())} damages, each named and never used: " + ", ".join(f"{n} of {name}" for name, n in counts.items())


def named_or_whole(kit: Kit, copy: Path) -> None:
    """Rows of a run under way: a changed one is named, those that are cut are asked again."""
    ended = kit.call(kit.ask(copy, "--resume"))
    if ended.code == 0:
        same_rows(copy, kit.answers)
    else:
        refused(ended, copy / ROWS, "changed")


def named_or_same(kit: Kit, file: str, copy: Path) -> None:
    """A state and the log beside it: refused by name, unless the damage lies behind what the state vouches for."""
    ended = kit.call(kit.train(copy, "--resume"))
    if ended.code == 0:
        same_arm(copy / "arm", kit.adapter)
    else:
        refused(ended, copy / file)


def beside_benchmark(kit: Kit) -> Path:
    """A finished run, with its benchmark in the folder."""
    folder = shutil.copytree(kit.answers, kit.root / "beside")
    shutil.copy(kit.benchmark, folder / "benchmark.json")
    return folder


def other_benchmark(kit: Kit, copy: Path) -> None:
    """A run does not go on with a damaged benchmark, and verify names it."""
    bench = copy / "benchmark.json"
    ended = kit.call(kit.ask(copy, "--resume", "--benchmark", bench))
    refused(ended)
    require(str(bench) in ended.line or "another benchmark" in ended.line, ended.line)
    run = json.loads((copy / "run.json").read_text(encoding="utf-8"))
    write_json(copy / "run.json", run | {"benchmark": run["benchmark"] | {"file": str(bench)}})
    lines, well = verify([copy])
    require(not well and any("is not the benchmark that ran" in line for line in lines), "verify passes it")


def damaged_cache(kit: Kit, cases: int) -> int:
    """A converted model in the cache of converted models, as gguf_packages.py keeps it."""
    os.environ["TTT_CACHE"] = str(kit.folder("cache"))
    gguf = GGUF((), "0" * 64, "pip install nothing", ())
    folder = converted_path("some", gguf)
    shutil.copytree(kit.model, folder)
    write_manifest(folder, {"gguf_sha256": gguf.sha256}, sorted(path.name for path in folder.iterdir()))
    require(converted_folder("some", gguf) == folder, "a whole conversion is not taken")
    return damaged(kit, "cache", folder, "model.safetensors", lambda copy: in_its_place(copy, folder, gguf), cases)


def in_its_place(copy: Path, folder: Path, gguf: GGUF) -> None:
    shutil.copy(folder / "model.safetensors", copy / "whole")
    shutil.copy(copy / "model.safetensors", folder / "model.safetensors")
    raises(UserError, lambda: converted_folder("some", gguf), folder / "model.safetensors", "remove")
    shutil.copy(copy / "whole", folder / "model.safetensors")
