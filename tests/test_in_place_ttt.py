"""The mechanism against the formula it claims, on tiny random models of every family."""
import copy
import dataclasses
import itertools

import pytest
import torch
from conftest import FAMILIES, assert_same_memory, batch_of, run, strengthen, tiny, token_rows, write_once
from hypothesis import given, settings
from hypothesis import strategies as st

import decoding
import fast_weight
from decoding import prefill, write_rows
from fast_weight import EMBED_SHARE, code_sizes
from in_place_ttt import FastWeight, InPlaceTTT, TTTConfig, TTTMLP
from memory import Memory, expand, meets, tensors_digest
from sessions import Pending

PAD = 256
LENGTHS = (19, 13, 4)


@pytest.fixture(autouse=True)
def no_gradients():
    """The tests about gradients turn them on again."""
    with torch.no_grad():
        yield


# ---- off is off ----

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_off_equals_the_untouched_model_bit_for_bit(name, dtype, attach):
    loaded = tiny(name, dtype)
    ids, mask = batch_of(token_rows(LENGTHS))
    mlps = [layer.mlp for layer in loaded.model.get_decoder().layers]
    before, digest = run(loaded.model, ids, mask), tensors_digest(dict(loaded.model.named_parameters()))
    ttt = attach(loaded)
    assert torch.equal(run(loaded.model, ids, mask), before)
    written, memory = write_once(loaded.model, ttt, ids, mask)
    with ttt.read(memory):
        read = run(loaded.model, ids, mask)
    assert not torch.equal(written, before) and not torch.equal(read, before)  # the mechanism was really there
    assert torch.equal(run(loaded.model, ids, mask), before)
    ttt.detach()
    assert [layer.mlp for layer in loaded.model.get_decoder().layers] == mlps
    assert torch.equal(run(loaded.model, ids, mask), before)
    assert tensors_digest(dict(loaded.model.named_parameters())) == digest


@pytest.mark.parametrize("chunk", [1, 5, None])
def test_an_untrained_paper_adapter_changes_nothing(family, chunk):
    ids, mask = batch_of(token_rows(LENGTHS))
    before = run(family.model, ids, mask)
    ttt = InPlaceTTT(family.model, TTTConfig((0, 1, 2, 3), chunk, init="paper", gate=True, unit_keys=True)).double()
    try:
        written, memory = write_once(family.model, ttt, ids, mask)
        with ttt.read(memory):
            read = run(family.model, ids, mask)
    finally:
        ttt.detach()
    assert torch.equal(written, before) and torch.equal(read, before)
    assert memory.update_norm().tolist() == [0, 0, 0] and memory.tokens.tolist() == list(LENGTHS)


def test_the_paper_init_is_zero_conv_and_a_sparse_small_diagonal():
    fast = FastWeight(512, 64, TTTConfig((0,), 8), torch.Generator().manual_seed(0))
    diagonal = fast.proj.diagonal()
    assert fast.conv.abs().max() == 0 and torch.equal(fast.proj, torch.diag(diagonal))
    assert diagonal.std().item() == pytest.approx(0.02, rel=0.1)


# ---- the formula, in plain loops over what the base's own modules saw ----

class Spy:
    """Inputs x and h of one wrapped MLP, and its output, taken by hooks on the base's modules."""

    def __init__(self, mlp):
        keep = lambda name: lambda module, inputs, output: setattr(self, name, (inputs[0], output))
        self.hooks = [mlp.base.gate_proj.register_forward_hook(keep("up")), mlp.base.down_proj.register_forward_hook(keep("down")),
                      mlp.register_forward_hook(keep("mlp"))]

    x = property(lambda self: self.up[0])
    h = property(lambda self: self.down[0])
    base_output = property(lambda self: self.down[1])
    output = property(lambda self: self.mlp[1])

    def remove(self):
        for hook in self.hooks:
            hook.remove()


def at_unit_rms(config, x_LD):
    return torch.stack([x / (x @ x / len(x)).sqrt() for x in x_LD]) if config.unit_targets else x_LD


def plain_heads(q, k, v, both_ways):
    """Softmax attention by distance, head by head and token by token; every second head looks back only where not both ways."""
    slopes = [0.1 ** (2 * head / max(1, len(q) - 1)) for head in range(len(q))]
    gathered = []
    for i in range(q.shape[1]):
        parts = []
        for head, slope in enumerate(slopes):
            seen = [j for j in range(q.shape[1]) if j <= i or both_ways or head % 2 == 0]
            scores = torch.stack([q[head, i] @ k[head, j] / 32 ** 0.5 - slope * abs(i - j) for j in seen])
            parts.append(scores.softmax(0) @ v[head, seen])
        gathered.append(torch.cat(parts))
    return gathered


def plain_around(fast, config, x_LD, name, stream=None):
    """What the write attention gathers beside each token of one chunk."""
    if not config.write_attention or name == "query":
        return [x_LD.new_zeros(0)] * len(x_LD)
    if config.deep:
        return list(stream)
    return plain_heads(*(x_LD @ fast.key_attend).reshape(len(x_LD), 3, config.write_attention, 32).permute(1, 2, 0, 3), both_ways=True)


def plain_stream(ttt, source_LD, x_by_layer):
    """{layer: what the write stream says of each token of a row}, the blocks in order of depth."""
    stream, norm = ttt.streams["write"], lambda s_LZ: torch.stack([s / (s @ s / len(s)).sqrt() for s in s_LZ])
    s_LZ, said = at_unit_rms(ttt.config, source_LD) @ stream.start, {}
    for i in sorted(x_by_layer):
        block = stream.blocks[str(i)]
        s_LZ = s_LZ + at_unit_rms(ttt.config, x_by_layer[i]) @ block.inject
        q, k, v = (norm(s_LZ) @ block.attend).reshape(len(s_LZ), 3, ttt.config.write_attention, 32).permute(1, 2, 0, 3)
        s_LZ = s_LZ + torch.stack(plain_heads(q, k, v, both_ways=False))
        s_LZ = s_LZ + torch.nn.functional.gelu(norm(s_LZ) @ block.up) @ block.down
        said[i] = norm(s_LZ)
    return said


def plain_proj(fast, config, name):
    proj = getattr(fast, name)
    return torch.diag(proj) + getattr(fast, name + "_in") @ getattr(fast, name + "_out") if config.value_rank else proj


def plain_features(fast, config, x_LD, h_LF, name, stream=None):
    """Keys or queries of one chunk, token by token."""
    if config.codes:
        x_LD = at_unit_rms(config, x_LD)
        mapped = [getattr(fast, f"{name}_code").T @ torch.cat([x, z]) + getattr(fast, f"{name}_bias")
                  for x, z in zip(x_LD, plain_around(fast, config, x_LD, name, stream))]
        first, _ = fast.sizes
        return [torch.outer(m[:first] / m[:first].norm(), m[first:] / m[first:].norm()).flatten() for m in mapped]
    if config.key_map:
        mapped = [(getattr(fast, f"{name}_up").T @ (getattr(fast, f"{name}_in").T @ x)).clamp(min=0) ** 2 for x in at_unit_rms(config, x_LD)]
        return [z / z.norm() for z in mapped]
    return [h / h.norm() if config.unit_keys else h for h in h_LF]


