"""Everything that this package raises for a user to act on.

BridgeError
├── BadConfig                a run that cannot be made
├── UnsupportedModel         its log-probabilities cannot be computed packed
├── RewardFunctionUnusable   a worker cannot load the reward function
├── TooFewRollouts           so many answers or rewards failed that no update can be made
├── StaleRollout             an answer was sampled from weights that are not the run's newest
├── WeightUpdateFailed       the server did not take new weights
├── CheckpointFailed         a checkpoint could not be written; those before it are as they were
├── Diverged                 update after update had no finite gradient
└── Interrupted              Ctrl-C ended the run after a step, with a checkpoint
"""

from __future__ import annotations

from functools import partial


class BridgeError(Exception):
    """Base of all errors of this package."""


class BadConfig(BridgeError, ValueError):
    """Settings that cannot be run, or not with what is there. The message names the setting, its
    value and what is allowed."""


class UnsupportedModel(BridgeError, ValueError):
    """The message says by how much the packed log-probabilities are off."""


class RewardFunctionUnusable(BridgeError, RuntimeError):
    """The message is what the worker said."""


class TooFewRollouts(BridgeError, RuntimeError):
    """The message counts what failed."""


class StaleRollout(BridgeError, RuntimeError):
    """The message names the versions wanted and found."""


class WeightUpdateFailed(BridgeError, RuntimeError):
    """serving: the version that the server serves; None: nothing, until a whole version has come,
    or unknown."""

    def __init__(self, message: str, serving: str | None) -> None:
        state = "serves nothing now" if serving is None else f"still serves version {serving}"
        super().__init__(f"{message} (the server {state})")
        self.serving = serving

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (str(self), self.serving))


def _rebuild(message: str, serving: str | None) -> WeightUpdateFailed:
    error = WeightUpdateFailed("", serving)
    error.args = (message,)
    return error


class CheckpointFailed(BridgeError, RuntimeError):
    """The message is the operating system's."""


class Diverged(BridgeError, RuntimeError):
    """The message gives the norm of the last gradient."""


class Interrupted(BridgeError):
    """The user stopped the run. done: how many of its steps are done, and in a checkpoint."""

    def __init__(self, message: str, *, done: int) -> None:
        super().__init__(message)
        self.done = done

    def __reduce__(self) -> tuple[object, ...]:
        return partial(type(self), done=self.done), self.args
