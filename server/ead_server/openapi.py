"""The description of the API (/openapi.json): true for our routes, and for the edge of all.

FastAPI describes what it reads and checks itself. Added here: bodies and answers that are read and
written by hand, our fields on SGLang's routes, the keys, and the refusals of the guard, which
stands before every route.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, TypeAdapter
from typing_extensions import TypedDict

from ead_sampler.schedules import DEFAULT_SCHEDULE, REGISTRY, Segment
from ead_server import settings
from ead_server.edge.keys import ADMIN_ROUTES, OPEN
from ead_server.json_types import Json
from ead_server.media_types import FRAMES, JSON, NDJSON, SAFETENSORS
from ead_server.rollouts.request import RolloutRequest

_CLOSED = ConfigDict(extra="forbid")


class Error(TypedDict):
    """OpenAI's error object."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    message: str
    type: str
    param: str | None
    code: int | str | None


class ErrorBody(TypedDict):
    """A request that was refused, or failed."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    error: Error


class RolloutAnswer(TypedDict):
    """One answer; of one that failed, index and error alone."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    index: int
    error: Error | None
    text: NotRequired[str | None]
    token_ids: NotRequired[list[int]]
    temperatures: NotRequired[list[float]]
    logprobs: NotRequired[list[float]]
    model_logprobs: NotRequired[list[float]]
    entropies: NotRequired[list[float]]
    finish_reason: NotRequired[str | None]
    weight_version: NotRequired[str | None]
    weight_versions: NotRequired[list[Json] | None]
    cached_tokens: NotRequired[int]


class RolloutGroup(TypedDict):
    """The answers to one prompt."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    object: Literal["rollouts.group"]
    index: int
    metadata: Any
    error: Error | None
    annealing: Json | None
    sampling: Json | None
    prompt_token_ids: list[int]
    answers: list[RolloutAnswer]


class Usage(TypedDict):
    """Tokens, in all."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Rollouts(TypedDict):
    """All groups, in the order of the prompts."""

    __pydantic_config__ = _CLOSED  # type: ignore[misc]
    object: Literal["rollouts"]
    id: str
    created: int
    model: str
    groups: list[RolloutGroup]
    usage: Usage


def complete(schema: Json, admin_paths: Set[str]) -> None:
    """Add to FastAPI's description what it lacks. admin_paths: what SGLang marks as such."""
    schemas = schema["components"]["schemas"]
    for model in (*REGISTRY.values(), RolloutRequest, ErrorBody, Rollouts):
        schemas.update(_schemas(model))
    for name, kind in REGISTRY.items():
        if name != DEFAULT_SCHEDULE:
            schemas[kind.__name__].setdefault("required", []).append("schedule")
    kinds = [{"$ref": f"{_AT}{kind.__name__}"} for kind in REGISTRY.values()]
    without_state = [
        {"$ref": f"{_AT}{kind.__name__}"} for kind in REGISTRY.values() if not kind.has_state
    ]
    parts = schemas[Segment.__name__]["properties"]
    parts["thinking"] = {"anyOf": without_state, "description": parts["thinking"]["description"]}
    parts["answer"]["anyOf"] = [*without_state, {"type": "null"}]
    current = settings.current()
    if current is not None:
        for name in ("RolloutRequest", "Prompt"):
            number = schemas[name]["properties"]["n"]
            for choice in number.get("anyOf", [number]):
                if choice.get("type") == "integer":
                    choice["maximum"] = current.max_n
    schemas["Annealing"] = {"anyOf": kinds, "description": "a temperature schedule"}
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        schemas[name]["properties"].update(annealing=_ANNEALING, rollout=_ROLLOUT)
    for name in ("RolloutRequest", "DefaultsSetting"):
        schemas[name]["properties"]["annealing"].update(anyOf=_ANNEALING["anyOf"])
    schemas.update(_sampling_params())
    schemas["RolloutRequest"]["properties"]["sampling_params"].update(
        {"$ref": f"{_AT}SamplingParams"}
    )
    schema["paths"]["/v1/rollouts"]["post"].update(_ROLLOUTS)
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            admin = path in admin_paths or (method.upper(), path) in ADMIN_ROUTES
            _add_refusals(operation, path, method, admin=admin)


