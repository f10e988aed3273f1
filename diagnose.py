"""See inside a memory: which written token a question finds, and what each layer's memory does to the answer.

    python diagnose.py --adapter checkpoints/smollm2-deep --samples 10 --out results/diagnose/smollm2-deep

For level-1 conversations of a benchmark: (1) the query that predicts the answer's first token is held against the key of every written token,
layer by layer (keys and queries are unit vectors, or codes whose product is that of two cosines), and the token met best is looked up in the
text; (2) each layer's memory is taken out, and left alone, and the answers, the gold answer's loss and the divergence of the predictions are
measured; (3) the update's size, share of the MLP's output and spectrum; (4) along one long text (a level-3 conversation and the prose behind it, or
a file), the inner loss of every layer beside the model's own (adaptation.py). Writes OUT/report.json, OUT/found.png (a heat map over the words
of the first conversation), OUT/layers.png, OUT/along.png and OUT/report.md, which says it in words.
"""
from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch.nn.functional import kl_div, log_softmax, nll_loss
from tqdm import tqdm

import adaptation
import benchmark_file
import prompts
from conditions import MAX_NEW_TOKENS
from decoding import answers_to, forward_all, heard
from evaluate import exact_match
from in_place_ttt import InPlaceTTT
from manifests import UserError, provenance, run_script, write_json
from memory import Memory, meets
from model_utils import Loaded, find_row, load_adapter, load_model, pick_device

matplotlib.use("Agg")

DRAWN = 4   # questions of the first conversation in found.png


@dataclass(frozen=True)
class Text:
    """One conversation, written: its tokens as words, the character span of each, and under what key and how strongly each layer writes it."""

    sample: dict
    words: list[str]
    spans: list[tuple[int, int]]
    keys: dict[int, torch.Tensor]       # [1, S, F] or codes
    strength: dict[int, torch.Tensor]   # [S]; 0: no slot
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
                {i: writer.slots.keys[n] for n, i in enumerate(layers)}, {i: writer.slots.weights[n, 0] for n, i in enumerate(layers)}, memory)


@torch.no_grad()
def ask(loaded: Loaded, ttt: InPlaceTTT, memory: Memory, lang: str, probe: dict) -> Asked:
    """The example before the question is read in a context of its own, as run_experiment.py does it."""
    tokenizer = loaded.tokenizer
    tail, gold = prompts.tail_ids(tokenizer, lang, probe["question"]), prompts.answer_ids(tokenizer, lang, probe["gold_answer"])
    past = heard(loaded.model, [prompts.head_ids(tokenizer, lang, with_text=False)] * memory.batch, tokenizer.pad_token_id, ttt, memory)
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
        logits, _ = forward_all(loaded.model, ids, torch.ones_like(ids), past, session)
    for hook in hooks:
        hook.remove()
    norm = lambda t: torch.linalg.vector_norm(t, dim=-1)
    share = {i: (norm(outputs[i, "all"] - outputs[i, "base"]) / norm(outputs[i, "base"])).mean().item() for i in ttt.config.layers}
    return Asked(logits[:, answer].float(), torch.tensor(gold, device=loaded.device), session.queries, share)


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


def met_by(query_MK: torch.Tensor, text: Text, i: int, sizes) -> torch.Tensor:
    """How well a layer's query for the answer's first token meets the key of each written token, [S]; nan where it left no slot."""
    met_S = meets(query_MK[None, :1], text.keys[i], sizes)[0, 0].float().cpu()
    return met_S.masked_fill(text.strength[i].cpu() <= 0, float("nan"))


def met_best(text: Text, asked: Asked, probe: dict, sizes) -> dict[int, dict]:
    """Of each layer: the written token that the query for the answer's first token meets best, how well, and whether it belongs to the fact;
    chance: the share of slots that do."""
    inside, found = belongs(text, probe), {}
    for i, query in asked.queries.items():
        met = met_by(query, text, i, sizes)
        slot, best = ~met.isnan(), int(met.nan_to_num(nan=float("-inf")).argmax())
        found[i] = {"token": best, "word": text.words[best], "next": text.words[best + 1] if best + 1 < len(text.words) else "", "met": met[best].item(),
                    "in_fact": bool(inside[best]), "chance": (inside & slot).sum().item() / max(1, int(slot.sum()))}
    return found


