"""A bad number in the engine fails the requests that it reaches, and nothing else.

A row of logits with NaN or +Inf in it (weights that overflow in the forward pass, say) has no
distribution: SGLang then answers with some token, or its sampling raises, which ends the server.
Here such a row is given a harmless distribution, so that all other rows are sampled as ever; its
flag goes to the host with the sampled token; and there its request ends with an error, before the
token is committed to it. Impossible tokens (-Inf, of grammars and biases) are no bad numbers, but a
row of nothing else is.

Legend: B = rows of the batch, V = vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BAD = "ead_bad_rows"  # attribute of SamplingBatchInfo in one step: bool [B]
MESSAGE = (
    "the model's logits are not finite numbers (NaN or Inf): its weights are broken, or overflow "
    "with this request's tokens and sampling parameters"
)


def mend_probabilities(
    sampler: Any, probs: Tensor, info: Any, positions: Tensor, simple_sampling_case: bool
) -> None:
    """BEFORE Sampler._sample_from_probs: note the bad rows, and make them safe to sample from.

    probs: [B, V], the result of a softmax, which makes all of a row NaN when one number is bad; so
    one number of each row tells.
    """
    bad = probs[:, 0].isnan()
    setattr(info, BAD, bad)
    if simple_sampling_case and _draws_by_argmax():
        return  # which takes some token for NaN, and no pass over [B, V] is needed
    # On a CPU looking costs nothing; elsewhere it would wait for the device.
    if bad.device.type != "cpu" or bad.any():
        probs.masked_fill_(bad.unsqueeze(1), 1 / probs.shape[1])


def _draws_by_argmax() -> bool:
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_OPT_USE_GUMBEL_SAMPLE.get())


def bad_rows(logits: Tensor, token_ids: Tensor, info: Any) -> Tensor:
    """bool [B], after the sampler has run. logits: [B, V], what it left behind."""
    bad: Tensor | None = vars(info).pop(BAD, None)
    if bad is not None:
        return bad
    if info.is_all_greedy:  # argmax takes NaN for the largest
        return ~logits.gather(1, token_ids.to(torch.int64).unsqueeze(1)).squeeze(1).isfinite()
    return ~logits.amax(1).isfinite()  # of backends that sample from something else


def end_bad_requests(scheduler: Any, batch: Any, result: Any) -> None:
    """BEFORE Scheduler.process_batch_result: requests with a bad row get no token but an error.

    Their keys and values, which may hold bad numbers too, do not stay in the cache.
    """
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    if getattr(result, "auxiliary_host_output", None) is None:
        return
    if result.copy_done is not None:
        result.copy_done.synchronize()  # SGLang's next step, too
    ended = []
    for req, bad in zip(batch.reqs, _flags(result.auxiliary_host_output), strict=False):
        if not bad or req.finished() or req.is_retracted or req.inflight_middle_chunks > 0:
            continue
        reason = FINISH_ABORT(MESSAGE, HTTPStatus.INTERNAL_SERVER_ERROR, "server_error")
        req.skip_radix_cache_insert = True
        if batch.forward_mode.is_decode():
            req.to_finish = reason
            req.finished_len = len(req.output_ids)  # the token that is about to come does not count
        else:
            req.discard_output_reason = reason
        ended.append(req.rid)
    if ended:
        logger.error("%d requests ended (%s, ...): %s", len(ended), ended[0], MESSAGE)


def _flags(output: Any) -> Iterator[bool]:
    """The flags in a step's auxiliary output, which may be one of several; none where all are good
    rows."""
    for part in getattr(output, "outputs", (output,)):
        bad: Tensor | None = getattr(part, "bad", None)
        if bad is not None and bad.any():
            yield from bad.tolist()
            return


# --- weights -------------------------------------------------------------------------------------


def check_received(weights: list[tuple[str, Tensor]], updater: Any, **told: Any) -> None:
    """AFTER WeightUpdater.receive_weights_from_distributed, before anything of it is loaded.

    Raises ValueError, which SGLang answers as a failure to receive, for a number that is none, or
    none in the dtype that is served.
    """
    for name, tensor in weights:
        if not is_finite(tensor, updater.model_config.dtype):
            raise ValueError(f"{name}: every number must be finite, got NaN or Inf")


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether all of a tensor's numbers are, also as `dtype`. One pass, and no memory of its size,
    but for float8."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # has no such pass of its own
        tensor = tensor.float()
    extremes = torch.stack(tensor.aminmax())  # NaN if one number is
    return bool(extremes.to(dtype or tensor.dtype).isfinite().all())
