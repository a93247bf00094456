"""The table of all hooks on SGLang's server.

Hooks on SGLang's frontend language, which a server does not use, are in ``frontend/hooks.py``.

A hook is used only if a registry or a subclass is not possible (patches come last); each row gives
the reason. ``srt/install/install.py`` applies the rows that the configuration selects.
"""

from __future__ import annotations

from sglang.srt.plugins.hook_registry import HookType

from sglang_elora.config import EloraConfig
from sglang_elora.srt import messages, orders
from sglang_elora.srt.arguments import compatibility, selection
from sglang_elora.srt.install.endpoint_hooks import ENDPOINT_HOOKS
from sglang_elora.srt.install.hook import Hook, When
from sglang_elora.srt.install.scheduler_hooks import SCHEDULER_HOOKS
from sglang_elora.srt.install.stream_hooks import STREAM_HOOKS
from sglang_elora.srt.lora import adapter_weights, experts, lora_manager
from sglang_elora.srt.mem_cache import link
from sglang_elora.srt.scheduler import (
    logits_check,
    scheduler_control,
    sessions,
)
from sglang_elora.srt.tokenizer import (
    adapter_dir,
    adapter_loading,
    adapter_sources,
    adapter_uses,
    memory_release,
    named_adapters,
    request_checks,
    request_hints,
    workers,
)

HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.arg_groups.platform_hook.handle_platform_defaults",
        ("server_args",),
        HookType.AFTER,
        selection.select_parts,
        When.ELORA,
        "Only a platform can give server arguments a default, and on CUDA the platform is "
        "SGLang's own.",
    ),
    Hook(
        "sglang.srt.arg_groups.validation_hook.check_server_args",
        ("server_args",),
        HookType.BEFORE,
        compatibility.check_compatible,
        When.ELORA,
        "Server-argument checks have no registry, and SGLang's own demand LoRA slots that do not "
        "exist.",
    ),
    Hook(
        "sglang.srt.arg_groups.lora_hook.check_lora_server_args",
        ("server_args",),
        HookType.AFTER,
        adapter_loading.drop_bad_start_adapters,
        When.ELORA,
        "Server-argument checks have no registry, and one bad adapter in --lora-paths ends the "
        "server only after the model has been loaded.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.load_lora_adapter",
        ("self", "obj", "_"),
        HookType.AROUND,
        adapter_loading.check_before_load,
        When.ELORA,
        "Adapter loading has no validator to register; the scheduler finds a wrong shape only at "
        "the first forward pass, where it is fatal.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"
        ".release_memory_occupation",
        ("self", "obj", "request"),
        HookType.AROUND,
        memory_release.check_release,
        When.ELORA,
        "Endpoints have no registry of what they need; the scheduler asserts, and ends.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"
        ".resume_memory_occupation",
        ("self", "obj", "request"),
        HookType.AROUND,
        memory_release.check_resume,
        When.ELORA,
        "As above.",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
        ".release_memory_occupation",
        ("self", "recv_req"),
        HookType.AROUND,
        memory_release.release_if_idle,
        When.ELORA,
        "As above.",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
        ".resume_memory_occupation",
        ("self", "recv_req"),
        HookType.AROUND,
        memory_release.resume_if_released,
        When.ELORA,
        "As above.",
    ),
    Hook(
        "sglang.srt.managers.tp_worker.BaseTpWorker.load_lora_adapter_from_tensors",
        ("self", "recv_req"),
        HookType.AROUND,
        adapter_loading.load_tensors_on_all_ranks,
        When.ELORA,
        "The scheduler lets an error of what a client sent end the process, of one rank or all.",
    ),
    Hook(
        "sglang.srt.lora.lora_manager.LoRAManager.load_lora_adapter_from_tensors",
        ("self", "lora_ref", "tensors", "config_dict"),
        HookType.AROUND,
        adapter_loading.check_before_load_from_tensors,
        When.ELORA,
        "As above; these tensors are unpacked in the scheduler only.",
    ),
    *(
        Hook(
            f"sglang.srt.managers.io_struct.{kind}.normalize_batch_and_arguments",
            ("self",),
            HookType.AFTER,
            body,
            When.ELORA,
            "Request validation has no registry; endpoints make these requests in their methods.",
        )
        for kind in ("GenerateReqInput", "EmbeddingReqInput")
        for body in (named_adapters.use_named, request_checks.check_shape)  # in this order
    ),
    *(
        Hook(
            f"sglang.srt.managers.io_struct.{kind}.normalize_batch_and_arguments",
            ("self",),
            HookType.AROUND,
            request_checks.raise_value_errors,
            When.ELORA,
            "As above; what does not fit is asserted there.",
        )
        for kind in ("GenerateReqInput", "EmbeddingReqInput")
    ),
    *(
        Hook(
            f"sglang.srt.managers.scheduler.Scheduler.handle_{kind}_request",
            ("self", "recv_req"),
            HookType.AROUND,
            request_checks.refuse_alone,
            When.ELORA,
            "The scheduler lets an error of one request end the process.",
        )
        for kind in ("generate", "embedding")
    ),
    Hook(
        "sglang.srt.layers.sampler.Sampler.forward",
        ("self", "logits_output"),
        HookType.BEFORE,
        logits_check.replace_rows_without_numbers,
        When.ELORA,
        "SGLang's own sanitizing (SGLANG_SANITIZE_NAN_LOGITS) goes on with invented tokens.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler._relay_forward_payload",
        ("self", "batch", "future_indices", "batch_result"),
        HookType.AFTER,
        logits_check.tell_host_of_marked_rows,
        When.ELORA,
        "As above.",
    ),
    Hook(
        "sglang.srt.managers.schedule_batch.Req._check_vocab_boundary_finish",
        ("self", "new_accepted_tokens"),
        HookType.AROUND,
        logits_check.end_with_the_reason,
        When.ELORA,
        "As above.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.init_lora",
        ("self",),
        HookType.AFTER,
        adapter_uses.attach,
        When.ELORA,
        "The tokenizer manager names the registry's class itself.",
    ),
    Hook(
        "sglang.srt.managers.multi_tokenizer_mixin.MultiTokenizerRouter"
        "._distribute_result_to_workers",
        ("self", "recv_obj"),
        HookType.AROUND,
        workers.pass_on,
        When.ELORA,
        "The router sends a message to all tokenizer workers for pauses only.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._handle_batch_request",
        ("self", "obj", "request"),
        HookType.AROUND,
        adapter_uses.forget_what_was_never_sent,
        When.ELORA,
        "Nobody is told when a request is over.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.unload_lora_adapter",
        ("self", "obj", "_"),
        HookType.AROUND,
        adapter_uses.forget_path,
        When.ELORA,
        "The table of adapters to load again is SGLang's own.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_and_resolve_lora",
        ("self", "obj"),
        HookType.BEFORE,
        request_checks.check_values,
        When.ELORA,
        "Request validation has no registry.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
        ("self", "obj", "input_ids"),
        HookType.BEFORE,
        request_checks.check_tokens,
        When.ELORA,
        "Request validation has no registry.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_and_resolve_lora",
        ("self", "obj"),
        HookType.BEFORE,
        request_hints.announce_native,
        When.ELORA,
        "As above; this is the last step before a prompt is tokenized.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._resolve_lora_path",
        ("self", "obj"),
        HookType.AROUND,
        adapter_sources.find_named,
        When.ELORA,
        "The registry of adapters knows only what was loaded, and takes no resolver.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.init_request_dispatcher",
        ("self",),
        HookType.AFTER,
        request_hints.attach,
        When.ELORA,
        "SGLang lists its message types in the method; hook_custom_types only makes ours "
        "decodable.",
    ),
    Hook(
        "sglang.srt.managers.communicator.FanOutCommunicator.__call__",
        ("self", "obj"),
        HookType.AROUND,
        orders.raise_failure,
        When.ELORA,
        "Answers are of SGLang's classes, not all of which can tell a failure.",
    ),
    Hook(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.auto_create_handle_loop",
        ("self",),
        HookType.AFTER,
        adapter_dir.begin,
        When.ELORA,
        "The tokenizer manager is built where no event loop runs yet, and lists its tasks in the "
        "method.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher",
        ("self",),
        HookType.AFTER,
        scheduler_control.add_to_dispatcher,
        When.ELORA,
        "As above.",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.close_session",
        ("self", "recv_req"),
        HookType.BEFORE,
        sessions.close,
        When.ELORA,
        "Caches hear of it with --enable-session-radix-cache only, which has an eviction order of "
        "its own.",
    ),
    Hook(
        "sglang.srt.session.session_controller.Session.create_req",
        ("self", "req"),
        HookType.BEFORE,
        sessions.keep_adapter,
        When.ELORA,
        "A session does not look at the adapter of its turns.",
    ),
    Hook(
        "sglang.srt.managers.scheduler_components.request_receiver.sock_recv",
        ("socket", "flags"),
        HookType.AROUND,
        messages.receive,
        When.ELORA,
        "The receive loop lets a decoding error end the process.",
    ),
    Hook(
        "sglang.srt.lora.lora_config.LoRAConfig.__init__",
        ("self", "path"),
        HookType.AFTER,
        adapter_weights.read_one_rank,
        When.ELORA,
        "The LoRA manager names the class itself, and reads its fields everywhere.",
    ),
    Hook(
        "sglang.srt.lora.lora.LoRAAdapter.__init__",
        ("self", "uid", "config"),
        HookType.AFTER,
        adapter_weights.scale_rslora,
        When.ELORA,
        "The LoRA manager names the class itself, and the scaling rule is inside __init__.",
    ),
    Hook(
        "sglang.srt.lora.lora.LoRAAdapter._normalize_weights",
        ("self",),
        HookType.BEFORE,
        adapter_weights.complete_fused_modules,
        When.ELORA,
        "The LoRA manager names the class itself, so a subclass cannot be handed in.",
    ),
    Hook(
        "sglang.srt.lora.mem_pool.get_stacked_multiply",
        ("module_name", "base_model"),
        HookType.AROUND,
        adapter_weights.stacked_parts,
        When.ELORA,
        "The table of stacked modules is inside the function.",
    ),
    Hook(
        "sglang.srt.lora.lora_manager.auto_detect_lora_target_modules",
        ("model",),
        HookType.AFTER,
        adapter_weights.add_undetected,
        When.ELORA,
        "The table of known modules is a constant of SGLang's.",
    ),
    Hook(
        "sglang.srt.lora.lora_manager.LoRAManager",
        ("base_model", "base_hf_config", "max_loras_per_batch"),
        HookType.REPLACE,
        lora_manager.EloraLoRAManager,
        When.ELORA,
        "The model runner names the class itself; a subclass takes its place.",
    ),
    Hook(
        "sglang.srt.lora.lora_moe_runners.build_lora_hooks",
        ("hidden_states", "lora_info", "topk_ids"),
        HookType.REPLACE,
        experts.hooks_of,
        When.ELORA,
        "The runner of experts takes hooks, but builds them itself.",
    ),
    *SCHEDULER_HOOKS,
    Hook(
        "sglang.srt.lora.mem_pool.copy_weight_into_buffer",
        ("buffer_view", "weight"),
        HookType.BEFORE,
        link.delay_adapter_copy,
        When.STOCK_LINK,
        "Weight copies are plain function calls.",
    ),
    Hook(
        "sglang.srt.mem_cache.pool_host.base.HostKVCache.load_to_device_per_layer_physical",
        ("self", "device_pool", "host_indices", "device_indices", "layer_id"),
        HookType.BEFORE,
        link.delay_kv_load,
        When.LINK,
        "Host pools are chosen by KV layout, with no registry in between.",
    ),
    Hook(
        "sglang.srt.mem_cache.pool_host.base.HostKVCache.backup_from_device_all_layer_physical",
        ("self", "device_pool", "host_indices", "device_indices", "io_backend"),
        HookType.BEFORE,
        link.delay_kv_backup,
        When.LINK,
        "As above.",
    ),
    Hook(
        "sglang.srt.mem_cache.l2_transfer.L2TransferEngine.__init__",
        ("self", "io_backend"),
        HookType.AFTER,
        link.mark_kv_streams,
        When.COPY_STREAMS,
        "The transfer engine makes its copy streams itself.",
    ),
    Hook(
        "sglang.srt.lora.lora_overlap_loader.LoRAOverlapLoader.__init__",
        ("self", "lora_manager"),
        HookType.AFTER,
        link.mark_adapter_stream,
        When.LINK,
        "The overlap loader makes its copy stream itself.",
    ),
    *ENDPOINT_HOOKS,
    *STREAM_HOOKS,
)


def selected_hooks(config: EloraConfig) -> tuple[Hook, ...]:
    return tuple(hook for hook in HOOKS if hook.when.selected_by(config))
