"""Along a text: does a memory learn what it is given (the inner loss), and does the model's own prediction change (the outer loss)?

The text is read in pieces (an arm with chunks: its chunk). Before a piece is written, its tokens are predicted once by the base alone and
once with the memory of all pieces before, attention seeing the whole text so far either way; a token is scored before it may be learned from.
Then the piece is written. A layer's inner loss is that of its rule, over the piece's tokens, k_i their keys, u_i what they are to answer and g_i
their strengths (in_place_ttt.py), in shares of sum_i g_i |u_i|^2:

    ridge      l(W) = sum_i g_i |W k_i - u_i|^2         1 for a memory that holds nothing (l0)
    hebbian    l(W) = - sum_i g_i <W k_i, u_i>          0 for a memory that holds nothing (l0); each write lowers it, without end

l_prev is the loss under the memory before the piece, l_after under the memory after it; a piece that leaves no slot in a layer has none.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

from arms import base_digest
from decoding import Past, forward_all, reading
from in_place_ttt import InPlaceTTT
from memory import LayerMemory, tensors_digest
from model_utils import Loaded

RESAMPLES = 2000


@dataclass
class Along:
    """Piece by piece: where it starts, the losses of its tokens in nats (the first token of the text has none), and each layer's inner losses."""

    starts: list[int] = field(default_factory=list)
    off: list[list[float]] = field(default_factory=list)
    on: list[list[float]] = field(default_factory=list)
    prev: dict[int, list[float | None]] = field(default_factory=dict)
    after: dict[int, list[float | None]] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)      # of the memory, after each piece
    parameters: list[str] = field(default_factory=list)   # of base and adapter, before the first piece and after the last


def pieces(ids: list[int], ttt: InPlaceTTT, length: int) -> list[list[int]]:
    """The text cut into an arm's chunks, or, where the whole text is one chunk, into so many tokens."""
    length = ttt.config.chunk or length
    return [ids[start:start + length] for start in range(0, len(ids), length)]


def inner_loss(rule: str, asked: LayerMemory, strength_BS: torch.Tensor, memory: LayerMemory | None) -> float | None:
    """l of one layer and row under a memory (None: one that holds nothing); None where nothing is asked of it."""
    wanted_SD, weight_S = asked.values[0], strength_BS[0]
    read_SD = torch.zeros_like(wanted_SD) if memory is None else memory.read(asked.keys)[0]
    share = lambda t_SD: (weight_S * t_SD.sum(-1)).sum().item()
    whole = share(wanted_SD.pow(2))
    if whole == 0:
        return None
    return share((read_SD - wanted_SD).pow(2)) / whole if rule == "ridge" else -share(read_SD * wanted_SD) / whole


def read_on(loaded: Loaded, ids: list[int], past: Past | None, last: torch.Tensor | None, session=None) -> tuple[list[float], torch.Tensor, Past]:
    """(losses of the tokens, the logits after the last, the longer past) of one more piece; last: the logits before it."""
    tokens = torch.tensor([ids], device=loaded.device)
    logits, past = forward_all(loaded.model, tokens, torch.ones_like(tokens), past, session)
    before = logits[0, :-1] if last is None else torch.cat([last[None], logits[0, :-1]])
    return cross_entropy(before.float(), tokens[0, len(ids) - len(before):], reduction="none").tolist(), logits[0, -1], past


def digest_of_parameters(loaded: Loaded, ttt: InPlaceTTT) -> str:
    return base_digest(loaded)[:16] + tensors_digest(ttt.tensors())[:16]


@torch.no_grad()
def along(loaded: Loaded, ttt: InPlaceTTT, ids: list[int], length: int) -> Along:
    """Read a text piece by piece. Raises ValueError for a text of fewer than two pieces."""
    cut = pieces(ids, ttt, length)
    if len(cut) < 2:
        raise ValueError(f"a text of {len(ids)} tokens is one piece of {ttt.config.chunk or length}; give a longer text or shorter pieces")
    found, memory, last, pasts = Along(prev={i: [] for i in ttt.config.layers}, after={i: [] for i in ttt.config.layers}), None, {}, {}
    found.parameters.append(digest_of_parameters(loaded, ttt))
    start = 0
    for piece in cut:
        found.starts.append(start)
        for name, known in (("off", None), ("on", memory)):
            with reading(ttt, known) as session:
                losses, last[name], pasts[name] = read_on(loaded, piece, pasts.get(name), last.get(name), session)
            getattr(found, name).append(losses)
        with ttt.write(memory, differentiable=True) as writer:
            _, _, pasts["write"] = read_on(loaded, piece, pasts.get("write"), None, writer)
        earlier, memory = memory, writer.memory()
        for i, (asked, strength) in writer.wanted.items():
            found.prev[i].append(inner_loss(ttt.config.rule, asked, strength, earlier and earlier.layers[i]))
            found.after[i].append(inner_loss(ttt.config.rule, asked, strength, memory.layers[i]))
        found.digests.append(memory.digest())
        start += len(piece)
    found.parameters.append(digest_of_parameters(loaded, ttt))
    return found


