"""What a conversation's memory does: which written token a question meets, what each layer is worth to the answer, how large and of what rank the
update is, and what becomes of the answers when it is scaled. diagnose.py asks; figures are in inside_figures.py."""
from __future__ import annotations

import copy
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.functional import kl_div, log_softmax, nll_loss
from tqdm import tqdm

import prompts
from adaptation import slot_losses
from conditions import MAX_NEW_TOKENS
from decoding import Past, answers_to, forward_all, heard
from evaluate import degenerate, exact_match
from in_place_ttt import InPlaceTTT
from intervals import Bootstrap, em_interval
from memory import Memory, meets
from model_utils import Loaded
from results_files import SCALED, SCALES
from trends import mean_of, rank_correlation, spearman

DRAWN = 4                                          # questions of the first conversation that are drawn
FACTORS = sorted({*map(float, SCALES), 1.0})       # of the memory, and of noise of its norm
SINGULAR_VALUES = 64                               # kept of each spectrum


@dataclass(frozen=True)
class Text:
    """One conversation of S tokens, written: its tokens as words, the character span of each, under what key and how strongly each layer writes it,
    and how well it keeps it."""

    sample: dict
    words: list[str]
    spans: list[tuple[int, int]]
    keys: dict[int, torch.Tensor]       # [1, S, F] or codes
    strength: dict[int, torch.Tensor]   # [S]; 0: no slot
    kept: dict[int, tuple[np.ndarray, np.ndarray]]  # (inner loss after writing, mass), each [S]: adaptation.slot_losses
    memory: Memory


@dataclass(frozen=True)
class Asked:
    """One question with its gold answer behind it, read with R memories: predictions of the answer's M tokens, and of the first memory more."""

    logits: torch.Tensor                # [R, M, V]
    gold: torch.Tensor                  # [M]
    queries: dict[int, torch.Tensor]    # layer -> [M, F] or codes
    share: dict[int, float]             # layer -> |what the memory adds| / |what the MLP gives|, mean over the answer's tokens


@torch.no_grad()
def write(loaded: Loaded, ttt: InPlaceTTT, sample: dict) -> Text:
    cut = loaded.tokenizer(sample["conversation"], add_special_tokens=False, return_offsets_mapping=True)
    start = prompts.start_ids(loaded.tokenizer)
    ids = torch.tensor([start + cut.input_ids], device=loaded.device)
    with ttt.write(differentiable=True) as writer:  # differentiable: the writer then keeps the keys of all tokens, slots or not
        writer.expect(torch.ones_like(ids))
        loaded.model.get_decoder()(input_ids=ids, use_cache=False)
    memory = writer.memory()
    layers = sorted(memory.layers)
    return Text(sample, [loaded.tokenizer.decode([i]) for i in ids[0].tolist()], [(0, 0)] * len(start) + [tuple(span) for span in cut.offset_mapping],
                {i: writer.slots.keys[n] for n, i in enumerate(layers)}, {i: writer.slots.weights[n, 0] for n, i in enumerate(layers)},
                slot_losses(ttt, writer, memory), memory)


@torch.inference_mode()
def example(loaded: Loaded, ttt: InPlaceTTT, memory: Memory, lang: str) -> Past:
    """The example before the questions, read with each row of the memory in a context of its own, as run_experiment.py does it."""
    return heard(loaded.model, [prompts.head_ids(loaded.tokenizer, lang, with_text=False)] * memory.batch, loaded.tokenizer.pad_token_id, ttt, memory)


@torch.inference_mode()
def ask(loaded: Loaded, ttt: InPlaceTTT, memory: Memory, past: Past, lang: str, probe: dict) -> Asked:
    """past: what `example` read; it is left as it is."""
    tokenizer, past = loaded.tokenizer, copy.deepcopy(past)
    tail, gold = prompts.tail_ids(tokenizer, lang, probe["question"]), prompts.answer_ids(tokenizer, lang, probe["gold_answer"])
    ids = torch.tensor([tail + gold] * memory.batch, device=loaded.device)
    answer = slice(len(tail) - 1, -1)  # what predicts the answer's tokens
    watch = torch.zeros_like(ids, dtype=torch.bool)
    watch[0, answer] = True
    outputs, hooks = {}, []
    for i in ttt.config.layers:
        mlp = loaded.model.get_decoder().layers[i].mlp
        keep = lambda name: lambda module, inputs, output: outputs.__setitem__(name, output[0, answer].float())
        hooks += [mlp.register_forward_hook(keep((i, "all"))), mlp.base.down_proj.register_forward_hook(keep((i, "base")))]
    with ttt.read(memory, watch) as session:
        logits, _ = forward_all(loaded.model, ids, torch.ones_like(ids), past, session, keep=len(gold) + 1)
    for hook in hooks:
        hook.remove()
    norm = lambda t: torch.linalg.vector_norm(t, dim=-1)
    share = {i: (norm(outputs[i, "all"] - outputs[i, "base"]) / norm(outputs[i, "base"])).mean().item() for i in ttt.config.layers}
    return Asked(logits[:, :-1].float(), torch.tensor(gold, device=loaded.device), session.queries, share)


