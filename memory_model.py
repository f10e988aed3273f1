"""A Hugging Face causal LM that carries trained fast weights: `write` texts, drop them, `generate` answers from the memory.

hub_model.py exports this module, and those it needs, beside the base's weights; there `AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True)` gives the base's own class with WithMemory before it. Without a memory it is the base, bit for bit.
"""
from __future__ import annotations

from contextlib import contextmanager

import torch
from safetensors.torch import load_file
from transformers.utils import cached_file

from decoding import check_window, pad_left, write_rows
from in_place_ttt import InPlaceTTT, TTTConfig
from memory import Memory, MemoryFileError
from prompts import FORMS, head_ids, tail_ids
from sessions import Reader

ADAPTER = "adapter.safetensors"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")  # of from_pretrained: where to look

# What generate must leave alone while it reads a memory, with the values that do. The others bring, reorder or take back tokens that the
# Reader does not hear of, call the model on other texts in between, or hide the mask from it.
NEUTRAL = {"num_beams": 1, "num_beam_groups": 1, "penalty_alpha": 0, "guidance_scale": 1, "token_healing": False, "use_cache": True,
           "use_mtp": False, "cache_implementation": "dynamic", "assistant_model": None, "assistant_early_exit": None,
           "prompt_lookup_num_tokens": None, "dola_layers": None, "constraints": None, "force_words_ids": None, "custom_generate": None,
           "prefill_chunk_size": None, "past_key_values": None, "inputs_embeds": None}


