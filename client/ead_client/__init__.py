"""A light client for annealed rollouts: httpx, pydantic and numpy, no torch and no sglang.

with Client("http://127.0.0.1:30000") as client:
    answer = client.chat([{"role": "user", "content": "2+3?"}], annealing={"step": 0})
    print(answer.choices[0].text, answer.choices[0].rollout.temperatures)
"""

from importlib.metadata import PackageNotFoundError, version

from ead_client._async.client import AsyncClient
from ead_client._rollouts import Group, Rollouts
from ead_client._sync.client import Client
from ead_client._types import AnnealingDict, Choice, Chunk, Completion, Rollout
from ead_client.errors import (
    ApiError,
    ConnectionFailed,
    EadError,
    MalformedAnswer,
    NotSendable,
    RequestRefused,
    ScheduleIgnored,
    ServerUnavailable,
    TimedOut,
)

__all__ = [
    "AnnealingDict",
    "ApiError",
    "AsyncClient",
    "Choice",
    "Chunk",
    "Client",
    "Completion",
    "ConnectionFailed",
    "EadError",
    "Group",
    "MalformedAnswer",
    "NotSendable",
    "RequestRefused",
    "Rollout",
    "Rollouts",
    "ScheduleIgnored",
    "ServerUnavailable",
    "TimedOut",
]

try:
    __version__ = version("ead")
except PackageNotFoundError:  # a copy of the sources, which nothing has installed
    __version__ = "unknown"
