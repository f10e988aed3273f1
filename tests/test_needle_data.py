"""Needles for the recall objective: what is asked stands in the text, where the addresses say, and nothing of the tasks' own items is among it."""
import random

import pytest
from conftest import tiny
from test_train import call  # noqa: F401

import needle_data
import prompts
from long_ruler import NEEDLES as TASKS
from long_ruler import Needles, needles, recall_pairs
from long_tasks import make
from manifests import read_manifest
from needle_data import HAYSTACKS, NeedleDataset, needle_text
from training_data import IGNORE, NOWHERE

LENGTH = 1200  # bytes, each a token of the tiny models


@pytest.fixture(scope="module")
def tokenizer():
    return tiny("tiny-llama").tokenizer


@pytest.fixture(scope="module")
def dataset(tokenizer):
    return NeedleDataset(tokenizer, ("en",), 6, 8, 4, 0, False, (1,), True, True, LENGTH)


@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_every_question_is_answered_by_its_line_and_by_no_other(haystack):
    sample = needle_text(Needles(haystack, keys=5), 12, random.Random(3))
    assert len(sample["facts"]) == len(sample["probes"]) == (12 if haystack in ("needle", "pairs") else 5)
    for probe in sample["probes"]:
        line = sample["conversation"][slice(*sample["facts"][probe["required_facts"][0]]["span"])]
        key = probe["question"].split("belongs to ")[1].split("?")[0] if haystack == "pairs" else probe["question"].split(" for ")[1].split(" mentioned")[0]
        assert probe["gold_answer"] in line and key in line and sample["conversation"].count(f"{key} is: " if haystack != "pairs" else f"{key}: ") == 1


def test_all_values_of_a_key_are_asked_for_in_the_order_of_the_text():
    sample = needle_text(Needles("noise", keys=2, values=3), 20, random.Random(4))
    assert len(sample["facts"]) == 6 and len(sample["probes"]) == 2
    for probe in sample["probes"]:
        key = probe["question"].split(" for ")[1].split(" mentioned")[0]
        lines = [line for line in sample["conversation"].split("\n") if f"for {key} is: " in line]
        assert probe["gold_answer"] == ", ".join(line.split(" is: ")[1].rstrip(".") for line in lines) and len(lines) == 3
        assert probe["question"].startswith("\nWhat are all the special magic numbers for ")
    assert sample["conversation"].startswith("Some special magic numbers are hidden")


def test_several_keys_are_asked_for_in_the_order_of_the_question():
    sample = needle_text(Needles("prose", keys=4, asked=3), 20, random.Random(4))
    single, several = sample["probes"][:4], sample["probes"][4:]
    value = {probe["question"].split(" for ")[1].split(" mentioned")[0]: probe["gold_answer"] for probe in single}
    assert len(value) == len(several) == 4
    for probe in several:
        keys = probe["question"].split(" for ")[1].split(" mentioned")[0].replace("and ", "").split(", ")
        assert len(set(keys)) == 3 and probe["gold_answer"] == ", ".join(value[key] for key in keys)


def test_the_words_are_those_of_the_tasks():
    task = needles(TASKS["niah_multikey_2"], None, 6, random.Random(5))
    mine = needle_text(Needles("needle"), 7, random.Random(5))
    assert task.document.split("\n")[0] == mine["conversation"].split("\n")[0]
    asked = task.question.split(" for ")[1].split(" mentioned")[0]
    key = mine["probes"][0]["question"].split(" for ")[1].split(" mentioned")[0]
    assert task.question.replace(asked, key) == mine["probes"][0]["question"]
    pairs = recall_pairs(0, 8, random.Random(1))
    mine = needle_text(Needles("pairs"), 8, random.Random(1))
    assert pairs.document.split("\n")[0] == mine["conversation"].split("\n")[0] and pairs.question.split(" ")[:4] == mine["probes"][0]["question"].split(" ")[:4]


def test_an_update_is_the_same_each_time_and_none_is_longer_than_asked_for(dataset):
    assert dataset[3] == dataset[3] != dataset[2]
    lengths = [len(example.written) for update in range(6) for example in dataset[update].examples]
    assert max(lengths) <= LENGTH and min(lengths) < LENGTH // 2 and len(lengths) == 48


def test_addresses_and_worth_lead_to_the_answer(dataset, tokenizer):
    values = set()
    for update in range(6):
        for example in dataset[update].examples:
            assert example.prefix == prompts.start_ids(tokenizer) and 1 <= len(example.pairs) <= 4
            for (_, answer), addresses in zip(example.pairs, example.addresses):
                assert addresses[-1] == NOWHERE and IGNORE not in addresses
                found = [(place, token) for place, token in zip(addresses, answer) if place != NOWHERE]
                assert all(example.written[place + 1] == token and example.worth[place] for place, token in found)
                between = tokenizer.decode([token for place, token in zip(addresses, answer) if place == NOWHERE])
                assert set(between) <= {",", "\n"}  # nothing else of an answer is without an address
                values.add(between.count(",") + 1)
    assert values == {1, 2, 3, 4}


def test_what_is_not_to_be_touched_comes_along(dataset):
    assert dataset[0].calm and dataset[0].foreign
    shown = dataset[0].foreign[0]
    assert not shown.written and LENGTH // 8 < len(shown.prefix) <= LENGTH // 4


def test_a_reader_in_context_is_asked_the_same_questions(dataset, tokenizer):
    shown = NeedleDataset(tokenizer, ("en",), 6, 8, 4, 0, True, (1,), False, False, LENGTH)
    for mine, read in zip(dataset[1].examples, shown[1].examples):
        assert read.pairs == mine.pairs and read.prefix == mine.written and not read.written


def test_no_item_of_the_tasks_is_among_what_is_trained_on(dataset, tokenizer):
    written = {tokenizer.decode(example.written) for update in range(6) for example in dataset[update].examples}
    for name in ("niah_single_1", "niah_multikey_2", "mqar"):
        assert not written & {item.document for item in make(name, tokenizer, 1024, 2, 0)}


def test_an_arm_is_trained_on_them_by_command(call, tmp_path):  # noqa: F811
    how = ["train_minimal.py", "--model", "tiny-llama", "--device", "cpu", "--arm", "a", "--out", tmp_path, "--updates", 2, "--warmup", 1, "--conversations", 2, "--probes", 2, "--workers", 0]
    code, _, err = call([*how, "--data", "needles", "--length", 700, "--groups", "1"])
    manifest = read_manifest(tmp_path / "a")
    assert code == 0 and manifest["data"] == "needles" and manifest["data_sha256"] == needle_data.needles_sha256() and manifest["optimizer"]["length"] == 700, err
    code, _, err = call([*how[:6], "c", *how[7:], "--objective", "context", "--data", "needles", "--length", 700])
    manifest = read_manifest(tmp_path / "c")
    assert code == 0 and manifest["data"] == "needles" and manifest["lora"] and not manifest["frozen"], err
    code, _, err = call([*how[:6], "b", *how[7:], "--data", "tinystories"])
    assert code == 2 and "--data tinystories: the recall objective needs questions; use bank or needles" in err
