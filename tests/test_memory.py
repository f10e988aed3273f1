"""The memory object: files, rows, sums, sizes and norms, against dense arithmetic done here."""
import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory import LayerMemory, Memory, MemoryFileError, Sharp, unit

D, F = 6, 10


def make(rows=3, slots=4, seed=0, dense=False, layers=(1, 4), dtype=torch.float32, keys_dtype=None):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    held = {i: LayerMemory.factored(draw(rows, slots, F).to(keys_dtype or dtype), draw(rows, slots, D).to(dtype)) for i in layers}
    memory = Memory(held, torch.arange(rows) + slots, torch.arange(rows) + 1, {i: 2.0 + i for i in layers})
    return memory.dense() if dense else memory


def updates(memory):
    """{layer: [B, D, F]} as an explicit sum of outer products."""
    return {i: layer.update if layer.is_dense else torch.einsum("bsd,bsf->bdf", layer.values, layer.keys.to(layer.values.dtype))
            for i, layer in memory.layers.items()}


def assert_updates(memory, expected, atol=1e-5):
    for i, update in updates(memory).items():
        torch.testing.assert_close(update, expected[i], atol=atol, rtol=1e-5)


# ---- files ----

@pytest.mark.parametrize("memory", [make(), make(dense=True), make(keys_dtype=torch.bfloat16), make(dtype=torch.float64), make(rows=1, slots=1)],
                         ids=["factored", "dense", "bfloat16 keys", "float64", "one slot"])
def test_a_saved_memory_comes_back_bit_for_bit(memory, tmp_path):
    memory.save(tmp_path / "m.safetensors")
    loaded = Memory.load(tmp_path / "m.safetensors")
    assert loaded.digest() == memory.digest() and loaded.weight_norms == memory.weight_norms
    for name, tensor in memory.named_tensors().items():
        assert torch.equal(loaded.named_tensors()[name], tensor) and loaded.named_tensors()[name].dtype == tensor.dtype
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors"]  # no temporary file stays


def test_saving_replaces_a_file_whole(tmp_path):
    path = tmp_path / "m.safetensors"
    make(seed=1).save(path)
    make(seed=2).save(path)
    assert Memory.load(path).digest() == make(seed=2).digest()


def test_a_memory_with_gradients_can_be_saved(tmp_path):
    memory = make()
    memory.layers[1].values.requires_grad_(True)
    memory.save(tmp_path / "m")
    assert Memory.load(tmp_path / "m").digest() == memory.digest()


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "gone.safetensors", tmp_path):
        with pytest.raises(MemoryFileError, match=f"^{re.escape(str(path))}: no such memory file"):
            Memory.load(path)


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    make().save(path)
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(MemoryFileError, match=re.escape(str(path))):
            Memory.load(path)


