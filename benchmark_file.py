"""Files of test conversations: reading, validation, selection.

The shape is described by SCHEMA below; any file of this shape can be run. Every defect raises BenchmarkError
with one line that names the file, the field, what is wrong and how to mend it.
"""
import hashlib
import json
import unicodedata
from pathlib import Path

import jsonschema

from manifests import UserError

VERSION = "1"
LEVELS = (1, 2, 3)
LANGS = ("en", "zh")
CATEGORIES = ("person", "numeric", "temporal", "relational", "preference", "spatial", "project")

LONGEST = {"text": 500_000, "word": 2_000}  # characters: ten times what any model of the table reads, and what an id, a question or an answer may have
TEXT = {"type": "string", "pattern": r"\S", "maxLength": LONGEST["word"]}  # a string that holds more than white space
FACT = {
    "type": "object",
    "required": ["fact_id", "fact_text", "category"],
    "properties": {
        "fact_id": TEXT,
        "fact_text": TEXT,
        "category": {"enum": list(CATEGORIES)},
        "span": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2},
        "subject": TEXT,    # whom or what the fact is about, as written in the conversation
        "attribute": TEXT,  # what it tells about the subject; the same id for the same kind of fact
        "value": TEXT,      # the answer to a question about it
        "order": {"type": "number"},  # the value on a scale, where values can be compared
    },
}
PROBE = {
    "type": "object",
    "required": ["probe_id", "question", "gold_answer", "required_facts"],
    "properties": {
        "probe_id": TEXT,
        "question": TEXT,
        "gold_answer": TEXT,
        "aliases": {"type": "array", "items": TEXT},
        "required_facts": {"type": "array", "items": TEXT, "minItems": 1, "uniqueItems": True},
        "kind": {"enum": ["fact", "bridge", "comparison"]},
    },
}
SAMPLE = {
    "type": "object",
    "required": ["sample_id", "level", "lang", "conversation", "facts", "probes", "distractor"],
    "properties": {
        "sample_id": TEXT,
        "level": {"enum": list(LEVELS)},
        "lang": {"enum": list(LANGS)},
        "skeleton_id": TEXT,
        "conversation": TEXT | {"maxLength": LONGEST["text"]},
        "facts": {"type": "array", "items": FACT, "minItems": 1},
        "probes": {"type": "array", "items": PROBE, "minItems": 1},
        "distractor": {"type": ["string", "null"], "pattern": r"\S", "maxLength": LONGEST["text"]},
    },
}
SCHEMA = {
    "type": "object",
    "required": ["version", "seed", "samples"],
    "properties": {
        "version": {"const": VERSION},
        "seed": {"type": "integer"},
        "samples": {"type": "array", "items": SAMPLE, "minItems": 1},
    },
}


class BenchmarkError(UserError):
    """A benchmark file that cannot be used; the message is one line."""


def load_benchmark(path) -> dict:
    """Read and validate a file of test conversations.

    Returns the parsed dict {"version", "seed", "samples"}. Raises BenchmarkError on the first defect.
    """
    path = Path(path)
    bench = _parse(path)
    error = _first_schema_error(bench)
    if error is not None:
        raise BenchmarkError(f"{path}: {_field(error.absolute_path, bench)}: {_explain(error)}")
    for problem in _content_problems(bench):
        raise BenchmarkError(f"{path}: {problem}")
    return bench


def sha256_of(path) -> str:
    """Hex SHA-256 of the file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def select_samples(bench, levels=LEVELS, langs=LANGS, limit=None) -> list:
    """Samples of the given levels and languages in file order; at most `limit` for each (level, lang)."""
    if limit is not None and limit < 1:
        raise BenchmarkError(f"limit {limit}: must be 1 or more, or left out for all samples")
    taken, chosen = {}, []
    for sample in bench["samples"]:
        key = (sample["level"], sample["lang"])
        if key[0] not in levels or key[1] not in langs:
            continue
        if limit is None or taken.get(key, 0) < limit:
            taken[key] = taken.get(key, 0) + 1
            chosen.append(sample)
    return chosen


def _parse(path):
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise BenchmarkError(f"{path}: no such file; python build_benchmark.py writes benchmark_v1.json") from None
    except IsADirectoryError:
        raise BenchmarkError(f"{path}: is a folder; name a benchmark file") from None
    except PermissionError:
        raise BenchmarkError(f"{path}: cannot be read; check the file's permissions") from None
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise BenchmarkError(f"{path}: not JSON ({where}); the file may be cut short, write it again") from None


def _no_constant(name):
    raise ValueError(f"{name} is not a JSON number")


def _first_schema_error(bench):
    """The schema error that comes first in the file, or None."""
    errors = jsonschema.Draft202012Validator(SCHEMA).iter_errors(bench)
    return min(errors, key=_place, default=None)


def _place(error):
    """Sorts errors as they stand in the file; an unknown version explains all others and comes first."""
    path = list(error.absolute_path)
    return path != ["version"], [str(part).zfill(9) for part in path]


def _field(path, bench):
    """A readable field path such as samples[3].probes[0].gold_answer (L1-001-zh)."""
    path = list(path)
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    if len(path) >= 2 and path[0] == "samples":
        sample = bench["samples"][path[1]]
        if isinstance(sample, dict) and isinstance(sample.get("sample_id"), str):
            name += f" ({_short(sample['sample_id'])})"
    return name or "top level"


def _short(value):
    """A value on one line of at most 60 characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 60 else text[:57] + "..."