def spectrum(memory: Memory, i: int) -> dict:
    """Singular values of dW, and the rank that their entropy stands for (Roy and Vetterli 2007)."""
    values = torch.linalg.svdvals(memory.layers[i].to_dense().update[0].float())
    share = values[values > 0] / values.sum()
    return {"effective_rank": torch.exp(-(share * share.log()).sum()).item() if len(share) else 0.0, "singular_values": [round(v, 6) for v in values[:64].tolist()]}


@torch.inference_mode()
def right(loaded: Loaded, ttt: InPlaceTTT, memory: Memory, sample: dict) -> list[list[bool]]:
    """Of each row of the memory, whether each question of the sample is answered exactly with it."""
    tokenizer, lang, probes = loaded.tokenizer, sample["lang"], sample["probes"]
    past = heard(loaded.model, [prompts.head_ids(tokenizer, lang, with_text=False)] * memory.batch, tokenizer.pad_token_id, ttt, memory)
    tails = [prompts.tail_ids(tokenizer, lang, probe["question"]) for probe in probes]
    answers, _ = answers_to(loaded.model, tokenizer, tails * memory.batch, MAX_NEW_TOKENS, past, ttt, memory)
    correct = [exact_match(a, [p["gold_answer"], *p.get("aliases", [])], lang) for a, p in zip(answers, probes * memory.batch)]
    return [correct[start:start + len(probes)] for start in range(0, len(correct), len(probes))]


def measure(loaded: Loaded, ttt: InPlaceTTT, samples: list[dict]) -> tuple[dict, list]:
    """(the report's numbers, what found.png draws)."""
    layers, drawn, rows, correct = list(ttt.config.layers), [], [], {}
    sums = {i: {"update_norm": [], "effective_rank": [], "share_of_output": [], "kl_without": [], "in_fact": [], "chance": [], "met": []} for i in layers}
    losses, first_spectra = {}, {}
    for sample in tqdm(samples, unit="conversation", desc="looking"):
        text = write(loaded, ttt, sample)
        parts = parts_of(text.memory)
        together = Memory.stack(list(parts.values()))
        for name, answered in zip(parts, right(loaded, ttt, together, sample)):
            correct.setdefault(name, []).extend(answered)
        norms, spectra = text.memory.update_norms(), {i: spectrum(text.memory, i) for i in layers}
        first_spectra = first_spectra or spectra
        for i in layers:
            sums[i]["update_norm"].append(norms[i].item())
            sums[i]["effective_rank"].append(spectra[i]["effective_rank"])
        for number, probe in enumerate(sample["probes"]):
            asked = ask(loaded, ttt, together, sample["lang"], probe)
            predicted = dict(zip(parts, log_softmax(asked.logits, -1)))
            best = met_best(text, asked, probe, text.memory.layers[layers[0]].sizes)
            for name, one in predicted.items():
                losses.setdefault(name, []).append(nll_loss(one, asked.gold).item())
            for i in layers:
                sums[i]["share_of_output"].append(asked.share[i])
                sums[i]["kl_without"].append(kl_div(predicted["without", i], predicted["all", None], reduction="batchmean", log_target=True).item())
                for name in ("in_fact", "chance", "met"):
                    sums[i][name].append(float(best[i][name]))
            rows.append({"sample_id": sample["sample_id"], "probe_id": probe["probe_id"], "question": probe["question"], "gold": probe["gold_answer"], "met_best": best})
            if sample is samples[0] and number < DRAWN:
                drawn.append((text, probe, asked))
    mean = lambda values: sum(values) / len(values)
    by_layer = {i: {name: mean(values) for name, values in sums[i].items()} | {
        f"{name}_{kind}": mean(measured[kind, i]) for name, measured in (("em", correct), ("loss", losses)) for kind in ("without", "only", "from")} for i in layers}
    return {"conversations": len(samples), "questions": len(rows), "em": mean(correct["all", None]), "em_without_memory": mean(correct["none", None]),
            "loss": mean(losses["all", None]), "loss_without_memory": mean(losses["none", None]), "layers": by_layer,
            "spectrum_of_the_first": first_spectra, "questions_and_what_they_met": rows}, drawn


# ---- the report ----

