"""Check on the running code what a sceptic would ask first: that the memory is written, is read, and is all that is in reach.

    python sanity.py --tiny                                               random models of every family, seconds on a CPU
    python sanity.py --model smollm2-135m --adapter checkpoints/smollm2-deep

Texts and questions are the benchmark's first conversations, written and asked as run_experiment.py does it. Each check prints
PASS or FAIL, its name, what was measured and the bound. Exit code 0: all pass; 1: a check fails; 2: bad arguments.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import math
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

import benchmark_file
import decoding
import prompts
from arms import base_digest
from decoding import TOLERANCE, answers_to, check_window, forward, heard, prefill, write_rows
from evaluate import exact_match
from in_place_ttt import InPlaceTTT
from manifests import UserError, read_manifest, run_script
from memory import Memory
from model_utils import MODELS, Loaded, find_row, load_adapter, load_lora, load_model, pick_device

TEXTS = 3              # conversations the checks of the mechanism write
SWAPPED_TEXTS = 8      # conversations of the swapped-memory check: it compares scores, so it needs more questions
QUESTIONS = 3          # questions to each conversation
NEW_TOKENS = 12        # as long as the longest gold answer
READ_TOKENS = 32       # tokens read one by one, after a whole text, while the memory must not change
CHUNK = 16             # cuts every conversation many times, and the last chunk is partial
SWAPPED_EXTRA = 1      # right answers by luck that another conversation's memory may have over none


class Outcome(NamedTuple):
    passed: bool
    measured: str
    bound: str


def at_most(values: list[float], bound: float, what: str) -> Outcome:
    """The largest value against its bound; torch's max keeps a NaN, and NaN fails."""
    value = torch.tensor(values, dtype=torch.float64).max().item()
    return Outcome(value <= bound, f"{what} {value:.3g}", f"at most {bound:g}")


@dataclass
class Setup:
    """A model with its adapter, what is written and asked, and what the base was before the adapter was attached."""

    loaded: Loaded
    ttt: InPlaceTTT
    samples: list[dict]
    texts: list[list[int]]
    tolerance: float
    fresh_digest: str
    fresh_logits: torch.Tensor

    @functools.cached_property
    def memory(self) -> Memory:
        """Of the first TEXTS texts: written once, used by every check that asks about them and needs no other way of writing."""
        _ = self.unaided  # asked before the first write: what writing leaves behind cannot be in both sides of a comparison
        return write(self, self.texts[:TEXTS])

    @functools.cached_property
    def unaided(self) -> tuple[list[str], torch.Tensor]:
        """C_nothing: (answers, first logits) to the questions about those texts, with no memory."""
        return ask(self, None, self.samples[:TEXTS])


def write(setup: Setup, rows: list[list[int]]) -> Memory:
    """The memory of each text; what attention saw is dropped."""
    memory, _ = write_rows(setup.loaded.model, setup.ttt, rows, setup.loaded.tokenizer.pad_token_id, dropped=True)
    return memory


def ask(setup: Setup, memory: Memory | None, samples: list[dict], new_tokens: int = NEW_TOKENS) -> tuple[list[str], torch.Tensor]:
    """(answers, logits of their first tokens [N, V]) to the first QUESTIONS of each sample, no text in the prompt."""
    model, tokenizer, lang = setup.loaded.model, setup.loaded.tokenizer, samples[0]["lang"]
    head = prompts.head_ids(tokenizer, lang, with_text=False)
    tails = [prompts.tail_ids(tokenizer, lang, probe["question"]) for s in samples for probe in s["probes"][:QUESTIONS]]
    check_window(model, len(head) + max(map(len, tails)) + NEW_TOKENS, samples[0]["sample_id"])
    past = heard(model, [head] * len(samples), tokenizer.pad_token_id, setup.ttt, memory)
    return answers_to(model, tokenizer, tails, new_tokens, past, setup.ttt, memory)