def plain_chunk(fast, config, source_CD, x_CD, weight_DF, stream=None):
    """(what each token says, how strongly) of one chunk, token by token, tap by tap."""
    contents, strengths = [], []
    unit = weight_DF.norm() / weight_DF.numel() ** 0.5 if config.unit_targets else 1.0
    unit = fast.value_unit if config.calibrated else unit
    source_CD, x_CD = at_unit_rms(config, source_CD), at_unit_rms(config, x_CD)

    def taps(t_CD, conv, i):
        near = [(k, i + k - config.kernel // 2) for k in range(config.kernel)]
        return sum((conv[:, k] * t_CD[j] for k, j in near if 0 <= j < len(t_CD)), torch.zeros_like(t_CD[0]))

    for i, around in enumerate(plain_around(fast, config, x_CD, "key", stream)):
        content = taps(source_CD, fast.conv, i) @ plain_proj(fast, config, "proj")
        if config.target == "both":
            content = content + taps(x_CD, fast.conv_x, i) @ plain_proj(fast, config, "proj_x")
        gate = 1.0
        if config.gate:
            gate = 1 / (1 + torch.exp(-(torch.cat([x_CD[i], around]) @ fast.gate + fast.gate_bias)))
            stretched = (gate - config.shut_below) / (11 / 12 - config.shut_below)
            gate = min(max(stretched, gate.new_zeros(1)), gate.new_ones(1)) if config.sparse else 2 * gate
        contents.append(unit * content)
        strengths.append(config.eta * gate)
    return contents, strengths


def plain_ridge(fast, keys, contents, strengths):
    """dW [D, F] by least squares on the tokens and, as further rows, on the wish for a small dW."""
    root = torch.tensor([float(s) for s in strengths], dtype=keys[0].dtype).sqrt()[:, None]
    small = (torch.exp(10 * fast.log_ridge) ** 0.5) * torch.eye(len(keys[0]), dtype=keys[0].dtype)
    left = torch.cat([root * torch.stack(keys), small])
    right = torch.cat([root * torch.stack(contents), torch.zeros(len(small), len(contents[0]), dtype=keys[0].dtype)])
    return torch.linalg.lstsq(left, right, driver="gelsd").solution.T


def plain_taken(fast, config, x_LD, met):
    """Token by token, what is taken of what is read."""
    if not config.read_gate:
        return met
    taken = []
    for x, m in zip(at_unit_rms(config, x_LD), met):
        logit = x @ fast.open + fast.open_bias
        if config.threshold:
            logit = logit + fast.open_met * torch.log(((m @ m / len(m)).sqrt() / (0.1 * fast.value_unit)).clamp(min=1e-3))
        taken.append(m / (1 + torch.exp(-logit)))
    return taken


def plain_row(fast, config, source_LD, x_LD, h_LF, weight_DF, stream=None):
    """(share of the output [L, D], final update [D, F]) of one row without pads."""
    update, shares = torch.zeros(source_LD.shape[1], h_LF.shape[1], dtype=source_LD.dtype), []
    size = config.chunk or len(h_LF)
    for start in range(0, len(h_LF), size):
        part = slice(start, min(start + size, len(h_LF)))
        keys = plain_features(fast, config, x_LD[part], h_LF[part], "key", stream)
        # a deep arm is blind: nothing is read while it writes
        queries = None if config.deep else plain_features(fast, config, x_LD[part], h_LF[part], "query")
        shares += [torch.zeros_like(source_LD[0])] * len(keys) if config.deep else plain_taken(fast, config, x_LD[part], [update @ query for query in queries])
        contents, strengths = plain_chunk(fast, config, source_LD[part], x_LD[part], weight_DF, stream)
        if config.rule == "ridge":
            update = update + plain_ridge(fast, keys, contents, strengths)
            continue
        for key, content, strength in zip(keys, contents, strengths):
            update = update + torch.outer(strength * content, key)
    return torch.stack(shares), update


OPTIONS = [dict(chunk=1), dict(chunk=5), dict(chunk=None, unit_keys=True), dict(chunk=64, gate=True),
           dict(chunk=4, unit_keys=True, gate=True, eta=0.3), dict(chunk=3, target="input_embed"),
           dict(chunk=None, target="input_embed", gate=True), dict(chunk=7, kernel=1), dict(chunk=6, kernel=9),
           dict(chunk=None, rule="ridge", unit_keys=True, gate=True), dict(chunk=4, key_map=3, gate=True),
           dict(chunk=None, rule="ridge", ridge=2.0, key_map=5, unit_targets=True, gate=True, eta=5.0, target="input_embed"),
           dict(chunk=5, unit_targets=True, gate=True, eta=3.0),
           dict(chunk=None, codes=True, write_attention=2, unit_targets=True, gate=True, sparse=True, target="both", blind=True),
           dict(chunk=6, codes=True, write_attention=3, gate=True, sparse=True, read_gate=True, target="both", unit_targets=True, threshold=True),
           dict(chunk=None, codes=True, write_attention=3, read_attention=2, deep=True, blind=True, unit_targets=True, gate=True, rule="ridge",
                target="both", value_rank=2),
           dict(chunk=5, unit_targets=True, target="both", value_rank=3),
           dict(chunk=None, codes=True, write_attention=1, unit_targets=True, calibrated=True, gate=True, sparse=True, rule="ridge", shut_below=0.4), dict(chunk=None, unit_targets=True, target="input_embed")]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_and_memory_follow_the_formula(family, options, attach):
    ttt = attach(family, layers=(0, 1, 3), **options)
    rows = token_rows(LENGTHS)
    ids, mask = batch_of(rows)
    spies = {i: Spy(family.model.get_decoder().layers[i].mlp) for i in ttt.config.layers}
    _, memory = write_once(family.model, ttt, ids, mask)
    embedded = family.model.get_input_embeddings()(ids)
    streams = [plain_stream(ttt, embedded[b, mask[b].bool()], {i: spy.x[b, mask[b].bool()] for i, spy in spies.items()})
               if ttt.config.deep else {} for b in range(len(rows))]
    for i, spy in spies.items():
        spy.remove()
        source = spy.x if ttt.config.target == "hidden_states" else embedded  # with both, x is beside it
        for b in range(len(rows)):
            real = mask[b].bool()
            share, update = plain_row(ttt.fast[str(i)], ttt.config, source[b, real], spy.x[b, real], spy.h[b, real],
                                      ttt.down_proj(i).weight, streams[b].get(i))
            torch.testing.assert_close(spy.output[b, real] - spy.base_output[b, real], share, atol=1e-12, rtol=1e-9)
            torch.testing.assert_close(memory.layers[i].to_dense().update[b], update, atol=1e-12, rtol=1e-9)
        assert memory.layers[i].norm().max() > 1e-3  # there was something to get wrong


def test_reading_adds_exactly_the_update_times_the_key(family, attach):
    ttt = attach(family, unit_keys=True, gate=True, chunk=None)
    ids, mask = batch_of(token_rows(LENGTHS))
    _, memory = write_once(family.model, ttt, ids, mask)
    spies = {i: Spy(family.model.get_decoder().layers[i].mlp) for i in ttt.config.layers}
    question, ones = batch_of(token_rows((6, 6, 6), seed=3))
    with ttt.read(memory):
        run(family.model, question, ones)
    for i, spy in spies.items():
        spy.remove()
        keys = spy.h / spy.h.norm(dim=-1, keepdim=True)
        share = torch.einsum("blf,bdf->bld", keys, memory.layers[i].to_dense().update)
        torch.testing.assert_close(spy.output, spy.base_output + share, atol=1e-12, rtol=1e-9)


def held(x, mask):
    """Tokens as a writer holds them; h does not matter to values."""
    return Pending(x, x, torch.zeros(*x.shape[:2], 12, dtype=x.dtype), mask, mask, (mask.cumsum(1) - 1).clamp(min=0))


def values_of(fast, x, mask):
    return fast.contents(held(x, mask)) * fast.slots(held(x, mask)).weights[..., None]


def test_unit_targets_make_the_size_of_the_update_a_matter_of_the_base_alone():
    """The same text through activations 50 times larger and a W_down 30 times larger: the same share of W_down is written."""
    x = torch.randn(1, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 6, dtype=torch.bool)
    values = {}
    for size, unit in ((1, 0.2), (50, 0.2), (50, 6.0)):
        fast = FastWeight(8, 12, TTTConfig((0,), 4, gate=True, unit_targets=True), torch.Generator(), unit).double()
        generator = torch.Generator().manual_seed(2)
        for parameter in fast.parameters():
            parameter.data.normal_(generator=generator)
        values[size, unit] = values_of(fast, size * x, mask)
    torch.testing.assert_close(values[50, 0.2], values[1, 0.2], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(values[50, 6.0], 30 * values[1, 0.2], rtol=1e-9, atol=1e-12)
    assert values[1, 0.2].norm() > 1e-3


def test_ridge_answers_with_what_was_written_and_a_second_text_adds_only_what_is_new(llama, attach):
    """With a small lambda every written key reads back its own content; writing the same text again then changes nothing."""
    ttt = attach(llama, layers=(1,), chunk=None, rule="ridge", key_map=6, gate=True)
    fast = ttt.fast["1"]
    fast.log_ridge.data.fill_(-2.5)  # lambda e^-25
    ids, mask = batch_of(token_rows((12,)))
    spy = Spy(llama.model.get_decoder().layers[1].mlp)
    _, memory = write_once(llama.model, ttt, ids, mask)
    spy.remove()
    written = Pending(spy.x, spy.x, spy.h, mask.bool(), mask.bool(), mask.cumsum(1) - 1)
    content = fast.contents(written)
    torch.testing.assert_close(memory.layers[1].read(fast.slots(written).keys), content, atol=1e-6, rtol=1e-6)
    assert content.norm() > 1e-2
    again = write_once(llama.model, ttt, ids, mask, memory=memory)[1]
    # the memory is read while the same text is written, but below the only TTT layer nothing changes, so its x is the same
    torch.testing.assert_close(again.layers[1].to_dense().update, memory.layers[1].to_dense().update, atol=1e-5, rtol=1e-5)
    assert again.tokens.tolist() == [24]


@pytest.mark.parametrize("changes", [dict(key_map=6), dict(codes=True, write_attention=2, sparse=True, unit_targets=True, target="both")], ids=str)
def test_the_order_of_texts_does_not_matter_to_a_blind_ridge_memory(family, attach, changes):
    """A, then B on top; B, then A on top; both side by side in one solve: the same update. The sequential form agrees."""
    ttt = attach(family, layers=(1, 2), chunk=None, rule="ridge", gate=True, blind=True, **changes)
    first, second = token_rows((11, 5)), token_rows((7, 9), seed=4)
    updates = {}
    for name, (one, two) in {"forth": (first, second), "back": (second, first)}.items():
        memory = write_once(family.model, ttt, *batch_of(one))[1]
        after = write_once(family.model, ttt, *batch_of(two), memory=memory)[1]
        updates[name] = after.dense()
        updates[name + " sequential"] = write_once(family.model, ttt, *batch_of(two), memory=memory, form="sequential")[1]
    with torch.no_grad(), ttt.write() as writer:
        ids, mask = batch_of([row for pair in zip(first, second) for row in pair])
        writer.expect(mask)
        run(family.model, ids, mask)
    updates["side by side"] = writer.memory(2).dense()
    for name, memory in updates.items():
        for i, layer in memory.layers.items():
            torch.testing.assert_close(layer.update, updates["forth"].layers[i].update, atol=1e-9, rtol=1e-7, msg=f"{name}, layer {i}")
    assert updates["forth"].update_norm().min() > 1e-3


def test_a_row_that_is_gone_on_from_does_not_depend_on_its_neighbours(llama, attach):
    """A long neighbour pads the row's slots; what is known of its targets must not be lost by that."""
    ttt = attach(llama, layers=(1,), chunk=None, rule="ridge", gate=True, blind=True, codes=True)
    first, long, second = token_rows((9,))[0], token_rows((80,), seed=5)[0], token_rows((7, 6), seed=6)
    updates = []
    for rows, more in (([first], second[:1]), ([first, long], second)):
        memory = write_once(llama.model, ttt, *batch_of(rows))[1]
        after = write_once(llama.model, ttt, *batch_of(more), memory=memory)[1]
        updates.append(after.layers[1].to_dense().update[0])
    torch.testing.assert_close(updates[0], updates[1], atol=1e-9, rtol=1e-7)
    assert updates[0].norm() > 1e-3


def test_a_summed_or_dense_ridge_memory_is_gone_on_from_by_what_it_does_not_answer(llama, attach):
    ttt = attach(llama, layers=(1,), chunk=None, rule="ridge", key_map=6, gate=True, blind=True)
    ids, mask = batch_of(token_rows((9,)))
    memory = write_once(llama.model, ttt, *batch_of(token_rows((11,), seed=4)))[1]
    for known in (memory.dense(), memory.merge(memory.scale(0)), memory.compact(11)):
        assert known.layers[1].trust is None
        again = write_once(llama.model, ttt, ids, mask, memory=known)[1]
        sequential = write_once(llama.model, ttt, ids, mask, memory=known, form="sequential")[1]
        torch.testing.assert_close(again.layers[1].to_dense().update, sequential.layers[1].update, atol=1e-9, rtol=1e-7)


def test_writing_accumulates_in_float32_under_a_bfloat16_base(attach):
    loaded = tiny("tiny-llama", torch.bfloat16)
    ttt = attach(loaded, layers=(1,), chunk=None, gate=True)
    ids, mask = batch_of([[65] * 700, [66] * 700])  # equal tokens: a bfloat16 sum stops growing after a few hundred
    spy = Spy(loaded.model.get_decoder().layers[1].mlp)
    _, memory = write_once(loaded.model, ttt, ids, mask)
    spy.remove()
    _, update = plain_row(copy.deepcopy(ttt.fast["1"]).double(), ttt.config, spy.x[0].double(), spy.x[0].double(), spy.h[0].double(),
                          ttt.down_proj(1).weight.double())
    assert memory.layers[1].to_dense().update.dtype == torch.float32
    torch.testing.assert_close(memory.layers[1].to_dense().update[0].double(), update, atol=1e-5 * update.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_clipped_chunk_changes_a_layer_by_the_limit_and_a_small_one_as_ever(llama, attach, differentiable):
    ttt, (ids, mask) = attach(llama, layers=(1,), chunk=5), batch_of(token_rows((20,)))

    def written(clip, tokens):
        ttt.clip(clip)
        return write_once(llama.model, ttt, ids[:, :tokens], mask[:, :tokens], differentiable=differentiable)[1]

    update = lambda clip: written(clip, 5).layers[1].to_dense().update
    free, norm = update(None), ttt.down_norms[1]
    assert free.norm() > 2e-3 * norm
    torch.testing.assert_close(update(1e-3), free * (1e-3 * norm / free.norm()))
    torch.testing.assert_close(update(1e3), free, atol=0, rtol=0)
    assert 1e-3 < written(1e-3, 20).update_norm().item() <= 4.001e-3
    with pytest.raises(ValueError, match="above 0"):
        ttt.clip(0.0)


# ---- two forms, any shape ----

OPTION_SETS = st.fixed_dictionaries({
    "chunk": st.one_of(st.none(), st.integers(1, 30)), "target": st.sampled_from(["hidden_states", "input_embed", "both"]),
    "rule": st.sampled_from(["hebbian", "ridge"]), "key_map": st.sampled_from([0, 3]),
    "unit_keys": st.booleans(), "unit_targets": st.booleans(), "gate": st.booleans(), "kernel": st.sampled_from([1, 3, 5]),
    "codes": st.booleans(), "write_attention": st.sampled_from([0, 2]), "sparse": st.booleans(), "read_gate": st.booleans(),
    "threshold": st.booleans(), "value_rank": st.sampled_from([0, 2]), "deep": st.booleans(), "clip": st.sampled_from([None, 0.003])
}).map(lambda options: possible(options))


def possible(options):
    """The drawn options without combinations that a config refuses."""
    options = options | {"chunk": None} if options["rule"] == "ridge" else options
    options = options | ({"key_map": 0} if options["codes"] else {"write_attention": 0})
    deep = options["deep"] and options["codes"] and options["write_attention"] and options["target"] != "hidden_states"
    options = options | ({"read_attention": 2, "blind": True, "chunk": None} if deep else {"deep": False})
    options = options | {"threshold": options["threshold"] and options["read_gate"] and options["unit_targets"]}
    options = options if options["gate"] else options | {"sparse": False}
    return options | {"clip": None} if options["chunk"] is None or options["sparse"] else options


def both_forms(loaded, options, lengths, layout, layers=(0, 2)):
    ttt = strengthen(InPlaceTTT(loaded.model, TTTConfig(layers, **options)).double())
    try:
        ids, mask = batch_of(token_rows(lengths, seed=sum(lengths)), layout)
        parallel = write_once(loaded.model, ttt, ids, mask)
        sequential = write_once(loaded.model, ttt, ids, mask, form="sequential")
    finally:
        ttt.detach()
    real = mask.bool()
    torch.testing.assert_close(parallel[0][real], sequential[0][real], atol=1e-9, rtol=1e-9)
    assert_same_memory(parallel[1], sequential[1], atol=1e-10)


@settings(max_examples=50, deadline=None)
@given(OPTION_SETS, st.lists(st.integers(1, 26), min_size=1, max_size=3), st.sampled_from(["left", "right", "holes"]))
def test_parallel_equals_sequential(options, lengths, layout):
    both_forms(tiny("tiny-llama"), options, lengths, layout)


@pytest.mark.parametrize("layout", ["left", "right"])
@pytest.mark.parametrize("chunk", [1, 4, 19, 50, None])
def test_parallel_equals_sequential_in_every_family(family, chunk, layout):
    both_forms(family, dict(chunk=chunk, unit_keys=True, gate=True), LENGTHS, layout, layers=(0, 1, 2, 3))


@settings(max_examples=25, deadline=None)
@given(OPTION_SETS, st.lists(st.integers(1, 26), min_size=2, max_size=4), st.sampled_from(["left", "right", "holes"]))
def test_pads_never_write_and_never_shift_a_border(options, lengths, layout):
    loaded = tiny("tiny-llama")
    ttt = strengthen(InPlaceTTT(loaded.model, TTTConfig((0, 2), **options)).double())
    try:
        rows = token_rows(lengths)
        ids, mask = batch_of(rows, layout)
        logits, memory = write_once(loaded.model, ttt, ids, mask)
        alone = [write_once(loaded.model, ttt, *batch_of([row])) for row in rows]
    finally:
        ttt.detach()
    assert_same_memory(memory, Memory.stack([m for _, m in alone]), atol=1e-10)
    for b, (own, _) in enumerate(alone):
        torch.testing.assert_close(logits[b, mask[b].bool()], own[0], atol=1e-9, rtol=1e-9)


def test_what_stands_in_the_pads_does_not_matter(family, attach):
    ttt = attach(family, gate=True)
    ids, mask = batch_of(token_rows(LENGTHS))
    other = torch.where(mask.bool(), ids, 7)
    (first, memory), (second, same) = (write_once(family.model, ttt, i, mask) for i in (ids, other))
    assert not torch.equal(ids, other)
    torch.testing.assert_close(first[mask.bool()], second[mask.bool()], atol=1e-12, rtol=0)
    assert_same_memory(memory, same)


def test_a_neighbour_does_not_matter(family, attach):
    ttt = attach(family, gate=True)
    rows = token_rows(LENGTHS)
    memories = [write_once(family.model, ttt, *batch_of([rows[0], other]))[1] for other in (rows[1], token_rows((30,), seed=9)[0])]
    assert_same_memory(*(m.select([0]) for m in memories))
    difference = memories[0].layers[0].to_dense().update[1] - memories[1].layers[0].to_dense().update[1]
    assert difference.norm() > 1e-3


# ---- chunks ----

@pytest.mark.parametrize("chunk", [1, 6, 18])
def test_apply_then_update(family, chunk, attach):
    """The first chunk reads an untouched model, and no chunk depends on a later one."""
    ids, mask = batch_of(token_rows((19, 19)))
    before = run(family.model, ids, mask)
    ttt = attach(family, chunk=chunk)
    logits, _ = write_once(family.model, ttt, ids, mask)
    assert torch.equal(logits[:, :chunk], before[:, :chunk])
    assert not torch.allclose(logits[:, chunk:], before[:, chunk:], atol=1e-4)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 250
    again, _ = write_once(family.model, ttt, changed, mask)
    torch.testing.assert_close(again[:, :-1], logits[:, :-1], atol=1e-12, rtol=0)  # the conv looks ahead, the output does not


def test_a_text_of_one_chunk_is_read_by_the_base_alone(family, attach):
    ids, mask = batch_of(token_rows(LENGTHS))
    before = run(family.model, ids, mask)
    for chunk in (None, 19, 100):
        ttt = attach(family, chunk=chunk)
        logits, memory = write_once(family.model, ttt, ids, mask)
        ttt.detach()
        assert torch.equal(logits, before) and (memory.update_norm() > 0.001).all()
        assert memory.chunks.tolist() == [1, 1, 1]


@pytest.mark.parametrize("chunk,reaches_over", [(4, False), (8, True), (None, True)])
def test_the_conv_never_crosses_a_chunk_border(chunk, reaches_over):
    fast = FastWeight(8, 12, TTTConfig((0,), chunk, gate=True), torch.Generator()).double()
    fast.conv.data.normal_(generator=torch.Generator().manual_seed(0))
    fast.proj.data.copy_(torch.eye(8))
    x = torch.randn(1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 8, dtype=torch.bool)
    before = values_of(fast, x, mask)
    x[:, 4] += 1.0  # the first token of the second chunk of four
    changed = ((values_of(fast, x, mask) - before).abs().amax((0, 2)) > 1e-9).tolist()
    assert changed == [False, False, reaches_over, reaches_over, True, True, True, False]


def test_pads_have_no_value_and_do_not_part_their_neighbours():
    fast = FastWeight(8, 12, TTTConfig((0,), None, init="shift", gate=True), torch.Generator()).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[False, True, True, False, False, True]])
    value = values_of(fast, x, mask)
    assert value[~mask].abs().max() == 0
    torch.testing.assert_close(value[0, [1, 2]], 0.1 * x[0, [2, 5]])  # shift: each token writes the next token's state
    assert value[0, 5].abs().max() == 0


def test_counts_of_tokens_and_chunks(llama, attach):
    ids, mask = batch_of(token_rows((12, 9, 8, 1)))
    for chunk, chunks in ((1, [12, 9, 8, 1]), (4, [3, 3, 2, 1]), (12, [1, 1, 1, 1]), (None, [1, 1, 1, 1])):
        ttt = attach(llama, chunk=chunk)
        memory = write_once(llama.model, ttt, ids, mask)[1]
        ttt.detach()
        assert memory.tokens.tolist() == [12, 9, 8, 1] and memory.chunks.tolist() == chunks


# ---- several calls ----

@pytest.mark.parametrize("options", [dict(chunk=None), dict(chunk=4), dict(chunk=1), dict(chunk=64), dict(chunk=10, target="input_embed"),
                                     dict(chunk=None, target="input_embed", unit_keys=True, gate=True),
                                     dict(chunk=None, rule="ridge", key_map=4, unit_targets=True, gate=True)], ids=str)
@pytest.mark.parametrize("segment", [1, 3, 16])
def test_writing_in_segments_equals_one_call(family, options, segment, attach, monkeypatch):
    ttt = attach(family, layers=(0, 2, 3), **options)
    rows = token_rows(LENGTHS)
    whole, past = write_rows(family.model, ttt, rows, PAD)
    question = token_rows((5, 5, 5), seed=4)
    logits, _ = prefill(family.model, question, PAD, past)
    monkeypatch.setattr(decoding, "SEGMENT", segment)
    parts, past = write_rows(family.model, ttt, rows, PAD)
    assert_same_memory(whole, parts, atol=1e-10)
    torch.testing.assert_close(prefill(family.model, question, PAD, past)[0], logits, atol=1e-9, rtol=0)


@settings(max_examples=15, deadline=None)
@given(OPTION_SETS, st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 99))
def test_any_split_into_calls_with_any_pads(options, widths, seed):
    """Pads anywhere in any call: what is written is what the row's real tokens alone would write."""
    loaded = tiny("tiny-llama")
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 2, (3, sum(widths)), generator=generator)
    mask[:, -1] = 1
    x = torch.randn(3, sum(widths), 32, generator=generator, dtype=torch.float64)
    ttt = strengthen(InPlaceTTT(loaded.model, TTTConfig((0,), **options)).double())
    try:
        split = write_layer(loaded, ttt, x, mask, widths)
        alone = [write_layer(loaded, ttt, x[b:b + 1, mask[b].bool()], torch.ones(1, int(mask[b].sum())), None) for b in range(3)]
    finally:
        ttt.detach()
    assert_same_memory(split[1], Memory.stack([m for _, m in alone]))
    for b, (output, _) in enumerate(alone):
        torch.testing.assert_close(split[0][b, mask[b].bool()], output[0], atol=1e-12, rtol=1e-9)


