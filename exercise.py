"""Exercise a model's row at full size with random weights: load, write, read, one training step, and what each costs.

    python exercise.py --model qwen3-8b --device cuda

Random weights have the shapes, the memory and the speed of the real ones, and no meaning: nothing here is scored.
Writes OUT/MODEL.json; a step is timed once, after one warm-up of the same step.
"""
from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from decoding import answers_to, heard, write_rows
from in_place_ttt import InPlaceTTT
from manifests import UserError, provenance, run_script, write_json
from model_utils import Loaded, find_row, load_model, pick_device
from objectives import recall_step
from training_data import Batch, Example

CONVERSATIONS, TEXT_TOKENS, PROBES, NEW_TOKENS = 32, 140, 8, 32  # the public attempt's lengths


def clock(device: torch.device, function):
    """(result, seconds, peak GB on the device or None) of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    return result, time.perf_counter() - begun, peak


def random_rows(count: int, length: int, generator: torch.Generator) -> list[list[int]]:
    return torch.randint(0, 250, (count, length), generator=generator).tolist()


def stages(loaded: Loaded, ttt: InPlaceTTT):
    """(name, function) of each stage; later ones use what the earlier left in `state`."""
    generator = torch.Generator().manual_seed(0)
    texts = random_rows(CONVERSATIONS, TEXT_TOKENS, generator)
    head, tails = random_rows(1, 60, generator)[0], random_rows(CONVERSATIONS * PROBES, 20, generator)
    pad, state = loaded.tokenizer.pad_token_id, {}
    batch = Batch([Example(text, head, [(tails[i * PROBES + j], tails[j][:6]) for j in range(2)]) for i, text in enumerate(texts[:8])])

    @torch.inference_mode()
    def write():
        state["memory"], _ = write_rows(loaded.model, ttt, texts, pad)

    @torch.inference_mode()
    def read():
        past = heard(loaded.model, [head] * CONVERSATIONS, pad, ttt, state["memory"])
        answers_to(loaded.model, loaded.tokenizer, tails, NEW_TOKENS, past, ttt, state["memory"])

    def train():
        optimizer = torch.optim.AdamW(ttt.parameters(), lr=1e-6)
        recall_step(loaded, ttt, batch, loaded.device).loss.backward()
        optimizer.step()
        ttt.zero_grad(set_to_none=True)

    return [(f"write {CONVERSATIONS} conversations of {TEXT_TOKENS} tokens", write),
            (f"read: {CONVERSATIONS * PROBES} probes, up to {NEW_TOKENS} new tokens", read),
            ("one recall update, 8 conversations, 2 probes each", train)], state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-8b", help="a row with a known architecture (default: %(default)s)")
    parser.add_argument("--form", default="codes", choices=("codes", "plain"), help="which of the row's settings (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--out", default="results/exercise", help="folder of the result (default: %(default)s)")
    arguments = parser.parse_args()
    row = find_row(arguments.model)
    device, dtype, reason = pick_device(arguments.device, arguments.dtype, row)
    loaded, seconds, peak = clock(device, lambda: load_model(arguments.model, device, dtype, random_weights=True))
    table = [("load", seconds, peak)]
    try:
        ttt = InPlaceTTT(loaded.model, getattr(row, arguments.form))
    except ValueError as error:
        raise UserError(str(error)) from error
    Path(arguments.out).mkdir(parents=True, exist_ok=True)
    steps, state = stages(loaded, ttt)
    for name, function in steps:
        function()  # warm-up
        table.append((name, *clock(device, function)[1:]))
    report(arguments, loaded, ttt.config, state, table, reason)


def report(arguments, loaded: Loaded, config, state, table, reason: str) -> None:
    print(f"{loaded.row.name}: {loaded.parameters / 1e9:.2f}B parameters, random weights, {reason}; TTT layers {list(config.layers)}")
    for name, seconds, peak in table:
        print(f"  {name:55s} {seconds:9.3f} s   peak {'-' if peak is None else f'{peak:.1f} GB'}")
    per_memory = state["memory"].nbytes() / CONVERSATIONS
    print(f"  memory of one conversation: {per_memory / 1e6:.2f} MB\n  not scored: the weights are random")
    write_json(Path(arguments.out) / f"{loaded.row.name}.json", {
        "model": loaded.row.name, "weights": "random", "scored": False, "parameters": loaded.parameters, "ttt": config.to_dict(),
        "stages": [{"stage": n, "seconds": round(s, 4), "peak_gb": p and round(p, 2)} for n, s, p in table],
        "bytes_per_memory": int(per_memory), "device": reason, **provenance()})


if __name__ == "__main__":
    run_script(main)
