"""A trained memory arm as an artefact: an adapter folder for this project, or (--merged) a whole Hugging Face model.

    python hub_model.py export --model smollm2-135m --adapter checkpoints/smollm2-deep --out FOLDER
        manifest.json (settings, base, training), adapter.safetensors, lora/ for a joint arm: what load_adapter attaches to its base
    python hub_model.py export --model smollm2-135m --adapter checkpoints/smollm2-deep --out FOLDER --merged
        base and adapter in safetensors, tokenizer, and the project's own modules as far as the model needs them (memory_model.py):
        AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True), then write and generate

Both have a model card, README.md. --push OWNER/NAME also uploads the folder; nothing else here reaches for the Hub.
"""
from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import tempfile
from pathlib import Path

import huggingface_hub
import torch
import transformers
from huggingface_hub import HfApi, ModelCardData

from adapter_checks import read_config
from manifests import UserError, current_commit, read_manifest, run_script, write_json
from memory_model import ADAPTER
from model_utils import Loaded, check_base, load_adapter, load_lora, load_model
from prompts import start_ids

HERE = Path(__file__).parent
LICENCES = {"Apache-2.0": "apache-2.0", "Gemma terms": "gemma"}  # the table's words -> the Hub's names; "other" for the rest
NOTICES = {"Gemma terms": "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms."}
QUESTIONS = {"en": ("Marta: I moved to Turin in May.", "Where did Marta move?"), "zh": ("玛塔：我五月搬到都灵了。", "玛塔搬到哪里了？")}

MODELLING = '''"""{base} with a memory of texts it no longer sees; memory_model.py says how."""
from transformers import {base}

from .memory_model import WithMemory


class {base}WithMemory(WithMemory, {base}):
    pass
'''

CARD = '''---
{front}
---
# {title}

{what} While the model reads a text, fast weights in the MLPs of {layers} of its layers change (In-Place TTT,
[arXiv 2604.06169](https://arxiv.org/abs/2604.06169)); then the text is dropped, tokens and KV cache, and questions are answered from
the fast weights alone. Made by ttt-conv-memory, whose RESULTS.md says how many, under the arm's name.

## Use
{use}
## Made from
| | |
| --- | --- |
{rows}

## Licence
The base's weights: {licence}. {notice}The code beside them: MIT{code}.
'''

USE_MERGED = '''
```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source = "FOLDER"  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, dtype=torch.float32)

texts = tokenizer([{text!r}], return_tensors="pt", padding=True)
memory = model.write(texts.input_ids, texts.attention_mask)  # a row a text
memory.save("memory.safetensors")

memory = model.load_memory("memory.safetensors")  # here or in another process
asked = model.prompt(tokenizer, [{question!r}], lang={lang!r})  # k questions a row of the memory
tokens = model.generate(**asked, memory=memory, max_new_tokens=24, do_sample=False, repetition_penalty=1.0,
                        tokenizer=tokenizer, stop_strings=["\\n"])
print(tokenizer.batch_decode(tokens[:, asked["input_ids"].shape[1]:], skip_special_tokens=True))
```

`model.prompt` gives the form of the benchmark's questions, on which an arm of the bank's conversations was trained; for prompts of another form say with `head_tokens` how many of a prompt's
tokens stand before its question (left out: a start token, if the tokenizer puts one before every text). Greedy decoding and sampling read a memory; beams, assisted and contrastive decoding are refused.
`model.write(..., memory=memory)` goes on from a memory. Without `memory=` the model is {without}.
'''

USE_ADAPTER = '''
In a checkout of ttt-conv-memory, with this folder's files in FOLDER:

```python
from model_utils import load_adapter, load_model

loaded = load_model({name!r})
ttt, manifest = load_adapter("FOLDER", loaded)  # refuses another base than the one it was trained on
```

`python run_experiment.py --model {name} --adapter FOLDER --out results/mine` asks it the benchmark; `python hub_model.py export --merged`
makes a whole model of it that needs no checkout.
'''


