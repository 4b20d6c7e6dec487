"""Everything that the client raises.

EadError
├── ConnectionFailed      no server there, or it went away
├── TimedOut              no answer in time; the request may still be running
├── NotSendable           a request holds what JSON cannot, such as NaN; nothing was sent
├── MalformedAnswer       an answer that is not what the API promises
├── ScheduleIgnored       asked for annealing or a rollout, and the answer has no sign of it
└── ApiError              the server answered with an error; has status, param and type
    ├── RequestRefused    4xx: the request is wrong; sending it again will not help
    └── ServerUnavailable 5xx and 429: it may work later
"""

from __future__ import annotations


class EadError(Exception):
    """Base of all errors of this package."""


class ConnectionFailed(EadError, ConnectionError):
    """No server there, or it went away in the middle of an answer."""


class TimedOut(EadError, TimeoutError):
    """No answer within the client's timeout."""


class NotSendable(EadError, ValueError):
    """The request holds what JSON cannot; the message says where. Nothing was sent."""


class MalformedAnswer(EadError, ValueError):
    """The answer is not JSON, or not of the promised shape."""


class ScheduleIgnored(EadError):
    """The answer carries no marker of the schedule: an un-extended server, or a router that
    drops unknown fields, sampled at some other temperature."""


class ApiError(EadError):
    """An error answer. `param` names the offending field where the server knows it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, kind: str | None = None
    ) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status
        self.message = message
        self.param = param
        self.kind = kind

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.status, self.message, self.param, self.kind))


class RequestRefused(ApiError):
    """4xx: the request itself is wrong."""


class ServerUnavailable(ApiError):
    """5xx or 429: the server cannot answer now."""


def _rebuild(
    kind_of_error: type[ApiError], status: int, message: str, param: str | None, kind: str | None
) -> ApiError:
    return kind_of_error(status, message, param=param, kind=kind)
