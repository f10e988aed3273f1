"""The exported model: what it says elsewhere is what the project says here, and without a memory it is its base."""
import functools
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, assert_same_memory, batch_of, strengthen, token_rows
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

import hub_model
import prompts
from arms import LORA, LORA_FILES, save_lora
from decoding import Steps, prefill, stop_ids, write_rows
from hub_model import card, export, main, needed_modules, relative_source
from in_place_ttt import InPlaceTTT
from manifests import UserError, write_manifest
from memory import Memory, MemoryFileError
from memory_model import NEUTRAL, WithMemory
from model_utils import MODELS, Loaded, load_adapter, load_model, save_adapter

CASES = [(family, form) for family in FAMILIES for form in ("codes", "plain")]
TEXTS, HEAD, TAILS = token_rows((30, 11, 19)), token_rows((9,), seed=1)[0], token_rows((3, 8, 5), seed=2)
NEW = 10

# What somebody does who has the folders and transformers: {folder: ...} in, tensors out.
STRANGER = """
import json, re, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
job = json.load(open("job.json"))
ids, mask, asked = (torch.tensor(job[name]) for name in ("ids", "mask", "asked"))
asked_mask, out = torch.tensor(job["asked_mask"]), {}
for folder in job["folders"]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    file = folder.replace("/", "_") + ".memory"
    if sys.argv[1] == "write":
        with torch.no_grad():
            out[folder] = model(input_ids=ids, attention_mask=mask).logits
        model.write(ids, mask).save(file)
        known = set(sys.modules) & {"in_place_ttt", "memory", "memory_model", "hub_model"}
        assert not known, known
    else:
        out[folder] = model.generate(asked, attention_mask=asked_mask, memory=model.load_memory(file), head_tokens=job["head"],
                                     max_new_tokens=job["new"], do_sample=False, eos_token_id=job["stops"])
if sys.argv[1] == "write":
    code = re.search(r"```python\\n(.*?)```", open(folder + "/README.md").read(), re.S)[1]
    exec(code.replace('"FOLDER"', repr(folder)))
torch.save(out, sys.argv[1] + ".pt")
"""


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def manifest_of(loaded, form, **changes):
    config = getattr(loaded.row, form)
    return {"arm": f"{loaded.row.name}-{form}", "model": loaded.row.name, "model_sha256": loaded.sha256, "objective": "recall", "frozen": True, "seed": 3,
            "start": None, "ttt": config.to_dict(), "lora": None, "data": "bank", "langs": ["en", "zh"], "data_sha256": "d" * 64, "updates": 7,
            "commit": "0123456789ab", "command": "python train_minimal.py"} | changes


def save_checkpoint(folder, family, form):
    loaded = load_model(family)
    ttt = strengthen(InPlaceTTT(loaded.model, getattr(loaded.row, form)))
    for name, parameter in ttt.named_parameters():
        if name.endswith(("proj", "proj_x", "proj_out", "proj_x_out")):
            parameter.data *= 30  # a tiny model with a tied head repeats its last token unless much is read
    save_adapter(folder, ttt, manifest_of(loaded, form))
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """checkpoints(family, form) -> a folder with random fast weights of that form."""
    place = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda family, form: save_checkpoint(place / f"{family}-{form}", family, form))


@pytest.fixture(scope="module")
def merged(checkpoints, tmp_path_factory):
    """merged(family, form) -> the folder of the whole model."""
    place = tmp_path_factory.mktemp("merged")
    return functools.cache(lambda family, form: export(family, checkpoints(family, form), place / f"{family}-{form}", merged=True))


def open_folder(folder, family):
    base = type(load_model(family).model)
    return type("Opened", (WithMemory, base), {}).from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def opened(merged):
    """opened(family, form) -> the model of that folder, by the project's own class."""
    return functools.cache(lambda family, form: open_folder(merged(family, form), family))


