"""In-Place Test-Time Training: MLP fast weights that a frozen decoder writes while it reads (arXiv 2604.06169).

For a gated MLP with input x (the post-norm hidden state), h = act(x W_gate) * (x W_up) and out = h W_down^T, each TTT
layer writes one outer product per token and reads the sum of all finished chunks:

    target   t_i  = sum_k conv_k * x_{i+k}        depthwise conv, symmetric, never across a chunk border
    value    v_i  = eta * u * g_i * (t_i P)       P multiplies on the right; g_i = 1 unless the write gate is on
    update   dW_c = sum_{i in chunk c} v_i (x) h_i
    output   O_i  = h_i (W_down + sum_{c' < chunk(i)} dW_c')^T          apply first, then update

u = 1, except with unit targets: there x is taken at unit RMS and u is the RMS of W_down's entries, so that one step size
suits bases whose activations and weights differ in size by orders of magnitude. Two options change the write:

    ridge    the whole text's values are solved for instead of summed: dW minimises
             sum_i eta g_i |(W + dW) k_i - u t_i P|^2 + lambda |dW|^2, W being the memory before this text (kernel ridge regression)
    key map  the key k_i that is written and the query that reads are learned features of x in place of h itself

Shape letters: B batch, L tokens of one call, S written tokens (slots), D hidden size, F feed-forward size.
The mode is explicit: outside `write` and `read` a wrapped MLP *is* the base MLP, bit for bit.
"""
from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from fast_weight import FastWeight, TTTConfig, chunk_of, fit
from memory import LayerMemory, Memory

class TTTMLP(nn.Module):
    """Stands where layer.mlp stood and shares its weights; a plain call unless its owner is writing or reading."""

    def __init__(self, base: nn.Module, index: int, owner: "InPlaceTTT"):
        super().__init__()
        self.base = base
        self.index = index
        self._owner = (owner,)  # a tuple, so that the adapter is not registered as a part of the base

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        session = self._owner[0].session
        if session is None:
            return self.base(x_BLD)
        h_BLF = self.base.act_fn(self.base.gate_proj(x_BLD)) * self.base.up_proj(x_BLD)
        share_BLD = session.layer(self.index, x_BLD, h_BLF)
        out_BLD = self.base.down_proj(h_BLF)
        return out_BLD if share_BLD is None else out_BLD + share_BLD.to(out_BLD.dtype)


