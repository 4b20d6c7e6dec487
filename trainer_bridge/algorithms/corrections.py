"""Weights for tokens that were sampled from mu and train pi, and how far the two are apart.

Legend: A = answers, N = trained tokens, packed answer after answer. mu = behaviour policy, what the
server sampled from; pi_old = the policy at the rollout's weights, at temperature 1; rho_t =
pi_old(y_t) / mu(y_t), rho_a = product of rho_t over an answer. A weight multiplies the loss of a
token.

| kind | weight of token t of answer a | source |
| --- | --- | --- |
| none | 1 | |
| tis | min(rho_t, cap): EAD's | arXiv 2510.05251 |
| mis | rho_t where rho_t <= cap, else 0 | TRL's token_mask |
| icepop | rho_t where low <= rho_t <= high, else 0 | arXiv 2510.18855 |
| sequence | min(rho_a, cap) | truncated importance sampling, Ionides 2008 |
| annealed | 1, and pi and pi_old are taken at the token's own temperature tau_t | |

What each is unbiased for, R being an answer's return and pi = pi_old (the tests of corrections
check all of it by enumerating the answers of a small policy). This is about sums over an answer's
tokens, as seq-mean-token-sum-norm takes them: to divide by sampled lengths, as the other aggregates
do, is a choice of objective that no weight undoes.

- sequence, no cap: E_mu[rho_a R sum_t grad log pi_t] is the gradient of E_pi[R]. For any loss of an
  answer, E_mu[rho_a loss] = E_pi_old[loss]. Its variance is why it is not the default: were the
  tokens independent, E_mu[rho_a^2] = (1 + chi^2)^length.
- tis, no cap: each token's term has the expectation
      E over y_<t from mu, y_t from pi of Q_mu(y_<=t) grad log pi(y_t | y_<t),
  Q_mu = the mean return when mu finishes the answer. That is the gradient of the surrogate of
  conservative policy iteration (Kakade & Langford 2002; TRPO, arXiv 1502.05477): prefix and
  continuation are mu's, only the choice at t is pi's. It is the gradient of E_pi[R] where mu = pi,
  and its bias is of first order in their distance. The product of rho up to t instead would give
  pi's prefixes, but still Q_mu: exact for advantages Q_pi(y_<=t), not for returns. A baseline that
  does not depend on the token changes no expectation.
- tis, mis and icepop with bounds: the same with pi(y_t) replaced by w(y_t) mu(y_t), so min(pi, cap
  mu) for tis. Weights stay within the bounds, so variance does; a baseline now matters.
- annealed: exactly the gradient of E_mu[R], mu being a function of the parameters: it trains the
  tempered policy itself. No weight repairs a difference between the server's mu and the trainer's,
  so a run refuses whatever else shapes mu (top_p, penalties, a grammar).
- tokens that mu cannot choose (top_p, top_k, min_p, a grammar): min(pi, cap mu) is 0 there, so
  their share of the objective is missing, whatever the cap. sequence, too, is exact only over the
  answers that mu can give.
- none: the surrogate's terms with mu in place of pi, which are the gradient of neither.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trainer_bridge.settings import Settings

COLLAPSED = 0.1  # effective sample size, or mean weight, below which a sequence weight is useless
POSITION_BUCKETS = (0, 16, 64, 256, 1024, 4096)  # first t of each; the last one is open


class CorrectionConfig(Settings):
    """How mu != pi_old is dealt with. See the table in the module's docstring."""

    kind: Literal["none", "tis", "mis", "icepop", "sequence", "annealed"] = "tis"
    cap: float = Field(2.0, ge=0, description="tis, mis, sequence: C; 0: none below e^20")
    low: float = Field(0.5, ge=0, description="icepop: smallest weight that counts")
    high: float = Field(5.0, gt=0, description="icepop: largest weight that counts")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low > self.high:
            raise ValueError("low must not be above high")
        return self

    @property
    def trained_policy(self) -> Literal["temperature 1", "tempered"]:
        """Which policy `logprobs` and `old_logprobs` must be of."""
        return "tempered" if self.kind == "annealed" else "temperature 1"


