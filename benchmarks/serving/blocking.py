"""For comparison: ELORA with loads that block the scheduler, at the moment a batch needs them."""

from __future__ import annotations

from typing import Any


def load() -> None:
    """Plugin: nothing is brought in ahead, and a copy is waited for where it is started."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang_elora.host.residency.Residency._start_copy", wait_at_once, HookType.AFTER
    )


def wait_at_once(copy: Any, self: Any, uid: str, slots: Any) -> Any:
    copy.synchronize()
    return copy