def parts_of(memory: Memory) -> dict[tuple[str, int | None], Memory]:
    """The memory whole and empty; without each layer, of that layer alone, and of that layer and all deeper ones."""
    empty = memory.scale(0.0)
    of = lambda wanted: replace(memory, layers={i: (memory if wanted(i) else empty).layers[i] for i in memory.layers})
    parts = {("all", None): memory, ("none", None): empty}
    for i in memory.layers:
        parts |= {("without", i): of(lambda j: j != i), ("only", i): of(lambda j: j == i), ("from", i): of(lambda j: j >= i)}
    return parts


def belongs(text: Text, probe: dict) -> torch.Tensor:
    """Which written tokens [S] are of the fact that holds the answer: those of its span, and the one before, which says its first."""
    fact = next(f for f in text.sample["facts"] if f["fact_id"] == probe["required_facts"][-1])
    low, high = fact.get("span", (0, 0))
    inside = torch.tensor([start < high and end > low for start, end in text.spans])
    return inside | torch.cat([inside[1:], torch.tensor([False])])


def met_by(query_MK: torch.Tensor, text: Text, i: int) -> torch.Tensor:
    """How well a layer's query for the answer's first token meets the key of each written token, [S]; nan where it left no slot."""
    met_S = meets(query_MK[None, :1], text.keys[i], text.memory.layers[i].sizes)[0, 0].float().cpu()
    return met_S.masked_fill(text.strength[i].cpu() <= 0, float("nan"))


def met_best(text: Text, asked: Asked, probe: dict) -> dict[int, dict]:
    """Of each layer: the written token that the query for the answer's first token meets best, how well, and whether it belongs to the fact;
    chance: the share of slots that do."""
    inside, found = belongs(text, probe), {}
    for i, query in asked.queries.items():
        met = met_by(query, text, i)
        slot, best = ~met.isnan(), int(met.nan_to_num(nan=float("-inf")).argmax())
        found[i] = {"token": best, "word": text.words[best], "next": text.words[best + 1] if best + 1 < len(text.words) else "", "met": met[best].item(),
                    "in_fact": bool(inside[best]), "chance": (inside & slot).sum().item() / max(1, int(slot.sum()))}
    return found


def kept_of(text: Text, probe: dict) -> dict[int, float | None]:
    """Of each layer: the inner loss, after writing, of the slots of the fact that holds the answer; None where it left none."""
    inside = belongs(text, probe).numpy()
    found = {}
    for i, (loss_S, mass_S) in text.kept.items():
        slot_S = inside & np.isfinite(loss_S)
        found[i] = float(np.average(loss_S[slot_S], weights=mass_S[slot_S])) if slot_S.any() else None
    return found


def spectrum(memory: Memory, i: int) -> dict:
    """Singular values of dW, and the rank that their entropy stands for (Roy and Vetterli 2007)."""
    layer = memory.layers[i]
    cut = layer.compact(min(layer.hidden_size, layer.feed_forward))  # of full rank: its keys are orthonormal, so its values' norms are the singular values
    values = torch.linalg.vector_norm(cut.values[0].float(), dim=-1)
    share = values[values > 0] / values.sum()
    return {"effective_rank": torch.exp(-(share * share.log()).sum()).item() if len(share) else 0.0,
            "singular_values": [float(f"{v:.4g}") for v in values[:SINGULAR_VALUES].tolist()]}


