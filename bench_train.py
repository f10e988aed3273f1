"""The part `train` of bench.py: forward and backward of one update, of the next-token loss and of the answers' loss."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from bench_kit import Way, slots_of, written
from decoding import prefill, with_layers
from lean import fuse_norms, lean_mlps, swap, without_fast_weights
from objectives import lm_step, recall_step
from public_way import CHUNK, TEXT, TRAINED, PublicWay
from training_data import Batch, Example


def updates(bench, ttt) -> Callable:
    """update(step, layers=None): forward and backward of a step, with the base's norms and MLPs as train_minimal.py has them, and only for so long:
    the other ways keep theirs. layers: what stands in the place of the decoder's layers, as --compile does."""
    plain = fuse_norms(bench.model) | lean_mlps(bench.model)
    lean = swap(bench.model, plain)  # the same modules each time, or what is compiled would be so again

    def update(step: Callable, layers: torch.nn.ModuleList | None = None) -> Callable:
        def call():
            swap(bench.model, lean)
            try:
                with with_layers(bench.model.get_decoder(), layers or bench.model.get_decoder().layers):
                    step().loss.backward()
            finally:
                swap(bench.model, plain)
            ttt.zero_grad(set_to_none=True)

        return call

    return update


def train(bench) -> None:
    """Forward and backward of one update: the next-token loss of TRAINED tokens in chunks, and the answers' loss of a memory."""
    config, device, cost = replace(bench.loaded.row.plain, chunk=CHUNK), bench.device, bench.cost
    with bench.attached(config) as ttt:
        rows, public, first = bench.rows(1, TRAINED), PublicWay(bench.model, config.layers), min(config.layers)
        update = updates(bench, ttt)
        step = lambda rows, layers=None: update(lambda: lm_step(bench.loaded, ttt, rows, device), layers)
        base = cost.forward(TRAINED, predicted=TRAINED) + cost.backward(TRAINED, predicted=TRAINED, first=first)
        work = base + 3 * bench.memory_cost(ttt).write_chunks(TRAINED)
        ways = {"base, forward alone": Way(torch.inference_mode()(lambda: prefill(bench.model, rows, bench.pad)), 1, cost.forward(TRAINED)),
                "public, 1 at once": Way(lambda: public.train_step(torch.tensor(rows, device=device)), 1, base)}
        ways |= {f"memory, {n} at once": Way(step(bench.rows(n, TRAINED)), n, work) for n in bench.sizes.batches}
        ready = list(without_fast_weights(bench.model).values())
        layers = torch.nn.ModuleList(torch.compile(layer) if layer in ready else layer for layer in bench.model.get_decoder().layers)
        ways |= {f"memory, compiled, {n} at once": Way(step(bench.rows(n, TRAINED), layers), n, work) for n in bench.sizes.compiled}
        bench.compare("train", f"next token, {TRAINED} tokens", ways, TRAINED)
    with bench.attached(bench.loaded.row.codes) as ttt:
        train_answers(bench, ttt)


def train_answers(bench, ttt, asked: int = 2, head: int = 60, question: int = 20, answered: int = 6) -> None:
    """recall_step without aids' rows: a text of TEXT tokens, a prompt's head and so many questions of so many tokens."""
    cost, memory, first, tail = bench.cost, bench.memory_cost(ttt), min(ttt.config.layers), question + answered
    slots = slots_of(written(bench, ttt, bench.rows(8, TEXT)))
    both = lambda *how: cost.forward(*how) + cost.backward(*how, first)
    work = (cost.forward(TEXT, predicted=0, layers=max(ttt.config.layers) + 1) + both(head, 0, 0) + asked * both(tail, head, answered)
            + 3 * (memory.write(TEXT, slots) + memory.read(head, slots) + asked * memory.read(tail, slots)))
    example = lambda: Example(bench.rows(1, TEXT)[0], bench.rows(1, head)[0], [(bench.rows(1, question)[0], bench.rows(1, answered)[0]) for _ in range(asked)])
    update = updates(bench, ttt)
    step = lambda rows: update(lambda: recall_step(bench.loaded, ttt, Batch(rows), bench.device))
    ways = {f"memory, {n} at once": Way(step([example() for _ in range(n)]), n, work) for n in bench.sizes.batches}
    bench.compare("train", f"answers, {TEXT} tokens and {asked} questions", ways, TEXT + head + asked * tail)
