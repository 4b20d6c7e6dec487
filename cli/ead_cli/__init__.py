"""The `ead` command line."""

import ead_server  # noqa: F401  (what it sets for OpenMP must be there before torch is loaded)

__all__: list[str] = []  # a command, not a library