def export(name: str, adapter, out, merged: bool) -> Path:
    """Write the artefact of the checkpoint `adapter` on the table's model `name` to the folder `out`: all of it, or nothing.

    UserError where `out` holds something, or model and checkpoint do not go together.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not an empty folder; name a new one")
    manifest = read_manifest(adapter)
    if not manifest.get("ttt"):
        raise UserError(f"{adapter}/manifest.json: ttt is {manifest.get('ttt')}, an arm without fast weights; name a recall or lm arm")
    loaded = load_model(name)
    check_base(manifest, adapter, loaded)
    lora = load_lora(adapter, loaded) if manifest["lora"] else None
    load_adapter(adapter, loaded, lora_is_on=lora is not None)[0].detach()  # what cannot be attached is not passed on
    row = loaded.row
    manifest["base"] = {"hub": hub_name(loaded), "revision": row.revision, "licence": row.licence, "source": loaded.source, "sha256": loaded.sha256}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        folder = Path(work) / "model"
        folder.mkdir()
        if merged:
            write_merged(folder, loaded, lora, adapter, manifest)
        else:
            write_adapter(folder, adapter, manifest)
        (folder / "README.md").write_text(card(loaded, manifest, merged), encoding="utf-8")
        os.replace(folder, out)
    return out


def hub_name(loaded: Loaded) -> str | None:
    """The base's name on the Hub; None for random weights and for a folder of this machine."""
    hub = loaded.row.hub
    return None if hub is None or Path(hub).is_dir() else hub


def write_adapter(folder: Path, adapter, manifest: dict) -> None:
    for name in manifest["files"]:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(Path(adapter) / name, folder / name)
    write_json(folder / "manifest.json", manifest)


def write_merged(folder: Path, loaded: Loaded, lora, adapter, manifest: dict) -> None:
    """An ordinary model folder; a LoRA is added into the base's weights. Its config.json alone, without the code, is the base's."""
    settings = read_config(manifest, adapter)
    if lora is not None and settings.unit_targets and not settings.calibrated:
        raise UserError(f"{adapter}: this joint arm measures its values by W_down without the LoRA, which a merged model no longer has; export it without --merged")
    model = loaded.model if lora is None else lora.merge_and_unload()
    base = type(model).__name__
    if getattr(transformers, base, None) is not type(model):
        raise UserError(f"--model {loaded.row.name}: {base} is no class of the transformers library, so the exported code cannot name it; "
                        "export without --merged")
    model.to(narrowest_dtype(model)).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"ttt": manifest["ttt"], "start_ids": start_ids(loaded.tokenizer), "auto_map": {"AutoModelForCausalLM": f"modeling.{base}WithMemory"}})
    shutil.copy(Path(adapter) / ADAPTER, folder / ADAPTER)
    write_json(folder / "training.json", manifest)  # not manifest.json: this folder is a model, not an adapter of one
    (folder / "modeling.py").write_text(MODELLING.format(base=base), encoding="utf-8")
    commit = current_commit()
    for name in needed_modules("memory_model"):
        (folder / f"{name}.py").write_text(relative_source(name, commit), encoding="utf-8")
    shutil.copy(HERE / "LICENSE", folder / "LICENSE-code")


def narrowest_dtype(model) -> torch.dtype:
    """bfloat16, the dtype most bases are published in, where it keeps every weight bit for bit; float32 otherwise."""
    exact = all(torch.equal(p.bfloat16().to(p.dtype), p) for p in model.parameters())
    return torch.bfloat16 if exact else torch.float32


# ---- the project's modules, as a model folder carries them ----

def project_imports(name: str) -> list[ast.ImportFrom]:
    """The `from X import ...` statements of a module whose X is a module of this project."""
    nodes = list(ast.walk(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))))
    ours = lambda module: (HERE / f"{module}.py").is_file()
    if any(ours(alias.name) for node in nodes if isinstance(node, ast.Import) for alias in node.names):
        raise RuntimeError(f"{name}.py: imports a whole module of the project, which the library does not follow; write from X import ...")
    return [node for node in nodes if isinstance(node, ast.ImportFrom) and not node.level and ours(node.module)]


def needed_modules(name: str) -> list[str]:
    """The module and all of the project's that it needs, by name."""
    needed, queue = set(), [name]
    while queue:
        module = queue.pop()
        if module not in needed:
            needed.add(module)
            queue += [node.module for node in project_imports(module)]
    return sorted(needed)


def relative_source(name: str, commit: str) -> str:
    """A module's text with the project's imports made relative, under a line that says where it is from."""
    lines = (HERE / f"{name}.py").read_text(encoding="utf-8").splitlines(keepends=True)
    for node in project_imports(name):
        lines[node.lineno - 1] = lines[node.lineno - 1].replace(f"from {node.module} ", f"from .{node.module} ", 1)
    return f"# {name}.py of ttt-conv-memory, commit {commit}, as hub_model.py exports it: change it there\n" + "".join(lines)


# ---- the model card ----

