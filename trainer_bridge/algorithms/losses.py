"""The loss of every trained token, and the weights that make one number of them.

Legend: A = answers of a batch, N = trained tokens, packed answer after answer. pi = policy now
(`logprobs`, with gradient), pi_old = policy at the rollout's weights (`old_logprobs`), r_t =
pi(y_t) / pi_old(y_t), A_t = advantage of a token. That mu, which sampled the tokens, is not pi_old
is corrected by `trainer_bridge.algorithms.corrections`. An update is

    per_token, clipped = policy_loss(...)
    per_token = correction_weights(...) * (per_token + regularisation(...))
    loss = (aggregation_weights(...) * per_token).sum() + selective_entropy_loss(...)

Advantages are given per token, so that a method of token credit is one multiplication of them. All
weights and selections are computed once for the whole batch and then sliced, so that gradients
accumulated over micro-batches are those of the whole, to rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer_bridge.algorithms.loss_config import (
    Aggregation,
    BaseLossConfig,
    BoundedLossConfig,
    CispoLossConfig,
    ClipCovLossConfig,
    ClipLossConfig,
    GspoLossConfig,
    KlCovLossConfig,
    KlEstimator,
    LossConfig,
)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequence_ids: Tensor,
    config: LossConfig,
    *,
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of each token, and whether clipping touched it: float [N], bool [N].

    Each kind's function below says its formula, with b(r) = min(max(r, 1 - clip_low),
    1 + clip_high) and sg = no gradient through. They are given log_ratio = log r, float [N] with
    gradient, advantages without gradient, and return the same. `clipped` is where the loss's
    gradient is 0 because of a bound or a selection; for cispo, where a bound holds, and the
    gradient is that of the bounded weight.

    logprobs: float [N], with gradient. old_logprobs, advantages: float [N], taken as constants.
    sequence_ids: int [N], which answer a token belongs to: for gspo every answer must be whole.
    selected: bool [N] from `covariance_tokens`; clip_cov and kl_cov raise ValueError without it.
    """
    advantages = advantages.detach()
    log_ratio = logprobs - old_logprobs.detach()
    match config:
        case ClipLossConfig():
            return clip_loss(log_ratio, advantages, config)
        case CispoLossConfig():
            return cispo_loss(logprobs, log_ratio, advantages, config)
        case GspoLossConfig():
            return gspo_loss(logprobs, log_ratio, advantages, sequence_ids, config)
    if selected is None:
        raise ValueError(f"{config.kind} needs selected=covariance_tokens(...)")
    if isinstance(config, ClipCovLossConfig):
        return clip_cov_loss(log_ratio, advantages, selected, config)
    return kl_cov_loss(log_ratio, advantages, selected, config)


def clip_loss(
    log_ratio: Tensor, advantages: Tensor, config: ClipLossConfig
) -> tuple[Tensor, Tensor]:
    """-min(r A, b(r) A) (PPO, arXiv 1707.06347; unequal bounds: DAPO, 2503.14476), and for A < 0 at
    most -dual_clip * A (arXiv 1912.09729)."""
    loss, clipped = _bounded_loss(_ratio(log_ratio), advantages, config)
    if config.dual_clip:
        highest = -config.dual_clip * advantages
        above = (advantages < 0) & (loss > highest)
        loss, clipped = torch.where(above, highest, loss), clipped | above
    return loss, clipped


def cispo_loss(
    logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, config: CispoLossConfig
) -> tuple[Tensor, Tensor]:
    """-sg(b(r)) A log pi (arXiv 2506.13585): no token loses its gradient."""
    ratio = _ratio(log_ratio)
    bounded = _bounded(ratio, config)
    return -bounded.detach() * advantages * logprobs, bounded != ratio


def gspo_loss(
    logprobs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    sequence_ids: Tensor,
    config: GspoLossConfig,
) -> tuple[Tensor, Tensor]:
    """-min(s A, b(s) A), s = sg(s_a) pi / sg(pi), with s_a = exp(mean of log r over the answer).

    s has the value of s_a, and each token its own advantage (GSPO-token, arXiv 2507.18071). With
    equal advantages within an answer and seq-mean-token-mean, value and gradient are those of the
    mean over answers of -min(s_a A, b(s_a) A).
    """
    _, answers, lengths = sequence_ids.unique(return_inverse=True, return_counts=True)
    sums = log_ratio.detach().new_zeros(len(lengths)).index_add(0, answers, log_ratio.detach())
    log_ratio = (sums / lengths)[answers] + logprobs - logprobs.detach()
    return _bounded_loss(_ratio(log_ratio), advantages, config)


