"""A small stream beside the frozen base that tells keys and queries what stands around a token (ladder side-tuning, Sung et al. 2022).

At every TTT layer, in the order of depth, a block takes the MLP's input x into the stream and lets its tokens look at each other:

    s = s_before + x I                  s_before of the first TTT layer: the token embeddings times a map of their own
    s = s + attention(norm(s) A)        heads of width HEAD side by side, softmax with a bias by distance
    s = s + gelu(norm(s) U) V

No gradient passes through the base for it, and the base never sees it: all that leaves the stream is norm(s), beside x, in
the codes of keys, queries and gates. Shape letters as in in_place_ttt.py, and Z: the stream's width, heads times HEAD.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import gelu, rms_norm

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
    """Softmax attention in plain products, [B, L, Z]: the library's fused one has no batching rule for several layers at once."""
    gathered_BHLE = (q_BHLE @ k_BHTE.transpose(-1, -2) * HEAD ** -0.5 + bias_BHLT).softmax(-1) @ v_BHTE
    return gathered_BHLE.transpose(1, 2).flatten(2)


def distance_bias(query_BL: torch.Tensor, key_BT: torch.Tensor, allowed_BLT: torch.Tensor, heads: int, dtype, back: bool = False) -> torch.Tensor:
    """Bias [B, H, L, T] of attention by distance (ALiBi, Press et al. 2022): one fixed slope a head, from 1 down to 1/100.

    query and key are token positions; what is not allowed gets -inf. back: every second head looks back only, as without it
    two tokens at the same distance to the left and to the right are alike.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    slopes = torch.logspace(0, -2, heads, dtype=wide, device=query_BL.device)[:, None, None]
    ahead_BLT = key_BT[:, None, :] - query_BL[:, :, None]
    bias_BHLT = (-slopes * ahead_BLT.abs().to(wide)[:, None]).masked_fill(~allowed_BLT[:, None], float("-inf"))
    if back:
        bias_BHLT[:, 1::2] = bias_BHLT[:, 1::2].masked_fill((ahead_BLT > 0)[:, None], float("-inf"))
    return bias_BHLT.to(dtype)


@dataclass(frozen=True)
class BiasByRows:
    """The bias of a text too long for all of it at once: make(rows) gives [B, H, rows, T] of a slice of the L query tokens, so many at a time."""

    make: Callable[[slice], torch.Tensor]
    length: int
    at_once: int
    dtype: torch.dtype

    def slices(self) -> list[slice]:
        return [slice(start, start + self.at_once) for start in range(0, self.length, self.at_once)]


def look(mapped_BLM: torch.Tensor, bias_BHLT: torch.Tensor | BiasByRows, seen: tuple | FixedPair | None = None):
    """(what the heads of the new tokens gather, [B, L, Z], their keys and values so far); mapped: [B, L, 3 Z], see split_heads.

    seen: the keys and values of the tokens before, where a text comes in pieces.
    """
    q, k, v = split_heads(mapped_BLM, bias_BHLT.dtype)
    if isinstance(seen, FixedPair):
        return attention(q, *seen.put(k, v), bias_BHLT), seen
    if seen is not None:
        k, v = torch.cat([seen[0], k], 2), torch.cat([seen[1], v], 2)
    if isinstance(bias_BHLT, BiasByRows):
        return torch.cat([attention(q[:, :, rows], k, v, bias_BHLT.make(rows)) for rows in bias_BHLT.slices()], 1), (k, v)
    return attention(q, k, v, bias_BHLT), (k, v)


class Block(nn.Module):
    """The stream's part at one TTT layer: inject I [D, Z], attend A [Z, 3 Z], up U [Z, 2 Z], down V [2 Z, Z]."""

    def __init__(self, hidden_size: int, width: int, draw):
        super().__init__()
        self.inject, self.attend = nn.Parameter(draw(hidden_size, width)), nn.Parameter(draw(width, 3 * width))
        self.up, self.down = nn.Parameter(draw(width, WIDER * width)), nn.Parameter(0.1 * draw(WIDER * width, width))
        self.dropout = nn.Dropout(0.0)  # of what a block adds to the stream; training sets its share

    def forward(self, before_BLZ: torch.Tensor, x_BLD: torch.Tensor, bias_BHLT: torch.Tensor, seen: tuple | FixedPair | None):
        """(s [B, L, Z], the heads' keys and values so far); seen: see look."""
        s_BLZ = before_BLZ + x_BLD @ self.inject
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

    def forward(self, index: int, before_BLZ: torch.Tensor, x_BLD: torch.Tensor, bias_BHLT: torch.Tensor, seen: tuple | None = None):
        """(s behind TTT layer `index`, the heads' keys and values so far); see Block."""
        return self.blocks[str(index)](before_BLZ, x_BLD, bias_BHLT, seen)
