"""A seed of its own for each answer of a request."""

from __future__ import annotations

import dataclasses
from typing import Any

# What SGLang takes for a request without one under --enable-deterministic-inference, where answers
# to one prompt would otherwise be copies of each other.
SEED = 42


def seed_each_answer(obj: Any, default: int | None = None) -> list[dict[str, Any]] | None:
    """Give each answer of a seeded request a seed of its own, which counts up from the request's.

    SGLang gives all of them the same one, and so n copies of one answer. A request for n becomes
    one for n prompts, in the order that SGLang's answers have. Prompt by prompt, if the request
    has parameters (and seeds) for each. default: of requests without one. Returns the parameters
    of all, or None if nothing changed.
    """
    own = isinstance(obj.sampling_params, list)
    each = obj.sampling_params if own else [obj.sampling_params or {}]
    seeds = [p.get("sampling_seed") for p in each]
    seeds = [default if seed is None else seed for seed in seeds]
    name = "text" if obj.text is not None else "input_ids"
    prompts = getattr(obj, name)
    several = isinstance(prompts, list) and not (prompts and isinstance(prompts[0], int))
    n = each[0].get("n") or 1
    if not prompts or not any(type(seed) is int for seed in seeds):
        return None
    if (n == 1 and (own or not several)) or any((p.get("n") or 1) != n for p in each):
        return None
    prompts = prompts if several else [prompts]
    params = []
    for number in range(len(prompts)):
        base, seed = (each[number], seeds[number]) if own else (each[0], seeds[0])
        for sample in range(n):
            place = sample if own else number * n + sample
            params.append({**base, "n": 1, "sampling_seed": _counted_up(seed, place)})
    for field in dataclasses.fields(obj):
        value = prompts if field.name == name else getattr(obj, field.name)
        if field.name == name or (several and _of_each_prompt(field.name, value, len(prompts))):
            setattr(obj, field.name, [item for item in value for _ in range(n)])
    obj.sampling_params = params
    return params


def _counted_up(seed: int | None, by: int) -> int | None:
    """Within 64 bits, from the highest on to the lowest."""
    return seed if type(seed) is not int else (seed + by + 2**63) % 2**64 - 2**63


def _of_each_prompt(name: str, value: object, num_prompts: int) -> bool:
    if not isinstance(value, list) or len(value) != num_prompts:
        return False
    return name != "token_ids_logprob" or not isinstance(value[0], int)  # these are for all
