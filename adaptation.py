"""Along a text: does a memory learn what it is given (the inner loss), and does the model's own prediction change (the outer loss)?

The text is read in pieces (an arm with chunks: its chunk). Before a piece is written, its tokens are predicted once by the base alone and
once with the memory of all pieces before, attention seeing the whole text so far either way; a token is scored before it may be learned from.
Then the piece is written. Streaming reads the same one token a call; the weights still change at the end of a piece, since a target needs
the tokens behind it. The inner loss of a token that left a slot is its rule's, k its key and u what it is to answer (in_place_ttt.py), in
shares of |u|^2; a layer's is the mean over slots weighted by g |u|^2, g the strength of the write:

    ridge      l(W) = |W k - u|^2 / |u|^2       1 for a memory that holds nothing (l0)
    hebbian    l(W) = - <W k, u> / |u|^2        0 for a memory that holds nothing (l0); each write lowers it, without end

l_prev is the loss under the memory before the token's piece was written, l_after under the memory after it.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from decoding import Past, forward_all, reading
from in_place_ttt import InPlaceTTT
from memory import Memory, tensors_digest
from model_utils import Loaded
from trends import mean_of, predicts, rank_correlation, slope_of, told

MOST = 0.9            # of the slots of a layer have a lower inner loss after the write: the layer's inner loss falls
NEGLIGIBLE = 0.001    # nats a token that the model's own loss must fall by, by the low end of the interval, before it counts
RULE = (f"the inner loss falls where in most layers {MOST:.0%} of the tokens that leave a slot have a lower one after the write than before it; "
        f"the model's own where the whole interval of its gain lies above {NEGLIGIBLE} nats a token")
EMPTY = "empty"
ROUNDING = 1e-4       # of |dW|: a write that changes less has changed nothing (ridge solves anew for all slots, so that a text without a slot moves the last bits)


@dataclass
class Along:
    """A text read piece by piece. L tokens, N layers; losses in nats, inner ones in shares of what is asked, NaN where there is none."""

    starts: list[int]           # of the pieces
    off_L: np.ndarray           # the model's own loss of predicting each token (the first has none), by the base alone
    on_L: np.ndarray            # the same, with what was written before
    layers: tuple[int, ...]
    l0_NL: np.ndarray
    prev_NL: np.ndarray
    after_NL: np.ndarray
    mass_NL: np.ndarray         # g |u|^2; 0 where the token left no slot
    inputs: list[str]           # state that each write started from (state_digest)
    outputs: list[str]          # state after each write
    changes: list[float]        # what each write did to it (change)
    parameters: list[str]       # of base and adapter, before the first piece and after the last
    memory: Memory

    def by_piece(self, values_L: np.ndarray, mass_L: np.ndarray | None = None) -> np.ndarray:
        """Mean over each piece's finite values (weighted by mass); NaN for a piece without one."""
        weight_L = np.isfinite(values_L) * (1.0 if mass_L is None else mass_L)
        total = lambda t: np.add.reduceat(t, self.starts)
        with np.errstate(invalid="ignore"):
            return total(np.nan_to_num(values_L) * weight_L) / np.where(total(weight_L) > 0, total(weight_L), np.nan)

    def inner(self, name: str) -> np.ndarray:
        """A layer's inner loss by piece, [N, pieces]; name: l0, prev, after."""
        return np.stack([self.by_piece(values_L, mass_L) for values_L, mass_L in zip(getattr(self, f"{name}_NL"), self.mass_NL)])


def pieces(ids: list[int], ttt: InPlaceTTT, length: int) -> list[list[int]]:
    """The text cut into an arm's chunks, or, where the whole text is one chunk, into so many tokens."""
    length = ttt.config.chunk or length
    return [ids[start:start + length] for start in range(0, len(ids), length)]


def slot_losses(ttt: InPlaceTTT, writer, memory: Memory | None) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """{layer: (inner loss of each token of a finished differentiable write of one row under `memory`, NaN where it left no slot; its mass), each [S]}.

    memory None: one that holds nothing.
    """
    found = {}
    for number, (i, (asked, strength_1S)) in enumerate(writer.wanted.items()):
        token_C = (writer.slots.weights[number, 0] > 0).nonzero()[:, 0]
        slot_C = torch.arange(len(token_C), device=token_C.device) if ttt.config.sparse else token_C  # a sparse arm has only its slots there
        wanted_CD = asked.values[0, slot_C].float()
        read_CD = torch.zeros_like(wanted_CD) if memory is None else memory.layers[i].read(asked.keys)[0, slot_C].float()
        square_C = wanted_CD.pow(2).sum(-1)
        gap_C = (read_CD - wanted_CD).pow(2).sum(-1) if ttt.config.rule == "ridge" else -(read_CD * wanted_CD).sum(-1)
        loss_S, mass_S = np.full(writer.slots.weights.shape[-1], np.nan), np.zeros(writer.slots.weights.shape[-1])
        loss_S[token_C.cpu().numpy()] = torch.where(square_C > 0, gap_C / square_C, torch.nan).cpu()  # who asks for nothing has no loss
        mass_S[token_C.cpu().numpy()] = (square_C * strength_1S[0, slot_C]).cpu()
        found[i] = loss_S, mass_S
    return found


