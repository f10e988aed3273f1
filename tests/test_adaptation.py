"""adaptation.py, trends.py and state_checks.py: inner and outer loss along a text against plain arithmetic, and checks of the state that can fail, on tiny models."""
import contextlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import strengthen
from torch.nn.functional import cross_entropy

import adaptation
import state_checks
import trends
from adaptation import Along, along
from decoding import write_rows
from in_place_ttt import InPlaceTTT, TTTConfig
from memory import LayerMemory, Memory
from model_utils import load_model

IDS = torch.randint(0, 250, (70,), generator=torch.Generator().manual_seed(3)).tolist()
RIDGE = dict(chunk=None, codes=True, write_attention=2, read_attention=1, deep=True, blind=True, target="both", unit_targets=True, gate=True, sparse=True, rule="ridge")
ARMS = pytest.mark.parametrize("options", [dict(chunk=16), dict(chunk=None, unit_keys=True), RIDGE], ids=["chunks", "whole", "ridge"])
LENGTH = 20


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
    return cross_entropy(logits[:-1], ids[0, 1:], reduction="none").detach().numpy()


def made(gain=(0.0, 0.1, 0.2, 0.3), prev=(1.0, 0.8, 0.6, 0.4), after=(0.5, 0.2, 0.2, 0.9), **changes):
    """Four pieces of three tokens, one layer with a slot at the first token of each; the base's loss is 2 nats."""
    spread = lambda values, fill: np.array([v for value in values for v in (value, fill, fill)])
    off = np.full(12, 2.0)
    off[0] = np.nan
    found = Along([0, 3, 6, 9], off, off - np.repeat(gain, 3), (1,), spread([1.0] * 4, np.nan)[None], spread(prev, np.nan)[None], spread(after, np.nan)[None],
                  spread([2.0] * 4, 0.0)[None], ["empty", "a", "b", "c"], ["a", "b", "c", "d"], [1.0, 0.5, 0.4, 0.3], ["p", "p"], None)
    return replace(found, **changes)


# ---- along a text ----

@ARMS
def test_off_is_the_base_and_every_token_but_the_first_is_scored_once(make, options):
    loaded, ttt = make(**options)
    found = along(loaded, ttt, IDS, LENGTH)
    length = options["chunk"] or LENGTH
    assert found.starts == list(range(0, len(IDS), length)) and len(found.off_L) == len(found.on_L) == len(IDS)
    np.testing.assert_allclose(found.off_L[1:], base_losses(loaded), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.on_L[:length], found.off_L[:length])  # nothing was written yet
    assert not np.allclose(found.on_L[length:], found.off_L[length:], rtol=1e-3) and np.isnan(found.off_L[0])


def test_on_in_chunks_is_what_the_write_pass_itself_predicts(make):
    loaded, ttt = make(chunk=16)
    found, ids = along(loaded, ttt, IDS, 99), torch.tensor([IDS])
    with torch.no_grad(), ttt.write() as writer:
        writer.expect(torch.ones_like(ids))
        logits = loaded.model(input_ids=ids, use_cache=False).logits[0]
    np.testing.assert_allclose(found.on_L[1:], cross_entropy(logits[:-1], ids[0, 1:], reduction="none").tolist(), rtol=2e-3, atol=1e-3)
    assert adaptation.change(found.memory, write_rows(loaded.model, ttt, [IDS], 0)[0]) < 1e-4


