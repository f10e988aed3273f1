"""What a training run leaves between its checkpoints, so that a resumed run ends where an uninterrupted one would."""
from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fast_weight import TTTConfig
from manifests import UserError, read_manifest

STATE = "state.safetensors"  # parameters in float32 and AdamW's moments: what --resume goes on from; not part of a finished arm


def identity(manifest: dict, updates: int) -> dict:
    """What must be equal for a resumed run to end where an uninterrupted one would."""
    names = ("model_sha256", "objective", "seed", "ttt", "lora", "start", "langs", "data_sha256", "optimizer")
    return {name: manifest.get(name) for name in names} | {"updates": updates}


def current(identity: dict) -> dict:
    """An identity from before an option existed, with that option's value of then."""
    groups = "1" if identity["objective"] == "recall" else None
    optimizer = {"groups": groups, "aids": None, "weight_decay": 0.0, "dropout": 0.0, "length": None} | identity["optimizer"]
    return {"start": None} | identity | {"optimizer": optimizer, "ttt": identity["ttt"] and TTTConfig(**identity["ttt"]).to_dict()}


def save_state(folder: Path, trained: dict, optimizer, mine: dict, done: int) -> None:
    """What the next update needs beside the data, which is a function of (seed, update)."""
    tensors = {}
    for name, parameter in trained.items():
        moments = optimizer.state[parameter]
        tensors |= {f"{name}/value": parameter.detach(), f"{name}/exp_avg": moments["exp_avg"],
                    f"{name}/exp_avg_sq": moments["exp_avg_sq"], f"{name}/step": moments["step"]}
    part = folder / (STATE + ".part")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, str(part),
              {"identity": json.dumps(mine), "done": str(done)})
    os.replace(part, folder / STATE)


def resume(folder: Path, mine: dict, trained: dict, optimizer) -> int:
    """Put the last checkpoint's values and moments in place; returns the updates done, 0 where there is nothing yet.

    Raises UserError when the folder's arm is not the one that the command line describes.
    """
    path = folder / STATE
    if not path.exists():
        if not (folder / "manifest.json").exists():
            return 0
        earlier = read_manifest(folder)
        check_same(folder, identity(earlier, earlier["updates"]), mine)
        return earlier["updates"]
    try:
        state = safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); remove {folder} and train again") from error
    with state:
        check_same(folder, json.loads(state.metadata()["identity"]), mine)
        for name, parameter in trained.items():
            parameter.data.copy_(state.get_tensor(f"{name}/value"))
            moments = {part: state.get_tensor(f"{name}/{part}") for part in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {part: t if part == "step" else t.to(parameter.device) for part, t in moments.items()}
        return int(state.metadata()["done"])


def check_same(folder: Path, earlier: dict, mine: dict) -> None:
    earlier, mine = current(earlier), current(mine)
    for name, value in mine.items():
        if earlier[name] != value:
            raise UserError(f"{folder}: was trained with another {name.removesuffix('_sha256')}; repeat its command, or name another --arm")


def keep_log(path: Path, updates: int) -> list[float]:
    """Cut the log to the updates that the checkpoint holds; returns their losses."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:updates] if updates else []
    path.write_text("".join(lines), encoding="utf-8")
    return [json.loads(line)["loss"] for line in lines]
