"""Keys and values in room laid out beforehand: a step that writes in place has the same shapes and addresses every time, so that a GPU
can replay it as one graph, and nothing that was read before is copied for a new token."""
from __future__ import annotations

import torch
from transformers import DynamicCache


class FixedPair:
    """Keys and values [B, H, T, E] of which the columns before `column` (a tensor [1], moved on by whoever owns it) are in use."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int, column: torch.Tensor):
        self.keys, self.values = (torch.nn.functional.pad(t, (0, 0, 0, room)) for t in (keys, values))
        self.column = column

    def put(self, key_BH1E: torch.Tensor, value_BH1E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token's at the column; all of both, [B, H, T, E], the columns behind it still empty."""
        return self.keys.index_copy_(2, self.column, key_BH1E), self.values.index_copy_(2, self.column, value_BH1E)


class FixedCache:
    """A KV cache of fixed size, for models that are given mask and positions: then `update` is all that they ask of it."""

    def __init__(self, cache: DynamicCache, room: int, column: torch.Tensor):
        """Takes the cache over, layer by layer, so that no more than one layer is there twice."""
        self.pairs = []
        for layer in cache.layers:
            self.pairs.append(FixedPair(layer.keys, layer.values, room, column))
            layer.keys = layer.values = None

    def update(self, key_BH1E: torch.Tensor, value_BH1E: torch.Tensor, layer: int, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pairs[layer].put(key_BH1E, value_BH1E)
