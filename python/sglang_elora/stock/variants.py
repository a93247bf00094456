"""Plugins that change one thing in a server of stock SGLang.

The benchmark adds them by name (``bench.sides``), as SGLang plugins of their own; this package's
own plugin does not use them. Each writes a line to the server's log when it is in effect.

``grouped``: LoRA on the CPU computed per adapter, as ELORA's CPU backend computes it
(``grouped_backend``). SGLang's slots, loads, scheduling and cache are unchanged.

``overlap``: adapters are loaded concurrently with batches (``--enable-lora-overlap-loading``)
with any number of adapters. SGLang requires ``--max-loaded-loras`` of at most twice the slots,
since it pins the host memory of every adapter that it has loaded once. With 64 adapters of rank 8
to 64 that is 131 MB, so the condition is lifted here; everything else of overlap loading is
SGLang's, but that a scheduler which has nothing to do but to wait for a load sleeps between its
looks at it, as ELORA's does: on a GPU a core is free for that, here it would be taken from the
other processes. (Without a change, ``--max-loaded-loras 2N`` and names registered by
``/load_lora_adapter`` would do as well, but then SGLang reads an adapter's files again whenever it
is not among the last 2N.)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

_SOURCE = "sglang_elora.stock.overlap"
_IDLE_S = 200e-6  # as srt.scheduler.swapper has it for ELORA


def grouped() -> None:
    from sglang.srt.lora.backend.lora_registry import register_lora_backend

    def backend() -> Any:
        from sglang_elora.stock.grouped_backend import GroupedLoRABackend

        logger.info("stock variant: torch_native computes LoRA per adapter")
        return GroupedLoRABackend

    register_lora_backend("torch_native")(backend)


def overlap() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_elora.plugin import passes_messages_on

    if passes_messages_on():  # a process without a scheduler
        return
    HookRegistry.register(
        "sglang.srt.arg_groups.lora_hook.check_lora_server_args",
        check_without_limit,
        HookType.AROUND,
    )
    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.on_idle", sleep_while_loading, HookType.AFTER
    )


def sleep_while_loading(result: None, scheduler: Any) -> None:
    """Sleep briefly if loads are in progress; runs after ``Scheduler.on_idle``."""
    if scheduler.enable_lora_overlap_loading:
        if scheduler.lora_overlap_loader.lora_to_overlap_load_event:
            time.sleep(_IDLE_S)


def check_without_limit(check: Callable[[Any], None], server_args: Any) -> None:
    """SGLang's check of LoRA arguments without its limit on loaded adapters. The condition is
    the only place in it that reads the flag, so the flag is off while it runs."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    overlaps = resolving_view(server_args).enable_lora_overlap_loading
    if overlaps:
        declare_resolution(server_args, _SOURCE, enable_lora_overlap_loading=False)
    check(server_args)
    if overlaps:
        declare_resolution(server_args, _SOURCE, enable_lora_overlap_loading=True)
        logger.info("stock variant: overlap loading with any number of adapters")
