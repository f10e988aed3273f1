"""The trained part of the mechanism: one FastWeight per TTT layer, and the settings that say how it writes.

The formulas are those at the head of in_place_ttt.py; shape letters as there, and Z: width of the write or the read attention.
"""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import nn

from memory import LayerMemory, expand, meets, pick_columns, times, unit
from side_stream import HEAD, LongBias, distance_bias, look, plain_attention, unit_rms

TARGETS = ("hidden_states", "input_embed", "both")
INITS = ("paper", "shift")
RULES = ("hebbian", "ridge")
ROOM = 2 ** 27  # entries of a write attention's matrix, all rows and heads: a quarter of a gigabyte in bfloat16, and softmax makes it twice more
FEW = 4        # ridge solves by an inverse where slots are at most a FEWth of the hidden size
WIDE = 2048    # slots from which on each text is solved for by itself: a GPU's batched Cholesky is made for small matrices, and texts differ in slots
PACE = 10      # lambda spans orders of magnitude: its logarithm learns this much faster than the other parameters
WIDE_OPEN = 11 / 12   # sigmoid from which on a sparse gate is at its full strength
AJAR = 0.25           # strength of a sparse gate at the start
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
    deep: bool = False                # both attentions are the blocks of side streams, each layer's going on from the one before
    sparse: bool = False              # the gate lies in [0, 1] with exact zeros: a token of strength 0 leaves no slot
    shut_below: float = 1 / 12        # a sparse gate is shut where its sigmoid is below this; wide open from 11/12 on
    read_gate: bool = False           # learned share in (0, 1) of what is read that a token takes
    threshold: bool = False           # the read gate also looks at how much is read: a faint answer is no answer
    value_rank: int = 0               # P is a diagonal and a product of this rank; 0: a full D x D matrix
    calibrated: bool = False          # values in units of the residual stream's RMS at the layer, measured once
    blind: bool = False               # a text is read by the base alone: earlier memory is not applied while writing
    w_down: bool = False              # W_down of these layers is trained too: the arm is then not frozen
    clip: float | None = None         # the most that a chunk may change a layer, as a share of |W_down| (Frobenius); None: no limit

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
            (self.deep and not (self.write_attention and self.read_attention and self.target != "hidden_states"),
             "deep makes side streams of both attentions, from the embeddings on; switch both on and use target input_embed or both"),
            (self.threshold and not (self.read_gate and self.unit_targets), "threshold shapes the read gate by what is read at unit RMS; "
                                                                            "switch read_gate and unit_targets on"),
            (self.value_rank < 0, f"value_rank is {self.value_rank}; use a rank of 1 or more, or 0 for a full matrix"),
            (self.sparse and not self.gate, "sparse shapes the gate; switch gate on"),
            (not 0 < self.shut_below < WIDE_OPEN, f"shut_below is {self.shut_below}; use a number between 0 and 11/12"),
            (self.blind and self.chunk is not None, f"blind with chunk {self.chunk}: a blind text is one chunk, so use 'whole'"),
            (self.w_down and self.blind, "w_down changes what reads a text while it is written, and a blind text is read by the base alone; switch blind off"),
            (self.clip is not None and not 0 < self.clip < math.inf, f"clip is {self.clip}; use a share of |W_down| above 0, or none for no limit"),
            (self.clip is not None and (self.chunk is None or self.rule != "hebbian" or self.sparse),
             "clip limits what each chunk adds; it needs a chunk of so many tokens, rule hebbian and no sparse gate"),
            (self.calibrated and self.unit_targets is False, "calibrated measures values against targets at unit RMS; switch unit_targets on"),
        ]
        for wrong, message in problems:
            if wrong:
                raise ValueError(f"TTT config: {message}")

    def to_dict(self) -> dict:
        return asdict(self) | {"layers": list(self.layers)}


