"""`ead chat`: answers that arrive token by token, each in the colour of its temperature."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from ead_client import Chunk, Client, EadError, _html

# what a token can be coloured by, and the value that is full red
COLUMNS = {"temperature": 1.2, "entropy": 3.0, "surprise": 5.0}


def heat(share: float) -> str:
    """A style of rich: blue (0) to red (1), readable on light and dark."""
    return "bold rgb({},{},{})".format(*_html.heat(share))


def chat(
    client: Client,
    question: str | None,
    *,
    annealing: dict[str, Any] | None,
    system: str,
    max_tokens: int,
    by: str,
) -> None:
    """Answer `question`, or, without one, whatever is typed until the end of input."""
    console = Console()
    messages = [{"role": "system", "content": system}] if system else []
    if question is not None:
        _answer(console, client, [*messages, _user(question)], annealing, max_tokens, by)
        return
    if sys.stdin.isatty():
        scale = (Text(f"{v:.2g} ", style=heat(v / COLUMNS[by])) for v in _scale(by))
        console.print(f"{by}:", *scale, "   Ctrl-C ends an answer, Ctrl-D the chat", sep=" ")
    for line in _typed():
        messages.append(_user(line))
        text = _answer(console, client, messages, annealing, max_tokens, by)
        messages.append({"role": "assistant", "content": text})


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _scale(by: str) -> Iterator[float]:
    return (float(value) for value in np.linspace(0, COLUMNS[by], 5))


def _typed() -> Iterator[str]:
    """Lines that are not empty, with editing and history on a terminal."""
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        import readline  # noqa: F401  (input() edits with it)
    while True:
        try:
            line = input(prompt).removeprefix("\ufeff").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise EadError(f"what was typed is not UTF-8: {error}") from None
        except KeyboardInterrupt:
            print()
            continue
        if line:
            yield line


def _answer(
    console: Console,
    client: Client,
    messages: list[dict[str, str]],
    annealing: dict[str, Any] | None,
    max_tokens: int,
    by: str,
) -> str:
    """Print one answer as it comes, its thinking too. Returns its text without that, so far as it
    was printed."""
    chunks = client.stream_chat(
        messages,
        annealing=annealing,
        rollout={"entropies": True},
        logprobs=True,
        max_tokens=max_tokens,
    )
    text, taus, logprobs, reason = "", [], [], None
    try:
        for chunk in chunks:
            for piece, value in _coloured(chunk, by):
                console.print(Text(piece, style=heat(value / COLUMNS[by])), end="")
            for choice in chunk.choices:
                text += choice.text
                reason = choice.finish_reason or reason
                if choice.rollout is not None:
                    taus += choice.rollout.temperatures.tolist()
                    logprobs += choice.rollout.model_logprobs.tolist()
    except KeyboardInterrupt:
        reason = "stopped"
        chunks.close()  # type: ignore[attr-defined]  # and the server stops generating
    console.print()
    if taus:
        said = f"{len(taus)} tokens, temperature {taus[0]:.2f} to {taus[-1]:.2f}, "
        console.print(Text(f"{said}mean log pi {np.mean(logprobs):.2f}, {reason}", style="dim"))
    return text


def _coloured(chunk: Chunk, by: str) -> Iterator[tuple[str, float]]:
    """The chunk's text, by token where it has them, with what each is coloured by."""
    for choice in chunk.choices:
        said = choice.reasoning + choice.text
        rollout = choice.rollout
        if rollout is None or not choice.tokens or not len(rollout):
            if said:
                yield said, 0.0
            continue
        columns = {
            "temperature": rollout.temperatures,
            "entropy": rollout.entropies,
            "surprise": -rollout.model_logprobs,
        }
        column = columns[by]
        assert column is not None
        # The text leaves out what ends an answer, which is a token like others; and the first of
        # several tokens that make one character have no text.
        left = said
        for token, value in zip(choice.tokens, column[-len(choice.tokens) :], strict=True):
            if left.startswith(token):
                left = left[len(token) :]
                yield token, float(value)
        if left:
            yield left, float(column[-1])
