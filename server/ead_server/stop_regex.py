"""Whether a regular expression is matched fast, whatever the text.

SGLang matches a `stop_regex` with Python's backtracking engine, after every token and in its
scheduler: one that takes exponential time would stop all requests for good.
"""

from __future__ import annotations

from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MAX_WAYS = 10_000
ENDLESS = 1_000  # what an endless repeat counts as


def matches_fast(pattern: str) -> bool:
    """Whether a match has few ways to go. Raises what `re` does of a pattern that is none."""
    return _ways(parser.parse(pattern)) <= MAX_WAYS


def _ways(parsed: Any) -> int:
    """About how many ways through a text a match may try from one place."""
    product = 1
    for kind, value in parsed:
        if kind is parser.BRANCH:
            ways = sum(map(_ways, value[1]))
        elif kind in _REPEATS:
            low, high, repeated = value
            each = _ways(repeated)
            # of two ways, 64 repeats are more than enough
            ways = min(int(high), ENDLESS) - low + 1 if each <= 1 else each ** min(int(high), 64)
        elif kind is parser.GROUPREF_EXISTS:
            ways = sum(_ways(part or ()) for part in value[1:])
        elif kind in _PARTS:
            ways = _ways(value[_PARTS[kind]])
        else:
            ways = 1
        product = min(product * max(ways, 1), MAX_WAYS + 1)
    return product


_REPEATS = (parser.MAX_REPEAT, parser.MIN_REPEAT, parser.POSSESSIVE_REPEAT)
_PARTS = {  # what holds one more pattern, and where
    parser.SUBPATTERN: 3,
    parser.ASSERT: 1,
    parser.ASSERT_NOT: 1,
    parser.ATOMIC_GROUP: slice(None),
}