@torch.inference_mode()
def answers(loaded: Loaded, ttt: InPlaceTTT, memory: Memory, sample: dict) -> list[list[str]]:
    """Of each row of the memory, the answers to the sample's questions with it."""
    tokenizer, lang, probes = loaded.tokenizer, sample["lang"], sample["probes"]
    tails = [prompts.tail_ids(tokenizer, lang, probe["question"]) for probe in probes]
    said, _ = answers_to(loaded.model, tokenizer, tails * memory.batch, MAX_NEW_TOKENS, example(loaded, ttt, memory, lang), ttt, memory)
    return [said[start:start + len(probes)] for start in range(0, len(said), len(probes))]


def right(said: list[str], sample: dict) -> list[bool]:
    """Whether each answer to the sample's questions is exactly one of those that count."""
    return [exact_match(answer, [probe["gold_answer"], *probe.get("aliases", [])], sample["lang"]) for answer, probe in zip(said, sample["probes"], strict=True)]


def measure(loaded: Loaded, ttt: InPlaceTTT, samples: list[dict], ablated: int) -> tuple[dict, list]:
    """(the report's numbers, what is drawn of the first conversation: its Text, and each question with what was asked).

    ablated: so many conversations, from the first on, have each layer taken out, left alone, and left with the deeper ones; 0: none, and no layer has
    numbers of that.
    """
    layers, drawn, rows, seen = sorted(ttt.config.layers), [], [], {}
    sums = {i: {name: [] for name in ("update_norm", "effective_rank", "share_of_output", "kl_without", "kl_only", "in_fact", "chance", "met")} for i in layers}
    first_spectra = {}
    for place, sample in enumerate(tqdm(samples, unit="conversation", desc="looking")):
        text = write(loaded, ttt, sample)
        norms, spectra = text.memory.update_norms(), {i: spectrum(text.memory, i) for i in layers}
        first_spectra = first_spectra or {i: spectra[i]["singular_values"] for i in layers}
        parts = {name: part for name, part in parts_of(text.memory).items() if place < ablated or name[1] is None}
        for i in layers:
            sums[i]["update_norm"].append(norms[i].item())
            sums[i]["effective_rank"].append(spectra[i]["effective_rank"])
        for probe, asked, found in questions(loaded, ttt, text, parts):
            for (kind, i), (good, loss, kl) in found.items():
                seen.setdefault((kind, i), []).append((good, loss, place < ablated))
                if f"kl_{kind}" in sums[layers[0]]:
                    sums[i][f"kl_{kind}"].append(kl)
            best = met_best(text, asked, probe)
            for i in layers:
                sums[i]["share_of_output"].append(asked.share[i])
                for name in ("in_fact", "chance", "met"):
                    sums[i][name].append(float(best[i][name]))
            good, loss, _ = found["all", None]
            rows.append({"sample_id": sample["sample_id"], "probe_id": probe["probe_id"], "question": probe["question"], "gold": probe["gold_answer"],
                         "right": good, "loss": loss, "kept": kept_of(text, probe), "met_best": best})
            if place == 0 and len(drawn) < DRAWN:
                drawn.append((text, probe, asked))
    mean = lambda values: sum(values) / len(values)
    em = lambda name, only=False: mean([good for good, _, apart in seen[name] if apart or not only])
    by_layer = {i: {name: mean(values) for name, values in sums[i].items() if values} | {f"em_{kind}": em((kind, j)) for kind, j in seen if j == i} for i in layers}
    apart = {"conversations": min(ablated, len(samples)), "questions": len(seen["only", layers[0]]), "em": em(("all", None), True)} if ablated else None
    loss = lambda name: mean([loss for _, loss, _ in seen[name]])
    return {"conversations": len(samples), "questions": len(rows), "em": em(("all", None)), "em_without_memory": em(("none", None)),
            "loss": loss(("all", None)), "loss_without_memory": loss(("none", None)),
            "ablated": apart, "layers": by_layer, "recall_by_inner_loss": recall_by_inner(rows, layers), "spectrum_of_the_first": first_spectra,
            "questions_and_what_they_met": list(map(told_short, rows))}, drawn