def words(found: dict, arm: str, rule: str) -> str:
    """What `summary` found, in words."""
    layers = [cell for cell in found["layers"].values() if cell["pieces"]]
    improved = f"{np.mean([cell['improved'] for cell in layers]):.0%}" if layers else "none"
    return (f"Along a text of {found['tokens']} tokens in {found['pieces']} pieces {arm} predicts with {found['loss_off']:.3f} nats a token by the base alone and {found['loss_on']:.3f} with what it wrote before "
            f"(gain {found['gain']:.3f} [{found['gain_ci'][0]:.3f}, {found['gain_ci'][1]:.3f}], slope {found['slope']:.4f} [{found['slope_ci'][0]:.4f}, {found['slope_ci'][1]:.4f}] a piece; 95% bootstrap over "
            f"pieces). The inner loss ({rule}) is lower after a piece than before it in {improved} of the pieces that leave a slot, mean over the layers.\n\n"
            f"Verdict: {found['disconnect']}. State: {found['state']}.\n")


def draw(found: Along, path: Path) -> None:
    """Above, the model's own loss piece by piece with TTT off and on; below, each layer's inner loss before and after the piece is written."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    outer, inner = figure.subplots(2, 1, sharex=True)
    for name, color in (("off", "#999999"), ("on", "#0072B2")):
        outer.plot(found.starts, [np.mean(losses) if losses else np.nan for losses in getattr(found, name)], marker="o", markersize=3, color=color, label=f"TTT {name}")
    outer.set_ylabel("the model's own loss, nats a token")
    outer.legend(fontsize=8, frameon=False)
    nan = lambda values: [np.nan if value is None else value for value in values]
    for number, i in enumerate(found.prev):
        color = matplotlib.colormaps["viridis"](number / max(1, len(found.prev) - 1))
        inner.plot(found.starts, nan(found.prev[i]), marker="o", markersize=3, linewidth=0.6, linestyle=":", color=color)
        inner.plot(found.starts, nan(found.after[i]), marker="v", markersize=3, linewidth=1, color=color, label=f"layer {i}")
    inner.set_ylabel("inner loss, share of what is asked\n(dotted: before the piece is written)")
    inner.set_xlabel("tokens read before the piece")
    figure.legend(*inner.get_legend_handles_labels(), loc="outside right center", fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def interval(values: np.ndarray, statistic, seed: int = 0) -> tuple[float, float, float]:
    """(statistic, its 95% bootstrap interval over the rows of `values`)."""
    rows = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile([statistic(values[r]) for r in rows], (0.025, 0.975))
    return float(statistic(values)), float(low), float(high)


def summary(found: Along) -> dict:
    """The numbers of one text: outer gain (off - on) in nats a token and its slope over pieces, inner losses by layer, and the two verdicts."""
    gain = np.array([np.mean(off) - np.mean(on) for off, on in zip(found.off[1:], found.on[1:])])  # before the first piece nothing is known
    points = np.column_stack([np.arange(1, len(gain) + 1), gain])
    slope = lambda p: float(np.polyfit(p[:, 0], p[:, 1], 1)[0]) if len(set(p[:, 0])) > 1 else 0.0
    layers = {}
    for i in found.prev:
        pairs = [(p, a) for p, a in zip(found.prev[i][1:], found.after[i][1:]) if p is not None]
        prev, after = ([pair[side] for pair in pairs] for side in (0, 1))
        layers[i] = {"pieces": len(pairs), "l_prev": float(np.mean(prev)) if pairs else None, "l_after": float(np.mean(after)) if pairs else None,
                     "improved": float(np.mean([a < p for p, a in pairs])) if pairs else None}
    mean, low, high = interval(gain, np.mean)
    return {"pieces": len(found.starts), "tokens": sum(map(len, found.off)) + 1, "loss_off": float(np.mean(np.concatenate(found.off))), "loss_on": float(np.mean(np.concatenate(found.on))),
            "gain": mean, "gain_ci": [low, high], "slope": (s := interval(points, slope))[0], "slope_ci": list(s[1:]), "layers": layers,
            "state": verdict(found.digests, found.parameters), "disconnect": disconnect(layers, [low, high])}


def verdict(digests: list[str], parameters: list[str]) -> str:
    """What moved: the state (the memory) is looked at, not the parameters, which a test-time learner never touches."""
    moved = len(set(digests)) == len(digests)
    if len(set(parameters)) > 1:
        return "parameters changed: this is fine-tuning, or a defect"
    return "the state moves with every piece, the parameters stay" if moved else "no weight changes: the state is the same after two pieces"


def disconnect(layers: dict, gain_ci: list[float]) -> str:
    """One sentence by a stated rule: the inner loss falls where most layers have it lower after nine pieces in ten than before; the model's own
    where the interval of the gain lies above 0."""
    fell = np.mean([(cell["improved"] or 0) >= 0.9 for cell in layers.values()]) > 0.5
    helped = gain_ci[0] > 0
    return {(True, True): "the inner loss falls and the model's own loss falls with it",
            (True, False): "disconnect: the inner loss falls, the model's own loss does not",
            (False, True): "the model's own loss falls although the inner loss hardly does",
            (False, False): "neither the inner loss nor the model's own falls"}[fell, helped]
