"""Every rule of scoring_audit.py fails a scorer that breaks it, and that rule alone; scorers that play fair pass all of them."""
from dataclasses import replace

import pytest
import torch
from conftest import strengthen, token_rows

import fast_weight
import scoring_audit
import sessions
from in_place_ttt import InPlaceTTT, TTTConfig
from model_utils import load_model
from scoring import AdamW, InPlace, Off, Plan, Score, Update
from scoring_audit import audit

IDS = token_rows((23,))[0]
VOCABULARY, PIECE = 260, 5
RULES = ["causal", "distribution", "score_first", "single_pass", "restored"]
CODES = dict(chunk=None, codes=True, write_attention=2, read_attention=1, deep=True, blind=True, target="both", unit_targets=True, gate=True, sparse=True, rule="ridge")


class Counts:
    """A fair scorer in a dozen lines: a unigram model that counts what it has scored. The cheats below change one thing each."""

    vocabulary = VOCABULARY

    def __init__(self):
        self.counts = torch.ones(VOCABULARY)

    def state(self):
        return str(self.counts.tolist())

    def predict(self, ids, i):
        return torch.log(self.counts / self.counts.sum())

    def score(self, ids, start, end):
        full = torch.stack([self.predict(ids, i) for i in range(start, end)])
        return Score(start, full[torch.arange(end - start), torch.tensor(ids[start:end])], lambda: full)

    def learn(self, ids, start, end):
        self.counts += torch.bincount(torch.tensor(ids[start:end]), minlength=VOCABULARY)
        return Update(start, end)

    def pieces(self, ids):
        return [(start, min(start + PIECE, len(ids))) for start in range(0, len(ids), PIECE)]

    def events(self, ids):
        for start, end in self.pieces(ids):
            yield self.score(ids, start, end)
            yield self.learn(ids, start, end)
        self.reset()

    def reset(self):
        self.counts = torch.ones(VOCABULARY)


class LooksAhead(Counts):
    """A token's distribution knows the token after the next."""

    def predict(self, ids, i):
        hint = torch.zeros(VOCABULARY)
        hint[ids[min(i + 2, len(ids) - 1)] if i + 2 < len(ids) else 0] = 1
        return torch.log_softmax(super().predict(ids, i) + hint, -1)


class KnowsTheToken(Counts):
    """The distribution is whole, but made with the token that is to be predicted."""

    def predict(self, ids, i):
        hint = torch.zeros(VOCABULARY)
        hint[ids[i]] = 1
        return torch.log_softmax(super().predict(ids, i) + hint, -1)


class Unnormalised(Counts):
    def predict(self, ids, i):
        return super().predict(ids, i) + 0.1


class ScoresBetterThanItSays(Counts):
    def score(self, ids, start, end):
        honest = super().score(ids, start, end)
        return Score(start, honest.realised + 0.1, honest.full)


class LearnsInSilence(Counts):
    def events(self, ids):
        for start, end in self.pieces(ids):
            yield self.score(ids, start, end)
            self.counts[0] += 1
        self.reset()


class LearnsFirst(Counts):
    """What it learns early does no harm to the other rules: the number of tokens alone."""

    def learn(self, ids, start, end):
        self.counts[0] += end - start
        return Update(start, end)

    def events(self, ids):
        for start, end in self.pieces(ids):
            yield self.learn(ids, start, end)
            yield self.score(ids, start, end)
        self.reset()


class TwoPasses(Counts):
    def events(self, ids):
        for _ in range(2):
            for start, end in self.pieces(ids):
                yield self.score(ids, start, end)


class LeavesOut(Counts):
    def pieces(self, ids):
        return super().pieces(ids)[:2] + super().pieces(ids)[3:]


class Remembers(Counts):
    """Goes on with what the document before taught it, though it says it was reset: only a second run shows it."""

    runs = 0

    def state(self):
        return str((self.counts - self.runs * self.drift).tolist())

    drift = torch.nn.functional.one_hot(torch.tensor(3), VOCABULARY).float()

    def reset(self):
        self.runs += 1
        self.counts = torch.ones(VOCABULARY) + self.runs * self.drift


def failed(findings):
    return [finding.rule for finding in findings if not finding.passed]


def test_a_fair_scorer_passes_every_rule():
    findings = audit(Counts(), IDS)
    assert [finding.rule for finding in findings] == RULES and failed(findings) == []
    assert "5 updates, each from scored tokens; 5 of them moved the state" in findings[2].says


@pytest.mark.parametrize("cheat, rule, says", [
    (LooksAhead, "causal", "the distribution at"), (KnowsTheToken, "distribution", "moves by"), (Unnormalised, "distribution", "sums to a number that is not 1"),
    (ScoresBetterThanItSays, "distribution", "another entry at the token than its score"), (LearnsInSilence, "score_first", "learned in silence"),
    (LearnsFirst, "score_first", "tokens 0 to 4 were learned from when only those before 0 had been scored"), (TwoPasses, "single_pass", "tokens from 0 on are scored again"),
    (LeavesOut, "single_pass", "tokens 10 to 14 are left out")])
def test_a_scorer_that_breaks_one_rule_fails_that_rule_alone(cheat, rule, says):
    findings = audit(cheat(), IDS)
    assert failed(findings) == [rule] and says in findings[RULES.index(rule)].says
    assert f"FAIL  {rule}" in scoring_audit.verdict(findings)


def test_what_is_left_behind_is_seen():
    class NotReset(Counts):
        def reset(self):
            pass

    assert "restored" in failed(audit(NotReset(), IDS))
    findings = scoring_audit.restored(remembers := Remembers(), IDS, scoring_audit.trace(remembers, IDS), "same", "same", 1e-5)
    assert not findings.passed and "the same document again" in findings.says


