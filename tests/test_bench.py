"""bench.py on a tiny model: what is timed does what it says; the times themselves are nobody's business here."""
import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import bench_train
from bench_whole import public_seconds
from in_place_ttt import InPlaceTTT, TTTConfig
from manifests import UserError, run_script
from decoding import prefill, write_rows
from model_utils import load_model
from objectives import lm_step
from operations import pairs
from public_way import CHUNK, TRAINED, PublicWay
from test_run_experiment import small_benchmark

SMALL = bench.Sizes(probes=4, conversations=2, writes=((2, 70), (1, 150)), public_text=100, batches=(1, 2), compiled=(), lengths=(20, 40), ranks=(4,), solves=((3, 20),), long=(120, 10 ** 6), square=64, limit=1, rounds=2)


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny-qwen3")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*more) -> (exit code, report or None, stdout, stderr) of bench.py with small sizes."""
    small_benchmark(tmp_path / "benchmark.json")

    def call(*more):
        monkeypatch.setattr(bench, "SIZES", {"cpu": SMALL})
        monkeypatch.setattr(sys, "argv", ["bench.py", "--model", "tiny-qwen3", "--device", "cpu", "--out", str(tmp_path), "--benchmark", str(tmp_path / "benchmark.json"), *more])
        try:
            run_script(bench.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        file = tmp_path / "tiny-qwen3-cpu.json"
        return code, json.loads(file.read_text(encoding="utf-8")) if file.exists() else None, *capsys.readouterr()

    return call


def moved(public, loaded):
    """dW of each layer of the public way."""
    return {i: mlp.weight - loaded.model.get_decoder().layers[i].mlp.down_proj.weight for i, mlp in public.mlps.items()}


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, 2 * CHUNK + 22])
def test_the_public_way_writes_what_ours_writes(tiny, length):
    """The yardstick does the same arithmetic, chunk by chunk in the plain form; it is only slow."""
    public, ids = PublicWay(tiny.model, (1, 2)), torch.randint(0, 250, (1, length), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    for mlp in public.mlps.values():
        mlp.conv.data = torch.randn(mlp.conv.shape, generator=generator)
        mlp.proj.data = 0.1 * torch.randn(mlp.proj.shape, generator=generator)
    plain = dict(tiny.model.get_decoder().layers[1].mlp.named_parameters())
    public.ingest(ids)
    wrote = moved(public, tiny)
    ttt = InPlaceTTT(tiny.model, TTTConfig(layers=(1, 2), chunk=CHUNK))
    try:
        for i, mlp in public.mlps.items():
            ttt.fast[str(i)].conv.data, ttt.fast[str(i)].proj.data = mlp.conv.data[:, 0], mlp.proj.data
        memory, _ = write_rows(tiny.model, ttt, ids.tolist(), 0)
        for i, layer in memory.dense().layers.items():
            torch.testing.assert_close(wrote[i], layer.update[0].detach(), rtol=1e-4, atol=1e-6)
    finally:
        ttt.detach()
    assert dict(tiny.model.get_decoder().layers[1].mlp.named_parameters()).keys() == plain.keys()


def test_the_public_way_answers_with_its_memory_and_leaves_the_base_alone(tiny):
    public, ids = PublicWay(tiny.model, (1, 2)), torch.arange(40)[None]
    before = tiny.model(input_ids=ids).logits
    alone = public.answer(ids, 8)
    for mlp in public.mlps.values():
        mlp.conv.data += 1.0
        mlp.proj.data *= 500.0
    public.ingest(torch.arange(200)[None])
    assert alone.shape == (1, 48) and not torch.equal(public.answer(ids, 8), alone)
    assert torch.equal(tiny.model(input_ids=ids).logits, before) and not tiny.model.training


def test_a_public_training_step_has_the_gradient_of_its_parameters(tiny):
    """Checkpointed layers run twice; the second time must not write on top of the first. Ours has the same gradient."""
    public, ids, grads = PublicWay(tiny.model, (1, 2)), torch.randint(0, 250, (1, 150), generator=torch.Generator().manual_seed(2)), {}
    for i, mlp in public.mlps.items():
        mlp.conv.data += 0.3
        mlp.conv.register_hook(lambda grad, i=i: grads.__setitem__(i, grad[:, 0].clone()))
    public.train_step(ids)
    ttt = InPlaceTTT(tiny.model, TTTConfig(layers=(1, 2), chunk=CHUNK))
    try:
        for i, mlp in public.mlps.items():
            ttt.fast[str(i)].conv.data, ttt.fast[str(i)].proj.data = mlp.conv.data[:, 0].clone(), mlp.proj.data.clone()
        lm_step(tiny, ttt, ids.tolist(), torch.device("cpu")).loss.backward()
        for i, grad in grads.items():
            torch.testing.assert_close(ttt.fast[str(i)].conv.grad, grad, rtol=1e-3, atol=1e-7)
    finally:
        ttt.detach()
    assert len(grads) == 2 and not tiny.model.get_input_embeddings()._forward_hooks  # checkpoints make the embeddings want gradients
    assert all(p.grad is None for mlp in public.mlps.values() for p in mlp.parameters()) and not tiny.model.training and not tiny.model.is_gradient_checkpointing


def test_every_part_reports_its_ways_side_by_side(run):
    code, report, out, _ = run()
    assert code == 0 and report["scored"] is False and report["commit"] and report["sizes"]["probes"] == 4
    ways = {}
    for line in report["lines"]:
        ways.setdefault((line["part"], line["case"]), []).append(line)
        assert line["seconds"] > 0 and line["ratio"] > 0 and line["peak_gb"] is None and text_in(out, line)
    assert {part for part, _ in ways} == {"probe", "write", "train", "read", "solve", "long", "whole"}
    assert [case for part, case in ways if part == "long"] == ["120 tokens, study", "120 tokens, codes"] and "long    1,000,000 tokens: the model's window is " in out
    assert all(lines[0]["ratio"] == 1.0 for lines in ways.values())
    (probe,) = [lines for (part, _), lines in ways.items() if part == "probe"]
    assert [line["way"] for line in probe] == ["base", "memory", "base, shared beginning", "memory, shared beginning", "public, one at a time"]
    assert [line["way"] for (part, _), lines in ways.items() if part == "read" for line in lines] == [
        "base", "slots of 20 tokens", "dense, of 20 tokens", "slots of 40 tokens", "dense, of 40 tokens"]
    written = {case: [line["way"] for line in lines] for (part, case), lines in ways.items() if part == "write"}
    assert written == {"2 x 70 tokens, codes": ["base", "memory", "memory, a slot a token"], "2 x 70 tokens, plain": ["base", "memory", "public, one at a time"],
                       "1 x 150 tokens, codes": ["base", "memory", "memory, a slot a token"], "1 x 150 tokens, plain": ["base", "memory"]}
    for line in report["lines"]:
        assert line["floor"] > 0 and line["tflops"] > 0 and line["share"] == pytest.approx(line["tflops"] / report["machine_and_bytes"]["tflops"])
    assert all(seconds_needed(line) == pytest.approx(seconds_needed(probe[0])) for line in probe if line["way"].startswith("public")) and report["machine_and_bytes"]["tflops"] > 0
    sizes = report["machine_and_bytes"]["bytes"]
    assert sizes["memory, rank 4"] < sizes["memory"] and sizes["public, dense"] == 2 * 32 * 64 * 4 and sizes["KV cache"] == bench.TEXT * 4 * 2 * 2 * 8 * 4
    whole = [line["case"].split(",")[0] for line in report["lines"] if line["part"] == "whole"]
    assert whole == ["A_context", "B_memory", "C_nothing", "D_distractor"]
    facts = report["machine_and_bytes"]
    assert facts["whole_seconds"] == pytest.approx(sum(line["seconds"] for line in report["lines"] if line["part"] == "whole"))
    assert facts["whole_public_seconds_estimated"] > 0 and "the public way by an estimate" in out and "0.167 of the tokens leave a slot" in out


def seconds_needed(line):
    """What the machine's products alone would take."""
    return line["seconds"] * line["share"]


def test_the_estimate_of_the_public_way_is_questions_and_texts_by_their_length(tiny):
    small = bench.Bench(tiny, SMALL)
    assert public_seconds(small, 10, [100]) is None
    small.keep("probe", "case", "public, one at a time", 2.0, 1.0, 82, 0.0, 0.0, None)
    assert public_seconds(small, 10, []) is None
    small.keep("write", "case", "public, one at a time", 0.5, 1.0, 100, 0.0, 0.0, None)
    assert public_seconds(small, 10, [100, 300]) == pytest.approx(10 * 2.0 + 0.5 + 1.5)
    small.keep("write", "case", "public, one at a time", 1.0, 1.0, 600, 0.0, 0.0, None)
    small.keep("write", "case", "base", 9.0, 1.0, 600, 0.0, 0.0, None)
    assert public_seconds(small, 10, [100, 300]) == pytest.approx(10 * 2.0 + 0.5 + 0.7)
    assert public_seconds(small, 3, []) == pytest.approx(6.0)


def test_thinned_gates_leave_a_slot_at_about_one_token_in_so_many(tiny):
    """On texts that the biases were not set by; wide open at every token, and as thin as before after that."""
    small = bench.Bench(tiny, SMALL, slots=0.25)
    with small.attached() as ttt:
        texts = small.rows(6, 120)
        thin = bench.written(small, ttt, texts)
        with bench.every_token(ttt):
            assert bench.slots_of(bench.written(small, ttt, texts)) == 120
        assert 120 * 0.15 < bench.slots_of(thin) < 120 * 0.35 and bench.written(small, ttt, texts).digest() == thin.digest()
    layers = list(thin.layers.values())
    assert not torch.equal(layers[0].values != 0, layers[1].values != 0)  # each layer has gates of its own


# ---- operations ----

def counted(call):
    """Operations by torch's own counter, which is told what the attention of a CPU takes."""
    shape = lambda q, k, v, *_, **__: 4 * q[0] * q[1] * q[2] * k[2] * q[3]
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape}) as counter:
        call()
    return counter.get_total_flops()


