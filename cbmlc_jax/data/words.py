"""Words of a text; of the standard library alone, for serving."""

from __future__ import annotations

import re

MAX_TOKENS = 300
NUMBER = "<num>"
_TOKEN = re.compile(r"\b(?:[^\W\d_]\.){2,}|[^\W\d_]{2,}|\d+(?:[.,/-]\d+)*")


def tokens(text: str) -> list[str]:
    """At most 300 tokens: "U.S. crude at 18.50 dlrs" -> u.s. crude at <num> dlrs."""
    found = _TOKEN.findall(text.lower())[:MAX_TOKENS]
    return [NUMBER if token[0].isdecimal() else token for token in found]
