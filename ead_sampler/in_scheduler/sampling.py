"""What happens inside SGLang's scheduler process: set the temperatures, record what was sampled.

Every function here is called by a hook that `ead_server.plugin` lists. An exception in this
process kills the whole server, so requests are checked in the tokenizer process
(`ead_sampler.in_tokenizer`) and nothing here raises on a request's account.

Legend: B = rows of the batch, V = vocabulary.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ead_sampler.in_scheduler.bad_numbers import bad_rows
from ead_sampler.in_scheduler.rows import NO_PLACE, STATE_SIZE, AnnealedRows, Place, RowRequest
from ead_sampler.in_tokenizer.answers import TOP_K_ALL
from ead_sampler.in_tokenizer.fields import is_requested, sent_schedule, wants_arrays
from ead_sampler.in_tokenizer.server_mode import SAMPLING_BACKENDS, honours_seeds
from ead_sampler.names import COLUMNS, ENTROPIES, ROLLOUT
from ead_sampler.schedules import AnnealingError, parse_annealing

logger = logging.getLogger(__name__)

ROWS = "ead_rows"  # attribute of SamplingBatchInfo: AnnealedRows or absent
REQUEST = "ead_request"  # attribute of Req: RowRequest or None
STATE = "ead_state"  # attribute of Req: State after its last committed token, or absent
MEMORY = "ead_memory"  # attribute of ReqToTokenPool: AnnealedRows.memory
MODEL_LOGPROBS = "ead_model_logprobs"  # attribute of SamplingBatchInfo in one step: float32 [B, V]


def seed_data_parallel_rank(result: None, scheduler: Any) -> None:
    """AFTER Scheduler.init_model_worker, which seeds every rank with the server's seed.

    Data-parallel ranks would then draw the same random numbers, and answers to one prompt that
    are spread over them would come in pairs. So each but the first gets a seed of its own; the
    tensor-parallel ranks of one data-parallel rank still share theirs, as each samples for itself.
    """
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.utils import set_random_seed

    rank = get_parallel().dp_rank
    if rank:
        # hashed, since servers side by side are often given seeds that follow one another
        set_random_seed(random.Random(f"{scheduler.random_seed}/{rank}").getrandbits(32))


# --- the rows follow the batch -------------------------------------------------------------


def build_rows(result: None, info: Any, batch: Any, vocab_size: int) -> None:
    """AFTER SamplingBatchInfo.adjusted_from_schedule_batch."""
    requests = [_asked_of(req) for req in batch.reqs]
    if any(request.has_state for request in requests if request):
        slots = batch.req_pool_indices_cpu.tolist()
        places = [_place(*row) for row in zip(batch.reqs, requests, slots, strict=True)]
        rows = AnnealedRows.build(requests, info.device, places, _memory(batch))
    else:
        rows = AnnealedRows.build(requests, info.device)
    setattr(info, ROWS, rows)


def _place(req: Any, request: RowRequest | None, slot: int) -> Place:
    """Where a request that is about to be prefilled stands, for the first time or again."""
    if request is None or request.annealing is None or not request.has_state:
        return NO_PLACE
    initial = getattr(req, STATE, None)
    if initial is None:
        offset = request.annealing.position_offset
        generated = list(req.origin_input_ids[-offset:]) if offset else []
        initial = request.annealing.initial_state(generated)
    first = len(req.origin_input_ids) + len(req.output_ids) - 1
    return Place(slot, first, initial)


def _memory(batch: Any) -> Tensor:
    """One line of state per slot that SGLang gives to running requests, and one for the rest."""
    pool = batch.req_to_token_pool
    if not hasattr(pool, MEMORY):
        slots = pool.req_to_token.shape[0]
        setattr(pool, MEMORY, torch.zeros(slots + 1, STATE_SIZE, device=batch.device))
    memory: Tensor = getattr(pool, MEMORY)
    return memory


def filter_rows(result: None, info: Any, keep: list[int], keep_device: Tensor) -> None:
    """AFTER SamplingBatchInfo.adjusted_filter_batch."""
    rows = getattr(info, ROWS, None)
    if rows is not None:
        setattr(info, ROWS, rows.filter(keep, keep_device))


def merge_rows(result: None, info: Any, other: Any) -> None:
    """AFTER SamplingBatchInfo.adjusted_merge_batch: `info` already has the rows of both."""
    num_right = len(other)
    left, right = getattr(info, ROWS, None), getattr(other, ROWS, None)
    setattr(info, ROWS, AnnealedRows.merge(left, right, len(info) - num_right, num_right))


def keep_rows(result: Any, info: Any) -> None:
    """AFTER SamplingBatchInfo.copy_for_forward, whose dataclasses.replace drops our attribute."""
    setattr(result, ROWS, getattr(info, ROWS, None))


def _asked_of(req: Any) -> RowRequest | None:
    """What a SGLang request asks for, worked out once in its life; mostly None."""
    if not hasattr(req, REQUEST):
        setattr(req, REQUEST, _row_request(req))
    return getattr(req, REQUEST)


def _row_request(req: Any) -> RowRequest | None:
    custom = req.sampling_params.custom_params
    if not is_requested(custom):
        return None
    rollout = custom.get(ROLLOUT)
    try:
        raw = sent_schedule(custom)
        annealing = None if raw is None else parse_annealing(raw)
    except AnnealingError:
        # Only a request that went around the tokenizer process can get here. It is left without
        # arrays, and so without the marker of an honoured schedule, which clients insist on.
        logger.exception("request %s: unchecked schedule, not annealed", req.rid)
        return None
    params = req.sampling_params
    return RowRequest(
        num_prompt_tokens=len(req.origin_input_ids),
        annealing=annealing,
        arrays=wants_arrays(custom),
        cuts=params.top_p < 1 or 1 < params.top_k < TOP_K_ALL or params.min_p > 0,
        entropies=isinstance(rollout, dict) and bool(rollout.get(ENTROPIES)),
        seed=params.sampling_seed,
    )


# --- one step of the sampler ---------------------------------------------------------------


def keep_model_logprobs(
    runner: Any, logits_output: Any, info: Any, *args: Any, **kwargs: Any
) -> None:
    """BEFORE ModelRunner._preprocess_logits, which adds penalties, bias and grammar masks.

    The sampler then overwrites the logits in place, so what the model said is worked out first:
    one pass, from which log-probabilities and entropies are both read.
    """
    rows: AnnealedRows | None = getattr(info, ROWS, None)
    if rows is not None and (rows.records or rows.wants_entropies):
        logits = logits_output.next_token_logits.float()
        logprobs = torch.log_softmax(logits, dim=-1, out=_workspace(logits))
        setattr(info, MODEL_LOGPROBS, logprobs)


_workspaces: dict[tuple[torch.device, str], Tensor] = {}


def _workspace(like: Tensor, purpose: str = "logprobs") -> Tensor:
    """Memory of the size of `like` (float32 [B, V]), the same at every step.

    On a CPU, fresh memory of this size costs more (page faults) than what is written to it. The
    steps of one device run one after the other, and each is done with it before the next.
    """
    key = (like.device, purpose)
    memory = _workspaces.get(key)
    if memory is None or memory.numel() < like.numel():
        memory = _workspaces[key] = torch.empty(like.numel(), device=like.device)
    return memory[: like.numel()].view_as(like)


def sample(
    original: Callable[..., Tensor],
    sampler: Any,
    logits_output: Any,
    info: Any,
    return_logprob: bool,
    top_logprobs_nums: list[int],
    token_ids_logprobs: list[list[int]],
    positions: Tensor,
    **kwargs: Any,
) -> Tensor:
    """AROUND Sampler.forward: sample every row at its temperature now, and record how.

    Returns the sampled token ids, int [B]. The recorded values leave through SGLang's auxiliary
    output, which copies them to the host with its own asynchronous copy; so do the flags of rows
    that could not be sampled (`bad_numbers`), whatever is asked.
    """
    rows: AnnealedRows | None = getattr(info, ROWS, None)
    arguments = (logits_output, info, return_logprob, top_logprobs_nums, token_ids_logprobs)
    if rows is None:
        token_ids = original(sampler, *arguments, positions, **kwargs)
        _send_to_host(logits_output, token_ids, info, None, None)
        return token_ids

    model_logprobs: Tensor | None = vars(info).pop(MODEL_LOGPROBS, None)
    entropies = None
    if rows.wants_entropies and model_logprobs is not None:
        entropies = entropy_of(model_logprobs)
    fixed, seeds = info.temperatures, info.sampling_seed
    info.temperatures = rows.temperatures(positions, fixed, entropies)
    if rows.seeded and seeds is None and honours_seeds(_sampling_backend()):
        info.sampling_seed = rows.seeds()
    try:
        token_ids = original(sampler, *arguments, positions, **kwargs)
        values, state = None, None
        if rows.records and model_logprobs is not None:
            sampled = logits_output.next_token_logits
            values = _sampled_values(sampled, token_ids, info, rows, model_logprobs, entropies)
        if rows.memory is not None:
            state = rows.remember(positions, token_ids, entropies)
    finally:
        info.temperatures, info.sampling_seed = fixed, seeds

    _send_to_host(logits_output, token_ids, info, values, state)
    return token_ids


def _send_to_host(
    logits_output: Any, token_ids: Tensor, info: Any, values: Tensor | None, state: Tensor | None
) -> None:
    from sglang.srt.managers.auxiliary_output import append_auxiliary_output
    from sglang.srt.runtime_context import get_parallel

    bad = bad_rows(logits_output.next_token_logits, token_ids, info)
    if values is not None:
        values = values.masked_fill(bad.unsqueeze(1), torch.nan)
    elif state is None and get_parallel().pp_size > 1:
        return  # SGLang lets nothing of this kind cross pipeline stages
    logits_output.auxiliary_device_output = append_auxiliary_output(
        logits_output.auxiliary_device_output, SampledOnDevice(bad, values, state)
    )


# numbers of [B, V] worked on at once: what a CPU's caches hold, and little memory of a GPU
_AT_ONCE_CPU, _AT_ONCE_GPU = 1 << 19, 1 << 24


def _at_once(tensor: Tensor) -> int:
    return _AT_ONCE_CPU if tensor.device.type == "cpu" else _AT_ONCE_GPU


def entropy_of(logprobs: Tensor) -> Tensor:
    """Entropy in nats of each row: float32 [B, V] -> [B]. Impossible tokens (-inf) count 0."""
    rows = max(1, _at_once(logprobs) // logprobs.shape[1])
    entropies = []
    for part in logprobs.split(rows):
        probs = torch.exp(part, out=_workspace(part, "probabilities"))
        entropies.append(-probs.mul_(part).nansum(1))  # 0 * -inf is not a number
    return torch.cat(entropies)


def _sampled_values(
    sampled: Tensor,
    token_ids: Tensor,
    info: Any,
    rows: AnnealedRows,
    model_logprobs: Tensor,
    entropies: Tensor | None,
) -> Tensor:
    """float32 [B, 3 or 4] on the device: temperature, behaviour and model log-probability, and the
    entropy where known.

    sampled: [B, V], what SGLang's sampler left behind: probabilities at tau (it computes softmax
    in place), or untouched logits when the whole batch is greedy. model_logprobs: float32 [B, V].
    """
    chosen = token_ids.to(torch.int64).unsqueeze(1)
    temperatures = info.temperatures
    if info.is_all_greedy:
        logprobs = torch.zeros_like(temperatures)
    else:
        logprobs = sampled.gather(1, chosen).float().log()
        if info.need_top_p_sampling or info.need_top_k_sampling or info.need_min_p_sampling:
            for part in rows.cut.split(max(1, _at_once(sampled) // (4 * sampled.shape[1]))):
                cuts = (column[part] for column in (info.top_ks, info.top_ps, info.min_ps))
                kept = kept_mass(sampled[part], *cuts, renormalised=_renormalises(info))
                logprobs = logprobs.index_add(0, part, -kept.log().unsqueeze(1))
    if info.is_any_greedy:  # greedy is the limit tau -> 0: one token, with probability 1
        greedy = info.top_ks.unsqueeze(1) <= 1
        temperatures = temperatures.masked_fill(greedy, 0.0)
        logprobs = logprobs.masked_fill(greedy, 0.0)
    columns = [temperatures, logprobs, model_logprobs.gather(1, chosen)]
    if entropies is not None:
        columns.append(entropies.unsqueeze(1))
    return torch.cat(columns, dim=1)


def kept_mass(
    probs: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, *, renormalised: bool = False
) -> Tensor:
    """Total probability of the tokens that SGLang's sampler keeps, see `kept`: [B, V] -> [B]."""
    ordered = probs.sort(dim=-1, descending=True).values
    return (ordered * kept(ordered, top_ks, top_ps, min_ps, renormalised=renormalised)).sum(-1)


