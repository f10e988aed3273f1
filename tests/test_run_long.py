"""Long-text tasks on tiny models in the modes of run_long.py (ttt_empty: test_study.py), and the report: what a mode may see, what a gain is, and that nothing is mixed up."""
import hashlib
import json
import shutil

import pytest
import torch
from conftest import strengthen, token_rows
from test_run_experiment import manifest, save_fast_weights, save_lora, save_tiny

import evaluate
import long_figures
import long_modes
import report_long
import run_long
from decoding import greedy, prefill, write_rows
from in_place_ttt import InPlaceTTT, TTTConfig
from intervals import Bootstrap
from long_ruler import QUERIES
from long_tasks import make, write_items
from model_utils import load_adapter, load_model, save_adapter
from objectives import answer_logits
from prompts import encode
from training_data import Example, pack

LENGTH = 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", "tiny-qwen2")


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """A chunked arm with random fast weights, small enough that sixteen chunks do not blow up."""
    def gentle(ttt):
        for p in strengthen(ttt).parameters():
            p.data *= 0.3
        return ttt

    return save_fast_weights(tmp_path_factory.mktemp("arms") / "gentle", model, chunk=64, change=gentle)


@pytest.fixture
def long_run(run_main, model, tmp_path):
    def call(*more, out="r"):
        code, text, err = run_main(run_long.main, ["run_long.py", "--model", model, "--tasks", "mqar", "--lengths", LENGTH, "--count", 2,
                                                   "--device", "cpu", "--out", tmp_path / out, *more])
        rows = tmp_path / out / "predictions.jsonl"
        return code, text, err, [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else []

    return call


def said(rows, mode):
    return {row["sample_id"]: row["prediction"] for row in rows if row["condition"] == mode}


# ---- the modes ----

def test_every_item_is_asked_once_in_every_mode(long_run, adapter):
    code, text, err, rows = long_run("--adapter", adapter)
    assert code == 0 and len(rows) == 2 * 3 and "report_long.py" in text, err
    assert all(0 <= row["score"] <= 1 and row["prompt_tokens"] <= LENGTH and row["seconds"] > 0 for row in rows)
    assert len({row["document"] for row in rows}) == 1 and len({row["sample_id"] for row in rows}) == 2  # two questions about one text
    assert said(rows, "in_context") != said(rows, "ttt_paper") != said(rows, "ttt_strict")
    assert said(long_run(out="base")[3], "in_context") == said(rows, "in_context")  # the untouched base's, adapter or not


def test_untrained_fast_weights_change_nothing_and_strict_asks_the_question_alone(long_run, model, tmp_path):
    plain = save_fast_weights(tmp_path / "plain", model, chunk=64, change=lambda ttt: [p.data.zero_() for p in ttt.parameters()] and ttt)
    rows = long_run("--adapter", plain)[3]
    assert said(rows, "ttt_paper") == said(rows, "in_context")
    loaded = load_model(model)
    for item in make("mqar", loaded.tokenizer, LENGTH, 2, 0):
        with torch.inference_mode():
            logits, past = prefill(loaded.model, [encode(loaded.tokenizer, item.question)], loaded.tokenizer.pad_token_id)
            alone = greedy(loaded.model, loaded.tokenizer, logits, past, item.new_tokens, line=False)
        assert said(rows, "ttt_strict")[run_long.name_of(item)] == alone[0]


def test_paper_mode_writes_the_prompt_while_it_is_read_and_is_frozen_while_it_answers(long_run, model, adapter):
    rows = long_run("--adapter", adapter, "--modes", "ttt_paper")[3]
    loaded = load_model(model)
    ttt, _ = load_adapter(adapter, loaded)
    item, pad = make("mqar", loaded.tokenizer, LENGTH, 1, 0)[0], loaded.tokenizer.pad_token_id
    prompt = encode(loaded.tokenizer, item.document) + encode(loaded.tokenizer, item.question)
    half = LENGTH // 2
    with torch.inference_mode():
        with ttt.write(form="sequential") as writer:  # the oracle: a running dense W, chunk after chunk
            _, past = prefill(loaded.model, [prompt[:half]], pad, session=writer)
        with ttt.write(writer.memory()) as writer:
            logits, past = prefill(loaded.model, [prompt[half:]], pad, past, writer)
        memory = writer.memory()
        with ttt.read(memory) as session:
            answer = greedy(loaded.model, loaded.tokenizer, logits, past, item.new_tokens, session, line=False)
    assert said(rows, "ttt_paper")[run_long.name_of(item)] == answer[0]


@pytest.mark.parametrize("start", [[], [255]], ids=["no start", "start"])
def test_a_question_about_a_dropped_text_is_read_as_in_training(start, family, attach, monkeypatch):
    """A base's start token (Gemma has one) stands before the question and is no part of what its read stream looks back on."""
    monkeypatch.setattr(long_modes, "start_ids", lambda tokenizer: start)
    ttt = attach(family, layers=(1, 2), chunk=None, codes=True, write_attention=2, read_attention=2, deep=True, blind=True, target="both",
                 unit_targets=True, gate=True, rule="ridge").requires_grad_(False)
    *texts, first, second = token_rows([11, 7, 5, 9])
    documents, questions, pad = [start + text for text in texts], [first, second], family.tokenizer.pad_token_id
    packed = pack([Example([], start, [(question, [1])]) for question in questions], pad, "cpu")
    with torch.no_grad():
        memory = write_rows(family.model, ttt, documents, pad)[0]
        with ttt.read(memory) as reader:
            reader.expect(torch.ones_like(packed.ids), packed.position, packed.question)
            trained = answer_logits(family, packed)
        with long_modes.asked(family.model, family.tokenizer, ttt, "ttt_strict", documents, questions) as (logits, _, _):
            torch.testing.assert_close(logits.float(), trained, atol=1e-4, rtol=1e-4)


def test_a_tuned_reader_is_a_mode_of_its_own(long_run, adapter, model, tmp_path):
    """in_context by a base with a LoRA; the untouched base's rows are what it is held against."""
    plain = said(long_run()[3], "in_context")
    for name, strength in (("zero", 0.0), ("strong", 3.0)):
        code, _, err, rows = long_run("--tuned-adapter", save_lora(tmp_path / name, model, strength), out=f"asked-{name}")
        assert code == 0, err
        run = json.loads((tmp_path / f"asked-{name}/run.json").read_text(encoding="utf-8"))
        assert run["tuned_adapter"] == str(tmp_path / name) and run["adapter"] is None and run["identity"]["tuned_adapter_sha256"] and not run["frozen"]
        assert {row["condition"] for row in rows} == {"in_context_tuned"}
        assert (said(rows, "in_context_tuned") == plain) == (strength == 0)
    assert "--tuned-adapter" in long_run("--modes", "in_context_tuned", out="none")[2]
    assert "in_context_tuned alone" in long_run("--tuned-adapter", tmp_path / "zero", "--modes", "in_context", out="none")[2]
    assert "runs of their own" in long_run("--tuned-adapter", tmp_path / "zero", "--adapter", adapter, out="none")[2]
    assert "holds no LoRA" in long_run("--tuned-adapter", adapter, out="none")[2]


def test_a_dropped_text_can_be_read_slot_by_slot_where_slots_were_solved_for(long_run, adapter, model, tmp_path):
    loaded, config = load_model(model), TTTConfig((1, 2), None, unit_keys=True, rule="ridge", unit_targets=True)
    save_adapter(tmp_path / "solved", strengthen(InPlaceTTT(loaded.model, config)), manifest(loaded, config))
    code, _, err, rows = long_run("--adapter", tmp_path / "solved", "--modes", "ttt_strict,ttt_sharp")
    assert code == 0 and len(rows) == 2 * 2 and said(rows, "ttt_strict") != said(rows, "ttt_sharp"), err
    assert report_long.main([str(tmp_path / "r"), "--out", str(tmp_path / "report")]) == 0
    code, _, err, _ = long_run("--adapter", adapter, "--modes", "ttt_sharp", out="sum")
    assert code == 2 and "--modes ttt_sharp: test has no slots that were solved for" in err


@pytest.mark.parametrize("chunk", [64, None], ids=["chunks", "whole"])
def test_a_prompt_can_be_read_with_what_another_text_left(chunk, long_run, adapter, model, tmp_path):
    arm = adapter if chunk else save_fast_weights(tmp_path / "whole", model, chunk=None)
    count = QUERIES + 1  # of two texts
    code, _, err, rows = long_run("--adapter", arm, "--modes", "ttt_foreign", "--count", count)
    assert code == 0, err
    loaded = load_model(model)
    ttt, _ = load_adapter(arm, loaded)
    items, pad = make("mqar", loaded.tokenizer, LENGTH, count, 0), loaded.tokenizer.pad_token_id
    assert items[0].document == items[QUERIES - 1].document != items[QUERIES].document
    for item, other in ((items[0], items[QUERIES]), (items[1], items[QUERIES]), (items[QUERIES], items[0])):
        document, question, foreign = (encode(loaded.tokenizer, text) for text in (item.document, item.question, other.document))
        with torch.inference_mode():
            memory, _ = write_rows(loaded.model, ttt, [foreign], pad)
            past = None if chunk else prefill(loaded.model, [document], pad)[1]  # an arm of whole texts reads its own as the base alone does
            with ttt.read(memory) as session:
                logits, past = prefill(loaded.model, [document + question if chunk else question], pad, past, session)
                answer = greedy(loaded.model, loaded.tokenizer, logits, past, item.new_tokens, session, line=False)
        assert said(rows, "ttt_foreign")[run_long.name_of(item)] == answer[0]
    code, _, err, _ = long_run("--adapter", arm, "--modes", "ttt_foreign", out="one")
    assert code == 2 and "--modes ttt_foreign: mqar at 1024 tokens has one text alone" in err and not (tmp_path / "one").exists()


def test_an_answer_does_not_depend_on_its_batch(long_run, adapter):
    together = long_run("--adapter", adapter)[3]
    alone = long_run("--adapter", adapter, "--batch-tokens", 1, out="alone")[3]
    assert {row["batch"] for row in together} == {2} and {row["batch"] for row in alone} == {1}
    for mode in run_long.MODES:
        assert said(together, mode) == said(alone, mode)


def test_an_answer_may_have_several_lines(long_run, adapter, monkeypatch):
    heard = []
    monkeypatch.setattr(run_long, "greedy", lambda *a, **k: (heard.append(k["line"]), ["1. one\n2. two"] * 2)[1])
    rows = long_run("--adapter", adapter)[3]
    assert heard == [False] * 3 and all(row["prediction"] == "1. one\n2. two" for row in rows)


def test_a_write_can_be_clipped_down_to_the_base(long_run, adapter, model, tmp_path):
    rows = long_run("--adapter", adapter, "--modes", "in_context,ttt_paper", "--clip", "1e-12")[3]
    assert said(rows, "ttt_paper") == said(rows, "in_context") and json.loads((tmp_path / "r/run.json").read_text(encoding="utf-8"))["clip"] == 1e-12
    assert "another clip" in long_run("--adapter", adapter, "--resume")[2]
    code, _, err, _ = long_run("--adapter", adapter, "--clip", "inf", out="endless")
    assert code == 2 and "--clip inf" in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "endless").exists()
    free = said(long_run("--adapter", adapter, "--modes", "ttt_paper", out="free")[3], "ttt_paper")
    assert said(long_run("--adapter", adapter, "--modes", "ttt_paper", "--clip", "1e9", out="wide")[3], "ttt_paper") == free != said(rows, "ttt_paper")
    whole = save_fast_weights(tmp_path / "whole", model, chunk=None)
    code, _, err, _ = long_run("--adapter", whole, "--clip", 0.1, out="none")
    assert code == 2 and "--clip 0.1: clip limits what each chunk adds" in err and len(err.strip().splitlines()) == 1


