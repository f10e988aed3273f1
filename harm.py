"""What a memory costs text that has nothing to do with it: perplexity on unrelated prose, with and without a memory attached.

    python harm.py --adapter checkpoints/smollm2-deep --lang en --out results/harm/smollm2-deep-en.json

Every level-3 conversation of the benchmark is written to memory and dropped; then the first tokens of its distractor, which has
nothing to do with it, are read as a text of their own, once with the memory attached and once by the base alone. (What a memory
costs a question about another text in the prompt is the condition A_foreign of run_experiment.py.)
"""
from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from scipy.stats import bootstrap
from tqdm import tqdm

import benchmark_file
import prompts
from decoding import reading, whole_rows, write_rows
from in_place_ttt import InPlaceTTT
from manifests import UserError, provenance, run_script, write_json
from memory import Memory
from model_utils import Loaded, find_row, load_adapter, load_model, pick_device


def token_losses(loaded: Loaded, rows: list[list[int]], ttt: InPlaceTTT | None = None, memory: Memory | None = None) -> list[torch.Tensor]:
    """-log p of every token of each row but its first, in nats; with a memory attached where one is given."""
    with reading(ttt, memory) as session:
        logits, ids, _ = whole_rows(loaded.model, rows, loaded.tokenizer.pad_token_id, session)
    losses_BL = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return [losses_BL[i, -(len(row) - 1):].cpu() for i, row in enumerate(rows)]


@torch.inference_mode()
def measure(loaded: Loaded, ttt: InPlaceTTT, samples: list[dict], tokens: int, batch_size: int) -> list[dict]:
    """One row a sample: mean loss of its prose with the memory of its conversation attached, and without."""
    rows, pad_id = [], loaded.tokenizer.pad_token_id
    for first in tqdm(range(0, len(samples), batch_size), desc="reading prose", unit="batch"):
        batch = samples[first:first + batch_size]
        memory, _ = write_rows(loaded.model, ttt, [prompts.written_ids(loaded.tokenizer, s["conversation"]) for s in batch], pad_id, dropped=True)
        prose = [prompts.written_ids(loaded.tokenizer, s["distractor"])[:tokens] for s in batch]
        attached, alone = token_losses(loaded, prose, ttt, memory), token_losses(loaded, prose)
        rows += [{"sample_id": s["sample_id"], "tokens": len(ids) - 1, "with_memory": a.mean().item(), "without": b.mean().item()}
                 for s, ids, a, b in zip(batch, prose, attached, alone)]
    return rows


def summary(rows: list[dict], seed: int = 0) -> dict:
    """Perplexities over all tokens and their ratio with a 95% bootstrap interval over samples."""
    gaps = [row["with_memory"] - row["without"] for row in rows]
    mean = lambda name: sum(row[name] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
    interval = None
    if len(set(gaps)) > 1:
        found = bootstrap((gaps,), lambda gap, axis: gap.mean(axis), n_resamples=2000, rng=seed).confidence_interval
        interval = [math.exp(found.low), math.exp(found.high)]
    return {"samples": len(rows), "tokens": sum(row["tokens"] for row in rows), "perplexity": math.exp(mean("without")),
            "perplexity_with_memory": math.exp(mean("with_memory")), "ratio": math.exp(sum(gaps) / len(gaps)), "ratio_ci": interval}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="checkpoint folder with fast weights")
    parser.add_argument("--model", default="smollm2-135m", help="its base (default: %(default)s)")
    parser.add_argument("--benchmark", default="benchmark_v1.json", help="file with distractors (default: %(default)s)")
    parser.add_argument("--lang", default="en", choices=benchmark_file.LANGS)
    parser.add_argument("--limit", type=int, help="only the first N samples")
    parser.add_argument("--tokens", type=int, default=256, help="of each distractor (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples per batch (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    arguments = parser.parse_args()
    for name, least in {"tokens": 2, "batch_size": 1, "limit": 1}.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: use {least} or more")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    bench = benchmark_file.load_benchmark(arguments.benchmark)
    samples = [s for s in bench["samples"] if s["lang"] == arguments.lang and s["distractor"]][:arguments.limit]
    if not samples:
        raise UserError(f"--benchmark {arguments.benchmark}: no {arguments.lang} sample has a distractor; name a file with level 3")
    device, dtype, reason = pick_device(arguments.device, arguments.dtype, find_row(arguments.model))
    loaded = load_model(arguments.model, device, dtype)
    ttt, manifest = load_adapter(arguments.adapter, loaded)
    if manifest["lora"]:
        raise UserError(f"--adapter {arguments.adapter}: a joint arm has a LoRA on its base, so there is no base alone to compare with; give an arm without --joint")
    rows = measure(loaded, ttt, samples, arguments.tokens, arguments.batch_size)
    found = summary(rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out, {"arm": manifest["arm"], "model": loaded.row.name, "lang": arguments.lang, **found, "rows": rows,
                               "benchmark": {"file": arguments.benchmark, "sha256": benchmark_file.sha256_of(arguments.benchmark)},
                               "seed": manifest["seed"], "device": reason, **provenance()})
    ends = "no interval" if found["ratio_ci"] is None else "[{:.3f}, {:.3f}]".format(*found["ratio_ci"])
    print(f"{manifest['arm']} on {loaded.row.name}, {arguments.lang}: perplexity on unrelated prose {found['perplexity']:.2f} by the base, "
          f"{found['perplexity_with_memory']:.2f} with a memory attached; mean ratio {found['ratio']:.3f} {ends} "
          f"({found['samples']} conversations, {found['tokens']} tokens)")


if __name__ == "__main__":
    run_script(main)
