"""What a training run leaves between its checkpoints, so that a resumed run ends where an uninterrupted one would."""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fast_weight import TTTConfig
from manifests import UserError, read_manifest, replacing
from memory import file_digest
from tensor_files import save_tensors

LOG = "train.jsonl"
STATE = "state.safetensors"  # parameters in float32 and AdamW's moments: what --resume goes on from; not part of a finished arm
MEND = "restore the file, or remove {} and train again"


def identity(manifest: dict, updates: int) -> dict:
    """What must be equal for a resumed run to end where an uninterrupted one would."""
    names = ("model_sha256", "objective", "seed", "ttt", "lora", "start", "langs", "data_sha256", "optimizer")
    return {name: manifest.get(name) for name in names} | {"updates": updates}


def current(identity: dict) -> dict:
    """An identity from before an option existed, with that option's value of then."""
    groups = "1" if identity["objective"] == "recall" else None
    optimizer = {"groups": groups, "aids": None, "weight_decay": 0.0, "dropout": 0.0, "length": None, "compile": False} | identity["optimizer"]
    return {"start": None} | identity | {"optimizer": optimizer, "ttt": identity["ttt"] and TTTConfig(**identity["ttt"]).to_dict()}


def save_state(folder: Path, trained: dict, optimizer, mine: dict, done: int) -> None:
    """What the next update needs beside the data, which is a function of (seed, update); with the SHA-256 of it, and of the log up to here."""
    tensors = {}
    for name, parameter in trained.items():
        moments = optimizer.state[parameter]
        tensors |= {f"{name}/value": parameter, f"{name}/exp_avg": moments["exp_avg"],
                    f"{name}/exp_avg_sq": moments["exp_avg_sq"], f"{name}/step": moments["step"]}
    header = {"identity": json.dumps(mine), "done": str(done), "log_sha256": hashlib.sha256(first_lines(folder / LOG, done)).hexdigest()}
    save_tensors(tensors, folder / STATE, header | {"digest": file_digest(tensors, *header.values())})


def resume(folder: Path, mine: dict, trained: dict, optimizer) -> int:
    """Put the last checkpoint's values and moments in place; returns the updates done, 0 where there is nothing yet.

    Raises UserError when the folder's arm is not the one that the command line describes, or when the state or the log was cut short or changed.
    """
    path = folder / STATE
    if not path.exists():
        if not (folder / "manifest.json").exists():
            return 0
        earlier = read_manifest(folder)
        check_same(folder, identity(earlier, earlier["updates"]), mine)
        return earlier["updates"]
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); {MEND.format(folder)}") from error
    header = [metadata.get(name, "") for name in ("identity", "done", "log_sha256")]
    if metadata.get("digest") != file_digest(tensors, *header):
        raise UserError(f"{path}: changed, or of an earlier version of the project (its SHA-256 is not the one kept in it); {MEND.format(folder)}")
    done = int(metadata["done"])
    if hashlib.sha256(first_lines(folder / LOG, done)).hexdigest() != metadata["log_sha256"]:
        raise UserError(f"{folder / LOG}: its first {done} lines are cut short or changed (their SHA-256 is not the one in {STATE}); {MEND.format(folder)}")
    check_same(folder, json.loads(metadata["identity"]), mine)
    for name, parameter in trained.items():
        parameter.data.copy_(tensors[f"{name}/value"])
        moments = {part: tensors[f"{name}/{part}"] for part in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {part: t if part == "step" else t.to(parameter.device) for part, t in moments.items()}
    return done


def check_same(folder: Path, earlier: dict, mine: dict) -> None:
    earlier, mine = current(earlier), current(mine)
    for name, value in mine.items():
        if earlier[name] != value:
            raise UserError(f"{folder}: was trained with another {name.removesuffix('_sha256')}; repeat its command, or name another --arm")


def first_lines(path: Path, count: int) -> bytes:
    """The first lines of a log, with their ends; nothing of a file that is not there."""
    return b"".join(path.read_bytes().splitlines(keepends=True)[:count]) if path.is_file() else b""


def keep_log(path: Path, updates: int) -> list[float]:
    """Cut the log to the updates that the checkpoint holds, which `resume` has checked; returns their losses."""
    kept = first_lines(path, updates)
    with replacing(path) as part:
        part.write_bytes(kept)
    return [json.loads(line)["loss"] for line in kept.splitlines()]
