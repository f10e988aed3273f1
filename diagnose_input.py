"""What diagnose.py looks at: the arm (trained, or an untrained start), the conversations with known facts, and the text that is read along."""
from __future__ import annotations

from pathlib import Path

import benchmark_file
import prompts
import training_bank
from arms import fresh
from in_place_ttt import InPlaceTTT
from manifests import UserError
from model_utils import Loaded, load_adapter, override_ttt

BUILT_IN = "built-in"
TURNS = ("Ottoline: Did you see the new ferry timetable? They cut the late boat again.",
         "Casimir: I did, and it is a nuisance. My cousin Ingram keeps his sailboat in Whitby now.",
         "Ottoline: So far north? I thought he had sold it.",
         "Casimir: No, he paid 340 pounds for a new mast in spring. And you, how is the cello?",
         "Ottoline: Better. My teacher is called Leontine and she does not let me hurry.",
         "Casimir: Good. Are you still free for the market?",
         "Ottoline: On Thursday I am. I have to bring plums, my neighbour asked for plums and nothing else.")
FACTS = (("My cousin Ingram keeps his sailboat in Whitby", "spatial", "Where does Ingram keep his sailboat?", "Whitby"),
         ("he paid 340 pounds for a new mast", "numeric", "How much did Ingram pay for a new mast?", "340 pounds"),
         ("My teacher is called Leontine", "person", "What is the name of Ottoline's teacher?", "Leontine"),
         ("my neighbour asked for plums", "preference", "What did Ottoline's neighbour ask for?", "plums"))
PASSAGES = 4  # of the training bank's prose behind the built-in conversation


def built_in() -> dict:
    """A short English conversation with four facts, prose behind it, in the shape of a benchmark's sample of level 3."""
    text = "\n".join(TURNS)
    facts = [{"fact_id": f"f{n}", "fact_text": said, "category": category, "span": [text.index(said), text.index(said) + len(said)]}
             for n, (said, category, _, _) in enumerate(FACTS)]
    probes = [{"probe_id": f"{BUILT_IN}-p{n}", "question": question, "gold_answer": answer, "required_facts": [f"f{n}"]}
              for n, (_, _, question, answer) in enumerate(FACTS)]
    return {"sample_id": BUILT_IN, "level": 3, "lang": "en", "conversation": text, "facts": facts, "probes": probes,
            "distractor": "\n\n".join(training_bank.passages("en")[:PASSAGES])}


def by_id(bench: dict, sample_id: str) -> dict | None:
    return built_in() if sample_id == BUILT_IN else next((s for s in bench["samples"] if s["sample_id"] == sample_id), None)


def choose_samples(bench: dict, asked: str, lang: str, file) -> list[dict]:
    """--samples: so many of the language's level-1 conversations from the first on (0: none), or ids and "built-in", comma between."""
    if asked.lstrip("-").isdigit():
        if int(asked) < 0:
            raise UserError(f"--samples {asked}: use 0 or more, or names of samples")
        chosen = benchmark_file.select_samples(bench, (1,), (lang,), int(asked)) if int(asked) else []
        if int(asked) and not chosen:
            raise UserError(f"--benchmark {file}: no {lang} sample of level 1; choose another language or file")
        return chosen
    chosen = [(name, by_id(bench, name)) for name in asked.split(",")]
    strange = [name for name, sample in chosen if sample is None]
    if strange:
        raise UserError(f"--samples {asked}: {file} has no sample {strange[0]!r}; name its samples, {BUILT_IN}, or a number")
    return [sample for _, sample in chosen]


def choose_text(bench: dict, asked: str | None, lang: str, file) -> tuple[str, str]:
    """(what is read along, its name). --text: "built-in", a sample's id (with the distractor it has), a file; by default the language's first level-3 sample."""
    if asked is None:
        sample = next((s for s in bench["samples"] if s["lang"] == lang and s["distractor"]), None)
        if sample is None:
            raise UserError(f"--benchmark {file}: no {lang} sample with a distractor to read along; give a --text")
    else:
        sample = by_id(bench, asked)
    if sample is not None:
        return (prompts.with_distractor(sample) if sample["distractor"] else sample["conversation"]), sample["sample_id"]
    try:
        return Path(asked).read_text(encoding="utf-8"), asked
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {asked}: no sample of {file}, and cannot be read as UTF-8 text ({type(error).__name__}); "
                        f"name a sample, a file, or {BUILT_IN}") from error


def attach(loaded: Loaded, adapter: str | None, form: str, chunk: str | None, seed: int = 0) -> tuple[InPlaceTTT, str]:
    """(fast weights on their base, the arm's name): a checkpoint's, or, without one, the row's untrained start in this form."""
    if adapter is not None:
        if chunk is not None:
            raise UserError(f"--chunk {chunk}: a trained arm has its own; leave it out, or leave out --adapter")
        ttt, manifest = load_adapter(adapter, loaded)
        return ttt, manifest["arm"]
    config = getattr(loaded.row, form)
    if chunk is not None and chunk != "whole":
        if not chunk.isdigit():
            raise UserError(f"--chunk {chunk}: use a number of tokens, or whole")
        config = override_ttt(config, chunk=int(chunk))
    return fresh(loaded, config, seed).requires_grad_(False), f"untrained {form}"
