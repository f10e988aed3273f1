"""The memory object: what writing leaves behind in each TTT layer, and everything one may do with it.

A layer's memory is the update dW = sum_i v_i (x) k_i. It is kept factored (keys [B, S, F] and values [B, S, D]) while that is
smaller than the dense update [B, D, F], and dense after; both read the same answers. Keys and queries that are products of two
codes, k = a (x) b with a of A and b of F / A numbers, come as the codes side by side, K = A + F / A numbers in place of F.

A sum over slots is what a weight can hold: a query gets from each slot as much as it meets its key. A memory whose slots are kept can also be read
slot by slot (Memory.sharp): the same bytes, and no update of W_down any more, but softmax attention over what was written.
"""
from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from side_stream import unit_rms
from tensor_files import save_tensors


MOST_ROWS = 1_000_000  # of a memory file: no batch has as many, and a file that claims more is refused before anything of it is read
ALIGNED = 8  # slots: a row of so many bfloat16 numbers fills the 16 bytes on which a GPU's fast matrix products want rows to begin
ASKED_AT_ONCE = 512  # of a memory's own keys: all of a long text's, each met by each, are more numbers than the text
FORMS = ({"update"}, {"keys", "values"}, {"keys", "values", "trust"})  # what a layer of a memory file may hold


class Sharp(NamedTuple):
    """How slots are read one by one: softmax over beta q k_i, beside a slot that holds nothing and is met by `floor`. opened: values are by now what the
    slots were solved for."""

    beta: float
    floor: float
    opened: bool = False


SHARP = Sharp(20.0, 0.5)  # chosen on conversations of the bank's dev split, where it reads as well as the sum does


class MemoryFileError(ValueError):
    """A memory file that cannot be used; the message names the file and the mend."""


def unit(h: torch.Tensor) -> torch.Tensor:
    """h on the unit sphere along its last dimension, in h's dtype; a zero vector stays zero."""
    wide = h if h.dtype == torch.float64 else h.float()
    return (unit_rms(wide) * h.shape[-1] ** -0.5).to(h.dtype)


def pick_columns(t: torch.Tensor, column_BS: torch.Tensor) -> torch.Tensor:
    """t [B, P, ...] gathered along its second dimension at column_BS [B, S]."""
    return t.gather(1, column_BS.reshape(*column_BS.shape, *[1] * (t.dim() - 2)).expand(-1, -1, *t.shape[2:]))


def leading(wanted_BS: torch.Tensor, width: int) -> torch.Tensor:
    """Columns [B, width] of a row's wanted entries in order, then of others."""
    return (~wanted_BS).to(torch.int8).argsort(dim=1, stable=True)[:, :width]


def expand(t: torch.Tensor, sizes: tuple[int, int] | None) -> torch.Tensor:
    """Keys or queries at their full width F: the outer product of codes [..., A + F / A]; anything else as it is."""
    if sizes is None or t.shape[-1] != sum(sizes):
        return t
    first, second = t.split(sizes, -1)
    return (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)


def meets(query_BMK: torch.Tensor, key_BSK: torch.Tensor, sizes: tuple[int, int] | None) -> torch.Tensor:
    """Inner products of queries and keys, [B, M, S]. Of codes without their outer products: q k = (a_q a_k) (b_q b_k)."""
    if sizes is None or query_BMK.shape[-1] != sum(sizes) or key_BSK.shape[-1] != sum(sizes):
        return expand(query_BMK, sizes).to(key_BSK.dtype) @ expand(key_BSK, sizes).transpose(-1, -2)
    (query_a, query_b), (key_a, key_b) = (t.split(sizes, -1) for t in (query_BMK, key_BSK))
    return (query_a @ key_a.transpose(-1, -2)) * (query_b @ key_b.transpose(-1, -2))


def times(key_BSK: torch.Tensor, factor_BS: torch.Tensor, sizes: tuple[int, int] | None) -> torch.Tensor:
    """Each key times its factor; of codes the first one takes it."""
    codes = (key_BSK,) if sizes is None or key_BSK.shape[-1] != sum(sizes) else key_BSK.split(sizes, -1)
    return torch.cat([codes[0] * factor_BS.unsqueeze(-1), *codes[1:]], -1)