def clip_cov_loss(
    log_ratio: Tensor, advantages: Tensor, selected: Tensor, config: ClipCovLossConfig
) -> tuple[Tensor, Tensor]:
    """-min(r A, b(r) A), and 0 for the selected tokens (arXiv 2505.22617)."""
    loss, clipped = _bounded_loss(_ratio(log_ratio), advantages, config)
    return loss * ~selected, clipped | selected


def kl_cov_loss(
    log_ratio: Tensor, advantages: Tensor, selected: Tensor, config: KlCovLossConfig
) -> tuple[Tensor, Tensor]:
    """-r A, plus kl_cov_coefficient * |log r| for the selected tokens, where the paper (arXiv
    2505.22617) writes KL(pi_old || pi): this is its authors' code."""
    penalty = config.kl_cov_coefficient * log_ratio.abs() * selected
    return penalty - _ratio(log_ratio) * advantages, torch.zeros_like(selected)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-20.0, 20.0).exp()  # e^20 is far beyond any bound, and finite


def _bounded(ratio: Tensor, bounds: BoundedLossConfig) -> Tensor:
    return ratio.clamp(1 - bounds.clip_low, 1 + bounds.clip_high)


def _bounded_loss(
    ratio: Tensor, advantages: Tensor, bounds: BoundedLossConfig
) -> tuple[Tensor, Tensor]:
    """-min(r A, b(r) A), and where the bound holds."""
    bounded = _bounded(ratio, bounds)
    loss = torch.maximum(-ratio * advantages, -bounded * advantages)
    return loss, bounded * advantages < ratio * advantages


