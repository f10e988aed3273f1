"""A small stream beside the frozen base that tells keys and queries what stands around a token (ladder side-tuning, Sung et al. 2022).

At every TTT layer, in the order of depth, a block takes the MLP's input x into the stream and lets its tokens look at each other:

    s = s_before + x I                  s_before of the first TTT layer: the token embeddings times a map of their own
    s = s + attention(norm(s) A)        heads of width HEAD side by side, softmax with a bias by distance
    s = s + gelu(norm(s) U) V

No gradient passes through the base for it, and the base never sees it: all that leaves the stream is norm(s), beside x, in
the codes of keys, queries and gates. Shape letters as in in_place_ttt.py, and Z: the stream's width, heads times HEAD.
"""
from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import gelu, rms_norm, scaled_dot_product_attention

from fixed_cache import FixedPair

HEAD = 32      # width of one head
WIDER = 2      # the feed-forward part of a block, in widths of the stream


def unit_rms(x: torch.Tensor) -> torch.Tensor:
    """x at RMS 1 along its last dimension; a zero vector stays zero."""
    return rms_norm(x, x.shape[-1:], eps=1e-20)  # fused: an update of a small model is bound by the number of calls


def split_heads(mapped: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Queries, keys and values of the heads, [3, B, H, S, HEAD], of [B, S, 3 Z], in the model's dtype as its own attention has them."""
    return mapped.to(dtype).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)


def attention(q_BHLE, k_BHTE, v_BHTE, bias_BHLT) -> torch.Tensor:
    """Softmax attention, [B, H, L, HEAD], in one call, which keeps no matrix of all pairs."""
    return scaled_dot_product_attention(q_BHLE, k_BHTE, v_BHTE, attn_mask=bias_BHLT)


def plain_attention(q_BHLE, k_BHTE, v_BHTE, bias_BHLT) -> torch.Tensor:
    """The same in plain products: the library's call has no batching rule for several layers at once (torch.vmap)."""
    return (q_BHLE @ k_BHTE.transpose(-1, -2) * HEAD ** -0.5 + bias_BHLT).softmax(-1) @ v_BHTE


def slopes(heads: int, dtype: torch.dtype, device) -> torch.Tensor:
    """How much a head's bias falls with each token of distance, [H]: from 1 down to 1/100 (ALiBi, Press et al. 2022)."""
    return torch.logspace(0, -2, heads, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)


def distance_bias(query_BL: torch.Tensor, key_BT: torch.Tensor, allowed_BLT: torch.Tensor, heads: int, dtype, back: bool = False) -> torch.Tensor:
    """Bias [B, H, L, T] of attention by distance: one fixed slope a head.

    query and key are token positions; what is not allowed gets -inf. back: every second head looks back only, as without it
    two tokens at the same distance to the left and to the right are alike.
    """
    slopes_H = slopes(heads, dtype, query_BL.device)
    ahead_BLT = (key_BT[:, None, :] - query_BL[:, :, None]).to(slopes_H.dtype)
    bias_BHLT = (-slopes_H[:, None, None] * ahead_BLT.abs()[:, None]).masked_fill(~allowed_BLT[:, None], float("-inf"))
    if back:
        bias_BHLT[:, 1::2] = bias_BHLT[:, 1::2].masked_fill((ahead_BLT > 0)[:, None], float("-inf"))
    return bias_BHLT.to(dtype)


BLOCK = 128  # tokens of a block of flex_attention's mask