def read_on(loaded: Loaded, ids: list[int], past: Past | None, last: torch.Tensor | None, session, step: int) -> tuple[list[float], torch.Tensor, Past]:
    """(losses of the tokens, the logits after the last, the longer past) of one more piece, `step` tokens a call; last: the logits before it."""
    losses = []
    for start in range(0, len(ids), step):
        tokens = torch.tensor([ids[start:start + step]], device=loaded.device)
        logits, past = forward_all(loaded.model, tokens, torch.ones_like(tokens), past, session)
        before = logits[0, :-1] if last is None else torch.cat([last[None], logits[0, :-1]])
        losses += cross_entropy(before.float(), tokens[0, tokens.shape[1] - len(before):], reduction="none").tolist()
        last = logits[0, -1]
    return losses, last, past


def state_digest(memory: Memory | None) -> str:
    """SHA-256 of what a memory of one row would answer with: its slots that hold a value, or its update. Counts of tokens are no state, nor is a zero."""
    held = {}
    for i, layer in ({} if memory is None else memory.layers).items():
        parts = {"update": layer.update} if layer.is_dense else {name: t[layer.values.ne(0).any(-1)] for name, t in layer.tensors().items()}
        held |= {f"{i}.{name}": t for name, t in parts.items() if t.any()}
    return tensors_digest(held)[:16] if held else EMPTY


def change(before: Memory | None, after: Memory) -> float:
    """Largest over the layers of |dW - dW'| / max(|dW|, |dW'|), in float64; 0 where neither holds anything. Before None: nothing yet."""
    largest = 0.0
    for i, layer in after.layers.items():
        one, new = (memory and memory.layers[i].map(torch.Tensor.double) for memory in (before, after))
        if before is None:
            largest = max(largest, float(new.norm().item() > 0))
            continue
        minus = replace(one, update=-one.update) if one.is_dense else replace(one, values=-one.values)
        largest = max(largest, (new.plus(minus).norm() / torch.maximum(one.norm(), new.norm()).clamp(min=1e-30)).item())
    return largest


def parameter_digest(loaded: Loaded, ttt: InPlaceTTT) -> str:
    """Of every parameter there is: the base's, a joint arm's LoRA, the adapter's."""
    return tensors_digest(dict(loaded.model.named_parameters()))[:16] + tensors_digest(ttt.tensors())[:16]


@torch.no_grad()
def along(loaded: Loaded, ttt: InPlaceTTT, ids: list[int], length: int, streaming: bool = False) -> Along:
    """Read a text piece by piece. Raises ValueError for a text of fewer than two pieces."""
    cut = pieces(ids, ttt, length)
    if len(cut) < 2:
        raise ValueError(f"a text of {len(ids)} tokens is one piece of {ttt.config.chunk or length}; give a longer text or shorter pieces")
    layers, step = tuple(sorted(ttt.config.layers)), 1 if streaming else len(ids)
    losses, inner = {"off": [], "on": []}, {name: {i: [] for i in layers} for name in ("l0", "prev", "after", "mass")}
    memory, last, pasts, inputs, outputs, changes, parameters = None, {}, {}, [], [], [], [parameter_digest(loaded, ttt)]
    for piece in cut:
        for name, known in (("off", None), ("on", memory)):
            with reading(ttt, known) as session:
                scored, last[name], pasts[name] = read_on(loaded, piece, pasts.get(name), last.get(name), session, step)
            losses[name] += scored
        with ttt.write(memory, differentiable=True) as writer:  # differentiable: the writer then keeps what every token asks for
            _, _, pasts["write"] = read_on(loaded, piece, pasts.get("write"), None, writer, step)
        inputs.append(state_digest(writer.start))
        earlier, memory = memory, smaller(writer.memory())
        outputs.append(state_digest(memory))
        changes.append(change(earlier, memory))
        for name, known in (("l0", None), ("prev", earlier), ("after", memory)):
            for i, (loss_S, mass_S) in slot_losses(ttt, writer, known).items():
                inner[name][i].append(loss_S)
                if name == "l0":
                    inner["mass"][i].append(mass_S)
    parameters.append(parameter_digest(loaded, ttt))
    table = {name: np.stack([np.concatenate(by_layer[i]) for i in layers]) for name, by_layer in inner.items()}
    return Along(np.cumsum([0, *map(len, cut[:-1])]).tolist(), *(np.array([np.nan, *losses[name]]) for name in ("off", "on")), layers,
                 *(table[name] for name in ("l0", "prev", "after", "mass")), inputs, outputs, changes, parameters, memory)


def smaller(memory: Memory) -> Memory:
    """Each layer in its smaller form: a differentiable write leaves every slot, however many there are."""
    return replace(memory, layers={i: layer.smaller_form() for i, layer in memory.layers.items()})


