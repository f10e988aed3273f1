"""See inside a memory: is it learning, is it kept, does it reach the output?

    python diagnose.py --adapter checkpoints/smollm2-deep --samples 16 --out results/diagnose/smollm2-deep
    python diagnose.py --model tiny-llama --form plain --chunk 16 --samples built-in --text built-in --streamed 64 --out /tmp/look     # an untrained start

One folder, OUT/report.md with its figures, says in words and by rules that stand there:
(1) along a text, piece by piece and, of its beginning, one token a call: the inner loss of every layer beside the model's own (adaptation.py);
(2) the state: handed on, reset, streamed, saved and loaded, with PASS or FAIL (state_checks.py);
(3) for conversations with known facts: which written token a question meets, what each layer's memory does to answers and predictions, its size
and spectrum, and whether the inner loss predicts recall (inside.py);
(4) right and degenerate answers with the memory, and with random updates of its norm, times a factor.
OUT/report.json has the numbers, OUT/along.npz the losses of every token and layer (arrays of adaptation.Along, float16).
"""
from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

import adaptation
import benchmark_file
import inside
import inside_figures
import prompts
import state_checks
from adaptation import Along
from decoding import check_window
from diagnose_input import BUILT_IN, attach, choose_samples, choose_text
from evaluate import write_text
from manifests import UserError, provenance, run_script, write_json
from model_utils import find_row, load_model, pick_device
from trends import predicts, told

ENOUGH = 0.95  # of what all layers answer


def memory_words(found: dict) -> str:
    """What was found of the conversations' memories, in words."""
    layers, apart = found["layers"], found["ablated"]
    finder = max(layers, key=lambda i: layers[i]["in_fact"])
    ends = lambda name, digits: " to ".join(f"{end(cell[name] for cell in layers.values()):.{digits}f}" for end in (min, max))
    lines = [f"{found['conversations']} conversations, {found['questions']} questions: {found['em']:.3f} right with the memory, "
             f"{found['em_without_memory']:.3f} without; loss of the gold answer {found['loss']:.2f} and {found['loss_without_memory']:.2f} nats a token.",
             f"The question's query meets a token of the right fact best in {layers[finder]['in_fact']:.0%} of the questions in layer {finder} "
             f"(a slot drawn at random: {layers[finder]['chance']:.0%}); over all layers in {sum(c['in_fact'] for c in layers.values()) / len(layers):.0%}."]
    if apart is not None:
        lines.append(f"In {apart['conversations']} of them, with {apart['questions']} questions of which {apart['em']:.3f} are right, "
                     "each layer's memory was taken out and left alone.")
        lines += ablation_words(layers, apart["em"]) if found["em"] > found["em_without_memory"] else [
            "The memory answers nothing that is not answered without it, so no layer can be missed."]
    lines.append(f"The update is {ends('update_norm', 2)} times |W_down|, of effective rank {ends('effective_rank', 0)}, "
                 f"and adds {ends('share_of_output', 2)} of the MLP's output while an answer is said.")
    return "\n\n".join(lines) + "\n"


def ablation_words(layers: dict, em: float) -> list[str]:
    """What single layers are worth to `em`, the share of right answers with all of them."""
    needed = min(layers, key=lambda i: layers[i]["em_without"])
    alone = max(layers, key=lambda i: layers[i]["em_only"])
    deep = max(i for i in layers if layers[i]["em_from"] >= ENOUGH * em)
    lost = em - layers[needed]["em_without"]
    return [f"Layer {needed} is missed most: without its memory {layers[needed]['em_without']:.3f} are right" +
            (f", {lost:.3f} fewer" if lost > 0 else ", so no single layer is needed") +
            f", and the predictions move by {layers[needed]['kl_without']:.2f} nats (KL).",
            f"Alone, layer {alone} does best: {layers[alone]['em_only']:.3f}. " +
            ("The layers work together." if layers[alone]["em_only"] < 0.5 * em else "It carries most of the memory by itself.") +
            f" Layers {deep} and deeper are enough for {ENOUGH:.0%} of what all of them answer ({layers[deep]['em_from']:.3f})."]