def kept(
    ordered: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, *, renormalised: bool = False
) -> Tensor:
    """Which tokens SGLang's sampler keeps of each row: bool [B, V].

    ordered: float [B, V], the highest probability first. Kept are the first top_k tokens, as long
    as the tokens before them sum to at most top_p, and of those the ones with at least min_p times
    the highest probability. renormalised: top_p counts within what top_k left, rather than within
    the whole vocabulary.
    """
    before = ordered.cumsum(dim=-1) - ordered
    kept = torch.arange(ordered.shape[-1], device=ordered.device) < top_ks.view(-1, 1)
    if renormalised:
        before = before / (ordered * kept).sum(-1, keepdim=True)
    kept &= before <= top_ps.view(-1, 1)
    kept &= ordered >= ordered[:, :1] * min_ps.view(-1, 1)
    return kept


def _renormalises(info: Any) -> bool:
    """See SamplingBackend."""
    if not info.need_min_p_sampling:
        return False
    backend = SAMPLING_BACKENDS.get(_sampling_backend())
    return backend is not None and backend.renormalises


def _sampling_backend() -> str:
    from sglang.srt.runtime_context import get_exec

    backend: str = get_exec().kernel.sampling_backend
    return backend


# --- values to the host, and to the requests -----------------------------------------------


