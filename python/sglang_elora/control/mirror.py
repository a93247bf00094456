"""The tokenizer process's copy of the scheduler's state, updated incrementally."""

from __future__ import annotations

from collections.abc import Container

from sglang_elora.control.state import AdapterState, Changes, PoolState


class StateMirror:
    """``adapters`` by id, as of ``version``; request the changes since then and ``apply`` them."""

    def __init__(self) -> None:
        self.version = 0
        self.adapters: dict[str, AdapterState] = {}
        self.pool: PoolState | None = None  # None until the first ``apply``

    def apply(self, changes: Changes, loaded: Container[str]) -> None:
        """Apply the changes, and drop adapters that are no longer loaded."""
        self.adapters.update((adapter.id, adapter) for adapter in changes.adapters)
        for adapter_id in [adapter_id for adapter_id in self.adapters if adapter_id not in loaded]:
            del self.adapters[adapter_id]
        self.version, self.pool = changes.version, changes.pool
