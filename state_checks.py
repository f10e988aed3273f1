"""Is it kept? Checks of the state that a text leaves behind: each says PASS or FAIL, and what was measured.

The state is what the memory would answer with (adaptation.state_digest), not the parameters, which test-time learning never touches.
"""
from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from adaptation import EMPTY, ROUNDING, Along, change, read_on, state_digest
from decoding import TOLERANCE, prefill, write_rows
from in_place_ttt import InPlaceTTT
from memory import Memory
from model_utils import Loaded


class Check(NamedTuple):
    passed: bool
    asks: str
    measured: str


def moves(found: Along) -> list[bool]:
    """Of each write, whether it changed the state by more than rounding."""
    return [size > ROUNDING for size in found.changes]


def verdict(moved: list[bool], parameters: list[str]) -> str:
    """What changed, said of the state first; "no weight change" is said only where the state stood still too."""
    if len(set(parameters)) > 1:
        return "parameters changed: this is fine-tuning, or a defect"
    if not any(moved):
        return f"no weight change: none of {len(moved)} writes changed the state, and no parameter changed"
    return f"the fast weights changed in {sum(moved)} of {len(moved)} writes, and no parameter did"


def handed_on(found: Along) -> Check:
    breaks = sum(before != after for before, after in zip(found.inputs[1:], found.outputs))
    return Check(breaks == 0 and found.inputs[0] == EMPTY, "W after a write is the W that the next write starts from, the first from nothing, whatever was read between",
                 f"{breaks} breaks in a chain of {len(found.outputs)} states")


def state_moves(found: Along) -> Check:
    moved = moves(found)
    return Check(any(moved) and len(set(found.parameters)) == 1, "the state moves, the parameters stay", verdict(moved, found.parameters))


@torch.no_grad()
def run(loaded: Loaded, ttt: InPlaceTTT, ids: list[int], found: Along, streamed: Along) -> list[Check]:
    """All checks. found: what was read along a text; streamed: what was read along `ids` one token a call, of which the other checks take two halves."""
    half, pad_id = len(ids) // 2, loaded.tokenizer.pad_token_id
    write = lambda tokens, memory=None: write_rows(loaded.model, ttt, [tokens], pad_id, memory, dropped=True)[0]
    first, second = ids[:half], ids[half:]
    return [state_moves(found), handed_on(found), streamed_alike(loaded, found, streamed), *one_pass(loaded, ttt, ids, streamed),
            reset(write, first, second), resumed(write, first, second, TOLERANCE[loaded.model.dtype]), reading_writes_nothing(loaded, ttt, first, write)]


def streamed_alike(loaded: Loaded, found: Along, streamed: Along) -> Check:
    """Over the whole pieces that both have read; a last piece that was cut short knows less of what follows."""
    known, bound = streamed.starts[-1], TOLERANCE[loaded.model.dtype]
    numbers = lambda read, name: torch.from_numpy(getattr(read, name)[..., :known]).nan_to_num()
    apart = max(relative(numbers(found, name), numbers(streamed, name)) for name in ("on_L", "prev_NL", "after_NL"))
    return Check(apart <= bound, "read one token a call, a text gives the losses, inner and outer, that it gives piece by piece",
                 f"relative difference {apart:.1e}, at most {bound:g}, {known} tokens")


def one_pass(loaded: Loaded, ttt: InPlaceTTT, ids: list[int], streamed: Along) -> list[Check]:
    """A text in one call against the same a token a call, and, for an arm with chunks, against its pieces with the state handed over."""
    results, bound = [], TOLERANCE[loaded.model.dtype]
    for step in (len(ids), 1):
        with ttt.write() as writer:
            losses, last, _ = read_on(loaded, ids, None, None, writer, step)
        results.append((writer.memory(), torch.tensor(losses), last))
    (whole, losses, last), (by_token, *others) = results
    apart = max(change(whole, by_token), *map(relative, (losses, last), others))
    checks = [Check(apart <= bound, "a stream of one token a call is the pass in one call: dW, losses, last logits",
                    f"relative difference {apart:.1e}, at most {bound:g}, {len(ids)} tokens")]
    if ttt.config.chunk:  # else every piece is a text of its own
        apart = change(whole, streamed.memory)
        checks.append(Check(apart <= bound, "pieces with the state handed over are the pass in one call: dW", f"relative difference {apart:.1e}, at most {bound:g}"))
    return checks


def relative(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest difference over the largest value; 0 where both are 0."""
    return ((first - second).abs().max() / first.abs().max().clamp(min=1e-30)).item()


def reset(write, first: list[int], second: list[int]) -> Check:
    alone = state_digest(write(second))
    before = write(first)
    after, carried = state_digest(write(second)), state_digest(write(second, before))
    same = lambda digest: "the same" if digest == alone else "another"
    return Check(after == alone and (carried != alone or state_digest(before) == EMPTY), "a new document starts from nothing: its state does not know what was written before",
                 f"the state of the second half is {same(after)} after the first half was written, and {same(carried)} where it goes on from it")


def resumed(write, first: list[int], second: list[int], bound: float) -> Check:
    """The loaded state is the saved one bit for bit; what goes on from it may round otherwise, for tensors out of a file lie at other addresses."""
    before = write(first)
    with tempfile.TemporaryDirectory() as folder:
        before.save(Path(folder) / "memory.safetensors")
        loaded = Memory.load(Path(folder) / "memory.safetensors", before.tokens.device)
    same, apart = loaded.digest() == before.digest(), change(write(second, before), write(second, loaded))
    return Check(same and apart <= bound, "saving and loading in the middle of a text changes nothing: the state bit for bit, and what goes on from it",
                 f"the loaded state is {'the same' if same else 'another'}; relative difference after going on {apart:.1e}, at most {bound:g}")


def reading_writes_nothing(loaded: Loaded, ttt: InPlaceTTT, ids: list[int], write) -> Check:
    memory = write(ids)
    before = memory.digest()
    with ttt.read(memory) as session:
        prefill(loaded.model, [ids], loaded.tokenizer.pad_token_id, session=session)
    return Check(memory.digest() == before, "reading with a memory does not write to it",
                 f"the digest is {'the same' if memory.digest() == before else 'another'} after {len(ids)} tokens")


def table(checks: list[Check]) -> str:
    """The checks as a table in Markdown."""
    return "\n".join(["| | what is checked | measured |", "| --- | --- | --- |",
                      *(f"| {'PASS' if check.passed else '**FAIL**'} | {check.asks} | {check.measured} |" for check in checks)]) + "\n"
