"""Which part of an answer in mathematics is final. In time linear in the answer."""

from __future__ import annotations

import re
from typing import NamedTuple

_MAX_LINE = 1000  # characters of the last line that are looked at where there is no box

_THINKING = re.compile(r"(?i)[<\[◁](/?)(?:think|thinking|thought|reasoning)[>\]▷]")
_TAGGED = re.compile(r"(?i)<(/?)answer>")
_BRACES = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\(?:boxed|fbox|framebox)\b|\\.|[{}]", re.S)
_BETWEEN_BOXES = re.compile(
    r"[\s$.]*(?:\\[\])]|\\text\{)?[\s$]*(?:,|;|and|or|,\s*and|,\s*or)\s*\}?[\s$]*(?:\\[\[(])?[\s$]*"
)
_SAID = re.compile(r"(?i)(?:\b(?:answer|result|solution)\b|\bit)\**\s*(?:is|=|:|equals)\**:?\s*")


def final_answer(text: str) -> str | None:
    """What an answer gives as its end: the last box, or what stands in its place; None without.

    Thinking is no answer. Of boxes joined by commas, "and" or "or", all are the answer. Where there
    is no box, the answer is what the last line consists of, or says that the answer is.
    """
    spoken = without_thinking(text)
    if spoken is None:
        return None
    tags = list(_TAGGED.finditer(spoken))
    if tags:
        if len(tags) < 2 or not tags[-1][1] or tags[-2][1]:
            return None
        spoken = spoken[tags[-2].end() : tags[-1].start()]
    boxes = _boxes(spoken)
    if not boxes:
        return _said(spoken)
    contents: list[str] = []
    following = len(spoken)
    for box in reversed(boxes):
        if contents and not _BETWEEN_BOXES.fullmatch(spoken[box.end : following][:60]):
            same = not spoken[box.end : following].strip("$ \n") and box.content == contents[-1]
            if not same:
                break
        if not box.content:
            return None  # empty, or never closed: the answer was left open
        if box.content not in contents:
            contents.append(box.content)
        following = box.start
    return ", ".join(reversed(contents))


def last_box(text: str) -> str | None:
    """What stands in the last box that is closed and not empty."""
    return next((box.content for box in reversed(_boxes(text)) if box.content), None)


def last_number(text: str) -> str | None:
    """The last number of a text as it stands there, a fraction being one number."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?%?", text[-_MAX_LINE:])
    return found[-1].rstrip(",") if found else None


def without_thinking(text: str) -> str | None:
    """What follows the thinking; None where the thinking does not end."""
    begin = 0
    open_ = False
    for tag in _THINKING.finditer(text):
        open_ = not tag[1]
        begin = tag.end()
    return None if open_ else text[begin:]


class _Box(NamedTuple):
    start: int
    end: int
    content: str | None  # None: it has no end


def _boxes(text: str) -> list[_Box]:
    """The boxes of a text that stand in no other box, in their order. In one pass."""
    found: list[_Box] = []
    open_: list[tuple[int, int] | None] = []  # (start, start of the content) of a box; None: braces
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "}":
            if open_ and (box := open_.pop()) is not None:
                start, begin = box
                while found and found[-1].start > start:
                    found.pop()  # nested
                found.append(_Box(start, match.end(), text[begin : match.start()].strip()))
        elif token == "{":
            open_.append(None)
        elif len(token) > 2:
            if token.endswith("{"):
                open_.append((match.start(), match.end()))
            else:  # "\boxed 42", to the end of the formula or line
                rest = re.compile(r"[^$\n\\]*").match(text, match.end())
                assert rest is not None
                content = rest[0].strip().rstrip(".")
                found.append(_Box(match.start(), rest.end(), content or None))
    unclosed = [_Box(box[0], len(text), None) for box in open_ if box is not None]
    return sorted(found + unclosed, key=lambda box: box.start)


def _said(text: str) -> str | None:
    """The final answer of a text without boxes."""
    line = text.rstrip()[-_MAX_LINE:].rpartition("\n")[2].strip().replace("**", "")
    if line.endswith("?"):
        return None
    if line.startswith("####"):
        return line[4:].strip() or None
    said = list(_SAID.finditer(line))
    alone = line if text.strip().replace("**", "") == line else ""
    return (line[said[-1].end() :] if said else alone).strip() or None
