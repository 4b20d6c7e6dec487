"""Our Prometheus metrics, next to SGLang's on /metrics. They count only where SGLang's do.

(`ead serve` switches `--enable-metrics` on.) Values by position are means over the tokens that one
answer has in a range of positions, so that an answer costs a handful of observations and not one
per token.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

# First positions of the ranges: [0, 10), [10, 100), ...
_RANGES = (0, 10, 100, 500, 1000, 4000, 16000)
_TEMPERATURES = (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0, 5.0, 10.0)
_ENTROPIES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)  # nats
_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


@cache
def _metrics() -> Any:
    """Made on first use: prometheus_client decides at import where it keeps its numbers."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:  # set by SGLang with --enable-metrics
        return None
    from types import SimpleNamespace

    from prometheus_client import Counter, Histogram

    by_position = ["position"]
    return SimpleNamespace(
        requests=Counter("ead_requests", "Annealed or recorded answers finished", ["schedule"]),
        tokens=Counter("ead_tokens", "Tokens of annealed or recorded answers", ["schedule"]),
        refused=Counter("ead_refused", "Requests refused", ["reason"]),
        rollout_bytes=Counter(
            "ead_rollout_bytes", "Bytes of /v1/rollouts answers, uncompressed", ["format"]
        ),
        rollout_seconds=Histogram(
            "ead_rollout_seconds", "Duration of /v1/rollouts calls", buckets=_SECONDS
        ),
        temperatures=Histogram(
            "ead_temperature", "Temperature sampled at", by_position, buckets=_TEMPERATURES
        ),
        entropies=Histogram(
            "ead_entropy_nats", "Next-token entropy of the model", by_position, buckets=_ENTROPIES
        ),
    )


def count_refused(reason: str) -> None:
    """reason: one of a few words of ours, never a client's text."""
    if (metrics := _metrics()) is not None:
        metrics.refused.labels(reason).inc()


def count_rollouts(kind: str, num_bytes: int, seconds: float) -> None:
    """One /v1/rollouts answer of this format: json, ndjson, safetensors, safetensors-seq."""
    if (metrics := _metrics()) is not None:
        metrics.rollout_bytes.labels(kind).inc(num_bytes)
        metrics.rollout_seconds.observe(seconds)


def count_answer(schedule: str, offset: int, num_tokens: int, meta: Mapping[str, Any]) -> None:
    """One answer that was annealed or recorded; meta: its meta_info, with or without arrays."""
    if (metrics := _metrics()) is None:
        return
    metrics.requests.labels(schedule).inc()
    metrics.tokens.labels(schedule).inc(num_tokens)
    for name in ("temperatures", "entropies"):
        for position, mean in _means(meta.get(name) or (), offset):
            getattr(metrics, name).labels(position).observe(mean)


def _means(values: Sequence[float], offset: int) -> list[tuple[str, float]]:
    """(range of positions, mean) of an answer whose first token has position `offset`."""
    edges = [max(0, edge - offset) for edge in (*_RANGES[1:], offset + len(values))]
    parts = zip(_RANGES, [0, *edges], edges, strict=False)
    return [
        (f"{first}+", sum(part) / len(part))
        for first, start, end in parts
        if (part := values[start:end])
    ]
