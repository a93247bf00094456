"""Paths of requests with an activated LoRA: KV of the base model, and KV of the adapter below it.

Such a path is matched and inserted in two walks, the second from the node where the first ends. The
adapter's node is not on it, so a lock on the path does not protect the adapter as it does for other
requests. Locks of the adapter's KV lock it too (``EloraFullComponent.lock_adapters``); where a
request has found KV of the base model only, the id of the node that it locks carries the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from sglang.srt.mem_cache.base_prefix_cache import (
    InsertParams,
    InsertResult,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.unified_tree_core import NodeId

from sglang_elora.tree import ActivatedNamespace, adapter_of, is_activated

if TYPE_CHECKING:
    from sglang_elora.srt.mem_cache.tree_core import EloraTreeCore


class NodeWithAdapter(int):
    """The id of a node of the base model's KV, and of the adapter that is locked with it."""

    adapter_id: str


def with_adapter(core: EloraTreeCore, node_id: NodeId, namespace: ActivatedNamespace) -> NodeId:
    """The node's id for a request in this namespace."""
    if is_activated(core.node_by_id(node_id).key.extra_key):
        return node_id
    made = NodeWithAdapter(node_id)
    made.adapter_id = str(adapter_of(namespace))
    return made


def match(core: EloraTreeCore, params: MatchPrefixParams) -> MatchResult:
    """The longest cached prefix of a request with an activated LoRA, whose key has an
    ``ActivatedNamespace``."""
    key, namespace = params.key, params.key.extra_key
    first = core.match_prefix(replace(params, key=base_part(key)))
    found = first
    if first.device_prefix_len + first.host_hit_length == namespace.start < len(key):
        rest = replace(params, key=_part(key, str(namespace), namespace.start, len(key)))
        with core.walks_from(first.best_match_node):
            found = _joined(first, core.match_prefix(rest))
    return found._replace(
        **{
            name: with_adapter(core, getattr(found, name), namespace)
            for name in ("last_device_node", "last_host_node", "best_match_node")
        }
    )


def insert(
    core: EloraTreeCore, walk: Callable[[InsertParams], InsertResult], params: InsertParams
) -> InsertResult:
    """Insert the KV of a request with an activated LoRA.

    Args:
        walk: Inserts KV of one namespace.
        params: Its key has an ``ActivatedNamespace``.
    """
    key, value, namespace = params.key, params.value, params.key.extra_key
    start = min(namespace.start, len(key))
    result = walk(
        replace(
            params,
            key=base_part(key),
            value=value[:start],
            prev_prefix_len=min(params.prev_prefix_len, start),
            inserted_len=min(params.inserted_len, start),
        )
    )
    if len(key) > start:
        rest = replace(
            params,
            key=_part(key, str(namespace), start, len(key)),
            value=value[start:],
            prev_prefix_len=max(params.prev_prefix_len - start, 0),
            inserted_len=max(params.inserted_len - start, 0),
        )
        with core.walks_from(result.last_device_node):
            below = walk(rest)
        result = replace(below, prefix_len=result.prefix_len + below.prefix_len)
    end = with_adapter(core, result.last_device_node, namespace)
    return replace(result, last_device_node=end)


def base_part(key: RadixKey) -> RadixKey:
    """The part of a key that KV of the base model has, in its namespace."""
    return _part(key, key.extra_key.base, 0, key.extra_key.start)


def _part(key: RadixKey, namespace: str | None, start: int, end: int) -> RadixKey:
    end = min(end, len(key))
    return RadixKey(key.token_ids[start:end], namespace, cache_salt=key.cache_salt)


def _joined(first: MatchResult, below: MatchResult) -> MatchResult:
    """The match of both walks. The second one's node is its root's if it found nothing."""
    return below._replace(
        device_prefix_len=first.device_prefix_len + below.device_prefix_len,
        last_device_node=(below if below.device_prefix_len else first).last_device_node,
        host_hit_length=first.host_hit_length + below.host_hit_length,
        full_kv_hit_length=first.full_kv_hit_length + below.full_kv_hit_length,
        cache_actions=[*first.cache_actions, *below.cache_actions],
        last_visited_node_id=below.last_visited_node_id or first.last_visited_node_id,
    )
