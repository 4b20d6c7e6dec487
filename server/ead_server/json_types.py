"""Names for what JSON holds."""

from typing import Any

Json = dict[str, Any]  # an object
