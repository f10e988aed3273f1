"""Scorers of a text that adapt while they read: what a token costs, and what may be learned from it when.

A scorer gives events, in the order in which things happen (see Score and Update), and tells its state at any time. Legal is: a token's
distribution is settled before anything has been learned from that token; forbidden is the other order, kept for contrast.

    Off        the base alone
    InPlace    the fast weights of an adapter (in_place_ttt.py) write each piece, after it is scored
    AdamW      chosen parameters of the base are trained on each chunk, after it is scored, for some epochs

What attention sees, for all three alike: the document is cut into strides of S tokens; each is read in a window of its own that begins with the
start token and the W - S + 1 tokens before the stride, so a token is predicted from W - S + 1 to W tokens of text (fewer near the beginning of the
document), at positions counted from the window's start. Everything that a prediction knows from further back has come through fast
weights or trained parameters. All that was learned is dropped at the end of the document.
"""
from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Callable, Iterator

import torch
from torch.nn.functional import cross_entropy

from decoding import Past, forward_all, reading
from in_place_ttt import InPlaceTTT
from memory import Memory, tensors_digest
from model_utils import Loaded

BETAS, CLIP = (0.9, 0.95), 1.0  # of AdamW while a text is read


@dataclass
class Score:
    """Tokens start, start + 1, ... of the document, scored: their log-probabilities [n] in nats, and a function that gives the whole distributions
    they are taken from, log-probabilities [n, V]."""

    start: int
    realised: torch.Tensor
    full: Callable[[], torch.Tensor]

    @property
    def end(self) -> int:
        return self.start + len(self.realised)


@dataclass
class Update:
    """Something was learned from tokens start to end - 1 of the document."""

    start: int
    end: int


@dataclass(frozen=True)
class Window:
    """Tokens start to end - 1 are scored; attention sees the start token and what it has read of the document from token `first` on."""

    first: int
    start: int
    end: int

    def inputs(self, ids: list[int], begin: int) -> list[int]:
        """What is read so that the model's outputs at it predict tokens start to end - 1 from."""
        return [begin] + ids[self.first:self.end - 1]


@dataclass(frozen=True)
class Plan:
    """window W and stride S, in tokens (see above); begin: the start token, which is never scored."""

    window: int
    stride: int
    begin: int

    def __post_init__(self):
        if not 1 <= self.stride <= self.window:
            raise ValueError(f"a stride of {self.stride} in a window of {self.window}; use 1 to the window's tokens")

    def windows(self, length: int, start: int = 0, end: int | None = None) -> list[Window]:
        """Those that score tokens start to end - 1 of a document of so many tokens; start and end at multiples of the stride or the document's end."""
        ends = [(s, min(s + self.stride, length if end is None else end)) for s in range(start, length if end is None else end, self.stride)]
        return [Window(max(0, s + self.stride - 1 - self.window), s, e) for s, e in ends]


def start_token(tokenizer) -> int:
    """What every window begins with: the token for it, or where there is none, the one that ends a text."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def scored(start: int, logits_LV: torch.Tensor, ids: list[int]) -> Score:
    """The event for the tokens that these logits predict."""
    targets_L = torch.tensor(ids[start:start + len(logits_LV)], device=logits_LV.device)
    return Score(start, -cross_entropy(logits_LV.float(), targets_L, reduction="none").detach(), lambda: torch.log_softmax(logits_LV.detach().float(), -1))


def predicted(model, window: Window, ids: list[int], begin: int, device) -> torch.Tensor:
    """Logits [n, V] that predict the window's tokens, from one plain call. What to keep is told as a tensor: a number would be compiled in."""
    inputs = torch.tensor([window.inputs(ids, begin)], device=device)
    keep = torch.arange(window.start - window.end, 0, device=device) + inputs.shape[1]
    return model(input_ids=inputs, use_cache=False, logits_to_keep=keep).logits[0]


