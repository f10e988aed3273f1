"""The base's own arithmetic in forms that keep less: the same numbers, and less kept."""
import pytest
import torch
from conftest import FAMILIES, token_rows

import lean
from model_utils import load_model


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
        weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage  # held, so that no address comes twice
            return t

        embeds = model.get_input_embeddings()(ids).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            logits = model(inputs_embeds=embeds).logits
        return logits.detach(), torch.autograd.grad(logits.square().sum(), embeds)[0], sum(storage.nbytes() for storage in kept.values())

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
