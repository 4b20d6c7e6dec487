"""Whether an answer in mathematics is equal to a reference.

A reward that is paid for a wrong answer trains the wrong thing, and one that is missed only teaches
less. So whatever cannot be decided here counts as not equal.

Structure is compared here: sets, tuples, intervals, matrices, units, choices, text, and numbers as
exact fractions. Only expressions go to math-verify, which would read 421 in "4 2 1", take 50% for
50, and a word for the product of its letters.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from trainer_bridge.tasks.math_text import DECIMAL, clean, inside, number

_MAX_CHARACTERS = 1000  # of a final answer; a longer one is no answer that can be compared
_MAX_DEPTH = 30  # of its brackets


def equal(reference: str, answer: str) -> bool:
    """Whether a final answer is what the reference says. Not sure is False.

    It may take for ever, where expressions are large: it belongs in a process with a deadline.
    """
    if len(answer) > max(_MAX_CHARACTERS, 4 * len(reference)):
        return False
    reference, answer = clean(reference), clean(answer)
    return max(_depth(reference), _depth(answer)) <= _MAX_DEPTH and _equal(reference, answer)


def _depth(text: str) -> int:
    """How deep brackets are nested."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def readable(reference: str) -> bool:
    """Whether there is something that an answer can be equal to."""
    return bool(clean(reference))


def _equal(reference: str, answer: str) -> bool:
    """Of two cleaned texts."""
    if not reference or not answer:
        return False
    if _squeezed(reference) == _squeezed(answer):
        return True
    if choice := re.fullmatch(r"\(?([A-Z])\)?", reference):
        return choice[1] == _choice(answer)
    if (known := number(reference)) is not None and (found := number(answer)) is not None:
        return known == found
    for compare in (_equal_collections, _equal_relations, _equal_quantities):
        if (decided := compare(reference, answer)) is not None:
            return decided
    reference, answer = (
        text.replace(",", "") if number(text) is not None else text for text in (reference, answer)
    )
    return _is_expression(reference) and _is_expression(answer) and _verified(reference, answer)


def _choice(answer: str) -> str | None:
    """The one letter that is chosen: of B, (B), or B. 42."""
    bare = re.sub(r"\\text\{([^{}]*)\}", r"\1 ", answer)
    match = re.match(r"(?:\(([A-Z])\)|([A-Z])(?:[).:]\s|[).]?\s*$))(.*)", bare, re.S)
    if match is None or re.search(r"(?<![a-zA-Z\\])[A-Z](?![a-zA-Z])", match[3]):
        return None
    return match[1] or match[2]