def recall_words(found: dict) -> str:
    """Does the inner loss predict recall? In words."""
    cells = found["recall_by_inner_loss"]

    def rho(name: str, sign: int) -> str:
        cell = cells[name]
        if cell["rho"] is None:
            return "cannot be computed (all alike)"
        return f"{cell['rho']:.2f} {told(cell['ci'], 2)} ({predicts(cell, sign)})"

    mean = lambda cell: "none" if cell["mean"] is None else f"{cell['mean']:.3f} {told(cell['ci'])}"
    return ("Does the inner loss predict recall? Spearman's correlation of the inner loss that is left in the fact's slots (mean over the layers that have one) "
            f"with whether the answer is right: {rho('with_right', -1)}; with the loss of the gold answer: {rho('with_loss', 1)}; "
            f"{cells['with_right']['n']} questions of {cells['with_right']['groups']} conversations, intervals over conversations. "
            "Yes: the whole interval lies on the side where less inner loss goes with more recall. "
            f"Mean inner loss of the facts that are answered {mean(cells['inner_where_right'])}, of the others {mean(cells['inner_where_wrong'])}. "
            "Beside it, the share of layers whose query meets the fact best: "
            f"with right answers {rho('finding_with_right', 1)}, with the gold answer's loss {rho('finding_with_loss', -1)}.\n")


def scale_words(scaled: dict) -> str:
    """What became of the answers at other sizes of the update, in words."""
    lines = ["| | " + " | ".join(f"×{cell['factor']:g}" for cell in next(iter(scaled.values()))) + " |", "| --- |" + " --- |" * len(inside.FACTORS)]
    for what, cells in scaled.items():
        lines.append(f"| {what}: right | " + " | ".join(f"{cell['em']:.3f} {told(cell['em_ci'], 2)}" for cell in cells) + " |")
        lines.append(f"| {what}: empty or stuck | " + " | ".join(f"{cell['degenerate']:.3f}" for cell in cells) + " |")
    memory, noise = scaled.values()
    best = max(memory, key=lambda cell: cell["em"])
    verdict = (f"Best at ×{best['factor']:g} ({best['em']:.3f} right; |dW| {best['update_norm']:.2f} times |W_down|)."
               if best["em"] > max(cell["em"] for cell in noise)
               else "At no size does the memory answer more than noise of its norm: the size of the update is not what is missing.")
    return "\n".join(lines) + f"\n\n{verdict}\n"


def in_short(what: dict) -> str:
    """The report's answers in a few lines."""
    checks, along, memory = what["checks"], what["along"], what["memory"]
    failed = "; ".join(check.asks for check in checks if not check.passed)
    lines = [f"- Learning: {along['disconnect']}.",
             f"- State: {what['verdict']}; {sum(check.passed for check in checks)} of {len(checks)} checks pass{'; not: ' + failed if failed else ''}.",
             f"- Does the inner loss predict the outer loss? On the same tokens: {predicts(along['same_tokens'], 1)}; of a write, on the next piece: {predicts(along['next_piece'], 1)}."]
    if memory is not None:
        cells = memory["recall_by_inner_loss"]
        lines += [f"- Output: {memory['em']:.3f} of {memory['questions']} questions are right with the memory alone, {memory['em_without_memory']:.3f} without it.",
                  f"- Does the inner loss predict recall? By right answers: {predicts(cells['with_right'], -1)}; by the gold answer's loss: {predicts(cells['with_loss'], 1)}. "
                  f"Does finding the fact? {predicts(cells['finding_with_right'], 1)}; {predicts(cells['finding_with_loss'], -1)}."]
    return "\n".join(lines) + "\n"


