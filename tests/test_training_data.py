"""What an update sees: packed rows are the arithmetic of one prompt per question, and a batch is (seed, update) and nothing else."""
import copy
import dataclasses
import hashlib
import json
import random
import re
import types

import datasets
import pytest
import torch
from conftest import batch_of, strengthen, tiny, token_rows, widen, write_once
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, DynamicCache

import prompts
import training_bank
import training_data
from bank_talk import Plan
from bank_values import load_bank
from in_place_ttt import InPlaceTTT, TTTConfig
from manifests import UserError, file_sha256
from model_utils import MODELS
from objectives import answer_logits, judged, lm_step, pad_right
from training_data import IGNORE, NOWHERE, BankDataset, Example, TextDataset, batches, columns, load_texts, pack

TOKENIZER = tiny("tiny-llama").tokenizer


def narrow_gemma():
    """tiny-gemma3 whose sliding window is shorter than a question's distance from the start of its prefix."""
    config = copy.deepcopy(MODELS["tiny-gemma3"].config)
    config.sliding_window = 12
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = widen(AutoModelForCausalLM.from_config(config).double().eval()).requires_grad_(False)
    return types.SimpleNamespace(model=model, tokenizer=TOKENIZER, device=torch.device("cpu"))


READERS = {name: lambda name=name: tiny(name) for name in ("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-gemma3")} | {"narrow gemma3": narrow_gemma}


def random_examples():
    """Three examples with prefixes, questions and answers of different lengths and numbers."""
    lengths = [(30, [(9, 4), (5, 1), (7, 6)]), (11, [(6, 3)]), (23, [(4, 2), (8, 5)])]
    rows = iter(token_rows([n for prefix, pairs in lengths for n in (20, prefix, *(m for pair in pairs for m in pair))], seed=4))
    return [Example(next(rows), next(rows), [(next(rows), next(rows)) for _ in pairs]) for _, pairs in lengths]


# ---- packing ----

ARMS = {"base": dict(unit_keys=True), "memory": dict(unit_keys=True),
        "read attention": dict(codes=True, read_attention=2, blind=True, read_gate=True, target="both"),
        "read stream": dict(codes=True, write_attention=2, read_attention=2, deep=True, blind=True, read_gate=True, target="both",
                            unit_targets=True, threshold=True)}