def summary(found: Along) -> dict:
    """The numbers of one text. Slopes are over pieces, for 1,000 tokens; the first piece, before which nothing is known, is left out of all but the losses."""
    places, off, on = np.array(found.starts[1:]) / 1000, found.by_piece(found.off_L)[1:], found.by_piece(found.on_L)[1:]
    prev, after, l0 = (found.inner(name)[:, 1:] for name in ("prev", "after", "l0"))
    behind_L = np.arange(len(found.off_L)) >= found.starts[1]
    layers = {}
    for number, i in enumerate(found.layers):
        slot_L = behind_L & np.isfinite(found.prev_NL[number])
        mean = lambda name: float(np.average(getattr(found, f"{name}_NL")[number, slot_L], weights=found.mass_NL[number, slot_L])) if slot_L.any() else None
        layers[i] = {"slots": int(slot_L.sum()), "l0": mean("l0"), "l_prev": mean("prev"), "l_after": mean("after"),
                     "improved": float((found.after_NL[number, slot_L] < found.prev_NL[number, slot_L]).mean()) if slot_L.any() else None,
                     "slope_l_prev": slope_of(places, prev[number]), "slope_l_after": slope_of(places, after[number])}
    gain = mean_of(off - on)
    return {"tokens": len(found.off_L), "pieces": len(found.starts), "loss_off": float(np.nanmean(found.off_L)), "loss_on": float(np.nanmean(found.on_L)),
            "gain": gain["mean"], "gain_ci": gain["ci"], "slope_gain": slope_of(places, off - on), "slope_off": slope_of(places, off), "slope_on": slope_of(places, on),
            "layers": layers, "disconnect": disconnect(layers, gain["ci"]), **outer_by_inner(off - on, l0, prev, after)}


def outer_by_inner(gain_P: np.ndarray, l0_NP: np.ndarray, prev_NP: np.ndarray, after_NP: np.ndarray) -> dict:
    """Does the inner loss predict the outer one? Over pieces, means over the layers that have a slot there:

    same_tokens: how much of l0 the memory before the piece has taken off, against what it takes off the model's own loss of the same piece;
    next_piece: how much the write of a piece takes off its inner loss, against what the memory takes off the model's loss of the piece after it.
    """
    mean = lambda t_NP: np.ma.masked_invalid(t_NP).mean(0).filled(np.nan)
    return {"same_tokens": rank_correlation(mean(l0_NP - prev_NP), gain_P), "next_piece": rank_correlation(mean(prev_NP - after_NP)[:-1], gain_P[1:])}


def disconnect(layers: dict, gain_ci: list[float] | None) -> str:
    """One sentence by RULE."""
    fell = np.mean([(cell["improved"] or 0) >= MOST for cell in layers.values()]) > 0.5
    helped = gain_ci is not None and gain_ci[0] > NEGLIGIBLE
    return {(True, True): "the inner loss falls and the model's own loss falls with it",
            (True, False): "disconnect: the inner loss falls, the model's own loss does not",
            (False, True): "the model's own loss falls although the inner loss hardly does",
            (False, False): "neither the inner loss nor the model's own falls"}[fell, helped]


def words(found: dict, rule: str) -> str:
    """What `summary` found, in words."""
    layers = [cell for cell in found["layers"].values() if cell["slots"]]
    mean = lambda name: float(np.mean([cell[name] for cell in layers]))
    inner = "No token after the first piece leaves a slot that asks for anything." if not layers else (
        f"The inner loss ({rule}; l0 {mean('l0'):.0f}) is {mean('l_prev'):.3f} before a token's piece is written and {mean('l_after'):.3f} after it "
        f"(means over {len(layers)} layers), lower for {mean('improved'):.0%} of the {sum(cell['slots'] for cell in layers)} slots.")
    slope = lambda name: "none" if found[name]["slope"] is None else f"{found[name]['slope']:.3f} {told(found[name]['ci'])}"
    return (f"{found['tokens']} tokens in {found['pieces']} pieces: the model's own loss is {found['loss_off']:.3f} nats a token by the base alone "
            f"and {found['loss_on']:.3f} with what was written before (gain {found['gain']:.3f} {told(found['gain_ci'])}; "
            f"slope for 1,000 tokens: off {slope('slope_off')}, on {slope('slope_on')}, gain {slope('slope_gain')}). {inner}\n\n"
            f"**Verdict: {found['disconnect']}.**\n")


def relation_words(found: dict) -> str:
    """Does the inner loss predict the outer one? In words."""
    sentences = []
    for name, what in (("same_tokens", "what the memory has already learned of a piece and what it takes off the model's own loss there"),
                       ("next_piece", "what a write takes off the inner loss and what the memory takes off the model's own loss of the next piece")):
        cell = found[name]
        rho = "cannot be computed" if cell["rho"] is None else f"{cell['rho']:.2f} {told(cell['ci'], 2)}"
        sentences.append(f"between {what}: {rho} over {cell['n']} pieces ({predicts(cell, 1)})")
    return f"Does the inner loss predict the outer loss? Spearman's correlation {'; '.join(sentences)}. Yes: the whole interval lies above 0; the other way round: below.\n"
