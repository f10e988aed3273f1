"""In-Place Test-Time Training: MLP fast weights that a frozen decoder writes while it reads (arXiv 2604.06169).

For a gated MLP with input x (the post-norm hidden state), h = act(x W_gate) * (x W_up) and out = h W_down^T, each TTT
layer writes one outer product per token and reads the sum of all finished chunks:

    target   t_i  = sum_k conv_k * x_{i+k}        depthwise conv, symmetric, never across a chunk border
    value    v_i  = eta * u * g_i * (t_i P)       P multiplies on the right; g_i = 1 unless the write gate is on
    update   dW_c = sum_{i in chunk c} v_i (x) h_i
    output   O_i  = h_i (W_down + sum_{c' < chunk(i)} dW_c')^T          apply first, then update; with keys other than h the
                    update's share is read with the token's query in place of h_i

u = 1, except with unit targets: there x is taken at unit RMS and u is the RMS of W_down's entries, or (calibrated) of the
residual stream at the layer as the MLP's output meets it (behind a norm of its own, where the base has one), so that one step size
suits bases whose activations and weights differ in size by orders of magnitude. Options change the write:

    ridge    the whole text's values are solved for instead of summed: dW minimises
             sum_i eta g_i |(W + dW) k_i - u t_i P|^2 + lambda |dW|^2, W being the memory before this text (kernel ridge regression)
    codes    the key k_i that is written and the query that reads are outer products of two learned unit codes of x in place of
             h itself, k_i = a_i (x) b_i, so that q k_i = cos(a_q, a_i) cos(b_q, b_i): both must meet (key map: one learned map)
    write attention    keys and gate also know what attention over the text gathers around a token
    read attention     queries also know what attention over the question so far gathers
    deep     both attentions are side streams instead: blocks through all TTT layers, each going on from the one before (side_stream.py)
    sparse   the gate has exact zeros, and a token of strength 0 leaves no slot in the memory
    read gate  a learned share of what is read is taken; with the threshold it also rises with how much is read
    value rank  P is a diagonal plus a product of this rank
    blind    a text is read by the base alone while it is written, whatever was written before
    target both        t_i P is the sum of such a term from the token embeddings and one from x
    clip     a chunk's dW_c is scaled down to at most this share of |W_down|, both by their Frobenius norms
    w_down   W_down + a trained D x F matrix stands in W_down's place, while writing and reading alone

Shape letters: B batch, L tokens of one call, S written tokens (slots), D hidden size, F feed-forward size.
The mode is explicit: outside `write` and `read` a wrapped MLP *is* the base MLP, bit for bit.
"""
from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from fast_weight import FastWeight, TTTConfig, drawer
from lean import gated
from memory import Memory
from sessions import Reader, Writer
from side_stream import SideStream


POST_NORM = "post_feedforward_layernorm"  # Gemma's and OLMo's: what an MLP gives is brought to one size before the residual stream takes it


class TTTMLP(nn.Module):
    """Stands where layer.mlp stood and shares its weights; a plain call unless its owner is writing or reading."""

    def __init__(self, base: nn.Module, index: int, owner: "InPlaceTTT"):
        super().__init__()
        self.base = base
        self.index = index
        self._owner = (owner,)  # a tuple, so that the adapter is not registered as a part of the base

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        owner = self._owner[0]
        session = owner.session
        if session is None:
            return self.base(x_BLD)
        if session.ends == self.index:  # nothing reads what this layer gives, and codes are made of x alone
            session.layer(self.index, x_BLD, x_BLD)
            return torch.zeros_like(x_BLD)
        h_BLF = gated(self.base, x_BLD)
        share_BLD = session.layer(self.index, x_BLD, h_BLF)
        out_BLD = self.base.down_proj(h_BLF)
        if owner.config.w_down:
            out_BLD = out_BLD + nn.functional.linear(h_BLF, owner.fast[str(self.index)].down_delta.to(h_BLF.dtype))
        return out_BLD if share_BLD is None else out_BLD + share_BLD.to(out_BLD.dtype)