def words(found: dict, arm: str, model: str) -> str:
    """What was found, in words, by rules that stand here."""
    layers = found["layers"]
    finder = max(layers, key=lambda i: layers[i]["in_fact"])
    needed = min(layers, key=lambda i: layers[i]["em_without"])
    alone = max(layers, key=lambda i: layers[i]["em_only"])
    deep = max(i for i in layers if layers[i]["em_from"] >= 0.95 * found["em"])
    lost = found["em"] - layers[needed]["em_without"]
    lines = [f"{arm} on {model}, {found['conversations']} conversations, {found['questions']} questions: {found['em']:.3f} right with the memory, "
             f"{found['em_without_memory']:.3f} without; loss of the gold answer {found['loss']:.2f} and {found['loss_without_memory']:.2f} nats a token.",
             f"The question's query meets a token of the right fact best in {layers[finder]['in_fact']:.0%} of the questions in layer {finder} "
             f"(a slot drawn at random: {layers[finder]['chance']:.0%}); over all layers in {sum(c['in_fact'] for c in layers.values()) / len(layers):.0%}."]
    if found["em"] <= found["em_without_memory"]:
        lines.append("The memory answers nothing that is not answered without it, so no layer can be missed.")
    else:
        lines += [
            f"Layer {needed} is missed most: without its memory {layers[needed]['em_without']:.3f} are right" +
            (f", {lost:.3f} fewer." if lost > 0 else ", so no single layer is needed."),
            f"Alone, layer {alone} does best: {layers[alone]['em_only']:.3f}. " +
            ("The layers work together." if layers[alone]["em_only"] < 0.5 * found["em"] else "It carries most of the memory by itself.") +
            f" Layers {deep} and deeper are enough for 95% of what all of them answer ({layers[deep]['em_from']:.3f})."]
    lines.append(f"The update is {min(c['update_norm'] for c in layers.values()):.2f} to {max(c['update_norm'] for c in layers.values()):.2f} times |W_down|, of effective rank "
                 f"{min(c['effective_rank'] for c in layers.values()):.0f} to {max(c['effective_rank'] for c in layers.values()):.0f}, and adds "
                 f"{min(c['share_of_output'] for c in layers.values()):.2f} to {max(c['share_of_output'] for c in layers.values()):.2f} of the MLP's output while an answer is said.")
    return "\n\n".join(lines) + "\n"


