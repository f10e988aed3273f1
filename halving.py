"""Jobs that a device may have no memory for: each is asked whole, or in halves, and nothing larger is tried again."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from accelerate.utils.memory import should_reduce_batch_size

from manifests import UserError


class Job(Protocol):
    """Questions that are asked together. kind: jobs of one kind need like memory; first: names the first of them in messages."""

    @property
    def kind(self) -> str: ...
    @property
    def first(self) -> str: ...
    @property
    def count(self) -> int: ...
    def halves(self) -> list["Job"]: ...


@dataclass(frozen=True)
class Items:
    """A Job of things that can be parted anywhere, without its names."""

    items: list

    @property
    def count(self) -> int:
        return len(self.items)

    def halves(self) -> list["Items"]:
        middle = len(self.items) // 2
        return [replace(self, items=part) for part in (self.items[:middle], self.items[middle:])]


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, a GPU or the host, had no memory for what was asked of it."""
    return isinstance(error, torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))


def in_halves(jobs: Iterable, ask: Callable[[Job], list[dict]], bar) -> Iterator[tuple[Job, list[dict]]]:
    """(job, its rows) of every job in order. One that the device has no memory for is asked in halves, and so are the larger ones of
    its kind that follow. bar: a tqdm, which names the kind. UserError where one question is too much."""
    jobs, waiting, fits = iter(jobs), [], {}
    while (job := waiting.pop() if waiting else next(jobs, None)) is not None:
        if job.count <= fits.get(job.kind, job.count):
            bar.set_postfix_str(job.kind)
            try:
                rows = ask(job)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                rows = None  # nothing is done here: the error still holds the tensors of the frames it came through
            if rows is not None:
                yield job, rows
                continue
            if job.count == 1:
                raise UserError(f"{job.first} {job.kind}: the device has no memory for one question; use dtype bfloat16, "
                                "a shorter text, or a device with more memory")
            fits[job.kind] = -(-job.count // 2)
            bar.write(f"out of memory at {job.count} questions of {job.kind}: from here on at most {fits[job.kind]} at once", file=sys.stderr)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        waiting += reversed(job.halves())
