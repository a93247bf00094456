"""SGLang's features that ELORA does not support, and their error texts at start.

Each feature that involves the KV pool, the radix tree, the allocator or LoRA either works or has a
row here; docs/compatibility.md lists both. Conditions that the arguments do not show are checked
after the pool is built (``check_pool``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from sglang.srt.arg_groups.overrides import (
    declare_resolution,
    model_config_of,
    resolving_view,
    use_mla_backend,
)
from sglang.srt.environ import envs
from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

from sglang_elora.adapters import served_names
from sglang_elora.config import active_config
from sglang_elora.srt.arguments.model_kinds import (
    has_experts,
    has_states,
    has_whole_windows,
    is_served_hybrid,
    tells_window_size,
)
from sglang_elora.srt.lora.lora_backend import EXPERT_TARGETS, TORCH, TRITON

logger = logging.getLogger(__name__)

WITHOUT_ELORA = "run without --elora"
_DROP = "drop it, or run without --elora"
_RUNNERS_WITH_HOOKS = frozenset({"auto", "triton"})
_LORA_BACKENDS = frozenset({"csgmv", TORCH, TRITON})  # csgmv: SGLang's default
_IN_POOL = "adapters live in the KV pool"
_WITHOUT_EFFECT = {  # field: (its default, why it is not read)
    "max_loras_per_batch": (8, _IN_POOL),
    "lora_eviction_policy": ("lru", _IN_POOL),
    "radix_eviction_policy": ("lru", "--elora-policy orders KV and adapters together"),
}


def _adapts_experts_and(condition: Callable[[Any], bool], cfg: Any) -> bool:
    """Whether the condition holds and the target modules include those of a model's experts."""
    named = served_names(cfg.lora_target_modules or ())
    return ("all" in named or named >= EXPERT_TARGETS) and has_experts(cfg) and condition(cfg)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One unsupported feature.

    ``name`` is the flag as the user types it, formatted with the resolved arguments as ``cfg``;
    ``values`` is what stands for the value in docs/compatibility.md: those that are refused.
    """

    name: str
    applies: Callable[[Any], bool]  # takes the resolving view of ServerArgs
    why: str
    remedy: str = _DROP
    with_lora_only: bool = True
    values: str = ""

    def text(self, cfg: Any) -> str:
        return f"{self.name.format(cfg=cfg)}: {self.why}; {self.remedy}"


PARALLELISM = (
    Refusal(
        "--attn-dp-size {cfg.attn_dp_size} (or --enable-dp-attention)",
        lambda cfg: cfg.attn_dp_size > 1,
        "its ranks hold different batches, so they would place adapters differently",
        "use --dp-size alone, or run without --elora",
        values="above 1",
    ),
    Refusal(
        "--pp-size {cfg.pp_size}",
        lambda cfg: cfg.pp_size > 1,
        "an adapter's slots are laid out for all layers of the model, a stage has some",
        "use --tp-size, or run without --elora",
        values="above 1",
    ),
    Refusal(
        "--attn-cp-size {cfg.attn_cp_size} / --enable-prefill-cp",
        lambda cfg: cfg.attn_cp_size > 1 or cfg.enable_prefill_cp,
        "it spreads a request's rows and KV over ranks, the rows of adapters are not",
        "use --tp-size, or run without --elora",
        values="above 1",
    ),
    Refusal(
        "--dcp-size {cfg.dcp_size}",
        lambda cfg: cfg.dcp_size > 1,
        "each rank's pool holds a part of the slots, an adapter needs all of its own",
        "use --tp-size, or run without --elora",
        values="above 1",
    ),
    Refusal(
        "--enable-kv-cache-sharding",
        lambda cfg: cfg.enable_kv_cache_sharding,
        "each rank's pool holds a part of the pages, an adapter needs all of its own",
        "use --tp-size, or run without --elora",
    ),
    Refusal(
        "--enable-layernorm-sp",
        lambda cfg: cfg.enable_layernorm_sp,
        "it spreads a prompt's rows over ranks, the rows of adapters are not",
    ),
    Refusal(
        "--elastic-ep-backend {cfg.elastic_ep_backend}",
        lambda cfg: cfg.elastic_ep_backend is not None,
        "ranks come and go, adapters are cut for the ranks of the start",
    ),
    Refusal(
        "--enable-two-batch-overlap",
        lambda cfg: cfg.enable_two_batch_overlap,
        "it computes halves of a batch, the rows of adapters are laid out for all of it",
    ),
    Refusal(
        "--enable-pdmux",
        lambda cfg: cfg.enable_pdmux,
        "prefill and decode run at the same time, the LoRA backend knows one batch",
    ),
    Refusal(
        "--disaggregation-mode {cfg.disaggregation_mode}",
        lambda cfg: cfg.disaggregation_mode != "null",
        "KV arrives from another server before its adapter is on the device",
        WITHOUT_ELORA,
        values="prefill, decode",
    ),
    Refusal(
        "--use-ray",
        lambda cfg: cfg.use_ray,
        "SGLang starts Ray's schedulers without plugins",
        with_lora_only=False,
    ),
)

CACHES = (
    Refusal(
        "--disable-radix-cache (given, or set by SGLang for this model or another flag)",
        lambda cfg: cfg.disable_radix_cache,
        "adapters and KV live in the radix tree",
        "see SGLang's log for what set it, or run without --elora",
    ),
    Refusal(
        "--hicache-storage-backend {cfg.hicache_storage_backend}",
        lambda cfg: cfg.hicache_storage_backend is not None,
        "its keys outlive the content of an adapter, and KV enters the tree uncounted",
        "use --enable-hierarchical-cache without storage, or run without --elora",
        with_lora_only=False,
    ),
    Refusal(
        "--hicache-host-memory-mode buffer_only",
        lambda cfg: cfg.enable_hierarchical_cache and cfg.hicache_host_memory_mode == "buffer_only",
        "host memory has to keep the KV that leaves the device",
        "use mode cache, or run without --elora",
        with_lora_only=False,
    ),
    Refusal(
        "--enable-unified-cache-external-linker",
        lambda cfg: cfg.enable_unified_cache_external_linker,
        "KV enters the tree from an external store, uncounted, even if the adapter has changed",
        "use --enable-hierarchical-cache, or run without --elora",
        with_lora_only=False,
    ),
    Refusal(
        "--enable-lmcache",
        lambda cfg: cfg.enable_lmcache,
        "it has a radix cache of its own",
        "use --enable-hierarchical-cache, or run without --elora",
    ),
    Refusal(
        "--enable-flexkv",
        lambda cfg: cfg.enable_flexkv,
        "it has a radix cache of its own, whose keys do not name the adapter",
        "use --enable-hierarchical-cache, or run without --elora",
    ),
    Refusal(
        "--enable-session-radix-cache",
        lambda cfg: cfg.enable_session_radix_cache,
        "its references to KV do not survive the unloading of an adapter",
    ),
    Refusal(
        "--enable-page-major-kv-layout",
        lambda cfg: cfg.enable_page_major_kv_layout,
        "an adapter's slots are the same in every layer's own buffer",
    ),
    Refusal(
        "--enable-unified-memory",
        lambda cfg: cfg.enable_unified_memory,
        "its slots have no fixed place in the pool",
    ),
    Refusal(
        "--enable-hisparse",
        lambda cfg: cfg.enable_hisparse,
        "a part of the KV lies outside the pool",
    ),
    Refusal(
        "--kv-cache-dtype {cfg.kv_cache_dtype}",
        lambda cfg: cfg.kv_cache_dtype in ("mxfp8", "nvfp4", "fp4_mx_block16"),
        "each slot also has scales, which lie outside the pool",
        "use auto, bf16 or fp8, or run without --elora",
        values="mxfp8, nvfp4, fp4_mx_block16",
    ),
    Refusal(
        "--kv-canary {cfg.kv_canary}",
        lambda cfg: cfg.kv_canary != "none",
        "it would take the slots of adapters for KV",
        "use --elora-check, or run without --elora",
        values="other than none",
    ),
    Refusal(
        "SGLANG_USE_HND_KVCACHE=1",
        lambda _: envs.SGLANG_USE_HND_KVCACHE.get(),
        "slots are not contiguous in this layout of the pool",
        "unset it, or run without --elora",
    ),
    Refusal(
        "SGLANG_AITER_KV_CACHE_LAYOUT=vectorized_5d",
        lambda _: envs.SGLANG_AITER_KV_CACHE_LAYOUT.get().lower() == "vectorized_5d",
        "slots are not contiguous in this layout of the pool",
        "unset it, or run without --elora",
    ),
    Refusal(
        "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING=1",
        lambda _: envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.get(),
        "the pool would get its size after adapters have been placed",
        "unset it, or run without --elora",
    ),
)

SCHEDULING = (
    Refusal(
        "--speculative-algorithm {cfg.speculative_algorithm}",
        lambda cfg: cfg.speculative_algorithm not in (None, "NGRAM", "UNO"),
        "a draft model has KV of its own in the pool's slots, which is untested with adapters",
        "use --speculative-algorithm NGRAM, or run without --elora",
        values="other than NGRAM and UNO",
    ),
    Refusal(
        "--speculative-algorithm UNO",
        lambda cfg: cfg.speculative_algorithm == "UNO",
        "it keeps a LoRA adapter in a memory pool of its own",
        with_lora_only=False,
    ),
    Refusal(
        "--decoupled-spec-role {cfg.decoupled_spec_role}",
        lambda cfg: cfg.decoupled_spec_role != "null",
        "drafts come from another server, which was not tested with adapters",
        values="other than null",
    ),
    Refusal(
        "--dllm-algorithm {cfg.dllm_algorithm}",
        lambda cfg: cfg.dllm_algorithm is not None,
        "KV of a diffusion model does not belong to a prefix of tokens, and SGLang turns LoRA off",
        with_lora_only=False,
    ),
)

LORA = (
    Refusal(
        "--lora-backend {cfg._raw_input[lora_backend]}",
        lambda cfg: cfg._raw_input["lora_backend"] not in _LORA_BACKENDS,
        "ELORA has its own, because weights lie in the KV pool",
        values="triton, triton_v2, torch_native, ascend",
    ),
    Refusal(
        "--enable-lora-overlap-loading",
        lambda cfg: cfg.enable_lora_overlap_loading,
        "it loads into slots that do not exist, ELORA loads adapters itself",
    ),
    Refusal(
        "--lora-drain-wait-threshold {cfg.lora_drain_wait_threshold}",
        lambda cfg: cfg.lora_drain_wait_threshold > 0,
        "it drains slots that do not exist; ELORA bounds how many requests may pass a waiting one",
        values="above 0",
    ),
    Refusal(
        "--moe-runner-backend {cfg.moe_runner_backend}",
        lambda cfg: cfg.moe_runner_backend.startswith("lora_"),
        "it reads adapters from slots that do not exist",
        values="lora_*",
    ),
    Refusal(
        "--enable-nvidia-megakernel",
        lambda cfg: cfg.enable_nvidia_megakernel,
        "its kernels replace the model's layers, and LoRA with them",
    ),
    Refusal(
        "--enable-amd-monokernel",
        lambda cfg: cfg.enable_amd_monokernel,
        "its kernels replace the model's layers, and LoRA with them",
    ),
    Refusal(
        "--lora-use-virtual-experts",
        lambda cfg: cfg.lora_use_virtual_experts,
        "its kernels read adapters from slots that do not exist",
    ),
    Refusal(
        "--experts-shared-outer-loras",
        lambda cfg: bool(cfg.experts_shared_outer_loras),
        "an adapter has matrices for each expert, as PEFT saves them",
    ),
    *(
        Refusal(
            f"{flag} with experts in --lora-target-modules",
            partial(_adapts_experts_and, condition),
            why,
            f"drop it, or name modules of attention only, or {WITHOUT_ELORA}",
            values=values,
        )
        for flag, condition, why, values in (
            (
                "--moe-runner-backend {cfg.moe_runner_backend}",
                lambda cfg: cfg.moe_runner_backend not in _RUNNERS_WITH_HOOKS,
                "LoRA needs hooks, which Triton's runner has",
                "other than auto and triton",
            ),
            (
                "--moe-a2a-backend {cfg.moe_a2a_backend}",
                lambda cfg: cfg.moe_a2a_backend != "none",
                "tokens reach the experts in another order",
                "other than none",
            ),
            (
                "--ep-size {cfg.ep_size}",
                lambda cfg: cfg.ep_size > 1,
                "a rank has some of the experts, an adapter's pages have all",
                "above 1",
            ),
            (
                "--enable-eplb / --init-expert-location / --ep-num-redundant-experts",
                lambda cfg: (
                    cfg.enable_eplb
                    or cfg.init_expert_location != "trivial"
                    or cfg.ep_num_redundant_experts > 0
                ),
                "experts are not where their numbers say",
                "",
            ),
        )
    ),
)

MODELS = (
    Refusal(
        "this model (multi-head latent attention without q_lora_rank)",
        lambda cfg: (
            use_mla_backend(cfg)
            and getattr(model_config_of(cfg).hf_text_config, "q_lora_rank", None) is None
        ),
        "SGLang's LoRA does not know its projections",
        WITHOUT_ELORA,
    ),
    Refusal(
        "this model (sliding windows and full attention, of a class that does not tell their size)",
        lambda cfg: has_whole_windows(cfg) and not tells_window_size(cfg),
        "SGLang knows its windows only if they have a KV pool of their own",
        "drop --disable-hybrid-swa-memory, --enable-hierarchical-cache and "
        "--speculative-algorithm, or run without --elora",
    ),
    Refusal(
        "this model (state spaces or linear attention)",
        lambda cfg: has_states(cfg) and not is_served_hybrid(cfg),
        "of this kind only Qwen3.5, Nemotron-H and Falcon-H1 were tested with adapters",
        WITHOUT_ELORA,
    ),
    Refusal(
        "--enable-hierarchical-cache with linear attention or state spaces",
        lambda cfg: cfg.enable_hierarchical_cache and has_states(cfg),
        "states of layers without KV are not copied to the host",
    ),
    Refusal(
        "--speculative-algorithm {cfg.speculative_algorithm} with linear attention or state spaces",
        lambda cfg: cfg.speculative_algorithm is not None and has_states(cfg),
        "states of drafted tokens were not tested with adapters",
        values="any",
    ),
    Refusal(
        "this model (encoder and decoder)",
        lambda cfg: model_config_of(cfg).is_encoder_decoder,
        "a part of its KV is the encoder's, not that of a prefix of tokens",
        WITHOUT_ELORA,
    ),
)

REFUSALS = (*PARALLELISM, *CACHES, *SCHEDULING, *LORA, *MODELS)


def adapts_mlp(cfg: Any) -> bool:
    """Whether the target modules may include those of MLPs: by name, all, or those of adapters."""
    named = served_names(cfg.lora_target_modules or ())
    return not named or "all" in named or bool(named & EXPERT_TARGETS)


def wants_lora(cfg: Any) -> bool:
    """Whether LoRA is on, by SGLang's rule: --lora-paths alone turns it on."""
    return bool(cfg.enable_lora or (cfg.enable_lora is None and cfg.lora_paths))


