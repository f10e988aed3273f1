"""Running text through a model: writing a conversation, prefilling a prompt, greedy answers with a memory attached.

Rows are padded on the left. A `Past` is what attention still sees (the KV cache and its mask); leaving it behind and keeping
only the Memory is the KV-stripped forward: positions restart at 0 and nothing of the text is in reach but the fast weights.
"""
from __future__ import annotations

import contextlib
import functools
import sys
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from fixed_cache import FixedCache
from in_place_ttt import InPlaceTTT
from manifests import UserError
from memory import Memory

WARM = 2        # steps of an answer on a GPU before one is captured
SEGMENT = 1024  # tokens a row of one forward call while a long text is read; bounds the attention matrix and what a write holds
FULL = 4        # rows of so many tokens fill a GPU; of fewer rows a call takes more tokens each, or launching it takes longer than its work
# What two orders of the same sums may differ by, relative to the largest value: rounding, grown through the layers.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass
class Past:
    """KV cache of B rows and the mask [B, T] of which cached positions are tokens."""

    cache: DynamicCache
    mask: torch.Tensor

    def repeat(self, times: int) -> "Past":
        """Each row `times` times, side by side, for several questions about one text. Takes the cache over."""
        self.cache.batch_repeat_interleave(times)
        return Past(self.cache, self.mask.repeat_interleave(times, 0))


def pad_left(rows: list[list[int]], pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both [B, L], right-aligned: every row's next token stands in the last column."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def sliding_window(config) -> int | None:
    """The window of a model's sliding attention layers, in tokens; None for a model without such layers."""
    return config.sliding_window if "sliding_attention" in (getattr(config, "layer_types", None) or ()) else None


def attention_kinds(seen_BLT: torch.Tensor, query_BL: torch.Tensor, key_BT: torch.Tensor, window: int) -> dict[str, torch.Tensor]:
    """The mask of each kind of layer, [B, 1, L, T]: all that is seen, and of it what lies within the window.

    query and key are token positions. The library would measure the window in columns, pads included: pads between a text
    and its question, or other questions of a packed row, would take the place of tokens.
    """
    near_BLT = query_BL[:, :, None] - key_BT[:, None, :] < window
    return {"full_attention": seen_BLT[:, None], "sliding_attention": (seen_BLT & near_BLT)[:, None]}


def reading(ttt: InPlaceTTT | None, memory: Memory | None):
    """The read context of a memory, or nothing at all where there is none."""
    return contextlib.nullcontext() if memory is None else ttt.read(memory)


def forward(model, ids_BL: torch.Tensor, mask_BL: torch.Tensor, past: Past | None, session=None) -> tuple[torch.Tensor, Past]:
    """One call of the model after `past`, as `forward_all`. Returns the logits of the last position [B, V] and the longer Past."""
    logits, past = forward_all(model, ids_BL, mask_BL, past, session, keep=1)
    return logits[:, -1], past


def forward_all(model, ids_BL: torch.Tensor, mask_BL: torch.Tensor, past: Past | None, session=None, keep: int | None = 0) -> tuple[torch.Tensor | None, Past]:
    """One call of the model after `past`. Returns the logits of the last `keep` positions (0: of all; None: no logits), [B, K, V], and the longer Past.

    session: the Writer or Reader of the context this runs in, to whom the tokens are announced; None outside of one.
    """
    if session is not None:
        session.expect(mask_BL)
    cache = past.cache if past else DynamicCache()  # without the config: a sliding layer's cache would be cut by columns
    mask = torch.cat([past.mask, mask_BL], 1) if past else mask_BL
    position_BL = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids_BL.shape[1]:]
    visible, window = mask, sliding_window(model.config.get_text_config())
    if window is not None:
        column_T = torch.arange(mask.shape[1], device=mask.device)
        seen_BLT = mask[:, None, :].bool() & (column_T[-ids_BL.shape[1]:, None] >= column_T)
        visible = attention_kinds(seen_BLT, position_BL, mask.cumsum(1) - 1, window)
    named = dict(input_ids=ids_BL, attention_mask=visible, position_ids=position_BL, past_key_values=cache, use_cache=True)
    if keep is None:
        model.get_decoder()(**named)
        return None, Past(cache, mask)
    return model(**named, logits_to_keep=keep).logits, Past(cache, mask)


