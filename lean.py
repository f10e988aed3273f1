"""The base's own arithmetic in forms that cost less to train through: the same weights, the same numbers up to one rounding."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def again(function: Callable, *tensors: torch.Tensor):
    """function(*tensors), of whose steps nothing is kept: the backward pass goes through them once more, up to the last one whose input it needs.
    A product that ends them is not made twice. function must find what it looks at unchanged then; nothing random in it."""
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False) if torch.is_grad_enabled() else function(*tensors)


class Product(torch.autograd.Function):
    """act(gate) * up, for which gate and up alone are kept: act's result is made again, the same bits, by fewer calls than `again` takes."""

    @staticmethod
    def forward(ctx, gate_BLF, up_BLF, act_fn):
        ctx.save_for_backward(gate_BLF, up_BLF)
        ctx.act_fn = act_fn
        return act_fn(gate_BLF) * up_BLF

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BLF):
        gate_BLF, up_BLF = ctx.saved_tensors
        with torch.enable_grad():
            gate_BLF = gate_BLF.detach().requires_grad_()
            act_BLF = ctx.act_fn(gate_BLF)
        return torch.autograd.grad(act_BLF, gate_BLF, grad_BLF * up_BLF)[0], grad_BLF * act_BLF.detach(), None


def gated(mlp: nn.Module, x_BLD: torch.Tensor) -> torch.Tensor:
    """h = act(x W_gate) * (x W_up) of a gated MLP, [B, L, F]. The library's own line keeps both products and act's result for the backward pass;
    act's is made again here, from the first product: a third less, and the same bits."""
    gate_BLF, up_BLF = mlp.gate_proj(x_BLD), mlp.up_proj(x_BLD)
    if torch.is_grad_enabled() and gate_BLF.requires_grad and not torch.compiler.is_compiling():  # a compiler chooses what to make again
        return Product.apply(gate_BLF, up_BLF, mlp.act_fn)
    return mlp.act_fn(gate_BLF) * up_BLF


class LeanMLP(nn.Module):
    """Stands where a base's gated MLP stood and shares its parts, under their names."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(gated(self, x_BLD))


def fuse_norms(model) -> dict[str, nn.Module]:
    """Put torch's fused RMSNorm in place of the library's plain one, which takes ten kernels; the weights are shared.

    The same up to one rounding in bfloat16. Norms of another form (Gemma's) stay. Returns {name in the decoder: the norm that stood there}.
    """
    fused = {}
    for name, norm in model.get_decoder().named_modules():
        if hasattr(norm, "variance_epsilon"):
            fused[name] = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, device="meta")
            fused[name].weight = norm.weight
    return swap(model, fused)


def lean_mlps(model) -> dict[str, nn.Module]:
    """Put a LeanMLP in place of every layer's MLP. Returns {name in the decoder: the MLP that stood there}.

    Of a base without an adapter; a layer that carries one (TTTMLP) makes its h by `gated` anyway.
    """
    return swap(model, {f"{name}.mlp": LeanMLP(layer.mlp) for name, layer in without_fast_weights(model).items()})


def without_fast_weights(model) -> dict[str, nn.Module]:
    """{name in the decoder: layer} of those without: what a compiler takes, since fast weights are written by Python between a layer's parts."""
    return {f"layers.{i}": layer for i, layer in enumerate(model.get_decoder().layers) if hasattr(layer.mlp, "gate_proj")}


def swap(model, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Put these modules in their places in the decoder, by name, and return what stood there: with what fuse_norms or lean_mlps returned it undoes them."""
    decoder = model.get_decoder()
    stood = {name: decoder.get_submodule(name) for name in modules}
    for name, module in modules.items():
        decoder.set_submodule(name, module)
    return stood
