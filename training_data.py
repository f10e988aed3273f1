"""What one training update sees, as tokens: a batch is a pure function of (seed, update), whatever the number of workers."""
from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import prompts
import training_bank
from hub_files import limit_waiting
from manifests import UserError, file_sha256
from scoring_texts import BUILTIN, builtin_text

IGNORE = -100           # label of a position that carries no loss
NOWHERE = -1            # address of an answer token that stands nowhere in the text (the line break that ends the answer)
PROSE_TOKENS = (80, 280)    # a row of unrelated prose beside the conversations of a merged memory
CALM_EVERY = 8          # every eighth update reads unrelated prose with a memory attached
CALM_TOKENS = 48        # a row of unrelated prose that is read with a memory attached
FOREIGN_EVERY = 4       # every fourth update asks about conversations that nobody wrote
FOREIGN_SHARE = 8       # one such row for so many conversations
FOREIGN_PROBES = 4      # questions of such a row
FOREIGN_FACTS = (3, 6)  # facts of its conversation: with its text in the prompt it then is no longer than the other rows of the forward
ALONE = 32              # updates at the start with the least group: the gates learn first what to leave out
ALIKE = 0.5             # share of shared memories whose conversations are about the same topics
PROSE_EVERY = 4         # every fourth update writes unrelated prose along with the conversation, and half as many of these longer rows
PROSE_MOST = 2          # passages, at most
BETWEEN = "\n\n"       # texts that are joined to one row


@dataclass(frozen=True)
class Corpus:
    """A data set of the Hub: its rows at a revision (the hash of the texts goes into the manifest) and the text of one."""

    name: str
    split: str
    revision: str
    text: Callable[[dict], str]