def questions(loaded: Loaded, ttt: InPlaceTTT, text: Text, parts: dict[tuple[str, int | None], Memory]):
    """Of each question of a conversation: (the probe, what was asked with the whole memory first, {part: (right, loss of the gold answer, divergence from
    the whole memory's predictions)}); of a layer with all deeper ones only whether it is right, the rest None."""
    sample, together = text.sample, Memory.stack(list(parts.values()))
    correct = dict(zip(parts, (right(said, sample) for said in answers(loaded, ttt, together, sample))))
    predicting = {name: row for row, name in enumerate(parts) if name[0] != "from"}
    together = together.select(list(predicting.values()))
    past = example(loaded, ttt, together, sample["lang"])
    for number, probe in enumerate(sample["probes"]):
        asked = ask(loaded, ttt, together, past, sample["lang"], probe)
        predicted = dict(zip(predicting, log_softmax(asked.logits, -1)))
        found = {name: (good[number], None, None) for name, good in correct.items()}
        for name, one in predicted.items():
            kl = kl_div(one, predicted["all", None], reduction="batchmean", log_target=True).item()
            found[name] = correct[name][number], nll_loss(one, asked.gold).item(), kl
        yield probe, asked, found


def recall_by_inner(rows: list[dict], layers: list[int]) -> dict:
    """Does the inner loss predict recall? Over questions, Spearman's correlation of the inner loss, after writing, of the fact's slots (mean over the
    layers that have one; and by layer) with whether the answer is right, and with the loss of the gold answer; beside it the share of layers whose
    query meets the fact best. Intervals over conversations."""
    groups = [row["sample_id"] for row in rows]
    right, loss = ([float(row[name]) for row in rows] for name in ("right", "loss"))
    kept = {i: [np.nan if row["kept"][i] is None else row["kept"][i] for row in rows] for i in layers}
    over_layers = np.ma.masked_invalid(np.array(list(kept.values()))).mean(0).filled(np.nan)
    finds = [np.mean([met["in_fact"] for met in row["met_best"].values()]) for row in rows]
    known = lambda answered: mean_of([value for value, good in zip(over_layers, right) if good == answered])
    return {"with_right": rank_correlation(over_layers, right, groups), "with_loss": rank_correlation(over_layers, loss, groups),
            "finding_with_right": rank_correlation(finds, right, groups), "finding_with_loss": rank_correlation(finds, loss, groups),
            "inner_where_right": known(1.0), "inner_where_wrong": known(0.0),
            "by_layer": {i: {"with_right": spearman(kept[i], right), "with_loss": spearman(kept[i], loss)} for i in layers}}


def told_short(row: dict) -> dict:
    """A question as the report keeps it: of each layer [inner loss of its fact, the token met best, the one after it, how well it is met, 1 where it is
    of the fact]."""
    by_layer = {i: [kept if (kept := row["kept"][i]) is None else round(kept, 3), met["word"], met["next"], round(met["met"], 3), int(met["in_fact"])]
                for i, met in row["met_best"].items()}
    return {name: row[name] for name in ("sample_id", "probe_id", "question", "gold", "right")} | {"loss": round(row["loss"], 3), "by_layer": by_layer}


# ---- the size of the update ----

def scaled(loaded: Loaded, ttt: InPlaceTTT, samples: list[dict]) -> dict[str, list[dict]]:
    """{what is scaled: cells by growing factor}: exact match and the share of empty or stuck answers with the memory, and with a random update of its
    norm, times each factor."""
    rows = {(what, factor): [] for what, _ in SCALED for factor in FACTORS}
    for sample in tqdm(samples, unit="conversation", desc="scaling"):
        memory = replace((text := write(loaded, ttt, sample)).memory, layers={i: layer.smaller_form() for i, layer in text.memory.layers.items()})
        noise = memory.noise_like(torch.Generator().manual_seed(zlib.crc32(sample["sample_id"].encode())))  # the noise of N_noise
        for (what, _), one in zip(SCALED, (memory, noise)):
            said = answers(loaded, ttt, Memory.stack([one.scale(factor) for factor in FACTORS]), sample)
            for factor, of_row in zip(FACTORS, said):
                size = factor * one.update_norm().item()
                rows[what, factor] += [{"sample_id": sample["sample_id"], "probe_id": probe["probe_id"], "seed": 0, "em": float(good), "size": size,
                                        "degenerate": degenerate(answer, sample["lang"])} for answer, good, probe in zip(of_row, right(of_row, sample), sample["probes"])]
    mean = lambda found, name: sum(row[name] for row in found) / len(found)
    cell = lambda factor, found: {"factor": factor, "update_norm": mean(found, "size"), "em": mean(found, "em"), "em_ci": em_interval(found, Bootstrap()),
                                  "degenerate": mean(found, "degenerate"), "n": len(found)}
    return {what: [cell(factor, rows[what, factor]) for factor in FACTORS] for what, _ in SCALED}
