"""What an arm is trained for: each objective takes (loaded, adapter, batch, device) and returns a Step.

The batches come from training_data.py: a Batch of Examples for recall and context, token rows for lm. Where several processes share an update, each
is given its own rows as batch and says in part (update_parts.py) what it holds of the whole: every mean below is over all processes' rows.

Beside the answers' cross-entropy a recall arm with codes has four aids, which say directly what the memory is for:
    address   the query that predicts an answer token is to meet the slot of the token before it in the conversation, among the
              tokens of up to eight conversations and a null that stands for "nothing written" (InfoNCE; the line break asks the null)
    worth     the write gate is to open where a fact's value follows, and nowhere else (binary cross-entropy)
    calm      prose read with a memory attached is to be predicted as by the untouched base (Kullback-Leibler)
    foreign   questions about what was never written are to be answered as by the untouched base, with their text in the prompt and
              without it (Kullback-Leibler over the tokens of the answer)
"""
from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div, log_softmax
from torch.autograd.function import once_differentiable

from decoding import attention_kinds, lowest, sliding_window
from in_place_ttt import InPlaceTTT
from memory import Memory, meets
from model_utils import Loaded
from training_data import IGNORE, NOWHERE, Batch, Example, Packed, columns, pack
from update_parts import Part

SHARPNESS = 30.0    # logit of an address that a query meets fully: a product of two cosines, at most 1
WORTHY = 2.0        # weight of a token worth writing beside one that is not: a fact that is not written costs more than a slot
LOGITS = 2 ** 25    # of next tokens at a time: an eighth of a gigabyte in float32. Fewer, and reading the head's weights takes longer than its products
NULL = 0.4          # what a query must meet better than to be no query for nothing
AIDS = {"address": 0.3, "worth": 0.3, "calm": 0.3, "foreign": 0.3}  # weights beside the answers' loss (DECISIONS.md)


@dataclass(frozen=True)
class Step:
    """loss (a scalar with gradient), labels counted, how many the argmax got right, tokens run, the memory written.

    measures: what else the log keeps of the update, by name: scalars or one number a layer. Of a part of an update the loss and the measures
    are what it adds to those of the whole.
    """

    loss: torch.Tensor
    labels: int
    right: torch.Tensor
    tokens: int
    memory: Memory | None = None
    measures: dict[str, torch.Tensor] = field(default_factory=dict)


