"""Undo the spacing of benchmark texts that come tokenised, by the rules that published perplexities use.

The rules are crude and applied in order, one after the other, to a document at a time; a number is comparable with
published ones only if they are exactly these, faults included.
"""

import re
from collections.abc import Sequence

_Rule = tuple[str | re.Pattern[str], str]


def _rules(*pairs: tuple[str, str]) -> tuple[_Rule, ...]:
    return pairs


def _patterns(*pairs: tuple[str, str]) -> tuple[_Rule, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in pairs)


_WIKITEXT = (
    *_rules(("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")),
    *_rules((" : ", ": "), (" ; ", "; "), (" . ", ". "), (" ! ", "! "), (" ? ", "? "), (" , ", ", ")),
    *_patterns((r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}")),
    *_patterns((r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'")),
    *_rules(("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u00b0 ", "\u00b0")),
    *_rules((" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
)
_PTB = (
    *_rules((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/")),
    *_rules((" N ", " 1 ")) * 2,  # numbers side by side share a space: one pass takes every other one
    *_rules(("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?")),
)
_LM1B = (
    *_rules(("http : / / ", "http://"), ("https : / / ", "https://")),
    *_patterns((r" '(\w+)", r"'\1"), (r" (\w+) \. ", r" \1. "), (r" (\w+) \.$", r" \1.")),
    *_rules((" ? ", "? ")),
    *_patterns((r" \?$", "?")),
    *_rules((" ! ", "! ")),
    *_patterns((r" !$", "!")),
    *_rules((" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/")),
    *_patterns((r'" ([^"]+) "', r'"\1"'), (r"' ([^']+) '", r"'\1'")),
    *_patterns((r"\( ([^()]+) \)", r"(\1)"), (r"\[ ([^\[\]]+) \]", r"[\1]")),
    *_rules(("$ ", "$"), ("\u00a3 ", "\u00a3")),
)
_LAMBADA = (
    *_rules(("\u201c", '"'), ("\u201d", '"')),
    *_patterns((r"\s+\Z", ""), (r"\A\s*", "\n")),
)

_DETOKENIZERS: dict[str, Sequence[_Rule]] = {
    "": (),
    "wikitext": _WIKITEXT,
    "ptb": _PTB,
    "lm1b": _LM1B,
    "lambada": _LAMBADA,
}
NAMES = tuple(_DETOKENIZERS)
"""The detokenizers by name; "" leaves a text as it is."""


def detokenized(text: str, name: str) -> str:
    """`text` by the rules of the benchmark `name`.

    Raises:
        KeyError: `name` is not in `NAMES`.
    """
    for pattern, replacement in _DETOKENIZERS[name]:
        if isinstance(pattern, str):
            text = text.replace(pattern, replacement)
        else:
            text = pattern.sub(replacement, text)
    return text
