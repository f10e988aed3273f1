"""What an arm is trained for: each objective takes (loaded, adapter, batch, device) and returns a Step.

The batches come from training_data.py: Examples for recall and context, token rows for lm.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import cross_entropy

from decoding import attention_kinds, sliding_window
from in_place_ttt import InPlaceTTT
from memory import Memory
from model_utils import Loaded
from training_data import IGNORE, Example, pack


@dataclass(frozen=True)
class Step:
    """loss (a scalar with gradient), labels counted, how many the argmax got right, tokens run, the memory written."""

    loss: torch.Tensor
    labels: int
    right: torch.Tensor
    tokens: int
    memory: Memory | None = None


def pad_right(rows: list[list[int]], pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both [B, L], left-aligned: a pad then always has a token to attend to.

    Under a causal mask a pad on the left attends to nothing, and fused attention kernels give such a row NaN gradients.
    """
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device)
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)


def answer_loss(loaded: Loaded, batch: list[Example], device) -> Step:
    """Cross-entropy of the answers of packed prompts under teacher forcing; the logits of other positions are never made."""
    packed = pack(batch, loaded.tokenizer.pad_token_id, device)
    window = sliding_window(loaded.model.config.get_text_config())
    mask = packed.mask[:, None] if window is None else attention_kinds(packed.mask, packed.position, packed.position, window)
    hidden = loaded.model.get_decoder()(input_ids=packed.ids, attention_mask=mask, position_ids=packed.position,
                                        use_cache=False).last_hidden_state
    labels = packed.labels[:, 1:]
    logits = loaded.model.get_output_embeddings()(hidden[:, :-1][labels != IGNORE]).float()
    wanted = labels[labels != IGNORE]
    right = (logits.argmax(-1) == wanted).sum()
    return Step(cross_entropy(logits, wanted), wanted.numel(), right, packed.ids.numel())


def recall_step(loaded: Loaded, ttt: InPlaceTTT, batch: list[Example], device) -> Step:
    """Write each conversation, drop it, and answer with the memory alone."""
    ids, mask = pad_right([example.written for example in batch], loaded.tokenizer.pad_token_id, device)
    # the base's activations while writing carry no gradient; the values, recomputed from them in memory(), do
    with torch.no_grad(), ttt.write(differentiable=True) as writer:
        writer.expect(mask)
        loaded.model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
    memory = writer.memory()
    with ttt.read(memory):
        answered = answer_loss(loaded, batch, device)
    return replace(answered, tokens=answered.tokens + ids.numel(), memory=memory)


def lm_step(loaded: Loaded, ttt: InPlaceTTT, batch: list[list[int]], device) -> Step:
    """Next-token loss while the text is written chunk by chunk and attention sees all of it."""
    ids, mask = pad_right(batch, loaded.tokenizer.pad_token_id, device)
    with ttt.write(differentiable=True) as writer:
        writer.expect(mask)
        hidden = loaded.model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    wanted_BL = (mask[:, :-1] & mask[:, 1:]).bool()
    logits = loaded.model.get_output_embeddings()(hidden[:, :-1][wanted_BL]).float()
    wanted = ids[:, 1:][wanted_BL]
    with torch.no_grad():
        memory = writer.memory()
    return Step(cross_entropy(logits, wanted), wanted.numel(), (logits.argmax(-1) == wanted).sum(), ids.numel(), memory)


def context_step(loaded: Loaded, ttt: None, batch: list[Example], device) -> Step:
    """Answer with the conversation in the prompt; a LoRA on the base learns to."""
    return answer_loss(loaded, batch, device)


OBJECTIVES = {"recall": recall_step, "lm": lm_step, "context": context_step}