def pad_right(rows: list[list[int]], pad_id: int, device, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both [B, L], left-aligned: a pad then always has a token to attend to. width: L, None for what the rows need.

    Under a causal mask a pad on the left attends to nothing, and fused attention kernels give such a row NaN gradients.
    """
    width = width or columns(rows)
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows]).to(device, non_blocking=True)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]).to(device, non_blocking=True)
    return ids, mask


def answer_logits(loaded: Loaded, packed: Packed) -> torch.Tensor:
    """Logits [M, V] of the answer tokens of packed prompts under teacher forcing; those of other positions are never made."""
    window = sliding_window(loaded.model.config.get_text_config())
    mask = packed.mask[:, None] if window is None else attention_kinds(packed.mask, packed.position, packed.position, window)
    hidden = loaded.model.get_decoder()(input_ids=packed.ids, attention_mask=mask, position_ids=packed.position,
                                        use_cache=False).last_hidden_state
    return loaded.model.get_output_embeddings()(hidden[:, :-1][packed.labels[:, 1:] != IGNORE]).float()


def judged(logits_MV: torch.Tensor, labels_BT: torch.Tensor, tokens: int, part: Part = Part()) -> Step:
    """Cross-entropy of the answers whose logits these are."""
    wanted = labels_BT[:, 1:][labels_BT[:, 1:] != IGNORE]
    right = (logits_MV.argmax(-1) == wanted).sum()
    return Step(part.mean(cross_entropy(logits_MV, wanted, reduction="sum"), wanted.numel()), wanted.numel(), right, tokens)


def recall_step(loaded: Loaded, ttt: InPlaceTTT, batch: Batch, device, weights: dict[str, float] = AIDS, lora: PeftModel | None = None,
                part: Part = Part()) -> Step:
    """Write each conversation, drop it, and answer with the memory alone. lora: a joint arm's, on the base that writes and learns too."""
    pad_id = loaded.tokenizer.pad_token_id
    ids, mask = pad_right([example.written for example in batch.examples], pad_id, device, part.width)
    # what neither a LoRA, W_down nor an earlier chunk changes carries no gradient while it is written; the values, made of it in memory(), do
    changing = lora is not None or ttt.config.w_down or ttt.config.chunk is not None
    with torch.set_grad_enabled(changing), ttt.write(differentiable=True, dropped=True) as writer, lowest(loaded.model, max(ttt.config.layers) + 1) as decoder:
        writer.expect(mask)
        decoder(input_ids=ids, attention_mask=mask, use_cache=False)
    memory = writer.memory(batch.group)
    # what is not to change is read in the same forward as the questions: a small base's update is bound by the number of calls
    rows, others = len(batch.examples), [*batch.foreign, *batch.calm]
    packed = pack(batch.examples + others, pad_id, device)
    served = memory.select([i // batch.group for i in range(rows)] + [*range(len(batch.foreign)), *range(len(batch.calm))]) if others else memory
    asks = torch.zeros_like(packed.labels, dtype=torch.bool)  # the positions that predict an answer token of what is written
    asks[:rows, :-1] = packed.labels[:rows, 1:] != IGNORE
    with ttt.read(served, watch_BL=asks if ttt.config.codes else None) as reader:
        reader.expect(torch.ones_like(packed.ids), packed.position, packed.question)
        logits_MV = answer_logits(loaded, packed)
    asked = answer_tokens(batch.examples)
    answered = judged(logits_MV[:asked], packed.labels[:rows], packed.ids.numel(), part)
    loss, measures = answered.loss, {}
    if ttt.config.codes:
        aids = {"address": address_loss(writer.slots.keys, reader.queries, packed.addresses[:, 1:][asks[:, :-1]], asks, mask, next(iter(memory.layers.values())).sizes, measures, part)}
        if ttt.config.gate:
            worth = torch.tensor([list(e.worth) + [0] * (ids.shape[1] - len(e.worth)) for e in batch.examples]).to(device)
            aids["worth"] = worth_loss(writer.slots.worth, worth, mask, measures, part)
        if others:
            aids |= changes(loaded, lora, logits_MV[asked:], batch, pad_id, device, part)
        loss = loss + sum(weights[name] * aid for name, aid in aids.items())
        measures |= {"answers": answered.loss.detach()} | {name: aid.detach() for name, aid in aids.items()}
    tokens = answered.tokens + ids.numel() + sum(example.prompt_tokens for example in others)  # these are read without a memory too
    return Step(loss, answered.labels, answered.right, tokens, memory, measures)


def answer_tokens(examples: list[Example]) -> int:
    return sum(len(answer) for example in examples for _, answer in example.pairs)


def changes(loaded: Loaded, lora: PeftModel | None, attached_MV: torch.Tensor, batch: Batch, pad_id: int, device, part: Part) -> dict[str, torch.Tensor]:
    """Kullback-Leibler divergence, mean over the tokens, of what the untouched base predicts the foreign and the calm rows' answer tokens as
    from the logits with a memory attached (and a joint arm's LoRA on)."""
    kinds = {name: rows for name, rows in (("foreign", batch.foreign), ("calm", batch.calm)) if rows}
    with torch.no_grad(), lora.disable_adapter() if lora else nullcontext():
        without_MV = log_softmax(answer_logits(loaded, pack([*batch.foreign, *batch.calm], pad_id, device)), -1)
    counts = [answer_tokens(rows) for rows in kinds.values()]
    return {name: part.mean(kl_div(log_softmax(attached, -1), without, reduction="sum", log_target=True), len(attached))
            for name, attached, without in zip(kinds, attached_MV.split(counts), without_MV.split(counts))}


def address_loss(key_YBSK: torch.Tensor, queries: dict, address_M: torch.Tensor, asks_BT, mask_BS, sizes, measures: dict,
                 part: Part = Part()) -> torch.Tensor:
    """InfoNCE of the asking queries over the tokens of some conversations and the null, mean over the Y layers.

    keys: of all written tokens; queries: {layer: [M, K]} in the order in which asks [B, T] is true; address [M]; sizes: the codes'.
    """
    key_YBSK, mask_BS, ahead, rivals = part.rivals(key_YBSK, mask_BS)
    rows, slots = mask_BS.shape
    row_M, place_M = ahead + asks_BT.nonzero()[:, 0], (asks_BT.cumsum(1) - 1)[asks_BT]
    query_YMK = torch.stack([queries[index] for index in sorted(queries)])
    query_YBQK = query_YMK.new_zeros(len(query_YMK), rows, int(asks_BT.sum(1).max()), query_YMK.shape[2])
    query_YBQK = query_YBQK.index_put((torch.arange(len(query_YMK), device=row_M.device)[:, None], row_M[None], place_M[None]), query_YMK)
    side_by_side = lambda t, width: t.reshape(len(query_YMK), rows // rivals, width, -1)
    met = meets(side_by_side(query_YBQK, rivals * query_YBQK.shape[2]), side_by_side(key_YBSK, rivals * slots), sizes).float()
    met = met.masked_fill(~mask_BS.bool().reshape(rows // rivals, 1, -1), -1.0).reshape(len(query_YMK), *query_YBQK.shape[1:3], -1)
    met_YMN = met[:, row_M, place_M]
    met_YMN = torch.cat([torch.full_like(met_YMN[..., :1], NULL), met_YMN], 2)
    wanted_M = torch.where(address_M == NOWHERE, 0, 1 + row_M % rivals * slots + address_M)
    wanted_M = torch.where(address_M == IGNORE, IGNORE, wanted_M)
    wanted_YM = wanted_M.expand(len(query_YMK), -1)
    in_text_M = address_M >= 0
    if part.total(in_text_M.sum()):  # share of answer tokens whose slot is the one met best, by layer
        with torch.no_grad():
            measures["found"] = part.mean((met_YMN.argmax(2) == wanted_YM)[:, in_text_M].float().sum(1), in_text_M.sum())
    summed = cross_entropy(SHARPNESS * met_YMN.flatten(0, 1), wanted_YM.flatten(), ignore_index=IGNORE, reduction="sum")
    return part.mean(summed, (wanted_YM != IGNORE).sum())  # a batch may know no address at all


def worth_loss(logit_YBS: torch.Tensor, worth_BS: torch.Tensor, mask_BS: torch.Tensor, measures: dict, part: Part = Part()) -> torch.Tensor:
    """Binary cross-entropy of the write gates, mean over real tokens and layers."""
    real = mask_BS.bool()
    wanted = worth_BS[real].float()
    judged = logit_YBS[:, real]
    with torch.no_grad():
        open_ = (judged > 0).float()  # a sparse gate leaves a slot already from the logit of shut_below on
        measures["gate_recall"] = part.mean((open_ * wanted).sum(1), wanted.sum())
        measures["gate_precision"] = part.mean((open_ * wanted).sum(1), open_.sum(1))
    summed = binary_cross_entropy_with_logits(judged, wanted.expand_as(judged), pos_weight=judged.new_tensor(WORTHY), reduction="sum")
    return part.mean(summed, judged.numel())


def lm_step(loaded: Loaded, ttt: InPlaceTTT, batch: list[list[int]], device, part: Part = Part()) -> Step:
    """Next-token loss while the text is written chunk by chunk and attention sees all of it."""
    ids, mask = pad_right(batch, loaded.tokenizer.pad_token_id, device)
    with ttt.write(differentiable=True) as writer:
        writer.expect(mask)
        hidden = loaded.model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    wanted_BL = (mask[:, :-1] & mask[:, 1:]).bool()
    wanted_M = ids[:, 1:][wanted_BL]
    loss, right = next_token_loss(loaded.model.get_output_embeddings(), hidden[:, :-1][wanted_BL], wanted_M)
    return Step(part.mean(loss, wanted_M.numel()), wanted_M.numel(), right, ids.numel(), writer.made())


def next_token_loss(head, hidden_MD: torch.Tensor, wanted_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy of all M tokens, summed; how many the argmax got right), by a head that does not learn. Logits are made for so many tokens at
    a time that LOGITS numbers hold them: all at once, they and their gradients are the largest thing that a training step holds."""
    return NextTokenLoss.apply(hidden_MD, wanted_M, head)


class NextTokenLoss(torch.autograd.Function):
    """A sum's gradient is known up to a factor once the logits are. It is made along with them, in place of making them once more in the backward pass."""

    @staticmethod
    def forward(ctx, hidden_MD, wanted_M, head):
        def some(hidden, wanted):
            logits = head(hidden).float()
            return cross_entropy(logits, wanted, reduction="sum"), (logits.argmax(-1) == wanted).sum()

        at_once, parts, grads, learns = max(1, LOGITS // head.weight.shape[0]), [], [], ctx.needs_input_grad[0]
        for hidden, wanted in zip(hidden_MD.split(at_once), wanted_M.split(at_once)):
            hidden = hidden.detach().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                loss, right = some(hidden, wanted)
            if learns:
                grads += torch.autograd.grad(loss, hidden)
            parts.append((loss.detach(), right))
        if learns:
            ctx.save_for_backward(torch.cat(grads))
        return tuple(map(sum, zip(*parts)))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        return ctx.saved_tensors[0] * grad, None, None


def context_step(loaded: Loaded, ttt: None, batch: Batch, device, part: Part = Part()) -> Step:
    """Answer with the conversation in the prompt; a LoRA on the base learns to."""
    packed = pack(batch.examples, loaded.tokenizer.pad_token_id, device)
    return judged(answer_logits(loaded, packed), packed.labels, packed.ids.numel(), part)


OBJECTIVES = {"recall": recall_step, "lm": lm_step, "context": context_step}
