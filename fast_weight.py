"""The trained part of the mechanism: one FastWeight per TTT layer, and the settings that say how it writes.

The formulas are those at the head of in_place_ttt.py; shape letters as there.
"""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import nn

from memory import unit

TARGETS = ("hidden_states", "input_embed")
INITS = ("paper", "shift")
RULES = ("hebbian", "ridge")
PACE = 10  # lambda spans orders of magnitude: its logarithm learns this much faster than the other parameters


@dataclass(frozen=True)
class TTTConfig:
    """Which layers hold fast weights and how they are written. Everything here goes into the adapter's manifest."""

    layers: tuple[int, ...]           # decoder layers whose MLP is wrapped, 0-based
    chunk: int | None                 # tokens per chunk; None: the whole text is one chunk
    eta: float = 1.0                  # step size of the write
    kernel: int = 5                   # width of the depthwise conv that builds the target (odd: symmetric)
    target: str = "hidden_states"     # what the target is made of: the MLP's input, or the token embeddings
    init: str = "paper"               # paper: conv 0, P diagonal N(0, 0.02); shift: target = next token, P = 0.1 I
    unit_keys: bool = False           # keys and queries on the unit sphere, so that no token shouts the others down
    gate: bool = False                # learned write strength per token in (0, 2), 1 at init
    rule: str = "hebbian"             # hebbian: outer products are summed; ridge: solved for, so that they do not overlap
    ridge: float = 0.1                # where ridge's learned lambda starts
    key_map: int = 0                  # rank of the learned maps from x to keys and to queries; 0: h is both
    unit_targets: bool = False        # targets at unit RMS and values in units of W_down's RMS entry: one eta for every base

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        problems = [
            (not self.layers, "layers is empty; name at least one decoder layer"),
            (len(set(self.layers)) != len(self.layers), f"layers {list(self.layers)} names a layer twice; name each once"),
            (self.chunk is not None and self.chunk < 1, f"chunk is {self.chunk}; use 1 or more tokens, or 'whole' for one chunk"),
            (self.kernel < 1 or self.kernel % 2 == 0, f"kernel is {self.kernel}; the symmetric conv needs an odd width"),
            (self.target not in TARGETS, f"target is {self.target!r}; use one of {', '.join(TARGETS)}"),
            (self.init not in INITS, f"init is {self.init!r}; use one of {', '.join(INITS)}"),
            (self.rule not in RULES, f"rule is {self.rule!r}; use one of {', '.join(RULES)}"),
            (self.rule == "ridge" and self.chunk is not None, f"rule is ridge with chunk {self.chunk}; ridge solves for a whole text, "
                                                              f"so the chunk must be 'whole'"),
            (not self.ridge > 0, f"ridge is {self.ridge}; lambda must be above 0"),
            (self.key_map < 0, f"key_map is {self.key_map}; use a rank of 1 or more, or 0 for no map"),
        ]
        for wrong, message in problems:
            if wrong:
                raise ValueError(f"TTT config: {message}")

    def to_dict(self) -> dict:
        return asdict(self) | {"layers": list(self.layers)}