def report_text(arm: str, loaded, rule: str, what: dict) -> str:
    """report.md."""
    parts = [f"# Inside {arm} on {loaded.row.name}", "`" + provenance()["command"] + "`", in_short(what),
             f"## Is it learning? Inner and outer loss along {what['text']}", f"Rule: {adaptation.RULE}. Slopes are Theil and Sen's over pieces; 95% intervals.",
             "### Piece by piece", adaptation.words(what["along"], rule), "![Inner and outer loss, piece by piece](along.png)",
             adaptation.relation_words(what["along"]),
             "### One token a call", adaptation.words(what["streamed"], rule), "![Inner and outer loss, token by token](streamed.png)",
             "## Is it kept? The state", f"Verdict: {what['verdict']}.", state_checks.table(what["checks"])]
    if what["memory"] is not None:
        parts += ["## Does it reach the output? Conversations with known facts", memory_words(what["memory"]), "![A fact being found](found.png)",
                  "![A fact being found, by layer](found_layers.png)", "![What each layer does](layers.png)", recall_words(what["memory"])]
    if what["scaled"] is not None:
        parts += ["## Is it the size?", scale_words(what["scaled"]), "![Answers against the size of the update](scale.png)"]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def save_positions(read: Along, path: Path) -> None:
    """The losses of every token and layer, arrays of Along, in float16."""
    arrays = {name: getattr(read, name).astype(np.float16) for name in ("off_L", "on_L", "l0_NL", "prev_NL", "after_NL")}
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez_compressed(file, starts=np.array(read.starts), layers=np.array(read.layers), **arrays)
    os.replace(part, path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arm = parser.add_argument_group("what is looked into")
    arm.add_argument("--adapter", help="checkpoint folder with fast weights (default: the model's untrained start)")
    arm.add_argument("--model", default="smollm2-135m", help="its base (default: %(default)s)")
    arm.add_argument("--form", default="codes", choices=("codes", "plain"), help="of an untrained start (default: %(default)s)")
    arm.add_argument("--chunk", help="of an untrained start: tokens per chunk, or whole (default: the row's)")
    text = parser.add_argument_group("what it reads")
    text.add_argument("--benchmark", default="benchmark_v1.json", help="file that conversations come from (default: %(default)s)")
    text.add_argument("--lang", default="en", choices=benchmark_file.LANGS)
    text.add_argument("--samples", default="16", help=f"how many level-1 conversations, from the first on, or names of samples with a comma between, "
                                                      f"{BUILT_IN} among them; 0: none, so parts 1 and 2 alone (default: %(default)s)")
    text.add_argument("--ablate", type=int, default=4, help="conversations, from the first on, whose memories are taken apart layer by layer, the costly part (default: %(default)s)")
    text.add_argument("--scale", type=int, default=4, help="conversations, from the first on, whose memories, and noise of their norm, are scaled (default: %(default)s)")
    text.add_argument("--text", help=f"read along: {BUILT_IN}, the id of a sample, or a text file (default: the first conversation with prose behind it)")
    text.add_argument("--tokens", type=int, default=2048, help="of that text (default: %(default)s)")
    text.add_argument("--piece", type=int, default=64, help="tokens of a piece, for an arm whose whole text is one chunk (default: %(default)s)")
    text.add_argument("--streamed", type=int, default=160, help="tokens of that text that are read once more one a call, and checked (default: %(default)s)")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--out", required=True, type=Path, help="folder of the result")
    how.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    how.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    arguments = parser.parse_args()
    for name, least in {"tokens": 1, "piece": 1, "streamed": 1, "ablate": 0, "scale": 0}.items():
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} {getattr(arguments, name)}: use {least} or more")
    return arguments


def read_text(arguments, loaded, ttt, text: str) -> tuple[list[int], Along, Along]:
    """(the tokens of the streamed part, the text read piece by piece, that part read one token a call)."""
    ids = prompts.written_ids(loaded.tokenizer, text)[:arguments.tokens]
    check_window(loaded.model, len(ids), f"--tokens {arguments.tokens}")
    few = ids[:arguments.streamed]
    try:
        return few, adaptation.along(loaded, ttt, ids, arguments.piece), adaptation.along(loaded, ttt, few, arguments.piece, streaming=True)
    except ValueError as error:
        raise UserError(f"--tokens {arguments.tokens} --streamed {arguments.streamed}: {error}") from error


def main() -> None:
    arguments = parse_arguments()
    bench = benchmark_file.load_benchmark(arguments.benchmark)
    samples = choose_samples(bench, arguments.samples, arguments.lang, arguments.benchmark)
    text, name = choose_text(bench, arguments.text, arguments.lang, arguments.benchmark)
    device, dtype, reason = pick_device(arguments.device, arguments.dtype, find_row(arguments.model))
    loaded = load_model(arguments.model, device, dtype)
    ttt, arm = attach(loaded, arguments.adapter, arguments.form, arguments.chunk)
    few, read, streamed = read_text(arguments, loaded, ttt, text)
    checks = state_checks.run(loaded, ttt, few, read, streamed)
    found, drawn = inside.measure(loaded, ttt, samples, arguments.ablate) if samples else (None, [])
    what = {"text": name, "along": adaptation.summary(read), "streamed": adaptation.summary(streamed), "checks": checks,
            "verdict": state_checks.verdict(state_checks.moves(read), read.parameters), "memory": found,
            "scaled": inside.scaled(loaded, ttt, samples[:arguments.scale]) if samples[:arguments.scale] else None}
    written = report_text(arm, loaded, ttt.config.rule, what)
    arguments.out.mkdir(parents=True, exist_ok=True)
    inside_figures.draw_all(arguments.out, found, drawn, read, streamed, what["scaled"], arm)
    save_positions(read, arguments.out / "along.npz")
    source = {"file": arguments.benchmark, "sha256": benchmark_file.sha256_of(arguments.benchmark)}
    write_json(arguments.out / "report.json", {"arm": arm, "model": loaded.row.name, "lang": arguments.lang, **what, "checks": [check._asdict() for check in checks],
                                               "benchmark": source, "device": reason, **provenance()})
    write_text(arguments.out / "report.md", written)
    print(written + f"\nReport and figures: {arguments.out}")


if __name__ == "__main__":
    run_script(main)
