"""Bits per byte of a text, by a model that may learn while it reads, and a check that it plays by the rules.

    python score_lm.py --text scipy-stats --adapter checkpoints/smollm2-lm --out results/score/lm
    python score_lm.py --text scipy-stats --bytes 40000 --train down:26-29 --epochs 1,2,4 --seeds 0,1,2 --out results/score/adamw
    python score_lm.py --audit --adapter checkpoints/smollm2-lm      hold that scorer to the rules of scoring_audit.py
    python score_lm.py --audit my_module:MyScorer                    or anybody's
    python score_lm.py --report                                      write the runs in results/score/ into RESULTS.md

A text is scored with TTT off, the legal way (score a piece, then learn from it) and the forbidden way (learn from it, then score it), kept only to show what the
rule is worth. What learns: with --adapter its fast weights (in place), with --train parameters of the base by AdamW. scoring.py says what attention sees. Nothing
learned outlives a document, and the base's parameters are checked to be what they were. --text is a file (one document, more with --separator, or .jsonl with one
a line) or a text that comes with the installed packages. A run that was cut off goes on with --resume; runs that differ in their passes alone (a seed on each GPU,
say) are one in the report.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

import scoring_audit
import scoring_report
from arms import LORA, base_digest
from decoding import check_window
from evaluate import write_text
from in_place_ttt import InPlaceTTT
from manifests import UserError, provenance, run_script, write_json
from model_utils import Loaded, clip, find_row, load_adapter, load_model, parse_layers, pick_device
from scoring import AdamW, InPlace, Off, Plan, start_token
from scoring_texts import BUILTIN, Document, Tokens, digest_of, prefix, read_documents, tokenise

STRETCH, STRETCHES = 128, 64  # where documents are few, a row keeps stretches of its document apart, for pairing: of so many tokens at least, so many at most


# ---- scoring ----

def score_document(scorer, tokens: Tokens, stretches: bool = False) -> dict:
    """One row: tokens, the bytes they stand for, the bits they cost, in all and where asked for by stretches. Each token is scored once, or RuntimeError."""
    started, nats = time.perf_counter(), []
    for event in scorer.events(tokens.ids):
        if hasattr(event, "realised"):
            if event.start != len(nats):
                raise RuntimeError(f"{tokens.name}: tokens from {event.start} on are scored when {len(nats)} were")
            nats += (-event.realised).tolist()
    if len(nats) != len(tokens.ids):
        raise RuntimeError(f"{tokens.name}: {len(nats)} of {len(tokens.ids)} tokens are scored")
    bits = [value / math.log(2) for value in nats]
    length = max(STRETCH, -(-len(bits) // STRETCHES))
    parts = [slice(start, start + length) for start in range(0, len(bits), length)] if stretches else []
    return {"document": tokens.name, "tokens": len(bits), "bytes": sum(tokens.nbytes), "bits": round(sum(bits), 3),
            "seconds": round(time.perf_counter() - started, 3), "blocks": [[len(bits[p]), sum(tokens.nbytes[p]), round(sum(bits[p]), 3)] for p in parts]}


def chosen(loaded: Loaded, what: str) -> dict[str, torch.nn.Parameter]:
    """The base's parameters that a name stands for: norms, all, or down:LAYERS (W_down of these layers)."""
    named = dict(loaded.model.named_parameters())
    if what == "all":
        return named
    if what == "norms":
        return {name: p for name, p in named.items() if p.dim() == 1 and "norm" in name}
    kind, _, layers = what.partition(":")
    if kind != "down" or not layers:
        raise UserError(f"--train {what}: unknown; use norms, all, lora or down:LAYERS, for example down:26-29")
    try:
        return {f"layers.{i}.down_proj": loaded.model.get_decoder().layers[i].mlp.down_proj.weight for i in parse_layers(layers)}
    except IndexError as error:
        raise UserError(f"--train {what}: the model has layers 0 to {len(loaded.model.get_decoder().layers) - 1}") from error


