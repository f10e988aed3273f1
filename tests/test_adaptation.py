"""adaptation.py: inner and outer loss along a text, against plain arithmetic on tiny models."""
import numpy as np
import pytest
import torch
from conftest import strengthen
from torch.nn.functional import cross_entropy

import adaptation
from decoding import write_rows
from in_place_ttt import InPlaceTTT, TTTConfig
from model_utils import load_model

IDS = torch.randint(0, 250, (70,), generator=torch.Generator().manual_seed(3)).tolist()
RIDGE = dict(chunk=None, codes=True, write_attention=2, read_attention=1, deep=True, blind=True, target="both", unit_targets=True, gate=True, sparse=True, rule="ridge")


@pytest.fixture
def make():
    """make(**options) -> (tiny model, adapter); untrained: with its initial numbers, which change nothing."""
    attached = []

    def attach(untrained=False, **options):
        loaded = load_model("tiny-llama")
        attached.append(InPlaceTTT(loaded.model, TTTConfig(layers=(1, 2), **options)))
        return loaded, attached[-1] if untrained else strengthen(attached[-1])

    yield attach
    for ttt in attached:
        ttt.detach()


def base_losses(loaded):
    ids = torch.tensor([IDS])
    logits = loaded.model(input_ids=ids).logits[0]
    return cross_entropy(logits[:-1], ids[0, 1:], reduction="none").detach().tolist()


@pytest.mark.parametrize("options", [dict(chunk=16), dict(chunk=None, unit_keys=True), RIDGE], ids=["chunks", "whole", "ridge"])
def test_off_is_the_base_and_every_token_but_the_first_is_scored_once(make, options):
    loaded, ttt = make(**options)
    found = adaptation.along(loaded, ttt, IDS, 20)
    length = options["chunk"] or 20
    assert found.starts == list(range(0, len(IDS), length))
    for losses in (found.off, found.on):
        assert [len(part) for part in losses] == [len(piece) - (n == 0) for n, piece in enumerate(adaptation.pieces(IDS, ttt, 20))]
    np.testing.assert_allclose(np.concatenate(found.off), base_losses(loaded), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.on[0], found.off[0])  # nothing was written yet
    assert not np.allclose(found.on[1], found.off[1], rtol=1e-3)


def test_on_in_chunks_is_what_the_write_pass_itself_predicts(make):
    loaded, ttt = make(chunk=16)
    found, ids = adaptation.along(loaded, ttt, IDS, 99), torch.tensor([IDS])
    with torch.no_grad(), ttt.write() as writer:
        writer.expect(torch.ones_like(ids))
        logits = loaded.model(input_ids=ids, use_cache=False).logits[0]
    np.testing.assert_allclose(np.concatenate(found.on), cross_entropy(logits[:-1], ids[0, 1:], reduction="none").tolist(), rtol=2e-3, atol=1e-3)
    whole, _ = write_rows(loaded.model, ttt, [IDS], 0)
    assert len(found.digests) == len(set(found.digests)) == 5 and found.parameters[0] == found.parameters[1]
    assert whole.update_norm().item() > 0


def test_an_untrained_adapter_changes_no_loss_and_its_state_does_not_move(make):
    loaded, ttt = make(untrained=True, chunk=16, init="paper")
    found = adaptation.along(loaded, ttt, IDS, 99)
    np.testing.assert_allclose(np.concatenate(found.on), np.concatenate(found.off), rtol=1e-5)
    assert adaptation.summary(found)["gain"] == pytest.approx(0, abs=1e-6)
    assert all(value is None for values in found.prev.values() for value in values)  # conv is zero: nothing is asked of the memory


