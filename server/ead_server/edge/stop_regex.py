"""What ends an answer: stop strings over a seam, and regular expressions in bounded time.

The beginning of an answer that is continued is part of its prompt, where SGLang does not look: a
stop string may begin there and end in what is generated.

SGLang looks for a `stop_regex` with Python's backtracking engine, after every token and in its
scheduler, where one that takes long stops all requests. So what takes exponential time is refused
before the work; and since any other may still take long on a text that is made for it, the search
has a time limit, at which its request alone ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

import regex

from ead_sampler.names import CONTINUED

MAX_SECONDS = 0.02  # for all expressions of a request, after one token
MAX_TAIL = 1024  # tokens at the answer's end that are looked through, and so of a match

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


def is_empty_match(pattern: str) -> bool:
    """Whether it is found in every text, even the empty one. Raises what `regex` does of a pattern
    that is none, and TimeoutError."""
    return regex.search(pattern, "", timeout=MAX_SECONDS) is not None


def check_stops(original: Callable[..., bool], req: Any, new_accepted_len: int = 1) -> bool:
    """AROUND Req._check_str_based_finish: whether a stop string or expression ends the answer.

    Strings are still SGLang's to look for, but for those that begin before this request;
    expressions are looked for here. new_accepted_len: how many tokens the last step gave (more than
    one in speculative decoding).
    """
    params = req.sampling_params
    patterns, max_len = params.stop_regex_strs, params.stop_regex_max_len
    custom = params.custom_params  # a client's own, whatever it is
    continued = custom.get(CONTINUED) if isinstance(custom, dict) else None
    if not patterns and not continued:
        return original(req, new_accepted_len)
    num_tokens = min(max(params.stop_str_max_len, max_len) + 1, MAX_TAIL) + new_accepted_len - 1
    before = _before(req, continued, num_tokens) if continued else []
    if before and _over_the_seam(req, before, new_accepted_len):
        return True
    params.stop_regex_strs, params.stop_regex_max_len = [], 0
    try:
        if original(req, new_accepted_len):
            return True
    finally:
        params.stop_regex_strs, params.stop_regex_max_len = patterns, max_len
    return bool(patterns) and _found(req, patterns, before, num_tokens, new_accepted_len)


def _before(req: Any, continued: object, num_tokens: int) -> list[int]:
    """The last tokens of the answer that this request continues, as many as still matter."""
    # a string that the vocabulary has as one token may come byte by byte
    longest = max((len(string.encode()) for string in req.sampling_params.stop_strs), default=0)
    count = min(max(num_tokens, longest), MAX_TAIL) - len(req.output_ids)
    if not isinstance(continued, int) or continued <= 0 or count <= 0:
        return []
    return list(req.origin_input_ids[-min(continued, count) :])


def _over_the_seam(req: Any, before: list[int], new_accepted_len: int) -> bool:
    """Whether a stop string that begins in `before` ends in the newest tokens."""
    from sglang.srt.managers.schedule_batch import FINISH_MATCHED_STR

    seam = len(req.tokenizer.decode(before))
    end = len(req.output_ids)
    for stop in range(end - new_accepted_len + 1, end + 1):
        text = req.tokenizer.decode([*before, *req.output_ids[:stop]])
        for string in req.sampling_params.stop_strs:
            place = text.rfind(string)
            if 0 <= place < seam < place + len(string):
                req.finished_reason = FINISH_MATCHED_STR(matched=string)
                req.finished_len = stop
                return True
    return False


def _found(
    req: Any, patterns: list[str], before: list[int], num_tokens: int, new_accepted_len: int
) -> bool:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISHED_MATCHED_REGEX

    deadline = time.monotonic() + MAX_SECONDS
    seam = len(req.tokenizer.decode(before)) if before else -1  # what ends before it was no end
    end = len(req.output_ids)
    start = max(end - num_tokens, 0)
    try:
        # what ends before the new tokens was looked for in the steps before
        for stop in range(end - new_accepted_len + 1, end + 1):
            text = req.tokenizer.decode([*before, *req.output_ids[start:stop]])
            for pattern in patterns:
                left = max(deadline - time.monotonic(), 1e-4)
                found = regex.finditer(pattern, text, overlapped=bool(before), timeout=left)
                if any(match.end() > seam for match in found):
                    req.finished_reason = FINISHED_MATCHED_REGEX(matched=pattern)
                    req.finished_len = stop
                    return True
    except (TimeoutError, regex.error, RecursionError, MemoryError) as error:
        reason = str(error) or f"took longer than {MAX_SECONDS * 1e3:.0f} ms to look for"
        message = f"stop_regex: {reason}"
        req.finished_reason = FINISH_ABORT(message, HTTPStatus.BAD_REQUEST, "BadRequestError")
    return False