class SampledOnDevice:
    """One step's flags, values and state on the device (SGLang's DeviceAuxiliaryOutput)."""

    def __init__(self, bad: Tensor, values: Tensor | None, state: Tensor | None) -> None:
        self.bad = bad  # bool [B], see ead_sampler.in_scheduler.bad_numbers
        self.values = values  # float32 [B, 3 or 4], see _sampled_values; NaN in bad rows
        self.state = state  # float32 [B, 3], see AnnealedRows.remember

    def copy_to_host(self, copy_tensor: Callable[[Tensor], Tensor]) -> SampledOnHost:
        values = None if self.values is None else copy_tensor(self.values)
        state = None if self.state is None else copy_tensor(self.state)
        return SampledOnHost(copy_tensor(self.bad) if values is None else None, values, state)


class SampledOnHost:
    """One step's flags, values and state on the host (SGLang's HostAuxiliaryOutput)."""

    def __init__(self, bad: Tensor | None, values: Tensor | None, state: Tensor | None) -> None:
        self._bad = bad  # None: the values tell
        self.values = values
        self.state = state

    @property
    def bad(self) -> Tensor:
        """bool [B], complete once SGLang's copy is."""
        if self._bad is not None:
            return self._bad
        assert self.values is not None
        return self.values[:, 0].isnan()

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Append to each request the values of the token just committed to it.

        `commits[i].output_index` is that token's index: cutting the lists there keeps them right
        when SGLang generates a token again (a retracted request with input embeddings).
        """
        if self.values is None and self.state is None:
            return
        nothing = [None] * len(batch.reqs)
        values = nothing if self.values is None else self.values.tolist()
        states = nothing if self.state is None else self.state.tolist()
        for req, commit, row, state in zip(batch.reqs, commits, values, states, strict=True):
            request = _asked_of(req) if commit is not None else None
            if request is None:
                continue
            if request.has_state and state is not None:
                setattr(req, STATE, tuple(state))
            if not request.arrays or row is None:
                continue
            if req.customized_info is None:
                req.customized_info = {}
            columns = (*COLUMNS, ENTROPIES) if request.entropies else COLUMNS
            for name, value in zip(columns, row, strict=False):
                column = req.customized_info.setdefault(name, [])
                del column[commit.output_index :]
                column.append(value)