def test_an_interrupted_run_goes_on(long_run, adapter, monkeypatch, tmp_path):
    whole = long_run("--adapter", adapter, out="whole")[3]
    calls, answer = iter(range(99)), run_long.answer
    with monkeypatch.context() as patch:
        patch.setattr(run_long, "answer", lambda *a: answer(*a) if next(calls) < 2 else (_ for _ in ()).throw(KeyboardInterrupt))
        code, _, err, rows = long_run("--adapter", adapter)
    assert code == 130 and "--resume" in err and 0 < len(rows) < len(whole)
    with (tmp_path / "r/predictions.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"condition": "ttt_str')  # a row that a kill cut short
    code, _, err, rows = long_run("--adapter", adapter, "--resume")
    assert code == 0 and {(r["condition"], r["sample_id"]): r["prediction"] for r in rows} == {(r["condition"], r["sample_id"]): r["prediction"] for r in whole}, err
    code, _, err, _ = long_run("--adapter", adapter, "--resume", "--seed", 1)
    assert code == 2 and "another item_seed" in err


def test_verify_holds_a_run_to_its_manifest(long_run, adapter, tmp_path, capsys):
    long_run("--adapter", adapter)
    assert evaluate.main(["--verify", str(tmp_path / "r")]) == 0
    said = capsys.readouterr().out
    assert f"pass  {tmp_path / 'r/predictions.jsonl'}: 6 rows" in said and f"ran with {adapter}" in said and "2 pass, 0 note, 0 FAIL" in said
    rows = tmp_path / "r/predictions.jsonl"
    rows.write_bytes(rows.read_bytes().replace(b'"mqar"', b'"mqaR"', 1))
    assert evaluate.main(["--verify", str(tmp_path / "r")]) == 1 and "cut short or changed" in capsys.readouterr().out


def test_a_length_beyond_the_window_is_left_out_and_said(long_run, tmp_path):
    code, text, _, rows = long_run("--lengths", "1024,65536")
    assert code == 0 and "left out: length 65536" in text and {row["length"] for row in rows} == {1024}
    assert json.loads((tmp_path / "r/run.json").read_text(encoding="utf-8"))["left_out"] == ["length 65536: the model's window is 32768 tokens"]
    code, _, err, _ = long_run("--lengths", "65536", out="none")
    assert code == 2 and "nothing to ask" in err and not (tmp_path / "none").exists()


def test_items_from_a_file_are_the_items_made_here(long_run, run_main, model, tmp_path):
    loaded, path = load_model(model), tmp_path / "items.jsonl"
    write_items(make("mqar", loaded.tokenizer, LENGTH, 2, 0), path)
    call = lambda out: run_main(run_long.main, ["run_long.py", "--model", model, "--items", path, "--device", "cpu", "--out", tmp_path / out])
    assert call("filed")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "filed/predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert said(rows, "in_context") == said(long_run()[3], "in_context")
    path.write_text(path.read_text(encoding="utf-8").replace('"tokens": ', '"tokens": 1'), encoding="utf-8")
    code, _, err = call("other")
    assert code == 2 and "line 1" in err and "tokenizer" in err and not (tmp_path / "other").exists()
    path.write_text('{"task": "mqar"}\n', encoding="utf-8")
    assert "no item" in call("broken")[2]


@pytest.mark.parametrize("change, said", [({"answers": "Turin"}, "list of texts"), ({"answers": []}, "empty"), ({"length": 0}, "length 0"), ({"new_tokens": 0}, "new_tokens 0"),
                                          ({"length": 5}, "length 5")])
def test_an_item_that_cannot_be_asked_is_refused_with_its_line(run_main, model, tmp_path, change, said):
    path = tmp_path / "items.jsonl"
    write_items(make("mqar", load_model(model).tokenizer, LENGTH, 1, 0), path)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change) + "\n", encoding="utf-8")
    code, _, err = run_main(run_long.main, ["run_long.py", "--model", model, "--items", path, "--device", "cpu", "--out", tmp_path / "r"])
    assert code == 2 and "items.jsonl line 1" in err and said in err and len(err.splitlines()) == 1 and not (tmp_path / "r").exists()