def attended(met_BMS: torch.Tensor, held_BS: torch.Tensor, sharp: Sharp) -> torch.Tensor:
    """Softmax weights of the slots that hold something by how well queries meet them, the slot that holds nothing left out, [B, M, S], in float32 at least: a
    query that meets no slot by more than the floor reads next to nothing."""
    logits_BMS = sharp.beta * (met_BMS.to(torch.promote_types(met_BMS.dtype, torch.float32)) - sharp.floor)
    logits_BMS = logits_BMS.masked_fill(~held_BS[:, None], -torch.inf)
    return torch.softmax(torch.nn.functional.pad(logits_BMS, (0, 1)), -1)[..., :-1]


@dataclass(frozen=True)
class LayerMemory:
    """One layer's update for B rows: either `keys` and `values`, or `update`. Values and updates are float32 (or float64); kept in half
    precision (half) they are read in float32.

    trust: of values that ridge solved for, w_i / lambda of each slot, 0 of an empty one. It is what a later text needs to solve
    for both at once, since a slot's target is dW k_i + v_i / trust_i. A sum, a cut, a scaled, a half or a dense form of a memory has lost it.
    sizes: (A, F / A) where queries are codes; keys then are codes too, or at full width after a cut to a rank.
    sharp: read slot by slot and not as a sum.
    """

    keys: torch.Tensor | None = None      # [B, S, F] or [B, S, K], dtype of the model
    values: torch.Tensor | None = None    # [B, S, D]
    trust: torch.Tensor | None = None     # [B, S, 1]
    update: torch.Tensor | None = None    # [B, D, F]
    sizes: tuple[int, int] | None = None
    sharp: Sharp | None = None

    @classmethod
    def factored(cls, keys_BSF: torch.Tensor, values_BSD: torch.Tensor, trust_BS1: torch.Tensor | None = None, sizes=None) -> "LayerMemory":
        return cls(keys=keys_BSF, values=values_BSD, trust=trust_BS1, sizes=sizes)

    @classmethod
    def dense(cls, update_BDF: torch.Tensor, sizes=None) -> "LayerMemory":
        return cls(update=update_BDF, sizes=sizes)

    @property
    def is_dense(self) -> bool:
        return self.update is not None

    @property
    def batch(self) -> int:
        return (self.update if self.is_dense else self.values).shape[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        if self.is_dense:
            return {"update": self.update}
        return {"keys": self.keys, "values": self.values} | ({} if self.trust is None else {"trust": self.trust})

    def map(self, function) -> "LayerMemory":
        return replace(self, **{name: function(t) for name, t in self.tensors().items()})

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.update.shape[1] if self.is_dense else self.values.shape[2]

    @property
    def feed_forward(self) -> int:
        """F."""
        if self.is_dense:
            return self.update.shape[2]
        return self.sizes[0] * self.sizes[1] if self.sizes else self.keys.shape[2]

    def full_keys(self) -> torch.Tensor:
        """[B, S, F], whether or not they are kept as codes."""
        return expand(self.keys, self.sizes)

    def row_nbytes(self) -> torch.Tensor:
        """Bytes of each row, [B], int64; a slot whose value is zero is none."""
        each = sum(t.shape[2:].numel() * t.element_size() for t in self.tensors().values())  # of a slot, or of a line of a dense update
        return each * (torch.full((self.batch,), self.update.shape[1], device=self.update.device) if self.is_dense else (self.values != 0).any(-1).sum(1))

    def read(self, query_NLF: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """query dW^T, [N, L, F] (or codes, [N, L, K]) -> [N, L, D]. dtype: see ready.

        N is a multiple of the memory's B rows: N / B neighbouring queries share one row without a copy of it.
        """
        if query_NLF.shape[0] % self.batch:
            raise ValueError(f"a memory of {self.batch} rows cannot serve a batch of {query_NLF.shape[0]}; use memory.select(rows)")
        query_BMF, wide = query_NLF.reshape(self.batch, -1, query_NLF.shape[2]), self.ready(dtype)
        if self.is_dense:
            out_BMD = expand(query_BMF, self.sizes).to(wide.update.dtype) @ wide.update.transpose(1, 2)
        else:  # a dense update that was compacted has keys of the update's dtype
            met_BMS = meets(query_BMF.to(wide.keys.dtype), wide.keys, self.sizes)
            out_BMD = (met_BMS if self.sharp is None else attended(met_BMS, self.trust[..., 0] > 0, self.sharp)).to(wide.values.dtype) @ wide.values
        return out_BMD.reshape(*query_NLF.shape[:2], -1)

    def ready(self, dtype: torch.dtype = torch.float32) -> "LayerMemory":
        """The same memory as it is read over and over, made ready once for all calls: cast, and a sharp one with what its slots were solved for.

        dtype: see cast.
        """
        if self.sharp is None or self.sharp.opened:
            return self.cast(dtype)
        return replace(self, values=replace(self, sharp=None).targets(), sharp=self.sharp._replace(opened=True)).cast(dtype)

    def cast(self, dtype: torch.dtype = torch.float32) -> "LayerMemory":
        """The same memory in the dtypes of products.

        dtype: of values and of a dense update, whose products cost the most; codes are few numbers and meet in float32 whatever it is, and so do keys
        that were kept in half precision. A float64 memory stays what it is.
        """
        kept = self.update if self.is_dense else self.values
        wide = torch.promote_types(kept.dtype, torch.float32)
        products = wide if wide == torch.float64 else dtype
        if self.is_dense:
            return self if kept.dtype == products else replace(self, update=kept.to(products))
        keys = self.keys.to(wide) if self.sizes or kept.dtype not in (wide, products) else self.keys
        return self if (keys.dtype, kept.dtype) == (self.keys.dtype, products) else replace(self, keys=keys, values=kept.to(products))

    def half(self) -> "LayerMemory":
        """Every number rounded to bfloat16 and kept in it, half the bytes of float32."""
        return replace(self, trust=None, sharp=None).map(lambda t: t.to(torch.bfloat16))

    def to_dense(self) -> "LayerMemory":
        if self.is_dense:
            return self
        wide = self.cast()
        return LayerMemory.dense(wide.values.transpose(1, 2) @ wide.full_keys().to(wide.values.dtype), self.sizes)

    def smaller_form(self) -> "LayerMemory":
        """Dense once S slots cost more numbers than the D x F update does; factored before, and while it knows its targets: what is
        written next must not depend on how many slots the batch happens to have."""
        if self.is_dense or self.trust is not None:
            return self
        (_, slots, width), hidden = self.keys.shape, self.values.shape[2]
        return self.to_dense() if slots * (width + hidden) > self.feed_forward * hidden else self

    def plus(self, other: "LayerMemory") -> "LayerMemory":
        """The sum of two updates, row by row."""
        one, two = self.cast(), other.cast()
        if one.is_dense or two.is_dense:
            return LayerMemory.dense(one.to_dense().update + two.to_dense().update, self.sizes)
        keys = (one.keys, two.keys) if one.keys.shape[2] == two.keys.shape[2] else (one.full_keys(), two.full_keys())
        return LayerMemory.factored(torch.cat(keys, 1), torch.cat([one.values, two.values], 1), sizes=self.sizes)

    def targets(self) -> torch.Tensor:
        """What the slots were solved for, [B, S, D]; needs trust. Empty slots: what is read there."""
        paid_BSD = self.values / torch.where(self.trust > 0, self.trust, 1.0)  # an empty slot's value is 0
        return torch.cat([self.read(keys) for keys in self.keys.split(ASKED_AT_ONCE, 1)], 1) + paid_BSD

    def norm(self) -> torch.Tensor:
        """Frobenius norm of dW, [B], without building it when factored: |dW|^2 = sum_ij (v_i . v_j)(k_i . k_j)."""
        wide = self.cast()
        if self.is_dense:
            return wide.update.flatten(1).norm(dim=1)
        keys = wide.keys.to(wide.values.dtype)
        square_B = (meets(keys, keys, self.sizes) * (wide.values @ wide.values.transpose(1, 2))).sum((1, 2))
        return square_B.clamp(min=0).sqrt()

    def compact(self, rank: int) -> "LayerMemory":
        """The best rank-`rank` update in Frobenius norm (truncated SVD), factored with `rank` slots."""
        wide = self.cast()
        if self.is_dense or self.keys.shape[1] >= min(self.feed_forward, self.values.shape[2]):
            left, scale, right = torch.linalg.svd(wide.to_dense().update, full_matrices=False)
        else:  # few slots: dW = V^T K = Qv (Rv Rk^T) Qk^T, and the small middle has the same singular values
            (basis_v, small_v), (basis_k, small_k) = (torch.linalg.qr(t.transpose(1, 2)) for t in (wide.values, wide.full_keys().to(wide.values.dtype)))
            left, scale, right = torch.linalg.svd(small_v @ small_k.transpose(1, 2))
            left, right = basis_v @ left, right @ basis_k.transpose(1, 2)
        values_BRD = (left * scale.unsqueeze(1))[:, :, :rank].transpose(1, 2).contiguous()
        keys_BRF = right[:, :rank].contiguous()
        return LayerMemory.factored(keys_BRF if self.is_dense else keys_BRF.to(self.keys.dtype), values_BRD, sizes=self.sizes)

    def where(self, wanted_BS: torch.Tensor) -> "LayerMemory":
        """Factored: only the wanted slots, moved to the left end; a row with fewer has slots without a value at the right."""
        column_BS = leading(wanted_BS, max(1, int(wanted_BS.sum(1).max())))
        kept_BS1 = wanted_BS.gather(1, column_BS).unsqueeze(-1)
        return self.map(lambda t: pick_columns(t, column_BS) * kept_BS1)

    def padded(self, slots: int) -> "LayerMemory":
        """The same factored memory with empty slots up to `slots`."""
        pad = lambda t: torch.nn.functional.pad(t, (0, 0, 0, slots - t.shape[1]))
        return self.map(pad)

    def aligned(self) -> "LayerMemory":
        """With empty slots up to a multiple of ALIGNED, for a memory that is read over and over; a dense update as it is."""
        over = 0 if self.is_dense else -self.values.shape[1] % ALIGNED
        return self.padded(self.values.shape[1] + over) if over else self


@dataclass(frozen=True)
class Memory:
    """Fast weights of B conversations: {layer: LayerMemory}, counts per row, and each layer's |W_down| for scale."""

    layers: dict[int, LayerMemory]
    tokens: torch.Tensor                  # [B] tokens written
    chunks: torch.Tensor                  # [B] chunks written
    weight_norms: dict[int, float]        # Frobenius norm of W_down per layer

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    def _map(self, function) -> "Memory":
        return replace(self, layers={i: function(layer) for i, layer in self.layers.items()})

    def to(self, device) -> "Memory":
        moved = self._map(lambda layer: layer.map(lambda t: t.to(device)))
        return replace(moved, tokens=self.tokens.to(device), chunks=self.chunks.to(device))

    def detach(self) -> "Memory":
        return self._map(lambda layer: layer.map(torch.Tensor.detach))

    def select(self, rows) -> "Memory":
        """The given rows, in that order; a row may be taken several times. IndexError when a row does not exist."""
        rows = torch.as_tensor(rows, device=self.tokens.device)
        picked = self._map(lambda layer: layer.map(lambda t: t[rows]))
        return replace(picked, tokens=self.tokens[rows], chunks=self.chunks[rows])

    def dense(self) -> "Memory":
        return self._map(LayerMemory.to_dense)

    def compact(self, rank: int) -> "Memory":
        if rank < 1:
            raise ValueError(f"rank is {rank}; a compacted memory keeps 1 direction or more")
        return self._map(lambda layer: layer.compact(rank))

    def half(self) -> "Memory":
        """Kept in half precision (bfloat16): half the bytes."""
        return self._map(LayerMemory.half)

    def sharp(self, how: Sharp) -> "Memory":
        """The same memory, to be read slot by slot. To be asked for last: a cut, scaled, summed, half or dense memory is read as a sum. ValueError where it has
        lost what its slots were solved for."""
        lost = [i for i, layer in self.layers.items() if layer.trust is None]
        if lost:
            raise ValueError(f"layer {lost[0]} has lost what its slots were solved for; read a memory of an arm with rule ridge slot by slot as it was written")
        return self._map(lambda layer: replace(layer, sharp=how))

    def scale(self, factor: float) -> "Memory":
        """The update times `factor`; counts stay."""
        return self._map(lambda layer: LayerMemory.dense(layer.update * factor, layer.sizes) if layer.is_dense
                         else LayerMemory.factored(layer.keys, layer.values * factor, sizes=layer.sizes))

    def merge(self, other: "Memory") -> "Memory":
        """Row by row the sum of two memories, as if neither text had been read while the other was written."""
        self._same_shape(other)
        if other.batch != self.batch:
            raise ValueError(f"memories of {self.batch} and {other.batch} rows do not merge row by row")
        layers = {i: layer.plus(other.layers[i]) for i, layer in self.layers.items()}
        return replace(self, layers=layers, tokens=self.tokens + other.tokens, chunks=self.chunks + other.chunks)

    @staticmethod
    def stack(memories: list["Memory"]) -> "Memory":
        """Memories one below the other as rows of one batch; short factored ones get empty slots."""
        first = memories[0]
        for other in memories[1:]:
            first._same_shape(other)
        layers = {i: _stack_layer([m.layers[i] for m in memories]) for i in first.layers}
        tokens, chunks = (torch.cat([getattr(m, name) for m in memories]) for name in ("tokens", "chunks"))
        return replace(first, layers=layers, tokens=tokens, chunks=chunks)

    def _same_shape(self, other: "Memory") -> None:
        if set(self.layers) != set(other.layers):
            raise ValueError(f"memories of layers {sorted(self.layers)} and {sorted(other.layers)} do not go together")

    def noise_like(self, generator: torch.Generator) -> "Memory":
        """A random update with this one's Frobenius norm in every layer and row: the perturbation control.

        Gaussian factors with as many slots as tokens were written (capped by the layer's rank), so it is low-rank like a memory.
        """
        written = int(self.tokens.max())

        def random_layer(layer: LayerMemory) -> LayerMemory:
            shape = layer.update.shape if layer.is_dense else (layer.batch, layer.values.shape[2], layer.feed_forward)
            slots = max(1, min(shape[1], written))  # not the slots the batch happens to have: its neighbours must not matter
            like = layer.update if layer.is_dense else layer.values
            draw = lambda width: torch.randn(shape[0], slots, width, generator=generator).to(like)
            noise = LayerMemory.factored(draw(shape[2]).to((layer.update if layer.is_dense else layer.keys).dtype), draw(shape[1]))
            factor_B = layer.norm() / noise.norm().clamp(min=1e-12)
            return LayerMemory.factored(noise.keys, noise.values * factor_B[:, None, None], sizes=layer.sizes)

        return self._map(random_layer)

    def update_norms(self) -> dict[int, torch.Tensor]:
        """|dW| / |W_down| per layer, each [B]."""
        return {i: layer.norm() / self.weight_norms[i] for i, layer in self.layers.items()}

    def update_norm(self) -> torch.Tensor:
        """|dW| / |W_down|, mean over the TTT layers, [B]."""
        return torch.stack(list(self.update_norms().values())).mean(0)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.layers.values() for t in layer.tensors().values())

    def row_nbytes(self) -> torch.Tensor:
        """Bytes of each row's own memory, [B], int64: what nbytes() would be of that row alone, without the empty slots of a batch."""
        return torch.stack([layer.row_nbytes() for layer in self.layers.values()]).sum(0)

    def named_tensors(self) -> dict[str, torch.Tensor]:
        named = {f"{i}.{name}": t for i, layer in self.layers.items() for name, t in layer.tensors().items()}
        return named | {"tokens": self.tokens, "chunks": self.chunks}

    def digest(self) -> str:
        """SHA-256 over names, shapes, dtypes and bytes: equal digests mean the same memory, bit for bit."""
        return tensors_digest(self.named_tensors())

    def save(self, path) -> None:
        """Write one safetensors file with its digest inside; written whole or not at all."""
        norms, sizes = json.dumps(self.weight_norms), json.dumps({i: layer.sizes for i, layer in self.layers.items()})
        metadata = {"digest": file_digest(self.named_tensors(), norms, sizes), "weight_norms": norms, "sizes": sizes}
        save_tensors(self.named_tensors(), path, metadata)

    @staticmethod
    def load(path, device="cpu") -> "Memory":
        """Read a file that `save` wrote; MemoryFileError when it is missing, cut short, changed, or holds no memory under a right digest."""
        path = Path(path)
        if not path.is_file():
            raise MemoryFileError(f"{path}: no such memory file; write one with Memory.save")
        try:
            with safe_open(str(path), framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
                rows = {shape[0] if shape else 0 for shape in shapes.values()}
                if any(count > MOST_ROWS for count in rows):
                    raise MemoryFileError(f"{path}: claims {max(rows)} rows, more than {MOST_ROWS}; it is no memory that this project wrote")
                # cloned: tensors out of a file lie at any address, and at some of them kernels round otherwise
                tensors = {name: file.get_tensor(name).clone() for name in shapes}
        except SafetensorError as error:
            raise MemoryFileError(f"{path}: not a whole safetensors file ({error}); write the memory again") from error
        if "digest" in metadata and "sizes" not in metadata:
            raise MemoryFileError(f"{path}: written by an earlier version of the project; write the memory again")
        if metadata.get("digest") != file_digest(tensors, metadata.get("weight_norms", ""), metadata.get("sizes", "")):
            raise MemoryFileError(f"{path}: its content does not match its digest; write the memory again")
        try:
            return from_tensors(tensors, json.loads(metadata["weight_norms"]), json.loads(metadata["sizes"])).to(device)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # a right digest says only that nobody changed it since
            raise MemoryFileError(f"{path}: its content is no memory ({type(error).__name__}: {ascii(str(error))}); write the memory again") from error


def from_tensors(tensors: dict[str, torch.Tensor], norms: dict, sizes: dict) -> Memory:
    """The memory that named_tensors() came from; ValueError, KeyError, TypeError or AttributeError for tensors that are none."""
    layers: dict[int, dict] = {}
    for name, tensor in tensors.items():
        if name not in ("tokens", "chunks"):
            number, _, part = name.partition(".")
            layers.setdefault(int(number), {})[part] = tensor
    found = {i: LayerMemory(**layers[i], sizes=sizes[str(i)] and tuple(sizes[str(i)])) for i in sorted(layers)}
    memory = Memory(found, tensors["tokens"], tensors["chunks"], {i: norms[str(i)] for i in found})
    for i, layer in found.items():
        own = layer.tensors()
        if set(layers[i]) not in FORMS or not all(t.dim() == 3 and t.is_floating_point() and t.shape[0] == memory.batch for t in own.values()):
            raise ValueError(f"layer {i} holds {sorted(layers[i])}, or has other rows than the rest")
        problems = [
            (len({t.shape[1] for t in own.values()}) > 1 or "trust" in own and own["trust"].shape[2] != 1, f"layer {i} has keys without values"),
            (layer.sizes is not None and not (len(layer.sizes) == 2 and all(type(n) is int and n > 0 for n in layer.sizes)),
             f"layer {i} has codes of sizes {layer.sizes}"),
            (not (type(memory.weight_norms[i]) is float and math.isfinite(memory.weight_norms[i])), f"layer {i} has a |W_down| of {memory.weight_norms[i]!r}")]
        for wrong, message in problems:
            if wrong:
                raise ValueError(message)
    if not found or any(t.dtype != torch.int64 or t.shape != (memory.batch,) for t in (memory.tokens, memory.chunks)):
        raise ValueError("no layer, or counts that are not one a row")
    return memory


def _stack_layer(layers: list[LayerMemory]) -> LayerMemory:
    if any(layer.is_dense for layer in layers):
        return LayerMemory.dense(torch.cat([layer.to_dense().update for layer in layers]), layers[0].sizes)
    slots = max(layer.keys.shape[1] for layer in layers)
    if len({layer.keys.shape[2] for layer in layers}) > 1:
        layers = [replace(layer, keys=layer.full_keys()) for layer in layers]
    padded = [layer.padded(slots) for layer in layers]
    trust = None if any(p.trust is None for p in padded) else torch.cat([p.trust for p in padded])
    return LayerMemory.factored(torch.cat([p.keys for p in padded]), torch.cat([p.values for p in padded]), trust, layers[0].sizes)


def file_digest(tensors: dict[str, torch.Tensor], *header: str) -> str:
    """SHA-256 over everything a file holds: the tensors, and the texts in its header."""
    return hashlib.sha256(" ".join([tensors_digest(tensors), *header]).encode()).hexdigest()


def tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over sorted names with shape, dtype and raw bytes."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().contiguous().cpu()
        sha.update(f"{name} {tuple(t.shape)} {t.dtype}\n".encode())
        sha.update(t.flatten().view(torch.uint8).numpy())
    return sha.hexdigest()
