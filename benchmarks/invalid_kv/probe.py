"""An SGLang plugin that records, every few steps, how much KV on the device is valid and invalid.

It runs in the scheduler process of an otherwise unchanged server. KV is invalid if its adapter
is not on the device: a request cannot use it before the adapter has been loaded again. The probe
walks the tree node by node, so SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND must be ``python``; it does
not rely on the server's own counts. The trace sends no ``extra_key``, so a node's namespace is its
adapter.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

OUT = "INVALID_KV_PROBE_OUT"
EVERY = "INVALID_KV_PROBE_EVERY"


class Probe:
    """Sampler in one scheduler. A row also has the events of the steps since the previous row."""

    def __init__(self, path: Path, every: int) -> None:
        self._path = path
        self._every = every
        self._step = 0
        self._adapters_in_batch = 0

    def after_step(self, _result: Any, scheduler: Any, batch: Any, *_: Any) -> None:
        """AFTER ``Scheduler.process_batch_result``: the batch's KV is in the tree by now."""
        if self._step == 0:
            self._write({"bytes": device_bytes(scheduler)})
        self._step += 1
        adapters = {req.lora_id for req in batch.reqs if req.lora_id is not None}
        self._adapters_in_batch = max(self._adapters_in_batch, len(adapters))
        if self._step % self._every == 0:
            row = {"step": self._step, "adapters_in_batch": self._adapters_in_batch}
            self._write({**row, **sample(scheduler)})
            self._adapters_in_batch = 0

    def _write(self, row: dict[str, Any]) -> None:
        with self._path.open("a") as out:
            out.write(json.dumps(row) + "\n")


def sample(scheduler: Any) -> dict[str, int]:
    """Slots of the KV pool by content, and the number of adapters on the device."""
    kv, adapters = contents(scheduler.tree_cache.tree_core.root_node)
    slab = _lora_pool(scheduler).uid_to_buffer_id
    resident = set(adapters) or {adapter_id for adapter_id in slab if adapter_id is not None}
    allocator = scheduler.token_to_kv_pool_allocator
    cached, adapter_slots = kv.total(), sum(adapters.values())
    return {
        "kv_tokens_device": cached,
        "kv_tokens_invalid": sum(
            tokens
            for adapter_id, tokens in kv.items()
            if adapter_id is not None and adapter_id not in resident
        ),
        "kv_tokens_uncached": allocator.size - allocator.available_size() - cached - adapter_slots,
        "adapter_slots": adapter_slots,
        "adapters_resident": len(resident),
    }


def contents(root: Any) -> tuple[Counter[str | None], Counter[str | None]]:
    """By adapter id (None is the base model): KV tokens, and slots of adapters in the tree.

    A node whose key has no tokens is ELORA's node of an adapter; its value is the adapter's slots.
    """
    kv: Counter[str | None] = Counter()
    adapters: Counter[str | None] = Counter()
    stack = list(root.children.values())
    while stack:
        node = stack.pop()
        stack += node.children.values()
        value = node.component_data[0].value
        if value is not None and len(value) > 0:
            adapter_id = adapter_of(node.key.extra_key)
            (kv if len(node.key) > 0 else adapters)[adapter_id] += len(value)
    return kv, adapters


def adapter_of(namespace: str | None) -> str | None:
    """Stock's namespace is the id, ELORA's is ``lora//<id>``."""
    return namespace and namespace.removeprefix("lora//")


def device_bytes(scheduler: Any) -> dict[str, int]:
    """Bytes allocated on the device for KV and for adapters."""
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    lora = _lora_pool(scheduler)
    matrices = [
        m for b in (lora.A_buffer, lora.B_buffer) for by_layer in b.values() for m in by_layer
    ]
    return {
        "kv_pool": sum(plane.nbytes for plane in (*pool.k_buffer, *pool.v_buffer)),
        "adapter_slab": sum(getattr(matrix, "nbytes", 0) for matrix in matrices),
    }


def _lora_pool(scheduler: Any) -> Any:
    return scheduler.tp_worker.model_runner.lora_manager.memory_pool


def load() -> None:
    """Entry point ``sglang.srt.plugins``; only a scheduler ever calls the hooked method."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    probe = Probe(Path(os.environ[OUT]), int(os.environ[EVERY]))
    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        probe.after_step,
        HookType.AFTER,
    )