# TinyStories has two million texts in its train split; a small arm sees a few thousand
CORPORA = {"tinystories": Corpus("roneneldan/TinyStories", "train[:100000]", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64", lambda row: row["text"]),
           "longalpaca": Corpus("Yukang/LongAlpaca-12k", "train", "46dce924ed8786979556018e191c0f557d8f4aa2", lambda row: f"{row['instruction']}\n{row['output']}"),
           "no_robots": Corpus("HuggingFaceH4/no_robots", "train", "e6f9a4ac5c37faeb744ba9ecf0473184d7f8105b",  # as the public attempt has it: "role: content" lines
                               lambda row: "\n".join(f"{turn['role']}: {turn['content']}" for turn in row["messages"]))}


@dataclass(frozen=True)
class Example:
    """One conversation as tokens: `written` on its own, `prefix` + (question, answer) pairs as the prompt."""

    written: list[int]
    prefix: list[int]
    pairs: list[tuple[list[int], list[int]]]
    worth: list[int] = ()              # 1 for every written token whose next token belongs to a fact's value, else 0
    addresses: list[list[int]] = ()    # for every answer token of every pair the written token that stands before it in its fact

    @property
    def prompt_tokens(self) -> int:
        return len(self.prefix) + sum(len(question) + len(answer) for question, answer in self.pairs)


@dataclass(frozen=True)
class Batch:
    """One update: the Examples, how many neighbouring ones share a memory, and what the memories are not to touch.

    calm: rows of unrelated prose, an answer to their first token; row i is read with memory i. foreign: prompts about conversations that nobody wrote, on the
    topics of what is in the memory, every second one with the text in the prompt; row i is asked with memory i.
    """

    examples: list[Example]
    group: int = 1
    calm: list[Example] = ()
    foreign: list[Example] = ()


class BankDataset(Dataset):
    """Item u: the Batch of update u, drawn from the training bank.

    shown: whether the prompt shows the conversation (A_tuned) or only asks about it (the memory arms).
    groups: sizes of memory to draw from, each update its own (the first ones the least): so many neighbouring rows are written into
    one memory. In groups of two and more, unrelated prose takes the place of one conversation in every second group of each language.
    calm: whether every eighth update also brings prose to be read with a memory attached. foreign: whether every fourth one brings
    questions about conversations that are not in memory.
    length: tokens of a conversation, filled up with passages of prose as far as whole ones go (all updates are then alike); UserError for one that is longer by
    itself. None: as it is.
    """

    def __init__(self, tokenizer, langs, updates: int, conversations: int, probes: int, seed: int, shown: bool, groups=(1,), calm=False, foreign=False,
                 length: int | None = None):
        self.tokenizer, self.langs, self.updates, self.groups, self.calm, self.foreign = tokenizer, langs, updates, tuple(groups), calm, foreign
        self.conversations, self.probes, self.seed, self.shown, self.length = conversations, probes, seed, shown, length

    def __len__(self) -> int:
        return self.updates

    def shape(self, update: int) -> tuple[random.Random, int | None, int, int]:
        """(the update's generator, passages of prose in a row (None: as many as fit), rows in a memory, memories)."""
        rng = random.Random(f"{self.seed}/{update}")
        prose = rng.randint(1, PROSE_MOST) if update % PROSE_EVERY == PROSE_EVERY - 1 else 0
        group = rng.choice(self.groups) if update >= ALONE else min(self.groups)
        memories = self.conversations // group
        if self.length is not None:
            return rng, None, group, memories
        return rng, prose, group, max(1, memories // 2) if prose else memories

    def seen(self, first: int, end: int) -> int:
        """Rows in the updates from first to before end."""
        return sum(group * memories for _, _, group, memories in map(self.shape, range(first, end)))

    def __getitem__(self, update: int) -> Batch:
        rng, prose, group, memories = self.shape(update)
        langs = [self.langs[number % len(self.langs)] for number in range(memories)]
        topics = [training_bank.draw_topics(rng, lang) if rng.random() < ALIKE else None for lang in langs]
        examples = [self.example(rng, langs[i // group], self.shown, prose, topics[i // group]) for i in range(group * memories)]
        if group > 1:
            for number in range(memories):
                if number // len(self.langs) % 2 == 0:
                    examples[number * group + rng.randrange(group)] = self.prose(rng, langs[number])
        calm, foreign = [], []
        if self.calm and update % CALM_EVERY == 0:
            rows = [self.passage(rng, lang, CALM_TOKENS) for lang in langs[:max(1, len(examples) // 4)]]
            calm = [Example([], [], [(row[:1], row[1:])]) for row in rows]
        if self.foreign and update % FOREIGN_EVERY == 0:
            rows = min(memories, max(1, len(examples) // FOREIGN_SHARE))
            foreign = [self.example(rng, langs[i], i // len(self.langs) % 2 == 0, 0, topics[i], FOREIGN_PROBES, rng.randint(*FOREIGN_FACTS))
                       for i in range(rows)]
        return Batch(examples, group, calm, foreign)

    def example(self, rng: random.Random, lang: str, shown: bool, prose: int | None, topics, probes: int | None = None, facts: int | None = None) -> Example:
        sample, (head, tail) = self.draw(rng, lang, prose, topics, facts), self.prompt(lang, shown)
        chosen = rng.sample(sample["probes"], min(probes or self.probes, len(sample["probes"])))
        pairs = [(tail(p["question"]), prompts.answer_ids(self.tokenizer, lang, p["gold_answer"])) for p in chosen]
        if shown:
            return Example([], head + self.held(prompts.encode(self.tokenizer, sample["conversation"])), pairs)
        places = Places(self.tokenizer, lang, sample)
        return Example(self.held(places.ids), head, pairs, places.worth(), [places.addresses(probe) for probe in chosen])

    def draw(self, rng: random.Random, lang: str, prose: int | None, topics, facts: int | None) -> dict:
        """A text, its facts and what it may be asked (facts: how many, where the text is to be a short one)."""
        return self.filled(rng, lang, topics) if prose is None else training_bank.sample_conversation(rng, lang, "train", facts, prose, topics)

    def prompt(self, lang: str, shown: bool) -> tuple[list[int], Callable[[str], list[int]]]:
        """(tokens that stand before a question, or before the text where it is shown; a question's tokens)."""
        return prompts.head_ids(self.tokenizer, lang, with_text=shown), lambda question: prompts.tail_ids(self.tokenizer, lang, question)

    def filled(self, rng: random.Random, lang: str, topics) -> dict:
        """A conversation with as many whole passages as `length` tokens hold, drawn anew until it fits; without any where it is longer by itself."""
        passages = min(len(training_bank.passages(lang)), self.length // passage_tokens(self.tokenizer, lang))
        while True:
            sample = training_bank.sample_conversation(rng, lang, "train", None, passages, topics)
            if not passages or len(prompts.written_ids(self.tokenizer, sample["conversation"])) <= self.length:
                return sample
            passages -= 1

    def held(self, ids: list[int]) -> list[int]:
        """A text's tokens; UserError for more than `length`."""
        if self.length is not None and len(ids) > self.length:
            raise UserError(f"--length {self.length}: a conversation has {len(ids)} tokens by itself, and others may have more; give a longer one, "
                            "or leave --length out")
        return ids

    def prose(self, rng: random.Random, lang: str) -> Example:
        """A row that is written and asked nothing."""
        ids = self.passage(rng, lang, rng.randint(*PROSE_TOKENS))
        return Example(ids, prompts.head_ids(self.tokenizer, lang, with_text=False), [], [0] * len(ids), [])

    def passage(self, rng: random.Random, lang: str, tokens: int) -> list[int]:
        """A stretch of unrelated prose of at most so many tokens, from anywhere in a passage or two."""
        texts = rng.sample(training_bank.passages(lang), 2)
        ids = prompts.encode(self.tokenizer, "\n\n".join(texts))
        start = rng.randrange(max(1, len(ids) - tokens))
        return prompts.start_ids(self.tokenizer) + ids[start:start + tokens]


@functools.lru_cache(maxsize=8)
def passage_tokens(tokenizer, lang: str) -> int:
    """Tokens of a passage of prose, in the mean."""
    passages = training_bank.passages(lang)
    return sum(len(prompts.encode(tokenizer, text)) for text in passages) // len(passages)


COMMA = ", "  # between the values of an answer that names several


def named(probe: dict) -> list[tuple[object, str]]:
    """(fact, value) of each value that a probe's answer names: its last fact's, or where it has `values`, one of each fact, joined by COMMA."""
    return list(zip(probe["required_facts"], probe["values"])) if "values" in probe else [(probe["required_facts"][-1], probe["gold_answer"])]


class Places:
    """Where a bank conversation's values stand among its tokens."""

    def __init__(self, tokenizer, lang: str, sample: dict):
        self.tokenizer, self.lang = tokenizer, lang
        self.start, self.text = prompts.start_ids(tokenizer), sample["conversation"]
        coded = tokenizer(sample["conversation"], add_special_tokens=False, return_offsets_mapping=True)
        self.ids, self.offsets = self.start + coded.input_ids, coded.offset_mapping
        values = {fact: value for p in sample["probes"] if len(p["required_facts"]) == len(named(p)) for fact, value in named(p)}
        self.stretch = {}  # fact: [first, last] character of its value
        for fact in sample["facts"]:
            begin, end = fact["span"]
            at = sample["conversation"][begin:end].casefold().rfind(values[fact["fact_id"]].casefold())
            if at >= 0:
                self.stretch[fact["fact_id"]] = (begin + at, begin + at + len(values[fact["fact_id"]]) - 1)

    def token_at(self, character: int) -> int:
        """The first token that holds a character of the conversation (a rare character takes several)."""
        return len(self.start) + next(i for i, (_, end) in enumerate(self.offsets) if end > character)

    def last_token_at(self, character: int) -> int:
        return len(self.start) + max(i for i, (begin, _) in enumerate(self.offsets) if begin <= character)

    def first_token(self, character: int) -> int:
        """The token at which a value begins: the space before it, where that is a token of its own as in an answer."""
        token, before = self.token_at(character), (character - 1, character)
        spaced = before in self.offsets and self.text[character - 1] == " "
        return token - 1 if spaced else token

    def worth(self) -> list[int]:
        marks = [0] * len(self.ids)
        for first, last in self.stretch.values():
            for i in range(self.first_token(first), self.last_token_at(last) + 1):
                if i:
                    marks[i - 1] = 1
        return marks

    def addresses(self, probe: dict) -> list[int]:
        """For each token of the answer, the written token before the one that is the same; NOWHERE for what is in no value, IGNORE
        where a value is not found in its fact's own words or its tokens are others there (a capital, another cut)."""
        text = prompts.FORMS[self.lang].answer.format(answer=probe["gold_answer"])
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = coded.offset_mapping
        begun, values = len(text) - len(text.lstrip()), []  # values: (first character in the answer, behind its last, first character in the text)
        for fact, value in named(probe):
            if fact not in self.stretch:
                return [IGNORE] * len(offsets)
            values.append((begun, begun + len(value), self.stretch[fact][0]))
            begun += len(value) + len(COMMA)
        places, number = [], -1
        for token, (begin, _) in enumerate(offsets):
            following = number + 1 < len(values) and begin >= values[number + 1][0] - 1  # with the space before it
            number += following
            first, end, at = values[number]
            if begin >= end:
                places.append(NOWHERE)  # what stands between values and after the last one: a comma, the line break
                continue
            place = self.first_token(at) if following else self.token_at(at + max(begin - first, 0))
            if not following and place <= places[-1] + 1 and begin == offsets[token - 1][0]:
                place = places[-1] + 2  # one character in several tokens
            places.append(place - 1)
        same = lambda place, token: place == NOWHERE or 0 <= place < len(self.ids) - 1 and self.ids[place + 1] == token
        return [place if same(place, token) else IGNORE for place, token in zip(places, coded.input_ids)]


class TextDataset(Dataset):
    """Item u: `conversations` token rows of at most `length` tokens for the next-token objective, in a seeded order.

    joined: a row is texts one after the other until it has `length` tokens; else it is one text.
    """

    def __init__(self, tokenizer, texts: list[str], updates: int, conversations: int, length: int, seed: int, joined: bool = False):
        self.tokenizer, self.texts, self.updates, self.joined = tokenizer, texts, updates, joined
        self.conversations, self.length, self.seed = conversations, length, seed

    def __len__(self) -> int:
        return self.updates

    def seen(self, first: int, end: int) -> int:
        """Rows in the updates from first to before end."""
        return self.conversations * (end - first)

    def __getitem__(self, update: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed}/{update}")
        return [self.row(rng) for _ in range(self.conversations)]

    def row(self, rng: random.Random) -> list[int]:
        ids = prompts.written_ids(self.tokenizer, rng.choice(self.texts))
        while self.joined and len(ids) < self.length:
            ids += prompts.encode(self.tokenizer, BETWEEN + rng.choice(self.texts))
        return ids[:self.length]


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

    source: "bank", one of scoring_texts.BUILTIN (of what is installed), one of CORPORA (from the Hub), or a local .txt (texts between blank lines) or .jsonl file ("text" per line).
    """
    if source == "bank":
        return BankTexts(langs), training_bank.bank_sha256()
    if source in BUILTIN:
        return [document.text for document in builtin_text(source, "--data")], BUILTIN[source].sha256
    if source in CORPORA:
        return from_hub(source)
    path = Path(source)
    if not path.is_file():
        raise UserError(f"--data {source}: no such file; give a .txt or .jsonl file, bank, or one of {', '.join([*BUILTIN, *CORPORA])}")
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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--data {path}, line {number}: no object with a \"text\" field ({type(error).__name__}); mend that line") from error
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"--data {path}, line {number}: \"text\" is not a text; mend that line")
    return text


def from_hub(source: str) -> tuple[list[str], str]:
    """Texts of a corpus and their SHA-256; UserError where neither the Hub nor the cache has it."""
    import datasets
    limit_waiting()
    corpus = CORPORA[source]
    try:
        rows = datasets.load_dataset(corpus.name, split=corpus.split, revision=corpus.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # what it raises offline, for a gated or missing set, a full disk, a broken file
        said = next(iter(str(error).splitlines()), "no reason given")
        raise UserError(f"--data {source}: {corpus.name} cannot be had ({type(error).__name__}: {said}); give a network that reaches the Hub, room on the "
                        "disk and, if it is gated, a token (HF_TOKEN), or use --data bank or a local file") from error
    texts = [text for text in map(corpus.text, rows) if text.strip()]
    return texts, hashlib.sha256("\0".join(texts).encode()).hexdigest()


class Told(Dataset):
    """A dataset's items from `start` on; in place of one that a UserError refused the error, which a worker process would send as a traceback's text."""

    def __init__(self, dataset: Dataset, start: int):
        self.dataset, self.start = dataset, start

    def __len__(self) -> int:
        return len(self.dataset) - self.start

    def __getitem__(self, index: int):
        try:
            return self.dataset[self.start + index]
        except UserError as error:
            return error


def batches(dataset: Dataset, workers: int, start: int = 0):
    """The dataset's items in order, made ahead by worker processes; a UserError in its item's place."""
    for item in DataLoader(Told(dataset, start), batch_size=None, num_workers=workers, collate_fn=None, prefetch_factor=4 if workers else None):
        if isinstance(item, UserError):
            raise item
        yield item


@dataclass(frozen=True)
class Packed:
    """Prompts with all their questions in one row each: ids, positions [B, T], mask [B, T, T], labels and addresses [B, T].

    question [B, T, T]: of what the mask lets a token see, that which stands in its own question (or, for the prefix, in it).
    """

    ids: torch.Tensor
    position: torch.Tensor
    mask: torch.Tensor
    question: torch.Tensor
    labels: torch.Tensor
    addresses: torch.Tensor


def columns(rows) -> int:
    """Width of a batch of token rows: the longest, and one pad more where that is an odd multiple of 64 (DECISIONS.md: at these
    widths a fused attention kernel gave NaN gradients)."""
    longest = max(map(len, rows))
    return longest + (longest % 128 == 64)


def pack(examples: list[Example], pad_id: int, device) -> Packed:
    """Lay each example out as prefix, question 1, answer 1, question 2, ... in one row.

    Every question sees the prefix and itself only, and counts its positions from the prefix's end, so the row is the same
    arithmetic as one prompt per question; a memory then serves one row instead of one copy per question.
    """
    rows = [pack_row(example) for example in examples]
    width = columns([ids for ids, *_ in rows])
    column = lambda k, fill: torch.tensor([row[k] + [fill] * (width - len(row[k])) for row in rows]).to(device, non_blocking=True)
    ids, labels, segment, position, addresses = column(0, pad_id), column(1, IGNORE), column(2, -1), column(3, 0), column(4, IGNORE)
    same = segment[:, :, None] == segment[:, None, :]
    order = torch.arange(width, device=device)
    causal = order[:, None] >= order[None, :]
    return Packed(ids, position, (same | (segment[:, None, :] == 0)) & causal, same & causal, labels, addresses)


def pack_row(example: Example):
    """(ids, labels, segment, position, addresses) of one row; labels stand where the answer is, segment 0 is the prefix."""
    ids, labels = list(example.prefix), [IGNORE] * len(example.prefix)
    segment, position, addresses = [0] * len(ids), list(range(len(ids))), [IGNORE] * len(ids)
    for number, (question, answer) in enumerate(example.pairs, 1):
        ids += question + answer
        labels += [IGNORE] * len(question) + answer
        addresses += [IGNORE] * len(question) + (list(example.addresses[number - 1]) if example.addresses else [IGNORE] * len(answer))
        segment += [number] * (len(question) + len(answer))
        position += range(len(example.prefix), len(example.prefix) + len(question) + len(answer))
    return ids, labels, segment, position, addresses
