"""log pi of given tokens, and the entropy of pi, from hidden states and the LM head in one pass.

N tokens, H hidden size, V vocabulary (of this rank, where the head is sharded). The logits [N, V]
never exist: a tile of them is made, reduced to a few numbers per token and dropped, and made again
in the backward pass, for one product of matrices more than keeping them would cost. A few tiles are
kept, where gradients are wanted, for less of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tokens and vocabulary entries of a tile. Large, since a CPU's threads wait for each other after
# every operation on one, long where the cores are shared, and a GPU wants few launches. A CPU's is
# 16 MiB: from 32 MiB on, malloc returns memory to the system after every use, to fault it in again.
CPU_TILE = (1024, 4096)
GPU_TILE = (2048, 8192)
# One tile in so many is kept for the backward pass: 2 % less time for 0.04 of the memory that whole
# logits, their softmax and its gradient take.
KEPT = 12


class TokenLogprobs(NamedTuple):
    """All float32 [N] (float64 of float64 inputs), with gradients."""

    logprobs: Tensor  # log pi of the target at temperature 1
    tempered: Tensor  # log pi of the target at tau; `logprobs` itself where no tau was given
    entropies: Tensor  # of pi at temperature 1, nats


@dataclass(frozen=True)
class VocabShard:
    """This rank holds the head's rows start, start + 1, ..., as many as `weight` has.

    Every rank of the group calls with the same hidden states and targets, gets the same results and
    goes backward from the same loss.
    """

    start: int
    group: dist.ProcessGroup


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperatures: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    shard: VocabShard | None = None,
) -> TokenLogprobs:
    """log pi of each target at temperature 1 and at its own temperature, and the entropy of pi.

    pi at temperature tau is softmax(z / tau) of the logits z = scale * (hidden @ weight.T + bias),
    with a softcap softcap * tanh(z / softcap). Gemma calls it final_logit_softcapping; scale is
    Cohere's logit_scale, and one over Granite's logits_scaling.

    hidden [N, H], weight [V, H] and bias [V] have one floating dtype and get gradients; what is
    shorter than float32 is summed up in float32. targets: int64 [N], ids in the whole vocabulary.
    temperatures: [N], positive and finite, without a gradient.

    Raises ValueError for arguments that do not fit. The values of tensors are looked at on a CPU
    only, since another device would have to be waited for. Unseen, a target that no rank's head has
    gives NaN log-probabilities, and a temperature that is not positive a NaN tempered one.
    """
    _check(hidden, weight, targets, bias, temperatures)
    for name, number in (("scale", scale), ("softcap", softcap)):
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {number}")
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(targets, None if shard else len(weight), temperatures)
    inverse = None
    if temperatures is not None:
        tau = temperatures.to(_wide(hidden))
        inverse = torch.where(tau > 0, tau.reciprocal(), math.nan)
    trained = torch.is_grad_enabled() and any(
        one is not None and one.requires_grad for one in (hidden, weight, bias)
    )
    keep = len(_slices(hidden, 0)) * len(_slices(weight, 1)) // KEPT if trained else 0
    logprobs, tempered, entropies = _LinearLogprobs.apply(
        hidden, weight, bias, targets, inverse, softcap, scale, shard, keep
    )
    return TokenLogprobs(logprobs, logprobs if tempered is None else tempered, entropies)


class _LinearLogprobs(torch.autograd.Function):
    """inverse: 1 / temperatures; without it the second result is None. keep: so many tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        inverse: Tensor | None,
        softcap: float | None,
        scale: float,
        shard: VocabShard | None,
        keep: int,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        columns = targets - (shard.start if shard else 0)
        found = []  # of each tile of the vocabulary: [5, N]
        kept: list[Tensor] = []
        for entries in _slices(weight, 1):
            tiles = []
            for tokens in _slices(hidden, 0):
                z = _logits(hidden[tokens], weight, bias, entries, softcap, scale)
                if len(kept) < keep:
                    kept.append(z.clone())
                tau = None if inverse is None else inverse[tokens]
                tiles.append(_statistics(z, columns[tokens] - entries.start, tau))
            found.append(torch.cat(tiles, dim=1))
        tops, totals, moments, tempered_totals, chosen = torch.stack(found, dim=1)

        maxima = torch.stack([tops.amax(dim=0), chosen.amax(dim=0)])
        if shard:
            dist.all_reduce(maxima, dist.ReduceOp.MAX, shard.group)
        top, target = maxima
        lower = tops - top
        tempered_factor = (lower if inverse is None else lower * inverse).exp()
        moments = moments + totals * lower
        sums = [totals * lower.exp(), moments * lower.exp(), tempered_totals * tempered_factor]
        summed = torch.stack(sums).sum(dim=1)
        if shard:
            dist.all_reduce(summed, dist.ReduceOp.SUM, shard.group)
        total, moment, tempered_total = summed

        target = torch.where(target > -math.inf, target - top, math.nan)
        log_total, log_tempered_total = total.log(), tempered_total.log()
        entropies = log_total - moment / total
        per_token = (inverse, top, log_total, log_tempered_total, entropies)
        ctx.save_for_backward(hidden, weight, bias, columns, *per_token, *kept)
        ctx.softcap, ctx.scale, ctx.shard = softcap, scale, shard
        ctx.set_materialize_grads(False)
        tempered = None if inverse is None else target * inverse - log_tempered_total
        return target - log_total, tempered, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(one is None for one in upstream):
            return (None,) * 9
        hidden, weight, bias, columns, *saved = ctx.saved_tensors
        kept = iter(saved[5:])
        scaled = (None if one is None else one * ctx.scale for one in upstream)
        per_token = [None if one is None else one.unsqueeze(1) for one in (*saved[:5], *scaled)]
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        wide = _wide(hidden)
        of_hidden = torch.zeros_like(hidden, dtype=wide) if needs_hidden else None
        of_weight = torch.zeros_like(weight) if needs_weight else None
        of_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        for entries in _slices(weight, 1):
            # of_weight's own rows where they are wide; else apart until all tokens are in
            of_rows = None if of_weight is None else of_weight[entries].to(wide)
            for tokens in _slices(hidden, 0):
                if (z := next(kept, None)) is not None:
                    z = z.clone()  # whoever retains the graph comes for it again
                else:
                    z = _logits(hidden[tokens], weight, bias, entries, ctx.softcap, ctx.scale)
                slope = None if ctx.softcap is None else 1 - (z / ctx.softcap) ** 2
                rows = [None if one is None else one[tokens] for one in per_token]
                of_z = _gradient(z, columns[tokens] - entries.start, rows)
                if slope is not None:
                    of_z *= slope
                if of_bias is not None:
                    of_bias[entries] += of_z.sum(dim=0)
                if hidden.is_cuda:
                    of_z = of_z.to(hidden.dtype)  # as in any backward pass of that dtype
                if of_hidden is not None:
                    _product(of_z, weight[entries], onto=of_hidden[tokens])
                if of_rows is not None:
                    _product(of_z.T, hidden[tokens], onto=of_rows)
            if of_weight is not None and of_rows is not None and weight.dtype != wide:
                of_weight[entries] = of_rows
        if of_hidden is not None and ctx.shard:
            dist.all_reduce(of_hidden, dist.ReduceOp.SUM, ctx.shard.group)
        of_hidden, of_bias = (g if g is None else g.to(hidden.dtype) for g in (of_hidden, of_bias))
        return of_hidden, of_weight, of_bias, None, None, None, None, None, None


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    entries: slice,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Those of some tokens, for some entries of the vocabulary: [n, v]."""
    z = _product(hidden, weight[entries].T)
    if bias is not None:
        z += bias[entries]
    if scale != 1:
        z *= scale
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


def _statistics(z: Tensor, columns: Tensor, inverse: Tensor | None) -> Tensor:
    """Of a tile of logits z [n, v], which is overwritten: [5, n].

    top = max z; relative to it, so that nothing overflows, the sums of exp(z - top), of
    exp(z - top) (z - top) and of exp((z - top) / tau); z of the target, -inf where it is elsewhere.
    columns: the targets' in this tile, int64 [n]. inverse: 1 / tau [n].
    """
    inside = (columns >= 0) & (columns < z.shape[1])
    target = z.gather(1, torch.where(inside, columns, 0).unsqueeze(1)).squeeze(1)
    top = z.amax(dim=1)
    z -= top.unsqueeze(1)
    exp = z.exp()
    total = exp.sum(dim=1)
    moment = exp.mul_(z).sum(dim=1)
    tempered_total = total
    if inverse is not None:
        tempered_total = z.mul_(inverse.unsqueeze(1)).exp_().sum(dim=1)
    target = torch.where(inside, target, -math.inf)
    return torch.stack([top, total, moment, tempered_total, target])


def _gradient(z: Tensor, columns: Tensor, per_token: Sequence[Any]) -> Tensor:
    """The loss's, by a tile of logits z [n, v], which is overwritten.

    With p and p_tau the probabilities at temperatures 1 and tau, H the entropy and e the target's
    unit vector: d logprob / dz = e - p, d tempered / dz = (e - p_tau) / tau and
    d entropy / dz = -p (log p + H). columns: as in `_statistics`; per_token: [n, 1] or None each.
    """
    inverse, top, log_total, log_tempered_total, entropies = per_token[:5]
    of_logprobs, of_tempered, of_entropies = per_token[5:]
    z -= top
    at_target = torch.zeros_like(top)
    parts = []
    if of_tempered is not None:
        at_target += of_tempered * inverse
        p = (z * inverse).sub_(log_tempered_total).exp_()
        parts.append(p.mul_(-of_tempered * inverse))
    if of_logprobs is not None or of_entropies is not None:
        factor = torch.zeros_like(top) if of_logprobs is None else -of_logprobs
        at_target -= factor
        z -= log_total
        if of_entropies is not None:
            factor = (z + entropies).mul_(-of_entropies).add_(factor)
        parts.append(z.exp_().mul_(factor))
    of_z = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
    inside = ((columns >= 0) & (columns < z.shape[1])).unsqueeze(1)
    columns = torch.where(inside, columns.unsqueeze(1), 0)
    return of_z.scatter_add_(1, columns, torch.where(inside, at_target, 0))


def _product(a: Tensor, b: Tensor, onto: Tensor | None = None) -> Tensor:
    """a @ b, in at least float32 whatever autocast says; added to `onto` in place if given."""
    wide = _wide(b)
    with torch.autocast(b.device.type, enabled=False):
        if b.is_cuda and b.dtype != wide:
            product = torch.mm(a, b, out_dtype=wide)
            return product if onto is None else onto.add_(product)
        a, b = a.to(wide), b.to(wide)
        return a @ b if onto is None else onto.addmm_(a, b)


def _slices(of: Tensor, side: int) -> list[slice]:
    """Of hidden states (side 0) or a head (side 1), a tile each; one even of no tokens."""
    step = (GPU_TILE if of.is_cuda else CPU_TILE)[side]
    return [slice(start, start + step) for start in range(0, max(len(of), 1), step)]


def _wide(inputs: Tensor) -> torch.dtype:
    return torch.promote_types(inputs.dtype, torch.float32)


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, tau: Tensor | None
) -> None:
    if hidden.ndim != 2 or not hidden.is_floating_point() or weight.ndim != 2 or not len(weight):
        raise ValueError(
            "hidden and weight must be floating [N, H] and [V, H] with V >= 1, "
            f"not {hidden.dtype} {[*hidden.shape]} and {weight.dtype} {[*weight.shape]}"
        )
    (n, h), v = hidden.shape, len(weight)
    for name, one, shape, dtype in (
        ("weight", weight, [v, h], hidden.dtype),
        ("bias", bias, [v], hidden.dtype),
        ("targets", targets, [n], torch.int64),
        ("temperatures", tau, [n], None),
    ):
        if one is None or ([*one.shape] == shape and one.dtype == (dtype or one.dtype)):
            continue
        raise ValueError(f"{name} must be {dtype or ''} {shape}, not {one.dtype} {[*one.shape]}")


def _check_values(targets: Tensor, vocabulary: int | None, tau: Tensor | None) -> None:
    wrong = targets[(targets < 0) | (targets >= (vocabulary or math.inf))]
    if len(wrong):
        raise ValueError(f"targets must be in [0, {vocabulary or 'V'}), not {int(wrong[0])}")
    if tau is not None and len(wrong := tau[~((tau > 0) & tau.isfinite())]):
        raise ValueError(f"temperatures must be positive and finite, not {float(wrong[0])}")