def test_inner_losses_are_the_rules_own(make):
    generator = torch.Generator().manual_seed(0)
    keys, wanted, update = (torch.randn(1, *shape, generator=generator) for shape in ((5, 6), (5, 4), (4, 6)))
    weight, asked = torch.rand(1, 5, generator=generator), adaptation.LayerMemory.factored(keys, wanted)
    memory = adaptation.LayerMemory.dense(update)
    read = keys[0] @ update[0].T
    whole = sum(weight[0, i] * wanted[0, i] @ wanted[0, i] for i in range(5)).item()
    ridge = sum(weight[0, i] * (read[i] - wanted[0, i]).square().sum() for i in range(5)).item() / whole
    hebbian = -sum(weight[0, i] * read[i] @ wanted[0, i] for i in range(5)).item() / whole
    assert adaptation.inner_loss("ridge", asked, weight, memory) == pytest.approx(ridge, rel=1e-5)
    assert adaptation.inner_loss("hebbian", asked, weight, memory) == pytest.approx(hebbian, rel=1e-4)
    assert (adaptation.inner_loss("ridge", asked, weight, None), adaptation.inner_loss("hebbian", asked, weight, None)) == (pytest.approx(1), pytest.approx(0))
    assert adaptation.inner_loss("ridge", asked, 0 * weight, memory) is None


@pytest.mark.parametrize("options", [dict(chunk=16), RIDGE], ids=["hebbian", "ridge"])
def test_a_write_lowers_the_inner_loss(make, options):
    loaded, ttt = make(**options)
    found = adaptation.along(loaded, ttt, IDS, 20)
    pairs = [(p, a) for i in found.prev for p, a in zip(found.prev[i], found.after[i]) if p is not None]
    assert pairs and all(after < before for before, after in pairs)
    first = 1 if options is RIDGE else 0
    assert all(values[0] in (None, pytest.approx(first)) for values in found.prev.values())


def test_the_verdict_looks_at_the_state_and_not_at_the_parameters():
    assert adaptation.verdict(["a", "b", "c"], ["p", "p"]) == "the state moves with every piece, the parameters stay"
    assert adaptation.verdict(["a", "a", "a"], ["p", "p"]).startswith("no weight changes: the state is the same")
    assert adaptation.verdict(["a", "b"], ["p", "q"]).startswith("parameters changed")


@pytest.mark.parametrize("improved, gain, says", [(1.0, [-0.1, 0.2], "disconnect"), (1.0, [0.1, 0.2], "falls with it"), (0.2, [0.1, 0.2], "hardly does"), (None, [-0.2, -0.1], "neither")])
def test_the_sentence_follows_its_rule(improved, gain, says):
    layers = {i: {"l_prev": 1.0, "l_after": 0.4, "improved": improved, "pieces": 3} for i in (1, 2, 3)}
    assert says in adaptation.disconnect(layers, gain)


def test_the_gain_has_an_interval_and_a_slope():
    found = adaptation.Along([0, 4, 8, 12], [[2.0] * 3, [2.0] * 4, [2.0] * 4, [2.0] * 4], [[2.0] * 3, [1.9] * 4, [1.8] * 4, [1.7] * 4], {1: [None, 0.5, 0.5, 0.5]}, {1: [None, 0.1, 0.1, 0.6]},
                             ["a", "b", "c", "d"], ["p", "p"])
    told = adaptation.summary(found)
    assert told["gain"] == pytest.approx(0.2) and told["slope"] == pytest.approx(0.1) and told["gain_ci"][0] >= 0.1 - 1e-9 and told["gain_ci"][1] <= 0.3 + 1e-9
    assert told["layers"][1] == {"pieces": 3, "l_prev": pytest.approx(0.5), "l_after": pytest.approx(0.8 / 3), "improved": pytest.approx(2 / 3)}
    assert "0.200 [0.1" in adaptation.words(told, "arm", "ridge")


def test_a_text_of_one_piece_is_refused(make):
    loaded, ttt = make(chunk=None, unit_keys=True)
    with pytest.raises(ValueError, match="a text of 70 tokens is one piece of 100; give a longer text or shorter pieces"):
        adaptation.along(loaded, ttt, IDS, 100)