def plain_scores(model, plan: Plan, ids: list[int], windows: list[Window], device) -> Iterator[Score]:
    for window in windows:
        with torch.no_grad():
            logits = predicted(model, window, ids, plan.begin, device)
        yield scored(window.start, logits, ids)


class Off:
    """The base alone; model: what is called in place of the base, such as a compiled one."""

    def __init__(self, loaded: Loaded, plan: Plan, model=None):
        self.loaded, self.plan, self.model = loaded, plan, loaded.model if model is None else model
        self.vocabulary, self.step = loaded.model.config.get_text_config().vocab_size, plan.stride

    def state(self) -> str:
        """Digest of all parameters."""
        return tensors_digest(dict(self.loaded.model.named_parameters()))

    def events(self, ids: list[int]) -> Iterator[Score | Update]:
        yield from plain_scores(self.model, self.plan, ids, self.plan.windows(len(ids)), self.loaded.device)


class InPlace:
    """Fast weights: a piece is scored with what was written before, then written.

    piece: tokens of one call. An arm with chunks scores and writes in one pass: its own update rule applies a chunk's update behind the chunk (so a piece may hold
    several chunks); of an arm whose chunk is the whole text each piece is a chunk, read with the memory so far, then written. forbidden: written first,
    then scored with the memory that holds it; a piece of an arm with chunks is then one chunk.
    What is written of a piece is what was read to predict it: the token before it to the one before its last.
    forget: a window that begins so many tokens after the memory did begins a new one; a sum of outer products forgets nothing by itself. None: never.
    """

    def __init__(self, loaded: Loaded, ttt: InPlaceTTT, plan: Plan, piece: int, forbidden: bool = False, forget: int | None = None):
        chunk = ttt.config.chunk
        self.piece = chunk if chunk and forbidden else piece
        if chunk and (self.piece % chunk or plan.stride % chunk):
            raise ValueError(f"pieces of {self.piece} and a stride of {plan.stride} tokens for an arm that writes chunks of {chunk}; use multiples of it")
        self.loaded, self.ttt, self.plan, self.forbidden, self.forget = loaded, ttt, plan, forbidden, forget
        self.vocabulary, self.step = loaded.model.config.get_text_config().vocab_size, chunk or piece
        self.one_pass = bool(chunk) and not forbidden
        self.memory: Memory | None = None

    def state(self) -> str:
        """Digest of the memory, of all parameters and of the adapter."""
        parts = dict(self.loaded.model.named_parameters()) | {f"ttt.{name}": t for name, t in self.ttt.tensors().items()}
        return tensors_digest(parts) + (self.memory.digest() if self.memory else "")

    def events(self, ids: list[int]) -> Iterator[Score | Update]:
        self.memory, begun = None, 0
        try:
            for window in self.plan.windows(len(ids)):
                if self.forget and window.start - begun >= self.forget:
                    self.memory, begun = None, window.start
                yield from self._window(window, ids)
        finally:
            self.memory = None

    def _window(self, window: Window, ids: list[int]) -> Iterator[Score | Update]:
        inputs, new = window.inputs(ids, self.plan.begin), window.end - window.start
        self.pasts: dict[str, Past | None] = {"read": None, "write": None}
        if len(inputs) > new:  # what is only there to be seen, in the pass that answers and in the one that writes
            passes = {"write": None if self.ttt.config.blind else self.memory} | ({} if self.one_pass else {"read": self.memory})
            for name, memory in passes.items():
                with reading(self.ttt, memory) as session:
                    self._forward(name, inputs[:-new], session, keep=1)
        for start in range(window.start, window.end, self.piece):
            part = inputs[len(inputs) - (window.end - start):][:self.piece]
            yield from self._piece(part, start, ids)

    def _piece(self, part: list[int], start: int, ids: list[int]) -> Iterator[Score | Update]:
        learned = Update(max(0, start - 1), start - 1 + len(part))
        if self.one_pass:
            logits, writer = self._write(part)
            yield scored(start, logits, ids)
            self._learn(writer)
            yield learned
        elif self.forbidden:
            self._learn(self._write(part)[1])
            yield learned
            yield scored(start, self._read(part), ids)
        else:
            yield scored(start, self._read(part), ids)
            self._learn(self._write(part)[1])
            yield learned

    @torch.no_grad()
    def _forward(self, name: str, part: list[int], session, keep: int = 0) -> torch.Tensor:
        tokens = torch.tensor([part], device=self.loaded.device)
        logits, self.pasts[name] = forward_all(self.loaded.model, tokens, torch.ones_like(tokens), self.pasts[name], session, keep)
        return logits[0]

    def _read(self, part: list[int]) -> torch.Tensor:
        with reading(self.ttt, self.memory) as session:
            return self._forward("read", part, session)

    def _write(self, part: list[int]):
        with self.ttt.write(self.memory) as writer:
            return self._forward("write", part, writer), writer

    @torch.no_grad()
    def _learn(self, writer) -> None:
        self.memory = writer.memory()


