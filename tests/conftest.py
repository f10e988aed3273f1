"""Tiny random models of every family, in arithmetic wide enough that a wrong formula cannot pass for rounding."""
import functools
import os
import signal
import sys
import types

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")   # a test that reaches for the network is a wrong test

import pytest
import torch

from in_place_ttt import InPlaceTTT, TTTConfig
from manifests import run_script
from model_utils import load_model


def pytest_collection_modifyitems(items):
    """The longest tests start first: with several processes the rest is done beside it, and nobody waits for it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


FAMILIES = ("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-gemma3")


def wide_norm(self, x):
    """RMSNorm in x's own dtype; the library's rounds every hidden state to float32."""
    weight = 1 + self.weight if type(self).__name__.startswith("Gemma") else self.weight
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def widen(model):
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(wide_norm, module)
    return model


@functools.cache
def tiny(name, dtype=torch.float64):
    """A tiny model, loaded once per run; in float64 its norms are float64 too. Tests leave it as they found it."""
    loaded = load_model(name, dtype=dtype)
    if dtype == torch.float64:
        widen(loaded.model)
    return loaded


def strengthen(ttt, seed=1):
    """Random parameters of a size at which every one of them shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in ttt.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        small = name.endswith(("proj", "proj_x", "proj_out", "log_ridge", "gate", "gate_bias"))  # a large sparse gate is shut or wide open: no slope
        parameter.data = (noise * (0.1 if small else 0.5)).to(parameter)
    return ttt


@pytest.fixture
def attach():
    """attach(loaded, layers=(0, 2, 3), chunk=4, ...) -> InPlaceTTT with strong random parameters; undone after the test."""
    attached = []

    def make(loaded, layers=(0, 2, 3), chunk=4, **changes):
        ttt = InPlaceTTT(loaded.model, TTTConfig(layers, chunk, **changes))
        attached.append(ttt)
        wide = next(loaded.model.parameters()).dtype == torch.float64
        return strengthen(ttt.double() if wide else ttt)

    yield make
    for ttt in reversed(attached):
        if any(hasattr(layer.mlp, "base") for layer in ttt._decoder[0].layers):
            ttt.detach()


def hear_ctrl_c():
    """preexec_fn of a process that is to be interrupted: a suite that runs in the background ignores SIGINT, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def run_main(monkeypatch, capsys):
    """run_main(main, argv) -> (exit code, stdout, stderr) of a script in this process."""
    def run(main, argv):
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        try:
            run_script(main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(params=FAMILIES)
def family(request):
    """Each family in float64."""
    return tiny(request.param)


@pytest.fixture
def llama():
    return tiny("tiny-llama")


def token_rows(lengths, seed=0):
    """Token lists of the given lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 250, (n,), generator=generator).tolist() for n in lengths]


def batch_of(rows, layout="left", pad_id=256):
    """(ids, mask) [B, L]: rows padded left, right, or with a pad before every token ("holes")."""
    if layout == "holes":
        rows = [[t for token in row for t in (None, token)] for row in rows]
    width = max(map(len, rows))
    fill = lambda row: [None] * (width - len(row))
    padded = [row + fill(row) if layout == "right" else fill(row) + row for row in rows]
    ids = torch.tensor([[pad_id if t is None else t for t in row] for row in padded])
    return ids, torch.tensor([[int(t is not None) for t in row] for row in padded])


def run(model, ids, mask):
    """Logits of every column, with positions counted over real tokens."""
    position = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).logits


def write_once(model, ttt, ids, mask, **how):
    """(logits, memory) of one forward call that writes."""
    with ttt.write(**how) as writer:
        writer.expect(mask)
        logits = run(model, ids, mask)
    return logits, writer.memory()


def assert_same_memory(first, second, atol=1e-12):
    """Equal updates (whatever their form), token and chunk counts."""
    assert sorted(first.layers) == sorted(second.layers)
    assert first.tokens.tolist() == second.tokens.tolist() and first.chunks.tolist() == second.chunks.tolist()
    for i in first.layers:
        torch.testing.assert_close(first.layers[i].to_dense().update, second.layers[i].to_dense().update, atol=atol, rtol=1e-9)