def correction_weights(
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    sequence_ids: Tensor,
    config: CorrectionConfig,
) -> Tensor:
    """The module's table: float [N], detached.

    old_logprobs, behaviour_logprobs: float [N], log pi_old and log mu. sequence_ids: int [N]; for
    sequence every answer must be whole. Rejected tokens keep their place in the aggregate: their
    weight is 0, and the others' does not grow.
    """
    _, log_weights = _log_weights(old_logprobs, behaviour_logprobs, sequence_ids, config)
    return log_weights.exp()


@torch.no_grad()
def correction_metrics(
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    sequence_ids: Tensor,
    config: CorrectionConfig,
    *,
    entropies: Tensor | None = None,
) -> dict[str, float]:
    """Statistics of one batch, N > 0.

    effective_sample_size  (sum w)^2 / (count * sum w^2), in [0, 1]; 0 if all weights are 0
    weight_mean, weight_max
    weight_capped          share whose ratio was outside the bounds
    kl                     KL(mu || pi_old) per token, nats, as the mean of log mu - log pi_old:
                           unbiased, and in a sample it may be negative
    kl/0-15, ...           the same by position in the answer, counted in trained tokens
    entropy/0-15, ...      mean of `entropies` (float [N], nats) by position, if given

    A bucket without tokens is absent. For sequence the first four count answers, not tokens; when
    they show weights that have collapsed, a RuntimeWarning says so once per process.
    """
    ratios, weights = _log_weights(old_logprobs, behaviour_logprobs, sequence_ids, config)
    positions, firsts = _positions(sequence_ids)
    if config.kind == "sequence":
        ratios, weights = ratios[firsts], weights[firsts]
    scaled = (weights - weights.max()).exp()  # weights of 1e-76 have a sample size too
    size = scaled.sum() ** 2 / (len(scaled) * scaled.square().sum())
    kl = behaviour_logprobs - old_logprobs
    metrics = {
        "effective_sample_size": size.nan_to_num(0.0),
        "weight_mean": weights.exp().mean(),
        "weight_max": weights.max().exp(),
        "weight_capped": (weights != ratios).float().mean(),
        "kl": kl.mean(),
    }
    for start, stop in zip(POSITION_BUCKETS, (*POSITION_BUCKETS[1:], None), strict=True):
        inside = (positions >= start) & (positions < (math.inf if stop is None else stop))
        if inside.any():
            name = f"{start}-" if stop is None else f"{start}-{stop - 1}"
            metrics[f"kl/{name}"] = kl[inside].mean()
            if entropies is not None:
                metrics[f"entropy/{name}"] = entropies[inside].mean()
    result = {name: value.item() for name, value in metrics.items()}
    if config.kind == "sequence" and (
        min(result["effective_sample_size"], result["weight_mean"]) < COLLAPSED
    ):
        warnings.warn(
            "The sequence-level weights have collapsed: a few answers carry the update, or none "
            "does. On long annealed answers use the token-level 'tis'.",
            RuntimeWarning,
            stacklevel=2,
        )
    return result


def _log_weights(
    old_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    sequence_ids: Tensor,
    config: CorrectionConfig,
) -> tuple[Tensor, Tensor]:
    """The logarithms of the weight before its bounds, and after them: float [N] each.

    Products over long answers leave the range of floats; their logarithms do not.
    """
    ratios = (old_logprobs - behaviour_logprobs).detach()
    log_cap = math.log(config.cap) if config.cap else 20.0  # e^20 squared is finite in float32
    match config.kind:
        case "none" | "annealed":
            return torch.zeros_like(ratios), torch.zeros_like(ratios)
        case "tis":
            return ratios, ratios.clamp(max=log_cap)
        case "mis":
            return ratios, ratios.masked_fill(ratios > log_cap, -math.inf)
        case "icepop":
            low = math.log(config.low) if config.low else -math.inf
            outside = (ratios < low) | (ratios > math.log(config.high))
            return ratios, ratios.masked_fill(outside, -math.inf)
        case "sequence":
            _, answers, lengths = sequence_ids.unique(return_inverse=True, return_counts=True)
            sums = ratios.new_zeros(len(lengths)).index_add(0, answers, ratios)
            return sums[answers], sums[answers].clamp(max=log_cap)


def _positions(sequence_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each token in its answer: int [N], and of each answer's first token: int [A]."""
    _, answers, lengths = sequence_ids.unique_consecutive(return_inverse=True, return_counts=True)
    firsts = lengths.cumsum(0) - lengths
    return torch.arange(len(sequence_ids), device=sequence_ids.device) - firsts[answers], firsts