@dataclass
class AdamW:
    """Test-time training as public submissions do it: the parameters named are trained on each chunk, after it is scored.

    train: name -> parameter. chunk: tokens of one chunk, a multiple of the stride. Each epoch goes once over the chunk's sequences of `window` tokens, in an
    order drawn by the seed, one sequence a step. The optimizer starts anew with each document. forbidden: trained first, then scored.
    """

    loaded: Loaded
    plan: Plan
    train: dict[str, torch.nn.Parameter]
    lr: float
    epochs: int
    chunk: int
    seed: int = 0
    forbidden: bool = False
    model: object = None                                                     # called in place of the base, such as a compiled one
    losses: list[float] = field(default_factory=list)                        # of every step, in nats a token

    def __post_init__(self):
        if self.chunk % self.plan.stride:
            raise ValueError(f"a chunk of {self.chunk} tokens with a stride of {self.plan.stride}; use a multiple of it")
        self.model = self.loaded.model if self.model is None else self.model
        self.vocabulary, self.step = self.loaded.model.config.get_text_config().vocab_size, self.plan.stride

    state = Off.state

    def events(self, ids: list[int]) -> Iterator[Score | Update]:
        kept = {name: p.detach().clone() for name, p in self.train.items()}
        optimizer = torch.optim.AdamW(self.train.values(), lr=self.lr, betas=BETAS, weight_decay=0.0)
        order, self.losses = random.Random(self.seed), []
        try:
            for start in range(0, len(ids), self.chunk):
                end = min(start + self.chunk, len(ids))
                if self.forbidden:
                    yield self._learn(ids, start, end, optimizer, order)
                yield from plain_scores(self.model, self.plan, ids, self.plan.windows(len(ids), start, end), self.loaded.device)
                if not self.forbidden and end < len(ids):
                    yield self._learn(ids, start, end, optimizer, order)
        finally:
            with torch.no_grad():
                for name, p in self.train.items():
                    p.copy_(kept[name])
            self._require_grad(False)

    def _require_grad(self, wanted: bool) -> None:
        for p in self.train.values():
            p.requires_grad_(wanted)
            p.grad = None

    def _learn(self, ids: list[int], start: int, end: int, optimizer, order: random.Random) -> Update:
        sequences = Plan(self.plan.window, self.plan.window, self.plan.begin).windows(len(ids), start, end)
        self._require_grad(True)
        for _ in range(self.epochs):
            for window in order.sample(sequences, len(sequences)):
                with torch.enable_grad():
                    logits = predicted(self.model, window, ids, self.plan.begin, self.loaded.device)
                    loss = cross_entropy(logits.float(), torch.tensor(ids[window.start:window.end], device=self.loaded.device))
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(self.train.values(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
                self.losses.append(loss.item())
        self._require_grad(False)
        return Update(start, end)