def test_the_operations_of_the_base_are_those_that_torch_counts(tiny):
    """All but the pairs of tokens that do not see each other, which the CPU's attention lays out all the same."""
    small, length = bench.Bench(tiny, SMALL), 50
    base = small.cost
    unseen = 4 * base.attention * base.layers * (length ** 2 - pairs(length))
    rows = small.rows(1, length)
    assert counted(lambda: prefill(tiny.model, rows, 0)) == base.forward(length) + unseen
    body = replace(base, attention=0)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        bench.ask(small, rows)
    assert counter.get_total_flops() == body.answer(length, bench.NEW)


def test_the_backward_pass_goes_through_what_stands_above_the_first_layer(tiny):
    ttt = InPlaceTTT(tiny.model, TTTConfig(layers=(2,), chunk=None, init="shift"))
    body, length = replace(bench.Bench(tiny, SMALL).cost, attention=0), 300
    try:
        with torch.no_grad(), ttt.write(differentiable=True) as writer:
            writer.expect(torch.ones(1, 4))
            tiny.model(input_ids=torch.zeros(1, 4, dtype=torch.long))
        ids = torch.randint(0, 250, (1, length), generator=torch.Generator().manual_seed(0))
        memory = writer.memory()
        memory.layers[2].values.requires_grad_()  # all that learns
        with FlopCounterMode(display=False) as counter, ttt.read(memory):
            tiny.model(input_ids=ids).logits.sum().backward()
    finally:
        ttt.detach()
    layer = body.body / body.layers
    expected = body.forward(length, predicted=length) + body.backward(length, predicted=length, first=2)
    # the gradient enters layer 2 behind its MLP, so none of its own products is run backward, and the memory's products are small
    assert expected - 2.1 * layer * length < counter.get_total_flops() < expected