_OURS = (
    "/v1/annealing",
    "/v1/annealing/step",
    "/v1/annealing/schema",
    "/v1/annealing/preview",
    "/v1/rollouts",
)
_AT = "#/components/schemas/"
_ANNEALING = {
    "anyOf": [{"$ref": f"{_AT}Annealing"}, {"type": "null"}],
    "description": "The schedule; absent: the server's default; null: none.",
}
_ROLLOUT = {
    "anyOf": [
        {"type": "boolean"},
        {"type": "object", "properties": {"entropies": {"type": "boolean"}}},
        {"type": "null"},
    ],
    "description": "Return the arrays of each token: true also without a schedule.",
}
_ERROR = {"content": {JSON: {"schema": {"$ref": f"{_AT}ErrorBody"}}}}
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_ROLLOUTS: Json = {
    "parameters": [
        {
            "name": "Idempotency-Key",
            "in": "header",
            "description": "the same call made again finds the work of the first",
            "schema": {"type": "string", "minLength": 1, "maxLength": 200},
        }
    ],
    "requestBody": {
        "required": True,
        "content": {JSON: {"schema": {"$ref": f"{_AT}RolloutRequest"}}},
    },
    "responses": {
        "200": {
            "description": "as `Accept` says",
            "content": {
                JSON: {"schema": {"$ref": f"{_AT}Rollouts"}},
                NDJSON: {"schema": {"$ref": f"{_AT}RolloutGroup"}},
                SAFETENSORS: _BINARY,
                FRAMES: _BINARY,
            },
        },
        "422": {
            "description": "the Idempotency-Key was used before, with another request",
            **_ERROR,
        },
        "429": {"description": "as many jobs with a key as are kept are running", **_ERROR},
    },
}


def _sampling_params() -> Json:
    """SGLang's, as /v1/rollouts takes them: `n` is a field of the request."""
    import msgspec
    from sglang.api.v1.api_types import SamplingParams
    from sglang.srt.sampling import sampling_params

    _, schemas = msgspec.json.schema_components([SamplingParams], ref_template=_AT + "{name}")
    for schema in schemas.values():
        schema["additionalProperties"] = False
    taken = set(sampling_params.SamplingParams.__struct_fields__) - {"n"}
    known = schemas["SamplingParams"]["properties"]
    schemas["SamplingParams"]["properties"] = {k: v for k, v in known.items() if k in taken}
    return schemas


def _schemas(model: Any) -> Json:
    """JSON Schemas by name: the model's and those that it names."""
    described = TypeAdapter(model).json_schema(ref_template=_AT + "{model}")
    return {**described.pop("$defs", {}), model.__name__: described}


def _add_refusals(operation: Json, path: str, method: str, *, admin: bool) -> None:
    """What the guard, and SGLang's handler of bad values, answer on this route."""
    responses, ours = operation["responses"], path in _OURS
    if path not in ("/v1/systemone", "/v1/rollouts"):
        responses.pop("422", None)  # FastAPI's own description; SGLang answers 400
    if path in OPEN:
        responses.setdefault("503", {"description": "not ready"})
        return
    refused = {"description": "malformed, or a value is out of range"}
    responses["400"] = {**refused, **_ERROR} if ours else refused  # SGLang has its own shapes
    refusals = {"401": "the key is missing or wrong", "431": "URL and headers are too large"}
    if admin:
        refusals["403"] = "closed on this server"
    if method != "get":
        refusals.update({"413": "the body is too large", "503": "the server is shutting down"})
    for status, description in refusals.items():
        responses.setdefault(status, {"description": description, **_ERROR})
    operation["security"] = [{"key": []}]
