"""What a server, as it was started, cannot do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from ead_sampler.names import ANNEALING, ROLLOUT
from ead_sampler.schedules import FieldError


def check_server_mode(asked_for: Mapping[str, Any]) -> None:
    """Refuse a schedule or rollout in server modes that cannot honour it. Raises FieldError.

    asked_for: custom_params, or anything else that has `annealing` if a schedule is asked for.
    """
    from sglang.srt.runtime_context import get_server_args

    reason = unsupported_mode(get_server_args(), os.environ)
    if reason is not None:
        field = ROLLOUT if asked_for.get(ANNEALING) is None else ANNEALING
        raise FieldError(field, f"this server cannot honour it: {reason}")


def check_generates(manager: Any) -> None:
    """Refuse to generate on a server that embeds: its scheduler would die of it.

    manager: SGLang's TokenizerManager. Raises FieldError.
    """
    if not manager.is_generation:
        raise FieldError("model", "does not generate on this server, it embeds")


def unsupported_mode(server_args: Any, environ: Mapping[str, str]) -> str | None:
    """Why a server started like this cannot anneal, or None. See DESIGN.md, "refused"."""
    if server_args.speculative_algorithm is not None:
        return "speculative decoding samples outside the sampler (--speculative-algorithm)"
    if server_args.dllm_algorithm is not None:
        return "diffusion language models have their own sampler (--dllm-algorithm)"
    if server_args.disaggregation_mode not in (None, "null"):
        return "the first token is sampled by another server (--disaggregation-mode)"
    if server_args.pp_size > 1:
        return "recorded values do not cross pipeline stages (--pp-size)"
    if server_args.enable_pdmux:
        return "two streams sample at a time (--enable-pdmux)"
    if server_args.rl_on_policy_target is not None:
        return "--rl-on-policy-target computes its own bfloat16 log-probabilities"
    backend = server_args.sampling_backend
    if backend is not None and backend not in SAMPLING_BACKENDS:
        return f"the {backend} sampling backend hides its probabilities (--sampling-backend)"
    if environ.get("SGLANG_RETURN_ORIGINAL_LOGPROB", "").lower() in ("1", "true", "yes"):
        return "SGLANG_RETURN_ORIGINAL_LOGPROB reports log-probabilities at temperature 1"
    return None


class SamplingBackend(NamedTuple):
    """What SGLang's Sampler._sample_from_probs does in one of its ways."""

    # takes seeds without deterministic mode, to which SGLang itself confines them
    takes_seeds: bool
    # with min_p, top_p counts within what top_k left, rather than within the whole vocabulary
    renormalises: bool


SAMPLING_BACKENDS = {
    "pytorch": SamplingBackend(takes_seeds=True, renormalises=False),
    "flashinfer": SamplingBackend(takes_seeds=False, renormalises=True),
    "intel_xpu": SamplingBackend(takes_seeds=False, renormalises=True),
}


def honours_seeds(sampling_backend: str | None, *, deterministic: bool = False) -> bool:
    """Whether a request's `sampling_seed` decides its tokens."""
    backend = SAMPLING_BACKENDS.get(sampling_backend or "")
    return deterministic or (backend is not None and backend.takes_seeds)