def card(loaded: Loaded, manifest: dict, merged: bool) -> str:
    row, langs, joint = loaded.row, manifest["langs"], bool(manifest["lora"])
    trained = "joint: a LoRA on the base was trained along" if joint else "the base frozen" if manifest["frozen"] else (
        "not frozen: W_down of the TTT layers was trained along, and is used while a text is written or a memory read, never without")
    hub, licence = manifest["base"]["hub"], LICENCES.get(row.licence, "other")
    front = ModelCardData(
        base_model=hub, base_model_relation=(("finetune" if merged else "adapter") if hub else None), license=licence,
        license_name=row.licence if licence == "other" else None, language=langs, library_name="transformers" if merged else "ttt-conv-memory",
        pipeline_tag="text-generation", tags=["test-time-training", "in-place-ttt", "fast-weights", "memory"] + (["custom_code"] if merged else []))
    lang = langs[0]
    text, question = QUESTIONS[lang]
    without = "the base with the arm's LoRA in its weights" if joint else "the base, bit for bit"
    use = USE_MERGED.format(text=text, question=question, lang=lang, without=without) if merged else USE_ADAPTER.format(name=row.name)
    start = manifest.get("start")
    source = f"dequantised from a GGUF (`{row.gguf.install}`)" if row.gguf and loaded.source == "packages" else f"from {loaded.source}"
    facts = {
        "base": f"{hub or row.name} {row.revision or ''}".strip(), "base's weights": f"{source}, SHA-256 {loaded.sha256}",
        "arm": f"{manifest['arm']}, {trained}",
        "trained on": f"{manifest['data']} ({', '.join(langs)}), SHA-256 {manifest['data_sha256']}",
        "objective": f"{manifest['objective']}, {manifest['updates']} updates, seed {manifest['seed']}" + (f", from {start['arm']}" if start else ""),
        "commit of the training": manifest["commit"], "commit of the export": current_commit(), "adapter's SHA-256": manifest["files"][ADAPTER]}
    what = f"{hub or row.name} " + ("with" if merged else "takes this adapter:") + " a trained memory of conversations it no longer sees."
    return CARD.format(front=str(front).strip(), title=f"{manifest['arm']}: {row.name} with a memory", what=what, use=use,
                       layers=len(manifest["ttt"]["layers"]), rows="\n".join(f"| {name} | {value} |" for name, value in facts.items()), licence=row.licence,
                       notice=NOTICES[row.licence] + " " if row.licence in NOTICES else "", code=" (LICENSE-code)" if merged else "")


# ---- the Hub ----

def check_push(name: str) -> None:
    """UserError unless an upload to OWNER/NAME can be tried: asked before the work that comes first."""
    owner, _, short = name.partition("/")
    if not owner or not short or "/" in short:
        raise UserError(f"--push {name}: not a name on the Hub; write OWNER/NAME")
    if not os.environ.get("HF_TOKEN"):
        raise UserError("--push: HF_TOKEN is not set; put a token with write access into it")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError("--push: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or leave --push out")


def push(folder: Path, name: str) -> str:
    """Upload the folder as OWNER/NAME, a private repository if it is new; its address."""
    api = HfApi(token=os.environ["HF_TOKEN"])
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"ttt-conv-memory {current_commit()}")
    except Exception as error:  # no network, no such owner, no right to write, a name the Hub refuses: the mends are the same
        raise UserError(f"--push {name}: the upload failed ({type(error).__name__}); {folder} is whole: mend the network, the name or the token's "
                        f"rights, then `hf upload {name} {folder}`") from error
    return str(address)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write a checkpoint as a folder that others can load")
    command.add_argument("--model", required=True, help="the arm's base: a row of the table (python model_utils.py), a folder or a hub id")
    command.add_argument("--adapter", required=True, metavar="FOLDER", help="the checkpoint of a recall or lm arm")
    command.add_argument("--out", required=True, metavar="FOLDER", help="a new folder, or an empty one")
    command.add_argument("--merged", action="store_true", help="the base's weights, the tokenizer and the code too: needs nothing but transformers")
    command.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to the Hub (token: HF_TOKEN); a new repository is private")
    arguments = parser.parse_args()
    if arguments.push:
        check_push(arguments.push)
    out = export(arguments.model, arguments.adapter, arguments.out, arguments.merged)
    print(f"{out}: {sum(p.stat().st_size for p in out.rglob('*') if p.is_file()) / 1e6:.1f} MB")
    if arguments.push:
        print(push(out, arguments.push))


if __name__ == "__main__":
    run_script(main)