def write_layer(loaded, ttt, x_BLD, mask, widths):
    """Outputs and memory of the first layer's MLP alone, fed x in calls of the given widths."""
    outputs, start = [], 0
    with ttt.write() as writer:
        for width in widths or [x_BLD.shape[1]]:
            part = x_BLD[:, start:start + width]
            writer.expect(mask[:, start:start + width])
            writer.on_embeddings(None, None, part)
            outputs.append(loaded.model.get_decoder().layers[0].mlp(part))
            start += width
    return torch.cat(outputs, 1), writer.memory()


def test_a_long_text_turns_dense_and_says_the_same(llama, attach, monkeypatch):
    ttt = attach(llama, chunk=8)
    rows = token_rows((60, 41))
    short = write_rows(llama.model, ttt, token_rows((9,)), PAD)[0]
    monkeypatch.setattr(decoding, "SEGMENT", 11)
    memory, _ = write_rows(llama.model, ttt, rows, PAD)
    _, oracle = write_once(llama.model, ttt, *batch_of(rows), form="sequential")
    assert not short.layers[0].is_dense and memory.layers[0].is_dense
    assert memory.nbytes() == 3 * 2 * 32 * 64 * 8
    assert_same_memory(memory, oracle, atol=1e-10)


CODES = dict(chunk=None, codes=True, write_attention=2, unit_targets=True, gate=True, sparse=True, target="both", blind=True)


