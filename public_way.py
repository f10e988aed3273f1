"""The way the public attempt runs In-Place TTT, plainly rewritten as a yardstick of time and memory (bench.py); nothing else uses it.

One conversation at a time; every TTT layer holds a dense W of its own, which each chunk of 64 tokens replaces by W + dW; each question is
answered alone; in training every chunk's D x F matrix stays for the backward pass, over layers that are computed twice.
"""
from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn.functional import conv1d, cross_entropy

# the public attempt's lengths
NEW = 32            # new tokens of every answer
PROMPT = 50         # tokens of a question's prompt
TEXT = 140          # tokens of a conversation
TRAINED = 512       # tokens of a training sequence
CHUNK = 64
KERNEL = 5


class DenseMLP(nn.Module):
    """A gated MLP whose down projection is a running matrix, [D, F], in the base's dtype."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, (hidden, _) = base, base.down_proj.weight.shape
        like = {"dtype": base.down_proj.weight.dtype, "device": base.down_proj.weight.device}
        self.conv, self.proj = nn.Parameter(torch.zeros(hidden, 1, KERNEL, **like)), nn.Parameter(0.02 * torch.eye(hidden, **like))
        self.writing, self.weight = False, base.down_proj.weight.detach()  # detached, so that it is no parameter

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        h_BLF = self.base.act_fn(self.base.gate_proj(x_BLD)) * self.base.up_proj(x_BLD)
        if not self.writing:
            return h_BLF @ self.weight.T
        shares, weight = [], self.base.down_proj.weight.detach()  # a text is one call, which a checkpointed layer makes twice
        for x_CD, h_CF in zip(x_BLD[0].split(CHUNK), h_BLF[0].split(CHUNK)):
            shares.append(h_CF @ weight.T)  # apply first, then update
            target_CD = conv1d(x_CD.T[None], self.conv, padding=KERNEL // 2, groups=len(self.conv))[0].T
            weight = weight + (target_CD @ self.proj).T @ h_CF
        self.weight = weight
        return torch.cat(shares)[None]


class PublicWay:
    """DenseMLPs that stand in the place of some layers' MLPs during each call; what is there otherwise, an adapter of ours too, stays."""

    def __init__(self, model, layers):
        self.model, self.layers = model, model.get_decoder().layers
        bases = {i: self.layers[i].mlp for i in layers}
        self.mlps = {i: DenseMLP(mlp if hasattr(mlp, "down_proj") else mlp.base) for i, mlp in bases.items()}

    @contextlib.contextmanager
    def _standing(self, writing: bool):
        others = {i: self.layers[i].mlp for i in self.mlps}
        for i, mlp in self.mlps.items():
            self.layers[i].mlp, mlp.writing = mlp, writing
        try:
            yield
        finally:  # bench.py goes on after an out-of-memory error
            for i, other in others.items():
                self.layers[i].mlp = other

    @torch.inference_mode()
    def ingest(self, ids_1L: torch.Tensor) -> None:
        with self._standing(writing=True):
            self.model(input_ids=ids_1L)

    @torch.inference_mode()
    def answer(self, ids_1L: torch.Tensor, new_tokens: int) -> torch.Tensor:
        """So many new tokens of one question, [1, L + new]."""
        with self._standing(writing=False):
            return self.model.generate(ids_1L, attention_mask=torch.ones_like(ids_1L), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)

    def train_step(self, ids_1L: torch.Tensor) -> None:
        """Forward and backward of the next-token loss, with checkpoints at every layer, as the model's own switch sets them."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        try:
            with self._standing(writing=True):
                logits = self.model(input_ids=ids_1L, use_cache=False).logits
                cross_entropy(logits[0, :-1].float(), ids_1L[0, 1:]).backward()
        finally:
            self.model.eval()
            self.model.gradient_checkpointing_disable()
            if getattr(self.model, "_require_grads_hook", None) is not None:  # the switch made the embeddings want gradients and leaves them so
                self.model.disable_input_require_grads()
            for mlp in self.mlps.values():
                mlp.zero_grad(set_to_none=True)
                mlp.weight = mlp.base.down_proj.weight.detach()
