"""The shape of an answer, without its values."""

from __future__ import annotations

from typing import Any


def shape(value: Any) -> str:
    """The keys of a JSON value, all the way down."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{shape(value[key])}" for key in value) + "}"
    if isinstance(value, list):
        return "[" + shape(value[0]) + "]" if value else "[]"
    return ""
