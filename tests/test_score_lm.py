"""score_lm.py: bytes and tokens counted exactly, scores equal to the library's own losses, bases restored, tables from rows, one-line errors."""
import json
import math

import pytest
import torch
from conftest import strengthen, token_rows
from test_run_experiment import save_joint
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

import score_lm
import scoring_report
import scoring_texts
from arms import base_digest
from in_place_ttt import InPlaceTTT, TTTConfig
from manifests import UserError, provenance
from model_utils import load_model, save_adapter
from scoring import AdamW, InPlace, Off, Plan
from scoring_texts import BUILTIN, Document, Tokens, cut, prefix, read_documents, token_bytes, tokenise

IDS = token_rows((50,))[0]
HARD = "héllo\r\n ﬁ 日本語 🙂 <eos> x\t\x00é"


@pytest.fixture
def llama():
    return load_model("tiny-llama")


# ---- bytes ----

def test_every_byte_of_a_text_belongs_to_one_token(llama):
    found = tokenise(llama.tokenizer, Document("d", HARD))
    assert sum(found.nbytes) == len(HARD.encode()) and found.nbytes[found.ids.index(llama.tokenizer.eos_token_id)] == len("<eos>")


def byte_fallback_tokenizer(normalizer=None):
    vocabulary = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, "\u2581": 257, "h": 258, "i": 259, "\u2581hi": 260, "\u2581h": 261, "hi": 262}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "i"), ("\u2581", "hi")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizer or normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_byte_fallback_tokens_stand_for_one_byte_each():
    tokenizer = byte_fallback_tokenizer()
    found = tokenise(tokenizer, Document("d", "hi hi\né"))
    assert found.nbytes == [2, 3, 1, 1, 1] and token_bytes(tokenizer, found.ids) == [b"hi", b" hi", b"\n", b"\xc3", b"\xa9"]


def test_a_tokenizer_that_reads_another_text_is_refused():
    tokenizer = byte_fallback_tokenizer(normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "\u2581")]))
    with pytest.raises(UserError, match="document d do not stand for exactly its bytes"):
        tokenise(tokenizer, Document("d", "hi ﬁ"))


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_texts_are_what_they_were_and_long(name):
    documents = read_documents(name)
    assert sum(len(d.text.encode()) for d in documents) >= 10 ** 6 and len({d.name for d in documents}) == len(documents)


def test_another_builtin_text_is_refused(monkeypatch):
    monkeypatch.setitem(BUILTIN, "x", scoring_texts.Builtin(lambda: [Document("a", "b")], "0" * 64, "MIT", "a text"))
    with pytest.raises(UserError, match="--text x: what is installed gives another text"):
        read_documents("x")


def test_prose_leaves_out_examples_and_tables():
    assert scoring_texts.prose("One.\n\n>>> f(1)\n2\n\nTwo\nlines.\n\n=== ===\na   b") == "One.\n\nTwo\nlines."


