"""Could a text have come out of one of thousands of templates? A slot stands for a name or a value of a few words."""
import functools
import re
from collections import Counter, defaultdict

SLOT = re.compile(r"\{[^}]*\}")
WILDCARD = {"en": r"\S+(?: \S+){0,4}", "zh": r".{1,12}"}
FEWEST_LITERALS = {"en": 3, "zh": 4}      # words, characters: a template with fewer and no owner fits almost anything


def asks(text):
    """Whether a template or sentence is a question: "When is Anna's birthday?" is no use of the statement "{v} is {s}'s birthday."."""
    return text.rstrip(" \"'”’」』").endswith(("?", "？"))


def flatten(template, lang):
    """A template or sentence for comparison: lower case, no punctuation, every slot an underscore."""
    text = SLOT.sub(" _ " if lang == "en" else "_", template).lower()
    text = re.sub(r"['’]s\b", " s", text)  # "{s}'s" and "Anna's" are both an owner and an s
    text = re.sub(r"[^\w\s]", "", text.replace("-", " "))
    return " ".join(text.split()) if lang == "en" else "".join(text.split())


def tells_apart(flat, lang):
    """Whether a flattened template says enough beside its slots: one of two words would fit almost anything."""
    literals = _literals(flat, lang)
    return len(literals) >= (1 if flat.count("_") > 1 else FEWEST_LITERALS[lang]) and bool(literals)


def _pieces(flat, lang):
    """The words of a flattened text, of a Chinese one the characters."""
    return flat.split() if lang == "en" else list(flat)


def _literals(flat, lang):
    """What a flattened template says beside its slots and the s of "Anna's"; a text that fits has every one of these among its own pieces."""
    return [piece for piece in _pieces(flat, lang) if piece != "_" and (piece != "s" or lang == "zh")]


class TemplateIndex:
    """Flattened templates, each with a word of its own, to ask whether a flattened text could come out of one of them.

    A template stands under that literal of its own which the fewest templates have. A text is matched with the templates under its
    pieces alone, and of these only with those whose literals it all holds: a few patterns are tried, not thousands.
    """

    def __init__(self, templates, lang):
        self.lang, self.under = lang, defaultdict(list)
        literals = {template: frozenset(_literals(template, lang)) for template in templates}
        count = Counter(piece for pieces in literals.values() for piece in pieces)
        for template, pieces in literals.items():
            self.under[min(pieces, key=lambda piece: (count[piece], piece))].append((template, pieces))

    def fits(self, text):
        """Whether the text is one of the templates, with something in every slot."""
        said = set(_pieces(text, self.lang))
        return any(pieces <= said and _pattern(template, self.lang).fullmatch(text)
                   for piece in said for template, pieces in self.under.get(piece, ()))


@functools.cache
def _pattern(template, lang):
    return re.compile(re.escape(template).replace("_", WILDCARD[lang]))