@dataclass(frozen=True)
class LongBias:
    """The bias of a text too long to lay it out for all pairs at once: what decides it, token by token.

    position, real [B, S]: the tokens' places and whether they are no pads (a pad looks at itself alone). make(rows) gives the bias
    [B, H, rows, S] of a slice of the text, `at_once` rows at a time. Every second head looks back only.
    """

    position: torch.Tensor
    real: torch.Tensor
    heads: int
    at_once: int
    dtype: torch.dtype
    make: Callable[[slice], torch.Tensor]

    def attention(self, q_BHSE, k_BHSE, v_BHSE) -> torch.Tensor:
        """As `attention` with the whole bias: fused on a GPU where no row has pads between its tokens, else by rows."""
        if q_BHSE.is_cuda and not FUSED.failed and self.spans is not None:
            return FUSED(self, q_BHSE, k_BHSE, v_BHSE)
        return self.by_rows(q_BHSE, k_BHSE, v_BHSE)

    def by_rows(self, q_BHSE, k_BHSE, v_BHSE) -> torch.Tensor:
        slices = [slice(start, start + self.at_once) for start in range(0, q_BHSE.shape[2], self.at_once)]
        return torch.cat([attention(q_BHSE[:, :, rows], k_BHSE, v_BHSE, self.make(rows)) for rows in slices], 2)

    def fused(self, flex, q_BHSE, k_BHSE, v_BHSE) -> torch.Tensor:
        """By flex_attention (flex: compiled or as it is), which makes the bias where it needs it."""
        falling, blocks = self._for_flex
        return flex(q_BHSE, k_BHSE, v_BHSE, score_mod=falling, block_mask=blocks)

    @functools.cached_property
    def spans(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Column of each row's first token and the one behind its last, [B]; None where a row has pads in between (or no token at all)."""
        columns_S = torch.arange(self.real.shape[1], device=self.real.device)
        first_B = torch.where(self.real, columns_S, len(columns_S)).amin(1)
        behind_B = torch.where(self.real, columns_S + 1, 0).amax(1)
        return (first_B, behind_B) if torch.equal(behind_B - first_B, self.real.sum(1)) else None

    @functools.cached_property
    def _for_flex(self) -> tuple[Callable, BlockMask]:
        """(the bias of a pair, which pairs there are), made once for all layers. Tokens side by side are as far apart as their columns, so
        nothing is looked up for a pair, and within most blocks nothing is left out."""
        (first_B, behind_B), slopes_H = self.spans, slopes(self.heads, self.dtype, self.real.device)

        def falling(score, b, h, i, j):
            return score - slopes_H[h] * (j - i).abs()

        def allowed(b, h, i, j):
            both = (torch.minimum(i, j) >= first_B[b]) & (torch.maximum(i, j) < behind_B[b])
            return (both | (i == j)) & ((h % 2 == 0) | (j <= i))

        length = self.real.shape[1]
        begin_N = torch.arange(0, length, BLOCK, device=first_B.device)
        some_BN = (begin_N + BLOCK > first_B[:, None]) & (begin_N < behind_B[:, None])
        all_BN = (begin_N >= first_B[:, None]) & (begin_N + BLOCK <= behind_B[:, None])
        ahead_NN, same_NN = begin_N[None, :] > begin_N[:, None], begin_N[None, :] == begin_N[:, None]
        looks_ahead_HNN = (torch.arange(self.heads, device=first_B.device) % 2 == 0)[:, None, None]
        pairs = lambda which_BN: (which_BN[:, :, None] & which_BN[:, None, :])[:, None]
        full_BHNN = pairs(all_BN) & (looks_ahead_HNN | ~(ahead_NN | same_NN))
        part_BHNN = (pairs(some_BN) | same_NN) & (looks_ahead_HNN | ~ahead_NN) & ~full_BHNN
        listed = lambda t: (t.sum(-1, dtype=torch.int32), t.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32))
        return falling, BlockMask.from_kv_blocks(*listed(part_BHNN), *listed(full_BHNN), BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(length, length))


class Fused:
    """flex_attention compiled for the GPU, at the first long text; where that cannot be done, it says so once and texts are read by rows."""

    def __init__(self):
        self.failed, self.compiled = False, None

    def __call__(self, bias: LongBias, q_BHSE, k_BHSE, v_BHSE) -> torch.Tensor:
        self.compiled = self.compiled or torch.compile(flex_attention, fullgraph=True)  # never in silence uncompiled, which lays out all pairs
        try:
            return bias.fused(self.compiled, q_BHSE, k_BHSE, v_BHSE)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.failed = True
            print(f"the attention over long texts is not compiled, which is slower: {str(error).splitlines()[0]}", file=sys.stderr)
        return bias.by_rows(q_BHSE, k_BHSE, v_BHSE)