def draw_found(drawn: list, sizes, path: Path) -> None:
    """Questions by layers, over the written tokens that left a slot in any layer: how well the query for the answer's first token meets each."""
    text = drawn[0][0]
    places = [place for place in range(len(text.words)) if any(strength[place] > 0 for strength in text.strength.values())]
    word = lambda token: token.strip().replace("$", r"\$") or ("\\n" if "\n" in token else "·")
    label = lambda place: " ".join(map(word, text.words[place:place + 2]))
    figure = Figure(figsize=(max(8, 0.16 * len(places)), 1.7 + 1.8 * len(drawn)), layout="constrained")
    panels = figure.subplots(len(drawn), 1, squeeze=False, sharex=True)[:, 0]
    figure.suptitle(f"{text.sample['sample_id']}: how well each question meets the written tokens, by layer (red: the fact; white: no slot; labels: the token and the one after it)", fontsize=9)
    for ax, (_, probe, asked) in zip(panels, drawn):
        met = [met_by(query, text, i, sizes)[places] for i, query in asked.queries.items()]
        image = ax.imshow(torch.stack(met).numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        ax.set_yticks(range(len(met)), list(asked.queries), fontsize=6)
        ax.set_ylabel("layer", fontsize=7)
        ax.set_title(f"{probe['question']}  ({probe['gold_answer']})", fontsize=8)
        for column in (column for column, place in enumerate(places) if belongs(text, probe)[place]):
            ax.add_patch(matplotlib.patches.Rectangle((column - 0.5, -0.5), 1, 0.4, color="red"))
    panels[-1].set_xticks(range(len(places)), [label(place) for place in places], rotation=90, fontsize=6)
    figure.colorbar(image, ax=list(panels), fraction=0.015, pad=0.005)
    figure.savefig(path, dpi=150)


def draw_layers(found: dict, path: Path) -> None:
    """Bars by layer: what is right without it and with it alone, what its query finds, and how large its update is."""
    layers, places = found["layers"], range(len(found["layers"]))
    panels = (("right answers", (("without this layer", "em_without"), ("this layer and deeper ones", "em_from")), found["em"]),
              ("divergence without it, nats", (("", "kl_without"),), None),
              ("finds the fact", (("met best", "in_fact"), ("a slot at random", "chance")), None),
              ("size of the update", (("|dW| / |W_down|", "update_norm"), ("of the MLP's output", "share_of_output")), None))
    figure = Figure(figsize=(13, 3.9), layout="constrained")
    for ax, (title, series, whole) in zip(figure.subplots(1, len(panels)), panels):
        for number, (label, name) in enumerate(series):
            width = 0.8 / len(series)
            ax.bar([place - 0.4 + width * (number + 0.5) for place in places], [cell[name] for cell in layers.values()], width, label=label or None,
                   color=("#0072B2", "#E69F00")[number])
        if whole is not None:
            ax.axhline(whole, color="black", linewidth=1, label="all layers")
        every = -(-len(layers) // 10)
        ax.set_xticks(places[::every], list(layers)[::every])
        ax.set_xlabel("layer")
        ax.set_title(title, fontsize=9)
        if len(series) > 1:
            ax.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.suptitle(f"{found['conversations']} conversations, {found['questions']} questions", fontsize=9)
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="checkpoint folder with fast weights")
    parser.add_argument("--model", default="smollm2-135m", help="its base (default: %(default)s)")
    parser.add_argument("--benchmark", default="benchmark_v1.json", help="whose level-1 conversations are looked into (default: %(default)s)")
    parser.add_argument("--lang", default="en", choices=benchmark_file.LANGS)
    parser.add_argument("--samples", type=int, default=10, help="conversations, from the first on (default: %(default)s)")
    parser.add_argument("--text", type=Path, help="a text file to read along (default: the benchmark's first level-3 conversation with its distractor)")
    parser.add_argument("--tokens", type=int, default=1024, help="of that text (default: %(default)s)")
    parser.add_argument("--piece", type=int, default=64, help="tokens of a piece, for an arm whose whole text is one chunk (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, help="folder of the result")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    arguments = parser.parse_args()
    for name in ("samples", "tokens", "piece"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: use 1 or more")
    return arguments


def long_text(arguments, bench: dict) -> str:
    """What is read along."""
    if arguments.text is not None:
        try:
            return arguments.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {arguments.text}: cannot be read as UTF-8 text ({type(error).__name__}); name another file") from error
    found = [s for s in benchmark_file.select_samples(bench, (3,), (arguments.lang,), 1) if s["distractor"]]
    if not found:
        raise UserError(f"--benchmark {arguments.benchmark}: no {arguments.lang} sample of level 3 to read along; give a --text")
    return prompts.with_distractor(found[0])


def main() -> None:
    arguments = parse_arguments()
    bench = benchmark_file.load_benchmark(arguments.benchmark)
    samples = benchmark_file.select_samples(bench, (1,), (arguments.lang,), arguments.samples)
    if not samples:
        raise UserError(f"--benchmark {arguments.benchmark}: no {arguments.lang} sample of level 1; choose another language or file")
    text = long_text(arguments, bench)
    device, dtype, reason = pick_device(arguments.device, arguments.dtype, find_row(arguments.model))
    loaded = load_model(arguments.model, device, dtype)
    ttt, manifest = load_adapter(arguments.adapter, loaded)
    try:
        read = adaptation.along(loaded, ttt, prompts.written_ids(loaded.tokenizer, text)[:arguments.tokens], arguments.piece)
    except ValueError as error:
        raise UserError(f"--tokens {arguments.tokens}: {error}") from error
    found, drawn = measure(loaded, ttt, samples)
    curve = adaptation.summary(read)
    text = words(found, manifest["arm"], loaded.row.name) + "\n" + adaptation.words(curve, manifest["arm"], ttt.config.rule)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "report.json", {"arm": manifest["arm"], "model": loaded.row.name, "lang": arguments.lang, **found, "along": {"text": str(arguments.text or arguments.benchmark), **curve},
                                               "benchmark": {"file": arguments.benchmark, "sha256": benchmark_file.sha256_of(arguments.benchmark)},
                                               "seed": manifest["seed"], "device": reason, **provenance()})
    (arguments.out / "report.md").write_text(text, encoding="utf-8")
    draw_found(drawn, drawn[0][0].memory.layers[ttt.config.layers[0]].sizes, arguments.out / "found.png")
    draw_layers(found, arguments.out / "layers.png")
    adaptation.draw(read, arguments.out / "along.png")
    print(text + f"Report and figures: {arguments.out}")


if __name__ == "__main__":
    run_script(main)