def check_compatible(server_args: Any) -> None:
    """Refuse unsupported features. Runs before ``check_server_args``, on resolved arguments.

    Raises:
        ValueError: Flags or the model are not supported, with one line for each; or a flag of
            ELORA lacks another flag that it needs.
    """
    cfg = resolving_view(server_args)
    lora = wants_lora(cfg)
    problems = [
        refusal.text(cfg)
        for refusal in REFUSALS
        if (lora or not refusal.with_lora_only) and refusal.applies(cfg)
    ]
    if problems:
        raise ValueError("--elora does not run with:\n" + "\n".join(f"  {p}" for p in problems))
    if active_config().adapter_events and not (lora and cfg.kv_events_config):
        raise ValueError("--elora-adapter-events needs --enable-lora and --kv-events-config")
    if lora:
        _ignore_without_effect(server_args)
        if has_whole_windows(cfg):
            logger.info(
                "KV of layers with sliding windows is kept for whole prompts, in one pool with "
                "that of the others (--disable-hybrid-swa-memory)"
            )


def run_eagerly(server_args: Any) -> None:
    """Disable CUDA graphs, which cannot replay ``elora_torch``."""
    graphs = resolving_view(server_args).cuda_graph_config
    if graphs is None:
        return
    phases = (Phase.DECODE, Phase.PREFILL)
    for phase in phases:
        graphs = with_phase(graphs, phase, backend=Backend.DISABLED)
    declare_resolution(server_args, "sglang_elora", cuda_graph_config=graphs)
    # Locked like a choice of the user, so that later steps do not change it.
    server_args._cuda_graph_config_locked |= {(phase, "backend") for phase in phases}


