"""Everything that the client raises; all of it is importable from `ead_client`.

    EadError
    ├── ConnectionFailed      no server there, or it went away; also a ConnectionError
    ├── TimedOut              no answer in time; the request may still be running;
    │                         also a TimeoutError
    ├── NotSendable           a request holds what JSON cannot, such as NaN, or a mistyped
    │                         keyword; nothing was sent; also a ValueError
    ├── MalformedAnswer       an answer that is not what the API promises; also a ValueError
    ├── ScheduleIgnored       asked for annealing or a rollout, and the answer has no sign of it
    └── ApiError              the server answered with an error; has its `status`
        ├── RequestRefused    4xx: the request is wrong; sending it again will not help
        └── ServerUnavailable 5xx and 429: it may work later

Of every error, `param` is the field of the request that it is about, or None where no one field is,
and `reason` is what is wrong, without the field's name or the status. What httpx raised, where it
did, is the `__cause__`. All of them can be pickled.
"""

from __future__ import annotations

from functools import partial


class EadError(Exception):
    """Base of all errors of this package. param: the field that it is about, where it is about one,
    as "annealing.tau_max" or "prompts[0].metadata"."""

    param: str | None = None

    @property
    def reason(self) -> str:
        """What is wrong, without the field's name or the status."""
        return str(self)


class ConnectionFailed(EadError, ConnectionError):
    """No server there, or it went away in the middle of an answer."""


class TimedOut(EadError, TimeoutError):
    """No answer within the client's timeout or deadline."""


class NotSendable(EadError, ValueError):
    """The request holds what JSON cannot, or a keyword that is nearly a known one. Nothing was
    sent. param: where in the request."""

    def __init__(self, param: str, reason: str) -> None:
        super().__init__(param, reason)
        self.param = param

    @property
    def reason(self) -> str:
        """Why it cannot be sent."""
        return str(self.args[1])

    def __str__(self) -> str:
        return f"{self.param}: {self.reason}"


class MalformedAnswer(EadError, ValueError):
    """The answer is not JSON, or not of the promised shape."""


class ScheduleIgnored(EadError):
    """The answer carries no marker of the schedule: an un-extended server, or a router that
    drops unknown fields, sampled at some other temperature. param: "annealing" or "rollout"."""

    def __init__(self, reason: str, *, param: str | None = None) -> None:
        super().__init__(reason)
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        return partial(type(self), param=self.param), self.args


class ApiError(EadError):
    """An error answer of the server, or an error event in a stream of one.

    status: of HTTP. message: as the server gave it; `reason` is the same. param: the offending
    field, where the server knows it. kind: OpenAI's "type" of the error, where there is one.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, kind: str | None = None
    ) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status
        self.message = message
        self.param = param
        self.kind = kind

    @property
    def reason(self) -> str:
        """The message, as the server gave it."""
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return partial(type(self), param=self.param, kind=self.kind), (self.status, self.message)


class RequestRefused(ApiError):
    """4xx: the request itself is wrong."""


class ServerUnavailable(ApiError):
    """5xx or 429: the server cannot answer now."""
