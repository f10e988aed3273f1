"""The modes in which a long text is asked about: what a question sees of its document, and what the fast weights do meanwhile.

    in_context        the untouched base, document and question in the prompt (its own W_down too: a trained one is the other modes')
    in_context_tuned  the same prompt, read by the base with a LoRA that was trained with --objective context; of such a LoRA alone
    ttt_empty         the same prompt, read with an empty memory: what a W_down that was trained too changes by itself
    ttt_foreign       the same prompt, read with what another text of the task left in the memory: what a memory changes by being there, whatever it holds
    ttt_paper         the same prompt, written chunk by chunk while it is read, and frozen from the first token of the answer on. An arm whose
                      chunk is the whole text, or that reads a question (read attention), writes the document alone, which stays in reach, and then
                      reads the question with that memory: it has nothing to read back before its text ends
    ttt_strict        the document written and dropped, then the question alone
    ttt_sharp         the same memory read slot by slot (memory.Sharp): no sum, so no update of W_down, but what the sum costs. Of arms with rule ridge

run_long.py asks its own tasks in them, lm_eval_model.py those of lm-evaluation-harness.
"""
from __future__ import annotations

import contextlib
from itertools import chain
from typing import Iterator, NamedTuple

import torch

from decoding import Past, heard, prefill, write_rows
from in_place_ttt import InPlaceTTT, TTTConfig
from manifests import UserError
from memory import SHARP
from prompts import start_ids

TUNED = "in_context_tuned"                         # the one mode of a reader: a LoRA without fast weights
MODES = ("in_context", "ttt_empty", "ttt_foreign", "ttt_paper", "ttt_strict", "ttt_sharp")  # of a base and its arms
PLAIN = ("in_context", TUNED)                      # which need no fast weights
FOREIGN = "ttt_foreign"                            # which needs to be given other documents
DROPPED = ("ttt_strict", "ttt_sharp")              # in which the question stands alone
USUAL = ("in_context", "ttt_paper", "ttt_strict")  # of any arm; ttt_empty is for arms of --w-down


class Asked(NamedTuple):
    """B questions that were heard, before the first token of their answers."""

    logits_BV: torch.Tensor   # of the first token
    past: Past                # what attention still sees
    session: object | None    # the Reader of the context this runs in, if fast weights are read


class Words(NamedTuple):
    """How a command line writes what check_folders speaks of."""

    before: str   # what stands before the option that a message begins with
    mode: str     # what stands before a mode's name
    adapter: str
    tuned: str
    clip: str     # what stands before the number


def default_mode(adapter, tuned) -> str | None:
    """The mode where none is named, by the checkpoint folders that are (None: not given); None of an adapter, which has several."""
    return TUNED if tuned is not None else "in_context" if adapter is None else None


def check_folders(modes, adapter, tuned, clip: float | None, words: Words) -> None:
    """UserError where the checkpoint folders of an arm and of a reader (None: not given) do not go together, or not with one of the modes or with a clip."""
    if adapter is not None and tuned is not None:
        raise UserError(f"{words.before}{words.tuned}: its LoRA would stay on the base that {words.adapter} writes with; ask the two in runs of their own")
    for mode in modes:
        option = f"{words.before}{words.mode}{mode}"
        if (mode == TUNED) != (tuned is not None):
            raise UserError(f"{option}: {f'needs {words.tuned}' if mode == TUNED else f'with {words.tuned} there is {TUNED} alone'}")
        if mode not in PLAIN and adapter is None:
            raise UserError(f"{option}: needs {words.adapter}")
    if clip is not None and adapter is None:
        raise UserError(f"{words.before}{words.clip}{clip:g}: nothing is written without {words.adapter}; leave it out")


def check_mode(mode: str, manifest: dict, option: str) -> None:
    """UserError where an arm cannot be asked in that mode. manifest: the arm's, empty for a base; option: what names the mode, for the message."""
    if mode == "in_context" and manifest.get("lora"):
        raise UserError(f"{option}: {manifest['arm']} is a joint arm with a LoRA on its base, so in_context would not be the untouched base; ask the base without an adapter")
    if mode == "ttt_empty" and manifest.get("frozen", True):
        raise UserError(f"{option}: {manifest['arm']} has the base's own W_down, so an empty memory changes nothing; leave the mode out")
    if mode == "ttt_sharp" and manifest.get("ttt", {}).get("rule") != "ridge":
        raise UserError(f"{option}: {manifest.get('arm', 'a base')} has no slots that were solved for (rule ridge), which alone are read one by one; leave the mode out")


def next_texts(kinds: list, texts: list) -> list:
    """For each text the next one of its kind that is another, after the last the first again; None where its kind has no other. For ttt_foreign."""
    others, count = [], len(texts)
    for place, (kind, text) in enumerate(zip(kinds, texts)):
        further = chain(range(place + 1, count), range(place))
        others.append(next((texts[one] for one in further if kinds[one] == kind and texts[one] != text), None))
    return others


def writes_as_it_reads(config: TTTConfig) -> bool:
    """Whether an arm can read back what it has written before its text ends."""
    return config.chunk is not None and not config.read_attention


def splits(mode: str, ttt: InPlaceTTT | None) -> bool:
    """Whether the mode needs to know where the document ends and the question begins."""
    return mode in DROPPED or (mode in (FOREIGN, "ttt_paper") and not writes_as_it_reads(ttt.config))


@contextlib.contextmanager
def asked(model, tokenizer, ttt: InPlaceTTT | None, mode: str, documents: list[list[int]], questions: list[list[int]],
          others: list[list[int]] | None = None) -> Iterator[Asked]:
    """Ask each question (token rows without a start) about its document (token rows with the start, prompts.written_ids), in the mode; what the
    answer needs is there inside of the context. A question may be empty where the mode does not split. others: for ttt_foreign, the documents that are
    written in place of a question's own."""
    start, pad = start_ids(tokenizer), tokenizer.pad_token_id
    whole = [document + question for document, question in zip(documents, questions)]
    if mode in PLAIN:  # a reader's LoRA is on the base
        yield Asked(*prefill(model, whole, pad), None)
        return
    if mode == "ttt_paper" and not splits(mode, ttt):
        with ttt.write() as writer:
            logits_BV, past = prefill(model, whole, pad, session=writer)
        with ttt.read(writer.memory()) as session:
            yield Asked(logits_BV, past, session)
        return
    past, rows = None, questions if splits(mode, ttt) else whole
    if mode == "ttt_empty":
        memory = write_rows(model, ttt, [row[:1] for row in whole], pad, dropped=True)[0].scale(0.0)
    elif mode == FOREIGN:
        memory, _ = write_rows(model, ttt, others, pad, dropped=True)
        past = heard(model, documents, pad) if splits(mode, ttt) else None
    elif mode == "ttt_paper":
        memory, past = write_rows(model, ttt, documents, pad)
    else:
        memory, _ = write_rows(model, ttt, documents, pad, dropped=True)
        memory = memory if mode == "ttt_strict" else memory.sharp(SHARP)
        past = heard(model, [start] * len(questions), pad, ttt, memory) if start else None  # it stands before the question, not in it
    with ttt.read(memory) as session:
        yield Asked(*prefill(model, rows, pad, past, session), session)
