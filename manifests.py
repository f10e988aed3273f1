"""What every script leaves beside its results: hashes, JSON written whole, provenance, and one-line errors."""
from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path


class UserError(Exception):
    """Something the caller can mend; the message is one line that names it. Scripts print it and exit with 2."""


def run_script(main) -> None:
    """Run a script's main(); a UserError, or a path or disk that refuses, becomes one line on stderr and exit code 2. SIGTERM is taken as Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler that ends a job wants its state kept, as a person does
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno is None:  # no word of the operating system: a library's own error, and a defect here
            raise
        print(f"{Path(sys.argv[0]).name}: {error.filename or 'writing'}: {error.strerror}; "
              "choose another path, or mend its permissions or the free space", file=sys.stderr)
        sys.exit(2)


def file_sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path, value) -> None:
    """JSON without NaN, written to a temporary name and moved into place."""
    part = Path(str(path) + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def current_commit() -> str:
    """The checkout's commit, "-dirty" when files differ; $TTT_COMMIT where the tree travels without its .git."""
    if "TTT_COMMIT" in os.environ:
        return os.environ["TTT_COMMIT"]
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True).stdout
    return head.stdout.strip() + ("-dirty" if changed.strip() else "")


def provenance() -> dict:
    """What every manifest carries: commit, command, versions."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # torchrun's
    start = ["python"] if processes == "1" else ["torchrun", "--standalone", "--nproc-per-node", processes]
    return {"commit": current_commit(), "command": " ".join([*start, Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": {"python": sys.version.split()[0]} | {p: importlib.metadata.version(p) for p in packages}}


def write_manifest(folder: Path, manifest: dict, files: list[str]) -> None:
    manifest = manifest | {"files": {name: file_sha256(folder / name) for name in files}}
    write_json(folder / "manifest.json", manifest)


def read_manifest(folder) -> dict:
    """A checkpoint's manifest, with every file it lists checked against its SHA-256; UserError names what is wrong."""
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder}: no trained adapter there (manifest.json is missing); train one with train_minimal.py")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a manifest ({type(error).__name__}: {error}); train again or restore the file") from error
    for name, sha in files.items():
        if name.startswith("/") or "\0" in name or ".." in Path(name).parts or not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path}: names the file {ascii(name)[:80]}, which is not in its folder; do not use this adapter")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing, though manifest.json lists it; restore the file or train again")
        if file_sha256(folder / name) != sha:
            raise UserError(f"{folder / name}: cut short or changed (its SHA-256 is not the manifest's); restore the file")
    return manifest
