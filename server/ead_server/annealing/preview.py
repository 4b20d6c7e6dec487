"""What a schedule looks like, before anything is sampled: numbers, and a plot as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

import torch

from ead_sampler.schedules import Annealing

_WIDTH, _HEIGHT, _MARGIN = 640, 320, 44  # pixels
_COLOURS = ("#d1495b", "#00798c", "#edae49", "#66509e", "#30638e", "#5c946e")


def temperatures(
    schedule: Annealing, steps: Sequence[int], length: int, entropy: float
) -> dict[int, list[float]]:
    """tau of the first `length` tokens at each training step; without steps, at the schedule's own,
    or 0.

    entropy: nats, of every next token, for schedules that look at it. Schedules that follow what
    was sampled (`segment`, `branch`) are shown as they begin.
    """
    positions = torch.arange(length)
    entropies = torch.full((length,), entropy)
    return {
        step: schedule.model_copy(update={"step": step}).temperatures(positions, entropies).tolist()
        for step in steps or [schedule.step or 0]
    }


def svg(title: str, curves: Mapping[str, Sequence[float]]) -> str:
    """Temperature over token position, one line per curve, with a text equivalent of each."""
    length = max(len(curve) for curve in curves.values())
    top = max(1.0, *(max(curve) for curve in curves.values())) * 1.05

    def x(t: float) -> float:
        return _MARGIN + t / max(1, length - 1) * (_WIDTH - 2 * _MARGIN)

    def y(tau: float) -> float:
        return _HEIGHT - _MARGIN - tau / top * (_HEIGHT - 2 * _MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="12"><title>{escape(title)}</title>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_MARGIN}" y="20" font-weight="bold">{escape(title)}</text>',
    ]
    for tau in _ticks(top):
        parts.append(
            f'<line x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" y1="{y(tau):.1f}" y2="{y(tau):.1f}" '
            f'stroke="#ddd"/><text x="{_MARGIN - 6}" y="{y(tau) + 4:.1f}" '
            f'text-anchor="end">{tau:g}</text>'
        )
    for t in _ticks(length - 1):
        parts.append(
            f'<text x="{x(t):.1f}" y="{_HEIGHT - _MARGIN + 16}" text-anchor="middle">{t:g}</text>'
        )
    for index, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        every = max(1, len(curve) // 1000)  # more points than pixels only make the file large
        shown = [*range(0, len(curve) - 1, every), len(curve) - 1]
        points = " ".join(f"{x(t):.1f},{y(curve[t]):.1f}" for t in shown)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2">'
            f"<title>{escape(name)}: from {curve[0]:.3g} to {curve[-1]:.3g}</title></polyline>"
            f'<text x="{_WIDTH - _MARGIN}" y="{_MARGIN + 16 * index}" fill="{colour}" '
            f'text-anchor="end">{escape(name)}</text>'
        )
    label = f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" text-anchor="middle">generated token</text>'
    return "".join([*parts, label, "</svg>"])


def _ticks(top: float) -> list[float]:
    """Round numbers from 0 to `top`, three to seven of them."""
    step = next(
        base * 10.0**power
        for power in range(-3, 10)
        for base in (1, 2, 5)
        if top / (base * 10.0**power) <= 6
    )
    return [step * i for i in range(int(top / step + 1e-9) + 1)]