class Slots(NamedTuple):
    """Under what and how strongly a text would be written in one layer, token by token: keys [B, S, F] (or codes, see memory.py),
    weights [B, S] (0: nothing). worth [B, S]: the gate's logit, 0 without a gate. A leading dimension of layers may stand before B.
    """

    keys: torch.Tensor
    weights: torch.Tensor
    worth: torch.Tensor


class FastWeight(nn.Module):
    """The trained parameters of one TTT layer.

    conv [D, K], proj P [D, D] (with a value rank R: proj [D], its diagonal, proj_in [D, R] and proj_out [R, D]), and with both targets
    conv_x, proj_x and so on for the MLP's input beside the embeddings; with the gate: gate [D + Z], gate_bias [1]; with ridge:
    log_ridge [1]; with a key map of rank R: key_in and query_in [D, R], key_up and query_up [R, F]; with codes of sizes a * b = F:
    key_code [D + Z, a + b], query_code [D, a + b] and their biases; with the write attention: key_attend [D, 3 Z]; with the read
    attention: query_attend [D, 3 Z] and query_code is [D + Z, a + b]; deep: neither, the side streams have them; with the read
    gate: open [D], open_bias [1]; with the threshold: open_met [1]; with w_down: down_delta [D, F], what training has added to W_down.
    value_unit is the u of in_place_ttt.py: 1, the RMS of the layer's W_down, or (calibrated) a measured number.
    """

    def __init__(self, hidden_size: int, feed_forward: int, config: TTTConfig, generator: torch.Generator,
                 value_unit: float = 1.0):
        super().__init__()
        self.config = config
        self.register_buffer("value_unit", torch.tensor(value_unit if config.unit_targets else 1.0, dtype=torch.float64), persistent=config.calibrated)
        draw = drawer(generator)
        self._add_target("", hidden_size, draw)
        if config.target == "both":
            self._add_target("_x", hidden_size, draw)
            if config.init == "shift":
                self.proj_x.data.zero_()  # the embeddings speak first
        around, asked = config.write_attention * HEAD, config.read_attention * HEAD
        if config.write_attention and not config.deep:
            self.key_attend = nn.Parameter(draw(hidden_size, 3 * around))
        if config.read_attention and not config.deep:
            self.query_attend = nn.Parameter(draw(hidden_size, 3 * asked))
        if config.gate:
            self.gate = nn.Parameter(torch.zeros(hidden_size + around))
            start = config.shut_below + AJAR * (WIDE_OPEN - config.shut_below) if config.sparse else 0.5
            self.gate_bias = nn.Parameter(torch.tensor([start]).logit())
        if config.rule == "ridge":
            self.log_ridge = nn.Parameter(torch.tensor([math.log(config.ridge) / PACE]))
        if config.key_map:
            self.key_in, self.key_up = nn.Parameter(draw(hidden_size, config.key_map)), nn.Parameter(draw(config.key_map, feed_forward))
            # equal at the start: a query then finds the key of a like token
            self.query_in, self.query_up = (nn.Parameter(p.detach().clone()) for p in (self.key_in, self.key_up))
        self.sizes = code_sizes(feed_forward) if config.codes else None
        if config.codes:
            code = draw(hidden_size, sum(self.sizes))
            self.key_code = nn.Parameter(torch.cat([code, torch.zeros(around, sum(self.sizes))]))
            self.query_code = nn.Parameter(torch.cat([code, torch.zeros(asked, sum(self.sizes))]))
            self.key_bias, self.query_bias = (nn.Parameter(torch.zeros(sum(self.sizes))) for _ in range(2))
        if config.read_gate:
            self.open, self.open_bias = nn.Parameter(torch.zeros(hidden_size)), nn.Parameter(torch.ones(1))
        if config.threshold:
            self.open_met = nn.Parameter(torch.ones(1))
        if config.w_down:  # a sum beside the base's own weight, which stays as it is: in float32 small steps are not lost, and off is off
            self.down_delta = nn.Parameter(torch.zeros(hidden_size, feed_forward))

    def _add_target(self, suffix: str, hidden_size: int, draw) -> None:
        """conv and P at their start, named with the suffix."""
        config, conv = self.config, torch.zeros(hidden_size, self.config.kernel)
        diagonal = 0.02 * draw(1, hidden_size)[0]
        if config.init == "shift":  # the next token's state, small: a write means something from the first update on
            conv[:, min(config.kernel // 2 + 1, config.kernel - 1)] = 1.0
            diagonal = torch.full((hidden_size,), EMBED_SHARE)
        self.register_parameter("conv" + suffix, nn.Parameter(conv))
        self.register_parameter("proj" + suffix, nn.Parameter(diagonal if config.value_rank else torch.diag(diagonal)))
        if config.value_rank:
            self.register_parameter(f"proj{suffix}_in", nn.Parameter(draw(hidden_size, config.value_rank)))
            self.register_parameter(f"proj{suffix}_out", nn.Parameter(torch.zeros(config.value_rank, hidden_size)))

    # ---- writing ----

    def forward(self, method: str, *arguments, **named):
        """The method of that name: what torch.func calls with the numbers of a layer."""
        return getattr(self, method)(*arguments, **named)

    def slots(self, held, bias_BHSS: torch.Tensor | None = None, around_BSZ: torch.Tensor | None = None) -> Slots:
        """Where the held tokens would be written (held: sessions.Pending). Pads have weight 0.

        bias: `write_bias` of the held tokens, where the caller has it. around: what the write stream says of them, where deep.
        """
        informed = x_BSD = self.scaled(held.x)
        if self.config.write_attention:
            if not self.config.deep:
                bias_BHSS = write_bias(held, self.config) if bias_BHSS is None else bias_BHSS
                around_BSZ, _ = look(x_BSD @ self.key_attend, bias_BHSS, attend=plain_attention)
            informed = beside(x_BSD, around_BSZ)
        strength_BS, worth_BS = self.strength(informed)
        return Slots(self.key(informed, held.h), strength_BS * held.real, worth_BS)

    def contents(self, held, column_BC: torch.Tensor | None = None) -> torch.Tensor:
        """u t P of the held tokens at these columns (None: of all), [B, C, D]: what each has to say, before its strength.

        Nothing comes over a chunk border.
        """
        return self.value_unit * self.projected(held, column_BC)

    def projected(self, held, column_BC: torch.Tensor | None = None) -> torch.Tensor:
        """t P, likewise: all of `contents` but its unit."""
        near = neighbours(held.real, chunk_of(held.position, self.config.chunk), self.config.kernel, column_BC)
        taps = lambda x, conv: convolve(self.scaled(x), conv, *near)
        content_BCD = self.project(taps(held.x if self.config.target == "hidden_states" else held.source, self.conv), "proj")
        if self.config.target == "both":
            content_BCD = content_BCD + self.project(taps(held.x, self.conv_x), "proj_x")
        return content_BCD

    def project(self, target_BSD: torch.Tensor, name: str) -> torch.Tensor:
        """t P with the P of that name."""
        proj = getattr(self, name)
        if self.config.value_rank:
            return target_BSD * proj + target_BSD @ getattr(self, name + "_in") @ getattr(self, name + "_out")
        return target_BSD @ proj

    def dense_proj(self, name: str) -> torch.Tensor:
        """P of that name as a matrix [D, D]."""
        return self.project(torch.eye(self.conv.shape[0], dtype=self.conv.dtype, device=self.conv.device), name)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """What targets, gates and maps are made of: x in the adapter's dtype, at unit RMS with unit targets."""
        x = x.to(self.conv.dtype)
        return unit_rms(x) if self.config.unit_targets else x

    def strength(self, informed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(eta times the write gate, its logit), one number a token: [..., D + Z] -> [...]."""
        if not self.config.gate:
            return torch.full_like(informed[..., 0], self.config.eta), torch.zeros_like(informed[..., 0])
        worth = informed @ self.gate + self.gate_bias
        if self.config.sparse:  # stretched over [0, 1] and cut: exact zeros (Louizos et al. 2018, hard concrete, without noise)
            shut = self.config.shut_below
            return self.config.eta * ((torch.sigmoid(worth) - shut) / (WIDE_OPEN - shut)).clamp(0, 1), worth
        return self.config.eta * 2 * torch.sigmoid(worth), worth

    def chunk_update(self, held, memory_DF: torch.Tensor, known_FF: torch.Tensor, around_BSZ: torch.Tensor | None) -> torch.Tensor:
        """dW [D, F] of one whole chunk without pads (held of one row), by the library's conv1d and a dense solve: what the
        sequential form writes. known: sum of trust_i k_i (x) k_i of the slots whose targets the memory before still knows."""
        slots = self.slots(held, around_BSZ=around_BSZ)
        key_CF, weight_C = expand(slots.keys[0], self.sizes).to(memory_DF.dtype), slots.weights[0]
        taps = lambda t_CD, conv: nn.functional.conv1d(t_CD.T, conv[:, None, :], padding=self.config.kernel // 2, groups=t_CD.shape[1]).T
        x_CD = self.scaled(held.x[0])
        content_CD = taps(x_CD if self.config.target == "hidden_states" else self.scaled(held.source[0]), self.conv) @ self.dense_proj("proj")
        if self.config.target == "both":
            content_CD = content_CD + taps(x_CD, self.conv_x) @ self.dense_proj("proj_x")
        content_CD = self.value_unit * content_CD
        if self.config.rule == "hebbian":
            return (content_CD * weight_C.unsqueeze(-1)).T @ key_CF
        # recursive least squares in the feed-forward dimension, where fit() solves for all slots in their number
        missing_CD, weighted_CF = content_CD - key_CF @ memory_DF.T, key_CF * (weight_C / self.ridge()).unsqueeze(-1)
        square_FF = known_FF + weighted_CF.T @ key_CF + torch.eye(key_CF.shape[1], dtype=key_CF.dtype, device=key_CF.device)
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
        """What a token is written under, in h's dtype: h, h on the unit sphere, or learned features of x (`informed`), [..., F]; codes
        as [..., K]."""
        return self._features(informed, h, "key")

    def query(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """What a token asks with, as keys are; x as `scaled` gives it, here and in what follows, h as the MLP has it. For arms without
        read attention."""
        return self._features(x, h, "query")

    def informed_query(self, x_BLD: torch.Tensor, asked_BLZ: torch.Tensor) -> torch.Tensor:
        """Queries [B, L, K], in x's dtype, that also know what is gathered around them."""
        return self.unit_codes(beside(x_BLD, asked_BLZ) @ self.query_code + self.query_bias)

    def lead(self, inject_DZ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All that a deep arm's x is multiplied with when it is asked, and its bias: the read stream's I, the query's code, the read gate."""
        gate = [(self.open.unsqueeze(-1), self.open_bias)] if self.config.read_gate else []
        parts = [(inject_DZ, inject_DZ.new_zeros(inject_DZ.shape[1])), (self.query_code[:len(inject_DZ)], self.query_bias), *gate]
        return tuple(torch.cat(some, -1) for some in zip(*parts))

    def led(self, x_BLD: torch.Tensor, lead: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """(x I [B, L, Z], the query's code of x alone [B, L, K], and with the read gate its logit [B, L, 1])."""
        codes, gate = sum(self.sizes), int(self.config.read_gate)
        weight, bias = lead
        widths = [len(bias) - codes - gate, codes] + [1] * gate
        return nn.functional.linear(x_BLD, weight.T, bias).split(widths, -1)

    def led_query(self, coded_BLK: torch.Tensor, asked_BLZ: torch.Tensor) -> torch.Tensor:
        """informed_query where x's share of the code is there already."""
        return self.unit_codes(coded_BLK + asked_BLZ @ self.query_code[-asked_BLZ.shape[-1]:])

    def look_back(self, x_BLD: torch.Tensor, bias_BHLT: torch.Tensor, seen):
        """What the read attention gathers from the question so far, [B, L, Z], and its keys and values so far.

        bias: `distance_bias` from the L new tokens to all T; seen: what the call before returned.
        """
        return look(x_BLD @ self.query_attend, bias_BHLT, seen)

    def _features(self, x: torch.Tensor, h: torch.Tensor, name: str) -> torch.Tensor:
        if self.config.codes:
            return self.unit_codes(x @ getattr(self, f"{name}_code") + getattr(self, f"{name}_bias")).to(h.dtype)
        if self.config.key_map:
            mapped = x @ getattr(self, f"{name}_in") @ getattr(self, f"{name}_up")
            return unit(mapped.relu().square()).to(h.dtype)  # squared: a key meets few others
        return unit(h) if self.config.unit_keys else h

    def unit_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Both codes on their unit spheres, [..., K]."""
        return torch.cat([unit(code) for code in codes.split(self.sizes, -1)], -1)

    def taken(self, x: torch.Tensor, met: torch.Tensor, logit: torch.Tensor | None = None) -> torch.Tensor:
        """Of what is read (`met`, [..., D]) what the tokens x take: all of it without the read gate. logit: of the gate by x, where the caller has it."""
        if not self.config.read_gate:
            return met
        logit = x @ self.open + self.open_bias if logit is None else logit
        if self.config.threshold:  # sigmoid(a log m + b): a share that rises from 0 with the strength of what is read
            strength = torch.linalg.vector_norm(met.to(logit.dtype), dim=-1) / (met.shape[-1] ** 0.5 * EMBED_SHARE * self.value_unit)
            logit = logit + self.open_met * strength.clamp(min=1e-3).log()
        return met * torch.sigmoid(logit).unsqueeze(-1)

    def read(self, memory, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """What a layer's memory adds to the MLP's output for the tokens x, h (both as the MLP has them): [N, L, D]."""
        x = self.scaled(x)
        return self.taken(x, memory.read(self.query(x, h)))


def drawer(generator: torch.Generator):
    """Draws matrices [rows, columns] of unit gain."""
    return lambda rows, columns: torch.randn(rows, columns, generator=generator) / rows ** 0.5


def beside(x_BSD: torch.Tensor, gathered_BSZ: torch.Tensor) -> torch.Tensor:
    """x with what was gathered next to it, [B, S, D + Z]."""
    return torch.cat([x_BSD, gathered_BSZ.to(x_BSD.dtype)], -1)


def write_bias(held, config: TTTConfig, rows: slice = slice(None)) -> torch.Tensor | None:
    """The write attention's bias over the held tokens, [B, H, S, S] or of these rows of it: both directions (deep: every second head back alone),
    within a chunk; a pad looks at itself alone."""
    if not config.write_attention:
        return None
    chunk_BS = torch.where(held.real, chunk_of(held.position, config.chunk), -1)
    order_S = torch.arange(chunk_BS.shape[1], device=chunk_BS.device)
    allowed_BLS = (chunk_BS[:, rows, None] == chunk_BS[:, None, :]) & held.real[:, None, :]
    allowed_BLS = allowed_BLS | (order_S[rows, None] == order_S)
    return distance_bias(held.position[:, rows], held.position, allowed_BLS, config.write_attention, held.h.dtype, back=config.deep)


def whole_or_long(held, config: TTTConfig) -> torch.Tensor | LongBias | None:
    """write_bias of all held tokens; for a deep arm's text whose attention matrix has more than ROOM entries, what makes it piece by piece."""
    batch, length = held.real.shape
    at_once = max(1, ROOM // max(1, batch * config.write_attention * length))
    if not config.deep or at_once >= length:
        return write_bias(held, config)
    return LongBias(held.position, held.real, config.write_attention, at_once, held.h.dtype, lambda rows: write_bias(held, config, rows))


def writes(name: str) -> bool:
    """Whether a parameter of FastWeight takes part in slots and contents; the others are of the queries, the read gate, the solve and W_down."""
    return not name.startswith(("query", "open", "log_ridge", "down_delta"))


def code_sizes(feed_forward: int) -> tuple[int, int]:
    """The two factors of F that are nearest to each other, the smaller first: 1536 -> (32, 48)."""
    first = next(a for a in range(math.isqrt(feed_forward), 0, -1) if feed_forward % a == 0)
    return first, feed_forward // first


def neighbours(mask_BS: torch.Tensor, chunk_BS: torch.Tensor, taps: int, column_BC: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(columns, whether it counts), both [B, C, K]: the K real tokens around each of these columns (None: around all), itself in the middle.

    Neighbours are counted in tokens, not columns, so pads anywhere do not matter; beyond the row's ends or a chunk's border there is none. Of a pad's
    own neighbours nothing is said: it has no weight.
    """
    width = mask_BS.shape[1]
    place_BS = mask_BS.cumsum(1) - 1
    order_S = torch.arange(width, device=mask_BS.device)
    column_BS = torch.zeros_like(place_BS).scatter(1, torch.where(mask_BS, place_BS, width - 1), order_S.expand_as(place_BS))  # of each real token in order; with a pad, the last place is free
    if column_BC is None:
        column_BC = order_S.expand_as(place_BS)
    near_BCK = place_BS.gather(1, column_BC).unsqueeze(-1) + torch.arange(taps, device=mask_BS.device) - taps // 2
    of = lambda t_BS, at_BCK: t_BS.gather(1, at_BCK.flatten(1)).unflatten(1, at_BCK.shape[1:])
    found_BCK = of(column_BS, near_BCK.clamp(0, width - 1))
    counts_BCK = (near_BCK >= 0) & (near_BCK < mask_BS.sum(1)[:, None, None]) & (of(chunk_BS, found_BCK) == chunk_BS.gather(1, column_BC).unsqueeze(-1))
    return found_BCK, counts_BCK


def convolve(x_BSD: torch.Tensor, conv_DK: torch.Tensor, column_BCK: torch.Tensor, counts_BCK: torch.Tensor) -> torch.Tensor:
    """Depthwise conv, [B, C, D], over the columns that `neighbours` gives; so many of them at a time as ROOM has place for."""
    def some(column_BCK: torch.Tensor, counts_BCK: torch.Tensor) -> torch.Tensor:
        tap_BCKD = pick_columns(x_BSD, column_BCK.flatten(1)).unflatten(1, column_BCK.shape[1:])
        return sum((tap_BCKD * counts_BCK.unsqueeze(-1) * conv_DK.T).unbind(2))

    at_once = max(1, ROOM // (len(x_BSD) * conv_DK.numel()))
    return torch.cat([some(*part) for part in zip(column_BCK.split(at_once, 1), counts_BCK.split(at_once, 1))], 1)


def limited(value_BSD: torch.Tensor, key_BSK: torch.Tensor, chunk_BS: torch.Tensor, most: float, sizes: tuple[int, int] | None) -> torch.Tensor:
    """Values whose chunks' updates have a Frobenius norm of `most` or less, each chunk's scaled as one (In-Place TTT, App. C.2):
    |dW_c|^2 = sum_ij (v_i v_j) (k_i k_j) over the chunk's tokens. A token without a value adds nothing."""
    together_BSS = chunk_BS[:, :, None] == chunk_BS[:, None, :]
    key_BSK = key_BSK.to(value_BSD.dtype)
    product_BSS = meets(key_BSK, key_BSK, sizes) * (value_BSD @ value_BSD.mT) * together_BSS
    square_BS1 = together_BSS.to(value_BSD.dtype) @ product_BSS.sum(2, keepdim=True)
    return value_BSD * (most * square_BS1.clamp(min=torch.finfo(square_BS1.dtype).tiny).rsqrt()).clamp(max=1)


def fit(wanted: dict[int, LayerMemory], trust: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Kernel ridge regression of every layer: {layer: values [B, S, D]}. Layers of one width S are solved in one batch, so many of their rows as ROOM
    has place for; rows of WIDE slots or more one by one.

    dW = sum_i value_i (x) k_i minimises sum_i trust_i |dW k_i - wanted_i|^2 + |dW|^2; tokens of trust 0 get value 0.
    wanted: keys, and in place of values what is to be read at them; trust [B, S] = w / lambda >= 0, by layer.
    """
    values = {}
    for width in {t.shape[1] for t in trust.values()}:
        layers = [i for i, t in trust.items() if t.shape[1] == width]
        places, of_rows = (max(1, ROOM // width ** 2), solve) if width < WIDE else (1, solve_own)
        at_once = max(1, places // len(trust[layers[0]]))
        for some in (layers[first:first + at_once] for first in range(0, len(layers), at_once)):
            parts = (torch.cat(parts).split(places) for parts in zip(*((wanted[i].keys, wanted[i].values, trust[i]) for i in some)))
            solved = torch.cat([of_rows(*part, wanted[some[0]].sizes) for part in zip(*parts)])
            values |= dict(zip(some, solved.split([len(trust[i]) for i in some])))
    return values


def solve(key_NSK: torch.Tensor, wanted_NSD: torch.Tensor, trust_NS: torch.Tensor, sizes: tuple[int, int] | None) -> torch.Tensor:
    """The values of N texts of S slots, [N, S, D]: R (R G R + I)^-1 R wanted, G the keys' inner products and R^2 the trust."""
    root_NS = torch.where(trust_NS > 0, trust_NS, 1.0).sqrt() * (trust_NS > 0)  # sqrt has no gradient at 0, where a pad stands
    key_NSK = times(key_NSK.to(wanted_NSD.dtype), root_NS, sizes)
    one_SS = torch.eye(key_NSK.shape[1], dtype=key_NSK.dtype, device=key_NSK.device)
    lower_NSS, wanted_NSD = torch.linalg.cholesky(meets(key_NSK, key_NSK, sizes) + one_SS), wanted_NSD * root_NS.unsqueeze(-1)
    if wanted_NSD.requires_grad or lower_NSS.requires_grad or FEW * len(one_SS) > wanted_NSD.shape[2]:
        solved_NSD = torch.cholesky_solve(wanted_NSD, lower_NSS)
    else:  # by the factor's inverse: two products fill a GPU where solves of so few rows do not. Not in training, whose products may be TF32
        inverse_NSS = torch.linalg.solve_triangular(lower_NSS, one_SS.expand_as(lower_NSS), upper=False)
        solved_NSD = inverse_NSS.mT @ (inverse_NSS @ wanted_NSD)
    return solved_NSD * root_NS.unsqueeze(-1)


def solve_own(key_1SK: torch.Tensor, wanted_1SD: torch.Tensor, trust_1S: torch.Tensor, sizes: tuple[int, int] | None) -> torch.Tensor:
    """`solve` of one text without the columns behind its own last slot, which other texts of its batch have; [1, S, D]."""
    own = 1 + int(torch.where(trust_1S[0] > 0, torch.arange(trust_1S.shape[1], device=trust_1S.device), 0).max())
    values_1SD = solve(key_1SK[:, :own], wanted_1SD[:, :own], trust_1S[:, :own], sizes)
    return nn.functional.pad(values_1SD, (0, 0, 0, trust_1S.shape[1] - own))


def chunk_of(position: torch.Tensor, chunk: int | None) -> torch.Tensor:
    """Chunk number of each token position; one chunk for everything when `chunk` is None."""
    return torch.zeros_like(position) if chunk is None else position // chunk