def test_a_flipped_byte_anywhere_is_refused(tmp_path):
    """Every byte of header and content; only a flip that leaves the very same memory may pass."""
    path = tmp_path / "m.safetensors"
    memory = make(rows=1, slots=2, layers=(1,))
    memory.save(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
        try:
            loaded = Memory.load(path)
        except MemoryFileError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert loaded.digest() == memory.digest() and loaded.weight_norms == memory.weight_norms, f"byte {place}"


def test_a_safetensors_file_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file
    save_file({"weight": torch.ones(2)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(MemoryFileError, match="other.safetensors"):
        Memory.load(tmp_path / "other.safetensors")


def test_the_digest_sees_values_counts_shape_and_dtype():
    memory = make()
    changed = [make(seed=9), make(layers=(1, 5)), memory.dense(), memory.scale(1 + 1e-6), make(dtype=torch.float64),
               memory.select([0, 2, 1]), dataclasses.replace(memory, tokens=memory.tokens + 1), dataclasses.replace(memory, chunks=memory.chunks + 1)]
    digests = [m.digest() for m in [memory, *changed]]
    assert len(set(digests)) == len(digests) and make().digest() == digests[0]


# ---- rows ----

@pytest.mark.parametrize("dense", [False, True])
def test_select_takes_rows_in_order_and_again(dense):
    memory = make(dense=dense)
    picked = memory.select([2, 0, 0])
    assert_updates(picked, {i: u[[2, 0, 0]] for i, u in updates(memory).items()}, atol=0)
    assert picked.tokens.tolist() == [6, 4, 4] and picked.chunks.tolist() == [3, 1, 1] and picked.batch == 3
    assert_updates(memory.select(torch.tensor([1])), {i: u[[1]] for i, u in updates(memory).items()}, atol=0)


def test_select_of_a_row_that_does_not_exist():
    with pytest.raises(IndexError):
        make().select([3])


def test_stack_pads_short_memories_and_changes_none():
    parts = [make(rows=1, slots=2, seed=1), make(rows=2, slots=7, seed=2), make(rows=1, slots=1, seed=3)]
    stacked = Memory.stack(parts)
    assert not stacked.layers[1].is_dense and stacked.layers[1].keys.shape == (4, 7, F)
    assert_updates(stacked, {i: torch.cat([updates(p)[i] for p in parts]) for i in (1, 4)}, atol=1e-6)
    assert stacked.tokens.tolist() == [2, 7, 8, 1] and stacked.chunks.tolist() == [1, 1, 2, 1]
    query = torch.randn(4, 5, F, generator=torch.Generator().manual_seed(4))
    alone = torch.cat([p.layers[4].read(q) for p, q in zip(parts, query.split([1, 2, 1]))])
    torch.testing.assert_close(stacked.layers[4].read(query), alone)


def test_stack_of_dense_and_factored_and_the_way_back():
    parts = [make(rows=1, seed=1), make(rows=2, seed=2, dense=True)]
    stacked = Memory.stack(parts)
    assert stacked.layers[1].is_dense
    assert_updates(stacked.select([1, 2]), updates(parts[1]), atol=0)


@pytest.mark.parametrize("left,right", [(False, False), (False, True), (True, True)])
def test_merge_is_the_row_by_row_sum(left, right):
    first, second = make(seed=1, dense=left), make(seed=2, slots=6, dense=right)
    merged = first.merge(second)
    assert_updates(merged, {i: updates(first)[i] + updates(second)[i] for i in (1, 4)})
    assert merged.tokens.tolist() == [10, 12, 14] and merged.chunks.tolist() == [2, 4, 6]
    assert merged.layers[1].is_dense == (left or right)


@pytest.mark.parametrize("dense", [False, True])
def test_merging_unequal_batches_or_layers_is_refused(dense):
    for rows in (1, 2):  # one row would broadcast
        with pytest.raises(ValueError, match=f"3 and {rows} rows"):
            make(dense=dense).merge(make(rows=rows, dense=dense))
    for combine in (Memory.merge, lambda a, b: Memory.stack([a, b])):
        with pytest.raises(ValueError, match=r"\[1, 4\] and \[1, 2\]"):
            combine(make(dense=dense), make(layers=(1, 2), dense=dense))


@pytest.mark.parametrize("dense", [False, True])
def test_scale(dense):
    memory = make(dense=dense)
    assert_updates(memory.scale(-2.5), {i: -2.5 * u for i, u in updates(memory).items()})
    assert memory.scale(0.0).update_norm().tolist() == [0, 0, 0] and memory.scale(0.5).tokens.tolist() == memory.tokens.tolist()


# ---- reading ----

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 12))
def test_k_questions_share_a_row_as_if_it_were_copied(rows, k, length, slots):
    memory = make(rows, slots, seed=rows + 10 * k, layers=(0,), dtype=torch.float64)
    query = torch.randn(rows * k, length, F, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    copied = memory.select([row for row in range(rows) for _ in range(k)])
    expected = torch.stack([q @ u.T for q, u in zip(query, updates(copied)[0])])
    for held in (memory, copied, memory.dense(), copied.dense()):
        torch.testing.assert_close(held.layers[0].read(query), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("slots", [1, 7, 8, 9])
def test_slots_come_in_eights_where_they_are_read_and_read_the_same(slots):
    layer, dense = make(slots=slots).layers[1], make(slots=slots, dense=True).layers[1]
    queries = torch.randn(3, 2, F, generator=torch.Generator().manual_seed(1))
    aligned = layer.aligned()
    assert aligned.values.shape[1] == aligned.keys.shape[1] == (16 if slots > 8 else 8)
    torch.testing.assert_close(aligned.read(queries), layer.read(queries))
    assert dense.aligned() is dense


def test_reading_with_a_batch_that_does_not_divide_is_refused():
    for layer in (make().layers[1], make(dense=True).layers[1]):
        with pytest.raises(ValueError, match="memory of 3 rows cannot serve a batch of 4; use memory.select"):
            layer.read(torch.zeros(4, 1, F))


def test_unit_keys():
    h = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]])
    torch.testing.assert_close(unit(h), torch.tensor([[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]]))
    assert unit(h.bfloat16()).dtype == torch.bfloat16 and unit(h.double()).dtype == torch.float64
    large = torch.full((1, 4), 200.0, dtype=torch.float16)  # its square does not fit the dtype
    torch.testing.assert_close(unit(large), torch.full((1, 4), 0.5, dtype=torch.float16))