@ARMS
def test_streamed_a_text_gives_the_same_losses_inner_and_outer(make, options):
    loaded, ttt = make(**options)
    whole, streamed = along(loaded, ttt, IDS, LENGTH), along(loaded, ttt, IDS, LENGTH, streaming=True)
    for name in ("off_L", "on_L", "l0_NL", "prev_NL", "after_NL", "mass_NL"):
        np.testing.assert_allclose(getattr(streamed, name), getattr(whole, name), rtol=5e-3, atol=5e-3)
    assert np.isfinite(whole.after_NL).sum() > 10


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("rule", ["ridge", "hebbian"])
def test_inner_losses_are_the_rules_own(rule, sparse):
    """Five tokens, of which the second and the fourth leave no slot; a sparse arm's slots stand at the left, behind them an empty one."""
    draw = torch.Generator().manual_seed(0)
    weights, order = torch.tensor([0.5, 0.0, 1.0, 0.0, 0.2]), [0, 2, 4, 1] if sparse else range(5)
    keys, wanted, update = (torch.randn(*shape, generator=draw) for shape in ((5, 6), (5, 4), (4, 6)))
    wanted[4] = 0.0  # it asks for nothing
    asked = LayerMemory.factored(keys[None, order], wanted[None, order])
    writer = SimpleNamespace(wanted={7: (asked, weights[None, order])}, slots=SimpleNamespace(weights=weights[None, None]))
    ttt = SimpleNamespace(config=SimpleNamespace(rule=rule, sparse=sparse))
    loss, mass = adaptation.slot_losses(ttt, writer, Memory({7: LayerMemory.dense(update[None])}, None, None, None))[7]
    for i in (0, 2):
        read, square = update @ keys[i], (wanted[i] @ wanted[i]).item()
        assert loss[i] == pytest.approx((((read - wanted[i]).square().sum() if rule == "ridge" else -(read @ wanted[i])) / square).item(), rel=1e-4)
        assert mass[i] == pytest.approx(weights[i].item() * square, rel=1e-4)
    assert np.isnan(loss[[1, 3, 4]]).all() and not mass[[1, 3, 4]].any()
    assert adaptation.slot_losses(ttt, writer, None)[7][0][[0, 2]].tolist() == pytest.approx([float(rule == "ridge")] * 2)


@pytest.mark.parametrize("options", [dict(chunk=16), RIDGE], ids=["hebbian", "ridge"])
def test_a_write_lowers_the_inner_loss_of_its_piece(make, options):
    loaded, ttt = make(**options)
    found = along(loaded, ttt, IDS, LENGTH)
    prev, after, l0 = (found.inner(name) for name in ("prev", "after", "l0"))
    asks = np.isfinite(prev)
    assert asks.any() and (after[asks] < prev[asks]).all() and (found.mass_NL > 0).any(1).all()
    np.testing.assert_allclose(prev[:, 0][asks[:, 0]], l0[:, 0][asks[:, 0]])  # before the first piece the memory holds nothing


def test_a_text_of_one_piece_is_refused(make):
    loaded, ttt = make(chunk=None, unit_keys=True)
    with pytest.raises(ValueError, match="a text of 70 tokens is one piece of 100; give a longer text or shorter pieces"):
        along(loaded, ttt, IDS, 100)


# ---- its numbers and words ----

def test_the_summary_is_that_of_its_numbers():
    told = adaptation.summary(made())
    assert told["gain"] == pytest.approx(0.2) and 0.0999 < told["gain_ci"][0] < 0.2 < told["gain_ci"][1] < 0.3001
    assert told["slope_gain"]["slope"] == pytest.approx(0.1 / 3 * 1000) and told["slope_off"]["slope"] == pytest.approx(0)  # for 1,000 tokens
    cell = told["layers"][1]
    assert (cell["slots"], cell["l0"], cell["l_prev"], cell["l_after"], cell["improved"]) == (3, 1.0, pytest.approx(0.6), pytest.approx(1.3 / 3), pytest.approx(2 / 3))
    assert cell["slope_l_prev"]["slope"] == pytest.approx(-0.2 / 3 * 1000)
    assert "gain 0.200 [0.1" in adaptation.words(told, "ridge") and "lower for 67% of the 3 slots" in adaptation.words(told, "ridge")


def test_a_piece_weighs_its_slots_by_what_they_ask():
    loss, mass = np.array([np.nan, 1.0, 0.5, np.nan, 4.0]), np.array([0.0, 3.0, 1.0, 0.0, 2.0])
    found = made(starts=[0, 2, 3])
    np.testing.assert_allclose(found.by_piece(loss, mass), [1.0, 0.5, 4.0])
    found = made(starts=[0, 3, 4])
    np.testing.assert_allclose(found.by_piece(loss, mass), [3.5 / 4, np.nan, 4.0])


@pytest.mark.parametrize("improved, gain, says", [(1.0, [-0.1, 0.2], "disconnect"), (1.0, [0.1, 0.2], "falls with it"), (0.2, [0.1, 0.2], "hardly does"), (None, [-0.2, -0.1], "neither"),
                                                  (1.0, [0.0001, 0.0002], "disconnect"), (1.0, None, "disconnect")])
def test_the_sentence_follows_its_rule(improved, gain, says):
    layers = {i: {"improved": improved} for i in (1, 2, 3)}
    assert says in adaptation.disconnect(layers, gain)