def test_files_become_documents(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n##two##".encode())
    (tmp_path / "a.jsonl").write_text('{"text": "x\\u2028y", "name": "n"}\n"plain"\n', encoding="utf-8")
    assert [d.text for d in read_documents(str(tmp_path / "a.txt"), "##")] == ["one\r\n", "two"]
    assert read_documents(str(tmp_path / "a.txt"))[0].text == "one\r\n##two##"
    assert read_documents(str(tmp_path / "a.jsonl")) == [Document("n", "x\u2028y"), Document("line-2", "plain")]


@pytest.mark.parametrize("name, content, says", [
    ("b.txt", b"\xff", "not UTF-8 \\(byte 0\\)"), ("b.txt", b"", "holds no text"), ("b.jsonl", b"{", "line 1: not JSON"), ("b.jsonl", b'{"t": 1}', "field 'text' is missing"), (None, b"", "no such file, nor one of")])
def test_files_that_cannot_be_read_say_why(tmp_path, name, content, says):
    path = tmp_path / (name or "absent")
    if name:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_documents(str(path))


def test_a_prefix_ends_with_a_whole_character():
    assert cut("aé", 2) == "a" and cut("aé", 3) == "aé"
    documents = [Document("a", "xyz"), Document("b", "éé"), Document("c", "z")]
    assert prefix(documents, whole=6) == [Document("a", "xyz"), Document("b", "é")]
    assert prefix(documents, each=2) == [Document("a", "xy"), Document("b", "é"), Document("c", "z")]


# ---- windows and scores ----

@pytest.mark.parametrize("window, stride", [(16, 16), (16, 5), (64, 64), (7, 1)])
def test_every_token_is_scored_once_from_the_context_that_is_stated(window, stride):
    for length in (1, 5, 50):
        plan = Plan(window, stride, 9).windows(length)
        assert [i for w in plan for i in range(w.start, w.end)] == list(range(length))
        for w in plan:
            for i in range(w.start, w.end):
                seen = i - w.first  # tokens of text before i that attention sees
                assert seen == min(i, window - stride + 1 + i - w.start) or i < window and seen == i
                assert seen <= window


@torch.no_grad()
def test_scores_are_the_librarys(llama):
    ids = torch.tensor([[256] + IDS])
    expected = llama.model(input_ids=ids, labels=ids).loss.item() * len(IDS) / math.log(2)
    row = score_lm.score_document(Off(llama, Plan(64, 64, 256)), Tokens("d", IDS, [1] * len(IDS)))
    assert row["bits"] == pytest.approx(expected, rel=1e-4) and row["tokens"] == row["bytes"] == 50
    last = llama.model(input_ids=torch.tensor([[256] + IDS[27:49]])).logits[0, -1]
    window = Off(llama, Plan(32, 10, 256))  # the last of five windows: tokens 40 to 49, attention from 17 on
    scores = [score for score in window.events(IDS)]
    assert [(s.start, s.end) for s in scores][-1] == (40, 50)
    first = llama.model(input_ids=torch.tensor([[256] + IDS[17:49]])).logits[0, -1]
    assert scores[-1].realised[-1].item() == pytest.approx(torch.log_softmax(first, -1)[IDS[49]].item(), abs=1e-4) and not torch.allclose(first, last, atol=1e-4)


def adapter(loaded, config):
    return strengthen(InPlaceTTT(loaded.model, config)).requires_grad_(False)


def test_legal_in_place_scores_are_those_of_the_writing_pass(llama):
    ttt, ids = adapter(llama, TTTConfig((1, 2), 4)), torch.tensor([[256] + IDS[:-1]])
    with torch.no_grad(), ttt.write() as writer:
        writer.expect(torch.ones_like(ids))
        logits = llama.model(input_ids=ids, use_cache=False).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(IDS), reduction="none")
    found = torch.cat([event.realised for event in InPlace(llama, ttt, Plan(64, 64, 256), 8).events(IDS) if hasattr(event, "realised")])
    ttt.detach()
    torch.testing.assert_close(-found, expected, atol=2e-3, rtol=2e-3)


def test_a_memory_that_is_to_be_forgotten_holds_no_more_than_asked_for(llama):
    ttt, plan = adapter(llama, TTTConfig((1, 2), 4)), Plan(16, 8, 256)
    scores, held = {}, {}
    for forget in (None, 16, 64):
        scorer = InPlace(llama, ttt, plan, 8, forget=forget)
        scores[forget], held[forget] = [], []
        for event in scorer.events(IDS):
            if hasattr(event, "realised"):
                scores[forget] += event.realised.tolist()
            else:
                held[forget].append(int(scorer.memory.tokens))
    ttt.detach()
    assert scores[64] == scores[None] and max(held[None]) >= 48 and max(held[16]) <= 24  # two strides, and what a window sees before its own
    assert scores[16][:16] == scores[None][:16] and scores[16][16:24] != scores[None][16:24]


def test_adapters_that_change_nothing_score_as_the_base(llama):
    """conv at 0 in place, and AdamW at a learning rate of 0: legal, forbidden and off are one number."""
    plan, tokens = Plan(16, 8, 256), Tokens("d", IDS, [1] * 50)
    ttt = InPlaceTTT(llama.model, TTTConfig((1, 2), 4)).requires_grad_(False)
    named = dict(llama.model.named_parameters())
    scorers = [Off(llama, plan), *(InPlace(llama, ttt, plan, 8, forbidden) for forbidden in (False, True)), *(AdamW(llama, plan, named, 0.0, 2, 16, 0, forbidden) for forbidden in (False, True))]
    bits = [score_lm.score_document(scorer, tokens)["bits"] for scorer in scorers]
    ttt.detach()
    assert max(bits) - min(bits) < 1e-2


