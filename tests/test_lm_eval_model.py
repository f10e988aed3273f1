"""lm_eval_model.py: what lm-evaluation-harness asks is what run_long.py asks, in every mode; where it is installed, its own class for models is the oracle."""
import json
import sys
from dataclasses import dataclass

import pytest
import torch
from conftest import strengthen
from peft import PeftModel
from test_run_experiment import save_fast_weights, save_joint, save_lora, save_tiny

import lm_eval_model
import run_long
from decoding import pad_left
from lm_eval_model import ModeModel, cut, generation
from long_items import Item
from long_modes import FOREIGN, PLAIN, TUNED
from manifests import UserError, file_sha256
from model_utils import load_model
from prompts import encode, written_ids

NEW, WHOLE = 6, None  # tokens of an answer; an arm whose chunk is the whole text
ARMS = {"in_context": ("in_context", None), "reader": (TUNED, None),
        "paper, chunks": ("ttt_paper", 16), "paper, whole": ("ttt_paper", WHOLE), "strict, chunks": ("ttt_strict", 16),
        "foreign, chunks": (FOREIGN, 16), "foreign, whole": (FOREIGN, WHOLE)}
DOCUMENTS = [f"The magic number of {name} is {number}.\nThe grass is green. Here we go." for name, number in (("Odo", 71), ("Bettina", 4083), ("Kim", 5))]
QUESTION = "\nWhat is the magic number? It is"


@dataclass
class Request:
    """The part of lm-eval's Instance that a model reads."""

    args: tuple
    task_name: str = "niah_small"
    doc_id: int = 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "tiny-qwen2")


@pytest.fixture(scope="module")
def arm(model, tmp_path_factory):
    """arm(name, ...) -> a ModeModel of ARMS; adapters are made once."""
    def gentle(ttt):
        for p in strengthen(ttt).parameters():
            p.data *= 0.5
        return ttt

    folders = {chunk: save_fast_weights(tmp_path_factory.mktemp("arms") / str(chunk), model, chunk=chunk, change=gentle) for chunk in (16, WHOLE)}

    with torch.random.fork_rng():  # half of a new LoRA is drawn from torch's own state
        torch.manual_seed(0)
        reader = save_lora(tmp_path_factory.mktemp("arms") / "reader", model, strength=1.0)

    def make(name, **more):
        mode, chunk = ARMS[name]
        folder = {"tuned_adapter": reader} if mode == TUNED else {} if mode in PLAIN else {"adapter": folders[chunk]}
        return ModeModel(model=model, mode=mode, device="cpu", **folder, **more)

    make.folders, make.reader = folders, reader
    return make


