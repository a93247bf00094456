"""Features that do not run with ELORA are refused at start, all at once, with reason and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.harness.programs import source
from tests.harness.run_python import RunPython

LORA = ("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "q_proj", "o_proj")
ATTENTION = ["qkv_proj", "o_proj"]
EXPERTS: dict[str, Any] = {"model": {"num_experts": 8}, "lora_target_modules": ["all"]}
HYBRID: dict[str, Any] = {
    "model": {"architectures": ["Qwen3_5ForCausalLM"]},
    "uses_mamba_radix_cache": True,
}

# What is changed in the resolved arguments (or "env", "raw", "model") -> how its line begins.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"attn_dp_size": 2}, "--attn-dp-size 2 (or --enable-dp-attention): "),
    ({"enable_kv_cache_sharding": True}, "--enable-kv-cache-sharding: "),
    ({"enable_layernorm_sp": True}, "--enable-layernorm-sp: "),
    ({"pp_size": 2}, "--pp-size 2: "),
    ({"attn_cp_size": 2}, "--attn-cp-size 2 / --enable-prefill-cp: "),
    ({"enable_prefill_cp": True}, "--attn-cp-size 1 / --enable-prefill-cp: "),
    ({"dcp_size": 2}, "--dcp-size 2: "),
    ({"elastic_ep_backend": "mooncake"}, "--elastic-ep-backend mooncake: "),
    ({"enable_two_batch_overlap": True}, "--enable-two-batch-overlap: "),
    ({"enable_pdmux": True}, "--enable-pdmux: "),
    ({"disaggregation_mode": "prefill"}, "--disaggregation-mode prefill: "),
    ({"disaggregation_mode": "decode"}, "--disaggregation-mode decode: "),
    ({"use_ray": True}, "--use-ray: "),
    ({"disable_radix_cache": True}, "--disable-radix-cache (given, or set by SGLang "),
    ({"hicache_storage_backend": "file"}, "--hicache-storage-backend file: "),
    (
        {"enable_hierarchical_cache": True, "hicache_host_memory_mode": "buffer_only"},
        "--hicache-host-memory-mode buffer_only: ",
    ),
    (
        {"enable_unified_cache_external_linker": True},
        "--enable-unified-cache-external-linker: ",
    ),
    ({"enable_lmcache": True}, "--enable-lmcache: "),
    ({"enable_flexkv": True}, "--enable-flexkv: "),
    ({"enable_session_radix_cache": True}, "--enable-session-radix-cache: "),
    ({"enable_page_major_kv_layout": True}, "--enable-page-major-kv-layout: "),
    ({"enable_unified_memory": True}, "--enable-unified-memory: "),
    ({"enable_hisparse": True}, "--enable-hisparse: "),
    ({"kv_cache_dtype": "nvfp4"}, "--kv-cache-dtype nvfp4: "),
    ({"kv_cache_dtype": "mxfp8"}, "--kv-cache-dtype mxfp8: "),
    ({"kv_canary": "log"}, "--kv-canary log: "),
    ({"env": {"SGLANG_USE_HND_KVCACHE": "1"}}, "SGLANG_USE_HND_KVCACHE=1: "),
    (
        {"env": {"SGLANG_AITER_KV_CACHE_LAYOUT": "vectorized_5d"}},
        "SGLANG_AITER_KV_CACHE_LAYOUT=vectorized_5d: ",
    ),
    (
        {"env": {"SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "1"}},
        "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING=1: ",
    ),
    ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm EAGLE: "),
    ({"speculative_algorithm": "STANDALONE"}, "--speculative-algorithm STANDALONE: "),
    ({"speculative_algorithm": "UNO"}, "--speculative-algorithm UNO: "),
    ({"decoupled_spec_role": "verifier"}, "--decoupled-spec-role verifier: "),
    ({"dllm_algorithm": "LowConfidence"}, "--dllm-algorithm LowConfidence: "),
    ({"raw": {"lora_backend": "triton"}}, "--lora-backend triton: "),
    ({"raw": {"lora_backend": "triton_v2"}}, "--lora-backend triton_v2: "),
    ({"moe_runner_backend": "lora_triton"}, "--moe-runner-backend lora_triton: "),
    ({"enable_nvidia_megakernel": True}, "--enable-nvidia-megakernel: "),
    ({"enable_amd_monokernel": True}, "--enable-amd-monokernel: "),
    ({"enable_lora_overlap_loading": True}, "--enable-lora-overlap-loading: "),
    ({"lora_drain_wait_threshold": 0.5}, "--lora-drain-wait-threshold 0.5: "),
    ({"lora_use_virtual_experts": True}, "--lora-use-virtual-experts: "),
    ({"experts_shared_outer_loras": True}, "--experts-shared-outer-loras: "),
    ({**EXPERTS, "moe_runner_backend": "deep_gemm"}, "--moe-runner-backend deep_gemm with experts"),
    ({**EXPERTS, "moe_a2a_backend": "deepep"}, "--moe-a2a-backend deepep with experts"),
    ({**EXPERTS, "ep_size": 2}, "--ep-size 2 with experts"),
    ({**EXPERTS, "enable_eplb": True}, "--enable-eplb / --init-expert-location / --ep-num-"),
    (
        {"model": {"attention_arch": "MLA"}},
        "this model (multi-head latent attention without q_lora_rank): ",
    ),
    (
        {
            "model": {"architectures": ["Step3p5ForCausalLM"]},
            "disable_hybrid_swa_memory": True,
        },
        "this model (sliding windows and full attention, of a class that does not tell ",
    ),
    ({"uses_mamba_radix_cache": True}, "this model (state spaces or linear attention): "),
    ({"model": {"attention_arch": "SSM"}}, "this model (state spaces or linear attention): "),
    (
        {**HYBRID, "enable_hierarchical_cache": True},
        "--enable-hierarchical-cache with linear attention or state spaces: ",
    ),
    (
        {**HYBRID, "speculative_algorithm": "NGRAM"},
        "--speculative-algorithm NGRAM with linear attention or state spaces: ",
    ),
    ({"model": {"is_encoder_decoder": True}}, "this model (encoder and decoder): "),
]
ACCEPTED: list[dict[str, Any]] = [
    {},
    HYBRID,
    {"tp_size": 2},
    {"dp_size": 2},
    {"page_size": 16},
    {"kv_cache_dtype": "fp8_e5m2"},
    {"enable_mixed_chunk": True},
    {"enable_memory_saver": True},
    {"enable_hierarchical_cache": True, "hicache_write_policy": "write_back"},
    {"enable_priority_scheduling": True, "disable_priority_preemption": True},
    {"radix_eviction_policy": "tlru"},
    {"lora_target_modules": ["all"]},
    {"lora_target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    {"tokenizer_worker_num": 2},
    EXPERTS,
    {"model": {"n_routed_experts": 8}, "lora_target_modules": ["gate_proj", "down_proj"]},
    {"model": {"num_experts": 8}, "lora_target_modules": ATTENTION, "ep_size": 2},
    {"model": {"num_experts": 8}, "lora_target_modules": ["down_proj"], "ep_size": 2},
    {"lora_target_modules": ["all"], "ep_size": 2},
    {"experts_shared_outer_loras": False},
    {"model": {"architectures": ["GptOssForCausalLM"]}},
    {"model": {"architectures": ["Step3p5ForCausalLM"]}},
    {
        "model": {"architectures": ["Step3p5ForCausalLM"], "attention_chunk_size": 8192},
        "disable_hybrid_swa_memory": True,
    },
    {"model": {"is_generation": False}},
    {"raw": {"lora_backend": "elora_torch"}},
    {"raw": {"lora_backend": "elora_triton"}},
]


def _in_process(run_python: RunPython, checkpoint: Path, function: str, *arguments: Any) -> Any:
    """What a function of the program ``compatibility`` returns."""
    given = [json.dumps(argument) for argument in arguments]
    result = run_python("-c", source("compatibility"), str(checkpoint), function, *given)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_every_refused_flag_combination_is_reported(
    run_python: RunPython, checkpoint: Path
) -> None:
    """Trigger each row of the table alone; its message says what to do."""
    cases = [case for case, _ in REFUSED]
    lines, missing = _in_process(run_python, checkpoint, "every_refusal", LORA, [*cases, *ACCEPTED])
    assert missing == []
    for (case, begin), found in zip(REFUSED, lines, strict=False):
        assert len(found) == 1, (case, found)
        assert found[0].startswith(f"  {begin}"), (case, found)
        assert found[0].endswith("run without --elora"), (case, found)
    for case, found in zip(ACCEPTED, lines[len(REFUSED) :], strict=True):
        assert found == [], (case, found)


def test_real_server_flags_are_checked(run_python: RunPython, checkpoint: Path) -> None:
    """Through SGLang's parser and resolution: all problems at once, none without LoRA."""
    with_lora, without, implied = _in_process(run_python, checkpoint, "real_flags", LORA)
    named = [line.split()[0].rstrip(":") for line in with_lora]
    assert named == [
        "--disable-radix-cache",
        "--lora-backend",
        "--enable-lora-overlap-loading",
        "--lora-drain-wait-threshold",
    ]
    assert without == []
    assert len(implied) == 1


