"""Torch forms of the kernels that n-gram speculative decoding needs on the CPU platform.

SGLang has them for CUDA, in Triton, and in the compiled library of its own CPU engine. A draft is a
tree of tokens per request; node 0 is the last token that is known. As in SGLang's CPU engine, the
accepted tokens are always the most probable ones: ``temperature`` has no effect.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

import torch

_RECONSTRUCT = "sglang.kernels.ops.speculative.reconstruct_tree"


def use_torch_copies() -> None:
    """Let SGLang's KV pools move rows, and the scheduler fill request rows, without Triton."""
    from sglang.srt.mem_cache import allocation
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    os.environ.setdefault("SGLANG_NATIVE_MOVE_KV_CACHE", "1")
    MHATokenToKVPool._init_kv_copy_and_warmup = _no_kernel
    allocation.assign_req_to_token_pool_func = assign_request_rows


def use_torch_trees() -> None:
    """Let SGLang's n-gram worker build and verify trees without its kernels. Call before the
    worker's module is imported."""
    module = ModuleType(_RECONSTRUCT)  # the original imports sgl_kernel
    module.reconstruct_indices_from_tree_mask_func = links_of_trees  # type: ignore[attr-defined]
    sys.modules[_RECONSTRUCT] = module

    from sglang.srt.speculative import eagle_utils, spec_utils

    eagle_utils.verify_tree_greedy_func = verify_trees
    eagle_utils._is_cpu = True
    spec_utils.fill_front_out_cache_loc_func = fill_first_slots
    spec_utils.fill_accept_out_cache_loc_func = fill_accepted_slots