@pytest.fixture(scope="module")
def project(checkpoints):
    """project(family, form) -> (Loaded, InPlaceTTT) as the project's scripts have them."""
    def attached(family, form):
        loaded = load_model(family)
        return loaded, load_adapter(checkpoints(family, form), loaded)[0]
    return functools.cache(attached)


def reference(loaded, ttt, memory, heads, tails, new=NEW):
    """(first logits, tokens) as the project answers: head and question in a read context each; heads None: all of it in one."""
    past = None
    if heads:
        with ttt.read(memory) as session:
            _, past = prefill(loaded.model, heads, 258, None, session)
    with ttt.read(memory) as session:
        logits, past = prefill(loaded.model, tails, 258, past, session)
        steps = Steps(loaded.model, loaded.tokenizer, logits, past, new, session)
        for _ in range(new - 1):
            steps.run()
    return logits, steps.tokens_BN


def stops(loaded):
    return sorted(stop_ids(loaded.tokenizer))


def asked(tails=TAILS, head=HEAD):
    ids, mask = batch_of([head + tail for tail in tails])
    return {"inputs": ids, "attention_mask": mask}


def said(model, loaded, memory, new=NEW, **how):
    """The new tokens, padded to `new`."""
    how = asked() | {"do_sample": False, "eos_token_id": stops(loaded), "head_tokens": len(HEAD)} | how
    tokens = model.generate(memory=memory, max_new_tokens=new, **how)[:, how["inputs"].shape[1]:]
    return torch.nn.functional.pad(tokens, (0, new - tokens.shape[1]), value=258)


# ---- elsewhere ----

@pytest.fixture(scope="module")
def elsewhere(merged, tmp_path_factory):
    """Two processes in a row, neither of which can see the project: what they found, and where."""
    place = tmp_path_factory.mktemp("elsewhere")
    folders = [str(merged(*case)) for case in CASES]
    (ids, mask), question = batch_of(TEXTS), asked()
    (place / "job.json").write_text(json.dumps({
        "folders": folders, "ids": ids.tolist(), "mask": mask.tolist(), "asked": question["inputs"].tolist(), "asked_mask": question["attention_mask"].tolist(),
        "head": len(HEAD), "new": NEW, "stops": stops(load_model("tiny-llama"))}))
    (place / "stranger.py").write_text(STRANGER)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_TOKEN"))}
    env |= {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for step in ("write", "ask"):
        shown = subprocess.run([sys.executable, "-I", "stranger.py", step], cwd=place, env=env, capture_output=True, text=True)
        assert shown.returncode == 0, shown.stderr[-3000:]
    return types.SimpleNamespace(place=place, logits=torch.load(place / "write.pt"), tokens=torch.load(place / "ask.pt"))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_elsewhere_it_is_its_base_writes_the_same_and_answers_the_same(case, elsewhere, merged, project):
    folder, (loaded, ttt) = str(merged(*case)), project(*case)
    ids, mask = batch_of(TEXTS)
    assert torch.equal(elsewhere.logits[folder], load_model(case[0]).model(input_ids=ids, attention_mask=mask).logits)
    memory, _ = write_rows(loaded.model, ttt, TEXTS, 258)
    there = Memory.load(elsewhere.place / (folder.replace("/", "_") + ".memory"))
    assert_same_memory(there, memory, atol=1e-6)
    _, tokens = reference(loaded, ttt, memory, [HEAD] * 3, TAILS)
    got = elsewhere.tokens[folder][:, asked()["inputs"].shape[1]:]
    assert torch.equal(got, tokens[:, :got.shape[1]]) and (tokens[:, got.shape[1]:] == 258).all()


def test_the_folder_without_its_code_is_the_base(merged):
    loaded, again = load_model("tiny-llama"), load_model(str(merged("tiny-llama", "codes")))
    assert type(again.model) is type(loaded.model)
    ids, mask = batch_of(TEXTS)
    assert torch.equal(again.model(ids, attention_mask=mask).logits, loaded.model(ids, attention_mask=mask).logits)


# ---- the loaded model ----

@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_without_a_memory_it_is_its_base(case, opened):
    base, model = load_model(case[0]).model, opened(*case)
    model.write(*batch_of(TEXTS))
    for how in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True}):
        torch.manual_seed(5)
        expected = base.generate(**asked(), max_new_tokens=6, **how)
        torch.manual_seed(5)
        assert torch.equal(model.generate(**asked(), max_new_tokens=6, **how), expected)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_padded_batch_says_what_each_row_says_alone(case, opened, project):
    model, (loaded, ttt) = opened(*case), project(*case)
    memory = model.write(*batch_of(TEXTS))
    together = said(model, loaded, memory)
    assert torch.equal(together, reference(loaded, ttt, memory, [HEAD] * 3, TAILS)[1])
    for r in range(3):
        alone = model.write(torch.tensor([TEXTS[r]]))
        assert_same_memory(memory.select([r]), alone, atol=1e-4)
        assert torch.equal(said(model, loaded, alone, **asked(TAILS[r:r + 1])), together[r:r + 1])
    assert not torch.equal(together, said(model, loaded, memory.scale(0.0)))  # else none of this says anything