@pytest.mark.parametrize("rule", ["hebbian", "ridge"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3"])
def test_a_token_without_strength_leaves_no_slot_and_is_not_missed(name, rule, attach):
    """The pruned memory is smaller than the text, in training too, and is the same update as the sequential form's, which keeps all."""
    family = tiny(name)
    ttt = attach(family, rule=rule, **CODES)
    for fast in ttt.fast.values():
        fast.gate.mul_(8)  # some tokens shut, some wide open
    ids, mask = batch_of(token_rows(LENGTHS))
    whole = write_once(family.model, ttt, ids, mask, form="sequential")[1]
    for differentiable in (False, True):
        kept = write_once(family.model, ttt, ids, mask, differentiable=differentiable)[1]
        assert max(layer.keys.shape[1] for layer in kept.layers.values()) < max(LENGTHS)
        assert_same_memory(kept, whole, atol=1e-10)


def test_a_text_of_which_nothing_is_worth_writing_leaves_an_empty_memory(llama, attach):
    ttt = attach(llama, rule="ridge", **CODES)
    for fast in ttt.fast.values():
        fast.gate_bias.fill_(-50.0)
    ids, mask = batch_of(token_rows(LENGTHS))
    _, memory = write_once(llama.model, ttt, ids, mask)
    before = run(llama.model, ids, mask)
    with ttt.read(memory):
        assert torch.equal(run(llama.model, ids, mask), before)
    assert memory.update_norm().tolist() == [0, 0, 0] and memory.tokens.tolist() == list(LENGTHS)


def test_rows_written_side_by_side_are_the_sum_of_their_memories(family, attach):
    ttt = attach(family, **CODES)
    ids, mask = batch_of(token_rows((9, 6, 11, 4)))
    with ttt.write(differentiable=True) as writer:
        writer.expect(mask)
        run(family.model, ids, mask)
    together = writer.memory(group=2)
    _, alone = write_once(family.model, ttt, ids, mask)
    assert_same_memory(together, alone.select([0, 2]).merge(alone.select([1, 3])), atol=1e-10)


def test_ridge_side_by_side_answers_with_what_either_row_wrote(llama, attach):
    ttt = attach(llama, layers=(1,), rule="ridge", **CODES)
    fast = ttt.fast["1"]
    fast.log_ridge.data.fill_(-2.5)  # lambda e^-25
    fast.gate_bias.fill_(50.0)
    ids, mask = batch_of(token_rows((9, 9)))
    spy = Spy(llama.model.get_decoder().layers[1].mlp)
    with ttt.write(differentiable=True) as writer:
        writer.expect(mask)
        run(llama.model, ids, mask)
    spy.remove()
    embedded = llama.model.get_input_embeddings()(ids)
    written = Pending(embedded, spy.x, spy.h, mask.bool(), mask.bool(), mask.cumsum(1) - 1)
    contents = fast.contents(written)
    read = writer.memory(group=2).layers[1].read(fast.slots(written).keys)  # both rows ask the one memory
    torch.testing.assert_close(read, contents, atol=1e-6, rtol=1e-6)
    assert contents.norm() > 1e-2


def test_side_by_side_is_for_fresh_texts_of_one_chunk(llama, attach):
    ttt = attach(llama, chunk=4)
    ids, mask = batch_of(token_rows((9, 6)))
    with ttt.write() as writer:
        writer.expect(mask)
        run(llama.model, ids, mask)
    with pytest.raises(RuntimeError, match="side by side"):
        writer.memory(group=2)


def test_a_key_meets_a_query_where_both_codes_do(llama, attach):
    """q k is the product of the two codes' cosines: a stranger in one of them is a stranger."""
    fast = attach(llama, layers=(1,), chunk=None, codes=True, blind=True).fast["1"]
    x = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    first, second = (x @ fast.key_code + fast.key_bias).split(fast.sizes, -1)
    cosine = torch.nn.functional.cosine_similarity
    codes = fast.key(x, x.new_zeros(2, 64))
    key = expand(codes, fast.sizes)
    assert codes.shape == (2, 16) and key.shape == (2, 64) and fast.sizes == (8, 8)
    torch.testing.assert_close(key[0] @ key[1], meets(codes[None, :1], codes[None, 1:], fast.sizes)[0, 0, 0])
    torch.testing.assert_close(key[0] @ key[1], cosine(first[0], first[1], dim=0) * cosine(second[0], second[1], dim=0))
    torch.testing.assert_close(key.norm(dim=1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("feed_forward, sizes", [(1536, (32, 48)), (4864, (64, 76)), (2048, (32, 64)), (12288, (96, 128)), (64, (8, 8)), (7, (1, 7))])
def test_code_sizes_make_up_the_feed_forward_size(feed_forward, sizes):
    assert code_sizes(feed_forward) == sizes


def test_calibration_measures_the_residual_stream_and_centres_the_codes(family):
    ttt = InPlaceTTT(family.model, TTTConfig((0, 2), None, codes=True, unit_targets=True, calibrated=True, blind=True)).double()
    ids, mask = batch_of(token_rows((30,)))
    try:
        ttt.calibrate(family.model, ids)
        states = family.model.get_decoder()(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        for i in (0, 2):
            spy = Spy(family.model.get_decoder().layers[i].mlp)
            run(family.model, ids, mask)
            spy.remove()
            fast, rms = ttt.fast[str(i)], states[i + 1][0, 1:].pow(2).mean(-1).sqrt()
            norm = getattr(family.model.get_decoder().layers[i], "post_feedforward_layernorm", None)
            gain = 1.0 if norm is None else (norm(spy.output).pow(2).mean(-1) / spy.output.pow(2).mean(-1)).sqrt()[0, 1:].median().item()
            assert fast.value_unit.item() == pytest.approx(rms.median().item() / gain, rel=1e-6) and "value_unit" in fast.state_dict()
            codes = fast.scaled(spy.x[0, 1:]) @ fast.key_code + fast.key_bias
            assert codes.mean(0).abs().max() < 1e-6 < codes.abs().max()
    finally:
        ttt.detach()


def test_a_calibrated_write_starts_at_the_same_share_of_every_bases_stream(family):
    """What is added to the MLP's output at that size reaches the residual stream as that share, whatever norm stands between."""
    ttt = InPlaceTTT(family.model, TTTConfig((2,), None, codes=True, unit_targets=True, calibrated=True, blind=True)).double()
    ids, _ = batch_of(token_rows((30,)))
    generator = torch.Generator().manual_seed(0)
    states = lambda: family.model.get_decoder()(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[3][0, 1:]
    layer = family.model.get_decoder().layers[2]
    try:
        for size in (1.0, 30.0):
            with torch.no_grad():
                family.model.get_input_embeddings().weight.mul_(size)
            ttt.calibrate(family.model, ids)
            before = states()
            added = EMBED_SHARE * ttt.fast["2"].value_unit * torch.randn(before.shape[1], generator=generator, dtype=torch.float64)
            hook = layer.mlp.register_forward_hook(lambda module, args, out: out + added)
            moved = (states() - before).pow(2).mean(-1).sqrt() / before.pow(2).mean(-1).sqrt()
            hook.remove()
            with torch.no_grad():
                family.model.get_input_embeddings().weight.div_(size)
            assert 0.3 * EMBED_SHARE < moved.median() < 2 * EMBED_SHARE, size
    finally:
        ttt.detach()


def test_what_a_question_looks_back_at_is_announced(llama, attach):
    ttt = attach(llama, chunk=None, codes=True, read_attention=1, blind=True)
    ids, mask = batch_of(token_rows((9, 6)))
    _, memory = write_once(llama.model, ttt, ids, mask)
    with pytest.raises(RuntimeError, match="expect"), ttt.read(memory):
        run(llama.model, ids, mask)
    with pytest.raises(RuntimeError, match="expect"), ttt.read(memory) as reader:
        reader.expect(mask[:, :-1])
        run(llama.model, ids, mask)


# ---- on top of an earlier memory ----

def test_a_blind_arm_reads_a_text_without_the_earlier_memory(family, attach):
    ttt = attach(family, rule="ridge", read_attention=1, **CODES)
    first, second = token_rows((9, 9)), token_rows((11, 6), seed=5)
    ids, mask = batch_of(second)
    before = run(family.model, ids, mask)
    earlier = write_rows(family.model, ttt, first, PAD)[0]
    logits, later = write_once(family.model, ttt, ids, mask, memory=earlier)
    assert torch.equal(logits, before) and later.tokens.tolist() == [20, 15]
    assert all((later.layers[i].norm() > 0).all() and later.layers[i].keys.shape[1] > earlier.layers[i].keys.shape[1] for i in later.layers)


def test_writing_on_top_of_a_zeroed_memory_is_writing_afresh(family, attach):
    ttt = attach(family, chunk=4, gate=True)
    first, second = token_rows((9, 9)), token_rows((11, 6), seed=5)
    earlier = write_rows(family.model, ttt, first, PAD)[0]
    fresh = write_rows(family.model, ttt, second, PAD)[0]
    on_zero = write_rows(family.model, ttt, second, PAD, memory=earlier.scale(0.0))[0]
    for i in fresh.layers:
        torch.testing.assert_close(on_zero.layers[i].to_dense().update, fresh.layers[i].to_dense().update, atol=1e-12, rtol=0)
    assert on_zero.tokens.tolist() == [20, 15] and on_zero.chunks.tolist() == [3 + 3, 3 + 2]


@pytest.mark.parametrize("chunk", [None, 4])
def test_the_earlier_memory_is_applied_and_kept(family, chunk, attach):
    ttt = attach(family, layers=(1, 3), chunk=chunk, unit_keys=True)
    first, second = token_rows((9, 9)), token_rows((11, 6), seed=5)
    earlier = write_rows(family.model, ttt, first, PAD)[0]
    ids, mask = batch_of(second)
    logits, both = write_once(family.model, ttt, ids, mask, memory=earlier)
    oracle_logits, oracle = write_once(family.model, ttt, ids, mask, memory=earlier, form="sequential")
    torch.testing.assert_close(logits[mask.bool()], oracle_logits[mask.bool()], atol=1e-9, rtol=0)
    assert_same_memory(both, oracle, atol=1e-10)
    with ttt.read(earlier):
        reading = run(family.model, ids, mask)
    opening = slice(None) if chunk is None else slice(0, chunk)
    torch.testing.assert_close(logits[0, opening], reading[0, opening], atol=1e-9, rtol=0)  # before its first own chunk ends
    if chunk is None:  # below the lowest TTT layer nothing has changed, so there the two texts simply add up
        summed = earlier.merge(write_once(family.model, ttt, ids, mask)[1]).layers[1].to_dense().update
        torch.testing.assert_close(both.layers[1].to_dense().update, summed, atol=1e-12, rtol=0)


def test_earlier_memory_and_segments_together(llama, attach, monkeypatch):
    ttt = attach(llama, chunk=5)
    earlier = write_rows(llama.model, ttt, token_rows((9, 9)), PAD)[0]
    rows = token_rows((23, 12), seed=5)
    whole = write_rows(llama.model, ttt, rows, PAD, memory=earlier)[0]
    monkeypatch.setattr(decoding, "SEGMENT", 6)
    assert_same_memory(write_rows(llama.model, ttt, rows, PAD, memory=earlier)[0], whole, atol=1e-10)


# ---- reading ----

@pytest.mark.parametrize("options", [dict(chunk=4), CODES | dict(read_attention=1, deep=True, rule="ridge")], ids=["plain", "deep"])
@pytest.mark.parametrize("form", ["slots", "dense", "half"])
def test_a_bfloat16_base_reads_values_in_bfloat16_and_a_float32_one_as_they_are(options, form, attach):
    rows, question = token_rows((12, 9)), token_rows((6, 6), seed=2)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = tiny("tiny-qwen3", dtype)
        ttt = attach(loaded, layers=(1, 2), **options)
        memory = write_rows(loaded.model, ttt, rows, PAD)[0]
        memory = memory.dense() if form == "dense" else memory.half() if form == "half" else memory
        with ttt.read(memory) as reader:
            logits, _ = prefill(loaded.model, question, PAD, session=reader)
            kept = [layer.update if form == "dense" else layer.values for layer in reader._layers.values()]
            assert {t.dtype for t in kept} == {dtype}
            if "codes" in options and form != "dense":
                assert {layer.keys.dtype for layer in reader._layers.values()} == {torch.float32}
        wide = {index: layer.ready() for index, layer in memory.layers.items()}
        with ttt.read(memory) as reader:
            reader._layers, reader.dtype = wide, torch.float32
            exact, _ = prefill(loaded.model, question, PAD, session=reader)
        off, _ = prefill(loaded.model, question, PAD)
        moved, rounding = (exact - off).abs().max().item(), (logits - exact).abs().max().item()
        assert moved > 1e-2 and (rounding == 0 if dtype == torch.float32 else rounding <= 0.05 * max(moved, exact.abs().max().item())), (moved, rounding)
        with torch.enable_grad(), ttt.read(memory) as reader:
            assert reader.dtype == torch.float32  # as in training
        ttt.detach()


@pytest.mark.parametrize("name, dense", [*((name, False) for name in FAMILIES), ("tiny-llama", True)])  # a dense update knows of no family
def test_reading_200_tokens_never_writes(name, dense, attach, monkeypatch):
    family = tiny(name)
    monkeypatch.setattr(decoding, "stop_ids", lambda tokenizer, line: frozenset())
    ttt = attach(family, chunk=4, unit_keys=True)
    memory = write_rows(family.model, ttt, token_rows((12, 7)), PAD)[0]
    memory = memory.dense() if dense else memory
    digest, adapter = memory.digest(), tensors_digest(ttt.fast.state_dict())
    base = tensors_digest(dict(family.model.named_parameters()))
    calls = []
    hook = family.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with ttt.read(memory):
        logits, past = prefill(family.model, token_rows((5, 3), seed=2), PAD)
        decoding.greedy(family.model, family.tokenizer, logits, past, 200)
    hook.remove()
    assert len(calls) == 1 + 199  # it did run that long
    assert memory.digest() == digest and tensors_digest(ttt.fast.state_dict()) == adapter
    assert tensors_digest(dict(family.model.named_parameters())) == base


def test_factored_and_dense_read_the_same(family, attach):
    ttt = attach(family, unit_keys=True, chunk=4)
    memory = write_rows(family.model, ttt, token_rows((12, 7)), PAD)[0]
    ids, mask = batch_of(token_rows((6, 6, 6, 6), seed=2))  # two questions a row
    outputs = []
    for form in (memory, memory.dense()):
        with ttt.read(form):
            outputs.append(run(family.model, ids, mask))
    assert not memory.layers[0].is_dense
    torch.testing.assert_close(*outputs, atol=1e-10, rtol=0)


# ---- gradients ----

def recall_loss(loaded, ttt, rows, questions, through):
    """A loss of answers read from what was written; through: "no_grad" as in training, or "grad" all the way."""
    ids, mask = batch_of(rows)
    with torch.set_grad_enabled(through == "grad"), ttt.write(differentiable=True) as writer:
        writer.expect(mask)
        run(loaded.model, ids, mask)
    with ttt.read(writer.memory()) as reader:
        reader.expect(batch_of(questions)[1])
        logits = run(loaded.model, *batch_of(questions))
    return torch.nn.functional.cross_entropy(logits[:, -1], torch.tensor([3, 7]))


CODED = dict(chunk=None, codes=True, write_attention=2, read_attention=1, unit_targets=True, gate=True, target="both", blind=True, read_gate=True)
LEARNT = [(name, *how) for name in FAMILIES for how in (
    (dict(chunk=None, rule="ridge", key_map=4, unit_targets=True, gate=True), "no_grad"), (dict(chunk=None, unit_keys=True, gate=True), "no_grad"),
    (dict(chunk=4, gate=True), "grad"), (dict(chunk=None, target="input_embed"), "no_grad"))]
# codes and side streams, with many tensors each, on the two families that differ most: their own arithmetic knows of none
LEARNT += [(name, CODED | more, "no_grad") for name in ("tiny-llama", "tiny-gemma3") for more in (dict(sparse=True), dict(deep=True, threshold=True, value_rank=2))]


@torch.enable_grad()
@pytest.mark.parametrize("name,options,through", LEARNT, ids=str)
def test_gradients_reach_the_adapter_and_only_the_adapter(name, options, through, attach):
    family = tiny(name)
    ttt = attach(family, layers=(1, 2), **options)
    rows, questions = token_rows((9, 6)), token_rows((4, 4), seed=2)
    recall_loss(family, ttt, rows, questions, through).backward()
    assert all(p.grad is None and not p.requires_grad for name, p in family.model.named_parameters())
    for name, parameter in ttt.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name
        index = int(parameter.grad.abs().argmax())  # the steepest entry, against a finite difference
        flat, step, losses = parameter.data.view(-1), 1e-5, []
        original = flat[index].item()
        for sign in (1, -1):
            flat[index] = original + sign * step
            losses.append(recall_loss(family, ttt, rows, questions, through).item())
        flat[index] = original
        assert parameter.grad.view(-1)[index].item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-4), name


@torch.enable_grad()
def test_gradients_through_several_calls_equal_those_of_one(llama, attach):
    ttt = attach(llama, layers=(1, 2), chunk=None, gate=True)
    ids, _ = batch_of(token_rows((12, 12)))
    x = llama.model.get_input_embeddings()(ids).detach()
    gradients = []
    for widths in ([12], [5, 4, 3]):
        with torch.no_grad(), ttt.write(differentiable=True) as writer:
            for part in x.split(widths, 1):
                writer.expect(torch.ones(part.shape[:2]))
                for i in ttt.config.layers:
                    llama.model.get_decoder().layers[i].mlp(part)
        loss = sum(layer.to_dense().update.pow(2).sum() for layer in writer.memory().layers.values())
        gradients.append(torch.autograd.grad(loss, list(ttt.fast.parameters())))
    for one, several in zip(*gradients):
        torch.testing.assert_close(one, several, atol=1e-10, rtol=1e-9)


def test_without_differentiable_nothing_is_kept_for_gradients(llama, attach):
    ttt = attach(llama)
    with torch.enable_grad():
        memory = write_once(llama.model, ttt, *batch_of(token_rows((5,))))[1].detach()
    assert all(not t.requires_grad for layer in memory.layers.values() for t in layer.tensors().values())


# ---- misuse ----

@pytest.mark.parametrize("changes,named", [
    (dict(rule="delta"), "rule is 'delta'"), (dict(rule="ridge"), "the chunk must be 'whole'"), (dict(ridge=0.0), "ridge is 0.0"),
    (dict(key_map=-1), "key_map is -1"), (dict(layers=()), "layers is empty"), (dict(layers=(1, 1)), "twice"), (dict(chunk=0), "chunk is 0"), (dict(chunk=-3), "chunk is -3"),
    (dict(kernel=4), "kernel is 4"), (dict(kernel=0), "kernel is 0"), (dict(target="logits"), "target is 'logits'"), (dict(init="zeros"), "init is 'zeros'"),
    (dict(clip=0.0), "clip is 0.0"), (dict(clip=0.1, chunk=None), "needs a chunk")])
def test_bad_settings_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        TTTConfig(**({"layers": (0,), "chunk": 4} | changes))


@pytest.mark.parametrize("layers", [(4,), (-1,), (0, 36)])
def test_a_layer_out_of_range_is_refused_and_nothing_is_wrapped(family, layers):
    with pytest.raises(ValueError, match=r"layer (4|-1|36) is out of range.*0 to 3"):
        InPlaceTTT(family.model, TTTConfig(layers, 4))
    assert not any(isinstance(module, TTTMLP) for module in family.model.modules())


def test_a_second_adapter_on_the_same_layer_is_refused(llama, attach):
    attach(llama, layers=(1,))
    with pytest.raises(ValueError, match="layer 1 already carries"):
        InPlaceTTT(llama.model, TTTConfig((0, 1), 4))
    assert not isinstance(llama.model.get_decoder().layers[0].mlp, TTTMLP)


def test_an_ungated_mlp_is_refused(llama):
    layer = llama.model.get_decoder().layers[2]
    gated, layer.mlp = layer.mlp, torch.nn.Linear(32, 32)
    try:
        with pytest.raises(ValueError, match="layer 2 has an MLP without gate_proj, up_proj, down_proj, act_fn"):
            InPlaceTTT(llama.model, TTTConfig((1, 2), 4))
        assert not isinstance(llama.model.get_decoder().layers[1].mlp, TTTMLP)
    finally:
        layer.mlp = gated


def test_modes_do_not_nest_and_end_with_their_context(llama, attach):
    ttt = attach(llama, target="input_embed")
    ids, mask = batch_of(token_rows((5,)))
    memory = write_once(llama.model, ttt, ids, mask)[1]
    for outer, inner in itertools.product((ttt.write, lambda: ttt.read(memory)), repeat=2):
        with outer():
            with pytest.raises(RuntimeError, match="do not nest"):
                with inner():
                    pass
    before = run(llama.model, ids, mask)
    with pytest.raises(KeyError), ttt.write():
        raise KeyError("something went wrong while writing")
    assert ttt.session is None and not llama.model.get_input_embeddings()._forward_hooks
    assert torch.equal(run(llama.model, ids, mask), before)


def test_a_call_that_was_not_announced_is_refused(llama, attach):
    ttt = attach(llama)
    ids, mask = batch_of(token_rows((5, 5)))
    with pytest.raises(RuntimeError, match="expect"), ttt.write():
        run(llama.model, ids, mask)
    with pytest.raises(RuntimeError, match="announced"), ttt.write() as writer:
        writer.expect(mask[:, :4])
        run(llama.model, ids, mask)


def test_a_second_call_without_its_own_expect_is_refused(llama, attach):
    """Else its tokens would be written under the first call's positions and not be counted."""
    ttt = attach(llama)
    ids, mask = batch_of(token_rows((5, 5)))
    with pytest.raises(RuntimeError, match="expect"), ttt.write() as writer:
        writer.expect(mask)
        run(llama.model, ids, mask)
        run(llama.model, ids, mask)


def test_a_memory_of_nothing_is_refused(llama, attach):
    ttt = attach(llama)
    with ttt.write() as writer:
        pass
    with pytest.raises(RuntimeError, match="nothing was written"):
        writer.memory()
    with ttt.write() as writer:
        writer.expect(torch.ones(1, 5))
    with pytest.raises(RuntimeError, match="nothing was written"):
        writer.memory()


def test_an_unknown_form_and_a_second_sequential_call_are_refused(llama, attach):
    ttt = attach(llama)
    ids, mask = batch_of(token_rows((5,)))
    with pytest.raises(ValueError, match="backwards"):
        ttt.write(form="backwards")
    with pytest.raises(RuntimeError, match="one forward call"), ttt.write(form="sequential") as writer:
        writer.expect(mask)
        run(llama.model, ids, mask)
        writer.expect(mask)


def test_a_memory_of_other_layers_is_refused(llama, attach):
    ttt = attach(llama, layers=(0, 2))
    memory = write_once(llama.model, ttt, *batch_of(token_rows((5,))))[1]
    other = dataclasses.replace(memory, layers={i: memory.layers[0] for i in (0, 1)})
    with pytest.raises(ValueError, match=r"\[0, 1\].*\[0, 2\]"):
        ttt.read(other)
    with pytest.raises(ValueError, match=r"\[0, 1\].*\[0, 2\]"):
        ttt.write(other)


def test_a_memory_of_another_batch_is_refused(llama, attach):
    ttt = attach(llama)
    memory = write_once(llama.model, ttt, *batch_of(token_rows((5, 5, 5))))[1]
    ids, mask = batch_of(token_rows((5, 5)))
    with pytest.raises(ValueError, match="memory of 3 rows cannot serve a batch of 2"), ttt.read(memory):
        run(llama.model, ids, mask)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_writing_on_a_memory_of_another_batch_is_refused(llama, attach, rows, dense):
    """A dense memory of one row would broadcast in silence."""
    ttt = attach(llama)
    memory = write_once(llama.model, ttt, *batch_of(token_rows((5,) * rows)))[1]
    with pytest.raises(ValueError, match=f"memory of {rows} rows"):
        write_once(llama.model, ttt, *batch_of(token_rows((5, 5))), memory=memory.dense() if dense else memory)


@pytest.mark.parametrize("at_once", [1, 7])
def test_a_long_texts_write_attention_is_made_by_rows_and_is_the_same(family, attach, monkeypatch, at_once):
    ttt = attach(family, layers=(1, 2), chunk=None, codes=True, write_attention=2, read_attention=1, deep=True, blind=True, target="both",
                 unit_targets=True, gate=True, rule="ridge")
    ids, mask = batch_of(token_rows(LENGTHS))
    whole = write_once(family.model, ttt, ids, mask)[1]
    seen = []
    write_bias = fast_weight.write_bias
    monkeypatch.setattr(fast_weight, "write_bias", lambda held, config, rows=slice(None): seen.append(write_bias(held, config, rows)) or seen[-1])
    monkeypatch.setattr(fast_weight, "ROOM", at_once * len(LENGTHS) * ttt.config.write_attention * ids.shape[1])
    by_rows = write_once(family.model, ttt, ids, mask)[1]
    assert len(seen) == 2 * -(-ids.shape[1] // at_once) and max(bias.shape[2] for bias in seen) == at_once
    for i, layer in whole.dense().layers.items():
        torch.testing.assert_close(by_rows.dense().layers[i].update, layer.update)
    assert max(layer.update.abs().max() for layer in whole.dense().layers.values()) > 0