def test_names_given_twice_are_asked_once_and_another_source_is_not_gone_on_with(run_main, model, tmp_path):
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for text, words in zip(texts, ("The sea was calm that year. ", "Nobody came to the old house. ")):
        text.write_text(words * 400, encoding="utf-8")
    call = lambda text, *more: run_main(run_long.main, ["run_long.py", "--model", model, "--tasks", "niah_single_2,niah_single_2", "--source", f"niah_single_2={text}", "--lengths", "1024,1024",
                                                        "--modes", "in_context,in_context", "--count", 2, "--device", "cpu", "--out", tmp_path / "r", *more])
    assert call(texts[0])[0] == 0 and len((tmp_path / "r/predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    code, _, err = call(texts[1], "--resume")
    assert code == 2 and "niah_single_2-1024-s0-0" in err and "--source" in err and len(err.splitlines()) == 1
    run = json.loads((tmp_path / "r/run.json").read_text(encoding="utf-8"))
    assert run["complete"] and run["rows"] == 2
    code, _, err = run_main(run_long.main, ["run_long.py", "--model", model, "--tasks", "vt", "--source", f"niah_single_2={texts[0]}", "--device", "cpu", "--out", tmp_path / "n"])
    assert code == 2 and "niah_single_2 is not among --tasks vt" in err and not (tmp_path / "n").exists()


@pytest.mark.parametrize("more, named", [(["--modes", "ttt_strict"], "--adapter"), (["--modes", "magic"], "magic"), (["--count", "0"], "--count 0"), (["--workers", "0"], "--workers 0"),
                                         (["--lengths", "many"], "--lengths many"), (["--items", "some.jsonl"], "--items some.jsonl"), (["--tasks", "haystack"], "--tasks haystack"), (["--clip", "0.1"], "--clip 0.1"),
                                         (["--source", "typo=/nowhere"], "--source typo"), (["--source", "vt=/nowhere"], "needs no file")])
def test_bad_arguments(long_run, tmp_path, more, named):
    code, _, err, _ = long_run(*more)
    assert code == 2 and named in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "r").exists()


# ---- the report ----

def fake_run(folder, mode_scores, arm="arm", complete=True, sha="s", objective="recall", chunk=64, identity=None, peak=None, batch=1, window=32768):
    """mode_scores: {mode: {(task, length): scores}}."""
    folder.mkdir(parents=True)
    rows = [{"condition": mode, "sample_id": f"{task}-{length}-{i}", "document": f"{task}{i}", "task": task, "length": length, "prompt_tokens": length - 8, "score": score, "seconds": 1.0, "peak_gb": peak, "batch": batch}
            for mode, cells in mode_scores.items() for (task, length), scores in cells.items() for i, score in enumerate(scores)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({
        "arm": arm, "model": "tiny", "modes": sorted(mode_scores), "tasks": [], "lengths": [], "left_out": [], "window": window, "commit": "c", "command": "python run_long.py", "device": "cpu",
        "identity": {"model_sha256": sha, "dtype": "float32", "item_seeds": [0]} | (identity or {}), "complete": complete, "objective": objective, "chunk": chunk, "adapter": None, "rows": len(rows)}), encoding="utf-8")
    return folder


def cell(report, task, mode, arm=0):
    return next(c for c in report["arms"][arm]["cells"] if (c["task"], c["mode"]) == (task, mode))


def test_gains_are_paired_and_tasks_weigh_alike(tmp_path):
    base = {("a", 1024): [1.0, 0.0, 0.0, 1.0], ("b", 1024): [0.0] * 12}
    strict = {("a", 1024): [1.0, 1.0, 0.0, 1.0], ("b", 1024): [0.5] * 12}
    run = fake_run(tmp_path / "r", {"in_context": base, "ttt_strict": strict})
    assert report_long.main([str(run), "--out", str(tmp_path / "o")]) == 0
    report = json.loads((tmp_path / "o/report.json").read_text(encoding="utf-8"))
    assert cell(report, "a", "ttt_strict")["gain"] == 0.25 and cell(report, "a", "ttt_strict")["score"] == 0.75
    every = cell(report, report_long.ALL, "ttt_strict")
    assert every["score"] == pytest.approx((0.75 + 0.5) / 2) and every["gain"] == pytest.approx((0.25 + 0.5) / 2) and every["n"] == 16
    assert every["gain_ci"][0] <= every["gain"] <= every["gain_ci"][1]
    assert "gain" not in cell(report, "a", "in_context")
    assert (tmp_path / "o/figures/accuracy-tiny-chunks.png").stat().st_size > 10000 and (tmp_path / "o/figures/cost-tiny-chunks.png").exists()


def test_a_base_lends_its_rows_to_arms_of_the_same_weights_only(tmp_path):
    base = fake_run(tmp_path / "base", {"in_context": {("a", 1024): [1.0, 0.0, 1.0]}}, arm="base")
    mine = fake_run(tmp_path / "mine", {"ttt_strict": {("a", 1024): [1.0, 1.0]}})
    other = fake_run(tmp_path / "other", {"ttt_strict": {("a", 1024): [1.0, 1.0]}}, arm="other", sha="another")
    assert report_long.main([str(base), str(mine), str(other), "--out", str(tmp_path / "o")]) == 0
    report = json.loads((tmp_path / "o/report.json").read_text(encoding="utf-8"))
    assert cell(report, "a", "ttt_strict", 1)["gain"] == 0.5 and cell(report, "a", "ttt_strict", 1)["shared"] == 2
    lent = lambda report: [[run["lent_by"] for run in arm["runs"]] for arm in report["arms"]]
    assert "gain" not in cell(report, "a", "ttt_strict", 2) and lent(report) == [[[]], [["base"]], [[]]]
    again = fake_run(tmp_path / "again", {"ttt_paper": {("a", 1024): [1.0]}}, arm="again")
    assert report_long.main([str(mine), str(again), str(base), "--out", str(tmp_path / "p")]) == 0
    assert lent(json.loads((tmp_path / "p/report.json").read_text(encoding="utf-8"))) == [[["base"]], [["base"]], [[]]]


def test_each_folder_names_the_folders_whose_in_context_rows_serve_its_items(tmp_path):
    cells = lambda *lengths: {("a", length): [1.0, 0.0] for length in lengths}
    near, far = fake_run(tmp_path / "base", {"in_context": cells(1024, 2048)}, arm="base"), fake_run(tmp_path / "base-at-4096", {"in_context": cells(4096)}, arm="base")
    mine = [fake_run(tmp_path / name, {"ttt_paper": cells(*lengths)}) for name, lengths in (("mine", (1024, 2048)), ("mine-at-4096", (4096,)))]
    strict = fake_run(tmp_path / "mine-strict", {"ttt_strict": cells(1024, 4096)})
    both = fake_run(tmp_path / "both", {"in_context": cells(1024), "ttt_paper": cells(1024, 4096)}, arm="both")  # its own rows, and a base's
    assert report_long.main([*map(str, (near, far, *mine, strict, both)), "--out", str(tmp_path / "o")]) == 0
    named = {line.split(":")[0][2:]: line.split("in_context of ")[1:] for line in (tmp_path / "o/tables.md").read_text(encoding="utf-8").split("Runs:")[1].splitlines() if line}
    assert named == {"base": [], "base-at-4096": [], "mine": ["base"], "mine-at-4096": ["base-at-4096"], "mine-strict": ["base, base-at-4096"], "both": ["base-at-4096"]}


def test_what_a_memory_keeps_is_held_against_the_better_reader_of_the_same_items(tmp_path):
    cells = lambda *scores: {(task, 1024): score for task, score in zip(("niah_a", "mqar", "vt"), scores)}
    base = fake_run(tmp_path / "base", {"in_context": cells([1.0, 0.0], [0.5] * 3, [1.0, 1.0])}, arm="base")
    reader = fake_run(tmp_path / "reader", {"in_context_tuned": cells([1.0, 1.0], [0.8] * 3, [0.0, 0.5])}, arm="reader")
    mine = fake_run(tmp_path / "mine", {"ttt_strict": cells([1.0, 0.5], [0.6] * 3, [0.0, 0.0])})
    alone = fake_run(tmp_path / "alone", {"ttt_strict": cells([1.0, 0.5], [0.6] * 3, [0.0, 0.0])}, arm="alone", sha="another")
    assert report_long.main([str(base), str(reader), str(mine), str(alone), "--out", str(tmp_path / "o")]) == 0
    report = json.loads((tmp_path / "o/report.json").read_text(encoding="utf-8"))
    kept = lambda task: cell(report, task, "ttt_strict", 2)["kept"]
    assert [kept("niah_a"), kept("mqar"), kept("vt")] == pytest.approx([0.75 / 1, 0.6 / 0.8, 0])
    assert kept(report_long.RETRIEVAL) == pytest.approx((0.75 + 0.6) / (1 + 0.8)) and kept(report_long.ALL) == pytest.approx((0.75 + 0.6) / (1 + 0.8 + 0.25))
    low, high = cell(report, report_long.RETRIEVAL, "ttt_strict", 2)["kept_ci"]
    assert 0.5 < low < kept(report_long.RETRIEVAL) < high < 1
    assert cell(report, "vt", "ttt_strict", 2)["kept_n"] == 2
    less = fake_run(tmp_path / "less", {"in_context_tuned": cells([1.0], [0.8], [0.0])}, arm="less")  # a reader that was asked one item of each
    assert report_long.main([str(base), str(less), str(mine), "--out", str(tmp_path / "l")]) == 0
    held = json.loads((tmp_path / "l/report.json").read_text(encoding="utf-8"))
    assert cell(held, report_long.ALL, "ttt_strict", 2)["kept"] == pytest.approx((1 + 0.6) / (1 + 0.5 + 1)) and "(n 3)" in report_long.tables(held)
    nothing = fake_run(tmp_path / "nothing", {"in_context_tuned": cells([1.0], [0.8])}, arm="nothing")  # and one that was not asked a task
    assert report_long.main([str(base), str(nothing), str(mine), "--out", str(tmp_path / "n")]) == 0
    held = json.loads((tmp_path / "n/report.json").read_text(encoding="utf-8"))
    assert "kept" not in cell(held, report_long.ALL, "ttt_strict", 2) and cell(held, report_long.RETRIEVAL, "ttt_strict", 2)["kept_n"] == 2
    assert "kept" not in cell(report, "mqar", "ttt_strict", 3) and "kept" not in cell(report, "mqar", "in_context_tuned", 1)
    assert "kept by ttt_strict |" in report_long.tables(report) and [c["mode"] for c in report["arms"][2]["cells"] if c["task"] == "vt"] == ["in_context", "ttt_strict"]
    few = fake_run(tmp_path / "few", {"ttt_sharp": cells([1.0], [1.0], [0.0])})  # one item of each, of the same arm
    assert report_long.main([str(base), str(reader), str(mine), str(few), "--out", str(tmp_path / "q")]) == 0
    both = json.loads((tmp_path / "q/report.json").read_text(encoding="utf-8"))
    assert cell(both, report_long.ALL, "ttt_strict", 2)["n"] == 7 and cell(both, report_long.ALL, "ttt_sharp", 2)["n"] == 3
    assert "| mean over tasks | 1,024 | 7 (ttt_sharp 3) |" in report_long.tables(both) and "| vt | 1,024 | 2 (ttt_sharp 1) |" in report_long.tables(both)
    deaf = fake_run(tmp_path / "deaf", {"in_context": cells([0.0] * 2, [0.0] * 3, [0.0] * 2), "ttt_strict": cells([1.0] * 2, [1.0] * 3, [0.0] * 2)})
    assert report_long.main([str(deaf), "--out", str(tmp_path / "p")]) == 0  # a share of nothing is none
    assert "kept" not in cell(json.loads((tmp_path / "p/report.json").read_text(encoding="utf-8")), report_long.ALL, "ttt_strict")


def test_two_readers_are_held_apart_in_whatever_order_they_are_named(tmp_path):
    cells = lambda *scores: {("a", 1024): list(scores)}
    good, bad = (fake_run(tmp_path / name, {"in_context_tuned": cells(*scores)}, arm=name) for name, scores in (("good", (1.0, 0.8)), ("bad", (0.0, 0.2))))
    mine = fake_run(tmp_path / "mine", {"in_context": cells(0.1, 0.1), "ttt_strict": cells(0.5, 0.4)})
    for order in ((good, bad, mine), (bad, good, mine)):
        assert report_long.main([*map(str, order), "--out", str(tmp_path / order[0].name / "o")]) == 0
        report = json.loads((tmp_path / order[0].name / "o/report.json").read_text(encoding="utf-8"))
        assert cell(report, "a", "ttt_strict", 2)["kept"] == pytest.approx(0.45 / 0.9)


def test_a_gain_is_over_the_tasks_that_both_were_asked_and_short_prompts_are_said(tmp_path):
    base = fake_run(tmp_path / "base", {"in_context": {("a", 1024): [1.0, 0.0, 1.0]}}, arm="base")
    mine = fake_run(tmp_path / "mine", {"ttt_paper": {("a", 1024): [1.0, 1.0, 1.0, 1.0], ("b", 1024): [0.0, 0.0]}})
    rows = (mine / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    (mine / "predictions.jsonl").write_text("".join(json.dumps(row | {"prompt_tokens": 600} if row["task"] == "b" else row) + "\n" for row in map(json.loads, rows)), encoding="utf-8")
    assert report_long.main([str(base), str(mine), "--out", str(tmp_path / "o")]) == 0
    report = json.loads((tmp_path / "o/report.json").read_text(encoding="utf-8"))
    assert "gain" not in cell(report, report_long.ALL, "ttt_paper", 1) and cell(report, "a", "ttt_paper", 1)["gain"] == pytest.approx(1 / 3)
    written = report_long.tables(report)
    assert "(n 3)" in written and "| b | 1,024 (600) | 2 |" in written and "| a | 1,024 | 4 (in_context 3) |" in written


def test_two_trainings_of_one_name_are_refused(tmp_path, capsys):
    one, other = (fake_run(tmp_path / name, {"ttt_paper": {("a", 1024): [1.0]}}, identity={"adapter_sha256": name}) for name in ("one", "other"))
    assert report_long.main([str(one), str(other), "--out", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert "one and other: both are arm on tiny" in err and len(err.splitlines()) == 1 and not (tmp_path / "o").exists()


def test_the_report_of_all_runs_is_not_overwritten_by_one_of_some(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = fake_run(tmp_path / "r", {"in_context": {("a", 1024): [1.0]}})
    assert report_long.main([str(run)]) == 2 and "--out" in capsys.readouterr().err and not (tmp_path / "results").exists()
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert report_long.main([str(run), "--out", str(tmp_path / "file")]) == 2
    err = capsys.readouterr().err
    assert "report_long.py: error: " in err and len(err.splitlines()) == 1


def test_questions_about_one_text_stand_or_fall_together(tmp_path):
    earlier = [{"task": task, "sample_id": f"{task}-1024-s0-{index}-0123abcd"} for task, index in (("mqar", 0), ("mqar", 7), ("mqar", 8), ("vt", 7), ("vt", 8))]
    assert [report_long.text_of(row) for row in earlier] == ["0", "0", "1", "vt-1024-s0-7-0123abcd", "vt-1024-s0-8-0123abcd"]
    eights = {f"text{i}": [(float(i % 2),)] * 8 for i in range(5)}
    ones = {f"text{i}-{j}": [(float(i % 2),)] for i in range(5) for j in range(8)}
    wide, narrow = (report_long.mean_of_tasks({"a": texts, "b": texts}, Bootstrap()) for texts in (eights, ones))
    assert wide[0] == narrow[0] == pytest.approx(0.4) and wide[1][1] - wide[1][0] > 2 * (narrow[1][1] - narrow[1][0])
    assert report_long.mean_of_tasks({"a": {"text": [(1.0,), (0.0,)]}}, Bootstrap()) == (0.5, None)  # one text has no interval
    one_each = {task: {"text": [(score, 1.0)]} for task, score in (("a", 1.0), ("b", 0.0))}
    assert report_long.mean_of_tasks(one_each, Bootstrap()) == (0.5, None) == report_long.share_kept(one_each, Bootstrap())  # nor has a mean of such tasks
    uneven = {"one": [(1.0, 1.0)] * 3, "two": [(0.0, 1.0)]}  # a mean over items, whatever texts they are of
    assert report_long.share_kept({"a": uneven}, Bootstrap()) == (0.75, [0.0, 1.0])
    assert report_long.mean_of_tasks({"a": {text: [number[:1] for number in numbers] for text, numbers in uneven.items()}}, Bootstrap())[0] == 0.75


def test_runs_of_one_arm_are_one_and_the_same_answer_twice_is_refused(tmp_path, capsys):
    short = fake_run(tmp_path / "short", {"in_context": {("a", 1024): [1.0, 0.0]}, "ttt_strict": {("a", 1024): [1.0, 1.0]}})
    far = fake_run(tmp_path / "far", {"ttt_strict": {("a", 2048): [1.0, 0.0]}})
    assert report_long.main([str(short), str(far), "--out", str(tmp_path / "o")]) == 0
    arm, = json.loads((tmp_path / "o/report.json").read_text(encoding="utf-8"))["arms"]
    assert [run["name"] for run in arm["runs"]] == ["short", "far"]
    assert {(c["length"], c["mode"], c["score"]) for c in arm["cells"]} == {(1024, "in_context", 0.5), (1024, "ttt_strict", 1.0), (2048, "ttt_strict", 0.5)}
    named = fake_run(tmp_path / "named", {"ttt_strict": {("a", 4096): [1.0, 0.0]}}, identity={"tuned_adapter_sha256": None})  # a name that earlier runs lack
    assert report_long.main([str(short), str(named), "--out", str(tmp_path / "n")]) == 0
    assert len(json.loads((tmp_path / "n/report.json").read_text(encoding="utf-8"))["arms"]) == 1
    again = fake_run(tmp_path / "again", {"ttt_strict": {("a", 1024): [0.0]}})
    assert report_long.main([str(short), str(again), "--out", str(tmp_path / "p")]) == 2
    assert "again: ttt_strict answers a-1024-0, as another run of arm does" in capsys.readouterr().err


def test_lengths_that_a_models_window_does_not_hold_are_named_once_for_all_its_arms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "mine"):
        fake_run(tmp_path / f"results/long/{name}", {"in_context": {("a", 1024): [1.0, 0.0]}}, arm=name, window=8192)
    asked = tmp_path / "results/long/mine/run.json"  # where such a length was asked run.json says it too, as of others
    said = ["length 32768: the model's window is 8192 tokens", "length 65536: the model's window is 8192 tokens", "cwe at 1024 tokens: it begins at 2048"]
    asked.write_text(json.dumps(json.loads(asked.read_text(encoding="utf-8")) | {"left_out": said}), encoding="utf-8")
    (tmp_path / "RESULTS.md").write_text("<!-- long-tasks:begin -->\n<!-- long-tasks:end -->\n", encoding="utf-8")
    assert report_long.main([]) == 0
    report = json.loads((tmp_path / "results/long/report.json").read_text(encoding="utf-8"))
    assert [arm["left_out"] for arm in report["arms"]] == [[], said[1:]]
    for written in (tmp_path / name for name in ("RESULTS.md", "results/long/tables.md")):
        lines = [line for line in written.read_text(encoding="utf-8").splitlines() if line.startswith("- left out")]
        assert lines == [*(f"- left out of all arms of tiny: length {length}: the model's window is 8192 tokens" for length in (16384, 32768)), *(f"- left out: {line}" for line in said[1:])]
    wide = fake_run(tmp_path / "wide", {"in_context": {("a", 1024): [1.0]}})
    assert report_long.main([str(wide), "--out", str(tmp_path / "o")]) == 0 and "left out" not in (tmp_path / "o/tables.md").read_text(encoding="utf-8")


def test_results_md_gets_its_block_and_keeps_the_rest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_run(tmp_path / "results/long/r", {"in_context": {("a", 1024): [1.0, 0.0]}})
    (tmp_path / "RESULTS.md").write_text("before\n<!-- long-tasks:begin -->\nold\n<!-- long-tasks:end -->\nafter\n", encoding="utf-8")
    assert report_long.main([]) == 0
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "| a | 1,024 | 2 | 0.500" in text
    fake_run(tmp_path / "results/long/s", {"ttt_strict": {("a", 1024): [1.0, 0.0], ("b", 1024): [1.0, 1.0]}})
    assert report_long.main([]) == 0
    text, every = ((tmp_path / name).read_text(encoding="utf-8") for name in ("RESULTS.md", "results/long/tables.md"))
    assert "| mean over tasks | 1,024 | 4 |" in text and "| b | 1,024 |" not in text and "results/long/tables.md" in text  # several tasks: their means there, all here
    assert "| mean over tasks | 1,024 | 4 |" in every and "| b | 1,024 | 2 |" in every


def test_each_kind_of_arm_has_figures_of_its_own_and_a_base_stands_in_all(tmp_path):
    base = fake_run(tmp_path / "base", {"in_context": {("a", 1024): [1.0, 0.0]}}, arm="base", objective="none", chunk=None)
    chunks = fake_run(tmp_path / "chunks", {"ttt_paper": {("a", 1024): [1.0, 1.0]}}, arm="chunks", objective="lm", peak=6.0, batch=3)
    reader = fake_run(tmp_path / "reader", {"in_context_tuned": {("a", 1024): [1.0, 1.0]}}, arm="reader", objective="context", chunk=None)
    drawn = lambda out: sorted(path.name for path in (tmp_path / out / "figures").iterdir())
    for out, runs, kinds in (("o", (base, chunks, reader), ("chunks", "whole")), ("p", (base, chunks), ("chunks",)), ("q", (base,), ("whole",))):
        assert report_long.main([*map(str, runs), "--out", str(tmp_path / out)]) == 0
        assert drawn(out) == sorted(f"{what}-tiny-{kind}.png" for what in ("accuracy", "cost") for kind in kinds)
    arms = json.loads((tmp_path / "o/report.json").read_text(encoding="utf-8"))["arms"]
    assert [long_figures.kind_of(arm) for arm in arms] == [None, "chunks", "whole"] and long_figures.kind_of(arms[1] | {"clip": 0.001}) == "clipped"
    assert [(c["peak_gb"], c["item_gb"]) for arm in arms[:2] for c in arm["cells"]] == [(None, None), (None, None), (6.0, 2.0)]  # lent, then its own
    assert list(long_figures.lines_of(arms[:2])) == ["in_context", "chunks, ttt_paper"]


def test_lines_of_a_figure_are_told_apart_by_arm_seed_clip_and_mode():
    arm = lambda name, clip=None, seed=0, modes=("ttt_foreign", "ttt_paper", "ttt_strict"): {"arm": name, "seed": seed, "clip": clip, "cells": [
        {"mode": mode, "task": "a", "length": 1024, "n": 100 if name == "c" else 20} for mode in ("in_context", *modes)]}
    arms = [arm("c", 0.001), arm("c", 0.01), arm("c", 0.001, 1), *(arm(name) for name in "cabdef")]
    lines = long_figures.lines_of(arms)
    looks = {label: look for label, (look, _) in lines.items()}
    assert [cell["n"] for cell in lines["in_context"][1]] == [100]
    assert len({str(sorted(look.items())) for look in looks.values()}) == len(looks) == 1 + 9 * 3
    assert len({look["color"] for label, look in looks.items() if "clipped" in label}) == 3  # two clips and two seeds of one arm


def test_of_an_unfinished_run_the_whole_lengths_are_scored_when_asked_for(tmp_path, capsys):
    half = fake_run(tmp_path / "u", {"in_context": {("a", 1024): [1.0, 0.0], ("b", 1024): [1.0, 1.0], ("a", 2048): [1.0, 1.0], ("b", 2048): [1.0]}}, complete=False)
    run = json.loads((half / "run.json").read_text(encoding="utf-8"))
    begun = {"command": "python run_long.py --resume", "modes": ["in_context"], "tasks": ["a", "b"], "lengths": [1024, 2048, 4096], "count": 2}
    (half / "run.json").write_text(json.dumps(run | {"unfinished": [begun]}), encoding="utf-8")
    assert report_long.main([str(half), "--out", str(tmp_path / "o")]) == 2 and "--allow-incomplete" in capsys.readouterr().err
    assert report_long.main([str(half), "--out", str(tmp_path / "o"), "--allow-incomplete"]) == 0
    report = json.loads((tmp_path / "o/report.json").read_text(encoding="utf-8"))["arms"][0]
    assert {(c["task"], c["length"], c["score"]) for c in report["cells"]} == {("a", 1024, 0.5), ("b", 1024, 1.0), ("mean over tasks", 1024, 0.75)}
    assert report["left_out"] == ["in_context at 2048 tokens: not finished", "in_context at 4096 tokens: not finished"]
    texts = {"command": "python run_long.py --resume", "modes": ["in_context"], "texts": ["a 1024", "a 2048", "b 1024"], "count": 2}  # b begins and ends at 1,024
    (half / "run.json").write_text(json.dumps(run | {"unfinished": [texts]}), encoding="utf-8")
    assert report_long.main([str(half), "--out", str(tmp_path / "p"), "--allow-incomplete"]) == 0
    assert json.loads((tmp_path / "p/report.json").read_text(encoding="utf-8"))["arms"][0]["left_out"] == []


def test_rows_that_a_kill_cut_are_not_read_and_a_run_without_a_whole_length_is_named(tmp_path, capsys):
    half = fake_run(tmp_path / "u", {"in_context": {("a", 1024): [1.0, 0.0]}}, complete=False)
    rows, run = (half / "predictions.jsonl").read_bytes(), json.loads((half / "run.json").read_text(encoding="utf-8"))
    (half / "predictions.sums").write_text(f"{len(rows)} {hashlib.sha256(rows).hexdigest()}\n", encoding="utf-8")
    (half / "predictions.jsonl").write_bytes(rows + '{"condition": "in_context", "sample_id": "\u00e9'.encode()[:-1])
    call = lambda *runs: report_long.main([*map(str, runs), "--out", str(tmp_path / "o"), "--allow-incomplete"])
    begun = {"command": "python run_long.py --resume", "modes": ["in_context"], "texts": ["a 1024"]}
    (half / "run.json").write_text(json.dumps(run | {"unfinished": [begun | {"count": 2}]}), encoding="utf-8")
    assert call(half) == 0
    (half / "run.json").write_text(json.dumps(run | {"unfinished": [begun | {"count": 3}]}), encoding="utf-8")
    shutil.rmtree(tmp_path / "o")
    capsys.readouterr()
    assert call(half) == 2 and "no length of it is whole yet" in capsys.readouterr().err and not (tmp_path / "o").exists()
    other = fake_run(tmp_path / "v", {"in_context": {("a", 1024): [1.0, 0.0]}}, arm="other")
    assert call(half, other) == 0 and "- u: begun, no length of it is whole yet" in (tmp_path / "o/tables.md").read_text(encoding="utf-8")


def test_what_cannot_be_scored_is_named(tmp_path, capsys):
    unfinished = fake_run(tmp_path / "u", {"in_context": {("a", 1024): [1.0]}}, complete=False)
    twice = fake_run(tmp_path / "t", {"in_context": {("a", 1024): [1.0]}})
    rows = (twice / "predictions.jsonl").read_text(encoding="utf-8")
    (twice / "predictions.jsonl").write_text(rows * 2, encoding="utf-8")
    for folder, named in ((unfinished, "not finished"), (twice, "line 2"), (tmp_path / "nothing", "No such file")):
        assert report_long.main([str(folder), "--out", str(tmp_path / "o")]) == 2
        assert named in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
