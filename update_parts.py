"""What one process takes of a training update, and how its sums become the whole update's means.

An update's batch is a pure function of (seed, update), so every process draws all of it and keeps neighbouring memories, whole. A loss is
a sum over the process's own rows divided by a count over all processes' rows: summed over the processes, losses and gradients are
those of one process that has all rows.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from parallel import Group
from training_data import Batch, Example, columns

RIVALS = 8          # neighbouring conversations, at most, among whose tokens an address is to be found


@dataclass(frozen=True)
class Part:
    """own: the process's Batch, or token rows of lm. rows: how many examples the whole update has; first: where among them the own ones begin.

    width: columns of the whole update's written texts, None: of the own. counts: False where there are more processes than memories: the process
    then runs the first memory, since all are to make the same calls, and adds nothing.
    """

    own: Batch | list[list[int]] | None = None
    rows: int | None = None
    first: int = 0
    width: int | None = None
    counts: bool = True
    group: Group = Group()

    def counted(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.counts else 0 * tensor

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of all processes, on every one; without a gradient."""
        return self.group.sum(self.counted(tensor.detach()).clone()) if self.group.size > 1 else tensor

    def mean(self, summed: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
        """What this process has in the mean over all: its own sum over everybody's count (or 1 where nobody has any)."""
        if self.group.size == 1:
            return summed / (count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))
        count = count if isinstance(count, torch.Tensor) else torch.full((), count, device=summed.device)  # a copy from the host would wait for the GPU
        return self.counted(summed) / self.total(count).clamp(min=1)

    def rivals(self, key_YBSK: torch.Tensor, mask_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """(keys and mask of the rows among whose tokens the own rows' addresses are to be found, how many of these stand before the own, rows of a block).

        Blocks of neighbouring rows are rivals; those at the ends of a part may belong to two processes, so their keys are exchanged.
        """
        rows = self.rows or len(mask_BS)
        block = next(n for n in range(RIVALS, 0, -1) if rows % n == 0)
        if self.group.size == 1:
            return key_YBSK, mask_BS, 0, block
        behind = rows - self.first - len(mask_BS)
        key_YRSK = self.group.summed(torch.nn.functional.pad(self.counted(key_YBSK), (0, 0, 0, 0, self.first, behind)))
        mask_RS = self.total(torch.nn.functional.pad(mask_BS, (0, 0, self.first, behind)))
        begin, end = self.first // block * block, -(-(self.first + len(mask_BS)) // block) * block
        return key_YRSK[:, begin:end], mask_RS[begin:end], self.first - begin, block

    def log(self, step) -> dict:
        """The numbers of an objectives.Step for the log, of the whole update: loss, right, labels, tokens, update_norm (None without a memory), measures."""
        memory = step.memory and step.memory.detach()
        norms = memory.update_norm() if memory else step.loss.new_zeros(0)
        counted = {"right": step.right, "labels": step.labels, "tokens": step.tokens, "update_norm": norms.sum(), "memories": len(norms)}
        sums = counted | {"loss": step.loss.detach()} | step.measures
        if self.group.size > 1:  # in one call
            sums |= {name: self.counted(torch.as_tensor(n, device=step.loss.device)) for name, n in counted.items()}
            flat = self.group.sum(torch.cat([t.flatten().double() for t in sums.values()]))
            sums = {name: part.view_as(t) for (name, t), part in zip(sums.items(), flat.split([t.numel() for t in sums.values()]))}
        sums = {name: t.tolist() if isinstance(t, torch.Tensor) else t for name, t in sums.items()}
        memories = sums.pop("memories")
        return sums | {"update_norm": sums["update_norm"] / memories if memories else None}


def part_of(batch: Batch | list[list[int]], group: Group) -> Part:
    """The part of an update that is this process's of the group."""
    if group.size == 1:
        return Part(batch, group=group)
    joined = isinstance(batch, Batch)
    each, examples = (batch.group, batch.examples) if joined else (1, batch)
    memories = len(examples) // each
    first, end = (memories * n // group.size for n in (group.rank, group.rank + 1))
    counts = first < end
    first, end = (first, end) if counts else (0, 1)
    own = examples[first * each:end * each]
    if joined:
        own = Batch(own, each, *(beside(rows, first, end) for rows in (batch.calm, batch.foreign)))
    width = columns([e.written for e in examples] if joined else batch)
    return Part(own, len(examples), first * each, width, counts, group)


def beside(rows: list[Example], first: int, end: int) -> list[Example]:
    """Of the rows that are read with the memories, row i with memory i, those of the own memories. Where only other processes have some, a
    row of one token that is asked nothing: all processes then make the same calls."""
    silent = [replace(e, prefix=(e.prefix or e.pairs[0][0])[:1], pairs=[]) for e in rows[:1]]
    return list(rows[first:end]) or silent
