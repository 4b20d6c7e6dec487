"""Every error of this package.

    FieldError (ValueError)   a field of a request whose value cannot be used here
    └── AnnealingError        a schedule that cannot be used, alone or with what comes with it

`field` is the offending key, as `annealing.tau_max`; `message` says what is allowed, and what was
given.
"""

from __future__ import annotations


class FieldError(ValueError):
    """See the module's docstring. A ValueError, by which SGLang knows a bad request."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class AnnealingError(FieldError):
    """A schedule that cannot be used. `field` is the offending key, e.g. `annealing.tau_max`."""