def whole_rows(loaded: Loaded, rows: list[list[int]], writer=None) -> torch.Tensor:
    """Logits [R, V] of the rows' tokens (pads left out) from one forward call; a writer is told what comes."""
    logits, _, mask = decoding.whole_rows(loaded.model, rows, loaded.tokenizer.pad_token_id, writer)
    return logits[mask.bool()]


def chunk_lengths(ttt: InPlaceTTT) -> tuple[int | None, ...]:
    """The chunk lengths an adapter is checked with, the shortest first: with the whole text as one chunk, writing reads nothing back.

    An adapter that knows no other length (ridge solves for the whole text, blind reads nothing back) is checked as it is.
    """
    return (None,) if ttt.config.rule == "ridge" or ttt.config.blind else (CHUNK, None)


@contextlib.contextmanager
def chunk_length(ttt: InPlaceTTT, chunk: int | None):
    """The same adapter with another chunk length."""
    holders, config = [ttt, *ttt.fast.values()], ttt.config
    try:
        for holder in holders:
            holder.config = replace(config, chunk=chunk)
        yield
    finally:
        for holder in holders:
            holder.config = config


def memory_error(first: Memory, second: Memory) -> float:
    """Largest |dW1 - dW2| / |dW1| over layers and rows (Frobenius); NaN where nothing was written."""
    errors = []
    for i, layer in first.layers.items():
        one, two = layer.to_dense().update.flatten(1), second.layers[i].to_dense().update.flatten(1)
        errors.append(((one - two).norm(dim=1) / one.norm(dim=1)).max())
    return torch.stack(errors).max().item()


def logit_error(first: torch.Tensor, second: torch.Tensor) -> float:
    return ((first - second).abs().max() / first.abs().max()).item()


def differing(first: list[str], second: list[str]) -> int:
    return sum(a != b for a, b in zip(first, second, strict=True))


def right_answers(answers: list[str], samples: list[dict]) -> int:
    probes = [probe for sample in samples for probe in sample["probes"][:QUESTIONS]]
    return sum(exact_match(answer, [probe["gold_answer"], *probe.get("aliases", [])], samples[0]["lang"])
               for answer, probe in zip(answers, probes, strict=True))


def writing_changes_the_weights(setup: Setup) -> Outcome:
    norm = setup.memory.update_norm().min().item()
    return Outcome(0 < norm < math.inf, f"smallest |dW|/|W| of a text {norm:.3g}", "above 0")


def memory_changes_answers(setup: Setup) -> Outcome:
    answers, _ = ask(setup, setup.memory, setup.samples[:TEXTS])
    changed = differing(answers, setup.unaided[0])
    return Outcome(changed > 0, f"changed by the memory: {changed} of {len(answers)} answers", "at least 1")


def empty_memory_is_no_memory(setup: Setup) -> Outcome:
    """C_nothing, then a text is written and its update zeroed: anything else left of the text would show in the answers."""
    expected, expected_logits = setup.unaided
    answers, logits = ask(setup, setup.memory.scale(0.0), setup.samples[:TEXTS])
    gaps = [(logits - expected_logits).abs().max().item(), differing(answers, expected)]
    return at_most(gaps, 0, "largest difference of a logit, and answers changed:")


def saved_memory_answers_the_same(setup: Setup) -> Outcome:
    memory = setup.memory
    with tempfile.TemporaryDirectory() as folder:
        memory.save(Path(folder) / "memory.safetensors")
        restored = Memory.load(Path(folder) / "memory.safetensors", setup.loaded.device)
    samples = setup.samples[:TEXTS]
    changed = differing(ask(setup, memory, samples)[0], ask(setup, restored, samples)[0])
    return at_most([changed + (restored.digest() != memory.digest())], 0, "answers and digests changed by saving:")


