"""Writes ruler_expected.json: what NVIDIA's own generator makes of given random states, for test_long_tasks.py to compare with.

Run once, outside the project's environment, where numpy, scipy, wonderwords 3.0.1, nltk and tqdm are installed:

    git clone https://github.com/NVIDIA/RULER && git -C RULER checkout c3f5e3b4f87f97e048793bb510a3a6b19a46bf3a
    python make_ruler_expected.py RULER/scripts > ruler_expected.json

Each case seeds `random`, builds one text of a given number of units, and keeps its head, tail, SHA-256 and its answers. numpy's draws
(vt's value) are led to `random`, since our texts draw from one state. The essay is a stand-in whose sentences are plain (ESSAY); it is
cut as ours are, and runs of white space count as one, since the published text has an empty sentence where two needles meet.
"""
import hashlib
import importlib
import json
import random
import re
import sys
import types
from pathlib import Path

import numpy as np

SCRIPTS = Path(sys.argv[1])
SEED = 7
ESSAY = " ".join(f"Sentence {i} of the stand-in is here." for i in range(60))
CASES = {  # name: (module, units, options)
    "niah_single_1": ("niah", 6, {"type_haystack": "noise"}),
    "niah_multikey_2": ("niah", 9, {"type_haystack": "needle"}),
    "niah_multikey_3": ("niah", 5, {"type_haystack": "needle", "type_needle_k": "uuids", "type_needle_v": "uuids"}),
    "niah_single_3_noise": ("niah", 4, {"type_haystack": "noise", "type_needle_v": "uuids"}),
    "niah_multikey_1_noise": ("niah", 6, {"type_haystack": "noise", "num_needle_k": 4}),
    "niah_multivalue_noise": ("niah", 6, {"type_haystack": "noise", "num_needle_v": 4}),
    "niah_multiquery_noise": ("niah", 7, {"type_haystack": "noise", "num_needle_q": 4}),
    "niah_single_2": ("niah", 150, {"type_haystack": "essay"}),
    "niah_multivalue": ("niah", 300, {"type_haystack": "essay", "num_needle_v": 4}),
    "niah_multiquery": ("niah", 500, {"type_haystack": "essay", "num_needle_q": 4}),
    "vt": ("variable_tracking", 6, {}),
    "cwe 2048": ("common_words_extraction", 30, {}),
    "cwe 4096": ("common_words_extraction", 30, {}),
    "fwe 2048": ("freq_words_extraction", 300, {}),
    "fwe 4096": ("freq_words_extraction", 500, {}),
}


class Words:
    """A tokenizer that cuts at white space; no text here is sized by it."""

    def text_to_tokens(self, text):
        return text.split()


def load(module, length, options):
    task = importlib.import_module("constants").TASKS[module]
    sys.argv = [module, "--save_dir", ".", "--save_name", "x", "--tokenizer_path", "x", "--max_seq_length", str(length), "--num_samples", "1",
                "--tokens_to_generate", "1", "--template", task["template"] + task["answer_prefix"]]
    sys.argv += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    sys.modules.pop(module, None)
    return importlib.import_module(module)


sys.modules["tokenizer"] = types.SimpleNamespace(select_tokenizer=lambda *_: Words())
sys.modules["manifest_utils"] = types.SimpleNamespace(write_manifest=None)
sys.path.insert(0, str(SCRIPTS / "data" / "synthetic"))
stand_ins = {"english_words.json": {"0": "unused"},  # the longer word list lies in Git LFS; no case here needs it
             "PaulGrahamEssays.json": {"text": ESSAY}}
for file_name, value in stand_ins.items():
    (SCRIPTS / "data" / "synthetic" / "json" / file_name).write_text(json.dumps(value))
np.random.randint = lambda low, high: random.randrange(low, high)

cases = {}
for name, (module, units, options) in CASES.items():
    length = int(name.split()[1]) if " " in name else 1024
    published = load(module, length, options)
    published.sent_tokenize = lambda text: re.split(r"(?<=[.!?])\s+", text)
    random.seed(SEED)
    if module == "freq_words_extraction":
        text, answers, _ = published.generate_input_output(10**9, num_words=units, vocab_size=(length - 50) // 50)
    elif module == "variable_tracking":
        text, answers = published.generate_input_output(units, 1, 4)
    else:
        text, answers = published.generate_input_output(units)
    text = " ".join(text.split()) if options.get("type_haystack") == "essay" else text.strip()
    cases[name] = {"units": units, "sha256": hashlib.sha256(text.encode()).hexdigest(), "head": text[:160], "tail": text[-160:],
                   "answers": answers}
print(json.dumps({"source": "NVIDIA/RULER c3f5e3b4f87f97e048793bb510a3a6b19a46bf3a, by make_ruler_expected.py", "seed": SEED, "cases": cases},
                 indent=1, ensure_ascii=False))
