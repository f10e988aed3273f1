"""The trained part of the mechanism: one FastWeight per TTT layer, and the settings that say how it writes.

The formulas are those at the head of in_place_ttt.py; shape letters as there, and Z: width of the write or the read attention.
"""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn.functional import pad

from memory import leading, pick_columns, unit

TARGETS = ("hidden_states", "input_embed", "both")
INITS = ("paper", "shift")
RULES = ("hebbian", "ridge")
PACE = 10      # lambda spans orders of magnitude: its logarithm learns this much faster than the other parameters
HEAD = 32      # width of one head of the write attention
EMBED_SHARE = 0.1   # a calibrated write starts as a tenth of the residual stream: enough for a tied head to say the token


@dataclass(frozen=True)
class TTTConfig:
    """Which layers hold fast weights and how they are written. Everything here goes into the adapter's manifest."""

    layers: tuple[int, ...]           # decoder layers whose MLP is wrapped, 0-based
    chunk: int | None                 # tokens per chunk; None: the whole text is one chunk
    eta: float = 1.0                  # step size of the write
    kernel: int = 5                   # width of the depthwise conv that builds the target (odd: symmetric)
    target: str = "hidden_states"     # what the target is made of: the MLP's input, the token embeddings, or the sum of both
    init: str = "paper"               # paper: conv 0, P diagonal N(0, 0.02); shift: target = next token, P = 0.1 I
    unit_keys: bool = False           # h on the unit sphere, so that no token shouts the others down (codes and maps always are)
    gate: bool = False                # learned write strength per token, in (0, 2) and 1 at init unless sparse
    rule: str = "hebbian"             # hebbian: outer products are summed; ridge: solved for, so that they do not overlap
    ridge: float = 0.1                # where ridge's learned lambda starts
    key_map: int = 0                  # rank of the learned maps from x to keys and to queries; 0: h is both
    unit_targets: bool = False        # targets at unit RMS, values in units of W_down's RMS entry unless calibrated: one eta for all
    codes: bool = False               # keys and queries are outer products of two learned codes of x: they meet where both do
    write_attention: int = 0          # heads of attention over the written text that inform keys and gate; 0: none
    read_attention: int = 0           # heads of attention over the question so far that inform its queries; 0: none
    attend_embeddings: bool = False   # both attentions also gather token embeddings, where a name is alike wherever it stands
    sparse: bool = False              # the gate lies in [0, 1] with exact zeros: a token of strength 0 leaves no slot
    read_gate: bool = False           # learned share in (0, 1) of what is read that a token takes
    calibrated: bool = False          # values in units of the residual stream's RMS at the layer, measured once
    blind: bool = False               # a text is read by the base alone: earlier memory is not applied while writing

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
            (self.codes and self.key_map > 0, "codes and key_map are two ways to make keys; use one"),
            (self.write_attention < 0, f"write_attention is {self.write_attention}; use a number of heads, or 0 for none"),
            (self.write_attention > 0 and not self.codes, "write_attention informs the codes; switch codes on"),
            (self.read_attention < 0, f"read_attention is {self.read_attention}; use a number of heads, or 0 for none"),
            (self.read_attention > 0 and not (self.codes and self.blind), "read_attention informs the codes of blind arms; switch codes and blind on"),
            (self.attend_embeddings and not ((self.write_attention or self.read_attention) and self.target != "hidden_states"),
             "attend_embeddings adds to an attention what the target is made of; switch an attention on and use target input_embed or both"),
            (self.sparse and not self.gate, "sparse shapes the gate; switch gate on"),
            (self.blind and self.chunk is not None, f"blind with chunk {self.chunk}: a blind text is one chunk, so use 'whole'"),
            (self.calibrated and self.unit_targets is False, "calibrated measures values against targets at unit RMS; switch unit_targets on"),
        ]
        for wrong, message in problems:
            if wrong:
                raise ValueError(f"TTT config: {message}")

    def to_dict(self) -> dict:
        return asdict(self) | {"layers": list(self.layers)}