def _squeezed(text: str) -> str:
    """For texts: without case and spaces. Single letters keep their case: E is not e."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"\s+", " ", text).strip(" .")
    if len(re.findall(r"[^\W\d_]{2,}", text)) and "\\" not in text:
        return text.casefold()
    return re.sub(r"(?<![\d]) | (?!\d)", "", text)


# Sets, tuples, intervals, matrices.


class _Collection(NamedTuple):
    kind: str  # its delimiters; "set" for what has no order
    items: list[str]


def _equal_collections(reference: str, answer: str) -> bool | None:
    """None where neither is a collection."""
    known, found = _collection(reference), _collection(answer)
    if known is None and found is None:
        return None
    if known is None or found is None or known.kind != found.kind:
        return False
    if known.kind not in ("set", "set of values by name", "union"):
        pairs = zip(known.items, found.items, strict=False)
        return len(known.items) == len(found.items) and all(_equal(a, b) for a, b in pairs)
    left = list(found.items)
    for item in known.items:
        same = next((i for i, other in enumerate(left) if _equal(item, other)), None)
        if same is None:
            return False
        del left[same]
    return not left


_MATRIX = re.compile(
    r"[\[(]?\s*\\begin\{([pb]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}\s*[\])]?", re.S
)


def _collection(text: str) -> _Collection | None:
    if assigned := re.fullmatch(
        r"\(?[a-zA-Z](?:,\s*[a-zA-Z])*\)?\s*(?:=|\\in)\s*([(\[\\].*)", text
    ):
        inner = _collection(assigned[1].strip())
        return inner if inner is not None and inner.kind != "set" else _plus_minus(text)
    if match := _MATRIX.fullmatch(text):
        rows = [re.split(r"&", row) for row in re.split(r"\\\\", match[2]) if row.strip()]
        shape = "x".join(str(len(row)) for row in rows)
        return _Collection(f"matrix {shape}", [clean(item) for row in rows for item in row])
    if "\\cup" in text:
        return _Collection("union", [clean(part) for part in text.split("\\cup")])
    if (inner_set := inside(text, "\\{", "\\}")) is not None:
        return _listed(_split(inner_set))
    for begin, end in ("()", "(]", "[)", "[]"):
        if text.startswith(begin) and text.endswith(end):
            items = _split(text[1:-1])
            if len(items) > 1 and _balanced(text[1:-1]):
                return _Collection(begin + end, [clean(item) for item in items])
    if _decimal_like(text) or len(items := _split(text)) < 2:
        return _plus_minus(text)
    return _listed(items)


def _listed(items: Sequence[str]) -> _Collection:
    """Without order, each once, and without the name of the one variable that has all values."""
    items = [clean(item) for item in items]
    names = {item.partition("=")[0].strip() for item in items if _value(item) != item}
    if len(names) > 1:
        return _Collection("set of values by name", items)
    kept: list[str] = []
    for cleaned in items:
        signs = _plus_minus(cleaned)
        for single in signs.items if signs else [_value(cleaned)]:
            if not any(_equal(single, other) for other in kept):
                kept.append(single)
    return _Collection("set", kept)


def _plus_minus(text: str) -> _Collection | None:
    r"""a \pm b, as both of its values."""
    text = _value(text)
    if text.count("\\pm") != 1 or "," in text:
        return None
    return _Collection("set", [clean(re.sub(r"\\pm\s*", sign, text)) for sign in ("+", "-")])


def _decimal_like(text: str) -> bool:
    return re.fullmatch(rf"[+-]?\s*{DECIMAL}%?", text) is not None


def _balanced(text: str) -> bool:
    return inside(f"{{{text}}}", "{", "}") is not None


def _split(text: str) -> list[str]:
    """At the commas and semicolons outside of all brackets, and not within 1,234."""
    items, depth, begin = [], 0, 0
    for token in re.finditer(r"\\[{}]|[(){}\[\],;]", text):
        if token[0] in ",;":
            if depth == 0:
                items.append(text[begin : token.start()])
                begin = token.end()
        else:
            depth += 1 if token[0][-1] in "([{" else -1
    items.append(text[begin:])
    return [item for item in items if item.strip()]


# Equations, inequalities, quantities with units.

_RELATION = re.compile(r"(?<!\\)(?:[<>=]|\\(?:le|ge|ne|neq|in|approx|equiv|sim)(?![a-zA-Z]))")
_NAME = re.compile(r"(?:\\?[a-zA-Z]+(?:_\{?\w+\}?)?|[a-zA-Z]\([a-zA-Z](?:,\s*[a-zA-Z])*\))")


def _value(text: str) -> str:
    """What a variable is said to be: 42 of x = 42."""
    name, sign, value = text.partition("=")
    if sign and _NAME.fullmatch(name.strip()) and not _RELATION.search(value):
        return clean(value)
    return text


def _equal_relations(reference: str, answer: str) -> bool | None:
    """None where neither is an equation or an inequality."""
    known, found = _RELATION.findall(reference), _RELATION.findall(answer)
    if not known and not found:
        return None
    if not known:
        return _equal_chain(reference, answer) if set(found) == {"="} else False
    if not found:  # an assignment's value is enough
        value = _value(reference)
        return value != reference and _equal(value, answer)
    if any(sign.startswith("\\") and sign not in ("\\le", "\\ge") for sign in known + found):
        return False
    if known == found == ["="] and _value(reference) != reference and _value(answer) != answer:
        names = [text.partition("=")[0].strip() for text in (reference, answer)]
        if names[0] == names[1]:
            return _equal(_value(reference), _value(answer))
    whole = _is_expression(_RELATION.sub("+", reference)) and _is_expression(
        _RELATION.sub("+", answer)
    )
    return whole and _verified(reference, answer)


def _equal_chain(reference: str, answer: str) -> bool:
    """An answer such as x = 42, or 6 * 7 = 42, whose every value must be right."""
    first, *others = (clean(part) for part in answer.split("="))
    values = others if _NAME.fullmatch(first) else [first, *others]
    return all(_equal(reference, value) for value in values)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_UNIT = re.compile(
    r"(?P<value>.*?(?:[\d)}.]|\\pi))\s*(?:\\text\s*\{(?P<unit>[^{}]*)\}|"
    r"(?P<plain>[a-zA-Z]+(?: [a-z]+)*))"
    r"(?P<power>\s*\^\s*\{?\d\}?)?",
    re.S,
)
_SHORT_UNITS = _words(
    "mm cm dm km in ft yd mi mg kg lb lbs oz ml hr hrs min sec ms km/h mph kph sq cu gal rad deg "
    "cc rpm hz kw mw gm am pm usd eur men"
)
_NO_UNITS = _words(
    "not no is isn are was or and wrong if but than least most more less about maybe either from "
    "to sqrt frac sin cos tan log ln exp infty then when unless factorial squared cubed million "
    "billion thousand hundred dozen half"
)


def _quantity(text: str) -> tuple[str, str] | None:
    """(value, unit)."""
    match = _UNIT.fullmatch(text)
    if match is None:
        return None
    unit = " ".join((match["unit"] or match["plain"] or "").lower().split())
    words = re.findall(r"[a-z]+", unit)
    if not words or len(words) > 4 or re.search(r"\d", unit) or _NO_UNITS & set(words):
        return None
    if match["plain"] and not all(len(word) > 3 or word in _SHORT_UNITS for word in words):
        return None  # letters that are factors
    return clean(match["value"]), unit.rstrip("s") + re.sub(r"[\s{}]", "", match["power"] or "")


def _equal_quantities(reference: str, answer: str) -> bool | None:
    """None where neither has a unit. One that names none means the one that is asked for."""
    known, found = _quantity(reference), _quantity(answer)
    if known is None and found is None:
        return None
    if known and found and known[1] != found[1]:
        return False
    value, other = known[0] if known else reference, found[0] if found else answer
    return "%" not in value + other and _equal(value, other)


# Expressions.

_WORDS = re.compile(r"\\[a-zA-Z]+|[a-zA-Z]+")
_ALPHABET = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_COMMANDS = _words(
    "frac sqrt pi cdot times div ln log lg exp sin cos tan cot sec csc arcsin arccos arctan sinh "
    "cosh tanh binom dbinom infty alpha beta gamma delta epsilon varepsilon theta lambda mu nu rho "
    "sigma tau phi varphi psi omega Delta Omega le ge over lfloor rfloor lceil rceil"
)


def _is_expression(text: str) -> bool:
    """Whether all of it is mathematics that math-verify reads as it stands."""
    for word in _WORDS.findall(text):
        if word.startswith("\\"):
            if word[1:] not in _COMMANDS:
                return False
        elif word.lower() in _NO_UNITS or (len(word) > 2 and word not in _ALPHABET):
            return False  # a word; the product of its letters would equal those of others
    odd = re.search(r"\d\s+\d|[^\w\s\\+\-*/^(){}\[\]|!.<>=,']|\d_|--|\+\+|\.\.|,", text)
    return odd is None and bool(re.search(r"\w", text))


def _verified(reference: str, answer: str) -> bool:
    parse, verify = _math_verify()
    known, found = (parse(_exact(text)) for text in (reference, answer))
    return known is not None and found is not None and verify(known, found)


def _exact(text: str) -> str:
    """Decimals as fractions, so that nothing is rounded, and i as math-verify knows it."""

    def fraction(match: re.Match[str]) -> str:
        whole, digits = match[0].split(".")
        return f"\\frac{{{int((whole or '0') + digits)}}}{{{10 ** len(digits)}}}"

    text = re.sub(r"\d*\.\d+", fraction, text)
    return re.sub(r"(?<![a-zA-Z\\])i(?![a-zA-Z])", r" i ", text)  # else 3i were a variable


@lru_cache(maxsize=1)
def _math_verify() -> tuple[Callable[[str], Any], Callable[[Any, Any], bool]]:
    """Its two halves, without the deadlines that need signals of the main thread, and would turn
    into a reward of 0."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # that there is no timeout, we know
    latex = [math_verify.LatexExtractionConfig()]

    def parse(text: str) -> Any:
        # without \boxed, only the first number of "3\sqrt{2}" would be found
        boxed = f"\\boxed{{{text}}}"
        found = math_verify.parse(boxed, latex, fallback_mode="no_fallback", parsing_timeout=None)
        return found[0] if found else None

    def verify(known: Any, found: Any) -> bool:
        return bool(math_verify.verify(known, found, timeout_seconds=None))

    return parse, verify
