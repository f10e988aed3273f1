"""Batches, caches and stops: an answer may not depend on who else is in the batch or on where a long text was cut."""
import copy
import types

import pytest
import torch
from conftest import FAMILIES, assert_same_memory, tiny, token_rows, widen
from transformers import AutoModelForCausalLM, DynamicCache

import decoding
import prompts
from decoding import Past, check_window, forward, greedy, pad_left, prefill, reading, stop_ids, write_rows
from in_place_ttt import InPlaceTTT, TTTConfig
from manifests import UserError
from memory import Memory
from model_utils import MODELS, load_model

PAD = 256
DEEP = dict(codes=True, write_attention=2, read_attention=1, deep=True, blind=True, target="both", unit_targets=True, gate=True, sparse=True, rule="ridge")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def answers(loaded, logits, past, n=12):
    return greedy(loaded.model, loaded.tokenizer, logits, past, n)


def varied(loaded):
    """A tiny model whose head is not tied to its embeddings: greedy decoding then does not repeat one byte for ever."""
    other = types.SimpleNamespace(tokenizer=loaded.tokenizer, model=copy.deepcopy(loaded.model))
    head = torch.randn(260, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    head[128:] = 0  # printable bytes only, so that two different answers never decode to the same replacement sign
    other.model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    return other


# ---- greedy in a batch ----

@pytest.mark.parametrize("memory", [False, True])
def test_a_padded_batch_answers_as_each_row_alone(family, memory, attach):
    ttt = attach(family, chunk=None, unit_keys=True, gate=True)
    loaded = varied(family)
    texts, heads, tails = token_rows((30, 11, 19)), token_rows((9, 4, 7), seed=1), token_rows((3, 8, 5), seed=2)
    loaded.model.get_decoder().layers = family.model.get_decoder().layers  # the layers that carry the adapter
    written, _ = write_rows(loaded.model, ttt, texts, PAD)

    def run_rows(rows):
        with ttt.read(written.select(rows) if memory else written.select(rows).scale(0.0)):
            _, past = prefill(loaded.model, [heads[r] for r in rows], PAD)
            logits, past = prefill(loaded.model, [tails[r] for r in rows], PAD, past)
            return logits, answers(loaded, logits, past)

    logits, together = run_rows([0, 1, 2])
    for r in range(3):
        alone, answer = run_rows([r])
        torch.testing.assert_close(logits[r], alone[0], atol=1e-9, rtol=0)
        assert answer == [together[r]]
    assert len(set(together)) > 1 and all(together)


def test_nothing_of_the_text_is_left_but_the_memory(family, attach):
    """KV-stripped: with the past dropped and the memory zeroed, logits are those of a model that never saw the text."""
    ttt = attach(family, chunk=4)
    question = token_rows((7, 5), seed=3)
    fresh, _ = prefill(family.model, question, PAD)
    memory, past = write_rows(family.model, ttt, token_rows((20, 14)), PAD)
    with ttt.read(memory.scale(0.0)):
        stripped, _ = prefill(family.model, question, PAD)
        shown, _ = prefill(family.model, question, PAD, past)
    with ttt.read(memory):
        remembered, _ = prefill(family.model, question, PAD)
    assert torch.equal(stripped, fresh)
    assert not torch.allclose(shown, fresh, atol=1e-3) and not torch.allclose(remembered, fresh, atol=1e-3)


def test_positions_restart_at_zero_and_skip_pads(llama, monkeypatch):
    seen, original = [], llama.model.forward
    monkeypatch.setattr(llama.model, "forward", lambda **kw: seen.append(kw["position_ids"].tolist()) or original(**kw))
    _, past = prefill(llama.model, [[1, 2, 3], [4]], PAD)
    _, past = prefill(llama.model, [[5], [6, 7]], PAD, past)
    forward(llama.model, torch.tensor([[8], [9]]), torch.ones(2, 1, dtype=torch.long), past)
    prefill(llama.model, [[1, 2]], PAD)
    # a pad's position says nothing; the tokens of each row count on without a gap
    tokens = lambda positions, columns: [[row[c] for c in cs] for row, cs in zip(positions, columns)]
    assert tokens(seen[0], [[0, 1, 2], [2]]) == [[0, 1, 2], [0]]
    assert tokens(seen[1], [[1], [0, 1]]) == [[3], [1, 2]]
    assert seen[2] == [[4], [3]] and seen[3] == [[0, 1]]


def test_pad_left():
    ids, mask = pad_left([[1, 2, 3], [4]], 0, "cpu")
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


# ---- sharing ----

def test_past_repeat_and_a_shared_memory_row_equal_copies(family, attach):
    """k questions about one text: one cache and one memory row serve them all."""
    ttt = attach(family, chunk=None, gate=True)
    memory, _ = write_rows(family.model, ttt, token_rows((15, 9)), PAD)
    heads, tails = token_rows((6, 3), seed=1), token_rows((2, 5, 4, 3, 6, 1), seed=2)
    with ttt.read(memory):
        _, past = prefill(family.model, heads, PAD)
        past = past.repeat(3)
        assert past.mask.shape == (6, 6) and past.mask[:3].all() and past.mask[3:, :3].sum() == 0
        shared, shared_past = prefill(family.model, tails, PAD, past)
        shared_answers = answers(family, shared, shared_past)
    copies = [0, 0, 0, 1, 1, 1]
    with ttt.read(memory.select(copies)):
        _, past = prefill(family.model, [heads[r] for r in copies], PAD)
        copied, copied_past = prefill(family.model, tails, PAD, past)
        copied_answers = answers(family, copied, copied_past)
    torch.testing.assert_close(shared, copied, atol=1e-10, rtol=0)
    assert shared_answers == copied_answers


# ---- segments ----

@pytest.mark.parametrize("segment", [1, 5, 12, 13, 40])
def test_where_a_long_text_is_cut_does_not_matter(family, segment, monkeypatch):
    """Lengths on both sides of a border, and a row that is all pads in the first segments."""
    rows, tails = token_rows((40, 13, 12)), token_rows((3, 6, 4), seed=1)
    _, past = prefill(family.model, rows, PAD)
    expected, _ = prefill(family.model, tails, PAD, past)
    monkeypatch.setattr(decoding, "SEGMENT", segment)
    calls, original = [], family.model.forward
    monkeypatch.setattr(family.model, "forward", lambda **kw: calls.append(kw["input_ids"].shape[1]) or original(**kw))
    _, past = prefill(family.model, rows, PAD)
    assert calls == [segment] * (40 // segment) + ([40 % segment] if 40 % segment else [])
    logits, _ = prefill(family.model, tails, PAD, past)
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)


def test_few_rows_take_longer_calls_but_for_chunks_and_questions(llama, attach, monkeypatch):
    monkeypatch.setattr(decoding, "SEGMENT", 5)
    lengths, original = [], llama.model.get_decoder().forward
    monkeypatch.setattr(llama.model.get_decoder(), "forward", lambda **kw: lengths.append(kw["input_ids"].shape[1]) or original(**kw))

    def calls_of(work):
        lengths.clear()
        work()
        return list(lengths)

    assert calls_of(lambda: prefill(llama.model, token_rows((45,)), PAD)) == [20, 20, 5]
    assert calls_of(lambda: prefill(llama.model, token_rows((25, 9)), PAD)) == [10, 10, 5]
    assert calls_of(lambda: prefill(llama.model, token_rows((12,) * 4), PAD)) == calls_of(lambda: prefill(llama.model, token_rows((12,) * 9), PAD)) == [5, 5, 2]
    for chunk, expected in ((None, [20, 20, 5]), (4, [5] * 9)):
        ttt = attach(llama, chunk=chunk)
        assert calls_of(lambda: write_rows(llama.model, ttt, token_rows((45,)), PAD)) == expected
        memory = write_rows(llama.model, ttt, token_rows((9,)), PAD)[0]
        with ttt.read(memory) as reader:
            assert calls_of(lambda: prefill(llama.model, token_rows((12,)), PAD, session=reader)) == [5, 5, 2]
        ttt.detach()


def test_a_text_of_exactly_one_segment_and_one_token_more(llama, attach, monkeypatch):
    ttt = attach(llama, chunk=4)
    for length in (8, 9):
        rows = token_rows((length, 5))
        whole, _ = write_rows(llama.model, ttt, rows, PAD)
        monkeypatch.setattr(decoding, "SEGMENT", 8)
        cut, past = write_rows(llama.model, ttt, rows, PAD)
        monkeypatch.undo()
        assert_same_memory(whole, cut)
        assert past.cache.get_seq_length() == length and past.mask.sum(1).tolist() == [length, 5]


def test_writing_after_a_past_sees_it_and_writes_only_the_text(llama, attach):
    """P_paper: the head is read, then the text is written with the head still in context."""
    ttt = attach(llama, chunk=4)
    head, rows = token_rows((6,))[0], token_rows((11, 7), seed=1)
    _, past = prefill(llama.model, [head, head], PAD)
    memory, past = write_rows(llama.model, ttt, rows, PAD, past=past)
    alone = []
    for row in rows:
        _, own = prefill(llama.model, [head], PAD)
        alone.append(write_rows(llama.model, ttt, [row], PAD, past=own)[0])
    assert memory.tokens.tolist() == [11, 7] and past.mask.sum(1).tolist() == [17, 13]
    assert_same_memory(memory, Memory.stack(alone), atol=1e-10)
    without = write_rows(llama.model, ttt, rows, PAD)[0].layers[3].to_dense().update
    assert (without - memory.layers[3].to_dense().update).norm() > 1e-3  # the head did matter


# ---- Gemma's sliding window ----

@pytest.fixture(scope="module")
def narrow():
    """tiny-gemma3 with a window of 16 tokens, in float64."""
    config = copy.deepcopy(MODELS["tiny-gemma3"].config)
    config.sliding_window = 16
    torch.manual_seed(0)
    return widen(AutoModelForCausalLM.from_config(config).double().eval())


def one_pass(model, row):
    return model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("segment", [1024, 7])
def test_beyond_the_sliding_window_the_cache_says_what_one_pass_says(narrow, segment, monkeypatch):
    monkeypatch.setattr(decoding, "SEGMENT", segment)
    monkeypatch.setattr(decoding, "FULL", 1)
    row, tail = token_rows((60, 9))
    _, past = prefill(narrow, [row], PAD)
    logits, past = prefill(narrow, [tail], PAD, past)
    torch.testing.assert_close(logits[0], one_pass(narrow, row + tail), atol=1e-9, rtol=0)
    for token in (3, 4, 5):
        logits, past = forward(narrow, torch.tensor([[token]]), torch.ones(1, 1, dtype=torch.long), past)
        tail = tail + [token]
    torch.testing.assert_close(logits[0], one_pass(narrow, row + tail), atol=1e-9, rtol=0)


def test_the_window_of_the_test_model_does_cut(narrow):
    row = token_rows((60,))[0]
    seen = narrow.get_decoder().layers[0].self_attn.sliding_window
    wide = copy.deepcopy(narrow)
    wide.config.sliding_window = 4096
    assert seen == 16 and not torch.allclose(one_pass(narrow, row), one_pass(wide, row), atol=1e-3)


def test_beyond_the_sliding_window_a_padded_batch_answers_as_each_row_alone(narrow):
    """Pads stand before the texts and between texts and questions; none may take a token's place in the window."""
    rows, tails = token_rows((60, 23)), token_rows((5, 14), seed=1)
    _, past = prefill(narrow, rows, PAD)
    logits, _ = prefill(narrow, tails, PAD, past)
    for r in range(2):
        torch.testing.assert_close(logits[r], one_pass(narrow, rows[r] + tails[r]), atol=1e-9, rtol=0)


def test_beyond_the_sliding_window_repeat_serves_every_question(narrow):
    row, tails = token_rows((60,))[0], token_rows((9, 9), seed=1)
    _, past = prefill(narrow, [row], PAD)
    logits, _ = prefill(narrow, tails, PAD, past.repeat(2))
    for r in range(2):
        torch.testing.assert_close(logits[r], one_pass(narrow, row + tails[r]), atol=1e-9, rtol=0)


@pytest.mark.parametrize("settings", [None, dict(DEEP, chunk=None)])
def test_steps_in_place_say_what_a_growing_cache_says(family, settings, attach):
    """Every step's logits, with a memory (side streams and all) and without: fixed room against one that grows."""
    ttt = attach(family, **(settings or {"chunk": None}))
    texts, heads, tails = token_rows((30, 11)), token_rows((9, 4), seed=1), token_rows((3, 8), seed=2)
    loaded = varied(family)
    loaded.model.model = family.model.model  # the one that carries the adapter
    written, _ = write_rows(loaded.model, ttt, texts, PAD)
    seen = {}
    for way in ("grow", "fixed"):
        with reading(ttt if settings else None, written if settings else None) as session:
            _, past = prefill(loaded.model, heads, PAD, session=session)
            logits, past = prefill(loaded.model, tails, PAD, past, session)
            seen[way] = [logits]
            if way == "grow":
                for _ in range(9):
                    chosen = logits.argmax(-1, keepdim=True)
                    logits, past = forward(loaded.model, chosen, torch.ones_like(chosen), past, session)
                    seen[way].append(logits)
            else:
                steps = decoding.Steps(loaded.model, loaded.tokenizer, logits, past, 10, session)
                choose = steps._choose
                steps._choose = lambda logits: (seen[way].append(logits.clone()), choose(logits))
                for _ in range(9):
                    steps.run()
    for fixed, grown in zip(seen["fixed"], seen["grow"], strict=True):
        torch.testing.assert_close(fixed, grown, atol=1e-9, rtol=0)
    assert len({logits.argmax(-1).tolist()[0] for logits in seen["grow"]}) > 2  # not one byte for ever


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are of a GPU")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_captured_step_says_what_it_says_uncaptured(name):
    loaded = load_model(name, "cuda")
    ttt = InPlaceTTT(loaded.model, TTTConfig(layers=(1, 2), chunk=None, **DEEP))
    memory, _ = write_rows(loaded.model, ttt, token_rows((30, 11)), PAD)
    said = []
    for captured in (True, False):
        with ttt.read(memory) as session:
            logits, past = prefill(loaded.model, token_rows((9, 4), seed=1), PAD, session=session)
            steps = decoding.Steps(loaded.model, loaded.tokenizer, logits, past, 20, session)
            for _ in range(19):
                steps.run() if captured else steps._step()
        said.append(steps.tokens_BN.tolist())
    assert said[0] == said[1] and steps.graph is None


# ---- stops ----

class Script:
    """A model that says the scripted token ids, one row of them each."""

    config = types.SimpleNamespace(get_text_config=types.SimpleNamespace)

    def __init__(self, tokenizer, lines, ends=None):
        self.rows = [prompts.encode(tokenizer, line) for line in lines]
        for row, end in zip(self.rows, ends or [[]] * len(lines)):
            row += end
        self.asked = 0

    def logits(self):
        wanted = [row[min(self.asked, len(row) - 1)] for row in self.rows]
        self.asked += 1
        return torch.nn.functional.one_hot(torch.tensor(wanted), 260).double()

    def __call__(self, **_):
        return types.SimpleNamespace(logits=self.logits()[:, None])

    def answers(self, tokenizer, n=20):
        return greedy(self, tokenizer, self.logits(), Past(DynamicCache(), torch.ones(len(self.rows), 1)), n)


def test_an_answer_ends_with_its_line_or_its_turn(llama):
    tokenizer = llama.tokenizer
    script = Script(tokenizer, [" Bruno\nand more", " 42 apples", "\nlate"], [[], [tokenizer.eos_token_id], []])
    assert script.answers(tokenizer) == ["Bruno", "42 apples", ""]
    assert script.asked == len(" 42 apples") + 1  # nothing is run once every row has ended


def test_what_a_row_says_after_its_end_is_not_heard(llama):
    script = Script(llama.tokenizer, ["ab" + "c" * 20, "x"], [[], [llama.tokenizer.eos_token_id, *b"yz"]])
    assert script.answers(llama.tokenizer, 10) == ["ab" + "c" * 8, "x"]


def test_the_length_is_bounded(llama):
    script = Script(llama.tokenizer, ["never ends"])
    assert script.answers(llama.tokenizer, 5) == ["never"] and script.asked == 5


def test_every_token_with_a_line_break_stops(llama):
    stops = stop_ids(llama.tokenizer)
    assert set(prompts.encode(llama.tokenizer, "\n")) <= stops and set(llama.tokenizer.all_special_ids) <= stops
    assert not set(prompts.encode(llama.tokenizer, "Bruno 42.")) & stops


def test_stops_of_a_real_tokenizer(smollm):
    stops, tokenizer = stop_ids(smollm.tokenizer), smollm.tokenizer
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stops and tokenizer.eos_token_id in stops
    for text in ("\n", "\n\n", " \n"):
        assert set(prompts.encode(tokenizer, text)) & stops
    assert not set(prompts.encode(tokenizer, " Bruno, at 9:30 on Tuesday.")) & stops


@pytest.fixture(scope="module")
def smollm():
    from transformers import AutoTokenizer

    from gguf_packages import available, converted_folder
    row = MODELS["smollm2-135m"]
    if not available(row.name, row.gguf):
        pytest.skip(f"needs `{row.gguf.install}`")
    return types.SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(converted_folder(row.name, row.gguf)))


