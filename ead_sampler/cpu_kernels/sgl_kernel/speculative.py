"""Trees of draft tokens for speculative decoding.

A request's tree has n = draft_token_num nodes. Node 0 is the last verified token; a parent always
has a smaller number than its children. The tree is stored as links, int64 [bs, n]:
`retrieve_index` (the flat number request * n + node), `retrieve_next_token` (first child) and
`retrieve_next_sibling`, -1 for none. SGLang spells the arguments of one function `retrive_*`.

The loops run over requests and tree nodes, a few dozen at most; this is not the plain decode path.
"""

from __future__ import annotations

import torch

FULL_MASK = 0  # rows of seq_len + n columns
QLEN_ONLY = 1  # rows of n columns: what SGLang uses on CPU


def build_tree_kernel_efficient_cpu(
    parent_list: torch.Tensor,
    selected_index: torch.Tensor,
    verified_seq_len: torch.Tensor,
    tree_mask: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """Turn the candidates that EAGLE selected into a tree, all outputs in place.

    selected_index: int64 [bs, n - 1], candidate number of nodes 1..n-1; candidate c was drafted
    from parent c // topk. parent_list: int64 [bs, topk * (depth - 1) + 1], the candidate number of
    each parent (parent 0 is node 0; empty when depth is 1). verified_seq_len: int64 [bs].
    tree_mask: bool, flat, true where a node (row) sees a node (column): [bs * n * n] for
    QLEN_ONLY; for FULL_MASK [sum(seq_len + n) * n] with the prefix columns filled by the caller.
    positions: int64 [bs * n], seq_len plus the node's depth. The link tensors: int64 [bs, n], the
    last two filled with -1 by the caller.
    Called by `kernels/ops/speculative/spec_tree.py: build_tree_kernel_efficient_func`.
    """
    if tree_mask_mode not in (FULL_MASK, QLEN_ONLY):
        raise ValueError(f"tree_mask_mode must be FULL_MASK or QLEN_ONLY, got {tree_mask_mode}")
    n = draft_token_num
    bs = verified_seq_len.shape[0]
    positions_by_request = positions.view(bs, n)
    retrieve_index.copy_(torch.arange(bs * n).view(bs, n))
    mask_start = 0
    for request, seq_len in enumerate(verified_seq_len.tolist()):
        parents = _parents(parent_list[request].tolist(), selected_index[request].tolist(), topk)
        visible, depths = _ancestors(parents, depth)
        positions_by_request[request] = seq_len + depths
        _link_children(parents, retrieve_next_token[request], retrieve_next_sibling[request])

        prefix = seq_len if tree_mask_mode == FULL_MASK else 0
        mask_end = mask_start + n * (prefix + n)
        tree_mask[mask_start:mask_end].view(n, prefix + n)[:, prefix:] = visible
        mask_start = mask_end


def verify_tree_greedy_cpu(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrive_index: torch.Tensor,
    retrive_next_token: torch.Tensor,
    retrive_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
) -> None:
    """Follow the target model's choices down each tree; what it agrees with is accepted.

    candidates: int64 [bs, n], the draft token of each node. target_predict: int64 [bs, n], the
    target's choice after each node. Outputs, in place: predicts int32 [bs * n], the target's
    choice at every accepted node; accept_index int32 [bs, s], flat numbers of the accepted nodes
    from node 0 on, the rest left at the caller's -1 (at most s - 1 drafts); accept_token_num
    int32 [bs], accepted drafts, node 0 not counted.
    Called by `kernels/ops/speculative/spec_tree.py: verify_tree_greedy_func`, by keyword.
    """
    max_accepted = accept_index.shape[1]
    for request, flat_number in enumerate(retrive_index.tolist()):
        first_child = retrive_next_token[request].tolist()
        next_sibling = retrive_next_sibling[request].tolist()
        draft = candidates[request].tolist()
        target = target_predict[request].tolist()

        accepted = [0]
        while len(accepted) < max_accepted:
            wanted = target[accepted[-1]]
            node = first_child[accepted[-1]]
            while node != -1 and draft[node] != wanted:
                node = next_sibling[node]
            if node == -1:
                break
            accepted.append(node)

        for place, node in enumerate(accepted):
            accept_index[request, place] = flat_number[node]
            predicts[flat_number[node]] = target[node]
        accept_token_num[request] = len(accepted) - 1


def reconstruct_indices_from_tree_mask(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Recover the links of each tree from its mask, all outputs in place.

    tree_mask: bool [batch_size * n * n], true where a node (row) sees a node (column).
    verified_seq_len: int64 [batch_size]. positions: int64 [batch_size * n], seq_len plus depth.
    The link tensors: int64 [batch_size, n]; a node without a parent has no sibling.
    Called by `kernels/ops/speculative/reconstruct_tree.py: reconstruct_indices_from_tree_mask_func`
    (NGRAM), which imports it from `sgl_kernel.speculative`.
    """
    n = draft_token_num
    node = torch.arange(n)
    ancestors = tree_mask.view(batch_size, n, n).tril(-1)  # [.., node, ancestor], without itself
    # The parent is the highest-numbered ancestor, since a parent comes before its children.
    parents = torch.where(ancestors, node, -1).amax(2)
    siblings = (parents[:, :, None] == parents[:, None, :]) & (parents[:, None, :] >= 0)
    later_siblings = siblings.tril(-1)  # [.., later sibling, node]

    positions.view(batch_size, n).copy_(verified_seq_len[:, None] + ancestors.sum(2))
    retrieve_index.copy_(torch.arange(batch_size * n).view_as(retrieve_index))
    retrieve_next_token.view(batch_size, n).copy_(_first_row(ancestors))
    retrieve_next_sibling.view(batch_size, n).copy_(_first_row(later_siblings))


def fill_bonus_tokens_cpu(
    accept_tokens: torch.Tensor,
    accept_lens: torch.Tensor,
    bonus_tokens: torch.Tensor,
    accept_stride: int,
) -> None:
    """Pick each request's last accepted token, in place.

    accept_tokens: int32 [bs * accept_stride] or [bs, accept_stride]. accept_lens: int32 [bs],
    accepted tokens, at least 1. bonus_tokens: int32 [bs], written.
    Called by `kernels/ops/speculative/eagle.py: fill_bonus_tokens_func`.
    """
    last = (accept_lens.long() - 1).unsqueeze(1)
    bonus_tokens.copy_(accept_tokens.reshape(-1, accept_stride).gather(1, last).squeeze(1))


def rotate_input_ids_cpu(
    input_ids: torch.Tensor,
    extend_start_loc: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    topk_index: torch.Tensor,
    select_index: torch.Tensor | None = None,
) -> None:
    """Shift each request's segment left by one and put its new token at the end, in place.

    input_ids: int64 [tokens]. extend_start_loc, extend_seq_lens: int [bs], the segments; an empty
    one is skipped. topk_index: int64 [bs] or [bs, 1], the new tokens. select_index: int64 [bs] or
    None, the place in `input_ids` of each new token if it is not the segment's end.
    Called by `kernels/ops/speculative/multi_layer_eagle.py: rotate_input_ids`.
    """
    starts, lengths = extend_start_loc.tolist(), extend_seq_lens.tolist()
    places = [start + length - 1 for start, length in zip(starts, lengths, strict=True)]
    if select_index is not None:
        places = select_index.tolist()
    new_tokens = topk_index.flatten()
    for request, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if length > 0:
            segment = input_ids[start : start + length]
            segment[:-1] = segment[1:].clone()  # source and destination overlap
            input_ids[places[request]] = new_tokens[request]


def _parents(parent_list: list[int], selected: list[int], topk: int) -> list[int | None]:
    """The parent node of each node of one tree; None for node 0 and where it was not selected."""
    node_of_candidate = {candidate: node for node, candidate in enumerate(selected, start=1)}
    parents: list[int | None] = [None]
    for candidate in selected:
        parent = candidate // topk
        parents.append(0 if parent == 0 else node_of_candidate.get(parent_list[parent]))
    return parents


def _ancestors(parents: list[int | None], max_depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What each node of one tree sees (itself, its ancestors, node 0) and how deep it lies.

    Returns bool [n, n] and int64 [n]. At most `max_depth` steps are taken towards node 0.
    """
    n = len(parents)
    visible = torch.zeros(n, n, dtype=torch.bool)
    visible[:, 0] = True
    depths = [0] * n
    for node in range(1, n):
        ancestor: int | None = node
        while ancestor and depths[node] < max_depth:  # ends at node 0 and at a missing parent
            visible[node, ancestor] = True
            depths[node] += 1
            ancestor = parents[ancestor]
    return visible, torch.tensor(depths)


def _link_children(
    parents: list[int | None], next_token: torch.Tensor, next_sibling: torch.Tensor
) -> None:
    """Link each parent to its first child and children to one another, in ascending order.

    next_token, next_sibling: int64 [n], all -1 when called, written in place.
    """
    for node in range(len(parents) - 1, 0, -1):
        parent = parents[node]
        if parent is not None:
            next_sibling[node] = next_token[parent]
            next_token[parent] = node


def _first_row(matrices: torch.Tensor) -> torch.Tensor:
    """The first true row of every column, -1 for none: bool [b, n, n] -> int64 [b, n]."""
    return torch.where(matrices.any(1), matrices.int().argmax(1), -1)
