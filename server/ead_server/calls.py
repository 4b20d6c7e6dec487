"""One call of a client's: what is told of it in the log, and counted in the metrics."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from ead_server import metrics
from ead_server.settings import Settings

log = logging.getLogger("ead.requests")


@dataclass
class Call:
    """One request, as it is told in the log and counted. Filled in on its way."""

    method: str
    path: str
    settings: Settings
    started: float = field(default_factory=time.perf_counter)
    status: int = 0  # 0: the client left before an answer
    left: bool = False  # whether the client did, before the end
    bytes_in: int = 0  # of the body
    bytes_out: int = 0
    answers: int = 0
    tokens: dict[str, int] = field(default_factory=dict)  # by engine request
    schedule: str | None = None
    refused: str | None = None  # a reason for metrics.refused
    bad_value: str | None = None  # what the engine said of the request


# The request that the code is working for; None in SGLang's own work and on health routes.
current_call: ContextVar[Call | None] = ContextVar("ead_current_call", default=None)


def note_refused(reason: str) -> None:
    """Note why the request that is being worked on is refused, for the log and the metrics."""
    if (call := current_call.get()) is not None:
        call.refused = reason


def record(call: Call) -> None:
    """Count the request, and write its line."""
    if call.left and call.status >= 400:  # the answer that SGLang has for nobody
        call.status, call.refused = 0, None
    if call.refused is None and call.status >= 400:
        call.refused = "invalid" if call.status < 500 else "error"
    if call.refused is not None:
        metrics.count_refused(call.refused)
    if call.settings.log_format == "off":
        return
    seconds, tokens = time.perf_counter() - call.started, sum(call.tokens.values())
    if call.settings.log_format == "json":
        facts = {
            "time": time.time(),
            "method": call.method,
            "path": call.path,
            "status": call.status or None,
            "seconds": round(seconds, 4),
            "bytes": call.bytes_out,
            "answers": call.answers,
            "tokens": tokens,
            "schedule": call.schedule,
            "refused": call.refused,
        }
        log.info(json.dumps(facts))
        return
    path = call.path.encode("unicode_escape").decode()[:200]  # one line, whatever was sent
    line = f"{time.strftime('%H:%M:%S')} {call.method} {path} {call.status or 'client left'}"
    line += f" {seconds:.2f} s"
    if call.answers:
        line += f", {call.answers} answer{'s' * (call.answers > 1)}, {tokens:,} tokens"
    if call.schedule:
        line += f", {call.schedule}"
    if call.refused:
        line += f", refused: {call.refused}"
    log.info(line)


def log_to_stderr() -> None:
    """Lines as they are, whatever SGLang sets up for its own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
