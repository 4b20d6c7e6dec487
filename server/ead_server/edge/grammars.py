"""Grammars that clients give an answer: `json_schema`, `regex`, `ebnf`, `structural_tag`.

xgrammar compiles them in SGLang's scheduler, and asks them after every token which may come next.
Before the work, what would take long to compile is refused. In the work, a grammar that takes too
long with a token, or that lets no token follow, ends its own request. Measured with xgrammar 0.2.7
and 49,152 tokens: 450 nested objects take 20 s to compile, 64 take 0.1 s; each bounded string takes
up to 3 s; `([a-z]{1,30}){1,30}` takes up to 9 s per token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import orjson

from ead_server.edge.body_shape import Shape, shape_of
from ead_server.errors import LimitExceeded

KINDS = ("json_schema", "regex", "ebnf", "structural_tag")
MAX_BYTES = 64 << 10
MAX_NESTING = 64  # of a schema's JSON, and of the brackets of the others
MAX_PARTS = 4_000  # objects and lists of a schema
MAX_BOUNDED = 32  # strings of a schema with a length or a pattern
MAX_KEPT = 256  # compiled grammars
# Of processor time to say which tokens may come next: a usual grammar takes less than a millisecond
# a token. It may take this much at once, and get back so much with each token.
MAX_SECONDS, SECONDS_BACK = 0.5, 0.005

_JSON = Shape(nesting=MAX_NESTING, containers=MAX_PARTS, strings=MAX_BYTES, values=MAX_BYTES)
_BOUNDS = ("minLength", "maxLength", "pattern", "format")


def check(params: dict[str, Any]) -> None:
    """Raises LimitExceeded for a grammar that takes too long to compile.

    params: sampling parameters, as a route built them.
    """
    for kind in KINDS:
        text = params.get(kind)
        if not isinstance(text, str) or not text:
            continue  # an empty one is none, and another type is SGLang's to refuse
        size = len(text.encode(errors="surrogatepass"))
        if size > MAX_BYTES:
            raise LimitExceeded(kind, f"must have at most {MAX_BYTES:,} bytes, got {size:,}")
        if kind in ("json_schema", "structural_tag"):
            _check_json(kind, text)
        elif _nesting(text) > MAX_NESTING:
            raise LimitExceeded(kind, f"must be nested at most {MAX_NESTING} deep")


def _check_json(kind: str, text: str) -> None:
    above = shape_of(text.encode(errors="surrogatepass"), _JSON).first_above(_JSON)
    if above == "nesting":
        raise LimitExceeded(kind, f"must be nested at most {MAX_NESTING} deep")
    if above is not None:
        raise LimitExceeded(kind, f"must have at most {MAX_PARTS:,} objects and lists")
    try:
        parsed = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise LimitExceeded(kind, f"is not valid JSON ({error})") from None
    bounded = sum(any(name in part for name in _BOUNDS) for part in _objects(parsed))
    if bounded > MAX_BOUNDED:
        raise LimitExceeded(
            kind,
            f"must have at most {MAX_BOUNDED} strings with {', '.join(_BOUNDS)}, got {bounded}",
        )


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _objects(part)


def _nesting(text: str) -> int:
    """How deeply brackets are in each other, also those that stand for themselves."""
    level = deepest = 0
    for character in text:
        if character in "([{":
            level += 1
            deepest = max(deepest, level)
        elif character in ")]}":
            level = max(level - 1, 0)
    return deepest


# --- hooks of the scheduler process, see ead_server.hooks ---------------------------------------

_LEFT = "ead_seconds_left"  # attribute of a grammar
_TROUBLE = "ead_trouble"  # another: why its request ends, or absent


def fill_vocab_mask(original: Callable[..., None], grammar: Any, vocab_mask: Any, idx: int) -> None:
    """AROUND XGrammarGrammar.fill_vocab_mask: which tokens may come next, as bits of a row.

    A row without any would make the probabilities no numbers; it is left open instead, and
    `accept_token` ends the request.
    """
    started = time.thread_time()
    original(grammar, vocab_mask, idx)
    left = getattr(grammar, _LEFT, MAX_SECONDS) - (time.thread_time() - started)
    setattr(grammar, _LEFT, min(left + SECONDS_BACK, MAX_SECONDS))
    if left < 0:
        setattr(grammar, _TROUBLE, "takes too long to say which tokens may follow")
    elif not vocab_mask[idx].any():
        setattr(grammar, _TROUBLE, "lets no token follow")
        vocab_mask[idx].fill_(-1)


def accept_token(original: Callable[..., None], grammar: Any, token: int) -> None:
    """AROUND XGrammarGrammar.accept_token: SGLang ends the request at a ValueError."""
    trouble = getattr(grammar, _TROUBLE, None)
    if trouble is not None:
        raise ValueError(f"the grammar {trouble}")
    original(grammar, token)


def forget_oldest(result: None, backend: Any, key: Any, value: Any) -> None:
    """AFTER BaseGrammarBackend.set_cache, which keeps every grammar that it ever compiled."""
    while len(backend.cache) > MAX_KEPT:
        del backend.cache[next(iter(backend.cache))]


# --- in the tokenizer process --------------------------------------------------------------------

_FAILED = "Grammar accept_token failed: "  # SGLang's words


def failure(message: object) -> str | None:
    """What SGLang says of a grammar that came to no end, in short; None: it speaks of another
    thing. SGLang calls it a failure of the server, and repeats the grammar."""
    if not isinstance(message, str) or not message.startswith(_FAILED):
        return None
    return message.removeprefix(_FAILED).partition("\n")[0][:200]