class FastWeight(nn.Module):
    """The trained parameters of one TTT layer.

    conv [D, K], proj P [D, D]; with the gate: gate [D], gate_bias [1]; with ridge: log_ridge [1]; with a key map of rank R:
    key_in and query_in [D, R], key_up and query_up [R, F].
    value_unit is the u of the module docstring: the RMS of the layer's W_down, used with unit targets only.
    """

    def __init__(self, hidden_size: int, feed_forward: int, config: TTTConfig, generator: torch.Generator,
                 value_unit: float = 1.0):
        super().__init__()
        self.config = config
        self.value_unit = value_unit if config.unit_targets else 1.0
        self.conv = nn.Parameter(torch.zeros(hidden_size, config.kernel))
        noise = torch.randn(hidden_size, generator=generator)
        if config.init == "paper":
            self.proj = nn.Parameter(torch.diag(0.02 * noise))
        else:  # the next token's state, small: a write means something from the first update on
            self.conv.data[:, min(config.kernel // 2 + 1, config.kernel - 1)] = 1.0
            self.proj = nn.Parameter(0.1 * torch.eye(hidden_size))
        if config.gate:
            self.gate = nn.Parameter(torch.zeros(hidden_size))
            self.gate_bias = nn.Parameter(torch.zeros(1))
        if config.rule == "ridge":
            self.log_ridge = nn.Parameter(torch.tensor([math.log(config.ridge) / PACE]))
        if config.key_map:
            draw = lambda rows, columns: torch.randn(rows, columns, generator=generator) / rows ** 0.5
            self.key_in, self.key_up = nn.Parameter(draw(hidden_size, config.key_map)), nn.Parameter(draw(config.key_map, feed_forward))
            # equal at the start: a query then finds the key of a like token
            self.query_in, self.query_up = (nn.Parameter(p.detach().clone()) for p in (self.key_in, self.key_up))

    def value(self, source_BSD: torch.Tensor, position_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
        """v_BSD in the adapter's dtype (float32), the Hebbian step of each token; pads get zeros."""
        scaled_BSD = self.scaled(source_BSD)
        strength_BS = self.strength(scaled_BSD) * mask_BS
        return self.content(scaled_BSD, position_BS, mask_BS) * strength_BS.unsqueeze(-1)

    def content(self, x_BSD: torch.Tensor, position_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
        """u t P, [B, S, D]: what a token has to say, before its strength; x is the target's source as `scaled` gives it.

        Neighbours are looked up by token position, not by column, so pads anywhere between the tokens of a row do not
        matter. `position` counts a row's real tokens from the start of the text; chunk = position // config.chunk.
        """
        chunk_BS = chunk_of(position_BS, self.config.chunk)
        count_B1 = mask_BS.sum(1, keepdim=True)
        # rank = how many real tokens of this row stand before the column; column_of = its inverse (pads sorted last)
        rank_BS = mask_BS.cumsum(1) - 1
        column_of_BS = torch.where(mask_BS, rank_BS, mask_BS.shape[1]).argsort(dim=1, stable=True)
        target_BSD = torch.zeros_like(x_BSD)
        for k in range(self.config.kernel):
            neighbour_BS = rank_BS + (k - self.config.kernel // 2)
            inside_BS = (neighbour_BS >= 0) & (neighbour_BS < count_B1)
            column_BS = column_of_BS.gather(1, neighbour_BS.clamp(0, mask_BS.shape[1] - 1))
            same_chunk_BS = inside_BS & (chunk_BS.gather(1, column_BS) == chunk_BS)
            shifted_BSD = x_BSD.gather(1, column_BS.unsqueeze(-1).expand_as(x_BSD))
            target_BSD = target_BSD + shifted_BSD * same_chunk_BS.unsqueeze(-1) * self.conv[:, k]
        return self.value_unit * (target_BSD @ self.proj)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """What targets, gate and key map are made of: x in the adapter's dtype, at unit RMS with unit targets."""
        x = x.to(self.conv.dtype)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=1e-12)) if self.config.unit_targets else x

    def strength(self, scaled: torch.Tensor) -> torch.Tensor:
        """eta times the write gate, one number a token: [..., D] -> [...]."""
        if self.config.gate:
            return self.config.eta * 2 * torch.sigmoid(scaled @ self.gate + self.gate_bias)
        return torch.full_like(scaled[..., 0], self.config.eta)

    def chunk_update(self, source_CD: torch.Tensor, key_CF: torch.Tensor, memory_DF: torch.Tensor) -> torch.Tensor:
        """dW [D, F] of one whole chunk without pads, by the library's conv1d and a dense solve; what the sequential form writes."""
        scaled_CD = self.scaled(source_CD)
        target_DC = nn.functional.conv1d(scaled_CD.T, self.conv[:, None, :], padding=self.config.kernel // 2, groups=scaled_CD.shape[1])
        content_CD, strength_C = self.value_unit * (target_DC.T @ self.proj), self.strength(scaled_CD)
        if self.config.rule == "hebbian":
            return (content_CD * strength_C.unsqueeze(-1)).T @ key_CF
        # the normal equations in the feed-forward dimension, where fit() solves in the number of tokens
        missing_CD, weighted_CF = content_CD - key_CF @ memory_DF.T, key_CF * strength_C.unsqueeze(-1)
        square_FF = weighted_CF.T @ key_CF + self.ridge() * torch.eye(key_CF.shape[1], dtype=key_CF.dtype, device=key_CF.device)
        return torch.linalg.solve(square_FF, weighted_CF.T @ missing_CD).T

    def ridge(self) -> torch.Tensor:
        """lambda, [1]."""
        return torch.exp(PACE * self.log_ridge)

    def key(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """What a token is written under, [..., F] in h's dtype: h, h on the unit sphere, or learned features of x."""
        return self._features(x, h, "key")

    def query(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """What a token asks with, [..., F]; the same as its key unless there is a key map."""
        return self._features(x, h, "query")

    def _features(self, x: torch.Tensor, h: torch.Tensor, name: str) -> torch.Tensor:
        if self.config.key_map:
            mapped = self.scaled(x) @ getattr(self, f"{name}_in") @ getattr(self, f"{name}_up")
            return unit(mapped.relu().square()).to(h.dtype)  # squared: a key meets few others
        return unit(h) if self.config.unit_keys else h


def fit(keys: dict, wanted: dict, weights: dict, ridges: dict) -> dict:
    """Kernel ridge regression of every layer in one batched solve: {layer: values [B, S, D]}.

    dW = sum_i value_i (x) k_i minimises sum_i w_i |dW k_i - wanted_i|^2 + lambda |dW|^2; tokens of weight 0 get value 0.
    keys [B, S, F], wanted [B, S, D], weights [B, S] >= 0, ridges [1], each by layer and of one B, S and D.
    """
    # sqrt has no gradient at 0, where a pad stands
    roots = {i: torch.where(w > 0, w, 1.0).sqrt() * (w > 0) for i, w in weights.items()}
    grams, sides = [], []
    for i, root_BS in roots.items():
        key_BSF = keys[i].to(wanted[i].dtype) * root_BS.unsqueeze(-1)
        grams.append(key_BSF @ key_BSF.transpose(1, 2) + ridges[i] * torch.eye(key_BSF.shape[1], dtype=key_BSF.dtype, device=key_BSF.device))
        sides.append(wanted[i] * root_BS.unsqueeze(-1))
    solved = torch.cholesky_solve(torch.cat(sides), torch.linalg.cholesky(torch.cat(grams))).split([len(side) for side in sides])
    return {i: value * roots[i].unsqueeze(-1) for i, value in zip(roots, solved)}


def chunk_of(position: torch.Tensor, chunk: int | None) -> torch.Tensor:
    """Chunk number of each token position; one chunk for everything when `chunk` is None."""
    return torch.zeros_like(position) if chunk is None else position // chunk