FUSED = Fused()


def look(mapped_BLM: torch.Tensor, bias_BHLT: torch.Tensor | LongBias, seen: tuple | FixedPair | None = None, attend=attention):
    """(what the heads of the new tokens gather, [B, L, Z], their keys and values so far); mapped: [B, L, 3 Z], see split_heads.

    seen: the keys and values of the tokens before, where a text comes in pieces. Where gradients flow it is plain products: the fused
    kernels' backward pass under a mask is the suspect of two runs that ended in NaN (DECISIONS 8 and 33).
    """
    if mapped_BLM.requires_grad:
        attend = plain_attention
    q, k, v = split_heads(mapped_BLM, bias_BHLT.dtype)
    if isinstance(seen, FixedPair):
        k, v = seen.put(k, v)
    elif seen is not None:
        k, v = torch.cat([seen[0], k], 2), torch.cat([seen[1], v], 2)
    gathered_BHLE = bias_BHLT.attention(q, k, v) if isinstance(bias_BHLT, LongBias) else attend(q, k, v, bias_BHLT)
    return gathered_BHLE.transpose(1, 2).flatten(2), seen if isinstance(seen, FixedPair) else (k, v)


class Block(nn.Module):
    """The stream's part at one TTT layer: inject I [D, Z], attend A [Z, 3 Z], up U [Z, 2 Z], down V [2 Z, Z]."""

    def __init__(self, hidden_size: int, width: int, draw):
        super().__init__()
        self.inject, self.attend = nn.Parameter(draw(hidden_size, width)), nn.Parameter(draw(width, 3 * width))
        self.up, self.down = nn.Parameter(draw(width, WIDER * width)), nn.Parameter(0.1 * draw(WIDER * width, width))
        self.dropout = nn.Dropout(0.0)  # of what a block adds to the stream; training sets its share

    def forward(self, before_BLZ: torch.Tensor, injected_BLZ: torch.Tensor, bias_BHLT: torch.Tensor | LongBias, seen: tuple | FixedPair | None):
        """(s [B, L, Z], the heads' keys and values so far); injected: x I; seen: see look."""
        s_BLZ = before_BLZ + injected_BLZ
        gathered_BLZ, seen = look(unit_rms(s_BLZ) @ self.attend, bias_BHLT, seen)
        s_BLZ = s_BLZ + self.dropout(gathered_BLZ.to(s_BLZ.dtype))
        return s_BLZ + self.dropout(gelu(unit_rms(s_BLZ) @ self.up) @ self.down), seen


class SideStream(nn.Module):
    """One stream through all TTT layers: start [D, Z] and a Block a layer. It is given x and embeddings at RMS 1."""

    def __init__(self, hidden_size: int, heads: int, layers, draw):
        super().__init__()
        self.start = nn.Parameter(draw(hidden_size, heads * HEAD))
        self.blocks = nn.ModuleDict({str(i): Block(hidden_size, heads * HEAD, draw) for i in layers})

    def begin(self, embed_BLD: torch.Tensor) -> torch.Tensor:
        """s before the first TTT layer, [B, L, Z]."""
        return embed_BLD @ self.start

    def inject(self, index: int) -> torch.Tensor:
        """I of TTT layer `index`, [D, Z]."""
        return self.blocks[str(index)].inject

    def forward(self, index: int, before_BLZ: torch.Tensor, injected_BLZ: torch.Tensor, bias_BHLT: torch.Tensor | LongBias, seen: tuple | FixedPair | None = None):
        """(s behind TTT layer `index`, the heads' keys and values so far); see Block."""
        return self.blocks[str(index)](before_BLZ, injected_BLZ, bias_BHLT, seen)