@pytest.mark.parametrize("memory", ARMS)
@pytest.mark.parametrize("reader", READERS)
def test_packed_prompts_equal_one_prompt_per_question(reader, memory):
    """The oracle is the library's own forward of each prompt, without a mask and without padding; with read attention, of its
    prefix and then its question, as the experiment reads them."""
    loaded, examples = READERS[reader](), random_examples()
    ttt = strengthen(InPlaceTTT(loaded.model, TTTConfig((1, 2), None, **ARMS[memory])).double())
    try:
        with torch.no_grad():
            _, written = write_once(loaded.model, ttt, *batch_of([e.written for e in examples]))
            if memory == "base":
                written = written.scale(0.0)
            seen = []
            hook = loaded.model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output))
            packed = pack(examples, TOKENIZER.pad_token_id, "cpu")
            with ttt.read(written) as session:
                session.expect(torch.ones_like(packed.ids), packed.position, packed.question)
                step = judged(answer_logits(loaded, packed), packed.labels, packed.ids.numel())
            hook.remove()
            logits, wanted = [], []
            for i, example in enumerate(examples):
                for question, answer in example.pairs:
                    out, past = [], DynamicCache()
                    for part in (example.prefix, question + answer):
                        with ttt.read(written.select([i])) as session:
                            session.expect(torch.ones(1, len(part)))
                            out = loaded.model(input_ids=torch.tensor([part]), past_key_values=past, use_cache=True).logits[0]
                    logits.append(out[-len(answer) - 1:-1])
                    wanted += answer
        logits, wanted = torch.cat(logits), torch.tensor(wanted)
        assert step.labels == len(wanted) == 21
        torch.testing.assert_close(seen[0], logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(step.loss.double(), cross_entropy(logits, wanted), atol=1e-5, rtol=0)
        assert step.right.item() == (logits.argmax(-1) == wanted).sum().item()
    finally:
        ttt.detach()


def test_the_narrow_window_of_the_packing_test_does_cut():
    narrow, row = narrow_gemma(), torch.tensor(token_rows((40,)))
    wide = copy.deepcopy(tiny("tiny-gemma3").model)
    wide.load_state_dict(narrow.model.state_dict())
    with torch.no_grad():
        assert not torch.allclose(narrow.model(input_ids=row).logits[0, -1], wide(input_ids=row).logits[0, -1], atol=1e-4)


def test_labels_stand_exactly_on_the_answers():
    examples = BankDataset(TOKENIZER, ("en", "zh"), 1, 4, 5, 0, shown=False)[0].examples
    packed = pack(examples, TOKENIZER.pad_token_id, "cpu")
    for example, ids, labels in zip(examples, packed.ids.tolist(), packed.labels.tolist()):
        marked = [(i, label) for i, label in enumerate(labels) if label != IGNORE]
        assert all(ids[i] == label for i, label in marked)
        assert [label for _, label in marked] == [token for _, answer in example.pairs for token in answer]
        at = len(example.prefix)
        for question, answer in example.pairs:
            assert labels[at:at + len(question)] == [IGNORE] * len(question)
            at += len(question) + len(answer)
            assert labels[at - len(answer):at] == answer


def test_loss_of_the_next_token_objective_ignores_pads():
    """A row's padding and its neighbours change neither the loss nor the count: the oracle is each text alone."""
    loaded, rows = tiny("tiny-qwen3"), token_rows((25, 9, 14), seed=7)
    ttt = strengthen(InPlaceTTT(loaded.model, TTTConfig((1, 2), 4)).double())
    try:
        with torch.no_grad():
            together = lm_step(loaded, ttt, rows, torch.device("cpu"))
            alone = [lm_step(loaded, ttt, [row], torch.device("cpu")) for row in rows]
        assert [s.labels for s in alone] == [24, 8, 13] and together.labels == 45
        assert together.loss.item() == pytest.approx(sum(s.loss.item() * s.labels for s in alone) / 45, abs=1e-5)
        assert together.memory.tokens.tolist() == [25, 9, 14] and together.memory.chunks.tolist() == [7, 3, 4]
    finally:
        ttt.detach()


def test_pad_right_keeps_every_token_and_marks_it():
    ids, mask = pad_right([[1, 2, 3], [4]], 9, "cpu")
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


# ---- the bank's batches ----

def bank(seed=0, shown=False, langs=("en", "zh"), updates=5):
    return BankDataset(TOKENIZER, langs, updates, 3, 4, seed, shown)


def test_a_batch_is_a_function_of_seed_and_update_whatever_the_workers():
    expected = [bank()[u] for u in (4, 2, 0, 1, 3)]  # asked for out of order, and from the middle
    expected = [expected[i] for i in (2, 3, 1, 4, 0)]
    random.seed(99)
    torch.manual_seed(99)
    for workers in (0, 1, 2):
        assert list(batches(bank(), workers)) == expected
    assert list(batches(bank(), 2, start=3)) == expected[3:]
    assert len({str(batch) for batch in expected}) == 5 and bank(seed=1)[0] != expected[0]


def test_more_updates_do_not_change_the_first_ones():
    assert [bank(updates=9)[u] for u in range(2)] == [bank(updates=2)[u] for u in range(2)]


def test_the_prompt_shows_the_conversation_only_when_it_is_asked_to():
    for hidden, shown in zip(bank()[3].examples, bank(shown=True)[3].examples):
        written = TOKENIZER.decode(hidden.written)
        assert hidden.pairs == shown.pairs and shown.written == []
        assert TOKENIZER.decode(shown.prefix).endswith(written) and written not in TOKENIZER.decode(hidden.prefix)
        assert all(line not in TOKENIZER.decode(hidden.prefix) for line in written.splitlines())


def test_questions_and_answers_are_said_in_the_experiments_form():
    sample = training_bank.sample_conversation(random.Random(7), "en", "train")
    example = BankDataset(TOKENIZER, ("en",), 1, 1, 4, 0, shown=False).example(random.Random(7), "en", False, 0, None)
    asked = {(prompts.FORMS["en"].question.format(question=p["question"]), f" {p['gold_answer']}\n") for p in sample["probes"]}
    said = [(TOKENIZER.decode(q), TOKENIZER.decode(a)) for q, a in example.pairs]
    assert TOKENIZER.decode(example.written) == sample["conversation"] and set(said) <= asked
    assert len(said) == len(set(said)) == min(4, len(sample["probes"]))


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_addresses_name_the_written_token_before_the_one_to_say(lang):
    """Read back from the tokens: at every address the next written token is the answer's, the line break is nowhere, and each token
    before a value's token is marked worth writing."""
    dataset, found, tokens = BankDataset(TOKENIZER, (lang,), 4, 6, 8, 0, shown=False), 0, 0
    for example in (example for update in range(4) for example in dataset[update].examples):
        assert len(example.worth) == len(example.written) and set(example.worth) <= {0, 1}
        for (_, answer), addresses in zip(example.pairs, example.addresses):
            assert len(addresses) == len(answer) and addresses[-1] == NOWHERE
            known = [(token, at) for token, at in zip(answer, addresses) if at not in (IGNORE, NOWHERE)]
            assert all(example.written[at + 1] == token and example.worth[at] == 1 for token, at in known)
            found, tokens = found + len(known), tokens + len(answer) - 1
    assert found > 0.9 * tokens > 300  # the rest: a value that begins a sentence with a capital


def test_the_size_of_a_memory_is_drawn_and_every_second_group_holds_prose():
    dataset = BankDataset(TOKENIZER, ("en", "zh"), 40, 16, 4, 0, shown=False, groups=(1, 2, 4), calm=True)
    sizes, is_chinese = set(), lambda ids: any("\u4e00" <= c <= "\u9fff" for c in TOKENIZER.decode(ids))
    for update in range(40):
        batch = dataset[update]
        sizes.add(batch.group)
        silent = [i for i, example in enumerate(batch.examples) if not example.pairs]
        rows = 8 if update % 4 == 3 else 16  # rows with prose in the text are longer
        assert len(batch.examples) == rows == dataset.seen(update, update + 1)
        assert [i // batch.group for i in silent] == ([n for n in range(rows // batch.group) if n // 2 % 2 == 0] if batch.group > 1 else [])
        # a memory speaks one language, its prose too, and both languages meet prose
        assert all(is_chinese(example.written) == bool(i // batch.group % 2) for i, example in enumerate(batch.examples))
        assert {is_chinese(batch.examples[i].written) for i in silent} == ({False, True} if silent else set())
        assert all(not any(example.worth) and not example.addresses for example in batch.examples if not example.pairs)
        assert bool(batch.calm) == (update % 8 == 0)
    assert sizes == {1, 2, 4}


def test_a_memory_and_its_foreign_questions_are_on_the_same_topics(monkeypatch):
    drawn, example = [], BankDataset.example
    monkeypatch.setattr(BankDataset, "example", lambda self, rng, lang, shown, prose, topics, *few:
                        (drawn.append((lang, topics)), example(self, rng, lang, shown, prose, topics, *few))[1])
    dataset, narrow = BankDataset(TOKENIZER, ("en", "zh"), 60, 16, 4, 0, shown=False, groups=(1, 4), foreign=True), []
    for update in range(32, 60, 4):
        drawn.clear()
        batch = dataset[update]
        written, foreign = drawn[:16], drawn[16:]
        memories = [set(written[i:i + batch.group]) for i in range(0, 16, batch.group)]
        assert all(len(memory) == 1 for memory in memories)  # one language and one set of topics, or none
        assert foreign == [memory.pop() for memory in memories[:len(foreign)]] and foreign
        narrow += [topics is not None for _, topics in written]
    assert 0.3 < sum(narrow) / len(narrow) < 0.7


def test_foreign_rows_ask_about_what_no_memory_holds():
    """Every fourth update; half with their text in the prompt, in the language of the memory they are asked with."""
    dataset = BankDataset(TOKENIZER, ("en", "zh"), 60, 32, 4, 0, shown=False, groups=(1, 4), foreign=True)
    is_chinese = lambda ids: any("\u4e00" <= c <= "\u9fff" for c in TOKENIZER.decode(ids))
    shown = []
    for update in (*range(8), *range(32, 60, 4)):  # from 32 on there are memories of four
        batch = dataset[update]
        assert bool(batch.foreign) == (update % 4 == 0)
        for i, example in enumerate(batch.foreign):
            written = TOKENIZER.decode(batch.examples[i * batch.group].written)
            prompt, questions = TOKENIZER.decode(example.prefix), [TOKENIZER.decode(q) for q, _ in example.pairs]
            assert is_chinese(example.prefix) == is_chinese(batch.examples[i * batch.group].written) == bool(i % 2)
            assert 1 <= len(questions) <= 4 and prompt.count("\n") > 3
            shown.append(not example.written)
            assert len(example.prefix) < 1200  # bytes of six facts at most: no row that all others would have to be padded to
            asked = {TOKENIZER.decode(q) for e in batch.examples for q, _ in e.pairs}
            assert written not in prompt and not asked & set(questions)
    assert 0.3 < sum(shown) / len(shown) < 0.7


def test_groups_of_one_topic_tell_of_the_same_relations():
    rng, shared = random.Random(3), []
    for topics in (None, training_bank.draw_topics(rng, "en")):
        kinds = [{f.relation["id"] for f in Plan(load_bank("en"), rng, "train", 10, topics).facts} for _ in range(20)]
        shared.append(sum(len(one & two) for one in kinds for two in kinds if one is not two))
    assert shared[1] > 2 * shared[0]


def test_the_first_updates_keep_conversations_apart():
    dataset = BankDataset(TOKENIZER, ("en",), 40, 4, 2, 0, shown=False, groups=(2, 4))
    assert {dataset[update].group for update in range(32)} == {2} and 4 in {dataset[update].group for update in range(32, 40)}


@pytest.mark.parametrize("longest, width", [(63, 63), (64, 65), (65, 65), (128, 128), (192, 193), (448, 449), (512, 512)])
def test_a_batch_is_never_an_odd_multiple_of_64_wide(longest, width):
    assert columns([[1] * 5, [1] * longest]) == width
    assert pack([Example([], [1] * (longest - 3), [([2], [3, 4])])], 0, "cpu").ids.shape == (1, width)


def test_languages_take_turns_and_prose_comes_every_fourth_update():
    dataset = bank(updates=8)
    is_chinese = lambda example: any("\u4e00" <= c <= "\u9fff" for c in TOKENIZER.decode(example.written))
    prose = {lang: training_bank.passages(lang) for lang in ("en", "zh")}
    for update in range(8):
        batch = dataset[update].examples
        assert [is_chinese(e) for e in batch] == [False, True, False][:1 if update % 4 == 3 else 3]
        holds = [any(p in TOKENIZER.decode(e.written) for p in prose["zh" if is_chinese(e) else "en"]) for e in batch]
        assert holds == [update % 4 == 3] * len(batch)


# ---- texts for the next-token objective ----

def test_text_rows_are_cut_at_the_length_and_seeded():
    texts = ["a short one", "x" * 100, "z" * 31]
    dataset = TextDataset(TOKENIZER, texts, 6, 4, 32, seed=0)
    rows = [row for u in range(6) for row in dataset[u]]
    assert len(rows) == 24 and {TOKENIZER.decode(row) for row in rows} == {"a short one", "x" * 32, "z" * 31}
    assert list(batches(dataset, 2)) == [dataset[u] for u in range(6)]
    assert [TextDataset(TOKENIZER, texts, 6, 4, 32, seed=1)[u] for u in range(6)] != [dataset[u] for u in range(6)]


def test_a_txt_file_has_texts_between_blank_lines(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes("one\ntwo\n\n\n\n  three  \r\n\r\n四".encode())
    texts, sha = load_texts(str(path), ("en",))
    assert texts == ["one\ntwo", "three", "四"] and sha == file_sha256(path)


def test_a_jsonl_file_has_a_text_a_line(tmp_path):
    """Line separators inside a text (U+2028, U+0085) are not line ends of the file."""
    path = tmp_path / "texts.jsonl"
    wanted = ["one\ntwo", "a\u2028b\u0085c", "四"]
    path.write_text("\n".join(json.dumps({"text": t, "other": 1}, ensure_ascii=False) for t in wanted) + "\n\n", encoding="utf-8")
    assert load_texts(str(path), ("en",))[0] == wanted


def test_the_banks_texts_are_its_training_conversations():
    texts, sha = load_texts("bank", ("en", "zh"))
    assert sha == training_bank.bank_sha256() and texts[6] == texts[6] and texts[6] != texts[8]
    assert texts[6] == training_bank.sample_conversation(random.Random("text/6"), "en", "train")["conversation"]
    assert any("\u4e00" <= c <= "\u9fff" for c in texts[7]) and not any("\u4e00" <= c <= "\u9fff" for c in texts[6])
    assert random.Random(0).choice(texts) == random.Random(0).choice(load_texts("bank", ("en", "zh"))[0])


BAD_FILES = {
    "none.txt": (None, ("none.txt", "no such file")),
    "empty.txt": (b" \n\n \n", ("empty.txt", "holds no text")),
    "empty.jsonl": (b"\n\n", ("empty.jsonl", "holds no text")),
    "latin.txt": ("caf\u00e9".encode("latin-1"), ("latin.txt", "UTF-8", "byte 3")),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": ', ("broken.jsonl", "line 3")),
    "other.jsonl": (b'{"text": "a"}\n{"words": "b"}\n', ("other.jsonl", "line 2", '"text"')),
    "number.jsonl": (b'{"text": 5}\n', ("number.jsonl", "line 1")),
    "list.jsonl": (b'["text"]\n', ("list.jsonl", "line 1")),
    "blank.jsonl": (b'{"text": "  "}\n', ("blank.jsonl", "line 1")),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_holds_no_texts_is_one_clear_line(name, tmp_path):
    content, named = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_texts(str(tmp_path / name), ("en",))
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in named)


CORPUS_ROWS = {"tinystories": ([{"text": "Once."}, {"text": " "}], ["Once."]),
               "longalpaca": ([{"instruction": "Read: a. What?", "output": "b", "input": "", "file": "x"}], ["Read: a. What?\nb"]),
               "no_robots": ([{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}], ["user: hi\nassistant: ho"])}


def test_an_installed_text_can_be_trained_on(monkeypatch):
    texts, sha = load_texts("distractors", ("en",))
    assert sha == training_data.BUILTIN["distractors"].sha256 and len(texts) > 10 and all(texts)
    monkeypatch.setitem(training_data.BUILTIN, "distractors", dataclasses.replace(training_data.BUILTIN["distractors"], sha256="0" * 64))
    with pytest.raises(UserError, match="--data distractors: what is installed gives another text"):
        load_texts("distractors", ("en",))


@pytest.mark.parametrize("name", training_data.CORPORA)
def test_a_corpus_of_the_hub_as_texts(name, monkeypatch):
    rows, texts = CORPUS_ROWS[name]
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **how: asked.append((name, how)) or datasets.Dataset.from_list(rows))
    assert load_texts(name, ("en",)) == (texts, hashlib.sha256("\0".join(texts).encode()).hexdigest())
    (hub, how), = asked
    assert hub.count("/") == 1 and how["split"].startswith("train") and re.fullmatch("[0-9a-f]{40}", how["revision"])


@pytest.mark.parametrize("error", [ConnectionError("no route\nto host"), datasets.exceptions.DatasetNotFoundError("gone"), ValueError("no cache of it"),
                                   datasets.exceptions.DatasetGenerationError("cut off"), OSError(28, "no space")])
def test_a_corpus_that_cannot_be_had_is_one_clear_line(error, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=f"--data tinystories: .*{type(error).__name__}.*--data bank") as found:
        load_texts("tinystories", ("en",))
    assert "\n" not in str(found.value)


def test_joined_rows_have_the_length_and_hold_whole_texts_between():
    texts = ["a short one", "x" * 40, "z" * 31]
    dataset = TextDataset(TOKENIZER, texts, 3, 4, 100, seed=0, joined=True)
    rows = [TOKENIZER.decode(row) for u in range(3) for row in dataset[u]]
    assert {len(row) for row in rows} == {100} and len(set(rows)) > 1
    assert all(part in texts for row in rows for part in row.split("\n\n")[:-1])
    assert list(batches(dataset, 2)) == [dataset[u] for u in range(3)]