def call_length(rows: int, session=None) -> int:
    """Tokens a row of one forward call. More than SEGMENT only where nothing of the session's goes by pairs of a call's tokens."""
    return SEGMENT * (max(1, FULL // rows) if session is None or session.long_calls else 1)


def segments(model, rows: list[list[int]], pad_id: int, session=None):
    """(ids, mask) of the rows, padded on the left, a call's columns at a time."""
    ids, mask = pad_left(rows, pad_id, next(model.parameters()).device)
    at_once = call_length(len(rows), session)
    return zip(ids.split(at_once, 1), mask.split(at_once, 1))


def prefill(model, rows: list[list[int]], pad_id: int, past: Past | None = None, session=None) -> tuple[torch.Tensor, Past]:
    """Read token rows after `past`, in segments (session: as in `forward`). Rows may differ in length; every row needs a token."""
    logits = None
    for ids, mask in segments(model, rows, pad_id, session):
        logits, past = forward(model, ids, mask, past, session)
    return logits, past


def write_rows(model, ttt: InPlaceTTT, rows: list[list[int]], pad_id: int, memory: Memory | None = None, past: Past | None = None,
               dropped: bool = False) -> tuple[Memory, Past | None]:
    """Write each token row (on top of `memory`, if given) and return the new memory and what attention saw.

    Keep the Past to read with the text still in context. dropped: for the KV-stripped conditions there is none (None), and nothing runs above
    the last TTT layer.
    """
    with ttt.write(memory, dropped=dropped) as writer, lowest(model, max(ttt.config.layers) + 1) if dropped else contextlib.nullcontext():
        for ids, mask in segments(model, rows, pad_id, writer):
            _, past = forward_all(model, ids, mask, past, writer, keep=None)
    if dropped:
        past = None  # before memory() needs the room
    return writer.memory(), past


@contextlib.contextmanager
def with_layers(decoder, layers):
    """The decoder with other layers in the place of its own, for so long."""
    own = decoder.layers
    decoder.layers = layers
    try:
        yield decoder
    finally:
        decoder.layers = own


def lowest(model, layers: int):
    """The decoder, cut to its first so many layers: what a text leaves in them does not hang on those above."""
    decoder = model.get_decoder()
    return with_layers(decoder, decoder.layers[:layers])


def whole_rows(model, rows: list[list[int]], pad_id: int, session=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [B, L, V] of every token of the rows from one call, with their ids and mask [B, L] (session: as in `forward`)."""
    ids, mask = pad_left(rows, pad_id, next(model.parameters()).device)
    if session is not None:
        session.expect(mask)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits, ids, mask


class Steps:
    """Greedy answers of B rows, a token a step, in place: after what `past` holds, which it takes over, and in a Reader's context (session) or none.

    tokens [B, room]: what was said so far, pads behind a row's end. alive [B]: rows that have not ended (line: see greedy). On a GPU the steps after
    the first WARM ones are one captured graph: a step of a small batch is else bound by the launching of its kernels.
    """

    def __init__(self, model, tokenizer, logits_BV: torch.Tensor, past: Past, room: int, session=None, line: bool = True):
        batch, self.device = logits_BV.shape[0], logits_BV.device
        self.model, self.session, self.pad_id = model, session, tokenizer.pad_token_id
        self.window = sliding_window(model.config.get_text_config())
        self.stops_V = stop_mask(tokenizer, logits_BV.shape[1], self.device, line)
        self.tokens_BN = torch.full((batch, room), self.pad_id, device=self.device)
        self.alive_B = torch.ones(batch, dtype=torch.bool, device=self.device)
        self.chosen_B1 = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self.said, self.column = (torch.tensor([n], device=self.device) for n in (0, past.mask.shape[1]))
        self.mask_BT = torch.nn.functional.pad(past.mask.bool(), (0, room))
        self.cache = FixedCache(past.cache, room, self.column)
        self.done, self.graph = 0, None
        if session is not None:
            session.fix(room)
        self._choose(logits_BV)

    def _choose(self, logits_BV: torch.Tensor) -> None:
        chosen_B = logits_BV.argmax(-1)
        self.tokens_BN.index_copy_(1, self.said, torch.where(self.alive_B, chosen_B, self.pad_id)[:, None])
        self.alive_B &= ~self.stops_V[chosen_B]
        self.chosen_B1.copy_(chosen_B[:, None])
        self.said += 1

    def _step(self) -> None:
        """Read the tokens chosen last and choose the next."""
        self.mask_BT.index_fill_(1, self.column, True)
        place_BT = self.mask_BT.cumsum(1) - 1
        position_B1, visible = place_BT.index_select(1, self.column), self.mask_BT[:, None, None]
        if self.window is not None:
            visible = attention_kinds(self.mask_BT[:, None], position_B1, place_BT, self.window)
        if self.session is not None:
            self.session.expect(torch.ones_like(self.chosen_B1))
        out = self.model(input_ids=self.chosen_B1, attention_mask=visible, position_ids=position_B1, past_key_values=self.cache, use_cache=True,
                         logits_to_keep=1)
        self.column += 1
        self._choose(out.logits[:, -1])

    def run(self) -> None:
        """One step."""
        if self.device.type == "cuda" and self.done == WARM:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        elif self.device.type == "cuda":
            self._on_side_stream()
        else:
            self._step()
        self.done += 1

    def _capture(self) -> None:
        """Record a step, which runs nothing yet. A base that cannot be recorded (one that looks at a number on the way) is stepped as before."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=capture_stream(self.device)):
                self._step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            print(f"answers are not captured as a CUDA graph, which is slower: {str(error).splitlines()[0]}", file=sys.stderr)
        else:
            self.graph = graph

    def _on_side_stream(self) -> None:
        """A step on the stream of the capture: what is captured must have run there before (torch's notes on CUDA graphs)."""
        side, current = capture_stream(self.device), torch.cuda.current_stream(self.device)
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                self._step()
        finally:
            current.wait_stream(side)


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@functools.lru_cache(maxsize=4)
def stop_ids(tokenizer, line: bool = True) -> frozenset[int]:
    """Tokens that end an answer: end of text, end of turn, and where its line ends it everything with a line break in it."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))]) if line else []
    return frozenset([i for i, text in enumerate(texts) if "\n" in text] + list(tokenizer.all_special_ids))


def stop_mask(tokenizer, vocabulary: int, device, line: bool) -> torch.Tensor:
    """Which of the model's token ids end an answer, [V]; a model may have more of them than its tokenizer."""
    mask_V = torch.zeros(vocabulary, dtype=torch.bool)
    mask_V[torch.tensor([i for i in stop_ids(tokenizer, line) if i < vocabulary], dtype=torch.long)] = True
    return mask_V.to(device)


def greedy(model, tokenizer, logits_BV: torch.Tensor, past: Past, max_new_tokens: int, session=None, early_stop: bool = True,
           line: bool = True, stripped: bool = True) -> list[str]:
    """Continue every row greedily until its line or turn ends (session: the Reader of the context, or None); the answers' first lines, stripped. Takes `past` over.

    early_stop: leave once every row has ended; without, every call costs the same, as a benchmark of time wants it.
    line: without, an answer goes on over its line breaks, until the turn ends or max_new_tokens are said.
    stripped: without, an answer keeps the white space around it.
    """
    steps = Steps(model, tokenizer, logits_BV, past, max_new_tokens, session, line)
    for _ in range(max_new_tokens - 1):
        if early_stop and not steps.alive_B.any():
            break
        steps.run()
    texts = tokenizer.batch_decode(steps.tokens_BN, skip_special_tokens=True)
    said = [text.split("\n")[0] if line else text for text in texts]
    return [text.strip() for text in said] if stripped else said


def heard(model, rows: list[list[int]], pad_id: int, ttt: InPlaceTTT | None = None, memory: Memory | None = None) -> Past:
    """What attention keeps of rows that stand before questions, read with the memory. They are a read context of their own: read streams
    look back over a question alone, in training as here."""
    with reading(ttt, memory) as session:
        return prefill(model, rows, pad_id, session=session)[1]


def answers_to(model, tokenizer, questions: list[list[int]], max_new_tokens: int, past: Past | None = None, ttt: InPlaceTTT | None = None,
               memory: Memory | None = None, **how) -> tuple[list[str], torch.Tensor]:
    """(greedy answers to the questions, the logits of their first tokens [N, V]); N questions, N / B neighbouring ones behind each of the B
    rows of `past`, which is taken over, and with each row of the memory. how: see greedy."""
    with reading(ttt, memory) as session:
        before = past and past.repeat(len(questions) // past.mask.shape[0])
        logits_BV, past = prefill(model, questions, tokenizer.pad_token_id, before, session)
        return greedy(model, tokenizer, logits_BV, past, max_new_tokens, session, **how), logits_BV


def kv_bytes_per_token(model) -> int:
    """Bytes that a token takes in the base's KV cache, in the base's dtype: what a memory saves is measured against it."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize


def check_window(model, longest: int, what: str) -> None:
    """UserError when a prompt and its answer do not fit the model's window."""
    window = model.config.get_text_config().max_position_embeddings
    if longest > window:
        raise UserError(f"{what}: needs {longest} tokens, the model's window is {window}; shorten it or take another model")