@pytest.mark.parametrize("layout", ["right", "holes"])
def test_pads_anywhere_in_a_text_write_nothing(layout, opened):
    model = opened("tiny-gemma3", "codes")
    assert_same_memory(model.write(*batch_of(TEXTS, layout)), model.write(*batch_of(TEXTS)), atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_head_is_read_in_a_context_of_its_own(case, opened, project):
    model, (loaded, ttt) = opened(*case), project(*case)
    memory = model.write(*batch_of(TEXTS))
    first = lambda head: model.generate(**asked(), memory=memory, head_tokens=head, max_new_tokens=1, do_sample=False, output_logits=True,
                                        return_dict_in_generate=True).logits[0]
    apart, _ = reference(loaded, ttt, memory, [HEAD] * 3, TAILS, new=1)
    whole, _ = reference(loaded, ttt, memory, None, [HEAD + tail for tail in TAILS], new=1)
    torch.testing.assert_close(first(len(HEAD)), apart, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(first(0), whole, atol=1e-4, rtol=1e-4)
    assert (case[1] == "plain") == torch.allclose(apart, whole, atol=1e-3)  # a plain arm's queries know nothing of each other


@pytest.mark.parametrize("family", FAMILIES)
def test_a_start_token_is_no_part_of_the_question(family, opened, monkeypatch):
    model, start = opened(family, "codes"), 256
    assert model.config.start_ids == []  # the tiny tokenizers put nothing before a text
    monkeypatch.setattr(model.config, "start_ids", [start])
    memory, tails = model.write(*batch_of(TEXTS)), [[start] + TAILS[0], TAILS[1], [start] + TAILS[2]]
    first = lambda rows, **head: model.generate(**asked(rows, []), memory=memory, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True,
                                                **head).logits[0]
    left_out = first(tails)
    for row, head in enumerate((1, 0, 1)):
        torch.testing.assert_close(left_out[row], first(tails, head_tokens=head)[row], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(left_out[row], first(tails, head_tokens=1 - head)[row], atol=1e-3)
    several = model.generate(**asked(tails, []), memory=memory, max_new_tokens=2, do_sample=True, num_return_sequences=2)
    assert several.shape[0] == 2 * len(tails)


def test_prompts_longer_than_a_sliding_window(opened, project):
    model, (loaded, ttt) = opened("tiny-gemma3", "codes"), project("tiny-gemma3", "codes")
    tails, texts = token_rows((600, 530), seed=4), token_rows((1300, 700), seed=5)
    memory = model.write(*batch_of(texts))
    assert_same_memory(memory, write_rows(loaded.model, ttt, texts, 258)[0], atol=1e-6)
    _, tokens = reference(loaded, ttt, memory, [HEAD] * 2, tails)
    assert torch.equal(said(model, loaded, memory, **asked(tails)), tokens)


@pytest.mark.parametrize("form", ["codes", "plain"])
def test_sampling_and_several_prompts_a_row(form, opened, project):
    model, (loaded, _) = opened("tiny-qwen3", form), project("tiny-qwen3", form)
    memory = model.write(*batch_of(TEXTS))
    greedy = said(model, loaded, memory)
    assert torch.equal(said(model, loaded, memory, do_sample=True, top_k=1, num_return_sequences=2), greedy.repeat_interleave(2, 0))
    assert torch.equal(said(model, loaded, memory.select([1]), **asked(TAILS))[1:2], greedy[1:2])
    torch.manual_seed(0)
    sampled = said(model, loaded, memory, do_sample=True, temperature=20.0, top_k=0)
    assert not torch.equal(sampled, greedy)
    with pytest.raises(ValueError, match="memory of 2 rows cannot serve a batch of 3"):
        said(model, loaded, memory.select([0, 1]))
    assert_base_again(model, "tiny-qwen3")


def test_writing_on_from_a_memory(opened, project):
    model, (loaded, ttt) = opened("tiny-llama", "codes"), project("tiny-llama", "codes")
    second = token_rows((6, 12, 9), seed=9)
    first = model.write(*batch_of(TEXTS))
    expected, _ = write_rows(loaded.model, ttt, second, 258, first)
    assert_same_memory(model.write(*batch_of(second), memory=first), expected, atol=1e-6)


def test_the_prompt_has_the_project_s_tokens(opened, project):
    model, (loaded, _) = opened("tiny-llama", "codes"), project("tiny-llama", "codes")
    made = model.prompt(loaded.tokenizer, ["Who?", "Where to?"], lang="zh")
    head = prompts.head_ids(loaded.tokenizer, "zh", False)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(made["input_ids"], made["attention_mask"])]
    assert rows == [head + prompts.tail_ids(loaded.tokenizer, "zh", question) for question in ("Who?", "Where to?")]
    assert made["head_tokens"] == len(head) and made["attention_mask"][:, -1].all()
    assert model.generate(**made, memory=model.write(torch.tensor(TEXTS[:1])), max_new_tokens=2).shape[0] == 2
    with pytest.raises(ValueError, match="lang is 'fr'; the prompt forms are en, zh"):
        model.prompt(loaded.tokenizer, ["Qui ?"], lang="fr")


# ---- what is refused, and what stays behind: nothing ----

def assert_base_again(model, family):
    assert model.ttt.session is None and not model._forward_pre_hooks and not model.get_input_embeddings()._forward_hooks
    ids, mask = batch_of(TEXTS)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, load_model(family).model(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize("options", [
    {"num_beams": 2}, {"num_beams": 2, "do_sample": True}, {"penalty_alpha": 0.6, "top_k": 4}, {"prompt_lookup_num_tokens": 2},
    {"assistant_model": "itself"}, {"dola_layers": "low"}, {"guidance_scale": 1.5}, {"use_cache": False}, {"cache_implementation": "static"}, {"past_key_values": ()},
    {"custom_generate": "some/recipe"}, {"token_healing": True}, {"generation_config": GenerationConfig(num_beams=4)}, {"prefill_chunk_size": 4}],
    ids=lambda options: next(iter(options)))
def test_ways_of_decoding_that_do_not_go_with_a_memory(options, opened):
    model = opened("tiny-llama", "codes")
    memory = model.write(*batch_of(TEXTS))
    options = {name: model if value == "itself" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=r"^\w+: does not go with a memory, [^\n]*$") as error:
        model.generate(**asked(), memory=memory, max_new_tokens=3, **options)
    assert str(error.value).split(":")[0] in set(options) | {"num_beams"}
    assert_base_again(model, "tiny-llama")


def test_a_default_of_the_model_is_looked_at_too(opened, monkeypatch):
    model = opened("tiny-llama", "codes")
    memory = model.write(*batch_of(TEXTS))
    monkeypatch.setattr(model.generation_config, "cache_implementation", "hybrid")  # as Gemma's comes; a memory is read with a dynamic one
    assert model.generate(**asked(), memory=memory, max_new_tokens=3).shape[0] == 3
    monkeypatch.setattr(model.generation_config, "num_beams", 2)
    with pytest.raises(ValueError, match="num_beams: does not go"):
        model.generate(**asked(), memory=memory, max_new_tokens=3)
    assert NEUTRAL["num_beams"] == 1


def test_an_error_on_the_way_leaves_the_base(opened):
    model = opened("tiny-gemma3", "codes")
    memory = model.write(*batch_of(TEXTS))

    def stop(ids, scores):
        if ids.shape[1] > asked()["inputs"].shape[1] + 2:
            raise KeyboardInterrupt
        return scores

    with pytest.raises(KeyboardInterrupt):
        model.generate(**asked(), memory=memory, max_new_tokens=9, logits_processor=[stop])
    assert_base_again(model, "tiny-gemma3")
    with pytest.raises(ValueError, match="cannot go on"):
        model.write(*batch_of(TEXTS[:2]), memory=memory)
    assert_base_again(model, "tiny-gemma3")


def test_masks_and_rows_that_cannot_be(opened, monkeypatch):
    model = opened("tiny-llama", "codes")
    ids, mask = batch_of(TEXTS)
    memory = model.write(ids, mask)
    for given in (lambda **how: model.write(ids, **how), lambda **how: model.generate(ids, memory=memory, **how)):
        with pytest.raises(ValueError, match="attention_mask: missing"):
            given()
        with pytest.raises(ValueError, match=r"attention_mask: \[3, 29\] for input_ids of \[3, 30\]"):
            given(attention_mask=mask[:, 1:])
    for layout in ("right", "holes"):
        wrong_ids, wrong = batch_of(TEXTS, layout)
        with pytest.raises(ValueError, match="pads behind a token; pad on the left"):
            model.generate(wrong_ids, attention_mask=wrong, memory=memory, max_new_tokens=2)
    for head in (-1, 11):
        with pytest.raises(ValueError, match=f"head_tokens is {head}; the shortest prompt has 11 tokens"):
            model.generate(ids, attention_mask=mask, memory=memory, head_tokens=head, max_new_tokens=2)
    with pytest.raises(ValueError, match="input_ids: missing"):
        model.generate(memory=memory)
    with pytest.raises(ValueError, match="memory: a list; give what write or load_memory returned"):
        model.generate(ids, attention_mask=mask, memory=[memory, memory], max_new_tokens=2)
    with pytest.raises(ValueError, match="row 1 has no token"):
        model.write(ids, mask * torch.tensor([[1], [0], [1]]))
    monkeypatch.setattr(model.config, "max_position_embeddings", 29)
    with pytest.raises(UserError, match="write: needs 30 tokens, the model's window is 29"):
        model.write(ids, mask)
    assert_base_again(model, "tiny-llama")


def test_another_model_s_memory_and_a_broken_one(opened, tmp_path):
    path = tmp_path / "m.safetensors"
    opened("tiny-llama", "plain").write(*batch_of(TEXTS)).save(path)
    with pytest.raises(MemoryFileError, match=re.escape(f"{path}: another model's memory")):
        opened("tiny-llama", "codes").load_memory(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(MemoryFileError, match="not a whole safetensors file"):
        opened("tiny-llama", "plain").load_memory(path)


def test_it_is_not_saved_anew_and_not_used_untrained(opened):
    with pytest.raises(NotImplementedError, match="copy the folder it came from"):
        opened("tiny-llama", "codes").save_pretrained("anywhere")
    base = load_model("tiny-llama").model
    with pytest.raises(RuntimeError, match="load the model with from_pretrained"):
        type("Untrained", (WithMemory, type(base)), {})(base.config).write(torch.tensor(TEXTS[:1]))


# ---- the folders ----

def test_an_adapter_folder_attaches_to_its_base(checkpoints, project, tmp_path, run_main):
    source = checkpoints("tiny-qwen2", "codes")
    code, shown, _ = run_main(main, ["hub_model.py", "export", "--model", "tiny-qwen2", "--adapter", source, "--out", tmp_path / "adapter"])
    assert code == 0 and str(tmp_path / "adapter") in shown
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["README.md", "adapter.safetensors", "manifest.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    loaded = load_model("tiny-qwen2")
    ttt, manifest = load_adapter(tmp_path / "adapter", loaded)
    assert manifest["base"] == {"hub": None, "revision": None, "licence": "none (random weights)", "source": "random weights, seed 0", "sha256": loaded.sha256}
    mine, theirs = (write_rows(m.model, t, TEXTS, 258)[0] for m, t in ((loaded, ttt), project("tiny-qwen2", "codes")))
    assert mine.digest() == theirs.digest()


@pytest.fixture
def joint(tmp_path):
    """A joint arm's checkpoint with a LoRA that shows."""
    loaded = load_model("tiny-qwen3")
    lora = get_peft_model(loaded.model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    ttt = strengthen(InPlaceTTT(loaded.model, loaded.row.codes))
    folder = tmp_path / "joint"
    folder.mkdir()
    save_lora(folder, lora)
    save_adapter(folder, ttt, manifest_of(loaded, "codes", lora=LORA, frozen=False), LORA_FILES)
    return folder


def test_a_joint_arm(joint, tmp_path):
    loaded = load_model("tiny-qwen3")
    ttt, _ = load_adapter(joint, loaded)
    memory, _ = write_rows(loaded.model, ttt, TEXTS, 258)
    _, tokens = reference(loaded, ttt, memory, [HEAD] * 3, TAILS)
    model = open_folder(export("tiny-qwen3", joint, tmp_path / "whole", merged=True), "tiny-qwen3")
    ids, mask = batch_of(TEXTS)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, loaded.model(input_ids=ids, attention_mask=mask).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(ids, attention_mask=mask).logits, load_model("tiny-qwen3").model(ids, attention_mask=mask).logits, atol=1e-2)
    assert_same_memory(model.write(ids, mask), memory, atol=1e-4)
    assert torch.equal(said(model, loaded, memory), tokens)
    assert "with the arm's LoRA in its weights" in (tmp_path / "whole/README.md").read_text()
    assert not (tmp_path / "whole/manifest.json").exists()  # it is no adapter of anything
    adapter = export("tiny-qwen3", joint, tmp_path / "adapter", merged=False)
    assert (adapter / "lora/adapter_model.safetensors").is_file()
    again = load_model("tiny-qwen3")
    again_ttt, _ = load_adapter(adapter, again)
    assert write_rows(again.model, again_ttt, TEXTS, 258)[0].digest() == memory.digest()


def test_weights_of_half_precision_stay_of_half_precision(tmp_path, monkeypatch):
    loaded = load_model("tiny-llama")
    loaded.model.bfloat16().save_pretrained(tmp_path / "base")
    loaded.tokenizer.save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base"))
    ttt = strengthen(InPlaceTTT(base.model, base.row.codes))
    save_adapter(tmp_path / "arm", ttt, manifest_of(base, "codes", model="base"))
    folder = export(str(tmp_path / "base"), tmp_path / "arm", tmp_path / "whole", merged=True)
    assert (folder / "model.safetensors").stat().st_size < 1.1 * (tmp_path / "base/model.safetensors").stat().st_size
    ids, mask = batch_of(TEXTS)
    model = open_folder(folder, "tiny-llama")
    assert torch.equal(model(ids, attention_mask=mask).logits, load_model(str(tmp_path / "base")).model(ids, attention_mask=mask).logits)
    assert ModelCard.load(folder / "README.md").data.base_model is None  # a folder of this machine is nobody else's base


def test_the_code_that_travels_is_the_project_s():
    names = needed_modules("memory_model")
    assert {"decoding", "fast_weight", "fixed_cache", "in_place_ttt", "memory", "memory_model", "sessions", "side_stream"} <= set(names)
    assert not {"model_utils", "hub_model", "arms"} & set(names)
    for name in names:
        text = relative_source(name, "0123456789ab")
        assert text.startswith(f"# {name}.py of ttt-conv-memory") and not re.search(rf"^\s*(from|import) ({'|'.join(names)})\b", text, re.M)
        assert re.sub(r"^(\s*from )\.", r"\1", text.split("\n", 1)[1], flags=re.M) == (Path(hub_model.__file__).parent / f"{name}.py").read_text(encoding="utf-8")


# ---- the card ----

def test_the_card_of_a_whole_model(merged):
    folder = merged("tiny-llama", "codes")
    text, data = (folder / "README.md").read_text(), ModelCard.load(folder / "README.md").data
    assert (data.license, data.license_name, data.library_name, data.language) == ("other", "none (random weights)", "transformers", ["en", "zh"])
    assert "custom_code" in data.tags and data.base_model is None
    for word in ("trust_remote_code=True", "model.write(", "0123456789ab", "bank (en, zh)", "7 updates, seed 3", "d" * 64, "the base frozen", "LICENSE-code"):
        assert word in text
    assert str(folder) not in text and json.loads((folder / "training.json").read_text())["commit"] == "0123456789ab"


@pytest.mark.parametrize("name, licence", [("gemma3-270m", "gemma"), ("smollm2-135m", "apache-2.0")])
def test_the_card_names_the_base_and_its_licence(name, licence):
    row = MODELS[name]
    manifest = manifest_of(Loaded(None, None, row, "s" * 64, "packages"), "codes", start={"arm": "earlier"})
    manifest |= {"files": {"adapter.safetensors": "a" * 64}, "base": {"hub": row.hub}}
    text = card(Loaded(None, None, row, "s" * 64, "packages"), manifest, merged=False)
    data = ModelCard(text).data
    assert (data.base_model, data.license, data.base_model_relation, data.library_name) == (row.hub, licence, "adapter", "ttt-conv-memory")
    assert "dequantised from a GGUF" in text and "s" * 64 in text and row.revision in text and ", from earlier |" in text
    assert ("Gemma Terms of Use" in text) == (licence == "gemma")


# ---- bad input ----

def test_bad_input_is_one_line_and_leaves_nothing(checkpoints, tmp_path, run_main):
    arm, out = checkpoints("tiny-llama", "codes"), tmp_path / "place" / "out"
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "kept").write_text("mine")
    file.write_text("mine")
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    write_manifest(tuned, manifest_of(load_model("tiny-llama"), "codes", ttt=None, objective="context"), [])

    def refused(adapter=arm, model="tiny-llama", out=out, *more):
        code, _, error = run_main(main, ["hub_model.py", "export", "--model", model, "--adapter", adapter, "--out", out, *more])
        assert code == 2 and error.count("\n") == 1, error
        return error

    assert f"--out {full}: exists and is not an empty folder; name a new one" in refused(out=full)
    assert f"--out {file}: exists" in refused(out=file)
    assert f"{tuned}/manifest.json: ttt is None" in refused(adapter=tuned)
    assert "no trained adapter there" in refused(adapter=tmp_path / "nowhere")
    assert "use the adapter of this base" in refused(model="tiny-qwen2")
    assert "--model nobody: unknown" in refused(model="nobody")
    assert (full / "kept").read_text() == "mine" and file.read_text() == "mine" and not out.parent.exists()


def test_written_whole_or_not_at_all(checkpoints, tmp_path, monkeypatch):
    place = tmp_path / "place"
    (place / "out").mkdir(parents=True)
    monkeypatch.setattr(hub_model, "card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export("tiny-llama", checkpoints("tiny-llama", "codes"), place / "out", merged=True)
    assert [p.name for p in place.iterdir()] == ["out"] and not list((place / "out").iterdir())
    monkeypatch.undo()
    export("tiny-llama", checkpoints("tiny-llama", "codes"), place / "out", merged=False)
    assert [p.name for p in place.iterdir()] == ["out"] and (place / "out/README.md").is_file()


def test_a_base_of_foreign_code_is_not_merged(checkpoints, tmp_path, monkeypatch):
    real = load_model("tiny-llama")
    real.model.__class__ = type("ForeignForCausalLM", (type(real.model),), {})
    monkeypatch.setattr(hub_model, "load_model", lambda name: real)
    with pytest.raises(UserError, match="ForeignForCausalLM is no class of the transformers library"):
        export("tiny-llama", checkpoints("tiny-llama", "codes"), tmp_path / "out", merged=True)


# ---- the Hub ----

class StubApi:
    calls = []

    def __init__(self, token):
        self.calls.append(("token", token))

    def create_repo(self, name, private, exist_ok):
        self.calls.append(("create", name, private, exist_ok))
        return f"https://hub/{name}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, Path(folder_path), sorted(p.name for p in Path(folder_path).iterdir())))


@pytest.fixture
def pushed(checkpoints, tmp_path, run_main):
    """pushed(name or None) -> (exit code, stdout, stderr) of an export."""
    def run(name):
        more = [] if name is None else ["--push", name]
        arm = checkpoints("tiny-llama", "plain")
        return run_main(main, ["hub_model.py", "export", "--model", "tiny-llama", "--adapter", arm, "--out", tmp_path / "out", *more])
    return run


def test_push_uploads_the_folder_and_only_when_told(pushed, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_model, "HfApi", StubApi)
    monkeypatch.setattr(StubApi, "calls", [])
    monkeypatch.setattr(hub_model.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert pushed(None)[0] == 0 and not StubApi.calls
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    code, shown, error = pushed("me/mine")
    assert code == 0 and "https://hub/me/mine" in shown and "secret" not in shown + error
    assert StubApi.calls == [("token", "secret"), ("create", "me/mine", True, True),
                             ("upload", "me/mine", tmp_path / "out", ["README.md", "adapter.safetensors", "manifest.json"])]


@pytest.mark.parametrize("name, token, offline, word", [
    ("mine", "t", False, "--push mine: not a name on the Hub; write OWNER/NAME"), ("a/b/c", "t", False, "write OWNER/NAME"),
    ("me/mine", "", False, "HF_TOKEN is not set"), ("me/mine", "t", True, "HF_HUB_OFFLINE is set")])
def test_a_push_that_cannot_work_is_refused_before_anything_is_written(name, token, offline, word, pushed, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_model.huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_TOKEN", token)
    code, _, error = pushed(name)
    assert code == 2 and word in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_push_that_fails_keeps_the_folder(pushed, tmp_path, monkeypatch):
    class Refusing(StubApi):
        def create_repo(self, *_, **__):
            raise ConnectionError("no route to host")

    monkeypatch.setattr(hub_model, "HfApi", Refusing)
    monkeypatch.setattr(hub_model.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "secret")
    code, _, error = pushed("me/mine")
    assert code == 2 and error.count("\n") == 1 and "secret" not in error
    assert "the upload failed (ConnectionError)" in error and f"hf upload me/mine {tmp_path / 'out'}" in error
    assert (tmp_path / "out/README.md").is_file()
