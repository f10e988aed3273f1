"""What happens inside `InPlaceTTT.write` and `InPlaceTTT.read`: the Writer makes a memory of a text, the Reader answers with one.

The formulas and shape letters are those at the head of in_place_ttt.py.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fixed_cache import FixedPair
from fast_weight import FastWeight, Slots, chunk_of, fit, limited, whole_or_long, write_bias, writes
from lean import again
from memory import LayerMemory, Memory, expand, leading, meets, pick_columns
from side_stream import distance_bias, unit_rms


def check_memory(memory: Memory, owner) -> None:
    if set(memory.layers) != set(owner.config.layers):
        raise ValueError(f"memory holds layers {sorted(memory.layers)}, the adapter has {sorted(owner.config.layers)}")


class Reader:
    """Adds a finished memory's share to each TTT layer's output (see InPlaceTTT.read).

    With read attention a question's tokens also look back at each other: all that is read in one context is the question,
    and each of its forward calls is announced with `expect`.
    """

    ends = None  # the layer after which nothing is read; see Writer
    long_calls = False  # the read attention looks at every pair of a call's tokens and those before

    def __init__(self, owner, memory: Memory, watch_BL: torch.Tensor | None = None):
        check_memory(memory, owner)
        self.owner, self.memory, self.watch_BL = owner, memory, watch_BL
        self.queries: dict[int, torch.Tensor] = {}
        self.needs_embeddings = owner.config.deep
        base = owner.down_proj(owner.config.layers[0]).weight.dtype
        # training, which differentiates through the memory, reads it as it is, in float32; a base in bfloat16 rounds what it is given to it anyway
        answers = not torch.is_grad_enabled()
        self.dtype = torch.bfloat16 if base == torch.bfloat16 and answers else torch.float32
        ready = {index: layer.ready(self.dtype) for index, layer in memory.layers.items()}
        self._layers = {index: layer.aligned() for index, layer in ready.items()} if answers else ready
        self._leads = {index: owner.fast[str(index)].lead(owner.streams["read"].inject(index)) for index in owner.config.layers} if owner.config.deep else {}
        self._stream_BLZ = None  # the read stream's state behind the last TTT layer of the call
        self._seen: dict[int, tuple | FixedPair] = {}  # the read attention's keys and values by layer
        self._real_BT = self._bias_BHLT = None
        self._column: torch.Tensor | None = None  # where the announced token goes, once there is fixed room

    def expect(self, mask_BL: torch.Tensor, position_BL: torch.Tensor | None = None, visible_BLL: torch.Tensor | None = None) -> None:
        """Say which tokens of the next forward call are real (1) and which are pads (0), [B, L].

        position and visible are for packed rows, read in one call: each token's place in its question, and what it may look at.
        """
        if not self.owner.config.read_attention:
            return
        if self._column is not None:
            self._column += 1
            self._real_BT.index_copy_(1, self._column, mask_BL.bool())
            position_BT = self._real_BT.cumsum(1)
            self._make_bias(position_BT.index_select(1, self._column), position_BT, self._real_BT[:, None, :])
            return
        before = 0 if self._real_BT is None else self._real_BT.shape[1]
        self._real_BT = mask_BL.bool() if before == 0 else torch.cat([self._real_BT, mask_BL.bool()], 1)
        position_BT = self._real_BT.cumsum(1) if position_BL is None else position_BL
        if visible_BLL is None:
            order = torch.arange(self._real_BT.shape[1], device=mask_BL.device)
            visible_BLL = self._real_BT[:, None, :] & (order[None, :] <= order[before:, None])
        own_LT = torch.eye(position_BT.shape[1], dtype=torch.bool, device=mask_BL.device)[before:]  # for pads: something to look at
        self._make_bias(position_BT[:, before:], position_BT, visible_BLL | own_LT)

    def _make_bias(self, position_BL: torch.Tensor, position_BT: torch.Tensor, visible_BLT: torch.Tensor) -> None:
        dtype = self.owner.down_proj(self.owner.config.layers[0]).weight.dtype
        self._bias_BHLT = distance_bias(position_BL, position_BT, visible_BLT, self.owner.config.read_attention, dtype)

    def fix(self, room: int) -> None:
        """From here on every call brings one token a row, `room` calls at most, and what they leave is kept in place."""
        if not self.owner.config.read_attention:
            return
        if self._real_BT is None:
            raise RuntimeError("an answer is to begin before its question was read; arms with read attention need it")
        self._column = torch.tensor([self._real_BT.shape[1] - 1], device=self._real_BT.device)
        self._real_BT = torch.nn.functional.pad(self._real_BT, (0, room))
        self._seen = {index: FixedPair(*seen, room, self._column) for index, seen in self._seen.items()}

    def on_embeddings(self, module, inputs, output) -> None:
        self._stream_BLZ = self.owner.streams["read"].begin(self.owner.fast[str(self.owner.config.layers[0])].scaled(output))

    def layer(self, index: int, x_BLD: torch.Tensor, h_BLF: torch.Tensor) -> torch.Tensor:
        fast, opening_BL = self.owner.fast[str(index)], None
        x_BLD = fast.scaled(x_BLD)
        if self.owner.config.deep:
            query_BLF, opening_BL = self._deep_query(index, fast, x_BLD)
        elif self.owner.config.read_attention:
            asked_BLZ, self._seen[index] = fast.look_back(x_BLD, self._bias_BHLT, self._announced(index, x_BLD))
            query_BLF = fast.informed_query(x_BLD, asked_BLZ)
        else:
            query_BLF = fast.query(x_BLD, h_BLF)
        if self.watch_BL is not None:
            self.queries[index] = query_BLF[self.watch_BL].to(h_BLF.dtype)  # as the keys are
        return fast.taken(x_BLD, self._layers[index].read(query_BLF, self.dtype), opening_BL)

    def _announced(self, index: int, x_BLD: torch.Tensor) -> tuple | FixedPair | None:
        """What was seen in the calls before; RuntimeError for a call that was not announced."""
        seen = self._seen.get(index)
        length = seen.keys.shape[2] if isinstance(seen, FixedPair) else x_BLD.shape[1] + (seen[0].shape[2] if seen else 0)
        if self._bias_BHLT is None or self._bias_BHLT.shape[2:] != (x_BLD.shape[1], length):
            raise RuntimeError("a forward while reading that expect() did not announce; arms with read attention need it")
        return seen

    def _deep_query(self, index: int, fast: FastWeight, x_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(queries, the read gate's logits): what x is multiplied with for stream, query and gate is one product."""
        seen, stream = self._announced(index, x_BLD), self.owner.streams["read"]
        injected_BLZ, coded_BLK, *opening = fast.led(x_BLD, self._leads[index])
        self._stream_BLZ, self._seen[index] = stream(index, self._stream_BLZ, injected_BLZ, self._bias_BHLT, seen)
        return fast.led_query(coded_BLK, unit_rms(self._stream_BLZ)), opening[0].squeeze(-1) if opening else None


