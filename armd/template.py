"""Templates for infilling: text with `[MASK]` for one token to fill in and `[MASK:n]` for n of them."""

import re
from collections.abc import Callable

_MASK = re.compile(r"\[MASK(?::(\d+))?\]")


def parse_template(text: str, encode: Callable[[str], list[int]]) -> list[int | None]:
    """Token ids, None for each hole; the pieces between masks are encoded one by one.

    Raises:
        ValueError: there is no mask, or one of no tokens.
    """
    template: list[int | None] = []
    end = 0
    for mask in _MASK.finditer(text):
        holes = int(mask[1] or 1)
        if holes < 1:
            raise ValueError(f"template has a mask of {holes} tokens: {mask[0]}")
        template += [*encode(text[end : mask.start()]), *[None] * holes]
        end = mask.end()
    if not end:
        raise ValueError(f"template has no [MASK] or [MASK:n]: {text!r}")
    return [*template, *encode(text[end:])]
