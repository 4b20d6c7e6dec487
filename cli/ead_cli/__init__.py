"""The `ead` command line."""

# what ead_server sets for OpenMP must be there before torch is loaded
from ead_server import __version__ as __version__

__all__: list[str] = []  # a command, not a library