# ---- sizes and norms ----

@pytest.mark.parametrize("dense", [False, True])
def test_update_norm_is_the_dense_frobenius_norm_over_the_weights(dense):
    memory = make(dense=dense)
    norms = {i: u.double().pow(2).sum((1, 2)).sqrt() / memory.weight_norms[i] for i, u in updates(memory).items()}
    for i, norm in memory.update_norms().items():
        torch.testing.assert_close(norm.double(), norms[i], rtol=1e-5, atol=0)
    torch.testing.assert_close(memory.update_norm().double(), (norms[1] + norms[4]) / 2, rtol=1e-5, atol=0)


def test_nbytes_counts_what_is_held():
    assert make(keys_dtype=torch.bfloat16).nbytes() == 2 * 3 * 4 * (F * 2 + D * 4)
    assert make(dense=True).nbytes() == 2 * 3 * D * F * 4


def test_a_rows_bytes_are_those_it_has_alone():
    """In a batch a short row has empty slots; they are no part of its memory."""
    memories = [make(rows=1, slots=n, seed=n, keys_dtype=torch.bfloat16) for n in (1, 4, 2)]
    assert Memory.stack(memories).row_nbytes().tolist() == [m.nbytes() for m in memories] == [2 * n * (F * 2 + D * 4) for n in (1, 4, 2)]
    assert make(dense=True).row_nbytes().tolist() == [2 * D * F * 4] * 3 and make().scale(0.0).row_nbytes().tolist() == make(slots=0).row_nbytes().tolist() == [0, 0, 0]


def test_the_smaller_form_is_chosen_at_the_break_even():
    # s (F + D) numbers against F D = 60: three slots are 48, four are 64
    assert not make(slots=3).layers[1].smaller_form().is_dense
    assert make(slots=4).layers[1].smaller_form().is_dense
    assert make(slots=1, dense=True).layers[1].smaller_form().is_dense


@pytest.mark.parametrize("dense", [False, True])
def test_compacting_to_full_rank_changes_nothing(dense):
    memory = make(slots=3, dense=dense)
    for rank in (3, D, 100):  # three slots have rank three
        compacted = memory.compact(rank)
        assert_updates(compacted, updates(memory))
        assert compacted.layers[1].keys.shape == (3, min(rank, D if dense else 3), F) and compacted.tokens.tolist() == memory.tokens.tolist()


