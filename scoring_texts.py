"""Texts to score: documents, the bytes that each token stands for, and texts that come with what is installed anyway.

A document is scored on its own: nothing that was learned from one document is known in the next.
"""
from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import decoders
from transformers.convert_slow_tokenizer import bytes_to_unicode

import benchmark_file
import prompts
from manifests import UserError

BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")       # how a byte that is in no other token is written in such vocabularies
NO_PROSE = (">>>", "...", ".. plot", "===", "|")    # how lines of examples, figures and tables begin
SHORTEST = 2000                                     # bytes of a module's prose; less is no document


@dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclass(frozen=True)
class Tokens:
    """A document's tokens, and how many UTF-8 bytes each stands for; together all bytes of its text, once."""

    name: str
    ids: list[int]
    nbytes: list[int]


@dataclass(frozen=True)
class Builtin:
    make: object          # () -> list[Document]
    sha256: str           # of the documents, as digest_of gives it
    licence: str
    says: str


def digest_of(documents: list[Document]) -> str:
    """SHA-256 over names and texts, each with its length."""
    sha = hashlib.sha256()
    for part in (part for document in documents for part in (document.name, document.text)):
        data = part.encode("utf-8")
        sha.update(f"{len(data)}\n".encode() + data)
    return sha.hexdigest()


# ---- texts that are there ----

def docstrings(source: bytes) -> list[str]:
    """Of a module, its classes and functions, breadth first."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)))
    return [text for text in map(ast.get_docstring, nodes) if text]


def prose(docstring: str) -> str:
    """Its paragraphs without those that hold examples, figures or tables."""
    paragraphs = re.split(r"\n\s*\n", docstring)
    return "\n\n".join(p for p in paragraphs if not any(line.lstrip().startswith(NO_PROSE) for line in p.split("\n")))


def documentation(package: str, under: str = "", seen: set[str] | None = None) -> list[Document]:
    """The docstrings' prose of an installed package (or of what is under a folder of it): a document a module, a docstring that stands in several modules
    in the first of them alone. seen: docstrings that stood elsewhere before."""
    root, seen, documents = Path(importlib.util.find_spec(package).submodule_search_locations[0]), set() if seen is None else seen, []
    for path in sorted((root / under).rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if "tests" in path.relative_to(root).parts:
            continue
        new = [text for text in dict.fromkeys(docstrings(path.read_bytes())) if text not in seen]
        seen.update(new)
        text = "\n\n".join(map(prose, new))
        if len(text.encode("utf-8")) >= SHORTEST:
            documents.append(Document(path.relative_to(root).as_posix(), text))
    return documents


DOCUMENTED = {"numpy": [""], "matplotlib": [""], "transformers": ["generation"], "torch": ["nn", "optim", "distributions", "utils", "distributed"], "datasets": [""], "peft": [""],
              "accelerate": [""], "modal": [""]}  # package: its folders


def package_docs() -> list[Document]:
    """The documentation of packages that this project needs anyway, without SciPy's, which is scored."""
    seen: set[str] = set()
    return [Document(f"{package}/{document.name}", document.text) for package, folders in DOCUMENTED.items()
            for under in folders for document in documentation(package, under, seen)]


def distractors() -> list[Document]:
    """The benchmark's unrelated prose: the English texts that follow its level-3 conversations."""
    samples = benchmark_file.load_benchmark(Path(__file__).parent / "benchmark_v1.json")["samples"]
    return [Document(s["sample_id"], s["distractor"]) for s in samples if s["lang"] == "en" and s["distractor"]]


BUILTIN = {
    "scipy-stats": Builtin(lambda: documentation("scipy", "stats"), "95e4c320f22dca400999154708ba9aeb8c3d4487bc8632dc64dcb97b986998e8", "BSD-3-Clause (SciPy developers)", "the documentation of scipy.stats 1.17.1, a reference manual"),
    "package-docs": Builtin(package_docs, "5a551e96a7f786f788947cfcd5feff6f9b815fa81d972d4b41dccb2003b14294", "BSD-3-Clause, Apache-2.0 and Matplotlib's, of their authors",
                            "the documentation of packages in requirements.txt, without SciPy's: for training (--data) what scipy-stats scores"),
    "distractors": Builtin(distractors, "1f955a9742dee073ce0fdd2a309b7a4de38eab164b9817a63dbee26214767a18", "MIT, as this project", "the prose of benchmark_v1.json that has nothing to do with its conversations"),
}


