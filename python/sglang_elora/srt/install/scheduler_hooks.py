"""Hooks on the scheduler's steps: admission of requests, batches, and checks after them."""

from __future__ import annotations

from sglang.srt.plugins.hook_registry import HookType

from sglang_elora.srt.install.hook import Hook, When
from sglang_elora.srt.scheduler import admission, batch_times, invariants, state, swapper
from sglang_elora.srt.tokenizer import request_checks

SCHEDULER_HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder.__init__",
        ("self", "page_size", "tree_cache"),
        HookType.AFTER,
        admission.begin_pass,
        When.ELORA,
        "The scheduler names the class itself, and asks about adapters without the budget.",
    ),
    Hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        ("self", "req", "has_chunked_req"),
        HookType.AFTER,
        admission.note_taken,
        When.ELORA,
        "The cache is told of matches, which are many per request, not of a request taken.",
    ),
    Hook(
        "sglang.srt.managers.schedule_policy.PrefillAdder.preempt_to_schedule",
        ("self", "req"),
        HookType.AROUND,
        admission.preempt,
        When.ELORA,
        "It evicts after a request was admitted and before it locks its adapter.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run",
        ("self", "running_batch", "last_batch"),
        HookType.BEFORE,
        swapper.step,
        When.ELORA,
        "Only caches with a host tier of KV are called in every iteration of the scheduler.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.on_idle",
        ("self",),
        HookType.AFTER,
        swapper.idle,
        When.ELORA,
        "The scheduler asks nobody while requests wait and none can run.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.maybe_sleep_on_idle",
        ("self",),
        HookType.AROUND,
        swapper.sleep_on_idle,
        When.ELORA,
        "With --sleep-on-idle the scheduler wakes up for messages, not for a file that is read.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.can_schedule_lora_req",
        ("self", "req", "running_loras"),
        HookType.REPLACE,
        admission.admit,
        When.ELORA,
        "Admission has no registry; SGLang's counts slots that do not exist.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens",
        ("self", "req"),
        HookType.AFTER,
        request_checks.refuse_no_tokens,
        When.ELORA,
        "Request validation has no registry.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.init_req_max_new_tokens",
        ("self", "req"),
        HookType.AFTER,
        admission.refuse_too_long,
        When.ELORA,
        "The length check knows the size of the pool, not what the request's adapter takes of it.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue",
        ("self", "req"),
        HookType.BEFORE,
        admission.refuse_too_long_embedding,
        When.ELORA,
        "Embedding requests pass no other step between their length check and the queue.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        ("self", "recv_req"),
        HookType.AFTER,
        state.add_statistics,
        When.ELORA,
        "/server_info has no registry of sections.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.run_batch",
        ("self", "batch"),
        HookType.AROUND,
        batch_times.time_batch,
        When.ELORA,
        "Nobody else is told when a batch begins.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.run_batch",
        ("self", "batch"),
        HookType.AFTER,
        swapper.prepare,
        When.ELORA,
        "As above: what need not be done before a batch is done while the device is at work.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        ("self", "batch", "result"),
        HookType.AFTER,
        batch_times.note_result,
        When.ELORA,
        "Nobody else is told when a batch is over.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        ("self", "batch", "result"),
        HookType.AFTER,
        invariants.check_step,
        When.CHECK,
        "SGLang's own checks run on idle or by an environment variable, and know no adapters.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.on_idle",
        ("self",),
        HookType.AFTER,
        invariants.check_step,
        When.CHECK,
        "As above.",
    ),
)
