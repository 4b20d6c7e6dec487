"""What the extended SGLang process offers over HTTP.

From Python, a server is a process: `ServerProcess`. It is imported on first use, since SGLang loads
this package in every environment that has any part of ead.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ead_sampler import __version__ as __version__

if TYPE_CHECKING:
    from ead_server.errors import ServerFailed
    from ead_server.launch.process import ServerProcess

__all__ = ["ServerFailed", "ServerProcess"]


# Without a GPU, a server and a trainer share the cores, and threads that spin until the others of
# their process are done keep the other process from running: with GNU OpenMP's default a step of
# `rollout.staleness=1` takes three times as long (docs/numbers.md). OpenMP reads this when torch
# is loaded, which is after this package.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "10000"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "errors" if name == "ServerFailed" else "launch.process"
    return getattr(import_module(f"{__name__}.{module}"), name)