@dataclass
class Pending:
    """Tokens held as the target's source, the MLP's x and h (x again for codes, which are made of x alone), and the flags that keep pads and written tokens out, all [B, P, ...].

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

    def keep(self, wanted_BS: torch.Tensor) -> "Pending":
        """Only the wanted tokens, moved to the right end; shorter rows get pads on the left."""
        width = int(wanted_BS.sum(1).max())
        column_BS = wanted_BS.to(torch.int8).argsort(dim=1, stable=True)[:, wanted_BS.shape[1] - width:]
        source, x, h, real, fresh, position = (pick_columns(t, column_BS) for t in self.fields())
        kept_BS = wanted_BS.gather(1, column_BS)
        return Pending(source, x, h, real & kept_BS, fresh & kept_BS, position)


def joined(parts: dict[int, list[Pending]]) -> dict[int, Pending]:
    """The parts of each layer's text as one. What several layers or fields share (the target's source, the flags) is joined once, for all of them."""
    made: dict[tuple, torch.Tensor] = {}

    def join(*tensors: torch.Tensor) -> torch.Tensor:
        name = tuple(map(id, tensors))
        if name not in made:
            made[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)
        return made[name]

    return {index: Pending(*map(join, *(part.fields() for part in some))) for index, some in parts.items()}


class Writer:
    """One text being written, over one or several forward calls (see InPlaceTTT.write)."""

    def __init__(self, owner, memory: Memory | None, differentiable: bool, form: str, dropped: bool = False):
        if form not in ("parallel", "sequential"):
            raise ValueError(f"form is {form!r}; use parallel or sequential")
        if memory is not None:
            check_memory(memory, owner)
        self.owner, self.start = owner, memory
        self.needs_embeddings = owner.config.target != "hidden_states"
        self.differentiable, self.form = differentiable, form
        self.ends = max(owner.config.layers) if dropped and owner.config.codes and form == "parallel" else None
        self.long_calls = owner.config.chunk is None  # chunks are read within a call pair by pair; a whole text's tokens are only kept until its end
        self.done: dict[int, LayerMemory] = dict(memory.layers) if memory else {}
        self._parts: dict[int, list[Pending]] = {}  # of each layer, call by call
        self._made: dict[int, torch.Tensor] = {}    # contents that a differentiable write of chunks has made of all tokens so far, for those that read finished chunks
        self.slots: Slots | None = None  # layer by layer in order: [layers, B, ...], of the tokens held until memory(): all, but for chunks without gradients
        self.wanted: dict[int, tuple[LayerMemory, torch.Tensor]] = {}  # likewise: each layer's keys with what they are to answer, and the strength [B, S] of each
        self.tokens_B: torch.Tensor | None = None
        self._real_BL = self._position_BL = self._embed_BLD = None
        self._passed: set[int] = set()  # layers that the announced call has been through
        self._streams: dict[int, torch.Tensor] = {}  # sequential form: the write stream's state by row, behind the last layer

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
        kept_h = x_BLD if self.owner.config.codes else h_BLF
        new = Pending(source_BLD, x_BLD, kept_h, self._real_BL, self._real_BL, self._position_BL)
        if self.form == "sequential":
            return self._sequential(index, fast, new)
        self._parts.setdefault(index, []).append(new)
        config = self.owner.config
        # ridge solves for all of the text at its end, and attention over an unfinished chunk is not settled before that
        whole = self.differentiable or config.rule == "ridge" or (config.write_attention and config.chunk is None)
        if config.chunk is None:  # one chunk for the whole text: nothing of it is finished before it ends
            share_BLD = fast.read(self.start.layers[index], new.x, new.h) if self.start and not config.blind else None
        else:
            share_BLD = self._visible_share(index, fast, self._held(index), new)
        if not whole:
            self._parts[index] = [self._fold(index, fast, self._held(index))]
        return share_BLD

    def _held(self, index: int) -> Pending:
        held = joined({index: self._parts[index]})[index]
        self._parts[index] = [held]
        return held

    @property
    def pending(self) -> dict[int, Pending]:
        """The tokens held so far, by layer. A long text's parts are joined here, at its end: with each call would copy them over and over."""
        self._parts = {index: [one] for index, one in joined(self._parts).items()}
        return {index: one for index, (one,) in self._parts.items()}

    def _visible_share(self, index: int, fast: FastWeight, held: Pending, new: Pending) -> torch.Tensor | None:
        """What finished chunks add to this call's outputs: block-causal linear attention, no D x F matrix per chunk.

        Of it the backward pass is left x, h and the contents. The rest, in float32 and with a conv's taps, would be four times what another layer keeps,
        and takes no large product to make again but the score.
        """
        chunk, before = self.owner.config.chunk, self.done.get(index)

        def share(content_BSD: torch.Tensor) -> torch.Tensor:
            x_BLD, slots = fast.scaled(new.x), fast.slots(held)
            query_BLF = fast.query(x_BLD, new.h)
            value_BSD = self._limited(index, held, slots.keys, content_BSD * (slots.weights * held.fresh).unsqueeze(-1))
            visible_BLS = chunk_of(held.position, chunk)[:, None, :] < chunk_of(new.position, chunk)[:, :, None]
            score_BLS = meets(query_BLF, slots.keys, fast.sizes).to(value_BSD.dtype) * visible_BLS
            share_BLD = score_BLS @ value_BSD
            if before is not None:
                share_BLD = share_BLD + before.read(query_BLF)
            return fast.taken(x_BLD, share_BLD)

        content_BSD = fast.value_unit * again(lambda: fast.projected(held))  # the unit stands outside: what comes behind P's product would have it made again
        if self.differentiable:
            self._made[index] = content_BSD.detach()
        return again(share, content_BSD)

    def _limited(self, index: int, held: Pending, key_BSK: torch.Tensor, value_BSD: torch.Tensor) -> torch.Tensor:
        """A layer's values of the held tokens, such that no chunk of them changes it by more than the limit, where there is one."""
        config, fast = self.owner.config, self.owner.fast[str(index)]
        if config.clip is None:
            return value_BSD
        return limited(value_BSD, key_BSK, chunk_of(held.position, config.chunk), config.clip * self.owner.down_norms[index], fast.sizes)

    def _fold(self, index: int, fast: FastWeight, held: Pending) -> Pending:
        """Move the tokens whose value can no longer change into the memory; return what must still be held.

        A value is settled once its chunk is over; in the whole-text chunk, whose memory is not applied before the end,
        as soon as the right half of the conv stands behind it.
        """
        chunk, reach = self.owner.config.chunk, self.owner.config.kernel // 2
        open_from_B = (self.tokens_B - reach).clamp(min=0) if chunk is None else self.tokens_B // chunk * chunk
        settled_BS = held.fresh & (held.position < open_from_B[:, None])
        self._add(index, self._sum(index, fast, held, settled_BS))
        rest = Pending(held.source, held.x, held.h, held.real, held.fresh & ~settled_BS, held.position)
        return rest.keep(held.real & (held.position >= (open_from_B - reach)[:, None]))

    def _add(self, index: int, update: LayerMemory) -> None:
        self.done[index] = self.done[index].plus(update) if index in self.done else update
        if not self.differentiable:
            self.done[index] = self.done[index].smaller_form()

    def _sum(self, index: int, fast: FastWeight, held: Pending, chosen_BS: torch.Tensor, content_BSD: torch.Tensor | None = None) -> LayerMemory:
        """Hebbian: the outer products of the chosen tokens. content: of all that are held, where the caller has it."""
        slots = fast.slots(held)
        content_BSD = fast.contents(held) if content_BSD is None else content_BSD
        value_BSD = self._limited(index, held, slots.keys, content_BSD * (slots.weights * chosen_BS).unsqueeze(-1))
        update = LayerMemory.factored(slots.keys, value_BSD, sizes=fast.sizes)
        return update if self.differentiable or not self.owner.config.sparse else update.where(slots.weights * chosen_BS > 0)

    def _stream(self, index: int, before_BSZ: torch.Tensor | None, held: Pending, bias_BHSS: torch.Tensor | None = None) -> torch.Tensor:
        """The write stream behind a layer, [B, S, Z]; `before` is None at the first layer."""
        stream, fast = self.owner.streams["write"], self.owner.fast[str(index)]
        before_BSZ = stream.begin(fast.scaled(held.source)) if before_BSZ is None else before_BSZ
        injected_BSZ = fast.scaled(held.x) @ stream.inject(index)
        return stream(index, before_BSZ, injected_BSZ, write_bias(held, self.owner.config) if bias_BHSS is None else bias_BHSS)[0]

    def _layers_at_once(self, pending: dict[int, Pending]):
        """of_layers(method, alike, by_layer): what the FastWeights' method gives for the held tokens, for all layers. alike and by_layer: the
        method's other arguments, one for all layers or with the layers as first dimension; so are the results.

        A differentiable write does it in one batched pass, since layers differ in their numbers only. Without gradients nothing of a layer need
        stay, so they go one after the other: a long text's attention is large, and nothing is copied to lie side by side.
        """
        config, fasts, helds = self.owner.config, [self.owner.fast[str(index)] for index in pending], list(pending.values())

        def in_turn(method: str, alike: dict, by_layer: dict):
            found = [getattr(fast, method)(held, **alike, **{name: t[n] for name, t in by_layer.items()}) for n, (fast, held) in enumerate(zip(fasts, helds))]
            return Slots(*map(torch.stack, zip(*found))) if isinstance(found[0], Slots) else torch.stack(found)

        if not self.differentiable:
            return in_turn
        tensors = [{name: t for name, t in (*fast.named_parameters(), *fast.named_buffers()) if writes(name)} for fast in fasts]
        numbers = {name: torch.stack([t[name] for t in tensors]) for name in tensors[0]}
        stacked = lambda name: torch.stack([getattr(held, name) for held in helds])
        x = stacked("x")
        inputs = {"x": x, "h": x if config.codes else stacked("h")} | ({"source": x} if config.target == "hidden_states" else {})

        def of_layers(method: str, alike: dict, by_layer: dict):
            of_one = lambda numbers, inputs, own: torch.func.functional_call(fasts[0], numbers, (method, replace(helds[0], **inputs)), alike | own)
            return torch.vmap(of_one)(numbers, inputs, by_layer)

        return of_layers

    def _flush(self, pending: dict[int, Pending], group: int) -> dict[int, LayerMemory]:
        """What the tokens still held (pending) add to each layer."""
        config, held, at_once = self.owner.config, next(iter(pending.values())), self._layers_at_once(pending)
        # of the tokens, so alike in all layers; a differentiable write keeps it for the backward pass anyway
        bias_BHSS = write_bias(held, config) if self.differentiable else whole_or_long(held, config)
        around, at = {}, {}
        if config.deep:
            states = [None]
            for index, one in pending.items():
                states.append(self._stream(index, states[-1], one, bias_BHSS))
            around = {"around_BSZ": unit_rms(torch.stack(states[1:]))}
        slots = at_once("slots", {} if config.deep else {"bias_BHSS": bias_BHSS}, around)
        self.slots = slots
        weights, keys = slots.weights * held.fresh, slots.keys
        if config.sparse:  # what has no strength leaves no slot, nor a row in the solve; there is no gradient through it either
            width = max(1, int((weights > 0).sum(-1).max()))
            column_NC = leading((weights > 0).flatten(0, 1), width)
            keys, weights = (pick_columns(t.flatten(0, 1), column_NC).unflatten(0, t.shape[:2]) for t in (keys, weights))
            at = {"column_BC": column_NC.unflatten(0, slots.weights.shape[:2])}
        contents = at_once("contents", {}, at)
        side_by_side = lambda t: t.unflatten(1, (-1, group)).flatten(2, 3)
        keys, contents, weights = (side_by_side(t) for t in (keys, contents, weights))
        of_layers = lambda values: {index: LayerMemory.factored(k, v, sizes=self.owner.fast[str(index)].sizes)
                                    for index, k, v in zip(pending, keys, values)}
        asked = of_layers(contents)
        self.wanted = {index: (layer, w) for (index, layer), w in zip(asked.items(), weights)} if self.differentiable else {}
        if config.rule == "hebbian":
            values = contents * weights.unsqueeze(-1)
            return of_layers([self._limited(index, held, k, v) for index, k, v in zip(pending, keys, values)])
        return self._solve(asked, {index: w / self.owner.fast[str(index)].ridge() for index, w in zip(pending, weights)})

    def _solve(self, updates: dict[int, LayerMemory], trust: dict[int, torch.Tensor]) -> dict[int, LayerMemory]:
        """Ridge: the values that answer the updates' contents at their keys, and all that the memory before still knows the targets of.

        Where it does (it is not dense, cut or summed), old and new slots are solved for together: in a blind arm the order of
        texts then does not matter. Else the new ones are solved for what it does not answer already.
        """
        for index in self.start.layers if self.start else ():
            old, new = self.done[index], updates[index]
            if old.trust is None:
                updates[index] = replace(new, values=new.values - old.read(new.keys))
            else:
                updates[index] = replace(new, keys=torch.cat([old.keys, new.keys], 1), values=torch.cat([old.targets(), new.values], 1))
                trust[index] = torch.cat([old.trust[..., 0], trust[index]], 1)
                del self.done[index]  # its slots are among the new ones
        solved = fit(updates, trust)
        return {i: replace(update, values=solved[i], trust=trust[i].unsqueeze(-1)) for i, update in updates.items()}

    def _sequential(self, index: int, fast: FastWeight, new: Pending) -> torch.Tensor:
        """The oracle: row by row, chunk after chunk, a running dense update; its own plain conv1d."""
        old, feed_forward = self.start.layers[index] if self.start else None, self.owner.down_proj(index).in_features
        rows, updates = [], []
        for b in range(new.x.shape[0]):
            real = new.real[b].nonzero()[:, 0]
            row = Pending(*(t[b:b + 1, real] for t in new.fields()))
            update_DF, known_FF = (fast.conv.new_zeros(height, feed_forward) for height in (row.x.shape[2], feed_forward))
            if old is not None:
                update_DF = old.to_dense().update[b]
            if old is not None and old.trust is not None:
                key_SF = old.full_keys()[b].to(update_DF.dtype)
                known_FF = (key_SF * old.trust[b]).T @ key_SF
            share_LD = torch.zeros(new.x.shape[1], row.x.shape[2], dtype=update_DF.dtype, device=row.x.device)
            for tokens in torch.arange(len(real), device=real.device).split(self.owner.config.chunk or max(len(real), 1)):
                chunk = Pending(*(t[:, tokens] for t in row.fields()))
                if not self.owner.config.blind:
                    x_CD = fast.scaled(chunk.x[0])
                    met_LD = expand(fast.query(x_CD, chunk.h[0]), fast.sizes).to(update_DF.dtype) @ update_DF.T
                    share_LD[real[tokens]] = fast.taken(x_CD, met_LD)
                around_BSZ = None
                if self.owner.config.deep:  # blind, so the text is this one chunk
                    self._streams[b] = self._stream(index, self._streams.get(b), chunk)
                    around_BSZ = unit_rms(self._streams[b])
                change_DF = fast.chunk_update(chunk, update_DF, known_FF, around_BSZ)
                if self.owner.config.clip is not None:
                    change_DF = change_DF * (self.owner.config.clip * self.owner.down_norms[index] / change_DF.norm()).clamp(max=1)
                update_DF = update_DF + change_DF
            rows.append(share_LD)
            updates.append(update_DF)
        self.done[index] = LayerMemory.dense(torch.stack(updates), fast.sizes)
        return torch.stack(rows)

    def memory(self, group: int = 1) -> Memory:
        """Flush the last, partial chunk and return everything written, one row per batch row.

        Call it once, after the context; with `differentiable` and gradients enabled it is a function of the adapter.
        group: so many neighbouring rows become one memory, as if written side by side; only for a fresh text in one chunk.
        """
        if self._passed != set(self.owner.config.layers):
            raise RuntimeError("nothing was written: no forward ran inside the write context")
        if group > 1 and (self.start or self.owner.config.chunk is not None):
            raise RuntimeError("only fresh texts of one chunk can be written side by side")
        pending = self.pending
        self._parts = {}
        for index, update in (self._flush(pending, group) if pending else {}).items():  # the sequential form has nothing pending
            self._add(index, update)
        return self._finished(group)

    def made(self) -> Memory:
        """memory() of a differentiable write of chunks, without gradients: what finished chunks were read from, of all tokens, and so not made again
        (slots and wanted, which memory() leaves, are not there). Of a text in one chunk nothing is read back, so it is made here."""
        with torch.no_grad():
            if not self._made:
                return self.memory()
            for index, content_BSD in self._made.items():
                held = self._held(index)
                self._add(index, self._sum(index, self.owner.fast[str(index)], held, held.fresh, content_BSD))
        return self._finished()

    def _finished(self, group: int = 1) -> Memory:
        chunk = self.owner.config.chunk
        chunks_B = (self.tokens_B > 0).long() if chunk is None else -(-self.tokens_B // chunk)
        tokens_B = self.tokens_B
        if self.start:
            tokens_B, chunks_B = tokens_B + self.start.tokens, chunks_B + self.start.chunks
        if group > 1:
            tokens_B, chunks_B = (t.reshape(-1, group).sum(1) for t in (tokens_B, chunks_B))
        norms = {i: self.owner.down_norms[i] for i in self.done}
        return Memory(dict(sorted(self.done.items())), tokens_B, chunks_B, norms)
