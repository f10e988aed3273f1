"""Jobs that a device may have no memory for: each is asked whole, or in halves, and nothing larger is tried again."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch

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


def in_halves(jobs: Iterable, ask: Callable[[Job], list[dict]], bar) -> Iterator[tuple[Job, list[dict]]]:
    """(job, its rows) of every job in order. One that the device has no memory for is asked in halves, and so are the larger ones of
    its kind that follow. bar: a tqdm, which names the kind. UserError where one question is too much."""
    jobs, waiting, fits = iter(jobs), [], {}
    while (job := waiting.pop() if waiting else next(jobs, None)) is not None:
        if job.count <= fits.get(job.kind, job.count):
            bar.set_postfix_str(job.kind)
            try:
                rows = ask(job)
            except torch.OutOfMemoryError:
                rows = None  # nothing is done here: the error still holds the tensors of the frames it came through
            if rows is not None:
                yield job, rows
                continue
            if job.count == 1:
                raise UserError(f"{job.first} {job.kind}: the device has no memory for one question; use --dtype bfloat16, "
                                "a shorter text, or a device with more memory")
            fits[job.kind] = -(-job.count // 2)
            bar.write(f"out of memory at {job.count} questions of {job.kind}: from here on at most {fits[job.kind]} at once", file=sys.stderr)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        waiting += reversed(job.halves())