def links_of_trees(
    tree_mask: torch.Tensor,
    verified_seq_len: torch.Tensor,
    positions: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    """Positions, first children and next siblings of the nodes of each request's tree.

    Args:
        tree_mask: bool ``[requests * nodes * nodes]``; ``[request, i, j]`` is whether node ``j`` is
            node ``i`` or an ancestor of it. Ancestors come first.
        verified_seq_len: ``[requests]``, the position of node 0.
        positions: int64 ``[requests * nodes]``; written.
        retrieve_index: int64 ``[requests, nodes]``; the node's row in the batch is written.
        retrieve_next_token: As before; the first child or -1 is written.
        retrieve_next_sibling: As before; the next sibling or -1 is written.
        batch_size: Number of requests.
        draft_token_num: Number of nodes of each tree.
    """
    shape, node = (batch_size, draft_token_num), torch.arange(draft_token_num)
    is_ancestor = tree_mask.view(*shape, draft_token_num).bool() & (node < node[:, None])
    depth = is_ancestor.sum(-1)
    positions.view(shape).copy_(depth + verified_seq_len[:, None])
    retrieve_index.copy_(torch.arange(batch_size * draft_token_num).view(shape))
    parent = torch.where(depth > 0, (is_ancestor * node).amax(-1), -1)
    # [request, k, i]: k is a child of i; k is a later sibling of i.
    is_child = parent[:, :, None] == node
    is_sibling = (parent[:, :, None] == parent[:, None]) & (node[:, None] > node)
    is_sibling &= (parent >= 0)[:, None]
    for found, is_linked in (
        (retrieve_next_token, is_child),
        (retrieve_next_sibling, is_sibling),
    ):
        first = torch.where(is_linked, node[:, None], draft_token_num).amin(1)
        found.copy_(torch.where(first < draft_token_num, first, -1))


def verify_trees(
    predicts: torch.Tensor,
    accept_index: torch.Tensor,
    accept_token_num: torch.Tensor,
    candidates: torch.Tensor,
    retrieve_index: torch.Tensor,
    retrieve_next_token: torch.Tensor,
    retrieve_next_sibling: torch.Tensor,
    target_predict: torch.Tensor,
    topk: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Follow each tree from node 0 as long as a child is the model's most probable next token.

    Args:
        predicts: int32 ``[requests * nodes]``; the next token is written at accepted nodes.
        accept_index: int32 ``[requests, deepest tree]``; rows of accepted nodes are written.
        accept_token_num: int32 ``[requests]``; their number without node 0 is written.
        candidates: ``[requests, nodes]``, the tokens of the nodes.
        retrieve_index: ``[requests, nodes]``, as ``links_of_trees`` writes it, and so
            ``retrieve_next_token`` and ``retrieve_next_sibling``.
        target_predict: ``[requests, nodes]``, the most probable token after each node.
        topk: Is not used.

    Returns:
        ``predicts``, ``accept_index`` and ``accept_token_num``.
    """
    children, siblings = retrieve_next_token.tolist(), retrieve_next_sibling.tolist()
    rows, tokens, nexts = retrieve_index.tolist(), candidates.tolist(), target_predict.tolist()
    for i in range(len(rows)):
        accepted = [0]
        while len(accepted) < accept_index.shape[1]:
            node = children[i][accepted[-1]]
            while node >= 0 and tokens[i][node] != nexts[i][accepted[-1]]:
                node = siblings[i][node]
            if node < 0:
                break
            accepted.append(node)
        mine = torch.tensor([rows[i][node] for node in accepted])
        accept_index[i, : len(accepted)] = mine.to(accept_index.dtype)
        accept_token_num[i] = len(accepted) - 1
        predicts[mine] = target_predict[i, accepted].to(predicts.dtype)
    return predicts, accept_index, accept_token_num


def fill_first_slots(
    num_front: torch.Tensor, out_cache_loc: torch.Tensor, front_out_cache_loc: torch.Tensor
) -> None:
    """Write the first ``num_front[i]`` of request i's slots, request after request.

    Args:
        num_front: ``[requests]``.
        out_cache_loc: ``[requests * nodes]``, slots of the drafted tokens.
        front_out_cache_loc: int64, at least as long; its beginning is written.
    """
    slots = out_cache_loc.view(len(num_front), -1)
    first = slots[torch.arange(slots.shape[1]) < num_front[:, None]]
    front_out_cache_loc[: len(first)] = first


def fill_accepted_slots(
    accept_index: torch.Tensor,
    out_cache_loc: torch.Tensor,
    accept_out_cache_loc: torch.Tensor,
    size: int,
) -> None:
    """Write the slots of the accepted nodes, request after request.

    Args:
        accept_index: Rows of accepted nodes, the others -1.
        out_cache_loc: ``[requests * nodes]``, slots of the drafted tokens.
        accept_out_cache_loc: int64 ``[size]``; its beginning is written.
        size: Number of elements of ``accept_index``.
    """
    accepted = accept_index.flatten()
    slots = out_cache_loc[accepted[accepted >= 0].long()]
    accept_out_cache_loc[: len(slots)] = slots


def slots_of_drafts(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    **_: object,
) -> torch.Tensor:
    """Slots ``start_offset`` to ``end_offset`` (exclusive) of each request's row, int64.

    Args:
        req_pool_indices: ``[requests]``, numbers of their rows.
        req_to_token: int32 ``[rows, context]``.
        start_offset: ``[requests]``, as ``end_offset``.
    """
    spans = zip(
        *map(torch.Tensor.tolist, (req_pool_indices, start_offset, end_offset)), strict=True
    )
    return torch.cat([req_to_token[row, start:end] for row, start, end in spans]).long()


def assign_request_rows(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    batch_size: int,
) -> None:
    """Write new slots ``[sum of lengths]`` into the requests' rows; see ``slots_of_drafts``."""
    spans = zip(
        *map(torch.Tensor.tolist, (req_pool_indices, start_offset, end_offset)), strict=True
    )
    first = 0
    for row, start, end in spans:
        req_to_token[row, start:end] = out_cache_loc[first : first + end - start]
        first += end - start


def _no_kernel(pool: object) -> None:
    """SGLang's Triton copy of KV rows, which is not used, is not compiled."""
    pool._kv_copy_config = None  # type: ignore[attr-defined]
