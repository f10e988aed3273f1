"""Writing long texts: what is done in pieces, fused or left out for them gives the memory that the plain way gives."""
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, batch_of, run, tiny, token_rows
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

import decoding
import fast_weight
import sessions
import side_stream
from decoding import write_rows
from fast_weight import fit, solve
from in_place_ttt import InPlaceTTT
from memory import LayerMemory, expand
from model_utils import MODELS, every_sixth, load_model
from objectives import OBJECTIVES
from sessions import Pending, joined
from training_data import Batch, Example

DEEP = dict(chunk=None, codes=True, write_attention=2, read_attention=1, deep=True, blind=True, target="both", unit_targets=True, gate=True, rule="ridge")
PAD = 256
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- the solve ----

@pytest.mark.parametrize("dtype, off", [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize("sizes", [(4, 6), None])
def test_the_solve_is_the_least_of_its_loss_in_the_feed_forward_dimension(dtype, off, sizes):
    """Against dW of the normal equations [F, F], which know nothing of slots: more slots than F numbers, some of no trust."""
    keys = torch.nn.functional.normalize(draw(2, 50, 10 if sizes else 24), dim=-1)
    wanted, trust = draw(2, 50, 8, seed=1), draw(2, 50, seed=2).clamp(min=0) * 20
    full = expand(keys, sizes)
    square = torch.einsum("bs,bsf,bsg->bfg", trust, full, full) + torch.eye(24, dtype=torch.float64)
    right = torch.linalg.solve(square, torch.einsum("bs,bsf,bsd->bfd", trust, full, wanted))
    values = solve(keys.to(dtype), wanted.to(dtype), trust.to(dtype), sizes).double()
    torch.testing.assert_close(full.transpose(1, 2) @ values, right, rtol=0, atol=off * right.abs().max().item())
    assert (values[trust == 0] == 0).all() and (trust == 0).any()


@pytest.mark.parametrize("dtype, off", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("texts", [1, 2, 7])
def test_a_solve_in_parts_is_the_solve_at_once(dtype, off, texts, monkeypatch):
    """texts: so many [S, S] matrices have room at a time, of 4 layers of 3 rows and one of another width."""
    widths = {0: 20, 1: 20, 2: 20, 3: 20, 5: 9}
    asked = {i: LayerMemory.factored(draw(3, s, 10, dtype=dtype, seed=i), draw(3, s, 8, dtype=dtype, seed=i + 9), sizes=(4, 6)) for i, s in widths.items()}
    trust = {i: draw(3, s, dtype=dtype, seed=i + 20).clamp(min=0) for i, s in widths.items()}
    whole, sizes = fit(asked, trust), []
    monkeypatch.setattr(fast_weight, "ROOM", texts * 20 ** 2)
    monkeypatch.setattr(fast_weight, "solve", lambda *how: sizes.append(how[0].shape[:2]) or solve(*how))
    parts = fit(asked, trust)
    assert max(rows for rows, width in sizes if width == 20) <= texts and sum(rows for rows, width in sizes if width == 20) == 12
    for i, values in whole.items():
        torch.testing.assert_close(parts[i], values, atol=off, rtol=off)


@pytest.mark.parametrize("dtype, off", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_texts_of_many_slots_are_solved_for_one_by_one_each_at_its_own_width(dtype, off, monkeypatch):
    """Three texts of 20 columns: all in use with gaps, the first 7 alone, none; and a layer of few, which stays a batch. Gradients reach all keys in use."""
    counts = torch.tensor([20, 7, 0])
    asked = {i: LayerMemory.factored(draw(3, s, 10, dtype=dtype, seed=i), draw(3, s, 8, dtype=dtype, seed=i + 9), sizes=(4, 6)) for i, s in {0: 20, 1: 20, 5: 9}.items()}
    trust = {i: draw(3, layer.keys.shape[1], dtype=dtype, seed=i + 20).abs() * (torch.arange(layer.keys.shape[1]) < counts[:, None]) for i, layer in asked.items()}
    trust[0][0, 3:6] = 0
    together, sizes = fit(asked, trust), []
    monkeypatch.setattr(fast_weight, "WIDE", 10)
    monkeypatch.setattr(fast_weight, "solve", lambda *how: sizes.append(tuple(how[0].shape[:2])) or solve(*how))
    for i, values in fit(asked, trust).items():
        torch.testing.assert_close(values, together[i], atol=off, rtol=off)
    assert sorted(sizes) == sorted([(3, 9), *[(1, 20), (1, 7), (1, 1)] * 2])
    with torch.enable_grad():
        keys = asked[0].keys.clone().requires_grad_()
        fit({0: replace(asked[0], keys=keys)}, {0: trust[0]})[0].square().sum().backward()
    assert torch.equal(keys.grad.abs().sum(-1) > 0, trust[0] > 0)


# ---- the attention ----

@pytest.mark.parametrize("lengths", [(300,), (290, 170, 1), (128, 128)])
def test_the_fused_attention_gathers_what_the_one_by_rows_does(lengths):
    """flex_attention as it is, uncompiled: its bias, its pads and its blocks, with blocks cut off at the end."""
    ttt_config = fast_weight.TTTConfig(layers=(0,), **DEEP | {"write_attention": 4})
    _, mask = batch_of([[0] * n for n in lengths])
    held = Pending(*(None,) * 2, torch.zeros(1), mask.bool(), mask.bool(), (mask.cumsum(1) - 1).clamp(min=0))
    q, k, v = (draw(len(lengths), 4, max(lengths), side_stream.HEAD, dtype=torch.float32, seed=s) for s in range(3))
    whole = side_stream.plain_attention(q, k, v, fast_weight.write_bias(held, ttt_config))
    long = side_stream.LongBias(held.position, held.real, 4, 37, torch.float32, lambda rows: fast_weight.write_bias(held, ttt_config, rows))
    torch.testing.assert_close(long.by_rows(q, k, v), whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(long.fused(flex_attention, q, k, v), whole, atol=1e-6, rtol=1e-5)
    blocks, length = long._for_flex[1], max(lengths)
    pairs = torch.nn.functional.pad(create_mask(blocks.mask_mod, len(lengths), 4, length, length, device="cpu"), (0, -length % side_stream.BLOCK, 0, -length % side_stream.BLOCK))
    pairs = pairs.unflatten(3, (-1, side_stream.BLOCK)).unflatten(2, (-1, side_stream.BLOCK)).transpose(3, 4).flatten(4)
    full = BlockMask.from_kv_blocks(blocks.full_kv_num_blocks, blocks.full_kv_indices, BLOCK_SIZE=side_stream.BLOCK).to_dense().bool()
    assert torch.equal(blocks.to_dense().bool(), pairs.any(-1)) and torch.equal(full, pairs.all(-1))  # uncompiled, the blocks are not looked at


def test_a_row_with_pads_between_its_tokens_has_no_span():
    spans = lambda rows: side_stream.LongBias(None, torch.tensor(rows).bool(), 1, 1, torch.float32, None).spans
    assert [t.tolist() for t in spans([[0, 1, 1, 0], [1, 1, 1, 1]])] == [[1, 0], [3, 4]]
    assert spans([[1, 0, 1, 1], [1, 1, 1, 1]]) is None and spans([[0, 0, 0, 0]]) is None


def test_fused_and_by_rows_are_the_same_memory(attach, monkeypatch):
    """The whole write of a deep arm, every layer through flex_attention."""
    loaded, calls = tiny("tiny-llama", torch.float32), []
    ttt = attach(loaded, layers=(1, 2), **DEEP)
    rows = token_rows((150, 90))
    whole = write_rows(loaded.model, ttt, rows, PAD)[0]
    monkeypatch.setattr(fast_weight, "ROOM", 1000)
    monkeypatch.setattr(side_stream.LongBias, "attention", lambda bias, *qkv: calls.append(1) or bias.fused(flex_attention, *qkv))
    assert_close_memory(write_rows(loaded.model, ttt, rows, PAD)[0], whole)
    assert len(calls) == 2


def assert_close_memory(first, second):
    for i, layer in first.dense().layers.items():
        other = second.dense().layers[i].update
        torch.testing.assert_close(layer.update, other, rtol=0, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("error, again", [(RuntimeError("no compiler\nhere"), "by rows"), (torch.OutOfMemoryError("full"), "raised")])
def test_where_nothing_can_be_compiled_it_is_said_once_and_read_by_rows(error, again, monkeypatch, capsys):
    fused, asked = side_stream.Fused(), []

    class Bias:
        def fused(self, *how):
            asked.append(how)
            raise error

        def by_rows(self, *how):
            return "by rows"

    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: function)
    if again == "raised":
        with pytest.raises(torch.OutOfMemoryError):
            fused(Bias(), 1, 2, 3)
        assert not fused.failed
    else:
        assert fused(Bias(), 1, 2, 3) == again and fused.failed and asked == [(flex_attention, 1, 2, 3)]
        assert capsys.readouterr().err == "the attention over long texts is not compiled, which is slower: no compiler\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled for a GPU")
@pytest.mark.parametrize("length", [300, 4096])
def test_compiled_it_says_what_it_says_by_rows(length):
    mask = torch.ones(1, length, dtype=torch.bool, device="cuda")
    held = Pending(None, None, torch.zeros(1, dtype=torch.bfloat16, device="cuda"), mask, mask, mask.cumsum(1) - 1)
    config = fast_weight.TTTConfig(layers=(0,), **DEEP | {"write_attention": 6})
    q, k, v = (draw(1, 6, length, side_stream.HEAD, dtype=torch.bfloat16, seed=s).cuda() for s in range(3))
    long = side_stream.LongBias(held.position, mask, 6, 100, torch.bfloat16, lambda rows: fast_weight.write_bias(held, config, rows))
    torch.testing.assert_close(long.attention(q, k, v), long.by_rows(q, k, v), atol=2e-2, rtol=2e-2)
    assert not side_stream.FUSED.failed


# ---- the parts of a text ----

def test_parts_are_joined_once_and_what_is_shared_stays_shared():
    source, flags = draw(1, 3, 4), torch.ones(1, 3, dtype=torch.bool)
    part = lambda seed: (lambda x: Pending(source, x, x, flags, flags, flags))(draw(1, 3, 4, seed=seed))
    parts = {1: [part(1), part(2)], 2: [part(3), part(4)]}
    whole = joined(parts)
    for i, some in parts.items():
        assert torch.equal(whole[i].x, torch.cat([p.x for p in some], 1)) and whole[i].h is whole[i].x
    assert whole[1].source is whole[2].source and whole[1].source.shape == (1, 6, 4) and whole[1].real is whole[2].fresh
    assert joined({1: parts[1][:1]})[1].x is parts[1][0].x


def test_a_text_in_many_calls_is_not_copied_with_each(attach, monkeypatch):
    """Of a whole text nothing is joined before its end."""
    loaded, calls = tiny("tiny-llama", torch.float32), []
    ttt = attach(loaded, layers=(1, 2), **DEEP)
    monkeypatch.setattr(decoding, "SEGMENT", 10)
    monkeypatch.setattr(decoding, "FULL", 1)
    monkeypatch.setattr(sessions, "joined", lambda parts: calls.append([len(some) for some in parts.values()]) or joined(parts))
    write_rows(loaded.model, ttt, token_rows((95,)), PAD)
    assert calls == [[10, 10]]


# ---- few slots ----

@pytest.mark.parametrize("slots, inverts", [(1, True), (6, True), (8, True), (9, False), (20, False)])
def test_few_slots_are_solved_for_as_many_are(slots, inverts, monkeypatch):
    """A quarter of the hidden size (32) is few. Both ways give what a plain solve gives; a token without trust gets value 0; training never inverts."""
    generator = torch.Generator().manual_seed(slots)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    keys, wanted, trust = draw(3, slots, 16), draw(3, slots, 32), draw(3, slots).abs() * 5
    trust[0, 0] = 0.0
    called, original = [], torch.linalg.solve_triangular
    monkeypatch.setattr(torch.linalg, "solve_triangular", lambda *a, **kw: called.append(1) or original(*a, **kw))
    found = solve(keys, wanted, trust, None)
    assert bool(called) == inverts
    with torch.enable_grad():
        taught = solve(keys, wanted.clone().requires_grad_(), trust, None).detach()
    assert len(called) == inverts
    root = trust.sqrt()
    square = root[:, :, None] * (keys @ keys.mT) * root[:, None] + torch.eye(slots, dtype=torch.float64)
    expected = torch.linalg.solve(square, wanted * root[..., None]) * root[..., None]
    for values in (found, taught):
        torch.testing.assert_close(values, expected, atol=1e-11, rtol=1e-9)
    assert not found[0, 0].any()


# ---- a text that is dropped ----

@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("form", ["deep", "chunks"])
def test_what_is_dropped_runs_no_layer_above_the_last_and_leaves_the_same_memory(name, form, attach, monkeypatch):
    """Bit for bit, on top of an earlier memory, in several calls; the base is whole again after it."""
    loaded, ran = tiny(name, torch.float32), []
    ttt = attach(loaded, layers=(0, 2), **(DEEP if form == "deep" else dict(chunk=4)))
    monkeypatch.setattr(decoding, "SEGMENT", 30)
    monkeypatch.setattr(decoding, "FULL", 1)
    first, rows = write_rows(loaded.model, ttt, token_rows((9, 5), seed=3), PAD)[0], token_rows((70, 33))
    kept, past = write_rows(loaded.model, ttt, rows, PAD, first)
    layers = list(loaded.model.get_decoder().layers)
    hooks = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(layers)]
    head = loaded.model.get_output_embeddings().register_forward_hook(lambda *_: ran.append("head"))
    products = []
    hooks.append(layers[2].mlp.base.up_proj.register_forward_hook(lambda *_: products.append(1)))
    memory, nothing = write_rows(loaded.model, ttt, rows, PAD, first, dropped=True)
    for hook in (*hooks, head):
        hook.remove()
    assert memory.digest() == kept.digest() and nothing is None and past.mask.shape == (2, 70)
    assert len(products) == (0 if form == "deep" else 3)  # codes are made of x alone, so the last MLP is for nothing
    assert ran == [0, 1, 2] * 3 and list(loaded.model.get_decoder().layers) == layers


def test_an_error_while_a_text_is_dropped_leaves_the_base_whole(attach, monkeypatch):
    loaded = tiny("tiny-llama", torch.float32)
    ttt = attach(loaded, layers=(1,), **DEEP)
    monkeypatch.setattr(decoding, "forward_all", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_rows(loaded.model, ttt, token_rows((9,)), PAD, dropped=True)
    assert len(loaded.model.get_decoder().layers) == 4


# ---- no gradient below the first TTT layer ----

@torch.enable_grad()
@pytest.mark.parametrize("objective", ["recall", "lm"])
def test_nothing_below_the_first_layer_is_kept_for_a_backward_pass(objective):
    """Layers 0 and 1 stand below it: what they give asks for no gradient, what stands above does."""
    loaded, wants = load_model("tiny-qwen3"), []
    row = loaded.row
    config = replace(row.codes, layers=(2, 3)) if objective == "recall" else replace(row.plain, layers=(2, 3), chunk=8)
    ttt = InPlaceTTT(loaded.model, config)
    hooks = [layer.register_forward_hook(lambda module, args, out, i=i: wants.append((i, (out[0] if isinstance(out, tuple) else out).requires_grad)))
             for i, layer in enumerate(loaded.model.get_decoder().layers)]
    text, head, question, answer = token_rows((40, 9, 6, 3))
    batch = Batch([Example(text, head, [(question, answer)])]) if objective == "recall" else [text]
    step = OBJECTIVES[objective](loaded, ttt, batch, torch.device("cpu"))
    step.loss.backward()
    for hook in hooks:
        hook.remove()
    ttt.detach()
    assert wants[-4:] == [(0, False), (1, False), (2, True), (3, True)] and not any(want for _, want in wants[:-4])
    assert all(p.grad is not None for name, p in ttt.named_parameters() if "conv" in name)


def test_large_rows_begin_at_layer_two():
    for name, last in (("qwen3-0.6b", 26), ("qwen3-8b", 32)):
        for form in ("codes", "plain"):
            layers = getattr(MODELS[name], form).layers
            assert layers[0] == 2 and layers[-1] == last and {b - a for a, b in zip(layers, layers[1:])} == {6}
    assert every_sixth(1) == (0,) and every_sixth(2) == (1,) and every_sixth(4) == (2,)


# ---- asking a deep arm ----

def test_a_deep_arm_asks_and_takes_by_its_formulas(family, attach):
    """Stream, query and gate share one product; here each is made by itself, as side_stream.py and fast_weight.py write them."""
    ttt = attach(family, layers=(1, 2), **DEEP | {"read_gate": True, "threshold": True, "read_attention": 2})
    memory = write_rows(family.model, ttt, token_rows((19, 13)), PAD)[0]
    ids, mask = batch_of(token_rows((7, 5), seed=4))
    given, gave = {}, {}
    hooks = [family.model.get_decoder().layers[i].mlp.register_forward_hook(lambda module, args, out, i=i: given.update({i: args[0]}) or gave.update({i: out})) for i in (1, 2)]
    embedded = family.model.get_input_embeddings().register_forward_hook(lambda module, args, out: given.update(embedded=out))
    with ttt.read(memory, watch_BL=mask.bool()) as reader:
        reader.expect(mask)
        run(family.model, ids, mask)
    for hook in (*hooks, embedded):
        hook.remove()
    place, unit_rms = mask.cumsum(1), side_stream.unit_rms
    seen = (mask[:, None, :].bool() & torch.ones(ids.shape[1], ids.shape[1]).tril().bool()) | torch.eye(ids.shape[1]).bool()
    bias = side_stream.distance_bias(place, place, seen, 2, torch.float64)
    stream = unit_rms(given["embedded"]) @ ttt.streams["read"].start
    for i in (1, 2):
        fast, block, x = ttt.fast[str(i)], ttt.streams["read"].blocks[str(i)], unit_rms(given[i])
        stream = stream + x @ block.inject
        gathered = side_stream.plain_attention(*side_stream.split_heads(unit_rms(stream) @ block.attend, torch.float64), bias)
        stream = stream + gathered.transpose(1, 2).flatten(2)
        stream = stream + torch.nn.functional.gelu(unit_rms(stream) @ block.up) @ block.down
        first, second = (torch.cat([x, unit_rms(stream)], -1) @ fast.query_code + fast.query_bias).split(fast.sizes, -1)
        query = torch.cat([first / first.norm(dim=-1, keepdim=True), second / second.norm(dim=-1, keepdim=True)], -1)
        torch.testing.assert_close(reader.queries[i], query[mask.bool()], atol=1e-9, rtol=1e-9)
        met = expand(query, fast.sizes) @ memory.layers[i].to_dense().update.transpose(1, 2)
        strength = met.norm(dim=-1) / (met.shape[-1] ** 0.5 * fast_weight.EMBED_SHARE * fast.value_unit)
        share = torch.sigmoid(x @ fast.open + fast.open_bias + fast.open_met * strength.clamp(min=1e-3).log())
        took = gave[i] - family.model.get_decoder().layers[i].mlp.base(given[i])
        torch.testing.assert_close(took[mask.bool()], (met * share.unsqueeze(-1))[mask.bool()], atol=1e-9, rtol=1e-7)
        assert took.abs().max() > 1e-3