@pytest.mark.parametrize("what", ["write", "read", "read dense"])
def test_the_operations_of_a_memory_are_those_that_torch_counts(tiny, what):
    """The form codes of the row: what is counted beside the base's own, but the solve by Cholesky, which torch's counter leaves out."""
    small, length = bench.Bench(tiny, SMALL), 100
    rows = small.rows(1, length)
    with small.attached() as ttt:
        memory, cost = bench.written(small, ttt, rows), small.memory_cost(ttt)
        slots = bench.slots_of(memory)
        if what == "write":
            added = counted(lambda: write_rows(tiny.model, ttt, rows, 0)) - counted(lambda: tiny.model.get_decoder()(input_ids=torch.tensor(rows)))
            predicted = cost.write(length, slots) - len(ttt.config.layers) * (slots ** 3 / 3 + 2 * slots ** 2 * cost.hidden)
            unseen = 2 * 4 * 64 * length * (length - 1) / 2 / 2  # of the head that looks back
        else:
            memory = memory.dense() if what == "read dense" else memory
            added = counted(lambda: bench.ask(small, rows, ttt, memory)) - counted(lambda: bench.ask(small, rows))
            predicted = cost.read(length + bench.NEW - 1, slots, what == "read dense")
            unseen = 2 * 4 * 64 * (length * (length - 1) / 2 + sum(bench.NEW - n for n in range(1, bench.NEW)))
        assert added == pytest.approx(predicted + unseen, rel=0.1)


