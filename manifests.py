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
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path


MEND = "restore the file or train again"  # of a checkpoint


class UserError(Exception):
    """Something the caller can mend; the message is one line that names it. Scripts print it and exit with 2.

    What a file says may be in it: anything that is not printable becomes a question mark, so that no file writes a line of its own.
    """

    def __init__(self, message: str):
        super().__init__("".join(char if char.isprintable() else "?" for char in message))


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


def chosen(option: str, text: str, known) -> list[str]:
    """The names in a comma-separated option, each once; UserError for one that is not among the known."""
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            raise UserError(f"{option} {name}: unknown; use some of {','.join(known)}")
    return names


def file_sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path, value) -> None:
    """JSON without NaN, written to a temporary name and moved into place."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def naming(path):
    """Give an OSError that names no file this one: writing into an open file says only that the disk is full."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def replacing(path):
    """Yields a temporary name to write to, which becomes the file when all went well and is removed when not."""
    part = Path(f"{path}.part")
    try:
        with naming(path):
            yield part
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def put_back(file, path: Path) -> None:
    """UserError where an open file (mode a+b) is no longer the one at its path; where nothing is there, what was written is put back first."""
    if path.exists():
        if os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return
        raise UserError(f"{path}: was replaced while it was written; nothing more is written: restore the file, then go on with --resume")
    file.seek(0)
    kept = file.read()
    with replacing(path) as part:
        part.write_bytes(kept)
    raise UserError(f"{path}: was removed while it was written; what it held is put back: go on with --resume")


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


def utc(seconds: float) -> str:
    """A moment, in seconds since the epoch, as every manifest writes it."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def cost_usd(seconds: float) -> float | None:
    """What so many seconds of this machine cost by $TTT_USD_PER_SECOND, which stages.py sets on Modal and anybody may elsewhere; None without it."""
    rate = os.environ.get("TTT_USD_PER_SECOND")
    if not rate:
        return None
    try:
        cost = seconds * float(rate)
    except ValueError:
        raise UserError(f"TTT_USD_PER_SECOND={rate}: no number; give USD a second, such as 0.0003, or unset it") from None
    return round(cost, 6)


def write_manifest(folder: Path, manifest: dict, files: list[str]) -> None:
    manifest = manifest | {"files": {name: file_sha256(folder / name) for name in files}}
    write_json(folder / "manifest.json", manifest)


def read_manifest(folder) -> dict:
    """A checkpoint's manifest, with every file it lists checked against its SHA-256; UserError names what is wrong."""
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise UserError(f"{folder}: no trained adapter there (manifest.json is missing); train one with train_minimal.py")
    manifest = parse_files(path, MEND)
    check_files(folder, path, manifest["files"], MEND)
    return manifest


def parse_files(path: Path, mend: str) -> dict:
    """A JSON object with "files", an object of names and hashes; UserError where it is none."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(sha, str) for sha in manifest["files"].values()):
            raise ValueError("a hash in files is no text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a manifest ({type(error).__name__}: {error}); {mend}") from error
    return manifest


def check_files(folder: Path, path: Path, files: dict[str, str], mend: str) -> None:
    """Hold a folder's files to {name: SHA-256}, which `path` lists; UserError names the first that is none of the folder's, missing or changed."""
    for name, sha in files.items():
        if name.startswith("/") or "\0" in name or ".." in Path(name).parts or not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path}: names the file {ascii(name)[:80]}, which is not in its folder; do not use this adapter")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing, though {path.name} lists it; {mend}")
        if file_sha256(folder / name) != sha:
            raise UserError(f"{folder / name}: cut short or changed (its SHA-256 is not the manifest's); {mend}")
