"""Requests with activated LoRAs wait while another request computes the prompt that they share.

A program that asks several adapters about one conversation sends these requests together. If the
conversation is not cached, each of them would compute it in the same batch. So the first one is
admitted, and the others are skipped until its KV is in the tree, where they find it. (Requests of
the base model and of plain LoRAs are batched as in SGLang.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_elora.tree import ActivatedAdapter, ActivatedNamespace

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_elora.srt.mem_cache.tree_core import EloraTreeCore

MIN_SHARED = 64
"""Fewest shared tokens for which a request waits; computing fewer takes less than a batch."""


class SharedPrompts:
    """Which requests compute KV of the base model now, and who should wait for it. Equal on all
    tensor-parallel ranks."""

    def __init__(self, core: EloraTreeCore) -> None:
        self._core = core
        self._computing: list[Req] = []

    def begin_pass(self) -> None:
        """Forget requests whose KV is in the tree now, or that ended. O(requests of a batch)."""
        self._computing = [
            req
            for req in self._computing
            if req.kv.holds_kv and not (req.output_ids or req.finished())
        ]

    def taken(self, req: Req) -> None:
        """Record a request of the next batch."""
        req.elora_waits_for = None  # otherwise chains of ended requests would stay in memory
        num_base = _num_base(req)
        if num_base >= MIN_SHARED and num_base - req.prefix_len >= MIN_SHARED:
            self._computing.append(req)

    def waits(self, req: Req) -> bool:
        """Whether the request should be skipped in this pass: another one computes at least half of
        what it would compute."""
        if not (self._computing and isinstance(req.lora_id, ActivatedAdapter)):
            return False
        if getattr(req, "elora_waits_for", None) in self._computing:
            return True
        req.elora_waits_for = self._find(req)
        if req.elora_waits_for is None:
            return False
        self._core.counts.requests_waited_for_prompt += 1
        return True

    def _find(self, req: Req) -> Req | None:
        base, num_base, tokens = _base_of(req), _num_base(req), req.origin_input_ids
        key = RadixKey(tokens, base, limit=num_base, cache_salt=req.cache_salt)
        found, node_id, _ = self._core.match_full_device_prefix(key)
        rest = RadixKey(tokens[found:num_base])
        fewest = max(MIN_SHARED, (len(tokens) - found) / 2)
        if len(rest) < fewest:
            return None
        for other in self._computing:
            if (
                other.last_node == node_id
                and (_base_of(other), other.cache_salt) == (base, req.cache_salt)
                and rest.match(RadixKey(other.origin_input_ids[found : _num_base(other)])) >= fewest
            ):
                return other
        return None


def _num_base(req: Req) -> int:
    """Tokens of the prompt, from its start, whose KV is the base model's."""
    if isinstance(req.lora_id, ActivatedAdapter):
        return req.lora_id.start
    return len(req.origin_input_ids) if req.lora_id is None else 0


def _base_of(req: Req) -> str | None:
    """The namespace of that KV."""
    namespace: str | None = req.extra_key
    return namespace.base if isinstance(namespace, ActivatedNamespace) else namespace
