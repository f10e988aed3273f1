"""The base's own arithmetic in forms that keep less: the same numbers, and less kept."""
from contextlib import contextmanager

import pytest
import torch
from conftest import FAMILIES, token_rows

import lean
import sessions
from fast_weight import TTTConfig
from in_place_ttt import InPlaceTTT
from model_utils import load_model
from objectives import lm_step


@contextmanager
def kept(*modules):
    """{address: bytes} of what the backward pass is left, beside the modules' parameters."""
    weights, storages, held = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}, {}, []

    def keep(t):
        storage = t.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in weights:  # some versions of torch keep an empty one, too
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(storage)  # so that no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        yield storages


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_norms_share_the_weights_and_give_the_same_logits_and_gradients(name):
    ids = torch.tensor(token_rows((9, 9), seed=3))

    def outcome(model):
        embeds = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=embeds).logits
        return logits.detach(), torch.autograd.grad(logits.square().sum(), embeds)[0]

    plain, fused = load_model(name), load_model(name)
    with torch.no_grad():  # weights that are not all 1, or a norm that drops them would pass
        for model in (plain.model, fused.model):
            torch.manual_seed(0)
            for key, p in model.named_parameters():
                if "norm" in key:
                    p.uniform_(0.5, 1.5)
    lean.fuse_norms(fused.model)
    assert any(type(m) is torch.nn.RMSNorm for m in fused.model.modules()) == (name != "tiny-gemma3")
    assert not any(hasattr(m, "variance_epsilon") for m in fused.model.modules())
    assert list(dict(fused.model.named_parameters())) == list(dict(plain.model.named_parameters()))
    for one, other in zip(outcome(plain.model), outcome(fused.model)):
        assert one.abs().max() > 0 and (one - other).abs().max() <= 1e-4 * one.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_lean_mlps_give_the_same_bits_keep_less_and_can_be_undone(name):
    ids = torch.tensor(token_rows((9, 9), seed=3))

    def outcome(model):
        """(logits, gradient, bytes kept for the backward pass beside the weights)."""
        embeds = model.get_input_embeddings()(ids).requires_grad_()
        with kept(model) as storages:
            logits = model(inputs_embeds=embeds).logits
        return logits.detach(), torch.autograd.grad(logits.square().sum(), embeds)[0], sum(storages.values())

    model = load_model(name).model
    before, names, modules = outcome(model), list(dict(model.named_parameters())), dict(model.named_modules())
    plain = lean.lean_mlps(model)
    assert len(plain) == model.config.get_text_config().num_hidden_layers
    after = outcome(model)
    assert list(dict(model.named_parameters())) == names
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and before[1].abs().max() > 0
    feed_forward = model.get_decoder().layers[0].mlp.up_proj.out_features
    assert after[2] <= before[2] - len(plain) * ids.numel() * feed_forward * 4
    lean.swap(model, plain)
    assert dict(model.named_modules()) == modules
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before[0])


def test_what_is_made_again_is_not_kept_and_the_product_that_ends_it_is_made_once():
    x, weight, calls = torch.randn(64, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True), []
    step = lambda name, t: calls.append(name) or t
    function = lambda x: step("product", step("exp", x.exp()) @ weight)
    plain = torch.autograd.grad(function(x).sum(), (x, weight))
    calls.clear()
    with kept() as storages:
        out = lean.again(function, x)
    assert list(storages) == [x.untyped_storage().data_ptr()] and calls == ["exp", "product"]
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), (x, weight)), plain)) and calls == ["exp", "product", "exp"]
    with torch.no_grad():
        assert not lean.again(function, x).requires_grad


@pytest.mark.parametrize("form", [{"unit_keys": True, "gate": True, "unit_targets": True, "init": "shift"}, {"codes": True, "write_attention": 2, "gate": True},
                                  {"key_map": 3, "target": "both", "value_rank": 2, "read_gate": True, "w_down": True}], ids=" ".join)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_layer_makes_again_of_its_chunks_changes_no_bit(name, form, monkeypatch):
    """Loss, gradients and memory of a next-token step, against those of a step that keeps everything."""
    outcomes = []
    for again in (lean.again, lambda function, *tensors: function(*tensors)):
        monkeypatch.setattr(sessions, "again", again)
        loaded = load_model(name)
        ttt = InPlaceTTT(loaded.model, TTTConfig(layers=(1, 2), chunk=4, **form))
        with torch.no_grad():
            torch.manual_seed(0)
            for p in ttt.parameters():
                p.add_(0.1 * torch.randn_like(p))
        with kept(loaded.model, ttt) as storages:
            step = lm_step(loaded, ttt, token_rows((31, 20)), torch.device("cpu"))
        step.loss.backward()
        outcomes.append(([step.loss.detach(), *(p.grad for p in ttt.parameters()), *(t for layer in step.memory.layers.values() for t in layer.tensors().values())],
                         sum(storages.values())))
    (lean_ones, fewer), (plain, all_of_it) = outcomes
    assert len(lean_ones) == len(plain) and all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(lean_ones, plain))
    assert fewer < all_of_it
