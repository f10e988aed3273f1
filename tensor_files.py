"""Safetensors files written whole or not at all."""
from __future__ import annotations

import os
import re

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from manifests import replacing


def save_tensors(tensors: dict[str, torch.Tensor], path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors and metadata to a temporary name and move the file into place.

    Raises OSError with the file's name where the disk refuses: the library has an error of its own for that, with the system's number in its text.
    """
    with replacing(path) as part:
        try:
            save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, str(part), metadata)
        except SafetensorError as error:
            refused = re.search(r"\(os error (\d+)\)", str(error))
            if refused is None:
                raise
            number = int(refused[1])
            raise OSError(number, os.strerror(number), str(path)) from error