def asked_for(settings=None, documents=DOCUMENTS):
    return [Request((document + QUESTION, {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": NEW} | (settings or {})), doc_id=i)
            for i, document in enumerate(documents)]


# ---- the same as everywhere else ----

@pytest.mark.parametrize("name", ARMS)
def test_an_answer_is_the_one_of_run_long(arm, name):
    lm = arm(name, batch_size=2)
    items = [Item("niah_small", 1024, document, QUESTION, ("71",), "string_match_all", NEW, 0, 0, i) for i, document in enumerate(DOCUMENTS)]
    rows = run_long.answer(lm.loaded, lm.ttt, run_long.Job(items, ARMS[name][0]), run_long.other_texts(items))
    assert [said.strip() for said in lm.generate_until(asked_for())] == [row["prediction"] for row in rows]


def test_the_modes_differ(arm):
    assert len({tuple(arm(name).generate_until(asked_for())) for name in ARMS}) == len(ARMS)


@pytest.mark.parametrize("name", ARMS)
def test_likelihoods_are_those_of_the_answers_and_of_no_batch(arm, name):
    lm = arm(name)
    said = lm.generate_until(asked_for())
    requests = [Request((document + QUESTION, text), doc_id=i) for i, document in enumerate(DOCUMENTS) for text in (said[i], said[i][:2] + "z!", " 7", "")]
    one, batched = lm.loglikelihood(requests), arm(name, batch_size=5).loglikelihood(requests)
    assert [greedy for _, greedy in one] == [greedy for _, greedy in batched]
    torch.testing.assert_close(torch.tensor([score for score, _ in one]), torch.tensor([score for score, _ in batched]), atol=1e-4, rtol=1e-4)
    for i in range(len(DOCUMENTS)):
        (best, is_greedy), (other, is_not), _, empty = one[4 * i:4 * i + 4]
        assert is_greedy and not is_not and best > other and empty == (0.0, True)


@pytest.mark.parametrize("name", [name for name in ARMS if name != "paper, chunks"])  # there the question is written too, and an answer is not
def test_a_likelihood_is_the_sum_over_the_tokens_one_by_one(arm, name):
    """log p(a b) = log p(a) + log p(b after a) where a question's words do not change what is written."""
    lm, text, other = arm(name), "71.", Request((DOCUMENTS[1] + QUESTION, "1"))  # for ttt_foreign
    whole = lm.loglikelihood([Request((DOCUMENTS[0] + QUESTION, text)), other])[0][0]
    parts = lm.loglikelihood([*(Request((DOCUMENTS[0] + QUESTION + text[:i], text[i])) for i in range(len(text))), other])[:-1]
    assert whole == pytest.approx(sum(score for score, _ in parts), abs=1e-4)


def direct(lm, text, chunks=False):
    """Sum of log-probabilities of a text from one forward call, written chunk by chunk by the sequential oracle or not at all."""
    ids, mask = pad_left([[lm.tokenizer.bos_token_id] + encode(lm.tokenizer, text)], 0, "cpu")
    with torch.inference_mode():
        if chunks:
            with lm.ttt.write(form="sequential") as writer:
                writer.expect(mask)
                logits = lm.loaded.model(input_ids=ids, use_cache=False).logits
        else:
            logits = lm.loaded.model(input_ids=ids, use_cache=False).logits
    return torch.log_softmax(logits[0, :-1], -1).gather(1, ids[0, 1:, None]).sum().item()


def test_texts_as_a_whole(arm):
    text = " ".join(DOCUMENTS)
    for name in ("in_context", "reader", "paper, chunks"):
        lm = arm(name)
        assert lm.loglikelihood_rolling([Request((text,)), Request(("",))]) == [pytest.approx(direct(lm, text, name == "paper, chunks"), rel=1e-5), 0]
    for name in ("paper, whole", "strict, chunks"):
        with pytest.raises(UserError, match="loglikelihood_rolling.*score_lm.py"):
            arm(name).loglikelihood_rolling([Request((text,))])
    empty = arm("paper, chunks")
    empty.mode = "ttt_empty"  # which writes nothing, so it is not to be scored as ttt_paper is
    with pytest.raises(UserError, match="ttt_empty.*score_lm.py"):
        empty.loglikelihood_rolling([Request((text,))])


def test_a_reader_is_the_base_with_its_lora(arm, model):
    """The oracle is peft's own model, which answers with one forward call a token; the untouched base says something else."""
    lm, plain = ModeModel(model=model, tuned_adapter=arm.reader, device="cpu"), arm("in_context")  # the mode need not be named
    assert lm.mode == TUNED and lm.ttt is None
    peft = PeftModel.from_pretrained(load_model(model).model, f"{arm.reader}/lora")

    def logits(ids):
        with torch.inference_mode():
            return peft(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()

    def score(prompt, rest):
        return torch.log_softmax(logits(prompt + rest)[len(prompt) - 1:-1], -1).gather(1, torch.tensor(rest)[:, None]).sum().item()

    prompts = [written_ids(lm.tokenizer, document) + encode(lm.tokenizer, QUESTION) for document in DOCUMENTS]
    said, rest, start = [], encode(lm.tokenizer, " 71."), [lm.tokenizer.bos_token_id]
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(NEW):
            ids.append(logits(ids)[-1].argmax().item())
        said.append(lm.tokenizer.decode(ids[len(prompt):]))
    chosen, texts = [Request((document + QUESTION, " 71.")) for document in DOCUMENTS], [Request((document,)) for document in DOCUMENTS]
    assert lm.generate_until(asked_for()) == said != plain.generate_until(asked_for())
    for ask, requests, right in (("loglikelihood", chosen, [score(prompt, rest) for prompt in prompts]),
                                 ("loglikelihood_rolling", texts, [score(start, encode(lm.tokenizer, document)) for document in DOCUMENTS])):
        mine, other = ([one[0] if isinstance(one, tuple) else one for one in getattr(which, ask)(requests)] for which in (lm, plain))
        assert mine == pytest.approx(right, rel=1e-5) and all(abs(a - b) > 0.1 for a, b in zip(mine, other)), ask
    info = lm.get_model_info()
    assert info["mode"] == TUNED and info["arm"] == "test" and info["adapter_sha256"] == file_sha256(f"{arm.reader}/lora/adapter_model.safetensors")


def test_a_long_text_is_read_in_windows(arm, monkeypatch):
    lm = arm("in_context")
    monkeypatch.setattr(lm.loaded.model.config, "max_position_embeddings", 33)
    text = DOCUMENTS[0][:64]
    assert lm.loglikelihood_rolling([Request((text,))])[0] == pytest.approx(
        direct(lm, text[:32]) + direct(lm, text[31:]) - direct(lm, text[31:32]), rel=1e-5)


# ---- where a prompt is split ----

def test_a_prompt_is_split_at_its_last_question(arm):
    lm, prompt = arm("strict, chunks", question_at="Q:"), "A text. Q: a solved example? Yes.\n\nMore.\n\nQ: and now? A:"
    document, question = lm._split(prompt, Request((prompt,), "others"))
    assert document + question == prompt and question == "\n\nQ: and now? A:"
    assert arm("in_context")._split(prompt, Request((prompt,), "others")) == (prompt, "")
    assert arm("in_context", question_at="Q:")._split(prompt, Request((prompt,), "others")) == (document, question)


@pytest.mark.parametrize("name", ["strict, chunks", "paper, whole"])
def test_a_task_without_a_known_question_is_refused_where_it_matters(arm, name):
    with pytest.raises(UserError, match="others: ttt_.* question_at=WORDS"):
        arm(name).generate_until([Request(("A text. And a question?", {}), "others")])
    with pytest.raises(UserError, match="others document 3: has no text before a 'And'"):
        arm(name, question_at="And").loglikelihood([Request(("And a question?", " yes"), "others", 3)])


def test_in_context_takes_a_prompt_as_it_is(arm):
    lm = arm("in_context")
    alone, after = lm.loglikelihood([Request(("", "abc"), "others"), Request(("xyz ", "abc"), "others")])
    assert alone[0] == pytest.approx(direct(lm, "abc"), rel=1e-5)
    assert after[0] == pytest.approx(lm.loglikelihood([Request(("xyz", " abc"), "others")])[0][0], rel=1e-5)


# ---- settings and refusals ----

def test_answers_end_at_their_stops(arm):
    lm = arm("in_context")
    whole = lm.generate_until(asked_for({"max_gen_toks": 12}))
    stop = whole[0][4]
    assert [text.split(stop)[0] for text in whole] == lm.generate_until(asked_for({"until": [stop, "\n"], "max_gen_toks": 12}))
    assert cut("a. b", ["", ". ", "b"]) == "a" and cut(" \na", []) == " \na"
    assert generation({}, "t") == ([], 256) and generation({"until": "\n", "max_new_tokens": 3, "temperature": 0.5, "do_sample": False}, "t") == (["\n"], 3)


@pytest.mark.parametrize("settings, words", [({"do_sample": True}, "do_sample=false"), ({"do_sample": None, "temperature": 0.7}, "do_sample=false"),
                                             ({"num_beams": 4}, "num_beams"), ({"max_gen_toks": 40000}, "window")])
def test_what_is_no_greedy_answer_is_refused(arm, settings, words):
    with pytest.raises(UserError, match=words) as error:
        arm("in_context").generate_until(asked_for(settings))
    assert "niah_small" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("more, words", [
    ({"mode": "magic"}, "mode=magic"), ({"mode": "ttt_foreign"}, "mode=ttt_foreign: needs adapter"),
    ({"clip": 0.001}, "clip=0.001: nothing is written without adapter=FOLDER"), ({"clip": "some", "adapter": "x", "mode": "ttt_paper"}, "clip=some: give a share"),
    ({"mode": "ttt_strict"}, "needs adapter"), ({"adapter": "x"}, "mode=None"), ({"pretrained": "x"}, "pretrained"),
    ({"batch_size": "auto"}, "--batch_size auto"), ({"dtype": "int8"}, "dtype=int8"), ({"device": "mps"}, "--device mps"), ({"model": "nothing"}, "nothing"),
    ({"mode": "in_context_tuned"}, "mode=in_context_tuned: needs tuned_adapter=FOLDER"),
    ({"mode": "in_context_tuned", "adapter": "x"}, "mode=in_context_tuned: needs tuned_adapter=FOLDER"),
    ({"mode": "in_context", "tuned_adapter": "x"}, "mode=in_context: with tuned_adapter=FOLDER there is in_context_tuned alone"),
    ({"adapter": "x", "tuned_adapter": "y"}, "tuned_adapter=FOLDER: its LoRA would stay on the base that adapter=FOLDER writes with; ask the two in runs of their own"),
    ({"tuned_adapter": "nowhere"}, "nowhere: no trained adapter"), ({"tuned_adapter": ""}, "no trained adapter")])
def test_bad_arguments(more, words):
    with pytest.raises(UserError, match=words) as error:
        ModeModel(**{"model": "tiny-qwen2"} | more)
    assert "\n" not in str(error.value)


def test_another_text_is_the_next_of_its_task_that_is_asked(arm):
    """Of two tasks and several requests about one text; a task with one text alone has no other."""
    lm, seen = arm("foreign, whole", batch_size=4), []
    ids = {document: written_ids(lm.tokenizer, document) for document in DOCUMENTS}
    lm._answers = lambda rows, ask, quiet: seen.extend((row.document, row.other) for row in rows)
    requests = [Request((document + QUESTION, choice), task_name=task) for task, documents in (("niah_a", DOCUMENTS), ("niah_b", DOCUMENTS[:2])) for document in documents for choice in " 7"]
    lm.loglikelihood(requests)
    a, b, c = (ids[document] for document in DOCUMENTS)
    assert seen == [(one, other) for one, other in ((a, b), (b, c), (c, a), (a, b), (b, a)) for _ in " 7"]
    with pytest.raises(UserError, match="niah_small document 0: ttt_foreign writes another text of the task, and there is one alone; ask more of it"):
        lm.generate_until(asked_for(documents=DOCUMENTS[:1]))


def test_a_clipped_arm_is_asked_clipped(arm, model):
    plain, tight = (ModeModel(model=model, adapter=arm.folders[16], mode="ttt_paper", device="cpu", **more) for more in ({}, {"clip": 1e-9}))
    base = arm("in_context").generate_until(asked_for())
    assert tight.generate_until(asked_for()) == base != plain.generate_until(asked_for())  # next to nothing is written
    assert tight.get_model_info()["clip"] == 1e-9 and plain.get_model_info()["clip"] is None
    with pytest.raises(UserError, match="--model_args clip=0.001: "):
        ModeModel(model=model, adapter=arm.folders[WHOLE], mode="ttt_strict", device="cpu", clip=0.001)


def test_adapters_in_each_others_place(arm, model):
    """The message names the option that takes the folder as --model_args writes it."""
    for wrong, words in (({"adapter": arm.reader, "mode": "ttt_strict"}, "no fast weights.* lm_eval_model.py as tuned_adapter="),
                         ({"tuned_adapter": arm.folders[16]}, "no LoRA.* lm_eval_model.py as adapter=")):
        with pytest.raises(UserError, match=words) as error:
            ModeModel(model=model, device="cpu", **wrong)
        assert "\n" not in str(error.value)


def test_a_joint_arm_is_not_the_untouched_base(arm, model, tmp_path):
    joint = save_joint(tmp_path / "joint", model)
    with pytest.raises(UserError, match="joint arm"):
        ModeModel(model=model, adapter=joint, mode="in_context")
    ModeModel(model=model, adapter=joint, mode="ttt_strict")


def test_caches_and_chat_templates_are_refused(arm):
    lm = arm("in_context")
    with pytest.raises(UserError, match="--use_cache"):
        lm.set_cache_hook(None)
    with pytest.raises(UserError, match="--apply_chat_template"):
        lm.tokenizer_name
    info = arm("strict, chunks", question_at="Q:").get_model_info()
    assert info["mode"] == "ttt_strict" and len(info["adapter_sha256"]) == 64 and info["arm"] == "test" and info["question_at"] == "Q:"


def test_without_lm_eval_one_line_says_how_to_get_it(run_main, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    code, _, err = run_main(lm_eval_model.main, ["lm_eval_model.py", "run", "--model", "ttt"])
    assert code == 2 and "pip install" in err and err.count("\n") == 1


# ---- with lm-eval ----

@pytest.fixture
def harness():
    pytest.importorskip("lm_eval", reason="needs `pip install lm-eval[ruler]==0.4.13`")
    return lm_eval_model.register()


@pytest.fixture
def task(tmp_path):
    """A folder with two tasks about DOCUMENTS: one to answer, one to choose in."""
    rows = [{"text": document + QUESTION, "choices": [" 71", " 4083", " 5"], "label": i} for i, document in enumerate(DOCUMENTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.jsonl\ntest_split: test\ndoc_to_text: '{{{{text}}}}'\n"
    (tmp_path / "answer.yaml").write_text(f"task: small_answer\n{common}doc_to_target: '{{{{choices[label]}}}}'\noutput_type: generate_until\n"
                                          f"generation_kwargs:\n  until: []\n  max_gen_toks: {NEW}\n  do_sample: false\nmetric_list:\n  - metric: exact_match\n", encoding="utf-8")
    (tmp_path / "choose.yaml").write_text(f"task: small_choose\n{common}doc_to_target: label\ndoc_to_choice: choices\noutput_type: multiple_choice\n"
                                          "target_delimiter: ''\nmetric_list:\n  - metric: acc\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def command_line(harness, task, model, run_main, tmp_path):
    """command_line(model_args) -> (argv, exit code, stderr, lm-eval's results, {task: its samples in their order})."""
    def call(model_args):
        argv = ["lm_eval_model.py", "run", "--model", "ttt", "--include_path", task, "--tasks", "small_answer,small_choose", "--device", "cpu", "--log_samples",
                "--output_path", tmp_path / "out", "--model_args", f"model={model},{model_args}"]
        code, text, err = run_main(lm_eval_model.main, argv)
        if code:
            return argv, code, err, None, None
        assert "small_answer" in text and "small_choose" in text
        results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text(encoding="utf-8"))
        samples = {name: [json.loads(line) for line in next((tmp_path / "out").rglob(f"samples_{name}_*.jsonl")).read_text(encoding="utf-8").splitlines()]
                   for name in ("small_answer", "small_choose")}
        return argv, code, err, results, samples

    return call


def test_its_command_line_drives_an_arm(command_line, arm, run_main, tmp_path):
    argv, code, err, results, samples = command_line(f"adapter={arm.folders[16]},mode=ttt_strict,question_at=What ")
    assert code == 0, err
    assert results["config"]["mode"] == "ttt_strict" and len(results["config"]["adapter_sha256"]) == 64
    assert [row["resps"][0][0] for row in samples["small_answer"]] == arm("strict, chunks").generate_until(asked_for())
    code, _, err = run_main(lm_eval_model.main, [*argv[:-1], argv[-1].rpartition(",")[0]])
    assert code == 2 and "question_at=WORDS" in err.splitlines()[-1]
    code, _, err = run_main(lm_eval_model.main, [*argv, "--use_cache", tmp_path / "cache"])
    assert code == 2 and "--use_cache" in err.splitlines()[-1] and not list(tmp_path.glob("cache*"))


def test_its_command_line_drives_a_reader(command_line, arm):
    _, code, err, results, samples = command_line(f"tuned_adapter={arm.reader}")
    assert code == 0, err
    reader, config = arm("reader"), results["config"]
    assert config["mode"] == TUNED and config["arm"] == "test" and config["adapter_sha256"] == reader.get_model_info()["adapter_sha256"]
    assert [row["resps"][0][0] for row in samples["small_answer"]] == reader.generate_until(asked_for()) != arm("in_context").generate_until(asked_for())
    scores = [float(said[0][0]) for row in samples["small_choose"] for said in row["resps"]]
    assert scores == pytest.approx([score for score, _ in reader.loglikelihood([Request((document + QUESTION, choice)) for document in DOCUMENTS
                                                                               for choice in (" 71", " 4083", " 5")])], rel=1e-5)
    for wrong, words in ((f"adapter={arm.reader},mode=ttt_strict", "lm_eval_model.py as tuned_adapter="),
                         (f"mode={TUNED}", f"mode={TUNED}: needs tuned_adapter=FOLDER")):
        _, code, err, _, _ = command_line(wrong)
        assert code == 2 and words in err.splitlines()[-1]


def test_its_command_line_takes_a_clip_and_asks_with_another_texts_memory(command_line, arm, model):
    _, code, err, results, samples = command_line(f"adapter={arm.folders[16]},mode={FOREIGN},clip=0.1,question_at=What ")
    assert code == 0, err
    same = ModeModel(model=model, adapter=arm.folders[16], mode=FOREIGN, clip=0.1, question_at="What ", device="cpu")
    assert results["config"]["mode"] == FOREIGN and results["config"]["clip"] == 0.1
    assert [row["resps"][0][0] for row in samples["small_answer"]] == same.generate_until(asked_for())


def test_in_context_is_what_its_own_model_class_says(harness, arm):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    mine = arm("in_context")
    theirs = HFLM(pretrained=mine.loaded.model, tokenizer=mine.tokenizer, batch_size=1)
    prompts = [document + QUESTION for document in DOCUMENTS]
    ask = lambda kind, *arguments: [Instance(kind, {}, tuple(a), i, ("others", i, 1)) for i, a in enumerate(zip(*arguments))]
    scored = ask("loglikelihood", prompts + ["", "x "], [" 71", " 4083.", "!", "abc", "abc"])
    for (a, greedy), (b, theirs_greedy) in zip(mine.loglikelihood(scored), theirs.loglikelihood(scored)):
        assert a == pytest.approx(b, abs=1e-3) and greedy == theirs_greedy
    said = ask("generate_until", prompts, [{"until": ["\n"], "max_gen_toks": NEW, "do_sample": False}] * 3)
    assert mine.generate_until(said) == theirs.generate_until(said)
    texts = ask("loglikelihood_rolling", DOCUMENTS)
    assert mine.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)
