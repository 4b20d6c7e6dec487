"""KV-cache bookkeeping: which slot of the cache holds which token of which request.

`req_to_token` is int32 [requests, pool_len]: the slot of every token of every request.
`out_cache_loc` is a flat int64 list of slots, the requests of the batch one after another.
"""

from __future__ import annotations

import ctypes

import torch


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor,
    strides: torch.Tensor,
    tgt_loc: torch.Tensor,
    src_loc: torch.Tensor,
) -> None:
    """Copy slots `src_loc` over slots `tgt_loc` in every cache buffer.

    data_ptrs: uint64 [buffers], the buffers' addresses. strides: int64 [buffers], bytes per slot.
    tgt_loc, src_loc: int64 [n]; the two may overlap: every slot is read before any is written.
    Called by `kernels/ops/kvcache/cache_move.py: copy_all_layer_kv_cache_func`.
    """
    if tgt_loc.numel() == 0:
        return
    num_slots = int(torch.maximum(tgt_loc.max(), src_loc.max())) + 1
    for address, slot_bytes in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (num_slots * slot_bytes)).from_address(address)
        slots = torch.frombuffer(memory, dtype=torch.uint8).view(num_slots, slot_bytes)
        slots[tgt_loc] = slots[src_loc]


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write newly allocated slots into rows of `req_to_token`, in place.

    req_pool_indices: int [bs], the row of each request. start_offset, end_offset: int [bs], its
    columns start..end-1. out_cache_loc: int64 [>= sum of the lengths].
    Called by `srt/mem_cache/allocation.py: assign_req_to_token_pool_func`.
    """
    rows, columns = _cells(req_pool_indices, start_offset, end_offset)
    req_to_token[rows, columns] = out_cache_loc[: len(rows)].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Read columns start..end-1 of each request's row into `out_cache_loc`, in place.

    The inverse of `assign_req_to_token_pool_cpu`, with the same arguments. `out_cache_loc` may be
    longer than what is read; its tail is left alone.
    Called by `kernels/ops/speculative/cache_locs.py: assign_extend_cache_locs_func` (the verify
    step of NGRAM and DFLASH) and `fill_front_out_cache_loc_func`.
    """
    rows, columns = _cells(req_pool_indices, start_offset, end_offset)
    out_cache_loc[: len(rows)] = req_to_token[rows, columns].to(out_cache_loc.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
    topk: int,
    num_steps: int,
) -> None:
    """Read the `topk * num_steps` slots that follow each request's sequence, in place.

    req_pool_indices, seq_lens: int [bs]. out_cache_loc: int64 [bs * topk * num_steps], written.
    Called by `kernels/ops/speculative/cache_locs.py: assign_draft_cache_locs_contiguous_func`.
    """
    assign_extend_cache_locs_cpu(
        req_pool_indices,
        req_to_token,
        seq_lens,
        seq_lens + topk * num_steps,
        out_cache_loc,
        pool_len,
    )


def fill_accept_out_cache_loc_cpu(
    accept_index: torch.Tensor, out_cache_loc: torch.Tensor, accept_out_cache_loc: torch.Tensor
) -> None:
    """Pack the slots of the accepted draft tokens at the front of `accept_out_cache_loc`.

    accept_index: int32 or int64, any shape, indices into `out_cache_loc`, -1 for a rejected one.
    accept_out_cache_loc: int64 [>= accepted]; what follows the accepted slots is left alone.
    Called by `kernels/ops/speculative/eagle.py: fill_accept_out_cache_loc_func`.
    """
    accepted = accept_index[accept_index > -1].long()
    accept_out_cache_loc[: len(accepted)] = out_cache_loc[accepted]


def _cells(
    rows: torch.Tensor, start: torch.Tensor, end: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column, int64 [n], of every cell in `start..end-1` of each row, in request order."""
    lengths = (end - start).long()
    first = torch.cumsum(lengths, dim=0) - lengths  # where each request begins in the flat list
    columns = torch.arange(int(lengths.sum())) + torch.repeat_interleave(start - first, lengths)
    return torch.repeat_interleave(rows.long(), lengths), columns