def test_data_parallel_attention_is_refused_in_every_spelling(
    run_python: RunPython, checkpoint: Path
) -> None:
    found = _in_process(run_python, checkpoint, "data_parallel_attention", LORA)
    for (problem,) in found:
        assert problem.startswith("  --attn-dp-size 2 (or --enable-dp-attention): ")


def test_compatibility_rows_read_fields_that_flags_set(
    run_python: RunPython, checkpoint: Path
) -> None:
    """A field that no flag sets any more would never be refused."""
    found, can_fail = _in_process(run_python, checkpoint, "fields_without_a_flag")
    assert can_fail and len(found) > 40
    # SGLang derives this one from the model.
    assert [name for name, settable in found.items() if not settable] == ["uses_mamba_radix_cache"]


def test_adapter_events_require_a_kv_event_publisher(
    run_python: RunPython, checkpoint: Path
) -> None:
    no_stream, no_lora, both = _in_process(run_python, checkpoint, "adapter_events", LORA)
    expected = "--elora-adapter-events needs --enable-lora and --kv-events-config"
    assert no_stream == no_lora == expected and both == ""


def test_flags_about_slots_have_no_effect(run_python: RunPython, checkpoint: Path) -> None:
    """One line in the log; and SGLang's own check does not ask for as many adapters as slots."""
    quiet, heard, limit = _in_process(run_python, checkpoint, "flags_about_slots", LORA)
    assert quiet == []
    assert [line.split(" has no effect")[0] for line in heard] == [
        "--max-loras-per-batch 3",
        "--lora-eviction-policy fifo",
        "--radix-eviction-policy lfu",
    ]
    assert limit == 4