def check_pool(ctx: Any) -> None:
    """Refuse a KV pool that cannot hold adapters.

    Args:
        ctx: SGLang's ``TreeCacheBuildContext`` of a server with LoRA.

    Raises:
        ValueError: The pool is not supported; ``check_compatible`` finds most such cases before
            the model is loaded.
    """
    from sglang_elora.srt.mem_cache.kv_pool import why_unsupported

    if ctx.disable_radix_cache:
        reason: str | None = "the radix cache is off"
    else:
        reason = why_unsupported(ctx.params.token_to_kv_pool_allocator)
    if reason is not None:
        raise ValueError(f"--elora does not run here: {reason}; {WITHOUT_ELORA}")


def _ignore_without_effect(server_args: Any) -> None:
    """Accept and log flags of SGLang's LoRA pool and eviction policies, which have no effect."""
    cfg = resolving_view(server_args)
    for field, (default, why) in _WITHOUT_EFFECT.items():
        if (value := getattr(cfg, field)) != default:
            logger.info(
                "--%s %s has no effect: with --elora %s", field.replace("_", "-"), value, why
            )
    limit = cfg.max_loaded_loras
    if limit is not None and 0 < limit < cfg.max_loras_per_batch:
        # SGLang requires at least as many loaded adapters as slots.
        declare_resolution(server_args, "sglang_elora", max_loras_per_batch=limit)