class InPlaceTTT(nn.Module):
    """The adapter: one FastWeight per TTT layer, attached to a Hugging Face decoder that it does not own.

    Args:
        model: any causal LM whose decoder layers have an MLP with gate_proj, up_proj, down_proj and act_fn.
        config: layers out of range, or an MLP of another shape, raise ValueError.
        seed: of the initial P.
    """

    def __init__(self, model: nn.Module, config: TTTConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.session: Writer | Reader | None = None
        decoder = model.get_decoder()
        check_layers(decoder.layers, config.layers)
        hidden_size = decoder.config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        self._decoder = (decoder,)
        for i in config.layers:
            decoder.layers[i].mlp = TTTMLP(decoder.layers[i].mlp, i, self)
        rms = lambda i: self.down_norm(i) / self.down_proj(i).weight.numel() ** 0.5
        self.fast = nn.ModuleDict({str(i): FastWeight(hidden_size, self.down_proj(i).in_features, config, generator, rms(i))
                                   for i in config.layers})
        self.streams = nn.ModuleDict()
        if config.deep:
            in_depth = sorted(config.layers)
            self.streams["write"] = SideStream(hidden_size, config.write_attention, in_depth, drawer(generator))
            self.streams["read"] = SideStream(hidden_size, config.read_attention, in_depth, drawer(generator))
        self.eval()  # training asks for dropout, nobody else
        self.to(decoder.layers[config.layers[0]].mlp.base.down_proj.weight.device)
        self.down_norms = {i: self.down_norm(i) for i in config.layers}

    def detach(self) -> None:
        """Put the base MLPs back; the model is as it was before."""
        for i in self.config.layers:
            self._decoder[0].layers[i].mlp = self._decoder[0].layers[i].mlp.base

    def clip(self, share: float | None) -> None:
        """Let no chunk change a layer by more than this share of |W_down| from now on (None: no limit); ValueError where there are no chunks to clip.
        Arms are trained without, as the paper's were, which clips when it evaluates (App. C.2)."""
        self.config = replace(self.config, clip=share)

    def drop(self, share: float) -> None:
        """Drop this share of what each block of the side streams adds, until told otherwise; 0 is what answers are made with."""
        for part in self.streams.modules():
            if isinstance(part, nn.Dropout):
                part.p = share
        self.train(share > 0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is trained, by name: LAYER.part of a layer's FastWeight, streams.part of the side streams."""
        return {name.removeprefix("fast."): t for name, t in self.state_dict().items()}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take what `tensors` gave; RuntimeError unless names and shapes are this adapter's."""
        self.load_state_dict({name if name.startswith("streams.") else "fast." + name: t for name, t in tensors.items()})

    def down_proj(self, index: int) -> nn.Module:
        return self._decoder[0].layers[index].mlp.base.down_proj

    def down_norm(self, index: int) -> float:
        """|W_down|, Frobenius."""
        weight = self.down_proj(index).weight.detach()
        if hasattr(weight, "full_tensor"):  # spread over processes, which all come here (parallel.shard_base); the norm of a slice would be another number
            weight = weight.full_tensor()
        return torch.linalg.vector_norm(weight, dtype=torch.float64).item()

    @contextmanager
    def _mode(self, session):
        if self.session is not None:
            raise RuntimeError("TTT modes do not nest: leave the current write or read first")
        self.session = session
        hook = None
        if session.needs_embeddings:
            hook = self._decoder[0].get_input_embeddings().register_forward_hook(session.on_embeddings)
        try:
            yield session
        finally:
            self.session = None
            if hook is not None:
                hook.remove()

    def write(self, memory: Memory | None = None, differentiable: bool = False, form: str = "parallel", dropped: bool = False):
        """Context in which every forward of the model writes. Announce each call's tokens with `writer.expect(mask)`.

        Args:
            memory: what was written before; it is applied from the first token on, and the result continues it.
            differentiable: keep what was written so that `writer.memory()` carries gradients to the adapter.
            form: "parallel" (block-causal linear attention) or "sequential" (a running W, chunk after chunk: the oracle).
            dropped: nothing reads what the model's calls return, so a form that needs no h leaves the last TTT layer's MLP out.
        Yields the Writer; after the context, `writer.memory()` flushes the last, partial chunk and returns the Memory.
        """
        return self._mode(Writer(self, memory, differentiable, form, dropped))

    def read(self, memory: Memory, watch_BL: torch.Tensor | None = None):
        """Context in which the model answers with `memory` attached; nothing is written.

        A batch of k times the memory's rows asks k neighbouring questions of each row (see LayerMemory.read).
        watch: tokens [B, L] of the one forward to come whose queries the yielded Reader keeps, {layer: [M, F or K]}.
        """
        return self._mode(Reader(self, memory, watch_BL))

    @torch.no_grad()
    def calibrate(self, model: nn.Module, ids_1L: torch.Tensor) -> None:
        """Fit each TTT layer's scales to the base on one text: the value unit becomes the median RMS of the residual stream behind
        the layer, over the gain of the norm that some bases have between the MLP and the stream, and the codes are centred, so that
        tokens share no direction in them. The first token, often of another size by orders of magnitude, is left out."""
        inputs, states, gains = {}, {}, {}
        every = self._decoder[0].layers
        layers = {i: every[i] for i in self.config.layers}
        rms_L = lambda t_1LD: t_1LD[0, 1:].float().pow(2).mean(-1).sqrt()
        hooks = [layer.mlp.base.register_forward_pre_hook(lambda module, args, i=i: inputs.__setitem__(i, args[0])) for i, layer in layers.items()]
        hooks += [getattr(layer, POST_NORM).register_forward_hook(lambda module, args, out, i=i: gains.__setitem__(i, (rms_L(out) / rms_L(args[0])).median().item()))
                  for i, layer in layers.items() if hasattr(layer, POST_NORM)]
        # what the next layer is given; the last layer's own input serves for what it gives. By hooks: the library keeps no states of a base that is spread over processes
        hooks += [every[min(i + 1, len(every) - 1)].register_forward_pre_hook(lambda module, args, i=i: states.__setitem__(i, args[0])) for i in layers]
        model.get_decoder()(input_ids=ids_1L, use_cache=False)
        for hook in hooks:
            hook.remove()
        for i in self.config.layers:
            fast = self.fast[str(i)]
            fast.value_unit.fill_(rms_L(states[i]).median().item() / gains.get(i, 1.0))
            if self.config.codes:
                fast.centre(inputs[i][0, 1:])


def check_layers(decoder_layers, wanted) -> None:
    """Raise ValueError unless every wanted layer exists, is free, and has a gated MLP."""
    for i in wanted:
        if not 0 <= i < len(decoder_layers):
            raise ValueError(f"TTT config: layer {i} is out of range; this model has layers 0 to {len(decoder_layers) - 1}")
        mlp = decoder_layers[i].mlp
        if isinstance(mlp, TTTMLP):
            raise ValueError(f"TTT config: layer {i} already carries fast weights; detach() the other adapter first")
        missing = [name for name in ("gate_proj", "up_proj", "down_proj", "act_fn") if not hasattr(mlp, name)]
        if missing:
            raise ValueError(f"TTT config: layer {i} has an MLP without {', '.join(missing)}; only gated MLPs can be wrapped")
