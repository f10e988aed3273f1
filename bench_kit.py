"""What the parts of bench.py have in common: a way through a case, texts written, and an untrained adapter's gates opened."""
from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from decoding import write_rows
from memory import Memory


class Way(NamedTuple):
    """One way through a case: call does `units` of it, and each needs so many operations (work) and bytes to be moved (moved), or more."""

    call: Callable
    units: int
    work: float
    moved: float = 0.0


@torch.inference_mode()
def written(bench, ttt, texts) -> Memory:
    return write_rows(bench.model, ttt, texts, bench.pad, dropped=True)[0]


@contextlib.contextmanager
def every_token(ttt):
    """With the gates wide open for so long: a slot a token, the worst that a text can leave."""
    gates = {fast: fast.gate_bias.detach().clone() for fast in ttt.fast.values()}
    for fast in gates:
        fast.gate_bias.data.fill_(100.0)
    try:
        yield
    finally:
        for fast, bias in gates.items():
            fast.gate_bias.data.copy_(bias)


def slots_of(memory: Memory) -> float:
    """Slots of a conversation and layer, on average; 0 of dense ones."""
    layers = memory.layers.values()
    return 0.0 if next(iter(layers)).is_dense else sum((layer.values != 0).any(-1).float().sum(1).mean().item() for layer in layers) / len(layers)
