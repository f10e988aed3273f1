"""What a memory costs unrelated prose: measured against the library's own loss, zero for an empty memory, and seen when there is one."""
import json
import math

import pytest
import torch
from conftest import strengthen, tiny, token_rows

import harm
from decoding import write_rows
from in_place_ttt import InPlaceTTT, TTTConfig
from manifests import provenance
from model_utils import load_model, save_adapter

PAD = 258


@pytest.fixture
def llama():
    return tiny("tiny-llama", torch.float32)


@pytest.fixture
def ttt(llama):
    adapter = strengthen(InPlaceTTT(llama.model, TTTConfig((1, 2), None, codes=True, read_attention=1, blind=True))).requires_grad_(False)
    yield adapter
    adapter.detach()


@torch.no_grad()
def test_losses_without_a_memory_are_the_librarys(llama):
    rows = token_rows((12, 5))
    for row, losses in zip(rows, harm.token_losses(llama, rows)):
        expected = llama.model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss
        assert len(losses) == len(row) - 1 and losses.mean().item() == pytest.approx(expected.item(), rel=1e-5)


@torch.no_grad()
def test_an_empty_memory_costs_nothing_and_a_full_one_shows(llama, ttt):
    texts, prose = token_rows((14, 9)), token_rows((11, 7), seed=2)
    memory, _ = write_rows(llama.model, ttt, texts, PAD)
    alone = harm.token_losses(llama, prose)
    for scaled, same in ((memory.scale(0.0), True), (memory, False)):
        attached = harm.token_losses(llama, prose, ttt, scaled)
        assert all(torch.allclose(a, b, atol=1e-5) == same for a, b in zip(attached, alone))


def test_the_ratio_is_the_exponential_of_the_mean_gap():
    rows = [{"tokens": 10, "with_memory": 2.1, "without": 2.0}, {"tokens": 30, "with_memory": 3.3, "without": 3.0}]
    found = harm.summary(rows)
    assert found["ratio"] == pytest.approx(math.exp(0.2)) and found["perplexity"] == pytest.approx(math.exp(2.75))
    assert found["perplexity_with_memory"] == pytest.approx(math.exp(3.0)) and found["ratio_ci"][0] <= found["ratio"] <= found["ratio_ci"][1]
    assert harm.summary(rows[:1])["ratio_ci"] is None


@pytest.fixture
def call(run_main):
    return lambda *arguments: run_main(harm.main, ["harm.py", *arguments])


def test_the_command_on_a_file_with_distractors(call, tmp_path):
    loaded, config = load_model("tiny-llama"), TTTConfig((1, 2), None, codes=True, blind=True)
    manifest = {"arm": "a", "model": "tiny-llama", "model_sha256": loaded.sha256, "objective": "recall", "frozen": True, "seed": 3,
                "ttt": config.to_dict(), "lora": None, "data_sha256": "0", "updates": 0, **provenance(), "device": "cpu"}
    save_adapter(tmp_path / "a", strengthen(InPlaceTTT(loaded.model, config)), manifest)
    common = ("--adapter", tmp_path / "a", "--model", "tiny-llama", "--device", "cpu", "--out", tmp_path / "deep" / "harm.json")
    code, out, _ = call(*common, "--limit", 3, "--tokens", 40)
    written = json.loads((tmp_path / "deep" / "harm.json").read_text(encoding="utf-8"))
    assert code == 0 and "perplexity on unrelated prose" in out and written["samples"] == 3 and written["tokens"] == 3 * 39
    assert [row["sample_id"] for row in written["rows"]] == ["L3-001-en", "L3-002-en", "L3-003-en"] and written["seed"] == 3
    assert call(*common, "--tokens", 1)[0] == 2
    code, _, err = call(*common, "--benchmark", "natural_v1.json")
    assert code == 2 and "no en sample has a distractor" in err
