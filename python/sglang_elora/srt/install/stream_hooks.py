"""Hooks of ``--elora-check-streams``, on all operations that run on separate streams."""

from __future__ import annotations

from sglang.srt.plugins.hook_registry import HookType

from sglang_elora.srt.install.hook import Hook, When
from sglang_elora.srt.scheduler import stream_check

_RUNS_THERE = "Operations are plain calls; no device is between the caller and them."
_FREES_THERE = "Memory is handed back by plain calls."

STREAM_HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.init_overlap",
        ("self",),
        HookType.AFTER,
        stream_check.mark_scheduler_streams,
        When.STREAMS,
        "The scheduler makes its streams itself.",
    ),
    Hook(
        "sglang.srt.mem_cache.pool_host.base.HostKVCache.load_to_device_per_layer_physical",
        ("self", "device_pool", "host_indices", "device_indices", "layer_id"),
        HookType.AROUND,
        stream_check.load_kv,
        When.STREAMS,
        _RUNS_THERE,
    ),
    Hook(
        "sglang.srt.mem_cache.pool_host.base.HostKVCache.backup_from_device_all_layer_physical",
        ("self", "device_pool", "host_indices", "device_indices"),
        HookType.AROUND,
        stream_check.back_up_kv,
        When.STREAMS,
        _RUNS_THERE,
    ),
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.forward",
        ("self", "forward_batch"),
        HookType.AROUND,
        stream_check.run_forward,
        When.STREAMS,
        _RUNS_THERE,
    ),
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.sample",
        ("self", "logits_output", "forward_batch"),
        HookType.AROUND,
        stream_check.run_sampling,
        When.STREAMS,
        _RUNS_THERE,
    ),
    Hook(
        "sglang.srt.managers.overlap_utils.FutureMap.stash",
        ("self", "future_indices", "payload"),
        HookType.AROUND,
        stream_check.relay_tokens,
        When.STREAMS,
        _RUNS_THERE,
    ),
    Hook(
        "sglang.srt.managers.scheduler.resolve_forward_inputs",
        ("batch", "future_map"),
        HookType.BEFORE,
        stream_check.finish_batch_before,
        When.STREAMS,
        _RUNS_THERE,
    ),
    Hook(
        "sglang.srt.mem_cache.allocator.token.TokenToKVPoolAllocator.free",
        ("self", "free_index"),
        HookType.BEFORE,
        stream_check.poison_freed_slots,
        When.STREAMS,
        _FREES_THERE,
    ),
    Hook(
        "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator._release_page_ids",
        ("self", "page_ids"),
        HookType.BEFORE,
        stream_check.poison_freed_pages,
        When.STREAMS,
        _FREES_THERE,
    ),
    Hook(
        "sglang.srt.mem_cache.pool_host.base.HostKVCache.free",
        ("self", "indices"),
        HookType.BEFORE,
        stream_check.poison_freed_host_slots,
        When.STREAMS,
        _FREES_THERE,
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        ("self", "recv_req"),
        HookType.AFTER,
        stream_check.add_statistics,
        When.STREAMS,
        "/server_info has no registry of sections.",
    ),
)
