"""Bodies as JSON: every character and every number arrives as it was given, or is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ead_client.errors import NotSendable

_MANY_DIGITS = re.compile(rb"[0-9]{19}")  # as only integers beyond 64 bits have, and some texts


def to_json(value: Any, place: str = "") -> bytes:
    """UTF-8. Arrays, mappings and sequences of any kind become lists and objects.

    place: what errors call `value`. Raises NotSendable that names where in `value` there is what
    JSON, or its readers, cannot hold: NaN and infinities, integers beyond 64 bits, halves of
    surrogate pairs, objects of other kinds.
    """
    try:
        text = json.dumps(
            value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain
        )
        data = text.encode()
    except (ValueError, TypeError, RecursionError) as error:
        _check(value, place)
        raise NotSendable(place or "body", str(error)) from error
    if _MANY_DIGITS.search(data):
        _check(value, place)
    return data


def _plain(value: Any) -> Any:
    """What json does not know by itself. Raises TypeError."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(value)
    raise TypeError(f"must be a value of JSON, got {type(value).__name__}")


def _check(value: Any, place: str, depth: int = 0) -> None:
    """Raise NotSendable for the first part of `value` that cannot be sent."""
    problem = _problem(value)
    if problem is not None:
        raise NotSendable(place or "body", problem)
    if value is None or isinstance(value, str | int | float):
        return
    if depth > 200:
        raise NotSendable(f"{place[:80]}...", "is nested too deeply")
    if not isinstance(value, Mapping | list | tuple):
        try:
            value = _plain(value)
        except TypeError as error:
            raise NotSendable(place or "body", str(error)) from None
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str) and _problem(key) is not None:
                raise NotSendable(place or "body", f"a key {_problem(key)}")
            _check(item, f"{place}.{key}" if place else str(key), depth + 1)
    elif isinstance(value, list | tuple):
        if value and all(type(item) is int for item in value):  # token ids
            value = [] if _problem(max(value)) is _problem(min(value)) is None else value
        for index, item in enumerate(value):
            _check(item, f"{place}[{index}]", depth + 1)
    else:  # an array without dimensions
        _check(value, place, depth + 1)


def _problem(value: Any) -> str | None:
    """What keeps this one value from being sent, its parts apart."""
    if isinstance(value, str):
        half = next((c for c in value if "\ud800" <= c <= "\udfff"), None)
        return half and f"has {half!a} at {value.index(half)}, half of a character and no text"
    if isinstance(value, int):
        within = -(1 << 63) <= value < 1 << 64
        return None if within else f"must be an integer of 64 bits, got one of {value.bit_length()}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number, got {value}"
    return None


class Lines:
    """Cuts a stream of bytes into lines, which end at \\n or \\r\\n and at nothing else.

    `str.splitlines`, and what httpx makes of it, would also cut at U+2028, U+0085 and others,
    which JSON may have within its strings.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines that are now whole. Raises UnicodeDecodeError."""
        *whole, rest = data.split(b"\n")
        for line in whole:
            self._parts.append(line)
            joined = b"".join(self._parts)
            self._parts.clear()
            yield joined.removesuffix(b"\r").decode()
        if rest:
            self._parts.append(rest)


def lines_of(parts: Iterable[bytes]) -> Iterator[str]:
    """The lines of a body that arrives in parts; a last one that is not ended is left out."""
    lines = Lines()
    for part in parts:
        yield from lines.feed(part)