def test_the_outer_loss_follows_the_inner_one_on_the_same_tokens_or_a_piece_later():
    inner = np.array([0.1, 0.5, 0.2, 0.9, 0.4, 0.7, 0.3, 0.8, 0.6])
    one, l0 = np.full((1, 9), np.nan), np.ones((2, 9))
    same = adaptation.outer_by_inner(inner, l0, np.concatenate([1 - inner[None], one]), l0)  # a layer without a slot says nothing
    assert same["same_tokens"]["rho"] == pytest.approx(1) and same["same_tokens"]["n"] == 9
    later = adaptation.outer_by_inner(np.roll(inner, 1), l0, inner[None] + l0, l0)
    assert later["next_piece"]["rho"] == pytest.approx(1) and later["next_piece"]["n"] == 8 and later["same_tokens"]["rho"] < 1
    assert "(yes)" in adaptation.relation_words(later) and "8 pieces" in adaptation.relation_words(later)


def test_a_rank_correlation_counts_its_groups_and_not_its_rows():
    draw = np.random.default_rng(0)
    x = draw.normal(size=12)
    y = x + draw.normal(size=12)
    alone, repeated = trends.rank_correlation(x, y), trends.rank_correlation(np.repeat(x, 20), np.repeat(y, 20), np.repeat(np.arange(12), 20))
    assert repeated["n"] == 240 and repeated["groups"] == alone["groups"] == 12
    assert alone["ci"][0] < alone["rho"] < alone["ci"][1] and np.ptp(repeated["ci"]) > 0.7 * np.ptp(alone["ci"])  # twenty copies know no more
    assert trends.rank_correlation(x, np.zeros(12))["rho"] is None and trends.rank_correlation(x[:4], y[:4])["ci"] is None
    says = [trends.predicts({"ci": ci}, sign) for ci, sign in (([-0.9, -0.1], -1), ([-0.9, -0.1], 1), ([-0.9, 0.1], -1), (None, 1))]
    assert says == ["yes", "the other way round", "no", "cannot be said"]


def test_slopes_and_means_leave_out_what_is_not_there():
    assert trends.slope_of([0, 1, 2, 3, 4], [0, 2, np.nan, 6, 8])["slope"] == pytest.approx(2) and trends.slope_of([0, 1], [0, 1])["slope"] is None
    assert trends.mean_of([1.0, np.nan, 3.0])["mean"] == 2 and trends.mean_of([])["mean"] is None and trends.mean_of([2.0, 2.0]) == {"mean": 2.0, "ci": None}


# ---- the state ----

def test_no_weight_change_is_said_of_the_state_and_not_of_the_parameters(make):
    """Both cases: a state that moves while not one parameter does, and one in which truly nothing changes, though tokens are counted and slots kept."""
    moving, still = (along(*make(chunk=16, init="paper", untrained=untrained), IDS, LENGTH) for untrained in (False, True))
    assert len(set(moving.parameters)) == 1 and moving.parameters[0] and all(state_checks.moves(moving))
    assert state_checks.verdict(state_checks.moves(moving), moving.parameters) == "the fast weights changed in 5 of 5 writes, and no parameter did"
    assert still.outputs == [adaptation.EMPTY] * 5 and int(still.memory.tokens) == len(IDS)
    assert state_checks.verdict(state_checks.moves(still), still.parameters).startswith("no weight change: none of 5 writes changed the state")
    assert state_checks.state_moves(moving).passed and not state_checks.state_moves(still).passed
    np.testing.assert_allclose(still.on_L, still.off_L, rtol=1e-5)


def test_a_parameter_that_moves_is_no_test_time_learning(make):
    loaded, ttt = make(chunk=16)
    before = adaptation.parameter_digest(loaded, ttt)
    with torch.no_grad():
        ttt.fast["1"].conv[0, 0] += 1e-3
    changed = made(parameters=[before, adaptation.parameter_digest(loaded, ttt)])
    assert state_checks.verdict([True], changed.parameters).startswith("parameters changed") and not state_checks.state_moves(changed).passed