@contextlib.contextmanager
def trained(loaded: Loaded, what: str, seed: int):
    """The parameters to train, by name; a LoRA, started by the seed, is put on the base and taken off again."""
    if what != "lora":
        yield chosen(loaded, what)
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lora = get_peft_model(loaded.model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    try:
        yield {name: p for name, p in lora.named_parameters() if "lora_" in name}
    finally:
        lora.unload()
        loaded.model.requires_grad_(False)


def passes(arguments, loaded: Loaded, ttt: InPlaceTTT | None, plan: Plan):
    """(what a pass is, its scorer) one after the other; what is on the base for a pass is off it again when the next is asked for."""
    for compiled in (False, True)[:1 + arguments.compile]:
        name = lambda rule, mode, epochs=None, seed=None: {"rule": rule, "mode": mode, "epochs": epochs, "seed": seed, "compiled": compiled}
        model = torch.compile(loaded.model) if compiled else None
        if "off" in arguments.modes:
            yield name("off", "off"), Off(loaded, plan, model)
        learning = [mode for mode in arguments.modes if mode != "off"]
        for mode in learning if ttt else ():
            yield name("inplace", mode), InPlace(loaded, ttt, plan, arguments.piece, mode == "forbidden", arguments.forget)
        for seed in arguments.seeds if arguments.train else ():
            with trained(loaded, arguments.train, seed) as parameters:
                for epochs in arguments.epochs:
                    for mode in learning:
                        yield name("adamw", mode, epochs, seed), AdamW(loaded, plan, parameters, arguments.lr, epochs, arguments.chunk, seed, mode == "forbidden", model)


def measure(arguments, loaded: Loaded, ttt: InPlaceTTT | None, plan: Plan, documents: list[Tokens], keep, earlier: dict) -> tuple[list[dict], float]:
    """(all rows, seconds of compiling), from the passes of an earlier run on. keep(rows, compiling) is called after each pass. RuntimeError where a pass leaves
    the base changed."""
    rows, before, compiling = list(earlier["rows"]), base_digest(loaded), earlier["compile_seconds"]
    done = scoring_report.passes_of(earlier)
    for what, scorer in passes(arguments, loaded, ttt, plan):
        if tuple(what[name] for name in scoring_report.PASS) in done:
            continue
        if what["compiled"]:  # compiled for the first document's shapes before the clock runs
            started = time.perf_counter()
            score_document(scorer, documents[0])
            compiling += time.perf_counter() - started
        title = " ".join(str(value) for name, value in what.items() if value is not None and name != "compiled")
        with tqdm(documents, desc=title, unit="document") as bar:
            rows += [what | score_document(scorer, tokens, len(documents) < scoring_report.FEWEST) for tokens in bar]
        if base_digest(loaded) != before:
            raise RuntimeError(f"{what}: the base's parameters are not what they were before")
        keep(rows, compiling)
    return rows, compiling


# ---- commands ----

def what_learns(arguments, loaded: Loaded, ttt: InPlaceTTT | None, manifest: dict | None) -> str:
    """The sentence of the report about it."""
    if ttt:
        return (f"In place: pieces of {arguments.piece} tokens, {manifest['arm']} (seed {manifest['seed']}), rule {ttt.config.rule}, chunk {ttt.config.chunk or 'the piece'}{f', clipped to {arguments.clip:g} of |W_down|' if arguments.clip else ''}"
                f"{f', a new memory every {arguments.forget:,} tokens' if arguments.forget else ''}; nothing in it is drawn, so one "
                "run says all, and other seeds would be other adapters.")
    if not arguments.train:
        return "Nothing learns."
    with trained(loaded, arguments.train, 0) as parameters:
        count = sum(p.numel() for p in parameters.values())
    return (f"AdamW trains {arguments.train} ({count:,} numbers), learning rate {arguments.lr:g}, chunks of {arguments.chunk} tokens, a sequence of at most {arguments.window} a step; a seed draws their order"
            + (" and the LoRA's start." if arguments.train == "lora" else "."))


def texts(arguments, tokenizer) -> tuple[list[Tokens], dict]:
    """The documents to score, and what the report says of them."""
    whole = read_documents(arguments.text, arguments.separator)
    if arguments.join:
        whole = [Document(arguments.text, "\n\n".join(document.text for document in whole))]
    kept = prefix(whole, arguments.document_bytes, arguments.bytes)
    documents = [tokenise(tokenizer, document) for document in kept]
    limits = {"the first {:,} bytes of each document": arguments.document_bytes, "the first {:,} bytes of all": arguments.bytes}
    parts = [form.format(limit) for form, limit in limits.items() if limit] + ["joined to one document"] * arguments.join
    return documents, {"name": arguments.text, "sha256": digest_of(kept), "documents": len(documents), "tokens": sum(len(d.ids) for d in documents),
                       "bytes": sum(sum(d.nbytes) for d in documents), "prefix": ", ".join(parts), "licence": BUILTIN[arguments.text].licence if arguments.text in BUILTIN else None}


def load(arguments) -> tuple[Loaded, InPlaceTTT | None, dict | None, Plan, str]:
    device, dtype, reason = pick_device(arguments.device, arguments.dtype, find_row(arguments.model))
    loaded = load_model(arguments.model, device, dtype)
    check_window(loaded.model, arguments.window + 1, f"--window {arguments.window}")
    ttt, manifest = load_adapter(arguments.adapter, loaded) if arguments.adapter else (None, None)
    if arguments.clip is not None:
        clip(ttt, arguments.clip)
    if manifest and manifest["lora"]:
        raise UserError(f"--adapter {arguments.adapter}: a joint arm has a LoRA on its base, so TTT off is not the base alone; give an arm without --joint")
    return loaded, ttt, manifest, Plan(arguments.window, arguments.stride, start_token(loaded.tokenizer)), reason


def score(arguments) -> None:
    loaded, ttt, manifest, plan, reason = load(arguments)
    documents, text = texts(arguments, loaded.tokenizer)
    before, base_bytes = base_digest(loaded), sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    run = {"model": loaded.row.name, "model_sha256": loaded.sha256, "arm": manifest and manifest["arm"], "adapter_files": manifest and manifest["files"], "text": text,
           "plan": {"window": arguments.window, "stride": arguments.stride, "start": plan.begin}, "learns": what_learns(arguments, loaded, ttt, manifest), "device": reason, **provenance(),
           "base": {"before": before}, "artefact": scoring_report.artefact(arguments.adapter and Path(arguments.adapter), base_bytes, arguments.budget)}
    path = arguments.out / "score.json"
    earlier = begun(path, arguments.resume, run)
    arguments.out.mkdir(parents=True, exist_ok=True)
    keep = lambda rows, compiling, complete=False: write_json(path, run | {"base": {"before": before, "after": base_digest(loaded)}, "compile_seconds": round(compiling, 1),
                                                                          "complete": complete, "rows_sha256": scoring_report.rows_digest(rows), "rows": rows})
    try:
        rows, compiling = measure(arguments, loaded, ttt, plan, documents, keep, earlier)
    except KeyboardInterrupt:
        print(f"\ninterrupted: the passes that had ended are in {path}; go on with\n  {run['command']}{'' if arguments.resume else ' --resume'}", file=sys.stderr)
        sys.exit(130)
    keep(rows, compiling, complete=True)
    print("\n".join(scoring_report.run_lines(arguments.out.name, scoring_report.read_run(path))))


def begun(path: Path, resume: bool, run: dict) -> dict:
    """What OUT holds of this run already, "rows" and "compile_seconds"; UserError where that is not asked for or is of another run."""
    if not path.is_file():
        return {"rows": [], "compile_seconds": 0.0}
    if not resume:
        raise UserError(f"{path}: already holds results; add --resume to go on with them, or name another --out")
    earlier = scoring_report.read_run(path)
    if name := scoring_report.differing(earlier, json.loads(json.dumps(run))):
        raise UserError(f"{path}: field '{name}' is of another run ({str(earlier[name])[:60]}, now {str(run[name])[:60]}); name another --out")
    return earlier


def audit(arguments) -> bool:
    """Hold a scorer to the rules and print what was found; whether all are kept."""
    if arguments.audit:
        scorer = scoring_audit.load_scorer(arguments.audit)
        ids, cases = torch.randint(0, scorer.vocabulary, (arguments.audit_tokens,), generator=torch.Generator().manual_seed(0)).tolist(), [({"scorer": arguments.audit}, scorer)]
    else:
        loaded, ttt, _, plan, _ = load(arguments)
        ids = tokenise(loaded.tokenizer, read_documents(arguments.text, arguments.separator)[0]).ids[:arguments.audit_tokens]
        cases = passes(arguments, loaded, ttt, plan)
    passed = True
    for what, scorer in cases:
        probes = scoring_audit.some_probes(len(ids), arguments.audit_probes, getattr(scorer, "step", 1))
        findings = scoring_audit.audit(scorer, ids, probes, arguments.tolerance)
        print(", ".join(f"{name} {value}" for name, value in what.items() if value is not None) + f": {len(ids)} tokens, {len(probes)} of them changed\n" + scoring_audit.verdict(findings), flush=True)
        passed &= all(finding.passed for finding in findings)
    return passed


def report(arguments) -> None:
    """Write what the runs in results/score/ found between the marks of RESULTS.md."""
    before, after = scoring_report.around(arguments.results_md)
    text = scoring_report.markdown(scoring_report.read_runs(arguments.runs))
    write_text(arguments.results_md, before + text + after)
    print(text)


def save_text(arguments) -> None:
    lines = [json.dumps({"name": d.name, "text": d.text}, ensure_ascii=False) + "\n" for d in read_documents(arguments.text, arguments.separator)]
    write_text(arguments.save_text, "".join(lines))


# ---- command line ----

SCORING = {"window": 2048, "stride": 1024, "piece": 512, "chunk": 4096, "modes": "off,legal,forbidden"}
AUDITING = {"window": 96, "stride": 64, "piece": 64, "chunk": 64, "modes": "off,legal"}  # so that a short document has several of each


def numbers(name: str, text: str, least: int) -> list[int]:
    """"0,1,2" -> [0, 1, 2]."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) >= least for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"--{name} {text}: write different whole numbers from {least} on with commas between them, for example 1,2,4")
    return [int(part) for part in parts]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", default="scipy-stats", help=f"a file, or one of {', '.join(BUILTIN)} (default: %(default)s)")
    add("--separator", help="what stands between two documents of a text file (default: the file is one document)")
    add("--join", action="store_true", help="all documents as one, so that what is learned goes on through them")
    add("--bytes", type=int, help="only the first N bytes of the text")
    add("--document-bytes", type=int, help="only the first N bytes of each document")
    add("--save-text", type=Path, metavar="FILE", help="write the documents to a .jsonl file, for a machine without the packages, and stop")
    add("--model", default="smollm2-135m", help="a row of model_utils.py, a folder or a hub id (default: %(default)s)")
    add("--adapter", help="checkpoint folder with fast weights, which learn in place")
    add("--clip", type=float, help="the most that a chunk may change a layer's W_down in place, as a share of |W_down| (default: no limit)")
    add("--forget", type=int, help="tokens after which a new memory begins in place, at a window's beginning (default: a document's whole length)")
    add("--train", metavar="WHAT", help="parameters that AdamW trains instead: norms, down:LAYERS, lora or all")
    add("--modes", help=f"default: {SCORING['modes']}; with --audit {AUDITING['modes']}")
    for name, says in {"window": "tokens that attention sees", "stride": "tokens scored in each window", "piece": "tokens written at once (in place)", "chunk": "tokens learned from at once (AdamW)"}.items():
        add(f"--{name}", type=int, help=f"{says} (default: {SCORING[name]}; with --audit {AUDITING[name]})")
    add("--lr", type=float, default=1e-4, help="AdamW's (default: %(default)s)")
    add("--epochs", default="1", help="of AdamW over each chunk; several with commas (default: %(default)s)")
    add("--seeds", default="0,1,2", help="of AdamW (default: %(default)s)")
    add("--compile", action="store_true", help="score TTT off and AdamW a second time with torch.compile: time, and whether the scores are the same")
    add("--budget", type=int, help="bytes that code and adapter together may take, compressed, for example 16000000")
    add("--out", type=Path, help="folder of the result, for example results/score/NAME")
    add("--resume", action="store_true", help="go on with the passes that OUT already holds")
    add("--audit", nargs="?", const="", metavar="MODULE:CLASS", help="hold a scorer to the rules; without a name the one that the other options describe")
    add("--audit-tokens", type=int, default=160, help="of the document it is done on (default: %(default)s)")
    add("--audit-probes", type=int, default=16, help="tokens that are changed (default: %(default)s)")
    add("--tolerance", type=float, default=scoring_audit.TOLERANCE, help="nats that a score may move by rounding (default: %(default)s)")
    add("--report", action="store_true", help="write all runs into RESULTS.md, between its marks, and stop")
    add("--runs", type=Path, default=Path("results/score"), help="the folder of these runs (default: %(default)s)")
    add("--results-md", type=Path, default=Path("RESULTS.md"), help="default: %(default)s")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    return checked(parser.parse_args())


def checked(arguments: argparse.Namespace) -> argparse.Namespace:
    """Defaults put in, lists read; UserError for what cannot be."""
    for name, value in (SCORING if arguments.audit is None else AUDITING).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name in ("window", "stride", "piece", "chunk", "bytes", "document_bytes", "forget", "audit_tokens", "audit_probes"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: use 1 or more")
    arguments.modes = arguments.modes.split(",")
    if not set(arguments.modes) <= set(scoring_report.MODES):
        raise UserError(f"--modes {','.join(arguments.modes)}: use off, legal, forbidden, with commas between them")
    arguments.epochs, arguments.seeds = numbers("epochs", arguments.epochs, 1), numbers("seeds", arguments.seeds, 0)
    for name, done in (("clip", "clipped"), ("forget", "begun anew")):
        if (value := getattr(arguments, name)) is not None and not arguments.adapter:
            raise UserError(f"--{name} {value:g}: only fast weights are {done}; give --adapter too, or leave it out")
    if arguments.adapter and arguments.train:
        raise UserError(f"--train {arguments.train}: with --adapter the fast weights learn; give one of the two")
    if arguments.compile and arguments.adapter:
        raise UserError("--compile: fast weights are written by Python between a layer's parts, which torch.compile does not take; use it without --adapter")
    if not (arguments.out or arguments.report or arguments.save_text or arguments.audit is not None):
        raise UserError("--out is missing: name the folder of the result, for example results/score/NAME")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    try:
        if arguments.report:
            report(arguments)
        elif arguments.save_text:
            save_text(arguments)
        elif arguments.audit is not None:
            sys.exit(0 if audit(arguments) else 1)
        else:
            score(arguments)
    except ValueError as error:  # a plan or pieces that do not fit each other
        raise UserError(str(error)) from error


if __name__ == "__main__":
    run_script(main)
