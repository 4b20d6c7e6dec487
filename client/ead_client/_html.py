"""Answers in a notebook: each token on the colour of its temperature, its numbers on hover."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ead_client._types import Choice, Rollout

_MOST_TOKENS = 4096  # that are drawn


def heat(share: float) -> tuple[int, int, int]:
    """Red, green and blue, from blue (0) to red (1)."""
    share = min(max(share, 0.0), 1.0)
    return round(60 + 195 * share), round(110 - 30 * share), round(255 - 195 * share)


def colour(temperature: float) -> str:
    """Full red at 1.2 and above; translucent, for text of either colour."""
    return "rgba({},{},{},0.35)".format(*heat(temperature / 1.2))


def answers_html(choices: Sequence[Choice]) -> str:
    """One paragraph per answer."""
    return "".join(choice_html(choice) for choice in choices)


def choice_html(choice: Choice) -> str:
    """The text, token by token where the answer has its tokens' texts, and how it ended."""
    head = f"<b>{choice.index}</b> {escape(choice.finish_reason or '')}"
    thought = f"<i>{escape(choice.reasoning)}</i><br>" if choice.reasoning else ""
    if choice.error is not None:
        body = f"<i>{escape(str(choice.error.get('message')))}</i>"
    elif choice.rollout is None:
        body = f"{thought}{escape(choice.text)}"
    elif choice.tokens is not None and len(choice.tokens) == len(choice.rollout):
        body = rollout_html(choice.rollout, choice.tokens)
    else:
        body = f"{thought}{escape(choice.text)}<br><small>{rollout_html(choice.rollout)}</small>"
    style = "white-space:pre-wrap;overflow-wrap:anywhere"
    return f'<div style="{style}"><small>{head}</small><br>{body}</div>'


def rollout_html(rollout: Rollout, tokens: Sequence[str] | None = None) -> str:
    """Tokens, or, without their texts, token ids."""
    tokens = [str(i) + " " for i in rollout.token_ids] if tokens is None else tokens
    spans = []
    for t, text in enumerate(tokens[:_MOST_TOKENS]):
        numbers = [
            f"t = {t}, token {rollout.token_ids[t]}",
            f"temperature {rollout.temperatures[t]:.4g}",
            f"log mu {rollout.logprobs[t]:.4g}",
            f"log pi {rollout.model_logprobs[t]:.4g}",
        ]
        if rollout.entropies is not None:
            numbers.append(f"entropy {rollout.entropies[t]:.4g}")
        background = colour(float(rollout.temperatures[t]))
        title = escape("\n".join(numbers))
        spans.append(f'<span title="{title}" style="background:{background}">{escape(text)}</span>')
    more = len(tokens) - _MOST_TOKENS
    return "".join(spans) + (f" ... and {more:,} more" if more > 0 else "")