def test_best_of_two_by_what_came_out_is_caught():
    """Of two models the better one on each piece: the choice knows the tokens."""
    class BestOf(Counts):
        def score(self, ids, start, end):
            flat = torch.full((end - start, VOCABULARY), -torch.log(torch.tensor(float(VOCABULARY))).item())
            honest, picked = super().score(ids, start, end), torch.tensor(ids[start:end])
            other = Score(start, flat[torch.arange(end - start), picked], lambda: flat)
            return max(honest, other, key=lambda score: score.realised.sum())

    ids = [1, 2, 3, 4, 5, 10, 11, 12, 13, 1, 20, 21, 22, 23, 24]  # only the last token of the second piece makes the counting model the better one there
    assert failed(audit(BestOf(), ids)) == ["causal", "distribution"]


@pytest.fixture
def scorer_of():
    """scorer_of(kind, forbidden, ...) -> a scorer on a tiny model with strong fast weights."""
    loaded, attached = load_model("tiny-llama"), []

    def make(kind, forbidden=False, window=12, stride=8, **more):
        plan = Plan(window, stride, 256)
        if kind == "off":
            return Off(loaded, plan)
        if kind == "adamw":
            named = {name: p for name, p in loaded.model.named_parameters() if "down_proj" in name}
            return AdamW(loaded, plan, named, 1e-2, 2, stride, 0, forbidden)
        attached.append(strengthen(InPlaceTTT(loaded.model, TTTConfig(layers=(1, 2), **(CODES if kind == "codes" else dict(chunk=4)) | more))).requires_grad_(False))
        return InPlace(loaded, attached[-1], plan, stride if kind == "chunks" else 4, forbidden)

    yield make
    for ttt in attached:
        ttt.detach()


@pytest.mark.parametrize("kind", ["off", "adamw", "chunks", "codes"])
def test_ours_pass_with_every_token_changed(scorer_of, kind):
    findings = audit(scorer_of(kind, window=6, stride=4), IDS[:10])
    assert failed(findings) == [], scoring_audit.verdict(findings)
    if kind != "off":
        assert "0 of them moved the state" not in findings[2].says


@pytest.mark.parametrize("kind", ["adamw", "chunks", "codes"])
def test_the_forbidden_way_fails_where_it_should(scorer_of, kind):
    findings = audit(scorer_of(kind, forbidden=True), IDS[:16], probes=[1, 9])
    assert failed(findings) == ["causal", "distribution", "score_first"]


# ---- look-ahead inside a chunk: kernel 5 sees two tokens ahead ----

def test_the_symmetric_conv_looks_ahead_inside_a_chunk_and_no_score_knows_it(scorer_of):
    """A token's value holds the two tokens after it, yet the value is applied from the next chunk on: changing any token moves nothing before it."""
    fair = scorer_of("chunks", window=24, stride=24)
    assert fair.ttt.config.kernel == 5 and failed(audit(fair, IDS)) == []
    inputs, other = torch.tensor([IDS]), torch.tensor([IDS[:3] + [IDS[3] + 1] + IDS[4:]])
    values = []
    for ids in (inputs, other):
        with torch.no_grad(), fair.ttt.write(differentiable=True) as writer:
            writer.expect(torch.ones_like(ids))
            fair.loaded.model(input_ids=ids, use_cache=False)
        values.append(writer.memory().layers[1].values[0])
    moved = (values[0] - values[1]).abs().amax(-1) > 1e-6
    assert moved[:4].tolist() == [False, True, True, True]  # the values of tokens 1 and 2 hold token 3, which stands after them


def test_a_conv_that_crosses_chunk_borders_is_caught(scorer_of, monkeypatch):
    leaky = scorer_of("chunks", window=24, stride=24)
    monkeypatch.setattr(fast_weight, "chunk_of", lambda position, chunk: torch.zeros_like(position))  # the conv's border alone; when an update applies is in sessions.py
    findings = audit(leaky, IDS)
    assert failed(findings) == ["distribution"]
    token = int(findings[1].says.split("when token ")[1].split()[0])
    assert token % 4 == 0  # the first token that may read a chunk finds itself in it


def test_an_update_applied_inside_its_own_chunk_is_caught(scorer_of, monkeypatch):
    leaky, visible = scorer_of("chunks", window=24, stride=24), sessions.Writer._visible_share

    def early(self, index, fast, held, new):
        return visible(self, index, fast, held, replace(new, position=new.position + 4))  # as if each token stood a chunk further on

    monkeypatch.setattr(sessions.Writer, "_visible_share", early)
    assert {"causal", "distribution"} <= set(failed(audit(leaky, IDS)))


def test_pieces_of_several_chunks_are_the_same_as_chunk_by_chunk(scorer_of):
    """The parallel form in one pass against a running memory, chunk after chunk."""
    one = scorer_of("chunks", window=24, stride=24)
    by_chunk = InPlace(one.loaded, one.ttt, one.plan, 4)
    first, second = (scoring_audit.trace(scorer, IDS) for scorer in (one, by_chunk))
    assert len(first.log) == 2 and len(second.log) == 2 * 6
    assert scoring_audit.moved(first, second, range(len(IDS)))[0] < 1e-3


def test_probes_stand_at_borders():
    assert scoring_audit.some_probes(10, 99, 4) == list(range(10))
    assert {0, 3, 4, 5, 7, 8, 9} <= set(scoring_audit.some_probes(10, 8, 4)) and len(scoring_audit.some_probes(10, 8, 4)) == 8
    assert len(scoring_audit.some_probes(100, 6, 10)) == 6
