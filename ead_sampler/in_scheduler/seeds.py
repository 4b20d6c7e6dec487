"""A seed decides a request's tokens, whatever else is in the batch.

While no request of the batch has top_k, top_p, min_p or temperature 0, SGLang draws a seeded row by
the number of each token; otherwise by its place in the order of probabilities, so that the same
seed gives other tokens. With min_p anywhere in the batch it fails an assertion, which ends the
server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ead_sampler.in_scheduler.sampling import kept


def draw(
    original: Callable[..., Any],
    sampler: Any,
    probs: Tensor,
    info: Any,
    positions: Tensor,
    simple_sampling_case: bool,
) -> Any:
    """AROUND Sampler._sample_from_probs: what is cut away gets probability 0, and then a seeded
    batch is drawn from as one without cuts. probs: float [B, V], left as it is."""
    if info.sampling_seed is not None and not simple_sampling_case:
        probs = only_kept(probs, info.top_ks, info.top_ps, info.min_ps)
        simple_sampling_case = True
    return original(sampler, probs, info, positions, simple_sampling_case)


def only_kept(probs: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor) -> Tensor:
    """The probabilities of the tokens that each row's cuts keep, and 0: float [B, V], not
    normalised. top_ks: int [B]; top_ps, min_ps: float [B]."""
    ordered, tokens = probs.sort(dim=-1, descending=True)
    # rounded sums may exceed 1, which is no cut
    top_ps = top_ps.masked_fill(top_ps >= 1.0, torch.inf)
    ordered.mul_(kept(ordered, top_ks, top_ps, min_ps))
    return torch.zeros_like(probs).scatter_(-1, tokens, ordered)