def test_lora_backend_and_cuda_graphs(run_python: RunPython, checkpoint: Path) -> None:
    """The torch backend runs eagerly; kernels are captured, and chosen where there is CUDA."""
    found = _in_process(run_python, checkpoint, "lora_backends", LORA)
    on_cpu, on_cuda = found[:4], found[4:]
    torch, triton = ["elora_torch", "disabled"], ["elora_triton", "full"]
    assert on_cpu == [torch, torch, triton, ["elora_torch", "full"]]
    assert on_cuda == [triton, torch, triton, triton]


def test_unsupported_kv_pools_are_refused(run_python: RunPython, checkpoint: Path) -> None:
    plain, latent, hybrid, windows, *refused = _in_process(run_python, checkpoint, "pools")
    assert plain == latent == hybrid == windows == ""
    words = (
        "sparse attention",
        "MLATokenToKVPoolFP4",
        "hnd",
        "scales",
        "was not tested",
        "all layers have sliding windows",
        "radix cache is off",
    )
    for text, word in zip(refused, words, strict=True):
        assert word in text
        assert text.endswith("run without --elora")


def test_launch_error_lists_all_reasons(run_python: RunPython, checkpoint: Path) -> None:
    result = run_python(
        *("-m", "sglang_elora.launch_server", "--elora", "--model-path", str(checkpoint), *LORA),
        *("--enable-session-radix-cache", "--enable-lora-overlap-loading"),
    )
    assert result.returncode != 0
    assert "--elora does not run with:" in result.stderr
    assert "  --enable-session-radix-cache: its references" in result.stderr
    assert "  --enable-lora-overlap-loading: it loads into slots" in result.stderr


def test_shared_experts_stay_modules_if_adapters_may_have_weights_for_them(
    run_python: RunPython, checkpoint: Path
) -> None:
    fused = _in_process(run_python, checkpoint, "fuses_shared_experts")
    assert fused == [True, False, False, False]  # only modules of attention; parts of the MLP; all