@pytest.mark.parametrize("what", ["norms", "down:1-2", "all", "lora"])
def test_adamw_learns_a_text_that_repeats_and_leaves_the_base_as_it_was(llama, what):
    before, tokens = base_digest(llama), Tokens("d", IDS[:8] * 8, [1] * 64)
    bits = {}
    with score_lm.trained(llama, what, 0) as parameters:
        for forbidden in (False, True):
            scorer = AdamW(llama, Plan(16, 8, 256), parameters, 3e-3, 3, 16, 0, forbidden)
            bits[forbidden] = score_lm.score_document(scorer, tokens)["bits"]
            assert scorer.losses and base_digest(llama) == before
    assert bits[True] < bits[False] < score_lm.score_document(Off(llama, Plan(16, 8, 256)), tokens)["bits"]
    assert base_digest(llama) == before and not any("lora" in name or p.requires_grad for name, p in llama.model.named_parameters())


def test_seeds_draw_the_order_and_the_same_seed_the_same(llama):
    named, tokens = score_lm.chosen(llama, "down:1-2"), Tokens("d", IDS, [1] * 50)
    bits = [score_lm.score_document(AdamW(llama, Plan(8, 8, 256), named, 1e-2, 2, 24, seed), tokens)["bits"] for seed in (0, 1, 0)]
    assert bits[0] == bits[2] != bits[1]


def test_a_scorer_that_repeats_a_token_is_no_measurement(llama):
    class Twice(Off):
        def events(self, ids):
            yield from list(super().events(ids)) * 2

    with pytest.raises(RuntimeError, match="tokens from 0 on are scored when 50 were"):
        score_lm.score_document(Twice(llama, Plan(64, 64, 256)), Tokens("d", IDS, [1] * 50))


# ---- tables ----

def rows_of(gains, seeds=(None,), rule="inplace", mode="legal", epochs=None, spread=0.0):
    """Rows of documents of 100 bytes whose bits are 200 less the gain."""
    return [{"rule": rule, "mode": mode, "epochs": epochs, "seed": seed, "compiled": False, "document": f"d{i}", "tokens": 40, "bytes": 100, "bits": 200 - gain - spread * number, "seconds": 1.0,
             "blocks": [[20, 50, 100 - gain], [20, 50, 100.0 - spread * number]]} for number, seed in enumerate(seeds) for i, gain in enumerate(gains)]


OFF = rows_of([0] * 10, rule="off", mode="off")


def test_gains_are_paired_over_documents():
    gains = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    told = {cell["mode"]: cell for cell in scoring_report.summary(OFF + rows_of(gains) + rows_of([20] * 10, mode="forbidden"))}
    found = told["legal"]["against_off"]
    assert told["off"]["bits_per_byte"] == 2 and told["legal"]["bits_per_byte"] == pytest.approx(2 - 0.055) and told["legal"]["sd"] is None
    assert found["gain"] == pytest.approx(0.055) and 0.03 < found["ci"][0] < 0.055 < found["ci"][1] < 0.08 and found["p"] == pytest.approx(2 / 2 ** 10) and (found["n"], found["unit"]) == (10, "documents")
    assert told["forbidden"]["against_legal"]["gain"] == pytest.approx(0.2 - 0.055)


def test_seeds_are_replicates_and_not_more_documents():
    told = scoring_report.summary(OFF + rows_of([5, 6] * 5, seeds=(0, 1, 2), rule="adamw", epochs=1, spread=1.0))[1]
    assert told["by_seed"] == {0: pytest.approx(1.945), 1: pytest.approx(1.935), 2: pytest.approx(1.925)} and told["sd"] == pytest.approx(0.01) and told["against_off"]["n"] == 10


def test_stretches_are_whole_and_not_many(llama):
    ids, nbytes = IDS * 200, list(range(1, 51)) * 200
    row = score_lm.score_document(Off(llama, Plan(512, 512, 256)), Tokens("d", ids, nbytes), stretches=True)
    tokens, sizes, bits = zip(*row["blocks"])
    assert len(tokens) == 64 and sum(tokens) == 10_000 and sum(sizes) == row["bytes"] == sum(nbytes) and sum(bits) == pytest.approx(row["bits"], abs=0.1)
    assert [block[0] for block in score_lm.score_document(Off(llama, Plan(512, 512, 256)), Tokens("d", ids[:200], nbytes[:200]), stretches=True)["blocks"]] == [128, 72]


