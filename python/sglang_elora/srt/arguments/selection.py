"""Hook body that selects ELORA's radix cache and LoRA backend."""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.environ import envs
from sglang.srt.utils import is_cuda

from sglang_elora.srt.arguments.compatibility import adapts_mlp, run_eagerly, wants_lora
from sglang_elora.srt.arguments.model_kinds import keeps_whole_windows
from sglang_elora.srt.lora.lora_backend import TORCH, TRITON
from sglang_elora.srt.mem_cache.radix_cache import BACKEND

WORKER_APP = "sglang_elora.srt.install.worker_app:app"


def select_parts(result: None, server_args: Any) -> None:
    """Select ELORA's radix cache and LoRA backend. Runs after ``handle_platform_defaults``.

    With LoRA, shared experts stay modules of their own, if adapters may have weights for them, and
    with a host tier or drafts, layers with sliding windows keep their KV in the pool of the others
    (SGLang's ``--disable-hybrid-swa-memory``).

    By default the LoRA backend is ``elora_triton`` on CUDA and ``elora_torch`` elsewhere. Another
    ``--lora-backend`` is refused by ``check_compatible``.

    Raises:
        ValueError: ``--radix-cache-backend``, or the app of tokenizer workers, has another value.
    """
    asked_for = resolving_view(server_args).radix_cache_backend
    if asked_for not in (None, BACKEND):
        raise ValueError(
            f"--elora brings its own radix cache; drop --radix-cache-backend {asked_for} or --elora"
        )
    lora_backend = server_args._raw_input["lora_backend"]
    if lora_backend not in (TORCH, TRITON):
        lora_backend = TRITON if is_cuda() else TORCH
    declare_resolution(
        server_args, "sglang_elora", radix_cache_backend=BACKEND, lora_backend=lora_backend
    )
    if resolving_view(server_args).tokenizer_worker_num > 1:
        _use_our_workers()
    if wants_lora(resolving_view(server_args)):
        if keeps_whole_windows(resolving_view(server_args)):
            declare_resolution(server_args, "sglang_elora", disable_hybrid_swa_memory=True)
        if adapts_mlp(resolving_view(server_args)):
            declare_resolution(server_args, "sglang_elora", disable_shared_experts_fusion=True)
        if lora_backend == TORCH:
            run_eagerly(server_args)


def _use_our_workers() -> None:
    """Name the app that loads plugins in tokenizer workers, which SGLang starts without."""
    given = envs.SGLANG_HTTP_SERVER_APP_PATH
    if given.is_set() and given.get() not in (given.default, WORKER_APP):
        raise ValueError(
            f"--elora needs an HTTP app of its own in tokenizer workers: unset "
            f"SGLANG_HTTP_SERVER_APP_PATH={given.get()}, or drop --tokenizer-worker-num"
        )
    given.set(WORKER_APP)
