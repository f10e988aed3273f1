"""What an adapter's files must keep before anything of them is read or built: they may come from anybody, hashes and all."""
from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import torch

from fast_weight import TTTConfig
from manifests import MEND, UserError, parse_files

MOST_NUMBERS = 4  # of an adapter file, for every number of its base (and of a tiny one, as if that had a million): far more than any arm has
WHOLE = lambda value: type(value) is int
NUMBER = lambda value: type(value) in (int, float) and math.isfinite(value)
OF_TYPE = {"int": WHOLE, "int | None": lambda value: value is None or WHOLE(value), "float": NUMBER, "float | None": lambda value: value is None or NUMBER(value),
           "bool": lambda value: type(value) is bool, "str": lambda value: type(value) is str,
           "tuple[int, ...]": lambda value: type(value) is list and all(map(WHOLE, value))}  # what JSON may hold for a field of TTTConfig


def read_config(manifest: dict, folder) -> TTTConfig:
    """The settings in a memory arm's manifest; UserError where they cannot be used."""
    try:
        wrong = [field.name for field in fields(TTTConfig) if field.name in manifest["ttt"] and not OF_TYPE[field.type](manifest["ttt"][field.name])]
        if wrong:
            raise ValueError(f"{wrong[0]} is {str(manifest['ttt'][wrong[0]])[:40]!r}")
        return TTTConfig(**manifest["ttt"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}/manifest.json: its ttt settings cannot be used ({error}); restore the file, or the project's version "
                        "that wrote it") from error


def check_sizes(file, sizes: dict[str, int], base: str, parameters: int, path: str) -> None:
    """UserError, before anything is read or built, where an open file claims more numbers than an adapter of its base, of `parameters` numbers, can have, or where one of
    the settings' sizes, each a dimension of some tensor, is beyond the file's widest one."""
    shapes = [file.get_slice(name).get_shape() for name in file.keys()]
    numbers, widest = sum(map(math.prod, shapes)), max((max(shape, default=0) for shape in shapes), default=0)
    if numbers > MOST_NUMBERS * (parameters + 2 ** 20):
        raise UserError(f"{path}: claims {numbers} numbers, more than any adapter of {base} has; do not use it")
    for name, size in sizes.items():
        if size > widest:
            raise UserError(f"{path}: does not fit its manifest ({name} is {size}, and no tensor is as wide)")


def check_vouched(folder, names) -> None:
    """UserError where a file that is about to be read is not among those whose hash the manifest keeps."""
    vouched = parse_files(Path(folder) / "manifest.json", MEND)["files"]
    for name in names:
        if name not in vouched:
            raise UserError(f"{folder}/manifest.json: keeps no SHA-256 of {name}, so it is not read; {MEND}")


def too_large(tensors: dict[str, torch.Tensor]) -> str | None:
    """The name of the first tensor with a value that a checkpoint's float16 cannot hold, NaN among them; None where all fit."""
    return next((name for name, t in tensors.items() if not t.detach().to(torch.float16).isfinite().all()), None)