class WithMemory:
    """Stands before a causal LM's class: `class LlamaWithMemory(WithMemory, LlamaForCausalLM)`. `config.ttt` holds the settings of the fast weights,
    `config.start_ids` what the tokenizer puts before every text (prompts.py)."""

    def __init__(self, config, *arguments, **named):
        super().__init__(config, *arguments, **named)
        self.ttt: InPlaceTTT | None = None  # from_pretrained attaches it: it measures the base's weights

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *arguments, **named):
        """The base as its own class loads it, with the adapter that lies beside its weights. The adapter runs in float32 whatever the base's dtype."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *arguments, **named)
        model = loaded[0] if named.get("output_loading_info") else loaded
        if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
            raise ValueError("device_map spreads the model over several devices; a memory needs it on one: name that one")
        where = {name: named[name] for name in HUB_ARGUMENTS if name in named}
        ttt = InPlaceTTT(model, TTTConfig(**model.config.ttt))
        ttt.load_tensors({name: t.float() for name, t in load_file(cached_file(pretrained_model_name_or_path, ADAPTER, **where)).items()})
        model.ttt = ttt.requires_grad_(False)
        return loaded

    def save_pretrained(self, *_, **__):
        raise NotImplementedError("a model with a memory adapter is not saved anew; copy the folder it came from, or export again with hub_model.py")

    @torch.no_grad()
    def write(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, memory: Memory | None = None) -> Memory:
        """Read texts, [B, L], and return what they leave in the fast weights, a row of the memory each; nothing of it stays in the model.

        attention_mask [B, L]: 0 at pads; may be left out for a single row. memory: B rows to go on from.
        ValueError for a row without a token, UserError for one that is longer than the model's window.
        """
        mask_BL = real_tokens(input_ids, attention_mask)
        rows = [ids_L[real_L].tolist() for ids_L, real_L in zip(input_ids, mask_BL)]
        if not all(rows):
            raise ValueError(f"input_ids: row {[bool(row) for row in rows].index(False)} has no token to write; leave it out")
        check_window(self, max(map(len, rows)), "write")
        return write_rows(self, self._adapter(), rows, self._pad_id(), memory, dropped=True)[0]

    def load_memory(self, path) -> Memory:
        """A memory that `Memory.save` wrote, on this model's device; MemoryFileError when it is broken or another model's."""
        memory, ttt = Memory.load(path, device=self.device), self._adapter()
        held = {i: (layer.hidden_size, layer.feed_forward, layer.sizes) for i, layer in memory.layers.items()}
        wanted = {i: (*ttt.down_proj(i).weight.shape, ttt.fast[str(i)].sizes) for i in ttt.config.layers}
        if held != wanted:
            raise MemoryFileError(f"{path}: another model's memory (its layers, their sizes or their keys differ); write it with this model")
        return memory

    def prompt(self, tokenizer, questions: list[str], lang: str = "en") -> dict:
        """The questions in the benchmark's form, which arms of the bank's conversations were trained on, as arguments of generate: a solved example, then the question."""
        if lang not in FORMS:
            raise ValueError(f"lang is {lang!r}; the prompt forms are {', '.join(FORMS)}")
        head = head_ids(tokenizer, lang, with_text=False)
        ids, mask = pad_left([head + tail_ids(tokenizer, lang, question) for question in questions], self._pad_id(), self.device)
        return {"input_ids": ids, "attention_mask": mask, "head_tokens": len(head)}

    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, *, memory: Memory | None = None, head_tokens: int | None = None, **named):
        """The library's generate; with a memory of B rows its answers to k B prompts, k neighbouring prompts a row: greedy or by sampling.

        Prompts, [k B, L], are padded on the left, and several of them need an attention_mask. head_tokens: so many tokens of each prompt
        stand before its question, which is looked for in the memory as if they were not there; None: the start token, of a base whose
        tokenizer begins every text with one (Gemma's) and where a prompt has it, and no other. ValueError for other padding, a prompt that is
        all head, and options that do not go with a memory (NEUTRAL). The memory is read within this call alone.
        """
        if memory is None:
            return super().generate(inputs, generation_config, **named)
        if not hasattr(memory, "layers"):  # no isinstance: each exported folder has a class Memory of its own
            raise ValueError(f"memory: a {type(memory).__name__}; give what write or load_memory returned (texts written in one call are the rows of one memory)")
        given = generation_config.to_dict() if generation_config is not None else {}
        # of the model's own, but for Gemma's wish for a static cache; then the caller's
        check_options(self.generation_config.to_dict() | {"cache_implementation": None} | {n: v for n, v in given.items() if v is not None} | named)
        ids_BL = named.pop("input_ids", None) if inputs is None else inputs
        if ids_BL is None:
            raise ValueError("input_ids: missing; a memory is asked with token ids")
        mask_BL = real_tokens(ids_BL, named.pop("attention_mask", None))
        if (mask_BL[:, 1:] < mask_BL[:, :-1]).any() or not mask_BL[:, -1].all():
            raise ValueError("attention_mask: a prompt has pads behind a token; pad on the left (tokenizer.padding_side = 'left')")
        head_B = head_lengths(ids_BL, mask_BL, head_tokens, self.config.start_ids)
        if (head_B < 0).any() or (head_B >= mask_BL.sum(1)).any():
            raise ValueError(f"head_tokens is {head_tokens}; the shortest prompt has {int(mask_BL.sum(1).min())} tokens, and a question needs one")
        with self._adapter().read(memory) as reader, self._announced(reader, head_B):
            return super().generate(ids_BL, generation_config, attention_mask=mask_BL.long(), **named | {"cache_implementation": "dynamic"})

    def _pad_id(self) -> int:
        return self.config.get_text_config().pad_token_id or 0  # any will do: pads are masked

    def _adapter(self) -> InPlaceTTT:
        if self.ttt is None:
            raise RuntimeError("no trained fast weights are attached; load the model with from_pretrained")
        return self.ttt

    @contextmanager
    def _announced(self, reader: Reader, head_B: torch.Tensor):
        """Within it the reader hears of each forward's tokens before the forward runs; the first one brings the whole prompts, each as often as
        answers to it are wanted (num_return_sequences)."""
        expect_first = [lambda mask_BL: expect_question(reader, mask_BL, head_B.repeat_interleave(len(mask_BL) // len(head_B)))]

        def announce(module, arguments, named):
            ids_BL, mask_BT = named["input_ids"], named.get("attention_mask")  # the library drops a mask without pads
            mask_BL = torch.ones_like(ids_BL) if mask_BT is None else mask_BT[:, -ids_BL.shape[1]:]
            (expect_first.pop() if expect_first else reader.expect)(mask_BL)

        hook = self.register_forward_pre_hook(announce, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def head_lengths(ids_BL: torch.Tensor, mask_BL: torch.Tensor, head_tokens: int | None, start_ids: list[int]) -> torch.Tensor:
    """How many tokens of each prompt stand before its question, [B]: head_tokens; None: a start token that it begins with. start_ids: of one token or none."""
    first_B = ids_BL.gather(1, mask_BL.int().argmax(1, keepdim=True))[:, 0]
    if head_tokens is not None:
        return torch.full_like(first_B, head_tokens)
    return torch.isin(first_B, first_B.new_tensor(start_ids)).long()


def expect_question(reader: Reader, mask_BL: torch.Tensor, head_B: torch.Tensor) -> None:
    """Announce whole prompts in one call as if head and question were read in a context each, which is how adapters are trained and measured."""
    place_BL, order_L = mask_BL.cumsum(1), torch.arange(mask_BL.shape[1], device=mask_BL.device)
    asked_BL = mask_BL.bool() & (place_BL > head_B[:, None])
    together_BLL = (asked_BL[:, :, None] == asked_BL[:, None, :]) & mask_BL[:, None, :].bool() & (order_L <= order_L[:, None])
    reader.expect(asked_BL, place_BL, together_BLL)  # only distances count


def real_tokens(ids_BL: torch.Tensor, mask_BL: torch.Tensor | None) -> torch.Tensor:
    """The mask as bool [B, L]; ValueError where it is missing for several rows, which may be padded, or of another shape."""
    if mask_BL is None and ids_BL.shape[0] > 1:
        raise ValueError("attention_mask: missing, and of several rows some may be padded; pass the tokenizer's")
    if mask_BL is not None and mask_BL.shape != ids_BL.shape:
        raise ValueError(f"attention_mask: {list(mask_BL.shape)} for input_ids of {list(ids_BL.shape)}; pass the one that belongs to them")
    return torch.ones_like(ids_BL, dtype=torch.bool) if mask_BL is None else mask_BL.bool()


def check_options(options: dict) -> None:
    """ValueError when one of generate's options does not go with a memory."""
    for name, neutral in NEUTRAL.items():
        value = options.get(name)
        if value is not None and not (isinstance(value, (int, float, str)) and value == neutral):
            mend = "leave it out" if neutral is None else f"leave it out or use {neutral!r}"
            raise ValueError(f"{name}: does not go with a memory, which is read greedily or by sampling, token after token; {mend}")