def test_few_documents_are_paired_by_stretches():
    found = scoring_report.summary(OFF[:2] + rows_of([1, 2]))[1]["against_off"]
    assert (found["n"], found["unit"]) == (4, "stretches") and found["gain"] == pytest.approx(3 / 200)


@pytest.mark.parametrize("gains, says", [((1, 2, 4), "still grows"), ((4, 5, 5.2), "saturates"), ((4, 6, 5), "largest at 2 epochs"), ((-1, -1, -0.5), "still grows")])
def test_the_sentence_about_epochs_follows_its_rule(gains, says):
    rows = [row for epochs, gain in zip((1, 2, 4), gains) for row in rows_of([gain] * 10, seeds=(0,), rule="adamw", epochs=epochs)]
    told = scoring_report.summary(OFF + rows)
    assert says in scoring_report.epochs_verdict(told, "legal") and scoring_report.epochs_verdict(told, "forbidden") is None


def test_compiled_ways_stand_beside_the_others():
    compiled = [row | {"compiled": True, "seconds": 0.5, "bits": row["bits"] + 0.04} for row in OFF]
    cell, = scoring_report.compile_cells(OFF + compiled)
    assert cell["seconds_plain"] == 10 and cell["seconds_compiled"] == 5 and cell["difference"] == pytest.approx(0.001)


def test_the_artefact_is_what_lies_there(tmp_path):
    (tmp_path / "adapter.safetensors").write_bytes(bytes(100_000))
    found = scoring_report.artefact(tmp_path, 7, 1000)
    assert found["adapter"]["bytes"] == 100_000 and found["adapter"]["compressed"] < 500 and found["fits"] is False and found["code"]["files"] > 5
    assert scoring_report.artefact(None, 7, found["compressed"])["fits"] is True and "not counted" in scoring_report.artefact_line(found)


def test_a_report_says_where_pairs_are_too_few():
    run = {"text": {"name": "t", "sha256": "0" * 64, "documents": 2, "tokens": 80, "bytes": 200, "prefix": ""}, "plan": {"window": 8, "stride": 8}, "model": "m", "arm": None, "complete": True, "learns": "L.",
           "artefact": scoring_report.artefact(None, 7, None), "base": {"before": "a", "after": "a"}, "commit": "c", "device": "cpu", "versions": {}, "commands": ["x"], "compile": []}
    said = [" ".join(scoring_report.run_lines("n", run | {"summary": scoring_report.summary(rows)})) for rows in (OFF[:2] + rows_of([1, 2]), OFF + rows_of(range(10)))]
    assert "so few cannot give a p below 0.125" in said[0] and "so few" not in said[1] and "Paired over 10 documents" in said[1]


# ---- the command ----