@pytest.mark.parametrize("dense", [False, True])
def test_a_compacted_memory_is_read_by_a_model_in_bfloat16(dense):
    memory = make(keys_dtype=torch.bfloat16) if not dense else make(dense=True)._map(lambda layer: layer.map(torch.Tensor.float))
    query = torch.randn(3, 2, F, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    for i, layer in memory.compact(100).layers.items():
        torch.testing.assert_close(layer.read(query).float(), memory.layers[i].read(query).float(), atol=0.1, rtol=0.1)


def test_compacting_to_rank_one_leaves_the_other_singular_values():
    memory = make(slots=5)
    for i, update in updates(memory.compact(1)).items():
        singular = torch.linalg.svdvals(updates(memory)[i])
        error = (updates(memory)[i] - update).flatten(1).norm(dim=1)
        torch.testing.assert_close(error, singular[:, 1:].pow(2).sum(1).sqrt())
        assert (torch.linalg.matrix_rank(update) == 1).all()


@pytest.mark.parametrize("dense", [False, True])
def test_a_memory_in_half_precision_takes_half_the_bytes_and_is_read_in_float32(dense, tmp_path):
    """What it reads is what a float32 memory of the rounded numbers reads, bit for bit, also out of a file; sums of it are float32 again."""
    memory = make(dense=dense)
    half = memory.half()
    rounded = dataclasses.replace(half, layers={i: layer.map(lambda t: t.float()) for i, layer in half.layers.items()})
    half.save(tmp_path / "half.safetensors")
    read_back = Memory.load(tmp_path / "half.safetensors")
    assert torch.equal(2 * half.row_nbytes(), memory.row_nbytes()) and read_back.digest() == half.digest() != rounded.digest()
    for i, layer in read_back.layers.items():
        query = torch.randn(3, 5, F)
        assert layer.read(query).dtype == torch.float32 and torch.equal(layer.read(query), rounded.layers[i].read(query))
        assert not torch.equal(layer.read(query), memory.layers[i].read(query))
    assert torch.equal(half.update_norm(), rounded.update_norm())
    assert half.merge(memory).digest() == rounded.merge(memory).digest()
    assert half.compact(2).layers[1].values.dtype == torch.float32


def test_compacting_to_nothing_is_refused():
    with pytest.raises(ValueError, match="rank is 0"):
        make().compact(0)


def test_a_rows_noise_does_not_depend_on_its_neighbours():
    """A batch makes every row as wide as its longest; the noise of a row must not show how wide that was."""
    memory = make(slots=3)
    wider = Memory({i: layer.padded(7) for i, layer in memory.layers.items()}, memory.tokens, memory.chunks, memory.weight_norms)
    one, other = (m.select([1]).noise_like(torch.Generator().manual_seed(4)) for m in (memory, wider))
    assert_updates(one, updates(other))


@pytest.mark.parametrize("memory", [make(), make(slots=9), make(dense=True), make(keys_dtype=torch.bfloat16)])
def test_noise_has_the_norm_of_every_layer_and_row_and_nothing_else(memory):
    noise = memory.noise_like(torch.Generator().manual_seed(0))
    for i, update in updates(noise).items():
        own = updates(memory)[i].flatten(1)
        torch.testing.assert_close(update.flatten(1).norm(dim=1), own.norm(dim=1), rtol=1e-4, atol=0)
        cosine = torch.nn.functional.cosine_similarity(update.flatten(1), own)
        assert (cosine.abs() < 0.6).all()
    assert noise.tokens.tolist() == memory.tokens.tolist()
    assert noise.digest() == memory.noise_like(torch.Generator().manual_seed(0)).digest()
    assert noise.digest() != memory.noise_like(torch.Generator().manual_seed(1)).digest()


def test_noise_like_an_empty_memory_is_empty():
    assert make().scale(0.0).noise_like(torch.Generator().manual_seed(0)).update_norm().tolist() == [0, 0, 0]


def test_noise_has_no_more_rank_than_was_written():
    noise = updates(make(rows=1, slots=2).noise_like(torch.Generator().manual_seed(0)))  # of two tokens
    assert (torch.linalg.matrix_rank(noise[1], rtol=1e-4) == 2).all()


def test_detach_and_to_keep_everything():
    memory = make()
    memory.layers[1].values.requires_grad_(True)
    for same in (memory.detach(), memory.to("cpu")):
        assert same.digest() == memory.digest() and same.weight_norms == memory.weight_norms
    assert not memory.detach().layers[1].values.requires_grad


# ---- keys that are products of two codes ----

SIZES = (2, 5)  # A * B = F


def coded(rows=3, slots=4, seed=0):
    """A memory whose keys are codes, with trust, as a ridge arm leaves it."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    held = {i: LayerMemory.factored(draw(rows, slots, sum(SIZES)), draw(rows, slots, D), draw(rows, slots, 1).abs(), SIZES) for i in (1, 4)}
    return Memory(held, torch.arange(rows) + slots, torch.arange(rows) + 1, {1: 2.0, 4: 3.0})


def product(codes):
    """The outer product of the two codes, number by number."""
    first, second = codes[..., :SIZES[0]], codes[..., SIZES[0]:]
    return torch.stack([first[..., a] * second[..., b] for a in range(SIZES[0]) for b in range(SIZES[1])], -1)


def test_codes_are_read_summed_cut_and_measured_as_the_update_they_stand_for(monkeypatch):
    memory, queries = coded(), torch.randn(3, 2, sum(SIZES), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for layer in memory.layers.values():
        update = torch.einsum("bsd,bsf->bdf", layer.values, product(layer.keys))
        wanted = product(queries) @ update.transpose(1, 2)
        close = lambda one, two: torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-9)
        close(layer.read(queries), wanted)
        for other, times in ((layer.to_dense(), 1), (layer.compact(6), 1), (layer.plus(layer.compact(6)), 2), (layer.plus(layer), 2),
                             (layer.plus(layer.to_dense()), 2)):
            close(other.read(queries), times * wanted)
        close(layer.to_dense().update, update)
        close(layer.norm(), update.flatten(1).norm(dim=1))
        assert layer.feed_forward == F
        for at_once in (512, 2):
            monkeypatch.setattr("memory.ASKED_AT_ONCE", at_once)
            close(layer.targets(), layer.read(layer.keys) + layer.values / layer.trust)
    close(Memory.stack([memory, memory.compact(3)]).dense().layers[1].update, torch.cat([memory.dense().layers[1].update, memory.compact(3).dense().layers[1].update]))
    torch.testing.assert_close(memory.noise_like(torch.Generator().manual_seed(1)).update_norm(), memory.update_norm())


def test_codes_and_trust_come_back_from_a_file_and_from_rows(tmp_path):
    memory = coded()
    memory.save(tmp_path / "m")
    for back in (Memory.load(tmp_path / "m"), Memory.stack([memory.select([0]), memory.select([1, 2])])):
        assert back.digest() == memory.digest() and all(layer.sizes == SIZES for layer in back.layers.values())
    dense = memory.dense()
    dense.save(tmp_path / "d")
    assert Memory.load(tmp_path / "d").layers[4].sizes == SIZES
    assert all(changed.layers[1].trust is None for changed in (dense, memory.compact(2), memory.merge(memory), memory.scale(2.0)))


def test_a_sharp_memory_is_softmax_attention_over_what_its_slots_were_solved_for():
    memory, queries = coded(), torch.randn(6, 2, sum(SIZES), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    sharp = memory.sharp(Sharp(3.0, 0.5))
    assert sharp.digest() == memory.digest() and torch.equal(sharp.row_nbytes(), memory.row_nbytes()) and torch.equal(sharp.update_norm(), memory.update_norm())
    for i, layer in sharp.layers.items():
        target, query = memory.layers[i].targets(), product(queries).reshape(3, 4, F)
        weight = (3.0 * (query @ product(layer.keys).transpose(1, 2) - 0.5)).exp()
        wanted = (weight / (1 + weight.sum(-1, keepdim=True)) @ target).reshape(6, 2, D)
        for ready in (layer, layer.ready(), layer.ready().ready(), layer.padded(7).ready().aligned()):
            torch.testing.assert_close(ready.read(queries), wanted, atol=1e-5, rtol=1e-5)
    far = memory.sharp(Sharp(60.0, 1e3)).layers[1].read(queries)  # no query meets a slot by so much
    assert not far.any()
    one = memory.sharp(Sharp(1e4, -1e3)).layers[1]
    best = (product(queries).reshape(3, 4, F) @ product(one.keys).transpose(1, 2)).argmax(-1)
    torch.testing.assert_close(one.read(queries).reshape(3, 4, D), memory.layers[1].targets().gather(1, best[..., None].expand(-1, -1, D)), atol=1e-5, rtol=1e-5)
    assert torch.equal(sharp.select([2]).layers[1].read(queries[4:]), sharp.layers[1].read(queries)[4:])
    for lost in (memory.scale(1.0), memory.dense(), memory.half(), memory.compact(2), memory.merge(memory), sharp.half(), make()):
        with pytest.raises(ValueError, match="has lost what its slots were solved for"):
            lost.sharp(Sharp(3.0, 0.5))


def test_what_a_sharp_memory_reads_does_not_hang_on_empty_slots_beside():
    memory, query = coded(), torch.randn(3, 4, sum(SIZES), dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    few = memory._map(lambda layer: layer.where(torch.tensor([[True, True, False, True]] * 3)))
    for how in (Sharp(3.0, 0.5), Sharp(0.1, -2.0)):
        torch.testing.assert_close(few.sharp(how).layers[4].padded(9).read(query), few.sharp(how).layers[4].read(query))


def test_codes_stay_factored_longer_because_they_are_smaller():
    slots = 9  # 9 * (7 + 6) numbers are more than 10 * 6, 4 * (7 + 6) are fewer; at full width 4 * (10 + 6) would be more
    few, many = coded(slots=4).layers[1], coded(slots=slots).layers[1]
    assert many.smaller_form() is many  # it knows its targets, and a dense one would not
    few, many = (dataclasses.replace(layer, trust=None) for layer in (few, many))
    assert not few.smaller_form().is_dense and many.smaller_form().is_dense
    assert LayerMemory.factored(few.full_keys(), few.values).smaller_form().is_dense
