"""How the published tasks score a prediction: each metric is (prediction, references) -> 0 to 1."""
from __future__ import annotations

import re
import string
from collections import Counter

from evaluate import contains, exact_match

NOT_MENTIONED = "Not mentioned in the conversation"  # LoCoMo's right answer to a question about what was never said


def printable(prediction: str) -> str:
    """RULER's clean-up: control characters become line breaks."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def string_match_all(prediction: str, references) -> float:
    """RULER (niah, vt, cwe, fwe): the share of the references that stand in the prediction, in any case."""
    text = printable(prediction).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def string_match_part(prediction: str, references) -> float:
    """RULER (qa): 1 where any reference stands in the prediction."""
    text = printable(prediction).lower()
    return float(any(reference.lower() in text for reference in references))


def first_word(prediction: str, references) -> float:
    """MQAR: the answer comes first in the prediction, as a word of its own."""
    text = prediction.strip().lower()
    return float(any(re.match(re.escape(reference.lower()) + r"(?![\w-])", text) for reference in references))


def substring_exact_match(prediction: str, references) -> float:
    """HELMET (rag): a reference stands in the first line (HELMET stops there), both normalised as in SQuAD."""
    return float(contains(first_line(prediction), references, "en"))


def label_match(prediction: str, references) -> float:
    """HELMET (icl): the first line is the label, or what follows "label:" in it."""
    label = re.sub(r"^.*?label:\s*(label:)?", "", first_line(prediction), flags=re.IGNORECASE)
    return float(exact_match(label, references, "en"))


def first_line(prediction: str) -> str:
    return prediction.split("\n", 1)[0]


def locomo_words(text: str) -> list[str]:
    """LoCoMo's normalisation: no punctuation, no articles and no "and". Published with Porter stems, here without."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the|and)\b", " ", text).split()


def locomo_f1_unstemmed(prediction: str, references) -> float:
    """LoCoMo, categories 2 to 4: F1 of words."""
    return max(f1(prediction, reference) for reference in references)


def locomo_multi_f1_unstemmed(prediction: str, references) -> float:
    """LoCoMo, category 1: both are lists between commas; the mean over the reference's parts of the best part's F1."""
    def one(reference):
        parts = reference.split(",")
        return sum(max(f1(given, part) for given in prediction.split(",")) for part in parts) / len(parts)
    return max(map(one, references))


def f1(prediction: str, reference: str) -> float:
    given, wanted = locomo_words(prediction), locomo_words(reference)
    same = sum((Counter(given) & Counter(wanted)).values())
    return 2 * same / (len(given) + len(wanted)) if same else 0.0


def locomo_adversarial(prediction: str, references) -> float:
    """LoCoMo, category 5: the option that says it was not mentioned, by its letter (references[0]) or in words."""
    text = prediction.strip().lower()
    if len(text) in (1, 3):
        return float(text.strip("()") == references[0])
    return float("not mentioned" in text or "no information available" in text)


METRICS = {metric.__name__: metric for metric in (
    string_match_all, string_match_part, first_word, substring_exact_match, label_match, locomo_f1_unstemmed, locomo_multi_f1_unstemmed,
    locomo_adversarial)}
METRICS["contains_no_judge"] = string_match_part  # LongMemEval's published judge is a paid model; this is not its score