def covariance_tokens(
    logprobs: Tensor,
    advantages: Tensor,
    config: LossConfig,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The tokens that Clip-Cov or KL-Cov treats apart (arXiv 2505.22617): bool [N].

    cov_t = (log pi(y_t) - mean) (A_t - mean), means over the tokens given, is what a token
    contributes to the fall of the entropy. kl_cov selects the covariance_share * N tokens of
    highest cov, clip_cov as many at random among those with covariance_low < cov < covariance_high
    (fewer if there are fewer); at least one. All False for other kinds.

    Give the whole batch, with old_logprobs: a choice per micro-batch, as verl's, selects at least
    one token in each. logprobs, advantages: float [N]. generator: on the CPU, for clip_cov.
    """
    selected = torch.zeros_like(logprobs, dtype=torch.bool)
    if not isinstance(config, ClipCovLossConfig | KlCovLossConfig) or len(logprobs) == 0:
        return selected
    logprobs, advantages = logprobs.detach(), advantages.detach()
    covariances = (logprobs - logprobs.mean()) * (advantages - advantages.mean())
    count = max(int(config.covariance_share * len(covariances)), 1)
    if isinstance(config, KlCovLossConfig):
        selected[covariances.topk(count).indices] = True
    else:
        inside = (covariances > config.covariance_low) & (covariances < config.covariance_high)
        candidates = inside.nonzero().squeeze(1)
        order = torch.randperm(len(candidates), generator=generator)[:count]
        selected[candidates[order.to(candidates.device)]] = True
    return selected


def aggregation_weights(
    sequence_ids: Tensor, how: Aggregation, *, max_tokens: int | None = None
) -> Tensor:
    """Weights with which the sum over tokens is the aggregate: float32 [N].

    token-mean               1 / N                 every token alike (DAPO, arXiv 2503.14476)
    seq-mean-token-mean      1 / (A * length)      every answer alike (GRPO, arXiv 2402.03300)
    seq-mean-token-sum-norm  1 / (A * max_tokens)  no bias for length (Dr. GRPO, arXiv 2503.20783)

    sequence_ids: int [N] of the whole batch, all micro-batches and ranks; A counts the answers
    there. Where gradients are averaged over ranks, multiply the loss by their number. max_tokens:
    a constant of the run, such as the longest answer allowed; seq-mean-token-sum-norm raises
    ValueError without it.
    """
    _, answers, lengths = sequence_ids.unique(return_inverse=True, return_counts=True)
    match how:
        case "token-mean":
            divisors = torch.full_like(answers, len(answers))
        case "seq-mean-token-mean":
            divisors = len(lengths) * lengths[answers]
        case "seq-mean-token-sum-norm":
            if max_tokens is None:
                raise ValueError("seq-mean-token-sum-norm needs max_tokens")
            divisors = torch.full_like(answers, len(lengths) * max_tokens)
    return 1.0 / divisors.float()


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, kind: KlEstimator) -> Tensor:
    """An estimate of KL(pi || reference) from each token sampled from pi: float [N], nats.

    With d = log pi(y_t) - log reference(y_t) (Schulman 2020, joschu.net/blog/kl-approx.html):
    k1 = d                 unbiased
    k2 = d^2 / 2           biased, small where the policies are close
    k3 = exp(-d) - 1 + d   unbiased, never negative, low variance where they are close

    The expected gradient, over tokens from pi (tokens from mu need their correction weights), is
    in the loss: for k2 that of KL(pi || reference), for k3 that of KL(reference || pi), for k1 0,
    and in no single token does k1's depend on the reference;
    in the reward, detached and times the gradient of log pi: for k1 that of KL(pi || reference),
    for k2 and k3 that of neither direction.
    """
    difference = logprobs - reference_logprobs.detach()
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    # beyond 20 nats the tangent: finite, and still with a slope towards the reference
    beyond = (-difference - 20.0).clamp(min=0.0)
    return (-difference).clamp(max=20.0).exp() + math.exp(20.0) * beyond - 1 + difference


def kl_penalties(
    logprobs: Tensor, reference_logprobs: Tensor, sequence_ids: Tensor, config: BaseLossConfig
) -> Tensor:
    """What to subtract from each answer's reward with kl_in="reward": float [A], detached.

    kl_coefficient times the sum of `kl_estimate` over the answer's tokens. sequence_ids: int [N],
    0, 1, ..., A - 1, each present.
    """
    estimate = kl_estimate(logprobs.detach(), reference_logprobs, config.kl_estimator)
    count = int(sequence_ids.max()) + 1
    return config.kl_coefficient * estimate.new_zeros(count).index_add(0, sequence_ids, estimate)


def regularisation(
    logprobs: Tensor,
    entropies: Tensor,
    config: BaseLossConfig,
    reference_logprobs: Tensor | None = None,
) -> Tensor:
    """What a token's loss gains beside the policy's: float [N].

    kl_coefficient * kl_estimate (with kl_in="loss") - entropy_coefficient * entropy of pi.
    logprobs, entropies: float [N], with gradient; nats. reference_logprobs: float [N]; ValueError
    where it is needed and absent.
    """
    result = -config.entropy_coefficient * entropies
    if config.kl_coefficient and config.kl_in == "loss":
        if reference_logprobs is None:
            raise ValueError("kl_coefficient needs the reference's log-probabilities")
        kl = kl_estimate(logprobs, reference_logprobs, config.kl_estimator)
        return config.kl_coefficient * kl + result
    return result


def peak_entropy(entropies: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Mean entropy of the peaks, and the entropy from which a token is one: two scalars, detached.

    Peaks are the tokens whose entropy is at least the quantile. entropies: float [N], nats. The
    mean at the first step of a run is SIREN's anchor.
    """
    entropies = entropies.detach()
    # the sample at or above the quantile; torch.quantile refuses more than 16 million tokens
    threshold = entropies.kthvalue(math.ceil(quantile * (len(entropies) - 1)) + 1).values
    return entropies[entropies >= threshold].mean(), threshold


def selective_entropy_loss(
    entropies: Tensor, anchor: float, config: BaseLossConfig, *, batch: Tensor | None = None
) -> Tensor:
    """SIREN's regulariser (arXiv 2509.25133): a scalar to be added to the loss.

        selective_entropy_coefficient * (mean of `peak_entropy` - anchor)^2

    SIREN takes the entropy within the 0.8 nucleus of each distribution; here it is whatever is
    given, and `trainer_bridge.algorithms.logprobs` gives that of the whole vocabulary.

    batch: the entropies of the whole batch under pi_old, when `entropies` are of a micro-batch.
    Threshold, mean and number of peaks are then the batch's, and values and gradients of the
    micro-batches add up to the batch's, exactly while pi is pi_old. None: `entropies` are all.
    """
    batch = entropies if batch is None else batch
    mean, threshold = peak_entropy(batch, config.selective_entropy_quantile)
    peaks = entropies[entropies >= threshold]
    # the square's tangent: the value of one micro-batch's share of it, with its gradient
    tangent = (mean - anchor) ** 2 + 2 * (mean - anchor) * (peaks - peaks.detach())
    return config.selective_entropy_coefficient * tangent.sum() / (batch >= threshold).sum()
