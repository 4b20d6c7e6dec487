"""Bodies of SGLang's routes: checking stops at the first mistake, and never fails itself.

Pydantic goes on to collect every mistake, and SGLang's models make fourteen of each odd part of a
message: 400 kB of them held the event loop for half a minute and took 6 GB. Here each list ends at
its first, and dicts of typed values have a bound. What SGLang's own validators raise on types that
they did not expect is a mistake too, instead of an error of the server. And null says nothing where
OpenAI's API allows it: a field with a default that is not null itself takes its default.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticUseDefault, SchemaValidator, ValidationError

from ead_sampler.schedules import with_integers
from ead_server.asgi import all_routes

MAX_ENTRIES = 10_000  # of a dict whose values have a type


def stop_at_first_mistake(routes: Iterable[Any]) -> None:
    """Rebuild the validators of the routes' bodies."""
    for route in all_routes(routes):
        if isinstance(route, APIRoute):
            for field in route.dependant.body_params:
                adapter: Any = field._type_adapter
                adapter.validator = _Validator(adapter)


def validator_of(model: type[BaseModel]) -> SchemaValidator:
    """Of one of SGLang's models, for bodies that no route reads. Raises pydantic's ValidationError
    for the first mistake, and whatever SGLang's own validators raise."""
    return SchemaValidator(_stopping(model.__pydantic_core_schema__), _use_prebuilt=False)


class FewKeys(BaseModel):
    """Unknown keys are refused, and not each by itself where there are millions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _count(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and len(raw) > 100:
            raise ValueError("has too many keys")
        return with_integers(cls, raw)


class _Validator:
    """In place of a TypeAdapter's own."""

    def __init__(self, adapter: Any) -> None:
        # prebuilt: those of the models inside, as they were
        self._validator = SchemaValidator(
            _stopping(adapter.core_schema), adapter._config, _use_prebuilt=False
        )

    def validate_python(self, value: Any, **options: Any) -> Any:
        try:
            return self._validator.validate_python(value, **options)
        except ValidationError:
            raise
        except Exception as error:
            mistake = {"type": "value_error", "loc": ("body",), "input": value}
            mistake["msg"] = "some value in it has the wrong type"
            raise RequestValidationError([mistake]) from error


def _stopping(schema: Any) -> Any:
    """A core schema whose lists fail fast."""
    if isinstance(schema, list):
        return [_stopping(part) for part in schema]
    if isinstance(schema, tuple):
        return tuple(_stopping(part) for part in schema)
    if not isinstance(schema, dict):
        return schema
    changed = {
        key: part if key in ("metadata", "default", "serialization") else _stopping(part)
        for key, part in schema.items()
    }
    if changed.get("type") == "default" and not _takes_null(changed):
        function = {"type": "no-info", "function": _null_is_absent}
        inner = {"type": "function-before", "function": function, "schema": changed["schema"]}
        return {**changed, "schema": inner}
    if changed.get("type") in _LISTS:
        return {**changed, "fail_fast": True}
    if changed.get("type") == "dict" and changed.get("values_schema", _ANY) != _ANY:
        function = {"type": "no-info", "function": _check_entries}
        return {"type": "function-before", "function": function, "schema": changed}
    return changed


def _takes_null(schema: Any) -> bool:
    """Whether null is a value of its own; not told by references and functions, which are left."""
    kind = schema.get("type")
    if kind == "default":
        return "default" not in schema or _takes_null(schema["schema"])
    if kind == "union":
        choices = (c[0] if isinstance(c, tuple) else c for c in schema["choices"])
        return any(map(_takes_null, choices))
    if kind == "function-after":
        return _takes_null(schema["schema"])
    if kind == "literal":
        return None in schema["expected"]
    return kind not in _NEVER_NULL


_NEVER_NULL = ("int", "float", "bool", "str", "list", "dict")


def _null_is_absent(value: Any) -> Any:
    if value is None:
        raise PydanticUseDefault
    return value


_ANY = {"type": "any"}
_LISTS = ("list", "tuple", "set", "frozenset", "generator")


def _check_entries(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_ENTRIES:
        raise ValueError(f"must have at most {MAX_ENTRIES:,} entries, got {len(value):,}")
    return value