def sequential_equals_parallel(setup: Setup) -> Outcome:
    errors = []
    for chunk in chunk_lengths(setup.ttt):
        with chunk_length(setup.ttt, chunk):
            results = []
            for form in ("sequential", "parallel"):
                with setup.ttt.write(form=form) as writer:
                    logits = whole_rows(setup.loaded, setup.texts[:TEXTS], writer)
                results.append((writer.memory(), logits))
        (oracle, oracle_logits), (memory, logits) = results
        errors += [memory_error(oracle, memory), logit_error(oracle_logits, logits)]
    return at_most(errors, setup.tolerance, "relative error")


def reading_does_not_write(setup: Setup) -> Outcome:
    memory, tokenizer = write(setup, setup.texts[:1]), setup.loaded.tokenizer
    digest = memory.digest()
    head = prompts.head_ids(tokenizer, setup.samples[0]["lang"], with_text=False)
    with setup.ttt.read(memory) as session:
        logits, past = prefill(setup.loaded.model, [head + setup.texts[0]], tokenizer.pad_token_id, session=session)
        for _ in range(READ_TOKENS):  # not greedy(): it would stop at the end of the line
            chosen = logits.argmax(-1, keepdim=True)
            logits, past = forward(setup.loaded.model, chosen, torch.ones_like(chosen), past, session)
    return at_most([memory.digest() != digest], 0, f"digests changed by reading {past.mask.shape[1]} tokens:")


def digests_tell_texts_apart(setup: Setup) -> Outcome:
    digests = [write(setup, [text]).digest() for text in setup.texts[:TEXTS] * 2]
    wrong = sum(one != again for one, again in zip(digests[:TEXTS], digests[TEXTS:])) + TEXTS - len(set(digests[:TEXTS]))
    return at_most([wrong], 0, f"wrongly equal or unequal digests of {TEXTS} texts written twice:")


def rows_do_not_leak(setup: Setup) -> Outcome:
    """Written and read in a batch, alone, and beside another neighbour: the same. In chunks, whose borders pads would shift."""
    texts, samples = setup.texts[:TEXTS], setup.samples[:TEXTS]
    with chunk_length(setup.ttt, chunk_lengths(setup.ttt)[0]):
        batch, *alone = [write(setup, rows) for rows in (texts, *([text] for text in texts))]
        neighbour = write(setup, [texts[0], setup.texts[TEXTS]])
    logits = ask(setup, batch, samples, 1)[1].split(QUESTIONS)
    errors = [memory_error(batch.select([0]), neighbour.select([0]))]
    for i, memory in enumerate(alone):
        errors += [memory_error(memory, batch.select([i])), logit_error(ask(setup, memory, [samples[i]], 1)[1], logits[i])]
    return at_most(errors, setup.tolerance, "relative error")


def swapped_memory_is_no_better_than_none(setup: Setup) -> Outcome:
    samples, half, own = setup.samples, len(setup.samples) // 2, write(setup, setup.texts)
    swapped = own.select([*range(half, len(samples)), *range(half)])
    right = {name: right_answers(ask(setup, memory, samples)[0], samples)
             for name, memory in (("own", own), ("swapped", swapped), ("none", None))}
    measured = ", ".join(f"{name} {count}" for name, count in right.items())
    return Outcome(right["swapped"] <= right["none"] + SWAPPED_EXTRA,
                   f"right of {len(samples) * QUESTIONS} by memory: {measured}", f"swapped at most none + {SWAPPED_EXTRA}")


def off_equals_the_fresh_base(setup: Setup) -> Outcome:
    gap = (whole_rows(setup.loaded, setup.texts[:TEXTS]) - setup.fresh_logits).abs().max().item()
    return at_most([gap], 0, "largest difference of a logit")


def base_is_unchanged(setup: Setup) -> Outcome:
    return at_most([base_digest(setup.loaded) != setup.fresh_digest], 0, "digests of the base's parameters that changed:")