@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of 12 documents of 90 bytes."""
    path = tmp_path_factory.mktemp("text") / "t.jsonl"
    path.write_text("".join(json.dumps(f"Document {i} says {'abcdefghijkl'[i] * 9} and nothing else. " * 3)[:91] + '"\n' for i in range(12)), encoding="utf-8")
    return path


@pytest.fixture
def call(run_main):
    return lambda *arguments: run_main(score_lm.main, ["score_lm.py", "--model", "tiny-llama", "--device", "cpu", *arguments])


@pytest.fixture
def checkpoint(tmp_path):
    """save() -> folder of a tiny arm with chunks of 4."""
    def save():
        loaded, config = load_model("tiny-llama"), TTTConfig((1, 2), 4)
        manifest = {"arm": "a", "model": "tiny-llama", "model_sha256": loaded.sha256, "objective": "lm", "frozen": True, "seed": 3, "ttt": config.to_dict(), "lora": None, "data_sha256": "0", "updates": 0,
                    **provenance(), "device": "cpu"}
        save_adapter(tmp_path / "a", strengthen(InPlaceTTT(loaded.model, config)), manifest)
        return tmp_path / "a"

    return save


def test_the_command_scores_and_writes_its_block(call, checkpoint, text, tmp_path):
    common = ("--text", text, "--document-bytes", 60, "--bytes", 480, "--window", 32, "--stride", 16)
    code, out, err = call(*common, "--adapter", checkpoint(), "--piece", 8, "--budget", 100, "--out", tmp_path / "runs" / "in-place")
    assert code == 0, err
    assert "paired over 8 documents" in out.lower() and "over the budget of 100" in out and "deterministic" in out
    run = json.loads((tmp_path / "runs" / "in-place" / "score.json").read_text(encoding="utf-8"))
    assert run["complete"] and run["text"]["bytes"] == 480 and len(run["rows"]) == 3 * 8 and run["base"]["before"] == run["base"]["after"]
    assert call(*common, "--train", "norms", "--chunk", 32, "--epochs", "2", "--seeds", "0,1", "--lr", 0.01, "--out", tmp_path / "runs" / "adamw")[0] == 0
    (tmp_path / "R.md").write_text("before\n<!-- score:begin -->\nold\n<!-- score:end -->\nafter\n", encoding="utf-8")
    code, _, err = call("--report", "--runs", tmp_path / "runs", "--results-md", tmp_path / "R.md")
    text = (tmp_path / "R.md").read_text(encoding="utf-8")
    assert code == 0 and text.startswith("before\n<!-- score:begin -->\n**adamw**") and text.endswith("<!-- score:end -->\nafter\n") and "old" not in text and "**in-place**" in text
    assert "AdamW, 2 epochs, **forbidden**" in text and "± " in text


ADAMW = ("--train", "norms", "--document-bytes", 60, "--bytes", 240, "--window", 32, "--stride", 16, "--chunk", 32, "--epochs", "1", "--lr", 0.01)


def bits(runs):
    """{(mode, seed, document): bits} of the runs joined to one."""
    (run,) = scoring_report.read_runs(runs).values()
    return {(row["mode"], row["seed"], row["document"]): row["bits"] for row in run["rows"]}, run


def test_a_run_that_was_cut_off_goes_on_and_says_the_same(call, text, tmp_path, monkeypatch):
    said = []
    whole = score_lm.score_document
    for folder, fails_at in (("whole", None), ("cut", 7)):
        left = iter(range(99))

        def until(*a):
            if next(left) == fails_at:
                raise KeyboardInterrupt
            return whole(*a)

        monkeypatch.setattr(score_lm, "score_document", until)
        arguments = ("--text", text, *ADAMW, "--seeds", "0,1", "--out", tmp_path / folder / "run")
        code, _, err = call(*arguments)
        assert code == (130 if fails_at else 0), err
        if fails_at:
            assert "go on with" in err and err.rstrip().endswith("--resume")
            assert len({key[:2] for key in bits(tmp_path / folder)[0]}) == 1 and not bits(tmp_path / folder)[1]["complete"]
        assert "already holds results; add --resume" in call(*arguments)[2]
        assert "field 'learns' is of another run" in call(*arguments[:-2], "--lr", 0.02, *arguments[-2:], "--resume")[2]
        assert call(*arguments, "--resume")[0] == 0
        said.append(bits(tmp_path / folder))
        file = tmp_path / folder / "run" / "score.json"
        forged = json.loads(file.read_text(encoding="utf-8"))
        forged["rows"][0]["bits"] += 0.001
        file.write_text(json.dumps(forged), encoding="utf-8")
        assert "field 'rows' is not what was written" in call(*arguments, "--resume")[2]
    assert said[0][0] == said[1][0] and len(said[0][0]) == 4 * 5 and said[1][1]["complete"]


def test_seeds_that_ran_apart_are_one_table(call, text, tmp_path):
    assert call("--text", text, *ADAMW, "--seeds", "0,1", "--out", tmp_path / "whole" / "run")[0] == 0
    for seed in (0, 1):
        modes = "legal,forbidden" if seed else "off,legal,forbidden"
        assert call("--text", text, *ADAMW, "--seeds", str(seed), "--modes", modes, "--out", tmp_path / "parts" / f"run-{seed}")[0] == 0
    (one, run), (parts, joined) = bits(tmp_path / "whole"), bits(tmp_path / "parts")
    keep = ("mode", "bits_per_byte", "sd", "by_seed", "against_off", "against_legal")
    assert one == parts and [[cell[name] for name in keep] for cell in run["summary"]] == [[cell[name] for name in keep] for cell in joined["summary"]]
    assert len(joined["commands"]) == 2 and all(command in "\n".join(scoring_report.run_lines("n", joined)) for command in joined["commands"])
    assert call("--text", text, *ADAMW, "--seeds", "1", "--out", tmp_path / "parts" / "again")[0] == 0  # the same seed once more is no further one
    assert list(scoring_report.read_runs(tmp_path / "parts")) == ["again", "run-0"]


def test_results_in_a_tracked_folder_do_not_make_a_run_another_one(call, text, tmp_path, monkeypatch):
    for commit, code in (("abc", 0), ("abc-dirty", 0), ("other", 2)):
        monkeypatch.setenv("TTT_COMMIT", commit)
        assert call("--text", text, *ADAMW, "--seeds", "0", "--out", tmp_path / "run", "--resume")[0] == code
    (tmp_path / "apart").mkdir()
    for seed, commit in enumerate(("abc", "abc-dirty")):
        monkeypatch.setenv("TTT_COMMIT", commit)
        assert call("--text", text, *ADAMW, "--seeds", str(seed), "--modes", "legal", "--out", tmp_path / "apart" / f"run-{seed}")[0] == 0
    assert list(scoring_report.read_runs(tmp_path / "apart")) == ["run-0"]


def test_the_command_audits(call, checkpoint, text, tmp_path, monkeypatch):
    small = ("--text", text, "--audit-tokens", 24, "--audit-probes", 3, "--window", 12, "--stride", 8, "--piece", 4)
    code, out, _ = call("--audit", *small, "--adapter", checkpoint())
    assert code == 0 and out.count("pass  causal") == 2 and "FAIL" not in out
    code, out, _ = call("--audit", *small, "--adapter", tmp_path / "a", "--modes", "forbidden")
    assert code == 1 and "FAIL  score_first" in out
    (tmp_path / "theirs.py").write_text("class Mute:\n    vocabulary = 9\n    def state(self):\n        return ''\n    def events(self, ids):\n        return []\nclass Half:\n    vocabulary = 9\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, _ = call("--audit", "theirs:Mute")
    assert code == 1 and "0 of 160 tokens are scored" in out
    assert "has no events, state" in call("--audit", "theirs:Half")[2] and "cannot be imported" in call("--audit", "theirs:None_")[2]


def test_a_text_can_be_taken_elsewhere(call, tmp_path):
    assert call("--text", "distractors", "--save-text", tmp_path / "d.jsonl")[0] == 0
    assert scoring_texts.digest_of(read_documents(str(tmp_path / "d.jsonl"))) == BUILTIN["distractors"].sha256


@pytest.mark.parametrize("arguments, says", [
    ((), "--out is missing"), (("--out", "x", "--adapter", "a", "--train", "all"), "give one of the two"), (("--out", "x", "--adapter", "a", "--compile"), "use it without --adapter"),
    (("--out", "x", "--clip", "0.1"), "only fast weights are clipped"), (("--out", "x", "--forget", "8"), "--forget 8: only fast weights are begun anew"), (("--out", "x", "--adapter", "a", "--forget", "0"), "--forget 0: use 1 or more"), (("--out", "x", "--modes", "of"), "use off, legal, forbidden"), (("--out", "x", "--epochs", "1,1"), "--epochs 1,1: write different whole numbers from 1 on"), (("--out", "x", "--window", "0"), "use 1 or more"),
    (("--out", "x", "--stride", "99", "--window", "9"), "a stride of 99 in a window of 9"), (("--out", "x", "--train", "everything"), "unknown; use norms"), (("--out", "x", "--train", "down:9"), "has layers 0 to 3"),
    (("--out", "x", "--text", "none.txt"), "no such file"), (("--out", "x", "--window", "99999", "--stride", "9"), "the model's window is"), (("--report", "--results-md", "none.md"), "none.md")])
def test_what_cannot_be_is_said_in_one_line(call, text, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, _, err = call("--text", text, *arguments)
    assert code == 2 and says in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_pieces_that_cut_a_chunk_are_refused(call, checkpoint, text, tmp_path):
    assert "pieces of 6 and a stride of 16 tokens for an arm that writes chunks of 4" in call("--text", text, "--bytes", 60, "--adapter", checkpoint(), "--piece", 6, "--window", 16, "--stride", 16,
                                                                                              "--out", tmp_path / "o")[2]
    assert "a joint arm has a LoRA on its base" in call("--text", text, "--adapter", save_joint(tmp_path / "joint", "tiny-llama"), "--out", tmp_path / "o")[2]
