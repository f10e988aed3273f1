"""What one training update sees, as tokens: a batch is a pure function of (seed, update), whatever the number of workers."""
from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import prompts
import training_bank
from manifests import UserError, file_sha256

IGNORE = -100           # label of a position that carries no loss
PROSE_EVERY = 4         # every fourth update writes unrelated prose along with the conversation
PROSE_MOST = 4          # passages, at most
NO_ROBOTS = "HuggingFaceH4/no_robots"


@dataclass(frozen=True)
class Example:
    """One conversation as tokens: `written` on its own, `prefix` + (question, answer) pairs as the prompt."""

    written: list[int]
    prefix: list[int]
    pairs: list[tuple[list[int], list[int]]]


class BankDataset(Dataset):
    """Item u: the Examples of update u, drawn from the training bank.

    shown: whether the prompt shows the conversation (A_tuned) or only asks about it (the memory arms).
    """

    def __init__(self, tokenizer, langs, updates: int, conversations: int, probes: int, seed: int, shown: bool):
        self.tokenizer, self.langs, self.updates = tokenizer, langs, updates
        self.conversations, self.probes, self.seed, self.shown = conversations, probes, seed, shown

    def __len__(self) -> int:
        return self.updates

    def __getitem__(self, update: int) -> list[Example]:
        rng = random.Random(f"{self.seed}/{update}")
        prose = rng.randint(1, PROSE_MOST) if update % PROSE_EVERY == PROSE_EVERY - 1 else 0
        return [self.example(rng, self.langs[i % len(self.langs)], prose) for i in range(self.conversations)]

    def example(self, rng: random.Random, lang: str, prose: int) -> Example:
        sample = training_bank.sample_conversation(rng, lang, "train", n_prose=prose)
        chosen = rng.sample(sample["probes"], min(self.probes, len(sample["probes"])))
        pairs = [(prompts.tail_ids(self.tokenizer, lang, p["question"]),
                  prompts.answer_ids(self.tokenizer, lang, p["gold_answer"])) for p in chosen]
        prefix = prompts.head_ids(self.tokenizer, lang, with_text=self.shown)
        if self.shown:
            prefix = prefix + prompts.encode(self.tokenizer, sample["conversation"])
        return Example(prompts.written_ids(self.tokenizer, sample["conversation"]), prefix, pairs)


class TextDataset(Dataset):
    """Item u: `conversations` token rows of at most `length` tokens for the next-token objective, in a seeded order."""

    def __init__(self, tokenizer, texts: list[str], updates: int, conversations: int, length: int, seed: int):
        self.tokenizer, self.texts, self.updates = tokenizer, texts, updates
        self.conversations, self.length, self.seed = conversations, length, seed

    def __len__(self) -> int:
        return self.updates

    def __getitem__(self, update: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed}/{update}")
        chosen = [rng.choice(self.texts) for _ in range(self.conversations)]
        return [prompts.written_ids(self.tokenizer, text)[:self.length] for text in chosen]


class BankTexts:
    """The bank's conversations as plain texts, made when they are asked for; takes the place of a list of texts."""

    def __init__(self, langs):
        self.langs = langs

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> str:
        rng = random.Random(f"text/{index}")
        return training_bank.sample_conversation(rng, self.langs[index % len(self.langs)], "train")["conversation"]


def load_texts(source: str, langs) -> tuple[object, str]:
    """Texts for the next-token objective and a hash of them.

    source: "bank", "no_robots" (from the hub), or a local .txt (texts between blank lines) or .jsonl file ("text" per line).
    """
    if source == "bank":
        return BankTexts(langs), training_bank.bank_sha256()
    if source == "no_robots":
        return no_robots()
    path = Path(source)
    if not path.is_file():
        raise UserError(f"--data {source}: no such file; give a .txt or .jsonl file, bank, or no_robots")
    if path.suffix == ".jsonl":
        texts = [jsonl_text(line, path, number) for number, line in enumerate(read_utf8(path).split("\n"), 1) if line.strip()]
    else:
        texts = [part.strip() for part in read_utf8(path).split("\n\n") if part.strip()]
    if not texts:
        raise UserError(f"--data {source}: holds no text; a .txt file has texts between blank lines, a .jsonl file one \"text\" a line")
    return texts, file_sha256(path)


def read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error


def jsonl_text(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--data {path}, line {number}: no object with a \"text\" field ({type(error).__name__}); mend that line") from error
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"--data {path}, line {number}: \"text\" is not a text; mend that line")
    return text


def no_robots() -> tuple[list[str], str]:
    """The public attempt's corpus: each dialogue as "role: content" lines."""
    from datasets import load_dataset
    try:
        rows = load_dataset(NO_ROBOTS, split="train")
    except Exception as error:  # offline, proxy, gated: the mend is the same
        raise UserError(f"--data no_robots: {NO_ROBOTS} cannot be had ({type(error).__name__}); use --data bank or a local file") from error
    texts = ["\n".join(f"{turn['role']}: {turn['content']}" for turn in row["messages"]) for row in rows]
    return texts, f"{NO_ROBOTS} {rows._fingerprint}"


def batches(dataset: Dataset, workers: int, start: int = 0):
    """The dataset's items in order, made ahead by worker processes."""
    rest = torch.utils.data.Subset(dataset, range(start, len(dataset)))
    return DataLoader(rest, batch_size=None, num_workers=workers, collate_fn=None, prefetch_factor=4 if workers else None)


@dataclass(frozen=True)
class Packed:
    """Prompts with all their questions in one row each: ids, positions [B, T], mask [B, T, T], labels [B, T]."""

    ids: torch.Tensor
    position: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def pack(examples: list[Example], pad_id: int, device) -> Packed:
    """Lay each example out as prefix, question 1, answer 1, question 2, ... in one row.

    Every question sees the prefix and itself only, and counts its positions from the prefix's end, so the row is the same
    arithmetic as one prompt per question; a memory then serves one row instead of one copy per question.
    """
    rows = [pack_row(example) for example in examples]
    width = max(len(ids) for ids, *_ in rows)
    column = lambda k, fill: torch.tensor([row[k] + [fill] * (width - len(row[k])) for row in rows], device=device)
    ids, labels, segment, position = column(0, pad_id), column(1, IGNORE), column(2, -1), column(3, 0)
    same = segment[:, :, None] == segment[:, None, :]
    order = torch.arange(width, device=device)
    mask = (same | (segment[:, None, :] == 0)) & (order[:, None] >= order[None, :])
    return Packed(ids, position, mask, labels)


def pack_row(example: Example):
    """(ids, labels, segment, position) of one row; labels stand where the answer is, segment 0 is the prefix."""
    ids, labels = list(example.prefix), [IGNORE] * len(example.prefix)
    segment, position = [0] * len(ids), list(range(len(ids)))
    for number, (question, answer) in enumerate(example.pairs, 1):
        ids += question + answer
        labels += [IGNORE] * len(question) + answer
        segment += [number] * (len(question) + len(answer))
        position += range(len(example.prefix), len(example.prefix) + len(question) + len(answer))
    return ids, labels, segment, position