# The last two come last: they look at what the others leave behind.
CHECKS = (writing_changes_the_weights, memory_changes_answers, empty_memory_is_no_memory, saved_memory_answers_the_same,
          sequential_equals_parallel, reading_does_not_write, digests_tell_texts_apart, rows_do_not_leak,
          swapped_memory_is_no_better_than_none, off_equals_the_fresh_base, base_is_unchanged)
NEEDS_TRAINING = {swapped_memory_is_no_better_than_none}  # a random adapter answers nothing right, so this could not fail


# ---- setting up and running ----

def choose_samples(bench: dict, lang: str, file: str) -> list[dict]:
    samples = [s for s in bench["samples"] if s["lang"] == lang and len(s["probes"]) >= QUESTIONS][:SWAPPED_TEXTS]
    if len(samples) <= TEXTS:
        raise UserError(f"--benchmark {file}: has {len(samples)} {lang} samples with {QUESTIONS} probes; sanity needs {TEXTS + 1} or more")
    return samples


def prepare(loaded: Loaded, samples: list[dict], adapter: str | None) -> Setup:
    """Look at the base while it is untouched, then attach the adapter (the row's untrained start when there is none)."""
    texts = [prompts.written_ids(loaded.tokenizer, sample["conversation"]) for sample in samples]
    check_window(loaded.model, max(map(len, texts)), "the longest of the first conversations")
    manifest = read_manifest(adapter) if adapter else {}
    if not manifest.get("frozen", True) and not manifest["lora"]:
        raise UserError(f"--adapter {adapter}: W_down was trained too, so an empty memory is not the base alone, which these checks compare with; "
                        "give an arm without --w-down")
    joint = bool(manifest.get("lora"))
    if joint:  # such an arm's base is the one with its LoRA on
        load_lora(adapter, loaded)
    digest, logits = base_digest(loaded), whole_rows(loaded, texts[:TEXTS])
    ttt = load_adapter(adapter, loaded, lora_is_on=joint)[0] if adapter else InPlaceTTT(loaded.model, loaded.row.plain).requires_grad_(False)
    return Setup(loaded, ttt, samples, texts, TOLERANCE[loaded.model.dtype], digest, logits)


def run_checks(setup: Setup, checks) -> list[str]:
    """Print one line a check; returns the names of those that failed."""
    failed = []
    for check in checks:
        outcome = check(setup)
        print(f"{'PASS' if outcome.passed else 'FAIL'}  {check.__name__:38s} {outcome.measured} ({outcome.bound})", flush=True)
        failed += [] if outcome.passed else [check.__name__]
    return failed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is checked")
    what.add_argument("--tiny", action="store_true", help="a random model of every family with an untrained adapter")
    what.add_argument("--model", default="smollm2-135m", help="a row of `python model_utils.py`, a folder, or a hub id (default: %(default)s)")
    what.add_argument("--adapter", help="checkpoint folder with the fast weights trained on that model")
    what.add_argument("--benchmark", default="benchmark_v1.json", help="file the texts and questions come from (default: %(default)s)")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    how.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    arguments = parser.parse_args()
    if arguments.tiny == bool(arguments.adapter):
        raise UserError("give either --tiny, or --adapter FOLDER with the --model it was trained on")
    return arguments


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    bench = benchmark_file.load_benchmark(arguments.benchmark)
    names = [name for name in MODELS if name.startswith("tiny-")] if arguments.tiny else [arguments.model]
    checks = [check for check in CHECKS if not (arguments.tiny and check in NEEDS_TRAINING)]
    failed = []
    for name in names:
        row = find_row(name)
        device, dtype, reason = pick_device(arguments.device, arguments.dtype, row)
        print(f"{name} on {reason}")
        samples = choose_samples(bench, row.langs[0], arguments.benchmark)
        setup = prepare(load_model(name, device, dtype), samples, arguments.adapter)
        failed += [f"{name} {check}" for check in run_checks(setup, checks)]
    print(f"{len(failed)} checks fail: {', '.join(failed)}" if failed else "all checks pass")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_script(main)