class InPlaceTTT(nn.Module):
    """The adapter: one FastWeight per TTT layer, attached to a Hugging Face decoder that it does not own.

    Args:
        model: any causal LM whose decoder layers have an MLP with gate_proj, up_proj, down_proj and act_fn.
        config: layers out of range, or an MLP of another shape, raise ValueError.
        seed: of the initial P.
    """

    def __init__(self, model: nn.Module, config: TTTConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.session: Writer | Reader | None = None
        decoder = model.get_decoder()
        check_layers(decoder.layers, config.layers)
        hidden_size = decoder.config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        self._decoder = (decoder,)
        for i in config.layers:
            decoder.layers[i].mlp = TTTMLP(decoder.layers[i].mlp, i, self)
        rms = lambda i: self.down_norm(i) / self.down_proj(i).weight.numel() ** 0.5
        self.fast = nn.ModuleDict({str(i): FastWeight(hidden_size, self.down_proj(i).in_features, config, generator, rms(i))
                                   for i in config.layers})
        self.fast.to(decoder.layers[config.layers[0]].mlp.base.down_proj.weight.device)

    def detach(self) -> None:
        """Put the base MLPs back; the model is as it was before."""
        for i in self.config.layers:
            self._decoder[0].layers[i].mlp = self._decoder[0].layers[i].mlp.base

    def down_proj(self, index: int) -> nn.Module:
        return self._decoder[0].layers[index].mlp.base.down_proj

    def down_norm(self, index: int) -> float:
        """|W_down|, Frobenius."""
        return torch.linalg.vector_norm(self.down_proj(index).weight.detach(), dtype=torch.float64).item()

    @contextmanager
    def _mode(self, session):
        if self.session is not None:
            raise RuntimeError("TTT modes do not nest: leave the current write or read first")
        self.session = session
        hook = None
        if isinstance(session, Writer) and self.config.target == "input_embed":
            hook = self._decoder[0].get_input_embeddings().register_forward_hook(session.on_embeddings)
        try:
            yield session
        finally:
            self.session = None
            if hook is not None:
                hook.remove()

    def write(self, memory: Memory | None = None, differentiable: bool = False, form: str = "parallel"):
        """Context in which every forward of the model writes. Announce each call's tokens with `writer.expect(mask)`.

        Args:
            memory: what was written before; it is applied from the first token on, and the result continues it.
            differentiable: keep what was written so that `writer.memory()` carries gradients to the adapter.
            form: "parallel" (block-causal linear attention) or "sequential" (a running W, chunk after chunk: the oracle).
        Yields the Writer; after the context, `writer.memory()` flushes the last, partial chunk and returns the Memory.
        """
        return self._mode(Writer(self, memory, differentiable, form))

    def read(self, memory: Memory):
        """Context in which the model answers with `memory` attached; nothing is written.

        A batch of k times the memory's rows asks k neighbouring questions of each row (see LayerMemory.read).
        """
        return self._mode(Reader(self, memory))


def check_layers(decoder_layers, wanted) -> None:
    """Raise ValueError unless every wanted layer exists, is free, and has a gated MLP."""
    for i in wanted:
        if not 0 <= i < len(decoder_layers):
            raise ValueError(f"TTT config: layer {i} is out of range; this model has layers 0 to {len(decoder_layers) - 1}")
        mlp = decoder_layers[i].mlp
        if isinstance(mlp, TTTMLP):
            raise ValueError(f"TTT config: layer {i} already carries fast weights; detach() the other adapter first")
        missing = [name for name in ("gate_proj", "up_proj", "down_proj", "act_fn") if not hasattr(mlp, name)]
        if missing:
            raise ValueError(f"TTT config: layer {i} has an MLP without {', '.join(missing)}; only gated MLPs can be wrapped")


def check_memory(memory: Memory, owner: InPlaceTTT) -> None:
    if set(memory.layers) != set(owner.config.layers):
        raise ValueError(f"memory holds layers {sorted(memory.layers)}, the adapter has {sorted(owner.config.layers)}")


class Reader:
    """Adds a finished memory's share to each TTT layer's output."""

    def __init__(self, owner: InPlaceTTT, memory: Memory):
        check_memory(memory, owner)
        self.owner, self.memory = owner, memory

    def layer(self, index: int, x_BLD: torch.Tensor, h_BLF: torch.Tensor) -> torch.Tensor:
        return self.memory.layers[index].read(self.owner.fast[str(index)].query(x_BLD, h_BLF))


@dataclass
class Pending:
    """Tokens held as the target's source, the MLP's x and h, and the flags that keep pads and written tokens out, all [B, P, ...].

    real: not a pad. fresh: real and not yet in the folded memory (a few written tokens stay on as the conv's left context).
    position: how many real tokens of the row stand before this one.
    """

    source: torch.Tensor
    x: torch.Tensor
    h: torch.Tensor
    real: torch.Tensor
    fresh: torch.Tensor
    position: torch.Tensor

    def fields(self):
        return self.source, self.x, self.h, self.real, self.fresh, self.position

    def append(self, other: "Pending") -> "Pending":
        return Pending(*(torch.cat(pair, 1) for pair in zip(self.fields(), other.fields())))

    def keep(self, wanted_BS: torch.Tensor) -> "Pending":
        """Only the wanted tokens, moved to the right end; shorter rows get pads on the left."""
        width = int(wanted_BS.sum(1).max())
        column_BS = wanted_BS.to(torch.int8).argsort(dim=1, stable=True)[:, wanted_BS.shape[1] - width:]
        source, x, h, real, fresh, position = (pick_columns(t, column_BS) for t in self.fields())
        kept_BS = wanted_BS.gather(1, column_BS)
        return Pending(source, x, h, real & kept_BS, fresh & kept_BS, position)


def pick_columns(t: torch.Tensor, column_BS: torch.Tensor) -> torch.Tensor:
    """t [B, P, ...] gathered along its second dimension at column_BS [B, S]."""
    return t.gather(1, column_BS.reshape(*column_BS.shape, *[1] * (t.dim() - 2)).expand(-1, -1, *t.shape[2:]))


class Writer:
    """One text being written, over one or several forward calls (see InPlaceTTT.write)."""

    def __init__(self, owner: InPlaceTTT, memory: Memory | None, differentiable: bool, form: str):
        if form not in ("parallel", "sequential"):
            raise ValueError(f"form is {form!r}; use parallel or sequential")
        if memory is not None:
            check_memory(memory, owner)
        self.owner, self.start = owner, memory
        self.differentiable, self.form = differentiable, form
        self.done: dict[int, LayerMemory] = dict(memory.layers) if memory else {}
        self.pending: dict[int, Pending] = {}
        self.tokens_B: torch.Tensor | None = None
        self._real_BL = self._position_BL = self._embed_BLD = None
        self._passed: set[int] = set()  # layers that the announced call has been through

    def expect(self, mask_BL: torch.Tensor) -> None:
        """Say which tokens of the next forward call are real (1) and which are pads (0), [B, L]."""
        if self.form == "sequential" and self.tokens_B is not None:
            raise RuntimeError("the sequential form writes a text in one forward call; use parallel to go on")
        if self.start and self.start.batch != mask_BL.shape[0]:
            raise ValueError(f"a memory of {self.start.batch} rows cannot go on with a batch of {mask_BL.shape[0]}; use memory.select(rows)")
        self._real_BL, self._passed = mask_BL.bool(), set()
        before_B = torch.zeros_like(mask_BL[:, 0], dtype=torch.long) if self.tokens_B is None else self.tokens_B
        self._position_BL = (before_B[:, None] + self._real_BL.cumsum(1) - 1).clamp(min=0)
        self.tokens_B = before_B + self._real_BL.sum(1)

    def on_embeddings(self, module, inputs, output) -> None:
        self._embed_BLD = output

    def layer(self, index: int, x_BLD: torch.Tensor, h_BLF: torch.Tensor) -> torch.Tensor | None:
        if self._real_BL is None or self._real_BL.shape != x_BLD.shape[:2]:
            announced = None if self._real_BL is None else tuple(self._real_BL.shape)
            raise RuntimeError(f"a forward of {tuple(x_BLD.shape[:2])} tokens while writing, but expect() announced {announced}")
        if index in self._passed:
            raise RuntimeError("a second forward under one expect(); announce the tokens of every call")
        self._passed.add(index)
        fast = self.owner.fast[str(index)]
        source_BLD = x_BLD if self.owner.config.target == "hidden_states" else self._embed_BLD
        new = Pending(source_BLD, x_BLD, h_BLF, self._real_BL, self._real_BL, self._position_BL)
        if self.form == "sequential":
            return self._sequential(index, fast, new)
        held = self.pending[index].append(new) if index in self.pending else new
        share_BLD = self._visible_share(index, fast, held, new)
        whole = self.differentiable or self.owner.config.rule == "ridge"  # ridge solves for all of the text at its end
        self.pending[index] = held if whole else self._fold(index, fast, held)
        return share_BLD

    def _visible_share(self, index: int, fast: FastWeight, held: Pending, new: Pending) -> torch.Tensor | None:
        """What finished chunks add to this call's outputs: block-causal linear attention, no D x F matrix per chunk."""
        chunk = self.owner.config.chunk
        if chunk is None:  # one chunk for the whole text: nothing of it is finished before it ends
            return self.start.layers[index].read(fast.query(new.x, new.h)) if self.start else None
        query_BLF, key_BSF = fast.query(new.x, new.h), fast.key(held.x, held.h)
        value_BSD = fast.value(held.source, held.position, held.real) * held.fresh.unsqueeze(-1)
        visible_BLS = chunk_of(held.position, chunk)[:, None, :] < chunk_of(new.position, chunk)[:, :, None]
        score_BLS = (query_BLF @ key_BSF.transpose(1, 2)).to(value_BSD.dtype) * visible_BLS
        share_BLD = score_BLS @ value_BSD
        return share_BLD + self.done[index].read(query_BLF) if index in self.done else share_BLD

    def _fold(self, index: int, fast: FastWeight, held: Pending) -> Pending:
        """Move the tokens whose value can no longer change into the memory; return what must still be held.

        A value is settled once its chunk is over; in the whole-text chunk, whose memory is not applied before the end,
        as soon as the right half of the conv stands behind it.
        """
        chunk, reach = self.owner.config.chunk, self.owner.config.kernel // 2
        open_from_B = (self.tokens_B - reach).clamp(min=0) if chunk is None else self.tokens_B // chunk * chunk
        settled_BS = held.fresh & (held.position < open_from_B[:, None])
        self._add(index, self._sum(fast, held, settled_BS))
        rest = Pending(held.source, held.x, held.h, held.real, held.fresh & ~settled_BS, held.position)
        return rest.keep(held.real & (held.position >= (open_from_B - reach)[:, None]))

    def _add(self, index: int, update: LayerMemory) -> None:
        self.done[index] = self.done[index].plus(update) if index in self.done else update
        if not self.differentiable:
            self.done[index] = self.done[index].smaller_form()

    def _sum(self, fast: FastWeight, held: Pending, chosen_BS: torch.Tensor) -> LayerMemory:
        """Hebbian: the outer products of the chosen tokens."""
        value_BSD = fast.value(held.source, held.position, held.real) * chosen_BS.unsqueeze(-1)
        return LayerMemory.factored(fast.key(held.x, held.h), value_BSD)

    def _solve(self) -> dict[int, LayerMemory]:
        """Ridge: what the held text adds to each layer, all layers in one batched solve."""
        fasts = {index: self.owner.fast[str(index)] for index in self.pending}
        keys = {index: fasts[index].key(held.x, held.h) for index, held in self.pending.items()}
        scaled = {index: fasts[index].scaled(held.source) for index, held in self.pending.items()}
        wanted = {index: fasts[index].content(scaled[index], held.position, held.real) for index, held in self.pending.items()}
        for index in self.start.layers if self.start else ():  # only what the memory does not answer already
            wanted[index] = wanted[index] - self.done[index].read(keys[index])
        weights = {index: fasts[index].strength(scaled[index]) * held.fresh for index, held in self.pending.items()}
        ridges = {index: fasts[index].ridge() for index in fasts}
        return {index: LayerMemory.factored(keys[index], value) for index, value in fit(keys, wanted, weights, ridges).items()}

    def _sequential(self, index: int, fast: FastWeight, new: Pending) -> torch.Tensor:
        """The oracle: row by row, chunk after chunk, a running dense update; its own plain conv1d."""
        before = self.start.layers[index].to_dense() if self.start else None
        rows, updates = [], []
        for b in range(new.x.shape[0]):
            real = new.real[b].nonzero()[:, 0]
            source_LD, x_LD, h_LF = new.source[b, real], new.x[b, real], new.h[b, real]
            key_LF, query_LF = fast.key(x_LD, h_LF), fast.query(x_LD, h_LF)
            update_DF = before.update[b] if before else fast.conv.new_zeros(x_LD.shape[1], key_LF.shape[1])
            share_LD = torch.zeros(new.x.shape[1], x_LD.shape[1], dtype=update_DF.dtype, device=x_LD.device)
            for tokens in torch.arange(len(real), device=real.device).split(self.owner.config.chunk or max(len(real), 1)):
                share_LD[real[tokens]] = query_LF[tokens].to(update_DF.dtype) @ update_DF.T
                update_DF = update_DF + fast.chunk_update(source_LD[tokens], key_LF[tokens].to(update_DF.dtype), update_DF)
            rows.append(share_LD)
            updates.append(update_DF)
        self.done[index] = LayerMemory.dense(torch.stack(updates))
        return torch.stack(rows)

    def memory(self) -> Memory:
        """Flush the last, partial chunk and return everything written, one row per batch row.

        Call it once, after the context; with `differentiable` and gradients enabled it is a function of the adapter.
        """
        if self._passed != set(self.owner.config.layers):
            raise RuntimeError("nothing was written: no forward ran inside the write context")
        if self.owner.config.rule == "ridge" and self.pending:  # the sequential form has solved already
            rest = self._solve()
        else:
            rest = {index: self._sum(self.owner.fast[str(index)], held, held.fresh) for index, held in self.pending.items()}
        for index, update in rest.items():
            self._add(index, update)
        self.pending = {}
        chunk = self.owner.config.chunk
        chunks_B = (self.tokens_B > 0).long() if chunk is None else -(-self.tokens_B // chunk)
        tokens_B = self.tokens_B
        if self.start:
            tokens_B, chunks_B = tokens_B + self.start.tokens, chunks_B + self.start.chunks
        norms = {i: self.owner.down_norm(i) for i in self.done}
        return Memory(dict(sorted(self.done.items())), tokens_B, chunks_B, norms)
