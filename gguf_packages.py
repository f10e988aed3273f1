"""Pretrained weights out of installed packages: a GGUF is joined, checked, dequantised once and kept as safetensors."""
from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from manifests import UserError, check_files, file_sha256, parse_files, write_manifest


@dataclass(frozen=True)
class GGUF:
    """A GGUF that ships inside installed packages, in one or several parts."""

    parts: tuple[str, ...]            # "package/path inside it", in order
    sha256: str                       # of the joined file
    install: str                      # what to type when a package is missing
    canary: tuple[int, ...]           # token ids of "The capital of France is": a wrong tokenizer is caught at conversion
    untied_head: bool = False         # the file stores the tied matrix twice; the head is the better copy


def part_path(part: str) -> Path | None:
    """Where an installed package keeps a part; None when the package or the file is missing. The package is not imported."""
    package, _, inside = part.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / inside
    return path if path.is_file() else None


def missing_packages(gguf: GGUF) -> list[str]:
    return [part.partition("/")[0] for part in gguf.parts if part_path(part) is None]


def cache_dir() -> Path:
    """Where converted models are kept: $TTT_CACHE, or ttt-conv-memory under the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ttt-conv-memory"
    return Path(os.environ.get("TTT_CACHE", default))


def converted_path(name: str, gguf: GGUF) -> Path:
    return cache_dir() / f"{name}-{gguf.sha256[:12]}"


def is_converted(name: str, gguf: GGUF) -> bool:
    """Whether a conversion is kept with the hashes of its files; one that an earlier version left without them is made again."""
    return (converted_path(name, gguf) / "manifest.json").is_file()


def available(name: str, gguf: GGUF) -> bool:
    """Whether this machine holds the weights: converted before, or in installed packages."""
    return is_converted(name, gguf) or not missing_packages(gguf)


def converted_folder(name: str, gguf: GGUF) -> Path:
    """The safetensors folder of a packaged GGUF, made on the first call (under a minute) and then only checked against its hashes."""
    folder = converted_path(name, gguf)
    if is_converted(name, gguf):
        mend = f"remove {folder}, and it is made again"
        check_files(folder, folder / "manifest.json", parse_files(folder / "manifest.json", mend)["files"], mend)
        return folder
    print(f"{name}: converting its GGUF once into {folder}", file=sys.stderr)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="converting-") as temporary:
            convert_gguf(name, gguf, Path(temporary))
            done = Path(temporary) / "model"
            write_manifest(done, {"gguf_sha256": gguf.sha256}, sorted(path.name for path in done.iterdir()))
            if not is_converted(name, gguf):  # another process may have been faster; its folder is the same
                if folder.exists():
                    os.replace(folder, Path(temporary) / "without-hashes")
                os.replace(done, folder)
    except OSError as error:
        raise UserError(f"{folder.parent}: cannot keep the converted {name} there ({error.strerror or error}); "
                        f"free about 1 GB or point TTT_CACHE at another disk") from error
    return folder


def convert_gguf(name: str, gguf: GGUF, work: Path) -> None:
    """Join the parts, check the hash, dequantise, check the tokenizer, and save model and tokenizer in work/model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # only a conversion needs so recent a version
    joined = work / "joined.gguf"
    with joined.open("wb") as out:
        for part in gguf.parts:
            with part_path(part).open("rb") as source:
                shutil.copyfileobj(source, out, 1 << 24)
    if file_sha256(joined) != gguf.sha256:
        raise UserError(f"{name}: the packaged GGUF does not have its SHA-256; reinstall: {gguf.install}")
    model = AutoModelForCausalLM.from_pretrained(work, gguf_file=joined.name, dtype=torch.bfloat16,
                                                 quantization_config=GgufConfig(dequantize=True))
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=joined.name)
    ids = tuple(tokenizer("The capital of France is").input_ids)
    if ids != gguf.canary:
        raise UserError(f"{name}: this transformers reads the GGUF's tokenizer wrongly ({list(ids)}); install requirements.txt")
    if gguf.untied_head:
        model.get_input_embeddings().weight = model.lm_head.weight
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