@dataclass
class Slots:
    """What a text would leave in one layer, token by token: keys [B, S, F], contents [B, S, D], weights [B, S] (0: nothing).

    worth [B, S]: the gate's logit, None without a gate.
    """

    keys: torch.Tensor
    contents: torch.Tensor
    weights: torch.Tensor
    worth: torch.Tensor | None = None


class FastWeight(nn.Module):
    """The trained parameters of one TTT layer.

    conv [D, K], proj P [D, D], and with both targets conv_x, proj_x for the MLP's input beside the embeddings; with the gate:
    gate [D + Z], gate_bias [1]; with ridge: log_ridge [1]; with a key map of rank R: key_in and query_in [D, R], key_up and
    query_up [R, F]; with codes of sizes a * b = F: key_code [D + Z, a + b], query_code [D, a + b] and their biases; with the
    write attention: key_attend [D, 3 Z]; with the read attention: query_attend [D, 3 Z] and query_code is [D + Z, a + b]; where
    they gather embeddings: key_named and query_named [D, Z]; with the read gate: open [D], open_bias [1].
    value_unit is the u of in_place_ttt.py: 1, the RMS of the layer's W_down, or (calibrated) a measured number.
    """

    def __init__(self, hidden_size: int, feed_forward: int, config: TTTConfig, generator: torch.Generator,
                 value_unit: float = 1.0):
        super().__init__()
        self.config = config
        self.register_buffer("value_unit", torch.tensor(value_unit if config.unit_targets else 1.0, dtype=torch.float64), persistent=config.calibrated)
        self.conv, self.proj = self._target(hidden_size, generator)
        if config.target == "both":
            self.conv_x, self.proj_x = self._target(hidden_size, generator)
            if config.init == "shift":
                self.proj_x.data.zero_()  # the embeddings speak first
        around, asked = config.write_attention * HEAD, config.read_attention * HEAD
        draw = lambda rows, columns: torch.randn(rows, columns, generator=generator) / rows ** 0.5
        if config.write_attention:
            self.key_attend = nn.Parameter(draw(hidden_size, 3 * around))
            if config.attend_embeddings:
                self.key_named = nn.Parameter(draw(hidden_size, around))
        if config.read_attention:
            self.query_attend = nn.Parameter(draw(hidden_size, 3 * asked))
            if config.attend_embeddings:  # equal at the start where the heads are: a name is then found by the same name
                start = self.key_named.detach().clone() if around == asked else draw(hidden_size, asked)
                self.query_named = nn.Parameter(start)
        if config.gate:
            self.gate = nn.Parameter(torch.zeros(hidden_size + around))
            self.gate_bias = nn.Parameter(torch.full((1,), -1.0 if config.sparse else 0.0))
        if config.rule == "ridge":
            self.log_ridge = nn.Parameter(torch.tensor([math.log(config.ridge) / PACE]))
        if config.key_map:
            self.key_in, self.key_up = nn.Parameter(draw(hidden_size, config.key_map)), nn.Parameter(draw(config.key_map, feed_forward))
            # equal at the start: a query then finds the key of a like token
            self.query_in, self.query_up = (nn.Parameter(p.detach().clone()) for p in (self.key_in, self.key_up))
        if config.codes:
            self.sizes = code_sizes(feed_forward)
            code = draw(hidden_size, sum(self.sizes))
            self.key_code = nn.Parameter(torch.cat([code, torch.zeros(around, sum(self.sizes))]))
            self.query_code = nn.Parameter(torch.cat([code, torch.zeros(asked, sum(self.sizes))]))
            self.key_bias, self.query_bias = (nn.Parameter(torch.zeros(sum(self.sizes))) for _ in range(2))
        if config.read_gate:
            self.open, self.open_bias = nn.Parameter(torch.zeros(hidden_size)), nn.Parameter(torch.ones(1))

    def _target(self, hidden_size: int, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
        """(conv, P) at their start."""
        config, noise = self.config, torch.randn(hidden_size, generator=generator)
        conv = torch.zeros(hidden_size, config.kernel)
        if config.init == "paper":
            return nn.Parameter(conv), nn.Parameter(torch.diag(0.02 * noise))
        # the next token's state, small: a write means something from the first update on
        conv[:, min(config.kernel // 2 + 1, config.kernel - 1)] = 1.0
        return nn.Parameter(conv), nn.Parameter(EMBED_SHARE * torch.eye(hidden_size))

    # ---- writing ----

    def forward(self, held, bias_BHSS: torch.Tensor | None = None) -> Slots:
        """As `slots`; what torch.func calls."""
        return self.slots(held, bias_BHSS)

    def slots(self, held, bias_BHSS: torch.Tensor | None = None) -> Slots:
        """What the held tokens would leave (held: in_place_ttt.Pending). Nothing comes from pads, and nothing over a chunk border.

        bias: `write_bias` of the held tokens, where the caller has it.
        """
        x_BSD, chunk_BS = self.scaled(held.x), chunk_of(held.position, self.config.chunk)
        informed = x_BSD
        if self.config.write_attention:
            bias_BHSS = write_bias(held, self.config) if bias_BHSS is None else bias_BHSS
            named = self.scaled(held.source) @ self.key_named if self.config.attend_embeddings else None
            q, k, v = heads_of(x_BSD, self.key_attend, named, held.h.dtype)
            informed = beside(x_BSD, attention(q, k, v, bias_BHSS))
        strength_BS, worth_BS = self.strength(informed)
        return Slots(self.key(informed, held.h), self.contents(held, x_BSD, chunk_BS), strength_BS * held.real, worth_BS)

    def contents(self, held, x_BSD: torch.Tensor, chunk_BS: torch.Tensor) -> torch.Tensor:
        """u t P, [B, S, D]: what each token has to say, before its strength."""
        source_BSD = x_BSD if self.config.target == "hidden_states" else self.scaled(held.source)
        content_BSD = convolve(source_BSD, self.conv, held.real, chunk_BS) @ self.proj
        if self.config.target == "both":
            content_BSD = content_BSD + convolve(x_BSD, self.conv_x, held.real, chunk_BS) @ self.proj_x
        return self.value_unit * content_BSD

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """What targets, gates and maps are made of: x in the adapter's dtype, at unit RMS with unit targets."""
        x = x.to(self.conv.dtype)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).clamp(min=1e-12)) if self.config.unit_targets else x

    def strength(self, informed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(eta times the write gate, its logit), one number a token: [..., D + Z] -> [...]."""
        if not self.config.gate:
            return torch.full_like(informed[..., 0], self.config.eta), None
        worth = informed @ self.gate + self.gate_bias
        if self.config.sparse:  # stretched over [0, 1] and cut: exact zeros (Louizos et al. 2018, hard concrete, without noise)
            return self.config.eta * (1.2 * torch.sigmoid(worth) - 0.1).clamp(0, 1), worth
        return self.config.eta * 2 * torch.sigmoid(worth), worth

    def chunk_update(self, held, memory_DF: torch.Tensor) -> torch.Tensor:
        """dW [D, F] of one whole chunk without pads (held of one row), by the library's conv1d and a dense solve: what the
        sequential form writes."""
        slots = self.slots(held)
        key_CF, weight_C = slots.keys[0].to(memory_DF.dtype), slots.weights[0]
        taps = lambda t_CD, conv: nn.functional.conv1d(t_CD.T, conv[:, None, :], padding=self.config.kernel // 2, groups=t_CD.shape[1]).T
        x_CD = self.scaled(held.x[0])
        content_CD = taps(x_CD if self.config.target == "hidden_states" else self.scaled(held.source[0]), self.conv) @ self.proj
        if self.config.target == "both":
            content_CD = content_CD + taps(x_CD, self.conv_x) @ self.proj_x
        content_CD = self.value_unit * content_CD
        if self.config.rule == "hebbian":
            return (content_CD * weight_C.unsqueeze(-1)).T @ key_CF
        # the normal equations in the feed-forward dimension, where fit() solves in the number of tokens
        missing_CD, weighted_CF = content_CD - key_CF @ memory_DF.T, key_CF * weight_C.unsqueeze(-1)
        square_FF = weighted_CF.T @ key_CF + self.ridge() * torch.eye(key_CF.shape[1], dtype=key_CF.dtype, device=key_CF.device)
        return torch.linalg.solve(square_FF, weighted_CF.T @ missing_CD).T

    def ridge(self) -> torch.Tensor:
        """lambda, [1]."""
        return torch.exp(PACE * self.log_ridge)

    # ---- keys and queries ----

    @torch.no_grad()
    def centre(self, x_LD: torch.Tensor) -> None:
        """Set the codes' biases so that their mean over these tokens is 0."""
        mean_D = self.scaled(x_LD).mean(0)
        self.key_bias.copy_(-mean_D @ self.key_code[:len(mean_D)])
        self.query_bias.copy_(-mean_D @ self.query_code[:len(mean_D)])

    def key(self, informed: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """What a token is written under, [..., F] in h's dtype: h, h on the unit sphere, or learned features of x (`informed`)."""
        return self._features(informed, h, "key")

    def query(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """What a token asks with, [..., F]; x and h as the MLP has them. For arms without read attention."""
        return self._features(self.scaled(x), h, "query")

    def informed_query(self, x_BLD: torch.Tensor, h_BLF: torch.Tensor, embed_BLD: torch.Tensor | None, bias_BHLT: torch.Tensor,
                       seen: tuple | None):
        """(queries [B, L, F] that also know what attention over the question so far gathers, its keys and values so far).

        bias: `distance_bias` from the L new tokens to all T; seen: what the call before returned.
        """
        x_BLD = self.scaled(x_BLD)
        named = self.scaled(embed_BLD) @ self.query_named if self.config.attend_embeddings else None
        q, k, v = heads_of(x_BLD, self.query_attend, named, h_BLF.dtype)
        if seen is not None:
            k, v = torch.cat([seen[0], k], 2), torch.cat([seen[1], v], 2)
        informed = beside(x_BLD, attention(q, k, v, bias_BHLT))
        return self._features(informed, h_BLF, "query"), (k, v)

    def _features(self, x: torch.Tensor, h: torch.Tensor, name: str) -> torch.Tensor:
        if self.config.codes:
            first, second = (x @ getattr(self, f"{name}_code") + getattr(self, f"{name}_bias")).split(self.sizes, -1)
            return (unit(first).unsqueeze(-1) * unit(second).unsqueeze(-2)).flatten(-2).to(h.dtype)
        if self.config.key_map:
            mapped = x @ getattr(self, f"{name}_in") @ getattr(self, f"{name}_up")
            return unit(mapped.relu().square()).to(h.dtype)  # squared: a key meets few others
        return unit(h) if self.config.unit_keys else h

    def openness(self, x: torch.Tensor) -> torch.Tensor | float:
        """The share of what is read that a token takes, [..., 1]; 1 without the read gate."""
        return torch.sigmoid(self.scaled(x) @ self.open + self.open_bias).unsqueeze(-1) if self.config.read_gate else 1.0

    def read(self, memory, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """What a layer's memory adds to the MLP's output for the tokens x, h: [N, L, D]."""
        return memory.read(self.query(x, h)) * self.openness(x)


def heads_of(x_BSD: torch.Tensor, attend: torch.Tensor, named_BSZ: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Queries, keys and values of the heads, [3, B, H, S, HEAD], in the model's dtype as its own attention has them.

    named: what the embeddings add to the values.
    """
    mapped = x_BSD @ attend
    if named_BSZ is not None:
        mapped = mapped + pad(named_BSZ, (2 * named_BSZ.shape[-1], 0))
    return mapped.to(dtype).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)


def attention(q_BHLE, k_BHTE, v_BHTE, bias_BHLT) -> torch.Tensor:
    """Softmax attention in plain products: the library's fused one has no batching rule for several layers at once."""
    return (q_BHLE @ k_BHTE.transpose(-1, -2) * HEAD ** -0.5 + bias_BHLT).softmax(-1) @ v_BHTE


def beside(x_BSD: torch.Tensor, gathered_BHSE: torch.Tensor) -> torch.Tensor:
    """x with what the heads gathered next to it, [B, S, D + Z]."""
    return torch.cat([x_BSD, gathered_BHSE.transpose(1, 2).flatten(2).to(x_BSD.dtype)], -1)


def distance_bias(query_BL: torch.Tensor, key_BT: torch.Tensor, allowed_BLT: torch.Tensor, heads: int, dtype) -> torch.Tensor:
    """Bias [B, H, L, T] of attention by distance (ALiBi, Press et al. 2022): one fixed slope a head, from 1 down to 1/100.

    query and key are token positions; what is not allowed gets -inf.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    slopes = torch.logspace(0, -2, heads, dtype=wide, device=query_BL.device)[:, None, None]
    distance_BLT = (query_BL[:, :, None] - key_BT[:, None, :]).abs().to(wide)
    return (-slopes * distance_BLT[:, None]).masked_fill(~allowed_BLT[:, None], float("-inf")).to(dtype)


def write_bias(held, config: TTTConfig) -> torch.Tensor | None:
    """The write attention's bias over the held tokens: both directions, within a chunk; a pad looks at itself alone."""
    if not config.write_attention:
        return None
    chunk_BS = torch.where(held.real, chunk_of(held.position, config.chunk), -1)
    allowed_BSS = (chunk_BS[:, :, None] == chunk_BS[:, None, :]) & held.real[:, None, :]
    allowed_BSS = allowed_BSS | torch.eye(chunk_BS.shape[1], dtype=torch.bool, device=chunk_BS.device)
    return distance_bias(held.position, held.position, allowed_BSS, config.write_attention, held.h.dtype)


def code_sizes(feed_forward: int) -> tuple[int, int]:
    """The two factors of F that are nearest to each other, the smaller first: 1536 -> (32, 48)."""
    first = next(a for a in range(math.isqrt(feed_forward), 0, -1) if feed_forward % a == 0)
    return first, feed_forward // first


def convolve(x_BSD: torch.Tensor, conv_DK: torch.Tensor, mask_BS: torch.Tensor, chunk_BS: torch.Tensor) -> torch.Tensor:
    """Depthwise symmetric conv over each row's real tokens, never across a chunk border, [B, S, D]; 0 at pads' columns or not
    does not matter, because a pad has no weight.

    Neighbours are counted in tokens, not columns: rows are first moved to the left end, so pads anywhere do not matter.
    """
    column_BS = leading(mask_BS, mask_BS.shape[1])  # real tokens in order, then the pads
    left_BSD = pick_columns(x_BSD, column_BS)
    # pads belong to no chunk
    chunk_BS = torch.where(mask_BS, chunk_BS, -1).gather(1, column_BS)
    reach, width = conv_DK.shape[1] // 2, x_BSD.shape[1]
    padded_BSD, padded_BS = pad(left_BSD, (0, 0, reach, reach)), pad(chunk_BS, (reach, reach), value=-1)
    target_BSD = sum(padded_BSD[:, k:k + width] * (padded_BS[:, k:k + width] == chunk_BS).unsqueeze(-1) * conv_DK[:, k]
                     for k in range(conv_DK.shape[1]))
    return pick_columns(target_BSD, column_BS.argsort(dim=1))


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