def test_rounding_is_no_change_and_a_new_slot_is():
    draw = torch.Generator().manual_seed(0)
    keys, values = torch.randn(1, 3, 6, generator=draw), torch.randn(1, 3, 4, generator=draw)
    of = lambda keys, values: Memory({1: LayerMemory.factored(keys, values)}, torch.tensor([3]), torch.tensor([1]), {1: 1.0})
    memory = of(keys, values)
    longer = of(torch.cat([keys, keys[:, :1]], 1), torch.cat([values, 0 * values[:, :1]], 1))  # a slot that holds nothing
    assert adaptation.state_digest(longer) == adaptation.state_digest(memory) and adaptation.change(memory, longer) < 1e-7
    assert adaptation.change(memory, of(keys, values * (1 + 1e-6))) < adaptation.ROUNDING < adaptation.change(memory, of(keys, values * 1.01))
    assert adaptation.change(memory, memory.dense()) < 1e-6 and adaptation.change(None, memory) == 1 and adaptation.change(None, memory.scale(0.0)) == 0
    assert adaptation.state_digest(memory.scale(0.0)) == adaptation.state_digest(None) == adaptation.EMPTY


@ARMS
def test_every_check_of_the_state_passes(make, options):
    loaded, ttt = make(**options)
    found = along(loaded, ttt, IDS, LENGTH)
    checks = state_checks.run(loaded, ttt, IDS, found, along(loaded, ttt, IDS, LENGTH, streaming=True))
    assert len(checks) == 7 + bool(options["chunk"]) and all(check.passed for check in checks), state_checks.table(checks)
    assert state_checks.table(checks).count("| PASS |") == len(checks)


def test_a_break_in_the_chain_fails():
    assert state_checks.handed_on(made()).passed
    assert not state_checks.handed_on(made(inputs=["empty", "a", "x", "c"])).passed and not state_checks.handed_on(made(inputs=["z", "a", "b", "c"])).passed
    assert "FAIL" in state_checks.table([state_checks.handed_on(made(inputs=["empty", "a", "x", "c"]))])


@pytest.fixture
def chunks(make):
    """(model, adapter, write(tokens, memory) as state_checks.run makes it)."""
    loaded, ttt = make(chunk=16)
    return loaded, ttt, lambda tokens, memory=None: write_rows(loaded.model, ttt, [tokens], 0, memory)[0]


def test_a_state_that_outlives_its_document_fails(chunks):
    _, _, write = chunks
    kept = []

    def leaky(tokens, memory=None):
        kept.append(write(tokens, memory or (kept[-1] if kept else None)))
        return kept[-1]

    assert state_checks.reset(write, IDS[:35], IDS[35:]).passed and not state_checks.reset(leaky, IDS[:35], IDS[35:]).passed


def test_a_file_that_gives_back_another_state_fails(chunks, monkeypatch):
    _, _, write = chunks
    assert state_checks.resumed(write, IDS[:35], IDS[35:], 1e-3).passed
    load = Memory.load
    monkeypatch.setattr(Memory, "load", staticmethod(lambda path, device: load(path, device).scale(1.0001)))
    assert not state_checks.resumed(write, IDS[:35], IDS[35:], 1e-3).passed


def test_a_stream_that_forgets_a_token_fails(chunks, monkeypatch):
    loaded, ttt, _ = chunks
    found, read_on = along(loaded, ttt, IDS, LENGTH), adaptation.read_on
    assert all(check.passed for check in state_checks.one_pass(loaded, ttt, IDS, found)) and state_checks.streamed_alike(loaded, found, found).passed
    monkeypatch.setattr(state_checks, "read_on", lambda loaded, ids, past, last, session, step: read_on(loaded, [*ids[:-1], (ids[-1] + (step == 1)) % 250], past, last, session, step))
    assert not state_checks.one_pass(loaded, ttt, IDS, found)[0].passed
    assert not state_checks.streamed_alike(loaded, found, replace(found, on_L=found.on_L + 0.1)).passed
    assert not state_checks.one_pass(loaded, ttt, IDS, replace(found, memory=found.memory.scale(1.1)))[1].passed


def test_reading_that_writes_fails(chunks, monkeypatch):
    loaded, ttt, write = chunks
    assert state_checks.reading_writes_nothing(loaded, ttt, IDS, write).passed

    @contextlib.contextmanager
    def scribble(memory):
        memory.layers[1].update.mul_(1.001)
        yield None

    monkeypatch.setattr(ttt, "read", scribble)
    assert not state_checks.reading_writes_nothing(loaded, ttt, IDS, write).passed
