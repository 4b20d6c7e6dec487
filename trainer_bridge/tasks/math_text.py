"""One way of writing for mathematics that is written in many, and the value of numbers."""

from __future__ import annotations

import re
from fractions import Fraction

_REPLACED = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"[\u2212\u2013\u2012]", "-"),
        (r"\u03c0", r"\\pi "),
        (r"\u221e", r"\\infty "),
        (r"\u00b2", "^2"),
        (r"\u00b3", "^3"),
        (r"[\u00d7]", r"\\times "),
        (r"[\u00b7\u22c5]", r"\\cdot "),
        (r"\u2264", r"\\le "),
        (r"\u2265", r"\\ge "),
        (r"\\(?:boxed|fbox|framebox)\s*(?=\{)", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*([0-9a-z])\s*([0-9a-z])", r"\\frac{\1}{\2}"),
        (r"\\sqrt\s*\[([35])\]\s*\{\s*-", r"-\\sqrt[\1]{"),
        (r"\\(?:displaystyle|textstyle|limits)(?![a-zA-Z])", ""),
        (r"\\m?(?:left|right|big|Big|bigg|Bigg)[lr]?(?=\s*(?:[\[\](){}|.]|\\[{}|]))", ""),
        (r"\\(?:lbrace)(?![a-zA-Z])", r"\\{"),
        (r"\\(?:rbrace)(?![a-zA-Z])", r"\\}"),
        (r"(?<=\d)(?:\{,\}|\\!\s*\{?,\}?\s*(?:\\!)?|,\\!|\\,|\\ |~)(?=\d{3}(?!\d))", ","),
        (r"\\[!]", ""),
        (r"(?<!\\)\\(?:[,;: ]|quad(?![a-zA-Z])|qquad(?![a-zA-Z]))|~", " "),
        (r"\\\$|\$|\\[()]", " "),
        (r"\\mathrm\{\s*e\s*\}", "e"),
        (
            r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mbox|math(?:rm|bf|it|sf|tt)|bf|rm)\s*\{",
            r"\\text{",
        ),
        (r"\\(?:leq|leqslant)(?![a-zA-Z])", r"\\le"),
        (r"\\(?:geq|geqslant)(?![a-zA-Z])", r"\\ge"),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset"),
        (r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\u00b0|\\degree(?![a-zA-Z]))", r"\\text{degrees}"),
        (r"\\text\{\s*([:.,])\s*\}", r"\1"),
        (r"\s*\\text\{\s*per\s?cent\s*\}|\s*\bper\s?cent\b|\s*\\%", "%"),
        (r"\s*(?:,\s*)?(?:\\text\{\s*(?:and|or)\s*\}|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z]))", ","),
        (r"\\log\s*_\s*\{?(\d+|\w)\}?\s*\{?(\d+|[a-z])\}?", r"\\log_{\1}(\2)"),
        (r"\\(?:lbrack)(?![a-zA-Z])", "["),
        (r"\\(?:rbrack)(?![a-zA-Z])", "]"),
        (r"(?<![a-zA-Z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![a-zA-Z\\])(pi|infty|sin|cos|tan|log|ln|exp)(?![a-zA-Z])", r"\\\1 "),
    )
]


def clean(text: str) -> str:
    """One way of writing for what means the same however it is written."""
    for pattern, by in _REPLACED:
        text = pattern.sub(by, text)
    before = None
    while before != text:
        before = text
        text = text.strip()
        if text[-1:] in (".", ",", ";"):
            text = text[:-1]
        inner = inside(text, "\\text{", "}") or inside(text, "{", "}")
        text = text if inner is None else inner
    return text


def inside(text: str, begin: str, end: str) -> str | None:
    """What stands between two delimiters that belong together and enclose all of the text."""
    if not (text.startswith(begin) and text.endswith(end) and len(text) >= len(begin) + len(end)):
        return None
    inner = text[len(begin) : len(text) - len(end)]
    depth = 0
    for token in re.finditer(r"\\[{}]|[(){}\[\]]", inner):
        depth += 1 if token[0][-1] in "([{" else -1
        if depth < 0:
            return None
    return inner if depth == 0 else None


# Numbers, exactly.

_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d+)"
DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
_POWER = re.compile(rf"({DECIMAL})(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*|[eE])\{{?([+-]?\d+)\}}?")
_TEN = re.compile(r"10\s*\^\s*\{?([+-]?\d+)\}?")
_FRACTION = re.compile(
    rf"(?:(\d+)\s*(?=\\)|(\d+)\s+(?=\d))?(?:\\frac\s*(?:\{{\s*(-?{DECIMAL})\s*\}}|(\d)|\s(\d+))\s*"
    rf"(?:\{{\s*(-?{DECIMAL})\s*\}}|(\d))|({DECIMAL})\s*/\s*({DECIMAL}))"
)
_OVER = re.compile(r"\{?\s*(\d+)\s*\\over\s*(\d+)\s*\}?")


def number(text: str) -> Fraction | None:
    """The value of a cleaned text that is a number as one writes it, else None."""
    text = text.strip()
    while (inner := inside(text, "(", ")") or inside(text, "{", "}")) is not None:
        if "," in inner:
            return None  # (1,234) is a pair
        text = inner.strip()
    if text.endswith("%") and not text.endswith("%%"):
        value = number(text[:-1])
        return None if value is None else value / 100
    if text[:1] in ("-", "+") and text[1:].lstrip()[:1] not in ("-", "+"):
        value = number(text[1:])
        return value if value is None or text[0] == "+" else -value
    if re.fullmatch(DECIMAL, text):
        return _decimal(text)
    if match := _REPEATING.fullmatch(text):
        whole, fixed, period = match.groups()
        scale = 10 ** len(fixed)
        tail = Fraction(int(period), scale * (10 ** len(period) - 1))
        return Fraction(int((whole or "0") + fixed), scale) + tail
    if match := _POWER.fullmatch(text):
        exponent = int(match[2])
        return _decimal(match[1]) * Fraction(10) ** exponent if abs(exponent) <= 400 else None
    if match := _TEN.fullmatch(text):
        exponent = int(match[1])
        return Fraction(10) ** exponent if abs(exponent) <= 400 else None
    if match := _OVER.fullmatch(text):
        return Fraction(int(match[1]), int(match[2])) if int(match[2]) else None
    if match := _FRACTION.fullmatch(text):
        whole = match[1] or match[2]
        above = _decimal(match[3] or match[4] or match[5] or match[8])
        below = _decimal(match[6] or match[7] or match[9])
        if not below:
            return None
        if whole is None:
            return above / below
        return int(whole) + above / below if above >= 0 and below > 0 else None
    return None


def _decimal(text: str) -> Fraction:
    return Fraction(re.sub(r"[, ]", "", text))