def test_a_prompt_longer_than_the_window_is_named(llama):
    window = llama.model.config.max_position_embeddings
    check_window(llama.model, window, "L1-001-en B_memory")
    with pytest.raises(UserError, match=f"^L1-001-en B_memory: needs {window + 1} tokens, the model's window is {window}; "):
        check_window(llama.model, window + 1, "L1-001-en B_memory")


# ---- prompts ----

@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_parts_of_a_prompt_are_the_tokens_of_the_whole_text(lang):
    """Encoded part by part, and with one question form in every condition."""
    tokenizer, form = tiny("tiny-llama").tokenizer, prompts.FORMS[lang]
    parts = prompts.head_ids(tokenizer, lang, True) + prompts.encode(tokenizer, "A: b.") + prompts.tail_ids(tokenizer, lang, "Q?")
    assert tokenizer.decode(parts) == form.example + form.header + "A: b." + form.question.format(question="Q?")
    assert prompts.head_ids(tokenizer, lang, True)[:len(prompts.head_ids(tokenizer, lang, False))] == prompts.head_ids(tokenizer, lang, False)
    gold = prompts.answer_ids(tokenizer, lang, "Bruno")
    assert tokenizer.decode(gold).strip() == "Bruno" and gold[-1] in stop_ids(tokenizer)
    assert form.example.startswith(form.header.lstrip())  # the solved example has the very form of what is asked
    assert all(part.strip() and part in form.example for part in form.question.split("{question}"))