def _explain(error):
    """What is wrong and the mend, for one jsonschema error."""
    wanted, kind = error.validator_value, error.validator
    if kind == "required":
        missing = next(name for name in wanted if name not in error.instance)
        return f"field '{missing}' is missing; add it"
    if kind == "type":
        wanted = wanted if isinstance(wanted, str) else " or ".join(wanted)
        return f"is {_short(error.instance)}, but must be of type {wanted}; change it"
    if kind in ("enum", "const"):
        wanted = wanted if kind == "enum" else [wanted]
        return f"is {_short(error.instance)}, but must be one of {', '.join(map(str, wanted))}; change it"
    if kind == "pattern":
        return "is empty; give it a text"
    if kind == "maxLength":
        return f"has {len(error.instance)} characters, but may have {wanted} at most; shorten it"
    if kind == "minItems":
        return f"has {len(error.instance)} entries, but needs {wanted} or more; add them"
    return f"{' '.join(_short(error.message).split())}; change it"


def _content_problems(bench):
    """What a schema cannot say; yields lines without the file name."""
    samples, probes = set(), set()
    for index, sample in enumerate(bench["samples"]):
        where = f"samples[{index}]"
        here = f" ({_short(sample['sample_id'])})"
        yield from _control_characters(sample, where, here)
        if sample["sample_id"] in samples:
            yield f"{where}.sample_id{here}: is used twice; give every sample its own id"
        samples.add(sample["sample_id"])
        yield from _fact_problems(sample, where, here)
        yield from _probe_problems(sample, where, here, probes)
        if sample["level"] == 3 and sample["distractor"] is None:
            yield f"{where}.distractor{here}: is null, but level 3 needs a text; add one or change the level"


def _control_characters(value, where, here):
    """Control characters other than the line feed, and lone surrogates, anywhere inside value."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _control_characters(part, f"{where}.{name}", here)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _control_characters(part, f"{where}[{index}]", here)
    elif isinstance(value, str) and not value.replace("\n", "").isprintable():  # a quick no for nearly every text
        for place, char in enumerate(value):
            if char != "\n" and unicodedata.category(char) in ("Cc", "Cs"):
                yield f"{where}{here}: control character U+{ord(char):04X} at {place}; remove it"


def _fact_problems(sample, where, here):
    seen, length = set(), len(sample["conversation"])
    for index, fact in enumerate(sample["facts"]):
        field = f"{where}.facts[{index}]"
        if fact["fact_id"] in seen:
            yield f"{field}.fact_id{here}: '{_short(fact['fact_id'])}' is used twice; give every fact its own id"
        seen.add(fact["fact_id"])
        start, end = fact.get("span", (0, length))
        if not start < end <= length:
            yield f"{field}.span{here}: [{start}, {end}] is not inside the conversation (0 to {length}); correct it"


def _probe_problems(sample, where, here, seen):
    facts = {fact["fact_id"] for fact in sample["facts"]}
    for index, probe in enumerate(sample["probes"]):
        field = f"{where}.probes[{index}]"
        if probe["probe_id"] in seen:
            yield f"{field}.probe_id{here}: '{_short(probe['probe_id'])}' is used twice; give every probe its own id"
        seen.add(probe["probe_id"])
        for name in probe["required_facts"]:
            if name not in facts:
                yield f"{field}.required_facts{here}: names '{_short(name)}', which is no fact of the sample; correct it"
