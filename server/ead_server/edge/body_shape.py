"""What a JSON body is made of, told from its bytes before anything is built of it.

Objects, lists and strings take many times the memory in Python that they take in JSON (two bytes of
`{}` become 64), and SGLang's models look at each of them. So they are counted first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_CHUNK = 1 << 20  # bytes looked at at a time; the arrays made of them take about 30 times as much


@dataclass(frozen=True)
class Shape:
    """Counts of what is in a JSON text; of what is no JSON, any numbers.

    Each is exact, or for a text with few of them, no less than the exact number.
    """

    nesting: int  # how deeply lists and objects are in each other
    containers: int  # lists and objects
    strings: int  # keys included
    values: int  # numbers, strings, lists, ...

    def first_above(self, limits: Shape) -> str | None:
        """The name of the first count that exceeds its limit."""
        names = ("nesting", "containers", "strings", "values")
        return next((n for n in names if getattr(self, n) > getattr(limits, n)), None)


def shape_of(text: bytes, limits: Shape) -> Shape:
    """The shape of JSON, exact where it may exceed `limits`. In time linear in the text."""
    containers = text.count(b"[") + text.count(b"{")
    at_most = Shape(
        nesting=containers,
        containers=containers,
        strings=text.count(b'"') // 2,
        values=containers + text.count(b",") + 1,
    )
    # nearly always within: what brackets and commas in strings add to the counts does no harm
    return at_most if at_most.first_above(limits) is None else _exact(text)


def _exact(text: bytes) -> Shape:
    level, nesting, containers, quotes, commas = 0, 0, 0, 0, 0
    backslashes = 0  # at the end of the chunk before
    for start in range(0, len(text), _CHUNK):
        chunk = np.frombuffer(text, np.uint8, min(_CHUNK, len(text) - start), start)
        quote = chunk == ord('"')
        escaped, backslashes = _escaped(chunk, backslashes)
        quote &= ~escaped
        outside = (np.cumsum(quote) + quotes) % 2 == 0
        quotes += int(quote.sum())
        opens = ((chunk == ord("[")) | (chunk == ord("{"))) & outside
        closes = ((chunk == ord("]")) | (chunk == ord("}"))) & outside
        levels = level + np.cumsum(opens.astype(np.int64) - closes)
        nesting = max(nesting, int(levels.max(initial=0)))
        level = int(levels[-1])
        containers += int(opens.sum())
        commas += int(((chunk == ord(",")) & outside).sum())
    return Shape(nesting, containers, quotes // 2, containers + commas + 1)


def _escaped(chunk: np.ndarray, backslashes: int) -> tuple[np.ndarray, int]:
    """Which bytes follow an odd number of backslashes, and how many are at the chunk's end.

    backslashes: how many are right before the chunk.
    """
    is_backslash = chunk == ord("\\")
    if not backslashes and not is_backslash.any():
        return np.zeros(len(chunk), bool), 0
    at = np.arange(len(chunk))
    last_other = np.maximum.accumulate(np.where(is_backslash, -1 - backslashes, at))
    run = at - last_other  # of backslashes, up to and including each byte
    before = np.concatenate([[backslashes], run[:-1]])
    return before % 2 == 1, int(run[-1])