def builtin_text(name: str, option: str = "--text") -> list[Document]:
    """A text that comes with what is installed; UserError unless it is, byte for byte, the one that was scored before."""
    found = BUILTIN[name].make()
    if digest_of(found) != BUILTIN[name].sha256:
        raise UserError(f"{option} {name}: what is installed gives another text (SHA-256 {digest_of(found)[:12]}, not {BUILTIN[name].sha256[:12]}): {BUILTIN[name].says}; "
                        "install the versions of requirements.txt, or take the file that score_lm.py --save-text writes where they are")
    return found


# ---- files ----

def read_documents(name: str, separator: str | None = None) -> list[Document]:
    """A builtin text, a .jsonl file ({"text": ..., "name": ...} or a plain string a line), or a text file, cut at the separator if one is given."""
    if name in BUILTIN:
        return builtin_text(name)
    path = Path(name)
    try:
        text = path.read_bytes().decode("utf-8")  # bytes, so that line ends stay as they are
    except FileNotFoundError as error:
        raise UserError(f"--text {name}: no such file, nor one of {', '.join(BUILTIN)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--text {name}: not UTF-8 (byte {error.start}); write the file in UTF-8") from error
    if path.suffix == ".jsonl":
        documents = [of_line(line, f"{name} line {number}", number) for number, line in enumerate(text.split("\n"), 1) if line]
    else:
        documents = [Document(f"{path.name}-{number}", part) for number, part in enumerate(text.split(separator) if separator else [text], 1)]
    documents = [document for document in documents if document.text]
    if not documents:
        raise UserError(f"--text {name}: holds no text; name another file")
    return documents


def of_line(line: str, where: str, number: int) -> Document:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--text {where}: not JSON ({error}); write one document a line") from error
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UserError(f"--text {where}: field 'text' is missing or no text; write {{\"text\": \"...\"}} or a plain string")
    return Document(str(value.get("name", f"line-{number}")) if isinstance(value, dict) else f"line-{number}", text)


def cut(text: str, most: int) -> str:
    """The longest beginning of at most so many bytes that ends with a whole character."""
    return text.encode("utf-8")[:most].decode("utf-8", errors="ignore")


def prefix(documents: list[Document], each: int | None = None, whole: int | None = None) -> list[Document]:
    """The first `each` bytes of every document, and of all that the first `whole` bytes."""
    documents, left = [Document(d.name, cut(d.text, each) if each else d.text) for d in documents], whole
    if whole is None:
        return documents
    kept = []
    for document in documents:
        text = cut(document.text, left)
        left -= len(text.encode("utf-8"))
        kept += [Document(document.name, text)] if text else []
        if text != document.text:
            break
    return kept


# ---- tokens and bytes ----

def token_bytes(tokenizer, ids: list[int]) -> list[bytes]:
    """What each token stands for, as bytes: byte-level vocabularies, or pieces with U+2581 for a space and <0x0A> for a byte of its own."""
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    byte_level = isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)

    def of(i: int, piece: str) -> bytes:
        if i in added:
            return added[i].encode("utf-8")
        if byte_level:
            return bytes(BYTE_OF[char] for char in piece)
        single = BYTE_PIECE.fullmatch(piece)
        return bytes([int(single[1], 16)]) if single else piece.replace("\u2581", " ").encode("utf-8")

    return [of(i, piece) for i, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids))]


def tokenise(tokenizer, document: Document) -> Tokens:
    """A document's tokens, without any that the tokenizer would add; UserError where they do not stand for exactly its bytes."""
    ids = prompts.encode(tokenizer, document.text)
    parts = token_bytes(tokenizer, ids)
    if b"".join(parts) != document.text.encode("utf-8"):
        raise UserError(f"--text: the tokens of document {document.name} do not stand for exactly its bytes, so bits per byte would be of another text; "
                        "write it as the tokenizer keeps it (Unicode form NFC, for one)")
    return Tokens(document.name, ids, [len(part) for part in parts])