def test_compiled_layers_are_in_place_for_a_step_alone(tiny, monkeypatch):
    """The step's loss is that of the layers as they are, and these stand where they stood when it is over."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # a real compiler's threads are not survived by tests that fork
    small, losses = bench.Bench(tiny, replace(SMALL, batches=(1,), compiled=(1,), rounds=1)), []
    monkeypatch.setattr(bench_train, "lm_step", lambda *how: losses.append(lm_step(*how)) or losses[-1])
    monkeypatch.setattr(bench_train, "train_answers", lambda *_: None)
    before, rows = dict(tiny.model.named_modules()), small.rows
    monkeypatch.setattr(small, "rows", lambda count, length: [list(range(100)) * 2] * count if length == TRAINED else rows(count, length))
    bench.train(small)
    assert dict(tiny.model.named_modules()) == before
    assert [line.way for line in small.lines][2:] == ["memory, 1 at once", "memory, compiled, 1 at once"]
    assert len(losses) == 4 and all(step.loss.item() == pytest.approx(losses[0].loss.item(), rel=1e-5) for step in losses)


def test_a_run_that_ends_early_keeps_the_parts_before(run, monkeypatch):
    def broken(bench):
        raise UserError("no power")

    monkeypatch.setitem(bench.PARTS, "train", broken)
    code, report, *_ = run("--parts", "machine,bytes,train,whole")
    assert code == 2 and report["parts"] == ["machine", "bytes"] and report["machine_and_bytes"]["bytes"]


def text_in(out, line):
    return any(line["case"] in row and line["way"] in row for row in out.splitlines())


def test_an_answer_has_all_its_tokens(tiny, monkeypatch):
    """Nothing stops early: one prefill and NEW - 1 further calls, each of one token, although every token is an end here."""
    lengths, small = [], bench.Bench(tiny, SMALL)
    monkeypatch.setattr("decoding.stop_ids", lambda tokenizer, line: frozenset(range(260)))
    hook = tiny.model.register_forward_pre_hook(lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    bench.ask(small, small.rows(3, 7))
    hook.remove()
    assert lengths == [7] + [1] * (bench.NEW - 1)


def test_a_way_without_memory_is_left_out_and_the_others_stay(tiny, capsys):
    def full():
        raise torch.OutOfMemoryError("no room")

    small = bench.Bench(tiny, SMALL)
    small.compare("probe", "case", {"one": bench.Way(lambda: None, 1, 0.0), "two": bench.Way(full, 1, 0.0), "three": bench.Way(lambda: None, 2, 0.0)}, 10)
    assert [line.way for line in small.lines] == ["one", "three"] and "out of memory" in capsys.readouterr().out


def test_a_public_call_that_fails_leaves_the_base_as_it_was(tiny, monkeypatch):
    """bench.py goes on with the other ways after an out-of-memory error."""
    public, ids, mlps = PublicWay(tiny.model, (1, 2)), torch.arange(20)[None], [layer.mlp for layer in tiny.model.get_decoder().layers]

    def full(self, x_BLD):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("public_way.DenseMLP.forward", full)
    for call in (public.ingest, public.train_step, lambda ids: public.answer(ids, 2)):
        with pytest.raises(torch.OutOfMemoryError):
            call(ids)
        assert [layer.mlp for layer in tiny.model.get_decoder().layers] == mlps and not tiny.model.training and not tiny.model.is_gradient_checkpointing


@pytest.mark.parametrize("more, message", [(("--parts", "probe,speed"), "--parts speed: unknown; use some of machine,probe"),
                                           (("--weights", "random", "--adapter", "x"), "leave it out with --weights random"),
                                           (("--slots", "0"), "--slots 0: use a share above 0"),
                                           (("--model", "nothing"), "--model nothing: unknown")])
def test_bad_arguments_are_one_line(run, more, message):
    code, report, _, err = run(*more)
    assert code == 2 and report is None and message in err and len(err.strip().splitlines()) == 1


def test_random_weights_read_text_cut_by_a_real_tokenizer(run, monkeypatch):
    """A byte is a token to a random model; the experiment's texts would be four times as long."""
    row, asked = bench.replace(bench.find_row("tiny-qwen3"), hub="somewhere"), []
    monkeypatch.setattr(bench, "find_row", lambda name: row)
    monkeypatch.setattr(bench, "load_model", lambda name, *more, **named: asked.append(name) or load_model("tiny-qwen3"))
    code, *_ = run("--weights", "random", "--parts", "bytes")
    assert code == 0 and asked == ["tiny-qwen3"]  # no text is cut, so no tokenizer is needed
    code, *_ = run("--weights", "random", "--parts", "whole")
    assert code == 0 and asked == ["tiny-qwen3"] * 2 + [bench.TOKENIZER_OF]
